"""Log-probabilities of completions against the plainest computation: one row at a time, unpadded, in float64."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from iterdpo.testing import build_tiny_checkpoint
from iterdpo.training import logps
from iterdpo.training.collate import Tree, collate
from iterdpo.training.logps import LogpPath, Scorer, completion_logps, score_completions, select_logp_path
from iterdpo.training.models import load_policy

Rows = list[list[int]]
PATHS: list[LogpPath] = ["plain", "rows", "shared"]


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


@pytest.fixture(params=PATHS)
def scorer(request: pytest.FixtureRequest, model: Any) -> Iterator[Scorer]:
    """The model by each path."""
    scorer = Scorer(model)
    scorer.set_path(request.param)
    yield scorer
    scorer.set_path("plain")


def trees(rows: tuple[Rows, Rows]) -> list[Tree]:
    return [Tree(prompt, [completion]) for prompt, completion in zip(*rows, strict=True)]


def test_each_path_agrees_with_each_row_computed_alone_in_float64(
    scorer: Scorer, exact: Any, rows: tuple[Rows, Rows]
) -> None:
    with torch.no_grad():
        got = scorer(scorer.collate(trees(rows))).logps
    assert got.shape == (9,)
    assert got.tolist() == pytest.approx(all_plain(exact, rows), abs=1e-4)


def test_completions_of_one_prompt_agree_with_each_row_computed_alone_in_float64(scorer: Scorer, exact: Any) -> None:
    prompt, completions = list(range(3, 23)), [[40, 50, 60], [40, 51], [70] * 20]
    with torch.no_grad():
        got = scorer(scorer.collate([Tree(prompt, completions), Tree(prompt[:3], completions[:1])])).logps
    rows = ([prompt] * 3 + [prompt[:3]], completions + completions[:1])
    assert got.tolist() == pytest.approx(all_plain(exact, rows), abs=1e-4)


def test_another_prompt_gives_another_value_so_the_tolerance_of_these_tests_means_something(
    exact: Any, rows: tuple[Rows, Rows]
) -> None:
    prompts, completions = rows
    others = all_plain(exact, ([[*p[:-1], (p[-1] + 100) % 259] for p in prompts], completions))
    differences = [abs(a - b) for a, b in zip(all_plain(exact, rows), others, strict=True)]
    assert min(differences) > 1e-2


@pytest.mark.parametrize("pad_token_id", [77, 258])
def test_padding_changes_nothing(scorer: Scorer, rows: tuple[Rows, Rows], pad_token_id: int) -> None:
    shared = scorer.path == "shared"
    with torch.no_grad():
        padded, other = (
            scorer(collate(trees(rows), shared=shared, pad_token_id=token)).logps for token in (0, pad_token_id)
        )
    torch.testing.assert_close(padded, other, atol=1e-4, rtol=0)


def test_the_other_rows_of_a_batch_change_nothing(scorer: Scorer, rows: tuple[Rows, Rows]) -> None:
    with torch.no_grad():
        together = scorer(scorer.collate(trees(rows))).logps.tolist()
        alone = [scorer(scorer.collate([tree])).logps.item() for tree in trees(rows)]
    assert together == pytest.approx(alone, abs=1e-4)


def test_prompts_are_not_counted_and_tokens_add_up(model: Any) -> None:
    # log p(abc|x) = log p(a|x) + log p(bc|xa): what moves from completion to prompt leaves the sum
    x, a, bc = [40, 50, 60], [70], [80, 90]
    with torch.no_grad():
        whole, first, rest = completion_logps(model, [x, x, x + a], [a + bc, a, bc]).tolist()
    assert whole == pytest.approx(first + rest, abs=1e-4)


def test_the_probabilities_of_all_one_token_completions_sum_to_1(scorer: Scorer) -> None:
    with torch.no_grad():
        logps = scorer(scorer.collate([Tree([40, 50], [[token] for token in range(259)])])).logps
    assert logps.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_gradients_agree_with_those_of_the_rows_computed_alone_in_float64(
    scorer: Scorer, exact: Any, rows: tuple[Rows, Rows]
) -> None:
    weights = torch.linspace(-1, 1, 9, dtype=torch.float64)
    got = torch.autograd.grad((scorer(scorer.collate(trees(rows))).logps * weights).sum(), list(scorer.parameters()))
    loss = torch.stack([plain(exact, p, c) for p, c in zip(*rows, strict=True)]) @ weights
    expected = torch.autograd.grad(loss, list(exact.parameters()))
    for one, other in zip(got, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_logits_are_asked_of_the_model_only_where_a_completion_may_be(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, forward = [], model.forward

    def spy(**arguments: Any) -> Any:
        asked.append(arguments["logits_to_keep"])
        return forward(**arguments)

    monkeypatch.setattr(model, "forward", spy)
    with torch.no_grad():
        completion_logps(model, [[5] * 10, [6] * 12], [[7] * 3, [8] * 2])
    assert asked == [16 - 9]  # of 16 positions, from the last token of the shorter prompt on


def test_a_model_that_returns_all_logits_whatever_is_asked_gives_the_same(
    model: Any, rows: tuple[Rows, Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ([[9] * 5 + prompt for prompt in rows[0]], rows[1])  # so that there is something not to ask for
    with torch.no_grad():
        expected, forward = completion_logps(model, *rows), model.forward
        monkeypatch.setattr(
            model, "forward", lambda *, input_ids, use_cache, **unheeded: forward(input_ids, use_cache=use_cache)
        )
        torch.testing.assert_close(completion_logps(model, *rows), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("path", PATHS)
def test_under_autocast_gradients_are_near_those_in_float32(
    model: Any, rows: tuple[Rows, Rows], path: LogpPath
) -> None:
    some = [Tree(rows[0][4], rows[1][3:6]), Tree(rows[0][1], rows[1][:2])]
    weights = torch.linspace(-1, 2, 5)
    found = []
    for enabled in (False, True):
        scorer = Scorer(model)
        scorer.set_path(path)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logps = scorer(scorer.collate(some)).logps
        found.append((logps, torch.autograd.grad((logps * weights).sum(), list(model.parameters()))))
        scorer.set_path("plain")
    (exact, gradients), (rounded, others) = found
    assert rounded.dtype == torch.float32
    assert ((exact - rounded).abs() / exact.abs()).max() < 0.03
    for one, other in zip(gradients, others, strict=True):
        assert other.dtype == torch.float32
        assert (one - other).norm() < 0.2 * one.norm()


def test_wpos_alignment_is_the_mean_over_what_the_policy_may_sample(
    scorer: Scorer, exact: Any, rows: tuple[Rows, Rows]
) -> None:
    def aligned(prompt: list[int], completion: list[int]) -> float:
        total = 0.0
        for t, token in enumerate(completion):
            p = exact(torch.tensor([prompt + completion[:t]])).logits[0, -1].softmax(dim=-1)
            total += float(p[token].log() - (p * p).sum().log())
        return total

    rows = (rows[0][:4], [completion[:6] for completion in rows[1][:4]])
    with torch.no_grad():
        expected = [aligned(*row) for row in zip(*rows, strict=True)]
    found = scorer(scorer.collate(trees(rows)), aligned=True)
    assert found.alignment.tolist() == pytest.approx(expected, abs=1e-4)
    assert not found.alignment.requires_grad
    assert scorer(scorer.collate(trees(rows))).alignment is None
    assert found.logps.tolist() == pytest.approx(all_plain(exact, rows), abs=1e-4)


# The paths


def test_a_path_that_is_not_allowed_is_not_taken(model: Any, rows: tuple[Rows, Rows]) -> None:
    assert select_logp_path(model, trees(rows)) == "shared"
    assert select_logp_path(model, trees(rows), allowed=("rows",)) == "rows"
    assert select_logp_path(model, trees(rows), allowed=()) == "plain"


def test_a_model_whose_logits_are_not_its_heads_of_its_hidden_states_takes_the_plain_path(
    model: Any, rows: tuple[Rows, Rows], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward = model.forward

    def twice(**arguments: Any) -> Any:
        found = forward(**arguments)
        found.logits = 2 * found.logits
        return found

    monkeypatch.setattr(model, "forward", twice)
    assert select_logp_path(model, trees(rows)) == "plain"
    assert [record.getMessage().partition(":")[2].partition(" its")[0] for record in caplog.records] == [
        " skipping the 'shared' path:",
        " skipping the 'rows' path:",
    ]


def test_a_model_that_fails_in_one_row_goes_in_rows_and_its_error_is_logged(
    model: Any, rows: tuple[Rows, Rows], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward = model.model.forward

    def strict(*, input_ids: Tensor, use_cache: bool) -> Any:
        return forward(input_ids=input_ids, use_cache=use_cache)

    monkeypatch.setattr(type(model.model), "forward", lambda self, **arguments: strict(**arguments))
    monkeypatch.setattr(
        model,
        "forward",
        lambda **arguments: SimpleNamespace(
            logits=model.lm_head(strict(input_ids=arguments["input_ids"], use_cache=False)[0])[
                :, -arguments["logits_to_keep"] :
            ]
        ),
    )
    assert select_logp_path(model, trees(rows)) == "rows"
    assert "skipping the 'shared' path: TypeError: " in caplog.text
    assert "unexpected keyword argument 'position_ids'" in caplog.text


# The head, in chunks

V, D, M = 40, 6, 50


def head(dtype: torch.dtype, *, bias: bool = False, **config: Any) -> tuple[Any, Tensor, Tensor]:
    """A causal model's end, hidden states [M, D] and targets [M]."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(D, V, bias=bias, dtype=dtype)
    for parameter in linear.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=dtype)
    settings = SimpleNamespace(vocab_size=V, **config)
    settings.get_text_config = lambda: settings
    causal = SimpleNamespace(get_output_embeddings=lambda: linear, config=settings, head=linear)
    hidden = torch.randn(M, D, generator=generator, dtype=dtype, requires_grad=True)
    return causal, hidden, torch.randint(V, (M,), generator=generator)


def whole(causal: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of targets from all logits at once, as the models themselves compute them."""
    logits, config = causal.head(hidden), causal.config
    logits = logits * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    if hasattr(config, "final_logit_softcapping"):
        logits = config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping)
    return logits.log_softmax(dim=-1)[torch.arange(len(targets)), targets]


HEADS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"logit_scale": 0.25},
    {"logits_scaling": 3.0, "bias": True},
    {"final_logit_softcapping": 2.0},
    {"final_logit_softcapping": 2.0, "logit_scale": 0.5, "bias": True},
]


@pytest.mark.parametrize("elements", [1, 17 * V, 25 * V, 1 << 20])  # 16, 17, 25 and all 50 positions at a time
@pytest.mark.parametrize("settings", HEADS)
def test_the_head_in_chunks_gives_what_all_logits_at_once_give(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], elements: int
) -> None:
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", elements)
    causal, hidden, targets = head(torch.float64, **settings)
    gradient = torch.linspace(-1, 2, M)
    wanted = [hidden, *causal.head.parameters()]
    got, _ = logps._chunked_logps(causal, hidden, targets, False)
    expected = whole(causal, hidden, targets)
    torch.testing.assert_close(got, expected.float(), atol=2e-6, rtol=1e-6)  # log-probabilities are float32
    ours = torch.autograd.grad((got * gradient).sum(), wanted)
    theirs = torch.autograd.grad((expected * gradient).sum(), wanted)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("settings", HEADS)
def test_the_heads_backward_pass_is_the_derivative(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", 1)
    of = torch.Tensor.log_softmax
    # Differences of float32 say nothing.
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda self, dim, dtype: of(self, dim))
    causal, hidden, targets = head(torch.float64, **settings)

    def some(hidden: Tensor, *parameters: Tensor) -> Tensor:
        ours = torch.nn.Linear(D, V, bias=len(parameters) > 1, dtype=torch.float64)
        for name, parameter in zip(("weight", "bias"), parameters, strict=False):
            delattr(ours, name)
            setattr(ours, name, parameter)
        causal.get_output_embeddings = lambda: ours
        return logps._chunked_logps(causal, hidden, targets[:18], False)[0]

    arguments = [p.detach().clone().requires_grad_() for p in (hidden[:18], *causal.head.parameters())]
    assert torch.autograd.gradcheck(some, arguments)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same_one() -> None:
    causal, hidden, targets = head(torch.float64, bias=True)
    (expected,) = torch.autograd.grad(whole(causal, hidden, targets).sum(), [hidden])
    causal.head.requires_grad_(False)
    logps._chunked_logps(causal, hidden, targets, False)[0].sum().backward()
    torch.testing.assert_close(hidden.grad, expected, atol=1e-12, rtol=0)
    assert causal.head.weight.grad is None
    assert causal.head.bias.grad is None


def test_a_head_that_is_more_than_a_matrix_is_run_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", 1)
    causal, hidden, targets = head(torch.float32, final_logit_softcapping=2.0, logit_scale=0.5)
    wanted = [hidden, causal.head.weight]
    expected = whole(causal, hidden, targets)
    theirs = torch.autograd.grad((expected * torch.linspace(-1, 2, M)).sum(), wanted)
    causal.get_output_embeddings = lambda: torch.nn.Sequential(causal.head)
    got, log_square = logps._chunked_logps(causal, hidden, targets, True)
    ours = torch.autograd.grad((got * torch.linspace(-1, 2, M)).sum(), wanted)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert log_square.shape == (M,)


@pytest.mark.parametrize("elements", [1, 1 << 20])
def test_the_policys_own_mean_probability_comes_with_the_head(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", elements)
    causal, hidden, targets = head(torch.float32, logit_scale=0.3)
    _, log_square = logps._chunked_logps(causal, hidden, targets, True)
    p = (causal.head(hidden) * 0.3).softmax(dim=-1)
    torch.testing.assert_close(log_square, (p * p).sum(dim=-1).log(), atol=1e-5, rtol=0)
    assert not log_square.requires_grad


class Largest(TorchDispatchMode):
    """The most elements that any tensor has which an operation returns."""

    elements = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operation(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return found


@pytest.mark.parametrize("settings", HEADS)
@pytest.mark.parametrize("aligned", [False, True])
def test_no_more_logits_than_a_chunks_are_ever_in_memory(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], aligned: bool
) -> None:
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", 20 * V)
    causal, hidden, targets = head(torch.float32, **settings)
    with Largest() as largest:
        logps._chunked_logps(causal, hidden, targets, aligned)[0].sum().backward()
    assert largest.elements == 20 * V  # hidden states are 50 * 6 and the matrix is 40 * 6
    with Largest() as largest:
        whole(causal, hidden, targets)
    assert largest.elements == M * V  # what is counted does show all logits at once


# Scores


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


@pytest.mark.parametrize("at_once", [1, 30, 1 << 14])
def test_scores_in_trees_as_on_a_gpu_are_those_of_the_rows(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, exact: Any, rows: tuple[Rows, Rows], at_once: int
) -> None:
    monkeypatch.setattr(logps, "_row_batches", lambda *arguments: logps._tree_batches(*arguments[:3]))
    monkeypatch.setattr(logps, "TOKENS_AT_ONCE", at_once)
    done: list[int] = []
    scores = score_completions(checkpoint, *rows, precision="fp32", on_progress=done.append)
    assert scores == pytest.approx(all_plain(exact, rows), abs=1e-4)
    assert (done, done[-1]) == (sorted(done), 9)


def test_scores_in_bf16_are_near_those_in_float64(tiny_model: Path, rows: tuple[Rows, Rows]) -> None:
    from transformers import AutoModelForCausalLM

    exact = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()
    assert score_completions(tiny_model, *rows) == pytest.approx(all_plain(exact, rows), rel=5e-3)


def test_a_branch_with_given_tokens_is_its_answer_after_prompt_and_reasoning(scorer: Scorer, exact: Any) -> None:
    prompt, thoughts, answers = [40, 50, 60], [[70, 71], [80, 81, 82], []], [[90, 91], [92], [93, 94, 95]]
    branches = [thought + answer for thought, answer in zip(thoughts, answers, strict=True)]
    with torch.no_grad():
        got = scorer(scorer.collate([Tree(prompt, branches, (2, 3, 0))])).logps
    rows = ([prompt + thought for thought in thoughts], answers)
    assert got.tolist() == pytest.approx(all_plain(exact, rows), abs=1e-4)
