"""Which policy a round's loss is regularised towards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from iterdpo.run.artifacts import PolicyCheckpoint
from iterdpo.run.rundir import directory_digest
from iterdpo.stages.reference import reference_policy, reference_steps
from iterdpo.stages.runs import IterativeRun
from iterdpo.testing import build_tiny_checkpoint
from iterdpo.types import RoundRecord
from tests.unit.stages.harness import Room


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
