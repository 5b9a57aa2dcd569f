"""The one offline round: its pairs, token ids of any size of data; and training on them, with no process started."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from iterdpo.config import OfflineConfig, parse_config
from iterdpo.data.pairs import TokenPairs
from iterdpo.errors import ConfigError, DataError, StaleStepError
from iterdpo.report.metrics import round_metrics
from iterdpo.report.page import write_report
from iterdpo.run.progress import Progress
from iterdpo.run.rundir import Manifest, RunDir, write_jsonl
from iterdpo.stages.offline import describe_counts, prepare_pairs, train_round
from iterdpo.stages.runs import OfflineRun
from iterdpo.testing import build_tiny_checkpoint
from iterdpo.training.launch import TRAIN_LOG, TrainSpec

PAIRED = [{"prompt": f"Tale {i}", "chosen": f" of sea {i * 7}", "rejected": f" sky {i}"} for i in range(40)]


class Offline:
    """An offline round's configuration over a file of rows, and its first step."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model, self.data = root, model, root / "data.jsonl"

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(self, name: str = "run", *, loss: str = "sigmoid", **data: Any) -> OfflineConfig:
        return parse_config(
            OfflineConfig,
            {
                "run_dir": str(self.root / name),
                "model": {"path": str(self.model)},
                "data": {"path": str(self.data), **data},
                "dpo": {"loss": loss},
            },
        )

    def prepare(self, name: str = "run", *, processes: int | None = None, redo: bool = False, **data: Any) -> Manifest:
        config = self.config(name, **data)
        run = OfflineRun(config, redo=redo)
        with run.dir.lock():
            return prepare_pairs(config, run, processes=processes)

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


def test_bad_rows_end_the_round_or_are_left_out_and_counted_in_its_metrics_and_report(step: Offline) -> None:
    empty = {"prompt": "", "chosen": "a", "rejected": "b"}
    step.write(
        [*PAIRED, empty, {"prompt": "x", "chosen": " y", "rejected": " y"}, {**empty, "prompt": "a", "chosen": 4}]
    )
    with pytest.raises(DataError, match="2 of 43 rows cannot be used"):
        step.prepare()
    manifest = step.prepare(bad_rows="skip")
    assert manifest.inputs["data"]["bad_rows"] == "skip"
    reasons = {
        "have an empty prompt": 1,
        "have identical completions": 1,
        "have a prompt or completion that is neither text nor messages": 1,
    }
    assert {reason: entry["count"] for reason, entry in manifest.counts["left_out"].items()} == reasons
    assert manifest.counts["summary"].startswith("kept 40 of 43 pairs (1 have an empty prompt, ")
    run = RunDir(step.root / "run")
    metrics = round_metrics(run, 1)
    assert (metrics["pairs/left_out"], metrics["prompts/left_out"]) == (3, None)
    assert {name: metrics[f"pairs/left_out/{name}"] for name in reasons} == reasons
    run.write_config(step.config(bad_rows="skip").model_dump())
    page = write_report(run.root).read_text()
    assert all(f">{count} {reason}</li>" in page for reason, count in reasons.items())


def test_a_round_that_refuses_bad_rows_has_the_key_of_rounds_from_before_there_was_a_choice(step: Offline) -> None:
    assert "bad_rows" not in step.prepare().inputs["data"]


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
    with pytest.raises(DataError, match=rf"40 pairs, but data\.heldout keeps {heldout} of them out of training"):
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

    monkeypatch.setattr("iterdpo.stages.runs.load_tokenizer", never)
    monkeypatch.setattr("iterdpo.data.preferences.located_rows", never)
    assert step.prepare(limit=20) == first
    step.data.rename(step.data.with_name("moved.jsonl"))
    step.data = step.data.with_name("moved.jsonl")
    assert step.prepare(limit=20) == first  # the content is the same


def test_other_data_or_settings_are_noticed(step: Offline) -> None:
    first = step.prepare()
    with pytest.raises(StaleStepError, match=r"data\.max_prompt_tokens = 1024, but now data\.max_prompt_tokens = 6"):
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
    import datasets

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

    found = datasets.load_dataset(str(step.root / "run" / "round-001" / "pairs"), cache_dir=str(step.root / "cache"))
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
    assert [bool(pair.chosen) for pair in read] == found["train"]["label"]
    assert all(bool(pair.rejected) != bool(pair.chosen) for pair in read)


# The round


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TrainSpec]:
    """What the trainer's process would be told; a checkpoint and its log are there as soon as it is."""
    told: list[TrainSpec] = []

    def launch(spec: TrainSpec, **_: Any) -> None:
        told.append(spec)
        build_tiny_checkpoint(spec.output)
        write_jsonl(spec.output / TRAIN_LOG, [{"step": 1, "loss": 0.5}])

    monkeypatch.setattr("iterdpo.stages.train.launch_training", launch)
    return told


def test_a_round_trains_on_the_pairs_and_promotes_what_it_trained_once(step: Offline, trained: list[TrainSpec]) -> None:
    config, screen = step.config(heldout=4), io.StringIO()
    assert train_round(config, progress=Progress(screen))
    assert "kept 40 of 40 pairs; 36 to train on, 4 held out" in screen.getvalue()
    place, (spec,) = step.root / "run" / "round-001", trained
    assert (spec.pairs, spec.eval_pairs) == (place / "pairs" / "train.parquet", place / "pairs" / "heldout.parquet")
    assert (spec.policy, spec.reference) == (step.model, None)

    record = RunDir(step.root / "run").record(1)
    assert record is not None
    assert (record.decision, record.policy, record.policy_round) == ("promote", "round-001/policy", 1)
    assert (record.metrics["loss"], record.metrics["pairs/kept"]) == (0.5, 36)

    assert not train_round(config, progress=Progress())
    assert len(trained) == 1


def test_unpaired_data_need_a_loss_that_does_not_compare(step: Offline, trained: list[TrainSpec]) -> None:
    step.write([{"prompt": f"Tale {i}", "completion": " of sea", "label": i % 2 == 0} for i in range(8)])
    with pytest.raises(
        ConfigError,
        match=r"unpaired data, but dpo\.loss = 'sigmoid' compares pairs; set dpo\.loss=kto or dpo\.loss=bco",
    ):
        train_round(step.config(), progress=Progress())
    assert trained == []
    assert train_round(step.config(loss="bco"), progress=Progress())


@pytest.mark.parametrize("label", [True, False])
def test_examples_of_one_label_teach_kto_nothing_and_are_refused(
    step: Offline, trained: list[TrainSpec], label: bool
) -> None:
    step.write([{"prompt": f"x{i}", "completion": f"y{i}", "label": label} for i in range(5)])
    with pytest.raises(DataError, match=f"all 5 examples have the label {str(label).lower()}; .*with the other label"):
        train_round(step.config(loss="kto"), progress=Progress())
    assert not trained


def test_a_least_margin_is_part_of_the_pairs_key_only_if_it_is_set(step: Offline) -> None:
    scores = {"score_chosen": 2, "score_rejected": 1}
    step.write([row | scores for row in PAIRED])
    assert "min_margin" not in step.prepare().inputs["data"]
    with pytest.raises(StaleStepError, match=r"data\.min_margin"):
        step.prepare(min_margin=0.5)
    assert step.prepare("other", min_margin=0.5).inputs["data"]["min_margin"] == 0.5
