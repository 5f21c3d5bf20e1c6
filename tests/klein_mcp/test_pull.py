"""Tests of `klein-mcp pull` against a fake hub on loopback.

It downloads only what is needed, resumes, verifies hashes, and refuses in one line.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from klein_mcp.cli import pull
from klein_mcp.errors import RequestError
from tests.klein_mcp.hub import COMMIT, Hub

FOUR = "black-forest-labs/FLUX.2-klein-4B"
EIGHT = "black-forest-labs/FLUX.2-klein-4b-fp8"
NINE = "black-forest-labs/FLUX.2-klein-9B"
NINE_EIGHT = "black-forest-labs/FLUX.2-klein-9b-fp8"


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def whole(file: str) -> dict[str, bytes]:
    """Return the files of a repository like the published ones.

    It has diffusers folders, the same weights as a single file, and sample images.
    """
    layers = {
        f"model.layers.{i}.mlp.up_proj.weight": f"model-0000{1 + i // 12}-of-00004.safetensors" for i in range(36)
    }
    weight_map = {
        "model.embed_tokens.weight": "model-00001-of-00004.safetensors",
        **layers,
        "model.norm.weight": "model-00003-of-00004.safetensors",
        "lm_head.weight": "model-00004-of-00004.safetensors",
    }
    encoder = {f"text_encoder/{name}": noise(3000, i) for i, name in enumerate(sorted(set(weight_map.values())))}
    return {
        "README.md": b"card",
        "teaser.jpg": noise(999, 3),
        file: noise(50_000, 4),
        "model_index.json": b'{"_class_name": "Flux2KleinPipeline"}',
        "transformer/config.json": b'{"of": "transformer"}',
        "transformer/diffusion_pytorch_model.safetensors": noise(2_000_000, 5),
        "vae/config.json": b'{"of": "vae"}',
        "vae/diffusion_pytorch_model.safetensors": noise(20_000, 6),
        "text_encoder/config.json": b'{"of": "text"}',
        "text_encoder/model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        **encoder,
        "tokenizer/tokenizer.json": b'{"t": 1}',
        "tokenizer/tokenizer_config.json": b'{"of": "tokenizer"}',
        "scheduler/scheduler_config.json": b"{}",
    }


@pytest.fixture
def hub() -> Iterator[Hub]:
    repos = {
        FOUR: whole("flux-2-klein-4b.safetensors"),
        NINE: whole("flux-2-klein-9b.safetensors"),
        EIGHT: {"README.md": b"card", "flux-2-klein-4b-fp8.safetensors": noise(70_000, 7)},
        "black-forest-labs/FLUX.2-small-decoder": {
            "full_encoder_small_decoder.safetensors": noise(9000, 8), "config.json": b"{}",
        },
    }  # fmt: skip
    with Hub(repos, closed={NINE}).serving() as hub:
        yield hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def start(hub: Hub, home: Path, *words: str, **environ: str) -> subprocess.Popen[str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "KLEIN_"))}
    inside = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "KLEIN_HOME": str(home / "klein"), **environ}
    return subprocess.Popen(
        [sys.executable, "-m", "klein_mcp", "pull", *words],
        env=outside | inside, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(hub: Hub, home: Path, *words: str, **environ: str) -> tuple[int, str, str]:
    process = start(hub, home, *words, **environ)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def cache(home: Path, repo: str) -> Path:
    return home / "hf" / "hub" / f"models--{repo.replace('/', '--')}"


def there(home: Path, repo: str) -> dict[str, bytes]:
    folder = cache(home, repo) / "snapshots" / COMMIT
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_needed_files_are_downloaded(hub: Hub, home: Path) -> None:
    code, out, err = run(hub, home, "klein-4b", "--json")
    assert code == 0, err
    assert "Apache-2.0" in err
    got = there(home, FOUR)
    unwanted = ("README", "teaser", "flux", "scheduler")
    kept = {name: content for name, content in hub.repos[FOUR].items() if not name.startswith(unwanted)}
    # The last shard contains only the language model's head.
    del kept["text_encoder/model-00004-of-00004.safetensors"]
    assert got == kept
    assert hub.fetched() == kept.keys()
    assert json.loads(out)["bytes"] == sum(map(len, kept.values()))


def test_second_pull_downloads_nothing(hub: Hub, home: Path) -> None:
    assert run(hub, home, "klein-4b")[0] == 0
    hub.log.clear()
    assert run(hub, home, "klein-4b")[0] == 0
    assert not hub.fetched()


def test_quantised_pull_downloads_companions_without_the_large_transformer(hub: Hub, home: Path) -> None:
    assert run(hub, home, "klein-4b-fp8")[0] == 0
    assert set(there(home, EIGHT)) == {"flux-2-klein-4b-fp8.safetensors"}
    assert not [name for name in there(home, FOUR) if name.startswith("transformer")]
    assert {"vae/config.json", "model_index.json", "tokenizer/tokenizer.json"} <= there(home, FOUR).keys()


def test_small_decoder_is_downloaded_alone(hub: Hub, home: Path) -> None:
    code, _, err = run(hub, home, "small-decoder")
    assert (code, "Apache-2.0" in err) == (0, True)
    assert hub.fetched() == {"full_encoder_small_decoder.safetensors"}


def test_interrupted_pull_resumes_where_it_stopped(hub: Hub, home: Path) -> None:
    # The library writes pieces of 10 MB.
    large = hub.repos[FOUR]["transformer/diffusion_pytorch_model.safetensors"] = noise(24_000_000, 9)
    hub.slow = 0.005
    process, partial = start(hub, home, "klein-4b"), []
    for _ in range(400):
        partial = [path for path in cache(home, FOUR).rglob("*.klein-incomplete") if path.stat().st_size > 9_000_000]
        if partial:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (partial,) = partial
    have = partial.stat().st_size
    assert 9_000_000 < have < len(large)
    hub.slow = 0.0
    hub.log.clear()
    assert run(hub, home, "klein-4b")[0] == 0
    resumed = [r for method, path, r in hub.log if method == "GET" and "transformer/diffusion" in path]
    assert resumed == [f"bytes={have}-"]
    assert there(home, FOUR)["transformer/diffusion_pytorch_model.safetensors"] == large
    assert not list(cache(home, FOUR).rglob("*.klein-incomplete"))


@pytest.mark.parametrize("over", [b"", b"and more"])
def test_pull_stopped_during_a_check_does_not_restart(hub: Hub, home: Path, over: bytes) -> None:
    """Verify a complete partial file instead of downloading it again.

    A file that is longer than expected is deleted.
    """
    name = "transformer/diffusion_pytorch_model.safetensors"
    content = hub.repos[FOUR][name]
    partial = cache(home, FOUR) / "blobs" / f"{hashlib.sha256(content).hexdigest()}.klein-incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(content + over)
    code, _, err = run(hub, home, "klein-4b")
    if over:
        assert (code, partial.exists()) == (1, False)
        assert "another content than the hub names" in err.splitlines()[-1]
        assert run(hub, home, "klein-4b")[0] == 0
    else:
        assert code == 0, err
        assert name not in hub.fetched()
    assert there(home, FOUR)[name] == content


def test_a_wrong_hash_is_refused_and_the_file_deleted(hub: Hub, home: Path) -> None:
    name = "vae/diffusion_pytorch_model.safetensors"
    hub.corrupt.add(name)
    code, _, err = run(hub, home, "klein-4b")
    assert code == 1
    last = err.strip().splitlines()[-1]
    assert name in last
    assert "another content than the hub names" in last
    assert name not in there(home, FOUR)
    hub.corrupt.clear()
    assert run(hub, home, "klein-4b")[0] == 0
    assert there(home, FOUR)[name] == hub.repos[FOUR][name]


def test_gated_model_error_gives_the_exact_command(hub: Hub, home: Path) -> None:
    path = home / "bin"
    path.mkdir()
    (path / "hf").write_text("#!/bin/sh\n")
    (path / "hf").chmod(0o755)
    for on_path, command in ((str(path), "hf"), ("/nowhere", str(Path(sys.executable).with_name("hf")))):
        code, _, err = run(hub, home, "klein-9b", "--accept-licence", PATH=on_path)
        assert code == 1
        assert err.strip().splitlines()[-1] == (
            f"klein-mcp: klein-9b is gated: accept its terms at https://huggingface.co/{NINE}, signed in. "
            f"Then run: {command} auth login && klein-mcp pull klein-9b"
        )


def test_both_gated_repositories_are_named(hub: Hub, home: Path) -> None:
    """Name both repositories whose terms must be accepted.

    The quantised file is in its own repository.
    """
    hub.token = "hf_test"
    code, _, err = run(hub, home, "klein-9b-fp8", "--accept-licence", HF_TOKEN="hf_test")
    assert code == 1, "this one is not there"
    assert f"accept its terms at https://huggingface.co/{NINE_EIGHT}, signed in" in err
    hub.repos[NINE_EIGHT] = {"flux-2-klein-9b-fp8.safetensors": noise(9000, 1)}
    hub.closed = {NINE_EIGHT}
    code, _, err = run(hub, home, "klein-9b-fp8", "--accept-licence")
    assert f"klein-9b-fp8 is gated: accept its terms at https://huggingface.co/{NINE_EIGHT}, signed in" in err
    assert run(hub, home, "klein-9b-fp8", "--accept-licence", HF_TOKEN="hf_test")[0] == 0


def test_missing_repository_is_named(hub: Hub, home: Path) -> None:
    code, _, err = run(hub, home, "klein-base-4b-nvfp4")
    assert code == 1
    assert "does not let black-forest-labs/FLUX.2-klein-base-4b-nvfp4 be read: it is not there, or" in err


def test_the_tokenizer_alone_and_the_companions_of_a_single_file(hub: Hub, home: Path) -> None:
    assert run(hub, home, "tokenizer")[0] == 0
    assert set(there(home, FOUR)) == {"model_index.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}
    code, _, err = run(hub, home, "klein-4b-companions")
    assert code == 0, err
    got = there(home, FOUR)
    assert {"vae/diffusion_pytorch_model.safetensors", "text_encoder/model-00001-of-00004.safetensors"} <= got.keys()
    assert not [name for name in got if name.startswith("transformer")]


def test_failed_pull_or_write_gives_a_one_line_error(hub: Hub, home: Path) -> None:
    code, _, err = run(hub, home, "nano")
    assert (code, err.strip()) == (1, "klein-mcp: nano is in the package; there is nothing to pull.")
    (home / "file").write_text("")
    code, _, err = run(hub, home, "tokenizer", KLEIN_HUB=str(home / "file" / "hub"))
    assert code == 1
    assert err.strip().splitlines()[-1].endswith("is no folder that can be written to. Set KLEIN_HUB to one, or change "
                                                 "its owner.")  # fmt: skip


def test_disk_filling_up_gives_a_one_line_error() -> None:
    with pytest.raises(RequestError, match=r"The disk is full\. Make room\. Run the same line again"):  # noqa: SIM117
        with pull._in_words(None, "tokenizer", FOUR):
            raise OSError(28, "No space left on device")


def test_token_gives_access_to_a_gated_repository(hub: Hub, home: Path) -> None:
    hub.token = "hf_test"
    assert run(hub, home, "klein-9b", "--accept-licence", HF_TOKEN="hf_test")[0] == 0
    assert "transformer/diffusion_pytorch_model.safetensors" in there(home, NINE)


def test_non_commercial_licence_must_be_accepted(hub: Hub, home: Path) -> None:
    code, _, err = run(hub, home, "klein-9b")
    assert code == 1
    assert "FLUX Non-Commercial" in err
    assert err.strip().splitlines()[-1].endswith("If you do: klein-mcp pull klein-9b --accept-licence")
    assert not hub.log


@pytest.mark.parametrize(("answer", "goes_on"), [("y\n", True), ("\n", False), ("no\n", False)])
def test_terminal_user_is_asked_to_accept_the_licence(
    answer: str, goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    asked = io.StringIO(answer)
    asked.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", asked)
    row = pull.VARIANTS["klein-9b"]
    if goes_on:
        pull._agree(row, "klein-9b", False)
    else:
        with pytest.raises(RequestError, match="was not agreed to"):
            pull._agree(row, "klein-9b", False)


def test_full_disk_is_reported_before_any_download(hub: Hub, home: Path) -> None:
    hub.claimed["transformer/diffusion_pytorch_model.safetensors"] = 10**15
    code, _, err = run(hub, home, "klein-4b")
    assert code == 1
    last = err.strip().splitlines()[-1]
    assert "1000000.0 GB are still to be fetched" in last
    assert "KLEIN_HUB" in last
    assert hub.fetched() <= {"text_encoder/model.safetensors.index.json"}


def test_files_already_present_need_no_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(100 * 10**9, 98 * 10**9, 2 * 10**9))
    pull._check_disk(tmp_path / "not" / "there" / "yet", 0)
    pull._check_disk(tmp_path, 900 * 10**6)
    with pytest.raises(RequestError, match=r"1\.0 GB are still to be fetched.* has 2\.0 GB"):
        pull._check_disk(tmp_path, 10**9)


def test_unreachable_hub_gives_a_one_line_error(hub: Hub, home: Path) -> None:
    hub.url = "http://127.0.0.1:9"
    code, _, err = run(hub, home, "klein-4b")
    assert code == 1
    error = err.strip().splitlines()[-1]
    assert error.startswith("klein-mcp: 127.0.0.1:9 cannot be reached: ")
    assert "Check the network" in error
    assert "goes on" not in error


def test_endpoint_that_is_no_address_is_named(hub: Hub, home: Path) -> None:
    hub.url = "garbage"
    code, _, err = run(hub, home, "klein-4b")
    assert code == 1
    assert err.strip().endswith(
        'klein-mcp: HF_ENDPOINT is "garbage", which is no address. Unset it, or begin it with https://.'
    )


def test_unknown_name_lists_the_valid_ones(hub: Hub, home: Path) -> None:
    code, _, err = run(hub, home, "klein-4b-fp4")
    assert code == 1
    assert "Did you mean klein-4b-" in err
    assert "klein-9b-kv-fp8" in err


def gguf_repos(hub: Hub) -> None:
    """Add a GGUF repository and a text-encoder repository like the published ones."""
    hub.repos["unsloth/FLUX.2-klein-4B-GGUF"] = {
        "README.md": b"card",
        "flux-2-klein-4b-Q4_K_M.gguf": noise(40_000, 11),
        "flux-2-klein-4b-Q8_0.gguf": noise(60_000, 12),
    }
    hub.repos["Qwen/Qwen3-4B-GGUF"] = {
        "Qwen3-4B-Q8_0.gguf": noise(50_000, 13),
        "Qwen3-4B-Q4_K_M.gguf": noise(30_000, 14),
    }


def test_gguf_pull_gets_one_file_its_encoder_and_small_files(hub: Hub, home: Path) -> None:
    gguf_repos(hub)
    code, _, err = run(hub, home, "klein-4b", "--format", "gguf:q4_k_m")
    assert code == 0, err
    assert set(there(home, "unsloth/FLUX.2-klein-4B-GGUF")) == {"flux-2-klein-4b-Q4_K_M.gguf"}
    assert set(there(home, "Qwen/Qwen3-4B-GGUF")) == {"Qwen3-4B-Q8_0.gguf"}
    rest = {name.split("/")[0] for name in there(home, FOUR)}
    assert rest == {"model_index.json", "vae", "tokenizer"}
    assert "to fetch" in err


def test_gguf_without_a_type_lists_the_types_with_sizes(hub: Hub, home: Path) -> None:
    gguf_repos(hub)
    for words in (("klein-4b", "--format", "gguf"), ("unsloth/FLUX.2-klein-4B-GGUF",)):
        code, _, err = run(hub, home, *words)
        assert code == 1
        assert "has several formats. There are: gguf:Q4_K_M (0.0 GB), gguf:Q8_0 (0.0 GB)." in err
    assert not hub.fetched()


def test_repack_pull_gets_its_three_files_and_the_tokenizer(hub: Hub, home: Path) -> None:
    names = ("diffusion_models/flux-2-klein-4b", "text_encoders/qwen_3_4b", "vae/flux2-vae", "vae/other")
    repo = "Comfy-Org/Flux-2-Klein-4B"
    hub.repos[repo] = {f"split_files/{name}.safetensors": noise(5000, i) for i, name in enumerate(names)}
    assert run(hub, home, "Comfy-Org/flux-2-klein-4b")[0] == 0
    assert set(there(home, repo)) == {f"split_files/{name}.safetensors" for name in names[:3]}
    assert {name.split("/")[0] for name in there(home, FOUR)} == {"model_index.json", "tokenizer"}


def test_unpublished_format_lists_the_published_ones(hub: Hub, home: Path) -> None:
    code, _, err = run(hub, home, "klein-9b-kv", "--format", "gguf:Q8_0")
    assert code == 1
    assert "klein-9b-kv is not published as 'gguf:Q8_0'. There are: bf16, fp8." in err


@pytest.mark.parametrize("etag", ['"../../../../owned"', '"/tmp/owned"', '""'])
def test_etag_that_escapes_the_cache_names_nothing(etag: str, hub: Hub, home: Path) -> None:
    hub.etags["tokenizer/tokenizer.json"] = etag
    assert run(hub, home, "tokenizer")[0] == 0
    assert there(home, FOUR)["tokenizer/tokenizer.json"] == hub.repos[FOUR]["tokenizer/tokenizer.json"]
    assert not list(home.rglob("*owned*"))
    assert not Path("/tmp/owned").exists()
    git = b"blob 8\0" + hub.repos[FOUR]["tokenizer/tokenizer.json"]
    assert (cache(home, FOUR) / "blobs" / hashlib.sha1(git).hexdigest()).is_file()


def test_hubs_own_library_finds_what_was_pulled(hub: Hub, home: Path) -> None:
    from huggingface_hub import try_to_load_from_cache

    assert run(hub, home, "tokenizer")[0] == 0
    found = try_to_load_from_cache(FOUR, "tokenizer/tokenizer.json", cache_dir=home / "hf" / "hub", revision=COMMIT)
    assert Path(str(found)).read_bytes() == hub.repos[FOUR]["tokenizer/tokenizer.json"]


def test_file_name_that_escapes_the_cache_is_refused(hub: Hub, home: Path) -> None:
    hub.repos[FOUR]["tokenizer/../../../owned"] = b"x"
    code, _, err = run(hub, home, "tokenizer")
    assert code == 1
    assert "which would lie outside the cache" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("hash", ["../../../../owned", "/tmp/owned", "0" * 63])
def test_hash_that_escapes_the_cache_is_refused(hash: str, hub: Hub, home: Path) -> None:
    hub.hashes["full_encoder_small_decoder.safetensors"] = hash
    code, _, err = run(hub, home, "small-decoder")
    assert code == 1
    assert "a hash of full_encoder_small_decoder.safetensors that is none" in err
    assert not list(home.rglob("*owned*"))


@pytest.mark.parametrize("refused", [(), ("symlink",), ("symlink", "link")])
@pytest.mark.parametrize("leftover", ["half a file", "link to nothing"])
def test_leftover_in_place_of_a_file_is_replaced(
    refused: tuple[str, ...], leftover: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows without the right to make symbolic links, and a disk without any links, included."""
    content = noise(5000, 1)
    item = pull.RemoteFile(FOUR, COMMIT, "vae/a.safetensors", len(content), hashlib.sha256(content).hexdigest(), 0)
    pointer = pull._snapshot(home, item) / item.name
    pointer.parent.mkdir(parents=True)
    if leftover == "half a file":
        pointer.write_bytes(content[:100])
    else:
        pointer.symlink_to(home / "nothing")
    assert pull._have(home, item) == 0
    blob = pull._partial(home, item).with_name(str(item.sha256))
    blob.parent.mkdir(parents=True)
    blob.write_bytes(content)

    def refuse(*_: object) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    for name in refused:
        monkeypatch.setattr(os, name, refuse)
    pull._fetch(home, item)
    assert pointer.read_bytes() == content
    assert pull._have(home, item) == item.size
