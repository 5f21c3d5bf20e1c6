"""Content credentials: signed on the way out, checked on the way in."""

import json
import stat
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest
from mcp.client import Client
from mcp.client.stdio import stdio_client
from PIL import Image

from klein_mcp.errors import RequestError
from klein_mcp.images import codec, credentials
from klein_mcp.images.credentials import Asset, CredentialSigner, from_setting, local_anchors, sign_record, verify
from klein_mcp.images.export import SaveOptions, save
from klein_mcp.images.library import Record, Store
from tests.images import noise
from tests.real_server import RealServer
from tests.tool_calls import call

pytest.importorskip("c2pa", reason="the optional extra c2pa is not installed")


def file(kind: str = "PNG", color: str = "red") -> bytes:
    data = BytesIO()
    Image.new("RGB", (64, 64), color).save(data, kind)
    return data.getvalue()


def png(title: str, *parents: Asset) -> Asset:
    return Asset(file(), "image/png", title, {"prompt": title, "seed": "7"}, parents)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def signer(home: Path) -> CredentialSigner:
    signer = from_setting("local", home)
    assert signer is not None
    return signer


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_signed_file_is_valid_and_its_pixels_are_untouched(signer: CredentialSigner, home: Path, kind: str) -> None:
    media_type, plain = f"image/{kind.lower()}", file(kind)
    signed = signer.sign(Asset(plain, media_type, "an image"))
    claim = verify(signed, media_type, local_anchors(home))
    assert claim is not None
    assert (claim.error, claim.trusted) == ("", True)
    assert "made by klein-mcp" in str(claim)
    assert Image.open(BytesIO(signed)).tobytes() == Image.open(BytesIO(plain)).tobytes()
    assert len(signed) - len(plain) < 8_000, "no thumbnail is embedded (observed 3,431 bytes)"


def test_signer_is_unknown_to_others(signer: CredentialSigner) -> None:
    claim = verify(signer.sign(png("an apple")), "image/png")
    assert claim is not None
    assert str(claim).endswith("valid, signer unknown (klein-mcp on this machine)")


def test_changed_byte_breaks_the_signature(signer: CredentialSigner, home: Path) -> None:
    signed = bytearray(signer.sign(png("an apple")))
    signed[-20] ^= 1
    claim = verify(bytes(signed), "image/png", local_anchors(home))
    assert claim is not None
    assert "changed after signing" in str(claim)


def test_lineage_is_embedded_up_to_the_depth_cap(signer: CredentialSigner) -> None:
    import c2pa

    asset = png("root")
    for generation in range(credentials.MAX_DEPTH + 3):
        asset = png(f"edit {generation}", asset)
    signed = signer.sign(asset)
    with c2pa.Reader("image/png", BytesIO(signed)) as reader:
        manifests = json.loads(reader.json())["manifests"]
    assert len(manifests) == credentials.MAX_DEPTH + 1
    sources = [json.dumps(manifest["assertions"]) for manifest in manifests.values()]
    assert all("compositeWithTrainedAlgorithmicMedia" in source for source in sources), "each of them is an edit"
    claim = verify(signed, "image/png")
    assert claim is not None
    assert not claim.error


def test_composition_names_one_parent_and_its_components(signer: CredentialSigner) -> None:
    import c2pa

    signed = signer.sign(png("both", png("apple"), png("rocket")))
    with c2pa.Reader("image/png", BytesIO(signed)) as reader:
        ingredients = (reader.get_active_manifest() or {})["ingredients"]
    assert [(part["title"], part["relationship"]) for part in ingredients] == [
        ("apple", "parentOf"),
        ("rocket", "componentOf"),
    ]


class Signed:
    """A library whose images are signed."""

    def __init__(self, store: Store, signer: CredentialSigner) -> None:
        self.store, self._signer = store, signer

    def put(self, tool: str, *parents: Record) -> Record:
        handle = self.store.new_handle()
        data = codec.encode(noise(16, 16, seed=int(handle, 36)), "png", {"image": handle})
        recipe = {} if tool == "open" else {"seed": "7"}
        names = [parent.handle for parent in parents]
        return self.store.put(
            data, handle=handle, pixels=handle, size=(16, 16), client="", tool=tool, recipe=recipe, parents=names
        )

    def sign(self, record: Record) -> bytes:
        return sign_record(self.store, record, self.store.read(record), "image/png", self._signer)

    def claims(self, record: Record) -> tuple[list[str], list[str]]:
        """Return the actions that a signed image claims, and its embedded manifests."""
        import c2pa

        with c2pa.Reader("image/png", BytesIO(self.sign(record))) as reader:
            found = json.loads(reader.json())
        assert found["validation_state"] == "Valid"
        actions = found["manifests"][found["active_manifest"]]["assertions"][0]["data"]["actions"]
        kinds = [Path(action.get("digitalSourceType", "")).name for action in actions]
        names = [action["action"].removeprefix("c2pa.") for action in actions]
        manifests = [manifest["title"] for manifest in found["manifests"].values()]
        return [f"{name} {kind}".strip() for name, kind in zip(names, kinds, strict=True)], manifests


@pytest.fixture
def library(signer: CredentialSigner, tmp_path: Path) -> Iterator[Signed]:
    store = Store(tmp_path / "library")
    yield Signed(store, signer)
    store.close()


COMPOSITE = "compositeWithTrainedAlgorithmicMedia"


def test_opened_photo_is_never_claimed_as_made_here(library: Signed, signer: CredentialSigner, tmp_path: Path) -> None:
    photo = library.put("open")
    saved = save(library.store, photo, SaveOptions("photo.png"), [tmp_path], signer)
    assert saved.path.read_bytes() == library.store.read(photo)
    assert "opened, not made here" in saved.warnings[0]
    edit = library.put("edit_image", photo)
    assert library.claims(edit) == (["opened", f"edited {COMPOSITE}"], [edit.handle])


@pytest.mark.parametrize("loss", ["deleted", "missing", "changed"])
def test_edit_without_its_parents_file_is_signed_as_an_edit(library: Signed, loss: str) -> None:
    first, second = library.put("generate_image"), library.put("generate_image")
    both = library.put("compose_references", first, second)
    edit = library.put("edit_image", first)
    if loss == "deleted":
        library.store.delete([first.handle])
    elif loss == "missing":
        library.store.path(first).unlink()
    else:
        library.store.path(first).write_bytes(b"other")
    assert library.claims(edit) == ([f"created {COMPOSITE}"], [edit.handle])
    actions, manifests = library.claims(both)
    assert actions == [f"created {COMPOSITE}", "placed"]
    assert set(manifests) == {both.handle, second.handle}
    assert library.claims(second)[0] == ["created trainedAlgorithmicMedia"]


def test_file_without_credentials_claims_nothing() -> None:
    assert verify(file(), "image/png") is None


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_first_signatures_that_come_together_share_one_key(tmp_path: Path) -> None:
    start = threading.Barrier(8)

    def signer(_: int) -> CredentialSigner | None:
        start.wait()
        return from_setting("local", tmp_path)

    with ThreadPoolExecutor(8) as together:
        signers = list(together.map(signer, range(8)))
    assert {each.anchors for each in signers if each} == {local_anchors(tmp_path)}
    names = {path.name for path in (tmp_path / "credentials").iterdir()}
    assert names - {"key.lock"} == {"key.pem", "chain.pem"}  # whether the lock's file stays is filelock's affair


def test_key_is_readable_by_its_owner_alone_and_made_once(signer: CredentialSigner, home: Path) -> None:
    key = home / "credentials" / "key.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes()
    from_setting("local", home)
    assert key.read_bytes() == before


def test_own_key_and_chain_in_one_file_sign(home: Path, signer: CredentialSigner, tmp_path: Path) -> None:
    folder = home / "credentials"
    both = tmp_path / "identity.pem"
    both.write_bytes((folder / "chain.pem").read_bytes() + (folder / "key.pem").read_bytes())
    theirs = from_setting(str(both), tmp_path)
    assert theirs is not None
    assert verify(theirs.sign(png("an apple")), "image/png") is not None


@pytest.mark.parametrize("text", [b"", b"-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n", b"\x00\xff"])
def test_unusable_identity_is_one_clear_line(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "identity.pem"
    path.write_bytes(text)
    with pytest.raises(RequestError, match="private key"):
        CredentialSigner.read(path)
    with pytest.raises(RequestError, match="cannot be read"):
        CredentialSigner.read(tmp_path / "missing.pem")


def test_without_the_extra_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(RequestError, match=r"\[c2pa\]"):
        from_setting("local", tmp_path)
    assert from_setting("off", tmp_path) is None


@pytest.mark.anyio
async def test_saved_file_is_signed_with_its_lineage_and_info_says_so(server: RealServer, tmp_path: Path) -> None:
    settings = {"KLEIN_CREDENTIALS": "local", "KLEIN_WRITE_ROOTS": str(tmp_path)}
    async with Client(stdio_client(server.stdio(**settings))) as client:
        first = await call(client, "generate_image", prompt="an apple on a yellow background", seed=7)
        edit = await call(client, "edit_image", image=first["image"], prompt="make the background pink", seed=7)
        await call(client, "save_image", image=edit["image"], path="signed.jpg")
        await call(client, "save_image", image=edit["image"], path="plain.jpg", strip_metadata=True)
    signed = (tmp_path / "signed.jpg").read_bytes()
    claim = verify(signed, "image/jpeg", local_anchors(server.home))
    assert claim is not None
    assert claim.trusted
    assert not claim.error
    assert verify((tmp_path / "plain.jpg").read_bytes(), "image/jpeg") is None
    printed = server.run("-m", "klein_mcp", "info", str(tmp_path / "signed.jpg")).stdout
    assert "credentials: made by klein-mcp" in printed
    assert "valid, signed by klein-mcp on this machine" in printed
