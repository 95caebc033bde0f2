"""Examines training data, before a run does:

    python -m clip_jax.data SPEC [--config=configs/FILE.py] [--config.FIELD=VALUE …] [--picture=FILE.png]

SPEC is what --config.data.train takes: tfds:NAME:SPLIT, wds:FOLDER_OF_TARS, folder:DIR, csv:FILE, captions:FILE, or a
mixture. Prints what there is and what is left out, why; measures how fast it is decoded; draws the first batch, as it
is trained on.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from clip_jax import command
from clip_jax.config import Config

DATASET = flags.DEFINE_string("dataset", None, "the SPEC, where it does not come first")
CONFIG = config_flags.DEFINE_config_file("config", None, "whose images, captions and crops; default: ViT-B/32's")
SAMPLES = flags.DEFINE_integer("samples", 1000, "records that are read, for what no index knows", lower_bound=1)
PICTURE = flags.DEFINE_string("picture", "data.png", "where the first batch is drawn")


def main() -> None:
    from clip_jax.data import doctor

    config = command.checked(CONFIG.value) if CONFIG.value else Config()
    config.data.train = DATASET.value or config.data.train
    if DATASET.value is None and not CONFIG.value:
        command.require("dataset")
    doctor.examine(config, samples=SAMPLES.value, picture=Path(PICTURE.value))


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"--dataset={sys.argv[1]}"
    command.run(main)
