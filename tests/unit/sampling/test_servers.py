"""The client of vLLM servers, against an HTTP server that answers as they do; tests/integration/test_servers.py has real ones."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from iterdpo.config import SamplingConfig
from iterdpo.errors import ChildFailed
from iterdpo.sampling import Pool, SamplingParameters
from iterdpo.sampling.servers import ServerSampler
from iterdpo.types import Completion

pytestmark = pytest.mark.timeout(60)

PARAMETERS = SamplingParameters(n=2, max_tokens=3, stop_token_ids=(7,))
PROMPTS, SEEDS = [[1, 2], [3]], [11, 12]


class Server:
    """`asked` are the paths and bodies; `answers` replace its own by path, a status or a body."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.answers: dict[str, Any] = {}
        self.version, self.models = "default", [{"id": "base", "max_model_len": 64}]
        self.held = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(None)

            def do_POST(self) -> None:
                self.reply(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null"))

            def reply(self, body: Any) -> None:
                outer.asked.append((self.path, body))
                given = outer.answers.get(self.path)
                answer = outer.answer(self.path, body) if given is None or isinstance(given, int) else given
                payload = b"" if answer is None else json.dumps(answer).encode()
                self.send_response(given if isinstance(given, int) else 200)
                if answer is not None:
                    self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, path: str, body: Any) -> Any:
        match path:
            case "/v1/models":
                return {"data": self.models}
            case "/weight_info":
                return {"weight_version": self.version}
            case "/update_weight_version":
                self.version = body["new_version"]
                return {"success": True}
            case "/v1/load_lora_adapter":
                self.models.append({"id": body["lora_name"], "parent": "base"})
                return "Success"
            case "/v1/completions":
                if body["prompt"] == [666]:
                    self.held.wait(30)
                choice = {"finish_reason": "length", "logprobs": {"token_logprobs": [-0.5] * 3}}
                texts = [f"{body['prompt']} {k}" for k in range(body["n"])]
                return {"choices": [{**choice, "text": text, "token_ids": [4, 5, 6]} for text in texts]}
        return None

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.held.set()
    made.http.shutdown()
    made.http.server_close()


def sampler_of(server: Server, *, reproducible: bool = False, needs: int = 64) -> ServerSampler:
    given: dict[str, Any] = {"max_model_len": lambda: needs, "reproducible": reproducible, "silence": 20, "start": 20}
    return ServerSampler(server.url, **given, base=lambda: (Path("/base"), "base-digest"))


def expected(prompts: list[list[int]]) -> list[list[Completion]]:
    return [[Completion(f"{ids} {k}", [4, 5, 6], [-0.5] * 3, "length") for k in range(2)] for ids in prompts]


def test_a_server_gets_the_weights_once_and_says_what_it_samples(server: Server, tmp_path: Path) -> None:
    sampler = sampler_of(server)
    for _ in range(2):
        sampler.load(tmp_path, "abc")
    reload = {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path)}}
    assert server.asked[:5] == [
        ("/v1/models", None),
        ("/weight_info", None),
        ("/collective_rpc", reload),
        ("/reset_prefix_cache", None),
        ("/update_weight_version", {"new_version": "abc"}),
    ]
    assert server.paths()[5:] == ["/v1/models", "/weight_info"]
    assert sampler.sample(PROMPTS, SEEDS, PARAMETERS) == expected(PROMPTS)
    asked = [body for path, body in server.asked if path == "/v1/completions"]
    assert sorted(body["prompt"] for body in asked) == PROMPTS
    assert all(body["model"] == "base" and body["stop_token_ids"] == [7] and "seed" not in body for body in asked)


def test_seeds_are_sent_if_sampling_must_be_reproducible(server: Server, tmp_path: Path) -> None:
    sampler = sampler_of(server, reproducible=True)
    sampler.load(tmp_path, "abc")
    sampler.sample(PROMPTS, SEEDS, PARAMETERS)
    assert sorted(body["seed"] for path, body in server.asked if path == "/v1/completions") == SEEDS


def test_each_prompt_has_the_temperature_that_its_seed_gives_it(server: Server, tmp_path: Path) -> None:
    several = replace(PARAMETERS, temperature=(0.5, 1.0))
    sampler = sampler_of(server, reproducible=True)
    sampler.load(tmp_path, "abc")
    sampler.sample(PROMPTS, SEEDS, several)
    told = {json.dumps(body["prompt"]): body["temperature"] for path, body in server.asked if path == "/v1/completions"}
    assert told == {"[1, 2]": several.temperature_of(11), "[3]": several.temperature_of(12)}


def test_an_adapter_is_loaded_under_a_name_of_its_own(server: Server, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    sampler = sampler_of(server)
    for _ in range(2):
        sampler.load(tmp_path, "abc")
    assert sampler.sample(PROMPTS, SEEDS, PARAMETERS) == expected(PROMPTS)
    loaded = [body for path, body in server.asked if path == "/v1/load_lora_adapter"]
    assert loaded == [{"lora_name": "iterdpo-abc", "lora_path": str(tmp_path)}]
    assert {body["model"] for path, body in server.asked if path == "/v1/completions"} == {"iterdpo-abc"}
    reloaded = [body["kwargs"] for path, body in server.asked if path == "/collective_rpc"]
    assert reloaded == [{"weights_path": "/base"}]


def test_an_adapter_is_never_sampled_over_weights_that_it_does_not_belong_to(server: Server, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    sampler = sampler_of(server)
    sampler.load(tmp_path, "abc")
    server.version = "theirs"
    with pytest.raises(ChildFailed, match="its weights are no longer those of the policy, but of theirs"):
        sampler.sample(PROMPTS, SEEDS, PARAMETERS)
    sampler.load(tmp_path, "abc")
    assert server.version == "base-digest"
    assert sampler.sample(PROMPTS, SEEDS, PARAMETERS) == expected(PROMPTS)


CHOICE = {"text": "x", "finish_reason": "stop", "token_ids": [4], "logprobs": {"token_logprobs": [-0.5]}}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ({}, "has no choices"),
        ([], "has no choices"),
        ({"choices": [{**CHOICE, "token_ids": None}] * 2}, "has no token_ids"),
        ({"choices": [{**CHOICE, "logprobs": None}] * 2}, "has no logprobs"),
        ({"choices": [{**CHOICE, "token_ids": [4, 5]}] * 2}, "2 token_ids with 1 token_logprobs"),
        ({"choices": [CHOICE]}, "1 completions of a prompt in place of 2"),
    ],
)
def test_a_reply_unlike_those_of_vllm_is_told_with_the_server(
    server: Server, tmp_path: Path, reply: Any, reason: str
) -> None:
    sampler = sampler_of(server)
    sampler.load(tmp_path, "abc")
    server.answers = {"/v1/completions": reply}
    with pytest.raises(ChildFailed, match=f"the server {server.url}: .*{reason}"):
        sampler.sample(PROMPTS, SEEDS, PARAMETERS)


def test_completions_of_a_server_that_has_lost_the_policy_do_not_count(server: Server, tmp_path: Path) -> None:
    said: list[str] = []
    pool = Pool([sampler_of(server)], say=said.append)
    pool.load(tmp_path, "abc")
    server.version = "default"  # it was started again
    assert pool.sample(PROMPTS, SEEDS, PARAMETERS) == expected(PROMPTS)
    assert "its weights are no longer those of the policy, but of default" in said[0]
    assert server.paths().count("/collective_rpc") == 2
    assert server.version == "abc"


@pytest.mark.parametrize(
    ("answers", "needs", "reason"),
    [
        ({"/weight_info": 404}, 64, "it has no /weight_info; start it with VLLM_SERVER_DEV_MODE=1"),
        ({"/collective_rpc": 500}, 64, "/collective_rpc: status 500"),
        ({"/v1/models": {"data": []}}, 64, "/v1/models: no model is there"),
        ({"/v1/models": {"object": "error"}}, 64, "a reply of it has no data, as those of vLLM have"),
        ({}, 65, "it holds 64 tokens, but this run needs 65; start it with --max-model-len"),
    ],
)
def test_a_server_that_cannot_take_the_policy_is_named_with_the_remedy(
    server: Server, tmp_path: Path, answers: dict[str, Any], needs: int, reason: str
) -> None:
    server.answers = answers
    with pytest.raises(ChildFailed) as failed:
        sampler_of(server, needs=needs).load(tmp_path, "abc")
    assert f"the server {server.url}: {reason}" in str(failed.value)


def test_a_server_that_does_not_answer_is_named(server: Server, tmp_path: Path) -> None:
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ChildFailed, match=f"the server {server.url}: /v1/models: ClientConnectorError"):
        sampler_of(server).load(tmp_path, "abc")


def test_two_servers_share_the_batches_and_one_that_fails_leaves_them_to_the_other(
    server: Server, tmp_path: Path
) -> None:
    other, said = Server(), list[str]()
    batches = [([[number], [number + 1]], [1, 2]) for number in range(30)]
    pool = Pool([sampler_of(server), sampler_of(other)], say=said.append)
    pool.load(tmp_path, "abc")
    other.answers = {"/v1/completions": 500, "/v1/models": 500}
    assert list(pool.sample_batches(batches, PARAMETERS)) == [expected(prompts) for prompts, _ in batches]
    assert any("4 prompts are dealt again" in line or "2 prompts are dealt again" in line for line in said)
    other.http.shutdown()
    other.http.server_close()


def test_closing_ends_what_is_on_its_way(server: Server, tmp_path: Path) -> None:
    sampler = sampler_of(server)
    sampler.load(tmp_path, "abc")
    threading.Timer(0.3, sampler.close).start()
    with pytest.raises(ChildFailed, match="closed"):
        sampler.sample([[666]], [1], PARAMETERS)


@pytest.mark.parametrize("url", ["10.0.0.7:8000", "http://a b", "http://h:1/v1", "http://user:key@h:1", "ftp://h"])
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is no URL of a server"):
        SamplingConfig(servers=[url])


def test_a_slash_at_the_end_of_a_url_does_not_count() -> None:
    assert SamplingConfig(servers=["http://h:1/"]).servers == ["http://h:1"]
