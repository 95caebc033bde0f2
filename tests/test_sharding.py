"""The mesh, the table of rules, and the way of a batch onto the devices."""

import dataclasses
import re
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax import optim, sharding
from clip_jax.architecture import Architecture, Lora, ViTTower
from clip_jax.config import MeshConfig, OptimConfig, Steps
from clip_jax.errors import UserError
from clip_jax.models.clip import Definition
from clip_jax.models.transformer import Compute
from clip_jax.models.variants import VARIANTS
from clip_jax.training.state import abstract_state
from clip_jax.typing import Batch


def optimizer_of(architecture: Architecture, **config) -> optim.Optimizer:
    return optim.make(OptimConfig(**config), Definition(architecture).shapes().params, Steps(10_000, 2000))


def paths(name: str) -> list[str]:
    """Returns the paths of a variant's parameters and statistics; a ViT's with adapters."""
    vit = isinstance(VARIANTS[name].image, ViTTower)
    weights = Definition(VARIANTS[name], Compute(lora=Lora(2, 2.0) if vit else None)).shapes()
    return [sharding.path_of(keys) for tree in weights for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_has_a_spec_that_fits_its_dimensions(name):
    for tree in Definition(VARIANTS[name]).shapes():
        specs = sharding.parameter_specs(tree)
        jax.tree.map(lambda x, spec: len(spec) <= x.ndim or pytest.fail(f"{spec} for {x.shape}"), tree, specs)


def test_every_rule_is_the_first_to_match_something():
    taken = {
        next(rule for rule in sharding.RULES if re.fullmatch(rule.pattern, path))
        for name in VARIANTS
        for path in paths(name)
    }
    assert taken == set(sharding.RULES)


def test_whatever_is_large_is_split_and_what_multiplies_in_heads_or_mlp_is_split_over_tensor():
    specs = sharding.parameter_specs(Definition(VARIANTS["ViT-L/14"]).shapes().params)
    for keys, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, P)):
        path = sharding.path_of(keys)
        if path.endswith(("kernel", "projection", "token_embedding")):
            assert "fsdp" in spec, path
        if "blocks" in path and path.endswith("kernel"):
            assert "tensor" in spec, path
            assert spec[0] is None, "the blocks' own dimension is scanned, not split"


def test_a_parameter_without_a_rule_is_our_mistake_and_named():
    with pytest.raises(AssertionError, match="image/novelty"):
        sharding.parameter_specs({"image": {"novelty": jnp.zeros(3)}})


# --- the mesh ---


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((-1, 2, 2), (2, 2, 2)),
        ((1, -1, 1), (1, 8, 1)),
        ((2, 2, -1), (2, 2, 2)),
        ((8, -1, 1), (8, 1, 1)),
        ((2, 4, 1), (2, 4, 1)),
    ],
)
def test_mesh_sizes_are_those_asked_for_and_minus_one_is_what_is_left(asked, sizes):
    mesh = sharding.make_mesh(MeshConfig(*asked))
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    assert {d.id for d in mesh.devices.flat} == {d.id for d in jax.devices()}


@pytest.mark.parametrize("asked", [(-1, 3, 1), (3, 1, 1), (1, 1, 1), (16, 1, 1), (-1, 16, 1), (2, 2, 4)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused_with_its_sizes(asked):
    with pytest.raises(UserError, match=rf"\({asked[0]}, {asked[1]}, {asked[2]}\).*8 devices"):
        sharding.make_mesh(MeshConfig(*asked))


@pytest.mark.parametrize(
    ("asked", "do"),
    [
        ((-1, 3, 1), "these do: (8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1)"),  # they keep the 1
        ((2, 2, 4), "these do: (2, 2, 2), (2, 1, 4), (1, 2, 4)"),
        ((16, 1, 1), "this does: (8, 1, 1)"),
        ((3, 3, 3), "these do: (8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), "),
    ],
)
def test_a_mesh_that_does_not_fit_is_told_the_shapes_that_do_and_keep_most_of_it(asked, do):
    with pytest.raises(UserError, match=re.escape(do)) as error:
        sharding.make_mesh(MeshConfig(*asked))
    assert str(error.value).count("(") <= 12


@pytest.fixture(scope="module")
def two_slices(module_patch):
    """Two absent slices of four TPU chips each; the compiler knows them."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    environment = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there are no chips that two processes could fight for
    }
    for name, value in environment.items():
        module_patch.setenv(name, value)
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize("asked", [(-1, 1, 1), (2, 2, 2), (2, 4, 1), (4, 1, 2)])
def test_between_slices_goes_data_alone(asked, two_slices):
    mesh = sharding.make_mesh(MeshConfig(*asked), two_slices)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert set(mesh.devices.flat) == set(two_slices)
    for i, replicas in enumerate(mesh.devices):
        assert {d.slice_index for d in replicas.flat} == {i * 2 // len(mesh.devices)}


def test_fsdp_or_tensor_between_slices_is_refused_with_the_shapes_that_do(two_slices):
    with pytest.raises(
        UserError, match=r"between the 2 slices, so it must be a multiple of 2; these do: .*\(4, 2, 1\)"
    ):
        sharding.make_mesh(MeshConfig(1, 8, 1), two_slices)


def test_gpus_of_several_hosts_may_share_any_axis_and_neighbours_share_a_host():
    devices = [
        Mock(jax.Device, id=i, slice_index=i // 4, process_index=i // 4, platform="gpu", device_kind="H200")
        for i in range(8)
    ]
    mesh = sharding.make_mesh(MeshConfig(1, 8, 1), devices)
    assert list(mesh.devices.flat) == devices
    assert sharding.make_mesh(MeshConfig(2, 4, 1), devices).devices.shape == (2, 4, 1)


def test_a_mesh_of_given_devices_has_no_others():
    devices = jax.devices()[4:6]
    assert set(sharding.make_mesh(MeshConfig(), devices).devices.flat) == set(devices)


@pytest.mark.parametrize(("batch", "nearest"), [(10, "8 and 12"), (3, "is 4")])
def test_a_batch_that_does_not_split_is_refused_with_the_nearest_that_do(batch, nearest):
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    with pytest.raises(UserError, match=rf"global_batch={batch} .* 4 devices.*{nearest}"):
        sharding.check_batch(batch, mesh)
    for good in (4, 8, 12):
        sharding.check_batch(good, mesh)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_a_batch_on_the_mesh_is_the_hosts_batch_and_split_over_data_and_fsdp(sizes):
    mesh = sharding.make_mesh(MeshConfig(*sizes))
    assert sharding.host_rows(16, mesh) == list(range(16)), "one host has all rows"
    random = np.random.default_rng(0)
    batch = Batch(
        image=random.integers(0, 256, (16, 4, 4, 3), np.uint8),
        tokens=random.integers(0, 9, (16, 5), np.int32),
        valid=random.integers(0, 2, 16).astype(bool),
    )
    placed = sharding.to_mesh(batch, 16, mesh)
    ways = sizes[0] * sizes[1]
    for found, expected in zip(placed, batch, strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype
        for shard in found.addressable_shards:
            assert shard.data.shape[0] == 16 // ways
            np.testing.assert_array_equal(shard.data, expected[shard.index])


@pytest.mark.parametrize(
    ("sizes", "mine", "rows"),
    [
        ((4, 2, 1), [0, 1, 2, 3], range(8)),
        ((4, 2, 1), [4, 5, 6, 7], range(8, 16)),
        ((2, 2, 2), [2, 3], range(4, 8)),  # two devices along `tensor`: the same rows
        ((2, 2, 2), [0, 2, 4, 6], range(16)),  # hosts that share a place on the batch axes …
        ((2, 2, 2), [1, 3, 5, 7], range(16)),  # … read the same
        ((8, 1, 1), [0, 5], [0, 1, 10, 11]),
        ((1, 1, 8), [3], range(16)),
    ],
)
def test_a_host_reads_the_rows_of_its_own_devices_each_once_and_in_order(sizes, mine, rows, monkeypatch):
    mesh = sharding.make_mesh(MeshConfig(*sizes))
    devices = [mesh.devices.flat[i] for i in mine]
    everywhere = NamedSharding.devices_indices_map
    monkeypatch.setattr(  # as if the others were another host's
        NamedSharding, "addressable_devices_indices_map", lambda *args: {d: everywhere(*args)[d] for d in devices}
    )
    assert sharding.host_rows(16, mesh) == list(rows)


# --- parameters and moments on the mesh ---


def test_parameters_that_the_mesh_cannot_split_are_listed_all():
    params = {
        "image": {"projection": jnp.zeros((6, 5)), "patch_embed": {"kernel": jnp.zeros((2, 2, 3, 8))}},
        "text": {"projection": jnp.zeros((7, 5)), "token_embedding": jnp.zeros((9, 8))},
    }
    mesh = sharding.make_mesh(MeshConfig(1, 4, 2))
    with pytest.raises(UserError, match=r"image/projection \(6, 5\).*text/projection \(7, 5\)") as error:
        sharding.check_divisible(params, sharding.parameter_specs(params), mesh)
    assert "'fsdp': 4" in str(error.value)
    assert "patch_embed" not in str(error.value)
    assert "token_embedding" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("RN50x4", 8, r"cannot split text.num_heads=10; tensor sizes that can: 1, 2, 5, 10"),
        ("ViT-B/32", 8, r"cannot split image.num_heads=12; tensor sizes that can: 1, 2, 4"),
        ("ViT-W64/4@16px", 8, r"cannot split image.num_heads=\d, text.num_heads=\d; tensor sizes that can: 1, 2"),
    ],
)
def test_heads_that_tensor_cannot_split_are_named_with_the_sizes_that_can(name, tensor, said):
    mesh = sharding.make_mesh(MeshConfig(1, 1, tensor))
    with pytest.raises(UserError, match=rf"mesh.tensor={tensor} splits heads and MLP of both towers, and {said}"):
        abstract_state(Definition(VARIANTS[name]), optimizer_of(VARIANTS[name]), mesh)


def test_an_mlp_that_tensor_cannot_split_is_named():
    arch = VARIANTS["ViT-B/32"]
    odd = dataclasses.replace(arch, image=dataclasses.replace(arch.image, mlp_dim=3070))
    with pytest.raises(UserError, match=r"cannot split image.mlp_dim=3070; tensor sizes that can: 1, 2$"):
        sharding.check_tensor(odd, sharding.make_mesh(MeshConfig(1, 2, 4)))


@pytest.mark.parametrize(
    "sizes", [(2, 2, 2), *[pytest.param(s, marks=pytest.mark.full) for s in ((1, 8, 1), (8, 1, 1), (1, 2, 4))]]
)
def test_every_variant_fits_a_mesh_of_8_whose_tensor_axis_divides_its_heads(sizes):
    mesh = sharding.make_mesh(MeshConfig(*sizes))
    for architecture in VARIANTS.values():
        params = Definition(architecture).shapes().params
        if all(tower.num_heads % mesh.shape["tensor"] == 0 for tower in (architecture.image, architecture.text)):
            sharding.check_divisible(params, sharding.parameter_specs(params), mesh)
        else:  # RN50x4 has 10 heads, ViT-S 6
            with pytest.raises(UserError, match="/blocks/attention/qkv/kernel"):
                sharding.check_divisible(params, sharding.parameter_specs(params), mesh)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_moments_are_placed_as_their_parameters_and_counters_everywhere(clip_norm):
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    architecture = VARIANTS["ViT-W64/4@16px"]
    state = abstract_state(Definition(architecture), optimizer_of(architecture, clip_norm=clip_norm), mesh)
    places = jax.tree.map(lambda x: x.sharding, state.params)
    for moment in ("mu", "nu"):
        assert jax.tree.map(lambda x: x.sharding, optax.tree_utils.tree_get(state.optimizer, moment)) == places
    assert state.step.sharding == NamedSharding(mesh, P())
    counters = [x.sharding for x in jax.tree.leaves(state.optimizer) if x.dtype == jnp.int32]
    assert set(counters) == {NamedSharding(mesh, P())}


def test_the_summary_says_what_is_split_and_what_each_device_holds():
    definition, optimizer = Definition(VARIANTS["ViT-B/32"]), optimizer_of(VARIANTS["ViT-B/32"])
    params = abstract_state(definition, optimizer, sharding.make_mesh(MeshConfig(2, 2, 2))).params
    rows = {row.path: row for row in sharding.layout(params)}
    kernel = rows["image/blocks/attention/qkv/kernel"]
    assert kernel.shape == (12, 768, 3, 12, 64)
    assert kernel.bytes == 4 * 12 * 768 * 3 * 768 == 4 * kernel.bytes_per_device
    assert kernel.spec == P(None, "fsdp", None, "tensor")
    first, *lines = sharding.summary(params)
    assert first.startswith("parameters: 151,277,313 in 38 arrays, 605.1 MB, ")
    assert len(lines) == len(rows) == 38
    assert lines[3].split() == [kernel.path, "12×768×3×12×64", "·×fsdp×·×tensor", "21.2", "MB"]
    whole = abstract_state(definition, optimizer, sharding.make_mesh(MeshConfig(8, 1, 1))).params
    assert sharding.summary(whole) == ["parameters: 151,277,313 in 38 arrays, 605.1 MB, 605.1 MB a device"]
