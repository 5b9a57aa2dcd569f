"""Labelled pairs: two completions of a prompt, of which people said which is the better one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from iterdpo.data.preferences import Account, Format, PreferenceData, RawPair, parse_rows
from iterdpo.data.rendering import completion_token_ids, prompt_token_ids
from iterdpo.data.rows import column_value, json_value, located_rows
from iterdpo.errors import DataError
from iterdpo.types import Completion, CompletionGroup, Content, Prompt, message_text

BLOCK = 64  # pairs that are read at a time
TIES = {"true": True, "1": True, "false": False, "0": False, "none": False, "": False}
NOT_COLUMNS = {"prompt", "chosen", "rejected", "conversations", "system", "tie", "completions"}


@dataclass(frozen=True, slots=True)
class LabelledPair:
    """Two completions of a prompt, and which is the better one by the label; neither if it is a `tie`.

    `LabelledPair(prompt, prompt_ids=[40, 8], chosen=y_1, rejected=y_2, tie=False, subset="math", row=12)`
    """

    prompt: Prompt
    prompt_ids: list[int]
    chosen: Completion
    rejected: Completion
    tie: bool
    subset: str | None
    row: int

    def group(self, *, chosen_first: bool) -> CompletionGroup:
        both = [self.chosen, self.rejected] if chosen_first else [self.rejected, self.chosen]
        return CompletionGroup(self.prompt, self.prompt_ids, both)


def read_labelled(
    path: str,
    *,
    split: str = "train",
    format: Format = "auto",
    limit: int | None = None,
    subset_column: str | None = None,
    tokenizer: Any = None,
) -> tuple[Iterator[LabelledPair], Account]:
    """The pairs of preference data (see iterdpo/data/preferences.py), and the account of what was left out as it is read.

    A column `tie` that is true marks a pair whose completions are equally good. The row's other columns reach the
    judge. Without a tokenizer, a token is a byte of UTF-8.

    Raises:
        DataError: a file that cannot be read, or (while iterating) a row of the wrong shape.
    """
    settled = PreferenceData(path, split, format, limit=1).format
    if settled == "unpaired":
        raise DataError(f"{path}: has one completion per row; labelled pairs have the columns chosen and rejected")
    account = Account(path)

    def pairs() -> Iterator[LabelledPair]:
        located = located_rows(path, split, limit=limit)
        numbered = ((number, *row) for number, row in enumerate(located, 1))
        while batch := list(islice(numbered, BLOCK)):
            rows = {number: row for number, _, row in batch}
            for raw in parse_rows(batch, settled, account):
                yield _labelled(raw, rows[raw.row], subset_column, tokenizer)
        if not account.kept:
            raise DataError(f"{path}: no pair can be used: {account.summary()}")

    return pairs(), account


def _labelled(raw: RawPair, row: dict[str, Any], subset_column: str | None, tokenizer: Any) -> LabelledPair:
    where = raw.where
    columns = {k: json_value(v) for k, v in row.items() if k not in NOT_COLUMNS}
    subset = subset_column and str(column_value(row, subset_column, where, "set --subset-column"))
    tie = TIES.get(str(row.get("tie")).lower())
    if tie is None:
        raise DataError(f"{where}, column 'tie' is {row['tie']!r}; it must be true (equally good) or false")
    assert raw.chosen is not None
    assert raw.rejected is not None
    group = tokenized(replace(raw.prompt, columns=columns), [raw.chosen, raw.rejected], tokenizer, where)
    chosen, rejected = group.completions
    return LabelledPair(group.prompt, group.prompt_ids, chosen, rejected, tie, subset, raw.row)


def tokenized(prompt: Prompt, contents: Sequence[Content], tokenizer: Any, where: str) -> CompletionGroup:
    """The prompt with these completions. Without a tokenizer, a token is a byte of UTF-8.

    Raises:
        DataError: beginning with `where`, if the tokenizer's template refuses the messages.
    """
    texts = [c if isinstance(c, str) else "\n\n".join(map(message_text, c)) for c in contents]
    if tokenizer is None:
        prompt_ids, ids = list(prompt.text.encode()), [list(text.encode()) for text in texts]
    else:
        try:
            prompt_ids = prompt_token_ids(tokenizer, prompt.content)
            ids = [completion_token_ids(tokenizer, prompt.content, content) for content in contents]
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    completions = [Completion(text, tokens, [], "stop") for text, tokens in zip(texts, ids, strict=True)]
    return CompletionGroup(prompt, prompt_ids, completions)
