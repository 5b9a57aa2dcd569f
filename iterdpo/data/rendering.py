"""The only place where a chat template becomes token ids.

Messages are rendered to text by the checkpoint's template, and the text is tokenized once, without special tokens:
the template has written them already. Plain text gets the special tokens that the tokenizer puts in front of a text,
and none after it, since the policy continues there.

A template that would leave out a part of the chat (a message, its tool calls, the tools) is refused: the policy would
be trained on something else than the data say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from iterdpo.errors import DataError, UserError
from iterdpo.escape import printable
from iterdpo.types import Content, Message, template_settings

REASONING = ("reasoning_content", "reasoning", "thinking")
RENDERED = ("tool_calls", "function_call", *REASONING, "name")
"""Keys of a message that a template has to render, beside its role and content. A tool's `name` is in its call."""
OWN_ARGUMENTS = {
    *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask", "bos_token", "eos_token"),
}
"""Names that `chat_template_kwargs` cannot have."""
ANCHORS = ("\n", ":", "a", ".", "0", ")")
MARK = "\u2042q"  # what a probe appends to a message; trimming and quoting leave it in place
MOST_SHAPES = 10_000


class TokenizerError(DataError):
    """A tokenizer that renders no chat, or closes no completion, whatever is in it."""


def load_tokenizer(
    path: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """The tokenizer of a checkpoint directory or hub id, with its chat template; a UserError if none can be loaded.

    `chat_template_kwargs` are values for the template, such as `{"enable_thinking": False}`; those of a row come first.
    """
    from transformers import AutoTokenizer

    local = Path(path).expanduser()
    if str(path).startswith(("/", ".", "~")) and not local.exists():
        raise UserError(f"{path}: no such checkpoint directory; give one, or a hub id")
    source = local if local.exists() else path
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged file, a class or a package that is missing, an error in the tokenizer's code
        reason = printable(str(error).strip().partition("\n")[0])
        if "custom code" in reason and not trust_remote_code:
            problem = "its tokenizer needs its own Python code"
            raise UserError(f"{path}: {problem}; read it, then set model.trust_remote_code=true") from error
        raise UserError(
            f"{path}: no tokenizer can be loaded from it ({type(error).__name__}: {reason}); give a checkpoint directory "
            "that has tokenizer.json and tokenizer_config.json, or a hub id"
        ) from error
    tokenizer.chat_template_kwargs = dict(chat_template_kwargs or {})
    return tokenizer


def prompt_token_ids(tokenizer: Any, content: Content) -> list[int]:
    """The ids that the policy continues: messages up to the template's opening of the assistant's turn, or plain text.

    Raises:
        DataError: messages without a chat template, messages that the template refuses or of which it leaves out a
            part, that end with an assistant turn, or a token that the model does not embed.
    """
    return prompts_token_ids(tokenizer, [content])[0]


def prompts_token_ids(tokenizer: Any, contents: Sequence[Content]) -> list[list[int]]:
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
    for row in ids:
        _check_embedded(tokenizer, row)
    return ids


def _with_opening_specials(tokenizer: Any, bare: list[int], whole: list[int]) -> list[int]:
    """`whole` without the end token that the tokenizer may have appended to `bare`."""
    if bare[:1] == [tokenizer.bos_token_id]:
        return bare  # the text brings its own BOS
    ends = range(len(bare), len(whole) + 1)
    return next((whole[:end] for end in ends if whole[end - len(bare) : end] == bare), bare)


def completion_token_ids(
    tokenizer: Any, content: Content, completion: Content, *, tags: Sequence[str] = ()
) -> list[int]:
    """The ids that continue `prompt_token_ids(tokenizer, content)`, ending with the end token, as a sampler stops there.

    What follows the first end token at the end (usually a newline, or a second end token if the text brings one of its
    own) is cut. `completion` is the assistant's text, or its messages if the prompt is messages. Prompt and completion
    are tokenized together if that leaves the prompt's ids unchanged, and separately otherwise: the policy always
    receives exactly the prompt's ids, and the two decode to the text of both. `tags` are those around a thinking model's
    reasoning, which templates move and drop: then the completion is looked for in what was rendered.

    Raises:
        DataError: a part of the completion that the template leaves out, messages after a plain-text prompt, a template
            that renders the finished turn otherwise than it opens one, a tokenizer that cannot tokenize the two apart,
            or no end token to close the completion with.
    """
    if isinstance(content, str):
        if not isinstance(completion, str):
            raise DataError("the prompt is plain text and the completion is messages; give both as the same kind")
        opened, finished = content, content + completion
    else:
        turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        opened = _opened(tokenizer, content)
        finished = _render(tokenizer, [*content, *turns], template_settings(content))
        if tags:
            _check_found(tokenizer, turns, finished[common_length(opened, finished) :], tags)
    ids = _ended(tokenizer, _continuation(tokenizer, opened, finished))
    _check_embedded(tokenizer, ids)
    return ids


def turn_ends(tokenizer: Any) -> frozenset[int]:
    """The ids that end a completion, for the sampler and the trainer alike.

    They are the token with which the chat template closes an assistant's turn, the tokenizer's EOS, and the list
    `eos_token_id` of the checkpoint's generation_config.json.
    """
    return engine_ends(tokenizer) | _template_ends(tokenizer)


def engine_ends(tokenizer: Any) -> frozenset[int]:
    """Those of `turn_ends` at which an engine stops on its own: the tokenizer's EOS, and generation_config.json's."""
    return _listed_ends(tokenizer) | ({tokenizer.eos_token_id} - {None})


def decoded(tokenizer: Any, ids: Sequence[int], *, special: bool = True) -> str:
    """The text of the ids, exactly; without `special`, special tokens are left out."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False))


def template_sources(tokenizer: Any) -> list[str]:
    """The chat templates of the tokenizer, the default first; none if it has none."""
    templates = tokenizer.chat_template or {}
    named = templates if isinstance(templates, dict) else {"default": templates}
    return [named[name] for name in sorted(named, key=lambda name: name != "default")]


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading items two sequences share: characters, tokens or messages."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _continuation(tokenizer: Any, opened: str, finished: str) -> list[int]:
    """The ids of what `finished` has after `opened`, which is tokenized as it is alone."""
    before, whole = _encode(tokenizer, opened), _encode(tokenizer, finished)
    if whole[: len(before)] == before:
        return whole[len(before) :]
    if not finished.startswith(opened):
        same = common_length(opened, finished)
        raise DataError(
            f"the chat template opens the assistant's turn with {opened[same:][:60]!r}, and the finished turn with "
            f"{finished[same:][:60]!r}, so the completion does not continue the prompt; use a checkpoint whose template "
            "keeps the two alike, or plain-text prompts and completions"
        )
    # A tokenizer of the SentencePiece kind writes a space before a text, so the rest is tokenized after some other text.
    rest, text = finished[len(opened) :], decoded(tokenizer, whole)
    for anchor in ("", opened[-1:], *ANCHORS):
        start, ids = _encode(tokenizer, anchor), _encode(tokenizer, anchor + rest)
        if ids[: len(start)] == start and decoded(tokenizer, before + ids[len(start) :]) == text:
            return ids[len(start) :]
    raise DataError(
        f"the tokenizer {tokenizer.name_or_path!r} cannot tokenize the completion apart from the prompt, which ends with "
        f"{opened[-20:]!r}; move the space or the characters at the border from one to the other"
    )


def _opened(tokenizer: Any, messages: list[Message]) -> str:
    """The prompt's text, up to and with the opening of the assistant's turn."""
    if messages and messages[-1]["role"] == "assistant":
        raise DataError("the prompt ends with an assistant turn; it must end before the completion: remove that turn")
    return _render(tokenizer, messages, template_settings(messages), add_generation_prompt=True)


# The chat template


def _render(
    tokenizer: Any, messages: list[Message], settings: Mapping[str, Any], *, add_generation_prompt: bool = False
) -> str:
    """The messages as text.

    Raises:
        DataError: there is no template, it raises whatever error, or it leaves out a part of the chat.
    """
    settings = {**getattr(tokenizer, "chat_template_kwargs", {}), **settings}
    _check_template(tokenizer, settings)
    messages = [_with_known_reasoning(tokenizer, settings, message) for message in messages]
    rendered = _applied(tokenizer, messages, settings, add_generation_prompt)
    shapes = _shapes(tokenizer)
    shape = (add_generation_prompt, *map(_shape, messages), *sorted(settings))
    if shape not in shapes:
        _check_nothing_is_left_out(tokenizer, messages, settings, rendered, add_generation_prompt)
        if len(shapes) < MOST_SHAPES:
            shapes.add(shape)
    return rendered


def _applied(tokenizer: Any, messages: list[Message], settings: Mapping[str, Any], add_generation_prompt: bool) -> str:
    """The rendered text. Arguments of tool calls that are JSON text are given as objects, which templates expect, and
    as they are to a template that takes only text.
    """
    arguments = {"tokenize": False, "add_generation_prompt": add_generation_prompt, **settings}
    with_objects = [_with_objects(message) for message in messages]
    try:
        try:
            return str(tokenizer.apply_chat_template(with_objects, **arguments))
        except Exception:
            if with_objects == messages:
                raise
            return str(tokenizer.apply_chat_template(list(messages), **arguments))
    except Exception as error:  # jinja's own, and whatever an expression in the template raises
        roles = ", ".join(str(message["role"]) for message in messages[:8]) + (", …" if len(messages) > 8 else "")
        said = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise DataError(
            f"the chat template of {tokenizer.name_or_path!r} refuses the messages with roles {printable(roles)}: "
            f"{printable(said)[:300]}; change these messages, or the checkpoint's chat template"
        ) from error


def _with_objects(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    changed = []
    for call in calls:
        function = call.get("function") or call
        arguments = _object(function.get("arguments"))
        if arguments is not None:
            function = {**function, "arguments": arguments}
            call = {**call, "function": function} if call.get("function") else function
        changed.append(call)
    return {**message, "tool_calls": changed}


def _with_known_reasoning(tokenizer: Any, settings: Mapping[str, Any], message: Message) -> Message:
    """The message with its reasoning under the name that the template reads, if it reads another one than the message's."""
    given = [key for key in REASONING if message.get(key)]
    if len(given) != 1 or _reads(tokenizer, settings, given[0]):
        return message
    known = next((key for key in REASONING if _reads(tokenizer, settings, key)), given[0])
    return {known if key == given[0] else key: value for key, value in message.items() if key != known or key in given}


def _reads(tokenizer: Any, settings: Mapping[str, Any], key: str) -> bool:
    """Whether the template that is used looks for this key in something."""
    return re.search(rf"[.'\"]{key}\b", _source(tokenizer, settings)) is not None


def _object(text: Any) -> dict[str, Any] | None:
    """The JSON object that a text holds; None if it holds none."""
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _check_template(tokenizer: Any, settings: Mapping[str, Any]) -> None:
    name, templates = tokenizer.name_or_path, tokenizer.chat_template
    if not templates:
        raise TokenizerError(
            f"the prompt is messages, but the tokenizer {name!r} has no chat template; give prompts "
            "as plain text, or use a checkpoint with a chat template"
        )
    usable = {"default", "tool_use"} if "tools" in settings else {"default"}
    if isinstance(templates, dict) and not usable & templates.keys():
        raise TokenizerError(
            f"the tokenizer {name!r} has several chat templates ({', '.join(sorted(templates))}), but none is named "
            "default; write the one to use to chat_template.jinja in the checkpoint's directory"
        )
    for variable in settings.keys() - {"tools"}:
        if variable in OWN_ARGUMENTS or not _mentions(tokenizer, settings, variable):
            raise DataError(
                f"the chat template of {name!r} has no variable {printable(variable)!r}, which is in chat_template_kwargs "
                "(of the row, or of the configuration's section model); remove it there"
            )


def _check_nothing_is_left_out(
    tokenizer: Any, messages: list[Message], settings: Mapping[str, Any], rendered: str, add_generation_prompt: bool
) -> None:
    """Compare with what the template writes for a chat that differs in one part.

    Raises:
        DataError: for the first part that makes no difference.
    """
    where = f"the chat template of {tokenizer.name_or_path!r}"

    def matters(changed: list[Message], settings: Mapping[str, Any] = settings) -> bool:
        try:
            return _applied(tokenizer, changed, settings, add_generation_prompt) != rendered
        except DataError:
            return True

    if "tools" in settings and not matters(messages, {k: v for k, v in settings.items() if k != "tools"}):
        raise DataError(
            f"{where} does not render tools, so the policy would not see them; use a checkpoint whose template does, or "
            "remove the column 'tools'"
        )
    for number, message in enumerate(messages):
        others = messages[:number], messages[number + 1 :]
        what = f"message {number + 1}, of the role {printable(message['role'])[:40]!r}"
        for key in RENDERED:
            if not message.get(key) or (key == "name" and message["role"] in ("tool", "function")):
                continue
            if _mentions(tokenizer, settings, key):  # as it likes: many leave out the thoughts of earlier turns
                continue
            without = {k: v for k, v in message.items() if k != key}
            if not matters([*others[0], without, *others[1]]):
                raise DataError(
                    f"{where} does not render {key!r} of {what}, so the policy would not see it; use a checkpoint whose "
                    "template does, write it into the content, or remove it"
                )
        content = message.get("content")
        if content and not matters([*others[0], {**message, "content": content + MARK}, *others[1]]):
            raise DataError(
                f"{where} leaves out {what}; give its text in a role that the template renders, or use another checkpoint"
            )


def _check_found(tokenizer: Any, turns: list[Message], rendered: str, tags: Sequence[str]) -> None:
    """Raises a DataError unless the assistant's reasoning and words are in the rendered text, in their order."""
    place = 0
    for number, message in enumerate(turns, 1):
        if message["role"] != "assistant":
            continue
        thoughts = [(key, message[key]) for key in REASONING if message.get(key)]
        words = re.split("|".join(map(re.escape, tags)), message.get("content") or "")
        for key, text in (*thoughts, *(("content", part) for part in words)):
            found = rendered.find(text.strip(), place)
            if found < 0:
                raise DataError(
                    f"the chat template of {tokenizer.name_or_path!r} leaves out a part of {key!r} of message {number} of "
                    f"the completion: {printable(text.strip())[:60]!r}; use a checkpoint whose template renders it, give "
                    "prompt and completion as plain text, or remove that part"
                )
            place = found + len(text.strip())


def _shape(message: Message) -> tuple[Any, ...]:
    """What decides, of a message, whether a template renders all of it."""
    return (message["role"], bool(message.get("content")), *(key for key in RENDERED if message.get(key)))


@lru_cache(maxsize=4)
def _shapes(tokenizer: Any) -> set[Any]:
    """The shapes of the chats that this tokenizer's template was seen to render whole."""
    return set()


def _mentions(tokenizer: Any, settings: Mapping[str, Any], name: str) -> bool:
    """Whether the template that is used has this name in it."""
    return re.search(rf"\b{re.escape(name)}\b", _source(tokenizer, settings)) is not None


def _source(tokenizer: Any, settings: Mapping[str, Any]) -> str:
    """The template that is used."""
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source["tool_use" if "tools" in settings and "tool_use" in source else "default"]
    return str(source)


# Ends and embeddings


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """`ids` up to the first of the end tokens after which no text comes; followed by EOS if there is none."""
    ends, specials, cut = turn_ends(tokenizer), _special_ids(tokenizer), None
    for place in reversed(range(len(ids))):
        if ids[place] in ends:
            cut = place
        elif ids[place] not in specials and decoded(tokenizer, [ids[place]]).strip():
            break
    if cut is not None:
        return ids[: cut + 1]
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, and no template closes the completion; set "
            "eos_token in the checkpoint's tokenizer_config.json"
        )
    return [*ids, tokenizer.eos_token_id]


@lru_cache(maxsize=4)
def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Kept: with thousands of reserved tokens this takes milliseconds, longer than to encode a completion."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    return frozenset(i for i, token in added if token.special) - {tokenizer.unk_token_id if added else None}


@lru_cache(maxsize=4)
def _template_ends(tokenizer: Any) -> frozenset[int]:
    """The token with which the chat template, or each of several, closes an assistant's turn, if it is one."""
    templates = tokenizer.chat_template or {}
    sources = templates.values() if isinstance(templates, dict) else [templates]
    return frozenset(end for source in sources if (end := _closing_token(tokenizer, source)) is not None)


def _closing_token(tokenizer: Any, template: str) -> int | None:
    answer = "Qxzv7"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
    tail = ""
    for opening in ([], [{"role": "system", "content": "Be brief."}]):  # a few want a system message
        try:
            text = str(tokenizer.apply_chat_template([*opening, *chat], chat_template=template, tokenize=False))
        except Exception:  # what a template refuses is said when it renders the data
            continue
        _, found, tail = text.rpartition(answer)
        tail = tail if found else ""
        break
    for token in _encode(tokenizer, tail) if tail else []:
        if token in tokenizer.added_tokens_decoder:
            return int(token)
        if decoded(tokenizer, [token]).strip():
            break
    return None


@lru_cache(maxsize=4)
def _listed_ends(tokenizer: Any) -> frozenset[int]:
    for file in ("generation_config.json", "config.json"):  # engines read the second if there is no first
        if (settings := _settings_file(tokenizer, file)) is not None:
            listed = settings.get("eos_token_id")
            ends: Iterable[Any] = listed if isinstance(listed, list) else [listed]
            return frozenset(end for end in ends if isinstance(end, int))
    return frozenset()


def _check_embedded(tokenizer: Any, ids: list[int]) -> None:
    limit = _embedded(tokenizer)
    if limit is not None and ids and (token := max(ids)) >= limit:
        raise DataError(
            f"the text has the token {tokenizer.convert_ids_to_tokens(token)!r}, number {token:,}, but the model embeds "
            f"only {limit:,} tokens; remove it from the text"
        )


@lru_cache(maxsize=4)
def _embedded(tokenizer: Any) -> int | None:
    """How many tokens the checkpoint's model embeds, if its config.json says."""
    config = _settings_file(tokenizer, "config.json") or {}
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return size if isinstance(size, int) else None


def _settings_file(tokenizer: Any, name: str) -> dict[str, Any] | None:
    """A JSON file of the checkpoint that the tokenizer comes from; None if there is none."""
    checkpoint = getattr(tokenizer, "name_or_path", None)
    try:
        return _object((Path(checkpoint) / name).read_text(encoding="utf-8")) if checkpoint else None
    except (OSError, UnicodeDecodeError):
        return None


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)
