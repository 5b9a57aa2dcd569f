"""The quickstart with several seeds: does every round improve, by both judges, whatever the seed?

    python -m benchmarks.quickstart_seeds --seeds 0 1 2 [--runs runs/seeds] [dpo.beta=0.05 ...]

Prints one JSON line a seed with the scores of rounds 0 to 3, the final win rate with its interval, KL and seconds,
and whether the scores rose in every round. Runs that are there already are read, not repeated.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise

from benchmarks.harness import command_line
from flows import run_rounds
from flows.quickstart import prepare_quickstart, quickstart_config
from iterdpo.run.progress import Progress


def main(*overrides: str, seeds: tuple[int, ...] = (0, 1, 2), runs: str = "runs/seeds") -> None:
    assets = prepare_quickstart(progress=lambda line: print(line, file=sys.stderr))
    for seed in seeds:
        config = quickstart_config(assets, [f"seed={seed}", f"run_dir={runs}/seed-{seed}", *overrides])
        metrics = run_rounds(config, prefect=False, progress=Progress(sys.stderr)).metrics
        last = metrics.iloc[-1]
        scores = {role: metrics[f"score/{role}"].round(3).tolist() for role in ("train_judge", "heldout_judge")}
        line = {
            "seed": seed,
            **scores,
            "rises": {role: all(b > a for a, b in pairwise(s)) for role, s in scores.items()},
            "heldout_gain": round(scores["heldout_judge"][-1] - scores["heldout_judge"][0], 3),
            "win_rate/vs_initial": [round(last[f"win_rate/vs_initial{end}"], 3) for end in ("", "_low", "_high")],
            "kl/to_initial": round(last["kl/to_initial"], 1),
            "decisions": metrics["gate/decision"].tolist(),
            "seconds": round(metrics["time/round_s"].sum()),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    command_line(main, __doc__)
