"""One coordinator a file: members are cheap, an event loop is not."""

from collections.abc import Iterator

import pytest
from tests.unit.identity.office import Office, opened


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    """A coordinator that serves."""
    with opened(tmp_path_factory.mktemp("identity") / "small.identity") as made:
        yield made
