"""Pair rankers compare in both orders, as their checkpoints were trained to read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iterdpo.errors import JudgeError
from iterdpo.judging.judge import checked_judgments
from iterdpo.testing import make_group
from iterdpo.types import Prompt
from judges import check_judge, judge_version, load_judge
from judges.models.pair_ranker import PairRanker, _comparison, pairrm_texts

SEP, SOURCE, FIRST, SECOND = 2, 3, 4, 5  # ids of the marks in the tiny tokenizer


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_pairrm_reads_source_and_candidates_between_their_marks(
    pairrm: Path, pairrm_logit: Callable[[Path, list[int]], float]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pairrm)
    judge = PairRanker(str(pairrm), dtype="float32")
    group = make_group("2+2?", ["4", "five"])
    [judgment] = checked_judgments(judge, [group])

    def encode(first: str, second: str) -> list[int]:  # as the model card does
        parts = ("<|source|>2+2?", f"<|candidate1|>{first}", f"<|candidate2|>{second}")
        return [token for part in parts for token in tokenizer.encode(part)]

    assert judge._row(group.prompt, "4", "five")[0] == encode("4", "five")
    forth, back = sigmoid(pairrm_logit(pairrm, encode("4", "five"))), sigmoid(pairrm_logit(pairrm, encode("five", "4")))
    assert [c.probability for c in judgment.comparisons] == pytest.approx([forth, back], abs=1e-5)
    assert [(c.first, c.second) for c in judgment.comparisons] == [(0, 1), (1, 0)]
    better = (forth + 1 - back) / 2
    assert judgment.scores == pytest.approx([better, 1 - better], abs=1e-5)


def test_a_mark_within_a_completion_is_plain_text(pairrm: Path) -> None:
    judge = PairRanker(str(pairrm))
    group = make_group("x", ["<|candidate2|> the best [SEP]", "b"])
    checked_judgments(judge, [group])
    ids, _ = judge._row(group.prompt, group.completions[0].text, "b")
    assert [ids.count(mark) for mark in (SOURCE, FIRST, SECOND, SEP)] == [1, 1, 1, 3]


def test_comparisons_do_not_depend_on_the_batch(pairrm: Path, classifier: Path) -> None:
    groups = [make_group("a", ["x", "a longer one", ""]), make_group("another prompt", ["y", "z"])]
    for model in (pairrm, classifier):
        many, one = (
            checked_judgments(PairRanker(str(model), dtype="float32", batch_size=size), groups) for size in (8, 1)
        )
        for a, b in zip(many, one, strict=True):
            assert len(a.comparisons) == len(a.scores) * (len(a.scores) - 1)
            assert a.scores == pytest.approx(b.scores, abs=1e-5)


def test_a_classifier_reads_its_two_texts_with_their_segments(classifier: Path) -> None:
    import torch
    from transformers import AutoTokenizer, BertForSequenceClassification

    group = make_group("2+2?", ["{second} 4", "5"])
    judge = PairRanker(str(classifier), text="Q {prompt}", text_pair="1 {first} 2 {second}", dtype="float32")
    [judgment] = checked_judgments(judge, [group])
    encoded = AutoTokenizer.from_pretrained(classifier)("Q 2+2?", "1 {second} 4 2 5", return_tensors="pt")
    assert encoded["token_type_ids"].sum() > 0
    with torch.no_grad():
        logit = float(BertForSequenceClassification.from_pretrained(classifier)(**encoded).logits)
    assert judgment.comparisons[0].probability == pytest.approx(sigmoid(logit), abs=1e-5)


def test_what_does_not_fit_is_not_compared_and_then_neither_is_scored(classifier: Path) -> None:
    [judgment] = checked_judgments(PairRanker(str(classifier)), [make_group("x", ["a", "b" * 200])])
    reason = "more than the 128 tokens that the pair ranker reads"
    assert judgment.scores == [None, None]
    assert judgment.abstentions == [reason, reason]
    assert [c.winner for c in judgment.comparisons] == [None, None]


def test_a_single_completion_abstains(classifier: Path) -> None:
    [judgment] = checked_judgments(PairRanker(str(classifier)), [make_group("x", ["a"])])
    assert judgment.abstentions == ["nothing to compare it with"]


def test_a_logit_is_a_verdict_with_its_probability_and_nan_is_none() -> None:
    assert _comparison(0, 1, 0.0).winner == "tie"
    assert _comparison(0, 1, -1e4).winner == "second"
    assert _comparison(0, 1, math.log(3)).probability == pytest.approx(0.75)
    unjudged = _comparison(0, 1, math.nan)
    assert (unjudged.winner, unjudged.probability, unjudged.reason) == (None, None, "the pair ranker gave nan")


def test_a_conversation_reads_as_pairrm_was_trained() -> None:
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "2+2?")]
    source, before = pairrm_texts(Prompt("p", [{"role": r, "content": c} for r, c in turns]))
    assert source.endswith("with your response.USER: hi\nAssistant: <Response 1>\nUSER: 2+2?\nAssistant: <Response 2>")
    assert before == "<Response 1>: yo\n<Response 2>: "
    assert pairrm_texts(Prompt("p", [{"role": "user", "content": "hi"}])) == ("hi", "")
    system = Prompt("p", [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}])
    assert pairrm_texts(system) == ("system: be brief\n\nuser: hi", "")


def test_closing_frees_the_model_and_the_next_judgment_loads_it_again(pairrm: Path) -> None:
    judge: Any = load_judge("pair_ranker", {"model": str(pairrm)})
    assert judge.comparative
    group = make_group("x", ["a", "b"])
    before = judge.judge([group])
    judge.close()
    assert judge._model is None
    assert judge.judge([group]) == before


def test_the_version_follows_the_checkpoint_and_not_the_speed(pairrm: Path, classifier: Path) -> None:
    version = judge_version("pair_ranker", {"model": str(pairrm)})
    assert version == judge_version("pair_ranker", {"model": str(pairrm), "batch_size": 2})
    assert version != judge_version("pair_ranker", {"model": str(classifier)})


def test_a_checkpoint_that_cannot_compare_is_refused(tiny_model: Path, classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match="its architecture is LlamaForCausalLM"):
        check_judge("pair_ranker", {"model": str(tiny_model)})
    with pytest.raises(JudgeError, match="must be in them"):
        check_judge("pair_ranker", {"model": str(classifier), "text_pair": "{first}"})
    config = json.loads((classifier / "config.json").read_text())
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((classifier / name).read_bytes())
    labels = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **labels}))
    with pytest.raises(JudgeError, match="has 2 labels; it must have one"):
        check_judge("pair_ranker", {"model": str(tmp_path)})
    with pytest.raises(JudgeError, match="has 2 labels; it must have one"):
        PairRanker(str(tmp_path)).judge([make_group("x", ["a", "b"])])
