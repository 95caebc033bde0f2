"""One update: pixels and tokens in, a new state and its metrics out. Pure; compiled once."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from clip_jax import losses, optim
from clip_jax.models.clip import Definition, Params, Weights, constrain, l2_normalise, normalise_pixels
from clip_jax.models.text import pooled_at
from clip_jax.training.microbatch import Embeddings, Encode, in_parts
from clip_jax.training.state import TrainState
from clip_jax.typing import Batch, Float

Metrics = dict[str, jax.Array]

# By JAX's name, the chips with 128 MiB of VMEM; and what their compiler is told: a fusion may have half of it, not an
# eighth. That takes 5 % off ViT-L/14's step.
LARGE_VMEM = ("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e")
OPTIONS = {"xla_tpu_scoped_vmem_limit_kib": "65536"}


def make_encode(definition: Definition, dropout: jax.Array | None = None, *, image_is_fixed: bool = False) -> Encode:
    """Returns the function (weights, batch, rows, their place) → (normalised embeddings, new statistics).

    `dropout` is the key of all that is random in a step; a pair's own is that and its row in the global batch. Batch
    norm in an image tower that is fixed goes by its statistics, and leaves them as they are.
    """

    def encode(weights: Weights, batch: Batch, rows_B: jax.Array, placed: NamedSharding) -> tuple[Embeddings, Params]:
        model = definition.computed(rows=placed).bind(weights)
        pixels = normalise_pixels(batch.image, definition.architecture.preprocess, definition.compute.wide)
        keys_B = None if dropout is None else jax.vmap(jax.random.fold_in, (None, 0))(dropout, rows_B)
        img_BE = l2_normalise(model.encode_image(pixels, train=not image_is_fixed, dropout_B=keys_B))
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
    optimizer: optim.Optimizer,
    abstract: TrainState,
    *,
    seed: int = 0,
    ring: losses.Ring | None = None,
    parts: int = 1,
    compiled_lengths: Sequence[int] = (),
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the compiled function (state, global batch) → (state, metrics).

    It takes the old state's memory, and leaves the new one in the places that `abstract` gives: left to itself the
    compiler would move small arrays, and the second step would be another program than the first. `ring` is the loss's
    form; the towers go over the batch in `parts`. Gradients are those of what is trained: nothing else has any. Where
    the loss or a gradient is not finite (`finite` in the metrics), all stays as it was but the step: it counts batches.

    Texts are computed up to the first of `compiled_lengths` that holds the batch's longest caption, else up to the
    context length: behind a causal mask nothing after a caption is seen, and nothing there has a gradient. Devices
    choose by the captions of all, so that hosts have nothing to settle; `text_length` in the metrics is what they
    chose. Each length has a program of its own for all of the gradients: what the two passes share does not leave it.
    """
    image_is_fixed = not optimizer.trains("image")
    fixed = {f"fixed_{tower}": optimizer.fixed_blocks(tower) for tower in ("image", "text")}
    definition = definition.computed(**fixed)

    def loss_of(
        trained: Params, fixed: Params, statistics: Params, batch: Batch, step: jax.Array
    ) -> tuple[Float[jax.Array, ""], tuple[Metrics, Params]]:
        params = optim.join(trained, fixed)
        dropout = jax.random.fold_in(jax.random.key(seed), step) if definition.compute.patch_dropout else None
        encode = make_encode(definition, dropout, image_is_fixed=image_is_fixed)
        encode = in_parts(encode, parts, abstract.step.sharding.mesh)
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

    def differentiated(batch: Batch, trained: Params, fixed: Params, statistics: Params, step: jax.Array):
        return jax.value_and_grad(loss_of, has_aux=True)(trained, fixed, statistics, batch, step)

    def by_length(batch: Batch, *arguments: Params | jax.Array):
        text = definition.architecture.text
        lengths = (*compiled_lengths, text.context_length)
        chosen = jnp.searchsorted(jnp.asarray(lengths), 1 + pooled_at(text, batch.tokens).max())

        def of_length(length: int, batch: Batch, *arguments: Params | jax.Array):
            return differentiated(batch._replace(tokens=batch.tokens[:, :length]), *arguments)

        branches = [functools.partial(of_length, length) for length in lengths]
        (loss, (metrics, statistics)), gradients = jax.lax.switch(chosen, branches, batch, *arguments)
        metrics["text_length"] = jnp.asarray(lengths)[chosen]
        return (loss, (metrics, statistics)), gradients

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trained, fixed = optimizer.split(state.params)
        differentiate = by_length if compiled_lengths else differentiated
        (_, (metrics, statistics)), gradients = differentiate(batch, trained, fixed, state.statistics, state.step)
        metrics |= norms("gradient", optimizer.of_trained(gradients)) | norms("parameter", state.params)
        metrics["learning_rate"] = optimizer.schedule(state.step)
        # The norm is not finite, where any gradient is not.
        metrics["finite"] = finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])

        def update() -> TrainState:
            moved, moments = optimizer.update(gradients, state.optimizer, trained, state.step)
            params = optim.join(moved, fixed)
            params = constrain(params) if "logit_scale" in moved else params  # what is fixed stays as it is
            ema = optimizer.averaged(state.ema, Weights(moved, statistics), state.step)
            return TrainState(state.step, params, statistics, moments, ema)

        kept = jax.lax.cond(finite, update, lambda: state)
        return dataclasses.replace(kept, step=state.step + 1), metrics

    places = jax.tree.map(lambda x: x.sharding, abstract)
    everywhere = places.step
    options = OPTIONS if everywhere.mesh.devices.flat[0].device_kind in LARGE_VMEM else None
    return jax.jit(train_step, donate_argnums=0, out_shardings=(places, everywhere), compiler_options=options)
