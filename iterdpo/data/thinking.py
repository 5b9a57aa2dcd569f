"""A thinking model's completion as two parts: the reasoning, and the answer after it.

The tags around a thought are those that the checkpoint's chat template writes (`find_tags`), or the configuration's. The
last tag of a completion decides: if it opens a thought, the thought is unfinished, and there is no answer; if it closes
one, the answer is what follows it, as chat templates that take a thought out of a text have it. So thoughts within
thoughts, and a tag that is missing or doubled, need no rule of their own. A completion without a tag is an answer, unless
its prompt opens the thought, as the templates of DeepSeek-R1 and Qwen3-Thinking do.

vLLM's own reasoning parsers are not used: each is chosen by a name, not by the template, reads a server's request, does
not say where the answer's tokens begin, and needs vLLM imported, which takes seconds and a device.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from iterdpo.data.rendering import decoded, template_sources, turn_ends
from iterdpo.types import Completion

NAMED = re.compile(r"</((?:\w+[:|])?(?:think|thinking|thought|reasoning)(?:[:_]\w+)?)>")
"""The closing tag of `<think>`, `<seed:think>`, `<mm:think>`, `<ifm|think>`, `<thought>`, `<think:opensource>`."""
OTHERS = (
    ("[THINK]", "[/THINK]"),  # Mistral
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|channel>", "<channel|>"),  # Gemma 4
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),  # Kimi K3
    ("◁think▷", "◁/think▷"),  # Kimi-VL
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # Sky-T1, OpenThinker
)
WINDOW = 64  # tokens at a completion's end that are searched first for a tag of several tokens
PROMPT_END = 64  # tokens in which an opening tag at a prompt's end lies, even byte by byte


@dataclass(frozen=True, slots=True)
class Tags:
    """What stands before and after a thought: `Tags("<think>", "</think>")`."""

    start: str
    end: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def find_tags(tokenizer: Any) -> Tags | None:
    """The tags that the tokenizer's chat template writes around a thought; None if it knows none."""
    for source in template_sources(tokenizer):
        if found := NAMED.search(source):
            return Tags(f"<{found[1]}>", found[0])
        for start, end in OTHERS:
            if start in source and end in source:
                return Tags(start, end)
    return None


class Thinking:
    """Splits the completions of a model whose thoughts stand between `tags`."""

    def __init__(self, tokenizer: Any, tags: Tags) -> None:
        self.tags = tags
        self._tokenizer = tokenizer  # not used here: processes that tokenize are forked from this one

    @cached_property
    def _ends(self) -> frozenset[int]:
        return turn_ends(self._tokenizer)

    @cached_property
    def _own(self) -> list[int | None] | None:
        """The tokens that the two tags are; None if one of them is written with several."""
        own = [_own_token(self._tokenizer, tag) for tag in (self.tags.start, self.tags.end)]
        return None if None in own else own

    def split(self, prompt_ids: Sequence[int], completion: Completion) -> Completion:
        """The completion in its parts. Its token ids stay as they are."""
        ids = completion.token_ids
        tag, cut = self._last_tag(ids)
        if tag == self.tags.end:
            before = decoded(self._tokenizer, ids[:cut])
            closed = before.rfind(self.tags.end) + len(self.tags.end)  # a token may go on after the tag
            text = before[closed:] + decoded(self._tokenizer, self._spoken(completion)[cut:], special=False)
            blank = text[: len(text) - len(text.lstrip())]
            if blank != text:  # a first line may be indented
                blank = blank[: blank.rfind("\n") + 1] or blank
            reasoning, text = before[:closed] + blank, text[len(blank) :]
            return replace(completion, text=text, reasoning=reasoning, reasoning_tokens=cut)
        if tag == self.tags.start or self.opens(prompt_ids):
            thought = decoded(self._tokenizer, self._spoken(completion))
            return replace(completion, text="", reasoning=thought, reasoning_tokens=len(ids), finish_reason="thought")
        return replace(completion, reasoning="")

    def opens(self, prompt_ids: Sequence[int]) -> bool:
        """Whether the prompt ends within a thought, which the completion then continues."""
        return decoded(self._tokenizer, prompt_ids[-PROMPT_END:]).rstrip().endswith(self.tags.start)

    def _spoken(self, completion: Completion) -> Sequence[int]:
        """The ids without the end token."""
        ids = completion.token_ids
        ended = completion.finish_reason == "stop" and ids and ids[-1] in self._ends
        return ids[:-1] if ended else ids

    def _last_tag(self, ids: Sequence[int]) -> tuple[str | None, int]:
        """The last of the two tags, and how many tokens it is until it ends; (None, 0) without any."""
        if self._own is not None:
            for place in reversed(range(len(ids))):
                if ids[place] in self._own:
                    return (self.tags.start if ids[place] == self._own[0] else self.tags.end), place + 1
            return None, 0
        size = WINDOW
        while True:  # answers are short: decoding all of a long thought again and again would take long
            window = ids[-size:]
            text = decoded(self._tokenizer, window)
            last = max((self.tags.start, self.tags.end), key=text.rfind)
            if count := text.count(last):
                break
            if size >= len(ids):
                return None, 0
            size *= 2
        few, enough = 0, len(window)  # the text of the first `few` ids has the tag less often
        while enough - few > 1:
            middle = (few + enough) // 2
            if decoded(self._tokenizer, window[:middle]).count(last) < count:
                few = middle
            else:
                enough = middle
        return last, len(ids) - len(window) + enough


def _own_token(tokenizer: Any, tag: str) -> int | None:
    """The id of the token that a tag is, if the tokenizer never writes it in any other way."""
    ids = tokenizer(tag, add_special_tokens=False).input_ids
    return int(ids[0]) if len(ids) == 1 and ids[0] in tokenizer.added_tokens_decoder else None
