"""The sampler that talks to a vLLM worker process."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from iterdpo.config import SUPERVISED, EngineConfig, SupervisionConfig
from iterdpo.errors import ChildFailed
from iterdpo.run.devices import visible_gpus
from iterdpo.run.worker import Done, JsonLinesWorker
from iterdpo.sampling.base import (
    Batch,
    Enqueue,
    Finish,
    Load,
    Release,
    Released,
    Sample,
    Sampler,
    SamplingParameters,
    Start,
    Started,
)
from iterdpo.types import Completion

R = TypeVar("R")
OWN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"


class WorkerProcess(Protocol):
    """`JsonLinesWorker`, or one on another machine."""

    def call(self, request: Any, read: Callable[..., R], *, silence: float | None = None) -> R: ...

    def close(self) -> None: ...


class VLLMSampler(Sampler):
    """A vLLM engine in a worker process (see `worker.py`) that is started at the first `load`.

    It lives through the run: each `load` puts new weights, or a LoRA adapter, into the running engine. The worker dies
    with this process. `load` and `sample` raise ChildFailed if the engine does not start, does not take the weights, or
    dies.

    Args:
        max_model_len: gives the longest prompt and completion together, in tokens; called when the engine is built.
        log: file for everything that vLLM prints.
        engine: its other settings.
        adapter_rank: rank of the adapters that will be loaded. None: the engine is built without room for adapters,
            and an adapter is merged into its base.
        reproducible: sample the same on a GPU too, batch by batch.
        say: called with a note for the user.
        reserved: descriptors of `devices.Turns`, open while the worker lives.
        variables: more of its environment, such as those of `engine_share`.
        supervision: when it counts as hung.
        base: the policy that an engine for the given one starts with. Its configuration and end of text are the engine's.
    """

    MODULE = "iterdpo.sampling.worker"

    def __init__(
        self,
        *,
        max_model_len: Callable[[], int],
        log: Path,
        engine: EngineConfig,
        adapter_rank: int | None = None,
        trust_remote_code: bool = False,
        reproducible: bool = False,
        reserved: Sequence[int] = (),
        variables: Mapping[str, str] = MappingProxyType({}),
        supervision: SupervisionConfig = SUPERVISED,
        say: Callable[[str], None] = lambda text: None,
        base: Callable[[Path], Path] = lambda policy: policy,
    ) -> None:
        self._base = base
        self.log, self._say, self._reserved, self._supervision = log, say, reserved, supervision
        self._lora, self._adapter_rank = engine.lora, adapter_rank
        self._engine, self._max_model_len, self._trust_remote_code = engine, max_model_len, trust_remote_code
        on_gpu = bool(visible_gpus())
        own = "1" if engine.tensor_parallel_size > 1 or (on_gpu and not reproducible) else "0"
        self._env = {
            "VLLM_CONFIGURE_LOGGING": "1",
            **os.environ,
            # On a CPU the engine is in the worker's process, which starts sooner. On a GPU it has its own, as vLLM has
            # it by default: the next decoding step does not wait until the last one's completions are put together.
            OWN_PROCESS: os.environ.get(OWN_PROCESS) or own,
            **({"VLLM_BATCH_INVARIANT": "1"} if on_gpu and reproducible else {}),
            "VLLM_CPU_KVCACHE_SPACE": f"{engine.kv_cache_gib}",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONUNBUFFERED": "1",
            **variables,
        }
        self._reproducible = reproducible
        self._worker: WorkerProcess | None = None
        self._loaded: str | None = None
        self._asleep = False
        self._in_flight = 0

    def warm_up(self) -> None:
        """Start the worker and let it import vLLM, without waiting for it: seconds that other work can hide."""
        if self._worker is None:
            self._worker = self._new_worker()

    def _new_worker(self) -> WorkerProcess:
        return JsonLinesWorker(self.MODULE, name="sampler", log=self.log, env=self._env, reserved=self._reserved)

    def load(self, policy: Path, digest: str) -> None:
        self.warm_up()
        if self._loaded is None:
            self._start_engine(base := self._base(policy))
            if base != policy:
                self._call(Load(str(policy), reload=True), Done)
        elif self._loaded != digest or self._asleep:
            self._call(Load(str(policy), reload=self._loaded != digest), Done)
        self._loaded, self._asleep = digest, False

    def sample(
        self, prompt_ids: Sequence[list[int]], seeds: Sequence[int], parameters: SamplingParameters
    ) -> list[list[Completion]]:
        self._check_awake()
        return self._call(Sample(list(prompt_ids), list(seeds), parameters), _groups)

    def sample_batches(
        self, batches: Iterable[Batch], parameters: SamplingParameters
    ) -> Generator[list[list[Completion]]]:
        """On a GPU, many batches are in flight, without seeds, and the engine works on while the caller has one of them.

        A seed would cost a launch for each token (vLLM draws each seeded request's by itself), and one batch at a time
        leaves the GPU idle until its slowest completion ends. If the caller stops early, the worker is closed.
        """
        self._check_awake()
        if not self._in_flight:
            yield from super().sample_batches(batches, parameters)
            return
        batches, flying = iter(batches), deque[int]()

        def finish(fresh: list[Enqueue]) -> list[list[Completion]]:
            for request in fresh:
                self._call(request, Done)
            return self._call(Finish(), _groups)

        def more() -> list[Enqueue]:
            fresh = []
            while sum(flying) < self._in_flight and (batch := next(batches, None)) is not None:
                fresh.append(Enqueue(batch[0], list(map(parameters.temperature_of, batch[1])), parameters))
                flying.append(len(batch[0]) * parameters.n)
            return fresh

        with ThreadPoolExecutor(1) as thread:
            try:
                working = thread.submit(finish, fresh) if (fresh := more()) else None
                while working is not None:
                    groups = working.result()
                    flying.popleft()
                    fresh = more()
                    working = thread.submit(finish, fresh) if flying else None
                    yield groups
            except BaseException:
                self.close()  # what is in flight is nobody's
                raise

    def _check_awake(self) -> None:
        assert self._loaded is not None, "load a policy first"
        assert not self._asleep, "load wakes the engine up"

    def release(self) -> None:
        if self._loaded is not None and not self._asleep:
            self._asleep = self._call(Release(), Released).asleep

    def close(self) -> None:
        worker, self._worker, self._loaded, self._asleep = self._worker, None, None, False
        if worker is not None:
            worker.close()

    def _start_engine(self, policy: Path) -> None:
        scratch = str(self.log.absolute().parent / f".merged-{self.log.stem}")
        model = (self._max_model_len(), self._trust_remote_code, self._lora, self._adapter_rank)
        start = Start(str(policy), self._engine, *model, scratch, self._reproducible)
        started = self._call(start, Started)
        self._in_flight = started.in_flight
        if (reason := started.no_adapters) is not None:
            self._say(f"vLLM does not start with room for adapters; they are merged instead ({reason.splitlines()[0]})")
            self._lora = "merge"
            self.close()  # the engine that failed left things behind in its process
            self.warm_up()
            self._start_engine(policy)

    def _call(self, request: Any, read: Callable[..., R]) -> R:
        if (worker := self._worker) is None:  # another thread has closed it
            raise ChildFailed("the sampler is closed")
        works = isinstance(request, Sample | Finish)
        silence = self._supervision.silence if works else self._supervision.start
        try:
            return worker.call(request, read, silence=silence)
        except ChildFailed:
            self.close()
            raise


def engine_share(number: int, of: int, width: int) -> dict[str, str]:
    """Variables that give engine `number` of `of` its `width` GPUs; without GPUs, its share of the cores."""
    if of == 1:
        return {}
    if gpus := visible_gpus():
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[number * width : (number + 1) * width])}
    cores = sorted(os.sched_getaffinity(0))
    own = cores[number * len(cores) // of : (number + 1) * len(cores) // of] or [cores[number % len(cores)]]
    parts = [own[rank * len(own) // width : (rank + 1) * len(own) // width] or own for rank in range(width)]
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, part)) for part in parts)}


def _groups(groups: list[list[dict[str, Any]]]) -> list[list[Completion]]:
    return [[Completion(**completion) for completion in group] for group in groups]
