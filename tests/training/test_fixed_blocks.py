"""Where the first blocks of a tower are fixed, the backward pass ends above them: the same gradients for less.

They are equal in float64 but for its rounding, and not bit for bit: a forward pass of which nothing is kept is another
program.
"""

import dataclasses
import functools
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_losses import GLOBAL_BATCH, TEXT, TOWERS, host_batch, host_state
from training.test_optimizers import made, mesh_of, placed

from clip_jax import optim, sharding
from clip_jax.architecture import Architecture, Lora
from clip_jax.models.clip import Definition, Weights
from clip_jax.models.transformer import Compute
from clip_jax.training.microbatch import in_parts
from clip_jax.training.state import TrainState, abstract_state
from clip_jax.training.step import Metrics, make_encode, make_train_step
from clip_jax.typing import Batch

LOCKED = {"lock_image": 3, "lock_text": 2}  # two of four blocks, two of three
IMAGE, TEXT_OF_3 = dataclasses.replace(TOWERS["vit"], depth=4), dataclasses.replace(TEXT, depth=3)
ARCH = Architecture(embed_dim=32, image=IMAGE, text=TEXT_OF_3)


def gradients_of(
    definition: Definition, locked: dict[str, int], *, whole: bool
) -> tuple[jax.stages.Wrapped, tuple[optim.Params, optim.Params, Batch]]:
    """Returns the function of the gradients of what is trained, and its arguments on a device."""
    optimizer, mesh = made(definition, **locked), mesh_of(1, 1, 1)
    params = host_state(abstract_state(definition, optimizer, mesh), definition.compute.dtype).params
    trained, rest = jax.device_put(optimizer.split(params))
    batch = sharding.to_mesh(host_batch(definition.architecture, 0, list(range(GLOBAL_BATCH))), GLOBAL_BATCH, mesh)
    key = jax.random.key(3) if definition.compute.patch_dropout else None
    fixed = {f"fixed_{tower}": 0 if whole else optimizer.fixed_blocks(tower) for tower in ("image", "text")}
    encode = in_parts(make_encode(definition.computed(**fixed), key), 1, mesh)

    def total(trained: optim.Params, rest: optim.Params, batch: Batch) -> jax.Array:
        (img_BE, txt_BE), _ = encode(Weights(optim.join(trained, rest), {}), batch, jnp.arange(GLOBAL_BATCH))
        return jnp.square(img_BE @ txt_BE.T).sum()

    return jax.jit(lambda *args: optimizer.of_trained(jax.grad(total)(*args))), (trained, rest, batch)


def both_ways(definition: Definition) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Returns of each parameter that is trained its path, its gradient, and that of the whole differentiation."""
    ways = (gradients_of(definition, LOCKED, whole=whole) for whole in (False, True))
    found, expected = (optim.flatten(jax.device_get(function(*arguments))) for function, arguments in ways)
    assert found.keys() == expected.keys()
    for path, x in found.items():
        if "/blocks/" in path and "lora_a" not in path:  # beside a B of zeros an A has no gradient yet
            assert [block.any() for block in x] == [False] * 2 + [True] * (len(x) - 2), path
        yield path, x, expected[path]


FULL = pytest.mark.full
COMPUTES = [
    pytest.param(Compute("float64", "attention", patch_dropout=0.5), {}, id="class token, patches dropped, attention"),
    pytest.param(Compute("float64"), {}, marks=FULL, id="class token"),
    pytest.param(Compute("float64", "dots"), {"pool": "mean"}, marks=FULL, id="mean, dots"),
    pytest.param(Compute("float64", "full"), {"pool": "map", "class_token": False}, marks=FULL, id="map, full"),
    pytest.param(Compute("float64", lora=Lora(2, 2.0)), {}, marks=FULL, id="adapters"),
]


@pytest.mark.parametrize(("compute", "tower"), COMPUTES)
def test_gradients_of_what_is_trained_are_those_of_the_whole_differentiation_in_float64(x64, compute, tower):
    arch = dataclasses.replace(ARCH, image=dataclasses.replace(IMAGE, **tower))
    for path, found, expected in both_ways(Definition(arch, compute)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max(), err_msg=path)


@pytest.mark.full
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_fixed_blocks_keep_nothing_for_a_backward_pass(remat):
    image = dataclasses.replace(IMAGE, image_size=32, depth=12)
    definition = Definition(dataclasses.replace(ARCH, image=image), Compute(remat=remat))

    def memory(*, whole: bool) -> int:
        function, arguments = gradients_of(definition, {"lock_image": 3, "lock_text": 0}, whole=whole)
        return function.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert memory(whole=False) < 0.5 * memory(whole=True)


@functools.cache
def stepped(definition: Definition, sizes: tuple[int, int, int], parts: int) -> tuple[TrainState, Metrics]:
    """Returns the state after two steps, on the host, and the last one's metrics; all in float64."""
    optimizer, mesh = made(definition, **LOCKED, clip_norm=1.0), mesh_of(*sizes)
    with jax.enable_x64(True):
        abstract = abstract_state(definition, optimizer, mesh)
        step = make_train_step(definition, optimizer, abstract, parts=parts)
        state = placed(host_state(abstract, "float64"), abstract)
        for n in range(2):
            batch = host_batch(definition.architecture, n, list(range(GLOBAL_BATCH)))
            state, metrics = step(state, sharding.to_mesh(batch, GLOBAL_BATCH, mesh))
        return jax.device_get(state), jax.device_get(metrics)


@pytest.mark.full
@pytest.mark.parametrize(
    ("sizes", "parts", "remat"),
    [((1, 8, 1), 1, "none"), ((2, 4, 1), 2, "full"), ((8, 1, 1), 2, "dots"), ((2, 2, 2), 2, "attention")],
)
def test_a_step_is_the_whole_differentiations_on_any_mesh_in_any_parts_and_with_any_remat(sizes, parts, remat):
    definition = Definition(ARCH, Compute("float64", patch_dropout=0.5))
    with mock.patch.object(optim.Optimizer, "fixed_blocks", return_value=0):
        expected = stepped(definition, (1, 1, 1), 1)
    found = stepped(definition.computed(remat=remat), sizes, parts)
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)
