"""Linear probe: a logistic regression on frozen image features, trained on one split and tested on another.

    python examples/linear_probe.py --model=ViT-B/32 --dataset=tfds:cifar100
    python examples/linear_probe.py --model=runs/quickstart --dataset=tfds:captioned_digits

The second runs anywhere (`make quickstart` trains the model), and printed on 2 CPU cores, in 7 s:

    1,442 images to learn from, 355 to test: 99.15 % right

The first is the example of OpenAI's README: the features are what `encode_image` returns, not L2-normalised, and C is
0.316 (look for your own on a validation split). It encodes 60,000 images, which wants an accelerator. CIFAR-100 must
have been prepared once, which needs TensorFlow (reading it does not):

    import tensorflow_datasets as tfds
    tfds.builder("cifar100", file_format="array_record").download_and_prepare()
"""

from absl import flags

from clip_jax import command

MODEL = flags.DEFINE_string("model", None, "a name such as ViT-B/32, a file, a folder or the workdir of a run")
DATASET = flags.DEFINE_string("dataset", None, "tfds:NAME, with labels and the splits train and test")
DATA_DIR = flags.DEFINE_string("data_dir", None, "where TFDS keeps its data sets; default: TFDS's own choice")

BATCH = 128  # images a call


def main() -> None:
    from sklearn.linear_model import LogisticRegression

    import clip_jax
    from clip_jax.data.sources import open_source

    command.require("model", "dataset")
    train, test = (
        open_source(f"{DATASET.value}:{split}", data_dir=DATA_DIR.value, needs=("image", "label"))
        for split in ("train", "test")
    )
    model, _ = clip_jax.load(MODEL.value)

    train_features, train_labels = encode(model, train)
    test_features, test_labels = encode(model, test)

    classifier = LogisticRegression(random_state=0, C=0.316, max_iter=1000)
    classifier.fit(train_features, train_labels)
    accuracy = classifier.score(test_features, test_labels)
    print(f"{len(train):,} images to learn from, {len(test):,} to test: {100 * accuracy:.2f} % right")


def encode(model, source):
    """Returns (features, labels) of every image, in the order of the source."""
    import numpy as np
    import rich.console
    import rich.progress

    from clip_jax.data.pipeline import evaluation_batches
    from clip_jax.models.clip import normalise_pixels

    architecture = model.architecture
    size, preprocess = architecture.image.image_size, architecture.preprocess
    batches = evaluation_batches(source, image_size=size, preprocess=preprocess, global_batch=BATCH)
    console = rich.console.Console(stderr=True)
    features, labels = [], []
    for rows in rich.progress.track(
        batches,
        f"{source.name}:{source.split}",
        total=-(-len(source) // BATCH),
        console=console,
        disable=not console.is_terminal,
    ):
        read = [i for i, record in enumerate(rows.records) if record is not None]
        features.append(model.encode_image(normalise_pixels(rows.image, preprocess))[read])
        labels += [rows.records[i].label for i in read]
    return np.concatenate(features), np.array(labels)


if __name__ == "__main__":
    command.run(main)
