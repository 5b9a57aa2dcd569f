"""Secrets in a configuration are refused by any usual name and form, and what only looks like one is not."""

from __future__ import annotations

from typing import Any

import pytest

from iterdpo.config import Config, parse_config
from iterdpo.errors import ConfigError
from iterdpo.secrets import secret_in

NAMES = (
    *(
        "api_key",
        "apikey",
        "apiKey",
        "API_KEY",
        "API-KEY",
        "X-API-Key",
        "openai_api_key",
        "OPENAI_API_KEY",
        "openaiApiKey",
    ),
    *("access_key", "aws_secret_access_key", "secret_key", "private_key", "privateKey", "ssh_key", "subscription-key"),
    *("token", "hf_token", "HF_TOKEN", "access_token", "accessToken", "auth_token", "bearer_token", "refresh_token"),
    *("session_token", "wandb_token", "github_token", "secret", "client_secret", "clientSecret", "secrets", "password"),
    *("PASSWORD", "db_password", "passwd", "pwd", "passphrase", "credential", "credentials", "Authorization", "auth"),
    *("cookie", "Set-Cookie", "connection_string", "bearer", "github_pat"),
    *(
        "slack_token",
        "SLACK_BOT_TOKEN",
        "azure_sas_token",
        "npm_token",
        "openai_key",
        "OPENAI_KEY",
        "hfToken",
        "x-token",
    ),
    *("PGPASSWORD", "dbpassword", "db_pass", "authtoken", "apikeys", "aws_access_key_id", "storageAccountKey"),
)
TEXTS = (
    *("sk-proj-abcdefghijklmnopqrstuv", "hf_abcdefghijklmnopqrstuvwx", "ghp_abcdefghijklmnopqrstuvwx"),
    *("github_pat_abcdefghijklmnopqrstuvwx", "glpat-abcdefghijklmnopqrst", "xoxb-123456789012-abcdef"),
    *("AKIAABCDEFGHIJKLMNOP", "AIzaabcdefghijklmnopqrstuvwxyz0123456", "eyJhbGciOiJI.eyJzdWIiOiIx.abcdefghijkl"),
    *("-----BEGIN RSA PRIVATE KEY-----", "Bearer abcdefghijklmnopqrst", "https://user:pass@example.org/v1"),
    "https://example.org/?key=sk-proj-abcdefghijklmnopqrstuv",
    "https://bucket.example.org/a.jsonl?X-Amz-Date=20260101T000000Z&X-Amz-Signature=0a1b",
    "https://account.example.org/data/a.jsonl?sp=r&sig=a%2Fb%3D",
)


@pytest.mark.parametrize("name", ["my_key", "key", "judgeToken", "x-sig"])
@pytest.mark.parametrize("text", ["f8Kq2LzT0vBnX7cYw3Ra", "5f1c0f9be7a24d0f8c6c3f3e4a0b9d21"])
def test_a_random_text_under_a_name_that_may_be_a_secrets_is_found(name: str, text: str) -> None:
    assert secret_in({"judge": {"args": {name: text}}}) == f"judge.args.{name}"


@pytest.mark.parametrize("name", NAMES)
def test_a_text_under_the_name_of_a_secret_is_found(name: str) -> None:
    assert secret_in({"judge": {"args": {"headers": [{name: "hunter2"}]}}}) == f"judge.args.headers.{name}"


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_in_the_form_of_a_secret_is_found_wherever_it_is(text: str) -> None:
    assert secret_in({"sampling": {"engine": {"extra": {"x": ["a", text]}}}}) == "sampling.engine.extra.x"


def test_a_configuration_with_a_secret_is_refused_and_the_secret_is_not_shown() -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml: judge\.args\.password looks like a secret") as caught:
        parse_config(Config, {"judge": {"args": {"password": "hunter2"}}}, source="run.yaml")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"api_key_env": "MY_KEY"},
        {"token_env": "HF_TOKEN"},
        {
            "max_tokens": "256",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "stop_tokens": ["</s>"],
            "image_token": "<image>",
        },
        {"tokens_per_micro_batch": 4096, "token": None, "password": "", "secret": " "},
        {
            "key": "gold",
            "keys": ["gold"],
            "keyword": "x",
            "author": "ann",
            "monkey": "x",
            "compat": "x",
            "path": "sk-1",
        },
        {"api_key": True, "hidden": 3},
        {
            "end_token": "<|im_end|>",
            "answer_token": " Yes",
            "judge_key": "question_v2_of_the_author",
            "prefix_key": "Column 12",
        },
        {"bypass": "x", "first_pass": "y", "pass": "PASS", "sort_key": "promptLengthInTokens"},
        {"base_url": "http://localhost:8000/v1", "model": "org/sk-8b-instruct", "use": "judge.py:basic"},
        {"path": "https://example.org/a.jsonl?download=true&design=signature", "url": "s3://bucket/sig=1/a.jsonl"},
    ],
)
def test_what_only_looks_like_a_secret_is_let_through(values: dict[str, Any]) -> None:
    assert secret_in(values) is None
