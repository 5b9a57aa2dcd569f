"""The errors a user can mend. Each message says what is wrong, where (file, line or key), and what to change."""


class UserError(ValueError):
    """Wrong input. The command line prints the message alone, without a traceback, and exits with status 2."""


class ConfigError(UserError):
    """A configuration that cannot run."""


class DataError(UserError):
    """A prompt or preference file that cannot be read as asked."""


class JudgeError(UserError):
    """A judge that cannot be loaded, or that broke its contract."""


class StaleStepError(UserError):
    """A finished step was made with other settings or inputs than those asked for now."""


class RunLockedError(UserError):
    """Another process is working in the run directory."""


class ChildFailed(RuntimeError):
    """A worker process ended with an error; the message has the end of its log and the log's path."""
