"""Prompts and completions as token ids, for templates and tokenizers of several kinds.

Expected ids are spelled out as vocabulary entries: the tiny tokenizer has one per byte ("Ċ" is a newline, "Ġ" a space).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from iterdpo.data.rendering import common_length, completion_token_ids, load_tokenizer, prompt_token_ids
from iterdpo.errors import DataError, UserError
from iterdpo.testing import CHATML

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
        "{% for m in messages %}{% if loop.last or not m.content.startswith('?') %}{{ m.content }}{% endif %}</s>"
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
