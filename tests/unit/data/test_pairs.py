"""Pairs on disk: what `datasets` and our own trainer read back."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iterdpo.data import pairs
from iterdpo.data.pairs import ABSENT, TokenPair, TokenPairs, drawn_rows, pairs_table, write_pairs, write_tables
from iterdpo.types import Completion, Message, PreferencePair, Prompt

PLAIN = "Once upon a time"
CHAT: list[Message] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]


def pair(content: str | list[Message], number: int, *, scored: bool = True) -> PreferencePair:
    return PreferencePair(
        Prompt(f"p-{number}", content, {"gold": "4"}),
        [1, 2, number],
        Completion(" chosen\n\u2028 ü", [300 + number, 7, 2], [-0.5, -1.5, -2.0], "stop"),
        Completion(" rejected", [400 + number], [-3.0], "length"),
        0.75 if scored else None,
        -0.25 if scored else None,
    )


def load(directory: Path, cache: Path) -> Any:
    import datasets

    (directory / "MANIFEST.json").write_text(json.dumps({"step": "round-001/pairs"}))  # lies beside the data in a run
    return datasets.load_dataset(str(directory), cache_dir=str(cache))


@pytest.mark.parametrize("content", [PLAIN, CHAT], ids=["plain", "conversational"])
def test_written_pairs_open_with_load_dataset_in_trls_preference_format(
    tmp_path: Path, content: str | list[Message]
) -> None:
    directory = tmp_path / "pairs"
    directory.mkdir()
    write_pairs(directory, [pair(content, 0), pair(content, 1)], heldout=[pair(content, 2)], summary="kept 3")
    data = load(directory, tmp_path / "cache")

    assert {split: len(rows) for split, rows in data.items()} == {"train": 2, "test": 1}
    row = data["train"][1]

    def completion(text: str) -> str | list[Message]:
        return text if content == PLAIN else [{"role": "assistant", "content": text}]

    assert row == {
        "prompt": content,
        "chosen": completion(" chosen\n\u2028 ü"),
        "rejected": completion(" rejected"),
        "prompt_id": "p-1",
        "chosen_score": 0.75,
        "rejected_score": -0.25,
        "chosen_finish_reason": "stop",
        "rejected_finish_reason": "length",
        "chosen_sampler_logp": -4.0,
        "rejected_sampler_logp": -3.0,
        "prompt_token_ids": [1, 2, 1],
        "chosen_token_ids": [301, 7, 2],
        "rejected_token_ids": [401],
    }


def test_pairs_without_scores_open_too(tmp_path: Path) -> None:
    directory = tmp_path / "pairs"
    directory.mkdir()
    write_pairs(directory, [pair(PLAIN, 0, scored=False)], heldout=[pair(PLAIN, 1, scored=False)], summary="kept 2")
    data = load(directory, tmp_path / "cache")
    assert data["train"][0]["chosen_score"] is None
    assert data["test"][0]["prompt_token_ids"] == [1, 2, 1]


def test_the_trainer_reads_back_the_very_token_ids_that_were_sampled_in_order(tmp_path: Path) -> None:
    pairs = [pair(PLAIN, n) for n in (5, 3, 4)]
    write_pairs(tmp_path, pairs, heldout=[pair(PLAIN, 9)], summary="")
    assert list(TokenPairs(tmp_path / "train.parquet", tmp_path)) == [
        TokenPair([1, 2, n], [300 + n, 7, 2], [400 + n]) for n in (5, 3, 4)
    ]
    assert list(TokenPairs(tmp_path / "heldout.parquet", tmp_path)) == [TokenPair([1, 2, 9], [309, 7, 2], [409])]


def test_without_heldout_pairs_there_is_no_such_file_and_the_card_says_what_was_kept(tmp_path: Path) -> None:
    write_pairs(tmp_path, [pair(PLAIN, 0)], summary="kept 1 pairs of 2 groups (1 tied)")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "train.parquet"]
    card = (tmp_path / "README.md").read_text()
    assert "kept 1 pairs of 2 groups (1 tied)" in card
    assert "heldout" not in card


def test_equal_pairs_are_equal_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_pairs(tmp_path / name, [pair(CHAT, n) for n in range(3)], summary="kept 3")
    assert (tmp_path / "one" / "train.parquet").read_bytes() == (tmp_path / "two" / "train.parquet").read_bytes()


def test_pairs_of_a_stream_are_written_a_thousand_at_a_time(tmp_path: Path) -> None:
    taken = 0

    def stream() -> Iterator[PreferencePair]:
        nonlocal taken
        for n in range(2500):
            taken += 1
            yield pair(PLAIN, n)

    write_pairs(tmp_path, stream(), summary=lambda: f"kept {taken}")
    with pq.ParquetFile(tmp_path / "train.parquet") as file:
        assert [file.metadata.row_group(n).num_rows for n in range(3)] == [1000, 1000, 500]
        assert file.read() == pairs_table([pair(PLAIN, n) for n in range(2500)])
    assert "kept 2500" in (tmp_path / "README.md").read_text()


def test_a_thousand_pairs_or_fewer_are_the_bytes_of_one_table(tmp_path: Path) -> None:
    pairs = [pair(CHAT, n) for n in range(1000)]
    write_pairs(tmp_path, iter(pairs), summary="")
    pq.write_table(pairs_table(pairs), tmp_path / "one.parquet")
    assert (tmp_path / "train.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()


def test_token_ids_are_lists_of_32_bit_integers(tmp_path: Path) -> None:
    write_pairs(tmp_path, [pair(PLAIN, 0)], summary="")
    schema = pq.read_schema(tmp_path / "train.parquet")
    for column in ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids"):
        assert schema.field(column).type == pa.list_(pa.int32())


# Random access


def write_random(path: Path, count: int, *, unpaired: bool = False) -> list[TokenPair]:
    rng = random.Random(count)

    def ids() -> list[int]:
        return [rng.randrange(50_000) for _ in range(rng.randint(1, 30))]

    written = []
    for _ in range(count):
        number = rng.randrange(count)
        chosen, rejected = (Completion("y", ids(), [], "stop") for _ in range(2))
        if unpaired:
            chosen, rejected = rng.choice([(chosen, ABSENT), (ABSENT, rejected)])
        written.append(PreferencePair(Prompt(f"p-{number}", "x"), [number, *ids()], chosen, rejected))
    kind: pairs.Kind = "unpaired" if unpaired else "pairs"
    write_tables(path, [pairs_table(written[begin : begin + 700], kind) for begin in range(0, count, 700)])
    return [TokenPair(p.prompt_ids, p.chosen.token_ids, p.rejected.token_ids) for p in written]


@pytest.mark.parametrize("unpaired", [False, True], ids=["paired", "unpaired"])
@pytest.mark.parametrize("in_memory", [True, False], ids=["in memory", "mapped"])
def test_pairs_of_tokens_are_read_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool, unpaired: bool
) -> None:
    monkeypatch.setattr(pairs, "IN_MEMORY", 1 << 30 if in_memory else 0)
    path, cache = tmp_path / "train.parquet", tmp_path / "cache"
    written = write_random(path, 3000, unpaired=unpaired)
    read = TokenPairs(path, cache)
    assert cache.exists() != in_memory
    assert len(read) == 3000
    assert [read[i] for i in (2999, 0, 1500, 699, 700)] == [written[i] for i in (2999, 0, 1500, 699, 700)]
    assert list(read) == written

    numbers: dict[int, int] = {}  # a prompt's first token is its number
    assert read.groups.dtype == np.int64
    assert read.groups.tolist() == [numbers.setdefault(p.prompt[0], len(numbers)) for p in written]


def test_the_mapped_copy_is_made_once_and_again_where_the_file_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "IN_MEMORY", 0)
    path, cache = tmp_path / "train.parquet", tmp_path / "cache"
    write_random(path, 10)
    flattened = []
    flatten = pairs._flatten
    monkeypatch.setattr(pairs, "_flatten", lambda *arguments: flattened.append(1) or flatten(*arguments))
    before = [list(TokenPairs(path, cache)) for _ in range(3)]
    assert before[0] == before[1] == before[2]
    assert flattened == [1]

    written = write_random(path, 11)
    assert list(TokenPairs(path, cache)) == written
    assert flattened == [1, 1]
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 1  # the old copy is gone


def test_a_mapped_pair_is_read_without_the_file_that_it_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "IN_MEMORY", 0)
    path = tmp_path / "train.parquet"
    written = write_random(path, 2000)
    read = TokenPairs(path, tmp_path)
    path.unlink()  # a row group would have to be decoded for each pair
    order = random.Random(0).sample(range(2000), 2000)
    assert [read[i] for i in order] == [written[i] for i in order]


def test_drawn_rows_come_from_the_first_rows_of_each_file_without_the_samplers_logps(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one.parquet", "two.parquet")]
    for number, path in enumerate(paths):
        write_tables(path, [pairs_table([pair(f"Tale {number}", 10 * number + k) for k in range(4)])])
    everything = pa.concat_tables(drawn_rows(paths, [3, 4], 100, seed=0))
    assert everything["chosen_token_ids"].to_pylist() == [
        row
        for path, count in zip(paths, (3, 4), strict=True)
        for row in pq.read_table(path)["chosen_token_ids"].to_pylist()[:count]
    ]
    assert everything["chosen_sampler_logp"].null_count == everything["rejected_sampler_logp"].null_count == 7
    assert everything.schema == pq.read_schema(paths[0])
    some = [sum(map(len, drawn_rows(paths, [3, 4], 2, seed=seed))) for seed in range(5)]
    assert some == [2] * 5
    ids = {
        tuple(t["chosen_token_ids"].to_pylist()[0])
        for seed in range(40)
        for t in drawn_rows(paths, [3, 4], 1, seed=seed)
    }
    assert len(ids) == 7
