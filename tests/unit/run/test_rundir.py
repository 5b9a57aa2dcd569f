"""The disk decides what is done: manifests, resuming, stale steps, atomic writes, the lock."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import pytest

from iterdpo.errors import ChildFailed, DamagedError, RunFailed, RunLockedError, StaleStepError, UserError
from iterdpo.run import disk, rundir, sums
from iterdpo.run.rundir import (
    Manifest,
    RunDir,
    Step,
    check_step,
    differing_keys,
    digest,
    directory_digest,
    read_json,
    read_jsonl,
    read_manifest,
    write_json,
    write_jsonl,
    write_text,
    write_with,
)
from iterdpo.run.sums import MANIFEST
from iterdpo.types import RoundRecord

ROOT = Path(__file__).parents[3]
INPUTS = {"sampling": {"n": 4, "temperature": 1.0}, "policy": "abc"}


def do(step: Step, **files: str) -> Manifest:
    directory = step.begin()
    for name, text in files.items():
        (directory / name).write_text(text)
    return step.finish(counts={"files": len(files)})


@contextmanager
def other_process(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that says a line when it is ready. It is killed at the end."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()


# Steps


def test_a_step_is_done_once_its_manifest_is_written_and_not_before(tmp_path: Path) -> None:
    step = Step(tmp_path / "round-001" / "completions", INPUTS)
    assert step.manifest() is None
    directory = step.begin()
    (directory / "shard-0000.jsonl").write_text("{}\n")
    assert step.manifest() is None
    assert not step.path.exists()

    manifest = step.finish(counts={"prompts": 1}, seconds={"engine": 0.25})
    assert step.manifest() == manifest == read_manifest(step.path)
    assert not step.partial.exists()
    assert sorted(p.name for p in step.path.iterdir()) == [MANIFEST, "shard-0000.jsonl"]
    assert (manifest.step, manifest.inputs, manifest.counts) == ("round-001/completions", INPUTS, {"prompts": 1})
    assert manifest.files == {
        "shard-0000.jsonl": {"bytes": 3, "sha256": hashlib.sha256(b"{}\n").hexdigest()},
    }
    assert manifest.seconds["engine"] == 0.25
    assert manifest.seconds["total"] >= 0
    assert manifest.versions["iterdpo"]


@pytest.fixture
def to_disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """What the kernel is told, in order: ("sync", path) and ("rename", target)."""
    told: list[tuple[str, Path]] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        told.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def noted_replace(source: Any, target: Any) -> None:
        replace(source, target)
        told.append(("rename", Path(target)))

    monkeypatch.setattr(rundir.os, "fsync", noted_fsync)
    monkeypatch.setattr(rundir.os, "replace", noted_replace)
    return told


def test_all_of_a_step_is_on_disk_before_it_is_sealed(tmp_path: Path, to_disk: list[tuple[str, Path]]) -> None:
    step = Step(tmp_path / "round-001" / "policy", INPUTS)
    directory = step.begin()
    (directory / "judgments" / "heldout").mkdir(parents=True)
    written = [directory / name for name in ("model.safetensors", "config.json", "judgments/heldout/shard-0000.jsonl")]
    for file in written:
        file.write_text("not synced by its writer")
    to_disk.clear()
    step.finish()

    manifest = to_disk.index(("rename", step.partial / MANIFEST))
    sealed = to_disk.index(("rename", step.path))
    contents = [*written, directory / "judgments" / "heldout", directory / "judgments", directory]
    assert {("sync", path) for path in contents} <= set(to_disk[:manifest])
    assert ("sync", step.partial) in to_disk[manifest:sealed]  # the manifest's name
    assert to_disk[sealed + 1 :] == [("sync", step.path.parent)]


def test_a_copy_to_work_on_is_on_disk_before_the_finished_step_moves(
    tmp_path: Path, to_disk: list[tuple[str, Path]]
) -> None:
    step = Step(tmp_path / "round-001" / "judgments", INPUTS)
    do(step, **{"shard-0000.jsonl": "{}\n"})
    to_disk.clear()
    step.reopen(keep=tmp_path / "attic")
    moved = to_disk.index(("rename", tmp_path / "attic" / "round-001" / "judgments"))
    assert ("sync", step.partial / "shard-0000.jsonl") in to_disk[:moved]


@pytest.mark.parametrize("crash", ["before the manifest", "between the manifest and the rename"])
def test_a_crash_while_sealing_leaves_the_step_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    step = Step(tmp_path / "step", INPUTS)
    (step.begin() / "data").write_text("whole")
    replace = os.replace

    def dies(source: Any, target: Any) -> None:
        if Path(target) == (step.partial / MANIFEST if crash == "before the manifest" else step.path):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(rundir.os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            step.finish()
    assert (step.partial / MANIFEST).exists() == (crash != "before the manifest")

    again = Step(tmp_path / "step", INPUTS)
    assert again.manifest() is None
    do(again, data="whole")
    assert again.manifest() is not None
    assert list(again.manifest().files) == ["data"]  # type: ignore[union-attr]


def test_an_interrupted_start_with_the_same_inputs_keeps_what_it_had(tmp_path: Path) -> None:
    first = Step(tmp_path / "step", INPUTS).begin()
    (first / "shard-0000.jsonl").write_text("done\n")
    again = Step(tmp_path / "step", json.loads(json.dumps(INPUTS)))
    assert (again.begin() / "shard-0000.jsonl").read_text() == "done\n"
    assert list(again.finish().files) == ["shard-0000.jsonl"]  # the note of the inputs is no content


def test_what_a_killed_writer_left_is_no_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(tmp_path / "killed", INPUTS)
    directory = step.begin()
    with monkeypatch.context() as patched:
        patched.setattr(rundir.os, "getpid", lambda: 4242)
        patched.setattr(rundir.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_jsonl(directory / "shard-0000.jsonl", [{"a": 1}])

    resumed, whole = Step(tmp_path / "killed", INPUTS), Step(tmp_path / "whole", INPUTS)
    for each in (resumed, whole):
        write_jsonl(each.begin() / "shard-0000.jsonl", [{"a": 1}])
    assert resumed.finish().digest == whole.finish().digest


@pytest.mark.parametrize("finished", [True, False])
def test_changed_inputs_are_refused_naming_the_key_and_both_values(tmp_path: Path, finished: bool) -> None:
    step = Step(tmp_path / "round-001" / "completions", INPUTS)
    step.begin()
    if finished:
        step.finish()
    changed = Step(step.path, {"sampling": {"n": 8, "temperature": 1.0}, "policy": "xyz"})
    with pytest.raises(StaleStepError) as caught:
        changed.manifest() or changed.begin()
    message = str(caught.value)
    assert "round-001/completions was made with sampling.n = 4, but now sampling.n = 8" in message
    assert "also different: policy" in message
    assert "--redo" in message
    assert changed.differences() == [("sampling.n", 4, 8), ("policy", "abc", "xyz")]


def test_the_refusal_of_another_judge_says_what_may_have_changed(tmp_path: Path) -> None:
    do(Step(tmp_path / "judgments", {"judge": {"version": "a"}}))
    changed = Step(tmp_path / "judgments", {"judge": {"version": "b"}})
    with pytest.raises(StaleStepError, match=r'now judge\.version = "b": the judge.s source, arguments or checkpoint'):
        changed.manifest()


@pytest.mark.parametrize("finished", [True, False])
def test_with_an_attic_changed_inputs_move_the_old_aside_and_the_step_is_done_again(
    tmp_path: Path, finished: bool
) -> None:
    run = RunDir(tmp_path)
    old = run.step(1, "completions", INPUTS)
    (old.begin() / "data").write_text("old")
    if finished:
        old.finish()

    new = RunDir(tmp_path, redo=True).step(1, "completions", {**INPUTS, "policy": "xyz"})
    assert new.manifest() is None
    assert list(new.begin().iterdir()) == [new.partial / "STEP.json"]
    do(new, data="new")
    (kept,) = (tmp_path / "attic").glob("*/round-001/completions*/data")
    assert kept.read_text() == "old"
    assert (new.path / "data").read_text() == "new"
    assert run.step(1, "completions", {**INPUTS, "policy": "xyz"}).manifest() is not None


def test_with_an_attic_unchanged_inputs_are_not_done_again(tmp_path: Path) -> None:
    do(RunDir(tmp_path).step(1, "pairs", INPUTS), data="old")
    assert RunDir(tmp_path, redo=True).step(1, "pairs", INPUTS).manifest() is not None
    assert not (tmp_path / "attic").exists()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda step: (step / "data").write_text("01234"),
    "gone": lambda step: (step / "data").unlink(),
    "manifest cut": lambda step: (step / MANIFEST).write_text((step / MANIFEST).read_text()[:-10]),
    "manifest empty": lambda step: (step / MANIFEST).write_text(""),
    "manifest a list": lambda step: (step / MANIFEST).write_text("[]"),
    "manifest changed": lambda step: (step / MANIFEST).write_text(
        (step / MANIFEST).read_text().replace('"files": 1', '"files": 2')
    ),
    "manifest gone": lambda step: (step / MANIFEST).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_step_that_was_finished_and_is_damaged_is_named_and_never_done_again_without_a_word(
    tmp_path: Path, damage: str
) -> None:
    step = Step(tmp_path / "round-001" / "step", INPUTS)
    do(step, data="0123456789")
    DAMAGES[damage](step.path)
    left = sorted(step.path.iterdir())
    named = MANIFEST if "manifest" in damage else "data"
    for act in (Step(step.path, INPUTS).manifest, Step(step.path, INPUTS).begin):
        with pytest.raises(DamagedError, match=f"step/{named}: damaged: .*--redo"):
            act()
    assert sorted(step.path.iterdir()) == left

    again = Step(step.path, INPUTS, attic=tmp_path / "attic")
    assert again.manifest() is None
    do(again, data="abc")
    assert (step.path / "data").read_text() == "abc"
    assert Step(step.path, INPUTS).manifest() is not None
    assert sorted(p.name for p in (tmp_path / "attic" / "round-001" / "step").iterdir()) == [p.name for p in left]


def test_a_byte_that_changed_in_a_finished_step_is_made_again_with_an_attic(tmp_path: Path) -> None:
    step = Step(tmp_path / "round-001" / "step", INPUTS)
    do(step, data="0123456789")
    (step.path / "data").write_text("0123456788")
    with pytest.raises(DamagedError, match="step/data: damaged: its bytes are not those that were written"):
        check_step(step.path)
    again = Step(step.path, INPUTS, attic=tmp_path / "attic")
    assert again.manifest() is None
    do(again, data="0123456789")
    check_step(step.path)


def test_what_was_hashed_to_seal_a_step_is_not_read_again_to_check_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    sha256_file = sums.sha256_file
    for module in (sums, rundir):
        monkeypatch.setattr(module, "sha256_file", lambda path: read.append(path.name) or sha256_file(path))
    step = Step(tmp_path / "policy", {})
    (step.begin() / "model.safetensors").write_text("weights")
    check_step(step.path, step.finish())
    assert read.count("model.safetensors") == 1


def test_the_inputs_of_a_step_under_way_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    step = Step(tmp_path / "round-001" / "step", INPUTS)
    note = step.begin() / "STEP.json"
    note.write_text(note.read_text().replace("4", "5"))
    with pytest.raises(DamagedError, match=r"step\.partial/STEP\.json: damaged: .*; delete it"):
        Step(step.path, INPUTS).begin()
    note.unlink()
    assert Step(step.path, INPUTS).begin() == step.partial


def test_inputs_that_are_equal_as_json_are_equal(tmp_path: Path) -> None:
    do(Step(tmp_path / "step", {"betas": (0.9, 0.999), "b": 1, "a": 2}))
    assert Step(tmp_path / "step", {"a": 2, "b": 1, "betas": [0.9, 0.999]}).manifest() is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_json_does_not_have_is_refused_and_not_written(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Step(tmp_path / "step", {"beta": value})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "metrics.json", {"loss": value})
    assert list(tmp_path.iterdir()) == []


def test_keys_that_differ_are_named_from_the_top() -> None:
    was = {"a": 1, "b": {"c": 1, "d": [1, 2]}, "gone": None, "left": 3}
    now = {"a": 1, "b": {"c": 2, "d": [1, 2], "e": 5}, "left": {"f": 1}}
    assert differing_keys(was, now) == [("b.c", 1, 2), ("b.e", None, 5), ("left", 3, {"f": 1})]
    assert differing_keys(was, was) == []


# Digests


def test_equal_contents_have_equal_digests_whenever_and_wherever_they_were_made(tmp_path: Path) -> None:
    one = do(Step(tmp_path / "a" / "one", INPUTS), x="1", y="2")
    two = do(Step(tmp_path / "b" / "two", {"other": 1}), y="2", x="1")
    assert one.digest == two.digest
    assert one.digest != do(Step(tmp_path / "three", INPUTS), x="1", y="3").digest  # content
    assert one.digest != do(Step(tmp_path / "four", INPUTS), x="1", z="2").digest  # name


def test_logs_do_not_count_as_content(tmp_path: Path) -> None:
    digests = []
    for name, log in (("one", "took 3 s"), ("two", "took 4 s")):
        step = Step(tmp_path / name, INPUTS)
        (step.begin() / "data").write_text("same")
        (step.partial / "train_log.jsonl").write_text(log)
        manifest = step.finish(logs=["train_log.jsonl"])
        assert manifest.files["train_log.jsonl"]["log"] is True
        digests.append(manifest.digest)
    assert digests[0] == digests[1]


def test_a_policy_has_the_same_digest_with_its_manifest_and_without(tmp_path: Path) -> None:
    step = Step(tmp_path / "policy", INPUTS)
    manifest = do(step, **{"config.json": "{}", "model.safetensors": "weights"})
    assert directory_digest(step.path) == manifest.digest
    (step.path / MANIFEST).unlink()
    assert directory_digest(step.path) == manifest.digest
    (step.path / "model.safetensors").write_text("weightz")
    assert directory_digest(step.path) != manifest.digest


def test_the_digest_of_a_value_does_not_depend_on_the_order_of_its_keys() -> None:
    # printf '{"a":2,"b":[1,"é"]}' | sha256sum
    assert digest({"b": [1, "é"], "a": 2}) == digest({"a": 2, "b": [1, "é"]}) == "a6cc6baee48ea4ed"
    assert digest([1, 2]) != digest([2, 1])


# Rounds


def record(round: int, *, decision: Any = "promote", policy: str | None = None) -> RoundRecord:
    metrics = {"round": round, "win_rate/vs_previous": 0.5 + round / 100}
    policy = policy or f"round-{round:03d}/policy"
    return RoundRecord(round, decision, "because", policy, round, f"digest-{round}", {"minimum": 0.5}, metrics)


def test_records_come_back_and_metrics_jsonl_is_in_the_order_of_the_rounds(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for number in (1, 2, 9, 10, 1000):
        run.round_dir(number).mkdir()
        if number != 9:
            run.write_record(record(number))
    assert run.rounds() == [1, 2, 9, 10, 1000]
    assert run.record(9) is None
    assert run.records() == [record(1), record(2), record(10), record(1000)]
    assert [row["round"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 10, 1000]


def test_a_copy_that_someone_kept_beside_the_rounds_is_no_round(tmp_path: Path) -> None:
    for name in ("round-001", "round-001.bak", "round-002-old"):
        (tmp_path / name).mkdir()
    assert RunDir(tmp_path).rounds() == [1]


def test_a_round_that_is_decided_again_undoes_the_decisions_after_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for number in (1, 2, 3):
        (run.round_dir(number) / "policy").mkdir(parents=True)
        run.write_record(record(number))
    run.write_record(record(2, decision="keep", policy="round-001/policy"))
    assert [(r.round, r.decision) for r in run.records()] == [(1, "promote"), (2, "keep")]
    assert [row["round"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
    assert (tmp_path / "policy").resolve() == tmp_path / "round-001" / "policy"


def test_the_policy_link_follows_the_policy_that_was_promoted_last(tmp_path: Path) -> None:
    run, link = RunDir(tmp_path), tmp_path / "policy"
    for number in (1, 2, 3):
        (run.round_dir(number) / "policy").mkdir(parents=True)
    run.write_record(record(1))
    assert link.resolve() == tmp_path / "round-001" / "policy"
    run.write_record(record(2))
    assert link.resolve() == tmp_path / "round-002" / "policy"
    run.write_record(record(3, decision="keep", policy="round-002/policy"))
    assert link.resolve() == tmp_path / "round-002" / "policy"
    assert os.readlink(link) == "round-002/policy"  # the run directory may be moved


def test_what_is_derived_from_the_records_is_made_again(tmp_path: Path) -> None:
    run, metrics, link = RunDir(tmp_path), tmp_path / "metrics.jsonl", tmp_path / "policy"
    run.refresh()  # nothing to derive anything from
    assert list(tmp_path.iterdir()) == []
    for number in (1, 2):
        run.round_dir(number).mkdir()
        run.write_record(record(number))
    whole = metrics.read_text()

    metrics.write_text(whole.splitlines(keepends=True)[0])
    link.unlink()
    link.symlink_to("round-001/policy")
    run.refresh()
    assert (metrics.read_text(), os.readlink(link)) == (whole, "round-002/policy")
    metrics.unlink()
    link.unlink()
    run.refresh()
    assert (metrics.read_text(), os.readlink(link)) == (whole, "round-002/policy")


def test_what_agrees_with_the_records_is_not_written_again(tmp_path: Path, to_disk: list[tuple[str, Path]]) -> None:
    run = RunDir(tmp_path)
    run.round_dir(1).mkdir()
    run.write_record(record(1))
    to_disk.clear()
    run.refresh()
    assert to_disk == []


def test_a_round_is_not_sealed_with_metrics_that_are_not_numbers(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.round_dir(1).mkdir()
    bad = RoundRecord(1, "promote", "because", "policy", 1, "d", {}, {"round": 1, "loss": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.write_record(bad)
    assert run.record(1) is None


def test_the_configuration_of_a_run_comes_back_and_its_absence_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run here \(no run\.json\)"):
        RunDir(tmp_path / "nowhere").read_config()
    run = RunDir(tmp_path)
    run.write_config({"dpo": {"beta": 0.1}})
    assert run.read_config() == {"dpo": {"beta": 0.1}}
    assert read_json(tmp_path / "run.json")["versions"]["torch"]


def test_logs_have_a_place_that_exists(tmp_path: Path) -> None:
    path = RunDir(tmp_path).log_path("train")
    assert path == tmp_path / "logs" / "train.log"
    assert path.parent.is_dir()


# Writes

WRITER = """
import sys
from pathlib import Path
from iterdpo.run.rundir import write_text
path = Path(sys.argv[1])
print("ready", flush=True)
while True:
    for letter in "ab":
        write_text(path, letter * 300_000)
"""


def test_a_reader_and_a_crash_see_the_old_content_or_the_new_never_a_part(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("a" * 300_000)
    whole = {"a" * 300_000, "b" * 300_000}
    seen = set()
    with other_process(WRITER, path) as writer:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            seen.add(path.read_text())
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert seen == whole
    assert path.read_text() in whole


def test_a_write_is_on_disk_with_its_name_when_it_returns(tmp_path: Path, to_disk: list[tuple[str, Path]]) -> None:
    write_json(tmp_path / "round.json", {"round": 1})
    content, rename, name = to_disk
    assert content[0] == "sync"
    assert (rename, name) == (("rename", tmp_path / "round.json"), ("sync", tmp_path))


def refuse(handle: IO[bytes]) -> None:
    handle.write(b"{")
    raise ValueError("no template")


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(ValueError, match="no template"):
        write_with(path, refuse)
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_lines_come_back_whatever_separators_their_texts_hold(tmp_path: Path) -> None:
    rows = [{"text": "one\ntwo\r\n\u2028three\x85"}, {"text": "ü 🙂", "n": None}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    assert len((tmp_path / "rows.jsonl").read_bytes().split(b"\n")) == 3
    write_text(tmp_path / "empty.jsonl", "")
    assert read_jsonl(tmp_path / "empty.jsonl") == []


# The lock

HOLDER = """
import sys, time
from iterdpo.run.rundir import RunDir
with RunDir(sys.argv[1]).lock():
    print("ready", flush=True)
    time.sleep(100)
"""


def test_a_second_process_is_kept_out_and_told_which_one_is_in(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with other_process(HOLDER, run.root) as holder:
        with pytest.raises(RunLockedError, match=f"in use by process {holder.pid}; wait for it to end"), run.lock():
            pass
        with RunDir(tmp_path / "other").lock():
            pass  # another run is another lock


def test_the_lock_goes_when_its_process_is_killed(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with other_process(HOLDER, run.root) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with run.lock():
            assert (run.root / ".lock").read_text() == str(os.getpid())


def test_the_lock_is_free_again_after_its_block_an_error_too(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(ZeroDivisionError), run.lock():
        raise ZeroDivisionError
    with run.lock():
        pass


def test_who_waits_gets_the_lock_when_it_is_released(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with other_process(HOLDER.replace("100", "0.3"), run.root):
        started = time.monotonic()
        with run.lock(wait=True):
            assert time.monotonic() - started > 0.1


@pytest.mark.parametrize("name", ["file", "file/run", "file/a/b"])
def test_a_run_directory_that_cannot_be_written_is_said_in_a_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")  # root writes everywhere, but not below a file
    with (
        pytest.raises(UserError, match=r"cannot be written \(.+\); choose another run_dir") as caught,
        RunDir(tmp_path / name).lock(),
    ):
        pass
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("note", [{"config": {}, "versions": {}}, {"format": 1, "config": {}}])
def test_a_run_of_another_format_is_refused_in_one_sentence(tmp_path: Path, note: dict[str, Any]) -> None:
    write_json(tmp_path / "run.json", note)
    with pytest.raises(
        UserError, match=r"made by another version of iterdpo, whose files this one cannot read; finish"
    ) as e:
        RunDir(tmp_path)
    assert str(tmp_path) in str(e.value)
    assert "\n" not in str(e.value)


def test_a_run_of_this_format_is_opened_again(tmp_path: Path) -> None:
    RunDir(tmp_path).write_config({"rounds": 3})
    assert RunDir(tmp_path).read_config() == {"rounds": 3}


def test_two_attics_of_one_process_are_two_directories(tmp_path: Path) -> None:
    assert RunDir(tmp_path).attic != RunDir(tmp_path).attic


def test_a_kill_while_a_step_is_sealed_loses_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(tmp_path / "round-001" / "policy", {"seed": 1})
    (step.begin() / "weights").write_text("made")

    def killed(directory: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(rundir, "sync_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            step.finish()
    again = Step(step.path, {"seed": 1})
    assert (again.begin() / "weights").read_text() == "made"
    assert list(again.finish().files) == ["weights"]


# Disks


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG])
def test_a_disk_that_refuses_is_one_line_with_the_run_directory_the_file_and_the_remedy(
    tmp_path: Path, code: int
) -> None:
    with pytest.raises(RunFailed) as caught, RunDir(tmp_path).lock():
        raise OSError(code, os.strerror(code), "shard-000000.parquet")
    assert str(caught.value).startswith(f"run_dir {tmp_path}: shard-000000.parquet: {os.strerror(code).lower()}; ")
    assert str(caught.value).endswith("and the same command goes on")


def test_a_full_disk_that_is_not_known_to_be_the_run_directorys_is_looked_for_elsewhere_too(tmp_path: Path) -> None:
    full = "no space left on device, there or in TMPDIR or PREFECT_HOME; make room"
    with pytest.raises(RunFailed, match=full), RunDir(tmp_path).lock():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_directory_in_place_of_a_file_that_is_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(RunFailed, match=r"/report\.html: is a directory; move that"), RunDir(tmp_path).lock():
        write_text(tmp_path / "report.html", "text")


def test_a_directory_in_place_of_the_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    way = r"\.lock\); move that directory away, or choose another run_dir"
    with pytest.raises(UserError, match=way), RunDir(tmp_path).lock():
        pass


def test_an_error_that_is_not_the_disks_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ConnectionRefusedError), RunDir(tmp_path).lock():
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")


def test_a_file_larger_than_the_limit_leaves_the_old_one_and_nothing_beside_it(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from pathlib import Path
from iterdpo.errors import RunFailed
from iterdpo.run.rundir import RunDir, write_json
run = RunDir(sys.argv[1])
with run.lock():
    write_json(run.root / "state.json", {"a": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
try:
    with run.lock():
        write_json(run.root / "state.json", {"a": "b" * 1000})
except RunFailed as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert "file too large; raise the limit" in done.stdout, done.stderr
    assert read_json(tmp_path / "state.json") == {"a": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "state.json"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused_by_the_name_of_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(disk.fcntl, "flock", flock)
    with pytest.raises(UserError, match=f"run_dir {tmp_path}: its file system has no locks"), RunDir(tmp_path).lock():
        pass


def test_a_failure_is_noted_with_its_time_and_its_round_and_rises(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.last_failure() is None
    with pytest.raises(KeyError), run.noting_failures():
        raise KeyError("gold")
    with pytest.raises(ChildFailed), run.noting_failures():
        raise ChildFailed("training failed:\nout of memory")
    with open(run.log_path("failures"), "a") as log:
        log.write('{"time": "20')  # the machine stopped
    failure = run.last_failure()
    assert failure is not None
    assert (failure["round"], failure["reason"]) == (0, "training failed:\nout of memory")
    assert datetime.fromisoformat(failure["time"]).tzinfo is not None


def test_an_interruption_is_no_failure(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(KeyboardInterrupt), run.noting_failures():
        raise KeyboardInterrupt
    assert run.last_failure() is None
