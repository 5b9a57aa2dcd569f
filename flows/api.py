"""The Python calls that the command line makes, for scripts and notebooks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.loop import run_loop, run_round
from iterdpo.config import Config, JudgeConfig, OfflineConfig, parse_config
from iterdpo.errors import ConfigError, JudgeError, UserError
from iterdpo.judging.judge import NamedJudge
from iterdpo.report.page import refresh_report, write_report
from iterdpo.run.progress import Progress
from iterdpo.run.read import Run, read_run
from iterdpo.run.rundir import RunDir, digest, read_manifest
from iterdpo.run.supervise import withhold
from iterdpo.sampling import Sampler
from iterdpo.stages.judge import retry_judgments as judge_again
from iterdpo.stages.offline import train_round
from iterdpo.stages.plan import first_pending
from iterdpo.stages.runs import IterativeRun
from judges import load_judge
from judges.adapter import adapt
from judges.load import (
    check_columns,
    check_judge,
    compares,
    expected_abstentions,
    judge_version,
    key_variables,
    probe_judge,
)

AnyJudge = Callable[..., Any] | object
"""What `judges/adapter.py` turns into a judge: a function, a class or an object."""


def open_run(
    config: Config,
    *,
    judge: AnyJudge | None = None,
    heldout_judge: AnyJudge | None = None,
    sampler: Sampler | None = None,
    progress: Progress | None = None,
    redo: bool = False,
) -> IterativeRun:
    """The checked resources of a run. No model is loaded.

    `judge` and `heldout_judge` replace those that the configuration names.

    Raises:
        UserError: a problem with the configuration, the data, the checkpoint or a judge.
    """
    train = _named("train_judge", config.judge, judge)
    second = heldout_judge is not None or config.evaluation.judge is not None
    heldout = _named("heldout_judge", config.evaluation.judge, heldout_judge) if second else None
    run = IterativeRun(config, train_judge=train, heldout_judge=heldout, sampler=sampler, progress=progress, redo=redo)

    evaluated, trained = run.prompts.heldout.columns(), run.prompts.train.columns()
    for section, given in ((config.judge, judge), (config.evaluation.judge, heldout_judge)):
        if section is not None and given is None:
            columns = evaluated if section is config.evaluation.judge else evaluated & trained
            check_columns(section.use, columns, section.args)
            score = f"score/{'train' if section is config.judge else 'heldout'}_judge"
            for key, metric in config.gate.metrics():
                if metric.startswith(score) and compares(section.use, section.args):
                    raise ConfigError(
                        f"{key} = {metric!r}: {section.use} compares completions, and gives none a score of its own, so no "
                        "round would be promoted; choose win_rate/vs_previous or win_rate/vs_initial"
                    )
    return run


def check_surroundings(run: IterativeRun, *, prefect: bool) -> None:
    """Try once, before anything heavy begins, what a run needs from outside its configuration.

    transformers makes a model of the checkpoint, without its weights. The user's code is imported, an endpoint is asked a
    question, as is the Prefect server that is configured, and the free disk is held against the estimate.

    Raises:
        UserError: the first of these that fails.
    """
    run.check_model()
    run.check_space()
    if prefect:
        from flows.server import check_api

        check_api()
    run.probe_sampler()
    for judge in run.judges:
        judge.named.probe()


def run_rounds(
    config: Config,
    *,
    judge: AnyJudge | None = None,
    heldout_judge: AnyJudge | None = None,
    prefect: bool = True,
    progress: Progress | None = None,
    redo: bool = False,
    sampler: Sampler | None = None,
) -> Run:
    """Run the configured rounds that are not finished, and return the run.

    Args:
        config: see `iterdpo.load_config`.
        judge: your own judge, instead of the configured one, in any form that `judges/adapter.py` takes.
        heldout_judge: the same for the evaluation.
        prefect: run as the Prefect flow `iterative_dpo`, on the server in PREFECT_API_URL or a temporary one.
        progress: `Progress(sys.stdout)` shows the same as the command line. By default nothing is shown.
        redo: repeat steps that were made with other settings, instead of refusing.
        sampler: a sampler to use instead of the vLLM engine.

    Raises:
        UserError: bad input, found before anything is loaded; or another process is using the run directory.
        ChildFailed: the sampler or the trainer ended with an error. Finished work is kept; call again to continue.
    """
    run = open_run(config, judge=judge, heldout_judge=heldout_judge, sampler=sampler, progress=progress, redo=redo)
    continue_run(run, prefect=prefect)
    return read_run(config.run_dir)


def continue_run(run: IterativeRun, *, prefect: bool = True, wait: bool = False) -> bool:
    """Do the unfinished work of a run. Returns whether there was any.

    `wait`: if another process is using the run directory, wait for it to end instead of refusing.
    """
    with run.dir.lock(wait=wait), run.dir.noting_failures(), run:
        run.dir.refresh()
        refresh_report(run.dir.root)
        pending = first_pending(run)
        if pending is None:
            if not (run.dir.root / "run.json").exists():  # it was damaged, and was deleted
                run.dir.write_config(run.config.model_dump())
            return False
        run.warm_up()
        run.check_model()  # before the prompts are tokenized: a tokenizer of an unknown model may fail in any way
        from flows.calibrate import note_estimate

        max_tokens = run.max_model_len  # a prompt that is too long is found here
        check_surroundings(run, prefect=prefect)
        run.dir.write_config(run.config.model_dump())
        note_estimate(run)
        rounds = f"{run.config.rounds} round{'s'[: run.config.rounds > 1]}"
        run.progress.say(f"run {run.dir.root}: from {pending} on, {rounds}, context {max_tokens:,} tokens")
        run.progress.say(f"  {'prompts':<9} {run.prompts.summary()}")
        if prefect:
            from flows.iterative_dpo import run_under_prefect

            run_under_prefect(run)
            return True
        for record in run_loop(run, lambda t: run_round(run, t)):
            run.progress.say(describe(record.metrics))
            write_report(run.dir.root)
        return True


def retry_judgments(
    run_dir: str | Path, *, round: int | None = None, progress: Progress | None = None
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Judge the abstentions of a round's finished judgments again; by default of the last round that has judgments.

    Returns the round, and the counts before and after. The next `iterdpo run --redo` repeats the steps
    that used the old judgments.

    Raises:
        UserError: no run, no such judgments, or nothing that abstained.
    """
    settings = RunDir(run_dir).read_config() | {"run_dir": str(run_dir)}  # wherever it lies now
    run = open_run(parse_config(Config, settings), progress=progress)
    directory = run.dir
    with directory.lock(), run:
        judged = {r: m for r in directory.rounds() if (m := read_manifest(directory.round_dir(r) / "judgments"))}
        round = max(judged, default=0) if round is None else round
        if round not in judged:
            remedy = "to continue a stage that stopped, repeat the command that started it"
            raise UserError(f"{directory.root}: round {round} has no finished judgments; {remedy}")
        if not judged[round].counts["unjudged"]:
            raise UserError(f"{directory.root}: round {round}: nothing abstained, so there is nothing to judge again")
        before, after = judge_again(run, round)
    return round, before.counts, after.counts


def train_offline(config: OfflineConfig, *, progress: Progress | None = None, redo: bool = False) -> Run:
    """One DPO round on existing preference pairs; see `iterdpo.stages.offline.train_round`.

    Raises:
        UserError: bad input, found before a model is loaded.
        ChildFailed: training ended with an error. Call again to continue from its last checkpoint.
    """
    train_round(config, progress=progress or Progress(), redo=redo)
    write_report(config.run_dir)
    return read_run(config.run_dir)


def describe(metrics: dict[str, Any]) -> str:
    """A finished round in one line: `round 2: held-out score 0.531, win rate 0.66 [0.60, 0.72] vs initial, …`."""

    def shown(name: str, form: str = ".3f") -> str:
        return "–" if metrics.get(name) is None else format(metrics[name], form)

    line = f"round {metrics['round']}: train judge {shown('score/train_judge')}"
    if metrics.get("score/heldout_judge") is not None:
        line += f", held-out judge {shown('score/heldout_judge')}"
    if metrics.get("win_rate/vs_initial") is not None:
        low, high = shown("win_rate/vs_initial_low", ".2f"), shown("win_rate/vs_initial_high", ".2f")
        line += f", wins {shown('win_rate/vs_initial', '.2f')} [{low}, {high}] vs initial"
        line += f", {shown('win_rate/vs_previous', '.2f')} vs previous, KL {shown('kl/to_initial', '.1f')}"
    decision = metrics.get("gate/decision")
    return line + (f" → {decision}" if metrics["round"] else "")


def _named(role: str, section: JudgeConfig | None, own: AnyJudge | None) -> NamedJudge:
    limits = section.model_dump(exclude={"use", "args"}) if section is not None else {}
    if own is not None:
        version = _source_version(own)
        name = getattr(own, "__name__", type(own).__name__)
        return NamedJudge(role, name, version, lambda: adapt(own, name=name, version=version, args={}), **limits)
    assert section is not None
    check_judge(section.use, section.args)
    withhold(*key_variables(section.args))
    limits["probe"] = lambda: probe_judge(section.use, section.args)
    version = judge_version(section.use, section.args)
    limits["expected_abstentions"] = expected_abstentions(section.use, section.args)
    return NamedJudge(role, section.use, version, lambda: load_judge(section.use, section.args), **limits)


def _source_version(own: AnyJudge) -> str:
    """A version for a judge that is given as an object: its own, or a hash of its source and of what it holds."""
    declared = getattr(own, "version", None)
    if isinstance(declared, str) and declared:
        return declared
    function = own.func if isinstance(own, functools.partial) else own
    plain = inspect.isfunction(function) or inspect.isclass(function)
    try:
        held = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
        if isinstance(own, functools.partial):
            held = {**held, "args": list(own.args), **own.keywords}
        elif not plain:
            held = vars(own)
        source = inspect.getsource(function if plain else type(function))  # type: ignore[arg-type]
        return digest([source, held])
    except (OSError, TypeError, ValueError):
        wrong = "its source and values cannot be read, so a change would go unnoticed"
        remedy = "give it a `version`, a string that you change whenever the judge changes"
        raise JudgeError(f"judge {own!r}: {wrong}; {remedy}") from None
