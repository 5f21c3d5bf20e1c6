"""Tells which hosts are this machine alone."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`.

    host: a name or an address without brackets and port.
    """
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
