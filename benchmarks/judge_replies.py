"""Real replies of judges, read by iterdpo and by the benchmark that published them: one JSON line for each kind.

    python -m benchmarks.judge_replies --llmbar DIR --judgebench DIR --arena-hard DIR --mt-bench DIR [--show FILE]

The directories are checkouts: princeton-nlp/LLMBar (its evaluators' result.json, comparisons and ratings), ScalerLab/
JudgeBench and forks of it (outputs with `judge_name=arena_hard`, or with scores), lmarena/arena-hard-auto and forks of
it, and lm-sys/FastChat's (`model_judgment`). An option takes several. Of each kind, `count` replies are drawn by `seed`.

`recorded` are the replies of which the benchmark's own parser recorded a verdict or a score, `recall` the share of them
that we read. `differ` are those read as another, `ours_alone` those that only we read. All of these, and those that we
abstain on, go to `--show FILE`, a JSON line each: which parser is right, only a reader of the text can say.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import command_line
from judges.llm.parsing import Unclear
from judges.llm.parsing.scores import parse_scores
from judges.llm.parsing.verdict import parse_verdict

Said = tuple[str, str, Any]
"""Where it was said, the reply, and what the benchmark read in it: "first", "second", "tie", a number, or None."""
PREFERS = {"1": "first", "2": "second", "A>B": "first", "A>>B": "first", "B>A": "second", "B>>A": "second"}
PREFERS |= {"A<B": "second", "A<<B": "second", "B<A": "first", "B<<A": "first", "A=B": "tie", "B=A": "tie"}


def main(
    *,
    llmbar: list[Path] | None = None,
    judgebench: list[Path] | None = None,
    arena_hard: list[Path] | None = None,
    mt_bench: list[Path] | None = None,
    count: int = 2_000,
    seed: int = 0,
    show: Path | None = None,
) -> None:
    kinds: list[tuple[str, list[Path] | None, Callable[[Path], Iterator[Said]], Callable[[str], Any]]] = [
        ("LLMBar", llmbar, _llmbar, _untied),
        ("LLMBar, ratings", llmbar, _llmbar_ratings, _score(0, 9)),
        ("JudgeBench", judgebench, _judgebench, parse_verdict),
        ("JudgeBench, scores", judgebench, _judgebench_scores, _score(0, 1)),
        ("Arena-Hard", arena_hard, _arena_hard, parse_verdict),
        ("MT-bench, pairs", mt_bench, _mt_bench_pairs, parse_verdict),
        ("MT-bench, scores", mt_bench, _mt_bench_scores, _score(1, 10)),
    ]
    shown = []
    for kind, roots, rows, parse in kinds:
        every = [said for root in sorted(roots or []) for said in rows(root)]
        drawn = random.Random(seed).sample(every, min(count, len(every)))
        if drawn:
            said = [(where, reply, recorded, parse(reply)) for where, reply, recorded in drawn]
            print(json.dumps({"kind": kind, "replies": len(every), **_figures(said)}), flush=True)
            keys = ("kind", "where", "reply", "recorded", "ours")
            shown += [dict(zip(keys, (kind, *row), strict=True)) for row in said if row[2] != row[3]]
    if show is not None:
        show.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in shown), encoding="utf-8")


def _figures(said: list[tuple[str, str, Any, Any]]) -> dict[str, Any]:
    recorded = [(ours, theirs) for _, _, theirs, ours in said if theirs is not None]
    read = [(ours, theirs) for ours, theirs in recorded if not isinstance(ours, Unclear)]
    return {
        "drawn": len(said),
        "recorded": len(recorded),
        "recall": round(len(read) / max(1, len(recorded)), 4),
        "differ": sum(ours != theirs for ours, theirs in read),
        "ours_alone": sum(theirs is None and not isinstance(ours, Unclear) for _, _, theirs, ours in said),
        "abstained": dict(Counter(str(ours) for *_, ours in said if isinstance(ours, Unclear)).most_common()),
    }


def _untied(reply: str) -> Any:
    """The verdict, as `pairwise` with `ties: false` takes it: LLMBar's prompts offer no tie."""
    return Unclear("a tie, which was not offered") if (verdict := parse_verdict(reply)) == "tie" else verdict


def _score(low: float, high: float) -> Callable[[str], Any]:
    def read(reply: str) -> Any:
        scores = parse_scores(reply, ["score"], low=low, high=high)
        return scores if isinstance(scores, Unclear) else scores["score"]

    return read


def _results(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted(root.rglob("evaluators/*/*/result.json")):
        for n, row in enumerate(json.loads(file.read_text())):
            yield f"{file.relative_to(root)}:{n}", row["results"]


def _llmbar(root: Path) -> Iterator[Said]:
    turned = {"1": "2", "2": "1", None: None}
    for where, results in _results(root):
        for result in results:
            for swap in ("swap = False", "swap = True") if isinstance(result, dict) else ():
                if "completion" in result[swap]:
                    winner = result[swap]["winner"]
                    shown = turned[winner] if swap == "swap = True" else winner
                    yield f"{where} {swap}", result[swap]["completion"][0], PREFERS.get(shown or "")


def _llmbar_ratings(root: Path) -> Iterator[Said]:
    for where, results in _results(root):
        for result in results:
            for key in ("score_1", "score_2") if isinstance(result, dict) and "score_1" in result else ():
                reply = result[key][0]
                yield f"{where} {key}", reply, float(reply) if reply.strip().isdecimal() else None


def _lines(root: Path, files: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted(root.rglob(files)):
        for n, line in enumerate(file.read_text().splitlines(), 1):
            yield f"{file.relative_to(root)}:{n}", json.loads(line)


def _judgebench(root: Path) -> Iterator[Said]:
    for where, row in _lines(root, "outputs/*judge_name=arena_hard*.jsonl"):
        for said in row["judgments"]:
            yield where, said["judgment"]["response"], PREFERS.get(said["decision"] or "")


def _judgebench_scores(root: Path) -> Iterator[Said]:
    for where, row in _lines(root, "outputs/*rubric*.jsonl"):
        for said in (judged["judgment"] for judged in row["judgments"]):
            yield from ((f"{where} {side}", said[f"raw_judge_{side}"], said[f"score_{side}"]) for side in "AB")


def _arena_hard(root: Path) -> Iterator[Said]:
    for where, row in _lines(root, "model_judgment/**/*.jsonl"):
        for said in row.get("games", ()):
            if "judgment" in said:
                yield where, said["judgment"], PREFERS.get(said["score"] or "")


def _mt_bench_pairs(root: Path) -> Iterator[Said]:
    for where, row in _lines(root, "model_judgment/*_pair.jsonl"):
        winners = {"g1": ("model_1", "model_2"), "g2": ("model_2", "model_1")}
        for game, (first, second) in winners.items():
            recorded = {first: "first", second: "second", "tie": "tie"}.get(row[f"{game}_winner"])
            yield f"{where} {game}", row[f"{game}_judgment"], recorded


def _mt_bench_scores(root: Path) -> Iterator[Said]:
    for where, row in _lines(root, "model_judgment/*_single*.jsonl"):
        yield where, row["judgment"], row["score"] if row["score"] >= 0 else None


if __name__ == "__main__":
    command_line(main, __doc__)
