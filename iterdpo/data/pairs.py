"""Preference pairs on disk: a Parquet file that `datasets.load_dataset` opens and TRL's trainers train on.

Columns `prompt`, `chosen` and `rejected` (of unpaired examples `prompt`, `completion` and `label`) are TRL's: text, or
messages if the prompt is conversational. Further columns are the token ids that the sampler produced and our trainer
reads, the scores, and each completion's finish reason. If the answers alone are trained on, two more columns say how
many tokens of each completion are its reasoning.
"""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from iterdpo.run import disk
from iterdpo.run.artifacts import number_lists
from iterdpo.run.rundir import sync_tree
from iterdpo.run.sums import is_whole, note_all, sha256_file
from iterdpo.types import Completion, Content, PreferencePair, message_text

if TYPE_CHECKING:
    import pyarrow as pa

Kind = Literal["pairs", "unpaired"]

TRAIN, HELDOUT = "train.parquet", "heldout.parquet"
TOKEN_COLUMNS = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
SAMPLER_COLUMNS = ("chosen_sampler_logp", "rejected_sampler_logp")
OTHER_COLUMN = "other_side"
GIVEN_COLUMNS = ("chosen_reasoning_tokens", "rejected_reasoning_tokens")
ABSENT = Completion("", [], [], "stop")  # the side that an unpaired example does not have
ROW_GROUP = 1000  # rows; what a reader or writer has in memory
IN_MEMORY = 64 << 20  # bytes of a file up to which a mapped copy is not worth its place

# A loader that guesses would take the JSON files beside the data for data.
CARD_DATA_FILES = "configs:\n- config_name: default\n  data_files:\n{data_files}"
CARD = f"""---
{CARD_DATA_FILES}---
Preference data of iterdpo, in TRL's formats: `prompt`, `chosen`, `rejected`, or `prompt`, `completion`, `label`.
{{summary}}
"""


def write_pairs(
    directory: Path,
    pairs: Iterable[PreferencePair],
    *,
    heldout: Iterable[PreferencePair] = (),
    further: Iterable[pa.Table] = (),
    summary: str | Callable[[], str],
    answers_alone: bool = False,
) -> None:
    """Write `train.parquet`, `heldout.parquet` if there are such pairs, and the card that names them.

    A thousand pairs are in memory at a time. `further` are pairs to train on that are tables already; they are taken
    when `pairs` are written. `summary` may be a function, which is called when all are written. With `answers_alone`,
    training will not count the tokens of the reasoning.
    """
    write_tables(directory / TRAIN, chain(_tables(pairs, answers_alone), further))
    heldout = iter(heldout)
    if first := list(islice(heldout, 1)):
        write_tables(directory / HELDOUT, _tables(chain(first, heldout), answers_alone))
    write_card(directory, summary if isinstance(summary, str) else summary())


def _tables(pairs: Iterable[PreferencePair], answers_alone: bool) -> Iterator[pa.Table]:
    """At least one, so that the columns are written of no pairs, too."""
    pairs = iter(pairs)
    yield pairs_table(list(islice(pairs, ROW_GROUP)), answers_alone=answers_alone)
    while group := list(islice(pairs, ROW_GROUP)):
        yield pairs_table(group, answers_alone=answers_alone)


def drawn_rows(paths: Sequence[Path], counts: Sequence[int], number: int, *, seed: int) -> Iterator[pa.Table]:
    """`number` rows, or as many as there are, drawn without replacement from the first `counts` rows of each file.

    They have no sampler's log-probabilities: those are of the policy that sampled them.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    chosen = np.random.default_rng(seed).permutation(sum(counts))[:number]
    start = 0
    for path, count in zip(paths, counts, strict=True):
        rows = np.sort(chosen[(chosen >= start) & (chosen < start + count)] - start)
        start += count
        with pq.ParquetFile(path) as file:
            begin = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                here = rows[(rows >= begin) & (rows < begin + size)] - begin
                begin += size
                if len(here):
                    yield _without_logps(file.read_row_group(group).take(pa.array(here)))


def _without_logps(table: pa.Table) -> pa.Table:
    import pyarrow as pa

    for name in SAMPLER_COLUMNS:
        table = table.set_column(table.schema.get_field_index(name), name, pa.nulls(len(table), pa.float64()))
    return table


def write_card(directory: Path, summary: str) -> None:
    """The page that tells loaders which of the directory's files are which split."""
    card = CARD.format(data_files=written_splits(directory), summary=summary)
    (directory / "README.md").write_text(card, encoding="utf-8")


def written_splits(directory: Path) -> str:
    """The files of pairs in `directory`, as a card's header names them."""
    written = [(name, split) for name, split in ((TRAIN, "train"), (HELDOUT, "test")) if (directory / name).exists()]
    return "".join(f"  - split: {split}\n    path: {name}\n" for name, split in written)


def write_tables(path: Path, tables: Iterable[pa.Table]) -> None:
    """Tables of one schema as one Parquet file, in row groups of about a thousand: no more is in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def gathered() -> Iterator[pa.Table]:
        waiting: list[pa.Table] = []
        for table in tables:
            waiting.append(table)
            if sum(map(len, waiting)) >= ROW_GROUP:
                yield pa.concat_tables(waiting)
                waiting = []
        if waiting:
            yield pa.concat_tables(waiting)

    groups = gathered()
    first = next(groups)
    with pq.ParquetWriter(path, first.schema) as writer:
        for group in chain([first], groups):
            writer.write_table(group)


def hold_out(source: Path, directory: Path, count: int, *, seed: int) -> int:
    """Divide the rows of a file that `write_tables` wrote into training rows and `count` others, chosen by the seed.

    Both keep their order. Returns how many are left to train on. The file is gone afterwards.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(source) as file:
        held = np.zeros(file.metadata.num_rows, dtype=bool)
        held[np.random.default_rng(seed).permutation(len(held))[:count]] = True

        def part(mask: np.ndarray) -> Iterator[pa.Table]:
            begin = 0
            for number in range(file.num_row_groups):
                table = file.read_row_group(number)
                yield table.filter(pa.array(mask[begin : begin + len(table)]))
                begin += len(table)

        if count:
            write_tables(directory / TRAIN, part(~held))
            write_tables(directory / HELDOUT, part(held))
            source.unlink()
        else:
            os.replace(source, directory / TRAIN)
    return len(held) - count


def pairs_table(
    pairs: Sequence[PreferencePair], kind: Kind = "pairs", *, answers_alone: bool = False, others: bool = False
) -> pa.Table:
    """A row each, in the columns that are written. A message is written as its role and its text, with any tool calls.

    A completion's text begins with its reasoning. The side that is another source's is a column if a pair has one, or
    with `others`.
    """
    import pyarrow as pa

    chat = bool(pairs) and pairs[0].prompt.conversational
    message = pa.struct([("role", pa.string()), ("content", pa.string())])

    def texts(contents: Iterable[Any]) -> pa.Array:
        return pa.array(contents, pa.list_(message) if chat else pa.string())

    def completions(sides: Iterable[Completion]) -> pa.Array:
        whole = (c.whole_text for c in sides)
        return texts([[{"role": "assistant", "content": text}] if chat else text for text in whole])

    def finish_reasons(sides: Iterable[Completion]) -> pa.Array:
        return pa.array([c.finish_reason for c in sides], pa.string())

    def prompt(content: Content) -> Any:
        return content if isinstance(content, str) else [{**m, "content": message_text(m)} for m in content]

    prompts = {"prompt": texts([prompt(p.prompt.content) for p in pairs])}
    ids = {"prompt_id": pa.array([p.prompt.id for p in pairs], pa.string())}
    sides = {"chosen": [p.chosen for p in pairs], "rejected": [p.rejected for p in pairs]}
    tokens = {"prompt": [p.prompt_ids for p in pairs]} | {k: [c.token_ids for c in side] for k, side in sides.items()}
    if kind == "pairs":
        scores = {"chosen": [p.chosen_score for p in pairs], "rejected": [p.rejected_score for p in pairs]}
        logps = {k: [sum(c.logprobs) if c.logprobs else None for c in side] for k, side in sides.items()}
        columns = prompts | {
            **{k: completions(side) for k, side in sides.items()},
            **ids,
            **{f"{k}_score": pa.array(values, pa.float64()) for k, values in scores.items()},
            **{f"{k}_finish_reason": finish_reasons(side) for k, side in sides.items()},
            **{f"{k}_sampler_logp": pa.array(values, pa.float64()) for k, values in logps.items()},
        }
        if others or any(p.other is not None for p in pairs):
            columns[OTHER_COLUMN] = pa.array([p.other for p in pairs], pa.string())
    else:
        labels = [bool(c.token_ids) for c in sides["chosen"]]
        only = [p.chosen if label else p.rejected for p, label in zip(pairs, labels, strict=True)]
        columns = prompts | {
            "completion": completions(only),
            "label": pa.array(labels, pa.bool_()),
            **ids,
            "finish_reason": finish_reasons(only),
        }
    if answers_alone:
        given = [[c.reasoning_tokens for c in side] for side in sides.values()]
        columns |= {name: pa.array(values, pa.int32()) for name, values in zip(GIVEN_COLUMNS, given, strict=True)}
    return pa.table(columns | {f"{k}_token_ids": number_lists(rows, "i") for k, rows in tokens.items()})


@dataclass(frozen=True, slots=True)
class TokenPair:
    """The token ids that training reads: `TokenPair(prompt=[40, 8], chosen=[253, 2], rejected=[30, 2])`.

    An empty side is absent: unpaired data has one side only. The first `given` tokens of (chosen, rejected) are read like
    the prompt, and have no part in the loss.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    given: tuple[int, int] = (0, 0)


class TokenPairs:
    """What training needs of a file of pairs, of any size: one pair's token ids at a time, and what orders them.

    A small file is held in memory. Of a large one a copy is made in the directory `cache`, once, and mapped:
    uncompressed, since training reads it in random order. Processes that open the same file share the copy.
    """

    groups: np.ndarray  # [N] int64, equal where the prompt_id is, numbered by first appearance
    sampler_logps: np.ndarray | None  # [N, 2], what the sampler reported of chosen and rejected; None where it did not
    others: np.ndarray  # [N, 2] bool, whether chosen and rejected are another source's

    def __init__(self, path: Path, cache: Path) -> None:
        if path.stat().st_size < IN_MEMORY:
            buffer = io.BytesIO()
            index = _flatten(path, buffer)
            self._tokens = np.frombuffer(buffer.getbuffer(), np.int32)
        else:
            copy = _copy(path, cache)
            index = np.load(copy / "index.npy")
            self._tokens = np.asarray(np.memmap(copy / "tokens.bin", np.int32, "r"))
        self._starts, self._lengths, self.groups = index[:3], index[3:6].astype(np.int32), index[6]
        self._given = index[7:9].astype(np.int32)
        self.sampler_logps = _sampler_logps(path)
        self.others = _others(path, len(self.groups))

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> TokenPair:
        starts, lengths = self._starts[:, index], self._lengths[:, index]
        prompt, chosen, rejected = (self._tokens[s : s + n].tolist() for s, n in zip(starts, lengths, strict=True))
        of_chosen, of_rejected = self._given[:, index].tolist()
        return TokenPair(prompt, chosen, rejected, (of_chosen, of_rejected))


def _sampler_logps(path: Path) -> np.ndarray | None:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        if not set(SAMPLER_COLUMNS) <= set(file.schema_arrow.names):
            return None
        logps = [file.read([column])[column].to_numpy() for column in SAMPLER_COLUMNS]
    found = np.stack(logps, axis=1).astype(np.float64)
    return None if np.isnan(found).any() else found


def _others(path: Path, count: int) -> np.ndarray:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        if OTHER_COLUMN not in file.schema_arrow.names:
            return np.zeros((count, 2), bool)
        sides = file.read([OTHER_COLUMN])[OTHER_COLUMN].to_pylist()
    return np.array([[side == "chosen", side == "rejected"] for side in sides], bool).reshape(count, 2)


def _copy(path: Path, cache: Path) -> Path:
    """The directory of the file's copy, named by its content. The first process makes it while the others wait."""
    copy = cache / f"{path.stem}-2-{sha256_file(path)[:16]}"  # 2: the layout of the index
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f"{path.stem}.lock", "a") as lock:
        disk.lock(lock, fcntl.LOCK_EX, str(cache))
        if not is_whole(copy):
            for old in cache.glob(f"{path.stem}-*"):  # of another content, or cut short
                shutil.rmtree(old)
            fresh = Path(tempfile.mkdtemp(prefix=f"{path.stem}-", dir=cache))
            with open(fresh / "tokens.bin", "wb") as tokens, open(fresh / "index.npy", "wb") as index:
                np.save(index, _flatten(path, tokens))
            note_all(fresh)
            sync_tree(fresh)
            os.replace(fresh, copy)
    return copy


def _flatten(path: Path, tokens: IO[bytes]) -> np.ndarray:
    """Write all token ids, as int32. Returns [9, N] int64: starts of prompts, chosen, rejected; lengths; groups; given."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    parts, end = [], 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(ROW_GROUP, columns=list(TOKEN_COLUMNS)):
            starts, lengths = [], []
            for column in TOKEN_COLUMNS:
                length = pc.list_value_length(batch[column]).to_numpy().astype(np.int64)
                starts.append(end + np.cumsum(length) - length)
                lengths.append(length)
                tokens.write(batch[column].flatten().to_numpy().astype(np.int32))
                end += int(length.sum())
            parts.append(np.stack(starts + lengths))  # [6, rows]
        ids = file.read(["prompt_id"])["prompt_id"].combine_chunks()
        given = np.zeros((2, len(ids)), np.int64)
        if set(GIVEN_COLUMNS) <= set(file.schema_arrow.names):
            given = np.stack([file.read([name])[name].to_numpy() for name in GIVEN_COLUMNS]).astype(np.int64)
    groups = ids.dictionary_encode().indices.to_numpy().astype(np.int64)
    return np.concatenate([np.concatenate(parts, axis=1), groups[None], given])
