"""`iterdpo show`: completions of a run as a person reads them, with their scores."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from iterdpo.errors import UserError
from iterdpo.escape import printable
from iterdpo.run.read import read_run

JUDGES = {"score": "score", "train_judge": "training judge", "heldout_judge": "held-out judge"}


def show_completions(
    run_dir: str | Path, *, round: int, prompt: str | None = None, heldout: bool = False, limit: int = 5
) -> Iterator[str]:
    """The prompts of `round` with their completions, as text: `limit` of them at most.

    Args:
        run_dir: the run's directory.
        round: the round that sampled them.
        prompt: a prompt's id or the beginning of one, or words that its text contains; all prompts by default.
        heldout: the completions of the round's evaluation instead of those that it trained on.
        limit: prompts to show.

    Raises:
        UserError: no such run or round, or no such prompt in it.
    """
    run = read_run(run_dir)
    rows = run.evaluation_rows(round) if heldout else run.completion_rows(round)
    shown = 0
    for prompt_id, group in groupby(rows, key=lambda row: row["prompt_id"]):
        completions = list(group)
        if prompt and not (prompt_id.startswith(prompt) or prompt in completions[0]["prompt"]):
            continue
        yield f"{prompt_id}\n{_block(completions[0]['prompt'], '  ')}\n"
        yield from map(_completion, completions)
        shown += 1
        if shown == limit:
            return
    if not shown:
        raise UserError(f"{run.root}: round {round} has no prompt {prompt!r}; give its id, or words of its text")


def _completion(row: dict[str, Any]) -> str:
    head = f"  [{row['k']}] {row['tokens']} tokens, {row['finish_reason']}"
    thought = row["reasoning"] if "reasoning_tokens" in row else None  # else a column of the prompt file
    if thought:
        head += f", {row['reasoning_tokens']} tokens of reasoning"
    for key, name in JUDGES.items():
        reason = row.get("abstention" if key == "score" else f"{key}_abstention")
        if reason:
            head += f", {name}: abstained ({printable(reason)})"
        elif row.get(key) is not None:
            head += f", {name} {row[key]:.4g}"
    reasoning = f"{_block(thought.rstrip(), '      | ')}\n" if thought else ""
    return f"{head}\n{reasoning}{_block(row['text'], '      ')}\n"


def _block(text: str, indent: str) -> str:
    """Untrusted text for a terminal: indented, without control characters."""
    return textwrap.indent("\n".join(printable(line) for line in text.split("\n")), indent, lambda line: True)
