"""A ResNet through a whole run: its running statistics are trained, kept, resumed and loaded like its parameters."""

import json
import shutil

import jax
import numpy as np
import pytest

import clip_jax
from clip_jax.architecture import Architecture, ResNetTower, TextTower
from clip_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from clip_jax.errors import UserError
from clip_jax.models import variants
from clip_jax.training.loop import train
from clip_jax.weights.mapping import flatten
from clip_jax.workdir import Workdir

pytestmark = pytest.mark.full

SMALL = Architecture(
    embed_dim=16,
    image=ResNetTower(32, width=8, depths=(1, 2, 1, 1), num_heads=4),
    text=TextTower(16, 49408, width=32, depth=2, num_heads=2, mlp_dim=64),
)


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    """A run of four steps, and one that was left after two and taken up again."""
    folder = tmp_path_factory.mktemp("resnets")
    config = Config(
        model=ModelConfig(variant="RN-small"),
        data=DataConfig(data_dir=str(data_dir), global_batch=16),
        optim=OptimConfig(warmup="1 step"),
        duration="4 steps",
        log_every=1,
        checkpoint_every=2,
    )
    devices = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(variants.VARIANTS, "RN-small", SMALL)
        train(config, folder / "whole", devices=devices)
        train(config, folder / "resumed", devices=devices)
        for path in (folder / "resumed" / "checkpoints").glob("4*"):
            path.rename(folder / path.name)  # as if it had been killed before
        train(config, folder / "resumed", devices=devices)
    return folder


def losses(run) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_of(run) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flatten(clip_jax.load(run)[0].weights).items()}


def test_a_resumed_run_has_the_losses_weights_and_statistics_of_one_that_was_not_interrupted(runs):
    assert len(losses(runs / "whole")) == 4
    assert losses(runs / "resumed") == losses(runs / "whole")
    whole, resumed = weights_of(runs / "whole"), weights_of(runs / "resumed")
    assert whole.keys() == resumed.keys()
    for path, x in whole.items():
        np.testing.assert_array_equal(resumed[path], x, err_msg=path)


def test_a_run_is_not_resumed_with_other_parts_since_batch_norm_sees_each_by_itself(runs):
    folder = Workdir(runs / "whole")
    config = folder.config()
    config.microbatch = 8
    with pytest.raises(UserError, match="microbatch, of which batch norm sees each: None -> 8"):
        folder.check(config, SMALL)


def test_every_statistic_has_moved_and_counts_the_steps(runs):
    statistics = {path: x for path, x in weights_of(runs / "whole").items() if path.endswith(("mean", "variance"))}
    for path, x in statistics.items():
        assert (x != (0 if path.endswith("mean") else 1)).any(), path
    counts = [x for path, x in weights_of(runs / "whole").items() if path.endswith("count")]
    assert {int(n) for x in counts for n in np.ravel(x)} == {4}


def test_a_checkpoint_without_its_statistics_is_refused_by_name(runs, tmp_path):
    shutil.copytree(runs / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4" / "statistics" / "image.stem1.norm.mean")
    with pytest.raises(UserError, match=r"image.stem1.norm.mean/.zarray is missing"):
        clip_jax.load(tmp_path / "run")
