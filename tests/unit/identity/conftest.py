"""One coordinator a file: members are cheap, an event loop is not."""

from collections.abc import Iterator

import pytest
from tests.unit.identity.office import Office, opened, standing_by


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    """A coordinator that serves."""
    with opened(tmp_path_factory.mktemp("identity") / "small.identity") as made:
        yield made


@pytest.fixture(scope="module")
def front(office: Office) -> Iterator[str]:
    """The address of a coordinator that stands by, and passes calls on to the office's."""
    with standing_by(office) as address:
        yield address
