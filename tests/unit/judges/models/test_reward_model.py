"""The reward model's scores are those of its checkpoint, whatever is beside them in a batch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iterdpo.errors import JudgeError
from iterdpo.judging.judge import checked_judgments
from iterdpo.testing import make_group
from iterdpo.types import Completion, CompletionGroup, Prompt
from judges import check_judge, judge_version, load_judge
from judges.models.reward_model import RewardModelJudge

TEXTS = ["a", "a much longer completion than the others", "", "bb", "a\n\nb"]


def logits(checkpoint: Path, ids: list[int]) -> list[float]:
    """The checkpoint's own answer to one sequence, without padding."""
    import torch
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].tolist()


def tokens(checkpoint: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)(text, add_special_tokens=False)["input_ids"]


def chat(*texts: str) -> CompletionGroup:
    prompt = Prompt("p-chat", [{"role": "user", "content": "hi"}])
    return CompletionGroup(prompt, [1], [Completion(t, [1], [-1.0], "stop") for t in texts])


def test_a_plain_prompt_and_its_completion_are_joined(one_label: Path) -> None:
    judge = RewardModelJudge(str(one_label), dtype="float32")
    [judgment] = checked_judgments(judge, [make_group("My ", TEXTS)])
    assert judgment.scores == pytest.approx(
        [logits(one_label, tokens(one_label, "My " + t))[0] for t in TEXTS], abs=1e-4
    )


def test_a_conversation_goes_through_the_chat_template_once(one_label: Path) -> None:
    judge = RewardModelJudge(str(one_label), dtype="float32")
    [judgment] = checked_judgments(judge, [chat("yes", "no, never")])
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    expected = [logits(one_label, tokens(one_label, rendered.format(t)))[0] for t in ("yes", "no, never")]
    assert judgment.scores == pytest.approx(expected, abs=1e-4)


def test_two_labels_score_by_the_log_odds_of_the_second(two_labels: Path) -> None:
    [judgment] = checked_judgments(RewardModelJudge(str(two_labels), dtype="float32"), [make_group("x", ["a"])])
    low, high = logits(two_labels, tokens(two_labels, "xa"))
    assert judgment.scores == [pytest.approx(high - low, abs=1e-4)]


def test_scores_do_not_depend_on_the_batch(one_label: Path) -> None:
    groups = [make_group("My ", TEXTS), make_group("Your own ", TEXTS), chat(*TEXTS)]
    batched = checked_judgments(RewardModelJudge(str(one_label), dtype="float32", batch_size=4), groups)
    single = checked_judgments(RewardModelJudge(str(one_label), dtype="float32", batch_size=1), groups)
    for many, one in zip(batched, single, strict=True):
        assert many.scores == pytest.approx(one.scores, abs=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_checkpoint_without_a_pad_token_reads_the_last_token_of_each_row(
    tiny_model: Path, build_reward_model: Callable[..., Path], tmp_path: Path, side: str
) -> None:
    from transformers import AutoTokenizer

    checkpoint = build_reward_model(tmp_path, 1, pad_token_id=None)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, padding_side=side)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(checkpoint)
    texts = ["a", "longer<|im_end|>", "b<|endoftext|>"]
    [judgment] = checked_judgments(RewardModelJudge(str(checkpoint), dtype="float32"), [make_group("x", texts)])
    assert judgment.scores == pytest.approx(
        [logits(checkpoint, tokens(checkpoint, "x" + t))[0] for t in texts], abs=1e-4
    )


def test_a_bos_token_is_there_exactly_once(
    tiny_model: Path, build_reward_model: Callable[..., Path], tmp_path: Path
) -> None:
    from tokenizers import processors
    from transformers import AutoTokenizer

    checkpoint = build_reward_model(tmp_path, 1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(checkpoint)
    judge = RewardModelJudge(str(checkpoint))
    judge.judge([make_group("x", ["a"])])
    bos = tokenizer.bos_token_id
    assert judge._token_ids(Prompt("p", "x"), "a").count(bos) == 1
    assert judge._token_ids(Prompt("p", "<|im_start|>x"), "a").count(bos) == 1
    assert judge._token_ids(chat("a").prompt, "a").count(bos) == 2  # the template's two: user and assistant


def test_what_does_not_fit_abstains_and_is_not_cut(one_label: Path) -> None:
    judge = RewardModelJudge(str(one_label), max_length=5)
    [judgment] = checked_judgments(judge, [make_group("1234", ["5", "56"])])
    assert judgment.scores[0] is not None
    assert judgment.abstentions == [None, "more than the 5 tokens that the reward model reads"]
    [judgment] = checked_judgments(RewardModelJudge(str(one_label)), [make_group("", ["", "x" * 513])])
    assert judgment.abstentions == [
        "neither prompt nor completion has a token",
        "more than the 512 tokens that the reward model reads",
    ]


def test_a_logit_that_is_not_finite_abstains(one_label: Path) -> None:
    import torch

    judge = RewardModelJudge(str(one_label))
    judge.judge([make_group("x", ["a"])])
    with torch.no_grad():
        judge._model.score.weight.fill_(float("nan"))
    assert judge.judge([make_group("x", ["a"])])[0].abstentions == ["the judge returned nan"]


def test_closing_frees_the_model_and_the_next_judgment_loads_it_again(one_label: Path) -> None:
    judge = RewardModelJudge(str(one_label))
    assert judge._model is None
    before = judge.judge([make_group("x", ["a"])])
    judge.close()
    assert judge._model is None
    assert judge.judge([make_group("x", ["a"])]) == before


def test_loading_by_name_gives_a_version_that_follows_the_checkpoint_and_not_its_place(
    one_label: Path, two_labels: Path, tmp_path: Path
) -> None:
    judge = load_judge("reward_model", {"model": str(one_label), "batch_size": 4})
    assert judge.name == "reward_model:my-rm"
    assert judge.version == judge_version("reward_model", {"model": str(one_label), "batch_size": 8})
    shutil.copytree(one_label, tmp_path / "moved")
    assert judge.version == judge_version("reward_model", {"model": str(tmp_path / "moved")})
    assert judge.version != judge_version("reward_model", {"model": str(two_labels)})
    assert judge.version != judge_version("reward_model", {"model": str(one_label), "max_length": 64})


def test_a_checkpoint_without_a_trained_head_is_refused(tiny_model: Path) -> None:
    with pytest.raises(JudgeError, match="its architecture is LlamaForCausalLM, which gives no scores"):
        check_judge("reward_model", {"model": str(tiny_model)})
    with pytest.raises(JudgeError, match=r"has no weights for score.weight, which would be random"):
        RewardModelJudge(str(tiny_model)).judge([make_group("x", ["a"])])


def test_a_conversation_needs_a_chat_template(one_label: Path, tmp_path: Path) -> None:
    shutil.copytree(one_label, tmp_path / "rm")
    (tmp_path / "rm" / "chat_template.jinja").unlink()
    with pytest.raises(
        JudgeError, match="its tokenizer has no chat template, but prompt 'p-chat' is a list of messages"
    ):
        RewardModelJudge(str(tmp_path / "rm")).judge([chat("a")])


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ({}, "missing argument 'model'"),
        ({"model": "m", "batchsize": 2}, "unknown argument 'batchsize'; did you mean 'batch_size'?"),
        ({"model": "m", "dtype": "bf16"}, "dtype is 'bf16'; it is one of auto, float32, bfloat16, float16"),
        ({"model": "/no/such/rm"}, "no such directory"),
        ({"model": "./no-such-rm"}, "no such directory"),
        ({"model": "models/no-such-rm"}, "no such directory; directories there: nothing"),
        ({"model": "{rm}-x"}, "no such directory; did you mean 'my-rm'?"),
    ],
)
def test_a_mistake_in_the_arguments_is_found_before_loading(
    one_label: Path, args: dict[str, Any], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    filled = {k: v.format(rm=one_label) if isinstance(v, str) else v for k, v in args.items()}
    with pytest.raises(JudgeError, match=complaint):
        check_judge("reward_model", filled)


def test_more_than_two_labels_need_a_head_or_weights(build_reward_model: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = build_reward_model(tmp_path, 3)
    with pytest.raises(JudgeError, match="has 3 labels"):
        check_judge("reward_model", {"model": str(checkpoint)})
    with pytest.raises(JudgeError, match="has 3 labels"):
        RewardModelJudge(str(checkpoint)).judge([make_group("x", ["a"])])


def test_of_several_heads_the_score_is_one_or_their_weighted_sum(
    build_reward_model: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = build_reward_model(tmp_path, 3)
    group = make_group("x", ["a", "bb"])
    expected = [logits(checkpoint, tokens(checkpoint, "x" + text)) for text in ("a", "bb")]
    [judgment] = checked_judgments(RewardModelJudge(str(checkpoint), head=2, dtype="float32"), [group])
    assert judgment.scores == pytest.approx([row[2] for row in expected], abs=1e-4)
    weighted = load_judge("reward_model", {"model": str(checkpoint), "weights": [1, 0.5, -2], "dtype": "float32"})
    [judgment] = checked_judgments(weighted, [group])
    assert judgment.scores == pytest.approx([a + 0.5 * b - 2 * c for a, b, c in expected], abs=1e-4)
    assert weighted.version != judge_version("reward_model", {"model": str(checkpoint), "head": 0, "dtype": "float32"})


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ({"weights": [1, 2]}, "has 3 labels, but there are 2 weights"),
        ({"weights": [1, 2, "3"]}, "a list with a number for each label"),
        ({"head": 3}, "numbered from 0, but head is 3"),
        ({"head": -1}, "head is -1"),
        ({"head": 0, "weights": [1, 2, 3]}, "both weights and head"),
        ({"head": 0, "backend": "vLLM"}, "backend is 'vLLM'; it is one of transformers, vllm"),
        ({"head": 0, "backend": "vllm", "device": "cpu"}, "device is for `backend: transformers`"),
        ({"head": 0, "engine": {}}, "engine is for `backend: vllm`"),
    ],
)
def test_a_mistake_about_heads_and_backends_is_found_before_loading(
    build_reward_model: Callable[..., Path], tmp_path: Path, args: dict[str, Any], complaint: str
) -> None:
    checkpoint = build_reward_model(tmp_path, 3)
    with pytest.raises(JudgeError, match=complaint):
        check_judge("reward_model", {"model": str(checkpoint), **args})
