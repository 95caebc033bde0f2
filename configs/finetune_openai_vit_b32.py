"""OpenAI's ViT-B/32, fine-tuned whole on pairs of your own.

    python train.py --config=configs/finetune_openai_vit_b32.py --workdir=runs/b32 \\
        --config.data.train=wds:FOLDER_OF_TARS

Starts from OpenAI's weights, which are downloaded; any other source of the same architecture, such as
--config.init_from=hf://openai/clip-vit-base-patch32, will do. Then, for PyTorch's users,

    python convert_weights.py --source=runs/b32 --format=openai --target=b32.pt --check

A larger model, such as ViT-L/14, costs about half with --config.model.patch_dropout=0.5 (FLIP, arXiv 2212.00794); its
last epochs are then a run without, from this one's workdir: docs/finetuning.md.

Hardware: one GPU with 24 GB. On less memory, --config.microbatch=256 gives the same gradients.
Time: not run here.
Result: not run here.
"""

from clip_jax.config import Config, DataConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(variant="ViT-B/32", compute_dtype="bfloat16", remat="attention"),
        data=DataConfig(train=None, global_batch=1024),
        optim=OptimConfig(learning_rate=1e-5, warmup="500 steps", weight_decay=0.1, layer_decay=0.85, clip_norm=1.0),
        init_from="ViT-B/32",
        microbatch=512,
        duration="10 epochs",
        log_every=50,
        checkpoint_every=500,
    )
