"""A run whose checkpoints were damaged: the last that is whole is gone on from, and it is said; never other numbers."""

import json
import shutil

import jax
import numpy as np
import pytest

import clip_jax
from clip_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from clip_jax.errors import UserError
from clip_jax.training.loop import train
from clip_jax.weights.mapping import flatten


def config(data_dir) -> Config:
    return Config(
        model=ModelConfig(variant="ViT-W64/4@16px"),
        data=DataConfig(data_dir=str(data_dir), global_batch=16),
        optim=OptimConfig(warmup="1 step"),
        duration="6 steps",
        log_every=1,
        checkpoint_every=2,
        keep_checkpoints=3,
    )


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    train(config(data_dir), workdir, devices=jax.devices()[:1])
    return workdir


def numbers(workdir) -> tuple[list[tuple[int, float]], dict[str, np.ndarray]]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    weights = flatten(clip_jax.load(workdir)[0].weights)
    return [(line["step"], line["loss"]) for line in lines], {path: np.asarray(x) for path, x in weights.items()}


def flip_a_bit(checkpoint):
    file = checkpoint / "optimizer" / "0.nu.text.projection" / "0.0"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def cut_a_file_short(checkpoint):
    file = checkpoint / "params" / "text.projection" / "0.0"
    file.write_bytes(file.read_bytes()[:1000])


def delete_half(checkpoint):
    for folder in sorted((checkpoint / "params").iterdir())[::2]:
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()


def lose_the_checksums(checkpoint):
    (checkpoint / "checksums.json").unlink()


DAMAGES = {
    flip_a_bit: "optimizer/0.nu.text.projection/0.0 has other bytes than were written",
    cut_a_file_short: "params/text.projection/0.0 has 1,000 bytes, not ",
    delete_half: " is missing, and ",
    lose_the_checksums: "it has no checksums.json, without which nobody knows whether it is whole",
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_damaged_checkpoint_is_said_and_moved_aside_and_the_one_before_gone_on_from(
    damage, words, run, data_dir, tmp_path, capsys
):
    workdir = shutil.copytree(run, tmp_path / "run")
    damage(workdir / "checkpoints" / "6")
    train(config(data_dir), workdir, devices=jax.devices()[:1])
    said = capsys.readouterr().err
    assert f"checkpoint {workdir}/checkpoints/6 is damaged ({'' if words.startswith(' ') else words}" in said
    assert words in said
    assert f"moved to {workdir}/damaged/6-0" in said
    assert "resumed at step 4" in said
    assert (workdir / "damaged" / "6-0").is_dir()
    losses, weights = numbers(workdir)
    expected_losses, expected_weights = numbers(run)
    assert losses == expected_losses
    for path, x in expected_weights.items():
        np.testing.assert_array_equal(weights[path], x, err_msg=path)


def test_two_damaged_ones_are_passed_over_and_of_all_damaged_ones_the_run_says_so(run, data_dir, tmp_path, capsys):
    workdir = shutil.copytree(run, tmp_path / "run")
    for step in (4, 6):
        flip_a_bit(workdir / "checkpoints" / str(step))
    train(config(data_dir), workdir, devices=jax.devices()[:1])
    assert "resumed at step 2" in capsys.readouterr().err
    assert numbers(workdir)[0] == numbers(run)[0]
    for step in (2, 4, 6):
        flip_a_bit(workdir / "checkpoints" / str(step))
    before = sorted(workdir.rglob("*"))
    with pytest.raises(
        UserError, match=r"all checkpoints in .* are damaged \(6: optimizer.*; 4: .*; 2: .*another workdir"
    ):
        train(config(data_dir), workdir, devices=jax.devices()[:1])
    assert sorted(workdir.rglob("*")) == before


def test_where_a_damaged_one_cannot_be_moved_the_run_is_refused_and_as_it_was(run, data_dir, tmp_path):
    workdir = shutil.copytree(run, tmp_path / "run")
    flip_a_bit(workdir / "checkpoints" / "6")
    (workdir / "damaged").write_text("no folder")
    before = sorted(workdir.rglob("*"))
    with pytest.raises(UserError, match=r"6 is damaged \(.*\) and cannot be moved to .*/damaged/6-0: "):
        train(config(data_dir), workdir, devices=jax.devices()[:1])
    assert sorted(workdir.rglob("*")) == before


def test_a_run_that_is_told_to_end_saves_and_when_it_goes_on_is_the_run_that_was_not(run, data_dir, tmp_path, capsys):
    for preempted in (lambda step: step == 3, lambda step: False):
        train(config(data_dir), tmp_path, devices=jax.devices()[:1], preempted=preempted)
    said = capsys.readouterr().err
    assert "SIGTERM: saved at step 3; the same command goes on from there" in said
    assert "resumed at step 3" in said
    (losses, weights), (expected_losses, expected_weights) = numbers(tmp_path), numbers(run)
    assert losses == expected_losses
    for path, x in expected_weights.items():
        np.testing.assert_array_equal(weights[path], x, err_msg=path)


def test_any_checkpoint_is_loaded_by_its_folder_and_one_that_is_not_there_is_told(run):
    model, _ = clip_jax.load(run / "checkpoints" / "4")
    assert (model.pretrained, model.results) == (f"{run}/checkpoints/4", run / "eval" / "4")
    latest = flatten(clip_jax.load(run)[0].weights)
    assert any((np.asarray(x) != np.asarray(latest[path])).any() for path, x in flatten(model.weights).items())
    with pytest.raises(UserError, match=r"checkpoints has no checkpoint 3; there are: 2, 4, 6"):
        clip_jax.load(run / "checkpoints" / "3")


def test_who_only_reads_a_damaged_checkpoint_is_told_so(run, tmp_path):
    workdir = shutil.copytree(run, tmp_path / "run")
    flip_a_bit(workdir / "checkpoints" / "6")  # of the optimiser: nothing that is read
    clip_jax.load(workdir)
    cut_a_file_short(workdir / "checkpoints" / "6")
    with pytest.raises(UserError, match=r"6 is damaged \(params/text.projection/0.0 has .*remove it to go on"):
        clip_jax.load(workdir)
