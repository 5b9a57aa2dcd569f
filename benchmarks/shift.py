"""How far offline pairs are from a policy that has moved, and what training on them still teaches it.

    python -m benchmarks.shift runs/iterative-vs-offline [--arms iterative offline] [--seeds 0 1] [--rounds 2 3] [--out DIR]

Reads a finished `iterdpo compare`. The policy that starts round t of the first arm is given several kinds of pairs of
that round's prompts: its own, which are the round's pairs; those of each further arm, of which an offline one's were sampled
by the initial policy and an iterative one's by another policy that has moved; and, if the arm's rounds have the same
prompts, those of its earlier rounds. Of each kind:

- `logp_chosen`, `logp_rejected`: the policy's log-probability of a completion, in nats a token.
- `weight`: the mean of sigmoid(-margin), by which DPO multiplies a pair's gradient (arXiv:2305.18290, Section 4). The
  margin is beta times the difference of the log-ratios to the pairs' own reference, in the experiments that ship the
  initial policy. Before any training the weight is 0.5.
- `learned`, `accuracy`: the policy is trained on the pairs of one half of the prompts, from a margin of 0 and with the
  arm's other settings. By how many nats the loss of its own pairs of the other half falls from log 2, and the share of
  these whose margin has the right sign then.

Prints a line of JSON a seed and round, and keeps it in `shift.jsonl`, from which the command goes on. At the end it prints
the means over seeds, with Student's 95 % intervals of the differences, and draws `shift.png`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from benchmarks.harness import command_line, fresh
from iterdpo.config import Config, DPOConfig, parse_config
from iterdpo.data.pairs import TRAIN
from iterdpo.report.plots import BLUE, GREEN, ORANGE, PURPLE, SKY, Panel, as_png, figure
from iterdpo.run.read import Run, read_run
from iterdpo.run.rundir import read_json, read_jsonl
from iterdpo.stats import student_interval
from iterdpo.testing import train_spec

OWN = "own"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY)
FIGURES = ("logp_chosen", "logp_rejected", "weight", "learned", "accuracy")

Row = dict[str, Any]


def main(
    experiment: Path,
    *,
    arms: tuple[str, ...] = ("iterative", "offline"),
    seeds: tuple[int, ...] = (),
    rounds: tuple[int, ...] = (),
    out: Path | None = None,
) -> None:
    out = out or experiment / "shift"
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "shift.jsonl"
    rows = read_jsonl(kept) if kept.exists() else []
    for seed in seeds or sorted(
        int(place.name.removeprefix("seed-")) for place in (experiment / arms[0]).glob("seed-*")
    ):
        moving, *others = (read_run(experiment / arm / f"seed-{seed}") for arm in arms)
        for round in rounds or range(1, len(moving.metrics)):
            if not any((row["seed"], row["round"]) == (seed, round) for row in rows):
                figures = of_round(moving, round, dict(zip(arms[1:], others, strict=True)))
                rows.append({"seed": seed, "round": round, **figures})
                print(line := json.dumps(rows[-1]), flush=True)
                with kept.open("a") as file:
                    file.write(f"{line}\n")
    for line in table(rows):
        print(line)
    (out / "shift.png").write_bytes(as_png(figure("shift", [panel(rows, name) for name in TITLES])))


def of_round(moving: Run, round: int, others: Mapping[str, Run]) -> Row:
    """The figures of the policy that starts `round`, and its KL to the initial policy in nats a completion."""
    config = parse_config(Config, moving.config)
    record = moving.dir.record(round - 1)
    assert record is not None
    start = record.policy_round
    policy = moving.policy(start) if start else Path(config.model.path).expanduser()
    with TemporaryDirectory() as name:
        work = Path(name)
        kinds = {OWN: moving.dir.round_dir(round)}
        kinds |= {arm: with_prompts_of(kinds[OWN], run) for arm, run in others.items()}
        before = {f"{OWN}, round {t}": moving.dir.round_dir(t) for t in range(1, round)}
        kinds |= {kind: place for kind, place in before.items() if shared_prompts([kinds[OWN], place])}
        write_halves(work, kinds)
        found = {kind: fresh(trained, work, kind, policy, config.dpo) for kind in kinds}
    return {"kl": moving.metrics.loc[start].get("kl/to_initial") if start else 0.0, "kinds": found}


def with_prompts_of(place: Path, run: Run) -> Path:
    """The round of the run that has most pairs of the prompts of the round in `place`."""
    rounds = [run.dir.round_dir(r) for r in run.dir.rounds() if (run.dir.round_dir(r) / "pairs").exists()]
    return max(rounds, key=lambda other: len(shared_prompts([place, other])))


def shared_prompts(places: Iterable[Path]) -> list[str]:
    """The ids of the prompts of which each round has a pair, in one order."""
    return sorted(set.intersection(*(set(prompts_of(place)) for place in places)))


def prompts_of(place: Path) -> list[str]:
    """The id of the prompt of each pair."""
    import pyarrow.parquet as pq

    ids: list[str] = pq.read_table(place / "pairs" / TRAIN, columns=["prompt_id"])["prompt_id"].to_pylist()
    return ids


def write_halves(work: Path, kinds: Mapping[str, Path]) -> None:
    """Write the pairs of each kind's round, for the prompts that all kinds have a pair of, as two halves.

    Beside each, the log-probabilities that the round's reference gave them, [pairs, 2].
    """
    import pyarrow.parquet as pq
    from safetensors.numpy import load_file

    shared = shared_prompts(kinds.values())
    for kind, place in kinds.items():
        rows = {id: row for row, id in enumerate(prompts_of(place))}
        table = pq.read_table(place / "pairs" / TRAIN)
        logps = load_file(place / "reference" / "logps.safetensors")["logps"][:, :2]
        for half in (0, 1):
            chosen = [rows[id] for id in shared[half::2]]
            pq.write_table(table.take(chosen), work / f"{kind}-{half}.parquet")
            np.save(work / f"{kind}-{half}.npy", logps[chosen])


def trained(work: Path, kind: str, policy: Path, dpo: DPOConfig) -> Row:
    """The figures of a kind of pairs for `policy`, which is trained on their first half."""
    import pyarrow.parquet as pq
    from safetensors.numpy import load_file

    from iterdpo.training import train as trainer

    pairs, root = work / f"{kind}-0.parquet", work / kind
    root.mkdir()
    spec = train_spec(root, policy, pairs, dpo, eval_pairs=work / f"{OWN}-1.parquet")
    spec.output.mkdir()
    trainer.save_policy = lambda *args: None  # it is of no use
    trainer.train(spec)
    columns = pq.read_table(pairs, columns=[f"{side}_token_ids" for side in ("chosen", "rejected")])
    tokens = np.array([[len(ids) for ids in column.to_pylist()] for column in columns]).T
    logps = load_file(spec.reference_output / "logps.safetensors")["logps"][: len(tokens), :2]
    ratios = logps - np.load(pairs.with_suffix(".npy"))
    margins = dpo.beta * (ratios[:, 0] - ratios[:, 1])
    metrics = read_json(spec.output / "eval_metrics.json")
    chosen, rejected = (logps.sum(axis=0) / tokens.sum(axis=0)).tolist()
    return {
        "logp_chosen": chosen,
        "logp_rejected": rejected,
        "weight": float((1 / (1 + np.exp(margins))).mean()),
        "learned": math.log(2) - metrics["eval_loss"],
        "accuracy": metrics["eval_rewards/accuracies"],
        "pairs": len(tokens),
    }


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown: of each round and kind the means over seeds, and its own pairs' minus the kind's, with intervals."""
    lines = ["| round | seeds | KL | pairs | " + " | ".join(FIGURES) + " |", "|---" * (4 + len(FIGURES)) + "|"]
    for round in sorted({row["round"] for row in rows}):
        those = [row for row in rows if row["round"] == round]
        head = f"| {round} | {len(those)} | {fmean(row['kl'] for row in those):.1f} |"
        for kind in those[0]["kinds"]:
            of_kind = {name: [row["kinds"][kind][name] for row in those] for name in FIGURES}
            lines.append(f"{head} {kind} | " + " | ".join(f"{fmean(values):.3f}" for values in of_kind.values()) + " |")
            if kind != OWN:
                gaps = [
                    student_interval(
                        [row["kinds"][OWN][name] - value for row, value in zip(those, values, strict=True)]
                    )
                    for name, values in of_kind.items()
                ]
                shown = (f"{g.value:+.3f}" + ("" if g.low is None else f" [{g.low:+.3f}, {g.high:+.3f}]") for g in gaps)
                lines.append(f"{head} {OWN} - {kind} | " + " | ".join(shown) + " |")
    return lines


TITLES = {
    "weight": "Mean weight of a pair's gradient",
    "learned": "Fall of the loss of own, unseen pairs, nats",
}


def panel(rows: Sequence[Row], name: str) -> Panel:
    def draw(ax: Axes) -> None:
        kinds = dict.fromkeys(kind for row in rows for kind in row["kinds"])
        for kind, color in zip(kinds, COLORS, strict=False):
            there = [row for row in rows if kind in row["kinds"]]
            points = [(row["round"], row["seed"], row["kl"], row["kinds"][kind][name]) for row in there]
            for seed in {row["seed"] for row in there}:
                ax.plot(*zip(*(p[2:] for p in points if p[1] == seed), strict=True), color=color, lw=0.8, alpha=0.35)
            rounds = [[p[2:] for p in points if p[0] == round] for round in sorted({row["round"] for row in there})]
            means = np.array([np.mean(of_round, axis=0) for of_round in rounds])
            ax.plot(means[:, 0], means[:, 1], color=color, marker="o", label=f"{kind} pairs")
        ax.set_title(TITLES[name])
        ax.set_xlabel("KL to the initial policy, nats per completion")
        ax.legend(fontsize=8.5)

    return draw


if __name__ == "__main__":
    command_line(main, __doc__)
