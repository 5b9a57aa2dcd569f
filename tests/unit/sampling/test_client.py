"""The sampler's client without an engine: what it asks of the worker, and what it does where the engine cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from iterdpo.config import EngineConfig
from iterdpo.errors import ChildFailed
from iterdpo.run.worker import Done
from iterdpo.sampling import VLLMSampler
from iterdpo.sampling.base import Load, Start, Started


class Scripted(VLLMSampler):
    """Its worker is the list of replies; `asked` are the requests."""

    def __init__(self, *replies: Any, log: Path, lora: Any = "auto") -> None:
        self.said: list[str] = []
        engine = EngineConfig(lora=lora)
        super().__init__(max_model_len=64, log=log, engine=engine, adapter_rank=4, say=self.said.append)
        self.replies, self.asked = list(replies), []

    def warm_up(self) -> None:
        pass

    def _call(self, request: Any, read: Any) -> Any:
        self.asked.append(request)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply


REFUSAL = "ValueError: TinyForCausalLM does not support LoRA yet.\nlog"


def test_an_engine_that_cannot_take_adapters_is_started_again_without_them(tmp_path: Path) -> None:
    sampler = Scripted(Started(REFUSAL), Started(), Done(), log=tmp_path / "sampler.log")
    sampler.load(tmp_path, "first")
    sampler.load(tmp_path, "second")
    assert [(type(asked), getattr(asked, "lora", None)) for asked in sampler.asked] == [
        (Start, "auto"),
        (Start, "merge"),
        (Load, None),
    ]
    (said,) = sampler.said
    assert "TinyForCausalLM does not support LoRA yet" in said
    assert "\n" not in said


def test_an_engine_that_must_take_adapters_fails_if_it_cannot(tmp_path: Path) -> None:
    sampler = Scripted(ChildFailed(f"sampler, start: {REFUSAL}"), log=tmp_path / "sampler.log", lora="vllm")
    with pytest.raises(ChildFailed, match="does not support LoRA"):
        sampler.load(tmp_path, "first")
    assert sampler.said == []


def test_another_failure_is_not_tried_again(tmp_path: Path) -> None:
    sampler = Scripted(ChildFailed("sampler, start: no memory"), log=tmp_path / "sampler.log")
    with pytest.raises(ChildFailed, match="no memory"):
        sampler.load(tmp_path, "first")
    assert len(sampler.asked) == 1
