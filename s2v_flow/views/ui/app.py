"""The page's server: its calls, which docs/ui.md describes, who may ask, and how it starts."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from s2v_flow import api
from s2v_flow.cache.store import Store, StoredObject
from s2v_flow.errors import ExitCode, MissingError, RecipeError, RefusedError, S2VFlowError, UsageError
from s2v_flow.files.atomic import writing
from s2v_flow.files.lock import held
from s2v_flow.history.compare import compare
from s2v_flow.history.find import Listing, find, list_runs, run_ids
from s2v_flow.history.text import listing_json
from s2v_flow.runs.essence import essence_in
from s2v_flow.runs.manifest import Manifest
from s2v_flow.runs.record import runs_root
from s2v_flow.start.project import write_recipe
from s2v_flow.views.ui import roots
from s2v_flow.views.ui.form import FOLDER, Desk, Wish
from s2v_flow.views.ui.jobs import Queue, child_environment, command_text
from s2v_flow.wording import mistakes_text

Call = Callable[[Request], Any]
_PAGE = Path(__file__).parent / "page"
_REPORTS = FOLDER / "reports"
_MAX_BODY_BYTES = 1 << 20
_MAX_PATH = 4096
_MAX_SHOWN = 60  # runs
_LOOK_SECONDS, _BEAT_SECONDS = 0.5, 15.0
_STATUS = {ExitCode.REFUSED: 403, ExitCode.MISSING: 404}
_REPORT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data:; "
    "media-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class _Answer(JSONResponse):
    """JSON in ASCII, as no other form has names that are no UTF-8."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


class Gallery:
    """The runs of a cache folder, for a list with search; and their videos."""

    def __init__(self, cache_root: Path) -> None:
        self._root, self._store = runs_root(cache_root), Store(cache_root)
        self._seen: list[tuple[Path, int]] = []
        self._runs: list[dict[str, Any]] = []

    def search(self, text: str) -> dict[str, Any]:
        """Return the newest runs in which every word occurs: name, settings, outputs, state, time."""
        seen = [(path, path.stat().st_mtime_ns) for path in self._root.glob("*/manifest.json") if path.exists()]
        if seen != self._seen or any(run["status"] == "running" for run in self._runs):
            self._seen, self._runs = seen, self._all(list_runs(self._root))
        words = text.lower().split()
        found = [run for run in self._runs if all(word in run["text"] for word in words)]
        shown = [{key: value for key, value in run.items() if key != "text"} for run in found[:_MAX_SHOWN]]
        return {"runs": shown, "total": len(self._runs), "found": len(found)}

    def _all(self, listing: Listing) -> list[dict[str, Any]]:
        runs = []
        for told, run in zip(listing_json(listing)["runs"], listing.runs, strict=True):
            params = {key[7:]: value for key, value in run.recipe.values.items() if key.startswith("params.")}
            videos = [f"/api/runs/{run.id}/videos/{number}" for number, _ in enumerate(self._videos(run))]
            runs.append({**told, "params": params, "videos": videos, "quality": run.quality})
            runs[-1]["text"] = json.dumps({**runs[-1], "videos": []}, ensure_ascii=False).lower()
        return runs

    def run(self, name: str) -> Manifest:
        """Return a run by its id.

        Raises:
            MissingError: There is none.
        """
        if name not in run_ids(self._root):
            raise MissingError(f"there is no run {name!r}")
        found = find(self._root, name)
        assert isinstance(found, Manifest)
        return found

    def video(self, name: str, number: int) -> Path:
        """Return a run's video as the cache keeps it.

        Raises:
            MissingError: There is none, or it was evicted.
        """
        videos = self._videos(self.run(name))
        if not 0 <= number < len(videos):
            raise MissingError(f"{name} has no video {number} in the cache any more")
        return videos[number]

    def _videos(self, run: Manifest) -> list[Path]:
        nodes = {node.name: node.outputs for node in run.nodes}
        digests = [nodes[item.node].get("file") for item in run.outputs if item.name.endswith(".mp4")]
        paths = (self._store.object_path(StoredObject(digest, 0, ".mp4")) for digest in digests if digest)
        return [path for path in paths if path.is_file()]


class Page:
    """The calls of the current folder's page; see `serve` for the arguments."""

    def __init__(self, options: api.Options, words: Sequence[str], max_upload_bytes: int) -> None:
        self._options, self._words, self._max_upload_bytes = options, tuple(words), max_upload_bytes
        self._runs = runs_root(options.cache_root)
        self._roots = {"work": Path.cwd(), "runs": self._runs}
        self._desk, self._gallery = Desk(options, self._roots), Gallery(options.cache_root)
        self._queue, self._naming = Queue(FOLDER / "queue.json", words), asyncio.Lock()
        self.is_closing: Callable[[], bool] = lambda: False

    def app(self) -> Starlette:
        """Return the application, without its guard."""
        calls: dict[tuple[str, str], Call] = {
            ("GET", "/"): _static("page.html"),
            **{("GET", f"/{name}"): _static(name) for name in ("page.css", "page.js", "icon.svg")},
            ("GET", "/files/{root}/{path:path}"): self._file,
            ("PUT", "/api/uploads/{name:path}"): self._upload,
            ("GET", "/api/recipes"): _looking(self._recipes),
            ("POST", "/api/form"): _wishing(self._desk.form),
            ("POST", "/api/plan"): _wishing(self._plan),
            ("POST", "/api/jobs"): self._add,
            ("POST", "/api/jobs/{id:int}/{what}"): self._change,
            ("GET", "/api/events"): self._events,
            ("GET", "/api/runs"): _looking(lambda asked: self._gallery.search(asked.query_params.get("search", ""))),
            ("GET", "/api/runs/{run}/videos/{number:int}"): self._video,
            ("POST", "/api/runs/{run}/report"): self._report,
            ("GET", "/api/compare"): _looking(self._compare),
        }
        routes = [Route(path, call, methods=[method]) for (method, path), call in calls.items()]
        handlers = dict.fromkeys((S2VFlowError, ClientDisconnect), _explain)
        return Starlette(routes=routes, lifespan=self._living, exception_handlers=handlers)

    @asynccontextmanager
    async def _living(self, app: Starlette) -> AsyncIterator[None]:
        work = asyncio.create_task(self._queue.work())
        yield
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work
        await self._queue.close()

    async def _file(self, request: Request) -> Response:
        path = roots.file_below(self._roots, request.path_params["root"], request.path_params["path"], roots.SHOWN)
        if path.suffix.lower() != ".html":
            return FileResponse(path)
        if path.parent != _REPORTS.resolve():
            raise RefusedError(f"{path.name}: of web pages, only reports are given out")
        return FileResponse(path, headers={"Content-Security-Policy": _REPORT_POLICY})

    async def _upload(self, request: Request) -> Response:
        limit, name = self._max_upload_bytes, request.path_params["name"]
        if int(request.headers.get("content-length", 0)) > limit:
            raise roots.TooLargeError(f"{name}: more than {limit >> 20} MiB")
        path = await roots.save_upload(request.stream(), name, FOLDER / "inputs", limit, made_here=FOLDER / "out")
        suffix = path.suffix.lower()
        kind = "image" if suffix in roots.PICTURES else "audio" if suffix in roots.SOUNDS else "video"
        is_ours = kind == "video" and await run_in_threadpool(essence_in, path) is not None
        return _Answer({"path": path.as_posix(), "kind": "recipe" if is_ours else kind}, 201)

    def _recipes(self, request: Request) -> dict[str, Any]:
        return {"folder": str(Path.cwd()), "recipes": self._desk.recipes()}

    def _plan(self, wish: Wish) -> dict[str, Any]:
        planned, path, text = self._desk.plan(wish)
        command = command_text(path, self._words)
        return {"plan": planned.to_json(), "path": path.as_posix(), "command": command, "recipe": text}

    async def _add(self, request: Request) -> Response:
        wish = Wish.read(await _body(request))
        async with self._naming:  # two tabs at once get two names
            planned, path, text = await run_in_threadpool(self._desk.plan, wish)
            api.require_files(planned)
            write_recipe(path, text)
        known = {name: max(cost.seconds, 0.01) for name, cost in planned.estimate.nodes.items()}
        return _Answer(asdict(self._queue.add(path, {} if planned.estimate.unknown else known)), 201)

    async def _change(self, request: Request) -> Response:
        self._queue.change(request.path_params["id"], request.path_params["what"])
        return _Answer({"jobs": [asdict(job) for job in self._queue.jobs]})

    async def _events(self, request: Request) -> Response:
        return StreamingResponse(self._changes(), media_type="text/event-stream")

    async def _changes(self) -> AsyncIterator[str]:
        """Yield the queue whenever something has happened, with the lines of the log that are new."""
        seen, told, beat, is_whole = -1, 0, 0.0, True
        while not self.is_closing():
            if seen != self._queue.changes or beat > _BEAT_SECONDS:
                seen, beat = self._queue.changes, 0.0
                lines = [text for number, text in self._queue.log if number > told]
                told = self._queue.log[-1][0] if self._queue.log else told
                live = None if self._queue.live is None else self._queue.live.to_json()
                if live is not None and live["preview"]:
                    live["preview"] = os.path.relpath(live["preview"], self._runs)
                jobs = [asdict(job) for job in self._queue.jobs]
                state = {"jobs": jobs, "live": live, "log": lines, "is_whole": is_whole}
                yield f"data: {json.dumps(state)}\n\n"
                is_whole = False
            await asyncio.sleep(_LOOK_SECONDS)
            beat += _LOOK_SECONDS

    async def _video(self, request: Request) -> Response:
        run, number = request.path_params["run"], request.path_params["number"]
        path = await run_in_threadpool(self._gallery.video, run, number)
        return FileResponse(path, media_type="video/mp4")

    def _compare(self, request: Request) -> dict[str, Any]:
        a, b = (self._gallery.run(request.query_params.get(name, "")).id for name in "ab")
        found = compare(a, b, self._options)
        return {**found.to_json(), "text": found.to_text()}

    async def _report(self, request: Request) -> Response:
        run = self._gallery.run(request.path_params["run"]).id
        target = _REPORTS / f"{run}.html"
        with writing(_REPORTS):
            _REPORTS.mkdir(exist_ok=True)
            target.unlink(missing_ok=True)
        words = ("report", run, "-o", str(target), "--cache-dir", str(self._options.cache_root))
        pipes: dict[str, Any] = dict.fromkeys(("stdout", "stderr"), asyncio.subprocess.PIPE)
        made = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "s2v_flow", *words, env=child_environment(), **pipes
        )
        _, err = await made.communicate()
        if made.returncode:
            raise S2VFlowError(err.decode(errors="replace").strip())
        return _Answer({"report": f"/files/work/{target.as_posix()}"}, 201)


def _static(name: str) -> Call:
    return lambda request: FileResponse(_PAGE / name)


def _looking(work: Callable[[Request], Any]) -> Call:
    """Return a call that answers with what a function finds, in a thread."""

    async def answer(request: Request) -> Response:
        return _Answer(await run_in_threadpool(work, request))

    return answer


def _wishing(work: Callable[[Wish], Any]) -> Call:
    """Return a call that answers with what a function makes of the wish that was sent, in a thread."""

    async def answer(request: Request) -> Response:
        return _Answer(await run_in_threadpool(work, Wish.read(await _body(request))))

    return answer


async def _body(request: Request) -> Mapping[str, Any]:
    """Return the JSON object that was sent; another thing is refused, and more than any recipe has."""
    text, found = b"", None
    async for part in request.stream():
        text += part
        if len(text) > _MAX_BODY_BYTES:
            raise roots.TooLargeError("more than any request needs")
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
    if not isinstance(found, dict):
        raise UsageError("a JSON object is expected")
    return found


async def _explain(request: Request, error: Exception) -> Response:
    if not isinstance(error, S2VFlowError):
        return Response(status_code=400)  # nobody reads it: the sender has left
    text = mistakes_text(error) if isinstance(error, RecipeError) and error.diagnostics else error.message
    status = 413 if isinstance(error, roots.TooLargeError) else _STATUS.get(error.exit_code, 422)
    return _Answer({"error": text, "fix": error.fix}, status)


class Guard:
    """Passes on what comes to this machine's own name, from no other page, with the token.

    The token is the query of the page's first address, a cookie that this one sets (HttpOnly, SameSite=Strict), or
    `Authorization: Bearer TOKEN`.
    """

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self._app, self._token, self._cookie = app, token, f"s2vflow_{port}"
        self._hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403 to another Host or Origin and to a wrong token, 401 to none."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        asked = HTTPConnection(scope)
        is_first = scope["path"] == "/" and "token" in asked.query_params
        refusal = self._refusal(asked, is_first)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if is_first and refusal is None:
                    headers.append("Set-Cookie", f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Strict")
            await send(message)

        await (refusal or self._app)(scope, receive, send_guarded)

    def _refusal(self, asked: HTTPConnection[Any], is_first: bool) -> JSONResponse | None:
        host, origin = asked.headers.get("host"), asked.headers.get("origin")
        if host not in self._hosts or origin not in (None, f"http://{host}"):
            return _Answer({"error": "this address answers its own page only"}, 403)
        scheme, _, bearer = asked.headers.get("authorization", "").partition(" ")
        given = bearer if scheme.lower() == "bearer" else asked.cookies.get(self._cookie)
        given = asked.query_params["token"] if is_first else given
        if len(asked.scope["path"]) > _MAX_PATH:
            return _Answer({"error": "no address of this page is as long"}, 414)
        if not given:
            return _Answer({"error": "open the address that `s2vflow ui` printed: it holds the token"}, 401)
        if not hmac.compare_digest(given.encode(), self._token.encode()):
            return _Answer({"error": "the token is of another start: open the newest address"}, 403)
        return None


def serve(
    options: api.Options,
    words: Sequence[str],
    port: int,
    *,
    is_ready: Callable[[str], None],
    max_upload_bytes: int = 1 << 30,
    on_server: Callable[[uvicorn.Server], None] = lambda server: None,
) -> None:
    """Serve the page of the current folder until a signal comes; what runs then leaves a resume point.

    Args:
        options: Where things are, as every command has it; recipes, inputs and results lie in the current folder.
        words: The same as options of the command line, for runs.
        port: Where to listen on 127.0.0.1; 0: any free port.
        is_ready: Called with the address, token included, once connections are taken.
        max_upload_bytes: How large a file may be that is dropped on the page.
        on_server: Called with the server before; its `should_exit` ends it.

    Raises:
        S2VFlowError: The port is taken, or another page serves this folder, or the folder cannot be written.
    """
    lock = FOLDER / ".lock"
    with writing(FOLDER):
        FOLDER.mkdir(exist_ok=True)
        lock.touch()
    with ExitStack() as stack:
        if not stack.enter_context(held(lock, waits=False)):
            fix = "use its address, or end it; or work in another folder"
            raise UsageError("another s2vflow ui serves this folder", fix)
        page = Page(options, words, max_upload_bytes)
        try:
            listening = stack.enter_context(socket.create_server(("127.0.0.1", port)))
        except OSError as error:
            fix = "name another one with --port, or none: then any that is free is taken"
            raise UsageError(f"port {port}: {error.strerror}", fix) from error
        port, token = listening.getsockname()[1], secrets.token_urlsafe(32)
        app = Guard(page.app(), token, port)
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", access_log=False, ws="none", server_header=False)
        )
        page.is_closing = lambda: server.should_exit
        on_server(server)
        is_ready(f"http://127.0.0.1:{port}/?token={token}")
        server.run(sockets=[listening])
