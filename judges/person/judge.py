"""A person as a judge: pairs are written into the run directory, `iterdpo judge review` asks, and the run waits.

    tasks = what to ask (pure)  ->  review/0001-3fa9…/tasks.jsonl  ->  a person  ->  verdicts.jsonl  ->  judgments (pure)

What is asked and answered lies on disk (`judges/person/store.py`). Either side may end and start again; nothing that a
person has said is asked again in the same run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from iterdpo.errors import JudgeError
from iterdpo.judging.comparisons import Aggregate, judgment_from_comparisons
from iterdpo.judging.judge import JudgeBase, Waiting
from iterdpo.run.rundir import digest
from iterdpo.seeds import derive_seed
from iterdpo.types import Comparison, CompletionGroup, Judgment
from judges.person.store import Batch, Reviews, Task, Verdict
from judges.schedules import all_pairs, random_pairs

Comparisons = int | Literal["all", "chain"]

POLL_SECONDS = 0.5
NOT_SHOWN = "not shown to a person"
SKIPPED = "skipped by the reviewer"


class Person(JudgeBase):
    """Asks a person which of two completions is better.

    Args:
        comparisons: of each prompt. A number draws that many pairs, `chain` links all completions with one pair fewer
            than there are, `all` asks for every pair. A completion in none of the pairs abstains.
        question: shown above the two completions.
        who: for whom the pairs are; `iterdpo judge review RUN_DIR --who NAME` shows theirs alone. Two people as
            training and held-out judge need two names.
        aggregate: how comparisons become scores, see `judgment_from_comparisons`.
        seed: decides the pairs drawn, and which of the two is shown on the left.

    Raises:
        JudgeError: naming the argument that is none of these.
    """

    EXPECTED_ABSTENTIONS = (NOT_SHOWN,)
    comparative = True
    needs_device = (
        True  # though it needs none: a person is better asked once for all than shard by shard beside sampling
    )

    def __init__(
        self,
        *,
        comparisons: Comparisons = 1,
        question: str = "Which completion is better?",
        who: str = "",
        aggregate: Aggregate = "win_rate",
        seed: int = 0,
    ) -> None:
        number = isinstance(comparisons, int) and not isinstance(comparisons, bool) and comparisons >= 1
        if not number and comparisons not in ("all", "chain"):
            raise JudgeError(
                f"judge 'person': comparisons = {comparisons!r}; a number of pairs for each prompt, all or chain"
            )
        if not isinstance(question, str) or not question.strip():
            raise JudgeError(f"judge 'person': question = {question!r}; the question that the page asks")
        if not isinstance(who, str):
            raise JudgeError(f"judge 'person': who = {who!r}; a name, or nothing")
        if aggregate not in ("win_rate", "bradley_terry"):
            raise JudgeError(f"judge 'person': aggregate = {aggregate!r}; win_rate or bradley_terry")
        if not isinstance(seed, int):
            raise JudgeError(f"judge 'person': seed = {seed!r}; a whole number")
        self.name = f"person:{who}" if who else "person"
        self.comparisons = comparisons
        self.question = question
        self.who = who
        self.aggregate = aggregate
        self.seed = seed
        self._run_dir: Path | None = None
        self._waiting: Waiting | None = None

    def attach(self, run_dir: Path, waiting: Waiting) -> None:
        """The run that this judge works for, and what to put around its waits."""
        self._run_dir, self._waiting = run_dir, waiting

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        """Ask for what has no answer yet, wait, and return what was said.

        Raises:
            JudgeError: there is no run directory to ask in.
        """
        plans = [
            plan(group, comparisons=self.comparisons, question=self.question, who=self.who, seed=self.seed)
            for group in groups
        ]
        verdicts = self._asked([task for p in plans for task in p.tasks])
        return [judgment(group, p, verdicts, aggregate=self.aggregate) for group, p in zip(groups, plans, strict=True)]

    def _asked(self, tasks: Sequence[Task]) -> Mapping[str, Verdict]:
        """A verdict for each task, by its id."""
        if not tasks:
            return {}
        if self._run_dir is None or self._waiting is None:
            raise JudgeError(
                "judge 'person': a person judges within a run, whose directory holds what is asked and answered: "
                "name this judge in a configuration and `iterdpo run` it"
            )
        answered, batches = Reviews(self._run_dir).ask(tasks)
        open_batches: list[Batch] = []
        for batch in batches:  # of a run that was killed they may be complete
            if (closed := batch.close()) is None:
                open_batches.append(batch)
            else:
                answered |= closed
        if not open_batches:
            return answered
        left = sum(len(batch.unanswered()) for batch in open_batches)
        message = f"{left} {'pair' if left == 1 else 'pairs'} for {self.who or 'a person'}"
        with self._waiting(f"{message}: iterdpo judge review {self._run_dir}") as still_wanted:
            for batch in open_batches:
                while (closed := batch.close()) is None:
                    if still_wanted is not None:
                        still_wanted()
                    time.sleep(POLL_SECONDS)
                answered |= closed
        return answered


class Plan(NamedTuple):
    """What is asked of one group: the tasks, and for each the completions on its left and right."""

    tasks: list[Task]
    shown: list[tuple[int, int]]
    same: list[int]  # [K], the first completion of the same text, which is asked about in this one's place


def plan(group: CompletionGroup, *, comparisons: Comparisons, question: str, who: str, seed: int) -> Plan:
    """The pairs to show. Completions of one text count once; which is left is drawn from the seed and the texts."""
    texts = [c.text for c in group.completions]
    same = [texts.index(text) for text in texts]
    distinct = sorted(set(same))
    match comparisons:
        case "all":
            drawn = all_pairs(len(distinct))
        case _:
            number = len(distinct) - 1 if comparisons == "chain" else int(comparisons)
            content = digest([group.prompt.content, texts])
            drawn = random_pairs(len(distinct), number, seed=derive_seed(seed, "person", content))
    tasks, shown = [], []
    for a, b in drawn:
        # Sorted first, so that the same two texts are the same task in whatever order a later round samples them.
        i, j = sorted((distinct[a], distinct[b]), key=lambda k: texts[k])
        id = digest([who, question, group.prompt.content, texts[i], texts[j]])
        left, right = (i, j) if random.Random(derive_seed(seed, "order", id)).random() < 0.5 else (j, i)
        tasks.append(Task(id, who, question, group.prompt.content, texts[left], texts[right]))
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
        compared.append(comparison(left, right, verdict))
        notes += [verdict.note] if verdict.note else []
    scored = judgment_from_comparisons(group, compared, aggregate=aggregate)
    met = {k for pair in plan.shown for k in pair}
    single = len(set(plan.same)) == 1
    reasons = [scored.abstentions[k] if k in met or single else NOT_SHOWN for k in plan.same]
    return Judgment(
        group.prompt.id,
        [scored.scores[k] for k in plan.same],
        reasons,
        compared,
        {"notes": notes} if notes else {},
    )


def comparison(left: int, right: int, verdict: Verdict) -> Comparison:
    match verdict.choice:
        case "left":
            return Comparison(left, right, "first")
        case "right":
            return Comparison(left, right, "second")
        case "tie":
            return Comparison(left, right, "tie")
    return Comparison(left, right, None, SKIPPED)
