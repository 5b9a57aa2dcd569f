"""PairRM (Jiang et al. 2023, arXiv:2306.02561): the network of `llm-blender/PairRM-hf`. Imports torch and transformers.

One row of tokens, `[CLS] <|source|> x [SEP] [CLS] <|candidate1|> a [SEP] [CLS] <|candidate2|> b [SEP]`, goes through a
DeBERTa. The encodings at the source's mark and at a candidate's, side by side, go through a small head, one value for
each task that it was trained on. The logit that the first is better is the mean difference of these values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Model, DebertaV2PreTrainedModel


class PairRM(DebertaV2PreTrainedModel):  # type: ignore[misc, unused-ignore]  # transformers is Any here
    """Named as in the checkpoint: `pretrained_model`, `head_layer.1` and `head_layer.4`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            nn.Dropout(getattr(config, "drop_out", 0.0)),
            nn.Linear(2 * width, width),
            nn.Tanh(),
            nn.Dropout(getattr(config, "drop_out", 0.0)),
            nn.Linear(width, getattr(config, "n_tasks", 1)),
        )
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B] that the first candidate is better, from ids and mask [B, T]. Each mark is there once a row."""
        encoded = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask)
        hidden = encoded.last_hidden_state  # [B, T, D]
        rows = torch.arange(len(input_ids), device=hidden.device)

        def at(mark: int) -> Tensor:  # [B, D]
            return hidden[rows, (input_ids == mark).int().argmax(dim=1)]

        config = self.config
        source, marks = at(config.source_prefix_id), (config.cand1_prefix_id, config.cand2_prefix_id)
        first, second = (self.head_layer(torch.cat([source, at(mark)], dim=-1)) for mark in marks)  # [B, tasks]
        return (first - second).mean(dim=-1)
