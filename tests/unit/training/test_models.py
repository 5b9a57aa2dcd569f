"""Checkpoints and adapters as models, and the average of two checkpoints."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from iterdpo.testing import build_tiny_checkpoint
from iterdpo.training.models import (
    adapter_base,
    average_checkpoints,
    load_policy,
    make_savable,
    offloaded,
    use_kernels,
    with_new_adapter,
)

IDS = torch.arange(3, 30).unsqueeze(0)


def test_a_policy_saved_in_bfloat16_is_loaded_in_float32(tiny_model: Path, tmp_path: Path) -> None:
    load_policy(tiny_model).to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in load_policy(tmp_path).parameters()} == {torch.float32}
    assert {p.dtype for p in load_policy(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_offloaded_tensors_give_the_same_gradients_and_weights_are_not_among_them(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    model = load_policy(tiny_model)
    pinned: set[torch.Size] = set()
    empty = torch.empty

    def watched(size: torch.Size, *, pin_memory: bool, **settings: Any) -> Any:
        pinned.add(size)
        return empty(size, **settings)

    gradients = []
    for around in (nullcontext(), offloaded(model)):
        model.zero_grad()
        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty", watched)
            with around:
                loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert pinned
    assert not pinned & {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}


def test_a_checkpoint_that_lacks_weights_is_not_filled_up_with_random_ones(tmp_path: Path) -> None:
    model = build_tiny_checkpoint(tmp_path / "model")
    file = model / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(file).items() if not name.endswith("1.mlp.up_proj.weight")}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"has no weights for model\.layers\.1\.mlp\.up_proj\.weight, which would be random"
    ):
        load_policy(model)


def noisy(directory: Path, kind: str) -> Path:
    """A checkpoint that was trained with dropout of one half."""
    if kind == "llama":  # a number that each attention layer copies from the configuration
        return build_tiny_checkpoint(directory, attention_dropout=0.5)
    from transformers import GPT2Config, GPT2LMHeadModel  # modules, and numbers

    sizes = {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_loaded_policy_trains_without_dropout(tmp_path: Path, kind: str) -> None:
    policy = load_policy(noisy(tmp_path, kind)).train()
    with torch.no_grad():
        assert torch.equal(policy(IDS).logits, policy(IDS).logits)


def test_a_model_with_capped_attention_is_loaded_with_the_attention_that_caps(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 8}
    Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)).save_pretrained(tmp_path)
    assert load_policy(tmp_path).config._attn_implementation == "eager"


@pytest.mark.parametrize("tied", [True, False])
def test_an_empty_model_has_its_buffers_and_ties_for_weights_that_are_sent(tmp_path: Path, tied: bool) -> None:
    path = build_tiny_checkpoint(tmp_path, tie_word_embeddings=tied)
    empty, whole = load_policy(path, empty=True, dtype=torch.bfloat16), load_policy(path, dtype=torch.bfloat16)
    assert (empty.lm_head.weight is empty.model.embed_tokens.weight) == tied
    for (name, buffer), (expected, value) in zip(empty.named_buffers(), whole.named_buffers(), strict=True):
        assert name == expected
        assert torch.equal(buffer, value)
    empty.load_state_dict(whole.state_dict())  # as those that are sent
    assert {p.dtype for p in empty.parameters()} == {torch.bfloat16}
    assert torch.equal(empty.eval()(IDS).logits, whole.eval()(IDS).logits)


@pytest.mark.parametrize(
    ("kernels", "installed", "used"),
    [("none", True, False), ("auto", False, False), ("auto", True, True), ("liger", True, True)],
)
def test_kernels_are_ligers_but_for_the_head_and_the_loss(
    monkeypatch: pytest.MonkeyPatch, kernels: str, installed: bool, used: bool
) -> None:
    calls: list[tuple[str, dict[str, bool]]] = []
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: installed)
    monkeypatch.setattr("transformers.integrations.liger.apply_liger_kernel", lambda *call: calls.append(call))
    use_kernels("model", kernels)
    assert calls == [("model", {"cross_entropy": False, "fused_linear_cross_entropy": False})] * used


# Adapters


def adapted(path: Path, **settings: Any) -> Any:
    return with_new_adapter(
        load_policy(path), **{"r": 2, "alpha": 6, "target_modules": "all-linear", "quantize": "none", **settings}
    )


def test_a_new_adapter_changes_nothing_and_nothing_else_is_trained(tiny_model: Path) -> None:
    model = adapted(tiny_model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, load_policy(tiny_model)(IDS).logits)
    trained = {name.split(".")[-4]: p for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name}
    # All linear modules but the head.
    assert trained.keys() == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_an_adapter_adds_its_product_scaled_by_alpha_over_r(tiny_model: Path) -> None:
    model = adapted(tiny_model, target_modules=["v_proj"])
    layer = model.get_base_model().model.layers[0].self_attn.v_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # [2, 64], [32, 2]
    torch.nn.init.normal_(b)
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), x @ (layer.base_layer.weight + 6 / 2 * b @ a).T, atol=1e-5, rtol=1e-5)


def test_a_saved_adapter_is_loaded_onto_its_base(tiny_model: Path, tmp_path: Path) -> None:
    model = adapted(tiny_model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    assert adapter_base(tmp_path) == str(tiny_model)
    assert adapter_base(tiny_model) is None
    loaded = load_policy(tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)
        with loaded.disable_adapter():
            assert torch.equal(loaded(IDS).logits, load_policy(tiny_model)(IDS).logits)
    again = load_policy(tmp_path, trainable=True, dtype=torch.bfloat16)
    kinds = {("lora_" in name, p.requires_grad, p.dtype) for name, p in again.named_parameters()}
    assert kinds == {(True, True, torch.float32), (False, False, torch.bfloat16)}


# Averages


def checkpoint(directory: Path, files: dict[str, dict[str, torch.Tensor]]) -> Path:
    directory.mkdir()
    for name, tensors in files.items():
        save_file(tensors, directory / name, metadata={"format": "pt"})
    return directory


def test_an_average_by_hand_wherever_the_tensors_are_kept(tmp_path: Path) -> None:
    a, b = torch.tensor([4.0, 8.0]), torch.tensor([[2.0]])
    first = checkpoint(tmp_path / "first", {"model.safetensors": {"a": a, "b": b}})
    second = checkpoint(
        tmp_path / "second",
        {"model-1.safetensors": {"a": torch.tensor([0.0, -8.0])}, "model-2.safetensors": {"b": torch.tensor([[10.0]])}},
    )
    output = tmp_path / "output"
    output.mkdir()
    average_checkpoints(first, second, decay=0.75, output=output)
    assert load_file(output / "model-1.safetensors")["a"].tolist() == [3.0, 4.0]
    assert load_file(output / "model-2.safetensors")["b"].tolist() == [[4.0]]
    assert not (output / "model.safetensors").exists()


def test_an_average_is_taken_in_float32_and_rounded_once(tmp_path: Path) -> None:
    one, other = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0 + 2**-7], dtype=torch.bfloat16)
    first = checkpoint(tmp_path / "first", {"model.safetensors": {"a": one}})
    second = checkpoint(tmp_path / "second", {"model.safetensors": {"a": other}})
    output = tmp_path / "output"
    output.mkdir()
    # decay itself has no place in bfloat16: 0.999 would be 1. 1 + 0.6 / 128 rounds up to 1 + 1 / 128.
    average_checkpoints(first, second, decay=0.4, output=output)
    found = load_file(output / "model.safetensors")["a"]
    assert found.dtype == torch.bfloat16
    assert found.item() == 1.0 + 2**-7


def test_an_average_is_a_checkpoint_with_the_second_ones_files_and_none_of_its_rounds(
    tiny_model: Path, tmp_path: Path
) -> None:
    first, second, output = build_tiny_checkpoint(tmp_path / "first", seed=5), tmp_path / "second", tmp_path / "output"
    build_tiny_checkpoint(second)
    for name in ("MANIFEST.json", "train_log.jsonl", "train.json", "optimizer.pt"):
        (second / name).write_text("{}")
    output.mkdir()
    average_checkpoints(first, second, decay=0.5, output=output)
    assert {p.name for p in output.iterdir()} == {p.name for p in first.iterdir()}
    assert json.loads((output / "config.json").read_text()) == json.loads((second / "config.json").read_text())
    assert (output / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()
    mixed, one, other = (load_policy(path).state_dict() for path in (output, first, second))
    for name, tensor in mixed.items():
        torch.testing.assert_close(tensor, (one[name] + other[name]) / 2, atol=1e-7, rtol=0)


OLD = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize(
    ("in_config", "in_generation"),
    [(OLD, {}), ({"max_length": 20, "do_sample": True}, {}), ({}, OLD), (OLD, OLD), ({}, {})],
)
def test_generation_settings_that_cannot_be_saved_keep_no_policy_from_being_saved(
    tmp_path: Path, in_config: dict[str, Any], in_generation: dict[str, Any], beside: bool
) -> None:
    source = build_tiny_checkpoint(tmp_path / "model")
    config, generation = source / "config.json", source / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | in_config))
    ends = {name: json.loads(config.read_text()).get(name) for name in ("eos_token_id", "pad_token_id")}
    if beside:
        own = {k: v for k, v in json.loads(generation.read_text()).items() if k != "_from_model_config"}
        generation.write_text(json.dumps(own | in_generation))
    else:
        generation.unlink()
    model = load_policy(source)
    make_savable(model)
    model.save_pretrained(tmp_path / "saved")
    saved = load_policy(tmp_path / "saved")
    assert torch.equal(saved(IDS).logits, model(IDS).logits)
    assert {name: getattr(saved.generation_config, name) for name in ends} == ends


def test_what_could_be_saved_is_saved_as_it_was(tiny_model: Path, tmp_path: Path) -> None:
    model = load_policy(tiny_model)
    model.save_pretrained(tmp_path / "before")
    assert make_savable(model) is False
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
