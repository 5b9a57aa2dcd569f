"""The errors that a user can fix. Each message names the problem, its location (file, line or key) and the remedy."""

import json
from typing import Any


class UserError(ValueError):
    """Wrong input. The command line prints the message alone, without a traceback, and exits with status 2."""


class ConfigError(UserError):
    """A configuration that cannot run."""


class DataError(UserError):
    """A prompt or preference file that cannot be read as asked."""


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
    """A worker process ended with an error; the message has the end of its log and the log's path."""
