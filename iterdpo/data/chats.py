"""The reader of prompts and completions in a row: text or chat messages, in TRL's and OpenAI's vocabulary.

What changes the prompt that the policy sees is kept: a system column becomes the first message, and `tools` and
`chat_template_kwargs` go to the chat template. What cannot be kept is refused by name: images and other media, and any
of these columns beside a prompt of plain text, which no template renders.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from iterdpo.data.rows import json_value, shown
from iterdpo.errors import RowError
from iterdpo.types import Chat, Content, Message

SYSTEM = ("system", "system_prompt", "system_message")
SETTINGS = ("tools", "chat_template_kwargs")
COMPANIONS = (*SYSTEM, *SETTINGS)
"""Columns that belong to the prompt."""
MEDIA = re.compile(
    r"(images?|imgs?|pictures?|photos?|videos?|audios?|pixel_values)(_(paths?|urls?|files?|bytes|data))?", re.IGNORECASE
)
LOOKS_LIKE_MESSAGES = re.compile(r"\s*\[?\s*\{\s*['\"](role|from|content|value)['\"]\s*:\s*['\"\[nN]")
ROLE = re.compile(r"['\"](role|from)['\"]\s*:")
PLAIN = "write it into the prompt's text, give the prompt as messages, or remove or rename the column"
EXAMPLE = 'a list of messages such as {"role": "user", "content": "2+2?"}'
SPEAKERS = {"human": "user", "user": "user", **dict.fromkeys(("gpt", "chatgpt", "assistant"), "assistant")}
SPEAKERS |= {"system": "system", "tool": "tool"}
"""The roles of ShareGPT's speakers."""
NEITHER = "have a prompt or completion that is neither text nor messages"
EMPTY_PROMPT = "have an empty prompt"
LAST_TURN = "have a prompt that ends with an assistant turn"
BAD_MESSAGE = "have a message of the wrong shape"
BAD_COMPANION = "have a system column, tools or template values of the wrong shape"
HAVE_MEDIA = "have images or other media"
WITHOUT_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys one of which an assistant's message has if it has no content."""


def content_of(value: Any, where: str) -> Content:
    """`value` as text or chat messages, without keys that are null, as Parquet fills in.

    A text that is a list of messages, as JSON or as Python writes one, is read as that list. ShareGPT's turns
    (`{"from": "human", "value": "2+2?"}`) become messages, and a single message a list of one.

    Raises:
        RowError: it is neither, has media in it, or its text cannot be written as UTF-8.
    """
    content: Content = value
    parsed = messages_in(value)
    if isinstance(parsed, str) and LOOKS_LIKE_MESSAGES.match(parsed) and ROLE.search(parsed) and not _is_data(parsed):
        raise RowError(
            f"{where} looks like a list of messages that is kept as text, but cannot be read as JSON or Python; write the "
            "messages as JSON",
            "have messages as text that cannot be read",
        )
    if isinstance(parsed, dict) and {"role", "from"} & parsed.keys():
        parsed = [parsed]
    if isinstance(parsed, list) and all(isinstance(m, dict) for m in parsed):
        content = [_message(m, where, number) for number, m in enumerate(parsed, 1)]
    elif not isinstance(value, str):
        raise RowError(f"{where} is {shown(value)}; it must be text, or {EXAMPLE}", NEITHER)
    check_encodable(content, where)
    return content


def messages_in(value: Any) -> Any:
    """The messages in a text that is a list of them, as JSON or as Python writes one; else the value."""
    if not isinstance(value, str) or not LOOKS_LIKE_MESSAGES.match(value):
        return value
    parsed = _parsed(value)
    first = parsed[0] if isinstance(parsed, list) and parsed else parsed
    return parsed if isinstance(first, dict) and _is_message(first) else value


def _is_message(value: dict[Any, Any]) -> bool:
    """Whether an object in a text is a message or a turn, and not such as `{"from": "Oslo", "to": "Bergen"}`."""
    if "from" in value and "role" not in value:
        return "value" in value
    return "role" in value and any(key in value for key in ("content", *WITHOUT_CONTENT))


def _is_data(text: str) -> bool:
    """Whether a text is, or begins with, a JSON object or list that is no message: a model's data, not a chat."""
    found = _parsed(text)
    try:
        found = json.JSONDecoder().raw_decode(text.lstrip())[0] if isinstance(found, str) else found
    except (ValueError, RecursionError):
        return False
    first = found[0] if isinstance(found, list) and found else found
    return not isinstance(first, dict) or not _is_message(first)


def with_companions(content: Content, row: Mapping[str, Any], where: str, *, column: str = "prompt") -> Content:
    """A row's prompt with what else of the row the policy has to see: a system column, tools, values for the template.

    Raises:
        RowError: a companion that cannot be read or kept, or a column of images or other media.
    """
    for name, value in row.items():
        if (
            MEDIA.fullmatch(str(name))
            and name != column
            and not _is_nothing(value)
            and not isinstance(value, int | float)
        ):
            raise RowError(
                f"{where} has the column {name!r}, but iterdpo trains on text alone; remove the rows with {name}, or the "
                "column if the text is whole without it",
                HAVE_MEDIA,
            )
    content = _with_system(content, row, where, column)
    settings: dict[str, Any] = {}
    if tools := _tools(row, f"{where}, column 'tools'") if column != "tools" else None:
        settings["tools"] = tools
    kwargs = _parsed(row.get("chat_template_kwargs"))
    if not _is_nothing(kwargs):
        if not isinstance(kwargs, dict):
            raise RowError(
                f"{where}, column 'chat_template_kwargs' is {shown(kwargs)}; it must be an object", BAD_COMPANION
            )
        settings |= kwargs
    if not settings:
        return content
    if isinstance(content, str):
        raise _no_template(where, "tools" if "tools" in settings else "chat_template_kwargs")
    settings = {name: json_value(value) for name, value in settings.items()}
    return Chat(content, settings)


def _with_system(content: Content, row: Mapping[str, Any], where: str, column: str) -> Content:
    names = [name for name in SYSTEM if name in row and name != column and not _is_nothing(row[name])]
    for name in names:
        text = row[name]
        if not isinstance(text, str):
            raise RowError(f"{where}, column {name!r} is {shown(text)}; it must be text", BAD_COMPANION)
        check_encodable(text, f"{where}, column {name!r}")
        if isinstance(content, str):
            raise _no_template(where, name)
        if content and content[0]["role"] in ("system", "developer"):
            if str(content[0].get("content")).strip() == text.strip():
                continue
            raise RowError(
                f"{where} has the column {name!r}, and its messages begin with another system message; remove one of the two",
                "have two system messages",
            )
        content = [{"role": "system", "content": text}, *content]
    return content


def _no_template(where: str, name: str) -> RowError:
    return RowError(
        f"{where} has the column {name!r}, but the prompt is text, which no chat template renders: {PLAIN}",
        "have a column for the chat template beside a prompt of text",
    )


def _tools(row: Mapping[str, Any], where: str) -> list[dict[str, Any]] | None:
    if not _is_nothing(row.get("functions")):
        raise RowError(
            f"{where.partition(', column')[0]} has the column 'functions'; give it as tools, in OpenAI's form",
            BAD_COMPANION,
        )
    given = row.get("tools")
    if _is_nothing(given):
        return None
    tools = _parsed(given)
    tools = [_parsed(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        example = '{"type": "function", "function": {"name": "rain_in", "parameters": {}}}'
        raise RowError(f"{where} is {shown(given)}; it must be a list of tools such as {example}", BAD_COMPANION)
    return [json_value(tool) for tool in tools]


def _message(value: dict[str, Any], where: str, number: int) -> Message:
    if "role" not in value and "from" in value:
        value = _from_turn(value, f"{where}: turn {number}")
    where = f"{where}: message {number}"
    message = {key: item for key, item in value.items() if item is not None}
    if not isinstance(message.get("role"), str):
        raise RowError(
            f"{where}: 'role' is {shown(message.get('role'))}; it must be text, such as user or assistant", BAD_MESSAGE
        )
    for key in message:
        if MEDIA.fullmatch(str(key)) and not _is_nothing(message[key]):
            raise RowError(f"{where} has {key!r}, but iterdpo trains on text alone; remove it, or the row", HAVE_MEDIA)
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
    for key in ("tool_calls", "function_call"):
        if key in message and not message[key]:
            del message[key]
    if isinstance(message.get("content"), list):
        message["content"] = _text_of_parts(message["content"], where)
    if "content" not in message and any(key in message for key in WITHOUT_CONTENT):
        if "content" in value:
            message["content"] = None  # as OpenAI writes it; some templates look for the key
    elif not isinstance(message.get("content"), str):
        hint = ", or the message have tool_calls" if message["role"] == "assistant" else ""
        raise RowError(f"{where}: 'content' is {shown(message.get('content'))}; it must be text{hint}", BAD_MESSAGE)
    for key in ("reasoning_content", "reasoning", "thinking", "name", "tool_call_id"):
        if key in message and not isinstance(message[key], str):
            raise RowError(f"{where}: {key!r} is {shown(message[key])}; it must be text", BAD_MESSAGE)
    return {str(key): item if isinstance(item, str) else json_value(item) for key, item in message.items()}


def _from_turn(turn: dict[str, Any], where: str) -> Message:
    """A message of a turn of ShareGPT's."""
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        right = f'a turn is {{"from": "human", "value": "2+2?"}}, from one of {", ".join(SPEAKERS)}'
        raise RowError(f"{where} is {str(turn)[:60]}; {right}", BAD_MESSAGE)
    others = {k: v for k, v in turn.items() if k not in ("from", "value")}
    return {"role": SPEAKERS[speaker], "content": turn.get("value"), **others}


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    calls = _parsed(value)
    calls = [_parsed(call) for call in calls] if isinstance(calls, list) else calls
    if isinstance(calls, list) and all(isinstance(call, dict) for call in calls):
        functions = [call.get("function", call) for call in calls]
        if all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
            return calls
    example = '{"type": "function", "function": {"name": "rain_in", "arguments": {"city": "Oslo"}}}'
    raise RowError(
        f"{where}: 'tool_calls' is {shown(value)}; it must be a list of calls such as {example}", BAD_MESSAGE
    )


def _text_of_parts(parts: list[Any], where: str) -> str:
    """The text of a content that is a list of one part, as OpenAI's multimodal messages are."""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RowError(
                f"{where}: 'content' has a part of the type {str(kind)[:40]!r}, but iterdpo trains on text alone; remove "
                "it, or the row",
                HAVE_MEDIA,
            )
    if len(parts) != 1:
        raise RowError(f"{where}: 'content' has {len(parts)} parts; join their texts into one", BAD_MESSAGE)
    return str(parts[0]["text"])


# Values that are kept as text


def _parsed(value: Any) -> Any:
    """The list or object in a text, as JSON or as Python writes it; else the value."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def _is_nothing(value: Any) -> bool:
    """Whether a column has no value in a row."""
    if isinstance(value, str):
        return not value.strip() or value.strip() in ("[]", "{}", "null", "None")
    return value is None or (isinstance(value, list | tuple | dict) and not len(value))


def check_encodable(content: Content, where: str) -> None:
    """Refuse text that cannot be written as UTF-8, by a RowError."""
    try:
        json.dumps(content, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        message = f"{where} has half of a surrogate pair, {half!r}; write the whole pair"
        raise RowError(message, "have half of a surrogate pair") from None
