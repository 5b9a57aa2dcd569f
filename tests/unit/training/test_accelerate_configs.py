"""The files in configs/accelerate, as accelerate's launcher reads them and as its plugins find them in the processes."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from iterdpo.config import DPOConfig
from iterdpo.errors import ConfigError
from iterdpo.training.launch import check_training, command, nodes, on_node, processes_here
from iterdpo.training.nodes import Node

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "configs" / "accelerate").glob("*"))
BY_NAME = {file.stem: file for file in FILES}


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)
    return monkeypatch


def launched(file: Path, monkeypatch: pytest.MonkeyPatch, node: Node | None = None) -> tuple[str, Namespace]:
    """The launcher that `accelerate launch` would call with the file, as on that node, and what it would be given."""
    calls: list[tuple[str, Namespace]] = []
    for name in ("deepspeed_launcher", "multi_gpu_launcher", "simple_launcher"):
        monkeypatch.setattr(launch, name, lambda args, name=name: calls.append((name, args)))
    parser = launch.launch_command_parser()
    words = command(DPOConfig(accelerate_config=str(file)), "train.json")
    words = words if node is None else on_node(words, node)
    launch.launch_command(parser.parse_args(words[3:]))
    [call] = calls
    return call


def test_there_is_a_file_for_each_kind_of_distribution() -> None:
    assert [file.name for file in FILES] == [
        "ddp-8gpu.yaml",
        "deepspeed-zero2.yaml",
        "fsdp2-2x8gpu.yaml",
        "fsdp2-8gpu.yaml",
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_loads_and_names_as_many_processes_as_the_configuration_must(file: Path) -> None:
    machines = 2 if "2x8" in file.name else 1
    assert load_config_from_file(str(file)).num_processes == 8 * machines
    dpo = DPOConfig(processes=8 * machines, accelerate_config=str(file))
    check_training(dpo)
    assert (nodes(dpo), processes_here(dpo)) == (machines, 8)
    with pytest.raises(ConfigError, match=rf"num_processes is {8 * machines}, but dpo\.processes is 4"):
        check_training(DPOConfig(processes=4, accelerate_config=str(file)))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_file_lets_accelerate_autocast_beside_the_trainer(file: Path, clean_environment: pytest.MonkeyPatch) -> None:
    _, args = launched(file, clean_environment)
    assert args.mixed_precision == "no"


def test_ddp_is_a_launch_on_several_gpus(clean_environment: pytest.MonkeyPatch) -> None:
    launcher, args = launched(BY_NAME["ddp-8gpu"], clean_environment)
    assert (launcher, args.multi_gpu, args.use_fsdp, args.num_processes) == ("multi_gpu_launcher", True, False, 8)


@pytest.mark.parametrize("name", ["fsdp2-8gpu", "fsdp2-2x8gpu"])
def test_fsdp2_divides_the_weights_by_layer_and_reads_the_checkpoint_once(
    name: str, clean_environment: pytest.MonkeyPatch
) -> None:
    launcher, args = launched(BY_NAME[name], clean_environment)
    assert (launcher, args.use_fsdp) == ("multi_gpu_launcher", True)
    for variable, value in prepare_multi_gpu_env(args).items():
        clean_environment.setenv(variable, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.transformer_cls_names_to_wrap is None  # the model's own
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert plugin.cpu_ram_efficient_loading is True
    assert plugin.activation_checkpointing is False


def test_the_second_of_two_nodes_starts_its_eight_processes_against_the_first(
    clean_environment: pytest.MonkeyPatch,
) -> None:
    _, args = launched(BY_NAME["fsdp2-2x8gpu"], clean_environment, Node(1, "node1", 4321))
    prepare_multi_gpu_env(args)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", 1)
    assert (args.rdzv_endpoint or f"{args.master_addr}:{args.master_port}") == "node1:4321"


def test_deepspeed_is_told_what_it_would_ask_a_data_loader_for(clean_environment: pytest.MonkeyPatch) -> None:
    launcher, args = launched(BY_NAME["deepspeed-zero2"], clean_environment)
    assert launcher == "deepspeed_launcher"
    for name, value in prepare_deepspeed_cmd_env(args)[1].items():
        clean_environment.setenv(name, value)
    plugin = DeepSpeedPlugin()
    settings = plugin.deepspeed_config
    assert plugin.zero_stage == settings["zero_optimization"]["stage"] == 2
    assert plugin.gradient_accumulation_steps == settings["gradient_accumulation_steps"] == 1
    assert plugin.gradient_clipping == settings["gradient_clipping"] == DPOConfig().max_grad_norm
    assert settings["train_micro_batch_size_per_gpu"] == 1
    assert settings["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}


@pytest.mark.parametrize("how", ["stage", "inside", "named"])
def test_zero_3_is_refused_with_what_divides_weights_instead(tmp_path: Path, how: str) -> None:
    own = {"zero_optimization": {"stage": 3}}
    (tmp_path / "own.json").write_text(json.dumps(own))
    section: dict[str, Any] = {
        "stage": {"zero_stage": 3},
        "inside": {"deepspeed_config_file": json.dumps(own)},
        "named": {"deepspeed_config_file": str(tmp_path / "own.json")},
    }[how]
    file = tmp_path / "zero3.yaml"
    file.write_text(yaml.safe_dump({"num_processes": 2, "deepspeed_config": section}))
    with pytest.raises(ConfigError, match=r"zero3\.yaml: .* use FSDP2, as in configs/accelerate/fsdp2-8gpu\.yaml"):
        check_training(DPOConfig(processes=2, accelerate_config=str(file)))
