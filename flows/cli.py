"""The command line: `iterdpo quickstart | run | train | serve | judge | report | status`.

Exit status: 0 done, 1 a run failed (what was done stays done), 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from flows.judge_cli import add_judge_commands
from flows.review import add_review_command

if TYPE_CHECKING:
    from iterdpo.config import Config, OfflineConfig
    from iterdpo.run.progress import Progress

DESCRIPTION = "Iterative DPO: sample from the policy, judge, pair, train, evaluate on held-out prompts, promote."
OVERRIDES = "YAML files, merged left to right, then dotted overrides: dpo.beta=0.2 sampling.n=8"


def main(argv: list[str] | None = None) -> None:
    """Parse, run, and turn the errors that a user can mend into one line."""
    arguments = parse(argv)
    from iterdpo.errors import RunFailed, UserError

    try:
        status = arguments.call(arguments)
    except UserError as error:
        print(f"iterdpo: {error}", file=sys.stderr)
        status = 2
    except RunFailed as error:
        print(f"iterdpo: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("\niterdpo: interrupted; the same command goes on from here", file=sys.stderr)
        status = 130
    sys.exit(status)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Overrides may stand anywhere, behind options too, which argparse alone does not allow under a command."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    takes = next((name for name in ("config", "overrides") if hasattr(arguments, name)), None)
    unknown = [word for word in rest if word.startswith("-") or takes is None]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if takes is not None:
        setattr(arguments, takes, [*getattr(arguments, takes), *rest])
    return arguments


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="iterdpo", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    quickstart = commands.add_parser("quickstart", help="improve a 135M model over three rounds on a CPU, in minutes")
    quickstart.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of configs/quickstart.yaml")
    _add_run_options(quickstart)
    quickstart.set_defaults(call=_quickstart)

    run = commands.add_parser("run", help="run rounds of iterative DPO, or go on with them")
    run.add_argument("config", nargs="+", metavar="CONFIG|key=value", help=OVERRIDES)
    _add_run_options(run)
    run.set_defaults(call=_run)

    train = commands.add_parser("train", help="one offline DPO round on preference pairs that exist already")
    train.add_argument("config", nargs="+", metavar="CONFIG|key=value", help=OVERRIDES)
    train.add_argument("--dry-run", action="store_true", help="validate, print the plan, and stop")
    train.add_argument("--redo", action="store_true", help="do steps that were made with other settings again")
    train.set_defaults(call=_train)

    serve = commands.add_parser("serve", help="serve the flow as a Prefect deployment; each trigger adds rounds")
    serve.add_argument("config", nargs="+", metavar="CONFIG|key=value", help=OVERRIDES)
    serve.add_argument(
        "--cron", help='when to add rounds: "0 2 * * *" is at two every night; without it, when triggered'
    )
    serve.add_argument("--timezone", default="UTC", help="of --cron (default: UTC)")
    serve.add_argument("--add", type=int, default=1, metavar="N", help="rounds that each trigger adds (default: 1)")
    serve.add_argument("--name", help="the deployment's name (default: that of the run directory)")
    serve.set_defaults(call=_serve)

    judge = add_judge_commands(commands)
    retry = judge.add_parser("retry", help="judge again what a run's judge could not judge")
    retry.add_argument("run_dir", metavar="RUN_DIR")
    retry.add_argument("--round", type=int, metavar="N", help="default: the last with finished judgments")
    retry.set_defaults(call=_retry)
    add_review_command(judge)

    report = commands.add_parser("report", help="write RUN_DIR/report.html again")
    report.add_argument("run_dir", metavar="RUN_DIR")
    report.set_defaults(call=_report)

    status = commands.add_parser("status", help="what is done, what is under way, and the metrics so far")
    status.add_argument("run_dir", metavar="RUN_DIR")
    status.set_defaults(call=_status)
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="validate, print the plan, and stop")
    parser.add_argument("--redo", action="store_true", help="do steps that were made with other settings again")
    parser.add_argument("--no-prefect", action="store_true", help="run the loop without a Prefect server")


def _quickstart(arguments: argparse.Namespace) -> int:
    from flows.quickstart import prepare_quickstart, quickstart_config

    assets = prepare_quickstart(progress=_progress().say)
    return _run_config(quickstart_config(assets, arguments.overrides), arguments)


def _run(arguments: argparse.Namespace) -> int:
    from iterdpo.config import load_config

    files, overrides = _split(arguments.config)
    return _run_config(load_config(*files, overrides=overrides), arguments)


def _run_config(config: Config, arguments: argparse.Namespace) -> int:
    from flows.api import continue_run, describe, open_run
    from flows.plan import describe_plan

    progress = _progress()
    run = open_run(config, progress=progress, redo=arguments.redo)
    if arguments.dry_run:
        print(describe_plan(run))
        return 0
    worked = continue_run(run, prefect=not arguments.no_prefect)
    records = run.dir.records()
    if not worked:
        progress.say(f"nothing to do: {run.dir.root} has its {records[-1].round} rounds (rounds=N adds more)")
        progress.say(describe(records[-1].metrics))
    if records[-1].decision == "stop":
        progress.say(f"stopped by the gate in round {records[-1].round}: {records[-1].reason}")
    progress.say(f"report: {run.dir.root / 'report.html'}")
    initial = " (the initial one: no round was promoted)" if records[-1].policy_round == 0 else ""
    progress.say(f"policy: {run.dir.root / 'policy'}{initial}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from flows.api import train_offline
    from flows.plan import describe_offline_plan
    from iterdpo.config import load_offline_config

    files, overrides = _split(arguments.config)
    config: OfflineConfig = load_offline_config(*files, overrides=overrides)
    progress = _progress()
    if arguments.dry_run:
        print(describe_offline_plan(config))
        return 0
    run = train_offline(config, progress=progress, redo=arguments.redo)
    metrics = run.metrics.iloc[-1]
    for name in (
        "loss",
        "rewards/accuracies",
        "rewards/margins",
        "eval_loss",
        "eval_rewards/accuracies",
        "eval_rewards/margins",
    ):
        if name in metrics and metrics[name] is not None and metrics[name] == metrics[name]:  # None, NaN: not logged
            progress.say(f"  {name:<24} {metrics[name]:.4f}")
    progress.say(f"report: {run.root / 'report.html'}")
    progress.say(f"policy: {run.root / 'policy'}")
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from flows.serving import serve
    from iterdpo.config import load_config

    files, overrides = _split(arguments.config)
    config = load_config(*files, overrides=overrides)
    serve(
        config,
        name=arguments.name,
        cron=arguments.cron,
        timezone=arguments.timezone,
        rounds=arguments.add,
        progress=_progress(),
    )
    return 0


def _retry(arguments: argparse.Namespace) -> int:
    from flows.api import retry_judgments

    round, before, after = retry_judgments(arguments.run_dir, round=arguments.round, progress=_progress())
    print(f"round {round}: {before['unjudged']:,} completions without a score before, {after['unjudged']:,} now")
    for reason, count in after["abstentions"].items():
        print(f"  {count:>8,}  {reason}")
    print("iterdpo run ... --redo does again what was made from the old judgments")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from iterdpo.report.page import write_report

    print(write_report(arguments.run_dir))
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from flows.plan import describe_status

    print(describe_status(arguments.run_dir))
    return 0


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Configuration files, and `key=value` overrides, in whatever order they came."""
    from pathlib import Path

    files = [a for a in arguments if "=" not in a or Path(a).exists()]
    return files, [a for a in arguments if a not in files]


def _progress() -> Progress:
    from iterdpo.run.progress import Progress

    return Progress(sys.stdout)


def _version() -> str:
    from iterdpo import __version__

    return f"iterdpo {__version__}"


if __name__ == "__main__":
    main()
