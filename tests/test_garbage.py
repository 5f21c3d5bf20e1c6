"""Generated garbage at each border: an answer within 5 seconds, no traceback, bounded memory."""

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import httpx2
import numpy as np
import pytest
from mcp import Client

from engine.checkpoints.files import read_header
from engine.contract import EngineError
from klein_mcp.daemon import endpoint, wire
from klein_mcp.errors import RequestError
from klein_mcp.images import codec, paths
from klein_mcp.jobs.timing import TimingHistory
from klein_mcp.settings import Settings, SettingsError
from tests.images import file, scene
from tests.klein_mcp.front_ends import serving_process
from tests.real_server import PATIENCE, RealServer

SEED = 20261126
SLOWEST = 5.0
"""Seconds of processor time for one input; on the machine of the tests the slowest took 0.3."""
MOST_MEMORY = 100 * 2**20
"""Bytes that a border may take beyond what the process held; observed: up to 3 MiB."""
MOST_OF_A_SERVER = 500 * 2**20
"""Bytes that a front end may take in all."""
COUNTS = [60, pytest.param(3000, marks=pytest.mark.soak)]
"""Inputs per border: in every run, and longer."""

JSON_BITS = [
    "{", "}", "[", "]", ",", ":", '"', "null", "NaN", "1e999", "-0", "9" * 400, '"\\ud800"', "\\", "\ufeff", "\0", "é",
    '"model"', '"seconds"', '"kind"', "[" * 2000, '{"a":' * 500, '"' + "x" * 9000 + '"',
]  # fmt: skip


def generated(count: int, seeds: list[bytes]) -> Iterator[bytes]:
    """Yield random bytes, pieces of JSON, and damaged copies of whole inputs."""
    choice = random.Random(SEED)
    for number in range(count):
        if number % 3 == 0:
            yield choice.randbytes(choice.choice((0, 1, 7, 8, 9, 100, 5000)))
        elif number % 3 == 1:
            yield "".join(choice.choices(JSON_BITS, k=choice.randint(1, 12))).encode("utf-8", "surrogatepass")
        else:
            data = bytearray(choice.choice(seeds))
            for _ in range(choice.randint(1, 6)):
                if data:
                    at = choice.randrange(len(data))
                    data[at : at + choice.choice((0, 1, 4))] = choice.randbytes(choice.choice((0, 1, 8)))
            yield bytes(data[: choice.randint(0, len(data))] if choice.random() < 0.3 else data)


def memory(process: int | str, field: str) -> int:
    """Return bytes of a process by Linux's account: VmRSS, or VmHWM for the most there were."""
    (line,) = (line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


@contextmanager
def little_memory() -> Iterator[None]:
    """Fail where this process takes much more memory inside."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # its peak is counted anew
    except OSError:  # another system than Linux
        yield
        return
    before = memory("self", "VmRSS")
    yield
    assert memory("self", "VmHWM") - before < MOST_MEMORY


def feed(count: int, seeds: list[bytes], read: Callable[[bytes], Any], allowed: tuple[type[Exception], ...]) -> None:
    """Give each input to a border, which answers in time or raises an error of ours in one line."""
    with little_memory():
        for data in generated(count, seeds):
            started = time.process_time()
            try:
                read(data)
            except allowed as error:
                if "\n" in str(error):
                    raise AssertionError(f"more than one line for {data[:300]!r}: {error}") from error
            except Exception as error:
                raise AssertionError(f"{type(error).__name__} {error} for {data[:300]!r}") from error
            assert time.process_time() - started < SLOWEST, data[:200]


@pytest.mark.parametrize("count", COUNTS)
def test_image_bytes(count: int) -> None:
    image = scene(40, 30)
    seeds = [file(image, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")]
    feed(count, seeds, lambda data: codec.decode(data, "garbage"), (RequestError,))


def small_gguf(path: Path) -> bytes:
    """Return a file with keys, words, and tensors in blocks and in halves."""
    writer = gguf.GGUFWriter(str(path), "qwen3")
    writer.add_token_list(["a", "bc", "d"])
    writer.add_token_types([1, 1, 3])
    writer.add_array("comfy.gguf.orig_shape.b", [2, 4])
    writer.add_tensor("a.weight", np.zeros((2, 68), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("b", np.zeros((4, 2), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_headers_of_model_files(tmp_path: Path, count: int, suffix: str) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    seeds = [len(header).to_bytes(8, "little") + header + bytes(16), small_gguf(tmp_path / "seed.gguf")]
    assert set(read_header(tmp_path / "seed.gguf").entries) == {"a.weight", "b"}

    def read(data: bytes) -> None:
        path = tmp_path / f"model.{suffix}"
        path.write_bytes(data)
        read_header(path)

    feed(count, seeds, read, (EngineError, OSError))


@pytest.mark.parametrize("count", COUNTS)
def test_lora_files(tmp_path: Path, count: int) -> None:
    from safetensors.torch import save
    from torch import zeros

    from engine.families.klein import components, lora
    from engine.registry import NANO

    transformer = components.transformer(NANO / "transformer").module
    rows = columns = transformer.shape.hidden
    kinds = {
        "low rank": {"lora_A.weight": (2, columns), "lora_B.weight": (rows, 2), "alpha": (), "dora_scale": (rows, 1)},
        "LoKr": {"lokr_w1": (2, 2), "lokr_w2_a": (rows // 2, 1), "lokr_w2_b": (1, columns // 2), "alpha": ()},
        "LoHa": {f"hada_w{i}_{part}": (rows, 1) if part == "a" else (1, columns) for i in (1, 2) for part in "ab"},
    }
    layer = "diffusion_model.double_blocks.0.img_attn.proj"
    seeds = [save({f"{layer}.{leaf}": zeros(shape) for leaf, shape in kind.items()}) for kind in kinds.values()]

    def read(data: bytes) -> None:
        path = tmp_path / "lora.safetensors"
        path.write_bytes(data)
        lora.read(lora.Lora(path), transformer)

    for seed in seeds:
        read(seed)
    feed(count, seeds, read, (EngineError,))


@pytest.mark.parametrize("count", COUNTS)
def test_configuration_files(tmp_path: Path, count: int) -> None:
    def read(data: bytes) -> None:
        (tmp_path / "config.toml").write_bytes(data)
        Settings.load({"KLEIN_HOME": str(tmp_path)})

    feed(
        count, [b'model = "nano"\nread_roots = ["/a"]\nloras = [{path = "/x", scale = 0.5}]\n'], read, (SettingsError,)
    )


@pytest.mark.parametrize("count", COUNTS)
def test_state_files(tmp_path: Path, count: int) -> None:
    def read(data: bytes) -> None:
        for name in ("history.json", "daemon.json"):
            (tmp_path / name).write_bytes(data)
            (tmp_path / name).chmod(0o600)
        TimingHistory(tmp_path / "history.json")
        endpoint.read(tmp_path)

    feed(count, [b'{"seconds": {"auto": [[1, 2]]}, "native": {"auto": 5}}'], read, ())


@pytest.mark.parametrize("count", COUNTS)
def test_wire_frames(count: int) -> None:
    header = b'{"kind": "Queued", "position": 0}'
    whole = len(header).to_bytes(4, "big") + (0).to_bytes(4, "big") + header
    feed(count, [whole], wire.decode, (wire.BadFrame,))
    feed(count, [whole], lambda data: list(wire.Frames().feed(data)), (wire.BadFrame,))


@pytest.mark.parametrize("count", COUNTS)
def test_references(count: int) -> None:
    def read(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        list(paths.candidates(paths.unwrap(text)))
        paths.folder_of(f"file://{text}")

    feed(count, [b"file:///c%3A/a%20b", b'"/tmp/a b.png"'], read, ())


@pytest.mark.anyio
@pytest.mark.parametrize("count", COUNTS)
async def test_tool_arguments(client: Client, count: int) -> None:
    choice = random.Random(SEED)
    tools = (await client.list_tools()).tools
    values: list[Any] = [None, "", "null", [], {}, -1, 2**70, 1.5, True, "last~99999", "x" * 5000, [[]] * 50, "\u202e"]
    with little_memory():
        for _ in range(count):
            tool = choice.choice(tools)
            names = [*tool.input_schema["properties"], "unknown", "é" * 50]
            arguments = {name: choice.choice(values) for name in choice.sample(names, choice.randint(0, len(names)))}
            async with asyncio.timeout(60):  # one may be a valid call, which generates an image
                result = await client.call_tool(tool.name, arguments)
            text = getattr(result.content[0], "text", "") if result.content else ""
            assert "Traceback" not in text
            assert "internal error" not in text, (tool.name, arguments)


@pytest.mark.anyio
@pytest.mark.parametrize("count", COUNTS)
async def test_bodies_of_http(server: RealServer, count: int) -> None:
    headers = {"accept": "application/json, text/event-stream", "content-type": "application/json"}
    ping = b'{"jsonrpc": "2.0", "id": 1, "method": "ping"}'
    with serving_process(server) as (url, process):
        async with httpx2.AsyncClient(timeout=PATIENCE) as http:
            for number, data in enumerate(generated(count, [ping, file(scene(40, 30))])):
                path = ("/mcp", "/upload", "/v1/images/generations", "/sse")[number % 4]
                answer = await http.post(url + path, content=data, headers=headers)
                assert answer.status_code < 500, (path, data[:300], answer.text[:300])
                assert "Traceback" not in answer.text
            assert (await http.get(f"{url}/healthz")).status_code == 200
        assert process.poll() is None
        if sys.platform == "linux":
            assert memory(process.pid, "VmHWM") < MOST_OF_A_SERVER


@pytest.mark.parametrize("count", COUNTS)
def test_lines_of_stdin(server: RealServer, count: int) -> None:
    """After any lines, the server still answers."""
    hello = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {
            "protocolVersion": "2025-11-25",
            "capabilities": {},
            "clientInfo": {"name": "garbage", "version": "1"},
        },
    }
    lines = [json.dumps(hello).encode(), b'{"jsonrpc":"2.0","method":"notifications/initialized"}']
    lines += [line.replace(b"\n", b" ") for line in generated(count, lines)]
    # Requests without an id are notifications, which have no answer to add anything to.
    lines += [b'{"jsonrpc":"2.0","method":"%s"}' % method for method in (b"initialize", b"server/discover")]
    lines.append(b'{"jsonrpc":"2.0","id":"the last","method":"ping"}')
    process = subprocess.Popen(
        [sys.executable, "-m", "klein_mcp"],
        env=server.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin
    assert process.stdout
    process.stdin.write(b"\n".join(lines) + b"\n")
    process.stdin.flush()
    answers = []
    for line in process.stdout:
        answers.append(json.loads(line))
        if answers[-1].get("id") == "the last":
            break
    assert answers, "it ended"
    assert answers[-1].get("result") == {}
    if sys.platform == "linux":
        assert memory(process.pid, "VmHWM") < MOST_OF_A_SERVER
    _, errors = process.communicate(timeout=PATIENCE)
    assert b"Traceback" not in errors, errors.decode()[-2000:]
