"""Two real vLLM engines on one queue, of which one is killed in the middle of a round."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from iterdpo.config import EngineConfig
from iterdpo.run import supervise
from iterdpo.sampling import Pool, SamplingParameters, VLLMSampler
from iterdpo.sampling.client import engine_share
from tests.integration.test_sampling import transformers_logps

pytestmark = [pytest.mark.slow, pytest.mark.extended]

PARAMETERS = SamplingParameters(n=3, max_tokens=24)
BATCHES = [([[70 + i, 71, number], [80 + number]], [number, 1000 + number]) for i, number in enumerate(range(24))]


def family(engine: VLLMSampler) -> list[int]:
    assert engine._worker is not None
    return supervise._descendants(engine._worker._child.process.pid)


def test_two_engines_of_which_one_is_killed_sample_what_one_engine_does(tmp_path: Path, tiny_model: Path) -> None:
    said: list[str] = []
    engines = [
        VLLMSampler(
            max_model_len=lambda: 64,
            log=tmp_path / f"sampler-{number}.log",
            engine=EngineConfig(dtype="float32"),
            variables=engine_share(number, 2, 1),
        )
        for number in range(2)
    ]
    pool = Pool(engines, say=said.append)
    try:
        pool.warm_up()
        pool.load(tiny_model, "first")
        sampled = pool.sample_batches(BATCHES, PARAMETERS)
        found = [next(sampled)]
        for pid in family(engines[1]):
            os.kill(pid, signal.SIGKILL)
        found += sampled
        [line] = said
        assert "prompts are dealt again: sampler, sample: the process died: it was ended by SIGKILL" in line

        engines[0].load(tiny_model, "first")
        assert found == [engines[0].sample(*batch, PARAMETERS) for batch in BATCHES]
    finally:
        pool.close()
    for batch, groups in zip(BATCHES[::8], found[::8], strict=True):
        for prompt, completions in zip(batch[0], groups, strict=True):
            assert len(completions) == PARAMETERS.n
            for completion in completions:
                expected = transformers_logps(tiny_model, prompt, completion.token_ids)
                assert completion.logprobs == pytest.approx(expected, abs=1e-3)
