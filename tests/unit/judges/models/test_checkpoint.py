"""A classifier's checkpoint is looked at before it is loaded, and is loaded from safetensors alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from iterdpo.errors import JudgeError
from iterdpo.testing import make_group
from judges import check_judge
from judges.models.checkpoint import check_architecture, checkpoint_config, label_count
from judges.models.reward_model import RewardModelJudge


def test_pickled_weights_are_refused(one_label: Path, tmp_path: Path) -> None:
    shutil.copytree(one_label, tmp_path / "rm")
    (tmp_path / "rm" / "model.safetensors").rename(tmp_path / "rm" / "pytorch_model.bin")
    with pytest.raises(JudgeError, match=r"has no \.safetensors file"):
        check_judge("reward_model", {"model": str(tmp_path / "rm")})
    with pytest.raises(JudgeError, match="cannot be loaded"):
        RewardModelJudge(str(tmp_path / "rm")).judge([make_group("x", ["a"])])


def test_a_hub_id_is_left_to_the_loading() -> None:
    check_judge("reward_model", {"model": "some-organisation/some-reward-model", "revision": "main"})


def test_the_config_of_a_directory_is_read_and_a_hub_id_has_none(one_label: Path) -> None:
    config = checkpoint_config(str(one_label), "reward model")
    assert config is not None
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert checkpoint_config("some-organisation/some-reward-model", "reward model") is None


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=r"^reward model x: no config\.json there"):
        checkpoint_config(str(tmp_path), "reward model x")
    with pytest.raises(JudgeError, match=r"^reward model .*x: cannot be loaded: "):
        RewardModelJudge(str(tmp_path / "x")).judge([make_group("x", ["a"])])


def test_an_architecture_is_known_by_a_part_of_its_name() -> None:
    check_architecture("rm", ["Other", "MyRewardModel"], ["RewardModel"], "another")
    with pytest.raises(JudgeError, match=r"^rm: its architecture is none, which gives no scores; use another$"):
        check_architecture("rm", None, ["RewardModel"], "another")


def test_a_config_that_says_nothing_of_labels_has_two() -> None:
    assert label_count({}) == 2
    assert label_count({"num_labels": 3}) == 3
    assert label_count({"id2label": {"0": "a"}}) == 1


def test_the_smallest_of_the_known_limits_counts() -> None:
    text = SimpleNamespace(max_position_embeddings=512)
    config, tokenizer = SimpleNamespace(get_text_config=lambda: text), SimpleNamespace(model_max_length=10**30)
    judge = RewardModelJudge("m")
    assert judge._token_limit(config, tokenizer) == 512
    assert RewardModelJudge("m", max_length=64)._token_limit(config, tokenizer) == 64
    del text.max_position_embeddings
    tokenizer.model_max_length = 128
    assert judge._token_limit(config, tokenizer) == 128
