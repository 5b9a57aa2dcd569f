"""RewardBench 2, LLMBar and JudgeBench as they are distributed, and RewardBench 2's own score."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.judge_cli import app
from iterdpo.errors import DataError
from iterdpo.run.rundir import write_jsonl
from judges.audit.agreement import read_samples
from judges.audit.check import Check, check_judge_on
from judges.audit.labelled import read_labelled
from judges.audit.published import JudgedGroup, measure_groups, ties_score
from judges.load import load_judge

LONGER = "def longer(completion):\n    return len(completion)\n\n\ndef first(a, b):\n    return 'a'\n"


def best_of_4(**more: Any) -> dict[str, Any]:
    row = {
        "id": "0",
        "prompt": "Name a colour.",
        "chosen": ["Aubergine"],
        "rejected": ["Red", "Green", "Yellow"],
        "num_correct": 1,
        "num_incorrect": 3,
        "total_completions": 4,
        "models": ["m1", "m2", "m3", "m4"],
        "subset": "Focus",
        "additional_metadata": {"category": "other"},
    }
    return row | more


def tied(name: str, right: list[str], wrong: list[str]) -> dict[str, Any]:
    counts = {"num_correct": len(right), "num_incorrect": len(wrong), "total_completions": len(right + wrong)}
    return best_of_4(id=name, chosen=right, rejected=wrong, subset="Ties", **counts)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my.py").write_text(LONGER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checked(path: str, judge: str = "my.py:longer") -> Check:
    return check_judge_on(load_judge(judge, {}), read_labelled(path)[0])


def test_each_right_completion_of_rewardbench_2_makes_a_pair_with_each_wrong_one(here: Path) -> None:
    rows = [best_of_4(), tied("tied:3", ["aaaa", "bbb"], ["c", "dd", "e"])]
    pq.write_table(pa.Table.from_pylist(rows), here / "rb2.parquet")
    groups, account = read_labelled("rb2.parquet")
    one, two = list(groups)
    assert account.summary() == "kept 2 of 2 rows of RewardBench 2"
    assert (one.right, len(one.completions), one.subset, one.name) == (1, 4, "Focus", "0")
    assert [c.text for c in two.completions] == ["aaaa", "bbb", "c", "dd", "e"]
    assert two.pairs == [(0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4)]
    assert one.prompt.columns == {"id": "0", "subset": "Focus", "additional_metadata": {"category": "other"}}
    check = checked("rb2.parquet")
    assert [p.judgment.verdict for p in check.pairs] == ["chosen"] * 9
    assert check.groups[1].scores == [4.0, 3.0, 1.0, 2.0, 1.0]  # in the order of the row, however they were shown


def test_a_judge_sees_the_completions_of_a_row_together_in_an_order_of_the_seed(here: Path) -> None:
    (here / "together.py").write_text(
        "from iterdpo.types import Judgment\n\n\nclass Together:\n    def judge(self, groups):\n"
        "        open('seen', 'a').writelines('|'.join(c.text for c in g.completions) + '\\n' for g in groups)\n"
        "        return [Judgment(g.prompt.id, [0.0] * len(g.completions), [None] * len(g.completions)) for g in groups]\n"
    )
    write_jsonl(here / "rb2.jsonl", [best_of_4(id=str(i)) for i in range(20)])
    check_judge_on(load_judge("together.py:Together", {}), read_labelled("rb2.jsonl")[0], seed=1)
    seen = (here / "seen").read_text().splitlines()
    assert len(seen) == 40
    assert {line.split("|").index("Aubergine") for line in seen} == {0, 1, 2, 3}
    assert [line.split("|")[::-1] for line in seen[:20]] == [line.split("|") for line in seen[20:]]


def test_the_best_of_four_counts_a_share_if_several_share_the_best_score() -> None:
    def group(row: int, scores: list[float | None], subset: str = "Math") -> JudgedGroup:
        return JudgedGroup(row, f"p-{row}", str(row), subset, 1, scores)

    groups = [
        group(1, [2.0, 1.0, 1.0, 0.0]),  # right
        group(2, [2.0, 2.0, 1.0, 2.0]),  # one of three
        group(3, [0.0, 1.0, 0.0, 0.0]),  # wrong
        group(4, [1.0, 0.0, None, 0.0]),  # not judged whole
        group(5, [1.0, 0.0, 0.0, 0.0], "Safety"),
    ]
    found = measure_groups(groups)
    assert found is not None
    assert found["subsets"]["Math"].value == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert found["subsets"]["Math"].n == 3
    assert found["best_of"].value == pytest.approx((1 + 1 / 3 + 0 + 1) / 4)
    assert found["score"] == pytest.approx(((1 + 1 / 3) / 3 + 1) / 2)  # subsets weigh the same
    assert measure_groups([JudgedGroup(1, "p", "", None, 1, [1.0, 0.0])]) is None


def test_the_score_of_ties_is_rewardbench_2s() -> None:
    def group(name: str, right: int, *scores: float | None) -> JudgedGroup:
        return JudgedGroup(1, name, name, "Ties", right, list(scores))

    groups = [
        group("ref:1", 1, 5.0, 1.0),  # gap 4
        group("tied:1", 2, 5.0, 4.0, 1.0, 0.0),  # gap 3, spread 1
        group("ref:2", 1, 3.0, 2.5),  # gap 0.5
        group("tied:2", 3, 5.0, 4.0, 4.5, 2.0),  # gap 2, spread 1; hard: 0.5 < 1
        group("ref:3", 1, 1.0, 2.0),  # gap -1
        group("tied:3", 2, 1.0, 1.0, 1.0),  # gap 0, spread 0
        group("tied:4", 2, 9.0, 8.0, 0.0),  # no reference prompt
        group("ref:5", 1, None, 0.0),  # not judged
    ]
    margin = (math.tanh(3 / 1 - 1) + math.tanh(0.5 / 1 - 1) + -1.0) / 3
    found = ties_score(groups)
    assert found["tied_accuracy"] == 3 / 4
    assert found["ref_accuracy"] == 2 / 3
    assert found["preferred"] == 2 / 3
    assert found["preferred_hard"] == 1 / 3
    assert found["margin"] == pytest.approx(margin)
    assert found["score"] == pytest.approx(0.3 * 3 / 4 + 0.3 * 2 / 3 + 0.2 * 2 / 3 + 0.2 / 3 + 0.01 * margin)
    assert ties_score(groups[:1])["score"] is None


def test_llmbar_and_judgebench_are_read_as_they_are_published(here: Path) -> None:
    bar = [
        {"input": "Say hi.", "output_1": "Hi!", "output_2": "Goodbye then.", "label": 1},
        {"input": "Say hi.", "output_1": "Goodbye.", "output_2": "Hi!", "label": 2},
    ]
    (here / "dataset.json").write_text(json.dumps(bar))
    groups = list(read_labelled("dataset.json")[0])
    assert [[c.text for c in g.completions] for g in groups] == [["Hi!", "Goodbye then."], ["Hi!", "Goodbye."]]
    assert groups[0].prompt.columns == {}
    assert groups[0].prompt.id == groups[1].prompt.id

    def row(source: str, label: str) -> dict[str, Any]:
        ids = {"pair_id": "x", "original_id": "7", "source": source, "response_model": "m"}
        return ids | {"question": "1+1?", "response_A": "2", "response_B": "three", "label": label}

    sources = ["mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench", "other"]
    write_jsonl(here / "bench.jsonl", [row(source, "B>A") for source in sources] + [row("other", "A>B")])
    groups = list(read_labelled("bench.jsonl")[0])
    assert [g.subset for g in groups] == ["knowledge", "reasoning", "math", "coding", "other", "other"]
    assert [g.completions[0].text for g in groups] == ["three"] * 5 + ["2"]
    assert groups[0].prompt.columns == {
        "pair_id": "x",
        "original_id": "7",
        "source": "mmlu-pro-law",
        "response_model": "m",
    }
    assert [p.judgment.verdict for p in checked("bench.jsonl").pairs] == ["chosen"] * 5 + ["rejected"]
    assert next(read_labelled("bench.jsonl", subset_column="source")[0]).subset == "mmlu-pro-law"


def test_rows_of_published_benchmarks_are_not_left_out(here: Path) -> None:
    write_jsonl(here / "bar.jsonl", [{"input": "Hi", "output_1": "", "output_2": "", "label": 1}])
    [group] = read_labelled("bar.jsonl")[0]
    assert len(group.completions) == 2


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (best_of_4(num_correct=2), r"row 2: num_correct is int '2', but chosen has 1 texts"),
        (best_of_4(rejected=[]), r"row 2, column 'rejected' is list '\[\]'; it must be a list of one text or more"),
        (best_of_4(chosen="Aubergine"), r"row 2, column 'chosen' is str 'Aubergine'; it must be a list"),
        (best_of_4(prompt=3), r"row 2, the prompt is int '3'; it must be text"),
        ({"prompt": "x", "rejected": ["y"]}, r"row 2: no column 'chosen'"),
    ],
)
def test_a_wrong_row_of_rewardbench_2_is_named(here: Path, row: dict[str, Any], complaint: str) -> None:
    write_jsonl(here / "rb2.jsonl", [best_of_4(), row])
    with pytest.raises(DataError, match=complaint):
        list(read_labelled("rb2.jsonl")[0])


@pytest.mark.parametrize("label", [0, 3, "A", None, True, "1.0"])
def test_a_label_that_names_neither_completion_is_refused(here: Path, label: Any) -> None:
    write_jsonl(here / "bar.jsonl", [{"input": "Hi", "output_1": "a", "output_2": "b", "label": label}])
    with pytest.raises(DataError, match=r"row 1, column 'label' is .*; it must be 1 or 2"):
        list(read_labelled("bar.jsonl")[0])


def test_the_report_says_of_how_many_prompts_the_pairs_are(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [best_of_4(id=str(i), prompt=f"Name {i} colours.") for i in range(2)]
    rows += [tied("ref:1", ["aaaa"], ["b", "c", "d"]), tied("tied:1", ["aaaa", "aaaaa"], ["b", "c"])]
    write_jsonl(here / "rb2.jsonl", rows)
    assert (
        app(("check", "my.py:longer", "--data", "rb2.jsonl", "--json", "out.json"), result_action="return_value") == 0
    )
    said = " ".join(capsys.readouterr().out.split())
    # Three pairs for each of the first three rows, four for the last; the two of Ties have one prompt here.
    assert "100.0 % of 13 pairs of 3 prompts" in said
    assert "Best of several" in said
    found = json.loads((here / "out.json").read_text())
    assert found["counts"]["prompts"] == 3
    assert found["best"]["best_of"]["value"] == 1.0
    assert found["best"]["score"] == pytest.approx((1 + 1 + 0.01 * math.tanh(3 / 1 - 1)) / 2)


def test_two_judges_are_compared_on_best_of_four_with_every_label_of_a_right_and_a_wrong_one(here: Path) -> None:
    write_jsonl(here / "rb2.jsonl", [tied("tied:1", ["a", "b"], ["c", "d"])])
    [sample] = read_samples("rb2.jsonl")
    assert {sample.group.completions[k].text for k in sample.right} == {"a", "b"}
