"""Log-probabilities of completions under a causal language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iterdpo.collate import Batch, collate

DROPOUTS = (
    *("attention_dropout", "attn_pdrop", "attn_dropout", "embd_pdrop", "embedding_dropout", "embed_dropout"),
    *("resid_pdrop", "residual_dropout", "hidden_dropout", "ffn_dropout", "activation_dropout", "dropout"),
)


def completion_logps(model: Any, batch: Batch) -> Tensor:
    """Log pi(y|x) of each row, in nats, summed over the completion's tokens: [R] from rows [R, T].

    Logits are asked of the model from the first completion position on, and turned into float32 log-probabilities
    at the completions' own positions only.
    """
    rows, width = batch.input_ids.shape
    keep = width - batch.first
    logits = model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=keep).logits[
        :, -keep:-1
    ]  # [R, keep-1, V]
    targets = batch.input_ids[:, batch.first + 1 :]
    mask = batch.completion_mask[:, batch.first + 1 :]
    selected = logits[mask].float()  # [N, V], N completion tokens in all
    token_logps = -torch.nn.functional.cross_entropy(selected, targets[mask], reduction="none")  # [N]
    row_of_token = torch.arange(rows, device=mask.device).unsqueeze(1).expand_as(mask)[mask]
    return torch.zeros(rows, device=token_logps.device).index_add(0, row_of_token, token_logps)


def load_policy(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """A checkpoint as a float32 model without dropout: preferences are learnt, and compared, without noise."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a line of progress is ours to draw
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    for section in (config, config.get_text_config()):
        for name in DROPOUTS:
            if getattr(section, name, None):
                setattr(section, name, 0.0)
    model = AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def score_completions(
    policy: str | Path,
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    *,
    precision: str = "bf16",
    rows_per_batch: int = 32,
    trust_remote_code: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> list[float]:
    """Log pi(y|x) in nats of each completion under the checkpoint `policy`, in the order given.

    Loads the model, on a GPU where there is one, and frees it. Rows of similar length share a batch.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_policy(policy, trust_remote_code=trust_remote_code).to(device).eval()
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]) + len(completions[i]), i))
    scores = [0.0] * len(prompts)
    for start in range(0, len(order), rows_per_batch):
        rows = order[start : start + rows_per_batch]
        batch = collate([prompts[i] for i in rows], [completions[i] for i in rows]).to(device)
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            logps = completion_logps(model, batch)
        for i, logp in zip(rows, logps.tolist(), strict=True):
            scores[i] = logp
        if on_progress is not None:
            on_progress(start + len(rows))
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return scores
