"""Slices by name, what libtpu thinks of them, and names that are none."""

import importlib.util
import itertools
import math

import pytest

from clip_jax import sharding
from clip_jax.config import MeshConfig
from clip_jax.errors import UserError
from clip_jax.flops import PEAKS
from clip_jax.planning import topology
from clip_jax.planning.hlo import Collective

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
ALL = [name for generation in topology.GENERATIONS.values() for name in generation.slice_names()]


def test_a_name_is_a_generation_and_its_sides():
    parsed = topology.parse("v5e:16x16")
    assert (parsed.generation.name, parsed.sides, parsed.chips, parsed.name) == ("v5e", (16, 16), 256, "v5e:16x16")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e:3x3", ["v5e:3x3", "v5e:2x2, v5e:2x4", "v5e:16x16"]),
        ("v5e:0x2", ["v5e:0x2", "v5e:2x2"]),
        ("v5e:64x64", ["v5e:64x64", "v5e:16x16"]),
        ("v5e:2x2x2", ["v5e:2x2x2", "v5e:2x2"]),
        ("v5p:8x8", ["v5p:8x8", "v5p:2x2x1", "up to v5p:16x16x24"]),
        ("v5e", ["v5e: no such slice", "v5e:2x2"]),
        ("v5e:", ["v5e:", "v5e:2x2"]),
        ("v5x:2x2", ["'v5x'", "v4, v5e, v5p, v6e"]),
        ("", ["v4, v5e, v5p, v6e"]),
        ("cpu:8", ["'cpu'", "v4, v5e, v5p, v6e"]),
        ("v5e:２x２", ["v5e:２x２"]),
        (f"v5e:{'2' * 5000}", ["v5e:2x2, v5e:2x4"]),
    ],
)
def test_a_slice_that_nobody_lends_is_refused_with_those_there_are(name, words):
    with pytest.raises(UserError) as refused:
        topology.parse(name)
    said = str(refused.value)
    assert [word for word in ["--topology", *words] if word not in said] == [], said


@pytest.mark.parametrize(("chips", "name"), [(8, "v5p:2x2x2"), (512, "v5p:8x8x8"), (2048, "v5p:8x16x16")])
def test_the_slice_of_a_size_is_the_most_compact(chips, name):
    assert topology.of_size(topology.GENERATIONS["v5p"], chips).name == name


def test_a_size_without_a_slice_is_refused_with_the_sizes_there_are():
    with pytest.raises(UserError, match=r"no slice of 512 chips; there are: 1, 4, 8, 16, 32, 64, 128, 256"):
        topology.of_size(topology.GENERATIONS["v5e"], 512)


def test_without_libtpu_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[planning\]"'):
        topology.prepare_environment()


@needs_libtpu
@pytest.mark.parametrize("name", [name for name in ALL if math.prod(topology.parse(name).sides) <= 512])
def test_libtpu_has_a_device_for_every_chip_of_a_slice(name):
    place = topology.parse(name)
    assert len({tuple(device.coords) for device in topology.devices(place)}) == place.chips


@needs_libtpu
@pytest.mark.parametrize("name", ["v4:4x4x4", "v5e:8x16", "v5p:4x4x12", "v5p:8x8x8", "v6e:16x16"])
def test_every_mesh_that_multiplies_to_the_chips_is_laid_out_on_a_slice(name):
    """Also where an axis is no product of sides: 32 of 8x8x8."""
    devices = topology.devices(topology.parse(name))
    divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
    for fsdp, tensor in itertools.product(divisors, divisors):
        if len(devices) % (fsdp * tensor) == 0:
            mesh = sharding.make_mesh(MeshConfig(-1, fsdp, tensor), devices)
            assert mesh.devices.shape == (len(devices) // (fsdp * tensor), fsdp, tensor)
            assert len(set(mesh.devices.flat)) == len(devices)


@needs_libtpu
@pytest.mark.parametrize("name", topology.GENERATIONS)
def test_the_chips_of_a_slice_have_the_peak_of_their_generation_by_jaxs_name_for_them(name):
    generation = topology.GENERATIONS[name]
    first = topology.devices(topology.Topology(generation, generation.slices[0]))[0]
    assert PEAKS[first.device_kind] == generation.peak


@needs_libtpu
@pytest.mark.parametrize("name", topology.GENERATIONS)
def test_the_memory_in_the_table_is_what_the_compiler_says_when_it_refuses(name):
    import jax
    from jax.sharding import SingleDeviceSharding

    from clip_jax.planning import compiler

    generation = topology.GENERATIONS[name]
    first = topology.devices(topology.Topology(generation, generation.slices[0]))[0]
    huge = jax.ShapeDtypeStruct((2**36,), "float32", sharding=SingleDeviceSharding(first))
    with pytest.raises(compiler.TooLargeError) as refused:
        compiler.compiled(jax.jit(lambda x: 2 * x + 1).lower(huge))
    assert (refused.value.used, refused.value.limit) == (512 * topology.GiB, generation.memory)


@needs_libtpu
@pytest.mark.parametrize("name", topology.GENERATIONS)
def test_a_large_product_runs_at_60_to_100_percent_of_the_peak_by_the_tables_clock(name):
    """So that the compiler's cycles and our seconds are of one kind."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from clip_jax.planning import compiler

    generation, size = topology.GENERATIONS[name], 8192
    first = topology.devices(topology.Topology(generation, generation.slices[0]))[0]
    x = jax.ShapeDtypeStruct((size, size), "bfloat16", sharding=SingleDeviceSharding(first))
    cycles = compiler.compiled(jax.jit(lambda x, y: x @ y).lower(x, x)).text.cycles()
    assert 0.6 < 2 * size**3 / (cycles / generation.clock) / generation.peak < 1


def test_an_all_reduce_takes_twice_an_all_gather_and_a_ring_uses_one_link():
    generation = topology.GENERATIONS["v5e"]
    seconds = {
        kind: generation.link_seconds(Collective(kind, 10**9, 2))
        for kind in ("all-gather", "all-reduce", "collective-permute")
    }
    assert seconds["all-gather"] == pytest.approx(2e9 / 200e9)
    assert seconds["all-reduce"] == pytest.approx(2 * seconds["all-gather"])
    assert seconds["collective-permute"] == pytest.approx(2e9 / 50e9)
