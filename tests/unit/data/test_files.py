"""Damaged and hostile data files: a message with the file's name, in bounded memory, and nothing else."""

from __future__ import annotations

import gzip
import json
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iterdpo.data import files
from iterdpo.data.files import file_rows
from iterdpo.data.prompts import read_prompts
from iterdpo.data.rows import whole
from iterdpo.errors import DataError

ROOT = Path(__file__).parents[3]
ROW = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [whole(row) for _, row in file_rows(path)]


def line(extra: str) -> bytes:
    return b'{"prompt":"a","chosen":"b","rejected":"c","x":' + extra.encode() + b"}\n"


def packed_and_damaged() -> bytes:
    rows = "".join(json.dumps({**ROW, "x": random.Random(i).random()}) + "\n" for i in range(3000))
    raw = bytearray(gzip.compress(rows.encode(), mtime=0))
    raw[len(raw) // 2 : len(raw) // 2 + 40] = b"\xff" * 40
    return bytes(raw)


DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE: dict[str, bytes] = {
    "damaged.jsonl.gz": packed_and_damaged(),
    "checksum.jsonl.gz": gzip.compress(line("1"))[:-8] + b"\0" * 8,
    "deep.jsonl": line(DEEP),
    "deeper-than-allowed.jsonl": line("[" * 101 + "]" * 101),
    "deep.json": DEEP.encode(),
    "deep-in-a-list.json": b"[" + line(DEEP) + b"]",
    "deep-objects.json": b"[" + line('{"a":' * 5000 + "1" + "}" * 5000) + b"]",
    "long-integer.jsonl": line("9" * 5000),
    "long-integer.json": b"[" + line("9" * 5000) + b"]",
    "two-objects-a-line.jsonl": b'{"a": 1}{"b": 2}\n',
    "unfinished.json": b'[{"prompt": "a"}, ',
    "unfinished-text.json": b'[{"prompt": "a',
    "no-comma.json": b'[{"prompt": "a"} {"prompt": "b"}]',
    "after-the-list.json": b'[{"prompt": "a"}] 7',
    "a-number-at-the-end.json": b"[1",
    "utf-16.jsonl": "{}\n".encode("utf-16"),
    "zeros.jsonl": bytes(1000),
    "zeros.json": b"[" + bytes(1000),
    "zeros.csv": b"a,b\n" + bytes(1000) + b"\n",
    "zeros.parquet": bytes(1000),
    "cut.parquet": b"PAR1" + bytes(100) + b"\xff\xff\xff\x7fPAR1",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_or_hostile_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(HOSTILE[name])
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        rows_of(tmp_path / name)


def test_nesting_that_is_allowed_is_read(tmp_path: Path) -> None:
    for name, text in {"a.jsonl": line("[" * 99 + "]" * 99), "a.json": b"[" + line("[" * 99 + "]" * 99) + b"]"}.items():
        (tmp_path / name).write_bytes(text)
        assert len(rows_of(tmp_path / name)) == 1


BASE = {name: pa.array([value]) for name, value in ROW.items()}
NOT_UTF8 = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
ODD: dict[str, tuple[str, pa.Array]] = {
    "not UTF-8": ("chosen", NOT_UTF8),
    "year 300000": ("t", pa.array([10**13], pa.timestamp("s"))),
    "a time zone that there is not": ("t", pa.array([1], pa.timestamp("us", tz="Mars/Phobos"))),
    "a duration of ages": ("t", pa.array([2**62], pa.duration("s"))),
    "not UTF-8 in a list": ("t", pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), NOT_UTF8)),
    "a date of ages": ("t", pa.array([2**30], pa.date32())),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_value_of_parquet_that_python_does_not_have_is_named_by_row_and_column(tmp_path: Path, kind: str) -> None:
    column, values = ODD[kind]
    pq.write_table(pa.table({**BASE, column: values}), tmp_path / "odd.parquet")
    with pytest.raises(
        DataError, match=rf"odd\.parquet: row 1, column '{column}': a value of the type .*remove the col"
    ):
        rows_of(tmp_path / "odd.parquet")


FINE: dict[str, pa.Array] = {
    "decimal": pa.array(["1.5"]).cast(pa.decimal128(5, 2)),
    "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
    "binary": pa.array([b"\xff"]),
    "dictionary": pa.array(["a"]).dictionary_encode(),
    "half": pa.array([1.5]).cast(pa.float16()),
    "time": pa.array([1], pa.time64("us")),
    "null": pa.nulls(1),
    "struct": pa.array([{"a": {"b": [1.5, float("nan")]}}]),
}


@pytest.mark.parametrize("kind", FINE)
def test_other_types_of_parquet_travel_with_the_row(tmp_path: Path, kind: str) -> None:
    pq.write_table(pa.table({**BASE, "x": FINE[kind]}), tmp_path / "fine.parquet")
    (row,) = rows_of(tmp_path / "fine.parquet")
    assert {name: row[name] for name in ROW} == ROW
    prompts, rows = read_prompts(str(tmp_path / "fine.parquet"))
    assert rows == len(prompts) == 1


def test_nan_is_null_in_json_and_in_parquet_however_deep(tmp_path: Path) -> None:
    nan = float("nan")
    rows = [{"x": nan, "y": [{"z": nan}], "w": 1.5}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.parquet"):
        assert rows_of(tmp_path / name) == [{"x": None, "y": [{"z": None}], "w": 1.5}]


def test_a_column_that_occurs_twice_is_named(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: has the column 'prompt' more than once"):
        rows_of(tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("prompt,label,prompt\na,1,b\n")
    with pytest.raises(DataError, match=r"a\.csv: has the column 'prompt' more than once"):
        rows_of(tmp_path / "a.csv")


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
def test_a_list_is_read_the_same_in_chunks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    rows = [{"a": 'é"\\[{', "n": [1, -2.5e3, True, None, {"b": "\u2028"}]}, {}, {"long": 10**30}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    monkeypatch.setattr(files, "CHUNK", chunk)
    assert rows_of(tmp_path / "a.json") == rows
    (tmp_path / "a.json").write_text('[{"a": 1},\n {"b": 2},\n {"c" 3}]')
    with pytest.raises(DataError, match=r"a\.json:3: not valid JSON: Expecting ':' delimiter at column 7"):
        rows_of(tmp_path / "a.json")


def test_a_list_may_be_empty(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(" [ \n] ")
    assert rows_of(tmp_path / "a.json") == []


# Memory

READ = """
import resource, sys
from pathlib import Path
from iterdpo.data import files
from iterdpo.data.files import file_rows
from iterdpo.data.rows import whole
from iterdpo.errors import DataError
import pyarrow.parquet
files.MOST = 8 << 20
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(sum(1 for _, row in file_rows(Path(sys.argv[1])) if whole(row)), "rows")
except DataError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def bomb(path: Path, head: bytes, unit: bytes, mebibytes: int) -> None:
    with gzip.open(path, "wb", compresslevel=1) as handle:
        handle.write(head)
        block = unit * ((1 << 20) // len(unit))
        for _ in range(mebibytes):
            handle.write(block)


def parquet_bomb(path: Path) -> None:
    """A value of 2 MiB, three hundred times: 600 MiB as text."""
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array(["a" * (2 << 20)]))
    with pq.ParquetWriter(path, pa.schema([("prompt", values.type)]), dictionary_pagesize_limit=1 << 30) as writer:
        writer.write_table(pa.table({"prompt": values}))


BOMBS: dict[str, Callable[[Path], None]] = {
    "one-line.jsonl.gz": lambda path: bomb(path, b'{"prompt": "', b"a", 200),
    "one-item.json.gz": lambda path: bomb(path, b'[{"prompt": "', b"a", 200),
    "blanks.json.gz": lambda path: bomb(path, b"[", b" ", 200),
    "one-field.csv.gz": lambda path: bomb(path, b'prompt\n"', b"a", 200),
    "one-row.csv.gz": lambda path: bomb(path, b"prompt\n", b"a,", 200),
    "repeated.parquet": parquet_bomb,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_read_in_bounded_memory(tmp_path: Path, name: str) -> None:
    BOMBS[name](tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / name)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
    )
    said, mebibytes = done.stdout.splitlines()
    assert name in said or said == "300 rows", done.stderr
    assert int(mebibytes) < 150


def test_a_file_that_unpacks_to_many_times_its_size_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SMALL", 1 << 20)
    monkeypatch.setattr(files, "RATIO", 50)
    bomb(tmp_path / "a.jsonl.gz", b"", b'{"prompt": "a"}\n', 4)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: unpacks to more than 50 times its size"):
        for _ in file_rows(tmp_path / "a.jsonl.gz"):
            pass
