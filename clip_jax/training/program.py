"""What a config computes, and where: all of a run but its data and its numbers.

The loop runs it; the planner compiles it for devices that are not there.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from clip_jax import losses, optim, sharding
from clip_jax.architecture import Architecture, ViTTower
from clip_jax.config import Config, ModelConfig, Steps
from clip_jax.errors import UserError
from clip_jax.models import variants
from clip_jax.models.attention import refused_by_cudnn
from clip_jax.models.clip import Definition
from clip_jax.models.transformer import Compute
from clip_jax.training.microbatch import check_microbatch
from clip_jax.training.state import TrainState, abstract_state, initial_state, state_from
from clip_jax.training.step import Metrics, make_train_step
from clip_jax.typing import Batch
from clip_jax.weights.bundle import variant_of


@dataclasses.dataclass(frozen=True)
class Program:
    """A config, put together for the devices of a mesh; arrays are shapes with their places."""

    config: Config
    steps: Steps
    variant: str  # the architecture's name
    architecture: Architecture
    definition: Definition
    mesh: Mesh
    optimizer: optim.Optimizer
    attention: str  # whose kernels, and why
    ring: losses.Ring | None  # None: the loss is dense
    parts: int  # of the batch, for the towers
    state: TrainState
    batch: Batch
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]  # compiled when it is first called

    def initial_state(self, weights: Mapping[str, np.ndarray] | None = None) -> TrainState:
        """Returns the state at step 0, created in its places: with these weights, or drawn."""
        what = (self.definition, self.optimizer, self.state, self.config.seed)
        return initial_state(*what) if weights is None else state_from(weights, *what)

    def described(self) -> list[str]:
        """Returns what was decided, a line each."""
        config, sizes = self.config, self.mesh.shape
        lines = [f"{self.variant}, mesh data × fsdp × tensor = {' × '.join(str(n) for n in sizes.values())}"]
        kind = "sigmoid" if self.architecture.logit_bias else "softmax"
        if self.ring is None:
            lines.append(f"loss: {kind}, dense: all {config.data.global_batch:,}² logits at once")
        else:
            devices = losses.ring_size(self.ring)
            lines.append(f"loss: {kind}, in a ring of {devices} device(s), tiles of {self.ring.tile}² logits")
        lines.append(f"attention: {self.attention}")
        if config.model.lora is not None:
            lines.append(f"adapters: rank {config.model.lora.rank}, scale {config.model.lora.scale:g}")
        numbers = sum(x.size for x in jax.tree.leaves(self.state.params))
        trained = self.optimizer.trained_numbers(self.state.params)
        if trained < numbers:
            lines.append(f"trained: {trained:,} of {numbers:,} parameters")
        if lengths := config.model.compiled_lengths():
            shown = ", ".join(str(n) for n in (*lengths, self.architecture.text.context_length))
            lines.append(f"texts: up to the first of {shown} tokens that holds the longest caption of a batch")
        if self.parts > 1:
            normalised = self.state.statistics and self.optimizer.trains("image")
            seen = "; batch norm sees each by itself" if normalised else ""
            lines.append(f"towers: {self.parts} parts of {config.microbatch:,} pairs, one after the other{seen}")
        return lines


def assemble(
    config: Config,
    devices: list[jax.Device] | None = None,
    *,
    records: int | None = None,
    arch: Architecture | None = None,
) -> Program:
    """Returns the program of a config on all devices (or those given), for data of so many records; computes nothing.
    `arch` is what the weights are that it starts from; None: what the config names.

    Raises:
        UserError: what the config asks for does not fit together, or not on these devices.
    """
    steps = config.steps(records)
    arch = variants.architecture(config.model) if arch is None else arch
    variants.check(config.model, arch)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_batch(config.data.global_batch, mesh)
    parts = check_microbatch(config.microbatch, config.data.global_batch, mesh)
    ring = losses.ring_for(config.loss, mesh, sharding.BATCH_AXES, config.data.global_batch)
    asked = next(iter(mesh.local_devices), mesh.devices.flat[0])  # of its own, for cuDNN answers for no other
    implementation, note = attention_for(config.model, arch, asked)
    model = config.model
    if model.compute_dtype == "float64" and not jax.config.jax_enable_x64:
        raise UserError(
            "model.compute_dtype='float64' would be float32 without a word: start with JAX_ENABLE_X64=true, or choose "
            "'float32'"
        )
    compute = Compute(model.compute_dtype, model.remat, implementation, model.patch_dropout, lora=model.lora)
    definition = Definition(arch, compute)
    optimizer = optim.make(config.optim, definition.shapes().params, steps)
    state = abstract_state(definition, optimizer, mesh)
    train_step = make_train_step(
        definition,
        optimizer,
        state,
        seed=config.seed,
        ring=ring,
        parts=parts,
        compiled_lengths=model.compiled_lengths(),
    )
    batch = abstract_batch(arch, config.data.global_batch, mesh)
    return Program(
        config=config,
        steps=steps,
        variant=model.variant or variant_of(arch, str(config.init_from)),
        architecture=arch,
        definition=definition,
        mesh=mesh,
        optimizer=optimizer,
        attention=implementation + note,
        ring=ring,
        parts=parts,
        state=state,
        batch=batch,
        train_step=train_step,
    )


def attention_for(model: ModelConfig, arch: Architecture, device: jax.Device) -> tuple[str, str]:
    """Returns whose kernels compute attention, "xla" or "cudnn", and what is to be said of it.

    Raises:
        UserError: the config insists on cuDNN, which is not there or refuses.
    """
    if model.attention == "xla" or (model.attention == "auto" and device.platform != "gpu"):
        return "xla", ""
    if device.platform != "gpu":
        raise UserError(f"model.attention={model.attention!r} needs a GPU, and this is a {device.platform}; use 'auto'")
    towers = {"text": (arch.text, arch.text.context_length, arch.text.causal)}
    if isinstance(arch.image, ViTTower):
        length = arch.image.class_token + arch.image.patches_kept(model.patch_dropout)
        towers["image"] = (arch.image, length, False)
    for name, (tower, length, causal) in towers.items():
        shape_NLK = (tower.num_heads, length, tower.width // tower.num_heads)
        reason = refused_by_cudnn(shape_NLK, causal=causal, dtype=model.compute_dtype, device=device)
        if reason and model.attention == "cudnn":
            raise UserError(f"model.attention='cudnn': cuDNN refuses the {name} tower ({reason}); use 'auto' or 'xla'")
        if reason:
            return "xla", f" (cuDNN refuses the {name} tower: {reason})"
    return "cudnn", ""


def abstract_batch(arch: Architecture, global_batch: int, mesh: Mesh) -> Batch:
    """Returns the shapes of a global batch, each with its place on the mesh."""
    rows = NamedSharding(mesh, sharding.BATCH)

    def shape(*sizes: int, dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((global_batch, *sizes), dtype, sharding=rows)

    side = arch.image.image_size
    return Batch(
        image=shape(side, side, 3, dtype=jnp.uint8),
        tokens=shape(arch.text.context_length, dtype=jnp.int32),
        valid=shape(dtype=jnp.bool_),
    )
