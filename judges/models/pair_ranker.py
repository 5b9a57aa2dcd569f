"""Compares completions by a cross-encoder: a small model that reads a prompt with two completions.

Two kinds of checkpoint are known: PairRM in its Hugging Face form (`llm-blender/PairRM-hf`), and any sequence classifier
whose one logit says that the first of two completions is better, with the texts that it was trained on.

A model that writes which one is better is a language model: `use: pairwise`, with `serve`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from iterdpo.errors import JudgeError
from iterdpo.judging.comparisons import judgment_from_comparisons
from iterdpo.stats import sigmoid
from iterdpo.types import Comparison, CompletionGroup, Judgment, Prompt
from judges.models.checkpoint import ClassifierJudge, check_architecture, label_count

PAIRRM_TOKENS = 2048
"""What PairRM was trained on at most: 1,224 tokens of a prompt and 412 of each completion."""
PAIRRM_KEYS = {"source_prefix_id", "cand1_prefix_id"}
REMEDY = "PairRM in its Hugging Face form (llm-blender/PairRM-hf), or a ...ForSequenceClassification that compares"
PLACES = re.compile(r"\{(prompt|first|second)\}")


@dataclass(eq=False, repr=False)
class PairRanker(ClassifierJudge):
    """Every two completions of a prompt in both orders, each with the probability that the first is better.

    A completion's score is its mean probability of being better than another one of the prompt, over both orders. Marks
    and other special tokens within a text are read as plain text. Nothing is cut: two completions that do not fit are not
    compared, and then neither has a score.
    """

    kind = "pair_ranker"
    comparative = True
    _pairrm = False
    text: str = "{prompt}"
    """The text that a classifier reads, with {prompt}, {first} and {second} in their places. PairRM has its own form."""
    text_pair: str | None = "Response A: {first}\n\nResponse B: {second}"
    """Its second text, which the tokenizer sets off from the first; null if it reads a single one."""

    def _check_arguments(self) -> None:
        if not {"first", "second"} <= set(PLACES.findall(f"{self.text}{self.text_pair or ''}")):
            raise JudgeError(f"{self._what}: text and text_pair lack {{first}} or {{second}}; both must be in them")

    def _check_config(self, config: dict[str, Any]) -> None:
        if not config.keys() >= PAIRRM_KEYS:
            check_architecture(self._what, config.get("architectures"), ["SequenceClassification"], REMEDY)
            _check_one_label(self._what, label_count(config))

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        """One judgment for each group. The first call loads the model.

        Raises:
            JudgeError: the checkpoint cannot compare.
        """
        if self._model is None:
            self._load()
        orders = [itertools.permutations(range(len(g.completions)), 2) for g in groups]
        asked = [(place, i, j) for place, pairs in enumerate(orders) for i, j in pairs]
        texts = [[c.text for c in g.completions] for g in groups]
        rows = [self._row(groups[place].prompt, texts[place][i], texts[place][j]) for place, i, j in asked]
        limit = self._limit()
        readable = sorted((n for n, row in enumerate(rows) if len(row[0]) <= limit), key=lambda n: len(rows[n][0]))
        logits: dict[int, float] = {}
        for batch in self._batches(readable):
            logits |= zip(batch, self._logits([rows[n] for n in batch]), strict=True)
        long = f"more than the {limit} tokens that the pair ranker reads"
        compared: list[list[Comparison]] = [[] for _ in groups]
        for n, (place, i, j) in enumerate(asked):
            compared[place].append(_comparison(i, j, logits[n]) if n in logits else Comparison(i, j, None, long))
        return [judgment_from_comparisons(g, comparisons) for g, comparisons in zip(groups, compared, strict=True)]

    def _load(self) -> None:
        config, tokenizer = self._load_config_and_tokenizer()
        self._pairrm = config.to_dict().keys() >= PAIRRM_KEYS
        if self._pairrm:
            from judges.models.pairrm import PairRM

            model = self._load_classifier(PairRM, revision=self.revision)  # PairRM is ours: no code to trust
        else:
            from transformers import AutoModelForSequenceClassification

            _check_one_label(self._what, config.num_labels)
            model = self._load_classifier(AutoModelForSequenceClassification, **self._source)
        if tokenizer.pad_token_id is None:
            raise JudgeError(f"{self._what}: its tokenizer has no pad token; set one in tokenizer_config.json")
        self._model, self._tokenizer = model, tokenizer

    def _limit(self) -> int:
        if self._pairrm:
            return self.max_length or PAIRRM_TOKENS
        return self._token_limit(self._model.config, self._tokenizer)

    def _row(self, prompt: Prompt, first: str, second: str) -> tuple[list[int], list[int]]:
        """Token ids of one comparison, and which text each belongs to (empty if the model does not tell)."""
        # Special tokens in a text are that text's: a completion could write the mark of another one.
        plain = {"split_special_tokens": True}
        tokenizer = self._tokenizer
        if self._pairrm:
            config = self._model.config
            marks = (config.source_prefix_id, config.cand1_prefix_id, config.cand2_prefix_id)
            source, before = pairrm_texts(prompt)
            ids: list[int] = []
            for mark, text in zip(marks, (source, before + first, before + second), strict=True):
                encoded = tokenizer(text, add_special_tokens=False, **plain)["input_ids"]
                ids += [tokenizer.cls_token_id, mark, *encoded, tokenizer.sep_token_id]
            return ids, []
        fill = {"prompt": prompt.text, "first": first, "second": second}
        filled = [PLACES.sub(lambda place: fill[place[1]], form) for form in (self.text, self.text_pair) if form]
        encoded = tokenizer(*filled, **plain)
        return list(encoded["input_ids"]), list(encoded.get("token_type_ids") or [])

    def _logits(self, rows: list[tuple[list[int], list[int]]]) -> list[float]:
        import torch

        columns = {"input_ids": [ids for ids, _ in rows]}
        if rows[0][1]:
            columns["token_type_ids"] = [types for _, types in rows]
        batch = self._tokenizer.pad(columns, padding_side="right", return_tensors="pt").to(self._model.device)  # [B, T]
        with torch.inference_mode():
            logits = self._model(**batch)
        values: list[float] = (logits if self._pairrm else logits.logits[:, 0]).float().tolist()
        return values


def pairrm_texts(prompt: Prompt) -> tuple[str, str]:
    """What PairRM reads as the source, and what it reads before a completion's text, as it was trained.

    One question is its own text. Of a conversation the source has the questions, with places for the answers, and a
    candidate has all answers, the earlier ones of which the two share. Other prompts are read as a person does.
    """
    if isinstance(prompt.content, str):
        return prompt.content, ""
    roles = [message["role"] for message in prompt.content]
    texts = [message["content"] for message in prompt.messages]
    if roles == ["user"]:
        return texts[0], ""
    if not roles or roles != (["user", "assistant"] * len(roles))[: len(roles)] or roles[-1] != "user":
        return prompt.text, ""
    asked = "\n".join(f"USER: {text}\nAssistant: <Response {n}>" for n, text in enumerate(texts[::2], start=1))
    answered = "".join(f"<Response {n}>: {text}\n" for n, text in enumerate(texts[1::2], start=1))
    # The spelling is that of its training data.
    instruction = "Finish the following coversation in each i-th turn by filling in <Response i> with your response."
    return instruction + asked, f"{answered}<Response {len(texts[::2])}>: "


def _comparison(first: int, second: int, logit: float) -> Comparison:
    if not math.isfinite(logit):
        return Comparison(first, second, None, f"the pair ranker gave {logit}")
    probability = sigmoid(logit)
    winner = "first" if logit > 0 else "second" if logit < 0 else "tie"
    return Comparison(first, second, winner, probability=probability)  # type: ignore[arg-type]


def _check_one_label(what: str, count: int) -> None:
    if count != 1:
        raise JudgeError(f"{what}: has {count} labels; it must have one, whose logit says that the first is better")
