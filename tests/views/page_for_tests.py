"""A page that serves a folder, for tests: started as a program, or inside a thread of this one."""

from __future__ import annotations

import http.client
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from s2v_flow.api import Options
from s2v_flow.views.ui.app import serve

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Open:
    """A page that is being served."""

    address: str

    @property
    def port(self) -> int:
        return urlsplit(self.address).port or 0

    @property
    def token(self) -> str:
        return self.address.partition("token=")[2]

    def ask(
        self, path: str, body: Any = None, method: str | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Send a request as it stands, with the token unless other headers say otherwise: status, headers, body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = body if body is None or isinstance(body, bytes) or hasattr(body, "__next__") else json.dumps(body)
        given = {"Authorization": f"Bearer {self.token}"} if headers is None else dict(headers)
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, sent, given)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, found, answer.read()
        finally:
            connection.close()

    def json(self, path: str, body: Any = None, method: str | None = None) -> Any:
        """Send a request that is granted, and return what came."""
        status, _, text = self.ask(path, body, method)
        assert status < 300, text
        return json.loads(text)

    def state(self) -> dict[str, Any]:
        """Return the first event: jobs, what runs, the log."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/api/events", headers={"Authorization": f"Bearer {self.token}"})
        line = connection.getresponse().readline()
        connection.close()
        return json.loads(line.removeprefix(b"data: "))


@contextmanager
def served(options: Options, words: tuple[str, ...] = (), **more: Any) -> Iterator[Open]:
    """Serve the current folder from a thread."""
    found: queue.Queue[Any] = queue.Queue()
    given = {"is_ready": found.put, "on_server": found.put, **more}
    thread = threading.Thread(target=serve, args=(options, words, 0), kwargs=given)
    thread.start()
    server, address = found.get(timeout=30), found.get(timeout=30)
    try:
        yield Open(address)
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def started(folder: Path, **variables: object) -> Iterator[tuple[Open, subprocess.Popen[str]]]:
    """Start `s2vflow ui` in a folder as a program, with its cache there; it is interrupted at the end."""
    command = [sys.executable, "-m", "s2v_flow", "ui", "--no-browser"]
    own = {"PYTHONPATH": ROOT, "S2VFLOW_DEFAULTS": "", "S2VFLOW_CACHE_DIR": folder / "cache", **variables}
    environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as program:
        assert program.stdout is not None
        try:
            yield Open(program.stdout.readline().strip()), program
        finally:
            program.send_signal(signal.SIGINT)
            program.communicate(timeout=120)
