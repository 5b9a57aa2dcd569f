"""Checkpoints of Hugging Face classifiers: what is checked before one is loaded, and the loading.

`what` begins an error's message: `"reward model my-rm"`. Weights come from safetensors only, never unpickled.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from iterdpo.errors import JudgeError
from iterdpo.judging.judge import JudgeBase
from iterdpo.run.devices import check_devices, visible_gpus
from iterdpo.run.rundir import read_json
from judges.base import check_choice, nearest

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(eq=False, repr=False)
class ClassifierJudge(JudgeBase):
    """What judges that load a classifier have in common. The first judgment loads it; `close` frees its memory."""

    SPEED_ONLY = frozenset({"batch_size", "device"})
    kind: ClassVar[str]
    model: str
    """A checkpoint directory, or a hub id. Weights are read from safetensors only, never unpickled."""
    max_length: int | None = None
    """Most tokens that are read at once. Longer texts abstain; nothing is cut. Default: the model's limit."""
    batch_size: int = 16
    """Rows in one forward pass; changes memory and speed."""
    dtype: str = "auto"
    """`auto` (the checkpoint's), `float32`, `bfloat16` or `float16`."""
    device: str | None = None
    """`cuda`, `cuda:1`, `cpu`, … Default: the GPU, if there is one."""
    revision: str | None = None
    """A hub id's branch, tag or commit."""
    trust_remote_code: bool = False
    """Run Python code that ships with the checkpoint."""

    def __post_init__(self) -> None:
        self.name = f"{self.kind}:{Path(self.model).name}"
        self._what = f"{self.kind.replace('_', ' ')} {self.model}"
        self._source: dict[str, Any] = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        self._model: Any = None
        self._tokenizer: Any = None

    @classmethod
    def check(cls, *_: Any, **args: Any) -> None:
        """Refuse bad arguments, and look at the checkpoint's config.json. A hub id is not looked up.

        Raises:
            JudgeError: an unsupported argument value, no such directory, or a checkpoint that gives no scores.
        """
        judge = cls(**args)
        check_choice(judge._what, "dtype", judge.dtype, DTYPES)
        judge._check_arguments()
        if config := checkpoint_config(judge.model, judge._what):
            judge._check_config(config)

    @classmethod
    def probe(cls, *positional: Any, **args: Any) -> None:
        """Look for the device.

        Raises:
            JudgeError: there is no such GPU.
        """
        judge = cls(*positional, **args)
        kind, _, number = str(judge.device or "cpu").partition(":")
        there = len(visible_gpus())
        if kind == "cuda" and int(number if number.isdecimal() else 0) >= there:
            raise JudgeError(
                f"{judge._what}: device is {judge.device!r}, but {there} GPUs are visible; leave `device` out"
            )
        engine = getattr(judge, "engine", None) or {}
        check_devices(engine.get("tensor_parallel_size", 1), f"{judge._what}: engine.tensor_parallel_size")

    def close(self) -> None:
        self._model = self._tokenizer = None
        from iterdpo.training.models import free_memory  # imports torch

        free_memory()

    @abstractmethod
    def _check_arguments(self) -> None:
        """Refuse bad arguments that only this judge has."""

    @abstractmethod
    def _check_config(self, config: dict[str, Any]) -> None:
        """Refuse a checkpoint whose config.json shows that it gives no scores."""

    def _load_config_and_tokenizer(self) -> tuple[Any, Any]:
        from transformers import AutoConfig, AutoTokenizer

        with self._as_judge_error():
            config = AutoConfig.from_pretrained(self.model, **self._source)
            return config, AutoTokenizer.from_pretrained(self.model, **self._source)

    def _load_classifier(self, kind: Any, **source: Any) -> Any:
        import torch

        source |= {"dtype": self.dtype, "use_safetensors": True, "output_loading_info": True}
        with self._as_judge_error():
            model, report = kind.from_pretrained(self.model, **source)
        if missing := ", ".join(sorted(report["missing_keys"])[:3]):
            remedy = "give a checkpoint whose head was trained"
            raise JudgeError(f"{self._what}: has no weights for {missing}, which would be random; {remedy}")
        return model.to(self.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()

    @contextmanager
    def _as_judge_error(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise JudgeError(f"{self._what}: cannot be loaded: {error}") from error

    def _token_limit(self, config: Any, tokenizer: Any) -> int:
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        return min(n for n in (self.max_length, positions, tokenizer.model_max_length) if n)

    def _batches(self, rows: Iterable[int]) -> Iterator[list[int]]:
        rest = iter(rows)
        return iter(lambda: list(islice(rest, self.batch_size)), [])


def checkpoint_config(model: str, what: str) -> dict[str, Any] | None:
    """The config.json of the checkpoint directory `model`; None for a hub id, which is not looked up.

    Raises:
        JudgeError: no such directory, or no checkpoint with safetensors weights there.
    """
    path = Path(model).expanduser()
    if not path.is_dir():
        nested = len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir())  # a hub id is `owner/name`
        if nested or path.is_absolute() or path.is_file() or str(model).startswith("."):
            beside = sorted(p.name for p in path.parent.iterdir() if p.is_dir()) if path.parent.is_dir() else []
            raise JudgeError(f"{what}: no such directory; {nearest(path.name, beside, 'directories there')}")
        return None
    if not (path / "config.json").is_file():
        raise JudgeError(f"{what}: no config.json there; give the directory of a Hugging Face checkpoint")
    if not list(path.glob("*.safetensors")):
        raise JudgeError(f"{what}: has no .safetensors file; convert its weights, which are never unpickled")
    config: dict[str, Any] = read_json(path / "config.json")
    return config


def label_count(config: Mapping[str, Any]) -> int:
    """The labels of a config.json, which leaves them out if they are two."""
    return len(config.get("id2label", ())) or int(config.get("num_labels", 2))


def check_architecture(what: str, architectures: Sequence[str] | None, known: Sequence[str], remedy: str) -> None:
    """Refuse a checkpoint none of whose architectures has one of `known` in its name."""
    if not any(part in name for name in architectures or () for part in known):
        found = ", ".join(architectures or ["none"])
        raise JudgeError(f"{what}: its architecture is {found}, which gives no scores; use {remedy}")
