"""Scores by a reward model: any Hugging Face sequence-classification checkpoint.

The score is the logit of the one label, or `logit[1] - logit[0]`, the log-odds of label 1, if there are two. Of
several labels it is one, or their weighted sum.

A reward model that writes its verdict is a language model: `use: pairwise` or `use: rubric`, with `serve`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from iterdpo.errors import JudgeError
from iterdpo.types import CompletionGroup, Judgment, Prompt, template_settings
from judges.base import Abstention, check_choice, is_number, judgments_from_outcomes
from judges.models.checkpoint import ClassifierJudge, check_architecture, label_count
from judges.models.vllm_pooling import Pooler, Start

BACKENDS = ("transformers", "vllm")
ARCHITECTURES = ("SequenceClassification", "RewardModel")
REMEDY = "a checkpoint of a ...ForSequenceClassification"


@dataclass(eq=False, repr=False)
class RewardModelJudge(ClassifierJudge):
    """Scores completions with a sequence classifier, in batches of similar length.

    A prompt of messages goes through the checkpoint's own chat template; a plain prompt and its completion are
    joined as they are. Nothing is truncated: a completion that does not fit abstains.
    """

    kind = "reward_model"
    weights: list[float] | None = None
    """One number a label; the score is the sum of weight times logit."""
    head: int | None = None
    """The label whose logit is the score, from 0. Not with `weights`."""
    backend: str = "transformers"
    """`transformers`, or `vllm`: vLLM's pooling runner in a separate process, for large models. The logits differ only
    by rounding. `device` is for `transformers`."""
    engine: dict[str, Any] | None = None
    """Further keyword arguments of `vllm.LLM`, such as `{gpu_memory_utilization: 0.5}`. For `vllm`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._config: Any = None
        self._names_pad = False

    def _check_arguments(self) -> None:
        what, weights, head = self._what, self.weights, self.head
        check_choice(what, "backend", self.backend, BACKENDS)
        if weights is not None and head is not None:
            raise JudgeError(f"{what}: has both weights and head; a score comes from either")
        if weights is not None and not (isinstance(weights, list) and weights and all(map(is_number, weights))):
            raise JudgeError(f"{what}: weights is {weights!r}; it is a list with a number for each label")
        if head is not None and (not isinstance(head, int) or head < 0):
            raise JudgeError(f"{what}: head is {head!r}; it is the number of a label, from 0")
        for name, value, owner in (("device", self.device, "transformers"), ("engine", self.engine, "vllm")):
            if value is not None and self.backend != owner:
                raise JudgeError(f"{what}: {name} is for `backend: {owner}`, not {self.backend}; leave it out")

    def _check_config(self, config: dict[str, Any]) -> None:
        check_architecture(self._what, config.get("architectures"), ARCHITECTURES, REMEDY)
        self._check_labels(label_count(config))

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        """One score for each completion. The first call loads the model.

        Raises:
            JudgeError: the checkpoint is no reward model, or has no chat template for a prompt of messages.
        """
        if self._model is None:
            self._load()
        limit = self._token_limit(self._config, self._tokenizer)
        rows = [self._token_ids(g.prompt, c.text) for g in groups for c in g.completions]
        long = Abstention(f"more than the {limit} tokens that the reward model reads")
        outcomes: list[Any] = [long if row else Abstention("neither prompt nor completion has a token") for row in rows]
        readable = sorted((i for i, row in enumerate(rows) if 0 < len(row) <= limit), key=lambda i: len(rows[i]))
        if isinstance(self._model, Pooler):
            logits = self._model.logits([rows[i] for i in readable]) if readable else []
        else:
            logits = [row for batch in self._batches(readable) for row in self._logits([rows[i] for i in batch])]
        for i, row in zip(readable, logits, strict=True):
            outcomes[i] = self._score(row)
        return judgments_from_outcomes(groups, outcomes)

    def close(self) -> None:
        if isinstance(self._model, Pooler):
            self._model.close()
        super().close()

    def _load(self) -> None:
        self._config, self._tokenizer = self._load_config_and_tokenizer()
        self._check_labels(self._config.num_labels)
        if self.backend == "vllm":
            check_architecture(self._what, self._config.architectures, ARCHITECTURES, REMEDY)
            limit = self._token_limit(self._config, self._tokenizer)
            self._model = Pooler(Start(self.model, limit, self.dtype, **self._source, engine=self.engine or {}))
        else:
            from transformers import AutoModelForSequenceClassification

            self._model = self._load_classifier(AutoModelForSequenceClassification, **self._source)
            self._names_pad = self._model.config.get_text_config().pad_token_id is not None

    def _check_labels(self, count: int) -> None:
        if self.weights is not None and len(self.weights) != count:
            raise JudgeError(f"{self._what}: has {count} labels, but there are {len(self.weights)} weights")
        if self.head is not None and self.head >= count:
            raise JudgeError(f"{self._what}: has {count} labels, numbered from 0, but head is {self.head}")
        if self.weights is None and self.head is None and count not in (1, 2):
            remedy = f"With more, give `weights`, a list of {count} numbers, or `head`, the number of one"
            few = "a score comes from one label, or from the log-odds of two"
            raise JudgeError(f"{self._what}: has {count} labels; {few}. {remedy}")

    def _token_ids(self, prompt: Prompt, completion: str) -> list[int]:
        tokenizer = self._tokenizer
        if isinstance(prompt.content, str):
            ids = list(tokenizer(prompt.content + completion)["input_ids"])
            bos = tokenizer.bos_token_id
            return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids  # the text brought a BOS of its own
        if tokenizer.chat_template is None:
            wrong = f"its tokenizer has no chat template, but prompt {prompt.id!r} is a list of messages"
            raise JudgeError(f"{self._what}: {wrong}; use plain-text prompts, or a reward model for chats")
        messages = [*prompt.content, {"role": "assistant", "content": completion}]
        # The template writes the special tokens; the tokenizer, which would add them again, is told not to.
        tools = template_settings(prompt.content).get("tools")
        try:
            return list(tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False))
        except Exception as error:  # whatever a template raises
            raise JudgeError(f"{self._what}: its chat template refuses prompt {prompt.id!r}: {error}") from error

    def _score(self, logits: list[float]) -> float:  # [labels]
        if self.weights is not None:
            return sum(w * x for w, x in zip(self.weights, logits, strict=True))
        if self.head is not None:
            return logits[self.head]
        return logits[0] if len(logits) == 1 else logits[1] - logits[0]

    def _logits(self, rows: list[list[int]]) -> list[list[float]]:
        """Logits [rows][labels], padded on the right: there positions start at 0 and causal attention sees no pad."""
        import torch

        config = self._model.config.get_text_config()
        width = max(map(len, rows))
        # A classifier head reads the last token that is not the pad token. A checkpoint that names no pad token
        # reads the very last one, so its padding must be an id that no row has.
        if not self._names_pad:
            used = set().union(*rows)
            config.pad_token_id = next(i for i in range(config.vocab_size) if i not in used)
        input_ids = torch.tensor([row + [config.pad_token_id] * (width - len(row)) for row in rows])  # [B, T]
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])  # [B, T]
        device = self._model.device
        with torch.inference_mode():
            output = self._model(input_ids=input_ids.to(device), attention_mask=mask.to(device))
        values: list[list[float]] = output.logits.float().tolist()
        return values
