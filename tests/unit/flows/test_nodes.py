"""The files of configs/nodes, which start a run on several nodes: they load, and the commands in them are iterdpo's."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from flows.cli import app

ROOT = Path(__file__).parents[3]
NODES = ROOT / "configs" / "nodes"


def commands(script: str) -> list[list[str]]:
    """The words of each command of iterdpo in a shell script."""
    return [shlex.split(line)[1:] for line in re.findall(r"exec (iterdpo .*)", script)]


def check(words: list[str]) -> str:
    """Parse a command as the command line would, with a number for the node's. Returns its name."""
    words = [re.sub(r"\$\w+", "1", word) for word in words if word != "$@"]
    command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    if "rank" in bound.arguments:
        assert bound.arguments["rank"] == 1
    return command.__name__


def test_there_is_a_file_for_each_way_to_start_nodes() -> None:
    assert sorted(path.name for path in NODES.iterdir() if path.is_file()) == [
        "kubernetes.yaml",
        "on_ray.py",
        "slurm.sh",
    ]


def test_under_slurm_the_first_node_runs_and_the_others_join() -> None:
    script = (NODES / "slurm.sh").read_text()
    subprocess.run(["bash", "-n", NODES / "slurm.sh"], check=True)
    inner = re.search(r"bash -c '(.*?)' iterdpo", script, re.DOTALL)
    assert inner is not None
    subprocess.run(["bash", "-n", "-c", inner[1]], check=True)
    assert [check(words) for words in commands(script)] == ["run", "join"]
    options = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", script))
    assert (options["nodes"], options["ntasks-per-node"]) == ("2", "1")


def test_the_slurm_script_gives_each_node_its_command(tmp_path: Path) -> None:
    """With a srun that starts two tasks here, and an iterdpo that says how it was called."""
    (tmp_path / "srun").write_text(
        '#!/bin/bash\nshift 2\nfor SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done\n'
    )
    (tmp_path / "iterdpo").write_text('#!/bin/bash\necho "$@"\n')
    for name in ("srun", "iterdpo"):
        (tmp_path / name).chmod(0o755)
    said = subprocess.run(
        ["bash", NODES / "slurm.sh", "a b.yaml", "/runs/a", "dpo.beta=0.2"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.splitlines() == ["run a b.yaml dpo.beta=0.2 --no-prefect", "join /runs/a --rank 1"]


def test_on_kubernetes_the_first_pod_runs_and_its_end_is_the_jobs() -> None:
    service, job = yaml.safe_load_all((NODES / "kubernetes.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 2
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    [container] = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    subprocess.run(["bash", "-n", "-c", container["command"][-1]], check=True)
    assert [check(words) for words in commands(container["command"][-1])] == ["run", "join"]


@pytest.mark.parametrize(("node", "name"), [(0, "run"), (1, "join")])
def test_on_ray_each_task_has_its_command(node: int, name: str) -> None:
    found = importlib.util.spec_from_file_location("on_ray", NODES / "on_ray.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    assert check(module.command(node, "run.yaml", "/runs/a")[1:]) == name
