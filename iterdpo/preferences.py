r"""Offline preference data, in the formats that people have, as pairs of one prompt and two completions of it.

- `prompt`, `chosen`, `rejected`: texts, or lists of chat messages. Where the chosen and rejected messages repeat the
  prompt (as in UltraFeedback binarized), or there is no prompt column, the prompt is what the two share.
- HH-RLHF transcripts: `chosen` and `rejected` hold all of the talk, as `\n\nHuman: …\n\nAssistant: …`.

A pair that teaches no preference is left out, counted by reason; data of the wrong shape is an error.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from iterdpo.errors import DataError
from iterdpo.prompts import column_value, content_of, load_rows
from iterdpo.rendering import common_length, completion_token_ids, prompt_token_ids
from iterdpo.rundir import digest
from iterdpo.types import Completion, Message, PreferencePair, Prompt

Content = str | list[Message]
Format = Literal["auto", "pairs", "hh"]

PROMPT_NAMES = {"question", "instruction", "input", "query", "context"}

DIVERGE = "diverge before the last turn"
EMPTY = "have an empty completion"
IDENTICAL = "have identical completions"
NO_PROMPT = "share no prompt"
OTHER_PROMPT = "do not continue their prompt"
NO_TRANSCRIPT = "are not Human and Assistant transcripts"
NO_LAST_TURN = "do not end with an assistant turn after a human one"


@dataclass(frozen=True, slots=True)
class RawPair:
    """One pair before tokenization; `row` is its row in the data, from 1.

    `RawPair(Prompt("p-5a1c…", [{"role": "user", "content": "2+2?"}]), chosen="4", rejected="5", row=1)`
    """

    prompt: Prompt
    chosen: Content
    rejected: Content
    row: int


@dataclass
class PreferenceData:
    """The pairs, and the rows (from 1) that were left out, by reason.

    `PreferenceData([…], left_out={"have an empty completion": [87, 517]}, source="test.jsonl")`
    """

    pairs: list[RawPair]
    left_out: dict[str, list[int]] = field(default_factory=dict)
    source: str = "preference data"

    def summary(self) -> str:
        """`kept 2,303 of 2,312 pairs (5 diverge before the last turn, 4 have an empty completion)`."""
        total = len(self.pairs) + sum(map(len, self.left_out.values()))
        largest_first = sorted(self.left_out.items(), key=lambda item: -len(item[1]))
        reasons = ", ".join(f"{len(rows):,} {reason}" for reason, rows in largest_first)
        return f"kept {len(self.pairs):,} of {total:,} pairs" + (f" ({reasons})" if reasons else "")


def read_preferences(
    path: str, split: str = "train", format: Format = "auto", limit: int | None = None
) -> PreferenceData:
    """The preference pairs of a data set (see `load_rows`), of its first `limit` rows or all.

    `auto` takes the data for transcripts where the first row's texts start with a human turn. Columns other than
    prompt, chosen and rejected are not kept.

    Raises:
        DataError: a file that cannot be read, a column that is missing, a value of the wrong type (with its row), or
            no pair that can be used.
    """
    if format not in get_args(Format):
        raise DataError(f"format {format!r} is none of {', '.join(get_args(Format))}")
    data = PreferenceData([], source=path)
    for number, row in enumerate(load_rows(path, split, limit=limit), 1):
        where = f"{path}: row {number}"
        prompt, chosen, rejected = _columns(row, where)
        if format == "auto":
            format = "hh" if prompt is None and _is_transcript(chosen) and _is_transcript(rejected) else "pairs"
        found = (
            _from_transcripts(chosen, rejected, where) if format == "hh" else _from_columns(prompt, chosen, rejected)
        )
        if isinstance(found, str):
            data.left_out.setdefault(found, []).append(number)
        else:
            shared, chosen, rejected = found
            data.pairs.append(RawPair(Prompt(f"p-{digest(shared)}", shared), chosen, rejected, number))
    if not data.pairs:
        raise DataError(f"{path}: no pair can be used: {data.summary()}; see data.format for what is read")
    return data


def tokenize_pairs(
    data: PreferenceData, tokenizer: Any, *, max_prompt_tokens: int, max_completion_tokens: int
) -> tuple[list[PreferencePair], dict[str, int]]:
    """The pairs as token ids, and counts of what was truncated or left out.

    A prompt that is too long loses its beginning. A completion that is too long loses its end, the end token with it,
    and its `finish_reason` is "length". Pairs whose completions are equal after that are left out.

    Raises:
        DataError: a pair that cannot be rendered (with its row), or that leaves no pair after truncation.
    """
    assert max_prompt_tokens >= 1  # so truncation always leaves a token
    assert max_completion_tokens >= 1
    pairs = []
    counts = {"pairs": 0, "prompts_truncated": 0, "completions_truncated": 0, "identical_after_truncation": 0}
    for raw in data.pairs:
        content = raw.prompt.content
        try:
            prompt_ids = prompt_token_ids(tokenizer, content)
            chosen, rejected = (
                _completion(tokenizer, c, completion_token_ids(tokenizer, content, c), max_completion_tokens)
                for c in (raw.chosen, raw.rejected)
            )
        except DataError as error:
            raise DataError(f"{data.source}: row {raw.row}: {error}") from error
        if chosen.token_ids == rejected.token_ids:
            counts["identical_after_truncation"] += 1
            continue
        counts["prompts_truncated"] += len(prompt_ids) > max_prompt_tokens
        counts["completions_truncated"] += chosen.truncated + rejected.truncated
        pairs.append(PreferencePair(raw.prompt, prompt_ids[-max_prompt_tokens:], chosen, rejected))
    if not pairs:
        raise DataError(
            f"{data.source}: in all {len(data.pairs):,} pairs the completions are equal in their first "
            f"{max_completion_tokens:,} tokens; raise data.max_completion_tokens"
        )
    return pairs, {**counts, "pairs": len(pairs)}


Parts = tuple[Content, Content, Content]  # prompt, chosen, rejected


def _columns(row: dict[str, Any], where: str) -> tuple[Content | None, Content, Content]:
    remedy = "preference data has chosen, rejected and, where they do not repeat it, prompt"
    chosen, rejected = (
        content_of(column_value(row, column, where, remedy), f"{where}, column {column!r}")
        for column in ("chosen", "rejected")
    )
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(
            f"{where}: one of chosen and rejected is text and the other messages; give both as the same kind"
        )
    prompt = row.get("prompt")
    if prompt is None:
        _refuse_other_name_for_prompt(row, chosen, where)
    else:
        prompt = content_of(prompt, f"{where}, column 'prompt'")
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise DataError(f"{where}, column 'prompt' is empty; remove the row, or the column where all are")
        if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
            raise DataError(
                f"{where}, column 'prompt' ends with an assistant turn; a prompt ends before the completion"
            )
    return prompt, chosen, rejected


def _refuse_other_name_for_prompt(row: dict[str, Any], chosen: Content, where: str) -> None:
    """Without this, the first words that two completions happen to share would become the prompt."""
    if _is_transcript(chosen) or (isinstance(chosen, list) and chosen and chosen[0]["role"] != "assistant"):
        return
    for name in row:
        if name.lower() in PROMPT_NAMES or difflib.get_close_matches("prompt", [name.lower()], cutoff=0.85):
            raise DataError(f"{where}: no prompt column, but {name!r}; rename it to prompt, or take it out")


def _from_columns(prompt: Content | None, chosen: Content, rejected: Content) -> Parts | str:
    """The parts of a pair, or the reason why it is left out."""
    if chosen == rejected:
        return IDENTICAL
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            cut = _shared_words(chosen, rejected)
            prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
            if not prompt.strip():
                return NO_PROMPT
        return (prompt, chosen, rejected) if chosen.strip() and rejected.strip() else EMPTY
    assert isinstance(chosen, list)
    assert isinstance(rejected, list)
    return _from_messages(prompt, chosen, rejected)


def _from_messages(prompt: Content | None, chosen: list[Message], rejected: list[Message]) -> Parts | str:
    """Both are made whole conversations first; the prompt is what these share, up to the first assistant turn at issue."""
    if not chosen or not rejected:
        return EMPTY
    opens = {chosen[0]["role"] == "assistant", rejected[0]["role"] == "assistant"}
    if prompt is None:
        prompt = []
    elif opens == {True}:
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        chosen, rejected = [*prompt, *chosen], [*prompt, *rejected]
    elif not (_repeats(chosen, prompt) and _repeats(rejected, prompt)):
        return OTHER_PROMPT

    cut = common_length(chosen, rejected)
    while cut and chosen[cut - 1]["role"] == "assistant":
        cut -= 1
    shared, ends = chosen[:cut], (chosen[cut:], rejected[cut:])
    if not shared:
        return NO_PROMPT
    if any(not any(m["content"].strip() for m in end) for end in ends):
        return EMPTY
    if any(m["role"] in ("user", "system") for end in ends for m in end):
        return DIVERGE
    return shared, *ends


def _repeats(conversation: list[Message], prompt: Content) -> bool:
    if isinstance(prompt, str):  # the first question, or the last one of a longer talk
        return any(m["content"].strip() == prompt.strip() for m in conversation if m["role"] != "assistant")
    return conversation[: len(prompt)] == prompt


def _shared_words(a: str, b: str) -> int:
    """Where two texts part, moved back to a word's start. The space before the word belongs to the completions."""
    cut = common_length(a, b)
    while cut and not (a[cut - 1] in "\n\t" or a[cut : cut + 1] == b[cut : cut + 1] == " "):
        cut -= 1
    return cut


def _is_transcript(value: Content) -> bool:
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def _from_transcripts(chosen: Content, rejected: Content, where: str) -> Parts | str:
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise DataError(f"{where}: chosen and rejected are messages, not transcripts; set data.format=pairs")
    if not _is_transcript(chosen) or not _is_transcript(rejected):
        return NO_TRANSCRIPT
    *before, last = _turns(chosen)
    *rejected_before, rejected_last = _turns(rejected)
    if before != rejected_before:
        return DIVERGE
    if not before or before[-1]["role"] != "user" or {last["role"], rejected_last["role"]} != {"assistant"}:
        return NO_LAST_TURN
    if not last["content"].strip() or not rejected_last["content"].strip():
        return EMPTY
    if last == rejected_last:
        return IDENTICAL
    return _joined(before), last["content"], rejected_last["content"]


def _turns(transcript: str) -> list[Message]:
    """One message a marker. A marker is a paragraph's start: "Human:" inside a line is the speaker's own word."""
    roles = {"Human": "user", "Assistant": "assistant"}
    _, *parts = re.split(r"\n\n(Human|Assistant):", transcript)
    return [
        {"role": roles[speaker], "content": text.removeprefix(" ")}
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def _joined(turns: list[Message]) -> list[Message]:
    """Turns of one speaker in a row as one message: many templates refuse roles that do not alternate."""
    joined: list[Message] = []
    for turn in turns:
        if joined and joined[-1]["role"] == turn["role"]:
            joined[-1] = {**turn, "content": f"{joined[-1]['content']}\n\n{turn['content']}"}
        else:
            joined.append(turn)
    return joined


def _completion(tokenizer: Any, content: Content, ids: list[int], limit: int) -> Completion:
    if len(ids) > limit:
        ids = ids[:limit]
        return Completion(tokenizer.decode(ids, skip_special_tokens=True), ids, [], "length")
    text = content if isinstance(content, str) else "\n\n".join(m["content"] for m in content)
    return Completion(text, ids, [], "stop")
