"""Steps of `prefect deploy`, which prefect.yaml names."""

import shlex
import sys


def interpreter() -> dict[str, str]:
    """The Python that deploys. A worker starts runs with it."""
    return {"python": shlex.quote(sys.executable)}
