"""OpenAI's ViT-L/14 with adapters of rank 16 (LoRA, arXiv 2106.09685) in all blocks of both towers, which alone are
trained: 2 % of all parameters. What is loaded and exported is a plain ViT-L/14, the adapters merged.

    python train.py --config=configs/finetune_lora_vit_l14.py --workdir=runs/l14 \\
        --config.data.train=wds:FOLDER_OF_TARS

At another resolution: --config.model.image_size=336; position embeddings are resized, and stay as they are then.

    python convert_weights.py --source=runs/l14 --format=huggingface --target=l14 --check

Hardware: one GPU with 24 GB. On less memory, --config.microbatch=64 gives the same gradients.
Time: not run here.
Result: not run here.
"""

from clip_jax.config import Config, DataConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            variant="ViT-L/14", compute_dtype="bfloat16", remat="attention", lora_rank=16, lora_alpha=32.0
        ),
        data=DataConfig(train=None, global_batch=1024),
        optim=OptimConfig(learning_rate=2e-4, warmup="200 steps", weight_decay=0.01, clip_norm=1.0),
        init_from="ViT-L/14",
        microbatch=128,
        duration="5 epochs",
        log_every=50,
        checkpoint_every=500,
    )
