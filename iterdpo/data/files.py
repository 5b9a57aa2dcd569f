"""The rows of a data file, one at a time and in bounded memory, whatever is in the file.

A row may have 64 MiB of text and 100 levels of nesting, and a compressed file may unpack to 500 times its size. What
is damaged, or beyond these limits, is a `DataError` with the file's name and, if there are lines, the line's number. If
the rows after it can be read, it is a `RowError` in the place of the row, and else it is raised. NaN is null.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from iterdpo.errors import DataError, RowError
from iterdpo.escape import printable

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = ("json", "jsonl", "csv", "parquet")
MOST = 64 << 20  # characters of a row
DEEPEST = 100  # levels of nesting
CHUNK = 1 << 20
RATIO = 500  # text that people write compresses to a tenth
SMALL = 1 << 30  # bytes up to which any ratio will do

_decoder = json.JSONDecoder(parse_constant=lambda name: None if name == "NaN" else float(name))
_white = re.compile(r"[ \t\r\n]*")


Row = dict[str, Any] | RowError
"""A row, or why there is none in its place."""
Numbered = tuple[int | None, Row]
"""A row and the number of the line it is on, or ends on; None if the file has no lines, or they say nothing."""
NOT_JSON = "are not valid JSON"


def format_of(file: Path) -> str:
    return file.name.lower().removesuffix(".gz").rpartition(".")[2]


def file_rows(file: Path, name: str | None = None) -> Iterator[Numbered]:
    """The rows of a file of one of `FORMATS`; `name` is the file's in messages, by default its path.

    Raises:
        DataError: nothing more can be read; see the module's docstring.
    """
    kind, name = format_of(file), name or str(file)
    if kind not in FORMATS:
        raise DataError(
            f"{name}: unknown kind of file; give .json, .jsonl, .csv (also .gz) or .parquet, as pandas writes them with "
            "df.to_json(path, orient='records', lines=True), df.to_csv(path, index=False) or df.to_parquet(path)"
        )
    if kind == "parquet":
        yield from (
            (None, row if isinstance(row, RowError) else without_fill(row)) for row in _parquet_rows(file, name)
        )
        return
    packed = file.name.lower().endswith(".gz")
    opener: Any = gzip.open if packed else open
    try:
        with opener(file, "rt", encoding="utf-8-sig", newline="") as handle:
            text = _Text(handle, name, file.stat().st_size * RATIO if packed else None)
            yield from _csv_rows(text) if kind == "csv" else _json_rows(text)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{name}: cannot be read ({printable(str(error))[:300]}); restore it from a copy") from error


class _Text:
    """A text file, a line or a chunk at a time."""

    def __init__(self, handle: TextIO, name: str, most: int | None) -> None:
        self.handle, self.name, self.line = handle, name, 0
        self._most, self._read = most, 0  # characters of all

    def __iter__(self) -> Iterator[str]:
        """Lines. `line` is the number of the last."""
        while line := self.count(self.handle.readline(MOST + 1)):
            self.line += 1
            if len(line) > MOST:
                raise DataError(f"{self.name}:{self.line}: {TOO_LONG}")
            yield line

    def count(self, text: str) -> str:
        self._read += len(text)
        if self._most is not None and self._read > max(self._most, SMALL):
            raise DataError(
                f"{self.name}: unpacks to more than {RATIO} times its size, which no text does; unpack it yourself if "
                "it is right"
            )
        return text


TOO_LONG = f"a row of more than {MOST >> 20} Mi characters; remove it"


def _json_rows(text: _Text) -> Iterator[Numbered]:
    """One object a line, or one list of objects, whatever the file's suffix: both are found as .json."""
    while (head := text.count(text.handle.read(1))).isspace():
        pass
    text.handle.seek(0)
    if head == "[":
        for number, (row, where) in enumerate(_json_items(text), 1):
            yield None, _object(row, f"{text.name}: item {number}", where)
        return
    for line in text:
        if line.strip():
            where = f"{text.name}:{text.line}"
            try:
                row, end = _decoder.raw_decode(line, _end_of_white(line, 0))
                if _end_of_white(line, end) != len(line):
                    raise json.JSONDecodeError("Extra data", line, end)
            except (ValueError, RecursionError) as error:
                yield text.line, _invalid(where, error)
            else:
                if text.line == 1:
                    _refuse_frame(text.name, row)
                yield text.line, _object(row, where, line)


def _refuse_frame(name: str, row: Any) -> None:
    """A whole data frame in one object, in one of the other forms that pandas has."""
    if not isinstance(row, dict) or not row:
        return
    keys = [list(value) if isinstance(value, dict) else [] for value in row.values()]
    numbered = all(name.isdigit() for name in row) and all(keys)  # orient="index"
    columns = all(keys) and all(names == keys[0] for names in keys) and all(name.isdigit() for name in keys[0])
    if numbered or columns or row.keys() in ({"columns", "index", "data"}, {"schema", "data"}):
        raise DataError(
            f"{name}: the file is one object with all rows in it, as pandas writes a data frame by default; write it with "
            "df.to_json(path, orient='records', lines=True)"
        )


def _json_items(text: _Text) -> Iterator[tuple[Any, str]]:
    """The items of a JSON list, each with its text, one by one, so that a large file is never in memory.

    By hand, since a streaming parser refuses NaN and long integers, and has no lines; and the standard library reads
    the whole file.

    Raises:
        DataError: with the line in the file.
    """
    buffer, at, ended = "", 0, False
    lines, behind = 1, 0  # the line that the buffer begins in, and the characters of it before the buffer

    def more() -> None:
        nonlocal buffer, at, lines, behind, ended
        if len(buffer) - at > MOST:
            raise DataError(f"{text.name}:{lines + buffer.count(chr(10), 0, at)}: {TOO_LONG}")
        lines += buffer.count("\n", 0, at)
        newline = buffer.rfind("\n", 0, at)
        behind = at - newline - 1 + (behind if newline < 0 else 0)
        chunk = text.count(text.handle.read(max(CHUNK, len(buffer) - at)))
        buffer, at, ended = buffer[at:] + chunk, 0, not chunk

    def invalid(message: str, position: int) -> RowError:
        line = lines + buffer.count("\n", 0, position)
        newline = buffer.rfind("\n", 0, position)
        column = position - newline + (behind if newline < 0 else 0)
        return _invalid(f"{text.name}:{line}", f"{message} at column {column}")

    def mark() -> str:
        """The next character that is no white space; empty at the file's end."""
        nonlocal at
        while (at := _end_of_white(buffer, at)) == len(buffer) and not ended:
            more()
        return buffer[at : at + 1]

    assert mark() == "["
    at += 1
    if mark() == "]":
        at += 1
    else:
        while True:
            mark()
            while True:
                try:
                    value, end = _decoder.raw_decode(buffer, at)
                    if end < len(buffer) or ended:
                        break
                except json.JSONDecodeError as error:
                    amid = error.pos < len(buffer) - 16 and not error.msg.startswith("Unterminated string")
                    if ended or amid:
                        raise invalid(error.msg, error.pos) from None
                except (ValueError, RecursionError) as error:
                    raise _invalid(f"{text.name}:{lines + buffer.count(chr(10), 0, at)}", error) from None
                more()
            yield value, buffer[at:end]
            at = end
            if (found := mark()) not in (",", "]"):
                raise invalid("Expecting ',' delimiter", at)
            at += 1
            if found == "]":
                break
    if mark():
        raise invalid("Extra data", at)


def _end_of_white(text: str, at: int) -> int:
    found = _white.match(text, at)
    assert found is not None  # it matches nothing, too
    return found.end()


def _invalid(where: str, reason: str | Exception) -> RowError:
    match reason:
        case RecursionError():
            return RowError(f"{where}: {TOO_DEEP}", NESTED)
        case json.JSONDecodeError():
            reason = f"{reason.msg} at column {reason.colno}"
        case ValueError():  # an integer with more digits than Python reads
            reason = "a number of thousands of digits"
    return RowError(f"{where}: not valid JSON: {reason}; write one object per line, or one list of objects", NOT_JSON)


TOO_DEEP = f"nested more than {DEEPEST} levels deep; remove it"
NESTED = f"are nested more than {DEEPEST} levels deep"


def _object(value: Any, where: str, text: str) -> Row:
    if text.count("[") + text.count("{") > DEEPEST and _is_deep(value):
        return RowError(f"{where}: {TOO_DEEP}", NESTED)
    if not isinstance(value, dict):
        shown = "missing or null" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"
        return RowError(f'{where}: {shown}; a row is an object, such as {{"prompt": "2+2?"}}', "are no objects")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict | list):
                inner.extend(item.values() if isinstance(item, dict) else item)
        if not inner:
            return False
        level = inner
    return any(isinstance(item, dict | list) for item in level)


def _csv_rows(text: _Text) -> Iterator[Numbered]:
    csv.field_size_limit(MOST)
    reader = csv.DictReader(iter(text), strict=True)
    try:
        _refuse_repeated(text.name, reader.fieldnames or ())
        for row in reader:
            if None in row or None in row.values():
                message = (
                    f"{text.name}:{reader.line_num}: the number of fields differs from the header's "
                    f"{len(reader.fieldnames or ())}; quote texts that hold commas or line breaks"
                )
                yield reader.line_num, RowError(message, "have another number of fields than the header")
            else:
                yield reader.line_num, row
    except csv.Error as error:
        # the line after the last good row
        raise DataError(f"{text.name}:{reader.line_num + 1}: not valid CSV: {printable(str(error))[:300]}") from None


def _refuse_repeated(file: str, columns: Sequence[str]) -> None:
    """Of two columns of one name, a row would have the last."""
    if repeated := sorted(name for name, count in Counter(columns).items() if count > 1):
        raise DataError(f"{file}: has the column {repeated[0]!r} more than once; rename one")


def _parquet_rows(file: Path, name: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # without a buffer a row group is read whole
        table = pq.ParquetFile(
            file, buffer_size=CHUNK, thrift_string_size_limit=MOST, thrift_container_size_limit=CHUNK
        )
        names = table.schema_arrow.names
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{name}: cannot be read as Parquet ({printable(str(error).strip())[:300]})") from error
    number = 1
    with table:
        _refuse_repeated(name, names)
        floats = any("float" in str(kind) or "double" in str(kind) for kind in table.schema_arrow.types)
        for group in range(table.num_row_groups):
            size = _rows_at_once(table.metadata.row_group(group))
            try:
                for batch in table.iter_batches(batch_size=size, row_groups=[group]):
                    for row in _values(batch, name, number):
                        yield without_nan(row) if floats and not isinstance(row, RowError) else row
                    number += len(batch)
            except (OSError, pa.ArrowException) as error:
                raise DataError(
                    f"{name}: row {number} or one after it cannot be read as Parquet ({printable(str(error).strip())[:300]})"
                ) from error


def _rows_at_once(group: Any) -> int:
    """How many rows of a Parquet row group are read at once: of long ones few, and of those that may all have one
    long value of the column's dictionary.
    """
    columns = [group.column(number) for number in range(group.num_columns)]
    largest = group.total_byte_size // max(1, group.num_rows)
    for column in columns:
        if column.has_dictionary_page and column.dictionary_page_offset is not None:
            ratio = column.total_uncompressed_size / max(1, column.total_compressed_size)
            dictionary = int(ratio * (column.data_page_offset - column.dictionary_page_offset))
            if dictionary > CHUNK * 5 // 4:  # writers stop at about a MiB
                largest = max(largest, dictionary)
    return int(max(1, min(1024, MOST // max(1, largest))))


def _values(batch: pa.RecordBatch, file: str, first: int) -> list[Row]:
    """The rows of a batch, the first of which is the row `first` of the file.

    A value that Python does not have, such as a date in the year 300000, is a RowError by its row and column.
    """
    try:
        rows: list[Row] = batch.to_pylist()
        return rows
    except Exception:
        return [_value(batch, number, f"{file}: row {first + number}") for number in range(len(batch))]


def _value(batch: pa.RecordBatch, number: int, where: str) -> Row:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[number].as_py()
        except Exception as error:  # every type has errors of its own
            reason = f"{type(error).__name__}: {printable(str(error))[:200]}"
            message = (
                f"{where}, column {name!r}: a value of the type {column.type} that cannot be read ({reason}); remove the "
                "column, or write it as text"
            )
            return RowError(message, "have a value of Parquet that cannot be read")
    return row


def without_fill(row: dict[str, Any]) -> dict[str, Any]:
    """A row of Arrow's without what it fills in: in messages and tools, each object gets the keys of all others, as nulls."""
    for name, value in row.items():
        if name in ("tools", "chat_template_kwargs"):
            row[name] = _without_nulls(value)
        elif isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
            row[name] = [
                {k: _without_nulls(v) for k, v in message.items()} if isinstance(message, dict) else message
                for message in value
            ]
    return row


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def without_nan(value: Any) -> Any:
    """`value` with None for each NaN in it."""
    match value:
        case float():
            return None if value != value else value
        case dict():
            return {key: without_nan(item) for key, item in value.items()}
        case list():
            return [without_nan(item) for item in value]
    return value
