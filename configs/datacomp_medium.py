"""DataComp's medium scale (arXiv 2304.14108): ViT-B/32, 128 million pairs seen.

    python train.py --config=configs/datacomp_medium.py --workdir=/shared/datacomp_medium \\
        --config.data.train=wds:FOLDER_OF_TARS

Data: the pool of the medium scale, filtered (the competition is about how), as its downloader writes it.
Plan: python -m clip_jax.planning --config=configs/datacomp_medium.py --topology=v5e:2x4
Hardware: 8 TPU v5e chips, v5e:2x4.
Time: see the table in docs/scaling.md.
Result: 29.7 % on ImageNet, zero-shot, is the best baseline of the paper. Not run here.
"""

from clip_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        # OpenCLIP's name: GELU. OpenAI's ViT-B/32 is the same with QuickGELU.
        model=ModelConfig(variant="ViT-B-32", compute_dtype="bfloat16", remat="attention"),
        data=DataConfig(train=None, global_batch=4096),
        optim=OptimConfig(learning_rate=5e-4, warmup="500 steps", weight_decay=0.2),
        mesh=MeshConfig(data=8),
        duration="31_250 steps",
        log_every=50,
        checkpoint_every=1000,
    )
