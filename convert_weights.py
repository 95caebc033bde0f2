"""Converts weights: python convert_weights.py --source=NAME|PATH --format=openai|clip_jax --target=PATH [--check]

The source is a name of clip_jax.available_models(), a file of OpenAI's, a folder of ours, or the workdir of a run. With
--check the result is compared with what OpenAI's own code computes from the same weights, and the exit code is 1 when
they differ.
"""

import sys
from pathlib import Path

from absl import flags

from clip_jax import command

SOURCE = flags.DEFINE_string("source", None, "a name, a file, a folder or the workdir of a run")
FORMAT = flags.DEFINE_string("format", None, "openai (a .pt file) or clip_jax (a folder)")
TARGET = flags.DEFINE_string("target", None, "the file or folder to write")
CHECK = flags.DEFINE_bool("check", False, "compare with OpenAI's code; needs PyTorch")


def main() -> None:
    from clip_jax.pretrained import convert

    command.require("source", "format", "target")
    if not convert(SOURCE.value, FORMAT.value, Path(TARGET.value), check=CHECK.value):
        sys.exit(1)


if __name__ == "__main__":
    command.run(main)
