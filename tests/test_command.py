"""A user's mistake ends in one line that begins with "error: ", in exit code 2, and leaves nothing behind."""

import subprocess
import sys
from pathlib import Path

import pytest
from absl.testing import flagsaver

import clip_jax.training.loop  # noqa: F401 (Grain's flags must be there before the flags are saved)
from clip_jax import command
from clip_jax.checked import leaves
from clip_jax.data.sources import open_source

ROOT = Path(__file__).parents[1]
CONFIG = "--config=configs/quickstart.py"

pytestmark = pytest.mark.filterwarnings(
    "ignore:the load_module:DeprecationWarning"
)  # ml_collections' way to read a file


@pytest.fixture(scope="module")
def data(data_dir) -> str:
    """The flag that says where the digits lie, which are made by then."""
    open_source("tfds:captioned_digits", data_dir=str(data_dir))
    return f"--config.data.data_dir={data_dir}"


@pytest.fixture
def refusal(monkeypatch, capfd):
    """Runs `train.py` in this process and returns its one line on stderr, without "error: "."""
    import train

    monkeypatch.chdir(ROOT)

    def run(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", *args])
        capfd.readouterr()
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as exit:
            command.run(train.main)
        assert exit.value.code == 2
        return one_line(capfd.readouterr().err)

    return run


def one_line(stderr: str) -> str:
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1, stderr
    return stderr.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.optim.learning_rat=1", ["learning_rat", "'optim.learning_rate'"]),
        ("--config.modle.variant=x", ["modle.variant", "'model.variant'"]),
        ("--config.optim=3", ["--config.optim", "no such field"]),
        ("--config.log_every=1e3", ["--config.log_every=1e3", "int"]),
        ("--config.log_every=", ["--config.log_every", "int"]),
        ("--config.optim.learning_rate=fast", ["fast", "float"]),
        ("--config.optim.learning_rate", ["--config.optim.learning_rate", "float"]),
        ("--config.model.image_size=big", ["big", "int | None"]),
        ("--config.data.crop_scale=0.5", ["0.5", "tuple[float, float]"]),
        ("--config.data.crop_scale=(0.5,", ["(0.5,", "tuple[float, float]"]),
        ("--config.data.crop_scale=(0.5,1,1)", ["(0.5,1,1)", "tuple[float, float]"]),
        ("--config.data.crop_scale=(0.5,2)", ["crop_scale=(0.5, 2", "<= 1"]),
        ("--config.data.global_batch=0", ["global_batch=0", "at least 1"]),
        ("--config.seed=-1", ["seed", "-1"]),
        ("--config.model.compute_dtype=float64", ["compute_dtype", "float64"]),  # JAX would make it float32, unasked
        ("--config.model.variant=ViT-B32", ["'ViT-B32'", "'ViT-B/32'"]),
        ("--config.model.image_size=30", ["image_size=30", "patch_size=4", "28 and 32"]),
        ("--config.mesh.fsdp=3", ["fsdp", "3", "8 devices"]),
        ("--config.data.global_batch=130", ["global_batch=130", "8 devices", "128 and 136"]),
        ("--config.data.global_batch=5", ["global_batch=5", "is 8"]),
        ("--config.data.train=captioned_digits", ["'captioned_digits'", "tfds:NAME"]),
        ("--config.data.train=tfds:captioned_digit", ["'captioned_digit'", "captioned_digits, captioned_shapes"]),
        ("--config.data.train=tfds:xyz", ["'xyz'", "there are: captioned_digits, captioned_shapes"]),
        ("--config.data.train=tfds:what is this", ["'what is this'"]),
        ("--config.data.train=tfds:mnist", ["'mnist'", "captioned_digits, captioned_shapes"]),
        ("--config.data.train=tfds:captioned_digits:trian", ["'trian'", "'train'"]),
        ("--config.data.train=tfds:captioned_digits:all", ["'all'", "test, train"]),
        ("something", ["'something'", "--name=value"]),
        ("--conifg=x", ["conifg"]),
    ],
)
def test_a_wrong_argument_is_one_line_with_value_and_rule_and_no_workdir(override, words, refusal, data, tmp_path):
    said = refusal(CONFIG, f"--workdir={tmp_path / 'run'}", data, override)
    assert [word for word in words if word not in said] == [], said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "path", "value"),
    [
        (["--config.optim.learning_rate=1e-2"], "optim.learning_rate", 0.01),
        (["--config.optim.learning_rate=1"], "optim.learning_rate", 1.0),
        (["--config.seed", "3"], "seed", 3),
        (["-config.seed=3"], "seed", 3),
        (["--config.mesh.fsdp", "-1", "--config.mesh.data=1"], "mesh.fsdp", -1),
        (["--config.seed=3", "--config.seed=4"], "seed", 4),
        (["--config.data.crop_scale=(0.25,1)"], "data.crop_scale", (0.25, 1.0)),
        (["--config.model.image_size=24"], "model.image_size", 24),
        (["--config.model.image_size=none"], "model.image_size", None),
        (["--config.optim.clip_norm=0.5"], "optim.clip_norm", 0.5),
        (["--config.optim.clip_norm=None"], "optim.clip_norm", None),
        (["--config.optim.lock_image=0"], "optim.lock_image", 0),
        (["--config.optim.factors=image/.*=0.1;logit_scale=2"], "optim.factors", "image/.*=0.1;logit_scale=2"),
        (["--config.data.data_dir=none"], "data.data_dir", None),
    ],
)
def test_an_override_reaches_the_run_as_a_value_of_its_type(args, path, value, monkeypatch, tmp_path):
    import train

    runs = []
    monkeypatch.setattr("clip_jax.training.loop.train", lambda *run, profile, preempted: runs.append((*run, profile)))
    monkeypatch.setattr(sys, "argv", ["train.py", CONFIG, f"--workdir={tmp_path}", "--profile=3:4", *args])
    monkeypatch.chdir(ROOT)
    with flagsaver.flagsaver():
        command.run(train.main)
    ((config, workdir, profile),) = runs
    found = {name: leaf for name, _, leaf in leaves(config)}
    assert (found[path], type(found[path])) == (value, type(value))
    assert (workdir, profile) == (tmp_path, "3:4")


def test_missing_flags_are_named(refusal, tmp_path):
    assert "--config is missing" in refusal()
    assert "--config is missing" in refusal(f"--workdir={tmp_path}")
    assert "--workdir is missing" in refusal(CONFIG)
    assert "config.seed" in refusal("--config.seed=1", f"--workdir={tmp_path}")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("configs/quickstrat.py", ["'configs/quickstrat.py'", "'configs/quickstart.py'"]),
        ("quickstart.py", ["'quickstart.py'", "configs/quickstart.py"]),
        ("nowhere/x.py", ["nowhere/x.py", "configs/quickstart.py"]),
        ("configs", ["'configs'"]),
        ("clip_jax/errors.py", ["clip_jax/errors.py", "get_config"]),
        ("README.md", ["README.md"]),
    ],
)
def test_a_config_file_that_is_none_is_refused_with_those_that_are(file, words, refusal, tmp_path):
    said = refusal(f"--config={file}", f"--workdir={tmp_path / 'run'}")
    assert [word for word in words if word not in said] == [], said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("Config(model=ModelConfig(varient='ViT-B/32'))", ["'varient'", "did you mean 'variant'"]),
        ("Config(optim=OptimConfig(learning_rate=-1.0))", ["optim.learning_rate=-1.0", "must be positive"]),
        ("Config(duration=undefined)", ["NameError", "undefined"]),
        ("(_ for _ in ()).throw(RuntimeError('two\\nlines'))", ["RuntimeError: two lines"]),
        ("3", ["get_config"]),
    ],
)
def test_a_mistake_in_a_config_file_is_said_in_one_line(body, words, refusal, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"from clip_jax.config import *\n\ndef get_config():\n    return {body}\n")
    said = refusal(f"--config={file}", f"--workdir={tmp_path / 'run'}")
    assert [word for word in [str(file), *words] if word not in said] == [], said
    assert not (tmp_path / "run").exists()


def test_a_value_of_the_wrong_type_in_a_config_file_is_said_in_one_line(tmp_path):
    file = tmp_path / "mine.py"
    data = "DataConfig(crop_scale=(0, 1), global_batch='128')"
    file.write_text(f"from clip_jax.config import *\n\ndef get_config():\n    return Config(data={data})\n")
    command = [
        sys.executable,
        "train.py",
        f"--config={file}",
        "--workdir=runs/none",
    ]  # here types are checked by pytest
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {file}: data.global_batch='128' should be int\n"


@pytest.mark.parametrize("place", ["file", "file/run", "n" * 300], ids=["a file", "below a file", "a name too long"])
def test_a_workdir_that_cannot_be_written_is_refused_by_its_path(place, refusal, data, tmp_path):
    (tmp_path / "file").write_text("kept")
    assert str(tmp_path / place) in refusal(CONFIG, f"--workdir={tmp_path / place}", data)
    assert (tmp_path / "file").read_text() == "kept"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_data_folder_that_cannot_be_written_is_refused_by_its_path(refusal, tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    assert str(file) in refusal(CONFIG, f"--workdir={tmp_path / 'run'}", f"--config.data.data_dir={file}")
    assert list(tmp_path.iterdir()) == [file]


def run_script(*args: str) -> subprocess.CompletedProcess:
    """Runs a script as a user does."""
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("--config.data.globl_batch=8", "'data.global_batch'"),
        ("--config.mesh.tensor=5", "does not fit 1 "),
        ("--workdir=README.md/run", "README.md/run"),
    ],
)
def test_in_a_process_of_its_own_too_a_mistake_is_one_line_and_exit_code_2(wrong, words, data, tmp_path):
    done = run_script("train.py", CONFIG, f"--workdir={tmp_path / 'run'}", data, wrong)
    assert done.returncode == 2
    assert words in one_line(done.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_help_lists_the_flags_and_is_no_mistake(script):
    done = run_script(script, "--help")
    assert done.returncode == 0
    assert "--workdir" in done.stdout if script == "train.py" else "--dataset" in done.stdout
