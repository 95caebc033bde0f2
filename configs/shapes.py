"""A small CLIP on drawn scenes, then retrieval over compositions it has never seen.

    python train.py --config=configs/shapes.py --workdir=runs/shapes

Hardware: 2 CPU cores.
Time: about 6 minutes.
Result: text→image recall over 576 never-seen compositions of about 95 % at 1, 100 % at 5.
"""

from clip_jax.config import Config, DataConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(variant="ViT-W96/8@40px"),
        data=DataConfig(
            train="tfds:captioned_shapes:train",
            global_batch=128,
            crop_scale=(1.0, 1.0),  # a crop would change the place and the size that the caption tells
        ),
        optim=OptimConfig(learning_rate=1.5e-3, warmup="100 steps", weight_decay=0.1, clip_norm=1.0),
        duration="1500 steps",
        log_every=20,
        checkpoint_every=500,
    )
