"""The file by which the first node of a training calls the others, and what they start. Nothing is trained here."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from iterdpo.config import SupervisionConfig
from iterdpo.errors import ChildFailed, ChildLost, ConfigError
from iterdpo.run.rundir import read_json, write_json
from iterdpo.training import launch, nodes
from iterdpo.training.launch import check_training, command, join, launch_training, on_node, processes_here
from iterdpo.training.nodes import Call, Caller, Calls, Node, calling
from tests.unit.training.test_launch import spec


@pytest.fixture
def two_nodes(tmp_path: Path) -> dict[str, Any]:
    """The keys of `dpo` for two nodes with two processes each."""
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml.safe_dump({"num_machines": 2, "num_processes": 4, "machine_rank": 0}))
    return {"accelerate_config": str(path), "processes": 4}


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_processes_are_counted_over_all_nodes_and_shared_out_evenly(two_nodes: dict[str, Any], tmp_path: Path) -> None:
    check_training(spec(**two_nodes).dpo)
    assert processes_here(spec(**two_nodes).dpo) == 2
    assert processes_here(spec(processes=3).dpo) == 3
    (tmp_path / "accelerate.yaml").write_text("num_machines: 3\nnum_processes: 4\n")
    with pytest.raises(ConfigError, match="4 processes are not the same number on each of 3 machines"):
        check_training(spec(**two_nodes).dpo)


@pytest.mark.parametrize("text", ["[1]", "a: [", "\xff"])
def test_a_file_that_is_not_accelerates_is_refused_by_its_key(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"^dpo\.accelerate_config = '.*a\.yaml': (cannot be read|it is no file)"):
        check_training(spec(accelerate_config=str(tmp_path / "a.yaml")).dpo)


def test_each_node_gets_its_number_and_the_first_ones_address_before_its_program(two_nodes: dict[str, Any]) -> None:
    words = on_node(command(spec(**two_nodes).dpo, "/train.json"), Node(1, "node1", 29500))
    assert words[3:6] == ["--machine_rank=1", "--main_process_ip=node1", "--main_process_port=29500"]
    assert words[-3:] == ["-m", "iterdpo.training.train", "/train.json"]


def test_the_address_is_the_files_or_that_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getfqdn", lambda: "node1.example.org")
    file = tmp_path / "training.json"
    with calling(file, Path("/s"), {"main_process_ip": "10.0.0.7", "main_process_port": 1234}) as (node, _):
        assert node == Node(0, "10.0.0.7", 1234)
        assert (read_json(file)["host"], read_json(file)["port"]) == ("10.0.0.7", 1234)
    assert not file.exists()
    with calling(file, Path("/s"), {"main_process_ip": None}) as (node, _):
        assert node.host == "node1.example.org"
        assert node.port > 1023


def test_a_call_counts_while_its_time_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, now = tmp_path / "training.json", [1000.0]
    monkeypatch.setattr(nodes.time, "monotonic", lambda: now[0])
    calls = Calls(file)
    assert calls.current() is None
    call = Call("a", "/s", "node1", 1)
    write_json(file, call._asdict())
    assert calls.current() is None  # it may be left from a run that was killed
    now[0] += 5
    Caller(file).beat()
    assert calls.current() == call
    now[0] += nodes.SILENCE - 1
    assert calls.current() == call
    now[0] += 2
    assert calls.current() is None
    Caller(file).beat()
    assert calls.current() == call
    file.write_text("{")  # being written
    assert calls.current() is None
    file.unlink()
    assert calls.current() is None


class Joined:
    """A node that has joined, in a thread, with a shell script in the place of its processes. It ends with its `messages`th."""

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch, script: str, *, messages: int) -> None:
        self.said: list[str] = []
        (run_dir / "logs").mkdir()
        monkeypatch.setattr(launch, "command", lambda dpo, path: ["sh", "-c", script, "--config_file"])
        monkeypatch.setattr(launch, "on_node", lambda words, node: [*words[:3], f"node {node.rank}"])

        def say(message: str) -> None:
            self.said.append(message)
            if len(self.said) == messages:
                raise SystemExit

        def work() -> None:
            with suppress(SystemExit):
                join(run_dir, 1, say=say)

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()


@pytest.mark.parametrize(
    ("script", "said"),
    [("exit 0", "done"), ("echo 'RuntimeError: no luck'; exit 1", "ended: RuntimeError: no luck (the whole log:")],
)
def test_a_node_that_joined_starts_each_training_once(
    two_nodes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    joined = Joined(tmp_path, monkeypatch, f"echo x >> {tmp_path}/starts; {script}", messages=4)
    write_json(tmp_path / "spec.json", spec(**two_nodes).model_dump(mode="json"))
    for time_of in range(2):
        with calling(tmp_path / nodes.CALL, tmp_path / "spec.json", {}) as (_, caller):
            until(lambda: caller.beat() is None and len(joined.said) == 2 * (time_of + 1))  # noqa: B023
        assert joined.said[-1].startswith(said)
    assert (tmp_path / "starts").read_text() == "x\nx\n"


def test_a_node_ends_its_processes_if_the_first_one_no_longer_calls(
    two_nodes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.1)
    joined = Joined(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/pid; exec sleep 1000", messages=2)
    write_json(tmp_path / "spec.json", spec(**two_nodes).model_dump(mode="json"))
    with calling(tmp_path / nodes.CALL, tmp_path / "spec.json", {}) as (_, caller):
        until(lambda: caller.beat() is None and (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    joined.thread.join(20)
    assert joined.said[1] == "ended: the first node is silent, or has ended the training"
    until(lambda: not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists())


@pytest.mark.parametrize(
    ("reason", "lost"),
    [
        ("RuntimeError: gloo/transport/tcp/pair.cc:537] Read error [10.0.0.8]:27303: Connection reset by peer.", True),
        ("torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:2, remote process exited", True),
        ("RuntimeError: step 3: loss nan, gradient norm 1.0: not finite, and not applied.", False),
    ],
)
def test_a_training_on_several_nodes_calls_while_it_lasts_and_knows_that_a_node_was_lost(
    two_nodes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, lost: bool
) -> None:
    call = tmp_path / nodes.CALL
    script = f"grep -q node {call} && echo '{reason}'; exit 1"
    monkeypatch.setattr(launch, "on_node", lambda words, node: ["sh", "-c", script])
    monkeypatch.setattr("socket.getfqdn", lambda: "node1")
    with pytest.raises(ChildFailed, match=re.escape(reason)) as failed:
        launch_training(
            spec(**two_nodes).model_copy(update={"output": tmp_path}),
            spec_path=tmp_path / "train.json",
            log=tmp_path / "train.log",
            on_step=lambda row: None,
            call=call,
            supervision=SupervisionConfig(),
        )
    assert isinstance(failed.value, ChildLost) is lost
    assert not call.exists()


@pytest.mark.parametrize("rank", [0, 2, -1])
def test_a_number_that_no_node_has_is_refused(two_nodes: dict[str, Any], tmp_path: Path, rank: int) -> None:
    write_json(tmp_path / "spec.json", spec(**two_nodes).model_dump(mode="json"))
    over = threading.Event()

    def beat(file: Path) -> None:
        while not over.wait(0.05):
            os.utime(file)

    with calling(tmp_path / nodes.CALL, tmp_path / "spec.json", {}):
        beating = threading.Thread(target=beat, args=(tmp_path / nodes.CALL,))
        beating.start()
        with pytest.raises(
            ConfigError, match=f"--rank {rank}: the training has 2 nodes; those beside the first are 1 to 1"
        ):
            join(tmp_path, rank, say=lambda message: None)
        over.set()
        beating.join()
