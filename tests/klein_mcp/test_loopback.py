"""Tests which hosts count as this machine alone, for all that ask."""

import argparse

import pytest

from klein_mcp.cli.engine import listening_address
from klein_mcp.daemon.executors.node import checked_url
from klein_mcp.loopback import is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "127.255.0.9", "localhost", "LocalHost", "::1"])
def test_loopback_needs_neither_tls_nor_a_name(host: str) -> None:
    address = f"[{host}]" if ":" in host else host
    assert is_loopback(host)
    assert checked_url(f"http://{address}:8000") == f"http://{address}:8000"
    arguments = argparse.Namespace(listen=f"{address}:8000", certificate=None, key=None)
    assert listening_address("engine", arguments) == (host, 8000)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "128.0.0.1", "127.0.0", "localhost.example.org", "gpu"])
def test_other_hosts_are_no_loopback(host: str) -> None:
    assert not is_loopback(host)
