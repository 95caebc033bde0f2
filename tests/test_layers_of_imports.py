"""Imports point down only, and what is imported is no more than what is needed."""

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = (
    (
        *("clip_jax.typing", "clip_jax.errors", "clip_jax.checked", "clip_jax.config", "clip_jax.durations"),
        *("clip_jax.files", "clip_jax.architecture", "clip_jax.preemption", "clip_jax.elsewhere"),
        "clip_jax.data.storage",
    ),
    (
        "clip_jax.models",
        "clip_jax.losses",
        "clip_jax.flops",
        "clip_jax.optim",
        "clip_jax.sharding",
        "clip_jax.distributed",
        "clip_jax.tokenizer",
        "clip_jax.data",
    ),
    ("clip_jax.compiled",),
    ("clip_jax.weights", "clip_jax.workdir", "clip_jax.data.pipeline"),
    ("clip_jax.training", "clip_jax.evaluation"),
    ("clip_jax.pretrained", "clip_jax.command", "clip_jax.supervisor", "clip_jax.compilation_cache"),
    (
        *("clip_jax.api", "clip_jax.planning", "clip_jax.training.evaluation", "clip_jax.training.journal"),
        *("clip_jax.training.loop", "clip_jax.training.report", "clip_jax.data.doctor", "clip_jax.data.__main__"),
        "clip_jax.evaluation.session",
    ),
    ("clip_jax",),  # the public surface
    ("train", "eval", "convert_weights", "examples", "configs"),
)

# What a machine that only wants the models and the losses does not have.
NOT_NEEDED_BY_MODELS = (
    *("beartype", "ftfy", "grain", "importlib_resources", "jaxtyping", "matplotlib", "ml_collections", "PIL"),
    *("regex", "sklearn", "tensorboardX", "tensorflow_datasets", "tokenizers", "torch"),
)


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    name_of(file): file
    for pattern in ("clip_jax/**/*.py", "configs/*.py", "examples/*.py", "train.py", "eval.py", "convert_weights.py")
    for file in sorted(ROOT.glob(pattern))
}


@functools.cache
def imports(module: str) -> tuple[str, ...]:
    """Returns the full names of all modules that a file of ours imports, wherever in the file."""
    return tuple(_imports(ast.parse(FILES[module].read_text(encoding="utf-8"))))


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in FILES else node.module


def layer_of(module: str) -> int:
    """Returns the layer of the longest name in the table that is the module or holds it."""
    fits = [(len(name), i) for i, names in enumerate(LAYERS) for name in names if f"{module}.".startswith(f"{name}.")]
    return max(fits)[1]


def points_down(importer: str, imported: str) -> bool:
    """Returns whether the import goes to a lower layer, to a neighbour in the same package, or stays at the ground."""
    home, target = layer_of(importer), layer_of(imported)
    neighbours = importer.split(".")[:2] == imported.split(".")[:2]
    return target < home or (target == home and (neighbours or home == 0))


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down_only(module):
    assert not module.startswith("clip_jax.") or layer_of(module) < layer_of("clip_jax"), "not in the table of layers"
    upwards = [name for name in imports(module) if name.startswith("clip_jax") and not points_down(module, name)]
    assert not upwards


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("clip_jax.models.clip", "clip_jax.sharding"),
        ("clip_jax.losses", "clip_jax.models.clip"),
        ("clip_jax.evaluation.run", "clip_jax.training.loop"),
        ("clip_jax.data.sources", "clip_jax.data.pipeline"),
        ("clip_jax.config", "clip_jax.models.variants"),
        ("clip_jax.api", "clip_jax"),
    ],
)
def test_the_table_refuses_what_the_design_forbids(importer, imported):
    assert not points_down(importer, imported)


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("configs.")])
def test_configs_import_the_config_alone(module):
    assert set(imports(module)) == {"clip_jax.config"}


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("clip_jax.data")])
def test_data_never_imports_jax(module):
    assert not {name.partition(".")[0] for name in imports(module)} & {"jax", "jaxlib", "flax", "optax", "orbax"}


def loaded_by(statement: str, *, without: tuple[str, ...] = ()) -> set[str]:
    """Returns the top-level modules, the standard library's apart, that a fresh process loads to run the statement."""
    code = f"""
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {without!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
before = set(sys.modules)
{statement}
print(json.dumps(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} - sys.stdlib_module_names)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_models_and_losses_need_jax_flax_optax_and_numpy_alone():
    modules = [name for name in FILES if name.startswith(("clip_jax.models", "clip_jax.losses"))]
    loaded = loaded_by(f"import {', '.join(modules)}", without=NOT_NEEDED_BY_MODELS)
    assert {"clip_jax", "jax", "flax"} <= loaded


def test_importing_the_package_imports_nothing_else():
    assert loaded_by("import clip_jax") == {"clip_jax"}


def test_every_public_name_is_there_and_no_other():
    import clip_jax

    for name in clip_jax.__all__:
        assert callable(getattr(clip_jax, name))
    with pytest.raises(AttributeError, match="nothing"):
        _ = clip_jax.nothing


def test_training_and_evaluation_load_neither_torch_nor_tensorflow():
    loaded = loaded_by("import clip_jax.training.loop, clip_jax.evaluation.run, tensorflow_datasets")
    assert loaded & {"torch", "tensorflow", "torchvision"} == set()
