"""Attention over rows of trees, in which a prompt goes through the network once for all of its completions.

A batch is one row of N tokens: the prompts of all trees, then all their branches (completions), and at least one token of
padding. Positions restart after the prompt in every branch. A token sees the prompt of its tree and the tokens before it
in its own branch. Everything but attention works on single tokens, so nothing else in a model has to change.
It is registered with transformers as the attention implementation `TREE`. No library has it: torch's own kernels take a
CPU two to three times as long on these masks.

On a CPU it is dense attention over a few padded blocks, with its own backward pass (`_Blocked`). On a GPU it is two calls
of FlashAttention, which torch has for sequences of any lengths and compiles for none of them (`_Joined`). What these
calls cannot do (float32, a soft cap, a sliding window shorter than a tree) is FlexAttention on a GPU; its kernels are
compiled, once for all lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

TREE = "iterdpo_tree"
PAD_MULTIPLE = 16
FEW_TOKENS = 1024  # up to which dense blocks cost a GPU less than compiling FlexAttention

_layout: TreeLayout | None = None
windows: list[int | None] = []  # the sliding window of each layer that has run with this layout, in order


def register() -> None:
    """Make `model.set_attn_implementation(TREE)` known to transformers."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(TREE, tree_attention)  # and no function for masks: the layout is the mask


def layout_in_use() -> TreeLayout | None:
    """The layout of the row that `use_layout` set last; it stays set when rows of another kind follow."""
    return _layout


def use_layout(layout: TreeLayout) -> None:
    """Set the layout of the row that goes through the model next.

    It stays in use through the backward pass, in which gradient checkpointing runs the layers again.
    """
    global _layout
    _layout = layout
    windows.clear()


def tree_attention(
    module: Any,
    query: Tensor,  # [1, H, N, d]
    key: Tensor,  # [1, G, N, d], G key-value heads
    value: Tensor,  # [1, G, N, d]
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # [1, N, H, d]
    """Attention within the trees of the layout in use, as transformers calls an attention implementation.

    Raises:
        NotImplementedError: the model asks for something that this does not compute.
    """
    layout = _layout
    unsupported = [name for name in ("s_aux", "position_bias", "head_mask", "cache") if kwargs.get(name) is not None]
    if layout is None or len(query) != 1 or attention_mask is not None or dropout or unsupported:
        raise NotImplementedError(f"tree attention with {unsupported or 'a mask, dropout or several rows'}")
    windows.append(sliding_window)
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = None if sliding_window is not None and sliding_window >= layout.reach else sliding_window
    if device == "cuda" and _flash_can(query, value, window, softcap):
        output = _Joined.apply(*(t.squeeze(0).transpose(0, 1) for t in (query, key, value)), layout, scale)
        return output.unsqueeze(0), None
    if device == "cuda" and query.shape[2] > FEW_TOKENS:
        return _flex(query, key, value, layout, scale, window, softcap).transpose(1, 2), None
    # Not `t[0]`, which is copied in the backward pass.
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query * scale, key, value))
    output = _Blocked.apply(q, k, v, layout, window, softcap)
    return output.view(1, -1, query.shape[1], value.shape[-1]), None


@dataclass(frozen=True, slots=True)
class Block:
    """Queries and keys of dense attention, b items padded to equal lengths; padding points at the row's last token."""

    queries: Tensor  # [b, Q], indices into the row
    keys: Tensor  # [b, C]
    mask: Tensor  # [b, Q, C], True if the query sees the key


@dataclass(frozen=True, slots=True)
class Sequences:
    """Tokens as sequences that follow each other, as FlashAttention is told of them."""

    ends: Tensor  # [S + 1] int32: 0, and where each sequence ends
    longest: int

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device) -> Sequences:
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return Sequences(moved(ends, device), max(lengths))


@dataclass(frozen=True)
class TreeLayout:
    """The tree, branch and position of each token of a row; what each way of computing needs is made when it is asked.

    The last token is padding.
    """

    trees: tuple[tuple[int, tuple[int, ...]], ...]  # a prompt's length, and its branches'
    tree: Tensor  # [N], number of the token's tree; -1 for padding
    branch: Tensor  # [N], number of its branch in the whole row, from 1; 0 for a prompt; -1 for padding
    position: Tensor  # [N], its position in prompt and branch
    read: Tensor  # [R], the tokens whose next token is a branch's: the last layer's output is read there alone

    @cached_property
    def reach(self) -> int:
        """Tokens of the longest prompt with one of its branches."""
        return max(prompt + max(lengths, default=0) for prompt, lengths in self.trees)

    def make_sequences(self) -> None:
        """Make now what FlashAttention is told."""
        _ = self.own, self.prompts, self.branches, self.spans

    @cached_property
    def spans(self) -> tuple[slice, slice]:
        """Where in the row the prompts are, and where the branches."""
        middle = sum(prompt for prompt, _ in self.trees)
        return slice(middle), slice(middle, middle + sum(sum(lengths) for _, lengths in self.trees))

    @cached_property
    def own(self) -> Sequences:
        """All of the row: each prompt, each branch and the padding is a sequence of its own."""
        lengths = [*(prompt for prompt, _ in self.trees), *(length for _, own in self.trees for length in own)]
        return Sequences.of([*lengths, len(self.tree) - sum(lengths)], self.tree.device)

    @cached_property
    def prompts(self) -> Sequences:
        """The first of `spans`; a sequence is a tree's."""
        return Sequences.of([prompt for prompt, _ in self.trees], self.tree.device)

    @cached_property
    def branches(self) -> Sequences:
        """The second of `spans`; a sequence is a tree's."""
        return Sequences.of([sum(own) for _, own in self.trees], self.tree.device)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The prompts, and the branches with their prompts, for dense attention."""
        found: tuple[Block, ...] = moved(_blocks(self.trees, len(self.tree)), self.tree.device)
        return found

    @cached_property
    def query_slot(self) -> Tensor:
        """[N], the token's position in the concatenated block queries; out of range for padding."""
        return _slots([block.queries for block in self.blocks], len(self.tree)).squeeze(1).to(self.tree.device)

    @cached_property
    def key_slots(self) -> Tensor:
        """[N, J], its positions in the concatenated block keys, padded with an out-of-range index."""
        return _slots([block.keys for block in self.blocks], len(self.tree)).to(self.tree.device)

    @cached_property
    def mask_cache(self) -> dict[Any, Any]:
        """Masks that the first layer makes from the layout, for the layers after it."""
        return {}


def moved(value: Any, device: torch.device | str) -> Any:
    """`value` with the tensors in its dataclasses and tuples on `device`. The work that a GPU has is not waited for."""
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    if not isinstance(value, Tensor):
        return value
    if torch.device(device).type == "cuda" and not value.is_cuda:
        return value.contiguous().pin_memory().to(device, non_blocking=True)
    return value.to(device)


def tree_layout(trees: Sequence[tuple[int, Sequence[int]]], width: int) -> TreeLayout:
    """The layout of trees, each a prompt's length and its branches' lengths, in a row of `width` tokens."""
    parts = [  # number of the tree, whether a branch, position of the first token, length
        *((number, 0, 0, prompt) for number, (prompt, _) in enumerate(trees)),
        *((number, 1, prompt, length) for number, (prompt, lengths) in enumerate(trees) for length in lengths),
    ]
    tree, own, first, lengths = np.array(parts).T
    fill = width - lengths.sum()
    assert fill > 0, "no room for the padding"
    branch = own.cumsum() * own
    before = lengths.cumsum() - lengths

    def of_tokens(values: np.ndarray, padding: int) -> Tensor:
        return torch.from_numpy(np.append(values.repeat(lengths), np.full(fill, padding)))

    position = of_tokens(first - before, 0)
    position[:-fill] += torch.arange(width - fill)
    last = np.zeros(width - fill, dtype=bool)
    last[lengths.cumsum() - 1] = True
    read = torch.from_numpy(np.flatnonzero(last != own.repeat(lengths)))  # a prompt's last, a branch's all but its last
    return TreeLayout(
        tuple((prompt, tuple(own)) for prompt, own in trees), of_tokens(tree, -1), of_tokens(branch, -1), position, read
    )


def _blocks(trees: Sequence[tuple[int, Sequence[int]]], width: int) -> tuple[Block, ...]:
    pad, end = width - 1, sum(prompt for prompt, _ in trees)
    prompts: list[range] = []  # token indices
    branches = []
    for prompt, lengths in trees:
        first = prompts[-1].stop if prompts else 0
        prompts.append(range(first, first + prompt))
        for length in lengths:
            branches.append((prompts[-1], range(end, end + length)))
            end += length
    p, c = _rounded(max(map(len, prompts))), _rounded(max(len(own) for _, own in branches))
    prompt_of_branch = _padded([tokens for tokens, _ in branches], p, pad)
    queries, own = _padded(prompts, p, pad), _padded([tokens for _, tokens in branches], c, pad)
    causal = [torch.ones(n, n, dtype=torch.bool).tril() for n in (p, c)]
    # Keys after those that a query sees are padding. Padding itself sees something, so that nothing becomes NaN.
    sees_prompt = (prompt_of_branch != pad).unsqueeze(1).expand(-1, c, -1)
    sees_own = causal[1].expand(len(branches), c, c)
    return (
        Block(queries, queries, causal[0].expand(len(prompts), p, p)),
        Block(own, torch.cat((prompt_of_branch, own), dim=1), torch.cat((sees_prompt, sees_own), dim=2)),
    )


def _rounded(length: int) -> int:
    return -(-length // PAD_MULTIPLE) * PAD_MULTIPLE


def _padded(rows: Sequence[range], width: int, pad: int) -> Tensor:
    padded = torch.full((len(rows), width), pad)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = torch.arange(row.start, row.stop)
    return padded


def _slots(blocks: Sequence[Tensor], width: int) -> Tensor:
    """[width, J]: each token's positions in the concatenated blocks, padded with an out-of-range index."""
    flat = torch.cat([block.flatten() for block in blocks]).tolist()
    slots: list[list[int]] = [[] for _ in range(width)]
    for slot, token in enumerate(flat):
        if token != width - 1:
            slots[token].append(slot)
    most = max(map(len, slots))
    return torch.tensor([own + [len(flat)] * (most - len(own)) for own in slots])


class _Blocked(torch.autograd.Function):
    """softmax(scale * Q K^T) V over the blocks of a layout. The weights are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,  # [N, H, d]
        key: Tensor,  # [N, G, d], G key-value heads
        value: Tensor,  # [N, G, d]
        layout: TreeLayout,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:  # [N, H, d]
        ctx.save_for_backward(query, key, value)
        ctx.settings = (layout, window, softcap)
        outputs = []
        for number, block in enumerate(layout.blocks):
            q, k, v = _read(query, key, value, block)
            weights, _ = _weights(q, k, layout, number, window, softcap)
            outputs.append(_rows(torch.bmm(weights, v), block.queries))
        return _gathered(outputs, layout.query_slot)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        layout, window, softcap = ctx.settings
        for_query, for_key, for_value = [], [], []
        for number, block in enumerate(layout.blocks):
            q, k, v = _read(query, key, value, block)
            weights, slope = _weights(q, k, layout, number, window, softcap)
            g = _grouped(gradients[0], block.queries, key)
            for_value.append(_rows(torch.bmm(weights.transpose(1, 2), g), block.keys))
            change = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), weights, -1, weights.dtype)
            if slope is not None:
                change *= slope
            for_query.append(_rows(torch.bmm(change, k), block.queries))
            for_key.append(_rows(torch.bmm(change.transpose(1, 2), q), block.keys))
        return (
            _gathered(for_query, layout.query_slot),
            _gathered(for_key, layout.key_slots),
            _gathered(for_value, layout.key_slots),
            *[None] * 3,
        )


def _read(query: Tensor, key: Tensor, value: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of the block's products: [b * G, (H / G) * Q, d] and twice [b * G, C, d]."""
    return _grouped(query, block.queries, key), _grouped(key, block.keys, key), _grouped(value, block.keys, key)


def _weights(
    q: Tensor, k: Tensor, layout: TreeLayout, number: int, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """[b * G, (H / G) * Q, C], and the slope of the soft cap if there is one."""
    scores, slope = torch.bmm(q, k.transpose(1, 2)), None
    if softcap is not None:
        scores = scores.div_(softcap).tanh_()
        slope = 1 - scores.square()
        scores *= softcap
    bias = _bias(layout, number, window, scores.dtype)  # [b, Q, C]
    seen = scores.view(len(bias), -1, *bias.shape[1:])
    seen += bias.unsqueeze(1)
    return scores.softmax(dim=-1), slope


def _bias(layout: TreeLayout, number: int, window: int | None, dtype: torch.dtype) -> Any:
    """[b, Q, C]: 0 if the query sees the key, otherwise -inf."""
    bias = layout.mask_cache.get((number, window, dtype))
    if bias is None:
        block = layout.blocks[number]
        mask = block.mask
        if window is not None:
            position = layout.position
            mask = mask & (position[block.queries].unsqueeze(2) - position[block.keys].unsqueeze(1) < window)
        bias = torch.zeros(mask.shape, device=mask.device, dtype=dtype).masked_fill_(~mask, -math.inf)
        layout.mask_cache[number, window, dtype] = bias
    return bias


def _grouped(rows: Tensor, index: Tensor, key: Tensor) -> Tensor:
    """Rows [N, H, d] at [b, Q] as [b * G, (H / G) * Q, d]: the heads that share keys become rows of one product."""
    b, q = index.shape
    picked = rows.index_select(0, index.flatten()).view(b, q, key.shape[1], -1, rows.shape[-1])
    return picked.permute(0, 2, 3, 1, 4).reshape(b * key.shape[1], -1, rows.shape[-1])


def _rows(grouped: Tensor, index: Tensor) -> Tensor:
    """The way back: [b * G, (H / G) * Q, d] as [b * Q, H, d]."""
    b, q = index.shape
    rows = grouped.view(b, -1, q, grouped.shape[-1]).transpose(1, 2)
    return rows.reshape(b * q, *rows.shape[2:])


def _gathered(blocks: list[Tensor], slots: Tensor) -> Tensor:
    """[N, H, d], each token's sum over its slots [N, J] in the blocks' rows; zero if it has none."""
    rows = torch.cat([*blocks, blocks[0].new_zeros(1, *blocks[0].shape[1:])])
    if slots.ndim == 1:
        return rows.index_select(0, slots)
    return rows.index_select(0, slots.flatten()).view(*slots.shape, *rows.shape[1:]).sum(dim=1)


def _flash_can(query: Tensor, value: Tensor, window: int | None, softcap: float | None) -> bool:
    """Whether torch's FlashAttention computes this: NVIDIA from Ampere on, half precision, heads of up to 256."""
    size = query.shape[-1]
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and size == value.shape[-1]
        and size % 8 == 0
        and size <= 256
        and window is None
        and softcap is None
        and _has_flash(query.device)
    )


@cache
def _has_flash(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


class _Joined(torch.autograd.Function):
    """softmax(scale * Q K^T) V over trees: within each prompt and each branch, and from the branches to their prompt.

    Of a query with keys in two parts, each part's attention o_i with the log-sum-exp l_i of its scores gives the whole:

        l = log(e^l_1 + e^l_2),    o = o_1 + e^(l_2 - l) (o_2 - o_1)

    In the backward pass each part is told the whole's o and l, with which its weights e^(s - l) and gradients are those
    of the whole, as in ring attention (Liu et al., arXiv:2310.01889).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,  # [N, H, d]
        key: Tensor,  # [N, G, d], G key-value heads
        value: Tensor,  # [N, G, d]
        layout: TreeLayout,
        scale: float,
    ) -> Tensor:  # [N, H, d]
        output, lse, own_state = _flash(query, key, value, layout.own, layout.own, scale, causal=True)
        prompts, branches = layout.spans
        of_branches = query[branches], key[prompts], value[prompts], layout.branches, layout.prompts
        part, part_lse, state = _flash(*of_branches, scale, causal=False)
        own_lse = lse[:, branches]
        share = torch.sigmoid(part_lse - own_lse).T.unsqueeze(2)  # [M, H, 1], of the prompt
        output[branches].lerp_(part, share.to(part.dtype))
        lse[:, branches] = torch.logaddexp(own_lse, part_lse)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.settings = (layout, scale, own_state, state)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        layout, scale, own_state, state = ctx.settings
        g = gradients[0].contiguous()
        inputs = (g, query, key, value, output, lse)
        for_own = _flash_backward(*inputs, own_state, layout.own, layout.own, scale, causal=True)
        prompts, branches = layout.spans
        spans = (branches, prompts, prompts)
        of_branches = (t[span] for t, span in zip((query, key, value), spans, strict=True))
        inputs = (g[branches], *of_branches, output[branches], lse[:, branches].contiguous())
        for_part = _flash_backward(*inputs, state, layout.branches, layout.prompts, scale, causal=False)
        for whole, some, span in zip(for_own, for_part, spans, strict=True):
            whole[span] += some
        return (*for_own, None, None)


State = tuple[Tensor, ...]  # of FlashAttention 2's random numbers, which nothing draws from without dropout


@cache
def _flash_3(device: torch.device) -> Any:
    """The calls of FlashAttention 3, which is for Hopper's GPUs, if it is installed and this is one; else None."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    try:
        import flash_attn_3._C  # noqa: F401  # registers them
    except ImportError:
        return None
    return torch.ops.flash_attn_3


def _as_named(queries: Sequences, keys: Sequences, scale: float, causal: bool) -> dict[str, Any]:
    """What both calls of FlashAttention 3 are told, by its names."""
    return {
        "cu_seqlens_q": queries.ends,
        "cu_seqlens_k": keys.ends,
        "max_seqlen_q": queries.longest,
        "max_seqlen_k": keys.longest,
        "softmax_scale": scale,
        "is_causal": causal,
    }


def _flash(
    query: Tensor, key: Tensor, value: Tensor, queries: Sequences, keys: Sequences, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor, State]:
    """Attention of each sequence of queries to the keys of its number: [T, H, d], and log-sum-exps [H, T] in float32."""
    if (flash_3 := _flash_3(query.device)) is not None:
        # Several splits would be added in no certain order.
        output, lse, *_ = flash_3.fwd(query, key, value, **_as_named(queries, keys, scale, causal), num_splits=1)
        return output, lse, ()
    lengths = (queries.ends, keys.ends, queries.longest, keys.longest)
    output, lse, *state, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, *lengths, 0.0, causal, False, scale=scale
    )
    return output, lse, tuple(state)


def _flash_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    state: State,
    queries: Sequences,
    keys: Sequences,
    scale: float,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for query, key and value."""
    if (flash_3 := _flash_3(query.device)) is not None:
        made = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
        # What it returns differs between its versions.
        flash_3.bwd(gradient, query, key, value, output, lse, *made, **_as_named(queries, keys, scale, causal))
        return made
    lengths = (queries.ends, keys.ends, queries.longest, keys.longest)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        gradient, query, key, value, output, lse, *lengths, 0.0, causal, *state, scale=scale
    )
    return found


@cache
def _compiled() -> tuple[Callable[..., Tensor], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask, dynamic=True)


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    attend, block_mask = _compiled()
    mask = layout.mask_cache.get(window)
    if mask is None:
        tree, branch, position = layout.tree, layout.branch, layout.position

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            same = (tree[q] == tree[k]) & ((branch[k] == 0) | (branch[k] == branch[q])) & (k <= q)
            return same if window is None else same & (position[q] - position[k] < window)

        width = query.shape[2]
        mask = layout.mask_cache[window] = block_mask(sees, None, None, width, width, device=query.device)

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    with torch._dynamo.config.patch(specialize_float=True):  # the backward pass takes no symbol for the soft cap
        return attend(
            query,
            key,
            value,
            score_mod=None if softcap is None else capped,
            block_mask=mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
