"""Warning about a version of distributed that the package is not tested with."""

from __future__ import annotations

import configparser
import warnings
from collections.abc import Iterator
from pathlib import Path

import distributed
import pytest

import agentcluster
from agentcluster.config import TESTED, warn_untested


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    warn_untested.cache_clear()
    yield
    warn_untested.cache_clear()


def caught(monkeypatch: pytest.MonkeyPatch, version: str) -> list[str]:
    monkeypatch.setattr(distributed, "__version__", version)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_untested()
        warn_untested()
    assert all(each.category is UserWarning for each in found)
    return [str(each.message) for each in found]


@pytest.mark.parametrize("version", ["2026.7.0", "2025.12.9", "2026.9.0", "2027.1.0", "2026.9.0+3.gabc", "0+unknown"])
def test_other_version_warns_once(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    assert caught(monkeypatch, version) == [
        f"agentcluster is tested with distributed 2026.7.1 to 2026.8.*, and {version} is installed: some functions may "
        f"not work"
    ]


@pytest.mark.parametrize("version", ["2026.7.1", "2026.7.2", "2026.8.0", "2026.8.31", "2026.8.0+12.gabc"])
def test_tested_version_does_not_warn(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    assert caught(monkeypatch, version) == []


def test_first_tested_version_is_the_first_that_installs() -> None:
    setup = configparser.ConfigParser()
    setup.read(Path(agentcluster.__file__).parents[1] / "setup.cfg")
    first = ".".join(map(str, TESTED[0]))
    required = setup["options"]["install_requires"].split()
    assert {f"dask>={first}", f"distributed>={first}"} <= set(required)
