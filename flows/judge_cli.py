"""`iterdpo judge check | compare | try`: how good a judge is, before a GPU hour is spent on what it says."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iterdpo.judging.judge import JudgeBase

JUDGE = "a run's configuration (its judge), or what `judge.use` takes: a name, or path/to/file.py:name"
ARGS = "arguments of the judge, laid over the configuration's: model=my-rm endpoint.base_url=http://localhost:8000/v1"
TOKENIZER = "checkpoint that tokens are counted with (default: that of a configuration, else a token is a byte)"


def add_judge_commands(commands: Any) -> Any:
    """Add `judge` with its commands to the command line's `commands`; returns those of `judge`, to add more to."""
    judge = commands.add_parser("judge", help="how good a judge is: check, compare, try; of a run: retry, review")
    kinds = judge.add_subparsers(required=True, metavar="COMMAND")

    check = kinds.add_parser("check", help="measure a judge on labelled preference pairs")
    _add_judge(check)
    _add_data(check, "preference pairs: chosen, rejected, prompt; a column tie marks those that are equally good")
    check.add_argument("--subset-column", metavar="NAME", help="column by whose values the figures are split")
    check.add_argument("--repeats", type=_positive, default=1, metavar="R", help="judge each pair so often")
    _add_outputs(check)
    check.set_defaults(call=_check)

    compare = kinds.add_parser("compare", help="how far two judges agree, and where they differ")
    compare.add_argument("a", metavar="A", help=JUDGE)
    compare.add_argument("b", metavar="B", help="the other judge")
    compare.add_argument("--args-a", nargs="+", action="extend", default=[], metavar="key=value", help=ARGS)
    compare.add_argument("--args-b", nargs="+", action="extend", default=[], metavar="key=value", help="those of B")
    _add_role(compare)
    _add_data(compare, "preference pairs, rows of prompt and completions, or a run directory")
    compare.add_argument("--round", type=int, metavar="N", help="of a run directory (default: the last)")
    _add_outputs(compare)
    compare.set_defaults(call=_compare)

    attempt = kinds.add_parser("try", help="one verdict, with what a language model was asked and replied")
    _add_judge(attempt)
    attempt.add_argument("prompt", metavar="PROMPT", help="as plain text")
    attempt.add_argument("completions", nargs="+", metavar="COMPLETION", help="one to score, more to compare")
    attempt.add_argument(
        "--columns",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="of the prompt's row: gold=4; a value is text, or JSON where it begins with [, { or a quote; put these last",
    )
    attempt.add_argument("--chat", action="store_true", help="give the prompt as a message of a user")
    attempt.add_argument("--tokenizer", metavar="MODEL", help=TOKENIZER)
    attempt.add_argument("--json", action="store_true", help="print JSON")
    attempt.set_defaults(call=_try)
    return kinds


def _add_judge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("judge", metavar="CONFIG_OR_JUDGE", help=JUDGE)
    parser.add_argument("--args", nargs="+", action="extend", default=[], metavar="key=value", help=ARGS)
    _add_role(parser)


def _add_role(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--role", choices=("train", "heldout"), default="train", help="of a configuration: judge, or evaluation.judge"
    )


def _add_data(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--data", required=True, help=f"{what}; a file, a directory, or a hub id")
    parser.add_argument("--split", default="train", help="of a data set that has several (default: train)")
    parser.add_argument("--limit", type=_positive, metavar="N", help="read the first N rows only")
    parser.add_argument("--tokenizer", metavar="MODEL", help=TOKENIZER)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the completions, and of the bootstrap")


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON; - prints it in place of the tables")
    parser.add_argument("--page", metavar="FILE", help="write a self-contained HTML page")
    parser.add_argument("--confidence", type=_share, default=0.95, help="coverage of the intervals (default: 0.95)")


def _check(arguments: argparse.Namespace) -> int:
    from judges.audit.check import check_judge_on
    from judges.audit.figures import measure
    from judges.audit.labelled import read_labelled
    from judges.audit.render import check_plots, check_sentence, check_tables, mistakes_shown, plain
    from judges.load import check_columns

    use, args = _named(arguments.judge, arguments.args, arguments.role)
    judge = _load(use, args)
    tokenizer = _tokenizer(arguments.tokenizer, arguments.judge)
    pairs, account = read_labelled(
        arguments.data,
        split=arguments.split,
        limit=arguments.limit,
        subset_column=arguments.subset_column,
        tokenizer=tokenizer,
    )

    def known_columns() -> Iterator[Any]:
        for place, pair in enumerate(pairs):
            if place == 0:
                check_columns(use, pair.prompt.columns, args)
            yield pair

    try:
        with _progress("judged", "pairs", arguments.limit or 0) as advance:
            check = check_judge_on(
                judge,
                known_columns(),
                seed=arguments.seed,
                repeats=arguments.repeats,
                unit="characters" if tokenizer is None else "tokens",
                advance=advance,
            )
    finally:
        judge.close()
    report = {
        "judge": {"use": use, "name": check.name, "version": check.version},
        "data": {"path": arguments.data, "split": arguments.split, "account": account.summary()},
        "seed": arguments.seed,
        "repeats": arguments.repeats,
        "confidence": arguments.confidence,
        "length_unit": "characters" if tokenizer is None else "tokens",
        "stopped": _reason(check.stopped),
        "cost": {"seconds": round(check.seconds, 3), "usage": check.usage},
        **measure(check.pairs, seed=arguments.seed, confidence=arguments.confidence),
    }
    settings = [
        ("Judge", use),
        ("Version", check.version),
        ("Data", arguments.data),
        ("Rows", account.summary()),
        ("Lengths", f"in {report['length_unit']}"),
        ("Seed", str(arguments.seed)),
    ]
    _put_out(
        arguments,
        {**plain(report), "pairs": [pair.to_json() for pair in check.pairs]},
        sentence=check_sentence(report),
        tables=check_tables(report),
        settings=settings,
        figures=lambda: check_plots(report),
        examples=mistakes_shown(check.mistakes),
        examples_title="The mistakes it is surest of",
        on_terminal=0,
        title=f"{check.name} on {Path(arguments.data).name}",
    )
    return _status(check.stopped)


def _compare(arguments: argparse.Namespace) -> int:
    from judges.audit.agreement import compare_judges, measure_agreement, read_samples
    from judges.audit.render import compare_sentence, compare_tables, differences_shown, plain

    both = [
        _named(which, overrides, arguments.role)
        for which, overrides in ((arguments.a, arguments.args_a), (arguments.b, arguments.args_b))
    ]
    for use, args in both:
        _checked(use, args)  # before the first has judged anything
    tokenizer = _tokenizer(arguments.tokenizer, arguments.a, arguments.b)

    def samples() -> Iterator[Any]:
        return read_samples(
            arguments.data,
            round=arguments.round,
            split=arguments.split,
            limit=arguments.limit,
            seed=arguments.seed,
            tokenizer=tokenizer,
        )

    with _progress("judged", "prompts", 2 * (arguments.limit or 0)) as advance:
        agreement = compare_judges(lambda: _load(*both[0]), lambda: _load(*both[1]), samples, advance=advance)
    report = {
        "judges": [
            {"use": use, "name": name, "version": version}
            for (use, _), name, version in zip(both, agreement.names, agreement.versions, strict=True)
        ],
        "data": {"path": arguments.data, "split": arguments.split, "round": arguments.round},
        "seed": arguments.seed,
        "confidence": arguments.confidence,
        "stopped": _reason(agreement.stopped),
        "costs": [
            {"seconds": round(seconds, 3), "usage": usage}
            for seconds, usage in zip(agreement.seconds, agreement.usage, strict=True)
        ],
        **measure_agreement(agreement, seed=arguments.seed, confidence=arguments.confidence),
    }
    a, b = agreement.names
    _put_out(
        arguments,
        plain(report),
        sentence=compare_sentence(report),
        tables=compare_tables(report),
        settings=[("A", a), ("B", b), ("Data", arguments.data), ("Seed", str(arguments.seed))],
        figures=list,
        examples=differences_shown(agreement.differences),
        examples_title="Where they differ",
        on_terminal=10,
        title=f"{a} and {b} on {Path(arguments.data).name}",
    )
    return _status(agreement.stopped)


def _try(arguments: argparse.Namespace) -> int:
    import json

    from iterdpo.errors import JudgeError
    from iterdpo.judging.judge import checked_judgments
    from iterdpo.run.rundir import digest
    from iterdpo.types import CompletionGroup, Prompt
    from judges.audit.labelled import completion_of, prompt_ids_of
    from judges.load import check_columns

    use, args = _named(arguments.judge, arguments.args, arguments.role)
    judge = _load(use, args)
    if judge.comparative and len(arguments.completions) < 2:
        raise JudgeError(f"judge {judge.name!r} compares completions with each other; give it two or more")
    columns = dict(map(_column, arguments.columns))
    try:
        check_columns(use, columns, args)
    except JudgeError as error:
        raise JudgeError(f"{error}; give it at the end: --columns NAME=VALUE") from None
    tokenizer = _tokenizer(arguments.tokenizer, arguments.judge)
    content = [{"role": "user", "content": arguments.prompt}] if arguments.chat else arguments.prompt
    prompt = Prompt(f"p-{digest(content)}", content, columns)
    group = CompletionGroup(
        prompt,
        prompt_ids_of(prompt, tokenizer, "the prompt"),
        [completion_of(content, text, tokenizer, "a completion") for text in arguments.completions],
    )
    trace: list[dict[str, Any]] = []
    for part in judge.parts():
        part.trace = trace
    try:
        [judgment] = checked_judgments(judge, [group])
        usage = judge.usage()
    finally:
        judge.close()
    found = {
        "judge": {"use": use, "name": judge.name, "version": judge.version},
        "columns": columns,
        **judgment.to_json(),
        "usage": usage,
        "trace": trace,
    }
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        for line in _described(found, arguments.completions):
            print(line)
    return 0


def _described(found: dict[str, Any], completions: list[str]) -> Iterator[str]:
    """A verdict for a reader: what was asked and replied, then what came of it."""
    import json

    from iterdpo.escape import visible

    for number, call in enumerate(found["trace"], 1):
        for message in call["messages"]:
            yield f"--- call {number}: {message['role']}"
            yield visible(str(message["content"]))
        yield f"--- call {number}: reply"
        yield visible(str(call["reply"]))
    if found["trace"]:
        yield "---"
    yield f"judge: {found['judge']['name']} (version {found['judge']['version']})"
    if found["columns"]:
        yield f"columns: {json.dumps(found['columns'])}"
    for k, (text, score, reason) in enumerate(zip(completions, found["scores"], found["abstentions"], strict=True)):
        first = visible(text).strip().partition("\n")[0]
        verdict = f"score {score:.6g}" if score is not None else f"abstained: {visible(reason)}"
        yield f"completion {k}: {verdict}   {first[:60]}{' …' if len(first) > 60 else ''}"
    for c in found["comparisons"]:
        sure = "" if c["probability"] is None else f" (first wins with probability {c['probability']:.3f})"
        said = f"abstained: {visible(str(c['reason']))}" if c["winner"] is None else c["winner"] + sure
        yield f"completion {c['first']} before completion {c['second']}: {said}"
    if found["details"]:
        yield f"details: {json.dumps(found['details'])}"
    if found["usage"]:
        yield "usage: " + ", ".join(f"{name} {amount:g}" for name, amount in found["usage"].items())


# What they share


def _named(which: str, overrides: list[str], role: str) -> tuple[str, dict[str, Any]]:
    """`use` and `args` of a judge, from a configuration or as given, with the overrides laid over the args."""
    from iterdpo.config import assign, load_config
    from iterdpo.errors import ConfigError, JudgeError
    from judges.load import asks_a_person

    use, args = which, {}
    if _is_config(which):
        config = load_config(which)
        section = config.judge if role == "train" else config.evaluation.judge
        if section is None:
            raise ConfigError(f"{which}: has no evaluation.judge; add one, or leave out --role heldout")
        use, args = section.use, section.args
    elif role != "train":
        raise ConfigError(f"--role {role} chooses a judge of a configuration, and {which!r} is none (.yaml)")
    for override in overrides:
        args = assign(args, override)
    if asks_a_person(use, args):
        raise JudgeError(
            f"{which}: a person is asked within a run alone: name the judge `person` in a configuration, `iterdpo run` "
            "it, and answer with `iterdpo judge review RUN_DIR`"
        )
    return use, args


def _column(given: str) -> tuple[str, Any]:
    import json

    from iterdpo.errors import ConfigError

    name, sign, value = given.partition("=")
    if not sign or not name:
        raise ConfigError(f"{given!r}: a column reads NAME=VALUE, such as gold=4")
    try:
        return name, json.loads(value) if value[:1] in ("[", "{", '"') else value
    except ValueError as error:
        raise ConfigError(f"{given!r}: no JSON: {error}") from None


def _is_config(which: str) -> bool:
    return which.endswith((".yaml", ".yml"))


def _checked(use: str, args: dict[str, Any]) -> None:
    from judges.load import check_judge

    check_judge(use, args)


def _load(use: str, args: dict[str, Any]) -> JudgeBase:
    from judges.load import load_judge

    return load_judge(use, args)


def _tokenizer(given: str | None, *judges: str) -> Any:
    """The tokenizer that was asked for, or that of the first configuration among the judges; None without either."""
    from iterdpo.config import load_config
    from iterdpo.data.rendering import load_tokenizer

    if given is not None:
        return load_tokenizer(given)
    config = next((load_config(which) for which in judges if _is_config(which)), None)
    if config is None:
        return None
    model = config.model
    return load_tokenizer(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)


@contextmanager
def _progress(name: str, unit: str, total: int) -> Iterator[Callable[[int], None]]:
    from iterdpo.run.progress import Progress

    with Progress(sys.stderr).stage(name, total, unit) as stage:
        yield stage.advance


def _put_out(
    arguments: argparse.Namespace,
    found: dict[str, Any],
    *,
    title: str,
    sentence: str,
    tables: list[Any],
    settings: list[tuple[str, str]],
    figures: Callable[[], list[Any]],
    examples: list[Any],
    examples_title: str,
    on_terminal: int,
) -> None:
    """The report on the terminal, and where it was asked for as JSON and as a page."""
    import json

    from iterdpo.run.rundir import write_json
    from judges.audit.render import print_report, write_page

    stopped = found["stopped"]
    if stopped is not None:
        sentence = f"Stopped early ({stopped}). {sentence}"
    if arguments.page:
        write_page(
            arguments.page,
            title=title,
            sentence=sentence,
            settings=settings,
            tables=tables,
            figures=figures(),
            examples=examples,
            examples_title=examples_title,
        )
    if arguments.json == "-":
        print(json.dumps(found, indent=2))
        return
    if arguments.json:
        write_json(Path(arguments.json), found)
    lines = [f"{what.lower():<9} {value}" for what, value in settings]
    print_report(sentence, tables, examples[:on_terminal], lines=lines, stream=sys.stdout)
    for path in filter(None, (arguments.json, arguments.page)):
        print(f"written: {path}")


def _reason(stopped: BaseException | None) -> str | None:
    if stopped is None:
        return None
    return "interrupted" if isinstance(stopped, KeyboardInterrupt) else str(stopped)


def _status(stopped: BaseException | None) -> int:
    """Ctrl-C gives 130, as everywhere. A judge or data that gave up half-way is raised, once what was found is out."""
    if stopped is None:
        return 0
    if isinstance(stopped, KeyboardInterrupt):
        return 130
    raise stopped


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share between 0 and 1")
    return value
