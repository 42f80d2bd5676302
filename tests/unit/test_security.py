"""Credentials of a cluster from what users give."""

from __future__ import annotations

from typing import Any

import pytest
from distributed.security import Security

from agentcluster.errors import ConfigError
from agentcluster.security import resolve_credentials


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "security={} has no credentials"),
        ({"require_encryption": False}, "security={require_encryption} has no credentials"),
        ({"tls_cafile": "ca.pem"}, "security= cannot be made of tls_cafile"),
    ],
)
def test_a_mapping_never_turns_encryption_off(given: dict[str, Any], says: str, remote: bool) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_credentials(given, remote=remote, attached=[])
    assert str(caught.value).startswith(says)
    assert caught.value.key == "security"


def test_who_wants_none_says_so() -> None:
    assert not resolve_credentials(False, remote=True, attached=[]).tls_ca_file


@pytest.mark.parametrize("given", [True, {"require_encryption": True}])
def test_encryption_stays_on(given: Any) -> None:
    assert resolve_credentials(given, remote=False, attached=[]).require_encryption


def test_a_mapping_is_that_of_the_class() -> None:
    found = resolve_credentials({"tls_ca_file": "ca.pem", "tls_client_cert": "c.pem"}, remote=True, attached=[])
    assert isinstance(found, Security)
    assert (found.tls_ca_file, found.tls_client_cert) == ("ca.pem", "c.pem")
