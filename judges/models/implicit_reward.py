"""The policy's own implicit reward: how much likelier DPO has made a completion.

    r(x, y) = beta * (log pi(y|x) - log ref(y|x))        Eq. 5 and 6 of arXiv:2305.18290

up to beta * log Z(x), which the completions of a prompt share. With `length_normalized` it is divided by the tokens of y.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from iterdpo.data.rendering import completion_token_ids, load_tokenizer, prompt_token_ids
from iterdpo.errors import DataError, JudgeError
from iterdpo.judging.judge import JudgeBase
from iterdpo.types import Completion, CompletionGroup, Judgment, Prompt
from judges.base import Abstention, check_choice, is_number, judgments_from_outcomes
from judges.models.checkpoint import checkpoint_config

PRECISIONS = ("bf16", "fp32")


class _Row(NamedTuple):
    prompt: list[int]  # token ids
    completion: list[int]


@dataclass(eq=False, repr=False)
class ImplicitReward(JudgeBase):
    """Scores completions by a trained policy and the reference that it was trained against.

    The sampled tokens are scored, if this policy's tokenizer gives the prompt the ids that the sampler continued, and
    reads the sampled ids as the completion's text. Otherwise prompt and completion are tokenized anew, with an end token
    unless the completion was cut off.

    The first judgment loads both models, in float32 and side by side: 8 bytes for each parameter of one. `close` frees
    them.
    """

    SPEED_ONLY = frozenset({"batch_size"})
    policy: str
    """A checkpoint directory, an adapter, or a hub id."""
    reference: str
    """The same, with the same tokenizer."""
    beta: float = 0.1
    """The beta of the policy's training; it scales the scores."""
    length_normalized: bool = False
    """The mean reward of a token, instead of the sum over the completion."""
    precision: str = "bf16"
    """`bf16` (autocast) or `fp32`."""
    batch_size: int = 32
    """Completions in one forward pass; changes memory and speed."""
    trust_remote_code: bool = False
    """Run Python code that ships with the checkpoints."""

    def __post_init__(self) -> None:
        self.name = f"implicit_reward:{Path(self.policy).name}"
        self._models: list[Any] = []  # policy and reference, while they are loaded
        self._tokenizer: Any = None
        self._limit = 0

    @classmethod
    def check(cls, *_: Any, **args: Any) -> None:
        """Refuse bad arguments, and look for both checkpoints. A hub id is not looked up."""
        judge = cls(**args)
        if not is_number(judge.beta) or judge.beta <= 0:
            raise JudgeError(f"implicit reward: beta is {judge.beta!r}; it is a number above 0, that of the training")
        check_choice("implicit reward", "precision", judge.precision, PRECISIONS)
        for role, model in (("policy", judge.policy), ("reference", judge.reference)):
            if not (Path(model).expanduser() / "adapter_config.json").is_file():
                checkpoint_config(model, f"implicit reward: {role} {model}")

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        """One score for each completion.

        Raises:
            JudgeError: policy and reference have different tokenizers, or no chat template for a prompt of messages.
        """
        if self._tokenizer is None:
            self._load_tokenizer()
        found = [self._row(group, c) for group in groups for c in group.completions]
        rows = [row for row in found if not isinstance(row, Abstention)]
        rewards = iter(self._rewards(rows) if rows else ())
        return judgments_from_outcomes(groups, [row if isinstance(row, Abstention) else next(rewards) for row in found])

    def close(self) -> None:
        self._models = []
        from iterdpo.training.models import free_memory  # imports torch

        free_memory()

    def _load_tokenizer(self) -> None:
        from transformers import AutoConfig

        from iterdpo.training.models import adapter_base

        bases = [str(adapter_base(model) or model) for model in (self.policy, self.reference)]
        policy, reference = (load_tokenizer(base, trust_remote_code=self.trust_remote_code) for base in bases)
        if policy.get_vocab() != reference.get_vocab():
            wrong = "have different tokenizers, so that their log-probabilities are not of the same tokens"
            remedy = "give the reference that the policy was trained against"
            raise JudgeError(f"implicit reward: {self.policy} and {self.reference} {wrong}; {remedy}")
        configs = [AutoConfig.from_pretrained(base, trust_remote_code=self.trust_remote_code) for base in bases]
        limits = [getattr(config.get_text_config(), "max_position_embeddings", None) for config in configs]
        self._tokenizer, self._limit = policy, min((n for n in limits if n), default=1 << 30)

    def _row(self, group: CompletionGroup, completion: Completion) -> _Row | Abstention:
        before, ids = row = self._sampled(group, completion) or self._tokenized(group.prompt, completion)
        if not (before and ids):
            return Abstention(f"the {'prompt' if ids else 'completion'} has no token")
        if len(before) + len(ids) > self._limit:
            return Abstention(f"more than the {self._limit} tokens that the policy reads")
        return row

    def _sampled(self, group: CompletionGroup, completion: Completion) -> _Row | None:
        """The ids that were sampled; None if another tokenizer made them."""
        try:
            same = prompt_token_ids(self._tokenizer, group.prompt.content) == group.prompt_ids
        except DataError:  # no template, or one that refuses the messages: `_tokenized` says so
            return None
        if not same or max(completion.token_ids, default=0) >= len(self._tokenizer):
            return None
        # Ids may go on after the text: an end token, a stop string, half a character. Tags of reasoning may be special.
        ids, text = completion.answer_ids, _bare(completion.text)
        found = (_bare(self._tokenizer.decode(ids, skip_special_tokens=skipped)) for skipped in (True, False))
        if not any(decoded.startswith(text) for decoded in found):
            return None
        return _Row([*group.prompt_ids, *completion.token_ids[: completion.reasoning_tokens]], ids)

    def _tokenized(self, prompt: Prompt, completion: Completion) -> _Row:
        try:
            before = prompt_token_ids(self._tokenizer, prompt.content)
            ids = completion_token_ids(self._tokenizer, prompt.content, completion.text)
        except DataError as error:
            raise JudgeError(f"implicit reward {self.policy}: prompt {prompt.id!r}: {error}") from error
        return _Row(before, ids[:-1] if completion.truncated or completion.unfinished else ids)

    def _rewards(self, rows: Sequence[_Row]) -> list[float]:
        from iterdpo.training.logps import score_completions
        from iterdpo.training.models import load_policy

        if not self._models:
            trust = self.trust_remote_code
            self._models = [load_policy(path, trust_remote_code=trust) for path in (self.policy, self.reference)]
        prompts, completions = (list(ids) for ids in zip(*rows, strict=True))
        settings: dict[str, Any] = {"precision": self.precision, "rows_per_batch": self.batch_size}
        policy, reference = (score_completions(model, prompts, completions, **settings) for model in self._models)
        tokens = [len(completion) if self.length_normalized else 1 for completion in completions]
        return [self.beta * (p - r) / n for p, r, n in zip(policy, reference, tokens, strict=True)]


def _bare(text: str) -> str:
    """Without the blanks that a tokenizer may add or drop at the beginning, and without half characters."""
    return text.replace("\ufffd", "").strip()
