"""Provenance of an image, as a value and as file metadata.

PNG, JPEG and WebP files carry it.
"""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from PIL import Image

from klein_mcp import __version__
from klein_mcp.foreign import clean_text

KEYWORD = "klein-mcp"
"""The PNG text chunk that holds the recipe."""

NAMESPACE = "https://klein-mcp.invalid/ns/1.0/"
_XMP_KEYWORD = "XML:com.adobe.xmp"  # PNG's place for XMP; Pillow reads it back as info["xmp"]

_SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
# IPTC NewsCodes: made by a model alone, or a composite with elements made by a model.
PAINTED = _SOURCE_TYPES + "trainedAlgorithmicMedia"
EDITED = _SOURCE_TYPES + "compositeWithTrainedAlgorithmicMedia"

_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
    ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:klein="{namespace}"'
    " xmp:CreatorTool={tool} Iptc4xmpExt:DigitalSourceType={source} klein:Recipe={recipe}/>"
    '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)

MAX_PACKET = 65_000
"""Bytes of XMP: JPEG stores it in one segment of at most 65,502."""
MAX_RECIPE = 250_000
"""Characters of a recipe that are read: 32,000 of a prompt, each of which JSON may write as six."""
_SHORTEST = 64
"""Characters of a text that are left where the others need the room."""
_UNWRITABLE = re.compile("[\ud800-\udfff\ufffe\uffff]")
"""Characters that UTF-8 or XML lacks."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Record of how an image was made, to make it again.

    request: JSON of the request for this one image, its prompt included, with handles for references.
    image: its handle, "" outside a library. parents: handles, or paths outside a library.
    fingerprint: of the weights. dtype, mode: number format and execution mode, "" if unknown.
    """

    seed: int
    model: str
    fingerprint: str
    steps: int
    guidance: float
    width: int
    height: int
    dtype: str = ""
    mode: str = ""
    image: str = ""
    parents: tuple[str, ...] = ()
    request: Mapping[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    def to_json(self) -> dict[str, Any]:
        """Return it as shown in files, library, API and command line.

        The seed is text, since JSON readers round numbers.
        """
        values = {name: getattr(self, name) for name in self.__slots__}
        values["parents"], values["request"] = list(self.parents), dict(self.request)
        return {name: value for name, value in values.items() if value not in ("", {})} | {"seed": str(self.seed)}

    @property
    def prompt(self) -> str:
        return str(self.request.get("prompt", ""))


def xmp(recipe: Mapping[str, Any]) -> str:
    """Return the XMP packet with the recipe, for all three formats.

    One reader handles them all. Texts are shortened until it fits into JPEG.
    """
    limit = MAX_PACKET
    while len((packet := _packet(recipe)).encode()) > MAX_PACKET:
        limit //= 2
        recipe = _shortened(recipe, limit) if limit > _SHORTEST else {}
    return packet


def _shortened(value: Any, limit: int) -> Any:
    """Return JSON data with no text longer than `limit`."""
    match value:
        case str():
            return clean_text(value, limit)
        case list() | tuple():
            return [_shortened(item, limit) for item in value]
        case Mapping():
            return {name: _shortened(item, limit) for name, item in value.items()}
    return value


def _packet(recipe: Mapping[str, Any]) -> str:
    return _PACKET.format(
        namespace=NAMESPACE,
        tool=quoteattr(f"klein-mcp {__version__}"),
        source=quoteattr(EDITED if recipe.get("parents") else PAINTED),
        recipe=quoteattr(_json(recipe)),
    )


def texts(recipe: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return the PNG text chunks of the recipe.

    They hold the XMP packet, and the recipe under a name that any PNG tool shows.
    """
    return ((KEYWORD, _json(recipe)), (_XMP_KEYWORD, xmp(recipe)))


def read(image: Image.Image) -> dict[str, Any] | None:
    """Return the recipe of an image klein-mcp made, else None.

    Foreign metadata never raises.
    """
    text = image.info.get(KEYWORD)
    if text is None:
        text = _recipe_in(image.info.get("xmp") or image.info.get(_XMP_KEYWORD))
    try:
        recipe = json.loads(text) if isinstance(text, str) and len(text) <= MAX_RECIPE else None
    except (ValueError, RecursionError):
        return None
    return recipe if isinstance(recipe, dict) else None


def _recipe_in(packet: bytes | str | None) -> str | None:
    if not packet or len(packet) > MAX_RECIPE:
        return None
    # Reject any DTD: our packets have none, and entity expansion could exhaust memory.
    if (b"<!" if isinstance(packet, bytes) else "<!") in packet:  # type: ignore[operator]
        return None
    try:
        root = ElementTree.fromstring(packet.strip(b"\0 \n") if isinstance(packet, bytes) else packet.strip("\0 \n"))
    except (ElementTree.ParseError, ValueError):
        return None
    for description in root.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"):
        if (recipe := description.get(f"{{{NAMESPACE}}}Recipe")) is not None:
            return recipe
    return None


def _json(recipe: Mapping[str, Any]) -> str:
    # As UTF-8: escapes would make six characters of one that is not ASCII.
    text = json.dumps(recipe, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return _UNWRITABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
