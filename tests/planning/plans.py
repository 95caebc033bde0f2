"""Plans that no compiler has made: for tests of what is done with plans."""

from clip_jax.config import Config
from clip_jax.planning.hlo import Collective
from clip_jax.planning.plan import Memory, Plan, Step
from clip_jax.planning.topology import GENERATIONS, GiB

CHIPS = 16


class FakeCompiler:
    """Makes plans for 16 chips by simple laws, and keeps what it was asked for.

    A pair takes `pair` bytes of activations, half or a quarter of that with rematerialisation; parameters take `state`
    bytes, split over the places of fsdp. Above `bend` pairs at once activations take half as much again.
    """

    def __init__(self, *, pair: float, state: int = GiB, bend: float = float("inf")):
        self.pair, self.state, self.bend = pair, state, bend
        self.asked: list[Config] = []

    def __call__(self, config: Config) -> Plan:
        self.asked.append(config)
        fsdp = config.mesh.fsdp
        at_once = (config.microbatch or config.data.global_batch) / CHIPS
        share = {"attention": 0.5, "full": 0.25}.get(config.model.remat, 1)
        pair = self.pair * share * (1.5 if at_once > self.bend else 1)
        parameters, temporaries = self.state // fsdp, int(at_once * pair)
        return plan_of(config, parameters, temporaries, {"data": CHIPS // fsdp, "fsdp": fsdp, "tensor": 1})


def plan_of(config: Config, parameters: int, temporaries: int, mesh: dict[str, int]) -> Plan:
    """Returns a plan for v5e:4x4, which is refused where the memory is not enough."""
    limit, batch = GENERATIONS["v5e"].memory, 2**20
    used = 3 * parameters + batch + temporaries
    fits = used <= limit
    return Plan(
        variant=config.model.variant,
        topology="v5e:4x4",
        chips=CHIPS,
        mesh=mesh,
        global_batch=config.data.global_batch,
        microbatch=config.microbatch,
        compute_dtype=config.model.compute_dtype,
        remat=config.model.remat,
        loss="softmax, dense",
        memory=Memory(limit, used, parameters, 2 * parameters, batch, temporaries),
        step=Step(3_000_000, 0.002, 0.001, config.data.global_batch / 0.002, 0.25) if fits else None,
        collectives=[Collective("all-reduce", 2**20, 24), Collective("all-gather", 512, 3)] if fits else [],
        compile_seconds=1.5,
    )
