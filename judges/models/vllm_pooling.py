"""vLLM's pooling runner in a child process: logits of a sequence classifier for rows of token ids."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterdpo.run.folder import own_folder
from iterdpo.run.worker import Done, JsonLinesWorker, serve


@dataclass(frozen=True)
class Start:
    """A checkpoint directory or hub id, and its `revision`. `engine`: further arguments of `vllm.LLM`; they win."""

    model: str
    max_model_len: int
    dtype: str
    revision: str | None
    trust_remote_code: bool
    engine: dict[str, Any]


@dataclass(frozen=True)
class Score:
    rows: list[list[int]]  # [rows][T]


@dataclass(frozen=True)
class Scored:
    logits: list[list[float]]  # [rows][labels]


class Pooler:
    """An engine with one checkpoint, in a process that dies with this one.

    Raises:
        ChildFailed: the engine does not start; with the reason, and the path of its log.
    """

    def __init__(self, start: Start) -> None:
        descriptor, log = tempfile.mkstemp(prefix="pooling-", suffix=".log", dir=own_folder())
        os.close(descriptor)
        env = {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # a pooling request leaves the cache when it is answered
            **os.environ,
            # In-process is the quicker start for one device; several need vLLM's own worker processes.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if start.engine.get("tensor_parallel_size", 1) > 1 else "0",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        self._log = Path(log)
        self._worker = JsonLinesWorker("judges.models.vllm_pooling", name="reward model", log=self._log, env=env)
        self._worker.call(start, Done)

    def logits(self, rows: Sequence[list[int]]) -> list[list[float]]:
        """[rows][labels], without an activation.

        Raises:
            ChildFailed: the engine died.
        """
        return self._worker.call(Score(list(rows)), Scored).logits

    def close(self) -> None:
        """End the process, and with it whatever it holds of a device."""
        self._worker.close()
        self._log.unlink(missing_ok=True)


class _Server:
    def start(self, request: Start) -> Done:
        from vllm import LLM
        from vllm.platforms import current_platform

        from iterdpo.sampling.worker import cpu_defaults

        defaults = cpu_defaults(request.max_model_len) if current_platform.is_cpu() else {}
        asked = {name: value for name, value in vars(request).items() if name != "engine"} | request.engine
        # Weights from safetensors only, never unpickled.
        settings = {"runner": "pooling", "load_format": "safetensors", "seed": 0, "disable_log_stats": True}
        self.llm = LLM(**{**settings, **defaults, **asked})
        return Done()

    def score(self, request: Score) -> Scored:
        from vllm import PoolingParams

        prompts = [{"prompt_token_ids": row} for row in request.rows]
        bare = PoolingParams(use_activation=False)  # by default a sigmoid, or a softmax over the labels
        outputs = self.llm.encode(prompts, bare, pooling_task="classify", use_tqdm=False)
        return Scored([output.outputs.data.float().tolist() for output in outputs])


if __name__ == "__main__":
    server = _Server()
    serve({Start: server.start, Score: server.score})
