"""Large images are decoded one at a time, and memory is returned."""

import subprocess
import sys
import threading

import pytest

from klein_mcp.images import codec
from klein_mcp.images.budget import PixelBudget
from tests.images import file, scene

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


THREE_UPLOADS = """
import io, resource, tempfile, threading, time
from pathlib import Path
from PIL import Image
from klein_mcp.images.library import Store
from klein_mcp.images.resolver import ImageResolver
from klein_mcp.settings import Settings

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // 2**20

files = []
for shade in range(3):
    out = io.BytesIO()
    Image.new("RGB", (6000, 5900), (shade, 0, 0)).save(out, "PNG")
    files.append(out.getvalue())
resolver = ImageResolver(Settings(), Store(Path(tempfile.mkdtemp())))
threads = [threading.Thread(target=lambda data=data: bool(resolver.add(data, "upload", "client"))) for data in files]
for thread in threads:
    thread.start()
peak = 0
while any(thread.is_alive() for thread in threads):
    peak = max(peak, resident())
    time.sleep(0.01)
print(peak, resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_three_large_uploads_at_once_take_memory_for_one() -> None:
    """Three of 64 MP took 5,887 MiB at their peak and kept 634 MiB."""
    ran = subprocess.run([sys.executable, "-c", THREE_UPLOADS], capture_output=True, text=True, timeout=3000)
    assert ran.returncode == 0, ran.stderr
    peak, afterwards = map(int, ran.stdout.split())
    assert peak < 650  # observed: 432 MiB
    assert afterwards < 200  # observed: 56 MiB


def test_lack_of_memory_is_not_called_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(codec, "_rgb8", fail)
    with pytest.raises(codec.NotEnoughMemory, match="not enough memory to open photo"):
        codec.decode(file(scene(8, 8)), "photo")
