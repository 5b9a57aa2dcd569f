"""What the stages cost beside the engine and the judge: sample, judge, pair and evaluate, with fakes for both.

    python -m benchmarks.plumbing                         # 100,000 and 1,000,000 prompts, K = 4, 128 tokens
    python -m benchmarks.plumbing --prompts 1000 10000    # --directory: where to work; --shard-size: prompts a shard

Each size runs in a process of its own. Printed for each: seconds to open the run the first time and again, and to plan
it (`--dry-run` without the tokenizer), completions a second through sample, judge and pair together, seconds of each
stage, and the highest resident memory. A tenth as many prompts are held out. The engine's fake hands out slices of
arrays made before; the judge's fake scores by the first token.
"""

from __future__ import annotations

import gc
import json
import random
import shutil
import tempfile
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import command_line, fresh, peak_mib
from iterdpo.judging.judge import JudgeBase
from iterdpo.run.rundir import write_jsonl
from iterdpo.sampling import SamplingParameters
from iterdpo.testing import FakeSampler, build_tiny_checkpoint
from iterdpo.types import Completion, CompletionGroup, Judgment

K, TOKENS, VOCABULARY = 4, 128, 250
WORDS = "the sea is wide and the sky was never so blue as on the day when nobody looked up"


class FastSampler(FakeSampler):
    """An engine that costs next to nothing: each completion is cut out of a long array at random."""

    def __init__(self) -> None:
        super().__init__(lambda ids, k: "")
        draw = random.Random(0)
        self.tokens = array("i", [draw.randrange(3, VOCABULARY) for _ in range(100_000)])
        self.logprobs = array("f", [-draw.random() for _ in range(100_000)])
        self.text = " ".join(draw.choices(WORDS.split(), k=20_000))

    def sample(
        self, prompt_ids: Sequence[list[int]], seeds: Sequence[int], parameters: SamplingParameters
    ) -> list[list[Completion]]:
        def completion(start: int) -> Completion:
            tokens, logprobs = self.tokens[start : start + TOKENS], self.logprobs[start : start + TOKENS]
            return Completion(self.text[start : start + 4 * TOKENS], tokens, logprobs, "stop")

        return [[completion((seed + 7919 * k) % 60_000) for k in range(parameters.n)] for seed in seeds]


class FirstToken(JudgeBase):
    name, version = "first_token", "1"

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        scores = ([completion.token_ids[0] / VOCABULARY for completion in g.completions] for g in groups)
        return [Judgment(g.prompt.id, own, [None] * len(own)) for g, own in zip(groups, scores, strict=True)]


def main(
    *, prompts: tuple[int, ...] = (100_000, 1_000_000), shard_size: int = 256, directory: Path | None = None
) -> None:
    rows = []
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        root = Path(scratch)
        fresh(build_tiny_checkpoint, root / "model")
        for count in prompts:
            numbers = range(count + count // 10)
            tales = ({"prompt": f"Tale {n}, of the sea and the sky:", "gold": str(n % 10)} for n in numbers)
            write_jsonl(root / "prompts.jsonl", tales)
            rows.append(fresh(measure, root, count, shard_size))
            print(json.dumps(rows[-1]), flush=True)
            shutil.rmtree(root / "run")
    print(f"\n{'':<24}" + "".join(f"{row['prompts']:>14,}" for row in rows))
    for name in rows[0]:
        print(f"{name:<24}" + "".join(f"{row[name]:>14,}" for row in rows))


def measure(root: Path, count: int, shard_size: int) -> dict[str, Any]:
    from iterdpo.config import Config, parse_config
    from iterdpo.judging.judge import NamedJudge
    from iterdpo.stages.evaluate import evaluate
    from iterdpo.stages.judge import judge
    from iterdpo.stages.pair import pair
    from iterdpo.stages.plan import first_pending
    from iterdpo.stages.runs import IterativeRun
    from iterdpo.stages.sample import sample

    values = {
        "run_dir": str(root / "run"),
        "rounds": 1,
        "model": {"path": str(root / "model")},
        "prompts": {"path": str(root / "prompts.jsonl"), "per_round": count, "heldout": count // 10},
        "sampling": {"n": K, "max_tokens": TOKENS, "shard_size": shard_size, "engine": {"max_model_len": 256}},
        "judge": {"use": "fake"},
        "evaluation": {"bootstrap_samples": 100},
    }
    figures: dict[str, Any] = {"prompts": count}

    def timed(name: str, work: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        made = work(*arguments)
        figures[name] = round(time.perf_counter() - began, 2)
        return made

    def open_run() -> IterativeRun:
        named = NamedJudge("train_judge", "fake", "1", FirstToken, stream=False)
        return IterativeRun(parse_config(Config, values), train_judge=named, sampler=FastSampler())

    (root / "run").mkdir()
    timed("open_s", open_run).dir.write_config(values)  # the run has begun: its prompts are kept
    gc.collect()  # a start opens one run: the peak is not to be of several
    open_run()
    gc.collect()
    with timed("open_again_s", open_run) as run:
        timed("plan_s", first_pending, run)
        timed("tokenizer_s", lambda: run.tokenizer)
        prompts, policy = run.prompts.of(1), run.initial
        completions = timed("sample_s", sample, run, 1, policy, prompts)
        judgments = timed("judge_s", judge, run, 1, completions, run.train_judge)
        pairs = timed("pair_s", pair, run, 1, completions, judgments)
        timed("evaluate_s", evaluate, run, 0, policy, {})
    stages = sum(figures[f"{name}_s"] for name in ("sample", "judge", "pair"))
    figures |= {"pairs": pairs.kept, "completions_per_second": round(completions.completions / stages)}
    return figures | {"peak_mib": round(peak_mib())}


if __name__ == "__main__":
    command_line(main, __doc__)
