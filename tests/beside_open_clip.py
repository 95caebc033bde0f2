"""One training, twice: ours, and OpenCLIP's by its own code, from the same weights on the same batches.

Ours is a run's own program: weights in OpenCLIP's format are what it starts from, its pipeline reads the scans of the
quickstart. Theirs is `open_clip.create_model`, `create_loss`, `cosine_lr` and `train_one_epoch` as they are. Two things
of its script cannot be called, and are built here as there: which parameters decay, and AdamW with two groups of them.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.stats
from open_clip_models import as_images, one_thread
from oracles import open_clip, require, torchvision

from clip_jax import pretrained, sharding
from clip_jax.architecture import Architecture, ResNetTower
from clip_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig
from clip_jax.data.pipeline import training_batches, training_pairs
from clip_jax.data.sources import Source, open_source, open_training_source
from clip_jax.evaluation.on_mesh import OnMesh
from clip_jax.evaluation.tasks import TASKS
from clip_jax.models.clip import Definition, l2_normalise, normalise_pixels
from clip_jax.models.variants import VARIANTS
from clip_jax.tokenizer import make
from clip_jax.training.program import assemble
from clip_jax.typing import Batch
from clip_jax.weights import open_clip as converter
from clip_jax.weights.bundle import Bundle
from clip_jax.weights.mapping import flatten, import_tensors

STEPS = 200
BATCHES = {"ViT": 128, "ResNet": 64}  # pairs
LAST = 10  # steps whose mean is the final loss
TEST, TESTED = "tfds:captioned_digits:test", 355  # scans that were held out
VIT = VARIANTS["ViT-W64/4@16px"]
RESNET = dataclasses.replace(VIT, image=ResNetTower(64, width=8, depths=(1, 2, 1, 1), num_heads=4))
ARCHITECTURES = {"ViT": VIT, "ResNet": RESNET}
PRECISIONS = {"float64": "fp32", "float32": "fp32", "bfloat16": "amp_bf16"}  # OpenCLIP's words, by ours


class Bar(NamedTuple):
    """How far losses may be apart, as a share, and in how many first steps."""

    loss: float
    steps: int


# Batch norm amplifies rounding: in float32 it shows after some steps, whoever computes.
BARS = {
    ("ViT", "float64"): Bar(1e-6, 50),
    ("ResNet", "float64"): Bar(1e-6, 50),
    ("ViT", "float32"): Bar(1e-3, 50),
    ("ResNet", "float32"): Bar(1e-3, 10),
}


class Start(NamedTuple):
    """What both begin with."""

    architecture: Architecture
    config: Config  # its `init_from` is a folder in OpenCLIP's format
    batches: list[Batch]  # of all steps, on the host
    test: Source | None  # what is held out; None: nothing is measured by it


class Trained(NamedTuple):
    """What a training has come to."""

    losses: np.ndarray  # float64 [steps], before each update
    rates: np.ndarray  # float64 [steps], the learning rate of each update
    accuracy: float  # zero-shot top-1 on the scans that were held out, a share; NaN: not measured
    weights: dict[str, np.ndarray]  # parameters and statistics, by our paths

    @property
    def final_loss(self) -> float:
        return float(self.losses[-LAST:].mean())


class Interval(NamedTuple):
    """Values from `middle - margin` to `middle + margin`."""

    middle: float
    margin: float

    def has(self, value: float) -> bool:
        return abs(value - self.middle) <= self.margin + 1e-12  # one image is one image, however divided


def apart(found: Trained, expected: Trained) -> np.ndarray:
    """Returns how far the losses of each step are apart, as a share: float64 [steps]."""
    return np.abs(found.losses - expected.losses) / expected.losses


def noise(figures: Sequence[float], *, least: float = 0.0) -> Interval:
    """Returns where the figure of one more training of the same kind lies with 95 %: a prediction interval by Student's
    t, at least `least` to either side."""
    n = len(figures)
    margin = scipy.stats.t.ppf(0.975, n - 1) * np.std(figures, ddof=1) * (1 + 1 / n) ** 0.5
    return Interval(float(np.mean(figures)), max(float(margin), least))


def ends_by_rounding(trainings: Sequence[Trained]) -> tuple[Interval, Interval]:
    """Returns where final loss and accuracy of one more training lie that differs from these by rounding only.

    At least to either side: of the loss one unit in the last place of float32 a step, for the order of rows changes
    only some of the sums; of the accuracy one image.
    """
    losses = [x.final_loss for x in trainings]
    least = STEPS * float(np.finfo(np.float32).eps) * max(losses)
    return noise(losses, least=least), noise([x.accuracy for x in trainings], least=1 / TESTED)


def start(tower: str, folder: Path, data_dir: Path, *, steps: int = STEPS) -> Start:
    """Returns a run's beginning: weights are drawn and written to the folder, the run's batches are read."""
    arch = ARCHITECTURES[tower]
    weights = jax.device_get(Definition(arch).init(jax.random.key(0)))
    converter.write(folder, Bundle(arch, flatten(weights), tower, "drawn"))
    config = Config(
        model=ModelConfig(variant=None),
        data=DataConfig(data_dir=str(data_dir), global_batch=BATCHES[tower], crop_scale=(1.0, 1.0)),
        optim=OptimConfig(learning_rate=1e-3, warmup="20 steps", weight_decay=0.2),
        init_from=str(folder),
        duration=f"{STEPS} steps",
    )
    source = open_training_source(config.data)
    pairs = training_pairs(config, arch, None, source, rows=range(config.data.global_batch))
    host = iter(training_batches(pairs, num_threads=1, num_workers=0))
    test = open_source(TEST, data_dir=str(data_dir), default_split="test", needs=("image", "label"))
    return Start(arch, config, [next(host).batch for _ in range(steps)], test)


def in_another_order(batches: Sequence[Batch], seed: int) -> list[Batch]:
    """Returns the batches with their rows in another order: but for rounding, the same training."""
    random = np.random.default_rng(seed)
    orders = [random.permutation(len(batch.valid)) for batch in batches]
    return [Batch(*(x[order] for x in batch)) for batch, order in zip(batches, orders, strict=True)]


def ours(begun: Start, dtype: str, batches: Iterable[Batch] | None = None) -> Trained:
    """Returns what a run's program makes of the batches; None: of those it begins with, as they are."""
    config = dataclasses.replace(begun.config, model=dataclasses.replace(begun.config.model, compute_dtype=dtype))
    with jax.enable_x64(dtype == "float64"):
        initial = pretrained.initial(config)
        program = assemble(config, jax.devices()[:1], arch=initial.architecture)
        state, logged = program.initial_state(initial.arrays), []
        for batch in begun.batches if batches is None else batches:
            state, metrics = program.train_step(state, sharding.to_mesh(batch, len(batch.valid), program.mesh))
            logged.append((metrics["loss"], metrics["learning_rate"]))
        tokenizer = make(program.architecture.tokenize, None)
        model = OnMesh(program.definition, program.mesh, tokenizer, name=program.variant, pretrained="ours")
        model.weights = state.averaged
        losses, rates = np.array(jax.device_get(logged), np.float64).T
        return Trained(losses, rates, _accuracy(model, begun.test), jax.device_get(flatten(state.weights)))


@one_thread()
def theirs(begun: Start, dtype: str, batches: Iterable[Batch] | None = None) -> Trained:
    """Returns what OpenCLIP makes of the same."""
    torch, peer = require("torch"), open_clip()
    training, scheduler = (
        require("open_clip_train.train", package="open_clip_torch"),
        require("open_clip_train.scheduler", package="open_clip_torch"),
    )
    args, optim = _arguments(begun.config, PRECISIONS[dtype]), begun.config.optim
    model = peer.create_model(f"local-dir:{begun.config.init_from}", precision=args.precision, output_dict=True)
    model = model.double() if dtype == "float64" else model
    optimizer = _optimizer(model, args)
    warmup = begun.config.steps(None).warmup
    adjust, rates, losses = scheduler.cosine_lr(optimizer, optim.learning_rate, warmup, STEPS), [], []
    criterion = peer.create_loss(args)
    criterion.register_forward_hook(lambda _, __, output: losses.append(output["contrastive_loss"].item()))
    data = _Loader(begun.batches if batches is None else batches, model, torch.float64 if dtype == "float64" else None)

    def schedule(step: int) -> None:
        rates.append(adjust(step))

    training.train_one_epoch(model, {"train": data}, criterion, 0, optimizer, None, schedule, None, args)
    encoder = _Encoder(model.eval(), begun.architecture, training.get_autocast(args.precision, device_type="cpu"))
    weights = _by_our_paths(model, begun.architecture)
    return Trained(np.array(losses), np.array(rates), _accuracy(encoder, begun.test), weights)


def _arguments(config: Config, precision: str) -> Any:
    """Returns the arguments of OpenCLIP's script that say what the config says; the rest are its defaults."""
    optim = config.optim
    said = {
        "precision": precision,
        "device": "cpu",
        "batch-size": config.data.global_batch,
        "lr": optim.learning_rate,
        "beta1": optim.b1,
        "beta2": optim.b2,
        "eps": optim.eps,
        "wd": optim.weight_decay,
    }
    args = require("open_clip_train.params", package="open_clip_torch").parse_args(
        [word for name, x in said.items() for word in (f"--{name}", f"{x}")]
    )
    require("open_clip_train.distributed", package="open_clip_torch").init_distributed_device(args)
    args.distill = args.wandb = False  # its script adds these
    return args


def _optimizer(model: Any, args: Any) -> Any:
    """Returns what OpenCLIP's script makes inline: AdamW with two groups, of which one decays."""
    fixed = ("bn", "ln", "bias", "logit_scale")
    groups: dict[float, list] = {0.0: [], args.wd: []}
    for name, parameter in model.named_parameters():
        decays = parameter.ndim >= 2 and not any(word in name for word in fixed)
        groups[args.wd if decays else 0.0].append(parameter)
    return require("torch").optim.AdamW(
        [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()],
        lr=args.lr,
        betas=(args.beta1, args.beta2),
        eps=args.eps,
    )


class _Loader:
    """The batches, as OpenCLIP's loop asks for its data: pixels normalised by torchvision, in the dtype of the run."""

    def __init__(self, batches: Iterable[Batch], model: Any, dtype: Any):
        self._batches, self._dtype = batches, dtype
        self._normalise = torchvision().transforms.Normalize(model.visual.image_mean, model.visual.image_std)
        self.dataloader, self.num_batches, self.num_samples = self, STEPS, STEPS

    def set_epoch(self, epoch: int) -> None:
        pass

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        torch = require("torch")
        for batch in self._batches:
            pixels = as_images(batch.image).to(self._dtype or torch.float32) / 255
            yield self._normalise(pixels), torch.from_numpy(batch.tokens.astype(np.int64))


class _Encoder(OnMesh):
    """OpenCLIP's model, as our evaluation asks for one."""

    def __init__(self, model: Any, architecture: Architecture, autocast: Callable[[], AbstractContextManager]):
        tokenizer, mesh = make(architecture.tokenize, None), sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        super().__init__(Definition(architecture), mesh, tokenizer, name="OpenCLIP's", pretrained="OpenCLIP's")
        self._model, self._autocast, self._dtype = model, autocast, model.logit_scale.dtype

    def scale(self) -> np.ndarray:
        return np.exp(self._model.logit_scale.detach().numpy())

    def encode_image(self, image_bHWC: np.ndarray, feature: str = "embedding") -> jax.Array:
        pixels_BHWC = normalise_pixels(image_bHWC, self.architecture.preprocess)
        return self._encoded(self._model.encode_image, as_images(pixels_BHWC).to(self._dtype))

    def encode_text(self, tokens_BL: np.ndarray) -> jax.Array:
        return self._encoded(self._model.encode_text, require("torch").from_numpy(tokens_BL.astype(np.int64)))

    def text_lengths(self, tokens_BL: np.ndarray) -> np.ndarray:
        return np.full(len(tokens_BL), tokens_BL.shape[1])

    def _encoded(self, encode: Callable[[Any], Any], x: Any) -> jax.Array:
        with require("torch").no_grad(), self._autocast():
            return self.everywhere(np.asarray(l2_normalise(encode(x).float().numpy())))


def _accuracy(model: OnMesh, test: Source | None) -> float:
    return math.nan if test is None else TASKS["zeroshot_classification"].run(model, test, shows=False).metrics["acc1"]


def _by_our_paths(model: Any, arch: Architecture) -> dict[str, np.ndarray]:
    """Returns parameters and statistics of OpenCLIP's model by our paths."""
    tensors = {name: x.detach().numpy() for name, x in model.state_dict().items()}
    rules = converter.rules_of(arch, custom_text=False)
    return dict(import_tensors(rules, tensors, flatten(Definition(arch).shapes())))
