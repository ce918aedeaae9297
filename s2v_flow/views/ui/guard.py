"""Who may ask: a page that this server gave out itself, with the token; and what browsers are told not to do."""

from __future__ import annotations

import hmac
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Passes on what comes to this machine's own name, from no other page, with the token.

    The token is the query of the page's first address, a cookie that this one sets (HttpOnly, SameSite=Strict), or
    `Authorization: Bearer TOKEN`.

    Args:
        app: What is guarded.
        token: The secret.
        port: The one that is listened on.
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
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if is_first and refusal is None:
                    headers.append("Set-Cookie", f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Strict")
            await send(message)

        await (refusal or self._app)(scope, receive, send_guarded)

    def _refusal(self, asked: HTTPConnection[Any], is_first: bool) -> JSONResponse | None:
        host, origin = asked.headers.get("host"), asked.headers.get("origin")
        if host not in self._hosts or origin not in (None, f"http://{host}"):
            return JSONResponse({"error": "this address answers its own page only"}, 403)
        scheme, _, bearer = asked.headers.get("authorization", "").partition(" ")
        given = bearer if scheme.lower() == "bearer" else asked.cookies.get(self._cookie)
        given = asked.query_params["token"] if is_first else given
        if not given:
            return JSONResponse({"error": "open the address that `s2vflow ui` printed: it holds the token"}, 401)
        if not hmac.compare_digest(given.encode(), self._token.encode()):
            return JSONResponse({"error": "the token is of another start: open the newest address"}, 403)
        return None
