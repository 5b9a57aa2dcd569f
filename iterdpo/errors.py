"""The errors a user can mend. Each message says what is wrong, where (file, line or key), and what to change."""

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
    """A finished step was made with other settings or inputs than those asked for now.

    `differing` are (dotted key, value then, value now).
    """

    def __init__(self, step: str, differing: list[tuple[str, Any, Any]]) -> None:
        key, then, now = differing[0]
        more = ", ".join(name for name, _, _ in differing[1:4])
        what = ": the judge's source, arguments or checkpoint have changed" if key.endswith("judge.version") else ""
        super().__init__(
            f"{step} was made with {key} = {json.dumps(then)}, and {key} = {json.dumps(now)} is asked for now{what}"
            + (f" (also different: {more})" if more else "")
            + "; what is on disk would be wrong. Set it back, choose another run_dir, or pass --redo to do again what "
            "changed and what follows from it (the old is kept in attic/)"
        )


class RunLockedError(UserError):
    """Another process is working in the run directory."""


class RunFailed(RuntimeError):
    """A run that cannot go on now. What was done stays done; the command line exits with status 1."""


class JudgingStopped(RunFailed):
    """More completions could not be judged than the configuration allows; the message has a table of the reasons."""


class ChildFailed(RunFailed):
    """A worker process ended with an error; the message has the end of its log and the log's path."""
