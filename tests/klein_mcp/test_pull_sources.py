"""Names and formats that `klein-mcp pull` understands."""

import re
from pathlib import Path

import pytest

from klein_mcp.cli import pull_sources
from klein_mcp.errors import RequestError
from klein_mcp.settings import Settings


def test_everything_that_can_be_pulled_has_a_source() -> None:
    for name in pull_sources.names():
        _, wanted = pull_sources.selections(name)
        assert all(selection.repo.startswith("black-forest-labs/FLUX.2-") for selection in wanted)
    assert Settings(home=Path("/x")).hub.name == "hub"


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [
        ("klein-4b-fp8", "nvfp4", "klein-4b-fp8 is fp8, not nvfp4. Say klein-mcp pull klein-4b --format nvfp4."),
        ("black-forest-labs/FLUX.2-klein-4b-fp8", "nvfp4", "klein-4b-fp8 is fp8, not nvfp4."),
        ("Comfy-Org/Flux-2-Klein-4B", "fp8", "Comfy-Org/Flux-2-Klein-4B is comfyui, not fp8."),
        ("klein-4b-companions", "fp8", "klein-4b-companions has no formats to choose from. Leave out --format."),
        ("small-decoder", "fp8", "small-decoder has no formats to choose from."),
        ("tokenizer", "fp8", "tokenizer has no formats to choose from."),
    ],
)
def test_format_that_contradicts_the_name_is_refused(name: str, wanted: str, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        pull_sources.selections(name, wanted)


@pytest.mark.parametrize("name", ["Comfy-Org/vae-text-encorder-for-flux-klein-4b", "Comfy-Org/flux2-klein"])
def test_older_name_of_a_repository_is_known(name: str) -> None:
    assert pull_sources.selections(name) == pull_sources.selections("Comfy-Org/Flux-2-Klein-4B")


@pytest.mark.parametrize("variant", ["4B", "base-4B", "9B", "base-9B"])
def test_gguf_files_of_leejet_come_with_the_same_companions(variant: str) -> None:
    usual, theirs = (f"{owner}/FLUX.2-klein-{variant}-GGUF" for owner in ("unsloth", "leejet"))
    row, (file, *companions) = pull_sources.selections(theirs, "Q8_0")
    expected, (_, *usual_companions) = pull_sources.selections(usual, "Q8_0")
    assert (row, companions) == (expected, usual_companions)
    assert (file.repo, file.which) == (theirs, "Q8_0")


def test_format_that_repeats_the_name_is_taken() -> None:
    assert pull_sources.selections("klein-4b-fp8", "fp8") == pull_sources.selections("klein-4b", "fp8")
