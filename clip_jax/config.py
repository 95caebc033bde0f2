"""The dataclasses of a whole run, and their validation: one owner per knob, no hidden defaults.

`configs/*.py` return a `Config`; flags change its fields (`--config.optim.learning_rate=1e-3`), and a workdir's
`config.json` keeps it. How its rules come to hold then is told in `checked.py`.
"""

import dataclasses
import math
import re
from typing import NamedTuple

from clip_jax import durations
from clip_jax.architecture import Lora
from clip_jax.checked import Checked, leaves, require, require_one_of
from clip_jax.errors import UserError

COMPUTE_DTYPES = ("float32", "bfloat16", "float64")
REMAT_POLICIES = ("none", "full", "dots", "attention")
ATTENTION = ("auto", "xla", "cudnn")
MAX_IMAGE_PIXELS = 89_478_485
LOSS_FORMS = ("auto", "dense", "ring")
OPTIMIZERS = ("adamw", "lion", "adafactor", "muon")
WITH_EPS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "rsqrt", "constant")

_FACTOR = r"\d+(\.\d*)?(e[+-]?\d+)?|\.\d+(e[+-]?\d+)?"


@dataclasses.dataclass
class ModelConfig(Checked):
    """Which architecture, and how it is computed."""

    variant: str | None = "ViT-B/32"  # a name in clip_jax/models/variants.py; None: whatever init_from has
    image_size: int | None = None  # None: the variant's own; init_from's position embeddings are resized
    context_length: int | None = None  # None: the variant's own
    tokenizer: str | None = None  # a tokenizer.json, for a variant whose tokenizer is in a file; the run keeps a copy
    # Or bfloat16; parameters are float32 all the same. float64 is for proofs, and they are, too: JAX_ENABLE_X64=true.
    compute_dtype: str = "float32"
    # What the backward pass computes again: nothing (none), all but products with weights (dots), all but attention's
    # results and the norms' statistics (attention), all (full).
    remat: str = "none"
    attention: str = "auto"  # whose kernels compute it; auto: cuDNN's on a GPU where they accept, XLA's elsewhere
    patch_dropout: float = 0.0  # share of an image's patches that a ViT does not see in training (arXiv 2212.00794)
    # Such as "24;48": a step computes texts up to the first that holds the longest caption of its batch, with the same
    # result; each is compiled. None: up to the context length.
    caption_lengths: str | None = None
    logit_bias: bool | None = None  # trained by the sigmoid loss with a bias, not by softmax; None: as the variant was
    lora_rank: int | None = None  # of adapters in all blocks, which alone are trained (arXiv 2106.09685); None: without
    lora_alpha: float = 16.0  # what they add is alpha / rank times their product

    @property
    def lora(self) -> Lora | None:
        """Returns the adapters that are trained."""
        return None if self.lora_rank is None else Lora(self.lora_rank, self.lora_alpha)

    def compiled_lengths(self) -> list[int]:
        """Returns the numbers of `caption_lengths`.

        Raises:
            UserError: they are not written so.
        """
        words = [] if self.caption_lengths is None else [word.strip() for word in self.caption_lengths.split(";")]
        require(
            all(re.fullmatch(r"[1-9]\d{0,5}", word) for word in words),
            f"model.caption_lengths={self.caption_lengths!r} should be numbers of tokens, such as '24;48'",
        )
        return [int(word) for word in words]

    def check(self) -> None:
        words = (("compute_dtype", COMPUTE_DTYPES), ("remat", REMAT_POLICIES), ("attention", ATTENTION))
        for name, known in words:
            require_one_of(f"model.{name}", getattr(self, name), known)
        lengths = self.compiled_lengths()
        require(
            lengths == sorted(set(lengths)),
            f"model.caption_lengths={self.caption_lengths!r} must rise from each to the next",
        )
        require(0 <= self.patch_dropout < 1, f"model.patch_dropout={self.patch_dropout} must be in [0, 1)")
        require(
            self.lora_rank is None or self.lora_rank > 0,
            f"model.lora_rank={self.lora_rank} must be at least 1, or None: no adapters",
        )
        require(0 < self.lora_alpha < math.inf, f"model.lora_alpha={self.lora_alpha} must be positive and finite")
        require(
            self.lora_rank is not None or self.lora_alpha == ModelConfig.lora_alpha,
            f"model.lora_alpha={self.lora_alpha} is of adapters, and without model.lora_rank there are none; set "
            "model.lora_rank, or leave model.lora_alpha out",
        )


@dataclasses.dataclass
class LossConfig(Checked):
    """In which form the loss is computed; which loss it is, the model's `logit_bias` says."""

    form: str = "auto"  # dense: all logits at once; ring: in tiles, around the devices; auto: see losses.ring_for
    tile: int | None = None  # rows and columns of logits at once in the ring; None: at most 1024, of equal size

    def check(self) -> None:
        require_one_of("loss.form", self.form, LOSS_FORMS)
        require(self.tile is None or self.tile > 0, f"loss.tile={self.tile} must be at least 1, or None")
        require(self.tile is None or self.form != "dense", f"loss.tile={self.tile}: the dense form has no tiles")


@dataclasses.dataclass
class DataConfig(Checked):
    """Where pairs come from, and what is done to them on the host."""

    # tfds:NAME[:SPLIT], wds:TARS, folder:DIR, csv:FILE, "3 * wds:… + 1 * tfds:…"; None: you have to name it
    train: str | None = "tfds:captioned_digits:train"
    image_keys: str | None = None  # such as "jpg;png", the first that a record has; None: by the kind of source
    caption_keys: str | None = None  # such as "txt;json.alt", of which one is drawn; None: by the kind of source
    data_dir: str | None = None  # where TFDS keeps its data sets; None: TFDS's own choice (~/tensorflow_datasets)
    global_batch: int = 256  # pairs a step, over all devices of all hosts
    crop_scale: tuple[float, float] = (0.9, 1.0)  # share of the area that a random crop keeps, where the shape allows
    crop_ratio: tuple[float, float] = (1.0, 1.0)  # of the crop's width to its height; OpenCLIP has (0.75, 1.3333)
    flip: bool = False  # left to right, every other time; what is written in a picture is then mirrored
    color_jitter: tuple[float, float, float, float] | None = None  # ± brightness, contrast, saturation; hue
    min_image_size: int = 8  # pixels of the shorter side: trackers and separators are no pictures
    max_image_pixels: int = MAX_IMAGE_PIXELS  # PIL warns of larger ones
    bad_limit: float = 0.05  # of the last 10,000 pairs; a run of which more cannot be read stops
    accept_changes: bool = False  # go on though the data is not what the run was reading
    num_threads: int = 2  # that read and decode; of each worker, where there are workers
    num_workers: int | None = None  # processes beside the training process, on each host; None: as many as it takes

    def check(self) -> None:
        require(self.global_batch > 0, f"data.global_batch={self.global_batch} must be at least 1")
        low, high = self.crop_scale
        require(0 < low <= high <= 1, f"data.crop_scale={self.crop_scale} must be two shares, 0 < low <= high <= 1")
        low, high = self.crop_ratio
        require(0 < low <= high, f"data.crop_ratio={self.crop_ratio} must be two ratios, 0 < low <= high")
        if self.color_jitter is not None:
            *factors, hue = self.color_jitter
            require(
                min(factors) >= 0 and 0 <= hue <= 0.5,
                f"data.color_jitter={self.color_jitter} must not be negative, and its last, of the hue, at most 0.5",
            )
        require(self.min_image_size > 0, f"data.min_image_size={self.min_image_size} must be at least 1")
        require(
            0 < self.max_image_pixels <= MAX_IMAGE_PIXELS,
            f"data.max_image_pixels={self.max_image_pixels} must be in [1, {MAX_IMAGE_PIXELS:,}], which is PIL's limit",
        )
        require(0 < self.bad_limit <= 1, f"data.bad_limit={self.bad_limit} must be a share in (0, 1]")
        require(self.num_threads > 0, f"data.num_threads={self.num_threads} must be at least 1")
        require(
            self.num_workers is None or self.num_workers >= 0,
            f"data.num_workers={self.num_workers} must not be negative",
        )


@dataclasses.dataclass
class OptimConfig(Checked):
    """How parameters are trained, and which; the defaults are the CLIP paper's ViT's (tables 18, 20).

    Patterns are regular expressions for the whole path of a parameter, several with ";" between them.
    """

    optimizer: str = "adamw"  # or lion, adafactor (big_vision's), muon
    learning_rate: float = 5e-4  # at the end of the warm-up
    schedule: str = "cosine"  # or linear, both to 0 at the end of the run; rsqrt: 1/√step; constant
    warmup: str = "2000 steps"  # or examples, or epochs; in a line from 0
    cooldown: str = "0 steps"  # in a line to 0 at the end of a schedule that does not go there by itself
    weight_decay: float = 0.2  # decoupled, times the learning rate; on what clip_jax/optim/parameters.py says
    b1: float = 0.9
    b2: float = 0.98  # of Adafactor the upper limit
    eps: float = 1e-6  # AdamW's, and that of Muon's Adam
    clip_norm: float | None = None  # of the gradient of all that is trained; None: not clipped
    ema: float | None = None  # of the weights: so much of their moving averages stays at a step; None: there are none
    layer_decay: float | None = None  # of the learning rate, from each layer of a tower to the one before it
    factors: str | None = None  # of the learning rate, by pattern: "image/.*=0.1;logit_scale=0.5"
    frozen: str | None = None  # patterns of what is not trained: "image/.*;text/token_embedding"
    lock_image: int | None = None  # all but this many last groups of the image tower are not trained; None: all are
    lock_text: int | None = None  # and of the text tower; OpenCLIP's groups: see docs/training.md

    def check(self) -> None:
        require_one_of("optim.optimizer", self.optimizer, OPTIMIZERS)
        require_one_of("optim.schedule", self.schedule, SCHEDULES)
        require(
            0 < self.learning_rate < math.inf, f"optim.learning_rate={self.learning_rate} must be positive and finite"
        )
        warmup, _ = durations.parse(self.warmup, "optim.warmup")
        cooldown, _ = durations.parse(self.cooldown, "optim.cooldown")
        require(
            warmup > 0 or self.schedule != "rsqrt",
            f"optim.warmup={self.warmup!r}: the schedule rsqrt falls as fast as its warm-up is long; give it one",
        )
        require(
            cooldown == 0 or self.schedule in ("rsqrt", "constant"),
            f"optim.cooldown={self.cooldown!r}: the schedule {self.schedule} ends at 0 by itself; leave the cool-down "
            f"out, or let optim.schedule be rsqrt or constant",
        )
        require(
            0 <= self.weight_decay < math.inf, f"optim.weight_decay={self.weight_decay} must be finite and not negative"
        )
        require(0 <= self.b1 < 1 and 0 <= self.b2 < 1, f"optim.b1={self.b1} and optim.b2={self.b2} must be in [0, 1)")
        require(0 < self.eps < math.inf, f"optim.eps={self.eps} must be positive and finite")
        require(
            self.optimizer in WITH_EPS or self.eps == OptimConfig.eps,
            f"optim.eps={self.eps}: {self.optimizer} has none; leave it out, or let optim.optimizer be "
            f"{' or '.join(WITH_EPS)}",
        )
        require(
            self.clip_norm is None or self.clip_norm > 0, f"optim.clip_norm={self.clip_norm} must be positive, or None"
        )
        require(self.ema is None or 0 < self.ema < 1, f"optim.ema={self.ema} must be in (0, 1), or None")
        require(
            self.layer_decay is None or 0 < self.layer_decay <= 1,
            f"optim.layer_decay={self.layer_decay} must be in (0, 1], or None",
        )
        for name in ("lock_image", "lock_text"):
            locked = getattr(self, name)
            require(locked is None or locked >= 0, f"optim.{name}={locked} must not be negative")
        self.frozen_patterns(), self.factors_by_pattern()

    def frozen_patterns(self) -> list[str]:
        """Returns the patterns of `frozen`.

        Raises:
            UserError: one of them is no regular expression.
        """
        return [] if self.frozen is None else [_pattern(text, "optim.frozen") for text in self.frozen.split(";")]

    def factors_by_pattern(self) -> dict[str, float]:
        """Returns the factor of each pattern of `factors`.

        Raises:
            UserError: they are not written so, one is not positive, or a pattern is there twice.
        """
        found = {}
        for part in [] if self.factors is None else self.factors.split(";"):
            pattern, equals, number = part.rpartition("=")
            require(
                bool(equals and re.fullmatch(_FACTOR, number.strip())),
                f"optim.factors: {part!r} is no factor: write 'image/.*=0.1', with ';' between several",
            )
            pattern, factor = _pattern(pattern, "optim.factors"), float(number)
            require(factor > 0, f"optim.factors: {part!r} must be positive; name what is not to move in optim.frozen")
            require(pattern not in found, f"optim.factors: {pattern!r} is there twice")
            found[pattern] = factor
        return found


def _pattern(text: str, name: str) -> str:
    """Returns a regular expression without the blanks around it."""
    text = text.strip()
    require(bool(text), f"{name} has an empty pattern; patterns have one ';' between them")
    try:
        re.compile(text)
    except re.error as error:
        raise UserError(f"{name}: {text!r} is no regular expression: {error}") from error
    return text


@dataclasses.dataclass
class MeshConfig(Checked):
    """How many devices each mesh axis has; at most one may be -1: all that are left."""

    data: int = -1  # replicas of the parameters
    fsdp: int = 1  # parameters and batch are split
    tensor: int = 1  # heads and MLP are split

    def check(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        require(
            all(s == -1 or s > 0 for s in sizes),
            f"mesh (data, fsdp, tensor) = {sizes} must be positive, or -1: what is left",
        )
        require(sizes.count(-1) <= 1, f"mesh (data, fsdp, tensor) = {sizes}: only one may be -1")


@dataclasses.dataclass
class EvaluationConfig(Checked):
    """What a run is measured by while it trains, on all devices; by its moving averages, where it has them."""

    tasks: str | None = None  # "zeroshot_classification=tfds:captioned_digits:test"; several with ";" between them
    every: int = 1000  # steps, and after the last one

    def check(self) -> None:
        require(self.every > 0, f"evaluation.every={self.every} must be at least 1")
        for task, spec in self.measures():
            require(
                bool(task and spec),
                f"evaluation.tasks={self.tasks!r} should be TASK=DATASET, such as "
                "zeroshot_classification=tfds:captioned_digits:test, several with ; between them",
            )

    def measures(self) -> list[tuple[str, str]]:
        """Returns (task, data set) of all that is measured."""
        parts = [part.partition("=") for part in (self.tasks or "").split(";") if part.strip()]
        return [(task.strip(), spec.strip()) for task, _, spec in parts]


@dataclasses.dataclass
class Config(Checked):
    """A whole run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    init_from: str | None = None  # weights to start from: all that clip_jax.load takes; None: drawn
    microbatch: int | None = None  # pairs, over all devices, whose activations are held at once; None: global_batch
    seed: int = 0  # of the parameters, the order of the data and its augmentation
    duration: str = "10_000 steps"  # or "400M examples", "32 epochs"
    log_every: int = 10  # steps
    checkpoint_every: int = 1000  # steps; the last step is always kept
    checkpoint_minutes: float | None = None  # or when so many have gone by, looked at when something is logged
    keep_checkpoints: int = 2  # the latest n stay
    keep_every: int | None = None  # steps; the checkpoints of its multiples stay for ever
    keep_best: str | None = None  # a metric of evaluation.tasks, "DATASET_SPLIT_TASK/acc1": where it is highest stays
    skip_limit: int = 20  # updates in a row that may be skipped, because something was not finite; then the run stops
    wandb: str | None = None  # the project of Weights & Biases to which the metrics go, too; None: not used

    def check(self) -> None:
        require(0 <= self.seed < 2**32, f"seed={self.seed} must be in [0, 2**32)")
        for name in ("log_every", "checkpoint_every", "keep_checkpoints", "skip_limit"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("checkpoint_minutes", "keep_every"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value} must be positive, or None")
        if self.keep_every is not None and (over := self.keep_every % self.checkpoint_every):
            below = self.keep_every - over
            nearest_ones = [n for n in (below, below + self.checkpoint_every) if n]
            raise UserError(
                f"keep_every={self.keep_every} is no multiple of checkpoint_every={self.checkpoint_every}, when "
                f"checkpoints are written; the nearest that are: {', '.join(map(str, nearest_ones))}"
            )
        require(self.microbatch is None or self.microbatch > 0, f"microbatch={self.microbatch} must be at least 1")
        require(
            self.wandb is None or re.fullmatch(r"[^/\\#?%:]{1,128}", self.wandb) is not None,
            f"wandb={self.wandb!r} must be the name of a project: 128 letters at most, and none of / \\ # ? % :",
        )
        require(
            self.init_from is not None or self.model.variant is not None,
            "model.variant=None is for a run whose init_from says what its model is; set one of the two",
        )
        require(
            self.optim.ema is None or self.model.lora_rank is None,
            f"optim.ema={self.optim.ema} averages weights, and with model.lora_rank={self.model.lora_rank} adapters "
            "alone are trained, whose averaged product is not the product of their averages; leave one of the two out",
        )
        require(
            self.init_from is not None or self.model.lora_rank is None,
            f"model.lora_rank={self.model.lora_rank} trains adapters beside weights that stay as they are; set "
            "init_from to the weights",
        )
        lengths = (self.duration, self.optim.warmup, self.optim.cooldown)
        if not any(durations.parse(text, "")[1] == "epoch" for text in lengths):
            self.steps(None)

    def steps(self, records: int | None) -> "Steps":
        """Returns how long the run is on so many records.

        Raises:
            UserError: a duration that is none, or a warm-up and a cool-down that do not fit into the run.
        """
        optim = self.optim
        written = {"duration": self.duration, "optim.warmup": optim.warmup, "optim.cooldown": optim.cooldown}
        total, warmup, cooldown = (
            durations.steps(text, name, global_batch=self.data.global_batch, records=records)
            for name, text in written.items()
        )
        require(total > 0, f"duration={self.duration!r} must be one step at least")
        run = f"duration={self.duration!r} ({total:,} steps)"
        require(
            warmup < total,
            f"optim.warmup={optim.warmup!r} ({warmup:,} steps) leaves nothing of {run}; shorten the warm-up or "
            f"lengthen the run",
        )
        require(
            warmup + cooldown <= total,
            f"optim.warmup={optim.warmup!r} and optim.cooldown={optim.cooldown!r} ({warmup:,} and {cooldown:,} steps) "
            f"are longer than {run}; shorten them or lengthen the run",
        )
        return Steps(total, warmup, cooldown)


class Steps(NamedTuple):
    """How long a run is."""

    total: int
    warmup: int
    cooldown: int = 0


# What may differ when a run is resumed: nothing here changes what is computed, only where, and what is said of it.
FREE_ON_RESUME = (
    "mesh",
    "loss",
    "microbatch",  # but not a ResNet's: batch norm sees each part by itself
    "log_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_checkpoints",
    "keep_every",
    "keep_best",
    "evaluation",
    "skip_limit",
    "wandb",
    "data.train",  # where it lies; what it holds may not, unless the next says so
    "data.accept_changes",
    "data.bad_limit",
    "data.data_dir",
    "data.num_threads",
    "data.num_workers",
    "model.remat",
    "model.attention",
    "model.caption_lengths",
    "model.tokenizer",  # what is in it may not
)


def differences(was: Config, now: Config) -> list[str]:
    """Returns "path: old -> new" for every field that a resumed run may not change, and which did."""
    new = {path: value for path, _, value in leaves(now)}
    return [
        f"{path}: {old!r} -> {new[path]!r}"
        for path, _, old in leaves(was)
        if old != new[path] and not any(path == free or path.startswith(free + ".") for free in FREE_ON_RESUME)
    ]
