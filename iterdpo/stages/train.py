"""pi_{t+1} <- DPO(pi_t): the candidate, trained on a round's pairs in a separate process; and its reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from iterdpo.config import DPOConfig
from iterdpo.data.pairs import HELDOUT, TRAIN
from iterdpo.errors import ChildLost
from iterdpo.run.artifacts import Pairs, PolicyCheckpoint
from iterdpo.run.rundir import Step, check_step
from iterdpo.run.sums import check_files, record
from iterdpo.seeds import derive_seed
from iterdpo.stages.runs import IterativeRun, OfflineRun
from iterdpo.training.launch import OPTIMIZER_STATE, TRAIN_LOG, ReferenceInputs, TrainSpec, launch_training, nodes
from iterdpo.training.nodes import CALL

SPEED_ONLY = {
    "tokens_per_micro_batch",
    "shared_prompts",
    "gradient_checkpointing",
    "activation_offload",
    "kernels",
    "checkpoint_every",
    "processes",
    "accelerate_config",
    "trackers",
    "tracker_project",
    "sentinels",
}
"""Settings of `dpo` that change how fast or in how much memory a step runs, or what is watched; never what it computes."""


def train(
    run: OfflineRun, round: int, pairs: Pairs, policy: PolicyCheckpoint, reference: PolicyCheckpoint
) -> PolicyCheckpoint:
    """The candidate: `policy` after one DPO round on `pairs`, however they were made.

    If training ends with an error, ChildFailed is raised, and the last checkpoint stays.
    """
    step = run.dir.step(round, "policy", inputs(run, round, pairs, policy, reference))
    if (manifest := step.manifest()) is None:
        _train(run, round, step, pairs, policy, reference)
        manifest = step.finish(counts={"pairs": pairs.kept}, logs=[TRAIN_LOG, "train.json"])
    return PolicyCheckpoint(step.path, manifest.digest, round)


def inputs(
    run: OfflineRun, round: int, pairs: Pairs, policy: PolicyCheckpoint, reference: PolicyCheckpoint
) -> dict[str, Any]:
    return {
        "model": run.initial.digest,
        "policy": policy.digest,
        "dpo": _settings(run, round).model_dump(exclude=SPEED_ONLY),
        "reference": reference.digest,
        "pairs": pairs.digest,
        "seed": derive_seed(run.settings.seed, round, "train"),
    }


def _settings(run: OfflineRun, round: int) -> DPOConfig:
    """The section `dpo` with the learning rate of the round."""
    return run.settings.dpo.of_round(round).model_copy(update={"learning_rate": run.learning_rate(round)})


def _train(
    run: OfflineRun, round: int, step: Step, pairs: Pairs, policy: PolicyCheckpoint, reference: PolicyCheckpoint
) -> None:
    directory, place = step.begin(), step.path.parent
    run.check(policy, reference)
    check_step(pairs.path)
    check_step(place / "reference")
    for checkpoint in directory.glob("checkpoint-*"):
        check_files([checkpoint / name for name in record(checkpoint)])
    dpo, seed = _settings(run, round), step.inputs["seed"]
    heldout, carried = pairs.path / HELDOUT, policy.path / OPTIMIZER_STATE
    spec = TrainSpec(
        policy=policy.path,
        reference=None if reference.digest == policy.digest else reference.path,
        pairs=pairs.path / TRAIN,
        eval_pairs=heldout if heldout.exists() else None,
        output=directory,
        reference_output=place / "reference",
        attic=run.dir.attic if run.dir.redo else None,
        reference_inputs=ReferenceInputs(
            reference=reference.digest,
            pairs=pairs.digest,
            precision=dpo.precision if dpo.weights_dtype == "float32" else "bf16 weights",
            adapter=dpo.adapter is not None and dpo.adapter.quantize,  # its base is kept in fewer bits
            sampler_logps_tolerance=dpo.sampler_logps_tolerance,
            mismatched=seed if dpo.loss.type == "kto" else None,
            ld_alpha=dpo.ld_alpha,
            first=(dpo.steps(pairs.kept), dpo.pairs_per_step, seed)
            if dpo.pairs_seen(pairs.kept) < pairs.kept
            else None,
        ),
        dpo=dpo,
        seed=seed,
        trust_remote_code=run.settings.model.trust_remote_code,
        pairs_cache=place / "pairs.cache",
        optimizer=carried if dpo.optimizer_state == "carry" and carried.exists() else None,
    )
    if (count := nodes(dpo)) > 1:
        run.progress.say(f"training on {count} nodes: the others run iterdpo join {run.dir.root} --rank 1, 2, …")
    for left in reversed(range(run.settings.supervision.restarts + 1)):
        try:
            with run.devices.turn():
                _launch(run, round, spec, total=dpo.pairs_seen(pairs.kept))
            break
        except ChildLost as lost:
            if not left:
                raise
            run.progress.say(f"starting the trainer again, from its last checkpoint: {lost}")


def _launch(run: OfflineRun, round: int, spec: TrainSpec, *, total: int) -> None:
    dpo, directory = spec.dpo, spec.output
    log = directory / TRAIN_LOG
    rows, earlier = itertools.count(), log.read_text().count("\n") if log.exists() else 0
    with run.progress.stage("train", total, "pairs") as stage:

        def on_step(row: dict[str, Any]) -> None:
            stage.to(min(total, row["step"] * dpo.pairs_per_step))
            number = next(rows)
            if number == earlier:
                stage.begin()
            if number >= earlier:
                run.trackers.steps(round, row)
            margin = f", margin {row['rewards/margins']:.3f}" if "rewards/margins" in row else ""
            stage.remark = f"loss {row['loss']:.3f}{margin}" if "loss" in row else "a step that was not finite: skipped"
            for alarm in row.get("alarms", []):
                run.progress.say(f"  {'alarm':<9} step {row['step']}: {alarm}")

        launch_training(
            spec,
            spec_path=directory / "train.json",
            log=run.dir.log_path("train"),
            on_step=on_step,
            reserved=run.devices.descriptors,
            child=run.take_trainer(),
            call=run.dir.root / CALL,
            supervision=run.settings.supervision,
        )


def reference_policy(run: IterativeRun, round: int, policy: PolicyCheckpoint) -> PolicyCheckpoint:
    """The reference of `round`, which starts from `policy`. With `ema` the average of the checkpoints is made here."""
    dpo = run.config.dpo
    match dpo.reference:
        case "initial":
            return run.initial
        case "periodic":
            renewed = round - (round - 1) % dpo.reference_every
            return run.policy_after(renewed - 1)
        case "ema":
            return _average(run, round, policy)
    return policy


def reference_steps(run: IterativeRun, round: int, policy: PolicyCheckpoint) -> Iterator[Step]:
    """The steps that `reference_policy` takes: with `ema`, the average of the round, if it is new; those of earlier rounds are done."""
    if run.config.dpo.reference == "ema" and round > 1:
        before = run.policy_after(round - 2)
        step = _step(run, round, policy, _average(run, round - 1, before))
        if step is not None:
            yield step


def _average(run: IterativeRun, round: int, policy: PolicyCheckpoint) -> PolicyCheckpoint:
    """EMA_1 = pi_1, EMA_t = decay EMA_{t-1} + (1 - decay) pi_t, over the weights of the policies rounds started from."""
    if round == 1:
        return policy
    before = _average(run, round - 1, run.policy_after(round - 2))
    step = _step(run, round, policy, before)
    if step is None:
        return policy
    if (manifest := step.manifest()) is None:
        from iterdpo.training.models import average_checkpoints

        with run.progress.stage("average", 1, "checkpoint") as stage:
            decay = run.config.dpo.reference_decay
            run.check(before, policy)
            average_checkpoints(before.path, policy.path, decay=decay, output=step.begin())
            stage.to(1)
        manifest = step.finish()
    return PolicyCheckpoint(step.path, manifest.digest, round)


def _step(run: IterativeRun, round: int, policy: PolicyCheckpoint, before: PolicyCheckpoint) -> Step | None:
    """The step that averages; None if the two are one policy."""
    if before.digest == policy.digest:
        return None
    inputs = {"before": before.digest, "policy": policy.digest, "decay": run.config.dpo.reference_decay}
    return run.dir.step(round, "ema", inputs)
