"""`pytest tests/transcripts --rewrite`: record the transcripts anew; read the diff afterwards."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite", action="store_true", help="record the transcripts anew")


@pytest.fixture
def rewrite(pytestconfig: pytest.Config) -> bool:
    # Known only where this folder is named on the command line.
    return bool(pytestconfig.getoption("--rewrite", default=False))
