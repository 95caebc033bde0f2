"""One update: pixels and tokens in, a new state and its metrics out. Pure; compiled once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from clip_jax import losses
from clip_jax.models.clip import Definition, Params, Weights, constrain, l2_normalise, normalise_pixels
from clip_jax.training.microbatch import Embeddings, Encode, in_parts
from clip_jax.training.state import TrainState
from clip_jax.typing import Batch, Float

Metrics = dict[str, jax.Array]


def make_encode(definition: Definition, dropout: jax.Array | None = None) -> Encode:
    """Returns the function (weights, batch, rows, their place) → (normalised embeddings, new statistics).

    `dropout` is the key of all that is random in a step; a pair's own is that and its row in the global batch.
    """

    def encode(weights: Weights, batch: Batch, rows_B: jax.Array, placed: NamedSharding) -> tuple[Embeddings, Params]:
        model = definition.computed(rows=placed).bind(weights)
        pixels = normalise_pixels(batch.image, definition.architecture.preprocess)
        keys_B = None if dropout is None else jax.vmap(jax.random.fold_in, (None, 0))(dropout, rows_B)
        img_BE = l2_normalise(model.encode_image(pixels, train=True, dropout_B=keys_B))
        txt_BE = l2_normalise(model.encode_text(batch.tokens))
        return (img_BE, txt_BE), jax.lax.stop_gradient(model.statistics())

    return encode


def norms(of: str, tree: Params) -> Metrics:
    """Returns the L2 norms of gradients or parameters: of all, and by tower; none of a tower that has none here."""
    squares = {part: optax.tree.norm(leaves, squared=True) for part, leaves in tree.items() if jax.tree.leaves(leaves)}
    towers = {f"{of}_norm_{part}": jnp.sqrt(square) for part, square in squares.items() if part in ("image", "text")}
    return {f"{of}_norm": jnp.sqrt(sum(squares.values()))} | towers


def make_train_step(
    definition: Definition,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    abstract: TrainState,
    *,
    seed: int = 0,
    ring: losses.Ring | None = None,
    parts: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the compiled function (state, global batch) → (state, metrics).

    It takes the old state's memory, and leaves the new one in the places that `abstract` gives: left to itself the
    compiler would move small arrays, and the second step would be another program than the first. `ring` is the loss's
    form; the towers go over the batch in `parts`.
    """

    def loss_of(
        params: Params, statistics: Params, batch: Batch, step: jax.Array
    ) -> tuple[Float[jax.Array, ""], tuple[Metrics, Params]]:
        dropout = jax.random.fold_in(jax.random.key(seed), step) if definition.compute.patch_dropout else None
        encode = in_parts(make_encode(definition, dropout), parts, abstract.step.sharding.mesh)
        (img_BE, txt_BE), statistics = encode(Weights(params, statistics), batch, jnp.arange(len(batch.valid)))
        model = definition.bind(Weights(params, statistics))
        known = {"scale": model.scale(), "valid_B": batch.valid, "ring": ring}
        if model.logit_bias is None:
            contrast = losses.softmax(img_BE, txt_BE, **known)
        else:
            contrast = losses.sigmoid(img_BE, txt_BE, bias=model.bias(), **known)
        metrics = contrast._asdict() | {"logit_scale": model.scale(), "valid": batch.valid.sum()}
        if model.logit_bias is not None:
            metrics["logit_bias"] = model.bias()
        return contrast.loss, (metrics, statistics)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        differentiate = jax.value_and_grad(loss_of, has_aux=True)
        (_, (metrics, statistics)), gradients = differentiate(state.params, state.statistics, batch, state.step)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        params = constrain(optax.apply_updates(state.params, updates))
        metrics |= norms("gradient", gradients) | norms("parameter", state.params)
        metrics["learning_rate"] = schedule(state.step)
        return TrainState(state.step + 1, params, statistics, moments), metrics

    places = jax.tree.map(lambda x: x.sharding, abstract)
    everywhere = places.step
    return jax.jit(train_step, donate_argnums=0, out_shardings=(places, everywhere))
