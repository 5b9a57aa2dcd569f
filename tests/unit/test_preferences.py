from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iterdpo.errors import DataError
from iterdpo.preferences import PreferenceData, RawPair, read_preferences, tokenize_pairs
from iterdpo.rendering import load_tokenizer
from iterdpo.types import Message, Prompt


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def read(directory: Path, *rows: dict[str, Any], **settings: Any) -> PreferenceData:
    path = directory / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_preferences(str(path), **settings)


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
    pair = RawPair(Prompt("p", "x"), " y", " z", 1)
    data = PreferenceData([pair] * 2303, {"have an empty completion": [1] * 4, "diverge before the last turn": [2] * 5})
    assert data.summary() == "kept 2,303 of 2,312 pairs (5 diverge before the last turn, 4 have an empty completion)"


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
            r"row 2: one of chosen and rejected is text and the other messages",
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
    with pytest.raises(DataError, match="format 'trl' is none of auto, pairs, hh"):
        read(tmp_path, GOOD, format="trl")


def test_parquet_messages_read_like_json_ones(tmp_path: Path) -> None:
    row = {"prompt": "2+2?", "chosen": [user("2+2?"), assistant("4")], "rejected": [user("2+2?"), assistant("5")]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train.parquet")
    assert read_preferences(str(tmp_path)).pairs == read(tmp_path / "..", row).pairs


def test_equal_prompts_have_equal_ids(tmp_path: Path) -> None:
    first, second, other = read(tmp_path, GOOD, {**GOOD, "chosen": " four"}, {**GOOD, "prompt": "2 + 2 ="}).pairs
    assert first.prompt.id == second.prompt.id != other.prompt.id


# HH-RLHF transcripts


def transcript(turns: list[str]) -> str:
    speakers = ("Human", "Assistant")
    return "".join(f"\n\n{speakers[i % 2]}: {turn}" for i, turn in enumerate(turns))


def test_the_real_file_gives_2303_pairs_and_says_which_rows_it_leaves_out(hh_rlhf: Path) -> None:
    data = read_preferences(str(hh_rlhf))
    assert data.summary() == "kept 2,303 of 2,312 pairs (5 diverge before the last turn, 4 have an empty completion)"
    # read by eye: in these, one side goes on to a second Assistant turn, mostly after a "Human:" that the model wrote
    assert data.left_out["diverge before the last turn"] == [1255, 1689, 1951, 1953, 2037]
    assert data.left_out["have an empty completion"] == [87, 517, 926, 1104]


def test_every_real_prompt_alternates_from_a_user_to_a_user_message(hh_rlhf: Path) -> None:
    pairs = read_preferences(str(hh_rlhf)).pairs
    for pair in pairs:
        roles = [m["role"] for m in pair.prompt.content]  # type: ignore[index]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    assert sum(len(pair.prompt.content) > 1 for pair in pairs) > 1000


def test_a_real_multi_turn_pair_reads_as_a_person_reads_it(hh_rlhf: Path) -> None:
    pair = next(p for p in read_preferences(str(hh_rlhf)).pairs if p.row == 1)
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


# Token ids


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def raw(chosen: str, rejected: str, prompt: Any = "abcdef", row: int = 1) -> RawPair:
    return RawPair(Prompt("p", prompt), chosen, rejected, row)


def texts(tokenizer: Any, *ids: list[int]) -> list[str]:
    return [tokenizer.decode(i) for i in ids]


def test_pairs_become_ids_with_the_end_token_and_no_logprobs(tokenizer: Any) -> None:
    (pair,), counts = tokenize_pairs(
        PreferenceData([raw("yes", "no")]), tokenizer, max_prompt_tokens=6, max_completion_tokens=4
    )
    assert texts(tokenizer, pair.prompt_ids, pair.chosen.token_ids, pair.rejected.token_ids) == [
        "abcdef",
        "yes<|im_end|>",
        "no<|im_end|>",
    ]
    assert (pair.chosen.text, pair.chosen.logprobs, pair.chosen.finish_reason) == ("yes", [], "stop")
    assert (pair.chosen_score, pair.rejected_score) == (None, None)
    assert counts == {"pairs": 1, "prompts_truncated": 0, "completions_truncated": 0, "identical_after_truncation": 0}


def test_a_prompt_too_long_loses_its_beginning_and_a_completion_its_end_with_the_end_token(tokenizer: Any) -> None:
    (pair,), counts = tokenize_pairs(
        PreferenceData([raw("yes", "no")]), tokenizer, max_prompt_tokens=2, max_completion_tokens=3
    )
    assert texts(tokenizer, pair.prompt_ids, pair.chosen.token_ids) == ["ef", "yes"]
    assert (pair.chosen.text, pair.chosen.finish_reason) == ("yes", "length")
    assert (pair.rejected.text, pair.rejected.finish_reason) == ("no", "stop")
    assert counts == {"pairs": 1, "prompts_truncated": 1, "completions_truncated": 1, "identical_after_truncation": 0}


def test_the_text_of_a_truncated_completion_is_what_its_tokens_say(tokenizer: Any) -> None:
    (pair,), _ = tokenize_pairs(
        PreferenceData([raw("yesterday", "no")]), tokenizer, max_prompt_tokens=9, max_completion_tokens=3
    )
    assert pair.chosen.text == "yes"


def test_pairs_that_truncation_makes_equal_are_left_out_and_counted(tokenizer: Any) -> None:
    data = PreferenceData([raw("yesterday", "yes, sir"), raw("yes", "no")])
    pairs, counts = tokenize_pairs(data, tokenizer, max_prompt_tokens=9, max_completion_tokens=3)
    assert [p.rejected.text for p in pairs] == ["no"]
    assert (counts["pairs"], counts["identical_after_truncation"], counts["completions_truncated"]) == (1, 1, 1)
    with pytest.raises(DataError, match=r"in all 1 pairs the completions are equal in their first 3 tokens"):
        tokenize_pairs(PreferenceData(data.pairs[:1]), tokenizer, max_prompt_tokens=9, max_completion_tokens=3)


def test_the_tightest_limits_leave_a_token_of_everything(tokenizer: Any) -> None:
    (pair,), _ = tokenize_pairs(
        PreferenceData([raw("yes", "no")]), tokenizer, max_prompt_tokens=1, max_completion_tokens=1
    )
    assert texts(tokenizer, pair.prompt_ids, pair.chosen.token_ids, pair.rejected.token_ids) == ["f", "y", "n"]


def test_a_pair_that_cannot_be_rendered_is_named_with_its_row(tokenizer: Any) -> None:
    data = PreferenceData([raw("yes", "no", prompt=[user("x"), assistant("y")], row=41)], source="pairs.jsonl")
    with pytest.raises(DataError, match=re.escape("pairs.jsonl: row 41: the prompt ends with an assistant turn")):
        tokenize_pairs(data, tokenizer, max_prompt_tokens=9, max_completion_tokens=9)


def test_conversational_and_hh_pairs_end_with_the_templates_end_token(tokenizer: Any, hh_rlhf: Path) -> None:
    data = read_preferences(str(hh_rlhf), limit=50)
    pairs, counts = tokenize_pairs(data, tokenizer, max_prompt_tokens=10_000, max_completion_tokens=10_000)
    assert counts["pairs"] == len(data.pairs) == 50
    for pair, source in zip(pairs, data.pairs, strict=True):
        opening = f"{source.prompt.content[-1]['content']}<|im_end|>\n<|im_start|>assistant\n"  # type: ignore[index]
        assert tokenizer.decode(pair.prompt_ids).endswith(opening)
        assert tokenizer.decode(pair.chosen.token_ids) == f"{source.chosen}<|im_end|>"
