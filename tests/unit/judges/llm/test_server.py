"""The server's settings; tests/integration/test_judge_server.py starts one."""

from __future__ import annotations

from pathlib import Path

import pytest

from iterdpo.errors import JudgeError
from judges.llm.server import Server, ServerSettings


def test_a_setting_that_cannot_be_is_refused_by_its_name() -> None:
    with pytest.raises(JudgeError, match=r"unknown key 'serve\.max_model_length'; did you mean 'max_model_len'\?"):
        ServerSettings(max_model_length=64)
    with pytest.raises(JudgeError, match=r"serve\.kv_cache_gib = 'much'"):
        ServerSettings(kv_cache_gib="much")


def test_a_directory_without_a_checkpoint_is_refused_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=r"no config\.json there"):
        Server(str(tmp_path), ServerSettings())
    Server("a-hub-id", ServerSettings()).release()  # nothing was started
