"""What the SHA-256 of a run's files cost: the seconds in which a quickstart's processes hash, note and check, a round.

    python -m benchmarks.checking                              # one round after the initial one
    python -m benchmarks.checking rounds=3 prompts.heldout=32  # overrides of configs/quickstart.yaml
                                                               # --directory: where to work

Runs the command line with a `sitecustomize` that wraps the functions of `iterdpo.run.sums` in each of its processes.
Time in which several threads of a process check at once counts once; reading the file counts too. A round's time is
that from the record of the round before to its own, so it includes everything.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

MEASURED = ("note", "note_all", "is_whole", "recorded", "record", "read_checked", "check_files", "known_sha256")
MEASURED += ("sha256_file",)
SITE = "from pathlib import Path\nfrom benchmarks.checking import measure\nmeasure(Path({!r}))\n"


def main(*overrides: str, directory: Path | None = None) -> None:
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        root = Path(scratch)
        (root / "sitecustomize.py").write_text(SITE.format(str(root)))
        path = os.pathsep.join(filter(None, [scratch, str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "flows.cli", "quickstart", "--no-prefect", f"run_dir={root / 'run'}"]
        command += ["rounds=1", *overrides]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, stdout=sys.stderr)
        times = [json.loads(line) for file in root.glob("times-*.jsonl") for line in file.read_text().splitlines()]
        ends = [record.stat().st_mtime for record in sorted((root / "run").glob("round-*/round.json"))]
    for number, (begin, end) in enumerate(pairwise(ends), 1):
        spent: dict[str, float] = defaultdict(float)
        for process, function, at, seconds in times:
            if begin <= at < end:
                spent[f"{process}: {function}"] += seconds
        print(f"round {number}: {end - begin:.1f} s, checking {sum(spent.values()):.2f} s", end="")
        print(f" ({sum(spent.values()) / (end - begin):.2%})")
        for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
            print(f"  {seconds:8.3f} s  {name}")


def measure(folder: Path) -> None:
    """Write the times of this process's checks to a file in `folder` when it ends: [process, function, when, seconds]."""
    from iterdpo.run import sums

    times: list[tuple[str, str, float, float]] = []
    lock, active, begun = threading.Lock(), 0, ("", 0.0)

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal active, begun
            with lock:
                if not active:
                    begun = function.__name__, time.time()
                active += 1
            try:
                return function(*arguments, **options)
            finally:
                with lock:
                    active -= 1
                    if not active:
                        times.append((sys.argv[0].rpartition("/")[2], *begun, time.time() - begun[1]))

        return call

    def write() -> None:
        if times:
            (folder / f"times-{os.getpid()}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in times))

    for name in MEASURED:
        setattr(sums, name, timed(getattr(sums, name)))
    atexit.register(write)


if __name__ == "__main__":
    from benchmarks.harness import command_line

    command_line(main, __doc__)
