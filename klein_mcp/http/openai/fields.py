"""Fields of /v1/images/*: one parser each, for JSON and form text."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engine.contract import MAX_GUIDANCE, MAX_SEED, MAX_STEPS, MIN_SIDE
from engine.families.klein.variants import VARIANTS
from klein_mcp.errors import did_you_mean, quote
from klein_mcp.http.openai.errors import ApiError
from klein_mcp.images.outputs import FORMATS, Format
from klein_mcp.jobs.request import highest_seed
from klein_mcp.limits import MAX_SIDE

MAX_PROMPT = 32_000
"""Characters, OpenAI's own limit. klein reads about the first 2,000 and the result warns of the rest."""

MAX_IMAGES = 10

FOREIGN_MODEL = re.compile(r"(?:openai/)?(?:gpt-image|chatgpt-image|dall-?e)\b.*")
"""Models that front ends have hard-coded; they mean whatever is installed."""

WITHOUT_EFFECT = frozenset({"moderation", "user", "safety_identifier", "style", "complexity", "input_fidelity"})
"""Standard fields that klein has nothing for. Not worth a warning: most clients send them always."""

_OF_EDITS = "This route makes images from words alone; send the image to /v1/images/edits."

UNSUPPORTED = {
    **dict.fromkeys(("image", "image[]", "images", "images[]", "mask"), _OF_EDITS),
    "markup": "markup is not supported. Send the drawing as a second image, or a mask.",
    "mask_image": "mask_image is not a field of this API. Send the mask as mask.",
}
"""Fields that would change the image if they were honoured: ignoring them would be a wrong answer.

An edit's images and mask are no fields by the time its fields are parsed."""


@dataclass(frozen=True, slots=True)
class ImageCall:
    """A validated call.

    size: None for auto. background: as it was asked for. as_url: signed links instead of base64. ignored: fields
    without effect here.
    """

    prompt: str
    model: str = "auto"
    n: int = 1
    size: tuple[int, int] | None = None
    quality: str = "medium"
    background: Literal["auto", "opaque", "transparent"] = "auto"
    output_format: Format = "png"
    compression: int = 100
    as_url: bool = False
    stream: bool = False
    partial_images: int = 0
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    ignored: tuple[str, ...] = ()

    @property
    def transparent(self) -> bool:
        return self.background == "transparent"


def parse(fields: Mapping[str, Any]) -> ImageCall:
    """Validate the fields of a body, without its images. Raises ApiError."""
    given = {name: value for name, value in fields.items() if value not in (None, "", [])}
    for name, message in UNSUPPORTED.items():
        if name in given:
            raise ApiError(400, message, name, "unsupported_parameter")
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name in PARSERS:
            target, parser = PARSERS[name]
            values.setdefault(target, parser(name, value))
    if "prompt" not in values:
        raise ApiError(400, "prompt is missing: what the image shows, or what to change.", "prompt")
    ignored = given.keys() - PARSERS.keys() - WITHOUT_EFFECT
    if values.get("as_url"):  # a link leads to the image at its best quality
        ignored |= given.keys() & {"output_compression"}
    call = ImageCall(**values, ignored=tuple(sorted(ignored)))
    _check_together(call)
    return call


def _check_together(call: ImageCall) -> None:
    if call.transparent and call.output_format == "jpeg":
        message = 'JPEG has no transparency: background "transparent" needs output_format png or webp.'
        raise ApiError(400, message, "background", "invalid_value")
    if call.partial_images and not call.stream:
        raise ApiError(400, "partial_images needs stream: true.", "partial_images")
    if call.stream and call.as_url:
        raise ApiError(400, "A stream carries b64_json, not URLs.", "response_format")
    if call.seed is not None and call.seed > (most := highest_seed(call.seed, call.n)):
        raise ApiError(400, f"seed {call.seed} leaves no room for {call.n} images; at most {most}.", "seed")


def _invalid(name: str, value: Any, allowed: str) -> ApiError:
    return ApiError(400, f"{name} is {quote(value)}; it must be {allowed}.", name, "invalid_value")


def _prompt(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _invalid(name, value, "text")
    if len(value) > MAX_PROMPT:
        raise ApiError(400, f"prompt has {len(value)} characters; at most {MAX_PROMPT}.", name)
    if not value.strip():
        raise ApiError(400, "prompt is empty.", name)
    return value.strip()


def parse_model(name: str, value: Any) -> str:
    known = value.strip().lower() if isinstance(value, str) else ""
    if known in VARIANTS or known == "auto":
        return known
    if FOREIGN_MODEL.fullmatch(known):
        return "auto"
    nearest = did_you_mean(str(value), VARIANTS)
    raise ApiError(404, f"There is no model {quote(value)}. {nearest}".strip(), name, "model_not_found")


def parse_size(name: str, value: Any) -> tuple[int, int] | None:
    text = value.strip().lower() if isinstance(value, str) else ""
    if text == "auto":
        return None
    match = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", text)
    if not match or not all(MIN_SIDE <= int(side) <= MAX_SIDE for side in match.groups()):
        raise _invalid(name, value, f'"auto" or WIDTHxHEIGHT, each side {MIN_SIDE} to {MAX_SIDE}')
    return int(match[1]), int(match[2])


def integer(low: int, high: int) -> Callable[[str, Any], int]:
    def parse(name: str, value: Any) -> int:
        whole = type(value) is int or (isinstance(value, float) and value.is_integer())
        text = isinstance(value, str) and re.fullmatch(r"\d{1,20}", value.strip())
        if not (whole or text) or not low <= int(value) <= high:
            raise _invalid(name, value, f"a whole number, {low} to {high}")
        return int(value)

    return parse


def _number(low: float, high: float) -> Callable[[str, Any], float]:
    def parse(name: str, value: Any) -> float:
        try:
            number = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if not low <= number <= high:
            raise _invalid(name, value, f"a number, {low:g} to {high:g}")
        return number

    return parse


def _flag(name: str, value: Any) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    text = str(value).lower()
    if text not in known:
        raise _invalid(name, value, "true or false")
    return known[text]


def _choice(**allowed: Any) -> Callable[[str, Any], Any]:
    def parse(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value.lower() not in allowed:
            raise _invalid(name, value, "one of " + ", ".join(allowed))
        return allowed[value.lower()]

    return parse


def parse_seed(name: str, value: Any) -> int | None:
    # A1111's clients, and others after them, write -1 for a random seed.
    random = value.strip() == "-1" if isinstance(value, str) else value == -1
    return None if random else integer(0, MAX_SEED)(name, value)


_steps, _guidance = integer(1, MAX_STEPS), _number(0, MAX_GUIDANCE)

PARSERS: Mapping[str, tuple[str, Callable[[str, Any], Any]]] = {
    "prompt": ("prompt", _prompt),
    "model": ("model", parse_model),
    "n": ("n", integer(1, MAX_IMAGES)),
    "size": ("size", parse_size),
    "quality": (
        "quality",
        # Echoed as one of the five that the SDKs know: klein has no such setting.
        _choice(
            auto="medium",
            low="low",
            medium="medium",
            high="high",
            xhigh="xhigh",
            max="max",
            standard="medium",
            hd="high",
        ),
    ),
    "background": ("background", _choice(auto="auto", opaque="opaque", transparent="transparent")),
    "output_format": ("output_format", _choice(**{kind: kind for kind in FORMATS}, jpg="jpeg")),
    "output_compression": ("compression", integer(0, 100)),
    "response_format": ("as_url", _choice(b64_json=False, url=True)),
    "stream": ("stream", _flag),
    "partial_images": ("partial_images", integer(0, 3)),
    "seed": ("seed", parse_seed),
    "steps": ("steps", _steps),
    "num_inference_steps": ("steps", _steps),
    "guidance": ("guidance", _guidance),
    "guidance_scale": ("guidance", _guidance),
    "cfg_scale": ("guidance", _guidance),
}
"""Field -> attribute of ImageCall, and its parser. seed, steps and guidance are extensions, under their usual names."""
