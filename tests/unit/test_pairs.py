"""Pairs on disk: what `datasets` and our own trainer read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from iterdpo.collate import TokenPair
from iterdpo.pairs import read_token_pairs, write_pairs
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
    assert read_token_pairs(tmp_path / "train.parquet") == [
        TokenPair([1, 2, n], [300 + n, 7, 2], [400 + n]) for n in (5, 3, 4)
    ]
    assert read_token_pairs(tmp_path / "heldout.parquet") == [TokenPair([1, 2, 9], [309, 7, 2], [409])]


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
