"""The token ids of offline chats, held against those of TRL's DPOTrainer: four families of templates and tokenizers.

The templates are written in the spirit of ChatML, Llama 3, Mistral and Gemma. Both libraries read the same rows. What
differs, and is checked to be all: TRL trains on what a template writes after the end token (a newline), and iterdpo ends
a completion at its end token, as sampling does.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from iterdpo.data.preferences import PreferenceData
from iterdpo.data.rendering import turn_ends

TOOLS = """{%- if tools %}{{ open }}system{{ shut }}Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}{{ end }}{% endif %}"""
CALLS = "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
CHATML = (
    "{% set open, shut, end = '<|im_start|>', '\\n', '<|im_end|>\\n' %}"
    + TOOLS
    + "{%- for m in messages %}{{ open + m.role + shut + (m.content or '') }}"
    + CALLS
    + "{{ end }}{% endfor %}{% if add_generation_prompt %}{{ open + 'assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\\n\\n</think>\\n\\n{% endif %}{% endif %}"
)
LLAMA = (
    "{% set open, shut, end = '<|start_header_id|>', '<|end_header_id|>\\n\\n', '<|eot_id|>' %}{{ bos_token }}"
    + TOOLS
    + "{%- for m in messages %}{{ open + m.role + shut + (m.content or '') | trim }}"
    + CALLS
    + "{{ end }}{% endfor %}{% if add_generation_prompt %}{{ open + 'assistant' + shut }}{% endif %}"
)
MISTRAL = """{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}
{%- set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{% endif %}
{%- if m.role == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""
GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}
{{- '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

WORDS = ["rain", "sun", "the", "a", "ships sail", "home's", "42", "3.14", "café", "naïve", "東京", "🙂", "f(x):", "x\n"]


def corpus() -> Iterator[str]:
    draw = random.Random(0)
    for _ in range(200):
        yield " ".join(draw.choices(WORDS, k=20))


def byte_level(specials: list[str], **named: str) -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def sentence_piece(specials: list[str], *, prefix: bool, **named: str) -> Any:
    """A BPE of the SentencePiece kind, with bytes for what it does not know; `prefix`: it writes a space before a text."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if prefix:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=[*specials, *bytes_], show_progress=False)
    backend.train_from_iterator(corpus(), trainer)
    tokens = json.loads(backend.to_str())
    tokens["added_tokens"] = [token for token in tokens["added_tokens"] if token["content"] not in bytes_]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(tokens)), **named)


def chatml() -> Any:
    ends = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return byte_level(ends, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML)


def llama() -> Any:
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return byte_level(specials, bos_token=specials[0], eos_token="<|eot_id|>", chat_template=LLAMA)


def mistral() -> Any:
    specials = ["<unk>", "<s>", "</s>"]
    return sentence_piece(specials, prefix=True, bos_token="<s>", eos_token="</s>", chat_template=MISTRAL)


def gemma() -> Any:
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    return sentence_piece(specials, prefix=False, bos_token="<bos>", eos_token="<eos>", chat_template=GEMMA)


FAMILIES = {"chatml": chatml, "llama": llama, "mistral": mistral, "gemma": gemma}


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def chats(count: int, *, system: bool) -> list[dict[str, Any]]:
    """Preferences over chats of one to five turns."""
    draw = random.Random(1)

    def words(most: int = 12) -> str:
        edges = ["", "", "", " ", "\n"]
        return draw.choice(edges) + " ".join(draw.choices(WORDS, k=draw.randint(1, most))) + draw.choice(edges)

    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        prompt = [message("system", words())] if system and draw.random() < 0.4 else []
        for _ in range(draw.choice([0, 0, 1, 2])):
            prompt += [message("user", words()), message("assistant", words())]
        prompt.append(message("user", words()))
        chosen, rejected = words(), words(3)
        if chosen.strip() and rejected.strip() and chosen.strip() != rejected.strip():
            sides = {"chosen": [message("assistant", chosen)], "rejected": [message("assistant", rejected)]}
            rows.append({"prompt": prompt, **sides})
    return rows


def trls(tokenizer: Any, rows: list[dict[str, Any]]) -> list[dict[str, list[int]]]:
    """The ids of TRL's own code, which asks of its trainer only the tokenizer."""
    from trl import DPOTrainer

    trainer = SimpleNamespace(_tokenizer=tokenizer)
    settings = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    data = datasets.Dataset.from_list(copy.deepcopy(rows))
    prepared = DPOTrainer._prepare_dataset(trainer, data, tokenizer, settings, "train")
    return [{k: row[f"{k}_ids"] for k in ("prompt", "chosen", "rejected")} for row in prepared]


def ours(tokenizer: Any, rows: list[dict[str, Any]], path: Path) -> list[dict[str, list[int]]]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferenceData(str(path))
    tables = list(data.tokenized(tokenizer, max_prompt_tokens=1 << 20, max_completion_tokens=1 << 20, processes=1))
    assert data.account.kept == len(rows)
    found = [row for table in tables for row in table.to_pylist()]
    return [{k: row[f"{k}_token_ids"] for k in ("prompt", "chosen", "rejected")} for row in found]


def check_equal(tokenizer: Any, rows: list[dict[str, Any]], path: Path) -> None:
    ends = turn_ends(tokenizer)
    after = "\n" if tokenizer.chat_template in (CHATML, GEMMA) else ""
    for row, a, b in zip(rows, ours(tokenizer, rows, path), trls(tokenizer, rows), strict=True):
        assert a["prompt"] == b["prompt"], tokenizer.decode(a["prompt"])
        for side in ("chosen", "rejected"):
            assert a[side][-1] in ends
            assert b[side][: len(a[side])] == a[side], row[side]
            assert tokenizer.decode(b[side][len(a[side]) :]) == after


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, Any]:
    make: Callable[[], Any] = FAMILIES[request.param]
    return request.param, make()


def test_chats_have_the_token_ids_that_trl_gives_them(family: tuple[str, Any], tmp_path: Path) -> None:
    name, tokenizer = family
    check_equal(tokenizer, chats(125, system=name != "gemma"), tmp_path / "pairs.jsonl")


def test_real_chats_have_the_token_ids_that_trl_gives_them(
    family: tuple[str, Any], tmp_path: Path, hh_rlhf: Path, request: pytest.FixtureRequest
) -> None:
    limit = 505 if request.config.getoption("--extended") else 130
    pairs = [pair for batch in PreferenceData(str(hh_rlhf), limit=limit).parsed() for pair in batch]
    rows = [
        {
            "prompt": list(pair.prompt.content),
            "chosen": [message("assistant", str(pair.chosen))],
            "rejected": [message("assistant", str(pair.rejected))],
        }
        for pair in pairs
    ]
    assert len(rows) >= limit - 5
    check_equal(family[1], rows, tmp_path / "pairs.jsonl")


TOOL = {"type": "function", "function": {"name": "rain_in", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "rain_in", "arguments": {"city": "Oslo"}}}
ASKED = [message("user", "Rain in Oslo?"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]


@pytest.mark.parametrize("make", [chatml, llama])
def test_chats_with_tools_have_the_token_ids_that_trl_gives_them(make: Callable[[], Any], tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [*ASKED, {"role": "tool", "name": "rain_in", "content": f'{{"mm": {number}}}'}],
            "chosen": [message("assistant", f"{number} mm of rain")],
            "rejected": [message("assistant", "sun")],
            "tools": json.dumps([TOOL]),
        }
        for number in range(5)
    ]
    tokenizer = make()
    check_equal(tokenizer, rows, tmp_path / "pairs.jsonl")
    (first, *_) = ours(tokenizer, rows, tmp_path / "pairs.jsonl")
    prompt = tokenizer.decode(first["prompt"])
    assert json.dumps(TOOL) in prompt
    assert '<tool_call>{"name": "rain_in", "arguments": {"city": "Oslo"}}</tool_call>' in prompt


def test_a_choice_between_calls_of_tools_has_the_token_ids_that_trl_gives_it(tmp_path: Path) -> None:
    other = {"type": "function", "function": {"name": "rain_in", "arguments": {"city": "Bergen"}}}
    rows = [
        {
            "prompt": ASKED[:1],
            "chosen": ASKED[1:],
            "rejected": [{"role": "assistant", "content": None, "tool_calls": [other]}],
            "tools": json.dumps([TOOL]),
        }
    ]
    check_equal(chatml(), rows, tmp_path / "pairs.jsonl")


def test_values_for_the_template_give_the_token_ids_that_trl_gives(tmp_path: Path) -> None:
    rows = [{**row, "chat_template_kwargs": {"enable_thinking": True}} for row in chats(5, system=True)]
    check_equal(chatml(), rows, tmp_path / "pairs.jsonl")
