"""RN50, as in OpenAI's paper (arXiv 2103.00020, section 2.5 and tables 18 and 19).

    python train.py --config=configs/openai_rn50.py --workdir=/shared/openai_rn50 \\
        --config.data.train=wds:FOLDER_OF_TARS

Data: OpenAI's 400 million pairs are not public; name your own, at best as many. 32 epochs of 400 million are
390,625 steps of 32,768.
Plan: python -m clip_jax.planning --config=configs/openai_rn50.py --topology=v5e:16x16
Hardware: a TPU v5e pod of 256 chips, v5e:16x16.
Time: see the table in docs/scaling.md.
Result: 59.8 % on ImageNet, zero-shot, is what OpenAI's weights reach on their data. Not run here.
"""

from clip_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(variant="RN50", compute_dtype="bfloat16"),
        data=DataConfig(train=None, global_batch=32_768),
        optim=OptimConfig(learning_rate=5e-4, warmup="2000 steps", weight_decay=0.2, b2=0.999, eps=1e-8),
        mesh=MeshConfig(data=256),
        duration="390_625 steps",
        log_every=100,
        checkpoint_every=2000,
    )
