"""Pairs of which one side is another policy's, or a column's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from flows.verify import verify
from iterdpo.data.pairs import TRAIN
from iterdpo.errors import ConfigError, DataError
from iterdpo.run.rundir import read_manifest
from iterdpo.stages.plan import first_pending
from iterdpo.stages.runs import IterativeRun
from iterdpo.testing import build_tiny_checkpoint
from iterdpo.types import CompletionGroup, Judgment
from tests.unit.stages.harness import PER_ROUND, Lengths, Room, finish


def sides(run: IterativeRun, round: int) -> set[tuple[str, str]]:
    rows = pq.read_table(run.dir.round_dir(round) / "pairs" / TRAIN).to_pylist()
    return {(row["chosen"], row["rejected"]) for row in rows}


def test_the_rejected_completion_is_sampled_from_the_named_round_with_seeds_of_its_own(room: Room) -> None:
    run = room.open(pairing={"rejected_from": {"round": 0}})
    finish(run)
    assert sides(run, 1) == {("abab", "ab")}
    table = pq.read_table(run.dir.round_dir(2) / "pairs" / TRAIN)
    assert table["rejected_score"].null_count == table["rejected_sampler_logp"].null_count == PER_ROUND
    assert table["chosen_score"].null_count == table["chosen_sampler_logp"].null_count == 0
    step = read_manifest(run.dir.round_dir(2) / "others")
    assert step is not None
    assert step.inputs["policy"] == run.initial.digest  # round 1 was promoted, and is not what is rejected
    pairs = read_manifest(run.dir.round_dir(2) / "pairs")
    assert pairs is not None
    assert pairs.inputs["others"] == step.digest
    assert len(set(room.sampler.seeds)) == len(room.sampler.seeds) - 2 * 4  # only evaluations share theirs
    assert first_pending(run) is None
    assert "time/others_s" in run.dir.records()[-1].metrics


def test_the_plan_names_the_other_policys_completions_before_the_pairs(room: Room) -> None:
    run = room.open(rounds=1, pairing={"rejected_from": {"round": 0}})
    finish(run)
    (run.dir.round_dir(1) / "others").rename(room.root / "away")
    assert first_pending(room.open(rounds=1, pairing={"rejected_from": {"round": 0}})) == "round-001/others"


def test_another_checkpoint_of_the_same_shape_is_sampled_from(room: Room) -> None:
    weaker = build_tiny_checkpoint(room.root / "weaker", seed=7)
    run = room.open(rounds=1, pairing={"rejected_from": {"model": str(weaker)}})
    finish(run)
    assert run.other_model.digest in room.sampler.loaded
    assert run.other_model.digest != run.initial.digest


def test_a_checkpoint_of_another_shape_or_vocabulary_is_refused_at_once(room: Room) -> None:
    wider = build_tiny_checkpoint(room.root / "wider", intermediate_size=256)
    with pytest.raises(ConfigError, match=r"pairing\.rejected_from\.model .*names or shapes.*\{column: NAME\}"):
        room.open(pairing={"rejected_from": {"model": str(wider)}})
    other = build_tiny_checkpoint(room.root / "other")
    text = json.loads((other / "tokenizer.json").read_text())
    first, second = list(text["model"]["vocab"])[10:12]
    vocabulary = text["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(ConfigError, match="another vocabulary"):
        room.open(pairing={"chosen_from": {"model": str(other)}})


def with_column(room: Room) -> None:
    rows = [{"prompt": f"Tale {i}", "gold": f"gold {i}" if i % 4 else None} for i in range(40)]
    Path(room.sections["prompts"]["path"]).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_columns_completion_is_chosen_in_the_policys_tokens_and_rows_without_are_counted(room: Room) -> None:
    with_column(room)
    run = room.open(rounds=1, pairing={"chosen_from": {"column": "gold"}})
    record = finish(run)[-1]
    rows = pq.read_table(run.dir.round_dir(1) / "pairs" / TRAIN).to_pylist()
    assert {row["rejected"] for row in rows} == {"ab"}  # the worst of the policy's
    assert all(row["chosen"].startswith("gold") for row in rows)
    tokenizer = run.tokenizer
    assert all(tokenizer.decode(row["chosen_token_ids"], skip_special_tokens=True) == row["chosen"] for row in rows)
    assert all(row["chosen_token_ids"][-1] == tokenizer.eos_token_id for row in rows)
    golds = sum(prompt.columns["gold"] is not None for prompt in run.prompts.of(1))
    assert (len(rows), record.metrics.get("pairs/unmatched", 0)) == (golds, PER_ROUND - golds)
    assert not (run.dir.round_dir(1) / "others").exists()


def test_a_value_of_the_column_that_is_no_completion_is_named_with_its_row(room: Room) -> None:
    rows = [{"prompt": f"Tale {i}", "gold": 7} for i in range(40)]
    Path(room.sections["prompts"]["path"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"prompts\.jsonl: row \d+: column 'gold' is int '7'; it must be text"):
        room.open(rounds=1, pairing={"chosen_from": {"column": "gold"}})


@pytest.mark.parametrize("key", ["chosen_from", "rejected_from", "against"])
def test_a_round_whose_prompts_have_no_other_completion_says_so(room: Room, key: str) -> None:
    rows = [{"prompt": f"Tale {i}", "gold": ""} for i in range(40)]
    Path(room.sections["prompts"]["path"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"6 groups \(6 unmatched\): .* No prompt of the round has a completion in the"):
        finish(room.open(rounds=1, pairing={key: {"column": "gold"}}))


def test_the_other_policys_completions_have_the_temperature_of_the_policys(room: Room) -> None:
    run = room.open(rounds=1, sampling={"temperatures": [0.5, 1.0, 1.5]}, pairing={"rejected_from": {"round": 0}})
    finish(run)
    own, other = room.sampler.seeds[4:10], room.sampler.seeds[10:16]  # after round 0's evaluation
    assert [seed % 3 for seed in own] == [seed % 3 for seed in other]
    assert len({*own, *other}) == 12


def test_a_checkpoint_that_was_moved_makes_nothing_stale(room: Room) -> None:
    weaker = build_tiny_checkpoint(room.root / "weaker", seed=7)
    finish(room.open(rounds=1, pairing={"rejected_from": {"model": str(weaker)}}))
    moved = weaker.rename(room.root / "moved")
    assert first_pending(room.open(rounds=1, pairing={"rejected_from": {"model": str(moved)}})) is None


def test_a_column_that_no_prompt_has_is_refused_at_once(room: Room) -> None:
    with_column(room)
    with pytest.raises(ConfigError, match=r"pairing\.chosen_from\.column = 'golden': .* they have gold"):
        room.open(pairing={"chosen_from": {"column": "golden"}})


def test_pairs_of_earlier_rounds_and_of_a_file_are_added_by_share(room: Room) -> None:
    file = room.root / "offline.jsonl"
    rows = [{"prompt": f"Old {i}", "chosen": f" yes {i}", "rejected": " no"} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = {"replay": 0.25, "offline": {"path": str(file), "share": 0.25}}
    run = room.open(rounds=3, pairing=mixture)
    records = finish(run)
    counts = [{k: r.metrics[f"pairs/{k}"] for k in ("kept", "fresh", "replayed", "offline")} for r in records[1:]]
    assert counts == [
        {"kept": 8, "fresh": 6, "replayed": 0, "offline": 2},  # a quarter of 8; nothing to replay yet
        {"kept": 12, "fresh": 6, "replayed": 3, "offline": 3},
        {"kept": 12, "fresh": 6, "replayed": 3, "offline": 3},
    ]
    prompts = [pq.read_table(run.dir.round_dir(t) / "pairs" / TRAIN)["prompt"].to_pylist() for t in (1, 2, 3)]
    assert set(prompts[1][6:9]) <= set(prompts[0][:6])  # fresh ones of round 1, none of its offline pairs
    assert set(prompts[2][6:9]) <= {*prompts[0][:6], *prompts[1][:6]}
    assert all(text.startswith("Old") for t in prompts for text in t[-2:])
    assert prompts[1][9:] != prompts[2][9:]  # drawn anew
    assert first_pending(run) is None
    chats = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in chats))
    with pytest.raises(ConfigError, match="its prompts are messages, and those of the run are text"):
        room.open(rounds=3, pairing=mixture, redo=True)


def test_offline_pairs_that_cannot_be_used_are_named_with_their_own_key(room: Room) -> None:
    file = room.root / "offline.jsonl"
    rows = [{"prompt": "Old", "chosen": " yes", "rejected": rejected} for rejected in (" no", 7)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"row 2.*pairing\.offline\.bad_rows"):
        room.open(pairing={"offline": {"path": str(file), "share": 0.5}})


def test_offline_pairs_are_drawn_once_each_whatever_their_number(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    file = room.root / "offline.jsonl"
    rows = [{"prompt": f"Old {i}", "chosen": f" yes {i}", "rejected": " no"} for i in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("iterdpo.stages.pair.ROW_GROUP", 4)
    run = room.open(rounds=1, pairing={"offline": {"path": str(file), "share": 0.6}})
    finish(run)
    prompts = pq.read_table(run.dir.round_dir(1) / "pairs" / TRAIN)["prompt"].to_pylist()
    assert prompts[6:] == [f"Old {i}" for i in range(9)]  # 6 fresh ones, and 9 of 15


def test_pairs_across_policies_mix_with_those_of_a_file_and_of_earlier_rounds(room: Room) -> None:
    file = room.root / "offline.jsonl"
    rows = [{"prompt": f"Old {i}", "chosen": f" yes {i}", "rejected": " no"} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = {"replay": 0.25, "offline": {"path": str(file), "share": 0.25}, "rejected_from": {"round": 0}}
    run = room.open(pairing=mixture)
    finish(run)
    table = pq.read_table(run.dir.round_dir(2) / "pairs" / TRAIN)
    assert table["other_side"].to_pylist() == ["rejected"] * 9 + [None] * 3


def test_the_key_has_the_datas_content_and_the_replayed_pairs_but_no_path(room: Room) -> None:
    file = room.root / "offline.jsonl"
    file.write_text(json.dumps({"prompt": "Old", "chosen": " yes", "rejected": " no"}) + "\n")
    run = room.open(rounds=2, pairing={"replay": 0.5, "offline": {"path": str(file), "share": 0.1}})
    finish(run)
    first, second = (read_manifest(run.dir.round_dir(t) / "pairs") for t in (1, 2))
    assert first is not None
    assert second is not None
    assert "replayed" not in first.inputs
    assert second.inputs["replayed"] == [first.digest]
    assert not {"path", "split"} & second.inputs["pairing"]["offline"].keys()
    file.write_text(json.dumps({"prompt": "Older", "chosen": " yes", "rejected": " no"}) + "\n")
    assert (
        room.open(pairing={"replay": 0.5, "offline": {"path": str(file), "share": 0.1}}).offline_content
        != (first.inputs["pairing"]["offline"]["content"])
    )


def test_unpaired_data_cannot_be_mixed(room: Room) -> None:
    file = room.root / "unpaired.jsonl"
    file.write_text(json.dumps({"prompt": "Old", "completion": " yes", "label": True}) + "\n")
    with pytest.raises(ConfigError, match="unpaired data; only pairs can be mixed"):
        room.open(pairing={"offline": {"path": str(file), "share": 0.1}})


class PrefersTheOther(Lengths):
    """Of two completions the second has the higher score, of one prompt in two."""

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        found = super().judge(groups)
        odd = [int(group.prompt.text.removeprefix("Tale ")) % 2 for group in groups]
        scores = [[0.0, 1.0] if o else [1.0, 0.0] for o in odd]
        return [replace(j, scores=s) if len(j.scores) == 2 else j for j, s in zip(found, scores, strict=True)]


def test_the_judge_chooses_between_the_policys_and_the_other_policys_completion(room: Room) -> None:
    room.judge = PrefersTheOther()
    room.sampler.reply = lambda ids, k: f"{len(room.sampler.loaded)} {k} " + "x" * len(room.sampler.asked)
    against = {"pairing": {"against": {"round": 0}}, "dpo": {"xpo_alpha": 1e-5}}
    run = room.open(rounds=1, **against)
    finish(run)
    rows = pq.read_table(run.dir.round_dir(1) / "pairs" / TRAIN).to_pylist()
    assert len(rows) == PER_ROUND
    for row in rows:
        odd = int(row["prompt"].removeprefix("Tale ")) % 2
        assert row["other_side"] == ("chosen" if odd else "rejected")
        assert row[f"{row['other_side']}_sampler_logp"] is None
        assert (row["chosen_score"], row["rejected_score"]) == (1.0, 0.0)
    pairs, met = (read_manifest(run.dir.round_dir(1) / name) for name in ("pairs", "against"))
    assert pairs is not None
    assert met is not None
    assert (pairs.inputs["others"], pairs.counts["groups"]) == (met.digest, PER_ROUND)
    assert first_pending(run) is None
    assert not verify(run.dir.root).problems
    (run.dir.round_dir(1) / "against").rename(room.root / "away")
    assert first_pending(room.open(rounds=1, **against)) == "round-001/against"


def test_against_a_column_prompts_without_a_completion_are_unmatched(room: Room) -> None:
    with_column(room)
    run = room.open(rounds=1, pairing={"against": {"column": "gold"}})
    record = finish(run)[-1]
    golds = sum(prompt.columns["gold"] is not None for prompt in run.prompts.of(1))
    assert (record.metrics["pairs/kept"], record.metrics.get("pairs/unmatched", 0)) == (golds, PER_ROUND - golds)
