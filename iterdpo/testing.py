"""What tests of iterdpo, and of judges and samplers written for it, need: a tiny checkpoint, fakes at the seams."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from iterdpo.types import Completion, CompletionGroup, Prompt

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tiny_checkpoint(directory: Path, *, seed: int = 0, **config: Any) -> Path:
    """A random Llama of 2 layers and width 64 with a byte-level tokenizer of 259 tokens and a ChatML template.

    `config` overrides fields of `LlamaConfig`. Loads with transformers and with vLLM.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*specials, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **config}))
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


class FakeSampler:
    """A sampler without an engine: `reply(prompt, k)` makes completion k's text; tokens are its UTF-8 bytes."""

    def __init__(self, reply: Callable[[Prompt, int], str], *, max_tokens: int = 10_000) -> None:
        self.reply = reply
        self.max_tokens = max_tokens

    def group(self, prompt: Prompt, n: int) -> CompletionGroup:
        completions = []
        for k in range(n):
            text = self.reply(prompt, k)
            ids = list(text.encode())[: self.max_tokens]
            stopped = len(ids) < self.max_tokens
            completions.append(Completion(text, ids, [-1.0] * len(ids), "stop" if stopped else "length"))
        return CompletionGroup(prompt, list(prompt.text.encode()), completions)


def make_group(prompt: str, completions: Sequence[str], **columns: Any) -> CompletionGroup:
    """A group of plain texts, for testing a judge: `make_group("2+2?", ["4", "5"], gold="4")`."""
    sampler = FakeSampler(lambda _, k: completions[k])
    return sampler.group(Prompt(f"p-{random.Random(prompt).getrandbits(32):08x}", prompt, columns), len(completions))
