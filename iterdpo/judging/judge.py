"""The base class of every judge, the checks on what a judge returns, and a judge within a run.

A judge reads whole groups (the prompt as messages or text, the row's other columns, each completion with its
tokens and finish reason) and answers with a `Judgment` a group: a score for each completion, higher is better,
or an abstention with its reason. "Could not judge" is neither 0 nor a tie.

Most people write less than this: a function that scores one completion or compares two, or a TRL reward
function. `judges.load_judge` turns any of them into a `JudgeBase`.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from iterdpo.errors import JudgeError
from iterdpo.types import Completion, CompletionGroup, Judgment

Waiting = Callable[[str], AbstractContextManager[Callable[[], None] | None]]
"""A context manager that is entered while waiting, given a message. It yields a callback to poll, which raises if the
run was cancelled, or None."""


class JudgeBase(ABC):
    """A judge. `name` and `judge` are required; everything else has a default."""

    name: str
    """Shown in reports: `"reward_model:my-rm"`."""
    version: str = ""
    """Part of the key of this judge's results: if it changes, everything is judged again. `load_judge` sets it."""
    comparative: bool = False
    """Whether a score means "against the others of this group": evaluation then puts the candidate's completion and
    the baseline's into one group."""
    needs_device: bool = True
    """False if it can judge while the sampler holds the accelerator."""
    ahead: bool = False
    """Whether a stage calls `judge_each` once for all of its groups, instead of `judge` once for each shard."""
    repeat: int = 0
    """Incremented to force a fresh sample; caches and fixed seeds must take it into account."""
    members: Sequence[JudgeBase] = ()
    """The judges within it, which receive the same calls."""
    trace: list[dict[str, Any]] | None = None
    """If it is a list, a judge that asks a language model adds every question and reply to it."""

    SPEED_ONLY: ClassVar[frozenset[str]] = frozenset()
    """Arguments that change no score, and so are not part of the version."""
    EXPECTED_ABSTENTIONS: ClassVar[tuple[str, ...]] = ()
    """Reasons of abstentions that are part of its method, not failures: no budget counts them."""

    @classmethod
    def check(cls, *_: Any, **args: Any) -> None:
        """Refuse bad arguments without loading a model or running a user's code. By default the constructor does.

        Raises:
            JudgeError: naming the argument.
        """
        cls(**args)

    @classmethod  # noqa: B027  # most need nothing
    def probe(cls, *_: Any, **args: Any) -> None:
        """Ask once, before a run begins, for what the judge needs from outside: a server, a key, a device. Loads no model.

        Raises:
            JudgeError: naming the argument.
        """

    @classmethod
    def key(cls, **args: Any) -> Any:
        """Everything that decides the scores, as a JSON value; paths in it count with the content of their files."""
        return {name: value for name, value in args.items() if name not in cls.SPEED_ONLY}

    @abstractmethod
    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        """One `Judgment` for each group, in their order. Raising stops the stage; to skip, abstain."""

    def judge_each(self, groups: Iterable[CompletionGroup]) -> Generator[Judgment]:
        """The same judgments one after the other; it may take further groups meanwhile. Used if `ahead` is set."""
        for group in groups:
            yield from self.judge([group])

    def attach(self, run_dir: Path, waiting: Waiting) -> None:
        """Called once, with the directory of its run and a context to enter while it waits for a person."""
        for member in self.members:
            member.attach(run_dir, waiting)

    def begin_stage(self) -> None:
        """Called when a stage begins. The judge's budgets and deadlines start again."""
        for member in self.members:
            member.begin_stage()

    def usage(self) -> dict[str, float]:
        """Totals of the resources used so far: calls, tokens_in, tokens_out, cost_usd, …"""
        total: Counter[str] = Counter()
        for member in self.members:
            total.update(member.usage())  # it adds floats as well
        return dict(total)

    def close(self) -> None:
        """Release the device. Called if another stage needs it; `judge` may be called again later."""
        for member in self.members:
            member.close()

    def parts(self) -> Iterator[JudgeBase]:
        """This judge, and all judges within it."""
        yield self
        for member in self.members:
            yield from member.parts()


def checked_judgments(judge: JudgeBase, groups: Sequence[CompletionGroup]) -> list[Judgment]:
    """`judge.judge(groups)`, checked against the protocol.

    Raises:
        JudgeError: a judgment too few or too many, for another prompt, with another number of scores than
            completions, or with a missing score that has no reason.
    """
    judgments = judge.judge(groups)
    if judgments is None or len(judgments) != len(groups):
        got = f"{'nothing' if judgments is None else f'{len(judgments)} judgments'} for {len(groups)} groups"
        raise JudgeError(f"judge {judge.name!r} returned {got}; it must return one for each group")
    for group, judgment in zip(groups, judgments, strict=True):
        _check_judgment(judge, group, judgment)
    return judgments


def judgments_in_turn(
    load: Callable[[], JudgeBase], shards: Iterable[Sequence[CompletionGroup]]
) -> Generator[Judgment]:
    """The judgments of all groups of `shards`, in order, held to the contract of `checked_judgments`, errors too.

    `load` gives the judge; it is called if there is anything to judge. A shard is read when the judge is done with the
    one before, or earlier if the judge may be `ahead`.
    """
    shards = filter(None, shards)
    first = next(shards, None)
    if first is None:
        return
    judge, shards = load(), itertools.chain([first], shards)
    if not judge.ahead:
        for groups in shards:
            yield from checked_judgments(judge, groups)
        return
    taken: deque[CompletionGroup] = deque()

    def note_each() -> Iterator[CompletionGroup]:
        for group in itertools.chain.from_iterable(shards):
            taken.append(group)
            yield group

    noted = note_each()
    with closing(judge.judge_each(noted)) as judgments:
        for judgment in judgments:
            if not taken:
                raise JudgeError(f"judge {judge.name!r} returned more judgments than it has taken groups")
            _check_judgment(judge, taken.popleft(), judgment)
            yield judgment
    if taken or next(noted, None) is not None:
        raise JudgeError(f"judge {judge.name!r} returned no judgments for the last groups")


def _check_judgment(judge: JudgeBase, group: CompletionGroup, judgment: Judgment) -> None:
    count, scores, reasons, id = len(group.completions), judgment.scores, judgment.abstentions, group.prompt.id
    wrong = None
    if judgment.prompt_id != id:
        order = "judgments must keep the order of the groups"
        wrong = f"answered for prompt {judgment.prompt_id!r} instead of {id!r}; {order}"
    elif len(scores) != count or len(reasons) != count:
        given = f"{len(scores)} scores and {len(reasons)} abstentions for {count} completions of prompt {id!r}"
        wrong = f"returned {given}; each needs one of either"
    elif any(score is None and not reason for score, reason in zip(scores, reasons, strict=True)):
        wrong = f"gave neither score nor reason for a completion of {id!r}; an abstention needs its reason"
    elif infinite := [score for score in scores if score is not None and not math.isfinite(score)]:
        wrong = f"scored {infinite[0]} for prompt {id!r}; scores are finite"
    if wrong:
        raise JudgeError(f"judge {judge.name!r} {wrong}")


def judgment_from_scores(group: CompletionGroup, scores: Iterable[object]) -> Judgment:
    """A judgment from raw scores as user code returns them; None, NaN, infinities and non-numbers abstain.

    Another number of scores than completions is a JudgeError.
    """
    raw = list(scores)
    if len(raw) != (count := len(group.completions)):
        given = f"{len(raw)} scores for {count} completions of prompt {group.prompt.id!r}"
        raise JudgeError(f"{given}; return one for each (None abstains)")
    read = [_as_score(item) for item in raw]
    return Judgment(group.prompt.id, [score for score, _ in read], [reason for _, reason in read])


def _as_score(item: object) -> tuple[float | None, str | None]:
    if item is None:
        return None, "the judge returned None"
    try:
        if isinstance(item, str):
            raise TypeError  # "7" may be a score, a rank or a label; reading it as a number would be a guess
        score = float(item)  # type: ignore[arg-type]  # numpy and torch scalars have __float__
    except (TypeError, ValueError, OverflowError):  # an integer may be too long for a float
        return None, f"the judge returned {type(item).__name__} {str(item)[:80]!r}, not a number"
    if not math.isfinite(score):
        return None, f"the judge returned {score}"
    return score, None


@dataclass(frozen=True)
class NamedJudge:
    """A judge whose name and version are known before it is loaded.

    `NamedJudge("heldout_judge", use="judges.sentiment:VaderSentiment", version="9c2e…", load=…)`

    The other fields are the settings of the same names in its section of the configuration.
    """

    role: str
    use: str
    version: str
    load: Callable[[], JudgeBase]
    max_abstained: float = 1.0
    max_abstained_count: int | None = None
    sees: Literal["answer", "completion"] = "answer"
    stream: bool | None = None
    expected_abstentions: tuple[str, ...] = ()
    """Reasons of abstentions that no budget counts; see `JudgeBase.EXPECTED_ABSTENTIONS`."""
    probe: Callable[[], None] = lambda: None
    """Asks once for what the judge needs from outside; see `JudgeBase.probe`."""


class RunJudge:
    """One of a run's judges: loaded when it is first needed, notified when a stage begins, released between stages.

    Args:
        named: which judge, with its limits.
        run_dir: the run's directory, passed on to the judge.
        waiting: the context that the judge enters while it waits for a person.
    """

    def __init__(self, named: NamedJudge, run_dir: Path, waiting: Waiting) -> None:
        self.named = named
        self._run_dir, self._waiting = run_dir, waiting
        self._judge: JudgeBase | None = None
        self._used: dict[str, float] = {}

    @property
    def role(self) -> str:
        return self.named.role

    @property
    def key(self) -> dict[str, str]:
        """What identifies the judge in the key of its results."""
        sees = {"sees": self.named.sees} if self.named.sees != "answer" else {}
        return {"use": self.named.use.rpartition("/")[2], "version": self.named.version, **sees}

    def shown(self, groups: Iterable[CompletionGroup]) -> list[CompletionGroup]:
        """The groups as the judge sees them: of a thinking model's completions the answers, or all of their text."""
        if self.named.sees == "answer":
            return list(groups)
        return [replace(group, completions=[_in_one(c) for c in group.completions]) for group in groups]

    def load(self) -> JudgeBase:
        """The judge itself, loaded once."""
        if self._judge is None:
            self._judge = self.named.load()
            self._judge.attach(self._run_dir, self._waiting)
        return self._judge

    def begin_stage(self) -> None:
        """Budgets and deadlines of the judge begin anew; what it has used so far belongs to another stage."""
        self.used()
        self.load().begin_stage()

    def used(self) -> dict[str, float]:
        """What the judge has used since the last call: `{"calls": 512, "tokens_in": 140800, …}`; often nothing."""
        before, self._used = self._used, self.load().usage()
        return {name: total - before.get(name, 0) for name, total in self._used.items()}

    def release(self) -> None:
        """Give a device back that the judge holds. It loads again when it is next asked."""
        if self._judge is not None:
            self._judge.close()


def _in_one(completion: Completion) -> Completion:
    """A completion whose text is all of it."""
    if completion.reasoning is None:
        return completion
    return replace(completion, text=completion.whole_text, reasoning=None, reasoning_tokens=0)
