"""The index of a shard: which records count, where they lie, why others do not; made once, and by whoever comes."""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
import shards
from PIL import Image
from tar_shards import CHOICE, Files, looked_up, picture, records, shard, tar_of

from clip_jax.data import captions, index_file, shard_index, sources, storage, tar
from clip_jax.data.shard_index import Choice, ShardIndex, Summary
from clip_jax.data.sources import open_source
from clip_jax.data.storage import File
from clip_jax.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The folder for indexes that cannot lie beside their shards."""
    monkeypatch.setenv(index_file.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def scans(monkeypatch) -> list[str]:
    """The shards that were read, as often as they were."""
    read, scan = [], shard_index.scan

    def counted(shard: File, choice: Choice):
        read.append(shard.path)
        return scan(shard, choice)

    monkeypatch.setattr(shard_index, "scan", counted)
    return read


def choice(**fields) -> Choice:
    return dataclasses.replace(CHOICE, **fields)


def index_of(shard: File, choice: Choice = CHOICE) -> tuple[ShardIndex, Summary]:
    [(path, summary)] = shard_index.find_or_make([shard], choice)
    return ShardIndex(path, summary.records), summary


def contents(shard: File, index: ShardIndex) -> dict[str, list[bytes | None]]:
    """Returns what the index says that each record has, by its key."""
    data = Path(shard.path).read_bytes()
    found = {}
    for row in range(len(index.check)):
        spans = [(int(block[row]) * tar.BLOCK, int(size[row])) for block, size in columns(index)]
        found[index.key(row)] = [data[start : start + size] if start else None for start, size in spans]
    return found


def columns(index: ShardIndex) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(zip(index.blocks, index.sizes, strict=True))


def seen(tmp_path: Path, files: Files, choice: Choice = CHOICE) -> tuple[dict[str, list[bytes | None]], dict[str, int]]:
    """Returns (what records have, how many are left out by reason) of a shard with these files."""
    one = shard(tmp_path / "shard.tar", files)
    index, summary = index_of(one, choice)
    found = contents(one, index)
    assert len(found) == summary.records
    assert summary.image_bytes == sum(len(image) for image, *_ in found.values())
    return found, summary.left_out


def left_out(tmp_path: Path, *files: tuple[str, bytes], **fields) -> dict[str, int]:
    """Returns why a record is left out; one that is good lies before it and one after, and both count."""
    found, reasons = seen(tmp_path, [*records(1), *files, *records(1, first=9)], choice(**fields))
    assert list(found) == ["00000", "00009"]
    return reasons


# --- made once ---


def test_an_index_is_made_once_and_lies_beside_its_shard(tmp_path, scans):
    one = shard(tmp_path / "00000.tar", records(3))
    [(path, summary)] = shard_index.find_or_make([one], CHOICE)
    assert path == tmp_path / f"00000.tar.{CHOICE.tag()}.index"
    before = path.stat().st_mtime_ns
    assert shard_index.find_or_make([one], CHOICE) == [(path, summary)]
    assert shard_index.find(one, CHOICE) == (path, summary)
    assert shard_index.summary_of(path, one) == summary == Summary(3, summary.image_bytes, {}, None, {})
    assert scans == [one.path]
    assert path.stat().st_mtime_ns == before


def test_only_what_is_missing_is_made_and_all_come_in_their_order(tmp_path, scans):
    shards = [shard(tmp_path / f"{i}.tar", records(i + 1)) for i in range(6)]
    shard_index.find_or_make(shards[1:4], CHOICE)
    assert sorted(scans) == [one.path for one in shards[1:4]]
    assert [summary.records for _, summary in shard_index.find_or_make(shards, CHOICE)] == [1, 2, 3, 4, 5, 6]
    assert sorted(scans) == [one.path for one in shards]


def test_an_index_is_made_anew_when_the_shard_has_another_size(tmp_path, scans):
    path = tmp_path / "0.tar"
    index_of(shard(path, records(3)))
    status = path.stat()
    path.write_bytes(tar_of(records(30)))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert index_of(looked_up(path))[1].records == 30
    assert len(scans) == 2


def test_an_index_is_made_anew_when_the_shard_has_another_time(tmp_path, scans):
    path = tmp_path / "0.tar"
    one = shard(path, records(3))
    index_of(one)
    path.write_bytes(path.read_bytes().replace(b"caption 1", b"\xff" * 9))
    os.utime(path, ns=(0, int(one.stamp) + 1))
    now = looked_up(path)
    assert now.size == one.size
    assert index_of(now)[1].left_out == {"caption is not UTF-8": 1}
    assert len(scans) == 2


def test_where_a_shards_folder_cannot_be_written_the_index_is_in_the_cache_folder(tmp_path, cache, scans):
    """A folder with something in it has the index's name: that stops root, too, for whom all files are writable."""
    one = shard(tmp_path / "0.tar", records(2))
    (tmp_path / f"0.tar.{CHOICE.tag()}.index" / "something").mkdir(parents=True)
    for _ in range(2):
        [(path, summary)] = shard_index.find_or_make([one], CHOICE)
        assert path.parent == cache
        assert summary.records == 2
    assert len(scans) == 1
    path.unlink()
    cache.rmdir()
    cache.write_bytes(b"a file")
    with pytest.raises(UserError, match=r"^cannot write \S+/cache/\S+\.index: .*; or name a folder in CLIP_JAX_INDEX"):
        shard_index.find_or_make([one], CHOICE)


@pytest.mark.parametrize(
    "other",
    [
        {"image_keys": ("png", "jpg")},
        {"caption_keys": ("json.caption",)},
        {"min_image_size": 100},
        {"max_image_pixels": 36},
    ],
)
def test_two_choices_of_records_have_indexes_that_do_not_disturb_each_other(other, tmp_path, scans):
    texts = [(f"{i:05}.json", json.dumps({"caption": f"other {i}"}).encode()) for i in range(2)]
    one = shard(tmp_path / "0.tar", sorted([*records(2), *texts]))
    choices = [CHOICE, choice(**other)]
    made = [shard_index.find_or_make([one], each) for each in choices]
    assert [shard_index.find_or_make([one], each) for each in choices] == made
    assert len(scans) == 2
    assert len({path for [(path, _)] in made}) == 2
    kept = 0 if "image_size" in str(other) else 1 if "pixels" in str(other) else 2
    assert [summary.records for [(_, summary)] in made] == [2, kept]


def test_a_damaged_index_is_made_anew(tmp_path, scans):
    one = shard(tmp_path / "0.tar", records(3))
    [(path, summary)] = shard_index.find_or_make([one], CHOICE)
    good = path.read_bytes()
    for content in (
        b"",
        good[:-1],
        good[: len(good) // 2],
        bytes(len(good)),
        good.replace(b'"records": 3', b'"records": 4'),
    ):
        path.unlink()
        path.write_bytes(content)
        assert shard_index.find(one, CHOICE) is None
        assert shard_index.find_or_make([one], CHOICE) == [(path, summary)]
        assert path.read_bytes() == good
    assert len(scans) == 6


def test_a_byte_of_an_index_may_be_another_and_no_worse_than_a_word_comes_of_it(tmp_path):
    one = shard(tmp_path / "0.tar", records(3))
    [(path, summary)] = shard_index.find_or_make([one], CHOICE)
    good, seen = path.read_bytes(), set()
    for at in range(0, len(good), 5):
        path.unlink()  # not written over: it may be mapped
        path.write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])
        found = shard_index.find(one, CHOICE)
        assert found in (None, (path, summary))
        try:
            index = ShardIndex(path, summary.records) if found else None
        except UserError as error:
            seen.add(str(error))
        else:
            assert index is None or all(len(index.key(row)) < 100 for row in range(3))
    assert seen == {f"{path} is damaged; delete it, so that it is made anew"}


# --- by whom ---


def in_processes(monkeypatch) -> None:
    monkeypatch.setattr(shard_index, "FEW_BYTES", 0)


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.index")}


def test_processes_make_the_same_indexes_as_one(tmp_path, monkeypatch):
    strange = [("x.png", b"no image"), ("x.txt", b"words"), ("caf\udce9.png", picture()), ("caf\udce9.txt", b"coffee")]
    shards = [shard(tmp_path / f"{i}.tar", [*records(3 + i), *strange[: 2 * (i % 3)]]) for i in range(4)]
    alone = shard_index.find_or_make(shards, CHOICE)
    files = written(tmp_path)
    assert len(files) == 4
    for path, _ in alone:
        path.unlink()
    in_processes(monkeypatch)
    assert shard_index.find_or_make(shards, CHOICE) == alone
    assert written(tmp_path) == files


def test_two_runs_that_start_at_once_make_the_same_indexes(tmp_path):
    shards = [shard(tmp_path / f"{i}.tar", records(2 + i)) for i in range(8)]
    code = f"""
import sys
from clip_jax.data import shard_index, storage
from clip_jax.data.shard_index import Choice
shards = storage.look_up({[one.path for one in shards]})
print("here", flush=True)
sys.stdin.readline()
print([summary.records for _, summary in shard_index.find_or_make(shards, {CHOICE})])
"""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code]
    runs = [subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    assert [run.stdout.readline() for run in runs] == ["here\n"] * 2
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    assert [run.communicate(timeout=60)[0] for run in runs] == [f"{[2 + i for i in range(8)]}\n"] * 2
    assert [run.returncode for run in runs] == [0, 0]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{i}.tar" for i in range(8)} | {f"{i}.tar.{CHOICE.tag()}.index" for i in range(8)}
    assert [summary.records for _, summary in shard_index.find_or_make(shards, CHOICE)] == [2 + i for i in range(8)]


def test_a_process_that_is_killed_is_said_and_what_was_made_stays(tmp_path, monkeypatch):
    in_processes(monkeypatch)
    good = shard(tmp_path / "good.tar", records(2))
    [(path, _)] = shard_index.find_or_make([good], CHOICE)
    pipe = tmp_path / "pipe.tar"
    os.mkfifo(pipe)
    before = multiprocessing.active_children()

    def kill() -> None:
        with pipe.open("wb"):  # which waits until somebody reads it
            for process in multiprocessing.active_children():
                if process not in before:
                    os.kill(process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(UserError, match=r"^a process that read shards.* has died: .*start again: .* so far stays$"):
        shard_index.find_or_make([good, File(str(pipe), 1 << 20, "")], CHOICE)
    killer.join(10)
    assert not killer.is_alive()
    assert shard_index.find(good, CHOICE)[0] == path
    assert [entry.name for entry in tmp_path.glob("*.index")] == [path.name]


def test_an_index_that_is_let_go_of_is_in_memory_no_more_and_says_the_same(tmp_path):
    one = shard(tmp_path / "0.tar", records(50))
    index, _ = index_of(one)
    before = contents(one, index)
    held = held_of(tmp_path)
    index.let_go()
    assert held_of(tmp_path) < held
    assert contents(one, index) == before


def held_of(folder: Path) -> int:
    """Returns how many bytes of the indexes there this process has in memory."""
    held, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            counts = line.endswith(".index") and str(folder) in line
        elif first == "Rss:" and counts:
            held += int(rest[0]) * 1024
    return held


def test_where_there_are_more_indexes_than_may_be_held_records_are_the_same(tmp_path, monkeypatch):
    source = open_source(f"wds:{shards.write_several(tmp_path / 'shards', shards=3, records=5)}")
    before = [source[i] for i in range(15)]
    monkeypatch.setattr(sources.shards, "MAX_HELD", 0)
    assert [source[i] for i in range(15)] == before
    assert held_of(tmp_path) == 0


def test_pandas_is_not_imported_for_an_index(tmp_path):
    """It takes each process a quarter of a second and 45 MB."""
    shards.write_several(tmp_path, shards=1, records=3)
    words = (
        "import sys; from clip_jax.data.sources import open_source; "
        f"source = open_source('wds:{tmp_path}'); source[0]; sys.exit('pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", words], cwd=ROOT, check=False).returncode == 0


def test_a_shard_that_cannot_be_read_is_said_after_some_patience(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "RETRIES", (0.0, 0.0))
    tries = []

    def fail(*_) -> None:
        tries.append(1)
        raise OSError("Input/output error")

    one = shard(tmp_path / "0.tar", records(1))
    monkeypatch.setattr(shard_index.tar, "members", fail)
    with pytest.raises(UserError, match=r"^\S+/0\.tar cannot be read: Input/output error$"):
        shard_index.find_or_make([one], CHOICE)
    assert len(tries) == 3
    assert not list(tmp_path.glob("*.index"))
    with pytest.raises(UserError, match=r"^\S+/none\.tar cannot be read: No such file or directory$"):
        shard_index.find_or_make([File(str(tmp_path / "none.tar"), 1024, "")], CHOICE)


def test_a_shard_is_read_once_and_forwards(tmp_path, monkeypatch):
    """Only then it comes over a network as fast as it can."""
    reader, starts, sizes = storage.reader, [], []

    @contextlib.contextmanager
    def noted(shard: File):
        with reader(shard) as read:
            yield lambda start, size: starts.append(start) or sizes.append(size) or read(start, size)

    monkeypatch.setattr(storage, "reader", noted)
    one = shard(tmp_path / "0.tar", records(50))
    assert index_of(one)[1].records == 50
    assert starts == sorted(set(starts))
    assert sum(sizes) < one.size


# --- behind a URL ---


@pytest.fixture
def remote(tmp_path) -> File:
    url = f"memory://{tmp_path.name}/0.tar"
    system = fsspec.filesystem("memory")
    system.pipe_file(url, tar_of(records(3)))
    system.pipe_file(url.replace(".tar", "_stats.json"), json.dumps({"count": 5, "successes": 3}).encode())
    yield looked_up(url)
    system.rm(f"memory://{tmp_path.name}", recursive=True)


def test_the_index_of_a_shard_behind_a_url_is_that_of_a_local_one(remote, tmp_path):
    (tmp_path / "0_stats.json").write_bytes(json.dumps({"count": 5, "successes": 3}).encode())
    local = shard(tmp_path / "0.tar", records(3))
    tables = [shard_index.scan(one, CHOICE) for one in (remote, local)]
    assert tables[0][0].equals(tables[1][0])
    assert tables[0][1] == tables[1][1]
    assert tables[0][1].downloads == {"count": 5, "successes": 3}


def test_an_index_is_put_beside_a_shard_behind_a_url_and_fetched_by_the_next_host(
    remote, cache, tmp_path, monkeypatch, scans
):
    [(path, summary)] = shard_index.find_or_make([remote], CHOICE)
    assert path.parent == cache
    assert storage.read(f"{remote.path}.{CHOICE.tag()}.index") == path.read_bytes()
    monkeypatch.setenv(index_file.CACHE, str(tmp_path / "another host"))
    [(fetched, same)] = shard_index.find_or_make([remote], CHOICE)
    assert (fetched.parent, same) == (tmp_path / "another host", summary)
    assert scans == [remote.path]


# --- what img2dataset says ---


def stats(tmp_path: Path, content: bytes) -> Summary:
    (tmp_path / "00000_stats.json").write_bytes(content)
    return index_of(shard(tmp_path / "00000.tar", records(3)))[1]


def test_img2datasets_counts_are_taken_over(tmp_path):
    said = {"count": 9, "successes": 3, "failed_to_download": 5, "failed_to_resize": 1}
    more = {"duration": 1.5, "status_dict": {"success": 3}, "start_time": "x"}
    assert stats(tmp_path, json.dumps(said | more).encode()) == Summary(
        3, stats(tmp_path, b"").image_bytes, {}, None, said
    )


def test_a_shard_with_fewer_records_than_were_counted_is_broken(tmp_path):
    summary = stats(tmp_path, b'{"count": 7, "successes": 5}')
    assert summary.broken == "has 3 of the 5 records that its _stats.json counts"
    assert summary.records == 3


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b'"text"', b"\xff", b'{"count": "many"}'])
def test_counts_that_cannot_be_read_are_none(content, tmp_path):
    summary = stats(tmp_path, content)
    assert (summary.records, summary.broken, summary.downloads) == (3, None, {})


def test_a_record_that_is_left_out_is_not_missing(tmp_path):
    (tmp_path / "0_stats.json").write_bytes(b'{"successes": 2}')
    files = [*records(1), ("x.png", b"no image"), ("x.txt", b"words")]
    assert index_of(shard(tmp_path / "0.tar", files))[1].broken is None


# --- what is left out ---

TEXTS = {
    "no caption": (b"", b" \t\r\n ", "\u3000\u00a0".encode()),
    "caption is not UTF-8": (b"caf\xe9", b"\xff\xfea\0", b"half \xe5\x86"),
    "caption over 64 KiB": (b"a" * (captions.LONGEST + 1), b"a" * (1 << 20)),
}


@pytest.mark.parametrize(("reason", "text"), [(reason, text) for reason, texts in TEXTS.items() for text in texts])
def test_a_caption_that_is_none_is_a_reason(reason, text, tmp_path):
    assert left_out(tmp_path, ("x.png", picture()), ("x.txt", text)) == {reason: 1}


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        *[("no caption", text) for text in ("", " \n", None, 5, [], {}, ["", " "], [1])],
        ("caption over 64 KiB", "a" * (captions.LONGEST + 1)),
        ("caption is not UTF-8", "half \ud83d"),
    ],
)
def test_a_caption_in_json_that_is_none_is_a_reason_too(reason, text, tmp_path):
    files = [("0.png", picture()), ("0.json", json.dumps({"caption": text}).encode())]
    files += [("1.png", picture()), ("1.json", b'{"caption": "good"}')]
    found, reasons = seen(tmp_path, files, choice(caption_keys=("json.caption",)))
    assert (list(found), reasons) == (["1"], {reason: 1})


def test_a_caption_of_64_kib_is_kept(tmp_path):
    text = b"a" * captions.LONGEST
    found, reasons = seen(tmp_path, [("x.png", picture()), ("x.txt", text)])
    assert (found, reasons) == ({"x": [picture(), text]}, {})


@pytest.mark.parametrize("text", ["漢字 🐈".encode(), b"x", b"\xef\xbb\xbfwith a BOM", b"a\0b"])
def test_a_caption_may_be_any_text(text, tmp_path):
    assert seen(tmp_path, [("x.png", picture()), ("x.txt", text)]) == ({"x": [picture(), text]}, {})


BOMB = bytearray(picture(1, 1))
BOMB[16:24] = struct.pack(">II", 30_000, 30_000)
BOMB[29:33] = struct.pack(">I", zlib.crc32(BOMB[12:29]))


@pytest.mark.parametrize(
    ("reason", "image"),
    [
        ("not an image", b""),
        ("not an image", b"<!DOCTYPE html><html><body>404</body></html>" * 200),
        ("not an image", picture()[:20]),
        ("not an image", b"\xff\xd8\xff" + bytes(30_000)),
        ("image too small", picture(19, 100)),
        ("image too small", picture(100, 19)),
        ("image over the pixel limit", picture(100, 101)),
        ("image over the pixel limit", bytes(BOMB)),
    ],
    ids=["empty", "HTML", "cut in its header", "JPEG of zeros", "narrow", "low", "too many", "30,000 x 30,000"],
)
def test_an_image_that_is_none_or_of_a_size_that_is_not_wanted_is_a_reason(reason, image, tmp_path):
    limits = choice(min_image_size=20)
    good = [("a.png", picture(20, 500)), ("a.txt", b"good"), ("z.png", picture(100, 100)), ("z.txt", b"good")]
    found, reasons = seen(tmp_path, [*good[:2], ("x.png", image), ("x.txt", b"words"), *good[2:]], limits)
    assert (list(found), reasons) == (["a", "z"], {reason: 1})


def test_an_image_whose_size_stands_behind_much_else_is_kept(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "a description " * 1500
    image = picture(31, 17, "JPEG", exif=exif)
    assert image.index(b"\xff\xc0") > 20_000 > shard_index.HEAD
    one = shard(tmp_path / "0.tar", [("x.jpg", image), ("x.txt", b"words")])
    index, summary = index_of(one)
    assert (summary.records, summary.left_out) == (1, {})
    assert contents(one, index) == {"x": [image, b"words"]}
    limited = choice(max_image_pixels=31 * 17 - 1)
    assert index_of(one, limited)[1].left_out == {"image over the pixel limit": 1}


def test_a_record_without_an_image_or_without_a_caption_is_left_out(tmp_path):
    assert left_out(tmp_path, ("x.txt", b"words")) == {"no image": 1}
    assert left_out(tmp_path, ("x.png", picture())) == {"no caption": 1}
    assert left_out(tmp_path, ("x.gif", picture()), ("x.txt", b"words")) == {"no image": 1}
    assert left_out(tmp_path, ("x.png", picture()), ("x.caption", b"words")) == {"no caption": 1}


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_json_that_cannot_be_read_is_a_reason_where_captions_are_in_it(content, tmp_path):
    files = [("x.json", content), ("x.png", picture()), ("x.txt", b"words")]
    found, reasons = seen(tmp_path, files, CHOICE)
    assert (list(found), reasons) == (["x"], {})
    found, reasons = seen(tmp_path, files, choice(caption_keys=("json.caption",)))
    assert (list(found), reasons) == ([], {"JSON cannot be read": 1})


@pytest.mark.parametrize("status", [None, 1, 200, True, ["failed"]])
def test_a_status_that_is_no_word_is_somebody_elses(status, tmp_path):
    files = [("x.json", json.dumps({"status": status}).encode()), ("x.png", picture()), ("x.txt", b"w")]
    found, reasons = seen(tmp_path, files, CHOICE)
    assert (list(found), reasons) == (["x"], {})


@pytest.mark.parametrize("status", ["failed_to_download", "failed_to_resize"])
def test_a_status_that_is_no_success_is_a_reason(status, tmp_path):
    content = json.dumps({"status": status}).encode()
    assert left_out(tmp_path, ("x.json", content), ("x.png", picture()), ("x.txt", b"w")) == {
        "status is not success": 1
    }
    assert left_out(tmp_path, ("y.json", content)) == {"status is not success": 1}


def test_a_status_of_success_or_none_is_fine(tmp_path):
    files = [("a.json", b'{"status": "success"}'), ("a.png", picture()), ("a.txt", b"a")]
    files += [("b.json", b"{}"), ("b.png", picture()), ("b.txt", b"b")]
    assert list(seen(tmp_path, files)[0]) == ["a", "b"]


@pytest.mark.parametrize("again", ["x.png", "x.txt", "X.PNG", "x.PNG", "x.TXT"])
def test_a_key_twice_is_a_reason_also_when_the_kind_is_written_otherwise(again, tmp_path):
    found, reasons = seen(tmp_path, [("x.png", picture()), ("x.txt", b"1"), *records(1), (again, picture())])
    if again == "X.PNG":  # another key
        assert (list(found), reasons) == (["x", "00000"], {"no caption": 1})
    else:
        assert (list(found), reasons) == (["00000"], {"a key twice in one shard": 1})


def test_reasons_are_counted(tmp_path):
    files = [(f"{i}.png", b"none") for i in range(5)] + [(f"{i}.txt", b"words") for i in range(8)]
    assert left_out(tmp_path, *files) == {"not an image": 5, "no image": 3}


def test_a_shard_that_is_cut_short_has_the_records_before_the_cut(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(tar_of(records(4))[:-10_240])
    summary = index_of(looked_up(path))[1]
    whole = tar_of(records(4))
    with tarfile.open(fileobj=io.BytesIO(whole)) as file:
        last = file.getmembers()[-1]
    path.write_bytes(whole[: last.offset_data + 3])
    summary = index_of(looked_up(path))[1]
    assert (summary.records, summary.left_out) == (3, {"no caption": 1})
    assert summary.broken == "cut short in '00003.txt': 6 bytes are missing"


@pytest.mark.parametrize("content", [b"", bytes(10_240)])
def test_an_empty_shard_has_no_records_and_nothing_is_wrong_with_it(content, tmp_path):
    (tmp_path / "0.tar").write_bytes(content)
    index, summary = index_of(looked_up(tmp_path / "0.tar"))
    assert summary == Summary(0, 0, {})
    assert [len(column) for pair in columns(index) for column in pair] == [0, 0, 0, 0]


# --- what belongs together ---


def test_a_record_is_the_files_of_one_key_wherever_they_are(tmp_path):
    files = records(5)
    for order in (files, files[::-1], files[1::2] + files[::2], files[::2] + files[1::2][::-1]):
        found, reasons = seen(tmp_path, order)
        assert reasons == {}
        assert found == {f"{i:05}": [files[2 * i][1], files[2 * i + 1][1]] for i in range(5)}


def test_records_come_in_the_order_of_their_first_files(tmp_path):
    files = dict(records(3))
    order = ["00002.txt", "00000.png", "00001.txt", "00002.png", "00000.txt", "00001.png"]
    assert list(seen(tmp_path, [(name, files[name]) for name in order])[0]) == ["00002", "00000", "00001"]


@pytest.mark.parametrize(
    ("names", "key"),
    [
        (("a.png", "a.txt"), "a"),
        (("a.PNG", "a.Txt"), "a"),
        (("folder/a.png", "folder/a.txt"), "folder/a"),
        (("./a.png", "./a.txt"), "./a"),
        (("v1.0/a.png", "v1.0/a.txt"), "v1.0/a"),
        (("写真.png", "写真.txt"), "写真"),
        (("caf\udce9.png", "caf\udce9.txt"), "caf\udce9"),
        (("k" * 300 + ".png", "k" * 300 + ".txt"), "k" * 300),
    ],
)
def test_a_key_is_what_comes_before_the_first_dot_of_the_last_part(names, key, tmp_path):
    assert seen(tmp_path, zip(names, (picture(), b"words"), strict=True)) == ({key: [picture(), b"words"]}, {})


@pytest.mark.parametrize("names", [("a.b.png", "a.txt"), ("a/x.png", "b/x.txt"), ("A.png", "a.txt"), ("png", "txt")])
def test_files_of_two_keys_are_no_record(names, tmp_path):
    found, _ = seen(tmp_path, zip(names, (picture(), b"words"), strict=True))
    assert found == {}


def test_webdataset_groups_the_same_files(tmp_path):
    """Where the files of a record follow each other, as it has them."""
    tariterators = pytest.importorskip("webdataset.tariterators")
    files = []
    for name in ("a", "b.c", "dir/d", "v1.5/e", "UP", "f-1_2"):
        files += [(f"{name}.PNG", picture()), (f"{name}.txt", name.encode())]
    files += [("g.seg.png", b"1"), ("g.txt", b"2"), (".hidden.png", b"3"), ("none", b"4")]
    one = shard(tmp_path / "0.tar", files)
    wanted = choice(image_keys=("png", "c.png"), caption_keys=("txt", "c.txt"))
    theirs = {}
    with Path(one.path).open("rb") as stream:
        for sample in tariterators.group_by_keys(tariterators.tar_file_expander([{"url": "", "stream": stream}])):
            texts = [sample.get(kind) for kind in wanted.caption_keys]
            image = next((sample[kind] for kind in wanted.image_keys if kind in sample), None)
            if image and any(texts):
                theirs[sample["__key__"]] = [image, *texts]
    assert contents(one, index_of(one, wanted)[0]) == theirs
    assert len(theirs) == 6


def test_of_several_kinds_of_image_the_first_wanted_counts_and_of_captions_all(tmp_path):
    files = [("x.png", picture(5, 5)), ("x.jpg", picture(6, 6, "JPEG")), ("x.alt", b"two"), ("x.txt", b"one")]
    both = choice(image_keys=("jpg", "png"), caption_keys=("txt", "alt"))
    assert seen(tmp_path, files, both)[0] == {"x": [files[1][1], b"one", b"two"]}
    assert seen(tmp_path, files, choice(image_keys=("png", "jpg")))[0] == {"x": [files[0][1], b"one"]}
    assert seen(tmp_path, files[1:], choice(image_keys=("png", "jpg")))[0] == {"x": [files[1][1], b"one"]}


def test_of_several_captions_those_that_are_none_are_left_away(tmp_path):
    both = choice(caption_keys=("txt", "alt", "json.caption"))
    files = [("x.png", picture()), ("x.txt", b" "), ("x.alt", b"two"), ("x.json", b'{"caption": ""}')]
    assert seen(tmp_path, files, both) == ({"x": [picture(), None, b"two", None]}, {})
    assert seen(tmp_path, files[:2], both) == ({}, {"no caption": 1})


def test_several_fields_of_one_json_file_are_one_file(tmp_path):
    both = choice(caption_keys=("json.caption", "json.alt", "txt"))
    assert both.caption_files == ("json", "txt")
    files = [("x.png", picture()), ("x.json", b'{"alt": "two"}')]
    assert seen(tmp_path, files, both)[0] == {"x": [picture(), b'{"alt": "two"}', None]}


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_limits_of_size_are_met_exactly_whatever_the_format(form, tmp_path):
    files = [("x.jpg", picture(30, 20, form)), ("x.txt", b"words")]
    for limits, reasons in (
        ({"max_image_pixels": 600, "min_image_size": 20}, {}),
        ({"max_image_pixels": 599}, {"image over the pixel limit": 1}),
        ({"min_image_size": 21}, {"image too small": 1}),
    ):
        assert seen(tmp_path, files, choice(**limits))[1] == reasons


def test_a_records_check_changes_with_any_of_its_headers(tmp_path):
    checks = set()
    for name, image, text in [("a", picture(), b"one"), ("b", picture(), b"one"), ("a", picture(), b"longer")]:
        index, _ = index_of(shard(tmp_path / "0.tar", [(f"{name}.png", image), (f"{name}.txt", text)]))
        checks.add(int(index.check[0]))
    assert len(checks) == 3
