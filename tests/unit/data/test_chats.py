"""What a row gives the policy to see: messages in whatever form they are kept, and the columns beside them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iterdpo.data.chats import content_of, with_companions
from iterdpo.errors import DataError
from iterdpo.types import Chat, Content

USER = {"role": "user", "content": "Rain in Oslo?"}
TOOL = {"type": "function", "function": {"name": "rain_in", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "rain_in", "arguments": {"city": "Oslo"}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}

texts = st.text(st.characters(exclude_categories=["Cs"]))
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": texts}),
    min_size=1,
)


def with_columns(content: Content, **columns: Any) -> Content:
    return with_companions(content, columns, "a.jsonl: row 3")


@given(messages)
def test_messages_are_the_same_as_a_list_as_json_and_as_python_text(chat: list[Any]) -> None:
    assert content_of(chat, "x") == content_of(json.dumps(chat), "x") == content_of(repr(chat), "x") == chat


@given(st.one_of(texts, st.sampled_from(["[", "[{", "{}", "[]", "[1, 2]", '{"a": 1}', "[{'a': 1}]", "null"])))
def test_other_text_stays_as_it_is(text: str) -> None:
    assert content_of(text, "x") == text


@pytest.mark.parametrize(
    "text",
    [
        '{"from": "Oslo", "to": "Bergen"}',
        "{'from': 'Oslo', 'to': 'Bergen'}",
        '[{"from": "Oslo", "to": "Bergen"}]',
        '{"value": "x", "from": "Oslo", "role": "stop"}',
        '{"role": "manager", "name": "Ann"}',
        ' {"role": "admin"} is JSON. Write it as YAML.',
        '[{"role": "admin"}, {"role": "guest"}]',
    ],
)
def test_data_in_a_text_that_only_share_a_key_with_messages_stay_text(text: str) -> None:
    assert content_of(text, "x") == text


@pytest.mark.parametrize(
    "text",
    [
        "[{'role': 'user', 'content': 'x'}\n {'role': 'assistant', 'content': 'y'}]",  # as pandas writes an array
        '[{"role": "user", "content": "x"',
        "[{'role': 'user', 'content': array(['x'])}]",
    ],
)
def test_a_text_that_looks_like_messages_and_is_none_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="x looks like a list of messages that is kept as text, but cannot be read"):
        content_of(text, "x")


def test_a_single_message_and_sharegpts_turns_are_messages() -> None:
    assert content_of(USER, "x") == [USER]
    turns = [{"from": "human", "value": "Rain in Oslo?"}, {"from": "gpt", "value": "No."}]
    assert content_of(turns, "x") == [USER, {"role": "assistant", "content": "No."}]
    assert content_of(json.dumps(turns), "x") == content_of(turns, "x")


def test_a_turn_that_calls_a_tool_says_nothing_and_keeps_its_call() -> None:
    assert content_of([USER, CALLED], "x") == [USER, CALLED]
    without = {k: v for k, v in CALLED.items() if k != "content"}
    assert content_of([USER, without], "x") == [USER, without]
    assert content_of([{**CALLED, "tool_calls": json.dumps([CALL])}], "x") == [CALLED]
    assert content_of([{**CALLED, "tool_calls": [json.dumps(CALL)]}], "x") == [CALLED]


def test_a_part_of_text_is_its_text() -> None:
    assert content_of([{"role": "user", "content": [{"type": "text", "text": "Rain in Oslo?"}]}], "x") == [USER]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"content": "x"}, "'role' is missing or null"),
        ({"role": "user"}, "'content' is missing or null; it must be text$"),
        ({"role": "assistant", "content": None}, "it must be text, or the message have tool_calls"),
        ({"role": "user", "content": {"x": 1}}, "'content' is dict"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "part of the type 'image_url'",
        ),
        ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}, "a part of the type 'image'"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}] * 2}, "has 2 parts; join their texts into one"),
        ({"role": "user", "content": "x", "images": ["a.png"]}, "has 'images', but iterdpo trains on text alone"),
        ({"role": "assistant", "tool_calls": "rain"}, "'tool_calls' is str 'rain'; it must be a list of calls such as"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "must be a list of calls such as"),
        (
            {"role": "assistant", "content": "x", "reasoning_content": 3},
            "'reasoning_content' is int '3'; it must be text",
        ),
        ({"from": "bird", "value": "x"}, r"turn 1 is .*bird.*; a turn is"),
    ],
)
def test_a_message_that_cannot_be_used_is_named(message: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        content_of([message], "a.jsonl: row 3, column 'prompt'")


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_a_system_column_is_the_first_message(name: str) -> None:
    system = {"role": "system", "content": "Be brief."}
    assert with_columns([USER], **{name: "Be brief."}) == [system, USER]
    assert with_columns([system, USER], **{name: "Be brief. "}) == [system, USER]
    assert with_columns([USER], **{name: " "}) == with_columns([USER], **{name: None}) == [USER]
    with pytest.raises(DataError, match=f"row 3 has the column '{name}', and its messages begin with another system"):
        with_columns([system, USER], **{name: "Be long."})


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], str([TOOL])])
def test_tools_and_values_for_the_template_go_with_the_messages(tools: Any) -> None:
    content = with_columns([USER], tools=tools, chat_template_kwargs='{"enable_thinking": false}', gold="yes")
    assert isinstance(content, Chat)
    assert content == [USER]
    assert content.settings == {"tools": [TOOL], "enable_thinking": False}


@pytest.mark.parametrize("nothing", [None, "", [], {}, "[]", "null"])
def test_an_empty_companion_is_none(nothing: Any) -> None:
    names = ("system", "tools", "chat_template_kwargs", "images")
    assert not isinstance(with_columns([USER], **dict.fromkeys(names, nothing)), Chat)
    assert with_columns("text", **dict.fromkeys(names, nothing)) == "text"


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"tools": [TOOL]}, "'tools', but the prompt is text, which no chat template renders: write it into"),
        ({"chat_template_kwargs": {"x": 1}}, "'chat_template_kwargs', but the prompt is text"),
        ({"system": "Be brief."}, "'system', but the prompt is text"),
    ],
)
def test_what_only_a_template_renders_is_refused_beside_a_prompt_of_text(columns: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=f"a.jsonl: row 3 has the column {said}"):
        with_columns("text", **columns)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"tools": "hammer"}, "column 'tools' is str 'hammer'; it must be a list of tools such as"),
        ({"tools": ["hammer"]}, "column 'tools' is list"),
        ({"functions": [TOOL]}, "has the column 'functions'; give it as tools"),
        ({"chat_template_kwargs": "thinking"}, "column 'chat_template_kwargs' is str 'thinking'; it must be an object"),
        ({"system": ["Be brief."]}, "column 'system' is list"),
        (
            {"images": ["a.png"]},
            "has the column 'images', but iterdpo trains on text alone; remove the rows with images",
        ),
        ({"image": {"bytes": b"x", "path": None}}, "has the column 'image'"),
        ({"image_url": "https://x/y.png"}, "has the column 'image_url'"),
        ({"video": "a.mp4"}, "has the column 'video'"),
        ({"audio": {"array": [0.0]}}, "has the column 'audio'"),
    ],
)
def test_a_companion_that_cannot_be_used_is_named(columns: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=f"a.jsonl: row 3.*{said}"):
        with_columns([USER], **columns)
