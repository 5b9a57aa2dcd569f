"""Files on object storage or a web server, by URL (`s3://bucket/pairs.parquet`), as local copies; through fsspec.

A copy is made once, in `default_cache()`, and again if the file changes: by its ETag, or by all that the store says of it
if there is none. Credentials and endpoints are those that fsspec's packages find in the environment and their files.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from iterdpo.errors import ConfigError, DataError
from iterdpo.escape import printable
from iterdpo.run.folder import default_cache
from iterdpo.run.rundir import digest, sync_tree

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")


def is_url(path: str) -> bool:
    return URL.match(path) is not None


class Remote:
    """A file, or a directory of files, at a URL. `files` are their names.

    Raises:
        ConfigError: no such kind of URL, or its package is not installed.
        DataError: nothing is there, or it cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        with _explained(url):
            from fsspec.core import url_to_fs

            self._fs, path = url_to_fs(url, **_options(url))
            self._fs.invalidate_cache()  # listings of an earlier start
            info = self._fs.info(path)
            self.is_directory = info["type"] == "directory"
            found = self._fs.ls(path, detail=True) if self.is_directory else [info | {"name": path}]
        self._infos = {_name(info["name"]): info for info in found if info["type"] == "file"}
        self.files = sorted(self._infos)

    def copies(self, names: Sequence[str], *, replace: bool = False) -> Path:
        """A local directory with the files `names`. With `replace`, copies of what they were before are removed."""
        infos = [self._infos[name] for name in names]
        key, stamp = digest([self.url, *names]), digest([_stamp(info) for info in infos])
        cache = default_cache() / "files"
        place = cache / f"{key}-{stamp}"
        if place.is_dir():
            return place
        with _explained(self.url):
            cache.mkdir(parents=True, exist_ok=True)
            fresh = Path(tempfile.mkdtemp(prefix=".", dir=cache))
            try:
                self._fs.get([info["name"] for info in infos], [str(fresh / name) for name in names])
                for name, info in zip(names, infos, strict=True):
                    if (size := (fresh / name).stat().st_size) != (info.get("size") or size):
                        raise OSError(f"{size:,} of {info['size']:,} bytes of {name} came; was it written meanwhile?")
                sync_tree(fresh)
                if replace:
                    for old in set(cache.glob(f"{key}-*")) - {place}:
                        shutil.rmtree(old, ignore_errors=True)
                with suppress(OSError):  # another process was quicker
                    os.replace(fresh, place)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
        return place


def _name(path: str) -> str:
    """The file's name: `a.jsonl` of `https://host/data/a.jsonl?download=true`."""
    return PurePosixPath(path.partition("?")[0]).name or "data"


def _stamp(info: dict[str, Any]) -> list[Any]:
    """What changes if the file does. The URL that a redirect ends at may differ each time."""
    tag = info.get("ETag") or info.get("etag")
    rest = {k: str(v) for k, v in info.items() if k not in ("name", "url", "mimetype", "partial")}
    return [info.get("size"), str(tag)] if tag else [rest]


def _options(url: str) -> dict[str, Any]:
    if not re.match(r"https?://", url, re.IGNORECASE):
        return {}
    import aiohttp

    # by default a download may take five minutes, and knows no proxy
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=120)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}}


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Errors of fsspec, and of the packages below it, as those of a user."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"{url}: {_missing(url, error)}") from None
    except Exception as error:  # every kind of storage has errors of its own
        if str(error).startswith("Protocol not known"):
            raise ConfigError(
                f"{url}: no such kind of URL is known; write s3://, gs://, abfs://, https:// or hf://"
            ) from None
        cause = error.__cause__ or error
        reason = printable(str(cause).strip().partition("\n")[0])[:300]
        raise DataError(
            f"{url}: cannot be read ({type(cause).__name__}: {reason}); check the URL, your credentials for it, and the network"
        ) from error


def _missing(url: str, error: ImportError) -> str:
    import fsspec
    from fsspec.registry import known_implementations

    kinds = [part.partition("://")[0].lower() for part in url.split("::")]
    needed = {known_implementations[k]["class"].partition(".")[0] for k in kinds if k in known_implementations} - {
        "fsspec"
    }
    if not needed:
        return printable(str(error))
    # a filesystem's package asks for one version of fsspec, and datasets does not work with every one
    packages = " ".join(sorted(needed))
    return f"the package {packages} is not installed; run: pip install {packages} fsspec=={fsspec.__version__}"
