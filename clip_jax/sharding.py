"""The mesh, what each of its axes splits, and how a host's rows become one array of all devices.

Mesh axes: `data` (replicas), `fsdp` (parameters and batch), `tensor` (heads and MLP). The batch is split over
(`data`, `fsdp`). One table says how parameters are split; models know nothing of it.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.architecture import Architecture
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
    Rule(r".*/blocks/.*/lora_[ab]", P()),  # adapters: small, everywhere
    Rule(r"image/patch_embed/kernel", P(None, None, None, "fsdp")),  # [H W C D]
    Rule(r"image/stem\d/kernel", P()),  # [H W D F]: 74 thousand numbers at most
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

    Between slices of TPUs there is a slow network: only `data` goes over it, on which gradients are all that travels.

    Raises:
        UserError: the sizes do not multiply to the number of devices, or `data` not to that of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _mesh_sizes(config, len(devices))
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu":  # neighbours as they come; a GPU's "slice" is its host
        return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=types)
    if slices == 1:
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(placed, AXES, axis_types=types)
    data, *within = sizes
    if data % slices:
        fits = [shape for shape in _shapes(len(devices)) if shape[0] % slices == 0]
        raise UserError(
            f"mesh (data, fsdp, tensor) = {sizes}: only data goes over the network between the {slices} slices, so it "
            f"must be a multiple of {slices}; {_that_do(fits, sizes)}"
        )
    placed = mesh_utils.create_hybrid_device_mesh(
        (data // slices, *within), (slices, 1, 1), devices, allow_split_physical_axes=True
    )
    return Mesh(placed, AXES, axis_types=types)


def _mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Returns the sizes with what is left in the place of -1."""
    asked = (config.data, config.fsdp, config.tensor)
    left = devices // math.prod(size for size in asked if size != -1)
    sizes = tuple(left if size == -1 else size for size in asked)
    if math.prod(sizes) != devices:
        raise UserError(
            f"mesh (data, fsdp, tensor) = {asked} does not fit {devices} devices: the sizes must multiply to that "
            f"number; {_that_do(_shapes(devices), asked)}"
        )
    return sizes


def _shapes(devices: int) -> list[tuple[int, int, int]]:
    """Returns all (data, fsdp, tensor) that multiply to the number of devices."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    return [(devices // (f * t), f, t) for t in divisors for f in divisors if devices % (f * t) == 0]


def _that_do(shapes: list[tuple[int, int, int]], asked: tuple[int, int, int], most: int = 10) -> str:
    """Returns the shapes that keep most of what was asked for, in words."""

    def kept(shape: tuple[int, int, int]) -> int:
        return sum(size == wanted for size, wanted in zip(shape, asked, strict=True))

    best = max(map(kept, shapes))
    shown = [shape for shape in shapes if kept(shape) == best][:most]
    return f"{'these do' if len(shown) > 1 else 'this does'}: {', '.join(map(str, shown))}"


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


def check_tensor(arch: Architecture, mesh: Mesh) -> None:
    """Raises UserError when the tensor axis cannot split the heads or the MLP of a tower; names the sizes that can."""
    size = mesh.shape["tensor"]
    split = {  # a ResNet has heads in its pool only, and no MLP
        f"{tower}.{field}={value}": value
        for tower in ("image", "text")
        for field, value in dataclasses.asdict(getattr(arch, tower)).items()
        if field in ("num_heads", "mlp_dim")
    }
    if problems := [words for words, n in split.items() if n % size]:
        whole = math.gcd(*split.values())
        fits = [str(n) for n in range(1, whole + 1) if whole % n == 0]
        raise UserError(
            f"mesh.tensor={size} splits heads and MLP of both towers, and cannot split {', '.join(problems)}; "
            f"tensor sizes that can: {', '.join(fits)}"
        )


@dataclasses.dataclass(frozen=True)
class Placed:
    """How one array lies on the mesh."""

    path: str
    shape: tuple[int, ...]
    spec: P
    bytes: int  # in all
    bytes_per_device: int


def layout(arrays: Any) -> list[Placed]:
    """Returns a row for every array of a tree; they may be shapes with shardings."""

    def row(keys, x) -> Placed:
        part = math.prod(x.sharding.shard_shape(x.shape))
        return Placed(path_of(keys), x.shape, x.sharding.spec, x.size * x.dtype.itemsize, part * x.dtype.itemsize)

    return [row(keys, x) for keys, x in jax.tree_util.tree_leaves_with_path(arrays)]


def summary(params: Any) -> list[str]:
    """Returns how parameters are split, for people: a line an array and one for all; that one only when none is."""
    rows = layout(params)
    total, here = sum(row.bytes for row in rows), sum(row.bytes_per_device for row in rows)
    numbers = sum(math.prod(row.shape) for row in rows)
    lines = [f"parameters: {numbers:,} in {len(rows)} arrays, {_megabytes(total)}, {_megabytes(here)} a device"]
    if here == total:
        return lines
    cells = [
        (row.path, "×".join(map(str, row.shape)), "×".join(axis or "·" for axis in row.spec) or "·", row)
        for row in rows
    ]
    widths = [max(len(cell[i]) for cell in cells) for i in range(3)]
    for path, shape, spec, row in cells:
        lines.append(
            f"  {path:{widths[0]}}  {shape:{widths[1]}}  {spec:{widths[2]}}  {_megabytes(row.bytes_per_device):>9}"
        )
    return lines


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


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
