"""Engines on Ray, with a Ray whose actors are objects of this process; tests/integration/test_ray.py has a real cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import pytest

from iterdpo.config import EngineConfig
from iterdpo.errors import ChildFailed, ConfigError
from iterdpo.run.worker import Done
from iterdpo.sampling import ray as module
from iterdpo.sampling.base import Release, Released
from iterdpo.sampling.client import OWN_PROCESS
from iterdpo.sampling.ray import RaySampler, RayWorker, connect


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class FakeRay:
    """`made` are the options of each actor; `room` is whether a node has room for one; `lost` that its node is gone."""

    exceptions = Namespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, *, gpus: float = 0) -> None:
        self.gpus, self.room, self.lost = gpus, True, False
        self.made: list[dict[str, Any]] = []
        self.killed: list[Any] = []

    def remote(self, **options: Any) -> Callable[[type], Any]:
        self.made.append(options)

        def actor_of(kind: type) -> Any:
            def make(*arguments: Any) -> Any:
                held = kind(*arguments)
                names = [name for name in vars(kind) if not name.startswith("_")]
                return Namespace(**{name: Namespace(remote=partial(partial, getattr(held, name))) for name in names})

            return Namespace(remote=make)

        return actor_of

    def wait(self, refs: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return (refs, []) if self.room else ([], refs)

    def get(self, ref: Callable[[], Any]) -> Any:
        if self.lost:
            raise RayError("The actor died because its node has died.")
        try:
            return ref()
        except ChildFailed as error:
            raise RayTaskError(error) from None

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)

    def is_initialized(self) -> bool:
        return False

    def init(self, **_: Any) -> None:
        if self.lost:
            raise ConnectionError("nothing\nthere")

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 4.0, **({"GPU": self.gpus} if self.gpus else {})}


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)  # type: ignore[arg-type]
    return fake


class Worker:
    """In the place of a `JsonLinesWorker`: it says its settings, or fails."""

    fails = False

    def __init__(self, target: str, **settings: Any) -> None:
        self.settings = settings

    def call(self, request: Any, read: Callable[..., Any], *, silence: float | None) -> Any:
        if self.fails:
            raise ChildFailed("sampler, release: no memory")
        return read(asleep=silence == 7)


@pytest.fixture
def worker(ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RayWorker:
    monkeypatch.setattr(module, "JsonLinesWorker", Worker)
    return RayWorker("engine", log=tmp_path / "logs" / "s.log", variables={"A": "1"}, gpus=2, start=5)


def test_requests_and_replies_pass_through_an_actor_with_the_engines_gpus(ray: FakeRay, worker: RayWorker) -> None:
    assert worker.call(Release(), Released, silence=7) == Released(asleep=True)
    assert ray.made == [{"num_cpus": 1, "num_gpus": 2, "max_restarts": 0}]


def test_what_the_worker_says_of_its_failure_is_said_here(
    ray: FakeRay, worker: RayWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "fails", True)
    with pytest.raises(ChildFailed, match=r"^sampler, release: no memory$"):
        worker.call(Release(), Done)
    assert len(ray.killed) == 1


def test_a_lost_node_is_a_lost_engine(ray: FakeRay, worker: RayWorker) -> None:
    ray.lost = True
    with pytest.raises(ChildFailed, match="its node or its actor is lost: The actor died"):
        worker.call(Release(), Released)


def test_a_cluster_without_room_is_waited_for_and_then_named(ray: FakeRay, worker: RayWorker) -> None:
    ray.room = False
    with pytest.raises(ChildFailed, match="no node of the Ray cluster had room for it within 5 seconds"):
        worker.call(Release(), Released)


def test_an_engine_takes_its_own_variables_to_its_node_and_none_of_this_machines(
    ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(OWN_PROCESS, raising=False)
    monkeypatch.setenv("HOME_OF_THE_DRIVER", "/here")
    settings: dict[str, Any] = {"max_model_len": lambda: 64, "log": tmp_path / "s.log", "engine": EngineConfig()}
    own = RaySampler(gpus=1, **settings)._own
    assert own[OWN_PROCESS] == "1"
    assert "HOME_OF_THE_DRIVER" not in own
    assert set(own) <= {"VLLM_CONFIGURE_LOGGING", OWN_PROCESS, "VLLM_CPU_KVCACHE_SPACE", "VLLM_NO_USAGE_STATS"} | {
        "PYTHONUNBUFFERED"
    }


def test_the_gpus_of_the_cluster_are_counted(ray: FakeRay) -> None:
    assert connect("auto") == 0
    ray.gpus = 8.0
    assert connect("auto") == 8
    with pytest.raises(ConfigError, match=r"sampling\.ray = '127\.0\.0\.1:1': no Ray cluster is there"):
        connect("127.0.0.1:1")
    ray.lost = True
    with pytest.raises(
        ConfigError, match=r"sampling\.ray = 'auto': no Ray cluster is there \(nothing there\); start one"
    ):
        connect("auto")


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="the package 'ray' is not installed; run: pip install 'iterdpo"):
        connect("auto")


def test_a_node_starts_the_worker_in_its_own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JsonLinesWorker", Worker)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # as Ray sets it in an actor
    remote: Any = module.Remote("engine", str(tmp_path / "logs" / "s.log"), {"A": "1"})
    assert remote.worker.settings["env"] == {**os.environ, "A": "1"}
    assert (tmp_path / "logs").is_dir()
