"""The command line: `iterdpo quickstart | run | train | compare | serve | deploy | judge | show | report | status | …`.

Exit status: 0 done, 1 a run failed (finished work is kept), 2 bad input.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from cyclopts import App, CycloptsError, Parameter

from flows import judge_cli
from iterdpo import __version__
from iterdpo.errors import RunFailed, UserError
from iterdpo.run import disk
from iterdpo.run.progress import Progress
from iterdpo.run.supervise import end_soon

if TYPE_CHECKING:
    from rich.text import Text

    from iterdpo.config import Config

T = TypeVar("T")
OVERRIDES = "YAML files, merged left to right, and dotted overrides in any place: dpo.beta=0.2 sampling.n=8"
EXPERIMENT = (
    "YAML files of an experiment, and dotted overrides of it or of what all arms have: seeds=[0,1] dpo.beta=0.2"
)
JUDGED = "the round (default: the last with finished judgments)"
CRON = 'schedule for new rounds: "0 2 * * *" is every night at two (default: only when triggered)'

FOLDER = "configurations that triggers may name lie below this folder (default: the folder of CONFIG)"
CARD = "plan for this card by its data sheet: A100-40GB, A100-80GB, H100, H200, B200, L40S, L4, RTX-4090"
NOTIFY = (
    "tell this webhook (its URL) or block of the Prefect server (TYPE/NAME) of failed rounds; also in ITERDPO_NOTIFY"
)

Dtype = Literal["float32", "bfloat16", "float16"]
Word = Annotated[str, Parameter(name="CONFIG", required=True, help=OVERRIDES)]
Experiment = Annotated[str, Parameter(name="EXPERIMENT", required=True, help=EXPERIMENT)]
DryRun = Annotated[bool, Parameter(help="validate, print the plan, and stop")]
Redo = Annotated[bool, Parameter(help="repeat steps that were made with other settings")]
RunDirectory = Annotated[str, Parameter(help="the run directory")]


@Parameter(name="*")
@dataclass(frozen=True)
class RunOptions:
    dry_run: DryRun = False
    redo: Redo = False
    no_prefect: Annotated[bool, Parameter(help="run the loop without a Prefect server")] = False


RUN = RunOptions()


@Parameter(name="*")
@dataclass(frozen=True)
class TriggerOptions:
    cron: Annotated[str | None, Parameter(help=CRON)] = None
    timezone: Annotated[str, Parameter(help="time zone of --cron")] = "UTC"
    rounds: Annotated[int, Parameter(name="--add", help="rounds that each trigger adds")] = 1
    notify: Annotated[tuple[str, ...], Parameter(help=NOTIFY)] = ()
    hung_after: Annotated[float, Parameter(help="hours after which a round that has not ended is an alarm")] = 24.0


TRIGGERS = TriggerOptions()


def _complaint(error: CycloptsError) -> Text:
    """One line, like that of a `UserError`; as text, since rich would read markup in what the user typed."""
    from rich.text import Text

    return Text(f"iterdpo: {error}")


app = App(
    name="iterdpo",
    help="Iterative DPO: sample from the policy, judge, pair, train, evaluate on held-out prompts, promote.",
    version=f"iterdpo {__version__}",
    default_parameter=Parameter(negative=(), show_default=lambda value: value or None),
    help_format="plaintext",  # markdown would add a third to the time that --help takes
    error_formatter=_complaint,
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
app.command(judge_cli.app)


def main(argv: list[str] | None = None) -> None:
    """Parse, run, and turn the errors that a user can fix into one line."""
    try:
        status = app(argv)
        sys.stdout.flush()
    except (UserError, RunFailed) as error:
        print(f"iterdpo: {error}", file=sys.stderr)
        status = 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:
        if not _is_unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
        status = 1
    except OSError as error:
        if (failed := disk.failure(error)) is None:
            raise
        print(f"iterdpo: {failed}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("\niterdpo: interrupted; the same command continues from here", file=sys.stderr)
        status = 130
    if status == 130:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # Python would wait for all that is queued in the threads of a judge
    sys.exit(status or 0)


def _is_unread() -> bool:
    """Whether the reader of standard output is gone, as after `| head`."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


@app.command
def quickstart(
    *overrides: Annotated[str, Parameter(help="overrides of configs/quickstart.yaml")], options: RunOptions = RUN
) -> int:
    """Improve a 135M model over three rounds on a CPU, in minutes."""
    from flows.quickstart import prepare_quickstart, quickstart_config

    assets = prepare_quickstart(progress=Progress(sys.stdout).say)
    return _run_config(quickstart_config(assets, list(overrides)), options)


@app.command
def run(*config: Word, options: RunOptions = RUN) -> int:
    """Run rounds of iterative DPO, or continue a run."""
    from iterdpo.config import load_config

    return _run_config(_load(load_config, config), options)


@app.command
def train(*config: Word, dry_run: DryRun = False, redo: Redo = False) -> int:
    """Run one offline DPO round on existing preference pairs."""
    from flows.api import train_offline
    from flows.plan import describe_offline_plan
    from iterdpo.config import load_offline_config

    settings = _load(load_offline_config, config)
    progress = Progress(sys.stdout)
    if dry_run:
        print(describe_offline_plan(settings))
        return 0
    run = train_offline(settings, progress=progress, redo=redo)
    metrics = run.metrics.iloc[-1]
    shown = ("loss", "rewards/accuracies", "rewards/margins")
    for name in (*shown, *(f"eval_{name}" for name in shown)):
        if name in metrics and metrics[name] is not None and metrics[name] == metrics[name]:  # None, NaN: not logged
            progress.say(f"  {name:<24} {metrics[name]:.4f}")
    progress.say(f"report: {run.root / 'report.html'}")
    progress.say(f"policy: {run.root / 'policy'}")
    return 0


@app.command
def compare(
    *experiment: Experiment,
    out: Annotated[Path | None, Parameter(help="directory of its runs (default: runs/NAME)")] = None,
    dry_run: DryRun = False,
    redo: Redo = False,
) -> int:
    """Run the arms of an experiment with several seeds, and compare them on one page."""
    from flows.compare import compare as run_experiment
    from flows.compare import describe_experiment
    from flows.experiment import load_experiment

    loaded = _load(partial(load_experiment, out=out), experiment)
    if dry_run:
        print(describe_experiment(loaded))
        return 0
    progress = Progress(sys.stdout)
    progress.say(f"page: {run_experiment(loaded, progress=progress, redo=redo)}")
    return 0


@app.command
def serve(
    *config: Word,
    name: Annotated[str | None, Parameter(help="the deployment's name (default: that of the run directory)")] = None,
    triggers: TriggerOptions = TRIGGERS,
) -> int:
    """Serve the flow as a Prefect deployment; each trigger adds rounds."""
    from flows.serving import serve as serve_config
    from iterdpo.config import load_config

    serve_config(_load(load_config, config), name=name, progress=Progress(sys.stdout), **vars(triggers))
    sys.stdout.flush()
    os._exit(0)  # all is closed, and Python takes seconds to take torch down: a machine that shuts down may not wait


@app.command
def deploy(
    config: Annotated[
        str, Parameter(help="the configuration of a run, of an offline round (it has `data`), or of a judge")
    ],
    /,
    *,
    pool: Annotated[str, Parameter(help="the work pool; a process pool is created if there is none of this name")],
    name: Annotated[str | None, Parameter(help="the deployment's name (default: that of the file)")] = None,
    folder: Annotated[str | None, Parameter(help=FOLDER)] = None,
    if_busy: Annotated[Literal["wait", "drop"], Parameter(help="a trigger that finds a run at work")] = "wait",
    check: Annotated[str | None, Parameter(help="check the judge on this file of labelled pairs instead")] = None,
    remove: Annotated[bool, Parameter(help="delete the deployment and its alarms")] = False,
    triggers: TriggerOptions = TRIGGERS,
) -> int:
    """Deploy to a work pool of your Prefect server, whose workers run the rounds."""
    from flows import deploy as deploying

    progress = Progress(sys.stdout)
    if remove:
        deploying.remove(config, name=name, check=check is not None, progress=progress)
        return 0
    deploying.deploy(
        config,
        pool=pool,
        folder=folder,
        check=check,
        name=name,
        if_busy=if_busy,
        progress=progress,
        **vars(triggers),
    )
    return 0


@judge_cli.app.command
def retry(
    run_dir: RunDirectory,
    /,
    *,
    number: Annotated[int | None, Parameter(name="--round", help=JUDGED)] = None,
) -> int:
    """Judge a run's abstentions again."""
    from flows.api import retry_judgments
    from iterdpo.escape import printable

    round, before, after = retry_judgments(run_dir, round=number, progress=Progress(sys.stdout))
    print(f"round {round}: {before['unjudged']:,} completions without a score before, {after['unjudged']:,} now")
    for reason, count in after["abstentions"].items():
        print(f"  {count:>8,}  {printable(reason)}")
    print("iterdpo run ... --redo repeats the steps that used the old judgments")
    return 0


@judge_cli.app.command
def review(
    run_dir: RunDirectory,
    /,
    *,
    who: Annotated[str | None, Parameter(help="only the pairs for this name (the argument `who` of the judge)")] = None,
    port: Annotated[int, Parameter(help="port of the page, on 127.0.0.1 (default: a free one)")] = 0,
    no_open: Annotated[bool, Parameter(help="do not open a browser")] = False,
    once: Annotated[bool, Parameter(help="end when all pairs are judged")] = False,
) -> int:
    """Compare completions yourself, if a run's judge is a person."""
    from flows.review import serve_review

    serve_review(run_dir, who=who, port=port, open_browser=not no_open, once=once)
    return 0


@app.command
def show(
    run_dir: RunDirectory,
    /,
    *,
    number: Annotated[int, Parameter(name="--round", help="the round that sampled the completions")],
    prompt: Annotated[str | None, Parameter(help="a prompt's id or its beginning, or words of its text")] = None,
    heldout: Annotated[bool, Parameter(help="show the completions of the evaluation instead")] = False,
    limit: Annotated[int, Parameter(help="prompts to show")] = 5,
) -> int:
    """Read completions, with their scores."""
    from flows.show import show_completions

    for text in show_completions(run_dir, round=number, prompt=prompt, heldout=heldout, limit=limit):
        print(text)
    return 0


@app.command
def report(run_dir: RunDirectory, /) -> int:
    """Write RUN_DIR/report.html again."""
    from iterdpo.report.page import write_report

    print(write_report(run_dir))
    return 0


@app.command
def export(
    run_dir: RunDirectory,
    output: Annotated[Path, Parameter(help="the directory to write, which is new")],
    /,
    *,
    number: Annotated[int | None, Parameter(name="--round", help="the round (default: the promoted policy's)")] = None,
    merge: Annotated[bool, Parameter(help="add an adapter to its base")] = False,
    dtype: Annotated[Dtype | None, Parameter(help="precision of the weights (default: as they are)")] = None,
    pairs: Annotated[bool, Parameter(help="write the round's pairs instead (default: the last round's)")] = False,
    push: Annotated[str | None, Parameter(help="also upload it to this repository of the hub: OWNER/NAME")] = None,
    public: Annotated[bool, Parameter(help="a repository that --push creates is for everybody to read")] = False,
) -> int:
    """Write a policy, with its tokenizer and a model card, to serve or to share."""
    from flows.export import export_pairs, export_policy
    from flows.export import push as push_to_hub
    from iterdpo.errors import ConfigError

    if pairs and (merge or dtype):
        raise ConfigError("--pairs: pairs have no weights; leave --merge and --dtype out")
    if pairs:
        written = export_pairs(run_dir, output, round=number)
    else:
        written = export_policy(run_dir, output, round=number, merge=merge, dtype=dtype)
    print(written)
    if push is not None:
        print(push_to_hub(written, push, kind="dataset" if pairs else "model", public=public))
    return 0


@app.command
def status(run_dir: RunDirectory, /) -> int:
    """Show the finished steps, those in progress, and the metrics so far."""
    from flows.plan import describe_status

    print(describe_status(run_dir))
    return 0


@app.command
def join(
    run_dir: RunDirectory,
    /,
    *,
    rank: Annotated[int, Parameter(help="the number of this node, from 1 on; the node of the run itself is 0")],
) -> int:
    """Take part in the training of a run on several nodes, as one of the others; until it is ended."""
    from iterdpo.training.launch import join as join_training

    join_training(Path(run_dir).expanduser().absolute(), rank, say=Progress(sys.stdout).say)


@app.command
def plan(
    *config: Word,
    card: Annotated[str | None, Parameter(help=CARD)] = None,
    rates: Annotated[Path | None, Parameter(help="a file of rates, such as --calibrate writes")] = None,
    calibrate: Annotated[
        bool, Parameter(help="run a small round for real, and keep its rates for this machine")
    ] = False,
) -> int:
    """Show what a run would cost: calls, tokens, dollars, steps, disk, memory and hours."""
    from flows.api import open_run
    from flows.calibrate import cached_rates
    from flows.calibrate import calibrate as measure
    from flows.plan import describe_cost, describe_plan, load_of
    from iterdpo.config import load_config
    from iterdpo.run.cost import Rates, Shape, card_of, rates_of_card, read_rates

    settings = _load(load_config, config)
    chosen = card_of(card) if card is not None else None
    with open_run(settings) as run:
        found: Rates | None
        if rates is not None:
            found = read_rates(rates)
        elif calibrate:
            found = measure(settings, say=Progress(sys.stdout).say)
        elif chosen is not None and card is not None:
            shape = Shape.of(run.model_path, run.model_config)
            found = rates_of_card(chosen, card, shape, settings, load_of(run))
        else:
            found = cached_rates(settings)
        print(describe_plan(run))
        print(describe_cost(run, found, chosen))
    return 0


@app.command
def watch(
    run_dir: RunDirectory,
    /,
    *,
    every: Annotated[float, Parameter(help="seconds between two looks")] = 2.0,
    once: Annotated[bool, Parameter(help="show it once, and stop")] = False,
    port: Annotated[int | None, Parameter(help="also answer Prometheus at http://127.0.0.1:PORT/metrics")] = None,
) -> int:
    """Watch a run in a terminal: stages, rates, time left, losses, scores, the machine."""
    from flows.watch import watch as watch_run

    watch_run(run_dir, every=every, once=once, port=port)
    return 0


@app.command
def runs(
    root: Annotated[str, Parameter(help="a folder with run directories, at any depth")] = "runs",
    /,
    *,
    json: Annotated[bool, Parameter(help="print JSON")] = False,
) -> int:
    """List the runs below a folder: rounds, promoted policy, score, state, next trigger."""
    from dataclasses import asdict
    from json import dumps

    from flows.runs import as_table, lineages

    found = lineages(root)
    print(dumps([asdict(lineage) for lineage in found], indent=2) if json else as_table(found))
    return 0


@app.command
def verify(run_dir: RunDirectory, /) -> int:
    """Read all of a run, and name each file that is not as it was written."""
    from flows.verify import verify as verify_run

    found = verify_run(run_dir)
    for problem in found.problems:
        print(problem)
    print(found.summary())
    return 1 if found.problems else 0


def _run_config(config: Config, options: RunOptions) -> int:
    from flows.api import check_surroundings, continue_run, describe, open_run
    from flows.plan import describe_plan
    from iterdpo.gate import best_record
    from iterdpo.stages.plan import describe_pending

    progress = Progress(sys.stdout)
    run = open_run(config, progress=progress, redo=options.redo)
    if options.dry_run:
        run.check_model()
        plan = describe_plan(run)
        if describe_pending(run):
            check_surroundings(run, prefect=not options.no_prefect)
        print(plan)
        return 0
    end_soon()
    worked = continue_run(run, prefect=not options.no_prefect)
    records = run.dir.records()
    if not worked:
        progress.say(f"nothing to do: {run.dir.root} has its {records[-1].round} rounds (rounds=N adds more)")
        progress.say(describe(records[-1].metrics))
    if records[-1].decision == "stop":
        progress.say(f"stopped by the gate in round {records[-1].round}: {records[-1].reason}")
    progress.say(f"report: {run.dir.root / 'report.html'}")
    best = best_record(records)
    initial = " (the initial one: no round was promoted)" if best.policy_round == 0 else ""
    progress.say(f"policy: {run.dir.root / 'policy'}{initial}")
    return 0


def _load(load: Callable[..., T], arguments: tuple[str, ...]) -> T:
    files = [a for a in arguments if "=" not in a or Path(a).exists()]
    return load(*files, overrides=[a for a in arguments if a not in files])


if __name__ == "__main__":
    main()
