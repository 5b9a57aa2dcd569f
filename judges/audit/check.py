"""What a judge says of labelled pairs: a record of each pair, without its texts, and the worst mistakes with them.

The judge prefers the completion with the higher score. Equal scores are a tie. If either completion has no score, the
judge abstained. The two are given to it in random order, so that a liking for the first one shows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar

from iterdpo.judging.judge import JudgeBase, checked_judgments
from iterdpo.seeds import derive_seed
from iterdpo.stats import sigmoid
from iterdpo.types import Judgment
from judges.adapter import CustomJudge
from judges.audit.labelled import LabelledPair

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
    `lengths` are those of chosen and rejected.
    """

    row: int
    prompt_id: str
    subset: str | None
    tie: bool
    chosen_first: bool
    lengths: tuple[int, int]
    judgment: PairJudgment
    swapped: PairJudgment | None = None
    repeats: list[LabelOutcome] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        row = asdict(self)
        judgment, swapped, repeats = (row.pop(name) for name in ("judgment", "swapped", "repeats"))
        del judgment["source"]
        return {**row, **judgment, "swapped": swapped and swapped["verdict"], "repeats": repeats}


class Mistake(NamedTuple):
    pair: LabelledPair
    judged: JudgedPair


@dataclass
class Turn:
    """What judging took. `stopped` says why it ended before the data did."""

    seconds: float = 0.0
    usage: dict[str, float] = field(default_factory=dict)
    stopped: BaseException | None = None


@dataclass
class Check:
    """A judge's verdicts on labelled pairs, the mistakes that it is surest of, and what judging took."""

    name: str
    version: str
    pairs: list[JudgedPair] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    turn: Turn = field(default_factory=Turn)


def check_judge_on(
    judge: JudgeBase,
    pairs: Iterable[LabelledPair],
    *,
    seed: int = 0,
    repeats: int = 1,
    unit: Literal["characters", "tokens"] = "characters",
    advance: Callable[[int], None] = lambda count: None,
) -> Check:
    """Judge the pairs in blocks. A judge that reads a prompt's completions together is shown each pair in both orders.

    With `repeats` above 1 each pair is judged that many times. The `repeat` of the judge, and of each within it, is the
    number of the draw, so that no cache and no fixed seed answers in its place.

    Ctrl-C, and whatever the data or the judge raise, end it early with the pairs of the finished blocks; `stopped` has
    the reason. Before a first block is finished, errors are raised.
    """
    check = Check(judge.name, judge.version)
    swap: bool | None = None  # not known before the first judgments

    def work(block: Sequence[LabelledPair]) -> None:
        nonlocal swap
        firsts = [derive_seed(seed, "judge check", pair.row) % 2 == 0 for pair in block]
        asked = zip(block, firsts, _judge(judge, block, firsts), strict=True)
        judged = [_judged(pair, first, judgment, unit) for pair, first, judgment in asked]
        if swap is None:
            # A completion's score may depend on the others of its group, and so on their order.
            together = judge.comparative or (isinstance(judge, CustomJudge) and judge.kind == "groups")
            swap = together and not any(orders(j) for j in judged)
        if swap:
            for j, judgment in zip(judged, _judge(judge, block, [not f for f in firsts]), strict=True):
                j.swapped = judgment
        for number in range(1, repeats):
            draw_again(judge, number)
            for j, judgment in zip(judged, _judge(judge, block, firsts), strict=True):
                j.repeats.append(judgment.verdict)
        draw_again(judge, 0)
        check.pairs += judged
        wrong = [m for m in map(Mistake, block, judged) if not m.pair.tie and m.judged.judgment.verdict == "rejected"]
        check.mistakes = sorted(check.mistakes + wrong, key=how_right)[:EXAMPLES]

    def how_right(mistake: Mistake) -> tuple[float, float, int]:
        judgment = mistake.judged.judgment
        assert judgment.probability is not None
        return judgment.probability, judgment.difference, mistake.judged.row

    check.turn = in_blocks(judge, pairs, work, advance)
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


def interpret(pair: LabelledPair, judgment: Judgment, *, chosen_first: bool) -> PairJudgment:
    """What the judgment of `pair.group(chosen_first=…)` says of chosen and rejected."""
    first, second = judgment.scores
    chosen, rejected = scores = (first, second) if chosen_first else (second, first)
    failed = (c.reason for c in judgment.comparisons if c.winner is None)
    reasons = tuple(dict.fromkeys(r for r in (*judgment.abstentions, *failed) if r))
    at = 0 if chosen_first else 1
    names: list[LabelOutcome] = ["chosen", "rejected"] if chosen_first else ["rejected", "chosen"]
    shown: tuple[OrderedVerdict, ...] = ()
    for c in judgment.comparisons:
        winners: dict[str | None, LabelOutcome] = {"first": names[c.first], "second": names[c.second], "tie": "tie"}
        shown += (OrderedVerdict(c.first == at, winners.get(c.winner)),)
    if chosen is None or rejected is None:
        return PairJudgment(None, scores, reasons, shown, None, "")
    given = [(c.probability, c.first == at) for c in judgment.comparisons if c.probability is not None]
    if given and len(given) == len(judgment.comparisons):
        probability, source = sum(p if first else 1 - p for p, first in given) / len(given), FROM_PROBABILITIES
    elif shown and 0 <= chosen <= 1 and math.isclose(chosen + rejected, 1):
        probability, source = chosen, FROM_VERDICTS
    else:
        probability, source = sigmoid(chosen - rejected), FROM_SCORES
    verdict: LabelOutcome = "tie" if chosen == rejected else "chosen" if chosen > rejected else "rejected"
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


def _judge(judge: JudgeBase, block: Sequence[LabelledPair], firsts: Sequence[bool]) -> list[PairJudgment]:
    """The judgments of the pairs; `firsts` says of which the chosen comes first."""
    judgments = checked_judgments(judge, [p.group(chosen_first=f) for p, f in zip(block, firsts, strict=True)])
    return [interpret(p, j, chosen_first=f) for p, j, f in zip(block, judgments, firsts, strict=True)]


def _judged(pair: LabelledPair, chosen_first: bool, judgment: PairJudgment, unit: str) -> JudgedPair:
    chosen, rejected = (len(c.text) if unit == "characters" else len(c.token_ids) for c in (pair.chosen, pair.rejected))
    return JudgedPair(pair.row, pair.prompt.id, pair.subset, pair.tie, chosen_first, (chosen, rejected), judgment)
