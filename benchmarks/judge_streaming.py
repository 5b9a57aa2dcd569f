"""What judging beside sampling saves: the stages `sample` and `judge` of a round, one JSON line.

    python -m benchmarks.judge_streaming                           8 shards that take 1 s each to sample, 0.15 s a call
    python -m benchmarks.judge_streaming --sample 4 --latency 0.5  or --shards, --runs

A sampler that sleeps and an endpoint that answers after a fixed time stand in for the engines, so that the figures are
those of the loop. Each shard has 16 prompts with four completions: 192 calls of the judge `pairwise`, 32 at once.
`seconds` are of both stages, the medians of `--runs` alternating runs. `streamed` and `total` are the manifest's: seconds
of judging beside sampling, and of the stage after it. `ratio` is `seconds` with `judge.stream: false` over those with it.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.harness import command_line
from flows.api import open_run
from iterdpo.config import Config, parse_config
from iterdpo.run.rundir import read_manifest, write_jsonl
from iterdpo.stages.judge import judge
from iterdpo.stages.sample import sample
from iterdpo.testing import FakeSampler, build_tiny_checkpoint
from iterdpo.testing_http import FakeEndpoint

PROMPTS, K = 16, 4


def main(*, shards: int = 8, sample: float = 1.0, latency: float = 0.15, runs: int = 3) -> None:
    made: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    with (
        tempfile.TemporaryDirectory(prefix="judge-streaming-") as directory,
        FakeEndpoint(lambda body: "Verdict: A", latency=latency) as server,
    ):
        root = Path(directory)
        build_tiny_checkpoint(root / "model")
        write_jsonl(root / "prompts.jsonl", ({"prompt": f"Tale {i}"} for i in range(shards * PROMPTS + 1)))
        for number in range(runs):
            for stream in (True, False):
                made[stream].append(one_round(root, f"run-{number}-{stream}", server, shards, sample, stream))
    medians = {
        stream: {name: round(statistics.median(run[name] for run in of), 2) for name in of[0]}
        for stream, of in made.items()
    }
    line = {"shards": shards, "sample_s": sample, "latency_s": latency, "stream": medians[True]}
    ratio = round(medians[False]["seconds"] / medians[True]["seconds"], 3)
    print(json.dumps({**line, "no_stream": medians[False], "ratio": ratio}))


def one_round(
    root: Path, name: str, server: FakeEndpoint, shards: int, seconds: float, stream: bool
) -> dict[str, float]:
    endpoint = {"base_url": server.base_url, "concurrency": 32, "cache": "off"}
    args = {"model": "fake", "endpoint": endpoint, "constrain": "none"}

    def reply(ids: list[int], k: int) -> str:
        time.sleep(seconds / (PROMPTS * K))
        return f"completion {k} of {bytes(ids[-8:])!r}"

    values = {
        "run_dir": str(root / name),
        "rounds": 1,
        "model": {"path": str(root / "model")},
        "prompts": {"path": str(root / "prompts.jsonl"), "per_round": shards * PROMPTS, "heldout": 1},
        "sampling": {"n": K, "max_tokens": 64, "shard_size": PROMPTS},
        "judge": {"use": "pairwise", "args": args, "stream": stream},
    }
    with open_run(parse_config(Config, values), sampler=FakeSampler(reply)) as exp, exp.dir.lock():
        exp.prompt_ids(list(exp.prompts.of(1)))  # the tokenizer's imports are not measured
        policy = exp.initial
        began = time.perf_counter()
        streaming = exp.streaming_judge(1)
        completions = sample(exp, 1, policy, exp.prompts.of(1), streaming)
        judged = read_manifest(judge(exp, 1, completions, exp.train_judge, streaming).path)
        assert judged is not None
        return {"seconds": time.perf_counter() - began, **{k: judged.seconds[k] for k in ("streamed", "total")}}


if __name__ == "__main__":
    command_line(main, __doc__)
