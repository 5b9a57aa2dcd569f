"""Rounds of a tiny model, trained in this process, and their figures computed one row at a time in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from iterdpo.config import DPOConfig
from iterdpo.data.pairs import TokenPair, TokenPairs
from iterdpo.run.rundir import read_jsonl
from iterdpo.testing import train_spec
from iterdpo.training.models import load_policy
from iterdpo.training.train import train
from iterdpo.types import Completion

LOG_2 = 0.6931471805599453


def completion(ids: list[int]) -> Completion:
    return Completion("text", ids, [], "stop")


def random_ids(generator: torch.Generator, low: int, high: int) -> list[int]:
    length = int(torch.randint(low, high, (1,), generator=generator))
    return torch.randint(3, 259, (length,), generator=generator).tolist()


def run(
    tmp_path: Path,
    model: Path,
    pairs: Path,
    *,
    against: Path | None = None,
    carried: Path | None = None,
    eval_pairs: Path | None = None,
    **dpo: Any,
) -> Path:
    output = tmp_path / "policy.partial"
    output.mkdir(parents=True, exist_ok=True)
    settings = {"learning_rate": 1e-3, "pairs_per_step": 4, "precision": "fp32", "checkpoint_every": 2, **dpo}
    config = DPOConfig(**settings)
    spec = train_spec(
        tmp_path, model, pairs, config, reference=against, eval_pairs=eval_pairs, seed=3, optimizer=carried
    )
    train(spec)
    return output


def log_of(output: Path) -> list[dict[str, Any]]:
    return read_jsonl(output / "train_log.jsonl")


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in log_of(output)]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_policy(output).state_dict()


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two models' weights."""
    assert one.keys() == other.keys()
    return max(float((tensor.float() - other[name].float()).abs().max()) for name, tensor in one.items())


def token_pairs(pairs: Path) -> list[TokenPair]:
    source = TokenPairs(pairs, pairs.parent / "cache")
    return [source[i] for i in range(len(source))]


def terms(model: Path, pairs: Path) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """The distributions [V] that a model in float64 gives each token of chosen and rejected, one row at a time."""
    exact = load_policy(model, dtype=torch.float64).eval()

    def side(pair: TokenPair, ids: list[int]) -> list[torch.Tensor]:
        with torch.no_grad():
            logits = exact(torch.tensor([pair.prompt + ids])).logits[0]
        return list(logits[len(pair.prompt) - 1 : -1].softmax(dim=-1))

    return [(side(pair, pair.chosen), side(pair, pair.rejected)) for pair in token_pairs(pairs)]


def summed(model: Path, pairs: Path) -> list[tuple[float, float, int, int]]:
    """Log-probabilities of chosen and rejected, and their numbers of tokens."""
    found = []
    for pair, (chosen, rejected) in zip(token_pairs(pairs), terms(model, pairs), strict=True):
        w = sum(float(p[token].log()) for p, token in zip(chosen, pair.chosen, strict=True))
        r = sum(float(p[token].log()) for p, token in zip(rejected, pair.rejected, strict=True))
        found.append((w, r, len(chosen), len(rejected)))
    return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))
