"""Finding secrets in a configuration, which is written into the run directory and shown in the report."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

NAMES = re.compile(
    r"(^|_)("
    r"(api|access|private|secret|signing|encryption|account|subscription|auth|license|master|ssh|service)_?keys?"
    r"|(hf|hub|huggingface|access|auth|authentication|api|bearer|refresh|session|id|github|gitlab|openai|anthropic|wandb"
    r"|user|login|secret|oauth|jwt|personal|deploy|read|write)_?tokens?"
    r"|secrets?|passwords?|passwd|passphrase|pwd|credentials?|authorization|cookies?|bearer|connection_?string|dsn"
    r"|secret_access_key|pat"
    r")$"
)
"""Names of keys in small letters, with _ between their words."""
ALONE = {"token", "tokens", "apikey", "auth"}
VALUES = re.compile(
    r"\b(sk|pk|rk)[-_][A-Za-z0-9_-]{16,}|\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bglpat-[\w-]{16,}|\bxox[abprs]-[\w-]{10,}|\b(AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{30,}|\bya29\.[\w-]{20,}"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}|-----BEGIN [A-Z ]*PRIVATE KEY|\b(?:Bearer|Basic) [\w+/.=-]{16,}"
    r"|\bnpm_[A-Za-z0-9]{30,}|\bpypi-[\w-]{30,}|\bgsk_[A-Za-z0-9]{20,}|\br8_[A-Za-z0-9]{20,}|://[^/\s:@]+:[^/\s@]+@"
)
"""The forms in which services write their keys, and a URL with a password."""


def secret_in(values: dict[str, Any]) -> str | None:
    """The dotted key of a text that has the name of a secret, or the form of one; None if there is none."""
    for key, value in _texts(values, ""):
        if (_names_secret(key) and value.strip()) or VALUES.search(value):
            return key
    return None


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    match value:
        case dict():
            for name, item in value.items():
                yield from _texts(item, f"{key}.{name}" if key else str(name))
        case list() | tuple():
            for item in value:
                yield from _texts(item, key)
        case str():
            yield key, value


def _names_secret(key: str) -> bool:
    """Whether the last part of a dotted key, in any spelling (apiKey, X-API-Key), names a secret."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key.rpartition(".")[2])
    name = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return name in ALONE or NAMES.search(name) is not None
