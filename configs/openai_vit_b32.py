"""ViT-B/32, as in OpenAI's paper (arXiv 2103.00020, section 2.5 and tables 18 and 20).

    python train.py --config=configs/openai_vit_b32.py --workdir=/shared/openai_vit_b32 \\
        --config.data.train=wds:FOLDER_OF_TARS

Data: OpenAI's 400 million pairs are not public; name your own, at best as many. 32 epochs of 400 million are
390,625 steps of 32,768.
Plan: python -m clip_jax.planning --config=configs/openai_vit_b32.py --topology=v5e:8x8
Hardware: 64 TPU v5e chips, v5e:8x8.
Time: see the table in docs/scaling.md.
Result: 63.3 % on ImageNet, zero-shot, is what OpenAI's weights reach on their data. Not run here.
"""

from clip_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(variant="ViT-B/32", compute_dtype="bfloat16", remat="attention"),
        data=DataConfig(train=None, global_batch=32_768),
        optim=OptimConfig(learning_rate=5e-4, warmup="2000 steps", weight_decay=0.2),
        mesh=MeshConfig(data=8, fsdp=8),
        duration="390_625 steps",
        log_every=100,
        checkpoint_every=1000,
    )
