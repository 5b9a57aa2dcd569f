"""What the judges by rule share: the loop over completions, the prompt's column, fenced blocks."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from iterdpo.errors import JudgeError
from iterdpo.judging.judge import JudgeBase
from iterdpo.types import CompletionGroup, Judgment
from judges.base import Abstention, judgments_from_outcomes

Score = float | Abstention


class Verifier(JudgeBase):
    """Scores each completion by itself, `concurrency` at once, given what the prompt's column has."""

    needs_device = False
    name = "verifier"
    column: str | None = "gold"
    concurrency: int = 1
    REVISION: ClassVar[int] = 1  # raised if the same arguments give other scores than before

    @classmethod
    def key(cls, **args: Any) -> Any:
        settings = super().key(**args)
        return settings if cls.REVISION == 1 else [cls.REVISION, settings]

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        work = [(c.text, group) for group in groups for c in group.completions]
        if self.concurrency == 1:
            return judgments_from_outcomes(groups, [self._score(*item) for item in work])
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            return judgments_from_outcomes(groups, pool.map(lambda item: self._score(*item), work))
        finally:  # all are done, or Ctrl-C does not wait for those under way
            pool.shutdown(wait=False, cancel_futures=True)

    def _score(self, completion: str, group: CompletionGroup) -> Score:
        if self.column is None:
            return self.score(completion, None)
        gold = group.prompt.columns.get(self.column)
        if gold is None or gold == [] or gold == "":
            missing = "is empty" if self.column in group.prompt.columns else "is missing"
            return Abstention(f"the prompt's column {self.column!r} {missing}")
        return self.score(completion, gold)

    def score(self, completion: str, gold: Any) -> Score:
        raise NotImplementedError


def texts_of(gold: Any) -> list[str]:
    return [str(text) for text in (gold if isinstance(gold, list | tuple) else [gold])]


def check_positive(judge: str, **values: float) -> None:
    for key, value in values.items():
        if not value > 0:
            raise JudgeError(f"judge {judge!r}: {key} is {value}; it must be more than 0")


OPENING = re.compile(r"[ \t]*```[ \t]*([^\s`]*)[^`]*")
CLOSING = re.compile(r"[ \t]*```[ \t]*(?:<\|.*)?")
CLOSING_BEHIND = re.compile(r"([^`]*[^`\s])```[ \t]*")  # code


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """Fenced blocks: (language, content). A last one that is never closed, as of a truncated completion, counts."""
    blocks: list[tuple[str, str]] = []
    language: str | None = None
    lines: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        if language is None:
            if opening := OPENING.fullmatch(line):
                language, lines = opening[1].lower(), []
        elif CLOSING.fullmatch(line):
            blocks.append((language, _dedented("".join(f"{line}\n" for line in lines))))
            language = None
        elif behind := CLOSING_BEHIND.fullmatch(line):
            blocks.append((language, _dedented("\n".join([*lines, behind[1]]))))
            language = None
        else:
            lines.append(line)
    return [*blocks, (language, _dedented("\n".join(lines)))] if language is not None else blocks


def _dedented(text: str) -> str:
    """`dedent` empties lines of white space, which a text within a program may have."""
    return textwrap.dedent(text) if text.lstrip("\n")[:1] in (" ", "\t") else text
