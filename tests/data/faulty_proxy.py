"""A proxy between a client and an HTTP server that answers some requests badly."""

import http.client
import socket
import struct
import threading
import time
from collections import Counter, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ERROR = b"<Error><Code>InternalError</Code><Message>We met an internal error.</Message></Error>"


class FaultyProxy:
    """Runs while its `with` does, and notes what was asked.

    Each GET of a key that ends with `suffix` takes the next of `faults`: `500`, `503`, `cut` (half
    the body, then a reset), `refuse` (a reset before any answer), `short` (half the body, as if it
    were all), `flip` (a wrong byte in the middle), `slow` (half the body, then nothing for
    `slow_s`), or `""`.
    """

    def __init__(self, server: str, suffix: str = ".parquet", slow_s: float = 3.0) -> None:
        self.server = server.removeprefix("http://")
        self.suffix = suffix
        self.slow_s = slow_s
        self.faults: deque[str] = deque()
        self.always = ""
        self.delay_s = 0.0
        self.asked: list[str] = []
        """Key and range of each GET of such a key: `shard-00000.parquet 4-903`."""
        self.met: Counter[str] = Counter()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy.answer(self)

            def do_HEAD(self) -> None:
                proxy.answer(self)

            def do_PUT(self) -> None:
                proxy.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                del format, args

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that hung up is what this is for."""

        self._http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "FaultyProxy":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(10)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Pass a request on, and its answer back, more or less."""
        length = int(request.headers.get("Content-Length") or 0)
        content = request.rfile.read(length) if length else None
        fault = ""
        path = request.path.partition("?")[0]
        if request.command == "GET" and path.endswith(self.suffix):
            given = request.headers.get("Range", "all").removeprefix("bytes=")
            self.asked.append(f"{path.rpartition('/')[2]} {given}")
            fault = self.faults.popleft() if self.faults else self.always
            time.sleep(self.delay_s)
        if fault:
            self.met[fault] += 1
        if fault == "refuse":
            return _reset(request)
        if fault in ("500", "503"):
            request.send_response(int(fault))
            request.send_header("Content-Length", str(len(ERROR)))
            request.end_headers()
            request.wfile.write(ERROR)
            return None
        connection = http.client.HTTPConnection(self.server, timeout=30)
        connection.request(request.command, request.path, content, dict(request.headers))
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        sent = body[: len(body) // 2] if fault == "short" else body
        if fault == "flip":
            half = len(body) // 2
            sent = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        request.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "date"):
                request.send_header(name, value)
        head_length = answer.getheader("Content-Length", "0")
        size = head_length if request.command == "HEAD" else str(len(sent))
        request.send_header("Content-Length", size)
        request.end_headers()
        if fault in ("cut", "slow"):
            request.wfile.write(body[: len(body) // 2])
            request.wfile.flush()
            if fault == "slow":
                time.sleep(self.slow_s)
            return _reset(request)
        request.wfile.write(sent)
        return None


def _reset(request: BaseHTTPRequestHandler) -> None:
    """Close the connection with a reset, not with a goodbye."""
    request.close_connection = True
    linger = struct.pack("ii", 1, 0)
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    request.connection.close()
