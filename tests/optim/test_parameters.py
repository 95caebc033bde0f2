"""What each parameter is to an optimiser, of every architecture."""

import re

import numpy as np
import pytest

from clip_jax.models.clip import Definition
from clip_jax.models.variants import VARIANTS
from clip_jax.optim import flatten
from clip_jax.optim.parameters import KINDS, NO_MATRIX, kind_of, layers_of

ADAPTERS = {  # a rank of 2 beside ViT-B's kernels
    "attention/qkv/lora_a": ((12, 768, 3, 2), (768, 2)),
    "attention/qkv/lora_b": ((12, 3, 2, 12, 64), (2, 768)),
    "attention/out/lora_a": ((12, 12, 64, 2), (768, 2)),
    "attention/out/lora_b": ((12, 2, 768), (2, 768)),
    "mlp/up/lora_a": ((12, 768, 2), (768, 2)),
    "mlp/up/lora_b": ((12, 2, 3072), (2, 3072)),
    "mlp/down/lora_a": ((12, 3072, 2), (3072, 2)),
    "mlp/down/lora_b": ((12, 2, 768), (2, 768)),
}
SOME = ("ViT-B/32", "RN50", "ViT-B-16-SigLIP", "ViT-L-14-CLIPA", "ViT-B-16-SigLIP2")  # all kinds of paths


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    return {path: x.shape for path, x in flatten(Definition(VARIANTS[name]).shapes().params).items()}


@pytest.mark.parametrize("name", SOME)
def test_kernels_embeddings_and_projections_decay_and_gains_and_biases_do_not(name):
    for path in shapes_of(name):
        kept = path.endswith(("bias", "/scale", "class_embedding")) or path == "logit_scale"
        assert kind_of(path).decays is not kept, path
    assert not kind_of("text/blocks/mlp_norm/scale").decays, "though it is a matrix, [depth D]"


@pytest.mark.parametrize("name", SOME)
def test_what_a_matrix_sums_over_and_makes_are_the_sizes_of_its_product(name):
    """What is in a stack says its bias, whose dimensions are those that a product makes."""
    shapes = shapes_of(name)
    for path, shape in shapes.items():
        kind = kind_of(path)
        if kind.matrix == NO_MATRIX:
            assert not path.endswith(("kernel", "projection", "positional_embedding", "token_embedding")), path
            assert not kind.hidden
            continue
        stacked = "/blocks/" in path or "/rest/" in path
        dims = [dim % len(shape) for dims in kind.matrix for dim in dims]
        batch = [dim for dim in range(len(shape)) if dim not in dims]
        assert len(set(dims)) == len(dims)
        assert batch == [0] * stacked + [1 + stacked] * path.endswith("qkv/kernel"), path
        bias = shapes.get(path.replace("kernel", "bias"))
        if path.endswith("/kernel") and bias:
            assert shape[kind.matrix.outputs[0] :] == bias[-len(kind.matrix.outputs) :], path


def test_muon_has_the_kernels_within_blocks_and_none_that_reads_pixels_or_makes_the_embedding():
    hidden = {path for name in SOME for path in shapes_of(name) if kind_of(path).hidden}
    within = r"\w+/blocks/.*kernel|image/stage\d/.*kernel|image/stem[23]/kernel|image/map_pool/.*kernel"
    within += r"|image/attention_pool/(query|key|value)/kernel"
    assert hidden == {path for name in SOME for path in shapes_of(name) if re.fullmatch(within, path)}


@pytest.mark.parametrize("path", ADAPTERS)
def test_adapters_decay_and_are_matrices_of_their_rank(path):
    shape, sizes = ADAPTERS[path]
    kind = kind_of(f"image/blocks/{path}")
    assert kind.decays
    assert kind.hidden
    assert kind.matrix.sizes(shape) == sizes


def test_a_parameter_of_unknown_kind_is_an_error():
    with pytest.raises(AssertionError, match="no row for the parameter image/gain"):
        kind_of("image/gain")


def test_every_kind_is_the_first_to_match_something():
    paths = {path for name in SOME for path in shapes_of(name)} | {f"text/blocks/{path}" for path in ADAPTERS}
    assert {kind_of(path) for path in paths} == set(KINDS)


def test_layers_of_a_transformer_begin_with_embeddings_and_end_with_what_makes_the_embedding():
    layers = layers_of(Definition(VARIANTS["ViT-B-16-SigLIP"]).shapes().params["image"])
    assert layers.keys() > {"patch_embed/bias", "positional_embedding", "map_pool/mlp/up/kernel"}
    for path, layer in layers.items():
        if path.startswith("blocks/"):
            np.testing.assert_array_equal(layer, np.arange(1, 13))
        else:
            assert layer == {"post_norm": 12, "map_pool": 13}.get(path.split("/")[0], 0), path
    assert layers_of(Definition(VARIANTS["ViT-B/32"]).shapes().params["image"])["pre_norm/scale"] == 0


def test_layers_of_a_resnet_are_its_bottlenecks_in_their_order():
    layers = layers_of(Definition(VARIANTS["RN50"]).shapes().params["image"])
    assert layers["stem3/norm/scale"] == 0
    found = [layers[f"stage{n}/{part}/conv2/kernel"].tolist() for n in (1, 2, 3, 4) for part in ("first", "rest")]
    assert found == [1, [2, 3], 4, [5, 6, 7], 8, [9, 10, 11, 12, 13], 14, [15, 16]]
    assert layers["stage4/first/shortcut/norm/bias"] == 14
    assert {int(layer) for path, layer in layers.items() if path.startswith("attention_pool/")} == {17}


@pytest.mark.parametrize(
    "name", [*SOME, *[pytest.param(name, marks=pytest.mark.full) for name in VARIANTS if name not in SOME]]
)
def test_every_parameter_of_a_tower_has_a_layer(name):
    params = Definition(VARIANTS[name]).shapes().params
    for tower in ("image", "text"):
        shapes, layers = flatten(params[tower]), layers_of(params[tower])
        assert layers.keys() == shapes.keys()
        assert all(layer.shape in ((), shapes[path].shape[:1]) for path, layer in layers.items())
        assert {n for layer in layers.values() for n in layer.ravel()} == set(
            range(max(map(np.max, layers.values())) + 1)
        )
