"""How the stages run under Prefect: what flows and tasks are made of. The flows themselves are in `flows.py`."""

import os

# Prefect reads both when it is imported; either alone leaves some telemetry on.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
