"""`python -m clip_jax.data`: what it says of shards that are known, and its picture."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import shards
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """60 records, of which two have no caption, three are damaged behind their header, and ten have long captions."""
    long = b"a caption that goes on and on " * 40
    records = []
    for number in range(60):
        image = shards.picture(number, width=320, height=260)
        changes = {"jpg": image[: len(image) // 2] if number < 3 else image}
        changes |= {"txt": None} if number in (10, 11) else {"txt": long} if number >= 50 else {}
        records.append((f"{number:08}", shards.files(number, **changes)))
    path = tmp_path_factory.mktemp("doctor")
    shards.write(path / "00000.tar", records)
    stats = {"count": 70, "successes": 60, "failed_to_download": 7, "failed_to_resize": 3}
    (path / "00000_stats.json").write_text(json.dumps(stats))
    (path / "00001.tar").write_bytes((path / "00000.tar").read_bytes()[:100_000])
    return path


def doctor(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "clip_jax.data", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_it_tells_what_there_is_and_draws_it(folder, tmp_path):
    config = f"--config={ROOT}/configs/quickstart.py"
    spec = f"wds:{folder}/00000.tar"
    done = doctor(spec, config, "--config.data.global_batch=16", "--picture=first.png", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for words in (
        r"records +58 in 1 shards",
        r"bytes +1\.2 MB",
        r"an epoch +3\.6 steps of 16",
        r"expected first loss +2\.773 \(ln 16\)",
        r"img2dataset +tried 70, of which 7 did not come, 3 could not be resized",
        r"left out +2: no caption",
        r"images +260 pixels the shorter side; 0\.0% are under the model's 16",
        r"captions a record +1",
        r"characters a caption +8 … 9 … 1,200",
        r"tokens a caption +4 … 5 … 128 \(.*\); 17\.2% are cut at 16",
        r"decoded +[\d,]+ pairs/s a core",
        r"bad +\d\.\d% of these pairs, left out",
    ):
        assert re.search(words, done.stdout), f"{words} not in\n{done.stdout}"
    picture = np.asarray(Image.open(tmp_path / "first.png").convert("RGB"))
    assert min(picture.shape[:2]) > 1000
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 1000


def test_a_broken_shard_is_named(folder, tmp_path):
    done = doctor(f"wds:{folder}/00001.tar", "--samples=5", cwd=tmp_path)
    assert re.search(r"broken +00001\.tar (cut short|has no end mark)", done.stdout), done.stdout + done.stderr
    assert (tmp_path / "data.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--dataset is missing"),
        (["wds:/nowhere"], "1 of 1 files are not there: /nowhere"),
        (["nonsense"], "'nonsense' is not a data set"),
        (["tfds:nonsense"], "no data set 'nonsense'; there are: captioned_digits"),
        (["folder:/nowhere"], "there is no folder '/nowhere'"),
        (["csv:/nowhere.csv"], "1 of 1 files are not there: /nowhere.csv"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, tmp_path):
    done = doctor(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
