"""One image, by our engine or by diffusers' pipeline, from the same question and the same latents."""

from typing import Any

import torch
from PIL import Image

from engine.contract import GRID, Exact, Job, Mode, Result, Rgb8
from engine.families.klein.pipeline import Klein
from klein_mcp.images import codec
from tests.bench.full_size_models import Giant
from tests.bench.scenarios import Ask
from tests.bench.turns import Side


def engine_side(klein: Klein, mode: Mode | None = None) -> Side:
    """Our side, to PNG bytes."""

    def paint(ask: Ask) -> Rgb8:
        job = Job(ask.prompt, ask.references, size=Exact(ask.side, ask.side), seed=ask.seed, mode=mode)
        *_, result = klein.run(job)
        assert isinstance(result, Result)
        return result.image

    return Side(paint, codec.encode)


def pipeline_side(pipe: Any, giant: Giant) -> Side:
    """The side of diffusers, to its PIL image."""
    variant = giant.variant
    # A distilled model ignores guidance; the KV pipeline does not even take it.
    unguided = {} if "KV" in type(pipe).__name__ else {"guidance_scale": 1.0}

    def paint(ask: Ask) -> Image.Image:
        return pipe(
            prompt=ask.prompt,
            image=[Image.fromarray(reference) for reference in ask.references] or None,
            width=ask.side,
            height=ask.side,
            num_inference_steps=variant.steps,
            max_sequence_length=variant.text_length,
            text_encoder_out_layers=variant.text_layers,
            latents=_noise(ask, giant).to(pipe.transformer.device, pipe.transformer.dtype),
            **unguided,
        ).images[0]

    return Side(paint)


def _noise(ask: Ask, giant: Giant) -> torch.Tensor:
    """The latents that our engine draws: fp32 on the CPU.

    diffusers draws them in the pipeline's number format, which in bf16 is another sequence on some processors.
    """
    tokens = ask.side // GRID
    generator = torch.Generator().manual_seed(ask.seed)
    return torch.randn((1, giant.transformer.channels, tokens, tokens), generator=generator)
