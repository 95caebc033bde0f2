"""Slices of TPUs by name ("v5e:16x16"): what a chip of each generation has, and devices that stand for absent ones.

This file imports jax only where devices are made: libtpu reads its environment once, when jax starts.
"""

import dataclasses
import importlib.util
import itertools
import math
import os
import re
from typing import Any

from clip_jax.errors import UserError
from clip_jax.flops import PEAKS

GiB = 2**30

# What libtpu wants to know of a machine that has no TPU. Several planners may run at once: libtpu would have one
# process take all chips, and there are none. The type of accelerator only has to be one it knows.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-256",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}

FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # the slices of v5e and v6e that are lent


def _blocks(longest: int, largest: int) -> tuple[tuple[int, int, int], ...]:
    """Returns the slices of v4 and v5p: parts of a cube of 4×4×4 chips, and boxes of whole cubes."""
    sides = range(4, longest + 1, 4)
    cubes = [s for s in itertools.combinations_with_replacement(sides, 3) if math.prod(s) <= largest]
    return ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), *sorted(cubes, key=math.prod))


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a chip has, by Google's pages, and which slices there are.

    `memory` is what the compiler lets a program use (its own refusals say so): HBM less what the system keeps. `clock`
    turns the compiler's cycles into seconds. Nobody prints it: it is the peak over what the matrix units do in a cycle
    (4 of 128×128 a core in v4, v5e and v5p; for v6e 8 times v5e's per core, which agrees with its memory's speed too).
    """

    name: str
    chip: str
    memory: int  # bytes a program may use on a chip
    clock: float  # Hz
    links: int  # to neighbours
    link_speed: float  # bytes/s, one way, a link
    slices: tuple[tuple[int, ...], ...]
    options: dict[str, str] = dataclasses.field(default_factory=dict)  # for libtpu

    @property
    def peak(self) -> float:
        """Returns the dense bfloat16 FLOP/s of a chip."""
        return PEAKS[self.chip]

    def link_seconds(self, collective: Any) -> float:
        """Returns the least that a collective takes when every link is at its speed, and nothing else goes on.

        Around a ring each device sends to one neighbour; the others use all links, and an all-reduce is a
        reduce-scatter and an all-gather.
        """
        if collective.kind == "collective-permute":
            return collective.bytes / self.link_speed
        rounds = 2 if collective.kind == "all-reduce" else 1
        return rounds * collective.bytes / (self.links * self.link_speed)

    def slice_names(self) -> list[str]:
        return [f"{self.name}:{'x'.join(map(str, sides))}" for sides in self.slices]


GENERATIONS = {
    generation.name: generation
    for generation in (
        # Two cores that compute as one, as every JAX program sees a v4; libtpu's default for an absent one is two.
        Generation(
            "v4",
            "TPU v4",
            int(30.75 * GiB),
            1.05e9,
            6,
            50e9,
            _blocks(16, 4096),
            {"chip_config_name": "megacore"},
        ),
        Generation("v5e", "TPU v5e", int(15.75 * GiB), 1.5e9, 4, 50e9, FLAT),
        Generation("v5p", "TPU v5p", int(95.73 * GiB), 1.75e9, 6, 100e9, _blocks(24, 6144)),
        Generation("v6e", "TPU v6e", int(31.24 * GiB), 1.75e9, 4, 112e9, FLAT),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: a generation and how many chips along each side."""

    generation: Generation
    sides: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.generation.name}:{'x'.join(map(str, self.sides))}"

    @property
    def chips(self) -> int:
        return math.prod(self.sides)

    @property
    def peak(self) -> float:
        """Returns the FLOP/s of all chips."""
        return self.chips * self.generation.peak


def parse(name: str) -> Topology:
    """Returns the topology of a name such as "v5e:16x16".

    The compiler itself is no judge: it believes in a v5e of 64×64, and dies of a side of 0.

    Raises:
        UserError: there is no such slice; says which there are.
    """
    made = re.fullmatch(r"(\w+):([0-9]{1,4}(?:x[0-9]{1,4})*)", name)
    word = made[1] if made else name.partition(":")[0]
    if word not in GENERATIONS:
        raise UserError(f"--topology={name}: no TPU {word!r}; there are {', '.join(GENERATIONS)}, as in v5e:16x16")
    generation = GENERATIONS[word]
    sides = tuple(map(int, made[2].split("x"))) if made else ()
    if sides not in generation.slices:
        known = generation.slice_names()
        told = ", ".join(known[:12])
        if len(known) > 12:
            told += f" and larger boxes of whole 4x4x4 cubes, up to {known[-1]}"
        raise UserError(f"--topology={name}: no such slice of {generation.chip}; there are: {told}")
    return Topology(generation, sides)


def of_size(generation: Generation, chips: int) -> Topology:
    """Returns the slice of so many chips, the one nearest to a square or a cube where there are several.

    Raises:
        UserError: there is none of that size.
    """
    fitting = [Topology(generation, sides) for sides in generation.slices if math.prod(sides) == chips]
    if not fitting:
        sizes = sorted({math.prod(sides) for sides in generation.slices})
        raise UserError(f"{generation.chip} has no slice of {chips} chips; there are: {', '.join(map(str, sizes))}")
    return min(fitting, key=lambda topology: sum(topology.sides))


def prepare_environment() -> None:
    """Tells libtpu and jax, which must not be running yet, that no TPU is here."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "libtpu, which has the compiler, is not installed (there is one for Linux on x86-64 only): "
            'pip install -e ".[planning]", or pip install libtpu'
        )
    for name, value in ENVIRONMENT.items():
        os.environ[name] = value


def devices(topology: Topology) -> list[Any]:
    """Returns devices that can be compiled for, not computed on.

    Raises:
        UserError: this libtpu does not know the topology.
    """
    prepare_environment()
    import jax
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **topology.generation.options
        )
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"--topology={topology.name}: libtpu refuses it: {said}") from error
    found = list(described.devices)
    assert len(found) == topology.chips, f"{topology.name} shows {len(found)} devices"
    return found
