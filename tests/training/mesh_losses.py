"""Trains a tiny model on a mesh and returns the losses; as a script, as one process of several.

    python mesh_losses.py PORT PROCESSES PROCESS DEVICES < cases.json > losses.json

The step, the placing of parameters and of rows are those of a real run. In float64, parameters and towers are, too:
the equality of meshes is proven where nothing hides behind rounding.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax import distributed, losses, optim, sharding
from clip_jax.architecture import Architecture, ResNetTower, TextTower, ViTTower
from clip_jax.config import LossConfig, MeshConfig, OptimConfig, Steps
from clip_jax.models.clip import LOGIT_SCALE_INIT, Definition
from clip_jax.models.transformer import Compute
from clip_jax.training.state import TrainState, abstract_state
from clip_jax.training.step import make_train_step
from clip_jax.typing import Batch

GLOBAL_BATCH = 16
TEXT = TextTower(8, 32, width=32, depth=2, num_heads=8, mlp_dim=64)
TOWERS = {
    "vit": ViTTower(16, 4, width=32, depth=2, num_heads=8, mlp_dim=64),
    "resnet": ResNetTower(32, width=4, depths=(1, 2, 1, 1), num_heads=8),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A run: `sizes` are those of the mesh, None is one device."""

    tower: str
    dtype: str
    sizes: tuple[int, int, int] | None = None
    form: str = "dense"
    steps: int = 20


def host_batch(arch: Architecture, step: int, rows: list[int]) -> Batch:
    """Returns some rows of a global batch that a step's number determines; one of its pairs is not valid."""
    random = np.random.default_rng(step)
    side, length = arch.image.image_size, arch.text.context_length
    image = random.integers(0, 256, (GLOBAL_BATCH, side, side, 3), np.uint8)
    tokens = random.integers(1, arch.text.vocab_size, (GLOBAL_BATCH, length), np.int32)
    valid = np.arange(GLOBAL_BATCH) != step % GLOBAL_BATCH
    return Batch(image[rows], tokens[rows], valid[rows])


def host_state(abstract: TrainState, dtype: str) -> TrainState:
    """Returns a first state on the host, in `dtype` but for what is bfloat16; drawing it with JAX would be one more
    program."""
    random = np.random.default_rng(0)

    def value(keys, x: jax.ShapeDtypeStruct) -> np.ndarray:
        path = sharding.path_of(keys)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return np.zeros(x.shape, x.dtype)
        if path.startswith("optimizer"):
            return np.zeros(x.shape, x.dtype if x.dtype == jnp.bfloat16 else dtype)
        if path.endswith(("bias", "mean")):
            return np.zeros(x.shape, dtype)
        if path.endswith(("scale", "variance")):
            return np.full(x.shape, LOGIT_SCALE_INIT if path.endswith("logit_scale") else 1.0, dtype)
        return 0.1 * random.standard_normal(x.shape).astype(dtype)

    return jax.tree_util.tree_map_with_path(value, abstract)


def losses_of(case: Case) -> tuple[list[float], list[int]]:
    """Returns the loss of every step, and the rows that this process has read."""
    arch = Architecture(embed_dim=16, image=TOWERS[case.tower], text=TEXT)
    devices = jax.devices()[:1] if case.sizes is None else None
    mesh = sharding.make_mesh(MeshConfig(*(case.sizes or (1, 1, 1))), devices)
    config = OptimConfig(learning_rate=1e-3, warmup="4 steps")  # float32 parts with all that is learnt of it
    definition = Definition(arch, Compute(dtype=case.dtype))
    optimizer = optim.make(config, definition.shapes().params, Steps(case.steps, 4))
    abstract = abstract_state(definition, optimizer, mesh)
    ring = losses.ring_for(LossConfig(form=case.form), mesh, sharding.BATCH_AXES, GLOBAL_BATCH)
    train_step = make_train_step(definition, optimizer, abstract, ring=ring)

    state = jax.tree.map(
        lambda x, place: jax.make_array_from_callback(x.shape, place.sharding, x.__getitem__),
        host_state(abstract, case.dtype),
        abstract,
    )
    rows = sharding.host_rows(GLOBAL_BATCH, mesh)
    found = []
    for step in range(case.steps):
        batch = sharding.to_mesh(host_batch(arch, step, rows), GLOBAL_BATCH, mesh)
        state, metrics = train_step(state, batch)
        assert metrics["loss"].dtype == case.dtype
        found.append(metrics["loss"])
    return [loss.item() for loss in jax.device_get(found)], rows


def main(port: str, processes: str, process: str, devices: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))
    cluster = distributed.find(f"127.0.0.1:{port}", int(processes), int(process), {})
    with distributed.joined(cluster):
        for case in json.load(sys.stdin):
            with jax.enable_x64(case["dtype"] == "float64"):
                found, rows = losses_of(Case(**case))
            print(json.dumps({"losses": found, "rows": rows}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
