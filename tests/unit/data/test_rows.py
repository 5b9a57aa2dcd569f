from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iterdpo.data.rows import load_rows, located_rows
from iterdpo.errors import DataError

ROWS = [{"prompt": "2+2?", "gold": "4"}, {"prompt": "3+3?", "gold": "6"}]


def write_rows(path: Path, rows: list[Any]) -> str:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    match path.name.split(".", 1)[1]:
        case "jsonl":
            path.write_text(lines)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case "json":
            path.write_text(json.dumps(rows, indent=2))
        case "json.gz":
            path.write_bytes(gzip.compress(json.dumps(rows).encode()))
        case "csv":
            with open(path, "w", newline="") as handle:
                writer = csv.DictWriter(handle, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        case "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def numbered(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"question {i}"} for i in range(start, start + count)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.parquet"])
def test_every_file_format_reads_the_same_rows(tmp_path: Path, name: str) -> None:
    assert list(load_rows(write_rows(tmp_path / name, ROWS), "train")) == ROWS


def test_a_json_file_may_have_one_object_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"prompt": "2+2?"}\n\n{"prompt": "3+3?"}\n')
    assert list(load_rows(str(tmp_path / "a.json"), "train")) == [{"prompt": "2+2?"}, {"prompt": "3+3?"}]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfprompt\r\n2+2?\r\n")
    assert list(load_rows(str(tmp_path / "a.csv"), "train")) == [{"prompt": "2+2?"}]


def test_csv_values_stay_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,gold\n"one, two",007\nNA,null\n')
    rows = [{"prompt": "one, two", "gold": "007"}, {"prompt": "NA", "gold": "null"}]
    assert list(load_rows(str(tmp_path / "a.csv"), "train")) == rows


def test_limit_reads_the_first_rows_only(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "2+2?"}\nbroken')
    assert list(load_rows(str(tmp_path / "a.jsonl"), "train", limit=1)) == [{"prompt": "2+2?"}]


def test_a_directory_is_read_by_split_where_file_names_tell(tmp_path: Path) -> None:
    write_rows(tmp_path / "train-00000-of-00002.parquet", numbered(2))
    write_rows(tmp_path / "train-00001-of-00002.parquet", numbered(1, start=2))
    write_rows(tmp_path / "test.jsonl", numbered(1, start=9))
    (tmp_path / "MANIFEST.json").write_text("{}")
    assert list(load_rows(str(tmp_path), "train")) == numbered(3)
    assert list(load_rows(str(tmp_path), "test")) == numbered(1, start=9)
    with pytest.raises(DataError, match=r"no file is named for split 'dev', only test\.jsonl, train-00000"):
        load_rows(str(tmp_path), "dev")


def test_a_directory_whose_names_tell_no_split_is_read_whole(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", numbered(1))
    write_rows(tmp_path / "b.jsonl", numbered(1, start=1))
    (tmp_path / "README.md").write_text("about")
    assert list(load_rows(str(tmp_path), "train")) == numbered(2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', r"a\.jsonl:2: not valid JSON: Expecting value at column"),
        ("a.jsonl", b'{"prompt": "x"}\n[1]\n', r"a\.jsonl:2: list '\[1\]'; a row is an object"),
        ("a.json", b'[\n{"prompt": "x"},\n{"prompt" "x"}]', r"a\.json:3: not valid JSON: Expecting ':' delimiter"),
        ("a.json", b'[{"prompt": "x"}, 7]', r"a\.json: item 2: int '7'; a row is an object"),
        ("a.jsonl", b"", r"a\.jsonl: no rows in it"),
        ("a.csv", b"prompt,gold\n", r"a\.csv: no rows in it"),
        ("a.csv", b"prompt,gold\nx,1\ny\n", r"a\.csv:3: the number of fields differs from the header's 2"),
        ("a.csv", b'prompt\n"x\n', r"a\.csv:2: not valid CSV: unexpected end of data"),
        ("a.jsonl", b'{"prompt": "\xff"}\n', r"a\.jsonl: cannot be read \(.*utf-8"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz: cannot be read \(Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"prompt": "x"}\n' * 99, mtime=0)[:-9],
            r"a\.jsonl\.gz: cannot be read \(Compressed",
        ),
        ("a.parquet", b"PAR1 not", r"a\.parquet: cannot be read as Parquet"),
        ("a.pkl", b"hello", r"a\.pkl: unknown kind of file.* as pandas writes them with df\.to_json\(path, orient="),
        ("a.txt", b"hello", r"a\.txt: unknown kind of file; give \.json, \.jsonl, \.csv"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(load_rows(str(tmp_path / name), "train"))


@pytest.mark.parametrize("path", ["./prompts", "/no/such/dir", "~/no-such-dir", "prompts.jsonl", "data/a.txt", "a/b/c"])
def test_a_missing_local_path_is_not_tried_on_the_hub(path: str) -> None:
    with pytest.raises(DataError, match="no such file or directory"):
        load_rows(path, "train")


def test_a_data_set_that_the_hub_does_not_give_is_named_with_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda path, timeout: None)
    asked = []

    def unreachable(path: str, split: str) -> None:
        asked.append((path, split))
        raise ConnectionError("no route\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"owner/data-v1\.5: .*split 'dev' can be loaded \(ConnectionError: no route\)"):
        load_rows("owner/data-v1.5", "dev")
    assert asked == [("owner/data-v1.5", "dev")]


def test_a_directory_without_data_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.json, \.jsonl, \.csv or \.parquet file in it"):
        load_rows(str(tmp_path), "train")


def test_nan_is_null_and_a_long_integer_is_itself(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"n": 1}, {"n": NaN, "long": 123456789012345678901234567890}, {"n": 0.1}]')
    one, two, three = load_rows(str(tmp_path / "a.json"), "train")
    assert (one, three) == ({"n": 1}, {"n": 0.1})
    assert two["n"] is None
    assert two["long"] == 123456789012345678901234567890


@pytest.mark.parametrize("suffix", ["json", "json.gz"])
def test_a_list_may_begin_with_a_byte_order_mark_and_white_space(tmp_path: Path, suffix: str) -> None:
    raw = b"\xef\xbb\xbf \n [" + json.dumps(ROWS[0]).encode() + b"]\n"
    (tmp_path / f"a.{suffix}").write_bytes(gzip.compress(raw) if suffix == "json.gz" else raw)
    assert list(load_rows(str(tmp_path / f"a.{suffix}"), "train")) == [ROWS[0]]


def test_the_good_items_of_a_broken_list_come_before_the_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"n": 1},\n{"n": 2},\n{"n": }]')
    rows = load_rows(str(tmp_path / "a.json"), "train")
    assert [next(rows), next(rows)] == [{"n": 1}, {"n": 2}]
    with pytest.raises(DataError, match=r"a\.json:3: not valid JSON: Expecting value at column 7"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", b'{"n": 1}\n{"n": 2}\n', ["row 1", "row 2"]),
        ("a.jsonl", b'{"n": 1}\n\n\n{"n": 2}\n', ["row 1", "row 2 (line 4)"]),
        ("a.json", b'[{"n": 1},\n{"n": 2}]', ["row 1", "row 2"]),
        ("a.csv", b'n\n1\n"2\n3"\n4\n', ["row 1 (line 2)", "row 2 (line 4)", "row 3 (line 5)"]),
    ],
)
def test_rows_have_their_place(tmp_path: Path, name: str, content: bytes, places: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    found = [where for where, _ in located_rows(str(tmp_path / name), "train")]
    assert found == [f"{tmp_path / name}: {place}" for place in places]


def test_rows_of_a_directory_have_the_place_in_their_own_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.parquet", numbered(2))
    found = [where for where, _ in located_rows(str(tmp_path), "train", limit=3)]
    assert found == [f"{tmp_path}/{name}.parquet: row {row}" for name, row in (("a", 1), ("a", 2), ("b", 1))]


def test_nulls_that_arrow_fills_in_are_left_out_of_messages_and_tools(tmp_path: Path) -> None:
    def call(name: str, **arguments: str) -> dict[str, Any]:
        called = [{"function": {"name": name, "arguments": arguments}}]
        return {"role": "assistant", "content": None, "tool_calls": called}

    user = {"role": "user", "content": "x", "tool_calls": None}
    rows = [
        {"prompt": [user, call("rain_in", city="Oslo"), user], "tools": [{"name": "rain_in"}], "gold": {"a": 1}},
        {
            "prompt": [user, call("sun_at", hour="9"), user],
            "tools": [{"name": "sun_at", "strict": True}],
            "gold": {"b": 2},
        },
    ]
    first, second = load_rows(write_rows(tmp_path / "a.parquet", rows), "train")
    assert first["prompt"] == rows[0]["prompt"]
    assert second["prompt"] == rows[1]["prompt"]
    assert (first["tools"], second["tools"]) == (rows[0]["tools"], rows[1]["tools"])
    assert first["gold"] == {"a": 1, "b": None}  # a judge reads it as it is in the file


@pytest.mark.parametrize("orient", ["columns", "index", "split", "table"])
def test_a_data_frame_that_pandas_wrote_as_one_object_is_refused_with_the_call_to_use(
    tmp_path: Path, orient: Any
) -> None:
    frame = pd.DataFrame(ROWS)
    frame.to_json(tmp_path / "a.json", orient=orient)
    with pytest.raises(
        DataError, match=r"one object with all rows in it.*df\.to_json\(path, orient='records', lines=True"
    ):
        list(load_rows(str(tmp_path / "a.json"), "train"))
    frame.to_json(tmp_path / "a.json", orient="records", lines=True)
    assert list(load_rows(str(tmp_path / "a.json"), "train")) == ROWS


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}},
        {"data": "x", "schema": "y", "prompt": "2+2?"},
        {"0": "x"},
        {"prompt": {}},
        {},
    ],
)
def test_a_row_of_objects_is_not_taken_for_a_data_frame(tmp_path: Path, row: dict[str, Any]) -> None:
    assert list(load_rows(write_rows(tmp_path / "a.jsonl", [row]), "train")) == [row]
