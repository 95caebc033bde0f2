"""Logistic regression on frozen features: what a linear probe trains (CLIP, section 3.2 and appendix A.3).

The objective is scikit-learn's, ½‖W‖² + C · Σ cross-entropy with the bias free, so that one C means the same in both.
Small sets go to scikit-learn; large ones stay where the features are, split over the devices of the mesh, and L-BFGS
in float32 comes to the same optimum. Three things let it:

- Features are centred. The bias takes that up exactly, W is the same, and the scores of no class are large numbers
  that differ little.
- A cross-entropy is a sum over the other classes, not a difference to the label's, so one of 1e-9 has all its digits.
- The objective is minimised in coordinates in which it is round: L-BFGS takes stages, and before each the features'
  covariance, weighted by how much every example still matters, says which. It is another road to the same place, for
  W is counted as it is and not by its coordinates.

A class that no example has costs the least when its bias is -∞, and that is what it gets, its weight being zero. Of two
classes scikit-learn keeps one column w, and counts ½‖w‖²: that is W = [0, w], which is what both ways return, and
between two classes the minimum is over w (over all of W the penalty would be half as large).
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax import sharding
from clip_jax.config import MeshConfig
from clip_jax.typing import Float, Int

MAX_ITERATIONS = 1000  # as in the paper
# Up to so many products (examples × features × classes) scikit-learn fits, beyond the devices do.
HOST_WORK = 2 * 10**7
HOST_TOLERANCE = 1e-10  # of the gradient of the mean: for C = 1e6 the usual 1e-4 is far from the optimum
GAP = 1e-11  # to the optimum, as a share of the objective: there the devices end; at 1e-8 near ties are others
ROUNDING = 4 * float(np.finfo(np.float32).eps)  # of the objective: 2 eps are seen, and 28 in the last true stage
FIRST_STAGE = 10  # iterations; every stage is twice as long as the one before
BLOCK = 2**25  # scores that a device has at once, and the host


class Linear(NamedTuple):
    """A linear classifier of features: NumPy's; within this file also a program's arrays."""

    weight: Float[np.ndarray, "E classes"]
    bias: Float[np.ndarray, " classes"]  # -∞: a class that no example had


class Fitted(NamedTuple):
    """An optimum, and after how many iterations of L-BFGS."""

    linear: Linear
    iterations: int  # MAX_ITERATIONS: it ended there, as the paper's do


def scores(linear: Linear, features_BE: Float[np.ndarray, "B E"]) -> Float[np.ndarray, "B classes"]:
    """Returns every class's score, in float64: the logarithm of its probability but for a constant a row."""
    return features_BE.astype(np.float64) @ linear.weight.astype(np.float64) + linear.bias


def objective(
    linear: Linear, features_BE: Float[np.ndarray, "B E"], labels_B: Int[np.ndarray, " B"], c: float
) -> float:
    """Returns ½‖W‖² + c · Σ cross-entropy, in float64; ∞ where the linear knows a label's class not."""
    rows = max(1, BLOCK // len(linear.bias))
    total = 0.0
    for start in range(0, len(features_BE), rows):
        scores_BK = scores(linear, features_BE[start : start + rows])
        top_B1 = scores_BK.max(axis=1, keepdims=True)
        log_sum_B1 = top_B1 + np.log(np.exp(scores_BK - top_B1).sum(axis=1, keepdims=True))
        total += float((log_sum_B1 - np.take_along_axis(scores_BK, labels_B[start : start + rows, None], 1)).sum())
    return float((linear.weight.astype(np.float64) ** 2).sum() / 2 + c * total)


def fit(
    features_BE: Float[np.ndarray, "B E"],
    labels_B: Int[np.ndarray, " B"],
    classes: int,
    c: float,
    *,
    mesh: Mesh | None = None,
    start: Linear | None = None,
) -> Fitted:
    """Returns the optimum for one C; `Problem` is for several."""
    return Problem(features_BE, labels_B, classes, mesh=mesh).fit(c, start)


class Problem:
    """Examples to learn from, laid out once for any number of C.

    All processes of a mesh make it and call it alike, with all examples, and each gets the same.
    """

    def __init__(
        self,
        features_BE: Float[np.ndarray, "B E"],
        labels_B: Int[np.ndarray, " B"],
        classes: int,
        *,
        mesh: Mesh | None = None,
    ):
        """Takes features and labels of at least two classes; of large sets every device of the mesh has its share
        (None: of this process's devices the first has all)."""
        self._classes = classes
        self._present, targets_B = np.unique(labels_B, return_inverse=True)
        assert len(self._present) > 1, "one class needs no classifier"
        self._mean_E = features_BE.mean(axis=0, dtype=np.float64).astype(np.float32)
        is_small = features_BE.size * len(self._present) <= HOST_WORK
        solver = _OnHost if is_small else functools.partial(_OnDevices, mesh=mesh)
        self._solver: _Solver = solver(features_BE.astype(np.float32, copy=False), self._mean_E, targets_B)

    def fit(self, c: float, start: Linear | None = None) -> Fitted:
        """Returns the optimum for a C, looked for from `start` (None: from zeros)."""
        columns, iterations = self._solver.minimise(c, self._columns(start))
        return Fitted(self._linear(columns), iterations)

    @property
    def _free(self) -> np.ndarray:
        """The classes that have a column of their own: those with examples; of two the second."""
        return self._present[1:] if len(self._present) == 2 else self._present

    def _columns(self, linear: Linear | None) -> Linear:
        """Returns what there is to minimise over, of centred features."""
        if linear is None:
            return Linear(np.zeros((len(self._mean_E), len(self._free))), np.zeros(len(self._free)))
        bias = linear.bias + self._mean_E.astype(np.float64) @ linear.weight
        weight, bias = linear.weight[:, self._present], bias[self._present]
        bias = np.where(np.isfinite(bias), bias, 0)  # a class that is new here
        if len(self._present) == 2:
            weight, bias = weight[:, 1:] - weight[:, :1], bias[1:] - bias[:1]
        return Linear(weight, bias)

    def _linear(self, columns: Linear) -> Linear:
        """Returns the classifier of features as they are, between all classes."""
        weight, bias = np.zeros((len(self._mean_E), self._classes)), np.full(self._classes, -np.inf)
        bias[self._present] = 0
        weight[:, self._free] = columns.weight
        bias[self._free] = columns.bias - self._mean_E.astype(np.float64) @ columns.weight
        return Linear(weight, bias)


class _Solver(Protocol):
    """Minimises over columns: one a class, or one for two classes."""

    def minimise(self, c: float, start: Linear) -> tuple[Linear, int]: ...


class _OnHost:
    """scikit-learn, in float64."""

    def __init__(
        self, features_BE: Float[np.ndarray, "B E"], mean_E: Float[np.ndarray, " E"], targets_B: Int[np.ndarray, " B"]
    ):
        self._features_BE, self._targets_B = (features_BE - mean_E).astype(np.float64), targets_B

    def minimise(self, c: float, start: Linear) -> tuple[Linear, int]:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=c, max_iter=MAX_ITERATIONS, tol=HOST_TOLERANCE, warm_start=True)
        model.coef_, model.intercept_ = start.weight.T, start.bias
        with warnings.catch_warnings():
            # It ends where the paper's end, which the number of iterations says; or where nothing but rounding is left.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(self._features_BE, self._targets_B)
        return Linear(model.coef_.T, model.intercept_), int(model.n_iter_.max())


class _Rows(NamedTuple):
    """Examples on the mesh, in parts of which a device has one at a time in hand."""

    features: Float[jax.Array, "parts B E"]  # float32, centred
    targets: Int[jax.Array, "parts B"]
    weight: Float[jax.Array, "parts B"]  # 1 / examples; 0: fills up the last part


class _Round(NamedTuple):
    """Coordinates in which the objective is about as curved in one direction as in any other."""

    weight: Float[np.ndarray, "E E"]  # W = weight @ coordinates; its columns are orthogonal
    length: Float[np.ndarray, " E"]  # of its columns
    bias: Float[np.ndarray, ""]  # b = bias · coordinates


class _OnDevices:
    """Optax's L-BFGS, in float32, on rows that are split over the devices.

    It minimises the objective for an example: Σ cross-entropy / examples + ridge/2 · ‖W‖², ridge = 1 / (C · examples).
    """

    def __init__(
        self,
        features_BE: Float[np.ndarray, "B E"],
        mean_E: Float[np.ndarray, " E"],
        targets_B: Int[np.ndarray, " B"],
        mesh: Mesh | None,
    ):
        mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1]) if mesh is None else mesh
        self._examples = len(features_BE)
        self._rows = _placed(features_BE, mean_E, targets_B, mesh)
        self._curvature, self._descend = _compiled(mesh)

    def minimise(self, c: float, start: Linear) -> tuple[Linear, int]:
        ridge = 1 / (c * self._examples)
        at, done, stage, before = start, 0, FIRST_STAGE, np.inf
        while done < MAX_ITERATIONS:
            steps = min(stage, MAX_ITERATIONS - done)
            at, iterations, value, gap = self._stage(at, ridge, steps)
            done += iterations
            if gap <= GAP or before - value <= ROUNDING * value:  # or that is all that is left
                break
            stage, before = 2 * stage, value
        return at, done

    def _stage(self, at: Linear, ridge: float, steps: int) -> tuple[Linear, int, float, float]:
        """Returns where so many iterations lead to (or fewer, to the optimum), how many, the objective there, and the
        gap to the optimum as a share of it."""
        covariance_EE, mass = jax.tree.map(_read, self._curvature(_float32(at), self._rows))
        round_ = _rounded(covariance_EE, mass, ridge)
        inner = Linear((round_.weight / round_.length**2).T @ at.weight, at.bias / round_.bias)
        found = self._descend(*map(_float32, (inner, round_, ridge)), np.int32(steps), self._rows)
        inner, iterations, value, gap = jax.tree.map(_read, found)
        return _outer(inner, round_), int(iterations), float(value), float(gap)


def _float32(x: Any) -> Any:
    return jax.tree.map(np.float32, x)


def _read(x: jax.Array) -> np.ndarray:
    """Returns an array that every device has, in float64."""
    return np.asarray(x.addressable_data(0), np.float64)


def _placed(
    features_BE: Float[np.ndarray, "B E"], mean_E: Float[np.ndarray, " E"], targets_B: Int[np.ndarray, " B"], mesh: Mesh
) -> _Rows:
    """Returns the rows on the mesh, centred, and filled up to parts that are equally long."""
    ways, classes = mesh.shape["data"] * mesh.shape["fsdp"], int(targets_B.max()) + 1
    parts = -(-len(targets_B) * classes // (BLOCK * ways))
    rows = -(-len(targets_B) // (parts * ways)) * ways
    place = NamedSharding(mesh, P(None, sharding.BATCH_AXES))

    def on_mesh(x: np.ndarray) -> jax.Array:
        whole = x.reshape(parts, rows, *x.shape[1:])
        return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])

    features = np.zeros((parts * rows, len(mean_E)), np.float32)
    np.subtract(features_BE, mean_E, out=features[: len(features_BE)])
    fill = (0, len(features) - len(features_BE))
    weight = np.pad(np.full(len(targets_B), 1 / len(targets_B), np.float32), fill)
    return _Rows(on_mesh(features), on_mesh(np.pad(targets_B.astype(np.int32), fill)), on_mesh(weight))


def _rounded(covariance_EE: Float[np.ndarray, "E E"], mass: Float[np.ndarray, ""], ridge: float) -> _Round:
    """Returns the coordinates in which ridge + covariance, which is how the objective is curved in W, is about one."""
    variance_E, axes_EE = np.linalg.eigh(covariance_EE)
    length_E = 1 / np.sqrt(ridge + np.maximum(variance_E, 0))
    return _Round(axes_EE * length_E, length_E, 1 / np.sqrt(np.maximum(mass, np.finfo(np.float32).tiny)))


def _outer(inner: Linear, round_: _Round) -> Linear:
    """Returns W and b of coordinates: NumPy's in float64, or a program's."""
    if isinstance(inner.weight, np.ndarray):
        return Linear(round_.weight @ inner.weight, round_.bias * inner.bias)
    weight = jnp.matmul(round_.weight, inner.weight, precision=jax.lax.Precision.HIGHEST)
    return Linear(weight, round_.bias * inner.bias)


@functools.lru_cache(8)
def _compiled(mesh: Mesh) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns `_curvature` and `_descend` of a mesh; what they return is everywhere."""
    everywhere = NamedSharding(mesh, P())
    return tuple(jax.jit(functools.partial(f, mesh=mesh), out_shardings=everywhere) for f in (_curvature, _descend))


def _descend(
    start: Linear, round_: _Round, ridge: jax.Array, steps: jax.Array, rows: _Rows, *, mesh: Mesh
) -> tuple[Linear, jax.Array, jax.Array, jax.Array]:
    """Returns coordinates, iterations, the objective, and the gap to its optimum as a share of it."""

    def loss(inner: Linear) -> jax.Array:
        at = _outer(inner, round_)
        return _mean_cost(mesh, at, rows) + ridge / 2 * jnp.sum(at.weight**2)

    def goes_on(carry):
        _, state, value, gradient = carry
        return (optax.tree.get(state, "count") < steps) & (_gap(gradient, round_, ridge) > GAP * value)

    def step(carry):
        at, state, value, gradient = carry
        moves, state = solver.update(gradient, state, at, value=value, grad=gradient, value_fn=loss)
        at = optax.apply_updates(at, moves)
        return at, state, optax.tree.get(state, "value"), optax.tree.get(state, "grad")  # the line search's last

    solver = optax.lbfgs()
    first = (start, solver.init(start), *jax.value_and_grad(loss)(start))
    at, state, value, gradient = jax.lax.while_loop(goes_on, step, first)
    return at, optax.tree.get(state, "count"), value, _gap(gradient, round_, ridge) / value


def _gap(gradient: Linear, round_: _Round, ridge: jax.Array) -> jax.Array:
    """Returns a bound of how far above its minimum the objective is: nowhere is it less curved in W than `ridge`."""
    of_weight = jnp.sum((gradient.weight / round_.length[:, None]) ** 2) / ridge
    return (of_weight + jnp.sum(gradient.bias**2)) / 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mean_cost(mesh: Mesh, linear: Linear, rows: _Rows) -> jax.Array:
    """Returns the mean cross-entropy. Its gradient is taken part by part, so no more than a part's scores are kept."""
    return _summed(mesh, _cost, linear, rows)


def _mean_cost_forward(mesh: Mesh, linear: Linear, rows: _Rows) -> tuple[jax.Array, Linear]:
    return _summed(mesh, jax.value_and_grad(_cost), linear, rows)


def _mean_cost_backward(mesh: Mesh, gradient: Linear, factor: jax.Array) -> tuple[Linear, None]:
    return jax.tree.map(lambda x: factor * x, gradient), None


_mean_cost.defvjp(_mean_cost_forward, _mean_cost_backward)


def _curvature(linear: Linear, rows: _Rows, *, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Returns the features' covariance, every example weighted by how curved its cross-entropy is, and these weights'
    sum; both means over classes and examples."""

    def of_part(linear: Linear, part: _Rows) -> tuple[jax.Array, jax.Array]:
        share_BK = jax.nn.softmax(_scores(linear, part.features), axis=1)
        weight_B = part.weight * jnp.mean(share_BK * (1 - share_BK), axis=1)
        weighted_BE = part.features * weight_B[:, None]
        return jnp.matmul(part.features.T, weighted_BE, precision=jax.lax.Precision.HIGHEST), jnp.sum(weight_B)

    return _summed(mesh, of_part, linear, rows)


def _summed(mesh: Mesh, function: Callable[[Linear, _Rows], Any], linear: Linear, rows: _Rows) -> Any:
    """Returns the sum of what a function returns for all parts of the rows, added up over the devices once."""

    def on_device(linear: Linear, rows: _Rows) -> Any:
        linear = jax.lax.pcast(linear, sharding.BATCH_AXES, to="varying")
        first, rest = jax.tree.map(lambda x: x[0], rows), jax.tree.map(lambda x: x[1:], rows)
        sums, _ = jax.lax.scan(
            lambda sums, part: (jax.tree.map(jnp.add, sums, function(linear, part)), None),
            function(linear, first),
            rest,
        )
        return jax.lax.psum(sums, sharding.BATCH_AXES)

    split = P(None, sharding.BATCH_AXES)
    return jax.shard_map(on_device, mesh=mesh, in_specs=(P(), split), out_specs=P())(linear, rows)


def _cost(linear: Linear, part: _Rows) -> jax.Array:
    """Returns the weighted sum of the cross-entropies log(1 + Σ exp(score - label's score)), of all other classes."""
    scores_BK = _scores(linear, part.features)
    over_BK = scores_BK - jnp.take_along_axis(scores_BK, part.targets[:, None], axis=1)
    is_other_BK = part.targets[:, None] != jnp.arange(scores_BK.shape[1])
    most_B = jax.lax.stop_gradient(jnp.maximum(jnp.max(over_BK, axis=1), 0))
    others_B = jnp.sum(jnp.exp(over_BK - most_B[:, None]), axis=1, where=is_other_BK)
    # exp(-most) + others, less one so that what is small stays exact: where most is not 0 others are at least 1.
    costs_B = most_B + jnp.log1p(jnp.expm1(-most_B) + others_B)
    return jnp.sum(costs_B * part.weight)


def _scores(linear: Linear, features_BE: jax.Array) -> jax.Array:
    """Returns every class's scores; of two classes the first has 0."""
    scores_BK = jnp.matmul(features_BE, linear.weight, precision=jax.lax.Precision.HIGHEST) + linear.bias
    return jnp.pad(scores_BK, ((0, 0), (1, 0))) if scores_BK.shape[1] == 1 else scores_BK
