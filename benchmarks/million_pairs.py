"""Start-up and host memory of an offline round on many pairs: one JSON line.

    python -m benchmarks.million_pairs                              a tiny model made here, with a tokenizer of bytes
    python -m benchmarks.million_pairs --model ./my-checkpoint      another tokenizer; --pairs 10000 for fewer

`first`: the pairs are read, tokenized and written. `again`: another process finds that done, opens the pairs as
training does and reads 1,000 at random. `seconds` are those of the whole process, imports included; `peak_gib` is its
resident memory, `worker_peak_gib` that of the largest process that tokenized for it.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import command_line, fresh, peak_mib
from iterdpo.run.rundir import write_jsonl
from iterdpo.testing import build_tiny_checkpoint

NOUNS = ("sea", "sky", "harbour", "lantern", "orchard", "glacier", "violin", "letter")


def main(*, pairs: int = 1_000_000, model: str | None = None, heldout: int = 1000) -> None:
    with tempfile.TemporaryDirectory(prefix="million-pairs-") as directory:
        root = Path(directory)
        write_jsonl(root / "pairs.jsonl", rows(pairs))
        checkpoint = model or str(fresh(build_tiny_checkpoint, root / "model"))
        line: dict[str, Any] = {"pairs": pairs, "model": model or "tiny"}
        for name in ("first", "again"):
            began = time.perf_counter()
            figures = fresh(start, root, checkpoint, heldout)
            line[name] = {"seconds": round(time.perf_counter() - began, 1), **figures}
    print(json.dumps(line))


def rows(count: int) -> Iterator[dict[str, str]]:
    rng = random.Random(0)
    for i in range(count):
        prompt, chosen, rejected = (" ".join(rng.choices(NOUNS, k=k)) for k in (8, 16, 16))
        yield {"prompt": f"Tale {i}: {prompt}.", "chosen": f" {chosen}.", "rejected": f" {rejected}!"}


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
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return measured | {"peak_gib": round(peak_mib() / 2**10, 2), "worker_peak_gib": round(workers, 2)}


if __name__ == "__main__":
    command_line(main, __doc__)
