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

import argparse
import asyncio
import contextlib
import functools
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from iterdpo.judging.run_judge import RunJudge

WORDS = [
    "the",
    "a",
    "of",
    "harbour",
    "lantern",
    "orchard",
    "glacier",
    "violin",
    "letter",
    "answer",
    "question",
    "clear",
]
CALLS_PER_PROMPT = 12
"""Of four completions, each two in both orders."""
TEXT = " ".join(random.Random(0).choices(WORDS, k=1200))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)  # what this script starts itself as
    parser.add_argument("--client", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--cache", default="off", help=argparse.SUPPRESS)
    parser.add_argument("--judge", metavar="DIRECTORY", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.latency)
    elif arguments.judge:
        judge_all(arguments.client, arguments.cache, arguments.calls, arguments.concurrency, Path(arguments.judge))
    elif arguments.client:
        call_all(arguments.client, arguments.cache, arguments.calls, arguments.concurrency)
    else:
        line: dict[str, Any] = {"calls": arguments.calls, "concurrency": arguments.concurrency}
        with tempfile.TemporaryDirectory(prefix="judge-throughput-") as directory:
            for name, cache in (("cached", str(Path(directory) / "calls.sqlite")), ("uncached", "off")):
                line[name] = measure(arguments, "--cache", cache)
            line["judged"] = measure(
                arguments, "--cache", str(Path(directory) / "judged.sqlite"), "--judge", str(Path(directory) / "judged")
            )
        print(json.dumps(line))


def measure(arguments: argparse.Namespace, *options: str) -> dict[str, float]:
    """The figures of one client against an endpoint of its own."""
    this = [sys.executable, "-m", "benchmarks.judge_throughput"]
    server = subprocess.Popen(
        [*this, "--serve", "--latency", str(arguments.latency)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    size = ["--calls", str(arguments.calls), "--concurrency", str(arguments.concurrency)]
    client = subprocess.run([*this, "--client", url, *options, *size], check=True, stdout=subprocess.PIPE, text=True)
    slept = json.loads(server.communicate()[0])  # closes its stdin, which ends it
    figures = json.loads(client.stdout)
    assert slept["requests"] == figures.pop("calls")
    limit = arguments.concurrency / (slept["slept"] / slept["requests"])
    rate = slept["requests"] / figures.pop("seconds")
    return {"rate": round(rate, 1), "limit": round(limit, 1), "share": round(rate / limit, 3), **figures}


def serve(latency: float) -> None:
    from iterdpo.testing_http import FakeEndpoint

    with FakeEndpoint(lambda body: "Verdict: A", latency=latency) as server:
        print(server.base_url, flush=True)
        sys.stdin.read()
        print(json.dumps({"requests": server.requests, "slept": server.slept}))


def call_all(url: str, cache: str, calls: int, concurrency: int) -> None:
    import aiohttp  # noqa: F401  (half a second that a stage pays once)

    from judges.llm.client import Client
    from judges.llm.concurrency import run_each
    from judges.llm.settings import Endpoint

    client = Client(Endpoint(base_url=url, concurrency=concurrency, cache=cache), model="fake")
    peaks: list[float] = []

    async def call(number: int) -> None:
        await client.chat(messages(number), max_tokens=8, temperature=0.0)
        if number + 1 in (1000, calls):
            peaks.append(peak())

    def jobs() -> Iterator[Callable[[], Awaitable[None]]]:
        for number in range(calls):
            yield functools.partial(call, number)

    async def run() -> None:
        async with client:
            async for _ in run_each(jobs(), concurrency=concurrency):
                pass

    timed(lambda: asyncio.run(run()), calls, peaks)


def judge_all(url: str, cache: str, calls: int, concurrency: int, directory: Path) -> None:
    import aiohttp  # noqa: F401

    from iterdpo.judging.judge import NamedJudge
    from iterdpo.judging.shards import judge_shards
    from iterdpo.testing import make_group
    from iterdpo.types import CompletionGroup, Judgment
    from judges import load_judge

    endpoint = {"base_url": url, "concurrency": concurrency, "cache": cache}
    judge = load_judge("pairwise", {"model": "fake", "endpoint": endpoint, "constrain": "none"})
    prompts, size, peaks, done = -(-calls // CALLS_PER_PROMPT), 64, [], 0
    directory.mkdir()

    def group(number: int) -> CompletionGroup:
        starts = (number % 5000, 5000 - number % 5000, (number * 7) % 5000, (number * 11) % 5000)
        return make_group(f"Tale {number}.", [f"{k} {TEXT[start : start + 650]}" for k, start in enumerate(starts)])

    def shards() -> Iterator[tuple[str, list[CompletionGroup]]]:
        for start in range(0, prompts, size):
            yield f"shard-{start:06d}", [group(n) for n in range(start, min(start + size, prompts))]

    def note(groups: Sequence[CompletionGroup], fresh: Sequence[Judgment]) -> None:
        nonlocal done
        done += CALLS_PER_PROMPT * len(fresh)
        if done >= 1000:
            peaks.append(peak())

    named = NamedJudge("train_judge", "pairwise", "1", lambda: judge, max_abstained=0.0)
    total = 4 * prompts
    timed(
        lambda: judge_shards(
            RunJudge(named, directory, lambda message: contextlib.nullcontext()),
            shards(),
            directory,
            total=total,
            on_shard=note,
        ),
        CALLS_PER_PROMPT * prompts,
        peaks,
    )


def timed(run: Callable[[], object], calls: int, peaks: list[float]) -> None:
    """Run it, and print its figures. `peaks` has the resident memory then, from 1,000 calls to the end."""
    began, busy = time.perf_counter(), time.process_time()
    run()
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    print(
        json.dumps(
            {
                "calls": calls,
                "seconds": seconds,
                "cpu_ms_per_call": round(1000 * busy / calls, 3),
                "rss_1000_mib": peaks[0],
                "rss_end_mib": peaks[-1],
            }
        )
    )


def peak() -> float:
    """Resident memory at its highest so far, in MiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def messages(number: int) -> list[dict[str, str]]:
    """About 1,500 characters: two completions of a prompt, to be compared. Cheap to make, so as not to be measured."""
    first, second = (TEXT[start : start + 650] for start in (number % 5000, 5000 - number % 5000))
    return [
        {"role": "system", "content": "You compare two completions of a prompt. Say [[A]] or [[B]], and nothing else."},
        {"role": "user", "content": f"Tale {number}.\n\n<first>\n{first}\n</first>\n\n<second>\n{second}\n</second>"},
    ]


if __name__ == "__main__":
    main()
