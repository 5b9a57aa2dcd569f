"""The `Sampler` protocol, which the loop and the fake for tests share, and the messages of vLLM's worker process."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from iterdpo.config import EngineConfig
from iterdpo.types import Completion


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How to sample: `SamplingParameters(n=4, temperature=1.0, top_p=1.0, top_k=0, max_tokens=256)`."""

    n: int
    temperature: float | tuple[float, ...] = 1.0
    """Of several, a prompt's seed decides which it has; see `temperature_of`."""
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion beside the tokenizer's EOS. The completion includes its end token, its text does not."""

    def temperature_of(self, seed: int) -> float:
        """The temperature of all completions of a prompt with this seed."""
        several = self.temperature
        return several[seed % len(several)] if isinstance(several, tuple) else several


Batch = tuple[list[list[int]], list[int]]
"""Prompts' token ids [prompts][T], and a seed for each."""


class Sampler(Protocol):
    """A class that derives from it needs no `sample_batches` of its own."""

    def load(self, policy: Path, digest: str) -> None:
        """Make `policy` the policy to sample from; `digest` names its content. Cheap if it is already loaded."""

    def sample(
        self, prompt_ids: Sequence[list[int]], seeds: Sequence[int], parameters: SamplingParameters
    ) -> list[list[Completion]]:
        """`parameters.n` completions of each prompt. The result depends on the policy and the arguments alone, not on
        earlier calls, so that a resumed run samples what the uninterrupted one would have.
        """

    def sample_batches(
        self, batches: Iterable[Batch], parameters: SamplingParameters
    ) -> Generator[list[list[Completion]]]:
        """`sample` of each batch, in their order. An engine may work on several at once.

        Closing the generator ends what is under way.
        """
        for prompt_ids, seeds in batches:
            yield self.sample(prompt_ids, seeds, parameters)

    def release(self) -> None:
        """Give the accelerator's memory back until the next `load`. The process lives on."""

    def close(self) -> None:
        """End the process. Safe to call twice."""


@dataclass(frozen=True)
class Start:
    """Build the engine with the policy's weights."""

    policy: str
    engine: EngineConfig
    max_model_len: int
    trust_remote_code: bool
    lora: str
    adapter_rank: int | None
    scratch: str
    reproducible: bool = False


@dataclass(frozen=True)
class Started:
    """`no_adapters`: why an engine with room for adapters failed to start, if `lora` allows one without; else None."""

    no_adapters: str | None = None
    in_flight: int = 0
    """How many completions keep the engine busy while the slowest of a batch end. 0: batches one by one."""


@dataclass(frozen=True)
class Load:
    """Wake up and, with `reload`, put another policy in place of the present one."""

    policy: str
    reload: bool


@dataclass(frozen=True)
class Sample:
    prompt_ids: list[list[int]]  # [prompts][T]
    seeds: list[int]  # [prompts]
    parameters: SamplingParameters


@dataclass(frozen=True)
class Enqueue:
    """Begin to sample these prompts, without seeds, beside those that are in flight."""

    prompt_ids: list[list[int]]  # [prompts][T]
    temperatures: list[float]  # [prompts]
    parameters: SamplingParameters


@dataclass(frozen=True)
class Finish:
    """Reply with the completions of the first `Enqueue` that has not been replied to."""


@dataclass(frozen=True)
class Sampled:
    groups: list[list[Completion]]  # [prompts][K]


@dataclass(frozen=True)
class Release:
    """Go to sleep."""


@dataclass(frozen=True)
class Released:
    asleep: bool
