"""Labelled pairs: two completions of a prompt, of which people said which is the better one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from iterdpo.data.preferences import Account, Content, Format, PreferenceData, RawPair, parse_rows
from iterdpo.data.rendering import completion_token_ids, prompt_token_ids
from iterdpo.data.rows import column_value, json_value, load_rows
from iterdpo.errors import DataError
from iterdpo.types import Completion, CompletionGroup, Prompt

BLOCK = 64  # pairs that are read at a time
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
        raise DataError(f"{path}: has one completion a row; labelled pairs have the columns chosen and rejected")
    account = Account(path)

    def pairs() -> Iterator[LabelledPair]:
        numbered = enumerate(load_rows(path, split, limit=limit), 1)
        while batch := list(islice(numbered, BLOCK)):
            rows = dict(batch)
            for raw in parse_rows(batch, settled, account):
                yield _labelled(raw, rows[raw.row], f"{path}: row {raw.row}", subset_column, tokenizer)
        if not account.kept:
            raise DataError(f"{path}: no pair can be used: {account.summary()}")

    return pairs(), account


def _labelled(raw: RawPair, row: dict[str, Any], where: str, subset_column: str | None, tokenizer: Any) -> LabelledPair:
    columns = {k: json_value(v) for k, v in row.items() if k not in NOT_COLUMNS}
    subset = None
    if subset_column is not None:
        subset = str(column_value(row, subset_column, where, "set --subset-column"))
    tie = {"true": True, "1": True, "false": False, "0": False, "none": False, "": False}.get(
        str(row.get("tie")).lower()
    )
    if tie is None:
        raise DataError(f"{where}, column 'tie' is {row['tie']!r}; it must be true (equally good) or false")
    assert raw.chosen is not None
    assert raw.rejected is not None
    content = raw.prompt.content
    chosen, rejected = (completion_of(content, c, tokenizer, where) for c in (raw.chosen, raw.rejected))
    prompt = replace(raw.prompt, columns=columns)
    return LabelledPair(prompt, prompt_ids_of(prompt, tokenizer, where), chosen, rejected, tie, subset, raw.row)


def prompt_ids_of(prompt: Prompt, tokenizer: Any, where: str) -> list[int]:
    try:
        return list(prompt.text.encode()) if tokenizer is None else prompt_token_ids(tokenizer, prompt.content)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def completion_of(prompt: Content, content: Content, tokenizer: Any, where: str) -> Completion:
    text = content if isinstance(content, str) else "\n\n".join(m["content"] for m in content)
    try:
        ids = list(text.encode()) if tokenizer is None else completion_token_ids(tokenizer, prompt, content)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return Completion(text, ids, [], "stop")
