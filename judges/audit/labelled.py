"""Labelled completions of a prompt, of which people said which are the better ones; mostly a pair."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from iterdpo.data.chats import content_of, with_companions
from iterdpo.data.preferences import Account, Format, PreferenceData, RawPair, parse_rows
from iterdpo.data.rendering import completion_token_ids, prompt_token_ids
from iterdpo.data.rows import column_value, first_row, json_columns, located_rows, whole
from iterdpo.errors import DataError
from iterdpo.run.rundir import digest
from iterdpo.seeds import derive_seed
from iterdpo.types import Completion, CompletionGroup, Content, Prompt, content_to_json, message_text
from judges.audit.published import COLUMNS, Published, parse_published, published_format

BLOCK = 64  # pairs that are read at a time
TIES = {"true": True, "1": True, "false": False, "0": False, "none": False, "": False}
NOT_COLUMNS = {"prompt", "chosen", "rejected", "conversations", "system", "tie", "completions"}


@dataclass(frozen=True, slots=True)
class LabelledGroup:
    """Completions of a prompt, of which the first `right` are better than the others by the label; none is in a `tie`.

    `LabelledGroup(prompt, prompt_ids=[40, 8], completions=[y_1, y_2], right=1, tie=False, subset="math", row=12)`
    """

    prompt: Prompt
    prompt_ids: list[int]
    completions: list[Completion]
    right: int
    tie: bool
    subset: str | None
    row: int
    name: str = ""

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The places of every chosen and rejected completion."""
        return list(itertools.product(range(self.right), range(self.right, len(self.completions))))

    def order(self, seed: int) -> list[int]:
        """The order in which a judge is shown the completions, so that a liking for the first one shows."""
        drawn, count = derive_seed(seed, "judge check", self.row), len(self.completions)
        if count == 2:
            return [0, 1] if drawn % 2 == 0 else [1, 0]
        return random.Random(drawn).sample(range(count), count)

    def group(self, order: Sequence[int]) -> CompletionGroup:
        return CompletionGroup(self.prompt, self.prompt_ids, [self.completions[k] for k in order])


def read_labelled(
    path: str,
    *,
    split: str = "train",
    format: Format = "auto",
    limit: int | None = None,
    subset_column: str | None = None,
    tokenizer: Any = None,
) -> tuple[Iterator[LabelledGroup], Account]:
    """The pairs of preference data (see iterdpo/data/preferences.py) or the rows of a published benchmark (see
    judges/audit/published.py), and the account of what was left out as they are read.

    A column `tie` that is true marks a pair whose completions are equally good. The row's other columns reach the
    judge. Without a tokenizer, a token is a byte of UTF-8.

    Raises:
        DataError: a file that cannot be read, or (while iterating) a row of the wrong shape.
    """
    published = published_format(first_row(path, split))
    if published is None:
        settled = PreferenceData(path, split, format, limit).format
        if settled == "unpaired":
            raise DataError(f"{path}: has one completion per row; labelled pairs have the columns chosen and rejected")
    account = Account(path, unit="pairs" if published is None else f"rows of {published}")

    def groups() -> Iterator[LabelledGroup]:
        located = located_rows(path, split, limit=limit)
        numbered = ((number, *row) for number, row in enumerate(located, 1))
        batches = iter(lambda: list(islice(numbered, BLOCK)), [])
        for batch in batches:
            if published is not None:
                for number, where, row in batch:
                    account.kept += 1
                    yield _published(whole(row), published, number, where, subset_column, tokenizer)
                continue
            rows = {number: row for number, _, row in batch}
            found = parse_rows(batch, settled, account)
            if account.bad.counts:
                for rest in batches:
                    parse_rows(rest, settled, account)
                raise account.bad.error(path, account.rows)
            for raw in found:
                yield _labelled(raw, whole(rows[raw.row]), subset_column, tokenizer)
        if not account.kept:
            raise DataError(f"{path}: no pair can be used: {account.summary()}")

    return groups(), account


def _labelled(raw: RawPair, row: dict[str, Any], subset_column: str | None, tokenizer: Any) -> LabelledGroup:
    where = raw.where
    columns = json_columns({k: v for k, v in row.items() if k not in NOT_COLUMNS})
    subset = subset_column and str(column_value(row, subset_column, where, "set --subset-column"))
    tie = TIES.get(str(row.get("tie")).lower())
    if tie is None:
        raise DataError(f"{where}, column 'tie' is {repr(row['tie'])[:60]}; it must be true (equally good) or false")
    assert raw.chosen is not None
    assert raw.rejected is not None
    group = tokenized(replace(raw.prompt, columns=columns), [raw.chosen, raw.rejected], tokenizer, where)
    return LabelledGroup(group.prompt, group.prompt_ids, group.completions, 1, tie, subset, raw.row)


def _published(
    row: dict[str, Any], format: Published, number: int, where: str, subset_column: str | None, tokenizer: Any
) -> LabelledGroup:
    parts = parse_published(row, format, where)
    subset = parts.subset
    if subset_column is not None:
        subset = str(column_value(row, subset_column, where, "set --subset-column"))
    content = with_companions(content_of(parts.prompt, f"{where}, the prompt"), row, where)
    columns = json_columns({k: v for k, v in row.items() if k not in NOT_COLUMNS | COLUMNS[format]})
    prompt = Prompt(f"p-{digest(content_to_json(content))}", content, columns)
    group = tokenized(prompt, parts.completions, tokenizer, where)
    return LabelledGroup(
        prompt, group.prompt_ids, group.completions, parts.right, parts.tie, subset, number, parts.name
    )


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
