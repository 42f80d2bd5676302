"""Load the fixtures and hooks of all tests, which are in :mod:`tests.support.plugin`."""

import pytest

pytest.register_assert_rewrite("tests.support")

pytest_plugins = ["tests.support.plugin"]
