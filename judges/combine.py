"""Judges made of other judges: an ensemble of several, and wrappers that change the scores of one.

A judge within these is given as in a configuration, `{"use": "reward_model", "args": {"model": "…"}}`. Its abstentions
stay abstentions, with their reasons.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean, mean, pstdev
from typing import Any, ClassVar

from iterdpo.errors import JudgeError
from iterdpo.judging.judge import JudgeBase, checked_judgments
from iterdpo.run.rundir import digest
from iterdpo.seeds import derive_seed
from iterdpo.types import CompletionGroup, Judgment
from judges.base import Abstention, check_choice, is_number
from judges.cache import SQLiteCache
from judges.load import load_judge

Scores = list[float | None]  # [K]
Lengths = list[int]  # [K], in tokens
Outcome = float | Abstention | None

STANDARDIZE = ("none", "group")


class _JudgeOfJudges(JudgeBase):
    def __init__(self, name: str, members: Sequence[JudgeBase]) -> None:
        self.name = f"{name}({', '.join(member.name for member in members)})"
        self.members = members
        self.comparative = self.comparative or any(member.comparative for member in members)
        self.needs_device = any(member.needs_device for member in members)


class Ensemble(_JudgeOfJudges):
    """The weighted mean of the members' scores: sum_m w_m s_m / sum_m |w_m|.

    A completion abstains if fewer than `min_judges` members scored it. By default all must: means over different members
    are on different scales, so lower it only if the members' scores are alike, or standardized.

    Two members disagree on two completions if one scores the first higher and the other the second; a member that scores
    the two alike disagrees with no other. The disagreement of a group is the share of these contrary verdicts among all
    (pair of members, pair of completions) in which both members see a difference.

    Args:
        judges: the members, as `{use, args, weight}`. The default `weight` is 1; a negative one is for a judge whose high
            scores are bad.
        standardize: `none`, or `group`: a member's scores are taken in standard deviations from their mean over the
            prompt's completions, so that the members' scales do not matter. A member that scores all of them alike adds
            0 to each. With two completions only the order is left, so the sum is a weighted vote. Small differences
            become as large as large ones: if the scales are known, weights of 1 / scale are better.
        max_disagreement: the whole group abstains if its disagreement is larger.
        min_judges: fewest members that must have scored a completion.
    """

    def __init__(
        self,
        judges: list[dict[str, Any]],
        standardize: str = "none",
        max_disagreement: float | None = None,
        min_judges: int | None = None,
    ) -> None:
        self.comparative = standardize == "group"
        super().__init__("ensemble", [load_judge(judge["use"], judge.get("args") or {}) for judge in judges])
        self.weights = [float(judge.get("weight", 1)) for judge in judges]
        self.standardize, self.max_disagreement = standardize, max_disagreement
        self.min_judges = len(judges) if min_judges is None else min_judges

    @staticmethod
    def check(judges: Any, standardize: Any = "none", max_disagreement: Any = None, min_judges: Any = None) -> None:
        if not isinstance(judges, list) or not judges:
            raise JudgeError("ensemble: `judges` is a list of {use: ..., args: {...}, weight: 1}; give at least one")
        for judge in judges:
            _check_nested("ensemble", judge, {"use", "args", "weight"})
            weight = judge.get("weight", 1)
            if not is_number(weight) or weight == 0:
                raise JudgeError(f"ensemble: {judge['use']} has weight {weight!r}; give a number other than 0")
        check_choice("ensemble", "standardize", standardize, STANDARDIZE)
        if max_disagreement is not None and not (is_number(max_disagreement) and 0 <= max_disagreement <= 1):
            raise JudgeError(f"ensemble: max_disagreement is {max_disagreement!r}; it is a share between 0 and 1")
        if min_judges is not None and min_judges not in range(1, len(judges) + 1):
            raise JudgeError(f"ensemble: min_judges is {min_judges!r}; it is a number from 1 to {len(judges)}")

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        judged = [checked_judgments(member, groups) for member in self.members]
        return [self._combined(list(judgments)) for judgments in zip(*judged, strict=True)]

    def _combined(self, judgments: list[Judgment]) -> Judgment:
        columns = list(zip(*(j.scores for j in judgments), strict=True))  # [K][members]
        enough = [sum(s is not None for s in column) >= self.min_judges for column in columns]
        rows = [[s if kept else None for s, kept in zip(j.scores, enough, strict=True)] for j in judgments]
        signs = [math.copysign(1, w) for w in self.weights]
        signed = [[None if s is None else sign * s for s in row] for row, sign in zip(rows, signs, strict=True)]
        contrary = disagreement(signed)
        if self.standardize == "group":
            rows = [z_scores(row) for row in rows]
        disagree = self.max_disagreement is not None and contrary is not None and contrary > self.max_disagreement
        scores: Scores = []
        reasons: list[str | None] = []
        for k, kept in enumerate(enough):
            given = [(w, s) for w, row in zip(self.weights, rows, strict=True) if (s := row[k]) is not None]
            reason = self._too_few(judgments, k) if not kept else "the judges disagree" if disagree else None
            scores.append(None if reason else sum(w * s for w, s in given) / sum(abs(w) for w, _ in given))
            reasons.append(reason)
        each = zip(self.members, self.weights, judgments, strict=True)
        members = [{"judge": m.name, "weight": w, "scores": j.scores} for m, w, j in each]
        compared = [j.comparisons for j in judgments if j.comparisons]
        # One member's verdicts: those of several would pass for one judge that contradicts itself.
        comparisons = compared[0] if len(compared) == 1 else []
        details = {"judges": members, "disagreement": contrary}
        return Judgment(judgments[0].prompt_id, scores, reasons, comparisons, details)

    def _too_few(self, judgments: list[Judgment], k: int) -> str:
        missing = [(m, j.abstentions[k]) for m, j in zip(self.members, judgments, strict=True) if j.scores[k] is None]
        failed = [f"{m.name}: {reason}" for m, reason in missing if reason not in m.EXPECTED_ABSTENTIONS]
        if not failed:
            return str(missing[0][1])
        few = "" if self.min_judges == len(self.members) else f"fewer than {self.min_judges} judges gave a score; "
        return few + failed[0]


def disagreement(rows: Sequence[Sequence[float | None]]) -> float | None:
    """The share of contrary verdicts among the judges' scores [judges][K]; None if no two judges see a difference.

    Counted over every pair of judges and pair of completions in which both judges score the two differently.
    """
    contrary = both = 0
    for first, second in combinations(rows, 2):
        scored = [(x, y) for x, y in zip(first, second, strict=True) if x is not None and y is not None]
        for (a, c), (b, d) in combinations(scored, 2):
            if a != b and c != d:
                both += 1
                contrary += (a > b) != (c > d)
    return contrary / both if both else None


def z_scores(scores: Sequence[float | None]) -> Scores:
    """(s - mean) / the population's standard deviation, over the scores that are not None; 0 without spread."""
    known = [s for s in scores if s is not None]
    if not known:
        return list(scores)
    center, spread = fmean(known), pstdev(known)
    if spread <= 1e-12 * max(map(abs, known)):  # rounding errors of equal scores are no difference
        return [None if s is None else 0.0 for s in scores]
    return [None if s is None else (s - center) / spread for s in scores]


class ByTask(_JudgeOfJudges):
    """One judge for each kind of prompt: a column says which. Verifiable and judged prompts go into one run so.

    Pairs are made within a prompt, so the judges' scales do not matter to them. Held-out scores are means over all prompts:
    give the judges scales that are alike (`clip`, a rubric from 0 to 1), or read win rates. A prompt whose task has no
    judge abstains.

    Args:
        judges: the judges, by the value of the column: `{math: {use, args}, chat: {use, args}}`.
        column: the column with the task.
        otherwise: the judge of prompts with another value, or without the column.
    """

    def __init__(
        self, judges: dict[str, dict[str, Any]], column: str = "task", otherwise: dict[str, Any] | None = None
    ) -> None:
        self.column = column
        self.by_task = {task: load_judge(judge["use"], judge.get("args") or {}) for task, judge in judges.items()}
        self.otherwise = load_judge(otherwise["use"], otherwise.get("args") or {}) if otherwise else None
        super().__init__("by_task", [*self.by_task.values(), *([self.otherwise] if self.otherwise else [])])

    @staticmethod
    def check(judges: Any, column: Any = "task", otherwise: Any = None) -> None:
        if not isinstance(judges, dict) or not judges or "use" in judges:
            raise JudgeError("by_task: `judges` is a mapping of tasks to judges: {math: {use: ..., args: {...}}, ...}")
        if unquoted := [task for task in judges if not isinstance(task, str)]:
            raise JudgeError(f"by_task: the task {unquoted[0]!r} in `judges` is no text; put it into quotes")
        for judge in [*judges.values(), *([otherwise] if otherwise is not None else [])]:
            _check_nested("by_task", judge)
        if not isinstance(column, str) or not column:
            raise JudgeError(f"by_task: column is {column!r}; it is the name of a column of the prompts")

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        tasks = [task_of(group, self.column) for group in groups]
        found: dict[int, Judgment] = {}
        for which in dict.fromkeys(task if task in self.by_task else None for task in tasks):
            numbers = [i for i, task in enumerate(tasks) if (task if task in self.by_task else None) == which]
            member = self.otherwise if which is None else self.by_task[which]
            some = [groups[i] for i in numbers]
            judged = self._unjudged(some) if member is None else checked_judgments(member, some)
            found |= dict(zip(numbers, judged, strict=True))
        return [found[i] for i in range(len(groups))]

    def _unjudged(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        known = ", ".join(self.by_task)
        reasons = [f"column {self.column!r} is {task_of(group, self.column)!r}, not {known}" for group in groups]
        counts = [len(group.completions) for group in groups]
        return [
            Judgment(group.prompt.id, [None] * count, [reason] * count)
            for group, count, reason in zip(groups, counts, reasons, strict=True)
        ]


def task_of(group: CompletionGroup, column: str) -> str | None:
    """The task that a prompt's column names, as text; None without one."""
    value = group.prompt.columns.get(column)
    return None if value is None else str(value)


class _Wrapper(_JudgeOfJudges):
    """A judge that changes the scores of another one, by `rescored`.

    The inner judge's scores stay in the judgment's `details`, under `before_<wrapper>`.
    """

    KIND: ClassVar[str]

    def __init__(self, judge: dict[str, Any]) -> None:
        self.inner = load_judge(judge["use"], judge.get("args") or {})
        super().__init__(self.KIND, [self.inner])

    @classmethod
    def check(cls, judge: Any, **args: Any) -> None:
        _check_nested(cls.KIND, judge)
        cls.check_arguments(**args)

    @staticmethod
    def check_arguments(*_: Any, **args: Any) -> None:
        """Refuse bad arguments, except those of the judges within it."""

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        judgments = checked_judgments(self.inner, groups)
        lengths = [[len(completion.answer_ids) for completion in group.completions] for group in groups]
        return [self._changed(j, o) for j, o in zip(judgments, self.rescored(judgments, lengths), strict=True)]

    def _changed(self, judgment: Judgment, outcomes: Sequence[Outcome]) -> Judgment:
        new = [
            (None, str(o)) if isinstance(o, Abstention) else (None if o is None else float(o), None) for o in outcomes
        ]
        reasons = [old or reason for old, (_, reason) in zip(judgment.abstentions, new, strict=True)]
        details = {**judgment.details, f"before_{self.KIND}": judgment.scores}
        return replace(judgment, scores=[score for score, _ in new], abstentions=reasons, details=details)

    def rescored(self, judgments: Sequence[Judgment], lengths: Sequence[Lengths]) -> Iterable[Sequence[Outcome]]:
        """Each group's new scores, from the old and the completions' tokens; None if the inner judge abstained."""
        raise NotImplementedError


class LengthPenalty(_Wrapper):
    """score - per_token * max(0, tokens - above), with the tokens that the policy sampled."""

    KIND = "length_penalty"

    def __init__(self, judge: dict[str, Any], per_token: float, above: int = 0) -> None:
        super().__init__(judge)
        self.per_token, self.above = per_token, above

    @staticmethod
    def check_arguments(per_token: Any, above: Any = 0) -> None:
        _check_not_negative("length_penalty", per_token=per_token, above=above)

    def rescored(self, judgments: Sequence[Judgment], lengths: Sequence[Lengths]) -> Iterable[Sequence[Outcome]]:
        for judgment, tokens in zip(judgments, lengths, strict=True):
            excess = [max(0, n - self.above) for n in tokens]
            yield [None if s is None else s - self.per_token * n for s, n in zip(judgment.scores, excess, strict=True)]


class LengthRegressed(_Wrapper):
    """score - slope * (tokens - mean tokens of the prompt's completions): the score without the effect of length.

    The slope is that of least squares through the differences of scores and of lengths from their means over each
    prompt's completions, over all groups judged together (a shard). Only completions of one prompt are compared, so an
    easy prompt that calls for a long completion does not count as a reward for length.

    Its limits: only a straight line is removed; if longer completions are better, that is removed too; and the slope is
    the shard's, so a group's scores depend on the other groups (`LengthPenalty` has one slope for all). If the groups have
    fewer than `min_completions` scored completions, not counting one of each group, all abstain: there is always a line
    through two completions of one prompt, and nothing would be left of any score.
    """

    KIND = "length_regressed"
    comparative = True

    def __init__(self, judge: dict[str, Any], min_completions: int = 8) -> None:
        super().__init__(judge)
        self.min_completions = min_completions

    @staticmethod
    def check_arguments(min_completions: Any = 8) -> None:
        if not isinstance(min_completions, int) or min_completions < 2:
            raise JudgeError(f"length_regressed: min_completions is {min_completions!r}; it is a number of at least 2")

    def rescored(self, judgments: Sequence[Judgment], lengths: Sequence[Lengths]) -> Iterable[Sequence[Outcome]]:
        rows = [list(zip(tokens, j.scores, strict=True)) for j, tokens in zip(judgments, lengths, strict=True)]
        tables = [[(n, s) for n, s in row if s is not None] for row in rows]
        few = sum(len(table) - 1 for table in tables if table) < self.min_completions
        slope = 0.0 if few else within_slope(tables)
        refusal = Abstention("too few completions judged together to estimate the effect of length")
        for judgment, row, table in zip(judgments, rows, tables, strict=True):
            judgment.details["length_slope"] = slope
            center = fmean(n for n, _ in table) if table else 0.0
            yield [None if s is None else refusal if few else s - slope * (n - center) for n, s in row]


def within_slope(tables: Sequence[Sequence[tuple[float, float]]]) -> float:
    """The least-squares slope of y over x, each minus its mean in its table; 0 if no x differs from its mean.

    `within_slope([[(0, 1.0), (2, 2.0)]]) == 0.5`
    """
    products = squares = 0.0
    for table in filter(None, tables):
        x_mean, y_mean = fmean(x for x, _ in table), fmean(y for _, y in table)
        products += sum((x - x_mean) * (y - y_mean) for x, y in table)
        squares += sum((x - x_mean) ** 2 for x, _ in table)
    return products / squares if squares else 0.0


class Clip(_Wrapper):
    """The score, but at least `low` and at most `high`."""

    KIND = "clip"

    def __init__(self, judge: dict[str, Any], low: float | None = None, high: float | None = None) -> None:
        super().__init__(judge)
        self.low = -math.inf if low is None else low
        self.high = math.inf if high is None else high

    @staticmethod
    def check_arguments(low: Any = None, high: Any = None) -> None:
        given = [bound for bound in (low, high) if bound is not None]
        if not given or not all(map(is_number, given)) or sorted(given) != given:
            raise JudgeError(f"clip: low is {low!r} and high is {high!r}; give numbers for one or both, low first")

    def rescored(self, judgments: Sequence[Judgment], lengths: Sequence[Lengths]) -> Iterable[Sequence[Outcome]]:
        return [[None if s is None else min(max(s, self.low), self.high) for s in j.scores] for j in judgments]


class TieBand(_Wrapper):
    """Scores of one prompt's completions that are at most `width` apart become equal: their mean.

    "At most `width` apart" is not transitive, but equality is: two such scores and every score between them become one
    tie, and ties with a score in common become one. So no difference as small as `width` is left, no order is reversed,
    and a long chain of scores, each near the next, becomes one tie.

    `length_ratio`: only if one completion has more than this many times the tokens of the other, for judges that prefer
    the longer one by default. Scores of completions of similar length stay apart.
    """

    KIND = "tie_band"
    comparative = True  # what is a tie depends on the others

    def __init__(self, judge: dict[str, Any], width: float, length_ratio: float | None = None) -> None:
        super().__init__(judge)
        self.width, self.length_ratio = width, length_ratio

    @staticmethod
    def check_arguments(width: Any, length_ratio: Any = None) -> None:
        _check_not_negative("tie_band", width=width)
        if length_ratio is not None and not (is_number(length_ratio) and length_ratio >= 1):
            raise JudgeError(f"tie_band: length_ratio is {length_ratio!r}; it is a number of at least 1, such as 1.5")

    def rescored(self, judgments: Sequence[Judgment], lengths: Sequence[Lengths]) -> Iterable[Sequence[Outcome]]:
        for judgment, tokens in zip(judgments, lengths, strict=True):
            yield tied(judgment.scores, tokens, width=self.width, length_ratio=self.length_ratio)


def tied(scores: Scores, lengths: Sequence[int], *, width: float, length_ratio: float | None) -> Scores:
    """`scores` with those within the band made equal; see `TieBand`."""
    known = sorted((s, n, k) for k, (s, n) in enumerate(zip(scores, lengths, strict=True)) if s is not None)
    joined = [False] * len(known)  # [i]: with the next one
    for (i, (low, m, _)), (j, (high, n, _)) in combinations(enumerate(known), 2):
        alike = length_ratio is not None and max(m, n) <= length_ratio * max(1, min(m, n))
        if high == low or (high - low <= width and not alike):  # what was equal stays so
            joined[i:j] = [True] * (j - i)
    found, run = list(scores), []
    for (s, _, k), more in zip(known, joined, strict=True):
        run.append((s, k))
        if not more:
            value = mean(s for s, _ in run)
            for _, index in run:
                found[index] = value
            run = []
    return found


class ZScore(_Wrapper):
    """The score in standard deviations from the mean of the prompt's completions; 0 if all are scored alike.

    The order stays and the distances lose their unit: prompts with generous and with strict scores weigh the same. Two
    completions get 1 and -1, however near their scores were.
    """

    KIND = "z_score"
    comparative = True

    def rescored(self, judgments: Sequence[Judgment], lengths: Sequence[Lengths]) -> Iterable[Sequence[Outcome]]:
        return [z_scores(judgment.scores) for judgment in judgments]


class Flipped(_Wrapper):
    """The score, with its sign changed on a share of the prompts: a judge that is wrong about them, for experiments.

    On these prompts the best completion is the worst, so that the label of every pair is flipped. Which they are depends
    on `seed` and the prompt's id alone.
    """

    KIND = "flipped"

    def __init__(self, judge: dict[str, Any], share: float, seed: int = 0) -> None:
        super().__init__(judge)
        self.share, self.seed = share, seed

    @staticmethod
    def check_arguments(share: Any, seed: Any = 0) -> None:
        if not is_number(share) or not 0 <= share <= 1:
            raise JudgeError(f"flipped: share is {share!r}; it is a number between 0 and 1, such as 0.2")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise JudgeError(f"flipped: seed is {seed!r}; it is a whole number")

    def rescored(self, judgments: Sequence[Judgment], lengths: Sequence[Lengths]) -> Iterable[Sequence[Outcome]]:
        for judgment in judgments:
            wrong = derive_seed(self.seed, "flipped", judgment.prompt_id) < self.share * 2**31
            yield [s if s is None or not wrong else -s for s in judgment.scores]


class Cached(_Wrapper):
    """The judge's judgments, kept in an SQLite file: all runs together judge a group once.

    The key is the judge's version, the prompt (id, messages, columns, tokens) and the completions (texts, tokens, how they
    ended), without the sampler's log-probabilities. A judgment with an abstention in it is not kept. Several processes
    may share a file.

    Args:
        path: the file; it is made if it does not exist. Delete it to forget everything.
    """

    KIND = "cached"
    SPEED_ONLY = frozenset({"path"})

    def __init__(self, judge: dict[str, Any], path: str) -> None:
        super().__init__(judge)
        self.path = Path(path).expanduser()
        self.hits = 0

    @staticmethod
    def check_arguments(path: Any) -> None:
        if not isinstance(path, str) or not path or Path(path).expanduser().is_dir():
            raise JudgeError(f"cached: path is {path!r}; it is the file to keep judgments in, such as judgments.sqlite")

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        draw = [self.repeat] if self.repeat else []
        keys = [digest([self.inner.version, _content(group), *draw]) for group in groups]
        with self._open() as cache:
            found = ((key, cache.get(key, lambda text: Judgment.from_json(json.loads(text)))) for key in keys)
            known = {key: judgment for key, judgment in found if judgment is not None}
        self.hits += sum(key in known for key in keys)
        missing = {key: group for key, group in zip(keys, groups, strict=True) if key not in known}
        if missing:
            judged = checked_judgments(self.inner, list(missing.values()))
            fresh = dict(zip(missing, judged, strict=True))
            with self._open() as cache:
                cache.put({key: json.dumps(j.to_json()) for key, j in fresh.items() if None not in j.scores})
            known |= fresh
        return [known[key] for key in keys]

    def usage(self) -> dict[str, float]:
        used = super().usage()
        return {**used, "cached": used.get("cached", 0) + self.hits}

    def _open(self) -> closing[SQLiteCache]:
        remedy = "or name another in `path`"
        return closing(SQLiteCache(self.path, table="judgments", column="judgment", owner="cached", remedy=remedy))


def _content(group: CompletionGroup) -> dict[str, Any]:
    row = group.to_json()
    for completion in row["completions"]:
        del completion["logprobs"]  # measured, and of the same completion not the same to the last bit
    return row


def _check_nested(owner: str, judge: Any, known: Iterable[str] = ("use", "args")) -> None:
    if not isinstance(judge, dict) or not isinstance(judge.get("use"), str) or judge.keys() - set(known):
        form = ", ".join(sorted(known, reverse=True))
        raise JudgeError(f"{owner}: a judge in it is given as {{{form}}}, not {judge!r}")


def _check_not_negative(owner: str, **numbers: Any) -> None:
    for name, value in numbers.items():
        if not is_number(value) or value < 0:
            raise JudgeError(f"{owner}: {name} is {value!r}; it is a number, 0 or more")
