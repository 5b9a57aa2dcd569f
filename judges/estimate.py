"""What a judge would be asked: calls, tokens and dollars, counted before anything is asked or loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from iterdpo.types import CompletionGroup
from judges.combine import task_of
from judges.llm.judges import LLMJudge
from judges.load import built_in, check_judge, compares, nested_judges


@dataclass(frozen=True, slots=True)
class Workload:
    """`Workload(calls=1536, tokens_in=410000, tokens_out=786432, dollars=0.54)`.

    Tokens are those of language models, a token for each four bytes of the messages, and the longest replies. `dollars` is
    None if no language model is asked, or one has no prices.
    """

    calls: float = 0
    tokens_in: float = 0
    tokens_out: float = 0
    dollars: float | None = None
    unpriced: bool = False
    """Whether a language model has no prices."""

    def tokens(self) -> str:
        """`at most about 410,000 tokens read and 0.8 M written; 0.54 US dollars`."""
        read, written = (
            f"{n / 1e6:,.1f} M" if n >= 1e6 else f"{round(n):,}" for n in (self.tokens_in, self.tokens_out)
        )
        said = f"at most about {read} tokens read and {written} written"
        if self.dollars is not None:
            said += f"; {self.dollars:,.2f} US dollars"
        if self.unpriced:
            said += "; for the cost, set endpoint.price_in and price_out (US dollars per million tokens)"
        return said

    def __add__(self, other: Workload) -> Workload:
        known = [d for d in (self.dollars, other.dollars) if d is not None]
        return Workload(
            self.calls + other.calls,
            self.tokens_in + other.tokens_in,
            self.tokens_out + other.tokens_out,
            sum(known) if known else None,
            self.unpriced or other.unpriced,
        )

    def __mul__(self, times: float) -> Workload:
        dollars = None if self.dollars is None else self.dollars * times
        return Workload(self.calls * times, self.tokens_in * times, self.tokens_out * times, dollars, self.unpriced)


def estimate(use: str, args: dict[str, Any], groups: Sequence[CompletionGroup]) -> Workload:
    """What judging the groups takes, without repeated requests for replies that cannot be read.

    A language model is counted by writing its requests and sending none; a judge of judges is the sum of those within it;
    another judge is called K times for K completions, or K (K - 1) times if it compares. Runs no user's code.

    Raises:
        JudgeError: what `check_judge` finds in the arguments of a language model.
    """
    if use == "by_task":
        check_judge(use, args)
        judges, column, otherwise = args["judges"], args.get("column", "task"), args.get("otherwise")
        tasks = [task_of(group, column) for group in groups]
        of = {task: [g for g, t in zip(groups, tasks, strict=True) if t == task] for task in judges}
        parts = [(judges[task], some) for task, some in of.items()]
        if otherwise is not None:
            parts.append((otherwise, [g for g, t in zip(groups, tasks, strict=True) if t not in judges]))
        return sum((estimate(j["use"], j.get("args") or {}, some) for j, some in parts), Workload())
    if within := list(nested_judges(args)):
        return sum((estimate(j["use"], j.get("args") or {}, groups) for j in within), Workload())
    made = built_in(use)
    if made is not None and issubclass(made, LLMJudge):
        used = made(**args).forecast(groups)
        priced = used["priced"]
        dollars = used["cost_usd"] if priced else None
        return Workload(used["calls"], used["tokens_in"], used["tokens_out"], dollars, not priced)
    counts = [len(group.completions) for group in groups]
    return Workload(sum(k * (k - 1) for k in counts) if compares(use, args) else sum(counts))
