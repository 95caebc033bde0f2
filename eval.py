"""Evaluates a CLIP: python eval.py --model=WORKDIR --task=zeroshot_classification --dataset=tfds:captioned_digits:test

Prints a table, writes the result as JSON in CLIP_benchmark's schema, and pictures beside it.
"""

from absl import flags

from clip_jax import command

MODEL = flags.DEFINE_string("model", None, "a released model's name, a file, a folder or a run's folder")
TASK = flags.DEFINE_string("task", None, "zeroshot_classification or zeroshot_retrieval")
DATASET = flags.DEFINE_string("dataset", None, "tfds:NAME[:SPLIT] (test unless given), folder:DIR, csv:FILE, wds:TARS")
OUTPUT = flags.DEFINE_string("output", None, "the JSON file; default: WORKDIR/eval/STEP/DATASET_SPLIT_TASK.json")
DATA_DIR = flags.DEFINE_string("data_dir", None, "where TFDS keeps its data sets; default: TFDS's own choice")


def main() -> None:
    import clip_jax
    from clip_jax.data.sources import open_source
    from clip_jax.evaluation.run import NEEDS, evaluate

    command.require("model", "task", "dataset")
    needs = NEEDS.get(TASK.value, ("image",))
    source = open_source(DATASET.value, data_dir=DATA_DIR.value, default_split="test", needs=needs)
    model, _ = clip_jax.load(MODEL.value)
    if OUTPUT.value is None and model.results is None:
        command.require("output")
    output = OUTPUT.value or model.results / f"{source.name}_{source.split}_{TASK.value}.json"
    evaluate(model, source, TASK.value, output=output)


if __name__ == "__main__":
    command.run(main)
