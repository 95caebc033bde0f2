"""A pair's FLOP are those that the architecture asks for, and agree with published figures."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from clip_jax import flops, optim
from clip_jax.architecture import Lora, ResNetTower
from clip_jax.config import OptimConfig
from clip_jax.models.clip import Definition
from clip_jax.models.transformer import Compute
from clip_jax.models.variants import VARIANTS
from clip_jax.optim.factors import factors_of
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


# --- what training asks for: multiply-adds of ViT-B/32 by hand, of one pair ---

IMAGE, TEXT = (50, 768, 3072), (77, 512, 2048)  # positions, width, mlp_dim
PIXELS = 49 * 32 * 32 * 3 * 768
PROJECTIONS = 768 * 512, 512 * 512


def products(positions: int, width: int, mlp_dim: int) -> int:
    """Returns those of a block's kernels."""
    return positions * (4 * width**2 + 2 * width * mlp_dim)


def attention(positions: int, width: int, mlp_dim: int) -> int:
    return 2 * positions**2 * width


def block(*tower: int) -> int:
    return products(*tower) + attention(*tower)


def adapters(positions: int, width: int, mlp_dim: int) -> int:
    """Returns those of a block's adapters of rank 16, A and B: of queries, keys, values and the way out; of the MLP."""
    return 16 * positions * (4 * 2 * width + 2 * (width + mlp_dim))


BLOCKS, ADAPTERS = (12 * (of(*IMAGE) + of(*TEXT)) for of in (block, adapters))
ATTENTION = 12 * (attention(*IMAGE) + attention(*TEXT))
# Nothing that is trained lies before the first blocks' adapters: no gradient of what they and their kernels read.
FIRST = sum(positions * (3 * width**2 + 16 * 3 * width) for positions, width, _ in (IMAGE, TEXT))
WHOLE = PIXELS + BLOCKS + sum(PROJECTIONS)
MLP = 12 * 50 * 2 * 768 * 3072
BY_HAND = {
    "all": ({}, 3 * WHOLE - PIXELS),
    "the text tower": ({"lock_image": 0}, WHOLE + 2 * (12 * block(*TEXT) + PROJECTIONS[1])),
    "two projections": ({"lock_image": 1, "lock_text": 1}, WHOLE + sum(PROJECTIONS)),
    "the last blocks": (
        {"lock_image": 4, "lock_text": 3},
        WHOLE + 2 * (3 * block(*IMAGE) + 2 * block(*TEXT) + sum(PROJECTIONS)),
    ),
    "no MLP": ({"frozen": "image/blocks/mlp/.*"}, 3 * WHOLE - PIXELS - MLP),
    "the temperature": ({"frozen": "image/.*;text/.*"}, WHOLE),
    "adapters": ({}, 2 * (WHOLE - PIXELS) + PIXELS + ATTENTION + 3 * ADAPTERS - FIRST),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_training_asks_for_what_is_trained_and_what_lies_above_it(case):
    fields, by_hand = BY_HAND[case]
    architecture, lora = VARIANTS["ViT-B/32"], Lora(16, 16.0) if case == "adapters" else None
    factors = factors_of(OptimConfig(**fields), Definition(architecture, Compute(lora=lora)).shapes().params)
    assert flops.of_pair(architecture, lora=lora).training(factors) == 2 * by_hand


@pytest.mark.parametrize("name", ["RN50", "ViT-B-16-SigLIP", "ViT-L-14-CLIPA"])
def test_what_is_trained_whole_costs_three_forward_passes_but_for_the_gradient_of_the_pixels(name):
    architecture, counted = VARIANTS[name], flops.of_pair(VARIANTS[name])
    pixels = {"RN50": 112**2 * 9 * 3 * 32, "ViT-B-16-SigLIP": 224**2 * 3 * 768, "ViT-L-14-CLIPA": 224**2 * 3 * 1024}
    everything = factors_of(OptimConfig(), Definition(architecture).shapes().params)
    assert counted.training() == counted.training(everything) == 3 * (counted.image + counted.text) - 2 * pixels[name]


@pytest.mark.parametrize(
    "name", ["RN50", "ViT-B-16-SigLIP", *[pytest.param(name, marks=pytest.mark.full) for name in VARIANTS]]
)
def test_every_parameter_has_a_place_in_its_tower(name):
    architecture = VARIANTS[name]
    lora = None if isinstance(architecture.image, ResNetTower) else Lora(2, 2.0)
    shapes = optim.flatten(Definition(architecture, Compute(lora=lora)).shapes().params)
    counted = flops.of_pair(architecture, lora=lora)
    placed = {path for chain in (counted.image_chain, counted.text_chain) for layer in chain for path in layer.weights}
    assert placed == shapes.keys() - {"logit_scale", "logit_bias"}


def test_every_generation_that_is_planned_for_has_a_peak_by_all_the_names_of_its_chips():
    assert {flops.PEAKS[name] for name in ("TPU v5 lite", GENERATIONS["v5e"].chip)} == {GENERATIONS["v5e"].peak}
    assert [generation.peak / 1e12 for generation in GENERATIONS.values()] == [275, 197, 459, 918]


def test_patches_that_are_not_seen_cost_nothing_behind_the_embedding():
    architecture = VARIANTS["ViT-B/16"]
    half, whole = (flops.of_pair(architecture, dropped).image for dropped in (0.5, 0.0))
    assert 0.45 * whole < half < 0.55 * whole
