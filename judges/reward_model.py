"""Scores by a reward model: any Hugging Face sequence-classification checkpoint with one label, or with two.

The score is the logit of the one label, or `logit[1] - logit[0]`, the log-odds of label 1, where there are two.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iterdpo.errors import JudgeError
from iterdpo.rundir import read_json
from iterdpo.types import CompletionGroup, Judgment, Prompt
from judges.custom import Abstention, judgment_from_outcomes, nearest

DTYPES = ("auto", "float32", "bfloat16", "float16")


class RewardModelJudge:
    """Scores completions with a sequence classifier, in batches of similar length.

    A prompt of messages goes through the checkpoint's own chat template; a plain prompt and its completion are
    joined as they are. Nothing is truncated: a completion that does not fit abstains. `load_judge` sets the version.

    Args:
        model: a checkpoint directory, or a hub id. Weights are read from safetensors only, never unpickled.
        batch_size: completions in one forward pass; changes memory and speed.
        max_length: most tokens of prompt and completion together. Default: what the model allows.
        dtype: `auto` (the checkpoint's), `float32`, `bfloat16` or `float16`.
        device: `cuda`, `cuda:1`, `cpu`, … Default: the GPU, where there is one.
        revision: a hub id's branch, tag or commit.
        trust_remote_code: run Python code that ships with the checkpoint.
    """

    def __init__(
        self,
        model: str,
        batch_size: int = 16,
        max_length: int | None = None,
        dtype: str = "auto",
        device: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.name = f"reward_model:{Path(model).name}"
        self.version = ""
        self.path = str(model)
        self.batch_size = batch_size
        self.max_length = max_length
        self.dtype = dtype
        self.device = device
        self.source = {"revision": revision, "trust_remote_code": trust_remote_code}
        self._model: Any = None
        self._tokenizer: Any = None
        self._names_pad = False

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        """One score for each completion. The first call loads the model.

        Raises:
            JudgeError: the checkpoint is no reward model, or has no chat template for a prompt of messages.
        """
        if self._model is None:
            self._load()
        limit = self._limit()
        rows = [self._token_ids(g.prompt, c.text) for g in groups for c in g.completions]
        outcomes: list[Any] = [
            Abstention(f"{len(row)} tokens, and the reward model reads 1 to {limit}") for row in rows
        ]
        readable = sorted((i for i, row in enumerate(rows) if 0 < len(row) <= limit), key=lambda i: len(rows[i]))
        for start in range(0, len(readable), self.batch_size):
            batch = readable[start : start + self.batch_size]
            for i, score in zip(batch, self._scores([rows[i] for i in batch]), strict=True):
                outcomes[i] = score
        rest = iter(outcomes)
        return [judgment_from_outcomes(g, [next(rest) for _ in g.completions]) for g in groups]

    def close(self) -> None:
        """Free the model's memory. The next judgment loads it again."""
        self._model = self._tokenizer = None
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                self.path, dtype=self.dtype, use_safetensors=True, output_loading_info=True, **self.source
            )
            tokenizer = AutoTokenizer.from_pretrained(self.path, **self.source)
        except (OSError, ValueError) as error:
            raise JudgeError(f"reward model {self.path}: cannot be loaded: {error}") from error
        if report["missing_keys"]:
            raise JudgeError(
                f"reward model {self.path}: has no weights for {', '.join(sorted(report['missing_keys'])[:3])}, which "
                "would be random; give a checkpoint that was trained as a sequence classifier"
            )
        _check_labels(self.path, model.config.num_labels)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model, self._tokenizer = model.to(device).eval(), tokenizer
        self._names_pad = model.config.get_text_config().pad_token_id is not None

    def _limit(self) -> int:
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return min(n for n in (self.max_length, positions, self._tokenizer.model_max_length) if n)

    def _token_ids(self, prompt: Prompt, completion: str) -> list[int]:
        tokenizer = self._tokenizer
        if isinstance(prompt.content, str):
            ids = list(tokenizer(prompt.content + completion)["input_ids"])
            bos = tokenizer.bos_token_id
            return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids  # the text brought a BOS of its own
        if tokenizer.chat_template is None:
            raise JudgeError(
                f"reward model {self.path}: its tokenizer has no chat template, and prompt {prompt.id!r} is a list of "
                "messages; use plain-text prompts, or a reward model for chats"
            )
        messages = [*prompt.content, {"role": "assistant", "content": completion}]
        # The template writes the special tokens; the tokenizer, which would add them again, is told not to.
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))

    def _scores(self, rows: list[list[int]]) -> list[float]:
        """Scores of token id sequences, padded on the right: there positions start at 0 and causal attention sees no pad."""
        import torch

        config = self._model.config.get_text_config()
        width = max(map(len, rows))
        # A classifier head reads the last token that is not the pad token. A checkpoint that names no pad token
        # reads the very last one, so its padding must be an id that no row has.
        if not self._names_pad:
            used = set().union(*rows)
            config.pad_token_id = next(i for i in range(config.vocab_size) if i not in used)
        input_ids = torch.full((len(rows), width), config.pad_token_id)  # [B, T]
        mask = torch.zeros((len(rows), width), dtype=torch.long)  # [B, T]
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        device = self._model.device
        with torch.inference_mode():
            logits = self._model(
                input_ids=input_ids.to(device), attention_mask=mask.to(device)
            ).logits.float()  # [B, labels]
        scores = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
        return scores.tolist()


def check_reward_model(model: str, dtype: str = "auto", **_: Any) -> None:
    """Look at a checkpoint's config.json, without loading it. What may be a hub id is not looked up.

    Raises:
        JudgeError: no such directory, what is there is no sequence classifier with one or two labels, or no such dtype.
    """
    if dtype not in DTYPES:
        raise JudgeError(f"reward model {model}: dtype is {dtype!r}; it is one of {', '.join(DTYPES)}")
    path = Path(model).expanduser()
    if not path.is_dir():
        nested = len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir())  # a hub id is `owner/name`
        if nested or path.is_absolute() or path.is_file() or str(model).startswith("."):
            beside = sorted(p.name for p in path.parent.iterdir() if p.is_dir()) if path.parent.is_dir() else []
            raise JudgeError(
                f"reward model {model}: no such directory; {nearest(path.name, beside, 'directories there')}"
            )
        return
    if not (path / "config.json").is_file():
        raise JudgeError(f"reward model {model}: no config.json there; give the directory of a Hugging Face checkpoint")
    config = read_json(path / "config.json")
    architectures = config.get("architectures") or ["none"]
    if not any("SequenceClassification" in name or "RewardModel" in name for name in architectures):
        raise JudgeError(
            f"reward model {model}: its architecture is {', '.join(architectures)}, which gives no scores; give a "
            "checkpoint of a ...ForSequenceClassification"
        )
    if not list(path.glob("*.safetensors")):
        raise JudgeError(
            f"reward model {model}: has no .safetensors file; convert its weights, which are never unpickled"
        )
    _check_labels(model, len(config.get("id2label", ())) or config.get("num_labels", 2))


def _check_labels(model: str, count: int) -> None:
    if count not in (1, 2):
        raise JudgeError(
            f"reward model {model}: has {count} labels; a score comes from one label, or from the log-odds of two"
        )
