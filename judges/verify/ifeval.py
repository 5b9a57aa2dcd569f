"""Whether a completion follows instructions that a program can check, in IFEval's vocabulary (arXiv:2311.07911).

The prompt's columns are IFEval's: `instruction_id_list` names the instructions, `kwargs` has for each of them its
arguments, in which keys that are null or unknown to the instruction are ignored.

    {"instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
     "kwargs": [{}, {"relation": "at least", "num_words": 300}]}

`CHECKS` has the 25 instructions as pure functions of the completion and their arguments, by the names that IFEval gives
them, written from the paper's definitions. Departures from its program, all on purpose:

- sentences end at `.`, `!`, `?` and their wide forms, by a rule instead of nltk's Punkt model (an abbreviation may count
  as an end). Lines do not end sentences, so that a title, a greeting or a stanza is none;
- words in capitals are found by a rule instead of nltk's tokenizer: `DON'T` is one, and `NASA's` is one;
- a language is told by its script first, and by py3langid among languages of the same script, instead of langdetect,
  whose guesses differ from run to run. A text that is too short to tell, or may be in either of two languages, follows;
- text in capitals is lower-cased before its language is told;
- `***so***` is one highlighted section, and the star of a bullet is none; a rule (`---`) is no bullet; `[]` is no
  placeholder; a marker of a postscript needs a text, and P.P.S. is no P.S.; marks of Markdown and brackets around the
  first word of a paragraph are left aside, and a blank line may have spaces;
- a word has its vowel signs, as in the program with nltk 3.10, and what joins emoji is none;
- keywords and the names of sections are texts, not patterns: `a.b` is not `axb`;
- a sign, such as `#`, may be the letter that is counted, for which the program counts a random one.

tests/unit/judges/verify/test_ifeval_official.py holds all of this against lm-eval's program.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from iterdpo.errors import JudgeError
from iterdpo.judging.judge import JudgeBase
from iterdpo.types import CompletionGroup, Judgment
from judges.base import Abstention, judgment_from_outcomes, nearest


@dataclass(eq=False, repr=False, kw_only=True)
class Instructions(JudgeBase):
    """1 if a completion follows all of its prompt's instructions, else 0; or the share that it follows.

    Abstentions: a prompt without the columns, an unknown instruction, and arguments that do not fit it. Each judgment's
    `details["followed"]` has for each completion the instructions that it follows.
    """

    name = "instructions"
    needs_device = False
    column: str = "instruction_id_list"
    """The prompt's column with the list of instructions."""
    kwargs_column: str = "kwargs"
    """The one with the list of their arguments."""
    strict: bool = True
    """Check the completion as it is. Otherwise, as the paper's loose accuracy does, an instruction counts as followed
    if it holds with or without the first line, the last line, and asterisks."""
    partial: bool = False
    """Give the share of instructions that are followed."""

    @classmethod
    def key(cls, **args: Any) -> Any:
        return [3, super().key(**args)]  # the first is raised if the same arguments give other scores than before

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        return [self._judge_one(group) for group in groups]

    def _judge_one(self, group: CompletionGroup) -> Judgment:
        asked = self._asked(group.prompt.columns)
        if isinstance(asked, Abstention):
            return judgment_from_outcomes(group, [asked] * len(group.completions))
        followed = [[name for name, arguments in asked if follows(c.text, name, arguments, strict=self.strict)]
                    for c in group.completions]  # fmt: skip
        shares = [len(kept) / len(asked) for kept in followed]
        judgment = judgment_from_outcomes(group, shares if self.partial else [float(share == 1) for share in shares])
        judgment.details["followed"] = followed
        return judgment

    def _asked(self, columns: dict[str, Any]) -> list[tuple[str, dict[str, Any]]] | Abstention:
        names = columns.get(self.column)
        if not names:
            missing = "empty" if self.column in columns else "missing"
            return Abstention(f"the prompt's column {self.column!r} is {missing}")
        given = columns.get(self.kwargs_column) or [{}] * len(names)
        if not isinstance(names, list) or not isinstance(given, list) or len(given) != len(names):
            both = f"{self.column!r} and {self.kwargs_column!r}"
            return Abstention(f"the columns {both} are not lists of the same length")
        try:
            return [(name, check_instruction(name, own or {})) for name, own in zip(names, given, strict=True)]
        except JudgeError as error:
            return Abstention(str(error))


def follows(completion: str, name: str, arguments: dict[str, Any], *, strict: bool = True) -> bool:
    """Whether `completion` follows one instruction.

    Raises:
        JudgeError: what `check_instruction` finds; py3langid is needed, and not installed.
    """
    arguments = check_instruction(name, arguments)
    variants = [completion] if strict else loose_variants(completion)
    return any(bool(text.strip()) and CHECKS[name](text, **arguments) for text in variants)


def check_instruction(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the instruction takes, out of a row that may have those of all instructions.

    Raises:
        JudgeError: no such instruction, or an argument that is missing or of the wrong kind.
    """
    if name not in CHECKS:
        raise JudgeError(f"unknown instruction {name!r}; {nearest(str(name), CHECKS, 'there are')}")
    own = {}
    for parameter in list(inspect.signature(CHECKS[name]).parameters.values())[1:]:
        value = arguments.get(parameter.name)
        if value is None:
            if parameter.default is parameter.empty:
                raise JudgeError(f"instruction {name!r} lacks its argument {parameter.name!r}")
            continue
        if parameter.name.endswith("relation"):
            kind, fits = "'at least' or 'less than'", value in ("at least", "less than")
        elif parameter.name in ("keywords", "forbidden_words"):
            kind = "a list of texts"
            fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
        elif parameter.name.startswith(("num_", "nth_")) or parameter.name.endswith("frequency"):
            kind, fits = "a whole number", isinstance(value, int | float) and value == int(value)
        else:
            kind, fits = "a text", isinstance(value, str) and value != ""
        if not fits:
            raise JudgeError(f"instruction {name!r}: {parameter.name} must be {kind}")
        own[parameter.name] = int(value) if kind == "a whole number" else value
    return own


def loose_variants(completion: str) -> Iterator[str]:
    """The eight readings of the paper's loose accuracy (section 2.2), the completion itself first."""
    lines = completion.split("\n")
    for asterisks, first, last in itertools.product((True, False), (0, 1), (0, 1)):
        text = "\n".join(lines[first : len(lines) - last]).strip()
        yield text if asterisks else text.replace("*", "")


def _compare(count: int, relation: str, wanted: int) -> bool:
    return count >= wanted if relation == "at least" else count < wanted


def _parts(text: str, divider: str) -> list[str]:
    """The text's parts between dividers; a divider may open or close the text."""
    parts = [part.strip() for part in re.split(divider, text)]
    parts = parts if parts[0] else parts[1:]
    return parts[:-1] if parts and not parts[-1] else parts


def _nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly so many paragraphs, divided by blank lines, and the n-th (from 1) begins with the word."""
    parts = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    first = FIRST_WORD.search(parts[nth_paragraph - 1])
    if first is None:
        return False
    word = first[0].rstrip("'’-").lower()
    return first_word.strip().lower() in (word, re.split("['’]", word)[0])  # `it's` begins with `it`, too


FIRST_WORD = re.compile(r"[^\W_][^\s.,;:!?\"“”*_`()\[\]{}<>|/…—、。，：；！？「」।]*")


def _postscript(text: str, postscript_marker: str) -> bool:
    """A line, or a sentence, that begins with the marker; letters of P.S. and P.P.S may be spaced."""
    marker = postscript_marker.strip()
    letters = marker.rstrip(".").split(".")
    if {"".join(letters).upper()} <= {"PS", "PPS"} and len(letters) > 1:
        pattern = r"(?<!\w)(?<!p\.)(?<!p\. )" + r"\.\s?".join(re.escape(letter.strip()) for letter in letters)
        end = r"\." if marker.endswith(".") else r"\b\.?"
        return re.search(rf"{pattern}{end}[^\w]*\S", text, re.IGNORECASE) is not None
    return re.search(rf"(?<!\w){re.escape(postscript_marker.strip())}", text, re.IGNORECASE) is not None


def _json_format(text: str) -> bool:
    text = re.sub(r"\A```(?:json)?\s*|\s*```\Z", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


HIGHLIGHTS = re.compile(r"\*\*([^*\n]+)\*\*|\*([^*\n]+)\*")
BULLETS = re.compile(r"^[ \t]*\*[ \t]+", re.MULTILINE)

CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": lambda text, keywords: all(keyword.lower() in text.lower() for keyword in keywords),
    "keywords:frequency": lambda text, keyword, frequency, relation="at least": _compare(
        text.lower().count(keyword.lower()), relation, frequency
    ),
    "keywords:forbidden_words": lambda text, forbidden_words: (
        not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in forbidden_words)
    ),
    "keywords:letter_frequency": lambda text, letter, let_frequency, let_relation="at least": _compare(
        text.lower().count(letter.lower()), let_relation, let_frequency
    ),
    "language:response_language": lambda text, language: may_be_in(text, language.lower().split("-")[0]),
    "length_constraints:number_sentences": lambda text, num_sentences, relation="at least": _compare(
        count_sentences(text), relation, num_sentences
    ),
    "length_constraints:number_paragraphs": lambda text, num_paragraphs: (  # divided by `***`, none of them empty
        all(parts := _parts(text, r"\s?\*\*\*\s?")) and len(parts) == num_paragraphs
    ),
    "length_constraints:number_words": lambda text, num_words, relation="at least": _compare(
        count_words(text), relation, num_words
    ),
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        len(re.findall(r"\[[^\[\]\n]+\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": lambda text, num_bullets: (  # lines that begin with `* ` or `- `, exactly
        len(re.findall(r"^\s*(?:\*(?!\*)|-(?!-))\s*\S", text, re.MULTILINE)) == num_bullets
    ),
    "detectable_format:constrained_response": lambda text: bool(re.search(r"My answer is (yes|no|maybe)\.", text)),
    "detectable_format:number_highlighted_sections": lambda text, num_highlights: (  # `*so*` or `**so**` within a line
        sum(bool((a or b).strip()) for a, b in HIGHLIGHTS.findall(BULLETS.sub("", text))) >= num_highlights
    ),
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections: (  # `SECTION 1`, `SECTION 2`, ...
        len(re.findall(rf"(?<!\w){re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections
    ),
    "detectable_format:json_format": _json_format,
    "detectable_format:title": lambda text: any(title.strip("<> ") for title in re.findall(r"<<[^\n]+?>>", text)),
    "combination:two_responses": lambda text: (  # different ones, divided by six asterisks
        all(parts := _parts(text, r"\*{6}")) and len(parts) == 2 and parts[0] != parts[1]
    ),
    "combination:repeat_prompt": lambda text, prompt_to_repeat: (
        text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "startend:end_checker": lambda text, end_phrase: (
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    ),
    "startend:quotation": lambda text: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
    "change_case:capital_word_frequency": lambda text, capital_frequency, capital_relation="at least": _compare(
        sum(
            word.isupper() for word in re.findall(r"(?<!['’])(?<![^\W_])[^\W_]+(?:[-./&+][^\W_]+)*", text)
        ),  # `I` and `A` count
        capital_relation,
        capital_frequency,
    ),
    "change_case:english_capital": lambda text: text.isupper() and may_be_in(text.lower(), "en"),
    "change_case:english_lowercase": lambda text: text.islower() and may_be_in(text, "en"),
    "punctuation:no_comma": lambda text: "," not in text,
}


def count_words(text: str) -> int:
    """Stretches of letters with their marks, digits and underscores."""
    import regex

    return len(regex.findall(r"[\p{L}\p{Nd}\p{Nl}\p{Pc}][\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\u200c\u200d]*", text))


ABBREVIATIONS = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Inc|Ltd|Co|vs|etc|No|Fig|e\.g|i\.e|a\.m|p\.m|U\.S|U\.K|Ph\.D|[A-Z])\.(?=\s+\S)"
)


def count_sentences(text: str) -> int:
    """Stretches that end in `.`, `!`, `?` or their wide forms, before white space; the rest of the text is one, too."""
    text = ABBREVIATIONS.sub(lambda match: match[0].replace(".", ""), text)
    parts = re.split(r"(?:[.!?…]+[\"'”’)\]*]*(?=\s|\Z))|[。！？]+", text)
    return sum(any(c.isalnum() for c in part) for part in parts)


SCRIPTS = {  # Unicode's, with the languages that are told apart within it
    "Latin": "af ca cs cy da de en es et fi fr hr hu id it lt lv nl no pl pt ro sk sl so sq sv sw tl tr vi",
    "Cyrillic": "bg mk ru uk",
    "Arabic": "ar fa ur",
    "Devanagari": "hi mr ne",
    "Han": "zh ja",
    "Hiragana": "ja", "Katakana": "ja", "Hangul": "ko", "Bengali": "bn", "Gujarati": "gu", "Gurmukhi": "pa",
    "Kannada": "kn", "Malayalam": "ml", "Tamil": "ta", "Telugu": "te", "Thai": "th", "Hebrew": "he", "Greek": "el",
}  # fmt: skip
ENOUGH_LETTERS = 16
LIKELY = 0.1
"""A language may be that of a text if it is so likely compared with the likeliest one."""


def may_be_in(text: str, language: str) -> bool:
    """Whether a text is in a language (ISO 639-1), or may be: it is in its script, and does not tell it from another.

    Raises:
        JudgeError: py3langid is needed, and not installed.
    """
    import regex

    counts = {script: len(regex.findall(rf"\p{{{script}}}", text)) for script in SCRIPTS}
    script = max(counts, key=lambda name: counts[name])
    if not counts[script]:
        return True  # neither a letter, nor a failure
    if counts["Hiragana"] + counts["Katakana"] > 0.1 * counts["Han"] and script == "Han":
        script = "Hiragana"
    languages = SCRIPTS[script].split()
    if language not in languages:
        known = any(language in others.split() for others in SCRIPTS.values())
        return not known and _likely(text, (), language)
    if len(languages) == 1 or script == "Han":
        return language == languages[0]
    return counts[script] < ENOUGH_LETTERS or _likely(text, tuple(languages), language)


def _likely(text: str, among: tuple[str, ...], language: str) -> bool:
    shares = dict(_identifier(among).rank(text))
    return bool(shares.get(language, 0.0) >= LIKELY * max(shares.values()))


@functools.cache
def _identifier(among: tuple[str, ...]) -> Any:
    """py3langid's model, for some of its languages, or for all."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        need = "instructions about a language need the package py3langid: pip install py3langid"
        raise JudgeError(f"judge 'instructions': {need}") from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if among:
        identifier.set_languages([language for language in among if language in identifier.nb_classes])
    return identifier
