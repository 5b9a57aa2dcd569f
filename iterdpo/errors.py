"""The errors that a user can fix. Each message names the problem, its location (file, line or key) and the remedy."""

import json
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Wrong input. The command line prints the message alone, without a traceback, and exits with status 2."""


class ConfigError(UserError):
    """A configuration that cannot run."""


class DataError(UserError):
    """A prompt or preference file that cannot be read as asked."""


class RowError(DataError):
    """A row of a data file that cannot be used, whatever becomes of the rows beside it.

    `RowError("a.jsonl: row 7, column 'prompt' is empty; remove the row", "have an empty prompt")`
    """

    def __init__(self, message: str, reason: str) -> None:
        """`reason` says the same of several rows, in a phrase that counts can be said with; of these there are few."""
        self.reason = reason
        super().__init__(message)

    def __reduce__(self) -> Any:  # to a process of a pool
        return RowError, (str(self), self.reason)


class DamagedError(DataError):
    """A file of a run that is not as it was written: a byte has changed, or it is cut short or missing."""

    def __init__(self, path: Path, problem: str) -> None:
        self.path, self.problem = path, problem
        super().__init__(f"{path}: damaged: {problem}; {remedy(path)}")

    def __reduce__(self) -> Any:  # from a process of a pool
        return DamagedError, (self.path, self.problem)


def remedy(path: Path) -> str:
    """What to do about a damaged file of a run."""
    under_way = any(part.endswith((".partial", ".streaming")) for part in path.parts)
    checkpoint = next((part for part in path.parts if part.startswith("checkpoint-")), None)
    if {"pairs.cache", "prompts.cache"}.intersection(path.parts):
        return "it is made again when it is needed"
    match path.name:
        case ".sha256":
            return "restore it from a copy, or delete it: the files beside it are then no longer checked"
        case "round.json":
            return "restore it from a copy, or delete it: the same command decides the round again"
        case "run.json":
            return "restore it from a copy, or delete it and start the run again, with its configuration"
        case "prompts.jsonl" | "heldout.jsonl":
            return (
                "restore it from a copy, or delete it: the prompts are chosen again, and are the same ones if the "
                "prompt file is the same"
            )
        case "prompts.ids.parquet" | "heldout.ids.parquet":
            return "restore it from a copy, or delete it: the prompts are rendered again"
        case "metrics.jsonl" | "report.html" | "policy" | ".initial.json":
            return "the next start of the run makes it again"
        case "tasks.jsonl":
            return f"restore it from a copy, or delete {path.parent}: its questions are asked again"
        case "verdicts.jsonl":
            return "restore it from a copy, or delete that line: its question is asked again"
    if checkpoint is not None:
        return f"delete the directory {checkpoint}: training begins again at its start"
    if under_way:
        return "delete it: the same command makes it again"
    return "restore it from a copy, or pass --redo to make its step again (the damaged one is kept in attic/)"


class JudgeError(UserError):
    """A judge that cannot be loaded, or that broke its contract."""


class StaleStepError(UserError):
    """A step on disk was made with other settings or inputs than the present ones.

    `differing` are (dotted key, value then, value now).
    """

    def __init__(self, step: str, differing: list[tuple[str, Any, Any]]) -> None:
        key, then, now = differing[0]
        more = ", ".join(name for name, _, _ in differing[1:4])
        what = ": the judge's source, arguments or checkpoint have changed" if key.endswith("judge.version") else ""
        super().__init__(
            f"{step} was made with {key} = {json.dumps(then)}, but now {key} = {json.dumps(now)}{what}"
            + (f" (also different: {more})" if more else "")
            + ". Restore the old value, choose another run_dir, or pass --redo to repeat this step and the later steps "
            "that depend on it (the old ones are kept in attic/)"
        )


class RunLockedError(UserError):
    """Another process is working in the run directory."""


class RunFailed(RuntimeError):
    """A run that cannot continue now. Finished work is kept; the command line exits with status 1."""


class JudgingStopped(RunFailed):
    """More completions could not be judged than the configuration allows; the message has a table of the reasons."""


class ChildFailed(RunFailed):
    """A worker process ended with an error; the message has the reason and the path of its log."""


class ChildLost(ChildFailed):
    """A worker process hung or was ended by a signal: another one may well succeed."""


def reason(error: Exception) -> str:
    """Why something failed, for a reader: `KeyError: 'gold'`; of our own errors the message alone."""
    return str(error) if isinstance(error, UserError | RunFailed) else f"{type(error).__name__}: {error}"
