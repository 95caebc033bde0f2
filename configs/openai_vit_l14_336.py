"""ViT-L/14@336px, one more epoch of ViT-L/14 with larger images, as in OpenAI's paper (arXiv 2103.00020, section 2.5).

    python train.py --config=configs/openai_vit_l14_336.py --workdir=/shared/openai_vit_l14_336 \\
        --config.data.train=wds:FOLDER_OF_TARS

Data: OpenAI's 400 million pairs are not public; name your own, at best as many. One epoch of 400 million is
12,207 steps of 32,768.
Plan: python -m clip_jax.planning --config=configs/openai_vit_l14_336.py --topology=v5e:16x16
Hardware: a TPU v5e pod of 256 chips, v5e:16x16.
Time: see the table in docs/scaling.md.
Result: 76.6 % on ImageNet, zero-shot, is what OpenAI's weights reach on their data. Not run here.

A run cannot start from other weights yet: until it can, this file plans the epoch and does not reproduce it.
"""

from clip_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(variant="ViT-L/14@336px", compute_dtype="bfloat16", remat="attention"),
        data=DataConfig(train=None, global_batch=32_768),
        optim=OptimConfig(learning_rate=2e-5, warmup="2000 steps", weight_decay=0.2),
        mesh=MeshConfig(data=16, fsdp=16),
        duration="12_207 steps",
        log_every=100,
        checkpoint_every=200,
    )
