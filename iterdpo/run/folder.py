"""The directories for this user's temporary files and locks, and for what is kept. Standard library only."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from iterdpo.errors import UserError


def own_folder() -> Path:
    """`iterdpo-<user id>` among the temporary files, which no other user can read or write. Made if it is missing.

    Raises:
        UserError: something of that name is there that is not this user's alone.
    """
    path = Path(tempfile.gettempdir()) / f"iterdpo-{os.getuid()}"
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        found = path.lstat()
        own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
        if not own:
            raise UserError(
                f"{path}: not a directory of your own that others cannot enter; remove it, or set TMPDIR to another place"
            ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror}); set TMPDIR to another place") from None
    return path


def default_cache() -> Path:
    """The directory for what can be made again: `$ITERDPO_CACHE`, else `$XDG_CACHE_HOME/iterdpo`, else ~/.cache/iterdpo."""
    if own := os.environ.get("ITERDPO_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iterdpo"
