"""`dasae serve`: the reports, and nothing else."""

import http.client
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from pipeline.artefacts.workspace import Workspace
from pipeline.cli import app
from pipeline.errors import BadInputError
from pipeline.report.server import ReportServer

SECRET = "what nobody may see"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReportServer]:
    """A server of two reports, with secrets beside them."""
    folder = tmp_path_factory.mktemp("served")
    reports = folder / "workspace" / "reports"
    for name in ("study", "study-beside-b.2"):
        (reports / name).mkdir(parents=True)
        (reports / name / "index.html").write_text(f"<h1>{name}</h1>")
        (reports / name / "results.csv").write_text("arm\n")
        (reports / name / "notes.txt").write_text(SECRET)
    elsewhere = folder / "elsewhere"
    for place in (folder, folder / "workspace", reports, folder / "workspace" / "saes", elsewhere):
        place.mkdir(exist_ok=True)
        (place / "index.html").write_text(SECRET)
        (place / "results.csv").write_text(SECRET)
    (reports / "linked").symlink_to(elsewhere)
    (reports / "inside").mkdir()
    (reports / "inside" / "index.html").symlink_to(folder / "index.html")
    with ReportServer(Workspace(folder / "workspace"), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: ReportServer, path: str, method: str = "GET", host: str | None = None) -> tuple[int, str, str]:
    """Status, type and content of an answer; the path is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    connection.putrequest(method, path, skip_host=host is not None)
    if host is not None:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, answer.getheader("Content-Type", ""), content


def test_it_shows_a_list_the_pages_and_their_numbers(server: ReportServer) -> None:
    status, kind, page = ask(server, "/")
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert '<a href="/study/">study</a>' in page
    assert '<a href="/study-beside-b.2/">study-beside-b.2</a>' in page
    assert ask(server, "/study/") == (200, "text/html; charset=utf-8", "<h1>study</h1>")
    assert ask(server, "/study%2Dbeside-b.2/?x") == (200, "text/html; charset=utf-8", "<h1>study-beside-b.2</h1>")
    assert ask(server, "/study/results.csv") == (200, "text/csv; charset=utf-8", "arm\n")
    assert ask(server, "/study/", "HEAD") == (200, "text/html; charset=utf-8", "")
    assert ask(server, "/study")[0] == 301


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE"])
def test_it_only_reads(server: ReportServer, method: str) -> None:
    assert ask(server, "/study/", method)[0] == 501


def test_other_files_and_what_links_lead_to_stay_hidden(server: ReportServer) -> None:
    hidden = [
        "/study/notes.txt",
        "/study/results.json",
        "/study/manifest.json",
        "/study/x/y",
        "/none/",
        "/study//",
        "/index.html/",
        "/index.html/index.html",
    ]
    outside = [
        "/../index.html",
        "/study/../../saes/",
        "/%2e%2e/",
        "/..%2fsaes/",
        "/study/..%2f..%2findex.html",
        "/study/%00",
    ]
    for path in [*hidden, *outside]:
        status, _, page = ask(server, path)
        assert (status, SECRET in page) == (404, False), path
    for path in ("/linked/", "/linked/results.csv", "/inside/"):
        status, _, page = ask(server, path)
        assert (status, SECRET in page) == (500, False), path


@given(st.lists(st.sampled_from(["..", ".", "", "study", "saes", "reports", "linked", "index.html", "%2e%2e", "%2F", "\\"])))
def test_no_path_leads_to_a_secret(server: ReportServer, parts: list[str]) -> None:
    assert SECRET not in ask(server, "/" + "/".join(parts))[2]


def test_a_page_of_the_web_cannot_read_them_under_its_own_name(server: ReportServer) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        assert ask(server, "/study/", host=host)[0] == 403, host
    for host in ("localhost", "localhost:8000", "127.0.0.1", "[::1]:80"):
        assert ask(server, "/study/", host=host)[0] == 200, host


def test_what_is_no_address_gets_an_answer(server: ReportServer, capfd: pytest.CaptureFixture[str]) -> None:
    for path, host in (
        ("//[x/", "localhost"),
        ("/", "["),
        ("/", "[x]"),
        ("study", "localhost"),
        ("/" + "x" * 9000, "localhost"),
    ):
        assert ask(server, path, host=host)[0] in (301, 400, 403, 404), (path[:9], host)
    assert "Traceback" not in capfd.readouterr().err


def test_its_address_is_one_for_a_browser(server: ReportServer, tmp_path: Path) -> None:
    assert server.url == f"http://127.0.0.1:{server.server_address[1]}"
    with ReportServer(Workspace(tmp_path), "0.0.0.0", 0) as everywhere:
        assert everywhere.url == f"http://{socket.gethostname()}:{everywhere.server_address[1]}"


def test_an_address_that_cannot_be_used_is_one_line(server: ReportServer, tmp_path: Path) -> None:
    port = server.server_address[1]
    with pytest.raises(
        BadInputError, match=rf"^port {port} of 127\.0\.0\.1 is in use; choose another with --port or --host$"
    ):
        ReportServer(Workspace(tmp_path), "127.0.0.1", port)
    with pytest.raises(BadInputError, match=r"^port 80 of 192\.0\.2\.1 cannot be used: Cannot assign requested address; "):
        ReportServer(Workspace(tmp_path), "192.0.2.1", 80)
    refused = CliRunner().invoke(app, ["serve", "--workspace", str(tmp_path), "--port", str(port)])
    assert isinstance(refused.exception, BadInputError)


def test_the_command_says_where_until_it_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: ReportServer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ReportServer, "serve_forever", interrupted)
    done = CliRunner().invoke(app, ["serve", "--workspace", str(tmp_path), "--port", "0"])
    assert done.exit_code == 0
    address = done.output.split(" are at ")[1].split("/ until")[0]
    assert done.output.endswith(f"export DASAE_REPORTS={address}\n")
