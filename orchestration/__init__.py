"""Runs the stages under Prefect: tasks, engines, states. The flows are in `flows.py`."""

import os

# Prefect reads both when it is imported. Either alone leaves some telemetry on.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
