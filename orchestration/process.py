"""The process of a deployed run, `python -m orchestration.process`, and the step of `prefect deploy` that names its Python.

Without a command in prefect.yaml a worker starts two processes, one after the other, and each imports Prefect for seconds.
"""

import os
import runpy
import shlex
import sys


def interpreter() -> dict[str, str]:
    """The Python that deploys. A worker starts runs with it."""
    return {"python": shlex.quote(sys.executable)}


if __name__ == "__main__":
    if os.getpid() != os.getsid(0):  # the first process of a container leads its session already
        os.setsid()  # what is sent to the worker's group, when its terminal closes, must not reach the run
    runpy.run_module("prefect.engine", run_name="__main__")
