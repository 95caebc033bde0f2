"""A run whose workdir is in a bucket is the run that it is on a disk, whatever ends it."""

import importlib.util
import json
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from buckets import Buckets, Refusal
from interrupted import computed, identical, run, wait_for_lines, whole
from processes import finish, start

import clip_jax
from clip_jax import pretrained
from clip_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, OptimConfig
from clip_jax.elsewhere import Elsewhere
from clip_jax.errors import UserError
from clip_jax.files import place, sizes, write_text
from clip_jax.training import growing
from clip_jax.training.curves import report
from clip_jax.training.loop import train
from clip_jax.workdir import Workdir

NOBODY = Refusal(403, "nobody does not have storage.objects.create access to the Google Cloud Storage object.")


def config(data_dir) -> Config:
    return Config(
        model=ModelConfig(variant="ViT-W64/4@16px"),
        data=DataConfig(data_dir=str(data_dir), global_batch=16),
        optim=OptimConfig(warmup="1 step"),
        evaluation=EvaluationConfig(tasks="zeroshot_classification=tfds:captioned_digits:test[:8]", every=6),
        duration="6 steps",
        log_every=1,
        checkpoint_every=2,
        keep_checkpoints=2,
    )


@pytest.fixture(scope="module")
def on_a_disk(data_dir, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("disk") / "run"
    train(config(data_dir), workdir, devices=jax.devices()[:1])
    return workdir


@pytest.fixture(scope="module")
def in_a_bucket(data_dir, buckets) -> Elsewhere:
    workdir = place("gs://bucket/runs/a run")
    train(config(data_dir), workdir, devices=jax.devices()[:1])
    return workdir


@pytest.fixture
def another(in_a_bucket, buckets) -> Elsewhere:
    """A copy of the run."""
    objects, start = buckets.objects["bucket"], str(in_a_bucket).removeprefix("gs://bucket/")
    for name in [name for name in objects if name.startswith(f"{start}/")]:
        buckets.put("bucket", f"runs/copy{name.removeprefix(start)}", objects[name].content)
    yield place("gs://bucket/runs/copy")
    for name in [name for name in objects if name.startswith("runs/copy/")]:
        del objects[name]


@pytest.fixture
def refusing(buckets) -> Iterator[Callable[[Callable[[str, str], bool]], None]]:
    """Makes the storage refuse calls (method, path) until the test ends."""

    def refuse(which: Callable[[str, str], bool]) -> None:
        buckets.refuses = lambda method, path: NOBODY if which(method, path) else None

    yield refuse
    buckets.refuses = lambda method, path: None


def names(workdir) -> set[str]:
    """Returns the files of a run, those apart whose names have a time in them, and what is empty on a disk alone."""
    found = {name for name in sizes(workdir) if "tfevents" not in name and not name.endswith("commit_success.txt")}
    return found - {"incidents.jsonl"}


def flip_a_bit(buckets: Buckets, file: Elsewhere) -> None:
    name = str(file).removeprefix("gs://bucket/")
    content = bytearray(buckets.get("bucket", name).content)
    content[len(content) // 2] ^= 4
    buckets.put("bucket", name, content)


@pytest.mark.full
def test_a_run_in_a_bucket_is_the_one_on_a_disk_bit_for_bit(on_a_disk, in_a_bucket):
    identical(in_a_bucket, on_a_disk)
    assert names(in_a_bucket) == names(on_a_disk)
    events = [[size for name, size in sizes(run).items() if "tfevents" in name] for run in (in_a_bucket, on_a_disk)]
    assert events[0] == events[1]
    folder = Workdir(in_a_bucket)
    assert (folder.latest_step(), folder.evaluations().keys()) == (6, {6})
    assert report([in_a_bucket]) == in_a_bucket / "curves.png"


@pytest.mark.full
def test_a_flipped_bit_in_a_bucket_is_said_and_the_checkpoint_before_gone_on_from(
    on_a_disk, another, buckets, data_dir, capsys
):
    flip_a_bit(buckets, another / "checkpoints" / "6" / "optimizer" / "0.nu.text.projection" / "0.0")
    train(config(data_dir), another, devices=jax.devices()[:1])
    said = capsys.readouterr().err
    assert f"checkpoint {another}/checkpoints/6 is damaged (optimizer/0.nu.text.projection/0.0 has other bytes" in said
    assert f"moved to {another}/damaged/6-0" in said
    assert "resumed at step 4" in said
    assert "params/text.projection/0.0" in sizes(another / "damaged" / "6-0")
    identical(another, on_a_disk)


@pytest.mark.full
def test_what_has_no_checksums_or_is_not_committed_does_not_count_and_is_cleaned_up(another, buckets, data_dir, capsys):
    objects, start = buckets.objects["bucket"], "runs/copy/checkpoints/6"
    del objects[f"{start}/commit_success.txt"]
    del objects[f"{start}/checksums.json"]  # which is written before
    assert Workdir(another).latest_step() == 4
    assert pretrained.read(another).origin == f"{another}/checkpoints/4"
    train(config(data_dir), another, devices=jax.devices()[:1])
    assert "resumed at step 4" in capsys.readouterr().err
    assert {f"{start}/commit_success.txt", f"{start}/checksums.json"} <= objects.keys()


@pytest.mark.full
def test_checksums_are_there_before_a_checkpoint_counts(in_a_bucket, buckets):
    written = {name: found.generation for name, found in buckets.objects["bucket"].items()}
    for step in (4, 6):
        folder = f"{in_a_bucket}/checkpoints/{step}".removeprefix("gs://bucket/")
        assert written[f"{folder}/checksums.json"] < written[f"{folder}/commit_success.txt"]
        lines = json.loads(buckets.get("bucket", f"{folder}/checksums.json").content)
        files = {name.removeprefix(f"{folder}/") for name in written if name.startswith(f"{folder}/")}
        assert {name for name in files if "commit_success" not in name} - lines.keys() == {
            "_CHECKPOINT_METADATA",
            "checksums.json",
        }


@pytest.mark.full
def test_load_reads_a_run_in_a_bucket_and_says_what_is_damaged(another, on_a_disk, buckets):
    model, expected = clip_jax.load(str(another))[0], clip_jax.load(on_a_disk)[0]
    tokens = expected.tokenize(["a seven", "a nine"])
    np.testing.assert_array_equal(model.encode_text(tokens), expected.encode_text(tokens))
    assert model.results == another / "eval" / "6"
    flip_a_bit(buckets, another / "checkpoints" / "6" / "params" / "text.projection" / "0.0")
    with pytest.raises(UserError, match=r"6 is damaged \(params/text.projection/0.0 has other bytes"):
        clip_jax.load(str(another))


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://", "https://example.com/run"])
def test_storage_that_holds_no_runs_is_refused(url):
    with pytest.raises(UserError, match=r"cannot hold a run: of storage elsewhere that is gs://BUCKET/FOLDER alone"):
        place(url)
    with pytest.raises(UserError, match=r"has a '\[' in it, which clients take for a pattern"):
        place("gs://bucket/a run [v2]")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'by gcsfs, which is missing: pip install "clip-nnx\[cloud\]"'):
        place("gs://bucket/run")


def test_a_bucket_that_is_not_there_or_refuses_is_said_in_one_line(buckets, refusing, data_dir):
    with pytest.raises(UserError, match=r"gs://none/run/.* cannot be written: there is no bucket 'none'; make it fir"):
        train(config(data_dir), "gs://none/run", devices=jax.devices()[:1])
    refusing(lambda method, path: method == "POST")
    with pytest.raises(UserError, match=r"gs://bucket/new/config.json cannot be written: Forbidden: .* access") as told:
        train(config(data_dir), "gs://bucket/new", devices=jax.devices()[:1])
    assert "\n" not in str(told.value)
    refusing(lambda method, path: True)
    with pytest.raises(UserError, match=r"gs://bucket/new/config.json cannot be read: Forbidden: .* access") as told:
        clip_jax.load("gs://bucket/new")
    assert "\n" not in str(told.value)


@pytest.mark.full
def test_storage_that_cannot_be_reached_is_not_taken_for_a_damaged_checkpoint(another, refusing, data_dir):
    refusing(lambda method, path: "/nu." in path or ".nu." in path)
    with pytest.raises(UserError, match=r"copy/checkpoints/6.* cannot be read: Forbidden"):
        train(config(data_dir), another, devices=jax.devices()[:1])
    refusing(lambda method, path: False)
    assert Workdir(another).latest_step() == 6


def test_what_grows_in_a_bucket_is_there_when_it_is_flushed_and_sent_no_more_often_than_it_has_to_be(
    buckets, refusing, monkeypatch
):
    path = place("gs://bucket/lines")
    buckets.calls.clear()
    file = growing.growing(path)
    for i in range(1000):
        file.write(b"%d\n" % i)
    file.flush()
    assert path.read_bytes().split() == [b"%d" % i for i in range(1000)]
    assert buckets.calls["POST"] <= 2
    file.close()
    monkeypatch.setattr(growing, "SECONDS", 0.05)
    file = growing.growing(path)
    file.write(b"more\n")
    deadline = time.monotonic() + 30
    while not path.read_bytes().endswith(b"999\nmore\n"):  # by itself
        assert time.monotonic() < deadline
        time.sleep(0.01)
    refusing(lambda method, path: method == "POST")
    file.write(b"lost\n")
    with pytest.raises(UserError, match=r"gs://bucket/lines cannot be written: Forbidden"):
        file.flush()
    with pytest.raises(UserError, match="Forbidden"):
        file.write(b"lost, too\n")
    with pytest.raises(UserError, match="Forbidden"):
        file.close()


def test_weights_are_written_to_this_machine_alone(workdir):
    with pytest.raises(UserError, match=r"'gs:/bucket/model' is not on this machine"):
        pretrained.convert(workdir, "clip_jax", Path("gs://bucket/model"))


# --- As users start it ----------------------------------------------------------------------------------------------

FIELDS = {"duration": 121, "log_every": 2, "checkpoint_every": 3}  # a checkpoint is written most of the time
KILLS = 4


@pytest.fixture(scope="module")
def uninterrupted(data_dir, tmp_path_factory) -> Path:
    return whole(tmp_path_factory.mktemp("uninterrupted"), data_dir, FIELDS)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    ((code, _, errors),) = finish([process])
    assert "Traceback" not in errors, errors
    return code, errors


@pytest.mark.full
@pytest.mark.parametrize("chain", range(3))
def test_a_run_in_a_bucket_that_is_killed_again_and_again_is_the_uninterrupted_run(
    chain, uninterrupted, buckets, data_dir
):
    draws, workdir = random.Random(chain), place(f"gs://bucket/killed/{chain}")
    metrics, saving, lines = workdir / "metrics.jsonl", 0, 0
    for _ in range(KILLS):
        process = run(workdir, data_dir, FIELDS)
        wait_for_lines(process, workdir, min(lines + draws.randint(1, 12), 55))
        time.sleep(draws.random())
        assert process.poll() is None, process.communicate()[1]
        process.kill()
        finish([process])
        lines = len(computed(workdir)) if metrics.exists() else 0
        saved = {name.split("/")[0] for name in sizes(workdir / "checkpoints")}
        saving += any(not (workdir / "checkpoints" / step / "commit_success.txt").exists() for step in saved)
    code, errors = ended(run(workdir, data_dir, FIELDS))
    assert (code, "resumed at step" in errors, "damaged" in errors) == (0, True, False), errors
    print(f"{saving} of {KILLS} kills were in the middle of a save")
    identical(workdir, uninterrupted)
    for step in {name.split("/")[0] for name in sizes(workdir / "checkpoints")}:
        assert (workdir / "checkpoints" / step / "commit_success.txt").exists(), "cleaned up"


@pytest.mark.full
def test_a_run_in_a_bucket_that_is_told_to_end_saves(uninterrupted, buckets, data_dir):
    workdir = place("gs://bucket/told")
    process = run(workdir, data_dir, FIELDS)
    wait_for_lines(process, workdir, 5)
    process.send_signal(signal.SIGTERM)
    code, errors = ended(process)
    step = Workdir(workdir).latest_step()
    assert (code, f"SIGTERM: saved at step {step}; the same command goes on" in errors) == (0, True), errors
    code, errors = ended(run(workdir, data_dir, FIELDS))
    assert (code, f"resumed at step {step}" in errors) == (0, True), errors
    identical(workdir, uninterrupted)


@pytest.mark.full
@pytest.mark.parametrize("what", ["/o", "optimizer"])  # all that is written; a checkpoint's arrays
def test_a_bucket_that_refuses_in_the_middle_of_a_run_ends_it_in_one_line(
    what, uninterrupted, buckets, refusing, data_dir
):
    workdir = place(f"gs://bucket/refused/{len(what)}")
    process = run(workdir, data_dir, FIELDS)
    wait_for_lines(process, workdir, 5)
    refusing(lambda method, path: method == "POST" and what in path)
    code, errors = ended(process)
    said = errors.strip().splitlines()[-1]
    assert (code, said.startswith("error: "), "cannot be written" in said) == (2, True, True), errors
    refusing(lambda method, path: False)
    code, errors = ended(run(workdir, data_dir, FIELDS))
    assert (code, "resumed at step" in errors) == (0, True), errors
    identical(workdir, uninterrupted)


def script(name: str, *flags: Any) -> tuple[int, str, str]:
    return finish([start([name, *map(str, flags)])])[0]


@pytest.mark.full
def test_the_scripts_read_a_run_in_a_bucket_and_start_others_from_it(another, buckets, on_a_disk, data_dir, tmp_path):
    task, data = "zeroshot_classification", "tfds:captioned_digits:test"
    code, _, errors = script(
        "eval.py", f"--model={another}", f"--task={task}", f"--dataset={data}", f"--data_dir={data_dir}"
    )
    assert code == 0, errors
    found = {name for name in sizes(another / "eval" / "6") if name.startswith(f"captioned_digits_test_{task}")}
    assert {Path(name).suffix for name in found} == {".json", ".png"}
    code, _, errors = script(
        "convert_weights.py", f"--source={another}", "--format=clip_jax", f"--target={tmp_path / 'model'}"
    )
    assert code == 0, errors
    converted, expected = pretrained.read(tmp_path / "model"), pretrained.read(on_a_disk)
    for path, array in expected.arrays.items():
        np.testing.assert_array_equal(converted.arrays[path], array, err_msg=path)
    fields = {"init_from": another, "duration": 4, "model.variant": "none"}
    code, errors = ended(run(place("gs://bucket/from"), data_dir, fields))
    assert (code, f"weights: from {another}" in errors) == (0, True), errors
    code, errors = ended(run(place("gs://none/run"), data_dir, FIELDS))
    assert (code, "there is no bucket 'none'; make it first" in errors.splitlines()[-1]) == (2, True), errors


@pytest.mark.full
def test_a_profile_of_a_run_in_a_bucket_is_in_its_folder(buckets, data_dir):
    workdir = place("gs://bucket/profiled")
    code, errors = ended(run(workdir, data_dir, {"duration": 6}, "--profile=4:5"))
    assert code == 0, errors
    assert any(name.endswith("perfetto_trace.json.gz") for name in sizes(workdir / "profile"))


def test_a_file_in_a_bucket_is_whole_or_not_there(buckets, refusing):
    path = place("gs://bucket/a folder/a file.json")
    write_text(path, "ä" * 4_000_000)
    assert path.read_text() == "ä" * 4_000_000
    refusing(lambda method, path: method == "POST")
    with pytest.raises(UserError, match=r"gs://bucket/a folder/a file.json cannot be written: Forbidden"):
        write_text(path, "b" * 8_000_000)
    assert path.read_text() == "ä" * 4_000_000
