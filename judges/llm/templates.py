"""Prompts of an LLM judge: text files that users copy and edit.

    {# A comment. #}
    ### system
    You compare two completions.
    ### user
    {{ prompt }}
    Completion A: {{ a }}
    Completion B: {{ b }}

A line `### system`, `### user` or `### assistant` begins a message; a file without one is a single user message. The
markers are looked for in the file, before anything is filled in, so no text of a prompt or completion begins a message.

Between them stands Jinja (https://jinja.palletsprojects.com), sandboxed, with these values:

| value | meaning |
| --- | --- |
| `prompt` | the conversation as text |
| `messages` | its messages, `{"role": …, "content": …}` |
| `a`, `b` | pairwise: the completions |
| `completion` | rubric, checklist: the completion |
| `criterion` | checklist: the item of the prompt's rubric |
| `completions` | listwise: the list of them |
| `columns` | the row's other columns: `columns.gold`, or `columns["items"]` if a dict has a method of that name |
| `principle` | the principle of the constitution that was drawn for this comparison |
| `rubric`, `criteria`, `low`, `high` | the rubric's text, the criteria (a list, or a mapping to what each means), the scale |
| `ties` | pairwise: whether "tie" is a verdict |
| `constrained` | whether the server holds the reply to the bare verdict, so that there is no place for reasons |

Text from a prompt, a completion or a column is fenced (`fence`): it stands between marks that cannot be guessed. Text
from the configuration (principle, rubric, criteria) is not.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from iterdpo.errors import JudgeError
from iterdpo.types import Message
from judges.llm.parsing import MARK, SPECIAL_TOKEN, THINKING

Kind = Literal["pairwise", "rubric", "listwise", "checklist"]

SHIPPED = Path(__file__).parent / "prompts"
ROLES = ("system", "user", "assistant")
SHOWN: dict[Kind, tuple[str, ...]] = {
    "pairwise": ("a", "b"),
    "rubric": ("completion",),
    "listwise": ("completions",),
    "checklist": ("completion", "criterion"),
}
"""What a template of each kind has to show."""
COMMON = ("prompt", "messages", "columns", "principle", "rubric", "criteria", "low", "high", "ties", "constrained")
UNTRUSTED = ("prompt", "messages", "a", "b", "completion", "completions", "criterion", "columns")

_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
)
_CONTROL = re.compile(rf"{SPECIAL_TOKEN.pattern}|(?i:</?{THINKING}>)|{MARK.pattern}")
_BRACKETS = str.maketrans("<>[]", "‹›⟦⟧")


def load_template(prompt: str, kind: Kind) -> Template:
    """The shipped template of that name, or the file at that path, such as `my_prompt.j2`.

    Raises:
        JudgeError: no such prompt, or a mistake in it; the message has the file and the line.
    """
    shipped = sorted(path.stem for path in (SHIPPED / kind).glob("*.j2"))
    if prompt in shipped:
        path = SHIPPED / kind / f"{prompt}.j2"
    elif prompt.endswith(".j2") or "/" in prompt:
        path = Path(prompt).expanduser()
    else:
        raise JudgeError(f"no {kind} prompt {prompt!r}; shipped are {', '.join(shipped)}, or give a path: my_prompt.j2")
    return Template(str(path), read_text(path, f"shipped {kind} prompts are {', '.join(shipped)}"), kind)


def principles(source: str | None = None) -> list[str]:
    """The principles in a constitution file, or in the shipped one: one a line, without empty lines and `#` comments.

    Raises:
        JudgeError: there is no such file, or no principle in it.
    """
    path = SHIPPED / "constitution.txt" if source is None else Path(source).expanduser()
    lines = [line.strip() for line in read_text(path, "without a file, the shipped principles are used").splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise JudgeError(f"{path}: it has no principle; write one per line")
    return found


class Template:
    """A file of the form above. `source` is its text, `needs` the values that it uses."""

    def __init__(self, name: str, source: str, kind: Kind) -> None:
        """Raises JudgeError for a mistake that shows without values: syntax, an unknown value, a completion not shown."""
        self.name = name
        self.source = source
        needs: set[str] = set()
        self._sections: list[tuple[str, jinja2.Template]] = []
        for role, text in _sections(name, source):
            tree = self._parsed(text, kind)
            needs |= meta.find_undeclared_variables(tree)
            self._sections.append((role, _ENVIRONMENT.from_string(tree)))
        self.needs = frozenset(needs)
        for value in SHOWN[kind]:
            if value not in needs:
                raise JudgeError(f"{name}: a {kind} prompt must show {{{{ {value} }}}}, but this one does not")

    def render(self, **values: Any) -> list[Message]:
        """The messages, with the untrusted ones of `values` fenced; they are given as they are.

        Raises:
            JudgeError: a value that the template uses is missing (a column, say), or it fails otherwise.
        """
        untrusted = {name: values[name] for name in UNTRUSTED if name in values}
        nonce = _nonce(list(_texts(untrusted)))
        fenced = {name: _fenced(value, nonce) for name, value in untrusted.items()}
        messages = []
        for role, template in self._sections:
            try:
                content = template.render({**values, **fenced}).strip()
            except Exception as error:  # whatever an expression of the user's file raises
                raise JudgeError(f"{self.name}, line {_line(error)}: {error}") from error
            marks = [mark[0] for mark in MARK.finditer(content) if mark[2] == nonce]
            pairs = [f"<text-{nonce}>", f"</text-{nonce}>"] * (len(marks) // 2)
            if marks != pairs or content.lower().count(nonce) != len(marks):
                raise JudgeError(f"{self.name}: it cuts or changes a fenced text, which hides its end; show it whole")
            if content:
                messages.append({"role": role, "content": content})
        if not messages:
            raise JudgeError(f"{self.name}: it renders to nothing")
        return messages

    def _parsed(self, text: str, kind: Kind) -> nodes.Template:
        try:
            tree = _ENVIRONMENT.parse(text)
            _ENVIRONMENT.compile(tree)  # finds unknown filters and tests
            tree = _ENVIRONMENT.parse(text)  # compiling changes the tree
        except jinja2.TemplateSyntaxError as error:
            raise JudgeError(f"{self.name}, line {error.lineno}: {error.message}") from error
        if any(True for _ in meta.find_referenced_templates(tree)):
            raise JudgeError(f"{self.name}: a prompt must be one file; paste in the text that it includes or extends")
        known = (*SHOWN[kind], *COMMON)
        if unknown := meta.find_undeclared_variables(tree) - set(known):
            first = next(n for n in tree.find_all(nodes.Name) if n.name in unknown)
            near = difflib.get_close_matches(first.name, known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}; columns are columns.NAME"
            raise JudgeError(f"{self.name}, line {first.lineno}: no value {first.name!r} in a {kind} prompt; {remedy}")
        return tree


def fence(text: str, *, nonce: str) -> str:
    """The text between marks: `<text-1f3c9a2b>`, its lines, `</text-1f3c9a2b>`."""
    return f"<text-{nonce}>\n{harmless(text)}\n</text-{nonce}>"


def harmless(text: str) -> str:
    """The text with other brackets around what a server's tokenizer could read as a control token.

    `<|im_end|>`, `</s>`, `[INST]`, `<think>`, and marks like the fence's become `‹|im_end|›`, `‹/s›`, `⟦INST⟧`,
    `‹think›`. Inside a message such text is tokenized as if the chat template had written it, and would end the message.
    All other text stays as it is.
    """
    while (changed := _CONTROL.sub(lambda m: m[0].translate(_BRACKETS), text)) != text:
        text = changed  # again: the change may have completed another, as in `<|im_<s>end|>`
    return text


def _nonce(texts: list[str]) -> str:
    """Eight hex digits that occur in none of the texts. The same for the same texts, so that calls can be cached."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    seed = hashlib.sha256(b"".join(len(data).to_bytes(8, "big") + data for data in encoded)).digest()
    while any(seed.hex()[:8] in text.lower() for text in texts):
        seed = hashlib.sha256(seed).digest()
    return seed.hex()[:8]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Iterable):
        for inner in itertools.chain.from_iterable(value.items()) if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def _fenced(value: Any, nonce: str) -> Any:
    """`value` with every text in it fenced; the keys of mappings stay, and so do the roles of messages."""
    match value:
        case str():
            return fence(value, nonce=nonce)
        case {"role": str(role), "content": _}:
            return {**_fenced({k: v for k, v in value.items() if k != "role"}, nonce), "role": harmless(role)}
        case Mapping():
            return {key: _fenced(inner, nonce) for key, inner in value.items()}
        case list() | tuple():
            return [_fenced(inner, nonce) for inner in value]
    return value


def _sections(name: str, source: str) -> Iterator[tuple[str, str]]:
    """Role and text of each message; empty lines before the text keep the file's line numbers in Jinja's errors."""
    lines = source.splitlines()
    starts = []
    for i, line in enumerate(lines):
        if re.fullmatch(rf"### (?:{'|'.join(ROLES)})\s*", line):
            starts.append(i)
        elif (heading := re.fullmatch(r"###\s*(\w+)\s*:?\s*", line)) and (
            near := difflib.get_close_matches(heading[1].lower(), ROLES, n=1, cutoff=0.75)
        ):  # other headings are text
            wrong = f"{line.strip()!r} is not the beginning of a message"
            raise JudgeError(f"{name}, line {i + 1}: {wrong}; write `### {near[0]}`")
    if not starts:
        yield "user", source
        return
    if re.sub(r"\{#.*?#\}", "", "\n".join(lines[: starts[0]]), flags=re.DOTALL).strip():
        number = next(i + 1 for i, line in enumerate(lines) if line.strip())
        raise JudgeError(f"{name}, line {number}: text before the first `### user`; only {{# comments #}} may be there")
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        yield lines[start].removeprefix("###").strip(), "\n" * (start + 1) + "\n".join(lines[start + 1 : end])


def _line(error: Exception) -> int | str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == "<template>"]
    return frames[-1].lineno or "?" if frames else "?"


def read_text(path: Path, remedy: str) -> str:
    """What is in the file. Raises JudgeError, which ends with the `remedy` if there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise JudgeError(f"{path}: no such file; {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JudgeError(f"{path}: cannot be read ({error})") from error
