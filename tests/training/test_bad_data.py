"""Bad records harm nobody: a run goes on with masked pairs and counts them, or stops and says why; it never hangs, and
no image ever meets another's caption."""

import dataclasses
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import shards
from PIL import Image

from clip_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from clip_jax.data import storage
from clip_jax.data.pipeline import training_batches, training_pairs
from clip_jax.data.problems import Problem
from clip_jax.data.sources import open_training_source
from clip_jax.errors import UserError
from clip_jax.models.variants import architecture
from clip_jax.training.feed import BadLimit, in_words, merged
from clip_jax.training.loop import _as_begun, train
from clip_jax.training.program import assemble
from clip_jax.training.step_lines import read_lines

LIMIT = 120  # seconds that anything here may take; on a quiet machine it is ten
ONE = jax.devices()[:1]
ARCH = architecture(ModelConfig(variant="ViT-W64/4@16px"))


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """Ends a test that hangs."""

    def late(*_):
        raise TimeoutError(f"not done after {LIMIT} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def config_of(spec: str, *, steps_between: int = 1000, **data) -> Config:
    return Config(
        model=ModelConfig(variant="ViT-W64/4@16px"),
        data=DataConfig(**({"train": spec, "global_batch": 16} | data)),
        optim=OptimConfig(learning_rate=1e-3, warmup="2 steps"),
        duration="6 steps",
        log_every=2,
        checkpoint_every=steps_between,
    )


def half(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def bomb() -> bytes:
    """Returns a PNG that says it has 30,000 × 30,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 10_000) + b"IDAT" + bytes(100)


# --- what an index cannot see: it comes up while training ---


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """Two shards of 50; in the second every fifth image ends too soon, after a good header."""
    folder = shards.write_several(tmp_path_factory.mktemp("damaged"), shards=1, records=50)
    numbers = range(50, 100)
    records = [
        (
            f"{n:08}",
            shards.files(n, jpg=half(shards.picture(n, width=300, height=300)) if n % 5 == 0 else shards.picture(n)),
        )
        for n in numbers
    ]
    shards.write(folder / "00001.tar", records)
    return folder


def test_a_damaged_image_is_a_masked_pair_counted_by_reason_and_shard_also_after_a_resume(damaged, tmp_path, capsys):
    config = config_of(f"wds:{damaged}")
    train(config, tmp_path, devices=ONE)
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 4, 6]
    assert all(np.isfinite(line["loss"]) for line in lines)
    bad = merged([line.get("bad_records", {}) for line in lines])
    assert bad.keys() == {"00001.tar"}
    assert bad["00001.tar"].keys() == {"damaged image"}
    count = bad["00001.tar"]["damaged image"]
    pairs = training_pairs(config, ARCH, None, open_training_source(config.data), rows=range(16))
    assert count == sum(not pairs[i].batch.valid for i in range(96)) > 3
    assert f"left out {count} pairs: damaged image {count}; in 00001.tar ({count})" in capsys.readouterr().err

    train(config, tmp_path, devices=ONE)  # the run is done: nothing is left but its last words
    assert f"left out {in_words(bad)}" in capsys.readouterr().err


def test_too_many_stop_the_run_and_the_worst_shards_are_named(damaged, tmp_path):
    with pytest.raises(UserError) as stopped:
        train(config_of(f"wds:{damaged}", bad_limit=0.00025), tmp_path, devices=ONE)
    words = str(stopped.value)
    assert "more than 0.025% (data.bad_limit) of the last 10,000 pairs cannot be read; left out: 3 pairs" in words
    assert "in 00001.tar (" in words
    assert "\n" not in words
    assert int(max(path.name for path in (tmp_path / "checkpoints").iterdir())) in (2, 4, 6), "what was trained is kept"


def test_the_limit_is_of_the_last_10_000_pairs():
    limit = BadLimit(0.05, seen=0)
    assert limit.passed(4000, {"a": {"damaged image": 300}}) is None
    assert limit.passed(9000, {"b": {"no caption": 200}}) is None
    words = limit.passed(10_000, {"b": {"no caption": 1}})
    assert "more than 5% (data.bad_limit) of the last 10,000 pairs" in words
    assert "501 pairs: damaged image 300, no caption 201; in a (300), b (201);" in words

    limit = BadLimit(0.05, seen=0)
    four, six = [{"a": {"damaged image": n}} for n in (40, 60)]
    assert not any(limit.passed(1000 * lap, four) for lap in range(1, 100))  # 4 % for ever
    found = [bool(limit.passed(1000 * lap, six)) for lap in range(100, 107)]  # 6 %: too many once more than half are
    assert found == [False] * 5 + [True] * 2


@pytest.mark.parametrize("cut", [99, 101, 104])
def test_a_resumed_run_stops_for_bad_records_where_the_uninterrupted_one_does(cut):
    laps = [{"a": {"damaged image": n}} for n in [40] * 99 + [60] * 7]
    limit, found = BadLimit(0.05, seen=0), []
    for lap, bad in enumerate(laps, start=1):
        if lap - 1 == cut:  # interrupted in the middle of a lap, whose pairs are reported when it ends
            limit = BadLimit(0.05, seen=1000 * cut + 500, state=json.loads(json.dumps(limit.state())))
        found.append(limit.passed(1000 * lap, bad))
    assert [bool(words) for words in found] == [False] * 104 + [True] * 2
    assert "of the last 10,000 pairs" in found[-1]


@pytest.mark.full
def test_runs_that_are_started_again_and_again_do_not_train_through_the_limit(damaged, tmp_path):
    config = config_of(f"wds:{damaged}", bad_limit=0.0009, steps_between=2)  # 9 of 10,000 pairs; a run of 96 has more
    with pytest.raises(UserError, match="cannot be read"):
        train(config, tmp_path / "whole", devices=ONE)
    stopped = read_lines(tmp_path / "whole" / "metrics.jsonl")[-1]["step"]
    assert stopped == 6

    def killed(step: int) -> bool:
        return step % 2 == 0

    for _ in range(2):
        train(config, tmp_path / "cut", devices=ONE, preempted=killed)
    with pytest.raises(UserError, match="cannot be read"):
        train(config, tmp_path / "cut", devices=ONE, preempted=killed)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_large_batch_is_a_window_of_its_own():
    limit = BadLimit(0.05, seen=0)
    assert limit.passed(30_000, {"a": {"damaged image": 1500}}) is None
    assert "of the last 30,000 pairs" in limit.passed(60_000, {"a": {"damaged image": 1501}})


# --- what a shard may be like ---


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def broken_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(b"00000060.txt")
    data[at : at + 200] = bytes(range(200))
    path.write_bytes(data)


def zeroed_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(b"00000060.txt")
    data[at : at + 512] = bytes(512)
    path.write_bytes(data)


def rewritten(**changes: Callable[[int], bytes | None]) -> Callable[[Path], None]:
    """Returns what rewrites a shard with every third record's files changed."""

    def rewrite(path: Path) -> None:
        records = [
            (f"{n:08}", shards.files(n, **({kind: make(n) for kind, make in changes.items()} if n % 3 == 0 else {})))
            for n in range(50, 100)
        ]
        shards.write(path, records)

    return rewrite


def in_parts(path: Path) -> None:
    """All captions first, then all images, backwards."""
    numbers = range(50, 100)
    texts = [(f"{n:08}", {"txt": shards.files(n)["txt"]}) for n in numbers]
    shards.write(path, texts + [(f"{n:08}", {"jpg": shards.files(n)["jpg"]}) for n in reversed(numbers)])


def duplicated(path: Path) -> None:
    """Twenty keys twice, with other content."""
    twice = [(f"{n:08}", shards.files(n + 1000, txt=f"number {n + 1000}".encode())) for n in range(50, 70)]
    shards.write(path, [(f"{n:08}", shards.files(n)) for n in range(50, 100)] + twice)


SHARDS = {
    "cut short": (cut, r"00001.tar (cut short in '00000\d\d\d.\w+'|has no end mark)"),
    "a broken header in the middle": (broken_header, r"00001.tar no tar header at byte [\d,]+"),
    "empty": (lambda path: path.write_bytes(b""), None),
    "of zeros": (lambda path: path.write_bytes(bytes(10_240)), None),
    "no tar at all": (lambda path: path.write_bytes(b"<html>" * 500), "00001.tar no tar header at byte 0"),
    "images of no bytes": (rewritten(jpg=lambda n: b""), "not an image 17"),
    "a bomb": (rewritten(jpg=lambda n: bomb()), "image over the pixel limit 17"),
    "images missing": (rewritten(jpg=lambda n: None), "no image 17"),
    "captions missing": (rewritten(txt=lambda n: None), "no caption 17"),
    "captions of nothing": (rewritten(txt=lambda n: b""), "no caption 17"),
    "captions of white space": (rewritten(txt=lambda n: b" \n\t "), "no caption 17"),
    "captions in Latin-1": (rewritten(txt=lambda n: "café".encode("latin-1")), "caption is not UTF-8 17"),
    "captions of a megabyte": (rewritten(txt=lambda n: b"word " * 200_000), "caption over 64 KiB 17"),
    "a failed status": (rewritten(json=lambda n: b'{"status": "failed_to_download"}'), "status is not success 17"),
    "broken JSON that nobody needs": (rewritten(json=lambda n: b'{"status": '), None),
    "JSON of other people's": (rewritten(json=lambda n: b'[{"status": 404}]' if n % 2 else b'{"status": 200}'), None),
    "zeros in the place of a header": (zeroed_header, r"has a mark of its end before byte [\d,]+, and more"),
    "members in another order": (in_parts, None),
    "keys twice": (duplicated, "a key twice in one shard 20"),
}


@pytest.mark.parametrize(("spoil", "said"), SHARDS.values(), ids=SHARDS)
def test_a_spoilt_shard_is_said_and_the_rest_is_read_in_right_pairs(spoil, said, tmp_path):
    folder = shards.write_several(tmp_path / "data", shards=2, records=50)
    spoil(folder / "00001.tar")
    config = config_of(f"wds:{folder}")
    source = open_training_source(config.data)
    lines = "\n".join(source.inventory().said())
    if said is None:
        assert lines == ""
    else:
        assert re.search(said, lines), lines
    pairs = training_pairs(config, ARCH, None, source, rows=range(16))
    batches = list(training_batches(pairs, num_threads=2, num_workers=0))
    assert len(batches) == 6
    assert all(loaded.batch.valid.all() for loaded in batches)
    for index in range(len(source)):
        record = source[index]
        number = int(record.captions[0].rpartition(" ")[2])
        assert record.image == shards.picture(number), "an image has another's caption"


def test_images_of_unusual_kinds_are_trained_on(tmp_path):
    grey = np.arange(400, dtype=np.uint16).reshape(20, 20) * 100
    images = {
        "gif": (Image.fromarray(np.uint8(grey >> 8)).convert("P"), "GIF", {}),
        "jpg": (Image.new("CMYK", (20, 20), (10, 60, 90, 20)), "JPEG", {}),
        "png": (Image.fromarray(grey), "PNG", {}),
        "webp": (Image.new("RGBA", (20, 20), (200, 10, 10, 128)), "WEBP", {}),
        "jpeg": (Image.new("L", (20, 20), 77), "JPEG", {}),
    }
    records = []
    for i, (kind, (image, form, options)) in enumerate(images.items()):
        file = io.BytesIO()
        image.save(file, form, **options)
        records += [(f"{i}", {kind: file.getvalue(), "txt": kind.encode()})]
    palette = io.BytesIO()
    Image.new("RGB", (20, 20), "red").quantize(4).save(palette, "PNG", transparency=bytes(range(4)))
    records.append(("9", {"png": palette.getvalue(), "txt": b"palette"}))
    shards.write(tmp_path / "0.tar", records)
    config = config_of(f"wds:{tmp_path}", image_keys="jpg;jpeg;png;webp;gif", global_batch=6)
    source = open_training_source(config.data)
    assert len(source) == 6
    pairs = training_pairs(config, ARCH, None, source, rows=range(6))
    for pair in map(pairs.__getitem__, range(6)):
        assert pair.batch.valid, Problem(int(pair.problem)).words
        assert pair.batch.image.any()


def test_links_and_names_that_point_outside_are_neither_followed_nor_written(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("do not read me")
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, data in (
            ("../../a.jpg", shards.picture(1)),
            ("../../a.txt", b"number 1"),
            ("b.jpg", shards.picture(2)),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("b.txt")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
    before = set(tmp_path.parent.rglob("*"))
    source = open_training_source(config_of(f"wds:{tmp_path}/0.tar").data)
    assert [source[i].captions for i in range(len(source))] == [("number 1",)]
    assert source.inventory().left_out == {"no caption": 1}
    assert {path.name for path in set(tmp_path.parent.rglob("*")) - before} == {next(tmp_path.glob("0.tar.*")).name}


# --- what happens to data under a run ---


def reading(folder: Path, **changes) -> tuple[Config, object]:
    config = config_of(f"wds:{folder}", **changes)
    return config, open_training_source(config.data)


def test_a_shard_that_is_overwritten_under_a_run_gives_no_wrong_pair(tmp_path):
    folder = shards.write_several(tmp_path / "data", shards=2, records=50)
    _, source = reading(folder)
    assert source[60].captions == ("number 60",)
    others = [
        (f"{n:08}", shards.files(n + 500, txt=b"another number " + str(n + 500).encode())) for n in range(50, 100)
    ]
    data = shards.write(tmp_path / "other.tar", others).read_bytes()
    with (folder / "00001.tar").open("r+b") as file:  # in its place: who has it open sees it
        file.write(data)
    problems = []
    for index in range(50, 100):
        try:
            record = source[index]
        except Exception as error:
            problems.append(type(error).__name__ + ": " + str(error))
        else:
            number = int(record.captions[0].rpartition(" ")[2])
            assert record.image == shards.picture(number)
    assert set(problems) == {"BadRecord: shard changed under the run"}
    assert len(problems) >= 45


def test_a_shard_that_grows_shorter_under_a_run_is_counted(tmp_path):
    folder = shards.write_several(tmp_path / "data", shards=2, records=50)
    config, source = reading(folder)
    cut(folder / "00001.tar")
    pairs = training_pairs(config, ARCH, None, source, rows=range(16))
    valid = {int(pair.index): bool(pair.batch.valid) for pair in (pairs[i] for i in range(96))}
    assert all(valid[index] for index in valid if index < 70)
    assert not any(valid[index] for index in valid if index > 80)


def test_a_shard_that_is_taken_away_is_counted_and_its_readers_do_not_wait(tmp_path):
    folder = shards.write_several(tmp_path / "data", shards=2, records=50)
    config, source = reading(folder)
    (folder / "00001.tar").unlink()
    pairs = training_pairs(config, ARCH, None, source, rows=range(16))
    started = time.monotonic()
    problems = {int(pairs[i].index) // 50: int(pairs[i].problem) for i in range(96)}
    assert problems[0] == 0
    assert problems[1] != 0
    assert time.monotonic() - started < 10


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Two good shards in `data`, and a run on them in `run`, which has also kept what it was at half of its way."""
    root = tmp_path_factory.mktemp("whole")
    folder = shards.write_several(root / "data", shards=2, records=50)
    train(config_of(f"wds:{folder}", steps_between=3), root / "run", devices=ONE)
    return root


def half_way(whole: Path, run: Path) -> Path:
    """Returns a copy of the run as it was when half of it was done."""
    shutil.copytree(whole / "run", run)
    shutil.rmtree(run / "checkpoints" / "6")
    return run


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_lines(run / "metrics.jsonl")]


def test_a_run_on_changed_shards_is_refused_with_the_difference_unless_told_otherwise(whole, tmp_path):
    folder = shutil.copytree(whole / "data", tmp_path / "data")
    run = half_way(whole, tmp_path / "run")
    shards.write(folder / "00001.tar", [(f"{n:08}", shards.files(n)) for n in range(50, 99)])
    shards.write(folder / "00002.tar", [(f"{n:08}", shards.files(n)) for n in range(300, 310)])
    with pytest.raises(UserError) as refused:
        train(config_of(f"wds:{folder}", steps_between=3), run, devices=ONE)
    words = str(refused.value)
    assert "data/records: 100 -> 109" in words
    assert "data/shards/00001.tar/records: 50 -> 49" in words
    assert "data/shards/00002.tar/records: null -> 10" in words
    assert "where it lies may change (data.train, data.data_dir), what it holds may not" in words
    assert "--config.data.accept_changes=true" in words
    train(config_of(f"wds:{folder}", steps_between=3, accept_changes=True), run, devices=ONE)
    assert losses(run)[:2] == losses(whole / "run")[:2]
    assert losses(run)[2:] != losses(whole / "run")[2:], "other records from there on"


# Of 100 records 13 steps, of 150 19, of 20 three.
EPOCHS = {"duration": "2 epochs", "checkpoint_every": 5}


def test_a_run_whose_data_has_changed_is_as_long_as_it_was_begun_and_an_old_checkpoint_may_be_beyond_its_end():
    config = dataclasses.replace(config_of("wds:none"), **EPOCHS)
    before, now, fewer = (assemble(config, ONE, records=records) for records in (100, 150, 20))
    assert _as_begun(now, ONE, records=150, start=0) == (now, []), "a new run, or a checkpoint that does not know"
    program, said = _as_begun(now, ONE, records=100, start=5)
    assert program.steps == before.steps == (13, 2, 0)
    assert said == [
        "duration: '2 epochs' stays 13 steps, by the 100 records with which the run was begun; by what the data has "
        "now it would be 19"
    ]
    with pytest.raises(UserError, match="'2 epochs' of the data as it is now are 3 steps, and the run is at step 5;"):
        _as_begun(fewer, ONE, records=20, start=5)


@pytest.mark.full
@pytest.mark.parametrize("records", [150, 20])
def test_a_run_of_epochs_on_changed_data_goes_on_to_the_step_where_it_was_to_end(records, tmp_path, capsys):
    folder = shards.write_several(tmp_path / "data", shards=2, records=50)
    config = dataclasses.replace(config_of(f"wds:{folder}", accept_changes=True), **EPOCHS)
    run = tmp_path / "run"
    train(config, run, devices=ONE, preempted=lambda step: step == 6)
    shutil.rmtree(folder)
    shards.write_several(folder, shards=1, records=records)
    train(config, run, devices=ONE, preempted=lambda step: step == 9)
    assert "duration: '2 epochs' stays 13 steps, by the 100 records" in capsys.readouterr().err
    train(config, run, devices=ONE)
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 4, 6, 8, 10, 12, 13]
    assert lines[-1]["learning_rate"] == pytest.approx(1e-3 * (1 + np.cos(np.pi * 10 / 11)) / 2, rel=1e-5)


@pytest.mark.parametrize("pattern", ["{tmp}/other/*.tar", "{tmp}/other/{{00001,00000}}.tar"])
def test_a_run_whose_shards_have_moved_or_are_named_in_another_order_reads_the_same(whole, tmp_path, pattern):
    shutil.copytree(whole / "data", tmp_path / "other")
    run = half_way(whole, tmp_path / "run")
    spec = "wds:" + pattern.format(tmp=tmp_path)
    train(config_of(spec, steps_between=3), run, devices=ONE)
    assert losses(run) == losses(whole / "run")
    assert json.loads((run / "config.json").read_text())["config"]["data"]["train"] == spec


def test_storage_that_does_not_answer_at_once_is_asked_again(tmp_path, monkeypatch):
    folder = shards.write_several(tmp_path / "data", shards=1, records=20)
    config, source = reading(folder)
    pairs = training_pairs(config, ARCH, None, source, rows=range(16))
    failures = iter([OSError("stale"), OSError("stale"), None] * 100)
    genuine = storage.read

    def flaky(*arguments, **named):
        if error := next(failures):
            raise error
        return genuine(*arguments, **named)

    def gone(*_, **__):
        raise OSError("for good")

    monkeypatch.setattr(storage, "RETRIES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(storage, "read", flaky)
    assert all(pairs[i].batch.valid for i in range(20))
    monkeypatch.setattr(storage, "read", gone)
    assert [int(pairs[i].problem) for i in range(3)] == [12] * 3


# --- what happens to processes ---


@pytest.mark.full
def test_a_worker_that_is_killed_ends_the_run_with_words(tmp_path):
    folder = shards.write_several(tmp_path / "data", shards=2, records=50)
    config = config_of(f"wds:{folder}", num_workers=1)
    config = dataclasses.replace(config, duration="1_000_000 steps")

    def kill() -> None:
        for _ in range(600):
            time.sleep(0.1)
            if (tmp_path / "run" / "metrics.jsonl").exists() and read_lines(tmp_path / "run" / "metrics.jsonl"):
                break
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(UserError, match=r"a worker process that reads data has died .*exit code -9") as stopped:
        train(config, tmp_path / "run", devices=ONE)
    killer.join()
    assert "lower data.num_workers=1" in str(stopped.value)
    assert not multiprocessing.active_children()
