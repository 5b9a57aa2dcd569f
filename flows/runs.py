"""`iterdpo runs`: the lineages below a folder, from the disk alone."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from iterdpo.errors import UserError
from iterdpo.escape import printable
from iterdpo.gate import best_record
from iterdpo.run.disk import is_locked, lock
from iterdpo.run.rundir import RunDir, read_object, write_json

SCHEDULE = "schedule.json"
"""In a run directory: the deployment that adds rounds to it. Deleted when it no longer does."""
SCORES = ("score/heldout_judge", "score/train_judge")
LONGEST_REASON = 80


@dataclass(frozen=True)
class Lineage:
    """A run directory in one line: `Lineage("runs/films", 3, 5, 2, 0.61, 0.7, "at work", "2026-11-27T02:00:00+01:00")`."""

    run: str
    rounds: int | None
    """Rounds that have ended, without round 0. None if the directory cannot be read."""
    wanted: int | None
    """Rounds of the configuration."""
    policy_round: int | None
    """The round of the promoted policy; 0 is the initial one. None before the first evaluation."""
    score: float | None
    """The promoted policy's held-out score: the held-out judge's, or the training judge's if there is no other."""
    wins: float | None
    """Its win rate against the initial policy."""
    state: str
    """at work, done, stopped (by the gate), failed: REASON, unfinished, or unreadable: REASON."""
    next_trigger: str | None
    """When its schedule adds rounds, with the time zone's offset; "when triggered" without a clock, None without a deployment."""


def lineages(root: str | Path) -> list[Lineage]:
    """The lineages below `root`, which may be one itself, by path.

    Raises:
        UserError: `root` is no directory.
    """
    if not Path(root).is_dir():
        raise UserError(f"{root}: no such directory; give the folder that holds the run directories")
    return [_lineage(path) for path in _run_dirs(root)]


def as_table(found: Sequence[Lineage]) -> str:
    """The lineages as a table for a terminal."""
    rows = [("run", "rounds", "policy", "score", "wins", "state", "next trigger")]
    for lineage in found:
        of = "" if lineage.wanted is None else f" of {lineage.wanted}"
        policy = {None: "–", 0: "initial"}.get(lineage.policy_round, f"round {lineage.policy_round}")
        rows.append(
            (
                printable(lineage.run),
                "–" if lineage.rounds is None else f"{lineage.rounds}{of}",
                policy,
                "–" if lineage.score is None else f"{lineage.score:.3f}",
                "–" if lineage.wins is None else f"{lineage.wins:.2f}",
                printable(" ".join(lineage.state.split())[:LONGEST_REASON]),
                lineage.next_trigger or "–",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _run_dirs(root: str | Path) -> Iterator[Path]:
    for parent, directories, files in os.walk(root):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        if "run.json" in files:
            directories.clear()  # a run holds no runs
            yield Path(parent)


def _lineage(path: Path) -> Lineage:
    try:
        run = RunDir(path)
        records, wanted = run.records(), run.read_config().get("rounds", 1)
        state = state_of(run, wanted)
        trigger = next_trigger(path)
    except (UserError, OSError) as error:
        why = str(error).removeprefix(f"{path}: ")
        return Lineage(str(path), None, None, None, None, None, f"unreadable: {why}", None)
    best = best_record(records) if records else None
    standing: dict[str, Any] = best.metrics if best is not None else {}
    return Lineage(
        str(path),
        sum(record.round > 0 for record in records),
        wanted,
        best.policy_round if best is not None else None,
        next((standing[name] for name in SCORES if standing.get(name) is not None), None),
        standing.get("win_rate/vs_initial"),
        state,
        trigger,
    )


def state_of(run: RunDir, wanted: int) -> str:
    """What a run of `wanted` rounds is at; see `Lineage.state`."""
    records, failure = run.records(), run.last_failure()
    if is_locked(run.root / ".lock"):
        return "at work"
    if records and records[-1].decision == "stop":
        return "stopped"
    if records and records[-1].round >= wanted:
        return "done"
    if failure is not None and failure["round"] >= run.next_round():
        return f"failed: {failure['reason']}"
    return "unfinished"


@contextmanager
def noted_schedule(run_dir: str | Path, name: str, *, cron: str | None, timezone: str) -> Iterator[None]:
    """Note in a run directory that this process serves a deployment of it, while it does: the note is locked."""
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    note = Path(run_dir) / SCHEDULE
    write_json(note, {"name": name, "cron": cron, "timezone": timezone})
    with open(note, "rb") as held:
        lock(held, fcntl.LOCK_EX | fcntl.LOCK_NB, str(note))
        try:
            yield
        finally:
            note.unlink(missing_ok=True)


def next_trigger(run_dir: Path) -> str | None:
    """When a deployment adds rounds to the run, by the clock that its note names; see `Lineage.next_trigger`."""
    note = run_dir / SCHEDULE
    if not note.exists():
        return None
    noted = read_object(note)
    if noted.get("pool") is None and not is_locked(note):  # what served it was killed
        return None
    if (cron := noted.get("cron")) is None:
        return "when triggered"
    from prefect.server.schemas.schedules import CronSchedule

    clock = CronSchedule(cron=cron, timezone=noted.get("timezone"))
    times = asyncio.run(clock.get_dates(n=1, start=datetime.now(UTC)))
    return times[0].isoformat(timespec="seconds") if times else None
