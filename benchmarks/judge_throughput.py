"""How much of an endpoint's rate the LLM judges reach, and whether their memory grows: one JSON line.

    python -m benchmarks.judge_throughput                      10,000 calls, 32 at once, an endpoint that answers in 50 ms
    python -m benchmarks.judge_throughput --concurrency 64     or --calls, --latency

The endpoint (iterdpo.testing_http) and each measured client are processes of their own. `limit` is the rate that the
concurrency allows, calls a second: concurrency / seconds that the endpoint slept for a call, as it measured them.
`share` is rate / limit. `rss_1000_mib` and `rss_end_mib` are the client's peak resident memory after 1,000 calls and
after all. `cached` writes every reply to a new cache file, `uncached` has none. These two are the client alone. `judged`
is a stage of the judge `pairwise`, with a cache: prompts are rendered, replies parsed, every two of four completions
compared in both orders, and judgments written shard by shard (64 prompts).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.harness import command_line, fresh, peak_mib
from iterdpo.judging.judge import RunJudge

WORDS = "the a of harbour lantern orchard glacier violin letter answer question clear"
CALLS_PER_PROMPT = 12
"""Of four completions, each two in both orders."""
TEXT = " ".join(random.Random(0).choices(WORDS.split(), k=1200))


def main(*, calls: int = 10_000, concurrency: int = 32, latency: float = 0.05) -> None:
    line: dict[str, Any] = {"calls": calls, "concurrency": concurrency}
    with tempfile.TemporaryDirectory(prefix="judge-throughput-") as directory:
        for name, client, cache in (
            ("cached", call_all, f"{directory}/calls.sqlite"),
            ("uncached", call_all, "off"),
            ("judged", judge_all, f"{directory}/judged.sqlite"),
        ):
            line[name] = measure(client, cache, calls, concurrency, latency)
    print(json.dumps(line))


def measure(client: Callable[..., Any], cache: str, calls: int, concurrency: int, latency: float) -> dict[str, float]:
    """The figures of one client against an endpoint of its own."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=serve, args=(latency, theirs), daemon=True).start()
    endpoint = {"base_url": ours.recv(), "concurrency": concurrency, "cache": cache}
    figures = fresh(client, endpoint, calls)
    ours.send("end")
    requests, slept = ours.recv()
    assert requests == figures.pop("calls")
    limit = concurrency / (slept / requests)
    rate = requests / figures.pop("seconds")
    return {"rate": round(rate, 1), "limit": round(limit, 1), "share": round(rate / limit, 3), **figures}


def serve(latency: float, pipe: Connection) -> None:
    from iterdpo.testing_http import FakeEndpoint

    with FakeEndpoint(lambda body: "Verdict: A", latency=latency) as server:
        pipe.send(server.base_url)
        pipe.recv()
        pipe.send((server.requests, server.slept))


def call_all(endpoint: dict[str, Any], calls: int) -> dict[str, float]:
    import aiohttp  # noqa: F401  (half a second that a stage pays once)

    from judges.llm.client import Client
    from judges.llm.settings import Endpoint
    from judges.llm.transport import run_each

    client = Client(Endpoint(**endpoint), model="fake")
    peaks: list[float] = []

    async def call(number: int) -> None:
        await client.chat(messages(number), max_tokens=8, temperature=0.0)
        if number + 1 in (1000, calls):
            peaks.append(peak_mib())

    async def run() -> None:
        async with client:
            jobs = (functools.partial(call, number) for number in range(calls))
            async for _ in run_each(jobs, concurrency=endpoint["concurrency"]):
                pass

    return timed(lambda: asyncio.run(run()), calls, peaks)


def judge_all(endpoint: dict[str, Any], calls: int) -> dict[str, float]:
    import aiohttp  # noqa: F401

    from iterdpo.judging.judge import NamedJudge
    from iterdpo.judging.shards import judge_shards
    from iterdpo.testing import make_group
    from iterdpo.types import CompletionGroup, Judgment
    from judges import load_judge

    judge = load_judge("pairwise", {"model": "fake", "endpoint": endpoint, "constrain": "none"})
    prompts, size, peaks, done = -(-calls // CALLS_PER_PROMPT), 64, [], 0

    def group(number: int) -> CompletionGroup:
        starts = (number % 5000, 5000 - number % 5000, (number * 7) % 5000, (number * 11) % 5000)
        return make_group(f"Tale {number}.", [f"{k} {TEXT[start : start + 650]}" for k, start in enumerate(starts)])

    def note(groups: Sequence[CompletionGroup], judged: Sequence[Judgment]) -> None:
        nonlocal done
        done += CALLS_PER_PROMPT * len(judged)
        if done >= 1000:
            peaks.append(peak_mib())

    shards = (
        (f"shard-{start:06d}", [group(number) for number in range(start, min(start + size, prompts))])
        for start in range(0, prompts, size)
    )
    named = NamedJudge("train_judge", "pairwise", "1", lambda: judge, max_abstained=0.0)
    with tempfile.TemporaryDirectory() as directory:
        run_judge = RunJudge(named, Path(directory), lambda message: contextlib.nullcontext())
        place, total = Path(directory), 4 * prompts
        stage = functools.partial(judge_shards, run_judge, shards, place, total=total, on_shard=note)
        return timed(stage, CALLS_PER_PROMPT * prompts, peaks)


def timed(run: Callable[[], object], calls: int, peaks: list[float]) -> dict[str, float]:
    """Run it; its figures. `peaks` has the resident memory then, from 1,000 calls to the end."""
    began, busy = time.perf_counter(), time.process_time()
    run()
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    memory = {"rss_1000_mib": round(peaks[0], 1), "rss_end_mib": round(peaks[-1], 1)}
    return {"calls": calls, "seconds": seconds, "cpu_ms_per_call": round(1000 * busy / calls, 3), **memory}


def messages(number: int) -> list[dict[str, str]]:
    """About 1,500 characters: two completions of a prompt, to be compared. Cheap to make, so as not to be measured."""
    first, second = (TEXT[start : start + 650] for start in (number % 5000, 5000 - number % 5000))
    return [
        {"role": "system", "content": "You compare two completions of a prompt. Say [[A]] or [[B]], and nothing else."},
        {"role": "user", "content": f"Tale {number}.\n\n<first>\n{first}\n</first>\n\n<second>\n{second}\n</second>"},
    ]


if __name__ == "__main__":
    command_line(main, __doc__)
