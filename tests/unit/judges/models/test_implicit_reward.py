"""The implicit reward is the log-ratio of two checkpoints, over the tokens that were sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from iterdpo.errors import JudgeError
from iterdpo.judging.judge import checked_judgments
from iterdpo.testing import build_tiny_checkpoint, make_group
from iterdpo.training.models import load_policy
from iterdpo.types import Completion, CompletionGroup, Prompt
from judges import check_judge, judge_version, load_judge
from judges.models.implicit_reward import ImplicitReward

END = 2  # <|im_end|>


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("other") / "other", seed=1)


def ids(checkpoint: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)(text, add_special_tokens=False)["input_ids"]


def logp(checkpoint: Path, prompt: list[int], completion: list[int]) -> float:
    """From the checkpoint's own logits, one sequence at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return sum(float(logits[len(prompt) + t - 1, token]) for t, token in enumerate(completion))


def sampled(checkpoint: Path, prompt: str, *rows: tuple[list[int], str, Any]) -> CompletionGroup:
    completions = [Completion(text, tokens, [-1.0] * len(tokens), reason) for tokens, text, reason in rows]
    return CompletionGroup(Prompt("p-1", prompt), ids(checkpoint, prompt), completions)


def test_the_reward_is_beta_times_the_log_ratio_of_the_sampled_tokens(tiny_model: Path, other: Path) -> None:
    rows = [([*ids(tiny_model, " joy"), END], " joy", "stop"), (ids(tiny_model, " a lot"), " a lot", "length")]
    group = sampled(tiny_model, "What", *rows)
    expected = [0.5 * (logp(tiny_model, group.prompt_ids, y) - logp(other, group.prompt_ids, y)) for y, _, _ in rows]
    args = {"policy": str(tiny_model), "reference": str(other), "beta": 0.5, "precision": "fp32"}
    [judgment] = checked_judgments(load_judge("implicit_reward", args), [group])
    assert judgment.scores == pytest.approx(expected, abs=1e-4)
    [judgment] = checked_judgments(load_judge("implicit_reward", {**args, "length_normalized": True}), [group])
    assert judgment.scores == pytest.approx([e / len(y) for e, (y, _, _) in zip(expected, rows, strict=True)], abs=1e-4)


def test_an_answer_is_rewarded_after_its_reasoning_and_an_unfinished_thought_is_not(
    tiny_model: Path, other: Path
) -> None:
    thought, answer = ids(tiny_model, "<think>so</think>"), [*ids(tiny_model, "\n\njoy"), END]
    parts: dict[str, Any] = {"reasoning": "<think>so</think>\n\n", "reasoning_tokens": len(thought)}
    whole = Completion("joy", [*thought, *answer], [], "stop", **parts)
    unfinished = Completion("", thought, [], "thought", **parts)
    group = CompletionGroup(Prompt("p-1", "What"), ids(tiny_model, "What"), [whole, unfinished])
    judge = ImplicitReward(str(tiny_model), str(other), beta=1.0, precision="fp32")
    [judgment] = checked_judgments(judge, [group])
    given = [*group.prompt_ids, *thought]
    assert judgment.scores[0] == pytest.approx(logp(tiny_model, given, answer) - logp(other, given, answer), abs=1e-4)
    assert judgment.abstentions == [None, "the completion has no token"]


def test_a_policy_that_is_its_reference_rewards_nothing(tiny_model: Path) -> None:
    group = sampled(tiny_model, "What", (ids(tiny_model, "ever"), "ever", "length"))
    judge = ImplicitReward(str(tiny_model), str(tiny_model))
    assert checked_judgments(judge, [group])[0].scores == [0.0]


def test_the_models_stay_loaded_from_shard_to_shard_until_they_are_closed(
    tiny_model: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load(path: str, **options: Any) -> Any:
        loaded.append(path)
        return load_policy(path, **options)

    monkeypatch.setattr("iterdpo.training.models.load_policy", load)
    judge = ImplicitReward(str(tiny_model), str(other))
    group = sampled(tiny_model, "What", (ids(tiny_model, "ever"), "ever", "length"))
    first = [judge.judge([group])[0].scores for _ in range(2)]
    assert loaded == [str(tiny_model), str(other)]
    judge.close()
    assert [judge.judge([group])[0].scores] * 2 == first
    assert loaded == [str(tiny_model), str(other)] * 2


def test_tokens_of_another_tokenizer_are_made_anew(tiny_model: Path, other: Path) -> None:
    # make_group's tokens are bytes, which in this vocabulary are other characters.
    foreign = make_group("What", ["ever", "e"])
    prompt = ids(tiny_model, "What")
    cut = Completion("e", [101], [-1.0], "length")
    group = CompletionGroup(foreign.prompt, foreign.prompt_ids, [foreign.completions[0], cut])
    judge = ImplicitReward(str(tiny_model), str(other), beta=1.0, precision="fp32")
    [judgment] = checked_judgments(judge, [group])
    tokens = [[*ids(tiny_model, "ever"), END], ids(tiny_model, "e")]  # the one that was cut off has no end token
    assert judgment.scores == pytest.approx(
        [logp(tiny_model, prompt, y) - logp(other, prompt, y) for y in tokens], abs=1e-4
    )


def test_what_was_sampled_is_told_by_prompt_and_text(tiny_model: Path) -> None:
    judge = ImplicitReward(str(tiny_model), str(tiny_model))
    judge._load_tokenizer()
    tokens = [*ids(tiny_model, "né"), END]
    group = sampled(tiny_model, "x", (tokens, "né", "stop"), (tokens[:2], "n\ufffd", "length"), (tokens, "no", "stop"))
    own, half, foreign = (judge._sampled(group, c) for c in group.completions)
    assert own is not None
    assert own.completion == tokens
    assert half is not None  # half a character is no sign of another tokenizer
    assert foreign is None
    strange = Completion("n", [100_000], [-1.0], "length")
    assert judge._sampled(group, strange) is None


def test_a_conversation_is_scored_behind_its_template(tiny_model: Path, other: Path) -> None:
    prompt = ids(tiny_model, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    group = CompletionGroup(
        Prompt("p-chat", [{"role": "user", "content": "hi"}]), [1], [Completion("yo", [9], [-1.0], "stop")]
    )
    [judgment] = checked_judgments(ImplicitReward(str(tiny_model), str(other), 1.0, precision="fp32"), [group])
    y = [*ids(tiny_model, "yo"), END]
    assert judgment.scores == [pytest.approx(logp(tiny_model, prompt, y) - logp(other, prompt, y), abs=1e-4)]


def test_what_cannot_be_scored_abstains_beside_what_can(tiny_model: Path, other: Path) -> None:
    long = "x" * 600
    rows = [([], "", "length"), (ids(tiny_model, long), long, "length"), (ids(tiny_model, "a"), "a", "length")]
    [judgment] = checked_judgments(ImplicitReward(str(tiny_model), str(other)), [sampled(tiny_model, "What", *rows)])
    assert judgment.abstentions == [
        "the completion has no token",
        "more than the 512 tokens that the policy reads",
        None,
    ]
    assert judgment.scores[:2] == [None, None]


def test_a_reference_with_another_tokenizer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    reference = build_tiny_checkpoint(tmp_path / "reference")
    tokenizer = AutoTokenizer.from_pretrained(reference)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(reference)
    with pytest.raises(JudgeError, match="have different tokenizers"):
        ImplicitReward(str(tiny_model), str(reference)).judge([make_group("x", ["a"])])


def test_a_conversation_needs_a_chat_template(tmp_path: Path) -> None:
    checkpoint = build_tiny_checkpoint(tmp_path / "plain")
    (checkpoint / "chat_template.jinja").unlink()
    group = CompletionGroup(
        Prompt("p-chat", [{"role": "user", "content": "hi"}]), [1], [Completion("yo", [9], [-1.0], "stop")]
    )
    with pytest.raises(JudgeError, match="prompt 'p-chat': the prompt is messages"):
        ImplicitReward(str(checkpoint), str(checkpoint)).judge([group])


def test_an_adapter_is_scored_with_its_base(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        LoraConfig(r=2, target_modules=["q_proj"]),
    )
    model.save_pretrained(tmp_path / "adapter")  # its second matrix is zero: it changes nothing yet
    args = {"policy": str(tmp_path / "adapter"), "reference": str(tiny_model), "precision": "fp32"}
    group = sampled(tiny_model, "What", (ids(tiny_model, "ever"), "ever", "length"))
    assert checked_judgments(load_judge("implicit_reward", args), [group])[0].scores == [pytest.approx(0.0, abs=1e-5)]


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ({"beta": 0}, "beta is 0"),
        ({"precision": "float16"}, "precision is 'float16'; it is one of bf16, fp32"),
        ({"reference": "/no/such/model"}, "reference /no/such/model: no such directory"),
    ],
)
def test_a_mistake_is_found_before_loading(tiny_model: Path, args: dict[str, Any], complaint: str) -> None:
    with pytest.raises(JudgeError, match=complaint):
        check_judge("implicit_reward", {"policy": str(tiny_model), "reference": str(tiny_model), **args})


def test_the_version_follows_both_checkpoints(tiny_model: Path, other: Path) -> None:
    args = {"policy": str(tiny_model), "reference": str(other)}
    version = judge_version("implicit_reward", args)
    assert version == judge_version("implicit_reward", {**args, "batch_size": 2})
    assert version != judge_version("implicit_reward", {**args, "reference": str(tiny_model)})
