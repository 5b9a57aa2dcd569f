"""A sampler that is started when it is first needed, and left alone if it never is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from iterdpo.sampling.base import Sampler, SamplingParameters
from iterdpo.types import Completion


class LazySampler:
    """The sampler that `start` makes, once. Nothing is started by `release` and `close`."""

    def __init__(self, start: Callable[[], Sampler]) -> None:
        self._start = start
        self._sampler: Sampler | None = None

    def started(self) -> Sampler:
        if self._sampler is None:
            self._sampler = self._start()
        return self._sampler

    def load(self, policy: Path, digest: str) -> None:
        self.started().load(policy, digest)

    def sample(
        self, prompt_ids: Sequence[list[int]], seeds: Sequence[int], parameters: SamplingParameters
    ) -> list[list[Completion]]:
        return self.started().sample(prompt_ids, seeds, parameters)

    def release(self) -> None:
        if self._sampler is not None:
            self._sampler.release()

    def close(self) -> None:
        if self._sampler is not None:
            self._sampler.close()
