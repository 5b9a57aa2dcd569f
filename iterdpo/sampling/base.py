"""What the loop needs of a sampler. The fake for tests satisfies it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from iterdpo.types import Completion


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How to sample: `SamplingParameters(n=4, temperature=1.0, top_p=1.0, top_k=0, max_tokens=256)`."""

    n: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256


class Sampler(Protocol):
    def load(self, policy: Path, digest: str) -> None:
        """Make `policy` the policy to sample from; `digest` names its content. Cheap where it is already loaded."""
        ...

    def sample(
        self, prompt_ids: Sequence[list[int]], seeds: Sequence[int], parameters: SamplingParameters
    ) -> list[list[Completion]]:
        """`parameters.n` completions of each prompt. A call's result depends on the policy and its arguments alone:
        not on calls before it, so that a resumed run samples what the uninterrupted one would have.
        """
        ...

    def release(self) -> None:
        """Give the accelerator's memory back until the next `load`. The process lives on."""
        ...

    def close(self) -> None:
        """End it. Safe to call twice."""
        ...
