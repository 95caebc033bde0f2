"""Zero-shot classification: one image against all classes of its data set, each put into words.

    python examples/zero_shot.py --model=ViT-B/32 --dataset=tfds:cifar100:test --index=3637
    python examples/zero_shot.py --model=runs/quickstart --dataset=tfds:captioned_digits:test

The second runs anywhere (`make quickstart` trains the model), and printed on 2 CPU cores, in 6 s:

    image 0 of captioned_digits:test, labelled 'five':
                five  80.26 %
               three  19.07 %
                nine   0.30 %
               eight   0.18 %
               seven   0.13 %

The first is the example of OpenAI's README, which gives for it: snake 65.31 %, turtle 12.29 %, sweet_pepper 3.83 %,
lizard 1.88 %, crocodile 1.75 %. CIFAR-100 must have been prepared once, which needs TensorFlow (reading it does not):

    import tensorflow_datasets as tfds
    tfds.builder("cifar100", file_format="array_record").download_and_prepare()
"""

from absl import flags

from clip_jax import command

MODEL = flags.DEFINE_string("model", None, "a name such as ViT-B/32, a file, a folder or the workdir of a run")
DATASET = flags.DEFINE_string("dataset", None, "tfds:NAME[:SPLIT], with labels; the split is test unless given")
INDEX = flags.DEFINE_integer("index", 0, "which image, counted in the order of the data set's own ids if it has any")
DATA_DIR = flags.DEFINE_string("data_dir", None, "where TFDS keeps its data sets; default: TFDS's own choice")


def main() -> None:
    import numpy as np
    from scipy.special import softmax

    import clip_jax
    from clip_jax.data.sources import open_source
    from clip_jax.data.transforms import decode
    from clip_jax.errors import UserError
    from clip_jax.evaluation import prompts

    command.require("model", "dataset")
    source = open_source(DATASET.value, data_dir=DATA_DIR.value, default_split="test", needs=("image", "label"))
    if not 0 <= INDEX.value < len(source):
        raise UserError(f"--index={INDEX.value}: {source.name}:{source.split} has the images 0 to {len(source) - 1}")
    model, preprocess = clip_jax.load(MODEL.value)

    # TFDS shuffles what it writes, but CIFAR's ids keep the order of the original files, and so 3637 its meaning.
    order = sorted(range(len(source)), key=lambda i: source[i].id)
    record = source[order[INDEX.value]]

    # One prompt a class: "a photo of a {}." unless the data set has a template of its own.
    texts = [sentences[0] for sentences in prompts.of(source).sentences]
    image = preprocess(decode(record.image))[None]
    tokens = model.tokenize(texts, truncate=True)

    # Cosine similarities times the model's scale: OpenAI's models have learnt 100.
    logits_per_image, _ = model(image, tokens)
    probabilities = softmax(logits_per_image[0])

    print(f"image {INDEX.value} of {source.name}:{source.split}, labelled {source.classnames[record.label]!r}:")
    for label in np.argsort(-probabilities)[:5]:
        print(f"{source.classnames[label]:>16} {100 * probabilities[label]:6.2f} %")


if __name__ == "__main__":
    command.run(main)
