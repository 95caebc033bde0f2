"""Draws the curves of one run, or of several in one picture:

    python -m clip_jax.training.report WORKDIR [WORKDIR …] [--output=FILE.png]

The picture goes into WORKDIR/curves.png, of several runs into ./curves.png.
"""

import itertools
import sys

from absl import flags

from clip_jax import command
from clip_jax.files import place
from clip_jax.training import curves

RUN = flags.DEFINE_multi_string("run", None, "a WORKDIR, where they do not come first")
OUTPUT = flags.DEFINE_string("output", None, "where the picture goes")


def main() -> None:
    command.require("run")
    print(curves.report([place(folder) for folder in RUN.value], OUTPUT.value and place(OUTPUT.value)))


if __name__ == "__main__":
    first = list(itertools.takewhile(lambda arg: not arg.startswith("-"), sys.argv[1:]))
    sys.argv[1 : 1 + len(first)] = [f"--run={folder}" for folder in first]
    command.run(main)
