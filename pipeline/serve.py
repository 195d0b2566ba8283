"""The command `dasae serve`."""

from contextlib import suppress
from typing import Annotated

import typer
from rich.console import Console

from pipeline.front import DEFAULT_WORKSPACE, REPORTS_VARIABLE, open_workspace
from pipeline.options import WorkspaceOption

HostOption = Annotated[
    str, typer.Option("--host", help="Address to listen at. At another than the default, others can read.")
]
PortOption = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen at; 0 takes a free one.")]


def serve(workspace: WorkspaceOption = DEFAULT_WORKSPACE, host: HostOption = "127.0.0.1", port: PortOption = 4300) -> None:
    """Show the reports in a browser, until Ctrl-C. It only reads."""
    from pipeline.report.server import ReportServer

    opened = open_workspace(workspace)
    say = Console(markup=False, highlight=False, soft_wrap=True).print
    with suppress(KeyboardInterrupt), ReportServer(opened, host, port) as server:
        say(f"the reports of {opened.root} are at {server.url}/ until Ctrl-C")
        say(f"where the Prefect worker starts: export {REPORTS_VARIABLE}={server.url}")
        server.serve_forever()
