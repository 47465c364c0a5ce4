"""`moegrid dashboard`: a grid's report, made anew when it is looked at, on the loopback interface, behind a token."""

from __future__ import annotations

import hmac
import secrets
import threading
import time
import webbrowser
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from orchestrator.commands import again
from orchestrator.commands.context import Context
from orchestrator.errors import EXIT_DONE, MoegridError
from orchestrator.plan.root import root_document

HOST = "127.0.0.1"
# A page is made again at most this often, however many look at it.
FRESH_SECONDS = 5.0


def dashboard(context: Context) -> int:
    """Serve the report of a grid until Ctrl-C; the address with its token is printed once."""
    from orchestrator.report import html
    from orchestrator.report.collect import collect

    document = root_document(context.load_graph())
    command = again.command(context.arguments, "run")

    def page() -> str:
        return html.page(collect(document, context.store), command=command, live=True)

    token = secrets.token_urlsafe(24)
    server = open_server(page, token, context.arguments.port)
    address = f"http://{HOST}:{server.server_address[1]}/?token={token}"
    context.console.print(f"dashboard: {address}   (Ctrl-C ends it)")
    if context.arguments.open:
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        context.console.print("dashboard ended; the grid goes on")
    finally:
        server.server_close()
    return EXIT_DONE


def open_server(page: Callable[[], str], token: str, port: int) -> ThreadingHTTPServer:
    """Return a server of `page` at /?token=TOKEN on the loopback interface; MoegridError when the port is taken."""
    made: list[tuple[float, bytes]] = []
    lock = threading.Lock()

    def fresh() -> bytes:
        with lock:
            if not made or time.monotonic() - made[0][0] > FRESH_SECONDS:
                made[:] = [(time.monotonic(), page().encode())]
            return made[0][1]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            given = parse_qs(asked.query).get("token", [""])[0]
            # Another page's script may reach this address under a name of its own: only ours is answered.
            name = self.headers.get("Host", "").rpartition(":")[0]
            if name not in (HOST, "localhost") or not hmac.compare_digest(given.encode(), token.encode()):
                self._send(403, "text/plain; charset=utf-8", b"the address needs the token that was printed\n")
            elif asked.path != "/":
                self._send(404, "text/plain; charset=utf-8", b"there is one page: /\n")
            else:
                try:
                    body = fresh()
                except MoegridError as error:
                    self._send(503, "text/plain; charset=utf-8", f"{error}\n".encode())
                    return
                self._send(200, "text/html; charset=utf-8", body)

        def _send(self, code: int, kind: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: the token is in every line."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        hint = "end what listens there, or name another with --port (0: any that is free)"
        raise MoegridError(f"port {port} cannot be used", cause=str(error), hint=hint) from error
