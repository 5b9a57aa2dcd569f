"""Each of IFEval's 25 instructions, with completions that follow it and completions that do not."""

from __future__ import annotations

from typing import Any

import pytest

from iterdpo.errors import JudgeError
from iterdpo.judging.judge import JudgeBase, checked_judgments
from iterdpo.testing import make_group
from judges.verify.ifeval import (
    CHECKS,
    Instructions,
    check_instruction,
    count_sentences,
    count_words,
    follows,
    loose_variants,
    may_be_in,
)

ENGLISH = "the weather was fine and we went down to the river to swim"
AT_LEAST, LESS_THAN = "at least", "less than"

# instruction, arguments, followed by these, not followed by those
EXAMPLES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["Cat", "dog"]}, ["A cat, a DOG.", "dogcats"], ["A cat.", "ca t dog"]),
    ("keywords:existence", {"keywords": ["a.b"]}, ["it is a.b"], ["it is axb"]),
    ("keywords:frequency", {"keyword": "la", "frequency": 2, "relation": AT_LEAST}, ["La la", "la la la"], ["la"]),
    ("keywords:frequency", {"keyword": "la", "frequency": 2, "relation": LESS_THAN}, ["la", "no"], ["la la"]),
    ("keywords:forbidden_words", {"forbidden_words": ["bad", "sad"]}, ["good", "badly"], ["Bad!", "so sad."]),
    ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": AT_LEAST}, ["Qq"], ["q", "a"]),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 2, "let_relation": LESS_THAN}, ["a!"], ["!!"]),
    (
        "language:response_language",
        {"language": "de"},
        ["Das Wetter war schön, und wir gingen zum Fluss, um zu schwimmen."],
        [ENGLISH, "Il faisait beau et nous sommes allés nager dans la rivière."],
    ),
    ("language:response_language", {"language": "zh-cn"}, ["今天天气很好，我们去河边游泳。"], [ENGLISH]),
    ("language:response_language", {"language": "hi"}, ["आज मौसम अच्छा था और हम नदी में तैरने गए।"], [ENGLISH]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": AT_LEAST},
        ["One. Two.", "Is it? It is! Yes"],
        ["One.", "It is 3.5 km long.", "Dr. Smith sleeps."],
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": LESS_THAN}, ["One."], ["One. Two."]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "a *** b", "***\na\n***\nb\n***"],
        ["a", "a\n\nb", "a***b***c", "a *** *** b"],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": AT_LEAST}, ["a b c", "a, b; c d"], ["a b", "-- a"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS_THAN}, ["a b"], ["a b c"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Firstly"},
        ["a\n\nfirstly, b", 'a\n\n"Firstly b'],
        ["firstly\n\nb", "a\n\nfirst b", "a\n\nfirstly\n\nc", "firstly b"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name] [a b]", "[a][b][c]"], ["[name]", "[] []"]),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Bye.\nP.S. I lied", "Bye\np. s. call me"],
        ["Bye.", "the lamps. I see", "Bye\nP.P.S. twice"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["Bye\nP.P.S I lied", "P.P.S. x"], ["P.S. I lied"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n* b", "- a\n  - b"], ["* a", "* a\n* b\n* c", "**a**\n---"]),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "Well. My answer is maybe."],
        ["Yes.", "My answer is unclear."],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b c*", "**a** *b*"],
        ["*a*", "**a**", "* a\n* b", "** ** * *"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb", "SECTION 1 a SECTION 2 b SECTION 3"],
        ["SECTION 1\na", "SECTION one SECTION two", "section 1 section 2"],
    ),
    ("detectable_format:json_format", {}, ['{"a": 1}', '```json\n{"a": 1}\n```', "[1]"], ["{a: 1}", 'So: {"a": 1}']),
    ("detectable_format:title", {}, ["<<Joy>>\nLa la.", "x << a b >> y"], ["Joy", "<< >>", "<Joy>", "<<a\nb>>"]),
    ("combination:two_responses", {}, ["a\n******\nb", "******a******b"], ["a", "a******a", "a******b******c", "******"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Sing a song."}, ["Sing a song. La", " sing a song.\nLa"], ["La"]),
    ("startend:end_checker", {"end_phrase": "Is that all?"}, ["La. Is that all?", '"La. is THAT all?" '], ["Is that all? La"]),
    ("startend:quotation", {}, ['"La."', ' "a" and "b"\n'], ['"La.', "La.", '"', "'La'"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": AT_LEAST},
        ["NASA and ESA", "I AM"],
        ["Nasa and ESA", "no"],
    ),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": LESS_THAN}, ["NASA"], ["NASA ESA"]),
    ("change_case:english_capital", {}, [ENGLISH.upper() + "."], [ENGLISH, "DAS WETTER WAR SCHÖN UND WIR GINGEN ZUM FLUSS"]),
    ("change_case:english_lowercase", {}, [ENGLISH + "."], [ENGLISH.upper(), "das wetter war schön und wir gingen zum fluss"]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "followed", "broken"), EXAMPLES, ids=[e[0] for e in EXAMPLES])
def test_examples(name: str, arguments: dict[str, Any], followed: list[str], broken: list[str]) -> None:
    if name.startswith(("language", "change_case:english")):
        pytest.importorskip("py3langid")
    assert [text for text in followed if not follows(text, name, arguments)] == []
    assert [text for text in broken if follows(text, name, arguments)] == []


def test_there_are_the_papers_25_instructions_with_examples() -> None:
    assert len(CHECKS) == 25
    assert {name for name, *_ in EXAMPLES} == CHECKS.keys()


def test_an_empty_completion_follows_nothing() -> None:
    assert not follows(" \n", "punctuation:no_comma", {})


def test_sentences_end_where_one_reads_them_to_end() -> None:
    texts = [
        "",
        "One",
        "One. Two? Three!",
        "At 3.5 m. Then 4.",
        'He said "No." Then left.',
        "Wait... what?",
        "你好。再见！",
    ]
    assert [count_sentences(t) for t in texts] == [0, 1, 3, 2, 2, 2, 2]
    assert count_sentences("Mr. Fox met J. R. Hare, e.g. at noon. The end.") == 2


def test_a_title_a_greeting_or_a_stanza_is_no_sentence() -> None:
    for text, wanted in (
        ("<<On Trees>>\n\nOaks grow slowly. Birches do not.", 2),
        ("# On Trees\n\nOaks grow slowly. Birches do not.", 2),
        ("**Chorus:**\n\nThe leaves come down,\n\nthe town is brown", 1),
        ("One. Two.\n\nThree.", 3),
        ("dear neighbours,\n\ni write to you. i am well.\n\nyours,\n\nann", 3),
    ):
        assert count_sentences(text) == wanted, text


def test_a_language_is_told_by_its_script_first() -> None:
    pytest.importorskip("py3langid")
    for text, language in (
        ("это большой дом у реки, где мы жили", "ru"),
        ("このりんごは赤いです", "ja"),
        ("今天天气很好", "zh"),
        ("ನಮಸ್ಕಾರ", "kn"),
        ("안녕하세요", "ko"),
        ("สวัสดีครับ", "th"),
        ("ok", "en"),
        ("42!", "de"),
        ("ok", "de"),
        ("Habari ya asubuhi, ninafurahi sana kukuona leo", "sw"),
    ):
        assert may_be_in(text, language), text
    for text, language in (
        ("ok", "ru"),
        ("今天天气很好", "ja"),
        ("नमस्ते", "en"),
        (ENGLISH, "de"),
        ("hello there my friends of old", "hi"),
    ):
        assert not may_be_in(text, language), text  # fmt: skip


def test_words_in_capitals_highlights_and_postscripts_are_counted_as_a_reader_does() -> None:
    capital = {"capital_frequency": 2, "capital_relation": AT_LEAST}
    for text in ("NASA's and ESA's", "I'm in the U.S.", "STATE-OF-THE-ART and A/B"):
        assert follows(text, "change_case:capital_word_frequency", capital), text
    for text in ("DON'T", "the U.S.", "R2D2", "Ctrl+S"):
        assert not follows(text, "change_case:capital_word_frequency", capital), text
    assert not follows("* **Bold**: a\n* b", "detectable_format:number_highlighted_sections", {"num_highlights": 2})
    assert not follows("Bye\nP.S I lied", "detectable_content:postscript", {"postscript_marker": "P.S."})
    first = {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "it"}
    assert follows("It's so.", "length_constraints:nth_paragraph_first_word", first)


def test_words_have_their_vowel_signs_and_what_joins_emoji_is_none() -> None:
    for text, wanted in (
        ("कल मौसम अच्छा था", 4),
        ("so ❄️❄️ 👩\u200d💻 cold", 2),
        ("x_1, m² and 3.5", 5),
        ("بچه\u200cهای ما", 2),
        ("don't", 2),
    ):
        assert count_words(text) == wanted, text
    first = {"num_paragraphs": 1, "nth_paragraph": 1}
    for text, word in (("मौसम अच्छा था", "मौसम"), ("**_So_**: yes", "so"), ("昨日、川へ", "昨日")):
        assert follows(text, "length_constraints:nth_paragraph_first_word", {**first, "first_word": word}), text


class TestLoose:
    def test_the_eight_readings(self) -> None:
        assert list(loose_variants("Sure:\n*a*\nbye")) == [
            "Sure:\n*a*\nbye", "Sure:\n*a*", "*a*\nbye", "*a*", "Sure:\na\nbye", "Sure:\na", "a\nbye", "a",
        ]  # fmt: skip

    def test_an_introduction_a_farewell_and_asterisks_are_forgiven(self) -> None:
        for text, name, arguments in [
            ("Sure, here it is:\nno commas", "punctuation:no_comma", {}),
            ("no commas\nBye, bye", "punctuation:no_comma", {}),
            ("**My answer is yes**.", "detectable_format:constrained_response", {}),
        ]:
            assert not follows(text, name, arguments)
            assert follows(text, name, arguments, strict=False)
        assert not follows("a,\nb,\nc,", "punctuation:no_comma", {}, strict=False)


class TestJudge:
    COLUMNS: dict[str, Any] = {  # noqa: RUF012
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{"num_words": None}, {"relation": "at least", "num_words": 3, "num_bullets": None}],
    }

    def judgment(self, judge: Instructions, *completions: str, **columns: Any) -> Any:
        assert isinstance(judge, JudgeBase)
        return checked_judgments(judge, [make_group("q", completions, **columns)])[0]

    def test_all_instructions_or_the_share_of_them(self) -> None:
        texts = ("a b c", "a, b c", "a b", "a, b")
        assert self.judgment(Instructions(), *texts, **self.COLUMNS).scores == [1, 0, 0, 0]
        judgment = self.judgment(Instructions(partial=True), *texts, **self.COLUMNS)
        assert judgment.scores == [1, 0.5, 0.5, 0]
        both = self.COLUMNS["instruction_id_list"]
        assert judgment.details == {"followed": [both, both[1:], both[:1], []]}

    def test_loose_by_choice(self) -> None:
        text = "Sure, here:\na b c"
        assert self.judgment(Instructions(), text, **self.COLUMNS).scores == [0]
        assert self.judgment(Instructions(strict=False), text, **self.COLUMNS).scores == [1]

    @pytest.mark.parametrize(
        ("columns", "why"),
        [
            ({}, "the prompt's column 'instruction_id_list' is missing"),
            ({"instruction_id_list": []}, "the prompt's column 'instruction_id_list' is empty"),
            ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}, {}]}, "not lists of the same length"),
            ({"instruction_id_list": ["punctuation:no_commas"]}, "did you mean 'punctuation:no_comma'"),
            ({"instruction_id_list": ["keywords:existence"]}, "lacks its argument 'keywords'"),
            (
                {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"num_words": 3, "relation": "most"}]},
                "relation must be 'at least' or 'less than'",
            ),
        ],
    )  # fmt: skip
    def test_what_cannot_be_checked_abstains(self, columns: dict[str, Any], why: str) -> None:
        judgment = self.judgment(Instructions(), "a", **columns)
        assert judgment.scores == [None]
        assert why in judgment.abstentions[0]

    def test_arguments_of_other_instructions_are_left_aside(self) -> None:
        assert check_instruction("startend:quotation", {"num_words": 3}) == {}
        assert check_instruction("detectable_content:number_placeholders", {"num_placeholders": 3.0}) == {
            "num_placeholders": 3
        }
        with pytest.raises(JudgeError, match="a whole number"):
            check_instruction("detectable_content:number_placeholders", {"num_placeholders": "3"})
