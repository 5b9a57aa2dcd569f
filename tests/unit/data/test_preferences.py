from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iterdpo.data.preferences import Account, PreferenceData, RawPair, map_in_order, tokenize_pairs
from iterdpo.data.rendering import load_tokenizer
from iterdpo.errors import DataError
from iterdpo.types import Message, PreferencePair, Prompt


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


class Read(NamedTuple):
    pairs: list[RawPair]
    account: Account

    @property
    def left_out(self) -> dict[str, list[int]]:
        for entry in self.account.left_out.values():
            assert entry["count"] == len(entry["rows"])
        return {reason: entry["rows"] for reason, entry in self.account.left_out.items()}

    def summary(self) -> str:
        return self.account.summary()


def read_all(path: Path, **settings: Any) -> Read:
    data = PreferenceData(str(path), **settings)
    return Read([pair for batch in data.parsed() for pair in batch], data.account)


def read(directory: Path, *rows: dict[str, Any], **settings: Any) -> Read:
    path = directory / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_all(path, **settings)


def parts(pair: RawPair) -> tuple[Any, Any, Any]:
    return pair.prompt.content, pair.chosen, pair.rejected


GOOD = {"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}


# The columns prompt, chosen, rejected


def test_plain_columns_are_taken_as_they_are(tmp_path: Path) -> None:
    data = read(tmp_path, GOOD)
    assert [parts(p) for p in data.pairs] == [("2+2=", " 4", " 5")]
    assert data.summary() == "kept 1 of 1 pairs"


def test_conversational_columns_are_taken_as_they_are(tmp_path: Path) -> None:
    row = {"prompt": [user("2+2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]}
    assert parts(read(tmp_path, row).pairs[0]) == ([user("2+2?")], [assistant("4")], [assistant("5")])


def test_messages_may_be_followed_by_plain_completions(tmp_path: Path) -> None:
    row = {"prompt": [user("2+2?")], "chosen": "4", "rejected": "5"}
    assert parts(read(tmp_path, row).pairs[0]) == ([user("2+2?")], "4", "5")


def test_a_plain_prompt_before_assistant_messages_is_the_users_turn(tmp_path: Path) -> None:
    row = {"prompt": "2+2?", "chosen": [assistant("4")], "rejected": [assistant("5")]}
    assert parts(read(tmp_path, row).pairs[0]) == ([user("2+2?")], [assistant("4")], [assistant("5")])


@pytest.mark.parametrize("prompt", ["2+2?", [{"role": "user", "content": "2+2?"}], None])
def test_conversations_that_repeat_the_prompt_are_cut_behind_it(tmp_path: Path, prompt: Any) -> None:
    row = {"prompt": prompt, "chosen": [user("2+2?"), assistant("4")], "rejected": [user("2+2?"), assistant("5")]}
    assert parts(read(tmp_path, row).pairs[0]) == ([user("2+2?")], [assistant("4")], [assistant("5")])


def test_without_a_prompt_column_the_shared_messages_are_the_prompt(tmp_path: Path) -> None:
    shared = [user("hi"), assistant("hello"), user("2+2?")]
    row = {"chosen": [*shared, assistant("4")], "rejected": [*shared, assistant("5")]}
    assert parts(read(tmp_path, row).pairs[0]) == (shared, [assistant("4")], [assistant("5")])


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is grey.", "The sky is"),
        ("The sky is blue", "The sky is black", "The sky is"),  # not "The sky is bl"
        ("Q: 2+2?\nA: 4", "Q: 2+2?\nB: 5", "Q: 2+2?\n"),
        ("It is fine", "It is fine today", "It is"),  # nothing would be left of the first
        ("the cat sat", "the cats", "the"),
    ],
)
def test_without_a_prompt_column_plain_texts_part_between_words(
    tmp_path: Path, chosen: str, rejected: str, prompt: str
) -> None:
    (pair,) = read(tmp_path, {"chosen": chosen, "rejected": rejected}).pairs
    assert parts(pair) == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "x", "chosen": " y", "rejected": " y"}, "have identical completions"),
        ({"prompt": "x", "chosen": " \n", "rejected": " y"}, "have an empty completion"),
        ({"prompt": "x", "chosen": [], "rejected": [assistant("y")]}, "have an empty completion"),
        ({"prompt": "x", "chosen": "", "rejected": [assistant("y")]}, "have an empty completion"),  # CSV
        ({"prompt": "x", "chosen": [assistant("y")], "rejected": " "}, "have an empty completion"),
        ({"prompt": "x", "chosen": [assistant("")], "rejected": [assistant("y")]}, "have an empty completion"),
        ({"chosen": [user("x"), assistant("y")], "rejected": [user("x")]}, "have an empty completion"),
        ({"chosen": "yes", "rejected": "no"}, "share no prompt"),
        ({"chosen": [assistant("y")], "rejected": [assistant("z")]}, "share no prompt"),
        (
            {"prompt": "x", "chosen": [user("w"), assistant("y")], "rejected": [user("w"), assistant("z")]},
            "do not continue their prompt",
        ),
        (
            {"prompt": [user("x")], "chosen": [user("x"), assistant("y")], "rejected": [user("w"), assistant("z")]},
            "do not continue their prompt",
        ),
        (
            {
                "chosen": [user("x"), assistant("y"), user("v"), assistant("z")],
                "rejected": [user("x"), assistant("w"), user("v"), assistant("z")],
            },
            "diverge before the last turn",
        ),
    ],
)
def test_a_pair_that_teaches_no_preference_is_left_out_with_its_reason_and_row(
    tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    data = read(tmp_path, GOOD, row, row)
    assert [pair.row for pair in data.pairs] == [1]
    assert data.left_out == {reason: [2, 3]}
    assert data.summary() == f"kept 1 of 3 pairs (2 {reason})"


def test_the_summary_groups_thousands_and_puts_the_largest_reason_first() -> None:
    account = Account("test.jsonl", kept=2303)
    for reason, count in (("have an empty completion", 4), ("diverge before the last turn", 5)):
        for row in range(count):
            account.leave_out(reason, row)
    assert account.summary() == "kept 2,303 of 2,312 pairs (5 diverge before the last turn, 4 have an empty completion)"


def test_rows_are_counted_in_full_and_a_thousand_are_listed(tmp_path: Path) -> None:
    data = read(tmp_path, GOOD, *[{"chosen": "yes", "rejected": "no"}] * 1500, GOOD)
    assert data.account.left_out == {"share no prompt": {"count": 1500, "rows": list(range(2, 1002))}}
    assert [pair.row for pair in data.pairs] == [1, 1502]
    assert data.summary() == "kept 2 of 1,502 pairs (1,500 share no prompt)"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chosn": "x", "rejected": "y"},
            r"row 2: no column 'chosen', only 'chosn', 'rejected'; did you mean 'chosn'\?",
        ),
        (
            {"prompt": "x", "chosen": 4, "rejected": " 5"},
            r"row 2, column 'chosen' is int '4'; it must be text, or a list",
        ),
        ({"prompt": "x", "chosen": " 4", "rejected": None}, r"row 2, column 'rejected' is missing or null"),
        ({"prompt": 3, "chosen": " 4", "rejected": " 5"}, r"row 2, column 'prompt' is int '3'"),
        ({"prompt": "", "chosen": " 4", "rejected": " 5"}, r"row 2, column 'prompt' is empty"),
        (
            {"prompt": "x", "chosen": [assistant("y")], "rejected": "z"},
            r"row 2: rejected is text, and chosen is messages; give two of the same kind",
        ),
        (
            {"prompt": [user("x"), assistant("y")], "chosen": "w", "rejected": "z"},
            r"row 2, column 'prompt' ends with an assistant turn",
        ),
        (
            {"question": "x", "chosen": "The y", "rejected": "The z"},
            r"row 2: no prompt column, but 'question'; rename it",
        ),
        ({"Promt": "x", "chosen": "The y", "rejected": "The z"}, r"row 2: no prompt column, but 'Promt'; rename it"),
    ],
)
def test_data_of_the_wrong_shape_is_named_with_its_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=r"pairs\.jsonl: " + message):
        read(tmp_path, GOOD, row)


def test_data_without_a_usable_pair_is_refused_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no pair can be used: kept 0 of 1 pairs \(1 share no prompt\)"):
        read(tmp_path, {"chosen": "yes", "rejected": "no"})


def test_an_unknown_format_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="format 'trl' is not one of auto, pairs, hh, unpaired, sharegpt"):
        read(tmp_path, GOOD, format="trl")


def test_parquet_messages_read_like_json_ones(tmp_path: Path) -> None:
    row = {"prompt": "2+2?", "chosen": [user("2+2?"), assistant("4")], "rejected": [user("2+2?"), assistant("5")]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train.parquet")
    assert [*map(parts, read_all(tmp_path / "train.parquet").pairs)] == [*map(parts, read(tmp_path, row).pairs)]


def test_equal_prompts_have_equal_ids(tmp_path: Path) -> None:
    first, second, other = read(tmp_path, GOOD, {**GOOD, "chosen": " four"}, {**GOOD, "prompt": "2 + 2 ="}).pairs
    assert first.prompt.id == second.prompt.id != other.prompt.id


# Prompts under other names, companions, roles

ANSWERS = {"chosen": "I think it is blue", "rejected": "I think it is cold"}
SAID = {side: [assistant(text)] for side, text in ANSWERS.items()}
WHOLE = {side: [user("Which colour?"), *turns] for side, turns in SAID.items()}


@pytest.mark.parametrize("answers", [ANSWERS, SAID])
def test_messages_are_the_prompt_if_there_is_no_prompt_column(tmp_path: Path, answers: dict[str, Any]) -> None:
    (pair,) = read(tmp_path, {"messages": [user("Which colour?")], **answers}).pairs
    assert parts(pair) == ([user("Which colour?")], answers["chosen"], answers["rejected"])


@pytest.mark.parametrize("name", ["problem", "user_prompt", "Prompt", "question", "dialogue", "msgs", "kontext", "x"])
@pytest.mark.parametrize("form", [str, lambda text: [user(text)], lambda text: json.dumps([user(text)])])
@pytest.mark.parametrize(
    ("answers", "text"), [(ANSWERS, "Which colour?"), (SAID, "Which colour?"), (WHOLE, "Be brief.")]
)
def test_a_column_that_may_be_the_prompt_is_refused_by_name_if_there_is_none(
    tmp_path: Path, name: str, form: Any, answers: dict[str, Any], text: str
) -> None:
    with pytest.raises(DataError, match=f"row 1: no prompt column, but '{name}'; rename it to prompt if it is"):
        read(tmp_path, {name: form(text), **answers})


@pytest.mark.parametrize(
    "columns",
    [
        {"id": "a", "prompt_id": "b", "source": "hub", "category": "colours", "chosen_model": "m"},
        {"score_chosen": 4.5, "score_rejected": "3.0", "tags": ["a", "b"], "meta": {"text": "x"}, "note": " "},
        {"messages": WHOLE["chosen"]},
    ],
)
def test_columns_that_are_no_prompt_stand_beside_an_implicit_one(tmp_path: Path, columns: dict[str, Any]) -> None:
    assert parts(read(tmp_path, {**columns, **WHOLE}).pairs[0])[0] == [user("Which colour?")]


def test_with_a_prompt_other_columns_may_hold_any_text(tmp_path: Path) -> None:
    row = {"prompt": "Which colour?", "problem": "x", "messages": [user("x"), assistant("y")], **ANSWERS}
    assert parts(read(tmp_path, row).pairs[0])[0] == "Which colour?"


@pytest.mark.parametrize("prompt", [{"prompt": [user("Which colour?")]}, {"prompt": "Which colour?"}, {}])
def test_a_system_column_comes_before_messages_of_every_format(tmp_path: Path, prompt: dict[str, Any]) -> None:
    row = {"system": "Be brief.", **prompt, **(SAID if prompt else WHOLE)}
    assert parts(read(tmp_path, row).pairs[0])[0] == [{"role": "system", "content": "Be brief."}, user("Which colour?")]
    transcripts = {"chosen": transcript(["x", "y"]), "rejected": transcript(["x", "z"])}
    assert parts(read(tmp_path, {"system": "Be brief.", **transcripts}).pairs[0])[0][0]["content"] == "Be brief."
    single = {"system": "Be brief.", "prompt": [user("x")], "completion": "y", "label": True}
    assert parts(read(tmp_path, single).pairs[0])[0][0]["content"] == "Be brief."


@pytest.mark.parametrize("columns", [{"system": "Be brief."}, {"tools": [{"name": "x"}]}, {"images": ["a.png"]}])
@pytest.mark.parametrize(
    "row", [{"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}, {"chosen": "It is 4", "rejected": "It is 5"}]
)
def test_a_column_that_would_be_dropped_from_a_plain_prompt_is_refused(
    tmp_path: Path, columns: dict[str, Any], row: dict[str, Any]
) -> None:
    (name,) = columns
    with pytest.raises(DataError, match=rf"pairs\.jsonl: row 1 has the column '{name}'"):
        read(tmp_path, {**row, **columns})


@pytest.mark.parametrize("form", [json.dumps, repr])
def test_messages_that_a_csv_file_keeps_as_text_are_messages(tmp_path: Path, form: Any) -> None:
    row = {
        "prompt": form([user('2+2, "please"?')]),
        "chosen": form([assistant("4")]),
        "rejected": form([assistant("5")]),
    }
    path = tmp_path / "pairs.csv"
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(row))
        writer.writeheader()
        writer.writerow(row)
    assert parts(read_all(path).pairs[0]) == ([user('2+2, "please"?')], [assistant("4")], [assistant("5")])


@pytest.mark.parametrize("role", ["user", "human", "system", "tool"])
@pytest.mark.parametrize("repeats", [False, True])
def test_a_completion_of_another_role_is_left_out_with_the_role(tmp_path: Path, role: str, repeats: bool) -> None:
    slip = {"role": role, "content": "5"}
    before = [user("2+2?")] if repeats else []
    row = {"prompt": [user("2+2?")], "chosen": [*before, assistant("4")], "rejected": [*before, slip]}
    assert read(tmp_path, GOOD_CHAT, row).left_out == {
        f"have a completion of the role {role} and no assistant turn": [2]
    }
    single = {"prompt": [user("2+2?")], "completion": [slip], "label": True}
    good = {"prompt": [user("2+2?")], "completion": "4", "label": True}
    assert read(tmp_path, good, single).left_out == {f"have a completion of the role {role} and no assistant turn": [2]}


GOOD_CHAT = {"prompt": [user("2+2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]}


def test_a_completion_that_ends_with_a_tool_is_left_out(tmp_path: Path) -> None:
    ends = [assistant("5"), {"role": "tool", "content": "x"}]
    found = read(tmp_path, GOOD_CHAT, {**GOOD_CHAT, "rejected": ends}).left_out
    assert found == {"have a completion that does not end with an assistant turn": [2]}


def test_a_completion_may_call_a_tool_and_say_nothing(tmp_path: Path) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    assert parts(read(tmp_path, {**GOOD_CHAT, "chosen": [called]}).pairs[0])[1] == [called]


def test_one_side_may_repeat_the_prompt_and_the_other_not(tmp_path: Path) -> None:
    row = {**GOOD_CHAT, "rejected": [user("2+2?"), assistant("5")]}
    assert parts(read(tmp_path, row).pairs[0]) == ([user("2+2?")], [assistant("4")], [assistant("5")])


def test_a_pair_is_named_by_the_place_of_its_row_in_its_own_file(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD_CHAT) + "\n")
    bad = {**GOOD_CHAT, "tools": [{"name": "add"}]}
    (tmp_path / "b.jsonl").write_text(json.dumps(GOOD_CHAT) + "\n\n" + json.dumps(bad) + "\n")
    data = PreferenceData(str(tmp_path))
    with pytest.raises(DataError, match=r"b\.jsonl: row 2 \(line 3\): the chat template of .* does not render tools"):
        list(data.tokenized(tokenizer, max_prompt_tokens=99, max_completion_tokens=99))


# HH-RLHF transcripts


def transcript(turns: list[str]) -> str:
    speakers = ("Human", "Assistant")
    return "".join(f"\n\n{speakers[i % 2]}: {turn}" for i, turn in enumerate(turns))


def test_the_real_file_gives_2303_pairs_and_says_which_rows_it_leaves_out(hh_rlhf: Path) -> None:
    data = read_all(hh_rlhf)
    assert data.summary() == "kept 2,303 of 2,312 pairs (5 diverge before the last turn, 4 have an empty completion)"
    # read by eye: in these, one side goes on to a second Assistant turn, mostly after a "Human:" that the model wrote
    assert data.left_out["diverge before the last turn"] == [1255, 1689, 1951, 1953, 2037]
    assert data.left_out["have an empty completion"] == [87, 517, 926, 1104]


def test_every_real_prompt_alternates_from_a_user_to_a_user_message(hh_rlhf: Path) -> None:
    pairs = read_all(hh_rlhf).pairs
    for pair in pairs:
        roles = [m["role"] for m in pair.prompt.content]  # type: ignore[index]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    assert sum(len(pair.prompt.content) > 1 for pair in pairs) > 1000


def test_a_real_multi_turn_pair_reads_as_a_person_reads_it(hh_rlhf: Path) -> None:
    pair = next(p for p in read_all(hh_rlhf).pairs if p.row == 1)
    roles, texts = zip(*((m["role"], m["content"]) for m in pair.prompt.content), strict=True)  # type: ignore[index]
    assert roles == ("user", "assistant", "user", "assistant", "user")
    assert texts[:3] == (
        "what are some pranks with a pen i can do?",
        "Are you looking for practical joke ideas?",
        "yep",
    )
    assert texts[3].startswith("Ok, I’ll give you a couple examples")
    assert "\n\n1. " in texts[3]
    assert str(pair.chosen).startswith("No, sorry!  All of these involve a pen")
    assert str(pair.rejected).endswith("It’s really funny.")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("\n\nHuman: x\n\nAssistant: ", "\n\nHuman: x\n\nAssistant: y", "have an empty completion"),
        ("\n\nHuman: x\n\nAssistant: y", "\n\nHuman: x\n\nAssistant: y", "have identical completions"),
        ("\n\nHuman: x\n\nAssistant: y", "\n\nHuman: w\n\nAssistant: z", "diverge before the last turn"),
        (
            "\n\nHuman: x\n\nAssistant: y\n\nHuman: v\n\nAssistant: u",
            "\n\nHuman: x\n\nAssistant: y",
            "diverge before the last turn",
        ),
        (
            "\n\nHuman: x\n\nAssistant: y\n\nHuman: v",
            "\n\nHuman: x\n\nAssistant: y\n\nHuman: w",
            "do not end with an assistant turn after a human one",
        ),
        (
            "\n\nHuman: x\n\nAssistant: y\n\nAssistant: v",
            "\n\nHuman: x\n\nAssistant: y\n\nAssistant: w",
            "do not end with an assistant turn after a human one",
        ),
        ("\n\nHuman: x", "\n\nHuman: y", "do not end with an assistant turn after a human one"),
        ("no talk", "\n\nHuman: x\n\nAssistant: y", "are not Human and Assistant transcripts"),
    ],
)
def test_a_transcript_that_teaches_no_preference_is_left_out(
    tmp_path: Path, chosen: str, rejected: str, reason: str
) -> None:
    good = {"chosen": transcript(["x", "y"]), "rejected": transcript(["x", "z"])}
    assert read(tmp_path, good, {"chosen": chosen, "rejected": rejected}).left_out == {reason: [2]}


def test_one_space_behind_a_marker_is_format_and_the_rest_is_content(tmp_path: Path) -> None:
    row = {"chosen": "\n\nHuman:  x \n\n\nAssistant:y", "rejected": "\n\nHuman:  x \n\n\nAssistant:   z\n"}
    assert parts(read(tmp_path, row).pairs[0]) == ([user(" x \n")], "y", "  z\n")


def test_a_marker_inside_a_paragraph_is_content(tmp_path: Path) -> None:
    text = "I said.  Human: why?\nAssistant: because"
    row = {"chosen": transcript(["x", text]), "rejected": transcript(["x", "z"])}
    assert read(tmp_path, row).pairs[0].chosen == text


def test_turns_of_one_speaker_in_a_row_become_one_message(tmp_path: Path) -> None:
    head = "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d\n\nAssistant: "
    (pair,) = read(tmp_path, {"chosen": head + "y", "rejected": head + "z"}).pairs
    assert parts(pair) == ([user("a"), assistant("b\n\nc"), user("d")], "y", "z")


def test_transcripts_are_recognised_by_the_first_row_unless_the_format_is_given(tmp_path: Path) -> None:
    row = {"chosen": transcript(["x", "y"]), "rejected": transcript(["x", "z"])}
    assert read(tmp_path, row).pairs[0].prompt.content == [user("x")]
    assert read(tmp_path, row, format="pairs").pairs[0].prompt.content == "\n\nHuman: x\n\nAssistant:"
    with pytest.raises(DataError, match=r"row 1: chosen and rejected are messages, not transcripts; set data\.format"):
        read(tmp_path, {"chosen": [user("x")], "rejected": [user("y")]}, format="hh")


@given(
    turns=st.lists(st.text("ab :\n\r\u2028é", min_size=1), min_size=1, max_size=6).filter(lambda t: len(t) % 2 == 1),
    ends=st.tuples(st.text("ab \n:"), st.text("ab \n:")).filter(
        lambda e: e[0] != e[1] and e[0].strip() and e[1].strip()
    ),
)
def test_a_transcript_gives_back_the_turns_it_was_written_from(
    tmp_path_factory: pytest.TempPathFactory, turns: list[str], ends: tuple[str, str]
) -> None:
    row = {"chosen": transcript([*turns, ends[0]]), "rejected": transcript([*turns, ends[1]])}
    (pair,) = read(tmp_path_factory.getbasetemp(), row).pairs
    assert [m["content"] for m in pair.prompt.content] == turns  # type: ignore[index]
    assert (pair.chosen, pair.rejected) == ends


# TRL's unpaired examples


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "2+2=", "completion": " 4"}, "2+2=", " 4"),
        ({"prompt": [user("2+2?")], "completion": [assistant("4")]}, [user("2+2?")], [assistant("4")]),
        ({"prompt": [user("2+2?")], "completion": "4"}, [user("2+2?")], "4"),
        ({"prompt": "2+2?", "completion": [assistant("4")]}, [user("2+2?")], [assistant("4")]),
        ({"prompt": "2+2?", "completion": [user("2+2?"), assistant("4")]}, [user("2+2?")], [assistant("4")]),
    ],
)
@pytest.mark.parametrize("format", ["auto", "unpaired"])
def test_an_unpaired_example_is_a_pair_without_its_other_side(
    tmp_path: Path, row: dict[str, Any], prompt: Any, completion: Any, format: str
) -> None:
    data = read(tmp_path, {**row, "label": True}, {**row, "label": False}, format=format)
    assert [parts(p) for p in data.pairs] == [(prompt, completion, None), (prompt, None, completion)]
    assert data.account.kind == "unpaired"
    assert data.summary() == "kept 2 of 2 examples"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "x", "completion": " \n"}, "have an empty completion"),
        ({"prompt": "x", "completion": []}, "have an empty completion"),
        ({"prompt": "x", "completion": [user("x")]}, "have an empty completion"),
        ({"prompt": "x", "completion": [user("w"), assistant("y")]}, "have a turn of the user in the completion"),
    ],
)
def test_an_unpaired_example_without_a_completion_is_left_out(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    good = {"prompt": [user("x")], "completion": "y", "label": True}
    assert read(tmp_path, good, {**row, "label": False}).left_out == {reason: [2]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completion": " 4", "label": True}, r"row 1: no column 'prompt', only 'completion', 'label'; unpaired data"),
        ({"prompt": "x", "completion": " 4"}, r"row 1: no column 'label', only .*; unpaired data has prompt, comp"),
        ({"prompt": "x", "completion": " 4", "label": 0.5}, r"row 1, column 'label' is 0\.5; it must be true"),
        ({"prompt": "x", "completion": None, "label": True}, r"row 1, column 'completion' is missing or null"),
        (
            {"prompt": [assistant("x")], "completion": "y", "label": True},
            r"column 'prompt' ends with an assistant turn",
        ),
    ],
)
def test_unpaired_data_of_the_wrong_shape_is_named_with_its_row(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, row)


def test_labels_of_a_csv_file_are_read_by_their_names(tmp_path: Path) -> None:
    with open(tmp_path / "data.csv", "w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerows([["prompt", "completion", "label"], ["x", "y", "True"], ["x", "z", "false"]])
    pairs = read_all(tmp_path / "data.csv").pairs
    assert [parts(p) for p in pairs] == [("x", "y", None), ("x", None, "z")]


# ShareGPT


def said(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


ASKED = [said("human", "hi"), said("gpt", "hello"), said("human", "2+2?")]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": ASKED, "chosen": said("gpt", "4"), "rejected": said("gpt", "5")},
        {"conversations": ASKED, "chosen": [said("gpt", "4")], "rejected": [said("gpt", "5")]},
        {"conversations": ASKED, "chosen": [*ASKED, said("gpt", "4")], "rejected": [*ASKED, said("gpt", "5")]},
        {"prompt": ASKED, "chosen": said("gpt", "4"), "rejected": said("gpt", "5")},
        {"chosen": [*ASKED, said("gpt", "4")], "rejected": [*ASKED, said("gpt", "5")]},
    ],
    ids=["objects", "lists", "repeating the prompt", "prompt column", "no prompt column"],
)
@pytest.mark.parametrize("format", ["auto", "sharegpt"])
@pytest.mark.parametrize("file", ["json", "parquet"])
def test_sharegpts_turns_are_read_as_messages(tmp_path: Path, row: dict[str, Any], format: str, file: str) -> None:
    path = tmp_path / f"pairs.{file}"
    if file == "json":
        path.write_text(json.dumps([row]))
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    (pair,) = read_all(path, format=format).pairs
    assert parts(pair) == ([user("hi"), assistant("hello"), user("2+2?")], [assistant("4")], [assistant("5")])


def test_sharegpt_conversations_may_precede_plain_completions_and_have_a_system_column(tmp_path: Path) -> None:
    row = {"system": "Be brief.", "conversations": [said("human", "2+2?")], "chosen": "4", "rejected": "5"}
    (pair,) = read(tmp_path, row).pairs
    assert parts(pair) == ([{"role": "system", "content": "Be brief."}, user("2+2?")], "4", "5")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"conversations": [said("bird", "x")], "chosen": said("gpt", "4"), "rejected": said("gpt", "5")},
            r"row 1, column 'conversations': turn 1 is .*bird.*; a turn is .* from one of human",
        ),
        ({"conversations": ASKED, "rejected": said("gpt", "5")}, r"row 1: no column 'chosen'"),
        ({"conversations": ASKED[:2], "chosen": "4", "rejected": "5"}, r"'conversations' ends with an assistant turn"),
        (
            {"conversations": ASKED, "chosen": {"from": "gpt"}, "rejected": "5"},
            r"'chosen': message 1: 'content' is miss",
        ),
    ],
)
def test_sharegpt_data_of_the_wrong_shape_is_named_with_its_row(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, row)


# Formats named and mixed


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (GOOD, "pairs"),
        ({"prompt": "x", "completion": "y", "label": True}, "unpaired"),
        ({"conversations": ASKED, "chosen": said("gpt", "4"), "rejected": said("gpt", "5")}, "sharegpt"),
    ],
)
@pytest.mark.parametrize("named", ["pairs", "hh", "unpaired", "sharegpt"])
def test_data_of_one_format_named_as_another_is_refused(
    tmp_path: Path, row: dict[str, Any], found: str, named: str
) -> None:
    if {found, named} <= {"pairs", "hh"} or found == named:
        return
    columns = ", ".join(row)
    message = f"row 1 has the columns of data.format={found} ({columns}), but data.format is {named}; set data.format"
    with pytest.raises(DataError, match=re.escape(message)):
        read(tmp_path, row, format=named)


def test_texts_and_messages_in_one_data_set_are_refused_with_a_row_of_each(tmp_path: Path) -> None:
    row = {"prompt": [user("2+2?")], "chosen": "4", "rejected": "5"}
    with pytest.raises(DataError, match="row 1 is all text, and row 3 has messages; give all rows as the same kind"):
        read(tmp_path, GOOD, {**GOOD, "chosen": " 5"}, row)


def test_a_hub_data_set_is_read_from_its_memory_mapped_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    rows = [GOOD, {**GOOD, "prompt": "3+3="}]
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda path, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: datasets.Dataset.from_list(rows))
    data = PreferenceData("someone/pairs-v1.5", "train", limit=1)
    assert [parts(p) for batch in data.parsed() for p in batch] == [("2+2=", " 4", " 5")]


def test_a_list_of_a_json_file_is_read_piece_by_piece(tmp_path: Path) -> None:
    rows = [{"prompt": f"[{i}], ", "chosen": "ü" * 200, "rejected": '"\n' * i} for i in range(2, 2000)]
    path = tmp_path / "pairs.json"
    for indent in (None, 1):
        path.write_text(json.dumps(rows, indent=indent))  # several times what is read at once
        assert [p.rejected for p in read_all(path).pairs] == [row["rejected"] for row in rows]

    lines = path.read_text().splitlines()
    lines[7002] = lines[7002].replace('": "', '" "', 1)
    path.write_text("\n".join(lines))
    column = lines[7002].index('" "') + 3  # counted from 1
    with pytest.raises(
        DataError, match=rf"pairs\.json:7003: not valid JSON: Expecting ':' delimiter at column {column}"
    ):
        read_all(path)


# Token ids


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def raw(chosen: str, rejected: str, prompt: Any = "abcdef", row: int = 1) -> RawPair:
    return RawPair(Prompt("p", prompt), chosen, rejected, row, f"test.jsonl: row {row}")


def tokenize(
    tokenizer: Any, *pairs: RawPair, prompt: int = 1000, completion: int = 1000
) -> tuple[list[PreferencePair], Account]:
    account = Account("pairs.jsonl", kept=len(pairs))
    limits = {"max_prompt_tokens": prompt, "max_completion_tokens": completion}
    return tokenize_pairs(pairs, tokenizer, account, **limits), account


def counts(account: Account) -> tuple[int, int, int]:
    return account.kept, account.prompts_truncated, account.completions_truncated


def texts(tokenizer: Any, *ids: list[int]) -> list[str]:
    return [tokenizer.decode(i) for i in ids]


def test_pairs_become_ids_with_the_end_token_and_no_logprobs(tokenizer: Any) -> None:
    (pair,), account = tokenize(tokenizer, raw("yes", "no"), prompt=6, completion=4)
    assert texts(tokenizer, pair.prompt_ids, pair.chosen.token_ids, pair.rejected.token_ids) == [
        "abcdef",
        "yes<|im_end|>",
        "no<|im_end|>",
    ]
    assert (pair.chosen.text, pair.chosen.logprobs, pair.chosen.finish_reason) == ("yes", [], "stop")
    assert (pair.chosen_score, pair.rejected_score) == (None, None)
    assert counts(account) == (1, 0, 0)
    assert account.left_out == {}


def test_a_prompt_too_long_loses_its_beginning_and_a_completion_its_end_with_the_end_token(tokenizer: Any) -> None:
    (pair,), account = tokenize(tokenizer, raw("yes", "no"), prompt=2, completion=3)
    assert texts(tokenizer, pair.prompt_ids, pair.chosen.token_ids) == ["ef", "yes"]
    assert (pair.chosen.text, pair.chosen.finish_reason) == ("yes", "length")
    assert (pair.rejected.text, pair.rejected.finish_reason) == ("no", "stop")
    assert counts(account) == (1, 1, 1)
    assert account.left_out == {}


def test_a_prompt_too_long_keeps_its_bos_token(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.bos_token = "<|endoftext|>"
    for length, kept in ((7, "<|endoftext|>abcdef"), (3, "<|endoftext|>ef"), (1, "<|endoftext|>")):
        (pair,), account = tokenize(tokenizer, raw("yes", "no", prompt="<|endoftext|>abcdef"), prompt=length)
        assert texts(tokenizer, pair.prompt_ids) == [kept]
        assert len(pair.prompt_ids) == length
        assert account.prompts_truncated == (length < 7)


def test_the_absent_side_of_an_unpaired_example_has_no_tokens(tokenizer: Any) -> None:
    raws = [RawPair(Prompt("p", "x"), "yes", None, 1, ""), RawPair(Prompt("p", "x"), None, "no", 2, "")]
    pairs, account = tokenize(tokenizer, *raws)
    assert [texts(tokenizer, p.chosen.token_ids, p.rejected.token_ids) for p in pairs] == [
        ["yes<|im_end|>", ""],
        ["", "no<|im_end|>"],
    ]
    assert account.kept == 2


def test_the_text_of_a_truncated_completion_is_what_its_tokens_say(tokenizer: Any) -> None:
    (pair,), _ = tokenize(tokenizer, raw("yesterday", "no"), prompt=9, completion=3)
    assert pair.chosen.text == "yes"


def test_pairs_that_truncation_makes_equal_are_left_out_with_reason_and_row(tokenizer: Any, tmp_path: Path) -> None:
    pairs, account = tokenize(tokenizer, raw("yesterday", "yes, sir", row=7), raw("yes", "no"), prompt=9, completion=3)
    assert [p.rejected.text for p in pairs] == ["no"]
    assert counts(account) == (1, 0, 1)
    assert account.left_out == {"have identical completions after truncation": {"count": 1, "rows": [7]}}
    assert account.summary() == "kept 1 of 2 pairs (1 have identical completions after truncation)"


def test_data_that_truncation_leaves_nothing_of_say_which_limit_to_raise(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "x", "chosen": "yesterday", "rejected": "yes, sir"}))
    data = PreferenceData(str(tmp_path / "pairs.jsonl"))
    with pytest.raises(DataError, match=r"kept 0 of 1 pairs \(1 have identical.*raise data\.max_completion_tokens"):
        list(data.tokenized(tokenizer, max_prompt_tokens=9, max_completion_tokens=3))


def test_the_tightest_limits_leave_a_token_of_everything(tokenizer: Any) -> None:
    (pair,), _ = tokenize(tokenizer, raw("yes", "no"), prompt=1, completion=1)
    assert texts(tokenizer, pair.prompt_ids, pair.chosen.token_ids, pair.rejected.token_ids) == ["f", "y", "n"]


def test_a_pair_that_cannot_be_rendered_is_named_with_its_row(tokenizer: Any) -> None:
    broken = raw("yes", "no", prompt=[user("x"), assistant("y")], row=41)
    pairs, account = tokenize(tokenizer, broken, raw("yes", "no"))
    assert (len(pairs), account.kept, account.rows) == (1, 1, 2)
    assert account.left_out == {"cannot be rendered or tokenized": {"count": 1, "rows": [41]}}
    with pytest.raises(DataError, match=re.escape("test.jsonl: row 41: the prompt ends with an assistant turn")):
        account.check_rows()


def test_conversational_and_hh_pairs_end_with_the_templates_end_token(tokenizer: Any, hh_rlhf: Path) -> None:
    data = read_all(hh_rlhf, limit=50)
    pairs, account = tokenize(tokenizer, *data.pairs, prompt=10_000, completion=10_000)
    assert account.kept == len(data.pairs) == 50
    for pair, source in zip(pairs, data.pairs, strict=True):
        opening = f"{source.prompt.content[-1]['content']}<|im_end|>\n<|im_start|>assistant\n"  # type: ignore[index]
        assert tokenizer.decode(pair.prompt_ids).endswith(opening)
        assert tokenizer.decode(pair.chosen.token_ids) == f"{source.chosen}<|im_end|>"


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path) -> None:
    """Without a pool, so that all of it is this process's; with a stand-in tokenizer, to be quick."""
    program = """
        import json, re, resource, sys
        from pathlib import Path
        from iterdpo.data.pairs import TokenPairs, hold_out, write_tables
        from iterdpo.data.preferences import PreferenceData
        import iterdpo.data.pairs as pairs

        class Words:
            bos_token_id, eos_token_id, chat_template = None, 2, None
            def __call__(self, text, add_special_tokens=True):
                texts = [text] if isinstance(text, str) else text
                ids = [[len(word) for word in re.findall(" ?[a-z]+| ?[0-9]+", each)] for each in texts]
                self.input_ids = ids[0] if isinstance(text, str) else ids
                return self
            def decode(self, ids, **settings):
                return "word" * len(ids)

        directory, count = Path(sys.argv[1]), int(sys.argv[2])
        with open(directory / "pairs.json", "w") as file:
            for i in range(count):
                row = {"prompt": f"tale {i}", "chosen": " sea" * 250, "rejected": " isles" * 250}
                file.write(("[" if i == 0 else ",") + json.dumps(row))
            file.write("]")
        data = PreferenceData(str(directory / "pairs.json"))
        words = Words()
        tables = data.tokenized(words, max_prompt_tokens=9, max_completion_tokens=999, processes=1)
        write_tables(directory / "all.parquet", tables)
        hold_out(directory / "all.parquet", directory, 10, seed=0)
        pairs.IN_MEMORY = 0
        assert len(TokenPairs(directory / "train.parquet", directory)) == count - 10
        assert len(TokenPairs(directory / "train.parquet", directory)[5].chosen) == 251
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    """

    def peak(count: int) -> float:
        directory = tmp_path / str(count)
        directory.mkdir()
        command = [sys.executable, "-c", textwrap.dedent(program), str(directory), str(count)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    few, many = peak(5_000), peak(20_000)
    assert (tmp_path / "20000" / "pairs.json").stat().st_size > 50e6  # 15,000 more rows are 38 MB, and more in memory
    assert many - few < 15, f"{few:.0f} MB for 5,000 rows and {many:.0f} MB for 20,000"


def squared(number: int) -> tuple[int, int]:
    if number == 13:
        raise ValueError("thirteen")
    return number**2, os.getpid()


@pytest.mark.parametrize("processes", [1, 3])
def test_results_come_in_the_order_of_the_items(processes: int) -> None:
    results = list(map_in_order(squared, range(12), processes))
    assert [square for square, _ in results] == [n**2 for n in range(12)]
    assert (os.getpid() in {process for _, process in results}) == (processes == 1)


def test_no_more_than_a_few_items_are_taken_ahead_of_the_results() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for taken in range(1, 101):  # noqa: B007  # read below
            yield 2

    results = map_in_order(squared, items(), 2)
    for results_given in range(1, 11):
        next(results)
        assert taken <= results_given + 4
    results.close()


def test_an_error_in_a_process_is_raised_here_after_the_results_before_it() -> None:
    results = map_in_order(squared, range(20), 2)
    assert [next(results)[0] for _ in range(13)] == [n**2 for n in range(13)]
    with pytest.raises(ValueError, match="thirteen"):
        next(results)


def test_the_processes_end_with_the_one_that_started_them() -> None:
    program = """
        import os, sys, time
        from iterdpo.data.preferences import map_in_order

        def work(item):
            print(os.getpid(), flush=True)
            time.sleep(100)

        pid = os.getpid()
        def items():
            yield 0
            yield 1
            time.sleep(1)
            os.kill(pid, 9)

        list(map_in_order(work, items(), 2))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)  # its pipes close when all have ended
    assert done.returncode == -9
    assert done.stdout.split()


# Scores beside the labels


def scored(chosen: Any, rejected: Any, names: tuple[str, str] = ("score_chosen", "score_rejected")) -> dict[str, Any]:
    return {**GOOD, **dict(zip(names, (chosen, rejected), strict=True))}


@pytest.mark.parametrize(
    "names",
    [
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen-rating", "rejected-rating"),
        ("chosen_rating", "rejected_rating"),
        ("reward_chosen", "reward_rejected"),
    ],
)
def test_pairs_that_their_scores_contradict_are_counted_and_kept(tmp_path: Path, names: tuple[str, str]) -> None:
    data = read(tmp_path, scored(7, 6, names), scored(6.0, 6.5, names), scored(5, 5, names), scored(1, 2, names))
    assert data.account.contradicting == [2, 4]
    assert len(data.pairs) == 4
    assert data.summary() == (
        "kept 4 of 4 pairs; in 2 of them, such as row 2, the rejected completion has the higher score "
        "(data.min_margin=0 leaves them out)"
    )


@pytest.mark.parametrize(("least", "kept"), [(0.0, [1, 5]), (0.5, [1, 5]), (1.0, [1]), (2.0, [])])
def test_a_least_margin_leaves_out_what_is_scored_closer_or_against_its_label(
    tmp_path: Path, least: float, kept: list[int]
) -> None:
    rows = [scored(7, 6), scored(6, 7), scored(5, 5), {**scored(9, 1), "rejected": " 4"}, scored(3.5, 3)]
    if not kept:
        with pytest.raises(DataError, match=r"have a smaller margin of scores than data\.min_margin"):
            read(tmp_path, *rows, min_margin=least)
        return
    data = read(tmp_path, *rows, min_margin=least)
    assert [pair.row for pair in data.pairs] == kept
    assert data.account.contradicting == []
    assert data.left_out["have identical completions"] == [4]


@pytest.mark.parametrize(
    "values", [(None, None), (None, 1), ("7", "high"), (True, False), (float("nan"), 1), ([1], [2])]
)
def test_scores_that_are_no_numbers_are_no_scores(tmp_path: Path, values: tuple[Any, Any]) -> None:
    assert read(tmp_path, scored(*values)).account.contradicting == []
    with pytest.raises(DataError, match=r"data\.min_margin is set, but no two scores"):
        read(tmp_path, scored(*values), min_margin=0.0)


def test_scores_in_csv_are_numbers(tmp_path: Path) -> None:
    rows = "Question 1, good, bad,7,6\nQuestion 2, good, bad,1.5,4.5\n"
    (tmp_path / "a.csv").write_text(f"prompt,chosen,rejected,score_chosen,score_rejected\n{rows}")
    data = PreferenceData(str(tmp_path / "a.csv"))
    assert [pair.row for batch in data.parsed() for pair in batch] == [1, 2]
    assert data.account.contradicting == [2]
    data = PreferenceData(str(tmp_path / "a.csv"), min_margin=1.0)
    assert [pair.row for batch in data.parsed() for pair in batch] == [1]


@pytest.mark.parametrize("processes", [1, 2])
def test_contradictions_are_counted_alike_whatever_reads_them(tmp_path: Path, tiny_model: Path, processes: int) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(scored(i % 3, 1)) + "\n" for i in range(3500)))
    data = PreferenceData(str(path))
    limits = {"max_prompt_tokens": 99, "max_completion_tokens": 99}
    assert sum(len(t) for t in data.tokenized(load_tokenizer(tiny_model), **limits, processes=processes)) == 3500
    assert data.account.contradicting == list(range(1, 3501, 3))


def test_examples_of_each_label_are_counted(tmp_path: Path) -> None:
    examples = [{"prompt": "x", "completion": f"y{i}", "label": i == 1} for i in range(4)]
    assert read(tmp_path, *examples).account.desirable == 1
