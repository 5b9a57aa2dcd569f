"""IFEval's checks against lm-eval's program: varied replies, each of the 25 instructions with random arguments.

Verdicts that differ are explained by a departure (`DEPARTURES`, and the docstring of judges/verify/ifeval.py), or the
program is wrong about a language that the test knows. At most 0.3 % of all verdicts are left, without an explanation.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from iterdpo.data.rows import load_rows
from judges.verify.ifeval import CHECKS, follows
from tests.unit.judges.verify.official_ifeval import official_checks, official_verdict

pytestmark = pytest.mark.slow

REPLIES = 570  # times 25 instructions: 14,250 verdicts

SENTENCES = """The harbour is quiet before dawn.|Boats leave with the tide, and gulls follow them.|Who keeps the lamp?
An old woman does, as her mother did.|She said, "Come in and sit down."|It's 3.5 km from the church to the pier.
Dr. Hale measured the depth twice; the results agree.|What a storm that was!|We paid $12.50 for two tickets.
NASA published the pictures in May.|The U.S. team won by 4-2.|You shouldn't drive after 10 p.m. on this road.
Add flour, butter, and salt (about 5 g).|Stir until smooth.|Let it rest for 30 minutes.|Why does bread rise?
Because yeast makes gas.|However, not every dough needs it.|In 1969 people walked on the moon.
I think that's fair, don't you?|My answer is yes.|The CEO of IBM met the CFO.|Don't STOP now.
First, open the file. Then press Ctrl+S.|Read https://example.com/help for more.|Prices rose by 20% last year...
Many people, e.g. teachers, disagree.|Is this the end?|No, it isn't.|Thanks for asking!
As an assistant, I can't verify that.|Python's `len` counts items.|The state-of-the-art method uses A/B tests.
Mr. and Mrs. Fox live on Elm St. in Dover.|Nobody knew what the letter said.|Rivers carve valleys slowly.""".replace(
    "\n", "|"
).split("|")

OTHERS = {
    "de": "Das Wetter war schön, und wir gingen am Nachmittag zum Fluss, um mit den Kindern zu schwimmen.",
    "fr": "Il faisait beau hier, et nous sommes allés nager dans la rivière avec les enfants du village.",
    "es": "Ayer hacía buen tiempo y fuimos al río para nadar con los niños de nuestra escuela.",
    "pt": "Ontem o tempo estava bom e nós fomos ao rio para nadar com as crianças da nossa escola.",
    "it": "Ieri il tempo era bello e siamo andati al fiume per nuotare con i bambini della nostra scuola.",
    "fi": "Eilen sää oli kaunis, ja menimme joelle uimaan koulumme lasten kanssa koko iltapäiväksi.",
    "sw": "Jana hali ya hewa ilikuwa nzuri, na tulienda mtoni kuogelea pamoja na watoto wa shule yetu.",
    "vi": "Hôm qua thời tiết rất đẹp, chúng tôi đã ra sông bơi cùng với các em học sinh của trường.",
    "ru": "Вчера была хорошая погода, и мы пошли на реку купаться вместе с детьми из нашей школы.",
    "bg": "Вчера времето беше хубаво и ние отидохме на реката да плуваме заедно с децата от училището.",
    "uk": "Вчора була гарна погода, і ми пішли на річку купатися разом із дітьми з нашої школи.",
    "ja": "昨日は天気がよかったので、学校の子どもたちと一緒に川へ泳ぎに行きました。",
    "ko": "어제는 날씨가 좋아서 우리 학교 아이들과 함께 강으로 수영하러 갔습니다.",
    "hi": "कल मौसम अच्छा था और हम अपने स्कूल के बच्चों के साथ नदी में तैरने गए।",
    "mr": "काल हवामान छान होते आणि आम्ही आमच्या शाळेतील मुलांबरोबर नदीत पोहायला गेलो.",
    "ar": "كان الطقس جميلا أمس وذهبنا إلى النهر للسباحة مع أطفال مدرستنا طوال فترة بعد الظهر.",
    "fa": "دیروز هوا خوب بود و ما با بچه‌های مدرسه‌مان برای شنا به رودخانه رفتیم.",
    "th": "เมื่อวานอากาศดีมากและเราไปว่ายน้ำที่แม่น้ำกับเด็กๆ ของโรงเรียน",
    "bn": "গতকাল আবহাওয়া ভালো ছিল এবং আমরা আমাদের স্কুলের বাচ্চাদের সাথে নদীতে সাঁতার কাটতে গিয়েছিলাম।",
    "ta": "நேற்று வானிலை நன்றாக இருந்தது, நாங்கள் பள்ளிக் குழந்தைகளுடன் ஆற்றில் நீந்தச் சென்றோம்.",
    "te": "నిన్న వాతావరణం బాగుంది, మేము మా పాఠశాల పిల్లలతో నదిలో ఈత కొట్టడానికి వెళ్ళాము.",
    "he": "אתמול מזג האוויר היה יפה והלכנו לנהר לשחות יחד עם הילדים של בית הספר שלנו.",
}


class Reply(NamedTuple):
    prompt: str
    text: str
    language: str


def generated_replies(chance: random.Random) -> list[Reply]:
    return [generated_reply(chance) for _ in range(REPLIES)]


def generated_reply(chance: random.Random) -> Reply:
    """One as a model writes it: paragraphs, perhaps a title, bullets, a table, code, marks of Markdown, a farewell."""
    language = chance.choice([*OTHERS, *["en"] * 45])

    def paragraph() -> str:
        if language != "en":
            return " ".join([OTHERS[language]] * chance.randint(1, 3))
        return " ".join(chance.sample(SENTENCES, chance.randint(1, 6)))

    def marked(words: str) -> str:
        return chance.choice(["*{}*", "**{}**", "{}", "***{}***", "_{}_", "`{}`"]).format(words)

    def bullets() -> str:
        mark = chance.choice(["* ", "- ", "1. ", "• ", "  - ", "+ "])
        return "\n".join(mark + marked(chance.choice(SENTENCES)) for _ in range(chance.randint(1, 6)))

    def heading() -> str:
        words = chance.choice(["The Harbour", "On Bread", "STEP ONE", "Why It Matters", "Section 2"])
        return chance.choice(["# {}", "**{}**", "{}:", "## {}", "<<{}>>"]).format(words)

    def other() -> str:
        rare = ["---", "| a | b |\n|---|---|\n| 1 | 2 |", "```python\nx = [1, 2]\nprint(x[0])\n```", "> A QUOTE, as is.",
                "Dear [Name],", "[address] and [date of birth]", "Question: []", '{"a": 1, "b": [2, 3]}', "* * *",
                "Best regards,\n[Your Name]", "SECTION 1\nIt begins.\nSECTION 2\nIt ends.", "Day 1: rest. Day 2: run."]  # fmt: skip
        return chance.choice(rare)

    pieces = [chance.choice([paragraph, paragraph, bullets, heading, other]) for _ in range(chance.randint(1, 8))]
    if language != "en":
        pieces = [paragraph] * chance.randint(1, 3)
    text = chance.choice(["\n\n", "\n\n", "\n\n", "\n", " \n\n"]).join(piece() for piece in pieces)
    return Reply(f"Write about {chance.choice(['bread', 'the sea', 'NASA'])}.", text, language)


def real_replies(path: Path) -> list[Reply]:
    """The last turns of HH-RLHF's chosen conversations."""
    rows = load_rows(str(path), "train", limit=REPLIES)
    turns = [re.split(r"\n\n(?:Human|Assistant): ", row["chosen"]) for row in rows]
    return [Reply(turn[-2], turn[-1], "en") for turn in turns]


def arguments_of(name: str, reply: Reply, chance: random.Random) -> dict[str, Any]:
    """Arguments that the reply follows about as often as not."""
    text, relation = reply.text, chance.choice(["at least", "less than"])

    def about(pattern: str, spread: int = 2) -> int:
        return max(1, len(re.findall(pattern, text, re.MULTILINE)) + chance.randint(-spread, spread))

    words = re.findall(r"[A-Za-z]{3,}", text) or ["none"]
    some = [chance.choice([*words, "river", "however"]) for _ in range(2)]
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    nth = chance.randint(1, max(1, len(paragraphs)))
    begin = re.findall(r"[^\W_][^\s.,:;!?'\"*_`)}\]、。।]*", paragraphs[nth - 1])[:1] if paragraphs else []
    match name:
        case "keywords:existence":
            return {"keywords": some}
        case "keywords:forbidden_words":
            return {"forbidden_words": some}
        case "keywords:frequency":
            return {"keyword": some[0], "frequency": chance.randint(1, 4), "relation": relation}
        case "keywords:letter_frequency":
            letter = chance.choice("aeioqzjxk")
            return {"letter": letter, "let_frequency": about(f"(?i){letter}"), "let_relation": relation}
        case "language:response_language":
            return {"language": chance.choice([reply.language, reply.language, *OTHERS, "en"])}
        case "length_constraints:number_sentences":
            return {"num_sentences": about(r"[.!?](?=\s|$)", 5), "relation": relation}
        case "length_constraints:number_paragraphs":
            return {"num_paragraphs": about(r"\*\*\*", 1) + 1}
        case "length_constraints:number_words":
            return {"num_words": about(r"\w+", 4), "relation": relation}
        case "length_constraints:nth_paragraph_first_word":
            first = (begin or ["the"])[0].lower() if chance.random() < 0.8 else "the"
            return {"num_paragraphs": max(nth, len(paragraphs)), "nth_paragraph": nth, "first_word": first}
        case "detectable_content:number_placeholders":
            return {"num_placeholders": about(r"\[.*?\]", 1)}
        case "detectable_content:postscript":
            return {"postscript_marker": chance.choice(["P.S.", "P.P.S"])}
        case "detectable_format:number_bullet_lists":
            return {"num_bullets": about(r"^\s*(?:\*[^*]|-)", 1)}
        case "detectable_format:number_highlighted_sections":
            return {"num_highlights": about(r"\*[^\n*]+\*", 1)}
        case "detectable_format:multiple_sections":
            return {
                "section_spliter": chance.choice(["SECTION", "Day", "Section"]),
                "num_sections": chance.randint(1, 3),
            }
        case "combination:repeat_prompt":
            return {"prompt_to_repeat": reply.prompt}
        case "startend:end_checker":
            end = text.strip()[-15:].strip()
            return {"end_phrase": end if end and chance.random() < 0.6 else "Is there anything else?"}
        case "change_case:capital_word_frequency":
            return {"capital_frequency": about(r"\b[A-Z]+\b"), "capital_relation": relation}
    return {}


def tried(name: str, reply: Reply, chance: random.Random) -> Reply:
    """The reply, more often than not changed by somebody who tries to follow the instruction."""
    text = reply.text
    if chance.random() < 0.35:
        return reply
    match name:
        case "change_case:english_capital":
            text = text.upper()
        case "change_case:english_lowercase":
            text = text.lower()
        case "startend:quotation":
            text = f'"{text}"'
        case "detectable_format:title":
            text = f"<<{chance.choice(['A Title', ' ', 'on bread'])}>>\n\n{text}"
        case "detectable_content:postscript":
            mark = chance.choice(["P.S. ", "P.P.S. ", "P. S. ", "PS: ", "**P.S.** ", "P.P.S ", "p.s. ", "P.S."])
            text += f"\n\n{mark}{chance.choice(['Call me.', 'I forgot the salt.', ''])}"
        case "combination:two_responses":
            text = chance.choice(["{0}\n\n******\n\n{1}", "******\n{0}\n******\n{1}", "{0}\n******\n{0}"]).format(
                text, reply.prompt
            )
        case "combination:repeat_prompt":
            text = chance.choice(["{0}\n\n{1}", "{0} {1}", "Sure! {0}\n{1}"]).format(reply.prompt, text)
        case "length_constraints:number_paragraphs":
            text = text.replace("\n\n", "\n\n***\n\n")
        case "detectable_format:json_format":
            value = json.dumps({"reply": text})
            text = chance.choice(["{}", "```json\n{}\n```", "```\n{}\n```", "Here: {}", "```JSON\n{}```"]).format(value)
        case "detectable_format:constrained_response":
            text = chance.choice(["My answer is {}.", "**My answer is {}.**", "my answer is {}.", "My answer is {}!"])
            text = text.format(chance.choice(["yes", "no", "maybe", "unclear"]))
        case "punctuation:no_comma":
            text = text.replace(",", "")
    return reply._replace(text=text)


def plain_beginnings(text: str) -> str:
    """Paragraphs without what stands around their first words, divided by lines that are empty."""
    parts = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    return "\n\n".join(re.sub(r"[-*_#>`\"“”()\[\]{}<|/:;…—、。，！？।+•]", " ", part).strip() or part for part in parts)


def short(text: str) -> bool:
    return len(re.findall(r"[^\W\d_]", text)) < 40


DEPARTURES: dict[str, tuple[str, Callable[[str], str]]] = {
    "length_constraints:nth_paragraph_first_word": ("marks around the first word of a paragraph", plain_beginnings),
    "detectable_content:postscript": (
        "a marker needs a text, and P.P.S. is no P.S.",
        lambda text: re.sub(r"(?i)p\.\s?p\.\s?s\.?|p\.\s?s\.[\s*]*\Z", "", text),
    ),
    "detectable_format:number_bullet_lists": (
        "a rule is no bullet",
        lambda text: re.sub(r"(?m)^\s*(?:-{2,}|\*[ *]*$|- *$).*$", "", text),
    ),
    "detectable_format:number_highlighted_sections": (
        "`***so***` is one section, and a bullet's star is none",
        lambda text: re.sub(r"\*{3}([^*\n]+)\*{3}", r"*\1*", re.sub(r"(?m)^[ \t]*\*[ \t]+", "", text)),
    ),
    "detectable_content:number_placeholders": ("`[]` is no placeholder", lambda text: text.replace("[]", "")),
    "change_case:capital_word_frequency": (
        "`DON'T` is one word",
        lambda text: re.sub(r"(?<=[A-Z])['’](?=[A-Z])", "", text),
    ),
    "change_case:english_capital": ("text in capitals is lower-cased first", str.lower),
}


def differing(replies: list[Reply], chance: random.Random) -> tuple[int, Counter[str], list[tuple[Any, ...]]]:
    """How many verdicts there are, how many a departure explains by instruction, and those without an explanation."""
    checks = official_checks()
    assert checks.keys() == CHECKS.keys()
    verdicts, explained, left = 0, Counter[str](), []
    for original in replies:
        for name in CHECKS:
            reply = tried(name, original, chance)
            arguments = arguments_of(name, reply, chance)
            ours, theirs = follows(reply.text, name, arguments), official_verdict(checks, name, arguments, reply.text)
            verdicts += 1
            if ours == theirs:
                continue
            if name == "change_case:english_capital" and reply.text.isupper():
                amended = reply.language == "en" or short(reply.text)
            elif name in DEPARTURES:
                amended = official_verdict(checks, name, arguments, DEPARTURES[name][1](reply.text))
            elif name == "language:response_language":
                amended = reply.language == arguments["language"] or short(
                    reply.text
                )  # the truth: langdetect may be wrong
            elif name == "change_case:english_lowercase":
                amended = reply.text.islower() and (reply.language == "en" or short(reply.text))
            else:
                amended = theirs
            if amended == ours:
                explained[name] += 1
            else:
                left.append((name, arguments, f"official: {theirs}", reply.text[:200]))
    return verdicts, explained, left


def test_generated_replies_get_the_officials_verdicts_but_for_departures() -> None:
    chance = random.Random(20231107)
    verdicts, explained, left = differing(generated_replies(chance), chance)
    assert verdicts >= 14_000
    assert len(left) <= 0.003 * verdicts, left
    assert explained.keys() <= {*DEPARTURES, "language:response_language", "change_case:english_lowercase"}


def test_real_replies_get_the_officials_verdicts_but_for_departures(hh_rlhf: Path) -> None:
    verdicts, _, left = differing(real_replies(hh_rlhf), random.Random(20231107))
    assert verdicts >= 14_000
    assert len(left) <= 0.003 * verdicts, left


@pytest.mark.parametrize(
    ("name", "arguments", "text", "ours"),
    [
        ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "at least"}, "A. Smith\n\nnods. Bye.", False),
        ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "DON'T", False),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "* a *b", False),
        ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "a\n\n---\n\nb", False),
        ("detectable_content:number_placeholders", {"num_placeholders": 1}, "x = []", False),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.P.S. Call me.", False),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S.", False),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
            "a\n\n**So** b",
            True,
        ),
        ("keywords:existence", {"keywords": ["a.b"]}, "axb", False),
    ],
)  # fmt: skip
def test_each_departure_is_one(name: str, arguments: dict[str, Any], text: str, ours: bool) -> None:
    assert follows(text, name, arguments) is ours
    if name != "length_constraints:number_sentences":  # its model is a download
        assert official_verdict(official_checks(), name, arguments, text) is not ours


def test_a_sign_may_be_the_letter_that_is_counted() -> None:
    arguments = {"letter": "#", "let_frequency": 2, "let_relation": "at least"}
    assert follows("# a\n# b", "keywords:letter_frequency", arguments)
    check = official_checks()["keywords:letter_frequency"]("x")
    check.build_description(**arguments)
    assert check.get_instruction_args()["letter"].isalpha()  # a random one
