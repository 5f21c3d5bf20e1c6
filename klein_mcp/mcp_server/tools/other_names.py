"""Arguments of other image tools, and what ours call them."""

from collections.abc import Iterable, Sequence

from klein_mcp.errors import did_you_mean, one_line, quote

_NAMES = {
    "aspect_ratio": "aspect ratio shape orientation",
    "compare_with": "compare other second_image",
    "count": "n num_images number_of_images num_outputs batch_size variations",
    "image": "image_path image_url image_id input_image reference handle source url img",
    "images": "references reference_images input_images image_paths image_urls sources",
    "job": "id task task_id",
    "mask": "mask_image mask_path inpaint_mask",
    "max_size": "max_width max_height long_edge",
    "path": "filename file_name file output output_path destination save_to folder dir directory",
    "prompt": "text description instruction instructions caption query input edit",
    "region": "box bbox crop area rect",
    "search": "query text filter keyword keywords q",
    "seed": "random_seed noise_seed",
    "show": "preview output_mode return_type",
    "width": "size resolution dimensions image_size",
}
"""Our argument -> names under which models know it from elsewhere; one that a tool lacks is passed over."""

_OURS = [(other, ours) for ours, others in _NAMES.items() for other in others.split()]

_NOT_NEEDED = {
    **dict.fromkeys(("negative_prompt", "negative"), "Say in prompt what is there; there is no negative prompt."),
    **dict.fromkeys(
        ("steps", "num_steps", "num_inference_steps", "guidance", "guidance_scale", "cfg", "cfg_scale", "sampler"),
        "Leave it out: the model has its own.",
    ),
    **dict.fromkeys(("strength", "denoise", "denoising_strength"), "Leave it out: an edit keeps what it can."),
    **dict.fromkeys(("style", "quality"), "Say it in prompt."),
}
"""What no tool has, and what to do instead."""


def unknown_arguments(tool: str, unknown: Sequence[str], known: Iterable[str]) -> str:
    """Describe the first few arguments that a tool does not have."""
    names = list(known)
    named = " ".join(f"{tool} has no argument {quote(name)}. {_instead(name, names)}" for name in unknown[:3])
    more = f" And {len(unknown) - 3} more." if len(unknown) > 3 else ""
    return one_line(f"{named}{more} It takes {', '.join(names) or 'none'}.")


def _instead(name: str, known: Sequence[str]) -> str:
    word = name.lower()
    meant = next((ours for other, ours in _OURS if other == word and ours in known), "")
    if meant == "width":
        return "Give width and height, as numbers."
    if meant:
        return f"Did you mean {meant}?"
    if word in _NOT_NEEDED and "prompt" in known:
        return _NOT_NEEDED[word]
    return did_you_mean(name, known)
