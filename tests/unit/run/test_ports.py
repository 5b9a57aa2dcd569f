"""A free port, and a server that answers or does not."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from iterdpo.run.ports import answers, free_port


def test_a_free_port_can_be_listened_on() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))
        listener.listen()


@pytest.mark.parametrize(("status", "expected"), [(200, True), (404, False), (503, False)])
def test_a_server_answers_if_its_status_is_200(status: int, expected: bool) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert answers(f"http://127.0.0.1:{server.server_port}/health") is expected
        thread.join()


def test_a_port_that_nothing_listens_on_does_not_answer() -> None:
    assert not answers(f"http://127.0.0.1:{free_port()}/health")
