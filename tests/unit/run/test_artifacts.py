"""What stages hand to each other, on disk: nothing is lost on the way through Parquet, and `datasets` opens it too."""

from __future__ import annotations

import dataclasses
import os
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iterdpo.errors import DataError
from iterdpo.run.artifacts import (
    Completions,
    Evaluation,
    Judgments,
    Pairs,
    completion_shards,
    read_completion_shard,
    read_groups,
    read_judgment_shard,
    read_judgments,
    shard_name,
    write_card,
    write_completion_shard,
    write_judgment_shard,
)
from iterdpo.run.rundir import Step
from iterdpo.testing import make_group
from iterdpo.types import Comparison, Completion, CompletionGroup, Judgment, Prompt

PLAIN = Prompt("p-1", "Tale of\u2028 Zürich\n\t\u0000 🜁", {})
CHAT = Prompt(
    "p-2",
    [{"role": "system", "content": ""}, {"role": "user", "content": '"2 + 2?"'}],
    {"gold": "4", "nested": {"list": [1, 2.5, None, {"deep": [True, "ü"]}], "empty": {}}, "nothing": None},
)
GROUPS = [
    CompletionGroup(
        PLAIN,
        [1, 2, 2**31 - 1],
        [Completion(" née\n", [300, 7, 2], [-0.5, -1.5, -2.0], "stop"), Completion("", [], [], "length")],
    ),
    CompletionGroup(CHAT, [], [Completion("4", [4], [-0.25], "stop")]),
    CompletionGroup(Prompt("p-3", ""), [9], [Completion(f"{k}", [k], [-float(k)], "length") for k in range(5)]),
    CompletionGroup(Prompt("p-4", "without any"), [9], []),
]


def round_trip(directory: Path, groups: list[CompletionGroup]) -> list[CompletionGroup]:
    path = directory / "shard-000000.parquet"
    write_completion_shard(path, groups)
    return read_completion_shard(path)


def test_groups_come_back_as_they_were_sampled(tmp_path: Path) -> None:
    assert round_trip(tmp_path, GROUPS) == GROUPS


@pytest.mark.parametrize("groups", [[], GROUPS[-1:], GROUPS[:1], [make_group("x", [""])]])
def test_a_shard_may_be_empty_and_so_may_what_is_in_it(tmp_path: Path, groups: list[CompletionGroup]) -> None:
    assert round_trip(tmp_path, groups) == groups


texts = st.text(st.characters(exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
tokens = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(-1e4, 0, width=32)), max_size=4)
completions = st.builds(
    lambda text, pairs, reason: Completion(text, [t for t, _ in pairs], [p for _, p in pairs], reason),
    texts,
    tokens,
    st.sampled_from(["stop", "length"]),
)
messages = st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": texts}), min_size=1, max_size=2)
groups = st.builds(
    CompletionGroup,
    st.builds(Prompt, texts, texts | messages, st.dictionaries(texts, json_values, max_size=2)),
    st.lists(st.integers(0, 2**31 - 1), max_size=4),
    st.lists(completions, max_size=3),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(groups, max_size=3))
def test_any_groups_come_back_as_they_were(tmp_path: Path, sampled: list[CompletionGroup]) -> None:
    assert round_trip(tmp_path, sampled) == sampled


def test_with_arrays_the_same_numbers_come_back_packed(tmp_path: Path) -> None:
    round_trip(tmp_path, GROUPS)
    for group, packed in zip(GROUPS, read_groups(tmp_path, arrays=True), strict=True):
        assert packed.prompt_ids == group.prompt_ids
        for ours, theirs in zip(group.completions, packed.completions, strict=True):
            assert (array("i", ours.token_ids), array("f", ours.logprobs)) == (theirs.token_ids, theirs.logprobs)


def test_equal_groups_are_equal_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_completion_shard(tmp_path / name, GROUPS)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_column_that_is_no_number_in_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_completion_shard(tmp_path / "shard-000000.parquet", [make_group("x", ["y"], score=float("nan"))])
    assert list(tmp_path.iterdir()) == []


def test_a_crash_while_writing_leaves_the_old_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shard-000000.parquet"
    write_completion_shard(path, GROUPS[:1])

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(KeyboardInterrupt):
        write_completion_shard(path, GROUPS)
    assert read_completion_shard(path) == GROUPS[:1]
    assert completion_shards(tmp_path) == [path]  # a file that was begun is no shard


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"", lambda b: b[:40] + bytes(60) + b[100:]])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "shard-000007.parquet"
    write_completion_shard(path, GROUPS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"shard-000007\.parquet: damaged"):
        read_completion_shard(path)


JUDGMENTS = [
    Judgment("p-1", [0.5, None], [None, "abstained:\u2028 ü\n"]),
    Judgment("p-2", [1.0], [None], [Comparison(0, 1, "first", probability=0.75)], {"criteria": {"brief": [1, 2]}}),
    Judgment("p-3", [], [], [Comparison(1, 0, None, "down")]),
]


def test_judgments_come_back_as_they_were_given(tmp_path: Path) -> None:
    path = tmp_path / "shard-000000.jsonl"
    write_judgment_shard(path, JUDGMENTS)
    assert read_judgment_shard(path) == JUDGMENTS


def test_shards_are_read_in_the_order_of_their_numbers_one_at_a_time(tmp_path: Path) -> None:
    for number in (10, 2, 0):
        write_completion_shard(tmp_path / f"{shard_name(number)}.parquet", [make_group(str(number), ["x"])])
        write_judgment_shard(tmp_path / f"{shard_name(number)}.jsonl", [Judgment(str(number), [1.0], [None])])
    assert [g.prompt.content for g in read_groups(tmp_path)] == ["0", "2", "10"]
    assert [j.prompt_id for j in read_judgments(tmp_path)] == ["0", "2", "10"]
    (tmp_path / f"{shard_name(10)}.parquet").write_bytes(b"damaged")
    reading = read_groups(tmp_path)
    assert [next(reading).prompt.content for _ in range(2)] == ["0", "2"]  # the last is not read yet
    with pytest.raises(DataError):
        next(reading)


def test_a_directory_of_completions_opens_with_load_dataset(tmp_path: Path) -> None:
    import datasets

    step = Step(tmp_path / "round-001" / "completions", {})
    directory = step.begin()
    for number, part in enumerate((GROUPS[:2], GROUPS[2:])):
        write_completion_shard(directory / f"{shard_name(number)}.parquet", part)
    write_card(directory, "shard-*.parquet")
    step.finish()  # with its manifest beside the data

    rows = datasets.load_dataset(str(step.path), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["prompt_id"][:] == ["p-1", "p-2", "p-3", "p-4"]
    assert rows[0]["completions"] == [" née\n", ""]
    assert rows[0]["token_ids"] == [[300, 7, 2], []]
    assert rows[0]["logprobs"] == [[-0.5, -1.5, -2.0], []]
    assert rows[0]["finish_reasons"] == ["stop", "length"]
    assert rows[0]["prompt_token_ids"] == [1, 2, 2**31 - 1]
    assert rows.features["token_ids"].feature.feature.dtype == "int32"
    assert rows.features["logprobs"].feature.feature.dtype == "float32"


def test_a_directory_of_judgments_opens_with_load_dataset(tmp_path: Path) -> None:
    import datasets

    step = Step(tmp_path / "round-001" / "judgments", {})
    directory = step.begin()
    for number, judgment in enumerate(JUDGMENTS[:1] * 2):
        write_judgment_shard(directory / f"{shard_name(number)}.jsonl", [judgment])
    write_card(directory, "shard-*.jsonl")
    step.finish()
    rows = datasets.load_dataset(str(step.path), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["scores"][:] == [[0.5, None]] * 2
    assert rows[0]["abstentions"] == [None, "abstained:\u2028 ü\n"]


def test_handles_hold_no_rows_and_read_them_anew_each_time(tmp_path: Path) -> None:
    step = Step(tmp_path / "round-001" / "completions", {})
    write_completion_shard(step.begin() / "shard-000000.parquet", GROUPS)
    manifest = step.finish(counts={"prompts": 4, "completions": 8})
    completions = Completions.of(step.path, manifest)
    assert (completions.digest, completions.prompts, completions.completions) == (manifest.digest, 4, 8)
    assert list(completions) == list(completions) == GROUPS
    with pytest.raises(dataclasses.FrozenInstanceError):
        completions.digest = "another"  # type: ignore[misc]


def test_a_handle_on_judgments_knows_what_was_judged_and_how_often_the_order_decided(tmp_path: Path) -> None:
    step = Step(tmp_path / "round-001" / "judgments", {"completions": "5c1e"})
    write_judgment_shard(step.begin() / "shard-000000.jsonl", JUDGMENTS)
    manifest = step.finish(counts={"metrics": {"flip_rate": 0.25}})
    judgments = Judgments.of(step.path, manifest)
    assert (judgments.completions, judgments.flip_rate, list(judgments)) == ("5c1e", 0.25, JUDGMENTS)


def test_a_handle_on_pairs_knows_how_many_there_are_to_train_on(tmp_path: Path) -> None:
    step = Step(tmp_path / "round-001" / "pairs", {})
    step.begin()
    manifest = step.finish(counts={"groups": 8, "kept": 7})
    assert Pairs.of(step.path, manifest) == Pairs(step.path, manifest.digest, kept=7)


def test_an_evaluation_has_its_judgments_by_role(tmp_path: Path) -> None:
    for role in ("train_judge", "heldout_judge"):
        (tmp_path / "judgments" / role).mkdir(parents=True)
    evaluation = Evaluation(tmp_path, "e4c3", 2)
    assert evaluation.completions == tmp_path / "completions"
    assert evaluation.judgments() == {role: tmp_path / "judgments" / role for role in ("heldout_judge", "train_judge")}
