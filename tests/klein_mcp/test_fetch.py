"""Images from the web come from public hosts only, whatever a name, a redirect or a number pretends to be."""

import datetime
import http.server
import ipaddress
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from mcp import Client

from klein_mcp.errors import BadImage, Refused, RequestError
from klein_mcp.images import fetch
from klein_mcp.jobs.service import Service
from tests.images import file, scene
from tests.tool_calls import call, refused

LIMIT = 1_000_000
PUBLIC = "93.184.215.14"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
        "169.254.169.254", "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1",
        "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "fec0::1", "ff02::1",
        "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1",
        "2002:7f00:1::", "::127.0.0.1",
        "::ffff:0:127.0.0.1", "::ffff:0:10.0.0.1", "64:ff9b:1::7f00:1", "2001:0:a00:1::f5ff:fffe",
    ],
)  # fmt: skip
def test_address_inside_is_not_public(address: str):
    assert not fetch.is_public(address)


@pytest.mark.parametrize(
    "address", [PUBLIC, "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "::ffff:0:808:808"]
)
def test_address_of_world_is_public(address: str):
    assert fetch.is_public(address)


def resolving(*addresses: str) -> Callable[[str, int], Sequence[str]]:
    return lambda host, port: addresses


@pytest.mark.parametrize(
    "url",
    [
        "https://localhost/x.png",
        "https://127.0.0.1/x.png",
        "https://127.1/x.png",
        "https://2130706433/x.png",  # 127.0.0.1 as one number
        "https://0x7f000001/x.png",
        "https://0177.0.0.1/x.png",
        "https://0/x.png",
        "https://[::1]/x.png",
        "https://[::ffff:127.0.0.1]/x.png",
        "https://[::ffff:7f00:1]:443/x.png",
        "https://[fe80::1%25lo]/x.png",
        "https://169.254.169.254/latest/meta-data/",
    ],
)
def test_every_spelling_of_this_machine_is_refused(url: str):
    """With the real resolver, which turns all of them into addresses."""
    with pytest.raises(RequestError) as caught:
        fetch.get(url, limit=LIMIT)
    assert "not on the public internet" in str(caught.value) or "is not known" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.com/x.png", "is not https"),
        ("ftp://example.com/x.png", "is not https"),
        ("https:///x.png", "no valid URL"),
        ("https://user:secret@example.com/x.png", "no valid URL"),
        ("https://example.com:99999/x.png", "no valid URL"),
        ("https://[::1/x.png", "no valid URL"),
    ],
)
def test_address_that_is_none_of_ours_is_refused(url: str, message: str):
    with pytest.raises(RequestError, match=message):
        fetch.get(url, limit=LIMIT, resolve=resolving(PUBLIC))


def test_name_with_one_address_inside_is_refused_as_whole():
    with pytest.raises(Refused, match="not on the public internet"):
        fetch.get("https://both.example/x.png", limit=LIMIT, resolve=resolving(PUBLIC, "10.0.0.1"))


def test_name_nobody_knows_is_reported():
    def unknown(host: str, port: int) -> list[str]:
        raise OSError("no such host")

    with pytest.raises(BadImage, match=r'The host "nowhere\.example" is not known'):
        fetch.get("https://nowhere.example/x.png", limit=LIMIT, resolve=unknown)


# -- a host on loopback that the tests call public ----------------------------------------------------------------


class Host(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append((self.headers["Host"], self.path))  # type: ignore[attr-defined]
        getattr(self, "_" + self.path.strip("/").split("?")[0].split("/")[0], self._picture)()

    def _picture(self) -> None:
        self._answer(200, file(scene(32, 24)), {"Content-Type": "image/png"})

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _inside(self) -> None:
        self._answer(302, headers={"Location": "https://inside.example/secret"})

    def _plain(self) -> None:
        self._answer(302, headers={"Location": "http://picture.example/x.png"})

    def _once(self) -> None:
        self._answer(307, headers={"Location": "/picture.png"})

    def _round(self) -> None:
        self._answer(302, headers={"Location": "/round"})

    def _missing(self) -> None:
        self._answer(404)

    def _short(self) -> None:
        self._answer(200, b"only this", {"Content-Length": "500"})

    def _endless(self) -> None:
        self._answer(200, headers={"Content-Length": str(10**12)})
        while True:
            self.wfile.write(bytes(64 * 1024))

    def _trickle(self) -> None:
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.05)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the names the tests use, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "picture.example")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("picture.example"), x509.DNSName("inside.example")])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "host.pem"
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def host(certificate: Path) -> Iterator[Any]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.asked = []  # type: ignore[attr-defined]
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def get(host: Any, certificate: Path) -> Callable[..., bytes]:
    """fetch.get with *.example on loopback, where only image.example is public."""

    real = fetch.get

    def resolve(name: str, port: int) -> list[str]:
        return ["127.0.0.1"] if name == "picture.example" else ["127.0.0.2"]

    def get(path: str, **more: Any) -> bytes:
        url = f"https://picture.example:{host.server_port}{path}"
        options: dict[str, Any] = {
            "limit": LIMIT,
            "resolve": resolve,
            "allowed": lambda address: address == "127.0.0.1",
            "context": ssl.create_default_context(cafile=str(certificate)),
            **more,
        }
        return real(url, **options)

    return get


def test_image_of_public_host_arrives(get: Callable[..., bytes], host: Any):
    assert get("/picture.png?a=b c&d=é") == file(scene(32, 24))
    assert host.asked == [(f"picture.example:{host.server_port}", "/picture.png?a=b%20c&d=%C3%A9")]


def test_redirect_to_another_place_of_public_host_is_followed(get: Callable[..., bytes]):
    assert get("/once") == file(scene(32, 24))


def test_redirect_to_inside_is_refused_before_anybody_is_asked(get: Callable[..., bytes], host: Any):
    with pytest.raises(Refused, match=r'"inside\.example" is not on the public internet'):
        get("/inside")
    assert [path for _, path in host.asked] == ["/inside"]


def test_redirect_away_from_https_is_refused(get: Callable[..., bytes]):
    with pytest.raises(Refused, match="is not https"):
        get("/plain")


def test_redirects_end(get: Callable[..., bytes], host: Any):
    with pytest.raises(BadImage, match="redirects more than 5 times"):
        get("/round")
    assert len(host.asked) == 6


def test_name_that_moves_inside_after_it_was_checked_is_not_asked_again(get: Callable[..., bytes], host: Any):
    answers = iter([["127.0.0.1"]])  # a second question would find the iterator empty

    assert get("/picture.png", resolve=lambda name, port: next(answers)) == file(scene(32, 24))


def test_certificate_of_another_name_is_no_certificate(host: Any, certificate: Path):
    with pytest.raises(BadImage, match=r"cannot be fetched: .*certificate"):
        fetch.get(
            f"https://other.example:{host.server_port}/picture.png",
            limit=LIMIT,
            resolve=resolving("127.0.0.1"),
            allowed=lambda address: True,
            context=ssl.create_default_context(cafile=str(certificate)),
        )


def test_host_without_trust_is_refused(get: Callable[..., bytes]):
    with pytest.raises(BadImage, match="certificate"):
        get("/picture.png", context=ssl.create_default_context())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/missing", "answered 404"),
        ("/short", "was cut short in transfer"),
        ("/endless", "larger than"),
    ],
)
def test_what_host_does_wrong_is_reported(get: Callable[..., bytes], path: str, message: str):
    with pytest.raises(BadImage, match=message):
        get(path)


def test_host_that_sends_byte_now_and_then_is_left(get: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetch, "SECONDS", 0.5)
    with pytest.raises(BadImage, match="took longer than"):  # the host itself would never end
        get("/trickle")


def test_slow_connection_leaves_less_time_for_the_response(get: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch):
    real = fetch.socket.create_connection

    def late(*where: Any) -> Any:
        time.sleep(0.6)
        return real(*where)

    monkeypatch.setattr(fetch, "SECONDS", 0.5)
    monkeypatch.setattr(fetch.socket, "create_connection", late)
    with pytest.raises(BadImage, match="took longer than"):  # the host itself would never end
        get("/trickle")


def test_host_that_is_not_there_is_reported():
    with pytest.raises(BadImage, match="cannot be fetched"):
        fetch.get(
            "https://picture.example:1/x.png",
            limit=LIMIT,
            resolve=resolving("127.0.0.1"),
            allowed=lambda address: ipaddress.ip_address(address).is_loopback,
        )


@pytest.mark.anyio
async def test_through_server_web_image_becomes_parent_with_its_address(
    client: Client, service: Service, get: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
):
    service.settings = replace(service.settings, allow_urls=True)
    assert "not on the public internet" in await refused(client, "view_image", image="https://127.0.0.1/x.png")
    monkeypatch.setattr(fetch, "get", lambda url, limit: get("/picture.png"))
    facts = await call(client, "edit_image", image="https://picture.example/cat.png", prompt="x")
    parent = await call(
        client, "view_image", image=(await call(client, "view_image", image=facts["image"]))["parents"][0]
    )
    assert parent["source"] == "https://picture.example/cat.png"
