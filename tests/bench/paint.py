"""One picture, by our engine or by diffusers' pipeline, from the same question."""

import io
from typing import Any

import torch
from PIL import Image

from engine.contract import Job, Result, Rgb8
from engine.families.klein.pipeline import Klein
from klein_mcp.images import codec
from tests.bench.full_size_models import Giant
from tests.bench.scenarios import Ask
from tests.bench.turns import Side


def engine_side(klein: Klein) -> Side:
    """Ours, to PNG bytes."""

    def paint(ask: Ask) -> Rgb8:
        *_, painting = klein.run(Job(ask.prompt, ask.references, ask.side, ask.side, seed=ask.seed))
        assert isinstance(painting, Result)
        return painting.image

    return Side(paint, codec.encode)


def pipeline_side(pipe: Any, giant: Giant) -> Side:
    """diffusers', to its PIL picture."""
    variant = giant.variant
    # A distilled model ignores guidance; the KV pipeline does not even ask.
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
            generator=torch.Generator().manual_seed(ask.seed),
            **unguided,
        ).images[0]

    return Side(paint)


def pillow_png(picture: Image.Image) -> bytes:
    """As `image.save("a.png")` writes it."""
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()
