"""Fixtures of pure tests: nothing is started, so nothing is counted."""

import pytest


@pytest.fixture(autouse=True)
def leaks() -> None:
    """Take no census, which would be most of the time of a pure test."""
