"""What tests of iterdpo, and of judges and samplers written for it, need: a tiny checkpoint, fakes at the seams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from iterdpo.config import DPOConfig
from iterdpo.run.rundir import digest
from iterdpo.sampling.base import Sampler, SamplingParameters
from iterdpo.training.launch import ReferenceInputs, TrainSpec
from iterdpo.types import Completion, CompletionGroup, Message, Prompt

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% set content = message['content'] or '' %}{% set thought = message.get('reasoning_content') or '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set content = content.split('</think>')[-1].lstrip() %}{% endif %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ content }}"
    "{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""The chat template of a thinking model: the last turn has its reasoning, in tags, and earlier turns have none."""


def build_tiny_checkpoint(
    directory: Path, *, seed: int = 0, chat_template: str = CHATML, tokens: Sequence[Any] = (), **config: Any
) -> Path:
    """A random Llama of 2 layers and width 64 with a byte-level tokenizer of 259 tokens and a ChatML template.

    `tokens` are further ones, such as `["<think>", "</think>"]`. `config` overrides fields of `LlamaConfig`. Loads with
    transformers and with vLLM.
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
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=chat_template
    )
    tokenizer.add_tokens(list(tokens))
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


class FakeSampler(Sampler):
    """A sampler without an engine, for tests of a judge or of the loop.

    `reply(prompt_ids, k)` is the text of completion k. Its tokens are its UTF-8 bytes, or those of the `tokenizer` with
    its EOS, and log-probabilities are -1. `loaded` lists the digests of the policies that were asked for.
    """

    def __init__(self, reply: Callable[[list[int], int], str], *, tokenizer: Any = None) -> None:
        self.reply, self.tokenizer = reply, tokenizer
        self.loaded: list[str] = []

    def load(self, policy: Path, digest: str) -> None:
        if self.loaded[-1:] != [digest]:
            self.loaded.append(digest)

    def sample(
        self, prompt_ids: Sequence[list[int]], seeds: Sequence[int], parameters: SamplingParameters
    ) -> list[list[Completion]]:
        most, tokenizer = parameters.max_tokens, self.tokenizer
        return [
            [make_completion(self.reply(ids, k), max_tokens=most, tokenizer=tokenizer) for k in range(parameters.n)]
            for ids in prompt_ids
        ]

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass


def train_spec(directory: Path, policy: Path, pairs: Path, dpo: DPOConfig, **fields: Any) -> TrainSpec:
    """A training of `policy` on a file of pairs; its output is to be `directory/policy.partial`.

    The reference is the policy. `fields` replace those of `TrainSpec`.
    """
    inputs = {"reference": "", "pairs": str(pairs), "precision": dpo.precision, "adapter": False, "mismatched": None}
    usual = {
        "reference": None,
        "eval_pairs": None,
        "output": directory / "policy.partial",
        "reference_output": directory / "reference",
        "attic": None,
        "reference_inputs": ReferenceInputs(**inputs, sampler_logps_tolerance=dpo.sampler_logps_tolerance),
        "seed": 0,
        "pairs_cache": directory / "cache",
    }
    return TrainSpec(policy=policy, pairs=pairs, dpo=dpo, **{**usual, **fields})


def make_completion(text: str, *, max_tokens: int = 1 << 30, tokenizer: Any = None) -> Completion:
    """A completion whose tokens are the text's UTF-8 bytes, at most `max_tokens` of them.

    With a `tokenizer` they are its own, with its EOS, and special tokens are not in the text.
    """
    ids = list(text.encode())
    if tokenizer is not None:
        ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        text = tokenizer.decode(ids[:max_tokens], skip_special_tokens=True)
    kept = ids[:max_tokens]
    return Completion(text, kept, [-1.0] * len(kept), "length" if len(ids) > max_tokens else "stop")


def make_group(prompt: str | list[Message], completions: Sequence[str], **columns: Any) -> CompletionGroup:
    """A group of texts, for testing a judge: `make_group("2+2?", ["4", "5"], gold="4")`. A prompt may be messages."""
    content = Prompt(f"p-{digest(prompt)}", prompt, columns)
    return CompletionGroup(content, list(content.text.encode()), [make_completion(text) for text in completions])
