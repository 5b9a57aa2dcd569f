"""vLLM engines on the nodes of a Ray cluster: `sampling.ray`.

    VLLMSampler --(Ray)--> actor on a node --(pipes)--> guard --> worker.py with the engine

An actor starts the worker that `client.py` would start here, and passes requests on. So an engine ends with its actor, one
that hangs is noticed on its node, and an actor whose node is lost is an engine that is lost. Ray gives an actor its GPUs,
all on one node. Each node has iterdpo installed, and sees the run directory and the model under the same paths.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from iterdpo.errors import ChildFailed, ConfigError
from iterdpo.escape import printable
from iterdpo.run.worker import JsonLinesWorker
from iterdpo.sampling.client import OWN_PROCESS, VLLMSampler

R = TypeVar("R")


class RaySampler(VLLMSampler):
    """A `VLLMSampler` whose worker is on a node of the cluster that `connect` has joined. `gpus`: for the engine, 0: a CPU."""

    def __init__(self, *, gpus: int, **settings: Any) -> None:
        super().__init__(**settings)
        own = {name: value for name, value in self._env.items() if os.environ.get(name) != value}
        self._own = {**own, **({OWN_PROCESS: "1"} if gpus and not settings.get("reproducible") else {})}
        self._gpus = gpus

    def _new_worker(self) -> RayWorker:
        return RayWorker(self.MODULE, log=self.log, variables=self._own, gpus=self._gpus, start=self._supervision.start)


def connect(address: str) -> int:
    """Join the cluster at `address` (`auto`, `HOST:PORT`). Returns the number of its GPUs.

    Raises:
        ConfigError: Ray is not installed, or no cluster is there.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("sampling.ray: the package 'ray' is not installed; run: pip install 'iterdpo[ray]'") from None
    try:
        if not ray.is_initialized():
            host, _, port = address.rpartition(":")
            if port.isdecimal():  # Ray itself tries for minutes
                socket.create_connection((host.rpartition("/")[2], int(port)), timeout=10).close()
            ray.init(address=address, log_to_driver=False, configure_logging=False)
    except Exception as error:
        why = printable(" ".join(str(error).split()))[:300]
        raise ConfigError(
            f"sampling.ray = {address!r}: no Ray cluster is there ({why}); start one: ray start --head"
        ) from None
    return int(ray.cluster_resources().get("GPU", 0))


class RayWorker:
    """A `JsonLinesWorker` in an actor."""

    def __init__(self, module: str, *, log: Path, variables: Mapping[str, str], gpus: int, start: float) -> None:
        import ray

        self._ray, self._start = ray, start
        options = {"num_cpus": 1, "num_gpus": gpus, "max_restarts": 0}
        self._actor = ray.remote(**options)(Remote).remote(module, str(log.absolute()), dict(variables))

    def call(self, request: Any, read: Callable[..., R], *, silence: float | None = None) -> R:
        """See `JsonLinesWorker.call`. The actor may have to wait for a node that has room for it."""
        ray = self._ray
        try:
            ready = self._actor.ready.remote()
            if not ray.wait([ready], timeout=self._start)[0]:
                self.close()
                raise ChildFailed(f"sampler: no node of the Ray cluster had room for it within {self._start:g} seconds")
            ray.get(ready)
            return read(**ray.get(self._actor.call.remote(request, silence)))
        except ray.exceptions.RayTaskError as error:
            self.close()
            if isinstance(error.cause, ChildFailed):
                raise ChildFailed(printable(str(error.cause))) from None
            raise ChildFailed(f"sampler: {printable(' '.join(str(error).split()))[-300:]}") from None
        except ray.exceptions.RayError as error:
            self.close()
            reason = printable(" ".join(str(error).split()))[:300]
            raise ChildFailed(f"sampler: its node or its actor is lost: {reason}") from None

    def close(self) -> None:
        self._ray.kill(self._actor)


class Remote:
    """What runs in the actor."""

    def __init__(self, module: str, log: str, variables: dict[str, str]) -> None:
        path = Path(log)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.worker = JsonLinesWorker(module, name="sampler", log=path, env={**os.environ, **variables})

    def ready(self) -> None:
        """Returns once the actor is there."""

    def call(self, request: Any, silence: float | None) -> dict[str, Any]:
        return self.worker.call(request, dict, silence=silence)
