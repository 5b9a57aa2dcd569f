"""Pairs on disk: what `datasets` and our own trainer read back."""

from __future__ import annotations

import gzip
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iterdpo.config import OfflineConfig, parse_config
from iterdpo.data import pairs, preferences
from iterdpo.data.pairs import ABSENT, TokenPairs, pairs_table, write_pairs, write_tables
from iterdpo.errors import DataError, StaleStepError
from iterdpo.run.rundir import Manifest
from iterdpo.stages import offline
from iterdpo.stages.offline import describe_counts, prepare_pairs
from iterdpo.stages.runs import OfflineRun
from iterdpo.training.collate import TokenPair
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

    for lengths, side in (
        (read.prompt_tokens, "prompt"),
        (read.chosen_tokens, "chosen"),
        (read.rejected_tokens, "rejected"),
    ):
        assert lengths.dtype == np.int32
        assert lengths.tolist() == [len(getattr(p, side)) for p in written]

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


def test_reading_a_mapped_pair_takes_well_under_a_millisecond(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "IN_MEMORY", 0)
    write_random(tmp_path / "train.parquet", 5000)
    read = TokenPairs(tmp_path / "train.parquet", tmp_path)
    order = random.Random(0).sample(range(5000), 2000)
    start = time.perf_counter()
    for i in order:
        read[i]
    assert (time.perf_counter() - start) / 2000 < 0.5e-3


# The step of an offline round

PAIRED = [{"prompt": f"Tale {i}", "chosen": f" of sea {i * 7}", "rejected": f" sky {i}"} for i in range(40)]


class Offline:
    """An offline round's configuration over a file of rows, and its first step."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model, self.data = root, model, root / "data.jsonl"

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def prepare(self, name: str = "run", *, processes: int | None = None, redo: bool = False, **data: Any) -> Manifest:
        config = parse_config(
            OfflineConfig,
            {
                "run_dir": str(self.root / name),
                "model": {"path": str(self.model)},
                "data": {"path": str(self.data), **data},
            },
        )
        return prepare_pairs(config, OfflineRun(config, redo=redo), processes=processes)

    def files(self, name: str = "run") -> dict[str, bytes]:
        step = self.root / name / "round-001" / "pairs"
        return {p.name: p.read_bytes() for p in step.iterdir() if p.name != "MANIFEST.json"}


@pytest.fixture
def step(tmp_path: Path, tiny_model: Path) -> Offline:
    step = Offline(tmp_path, tiny_model)
    step.write(PAIRED)
    return step


def read_back(step: Offline, name: str = "train") -> list[dict[str, Any]]:
    return pq.read_table(step.root / "run" / "round-001" / "pairs" / f"{name}.parquet").to_pylist()


def test_what_was_kept_truncated_and_left_out_is_in_the_manifest(step: Offline) -> None:
    step.write(
        [
            *PAIRED,
            {"prompt": "x", "chosen": " y", "rejected": " y"},
            {"prompt": "Tell me", "chosen": " a long tale", "rejected": " a long talk"},
            {"prompt": "Tell me of a thing", "chosen": " no", "rejected": " yes"},
        ]
    )
    counts = step.prepare(max_prompt_tokens=8, max_completion_tokens=11, heldout=5).counts
    assert counts == {
        "kind": "pairs",
        "pairs": 41,
        "kept": 36,
        "heldout": 5,
        "prompts_truncated": 1,
        # " of sea 273" and the end token are 12 tokens, " of sea 98" and the end token 11: 15 to 39 are truncated
        "completions_truncated": 25,
        "summary": "kept 41 of 43 pairs (1 have identical completions, 1 have identical completions after truncation)",
        "left_out": {
            "have identical completions": {"count": 1, "rows": [41]},
            "have identical completions after truncation": {"count": 1, "rows": [42]},
        },
    }
    assert describe_counts(counts) == (
        f"{counts['summary']}; 36 to train on, 5 held out; 1 prompts and 25 completions truncated"
    )
    assert counts["summary"] in step.files()["README.md"].decode()


def test_the_heldout_rows_are_chosen_by_the_seed_and_the_others_trained_on_in_order(step: Offline) -> None:
    manifest = step.prepare(heldout=7)
    assert (manifest.counts["kept"], manifest.counts["heldout"]) == (33, 7)
    train, held = read_back(step), read_back(step, "heldout")
    assert sorted(row["prompt"] for row in train + held) == sorted(row["prompt"] for row in PAIRED)
    for part in (train, held):
        assert [row["prompt"] for row in part] == [
            r["prompt"] for r in PAIRED if r["prompt"] in {x["prompt"] for x in part}
        ]
    assert step.prepare("again", heldout=7).digest == manifest.digest
    assert set(step.files()) == {"train.parquet", "heldout.parquet", "README.md"}


def test_without_heldout_rows_there_is_one_file(step: Offline) -> None:
    step.prepare()
    assert set(step.files()) == {"train.parquet", "README.md"}
    assert [row["prompt"] for row in read_back(step)] == [row["prompt"] for row in PAIRED]


@pytest.mark.parametrize("heldout", [40, 41])
def test_more_heldout_rows_than_there_are_is_refused(step: Offline, heldout: int) -> None:
    with pytest.raises(DataError, match=rf"40 pairs, and data\.heldout keeps {heldout} of them from training"):
        step.prepare(heldout=heldout)


def test_one_and_two_processes_write_the_same_bytes(step: Offline) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": f"Tale {i}"}], "chosen": f"of sea {i * 7}", "rejected": f"sky {i}"}
        for i in range(3500)
    ]
    rows[1200]["chosen"] = rows[1200]["rejected"]
    rows[3300]["chosen"] = " "
    step.write(rows)
    one, two = (step.prepare(f"run-{n}", processes=n, heldout=50) for n in (1, 2))
    assert one.counts == two.counts
    assert one.counts["left_out"] == {
        "have identical completions": {"count": 1, "rows": [1201]},
        "have an empty completion": {"count": 1, "rows": [3301]},
    }
    assert step.files("run-1") == step.files("run-2")


def test_an_error_in_another_process_still_names_file_and_row(step: Offline) -> None:
    rows = [PAIRED[0]] * 3500
    step.write([*rows[:2345], {"prompt": "x", "chosen": 4, "rejected": "y"}, *rows[2346:]])
    with pytest.raises(DataError, match=r"data\.jsonl: row 2346, column 'chosen' is int '4'; it must be text"):
        step.prepare(processes=2)


def test_a_second_start_reads_no_row_and_loads_no_tokenizer(step: Offline, monkeypatch: pytest.MonkeyPatch) -> None:
    first = step.prepare(limit=20)
    assert first.counts["kept"] == 20

    def never(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("called on a second start")

    monkeypatch.setattr(offline, "load_tokenizer", never)
    monkeypatch.setattr(preferences, "load_rows", never)
    assert step.prepare(limit=20) == first
    step.data.rename(step.data.with_name("moved.jsonl"))
    step.data = step.data.with_name("moved.jsonl")
    assert step.prepare(limit=20) == first  # the content is the same


def test_other_data_or_settings_are_noticed(step: Offline) -> None:
    first = step.prepare()
    with pytest.raises(StaleStepError, match=r"data\.max_prompt_tokens = 1024, and data\.max_prompt_tokens = 6"):
        step.prepare(max_prompt_tokens=6)
    with pytest.raises(StaleStepError, match=r"data\.limit"):
        step.prepare(limit=20)
    step.write(PAIRED[::-1])
    with pytest.raises(StaleStepError, match=r"data\.content"):
        step.prepare()
    assert step.prepare(redo=True).digest != first.digest


def test_data_that_were_refused_can_be_mended_and_given_again(step: Offline) -> None:
    step.write([*PAIRED, {"prompt": "x", "chosen": 4, "rejected": "y"}])
    with pytest.raises(DataError, match="row 41"):
        step.prepare()
    step.write(PAIRED)
    assert step.prepare(max_prompt_tokens=6).counts["kept"] == 40


def test_a_hub_data_set_is_known_by_its_fingerprint(step: Offline, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    tables = {"fingerprint": datasets.Dataset.from_list(PAIRED)}
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda path, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: tables["fingerprint"])
    first = step.prepare(path="someone/tales")
    assert first.counts["kept"] == 40
    assert step.prepare(path="someone/tales") == first
    tables["fingerprint"] = datasets.Dataset.from_list(PAIRED[:30])
    with pytest.raises(StaleStepError, match=r"data\.content"):
        step.prepare(path="someone/tales")


def test_unpaired_examples_are_in_trls_columns_beside_their_token_ids(step: Offline) -> None:
    rows = [
        {"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"}
        for r in PAIRED
        for side in ("chosen", "rejected")
    ]
    step.data = step.data.with_name("data.jsonl.gz")
    step.data.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    counts = step.prepare(heldout=10).counts
    assert (counts["kind"], counts["kept"], counts["heldout"]) == ("unpaired", 70, 10)
    assert counts["summary"] == "kept 80 of 80 examples"

    found = load(step.root / "run" / "round-001" / "pairs", step.root / "cache")
    assert {split: len(part) for split, part in found.items()} == {"train": 70, "test": 10}
    assert found["train"].column_names == [
        "prompt",
        "completion",
        "label",
        "prompt_id",
        "finish_reason",
        "prompt_token_ids",
        "chosen_token_ids",
        "rejected_token_ids",
    ]
    for row in found["train"]:
        assert {k: row[k] for k in ("prompt", "completion", "label")} in rows
        present, absent = ("chosen", "rejected") if row["label"] else ("rejected", "chosen")
        assert len(row[f"{present}_token_ids"]) == len(row["completion"]) + 1  # a token a byte, and the end token
        assert row[f"{absent}_token_ids"] == []
    read = TokenPairs(step.root / "run" / "round-001" / "pairs" / "train.parquet", step.root)
    assert ((read.chosen_tokens > 0) == np.array(found["train"]["label"])).all()
    assert ((read.rejected_tokens > 0) != (read.chosen_tokens > 0)).all()
