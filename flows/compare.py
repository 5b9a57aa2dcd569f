"""Runs the arms of an experiment one after the other, as ordinary run directories, and compares them on one page.

Everything is below the experiment's directory: `<arm>/seed-<n>`, and the trials of tuned settings in `tuning/`. Run
again, it goes on: a finished step is not repeated. Run several times at once, each process takes the runs that no other
has, and waits for the rest. A step that another run of the same seed has already made from the same inputs is taken from
there: round 0 and the first round's completions are made once for all arms.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from flows.api import check_surroundings, describe, open_run
from flows.experiment import Arm, Experiment
from flows.loop import PLAIN, Stages, initial_round, run_loop, run_round
from flows.plan import pairs_of_a_round
from iterdpo.config import Config
from iterdpo.errors import ChildFailed, RunLockedError, UserError
from iterdpo.report.compare import ArmRuns, Trial, write_comparison
from iterdpo.report.page import write_report
from iterdpo.run import supervise
from iterdpo.run.artifacts import Evaluation, PolicyCheckpoint
from iterdpo.run.checkpoints import check_checkpoint, training_bytes
from iterdpo.run.disk import check_space
from iterdpo.run.progress import Progress
from iterdpo.run.rundir import (
    RunDir,
    Step,
    check_step,
    differing_keys,
    digest,
    read_manifest,
    read_object,
    removed,
    write_json,
    write_with,
)
from iterdpo.sampling import Sampler
from iterdpo.stages import evaluate, judge, sample, train
from iterdpo.stages.benchmarks import benchmark_steps
from iterdpo.stages.gate import decision_record
from iterdpo.stages.plan import first_pending, first_pending_of
from iterdpo.stages.runs import IterativeRun
from iterdpo.training.launch import TRAIN_LOG
from iterdpo.types import RoundRecord, content_to_json

MISSING = "import sys; from importlib.util import find_spec; print(*(m for m in sys.argv[1:] if find_spec(m) is None))"
"""A program that prints which of the modules in its arguments its Python lacks."""
OWN_BUDGET = "budget.json"
"""What a command may leave beside its policy: `{"completions": 4096, "judge_calls": 4096, "steps": 64, "tokens": 81920}`."""


@dataclass(frozen=True)
class Planned:
    """A run of an experiment: an arm at a seed, or a trial of its settings."""

    arm: Arm
    seed: int
    config: Config

    @property
    def root(self) -> Path:
        return Path(self.config.run_dir)


def compare(
    experiment: Experiment,
    *,
    progress: Progress | None = None,
    redo: bool = False,
    sampler: Sampler | None = None,
    stages: Stages = PLAIN,
) -> Path:
    """Run what of an experiment is not finished, and write its page. Returns the page's path.

    Args:
        experiment: see `load_experiment`.
        progress: where progress is shown.
        redo: repeat steps that were made with other settings, instead of refusing.
        sampler: a sampler to use instead of the vLLM engine.
        stages: other stages than the loop's own, for tests.

    Raises:
        UserError: bad input, found before anything is loaded; or another process is using a run directory.
        ChildFailed: the sampler, the trainer or an arm's command ended with an error. Call again to continue.
    """
    progress = progress or Progress()
    check(experiment)
    chosen: dict[str, dict[str, Any]] = {}
    trials: list[Trial] = []
    tune = experiment.settings.tune
    every = [
        run for arm in experiment.arms for settings in arm.trials() for run in trial_runs(experiment, arm, settings)
    ]

    def try_once(run: Planned) -> None:
        if _tried(run) is None:
            _try(run, _of_seed(every, run), progress, redo, sampler, stages)
        with RunDir(run.root).lock():
            _delete_policies(run.root)  # of no further use

    _each([run for run in every if run.arm.grid], try_once, progress)
    for arm in experiment.arms:
        mine = []
        for settings in arm.trials() if arm.grid else ():
            runs = trial_runs(experiment, arm, settings)
            ended = [e for run in runs if (e := _tried(run)) is not None]
            if len(ended) < len(runs):
                raise UserError(f"{runs[0].root.parent}: another process has tried other settings there; run it again")
            mine.append(Trial(arm.name, settings, fmean(e["score"] for e in ended), fmean(e["kl"] for e in ended)))
        if mine:
            best = best_trial(mine, tune.max_kl if tune else None)
            chosen[arm.name] = dict(best.settings)
            trials += mine
            progress.say(f"arm {arm.name}: {best.describe()}: the best of {len(mine)} by the training judge")
    plan = arm_runs(experiment, chosen)

    def work(planned: Planned) -> None:
        worked = _work(planned, _of_seed(plan, planned), progress, redo, sampler, stages)
        if worked and planned is not plan[-1]:
            write_page(experiment, plan, chosen, trials)

    _each(plan, work, progress)
    return write_page(experiment, plan, chosen, trials)


def _each(runs: Sequence[Planned], work: Callable[[Planned], None], progress: Progress) -> None:
    """`work(run)` for each. Those that another process has are left to it, and looked at again when it has ended."""
    left = list(runs)
    while left:
        held = []
        for run in left:
            try:
                work(run)
            except RunLockedError:
                held.append(run)
        if len(held) == len(left):
            progress.say(f"waiting for {held[0].root}, which another process is making")
            with RunDir(held[0].root).lock(wait=True):
                pass
        left = held


def arm_runs(experiment: Experiment, tuned: Mapping[str, Mapping[str, Any]]) -> list[Planned]:
    """The runs of the experiment in their order: all arms with the first seed, then with the second."""
    return [
        Planned(arm, seed, experiment.config_of(arm, seed, tuned.get(arm.name)))
        for seed in experiment.settings.seeds
        for arm in experiment.arms
    ]


def trial_runs(experiment: Experiment, arm: Arm, settings: Mapping[str, Any]) -> list[Planned]:
    """The runs that try settings of an arm."""
    seeds = experiment.settings.tune.seeds if experiment.settings.tune else []
    return [Planned(arm, seed, experiment.config_of(arm, seed, settings, trial=True)) for seed in seeds]


def check(experiment: Experiment) -> None:
    """Open a run of each arm, which checks what can be checked without a model.

    Raises:
        UserError: the first problem, with the arm.
    """
    tokenized: set[str] = set()
    policies: dict[str, int] = {}  # bytes of one
    for planned in arm_runs(experiment, {})[: len(experiment.arms)]:
        config = planned.config
        prompts = digest(config.model_dump(mode="json", include={"rounds", "model", "prompts", "sampling"}))
        try:
            with open_run(config) as run:
                if planned.arm.kind == "command":
                    _check_command(planned.arm)
                if prompts not in tokenized:  # one that is too long is refused here
                    run.estimated_max_model_len()
                    tokenized.add(prompts)
                policies[planned.arm.name] = training_bytes(run.model_path, config.dpo)[0]
        except UserError as error:
            raise UserError(f"{experiment.source}: arms.{planned.arm.name}: {error}") from None
    check_space(experiment.out, sum(policies[p.arm.name] * _missing_policies(p) for p in arm_runs(experiment, {})))


def _missing_policies(planned: Planned) -> int:
    """How many policies a run has still to write."""
    if not planned.arm.trains:
        return 0
    rounds = planned.config.rounds if planned.arm.kind == "iterative" else 1
    return sum(not (RunDir(planned.root).round_dir(t) / "policy").is_dir() for t in range(1, rounds + 1))


def describe_experiment(experiment: Experiment) -> str:
    """The plan of `iterdpo compare --dry-run`: each arm's budget a seed, and how many runs there are. Loads no model."""
    check(experiment)
    seeds, tune = experiment.settings.seeds, experiment.settings.tune
    lines = [f"{experiment.settings.title or experiment.source}", f"runs in {experiment.out}, seeds {_listed(seeds)}"]
    runs = trials = 0
    for planned in arm_runs(experiment, {})[: len(experiment.arms)]:
        arm, config = planned.arm, planned.config
        lines.append(f"  {arm.name:<24} {arm.kind}: {_budget(arm, config)}")
        runs += len(seeds)
        if arm.grid and tune:
            each = len(list(arm.trials()))
            trials += each * len(tune.seeds)
            grid = "; ".join(f"{key} in {_listed(values)}" for key, values in arm.grid.items())
            lines.append(f"  {'':<24} tuned first: {grid}: {each} trials with seeds {_listed(tune.seeds)}")
    ended = sum(_has_ended(planned) for planned in arm_runs(experiment, {}))
    lines.append(f"{runs} runs" + (f" after {trials} to tune" if trials else "") + f"; {ended} have ended")
    return "\n".join(lines)


def best_trial(trials: Sequence[Trial], max_kl: float | None) -> Trial:
    """The trial with the highest mean score of the training judge; of equal ones the first.

    The held-out judge, which the experiment reports, has no say, and the seeds are others. If all are above `max_kl`, the
    one with the smallest KL is taken.
    """
    allowed = [trial for trial in trials if max_kl is None or trial.kl <= max_kl]
    return max(allowed, key=lambda trial: trial.score) if allowed else min(trials, key=lambda trial: trial.kl)


def write_page(
    experiment: Experiment, plan: Sequence[Planned], tuned: Mapping[str, Mapping[str, Any]], trials: Sequence[Trial]
) -> Path:
    """Write `compare.json` and `compare.html` from the finished runs of the plan."""
    arms = [
        ArmRuns(
            arm.name,
            arm.kind,
            arm.n,
            {**arm.settings, **tuned.get(arm.name, {})},
            {run.seed: run.root for run in plan if run.arm is arm and _has_ended(run)},
            next(run.config.evaluation.n for run in plan if run.arm is arm) - arm.n * (arm.kind == "best_of_n"),
        )
        for arm in experiment.arms
    ]
    return write_comparison(
        experiment.out,
        arms,
        trials=trials,
        title=experiment.settings.title,
        seeds=experiment.settings.seeds,
        settings={"base": experiment.base, "arms": experiment.settings.arms},
        own_judge=all(run.config.evaluation.judge is not None for run in plan),
    )


def adopt(step: Step, donors: Sequence[Path]) -> bool:
    """Take a step that is not done from the first run among `donors` that made it from the same inputs.

    Its files are linked and its logs, which may be appended to, are copied; its manifest is written anew with its counts
    and seconds. Returns whether one was found.

    Raises:
        DamagedError: a file of the step to take is not as it was written.
    """
    if step.manifest() is not None:
        return False
    for donor in donors:
        there = donor / step.path.parent.name / step.path.name
        manifest = read_manifest(there)
        if manifest is None or removed(there):
            continue
        if differing_keys(_key(step.path.name, manifest.inputs), _key(step.path.name, step.inputs)):
            continue
        check_step(there, manifest)
        step.begin()  # moves a step that was made with other inputs out of the way
        shutil.rmtree(step.partial)  # what an interrupted start left is not the donor's
        directory = step.begin()
        for name, entry in manifest.files.items():
            _link(there / name, directory / name, copy=bool(entry.get("log")))
        logs = [name for name, entry in manifest.files.items() if entry.get("log")]
        step.finish(counts=manifest.counts, seconds=manifest.seconds, logs=logs)
        return True
    return False


def sharing(donors: Sequence[Path], do: Stages = PLAIN) -> Stages:
    """The stages, each of which first looks whether one of the runs `donors` has what it would make."""

    def take(run: IterativeRun, round: int, step: Step) -> None:
        if adopt(step, donors) and (name := step.path.name) in PINNED:
            _pin(run, round if name == "completions" else 0, donors)

    def taking(stage: Callable[..., Any], name: str, inputs: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
        def stage_or_step(run: IterativeRun, round: int, *given: Any) -> Any:
            take(run, round, run.dir.step(round, name, inputs(run, round, *given)))
            return stage(run, round, *given)

        return stage_or_step

    def evaluated(
        run: IterativeRun, round: int, candidate: PolicyCheckpoint, against: Mapping[str, Evaluation]
    ) -> Evaluation:
        for step in evaluate.reference_steps(run).values():
            take(run, 0, step)
        compared = {**against, **evaluate.references(run)}
        take(run, round, step := run.dir.step(round, "evaluation", evaluate.inputs(run, candidate, compared)))
        if (manifest := step.manifest()) is not None:
            compared = {"initial": Evaluation(step.path, manifest.digest, round), **compared}
            for more in (
                *benchmark_steps(run, round, candidate),
                *evaluate.temperature_steps(run, round, candidate, compared),
            ):
                take(run, round, more)
        return do.evaluate(run, round, candidate, against)

    return Stages(
        sample=taking(do.sample, "completions", lambda run, t, policy, prompts, _: sample.inputs(run, policy, prompts)),
        judge=taking(do.judge, "judgments", lambda run, t, completions, by, _: judge.inputs(completions.digest, by)),
        pair=do.pair,  # made quickly, and of more than its arguments
        train=taking(do.train, "policy", train.inputs),
        evaluate=evaluated,
        gate=do.gate,
    )


HELD_OUT = ("references", "other_model", "evaluation", "temperatures")
"""Steps of held-out prompts."""
PINNED = ("completions", *HELD_OUT)
"""Steps that also write down the prompts they are of."""


def _key(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs that decide a step's content. Held-out prompts do not depend on how many a round samples."""
    if name not in HELD_OUT:
        return inputs
    return {**inputs, "prompts": {k: v for k, v in inputs["prompts"].items() if k != "per_round"}}


def _pin(run: IterativeRun, round: int, donors: Sequence[Path]) -> None:
    """Write down a round's prompts (0: those held out), with the token ids that they had when they were sampled."""
    name = f"round-{round:03d}/prompts" if round else "heldout"
    run.prompts.pin(round)
    here = run.dir.root / f"{name}.ids.parquet"
    for donor in donors:
        there = donor / f"{name}.ids.parquet"
        if there.exists() and (donor / f"{name}.jsonl").read_bytes() == (run.dir.root / f"{name}.jsonl").read_bytes():
            data = there.read_bytes()
            write_with(here, lambda handle, data=data: handle.write(data), record=here.parent)  # type: ignore[misc]
            return


def _link(source: Path, target: Path, *, copy: bool = False) -> None:
    """`target` as another name of `source`; a copy if that is asked for, or the file system has no such names."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}")
    fresh.unlink(missing_ok=True)
    try:
        if copy:
            shutil.copyfile(source, fresh)
        else:
            os.link(source, fresh)
    except OSError:
        shutil.copyfile(source, fresh)
    os.replace(fresh, target)
    fresh.unlink(missing_ok=True)  # still there if the two were names of one file already


def _work(
    planned: Planned,
    donors: Sequence[Path],
    progress: Progress,
    redo: bool,
    sampler: Sampler | None,
    stages: Stages,
    *,
    done: Callable[[], bool] = lambda: False,
) -> bool:
    """Do what of a run is not done, unless it is `done` after all once no other process has it. Returns whether there was any."""
    arm, config = planned.arm, planned.config
    run = open_run(config, progress=progress, redo=redo, sampler=sampler)
    with run.dir.lock(), run.dir.noting_failures(), run:
        run.dir.refresh()
        if done() or _pending(arm, run) is None:
            return False
        check_surroundings(run, prefect=False)
        run.dir.write_config(config.model_dump())
        progress.say(f"arm {arm.name}, seed {planned.seed}: {run.dir.root}")
        for record in _rounds(arm, run, sharing(donors, stages)):
            progress.say(describe(record.metrics))
        write_report(run.dir.root)
    return True


def _rounds(arm: Arm, run: IterativeRun, do: Stages) -> Iterator[RoundRecord]:
    if arm.kind in ("iterative", "offline"):
        yield from run_loop(run, lambda t: run_round(run, t, do))
        return
    yield initial_round(run, do)
    if arm.kind == "command":
        candidate = _commanded(arm, run)
        evaluation = do.evaluate(run, 1, candidate, run.baselines(1, run.initial))
        yield do.gate(run, 1, evaluation, candidate, run.initial)


def _pending(arm: Arm, run: IterativeRun) -> str | None:
    """The first step that is not done."""
    if arm.kind in ("iterative", "offline"):
        return first_pending(run)
    if (pending := first_pending_of(run, 0)) is not None or arm.kind != "command":
        return pending
    step = _command_step(arm, run)
    if (manifest := step.manifest()) is None:
        return step.name
    candidate = PolicyCheckpoint(step.path, manifest.digest, 1)
    against = run.baselines(1, run.initial) | evaluate.references(run)
    evaluated = run.dir.step(1, "evaluation", evaluate.inputs(run, candidate, against))
    further = (*benchmark_steps(run, 1, candidate), *evaluate.temperature_steps(run, 1, candidate, against))
    for step in (evaluated, *further):
        if step.manifest() is None:
            return step.name
    return None if run.dir.record(1) == decision_record(run, 1, candidate, run.initial) else "round-001/round.json"


def _has_ended(planned: Planned) -> bool:
    """Whether the run has its last round."""
    with suppress(UserError):
        records = RunDir(planned.root).records()
        last = {"iterative": planned.config.rounds, "offline": 1, "command": 1}.get(planned.arm.kind, 0)
        return bool(records) and (records[-1].round >= last or records[-1].decision == "stop")
    return False


def _command_step(arm: Arm, run: IterativeRun) -> Step:
    config = run.config
    rounds = [run.prompts.of(t).digest() for t in range(1, config.rounds + 1)]
    inputs = {
        "model": run.initial.digest,
        "command": list(arm.command),
        "prompts": rounds,
        "sampling": config.sampling.model_dump(include={"n", "temperature", "max_tokens"}),
        "judge": run.train_judge.key,
        "dpo": config.dpo.model_dump(exclude=train.SPEED_ONLY),
        "seed": config.seed,
    }
    return run.dir.step(1, "policy", inputs)


def _commanded(arm: Arm, run: IterativeRun) -> PolicyCheckpoint:
    """The policy that the arm's command makes, sealed as a step. It begins anew if it was interrupted."""
    step = _command_step(arm, run)
    if (manifest := step.manifest()) is None:
        config = run.config
        shutil.rmtree(step.partial, ignore_errors=True)
        directory = step.begin()
        prompts = [prompt for t in range(1, config.rounds + 1) for prompt in run.prompts.of(t)]
        rows = [{**prompt.columns, "prompt": content_to_json(prompt.content)} for prompt in prompts]
        files = run.dir.root / "command"
        files.mkdir(exist_ok=True)
        write_json(files / "prompts.json", rows, record=run.dir.root)
        spec = {
            "model": str(run.model_path),
            "prompts": str(files / "prompts.json"),
            "output": str(directory),
            "judge": config.judge.model_dump(include={"use", "args"}),
            "seed": config.seed,
            "completions": len(rows) * config.sampling.n,
            "n": config.sampling.n,
            "temperature": config.sampling.temperature,
            "max_tokens": config.sampling.max_tokens,
            "steps": config.rounds * config.dpo.steps(config.prompts.per_round),
            "learning_rate": config.dpo.learning_rate,
            "beta": config.dpo.beta,
        }
        write_json(files / "spec.json", spec, record=run.dir.root)
        places = {"{spec}": str(files / "spec.json"), "{python}": sys.executable}
        command = [places.get(word, word) for word in [_program(arm), *arm.command[1:]]]
        with run.progress.stage("command", len(rows), "prompts") as stage:
            log = run.dir.log_path("command")
            reserved = run.devices.descriptors
            with run.devices.turn(), supervise.start(command, log=log, reserved=reserved) as child:
                if child.wait() != 0:
                    raise ChildFailed(f"arms.{arm.name}: the command failed: {child.reason()} (log: {log})")
            stage.to(len(rows))
        try:
            check_checkpoint(directory)
        except UserError as error:
            raise ChildFailed(f"arms.{arm.name}: the command left no checkpoint in {directory}: {error}") from None
        (directory / TRAIN_LOG).touch()
        manifest = step.finish(counts={"budget": _command_budget(directory, spec)}, logs=[OWN_BUDGET, TRAIN_LOG])
    return PolicyCheckpoint(step.path, manifest.digest, 1)


def _command_budget(directory: Path, spec: dict[str, Any]) -> dict[str, float]:
    """What a command says that it used; what it was given if it says nothing."""
    path = directory / OWN_BUDGET
    said = read_object(path) if path.exists() else {}
    given = {"completions": spec["completions"], "judge_calls": spec["completions"], "steps": spec["steps"]}
    numbers = {k: v for k, v in said.items() if isinstance(v, int | float) and math.isfinite(v)}
    return given | numbers


def _program(arm: Arm) -> str:
    """The path of the command's program; a UserError if there is none."""
    if arm.command[0] == "{python}":
        return sys.executable
    if (found := shutil.which(arm.command[0])) is None:
        raise UserError(f"command: {arm.command[0]!r}: no such program; install it, or give its path")
    return found


def _check_command(arm: Arm) -> None:
    """Check that the command could run, without running it.

    Raises:
        UserError: its program, its script or a module that it requires is missing.
    """
    program = _program(arm)
    for word in arm.command[1:]:
        if word.endswith(".py") and not word.startswith("-") and not Path(word).is_file():
            raise UserError(f"command: {word!r}: no such file in {Path.cwd()}; correct the path, or start there")
    if arm.requires:
        asked = subprocess.run([program, "-c", MISSING, *arm.requires], capture_output=True, text=True, check=False)
        if asked.returncode != 0:
            raise UserError(f"requires: modules of a Python, which {program} is not; remove it")
        if missing := asked.stdout.split():
            raise UserError(
                f"requires: {program} lacks {', '.join(missing)}; install that there, name another Python in command, or "
                f"leave the arm out: arms.{arm.name}=null"
            )


def _tried(planned: Planned) -> dict[str, Any] | None:
    """How a trial ended, if it did, with these settings."""
    path = _result_of(planned)
    found = read_object(path) if path.exists() else {}
    return found if found.get("config") == _settings_of(planned) else None


def _settings_of(planned: Planned) -> dict[str, Any]:
    return planned.config.model_dump(mode="json", exclude={"run_dir", "share_gpus"})  # the directory may be moved


def _try(planned: Planned, *work: Any) -> dict[str, Any]:
    """Run a trial, and note how it ended."""
    _work(planned, *work, done=lambda: _tried(planned) is not None)
    run = RunDir(planned.root)
    metrics = run.records()[run.records()[-1].policy_round].metrics
    ended = {"config": _settings_of(planned), "score": metrics["score/train_judge"]}
    ended["kl"] = metrics["kl/to_initial"] or 0.0
    if ended["score"] is None:
        raise UserError(
            f"{planned.root}: the training judge scored no held-out completion, so nothing can be tuned by it"
        )
    write_json(_result_of(planned), ended)
    return ended


def _delete_policies(root: Path) -> None:
    """Delete a run's policies. One whose deletion is interrupted is no step any more, and is deleted the next time."""
    run = RunDir(root)
    for number in run.rounds():
        for name in ("policy", "ema", "reference"):
            step = run.round_dir(number) / name
            gone = step.with_name(f"{name}.partial")
            if step.is_dir():
                shutil.rmtree(gone, ignore_errors=True)
                os.replace(step, gone)
            shutil.rmtree(gone, ignore_errors=True)


def _result_of(planned: Planned) -> Path:
    return planned.root.with_name(f"{planned.root.name}.json")


def _of_seed(plan: Sequence[Planned], planned: Planned) -> list[Path]:
    """The other runs with the same seed."""
    return [other.root for other in plan if other.seed == planned.seed and other.root != planned.root]


def _budget(arm: Arm, config: Config) -> str:
    """What an arm uses with one seed, as it is planned."""
    if arm.kind == "initial":
        return "no training"
    if arm.kind == "best_of_n":
        return f"no training; {arm.n} completions and judge calls for each prompt in use"
    completions = config.rounds * config.prompts.per_round * config.sampling.n
    steps = config.rounds * config.dpo.steps(pairs_of_a_round(config))
    rounds = f"{config.rounds} round{'s'[: config.rounds > 1]}"
    return f"{rounds}, {completions:,} completions and as many judge calls, at most {steps:,} optimizer steps"


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
