"""lm-eval's program for IFEval, without the rest of lm-eval, and without what nltk would download."""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest

INSTALL = "uv pip install --no-deps lm-eval nltk langdetect immutabledict defusedxml"
ABBREVIATIONS = "mr mrs ms dr prof st jr sr inc ltd co vs etc e.g i.e a.m p.m u.s u.k ph.d no fig"


@functools.cache
def official_checks() -> dict[str, Any]:
    """Its classes by the instruction's name. The test is skipped if the packages are not installed.

    nltk's model of English sentences is a download; the same algorithm, with some abbreviations, stands in for it.
    """
    for package in ("lm_eval", "nltk", "langdetect", "immutabledict"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed, which only this test needs: {INSTALL}")
    import langdetect
    import nltk
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    nltk.download = lambda *_, **__: True
    langdetect.DetectorFactory.seed = 0
    (home,) = importlib.util.find_spec("lm_eval").submodule_search_locations  # type: ignore[union-attr, misc]
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval"):
        package_ = ModuleType(name)  # its own would import all of lm-eval
        package_.__path__ = [home + name.removeprefix("lm_eval").replace(".", "/")]
        sys.modules[name] = package_
    from lm_eval.tasks.ifeval import instructions_registry, instructions_util

    parameters = PunktParameters()
    parameters.abbrev_types |= set(ABBREVIATIONS.split())
    sentences = PunktSentenceTokenizer(parameters)
    instructions_util._get_sentence_tokenizer = lambda: sentences
    nltk.tokenize.sent_tokenize = lambda text, language="english": sentences.tokenize(text)
    return dict(instructions_registry.INSTRUCTION_DICT)


def official_verdict(checks: dict[str, Any], name: str, arguments: dict[str, Any], text: str) -> bool:
    check = checks[name](name)
    check.build_description(**arguments)
    return bool(text.strip()) and bool(check.check_following(text))
