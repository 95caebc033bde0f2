"""OpenAI's ViT-B/16 with its image tower locked (LiT, arXiv 2111.07991): the text tower learns to read captions of
another kind, or in another style, and image features that were computed before stay valid.

    python train.py --config=configs/finetune_lit_vit_b16.py --workdir=runs/lit --config.data.train=wds:FOLDER_OF_TARS

The text tower goes on from its own weights. The locked tower has no backward pass and no optimiser state, so a large
batch fits; what is exported has its tensors bit for bit.

    python convert_weights.py --source=runs/lit --format=open_clip --target=lit --check

Hardware: one GPU with 24 GB. On less memory, --config.microbatch=512 gives the same gradients.
Time: not run here.
Result: not run here.
"""

from clip_jax.config import Config, DataConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(variant="ViT-B/16", compute_dtype="bfloat16", remat="attention"),
        data=DataConfig(train=None, global_batch=4096),
        optim=OptimConfig(learning_rate=5e-5, warmup="500 steps", weight_decay=0.1, clip_norm=1.0, lock_image=0),
        init_from="ViT-B/16",
        microbatch=1024,
        duration="10 epochs",
        log_every=50,
        checkpoint_every=500,
    )
