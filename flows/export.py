"""`iterdpo export`: a policy, or the pairs of a round, as a directory to serve, to share and to load without the run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast

from iterdpo.errors import ConfigError, RunFailed, UserError
from iterdpo.escape import printable
from iterdpo.gate import best_record
from iterdpo.report.card import pairs_card, policy_card
from iterdpo.run.read import Run, read_run
from iterdpo.run.rundir import check_step, fsync, read_json, sync_tree, write_json
from iterdpo.run.sums import MANIFEST, RECORD

Dtype = Literal["float32", "bfloat16", "float16"]
OWN = {MANIFEST, RECORD, "train_log.jsonl", "train.json", "eval_metrics.json", "optimizer.pt", "README.md"}
"""Files of a step that are the run's own: what is exported is without them."""


def export_policy(
    run_dir: str | Path,
    output: str | Path,
    *,
    round: int | None = None,
    merge: bool = False,
    dtype: Dtype | None = None,
) -> Path:
    """Write the policy of `round`, by default that of the best promoted one, to the new directory `output`, with a model card.

    It has the weights, the tokenizer and its template, and the generation settings; every user of the machine may read
    it. `merge`: an adapter is added to its base, and a whole checkpoint comes of it. `dtype` of the weights: by default
    that of the policy. All of `output` is there, or nothing.

    Raises:
        UserError: no such run or round, a damaged policy, or a directory that is not new.
    """
    from iterdpo.training.models import ADAPTER_CONFIG

    run = read_run(run_dir)
    round, policy = _policy(run, round)
    adapter = (policy / ADAPTER_CONFIG).exists()
    if merge and not adapter:
        raise ConfigError(f"--merge: {policy} is no adapter, and has nothing to merge; leave it out")
    check_step(policy)
    with _new_directory(Path(output)) as fresh:
        trusted = bool(run.config["model"].get("trust_remote_code"))
        dtype = dtype or _dtype(policy)
        if merge:
            _merge(policy, fresh, dtype=dtype, trust_remote_code=trusted)
        for file in policy.iterdir():
            if file.is_file() and file.name not in OWN and not (merge and file.name.startswith("adapter_")):
                _copy(file, fresh / file.name, dtype=dtype)
        if adapter and not merge:
            _name_base(fresh / ADAPTER_CONFIG, str(run.config["model"]["path"]))
        card = policy_card(run, round, adapter=adapter and not merge, dtype=dtype)
        (fresh / "README.md").write_text(card, encoding="utf-8")
    return Path(output)


def export_pairs(run_dir: str | Path, output: str | Path, *, round: int | None = None) -> Path:
    """Write the pairs of `round`, by default the last that has any, to the new directory `output`, with a card.

    Raises:
        UserError: no such run or round, damaged pairs, or a directory that is not new.
    """
    run = read_run(run_dir)
    if round is None:
        there = [r for r in run.dir.rounds() if (run.dir.round_dir(r) / "pairs" / MANIFEST).exists()]
        round = max(there, default=1)
    pairs = run._step(round, "pairs")
    check_step(pairs)
    with _new_directory(Path(output)) as fresh:
        for file in pairs.glob("*.parquet"):
            shutil.copyfile(file, fresh / file.name)
        (fresh / "README.md").write_text(pairs_card(run, round, fresh), encoding="utf-8")
    return Path(output)


def push(directory: Path, repo: str, *, kind: Literal["model", "dataset"], public: bool = False) -> str:
    """Upload an exported directory to a hub (HF_ENDPOINT; by default huggingface.co), and return the page's address.

    A repository that does not exist is created, for its owner alone unless `public`. The token is HF_TOKEN, or that of
    `hf auth login`.

    Raises:
        UserError: the name of the repository is invalid, or the hub refuses.
        RunFailed: the hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    unanswered = cast("type[Exception]", HfHubHTTPError.__bases__[0])  # the HTTP client's, httpx's or another's
    try:
        api.create_repo(repo, repo_type=kind, private=not public, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=directory, repo_type=kind, commit_message="iterdpo export")
    except (HFValidationError, OfflineModeIsEnabled) as error:
        raise ConfigError(f"--push {printable(repo)}: {printable(str(error))}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = "; set HF_TOKEN to a token that may write there" if status in (401, 403) else ""
        why = printable(str(error).strip().splitlines()[0])
        raise UserError(f"--push {repo}: the hub refuses ({why}){remedy}. {directory} is complete") from None
    except (OSError, unanswered) as error:
        raise RunFailed(f"--push {repo}: the hub does not answer ({error}); {directory} is complete") from None
    return str(done.repo_url)


@contextmanager
def _new_directory(output: Path) -> Iterator[Path]:
    """A directory under way beside `output`, which gets that name, on disk and readable by all, if nothing fails."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output}: is there already; delete it, or give another directory")
    fresh = output.with_name(f".{output.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)  # of an export that was killed
    fresh.mkdir(parents=True)
    try:
        yield fresh
        for path in (fresh, *fresh.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        sync_tree(fresh)
        os.replace(fresh, output)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    fsync(output.absolute().parent)


def _policy(run: Run, round: int | None) -> tuple[int, Path]:
    records = run.dir.records()
    if round is None:
        if not records:
            run.policy()  # says what there is
        round = best_record(records).policy_round
    if round == 0:
        which = "no round was promoted, so the policy is" if records else "round 0 has"
        raise UserError(f"{run.root}: {which} the initial checkpoint; choose a round with --round")
    return round, run.policy(round)


def _dtype(policy: Path) -> Dtype:
    """The precision of a policy's weights."""
    from safetensors import safe_open

    names: dict[str, Dtype] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    for file in sorted(policy.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # no mapping
                if (kind := names.get(tensors.get_slice(name).get_dtype())) is not None:
                    return kind
    return "float32"


def _copy(file: Path, target: Path, *, dtype: Dtype) -> None:
    """A file of the policy, with weights in `dtype` and a config.json that says so."""
    if file.suffix == ".safetensors":
        import torch
        from safetensors import safe_open
        from safetensors.torch import save_file

        with safe_open(file, framework="pt") as tensors:
            weights = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  # no mapping
        as_asked = {n: w.to(getattr(torch, dtype)) if w.is_floating_point() else w for n, w in weights.items()}
        save_file(as_asked, target, metadata={"format": "pt"})
    elif file.name == "config.json":
        write_json(target, {**read_json(file), "dtype": dtype})
    else:
        shutil.copyfile(file, target)


def _merge(adapter: Path, output: Path, *, dtype: Dtype, trust_remote_code: bool) -> None:
    import torch

    from iterdpo.sampling.worker import merge_adapter

    try:
        merge_adapter(adapter, output, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{adapter}: cannot be merged: {error}") from None


def _name_base(adapter_config: Path, base: str) -> None:
    """An adapter names its base as the configuration does, if that is a hub id, and not where it lay here."""
    if not Path(base).exists():
        write_json(adapter_config, {**read_json(adapter_config), "base_model_name_or_path": base})
