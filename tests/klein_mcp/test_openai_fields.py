"""Fields, bodies, payloads and errors of the OpenAI API, without a server."""

import json
from typing import Any

import pytest
from starlette.requests import Request

from engine.contract import BadWeights, Busy, EngineFailed, InvalidJob, ModelNotFound, OutOfMemory
from engine.families.klein.variants import VARIANTS
from klein_mcp.errors import BadImage, NotEnoughMemory, Refused, RequestError, ServerFault
from klein_mcp.http.openai import body, payloads
from klein_mcp.http.openai.body import Body, body_from_json, read_edit, read_json
from klein_mcp.http.openai.errors import ApiError, to_api_error
from klein_mcp.http.openai.fields import ImageCall, parse
from klein_mcp.images.schema import LibraryBusy, LibraryDamaged, LibraryUnwritable

pytestmark = pytest.mark.anyio


# -- fields --------------------------------------------------------------------------------------------------------


def test_prompt_alone_takes_every_default():
    assert parse({"prompt": " a cat "}) == ImageCall("a cat")


def test_json_and_form_text_parse_alike():
    typed = {"prompt": "x", "n": 2, "stream": True, "partial_images": 1, "output_compression": 60, "seed": 7}
    text = {name: str(value).lower() for name, value in typed.items()}
    assert parse(typed) == parse(text)


@pytest.mark.parametrize(
    "model",
    [
        "gpt-image-1",
        "gpt-image-2.5-flare",
        "dall-e-3",
        "DALL-E-2",
        "chatgpt-image-latest",
        "openai/gpt-image-1",
        " GPT-Image-1 ",
        "Auto",
        None,
        "",
        "auto",
    ],
)
def test_models_that_clients_hard_code_mean_auto(model: str | None):
    assert parse({"prompt": "x", "model": model}).model == "auto"


def test_every_variant_is_a_model():
    assert [parse({"prompt": "x", "model": name}).model for name in VARIANTS] == [*VARIANTS]


@pytest.mark.parametrize(
    ("size", "expected"), [("auto", None), ("512x512", (512, 512)), ("1536X1024", (1536, 1024)), ("100×70", (100, 70))]
)
def test_size_is_auto_or_any_width_and_height(size: str, expected: Any):
    assert parse({"prompt": "x", "size": size}).size == expected


def test_standard_fields_without_effect_pass_silently_and_unknown_ones_are_named():
    fields = {"prompt": "x", "moderation": "low", "user": "me", "style": "vivid", "negative_prompt": "fog", "foo": 1}
    fields |= {"markup": None, "mask_image": ""}
    assert parse(fields).ignored == ("foo", "negative_prompt")
    link = {"prompt": "x", "response_format": "url", "output_compression": 20}
    assert parse(link).ignored == ("output_compression",)


def test_extension_fields_are_taken_under_their_usual_names():
    call = parse({"prompt": "x", "seed": "5", "num_inference_steps": 8, "cfg_scale": "1.5"})
    assert (call.seed, call.steps, call.guidance) == (5, 8, 1.5)
    assert [parse({"prompt": "x", "seed": seed}).seed for seed in (-1, -1.0, " -1")] == [None] * 3


@pytest.mark.parametrize("quality", ["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"])
def test_quality_is_echoed_as_a_value_that_the_sdks_know(quality: str):
    assert parse({"prompt": "x", "quality": quality}).quality in ("low", "medium", "high", "xhigh", "max")


WRONG = [
    ({}, "prompt", 400),
    ({"prompt": "  "}, "prompt", 400),
    ({"prompt": 7}, "prompt", 400),
    ({"prompt": "x" * 32_001}, "prompt", 400),
    ({"n": 0}, "n", 400),
    ({"n": 11}, "n", 400),
    ({"n": 1.5}, "n", 400),
    ({"n": True}, "n", 400),
    ({"n": "many"}, "n", 400),
    ({"n": [1]}, "n", 400),
    ({"size": "large"}, "size", 400),
    ({"size": "63x64"}, "size", 400),
    ({"size": "64x99999"}, "size", 400),
    ({"size": 512}, "size", 400),
    ({"model": "sdxl"}, "model", 404),
    ({"model": ["klein-4b"]}, "model", 404),
    ({"quality": "best"}, "quality", 400),
    ({"background": "white"}, "background", 400),
    ({"background": "transparent", "output_format": "jpeg"}, "background", 400),
    ({"background": "transparent", "output_format": "jpg"}, "background", 400),
    ({"output_format": "gif"}, "output_format", 400),
    ({"output_format": "svg"}, "output_format", 400),
    ({"output_compression": 101}, "output_compression", 400),
    ({"response_format": "file"}, "response_format", 400),
    ({"stream": "maybe"}, "stream", 400),
    ({"stream": True, "partial_images": 4}, "partial_images", 400),
    ({"partial_images": 1}, "partial_images", 400),
    ({"stream": True, "response_format": "url"}, "response_format", 400),
    ({"seed": -2}, "seed", 400),
    ({"seed": 2**63}, "seed", 400),
    ({"seed": 2**63 - 1, "n": 2}, "seed", 400),
    ({"seed": 2**53 - 1, "n": 2}, "seed", 400),
    ({"steps": 0}, "steps", 400),
    ({"guidance": "nan"}, "guidance", 400),
    ({"guidance": 10**400}, "guidance", 400),
    ({"markup": "data:,"}, "markup", 400),
]


@pytest.mark.parametrize(("fields", "param", "status"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_field_is_named_in_one_line(fields: dict[str, Any], param: str, status: int):
    with pytest.raises(ApiError) as caught:
        parse({"prompt": "x", **fields} if fields else {})
    error = caught.value
    assert (error.status, error.param) == (status, param)
    assert param in error.message or "JPEG" in error.message or "stream" in error.message
    assert "\n" not in error.message
    assert len(error.message) < 300


def test_unknown_model_names_the_nearest():
    with pytest.raises(ApiError, match="Did you mean klein-4b"):
        parse({"prompt": "x", "model": "klein4b"})


# -- bodies --------------------------------------------------------------------------------------------------------


def request(data: bytes, kind: str, *, declare: bool = True, chunk: int = 2**16) -> Request:
    chunks = [data[start : start + chunk] for start in range(0, len(data), chunk)] or [b""]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}

    headers = [(b"content-type", kind.encode())]
    headers += [(b"content-length", str(len(data)).encode())] if declare else []
    return Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)  # type: ignore[arg-type]


def form(*parts: tuple[str, str | bytes]) -> tuple[bytes, str]:
    lines = b""
    for name, value in parts:
        file = b'; filename="a.png"\r\nContent-Type: image/png' if isinstance(value, bytes) else b""
        value = value if isinstance(value, bytes) else value.encode()
        lines += b'--B\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (name.encode(), file, value)
    return lines + b"--B--\r\n", "multipart/form-data; boundary=B"


async def test_field_that_a_browser_left_empty_is_no_field():
    data, kind = form(("image", b"one"), ("mask", b""), ("n", ""), ("prompt", "x"))
    assert await read_edit(request(data.replace(b'"mask"; filename="a.png"', b'"mask"; filename=""'), kind)) == Body(
        {"prompt": "x"}, (b"one",)
    )
    assert (await read_edit(request(data, kind))).mask == b""


async def test_form_of_the_sdks_is_read():
    data = form(("image[]", b"one"), ("image[]", b"two"), ("mask", b"holes"), ("prompt", "x"), ("stream", "true"))
    assert await read_edit(request(*data)) == Body({"prompt": "x", "stream": "true"}, (b"one", b"two"), b"holes")


@pytest.mark.parametrize("name", ["image", "image[]", "image[0]", "url", "url[]", "images[]"])
async def test_image_field_may_have_any_name_in_use(name: str):
    value = "data:," + "x" * 2**21 if name.startswith("url") else b"one"
    assert (await read_edit(request(*form((name, value), ("prompt", "x"))))).images == (value,)


@pytest.mark.parametrize(
    "image",
    [
        "data:image/png;base64,AAAA",
        ["data:image/png;base64,AAAA"],
        {"url": "data:image/png;base64,AAAA"},
        {"image_url": "data:image/png;base64,AAAA"},
        {"image_url": {"url": "data:image/png;base64,AAAA"}},
    ],
)
def test_json_image_may_have_any_shape_in_use(image: Any):
    assert body_from_json({"image": image, "prompt": "x"}).images == ("data:image/png;base64,AAAA",)
    assert body_from_json({"images": image, "prompt": "x"}).fields == {"prompt": "x"}


def test_json_image_may_be_bare_base64():
    assert body_from_json({"image": {"b64_json": "AAAA"}}).images == ("data:;base64,AAAA",)


@pytest.mark.parametrize("data", [b'\n {"image": "data:,one", "prompt": "x"}', b"image=data%3A%2Cone&prompt=x"])
async def test_body_of_plain_curl_is_read_as_what_it_is(data: bytes):
    read = await read_edit(request(data, "application/x-www-form-urlencoded", chunk=7))
    assert read == Body({"prompt": "x"}, ("data:,one",))


@pytest.mark.parametrize("image", [None, "", [], {}, {"file_id": "f"}, 7, [7], [None], [{"url": 7}]])
def test_json_without_a_usable_image_is_refused(image: Any):
    with pytest.raises(ApiError) as caught:
        body_from_json({"image": image, "prompt": "x"})
    assert caught.value.param == "image"


async def test_more_than_sixteen_images_are_refused():
    with pytest.raises(ApiError, match="at most 16"):
        await read_edit(request(*form(*[("image[]", b"x")] * 17, ("prompt", "x"))))
    with pytest.raises(ApiError) as caught:
        await read_edit(request(*form(*[("image[]", b"x")] * 40)))
    assert caught.value.status == 400


@pytest.mark.parametrize("declare", [True, False])
async def test_body_beyond_its_limit_is_cut_off(monkeypatch: pytest.MonkeyPatch, declare: bool):
    monkeypatch.setattr(body, "MAX_JSON", 100_000)
    monkeypatch.setattr(body, "MAX_FORM", 100_000)
    for data, kind in ((b"x" * 200_000, "application/json"), form(("image", b"x" * 200_000))):
        with pytest.raises(ApiError) as caught:
            await read_edit(request(data, kind, declare=declare))
        assert caught.value.status == 413


async def test_file_beyond_its_limit_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(body, "MAX_FILE_BYTES", 1000)
    with pytest.raises(ApiError, match="image has more than"):
        await read_edit(request(*form(("image", b"x" * 1001))))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'"text"', b'{"n": NaN}', b'{"n": 1e999}']
)
async def test_body_that_is_no_json_object_is_refused(data: bytes):
    with pytest.raises(ApiError) as caught:
        await read_json(request(data, "application/json"))
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


@pytest.mark.parametrize(
    "data", [b"", b"--B\r\n", b"--B\r\nContent-Disposition: form-data\r\n\r\nx\r\n--B--", b"\x00" * 99]
)
async def test_broken_form_is_refused(data: bytes):
    with pytest.raises(ApiError) as caught:
        await read_edit(request(data, "multipart/form-data; boundary=B"))
    assert caught.value.status == 400
    with pytest.raises(ApiError):
        await read_edit(request(data, "multipart/form-data"))


# -- payloads and errors -------------------------------------------------------------------------------------------


def test_usage_counts_blocks_of_sixteen_pixels():
    counted = payloads.usage("abcdefgh", [(128, 128)], [(1024, 1024), (1024, 1024)])
    assert counted["input_tokens_details"] == {"text_tokens": 2, "image_tokens": 64}
    assert (counted["input_tokens"], counted["output_tokens"], counted["total_tokens"]) == (66, 8192, 8258)


def test_server_sent_event_is_one_line_of_json():
    call = ImageCall("x", quality="high", output_format="webp", background="transparent")
    data = payloads.server_sent(payloads.partial_event("image_edit", call, "AAAA", 1, (128, 64)))
    name, line, *rest = data.decode().split("\n")
    assert (name, rest) == ("event: image_edit.partial_image", ["", ""])
    payload = json.loads(line.removeprefix("data: "))
    assert (payload["type"], payload["partial_image_index"], payload["size"]) == (
        "image_edit.partial_image",
        1,
        "128x64",
    )
    assert (payload["quality"], payload["background"], payload["output_format"]) == ("high", "transparent", "webp")


def test_error_event_has_the_name_that_sdks_look_for():
    assert payloads.server_sent(ApiError(400, "no").payload()).startswith(
        b'event: error\ndata: {"error":{"message":"no"'
    )


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (Busy("full", retry_after=2.2), 429, "rate_limit_error", "rate_limit_exceeded"),
        (ModelNotFound("not installed"), 404, "invalid_request_error", "model_not_found"),
        (OutOfMemory("too large"), 400, "invalid_request_error", "out_of_memory"),
        (InvalidJob("3 references"), 400, "invalid_request_error", None),
        (RequestError("no such image"), 400, "invalid_request_error", None),
        (BadImage("damaged"), 400, "invalid_request_error", None),
        (NotEnoughMemory("many megapixels"), 400, "invalid_request_error", None),
        (Refused("URLs are off"), 403, "permission_error", None),
        (LibraryBusy("held"), 503, "server_error", None),
        (LibraryUnwritable("full"), 500, "server_error", None),
        (LibraryDamaged("no index"), 500, "server_error", None),
        (ServerFault("no key to sign with"), 500, "server_error", None),
        (BadWeights("cut short"), 500, "server_error", None),
        (EngineFailed("crashed"), 500, "server_error", None),
        (ZeroDivisionError("secret"), 500, "server_error", None),
    ],
)
def test_each_error_has_its_status(error: Exception, status: int, kind: str, code: str | None):
    made = to_api_error(error)
    assert (made.status, made.type, made.code) == (status, kind, code)
    assert "secret" not in made.message
    assert made.headers.get("retry-after") == ("3" if status == 429 else None)
    assert (made.headers.get("x-should-retry") == "false") == (status == 500)
