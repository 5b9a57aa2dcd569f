"""The reader of every data file: rows one at a time, and the checks on what they hold."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

from iterdpo.data.files import FORMATS, Numbered, Row, file_rows, format_of, without_fill, without_nan
from iterdpo.errors import DataError, RowError
from iterdpo.run.remote import Remote, is_url
from iterdpo.run.rundir import canonical, digest
from iterdpo.run.sums import sha256_file

LARGE = 8 << 20  # bytes of files; smaller ones are read within a second or two
MOST_COLUMNS = 30  # that a message names
SPLIT_NAMES = {"train", "test", "validation", "valid", "val", "dev", "eval"}
SHOWN = 20  # bad rows that a message names
SHOWN_ALIKE = 5  # of one reason
NOT_DATA = {"MANIFEST.json", "STEP.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def load_rows(path: str, split: str, *, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a data set, one at a time, so that its size does not matter: the first `limit` of them, or all.

    `path` is a .json, .jsonl or .csv file (also .gz), a .parquet file, a directory of such files, the URL of either (see
    `iterdpo.run.remote`), or a hub id. Of a directory, the files named for `split` are read (`train.jsonl`,
    `train-00000-of-00002.parquet`), or all if no name tells of a split. CSV values are text. A file that is missing, empty
    or broken (with the line, also while iterating), or a data set that the hub does not give, is a DataError.
    """
    return (whole(row) for _, row in located_rows(path, split, limit=limit))


def located_rows(path: str, split: str, *, limit: int | None = None) -> Iterator[tuple[str, Row]]:
    """`load_rows`, each row with its place for messages: `train.csv: row 2 (line 3)`. Rows are counted from 1 in a file.

    In the place of a row that cannot be read is its `RowError`, if the rows after it can be.

    Raises:
        DataError: see `load_rows`.
    """
    files = _local_files(path, split)
    rows = (
        _located(path, ((None, without_fill(without_nan(row))) for row in _hub_dataset(path, split)))
        if files is None
        else _of_files(files)
    )
    first = list(islice(rows, 1))
    if not first:
        raise DataError(f"{path}: no rows in it")
    return islice(chain(first, rows), limit)


def first_row(path: str, split: str) -> dict[str, Any]:
    """The first row that can be read. If none can be, the error of the first."""
    error: RowError | None = None
    for _, row in located_rows(path, split):
        if not isinstance(row, RowError):
            return row
        error = error or row
    assert error is not None
    raise error


def whole(row: Row) -> dict[str, Any]:
    """The row; if there is an error in its place, that is raised."""
    if isinstance(row, RowError):
        raise row
    return row


@dataclass
class BadRows:
    """The rows that cannot be used: their number for each reason, and the messages of the first.

    `BadRows(counts={"have an empty prompt": 3}, shown={"have an empty prompt": ["a.jsonl: row 7, column 'prompt' is …]})`
    """

    counts: Counter[str] = field(default_factory=Counter)
    shown: dict[str, list[str]] = field(default_factory=dict)

    def add(self, error: RowError) -> None:
        self.counts[error.reason] += 1
        self._show(error.reason, str(error))

    def update(self, later: BadRows) -> None:
        """Add those of the rows after these."""
        self.counts.update(later.counts)
        for reason, messages in later.shown.items():
            for message in messages:
                self._show(reason, message)

    def _show(self, reason: str, message: str) -> None:
        messages = self.shown.setdefault(reason, [])
        if len(messages) < SHOWN_ALIKE:
            messages.append(message)

    def error(self, source: str, rows: int, key: str | None = None) -> DataError:
        """The error that names them, of `rows` in all; `key` is the configuration's that leaves them out, if one does.

        It is one line if one row is bad, or the same is true of every row.
        """
        bad = self.counts.total()
        first, *others = [message for alike in self.shown.values() for message in alike][:SHOWN]
        if bad == rows and len(self.counts) == 1:
            return DataError(first + (f" (all {rows:,} rows {next(iter(self.counts))})" if others else ""))
        if not others:
            return DataError(first + (f" ({key}=skip leaves the row out)" if key else ""))
        lines = "".join(f"\n  {message}" for message in (first, *others))
        more = f"\n  and {bad - 1 - len(others):,} more" if bad > 1 + len(others) else ""
        choice = f"; correct them, or leave them out with {key}=skip" if key and bad < rows else ""
        return DataError(
            f"{source}: {bad:,} of {rows:,} rows cannot be used ({reasons(dict(self.counts.most_common()))}){choice}:{lines}{more}"
        )


def reasons(counts: Mapping[str, int]) -> str:
    """`5 have an empty prompt, 4 are not valid JSON`."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)


def source_digest(path: str, split: str) -> str:
    """A hash of what `load_rows` reads: the bytes of its files, wherever they lie, or a hub data set's fingerprint.

    Raises:
        DataError: a file that is missing or cannot be read, or a data set that the hub does not give.
    """
    files = _local_files(path, split)
    if files is None:
        return str(_hub_dataset(path, split)._fingerprint)
    try:
        return digest([sha256_file(file) for file, _ in files])
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def source_stamp(path: str, split: str) -> list[list[str | int]] | str | None:
    """What changes if a file that `load_rows` reads does: names, sizes, times; or a hub data set's fingerprint.

    None of files that are read in a moment: a copy of them is not worth its place. Raises what `source_digest` does.
    """
    files = _local_files(path, split)
    if files is None:
        return str(_hub_dataset(path, split)._fingerprint)
    found = [(file.name, file.stat()) for file, _ in files]
    if sum(stat.st_size for _, stat in found) < LARGE:
        return None
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]


def column_value(row: dict[str, Any], column: str, where: str, remedy: str) -> Any:
    """`row[column]`. If the row has none, a RowError names the columns there are, the nearest, and the `remedy`."""
    if column in row:
        return row[column]
    names = tuple(islice(row, MOST_COLUMNS))
    more = ", …" if len(row) > MOST_COLUMNS else ""
    raise RowError(f"{where}: {_missing(column, names, more)}{remedy}", f"have no column {column!r}")


@lru_cache(maxsize=16)
def _missing(column: str, names: tuple[str, ...], more: str) -> str:
    """Kept: all rows may say it, and nearest names take long to find."""
    near = difflib.get_close_matches(column, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"no column {column!r}, only {', '.join(map(repr, names))}{more}; {hint}"


def json_value(value: Any) -> Any:
    """`value` if JSON can hold it, else its text."""
    try:
        canonical(value).encode()
    except (TypeError, ValueError, RecursionError):
        return str(value).encode(errors="replace").decode()
    return value


def json_columns(columns: dict[str, Any]) -> dict[str, Any]:
    """`columns` if JSON can hold them, else with the text of each name or value that it cannot."""
    as_they_are = json_value(columns) is columns
    return columns if as_they_are else {json_value(name): json_value(value) for name, value in columns.items()}


def shown(value: Any) -> str:
    """A value that is not as it should be, for a message: `int '4'`."""
    return "missing or null" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"


def _local_files(path: str, split: str) -> list[tuple[Path, str]] | None:
    """The files that are read, each with its name for messages; None if the path is a hub id."""
    if is_url(path):
        remote = Remote(path)
        names = _data_files(path, remote.files, split) if remote.is_directory else remote.files
        urls = [f"{remote.url}/{name}" if remote.is_directory else path for name in names]
        return [(remote.copies([name], replace=True) / name, url) for name, url in zip(names, urls, strict=True)]
    local = Path(path).expanduser()
    if local.is_dir():
        names = _data_files(str(local), (file.name for file in local.iterdir() if file.is_file()), split)
        return [(local / name, str(local / name)) for name in names]
    if local.exists():
        return [(local, str(local))]
    # a hub id is one or two plain names; "v1.5" is no file's suffix
    if path.startswith(("/", ".", "~")) or path.count("/") > 1 or re.search(r"\.[a-zA-Z]\w*$", path):
        raise DataError(f"{path}: no such file or directory; relative paths start at the current directory")
    return None


def _hub_dataset(path: str, split: str) -> Any:
    """A memory-mapped `datasets.Dataset`."""
    import datasets
    import huggingface_hub

    try:
        if not (huggingface_hub.constants.HF_HUB_OFFLINE or datasets.config.HF_DATASETS_OFFLINE):
            huggingface_hub.dataset_info(path, timeout=8)  # load_dataset retries a wrong name for half a minute
        return datasets.load_dataset(path, split=split)
    except Exception as error:  # every layer of the hub's client has errors of its own
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{path}: no such file, and no hub data set with split {split!r} can be loaded "
            f"({type(error).__name__}: {reason}); check the name, the split and the network, or give a file"
        ) from error


def _data_files(directory: str, names: Iterable[str], split: str) -> list[str]:
    """Those of a directory's files that are read."""
    files = sorted(f for f in names if format_of(Path(f)) in FORMATS and f not in NOT_DATA)
    files = [f for f in files if not f.startswith((".", "_"))]
    if not files:
        problem = "no .json, .jsonl, .csv or .parquet file in it"
        raise DataError(f"{directory}: {problem}; name the directory that contains them")
    words = {f: re.split(r"[-._]", f) for f in files}
    named = [f for f in files if re.split(r"[-.]", f)[0] == split] or [f for f in files if split in words[f]]
    if not named and any(SPLIT_NAMES & set(w) for w in words.values()):
        raise DataError(f"{directory}: no file is named for split {split!r}, only {', '.join(files)}; set the split")
    return named or files


def _of_files(files: list[tuple[Path, str]]) -> Iterator[tuple[str, Row]]:
    return chain.from_iterable(_located(name, file_rows(file, name)) for file, name in files)


def _located(source: str, rows: Iterable[Numbered]) -> Iterator[tuple[str, Row]]:
    for number, (line, row) in enumerate(rows, 1):
        yield f"{source}: row {number}" + ("" if line in (None, number) else f" (line {line})"), row
