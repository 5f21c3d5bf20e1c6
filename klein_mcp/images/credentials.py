"""Content credentials (C2PA): sign files for export and verify claims.

Only `save_image` and downloads sign, so stored files keep their content address. Needs the extra `klein-mcp[c2pa]`.
Vocabulary: C2PA 2.2 actions and IPTC digital source types. A local certificate cannot be on a public trust list, so
other people's verifiers report its signer as unknown.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from klein_mcp import __version__
from klein_mcp.atomic import atomic_write
from klein_mcp.errors import ServerFault, UnknownImage, install_extra
from klein_mcp.images.library import Record, Store
from klein_mcp.images.paths import expanded

if TYPE_CHECKING:
    import c2pa

MAX_DEPTH = 5
"""Generations of parents that are embedded. Each adds about 5.8 KB to a PNG (measured with c2pa-python 0.38.1)."""

_MARK = b"c2pa"
"""The label of every manifest store (JUMBF), in each format that embeds it."""
_MAGIC = {b"\x89PNG": "image/png", b"\xff\xd8": "image/jpeg", b"RIFF": "image/webp"}
_VALID_FOR = timedelta(days=3650)
_RECIPE = "io.github.klein-mcp.recipe"
_SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_CREATED = _SOURCE_TYPES + "trainedAlgorithmicMedia"
_COMPOSITE = _SOURCE_TYPES + "compositeWithTrainedAlgorithmicMedia"
_UNTRUSTED = "signingCredential.untrusted"


@dataclass(frozen=True, slots=True)
class Asset:
    """An image file with its parents and recipe.

    media_type: image/png, image/jpeg or image/webp. recipe: its provenance as JSON, None to leave it out.
    parents: the images it was made from, first reference first; None for one that cannot be embedded.
    opened: whether it is a file of the user, about whose origin this installation knows nothing.
    """

    data: bytes
    media_type: str
    title: str
    recipe: Mapping[str, Any] | None = None
    parents: tuple["Asset | None", ...] = ()
    opened: bool = False


@dataclass(frozen=True, slots=True)
class Claim:
    """A file's own statement about its origin, and whether its signature holds.

    made_by: name and version of the software. signer: common name of the certificate. trusted: the certificate leads
    to a known one. error: why the signature does not hold, "" if it does.
    """

    made_by: str
    signer: str
    trusted: bool
    error: str = ""

    def __str__(self) -> str:
        if self.error:
            return f"claims to be made by {self.made_by}, but was changed after signing ({self.error})"
        known = f"signed by {self.signer}" if self.trusted else f"signer unknown ({self.signer})"
        return f"made by {self.made_by}, valid, {known}"


class CredentialSigner:
    """Signs image files with one key and its certificate chain."""

    def __init__(self, key: bytes, chain: bytes) -> None:
        """Load a key and its chain.

        key: PEM, unencrypted. chain: PEM certificates, the signer's own first. Raises ServerFault.
        """
        self._key, self._chain = key, chain
        self._algorithm = _algorithm(key)
        _library()

    @classmethod
    def local(cls, folder: Path) -> "CredentialSigner":
        """Return the signer of this installation's own key.

        The key is made on first use; only its owner can read it.
        """
        if not (folder / "key.pem").exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(folder / "key.lock"):  # the first images may be fetched together
                if not (folder / "key.pem").exists():
                    _make_identity(folder)
        return cls.read(folder)

    @classmethod
    def read(cls, path: Path) -> "CredentialSigner":
        """Read a signer from a folder or one PEM file.

        A folder holds key.pem and chain.pem; one PEM file holds both. Raises ServerFault.
        """
        files = (path / "key.pem", path / "chain.pem") if path.is_dir() else (path,)
        try:
            blocks = _pem_blocks(b"\n".join(file.read_bytes() for file in files))
        except OSError as exc:
            raise ServerFault(
                f"The credentials at {path} cannot be read: {exc.strerror}.",
                hint="KLEIN_CREDENTIALS names a PEM file with key and chain, or a folder with key.pem and chain.pem.",
            ) from None
        keys = [block for block in blocks if b"PRIVATE KEY-----" in block.splitlines()[0]]
        chain = [block for block in blocks if b"BEGIN CERTIFICATE" in block.splitlines()[0]]
        if len(keys) != 1 or not chain:
            raise ServerFault(
                f"{path} holds {len(keys)} private keys and {len(chain)} certificates.",
                hint="It must hold one unencrypted private key and its chain, the signer's certificate first.",
            )
        return cls(keys[0], b"".join(chain))

    def sign(self, asset: Asset) -> bytes:
        """Return `asset`'s file with credentials embedded.

        The pixels are not changed. Raises ServerFault.
        """
        return self._signed(asset, MAX_DEPTH)

    @cached_property
    def anchors(self) -> str:
        """Return the certificates that make this signer a known one."""
        return self._chain.decode()

    def _signed(self, asset: Asset, depth: int) -> bytes:
        c2pa = _library()
        parents = {i: parent for i, parent in enumerate(asset.parents) if parent is not None} if depth else {}
        builder = c2pa.Builder(_manifest(asset, list(parents)), context=_context())
        signed = BytesIO()
        try:
            for i, parent in parents.items():
                data = parent.data if parent.opened else self._signed(parent, depth - 1)
                builder.add_ingredient(json.dumps(_ingredient(parent, i)), parent.media_type, BytesIO(data))
            info = c2pa.C2paSignerInfo(self._algorithm, self._chain, self._key, None)
            with c2pa.Signer.from_info(info) as signer:
                builder.sign(signer, asset.media_type, BytesIO(asset.data), signed)
        except c2pa.C2paError as exc:
            raise ServerFault(
                f"The image could not be signed: {exc}.", hint="Set KLEIN_CREDENTIALS=off, or check key and chain."
            ) from None
        finally:
            builder.close()
        return signed.getvalue()


def sign_record(store: Store, record: Record, data: bytes, media_type: str, signer: CredentialSigner) -> bytes:
    """Sign a file of a library image, with its ancestors as ingredients.

    An opened image stays unsigned: a signature would claim that it was made here. Raises ServerFault. Blocking.
    """
    if record.tool == "open":
        return data
    asset = Asset(data, media_type, record.handle, record.provenance, _parents(store, record, MAX_DEPTH))
    return signer.sign(asset)


def _parents(store: Store, record: Record, depth: int) -> tuple[Asset | None, ...]:
    """Read the ancestors, None for each that cannot be embedded."""
    if not depth:
        return (None,) * len(record.parents)
    return tuple(_parent(store, handle, depth) for handle in record.parents)


def _parent(store: Store, handle: str, depth: int) -> Asset | None:
    try:
        record = store.get(handle)
        data = store.read(record)
    except UnknownImage:
        return None
    opened = record.tool == "open"
    parents = () if opened else _parents(store, record, depth - 1)
    return Asset(data, "image/png", handle, record.provenance, parents, opened)


def from_setting(setting: str, home: Path) -> CredentialSigner | None:
    """Return the signer that KLEIN_CREDENTIALS names, None for off.

    Raises ServerFault.
    """
    if setting in ("", "off"):
        return None
    if setting == "local":
        return CredentialSigner.local(home / "credentials")
    return CredentialSigner.read(expanded(setting))


def verify(data: bytes, media_type: str, anchors: str = "") -> Claim | None:
    """Verify the credentials of a file, None if it carries none.

    Raises ServerFault without the extra.
    """
    c2pa = _library()
    try:
        reader = c2pa.Reader(media_type, BytesIO(data), context=_context(anchors))
    except c2pa.C2paError.ManifestNotFound:
        return None
    except c2pa.C2paError as exc:
        return Claim("unknown software", "unknown", trusted=False, error=f"its credentials cannot be read: {exc}")
    with reader:
        manifest: dict[str, Any] = reader.get_active_manifest() or {}
        state = reader.get_validation_state()
        results: dict[str, Any] = reader.get_validation_results() or {}
    failures = [entry["code"] for entry in results.get("activeManifest", {}).get("failure", ())]
    errors = [code for code in failures if code != _UNTRUSTED]
    generator = (manifest.get("claim_generator_info") or [{}])[0]
    made_by = " ".join(str(generator[key]) for key in ("name", "version") if key in generator) or "unknown software"
    signer = str((manifest.get("signature_info") or {}).get("common_name", "unknown"))
    error = ", ".join(errors) or ("invalid" if state == "Invalid" else "")
    return Claim(made_by, signer, trusted=_UNTRUSTED not in failures, error=error)


def describe(data: bytes, home: Path) -> str | None:
    """Describe a file's claim about its origin, and whether it holds.

    Returns None if the file claims nothing.
    """
    media_type = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)
    if media_type is None or _MARK not in data:
        return None
    try:
        claim = verify(data, media_type, local_anchors(home))
    except ServerFault as exc:
        return f"present, not checked. {exc.hint}"
    return None if claim is None else str(claim)


def local_anchors(home: Path) -> str:
    """Return the certificates of this installation's own key.

    Returns "" before a key was made.
    """
    chain = home / "credentials" / "chain.pem"
    try:
        return chain.read_text(encoding="ascii")
    except OSError:
        return ""


def _library() -> Any:
    try:
        import c2pa
    except ImportError:
        raise ServerFault("Content credentials need an optional library.", hint=install_extra("c2pa")) from None
    return c2pa


def _context(anchors: str = "") -> "c2pa.Context":
    """Return the settings of every call: no thumbnails, no network.

    Thumbnails add 427 KB and 130 ms at 1024².
    """
    c2pa = _library()
    settings: dict[str, Any] = {
        "version": 1,
        "builder": {"thumbnail": {"enabled": False}},
        "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    }
    if anchors:
        settings["trust"] = {"user_anchors": anchors}
    return c2pa.Context(c2pa.Settings.from_dict(settings))


def _manifest(asset: Asset, embedded: list[int]) -> dict[str, Any]:
    """Return the manifest. embedded: the indices of the parents that are ingredients."""
    agent = {"name": "klein-mcp", "version": __version__}
    actions: list[dict[str, Any]] = [
        {"action": "c2pa.opened" if i == 0 else "c2pa.placed", "parameters": {"ingredientIds": [_ingredient_id(i)]}}
        for i in embedded
    ]
    if 0 in embedded:
        actions.append({"action": "c2pa.edited", "digitalSourceType": _COMPOSITE, "softwareAgent": agent})
    else:
        # An image whose parents cannot be embedded keeps the source type of a composite.
        source = _COMPOSITE if asset.parents else _CREATED
        actions.insert(0, {"action": "c2pa.created", "digitalSourceType": source, "softwareAgent": agent})
    assertions: list[dict[str, Any]] = [{"label": "c2pa.actions.v2", "data": {"actions": actions}}]
    if asset.recipe is not None:
        assertions.append({"label": _RECIPE, "data": dict(asset.recipe)})
    return {
        "claim_generator_info": [agent],
        "title": asset.title,
        "format": asset.media_type,
        "assertions": assertions,
    }


def _ingredient(parent: Asset, index: int) -> dict[str, Any]:
    # Only one ingredient may be the parent: the edited image, or the first image of a composition.
    return {
        "title": parent.title,
        "relationship": "parentOf" if index == 0 else "componentOf",
        "instance_id": _ingredient_id(index),
    }


def _ingredient_id(index: int) -> str:
    return f"reference-{index + 1}"


def _pem_blocks(text: bytes) -> list[bytes]:
    blocks, block = [], []
    for line in text.splitlines():
        if line.startswith(b"-----BEGIN "):
            block = []
        block.append(line.strip())
        if line.startswith(b"-----END "):
            blocks.append(b"\n".join(block) + b"\n")
    return blocks


def _algorithm(key: bytes) -> bytes:
    """Return C2PA's name for the signature algorithm of `key`.

    Raises ServerFault.
    """
    _library()
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private = load_pem_private_key(key, None)
    except (ValueError, TypeError) as exc:
        raise ServerFault(f"The signing key cannot be used: {exc}.", hint="Give an unencrypted PEM key.") from None
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name in _CURVES:
        return _CURVES[private.curve.name]
    if isinstance(private, rsa.RSAPrivateKey):
        return b"ps256"
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return b"ed25519"
    raise ServerFault("C2PA knows no signature for this key.", hint="Use P-256, P-384, P-521, RSA or Ed25519.")


_CURVES = {"secp256r1": b"es256", "secp384r1": b"es384", "secp521r1": b"es512"}


def _make_identity(folder: Path) -> None:
    """Write a private key and a two-certificate chain.

    C2PA refuses a single self-signed certificate.
    """
    _library()
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = _certificate("klein-mcp local authority", authority_key)
    leaf = _certificate("klein-mcp on this machine", key, authority, authority_key)
    chain = leaf.public_bytes(Encoding.PEM) + authority.public_bytes(Encoding.PEM)
    # The key is written last: after an interrupted run, the next one makes both files again.
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    atomic_write(folder / "chain.pem", chain.decode("ascii"))
    atomic_write(folder / "key.pem", private.decode("ascii"))


def _certificate(name: str, key: Any, issuer: Any = None, issuer_key: Any = None) -> Any:
    """Make a certificate for an authority or for signing content.

    Without `issuer` it is an authority's own, else one for signing content (C2PA 2.2, 14.5).
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "klein-mcp"),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )
    is_authority = issuer is None
    now = datetime.now(UTC)
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if is_authority else issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks differ
        .not_valid_after(now + _VALID_FOR)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not is_authority, key_cert_sign=is_authority, crl_sign=is_authority, **usage
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key((issuer_key or key).public_key()), critical=False
        )
    )
    if not is_authority:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return builder.sign(issuer_key or key, hashes.SHA256())
