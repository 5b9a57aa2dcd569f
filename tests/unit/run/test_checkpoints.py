"""A model that could not run is refused before anything is loaded, in one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from iterdpo.config import AdapterConfig
from iterdpo.errors import ConfigError
from iterdpo.run.checkpoints import (
    check_adapter_targets,
    check_alike,
    check_checkpoint,
    check_whole_modules,
    context_length,
    resolve_checkpoint,
)
from iterdpo.testing import build_tiny_checkpoint


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A checkpoint of this test's own, to damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(directory: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        check_checkpoint(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert str(directory) in message
    return message


def test_a_good_checkpoint_passes_and_gives_its_configuration(tiny_model: Path) -> None:
    config = check_checkpoint(tiny_model)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert context_length(config) == 512


@pytest.mark.parametrize(
    "path", ["/nowhere/model", "./nowhere", "~/nowhere", "a/b/c", "model.gguf", "pytorch_model.bin"]
)
def test_a_directory_that_does_not_exist_is_named_without_asking_the_hub(path: str) -> None:
    with pytest.raises(ConfigError, match="no such directory; give a checkpoint directory or a hub id") as caught:
        resolve_checkpoint(path)
    assert repr(path) in str(caught.value)


SCALED = {"rope_type": "llama3", "factor": 8.0}


@pytest.mark.parametrize(
    ("ours", "theirs", "differs"),
    [
        ({}, {}, None),
        ({"rope_theta": 1e4}, {"rope_theta": 1e6}, "rope_theta"),
        ({"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 1e6}}, "rope_theta"),
        ({"rope_theta": 1e6}, {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, None),
        ({"rope_scaling": None}, {"rope_scaling": SCALED}, "rope_type"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, {"rope_scaling": SCALED}, "rope_type"),
        ({"rope_scaling": SCALED}, {"rope_parameters": {**SCALED, "factor": 4.0}}, "factor"),
        ({"num_attention_heads": 4}, {"num_attention_heads": 8}, "num_attention_heads"),
        ({"rms_norm_eps": 1e-5}, {"rms_norm_eps": 1e-6}, "rms_norm_eps"),
        ({"sliding_window": 64}, {"sliding_window": 32}, "sliding_window"),
        *(
            ({**unused, key: 1}, {**unused, key: 2}, None)
            for unused, key in [
                ({}, "transformers_version"),
                ({}, "eos_token_id"),
                ({}, "attention_dropout"),
                ({}, "max_position_embeddings"),
                ({"use_sliding_window": False}, "max_window_layers"),
            ]
        ),
    ],
)
def test_a_checkpoint_that_computes_otherwise_with_the_same_weights_is_not_alike(
    copy: Path, tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any], differs: str | None
) -> None:
    other = shutil.copytree(copy, tmp_path / "other")
    for directory, changes in ((copy, ours), (other, theirs)):
        config = json.loads((directory / "config.json").read_text())
        for key in ("rope_parameters", "rope_theta", "rope_scaling"):
            config.pop(key, None)
        (directory / "config.json").write_text(json.dumps({**config, **changes}))
    if differs is None:
        check_alike(other, copy, "other", column="NAME")
        return
    with pytest.raises(ConfigError, match=rf"another {differs} than that of .* and name that: NAME"):
        check_alike(other, copy, "other", column="NAME")


def test_a_relative_path_or_one_from_home_becomes_absolute(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    monkeypatch.setenv("HOME", str(copy.parent))
    assert resolve_checkpoint("model") == resolve_checkpoint("./model") == resolve_checkpoint("~/model") == copy


def test_no_config_json(copy: Path) -> None:
    (copy / "config.json").unlink()
    assert refusal(copy) == f"model.path {copy}: has no config.json, so it is not a Hugging Face checkpoint"


def test_an_adapter_without_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/models/llama"}))
    message = refusal(tmp_path)
    assert f"model.path {tmp_path}: holds only an adapter of /models/llama" in message
    assert "start from /models/llama" in message


def test_a_config_json_that_was_cut_short(copy: Path) -> None:
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text[: len(text) // 2])
    assert "config.json: cannot be read: " in refusal(copy)


def test_a_classifier(copy: Path) -> None:
    edit_config(copy, architectures=["LlamaForSequenceClassification"])
    assert refusal(copy).endswith("LlamaForSequenceClassification is not a causal language model")


def test_pickled_weights_only(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "has no .safetensors weights; pickled ones are not loaded" in refusal(copy)


def test_no_tokenizer(copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer; save one there" in refusal(copy)


def test_a_config_json_of_another_vocabulary(copy: Path) -> None:
    edit_config(copy, vocab_size=32000)
    message = refusal(copy)
    assert (
        "model.safetensors embeds 259 tokens (model.embed_tokens.weight), but config.json has vocab_size 32,000"
        in message
    )


def test_a_tokenizer_of_another_model(copy: Path) -> None:
    path = copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["other"] = 259
    path.write_text(json.dumps(tokenizer))
    message = refusal(copy)
    assert "the tokenizer has ids up to 259" in message
    assert "the model embeds 259 tokens" in message


@pytest.mark.parametrize("extra", [["<image_soft_token>"], ["[PAD]", "<image>", "<audio>"]])
def test_tokens_that_were_added_after_those_of_the_model_are_no_mistake(copy: Path, extra: list[str]) -> None:
    path = copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    for number, content in enumerate(extra):
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 259 + number, "content": content})
    path.write_text(json.dumps(tokenizer))
    assert check_checkpoint(copy)["vocab_size"] == 259


def test_code_of_its_own_runs_only_where_it_was_allowed(copy: Path) -> None:
    edit_config(copy, auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    assert "needs its own Python code; read it, then set model.trust_remote_code=true" in refusal(copy)
    with pytest.raises(ConfigError, match=r"names modeling_own\.py, which is missing"):
        check_checkpoint(copy, trust_remote_code=True)
    (copy / "modeling_own.py").write_text("")
    assert check_checkpoint(copy, trust_remote_code=True)["auto_map"]


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n", b""])
def test_weights_that_are_a_git_lfs_pointer_or_were_cut_short(copy: Path, content: bytes) -> None:
    (copy / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refusal(copy)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 8192}}, 8192),
        ({"max_position_embeddings": 2048, "text_config": {"max_position_embeddings": 1}}, 2048),
        ({"max_position_embeddings": None}, None),
        ({}, None),
    ],
)
def test_the_context_length_is_what_the_configuration_says_if_it_says(
    config: dict[str, Any], tokens: int | None
) -> None:
    assert context_length(config) == tokens


def test_modules_to_save_that_the_model_does_not_have_are_refused_with_those_that_it_has(tiny_model: Path) -> None:
    for names in (["lm_head"], ["embed_tokens"], ["model.norm"], ["o_proj"]):
        check_whole_modules(tiny_model, AdapterConfig(modules_to_save=names))
    check_whole_modules(tiny_model, AdapterConfig())
    check_whole_modules(tiny_model, None)
    for name in ("wte", "score", "ens", "lm_heads"):
        with pytest.raises(
            ConfigError, match=rf"has no module '{name}'; it has lm_head, model\.embed_tokens, model\.norm"
        ):
            check_whole_modules(tiny_model, AdapterConfig(modules_to_save=["lm_head", name]))


QUANTIZED = [
    ({"quant_method": "awq", "bits": 4}, "awq"),
    ({"quant_method": "gptq", "bits": 4}, "gptq"),
    ({"load_in_8bit": True}, "bitsandbytes"),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
    ({"quant_algo": "NVFP4"}, "NVFP4"),
    ({"bits": 2}, "unknown method"),
]


@pytest.mark.parametrize("place", ["quantization_config", "compression_config", "text_config"])
@pytest.mark.parametrize(("own", "method"), QUANTIZED)
def test_quantized_weights_are_refused_by_their_method(copy: Path, place: str, own: Any, method: str) -> None:
    changes = {place: own} if place != "text_config" else {"text_config": {"quantization_config": own}}
    edit_config(copy, **changes)
    assert f"its weights are quantized ({method}), and cannot be trained" in refusal(copy)


@pytest.mark.parametrize(
    ("gpus", "own", "trained"), [("", {}, True), ("0", {}, False), ("0", {"dequantize": True}, True)]
)
def test_eight_bit_floats_are_taken_if_transformers_makes_plain_weights_of_them(
    copy: Path, monkeypatch: pytest.MonkeyPatch, gpus: str, own: dict[str, Any], trained: bool
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    edit_config(copy, quantization_config={"quant_method": "fp8", **own})
    if trained:
        assert check_checkpoint(copy)
    else:
        assert "quantized (fp8)" in refusal(copy)


TARGETS: list[tuple[Any, bool, str | None]] = [  # targets, whether they are merged, what is refused
    ("all-linear", True, None),
    ("All-Linear", True, None),
    (["q_proj", "v_proj"], True, None),
    (["self_attn.q_proj"], True, None),
    (["model.layers.0.self_attn.q_proj"], True, None),
    (r".*\.(q|v)_proj", True, None),
    (r"model\.layers\.1\..*_proj", True, None),
    (["lm_head"], False, None),
    (["embed_tokens"], False, None),
    (["proj"], True, "no such module"),
    (["Q_proj"], True, "no such module"),
    (["q_proj", "query_key_value"], True, "no such module"),
    ("q_proj", True, "no such module"),  # an expression has to match the whole name
    (["norm"], True, "is no matrix"),
    (["mlp"], True, "is no matrix"),
    (".*self_attn.*", True, "is no matrix"),
    (["lm_head"], True, "is tied to another matrix"),
    (["embed_tokens"], True, "is tied to another matrix"),
    ("(", True, "not a regular expression"),
    ([], True, "nothing would be trained"),
]


@pytest.mark.parametrize(("targets", "merged", "refused"), TARGETS)
def test_adapter_targets_are_held_against_the_names_of_the_weights(
    tiny_model: Path, targets: Any, merged: bool, refused: str | None
) -> None:
    if refused is None:
        check_adapter_targets(tiny_model, targets, tied=True, merged=merged)
        return
    with pytest.raises(ConfigError, match=refused) as caught:
        check_adapter_targets(tiny_model, targets, tied=True, merged=merged)
    assert "dpo.adapter.target_modules" in str(caught.value)


@pytest.mark.parametrize(
    "targets", [t for t, _, refused in TARGETS if refused in (None, "no such module", "is no matrix")]
)
def test_what_is_accepted_is_what_peft_accepts(tiny_model: Path, targets: Any) -> None:
    from iterdpo.training.models import load_policy, with_new_adapter

    def accepted(act: Any) -> bool:
        try:
            act()
        except ValueError:
            return False
        return True

    model = load_policy(tiny_model)
    by_peft = accepted(lambda: with_new_adapter(model, r=2, alpha=4, target_modules=targets, quantize="none"))
    by_us = accepted(lambda: check_adapter_targets(tiny_model, targets, tied=True, merged=False))
    assert by_us == (by_peft and targets != ["q_proj", "query_key_value"])  # PEFT takes the one that there is


def test_an_untied_head_may_be_adapted_and_merged(tmp_path: Path) -> None:
    model = build_tiny_checkpoint(tmp_path / "model", tie_word_embeddings=False)
    check_adapter_targets(model, ["lm_head"], tied=False, merged=True)
