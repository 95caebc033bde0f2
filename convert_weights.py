"""Converts weights: python convert_weights.py --source=NAME|PATH|hf://ORG/REPO --format=FORMAT --target=PATH [--check]

FORMAT is openai (a .pt file), open_clip, huggingface or clip_jax (folders). The source is a name of
clip_jax.available_models(), a file of OpenAI's, a folder of any of these formats, a repository of the Hugging Face hub,
or the workdir of a run; or a lone state dict whose --variant is told. --image_size and --context_length resize position
embeddings. With --interpolate=ZEROSHOT the source is a model fine-tuned from that one, and what is written lies between
the two, --alpha of the way (WiSE-FT). With --check the result is compared with what the other project's own code
computes from it, block by block, and the exit code is 1 when they differ.
"""

import sys
from pathlib import Path

from absl import flags

from clip_jax import command

SOURCE = flags.DEFINE_string("source", None, "a name, a file, a folder, hf://org/repo[@revision] or a run's folder")
FORMAT = flags.DEFINE_string("format", None, "openai (a .pt file), open_clip, huggingface or clip_jax (folders)")
TARGET = flags.DEFINE_string("target", None, "the file or folder to write")
VARIANT = flags.DEFINE_string("variant", None, "what the weights must be; needed for a lone state dict")
ACTIVATION = flags.DEFINE_string("activation", None, "computed whatever the weights say: quick_gelu, gelu or gelu_tanh")
IMAGE_SIZE = flags.DEFINE_integer("image_size", None, "for images of another size; position embeddings are resized")
CONTEXT_LENGTH = flags.DEFINE_integer("context_length", None, "for captions of another length; likewise")
INTERPOLATE = flags.DEFINE_string("interpolate", None, "the model that the source was fine-tuned from: write WiSE-FT")
ALPHA = flags.DEFINE_float("alpha", 0.5, "with --interpolate: 0 is all of that model, 1 all of the source")
CHECK = flags.DEFINE_bool("check", False, "compare with the other project's code; needs PyTorch")


def main() -> None:
    from clip_jax.errors import UserError
    from clip_jax.pretrained import Asked, WiseFT, convert

    command.require("source", "format", "target")
    if ALPHA.present and INTERPOLATE.value is None:
        raise UserError(f"--alpha={ALPHA.value} goes with --interpolate=ZEROSHOT, the other end of the line")
    asked = Asked(VARIANT.value, ACTIVATION.value, IMAGE_SIZE.value, CONTEXT_LENGTH.value)
    wise_ft = None if INTERPOLATE.value is None else WiseFT(INTERPOLATE.value, ALPHA.value)
    if not convert(SOURCE.value, FORMAT.value, Path(TARGET.value), asked, wise_ft=wise_ft, check=CHECK.value):
        sys.exit(1)


if __name__ == "__main__":
    command.run(main)
