"""A disk that is full, or that nothing can be written to: said in one line, and what was saved before is whole."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from interrupted import run, wait_for_lines
from processes import finish

import clip_jax

FIELDS = {"duration": 160, "log_every": 5, "checkpoint_every": 20, "keep_checkpoints": 8}  # of 41 MB each

Disk = Callable[[str], Path]


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    """Gives a disk of its own, mounted with options; given others later, it has them from then on."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        mounted = ["remount,"] if folder.is_mount() else [""]
        command = ["mount", "-t", "tmpfs", "-o", mounted[0] + options, "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("only root can mount a disk")
        return folder

    yield mount
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    ((code, _, errors),) = finish([process])
    assert "Traceback" not in errors, errors
    return code, errors.strip().splitlines()[-1]


@pytest.mark.full
def test_a_disk_that_fills_up_during_a_save_ends_the_run_and_with_more_room_it_goes_on(disk, data_dir):
    workdir = disk("size=144m") / "run"
    code, error = ended(run(workdir, data_dir, FIELDS))
    saved = sorted(int(path.name) for path in (workdir / "checkpoints").glob("*[0-9]"))
    assert code == 2
    assert len(saved) >= 2
    assert f"error: the checkpoint of step {saved[-1] + 20} cannot be written to {workdir}/checkpoints" in error
    assert "No space left on device" in error
    assert f"the last whole one is of step {saved[-1]}; make room" in error
    clip_jax.load(workdir)  # reads its checksums
    disk("size=512m")
    code, said = ended(run(workdir, data_dir, FIELDS))
    assert (code, said) == (0, f"trained to step 160; the run is in {workdir}")
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == list(range(20, 161, 20))


@pytest.mark.full
def test_a_disk_that_has_no_room_for_a_line_ends_the_run_in_one_line(disk, data_dir):
    workdir = disk("size=64m") / "run"
    process = run(workdir, data_dir, FIELDS | {"checkpoint_every": 1000, "log_every": 1})
    wait_for_lines(process, workdir, 3)
    subprocess.run(["dd", "if=/dev/zero", f"of={workdir}/ballast", "bs=4096"], capture_output=True, check=False)
    code, error = ended(process)
    assert code == 2
    assert f"error: cannot write {workdir}/metrics.jsonl: No space left on device; choose another place" in error


@pytest.mark.full
def test_a_folder_that_is_read_only_is_said_before_anything_is_trained(disk, data_dir):
    workdir = disk("size=64m,ro") / "run"
    code, error = ended(run(workdir, data_dir, FIELDS))
    assert (code, error.startswith(f"error: cannot write {workdir}/config.json: Read-only file system")) == (2, True)
    disk("size=64m,rw")
    code, _ = ended(run(workdir, data_dir, FIELDS | {"duration": 20}))
    assert code == 0
    disk("size=64m,ro")
    before = sorted(path.name for path in workdir.iterdir())
    code, error = ended(run(workdir, data_dir, FIELDS | {"duration": 20}))
    assert code == 2, error
    assert "Read-only file system" in error
    assert sorted(path.name for path in workdir.iterdir()) == before
    clip_jax.load(workdir)
