"""A server of Prefect's own for tests, for those that call flows directly."""

from collections.abc import Iterator

import pytest
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, PREFECT_HOME, temporary_settings
from prefect.testing.utilities import prefect_test_harness


# Of a module: pytest takes this folder, which is no package, for a part of the whole run. Prefect's threads would live on
# and draw from `random` while a later test of hypothesis draws its examples, which hypothesis refuses.
@pytest.fixture(scope="module")
def temporary_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with (
        temporary_settings({PREFECT_HOME: tmp_path_factory.mktemp("prefect")}),
        prefect_test_harness(server_startup_timeout=90),
        # Each flow run would wait a second for the heartbeat's thread.
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        yield
