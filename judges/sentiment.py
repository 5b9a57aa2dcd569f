"""Two judges of sentiment for the quickstart: a linear classifier, and VADER's lexicon, which is never fitted.

`fit_linear_sentiment` fits a logistic regression on hashed word 1- and 2-grams, each weighted by its log-odds ratio
between the classes (Wang and Manning 2012, "Baselines and Bigrams"). The two weights multiply, so that one vector is
all there is to store: plain numbers in an .npz file, nothing that is unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iterdpo.errors import JudgeError, UserError
from iterdpo.types import Message

FEATURES = 2**20
REMEDY = "pip install 'iterdpo[quickstart]'"


class LinearSentiment:
    """The probability, in [0, 1], that the text is positive, by a classifier that `fit_linear_sentiment` wrote to `path`.

    The text is the prompt and the completion together, as the classifier of the DPO paper reads the whole review
    (Sec. 6.1 of arXiv:2305.18290): a completion starts in the middle of a sentence, or even of a word, and "not" may
    stand before it. All completions of a prompt share what the prompt adds. Of a chat, it is the completion alone.

    Raises:
        JudgeError: no such file, or one of another kind.
    """

    def __init__(self, path: str) -> None:
        import numpy as np

        try:
            with np.load(path, allow_pickle=False) as stored:
                self.weights, self.bias = stored["weights"], float(stored["bias"])
        except (OSError, ValueError, KeyError) as error:
            raise JudgeError(f"LinearSentiment: {path}: no classifier of fit_linear_sentiment: {error}") from None
        self.vectorizer = _vectorizer()

    def score(self, prompt: str | list[Message], completion: str) -> float:
        text = prompt + completion if isinstance(prompt, str) else completion
        logit = float((self.vectorizer.transform([text]) @ self.weights)[0]) + self.bias
        return 0.5 * (1.0 + math.tanh(0.5 * logit))  # the sigmoid, which cannot overflow


class VaderSentiment:
    """VADER's compound score of the completion, in [-1, 1]: a lexicon of 7,500 rated words with rules for negation."""

    def __init__(self) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError:
            raise UserError(f"VaderSentiment needs the package vaderSentiment; {REMEDY}") from None
        self.analyzer = SentimentIntensityAnalyzer()

    def score(self, completion: str) -> float:
        return float(self.analyzer.polarity_scores(completion)["compound"])


def fit_linear_sentiment(
    texts: Sequence[str],
    labels: Sequence[int],
    path: Path,
    *,
    heldout_texts: Sequence[str],
    heldout_labels: Sequence[int],
) -> dict[str, float]:
    """Fit on `texts` (label 1 is positive, 0 negative), write the .npz file, and measure it on the held-out texts.

    Deterministic: the problem is convex, and no random number is drawn. Returns
    `{"accuracy": 0.79, "train_accuracy": 0.86, "train_texts": 87000, "heldout_texts": 2000}`.
    """
    import numpy as np

    vectorizer = _vectorizer()
    from sklearn.linear_model import LogisticRegression

    positive = np.asarray(labels) == 1
    features = vectorizer.transform(texts)  # [texts, FEATURES], 1 where the text has the n-gram
    counts = [1.0 + np.asarray(features[rows].sum(axis=0)).ravel() for rows in (positive, ~positive)]
    ratios = np.log(counts[0] / counts[0].sum()) - np.log(counts[1] / counts[1].sum())  # [FEATURES]
    model = LogisticRegression(C=0.05, max_iter=200, tol=1e-3).fit(features.multiply(ratios).tocsr(), positive)
    weights = (ratios * model.coef_[0]).astype(np.float32)
    bias = float(model.intercept_[0])
    with open(path, "wb") as file:
        np.savez(file, weights=weights, bias=np.float64(bias))

    def accuracy(x: Any, truth: Any) -> float:
        return round(float(((x @ weights + bias > 0) == truth).mean()), 4)

    return {
        "accuracy": accuracy(vectorizer.transform(heldout_texts), np.asarray(heldout_labels) == 1),
        "train_accuracy": accuracy(features, positive),
        "train_texts": len(texts),
        "heldout_texts": len(heldout_texts),
    }


def _vectorizer() -> Any:
    try:
        from sklearn.feature_extraction.text import HashingVectorizer
    except ImportError:
        raise UserError(f"the linear sentiment judge needs the package scikit-learn; {REMEDY}") from None
    return HashingVectorizer(
        n_features=FEATURES,
        ngram_range=(1, 2),
        binary=True,
        norm=None,
        alternate_sign=False,  # counts of colliding n-grams add up instead of cancelling: the ratios need counts
        token_pattern=r"(?u)\b\w[\w']*\b|[!?]",
    )
