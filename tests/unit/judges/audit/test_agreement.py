"""How far two judges agree, by construction, and what they are compared on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from iterdpo.errors import DataError, UserError
from iterdpo.run.artifacts import write_completion_shard
from iterdpo.run.rundir import RunDir, write_jsonl
from iterdpo.types import CompletionGroup, Judgment
from judges.audit.agreement import Sample, compare_judges, measure_agreement, read_samples
from tests.unit.judges.audit.faulty_judges import Scores, groups, holds


def agree(a: Any, b: Any, some: Sequence[CompletionGroup], right: frozenset[int] = frozenset()) -> dict[str, Any]:
    samples = [Sample(g, right) for g in some]
    return measure_agreement(compare_judges(lambda: a, lambda: b, lambda: samples), samples=300)


def test_two_judges_agreement_is_what_they_were_built_with() -> None:
    def coin(group: CompletionGroup, rng: random.Random) -> tuple[float, float]:
        return (1.0, 0.0) if rng.random() < 0.5 else (0.0, 1.0)

    def follows(group: CompletionGroup, rng: random.Random) -> tuple[float, float]:
        said = coin(group, rng)
        return said if rng.random() < 0.8 else said[::-1]

    found = agree(Scores(coin), Scores(follows), groups(2_000, 2), right=frozenset({0}))["figures"]
    assert holds(found["agreement"], 0.8)
    assert holds(found["opposite"], 0.2)
    assert holds(found["kappa"], 0.6)  # (0.8 - 0.5) / (1 - 0.5)
    assert holds(found["kendall"], 0.6)  # of two: 1 where they agree, -1 where not
    assert holds(found["accuracy_a"], 0.5)
    assert holds(found["accuracy_gain"], 0.0)


def test_larger_groups_count_every_two_completions_and_abstentions_are_left_out() -> None:
    class Forgets(Scores):
        def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
            return [Judgment(g.prompt.id, [3.0, 2.0, None], [None, None, "no idea"]) for g in groups]

    a, b = Scores(lambda g, rng: (1.0, 2.0, 2.0)), Forgets(None)
    report = agree(a, b, groups(10, 3))
    assert report["counts"] == {"groups": 10, "pairs": 30, "judged_by_both": 10, "unjudged_a": 0, "unjudged_b": 20}
    assert report["confusion"]["second"] == {"first": 10, "second": 0, "tie": 0}
    assert report["figures"]["agreement"].value == 0.0
    assert report["figures"]["spearman"].value == pytest.approx(-1.0)


def test_the_differences_that_are_kept_are_opposite_verdicts_first() -> None:
    def a(group: CompletionGroup, rng: random.Random) -> tuple[float, float]:
        return 1.0, 0.0

    def b(group: CompletionGroup, rng: random.Random) -> tuple[float, float]:
        return (0.0, 0.0) if group.prompt.id != "p-70" else (0.0, 1.0)

    samples = [Sample(g) for g in groups(100, 2)]
    kept = compare_judges(lambda: Scores(a), lambda: Scores(b), lambda: samples).differences
    assert [d.rated.prompt_id for d in kept[:3]] == ["p-70", "p-0", "p-1"]


def test_data_that_two_judges_cannot_be_compared_on_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [{"prompt": "a"}])
    with pytest.raises(DataError, match="prompts alone cannot be judged"):
        read_samples(str(path))
    with pytest.raises(UserError, match="--round is for a run directory"):
        read_samples(str(path), round=1)


def test_two_judges_read_pairs_completions_and_a_runs_shards(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    write_jsonl(path, [{"prompt": f"q {i}", "chosen": "good", "rejected": "evil"} for i in range(50)])
    pairs = list(read_samples(str(path), seed=1))
    assert {s.right for s in pairs} == {frozenset({0}), frozenset({1})}  # in random order
    assert all(s.group.completions[k].text == "good" for s in pairs for k in s.right)

    write_jsonl(path, [{"prompt": "q", "completions": ["a", "b", "c"], "gold": "a"}])
    [sample] = read_samples(str(path))
    assert [c.text for c in sample.group.completions] == ["a", "b", "c"]
    assert sample.group.prompt.columns == {"gold": "a"}

    run = tmp_path / "run"
    for number in (1, 2):
        (run / f"round-00{number}" / "completions").mkdir(parents=True)
        write_completion_shard(run / f"round-00{number}" / "completions" / "shard-000000.parquet", groups(number, 2))
    RunDir(run).write_config({})
    assert len(list(read_samples(str(run)))) == 2  # the last round
    assert len(list(read_samples(str(run), round=1))) == 1
    with pytest.raises(UserError, match="no completions of round 7; rounds with completions: 1, 2"):
        read_samples(str(run), round=7)
    [shard] = read_samples(str(run / "round-001" / "completions" / "shard-000000.parquet"))
    assert shard.group.prompt.id == "p-0"
