"""Requests as front ends send them: Open WebUI, LibreChat, SillyTavern, replayed against the real server.

Read from their sources in November 2026: Open WebUI 0.12.4 (open_webui/routers/images.py in its wheel), LibreChat
(api/app/clients/tools/structured/OpenAIImageTools.js) and SillyTavern (src/endpoints/stable-diffusion.js, which
forwards what its page sends, its own `url` and `auth` included; the page's scheduler and override fields are those of
two extensions that copy it, since only an older version of the page itself was at hand).
The programs themselves are not run here: Open WebUI's wheel of 106 MB has 109 requirements, sentence-transformers among
them.
"""

import base64
import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from tests.embedded import SIDE
from tests.images import file, pixels, scene
from tests.klein_mcp.front_ends import serving
from tests.klein_mcp.test_photographs import photograph
from tests.real_server import RealServer

PROMPT = "an apple on a yellow background"


@pytest.fixture(scope="module")
def http(server: RealServer) -> Iterator[httpx2.Client]:
    with serving(server) as url, httpx2.Client(base_url=url, timeout=120) as client:
        yield client


def post(http: httpx2.Client, path: str, body: Any, **headers: str) -> Any:
    answer = http.post(path, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def size(encoded: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(encoded))).size


# -- Open WebUI ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["dall-e-2", "gpt-image-1", "nano"])
def test_open_webui_generates_through_the_openai_engine(http: httpx2.Client, model: str):
    body = {"model": model, "prompt": PROMPT, "n": 1, "size": "512x512"}
    body |= {} if model.startswith("gpt-image") else {"response_format": "b64_json"}
    answer = post(http, "/v1/images/generations?api-version=2025-04-01-preview", body, authorization="Bearer key")
    (image,) = answer["data"]
    assert size(image["b64_json"]) == (512, 512)
    assert not image.get("url")


@pytest.mark.parametrize("names", [["image"], ["image[]", "image[]"]])
def test_open_webui_edits_through_the_openai_engine(http: httpx2.Client, names: list[str]):
    fields = {"model": "gpt-image-1", "prompt": "make the background green", "n": "1", "background": "auto"}
    files = [(name, (f"image-{k}.png", file(scene(96, 80 + k)), "image/png")) for k, name in enumerate(names)]
    answer = http.post("/v1/images/edits", data=fields, files=files, headers={"authorization": "Bearer key"})
    assert answer.status_code == 200, answer.text
    assert size(answer.json()["data"][0]["b64_json"]) == (96, 80)


def test_open_webui_edits_onto_a_transparent_background(http: httpx2.Client):
    apple = post(http, "/v1/images/generations", {"prompt": PROMPT, "seed": 7})["data"][0]["b64_json"]
    fields = {"model": "gpt-image-1", "prompt": "remove the background", "background": "transparent"}
    name = "0b9c1f34-6c1b-4f0e-9d0e-3c8f6a1c2d55.png"
    files = [("image", (name, base64.b64decode(apple), "image/png"))]
    answer = http.post("/v1/images/edits", data=fields, files=files, headers={"authorization": "Bearer key"})
    assert answer.status_code == 200, answer.text
    with Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))) as image:
        assert image.mode == "RGBA"
        assert image.getchannel("A").getextrema() == (0, 255)


def test_open_webui_generates_through_the_automatic1111_engine(http: httpx2.Client):
    basic = "Basic " + base64.b64encode(b"user:password").decode()
    models = http.get("/sdapi/v1/sd-models", headers={"authorization": basic}).json()
    assert [(model["title"], model["model_name"]) for model in models] == [("auto", "auto"), ("nano", "nano")]
    options = http.get("/sdapi/v1/options", headers={"authorization": basic}).json()
    assert options["sd_model_checkpoint"] == "auto"
    options["sd_model_checkpoint"] = "Nano"
    assert http.post("/sdapi/v1/options", json=options, headers={"authorization": basic}).status_code == 200
    assert http.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "nano"
    body = {"prompt": PROMPT, "batch_size": 2, "width": 512, "height": 512, "steps": 50, "negative_prompt": "fog"}
    answer = post(http, "/sdapi/v1/txt2img", body, authorization=basic)
    assert [size(image) for image in answer["images"]] == [(512, 512)] * 2
    info = json.loads(answer["info"])
    assert info["sd_model_name"] == "nano"
    assert info["all_seeds"][1] == info["all_seeds"][0] + 1


# -- LibreChat -----------------------------------------------------------------------------------------------------


def test_librechat_generates(http: httpx2.Client):
    body = {
        "model": "gpt-image-1", "prompt": PROMPT, "n": 1, "background": "auto", "output_format": "webp",
        "output_compression": 100, "quality": "auto", "size": "auto",
    }  # fmt: skip
    answer = post(http, "/v1/images/generations", body, authorization="Bearer user_provided")
    assert Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).format == "WEBP"


def test_librechat_asks_for_a_transparent_png(http: httpx2.Client):
    # It leaves out output_compression for PNG, and changes jpeg to png where transparency is asked for.
    body = {
        "model": "gpt-image-1", "prompt": "a cat", "n": 1, "background": "transparent", "output_format": "png",
        "quality": "auto", "size": "auto",
    }  # fmt: skip
    answer = post(http, "/v1/images/generations", body, authorization="Bearer user_provided")
    assert answer["background"] == "transparent"
    with Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))) as image:
        assert image.getchannel("A").getextrema() == (0, 255)


def test_librechat_edits(http: httpx2.Client):
    fields = {"model": "gpt-image-1", "prompt": "make the background green", "quality": "auto", "size": "auto"}
    files = [("image[]", ("image_0.png", file(scene(120, 90)), "image/png"))]
    answer = http.post("/v1/images/edits", data=fields, files=files)
    assert answer.status_code == 200, answer.text
    assert size(answer.json()["data"][0]["b64_json"]) == (120, 90)


# -- SillyTavern ---------------------------------------------------------------------------------------------------

SILLYTAVERN = {
    "url": "http://localhost:7860", "auth": "user:password", "prompt": PROMPT,
    "negative_prompt": "lowres", "sampler_name": "Euler", "scheduler": "automatic", "steps": 20,
    "cfg_scale": 7, "width": 512, "height": 512, "restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent",
    "hr_scale": 1.5, "hr_additional_modules": [], "denoising_strength": 0.7, "hr_second_pass_steps": 0,
    "override_settings": {"CLIP_stop_at_last_layers": 1}, "override_settings_restore_afterwards": True,
    "clip_skip": 1, "save_images": True, "send_images": True, "do_not_save_grid": False,
    "do_not_save_samples": False,
}  # fmt: skip


def test_sillytavern_connects_and_generates(http: httpx2.Client):
    for menu in ("samplers", "schedulers", "sd-models", "upscalers", "latent-upscale-modes", "sd-vae", "sd-modules"):
        assert isinstance(http.get(f"/sdapi/v1/{menu}").json(), list), menu
    assert http.get("/sdapi/v1/samplers").json()[0]["name"] == "Euler"
    basic = {"authorization": "Basic " + base64.b64encode(b"user:password").decode()}
    # Choosing a model, then polling until nothing is loaded or painted any more.
    assert http.post("/sdapi/v1/options", json={"sd_model_checkpoint": "nano"}, headers=basic).status_code == 200
    state = http.get("/sdapi/v1/progress", headers=basic).json()
    assert (state["progress"], state["state"]["job_count"]) == (0.0, 0)
    # Before each image it looks for Forge's preset among the options.
    assert "forge_preset" not in http.get("/sdapi/v1/options", headers=basic).json()
    answer = post(http, "/sdapi/v1/txt2img", SILLYTAVERN, **basic)
    assert size(answer["images"][0]) == (512, 512)
    info = json.loads(answer["info"])
    # 20 steps and a guidance of 7 are what every client sends, for another model.
    assert (info["steps"], info["cfg_scale"]) == (4, 1.0)


def test_a1111_edits_with_a_drawn_mask_and_an_inverse(http: httpx2.Client):
    apple = post(http, "/sdapi/v1/txt2img", {"prompt": PROMPT, "seed": 7})["images"][0]
    half = SIDE // 2
    mask = np.zeros((SIDE, SIDE, 3), np.uint8)
    mask[:, :half] = 255
    # White strokes on nothing, from a canvas of half the size: A1111 changes what is opaque, and resizes the mask.
    drawn = np.dstack([mask, mask[..., 0]])[::2, ::2]
    body = {"init_images": [apple], "prompt": "make the background green", "width": SIDE, "height": SIDE}
    for inverse, pixels_of_mask in ((0, drawn), (1, mask)):
        encoded = base64.b64encode(file(pixels_of_mask)).decode()
        edited = post(http, "/sdapi/v1/img2img", {**body, "mask": encoded, "inpainting_mask_invert": inverse})[
            "images"
        ][0]
        changed = np.any(pixels(base64.b64decode(edited)) != pixels(base64.b64decode(apple)), axis=2)
        kept, free = (changed[:, half:], changed[:, :half]) if not inverse else (changed[:, :half], changed[:, half:])
        assert not kept.any()
        assert free.any()


def test_a1111_edits_a_data_url_at_its_own_size(http: httpx2.Client):
    photo = "data:image/png;base64," + base64.b64encode(file(scene(101, 77))).decode()
    answer = post(http, "/sdapi/v1/img2img", {"init_images": photo, "prompt": "make it red"})
    assert size(answer["images"][0]) == (101, 77)


def test_photograph_that_the_demo_model_repaints_gets_a_warning(http: httpx2.Client):
    """A refusal would end clients that know no other way to ask."""
    photo = base64.b64encode(file(photograph())).decode()
    body = {"init_images": [photo], "prompt": "make it red", "width": 128, "height": 128}
    warnings = json.loads(post(http, "/sdapi/v1/img2img", body)["info"])["warnings"]
    assert any("detail it repainted is lost" in warning for warning in warnings)


def test_a1111_progress_shows_the_live_preview_and_interrupt_stops(http: httpx2.Client):
    with ThreadPoolExecutor(1) as pool:
        body = {"prompt": PROMPT, "batch_size": 10, "width": 1024.0, "height": 1024}
        running = pool.submit(post, http, "/sdapi/v1/txt2img", body)
        deadline = time.monotonic() + 60
        while not (state := http.get("/sdapi/v1/progress").json())["current_image"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert 0 < state["progress"] < 1
        assert state["state"]["sampling_steps"] == 4
        assert max(size(state["current_image"])) <= 128
        assert http.get("/sdapi/v1/progress?skip_current_image=true").json()["current_image"] is None
        assert http.post("/sdapi/v1/interrupt").status_code == 200
        assert len(running.result(60)["images"]) < 10
    assert http.get("/sdapi/v1/progress").json()["state"]["job_count"] == 0


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("txt2img", {}, 422),
        ("txt2img", {"prompt": ["x"]}, 422),
        ("txt2img", {"prompt": "x", "override_settings": {"sd_model_checkpoint": "/home/me/sdxl.safetensors"}}, 404),
        ("txt2img", {"prompt": "x", "batch_size": 11}, 400),
        ("txt2img", {"prompt": "x", "batch_size": 5, "n_iter": 3}, 422),
        ("txt2img", {"prompt": "x", "width": 5}, 400),
        ("txt2img", {"prompt": "x", "seed": "a"}, 400),
        ("img2img", {"prompt": "x"}, 422),
        ("img2img", {"prompt": "x", "init_images": ["no base64!"]}, 400),
        ("img2img", {"prompt": "x", "init_images": [7]}, 400),
        ("options", {"sd_model_checkpoint": "sdxl"}, 404),
        ("interrogate", {}, 404),
    ],
)
def test_a1111_errors_are_one_line(http: httpx2.Client, path: str, body: Any, status: int):
    answer = http.post(f"/sdapi/v1/{path}", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["detail"]
    assert "\n" not in answer.json()["detail"]
