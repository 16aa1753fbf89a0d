from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def caches_are_those_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What commands remember between runs stays out of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
