from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iterdpo.config import PromptsConfig
from iterdpo.data.prompts import PromptSet, check_lengths, load_prompts, load_rows, next_prompts, split_prompts
from iterdpo.errors import DataError
from iterdpo.types import Prompt

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


def prompt_set(count: int) -> PromptSet:
    return PromptSet([Prompt(f"p{i}", f"question {i}") for i in range(count)], [], {})


# Reading


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
        ("a.csv", b"prompt,gold\nx,1\ny\n", r"a\.csv:3: another number of fields than the header's 2"),
        ("a.csv", b'prompt\n"x\n', r"a\.csv:2: not valid CSV: unexpected end of data"),
        ("a.jsonl", b'{"prompt": "\xff"}\n', r"a\.jsonl: cannot be read \(.*utf-8"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz: cannot be read \(Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"prompt": "x"}\n' * 99, mtime=0)[:-9],
            r"a\.jsonl\.gz: cannot be read \(Compressed",
        ),
        ("a.parquet", b"PAR1 not", r"a\.parquet: cannot be read as Parquet"),
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
    with pytest.raises(
        DataError, match=r"owner/data-v1\.5: .*split 'dev', it cannot be loaded \(ConnectionError: no route\)"
    ):
        load_rows("owner/data-v1.5", "dev")
    assert asked == [("owner/data-v1.5", "dev")]


def test_a_directory_without_data_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.json, \.jsonl, \.csv or \.parquet file in it"):
        load_rows(str(tmp_path), "train")


# Prompts


def test_other_columns_travel_with_the_prompt(tmp_path: Path) -> None:
    prompts = load_prompts(write_rows(tmp_path / "a.jsonl", ROWS))
    assert [(p.content, p.columns) for p in prompts] == [("2+2?", {"gold": "4"}), ("3+3?", {"gold": "6"})]


def test_a_value_that_json_cannot_hold_travels_as_text(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["x"], "weight": [float("nan")], "at": pa.array([0], pa.timestamp("s")), "n": [7]})
    pq.write_table(table, tmp_path / "a.parquet")
    (prompt,) = load_prompts(str(tmp_path / "a.parquet"))
    assert prompt.columns == {"weight": "nan", "at": "1970-01-01 00:00:00", "n": 7}


def test_messages_lose_the_nulls_that_parquet_fills_in(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [
                {"role": "user", "content": "hi", "name": "Ann"},
                {"role": "user", "content": "you?", "name": None},
            ]
        }
    ]
    (prompt,) = load_prompts(write_rows(tmp_path / "a.parquet", rows))
    assert prompt.content == [
        {"role": "user", "content": "hi", "name": "Ann"},
        {"role": "user", "content": "you?"},
    ]


def test_an_id_is_the_hash_of_the_content_wherever_the_row_stands(tmp_path: Path) -> None:
    first, second = load_prompts(write_rows(tmp_path / "a.jsonl", ROWS))
    swapped = load_prompts(write_rows(tmp_path / "b.jsonl", ROWS[::-1]))
    assert [p.id for p in swapped] == [second.id, first.id]
    # printf '"2+2?"' | sha256sum | cut -c-16
    assert first.id == "p-ab8c9f78ab2d8090"


def test_repeated_prompts_are_read_once(tmp_path: Path) -> None:
    assert len(load_prompts(write_rows(tmp_path / "a.jsonl", [*ROWS, ROWS[0]]))) == 2


def test_ids_come_from_their_column_and_are_no_other_column(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "x", "key": 7}, {"prompt": "x", "key": 8}])
    assert [(p.id, p.columns) for p in load_prompts(path, id_column="key")] == [("7", {}), ("8", {})]


def test_an_id_that_occurs_twice_is_refused_with_both_rows(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "a.jsonl", [{"prompt": "x", "key": 7}, {"prompt": "y", "key": 8}, {"prompt": "z", "key": 7}]
    )
    with pytest.raises(DataError, match=r"row 3: id '7' in column 'key' is row 1's already"):
        load_prompts(path, id_column="key")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"promt": "x", "gold": "4"}, r"row 2: no column 'prompt', only 'promt', 'gold'; did you mean 'promt'\?"),
        ({"prompt": 7}, r"row 2, column 'prompt' is int '7'; it must be text, or a list of messages"),
        ({"prompt": None}, r"row 2, column 'prompt' is missing or null"),
        ({"prompt": " \n"}, r"row 2, column 'prompt' is empty"),
        ({"prompt": []}, r"row 2, column 'prompt' is empty"),
        ({"prompt": [{"role": "user"}]}, r"row 2, column 'prompt': message 1: 'content' is missing or null"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
            r"message 1: 'content' is list .* it must be text",
        ),
        (
            {"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            r"row 2, column 'prompt' ends with an assistant turn",
        ),
        ({"prompt": "\ud83d"}, r"row 2, column 'prompt' has half of a surrogate pair, '\\ud83d'"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_named_with_its_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_prompts(write_rows(tmp_path / "a.jsonl", [ROWS[0], row]))


# The held-out set


def split(path: str, seed: int = 0, **settings: Any) -> PromptSet:
    return split_prompts(PromptsConfig(path=path, **{"per_round": 10, "heldout": 20, **settings}), seed)


def test_train_and_heldout_partition_the_file(tmp_path: Path) -> None:
    prompts = split(write_rows(tmp_path / "a.jsonl", [*numbered(100), *numbered(5)]))
    assert (len(prompts.train), len(prompts.heldout)) == (80, 20)
    assert {p.content for p in prompts.train + prompts.heldout} == {f"question {i}" for i in range(100)}
    assert prompts.dropped == {"repeated": 5, "in_heldout": 0}


def test_the_heldout_set_depends_on_the_seed_and_not_on_the_order_of_the_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", numbered(100))
    backwards = write_rows(tmp_path / "b.jsonl", numbered(100)[::-1])
    assert split(path).heldout == split(backwards).heldout
    assert {p.id for p in split(path).heldout} != {p.id for p in split(path, seed=1).heldout}


def test_appending_prompts_never_moves_one_from_train_to_heldout(tmp_path: Path) -> None:
    before = split(write_rows(tmp_path / "a.jsonl", numbered(100)))
    after = split(write_rows(tmp_path / "b.jsonl", numbered(300)))
    assert not {p.id for p in before.train} & {p.id for p in after.heldout}


def test_the_same_question_under_another_id_is_not_trained_on_when_held_out(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i // 2}", "key": i} for i in range(100)]
    prompts = split(write_rows(tmp_path / "a.jsonl", rows), id_column="key")
    assert not {p.content for p in prompts.train} & {p.content for p in prompts.heldout}
    assert prompts.dropped["in_heldout"] == 100 - len(prompts.train) - 20 > 0


def test_all_of_a_heldout_file_is_kept_out_of_training_even_what_heldout_leaves_unused(tmp_path: Path) -> None:
    prompts = split(
        write_rows(tmp_path / "a.jsonl", numbered(100)),
        heldout_path=write_rows(tmp_path / "b.jsonl", numbered(50, start=90)),
    )
    assert [p.content for p in prompts.train] == [f"question {i}" for i in range(90)]
    assert len(prompts.heldout) == 20
    assert {int(str(p.content).split()[1]) for p in prompts.heldout} <= set(range(90, 140))
    assert prompts.dropped == {"repeated": 0, "in_heldout": 10}


def test_too_few_prompts_for_one_round_are_refused_with_the_counts(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", numbered(29))
    with pytest.raises(DataError, match=r"29 different prompts leave 9 to train on beside the 20 held out.* needs 10"):
        split(path)
    assert len(split(write_rows(tmp_path / "b.jsonl", numbered(30))).train) == 10


def test_a_pinned_heldout_set_stays_when_the_file_grows(tmp_path: Path) -> None:
    before = split(write_rows(tmp_path / "a.jsonl", numbered(100)))
    config = PromptsConfig(path=write_rows(tmp_path / "b.jsonl", numbered(300)), per_round=10, heldout=20)
    after = split_prompts(config, 0, pinned=before.heldout)
    assert after.heldout == before.heldout
    assert len(after.train) == 280


def test_prompts_of_another_file_are_not_mixed_with_those_that_a_run_holds_out(tmp_path: Path) -> None:
    before = split(write_rows(tmp_path / "a.jsonl", numbered(100)))
    other = write_rows(tmp_path / "b.jsonl", [{"prompt": f"another {i}"} for i in range(100)])
    config = PromptsConfig(path=other, per_round=10, heldout=20)
    with pytest.raises(DataError, match=r"b\.jsonl: none of the 20 prompts that this run holds out is in it"):
        split_prompts(config, 0, pinned=before.heldout)


# Rounds


def rounds_of(
    prompts: PromptSet, count: int, *, per_round: int, seed: int = 0, reuse: bool = False
) -> list[list[Prompt]]:
    used: Counter[str] = Counter()
    rounds: list[list[Prompt]] = []
    for t in range(1, count + 1):
        rounds.append(next_prompts(prompts, used, round=t, per_round=per_round, seed=seed, reuse=reuse))
        used.update(p.id for p in rounds[-1])
    return rounds


def test_prompts_added_between_rounds_join_without_repeating_any() -> None:
    small, large = prompt_set(20), prompt_set(60)
    [first] = rounds_of(small, 1, per_round=15)
    used = {p.id: 1 for p in first}
    second = next_prompts(large, used, round=2, per_round=45, seed=0, reuse=False)
    assert {p.id for p in first} | {p.id for p in second} == {p.id for p in large.train}


@given(count=st.integers(1, 40), per_round=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_rounds_share_no_prompt_and_lose_none(count: int, per_round: int, seed: int) -> None:
    prompts = prompt_set(count)
    rounds = rounds_of(prompts, count // per_round, per_round=per_round, seed=seed)
    ids = [p.id for prompts_of_round in rounds for p in prompts_of_round]
    assert len(ids) == len(set(ids)) == per_round * len(rounds)
    with pytest.raises(DataError, match=f"and {count % per_round} of {count} are left after {len(rounds)} rounds"):
        rounds_of(prompts, len(rounds) + 1, per_round=per_round, seed=seed)


@given(count=st.integers(1, 20), data=st.data())
def test_with_reuse_every_pass_has_each_prompt_once_and_no_round_has_one_twice(count: int, data: st.DataObject) -> None:
    per_round = data.draw(st.integers(1, count))
    prompts = prompt_set(count)
    rounds = rounds_of(prompts, 3 * count, per_round=per_round, seed=3, reuse=True)
    assert all(len({p.id for p in one}) == per_round for one in rounds)
    stream = [p.id for one in rounds for p in one]
    for start in range(0, len(stream) - count + 1, count):
        assert len(set(stream[start : start + count])) == count


def test_the_second_pass_has_another_order() -> None:
    first, second = rounds_of(prompt_set(50), 2, per_round=50, reuse=True)
    assert {p.id for p in first} == {p.id for p in second}
    assert first != second


def test_the_prompts_of_a_round_depend_on_the_seed() -> None:
    first, second = (rounds_of(prompt_set(50), 1, per_round=10, seed=s)[0] for s in (0, 1))
    assert first != second


def test_a_round_larger_than_the_file_is_refused_even_with_reuse() -> None:
    with pytest.raises(DataError, match="round 1 needs 11 prompts, and 10 of 10 are left"):
        rounds_of(prompt_set(10), 1, per_round=11, reuse=True)


# Lengths


def test_the_longest_prompt_that_does_not_fit_is_named_with_its_tokens() -> None:
    prompts = prompt_set(3).train
    check_lengths(prompts, [5, 10, 10], 10)
    with pytest.raises(DataError, match=r"prompt 'p1' has 12 tokens, and 10 fit \(2 of 3 prompts are too long\)"):
        check_lengths(prompts, [11, 12, 10], 10)
