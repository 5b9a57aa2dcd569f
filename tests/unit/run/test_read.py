from __future__ import annotations

from pathlib import Path

import pytest

from iterdpo.errors import UserError
from iterdpo.run.artifacts import write_completion_shard, write_judgment_shard
from iterdpo.run.read import read_run
from iterdpo.run.rundir import RunDir, write_json, write_jsonl
from iterdpo.testing import make_group
from iterdpo.types import Judgment, RoundRecord


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Round 0 evaluated; round 1 sampled in two shards, judged, paired, trained and promoted; round 2 only sampled."""
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    run.write_config({"rounds": 3, "model": {"path": "org/base"}})
    cats, dogs = make_group("cats?", ["yes", "no!"]), make_group("dogs?", ["perhaps", ""])
    cats.prompt.columns.update({"gold": "yes", "score": 7})

    for step in (run.round_dir(0) / "evaluation", run.round_dir(1), run.round_dir(2)):
        (step / "completions").mkdir(parents=True)
        write_completion_shard(step / "completions" / "shard-000000.parquet", [cats])
        write_completion_shard(step / "completions" / "shard-000001.parquet", [dogs])
    train_cats = Judgment(cats.prompt.id, [0.9, 0.1], [None, None])
    train_dogs = Judgment(dogs.prompt.id, [0.4, None], [None, "nothing to judge"])
    for judgments in (run.round_dir(1) / "judgments", run.round_dir(0) / "evaluation" / "judgments" / "train_judge"):
        judgments.mkdir(parents=True)
        write_judgment_shard(judgments / "shard-000000.jsonl", [train_cats])
        write_judgment_shard(judgments / "shard-000001.jsonl", [train_dogs])
    policy = run.round_dir(1) / "policy"
    policy.mkdir()
    write_jsonl(policy / "train_log.jsonl", [{"step": 1, "loss": 0.69}, {"step": 2, "loss": 0.6}])
    (run.round_dir(2) / "judgments.partial").mkdir()

    for r, target in ((0, "org/base"), (1, "round-001/policy")):
        run.write_record(
            RoundRecord(r, "promote", "", target, r, "d", {}, {"round": r, "score/train_judge": 0.3 + 0.2 * r})
        )
    return run.root


def test_metrics_are_indexed_by_round(run_dir: Path) -> None:
    metrics = read_run(run_dir).metrics
    assert metrics.index.name == "round"
    assert dict(metrics["score/train_judge"]) == {0: 0.3, 1: 0.5}


def test_completions_have_a_row_each_with_the_score_or_the_reason_for_none(run_dir: Path) -> None:
    table = read_run(run_dir).completions(1)
    own = ["prompt_id", "prompt", "k", "text", "tokens", "finish_reason", "score", "abstention"]
    assert set(table.columns) == {*own, "gold", "column/score"}
    assert table.loc[0, ["gold", "column/score"]].tolist() == ["yes", 7]  # columns of the prompt file
    assert list(table["text"]) == ["yes", "no!", "perhaps", ""]
    assert list(table["k"]) == [0, 1, 0, 1]
    assert list(table["tokens"]) == [3, 3, 7, 0]
    assert list(table["score"][:3]) == [0.9, 0.1, 0.4]
    assert table["score"].isna().tolist() == [False, False, False, True]
    assert table["abstention"][3] == "nothing to judge"
    assert read_run(run_dir).abstentions(1) == {"nothing to judge": 1}


def test_completions_not_judged_yet_have_neither_score_nor_reason(run_dir: Path) -> None:
    table = read_run(run_dir).completions(2)
    assert len(table) == 4
    assert table["score"].isna().all()
    assert table["abstention"].isna().all()


def test_judgments_of_other_completions_are_not_shown_as_these(run_dir: Path) -> None:
    cats = make_group("cats?", ["yes", "no!"])
    for other in (Judgment("another prompt", [0.9, 0.1], [None, None]), Judgment(cats.prompt.id, [0.9], [None])):
        write_judgment_shard(run_dir / "round-001" / "judgments" / "shard-000000.jsonl", [other])
        with pytest.raises(UserError, match="made for other completions"):
            read_run(run_dir).completions(1)


def test_evaluation_has_both_judges_columns_even_without_a_heldout_judge(run_dir: Path) -> None:
    table = read_run(run_dir).evaluation(0)
    assert list(table["train_judge"][:3]) == [0.9, 0.1, 0.4]
    assert table["train_judge_abstention"][3] == "nothing to judge"
    assert table["heldout_judge"].isna().all()


def test_the_training_log_covers_one_round_or_all(run_dir: Path) -> None:
    run = read_run(run_dir)
    assert run.train_log().to_dict("list") == {"round": [1, 1], "step": [1, 2], "loss": [0.69, 0.6]}
    assert len(run.train_log(1)) == 2


def test_pairs_come_as_a_dataset(run_dir: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (run_dir / "round-001" / "pairs").mkdir()
    row = {"prompt": [{"role": "user", "content": "cats?"}], "chosen_token_ids": [1, 2], "chosen_score": 0.9}
    parquet.write_table(pyarrow.Table.from_pylist([row]), run_dir / "round-001" / "pairs" / "train.parquet")
    assert read_run(run_dir).pairs(1)[0] == row


def test_the_policy_is_a_rounds_or_the_promoted_one(run_dir: Path) -> None:
    run = read_run(run_dir)
    assert run.policy() == run_dir / "round-001" / "policy"
    assert run.policy(1) == run_dir / "round-001" / "policy"
    assert run.policy(0) == Path("org/base")


@pytest.mark.parametrize("ask", ["completions", "evaluation", "pairs", "policy", "train_log", "abstentions"])
def test_asking_for_a_round_that_is_not_there_names_what_is(run_dir: Path, ask: str) -> None:
    with pytest.raises(
        UserError, match=r"round 7 has no .*round 1 has completions, judgments, policy; round 2 has completions$"
    ):
        getattr(read_run(run_dir), ask)(7)


def test_a_run_that_has_only_begun_reads_as_empty(tmp_path: Path) -> None:
    RunDir(tmp_path).write_config({"model": {"path": "org/base"}})
    run = read_run(tmp_path)
    assert run.metrics.empty
    assert run.train_log().empty
    with pytest.raises(UserError, match="no policy yet"):
        run.policy()


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "other.json", {})
    with pytest.raises(UserError, match="no run here"):
        read_run(tmp_path)
