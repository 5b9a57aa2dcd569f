"""Reports of lm-evaluation-harness: what is read of them, and what a candidate has lost."""

from __future__ import annotations

from typing import Any

import pytest

from iterdpo.errors import DataError
from iterdpo.report.benchmarks import benchmark_metrics, results_of

REPORT: dict[str, Any] = {
    "results": {
        "gsm8k": {
            "name": "gsm8k",
            "alias": "gsm8k",
            "sample_len": 200,
            "exact_match,strict-match": 0.5,
            "exact_match_stderr,strict-match": 0.03,
            "exact_match,flexible-extract": 0.6,
            "exact_match_stderr,flexible-extract": "N/A",
        },
        "wikitext": {"alias": "wikitext", "word_perplexity,none": 12.0},
        "a group without metrics": {"alias": " "},
    },
    "higher_is_better": {"gsm8k": {"exact_match": True}, "wikitext": {"word_perplexity": False}},
    "n-samples": {"gsm8k": {"original": 1319, "effective": 200}},
    "total_evaluation_time_seconds": "12.3",
}


def test_metrics_have_their_standard_errors_and_times_are_left_out() -> None:
    assert results_of(REPORT) == {
        "gsm8k": {
            "metrics": {"exact_match,strict-match": [0.5, 0.03], "exact_match,flexible-extract": [0.6, None]},
            "higher_is_better": {"exact_match": True},
            "samples": 200,
        },
        "wikitext": {
            "metrics": {"word_perplexity,none": [12.0, None]},
            "higher_is_better": {"word_perplexity": False},
            "samples": None,
        },
    }


@pytest.mark.parametrize("report", [{}, {"results": []}, {"results": {"gsm8k": [1]}}])
def test_a_report_of_another_form_is_refused(report: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="lm_eval's report is of an unknown form"):
        results_of(report)


def results(exact: float, perplexity: float) -> Any:
    return {
        "gsm8k": {"metrics": {"exact_match,none": [exact, 0.03]}, "higher_is_better": {"exact_match": True}},
        "wikitext": {"metrics": {"ppl,none": [perplexity, None]}, "higher_is_better": {"ppl": False}},
    }


@pytest.mark.parametrize(
    ("exact", "perplexity", "loss"),
    [(0.45, 12.0, 0.05), (0.5, 12.25, 0.25), (0.75, 11.5, -0.25), (0.5, 12.0, 0.0)],
)
def test_the_loss_is_the_largest_of_all_tasks_and_a_higher_perplexity_is_one(
    exact: float, perplexity: float, loss: float
) -> None:
    metrics = benchmark_metrics(results(exact, perplexity), results(0.5, 12.0))
    assert metrics["benchmark/max_loss"] == pytest.approx(loss)
    assert metrics["benchmark/gsm8k/exact_match,none"] == exact
    assert metrics["benchmark/gsm8k/exact_match,none_stderr"] == 0.03


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_task_without_a_value_leaves_the_loss_unmeasured(bad: str) -> None:
    before = results_of({"results": {"a": {"acc,none": 0.5}, "b": {"acc,none": 0.5}}})
    now = results_of(
        {"results": {"a": {"acc,none": float(bad)}, "b": {"acc,none": 0.5, "acc_stderr,none": float(bad)}}}
    )
    metrics = benchmark_metrics(now, before)
    assert (metrics["benchmark/a/acc,none"], metrics["benchmark/max_loss"]) == (None, None)
    assert (metrics["benchmark/b/acc,none"], metrics["benchmark/b/acc,none_stderr"]) == (0.5, None)


def test_the_initial_policy_has_lost_nothing_and_a_new_task_has_no_loss() -> None:
    assert "benchmark/max_loss" not in benchmark_metrics(results(0.5, 12.0), None)
    before = {"gsm8k": results(0.5, 12.0)["gsm8k"]}
    assert benchmark_metrics(results(0.25, 99.0), before)["benchmark/max_loss"] == 0.25
