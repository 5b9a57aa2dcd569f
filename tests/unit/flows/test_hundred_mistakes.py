"""More than a hundred mistakes: each gives one clear line in `--dry-run`, before a sampler, a trainer or a judge's model.

A row of a table has what is wrong, in files or in overrides, and words that the message has: the key or the file, and
the remedy. `{root}` is the test's directory.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings
from safetensors.numpy import load_file, save_file

from flows.cli import main
from iterdpo.testing_http import FakeEndpoint

Damage = Callable[[Path], object]


class Mistake(NamedTuple):
    """`Mistake("no round", ["rounds = 0"], ["rounds=0"])`"""

    what: str
    words: list[str]
    overrides: list[str] = []  # noqa: RUF012  # a tuple's default, never changed
    damage: Damage = lambda root: None


@pytest.fixture
def root(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a model, prompts, pairs, examples and a judge that would all do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("PREFECT_API_URL", "NO_SUCH_KEY"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(tiny_model, tmp_path / "model")
    rows(tmp_path / "prompts.jsonl", [{"prompt": f"Tale {i}", "topic": "x"} for i in range(40)])
    rows(tmp_path / "pairs.jsonl", [{"prompt": f"Tale {i}", "chosen": "yes", "rejected": "no"} for i in range(8)])
    rows(tmp_path / "examples.jsonl", [{"prompt": f"T {i}", "completion": "ok", "label": i > 3} for i in range(8)])
    (tmp_path / "judge.py").write_text("def score(prompt, completion):\n    return len(completion)\n")
    yield tmp_path
    assert "vllm" not in sys.modules
    assert not (tmp_path / "run").exists()


def rows(file: Path, values: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in values))


def said(command: str, root: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    """How `iterdpo run` or `train` with `--dry-run` ends, and what it prints."""
    config: dict[str, Any] = {"run_dir": str(root / "run"), "model": {"path": str(root / "model")}}
    if command == "run":
        config["prompts"] = {"path": str(root / "prompts.jsonl"), "per_round": 8, "heldout": 4}
        config |= {"judge": {"use": f"{root / 'judge.py'}:score"}, "sampling": {"max_tokens": 16}}
    else:
        config["data"] = {"path": str(root / "pairs.jsonl")}
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as ended:
        main([command, "--dry-run", str(root / "config.yaml"), *(o.replace("{root}", str(root)) for o in overrides)])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def refusal(command: str, root: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that they print for a configuration that cannot run."""
    status, out, err = said(command, root, overrides, capsys)
    assert (status, out) == (2, ""), err
    assert err.startswith("iterdpo: ")
    assert err.count("\n") == 1
    assert len(err.replace(str(root), "")) < 700
    return err


def case(mistake: Mistake) -> Any:
    return pytest.param(mistake, id=mistake.what.replace(" ", "-"))


def edit(name: str, **changes: Any) -> Damage:
    """Change keys of a JSON file of the model."""

    def damage(root: Path) -> None:
        path = root / "model" / name
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))

    return damage


def put(name: str, text: str) -> Damage:
    def damage(root: Path) -> None:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)

    return damage


def remove(name: str) -> Damage:
    return lambda root: (root / name).unlink()


def rename(name: str, to: str) -> Damage:
    return lambda root: (root / name).rename(root / to)


def both(*damages: Damage) -> Damage:
    return lambda root: [damage(root) for damage in damages]


def with_integers(root: Path) -> None:
    file = root / "model" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file({**tensors, name: tensors[name].astype(np.int8)}, file)


def with_short_floats(root: Path) -> None:
    import torch
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    file = root / "model" / "model.safetensors"
    tensors = load(file)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    save({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, file, metadata={"format": "pt"})


WEIGHTS = "model/model.safetensors"
ADAPTER = put("model/adapter_config.json", '{"base_model_name_or_path": "meta/base", "peft_type": "LORA"}')
AWQ = {"quant_method": "awq", "bits": 4}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
FEW = "judge.args.endpoint.cache=off"
ENDPOINT = ["judge.use=pairwise", "judge.args.model=m", FEW]

CONFIGURATION = [
    Mistake("an unknown section", ["unknown key 'samplin'", "did you mean 'sampling'?"], ["samplin.n=4"]),
    Mistake("an unknown key", ["unknown key 'dpo.learning_rat'", "learning_rate"], ["dpo.learning_rat=1"]),
    Mistake("a word for a number", ["rounds = 'many'", "integer"], ["rounds=many"]),
    Mistake("no round", ["rounds = 0", "greater than or equal to 1"], ["rounds=0"]),
    Mistake("no model", ["model"], ["model={}"]),
    Mistake("one completion a prompt", ["sampling.n = 1"], ["sampling.n=1"]),
    Mistake("a temperature of 0", ["sampling.temperature = 0"], ["sampling.temperature=0"]),
    Mistake("a top_p of 2", ["sampling.top_p = 2"], ["sampling.top_p=2"]),
    Mistake("a negative top_k", ["sampling.top_k = -1"], ["sampling.top_k=-1"]),
    Mistake("no token to sample", ["sampling.max_tokens = 0"], ["sampling.max_tokens=0"]),
    Mistake("an empty shard", ["sampling.shard_size = 0"], ["sampling.shard_size=0"]),
    Mistake("a dtype that there is not", ["sampling.engine.dtype", "bfloat16"], ["sampling.engine.dtype=bf16"]),
    Mistake("more memory than all", ["gpu_memory_utilization = 85"], ["sampling.engine.gpu_memory_utilization=85"]),
    Mistake(
        "a context longer than the model's", ["max_model_len = 4096", "512"], ["sampling.engine.max_model_len=4096"]
    ),
    Mistake("no room for a prompt", ["max_tokens"], ["sampling.max_tokens=512"]),
    Mistake("a strategy that there is not", ["pairing.strategy", "best_worst"], ["pairing.strategy=best"]),
    Mistake("a negative margin", ["pairing.min_margin = -1"], ["pairing.min_margin=-1"]),
    Mistake("a negative beta", ["dpo.beta = -0.1", "greater than 0"], ["dpo.beta=-0.1"]),
    Mistake("a loss with a typo", ["dpo.loss = 'sigmoyd'", "sigmoid"], ["dpo.loss=sigmoyd"]),
    Mistake("the key of another loss", ["gamma", "simpo"], ["dpo.loss={type: ipo, gamma: 1}"]),
    Mistake("a label smoothing of 0.6", ["label_smoothing = 0.6"], ["dpo.loss.label_smoothing=0.6"]),
    Mistake("a learning rate of 0", ["dpo.learning_rate = 0"], ["dpo.learning_rate=0"]),
    Mistake("a learning rate that is no number", ["dpo.learning_rate", "finite"], ["dpo.learning_rate=.nan"]),
    Mistake("nothing but warm-up", ["dpo.warmup_ratio = 1"], ["dpo.warmup_ratio=1"]),
    Mistake("a scheduler with a typo", ["dpo.lr_scheduler", "cosine"], ["dpo.lr_scheduler=cosin"]),
    Mistake("a precision that there is not", ["dpo.precision", "bf16"], ["dpo.precision=fp16"]),
    Mistake("one beta of two", ["dpo.adam_betas"], ["dpo.adam_betas=[0.9]"]),
    Mistake("no epoch", ["dpo.epochs = 0"], ["dpo.epochs=0"]),
    Mistake("an empty step", ["dpo.pairs_per_step = 0"], ["dpo.pairs_per_step=0"]),
    Mistake("weights for no pairs", ["wpo", "kto"], ["dpo.loss=kto", "dpo.wpo=true"]),
    Mistake("an average of adapters", ["ema", "adapter"], ["dpo.reference=ema", "dpo.adapter={}"]),
    Mistake(
        "the sampler as another policy",
        ["sampler_logps_tolerance", "previous"],
        ["dpo.sampler_logps_tolerance=0.1", "dpo.reference=initial"],
    ),
    Mistake("a tracker that there is not", ["dpo.trackers", "wandb"], ["dpo.trackers=[wandbb]"]),
    Mistake("no rank", ["dpo.adapter.r = 0"], ["dpo.adapter.r=0"]),
    Mistake("a key of PEFT's", ["unknown key 'dpo.adapter.lora_alpha'", "alpha"], ["dpo.adapter.lora_alpha=16"]),
    Mistake(
        "one judge twice", ["evaluation.judge is the training judge"], ["evaluation.judge.use={root}/judge.py:score"]
    ),
    Mistake("a confidence of 95", ["evaluation.confidence = 95"], ["evaluation.confidence=95"]),
    Mistake("a metric that there is not", ["gate.metric", "win_rate/vs_previous"], ["gate.metric=win_rate"]),
    Mistake("a win rate of 55", ["gate: minimum = 55", "half is 0.5"], ["gate.minimum=55"]),
    Mistake(
        "a metric of no judge",
        ["gate.metric = 'score/heldout_judge'", "set evaluation.judge"],
        ["gate.metric=score/heldout_judge"],
    ),
    Mistake("a KL of 0", ["gate.max_kl = 0"], ["gate.max_kl=0"]),
    Mistake(
        "a rule about a metric that there is not",
        ["gate.rules.0.metric = 'length/tokens'", "did you mean 'length/mean_tokens'?"],
        ["gate.rules=[{metric: length/tokens, maximum: 9}]"],
    ),
    Mistake(
        "a rule about a metric of no judge",
        ["gate.rules.1.metric = 'score/heldout_judge_low'", "set evaluation.judge"],
        ["gate.rules=[{metric: kl/to_initial, maximum: 9}, {metric: score/heldout_judge_low, minimum: 0}]"],
    ),
    Mistake(
        "a rule about thoughts of a model that has none",
        ["gate.rules.0.metric = 'length/unfinished_thoughts'", "no thinking model"],
        ["gate.rules=[{metric: length/unfinished_thoughts, maximum: 0.1}]"],
    ),
    Mistake("a rule without a bound", ["gate.rules.0", "not none"], ["gate.rules=[{metric: kl/to_initial}]"]),
    Mistake(
        "a rule of two bounds",
        ["gate.rules.0", "not minimum and maximum"],
        ["gate.rules=[{metric: distinct/1, minimum: 0, maximum: 1}]"],
    ),
    Mistake(
        "a rise of a win rate",
        ["gate.rules.0", "max_increase", "minimum or a maximum"],
        ["gate.rules=[{metric: win_rate/vs_initial, max_increase: 0.1}]"],
    ),
    Mistake(
        "a rule of 55 in 100",
        ["gate.rules.0", "minimum = 55", "half is 0.5"],
        ["gate.rules=[{metric: win_rate/vs_initial, minimum: 55}]"],
    ),
    Mistake(
        "an outcome that there is not",
        ["gate.rules.0.otherwise = 'halt'", "lower_learning_rate"],
        ["gate.rules=[{metric: distinct/1, minimum: 0, otherwise: halt}]"],
    ),
    Mistake("no patience", ["gate.patience = 0"], ["gate.patience=0"]),
    Mistake("a learning rate that rises", ["gate.learning_rate_factor = 2"], ["gate.learning_rate_factor=2"]),
    Mistake(
        "a rule about the KL of greedy completions",
        ["gate.rules.0.metric", "temperature"],
        ["gate.rules=[{metric: kl/to_initial, maximum: 9}]", "evaluation.temperature=0"],
    ),
    Mistake(
        "a KL of greedy completions", ["gate.max_kl", "temperature"], ["gate.max_kl=5", "evaluation.temperature=0"]
    ),
    Mistake("no prompt a round", ["prompts.per_round = 0"], ["prompts.per_round=0"]),
    Mistake("the section of another command", ["'data'", "iterdpo train"], ["data.path=x.jsonl"]),
    Mistake("an override without a value", ["dpo.beta", "no such configuration file"], ["dpo.beta"]),
    Mistake("an override that is no YAML", ["dpo.beta=[1", "YAML"], ["dpo.beta=[1"]),
    Mistake("a second file that is no mapping", ["list.yaml", "mapping"], ["list.yaml"], put("list.yaml", "- 1\n")),
    Mistake("a second file that is no YAML", ["bad.yaml", "YAML"], ["bad.yaml"], put("bad.yaml", "a: [1\n")),
    Mistake("a share of abstentions above 1", ["judge.max_abstained = 25"], ["judge.max_abstained=25"]),
]

MACHINE = [
    Mistake("more processes than cores", ["dpo.processes = 4096", "lower it"], ["dpo.processes=4096"]),
    Mistake(
        "more GPUs than there are",
        ["sampling.engine.tensor_parallel_size = 4096"],
        ["sampling.engine.tensor_parallel_size=4096"],
    ),
    Mistake("four bits without a GPU", ["dpo.adapter.quantize", "GPU"], ["dpo.adapter.quantize=nf4"]),
    Mistake("no accelerate file", ["dpo.accelerate_config", "no such file"], ["dpo.accelerate_config={root}/a.yaml"]),
    Mistake(
        "an accelerate file of more processes",
        ["a.yaml", "num_processes is 8"],
        ["dpo.accelerate_config={root}/a.yaml"],
        put("a.yaml", "num_processes: 8\n"),
    ),
    Mistake(
        "a file in the way of the run", ["run_dir", "cannot be written"], ["run_dir={root}/file/run"], put("file", "")
    ),
]

MODEL = [
    Mistake("no such model", ["model.path", "no such directory"], ["model.path={root}/nothing"]),
    Mistake("a GGUF file", ["model.gguf", "checkpoint directory"], ["model.path=model.gguf"]),
    Mistake("no config.json", ["has no config.json"], [], remove("model/config.json")),
    Mistake("a config.json that was cut", ["config.json", "download"], [], put("model/config.json", '{"vocab')),
    Mistake("a config.json that is a list", ["config.json", "list"], [], put("model/config.json", "[]")),
    Mistake("a config.json without a type", ["no model_type"], [], edit("config.json", model_type=None)),
    Mistake("a model of next year", ["'llama9'", "install"], [], edit("config.json", model_type="llama9")),
    Mistake(
        "a classifier",
        ["LlamaForTokenClassification"],
        [],
        edit("config.json", architectures=["LlamaForTokenClassification"]),
    ),
    Mistake(
        "a config.json of another size", ["has the shape", "different models"], [], edit("config.json", hidden_size=128)
    ),
    Mistake(
        "a config.json that describes no model", ["config.json", "no model"], [], edit("config.json", hidden_size="big")
    ),
    Mistake("a config.json with no text", ["text_config is no object"], [], edit("config.json", text_config="big")),
    Mistake(
        "layers that are missing",
        ["weights of 2 layers", "num_hidden_layers 4"],
        [],
        edit("config.json", num_hidden_layers=4),
    ),
    Mistake("another vocabulary", ["vocab_size 200"], [], edit("config.json", vocab_size=200)),
    Mistake(
        "an adapter alone",
        ["only an adapter of meta/base"],
        [],
        both(ADAPTER, remove("model/config.json"), remove(WEIGHTS)),
    ),
    Mistake("an adapter beside config.json", ["only an adapter of meta/base"], [], both(ADAPTER, remove(WEIGHTS))),
    Mistake("an adapter beside weights", ["adapter_config.json", "remove"], [], ADAPTER),
    Mistake("pickled weights", ["no .safetensors"], [], rename(WEIGHTS, "model/pytorch_model.bin")),
    Mistake("weights that were cut", ["model.safetensors", "cut short"], [], put(WEIGHTS, "")),
    Mistake("a pointer of Git LFS", ["Git LFS"], [], put(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n")),
    Mistake(
        "shards without their index", ["index.json"], [], rename(WEIGHTS, "model/model-00001-of-00002.safetensors")
    ),
    Mistake(
        "a shard that is missing",
        ["model-00002-of-00002.safetensors is missing"],
        [],
        both(
            rename(WEIGHTS, "model/model-00001-of-00002.safetensors"),
            put("model/model.safetensors.index.json", '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'),
        ),
    ),
    Mistake(
        "an index without a map",
        ["model.safetensors.index.json", "weight_map"],
        [],
        both(rename(WEIGHTS, "model/a.safetensors"), put("model/model.safetensors.index.json", "{}")),
    ),
    Mistake("weights of AWQ", ["quantized (awq)", "nf4"], [], edit("config.json", quantization_config=AWQ)),
    Mistake("weights of bitsandbytes", ["quantized (bitsandbytes)"], [], edit("config.json", quantization_config=NF4)),
    Mistake(
        "weights of an older AutoGPTQ",
        ["quantized (quantize_config.json)"],
        [],
        put("model/quantize_config.json", "{}"),
    ),
    Mistake("weights that are integers", ["quantized (integers in model.safetensors)"], [], with_integers),
    Mistake(
        "weights of 8 bits that nothing describes", ["quantized (F8_E4M3", "does not say how"], [], with_short_floats
    ),
    Mistake("weights of ModelOpt", ["quantized (hf_quant_config.json)"], [], put("model/hf_quant_config.json", "{}")),
    Mistake(
        "weights beside weights",
        ["has model.safetensors and old.safetensors", "move old.safetensors away"],
        [],
        lambda root: shutil.copy(root / WEIGHTS, root / "model/old.safetensors"),
    ),
    Mistake(
        "an adapter's weights beside weights",
        ["adapter_model.safetensors", "move"],
        [],
        lambda root: shutil.copy(root / WEIGHTS, root / "model/adapter_model.safetensors"),
    ),
    Mistake(
        "weights beside the index of others",
        ["has model.safetensors and model.safetensors.index.json"],
        [],
        put("model/model.safetensors.index.json", '{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'),
    ),
    Mistake("code of its own", ["trust_remote_code"], [], edit("config.json", auto_map={"AutoConfig": "own.Config"})),
    Mistake(
        "code that is missing",
        ["own.py, which is missing"],
        ["model.trust_remote_code=true"],
        edit("config.json", auto_map={"AutoConfig": "own.Config"}),
    ),
    Mistake(
        "a tokenizer with code of its own",
        ["tokenizer needs its own Python code", "model.trust_remote_code=true"],
        [],
        edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own"),
    ),
    Mistake(
        "no tokenizer",
        ["has no tokenizer"],
        [],
        both(remove("model/tokenizer.json"), remove("model/tokenizer_config.json")),
    ),
    Mistake("a tokenizer that was cut", ["tokenizer.json"], [], put("model/tokenizer.json", "{")),
    Mistake("a tokenizer of no kind", ["tokenizer.json"], [], put("model/tokenizer.json", '{"model": {"type": "X"}}')),
    Mistake(
        "a tokenizer_config.json that was cut", ["tokenizer_config.json"], [], put("model/tokenizer_config.json", "{")
    ),
    Mistake(
        "a generation_config.json that was cut",
        ["generation_config.json"],
        [],
        put("model/generation_config.json", "{"),
    ),
    Mistake(
        "settings for generation that are refused",
        ["generation_config.json", "max_new_tokens", "correct it"],
        [],
        edit("generation_config.json", max_new_tokens=-5),
    ),
    Mistake(
        "a cache that there is not",
        ["generation_config.json", "cache_implementation"],
        [],
        edit("generation_config.json", cache_implementation="bogus"),
    ),
    Mistake(
        "targets of another architecture",
        ["target_modules", "q_proj"],
        ["dpo.adapter.target_modules=[query_key_value]"],
    ),
    Mistake("one target of two", ["target_modules = 'c_attn'"], ["dpo.adapter.target_modules=[q_proj, c_attn]"]),
    Mistake("a norm as target", ["norm", "no matrix"], ["dpo.adapter.target_modules=[input_layernorm]"]),
    Mistake("a block as target", ["self_attn", "no matrix"], ["dpo.adapter.target_modules=[self_attn]"]),
    Mistake("a tied head as target", ["lm_head", "tied"], ["dpo.adapter.target_modules=[q_proj, lm_head]"]),
    Mistake("tied embeddings as target", ["embed_tokens", "tied"], ["dpo.adapter.target_modules=[embed_tokens]"]),
    Mistake("no target", ["target_modules is empty"], ["dpo.adapter.target_modules=[]"]),
    Mistake(
        "half a regular expression", ["target_modules", "regular expression"], ["dpo.adapter.target_modules='(q_proj'"]
    ),
    Mistake("an expression for nothing", ["target_modules", "no such module"], ["dpo.adapter.target_modules='.*qkv'"]),
]

PROMPTS = [
    Mistake("no prompts", ["nothing.jsonl"], ["prompts.path={root}/nothing.jsonl"]),
    Mistake("an empty file of prompts", ["prompts.jsonl", "no rows"], [], put("prompts.jsonl", "")),
    Mistake("a column with a typo", ["prompts.jsonl", "'promt'"], ["prompts.column=promt"]),
    Mistake("a broken line", ["prompts.jsonl:1", "JSON"], [], put("prompts.jsonl", '{"prompt": "cut off\n')),
    Mistake("prompts for fewer rounds", ["prompts"], ["rounds=40"]),
    Mistake("no held-out file", ["other.jsonl"], ["prompts.heldout_path={root}/other.jsonl"]),
    Mistake("no column of ids", ["'key'"], ["prompts.id_column=key"]),
    Mistake(
        "a kind of file that is not read",
        ["prompts.docx"],
        ["prompts.path={root}/prompts.docx"],
        put("prompts.docx", "x"),
    ),
    Mistake(
        "messages without a template",
        ["chat template"],
        [],
        both(
            lambda root: [file.unlink() for file in (root / "model").glob("chat_template*")],
            edit("tokenizer_config.json", chat_template=None),
            lambda root: rows(
                root / "prompts.jsonl", [{"prompt": [{"role": "user", "content": f"{i}"}]} for i in range(40)]
            ),
        ),
    ),
]

JUDGE = [
    Mistake("no judge", ["jugde.py", "judge.py"], ["judge.use={root}/jugde.py:score"]),
    Mistake("no such function", ["'scor'", "score"], ["judge.use={root}/judge.py:scor"]),
    Mistake("a name that is not known", ["'pairwize'", "pairwise"], ["judge.use=pairwize"]),
    Mistake("no such module", ["'no_such.module'"], ["judge.use=no_such.module:score"]),
    Mistake("a syntax error", ["judge.py, line 1"], [], put("judge.py", "def score(completion:\n")),
    Mistake(
        "a package that is missing",
        ["no_such_package", "install"],
        [],
        put("judge.py", "import no_such_package\ndef score(completion): ...\n"),
    ),
    Mistake(
        "a relative import",
        ["relative import", "by their names alone"],
        [],
        put("judge.py", "from .x import y\ndef score(completion): ...\n"),
    ),
    Mistake(
        "a judge that ends the process",
        ["judge.py", "SystemExit", "line 2"],
        [],
        put("judge.py", "import sys\nsys.exit(3)\ndef score(completion): ...\n"),
    ),
    Mistake(
        "a judge that breaks on import",
        ["ZeroDivisionError", "line 1"],
        [],
        put("judge.py", "x = 1 / 0\ndef score(completion): ...\n"),
    ),
    Mistake("a name that is no judge", ["int is not a judge"], [], put("judge.py", "score = 3\n")),
    Mistake("a function without parameters to read", ["cannot be read"], [], put("judge.py", "score = max\n")),
    Mistake("parameters of no judge", ["text", "parameters"], [], put("judge.py", "def score(text): ...\n")),
    Mistake("an argument that is not known", ["unknown argument 'gamma'"], ["judge.args.gamma=1"]),
    Mistake("a column that is not there", ["column 'gold'"], [], put("judge.py", "def score(completion, gold): ...\n")),
    Mistake(
        "a judge that only compares at the gate",
        ["gate.metric = 'score/train_judge'", "win_rate/vs_previous"],
        ["gate.metric=score/train_judge"],
        put("judge.py", "def score(prompt, a, b): ...\n"),
    ),
    Mistake(
        "a rule about the score of a judge that only compares",
        ["gate.rules.0.metric = 'score/train_judge_low'", "win_rate/vs_previous"],
        ["gate.rules=[{metric: score/train_judge_low, minimum: 0}]"],
        put("judge.py", "def score(prompt, a, b): ...\n"),
    ),
    Mistake(
        "no reward model",
        ["nothing", "no such directory"],
        ["judge.use=reward_model", "judge.args.model={root}/nothing"],
    ),
    Mistake("a ranker without a model", ["pair_ranker", "model"], ["judge.use=pair_ranker"]),
    Mistake("neither endpoint nor server", ["endpoint", "serve"], ["judge.use=pairwise", "judge.args.model=m"]),
    Mistake(
        "an address without http", ["base_url", "http"], [*ENDPOINT, "judge.args.endpoint.base_url=localhost:8000"]
    ),
    Mistake(
        "the key itself",
        ["api_key_env", "name of an environment variable"],
        [*ENDPOINT, "judge.args.endpoint.api_key_env=sk-1234"],
    ),
    Mistake(
        "an endpoint that is not there",
        ["http://127.0.0.1:9/v1", "connection refused", "base_url"],
        [*ENDPOINT, "judge.args.endpoint.base_url=http://127.0.0.1:9/v1"],
    ),
    Mistake(
        "a key that is not set",
        ["NO_SUCH_KEY is not set"],
        [*ENDPOINT, "judge.args.endpoint={base_url: 'http://127.0.0.1:9/v1', api_key_env: NO_SUCH_KEY}"],
    ),
    Mistake(
        "a prompt of its own that is missing",
        ["nothing.yaml"],
        [*ENDPOINT, "judge.args.endpoint.base_url=http://127.0.0.1:9/v1", "judge.args.prompt={root}/nothing.yaml"],
    ),
    Mistake(
        "a remote judge that is not there",
        ["http://127.0.0.1:9/judge", "connection refused"],
        ["judge.use=remote", "judge.args.url=http://127.0.0.1:9/judge"],
    ),
    Mistake(
        "an endpoint within an ensemble",
        ["http://127.0.0.1:9/judge", "connection refused"],
        ["judge.use=ensemble", "judge.args.judges=[{use: remote, args: {url: 'http://127.0.0.1:9/judge'}}]"],
    ),
    Mistake("an empty ensemble", ["ensemble", "at least one"], ["judge.use=ensemble", "judge.args.judges=[]"]),
    Mistake(
        "a judge on more GPUs than there are",
        ["serve.tensor_parallel_size = 4096"],
        ["judge.use=pairwise", "judge.args.model=m", "judge.args.serve.tensor_parallel_size=4096"],
    ),
    Mistake("a pattern that is none", ["regex"], ["judge.use=regex", "judge.args.pattern='('"]),
]

OFFLINE = [
    Mistake("no data", ["nothing.jsonl"], ["data.path={root}/nothing.jsonl"]),
    Mistake("data of one completion", ["'rejected'"], [], put("pairs.jsonl", '{"prompt": "a", "chosen": "b"}\n')),
    Mistake("pairs of one text", ["no pair can be used"], [], put("pairs.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "b"}\n')),
    Mistake("all pairs held out", ["data.heldout", "lower"], ["data.heldout=8"]),
    Mistake("a format of other data", ["data.format"], ["data.format=unpaired"]),
    Mistake("examples for a loss of pairs", ["unpaired", "dpo.loss=kto"], ["data.path={root}/examples.jsonl"]),
    Mistake(
        "examples of one kind",
        ["all 8 examples have the label true", "other label"],
        ["data.path={root}/one.jsonl", "dpo.loss=kto"],
        lambda root: rows(root / "one.jsonl", [{"prompt": f"T {i}", "completion": "ok", "label": True} for i in range(8)]),
    ),
    Mistake("a label that is none", ["label"], ["data.path={root}/one.jsonl", "dpo.loss=kto"], put("one.jsonl", '{"prompt": "a", "completion": "b", "label": "good"}\n')),
    Mistake("a margin of scores that are not there", ["data.min_margin", "score_chosen"], ["data.min_margin=1"]),
    Mistake("a margin that no pair has", ["data.min_margin"], ["data.min_margin=9"], put("pairs.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 7, "score_rejected": 6}\n')),
    Mistake("a model that is quantized", ["quantized (awq)"], [], edit("config.json", quantization_config=AWQ)),
    Mistake("an adapter for data", ["only an adapter"], [], both(ADAPTER, remove(WEIGHTS))),
    Mistake("targets that are not there", ["target_modules"], ["dpo.adapter.target_modules=[c_attn]"]),
    Mistake("the section of a run", ["iterdpo run"], ["prompts.path=x"]),
    Mistake(
        "a tokenizer with own code for data",
        ["tokenizer needs its own Python code"],
        [],
        edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own"),
    ),
]  # fmt: skip

RUN = [*CONFIGURATION, *MACHINE, *MODEL, *PROMPTS, *JUDGE]


@pytest.mark.parametrize("mistake", map(case, RUN))
def test_a_mistake_in_a_run_is_one_line(mistake: Mistake, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mistake.damage(root)
    message = refusal("run", root, mistake.overrides, capsys)
    assert [word for word in mistake.words if word not in message] == [], message


@pytest.mark.parametrize("mistake", map(case, OFFLINE))
def test_a_mistake_in_an_offline_round_is_one_line(
    mistake: Mistake, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mistake.damage(root)
    message = refusal("train", root, mistake.overrides, capsys)
    assert [word for word in mistake.words if word not in message] == [], message


def test_they_are_more_than_a_hundred_and_distinct() -> None:
    assert len({mistake.what for mistake in [*RUN, *OFFLINE]}) == len(RUN) + len(OFFLINE) > 100


ANSWERS = [
    ({"status": 404, "body": '{"error": "model m does not exist"}'}, ["HTTP 404", "check model ('m') and base_url"]),
    ({"status": 400, "body": '{"error": "max_tokens is not supported"}'}, ["HTTP 400", "check model and extra"]),
    ({"status": 200, "body": "<html>Welcome to nginx</html>"}, ["not JSON", "base_url"]),
    ({"status": 301, "body": ""}, ["HTTP 301", "base_url"]),
]


@pytest.mark.parametrize(("answer", "words"), ANSWERS)
def test_an_endpoint_that_refuses_is_asked_once(
    answer: dict[str, Any], words: list[str], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeEndpoint(lambda body: answer) as endpoint:
        message = refusal("run", root, [*ENDPOINT, f"judge.args.endpoint.base_url={endpoint.base_url}"], capsys)
        assert endpoint.requests == (3 if answer["status"] == 200 else 1)  # a reply that was cut off may come whole
    assert [word for word in words if word not in message] == [], message


def test_a_key_that_is_refused_is_named_by_its_variable_and_never_shown(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_SUCH_KEY", "sk-old")
    with FakeEndpoint(lambda body: "A", api_key="sk-new") as endpoint:
        own = f"judge.args.endpoint={{base_url: '{endpoint.base_url}', api_key_env: NO_SUCH_KEY, cache: 'off'}}"
        message = refusal("run", root, ["judge.use=pairwise", "judge.args.model=m", own], capsys)
    assert "the key in $NO_SUCH_KEY (api_key_env) was refused" in message
    assert "sk-" not in message


@pytest.mark.parametrize("answer", [{"status": 503}, {"status": 429}, "A"])
def test_an_endpoint_that_answers_or_is_overloaded_passes(
    answer: Any, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeEndpoint(lambda body: answer) as endpoint:
        status, out, err = said("run", root, [*ENDPOINT, f"judge.args.endpoint.base_url={endpoint.base_url}"], capsys)
    assert (status, err) == (0, "")
    assert "next: round-000/evaluation" in out


@pytest.mark.parametrize("command", ["run", "train"])
def test_a_disk_that_is_too_small_is_refused(
    command: str, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(root)._replace(free=4096)
    monkeypatch.setattr("shutil.disk_usage", lambda path: full)
    message = refusal(command, root, [], capsys)
    assert "the disk has 0.0 MiB free" in message
    assert "dpo.save_dtype=bfloat16" in message


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/api", "http://user:secret@127.0.0.1:9/api", "http://no-such-host.invalid/api"]
)
def test_a_prefect_server_that_is_gone_is_named_by_its_variable(
    url: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with temporary_settings({PREFECT_API_URL: url}):  # Prefect reads the variable when it is imported
        message = refusal("run", root, [], capsys)
    assert "PREFECT_API_URL = http://" in message
    assert "unset PREFECT_API_URL" in message
    assert "secret" not in message


def test_a_gpu_that_is_not_there_is_named(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "97")
    assert "CUDA_VISIBLE_DEVICES names GPU 97" in refusal("run", root, [], capsys)
