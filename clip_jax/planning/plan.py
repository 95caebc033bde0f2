"""A plan: what a run's step takes on a slice of TPUs, by the compiler that would compile it there."""

import dataclasses
import math
import time
from typing import Any

import jax

from clip_jax import flops
from clip_jax.config import Config
from clip_jax.planning import compiler
from clip_jax.planning.compiler import TooLargeError
from clip_jax.planning.hlo import Collective
from clip_jax.planning.topology import Topology, devices
from clip_jax.training.program import Program, assemble

RECORDS = 10**6  # in an epoch of the data, which nobody has opened: they change the schedule's numbers only


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each chip; the parts add up to `used`."""

    limit: int
    used: int
    parameters: int  # with batch norm's statistics
    optimizer: int
    batch: int
    temporaries: int  # all else: activations, gradients, padding, and the program itself

    @property
    def spare(self) -> int:
        """Returns what is left; below 0, what is missing."""
        return self.limit - self.used


@dataclasses.dataclass(frozen=True)
class Step:
    """One step's time as the compiler estimates it: arithmetic and memory, without what the links take."""

    cycles: int
    seconds: float
    link_seconds: float  # of all collectives, one after the other, every link at full speed: not in `seconds`
    pairs_per_second: float
    mfu: float  # share of the chips' peak that the architecture's own FLOP are


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known of a config on a slice."""

    variant: str
    topology: str
    chips: int
    mesh: dict[str, int]
    global_batch: int
    microbatch: int | None
    compute_dtype: str
    remat: str
    loss: str
    memory: Memory
    step: Step | None  # None: the compiler refused, there is no program
    collectives: list[Collective]
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.step is not None

    @property
    def rows(self) -> int:
        """Returns how many pairs each place on the batch axes has."""
        return self.global_batch // (self.mesh["data"] * self.mesh["fsdp"])

    def to_json(self) -> dict[str, Any]:
        """Returns plain values: the fields, and what follows from them."""
        derived = {"fits": self.fits, "spare": self.memory.spare, "pairs_per_chip": self.global_batch / self.chips}
        return dataclasses.asdict(self) | derived

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Plan":
        """Returns the plan of which `to_json` made the values."""
        named = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        return cls(
            **named
            | {
                "memory": Memory(**values["memory"]),
                "step": values["step"] and Step(**values["step"]),
                "collectives": [Collective(**one) for one in values["collectives"]],
            }
        )


def make_plan(config: Config, topology: Topology) -> Plan:
    """Returns the plan of a run on a slice; its step is compiled, which takes minutes for a large model.

    Raises:
        UserError: the config does not go together, or not with this slice.
    """
    program = assemble(config, devices(topology), records=RECORDS)
    begun = time.monotonic()
    try:
        compiled = compiler.compiled(program.train_step.lower(program.state, program.batch))
        used, limit = compiled.used, topology.generation.memory
    except TooLargeError as refusal:
        compiled, used, limit = None, refusal.used, refusal.limit
    seconds = time.monotonic() - begun
    collectives = compiled.text.collectives() if compiled else []
    return Plan(
        variant=program.variant,
        topology=topology.name,
        chips=topology.chips,
        mesh=dict(program.mesh.shape),
        global_batch=config.data.global_batch,
        microbatch=config.microbatch,
        compute_dtype=config.model.compute_dtype,
        remat=config.model.remat,
        loss=_loss(program),
        memory=_memory(program, used, limit),
        step=_step(program, topology, compiled.text.cycles(), collectives) if compiled else None,
        collectives=collectives,
        compile_seconds=seconds,
    )


def _loss(program: Program) -> str:
    kind = "sigmoid" if program.architecture.logit_bias else "softmax"
    return f"{kind}, dense" if program.ring is None else f"{kind}, ring, tiles of {program.ring.tile}"


def on_a_chip(tree: Any) -> int:
    """Returns the bytes that each device has of arrays, or of their shapes."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _memory(program: Program, used: int, limit: int) -> Memory:
    parameters = on_a_chip((program.state.params, program.state.statistics))
    optimizer, batch = on_a_chip(program.state.optimizer), on_a_chip(program.batch)
    return Memory(limit, used, parameters, optimizer, batch, max(0, used - parameters - optimizer - batch))


def _step(program: Program, topology: Topology, cycles: int, collectives: list[Collective]) -> Step:
    seconds = cycles / topology.generation.clock
    pairs, model = program.config.data.global_batch, program.config.model
    towers = flops.of_pair(program.architecture, model.patch_dropout, model.lora)
    asked = pairs * towers.training(program.optimizer.factors)
    return Step(
        cycles=cycles,
        seconds=seconds,
        link_seconds=sum(map(topology.generation.link_seconds, collectives)),
        pairs_per_second=pairs / seconds,
        mfu=asked / seconds / topology.peak,
    )
