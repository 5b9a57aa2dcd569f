"""Adapts a user's function, class or object to `JudgeBase`. Its parameter names decide how it is called:

| it names                          | it is called                                           | it returns               |
| --------------------------------- | ------------------------------------------------------ | ------------------------ |
| `groups`                          | once, with a list of `CompletionGroup`                 | a list of `Judgment`     |
| `completions` or `completion_ids` | once, as TRL's GRPOTrainer calls a reward function     | a list of scores         |
| `completion`                      | for each completion                                    | its score                |
| `a` and `b`                       | for each two completions of a prompt, in both orders   | "a", "b", "tie", or None |
| none of these                     | once, with the configuration's `args`: it is a factory | one of the above         |

A class is made with the `args`, and its method `judge`, `score`, `compare` or `__call__` (the first that it has)
is read by the same table; a function receives the `args` as keyword arguments. Any of them may be a coroutine
function: then up to 16 calls run at once (or as many as its attribute `concurrency` says), all in one event loop that
lives as long as the judge, so that a client of httpx may be made in the constructor, and one of aiohttp at the first
call.

`prompt` is the plain text, or the list of messages; `completion`, `a` and `b` are always texts. `messages` is the prompt
as messages in any case, and `prompt_id` its id. `token_count` and `finish_reason` are those of `completion`;
`a_token_count`, `b_token_count`, `a_finish_reason` and `b_finish_reason` those of a comparison. Any other parameter
receives the column of that name from the prompt's row (`gold`, say); `**columns` receives them all.

A score is a number, higher is better. None, NaN, an infinity, a string, and an exception are abstentions; they
are never turned into numbers. A comparison that comes out differently in the two orders is a tie.

An object may also have the optional members of `JudgeBase`: its `close` is called whenever another stage needs the
device, its `begin_stage` when a stage begins. Methods may be coroutine functions, but for `judge_each`.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import itertools
import weakref
from collections.abc import Coroutine, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from iterdpo.errors import JudgeError
from iterdpo.judging.comparisons import judgment_from_comparisons
from iterdpo.judging.judge import JudgeBase, Waiting
from iterdpo.types import Comparison, Completion, CompletionGroup, Judgment, Prompt
from judges.base import Abstention, judgments_from_outcomes, nearest

Kind = Literal["groups", "batch", "score", "compare"]
Bound = functools.partial[Any]

CONCURRENCY = 16
METHODS = ("judge", "score", "compare")
"""The first of these that an object has is called; otherwise the object itself."""
TEXTS = ("prompt", "prompts", "completion", "completions", "completion_ids", "a", "b", "groups")
"""Parameters that no argument gives."""
OPTIONAL_PARAMETERS = (
    *("messages", "prompt_id", "token_count", "finish_reason"),
    *("a_token_count", "b_token_count", "a_finish_reason", "b_finish_reason"),
)
"""What a function may name besides the texts. A column of the same name wins."""
SHAPES = (
    "`prompt, completion` to score one completion, `prompt, a, b` to compare two, `prompts, completions` for a "
    "TRL reward function, `groups` for the full protocol"
)
WINNERS: dict[str, Literal["first", "second", "tie"]] = {"a": "first", "b": "second", "tie": "tie"}


def adapt(made: Any, *, name: str, version: str = "", args: Mapping[str, Any] | None = None) -> JudgeBase:
    """`made`, a function, class or object of the table above, as a judge. What derives from `JudgeBase` is one.

    Raises:
        JudgeError: it fits no row of the table, or does not accept `args`.
    """
    judge = _adapted(made, dict(args or {}), name)
    judge.version = version
    return judge


class CustomJudge(JudgeBase):
    """A user's judge. Made by `adapt`, the one place that looks at an object of unknown type.

    `owner` is the user's object. Of the optional members of `JudgeBase` those that it has are used.
    """

    def __init__(self, name: str, kind: Kind, function: Bound, owner: Any) -> None:
        self.name, self.kind, self.function, self.owner = name, kind, function, owner
        self.comparative = kind == "compare" or bool(getattr(owner, "comparative", False))
        self.needs_device = bool(getattr(owner, "needs_device", True))
        self.ahead = kind == "groups" and callable(getattr(owner, "judge_each", None))
        self._parameters = inspect.signature(function.func).parameters
        self._runner = asyncio.Runner()
        weakref.finalize(self, self._runner.close).atexit = False  # a thread may still be judging then

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(coroutine, context=contextvars.copy_context())

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        for name in ("repeat", "trace"):
            if hasattr(self.owner, name):
                setattr(self.owner, name, getattr(self, name))
        if self.kind == "groups":
            judged: Any = self.function(groups=groups)
            judgments: list[Judgment] = self._run(judged) if inspect.iscoroutine(judged) else judged
            return judgments
        by_kind = {"batch": self._judge_batch, "score": self._judge_scores, "compare": self._judge_comparisons}
        return by_kind[self.kind](groups)

    def judge_each(self, groups: Iterable[CompletionGroup]) -> Generator[Judgment]:
        yield from self.owner.judge_each(groups) if self.ahead else super().judge_each(groups)

    def attach(self, run_dir: Path, waiting: Waiting) -> None:
        self._call("attach", run_dir, waiting)

    def begin_stage(self) -> None:
        self._call("begin_stage")

    def usage(self) -> dict[str, float]:
        return dict(self._call("usage") or {})

    def close(self) -> None:
        self._call("close")

    def _call(self, name: str, *values: Any) -> Any:
        """Call this method of the user's object, if it has one; no coroutine while a thread still judges."""
        method = getattr(self.owner, name, None)
        returned = method(*values) if callable(method) else None
        if not inspect.iscoroutine(returned):
            return returned
        if self._runner.get_loop().is_running():
            return returned.close()
        return self._run(returned)

    def _judge_scores(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        shown = [(g.prompt, c) for g in groups for c in g.completions]
        calls = [self._call_of(prompt, {"": c}) | {"completion": c.text} for prompt, c in shown]
        return judgments_from_outcomes(groups, self._call_all(calls))

    def _judge_comparisons(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        shown = [(g.prompt, a, b) for g in groups for a, b in itertools.permutations(g.completions, 2)]
        calls = [self._call_of(prompt, {"a_": a, "b_": b}) | {"a": a.text, "b": b.text} for prompt, a, b in shown]
        verdicts = iter(self._call_all(calls))
        judged = []
        for g in groups:
            pairs = itertools.permutations(range(len(g.completions)), 2)
            judged.append(judgment_from_comparisons(g, [_comparison(i, j, next(verdicts)) for i, j in pairs]))
        return judged

    def _call_of(self, prompt: Prompt, completions: Mapping[str, Completion]) -> dict[str, Any]:
        """What a function receives besides texts. `OPTIONAL_PARAMETERS` it must name: `**columns` gets none of them."""
        facts: dict[str, Any] = {"messages": prompt.messages, "prompt_id": prompt.id}
        for prefix, c in completions.items():
            facts |= {f"{prefix}token_count": len(c.answer_ids), f"{prefix}finish_reason": c.finish_reason}
        named = {name: value for name, value in facts.items() if name in self._parameters}
        return {**named, **prompt.columns, "prompt": prompt.content}

    def _judge_batch(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        """One call for all completions, with the keyword arguments that GRPOTrainer of TRL 1.16 passes."""
        rows = [(g.prompt, c) for g in groups for c in g.completions]
        if not rows:
            return judgments_from_outcomes(groups, [])
        columns = {column: [p.columns.get(column) for p, _ in rows] for g in groups for column in g.prompt.columns}
        said = [[{"role": "assistant", "content": c.text}] if p.conversational else c.text for p, c in rows]
        call = {
            **columns,
            "prompts": [p.content for p, _ in rows],
            "completions": said,
            "completion_ids": [c.answer_ids for _, c in rows],
            "trainer_state": SimpleNamespace(global_step=0, max_steps=0, epoch=0.0),  # as before the first step
            "log_extra": lambda column, values: None,
            "log_metric": lambda metric, value: None,
        }
        [returned] = self._call_all([call])
        if isinstance(returned, Abstention):
            return judgments_from_outcomes(groups, [returned] * len(rows))
        try:
            scores = list(returned)
            got = f"{len(scores)} scores"
        except TypeError:
            scores, got = [], "nothing" if returned is None else f"a {type(returned).__name__}"
        if len(scores) != len(rows):
            wanted = "must return a list with a score for each (None abstains)"
            raise JudgeError(f"judge {self.name!r} returned {got} for {len(rows)} completions; it {wanted}")
        return judgments_from_outcomes(groups, scores)

    def _call_all(self, calls: Sequence[dict[str, Any]]) -> list[Any]:
        """What each call returned, in order; an `Abstention` for one that raised. Coroutines run `concurrency` at once."""
        function, target = self.function, self.function.func
        everything = any(p.kind is p.VAR_KEYWORD for p in self._parameters.values())
        wanted = [{k: v for k, v in call.items() if everything or k in self._parameters} for call in calls]
        calls = [{**call, **function.keywords} for call in wanted]  # the configuration's args win over columns

        def call_one(call: dict[str, Any]) -> Any:
            try:
                return function(**call)
            except Exception as error:
                return _raised(error)

        if not any(map(inspect.iscoroutinefunction, (target, type(target).__call__))):
            return [call_one(call) for call in calls]

        async def await_one(call: dict[str, Any], slots: asyncio.Semaphore) -> Any:
            async with slots:
                try:
                    return await function(**call)
                except Exception as error:
                    return _raised(error)

        async def await_all() -> list[Any]:
            slots = asyncio.Semaphore(getattr(getattr(target, "__self__", target), "concurrency", CONCURRENCY))
            return await asyncio.gather(*(await_one(call, slots) for call in calls))

        returned: list[Any] = self._run(await_all())
        return returned


def check_signature(
    signature: inspect.Signature, args: Mapping[str, Any], name: str, *, constructor: bool
) -> Kind | None:
    """What a callable with this signature is; None for a class or a factory.

    Raises:
        JudgeError: it fits no row of the table, lacks an argument, or does not know one of `args`.
    """
    parameters = signature.parameters.values()
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [p.name for p in parameters if p.name in known and p.default is p.empty and p.name not in args]
    kind = None if constructor else kind_of(known)
    if kind is None and missing:
        if constructor:
            raise JudgeError(f"judge {name!r}: missing argument {missing[0]!r}; give it under `args`")
        remedy = f"Name them {SHAPES}; or, if it is a factory, give {', '.join(missing)} under `args`"
        raise JudgeError(f"judge {name!r}: its parameters ({', '.join(known)}) fit no form of judge. {remedy}")
    unknown = [arg for arg in args if arg not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        known = [parameter for parameter in known if kind is None or parameter not in TEXTS]
        raise JudgeError(
            f"judge {name!r}: unknown argument {unknown[0]!r}; {nearest(unknown[0], known, 'it accepts')} (arguments of "
            "another judge stay if `use` alone changes: judge.args={} on the command line removes them)"
        )
    return kind


def check_object(made: Any, args: dict[str, Any], name: str) -> None:
    """Hold an object that is to be a judge against the table and `args`, without calling it.

    Raises:
        JudgeError: it is no judge, or does not accept `args`.
    """
    if isinstance(made, JudgeBase):
        return
    function = made if inspect.isclass(made) else _function_of(made)
    if not callable(function):
        raise JudgeError(
            f"judge {name!r}: a {type(made).__name__} is not a judge; give a function with the parameters {SHAPES}, "
            "or a class with a method `score`, `compare` or `judge` that has them"
        )
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # some built-in functions
        raise JudgeError(
            f"judge {name!r}: its parameters cannot be read; call it from a function of your own"
        ) from None
    check_signature(signature, args, name, constructor=inspect.isclass(made))


def _function_of(made: Any) -> Any:
    """The method of an object that judges, or the object itself."""
    methods = (getattr(made, method, None) for method in METHODS)
    return next((m for m in methods if callable(m)), made)


def kind_of(parameters: Iterable[str]) -> Kind | None:
    names = set(parameters)
    if "groups" in names:
        return "groups"
    if names & {"completions", "completion_ids"}:
        return "batch"
    if "completion" in names:
        return "score"
    return "compare" if {"a", "b"} <= names else None


def _adapted(made: Any, args: dict[str, Any], name: str, *, produced: bool = False) -> JudgeBase:
    check_object(made, args, name)
    if inspect.isclass(made):
        made, args, produced = made(**args), {}, True
        check_object(made, args, name)
    if isinstance(made, JudgeBase):
        return made
    function = _function_of(made)
    signature = inspect.signature(function)
    kind = check_signature(signature, args, name, constructor=False)
    if kind is not None:
        return CustomJudge(name, kind, functools.partial(function, **args), made)
    if produced:
        wrong = f"its result has the parameters ({', '.join(signature.parameters)}), which fit no form of judge"
        raise JudgeError(f"judge {name!r}: {wrong}. Name them {SHAPES}")
    return _adapted(function(**args), {}, name, produced=True)


def _comparison(first: int, second: int, verdict: object) -> Comparison:
    if isinstance(verdict, Abstention):
        return Comparison(first, second, None, str(verdict))
    if isinstance(verdict, str) and verdict in WINNERS:
        return Comparison(first, second, WINNERS[verdict])
    said = "None" if verdict is None else f"{str(verdict)[:80]!r}, not 'a', 'b', 'tie' or None"
    return Comparison(first, second, None, f"the judge returned {said}")


def _raised(error: Exception) -> Abstention:
    return Abstention(f"{type(error).__name__}: {error}"[:500])
