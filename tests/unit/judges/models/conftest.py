"""Tiny checkpoints of classifiers, with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SPECIALS = ["[PAD]", "[CLS]", "[SEP]", "<|source|>", "<|candidate1|>", "<|candidate2|>"]
CLS, SEP, SOURCE, FIRST, SECOND = 1, 2, 3, 4, 5
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,
}


@pytest.fixture(scope="session")
def build_reward_model(tiny_model: Path) -> Callable[..., Path]:
    """`build_reward_model(directory, labels)`: a random reward model with the tiny checkpoint's tokenizer."""

    def build(directory: Path, labels: int, **config: Any) -> Path:
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

        settings = json.loads((tiny_model / "config.json").read_text())
        kept = {
            k: v
            for k, v in settings.items()
            if k not in ("architectures", "model_type", "dtype", "transformers_version")
        }
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = LlamaForSequenceClassification(LlamaConfig(**{**kept, "num_labels": labels, **config}))
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(directory)
        return directory

    return build


@pytest.fixture(scope="session")
def one_label(build_reward_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_reward_model(tmp_path_factory.mktemp("rm") / "my-rm", 1)


@pytest.fixture(scope="session")
def two_labels(build_reward_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_reward_model(tmp_path_factory.mktemp("rm2") / "my-rm", 2)


@pytest.fixture(scope="session")
def pairrm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random PairRM with the fields of the checkpoint's config.json, and two tasks."""
    import torch
    from transformers import DebertaV2Config

    from judges.models.pairrm import PairRM

    directory = tmp_path_factory.mktemp("pairrm") / "PairRM-tiny"
    tokenizer = _save_tokenizer(directory)
    marks = {"source_prefix_id": SOURCE, "cand1_prefix_id": FIRST, "cand2_prefix_id": SECOND, "sep_token_id": SEP}
    config = DebertaV2Config(vocab_size=len(tokenizer), pad_token_id=0, n_tasks=2, drop_out=0.05, **marks, **TINY)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        PairRM(config).save_pretrained(directory)
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**settings, "architectures": ["DebertaV2PairRM"]}))
    return directory


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT with one label, for which the two texts are two segments."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    directory = tmp_path_factory.mktemp("classifier") / "pairs"
    tokenizer = _save_tokenizer(directory)
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=0, num_labels=1, **{**TINY, "type_vocab_size": 2})
    with torch.random.fork_rng():
        torch.manual_seed(4)
        BertForSequenceClassification(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def pairrm_logit() -> Callable[[Path, list[int]], float]:
    """PairRM's logit of one row, computed from the checkpoint's tensors."""
    return _by_hand


def _by_hand(directory: Path, ids: list[int]) -> float:
    """PairRM's logit of one row, from the checkpoint's tensors."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, DebertaV2Model

    tensors = load_file(directory / "model.safetensors")
    encoder = DebertaV2Model(AutoConfig.from_pretrained(directory)).eval()
    prefix = "pretrained_model."
    encoder.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    with torch.no_grad():
        hidden = encoder(torch.tensor([ids])).last_hidden_state[0]
    values = []
    for mark in (FIRST, SECOND):
        x = torch.cat([hidden[ids.index(SOURCE)], hidden[ids.index(mark)]])
        x = torch.tanh(tensors["head_layer.1.weight"] @ x + tensors["head_layer.1.bias"])
        values.append(tensors["head_layer.4.weight"] @ x + tensors["head_layer.4.bias"])
    return float((values[0] - values[1]).mean())


def _save_tokenizer(directory: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*SPECIALS, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(directory)
    return tokenizer
