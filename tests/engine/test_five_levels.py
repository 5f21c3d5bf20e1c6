"""A model whose autoencoder has five levels: one token is 32 × 32 pixels, through the whole engine.

`tests/parity` compares its images with diffusers'.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from engine.contract import Aspect, BadWeights, EngineConfig, Exact, Job, KeepSource, Result, Rgb8, Step
from engine.engine import Engine
from engine.families.klein import components
from engine.families.klein.checkpoint import Checkpoint
from engine.families.klein.compiler import CompileOptions, Compiler
from engine.families.klein.estimate import Estimator
from engine.families.klein.folder import read_variant
from engine.families.klein.footprint import activation_memory
from engine.families.klein.loader import LoadOptions, prepare
from engine.families.klein.pipeline import Klein
from engine.families.klein.variants import VARIANTS
from engine.memory.device import Device
from engine.nn import bands, ops
from engine.nn.autoencoder import Autoencoder, AutoencoderShape
from engine.registry import NANO, ModelRegistry
from tests import operations, toys
from tests.engine import published
from tests.engine.test_memory import nets
from tests.engine.test_offload import last
from tests.parity.conftest import noise_picture
from tests.parity.test_layouts import bfl_autoencoder, bfl_transformer

CPU = Device.choose("cpu", "float32")
SIDE = 128
JOB = Job("a lighthouse of brass", size=Exact(96, 64), steps=2, seed=5)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a klein.json that says what size the toy was made for. Nobody may write into it."""
    place = toys.save(tmp_path_factory.mktemp("five") / "toy", kv=True, levels=5)
    toys.extras(place, native_size=SIDE, text_length=48)
    return place


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(EngineConfig(device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def klein(home: Path) -> Klein:
    return last(Klein.load(ModelRegistry().resolve(str(home)), CPU))


def paint(engine: Engine, home: Path, **changes: object) -> Result:
    *_, result = engine.run(replace(JOB, model=str(home), **changes))  # type: ignore[arg-type]
    assert isinstance(result, Result)
    return result


def _four(place: Path) -> Path:
    """Return a toy whose autoencoder has four levels."""
    return toys.save(place / "four")


def test_folder_says_how_many_pixels_a_token_has(home: Path, tmp_path: Path) -> None:
    assert read_variant(home).pixels_per_token == 32
    assert read_variant(_four(tmp_path)).pixels_per_token == 16
    # Front ends read the row, the engine the folder.
    assert read_variant(NANO).pixels_per_token == VARIANTS["nano"].pixels_per_token


@pytest.mark.parametrize("size", [(80, 112), (48, 96), (112, 112)])
def test_size_between_two_tokens_is_cropped_from_whole_ones(size: tuple[int, int], engine: Engine, home: Path) -> None:
    image = paint(engine, home, size=Exact(*size)).image
    assert image.shape == (size[1], size[0], 3)
    whole = paint(engine, home, size=Exact(*(max(64, -(-side // 32) * 32) for side in size))).image
    assert np.array_equal(image, whole[: size[1], : size[0]])


def test_aspect_ratio_is_painted_in_whole_tokens(engine: Engine, home: Path) -> None:
    assert paint(engine, home, size=Aspect(3, 2)).image.shape == (96, 160, 3)
    assert paint(engine, home, size=Aspect(8, 1)).image.shape == (32, 256, 3)


@pytest.mark.parametrize("size", [(64, 64), (71, 83), (97, 66)])
def test_edit_of_an_odd_size_keeps_it(size: tuple[int, int], engine: Engine, home: Path) -> None:
    picture = noise_picture(*size, seed=1)
    result = paint(engine, home, references=(picture,), size=KeepSource(), find_change=True)
    assert result.image.shape == picture.shape
    assert result.change is not None
    assert result.change.opacity.shape == picture.shape[:2]
    other = paint(engine, home, references=(255 - picture,), size=KeepSource())
    assert not np.array_equal(result.image, other.image)


def test_each_of_two_references_shows_in_the_image(engine: Engine, home: Path) -> None:
    first, second = noise_picture(83, 101, seed=1), noise_picture(200, 66, seed=2)
    images = [
        paint(engine, home, references=pair).image
        for pair in ((first, second), (second, first), (first, 255 - second), (255 - first, second))
    ]
    for i, image in enumerate(images):
        assert image.shape == (64, 96, 3)
        assert not any(np.array_equal(image, other) for other in images[:i])


def test_previews_have_a_pixel_for_each_latent_pixel(engine: Engine, home: Path) -> None:
    engine.previews = True
    events = list(engine.run(replace(JOB, model=str(home), size=Exact(80, 112), partials=1)))
    engine.previews = False
    steps = [event for event in events if isinstance(event, Step)]
    assert [step.preview.shape for step in steps if step.preview is not None] == [(7, 5, 3)] * 2
    assert [step.partial.shape for step in steps if step.partial is not None] == [(112, 80, 3)]


def test_prefetched_reference_is_the_one_that_is_edited(home: Path) -> None:
    engine, picture = Engine(EngineConfig(device="cpu", dtype="float32")), noise_picture(71, 83, seed=1)
    paint(engine, home)
    assert engine._klein is not None
    engine._klein.prefetch(picture)
    assert paint(engine, home, references=(picture,), size=KeepSource()).cache["references"] == "hit"


@pytest.mark.parametrize("count", [1, 3, 8])
@torch.no_grad()
def test_bands_of_five_levels_equal_the_whole(count: int, klein: Klein) -> None:
    latent = torch.randn(1, 128, 3, 5, generator=torch.Generator().manual_seed(0))
    with operations.chosen(norm_silu=ops.two_pass_norm_silu):
        whole, banded = klein.autoencoder.decode(latent), bands.decode(klein.autoencoder, latent, count)
    assert whole.shape == (1, 3, 96, 160)
    # Observed: 5e-6, since the convolution of a narrow band sums in another order.
    assert (whole - banded).abs().max() <= 1e-4


def test_image_of_five_levels_is_the_same_in_bands(klein: Klein) -> None:
    images: list[Rgb8] = []
    for in_bands in (False, True):
        *_, result = klein.run(replace(JOB, size=Exact(80, 112)), in_bands=in_bands)
        assert isinstance(result, Result)
        images.append(result.image)
    apart = np.abs(images[0].astype(int) - images[1])
    assert apart.max() <= 1
    assert (apart > 0).mean() < 1e-3


@torch.no_grad()
def test_examples_to_compile_with_fit_five_levels(klein: Klein) -> None:
    options = CompileOptions(enabled=True, backend="eager", everywhere=True)
    compiler = Compiler(klein.variant, klein.transformer, klein.autoencoder, CPU, options)
    for example in (compiler._example, compiler._small):
        assert klein.autoencoder.encode(example.image()).shape == example.latent().shape


def test_autoencoder_of_other_tokens_is_refused(home: Path, tmp_path: Path) -> None:
    engine = Engine(EngineConfig(device="cpu", dtype="float32"))
    shutil.copytree(home, tmp_path / "wrong")
    # Its config still says five levels.
    shutil.copy(_four(tmp_path) / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "wrong" / "vae")
    with pytest.raises(BadWeights, match="A token of the autoencoder is 16×16 pixels, one of wrong 32×32"):
        paint(engine, tmp_path / "wrong")


def test_single_file_takes_the_companion_of_its_tokens(tmp_path: Path) -> None:
    four, five = _four(tmp_path), toys.save(tmp_path / "five", levels=5)
    files = tmp_path / "files"
    published.write(bfl_transformer(four), files / "flux-2-klein-4b.safetensors")
    shutil.copytree(four / "tokenizer", files / "tokenizer")
    shutil.copytree(four / "text_encoder", files / "text_encoder")
    # Under a published name, which would come first.
    published.write(bfl_autoencoder(five, levels=5), files / "flux2-vae.safetensors")
    model = str(files / "flux-2-klein-4b.safetensors")
    with pytest.raises(BadWeights, match="A token of the autoencoder is 32×32 pixels, one of klein-4b 16×16"):
        prepare(ModelRegistry().resolve(model), CPU, LoadOptions())
    published.write(bfl_autoencoder(four), files / "own.safetensors")
    checkpoint = ModelRegistry().resolve(model)
    assert checkpoint.vae == files / "own.safetensors"
    assert prepare(checkpoint, CPU, LoadOptions()).autoencoder.module.shape.pixels_per_token == 16


def test_small_decoder_of_other_tokens_is_passed_over(home: Path, tmp_path: Path) -> None:
    published.write(published.small_decoder(tmp_path / ".work"), tmp_path / "a_small_decoder.safetensors")
    small: dict[str, Any] = toys.autoencoder(5) | {"decoder_block_out_channels": (32,) * 5}
    toys.AutoencoderKLFlux2(**small).save_pretrained(tmp_path / ".five" / "vae")
    own = published.write(bfl_autoencoder(tmp_path / ".five", levels=5), tmp_path / "b_small_decoder.safetensors")
    checkpoint: Checkpoint = ModelRegistry((tmp_path,), small_decoder=True).resolve(str(home))
    assert checkpoint.vae == own
    assert prepare(checkpoint, CPU, LoadOptions()).autoencoder.module.shape.pixels_per_token == 32


@torch.no_grad()
def test_five_levels_are_read_in_both_layouts(home: Path, klein: Klein, tmp_path: Path) -> None:
    file = published.write(bfl_autoencoder(home, levels=5), tmp_path / "flux2-vae.safetensors")
    spec = components.autoencoder(file)
    spec.verify()
    assert spec.module.shape == klein.autoencoder.shape
    assert spec.module.shape.pixels_per_token == 32
    for _ in spec.load(CPU):
        pass
    latent, read = torch.randn(1, 128, 2, 3), klein.autoencoder.state_dict()
    assert all(torch.equal(tensor, read[name]) for name, tensor in spec.module.state_dict().items())
    assert spec.module.decode(latent).shape == (1, 3, 64, 96)
    assert len(load_file(file)) == len(read) + 1, "batches that were counted are not read"


def test_estimate_counts_the_work_of_five_levels() -> None:
    shape = AutoencoderShape(encoder=(32, 64, 64, 128, 128), decoder=(32, 32, 64, 64, 128), attention=False)
    with torch.device("meta"):
        net = Autoencoder(shape)
    transformer, encoder, _ = nets("4b")
    variant = replace(VARIANTS["klein-4b"], pixels_per_token=shape.pixels_per_token)
    ours = Estimator(variant, transformer.shape, net, encoder).image(8 * 8, (8 * 8,), 4).work
    with FlopCounterMode(display=False) as decoding:
        net.decode(torch.empty(1, 128, 8, 8, device="meta"))
    with FlopCounterMode(display=False) as encoding:
        net.encode(torch.empty(1, 3, 256, 256, device="meta"))
    assert ours["decode"] == pytest.approx(decoding.get_total_flops(), rel=0.05)
    # The downsamplers are counted as if they did not halve, which here is 17 %.
    assert ours["references"] == pytest.approx(encoding.get_total_flops(), rel=0.2)


def test_memory_counts_tokens_of_the_models_own_size(klein: Klein) -> None:
    def work(*references: int) -> int:
        shapes = (klein.variant, klein.transformer, klein.autoencoder, torch.float32)
        return activation_memory(*shapes, pixels=256**2, references=references).bytes

    shape = klein.transformer.shape
    kept = 2 * (shape.double_blocks + shape.single_blocks) * shape.hidden * 4
    assert work(256**2, 256**2) - work(256**2) == kept * 8 * 8
