"""A round's metrics, from what its steps left on disk."""

from __future__ import annotations

from typing import Any

from iterdpo.report.benchmarks import RESULTS, benchmark_metrics
from iterdpo.run.rundir import RunDir, read_json, read_jsonl, read_manifest
from iterdpo.training.launch import TRAIN_LOG

STAGES = {"sample": "completions", "judge": "judgments", "pair": "pairs", "train": "policy", "evaluate": "evaluation"}
REWARDS = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
LOGPS = ("logps/chosen", "logps/rejected", "logps/chosen_drop")
TRAINING = ("loss", *REWARDS, *LOGPS, "grad_norm", "pairs_per_second", "tokens_per_second", "mfu")


def round_metrics(run: RunDir, round: int) -> dict[str, Any]:
    """One line of metrics.jsonl, from the steps of a round. A metric is None if the round has no such stage."""
    directory = run.round_dir(round)
    steps = {name: read_manifest(directory / name) for name in STAGES.values()}
    counts = {name: manifest.counts if manifest else {} for name, manifest in steps.items()}
    seconds = {name: manifest.seconds["total"] if manifest else None for name, manifest in steps.items()}
    metrics: dict[str, Any] = {"round": round}
    if steps["evaluation"]:
        metrics |= read_json(directory / "evaluation" / "metrics.json")
    metrics |= _benchmarks(run, round)
    if read_manifest(directory / "temperatures") is not None:
        metrics |= read_json(directory / "temperatures" / "metrics.json")
    metrics["prompts/sampled"] = counts["completions"].get("prompts")
    metrics |= _left_out("prompts", counts["completions"])
    if "retired" in counts["completions"]:
        metrics["prompts/retired"] = counts["completions"]["retired"]
    metrics["completions/sampled"] = counts["completions"].get("completions")
    for name in ("kept", "tied", "unjudged", "identical", "truncated"):
        metrics[f"pairs/{name}"] = counts["pairs"].get(name)
    for name in ("fresh", "replayed", "offline"):  # of a mixture
        if name in counts["pairs"]:
            metrics[f"pairs/{name}"] = counts["pairs"][name]
    if "score_gap" in counts["pairs"]:
        metrics["pairs/score_gap"] = counts["pairs"]["score_gap"]
    if counts["pairs"].get("unmatched"):
        metrics["pairs/unmatched"] = counts["pairs"]["unmatched"]
    metrics |= _left_out("pairs", counts["pairs"])
    if "unfinished_thoughts" in counts["completions"]:  # of a thinking model
        metrics["completions/unfinished_thoughts"] = counts["completions"]["unfinished_thoughts"]
        metrics["pairs/unfinished_thoughts"] = counts["pairs"].get("unfinished_thoughts")
    log = read_jsonl(directory / "policy" / TRAIN_LOG) if steps["policy"] else []
    for name in TRAINING:
        tail = [row[name] for row in log[len(log) // 2 :] if name in row]  # the second half: the first still learns
        metrics[name] = sum(tail) / len(tail) if tail else None
    of_pairs = len(counts["pairs"].get("alarms", []))
    metrics["alarms"] = sum(len(row.get("alarms", [])) for row in log) + of_pairs if log else None
    if (directory / "policy" / "eval_metrics.json").exists():
        metrics |= read_json(directory / "policy" / "eval_metrics.json")
    for name, value in (counts["judgments"].get("metrics", {}) | counts["judgments"].get("usage", {})).items():
        metrics[f"judge/{name}"] = value
    for stage, step in STAGES.items():
        metrics[f"time/{stage}_s"] = seconds[step]
    metrics["time/judge_streamed_s"] = steps["judgments"].seconds.get("streamed") if steps["judgments"] else None
    for step in ("others", "against", "benchmarks", "other_model", "temperatures"):
        if (manifest := read_manifest(directory / step)) is not None:
            metrics[f"time/{step}_s"] = seconds[step] = manifest.seconds["total"]
    metrics["time/round_s"] = sum(s for s in seconds.values() if s is not None)
    return metrics


def _benchmarks(run: RunDir, round: int) -> dict[str, float | None]:
    """Of a round with `evaluation.benchmarks`, compared with round 0."""
    paths = [run.round_dir(t) / "benchmarks" for t in (round, 0)]
    found = [read_json(path / RESULTS) if read_manifest(path) is not None else None for path in paths]
    return benchmark_metrics(found[0], found[1] if round else None) if found[0] is not None else {}


def left_out(counts: dict[str, Any]) -> dict[str, int] | None:
    """How many rows of the data gave nothing, by reason, from a manifest's counts; None if no data were read for it."""
    if (found := counts.get("left_out")) is None:
        return None
    return {reason: entry["count"] if isinstance(entry, dict) else entry for reason, entry in found.items()}


def _left_out(name: str, counts: dict[str, Any]) -> dict[str, int | None]:
    found = left_out(counts)
    if found is None:
        return {f"{name}/left_out": None}
    each = {f"{name}/left_out/{reason}": count for reason, count in found.items()}
    return {f"{name}/left_out": sum(found.values()), **each}
