"""Rows of trees: the layout by hand, the attention against torch's own, whole models against plain rows."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from iterdpo.training import attention
from iterdpo.training.attention import TREE, Sequences, TreeLayout, tree_attention, tree_layout, use_layout
from iterdpo.training.collate import Tree
from iterdpo.training.logps import Scorer, _read_only, select_logp_path

VOCAB = 60
SHAPE = [(5, [3, 6]), (2, [1]), (7, [4, 4, 2])]  # prompts and their branches; 34 tokens


@pytest.fixture(autouse=True)
def no_layout_is_left_behind() -> Iterator[None]:
    yield
    attention._layout = None
    attention.windows.clear()


# The layout


def test_a_layout_by_hand() -> None:
    layout = tree_layout([(1, [2]), (2, [1, 2])], 10)
    # tokens              x  X  X  y  y  a  b  b  .  .
    assert layout.tree.tolist() == [0, 1, 1, 0, 0, 1, 1, 1, -1, -1]
    assert layout.branch.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, -1, -1]
    assert layout.position.tolist() == [0, 0, 1, 1, 2, 2, 2, 3, 0, 0]
    assert layout.read.tolist() == [0, 2, 3, 6]  # x y: after x, y; X Y: after Y, and after the first of bb
    assert layout.spans == (slice(3), slice(3, 8))
    prompts, branches = layout.blocks
    pad = [9]
    assert prompts.queries.tolist() == [[0, *pad * 15], [1, 2, *pad * 14]]
    assert torch.equal(prompts.keys, prompts.queries)
    assert branches.queries.tolist() == [[3, 4, *pad * 14], [5, *pad * 15], [6, 7, *pad * 14]]
    assert branches.keys[:, :16].tolist() == [[0, *pad * 15], [1, 2, *pad * 14], [1, 2, *pad * 14]]
    assert torch.equal(branches.keys[:, 16:], branches.queries)
    # The last branch's second token sees the prompt's two tokens, the first of its own, and itself.
    assert branches.mask[2, 1].nonzero().flatten().tolist() == [0, 1, 16, 17]


def test_a_layout_says_where_each_token_is_among_the_blocks() -> None:
    layout = tree_layout([(1, [2]), (2, [1, 2])], 10)
    queries = torch.cat([block.queries.flatten() for block in layout.blocks])  # 2 * 16 + 3 * 16
    keys = torch.cat([block.keys.flatten() for block in layout.blocks])  # 2 * 16 + 3 * 32
    assert queries[layout.query_slot[:8]].tolist() == list(range(8))
    assert layout.query_slot[8:].tolist() == [80, 80]
    assert layout.key_slots.shape == (10, 3)  # a token of the second prompt is read by itself and by two branches
    for token, places in enumerate(layout.key_slots.tolist()):
        found = [place for place in places if place < 128]
        assert [int(keys[place]) for place in found] == [token] * len(found)
        assert len(found) == [2, 3, 3, 1, 1, 1, 1, 1, 0, 0][token]
        assert set(places) - set(found) <= {128}


def test_a_row_without_room_for_padding_is_refused() -> None:
    with pytest.raises(AssertionError, match="no room for the padding"):
        tree_layout([(2, [2])], 4)


# Attention


def seen(shape: list[tuple[int, list[int]]], window: int | None) -> Tensor:
    """[n, n]: the mask spelled out, token by token, from each token's ancestors."""
    ancestors: list[list[int]] = []
    prompts = []
    for prompt, _ in shape:
        prompts.append(range(len(ancestors), len(ancestors) + prompt))
        ancestors += [[*prompts[-1][: i + 1]] for i in range(prompt)]
    for own, (_, lengths) in zip(prompts, shape, strict=True):
        for length in lengths:
            path = [*own]
            for _ in range(length):
                path = [*path, len(ancestors)]
                ancestors.append(path)
    mask = torch.zeros(len(ancestors), len(ancestors), dtype=torch.bool)
    for query, keys in enumerate(ancestors):
        mask[query, keys[-window:] if window else keys] = True
    return mask


def inputs(groups: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, TreeLayout]:
    generator = torch.Generator().manual_seed(0)
    width = 40
    q, k, v = (torch.randn(1, h, width, 8, generator=generator, dtype=dtype) for h in (4, groups, groups))
    return q, k, v, tree_layout(SHAPE, width)


def torchs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    if softcap is None:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = softcap * torch.tanh(scale * torch.einsum("bhqd,bhkd->bhqk", q, k) / softcap)
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_tree_attention_is_torchs_with_the_mask_spelled_out(
    groups: int, window: int | None, softcap: float | None
) -> None:
    q, k, v, layout = inputs(groups)
    n, scale = 34, 0.3
    for t in (q, k, v):
        t.requires_grad_()
    expected = torchs(q[:, :, :n], k[:, :, :n], v[:, :, :n], seen(SHAPE, window), scale, softcap)
    use_layout(layout)
    got, _ = tree_attention(None, q, k, v, None, scaling=scale, sliding_window=window, softcap=softcap)
    assert got.shape == (1, 40, 4, 8)
    torch.testing.assert_close(got.transpose(1, 2)[:, :, :n], expected, atol=1e-12, rtol=0)
    assert not got[:, n:].any()  # padding
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad((got.transpose(1, 2)[:, :, :n] * gradient).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * gradient).sum(), (q, k, v))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def spelled_out(queries: Sequences, keys: Sequences, causal: bool) -> Tensor:
    """[Tq, Tk]: the mask of sequences as FlashAttention is told of them."""
    mask = torch.zeros(int(queries.ends[-1]), int(keys.ends[-1]), dtype=torch.bool)
    starts = zip(itertools.pairwise(queries.ends.tolist()), itertools.pairwise(keys.ends.tolist()), strict=True)
    for (q, q_end), (k, k_end) in starts:
        block = torch.ones(q_end - q, k_end - k, dtype=torch.bool)
        mask[q:q_end, k:k_end] = block.tril() if causal else block
        assert q_end - q <= queries.longest
        assert k_end - k <= keys.longest
    return mask


def flash_scores(q: Tensor, k: Tensor, queries: Sequences, keys: Sequences, scale: float, causal: bool) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = scale * torch.einsum("qhd,khd->hqk", q, k)
    return scores.masked_fill(~spelled_out(queries, keys, causal), -torch.inf)


def flash(
    q: Tensor, k: Tensor, v: Tensor, queries: Sequences, keys: Sequences, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """torch's FlashAttention, which needs a GPU."""
    scores = flash_scores(q, k, queries, keys, scale, causal)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    output = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v)
    return output, scores.logsumexp(dim=-1), (torch.zeros(1), torch.zeros(1))


def flash_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, state: Any, *sequences: Any, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's gradients as it computes them: from the output and the log-sum-exp that it is given."""
    queries, keys, scale = sequences
    weights = (flash_scores(q, k, queries, keys, scale, causal) - lse.unsqueeze(2)).exp()
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    k, every_v = (t.repeat_interleave(groups[1], dim=1) for t in (k, v))
    delta = (g * output).sum(dim=-1).T.unsqueeze(2)
    change = scale * weights * (torch.einsum("qhd,khd->hqk", g, every_v) - delta)
    for_k, for_v = torch.einsum("hqk,qhd->khd", change, q), torch.einsum("hqk,qhd->khd", weights, g)
    return torch.einsum("hqk,khd->qhd", change, k), *(t.unflatten(1, groups).sum(dim=2) for t in (for_k, for_v))


class Flash3:
    """FlashAttention 3's calls, which need a GPU of Hopper's, by their names and arguments."""

    @staticmethod
    def told(settings: dict[str, Any]) -> tuple[Sequences, Sequences, float]:
        ends = settings["cu_seqlens_q"], settings["cu_seqlens_k"]
        queries, keys = map(Sequences, ends, (settings["max_seqlen_q"], settings["max_seqlen_k"]))
        return queries, keys, settings["softmax_scale"]

    def fwd(self, q: Tensor, k: Tensor, v: Tensor, *, num_splits: int, **settings: Any) -> list[Tensor]:
        assert num_splits == 1  # several are added in no certain order
        output, lse, _ = flash(q, k, v, *self.told(settings), causal=settings["is_causal"])
        return [output, lse, q.new_zeros(0), q.new_zeros(0)]

    def bwd(self, *tensors: Tensor, **settings: Any) -> list[Tensor]:
        inputs, outputs = tensors[:6], tensors[6:]
        for output, made in zip(
            outputs, flash_backward(*inputs, (), *self.told(settings), causal=settings["is_causal"]), strict=True
        ):
            output.copy_(made)
        return [torch.zeros(0)] * 5


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_two_calls_of_flash_attention_joined_are_attention_over_trees(
    monkeypatch: pytest.MonkeyPatch, groups: int, version: int
) -> None:
    if version == 2:
        monkeypatch.setattr(attention, "_flash", flash)
        monkeypatch.setattr(attention, "_flash_backward", flash_backward)
    else:
        monkeypatch.setattr(attention, "_flash_3", lambda device: Flash3())
    q, k, v, layout = inputs(groups)
    n, scale = 34, 0.3
    for t in (q, k, v):
        t.requires_grad_()
    expected = torchs(q[:, :, :n], k[:, :, :n], v[:, :, :n], seen(SHAPE, None), scale, None)
    got = attention._Joined.apply(*(t[0].transpose(0, 1) for t in (q, k, v)), layout, scale).transpose(0, 1)
    torch.testing.assert_close(got[None, :, :n], expected, atol=1e-12, rtol=0)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad((got[None, :, :n] * gradient).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * gradient).sum(), (q, k, v))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "size", "window", "softcap", "can"),
    [
        (torch.bfloat16, 64, None, None, True),
        (torch.float16, 256, None, None, True),
        (torch.float32, 64, None, None, False),
        (torch.bfloat16, 100, None, None, False),
        (torch.bfloat16, 512, None, None, False),
        (torch.bfloat16, 64, 100, None, False),
        (torch.bfloat16, 64, None, 30.0, False),
    ],
)
def test_what_flash_attention_cannot_compute_is_computed_otherwise(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    size: int,
    window: int | None,
    softcap: float | None,
    can: bool,
) -> None:
    monkeypatch.setattr(attention, "_has_flash", lambda device: True)
    rows = torch.zeros(1, 2, 3, size, dtype=dtype)
    assert attention._flash_can(rows, rows, window, softcap) is can


@pytest.mark.parametrize(("window", "used"), [(11, None), (10, 10)])
def test_a_window_counts_only_if_a_prompt_with_a_branch_is_longer(window: int, used: int | None) -> None:
    layout = tree_layout([(5, [3, 6]), (9, [1])], 32)
    use_layout(layout)
    q, k, v = (torch.zeros(1, 2, 32, 8) for _ in range(3))
    tree_attention(None, q, k, v, None, sliding_window=window)
    assert {seen for _, seen, _ in layout.mask_cache} == {used}


def test_a_layout_makes_no_blocks_before_they_are_asked_for() -> None:
    layout = attention.moved(tree_layout(SHAPE, 40), "cpu")
    assert not {"blocks", "query_slot", "key_slots"} & vars(layout).keys()


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (2, 1.5)])
def test_the_backward_pass_is_the_derivative(window: int | None, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = tree_layout([(2, [1, 2]), (1, [2])], 10)
    q, k, v = (torch.randn(10, h, 3, generator=generator, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention._Blocked.apply(q, k, v, layout, window, softcap)[:8]  # what no loss reads has no gradient

    assert torch.autograd.gradcheck(attend, (q, k, v))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.filterwarnings("ignore")
def test_flex_attention_sees_the_same(
    monkeypatch: pytest.MonkeyPatch, groups: int, window: int | None, softcap: float | None
) -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    monkeypatch.setattr(attention, "_compiled", lambda: (flex_attention, create_block_mask))  # a GPU's kernel is not
    q, k, v, layout = inputs(groups, torch.float32)
    n = 34
    expected = torchs(q[:, :, :n], k[:, :, :n], v[:, :, :n], seen(SHAPE, window), 0.3, softcap)
    got = attention._flex(q, k, v, layout, 0.3, window, softcap)
    torch.testing.assert_close(got[:, :, :n], expected, atol=1e-5, rtol=0)
    assert got.isfinite().all()
    again = attention._flex(q, k, v, layout, 0.3, window, softcap)  # with the mask that the layout keeps
    assert torch.equal(got, again)


@pytest.mark.filterwarnings("ignore")
def test_flex_attention_with_a_soft_cap_is_traced_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)  # it refuses gradients on a CPU
    traced = torch.compile(flex_attention.flex_attention, dynamic=True, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(attention, "_compiled", lambda: (traced, flex_attention.create_block_mask))
    q, k, v, layout = inputs(4, torch.float32)
    for softcap in (1.5, 30.0):
        got = attention._flex(q.requires_grad_(), k, v, layout, 0.3, None, softcap)
        expected = torchs(q[:, :, :34], k[:, :, :34], v[:, :, :34], seen(SHAPE, None), 0.3, softcap)
        torch.testing.assert_close(got[:, :, :34], expected, atol=1e-5, rtol=0)
        assert got.requires_grad


def test_a_layer_with_a_window_and_one_without_keep_their_masks_apart() -> None:
    q, k, v, layout = inputs(2)
    use_layout(layout)
    for window in (None, 3, None, 3):
        got, _ = tree_attention(None, q, k, v, None, sliding_window=window)
        expected = torchs(q[:, :, :34], k[:, :, :34], v[:, :, :34], seen(SHAPE, window), 8**-0.5, None)
        torch.testing.assert_close(got.transpose(1, 2)[:, :, :34], expected, atol=1e-12, rtol=0)
    assert attention.windows == [None, 3, None, 3]


def test_under_autocast_attention_is_in_bfloat16() -> None:
    q, k, v, layout = inputs(2, torch.float32)
    use_layout(layout)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = tree_attention(None, q, k, v, None)
    assert got.dtype == torch.bfloat16
    exact, _ = tree_attention(None, q, k, v, None)
    torch.testing.assert_close(got.float(), exact, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    "asked",
    [{"dropout": 0.1}, {"s_aux": torch.ones(4)}, {"position_bias": torch.ones(4)}, {"attention_mask": torch.ones(1)}],
)
def test_what_tree_attention_does_not_compute_is_refused(asked: dict[str, Any]) -> None:
    q, k, v, layout = inputs(2)
    use_layout(layout)
    mask = asked.pop("attention_mask", None)
    with pytest.raises(NotImplementedError, match="tree attention with"):
        tree_attention(None, q, k, v, mask, **asked)


def test_several_rows_or_no_layout_are_refused() -> None:
    q, k, v, layout = inputs(2)
    with pytest.raises(NotImplementedError):
        tree_attention(None, q, k, v, None)
    use_layout(layout)
    with pytest.raises(NotImplementedError):
        tree_attention(None, *(t.expand(2, -1, -1, -1) for t in (q, k, v)), None)


# Whole models

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "head_dim": 8}
UNDROPPED = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
ONE_ROW = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": 8},
    "Gemma2": {**MIXED, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "Gemma3": {**MIXED, "query_pre_attn_scalar": 8},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, **UNDROPPED},
    "GPTNeoX": {},
    "Granite": {"logits_scaling": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "Cohere": {"logit_scale": 0.2},
    "Phi": {"num_key_value_heads": 4},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}
MAMBA = {"state_size": 8, "n_groups": 1, "head_dim": 8, "num_heads": 8, "chunk_size": 8}
HYBRID = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
NOT_ONE_ROW = {
    "Bloom": {"n_layer": 2, "n_head": 4, "hidden_size": 32},  # the position is a bias of its attention
    "Mamba2": {**MAMBA, "num_hidden_layers": 1, "hidden_size": 32},  # a state goes from token to token
    "FalconH1": {**HYBRID, "num_hidden_layers": 1, "head_dim": 8, "mamba_chunk_size": 8},
}


@cache
def built(name: str) -> Any:
    """A model with large random weights: with the usual small ones it barely looks at its context."""
    own = {**ONE_ROW, **NOT_ONE_ROW}[name]
    shared = {k: v for k, v in SIZES.items() if name not in ("GPT2", "Bloom", "Mamba2") or k.endswith("_id")}
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    cls = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config(**{"vocab_size": VOCAB, **shared, **own})).float().eval()
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.2)
            else:
                parameter.data += 0.1 * torch.randn_like(parameter)  # biases and norms are all different too
    if name == "Gemma2":
        model.set_attn_implementation("eager")  # as load_policy does: sdpa has no soft cap
    return model


@cache
def trees() -> list[Tree]:
    draw = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, VOCAB) for _ in range(draw.randint(low, high))]

    return [Tree(ids(5, 30), [ids(2, 20) for _ in range(count)]) for count in (2, 1, 3)]


def logps_and_gradients(scorer: Scorer, trees: list[Tree]) -> tuple[Tensor, dict[str, Tensor]]:
    scorer.zero_grad(set_to_none=True)
    logps = scorer(scorer.collate(trees)).logps
    (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
    gradients = {name: p.grad.clone() for name, p in scorer.named_parameters() if p.grad is not None}
    scorer.zero_grad(set_to_none=True)
    return logps.detach(), gradients


def assert_the_same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=0)
    assert one[1].keys() == other[1].keys()
    size = torch.stack([g.norm() for g in other[1].values()]).max()
    for name, gradient in other[1].items():
        # Below a millionth of the largest, what is left is rounding: a gradient that is zero in exact arithmetic.
        bound = 1e-5 * max(gradient.norm(), 1e-2 * size)
        assert (one[1][name] - gradient).norm() <= bound, name


def test_the_last_layer_computes_what_is_read_and_no_more() -> None:
    scorer = Scorer(built("Llama"))
    scorer.set_path("shared")
    given: list[int] = []
    hook = scorer.causal.model.layers[-1].mlp.gate_proj.register_forward_pre_hook(
        lambda _, x: given.append(x[0].shape[1])
    )
    scorer(scorer.collate([Tree([1, 2, 3, 4], [[5], [6, 7, 8]])]))
    assert given == [3]  # after the prompt, after 6 and after 7
    scorer.set_path("rows")
    scorer(scorer.collate([Tree([1, 2, 3, 4], [[5], [6, 7, 8]])]))
    assert given == [3, 16]
    hook.remove()


def test_an_mlp_that_says_more_than_its_output_computes_what_is_read_too() -> None:
    layout = tree_layout([(3, [2])], 8)  # read after the prompt, and after the branch's first token
    use_layout(layout)

    class Routed(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            assert x.shape == (1, 2, 4)
            return x + 1, "routed"

    routed, causal = Routed(), built("Llama")
    _read_only(causal, [routed])
    _read_only(causal, [routed])
    assert len(routed._forward_hooks) == len(routed._forward_pre_hooks) == 1
    wanted, causal.config._attn_implementation = causal.config._attn_implementation, TREE
    output, more = routed(torch.ones(1, 8, 4))
    causal.config._attn_implementation = wanted
    assert more == "routed"
    assert output[0, :, 0].tolist() == [2 if i in (2, 3) else 0 for i in range(8)]


@pytest.mark.parametrize("name", ONE_ROW)
def test_one_row_gives_the_models_own_log_probabilities_and_gradients(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = built(name)
    assert select_logp_path(model, trees()) == "shared"
    assert not [record for record in caplog.records if record.name == "iterdpo.training.logps"]
    scorer = Scorer(model)
    plain = logps_and_gradients(scorer, trees())
    scorer.set_path("shared")
    assert_the_same(logps_and_gradients(scorer, trees()), plain)
    scorer.set_path("rows")
    assert_the_same(logps_and_gradients(scorer, trees()), plain)


@pytest.mark.parametrize("name", NOT_ONE_ROW)
def test_a_model_that_is_not_only_attention_goes_in_rows_and_it_is_said_why(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = built(name)
    with caplog.at_level(logging.WARNING, "iterdpo.training.logps"):
        assert select_logp_path(model, trees()[1:]) == "rows"
    (message,) = [record.getMessage() for record in caplog.records if record.name == "iterdpo.training.logps"]
    assert message.startswith(f"{name}ForCausalLM: skipping the 'shared' path: its log-probabilities are off by up to")
    scorer = Scorer(model)
    plain = logps_and_gradients(scorer, trees()[1:2])
    scorer.set_path("rows")
    assert_the_same(logps_and_gradients(scorer, trees()[1:2]), plain)


def test_a_window_longer_than_the_trees_that_are_tried_is_kept_too() -> None:
    config = transformers.MistralConfig(**{**SIZES, "sliding_window": 120})
    model = transformers.MistralForCausalLM(config)
    assert select_logp_path(model, trees()) == "shared"
    model.config.sliding_window = None  # what the numbers of short trees would not show
    for layer in model.model.layers:
        layer.self_attn.config = transformers.MistralConfig(**SIZES, sliding_window=None)
    model.config.sliding_window = 120
    assert select_logp_path(model, trees()) == "rows"


def test_layers_of_another_kind_are_not_taken_for_full_attention(caplog: pytest.LogCaptureFixture) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.config.layer_types = ["chunked_attention", "full_attention"]
    assert select_logp_path(model, trees()) == "rows"
    assert "it has layers of chunked_attention" in caplog.text


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "down_proj", "lm_head"]])
def test_an_adapters_gradients_are_the_same_in_one_row(target_modules: str | list[str]) -> None:
    from iterdpo.training.models import with_new_adapter

    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    base.load_state_dict(built("Llama").state_dict())
    model = with_new_adapter(base, r=4, alpha=8, target_modules=target_modules, quantize="none")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    assert select_logp_path(model, trees()) == "shared"
    scorer = Scorer(model)
    plain = logps_and_gradients(scorer, trees())
    assert {name.split(".")[-3] for name in plain[1]} == {"lora_A", "lora_B"}
    scorer.set_path("shared")
    assert_the_same(logps_and_gradients(scorer, trees()), plain)


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "GPT2"])
def test_gradient_checkpointing_runs_the_layers_again_on_the_same_layout(name: str) -> None:
    model = built(name)
    scorer = Scorer(model)
    plain = logps_and_gradients(scorer, trees())
    scorer.set_path("shared")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    try:
        assert_the_same(logps_and_gradients(scorer, trees()), plain)
    finally:
        model.eval()
        model.gradient_checkpointing_disable()
    assert len(attention.windows) == 2 * 2  # two layers, forward and again
    scorer.set_path("plain")


def test_what_stands_in_the_padding_and_in_other_trees_changes_nothing() -> None:
    from iterdpo.training.collate import collate

    scorer = Scorer(built("Mistral"), "shared")
    with torch.no_grad():
        together = scorer(collate(trees(), shared=True)).logps
        padded = scorer(collate(trees(), shared=True, pad_token_id=17)).logps
        alone = torch.cat([scorer(collate([tree], shared=True)).logps for tree in trees()])
    scorer.set_path("plain")
    assert torch.equal(together, padded)
    torch.testing.assert_close(alone, together, atol=0, rtol=1e-5)


def test_a_prompt_of_one_token_and_a_branch_of_one_token_are_trees_too() -> None:
    scorer = Scorer(built("Llama"))
    small = [Tree([5], [[7]]), Tree([6], [[8], [9, 10]]), Tree([6] * 16, [[8] * 16])]
    plain = logps_and_gradients(scorer, small)
    scorer.set_path("shared")
    assert built("Llama").config._attn_implementation == TREE
    assert_the_same(logps_and_gradients(scorer, small), plain)
    scorer.set_path("plain")


def test_trying_the_paths_leaves_the_model_as_it_was() -> None:
    model = built("Qwen2")
    model.train()
    before = model.config._attn_implementation
    assert select_logp_path(model, trees(), allowed=("rows",)) == "rows"
    select_logp_path(model, trees())
    assert (model.config._attn_implementation, model.training) == (before, True)
    model.eval()
