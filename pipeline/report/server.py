"""Serves the reports of a workspace to browsers: a list of them, their pages and the numbers beside, and nothing else."""

import errno
import ipaddress
import re
import socket
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.artefacts.local_files import refuse_outside
from pipeline.artefacts.storage import RECORD_BYTES
from pipeline.artefacts.workspace import REPORTS, Workspace
from pipeline.errors import BadInputError, PipelineError
from pipeline.study.experiment import NAME
from pipeline.study.reports import PAGE

HTML, JSON, CSV = "text/html; charset=utf-8", "application/json", "text/csv; charset=utf-8"
TEXT = "text/plain; charset=utf-8"
FILES = {
    PAGE: HTML,
    "findings.md": TEXT,
    **dict.fromkeys(("results.json", "comparison.json"), JSON),
    **dict.fromkeys(("results.csv", "differences.csv", "comparison.csv"), CSV),
}
"""The files of a report that are served, and their types."""
NAMES = re.compile(f"{NAME.pattern}(-beside-{NAME.pattern})?")
"""Names of reports."""
WILDCARDS = ("", "0.0.0.0", "::")  # noqa: S104 - only compared with


class ReportServer(ThreadingTCPServer):
    """Listens at `host` and `port`; port 0 takes a free one. Raises BadInputError where it cannot.

    At a loopback address it refuses requests that name another host: a page of the web could otherwise have its own name
    point here, and read the reports through the visitor's browser.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, workspace: Workspace, host: str, port: int):
        self.workspace, self.host = workspace, host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Request)
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
            raise BadInputError(f"port {port} of {host} {reason}; choose another with --port or --host") from None
        self.only_here = _is_loopback(str(self.server_address[0]))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """The address for a browser."""
        name = socket.gethostname() if self.host in WILDCARDS else self.host
        return f"http://{f'[{name}]' if ':' in name else name}:{self.server_address[1]}"

    def reports(self) -> list[str]:
        """Names of all reports."""
        found = (name.split("/") for name in self.workspace.place(REPORTS).sizes())
        return sorted({parts[0] for parts in found if parts[1:] == [PAGE] and NAMES.fullmatch(parts[0])})

    def file(self, report: str, name: str) -> bytes:
        """A file of a report. Raises FileNotFoundError, and BadInputError if a link leads out of the folder of reports."""
        if not NAMES.fullmatch(report) or name not in FILES:
            raise FileNotFoundError(name)
        if not self.workspace.remote:
            folder = self.workspace.local / REPORTS
            refuse_outside(folder / report / name / "x", folder)
        return self.workspace.report(report).read(name, RECORD_BYTES)


class _Request(BaseHTTPRequestHandler):
    server: ReportServer  # pyright: ignore[reportIncompatibleVariableOverride] - no other starts it
    timeout = 30
    server_version, sys_version = "dasae", ""

    def do_GET(self) -> None:
        """The list of reports at /, a page at /REPORT/, a file at /REPORT/FILE."""
        self._answer()

    def do_HEAD(self) -> None:
        """The same without the content."""
        self._answer()

    def _answer(self) -> None:
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
            parts = [unquote(part) for part in urlsplit(self.path).path.removeprefix("/").split("/")]
            if self.server.only_here and not _is_loopback(host):
                self.send_error(HTTPStatus.FORBIDDEN, "Use the address that dasae serve printed")
            elif parts == [""]:
                self._send(_list_page(self.server.reports()), HTML)
            elif len(parts) == 1 and NAMES.fullmatch(parts[0]):
                self._redirect(f"/{parts[0]}/")
            elif len(parts) == 2:
                name = parts[1] or PAGE
                self._send(self.server.file(parts[0], name), FILES[name])
            else:
                self.send_error(HTTPStatus.NOT_FOUND)
        except FileNotFoundError:
            self.send_error(HTTPStatus.NOT_FOUND)
        except PipelineError as error:
            self.log_error("%s", error)
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, "The report cannot be read; dasae serve says why")
        except ValueError:  # what urlsplit cannot read
            self.send_error(HTTPStatus.BAD_REQUEST)

    def _send(self, content: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _redirect(self, place: str) -> None:
        self.send_response(HTTPStatus.MOVED_PERMANENTLY)
        self.send_header("Location", place)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Only errors are told."""


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _list_page(names: list[str]) -> bytes:
    """An HTML page with a link to each report."""
    links = "".join(f'<li><a href="/{name}/">{name}</a></li>' for name in names)
    body = f"<ul>{links}</ul>" if names else "<p>No report yet; dasae report EXPERIMENT writes one.</p>"
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Reports</title><h1>Reports</h1>{body}'.encode()
