"""Our numbers against those of OpenAI's own code, from the same weights: what `convert_weights.py --check` prints.

PyTorch and OpenAI's `clip` are needed here and nowhere else, so they are looked for when they are asked for. Of that
package only `model.py` is run: the rest of it wants torchvision.
"""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
import numpy as np
import rich.table

from clip_jax import compiled
from clip_jax.architecture import Architecture
from clip_jax.errors import UserError
from clip_jax.models.clip import Definition, Weights
from clip_jax.weights import openai
from clip_jax.weights.bundle import Bundle
from clip_jax.weights.mapping import unflatten

BAR = 1e-5  # of ‖a − b‖∞ / ‖b‖∞, in float32
PAIRS = 4

Outputs = dict[str, jax.Array | np.ndarray]  # what a model computes, in order


class Row(NamedTuple):
    """One line of the table."""

    name: str
    absolute: float  # ‖a − b‖∞
    relative: float  # ‖a − b‖∞ / ‖b‖∞

    @property
    def holds(self) -> bool:
        return self.relative <= BAR  # not so when it is NaN


def reference(bundle: Bundle) -> Outputs:
    """Returns what OpenAI's code computes in float32 with these weights: features, logits, and every block's output.

    Raises:
        UserError: PyTorch or OpenAI's code is not installed, or it has no such model.
    """
    torch, theirs = _import_torch(), _import_model()
    tensors = {name: torch.from_numpy(x.copy()) for name, x in openai.state_dict(bundle).items()}
    model = theirs.build_model(dict(tensors)).float()  # it rounds to float16, and takes some names out
    model.load_state_dict({name: x.float() for name, x in tensors.items() if name in model.state_dict()})
    outputs: Outputs = {}

    def keep(name: str, arrange: Callable) -> Callable:
        def hook(_module, _inputs, output):
            outputs[name] = arrange(output).numpy()

        return hook

    if hasattr(model.visual, "transformer"):
        blocks = list(model.visual.transformer.resblocks)
        image_arrange = lambda x: x.permute(1, 0, 2)  # noqa: E731 (one word for each layout)
    else:
        blocks = [block for stage in ("layer1", "layer2", "layer3", "layer4") for block in getattr(model.visual, stage)]
        image_arrange = lambda x: x.permute(0, 2, 3, 1)  # noqa: E731
    for i, block in enumerate(blocks):
        block.register_forward_hook(keep(f"image block {i}", image_arrange))
    for i, block in enumerate(model.transformer.resblocks):
        block.register_forward_hook(keep(f"text block {i}", lambda x: x.permute(1, 0, 2)))
    image_BHWC, tokens_BL = _inputs(bundle.architecture)
    with torch.no_grad():
        image_BCHW, tokens = torch.from_numpy(image_BHWC.transpose(0, 3, 1, 2).copy()), torch.from_numpy(tokens_BL)
        img_BE, txt_BE = model.encode_image(image_BCHW).numpy(), model.encode_text(tokens).numpy()
        logits_BB = model(image_BCHW, tokens)[0].numpy()
    return outputs | {"image features": img_BE, "text features": txt_BE, "logits": logits_BB}


def compare(bundle: Bundle, expected: Outputs) -> list[Row]:
    """Returns how far what we compute in float32 is from what a reference does, in the reference's order.

    Blocks are looked at as training runs them, features and logits are those of a loaded model.
    """
    definition = Definition(bundle.architecture)
    image_BHWC, tokens_BL = _inputs(bundle.architecture)
    with jax.default_matmul_precision("highest"):  # accelerators round float32 products unless they are told not to
        arrays = dict(bundle.arrays)
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


def _row(name: str, found: np.ndarray, expected: np.ndarray) -> Row:
    assert found.shape == expected.shape, f"{name}: {found.shape} against {expected.shape}"
    absolute = np.abs(found.astype(np.float64) - expected).max()
    return Row(name, float(absolute), float(absolute / np.abs(expected).max()))


def _inputs(architecture: Architecture) -> tuple[np.ndarray, np.ndarray]:
    """Returns images of noise and captions of several lengths, always the same."""
    random = np.random.default_rng(0)
    size, text = architecture.image.image_size, architecture.text
    image_BHWC = random.normal(size=(PAIRS, size, size, 3)).astype(np.float32)
    tokens_BL = np.zeros((PAIRS, text.context_length), np.int64)
    for row, length in zip(tokens_BL, np.linspace(2, text.context_length, PAIRS).astype(int), strict=True):
        row[: length - 1] = random.integers(1, text.vocab_size - 2, length - 1)
        row[length - 1] = text.vocab_size - 1
    return image_BHWC, tokens_BL


def _import_torch() -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"the check needs PyTorch ({error}): pip install torch clip-anytorch") from error
    return torch


def _import_model() -> ModuleType:
    """Returns the module `clip.model` alone: importing the package would import torchvision."""
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
