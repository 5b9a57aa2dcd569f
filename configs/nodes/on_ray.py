"""A run on several nodes of a Ray cluster: the run on one, `iterdpo join` on each of the others.

    ray job submit -- python configs/nodes/on_ray.py CONFIG RUN_DIR --nodes 2 --gpus 8

CONFIG has dpo.accelerate_config, with as many machines as nodes here, and the run_dir RUN_DIR, on storage that all nodes
share. The GPUs belong to the tasks, so leave sampling.ray out. See docs/scaling.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path


def command(node: int, config: str, run_dir: str) -> list[str]:
    """What runs on a node."""
    return ["iterdpo", *(["run", config, "--no-prefect"] if node == 0 else ["join", run_dir, "--rank", str(node)])]


def on_node(words: list[str]) -> int:
    """Run it until it ends, or until this task is ended. Returns its exit status."""
    from iterdpo.run import supervise

    with tempfile.NamedTemporaryFile(suffix=".log") as log, supervise.start(words, log=Path(log.name)) as child:
        status = child.wait()
        print(Path(log.name).read_text(errors="replace"))
        return status


def main() -> int:
    """Place a task on each node; the first one's status is that of the whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("run_dir")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=8, help="of each node")
    given = parser.parse_args()

    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    ray.init(address="auto")
    group = placement_group([{"CPU": 1, "GPU": given.gpus}] * given.nodes, strategy="STRICT_SPREAD")
    ray.get(group.ready())
    task = ray.remote(max_retries=0)(on_node)
    running = [
        task.options(
            num_cpus=1,
            num_gpus=given.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=node),
        ).remote(command(node, given.config, given.run_dir))
        for node in range(given.nodes)
    ]
    return int(ray.get(running[0]))  # with this process the other tasks end


if __name__ == "__main__":
    sys.exit(main())
