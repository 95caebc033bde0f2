"""What `eval.py` refuses, before it reads a model: of its flags, and of what they name."""

import pytest

from clip_jax.errors import UserError
from clip_jax.evaluation.session import Asked, evaluate

ASKED = {
    **{"model": ["runs/nowhere"], "task": "zeroshot_retrieval", "dataset": ["tfds:captioned_digits"], "suite": None},
    **{"root": None, "output": "results", "resume": False, "report": None, "classnames": None, "templates": None},
    **{"dump_classnames": False, "dump_templates": False, "recall_k": ["1", "5"], "train": None, "validation": None},
    **{"fewshot_k": -1, "seed": 0, "feature": None, "dtype": "float32", "batch_size": 4},
}
NO_DATASET = {"dataset": [], "task": "auto"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dataset": ["tfds:captioned_digit"]}, "'captioned_digit'; there are: captioned_digits, captioned_shapes"),
        ({"dataset": []}, "--dataset is missing (any number of them), or --suite=FILE: one of the two"),
        ({"suite": "nowhere.json"}, "--dataset is missing (any number of them), or --suite=FILE: one of the two"),
        ({"suite": "nowhere.json"} | NO_DATASET, "nowhere.json cannot be read"),
        ({"suite": "nowhere.json", "dataset": []}, "--task says nothing with --suite: its file says that of each"),
        ({"train": "folder:x"}, "--train says nothing with --task=zeroshot_retrieval: it is for linear_probe"),
        ({"task": "linear_probe", "fewshot_k": 0}, "fewshot_k=0 should be examples a class, 1 or more, or -1 for all"),
        ({"task": "linear_probe", "seed": -1}, "seed=-1 should be at least 0"),
        ({"task": "linear_probe", "dataset": ["tfds:captioned_digits:train"]}, "would learn from what it is tested on"),
        (
            {"task": "linear_probe", "validation": "tfds:captioned_digits:test"},
            "would learn from what it is tested on, captioned_digits:test; name something else with --validation=SPEC",
        ),
        ({"task": "fetures"}, "unknown task 'fetures'; did you mean 'features'?"),
        ({"task": "features", "output": None}, "--task=features takes one --model, any number of --dataset"),
        ({"task": "features", "resume": True}, "--resume says nothing with --task=features"),
        ({"recall_k": ["1", "five"]}, "--recall_k has 'five': should be whole numbers above 0"),
        ({"batch_size": 0}, "--batch_size=0 should be at least 1"),
        ({"model": ["a", "b", "c"]}, "--model is given 3 times: 2 models at most, side by side"),
        ({}, "'runs/nowhere' is no file, no folder"),
    ],
    ids=str,
)
def test_mistakes_are_refused_before_anything_is_computed(changed, words, data_dir):
    with pytest.raises(UserError) as error:
        evaluate(Asked(**ASKED | {"data_dir": str(data_dir)} | changed))
    assert words in str(error.value)
