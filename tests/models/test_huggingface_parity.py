"""CLIPModel and SiglipModel against Hugging Face's own code: from a folder of random weights to features and logits.

Small ones always; with `make test-full` the released widths, of the large ones with fewer blocks.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
import pytest
from huggingface_models import CLIP, OPENAI_LIKE, SIGLIP, Outputs, inputs, random_model, run, save
from oracles import require

from clip_jax import compiled
from clip_jax.architecture import Architecture
from clip_jax.models.clip import Definition
from clip_jax.models.variants import VARIANTS
from clip_jax.weights import huggingface
from clip_jax.weights.bundle import Bundle


def released(name: str, depth: int | None = None) -> Architecture:
    """Returns a named architecture as Hugging Face releases it, of so many blocks a tower."""
    named = VARIANTS[name]
    changes = {} if depth is None else {"depth": depth}
    if named.logit_bias:
        changes["activation"] = "gelu_tanh"  # throughout
    image, text = (dataclasses.replace(tower, **changes) for tower in (named.image, named.text))
    return dataclasses.replace(named, image=image, text=text)


SMALL = {"CLIP": CLIP, "CLIP as OpenAI's": OPENAI_LIKE, "SigLIP": SIGLIP}
RELEASED = {
    "openai/clip-vit-base-patch32": released("ViT-B/32"),
    "openai/clip-vit-large-patch14": released("ViT-L/14", depth=4),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": released("ViT-H-14", depth=2),
    "laion/CLIP-ViT-g-14-laion2B-s34B-b88K": released("ViT-g-14", depth=2),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": released("ViT-bigG-14", depth=2),
    "google/siglip-base-patch16-224": released("ViT-B-16-SigLIP"),
    "google/siglip-so400m-patch14-384": released("ViT-SO400M-14-SigLIP-384", depth=2),
    "google/siglip2-base-patch16-224": released("ViT-B-16-SigLIP2", depth=4),
    "google/siglip2-giant-opt-patch16-256": released("ViT-gopt-16-SigLIP2-256", depth=2),
}


@pytest.fixture(scope="module")
def one_thread():
    """Keeps PyTorch from a second thread, which would wait, at full load, for the first after each of many products."""
    torch = require("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Case(NamedTuple):
    """A model read from a folder, and what the original makes of the inputs."""

    architecture: Architecture
    bundle: Bundle
    inputs: tuple[np.ndarray, np.ndarray]
    expected: Outputs


def cases():
    yield from (pytest.param((architecture, False), id=name) for name, architecture in SMALL.items())
    for name, architecture in RELEASED.items():
        yield pytest.param((architecture, True), id=name, marks=pytest.mark.full)


@pytest.fixture(scope="module", params=cases())
def case(request, one_thread, tmp_path_factory):
    """One at a time; PyTorch's model is gone when ours is read."""
    architecture, full = request.param
    model, both = random_model(architecture), inputs(architecture, images=2 if full else 4)
    expected = run(model, *both)
    path = save(model, architecture, tmp_path_factory.mktemp("original"))
    del model
    jax.config.update("jax_disable_most_optimizations", not full)  # what is small need not be fast: it compiles sooner
    yield Case(architecture, huggingface.read(path), both, expected)
    jax.config.update("jax_disable_most_optimizations", False)
    (path / huggingface.TENSORS).unlink()


def test_features_and_logits_are_within_1e_5_of_the_originals(case):
    definition = Definition(case.bundle.architecture)
    placed = compiled.place(dict(case.bundle.arrays), definition)
    image_BHWC, tokens_AL = case.inputs
    img_BE = compiled.encode_image(definition, placed, image_BHWC)
    txt_AE = compiled.encode_text(definition, placed, tokens_AL)
    found = Outputs(img_BE, txt_AE, compiled.logits(definition, placed, img_BE, txt_AE))
    for ours, theirs in zip(found, case.expected, strict=True):
        assert (ours.dtype, ours.shape) == (np.float32, theirs.shape)
        assert np.abs(np.float64(ours) - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_the_architecture_is_read_from_the_configs_alone(case):
    found = case.bundle.architecture
    if case.architecture.preprocess.rgb_first:
        assert found == case.architecture
    else:  # a named one has OpenCLIP's preprocessing
        assert dataclasses.replace(found, preprocess=case.architecture.preprocess) == case.architecture
