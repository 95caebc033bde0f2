"""Trains a CLIP: python train.py --config=configs/quickstart.py --workdir=DIR [--config.optim.learning_rate=1e-3 …]

Run the same command again and it goes on where it was.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from clip_jax import command

CONFIG = config_flags.DEFINE_config_file("config", None, "a file in configs/, and --config.FIELD=VALUE to change it")
WORKDIR = flags.DEFINE_string("workdir", None, "the run's folder: config, metrics, checkpoints")


def main() -> None:
    from clip_jax.training.loop import train

    command.require("config", "workdir")
    train(command.checked(CONFIG.value), Path(WORKDIR.value))


if __name__ == "__main__":
    command.run(main)
