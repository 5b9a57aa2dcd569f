"""Log-probabilities of completions under a causal language model.

The output head that never holds all logits is by hand because the fused ones of libraries need a GPU.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from iterdpo.training import attention
from iterdpo.training.collate import Batch, Tree, collate, micro_batches, tree_sizes
from iterdpo.training.models import free_memory, load_policy
from iterdpo.training.precision import bfloat16

CHUNK_ELEMENTS = 1 << 24  # logits in memory at once: 32 MiB in bfloat16. Products of fewer rows are slower
TOKENS_AT_ONCE = 16_384  # of completions that a GPU scores together
ON_GPU = 1 << 28  # or a 256th of its memory in bytes: few products, and large ones

LogpPath = Literal["shared", "rows", "plain"]

log = logging.getLogger(__name__)


class CompletionLogps(NamedTuple):
    """Sums over each completion's tokens, in nats, and the tokens' own."""

    logps: Tensor  # [branches], with gradient
    alignment: Tensor | None  # [branches], of log pi(y_t) - log sum_v pi(v)^2, without gradient; WPO weighs by it
    token_logps: Tensor  # [M], of the branches' tokens, one branch after the other


class Scorer(torch.nn.Module):
    """A causal language model that gives log-probabilities of completions: the module that accelerate wraps.

    Three paths lead to the same numbers; `select_logp_path` finds the first that holds for a model:

        shared   one row of trees, logits at completion positions only, in chunks
        rows     a row for each completion, logits as in `shared`
        plain    a row for each completion, the model's own logits from the first completion position on
    """

    def __init__(self, model: Any, path: LogpPath = "plain") -> None:
        super().__init__()
        self.model = model
        self.config = model.config  # DeepSpeed looks for it
        self._no_split_modules = self.causal._no_split_modules  # FSDP wraps these
        if self.causal.config._attn_implementation != attention.TREE:
            self.causal._own_attention = self.causal.config._attn_implementation
        self.own_attention = self.causal._own_attention
        self.set_path(path)
        _cast_once(model)
        _read_only(self.causal, last_modules(self.causal))

    @property
    def causal(self) -> Any:
        """The transformers model, inside its adapter if it has one."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def tie_weights(self) -> None:
        """FSDP asks for it after it has loaded weights."""
        self.causal.tie_weights()

    def set_path(self, path: LogpPath) -> None:
        """Compute with this path from now on."""
        self.path = path
        if path == "shared":
            attention.register()
        wanted = attention.TREE if path == "shared" else self.own_attention
        if self.causal.config._attn_implementation != wanted:
            self.causal.set_attn_implementation(wanted)

    def collate(self, trees: Sequence[Tree]) -> Batch:
        batch: Batch = attention.moved(collate(trees, shared=self.path == "shared"), self.causal.device)
        return batch

    def forward(self, batch: Batch, *, aligned: bool = False) -> CompletionLogps:
        """Log pi(y|x) of the batch's branches; `aligned` adds what WPO weighs pairs by."""
        width = batch.input_ids.shape[1]
        if self.path == "plain":
            first = int((batch.sources % width).min())
            logits = self.causal(input_ids=batch.input_ids, use_cache=False, logits_to_keep=width - first).logits
            first = width - logits.shape[1]  # a model may return all logits, whatever it was asked for
            picked = logits[batch.sources // width, batch.sources % width - first]  # [M, V]
            token_logps, log_square = _picked_logps(picked, batch.targets, aligned)
        else:
            arguments = {}
            if batch.layout is not None:
                attention.use_layout(batch.layout)
                arguments["position_ids"] = batch.position_ids
            hidden = self.causal.base_model(input_ids=batch.input_ids, use_cache=False, **arguments)[0]
            picked = hidden.flatten(0, 1).index_select(0, batch.sources)  # [M, D]
            token_logps, log_square = _chunked_logps(self.causal, picked, batch.targets, aligned)
        alignment = summed(token_logps.detach() - log_square, batch.branch, batch.branches) if aligned else None
        return CompletionLogps(summed(token_logps, batch.branch, batch.branches), alignment, token_logps)


def summed(values: Tensor, owner: Tensor, owners: int) -> Tensor:
    """[owners], each the sum of its own values.

    A GPU adds in no certain order, which shows in the last digits of a float32. In float64 it does not, so that rewards
    at step 0 are exactly 0.
    """
    kind = torch.float64 if values.is_cuda else torch.float32
    return values.new_zeros(owners, dtype=kind).index_add(0, owner, values.to(kind)).to(torch.float32)


def _cast_once(model: Any) -> None:
    """Let matrices that read the same tensor share its cast: under autocast each would make a copy."""
    if getattr(model, "_casts_once", False):
        return
    model._casts_once = True
    last: tuple[Any, int, Tensor] | None = None

    def cast(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal last
        x, *rest = inputs
        device = x.device.type
        if x.dtype != torch.float32 or not torch.is_autocast_enabled(device) or not torch.is_grad_enabled():
            return None
        if last is None or last[0]() is not x or last[1] != x._version:  # another tensor, or changed in place
            last = (weakref.ref(x), x._version, x.to(torch.get_autocast_dtype(device)))
        return (last[2], *rest)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(cast)


def last_modules(causal: Any) -> list[torch.nn.Module]:
    """What the last layer does to each token by itself after its attention: its output projection and its MLP."""
    layers = getattr(causal.base_model, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        return []
    named = (getattr(getattr(layers[-1], "self_attn", None), "o_proj", None), getattr(layers[-1], "mlp", None))
    return [module for module in named if isinstance(module, torch.nn.Module)]


def _read_only(causal: Any, modules: Sequence[torch.nn.Module]) -> None:
    """Let modules compute a row of trees only where it is read, which prompts are not; elsewhere their output is 0.

    `select_logp_path` finds out whether a model allows it.
    """

    def layout() -> attention.TreeLayout | None:
        return attention.layout_in_use() if causal.config._attn_implementation == attention.TREE else None

    def narrowed(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:  # [1, N, D] to [1, R, D]
        x, *rest = inputs
        trees = layout()
        return None if trees is None else (x.index_select(1, trees.read), *rest)

    def widened(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:  # [1, R, D'] to [1, N, D']
        if isinstance(output, tuple):  # as of some mixtures of experts, with what their router says
            return (widened(module, inputs, output[0]), *output[1:])
        if (trees := layout()) is None:
            return output
        return output.new_zeros(1, len(trees.tree), output.shape[-1]).index_copy(1, trees.read, output)

    for module in modules:
        if not getattr(module, "_reads_only", False):
            module._reads_only = True
            module.register_forward_pre_hook(narrowed)
            module.register_forward_hook(widened)


def _picked_logps(logits: Tensor, targets: Tensor, squares: bool) -> tuple[Tensor, Tensor]:
    """Log p(target) [M] and, if `squares`, log sum_v p(v)^2 [M], from logits [M, V]."""
    logps = logits.log_softmax(dim=-1, dtype=torch.float32)
    log_square = (2 * logps.detach()).logsumexp(dim=-1) if squares else logps.new_zeros(())
    return logps.gather(1, targets.unsqueeze(1)).squeeze(1), log_square


def _chunked_logps(causal: Any, hidden: Tensor, targets: Tensor, squares: bool) -> tuple[Tensor, Tensor]:
    """As `_picked_logps`, from hidden states [M, D], with the logits of a few positions in memory at a time."""
    head, config = causal.get_output_embeddings(), causal.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    chunk = max(16, chunk_elements(hidden.device) // config.vocab_size)
    if type(head) is torch.nn.Linear:
        result: tuple[Tensor, Tensor] = _Head.apply(
            hidden, head.weight, head.bias, targets, chunk, scale, softcap, squares
        )
        return result

    def some(rows: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(rows).float() * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return _picked_logps(logits, wanted, squares)

    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    logps, log_squares = zip(*(checkpoint(some, *part, use_reentrant=False) for part in parts), strict=True)
    return torch.cat(logps), torch.cat(log_squares) if squares else log_squares[0]


def chunk_elements(device: torch.device) -> int:
    """How many logits are in memory at once."""
    if device.type != "cuda":
        return CHUNK_ELEMENTS
    memory = int(torch.cuda.get_device_properties(device).total_memory)
    return min(ON_GPU, memory >> 8)


class _Head(torch.autograd.Function):
    """The output head's log-probabilities of targets. Logits exist for a chunk at a time, and again in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [M, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [M]
        chunk: int,
        scale: float,
        softcap: float | None,
        squares: bool,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        rows, matrix = hidden.to(dtype), weight.to(dtype)
        ctx.save_for_backward(rows, matrix, bias, targets)
        ctx.settings = (chunk, scale, softcap, hidden.dtype, weight.dtype)
        logps, log_squares = [], []
        small = max(1, chunk // 4)  # in float32 here, and twice
        for part, wanted in zip(rows.split(small), targets.split(small), strict=True):
            logits, _ = _logits(part, matrix, bias, scale, softcap)
            picked, log_square = _picked_logps(logits, wanted, squares)
            logps.append(picked)
            log_squares.append(log_square)
        log_square = torch.cat(log_squares) if squares else log_squares[0]
        ctx.mark_non_differentiable(log_square)
        return torch.cat(logps), log_square

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # gradient [M]
        rows, matrix, bias, targets = ctx.saved_tensors
        chunk, scale, softcap, hidden_dtype, weight_dtype = ctx.settings
        for_rows, for_weight, for_bias = [], None, None
        summed = torch.promote_types(weight_dtype, torch.float32)
        for part, wanted, g in zip(rows.split(chunk), targets.split(chunk), gradient.split(chunk), strict=True):
            logits, slope = _logits(part, matrix, bias, scale, softcap)
            change = logits.softmax(dim=-1).mul_(-g.to(logits.dtype).unsqueeze(1))  # d logp / d logits is 1[v = y] - p
            change.scatter_add_(1, wanted.unsqueeze(1), g.to(logits.dtype).unsqueeze(1))
            if slope is not None:
                change *= slope
            if scale != 1.0:
                change *= scale
            for_rows.append(change @ matrix)
            if ctx.needs_input_grad[1]:
                product = change.T @ part
                for_weight = product.to(summed) if for_weight is None else for_weight.add_(product)
            if bias is not None and ctx.needs_input_grad[2]:
                total = change.sum(dim=0, dtype=bias.dtype)
                for_bias = total if for_bias is None else for_bias + total
        for_weight = for_weight.to(weight_dtype) if for_weight is not None else None
        return torch.cat(for_rows).to(hidden_dtype), for_weight, for_bias, *[None] * 5


def _logits(
    rows: Tensor, matrix: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Logits [m, V], and the slope of the soft cap if there is one."""
    logits, slope = rows @ matrix.T, None
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits = logits.div_(softcap).tanh_()
        slope = 1 - logits.square()
        logits *= softcap
    return logits, slope


def select_logp_path(
    model: Any, trees: Sequence[Tree], *, allowed: Sequence[LogpPath] = ("shared", "rows")
) -> LogpPath:
    """The first of the `allowed` paths, or else `plain`, that gives the model's own log-probabilities of `trees`.

    `model` is a model or a `Scorer`, which may be divided among processes by FSDP2: then all of them call this. Logs why
    each faster path was rejected. The trial uses truncated trees. It runs without autocast, unless a frozen model is in
    bfloat16; on a GPU also with it, since attention in half precision has kernels of its own.
    """
    trees = [Tree(tree.prompt[-64:], [branch[:32] for branch in tree.branches]) for tree in trees]
    scorer = model if isinstance(model, Scorer) else Scorer(model)
    first = next(scorer.parameters())
    copies = first.device.type == "cuda" and not isinstance(first, DTensor)
    device, half = first.device.type, first.dtype != torch.float32
    kinds = (half, True) if device == "cuda" else (half,)
    tolerances = {half: 0.03 if half else 1e-4 for half in kinds}  # by whether in half precision; nats a token
    training = scorer.model.training
    scorer.eval()
    selected: LogpPath = "plain"

    def logps(half: bool) -> Tensor:
        with bfloat16(scorer, copies=copies) if half else nullcontext():
            found: CompletionLogps = scorer(scorer.collate(trees))
        return found.logps

    with torch.no_grad():
        expected = {half: logps(half) for half in tolerances}
        tokens = torch.tensor([len(branch) for tree in trees for branch in tree.branches], device=first.device)
        for path in allowed:
            try:
                scorer.set_path(path)
                reason = None
                for half, tolerance in tolerances.items():
                    gap = float(((logps(half) - expected[half]).abs() / tokens).max())
                    if gap > tolerance:
                        reason = f"its log-probabilities are off by up to {gap:.3g} nats a token"
                if reason is None and path == "shared":
                    reason = _unseen_windows(scorer.causal.config)
                if reason is None:
                    selected = path
                    break
            except Exception as error:  # whatever a model refuses is a reason to try the next path
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
            log.warning("%s: skipping the %r path: %s", type(scorer.causal).__name__, path, reason)
    scorer.set_path("plain")
    scorer.train(training)
    return selected


def _unseen_windows(config: Any) -> str | None:
    """Why the tree masks would differ from the model's own on rows longer than the trial; None if they would not."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    other = set(kinds or []) - {"full_attention", "sliding_attention"}
    if other:
        return f"it has layers of {', '.join(sorted(other))}"
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        kinds = ["sliding_attention"] * (config.num_hidden_layers if window else 0)
    expected = kinds.count("sliding_attention") if window else 0
    windowed = sum(window is not None for window in attention.windows)
    return None if windowed == expected else f"{windowed} of its layers have a sliding window and {expected} should"


def completion_logps(model: Any, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> Tensor:
    """Log pi(y|x) of each row in nats, summed over the completion's tokens: [R]. Uses the `plain` path."""
    scorer = Scorer(model)
    return scorer(scorer.collate([Tree(p, [c]) for p, c in zip(prompts, completions, strict=True)])).logps


def score_completions(
    policy: str | Path | torch.nn.Module,
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    *,
    precision: str = "bf16",
    rows_per_batch: int = 32,
    trust_remote_code: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> list[float]:
    """Log pi(y|x) in nats of each completion under `policy`, in the order given. Rows of similar length share a batch.

    On a GPU, batches are of trees as in training, by the fastest path that gives the model's own numbers; on a CPU, of
    `rows_per_batch` plain rows. A checkpoint is loaded on a GPU, if there is one, and freed. A model is moved there, and
    stays.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(policy, torch.nn.Module):
        policy = load_policy(policy, device=device, trust_remote_code=trust_remote_code)
    model = policy.to(device).eval()
    scores = [0.0] * len(prompts)
    done = 0
    with bfloat16(model, copies=device == "cuda") if precision == "bf16" else nullcontext(), torch.inference_mode():
        if device == "cuda":
            batches = _tree_batches(model, prompts, completions)
        else:
            batches = _row_batches(model, prompts, completions, rows_per_batch)
        for rows, logps in batches:
            for row, logp in zip(rows, logps.tolist(), strict=True):
                scores[row] = logp
            done += len(rows)
            if on_progress is not None:
                on_progress(done)
    del policy, model
    free_memory()
    return scores


Scored = Iterator[tuple[Sequence[int], Tensor]]  # numbers of rows, and their log-probabilities


def _row_batches(
    model: Any, prompts: Sequence[list[int]], completions: Sequence[list[int]], rows_per_batch: int
) -> Scored:
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]) + len(completions[i]), i))
    for start in range(0, len(order), rows_per_batch):
        rows = order[start : start + rows_per_batch]
        yield rows, completion_logps(model, [prompts[i] for i in rows], [completions[i] for i in rows])


def _tree_batches(model: Any, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> Scored:
    rows: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(tuple(prompt), []).append(row)
    trees = [Tree(list(prompt), [completions[row] for row in own]) for prompt, own in rows.items()]
    scorer = Scorer(model, select_logp_path(model, trees[:2]))
    owners = list(rows.values())
    for batch in micro_batches(tree_sizes(trees, shared=scorer.path == "shared"), budget=TOKENS_AT_ONCE):
        yield (
            [row for tree in batch for row in owners[tree]],
            scorer(scorer.collate([trees[tree] for tree in batch])).logps,
        )
