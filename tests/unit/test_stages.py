"""Which policy a round's loss is regularised towards; what a stage's judge has used; what the screen says."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from iterdpo.config import DPOConfig
from iterdpo.experiment import Experiment, Policy
from iterdpo.judging.judge import JudgeBase, NamedJudge
from iterdpo.run.progress import Progress
from iterdpo.run.rundir import RunDir, directory_digest, read_jsonl
from iterdpo.stages import reference_policy, train_on_pairs
from iterdpo.testing import build_tiny_checkpoint
from iterdpo.training.launch import TRAIN_LOG, TrainSpec
from iterdpo.types import CompletionGroup, Judgment

INITIAL = Policy(Path("initial"), "d0", 0)


def experiment(**dpo: Any) -> Any:
    """As far as `reference_policy` looks: every round was promoted."""
    policies = {t: Policy(Path(f"round-{t:03d}"), f"d{t}", t) for t in range(1, 9)} | {0: INITIAL}
    config = SimpleNamespace(dpo=DPOConfig(**dpo))
    return SimpleNamespace(config=config, initial=INITIAL, policy_after=lambda t: policies[t])


def reference(round: int, **dpo: Any) -> int:
    exp = experiment(**dpo)
    return reference_policy(exp, round, exp.policy_after(round - 1)).round


def test_what_a_judge_used_before_a_stage_is_not_counted_in_it() -> None:
    class Counting(JudgeBase):
        name = "counting"
        calls = 0

        def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
            return []

        def usage(self) -> dict[str, float]:
            return {"calls": self.calls}

    judge, named = Counting(), NamedJudge("train_judge", "mine", "1", lambda: judge)
    exp = object.__new__(Experiment)
    exp._judges, exp._used = {"train_judge": judge}, {}
    judge.calls = 24
    exp.begin_stage(named)
    judge.calls = 72
    assert exp.used(named) == {"calls": 48}


def test_the_rate_of_training_leaves_out_the_steps_of_an_earlier_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def launch(spec: TrainSpec, on_step: Callable[[dict[str, Any]], None], **_: Any) -> None:
        nonlocal now
        log = Path(spec.output) / TRAIN_LOG
        earlier = read_jsonl(log) if log.exists() else []
        for row in earlier:  # at once, when the process comes up
            on_step(row)
        for step in range(len(earlier) + 1, len(earlier) + 4):
            now += 60 if step == len(earlier) + 1 else 2  # the first with the start-up
            log.write_text("".join(json.dumps({"step": s, "loss": 0.5}) + "\n" for s in range(1, step + 1)))
            on_step({"step": step, "loss": 0.5})
        if not earlier:
            raise KeyboardInterrupt

    monkeypatch.setattr("iterdpo.run.progress.time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr("iterdpo.stages.launch_training", launch)
    run = RunDir(tmp_path)
    pairs = run.step(1, "pairs", {})
    pairs.begin()
    pairs.finish(counts={"kept": 24})
    screen = io.StringIO()
    settings: dict[str, Any] = {
        "policy": INITIAL,
        "reference": INITIAL,
        "initial": INITIAL,
        "dpo": DPOConfig(pairs_per_step=4),
        "seed": 0,
        "trust_remote_code": False,
        "progress": Progress(screen),
        "reserved": list,
    }
    with pytest.raises(KeyboardInterrupt):
        train_on_pairs(run, 1, **settings)
    train_on_pairs(run, 1, **settings)
    first, second = (line for line in screen.getvalue().splitlines() if " s to start" in line)
    for line, count in ((first, "12 pairs"), (second, "24 pairs")):
        assert count in line
        assert "64.0 s, 60.0 s to start, 2.0 pairs/s" in line


def test_previous_is_the_policy_that_the_round_starts_from() -> None:
    assert [reference(t, reference="previous") for t in (1, 2, 3)] == [0, 1, 2]


def test_initial_is_the_initial_policy_in_every_round() -> None:
    assert [reference(t, reference="initial") for t in (1, 2, 3)] == [0, 0, 0]


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4]), (2, [0, 0, 2, 2, 4]), (3, [0, 0, 0, 3, 3])])
def test_periodic_is_renewed_every_so_many_rounds(every: int, expected: list[int]) -> None:
    found = [reference(t, reference="periodic", reference_every=every) for t in (1, 2, 3, 4, 5)]
    assert found == expected


def test_ema_averages_the_policies_that_rounds_started_from_and_keeps_each_average(tmp_path: Path) -> None:
    checkpoints = [build_tiny_checkpoint(tmp_path / f"policy-{t}", seed=t) for t in range(3)]
    policies = [Policy(path, directory_digest(path), t) for t, path in enumerate(checkpoints)]
    exp: Any = SimpleNamespace(
        config=SimpleNamespace(dpo=DPOConfig(reference="ema", reference_decay=0.75)),
        run=RunDir(tmp_path / "run"),
        looking=False,
        progress=Progress(),
        initial=policies[0],
        policy_after=lambda t: policies[t],
    )
    assert reference_policy(exp, 1, policies[0]) == policies[0]
    third = reference_policy(exp, 3, policies[2])

    weights = [load_file(path / "model.safetensors") for path in checkpoints]
    averaged = load_file(third.path / "model.safetensors")
    for name, tensor in averaged.items():
        second = 0.75 * weights[0][name] + 0.25 * weights[1][name]
        torch.testing.assert_close(tensor, 0.75 * second + 0.25 * weights[2][name], atol=1e-6, rtol=0)
    assert (tmp_path / "run" / "round-002" / "ema" / "MANIFEST.json").exists()
    assert reference_policy(exp, 3, policies[2]).digest == third.digest  # found, not made again
