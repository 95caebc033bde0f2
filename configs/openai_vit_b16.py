"""ViT-B/16, as in OpenAI's paper (arXiv 2103.00020, section 2.5 and tables 18 and 20).

    python train.py --config=configs/openai_vit_b16.py --workdir=/shared/openai_vit_b16 \\
        --config.data.train=wds:FOLDER_OF_TARS

Data: OpenAI's 400 million pairs are not public; name your own, at best as many. 32 epochs of 400 million are
390,625 steps of 32,768.
Plan: python -m clip_jax.planning --config=configs/openai_vit_b16.py --topology=v5e:16x16
Hardware: a TPU v5e pod of 256 chips, v5e:16x16.
Time: see the table in docs/scaling.md.
Result: 68.3 % on ImageNet, zero-shot, is what OpenAI's weights reach on their data. Not run here.
"""

from clip_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(variant="ViT-B/16", compute_dtype="bfloat16", remat="attention"),
        data=DataConfig(train=None, global_batch=32_768),
        optim=OptimConfig(learning_rate=5e-4, warmup="2000 steps", weight_decay=0.2),
        mesh=MeshConfig(data=16, fsdp=16),
        duration="390_625 steps",
        log_every=100,
        checkpoint_every=1000,
    )
