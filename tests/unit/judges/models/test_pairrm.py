"""PairRM's head is that of its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from iterdpo.errors import JudgeError
from iterdpo.testing import make_group
from judges.models.pair_ranker import PairRanker


def test_a_logit_is_the_difference_of_the_candidates_heads(
    pairrm: Path, pairrm_logit: Callable[[Path, list[int]], float]
) -> None:
    import torch

    from judges.models.pairrm import PairRM

    rows = [[1, 3, 40, 2, 1, 4, 50, 51, 2, 1, 5, 60, 2], [1, 3, 40, 2, 1, 4, 70, 2, 1, 5, 50, 51, 2]]
    model = PairRM.from_pretrained(pairrm, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor(rows), attention_mask=torch.ones(2, 13, dtype=torch.long))
    assert logits.tolist() == pytest.approx([pairrm_logit(pairrm, row) for row in rows], abs=1e-5)


def test_a_checkpoint_without_pairrms_head_is_refused(pairrm: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in pairrm.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(pairrm / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if "head_layer" not in k},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(JudgeError, match=r"has no weights for head_layer\.1\.bias"):
        PairRanker(str(tmp_path)).judge([make_group("x", ["a", "b"])])
