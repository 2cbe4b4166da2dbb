"""Cohorts of a test's own."""

import pytest
from tests.unit.secure_sum.cohort import Cohort


@pytest.fixture
def three() -> Cohort:
    return Cohort(3, bound=1000)


@pytest.fixture
def four() -> Cohort:
    return Cohort(4, bound=1000)
