from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterdpo.config import PromptsConfig
from iterdpo.data import prompts as module
from iterdpo.data import rows as rows_module
from iterdpo.data.prompts import (
    PromptFile,
    PromptSet,
    RoundPrompts,
    check_lengths,
    next_prompts,
    place_of,
    read_prompts,
    split_prompts,
)
from iterdpo.errors import DamagedError, DataError
from iterdpo.run.rundir import RunDir, digest, read_jsonl
from iterdpo.seeds import derive_seed
from iterdpo.types import Chat, Prompt
from tests.unit.data.test_rows import ROWS, numbered, write_rows


def prompt_set(count: int) -> PromptSet:
    prompts = PromptFile.of(Prompt(f"p{i}", f"question {i}") for i in range(count))
    return PromptSet(prompts, prompts[:0], {"repeated": 0, "in_heldout": 0}, count)


def load_prompts(*arguments: Any, **settings: Any) -> list[Prompt]:
    return list(read_prompts(*arguments, **settings)[0])


# Prompts


def test_other_columns_travel_with_the_prompt(tmp_path: Path) -> None:
    prompts = load_prompts(write_rows(tmp_path / "a.jsonl", ROWS))
    assert [(p.content, p.columns) for p in prompts] == [("2+2?", {"gold": "4"}), ("3+3?", {"gold": "6"})]


def test_a_value_that_json_cannot_hold_travels_as_text_and_nan_is_null(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["x"], "weight": [float("nan")], "at": pa.array([0], pa.timestamp("s")), "n": [7]})
    pq.write_table(table, tmp_path / "a.parquet")
    (prompt,) = load_prompts(str(tmp_path / "a.parquet"))
    assert prompt.columns == {"weight": None, "at": "1970-01-01 00:00:00", "n": 7}


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
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 2}]},
            r"message 1: 'content' has 2 parts; join their texts into one",
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
    assert {p.content for part in (prompts.train, prompts.heldout) for p in part} == {
        f"question {i}" for i in range(100)
    }
    assert prompts.dropped == {"repeated": 5, "in_heldout": 0}


def test_the_heldout_set_depends_on_the_seed_and_not_on_the_order_of_the_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", numbered(100))
    backwards = write_rows(tmp_path / "b.jsonl", numbered(100)[::-1])
    assert list(split(path).heldout) == list(split(backwards).heldout)
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


def test_a_limit_keeps_the_prompts_that_the_first_rounds_sample_anyway(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", numbered(100))
    few, all = split(path, limit=10), split(path)
    first = next_prompts(all, [], round=1, per_round=10, seed=0, reuse=False)
    assert {p.id for p in few.train} == {p.id for p in first}
    assert list(few.heldout) == list(all.heldout)
    assert few.summary() == "kept 10 of 100 prompts to train on (20 held out, 70 above prompts.limit)"
    assert list(next_prompts(few, [], round=1, per_round=10, seed=0, reuse=True)) == list(first)
    again = next_prompts(few, [first], round=2, per_round=10, seed=0, reuse=True)
    assert {p.id for p in again} == {p.id for p in first}
    with pytest.raises(ValueError, match=r"limit = 9: a round needs per_round = 10 prompts"):
        split(path, limit=9)


def test_too_few_prompts_for_one_round_are_refused_with_the_counts(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", numbered(29))
    with pytest.raises(DataError, match=r"29 different prompts leave 9 to train on after 20 are held out.* needs 10"):
        split(path)
    assert len(split(write_rows(tmp_path / "b.jsonl", numbered(30))).train) == 10


def test_a_pinned_heldout_set_stays_when_the_file_grows(tmp_path: Path) -> None:
    before = split(write_rows(tmp_path / "a.jsonl", numbered(100)))
    config = PromptsConfig(path=write_rows(tmp_path / "b.jsonl", numbered(300)), per_round=10, heldout=20)
    after = split_prompts(config, 0, pinned=before.heldout)
    assert list(after.heldout) == list(before.heldout)
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
    rounds: list[PromptFile] = []
    for t in range(1, count + 1):
        rounds.append(next_prompts(prompts, rounds, round=t, per_round=per_round, seed=seed, reuse=reuse))
    return [list(prompts) for prompts in rounds]


def test_prompts_added_between_rounds_join_without_repeating_any() -> None:
    small, large = prompt_set(20), prompt_set(60)
    [first] = rounds_of(small, 1, per_round=15)
    second = next_prompts(large, [PromptFile.of(first)], round=2, per_round=45, seed=0, reuse=False)
    assert {p.id for p in first} | {p.id for p in second} == {p.id for p in large.train}


@settings(deadline=None)  # files are written
@given(count=st.integers(1, 40), per_round=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_rounds_share_no_prompt_and_lose_none(count: int, per_round: int, seed: int) -> None:
    prompts = prompt_set(count)
    rounds = rounds_of(prompts, count // per_round, per_round=per_round, seed=seed)
    ids = [p.id for prompts_of_round in rounds for p in prompts_of_round]
    assert len(ids) == len(set(ids)) == per_round * len(rounds)
    with pytest.raises(DataError, match=f"but {count % per_round} of {count} are left after {len(rounds)} rounds"):
        rounds_of(prompts, len(rounds) + 1, per_round=per_round, seed=seed)


@settings(deadline=None)  # files are written
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
    with pytest.raises(DataError, match="round 1 needs 11 prompts, but 10 of 10 are left"):
        rounds_of(prompt_set(10), 1, per_round=11, reuse=True)


def test_retired_prompts_come_last_in_every_round() -> None:
    prompts = prompt_set(10)
    retired = prompts.train.ids[:4]
    one, two = (
        next_prompts(prompts, used, round=1, per_round=6, seed=0, reuse=True, retired=retired)
        for used in ([], [prompts.train[4:]])
    )
    assert set(one.ids) == set(two.ids) == set(prompts.train.ids[4:])
    more = next_prompts(prompts, [], round=1, per_round=8, seed=0, reuse=True, retired=retired)
    assert set(more.ids[:6]) == set(one.ids)
    assert len(set(more.ids)) == 8


# Lengths


def test_the_longest_prompt_that_does_not_fit_is_named_with_its_tokens() -> None:
    prompts, place = list(prompt_set(3).train), "a.jsonl: row 7"
    assert check_lengths(zip([5, 10, 10], prompts, strict=True), 10, place_of=str) == 10
    with pytest.raises(
        DataError, match=r"a.jsonl: row 7: prompt 'p1' has 12 tokens, but 10 fit \(2 of 3 prompts are too long\)"
    ):
        check_lengths(zip([11, 12, 10], prompts, strict=True), 10, place_of=lambda prompt: place)


# On disk


HOSTILE = [
    Prompt("7", 'one\ntwo\u2028three " \\ ü 🙂', {"gold": None, "n": 0.1, "long": 10**30}),
    Prompt('q"\n[', [{"role": "user", "content": "hi", "name": "Ann"}], {"b": [1, {"z": 1, "a": 2}], "a": "x"}),
    Prompt("p-3", "x" * 5_000),
]


def test_prompts_come_back_in_order_from_memory_from_a_file_and_as_slices(tmp_path: Path) -> None:
    prompts = PromptFile.of(HOSTILE)
    prompts.write(tmp_path / "prompts.jsonl")
    pinned = PromptFile.open(tmp_path / "prompts.jsonl")
    assert list(prompts) == list(pinned) == HOSTILE
    assert list(prompts[1:]) == list(pinned[1:]) == HOSTILE[1:]
    assert prompts.columns() == pinned.columns() == {"gold", "n", "long", "a", "b"}
    assert prompts[2:].columns() == pinned[2:].columns() == set()
    assert prompts.ids.tolist() == pinned.ids.tolist()
    assert prompts.contents.tolist() == pinned.contents.tolist()
    assert [p.name for p in tmp_path.glob("[!.]*")] == ["prompts.jsonl"]


def test_the_digest_is_that_of_ids_contents_and_columns_in_order() -> None:
    prompts = PromptFile.of(HOSTILE)
    expected = digest([[p.id, p.content, p.columns] for p in HOSTILE])
    assert prompts.digest() == expected != prompts[:2].digest()
    assert prompts[:0].digest() == digest([])


@settings(deadline=None)  # files are written
@given(count=st.integers(1, 3000), seed=st.integers(0, 2**32))
@pytest.mark.parametrize("chunk", [7, 1024])
def test_any_order_of_lines_is_read_in_that_order(chunk: int, count: int, seed: int) -> None:
    rows = np.random.default_rng(seed).permutation(3000)[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        assert [p.id for p in THREE_THOUSAND._among(rows)] == [f"p{n}" for n in rows]


THREE_THOUSAND = PromptFile.of(Prompt(f"p{n}", "x" * (n % 50)) for n in range(3000))


def kept_files(cache: Path) -> dict[str, int]:
    return {p.relative_to(cache).as_posix(): p.stat().st_mtime_ns for p in cache.rglob("*") if p.is_file()}


def test_large_files_that_have_not_changed_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "LARGE", 0)
    cache = tmp_path / "cache"
    path = write_rows(tmp_path / "a.jsonl", [*numbered(100), *numbered(5)])
    config = PromptsConfig(path=path, per_round=10, heldout=20)
    first, files = split_prompts(config, 0, cache=cache), kept_files(cache)
    with monkeypatch.context() as patched:
        patched.setattr(module, "located_rows", lambda *_: pytest.fail("it was read again"))
        again = split_prompts(config, 0, cache=cache)
    plain = split_prompts(config, 0)
    for each in (again, plain):
        assert (list(each.train), list(each.heldout)) == (list(first.train), list(first.heldout))
        assert (each.dropped, each.rows, each.train.columns()) == (first.dropped, first.rows, first.train.columns())
    assert kept_files(cache) == files

    write_rows(tmp_path / "a.jsonl", numbered(110))
    grown = split_prompts(config, 0, cache=cache)
    assert len(grown.train) == 90
    assert len(list(cache.iterdir())) == 1
    assert len(list(first.train)) == 80  # it is still open


def test_of_a_small_file_nothing_is_kept(tmp_path: Path) -> None:
    assert read_prompts(write_rows(tmp_path / "a.jsonl", numbered(9)), cache=tmp_path / "cache")[1] == 9
    assert not (tmp_path / "cache").exists()


def test_two_processes_that_read_the_same_file_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "LARGE", 0)
    path, cache = write_rows(tmp_path / "a.jsonl", numbered(9)), tmp_path / "cache"
    sync_tree = module.sync_tree

    def other_is_quicker(directory: Path) -> None:
        monkeypatch.setattr(module, "sync_tree", sync_tree)
        assert len(read_prompts(path, cache=cache)[0]) == 9
        sync_tree(directory)

    monkeypatch.setattr(module, "sync_tree", other_is_quicker)
    assert [p.content for p in read_prompts(path, cache=cache)[0]] == [f"question {i}" for i in range(9)]
    assert len(list(cache.iterdir())) == 1


def test_a_file_that_is_refused_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "LARGE", 0)
    path = write_rows(tmp_path / "a.jsonl", [*numbered(3), {"prompt": ""}])
    with pytest.raises(DataError, match="row 4, column 'prompt' is empty"):
        read_prompts(path, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# Against lists


def ordered(prompts: Sequence[Prompt], seed: int, *purpose: int | str) -> list[Prompt]:
    return sorted(prompts, key=lambda p: (derive_seed(seed, *purpose, p.id), p.id))


@settings(deadline=None)  # files are written
@given(
    texts=st.lists(st.integers(0, 30), min_size=12, max_size=60),
    extra=st.lists(st.integers(0, 40), max_size=20),
    ids=st.booleans(),
    own_heldout=st.booleans(),
    seed=st.integers(0, 3),
)
def test_the_choice_is_that_of_plain_lists(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[int],
    extra: list[int],
    ids: bool,
    own_heldout: bool,
    seed: int,
) -> None:
    root = tmp_path_factory.mktemp("prompts")
    rows = [{"prompt": f"q {n}", "key": f"k{i}"} for i, n in enumerate(texts)]
    more = [{"prompt": f"q {n}", "key": f"h{i}"} for i, n in enumerate([*extra, 50])]
    config = PromptsConfig(
        path=write_rows(root / "a.jsonl", rows),
        heldout_path=write_rows(root / "b.jsonl", more) if own_heldout else None,
        id_column="key" if ids else None,
        per_round=1,
        heldout=3,
    )

    def read(rows: list[dict[str, str]]) -> list[Prompt]:
        made = [Prompt(r["key"] if ids else f"p-{digest(r['prompt'])}", r["prompt"], {} if ids else r) for r in rows]
        return [p for n, p in enumerate(made) if p.id not in {earlier.id for earlier in made[:n]}]

    prompts = read(rows)
    pool = read(more) if own_heldout else prompts
    heldout = ordered(pool, seed, "heldout")[:3]
    apart = [*heldout, *pool] if own_heldout else heldout
    taken = {p.id for p in apart}, {p.content for p in apart}
    train = [p.id for p in prompts if p.id not in taken[0] and p.content not in taken[1]]
    if not train:
        with pytest.raises(DataError, match="leave 0 to train on"):
            split_prompts(config, seed)
        return
    found = split_prompts(config, seed)
    assert [p.id for p in found.heldout] == [p.id for p in heldout]
    assert [p.id for p in found.train] == train

    used: dict[str, int] = {}
    rounds: list[PromptFile] = []
    per_round = max(1, len(train) // 2)
    for t in range(1, 6):
        rounds.append(next_prompts(found, rounds, round=t, per_round=per_round, seed=seed, reuse=True))
        turns = {i: (used.get(i, 0), derive_seed(seed, "order", used.get(i, 0), i)) for i in train}
        expected = sorted(train, key=turns.__getitem__)[:per_round]
        assert [p.id for p in rounds[-1]] == expected
        used |= {i: used.get(i, 0) + 1 for i in expected}


def test_of_equal_seeds_the_id_decides_what_is_held_out_and_the_file_what_comes_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeds = lambda seed, *purpose, items: np.array([int(item[-1]) % 2 for item in items], np.uint32)  # noqa: E731
    monkeypatch.setattr(module, "derive_seeds", seeds)
    prompts = PromptFile.of(Prompt(i, f"question {i}") for i in ("d0", "a1", "c0", "b2", "e0"))
    assert [p.id for p in module._first(prompts, 3, 0, "heldout")] == ["b2", "c0", "d0"]
    whole = PromptSet(prompts, prompts[:0], {}, 5)
    order = next_prompts(whole, [], round=1, per_round=5, seed=0, reuse=False)
    assert [p.id for p in order] == ["d0", "c0", "b2", "e0", "a1"]


def test_what_was_kept_and_what_was_not_is_said(tmp_path: Path) -> None:
    prompts = split(write_rows(tmp_path / "a.jsonl", [*numbered(100), *numbered(5)]))
    assert prompts.summary() == "kept 80 of 105 prompts to train on (5 repeated, 20 held out)"
    assert prompt_set(3).summary() == "kept 3 of 3 prompts to train on"


@pytest.mark.parametrize(("kept", "most"), [(False, 36), (True, 16)])
def test_in_memory_are_few_bytes_of_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool, most: int
) -> None:
    monkeypatch.setattr("iterdpo.data.rows.LARGE", 0)
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Tale {i}"} for i in range(1000)])
    config = PromptsConfig(path=path, per_round=10, heldout=100)
    prompts = split_prompts(config, seed=0, cache=tmp_path / "cache" if kept else None)
    next_prompts(prompts, [], round=1, per_round=10, seed=0, reuse=False)
    lines = prompts.train._lines
    arrays = [lines.ends, *lines._seeds.values(), prompts.train._rows]
    held = [] if kept else [lines.index[name] for name in ("ids", "contents", "columns")]
    assert sum(array.nbytes for array in [*arrays, *held]) <= most * 1000
    assert isinstance(lines.index.arrays, dict) is not kept


class Run:
    """A prompt file and a run directory, which a run is opened over again and again."""

    def __init__(self, root: Path) -> None:
        self.root, self.file = root, root / "prompts.jsonl"
        self.write(range(30))

    def write(self, numbers: Any) -> None:
        rows = [{"prompt": f"Tale {i}", "topic": ["sea", "sky"][i % 2], "nested": {"number": i}} for i in numbers]
        self.file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def open(self, *, rounds: int = 2, seed: int = 0, **section: Any) -> RoundPrompts:
        config = PromptsConfig(**{"path": str(self.file), "per_round": 5, "heldout": 4, **section})
        return RoundPrompts(config, RunDir(self.root / "run"), rounds=rounds, seed=seed)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def ids(prompts: Any) -> list[str]:
    return [p.id for p in prompts]


def test_no_prompt_is_in_two_rounds_or_held_out_and_in_a_round(run: Run) -> None:
    prompts = run.open(rounds=3)
    parts = [prompts.heldout, *(prompts.of(t) for t in (1, 2, 3))]
    assert [len(part) for part in parts] == [4, 5, 5, 5]
    assert len({i for part in parts for i in ids(part)}) == 19
    assert set(ids(prompts.train)).isdisjoint(ids(prompts.heldout))
    assert len(prompts.train) == 26


def test_prompts_are_the_same_whatever_the_order_of_the_file_and_others_with_another_seed(run: Run) -> None:
    first = run.open()
    before = ids(first.heldout), ids(first.of(1)), ids(first.of(2))
    run.write(reversed(range(30)))
    again = run.open()
    assert (ids(again.heldout), ids(again.of(1)), ids(again.of(2))) == before
    other = run.open(seed=1)
    assert (ids(other.heldout), ids(other.of(1))) != before[:2]


def test_prompts_may_be_read_over_and_over_with_their_columns(run: Run) -> None:
    prompts = run.open().of(1)
    assert list(prompts) == list(prompts)
    assert prompts.columns() == {"topic", "nested"}
    assert all(str(p.columns["nested"]["number"]) in str(p.content) for p in prompts)


def test_a_digest_is_of_ids_contents_and_columns(run: Run) -> None:
    digest = run.open().of(1).digest()
    assert run.open().of(1).digest() == digest
    assert run.open().of(2).digest() != digest
    run.file.write_text(run.file.read_text().replace('"sky"', '"star"'))
    assert run.open().of(1).digest() != digest


def test_constructing_writes_nothing(run: Run) -> None:
    run.open()
    assert not (run.root / "run").exists()


def test_a_round_that_has_begun_keeps_its_prompts_if_the_file_grows(run: Run) -> None:
    first = run.open()
    first.pin(0)
    first.pin(1)
    heldout, begun, digest = list(first.heldout), list(first.of(1)), first.of(1).digest()
    run.write(range(60))
    again = run.open()
    assert (list(again.heldout), list(again.of(1)), again.of(1).digest()) == (heldout, begun, digest)
    assert set(ids(again.of(2))).isdisjoint(ids(begun) + ids(heldout))


def test_what_is_written_down_has_a_line_a_prompt(run: Run) -> None:
    prompts = run.open()
    prompts.pin(0)
    prompts.pin(1)
    for part, name in ((prompts.heldout, "heldout.jsonl"), (prompts.of(1), "round-001/prompts.jsonl")):
        rows = read_jsonl(run.root / "run" / name)
        assert all(str(p.content) in json.dumps(row) for p, row in zip(part, rows, strict=True))


def test_pinning_changes_neither_prompts_nor_digest(run: Run) -> None:
    prompts = run.open()
    before = list(prompts.of(1)), prompts.of(1).digest(), list(prompts.of(2))
    prompts.pin(1)
    assert (list(prompts.of(1)), prompts.of(1).digest(), list(prompts.of(2))) == before


def test_another_number_is_chosen_anew(run: Run) -> None:
    run.open().pin(1)
    assert len(run.open(per_round=6).of(1)) == 6


def test_too_few_prompts_for_all_rounds_are_refused_at_once_unless_they_are_used_again(run: Run) -> None:
    with pytest.raises(DataError, match=r"round 6 needs 5 prompts, but 1 of 26 are left after 5 rounds"):
        run.open(rounds=6)
    reused = run.open(rounds=6, reuse=True)
    assert len(reused.of(6)) == 5
    assert len({i for t in range(1, 7) for i in ids(reused.of(t))}) == 26


def test_a_file_without_any_of_the_heldout_prompts_is_refused(run: Run) -> None:
    run.open().pin(0)
    run.write(range(100, 130))
    with pytest.raises(DataError, match="none of the 4 prompts that this run holds out is in it"):
        run.open()


# Chats

USER = {"role": "user", "content": "Rain in Oslo?"}
TOOL = {"type": "function", "function": {"name": "rain_in", "parameters": {"type": "object", "a": None}}}
CHAT = Chat(
    [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "z", "arguments": {"b": 1, "a": 2}}]}, USER],
    {"tools": [TOOL], "enable_thinking": False},
)


def test_a_chat_keeps_its_settings_and_the_order_of_its_keys_on_disk(tmp_path: Path) -> None:
    prompts = [Prompt("1", CHAT, {"b": 1, "a": 2}), Prompt("2", list(CHAT)), Prompt("3", [USER])]
    PromptFile.of(prompts).write(tmp_path / "prompts.jsonl")
    for found in (PromptFile.of(prompts), PromptFile.open(tmp_path / "prompts.jsonl")):
        first, second, third = [prompt.content for prompt in found]
        assert isinstance(first, Chat)
        assert json.dumps([first, first.settings]) == json.dumps([CHAT, CHAT.settings])
        assert json.dumps(second) == json.dumps(CHAT)
        assert third == [USER]


def test_prompts_that_differ_in_their_tools_alone_are_two(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "a.jsonl", [{"prompt": [USER], "tools": [TOOL]}, {"prompt": [USER]}, {"prompt": [USER]}]
    )
    prompts, rows = read_prompts(path)
    assert (len(prompts), rows) == (2, 3)
    first, second = prompts
    assert isinstance(first.content, Chat)
    assert first.content.settings == {"tools": [TOOL]}
    assert not isinstance(second.content, Chat)


def test_messages_are_the_prompt_if_there_is_no_column_of_that_name(tmp_path: Path) -> None:
    (prompt,) = read_prompts(write_rows(tmp_path / "a.jsonl", [{"messages": [USER], "system": "Be brief."}]))[0]
    assert prompt.content == [{"role": "system", "content": "Be brief."}, USER]


@pytest.mark.parametrize("column", ["system", "tools", "chat_template_kwargs", "image"])
def test_a_column_that_would_be_dropped_from_a_prompt_of_text_is_refused(tmp_path: Path, column: str) -> None:
    values = {"system": "Be brief.", "tools": [TOOL], "chat_template_kwargs": {"a": 1}, "image": "a.png"}
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "x"}, {"prompt": "y", column: values[column]}])
    with pytest.raises(DataError, match=rf"a\.jsonl: row 2 has the column '{column}'"):
        read_prompts(path)


@pytest.mark.parametrize("id_column", [None, "id"])
def test_the_place_of_a_prompt_is_found_again(tmp_path: Path, id_column: str | None) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"question {i}"}], "id": f"q{i}"} for i in range(5)]
    config = PromptsConfig(
        path=write_rows(tmp_path / "a.jsonl", rows[:3]),
        heldout_path=write_rows(tmp_path / "b.csv", [{"prompt": "x", "id": "q7"}, {"prompt": "y", "id": "q8"}]),
        id_column=id_column,
    )
    for path, number, place in ((config.path, 1, "a.jsonl: row 2"), (config.heldout_path, 1, "b.csv: row 2 (line 3)")):
        prompt = list(read_prompts(str(path), id_column=id_column)[0])[number]
        assert place_of(prompt, config) == f"{tmp_path}/{place}"
    assert place_of(Prompt("gone", "z"), config) == f"{config.path}: prompt 'gone'"


def test_the_place_of_a_prompt_with_tools_is_not_that_of_the_same_messages(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "Rain in Oslo?"}]}
    config = PromptsConfig(path=write_rows(tmp_path / "a.jsonl", [row, {**row, "tools": [TOOL]}]))
    prompts = list(read_prompts(str(config.path))[0])
    assert [place_of(prompt, config) for prompt in prompts] == [f"{config.path}: row 1", f"{config.path}: row 2"]


# Token ids


def render(prompts: list[Prompt]) -> list[list[int]]:
    return [list(str(prompt.content).encode()) for prompt in prompts]


def never(prompts: list[Prompt]) -> list[list[int]]:
    raise AssertionError("rendered again")


def test_token_ids_are_those_that_were_rendered_first(run: Run) -> None:
    prompts = run.open()
    for round in (0, 1):
        prompts.pin(round)
        first = list(prompts.pinned_ids(round, render, stamp="a"))
        assert first == render(list(prompts.of(1) if round else prompts.heldout))
        assert list(run.open().pinned_ids(round, never, stamp="a")) == first
    assert {p.name for p in (run.root / "run").rglob("*.parquet")} == {"heldout.ids.parquet", "prompts.ids.parquet"}


@pytest.mark.parametrize("what", ["stamp", "prompts"])
def test_token_ids_of_something_else_are_rendered_again(run: Run, what: str) -> None:
    prompts = run.open()
    list(prompts.pinned_ids(1, render, stamp="a"))
    if what == "prompts":
        prompts = run.open(seed=1)
    found = list(prompts.pinned_ids(1, render, stamp="b" if what == "stamp" else "a"))
    assert found == render(list(prompts.of(1)))


def test_token_ids_that_are_damaged_are_named(run: Run) -> None:
    prompts = run.open()
    list(prompts.pinned_ids(1, render, stamp="a"))
    file = run.root / "run" / "round-001" / "prompts.ids.parquet"
    file.write_bytes(b"PAR1")
    with pytest.raises(DamagedError, match=r"prompts\.ids\.parquet: damaged: .* the prompts are rendered again"):
        list(prompts.pinned_ids(1, render, stamp="a"))
