"""One update: pixels and tokens in, a new state and its metrics out. Pure; compiled once."""

from collections.abc import Callable

import jax
import optax

from clip_jax import losses
from clip_jax.models.clip import Definition, Params, Weights, constrain, l2_normalise, normalise_pixels
from clip_jax.training.state import TrainState
from clip_jax.typing import Batch, Float

Metrics = dict[str, jax.Array]


def make_train_step(
    definition: Definition,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    abstract: TrainState,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the compiled function (state, global batch) → (state, metrics).

    It takes the old state's memory, and leaves the new one in the places that `abstract` gives: left to itself the
    compiler would move small arrays, and the second step would be another program than the first.
    """

    def loss_of(
        params: Params, statistics: Params, batch: Batch
    ) -> tuple[Float[jax.Array, ""], tuple[Metrics, Params]]:
        model = definition.bind(Weights(params, statistics))
        pixels = normalise_pixels(batch.image, definition.architecture.preprocess)
        img_BE = l2_normalise(model.encode_image(pixels, train=True))
        txt_BE = l2_normalise(model.encode_text(batch.tokens))
        loss = losses.softmax(img_BE, txt_BE, scale=model.scale(), valid_B=batch.valid)
        metrics = {"loss": loss, "logit_scale": model.scale(), "valid": batch.valid.sum()}
        return loss, (metrics, model.statistics())

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        differentiate = jax.value_and_grad(loss_of, has_aux=True)
        (_, (metrics, statistics)), gradients = differentiate(state.params, state.statistics, batch)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        params = constrain(optax.apply_updates(state.params, updates))
        metrics |= {"gradient_norm": optax.tree.norm(gradients), "learning_rate": schedule(state.step)}
        return TrainState(state.step + 1, params, statistics, moments), metrics

    places = jax.tree.map(lambda x: x.sharding, abstract)
    everywhere = places.step
    return jax.jit(train_step, donate_argnums=0, out_shardings=(places, everywhere))
