"""Download an image: https from public addresses only, within limits.

The name is resolved here once, each address is checked, and the connection goes to the checked address itself, so that
a name that later resolves to another address has no effect.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import SplitResult, urljoin, urlsplit
from urllib.parse import quote as percent_encode

from klein_mcp.errors import BadImage, Refused, one_line, quote

REDIRECTS = 5
SECONDS = 20.0
_CHUNK = 64 * 1024
_SAFE = "/%:@!$&'()*+,;=~?"

Resolve = Callable[[str, int], Sequence[str]]
"""Host and port -> addresses."""


def get(
    url: str,
    *,
    limit: int,
    resolve: Resolve | None = None,
    allowed: Callable[[str], bool] | None = None,
    context: ssl.SSLContext | None = None,
) -> bytes:
    """Return the body of `url`, at most `limit` bytes. Raises RequestError.

    resolve, allowed, context: for tests: the resolver, which addresses are public, the trusted certificates.
    """
    deadline = time.monotonic() + SECONDS
    for _ in range(REDIRECTS + 1):
        parts = _parsed(url)
        address = _public_address(parts, resolve or _resolve, allowed or is_public)
        try:
            answer = _ask(parts, address, context or ssl.create_default_context(), deadline, limit)
        except (OSError, http.client.HTTPException) as error:
            reason = one_line(str(error) or type(error).__name__, 120)
            raise BadImage(f"{quote(url)} cannot be fetched: {reason}.", hint="Try a file instead.") from None
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise BadImage(
        f"{quote(url)} redirects more than {REDIRECTS} times.", hint="Give the address it ends at, or a file."
    )


def is_public(address: str) -> bool:
    """Return whether an address is on the public internet.

    This machine, its networks and its cloud's metadata service are not.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        # IPv6 forms that carry an IPv4 address are judged by that address.
        carried = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None) or _embedded(ip)
        if carried is not None:
            return is_public(str(carried))
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast


def _embedded(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address inside a translated or compatible one."""
    networks = ("64:ff9b::/96", "64:ff9b:1::/48", "::ffff:0:0:0/96", "::/96")
    inside = any(ip in ipaddress.IPv6Network(network) for network in networks)
    return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if inside else None


def _parsed(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise BadImage(f"{quote(url)} is no valid URL.", hint="Check it, or send a file.") from None
    if parts.scheme.lower() != "https":
        raise Refused(f"{quote(url)} is not https.", hint="Use the https address, or a file.")
    if not parts.hostname or parts.username is not None or port == 0:
        raise BadImage(f"{quote(url)} is no valid URL.", hint="Check it, or send a file.")
    return parts


def _public_address(parts: SplitResult, resolve: Resolve, allowed: Callable[[str], bool]) -> str:
    host, port = parts.hostname or "", parts.port or 443
    try:
        addresses = list(resolve(host, port))
    except (OSError, UnicodeError):
        raise BadImage(f"The host {quote(host)} is not known.", hint="Check the address.") from None
    # All of them: a name with one private address among public ones is an attack, not an image host.
    if not addresses or not all(map(allowed, addresses)):
        raise Refused(f"The host {quote(host)} is not on the public internet.", hint="Save the image as a file.")
    return addresses[0]


def _resolve(host: str, port: int) -> list[str]:
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _ask(parts: SplitResult, address: str, context: ssl.SSLContext, deadline: float, limit: int) -> bytes | str:
    """Return the body, or the redirect target.

    Raises RequestError, OSError, HTTPException.
    """
    left = deadline - time.monotonic()
    connection = _Pinned(parts.hostname or "", address, parts.port or 443, context, max(left, 0.001))
    # A host that sends one byte now and then would outlive the timeout of any single read.
    cutter = threading.Timer(left, connection.cut)
    cutter.daemon = True
    cutter.start()
    try:
        path = percent_encode(parts.path or "/", safe=_SAFE) + (
            f"?{percent_encode(parts.query, safe=_SAFE)}" if parts.query else ""
        )
        # identity: a limit on bytes does not bound what a compressed body expands to.
        connection.request("GET", path, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308) and (where := response.getheader("Location")):
            return where
        if response.status != 200:
            raise BadImage(f"The host {quote(parts.hostname)} answered {response.status}.", hint="Check the address.")
        body = _body(response, limit)
        if time.monotonic() >= deadline:
            raise TimeoutError  # cut by the timer, which without a length looks like the end
        return body
    except (OSError, http.client.HTTPException):
        if time.monotonic() >= deadline:
            raise BadImage(f"The image took longer than {SECONDS:.0f} s.", hint="Save it as a file first.") from None
        raise
    finally:
        cutter.cancel()
        connection.close()


def _body(response: http.client.HTTPResponse, limit: int) -> bytes:
    body = bytearray()
    while len(body) <= limit and (chunk := response.read(_CHUNK)):
        body += chunk
    if len(body) > limit:
        raise BadImage(f"The image is larger than {limit // 2**20} MiB.", hint="Use a smaller copy.")
    if response.length:
        raise BadImage("The image was cut short in transfer.", hint="Try again.")
    return bytes(body)


class _Pinned(http.client.HTTPSConnection):
    """A connection to a checked address, verified by the host's name."""

    def __init__(self, host: str, address: str, port: int, context: ssl.SSLContext, timeout: float) -> None:
        super().__init__(host, port, timeout=timeout, context=context)
        self._address = address
        self._tls = context
        self._wire: socket.socket | None = None
        self._timed_out = False

    def connect(self) -> None:
        self._wire = socket.create_connection((self._address, self.port), self.timeout)
        # The handshake comes after the assignment, so that the timer can interrupt it too.
        self._wire = self.sock = self._tls.wrap_socket(
            self._wire, server_hostname=self.host, do_handshake_on_connect=False
        )
        if self._timed_out:
            raise TimeoutError
        self.sock.do_handshake()

    def cut(self) -> None:
        """Shut the socket down from another thread.

        Not `self.sock`: http.client hands it over to the response.
        """
        self._timed_out = True
        if self._wire is not None:
            with contextlib.suppress(OSError):
                self._wire.shutdown(socket.SHUT_RDWR)
