"""Prompts and completions as token ids, for templates and tokenizers of several kinds.

Expected ids are spelled out as vocabulary entries: the tiny tokenizer has one per byte ("Ċ" is a newline, "Ġ" a space).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from iterdpo.data.rendering import (
    common_length,
    completion_token_ids,
    engine_ends,
    load_tokenizer,
    prompt_token_ids,
    turn_ends,
)
from iterdpo.errors import DataError, UserError
from iterdpo.testing import CHATML, build_tiny_checkpoint
from iterdpo.types import Chat, Message

USER = [{"role": "user", "content": "hi"}]
OPENED = ["<|im_start|>", *"user", "Ċ", *"hi", "<|im_end|>", "Ċ", "<|im_start|>", *"assistant", "Ċ"]


def byte_tokenizer(*, template: str | None = CHATML, wrap: str | None = None, merge_newlines: bool = False) -> Any:
    """`wrap` is what the tokenizer puts around a text of its own accord: "<s> $A", "$A </s>"."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
    tokens = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(["ĊĊ"] if merge_newlines else [])]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")] if merge_newlines else []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    if wrap is not None:
        used = [(token, vocab[token]) for token in wrap.split() if token in vocab]
        backend.post_processor = processors.TemplateProcessing(single=wrap, special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<|endoftext|>", chat_template=template
    )


def tokens(tokenizer: Any, ids: list[int]) -> list[str]:
    return tokenizer.convert_ids_to_tokens(ids)


def test_messages_become_the_template_up_to_the_opening_of_the_assistants_turn(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    assert tokens(tokenizer, prompt_token_ids(tokenizer, USER)) == OPENED


def test_a_completion_ends_with_the_templates_end_token_and_without_the_newline_behind_it(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    assert tokens(tokenizer, completion_token_ids(tokenizer, USER, "yo")) == ["y", "o", "<|im_end|>"]


def test_an_end_token_that_is_not_the_tokenizers_eos_ends_a_completion_too() -> None:
    tokenizer = byte_tokenizer()  # ChatML closes with <|im_end|>, and EOS is </s>
    assert tokens(tokenizer, completion_token_ids(tokenizer, USER, "yo")) == ["y", "o", "<|im_end|>"]


def test_a_template_without_an_end_token_gets_eos() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = byte_tokenizer(template=template + "{% if add_generation_prompt %}assistant: {% endif %}")
    assert tokens(tokenizer, completion_token_ids(tokenizer, USER, "a<s>b")) == ["a", "<s>", "b", "Ċ", "</s>"]


def test_completion_messages_are_rendered_like_the_assistants_text() -> None:
    tokenizer = byte_tokenizer()
    as_messages = completion_token_ids(tokenizer, USER, [{"role": "assistant", "content": "yo"}])
    assert as_messages == completion_token_ids(tokenizer, USER, "yo")


def test_a_bos_in_the_template_and_in_the_tokenizer_appears_once() -> None:
    tokenizer = byte_tokenizer(template="{{ bos_token }}" + CHATML, wrap="<s> $A")
    assert tokens(tokenizer, prompt_token_ids(tokenizer, USER)) == ["<s>", *OPENED]
    assert tokens(tokenizer, completion_token_ids(tokenizer, USER, "yo")) == ["y", "o", "<|im_end|>"]


def test_a_bos_that_only_the_tokenizer_adds_is_left_out_of_messages() -> None:
    tokenizer = byte_tokenizer(wrap="<s> $A")
    assert tokens(tokenizer, prompt_token_ids(tokenizer, USER)) == OPENED


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [(None, ["h", "i"]), ("<s> $A", ["<s>", "h", "i"]), ("<s> $A </s>", ["<s>", "h", "i"]), ("$A </s>", ["h", "i"])],
)
def test_plain_text_gets_the_special_tokens_in_front_and_none_behind(wrap: str | None, expected: list[str]) -> None:
    tokenizer = byte_tokenizer(template=None, wrap=wrap)
    assert tokens(tokenizer, prompt_token_ids(tokenizer, "hi")) == expected


def test_plain_text_with_its_own_bos_and_eos_keeps_one_of_each() -> None:
    tokenizer = byte_tokenizer(wrap="<s> $A </s>")
    assert tokens(tokenizer, prompt_token_ids(tokenizer, "<s>hi</s>")) == ["<s>", "h", "i", "</s>"]


@pytest.mark.parametrize("wrap", [None, "<s> $A", "<s> $A </s>"])
def test_a_plain_completion_has_no_bos_and_one_eos(wrap: str | None) -> None:
    tokenizer = byte_tokenizer(template=None, wrap=wrap)
    assert tokens(tokenizer, completion_token_ids(tokenizer, "hi", " yo")) == ["Ġ", "y", "o", "</s>"]


def test_tokens_do_not_merge_across_the_start_of_a_completion() -> None:
    tokenizer = byte_tokenizer(merge_newlines=True)
    assert tokens(tokenizer, completion_token_ids(tokenizer, USER, "\nyo")) == ["Ċ", "y", "o", "<|im_end|>"]
    assert tokens(tokenizer, completion_token_ids(tokenizer, "hi\n", "\nyo")) == ["Ċ", "y", "o", "</s>"]


def test_a_tokenizer_that_marks_word_starts_adds_no_space_before_the_completion() -> None:
    pieces = ["<s>", "</s>", "▁", "▁yes", "hi", "▁hi", *"hiyes"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert tokens(tokenizer, completion_token_ids(tokenizer, "hi", " yes")) == ["▁yes", "</s>"]


def test_an_empty_thought_that_a_template_writes_stays_in_the_completion() -> None:
    template = CHATML.replace(
        "{{ message['content'] }}",
        "{% if message['role'] == 'assistant' %}<think></think>{% endif %}{{ message['content'] }}",
    )
    tokenizer = byte_tokenizer(template=template)
    assert tokens(tokenizer, completion_token_ids(tokenizer, USER, "yo"))[-3:] == ["y", "o", "<|im_end|>"]
    assert tokenizer.decode(completion_token_ids(tokenizer, USER, "yo")) == "<think></think>yo<|im_end|>"


def test_a_template_that_opens_with_a_thought_and_strips_it_from_the_finished_turn_is_refused() -> None:
    template = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    tokenizer = byte_tokenizer(template=template)
    with pytest.raises(
        DataError, match=r"opens the assistant's turn with '<think>\\n'.*finished turn with 'yo<\|im_end"
    ):
        completion_token_ids(tokenizer, USER, "yo")


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    template = (
        "{% for m in messages %}{{ m.content if loop.last or not m.content.startswith('?') else m.content | upper }}</s>"
        "{% endfor %}"
    )
    with pytest.raises(DataError, match="does not continue the prompt"):
        completion_token_ids(byte_tokenizer(template=template), [{"role": "user", "content": "?hi"}], "yo")


def test_messages_without_a_chat_template_are_refused_with_the_remedy() -> None:
    with pytest.raises(DataError, match="has no chat template; give prompts as plain text, or use a checkpoint with"):
        prompt_token_ids(byte_tokenizer(template=None), USER)


def test_a_prompt_that_ends_with_an_assistant_turn_is_refused() -> None:
    with pytest.raises(DataError, match="ends with an assistant turn"):
        prompt_token_ids(byte_tokenizer(), [*USER, {"role": "assistant", "content": "yo"}])


def test_a_templates_own_refusal_is_passed_on_with_the_roles() -> None:
    tokenizer = byte_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="refuses the messages with roles user, user: roles must alternate"):
        prompt_token_ids(tokenizer, USER * 2)


def test_messages_after_plain_text_are_refused() -> None:
    with pytest.raises(DataError, match="plain text and the completion is messages"):
        completion_token_ids(byte_tokenizer(), "hi", USER)


def test_a_tokenizer_without_eos_cannot_close_plain_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="has no EOS token"):
        completion_token_ids(tokenizer, "hi", " yo")


def test_a_missing_checkpoint_directory_is_named() -> None:
    with pytest.raises(UserError, match=r"\./no-such-dir: no such checkpoint directory"):
        load_tokenizer("./no-such-dir")


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer can be loaded from it .*give a checkpoint directory that has"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("a", "b", "shared"), [("abc", "abd", 2), ("ab", "abc", 2), ("", "a", 0), ([1, 2], [1, 2], 2)])
def test_common_length_counts_the_leading_items_that_are_equal(a: Any, b: Any, shared: int) -> None:
    assert common_length(a, b) == shared


# Ends


@pytest.mark.parametrize("completion", ["Blue.<|im_end|>", "Blue.<|im_end|>\n", "Blue.<|im_end|> <|im_end|>\n\n"])
@pytest.mark.parametrize("prompt", ["hi", USER])
def test_an_end_token_that_the_text_brings_itself_is_the_only_one(completion: str, prompt: Any) -> None:
    ids = completion_token_ids(byte_tokenizer(), prompt, completion)
    assert tokens(byte_tokenizer(), ids) == [*"Blue.", "<|im_end|>"]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("Blue.</s>", [*"Blue.", "</s>"]),
        ("Blue.</s>\n", [*"Blue.", "</s>"]),
        ("Blue.\n", [*"Blue.", "Ċ", "</s>"]),
        ("Bl<|im_end|>ue.", [*"Bl", "<|im_end|>", *"ue.", "</s>"]),
        ("Blue.<|im_start|>", [*"Blue.", "<|im_start|>", "</s>"]),
    ],
)
def test_a_text_is_closed_by_one_end_token_and_keeps_what_is_before_it(completion: str, expected: list[str]) -> None:
    tokenizer = byte_tokenizer()
    assert tokens(tokenizer, completion_token_ids(tokenizer, "hi", completion)) == expected


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ("<|im_end|>\n", {"</s>", "<|im_end|>"}),
        ("<|im_end|>\n<|endoftext|>", {"</s>", "<|im_end|>"}),
        (" </s>", {"</s>"}),
        ("\n", {"</s>"}),
        (" and more <|im_end|>", {"</s>"}),
    ],
)
def test_a_turn_ends_at_eos_and_at_the_token_that_the_template_writes_after_it(tail: str, expected: set[str]) -> None:
    tokenizer = byte_tokenizer(template="{% for m in messages %}{{ m.content }}" + tail + "{% endfor %}")
    assert {*tokens(tokenizer, sorted(turn_ends(tokenizer)))} == expected
    ids = completion_token_ids(tokenizer, [{"role": "user", "content": "hi"}], "yo")
    assert ids[-1] in turn_ends(tokenizer)
    assert not set(ids[:-1]) & turn_ends(tokenizer)


NEEDS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}" + CHATML


@pytest.mark.parametrize("template", [NEEDS_SYSTEM, {"tool_use": CHATML}, {"default": CHATML, "rag": "{{ x.y }}"}])
def test_the_end_of_a_turn_is_found_in_templates_that_refuse_most_chats(template: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    assert {*tokens(tokenizer, sorted(turn_ends(tokenizer)))} == {"</s>", "<|im_end|>"}


@pytest.mark.parametrize(("listed", "ids"), [(0, {0}), ([0, 1], {0, 1}), (None, set()), ("x", set())])
def test_a_turn_also_ends_at_the_tokens_of_generation_config(tmp_path: Path, listed: Any, ids: set[int]) -> None:
    model = build_tiny_checkpoint(tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    tokenizer = load_tokenizer(model)
    assert engine_ends(tokenizer) == turn_ends(tokenizer) == ids | {tokenizer.eos_token_id}


def test_a_token_that_the_model_does_not_embed_is_refused(tmp_path: Path) -> None:
    model = build_tiny_checkpoint(tmp_path / "model")
    saved = json.loads((model / "tokenizer.json").read_text())
    saved["added_tokens"].append({**saved["added_tokens"][0], "id": 259, "content": "<image_soft_token>"})
    (model / "tokenizer.json").write_text(json.dumps(saved))
    tokenizer = load_tokenizer(model)
    assert completion_token_ids(tokenizer, USER, "yo") == completion_token_ids(load_tokenizer(model), USER, "yo")
    for give in (
        lambda: prompt_token_ids(tokenizer, "<image_soft_token>?"),
        lambda: completion_token_ids(tokenizer, "x", "<image_soft_token>"),
    ):
        with pytest.raises(
            DataError, match="the token '<image_soft_token>', number 259, but the model embeds only 259"
        ):
            give()


# Text that is given is text that is trained


def sentence_piece(scheme: str) -> Any:
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    alphabet = [f"<0x{i:02X}>" for i in range(256)]
    learn = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *alphabet], show_progress=False)
    backend.train_from_iterator(["[INST] What does it cost? [/INST] 46 dollars, I think, not $46"] * 20, learn)
    saved = json.loads(backend.to_str())
    saved["added_tokens"] = saved["added_tokens"][:3]
    backend = Tokenizer.from_str(json.dumps(saved))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


SENTENCE_PIECE = {scheme: sentence_piece(scheme) for scheme in ("always", "first")}
pieces = st.lists(
    st.sampled_from(["46", " ", "  ", "\n", "dollars", "cost?", "[/INST]", "é", "🙂", "$", "I"]), min_size=1
)


@given(prompt=pieces, completion=pieces, scheme=st.sampled_from(["always", "first", "bytes"]))
def test_prompt_and_completion_decode_to_the_text_that_was_given(
    prompt: list[str], completion: list[str], scheme: str
) -> None:
    before, after = "".join(prompt), "".join(completion)
    tokenizer = byte_tokenizer(template=None) if scheme == "bytes" else SENTENCE_PIECE[scheme]
    try:
        ids = prompt_token_ids(tokenizer, before) + completion_token_ids(tokenizer, before, after)
    except DataError as error:
        assert "cannot tokenize the completion apart" in str(error)  # noqa: PT017  # a message is right too
        return
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False, skip_special_tokens=True)
    assert text in (before + after, (before + after).removeprefix(" "))


@pytest.mark.parametrize("scheme", ["always", "first"])
@pytest.mark.parametrize(
    ("prompt", "completion"), [("[/INST] ", "46 dollars"), ("[/INST]", " 46 dollars"), ("[/INST]", "46 dollars")]
)
def test_no_space_comes_between_prompt_and_completion(scheme: str, prompt: str, completion: str) -> None:
    tokenizer = SENTENCE_PIECE[scheme]
    ids = prompt_token_ids(tokenizer, prompt) + completion_token_ids(tokenizer, prompt, completion)
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + completion


# What a template can do


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('System role not supported') }}", "refuses the messages with roles user: System role not"),
        ("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[7].content.x }}", "has no element 7|undefined"),
        ("{{ nobody.knows }}", "'nobody' is undefined"),
        ("{{ strptime_now('%d') }}", "'strptime_now' is undefined"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ 'x'.__class__ }}{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "SecurityError|unsafe"),
        ("{{ range(10000000) | list }}", "OverflowError"),
        ("{{ raise_exception('a\\nb\\x1b[2J') }}", r"a\\nb\\x1b"),
    ],
)
def test_whatever_a_template_raises_is_one_message(template: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        prompt_token_ids(byte_tokenizer(template=template), USER)
    assert "\n" not in str(caught.value)
    assert "change these messages, or the checkpoint's chat template" in str(caught.value)


def test_several_templates_of_which_none_is_the_default_are_named() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(DataError, match=r"several chat templates \(rag, tool_use\), but none is named default; write"):
        prompt_token_ids(tokenizer, USER)
    tokenizer.chat_template = {"default": CHATML, "rag": "x"}
    assert tokens(tokenizer, prompt_token_ids(tokenizer, USER)) == OPENED


TOOL = {"type": "function", "function": {"name": "rain_in", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "rain_in", "arguments": {"city": "Oslo"}}}
ANSWER = [*USER, {"role": "assistant", "content": "yo"}, *USER]


@pytest.mark.parametrize(
    ("messages", "settings", "left_out"),
    [
        (USER, {"tools": [TOOL]}, "does not render tools"),
        (
            [*USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, *USER],
            {},
            "does not render 'tool_calls' of message 2, of the role 'assistant'",
        ),
        ([{**ANSWER[0], "name": "Ann"}], {}, "does not render 'name' of message 1"),
        (
            [*USER, {**ANSWER[1], "reasoning_content": "so"}, *USER],
            {},
            "does not render 'reasoning_content' of message 2",
        ),
        ([*USER, {**ANSWER[1], "reasoning": "so"}, *USER], {}, "does not render 'reasoning' of message 2"),
        (USER, {"enable_thinking": False}, "has no variable 'enable_thinking', which is in chat_template_kwargs"),
        (USER, {"chat_template": "{{ 7 }}"}, "has no variable 'chat_template'"),
        (USER, {"tokenize": True}, "has no variable 'tokenize'"),
        (USER, {"messages": []}, "has no variable 'messages'"),
    ],
)
def test_a_part_that_the_template_leaves_out_is_named(
    messages: list[Message], settings: dict[str, Any], left_out: str
) -> None:
    with pytest.raises(DataError, match=left_out):
        prompt_token_ids(byte_tokenizer(), Chat(messages, settings))


@pytest.mark.parametrize("role", ["system", "tool", "developer", "critic"])
def test_a_message_that_the_template_leaves_out_is_named_by_its_role(role: str) -> None:
    template = CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role in 'user assistant' %}"
    )
    tokenizer = byte_tokenizer(template=template)
    with pytest.raises(DataError, match=f"leaves out message 1, of the role '{role}'; give its text in a role"):
        prompt_token_ids(tokenizer, [{"role": role, "content": "hi"}, *USER])
    assert tokens(tokenizer, prompt_token_ids(tokenizer, USER)) == OPENED


def test_a_template_may_trim_and_quote_what_it_writes_and_leave_out_earlier_thoughts() -> None:
    template = CHATML.replace(
        "{{ message['content'] }}",
        "{% if loop.last and message.reasoning_content %}{{ message.reasoning_content }}{% endif %}"
        "{{ message['content'] | trim | tojson }}",
    )
    chat = [
        *USER,
        {"role": "assistant", "content": " yo\n", "reasoning_content": "so"},
        {"role": "user", "content": " hi "},
    ]
    tokenizer = byte_tokenizer(template=template)
    assert '"yo"<|im_end|>' in tokenizer.decode(prompt_token_ids(tokenizer, chat))


TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML.replace(
    "{{ message['content'] }}",
    "{{ message['content'] or '' }}{% for c in message['tool_calls'] or [] %}CALL {{ c.function.arguments | tojson }}{% endfor %}",
)


def test_tools_calls_and_values_are_what_the_template_writes() -> None:
    tokenizer = byte_tokenizer(template=TOOLS + "{% if enable_thinking %}<think>{% endif %}")
    called = [*USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "yes"}]
    chat = Chat(called, {"tools": [TOOL], "enable_thinking": True})
    text = tokenizer.decode(prompt_token_ids(tokenizer, chat))
    assert text.startswith(json.dumps([TOOL]))
    assert 'CALL {"city": "Oslo"}<|im_end|>' in text
    assert text.endswith("<think>")


@pytest.mark.parametrize(
    ("writes", "expected"),
    [("c.function.arguments | tojson", '{"city": "Oslo"}'), ("'' + c.function.arguments", '{"city":"Oslo"}')],
)
def test_arguments_that_are_text_are_given_as_the_template_takes_them(writes: str, expected: str) -> None:
    """OpenAI writes JSON text; most templates want an object, a few the text."""
    tokenizer = byte_tokenizer(template=TOOLS.replace("c.function.arguments | tojson", writes))
    call = {"type": "function", "function": {"name": "rain_in", "arguments": '{"city":"Oslo"}'}}
    called = [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "yes"}]
    assert f"CALL {expected}<|im_end|>" in tokenizer.decode(prompt_token_ids(tokenizer, called))


def test_values_of_the_configuration_are_given_to_the_template_and_those_of_a_row_come_first(tmp_path: Path) -> None:
    model = build_tiny_checkpoint(tmp_path / "model")
    (model / "chat_template.jinja").write_text(CHATML + "{{ mood }}")
    tokenizer = load_tokenizer(model, chat_template_kwargs={"mood": "calm"})
    assert tokenizer.decode(prompt_token_ids(tokenizer, USER)).endswith("calm")
    assert tokenizer.decode(prompt_token_ids(tokenizer, Chat(USER, {"mood": "glad"}))).endswith("glad")


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}, "model.trust_remote_code=true"),
        ({"tokenizer_class": "NoSuchTokenizer"}, None),
    ],
)
def test_a_tokenizer_with_code_of_its_own_is_loaded_only_if_that_is_allowed(
    tmp_path: Path, tiny_model: Path, settings: dict[str, Any], remedy: str | None
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    if remedy is None:  # transformers reads tokenizer.json then
        assert load_tokenizer(model)("a").input_ids
        return
    with pytest.raises(UserError, match="its tokenizer needs its own Python code") as caught:
        load_tokenizer(model)
    assert remedy in str(caught.value)


def test_a_tokenizer_that_is_damaged_is_one_line(tmp_path: Path, tiny_model: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "tokenizer.json").write_text('{"model": {"type": "Unknown"}}')
    with pytest.raises(UserError, match="no tokenizer can be loaded from it") as caught:
        load_tokenizer(model)
    assert "\n" not in str(caught.value)
