"""`iterdpo verify`: every file of a run against its SHA-256, and every step against the digests of what it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iterdpo.errors import DamagedError, RunFailed, RunLockedError, UserError
from iterdpo.gate import best_record, was_evaluated
from iterdpo.run import disk
from iterdpo.run.rundir import REMOVED, Manifest, RunDir, canonical, directory_digest, read_jsonl, read_object, removed
from iterdpo.run.sums import MANIFEST, RECORD, damages, record, recorded
from iterdpo.types import RoundRecord
from judges.person.store import Reviews

UNCHECKED = ("attic", "logs", "trackers")
ROUND_FILES = ("round.json", "prompts.jsonl", "prompts.ids.parquet", REMOVED)
RUN_FILES = ("run.json", "heldout.jsonl", "heldout.ids.parquet", "metrics.jsonl", "report.html", "estimate.json")


@dataclass
class Verification:
    """What was found: `Verification(steps=12, files=48, bytes=1284000000, problems=[], notes=[])`; a problem is a line."""

    steps: int = 0
    files: int = 0
    bytes: int = 0
    removed: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, problem: object) -> None:
        if str(problem) not in self.problems:
            self.problems.append(str(problem))

    def summary(self) -> str:
        read = f"{self.files:,} files of {self.steps:,} finished steps and of the run, {disk.size(self.bytes)}"
        found = f"{len(self.problems):,} damaged" if self.problems else "all as they were written"
        away = f"weights of {self.removed:,} policies were removed, as `keep` asked"
        return "\n".join([*self.notes, *([away] if self.removed else []), f"read {read}: {found}"])


def verify(run_dir: str | Path) -> Verification:
    """Read all of a run and compare it with what was written. Changes nothing.

    Left out are logs, what trackers wrote, and the attic.

    Raises:
        UserError: no run is there.
    """
    run, found = RunDir(run_dir, any_format=True), Verification()
    if not (run.root / "run.json").exists() and not run.rounds():
        raise UserError(f"{run.root}: no run here (no run.json)")
    with ExitStack() as stack:
        at_rest = True
        try:
            stack.enter_context(run.lock())
        except RunLockedError as error:
            at_rest = False
            found.notes.append(f"{error}: what is under way is not checked")
        except (UserError, RunFailed):  # a copy that cannot be written
            pass
        _verify(run, found, at_rest)
    return found


def _verify(run: RunDir, found: Verification, at_rest: bool) -> None:
    manifests: dict[tuple[int, str], Manifest] = {}
    files: dict[Path, None] = {}  # in order, each once
    for round in run.rounds():
        for step in sorted(path for path in run.round_dir(round).iterdir() if path.is_dir() and "." not in path.name):
            try:
                manifest = Manifest(**read_object(step / MANIFEST))
                away = removed(step)
                found.removed += bool(away)
                listed = {step / name: entry["sha256"] for name, entry in manifest.files.items() if name not in away}
            except FileNotFoundError:
                found.add(DamagedError(step / MANIFEST, "is missing"))
            except (TypeError, KeyError, AttributeError):
                found.add(DamagedError(step / MANIFEST, "it is not a manifest"))
            except DamagedError as error:
                found.add(error)
            else:
                manifests[round, step.name] = manifest
                found.steps += 1
                files |= dict.fromkeys([step / MANIFEST, *listed])
                for stray in sorted(path for path in step.rglob("*") if path.is_file() and path not in files):
                    if not any(part.startswith(".") for part in stray.relative_to(step).parts):
                        found.add(f"{stray}: damaged: its step was finished without it; move it away")
    for path in _recorded_files(run, found, at_rest):
        files[path] = None
    for path, problem in damages(files):
        found.add(DamagedError(path, problem))
    present = [path for path in files if path.is_file()]
    found.files, found.bytes = len(present), sum(path.stat().st_size for path in present)
    _check_records(run, manifests, found)
    _check_reviews(run, found)
    unchecked = [path for path in files if path.exists() and _is_unrecorded(path)]
    if unchecked:
        names = ", ".join(str(path.relative_to(run.root)) for path in unchecked[:3])
        found.notes.append(f"without a record of their bytes, so only read: {len(unchecked):,} files ({names})")


def _recorded_files(run: RunDir, found: Verification, at_rest: bool) -> Iterator[Path]:
    """The files of a run that are in no manifest."""
    root = run.root
    yield from (path for name in RUN_FILES if (path := root / name).exists())
    for round in run.rounds():
        yield from (path for name in ROUND_FILES if (path := run.round_dir(round) / name).exists())
    for path in sorted(root.rglob(RECORD)):
        place = path.parent.relative_to(root).parts
        under_way = any(part.endswith((".partial", ".streaming", ".cache")) for part in place)
        if (place and place[0] in UNCHECKED) or (under_way and not at_rest):
            continue
        if not path.read_bytes().endswith(b"\n"):
            found.add(DamagedError(path, "its last line is cut short"))
        try:
            names = record(path.parent)
        except DamagedError as error:
            found.add(error)
            continue
        whole = path.parent.name.startswith("checkpoint-") or ".cache" in path.parent.parent.suffixes
        yield from (file for name in names if (file := path.parent / name).exists() or whole)


def _is_unrecorded(path: Path) -> bool:
    try:
        return recorded(path) is None
    except DamagedError:
        return False


def _check_records(run: RunDir, manifests: dict[tuple[int, str], Manifest], found: Verification) -> None:
    """What the rounds' records say, what follows from it, and that each step was made from what is there."""
    records: dict[int, RoundRecord] = {}
    for round in run.rounds():
        try:
            known = run.record(round)
        except DamagedError as error:
            found.add(error)
            continue
        if known is not None:
            records[round] = known
    try:
        config = run.read_config()
    except UserError as error:
        config = {}
        found.add(error)
    for (round, name), manifest in manifests.items():
        for key, there in _sources(round, name, manifests, records):
            made_from = _value(manifest.inputs, key)
            if None not in (made_from, there) and made_from != there:
                step = run.round_dir(round) / name
                found.add(f"{step}: made with {key} = {made_from}, but {there} is there; pass --redo to make it again")
        if name == "completions" and not (path := run.round_dir(round) / "prompts.jsonl").exists():
            found.add(DamagedError(path, "is missing"))
        if name == "evaluation" and not (path := run.root / "heldout.jsonl").exists():
            found.add(DamagedError(path, "is missing"))
    for path in [run.root / "heldout.jsonl", *(run.round_dir(round) / "prompts.jsonl" for round in run.rounds())]:
        _try(found, lambda path=path: read_jsonl(path) if path.exists() else None)
    for round, known in records.items():
        policy = manifests.get((round, "policy"))
        commanded = policy is not None and "command" in policy.inputs
        for name in _steps_of(round, config, commanded=commanded):
            step = run.round_dir(round) / name
            if step.with_name(f"{name}.partial").is_dir():
                break  # it is made again, and what follows from it
            if not step.is_dir():
                found.add(DamagedError(step, "is missing"))
        kept = manifests.get((known.policy_round, "policy"))
        if known.policy_round and kept is not None and kept.digest != known.policy_digest:
            found.add(
                f"{run.round_dir(round) / 'round.json'}: kept policy {known.policy_digest}, but {kept.digest} is there"
            )
    _check_initial(config, manifests, found)
    if len(records) == len(list(run.root.glob("round-*/round.json"))) and records:
        best = best_record(list(records.values()))
        link, metrics = run.root / "policy", run.root / "metrics.jsonl"
        if not link.is_symlink() or str(link.readlink()) != best.policy:
            found.add(DamagedError(link, f"it does not name {best.policy}"))
        text = "".join(canonical(known.metrics) + "\n" for known in records.values())
        if not metrics.exists() or metrics.read_bytes() != text.encode():
            found.add(DamagedError(metrics, "it does not say what the rounds' records say"))


def _check_initial(config: dict[str, Any], manifests: dict[tuple[int, str], Manifest], found: Verification) -> None:
    """The initial policy, if it is a local directory, against the digest that steps were made with."""
    path = Path(str((config.get("model") or {}).get("path", ""))).expanduser()
    asked = {manifest.inputs["model"] for manifest in manifests.values() if "model" in manifest.inputs}
    if (path / "config.json").exists() and asked:
        try:
            digest = directory_digest(path)
        except UserError as error:
            found.add(error)
            return
        if {digest} != asked:
            found.add(f"{path}: not the checkpoint that the run began with ({digest}, then {', '.join(sorted(asked))})")


def _steps_of(round: int, config: dict[str, Any], *, commanded: bool) -> tuple[str, ...]:
    """The steps that a round has once it is decided. `commanded`: another program made its policy, in an experiment."""
    if "prompts" not in config:
        return ()
    if round == 0:
        return ("evaluation",)
    if commanded:
        return ("policy", "evaluation")
    steps = ("completions", "judgments", "pairs", "policy")
    every = (config.get("evaluation") or {}).get("every", 1)
    return steps if round % every and round != config.get("rounds") else (*steps, "evaluation")


def _sources(
    round: int, name: str, manifests: dict[tuple[int, str], Manifest], records: dict[int, RoundRecord]
) -> Iterator[tuple[str, str | None]]:
    """The inputs of a step that are digests, with the digests of what is there; None if it is not known."""

    def digest_of(step: str, of: int = round) -> str | None:
        manifest = manifests.get((of, step))
        return None if manifest is None else manifest.digest

    before = records.get(round - 1)
    start = before.policy_digest if before else None
    match name:
        case "completions" | "ema":
            yield "policy", start
        case "judgments":
            yield "completions", digest_of("completions")
        case "pairs":
            yield "judgments", digest_of("judgments")
            yield "completions", digest_of("completions")
            for step in ("against", "others"):
                if (round, step) in manifests:
                    yield "others", digest_of(step)
                    break
        case "against":
            yield "completions", digest_of("completions")
            yield "others", digest_of("others")
        case "reference":
            yield "pairs", digest_of("pairs")
        case "policy":
            yield "pairs", digest_of("pairs")
            yield "policy", start
        case "benchmarks" if round:
            yield "policy", digest_of("policy")
        case "evaluation" | "temperatures":
            yield "policy", digest_of("policy")
            yield "baselines.initial", digest_of("evaluation", 0)
            yield "baselines.reference", digest_of("references", 0)
            yield "baselines.model", digest_of("other_model", 0)
            looked = [records[r] for r in sorted(records) if r < round and was_evaluated(records[r])]
            if looked:
                yield "baselines.previous", digest_of("evaluation", looked[-1].policy_round)
                best = best_record([record for r, record in sorted(records.items()) if r < round]).policy_round
                if best != looked[-1].policy_round:
                    yield "baselines.best", digest_of("evaluation", best)


def _value(inputs: dict[str, Any], key: str) -> Any:
    value: Any = inputs
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _check_reviews(run: RunDir, found: Verification) -> None:
    for batch in Reviews(run.root).batches():
        _try(found, batch.verdicts)
        path = batch.path / "verdicts.jsonl"
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            found.add(f"{path}: its last line is cut short; its question is asked again")


def _try(found: Verification, read: Any) -> None:
    try:
        read()
    except DamagedError as error:
        found.add(error)
