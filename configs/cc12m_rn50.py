"""RN50 on Conceptual 12M, with what OpenCLIP trains it with on Conceptual Captions (CC3M).

    python train.py --config=configs/cc12m_rn50.py --workdir=runs/cc12m --config.data.train=wds:FOLDER_OF_TARS

Data: CC12M, of which about 11 million images can still be had, by img2dataset; 32 epochs of 11 million
are 343,750 steps of 1,024.
Plan: python -m clip_jax.planning --config=configs/cc12m_rn50.py --topology=v5e:2x4
Hardware: 8 TPU v5e chips, v5e:2x4.
Time: see the table in docs/scaling.md.
Result: 36.5 % on ImageNet, zero-shot, is what OpenCLIP reports. Not run here.
"""

from clip_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(variant="RN50", compute_dtype="bfloat16"),
        data=DataConfig(train=None, global_batch=1024),
        optim=OptimConfig(learning_rate=1e-3, warmup="10_000 steps", weight_decay=0.1, b2=0.999, eps=1e-8),
        mesh=MeshConfig(data=8),
        duration="343_750 steps",
        log_every=100,
        checkpoint_every=2500,
    )
