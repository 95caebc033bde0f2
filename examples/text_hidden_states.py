"""The text tower's hidden states, which image generators are conditioned on, into a file that NumPy reads.

    python examples/text_hidden_states.py --model=ViT-L/14 --prompt="a lighthouse at dusk" --prompt="" \\
        --pad_with_end --output=states.npz

Three arrays [prompts, context length, width], and the `tokens` they belong to:

    final               behind the last block and the tower's last layer norm
    penultimate         behind the block before, and no norm
    penultimate_normed  the same with the last layer norm

Stable Diffusion 1 takes `final` of ViT-L/14. SDXL takes `penultimate` of ViT-L/14, side by side with that of OpenCLIP's
ViT-bigG/14. Stable Diffusion 2 takes `penultimate_normed` of OpenCLIP's ViT-H/14. All of them look at every position,
so what stands behind a prompt matters: with ViT-L/14 both generators repeat the end token (--pad_with_end), while
OpenAI's tokenizer, and OpenCLIP's, write zeros. The empty prompt is what classifier-free guidance leads away from.

With `--model=runs/quickstart` in place of ViT-L/14 (`make quickstart` trains it) it prints:

    final               float32 [2, 16, 64]
    penultimate         float32 [2, 16, 64]
    penultimate_normed  float32 [2, 16, 64]
    tokens              int32 [2, 16]
    states.npz
"""

from absl import flags

from clip_jax import command

MODEL = flags.DEFINE_string("model", None, "a name such as ViT-L/14, a file, a folder or the workdir of a run")
PROMPT = flags.DEFINE_multi_string("prompt", None, "a text; may be given several times")
OUTPUT = flags.DEFINE_string("output", None, "the .npz file to write")
PAD_WITH_END = flags.DEFINE_bool("pad_with_end", False, "write end tokens instead of zeros behind a prompt")


def main() -> None:
    from pathlib import Path

    import numpy as np

    import clip_jax
    from clip_jax.errors import UserError
    from clip_jax.files import whole
    from clip_jax.tokenizer import EOT

    command.require("model", "prompt", "output")
    model, _ = clip_jax.load(MODEL.value)
    try:
        tokens = model.tokenize(PROMPT.value)
    except RuntimeError as error:
        raise UserError(f"{error}; shorten it") from error
    if PAD_WITH_END.value:
        ends = tokens.argmax(axis=1)[:, None]  # the end token has the largest id
        tokens = np.where(np.arange(tokens.shape[1]) > ends, EOT, tokens)

    arrays = {
        "final": model.text_states(tokens, layer=-1),
        "penultimate": model.text_states(tokens, layer=-2, post_norm=False),
        "penultimate_normed": model.text_states(tokens, layer=-2),
        "tokens": tokens,
    }
    path = Path(OUTPUT.value)
    with whole(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
    for name, array in arrays.items():
        print(f"{name:<19} {array.dtype} {list(array.shape)}")
    print(path)


if __name__ == "__main__":
    command.run(main)
