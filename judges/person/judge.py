"""A person as a judge: pairs are written into the run directory, `iterdpo judge review` asks, and the run waits.

    tasks = what to ask (pure)  ->  review/0001-3fa9…/tasks.jsonl  ->  a person  ->  verdicts.jsonl  ->  judgments (pure)

Questions and answers are on disk (`judges/person/store.py`). Either side may end and start again; a question that a
person has answered is not asked again in the same run.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from iterdpo.errors import JudgeError
from iterdpo.judging.comparisons import Aggregate, judgment_from_comparisons
from iterdpo.judging.judge import JudgeBase, Waiting
from iterdpo.run.rundir import digest
from iterdpo.seeds import derive_seed
from iterdpo.types import Comparison, CompletionGroup, Judgment
from judges.base import is_number
from judges.person.store import Reviews, Task, Verdict
from judges.schedules import random_pairs

Comparisons = int | Literal["all", "chain"]

POLL_SECONDS = 0.5
NOT_SHOWN = "not shown to a person"
SKIPPED = "skipped by the reviewer"
WINNERS: dict[str, Literal["first", "second", "tie"]] = {"left": "first", "right": "second", "tie": "tie"}


@dataclass(eq=False, repr=False, kw_only=True)
class Person(JudgeBase):
    """Asks a person which of two completions is better.

    Raises:
        JudgeError: naming the argument that is none of these.
    """

    EXPECTED_ABSTENTIONS = (NOT_SHOWN,)
    comparative = True
    needs_device = True  # so that a person is asked once for all prompts, not shard by shard while they are sampled
    comparisons: Comparisons = 1
    """Of each prompt. A number draws that many pairs, `chain` links all completions with one pair fewer than there are,
    `all` asks for every pair. A completion in none of the pairs abstains."""
    question: str = "Which completion is better?"
    """Shown above the two completions."""
    who: str = ""
    """For whom the pairs are; `iterdpo judge review RUN_DIR --who NAME` shows theirs alone. Two people as training and
    held-out judge need two names."""
    aggregate: Aggregate = "win_rate"
    """How comparisons become scores, see `judgment_from_comparisons`."""
    seed: int = 0
    """Decides the pairs drawn, and which of the two is shown on the left."""

    def __post_init__(self) -> None:
        number = is_number(self.comparisons) and isinstance(self.comparisons, int) and self.comparisons >= 1
        pairs = number or self.comparisons in ("all", "chain")
        for name, valid, remedy in (
            ("comparisons", pairs, "a number of pairs per prompt, all or chain"),
            ("question", isinstance(self.question, str) and self.question.strip(), "the question that the page asks"),
            ("who", isinstance(self.who, str), "a name, or nothing"),
            ("aggregate", self.aggregate in ("win_rate", "bradley_terry"), "win_rate or bradley_terry"),
            ("seed", isinstance(self.seed, int), "a whole number"),
        ):
            if not valid:
                raise JudgeError(f"judge 'person': {name} = {getattr(self, name)!r}; {remedy}")
        self.name = f"person:{self.who}" if self.who else "person"
        self._run_dir: Path | None = None
        self._waiting: Waiting | None = None

    def attach(self, run_dir: Path, waiting: Waiting) -> None:
        self._run_dir, self._waiting = run_dir, waiting

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        """Ask for what has no answer yet, wait, and return what was said.

        Raises:
            JudgeError: there is no run directory to ask in.
        """
        asked: dict[str, Any] = {"comparisons": self.comparisons, "question": self.question, "who": self.who}
        plans = [plan(group, **asked, seed=self.seed) for group in groups]
        verdicts = self._asked([task for p in plans for task in p.tasks])
        return [judgment(group, p, verdicts, aggregate=self.aggregate) for group, p in zip(groups, plans, strict=True)]

    def _asked(self, tasks: Sequence[Task]) -> Mapping[str, Verdict]:
        if not tasks:
            return {}
        if self._run_dir is None or self._waiting is None:
            wrong = "a person judges only within a run, whose directory holds the questions and answers"
            remedy = "name this judge in a configuration and start that with `iterdpo run`"
            raise JudgeError(f"judge 'person': {wrong}: {remedy}")
        answered, batches = Reviews(self._run_dir).ask(tasks)
        waiting = [batch for batch in batches if batch.close() is None]  # of a run that was killed they may be complete
        left = sum(len(batch.unanswered()) for batch in waiting)
        message = f"{left} {'pair' if left == 1 else 'pairs'} for {self.who or 'a person'}"
        ask = self._waiting(f"{message}: iterdpo judge review {self._run_dir}") if waiting else nullcontext()
        with ask as still_wanted:
            for batch in batches:
                while (closed := batch.close()) is None:
                    if still_wanted is not None:
                        still_wanted()
                    time.sleep(POLL_SECONDS)
                answered |= closed
        return answered


class Plan(NamedTuple):
    """The questions about one group: the tasks, and for each the completions on its left and right."""

    tasks: list[Task]
    shown: list[tuple[int, int]]
    same: list[int]  # [K], the first completion of the same text, which is asked about in this one's place


def plan(group: CompletionGroup, *, comparisons: Comparisons, question: str, who: str, seed: int) -> Plan:
    """The pairs to show. Completions of one text count once; which is left is drawn from the seed and the texts."""
    texts = [c.text for c in group.completions]
    same = [texts.index(text) for text in texts]
    distinct = sorted(set(same))
    if comparisons == "all":
        drawn = list(itertools.combinations(range(len(distinct)), 2))
    else:
        number = len(distinct) - 1 if comparisons == "chain" else comparisons
        content = digest([group.prompt.content, texts])
        drawn = random_pairs(len(distinct), number, seed=derive_seed(seed, "person", content))
    tasks, shown = [], []
    asked = group.prompt.messages if group.prompt.conversational else group.prompt.text
    for a, b in drawn:
        # Sorted first, so that the same two texts are the same task in whatever order a later round samples them.
        i, j = sorted((distinct[a], distinct[b]), key=lambda k: texts[k])
        id = digest([who, question, group.prompt.content, texts[i], texts[j]])
        left, right = (i, j) if random.Random(derive_seed(seed, "order", id)).random() < 0.5 else (j, i)
        tasks.append(Task(id, who, question, asked, texts[left], texts[right]))
        shown.append((left, right))
    return Plan(tasks, shown, same)


def judgment(group: CompletionGroup, plan: Plan, verdicts: Mapping[str, Verdict], *, aggregate: Aggregate) -> Judgment:
    """Scores from a person's verdicts. The comparisons keep the order on the screen: `first` was on the left."""
    if len(plan.same) > 1 and not any(plan.same):  # one text: nobody needs to be asked
        tie = Comparison(0, 1, "tie", "the same text")
        return Judgment(group.prompt.id, [0.5] * len(plan.same), [None] * len(plan.same), [tie])
    compared, notes = [], []
    for task, (left, right) in zip(plan.tasks, plan.shown, strict=True):
        verdict = verdicts[task.id]
        # The answer may be to a task of another seed, with the other one on the left.
        if (verdict.left, verdict.right) != (task.left, task.right):
            left, right = right, left
        winner = WINNERS.get(verdict.choice)
        compared.append(Comparison(left, right, winner, None if winner else SKIPPED))
        notes += [verdict.note] if verdict.note else []
    scored = judgment_from_comparisons(group, compared, aggregate=aggregate)
    met = {k for pair in plan.shown for k in pair}
    single = len(set(plan.same)) == 1
    reasons = [scored.abstentions[k] if k in met or single else NOT_SHOWN for k in plan.same]
    scores = [scored.scores[k] for k in plan.same]
    return Judgment(group.prompt.id, scores, reasons, compared, {"notes": notes} if notes else {})
