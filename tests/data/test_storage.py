"""Files by path or URL: what a pattern names, the same bytes wherever they lie, patience, and words when it ends."""

import collections
import contextlib
import dataclasses
import http.server
import importlib.util
import os
import random
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from fsspec.registry import known_implementations

from clip_jax.data import storage
from clip_jax.errors import UserError

CONTENT = random.Random(0).randbytes(200_000)
ONCE = 2  # requests of a look-up that fails: HEAD, and GET


@dataclasses.dataclass
class Behaviour:
    """How the server answers a request."""

    status: int = 200
    hangs_up: bool = False  # before it says anything
    most: int | None = None  # bytes of the body after which it hangs up
    ranges: bool = True  # honours Range
    length: bool = True  # says how much will come


class Server(http.server.ThreadingHTTPServer):
    """Gives its files, in the ways that are listed first, the last one for ever; notes what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {"/folder/file.tar": CONTENT}
        self.behaviours = [Behaviour()]
        self.asked: list[tuple[str, str]] = []
        self.lock = threading.Lock()

    def url(self, path: str = "/folder/file.tar") -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def take(self, method: str, path: str) -> Behaviour:
        with self.lock:
            self.asked.append((method, path))
            return self.behaviours.pop(0) if len(self.behaviours) > 1 else self.behaviours[0]


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        behaviour = self.server.take(self.command, self.path)
        if behaviour.hangs_up:
            return
        content = self.server.files.get(self.path)
        status = behaviour.status if content is not None else 404
        body, asked = content or b"", re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        if status == 200 and asked and behaviour.ranges:
            status, (first, last) = 206, map(int, asked.groups())
            body = body[first : last + 1]
        self.send_response(status)
        body = body if status in (200, 206) else b""
        if behaviour.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(ConnectionError):  # the client may be gone
                self.wfile.write(body[: behaviour.most])


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(storage, "RETRIES", (0.0, 0.0))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def memory(tmp_path) -> Iterator[str]:
    """A folder behind a URL, in this process."""
    url = f"memory://{tmp_path.name}"
    yield url
    system = fsspec.filesystem("memory")
    if system.exists(url):
        system.rm(url, recursive=True)


@pytest.fixture(params=["local", "memory", "http"])
def place(request, tmp_path) -> str:
    """Where the content lies."""
    if request.param == "http":
        return request.getfixturevalue("server").url()
    if request.param == "memory":
        path = f"{request.getfixturevalue('memory')}/file.tar"
        fsspec.filesystem("memory").pipe_file(path, CONTENT)
        return path
    (tmp_path / "file.tar").write_bytes(CONTENT)
    return str(tmp_path / "file.tar")


def expand(pattern: str) -> list[str]:
    return storage.expand(pattern, ".tar")


# --- what a pattern names ---


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{000..012}.tar", [f"{i:03}.tar" for i in range(13)]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{7..7}", ["7"]),
        ("{a,b}/x", ["a/x", "b/x"]),
        ("{a,b}{0..1}{x,y}", ["a0x", "a0y", "a1x", "a1y", "b0x", "b0y", "b1x", "b1y"]),
        ("a{,.old}.tar", ["a.tar", "a.old.tar"]),
        ("a.tar", ["a.tar"]),
        ("half{open.tar", ["half{open.tar"]),
        ("s3://bucket/{00..02}.tar", [f"s3://bucket/0{i}.tar" for i in range(3)]),
    ],
)
def test_braces_name_what_there_should_be_each_for_every_other(pattern, names, monkeypatch):
    monkeypatch.setattr(storage, "system_of", lambda url: (None, url))  # nobody is asked
    assert expand(pattern) == names


def test_braces_that_count_down_are_refused():
    with pytest.raises(UserError, match=r"^\{5\.\.3\} in 'a\{5\.\.3\}' counts down; write the smaller number first$"):
        expand("a{5..3}")


def test_a_folder_is_its_tars_and_a_glob_what_it_finds_both_in_order(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in ("b.tar", "a.tar", "10.tar", "a.txt", "inner/c.tar"):
        (tmp_path / name).touch()
    tars = [str(tmp_path / name) for name in ("10.tar", "a.tar", "b.tar")]
    assert expand(str(tmp_path)) == expand(f"{tmp_path}/") == tars
    assert expand(f"{tmp_path}/*.tar") == tars
    assert expand(f"{tmp_path}/[ab].tar") == expand(f"{tmp_path}/{{a,b}}.tar") == tars[1:]
    assert expand(f"{tmp_path}/**/*.tar") == [*tars, str(tmp_path / "inner/c.tar")]
    assert expand(f"{tmp_path}/*.t?t") == [str(tmp_path / "a.txt")]
    assert expand(f"{{{tmp_path}/inner,{tmp_path}}}") == [str(tmp_path / "inner/c.tar"), *tars]


def test_the_home_folder_may_be_written_short(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.tar").touch()
    assert expand("~") == expand("~/a.tar") == expand("~/*.tar") == [str(tmp_path / "a.tar")]


def test_a_file_that_is_there_is_no_glob(tmp_path):
    (tmp_path / "a[1].tar").touch()
    (tmp_path / "a1.tar").touch()
    assert expand(f"{tmp_path}/a[1].tar") == [f"{tmp_path}/a[1].tar"]


@pytest.mark.parametrize("pattern", ["{folder}/{{a,a}}.tar", "{{{folder},{folder}/a.tar}}", "{folder}/{{a,*}}.tar"])
def test_a_file_that_is_named_twice_is_refused(pattern, tmp_path):
    (tmp_path / "a.tar").touch()
    with pytest.raises(UserError, match=r"names \S*/a\.tar twice; name each file once$"):
        expand(pattern.format(folder=tmp_path))


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/[0-9].tar"])
def test_a_pattern_that_names_nothing_is_refused(pattern, tmp_path):
    with pytest.raises(UserError, match=r"names no file; write a file, a folder of \*\.tar, a glob, or \{000\.\.127\}"):
        expand(f"{tmp_path}{pattern}")


def test_behind_a_url_folders_and_globs_are_looked_up_too(memory):
    for name in ("b.tar", "a.tar", "a.txt", "inner/c.tar"):
        fsspec.filesystem("memory").pipe_file(f"{memory}/{name}", b"")
    names = [storage.name_of(path) for path in expand(memory)]
    assert names == ["a.tar", "b.tar"]
    assert [storage.name_of(path) for path in expand(f"{memory}/*.tar")] == names
    assert [storage.name_of(path) for path in expand(f"{memory}/{{inner/c,b}}.tar")] == ["c.tar", "b.tar"]
    assert all(file.size == 0 for file in storage.look_up(expand(memory)))
    with pytest.raises(UserError, match="names no file"):
        expand(f"{memory}/*.zip")


# --- which files there are ---


def test_files_are_looked_up_with_their_sizes_in_order(place):
    assert [(file.path, file.size) for file in storage.look_up([place])] == [(place, len(CONTENT))]


def test_a_local_file_that_is_written_anew_has_another_stamp(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"one")
    [before] = storage.look_up([str(path)])
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert storage.look_up([str(path)]) != [before]


@pytest.mark.parametrize("kind", ["local", "memory", "http"])
def test_files_that_are_not_there_are_named(kind, tmp_path, memory, server):
    folder = {"local": str(tmp_path), "memory": memory, "http": server.url("/folder")}[kind]
    (tmp_path / "1.tar").touch()
    (tmp_path / "4.tar").touch()
    for name in ("1.tar", "4.tar"):
        fsspec.filesystem("memory").pipe_file(f"{memory}/{name}", b"")
        server.files[f"/folder/{name}"] = b""
    missing = ", ".join(f"{folder}/{i}.tar" for i in (0, 2, 3))
    with pytest.raises(UserError, match=rf"^3 of 5 files are not there: {re.escape(missing)}$"):
        storage.look_up(expand(f"{folder}/{{0..4}}.tar"))
    with pytest.raises(UserError, match=r"^6 of 6 files are not there: .*/9\.tar …$"):
        storage.look_up(expand(f"{folder}/{{5..10}}.tar"))


def test_a_file_that_cannot_be_looked_up_is_not_called_missing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}/file/a\.tar cannot be read: Not a directory$"):
        storage.look_up([f"{tmp_path}/file/a.tar"])


def test_a_server_that_does_not_say_how_large_a_file_is_cannot_be_used(server):
    server.behaviours = [Behaviour(length=False)]
    with pytest.raises(UserError, match=r"the server of http\S*/file\.tar does not say how large it is"):
        storage.look_up([server.url()])


# --- reading ---


@pytest.mark.parametrize("part", [(0, 10), (512, 1), (100, 100_000), (len(CONTENT) - 7, 7), (0, len(CONTENT))])
def test_any_part_is_the_files_own_wherever_it_lies(part, place):
    start, size = part
    assert storage.read(place, start, size) == CONTENT[start : start + size]


def test_the_whole_is_the_files_own_wherever_it_lies(place):
    assert storage.read(place) == storage.read_if_there(place) == CONTENT


def test_at_the_end_there_is_less_and_never_something_else(place):
    assert storage.read(place, len(CONTENT) - 10, 50) == CONTENT[-10:]


def test_a_file_is_read_from_its_beginning_to_its_end_with_parts_skipped(place, monkeypatch):
    monkeypatch.setattr(storage, "BLOCK", 10_000)
    [file] = storage.look_up([place])
    parts = [(0, 512), (512, 512), (2048, 30_000), (60_000, 1), (150_000, 50_000)]
    with storage.reader(file) as read:
        assert [read(*part) for part in parts] == [CONTENT[start : start + size] for start, size in parts]
    with storage.opened(file) as stream:
        assert stream.read() == CONTENT


def test_parts_that_lie_close_together_are_read_at_once_in_whatever_order(tmp_path, monkeypatch):
    (tmp_path / "file.tar").write_bytes(CONTENT)
    [file] = storage.look_up([str(tmp_path / "file.tar")])
    reads, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *part: reads.append(part) or pread(*part))
    numbers, at, parts = random.Random(0), 0, []
    for _ in range(200):
        at = (at + numbers.randrange(2000)) % len(CONTENT)
        parts.append((at, numbers.randrange(1000)))
    with storage.reader(file) as read:
        assert [read(*part) for part in parts] == [CONTENT[start : start + size] for start, size in parts]
    assert len(reads) < len(parts) / 5


def test_of_a_file_that_is_not_there_nothing_is_read(place):
    assert storage.read_if_there(place.replace("file.tar", "other.tar")) is None
    with pytest.raises(FileNotFoundError):
        storage.read(place.replace("file.tar", "other.tar"), 0, 10)


def test_a_file_is_put_behind_a_url_where_that_is_allowed(memory, server):
    assert storage.offer(f"{memory}/new/a.index", b"index")
    assert storage.read(f"{memory}/new/a.index") == b"index"
    assert not storage.offer(server.url("/folder/a.index"), b"index")


# --- patience ---

TROUBLES = {
    "error": Behaviour(status=500),
    "busy": Behaviour(status=503),
    "hangs up": Behaviour(hangs_up=True),
    "half": Behaviour(most=100),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_server_is_asked_again_until_it_answers(trouble, server):
    server.behaviours = [TROUBLES[trouble], TROUBLES[trouble], Behaviour()]
    assert storage.read_if_there(server.url()) == CONTENT
    assert len(server.asked) == 3
    server.behaviours = [TROUBLES[trouble], TROUBLES[trouble], Behaviour()]
    assert storage.patiently(lambda: storage.read(server.url(), 100, 1000)) == CONTENT[100:1100]


@pytest.mark.parametrize("trouble", ["error", "busy", "hangs up"])
def test_a_file_is_not_called_missing_because_its_server_is_in_trouble(trouble, server):
    server.behaviours = [TROUBLES[trouble]] * (2 * ONCE) + [Behaviour()]
    assert [file.size for file in storage.look_up([server.url()])] == [len(CONTENT)]


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_server_is_given_up_in_the_end(trouble, server):
    server.behaviours = [TROUBLES[trouble]]
    with pytest.raises(OSError, match=r"\w") as error:
        storage.patiently(lambda: storage.read(server.url(), 100, 1000))
    assert "\n" not in str(error.value)
    own = 2 if trouble == "hangs up" else 1  # tries of aiohttp's own: one at most
    assert 3 <= len(server.asked) <= 3 * own


def test_a_server_that_is_given_up_is_named_with_what_it_says(server):
    server.behaviours = [Behaviour(status=500)]
    with pytest.raises(UserError, match=r"^http\S*/folder/file\.tar cannot be read: 500, .*Internal Server Error"):
        storage.look_up([server.url()])
    assert len(server.asked) == ONCE * (1 + len(storage.RETRIES))


def test_nobody_listening_is_no_missing_file(server):
    port = server.server_port
    server.server_close()
    with pytest.raises(UserError, match=r"^http\S* cannot be read: .*127\.0\.0\.1"):
        storage.look_up([f"http://127.0.0.1:{port}/a.tar"])


@pytest.mark.parametrize("status", [401, 403])
def test_what_may_not_be_read_is_not_asked_for_again(status, server):
    server.behaviours = [Behaviour(status=status)]
    with pytest.raises(PermissionError):
        storage.read_if_there(server.url())
    assert len(server.asked) == 1
    with pytest.raises(UserError, match=f"cannot be read: {status}, "):
        storage.look_up([server.url()])
    assert len(server.asked) == 1 + ONCE


def test_what_is_not_there_is_not_asked_for_again(server):
    assert storage.read_if_there(server.url("/folder/other.tar")) is None
    assert server.asked == [("GET", "/folder/other.tar")]


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError])
def test_of_errors_that_will_stay_there_is_one(error, monkeypatch):
    monkeypatch.setattr(storage, "RETRIES", (0.0, 0.0, 0.0))
    times = []

    def fail() -> None:
        times.append(1)
        raise error("no")

    with pytest.raises(error):
        storage.patiently(fail)
    assert len(times) == 1


def test_it_is_waited_longer_and_longer(monkeypatch):
    waits, calls = [], []
    monkeypatch.setattr(storage.time, "sleep", waits.append)

    def fail() -> None:
        calls.append(1)
        raise OSError("busy")

    with pytest.raises(OSError, match="busy"):
        storage.patiently(fail)
    assert waits == list(storage.RETRIES) == sorted(storage.RETRIES)
    assert len(calls) == 1 + len(waits)


def test_a_server_that_knows_no_parts_gives_an_error_and_never_other_bytes(server, monkeypatch):
    monkeypatch.setattr(storage, "BLOCK", 10_000)
    server.behaviours = [Behaviour(ranges=False)]
    assert storage.read(server.url()) == CONTENT
    with pytest.raises(OSError, match=r"the server of http\S*/file\.tar sends more than the part it is asked for"):
        storage.read(server.url(), 100, 1000)
    [file] = storage.look_up([server.url()])
    with pytest.raises(OSError, match="range requests"), storage.reader(file) as read:  # noqa: PT012
        assert read(0, 512) == CONTENT[:512]
        read(100_000, 512)


# --- what cannot be read at all ---


@pytest.fixture
def cloud(monkeypatch) -> None:
    """A scheme whose package is not installed."""
    known = {"class": "no_such_package.Files", "err": "Install no_such_package\nto read clouds"}
    monkeypatch.setitem(known_implementations, "cloud", known)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("nosuch://bucket/a.tar", "Protocol not known: nosuch"),
        ("cloud://bucket/a.tar", "Install no_such_package to read clouds"),
        ("gs://bucket/a.tar", "Please install gcsfs"),
    ],
)
@pytest.mark.parametrize("call", [expand, lambda url: storage.look_up([url]), storage.read, storage.read_if_there])
def test_a_scheme_that_cannot_be_read_is_said_in_a_line(url, why, call, cloud):
    if url.startswith("gs:") and importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(UserError, match=rf"^{url} cannot be read: {why}") as error:
        call(url)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [OSError("no library"), TypeError("no host"), RuntimeError("no\nlogin")])
def test_a_package_that_cannot_be_used_is_said_in_a_line(error, monkeypatch):
    def fail(scheme: str) -> None:
        raise error

    monkeypatch.setattr(storage, "_system", fail)
    with pytest.raises(UserError, match=r"^strange://a/b\.tar cannot be read: no \w+$"):
        storage.look_up(["strange://a/b.tar"])


# --- open files ---


def open_in(folder: Path) -> list[str]:
    """Returns the files in a folder that this process has open, as often as it has."""
    found = []
    for number in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the listing itself
            found.append(number.readlink())
    return [str(path) for path in found if path.parent == folder]


@pytest.fixture
def files(tmp_path, monkeypatch) -> Callable[[int], list[str]]:
    """Makes so many files, each with its number in it."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("no Linux system folder")
    monkeypatch.setattr(storage, "_OPEN", storage._Open())

    def make(number: int) -> list[str]:
        for i in range(number):
            (tmp_path / f"{i}").write_bytes(b"%06d" % i * 10)
        return [str(tmp_path / f"{i}") for i in range(number)]

    return make


def test_no_more_files_are_kept_open_than_a_process_may_have(files, tmp_path):
    paths = files(storage.MAX_OPEN + 50)
    for path in paths:
        storage.read(path, 0, 6)
    assert len(open_in(tmp_path)) == storage.MAX_OPEN
    for path in paths[-storage.MAX_OPEN :]:
        storage.read(path, 6, 6)
    assert sorted(open_in(tmp_path)) == sorted(paths[-storage.MAX_OPEN :])


def test_threads_read_many_files_in_turn_each_its_own_bytes(files, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MAX_OPEN", 8)
    paths, threads, most = files(40), 6, []

    def read(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(300):
            i, place = chosen.randrange(len(paths)), chosen.randrange(10)
            assert storage.read(paths[i], place * 6, 6) == b"%06d" % i
            if chosen.random() < 0.05:
                most.append(len(open_in(tmp_path)))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))
    assert max(most) <= 8 + 2 * threads  # those in a thread's hand: one that it reads, one that it puts out
    assert len(open_in(tmp_path)) == 8
    assert max(collections.Counter(open_in(tmp_path)).values()) == 1


def test_a_file_that_cannot_be_opened_leaves_nothing_open(files, tmp_path):
    files(1)
    with pytest.raises(FileNotFoundError):
        storage.read(str(tmp_path / "none"), 0, 6)
    assert open_in(tmp_path) == []
