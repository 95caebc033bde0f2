"""Every config builds; and, at full length, reaches what its header promises."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from clip_jax.command import check_config_flags, load_config
from clip_jax.data.embedded.digits import CAPTIONS as DIGIT_CAPTIONS
from clip_jax.data.embedded.shapes import CAPTIONS, compositions
from clip_jax.models.clip import Definition
from clip_jax.models.variants import VARIANTS, architecture
from clip_jax.tokenizer import tokenize
from clip_jax.training.program import assemble
from clip_jax.weights.download import RELEASES

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_builds_and_its_header_says_how_to_run_it(file):
    config = load_config(file)
    assert Definition(architecture(config.model)).shapes().params["logit_scale"].shape == ()
    header = file.read_text().split('"""')[1]
    assert f"python train.py --config=configs/{file.name}" in header
    for word in ("Hardware:", "Time:", "Result:"):
        assert word in header


@pytest.mark.parametrize(
    ("name", "share"),
    [("finetune_openai_vit_b32", 1), ("finetune_lora_vit_l14", 0.022), ("finetune_lit_vit_b16", 0.424)],
)
def test_a_fine_tuning_config_makes_a_run_on_one_device_that_trains_what_its_header_says(name, share):
    config = load_config(ROOT / "configs" / f"{name}.py")
    program = assemble(config, jax.devices()[:1], records=10**6)
    numbers = sum(x.size for x in jax.tree.leaves(program.state.params))
    assert program.optimizer.trained_numbers(program.state.params) / numbers == pytest.approx(share, abs=1e-3)
    assert config.init_from in RELEASES
    assert program.variant == config.init_from


def test_every_command_of_the_fine_tuning_page_has_files_and_flags_that_are_there():
    commands = re.findall(r"^ *python (\w+\.py) (.*)$", (ROOT / "docs" / "finetuning.md").read_text(), re.MULTILINE)
    assert {script for script, _ in commands} == {"train.py", "eval.py", "convert_weights.py"}
    for script, arguments in commands:
        arguments = arguments.replace("--config=", f"--config={ROOT}/").split()
        check_config_flags(arguments)
        defined = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (ROOT / script).read_text()))
        given = {argument.removeprefix("--").partition("=")[0].partition(".")[0] for argument in arguments}
        assert given <= defined, arguments


def test_every_caption_of_the_embedded_sets_fits_the_context_of_their_variant():
    shapes = [
        c.format(**x._asdict()) for c in CAPTIONS for held_out in (0, 1) for x in compositions(held_out=bool(held_out))
    ]
    tokenize(shapes, VARIANTS["ViT-W96/8@40px"].text.context_length)
    tokenize([c.format("seven") for c in DIGIT_CAPTIONS], VARIANTS["ViT-W64/4@16px"].text.context_length)


def result(config: str, task: str, dataset: str, workdir: Path, data_dir: Path, *overrides: str) -> dict[str, float]:
    """Trains and evaluates as a user does, and returns the metrics."""
    for command in (
        [
            "train.py",
            f"--config=configs/{config}.py",
            f"--workdir={workdir}",
            f"--config.data.data_dir={data_dir}",
            *overrides,
        ],
        ["eval.py", f"--model={workdir}", f"--task={task}", f"--dataset={dataset}", f"--data_dir={data_dir}"],
    ):
        subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True)
    (file,) = workdir.glob("eval/*/*.json")
    return json.loads(file.read_text())["metrics"]


@pytest.mark.full
def test_quickstart_names_95_percent_of_the_scans_it_has_never_seen(data_dir, tmp_path):
    accuracies = [
        result(
            "quickstart",
            "zeroshot_classification",
            "tfds:captioned_digits:test",
            tmp_path / str(seed),
            data_dir,
            f"--config.seed={seed}",
        )["acc1"]
        for seed in (0, 1, 2)
    ]
    print("quickstart, seeds 0, 1, 2:", accuracies)
    assert min(accuracies) >= 0.94
    assert sum(accuracies) / 3 >= 0.95


@pytest.mark.full
def test_shapes_finds_compositions_it_has_never_seen(data_dir, tmp_path):
    found = result("shapes", "zeroshot_retrieval", "tfds:captioned_shapes:test", tmp_path, data_dir)
    print("shapes:", found)
    assert found["image_retrieval_recall@1"] >= 0.85
    assert found["image_retrieval_recall@5"] >= 0.98
