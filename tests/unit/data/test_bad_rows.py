"""Rows that cannot be used: all are named at once, or left out and counted, for pairs and for prompts."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iterdpo.config import PromptsConfig
from iterdpo.data import rows
from iterdpo.data.preferences import PreferenceData
from iterdpo.data.prompts import read_prompts, split_prompts
from iterdpo.data.rendering import load_tokenizer
from iterdpo.errors import DataError
from judges.audit.labelled import read_labelled

GOOD = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
USER = {"role": "user", "content": "2+2?"}
BAD: dict[str, tuple[str, str]] = {  # a line, and the reason
    "cut": ('{"prompt": "2+', "are not valid JSON"),
    "two objects": ('{"a": 1} {"b": 2}', "are not valid JSON"),
    "long number": (json.dumps(GOOD)[:-1] + ', "x": ' + "9" * 5000 + "}", "are not valid JSON"),
    "a text": ('"2+2?"', "are no objects"),
    "null": ("null", "are no objects"),
    "deep": ('{"x": ' + "[" * 101 + "]" * 101 + "}", "are nested more than 100 levels deep"),
    "deeper": ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "are nested more than 100 levels deep"),
    "no prompt": ('{"question": "2+2?", "chosen": "4", "rejected": "5"}', "have no column 'prompt'"),
    "empty": (json.dumps({**GOOD, "prompt": " "}), "have an empty prompt"),
    "a number": (json.dumps({**GOOD, "prompt": 7}), "have a prompt or completion that is neither text nor messages"),
    "half a pair": (json.dumps({**GOOD, "prompt": "\ud800"}), "have half of a surrogate pair"),
    "no role": (json.dumps({**GOOD, "prompt": [{"role": None, "content": "x"}]}), "have a message of the wrong shape"),
    "media": (json.dumps({**GOOD, "image": "a.png"}), "have images or other media"),
    "tools": (
        json.dumps({**GOOD, "tools": [{"name": "f"}]}),
        "have a column for the chat template beside a prompt of text",
    ),
    "last turn": (
        json.dumps({**GOOD, "prompt": [USER, {"role": "assistant", "content": "4"}]}),
        "have a prompt that ends with an assistant turn",
    ),
}
OF_PAIRS = {"no prompt": "have no prompt, but another column that may be it"}


def write(path: Path, *lines: str | dict[str, Any]) -> str:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return str(path)


def read_pairs(path: str, **settings: Any) -> dict[str, int]:
    data = PreferenceData(path, **settings)
    kept = sum(map(len, data.parsed()))
    assert kept == data.account.kept
    return {"kept": kept} | {reason: entry["count"] for reason, entry in data.account.left_out.items()}


def read_all_prompts(path: str, **settings: Any) -> dict[str, int]:
    prompts, count = read_prompts(path, **settings)
    assert count == len(prompts) + sum(prompts.skipped.values())
    return {"kept": len(prompts)} | prompts.skipped


READERS: list[Callable[..., dict[str, int]]] = [read_pairs, read_all_prompts]


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("first", [False, True])
def test_a_bad_row_is_named_or_left_out_with_its_reason(
    tmp_path: Path, kind: str, read: Callable[..., dict[str, int]], first: bool
) -> None:
    line, reason = BAD[kind]
    reason = OF_PAIRS.get(kind, reason) if read is read_pairs else reason
    path = write(tmp_path / "a.jsonl", *([line, GOOD] if first else [GOOD, line]))
    number = 1 if first else 2
    with pytest.raises(DataError, match=rf"a\.jsonl:( row )?{number}\b.*bad_rows=skip leaves the row out\)$") as error:
        read(path)
    assert "\n" not in str(error.value)
    assert read(path, bad_rows="skip") == {"kept": 1, reason: 1}


@pytest.mark.parametrize("read", READERS)
def test_bad_rows_of_every_kind_are_named_in_one_error(tmp_path: Path, read: Callable[..., dict[str, int]]) -> None:
    path = write(tmp_path / "a.jsonl", *(line for line, _ in BAD.values()), GOOD)
    with pytest.raises(DataError) as error:
        read(path)
    first, *lines = str(error.value).splitlines()
    assert first.startswith(f"{path}: {len(BAD)} of {len(BAD) + 1} rows cannot be used (3 are not valid JSON, ")
    places = {int(re.match(rf"  {re.escape(path)}:( row )?(\d+)", line)[2]) for line in lines}  # type: ignore[index]
    assert places == set(range(1, len(BAD) + 1))
    counts = read(path, bad_rows="skip")
    assert sum(counts.values()) == len(BAD) + 1
    assert counts["kept"] == 1


@pytest.mark.parametrize("read", READERS)
def test_a_message_names_some_of_each_reason_and_counts_the_rest(
    tmp_path: Path, read: Callable[..., dict[str, int]]
) -> None:
    kinds = [BAD["cut"][0], BAD["empty"][0], BAD["media"][0], BAD["last turn"][0], BAD["null"][0]]
    path = write(tmp_path / "a.jsonl", *[line for line in kinds for _ in range(300)], GOOD)
    with pytest.raises(DataError) as error:
        read(path)
    lines = str(error.value).splitlines()
    assert len(lines) == 1 + rows.SHOWN + 1
    assert lines[-1] == "  and 1,480 more"
    assert sum("is empty" in line for line in lines) == rows.SHOWN_ALIKE


@pytest.mark.parametrize("read", READERS)
def test_a_mistake_that_every_row_has_is_said_once(tmp_path: Path, read: Callable[..., dict[str, int]]) -> None:
    path = write(tmp_path / "a.jsonl", *[{"promt": f"{i}?", "chosen": "4", "rejected": "5"} for i in range(2000)])
    for bad_rows in ("error", "skip"):
        with pytest.raises(DataError, match=r"a\.jsonl: row 1: no .*\(all 2,000 rows have no ") as error:
            read(path, bad_rows=bad_rows)
        assert "\n" not in str(error.value)
        assert "skip" not in str(error.value)


def test_the_bad_rows_of_several_files_have_the_names_of_theirs(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", GOOD, BAD["empty"][0])
    write(tmp_path / "b.jsonl", BAD["cut"][0], GOOD)
    for read in READERS:
        with pytest.raises(DataError) as error:
            read(str(tmp_path))
        assert "a.jsonl: row 2, column" in str(error.value)
        assert "b.jsonl:1: not valid" in str(error.value)


def test_rows_of_csv_and_parquet_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\na,b,c\na,b\na,b,c,d\nd,e,f\n")
    values = [1, 10**13, 2]
    table = pa.table({name: [value] * 3 for name, value in GOOD.items()} | {"t": pa.array(values, pa.timestamp("s"))})
    pq.write_table(table, tmp_path / "a.parquet")
    fields, value = "have another number of fields than the header", "have a value of Parquet that cannot be read"
    for read in READERS:
        assert read(str(tmp_path / "a.csv"), bad_rows="skip") == {"kept": 2, fields: 2}
    assert read_pairs(str(tmp_path / "a.parquet"), bad_rows="skip") == {"kept": 2, value: 1}
    prompts, count = read_prompts(str(tmp_path / "a.parquet"), bad_rows="skip")
    assert (len(prompts), count, prompts.skipped) == (1, 3, {value: 1})


def test_what_the_file_as_a_whole_has_wrong_is_no_bad_row(tmp_path: Path) -> None:
    packed = gzip.compress("".join(json.dumps({**GOOD, "x": i}) + "\n" for i in range(2000)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "cut.json").write_text(json.dumps([GOOD, GOOD])[:-9])
    (tmp_path / "quote.csv").write_text('prompt,chosen,rejected\na,b,c\n"a,b,c\n')
    (tmp_path / "bytes.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xff\n")
    for file in tmp_path.iterdir():
        for read in READERS:
            with pytest.raises(DataError, match=re.escape(file.name)):
                read(str(file), bad_rows="skip")


# Prompts


def test_skipped_prompts_are_counted_by_what_reads_the_kept_copy_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "LARGE", 0)
    path = write(tmp_path / "a.jsonl", *[{"prompt": f"{i}?"} for i in range(9)], {"prompt": "8?"}, {"prompt": ""}, "[")
    config = PromptsConfig(path=path, per_round=2, heldout=3, bad_rows="skip")
    for _ in range(2):
        found = split_prompts(config, 0, cache=tmp_path / "cache")
        assert found.summary() == (
            "kept 6 of 12 prompts to train on (1 repeated, 3 held out, 1 have an empty prompt, 1 are not valid JSON)"
        )
        monkeypatch.setattr("iterdpo.data.prompts.located_rows", lambda *_: pytest.fail("it was read again"))
    monkeypatch.undo()
    monkeypatch.setattr(rows, "LARGE", 0)
    with pytest.raises(DataError, match="2 of 12 rows cannot be used"):
        split_prompts(config.model_copy(update={"bad_rows": "error"}), 0, cache=tmp_path / "cache")


def test_what_is_left_out_of_the_file_of_heldout_prompts_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[{"prompt": f"{i}?"} for i in range(9)])
    heldout = write(tmp_path / "b.jsonl", {"prompt": "x?"}, {"prompt": "x?"}, {"prompt": "y?"}, {"prompt": None})
    config = PromptsConfig(path=path, heldout_path=heldout, per_round=2, heldout=2, bad_rows="skip")
    reason = "have a prompt or completion that is neither text nor messages"
    assert split_prompts(config, 0).summary() == (
        f"kept 9 of 9 prompts to train on; left out of prompts.heldout_path: 1 repeated, 1 {reason}"
    )


def test_rows_that_repeat_an_id_are_named_or_left_out(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(
        tmp_path / "data" / "a.jsonl",
        {"prompt": "x", "key": 7},
        "[]",
        {"prompt": "y", "key": 8},
        {"prompt": "z", "key": 7},
    )
    write(tmp_path / "data" / "b.jsonl", {"prompt": "w", "key": 8})
    path = str(tmp_path / "data")
    with pytest.raises(DataError) as error:
        read_prompts(path, id_column="key")
    said = str(error.value)
    assert "3 of 5 rows cannot be used (2 have the id of an earlier row, 1 are no objects)" in said
    assert f"{path}/a.jsonl: row 4: id '7' in column 'key' is row 1's already" in said
    assert f"{path}/b.jsonl: row 1: id '8' in column 'key' is {path}/a.jsonl: row 3's already" in said
    prompts, count = read_prompts(path, id_column="key", bad_rows="skip")
    assert [(p.id, p.content) for p in prompts] == [("7", "x"), ("8", "y")]
    assert (count, prompts.skipped) == (5, {"are no objects": 1, "have the id of an earlier row": 2})


# Preferences


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_rows_of_any_batch_are_named_and_counted_alike(tmp_path: Path, tokenizer: Any, processes: int) -> None:
    lines: list[Any] = [{**GOOD, "prompt": f"{i}?"} for i in range(4500)]
    for place in (0, 17, 999, 1000, 3200, 4499):
        lines[place] = BAD["empty"][0]
    lines[1500] = {"prompt": "x?", "chosen": "4", "rejected": "5 <|odd|>"}
    path = write(tmp_path / "a.jsonl", *lines)
    limits: dict[str, Any] = {"max_prompt_tokens": 99, "max_completion_tokens": 99, "processes": processes}
    with pytest.raises(DataError, match=r"6 of 4,500 rows cannot be used \(6 have an empty prompt\)") as error:
        list(PreferenceData(path).tokenized(tokenizer, **limits))
    assert str(error.value).count("is empty") == 5
    data = PreferenceData(path, bad_rows="skip")
    assert sum(map(len, data.tokenized(tokenizer, **limits))) == data.account.kept == 4494
    assert data.account.left_out == {"have an empty prompt": {"count": 6, "rows": [1, 18, 1000, 1001, 3201, 4500]}}


def test_what_the_template_refuses_is_a_bad_row_among_the_others(tmp_path: Path, tokenizer: Any) -> None:
    chat = {"prompt": [USER], "chosen": "4", "rejected": "5"}
    path = write(tmp_path / "a.jsonl", chat, {**chat, "tools": [{"name": "f"}]}, BAD["cut"][0])
    limits = {"max_prompt_tokens": 99, "max_completion_tokens": 99}
    with pytest.raises(DataError, match="2 of 3 rows cannot be used") as error:
        list(PreferenceData(path).tokenized(tokenizer, **limits))
    assert "a.jsonl: row 2: the chat template of" in str(error.value)
    data = PreferenceData(path, bad_rows="skip")
    assert sum(map(len, data.tokenized(tokenizer, **limits))) == 1
    assert data.account.summary() == "kept 1 of 3 pairs (1 are not valid JSON, 1 cannot be rendered or tokenized)"


def test_unpaired_examples_that_are_taken_back_do_not_count_as_desirable(tmp_path: Path, tokenizer: Any) -> None:
    row = {"prompt": [USER], "completion": "4", "label": True}
    path = write(tmp_path / "a.jsonl", row, {**row, "label": False}, {**row, "tools": [{"name": "f"}]})
    data = PreferenceData(path, bad_rows="skip")
    list(data.tokenized(tokenizer, max_prompt_tokens=99, max_completion_tokens=99))
    assert (data.account.kept, data.account.desirable) == (2, 1)


def test_pairs_that_are_taken_back_do_not_contradict_their_scores(tmp_path: Path, tokenizer: Any) -> None:
    row = {"prompt": [USER], "chosen": "4", "rejected": "5", "score_chosen": 1, "score_rejected": 2}
    path = write(tmp_path / "a.jsonl", row, {**row, "tools": [{"name": "f"}]})
    data = PreferenceData(path, bad_rows="skip")
    list(data.tokenized(tokenizer, max_prompt_tokens=99, max_completion_tokens=99))
    assert data.account.contradicting == [1]


def test_labelled_pairs_name_all_rows_that_cannot_be_used(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", BAD["cut"][0], GOOD, *[BAD["empty"][0]] * 200)
    pairs, _ = read_labelled(path)
    with pytest.raises(DataError, match=r"201 of 202 rows cannot be used \(200 have an empty prompt, 1 are not valid"):
        list(pairs)
