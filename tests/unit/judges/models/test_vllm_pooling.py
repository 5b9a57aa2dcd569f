"""vLLM's pooling runner gives a classifier's own logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iterdpo.judging.judge import checked_judgments
from iterdpo.testing import make_group
from iterdpo.types import Completion, CompletionGroup, Prompt
from judges import load_judge


def chat(*texts: str) -> CompletionGroup:
    prompt = Prompt("p-chat", [{"role": "user", "content": "hi"}])
    return CompletionGroup(prompt, [1], [Completion(t, [1], [-1.0], "stop") for t in texts])


@pytest.mark.slow
def test_vllm_agrees_with_transformers_and_its_process_ends_with_close(
    build_reward_model: Callable[..., Path], tmp_path: Path
) -> None:
    # Weights ten times the usual: logits well outside (0, 1), where a sigmoid could hide.
    checkpoint = build_reward_model(tmp_path, 3, initializer_range=0.2)
    groups = [
        make_group("My ", ["a", "a much longer completion than the others", "", "bb", "a\n\nb"]),
        chat("yes", "no, never"),
        make_group("", [""]),
    ]
    args = {"model": str(checkpoint), "weights": [1, 2, -3], "dtype": "bfloat16"}
    plain = checked_judgments(load_judge("reward_model", args), groups)
    judge: Any = load_judge("reward_model", {**args, "backend": "vllm"})
    pooled = checked_judgments(judge, groups)
    # bf16 has 8 bits: the sum of three logits of size 1 to 5, with weights up to 3, was off by up to 0.08.
    for one, other in zip(plain, pooled, strict=True):
        assert one.abstentions == other.abstentions
        assert [s for s in other.scores if s is not None] == pytest.approx(
            [s for s in one.scores if s is not None], abs=0.2
        )
    known = [s for j in plain for s in j.scores if s is not None]
    assert max(known) - min(known) > 3
    process, log = judge._model._worker._child.process, judge._model._log
    judge.close()
    assert process.poll() is not None
    assert not log.exists()
