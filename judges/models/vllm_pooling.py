"""vLLM's pooling runner in a process of its own: logits of a sequence classifier for rows of token ids.

`Pooler` starts `python -m judges.models.vllm_pooling` and speaks to it in JSON lines, as the sampler does to its worker. The child
dies with its parent.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iterdpo.errors import ChildFailed
from iterdpo.run import supervise


class Pooler:
    """An engine with one checkpoint.

    Args:
        model: a checkpoint directory or hub id.
        engine: keyword arguments of `vllm.LLM`; `max_model_len` is needed.

    Raises:
        ChildFailed: the engine does not start; with the end of its log.
    """

    def __init__(self, model: str, engine: dict[str, Any]) -> None:
        descriptor, log = tempfile.mkstemp(prefix="iterdpo-pooling-", suffix=".log")
        os.close(descriptor)
        env = {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # a pooling request leaves the cache when it is answered
            **os.environ,
            # In-process is the quicker start for one device; several need vLLM's own worker processes.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if engine.get("tensor_parallel_size", 1) > 1 else "0",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        command = [sys.executable, "-m", "judges.models.vllm_pooling"]
        self._child = supervise.start(command, log=Path(log), env=env, pipes=True)
        self._call({"model": model, "engine": engine})

    def logits(self, rows: Sequence[list[int]]) -> list[list[float]]:
        """[rows][labels], without an activation.

        Raises:
            ChildFailed: the engine died.
        """
        return self._call({"rows": list(rows)})["logits"]

    def close(self) -> None:
        """End the process, and with it whatever it holds of a device."""
        self._child.kill()
        self._child.log.unlink(missing_ok=True)

    def _call(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._child.process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        reply = json.loads(line) if line else {"error": "the vLLM process died"}
        if "error" in reply:
            self._child.kill()
            raise ChildFailed(
                f"reward model: {reply['error']}\n{self._child.log_tail()}\nThe whole log: {self._child.log}"
            )
        return reply


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints goes to the log, not between the replies
    llm: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if llm is None:
                llm = _engine(request["model"], request["engine"])
                reply: dict[str, Any] = {}
            else:
                reply = {"logits": _logits(llm, request["rows"])}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _engine(model: str, engine: dict[str, Any]) -> Any:
    from vllm import LLM
    from vllm.platforms import current_platform

    from iterdpo.sampling.worker import cpu_defaults

    defaults = cpu_defaults(engine) if current_platform.is_cpu() else {}
    # Weights from safetensors only, never unpickled.
    settings = {"runner": "pooling", "load_format": "safetensors", "seed": 0, "disable_log_stats": True}
    return LLM(model, **{**settings, **defaults, **engine})


def _logits(llm: Any, rows: list[list[int]]) -> list[list[float]]:
    from vllm import PoolingParams

    prompts = [{"prompt_token_ids": row} for row in rows]
    bare = PoolingParams(use_activation=False)  # by default a sigmoid, or a softmax over the labels
    outputs = llm.encode(prompts, bare, pooling_task="classify", use_tqdm=False)
    return [output.outputs.data.float().tolist() for output in outputs]


if __name__ == "__main__":
    main()
