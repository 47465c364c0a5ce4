"""An HTTP proxy before the S3 lab that answers, from one request on, as a server in trouble does."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HANG_SECONDS = 5.0
_CODES = {
    "403": (403, "AccessDenied"),
    "expired token": (400, "ExpiredToken"),
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "no bucket": (404, "NoSuchBucket"),
}
FAULTS = (*_CODES, "garbage", "empty", "time-out", "closed", "cut short")


class FaultyProxy:
    """Passes requests on, each after `delay` seconds, until one fits; from then on all meet the fault, until `mend`."""

    def __init__(self, target_port: int, *, delay: float = 0.0) -> None:
        self._target = target_port
        self._what, self._part, self._method = "", "", ""
        self._active = ""
        self.met = 0  # requests that met the fault
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if what := proxy._fault(self.command, self.path):
                    proxy._misbehave(self, what)
                    return
                time.sleep(delay)
                upstream = http.client.HTTPConnection("127.0.0.1", proxy._target, timeout=60)
                try:
                    upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                    for name, value in self.headers.items():
                        upstream.putheader(name, value)
                    upstream.endheaders(body or None)
                    answer = upstream.getresponse()
                    content = answer.read()
                    self.send_response(answer.status)
                    for name, value in answer.getheaders():
                        if name.lower() not in ("transfer-encoding", "connection", "date", "server", "content-length"):
                            self.send_header(name, value)
                    length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
                    self.send_header("Content-Length", length or "0")
                    self.end_headers()
                    if self.command != "HEAD":
                        self.wfile.write(content)
                finally:
                    upstream.close()

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one

            def log_message(self, *arguments: object) -> None:
                return

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *arguments: object) -> None:
                return  # a client that went away

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def fail(self, what: str, part: str, method: str = "") -> None:
        """Answer as `what` from the first request on whose path holds `part` (and that has this method)."""
        self._what, self._part, self._method, self._active, self.met = what, part, method, "", 0

    def mend(self) -> None:
        """Pass everything on again."""
        self._what = self._active = ""

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def _fault(self, method: str, path: str) -> str:
        if self._what and self._part in path and self._method in ("", method):
            self._active = self._what
        self.met += bool(self._active)
        return self._active

    def _misbehave(self, request: BaseHTTPRequestHandler, what: str) -> None:
        request.close_connection = True
        if what in ("time-out", "closed"):
            end = time.monotonic() + (HANG_SECONDS if what == "time-out" else 0.0)
            while self._active and time.monotonic() < end:
                time.sleep(0.05)
            return
        status, code = _CODES.get(what, (200, ""))
        body = b"" if what == "empty" else b"<html><body>the gateway is busy</body></html>"
        if code:
            body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>no</Message></Error>'.encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/xml" if code else "text/html")
        request.send_header("Content-Length", str(1000 if what == "cut short" else len(body)))
        request.send_header("Connection", "close")
        request.end_headers()
        if request.command != "HEAD":
            with contextlib.suppress(OSError):
                request.wfile.write(body)
