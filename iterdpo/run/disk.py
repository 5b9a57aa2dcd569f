"""Disks that are full, too small, read-only or shut, and file systems without locks, as one line with a remedy."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from iterdpo.errors import ChildFailed, RunFailed, UserError

REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room within the quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "mount it for writing",
    errno.EACCES: "get the permission",
    errno.EPERM: "get the permission",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount it again",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.ENOTDIR: "move that file away",
    errno.EISDIR: "move that directory away",
    errno.ELOOP: "mend the symbolic links",
}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
LITTLE = 1 << 20  # bytes: what is left of a disk that is full


@contextmanager
def failures(root: Path) -> Iterator[None]:
    """Around work in a run directory: what the disk refuses ends it with a `RunFailed`, and work that is done stays."""
    try:
        yield
    except OSError as error:
        if (failed := failure(error, root)) is None:
            raise
        raise failed from error
    except ChildFailed as error:
        if not _is_full(root):
            raise
        raise RunFailed(f"run_dir {root}: no space left on device; {REMEDIES[errno.ENOSPC]}, {GOES_ON}") from error


GOES_ON = "and the same command goes on"


def failure(error: OSError, root: Path | None = None) -> RunFailed | None:
    """The failure as one line; None if it is not the disk's."""
    if error.errno not in REMEDIES or (root is None and error.filename is None):
        return None
    name = error.filename2 or error.filename  # of a rename, the name that was to be
    where = f"{name}: " if name is not None else ""
    run_dir = f"run_dir {root}: " if root is not None else ""
    unknown = error.errno == errno.ENOSPC and error.filename is None and root is not None and not _is_full(root)
    elsewhere = ", there or in TMPDIR or PREFECT_HOME" if unknown else ""
    return RunFailed(
        f"{run_dir}{where}{os.strerror(error.errno).lower()}{elsewhere}; {REMEDIES[error.errno]}, {GOES_ON}"
    )


def lock(file: IO[bytes] | IO[str] | int, operation: int, where: str) -> None:
    """`fcntl.flock`.

    Raises:
        BlockingIOError: another process holds the lock, and the operation does not wait.
        UserError: the file system of `where` has no locks.
    """
    try:
        try:
            fcntl.flock(file, operation)
        except BlockingIOError:
            time.sleep(0.05)  # it may be `is_locked` that has it, for a moment
            fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise UserError(
            f"{where}: its file system has no locks ({error.strerror}); choose a directory on another, such as a local disk"
        ) from None


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock of a file, which is asked by taking it for a moment.

    False if there is no such file, or its file system has no locks.
    """
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _is_full(root: Path) -> bool:
    try:
        return shutil.disk_usage(root).free < LITTLE
    except OSError:
        return False


def check_space(directory: Path, needed: int) -> None:
    """Refuse to begin what will write `needed` bytes below `directory`, which need not exist yet, if they do not fit.

    Raises:
        UserError: the disk has less free space, or nothing can be written there.
    """
    there = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        why = f"no permission in {there}" if os.path.isdir(there) else f"{there} is no directory"
        raise UserError(f"run_dir {directory}: cannot be written ({why}); choose another run_dir")
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"run_dir {directory}: the policies and checkpoints to come need about {size(needed)}, but the disk has {size(free)} "
            "free; free some space, or set dpo.save_dtype=bfloat16, dpo.adapter={} or fewer rounds"
        )


def size(count: float) -> str:
    """`count` bytes for a reader: `1.5 GiB`, `20.0 MiB`."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"
