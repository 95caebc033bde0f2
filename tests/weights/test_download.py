"""Released files: fetched once, resumed when cut, never used unchecked, and an error says what to do by hand."""

import ast
import contextlib
import dataclasses
import hashlib
import http.server
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from oracles import package_folder

from clip_jax.errors import UserError
from clip_jax.weights import download
from clip_jax.weights.download import CHUNK, RELEASES, Release, fetch

ROOT = Path(__file__).parents[2]
CONTENT = b"".join(hashlib.sha256(b"%d" % i).digest() for i in range(4 * CHUNK // 32)) + b"the end"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
WRONG = bytes(len(CONTENT))


@dataclasses.dataclass
class Answer:
    """How the server behaves towards one request."""

    content: bytes = CONTENT
    status: int = 200
    ranges: bool = True  # honours Range
    shift: int = 0  # of the part it sends, from the one that was asked for
    most: int | None = None  # bytes of a part
    length: bool = True  # says how much will come
    cut: int | None = None  # bytes of the body after which it hangs up
    drips: tuple[int, float] = (1 << 30, 0.0)  # bytes, and seconds after them
    gate: tuple[int, threading.Event] | None = None  # bytes, and what it waits for after them


class Server(http.server.ThreadingHTTPServer):
    """Gives the answers in their order, the last one for ever, and notes what was asked and how much was sent."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = [Answer()]
        self.ranges: list[str | None] = []  # the Range header of every request
        self.sent = 0
        self.lock = threading.Lock()

    @property
    def release(self) -> Release:
        return Release(f"http://127.0.0.1:{self.server_port}/models/{SHA256}/ViT-B-32.pt")

    def take(self, asked: str | None) -> Answer:
        with self.lock:
            self.ranges.append(asked)
            return self.answers[min(len(self.ranges), len(self.answers)) - 1]


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        answer = self.server.take(asked)
        assert self.path.endswith(f"/{SHA256}/ViT-B-32.pt")
        assert self.headers["Accept-Encoding"] == "identity"
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) + answer.shift if asked and answer.ranges else 0
        status = answer.status
        if status == 200 and start:
            status = 206 if start < len(answer.content) else 416
        self.send_response(status)
        body = answer.content[start:] if status in (200, 206) else b""
        if status == 206:
            body = body[: answer.most]
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(answer.content)}")
        if answer.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client may be gone
            self.send(body[: answer.cut], answer)

    def send(self, body: bytes, answer: Answer) -> None:
        drip, pause = answer.drips
        held, event = answer.gate or (0, None)
        for start in range(0, len(body), min(drip, CHUNK)):
            if event is not None and start >= held and not event.wait(10):
                return
            part = body[start : start + min(drip, CHUNK)]
            self.wfile.write(part)
            with self.server.lock:
                self.server.sent += len(part)
            time.sleep(pause)


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def unused_release(server) -> Release:
    """A file at a port where nobody listens, while the server goes on listening at its own."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can take it
        yield Release(f"http://127.0.0.1:{unused.getsockname()[1]}/models/{SHA256}/ViT-B-32.pt")


def partial_of(folder: Path) -> Path:
    return folder / f".ViT-B-32.pt.{SHA256[:12]}.part"


def visible(folder: Path) -> list[str]:
    """Returns what is in the folder, apart from the lock."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def in_a_process(release: Release, folder: Path) -> subprocess.Popen:
    """Starts a process that says "here" and fetches."""
    code = f"""
from pathlib import Path
from clip_jax.weights.download import Release, fetch
print("here", flush=True)
fetch(Release({release.url!r}), Path({str(folder)!r}))
"""
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_nine_names_urls_and_checksums():
    text = (package_folder("clip", package="clip-anytorch") / "clip.py").read_text(encoding="utf-8")
    tables = [node for node in ast.parse(text).body if isinstance(node, ast.Assign) and node.targets[0].id == "_MODELS"]
    assert [(name, release.url) for name, release in RELEASES.items()] == list(
        ast.literal_eval(tables[0].value).items()
    )


def test_every_release_has_a_file_and_a_checksum_of_its_own():
    assert len(RELEASES) == len({r.sha256 for r in RELEASES.values()}) == len({r.file for r in RELEASES.values()}) == 9
    for name, release in RELEASES.items():
        assert re.fullmatch("[0-9a-f]{64}", release.sha256)
        assert release.file == re.sub("[/@]", "-", name) + ".pt"
        assert release.url.startswith("https://")


def test_a_file_is_fetched_once_and_lies_whole_in_its_place(server, tmp_path, capsys):
    path = fetch(server.release, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "ViT-B-32.pt"
    assert path.read_bytes() == CONTENT
    assert visible(path.parent) == ["ViT-B-32.pt"]
    assert fetch(server.release, path.parent) == path
    assert server.ranges == [None]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_how_far_it_is(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich, what is a terminal
    monkeypatch.setenv("COLUMNS", "100")
    fetch(server.release, tmp_path)
    out, err = capsys.readouterr()
    assert out == ""
    assert "ViT-B-32.pt" in err
    assert re.search(r"262\.2/262\.2.* kB", err)


def test_the_argument_goes_before_the_variable_and_that_before_openais_folder(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CLIP_JAX_CACHE", "")
    assert fetch(server.release) == tmp_path / "home/.cache/clip/ViT-B-32.pt"
    monkeypatch.setenv("CLIP_JAX_CACHE", "~/variable")
    assert fetch(server.release) == tmp_path / "home/variable/ViT-B-32.pt"
    assert fetch(server.release, Path("~/argument")) == tmp_path / "home/argument/ViT-B-32.pt"
    monkeypatch.chdir(tmp_path)
    assert fetch(server.release, Path("here")) == tmp_path / "here/ViT-B-32.pt"


def test_a_good_file_needs_no_network(unused_release, tmp_path):
    (tmp_path / "ViT-B-32.pt").write_bytes(CONTENT)
    assert fetch(unused_release, tmp_path).read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["ViT-B-32.pt"]  # nor a lock: nothing was written


def test_a_cut_transfer_is_taken_up_where_it_ended(server, tmp_path):
    server.answers = [Answer(cut=CHUNK), Answer(cut=2 * CHUNK), Answer()]
    assert fetch(server.release, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={CHUNK}-", f"bytes={3 * CHUNK}-"]
    until(lambda: server.sent == len(CONTENT))


def test_a_transfer_cut_anywhere_and_always_comes_to_its_end_as_long_as_it_gets_on(server, tmp_path):
    server.answers = [Answer(cut=CHUNK + 1)]  # a chunk that was begun is lost
    assert fetch(server.release, tmp_path).read_bytes() == CONTENT
    assert len(server.ranges) == 5 > download.ATTEMPTS


@pytest.mark.parametrize("answer", [Answer(cut=CHUNK, ranges=False), Answer(cut=0)], ids=["same part", "nothing"])
def test_a_transfer_that_gets_no_further_ends_in_an_error(answer, server, tmp_path):
    server.answers = [answer]
    with pytest.raises(UserError, match=r"cannot fetch http.*IncompleteRead|ended after"):
        fetch(server.release, tmp_path)
    assert len(server.ranges) == download.ATTEMPTS
    assert "ViT-B-32.pt" not in visible(tmp_path)
    server.answers = [Answer()]
    assert fetch(server.release, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("answers", "sent"),
    [
        ([Answer(cut=CHUNK), Answer(ranges=False)], CHUNK + len(CONTENT)),
        ([Answer(cut=CHUNK), Answer(most=CHUNK)], len(CONTENT)),
        ([Answer(status=503), Answer(cut=CHUNK), Answer(status=500), Answer()], len(CONTENT)),
        ([Answer(length=False)], len(CONTENT)),
    ],
    ids=["no ranges", "small parts", "busy", "no length"],
)
def test_what_a_server_may_do_instead_comes_to_the_same_file(answers, sent, server, tmp_path):
    server.answers = answers
    assert fetch(server.release, tmp_path).read_bytes() == CONTENT
    until(lambda: server.sent == sent)  # the server counts what the client has read already


def test_another_part_than_was_asked_for_is_not_even_waited_for(server, tmp_path):
    never = threading.Event()
    server.answers = [Answer(cut=CHUNK), Answer(shift=1, gate=(0, never)), Answer()]
    assert fetch(server.release, tmp_path).read_bytes() == CONTENT
    never.set()
    assert server.ranges == [None, f"bytes={CHUNK}-", None]


def test_a_partial_file_of_an_earlier_call_is_gone_on_from(server, tmp_path):
    partial_of(tmp_path).write_bytes(CONTENT[:1000])
    assert fetch(server.release, tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]
    assert visible(tmp_path) == ["ViT-B-32.pt"]


def test_a_partial_file_that_is_whole_needs_no_network(unused_release, tmp_path):
    partial_of(tmp_path).write_bytes(CONTENT)
    assert fetch(unused_release, tmp_path).read_bytes() == CONTENT
    assert visible(tmp_path) == ["ViT-B-32.pt"]


@pytest.mark.parametrize("partial", [WRONG[:1000], WRONG, CONTENT + b"more"], ids=["wrong", "wrong whole", "longer"])
def test_a_partial_file_that_leads_nowhere_is_dropped_and_all_is_fetched(partial, server, tmp_path):
    partial_of(tmp_path).write_bytes(partial)
    assert fetch(server.release, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [f"bytes={len(partial)}-", None]
    assert visible(tmp_path) == ["ViT-B-32.pt"]


@pytest.mark.parametrize(
    ("answers", "requests"),
    [([Answer(WRONG)], 1), ([Answer(WRONG, cut=CHUNK), Answer(WRONG)], 3)],
    ids=["in one piece", "in two"],
)
def test_wrong_content_is_an_error_with_both_checksums_and_leaves_nothing(answers, requests, server, tmp_path):
    server.answers = answers
    with pytest.raises(UserError) as error:
        fetch(server.release, tmp_path)
    for word in (SHA256, hashlib.sha256(WRONG).hexdigest(), server.release.url, str(tmp_path / "ViT-B-32.pt")):
        assert word in str(error.value)
    assert len(server.ranges) == requests
    assert visible(tmp_path) == []


@pytest.mark.parametrize("old", [CONTENT[:-1], WRONG, b""], ids=["cut", "other", "empty"])
def test_a_damaged_file_is_fetched_again_and_stays_until_the_new_one_is_whole(old, server, tmp_path, capsys):
    path = tmp_path / "ViT-B-32.pt"
    path.write_bytes(old)
    arrived = threading.Event()
    server.answers = [Answer(gate=(2 * CHUNK, arrived))]
    with ThreadPoolExecutor() as pool:
        fetched = pool.submit(fetch, server.release, tmp_path)
        until(lambda: server.sent)
        assert path.read_bytes() == old
        arrived.set()
        assert fetched.result() == path
    assert path.read_bytes() == CONTENT
    assert f"{path} is damaged" in capsys.readouterr().err


def test_a_damaged_file_without_a_network_is_called_damaged_and_kept(unused_release, tmp_path):
    path = tmp_path / "ViT-B-32.pt"
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))} is damaged .*Connection refused") as error:
        fetch(unused_release, tmp_path)
    assert_says_what_to_do_by_hand(error.value, unused_release, path)
    assert path.read_bytes() == CONTENT[:-1]


def assert_says_what_to_do_by_hand(error: UserError, release: Release, path: Path) -> None:
    assert "\n" not in str(error)
    assert release.url in str(error)
    assert str(error).endswith(f"to put it there by hand, save it as {path}; its sha256 must be {SHA256}")


def test_without_a_network_the_error_says_where_the_file_goes(unused_release, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^cannot fetch http.*: Connection refused;") as error:
        fetch(unused_release, Path("cache"))
    assert_says_what_to_do_by_hand(error.value, unused_release, tmp_path / "cache" / "ViT-B-32.pt")
    (tmp_path / "cache" / "ViT-B-32.pt").write_bytes(CONTENT)
    assert fetch(unused_release, Path("cache")).read_bytes() == CONTENT


def test_a_name_that_is_not_known_is_the_reason(server, tmp_path, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    release = Release(f"http://nowhere.invalid/{SHA256}/ViT-B-32.pt")
    with pytest.raises(UserError, match="Name or service not known") as error:
        fetch(release, tmp_path)
    assert_says_what_to_do_by_hand(error.value, release, tmp_path / "ViT-B-32.pt")


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (416, 1), (500, 4), (429, 4)])
def test_an_answer_of_the_server_is_the_reason(status, requests, server, tmp_path):
    server.answers = [Answer(status=status)]
    with pytest.raises(UserError, match=f"the server answers {status} ") as error:
        fetch(server.release, tmp_path)
    assert_says_what_to_do_by_hand(error.value, server.release, tmp_path / "ViT-B-32.pt")
    assert len(server.ranges) == requests
    assert visible(tmp_path) == []


def test_a_slow_transfer_that_goes_on_is_not_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", (1, 0.3))
    server.answers = [Answer(drips=(len(CONTENT) // 10, 0.05))]  # 0.5 s or more in all
    assert fetch(server.release, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None]


def test_a_transfer_that_stalls_is_given_up_and_taken_up_later(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", (1, 0.1))
    never = threading.Event()
    server.answers = [Answer(gate=(CHUNK, never)), Answer(gate=(0, never))]
    with pytest.raises(UserError, match=": timed out;") as error:
        fetch(server.release, tmp_path)
    never.set()
    assert_says_what_to_do_by_hand(error.value, server.release, tmp_path / "ViT-B-32.pt")
    assert server.ranges == [None] + [f"bytes={CHUNK}-"] * (download.ATTEMPTS - 1)
    server.answers = [Answer()]
    assert fetch(server.release, tmp_path).read_bytes() == CONTENT


def test_eight_threads_and_four_processes_fetch_one_file_once(server, tmp_path, capsys):
    everybody = threading.Event()
    server.answers = [Answer(gate=(0, everybody))]
    processes = [in_a_process(server.release, tmp_path) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        threads = [pool.submit(fetch, server.release, tmp_path) for _ in range(8)]
        assert [process.stdout.readline() for process in processes] == ["here\n"] * 4
        time.sleep(0.1)
        everybody.set()
        assert {thread.result().read_bytes() for thread in threads} == {CONTENT}
    assert [process.wait(20) for process in processes] == [0] * 4
    for process in processes:
        process.stdout.close()
    assert server.ranges == [None]
    assert visible(tmp_path) == ["ViT-B-32.pt"]
    assert "is being fetched by another process; waiting for it" in capsys.readouterr().err


def test_a_killed_download_resumes_in_the_next_process(server, tmp_path):
    never = threading.Event()
    server.answers = [Answer(gate=(2 * CHUNK, never)), Answer()]
    process = in_a_process(server.release, tmp_path)
    partial = partial_of(tmp_path)
    until(lambda: partial.exists() and partial.stat().st_size == 2 * CHUNK)
    process.send_signal(signal.SIGKILL)
    assert process.wait(20) == -signal.SIGKILL
    process.stdout.close()
    assert fetch(server.release, tmp_path).read_bytes() == CONTENT
    never.set()
    assert server.ranges == [None, f"bytes={2 * CHUNK}-"]


def test_a_folder_that_cannot_be_used_is_said(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "ViT-B-32.pt").mkdir()
    for folder, reason in ((tmp_path / "file", "Not a directory"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=rf"{re.escape(str(folder / 'ViT-B-32.pt'))}: {reason}.*CLIP_JAX_CACHE"):
            fetch(server.release, folder)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does when there is no home
    with pytest.raises(UserError, match=r"home folder.*CLIP_JAX_CACHE"):
        fetch(server.release)
    assert server.ranges == []


@pytest.mark.parametrize("folder", ["/sys", "/sys/new"])  # where nobody can make a file, root neither
def test_a_folder_that_cannot_be_written_is_said(folder, server):
    if not Path("/sys/kernel").exists():
        pytest.skip("no Linux system folder")
    with pytest.raises(UserError, match=rf"cannot keep {folder}/ViT-B-32\.pt: \w.*CLIP_JAX_CACHE"):
        fetch(server.release, Path(folder))
    assert server.ranges == []


def test_a_full_disk_is_said_and_what_has_come_is_kept(server, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * CHUNK, hard))  # a disk with room for this much
    try:
        with pytest.raises(UserError, match=r"cannot keep .*ViT-B-32\.pt: File too large; make room"):
            fetch(server.release, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert fetch(server.release, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={2 * CHUNK}-"]


def test_certificates_that_are_not_there_are_not_taken_for_the_folders_fault(tmp_path, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "nothing.pem"))
    monkeypatch.setenv("no_proxy", "*")
    release = Release(f"https://127.0.0.1:9/{SHA256}/ViT-B-32.pt")
    with pytest.raises(UserError, match=r"^cannot fetch .*nothing\.pem"):
        fetch(release, tmp_path)
