"""Exported policies and pairs, and their upload to a stand-in of the hub's API."""

from __future__ import annotations

import base64
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.cli import main
from flows.export import export_pairs, export_policy, push
from iterdpo.errors import ConfigError, DamagedError, RunFailed, UserError
from iterdpo.run.devices import free_port
from iterdpo.run.rundir import RunDir
from iterdpo.types import RoundRecord

CONFIG: dict[str, Any] = {
    "rounds": 1,
    "seed": 0,
    "prompts": {"path": "/home/somebody/films.jsonl", "per_round": 4},
    "judge": {"use": "/home/somebody/judges.py:agrees", "args": {"base_url": "http://10.0.0.7/v1"}},
    "evaluation": {"judge": {"use": "length"}},
    "dpo": {"loss": {"type": "sigmoid"}, "beta": 0.1},
    "gate": {"metric": "win_rate/vs_previous", "minimum": 0.5},
}


def make_run(root: Path, model: Path, *, adapter: bool = False) -> Path:
    """A run of one promoted round whose policy is the model with other weights, or an adapter of it."""
    run = RunDir(root)
    run.root.mkdir()
    run.write_config({**CONFIG, "run_dir": str(root), "model": {"path": str(model)}})
    step = run.step(1, "policy", {})
    directory = step.begin()
    policy = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(1)
    if adapter:
        policy = get_peft_model(policy, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    else:
        policy.get_input_embeddings().weight.data.normal_()
    policy.save_pretrained(directory)
    AutoTokenizer.from_pretrained(model).save_pretrained(directory)
    (directory / "train.json").write_text('{"policy": "/home/somebody/model"}')
    (directory / "train_log.jsonl").write_text("")
    step.finish()
    pairs = run.step(1, "pairs", {})
    (pairs.begin() / "train.parquet").write_bytes(b"PAR1")
    pairs.finish()
    measured = {"score/heldout_judge": 0.5, "win_rate/vs_initial": 0.75, "pairs/kept": 4, "gate/decision": "promote"}
    metrics = {"round": 1, **measured, "win_rate/vs_initial_low": 0.6, "win_rate/vs_initial_high": 0.9}
    for round, values in ((0, {"round": 0, "score/heldout_judge": 0.25, "gate/decision": "promote"}), (1, metrics)):
        where = "round-001/policy" if round else str(model)
        run.round_dir(round).mkdir(exist_ok=True)
        run.write_record(RoundRecord(round, "promote", "it is better", where, round, "0", {}, values))
    return root


@pytest.fixture
def whole(tmp_path: Path, tiny_model: Path) -> Path:
    return make_run(tmp_path / "films", tiny_model)


@pytest.fixture
def lora(tmp_path: Path, tiny_model: Path) -> Path:
    return make_run(tmp_path / "films", tiny_model, adapter=True)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[3, 4, 5]])).logits.float()


def test_an_exported_policy_is_the_policy_in_the_precision_asked_for(whole: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        output = export_policy(whole, tmp_path / "out", dtype="bfloat16")
    finally:
        os.umask(before)
    policy = AutoModelForCausalLM.from_pretrained(whole / "round-001" / "policy", dtype=torch.bfloat16)
    exported = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert exported.dtype == torch.bfloat16
    assert torch.equal(logits(exported), logits(policy))
    assert AutoTokenizer.from_pretrained(output).decode([3, 4, 5])
    modes = {stat.S_IMODE(path.stat().st_mode) for path in output.iterdir()}
    assert (modes, stat.S_IMODE(output.stat().st_mode)) == ({0o644}, 0o755)
    assert not {"train.json", "train_log.jsonl", "MANIFEST.json"} & {path.name for path in output.iterdir()}


def test_a_merged_adapter_is_a_checkpoint_with_the_adapters_logits(
    lora: Path, tmp_path: Path, tiny_model: Path
) -> None:
    from peft import PeftModel

    output = export_policy(lora, tmp_path / "out", merge=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, lora / "round-001" / "policy"))
    exported = logits(AutoModelForCausalLM.from_pretrained(output))
    assert not torch.allclose(adapted, plain, atol=1e-3)
    torch.testing.assert_close(exported, adapted, atol=1e-5, rtol=1e-5)
    assert not list(output.glob("adapter_*"))
    assert AutoTokenizer.from_pretrained(output).decode([3, 4, 5])


def test_an_adapter_that_is_not_merged_stays_one(lora: Path, tmp_path: Path) -> None:
    output = export_policy(lora, tmp_path / "out", dtype="bfloat16")
    assert (output / "adapter_config.json").exists()
    assert not (output / "config.json").exists()
    assert 'library_name: "peft"' in (output / "README.md").read_text()


def test_the_card_has_what_was_measured_and_nothing_of_the_machine(whole: Path, tmp_path: Path) -> None:
    card = (export_policy(whole, tmp_path / "out") / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["tags"] == ["dpo", "iterdpo"]
    assert "| 1 | 0.50 | 75\N{NO-BREAK SPACE}% | 4 | promote |" in text
    assert "| prompts | films.jsonl, 4 a round |" in text
    assert "| training judge | judges.py:agrees |" in text
    assert "| held-out judge | length |" in text
    assert "| gate | win_rate/vs_previous, at least 0.5 |" in text
    assert "torch " in text
    assert not [word for word in ("/home", "somebody", "10.0.0.7", str(tmp_path)) if word in card]


def test_exported_pairs_have_a_card_that_names_their_file(whole: Path, tmp_path: Path) -> None:
    output = export_pairs(whole, tmp_path / "out")
    assert {path.name for path in output.iterdir()} == {"README.md", "train.parquet"}
    _, front, text = (output / "README.md").read_text().split("---\n", 2)
    [config] = yaml.safe_load(front)["configs"]
    assert config["data_files"] == [{"split": "train", "path": "train.parquet"}]
    assert "The 4 preference pairs of round 1" in text


@pytest.mark.parametrize("mistake", ["there", "merge", "round 0", "round 7", "damaged", "no run"])
def test_an_export_that_cannot_be_made_is_refused_and_leaves_nothing(whole: Path, tmp_path: Path, mistake: str) -> None:
    output = tmp_path / "out"
    source, error, message, options = whole, UserError, "", dict[str, Any]()
    match mistake:
        case "there":
            output.mkdir()
            (output / "mine").touch()
            error, message = ConfigError, "is there already; delete it, or give another directory"
        case "merge":
            message, options = "is no adapter, and has nothing to merge", {"merge": True}
        case "round 0":
            message, options = "the initial checkpoint; choose a round with --round", {"round": 0}
        case "round 7":
            message, options = "round 7 has no policy", {"round": 7}
        case "damaged":
            error, message = DamagedError, "damaged"
            file = whole / "round-001" / "policy" / "model.safetensors"
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        case "no run":
            source, message = tmp_path / "nothing", "no run here"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        export_policy(source, output, **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_merge_that_fails_leaves_nothing(tmp_path: Path, tiny_model: Path) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    run = make_run(tmp_path / "films", base, adapter=True)
    shutil.rmtree(base)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="cannot be merged"):
        export_policy(run, tmp_path / "out", merge=True)
    assert sorted(tmp_path.rglob("*")) == before


@contextmanager
def hub(*, refuse: int | None = None) -> Iterator[tuple[str, dict[str, bytes], list[tuple[str, Any]]]]:
    """A stand-in of the hub's API: its address, the files that were committed, and the requests it had."""
    files: dict[str, bytes] = {}
    asked: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            lines = [json.loads(line) for line in body.splitlines() if line.startswith(b"{")]
            asked.append((self.path, lines[0] if lines else None))
            url = f"http://127.0.0.1:{self.server.server_port}"  # type: ignore[attr-defined]
            if refuse:
                return self.answer({"error": "no"}, refuse)
            if self.path.endswith("/preupload/main"):
                names = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in lines[0]["files"]]
                return self.answer({"files": names})
            if "/commit/" in self.path:
                for line in lines:
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return self.answer({"commitUrl": f"{url}/me/films/commit/1", "commitOid": "1", "pullRequestUrl": None})
            return self.answer({"url": f"{url}/me/films", "id": "1", "errors": [], "warnings": []})

        def do_GET(self) -> None:
            asked.append((self.path, None))
            self.answer({"error": "not found"}, 404)

        def answer(self, value: Any, status: int = 200) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", files, asked
        server.shutdown()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the hub's address, which huggingface_hub otherwise reads once, when it is imported."""

    def use(url: str) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", url, raising=False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")

    return use


def test_a_push_creates_a_private_repository_with_the_exported_files(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with hub() as (url, files, asked):
        environment = {**os.environ, "HF_ENDPOINT": url, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-m", "flows.cli", "export", str(whole), str(output), "--push", "me/films"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [str(output), f"{url}/me/films"]
    assert files == {path.name: path.read_bytes() for path in output.iterdir()}
    created = next(body for path, body in asked if path == "/api/repos/create")
    assert (created["name"], created["organization"], created["visibility"]) == ("films", "me", "private")


def test_pairs_are_pushed_as_a_dataset_which_is_public_if_asked(whole: Path, tmp_path: Path, endpoint: Any) -> None:
    output = export_pairs(whole, tmp_path / "out")
    with hub() as (url, files, asked):
        endpoint(url)
        push(output, "me/pairs", kind="dataset", public=True)
    assert files.keys() == {"README.md", "train.parquet"}
    created = next(body for path, body in asked if path == "/api/repos/create")
    assert (created["type"], created["visibility"]) == ("dataset", "public")
    assert any(path.startswith("/api/datasets/me/pairs/commit/") for path, _ in asked)


@pytest.mark.parametrize(("name", "status"), [("me/films", 403), ("a/b/c", None)])
def test_a_push_that_the_hub_refuses_is_one_line(
    whole: Path, tmp_path: Path, endpoint: Any, name: str, status: int | None
) -> None:
    with hub(refuse=status) as (url, _, _):
        endpoint(url)
        with pytest.raises(UserError, match=f"--push {name}: ") as refused:
            push(export_policy(whole, tmp_path / "out"), name, kind="model")
    assert "\n" not in str(refused.value)
    assert status is None or "set HF_TOKEN" in str(refused.value)


def test_a_hub_that_does_not_answer_is_a_failure(whole: Path, tmp_path: Path, endpoint: Any) -> None:
    endpoint(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(RunFailed, match="the hub does not answer"):
        push(export_policy(whole, tmp_path / "out"), "me/films", kind="model")


def test_nothing_is_uploaded_unasked(whole: Path, tmp_path: Path, endpoint: Any) -> None:
    with hub() as (url, _, asked):
        endpoint(url)
        with pytest.raises(SystemExit) as ended:
            main(["export", str(whole), str(tmp_path / "out"), "--dtype", "float16"])
    assert ended.value.code == 0
    assert asked == []
