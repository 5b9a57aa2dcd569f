"""The figures of a whole evaluation, worked out by hand."""

from __future__ import annotations

import pytest

from iterdpo.evaluation.metrics import (
    ENDS,
    REFERENCES,
    WITH_INTERVAL,
    WITHOUT,
    Thoughts,
    evaluation_metrics,
    unmeasured,
)
from iterdpo.stats import Bootstrap


def test_an_evaluation_has_the_figures_of_its_streams() -> None:
    bootstrap = Bootstrap(confidence=0.95, samples=100, seed=0)
    texts = [[1, 2], [1, 2, 3, 4], [1], [1]]  # two prompts, two completions each
    found = evaluation_metrics(
        lambda: iter(texts),
        {"train_judge": [[1.0, None], [0.0, 0.0]], "heldout_judge": [[0.5, 0.5], [0.0, None]]},
        {"initial": {"train_judge": [[2.0], [2.0]], "heldout_judge": [[0.0], [1.0]]}},
        {},
        {"policy": [[-1.0, -2.0], [-3.0, -1.0]], "initial": [[-2.0, -3.0], [-3.0, -1.0]]},
        prompts=2,
        truncated=1,
        texts=["I cannot help with that.", "yes", "no", "no"],
        lengths={"policy": [3.0, 1.0], "initial": [3.0, 1.0]},
        entropy=1.5,
        bootstrap=bootstrap,
    )
    assert (
        {k: v for k, v in found.items() if not k.endswith(("_low", "_high"))}
        == {
            "win_rate/judge": "heldout",
            "score/train_judge": 0.5,
            "score/heldout_judge": 0.25,
            "win_rate/vs_initial": 0.5,  # both completions of the first prompt win, the judged one of the second loses
            "win_rate/vs_initial_p": 1.0,
            "win_rate/vs_initial_ties": 0.0,
            **{
                f"{kind}/vs_{name}{end}": None
                for name in ("previous", "best")
                for kind, ends in (("win_rate", ("", "_p", "_ties")), ("length_controlled_win_rate", ("",)))
                for end in ends
            },
            "length_controlled_win_rate/vs_initial": pytest.approx(0.5),
            "judges/agreement": 0.5,  # both lose the second; of the first only 1 against 2 and 0.5 against 0 are judged twice
            "judges/gap": -0.5,  # the training judge's shares are 0 and 0, the held-out judge's 1 and 0
            "best_of/2/train_judge": 0.0,  # of the second prompt: it alone has two that are judged
            "best_of/2/heldout_judge": None,
            "kl/to_initial": 0.5,  # (1 + 1) / 2 and 0
            "length/mean_tokens": 2.0,
            "length/truncated": 0.25,
            "distinct/1": 4 / 8,
            "distinct/2": 3 / 4,  # 12 | 12 23 34
            "text/loops": 0.0,
            "text/refusals": 0.25,
            "text/entropy": 1.5,
            "evaluation/confidence": 0.95,
            "evaluation/prompts": 2,
            "evaluation/completions": 4,
            "evaluation/unjudged": 1,
        }
    )


def test_a_judge_that_compares_decides_by_its_duels_and_has_no_score() -> None:
    found = evaluation_metrics(
        lambda: [[1, 2], [3, 4]],
        {},
        {"initial": {}, "previous": {}},
        {"train_judge": {"initial": [[[1.0, 0.0]], [[None, None]]], "previous": [[[0.0, 1.0]], [[0.5, 0.5]]]}},
        None,
        prompts=2,
        truncated=0,
        bootstrap=Bootstrap(confidence=0.95, samples=100, seed=0),
    )
    assert (found["win_rate/vs_initial"], found["win_rate/vs_previous"]) == (1.0, 0.25)
    assert (found["score/train_judge"], found["kl/to_initial"], found["evaluation/unjudged"]) == (None, 0.0, 1)


def test_the_best_round_has_figures_of_its_own_only_if_it_is_not_the_previous_one() -> None:
    def found(**baselines: float) -> dict[str, float | None]:
        scores = {name: {"train_judge": [[score], [1.0]]} for name, score in baselines.items()}
        metrics = evaluation_metrics(
            lambda: [[1], [2]], {"train_judge": [[1.0], [2.0]]}, scores, {}, None, prompts=2, truncated=0, bootstrap={}
        )
        return {name: metrics[f"win_rate/vs_{name}"] for name in ("initial", "previous", "best")}

    assert found(initial=0.0, previous=1.0) == {"initial": 1.0, "previous": 0.75, "best": 0.75}
    assert found(initial=0.0, previous=1.0, best=2.0) == {"initial": 1.0, "previous": 0.75, "best": 0.5}
    assert found() == {"initial": None, "previous": None, "best": None}


def test_every_metric_with_an_interval_or_a_rule_is_one_that_an_evaluation_has() -> None:
    found = evaluation_metrics(
        lambda: [[1]],
        {"train_judge": [[1.0]], "heldout_judge": [[1.0]]},
        {name: {"train_judge": [[1.0]], "heldout_judge": [[1.0]]} for name in REFERENCES},
        {},
        None,
        prompts=1,
        truncated=0,
        thoughts=Thoughts(0, [[False]], {name: [[False]] for name in REFERENCES}),
        with_self_bleu=True,
        bootstrap={},
    )
    known = {f"{name}{end}" for name in WITH_INTERVAL for end in ENDS} | {*WITHOUT}
    assert known == found.keys() - {
        "win_rate/judge",
        *(f"evaluation/{n}" for n in ("confidence", "prompts", "completions")),
    }
    given = {"heldout_judge": True, "references": True, "other_model": True, "with_self_bleu": True}
    assert all(unmeasured(name, thinking=True, completions=1, **given) is None for name in known)


@pytest.mark.parametrize(
    ("metric", "why"),
    [
        ("kl/to_inital", "did you mean 'kl/to_initial'?"),
        ("evaluation/prompts", "no metric of the held-out evaluation"),
        ("pairs/kept", "no metric of the held-out evaluation; choose one of"),
        ("score/heldout_judge_high", "set evaluation.judge"),
        ("judges/gap_low", "set evaluation.judge"),
        ("best_of/2/heldout_judge", "set evaluation.judge"),
        (
            "best_of/4/train_judge",
            "evaluation.n = 3, which gives best_of/2/train_judge, best_of/2/heldout_judge; raise it",
        ),
        ("length/mean_reasoning_tokens", "no thinking model"),
        ("text/self_bleu", "set evaluation.self_bleu"),
        ("win_rate/vs_model_low", "set evaluation.against"),
        ("temperature/0.5/win_rate/vs_initial", "evaluation.temperatures gives no such metric"),
    ],
)
def test_a_metric_that_will_not_be_measured_is_known_with_the_remedy(metric: str, why: str) -> None:
    assert why in (unmeasured(metric, heldout_judge=False, thinking=False, completions=3) or "")
