"""What was compiled is there at the next start of a script, unless somebody has said otherwise."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from clip_jax import compilation_cache

ROOT = Path(__file__).parents[1]


@pytest.fixture
def told_nothing(tmp_path, monkeypatch):
    """A user's process: JAX has no folder, and ours is a new one."""
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "compiled"
    jax.config.update("jax_compilation_cache_dir", before)


def test_there_is_a_folder_for_each_kind_of_processor_and_what_is_old_has_gone(told_nothing):
    folder = told_nothing / compilation_cache.processor()
    folder.mkdir(parents=True)
    for name, days in (("old-cache", 31), ("new-cache", 29)):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - days * 24 * 3600,) * 2)
    compilation_cache.keep()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert [file.name for file in folder.iterdir()] == ["new-cache"]


def test_whoever_has_told_jax_is_heard(told_nothing, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    compilation_cache.keep()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")
    assert not told_nothing.exists()


def test_where_nothing_can_be_written_nothing_is_kept(told_nothing):
    told_nothing.write_text("a file, where the folder would be")
    compilation_cache.keep()
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.full
def test_a_second_start_compiles_no_step(data_dir, tmp_path):
    environment = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
    environment |= {"CLIP_JAX_CACHE": str(tmp_path / "kept"), "JAX_LOG_COMPILES": "1"}
    found = []
    for name in ("first", "second"):
        command = [sys.executable, "train.py", "--config=configs/quickstart.py", f"--workdir={tmp_path / name}"]
        command += ["--config.duration=1 step", "--config.optim.warmup=0 steps", f"--config.data.data_dir={data_dir}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append("Persistent compilation cache hit for 'jit_train_step'" in done.stderr)
        [folder] = (tmp_path / "kept" / "compiled").iterdir()
        assert [file for file in folder.iterdir() if file.name.startswith("jit_train_step")]
    assert found == [False, True]
