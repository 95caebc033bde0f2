"""Stand-in for what helper C builds: how Hugging Face's preprocessor_config.json says a `Preprocess`."""

from typing import Any

from clip_jax.architecture import Preprocess
from clip_jax.errors import UserError

RESAMPLES = {3: "bicubic", 2: "bilinear"}


def from_huggingface(config: dict[str, Any], image_size: int) -> Preprocess:
    """Returns the preprocessing that an image processor's config says, for images of this size."""
    size = config.get("size")
    shortest = {"shortest_edge": image_size}
    if size not in (shortest, {"height": image_size, "width": image_size}):
        raise UserError(f"preprocessor_config.json: size={size!r} should be {image_size}, the model's")
    resize = "shortest" if size == shortest else "squash"
    mean, std = tuple(config["image_mean"]), tuple(config["image_std"])
    return Preprocess(mean, std, resize, RESAMPLES[config["resample"]])


def to_huggingface(preprocess: Preprocess, image_size: int) -> dict[str, Any]:
    """Returns an image processor's config."""
    if preprocess.resize == "longest":
        raise UserError("preprocess.resize='longest' is nothing that Hugging Face's image processors do")
    square = {"height": image_size, "width": image_size}
    shortest = preprocess.resize == "shortest"
    return {
        "image_processor_type": "CLIPImageProcessor" if shortest else "SiglipImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": image_size} if shortest else square,
        "resample": {word: number for number, word in RESAMPLES.items()}[preprocess.interpolation],
        "do_center_crop": shortest,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        "do_convert_rgb": True,
    }
