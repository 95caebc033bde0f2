"""Evaluates a CLIP: python eval.py --model=WORKDIR --task=zeroshot_classification --dataset=tfds:captioned_digits:test

Prints a table and writes results as JSON in CLIP_benchmark's schema, pictures beside them; several data sets, a suite,
two models side by side, a linear probe, features, a page to look at: docs/evaluation.md. On several hosts, start it on
each, as train.py.
"""

from absl import flags

from clip_jax import command, compilation_cache, distributed, supervisor

MODEL = flags.DEFINE_multi_string(
    "model", [], "a model's name, file or folder, or a run's folder; given twice: two models"
)
TASK = flags.DEFINE_string("task", "auto", "zeroshot_classification, zeroshot_retrieval, linear_probe, or features")
DATASET = flags.DEFINE_multi_string(
    "dataset", [], "tfds:NAME[:SPLIT] (test unless given), wds:TARS, folder:DIR, csv:FILE, captions:FILE; any number"
)
SUITE = flags.DEFINE_string("suite", None, "a JSON file of evaluations, whose average is told")
ROOT = flags.DEFINE_string("root", None, "what {root} stands for in data sets")
OUTPUT = flags.DEFINE_string("output", None, "the JSON file, or of several the folder; default: WORKDIR/eval/STEP")
RESUME = flags.DEFINE_bool("resume", False, "leave out what is done: whose result is there")
REPORT = flags.DEFINE_string("report", None, "a folder for a page to look at, index.html")
DATA_DIR = flags.DEFINE_string("data_dir", None, "where TFDS keeps its data sets; default: TFDS's own choice")

CLASSNAMES = flags.DEFINE_string("classnames", None, "a JSON file of class names by data set, or clip_benchmark")
TEMPLATES = flags.DEFINE_string("templates", None, "a JSON file of templates by data set, or clip_benchmark or cupl")
DUMP_CLASSNAMES = flags.DEFINE_bool("dump_classnames", False, "write class names into the result, too")
DUMP_TEMPLATES = flags.DEFINE_bool("dump_templates", False, "write templates into the result, too")
RECALL_K = flags.DEFINE_list("recall_k", ["1", "5", "10"], "the K of retrieval's recall@K")
TRAIN = flags.DEFINE_string("train", None, "what a linear probe learns from; default: the data set's split train")
VALIDATION = flags.DEFINE_string("validation", None, "what chooses its regularisation; default: a fifth of that")
FEWSHOT_K = flags.DEFINE_integer("fewshot_k", -1, "examples a class that it learns from; -1: all")
SEED = flags.DEFINE_integer("seed", 0, "of what is drawn of its examples")
FEATURE = flags.DEFINE_enum("feature", None, ["pooled", "projected", "embedding"], "before the projection, or behind")

DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "what is computed in")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "images or texts that a device takes at once")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where JAX does not find it by itself")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes there are; goes with --coordinator")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "which of them this is, from 0 on; goes with --coordinator")


def main() -> None:
    command.require("model")
    cluster = distributed.find(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    if cluster is None:
        compilation_cache.keep()
    with supervisor.watched(cluster, None):
        from clip_jax.evaluation.session import Asked, evaluate  # not before: jax has to join the others first

        evaluate(Asked(**{name: flags.FLAGS[name].value for name in Asked.__dataclass_fields__}))


if __name__ == "__main__":
    command.run(main)
