"""The sampler that talks to a vLLM worker process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iterdpo.errors import ChildFailed
from iterdpo.run import supervise
from iterdpo.sampling.base import SamplingParameters
from iterdpo.types import Completion


class VLLMSampler:
    """A vLLM engine in a worker process of its own (see `worker.py`), started at the first `load`.

    It lives through the run: each `load` puts new weights, or a LoRA adapter, into the running engine. The worker dies
    with this process. Requests and replies are JSON lines over its pipes, one reply a request.

    Args:
        max_model_len: longest prompt and completion together, in tokens.
        log: file for everything that vLLM prints.
        dtype, max_num_seqs, kv_cache_gib, gpu_memory_utilization, tensor_parallel_size, lora, extra: see `EngineConfig`.
        adapter_rank: rank of the adapters that will be loaded. None: the engine is built without room for adapters,
            and merges one that comes all the same.
        say: where to note what a user may want to know.
        reserved: descriptors of `supervise.reserve`, held while the worker lives.
    """

    def __init__(
        self,
        *,
        max_model_len: int,
        log: Path,
        dtype: str = "bfloat16",
        max_num_seqs: int = 256,
        kv_cache_gib: int = 1,
        gpu_memory_utilization: float = 0.85,
        tensor_parallel_size: int = 1,
        lora: str = "auto",
        adapter_rank: int | None = None,
        extra: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        reserved: Sequence[int] = (),
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.log = log
        self._say = say or (lambda text: None)
        self._lora: dict[str, Any] = {
            "lora": lora,
            "adapter_rank": adapter_rank,
            "scratch": str(log.absolute().parent / ".merged"),
        }
        self._reserved = reserved
        self._kv_cache_gib = kv_cache_gib
        self._engine = {
            "max_model_len": max_model_len,
            "dtype": dtype,
            "max_num_seqs": max_num_seqs,
            "gpu_memory_utilization": gpu_memory_utilization,
            "tensor_parallel_size": tensor_parallel_size,
            "trust_remote_code": trust_remote_code,
            **(extra or {}),
        }
        self._child: supervise.Child | None = None
        self._loaded: str | None = None
        self._asleep = False

    def warm_up(self) -> None:
        """Start the worker and let it import vLLM, without waiting for it: seconds that other work can hide."""
        if self._child is None:
            self._start()

    def load(self, policy: Path, digest: str) -> None:
        """See `Sampler.load`.

        Raises:
            ChildFailed: the engine could not start, or did not take the weights.
        """
        self.warm_up()
        if self._loaded is None:
            self._start_engine(policy)
        elif self._loaded != digest or self._asleep:
            self._call("load", policy=str(policy), reload=self._loaded != digest)
        self._loaded, self._asleep = digest, False

    def sample(
        self, prompt_ids: Sequence[list[int]], seeds: Sequence[int], parameters: SamplingParameters
    ) -> list[list[Completion]]:
        """See `Sampler.sample`.

        Raises:
            ChildFailed: the worker died.
        """
        assert self._loaded is not None, "load a policy first"
        assert not self._asleep, "load wakes the engine up"
        reply = self._call("sample", prompt_ids=list(prompt_ids), seeds=list(seeds), parameters=asdict(parameters))
        return [[Completion(**c) for c in completions] for completions in reply["groups"]]

    def release(self) -> None:
        if self._loaded is not None and not self._asleep:
            self._asleep = self._call("release")["asleep"]

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
        self._child, self._loaded, self._asleep = None, None, False

    def _start_engine(self, policy: Path) -> None:
        try:
            self._call("start", policy=str(policy), engine=self._engine, **self._lora)
        except _NativeFailed as failure:
            if self._lora["lora"] != "auto":
                raise
            self._say(f"vLLM does not start with room for adapters; they are merged instead ({failure.reason})")
            self._lora["lora"] = "merge"
            self.warm_up()  # a new process: the engine that failed left things behind in its own
            self._call("start", policy=str(policy), engine=self._engine, **self._lora)

    def _start(self) -> None:
        env = {
            **os.environ,
            # In-process is the quicker start for one device; several need vLLM's own worker processes.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if self._engine["tensor_parallel_size"] > 1 else "0",
            "VLLM_CPU_KVCACHE_SPACE": f"{self._kv_cache_gib}",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CONFIGURE_LOGGING": os.environ.get("VLLM_CONFIGURE_LOGGING", "1"),
            "PYTHONUNBUFFERED": "1",
        }
        command = [sys.executable, "-m", "iterdpo.sampling.worker"]
        self._child = supervise.start(command, log=self.log, env=env, pipes=True, reserved=self._reserved)

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        assert self._child is not None
        process = self._child.process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"method": method, **arguments}).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        reply = json.loads(line) if line else {"error": "the vLLM worker died"}
        if "error" in reply:
            tail = self._child.log_tail()
            self.close()
            failed = _NativeFailed if reply.get("native") else ChildFailed
            raise failed(f"sampler, {method}: {reply['error']}\n{tail}\nThe whole log: {self.log}")
        return reply


class _NativeFailed(ChildFailed):
    """Raised where the engine was to apply adapters itself."""

    @property
    def reason(self) -> str:
        return str(self).splitlines()[0]
