"""An S3 server in memory, and before it a proxy that harms one request of a case. Runs as a process of its own.

The first part of a URL's path names the case, so that lanes share one server: `AWS_ENDPOINT_URL=http://127.0.0.1:PORT/CASE`.
What shall happen is in `FOLDER/CASE.json`: `{"how": ..., "at": number}`; the requests that came are in `FOLDER/CASE.log`.
"""

import http.client
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

HOWS = ("before", "after", "lost", "cut", "twice", "stale", "silent", "outage")
"""`before`: 503, nothing done. `after`: done, then 500. `lost`: done, then the connection ends. `cut`: half of the answer.
`twice`: the request arrives twice. `stale`: a listing answers what it did at first. `silent`: no answer until the client
gives up. `outage`: 503 from here on."""
GIVE_UP = 45.0


class Proxy:
    """Counts requests by case and hands them on."""

    def __init__(self, folder: Path, backend: tuple[str, int]):
        self.folder, self.backend, self.lock = folder, backend, threading.Lock()
        self.counts: dict[str, int] = {}
        self.listings: dict[str, tuple[int, Any, bytes]] = {}

    def harm(self, case: str, line: str) -> str:
        """What shall happen to this request of a case, "" for nothing."""
        with self.lock:
            number = self.counts[case] = self.counts.get(case, 0) + 1
            with (self.folder / f"{case}.log").open("a") as log:
                log.write(f"{line}\n")
        try:
            plan = json.loads((self.folder / f"{case}.json").read_text())
        except FileNotFoundError:
            return ""
        hit = number >= plan["at"] if plan["how"] == "outage" else number == plan["at"]
        return plan["how"] if hit else ""

    def ask(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, Any, bytes]:
        connection = http.client.HTTPConnection(*self.backend, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def listed(self, path: str, answer: tuple[int, Any, bytes], harm: str) -> tuple[int, Any, bytes]:
        """The answer to a listing: the first one ever given to it where it shall be stale."""
        with self.lock:
            first = self.listings.setdefault(path, answer)
        return first if harm == "stale" else answer


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        _, case, rest = self.path.split("/", 2)
        path = f"/{rest}"
        harm = self.proxy.harm(case, f"{self.command} {path}")
        if harm in ("before", "outage"):
            self.say(503, [], b"<Error><Code>SlowDown</Code></Error>")
            return
        if harm == "silent":
            time.sleep(GIVE_UP)
            self.end()
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("connection", "host")}
        answer = self.proxy.ask(self.command, path, headers, body)
        if harm == "twice":
            answer = self.proxy.ask(self.command, path, headers, body)
        if self.command == "GET" and "list-type" in urlsplit(path).query:
            answer = self.proxy.listed(path, answer, harm)
        if harm == "lost":
            self.end()
        elif harm == "after":
            self.say(500, [], b"<Error><Code>InternalError</Code></Error>")
        else:
            self.say(*answer, half=harm == "cut")

    def say(self, status: int, headers: Any, content: bytes, *, half: bool = False) -> None:
        self.send_response_only(status)
        size = len(content)
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                size = int(value)
            elif name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if half else content)
        if half and content:
            self.wfile.flush()
            self.end()

    def end(self) -> None:
        self.close_connection = True
        self.connection.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any


class Server(ThreadingHTTPServer):
    """Says nothing of clients that go away."""

    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        pass


def main(folder: Path, parent: int) -> None:
    """Serve until the parent is gone; the port is written to `FOLDER/port`."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    Handler.proxy = Proxy(folder, (host, port))
    Handler.proxy.ask("PUT", "/bucket", {}, b"")
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (folder / "port.new").write_text(str(server.server_address[1]))
    (folder / "port.new").replace(folder / "port")
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
