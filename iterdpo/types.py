"""The records that cross a stage boundary.

Legend for shapes, everywhere the same: B pairs, K completions per prompt, T tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Action = Literal["promote", "keep", "lower_learning_rate", "stop"]
"""What the gate decides about a candidate."""

Message = dict[str, Any]
"""One chat turn: `{"role": "user", "content": "Who wrote Faust?"}`.

`role` is text. So is `content`, unless an assistant's turn has `tool_calls` or `reasoning_content` in its place; then it
is None or missing. Further keys are those that chat templates read, in TRL's and OpenAI's vocabulary.
"""


class Chat(list[Message]):
    """Chat messages, with further values for the chat template: a list of messages in every other respect.

    `Chat([{"role": "user", "content": "Rain in Oslo?"}], {"tools": [{"type": "function", …}], "enable_thinking": False})`
    """

    def __init__(self, messages: Iterable[Message] = (), settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(messages)
        self.settings = dict(settings or {})
        """Arguments of `apply_chat_template`: `tools`, and the template's own variables."""


Content = str | list[Message]
"""Text, or chat messages; a `Chat` if the template is given more than these."""


def template_settings(content: Content) -> dict[str, Any]:
    """What the chat template is given beside the messages."""
    return content.settings if isinstance(content, Chat) else {}


def content_to_json(content: Content) -> str | list[Message] | dict[str, Any]:
    """`content` as JSON holds it: text, a list of messages, or `{"messages": […], "settings": {…}}`."""
    settings = template_settings(content)
    return {"messages": list(content), "settings": settings} if settings else content


def content_from_json(value: str | list[Message] | dict[str, Any]) -> Content:
    return Chat(value["messages"], value["settings"]) if isinstance(value, dict) else value


def message_text(message: Message) -> str:
    """A message's content as a person reads it; its tool calls follow it, a line each: `rain_in({"city": "Oslo"})`."""
    parts = [message.get("content")]
    for call in message.get("tool_calls") or []:
        function = call.get("function") or call
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)
        parts.append(f"{function.get('name')}({text})")
    return "\n".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt: chat messages or plain text, and the row's other columns, which judges read.

    `Prompt(id="p-1f0c…", content=[{"role": "user", "content": "2+2?"}], columns={"gold": "4"})`
    """

    id: str
    content: Content
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def conversational(self) -> bool:
        return not isinstance(self.content, str)

    @property
    def messages(self) -> list[Message]:
        """The prompt as chat messages that a person can read: a plain text is one of the user's, tool calls are text."""
        if isinstance(self.content, str):
            return [{"role": "user", "content": self.content}]
        return [{**m, "content": message_text(m)} for m in self.content]

    @property
    def text(self) -> str:
        """The prompt as a person reads it: the plain text, or `role: content` blocks."""
        if isinstance(self.content, str):
            return self.content
        return "\n\n".join(f"{m['role']}: {message_text(m)}" for m in self.content)


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation, as the engine returned it.

    `Completion(text=" a joy.", token_ids=[253, 8212, 30, 2], logprobs=[-1.2, -4.0, -0.3, -0.9], finish_reason="stop")`

    `logprobs` are the sampling policy's, one for each token id, before temperature and truncation of the
    distribution. A completion that is not truncated includes its end token; a truncated one has none.

    That of a thinking model has two parts (`iterdpo/data/thinking.py`): `reasoning`, with its tags, and `text`, which is
    the answer. The answer's tokens follow the first `reasoning_tokens` ids. The finish reason "thought" is that of a
    thought without an end, which has no answer:

    `Completion("4", [151667, 17, 151668, 19, 151645], [...], "stop", reasoning="<think>2</think>", reasoning_tokens=3)`
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length", "thought"]
    reasoning: str | None = None
    """None if the model is no thinking model; empty if it did not think."""
    reasoning_tokens: int = 0

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def unfinished(self) -> bool:
        """Whether it is a thought that has no end."""
        return self.finish_reason == "thought"

    @property
    def answer_ids(self) -> list[int]:
        """The token ids of `text`, with the end token: all of them but for a thinking model."""
        return self.token_ids[self.reasoning_tokens :] if self.reasoning_tokens else self.token_ids

    @property
    def whole_text(self) -> str:
        """The reasoning, if there is any, and the text."""
        return (self.reasoning or "") + self.text


@dataclass(frozen=True, slots=True)
class CompletionGroup:
    """One prompt and its K completions: `CompletionGroup(prompt, prompt_ids=[40, 8, 1], completions=[y_1, …, y_K])`."""

    prompt: Prompt
    prompt_ids: list[int]
    completions: list[Completion]

    def to_json(self) -> dict[str, Any]:
        row = asdict(self)
        row["prompt"]["content"] = content_to_json(self.prompt.content)
        for completion in row["completions"]:
            if completion["reasoning"] is None:
                del completion["reasoning"], completion["reasoning_tokens"]
        return row


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

    Offline data has no scores, and its `logprobs` are empty: no sampler reported any. `other` is the side that is not the
    policy's, if one is.
    """

    prompt: Prompt
    prompt_ids: list[int]
    chosen: Completion
    rejected: Completion
    chosen_score: float | None = None
    rejected_score: float | None = None
    other: Literal["chosen", "rejected"] | None = None


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """How a round ended: `RoundRecord(round=2, decision="promote", reason="win_rate/vs_previous 0.61 >= 0.5", …)`.

    `policy` is the directory (relative to the run's) that the next round starts from, `policy_round` the round that
    made it (0: the initial policy), `policy_digest` its content; `gate` has the settings that decided, and `checks`, if
    the gate has rules, how each of them turned out (`iterdpo.gate.Check`).
    """

    round: int
    decision: Action
    reason: str
    policy: str
    policy_round: int
    policy_digest: str
    gate: dict[str, Any]
    metrics: dict[str, Any]
    checks: list[dict[str, Any]] = field(default_factory=list)
