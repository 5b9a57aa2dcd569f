"""The sampler's client without an engine: what it asks of the worker, and what it does where the engine cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from iterdpo.config import EngineConfig
from iterdpo.errors import ChildFailed
from iterdpo.run.worker import Done
from iterdpo.sampling import SamplingParameters, VLLMSampler
from iterdpo.sampling.base import Enqueue, Finish, Load, Sample, Start, Started
from iterdpo.sampling.client import OWN_PROCESS
from iterdpo.types import Completion


class Scripted(VLLMSampler):
    """Its worker is the list of replies; `asked` are the requests."""

    def __init__(self, *replies: Any, log: Path, lora: Any = "auto") -> None:
        self.said: list[str] = []
        engine = EngineConfig(lora=lora)
        super().__init__(max_model_len=lambda: 64, log=log, engine=engine, adapter_rank=4, say=self.said.append)
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


def test_an_engine_starts_with_the_runs_own_model_before_another_one_is_sampled_from(tmp_path: Path) -> None:
    sampler = Scripted(Started(), Done(), Done(), log=tmp_path / "sampler.log")
    sampler._base = lambda policy: tmp_path / "own"
    sampler.load(tmp_path / "other", "1")
    sampler.load(tmp_path / "own", "2")
    [start, *loads] = sampler.asked
    assert start.policy == str(tmp_path / "own")
    assert loads == [Load(str(tmp_path / name), reload=True) for name in ("other", "own")]


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


PARAMETERS = SamplingParameters(n=2, max_tokens=3)
BATCHES = [([[number]] * count, [number] * count) for number, count in enumerate([1, 3, 1, 1, 1])]


def groups(number: int) -> list[list[Completion]]:
    return [[Completion(f"{number}", [number], [-1.0], "stop")] * 2]


class Flying(Scripted):
    """An engine that six completions keep busy. `most` were in flight."""

    def __init__(self, log: Path) -> None:
        super().__init__(Started(in_flight=6), log=log)
        self.flying: list[int] = []
        self.most = 0

    def _call(self, request: Any, read: Any) -> Any:
        if isinstance(request, Enqueue):
            self.flying.append(request.prompt_ids[0][0])
            self.most = max(self.most, sum(2 * len(BATCHES[number][0]) for number in self.flying))
            return Done()
        if isinstance(request, Finish):
            return groups(self.flying.pop(0))
        return super()._call(request, read)


def test_a_gpu_has_batches_in_flight_and_gives_them_back_in_order(tmp_path: Path) -> None:
    sampler = Flying(tmp_path / "sampler.log")
    sampler.load(tmp_path, "first")
    assert list(sampler.sample_batches(iter(BATCHES), PARAMETERS)) == [groups(number) for number in range(5)]
    assert (sampler.most, sampler.flying) == (8, [])  # the first two; then no more until the second has ended
    assert list(sampler.sample_batches([], PARAMETERS)) == []


def test_a_gpu_is_told_the_temperature_of_each_prompt_that_its_seed_gives_it(tmp_path: Path) -> None:
    told: list[list[float]] = []

    class Noting(Flying):
        def _call(self, request: Any, read: Any) -> Any:
            if isinstance(request, Enqueue):
                told.append(request.temperatures)
            return super()._call(request, read)

    sampler = Noting(tmp_path / "sampler.log")
    sampler.load(tmp_path, "first")
    several = replace(PARAMETERS, temperature=(0.5, 1.0))
    list(sampler.sample_batches(iter(BATCHES), several))
    assert told == [[several.temperature_of(seed) for seed in seeds] for _, seeds in BATCHES]


def test_a_caller_who_stops_early_closes_the_engine(tmp_path: Path) -> None:
    sampler = Flying(tmp_path / "sampler.log")
    sampler.load(tmp_path, "first")
    batches = sampler.sample_batches(iter(BATCHES), PARAMETERS)
    assert next(batches) == groups(0)
    batches.close()
    assert sampler._loaded is None


def test_an_engine_that_dies_in_flight_is_closed_and_says_so(tmp_path: Path) -> None:
    sampler = Scripted(Started(in_flight=6), Done(), Done(), Done(), ChildFailed("it died"), log=tmp_path / "s.log")
    sampler.load(tmp_path, "first")
    with pytest.raises(ChildFailed, match="it died"):
        list(sampler.sample_batches(BATCHES, PARAMETERS))
    assert sampler._loaded is None


def test_without_batches_in_flight_each_is_sampled_with_its_seeds(tmp_path: Path) -> None:
    sampler = Scripted(Started(), groups(0), groups(1), log=tmp_path / "sampler.log")
    sampler.load(tmp_path, "first")
    assert list(sampler.sample_batches(BATCHES[:2], PARAMETERS)) == [groups(0), groups(1)]
    assert sampler.asked[1:] == [Sample(*batch, PARAMETERS) for batch in BATCHES[:2]]


@pytest.mark.parametrize(
    ("gpus", "reproducible", "given", "own", "invariant"),
    [
        ([], False, None, "0", None),
        (["0"], False, None, "1", None),
        (["0"], True, None, "0", "1"),
        ([], True, None, "0", None),
        (["0"], False, "0", "0", None),
    ],
)
def test_the_engine_has_a_process_of_its_own_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    gpus: list[str],
    reproducible: bool,
    given: str | None,
    own: str,
    invariant: str | None,
) -> None:
    monkeypatch.delenv(OWN_PROCESS, raising=False)
    if given is not None:
        monkeypatch.setenv(OWN_PROCESS, given)
    monkeypatch.setattr("iterdpo.sampling.client.visible_gpus", lambda: gpus)
    sampler = VLLMSampler(
        max_model_len=lambda: 64, log=tmp_path / "s.log", engine=EngineConfig(), reproducible=reproducible
    )
    assert sampler._env[OWN_PROCESS] == own
    assert sampler._env.get("VLLM_BATCH_INVARIANT") == invariant
