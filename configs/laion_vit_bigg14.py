"""ViT-bigG/14 at batch 163,840, as LAION trained it on 34 billion pairs of LAION-2B.

    python train.py --config=configs/laion_vit_bigg14.py --workdir=/shared/laion_vit_bigg14 \\
        --config.data.train=wds:FOLDER_OF_TARS

Data: LAION-2B's English pairs, or your own; 34 billion pairs are 207,520 steps of 163,840.
Plan: python -m clip_jax.planning --config=configs/laion_vit_bigg14.py --topology=v5p:8x8x8
Hardware: 512 TPU v5p chips, v5p:8x8x8.
Time: see the table in docs/scaling.md.
Result: 80.1 % on ImageNet, zero-shot, is what LAION's weights reach. Half of the patches were left out for most of
their run, and none at its end. Not run here.
"""

from clip_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(variant="ViT-bigG-14", compute_dtype="bfloat16", remat="attention", patch_dropout=0.5),
        data=DataConfig(train=None, global_batch=163_840),
        optim=OptimConfig(learning_rate=2e-3, warmup="13_000 steps", weight_decay=0.2, b2=0.95),
        mesh=MeshConfig(data=16, fsdp=32),
        duration="207_520 steps",
        log_every=100,
        checkpoint_every=200,
    )
