"""Which prompts a round sees, and which are held out, of files with millions of them.

Every choice orders prompts by a hash of (seed, purpose, prompt id): nothing depends on the order of the file. The texts
stay on disk, one line `[id, content, columns]` of canonical JSON a prompt; in memory are 16 to 36 bytes of each.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from json.decoder import scanstring  # type: ignore[attr-defined]
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from iterdpo.config import PromptsConfig
from iterdpo.data.chats import EMPTY_PROMPT, LAST_TURN, check_encodable, content_of, with_companions
from iterdpo.data.rows import BadRows, column_value, json_columns, located_rows, reasons, source_stamp, whole
from iterdpo.errors import DamagedError, DataError, RowError
from iterdpo.run.artifacts import number_lists, read_judgments
from iterdpo.run.rundir import (
    RunDir,
    canonical,
    digest,
    read_json,
    read_manifest,
    sync_tree,
    write_json,
    write_with,
)
from iterdpo.run.sums import CHANGED, check_files, is_whole, note_all, recorded
from iterdpo.seeds import derive_seeds
from iterdpo.types import Content, Prompt, content_from_json, content_to_json

CHUNK = 1024  # lines that are read at a time
LINES, INDEX, NAMES, SKIPPED = "prompts.jsonl", "index.npz", "columns.json", "skipped.json"
REPEATED_ID = "have the id of an earlier row"
ARRAYS = {
    "ends": "q",  # [M] int64: where each line ends, in bytes
    "ids": "Q",  # [M] uint64: a hash of its id
    "contents": "Q",  # [M] uint64: a hash of its content
    "columns": "I",  # [M] uint32: which of the index's names it has
}
Array = NDArray[Any]
Parts = tuple[str | None, Content, dict[str, Any]]  # id (None: a hash of the content), content, columns


class PromptFile:
    """Prompts on disk in a fixed order. Iterating reads them one by one; a slice is a `PromptFile` again.

    `for prompt in prompts`, `len(prompts)`, `prompts[128:256]`, `prompts.digest()`, `prompts.columns()`
    """

    def __init__(self, lines: _Lines, rows: Array | None = None) -> None:
        self._lines = lines
        self._rows = np.arange(len(lines), dtype=np.int32) if rows is None else rows  # [N], which lines, in order

    @staticmethod
    def open(path: Path) -> PromptFile:
        """The prompts that `write` wrote down."""
        return PromptFile(_Lines(path))

    @staticmethod
    def of(prompts: Iterable[Prompt]) -> PromptFile:
        """Prompts from memory, in a temporary file that has no name."""
        return PromptFile(_write(map(_parts, prompts), None))

    @property
    def skipped(self) -> dict[str, int]:
        """How many rows of the data could not be used, by reason, and were left out."""
        return self._lines.skipped

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Prompt]:
        return map(_prompt, self._lines.read(self._rows))

    def __getitem__(self, part: slice) -> PromptFile:
        return PromptFile(self._lines, self._rows[part])

    def longest(self, count: int) -> PromptFile:
        """The `count` prompts with the longest lines: the content mostly, with the columns."""
        return self._among(np.sort(np.argsort(-self._lines.sizes[self._rows], kind="stable")[:count]))

    def columns(self) -> set[str]:
        """The names of the columns that any of the prompts has."""
        index = self._lines.index
        return {name for kind in np.unique(index["columns"][self._rows]) for name in index.names[kind]}

    def digest(self) -> str:
        """What identifies the prompts: a hash of ids, contents and columns, in order; `digest([[id, …], …])`."""
        text = hashlib.sha256(b"[")
        for number, line in enumerate(self._lines.read(self._rows)):
            text.update(b"," + line[:-1] if number else line[:-1])
        text.update(b"]")
        return text.hexdigest()[:16]

    def write(self, path: Path) -> None:
        """Write the prompts down, for `open`. A reader, or a crash, sees the old content or the new, never a part."""
        write_with(path, lambda handle: handle.writelines(self._lines.read(self._rows)), record=path.parent)

    @property
    def ids(self) -> Array:
        """A hash of each prompt's id, [N] uint64."""
        return self._lines.ids[self._rows]

    @property
    def contents(self) -> Array:
        """A hash of each prompt's content, [N] uint64."""
        return self._lines.index["contents"][self._rows]

    def seeds(self, seed: int, *purpose: int | str) -> Array:
        """`derive_seed(seed, *purpose, id)` of each prompt, [N] uint32."""
        return self._lines.seeds(seed, *purpose)[self._rows]

    def _among(self, which: Array) -> PromptFile:
        """Those at the positions `which`, or where a mask is true."""
        return PromptFile(self._lines, self._rows[which])


ABOVE_LIMIT = "above prompts.limit"
OF_USE = ("in_heldout", ABOVE_LIMIT)
"""Why a row may have no part in training although it gives a prompt."""


@dataclass
class PromptSet:
    """A run's prompts. No held-out prompt, by id or by content, is in `train`.

    `PromptSet(train, heldout, dropped={"repeated": 12, "in_heldout": 3})`; `dropped` counts rows of the file, those that
    cannot be used by their reason.
    """

    train: PromptFile
    heldout: PromptFile
    dropped: dict[str, int]
    rows: int
    """Of the file."""
    dropped_heldout: dict[str, int] = field(default_factory=dict)
    """Rows of `heldout_path`, if it is a file of its own, that were left out."""

    def summary(self) -> str:
        """`kept 80 of 105 prompts to train on (5 repeated, 20 held out)`."""
        left = {"repeated": self.dropped["repeated"], "held out": 0} | self.dropped
        del left["in_heldout"]
        left["held out"] = self.rows - sum(left.values()) - len(self.train)
        said = f"kept {len(self.train):,} of {self.rows:,} prompts to train on"
        if why := reasons(left):
            said += f" ({why})"
        if why := reasons(self.dropped_heldout):
            said += f"; left out of prompts.heldout_path: {why}"
        return said


def split_prompts(
    config: PromptsConfig, seed: int, *, pinned: PromptFile | None = None, cache: Path | None = None
) -> PromptSet:
    """Read the prompts and hold some out: `heldout` of them by hash, or as many of `heldout_path`'s.

    `pinned` are the held-out prompts of a run that has begun: they stay the same if the file grows. In the
    directory `cache` what was read of large files is kept, so that they are not read again until they change. A file
    that cannot be read, or too few prompts for the held-out set and one round, is a DataError.
    """

    def read(path: str) -> tuple[PromptFile, int]:
        return read_prompts(path, config.split, config.column, config.id_column, cache, config.bad_rows)

    prompts, rows = read(config.path)
    pool, pool_rows = (prompts, rows) if config.heldout_path is None else read(config.heldout_path)
    heldout = pinned or _first(pool, config.heldout, seed, "heldout")
    if pinned and not _is_in(pinned.contents, pool.contents).any():
        raise DataError(
            f"{config.heldout_path or config.path}: none of the {len(pinned):,} prompts that this run holds out is in it; "
            "choose another run_dir, or name the file that has them in prompts.heldout_path"
        )

    apart = _is_in(prompts.ids, heldout.ids)
    own = apart.sum() if pool is prompts else 0
    apart |= _is_in(prompts.contents, heldout.contents)
    if pool is not prompts:  # all of heldout_path, also what `heldout` leaves unused
        apart |= _is_in(prompts.ids, pool.ids) | _is_in(prompts.contents, pool.contents)
    train = prompts._among(~apart)
    if len(train) < config.per_round:
        raise DataError(
            f"{config.path}: {len(prompts):,} different prompts leave {len(train):,} to train on after "
            f"{len(heldout):,} are held out, but a round needs {config.per_round:,}; add prompts, or lower "
            "prompts.per_round or prompts.heldout"
        )
    dropped = {**_dropped(prompts, rows), "in_heldout": int(apart.sum() - own)}
    if config.limit is not None and len(train) > config.limit:
        dropped[ABOVE_LIMIT] = len(train) - config.limit
        train = train._among(np.sort(_in_order(train, seed)[: config.limit]))
    return PromptSet(train, heldout, dropped, rows, {} if pool is prompts else _dropped(pool, pool_rows))


def _in_order(prompts: PromptFile, seed: int, turn: int = 0) -> Array:
    """The positions of prompts in the order in which rounds sample them for the first time, or again in a later turn."""
    return np.argsort(prompts.seeds(seed, "order", turn), kind="stable")  # of equal ones, the file's


def _dropped(prompts: PromptFile, rows: int) -> dict[str, int]:
    """The rows that gave no prompt, by reason."""
    return {"repeated": rows - len(prompts) - sum(prompts.skipped.values()), **prompts.skipped}


def next_prompts(
    prompts: PromptSet,
    used: Iterable[PromptFile],
    *,
    round: int,
    per_round: int,
    seed: int,
    reuse: bool,
    retired: Array | None = None,
) -> PromptFile:
    """The prompts of `round`: `per_round` of those used least so far, in a seeded order.

    `used` are the prompts of each round before; a prompt that is in none of them is new, even if it was added to the
    file since. With `reuse`, every prompt has its turn before one comes again, in another order. Those with the ids
    `retired` come last. If fewer unused prompts are left than the round needs, that is a DataError.
    """
    train = prompts.train
    times = _occurrences(train.ids, np.concatenate([np.zeros(0, np.uint64), *(earlier.ids for earlier in used)]))
    total, fresh = len(train), int((times == 0).sum())
    if total < per_round or (fresh < per_round and not reuse):
        raise DataError(
            f"round {round} needs {per_round:,} prompts, but {fresh:,} of {total:,} are left after "
            f"{round - 1} rounds; add prompts, lower prompts.per_round, or set prompts.reuse=true"
        )
    last = np.zeros(total, bool) if retired is None else _is_in(train.ids, retired)
    chosen = np.zeros(0, np.int64)
    for apart, turn in itertools.product((False, True), np.unique(times)):
        if len(chosen) < per_round:
            (at,) = np.nonzero((times == turn) & (last == apart))
            chosen = np.concatenate([chosen, at[_in_order(train._among(at), seed, int(turn))]])
    return train._among(chosen[:per_round])


class RoundPrompts:
    """A run's prompts, by round. Constructing it reads the prompt file, and checks that there are enough for `rounds`.

    Raises a DataError as `split_prompts` and `next_prompts` do.
    """

    def __init__(
        self, section: PromptsConfig, run_dir: RunDir, *, rounds: int, seed: int, min_margin: float = 0.0
    ) -> None:
        self._section, self._run_dir, self._seed, self._min_margin = section, run_dir, seed, min_margin
        self._tied: dict[str, tuple[Array, Array]] = {}  # by the digest of the judgments
        self._judged: dict[int, str] = {}  # of each judged round, that digest
        # A large file's prompts are kept once a run has begun, so that it is not read again at every start.
        begun = (run_dir.root / "run.json").exists() and os.access(run_dir.root, os.W_OK)
        cache = run_dir.root / "prompts.cache" if begun else None
        self._set = split_prompts(section, seed, pinned=self._pinned(0, section.heldout), cache=cache)
        self._rounds: dict[int, PromptFile] = {}
        self.heldout, self.train = self._set.heldout, self._set.train
        self.of(rounds)

    def of(self, round: int) -> PromptFile:
        """What `round` samples: what it began with, if it has begun, else the next prompts not used before."""
        section = self._section
        if section.choose == "untied":  # what has not begun depends on the judgments that there are by now
            judged = {t: made for t in self._run_dir.rounds() if t and (made := self._judgments(t)) is not None}
            if judged != self._judged:
                self._judged = judged
                self._rounds = {t: prompts for t, prompts in self._rounds.items() if self._file(t).exists()}
        for t in range(1, round + 1):
            if t in self._rounds:
                continue
            self._rounds[t] = self._pinned(t, section.per_round) or next_prompts(
                self._set,
                [self._rounds[earlier] for earlier in range(1, t)],
                round=t,
                per_round=section.per_round,
                seed=self._seed,
                reuse=section.reuse,
                retired=self._retired(t),
            )
        return self._rounds[round]

    def retired(self, round: int) -> int:
        """How many prompts were retired when `round` began: all rounds that sampled one gave it equal scores."""
        found = self._retired(round)
        return 0 if found is None else len(found)

    def _retired(self, round: int) -> Array | None:
        """The ids (hashes) of prompts that have tied in each round before `round` that judged them."""
        if self._section.choose != "untied":
            return None
        untied, tied = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
        for t, made in self._judged.items():
            if t >= round:
                continue
            if made not in self._tied:
                ids, ties = [], []
                for judgment in read_judgments(self._run_dir.round_dir(t) / "judgments"):
                    scores = [score for score in judgment.scores if score is not None]
                    ids.append(_hash(judgment.prompt_id))
                    spread = max(scores) - min(scores) if len(scores) > 1 else math.inf  # unjudged is no tie
                    ties.append(spread == 0 or spread < self._min_margin)
                self._tied[made] = np.array(ids, np.uint64), np.array(ties, bool)
            ids_, ties_ = self._tied[made]
            tied.append(ids_[ties_])
            untied.append(ids_[~ties_])
        return np.setdiff1d(np.concatenate(tied), np.concatenate(untied))

    def _judgments(self, round: int) -> str | None:
        """The digest of the round's judgments, if they are finished."""
        manifest = read_manifest(self._run_dir.round_dir(round) / "judgments")
        return None if manifest is None else manifest.digest

    def pin(self, round: int) -> None:
        """Write down what the round samples (0: what is held out), so that prompts may be added to the file later."""
        path = self._file(round)
        path.parent.mkdir(parents=True, exist_ok=True)
        (self.of(round) if round else self.heldout).write(path)
        if round:
            self._rounds[round] = PromptFile.open(path)  # read in its order, which is quicker

    def pinned_ids(
        self, round: int, render: Callable[[list[Prompt]], list[list[int]]], *, stamp: str
    ) -> Iterator[list[int]]:
        """The token ids of the round's prompts (0: of the held-out ones), in their order, as `render` first gave them.

        They are written down beside the prompts. `stamp` names what else decides them: those of another are replaced.
        A file that is not what was written is a DamagedError.
        """
        import pyarrow.parquet as pq

        prompts, path = self.of(round) if round else self.heldout, self._file(round).with_suffix(".ids.parquet")
        stamp = digest([stamp, prompts.digest()])
        if _stamp_of(path) != stamp:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_with(path, lambda handle: _write_ids(handle, prompts, render, stamp), record=path.parent)
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(CHUNK):
                yield from batch["ids"].to_pylist()

    def summary(self) -> str:
        """`kept 80 of 105 prompts to train on (5 repeated, 20 held out)`."""
        return self._set.summary()

    def left_out(self) -> dict[str, int]:
        """How many rows of `prompts.path` gave no prompt, by reason, without those that are held out."""
        return {reason: count for reason, count in self._set.dropped.items() if count and reason not in OF_USE}

    def _file(self, round: int) -> Path:
        return self._run_dir.round_dir(round) / "prompts.jsonl" if round else self._run_dir.root / "heldout.jsonl"

    def _pinned(self, round: int, count: int) -> PromptFile | None:
        """What is written down, unless the configuration now asks for another number."""
        path = self._file(round)
        prompts = PromptFile.open(path) if path.exists() else None
        return prompts if prompts is not None and len(prompts) == count else None


def _write_ids(handle: Any, prompts: PromptFile, render: Callable[[list[Prompt]], list[list[int]]], stamp: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("ids", pa.list_(pa.int32()))], metadata={"stamp": stamp})
    with pq.ParquetWriter(handle, schema, compression="zstd") as writer:
        for at in range(0, len(prompts), CHUNK):
            ids = number_lists(render(list(prompts[at : at + CHUNK])), "i")
            writer.write_table(pa.table([ids], schema=schema))


def _stamp_of(path: Path) -> str | None:
    """The stamp of the ids in a file; None if it is not there.

    Raises:
        DamagedError: the file is not what was written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        return None
    check_files([path])
    try:
        metadata = pq.read_schema(path).metadata or {}
    except pa.ArrowInvalid as error:
        raise DamagedError(path, f"cannot be read as Parquet ({error})") from None
    return str(metadata.get(b"stamp", b"").decode())


def check_lengths(lengths: Iterable[tuple[int, Prompt]], limit: int, *, place_of: Callable[[Prompt], str]) -> int:
    """The length of the longest of (tokens, prompt); a DataError that names the longest if any is above `limit`."""
    count = over = longest = 0
    for count, (length, prompt) in enumerate(lengths, 1):  # noqa: B007  # read below
        over += length > limit
        if length > longest:
            longest, the_longest = length, prompt
    if over:
        raise DataError(
            f"{place_of(the_longest)}: prompt {the_longest.id!r} has {longest:,} tokens, but {limit:,} fit ({over:,} of {count:,} "
            "prompts are too long); raise sampling.engine.max_model_len, lower sampling.max_tokens, or remove them"
        )
    return longest


def read_prompts(
    path: str,
    split: str = "train",
    column: str = "prompt",
    id_column: str | None = None,
    cache: Path | None = None,
    bad_rows: Literal["error", "skip"] = "error",
) -> tuple[PromptFile, int]:
    """The different prompts of a data set, in its order; and how many rows it has.

    An id is the value of `id_column`, or else a hash of the prompt, and then repeated prompts are dropped. The other
    columns travel in `Prompt.columns`; what JSON cannot hold becomes text.

    A bad row has no such column, a prompt that is neither text nor messages, is empty or ends with an assistant turn, or
    the id of an earlier row. With `bad_rows="skip"` they are left out, and counted in the file's `skipped`.

    Raises:
        DataError: a file that cannot be read, bad rows, with all of them, or no other rows.
    """
    bad = BadRows()
    located = _located_parts(path, split, column, id_column)

    def rows() -> Iterator[Parts]:
        for _, parts in located:
            if isinstance(parts, RowError):
                bad.add(parts)
            else:
                yield parts

    def check(lines: _Lines) -> None:
        read = len(lines) + bad.counts.total()
        if id_column is not None:
            for error in _repeated_ids(lines, _located_parts(path, split, column, id_column), id_column):
                bad.add(error)
        if bad.counts and (bad_rows == "error" or bad.counts.total() == read):
            raise bad.error(path, read, "prompts.bad_rows")
        lines.skipped = dict(bad.counts)

    stamp = None if cache is None else source_stamp(path, split)
    if cache is None or stamp is None:
        check(lines := _write(rows(), None))
    else:
        key = [path, split, column, id_column, stamp, bad_rows]
        lines = _kept(rows(), cache, digest(path), digest(key), check)
    first = _first_of_each(lines.ids)
    skipped = sum(number for reason, number in lines.skipped.items() if reason != REPEATED_ID)
    return PromptFile(lines, first.astype(np.int32)), len(lines) + skipped


def _first_of_each(ids: Array) -> Array:
    """Where each id occurs first, in order."""
    return np.sort(np.unique(ids, return_index=True)[1])


def _repeated_ids(lines: _Lines, located: Iterable[tuple[str, Parts | RowError]], column: str) -> Iterator[RowError]:
    """The rows with an id that an earlier row has; they are read again to find their places."""
    ids = lines.ids
    first = np.zeros(len(ids), bool)
    first[_first_of_each(ids)] = True
    if first.all():
        return
    repeated = set(ids[~first].tolist())
    places: dict[int, str] = {}  # of the first row with an id that is repeated
    read = ((where, parts[0]) for where, parts in located if not isinstance(parts, RowError))
    for (where, prompt_id), hashed, is_first in zip(read, ids.tolist(), first.tolist(), strict=True):
        if hashed not in repeated:
            continue
        if is_first:
            places[hashed] = where
        else:
            before = places[hashed].removeprefix(where.rpartition("row ")[0])  # in the same file, its row alone
            yield RowError(
                f"{where}: id {str(prompt_id)[:60]!r} in column {column!r} is {before}'s already; make ids unique, or leave "
                "prompts.id_column out",
                REPEATED_ID,
            )


def _is_in(values: Array, among: Array) -> Array:
    """Whether each value is among others, [N] bool; in half of the memory that np.isin takes."""
    found = np.sort(among)
    at = np.searchsorted(found, values)
    return found.take(at, mode="clip") == values if len(found) else np.zeros(len(values), bool)


def _occurrences(values: Array, among: Array) -> Array:
    """How often each value is among others, [N] int64."""
    found, counts = np.unique(among, return_counts=True)
    at = np.minimum(np.searchsorted(found, values), max(len(found) - 1, 0))
    return np.where(found[at] == values, counts[at], 0) if len(found) else np.zeros(len(values), np.int64)


def _first(prompts: PromptFile, number: int, seed: int, purpose: str) -> PromptFile:
    """The first `number` prompts in the order of (seed derived from the id, id)."""
    seeds = derive_seeds(seed, purpose, items=map(_id, prompts._lines.read(prompts._rows)))
    last = np.sort(seeds)[:number][-1:]  # several may have this seed
    (at,) = np.nonzero(seeds <= last) if len(last) else (np.zeros(0, np.int64),)
    at = at[np.argsort(seeds[at], kind="stable")]
    (equal,) = np.nonzero(np.diff(seeds[at]) == 0)
    same = np.union1d(equal, equal + 1)  # the few that share a seed: their ids decide
    ids = [prompt.id for prompt in prompts._among(at[same])]
    at[same] = [row for _, _, row in sorted(zip(seeds[at[same]], ids, at[same], strict=True))]
    return prompts._among(at[:number])


def place_of(prompt: Prompt, config: PromptsConfig) -> str:
    """The place of a prompt in the data that it was read from, for messages: `prompts.jsonl: row 10`. Reads the data."""
    sought = content_to_json(prompt.content)
    for path in filter(None, (config.path, config.heldout_path)):
        for where, parts in _located_parts(path, config.split, config.column, config.id_column):
            if isinstance(parts, RowError):
                continue
            prompt_id, content, _ = parts
            if prompt_id == prompt.id or (prompt_id is None and content_to_json(content) == sought):
                return where
    return f"{config.path}: prompt {prompt.id!r}"


def _located_parts(path: str, split: str, column: str, id_column: str | None) -> Iterator[tuple[str, Parts | RowError]]:
    for where, row in located_rows(path, split):
        try:
            yield where, _parts_of_row(whole(row), where, column, id_column)
        except RowError as error:
            yield where, error


def _parts_of_row(row: dict[str, Any], where: str, column: str, id_column: str | None) -> Parts:
    name = "messages" if column == "prompt" and "prompt" not in row and "messages" in row else column
    content = content_of(column_value(row, name, where, "set prompts.column"), f"{where}, column {name!r}")
    if not content or (isinstance(content, str) and not content.strip()):
        raise RowError(f"{where}, column {name!r} is empty; remove the row", EMPTY_PROMPT)
    if not isinstance(content, str) and content[-1]["role"] == "assistant":
        message = f"{where}, column {name!r} ends with an assistant turn; remove that message"
        raise RowError(message, LAST_TURN)
    content = with_companions(content, row, where, column=name)
    prompt_id = None if id_column is None else _id_of_row(row, id_column, where)
    return prompt_id, content, json_columns({k: v for k, v in row.items() if k not in (name, id_column)})


def _id_of_row(row: dict[str, Any], column: str, where: str) -> str:
    value = column_value(row, column, where, "set prompts.id_column")
    if value is None:
        message = f"{where}, column {column!r} is missing or null; give every row an id, or leave prompts.id_column out"
        raise RowError(message, "have no id")
    check_encodable(str(value), f"{where}, column {column!r}")
    return str(value)


# Lines of a file


@dataclass(frozen=True)
class _Index:
    """What finds, compares and orders M lines without reading them again: arrays of `ARRAYS`, by name.

    Those of an index on disk are read at each use, which is rare: of a million lines they take 30 MB.
    """

    names: list[list[str]]  # the sets of columns that occur
    arrays: Mapping[str, Array]

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]


class _Lines:
    """A file of prompts, a line each. The index of a file that was not written here is made when it is needed."""

    def __init__(
        self, source: IO[bytes] | Path, index: _Index | None = None, skipped: dict[str, int] | None = None
    ) -> None:
        """`source`: an open file, which lives as long as this does, or a path, which is opened to be read.

        `skipped`: how many rows of the data could not be used, by reason.
        """
        self._source = source
        self.skipped = skipped or {}
        self._seeds: dict[tuple[int | str, ...], Array] = {}
        self._index = index
        if index is not None:
            self.ends = index["ends"]
        else:
            assert isinstance(source, Path)
            self.ends = _line_ends(source)

    def __len__(self) -> int:
        return len(self.ends)

    def read(self, rows: Array | None = None) -> Iterator[bytes]:
        """The lines `rows`, in that order, or all of them."""
        rows = np.arange(len(self)) if rows is None else rows
        if isinstance(self._source, Path):
            with open(self._source, "rb") as handle:
                yield from self._read(handle.fileno(), rows)
        else:
            yield from self._read(self._source.fileno(), rows)

    def _read(self, file: int, rows: Array) -> Iterator[bytes]:
        for at in range(0, len(rows), CHUNK):
            some = rows[at : at + CHUNK]
            begins, ends = np.where(some > 0, self.ends[some - 1], 0), self.ends[some]
            start, size = int(begins.min()), int(ends.max() - begins.min())
            if size <= 2 * (ends - begins).sum():  # they lie close together
                block = os.pread(file, size, start)
                begins, ends = begins - start, ends - start
                yield from (block[b:e] for b, e in zip(begins.tolist(), ends.tolist(), strict=True))
            else:
                yield from (os.pread(file, e - b, b) for b, e in zip(begins.tolist(), ends.tolist(), strict=True))

    @property
    def sizes(self) -> Array:
        """Bytes of each line, [M] int64."""
        return np.diff(self.ends, prepend=0)

    def seeds(self, seed: int, *purpose: int | str) -> Array:
        """`derive_seed(seed, *purpose, id)` of every line, [M] uint32; kept, since each round asks again."""
        if (seed, *purpose) not in self._seeds:
            self._seeds[seed, *purpose] = derive_seeds(seed, *purpose, items=map(_id, self.read()))
        return self._seeds[seed, *purpose]

    @property
    def ids(self) -> Array:
        """A hash of each line's id, [M] uint64."""
        return self._ids if self._index is None else self._index["ids"]

    @cached_property
    def _ids(self) -> Array:
        return np.fromiter((_hash(_id(line)) for line in self.read()), np.uint64, len(self))

    @property
    def index(self) -> _Index:
        if self._index is None:
            with open(os.devnull, "wb") as nothing:
                self._index = _write((_parts(_prompt(line)) for line in self.read()), nothing).index
        return self._index


def _write(prompts: Iterable[Parts], handle: IO[bytes] | None) -> _Lines:
    """Write a line for each prompt, to a temporary file without a name if no other is given."""
    handle = handle or tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as the prompts
    arrays = {name: array(code) for name, code in ARRAYS.items()}
    ends, ids, contents, columns = arrays.values()
    names: dict[tuple[str, ...], int] = {}
    end = 0
    for prompt_id, value, others in prompts:
        content = _content_json(value)
        sha256 = hashlib.sha256(content.encode())
        if prompt_id is None:
            prompt_id = f"p-{sha256.hexdigest()[:16]}"
        end += handle.write(f"[{canonical(prompt_id)},{content},{canonical(others)}]\n".encode())
        ends.append(end)
        ids.append(_hash(prompt_id))
        contents.append(int.from_bytes(sha256.digest()[:8], "little"))
        columns.append(names.setdefault(tuple(others), len(names)))
    handle.flush()
    made = {name: np.frombuffer(a, a.typecode) if a else np.zeros(0, a.typecode) for name, a in arrays.items()}
    return _Lines(handle, _Index(list(map(list, names)), made))


def _kept(prompts: Iterable[Parts], cache: Path, name: str, stamp: str, check: Callable[[_Lines], None]) -> _Lines:
    """The lines and their index in `cache`, made if there are none for this stamp; those of other stamps go.

    `check` is called with lines that were made, and may refuse them.
    """
    place = cache / f"{name}-{stamp}"
    if not is_whole(place):
        shutil.rmtree(place, ignore_errors=True)
        cache.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=".", dir=cache))
        try:
            with open(fresh / LINES, "wb") as handle:
                made = _write(prompts, handle)
            np.savez(fresh / INDEX, **made.index.arrays)  # type: ignore[arg-type]
            check(made)
            write_json(fresh / NAMES, made.index.names)
            write_json(fresh / SKIPPED, made.skipped)
            note_all(fresh)
            sync_tree(fresh)
            for old in cache.glob(f"{name}-*"):
                shutil.rmtree(old, ignore_errors=True)
            with suppress(OSError):  # another process was quicker
                os.replace(fresh, place)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    index = _Index(read_json(place / NAMES), np.load(place / INDEX))
    # both files are read for as long as the prompts are
    return _Lines(open(place / LINES, "rb"), index, read_json(place / SKIPPED))


def _line_ends(path: Path) -> Array:
    """Where the lines of a file end, which is read once.

    Raises:
        DamagedError: the file is not as it was written.
    """
    found, end = [np.zeros(0, np.int64)], 0
    sha256, allowed = hashlib.sha256(), recorded(path)
    with open(path, "rb") as handle:
        while block := handle.read(1 << 24):
            sha256.update(block)
            found.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + end + 1)
            end += len(block)
    if allowed is not None and sha256.hexdigest() not in allowed:
        raise DamagedError(path, CHANGED)
    return np.concatenate(found)


def _content_json(content: Content) -> str:
    """Canonical JSON; but tools and their calls keep the order of their keys, in which a template writes them."""
    value = content_to_json(content)
    plain = isinstance(content, str) or all(isinstance(text, str) for message in content for text in message.values())
    if plain and value is content:
        return canonical(value)
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _prompt(line: bytes) -> Prompt:
    prompt_id, content, columns = json.loads(line.decode())
    return Prompt(prompt_id, content_from_json(content), columns)


def _id(line: bytes) -> str:
    """The id alone: the rest of the line is not decoded."""
    return str(scanstring(line.decode(), 2)[0])


def _parts(prompt: Prompt) -> Parts:
    return prompt.id, prompt.content, prompt.columns


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
