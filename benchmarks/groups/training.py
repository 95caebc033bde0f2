"""A training step: images and captions in, weights and moments changed; the same weights, the same batch, AdamW with
OpenCLIP's settings. The first losses are the same. On a CPU in float32; `gpu.py` has it in bfloat16."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import peers
from groups.encoding import captions
from peers import OURS
from side_by_side import Row, in_turns

from clip_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from clip_jax.models.variants import VARIANTS

if TYPE_CHECKING:
    import jax
    import torch

    from clip_jax.training.program import Program
    from clip_jax.weights.bundle import Bundle

# OpenCLIP's names: (batch, rounds, the bar against it as it is without torch.compile).
MODELS = {"ViT-B-32": (32, 3, 0.8), "RN50": (32, 3, 0.5), "ViT-B-16": (8, 2, None), "ViT-L-14": (2, 2, None)}
QUICK = {"ViT-B-32": (32, 2, 0.8)}
PEER = "OpenCLIP"
COMPILED = f"{PEER}, torch.compile"
WHOLE = "texts of 77 tokens"
CAPTION_LENGTHS = (24, 48)
RATE, DECAY = 1e-4, 0.2
CLOSE = 1e-4  # of a loss


def rows(quick: bool, folder: Path) -> Iterator[Row]:
    """Yields a row for each model against OpenCLIP as it is, and one against what torch.compile makes of it; and what
    it gives to compute texts up to the longest caption of a batch only."""
    for variant, (batch, rounds, bar) in (QUICK if quick else MODELS).items():
        yield from _beside(variant, batch, rounds, bar, folder / variant)
        gc.collect()  # the next model wants its memory
    yield from _cut(quick)


def _beside(variant: str, batch: int, rounds: int, bar: float | None, folder: Path) -> Iterator[Row]:
    images, tokens = inputs(variant, batch)
    ours = Ours.of(config(variant, batch), images, tokens)
    name, jobs, gaps = f"a step of {variant}, batch {batch}", {OURS: lambda: float(ours.step())}, {}
    try:
        peer = Peer.of(ours.bundle, folder, images, tokens)
    except peers.Gap as gap:
        yield Row(name, in_turns(jobs, rounds, before=1), gaps={PEER: str(gap)})
        return
    for who in (PEER, COMPILED):  # of one model, of which each takes every other step
        first = float(ours.step())
        try:
            jobs[who] = peer.steps(who, first)
        except peers.Gap as gap:
            gaps[who] = str(gap)
    taken = in_turns(jobs, rounds, before=1)
    yield Row(name, {who: taken[who] for who in taken if who != COMPILED}, bar=bar)
    yield Row(f"{name}, compiled", {who: taken[who] for who in taken if who != PEER}, gaps=gaps)


def _cut(quick: bool) -> Iterator[Row]:
    """Yields rows of ViT-B-32 with captions of which the longest is so long, beside texts of the whole context."""
    lengths = ";".join(map(str, CAPTION_LENGTHS))
    images, _ = inputs("ViT-B-32", 32)
    for longest in CAPTION_LENGTHS[:1] if quick else CAPTION_LENGTHS:
        tokens = captions(32, longest)
        cut = Ours.of(config("ViT-B-32", 32, caption_lengths=lengths), images, tokens)
        whole = Ours.of(config("ViT-B-32", 32), images, tokens)
        jobs = {OURS: lambda cut=cut: float(cut.step()), WHOLE: lambda whole=whole: float(whole.step())}
        taken = in_turns(jobs, 2, before=1)
        note = f"model.caption_lengths={lengths!r}"
        yield Row(f"a step of ViT-B-32, captions of at most {longest}", taken, baselines=(WHOLE,), note=note)


def config(variant: str, batch: int, *, microbatch: int | None = None, **model: object) -> Config:
    """Returns a run with OpenCLIP's optimiser; `model` are fields of the model's section."""
    return Config(
        model=ModelConfig(variant=variant, **model),
        data=DataConfig(global_batch=batch),
        optim=OptimConfig(learning_rate=RATE, schedule="constant", warmup="0 steps", weight_decay=DECAY),
        microbatch=microbatch,
    )


def inputs(variant: str, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns random images as they come from the host, and captions of which one fills the context."""
    size, context = VARIANTS[variant].image.image_size, VARIANTS[variant].text.context_length
    images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)
    return images, captions(batch, context, context)


class Ours(NamedTuple):
    """Our program, on one device, with its batch there."""

    program: "Program"
    bundle: "Bundle"  # the weights that it starts from
    step: Callable[[], "jax.Array"]  # one after the other; returns the loss as soon as it is asked for, not done

    @classmethod
    def of(cls, config: Config, images: np.ndarray, tokens: np.ndarray) -> "Ours":
        import jax

        from clip_jax import sharding
        from clip_jax.training.program import assemble
        from clip_jax.typing import Batch
        from clip_jax.weights.bundle import Bundle
        from clip_jax.weights.mapping import flatten

        program = assemble(config, jax.devices()[:1], records=100_000)
        state = program.initial_state()
        arrays = {path: np.array(x) for path, x in flatten(jax.device_get(state.weights)).items()}
        batch = sharding.to_mesh(Batch(images, tokens, np.ones(len(images), bool)), len(images), program.mesh)

        def step() -> jax.Array:
            nonlocal state
            state, metrics = program.train_step(state, batch)
            return metrics["loss"]

        return cls(program, Bundle(program.architecture, arrays, config.model.variant, "random"), step)


class Peer(NamedTuple):
    """OpenCLIP's model, with AdamW in the two groups of its training script, and a batch."""

    model: "torch.nn.Module"
    optimizer: "torch.optim.Optimizer"
    loss_of: "torch.nn.Module"
    pixels: "torch.Tensor"
    ids: "torch.Tensor"

    @classmethod
    def of(cls, bundle: "Bundle", folder: Path, images: np.ndarray, tokens: np.ndarray, device: str = "cpu") -> "Peer":
        """Raises peers.Gap: it is not installed."""
        package = peers.module(PEER)
        import torch

        from clip_jax.weights import open_clip

        if not folder.exists():
            open_clip.write(folder, bundle)
        model = package.create_model(f"local-dir:{folder}", output_dict=True, device=device).train()
        no_decay, decay = [], []
        for name, parameter in model.named_parameters():
            still = parameter.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name
            (no_decay if still else decay).append(parameter)
        groups = [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": DECAY}]
        optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6)
        preprocess = bundle.architecture.preprocess
        mean, deviation = (np.asarray(values, np.float32) for values in (preprocess.mean, preprocess.std))
        pixels = torch.from_numpy(((np.float32(images) / 255 - mean) / deviation).transpose(0, 3, 1, 2).copy())
        ids = torch.from_numpy(tokens.astype(np.int64))
        return cls(model, optimizer, package.loss.ClipLoss(), pixels.to(device), ids.to(device))

    def step(self, call: Callable[..., dict]) -> "torch.Tensor":
        """Returns the loss of a step, the model called so; on a GPU in its `amp_bf16`."""
        import torch

        self.optimizer.zero_grad()
        with torch.autocast(self.pixels.device.type, dtype=torch.bfloat16, enabled=self.pixels.device.type != "cpu"):
            outputs = call(self.pixels, self.ids)
            loss = self.loss_of(**{name: x for name, x in outputs.items() if name != "logit_bias"})
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, np.log(100))
        return loss.detach()

    def steps(self, who: str, expected: float) -> Callable[[], float]:
        """Returns the call that does a step, as it is or compiled, having done one whose loss is to be so.

        Raises:
            peers.Gap: it does not compile.
        """
        import torch

        call = torch.compile(self.model) if who == COMPILED else self.model
        try:
            found = float(self.step(call))
        except Exception as error:  # of the compiler, of Triton, of the C++ compiler behind them
            if who != COMPILED:
                raise
            raise peers.Gap(f"does not compile: {str(error).strip().partition(chr(10))[0]}") from error
        assert abs(found / expected - 1) <= CLOSE, f"{who}: the loss is {found}, ours {expected}"
        return lambda: float(self.step(call))
