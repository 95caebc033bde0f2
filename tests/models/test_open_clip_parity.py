"""OpenCLIP's models against OpenCLIP's own code: from a file of random weights to features and logits.

With true widths and few blocks in `make test-full`, narrowed always (tests/open_clip_models.py); by the program that a
loaded model is computed with.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import open_clip_models
import pytest
from open_clip_models import Outputs, few_blocks, narrowed
from oracles import require

from clip_jax import compiled
from clip_jax.architecture import Architecture, TextTower, ViTTower
from clip_jax.models.clip import Definition
from clip_jax.weights import open_clip
from clip_jax.weights.bundle import Bundle

NAMES = (
    "ViT-B-32",
    "ViT-B-32-quickgelu",
    "RN50",
    "ViT-H-14",
    "ViT-g-14",
    "ViT-bigG-14",
    "ViT-L-14-CLIPA",
    "ViT-H-14-worldwide",
    "ViT-B-16-SigLIP",
    "ViT-SO400M-14-SigLIP",
    "ViT-B-16-SigLIP2",
)
# Narrowed they are ViT-g-14, with heads of another width, and ViT-B-16-SigLIP.
FULL_ONLY = ("ViT-H-14", "ViT-bigG-14", "ViT-SO400M-14-SigLIP")


@pytest.fixture
def unoptimised():
    """What is small need not be fast: it compiles sooner."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def compute(bundle: Bundle, image_BHWC: np.ndarray, tokens_AL: np.ndarray) -> Outputs:
    """Returns what a loaded model computes."""
    definition = Definition(bundle.architecture)
    placed = compiled.place(dict(bundle.arrays), definition)
    img_BE = compiled.encode_image(definition, placed, image_BHWC)
    txt_AE = compiled.encode_text(definition, placed, tokens_AL)
    return Outputs(*map(np.asarray, (img_BE, txt_AE, compiled.logits(definition, placed, img_BE, txt_AE))))


def assert_parity(config: dict[str, Any], depth: int, images: int, tmp_path) -> None:
    """Computes a random model with OpenCLIP's code and, from its state dict, with ours; `depth` is that of timm's."""
    torch = require("torch")
    architecture = open_clip.architecture_of({"model_cfg": config})
    on_timm = "timm_model_name" in config["vision_cfg"]
    if on_timm:
        image = dataclasses.replace(architecture.image, depth=depth)
        architecture = dataclasses.replace(architecture, image=image)
    image_BHWC, tokens_AL = open_clip_models.inputs(architecture, images)
    noise = np.random.default_rng(1).normal(size=image_BHWC.shape).astype(np.float32)
    model = open_clip_models.random_model(config, timm_depth=depth if on_timm else None, noise=noise)
    torch.save(model.state_dict(), tmp_path / "model.bin")
    expected = open_clip_models.run(model, image_BHWC, tokens_AL)
    del model
    bundle = open_clip.read_state_dict(tmp_path / "model.bin", architecture, np.float32)
    for name, found, it in zip(Outputs._fields, compute(bundle, image_BHWC, tokens_AL), expected, strict=True):
        assert (found.dtype, found.shape) == (np.float32, it.shape)
        assert np.abs(it).max() > 0.01
        assert np.abs(np.float64(found) - it).max() <= 1e-5 * np.abs(it).max(), name


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FULL_ONLY])
def test_a_narrowed_models_features_and_logits_are_within_1e_5_of_open_clips(name, unoptimised, tmp_path):
    assert_parity(narrowed(name), 1, 4, tmp_path)


def test_settings_that_no_released_model_has_together_mean_what_they_mean_to_open_clip(unoptimised, tmp_path):
    image = ViTTower(
        *(21, 6, 48, 2, 3, 100),
        **{"activation": "gelu_tanh", "eps": 1e-2, "pool": "mean", "pre_norm": False, "norm_after_pool": False},
    )
    text = TextTower(9, 50, 60, 2, 5, 61, "gelu", 3e-2, causal=False, pool="eos", eos_id=7, projection=False)
    config = open_clip.config_of(Architecture(60, image, text, logit_bias=True))["model_cfg"]
    assert_parity(config, 2, 4, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_a_models_features_and_logits_are_within_1e_5_of_open_clips(name, tmp_path):
    assert_parity(few_blocks(name, 3), 3, 2, tmp_path)
