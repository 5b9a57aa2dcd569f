"""Whether a completion follows instructions that a program can check, in IFEval's vocabulary (arXiv:2311.07911).

The prompt's columns are IFEval's: `instruction_id_list` names the instructions, `kwargs` has for each of them its
arguments, in which keys that are null or unknown to the instruction are ignored.

    {"instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
     "kwargs": [{}, {"relation": "at least", "num_words": 300}]}

`CHECKS` has the 25 instructions as pure functions of the completion and their arguments, written from the paper's
definitions. Departures from its program: sentences are split by a rule instead of nltk's Punkt model (an abbreviation
may count as an end), words in capitals are counted by a rule instead of nltk's tokenizer, and languages are told apart
by py3langid instead of langdetect, whose guesses differ from run to run.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from iterdpo.errors import JudgeError
from iterdpo.judging.judge import JudgeBase
from iterdpo.types import CompletionGroup, Judgment
from judges.base import Abstention, judgment_from_outcomes, nearest

Relation = Literal["at least", "less than"]


class Instructions(JudgeBase):
    """1 if a completion follows all of its prompt's instructions, else 0; or the share that it follows.

    Abstentions: a prompt without the columns, an unknown instruction, and arguments that do not fit it. Each judgment's
    `details["followed"]` has for each completion the instructions that it follows.

    Args:
        column: the prompt's column with the list of instructions.
        kwargs_column: the one with the list of their arguments.
        strict: check the completion as it is. Otherwise, as the paper's loose accuracy does, an instruction counts as
            followed if it holds with or without the first line, the last line, and asterisks.
        partial: give the share of instructions that are followed.
    """

    needs_device = False

    def __init__(
        self,
        *,
        column: str = "instruction_id_list",
        kwargs_column: str = "kwargs",
        strict: bool = True,
        partial: bool = False,
    ) -> None:
        self.name = "instructions"
        self.column, self.kwargs_column, self.strict, self.partial = column, kwargs_column, strict, partial

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        return [self._judge_one(group) for group in groups]

    def _judge_one(self, group: CompletionGroup) -> Judgment:
        asked = self._asked(group.prompt.columns)
        if isinstance(asked, Abstention):
            return judgment_from_outcomes(group, [asked] * len(group.completions))
        scores, followed = [], []
        for completion in group.completions:
            kept = [name for name, arguments in asked if follows(completion.text, name, arguments, strict=self.strict)]
            followed.append(kept)
            scores.append(len(kept) / len(asked) if self.partial else float(len(kept) == len(asked)))
        judgment = judgment_from_outcomes(group, scores)
        judgment.details["followed"] = followed
        return judgment

    def _asked(self, columns: dict[str, Any]) -> list[tuple[str, dict[str, Any]]] | Abstention:
        """The instructions with their arguments, or why they cannot be checked."""
        names = columns.get(self.column)
        if not names:
            return Abstention(
                f"the prompt's column {self.column!r} is {'empty' if self.column in columns else 'missing'}"
            )
        given = columns.get(self.kwargs_column) or [{}] * len(names)
        if not isinstance(names, list) or not isinstance(given, list) or len(given) != len(names):
            return Abstention(
                f"the columns {self.column!r} and {self.kwargs_column!r} are not lists of the same length"
            )
        asked = []
        for name, arguments in zip(names, given, strict=True):
            try:
                asked.append((name, check_instruction(name, arguments or {})))
            except JudgeError as error:
                return Abstention(str(error))
        return asked


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
        match str(parameter.annotation):
            case "int":
                fits = isinstance(value, int | float) and value == int(value)
            case "Relation":
                fits = value in ("at least", "less than")
            case "list[str]":
                fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
            case _:
                fits = isinstance(value, str) and value != ""
        if not fits:
            raise JudgeError(f"instruction {name!r}: {parameter.name} must be {KINDS[str(parameter.annotation)]}")
        own[parameter.name] = int(value) if str(parameter.annotation) == "int" else value
    return own


KINDS = {
    "int": "a whole number",
    "Relation": "'at least' or 'less than'",
    "list[str]": "a list of texts",
    "str": "a text",
}


def loose_variants(completion: str) -> Iterator[str]:
    """The eight readings of the paper's loose accuracy (section 2.2), the completion itself first."""
    lines = completion.split("\n")
    for asterisks, (first, last) in itertools.product((True, False), itertools.product((0, 1), (0, 1))):
        text = "\n".join(lines[first : len(lines) - last]).strip()
        yield text if asterisks else text.replace("*", "")


def _compare(count: int, relation: Relation, wanted: int) -> bool:
    return count >= wanted if relation == "at least" else count < wanted


def _existence(text: str, keywords: list[str]) -> bool:
    return all(keyword.lower() in text.lower() for keyword in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: Relation = "at least") -> bool:
    return _compare(text.lower().count(keyword.lower()), relation, frequency)


def _forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in forbidden_words)


def _letter_frequency(text: str, letter: str, let_frequency: int, let_relation: Relation = "at least") -> bool:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def _response_language(text: str, language: str) -> bool:
    return _language(text) == language.lower().split("-")[0]


def _number_sentences(text: str, num_sentences: int, relation: Relation = "at least") -> bool:
    return _compare(count_sentences(text), relation, num_sentences)


def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs divided by `***`; a divider may open or close the text, but not stand beside another."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    parts = parts[1:] if not parts[0] else parts
    parts = parts[:-1] if parts and not parts[-1] else parts
    return all(parts) and len(parts) == num_paragraphs


def _number_words(text: str, num_words: int, relation: Relation = "at least") -> bool:
    return _compare(len(re.findall(r"\w+", text)), relation, num_words)


def _nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly so many paragraphs, divided by blank lines, and the n-th (from 1) begins with the word."""
    parts = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    first = re.search(r"[\w'’-]*\w", parts[nth_paragraph - 1])
    return first is not None and first[0].lstrip("'’-").lower() == first_word.strip().lower()


def _number_placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]+\]", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    """A line, or a sentence, that begins with the marker; letters of P.S. and P.P.S may be spaced."""
    letters = postscript_marker.strip().rstrip(".").split(".")
    if {"".join(letters).upper()} <= {"PS", "PPS"} and len(letters) > 1:
        pattern = r"(?<!\w)(?<!p\.)(?<!p\. )" + r"\.\s?".join(re.escape(letter.strip()) for letter in letters)
        return re.search(rf"{pattern}\b\.?[^\w]*\S", text, re.IGNORECASE) is not None
    return re.search(rf"(?<!\w){re.escape(postscript_marker.strip())}", text, re.IGNORECASE) is not None


def _number_bullet_lists(text: str, num_bullets: int) -> bool:
    """Lines that begin with `* ` or `- `, exactly so many."""
    return len(re.findall(r"^\s*(?:\*(?!\*)|-(?!-))\s*\S", text, re.MULTILINE)) == num_bullets


def _constrained_response(text: str) -> bool:
    return any(option in text for option in ("My answer is yes.", "My answer is no.", "My answer is maybe."))


def _number_highlighted_sections(text: str, num_highlights: int) -> bool:
    """Spans `*so*` or `**so**` within a line."""
    spans = re.findall(r"\*\*([^*\n]+)\*\*|\*([^*\n]+)\*", text)
    return sum(bool((double or single).strip()) for double, single in spans) >= num_highlights


def _multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many of `SECTION 1`, `SECTION 2`, ..., by the splitter's name."""
    return len(re.findall(rf"(?<!\w){re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def _json_format(text: str) -> bool:
    text = re.sub(r"\A```(?:json)?\s*|\s*```\Z", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return any(title.strip("<> ") for title in re.findall(r"<<[^\n]+?>>", text))


def _two_responses(text: str) -> bool:
    """Two different answers divided by six asterisks."""
    parts = [part.strip() for part in text.split("******")]
    parts = parts[1:] if not parts[0] else parts
    parts = parts[:-1] if parts and not parts[-1] else parts
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end_checker(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _capital_word_frequency(text: str, capital_frequency: int, capital_relation: Relation = "at least") -> bool:
    """Words with all of their letters in capitals; `I` and `A` count."""
    words = re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)
    return _compare(sum(word.isupper() for word in words), capital_relation, capital_frequency)


def _english_capital(text: str) -> bool:
    return text.isupper() and _language(text.lower()) == "en"


def _english_lowercase(text: str) -> bool:
    return text.islower() and _language(text) == "en"


def _no_comma(text: str) -> bool:
    return "," not in text


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _response_language,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": _number_words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "detectable_content:number_placeholders": _number_placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _number_bullet_lists,
    "detectable_format:constrained_response": _constrained_response,
    "detectable_format:number_highlighted_sections": _number_highlighted_sections,
    "detectable_format:multiple_sections": _multiple_sections,
    "detectable_format:json_format": _json_format,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _end_checker,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_word_frequency,
    "change_case:english_capital": _english_capital,
    "change_case:english_lowercase": _english_lowercase,
    "punctuation:no_comma": _no_comma,
}

ABBREVIATIONS = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Inc|Ltd|Co|vs|etc|No|Fig|e\.g|i\.e|a\.m|p\.m|U\.S|U\.K|Ph\.D|[A-Z])\.(?=\s+\S)"
)


def count_sentences(text: str) -> int:
    """Stretches that end in `.`, `!`, `?` or their wide forms, before white space; the rest of the text is one, too."""
    text = ABBREVIATIONS.sub(lambda match: match[0].replace(".", ""), text)
    parts = re.split(r"(?:[.!?…]+[\"'”’)\]*]*(?=\s|\Z))|[。！？]+|\n\s*\n", text)
    return sum(any(c.isalnum() for c in part) for part in parts)


def _language(text: str) -> str:
    """The text's language, as an ISO 639-1 code."""
    try:
        from py3langid import classify
    except ImportError:
        raise JudgeError(
            "judge 'instructions': instructions about a language need the package py3langid: pip install py3langid"
        ) from None
    return str(classify(text)[0])
