"""Start-up and host memory of an offline round on many pairs: one JSON line.

python benchmarks/million_pairs.py                              a tiny model made here, with a tokenizer of bytes
python benchmarks/million_pairs.py --model ./my-checkpoint      another tokenizer; --pairs 10000 for fewer

`first`: the pairs are read, tokenized and written. `again`: another process finds that done, opens the pairs as
training does and reads 1,000 at random. `seconds` are those of the whole process, imports included; `peak_gib` is its
resident memory, `worker_peak_gib` that of the largest process that tokenized for it.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NOUNS = ("sea", "sky", "harbour", "lantern", "orchard", "glacier", "violin", "letter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--model", help="a checkpoint directory (default: a tiny one, made here)")
    parser.add_argument("--heldout", type=int, default=1000)
    parser.add_argument("--start", metavar="DIRECTORY", help=argparse.SUPPRESS)  # what this script starts itself as
    arguments = parser.parse_args()
    if arguments.start is not None:
        print(json.dumps(start(Path(arguments.start), arguments.model, arguments.heldout)))
        return
    with tempfile.TemporaryDirectory(prefix="million-pairs-") as directory:
        write_rows(Path(directory) / "pairs.jsonl", arguments.pairs)
        model = arguments.model or tiny_model(Path(directory) / "model")
        line: dict[str, Any] = {"pairs": arguments.pairs, "model": arguments.model or "tiny"}
        for name in ("first", "again"):
            command = [sys.executable, __file__, "--start", directory, "--model", model]
            began = time.perf_counter()
            done = subprocess.run(
                [*command, "--heldout", str(arguments.heldout)], check=True, stdout=subprocess.PIPE, text=True
            )
            line[name] = {"seconds": round(time.perf_counter() - began, 1), **json.loads(done.stdout)}
        print(json.dumps(line))


def write_rows(path: Path, count: int) -> None:
    rng = random.Random(0)
    with open(path, "w") as file:
        for i in range(count):
            prompt, chosen, rejected = (" ".join(rng.choices(NOUNS, k=k)) for k in (8, 16, 16))
            row = {"prompt": f"Tale {i}: {prompt}.", "chosen": f" {chosen}.", "rejected": f" {rejected}!"}
            file.write(json.dumps(row) + "\n")


def tiny_model(directory: Path) -> str:
    """Made by another process, whose torch stays out of the measurement."""
    code = "import sys; from pathlib import Path; from iterdpo.testing import build_tiny_checkpoint as build; "
    subprocess.run([sys.executable, "-c", f"{code} build(Path(sys.argv[1]))", str(directory)], check=True)
    return str(directory)


def start(directory: Path, model: str, heldout: int) -> dict[str, Any]:
    from iterdpo.config import OfflineConfig, parse_config
    from iterdpo.data.pairs import TRAIN, TokenPairs
    from iterdpo.run.progress import Progress
    from iterdpo.run.rundir import read_manifest
    from iterdpo.stages.offline import prepare_pairs
    from iterdpo.stages.runs import OfflineRun

    data = {"path": str(directory / "pairs.jsonl"), "heldout": heldout}
    config = parse_config(OfflineConfig, {"run_dir": str(directory / "run"), "model": {"path": model}, "data": data})
    run = OfflineRun(config, progress=Progress(sys.stderr))
    step = run.dir.round_dir(1) / "pairs"
    done = read_manifest(step) is not None
    prepare_pairs(config, run)
    measured: dict[str, Any] = {}
    if done:
        began = time.perf_counter()
        pairs = TokenPairs(step / TRAIN, directory / "cache")
        measured["open_seconds"] = round(time.perf_counter() - began, 1)
        chosen = random.Random(0).sample(range(len(pairs)), min(1000, len(pairs)))
        began = time.perf_counter()
        for index in chosen:
            assert pairs[index].prompt
        measured["read_ms"] = round((time.perf_counter() - began) / len(chosen) * 1e3, 4)
    for name, who in (("peak_gib", resource.RUSAGE_SELF), ("worker_peak_gib", resource.RUSAGE_CHILDREN)):
        measured[name] = round(resource.getrusage(who).ru_maxrss / 2**20, 2)
    return measured


if __name__ == "__main__":
    main()
