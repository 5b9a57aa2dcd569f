"""A pool of engines on one queue: real threads, pretended engines that die, hang and are slow as the test says."""

from __future__ import annotations

import heapq
import random
import threading
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from iterdpo.errors import ChildFailed
from iterdpo.sampling.base import Batch, Sampler, SamplingParameters
from iterdpo.sampling.pool import Deal, Job, Pool
from iterdpo.testing import make_completion
from iterdpo.types import Completion

pytestmark = pytest.mark.timeout(60)

PARAMETERS = SamplingParameters(n=2)
POLICY = (Path("policy"), "digest")


def batches(count: int, size: int = 2) -> list[Batch]:
    return [([[number, i] for i in range(size)], [number] * size) for number in range(count)]


def completions(batch: Batch) -> list[list[Completion]]:
    return [[make_completion(f"{ids} {seed} {k}") for k in range(2)] for ids, seed in zip(*batch, strict=True)]


class Engine(Sampler):
    """Samples what the batch says. `dies` are the batches with which it dies, once each; `together` how many it takes."""

    def __init__(self, *dies: int, together: int = 1, starts: int = 100) -> None:
        self.dies, self.together, self.starts = list(dies), together, starts
        self.loaded: str | None = None
        self.sampled: list[int] = []
        self.closed = threading.Event()

    def load(self, policy: Path, digest: str) -> None:
        if self.loaded is None:
            if not self.starts:
                raise ChildFailed("it does not start")
            self.starts -= 1
        self.closed.clear()
        self.loaded = digest

    def sample(
        self, prompt_ids: Sequence[list[int]], seeds: Sequence[int], parameters: SamplingParameters
    ) -> list[list[Completion]]:
        assert self.loaded is not None
        number = prompt_ids[0][0]
        if number in self.dies:
            self.dies.remove(number)
            self.close()
            raise ChildFailed(f"it died with {number}")
        self.sampled.append(number)
        return completions((list(prompt_ids), list(seeds)))

    def sample_batches(
        self, batches: Iterable[Batch], parameters: SamplingParameters
    ) -> Generator[list[list[Completion]]]:
        source, flying = iter(batches), list[Batch]()
        while True:
            while len(flying) < self.together and (batch := next(source, None)) is not None:
                flying.append(batch)
            if not flying:
                return
            yield self.sample(*flying.pop(0), parameters)

    def release(self) -> None:
        pass

    def close(self) -> None:
        self.loaded = None
        self.closed.set()


def pool_of(*engines: Engine, restarts: int = 2) -> tuple[Pool, list[str]]:
    said: list[str] = []
    pool = Pool(engines, restarts=restarts, say=said.append)
    pool.load(*POLICY)
    return pool, said


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("engines", [1, 2, 5])
def test_the_results_are_in_order_and_the_same_for_any_number_of_engines(engines: int, together: int) -> None:
    pool, said = pool_of(*(Engine(together=together) for _ in range(engines)))
    assert list(pool.sample_batches(iter(batches(20)), PARAMETERS)) == [completions(batch) for batch in batches(20)]
    assert list(pool.sample_batches([], PARAMETERS)) == []
    assert pool.sample([[7, 1]], [3], PARAMETERS) == completions(([[7, 1]], [3]))
    assert said == []


@pytest.mark.parametrize("together", [1, 4])
def test_the_batches_of_an_engine_that_dies_are_sampled_by_another_or_by_it_again(together: int) -> None:
    engines = [Engine(2, 5, 11, together=together) for _ in range(3)]
    pool, said = pool_of(*engines, restarts=20)
    assert list(pool.sample_batches(batches(20), PARAMETERS)) == [completions(batch) for batch in batches(20)]
    assert Counter(number for engine in engines for number in engine.sampled) == Counter(range(20))
    deaths = 9 - sum(len(engine.dies) for engine in engines)
    assert 3 <= deaths == len(said)
    assert all("prompts are dealt again: it died with" in line for line in said)
    assert all(engine.loaded for engine in engines)


def test_a_batch_that_every_engine_dies_with_ends_the_stage_with_the_reason() -> None:
    pool, _ = pool_of(Engine(*[3] * 9), Engine(*[3] * 9))
    with pytest.raises(ChildFailed, match="it died with 3"):
        list(pool.sample_batches(batches(20), PARAMETERS))


def test_an_engine_that_cannot_be_started_again_is_given_up_and_the_others_go_on() -> None:
    class Second(Engine):
        def sample(self, *given: Any) -> list[list[Completion]]:
            assert first.closed.wait(30)
            return super().sample(*given)

    first, second = Engine(*range(20), starts=1), Second()
    pool, said = pool_of(first, second)
    assert list(pool.sample_batches(batches(20), PARAMETERS)) == [completions(batch) for batch in batches(20)]
    assert len(second.sampled) == 20
    assert sum("starting an engine again" in line for line in said) <= 2
    pool.load(*POLICY)  # each stage tries again
    assert "going on with 1 of 2 engines: it does not start" in said[-1]
    assert list(pool.sample_batches(batches(3), PARAMETERS)) == [completions(batch) for batch in batches(3)]


def test_the_loss_of_all_engines_ends_the_stage() -> None:
    pool, _ = pool_of(Engine(*range(20), starts=1), Engine(*range(20), starts=1), restarts=3)
    with pytest.raises(ChildFailed, match="it does not start"):
        list(pool.sample_batches(batches(20), PARAMETERS))


def test_an_engine_that_died_between_two_stages_is_started_again() -> None:
    class Mortal(Engine):
        """Its process is gone at the second load."""

        def load(self, policy: Path, digest: str) -> None:
            if digest == "second" and self.loaded == "digest":
                self.close()
                raise ChildFailed("it died meanwhile")
            super().load(policy, digest)

    pool, said = pool_of(Mortal())
    assert list(pool.sample_batches(batches(3), PARAMETERS)) == [completions(batch) for batch in batches(3)]
    pool.load(Path("policy"), "second")
    assert said == ["starting an engine again: it died meanwhile"]


@pytest.mark.parametrize("order", [1, -1])
def test_an_interruption_while_engines_start_closes_them(order: int) -> None:
    class Starting(Engine):
        def load(self, policy: Path, digest: str) -> None:
            ended.append(self.closed.wait(10))
            raise ChildFailed("closed")

    class Interrupted(Engine):
        def load(self, policy: Path, digest: str) -> None:
            raise KeyboardInterrupt

    ended = list[bool]()
    with pytest.raises(KeyboardInterrupt):
        Pool([Starting(), Interrupted()][::order]).load(*POLICY)
    assert ended == [True]


def test_engines_that_never_start_are_tried_once_and_the_reason_is_raised() -> None:
    engines = [Engine(starts=0), Engine(starts=0)]
    with pytest.raises(ChildFailed, match="it does not start"):
        Pool(engines).load(*POLICY)


def test_an_error_of_the_batches_source_is_raised_to_the_caller() -> None:
    def source() -> Iterator[Batch]:
        yield from batches(3)
        raise ValueError("row 4")

    pool, _ = pool_of(Engine(), Engine())
    with pytest.raises(ValueError, match="row 4"):
        list(pool.sample_batches(source(), PARAMETERS))


def test_a_bug_in_an_engine_is_raised_and_nothing_is_tried_again() -> None:
    class Broken(Engine):
        def sample(self, *given: object) -> list[list[Completion]]:
            raise TypeError("a bug")

    pool, said = pool_of(Broken())
    with pytest.raises(TypeError, match="a bug"):
        list(pool.sample_batches(batches(3), PARAMETERS))
    assert said == []


def test_a_caller_who_stops_early_closes_the_engines_that_are_at_work() -> None:
    class Slow(Engine):
        """Its batch 1 takes until it is closed."""

        def sample(self, prompt_ids: Sequence[list[int]], *more: object) -> list[list[Completion]]:
            if prompt_ids[0][0] != 1:
                return super().sample(prompt_ids, *more)  # type: ignore[arg-type]
            assert self.closed.wait(30)
            raise ChildFailed("closed")

    engines = [Slow(), Slow()]
    pool, said = pool_of(*engines)
    sampled = pool.sample_batches(batches(40), PARAMETERS)
    assert next(sampled) == completions(batches(1)[0])
    sampled.close()
    assert sorted(engine.loaded is None for engine in engines) == [False, True]
    assert said == []


def test_a_caller_who_stops_early_also_closes_an_engine_that_is_only_starting() -> None:
    class Starting(Engine):
        """Dies with batch 1; its new process begins when it has been closed once."""

        def load(self, *policy: Any) -> None:
            if self.sampled:
                self.start()
            super().load(*policy)

        def start(self) -> None:
            starting.set()
            assert self.closed.wait(10)
            self.closed.clear()
            ended.append(self.closed.wait(10))
            raise ChildFailed("closed")

        def sample(self, prompt_ids: Sequence[list[int]], *more: object) -> list[list[Completion]]:
            if prompt_ids[0][0] == 1:
                raise ChildFailed("it died")
            return super().sample(prompt_ids, *more)  # type: ignore[arg-type]

    starting, ended = threading.Event(), list[bool]()
    pool, _ = pool_of(Starting())
    sampled = pool.sample_batches(batches(40), PARAMETERS)
    assert next(sampled) == completions(batches(1)[0])
    assert starting.wait(20)
    sampled.close()
    assert ended == [True]


def test_what_waits_in_memory_is_bounded_if_the_first_batch_is_late() -> None:
    deal, taken = Deal(most=4), 0
    while deal.hungry():
        deal.add(batches(1)[0])
    first = deal.take(0)
    assert first is not None
    while taken < 1000 and (job := deal.take(1)) is not None:
        taken += 1
        deal.put(job, [])
        while deal.hungry():
            deal.add(batches(1)[0])
    assert taken < 30
    deal.put(first, [])
    assert deal.next_result() == []
    assert sum(deal.next_result() is not None for _ in range(taken)) == taken
    assert deal.hungry()


def test_engines_that_take_many_batches_at_once_have_about_as_many() -> None:
    deal = Deal(most=64)
    for batch in [*batches(32), None]:
        deal.add(batch)
    for engine in range(4):
        first = deal.take(engine)
        assert first is not None
    while any(deal.take(0) for _ in range(100)) or any(deal.take(engine) for engine in range(4)):
        pass
    assert max(deal.held.values()) - min(deal.held.values()) <= 2
    assert sum(deal.held.values()) == 32
    deal.give_back(1, [])  # one that died does not hold the others back
    deal.ended = False
    for batch in batches(8):
        deal.add(batch)
    while any(deal.take(engine) for engine in (0, 2, 3)):
        pass
    assert not deal.waiting


def simulate(*, engines: int, shards: int, seed: int, lifetime: float = float("inf"), nodes: int = 4) -> float:
    """The share of the time that engines work, if their shards take 1 to 3 seconds and they die at random.

    A death is a node's in one of ten cases, which takes all of its engines. They are back after 20 seconds.
    """
    draw, deal = random.Random(seed), Deal(engines)
    source, given = iter(batches(shards, size=1)), 0
    events: list[tuple[float, int, int, int]] = []  # time, tie-breaker, engine, its life
    at_work: dict[int, Job] = {}
    life, back, busy, now, ends = [0] * engines, [0.0] * engines, 0.0, 0.0, 0.0
    began: dict[int, float] = {}
    death = draw.expovariate(1 / lifetime) if lifetime < float("inf") else lifetime
    ticks = 0
    while not deal.over() or given < shards:
        while deal.hungry():
            deal.add(next(source, None))
        for engine in range(engines):
            if engine not in at_work and back[engine] <= now and (job := deal.take(engine)) is not None:
                at_work[engine], began[engine], ticks = job, now, ticks + 1
                heapq.heappush(events, (now + draw.uniform(1, 3), ticks, engine, life[engine]))
        while (groups := deal.next_result()) is not None:
            assert groups == [[given]]  # in order, none lost, none twice
            given += 1
        if given == shards:
            break
        soonest = events[0][0] if events else float("inf")
        waking = min((b for b in back if b > now), default=float("inf"))
        now = min(soonest, death, waking)
        if now == death:
            first = draw.randrange(engines)
            size = engines // nodes
            dead = range(first - first % size, first - first % size + size) if draw.random() < 0.1 else [first]
            for engine in dead:
                life[engine] += 1
                back[engine] = now + 20
                if engine in at_work:
                    deal.give_back(engine, [at_work.pop(engine)])
            death = now + draw.expovariate(1 / lifetime)
        elif now == soonest:
            _, _, engine, lived = heapq.heappop(events)
            if lived == life[engine]:
                job = at_work.pop(engine)
                busy, ends = busy + now - began[engine], now
                deal.put(job, [[job.number]])  # type: ignore[list-item]
    return busy / (engines * ends)


def test_64_engines_without_failures_work_more_than_95_percent_of_the_time() -> None:
    assert simulate(engines=64, shards=6400, seed=0) > 0.95


@pytest.mark.parametrize("seed", range(8))
def test_of_64_engines_on_4_nodes_that_die_at_random_no_shard_is_lost_or_given_twice(seed: int) -> None:
    assert 0.2 < simulate(engines=64, shards=1500, seed=seed, lifetime=1.0) < 0.95


@pytest.mark.parametrize("seed", range(5))
def test_64_threads_whose_engines_die_at_random_give_each_batch_once(seed: int) -> None:
    draw = random.Random(seed)
    engines = [Engine(*draw.choices(range(300), k=4), together=draw.choice([1, 3])) for _ in range(64)]
    pool, _ = pool_of(*engines, restarts=1000)
    assert list(pool.sample_batches(batches(300), PARAMETERS)) == [completions(batch) for batch in batches(300)]
    assert Counter(number for engine in engines for number in engine.sampled) == Counter(range(300))
