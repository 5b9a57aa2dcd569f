"""Training a round: what decides the policy, what the trainer is told, what the screen says. No process is started."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from iterdpo.errors import ChildFailed, ChildLost, StaleStepError
from iterdpo.run.artifacts import Pairs, PolicyCheckpoint
from iterdpo.run.progress import Progress
from iterdpo.run.rundir import directory_digest, read_jsonl, read_manifest
from iterdpo.seeds import derive_seed
from iterdpo.stages import train as stage
from iterdpo.stages.runs import IterativeRun
from iterdpo.stages.train import SPEED_ONLY, reference_policy, reference_steps, train
from iterdpo.stages.train import inputs as train_inputs
from iterdpo.testing import build_tiny_checkpoint
from iterdpo.training.launch import OPTIMIZER_STATE, TRAIN_LOG, TrainSpec
from iterdpo.types import RoundRecord
from tests.unit.stages.harness import Room, without_training

PAIRS = Pairs(Path("pairs"), "9d20", kept=24)
POLICY = PolicyCheckpoint(Path("policy"), "81f0", 1)
REFERENCE = PolicyCheckpoint(Path("reference"), "c3aa", 0)


def key(run: IterativeRun, round: int = 2) -> dict[str, Any]:
    return train_inputs(run, round, PAIRS, POLICY, REFERENCE)


def test_the_key_has_the_policies_the_pairs_the_rounds_seed_and_the_section(room: Room) -> None:
    run = room.open()
    found = key(run)
    assert {name: value for name, value in found.items() if name != "dpo"} == {
        "model": run.initial.digest,
        "policy": "81f0",
        "reference": "c3aa",
        "pairs": "9d20",
        "seed": derive_seed(0, 2, "train"),
    }
    assert found["dpo"].keys() == run.config.dpo.model_dump().keys() - SPEED_ONLY
    assert found["seed"] != key(run, 1)["seed"]


@pytest.mark.parametrize(
    "changes",
    [
        {"dpo": {"learning_rate": 1e-3}},
        {"dpo": {"beta": 0.5}},
        {"dpo": {"loss": "ipo"}},
        {"dpo": {"epochs": 2}},
        {"dpo": {"pairs_per_step": 4}},
        {"dpo": {"precision": "bf16"}},
        {"dpo": {"adapter": {"r": 4}}},
        {"dpo": {"warmup_steps": 3}},
        {"dpo": {"warmup_steps": 0}},
        {"dpo": {"max_steps": 3}},
        {"dpo": {"ld_alpha": 0.0}},
        {"seed": 1},
    ],
)
def test_the_key_changes_with_what_decides_the_policy(room: Room, changes: dict[str, Any]) -> None:
    assert key(room.open(**changes)) != key(room.open())


@pytest.mark.parametrize(
    "changes",
    [
        {"dpo": {"tokens_per_micro_batch": 128, "gradient_checkpointing": True, "checkpoint_every": 1}},
        {"dpo": {"sentinels": {"margin": 1.0}}},
        {"gate": {"minimum": 0.9}},
    ],
)
def test_the_key_is_the_same_if_only_speed_memory_or_what_is_watched_differ(
    room: Room, changes: dict[str, Any]
) -> None:
    assert key(room.open(**changes)) == key(room.open())


def test_optional_settings_are_in_the_key_only_if_they_are_set(room: Room) -> None:
    optional = {"warmup_steps", "max_steps", "ld_alpha"}
    assert not optional & key(room.open())["dpo"].keys()
    settings = {"warmup_steps": 0, "max_steps": 2, "ld_alpha": 0.0}
    assert optional <= key(room.open(dpo=settings))["dpo"].keys()
    assert key(room.open(dpo={"adapter": {}}))["dpo"]["adapter"].keys() == {"r", "alpha", "target_modules", "quantize"}


@pytest.mark.parametrize(
    ("dpo", "first"),  # 24 pairs, 8 a step
    [({}, None), ({"max_steps": 3}, None), ({"max_steps": 5}, None), ({"max_steps": 2}, (2, 8))],
)
def test_the_key_of_the_reference_names_the_steps_if_they_do_not_see_every_pair(
    room: Room, told: list[TrainSpec], dpo: dict[str, Any], first: tuple[int, int] | None
) -> None:
    train(room.open(dpo={"pairs_per_step": 8, "ld_alpha": 0.5, **dpo}), 2, PAIRS, POLICY, REFERENCE)
    (spec,) = told
    assert spec.reference_inputs.first == (None if first is None else (*first, spec.seed))
    assert ("first" in spec.reference_inputs.model_dump()) == (first is not None)
    assert spec.reference_inputs.ld_alpha == 0.5


def test_a_policy_that_is_trained_is_not_trained_again(room: Room) -> None:
    run = room.open()
    sealed = without_training(run, 2, PAIRS, POLICY, REFERENCE)
    assert train(run, 2, PAIRS, POLICY, REFERENCE) == sealed


def test_other_settings_are_refused(room: Room) -> None:
    without_training(room.open(), 2, PAIRS, POLICY, REFERENCE)
    with pytest.raises(StaleStepError, match=r"round-002/policy was made with dpo\.beta = 0\.1"):
        train(room.open(dpo={"beta": 0.5}), 2, PAIRS, POLICY, REFERENCE)


Launch = Callable[..., None]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[TrainSpec]:
    """What the trainer's process would be told; a checkpoint is there as soon as it is."""
    told: list[TrainSpec] = []

    def launch(spec: TrainSpec, **_: Any) -> None:
        told.append(spec)
        build_tiny_checkpoint(spec.output)

    monkeypatch.setattr(stage, "launch_training", launch)
    return told


def test_the_trainer_is_told_of_the_policy_the_reference_and_the_pairs(room: Room, told: list[TrainSpec]) -> None:
    run = room.open()
    trained = train(run, 2, PAIRS, POLICY, REFERENCE)
    place, (spec,) = run.dir.round_dir(2), told
    assert (spec.policy, spec.reference, spec.pairs, spec.eval_pairs) == (
        Path("policy"),
        Path("reference"),
        Path("pairs/train.parquet"),
        None,
    )
    assert (spec.output, spec.reference_output) == (place / "policy.partial", place / "reference")
    assert (spec.seed, spec.attic, spec.optimizer) == (derive_seed(0, 2, "train"), None, None)
    assert (spec.reference_inputs.reference, spec.reference_inputs.pairs) == ("c3aa", "9d20")
    assert (trained.path, trained.round) == (place / "policy", 2)
    manifest = read_manifest(trained.path)
    assert manifest is not None
    assert manifest.counts == {"pairs": 24}


def test_with_redo_the_old_goes_to_the_attic_that_the_trainer_is_told_of(room: Room, told: list[TrainSpec]) -> None:
    train(room.open(), 2, PAIRS, POLICY, REFERENCE)
    run = room.open(dpo={"beta": 0.5}, redo=True)
    train(run, 2, PAIRS, POLICY, REFERENCE)
    assert (run.dir.attic / "round-002" / "policy" / "MANIFEST.json").exists()
    assert told[1].attic == run.dir.attic


def test_a_reference_that_is_the_policy_is_not_loaded_beside_it(room: Room, told: list[TrainSpec]) -> None:
    train(room.open(), 2, PAIRS, POLICY, POLICY)
    assert told[0].reference is None


def test_moments_are_carried_from_a_policy_that_has_some(room: Room, tmp_path: Path, told: list[TrainSpec]) -> None:
    before = PolicyCheckpoint(tmp_path / "before", "81f0", 1)
    before.path.mkdir()
    run = room.open(dpo={"optimizer_state": "carry"})
    train(run, 1, PAIRS, before, before)
    (before.path / OPTIMIZER_STATE).touch()
    train(run, 2, PAIRS, before, before)
    train(room.open(redo=True), 2, PAIRS, before, before)
    assert [spec.optimizer for spec in told] == [None, before.path / OPTIMIZER_STATE, None]


def test_the_rate_of_training_leaves_out_the_steps_of_an_earlier_start(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def launch(spec: TrainSpec, on_step: Callable[[dict[str, Any]], None], **_: Any) -> None:
        nonlocal now
        log = spec.output / TRAIN_LOG
        earlier = read_jsonl(log) if log.exists() else []
        for row in earlier:  # at once, when the process comes up
            on_step(row)
        for step in range(len(earlier) + 1, len(earlier) + 4):
            now += 60 if step == len(earlier) + 1 else 2  # the first with the start-up
            log.write_text("".join(json.dumps({"step": s, "loss": 0.5}) + "\n" for s in range(1, step + 1)))
            on_step({"step": step, "loss": 0.5})
        if not earlier:
            raise KeyboardInterrupt

    monkeypatch.setattr(stage, "launch_training", launch)
    screen = io.StringIO()
    run = room.open(dpo={"pairs_per_step": 4}, progress=Progress(screen, clock=lambda: now))
    with pytest.raises(KeyboardInterrupt):
        train(run, 1, PAIRS, POLICY, POLICY)
    train(run, 1, PAIRS, POLICY, POLICY)
    first, second = (line for line in screen.getvalue().splitlines() if " s to start" in line)
    for line, count in ((first, "12 pairs"), (second, "24 pairs")):
        assert count in line
        assert "64.0 s, 60.0 s to start, 2.0 pairs/s" in line


@pytest.mark.parametrize(("losses", "started"), [(1, 2), (2, 3), (5, 3)])
def test_a_trainer_that_is_lost_is_started_again_a_bounded_number_of_times(
    room: Room, monkeypatch: pytest.MonkeyPatch, losses: int, started: int
) -> None:
    starts = 0

    def launch(spec: TrainSpec, **_: Any) -> None:
        nonlocal starts
        starts += 1
        if starts <= losses:
            raise ChildLost("training failed: it was ended by SIGKILL")

    monkeypatch.setattr(stage, "launch_training", launch)
    screen = io.StringIO()
    run = room.open(progress=Progress(screen), supervision={"restarts": 2})
    if losses > 2:
        with pytest.raises(ChildLost, match="SIGKILL"):
            train(run, 1, PAIRS, POLICY, POLICY)
    else:
        train(run, 1, PAIRS, POLICY, POLICY)
    assert starts == started
    again = "starting the trainer again, from its last checkpoint: training failed: it was ended by SIGKILL"
    assert screen.getvalue().count(again) == started - 1


def test_a_trainer_that_ends_with_an_error_is_not_started_again(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[TrainSpec] = []

    def launch(spec: TrainSpec, **_: Any) -> None:
        starts.append(spec)
        raise ChildFailed("training failed: the loss is not finite")

    monkeypatch.setattr(stage, "launch_training", launch)
    with pytest.raises(ChildFailed, match="not finite"):
        train(room.open(), 1, PAIRS, POLICY, POLICY)
    assert len(starts) == 1


def test_alarms_and_steps_that_were_not_finite_are_shown(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(spec: TrainSpec, on_step: Callable[[dict[str, Any]], None], **_: Any) -> None:
        on_step({"step": 1, "loss": 0.5, "rewards/margins": 51.0, "alarms": ["margin 51.0 is above 50"]})
        on_step({"step": 2})

    monkeypatch.setattr(stage, "launch_training", launch)
    screen = io.StringIO()
    train(room.open(progress=Progress(screen)), 1, PAIRS, POLICY, POLICY)
    assert "alarm     step 1: margin 51.0 is above 50" in screen.getvalue()
    assert "a step that was not finite: skipped" in screen.getvalue()


def promote(run: IterativeRun, rounds: int) -> None:
    """Seal the rounds before `rounds`, each with a policy of its own that was promoted."""
    run.dir.root.mkdir()
    for t in range(rounds):
        run.dir.round_dir(t).mkdir()
        policy = run.initial
        if t:
            path = build_tiny_checkpoint(run.dir.round_dir(t) / "policy", seed=t)
            policy = PolicyCheckpoint(path.relative_to(run.dir.root), directory_digest(path), t)
        run.dir.write_record(RoundRecord(t, "promote", "", str(policy.path), t, policy.digest, {}, {}))


def references(room: Room, rounds: int, **dpo: Any) -> list[int]:
    """The rounds whose policies are the references of rounds 1, 2, …"""
    run = room.open(dpo=dpo)
    promote(run, rounds)
    return [reference_policy(run, t, run.policy_after(t - 1)).round for t in range(1, rounds + 1)]


def test_previous_is_the_policy_that_the_round_starts_from(room: Room) -> None:
    assert references(room, 3, reference="previous") == [0, 1, 2]


def test_initial_is_the_initial_policy_in_every_round(room: Room) -> None:
    assert references(room, 3, reference="initial") == [0, 0, 0]


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4]), (2, [0, 0, 2, 2, 4]), (3, [0, 0, 0, 3, 3])])
def test_periodic_is_renewed_every_so_many_rounds(room: Room, every: int, expected: list[int]) -> None:
    assert references(room, 5, reference="periodic", reference_every=every) == expected


@pytest.mark.parametrize("reference", ["previous", "initial", "periodic"])
def test_a_reference_that_is_a_policy_of_the_lineage_takes_no_step(room: Room, reference: str) -> None:
    run = room.open(dpo={"reference": reference})
    promote(run, 3)
    assert list(reference_steps(run, 3, run.policy_after(2))) == []


def test_ema_averages_the_policies_that_rounds_started_from_and_keeps_each_average(room: Room) -> None:
    run = room.open(dpo={"reference": "ema", "reference_decay": 0.75})
    promote(run, 3)
    policies = [run.policy_after(t) for t in range(3)]
    assert reference_policy(run, 1, policies[0]) == policies[0]
    third = reference_policy(run, 3, policies[2])

    weights = [load_file(policy.path / "model.safetensors") for policy in policies]
    averaged = load_file(third.path / "model.safetensors")
    for name, tensor in averaged.items():
        second = 0.75 * weights[0][name] + 0.25 * weights[1][name]
        torch.testing.assert_close(tensor, 0.75 * second + 0.25 * weights[2][name], atol=1e-6, rtol=0)
    assert (run.dir.round_dir(2) / "ema" / "MANIFEST.json").exists()

    made = (third.path / "model.safetensors").stat().st_mtime_ns
    assert reference_policy(run, 3, policies[2]) == third
    assert (third.path / "model.safetensors").stat().st_mtime_ns == made


def test_the_step_of_ema_is_one_a_round_whose_average_is_new(room: Room) -> None:
    run = room.open(dpo={"reference": "ema", "reference_decay": 0.75})
    promote(run, 3)
    first, second, third = (run.policy_after(t) for t in range(3))
    [step] = reference_steps(run, 2, second)
    assert (step.name, step.manifest()) == ("round-002/ema", None)
    assert step.inputs == {"before": first.digest, "policy": second.digest, "decay": 0.75}
    average = reference_policy(run, 2, second)
    assert step.manifest() is not None
    [step] = reference_steps(run, 3, third)
    assert (step.name, step.manifest()) == ("round-003/ema", None)
    assert step.inputs == {"before": average.digest, "policy": third.digest, "decay": 0.75}


def test_ema_of_a_policy_that_was_kept_is_that_policy(room: Room) -> None:
    run = room.open(dpo={"reference": "ema"})
    promote(run, 2)
    run.dir.write_record(RoundRecord(1, "keep", "", str(run.initial.path), 0, run.initial.digest, {}, {}))
    assert reference_policy(run, 2, run.policy_after(1)) == run.initial
    assert list(reference_steps(run, 2, run.policy_after(1))) == []
