"""Log-probabilities of completions against the plainest computation: one row at a time, unpadded, in float64."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from iterdpo.collate import Batch, collate
from iterdpo.logps import completion_logps, load_policy, score_completions
from iterdpo.testing import build_tiny_checkpoint

Rows = list[list[int]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large random weights: with the usual small ones a model barely looks at its context, and any mistake passes."""
    return build_tiny_checkpoint(tmp_path_factory.mktemp("sharp-model"), initializer_range=0.3)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return load_policy(checkpoint).eval()


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def rows() -> tuple[Rows, Rows]:
    """Nine prompts and completions of 1 to 30 tokens."""
    draw = random.Random(0)

    def ids(length: int) -> list[int]:
        return [draw.randrange(3, 259) for _ in range(length)]

    prompts = [ids(n) for n in (1, 7, 12, 3, 30, 5, 5, 1, 16)]
    return prompts, [ids(n) for n in (1, 9, 2, 30, 4, 1, 11, 15, 16)]


def plain(exact: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    logits = exact(torch.tensor([prompt + completion])).logits[0]  # [T, V]
    logps = logits - logits.exp().sum(dim=-1, keepdim=True).log()
    terms = [logps[len(prompt) + t - 1, token] for t, token in enumerate(completion)]
    return torch.stack(terms).sum()


def all_plain(exact: Any, rows: tuple[Rows, Rows]) -> list[float]:
    with torch.no_grad():
        return [plain(exact, p, c).item() for p, c in zip(*rows, strict=True)]


def test_padded_rows_agree_with_each_row_computed_alone_in_float64(
    model: Any, exact: Any, rows: tuple[Rows, Rows]
) -> None:
    with torch.no_grad():
        got = completion_logps(model, collate(*rows))
    assert got.shape == (9,)
    assert got.tolist() == pytest.approx(all_plain(exact, rows), abs=1e-4)


def test_another_prompt_gives_another_value_so_the_tolerance_of_these_tests_means_something(
    exact: Any, rows: tuple[Rows, Rows]
) -> None:
    prompts, completions = rows
    others = all_plain(exact, ([[*p[:-1], (p[-1] + 100) % 259] for p in prompts], completions))
    differences = [abs(a - b) for a, b in zip(all_plain(exact, rows), others, strict=True)]
    assert min(differences) > 1e-2


@pytest.mark.parametrize("pad_token_id", [0, 77, 258])
@pytest.mark.parametrize("wider", [0, 16, 64])
def test_padding_changes_nothing(model: Any, rows: tuple[Rows, Rows], pad_token_id: int, wider: int) -> None:
    prompts, completions = rows
    batch = collate(prompts, completions, pad_token_id=pad_token_id)
    batch = Batch(
        torch.nn.functional.pad(batch.input_ids, (0, wider), value=pad_token_id),
        torch.nn.functional.pad(batch.completion_mask, (0, wider), value=False),
        batch.first,
    )
    with torch.no_grad():
        torch.testing.assert_close(
            completion_logps(model, batch), completion_logps(model, collate(*rows)), atol=1e-4, rtol=0
        )


def test_the_other_rows_of_a_batch_change_nothing(model: Any, rows: tuple[Rows, Rows]) -> None:
    with torch.no_grad():
        together = completion_logps(model, collate(*rows)).tolist()
        alone = [completion_logps(model, collate([p], [c])).item() for p, c in zip(*rows, strict=True)]
    assert together == pytest.approx(alone, abs=1e-4)


def test_prompts_are_not_counted_and_tokens_add_up(model: Any) -> None:
    # log p(abc|x) = log p(a|x) + log p(bc|xa): what moves from completion to prompt leaves the sum
    x, a, bc = [40, 50, 60], [70], [80, 90]
    with torch.no_grad():
        whole, first, rest = completion_logps(model, collate([x, x, x + a], [a + bc, a, bc])).tolist()
    assert whole == pytest.approx(first + rest, abs=1e-4)


def test_the_probabilities_of_all_one_token_completions_sum_to_1(model: Any) -> None:
    with torch.no_grad():
        logps = completion_logps(model, collate([[40, 50]] * 259, [[token] for token in range(259)]))
    assert logps.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_gradients_agree_with_those_of_the_rows_computed_alone_in_float64(
    model: Any, exact: Any, rows: tuple[Rows, Rows]
) -> None:
    weights = torch.linspace(-1, 1, 9, dtype=torch.float64)
    got = torch.autograd.grad((completion_logps(model, collate(*rows)) * weights).sum(), list(model.parameters()))
    loss = torch.stack([plain(exact, p, c) for p, c in zip(*rows, strict=True)]) @ weights
    expected = torch.autograd.grad(loss, list(exact.parameters()))
    for one, other in zip(got, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_a_model_that_returns_all_logits_whatever_is_asked_gives_the_same(model: Any, rows: tuple[Rows, Rows]) -> None:
    def unheeding(*, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> Any:
        return model(input_ids=input_ids, use_cache=use_cache)

    with torch.no_grad():
        torch.testing.assert_close(
            completion_logps(unheeding, collate(*rows)), completion_logps(model, collate(*rows)), atol=1e-4, rtol=0
        )


def test_logits_are_asked_of_the_model_only_where_a_completion_may_be(model: Any) -> None:
    asked = []

    def spy(**arguments: Any) -> Any:
        asked.append(arguments["logits_to_keep"])
        return model(**arguments)

    with torch.no_grad():
        completion_logps(spy, collate([[5] * 10, [6] * 12], [[7] * 3, [8] * 2]))
    assert asked == [16 - 9]  # of 16 positions, from the last token of the shorter prompt on


def test_a_policy_saved_in_bfloat16_is_loaded_in_float32(checkpoint: Path, tmp_path: Path) -> None:
    load_policy(checkpoint).to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in load_policy(tmp_path).parameters()} == {torch.float32}


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
    ids = torch.arange(3, 30).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(policy(ids).logits, policy(ids).logits)


@pytest.mark.parametrize("rows_per_batch", [2, 4, 32])
def test_scores_come_in_the_order_asked_however_the_rows_are_batched(
    checkpoint: Path, exact: Any, rows: tuple[Rows, Rows], rows_per_batch: int
) -> None:
    done: list[int] = []
    scores = score_completions(
        checkpoint, *rows, precision="fp32", rows_per_batch=rows_per_batch, on_progress=done.append
    )
    assert scores == pytest.approx(all_plain(exact, rows), abs=1e-4)
    assert done == sorted(done)
    assert done[-1] == 9


def test_scores_in_bf16_are_near_those_in_float64(tiny_model: Path, rows: tuple[Rows, Rows]) -> None:
    from transformers import AutoModelForCausalLM

    exact = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()
    assert score_completions(tiny_model, *rows) == pytest.approx(all_plain(exact, rows), rel=5e-3)
