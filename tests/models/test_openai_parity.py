"""OpenAI's nine models against OpenAI's own code: from a file of random weights to features and logits.

At full size as they are used, by `load` from an archive such as OpenAI releases: ViT-B/32 always, the others
with `make test-full`. In bfloat16, and where they are narrowed, by the program that is trained, which scans the blocks.
A narrowed model keeps what makes it itself: the kind of tower, the patch, the depths of the stages, heads 64 wide.
"""

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from oracles import openai_clip, require

import clip_jax
from clip_jax.architecture import Architecture
from clip_jax.models.clip import Definition, Weights
from clip_jax.models.transformer import Compute
from clip_jax.models.variants import VARIANTS
from clip_jax.weights import openai
from clip_jax.weights.download import RELEASES
from clip_jax.weights.mapping import unflatten

ALWAYS = ("ViT-B/32",)


def narrowed(architecture: Architecture) -> Architecture:
    """Returns the architecture with images a third as wide, and towers of a quarter or an eighth of the width."""
    image, text = architecture.image, dataclasses.replace(quarter(architecture.text), vocab_size=1000)
    if image.kind == "resnet":
        image = dataclasses.replace(image, width=image.width // 8, num_heads=image.num_heads // 8)
        step = image.STRIDE
    else:
        image = quarter(image)
        step = image.patch_size
    image = dataclasses.replace(image, image_size=image.image_size // 3 // step * step)
    return dataclasses.replace(architecture, embed_dim=architecture.embed_dim // 8, image=image, text=text)


def quarter(tower):
    """Returns a Transformer tower with a quarter of the blocks, and of the heads, which stay 64 wide."""
    heads, width = tower.num_heads // 4, 64 * (tower.num_heads // 4)
    return dataclasses.replace(tower, num_heads=heads, width=width, mlp_dim=4 * width, depth=tower.depth // 4)


class Outputs(NamedTuple):
    """What a model makes of images and captions."""

    img_BE: np.ndarray
    txt_AE: np.ndarray
    logits_BA: np.ndarray  # per image


def inputs(architecture: Architecture, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images of noise, and captions of 2 to 77 tokens.

    Features of random models are all but orthogonal. Among 16 captions there are some that are less so; else logits
    are differences of rounding errors: of 2 × 2 cosines the largest can be 0.006, and float32 knows it to 1e-7.
    """
    random = np.random.default_rng(0)
    size, text = architecture.image.image_size, architecture.text
    image_BHWC = random.normal(size=(images, size, size, 3)).astype(np.float32)
    tokens_AL = np.zeros((16, text.context_length), np.int32)
    for row, length in zip(tokens_AL, np.linspace(2, text.context_length, len(tokens_AL)).astype(int), strict=True):
        row[:length] = [*random.integers(1, text.vocab_size - 1, length - 1), text.vocab_size - 1]
    return image_BHWC, tokens_AL


# --- theirs ---


@pytest.fixture(scope="module")
def one_thread():
    """Keeps PyTorch from a second thread, which would wait, at full load, for the first after each of many products."""
    torch = require("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_model(architecture: Architecture, noise):
    """Returns OpenAI's model as it initialises it, except that no gain, bias or temperature is left as it starts.

    Batch norm has seen the noise, as large as images are. With statistics of another size the signal dies out within a
    few blocks, and features are biases, whatever the image. The gains that end a bottleneck start at 0 and stay small:
    at 0.3 the 64 bottlenecks of RN50x64 would turn PyTorch's own rounding into an error of 1e-5.
    """
    clip, torch = openai_clip(), require("torch")
    image, text = architecture.image, architecture.text
    tower = (
        (image.depths, image.width, None) if image.kind == "resnet" else (image.depth, image.width, image.patch_size)
    )
    torch.manual_seed(0)
    model = clip.model.CLIP(
        *(architecture.embed_dim, image.image_size, *tower),
        *(text.context_length, text.vocab_size, text.width, text.num_heads, text.depth),
    )
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter += 0.1 * torch.randn(parameter.shape)
        for norm in norms:
            norm.momentum = 1.0  # what it has seen is what it sees now
        if norms:
            model.train().encode_image(noise)
    return model.eval()


def save_and_run(
    architecture: Architecture, path: Path, image_BHWC: np.ndarray, tokens_AL: np.ndarray, *, traced: bool
) -> Outputs:
    """Saves a model, a traced one or its state dict; returns what it computes in float32 with the weights saved."""
    clip, torch = openai_clip(), require("torch")
    image_BCHW, tokens = torch.from_numpy(image_BHWC.transpose(0, 3, 1, 2).copy()), torch.from_numpy(tokens_AL)
    model = random_model(architecture, noise=torch.randn(image_BCHW.shape, generator=torch.Generator().manual_seed(1)))
    clip.model.convert_weights(model)  # to float16 what released files have in it
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls its own format deprecated, and shapes in `if` a risk
        if traced:
            torch.jit.trace(model, (image_BCHW[:1], tokens[:1]), check_trace=False).save(path)
        else:
            torch.save(model.state_dict(), path)
        model.float()
        outputs = model.encode_image(image_BCHW), model.encode_text(tokens), model(image_BCHW, tokens)[0]
    return Outputs(*(x.numpy() for x in outputs))


# --- ours ---


def run_loaded(path: Path, image_BHWC: np.ndarray, tokens_AL: np.ndarray) -> Outputs:
    """Returns what users get."""
    model, _ = clip_jax.load(path)
    return Outputs(model.encode_image(image_BHWC), model.encode_text(tokens_AL), model(image_BHWC, tokens_AL)[0])


def run_scanned(path: Path, image_BHWC: np.ndarray, tokens_AL: np.ndarray, dtype: str = "float32") -> Outputs:
    """Returns what training's program computes."""
    bundle = openai.read(path, np.float32)
    definition = Definition(bundle.architecture, Compute(dtype=dtype))
    return scan(definition, unflatten(bundle.arrays, definition.shapes()), image_BHWC, tokens_AL)


@functools.partial(jax.jit, static_argnums=0)
def scan(definition: Definition, weights: Weights, image_BHWC, tokens_AL) -> Outputs:
    model = definition.bind(weights)
    img_BE, txt_AE = model.encode_image(image_BHWC), model.encode_text(tokens_AL)
    return Outputs(img_BE, txt_AE, model.logits(img_BE, txt_AE)[0])


# --- side by side ---


class Case(NamedTuple):
    """A file and inputs, and what the original makes of them."""

    full: bool
    path: Path
    inputs: tuple[np.ndarray, np.ndarray]
    expected: Outputs


def cases():
    """Yields (architecture, whether it is at full size)."""
    for name in RELEASES:
        yield pytest.param((VARIANTS[name], True), id=name, marks=() if name in ALWAYS else pytest.mark.full)
        if name not in ALWAYS:
            yield pytest.param((narrowed(VARIANTS[name]), False), id=f"{name} narrowed")


@pytest.fixture(scope="module", params=cases())
def case(request, one_thread, tmp_path_factory):
    """One at a time; PyTorch's model is gone when ours is read."""
    architecture, full = request.param
    path = tmp_path_factory.mktemp("original") / "model.pt"
    image_BHWC, tokens_AL = inputs(architecture, images=2 if full else 4)
    expected = save_and_run(architecture, path, image_BHWC, tokens_AL, traced=full)
    jax.config.update("jax_disable_most_optimizations", not full)  # what is small need not be fast: it compiles sooner
    yield Case(full, path, (image_BHWC, tokens_AL), expected)
    jax.config.update("jax_disable_most_optimizations", False)
    path.unlink()


def test_features_and_logits_are_within_1e_5_of_the_originals(case):
    run = run_loaded if case.full else run_scanned
    for found, expected in zip(run(case.path, *case.inputs), case.expected, strict=True):
        assert (found.dtype, found.shape) == (np.float32, expected.shape)
        assert np.abs(np.float64(found) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_features_in_bfloat16_have_cosines_of_0_999_or_more_with_the_originals(case):
    for found, expected in zip(run_scanned(case.path, *case.inputs, "bfloat16")[:2], case.expected[:2], strict=True):
        assert (found.dtype, found.shape) == ("bfloat16", expected.shape)
        found = np.float64(found)
        cosine_B = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
        assert cosine_B.min() >= 0.999
