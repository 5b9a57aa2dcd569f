"""A port for a server on this machine, and whether it answers. For the servers that a run starts itself."""

from __future__ import annotations

import socket
import urllib.request


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(url: str) -> bool:
    """Whether a GET of `url` is answered with status 200 within five seconds."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:  # URLError and HTTPError are OSErrors
        return False
