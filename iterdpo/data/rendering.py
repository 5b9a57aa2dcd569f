"""The only place where a chat template becomes token ids.

Messages are rendered to text by the checkpoint's template, and the text is tokenized once, without special tokens:
the template has written them already. Plain text gets the special tokens that the tokenizer puts in front of a text,
and none after it, since the policy continues there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from iterdpo.errors import DataError, UserError
from iterdpo.types import Message


def load_tokenizer(path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint directory or hub id, with its chat template; a UserError if none can be loaded."""
    from transformers import AutoTokenizer

    local = Path(path).expanduser()
    if str(path).startswith(("/", ".", "~")) and not local.exists():
        raise UserError(f"{path}: no such checkpoint directory; give one, or a hub id")
    source = local if local.exists() else path
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{path}: no tokenizer can be loaded from it ({reason}); give a checkpoint directory that has "
            "tokenizer.json and tokenizer_config.json, or a hub id"
        ) from error


def prompt_token_ids(tokenizer: Any, content: str | list[Message]) -> list[int]:
    """The ids that the policy continues: messages up to the template's opening of the assistant's turn, or plain text.

    Raises:
        DataError: messages without a chat template, messages that the template refuses, or that end with an
            assistant turn.
    """
    return prompts_token_ids(tokenizer, [content])[0]


def prompts_token_ids(tokenizer: Any, contents: Sequence[str | list[Message]]) -> list[list[int]]:
    """`prompt_token_ids` of each, several times as quick: the tokenizer is called once for all."""
    texts = [c if isinstance(c, str) else _opened(tokenizer, c) for c in contents]
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False).input_ids
    plain = [i for i, content in enumerate(contents) if isinstance(content, str)]
    # if the tokenizer does not say whether it puts a special token around a text, it may
    if plain and getattr(tokenizer, "num_special_tokens_to_add", lambda: 1)() > 0:
        whole = tokenizer([texts[i] for i in plain]).input_ids
        for i, with_specials in zip(plain, whole, strict=True):
            ids[i] = _with_opening_specials(tokenizer, ids[i], with_specials)
    return ids


def _with_opening_specials(tokenizer: Any, bare: list[int], whole: list[int]) -> list[int]:
    """`whole` without the end token that the tokenizer may have appended to `bare`."""
    if bare[:1] == [tokenizer.bos_token_id]:
        return bare  # the text brings its own BOS
    ends = range(len(bare), len(whole) + 1)
    return next((whole[:end] for end in ends if whole[end - len(bare) : end] == bare), bare)


def completion_token_ids(tokenizer: Any, content: str | list[Message], completion: str | list[Message]) -> list[int]:
    """The ids that continue `prompt_token_ids(tokenizer, content)`, ending with the end token, as a sampler stops there.

    Text that a template writes after the end token (usually a newline) is cut. `completion` is the assistant's text,
    or its messages if the prompt is messages. Prompt and completion are tokenized together if that leaves the
    prompt's ids unchanged, and separately otherwise: the policy always receives exactly the prompt's ids.

    Raises:
        DataError: messages after a plain-text prompt, a template that renders the finished turn otherwise than it
            opens one, or no end token to close the completion with.
    """
    if isinstance(content, str):
        if not isinstance(completion, str):
            raise DataError("the prompt is plain text and the completion is messages; give both as the same kind")
        opened, finished = content, content + completion
    else:
        turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        opened, finished = _opened(tokenizer, content), _render(tokenizer, [*content, *turns])
    before, ids = _encode(tokenizer, opened), _encode(tokenizer, finished)
    if ids[: len(before)] == before:
        ids = ids[len(before) :]
    elif finished.startswith(opened):
        ids = _encode(tokenizer, finished[len(opened) :])
    else:
        same = common_length(opened, finished)
        raise DataError(
            f"the chat template opens the assistant's turn with {opened[same:][:60]!r}, and the finished turn with "
            f"{finished[same:][:60]!r}, so the completion does not continue the prompt; use a checkpoint whose template "
            "keeps the two alike, or plain-text prompts and completions"
        )
    return _ended(tokenizer, ids, template=not isinstance(content, str))


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading items two sequences share: characters, tokens or messages."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _opened(tokenizer: Any, messages: list[Message]) -> str:
    """The prompt's text, up to and with the opening of the assistant's turn."""
    if messages and messages[-1]["role"] == "assistant":
        raise DataError("the prompt ends with an assistant turn; it must end before the completion: remove that turn")
    return _render(tokenizer, messages, add_generation_prompt=True)


def _render(tokenizer: Any, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            f"the prompt is messages, but the tokenizer {tokenizer.name_or_path!r} has no chat template; give prompts "
            "as plain text, or use a checkpoint with a chat template"
        )
    try:
        settings = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        return str(tokenizer.apply_chat_template(messages, **settings))
    except TemplateError as error:
        roles, name = ", ".join(m["role"] for m in messages), tokenizer.name_or_path
        raise DataError(f"the chat template of {name!r} refuses the messages with roles {roles}: {error}") from error


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _ended(tokenizer: Any, ids: list[int], *, template: bool) -> list[int]:
    """`ids` up to the end token that the template wrote; followed by EOS if it wrote none."""
    if template:
        marks = _special_ids(tokenizer)
        end = max((i for i, token in enumerate(ids) if token in marks), default=None)
        # a special token with text behind it is the completion's own, and closes nothing
        if end is not None and not tokenizer.decode(ids[end + 1 :]).strip():
            return ids[: end + 1]
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, and no template closes the completion; set "
            "eos_token in the checkpoint's tokenizer_config.json"
        )
    return [*ids, tokenizer.eos_token_id]


@lru_cache(maxsize=1)
def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Kept: with thousands of reserved tokens this takes milliseconds, longer than to encode a completion."""
    return frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
