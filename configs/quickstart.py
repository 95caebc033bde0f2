"""A small CLIP on 1,442 real scans of digits with captions, then zero-shot on scans it has never seen.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

Hardware: 2 CPU cores.
Time: about 70 s of training, 90 s with start-up.
Result: zero-shot top-1 of 97.5 % on 355 held-out scans (seed 0).
"""

from clip_jax.config import Config, DataConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(variant="ViT-W64/4@16px"),
        data=DataConfig(train="tfds:captioned_digits:train", global_batch=128, crop_scale=(0.5, 1.0)),
        optim=OptimConfig(learning_rate=2e-3, warmup="100 steps", weight_decay=0.1, clip_norm=1.0),
        duration="700 steps",
        log_every=20,
        checkpoint_every=350,
    )
