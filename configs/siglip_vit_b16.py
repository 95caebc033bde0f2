"""SigLIP, ViT-B/16 (arXiv 2303.15343): the sigmoid loss, a pool by attention, 64 SentencePiece tokens.

    python train.py --config=configs/siglip_vit_b16.py --workdir=/shared/siglip_vit_b16 \\
        --config.data.train=wds:FOLDER_OF_TARS --config.model.tokenizer=PATH/tokenizer.json

Data: WebLI is not public; name your own. The tokenizer.json comes out of a conversion of any SigLIP
(`convert_weights.py --format=clip_jax`).
Plan: python -m clip_jax.planning --config=configs/siglip_vit_b16.py --topology=v5e:8x8
Hardware: 64 TPU v5e chips, v5e:8x8.
Time: see the table in docs/scaling.md.
Decay: big_vision's 1e-4 is not multiplied by the learning rate; 0.1 times 1e-3 is the same.
Result: 76.0 % on ImageNet, zero-shot, is what the released weights reach after 40 billion pairs. Not run here.
"""

from clip_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(variant="ViT-B-16-SigLIP", compute_dtype="bfloat16", remat="attention"),
        data=DataConfig(train=None, global_batch=32_768),
        optim=OptimConfig(learning_rate=1e-3, warmup="20_000 steps", weight_decay=0.1, b2=0.95, clip_norm=1.0),
        mesh=MeshConfig(data=8, fsdp=8),
        duration="1_220_703 steps",
        log_every=100,
        checkpoint_every=300,
    )
