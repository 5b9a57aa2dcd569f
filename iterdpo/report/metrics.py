"""One line of metrics.jsonl, from what the steps of a round left on disk."""

from __future__ import annotations

from typing import Any

from iterdpo.run.rundir import RunDir, read_json, read_jsonl, read_manifest
from iterdpo.training.launch import TRAIN_LOG


def round_metrics(run: RunDir, round: int) -> dict[str, Any]:
    """One line of metrics.jsonl, from the steps of a round. A metric is None if the round has no such stage."""
    directory = run.round_dir(round)
    steps = {
        name: read_manifest(directory / name) for name in ("completions", "judgments", "pairs", "policy", "evaluation")
    }
    counts = {name: manifest.counts if manifest else {} for name, manifest in steps.items()}
    seconds = {name: manifest.seconds["total"] if manifest else None for name, manifest in steps.items()}
    metrics: dict[str, Any] = {"round": round}
    if steps["evaluation"]:
        metrics |= read_json(directory / "evaluation" / "metrics.json")
    metrics["prompts/sampled"] = counts["completions"].get("prompts")
    metrics["completions/sampled"] = counts["completions"].get("completions")
    for name in ("kept", "tied", "unjudged", "identical", "truncated"):
        metrics[f"pairs/{name}"] = counts["pairs"].get(name)
    log = read_jsonl(directory / "policy" / TRAIN_LOG) if steps["policy"] else []
    names = (
        "loss",
        "rewards/accuracies",
        "rewards/margins",
        "rewards/chosen",
        "rewards/rejected",
        "logps/chosen",
        "logps/rejected",
        "logps/chosen_drop",
        "grad_norm",
        "pairs_per_second",
        "tokens_per_second",
        "mfu",
    )
    for name in names:
        tail = [row[name] for row in log[len(log) // 2 :] if name in row]  # the second half: the first still learns
        metrics[name] = sum(tail) / len(tail) if tail else None
    metrics["alarms"] = sum(len(row.get("alarms", [])) for row in log) if log else None
    if (directory / "policy" / "eval_metrics.json").exists():
        metrics |= read_json(directory / "policy" / "eval_metrics.json")
    for name, value in (counts["judgments"].get("metrics", {}) | counts["judgments"].get("usage", {})).items():
        metrics[f"judge/{name}"] = value
    stages = {
        "sample": "completions",
        "judge": "judgments",
        "pair": "pairs",
        "train": "policy",
        "evaluate": "evaluation",
    }
    for stage, step in stages.items():
        metrics[f"time/{stage}_s"] = seconds[step]
    metrics["time/judge_streamed_s"] = steps["judgments"].seconds.get("streamed") if steps["judgments"] else None
    metrics["time/round_s"] = sum(s for s in seconds.values() if s is not None)
    return metrics
