"""Training on shards as other people's tools write them, unmodified: img2dataset's and webdataset's own."""

import contextlib
import csv
import http.server
import importlib.util
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
import shards

from clip_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from clip_jax.data.pipeline import training_pairs
from clip_jax.data.sources import Keys, open_source, open_training_source
from clip_jax.data.transforms import header_size
from clip_jax.models.variants import architecture
from clip_jax.training.loop import train
from clip_jax.training.step_lines import read_lines

GOOD = 40
TIMEOUT = 300  # seconds for what takes ten on a quiet machine


@contextlib.contextmanager
def served(answers: dict[str, bytes]) -> Iterator[str]:
    """Yields the address of a server on this machine that has these files."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data = answers.get(self.path)
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def by_img2dataset(tmp_path_factory) -> Path:
    """Two shards of the 40 images that could be downloaded; one was not there, one was no image."""
    if importlib.util.find_spec("img2dataset") is None:
        pytest.skip("img2dataset is not installed")
    folder = tmp_path_factory.mktemp("img2dataset")
    pictures = {f"/{i}.jpg": shards.picture(i, width=100 + i, height=80) for i in range(GOOD)}
    with served(pictures | {"/page.jpg": b"<html>no image</html>"}) as address:
        table = folder / "list.csv"
        with table.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("url", "caption"))
            rows.writerows((f"{address}/{i}.jpg", f"a caption, of number {i}") for i in range(GOOD))
            rows.writerows([(f"{address}/gone.jpg", "not there"), (f"{address}/page.jpg", "no image")])
        words = f"--url_list {table} --input_format csv --url_col url --caption_col caption --output_format webdataset"
        sizes = "--image_size 64 --resize_mode keep_ratio --number_sample_per_shard 21 --processes_count 1"
        run = "from img2dataset import download; import fire; fire.Fire(download)"
        command = [sys.executable, "-c", run, *words.split(), *sizes.split(), "--output_folder", str(folder / "out")]
        quiet = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "offline"}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, env=os.environ | quiet, cwd=folder, check=False
        )
    assert (folder / "out" / "00000.tar").exists(), done.stdout + done.stderr
    return folder / "out"


@pytest.fixture(scope="module")
def by_webdataset(tmp_path_factory) -> Path:
    """Two shards of 20 by the class that its users write with."""
    if importlib.util.find_spec("webdataset") is None:
        pytest.skip("webdataset is not installed")
    import webdataset

    folder = tmp_path_factory.mktemp("webdataset")
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"{shard:06}.tar")) as writer:
            for number in range(20 * shard, 20 * shard + 20):
                files = {"jpg": shards.picture(number), "txt": f"number {number}", "json": {"alt": f"the {number}th"}}
                writer.write({"__key__": f"some/folder/{number:05}", **files})
    return folder


def trained(spec: str, workdir: Path, **data) -> list[dict]:
    """Returns the metrics of a few steps on a data set."""
    config = Config(
        model=ModelConfig(variant="ViT-W64/4@16px"),
        data=DataConfig(train=spec, global_batch=16, **data),
        optim=OptimConfig(learning_rate=1e-3, warmup="2 steps"),
        duration="6 steps",
        log_every=1,
    )
    train(config, workdir, devices=jax.devices()[:1])
    return read_lines(workdir / "metrics.jsonl")


def assert_learnt(metrics: list[dict]) -> None:
    assert [line["valid"] for line in metrics] == [16] * 6
    assert metrics[0]["loss"] == pytest.approx(math.log(16), abs=0.5)
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_shards_of_img2dataset_are_trained_on_as_they_are(by_img2dataset, tmp_path):
    source = open_source(f"wds:{by_img2dataset}")
    assert len(source) == GOOD
    captions = {record.captions for record in map(source.__getitem__, range(GOOD))}
    assert captions == {(f"a caption, of number {i}",) for i in range(GOOD)}
    downloads = source.inventory().downloads
    assert (downloads["count"], downloads["successes"]) == (GOOD + 2, GOOD)
    assert (downloads["failed_to_download"], downloads["failed_to_resize"]) == (1, 1)
    assert_learnt(trained(f"wds:{by_img2dataset}", tmp_path))


def test_every_image_of_img2dataset_goes_with_the_caption_of_its_own_url(by_img2dataset):
    source = open_source(f"wds:{by_img2dataset}")
    sizes = [header_size(source[i].image) for i in range(GOOD)]
    assert len(set(sizes)) > 20, "images are told apart by their widths"
    for index, (width, height) in enumerate(sizes):
        number = int(source[index].captions[0].rpartition(" ")[2])
        assert max(width, height) == pytest.approx(64 * (100 + number) / 80, abs=1)


def test_captions_may_come_from_img2datasets_json(by_img2dataset):
    both = open_source(f"wds:{by_img2dataset}", keys=Keys(captions="txt;json.caption"))
    assert len(both) == GOOD
    assert all(len(both[i].captions) == 2 and len(set(both[i].captions)) == 1 for i in range(GOOD))


def test_shards_of_webdataset_are_trained_on_as_they_are(by_webdataset, tmp_path):
    source = open_source(f"wds:{by_webdataset}/{{000000..000001}}.tar")
    assert [source[i].id for i in (0, 39)] == ["some/folder/00000", "some/folder/00039"]
    assert [source[i].captions for i in (0, 39)] == [("number 0",), ("number 39",)]
    assert_learnt(trained(f"wds:{by_webdataset}", tmp_path, caption_keys="txt;json.alt"))


def test_one_of_several_captions_is_drawn_anew_in_every_epoch(by_webdataset):
    config = Config(data=DataConfig(train=f"wds:{by_webdataset}", caption_keys="txt;json.alt", global_batch=40))
    source = open_training_source(config.data)
    assert source[3].captions == ("number 3", "the 3th")
    pairs = training_pairs(config, architecture(config.model), None, source, rows=range(40))
    drawn = [pairs.caption(i) for i in range(400)]
    assert 150 < sum(caption.startswith("the") for caption in drawn) < 250
    assert len(set(drawn)) > 75
