"""A real vLLM engine: what it reports is what transformers computes, and it repeats itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from iterdpo.config import EngineConfig
from iterdpo.sampling import SamplingParameters, VLLMSampler
from iterdpo.testing import build_tiny_checkpoint
from iterdpo.types import Completion

pytestmark = pytest.mark.slow

PROMPTS = [[70, 71, 72, 73], [80, 81], [90] * 9, [100, 7, 40]]
SEEDS = [11, 12, 13, 14]
PARAMETERS = SamplingParameters(n=3, temperature=1.0, max_tokens=12)


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMSampler]:
    log = tmp_path_factory.mktemp("sampler") / "sampler.log"
    engine = VLLMSampler(max_model_len=lambda: 64, log=log, engine=EngineConfig(dtype="float32"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("other-model"), seed=1)


def transformers_logps(model: Path, prompt: list[int], completion: list[int]) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logps = loaded(torch.tensor([prompt + completion])).logits.log_softmax(-1)[0]
    return [logps[len(prompt) + t - 1, token].item() for t, token in enumerate(completion)]


def assert_agrees(model: Path, sampled: list[list[Completion]]) -> None:
    for prompt, completions in zip(PROMPTS, sampled, strict=True):
        assert len(completions) == PARAMETERS.n
        for completion in completions:
            expected = transformers_logps(model, prompt, completion.token_ids)
            assert completion.logprobs == pytest.approx(expected, abs=1e-3)


def test_reported_logprobs_are_the_models_before_and_after_a_weight_change(
    sampler: VLLMSampler, tiny_model: Path, other_model: Path
) -> None:
    sampler.load(tiny_model, "first")
    first = sampler.sample(PROMPTS, SEEDS, PARAMETERS)
    assert_agrees(tiny_model, first)

    sampler.load(other_model, "second")
    second = sampler.sample(PROMPTS, SEEDS, PARAMETERS)
    assert_agrees(other_model, second)
    assert [[c.token_ids for c in g] for g in first] != [[c.token_ids for c in g] for g in second]

    sampler.load(tiny_model, "first")
    assert sampler.sample(PROMPTS, SEEDS, PARAMETERS) == first


def test_a_sample_does_not_depend_on_what_was_sampled_before(sampler: VLLMSampler, tiny_model: Path) -> None:
    sampler.load(tiny_model, "first")
    expected = sampler.sample(PROMPTS, SEEDS, PARAMETERS)
    sampler.sample(PROMPTS[::-1] * 3, list(range(12)), SamplingParameters(n=2, max_tokens=20))
    assert sampler.sample(PROMPTS, SEEDS, PARAMETERS) == expected


def test_batches_in_flight_come_back_in_order_with_the_models_logprobs(
    sampler: VLLMSampler, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler.load(tiny_model, "first")
    monkeypatch.setattr(sampler, "_in_flight", 10)  # as on a GPU
    batches = [(PROMPTS[:3], SEEDS[:3]), (PROMPTS[3:], SEEDS[3:])] * 3
    found = list(sampler.sample_batches(batches, PARAMETERS))
    assert [len(groups) for groups in found] == [3, 1] * 3
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert_agrees(tiny_model, [*first, *second])
    monkeypatch.undo()
    expected = sampler.sample(PROMPTS, SEEDS, PARAMETERS)
    assert sampler.sample(PROMPTS, SEEDS, PARAMETERS) == expected


def test_the_completions_of_a_prompt_differ_and_truncation_is_marked(sampler: VLLMSampler, tiny_model: Path) -> None:
    sampler.load(tiny_model, "first")
    eos = 2  # <|im_end|>
    for completions in sampler.sample(PROMPTS, SEEDS, PARAMETERS):
        assert len({tuple(c.token_ids) for c in completions}) == len(completions)
        for completion in completions:
            assert len(completion.token_ids) == len(completion.logprobs)
            assert (completion.finish_reason == "stop") == (completion.token_ids[-1] == eos)
            assert completion.truncated == (completion.finish_reason == "length")
            if completion.truncated:
                assert len(completion.token_ids) == PARAMETERS.max_tokens


def test_a_completion_ends_with_the_first_of_the_stop_tokens(sampler: VLLMSampler, tiny_model: Path) -> None:
    sampler.load(tiny_model, "first")
    free = sampler.sample(PROMPTS, SEEDS, PARAMETERS)[0][0]
    stop = free.token_ids[3]
    stopped = sampler.sample(PROMPTS, SEEDS, replace(PARAMETERS, stop_token_ids=(stop,)))
    assert stopped[0][0].token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    for completion in (c for group in stopped for c in group):
        assert stop not in completion.token_ids[:-1]
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] in (stop, 2))


def test_an_engine_that_cannot_start_says_why_and_where_its_log_is(tmp_path: Path) -> None:
    from iterdpo.errors import ChildFailed

    broken = VLLMSampler(max_model_len=lambda: 64, log=tmp_path / "sampler.log", engine=EngineConfig())
    with pytest.raises(ChildFailed, match=r"(?s)sampler, start: .*sampler\.log"):
        broken.load(tmp_path / "missing", "none")
    assert broken._worker is None
