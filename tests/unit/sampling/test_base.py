"""A sampler that is started when it is first needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from iterdpo.sampling import LazySampler, Sampler, SamplingParameters
from iterdpo.testing import FakeSampler


class Noting(FakeSampler):
    def __init__(self) -> None:
        super().__init__(lambda ids, k: "x" * (k + 1))
        self.told: list[str] = []

    def release(self) -> None:
        self.told.append("release")

    def close(self) -> None:
        self.told.append("close")


@pytest.fixture
def started() -> list[Noting]:
    """The samplers that were started."""
    return []


@pytest.fixture
def lazy(started: list[Noting]) -> LazySampler:
    def start() -> Sampler:
        started.append(Noting())
        return started[-1]

    return LazySampler(start)


def test_nothing_is_started_by_what_ends_it(lazy: LazySampler, started: list[Noting]) -> None:
    lazy.release()
    lazy.close()
    lazy.close()
    assert started == []


def test_it_is_started_once_and_does_what_it_is_asked(lazy: LazySampler, started: list[Noting]) -> None:
    lazy.load(Path("policy"), "81f0")
    (group,) = lazy.sample([[1, 2]], [0], SamplingParameters(n=2))
    lazy.release()
    lazy.load(Path("policy"), "c3aa")
    lazy.close()
    (sampler,) = started
    assert [c.text for c in group] == ["x", "xx"]
    assert (sampler.loaded, sampler.told) == (["81f0", "c3aa"], ["release", "close"])
    assert lazy.started() is sampler


def test_a_start_that_fails_is_tried_again() -> None:
    tries: list[int] = []

    def start() -> Sampler:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("no device")
        return Noting()

    lazy = LazySampler(start)
    with pytest.raises(OSError, match="no device"):
        lazy.load(Path("policy"), "81f0")
    lazy.load(Path("policy"), "81f0")
    assert len(tries) == 2
