"""Files by URL, on fsspec's store in memory and on a web server of this machine."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.registry import known_implementations

from iterdpo.data.prompts import place_of, read_prompts
from iterdpo.data.rows import load_rows, located_rows, source_digest, source_stamp
from iterdpo.errors import ConfigError, DataError
from iterdpo.run.checkpoints import check_checkpoint, resolve_checkpoint
from iterdpo.run.remote import Remote, is_url


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ITERDPO_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "files"
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def put(name: str, *rows: Any) -> str:
    """The URL of a file with these rows, or texts, as lines."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    fsspec.filesystem("memory").pipe_file(f"/{name}", "".join(f"{line}\n" for line in lines).encode())
    return f"memory://{name}"


class Server(http.server.ThreadingHTTPServer):
    """A web server for the files in `folder`; `gets` are the requests for a file itself."""

    def __init__(self, folder: Path) -> None:
        self.gets: list[str] = []
        self.cut_short = False
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.gets.append(self.path)
        if self.server.cut_short:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"prompt": "half')
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "www").mkdir()
    with Server(tmp_path / "www") as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("s3://bucket/a.jsonl", True),
        ("gs://bucket", True),
        ("zip://a.jsonl::https://host/a.zip", True),
        ("simplecache::s3://bucket/a.jsonl", True),
        ("owner/data", False),
        ("data/a:b.jsonl", False),
        ("/data/s3://a.jsonl", False),
    ],
)
def test_a_url_is_told_from_a_path_and_a_hub_id(path: str, url: bool) -> None:
    assert is_url(path) is url


def test_a_file_by_url_has_the_rows_and_the_digest_of_the_same_file_here(tmp_path: Path) -> None:
    url = put("data/a.jsonl", {"prompt": "2+2?"}, {"prompt": "3+3?"})
    (tmp_path / "b.jsonl").write_bytes(fsspec.filesystem("memory").cat_file("/data/a.jsonl"))
    assert list(load_rows(url, "train")) == list(load_rows(str(tmp_path / "b.jsonl"), "train"))
    assert source_digest(url, "train") == source_digest(str(tmp_path / "b.jsonl"), "train")
    assert source_stamp(url, "train") is None  # it is small
    assert [where for where, _ in located_rows(url, "train")] == [f"{url}: row 1", f"{url}: row 2"]


def test_of_a_directory_by_url_the_files_of_the_split_are_read_under_their_own_urls() -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl", "README.md", "MANIFEST.json", "old/train.jsonl"):
        put(f"data/{name}", {"prompt": name})
    found = [(where, row["prompt"]) for where, row in located_rows("memory://data/", "train") if isinstance(row, dict)]
    assert found == [(f"memory://data/train-{n}.jsonl: row 1", f"train-{n}.jsonl") for n in range(2)]
    with pytest.raises(DataError, match=r"^memory://data: no file is named for split 'dev', only test\.jsonl, train-0"):
        load_rows("memory://data", "dev")


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("a.jsonl", ['{"prompt": "x"}', '{"prompt": '], r"^memory://a\.jsonl:2: not valid JSON"),
        ("a.csv", ["prompt,gold", "x,1", "y"], r"^memory://a\.csv:3: the number of fields differs"),
        ("a.parquet", ["PAR1 not"], r"^memory://a\.parquet: cannot be read as Parquet"),
        ("a.jsonl.gz", ["not gzip"], r"^memory://a\.jsonl\.gz: cannot be read \(Not a gzipped"),
        ("a.txt", ["hello"], r"^memory://a\.txt: unknown kind of file"),
        ("a.json", ['{"columns": [], "index": [], "data": []}'], r"^memory://a\.json: the file is one object"),
        ("a.jsonl", [], r"^memory://a\.jsonl: no rows in it"),
    ],
)
def test_a_bad_file_is_named_by_its_url_and_line(name: str, lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(load_rows(put(name, *lines), "train"))


def test_a_copy_is_made_once_and_replaced_if_the_file_changes(cache: Path) -> None:
    url = put("a.jsonl", {"prompt": "old"})
    first = Remote(url).copies(["a.jsonl"], replace=True)
    assert Remote(url).copies(["a.jsonl"], replace=True) == first
    other = Remote(put("b.jsonl", {"prompt": "b"})).copies(["b.jsonl"], replace=True)
    put("a.jsonl", {"prompt": "new"})
    second = Remote(url).copies(["a.jsonl"], replace=True)
    assert (second / "a.jsonl").read_text() == '{"prompt": "new"}\n'
    assert set(cache.iterdir()) == {second, other}
    assert first != second


def test_prompts_by_url_are_read_and_found_again(tmp_path: Path) -> None:
    from iterdpo.config import PromptsConfig

    url = put("p/prompts.jsonl", *({"prompt": f"question {i}"} for i in range(3)))
    prompts, rows = read_prompts(url, cache=tmp_path / "prompts.cache")
    assert (len(prompts), rows) == (3, 3)
    config = PromptsConfig(path=url)
    assert config.path == url
    assert place_of(list(prompts)[1], config) == f"{url}: row 2"


def test_a_checkpoint_by_url_is_a_directory_with_its_files_which_stays(tiny_model: Path, cache: Path) -> None:
    memory = fsspec.filesystem("memory")
    for file in (*filter(Path.is_file, tiny_model.iterdir()), tiny_model / "notes.pdf"):
        memory.pipe_file(f"/models/{file.name}", file.read_bytes() if file.exists() else b"")
    local = resolve_checkpoint("memory://models")
    assert check_checkpoint(local) == check_checkpoint(tiny_model)
    assert not (local / "notes.pdf").exists()
    config = json.loads((tiny_model / "config.json").read_text())
    put("models/config.json", json.dumps(config | {"another": 1}))
    assert resolve_checkpoint("memory://models") != local  # which a run may be using
    assert local.is_dir()
    put("only/a.jsonl", {"prompt": "x"})
    for url in ("memory://only/", "memory://only/a.jsonl"):
        with pytest.raises(
            ConfigError, match=r"model\.path 'memory://only.*no directory with the files of a checkpoint"
        ):
            resolve_checkpoint(url)


def test_a_web_server_is_asked_for_a_file_once_until_it_changes(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "www" / "a.jsonl"
    file.write_text('{"prompt": "old"}\n')
    url = f"{server.url}/a.jsonl?download=true"
    for _ in range(2):
        assert list(load_rows(url, "train")) == [{"prompt": "old"}]
    assert server.gets == ["/a.jsonl?download=true"]
    file.write_text('{"prompt": "new"}\n')
    os.utime(file, (1, 1))
    assert [where for where, _ in located_rows(url, "train")] == [f"{url}: row 1"]
    assert list(load_rows(url, "train")) == [{"prompt": "new"}]
    assert len(server.gets) == 2


def test_what_a_web_server_does_not_give_whole_is_refused_and_leaves_nothing(
    server: Server, tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(DataError, match=r"^http://127\S+/none\.jsonl: cannot be read \(.*404"):
        load_rows(f"{server.url}/none.jsonl", "train")
    (tmp_path / "www" / "a.jsonl").write_text('{"prompt": "x"}\n')
    server.cut_short = True
    with pytest.raises(DataError, match=r"/a\.jsonl: cannot be read \(.*; check the URL, your credentials"):
        load_rows(f"{server.url}/a.jsonl", "train")
    assert list(cache.iterdir()) == []
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match=r"/a\.jsonl: cannot be read \(.*Cannot connect"):
        load_rows(f"{server.url}/a.jsonl", "train")


def test_a_file_that_has_another_size_than_the_store_says_is_refused_and_leaves_nothing(cache: Path) -> None:
    put("pairs/a.jsonl", {"prompt": "x"})
    remote = Remote("memory://pairs/a.jsonl")
    remote._infos["a.jsonl"]["size"] += 1  # it is written while it is copied
    with pytest.raises(DataError, match=r"memory://pairs/a\.jsonl: cannot be read .* bytes of a\.jsonl came"):
        remote.copies(["a.jsonl"])
    assert list(cache.iterdir()) == []


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"class": "stores_of_nobody.FileSystem", "err": "Install it"}
    monkeypatch.setitem(known_implementations, "nobody", known)
    with pytest.raises(ConfigError) as caught:
        load_rows("nobody://bucket/a.jsonl", "train")
    version = fsspec.__version__
    assert str(caught.value) == (
        "nobody://bucket/a.jsonl: the package stores_of_nobody is not installed; run: pip install stores_of_nobody "
        f"fsspec=={version}"
    )


def test_an_unknown_kind_of_url_and_a_missing_file_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^s4://b/a\.jsonl: no such kind of URL is known; write s3://"):
        load_rows("s4://b/a.jsonl", "train")
    with pytest.raises(DataError, match=r"^memory://none/a\.jsonl: cannot be read \(FileNotFoundError"):
        load_rows("memory://none/a.jsonl", "train")
