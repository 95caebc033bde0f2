"""OpenAI's files: TorchScript archives or state dicts with the names of its `clip` package, read and written.

The format holds tensors and three numbers. All else follows from the shapes by rules in OpenAI's code (`build_model`):
heads are 64 wide, an MLP is four times as wide as its tower, the activation is QuickGELU.
"""

import math
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from clip_jax.architecture import Architecture, ResNetTower, TextTower, ViTTower
from clip_jax.checked import leaves
from clip_jax.errors import UserError, about
from clip_jax.models.clip import Definition
from clip_jax.weights import archive
from clip_jax.weights.bundle import Bundle, variant_of
from clip_jax.weights.mapping import DType, Rule, export_tensors, flatten, import_tensors
from clip_jax.weights.modules import ATTENTION, NORM

HEAD_WIDTH = 64
NUMBERS = {"input_resolution", "context_length", "vocab_size"}  # which lie among the tensors of OpenAI's files
# How a project's own transform treats images that are not RGB, and half a pixel: no part of a model.
PEERS_OWN = ("preprocess.rgb_first", "preprocess.crop_floor")
MLP_RATIO = 4

CONV = "F D H W -> H W D F"

BATCH_NORM = (
    *NORM,
    Rule("running_mean", "mean", "D -> D"),
    Rule("running_var", "variance", "D -> D"),
    Rule("num_batches_tracked", "count", "->"),
)
BLOCK = (
    *(rule.inside("ln_1", "attention_norm") for rule in NORM),
    *(rule.inside("attn", "attention") for rule in ATTENTION),
    *(rule.inside("ln_2", "mlp_norm") for rule in NORM),
    Rule("mlp.c_fc.weight", "mlp/up/kernel", "F D -> D F"),
    Rule("mlp.c_fc.bias", "mlp/up/bias", "F -> F"),
    Rule("mlp.c_proj.weight", "mlp/down/kernel", "D F -> F D"),
    Rule("mlp.c_proj.bias", "mlp/down/bias", "D -> D"),
)
BOTTLENECK = (
    Rule("conv1.weight", "conv1/kernel", CONV),
    *(rule.inside("bn1", "conv1/norm") for rule in BATCH_NORM),
    Rule("conv2.weight", "conv2/kernel", CONV),
    *(rule.inside("bn2", "conv2/norm") for rule in BATCH_NORM),
    Rule("conv3.weight", "conv3/kernel", CONV),
    *(rule.inside("bn3", "conv3/norm") for rule in BATCH_NORM),
    Rule("downsample.0.weight", "shortcut/kernel", CONV),
    *(rule.inside("downsample.1", "shortcut/norm") for rule in BATCH_NORM),
)
ATTENTION_POOL = (
    Rule("positional_embedding", "positional_embedding", "P D -> P D"),
    Rule("q_proj.weight", "query/kernel", "(N K) D -> D N K"),
    Rule("q_proj.bias", "query/bias", "(N K) -> N K"),
    Rule("k_proj.weight", "key/kernel", "(N K) D -> D N K"),
    Rule("k_proj.bias", "key/bias", "(N K) -> N K"),
    Rule("v_proj.weight", "value/kernel", "(N K) D -> D N K"),
    Rule("v_proj.bias", "value/bias", "(N K) -> N K"),
    Rule("c_proj.weight", "out/kernel", "E (N K) -> N K E"),
    Rule("c_proj.bias", "out/bias", "E -> E"),
)
RULES = (
    Rule("logit_scale", "logit_scale", "->"),
    # the text tower
    Rule("token_embedding.weight", "text/token_embedding", "V D -> V D"),
    Rule("positional_embedding", "text/positional_embedding", "L D -> L D"),
    *(rule.inside("transformer.resblocks.{i}", "text/blocks", "[i]") for rule in BLOCK),
    *(rule.inside("ln_final", "text/post_norm") for rule in NORM),
    Rule("text_projection", "text/projection", "D E -> D E"),
    # a ViT
    Rule("visual.conv1.weight", "image/patch_embed/kernel", "D C H W -> H W C D"),
    Rule("visual.class_embedding", "image/class_embedding", "D -> D"),
    Rule("visual.positional_embedding", "image/positional_embedding", "P D -> P D"),
    *(rule.inside("visual.ln_pre", "image/pre_norm") for rule in NORM),
    *(rule.inside("visual.transformer.resblocks.{i}", "image/blocks", "[i]") for rule in BLOCK),
    *(rule.inside("visual.ln_post", "image/post_norm") for rule in NORM),
    Rule("visual.proj", "image/projection", "D E -> D E"),
    # a ResNet
    Rule("visual.conv{s}.weight", "image/stem{s}/kernel", CONV),
    *(rule.inside("visual.bn{s}", "image/stem{s}/norm") for rule in BATCH_NORM),
    *(rule.inside("visual.layer{s}.0", "image/stage{s}/first") for rule in BOTTLENECK),
    *(rule.inside("visual.layer{s}.{i+1}", "image/stage{s}/rest", "[i]") for rule in BOTTLENECK),
    *(rule.inside("visual.attnpool", "image/attention_pool") for rule in ATTENTION_POOL),
)

# Names of tensors that are no weights.
IGNORED = (
    r"(visual\.)?transformer\.resblocks\.\d+\.attn_mask",  # the causal mask, where a trace has it as an attribute
)

# What the sizes are taken from, and how many dimensions it has.
TEXT_SIZES = {
    "text_projection": 2,
    "token_embedding.weight": 2,
    "positional_embedding": 2,
    "transformer.resblocks.0.mlp.c_fc.weight": 2,
}
VIT_SIZES = {
    "visual.proj": 2,
    "visual.conv1.weight": 4,
    "visual.positional_embedding": 2,
    "visual.transformer.resblocks.0.mlp.c_fc.weight": 2,
}
RESNET_SIZES = {
    "visual.attnpool.positional_embedding": 2,
    "visual.layer1.0.conv1.weight": 4,
}


def read(path: Path, dtype: DType | None = None) -> Bundle:
    """Returns the model in one of OpenAI's files; floats in `dtype`, or where that is None as they are.

    Raises:
        UserError: not such a file, a damaged one, or tensors that are not those of a CLIP; all of them.
    """
    return bundle_of(archive.read(path), path, dtype)


def bundle_of(tensors: Mapping[str, np.ndarray], path: Path, dtype: DType | None = None) -> Bundle:
    """Returns the model that a file's tensors are; errors as `read`'s."""
    tensors = {name: x for name, x in tensors.items() if not _is_ignored(name)}
    with about(path):
        architecture = architecture_of(tensors)
        weights = {name: x for name, x in tensors.items() if name not in _numbers(architecture)}
        arrays = import_tensors(RULES, weights, flatten(Definition(architecture).shapes()), dtype)
    return Bundle(architecture, arrays, variant_of(architecture, path.stem), str(path))


def is_certain(path: Path, tensors: Mapping[str, np.ndarray]) -> bool:
    """Returns whether a file must be OpenAI's; a state dict of the same names without its numbers may be OpenCLIP's."""
    return bool(NUMBERS & tensors.keys()) or (zipfile.is_zipfile(path) and archive.is_torchscript(path))


def write(path: Path, bundle: Bundle) -> None:
    """Writes the model as a state dict that OpenAI's own `clip.load` opens; the same model gives the same bytes.

    The file has the bundle's dtypes; `clip.load` itself makes most floats float16, even where it computes in float32.

    A file of PyTorch's that is there already is replaced.

    Raises:
        UserError: what the format cannot hold, all of it; or a file that cannot be written, or is something else.
    """
    if os.path.lexists(path) and not (os.path.isfile(path) and zipfile.is_zipfile(path)):  # noqa: PTH113 (Path's fails for a long name)
        raise UserError(f"{path} is there already and no PyTorch file; choose another name")
    archive.write(path, state_dict(bundle))


def state_dict(bundle: Bundle) -> Mapping[str, np.ndarray]:
    """Returns the tensors of a model by OpenAI's names, the three numbers among them.

    Raises:
        UserError: what the format cannot hold, all of it.
    """
    with about(bundle.variant):
        check_held(bundle.architecture)
    numbers = {name: np.array(n, np.int64) for name, n in _numbers(bundle.architecture).items()}
    return numbers | export_tensors(RULES, bundle.arrays)


def architecture_of(tensors: Mapping[str, np.ndarray]) -> Architecture:
    """Returns what OpenAI's code would build for these tensors.

    Raises:
        UserError: names that the sizes are taken from are missing, or the sizes contradict each other.
    """
    shapes = _shapes_of(tensors)
    vocab_size, text_width = shapes["token_embedding.weight"]
    text = _text(shapes["positional_embedding"][0], vocab_size, text_width, _count(tensors, "transformer.resblocks."))
    if "visual.proj" in shapes:
        width, _, _, patch_size = shapes["visual.conv1.weight"]
        image_size = patch_size * _side(shapes["visual.positional_embedding"][0])
        image = _vit(image_size, patch_size, width, _count(tensors, "visual.transformer.resblocks."))
    else:
        image_size = ResNetTower.STRIDE * _side(shapes["visual.attnpool.positional_embedding"][0])
        depths = tuple(_count(tensors, f"visual.layer{stage}.") for stage in (1, 2, 3, 4))
        image = _resnet(image_size, shapes["visual.layer1.0.conv1.weight"][0], depths)
    architecture = Architecture(shapes["text_projection"][1], image, text)
    wrong = [
        f"{name}={tensors[name].tolist()}, but the shapes say {n}"
        for name, n in _numbers(architecture).items()
        if name in tensors and tensors[name].tolist() != n
    ]
    wrong += [
        f"{name} has {shape[0]} rows, not {MLP_RATIO} × {shape[1]}"
        for name, shape in shapes.items()
        if name.endswith("mlp.c_fc.weight") and shape[0] != MLP_RATIO * shape[1]
    ]
    if wrong:
        raise UserError(f"not a model that OpenAI's code could build: {'; '.join(wrong)}")
    return architecture


def _shapes_of(tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes that the sizes are taken from, all there and none of them empty."""
    image = max((VIT_SIZES, RESNET_SIZES), key=lambda sizes: len(sizes.keys() & tensors.keys()))
    sizes = TEXT_SIZES | image
    fits = {name: tensors[name].shape for name, ndim in sizes.items() if name in tensors and tensors[name].ndim == ndim}
    if absent := [f"{name} ({ndim} dimensions)" for name, ndim in sizes.items() if not all(fits.get(name, [0]))]:
        raise UserError(
            f"not a CLIP with OpenAI's names: it has no {', no '.join(absent)}; "
            f"of its {len(tensors)} tensors the first are {', '.join(sorted(tensors)[:3])}"
        )
    return fits


def check_held(architecture: Architecture) -> None:
    """Raises UserError when a reader of the format would take something for something else; lists all of it.

    How images and texts are prepared is no part of the format: its reader does what OpenAI's does.
    """
    if lost := _lost(architecture):
        raise UserError(
            f"OpenAI's format cannot hold it, which stores no settings: its reader would take {'; '.join(lost)}; "
            "choose another format"
        )


def _lost(architecture: Architecture) -> list[str]:
    """Returns what a reader of the format would take for something else, with both values."""
    image, text = architecture.image, architecture.text
    towers, lost = {"image": image, "text": text}, []
    readers = {
        "image": lambda: (
            _vit(image.image_size, image.patch_size, image.width, image.depth)
            if isinstance(image, ViTTower)
            else _resnet(image.image_size, image.width, image.depths)
        ),
        "text": lambda: _text(text.context_length, text.vocab_size, text.width, text.depth),
    }
    for name, seen_tower in readers.items():
        try:
            towers[name] = seen_tower()
        except UserError as error:
            lost.append(str(error))
    seen = Architecture(architecture.embed_dim, **towers)
    values = {where: value for where, _, value in leaves(seen)}
    return lost + [
        f"{where}={values[where]!r} for {value!r}"
        for where, _, value in leaves(architecture)
        if values[where] != value and where not in PEERS_OWN
    ]


def _vit(image_size: int, patch_size: int, width: int, depth: int) -> ViTTower:
    return ViTTower(image_size, patch_size, width, depth, _heads("image", width), MLP_RATIO * width)


def _resnet(image_size: int, width: int, depths: tuple[int, ...]) -> ResNetTower:
    return ResNetTower(image_size, width, depths, _heads("image", 32 * width))


def _text(context_length: int, vocab_size: int, width: int, depth: int) -> TextTower:
    return TextTower(context_length, vocab_size, width, depth, _heads("text", width), MLP_RATIO * width)


def _heads(tower: str, width: int) -> int:
    """Returns how many heads OpenAI's code gives a width."""
    if width < HEAD_WIDTH:
        raise UserError(f"the {tower} tower's width={width} is less than one of OpenAI's heads: {HEAD_WIDTH}")
    return width // HEAD_WIDTH


def _is_ignored(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in IGNORED)


def _numbers(architecture: Architecture) -> dict[str, int]:
    """Returns the numbers that lie among the tensors, by their names."""
    text = architecture.text
    return {
        "input_resolution": architecture.image.image_size,
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
    }


def _count(names: Iterable[str], prefix: str) -> int:
    """Returns how many different numbers follow the prefix."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})


def _side(positions: int) -> int:
    """Returns the side of the square of patches that, with one position more, has so many positions."""
    side = math.isqrt(positions - 1)
    if side**2 + 1 != positions or side == 0:
        raise UserError(f"not a CLIP: {positions} positions in the image tower are no square and one")
    return side
