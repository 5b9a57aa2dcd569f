"""Each kind of file of a run, damaged: `verify` names it, and so does the stage that reads it, or makes it again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from flows import cli
from flows.api import continue_run
from flows.plan import describe_status
from flows.verify import verify
from iterdpo.errors import DamagedError, UserError
from iterdpo.run.read import read_run
from iterdpo.run.rundir import read_json, write_json, write_jsonl
from iterdpo.run.sums import RECORD, note, sha256_file
from iterdpo.stages import train as train_stage
from iterdpo.stages.plan import describe_pending
from iterdpo.testing import build_tiny_checkpoint
from iterdpo.training.launch import TRAIN_LOG, TrainSpec
from judges.person.store import Reviews, Task
from tests.unit.stages.harness import Room

SHARD, JUDGED = "shard-000000.parquet", "shard-000000.jsonl"


def launch(spec: TrainSpec, **_: Any) -> None:
    """What a training process leaves."""
    build_tiny_checkpoint(spec.output, seed=1)
    write_jsonl(spec.output / TRAIN_LOG, [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}])


@pytest.fixture
def room(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    monkeypatch.setattr(train_stage, "launch_training", launch)
    with ExitStack() as stack:
        yield Room(tmp_path, tiny_model, stack)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one round, with questions to a person."""
    with pytest.MonkeyPatch.context() as patched, ExitStack() as stack:
        patched.setattr(train_stage, "launch_training", launch)
        room = Room(tmp_path_factory.mktemp("finished"), tiny_model, stack)
        continue_run(room.open(rounds=1), prefect=False)
        reviews = Reviews(room.root / "run")
        reviews.ask([Task("1", "ann", "Which?", "A", left="a", right="b"), Task("2", "ann", "Which?", "B", "a", "b")])
        for task in ("1", "2"):
            reviews.batches()[0].submit(task, "left")
    return room.root / "run"


def start(room: Room, rounds: int = 1, **options: Any) -> None:
    continue_run(room.open(rounds=rounds, **options), prefect=False)


def flip(file: Path, at: float) -> None:
    raw = bytearray(file.read_bytes())
    where = min(int(at * len(raw)), len(raw) - 1)
    raw[where] ^= 1
    file.write_bytes(raw)


HOW = {
    "first byte": lambda file: flip(file, 0.0),
    "a byte amid": lambda file: flip(file, 0.53),
    "last byte": lambda file: flip(file, 1.0),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: -min(20, file.stat().st_size // 2 + 1)]),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "empty": lambda file: file.write_bytes(b""),
}
STARTED = ("a byte amid", "cut")
DERIVED = ("metrics.jsonl", "report.html", ".initial.json")
FINISHED = {  # each kind of file of a finished run; the steps without which a stage reads it
    "round-000/evaluation/MANIFEST.json": (),
    "round-000/evaluation/metrics.json": ("round-000/round.json",),
    f"round-000/evaluation/completions/{SHARD}": None,
    f"round-000/evaluation/judgments/train_judge/{JUDGED}": ("round-001/evaluation",),
    "round-000/round.json": (),
    "round-001/prompts.jsonl": (),
    "round-001/prompts.ids.parquet": ("round-001/completions",),
    "round-001/round.json": (),
    "round-001/completions/MANIFEST.json": (),
    "round-001/completions/README.md": None,
    f"round-001/completions/{SHARD}": ("round-001/judgments",),
    f"round-001/judgments/{JUDGED}": ("round-001/pairs",),
    "round-001/pairs/train.parquet": ("round-001/policy",),
    "round-001/pairs/MANIFEST.json": (),
    "round-001/policy/model.safetensors": ("round-001/evaluation",),
    "round-001/policy/config.json": ("round-001/evaluation",),
    "round-001/policy/tokenizer.json": ("round-001/evaluation",),
    "round-001/policy/train_log.jsonl": ("round-001/round.json",),
    "round-001/evaluation/logps.json": None,
    "heldout.jsonl": (),
    "heldout.ids.parquet": ("round-001/evaluation",),
    "run.json": (),
}


def damaged(finished: Path, root: Path, name: str, how: str) -> Path:
    shutil.copytree(finished, root / "run", symlinks=True)
    file = root / "run" / name
    HOW[how](file)
    return file


def test_every_damage_to_every_kind_of_file_is_named(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    unnoticed = []
    for name in (*FINISHED, *DERIVED):
        whole = (run / name).read_bytes()
        for how, damage in HOW.items():
            damage(run / name)
            if not any(str(run / name) in problem for problem in verify(run).problems):
                unnoticed.append((name, how))
            (run / name).write_bytes(whole)
    assert unnoticed == []
    assert verify(run).problems == []


@pytest.mark.parametrize("how", STARTED)
@pytest.mark.parametrize("name", [name for name, without in FINISHED.items() if without is not None])
def test_a_damaged_file_of_a_finished_run_is_named_by_the_stage_that_reads_it(
    finished: Path, room: Room, name: str, how: str
) -> None:
    file = damaged(finished, room.root, name, how)
    for step in FINISHED[name] or ():
        path = room.root / "run" / step
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = file.read_bytes()
    with pytest.raises(UserError) as caught:
        start(room)
    assert str(file) in str(caught.value)
    assert file.read_bytes() == before  # what is damaged may be worth restoring


@pytest.mark.parametrize("how", STARTED)
@pytest.mark.parametrize("name", DERIVED)
def test_a_damaged_file_that_follows_from_others_is_made_again(finished: Path, room: Room, name: str, how: str) -> None:
    damaged(finished, room.root, name, how)
    start(room)
    assert verify(room.root / "run").problems == []


@pytest.mark.parametrize("how", ["first byte", "a byte amid", "cut", "zeros"])
@pytest.mark.parametrize("name", [RECORD, f"round-001/{RECORD}", "review/*/tasks.jsonl", "review/*/verdicts.jsonl"])
def test_damaged_records_questions_and_answers_are_named(finished: Path, room: Room, name: str, how: str) -> None:
    ((file),) = finished.glob(name)
    file = damaged(finished, room.root, str(file.relative_to(finished)), how)
    assert [problem for problem in verify(room.root / "run").problems if str(file) in problem]


@pytest.mark.parametrize("how", STARTED)
@pytest.mark.parametrize(
    "name", ["completions.partial/STEP.json", f"completions.partial/{SHARD}", f"judgments.partial/{JUDGED}"]
)
def test_a_damaged_file_of_a_step_under_way_is_named(finished: Path, room: Room, name: str, how: str) -> None:
    step = name.partition(".")[0]
    place = room.root / "run" / "round-001"
    shutil.copytree(finished, room.root / "run", symlinks=True)
    for later in ("completions", "judgments", "pairs", "policy", "evaluation"):
        if later != "completions" or step == "completions":
            shutil.rmtree(place / later)
    (place / "round.json").unlink()
    with pytest.MonkeyPatch.context() as patched:
        interrupt_after_one_shard(room, patched, step)
        with pytest.raises(KeyboardInterrupt):
            start(room)
    file = place / name
    assert file.exists()
    assert verify(room.root / "run").problems == []
    HOW[how](file)
    assert [problem for problem in verify(room.root / "run").problems if str(file) in problem]
    with pytest.raises(DamagedError, match="delete it: the same command makes it again") as caught:
        start(room)
    assert str(file) in str(caught.value)
    file.unlink()
    start(room)
    assert verify(room.root / "run").problems == []


def interrupt_after_one_shard(room: Room, patched: pytest.MonkeyPatch, step: str) -> None:
    target: Any = room.sampler if step == "completions" else room.judge
    name = "sample" if step == "completions" else "judge"
    whole, calls = getattr(target, name), []

    def once(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return whole(*arguments)

    patched.setattr(target, name, once)


def test_a_damaged_checkpoint_of_the_trainer_is_named_before_it_is_trained_on(finished: Path, room: Room) -> None:
    shutil.copytree(finished, room.root / "run", symlinks=True)
    place = room.root / "run" / "round-001"
    inputs = read_json(place / "policy" / "MANIFEST.json")["inputs"]
    for later in ("policy", "evaluation"):
        shutil.rmtree(place / later)
    checkpoint = place / "policy.partial" / "checkpoint-000001"
    checkpoint.mkdir(parents=True)
    write_json(place / "policy.partial" / "STEP.json", inputs, record=place)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    note(checkpoint, {"model.safetensors": sha256_file(checkpoint / "model.safetensors")})
    assert verify(room.root / "run").problems == []
    for damage in (lambda file: flip(file, 0.5), Path.unlink):
        damage(checkpoint / "model.safetensors")
        assert any("checkpoint-000001/model.safetensors" in problem for problem in verify(room.root / "run").problems)
        with pytest.raises(DamagedError, match="delete the directory checkpoint-000001: training begins again"):
            start(room)
    shutil.rmtree(checkpoint)
    start(room)


def test_a_run_that_is_whole_has_nothing_to_name(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = verify(finished)
    assert (found.problems, found.notes, found.steps) == ([], [], 6)
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", str(finished)])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip().endswith(": all as they were written")


def test_verify_ends_with_status_1_if_a_file_is_damaged(
    finished: Path, room: Room, capsys: pytest.CaptureFixture[str]
) -> None:
    file = damaged(finished, room.root, "round-001/pairs/train.parquet", "a byte amid")
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", str(room.root / "run")])
    assert ended.value.code == 1
    assert f"{file}: damaged: its bytes are not those that were written" in capsys.readouterr().out


def test_a_file_that_was_cut_is_named_by_status_and_by_the_plan(finished: Path, room: Room) -> None:
    file = damaged(finished, room.root, "round-001/policy/model.safetensors", "cut")
    assert f"{file}: damaged: has" in describe_status(room.root / "run")
    assert f"{file}: damaged: has" in str(describe_pending(room.open(rounds=1)))


def test_with_redo_a_damaged_step_goes_to_the_attic_and_is_made_again(finished: Path, room: Room) -> None:
    file = damaged(finished, room.root, "round-001/policy/model.safetensors", "a byte amid")
    kept = file.read_bytes()
    start(room, redo=True)
    (aside,) = (room.root / "run" / "attic").glob("*/round-001/policy/model.safetensors")
    assert aside.read_bytes() == kept != file.read_bytes()
    assert verify(room.root / "run").problems == []


def test_a_step_made_from_other_files_than_those_that_are_there_is_named(finished: Path, room: Room) -> None:
    shutil.copytree(finished, room.root / "run", symlinks=True)
    manifest = room.root / "run" / "round-001" / "pairs" / "MANIFEST.json"
    value = read_json(manifest)
    value["inputs"]["judgments"] = "0123456789abcdef"
    write_json(manifest, value, record=manifest.parents[1], name="pairs/MANIFEST.json")
    (problem,) = verify(room.root / "run").problems
    assert "round-001/pairs: made with judgments = 0123456789abcdef, but " in problem


@pytest.mark.parametrize(
    "name", ["round-000/evaluation", "round-001/completions", "round-001/pairs", "round-001/policy"]
)
@pytest.mark.parametrize("how", ["missing", "a file"])
def test_a_step_of_a_decided_round_that_is_gone_is_named(finished: Path, room: Room, name: str, how: str) -> None:
    run = room.root / "run"
    shutil.copytree(finished, run, symlinks=True)
    shutil.rmtree(run / name)
    if how == "a file":
        (run / name).write_text("")
    assert verify(run).problems[0].startswith(f"{run / name}: damaged: is missing; ")


def test_a_file_beside_those_of_a_finished_step_is_named(finished: Path, room: Room) -> None:
    shutil.copytree(finished, room.root / "run", symlinks=True)
    stray = room.root / "run" / "round-001" / "completions" / "shard-000009.parquet"
    stray.write_bytes(b"")
    (problem,) = verify(room.root / "run").problems
    assert problem.startswith(f"{stray}: damaged: its step was finished without it")


def test_a_changed_initial_policy_is_named(finished: Path, room: Room, tmp_path: Path, tiny_model: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    start(room, model={"path": str(model)})
    flip(model / "model.safetensors", 0.5)
    assert any(str(model) in problem for problem in verify(room.root / "run").problems)


def test_the_bytes_of_an_initial_policy_are_checked_before_it_is_sampled_from(room: Room, tmp_path: Path) -> None:
    model = build_tiny_checkpoint(tmp_path / "model")
    run = room.open(model={"path": str(model)})
    run.dir.root.mkdir()
    digest = run.initial.digest
    times = (model / "model.safetensors").stat()
    note = run.dir.root / ".initial.json"
    flip(model / "model.safetensors", 0.5)
    stamp = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(model.iterdir()) if p.is_file()]
    write_json(note, {**read_json(note), "stamp": stamp}, record=run.dir.root)  # as if no time had changed
    again = room.open(model={"path": str(model)})
    assert again.initial.digest == digest
    with pytest.raises(UserError, match=r"model\.safetensors: not as when this run began"):
        again.check(again.initial)
    assert times.st_size == (model / "model.safetensors").stat().st_size


def test_a_read_only_copy_is_verified(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy, symlinks=True)
    (copy / ".lock").unlink(missing_ok=True)
    (copy / ".lock").mkdir()  # cannot be opened for writing, by the superuser either
    assert verify(copy).problems == []


def test_what_a_process_is_at_is_left_out(finished: Path, room: Room) -> None:
    shutil.copytree(finished, room.root / "run", symlinks=True)
    run = room.open(rounds=1)
    with run.dir.lock():
        found = verify(room.root / "run")
    assert found.problems == []
    assert "in use by process" in found.notes[0]


def test_metrics_are_read_from_the_records_of_the_rounds(finished: Path, room: Room) -> None:
    damaged(finished, room.root, "metrics.jsonl", "zeros")
    assert read_run(room.root / "run").metrics.index.tolist() == [0, 1]
