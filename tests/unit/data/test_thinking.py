"""Completions of thinking models, divided; over tokenizers whose tags are tokens of their own, special ones, or text."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AddedToken, AutoTokenizer

from iterdpo.data.rendering import completion_token_ids, prompt_token_ids
from iterdpo.data.thinking import Tags, Thinking, find_tags
from iterdpo.errors import DataError
from iterdpo.testing import CHATML, THINKING, build_tiny_checkpoint, make_completion
from iterdpo.types import Completion, Message

THINK = Tags("<think>", "</think>")
HARMONY = Tags("<|channel|>analysis<|message|>", "<|channel|>final<|message|>")
QUESTION: list[Message] = [{"role": "user", "content": "2+2?"}]
OPENED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")

Divide = Callable[..., Completion]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By kind of tag: written with several tokens, a token of its own, a special token."""
    root = tmp_path_factory.mktemp("thinking")
    kinds: dict[str, list[Any]] = {
        "text": [],
        "own": ["<think>", "</think>"],
        "special": [AddedToken(tag, special=True) for tag in ("<think>", "</think>", "<|channel|>", "<|message|>")],
    }
    for kind, tokens in kinds.items():
        build_tiny_checkpoint(root / kind, chat_template=THINKING, tokens=tokens)
    return {kind: AutoTokenizer.from_pretrained(root / kind) for kind in kinds}


@pytest.fixture(params=["text", "own", "special"])
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Any]) -> Any:
    return tokenizers[request.param]


def divided(tokenizer: Any, text: str, *, prompt: str = "2+2?\n", tags: Tags = THINK, **settings: Any) -> Completion:
    ids = tokenizer(prompt).input_ids
    return Thinking(tokenizer, tags).split(ids, make_completion(text, tokenizer=tokenizer, **settings))


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>\n2 and 2\n</think>\n\n4", "<think>\n2 and 2\n</think>\n\n", "4"),
        ("<think></think>4", "<think></think>", "4"),
        ("<think></think> 4", "<think></think> ", "4"),
        ("<think></think> \n\n  if x:\n", "<think></think> \n\n", "  if x:\n"),
        ("\n<think>a</think>4", "\n<think>a</think>", "4"),
        (
            "a</think>4",
            "a</think>",
            "4",
        ),  # the start is missing: the prompt opened the thought, or the model left it out
        ("<think>a</think>", "<think>a</think>", ""),
        ("<think>a</think>\n", "<think>a</think>\n", ""),
        ("<think><think>a</think>4", "<think><think>a</think>", "4"),  # said again after a prompt that opened it
        ("<think>a<think>b</think>c</think>4", "<think>a<think>b</think>c</think>", "4"),
        ("<think>a</think></think>4", "<think>a</think></think>", "4"),
        ("<think>a</think>3<think>b</think>4", "<think>a</think>3<think>b</think>", "4"),
        ("4", "", "4"),
        (" 4 < 5 </thin", "", " 4 < 5 </thin"),
        ("", "", ""),
        ("<think>ä👍</think>é👍", "<think>ä👍</think>", "é👍"),
    ],
)
def test_what_follows_the_last_closing_tag_is_the_answer(
    tokenizer: Any, text: str, reasoning: str, answer: str
) -> None:
    completion = divided(tokenizer, text)
    assert (completion.reasoning, completion.text, completion.finish_reason) == (reasoning, answer, "stop")
    assert tokenizer.decode(completion.token_ids[: completion.reasoning_tokens]) == reasoning.rstrip() or not answer
    assert tokenizer.decode(completion.answer_ids, skip_special_tokens=True).strip() == answer.strip()
    assert completion.answer_ids[-1] == tokenizer.eos_token_id
    assert completion.whole_text == text


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("<think>", "2+2?"),
        ("<think>2 and 2", "2+2?"),
        ("<think>a</think>4<think>b", "2+2?"),  # thinks again, and does not end
        ("2 and 2 is 4", "2+2?<think>"),
        ("", "2+2?<think>\n"),
        ("2 and 2 </thin", "2+2?<think>\n\n"),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"max_tokens": 60}])
def test_a_thought_that_is_open_at_the_end_is_no_answer(
    tokenizer: Any, text: str, prompt: str, settings: dict[str, Any]
) -> None:
    completion = divided(tokenizer, text, prompt=prompt, **settings)
    assert (completion.finish_reason, completion.text, completion.answer_ids) == ("thought", "", [])
    assert completion.unfinished
    assert not completion.truncated
    assert (completion.reasoning or "").startswith(text)


def test_a_thought_that_the_limit_cuts_is_unfinished_and_an_answer_that_it_cuts_is_truncated(tokenizer: Any) -> None:
    whole = divided(tokenizer, "<think>a</think>1234")
    opened = len(tokenizer("<think>").input_ids)
    for limit in range(opened, len(whole.token_ids)):
        cut = divided(tokenizer, "<think>a</think>1234", max_tokens=limit)
        if limit < whole.reasoning_tokens:
            assert cut.unfinished
        else:
            answer = "1234"[: limit - whole.reasoning_tokens]
            assert (cut.finish_reason, cut.text, cut.reasoning) == ("length", answer, "<think>a</think>")


def test_a_prompt_that_ends_in_a_thought_is_told_from_one_that_speaks_of_it(tokenizer: Any) -> None:
    thinking = Thinking(tokenizer, THINK)

    def opens(text: str) -> bool:
        return thinking.opens(tokenizer(text).input_ids)

    assert opens("<|im_start|>assistant\n<think>\n")
    assert opens("<think>")
    assert not opens("What is <think>?<|im_end|>\n<|im_start|>assistant\n")
    assert not opens("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not opens("")


def test_after_a_prompt_that_has_closed_the_thought_all_is_the_answer(tokenizer: Any) -> None:
    completion = divided(tokenizer, "4", prompt="<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert (completion.reasoning, completion.text, completion.reasoning_tokens) == ("", "4", 0)


@pytest.mark.parametrize("kind", ["text", "special"])
def test_the_channels_of_harmony_are_divided_even_if_their_tokens_are_not_in_the_text(
    tokenizers: dict[str, Any], kind: str
) -> None:
    thought = "<|channel|>analysis<|message|>2 and 2<|im_end|><|im_start|>assistant<|channel|>final<|message|>"
    completion = divided(tokenizers[kind], thought + "4", tags=HARMONY)
    assert (completion.reasoning, completion.text) == (thought, "4")
    assert divided(tokenizers[kind], "<|channel|>analysis<|message|>2 and", tags=HARMONY).unfinished
    assert divided(tokenizers[kind], "<|channel|>final<|message|>4", tags=HARMONY).text == "4"


class Merged:
    """A tokenizer whose tokens are words: the closing tag ends within one. Ids are places in `WORDS`."""

    WORDS = ("<th", "ink>", "so ", ".</", "think", ">\n\n", ">The", " end", "<eos>")
    name_or_path, eos_token_id, chat_template = "", 8, None

    def __call__(self, text: str, **_: Any) -> Any:
        raise AssertionError("tags are looked for in the text")

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False, **_: Any) -> str:
        return "".join(self.WORDS[i] for i in ids if not (skip_special_tokens and i == self.eos_token_id))


@pytest.mark.parametrize(
    ("ids", "reasoning", "answer"),
    [
        ([0, 1, 2, 3, 4, 5, 7, 8], "<think>so .</think>\n\n", " end"),
        ([0, 1, 2, 3, 4, 6, 7, 8], "<think>so .</think>", "The end"),
    ],
)
def test_an_answer_begins_after_the_token_that_ends_the_tag(
    ids: list[int], reasoning: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iterdpo.data.thinking._own_token", lambda tokenizer, tag: None)
    monkeypatch.setattr("iterdpo.data.thinking.turn_ends", lambda tokenizer: frozenset({8}))
    completion = Thinking(Merged(), THINK).split([7], Completion("", ids, [], "stop"))
    assert (completion.reasoning, completion.text, completion.reasoning_tokens) == (reasoning, answer, 6)


@given(parts=st.lists(st.sampled_from(["<think>", "</think>", "a", "\n", "é" * 40, "<", "think>"]), max_size=12))
def test_nothing_of_a_completion_is_lost_and_all_kinds_of_tokens_agree(
    tokenizers: dict[str, Any], parts: list[str]
) -> None:
    text = "".join(parts)
    found = [divided(tokenizers[kind], text) for kind in ("text", "own")]
    for completion in found:
        assert completion.whole_text == text
        assert completion.reasoning_tokens + len(completion.answer_ids) == len(completion.token_ids)
        assert completion.unfinished == (text.rfind("<think>") > text.rfind("</think>"))
    assert found[0].text == found[1].text


# Finding the tags


@pytest.mark.parametrize(
    ("template", "tags"),
    [
        (CHATML, None),
        (THINKING, THINK),
        (OPENED + "{{ content.split('</think>')[-1] }}", THINK),
        ("{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}", THINK),
        ("<seed:think>{{ thought }}</seed:think>", Tags("<seed:think>", "</seed:think>")),
        ("<mm:think>{{ thought }}</mm:think>", Tags("<mm:think>", "</mm:think>")),
        ("<think:opensource>{{ thought }}</think:opensource>", Tags("<think:opensource>", "</think:opensource>")),
        ("<thought>{{ thought }}</thought>", Tags("<thought>", "</thought>")),
        ("<reasoning>{{ thought }}</reasoning>", Tags("<reasoning>", "</reasoning>")),
        ("[THINK]{{ thought }}[/THINK]", Tags("[THINK]", "[/THINK]")),
        ("<|START_THINKING|>{{ t }}<|END_THINKING|>", Tags("<|START_THINKING|>", "<|END_THINKING|>")),
        ("<|channel>thought\n{{ t }}<channel|>", Tags("<|channel>", "<channel|>")),
        ("<|channel|>analysis<|message|>{{ t }}<|end|><|start|>assistant<|channel|>final<|message|>", HARMONY),
        ("<tool_call>{{ call }}</tool_call>", None),
        ("Say what you </rethink>", None),
        ({"rag": "<think></think>", "default": CHATML}, THINK),
        (None, None),
    ],
)
def test_tags_are_found_in_the_chat_template(tokenizers: dict[str, Any], template: Any, tags: Tags | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["text"].name_or_path)
    tokenizer.chat_template = template
    assert find_tags(tokenizer) == tags


# What is trained on is what was rendered


def ids_of(tokenizer: Any, *turns: Message) -> list[int]:
    return completion_token_ids(tokenizer, QUESTION, list(turns), tags=(THINK.start, THINK.end))


@pytest.mark.parametrize(
    "turn",
    [
        {"content": "4", "reasoning_content": "2 and 2"},
        {"content": "<think>2 and 2</think>4"},
        {"content": "<think>\n2 and 2\n</think>\n\n4"},
    ],
)
def test_reasoning_in_a_key_or_in_the_content_is_rendered_and_divided(tokenizer: Any, turn: Message) -> None:
    ids = ids_of(tokenizer, {"role": "assistant", **turn})
    completion = Thinking(tokenizer, THINK).split(
        prompt_token_ids(tokenizer, QUESTION), Completion("", ids, [], "stop")
    )
    assert (completion.reasoning, completion.text) == ("<think>\n2 and 2\n</think>\n\n", "4")


@pytest.mark.parametrize(
    ("template", "turn", "left_out"),
    [
        (THINKING.replace("{{ thought }}", ""), {"content": "4", "reasoning_content": "2 and 2"}, "2 and 2"),
        (THINKING.replace("{{ thought }}", ""), {"content": "<think>2 and 2</think>4"}, "2 and 2"),
        (
            CHATML.replace("{{ message['content'] }}", "{{ message['content'].split('</think>')[-1] }}"),
            {"content": "<think>2 and 2</think>4"},
            "2 and 2",
        ),
        (THINKING.replace("{{ content }}", "{{ content | replace('is ', '') }}"), {"content": "4 is it"}, "4 is it"),
    ],
)
def test_a_part_of_the_completion_that_the_template_drops_is_named(
    tokenizers: dict[str, Any], template: str, turn: Message, left_out: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["text"].name_or_path)
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=rf"leaves out a part of .* of message 1 of the completion: '{left_out}'"):
        ids_of(tokenizer, {"role": "assistant", **turn})


def test_a_template_that_opens_the_thought_and_closes_none_is_refused(
    tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["text"].name_or_path)
    tokenizer.chat_template = OPENED
    with pytest.raises(DataError, match="does not continue the prompt"):
        ids_of(tokenizer, {"role": "assistant", "content": "4"})


@pytest.mark.parametrize("given", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("read", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_given_to_the_template_under_the_name_that_it_reads(
    tokenizers: dict[str, Any], given: str, read: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["own"].name_or_path)
    tokenizer.chat_template = THINKING.replace("'reasoning_content'", f"'{read}'")
    ids = ids_of(tokenizer, {"role": "assistant", "content": "4", given: "2 and 2"})
    assert tokenizer.decode(ids) == "<think>\n2 and 2\n</think>\n\n4<|im_end|>"


def test_a_template_that_only_speaks_of_thinking_does_not_read_reasoning(tokenizers: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["own"].name_or_path)
    tokenizer.chat_template = "{# thinking is not rendered #}" + CHATML
    turns = [*QUESTION, {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}, *QUESTION]
    with pytest.raises(DataError, match="does not render 'reasoning_content' of message 2"):
        prompt_token_ids(tokenizer, turns)


# Other implementations


@pytest.mark.parametrize(
    ("template", "key", "opens", "thought"),
    [
        ("qwen3", "reasoning_content", False, "<think>\ntwo and two\n</think>\n\n"),
        ("qwen3_5_think", "reasoning_content", True, "two and two\n</think>\n\n"),
        ("nemotron_3_nano", "reasoning_content", True, "two and two\n</think>\n"),
        ("glm4moe", "reasoning_content", False, "\n<think>two and two</think>\n"),
        ("gptoss", "reasoning_content", False, None),
        ("gptoss", "thinking", False, None),
    ],
)
def test_real_templates_that_trl_ships_are_divided(
    tokenizers: dict[str, Any], template: str, key: str, opens: bool, thought: str | None
) -> None:
    trl = pytest.importorskip("trl", reason="needs TRL for its chat templates")
    file = Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
    if not file.exists():
        pytest.skip(f"this TRL has no {file.name}")
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["text"].name_or_path)
    tokenizer.chat_template = file.read_text(encoding="utf-8")
    tags = find_tags(tokenizer)
    assert tags == (HARMONY if template == "gptoss" else THINK)
    thinking, prompt = Thinking(tokenizer, tags), prompt_token_ids(tokenizer, QUESTION)
    assert thinking.opens(prompt) == opens
    turn = {"role": "assistant", "content": "It is 4", key: "two and two"}
    ids = completion_token_ids(tokenizer, QUESTION, [turn], tags=(tags.start, tags.end))
    completion = thinking.split(prompt, Completion("", ids, [], "stop"))
    assert completion.text.startswith("It is 4")
    assert "two and two" in (completion.reasoning or "")
    assert thought in (None, completion.reasoning)
    assert thinking.split(prompt, Completion("", ids[: completion.reasoning_tokens - 1], [], "length")).unfinished


VLLMS = """
import json, sys
from transformers import AutoTokenizer
from vllm.reasoning import ReasoningParserManager

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
parser = ReasoningParserManager.get_reasoning_parser("deepseek_r1")(tokenizer)
texts = json.loads(sys.argv[2])
ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
print(json.dumps([[parser.is_reasoning_end(i), parser.extract_reasoning(t, None)[1]] for i, t in zip(ids, texts)]))
"""


@pytest.mark.extended
def test_vllms_parser_of_deepseek_r1_finds_the_same_ends_and_the_same_answers(
    tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    """After a prompt that opens the thought, as that parser takes for granted."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM")
    tokenizer = tokenizers["own"]
    tokenizer.save_pretrained(tmp_path)
    texts = ["<think>2 and 2</think>4", "2 and 2</think>4", "<think>2 and 2", "<think></think>4"]
    texts += ["<think>a<think>b</think>4", "<think>a</think>4 <think>b", "4"]
    # In a process of its own: other tests take care that this one does not import vLLM.
    command = [sys.executable, "-c", VLLMS, str(tmp_path), json.dumps(texts)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    for text, (ended, answer) in zip(texts, json.loads(found.splitlines()[-1]), strict=True):
        completion = divided(tokenizer, text, prompt="2+2?<think>\n")
        assert completion.unfinished == (not ended), text
        if ended:
            assert answer == completion.text
