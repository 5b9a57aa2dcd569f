"""`iterdpo judge check | compare | try`: how good a judge is, before GPU hours are spent on its scores."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from json import dumps, loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter
from cyclopts.validators import Number

from iterdpo.errors import ConfigError, JudgeError
from iterdpo.escape import revealed
from iterdpo.run.progress import Progress

if TYPE_CHECKING:
    from iterdpo.judging.judge import JudgeBase
    from judges.audit.check import Turn
    from judges.audit.labelled import LabelledGroup

JUDGE = (
    "a YAML file with a section `judge`, such as a run's, or a value of `judge.use`: a name, or path/to/file.py:name"
)
ARGS = "arguments of the judge, over the configuration's: model=my-rm endpoint.base_url=http://localhost:8000/v1"
DATA = (
    "preference pairs (chosen, rejected, prompt; a column tie marks those that are equally good), RewardBench 2, LLMBar or "
    "JudgeBench: a file, a directory, or a hub id; to compare also rows of prompt and completions, or a run directory"
)
ATTACK = "try answers that a policy finds if the judge rewards them, on prompts of --data, or on those that come with iterdpo"
POLICY = "the policy to train, whose lineage is compared with that of the judge's model (default: the configuration's)"
JSON = "write everything as JSON; - prints it instead of the tables"
TOKENIZER = "checkpoint whose tokenizer counts tokens (default: the configuration's, else one token per byte)"
COLUMNS = "columns of the prompt's row, put last: gold=4; a value is text, or JSON if it begins with [, { or a quote"
ROLE = "the judge to use from a configuration: judge, or evaluation.judge"
ROUND = "the round of a run directory (default: the last)"
YAML = (".yaml", ".yml")

JudgeName = Annotated[str, Parameter(help=JUDGE)]
Assignments = Annotated[tuple[str, ...], Parameter(consume_multiple=True, help=ARGS)]
Role = Annotated[Literal["train", "heldout"], Parameter(help=ROLE)]
Positive = Annotated[int, Parameter(validator=Number(gte=1))]

app = App(
    name="judge",
    help="Measure judges: check, compare, try. For a run: retry, review.",
    default_parameter=Parameter(negative=(), show_default=lambda value: value or None),
)


@Parameter(name="*")
@dataclass(frozen=True)
class ReadingOptions:
    split: Annotated[str, Parameter(help="the split to read, if the data set has several")] = "train"
    limit: Annotated[Positive | None, Parameter(help="read the first N rows only")] = None
    tokenizer: Annotated[str | None, Parameter(help=TOKENIZER)] = None
    seed: Annotated[int, Parameter(help="seed of the order of the completions and of the bootstrap")] = 0

    def of(self, *judges: str) -> dict[str, Any]:
        """How the data are read; the tokenizer is the one asked for, or that of the first configuration of `judges`."""
        return {"split": self.split, "limit": self.limit, "tokenizer": _tokenizer(self.tokenizer, *judges)}


@Parameter(name="*")
@dataclass(frozen=True)
class OutputOptions:
    json: Annotated[str | None, Parameter(allow_leading_hyphen=True, help=JSON)] = None
    page: Annotated[str | None, Parameter(help="write a self-contained HTML page")] = None
    confidence: Annotated[float, Parameter(validator=Number(gt=0, lt=1), help="coverage of the intervals")] = 0.95


TABLES = OutputOptions()
READING = ReadingOptions()


@app.command
def check(
    judge: JudgeName,
    /,
    *,
    args: Assignments = (),
    role: Role = "train",
    data: Annotated[str | None, Parameter(help=DATA)] = None,
    reading: ReadingOptions = READING,
    subset_column: Annotated[str | None, Parameter(help="column whose values define subsets for the figures")] = None,
    repeats: Annotated[Positive, Parameter(help="how often to judge each pair")] = 1,
    attack: Annotated[bool, Parameter(help=ATTACK)] = False,
    attack_prompts: Annotated[Positive, Parameter(help="prompts that are attacked")] = 24,
    policy: Annotated[str | None, Parameter(help=POLICY)] = None,
    dry_run: Annotated[bool, Parameter(help="count calls, tokens and dollars, and stop")] = False,
    output: OutputOptions = TABLES,
) -> int:
    """Measure a judge on labelled preference pairs, and attack it."""
    from judges.audit import attacks, render
    from judges.audit.check import Check, check_judge_on
    from judges.audit.figures import measure
    from judges.audit.labelled import read_labelled
    from judges.audit.lineage import shared_lineage
    from judges.audit.published import measure_groups
    from judges.load import check_columns, check_judge

    if data is None and not attack:
        remedy = "give --data with labelled pairs, or --attack to try attacks on the prompts that come with iterdpo"
        raise ConfigError(f"nothing to check {judge} on; {remedy}")
    use, judge_args = _judge_spec(judge, args, role)
    how = reading.of(judge)
    chosen: dict[str, Any] = {"limit": attack_prompts, "tokenizer": how["tokenizer"]}

    def attacked() -> Iterator[LabelledGroup]:
        if data is None:
            return attacks.shipped_attacks(**chosen)
        return attacks.attacks_on(read_labelled(data, **how)[0], **chosen)

    if dry_run:
        check_judge(use, judge_args)
        measured = [] if data is None else list(read_labelled(data, subset_column=subset_column, **how)[0])
        print(*_planned(use, judge_args, measured, repeats, list(attacked()) if attack else []), sep="\n")
        return 0
    loaded = _loaded(use, judge_args)
    unit: Literal["characters", "tokens"] = "characters" if how["tokenizer"] is None else "tokens"
    trained = policy or _policy(judge)
    lineage = None if trained is None else shared_lineage(judge_args, trained)

    def judged(groups: Iterator[LabelledGroup], total: int, what: str, **drawn: Any) -> Check:
        with Progress(sys.stderr).stage(what, total, "rows") as stage:
            first = next(groups)
            try:
                check_columns(use, first.prompt.columns, judge_args)
            except JudgeError as error:
                if data is not None:
                    raise
                raise JudgeError(f"{error}; give --data with prompts that do") from None
            rows = chain([first], groups)
            return check_judge_on(loaded, rows, seed=reading.seed, unit=unit, advance=stage.advance, **drawn)

    report: dict[str, Any] = {"judge": {"use": use, "name": loaded.name, "version": loaded.version}}
    report |= {"seed": reading.seed, "confidence": output.confidence, "lineage": lineage}
    page: dict[str, Any] = {"tables": [], "figures": [], "examples": []}
    settings, said = [("Judge", use), ("Version", loaded.version)], []
    stopped: BaseException | None = None
    with closing(loaded):
        if data is not None:
            labelled, account = read_labelled(data, subset_column=subset_column, **how)
            done = judged(labelled, reading.limit or 0, "judged", repeats=repeats)
            stopped = done.turn.stopped
            report |= {
                "data": {"path": data, "split": reading.split, "account": account.summary()},
                "repeats": repeats,
                "length_unit": unit,
                "cost": _cost(done.turn),
                **measure(done.pairs, seed=reading.seed, confidence=output.confidence),
                "best": measure_groups(done.groups, confidence=output.confidence),
                "pairs": [pair.to_json() for pair in done.pairs],
            }
            settings += [("Data", data), ("Rows", account.summary()), ("Lengths", f"in {unit}")]
            said.append(render.check_sentence(report))
            page["tables"] += render.check_tables(report)
            page["figures"] = render.check_plots(report) if output.page else []
            page["examples"] = list(map(render.mistake_example, done.mistakes))
        if attack and stopped is None:
            done = judged(attacked(), attack_prompts * len(attacks.ATTACKS), "attacked")
            stopped = done.turn.stopped
            report["attack"] = {
                **attacks.measure_attacks(done.pairs, confidence=output.confidence),
                "cost": _cost(done.turn),
            }
            settings.append(("Attacks", f"on {report['attack']['prompts']:,} prompts{' of the data' if data else ''}"))
            said.append(render.attack_sentence(report))
            page["tables"] += render.attack_tables(report)
    report["stopped"] = _stop_reason(stopped)
    return _put_out(
        output,
        report,
        stopped,
        sentence=" ".join(filter(None, [*said, lineage])),
        settings=[*settings, ("Seed", str(reading.seed))],
        examples_title="The mistakes it is surest of",
        on_terminal=0,
        title=f"{loaded.name} on {Path(data).name}" if data else f"{loaded.name} under attack",
        **page,
    )


@app.command
def compare(
    a: JudgeName,
    b: Annotated[str, Parameter(help="the other judge")],
    /,
    *,
    args_a: Assignments = (),
    args_b: Annotated[tuple[str, ...], Parameter(consume_multiple=True, help="arguments of B")] = (),
    role: Role = "train",
    data: Annotated[str, Parameter(help=DATA)],
    reading: ReadingOptions = READING,
    number: Annotated[int | None, Parameter(name="--round", help=ROUND)] = None,
    output: OutputOptions = TABLES,
) -> int:
    """The agreement of two judges, with examples of their differences."""
    from judges.audit.agreement import compare_judges, measure_agreement, read_samples
    from judges.audit.render import compare_sentence, compare_tables, difference_example
    from judges.load import check_judge

    specs = [_judge_spec(a, args_a, role), _judge_spec(b, args_b, role)]
    for use, judge_args in specs:
        check_judge(use, judge_args)  # before the first has judged anything
    samples = partial(read_samples, data, round=number, seed=reading.seed, **reading.of(a, b))
    load_a, load_b = (partial(_loaded, *spec) for spec in specs)
    with Progress(sys.stderr).stage("judged", 2 * (reading.limit or 0), "prompts") as stage:
        done = compare_judges(load_a, load_b, samples, advance=stage.advance)
    judged = zip(specs, done.names, done.versions, strict=True)
    report = {
        "judges": [{"use": use, "name": name, "version": version} for (use, _), name, version in judged],
        "data": {"path": data, "split": reading.split, "round": number},
        "seed": reading.seed,
        "confidence": output.confidence,
        "stopped": _stop_reason(done.stopped),
        "costs": list(map(_cost, done.turns)),
        **measure_agreement(done, seed=reading.seed, confidence=output.confidence),
    }
    first, second = done.names
    return _put_out(
        output,
        report,
        done.stopped,
        sentence=compare_sentence(report),
        tables=compare_tables(report),
        settings=[("A", first), ("B", second), ("Data", data), ("Seed", str(reading.seed))],
        figures=[],
        examples=list(map(difference_example, done.differences)),
        examples_title="Where they differ",
        on_terminal=10,
        title=f"{first} and {second} on {Path(data).name}",
    )


@app.command(name="try")
def attempt(
    judge: JudgeName,
    prompt: Annotated[str, Parameter(help="the prompt, as plain text")],
    /,
    *completions: Annotated[str, Parameter(required=True, help="one completion to score, or more to compare")],
    args: Assignments = (),
    role: Role = "train",
    columns: Annotated[tuple[str, ...], Parameter(consume_multiple=True, help=COLUMNS)] = (),
    chat: Annotated[bool, Parameter(help="pass the prompt as a user message")] = False,
    tokenizer: Annotated[str | None, Parameter(help=TOKENIZER)] = None,
    json: Annotated[bool, Parameter(help="print JSON")] = False,
) -> int:
    """Show one verdict, with what a language model was asked and replied."""
    from iterdpo.judging.judge import checked_judgments
    from iterdpo.run.rundir import digest
    from iterdpo.types import Prompt
    from judges.audit.labelled import tokenized
    from judges.load import check_columns

    use, judge_args = _judge_spec(judge, args, role)
    loaded = _loaded(use, judge_args)
    if loaded.comparative and len(completions) < 2:
        raise JudgeError(f"judge {loaded.name!r} compares completions with each other; give it two or more")
    row = dict(map(_column, columns))
    try:
        check_columns(use, row, judge_args)
    except JudgeError as error:
        raise JudgeError(f"{error}; give it at the end: --columns NAME=VALUE") from None
    tokens = _tokenizer(tokenizer, judge)
    content = [{"role": "user", "content": prompt}] if chat else prompt
    group = tokenized(Prompt(f"p-{digest(content)}", content, row), completions, tokens, "the prompt")
    trace: list[dict[str, Any]] = []
    for part in loaded.parts():
        part.trace = trace
    with closing(loaded):
        [judgment] = checked_judgments(loaded, [group])
        usage = loaded.usage()
    found = {
        "judge": {"use": use, "name": loaded.name, "version": loaded.version},
        "columns": row,
        **judgment.to_json(),
        "usage": usage,
        "trace": trace,
    }
    print(*([dumps(found, indent=2)] if json else _described(found, completions)), sep="\n")
    return 0


def _described(found: dict[str, Any], completions: tuple[str, ...]) -> Iterator[str]:
    for number, call in enumerate(found["trace"], 1):
        for message in call["messages"]:
            yield f"--- call {number}: {message['role']}"
            yield revealed(str(message["content"]))
        yield f"--- call {number}: reply"
        yield revealed(str(call["reply"]))
    if found["trace"]:
        yield "---"
    yield f"judge: {found['judge']['name']} (version {found['judge']['version']})"
    if found["columns"]:
        yield f"columns: {dumps(found['columns'])}"
    for k, (text, score, reason) in enumerate(zip(completions, found["scores"], found["abstentions"], strict=True)):
        first = revealed(text).strip().partition("\n")[0]
        verdict = f"score {score:.6g}" if score is not None else f"abstained: {revealed(reason)}"
        yield f"completion {k}: {verdict}   {first[:60]}{' …' if len(first) > 60 else ''}"
    for c in found["comparisons"]:
        sure = "" if c["probability"] is None else f" (first wins with probability {c['probability']:.3f})"
        said = f"abstained: {revealed(str(c['reason']))}" if c["winner"] is None else c["winner"] + sure
        yield f"completion {c['first']} before completion {c['second']}: {said}"
    if found["details"]:
        yield f"details: {dumps(found['details'])}"
    if found["usage"]:
        yield "usage: " + ", ".join(f"{name} {amount:g}" for name, amount in found["usage"].items())


def _judge_spec(which: str, overrides: tuple[str, ...], role: str) -> tuple[str, dict[str, Any]]:
    """`use` and `args` of a judge, from a configuration or as given, with the overrides laid over the args."""
    from iterdpo.config import assign, load_judges_config
    from judges.load import asks_a_person

    use, args = which, {}
    if which.endswith(YAML):
        config = load_judges_config(which)
        section = config.judge if role == "train" else config.evaluation.judge
        if section is None:
            raise ConfigError(f"{which}: has no evaluation.judge; add one, or leave out --role heldout")
        use, args = section.use, section.args
    elif role != "train":
        raise ConfigError(f"--role {role} needs a .yaml configuration, but got {which!r}")
    for override in overrides:
        args = assign(args, override)
    if asks_a_person(use, args):
        remedy = "name the judge `person` in a configuration, start it with `iterdpo run`, and answer with"
        raise JudgeError(f"{which}: a person can judge only within a run: {remedy} `iterdpo judge review RUN_DIR`")
    return use, args


def _column(given: str) -> tuple[str, Any]:
    name, sign, value = given.partition("=")
    if not sign or not name:
        raise ConfigError(f"{given!r}: write a column as NAME=VALUE, such as gold=4")
    try:
        return name, loads(value) if value[:1] in ("[", "{", '"') else value
    except ValueError as error:
        raise ConfigError(f"{given!r}: not valid JSON: {error}") from None


def _tokenizer(given: str | None, *judges: str) -> Any:
    from iterdpo.config import load_judges_config
    from iterdpo.data.rendering import load_tokenizer

    if given is not None:
        return load_tokenizer(given)
    configs = (load_judges_config(which) for which in judges if which.endswith(YAML))
    model = next((config.model for config in configs if config.model is not None), None)
    if model is None:
        return None
    return load_tokenizer(
        model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        chat_template_kwargs=model.chat_template_kwargs,
    )


def _planned(
    use: str, args: dict[str, Any], measured: list[LabelledGroup], repeats: int, attacked: list[LabelledGroup]
) -> Iterator[str]:
    """What a check would take, in lines of text."""
    from judges.estimate import Workload, estimate

    total = Workload()
    for what, rows, times in (("measured", measured, repeats), ("attacked", attacked, 1)):
        if rows:
            work = estimate(use, args, [row.group(range(len(row.completions))) for row in rows]) * times
            pairs, prompts = sum(len(row.pairs) for row in rows), len({row.prompt.id for row in rows})
            yield f"{what:<9} {pairs:,} pairs of {prompts:,} prompts; {round(work.calls):,} calls"
            total += work
    yield f"{'calls':<9} {round(total.calls):,} in all"
    if total.tokens_in:
        yield f"{'tokens':<9} {total.tokens()}"


def _policy(judge: str) -> str | None:
    """The policy in a judge's configuration, if it has one."""
    from iterdpo.config import load_judges_config

    model = load_judges_config(judge).model if judge.endswith(YAML) else None
    return None if model is None else model.path


def _loaded(use: str, args: dict[str, Any]) -> JudgeBase:
    """The judge. If it starts a server first, that is said: nothing else happens for a while."""
    from judges.load import load_judge

    judge = load_judge(use, args)
    if any(getattr(part, "server", None) is not None for part in judge.parts()):
        print(f"starting a vLLM server for {judge.name} first, which takes a minute or more", file=sys.stderr)
    return judge


def _cost(turn: Turn) -> dict[str, Any]:
    return {"seconds": round(turn.seconds, 3), "usage": turn.usage}


def _stop_reason(stopped: BaseException | None) -> str | None:
    return "interrupted" if isinstance(stopped, KeyboardInterrupt) else str(stopped) if stopped else None


def _put_out(
    output: OutputOptions, report: dict[str, Any], stopped: BaseException | None, *, on_terminal: int, **page: Any
) -> int:
    """The report on the terminal, and if it was asked for as JSON and as a page (see `write_page`). The exit status.

    Ctrl-C gives 130, as everywhere. A judge or data that gave up half-way is raised, once what was found is out.
    """
    from iterdpo.run.rundir import write_json
    from judges.audit.render import plain, print_report, write_page

    if stopped is not None:
        page["sentence"] = f"Stopped early ({report['stopped']}). {page['sentence']}"
    if output.page:
        write_page(output.page, **page)
    if output.json == "-":
        print(dumps(plain(report), indent=2))
    else:
        if output.json:
            write_json(Path(output.json), plain(report))
        lines = [f"{what.lower():<9} {value}" for what, value in page["settings"]]
        print_report(page["sentence"], page["tables"], page["examples"][:on_terminal], lines=lines, stream=sys.stdout)
        for path in filter(None, (output.json, output.page)):
            print(f"written: {path}")
    if stopped is not None and not isinstance(stopped, KeyboardInterrupt):
        raise stopped
    return 130 if stopped else 0
