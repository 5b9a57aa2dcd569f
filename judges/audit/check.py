"""What a judge says of labelled completions: a record of each pair, without its texts, and the worst mistakes with them.

The judge prefers the completion with the higher score. Equal scores are a tie. If either completion has no score, the
judge abstained. The completions of a prompt are given to it together and in random order, so that a liking for the first
one shows. Each right one makes a pair with each of the others.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar

from iterdpo.judging.judge import JudgeBase, checked_judgments
from iterdpo.stats import sigmoid
from iterdpo.types import Judgment
from judges.adapter import CustomJudge
from judges.audit.labelled import LabelledGroup
from judges.audit.published import JudgedGroup

T = TypeVar("T")
LabelOutcome = Literal["chosen", "rejected", "tie"] | None
"""Which completion the judge preferred, named by the label; None if it abstained."""

BLOCK = 64  # groups that a judge is given at a time
EXAMPLES = 12  # mistakes, or differences of two judges, that are kept with their texts

FROM_PROBABILITIES = "the probabilities that the judge gave with its verdicts, mean over both orders"
FROM_VERDICTS = "its verdicts, taken as certain; one in each order counts half"
FROM_SCORES = "sigmoid of the difference of the scores, the reading of Bradley and Terry"


@dataclass(frozen=True, slots=True)
class OrderedVerdict:
    """A single comparison of a pair: `OrderedVerdict(chosen_first=False, verdict="chosen")`; None if the judge abstained."""

    chosen_first: bool
    verdict: LabelOutcome


@dataclass(frozen=True, slots=True)
class PairJudgment:
    """What a judgment says of a labelled pair.

    `PairJudgment("chosen", scores=(0.9, 0.2), reasons=(), shown=(), probability=0.67, source=FROM_SCORES)`

    `scores` are those of chosen and rejected, `probability` is the judge's that the chosen is the better one.
    """

    verdict: LabelOutcome
    scores: tuple[float | None, float | None]
    reasons: tuple[str, ...]
    shown: tuple[OrderedVerdict, ...]
    probability: float | None
    source: str

    @property
    def difference(self) -> float:
        """Score of the chosen minus that of the rejected."""
        chosen, rejected = self.scores
        assert chosen is not None
        assert rejected is not None
        return chosen - rejected


@dataclass(slots=True)
class JudgedPair:
    """A labelled pair as it was judged, without its texts.

    `swapped` is a second judgment with the completions in the other order, `repeats` are further verdicts in the same.
    `lengths` are those of chosen and rejected, `places` says which of the row's completions these are.
    """

    row: int
    prompt_id: str
    subset: str | None
    tie: bool
    chosen_first: bool
    lengths: tuple[int, int]
    judgment: PairJudgment
    places: tuple[int, int] = (0, 1)
    swapped: PairJudgment | None = None
    repeats: list[LabelOutcome] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        row = asdict(self)
        judgment, swapped, repeats = (row.pop(name) for name in ("judgment", "swapped", "repeats"))
        del judgment["source"]
        return {**row, **judgment, "swapped": swapped and swapped["verdict"], "repeats": repeats}


class Mistake(NamedTuple):
    labelled: LabelledGroup
    judged: JudgedPair


@dataclass
class Turn:
    """What judging took. `stopped` says why it ended before the data did."""

    seconds: float = 0.0
    usage: dict[str, float] = field(default_factory=dict)
    stopped: BaseException | None = None


@dataclass
class Check:
    """A judge's verdicts on labelled pairs, the mistakes that it is surest of, and what judging took.

    `groups` are the scores of all completions of a prompt, if some prompt has more than two.
    """

    name: str
    version: str
    pairs: list[JudgedPair] = field(default_factory=list)
    groups: list[JudgedGroup] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    turn: Turn = field(default_factory=Turn)


def check_judge_on(
    judge: JudgeBase,
    labelled: Iterable[LabelledGroup],
    *,
    seed: int = 0,
    repeats: int = 1,
    unit: Literal["characters", "tokens"] = "characters",
    advance: Callable[[int], None] = lambda count: None,
) -> Check:
    """Judge the rows in blocks. A judge that reads a prompt's completions together is shown each row in both orders.

    With `repeats` above 1 each row is judged that many times. The `repeat` of the judge, and of each within it, is the
    number of the draw, so that no cache and no fixed seed answers in its place.

    Ctrl-C, and whatever the data or the judge raise, end it early with the pairs of the finished blocks; `stopped` has
    the reason. Before a first block is finished, errors are raised.
    """
    check = Check(judge.name, judge.version)
    swap: bool | None = None  # not known before the first judgments

    def work(block: Sequence[LabelledGroup]) -> None:
        nonlocal swap
        orders_shown = [row.order(seed) for row in block]
        judgments = _judge(judge, block, orders_shown)
        judged = list(itertools.starmap(partial(_judged, unit=unit), zip(block, orders_shown, judgments, strict=True)))
        flat = [pair for pairs in judged for pair in pairs]
        if swap is None:
            # A completion's score may depend on the others of its group, and so on their order.
            together = judge.comparative or (isinstance(judge, CustomJudge) and judge.kind == "groups")
            swap = together and not any(orders(j) for j in flat)
        if swap:
            reverse = [order[::-1] for order in orders_shown]
            again = _judge(judge, block, reverse)
            for pairs, order, judgment in zip(judged, reverse, again, strict=True):
                for j in pairs:
                    j.swapped = _interpreted(judgment, order, j.places)
        for number in range(1, repeats):
            draw_again(judge, number)
            again = _judge(judge, block, orders_shown)
            for pairs, order, judgment in zip(judged, orders_shown, again, strict=True):
                for j in pairs:
                    j.repeats.append(_interpreted(judgment, order, j.places).verdict)
        draw_again(judge, 0)
        check.pairs += flat
        check.groups += list(itertools.starmap(_judged_group, zip(block, orders_shown, judgments, strict=True)))
        found = [Mistake(row, j) for row, pairs in zip(block, judged, strict=True) for j in pairs]
        wrong = [m for m in found if not m.labelled.tie and m.judged.judgment.verdict == "rejected"]
        check.mistakes = sorted(check.mistakes + wrong, key=how_right)[:EXAMPLES]

    def how_right(mistake: Mistake) -> tuple[float, float, int]:
        judgment = mistake.judged.judgment
        assert judgment.probability is not None
        return judgment.probability, judgment.difference, mistake.judged.row

    check.turn = in_blocks(judge, labelled, work, advance)
    return check


def in_blocks(
    judge: JudgeBase, items: Iterable[T], work: Callable[[Sequence[T]], None], advance: Callable[[int], None]
) -> Turn:
    """Hand the items to `work` in blocks, until it, the items or Ctrl-C raise. An error in the first block is raised."""
    turn, before, done, stream = Turn(), judge.usage(), 0, iter(items)
    try:
        while block := list(islice(stream, BLOCK)):
            started = time.perf_counter()
            work(block)
            turn.seconds += time.perf_counter() - started
            done += len(block)
            advance(len(block))
    except (Exception, KeyboardInterrupt) as error:  # for the caller to raise, once what is judged is reported
        if not done and isinstance(error, Exception):
            raise
        turn.stopped = error
    turn.usage = {name: amount - before.get(name, 0) for name, amount in judge.usage().items()}
    return turn


def interpret(judgment: Judgment, *, chosen: int, rejected: int) -> PairJudgment:
    """What the judgment says of the chosen and the rejected completion, which are at these places of its group."""
    at = sorted((chosen, rejected))
    scores = judgment.scores[chosen], judgment.scores[rejected]
    comparisons = [c for c in judgment.comparisons if sorted((c.first, c.second)) == at]
    failed = (c.reason for c in comparisons if c.winner is None)
    reasons = tuple(dict.fromkeys(r for r in (*(judgment.abstentions[k] for k in at), *failed) if r))
    names: dict[int, LabelOutcome] = {chosen: "chosen", rejected: "rejected"}
    shown: tuple[OrderedVerdict, ...] = ()
    for c in comparisons:
        winners: dict[str | None, LabelOutcome] = {"first": names[c.first], "second": names[c.second], "tie": "tie"}
        shown += (OrderedVerdict(c.first == chosen, winners.get(c.winner)),)
    ours, theirs = scores
    if ours is None or theirs is None:
        return PairJudgment(None, scores, reasons, shown, None, "")
    given = [(c.probability, c.first == chosen) for c in comparisons if c.probability is not None]
    if given and len(given) == len(comparisons):
        probability, source = sum(p if first else 1 - p for p, first in given) / len(given), FROM_PROBABILITIES
    elif shown and len(judgment.scores) == 2 and 0 <= ours <= 1 and math.isclose(ours + theirs, 1):
        probability, source = ours, FROM_VERDICTS
    else:
        probability, source = sigmoid(ours - theirs), FROM_SCORES
    verdict: LabelOutcome = "tie" if ours == theirs else "chosen" if ours > theirs else "rejected"
    return PairJudgment(verdict, scores, reasons, shown, probability, source)


def orders(judged: JudgedPair) -> tuple[LabelOutcome, LabelOutcome] | None:
    """The verdicts with the chosen shown first and with it shown second. None if either is missing."""
    by_order = {s.chosen_first: s.verdict for s in judged.judgment.shown}
    if judged.swapped is not None and len(by_order) < 2:
        by_order = {judged.chosen_first: judged.judgment.verdict, not judged.chosen_first: judged.swapped.verdict}
    both = by_order.get(True), by_order.get(False)
    return None if None in both else both


def draw_again(judge: JudgeBase, number: int) -> None:
    """Have the judge, and those within it, answer the same question as draw `number`."""
    for part in judge.parts():
        part.repeat = number


def _judge(judge: JudgeBase, block: Sequence[LabelledGroup], orders: Sequence[Sequence[int]]) -> list[Judgment]:
    return checked_judgments(judge, [row.group(order) for row, order in zip(block, orders, strict=True)])


def _interpreted(judgment: Judgment, order: Sequence[int], places: tuple[int, int]) -> PairJudgment:
    chosen, rejected = map(order.index, places)
    return interpret(judgment, chosen=chosen, rejected=rejected)


def _judged(row: LabelledGroup, order: Sequence[int], judgment: Judgment, *, unit: str) -> list[JudgedPair]:
    lengths = [len(c.text) if unit == "characters" else len(c.token_ids) for c in row.completions]
    return [
        JudgedPair(
            row.row,
            row.prompt.id,
            row.subset,
            row.tie,
            order.index(i) < order.index(j),
            (lengths[i], lengths[j]),
            _interpreted(judgment, order, (i, j)),
            (i, j),
        )
        for i, j in row.pairs
    ]


def _judged_group(row: LabelledGroup, order: Sequence[int], judgment: Judgment) -> JudgedGroup:
    scores = [judgment.scores[order.index(k)] for k in range(len(order))]
    return JudgedGroup(row.row, row.prompt.id, row.name, row.subset, row.right, scores)
