"""What one step hands to the next: parameters and optimiser, created in their places on the mesh."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax import optim, sharding
from clip_jax.models.clip import Definition, Params, Weights
from clip_jax.weights.mapping import flatten, unflatten

# For what runs once. Random numbers are long programs: on a CPU this takes two thirds off the time they compile, and
# they are the same numbers in the same time.
ONCE = {"xla_backend_optimization_level": 1}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Plain nested dicts: what `jax.jit` passes at least cost. Of arrays, or of whatever else is said of each array."""

    step: Any  # int32 []: batches seen
    params: Params
    statistics: Params  # of batch norm; empty without
    optimizer: Any  # what Optax keeps of the parameters that are trained
    # Moving averages of what is trained, and of statistics; empty: there are none.
    ema: Weights = dataclasses.field(default_factory=lambda: Weights({}, {}))

    @property
    def weights(self) -> Weights:
        return Weights(self.params, self.statistics)

    @property
    def averaged(self) -> Weights:
        """Returns the weights that a run is measured by: the averages where there are any."""
        return Weights(*(optim.join(old, new) for old, new in zip(self.weights, self.ema, strict=True)))


def abstract_state(definition: Definition, optimizer: optim.Optimizer, mesh: Mesh) -> TrainState:
    """Returns the state's shapes, each with its place on the mesh, computing nothing.

    Raises:
        UserError: the mesh cannot split some parameter.
    """
    params, statistics = definition.shapes()
    sharding.check_tensor(definition.architecture, mesh)
    specs = sharding.parameter_specs(params)
    sharding.check_divisible(params, specs, mesh)
    moments = jax.eval_shape(optimizer.init, optimizer.split(params)[0])

    def place(shape, spec):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))

    weights = Weights(
        params=jax.tree.map(place, params, specs),
        statistics=jax.tree.map(place, statistics, sharding.parameter_specs(statistics)),
    )
    return TrainState(
        place(jax.ShapeDtypeStruct((), jnp.int32), P()),
        *weights,
        optimizer=jax.tree.map(place, moments, _moment_specs(moments, params, specs)),
        ema=_to_average(weights, optimizer),
    )


def _to_average(weights: Weights, optimizer: optim.Optimizer) -> Weights:
    """Returns what moving averages are of: what is trained, and the statistics; nothing where there are none."""
    if optimizer.ema is None:
        return Weights({}, {})
    return Weights(optimizer.split(weights.params)[0], weights.statistics)


def _new(weights: Weights, optimizer: optim.Optimizer) -> TrainState:
    """Returns the state before the first step; averages begin as copies, for the state's memory is given away."""
    ema = jax.tree.map(jnp.copy, _to_average(weights, optimizer))
    return TrainState(jnp.int32(0), *weights, optimizer.init(optimizer.split(weights.params)[0]), ema)


def _moment_specs(moments: Any, params: Params, specs: Params) -> Any:
    """Returns a spec for every array that Optax keeps: that of the parameter whose path ends its own path and whose
    shape it has, but for dimensions of which a 1 is left; any other is everywhere."""
    shapes, places = optim.flatten(params), optim.flatten(specs)

    def spec(keys: tuple, moment: jax.ShapeDtypeStruct) -> P:
        words = sharding.path_of(keys).split("/")
        path = next((end for i in range(len(words)) if (end := "/".join(words[i:])) in shapes), None)
        if path is None or len(shapes[path].shape) != len(moment.shape):
            return P()
        if shapes[path].shape == moment.shape:
            return places[path]
        sizes = zip(shapes[path].shape, moment.shape, strict=True)
        return P(*(axis if n == size else None for axis, (n, size) in zip(places[path], sizes, strict=False)))

    return jax.tree_util.tree_map_with_path(spec, moments)


def initial_state(definition: Definition, optimizer: optim.Optimizer, abstract: TrainState, seed: int) -> TrainState:
    """Returns a new state; every array is computed in pieces where it will live, and whole nowhere."""
    return initialiser(definition, optimizer, abstract)(jax.random.key(seed))


def initialiser(
    definition: Definition, optimizer: optim.Optimizer, abstract: TrainState
) -> Callable[[jax.Array], TrainState]:
    """Returns the compiled function from a key to a new state."""

    def init(key: jax.Array) -> TrainState:
        return _new(definition.init(key), optimizer)

    places = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(init, out_shardings=places, compiler_options=ONCE)


def state_from(
    arrays: Mapping[str, np.ndarray],
    definition: Definition,
    optimizer: optim.Optimizer,
    abstract: TrainState,
    seed: int,
) -> TrainState:
    """Returns a new state that has these weights, by path; what they have not, which are adapters, is drawn.

    One array after the other is asked for and put where it will live, in the dtype that it has there.
    """
    like = flatten(abstract.weights)
    places = {path: x.sharding for path, x in like.items()}
    drawn = [path for path in like if path not in arrays]
    assert not arrays.keys() - like.keys(), f"weights that the model has not: {', '.join(arrays.keys() - like.keys())}"

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        weights = flatten(definition.init(key))
        return {path: weights[path] for path in drawn}

    def place(path: str) -> jax.Array:
        x, (shape, dtype) = arrays[path], (like[path].shape, like[path].dtype)
        return jax.make_array_from_callback(shape, places[path], lambda index: np.asarray(x[index], dtype))

    placed = {path: place(path) for path in like if path in arrays}
    if drawn:
        where = {path: places[path] for path in drawn}
        placed |= jax.jit(draw, out_shardings=where, compiler_options=ONCE)(jax.random.key(seed))
    weights = unflatten(placed, abstract.weights)
    all_places = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(lambda weights: _new(weights, optimizer), out_shardings=all_places, donate_argnums=0)(weights)
