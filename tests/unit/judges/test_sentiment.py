"""The quickstart's judges tell praise from complaint."""

from __future__ import annotations

import math
import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from iterdpo.errors import JudgeError
from iterdpo.judging.judge import checked_judgments
from iterdpo.testing import make_group
from judges import check_judge, load_judge
from judges.sentiment import FEATURES, LinearSentiment, VaderSentiment, fit_linear_sentiment

PRAISE = ["wonderful", "superb", "moving", "delightful"]
COMPLAINT = ["dreadful", "boring", "awful", "clumsy"]
FILLER = ["the", "film", "was", "and", "plot", "actor", "quite"]


def reviews(count: int, seed: int) -> tuple[list[str], list[int]]:
    rng = random.Random(seed)
    labels = [k % 2 for k in range(count)]
    return [" ".join([*rng.choices(FILLER, k=8), rng.choice(PRAISE if y else COMPLAINT)]) for y in labels], labels


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    path = tmp_path_factory.mktemp("sentiment") / "judge.npz"
    texts, labels = reviews(200, seed=0)
    heldout_texts, heldout_labels = reviews(40, seed=1)
    return path, fit_linear_sentiment(
        texts, labels, path, heldout_texts=heldout_texts, heldout_labels=[*heldout_labels[:-1], 1 - heldout_labels[-1]]
    )


def test_the_fit_reports_its_accuracy_on_the_held_out_texts(fitted: tuple[Path, dict[str, float]]) -> None:
    # The words separate the classes; one of the 40 held-out labels was flipped on purpose.
    assert fitted[1] == {"accuracy": 39 / 40, "train_accuracy": 1.0, "train_texts": 200, "heldout_texts": 40}


def test_fitting_twice_gives_the_same_file_content(fitted: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    texts, labels = reviews(200, seed=0)
    fit_linear_sentiment(texts, labels, tmp_path / "again.npz", heldout_texts=texts, heldout_labels=labels)
    with np.load(fitted[0]) as first, np.load(tmp_path / "again.npz") as second:
        assert np.array_equal(first["weights"], second["weights"])
        assert first["weights"].shape == (FEATURES,)
        assert first["bias"] == second["bias"]


def test_the_linear_judge_scores_a_probability_of_prompt_and_completion_together(
    fitted: tuple[Path, dict[str, float]],
) -> None:
    judge = load_judge("judges.sentiment:LinearSentiment", {"path": str(fitted[0])})
    [judgment] = checked_judgments(judge, [make_group("the film was won", ["derful", "", " awful"])])
    good, neutral, bad = judgment.scores
    assert good is not None
    assert bad is not None
    assert neutral is not None
    assert 0 < bad < 0.3 < neutral < 0.7 < good < 1  # "won" + "derful" is the word that was learnt


def test_the_linear_score_is_the_sigmoid_of_the_weights_sum(tmp_path: Path) -> None:
    np.savez(tmp_path / "judge.npz", weights=np.full(FEATURES, 0.5, np.float32), bias=np.float64(-1.0))
    judge = LinearSentiment(str(tmp_path / "judge.npz"))
    # Two words and one pair of them: 3 * 0.5 - 1 = 0.5.
    assert judge.score("good ", "film") == pytest.approx(1 / (1 + math.exp(-0.5)))
    assert judge.score([{"role": "user", "content": "Say it"}], "good film") == judge.score("good ", "film")


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "judge.npz").write_bytes(pickle.dumps({"weights": 1}))
    with pytest.raises(JudgeError, match="no classifier of fit_linear_sentiment"):
        LinearSentiment(str(tmp_path / "judge.npz"))
    with pytest.raises(JudgeError, match="No such file"):
        LinearSentiment(str(tmp_path / "missing.npz"))


def test_vader_reads_the_completion_alone() -> None:
    judge = load_judge("judges.sentiment:VaderSentiment", {})
    [judgment] = checked_judgments(judge, [make_group("horrible, horrible", ["I love it", "I hate it", "It is"])])
    love, hate, neither = judgment.scores
    assert love is not None
    assert hate is not None
    assert -1 <= hate < -0.5 < 0.5 < love <= 1
    assert neither == 0.0
    assert isinstance(VaderSentiment().score("fine"), float)


def test_both_pass_the_check_of_a_configuration() -> None:
    check_judge("judges.sentiment:LinearSentiment", {"path": "judge.npz"})
    check_judge("judges.sentiment:VaderSentiment", {})
