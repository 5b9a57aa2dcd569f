"""A reward model on real preferences, and whether `iterdpo judge check` finds the accuracy that is there: one JSON line.

    python -m benchmarks.hh_judge --data harmless-base-test.jsonl.gz --model DIRECTORY [--rows N]

The rows of an HH-RLHF file are dealt into two halves. On the first, a linear head on the model's last hidden state is
fitted by the likelihood of Bradley and Terry, its weight decay chosen on a fifth of them. Model and head are a sequence
classifier, which the judge `reward_model` reads. `by_hand` is its accuracy on the second half by the hidden states
themselves, `checked` and `interval` are what `judge check` says of the same pairs. In float32, where the two agree to
the pair but for ties, which `judge check` counts half right.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import command_line
from iterdpo.data.rows import load_rows
from iterdpo.run.rundir import write_jsonl

TURN = "\n\nAssistant:"
DECAYS = (1e-3, 1e-2, 1e-1, 3e-1, 1.0, 3.0)


def main(*, data: str, model: str, rows: int | None = None, seed: int = 0) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    talks = list(_as_text(load_rows(data, "train", limit=rows)))
    random.Random(seed).shuffle(talks)
    halves = [talks[: len(talks) // 2], talks[len(talks) // 2 :]]
    with tempfile.TemporaryDirectory(prefix="hh-judge-") as scratch:
        held_out, judge = Path(scratch) / "held-out.jsonl", Path(scratch) / "reward-model"
        classifier = AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=1, dtype=torch.float32, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(model)
        seen, unseen = (_differences(classifier.model, tokenizer, half) for half in halves)
        weight, decay = _fitted(seen)
        with torch.no_grad():
            classifier.score.weight.copy_(weight)
        classifier.save_pretrained(judge)
        tokenizer.save_pretrained(judge)
        write_jsonl(held_out, halves[1])
        command = [sys.executable, "-m", "flows.cli", "judge", "check", "reward_model", "--data", str(held_out)]
        command += ["--args", f"model={judge}", "--json", f"{scratch}/report.json"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        accuracy = json.loads(Path(scratch, "report.json").read_text())["figures"]["accuracy"]
    line = {
        "fitted_on": len(seen),
        "decay": decay,
        "held_out": len(unseen),
        "by_hand": round(float((unseen @ weight > 0).float().mean()), 4),
        "checked": round(accuracy["value"], 4),
        "interval": [round(accuracy[bound], 4) for bound in ("low", "high")],
    }
    print(json.dumps(line))


def _as_text(rows: Iterable[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Prompt and two answers of each talk as plain text, and not as messages, for which the model has a template."""
    for row in rows:
        prompts, answers = zip(*(row[side].rsplit(TURN, 1) for side in ("chosen", "rejected")), strict=True)
        if prompts[0] == prompts[1] and all(map(str.strip, answers)) and answers[0] != answers[1]:
            yield {"prompt": prompts[0] + TURN, "chosen": answers[0], "rejected": answers[1]}


def _differences(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> Any:
    """The last hidden state of each chosen talk less that of the rejected one, [rows, width]."""
    import torch

    ids = tokenizer([row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")])["input_ids"]
    states = torch.empty(len(ids), model.config.hidden_size)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), 16):
        batch = order[start : start + 16]
        width = max(len(ids[i]) for i in batch)
        # Padded on the right, where no state before it sees the padding.
        padded = torch.tensor([ids[i] + [0] * (width - len(ids[i])) for i in batch])  # [B, T]
        with torch.inference_mode():
            found = model(input_ids=padded, use_cache=False).last_hidden_state  # [B, T, width]
        states[batch] = torch.stack([found[k, len(ids[i]) - 1] for k, i in enumerate(batch)])
        print(f"{start + len(batch):,} of {len(ids):,} talks", file=sys.stderr)
    return states[0::2] - states[1::2]


def _fitted(differences: Any) -> tuple[Any, float]:
    """Weights [width] for rows of `differences` [rows, width], and their decay."""
    import torch

    scale = differences.std(dim=0) + 1e-3
    scaled = differences / scale

    def fit(rows: Any, decay: float) -> Any:
        weight = torch.zeros(rows.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Any:
            optimizer.zero_grad()
            value = torch.nn.functional.softplus(-rows @ weight).mean() + decay * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return weight.detach()

    kept = len(scaled) * 4 // 5
    right = {d: float((scaled[kept:] @ fit(scaled[:kept], d) > 0).float().mean()) for d in DECAYS}
    decay = max(right, key=lambda d: right[d])
    return fit(scaled, decay) / scale, decay


if __name__ == "__main__":
    command_line(main, __doc__)
