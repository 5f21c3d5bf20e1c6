"""Large images are decoded one at a time, and memory is returned."""

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mcp import Client

from klein_mcp.http import render
from klein_mcp.images import codec, preview
from klein_mcp.images.budget import DECODING, MAX_PIXELS, PixelBudget
from klein_mcp.jobs.service import Service
from tests.images import file, scene
from tests.tool_calls import call

PATIENCE = 60


def test_reservations_wait_their_turn_until_they_fit() -> None:
    budget, order = PixelBudget(10), []
    release = threading.Event()

    def work(name: str, pixels: int) -> None:
        with budget.reserve(pixels):
            order.append(name)
            assert release.wait(PATIENCE)

    threads = []
    for name, pixels in (("large", 8), ("huge", 99), ("small", 1)):
        threads.append(threading.Thread(target=work, args=(name, pixels)))
        threads[-1].start()
        while len(budget._waiting) + len(order) < len(threads):
            pass
    assert order == ["large"], "the small one waits behind the huge one, which could starve else"
    release.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert order == ["large", "huge", "small"]


def test_a_thread_may_reserve_again() -> None:
    budget = PixelBudget(10)
    with budget.reserve(10), budget.reserve(10):
        pass


MEASURED = """
import io, resource, tempfile, threading, time
from pathlib import Path
import anyio
from PIL import Image
from klein_mcp.daemon.client import DaemonClient
from klein_mcp.images.export import SaveOptions, save
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.tools import view_image
from klein_mcp.settings import Settings

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // 2**20

def photo(shade, width, height):
    out = io.BytesIO()
    Image.new("RGB", (width, height), (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()

def view(**arguments):
    return anyio.run(view_image.run, service, CallContext("client"), view_image.ViewImage(**arguments))

settings = Settings(home=Path(tempfile.mkdtemp()))
service = Service(settings, DaemonClient(settings))
sources = service.sources

def measure(works):
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    peak = 0
    while any(thread.is_alive() for thread in threads):
        peak = max(peak, resident())
        time.sleep(0.01)
    print(peak, resident())
"""
UPLOADS = """
files = [photo(shade, 6000, 5900) for shade in range(3)]
measure([lambda data=data: sources.add(data, "upload", "client") for data in files])
"""
VIEWS = """
handles = [sources.add(photo(shade, 8000, 6000), "upload", "client").record.handle for shade in range(6)]
measure([lambda handle=handle: view(image=handle) for handle in handles])
"""
COMPARISONS = """
handles = [sources.add(photo(shade, 8000, 6000), "upload", "client").record.handle for shade in range(6)]
pairs = zip(handles[:3], handles[3:])
measure([lambda pair=pair: view(image=pair[0], compare_with=pair[1]) for pair in pairs])
"""
SAVES = """
records = [sources.add(photo(shade, 8000, 6000), "upload", "client").record for shade in range(4)]
folder = Path(tempfile.mkdtemp())
measure([
    lambda record=record: save(service.store, record, SaveOptions(str(folder / f"{record.handle}.jpg")), [folder])
    for record in records
])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "work",
    [
        UPLOADS,
        pytest.param(VIEWS, marks=pytest.mark.slow),
        pytest.param(COMPARISONS, marks=pytest.mark.slow),
        pytest.param(SAVES, marks=pytest.mark.slow),
    ],
    ids=["uploads", "views", "comparisons", "saves"],
)
def test_large_images_at_once_take_memory_for_few(work: str) -> None:
    """Three uploads of 64 MP took 5,887 MiB and kept 634, three comparisons of 48 MP took 2,694."""
    ran = subprocess.run([sys.executable, "-c", MEASURED + work], capture_output=True, text=True, timeout=3000)
    assert ran.returncode == 0, ran.stderr
    peak, afterwards = map(int, ran.stdout.split())
    assert peak < 750  # observed: 445, 445, 621 and 397 MiB
    assert afterwards < 200  # observed: 56 MiB


@pytest.mark.anyio
@pytest.mark.parametrize("tool", ["view_image", "compare_with", "save_image", "preview", "thumb", "jpeg"])
async def test_image_counts_until_it_is_encoded(
    tool: str, client: Client, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [await call(client, "generate_image", prompt="a dot", seed=seed) for seed in (1, 2)]
    first, second = (image["image"] for image in made)
    service.settings = replace(service.settings, write_roots=(tmp_path,))
    held: list[int] = []

    def note(encode: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*arguments: Any, **options: Any) -> Any:
            held.append(MAX_PIXELS - DECODING._free)
            return encode(*arguments, **options)

        return noting

    monkeypatch.setattr(preview, "preview", note(preview.preview))
    monkeypatch.setattr(codec, "encode_lossy", note(codec.encode_lossy))
    if tool == "view_image":
        await call(client, "view_image", image=first)
    elif tool == "compare_with":
        await call(client, "view_image", image=first, compare_with=second)
    elif tool == "save_image":
        await call(client, "save_image", image=first, path=str(tmp_path / "a.jpg"))
    elif tool == "jpeg":
        render.outgoing(service, first, "jpeg")
    else:
        await client.read_resource(f"klein://images/{first}/{tool}")
    assert held == [128 * 128 * (2 if tool == "compare_with" else 1)]


def test_lack_of_memory_is_not_called_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(codec, "_rgb8", fail)
    with pytest.raises(codec.NotEnoughMemory, match="not enough memory to open photo"):
        codec.decode(file(scene(8, 8)), "photo")
