"""Our numbers against those of other projects' own code, from files that they open: `convert_weights.py --check`.

PyTorch and the projects' packages are needed here and nowhere else, so they are looked for when they are asked for.
Each project reads the weights by its own loader; of OpenAI's package only `model.py` is run: the rest of it wants
torchvision.
"""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.table

from clip_jax import compiled
from clip_jax.architecture import Architecture
from clip_jax.errors import UserError
from clip_jax.models.clip import Definition, Weights
from clip_jax.weights.bundle import Bundle
from clip_jax.weights.mapping import unflatten

BAR = 1e-5  # of ‖a − b‖∞ / ‖b‖∞, in float32
PAIRS = 4
HF_MODELS = ("clip", "siglip")  # modules of transformers
RESNET_STAGES = ("layer1", "layer2", "layer3", "layer4")

Outputs = dict[str, jax.Array | np.ndarray]  # what a model computes, in order


class Row(NamedTuple):
    """One line of the table."""

    name: str
    absolute: float  # ‖a − b‖∞
    relative: float  # ‖a − b‖∞ / ‖b‖∞

    @property
    def holds(self) -> bool:
        return self.relative <= BAR  # not so when it is NaN


class Peer(NamedTuple):
    """How another project's code is asked for its numbers."""

    title: str
    packages: str  # as pip names them
    load_packages: Callable[[], Any]  # raises UserError where they are missing
    load: Callable[[Path], Any]  # a model of PyTorch's that computes in float32
    blocks: Callable[[Any], tuple[Iterable[Any], Iterable[Any]]]  # of the image tower, of the text tower
    run: Callable[[Any, Any, Any], tuple[Any, Any, Any]]  # image features, text features, logits per image
    first_is_position: bool = False  # whether states are [L B D]


def reference(peer: str, path: Path, architecture: Architecture) -> Outputs:
    """Returns what a project computes in float32 from a file or folder: features, logits, and every block's output.

    Raises:
        UserError: PyTorch or the project's packages are not installed.
    """
    asked = PEERS[peer]
    asked.load_packages()
    torch = _import("torch", asked)
    outputs: Outputs = {}

    def keep(name: str, order: Sequence[int]) -> Callable:
        def hook(_module, _inputs, output):
            states = output[0] if isinstance(output, tuple) else output
            outputs[name] = states.permute(*order).numpy() if states.ndim == len(order) else states.numpy()

        return hook

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their deprecations are not ours to mend
        model = asked.load(path)
        image_blocks, text_blocks = asked.blocks(model)
        states = (1, 0, 2) if asked.first_is_position else (0, 1, 2)
        image_states = (0, 2, 3, 1) if architecture.image.kind == "resnet" else states
        for i, block in enumerate(image_blocks):
            block.register_forward_hook(keep(f"image block {i}", image_states))
        for i, block in enumerate(text_blocks):
            block.register_forward_hook(keep(f"text block {i}", states))
        image_BHWC, tokens_BL = _inputs(architecture)
        image_BCHW = torch.from_numpy(image_BHWC.transpose(0, 3, 1, 2).copy())
        img_BE, txt_BE, logits_BB = asked.run(model, image_BCHW, torch.from_numpy(tokens_BL))
    features = {"image features": img_BE.numpy(), "text features": txt_BE.numpy(), "logits": logits_BB.numpy()}
    return outputs | features


def compare(bundle: Bundle, expected: Outputs) -> list[Row]:
    """Returns how far what we compute in float32 is from what a reference does, in the reference's order.

    Blocks are looked at as training runs them, features and logits are those of a loaded model.
    """
    definition = Definition(bundle.architecture)
    image_BHWC, tokens_BL = _inputs(bundle.architecture)
    arrays = {path: _wide(x) for path, x in bundle.arrays.items()}
    with jax.default_matmul_precision("highest"):  # accelerators round float32 products unless they are told not to
        found = _states(definition, unflatten(arrays, definition.shapes()), image_BHWC, tokens_BL)
        placed = compiled.place(arrays, definition)
        img_BE = compiled.encode_image(definition, placed, image_BHWC)
        txt_BE = compiled.encode_text(definition, placed, tokens_BL)
        logits_BB = compiled.logits(definition, placed, img_BE, txt_BE)
    found = found | {"image features": img_BE, "text features": txt_BE, "logits": logits_BB}
    found = {name: np.asarray(x) for name, x in found.items()}
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return [_row(name, found[name], expected[name]) for name in expected]


def table(rows: list[Row], title: str) -> rich.table.Table:
    """Returns the rows as they are printed."""
    lines = rich.table.Table(title=title, title_justify="left")
    lines.add_column("")
    for heading in ("max absolute error", "max relative error", f"≤ {BAR:.0e}"):
        lines.add_column(heading, justify="right")
    for row in rows:
        verdict = "yes" if row.holds else "[bold red]NO[/]"
        lines.add_row(row.name, f"{row.absolute:.2e}", f"{row.relative:.2e}", verdict)
    return lines


@functools.partial(jax.jit, static_argnums=0)
def _states(definition: Definition, weights: Weights, image_BHWC: jax.Array, tokens_BL: jax.Array) -> Outputs:
    model = definition.bind(weights)
    image_states, text_states = model.image.states(image_BHWC), model.text.states(tokens_BL)
    return {f"image block {i}": x for i, x in enumerate(image_states)} | {
        f"text block {i}": x for i, x in enumerate(text_states)
    }


def _wide(x: np.ndarray) -> np.ndarray:
    return x if np.issubdtype(x.dtype, np.integer) else np.asarray(x, np.float32)


def _row(name: str, found: np.ndarray, expected: np.ndarray) -> Row:
    assert found.shape == expected.shape, f"{name}: {found.shape} against {expected.shape}"
    absolute = np.abs(found.astype(np.float64) - expected).max()
    return Row(name, float(absolute), float(absolute / np.abs(expected).max()))


def _inputs(architecture: Architecture) -> tuple[np.ndarray, np.ndarray]:
    """Returns images of noise and captions of several lengths, always the same."""
    random = np.random.default_rng(0)
    size, text = architecture.image.image_size, architecture.text
    image_BHWC = random.normal(size=(PAIRS, size, size, 3)).astype(np.float32)
    last = text.vocab_size - 1 if text.eos_id is None else text.eos_id
    words = [id for id in range(1, min(text.vocab_size, 50_000) - 1) if id != last]
    tokens_BL = np.zeros((PAIRS, text.context_length), np.int64)
    for row, length in zip(tokens_BL, np.linspace(2, text.context_length, PAIRS).astype(int), strict=True):
        row[: length - 1] = random.choice(words, length - 1)
        row[length - 1] = last
    return image_BHWC, tokens_BL


def _import(module: str, peer: Peer) -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision without its operators raises the latter
        raise UserError(f"the check needs {peer.title} ({error}): pip install {peer.packages}") from error


# --- OpenAI's clip ---


def _openai_model() -> ModuleType:
    """Returns the module `clip.model` alone: importing the package would import torchvision."""
    _import("torch", PEERS["openai"])
    spec = importlib.util.find_spec("clip")
    path = Path(spec.origin).with_name("model.py") if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(
            "the check needs OpenAI's code: pip install clip-anytorch, or pip install git+https://github.com/openai/CLIP"
        )
    spec = importlib.util.spec_from_file_location("openai_clip_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load_openai(path: Path) -> Any:
    torch = importlib.import_module("torch")
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    model = _openai_model().build_model(dict(tensors)).float()  # it rounds to float16, and takes some names out
    model.load_state_dict({name: x.float() for name, x in tensors.items() if name in model.state_dict()})
    return model


def _openai_blocks(model: Any) -> tuple[Iterable[Any], Iterable[Any]]:
    visual = model.visual
    if hasattr(visual, "trunk"):  # OpenCLIP's, of timm
        image = visual.trunk.blocks
    elif hasattr(visual, "transformer"):
        image = visual.transformer.resblocks
    else:
        image = [block for stage in RESNET_STAGES for block in getattr(visual, stage)]
    return image, getattr(model, "text", model).transformer.resblocks


def _run_openai(model: Any, image_BCHW: Any, tokens_BL: Any) -> tuple[Any, Any, Any]:
    return model.encode_image(image_BCHW), model.encode_text(tokens_BL), model(image_BCHW, tokens_BL)[0]


# --- OpenCLIP ---


def _load_open_clip(path: Path) -> Any:
    open_clip = importlib.import_module("open_clip")
    return open_clip.create_model(f"local-dir:{path}", precision="fp32").float().eval()


def _run_open_clip(model: Any, image_BCHW: Any, tokens_BL: Any) -> tuple[Any, Any, Any]:
    return model.encode_image(image_BCHW), model.encode_text(tokens_BL), model.get_logits(image_BCHW, tokens_BL)[0]


# --- Hugging Face's transformers ---


def _load_huggingface(path: Path) -> Any:
    transformers = importlib.import_module("transformers")
    return transformers.AutoModel.from_pretrained(path, local_files_only=True).float().eval()


def _huggingface_blocks(model: Any) -> tuple[Iterable[Any], Iterable[Any]]:
    return model.vision_model.encoder.layers, model.text_model.encoder.layers


def _run_huggingface(model: Any, image_BCHW: Any, tokens_BL: Any) -> tuple[Any, Any, Any]:
    def tensor(output: Any) -> Any:
        return getattr(output, "pooler_output", output)  # version 5 returns more than the features

    logits_BB = model(pixel_values=image_BCHW, input_ids=tokens_BL).logits_per_image
    img_BE, txt_BE = model.get_image_features(pixel_values=image_BCHW), model.get_text_features(input_ids=tokens_BL)
    return tensor(img_BE), tensor(txt_BE), logits_BB


PEERS = {
    "openai": Peer(
        "OpenAI's code",
        "torch clip-anytorch",
        _openai_model,
        _load_openai,
        _openai_blocks,
        _run_openai,
        first_is_position=True,
    ),
    "open_clip": Peer(
        "OpenCLIP",
        "torch open_clip_torch",
        lambda: _import("open_clip", PEERS["open_clip"]),
        _load_open_clip,
        _openai_blocks,
        _run_open_clip,
    ),
    "huggingface": Peer(
        "transformers",
        "torch transformers",
        # The models' own modules: the package itself is always to be had, and finds out later what they lack.
        lambda: [_import(f"transformers.models.{kind}.modeling_{kind}", PEERS["huggingface"]) for kind in HF_MODELS],
        _load_huggingface,
        _huggingface_blocks,
        _run_huggingface,
    ),
}
