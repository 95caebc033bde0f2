"""A training step: images and captions in, weights and moments changed; the same weights, the same batch, AdamW with
OpenCLIP's settings. The first losses are the same. On a CPU in float32; `gpu.py` has it in bfloat16."""

import functools
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import peers
from groups.encoding import captions
from side_by_side import OURS, Row, in_turns

from clip_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from clip_jax.models.variants import VARIANTS

if TYPE_CHECKING:
    import jax
    import torch

    from clip_jax.training.program import Program
    from clip_jax.weights.bundle import Bundle

# OpenCLIP's names: (batch, rounds, the bar against it as it is without torch.compile).
MODELS = {"ViT-B-32": (32, 5, 0.8), "RN50": (32, 5, 0.5), "ViT-B-16": (8, 3, None), "ViT-L-14": (4, 3, None)}
QUICK = {"ViT-B-32": (32, 2, 0.8)}
PEER = "OpenCLIP"
COMPILED = f"{PEER}, torch.compile"
WHOLE = "texts of 77 tokens"
CAPTION_LENGTHS = (24, 48)
RATE, DECAY = 1e-4, 0.2
CLOSE = 1e-4  # of the first loss


def rows(quick: bool, folder: Path) -> Iterator[Row]:
    """Yields a row for each model against OpenCLIP as it is, and one against what torch.compile makes of it; and what
    it gives to compute texts up to the longest caption of a batch only."""
    for variant, (batch, rounds, bar) in (QUICK if quick else MODELS).items():
        images, tokens = inputs(variant, batch)
        ours = Ours.of(config(variant, batch), images, tokens)
        losses = {OURS: float(ours.step())}
        make = functools.partial(theirs, bundle=ours.bundle, folder=folder / variant, images=images, tokens=tokens)
        made, gaps = peers.available(make, (PEER, COMPILED))
        for who, step in made.items():
            losses[who] = float(step())
            assert abs(losses[who] / losses[OURS] - 1) <= CLOSE, f"{variant}: first losses {losses}"
        jobs = {OURS: ours.step} | made
        taken = in_turns({who: lambda step=step: float(step()) for who, step in jobs.items()}, rounds)
        name = f"a step of {variant}, batch {batch}"
        yield Row(name, {who: taken[who] for who in taken if who != COMPILED}, bar=bar, gaps=gaps)
        if COMPILED in taken:
            yield Row(f"{name}, compiled", {who: taken[who] for who in (OURS, COMPILED)})
        del jobs, made, make, ours
        gc.collect()
    yield from _cut(quick)


def _cut(quick: bool) -> Iterator[Row]:
    """Yields rows of ViT-B-32 with captions of which the longest is so long, beside texts of the whole context."""
    lengths = ";".join(map(str, CAPTION_LENGTHS))
    images, _ = inputs("ViT-B-32", 32)
    for longest in CAPTION_LENGTHS[:1] if quick else (*CAPTION_LENGTHS, 77):
        tokens = captions(32, longest)
        cut = Ours.of(config("ViT-B-32", 32, caption_lengths=lengths), images, tokens)
        whole = Ours.of(config("ViT-B-32", 32), images, tokens)
        jobs = {OURS: lambda cut=cut: float(cut.step()), WHOLE: lambda whole=whole: float(whole.step())}
        note = f"model.caption_lengths={lengths!r}"
        yield Row(f"a step of ViT-B-32, captions of at most {longest}", in_turns(jobs, 2 if quick else 5), note=note)


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


def theirs(
    who: str, bundle: "Bundle", folder: Path, images: np.ndarray, tokens: np.ndarray, device: str = "cpu"
) -> Callable[[], "torch.Tensor"]:
    """Returns OpenCLIP's step: its model, its loss, and AdamW in the two groups of its training script; on a GPU in
    its `amp_bf16`.

    Raises:
        peers.Gap: it is not installed.
    """
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
    pixels = torch.from_numpy(((np.float32(images) / 255 - mean) / deviation).transpose(0, 3, 1, 2).copy()).to(device)
    ids, loss_of = torch.from_numpy(tokens.astype(np.int64)).to(device), package.loss.ClipLoss()
    called = torch.compile(model) if who == COMPILED else model
    low = torch.autocast(device, dtype=torch.bfloat16, enabled=device != "cpu")

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with low:
            loss = loss_of(**{name: x for name, x in called(pixels, ids).items() if name != "logit_bias"})
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        return loss.detach()

    return step
