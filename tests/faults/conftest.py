import pytest
from faulty import Extraction, many_shards, started
from small_study import Study


@pytest.fixture(scope="session")
def fresh(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Extraction:
    """A study with many shards of which only the model is there. Read only."""
    return many_shards(study, tmp_path_factory.mktemp("fresh"))


@pytest.fixture(scope="session")
def finished(fresh: Extraction, tmp_path_factory: pytest.TempPathFactory) -> Extraction:
    """The same, extracted without any disturbance. Read only."""
    extraction = fresh.copy(tmp_path_factory.mktemp("finished") / "ws")
    process = started(extraction)
    process.join()
    assert process.exitcode == 0
    return extraction
