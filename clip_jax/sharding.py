"""The mesh, what each of its axes splits, and how a host's rows become one array of all devices.

Mesh axes: `data` (replicas), `fsdp` (parameters and batch), `tensor` (heads and MLP). The batch is split over
(`data`, `fsdp`). One table says how parameters are split; models know nothing of it.
"""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.config import MeshConfig
from clip_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
BATCH = P(BATCH_AXES)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Arrays whose whole path matches `pattern` are split as `spec` says."""

    pattern: str
    spec: P


# The first rule that matches a path holds. Leading None: blocks are stacked, and every device has a part of each.
RULES = (
    Rule(r".*/blocks/attention/qkv/kernel", P(None, "fsdp", None, "tensor")),  # [depth D 3 N K]
    Rule(r".*/blocks/attention/qkv/bias", P(None, None, "tensor")),  # [depth 3 N K]
    Rule(r".*/blocks/attention/out/kernel", P(None, "tensor", None, "fsdp")),  # [depth N K D]
    Rule(r".*/blocks/mlp/up/kernel", P(None, "fsdp", "tensor")),  # [depth D F]
    Rule(r".*/blocks/mlp/up/bias", P(None, "tensor")),  # [depth F]
    Rule(r".*/blocks/mlp/down/kernel", P(None, "tensor", "fsdp")),  # [depth F D]
    Rule(r"image/patch_embed/kernel", P(None, None, None, "fsdp")),  # [H W C D]
    Rule(r"image/stem\d/kernel", P()),  # [H W D F]: a few thousand numbers
    Rule(r"image/stage\d/first/\w+/kernel", P(None, None, None, "fsdp")),  # [H W D F]
    Rule(r"image/stage\d/rest/\w+/kernel", P(None, None, None, None, "fsdp")),  # [depth-1 H W D F]
    Rule(r"image/attention_pool/(query|key|value)/kernel", P("fsdp", "tensor")),  # [D N K]
    Rule(r"image/attention_pool/(query|key|value)/bias", P("tensor")),  # [N K]
    Rule(r"image/attention_pool/out/kernel", P("tensor", None, "fsdp")),  # [N K E]
    Rule(r"image/map_pool/qkv/kernel", P("fsdp", None, "tensor")),  # [D 3 N K]
    Rule(r"image/map_pool/qkv/bias", P(None, "tensor")),  # [3 N K]
    Rule(r"image/map_pool/out/kernel", P("tensor", None, "fsdp")),  # [N K D]
    Rule(r"image/map_pool/mlp/up/kernel", P("fsdp", "tensor")),  # [D F]
    Rule(r"image/map_pool/mlp/up/bias", P("tensor")),  # [F]
    Rule(r"image/map_pool/mlp/down/kernel", P("tensor", "fsdp")),  # [F D]
    Rule(r"text/token_embedding", P(None, "fsdp")),  # [V D]: by width, so that a look-up stays at home
    Rule(r".*/projection", P("fsdp")),  # [D E]
    Rule(r".*(bias|scale|_embedding|probe)", P()),  # vectors, positions and the temperature: small, everywhere
    Rule(r".*/norm/(mean|variance|count)", P()),  # what batch norm has seen
)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over all devices (or those given), neighbours in the order that suits the hardware.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if -1 in sizes:
        known = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        asked = f"mesh (data, fsdp, tensor) = ({config.data}, {config.fsdp}, {config.tensor})"
        raise UserError(f"{asked} does not fit {len(devices)} devices: the sizes must multiply to that number")
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)


def check_batch(global_batch: int, mesh: Mesh) -> None:
    """Raises UserError when the batch axes cannot split the global batch evenly."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if global_batch % ways:
        below = global_batch // ways * ways
        raise UserError(
            f"data.global_batch={global_batch} cannot be split over data × fsdp = {ways} devices; "
            f"the nearest that can {f'are {below} and {below + ways}' if below else f'is {ways}'}"
        )


def path_of(keys: tuple) -> str:
    """Returns a pytree path as "image/blocks/mlp/up/kernel"."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def parameter_specs(params: Any) -> Any:
    """Returns a spec for every array of parameters or statistics, in their shape; they may be shapes only."""

    def spec(keys, _) -> P:
        path = path_of(keys)
        for rule in RULES:
            if re.fullmatch(rule.pattern, path):
                return rule.spec
        raise AssertionError(f"no sharding rule matches the parameter {path}")

    return jax.tree_util.tree_map_with_path(spec, params)


def check_divisible(params: Any, specs: Any, mesh: Mesh) -> None:
    """Raises UserError naming every parameter whose dimensions the mesh cannot split evenly."""

    def problem(keys, leaf, spec: P) -> str | None:
        sharding = NamedSharding(mesh, spec)
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError:
            return f"{path_of(keys)} {leaf.shape} as {spec}"
        return None

    problems = jax.tree.leaves(jax.tree_util.tree_map_with_path(problem, params, specs))
    if problems:
        raise UserError(f"mesh {dict(mesh.shape)} cannot split: {'; '.join(problems)}; make fsdp or tensor smaller")


def host_rows(global_batch: int, mesh: Mesh) -> list[int]:
    """Returns the rows of the global batch that this host's devices hold, in order.

    By place on the mesh, not by process number: hosts that share a place on the batch axes must read the same rows.
    """
    placed = NamedSharding(mesh, BATCH).addressable_devices_indices_map((global_batch,))
    return sorted({row for (rows,) in placed.values() for row in range(*rows.indices(global_batch))})


def to_mesh(batch: Any, global_batch: int, mesh: Mesh) -> Any:
    """Returns this host's rows (those of `host_rows`) as their part of global arrays, split over the batch axes."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x, (global_batch, *x.shape[1:])), batch
    )
