"""Questions to a person and their answers, on disk. No judge or server is needed to read or add to them.

    <run_dir>/review/
      .lock                    held while anything here is written
      0001-3fa9c2d1/           a batch: what one call of the judge asked
        tasks.jsonl            a `Task` a line; written once
        verdicts.jsonl         a `Verdict` a line, appended and flushed to disk; the last of a task counts
        closed                 there once the run has taken the verdicts: they can no longer be taken back

The judge and any number of review pages may work here at the same time, and any of them may be killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from iterdpo.errors import DamagedError
from iterdpo.run import disk
from iterdpo.run.rundir import canonical, digest, fsync, read_jsonl, write_jsonl, write_text
from iterdpo.types import Message

Choice = Literal["left", "right", "tie", "skip", "undo"]


@dataclass(frozen=True, slots=True)
class Task:
    """Two completions to compare: `Task("3fa9…", "ann", "Which is funnier?", "A joke:", left="…", right="…")`.

    The id names who, the question, the prompt and both texts, whichever is on the left.
    """

    id: str
    who: str
    question: str
    prompt: str | list[Message]
    left: str
    right: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was said of a task: `Verdict("3fa9…", "left", note="", left="…", right="…", at="2026-02-01T10:00:00Z")`.

    `left` and `right` are the texts as they were shown. They are the task's, and are not written down twice.
    """

    task: str
    choice: Choice
    note: str = ""
    left: str = ""
    right: str = ""
    at: str = ""


class Reviews:
    """All batches of a run."""

    def __init__(self, run_dir: Path) -> None:
        self.root = run_dir / "review"

    def ask(self, tasks: Sequence[Task]) -> tuple[dict[str, Verdict], list[Batch]]:
        """The verdicts that there are, and the open batches that the others are in, or now are.

        A task that was skipped in a closed batch is asked again.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with locked(self.root):
            for left in self.root.glob(".new-*"):  # of a process that was killed while it wrote
                shutil.rmtree(left)
            wanted = {t.id: t for t in tasks}
            answered: dict[str, Verdict] = {}
            waiting: list[Batch] = []
            for batch in self.batches():
                mine = wanted.keys() & {t.id for t in batch.tasks()}
                verdicts = {id: v for id, v in batch.verdicts().items() if id in mine}
                if batch.closed:
                    answered |= {id: v for id, v in verdicts.items() if v.choice != "skip"}
                elif mine:
                    waiting.append(batch)
                    answered |= verdicts
            found = answered.keys() | {t.id for batch in waiting for t in batch.tasks()}
            fresh = [t for id, t in wanted.items() if id not in found]
            return answered, waiting + ([self._write(fresh)] if fresh else [])

    def batches(self) -> list[Batch]:
        """Every batch, the oldest first."""
        return [Batch(path) for path in sorted(self.root.glob("[0-9]*-*"))]

    def pending(self, who: str | None = None) -> list[Batch]:
        """The batches with unanswered tasks for `who` (None: for any person)."""
        return [b for b in self.batches() if not b.closed and b.unanswered(who)]

    def find(self, task_id: str) -> Batch | None:
        """The last batch with this task: those before it are closed."""
        return next((b for b in reversed(self.batches()) if any(t.id == task_id for t in b.tasks())), None)

    def _write(self, tasks: Sequence[Task]) -> Batch:
        rows = [asdict(t) for t in tasks]
        name = f"{len(self.batches()) + 1:04d}-{digest(rows)}"
        fresh = self.root / f".new-{name}"
        fresh.mkdir()
        write_jsonl(fresh / "tasks.jsonl", rows, record=fresh)
        os.replace(fresh, self.root / name)
        fsync(self.root)
        return Batch(self.root / name)


@dataclass(frozen=True)
class Batch:
    """One batch, read from disk at every question."""

    path: Path

    @property
    def closed(self) -> bool:
        return (self.path / "closed").exists()

    def tasks(self) -> tuple[Task, ...]:
        return _tasks(self.path)

    def verdicts(self) -> dict[str, Verdict]:
        """The verdict that stands, of each task that has one."""
        tasks = {t.id: t for t in self.tasks()}
        standing: dict[str, Verdict] = {}
        for row in _whole_lines(self.path / "verdicts.jsonl"):
            task = tasks[row["task"]]
            standing.pop(task.id, None)
            if row["choice"] != "undo":
                standing[task.id] = Verdict(**row, left=task.left, right=task.right)
        return standing

    def unanswered(self, who: str | None = None) -> list[Task]:
        verdicts = self.verdicts()
        return [t for t in self.tasks() if t.id not in verdicts and who in (None, t.who)]

    def submit(self, task_id: str, choice: Choice, note: str = "") -> bool:
        """Append a verdict. False if there is one already, which only `undo` can remove, or if the batch is closed."""
        with locked(self.path.parent):
            if self.closed or (choice == "undo") != (task_id in self.verdicts()):
                return False
            self._append({"task": task_id, "choice": choice, "note": note})
            return True

    def undo(self, task_id: str) -> bool:
        """Take a verdict back. False if there is none, or if the run has used it already."""
        return self.submit(task_id, "undo")

    def close(self) -> dict[str, Verdict] | None:
        """The verdicts, from now on fixed; None while tasks are unanswered."""
        if not self.closed and self.unanswered():  # seldom worth the lock
            return None
        with locked(self.path.parent):
            if not self.closed:
                if self.unanswered():
                    return None
                write_text(self.path / "closed", "")
                fsync(self.path)
            return self.verdicts()

    def _append(self, row: dict[str, str]) -> None:
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with open(self.path / "verdicts.jsonl", "a+b") as handle:
            size = handle.seek(0, os.SEEK_END)
            if size:
                handle.seek(size - 1)
                if handle.read(1) != b"\n":  # a process was killed while it wrote this line
                    handle.seek(0)
                    handle.truncate(handle.read().rfind(b"\n") + 1)
            row = {**row, "at": at}
            handle.write(canonical({**row, "crc32": _crc32(row)}).encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())
        fsync(self.path)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory, against threads and processes alike. The kernel releases it when the process ends."""
    with open(directory / ".lock", "a") as handle:
        disk.lock(handle, fcntl.LOCK_EX, str(directory))
        yield


@functools.lru_cache(maxsize=64)
def _tasks(path: Path) -> tuple[Task, ...]:
    """Cached, since the file is written once."""
    return tuple(Task(**row) for row in read_jsonl(path / "tasks.jsonl"))


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that another process may be appending to, or was killed while it did.

    Raises:
        DamagedError: a line that was finished is not what was written.
    """
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line.decode())
            whole = row.pop("crc32", None) in (None, _crc32(row))
        except (ValueError, AttributeError):
            whole = False
        if not whole:
            raise DamagedError(path, f"line {number} is not what was written")
        yield row


def _crc32(row: dict[str, str]) -> str:
    return f"{zlib.crc32(canonical(row).encode()):08x}"
