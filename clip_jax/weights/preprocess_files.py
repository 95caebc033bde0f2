"""What two families write of their preprocessing: read into `Preprocess`, and written from it.

OpenCLIP: `preprocess_cfg` in open_clip_config.json. Hugging Face: preprocessor_config.json, or `image_processor` in a
newer processor_config.json. Neither file says when an image is made RGB and where half a pixel goes: that is each
family's own code. So a model that changes hands is given other pixels, of images that are not RGB or of an odd size:
`from_open_clip(to_open_clip(preprocess))` is what OpenCLIP makes of it, and whoever converts can tell the difference.
"""

import math
import reprlib
import sys
from collections.abc import Mapping
from typing import Any

from clip_jax.architecture import INTERPOLATIONS, RESIZES, Preprocess
from clip_jax.errors import UserError, about, all_of

# --- OpenCLIP ---

INTERPOLATION_WORDS = {word: word for word in INTERPOLATIONS} | {"random": "bicubic"}  # random in training only
RESIZE_WORDS = {word: word for word in RESIZES}


def from_open_clip(preprocess_cfg: Mapping[str, Any]) -> Preprocess:
    """Returns what OpenCLIP's `image_transform` does in evaluation; what a config does not say is OpenAI's.

    Its `size` is not read: OpenCLIP, too, takes that of the model.

    Raises:
        UserError: values that OpenCLIP does not know, all of them.
    """
    given = {name: value for name, value in preprocess_cfg.items() if value}  # theirs takes 0 and "" for not given
    with about("preprocess_cfg"):
        _, mean, std, resize, interpolation, fill = all_of(
            lambda: _word(given, "mode", {"RGB": "RGB"}, "RGB"),
            lambda: _colour(given, "mean", Preprocess.mean),
            lambda: _colour(given, "std", Preprocess.std),
            lambda: _word(given, "resize_mode", RESIZE_WORDS, "shortest"),
            lambda: _word(given, "interpolation", INTERPOLATION_WORDS, "bicubic"),
            lambda: _level(given, "fill_color", 0),
        )
    return Preprocess(mean, std, resize, interpolation, fill)


def to_open_clip(preprocess: Preprocess) -> dict[str, Any]:
    """Returns OpenCLIP's `preprocess_cfg`, but for the size: that is the model's."""
    return {
        "mode": "RGB",
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.interpolation,
        "resize_mode": preprocess.resize,
        "fill_color": preprocess.fill,
    }


# --- Hugging Face ---

RESAMPLES = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_pad": False, "use_square_size": False}
RESCALE_FACTOR = 1 / 255
# The classes of processors, and what they do where a config does not say.
PROCESSORS = {
    "CLIPImageProcessor": {
        "image_mean": Preprocess.mean,
        "image_std": Preprocess.std,
        "size": {"shortest_edge": 224},
        "do_center_crop": True,
        "crop_size": 224,
    },
    "SiglipImageProcessor": {
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "size": {"height": 224, "width": 224},
        "do_center_crop": False,
    },
}


def from_huggingface(preprocessor_config: Mapping[str, Any], image_size: int) -> Preprocess:
    """Returns what Hugging Face's processors do on PIL, for a model of this image size.

    A config that names no class is read as `CLIPImageProcessor`'s; a caller who knows better adds the name. Of images
    that are not RGB its `do_convert_rgb` decides only whether they fail.

    Raises:
        UserError: a class, steps or values that are not supported, or pixels that are not the model's; all of them.
    """
    kind = _class_of(preprocessor_config)
    given = PROCESSORS[kind] | dict(preprocessor_config)  # null is no default: theirs takes it for false
    with about(f"the config of the image processor ({kind})"):
        _, mean, std, resize, interpolation = all_of(
            lambda: _check_steps(given),
            lambda: _colour(given, "image_mean"),
            lambda: _colour(given, "image_std"),
            lambda: _resize(given, image_size),
            lambda: _word(given, "resample", RESAMPLES, 3),
        )
    return Preprocess(mean, std, resize, interpolation, rgb_first=True, crop_floor=True)


def to_huggingface(preprocess: Preprocess, image_size: int) -> dict[str, Any]:
    """Returns the content of a preprocessor_config.json; it says all, so that its class changes nothing.

    Raises:
        UserError: an image is resized as none of their processors does.
    """
    ways = {
        "shortest": ("CLIPImageProcessor", {"shortest_edge": image_size}),
        "squash": ("SiglipImageProcessor", {"height": image_size, "width": image_size}),
    }
    if preprocess.resize not in ways:
        raise UserError(
            f"preprocess.resize={preprocess.resize!r}: the image processors of Hugging Face's CLIP and SigLIP know "
            f"{' and '.join(ways)} only; choose another format"
        )
    kind, size = ways[preprocess.resize]
    numbers = {word: number for number, word in RESAMPLES.items()}
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": numbers[preprocess.interpolation],
        "do_center_crop": preprocess.resize == "shortest",
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": RESCALE_FACTOR,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def _class_of(config: Mapping[str, Any]) -> str:
    """Returns the name in `PROCESSORS` of the class that a config names, as it was spelled over the years."""
    name = config.get("image_processor_type") or config.get("feature_extractor_type") or "CLIPImageProcessor"
    found = str(name).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if found not in PROCESSORS:
        raise UserError(
            f"image_processor_type={reprlib.repr(name)} is not supported; there are: {', '.join(PROCESSORS)}"
        )
    return found


def _check_steps(config: Mapping[str, Any]) -> None:
    """Raises UserError with all steps that the towers' input needs and a config leaves out, or the other way round."""
    wrong = [
        f"{name}={reprlib.repr(config[name])} should be {wanted}"
        for name, wanted in STEPS.items()
        if bool(config.get(name, wanted)) != wanted
    ]
    factor = config.get("rescale_factor", RESCALE_FACTOR)
    if not (_is_number(factor) and math.isclose(factor, RESCALE_FACTOR, rel_tol=1e-6)):
        wrong.append(f"rescale_factor={reprlib.repr(factor)} should be 1/255")
    if wrong:
        raise UserError("; ".join(wrong))


def _resize(config: Mapping[str, Any], image_size: int) -> str:
    """Returns the word for what becomes of an image, where it becomes a square of the model's size."""
    size = _sides(config["size"], to_square=bool(config.get("default_to_square", False)))
    crop = _sides(config.get("crop_size"), to_square=True) if config["do_center_crop"] else {}
    said = ", ".join(
        f"{name}={reprlib.repr(config.get(name))}" for name in ("size", "do_center_crop", "crop_size") if name in config
    )
    ways = {(("shortest_edge",), True): "shortest", (("height", "width"), True): "squash"}
    ways |= {(("height", "width"), False): "squash"}
    way = ways.get((tuple(sorted(size)), bool(crop)))
    if way is None or set(crop) not in (set(), {"height", "width"}):
        raise UserError(f"{said}: an image should be resized to a square, or by its shortest_edge and then cropped")
    if any(side != image_size for side in (*size.values(), *crop.values())):
        raise UserError(f"{said}: not the model's image_size={image_size}")
    return way


def _sides(value: Any, *, to_square: bool) -> dict[str, Any]:
    """Returns a size as newer files write it, of any that older ones had: a number, [height, width]."""
    if isinstance(value, Mapping):
        return {str(name): side for name, side in value.items() if side is not None}
    if isinstance(value, list | tuple) and len(value) == 2:
        return {"height": value[0], "width": value[1]}
    return {"height": value, "width": value} if to_square else {"shortest_edge": value}


# --- values ---


def _word(config: Mapping[str, Any], name: str, words: Mapping[Any, str], default: Any) -> str:
    value = config.get(name, default)
    for known, word in words.items():
        if value == known:  # a value of a file can be a list, which has no hash
            return word
    raise UserError(f"{name}={reprlib.repr(value)} is not one of {', '.join(map(str, words))}")


def _level(config: Mapping[str, Any], name: str, default: int) -> int:
    value = config.get(name, default)
    if type(value) is not int or not 0 <= value <= 255:  # True is an int, too
        raise UserError(f"{name}={reprlib.repr(value)} should be 0 to 255")
    return value


def _colour(config: Mapping[str, Any], name: str, default: Any = None) -> tuple[float, float, float]:
    """Returns three numbers; one stands for three that are equal."""
    value = config.get(name, default)
    numbers = [value] * 3 if _is_number(value) else value
    if not isinstance(numbers, list | tuple) or len(numbers) != 3 or not all(_is_number(x) for x in numbers):
        raise UserError(f"{name}={reprlib.repr(value)} should be three numbers, red, green and blue")
    red, green, blue = (float(x) for x in numbers)
    return red, green, blue


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
