"""bfloat16 copies of weights: what they change in a model, and what they leave as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from iterdpo.training.precision import bfloat16, bfloat16_copies


def build(*, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=tied, num_key_value_heads=1, **size))


IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [True, False])
def test_activations_are_bfloat16_and_gradients_those_of_float32_weights(tied: bool) -> None:
    model = build(tied=tied)
    whole = copy.deepcopy(model)
    whole(input_ids=IDS, labels=IDS).loss.backward()
    seen: list[torch.dtype] = []
    model.model.norm.register_forward_hook(lambda module, inputs, output: seen.extend((inputs[0].dtype, output.dtype)))
    with bfloat16(model, copies=True):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert seen == [torch.bfloat16] * 2
    found, expected = gradients(model), gradients(whole)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() <= 0.05 * expected[name].norm(), name


def test_the_weights_are_back_and_unchanged_afterwards() -> None:
    model = build()
    before = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    with bfloat16_copies(model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(IndexError), bfloat16_copies(model):
        model(input_ids=torch.tensor([[99]]))
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] and torch.equal(after[name], values[name]) for name in before)


def test_copies_within_copies_are_the_same() -> None:
    model = build()
    with bfloat16_copies(model):
        outer = model.lm_head.weight
        with bfloat16(model, copies=True):
            assert model.lm_head.weight is outer
        assert model.lm_head.weight is outer


def test_gradients_of_micro_batches_add_up_in_float32_over_one_copy() -> None:
    model = build()
    with bfloat16_copies(model):
        for row in IDS:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=row[None], labels=row[None]).loss
            loss.backward()
    together = gradients(model)
    apart: dict[str, Tensor] = {}
    for row in IDS:
        model.zero_grad()
        with bfloat16(model, copies=True):
            model(input_ids=row[None], labels=row[None]).loss.backward()
        apart = {name: g + apart.get(name, 0) for name, g in gradients(model).items()}
    assert all(torch.equal(together[name], apart[name]) for name in apart)


def test_with_several_processes_each_weights_gradient_arrives_at_the_weight_for_ddp_to_average(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone, one_of_two = build(), build()
    with bfloat16(alone, copies=True):
        alone(input_ids=IDS, labels=IDS).loss.backward()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    arrived = {name: 0 for name, _ in one_of_two.named_parameters()}

    def count(name: str) -> Any:
        return lambda gradient: arrived.update({name: arrived[name] + (gradient is not None)})

    for name, weight in one_of_two.named_parameters():
        weight.register_hook(count(name))
    with bfloat16(one_of_two, copies=True):
        one_of_two(input_ids=IDS, labels=IDS).loss.backward()
    assert set(arrived.values()) == {1}
    expected = gradients(alone)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(one_of_two).items())


def test_gradient_checkpointing_runs_the_layers_again_over_the_copies() -> None:
    model = build()
    plain = copy.deepcopy(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for each in (model, plain):
        with bfloat16_copies(each):
            with torch.autocast("cpu", torch.bfloat16):
                loss = each(input_ids=IDS, labels=IDS, use_cache=False).loss
            loss.backward()
    expected = gradients(plain)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())


def test_frozen_weights_beside_trained_ones_have_copies_without_gradients() -> None:
    model = build(tied=False)
    for frozen in (model.lm_head.weight, model.model.embed_tokens.weight, model.model.layers[0].mlp.up_proj.weight):
        frozen.requires_grad_(False)
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    with bfloat16(model, copies=True):
        assert not model.lm_head.weight.requires_grad
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert gradients(model).keys() == expected


def test_frozen_weights_in_half_precision_stay_as_they_are() -> None:
    model = build().to(torch.bfloat16).requires_grad_(False)
    weight = model.lm_head.weight
    with bfloat16_copies(model):
        assert model.lm_head.weight is weight
