from pathlib import Path

import pytest

from tests.train.builders import make_shards, toy_samples


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model folder; tests read it only."""
    from phi3v_train.tiny import init_tiny

    return init_tiny(tmp_path_factory.mktemp("models") / "tiny", seed=1).path


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of twelve samples of no, one and two images; tests read them only."""
    return make_shards(tmp_path_factory.mktemp("toy"), toy_samples())
