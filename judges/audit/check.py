"""What a judge says of labelled pairs: a record of each pair, without its texts, and the worst mistakes with them.

The judge prefers the completion with the higher score. Equal scores are a tie. If either completion has no score, the
judge abstained. The two are given to it in random order, so that a liking for the first one shows.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple

from iterdpo.judging.judge import JudgeBase, checked_judgments
from iterdpo.seeds import derive_seed
from iterdpo.stats import sigmoid
from iterdpo.types import Judgment
from judges.adapter import CustomJudge
from judges.audit.labelled import LabelledPair

LabelOutcome = Literal["chosen", "rejected", "tie"] | None
"""Which completion the judge preferred, named by the label; None if it abstained."""

BLOCK = 64  # groups that a judge is given at a time
EXAMPLES = 12  # mistakes, or differences of two judges, that are kept with their texts
EXPORTED_FIELDS = ("row", "prompt_id", "subset", "tie", "chosen_first", "lengths")

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
        judgment = {k: v for k, v in asdict(self.judgment).items() if k != "source"}
        swapped = None if self.swapped is None else self.swapped.verdict
        return {
            **{k: getattr(self, k) for k in EXPORTED_FIELDS},
            **judgment,
            "swapped": swapped,
            "repeats": self.repeats,
        }


class Mistake(NamedTuple):
    pair: LabelledPair
    judged: JudgedPair


@dataclass
class Check:
    """A judge's verdicts on labelled pairs, and what they took. `stopped` says why it ended before the data did."""

    name: str
    version: str
    pairs: list[JudgedPair] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    seconds: float = 0.0
    usage: dict[str, float] = field(default_factory=dict)
    stopped: BaseException | None = None


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
    before = judge.usage()
    swap: bool | None = None  # not known before the first judgments
    stream = iter(pairs)
    try:
        while block := list(islice(stream, BLOCK)):
            started = time.perf_counter()
            firsts = [derive_seed(seed, "judge check", pair.row) % 2 == 0 for pair in block]
            asked = zip(block, firsts, _judge(judge, block, firsts), strict=True)
            judged = [_judged(pair, first, judgment, unit) for pair, first, judgment in asked]
            if swap is None:
                swap = _compares(judge) and not any(orders(j) for j in judged)
            if swap:
                for j, judgment in zip(judged, _judge(judge, block, [not f for f in firsts]), strict=True):
                    j.swapped = judgment
            for number in range(1, repeats):
                draw_again(judge, number)
                for j, judgment in zip(judged, _judge(judge, block, firsts), strict=True):
                    j.repeats.append(judgment.verdict)
            draw_again(judge, 0)
            check.seconds += time.perf_counter() - started
            check.pairs += judged
            wrong = [Mistake(p, j) for p, j in zip(block, judged, strict=True) if _is_mistake(j)]
            check.mistakes = heapq.nsmallest(EXAMPLES, check.mistakes + wrong, key=_how_right)
            advance(len(block))
    except (Exception, KeyboardInterrupt) as error:  # for the caller to raise, once what is judged is reported
        if not check.pairs and isinstance(error, Exception):
            raise
        check.stopped = error
    check.usage = used_since(before, judge)
    return check


def interpret(pair: LabelledPair, judgment: Judgment, *, chosen_first: bool) -> PairJudgment:
    """What the judgment of `pair.group(chosen_first=…)` says of chosen and rejected."""
    chosen, rejected = judgment.scores if chosen_first else judgment.scores[::-1]
    reasons = dict.fromkeys(
        r for r in (*judgment.abstentions, *(c.reason for c in judgment.comparisons if c.winner is None)) if r
    )
    at = 0 if chosen_first else 1
    shown = []
    for c in judgment.comparisons:
        won = {"first": c.first == at, "second": c.second == at}
        verdict: LabelOutcome = c.winner if c.winner in ("tie", None) else "chosen" if won[c.winner] else "rejected"
        shown.append(OrderedVerdict(c.first == at, verdict))
    if chosen is None or rejected is None:
        return PairJudgment(None, (chosen, rejected), tuple(reasons), tuple(shown), None, "")
    given = [
        c.probability if c.first == at else 1 - c.probability for c in judgment.comparisons if c.probability is not None
    ]
    if given and len(given) == len(judgment.comparisons):
        probability, source = sum(given) / len(given), FROM_PROBABILITIES
    elif shown and 0 <= chosen <= 1 and math.isclose(chosen + rejected, 1):
        probability, source = chosen, FROM_VERDICTS
    else:
        probability, source = sigmoid(chosen - rejected), FROM_SCORES
    verdict = "tie" if chosen == rejected else "chosen" if chosen > rejected else "rejected"
    return PairJudgment(verdict, (chosen, rejected), tuple(reasons), tuple(shown), probability, source)


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


def used_since(before: dict[str, float], judge: JudgeBase) -> dict[str, float]:
    return {name: amount - before.get(name, 0) for name, amount in judge.usage().items()}


def _judge(judge: JudgeBase, block: Sequence[LabelledPair], firsts: Sequence[bool]) -> list[PairJudgment]:
    """The judgments of the pairs; `firsts` says of which the chosen comes first."""
    judgments = checked_judgments(judge, [p.group(chosen_first=f) for p, f in zip(block, firsts, strict=True)])
    return [interpret(p, j, chosen_first=f) for p, j, f in zip(block, judgments, firsts, strict=True)]


def _judged(pair: LabelledPair, chosen_first: bool, judgment: PairJudgment, unit: str) -> JudgedPair:
    chosen, rejected = (len(c.text) if unit == "characters" else len(c.token_ids) for c in (pair.chosen, pair.rejected))
    return JudgedPair(pair.row, pair.prompt.id, pair.subset, pair.tie, chosen_first, (chosen, rejected), judgment)


def _compares(judge: JudgeBase) -> bool:
    """Whether a completion's score may depend on the others of its group, and so on their order."""
    return judge.comparative or (isinstance(judge, CustomJudge) and judge.kind == "groups")


def _is_mistake(judged: JudgedPair) -> bool:
    return not judged.tie and judged.judgment.verdict == "rejected"


def _how_right(mistake: Mistake) -> tuple[float, float, int]:
    judgment = mistake.judged.judgment
    assert judgment.probability is not None
    return judgment.probability, judgment.difference, mistake.judged.row
