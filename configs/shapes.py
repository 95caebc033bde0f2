"""A small CLIP on drawn scenes, then retrieval over compositions it has never seen.

    python train.py --config=configs/shapes.py --workdir=runs/shapes

Hardware: 2 CPU cores.
"""

from clip_jax.config import Config, DataConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(variant="ViT-W96/8@40px"),
        data=DataConfig(train="tfds:captioned_shapes:train", global_batch=256, crop_scale=(0.9, 1.0)),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=50, weight_decay=0.1),
        total_steps=700,
        log_every=20,
        checkpoint_every=350,
    )
