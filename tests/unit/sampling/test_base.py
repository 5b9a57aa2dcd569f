"""Parameters of sampling."""

from __future__ import annotations

from collections import Counter

from iterdpo.sampling.base import SamplingParameters
from iterdpo.seeds import derive_seed


def test_one_temperature_is_that_of_every_prompt() -> None:
    assert {SamplingParameters(2, 0.7).temperature_of(seed) for seed in range(9)} == {0.7}


def test_of_several_temperatures_each_prompt_has_one_and_none_is_rare() -> None:
    parameters = SamplingParameters(2, (0.5, 0.8, 1.1))
    drawn = Counter(parameters.temperature_of(derive_seed(0, 1, "sample", f"p-{k}")) for k in range(900))
    assert drawn.keys() == {0.5, 0.8, 1.1}
    assert min(drawn.values()) > 300 - 5 * 14.2  # each 300 in the mean, with a standard deviation of 14.1
