"""Finding secrets in a configuration, which is written into the run directory and shown in the report."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

WHOSE = (
    r"(hf|hub|hugging_?face|open_?ai|anthropic|claude|azure|aws|gcp|google|gemini|vertex|mistral|cohere|groq|deep_?seek|together"
    r"|fireworks|open_?router|replicate|nvidia|ngc|wandb|comet|mlflow|neptune|clearml|kaggle|modal|runpod|github|gitlab|gitea"
    r"|bitbucket|slack|discord|telegram|bot|npm|pypi|docker|registry|vault|cloud|x)"
)
NAMES = re.compile(
    r"(passwords?|passwd|passphrases?|secrets?|credentials?|api_?keys?|access_?tokens?|auth_?tokens?)$"
    rf"|(^|_)({WHOSE}_?(keys?|tokens?|pat)"
    r"|(access|private|secret|signing|encryption|account|subscription|auth|license|master|ssh|service|shared|storage|deploy"
    r"|storage_?account)_?keys?"
    r"|(authentication|authorization|api|bearer|refresh|session|id|user|login|oauth2?|jwt|personal|deploy|read|write|sas|csrf"
    r"|xsrf|admin|service|client|app|device|web_?hook|security)_?tokens?"
    r"|(user|db|database|login|smtp|proxy|admin|root)_?pass|pwd|authorization|cookies?|bearer|connection_?string|dsn"
    r"|access_key_id|pat"
    r")$"
)
"""Names of keys in small letters, with _ between their words."""
PERHAPS = re.compile(r"(key|token|auth|pass|signature|sig)s?$")
RANDOM = re.compile(r"(?=[^a-z]*[a-z])(?=[^A-Z]*[A-Z])(?=\D*\d)[\w.+/=~-]{16,}|(?=\D*\d)[0-9a-f-]{32,}")
"""What a secret looks like whose name only may be one, as with `my_key`."""
ALONE = {"token", "tokens", "apikey", "auth"}
VALUES = re.compile(
    r"\b(sk|pk|rk)[-_][A-Za-z0-9_-]{16,}|\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bglpat-[\w-]{16,}|\bxox[abprs]-[\w-]{10,}|\b(AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{30,}|\bya29\.[\w-]{20,}"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}|-----BEGIN [A-Z ]*PRIVATE KEY|\b(?:Bearer|Basic) [\w+/.=-]{16,}"
    r"|\bnpm_[A-Za-z0-9]{30,}|\bpypi-[\w-]{30,}|\bgsk_[A-Za-z0-9]{20,}|\br8_[A-Za-z0-9]{20,}|://[^/\s:@]+:[^/\s@]+@"
    r"|://\S*[?&](?i:x-amz-signature|x-goog-signature|signature|sig|access_token|token|api_?key)=[^&\s]"
)
"""The forms in which services write their keys, and a URL with a password or a signature."""


def secret_in(values: dict[str, Any]) -> str | None:
    """The dotted key of a text that has the name of a secret, or the form of one; None if there is none."""
    for key, value in _texts(values, ""):
        name = _words(key)
        named = name in ALONE or NAMES.search(name)
        random = PERHAPS.search(name) and RANDOM.fullmatch(value)
        if (named and value.strip()) or random or VALUES.search(value):
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


def _words(key: str) -> str:
    """The last part of a dotted key in one spelling: `x_api_key`, of apiKey or X-API-Key."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key.rpartition(".")[2])
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
