"""The OpenAI images API with OpenAI's own client, on the real server and the embedded model."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import Image

from tests.embedded import MAX_REFERENCES, SIDE, TOKENS
from tests.images import file, pixels, scene
from tests.klein_mcp.front_ends import serving
from tests.klein_mcp.test_codec import HOSTILE
from tests.real_server import RealServer

PROMPT = "an apple on a yellow background"
SEED = {"seed": 5}
"""Of requests whose image is looked at: without one the server draws it."""


@pytest.fixture(scope="module")
def url(server: RealServer) -> Iterator[str]:
    with serving(server) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="anything", timeout=120) as client:
        client.images.generate(prompt=PROMPT)  # the engine is warm from here on
        yield client


@pytest.fixture(scope="module")
def apple(client: OpenAI) -> bytes:
    response = client.images.generate(prompt=PROMPT, extra_body={"seed": 7})
    return data(response.data)[0]


def data(items: Any) -> list[bytes]:
    return [base64.b64decode(item.b64_json) for item in items]


def named(name: str, content: bytes) -> tuple[str, bytes, str]:
    return name, content, "image/png"


def difference(one: bytes, other: bytes) -> np.ndarray:
    return np.any(pixels(one) != pixels(other), axis=2)


# -- generations ---------------------------------------------------------------------------------------------------


def test_generate_returns_an_image_with_everything_the_sdk_types(client: OpenAI):
    response = client.images.generate(prompt=PROMPT, model="gpt-image-1", quality="high", extra_body={"seed": 7})
    (image,) = data(response.data)
    assert pixels(image).shape == (SIDE, SIDE, 3)
    assert (response.size, response.quality, response.background, response.output_format) == (
        *(f"{SIDE}x{SIDE}", "high", "opaque", "png"),
    )
    assert response.usage is not None
    assert response.usage.output_tokens == TOKENS
    assert response.usage.total_tokens == response.usage.input_tokens + TOKENS
    assert abs(response.created - time.time()) < 120


def test_three_images_differ_and_count_their_seeds_up(client: OpenAI):
    response = client.images.generate(prompt=PROMPT, n=3, extra_body={"seed": 20})
    assert len({*data(response.data)}) == 3
    assert [item.seed for item in response.data or []] == ["20", "21", "22"]  # type: ignore[attr-defined]
    (again,) = data(client.images.generate(prompt=PROMPT, extra_body={"seed": 21}).data)
    assert not difference(data(response.data)[1], again).any()


@pytest.mark.parametrize("size", ["512x512", "256x192", "auto", "1792x1024"])
def test_requested_size_is_the_size_of_the_image(client: OpenAI, size: Any):
    response = client.images.generate(prompt=PROMPT, size=size)
    expected = (SIDE, SIDE) if size == "auto" else tuple(map(int, size.split("x")))
    assert Image.open(io.BytesIO(data(response.data)[0])).size == expected


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_output_format_and_compression_are_honoured(client: OpenAI, kind: Any):
    def made(compression: int) -> bytes:
        response = client.images.generate(
            prompt=PROMPT, size="512x512", output_format=kind, output_compression=compression, extra_body={"seed": 1}
        )
        return data(response.data)[0]

    small, large = made(20), made(100)
    assert Image.open(io.BytesIO(small)).format == kind.upper()
    assert (len(small) < len(large)) == (kind != "png")


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_url_leads_to_the_image_without_a_key(client: OpenAI, kind: Any):
    response = client.images.generate(prompt=PROMPT, response_format="url", output_format=kind)
    (item,) = response.data or []
    assert item.url
    assert not item.b64_json
    answer = httpx2.get(item.url)
    assert answer.headers["content-type"] == f"image/{kind}"
    assert Image.open(io.BytesIO(answer.content)).size == (SIDE, SIDE)
    assert httpx2.get(item.url + "0").status_code == 403


def test_handle_and_seed_come_as_headers_and_ignored_fields_are_named(client: OpenAI):
    raw = client.images.with_raw_response.generate(prompt=PROMPT, extra_body={"seed": 5, "foo": 1, "lora": "x"})
    assert raw.headers["x-klein-seed"] == "5"
    assert raw.headers["x-klein-ignored"] == "foo, lora"
    (item,) = raw.parse().data or []
    assert item.handle == raw.headers["x-klein-handle"]  # type: ignore[attr-defined]


# -- edits ---------------------------------------------------------------------------------------------------------


def test_edit_keeps_the_exact_size_and_knows_its_parent(client: OpenAI, server: RealServer):
    photo = file(scene(101, 77))
    response = client.images.edit(image=named("photo.png", photo), prompt="make the background green")
    (edited,) = data(response.data)
    assert pixels(edited).shape == (77, 101, 3)
    assert response.usage is not None
    assert response.usage.input_tokens_details.image_tokens == 7 * 5
    (again,) = client.images.edit(image=named("edited.png", edited), prompt="make it red").data or []
    listed = server.run("-m", "klein_mcp", "info", again.handle, "--json")  # type: ignore[attr-defined]
    assert response.data[0].handle in listed.stdout  # type: ignore[index]


def test_several_images_are_composed_at_the_size_of_the_first(client: OpenAI):
    other = data(client.images.generate(prompt="a cat on a blue background").data)[0]
    response = client.images.edit(
        image=[named("1.png", file(scene(101, 77))), named("2.png", other)],
        prompt="image 1 to the left of the cat from image 2",
    )
    assert pixels(data(response.data)[0]).shape == (77, 101, 3)


def mask(*, holes: bool) -> bytes:
    """The left half may change: transparent, or white on black."""
    change = np.zeros((SIDE, SIDE), bool)
    change[:, : SIDE // 2] = True
    if not holes:
        return file(np.repeat(np.where(change, 255, 0).astype(np.uint8)[..., None], 3, axis=2))
    rgba = np.dstack([scene(SIDE, SIDE), np.where(change, 0, 255).astype(np.uint8)])
    out = io.BytesIO()
    Image.fromarray(rgba).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("holes", [True, False], ids=["alpha", "brightness"])
def test_mask_keeps_every_byte_outside(client: OpenAI, apple: bytes, holes: bool):
    response = client.images.edit(
        image=named("apple.png", apple), mask=named("mask.png", mask(holes=holes)), prompt="make the background green"
    )
    changed = difference(data(response.data)[0], apple)
    assert changed[:, : SIDE // 2].mean() > 0.2
    assert not changed[:, SIDE // 2 :].any()


def test_mask_applies_to_the_first_of_several_images(client: OpenAI, apple: bytes):
    images = [named("apple.png", apple), named("other.png", file(scene(64, 64)))]
    response = client.images.edit(image=images, mask=named("mask.png", mask(holes=True)), prompt="make it green")
    changed = difference(data(response.data)[0], apple)
    assert changed.any()
    assert not changed[:, SIDE // 2 :].any()


def test_json_body_takes_urls_and_handles(client: OpenAI, url: str, apple: bytes):
    data_url = f"data:image/png;base64,{base64.b64encode(apple).decode()}"
    link = client.images.generate(prompt=PROMPT, response_format="url").data[0]  # type: ignore[index]
    for image in ({"url": data_url}, data_url, link.url, link.handle, f"klein://images/{link.handle}"):  # type: ignore[attr-defined]
        # JavaScript that shortens a prompt in the middle of an emoji sends half of it.
        body = json.dumps({"image": image, "prompt": "make it red \ud83c"})
        answer = httpx2.post(f"{url}/v1/images/edits", content=body, timeout=120)
        assert answer.status_code == 200, answer.text
    for image in ("/etc/hostname", "file:///etc/hostname", "http://169.254.169.254/", "last"):
        answer = httpx2.post(f"{url}/v1/images/edits", json={"image": image, "prompt": "x"}, timeout=120)
        assert answer.status_code in (400, 403), (image, answer.text)


# -- transparency --------------------------------------------------------------------------------------------------


def alpha_of(content: bytes, kind: str = "PNG") -> np.ndarray:
    with Image.open(io.BytesIO(content)) as opened:
        assert (opened.format, opened.mode) == (kind, "RGBA")
        return np.asarray(opened)[..., 3]


def is_cut_out(alpha: np.ndarray) -> bool:
    """Whether a subject stands on nothing: all clear at the border, a part of the image solid."""
    border = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
    return bool(border.max() < 8 and 0.03 < (alpha > 250).mean() < 0.5)


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_transparent_images_have_real_alpha(client: OpenAI, kind: Any):
    response = client.images.generate(
        prompt="a cat", n=2, background="transparent", output_format=kind, extra_body={"seed": 5}
    )
    assert response.background == "transparent"
    assert all(is_cut_out(alpha_of(content, kind.upper())) for content in data(response.data))


def test_edit_cuts_out_and_stays_transparent_after(client: OpenAI, apple: bytes):
    # With one seed in fourteen the apple's outline is repainted a little, and 34 pixels of its alpha with it.
    cut = client.images.edit(
        image=named("a.png", apple), prompt="remove the background", background="transparent", extra_body=SEED
    )
    assert cut.background == "transparent"
    (content,) = data(cut.data)
    assert is_cut_out(alpha_of(content))
    edited = client.images.edit(image=named("cut.png", content), prompt="add a red star at the top", extra_body=SEED)
    assert edited.background == "transparent"
    old, new = alpha_of(content), alpha_of(data(edited.data)[0])
    assert (old[96:] == new[96:]).all()
    assert (new[:40] > 200).any()
    flat = client.images.edit(
        image=named("cut.png", content), prompt="make it larger", output_format="jpeg", extra_body=SEED
    )
    assert flat.background == "opaque"


def test_stream_of_a_transparent_image_ends_with_alpha(client: OpenAI):
    stream = client.images.generate(
        prompt="a cat", background="transparent", stream=True, partial_images=2, extra_body={"seed": 5}
    )
    *partials, completed = events(stream)
    assert [event.type for event in partials] == ["image_generation.partial_image"] * 2
    assert completed.background == "transparent"
    assert is_cut_out(alpha_of(base64.b64decode(completed.b64_json)))


def test_url_of_a_transparent_image_has_alpha(client: OpenAI):
    response = client.images.generate(prompt="a cat", background="transparent", response_format="url", extra_body=SEED)
    (item,) = response.data or []
    assert is_cut_out(alpha_of(httpx2.get(item.url or "").content))


def test_transparent_jpeg_is_a_bad_request(client: OpenAI):
    with pytest.raises(openai.BadRequestError, match="needs output_format png or webp") as caught:
        client.images.generate(prompt="a cat", background="transparent", output_format="jpeg")
    assert caught.value.param == "background"


# -- streams -------------------------------------------------------------------------------------------------------


def events(stream: Any) -> list[Any]:
    with stream:
        return list(stream)


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_stream_brings_partials_that_come_closer_to_the_image(client: OpenAI, kind: Any):
    stream = client.images.generate(
        prompt=PROMPT, stream=True, partial_images=3, output_format=kind, extra_body={"seed": 7}
    )
    *partials, completed = events(stream)
    assert [event.type for event in partials] == ["image_generation.partial_image"] * 3
    assert [event.partial_image_index for event in partials] == [0, 1, 2]
    assert completed.type == "image_generation.completed"
    assert completed.usage.output_tokens == TOKENS
    final = pixels(base64.b64decode(completed.b64_json)).astype(int)
    errors = []
    for event in partials:
        image = Image.open(io.BytesIO(base64.b64decode(event.b64_json)))
        assert (image.format, image.size, event.size) == (kind.upper(), (SIDE, SIDE), f"{SIDE}x{SIDE}")
        errors.append(np.abs(np.asarray(image.convert("RGB")) - final).mean())
    assert errors == sorted(errors, reverse=True)


def test_stream_without_partials_is_one_event(client: OpenAI):
    (only,) = events(client.images.generate(prompt=PROMPT, stream=True, size="150x128"))
    assert only.type == "image_generation.completed"
    assert "150×128 was rounded to 144×128: sides are multiples of 16" in only.warnings


def test_stream_of_two_images_ends_each_with_its_own_event(client: OpenAI):
    stream = client.images.generate(prompt=PROMPT, n=2, stream=True, partial_images=1, extra_body={"seed": 30})
    kinds = [(event.type.split(".")[1], getattr(event, "seed", None)) for event in events(stream)]
    assert kinds == [("partial_image", None), ("completed", "30"), ("partial_image", None), ("completed", "31")]


def test_streamed_edit_shows_partials_inside_the_mask_only(client: OpenAI, apple: bytes):
    stream = client.images.edit(
        image=named("apple.png", apple), mask=named("mask.png", mask(holes=True)), prompt="make it green",
        stream=True, partial_images=2,
    )  # fmt: skip
    *partials, completed = events(stream)
    assert [event.type for event in partials] == ["image_edit.partial_image"] * 2
    for event in (*partials, completed):
        assert not difference(base64.b64decode(event.b64_json), apple)[:, SIDE // 2 :].any()


def running(server: RealServer) -> bool:
    status = json.loads(server.run("-m", "klein_mcp", "status", "--json").stdout)
    return status["queue"]["running"] or status["queue"]["waiting"] > 0


def wait_until_idle(server: RealServer) -> None:
    deadline = time.monotonic() + 30
    while running(server):
        assert time.monotonic() < deadline, "the engine still works for a client that is gone"
        time.sleep(0.1)


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_frees_the_engine(client: OpenAI, server: RealServer, url: str, stream: bool):
    """Requests ten images of 200 steps, which would take minutes."""
    body = {"prompt": PROMPT, "n": 10, "size": "512x512", "steps": 200}
    body |= {"stream": True, "partial_images": 3} if stream else {}
    with httpx2.Client(timeout=httpx2.Timeout(60, read=4 if not stream else 60)) as http:
        try:
            with http.stream("POST", f"{url}/v1/images/generations", json=body) as answer:
                assert any("partial_image" in text for text in answer.iter_text())
        except httpx2.ReadTimeout:
            assert not stream
    wait_until_idle(server)


def test_slow_consumer_gets_every_event(client: OpenAI):
    stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=3, size="1024x1024", n=2)
    seen = 0
    with stream:
        for event in stream:
            assert Image.open(io.BytesIO(base64.b64decode(event.b64_json))).size == (1024, 1024)
            seen += 1
            time.sleep(0.3)
    assert seen == 8


# -- errors --------------------------------------------------------------------------------------------------------


def test_bad_requests_raise_the_right_error_and_name_the_field(client: OpenAI, apple: bytes):
    for fields, param in (({"n": 0}, "n"), ({"n": 11}, "n"), ({"size": "5x5"}, "size"), ({"prompt": ""}, "prompt")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(**{"prompt": PROMPT, **fields})  # type: ignore[arg-type]
        assert caught.value.param == param
    for field in ("image", "mask"):
        with pytest.raises(openai.BadRequestError, match="/v1/images/edits"):
            client.images.generate(prompt=PROMPT, extra_body={field: "data:,"})
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(prompt=PROMPT, model="stable-diffusion")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="klein-mcp pull"):
        client.images.generate(prompt=PROMPT, model="klein-9b")


def test_mask_of_another_size_is_refused_with_both_sizes(client: OpenAI, apple: bytes):
    with pytest.raises(openai.BadRequestError, match=rf"64×64.*{SIDE}×{SIDE}"):
        client.images.edit(image=named("a.png", apple), mask=named("m.png", file(scene(64, 64))), prompt="x")


def test_unusable_images_are_refused_and_the_server_goes_on(client: OpenAI, apple: bytes):
    bomb, _ = HOSTILE["50,000 squared"]
    for content, message in (
        (b"", "empty"),
        (b"no image", "can be read"),
        (bomb, "50000×50000"),
        (apple[:200], "cannot be read"),
    ):
        file_sent = named("x.png", content)
        for field, files in (("image", {"image": file_sent}), ("mask", {"image": apple, "mask": file_sent})):
            with pytest.raises(openai.BadRequestError, match=message) as caught:
                client.images.edit(prompt="make it red", **files)  # type: ignore[arg-type] - of a dict of files
            assert caught.value.param == field
    with pytest.raises(openai.BadRequestError, match=f"at most {MAX_REFERENCES}"):
        client.images.edit(image=[named(f"{k}.png", file(scene(64, 60 + k))) for k in range(16)], prompt="x")
    noise = np.random.default_rng(0).integers(0, 256, (4000, 4000, 3), np.uint8)
    large = io.BytesIO()
    Image.fromarray(noise).save(large, "PNG", compress_level=0)
    assert len(large.getvalue()) > 45_000_000
    response = client.images.edit(image=named("large.png", large.getvalue()), prompt="make it red", size="128x128")
    assert pixels(data(response.data)[0]).shape == (128, 128, 3)


def test_error_in_a_stream_raises_too(client: OpenAI):
    with pytest.raises(openai.APIError, match="klein-mcp pull"):
        events(client.images.generate(prompt=PROMPT, model="klein-9b", stream=True))


def test_models_are_listed_and_found(client: OpenAI):
    assert [model.id for model in client.models.list()] == ["auto", "nano"]
    assert client.models.retrieve("nano").owned_by == "klein-mcp"
    with pytest.raises(openai.NotFoundError, match=r"Did you mean klein-4b\? Installed: auto, nano\."):
        client.images.generate(prompt=PROMPT, model="klein-4d")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    with pytest.raises(openai.NotFoundError, match="not part of this API"):
        client.chat.completions.create(model="nano", messages=[{"role": "user", "content": "hello"}])


def test_examples_of_the_documentation_work(client: OpenAI, url: str, tmp_path: Path):
    text = (Path(__file__).parents[2] / "docs" / "openai.md").read_text().replace("http://127.0.0.1:8765", url)
    (script,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (shell,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)
    assert Image.open(tmp_path / "apple.png").size == (512, 512)
    if not shutil.which("curl"):
        pytest.skip("no curl")
    subprocess.run(shell, shell=True, cwd=tmp_path, check=True, timeout=120)
    for name in ("cat", "red"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["data"][0]["b64_json"]
    assert (tmp_path / "cat.sse").read_text().count("event: image_generation.") == 3
