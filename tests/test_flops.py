"""A pair's FLOP are those that the architecture asks for, and agree with published figures."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from clip_jax import flops
from clip_jax.architecture import ResNetTower
from clip_jax.models.clip import Definition
from clip_jax.models.transformer import Compute
from clip_jax.models.variants import VARIANTS
from clip_jax.planning.topology import GENERATIONS

# Forward GFLOP of one image and one text of OpenAI's models, as counters of PyTorch's find them.
PUBLISHED = {
    "RN50": (12.22, 5.96),
    "RN101": (19.54, 5.96),
    "RN50x4": (42.56, 9.27),
    "RN50x16": (149.39, 13.30),
    "RN50x64": (529.11, 23.55),
    "ViT-B/32": (8.82, 5.96),
    "ViT-B/16": (35.13, 5.96),
    "ViT-L/14": (162.03, 13.30),
    "ViT-L/14@336px": (381.92, 13.30),
}


def unused_queries(tower: ResNetTower, embed_dim: int) -> int:
    """Returns what counters add for an attention pool that asks with every position and keeps one answer: queries, the
    way out, scores and what they weigh."""
    width, positions = 32 * tower.width, tower.num_patches + 1
    return 2 * (positions - 1) * (width**2 + width * embed_dim + 2 * positions * width)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_pairs_flops_are_the_published_ones_within_a_tenth_of_a_percent(name):
    architecture, (image, text) = VARIANTS[name], PUBLISHED[name]
    counted = flops.of_pair(architecture)
    extra = unused_queries(architecture.image, architecture.embed_dim) if name.startswith("RN") else 0
    assert (counted.image + extra) / 1e9 == pytest.approx(image, rel=1e-3)
    assert counted.text / 1e9 == pytest.approx(text, rel=1e-3)


@pytest.mark.parametrize(
    ("architecture", "within"),
    [
        (VARIANTS["ViT-B-16-SigLIP"], 0.02),
        (VARIANTS["ViT-L-14-CLIPA"], 0.02),
        # XLA leaves out what a convolution would multiply with the margin, half of which is at these sizes
        (dataclasses.replace(VARIANTS["RN50"], image=ResNetTower(224, 64, (1, 1, 1, 1), 32)), 0.05),
    ],
    ids=["SigLIP", "CLIPA", "ResNet"],
)
def test_xla_counts_a_towers_forward_pass_alike(architecture, within):
    # One block after the other: XLA counts the body of a loop once.
    definition, side = Definition(architecture, Compute(unroll=True)), architecture.image.image_size
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    tower = jax.jit(lambda weights, image: definition.bind(weights).encode_image(image))
    counted = tower.lower(definition.shapes(), image).cost_analysis()["flops"]
    assert flops.of_pair(architecture).image == pytest.approx(counted, rel=within)


def test_training_is_three_forward_passes_and_one_of_a_tower_that_is_frozen():
    counted = flops.of_pair(VARIANTS["ViT-B/32"])
    assert counted.training() == 3 * (counted.image + counted.text)
    assert counted.training(frozen=["image"]) == counted.image + 3 * counted.text


def test_every_generation_that_is_planned_for_has_a_peak_by_all_the_names_of_its_chips():
    assert {flops.PEAKS[name] for name in ("TPU v5 lite", GENERATIONS["v5e"].chip)} == {GENERATIONS["v5e"].peak}
    assert [generation.peak / 1e12 for generation in GENERATIONS.values()] == [275, 197, 459, 918]


def test_patches_that_are_not_seen_cost_nothing_behind_the_embedding():
    architecture = VARIANTS["ViT-B/16"]
    half, whole = (flops.of_pair(architecture, dropped).image for dropped in (0.5, 0.0))
    assert 0.45 * whole < half < 0.55 * whole
