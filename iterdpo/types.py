"""The records that cross a stage boundary.

Legend for shapes, everywhere the same: B pairs, K completions per prompt, T tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Message = dict[str, str]
"""One chat turn: `{"role": "user", "content": "Who wrote Faust?"}`."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt: chat messages or plain text, and the row's other columns, which judges read.

    `Prompt(id="p-1f0c…", content=[{"role": "user", "content": "2+2?"}], columns={"gold": "4"})`
    """

    id: str
    content: str | list[Message]
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def conversational(self) -> bool:
        return not isinstance(self.content, str)

    @property
    def messages(self) -> list[Message]:
        """The prompt as chat messages; a plain text is one of the user's."""
        return [{"role": "user", "content": self.content}] if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        """The prompt as a person reads it: the plain text, or `role: content` blocks."""
        if isinstance(self.content, str):
            return self.content
        return "\n\n".join(f"{m['role']}: {m['content']}" for m in self.content)


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation, as the engine returned it.

    `Completion(text=" a joy.", token_ids=[253, 8212, 30, 2], logprobs=[-1.2, -4.0, -0.3, -0.9], finish_reason="stop")`

    `logprobs` are the sampling policy's, one for each token id, before temperature and truncation of the
    distribution. A completion that is not truncated includes its end token; a truncated one has none.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True)
class CompletionGroup:
    """One prompt and its K completions: `CompletionGroup(prompt, prompt_ids=[40, 8, 1], completions=[y_1, …, y_K])`."""

    prompt: Prompt
    prompt_ids: list[int]
    completions: list[Completion]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One verdict of a comparing judge on completions `first` and `second`, shown in that order.

    `Comparison(first=0, second=2, winner="second")`; `winner` is None if the judge abstained, for `reason`.
    `probability`, from a judge that gives probabilities, is that of the first being the better one.
    """

    first: int
    second: int
    winner: Literal["first", "second", "tie"] | None
    reason: str | None = None
    probability: float | None = None


@dataclass(frozen=True, slots=True)
class Judgment:
    """A judge's result for one group: a score for each completion, higher is better, or an abstention.

    `Judgment(prompt_id="p-1f0c…", scores=[0.9, None], abstentions=[None, "timed out after 30 s"])`

    If `scores[k]` is None, `abstentions[k]` is the reason. Scores are finite.
    """

    prompt_id: str
    scores: list[float | None]  # [K]
    abstentions: list[str | None]  # [K]
    comparisons: list[Comparison] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    """Further results, as JSON: the scores of single criteria, the number of cycles in the comparisons."""

    def to_json(self) -> dict[str, Any]:
        row = {"prompt_id": self.prompt_id, "scores": self.scores, "abstentions": self.abstentions}
        return {**row, "comparisons": [asdict(c) for c in self.comparisons], "details": self.details}

    @staticmethod
    def from_json(row: dict[str, Any]) -> Judgment:
        return Judgment(**{**row, "comparisons": [Comparison(**c) for c in row["comparisons"]]})


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One training example: `chosen` is preferred to `rejected` as a completion of the prompt.

    `PreferencePair(prompt, prompt_ids=[40, 8], chosen=y_3, rejected=y_1, chosen_score=0.97, rejected_score=0.12)`

    Offline data has no scores, and its `logprobs` are empty: no sampler reported any.
    """

    prompt: Prompt
    prompt_ids: list[int]
    chosen: Completion
    rejected: Completion
    chosen_score: float | None = None
    rejected_score: float | None = None


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """How a round ended: `RoundRecord(round=2, decision="promote", reason="win_rate/vs_previous 0.61 >= 0.5", …)`.

    `policy` is the directory (relative to the run's) that the next round starts from, `policy_round` the round that
    made it (0: the initial policy), `policy_digest` its content; `gate` has the settings that decided.
    """

    round: int
    decision: Literal["promote", "keep", "stop"]
    reason: str
    policy: str
    policy_round: int
    policy_digest: str
    gate: dict[str, Any]
    metrics: dict[str, Any]
