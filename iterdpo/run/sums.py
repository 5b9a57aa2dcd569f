"""The SHA-256 of each file of a run: noted before the file gets its name, compared when the file is read.

Those of a finished step's files are in its `MANIFEST.json`. Those of other files (`round.json`, the prompts, the
manifests themselves, the shards of a step under way) are in the file `.sha256` of a directory above them, a line each:

    <sha256> <crc32 of the rest of the line> <path from that directory>

A file that was written several times has several lines, and any of them may be right: a process may end between the
line and the file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from iterdpo.errors import DamagedError

MANIFEST = "MANIFEST.json"
RECORD = ".sha256"
DEEPEST = 5  # directories from a file up to the one that records it
THREADS = 4
CHANGED = "its bytes are not those that were written"
Stamp = tuple[int, ...]

_hashed: dict[Stamp, str] = {}


def note(directory: Path, sums: Mapping[str, str]) -> None:
    """Record that files in or below `directory` are about to have these contents: `{name: sha256}`.

    The record is on disk afterwards.
    """
    lines = "".join(f"{sha256} {_crc(sha256, name)} {name}\n" for name, sha256 in sums.items()).encode()
    handle = os.open(directory / RECORD, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        end = os.fstat(handle).st_size
        tail = os.pread(handle, 4096, max(0, end - 4096))
        if tail and not tail.endswith(b"\n"):  # the machine stopped while the last line was written
            end -= len(tail) - tail.rfind(b"\n") - 1
            os.ftruncate(handle, end)
        if os.pwrite(handle, lines, end) < len(lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory / RECORD))
        os.fsync(handle)
    finally:
        os.close(handle)


def note_all(directory: Path) -> None:
    """Record the files that lie directly in `directory`, as they are."""
    note(directory, {file.name: sha256_file(file) for file in directory.iterdir()})


def is_whole(directory: Path) -> bool:
    """Whether the files that are recorded in `directory` are there, with the bytes that were written."""
    try:
        names = record(directory)
        check_files(directory / name for name in names)
    except DamagedError:
        return False
    return bool(names)


def recorded(path: Path) -> frozenset[str] | None:
    """The SHA-256 that the file may have; None if none was recorded.

    Raises:
        DamagedError: the record itself is damaged.
    """
    for directory in list(path.parents)[:DEEPEST]:
        name = path.relative_to(directory).as_posix()
        found = record(directory).get(name)
        if found is not None:
            return found
        if name != MANIFEST and (listed := _listed(directory / MANIFEST).get(name)) is not None:
            return frozenset([listed])
        if (directory / "run.json").exists():
            break
    return None


def record(directory: Path) -> dict[str, frozenset[str]]:
    """What `.sha256` of the directory says, by name. A last line that was not finished counts for nothing.

    Raises:
        DamagedError: a line is damaged.
    """
    path = directory / RECORD
    try:
        return _record(path, _stamp(path))
    except FileNotFoundError:
        return {}


def read_checked(path: Path) -> bytes:
    """The content of a file.

    Raises:
        DamagedError: it is not what was written.
    """
    data = path.read_bytes()
    allowed = recorded(path)
    if allowed is not None and hashlib.sha256(data).hexdigest() not in allowed:
        raise DamagedError(path, CHANGED)
    return data


def check_files(paths: Iterable[Path]) -> None:
    """Check files that others will read, several at a time. One that this process has checked is not read again.

    Raises:
        DamagedError: the first that is missing, or not what was written.
    """
    for path, problem in damages(paths):
        raise DamagedError(path, problem)


def damages(paths: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Each file that is not as it was written, with the problem; in the order of `paths`."""
    paths = list(paths)
    with ThreadPoolExecutor(THREADS) as pool:
        for path, problem in zip(paths, pool.map(_problem, paths), strict=True):
            if problem is not None:
                yield path, problem


def known_sha256(path: Path) -> str:
    """The SHA-256 of a file. One that this process has read is not read again, unless its size or a time has changed."""
    stamp = _stamp(path)
    if stamp not in _hashed:
        _hashed[stamp] = sha256_file(path)
    return _hashed[stamp]


def sha256_file(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _problem(path: Path) -> str | None:
    try:
        allowed = recorded(path)
        return CHANGED if allowed is not None and known_sha256(path) not in allowed else None
    except FileNotFoundError:
        return "is missing"
    except DamagedError:  # the record, which is named itself
        return None
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _stamp(path: Path) -> Stamp:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@lru_cache(maxsize=8)  # few: that of a step under way changes with each of its files, of which it may have thousands
def _record(path: Path, stamp: Stamp) -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            sha256, crc, name = line.decode().split(" ", 2)
            whole = crc == _crc(sha256, name)
        except ValueError:
            whole = False
        if not whole:
            raise DamagedError(path, f"line {number} is not what was written")
        found[name] = found.get(name, frozenset()) | {sha256}
    return found


def _listed(manifest: Path) -> dict[str, str]:
    try:
        return _listed_at(manifest, _stamp(manifest))
    except (FileNotFoundError, NotADirectoryError):
        return {}


@lru_cache(maxsize=64)
def _listed_at(manifest: Path, stamp: Stamp) -> dict[str, str]:
    try:
        files = json.loads(manifest.read_bytes())["files"]
        return {name: entry["sha256"] for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):  # `read_manifest` names it
        return {}


def _crc(sha256: str, name: str) -> str:
    return f"{zlib.crc32(f'{sha256} {name}'.encode()):08x}"
