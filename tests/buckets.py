"""Google Cloud Storage on this machine: as much of its JSON API as gcsfs, TensorStore and google-cloud-storage use.

Not the emulators of PyPI: one that serves both, has generations, conditions and pages, keeps connections and can be
told to refuse was not found.
"""

import collections
import contextlib
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

PAGE = 100  # names that are listed at once: the real one has 1,000, which no test's run comes to


class Object(NamedTuple):
    content: bytes
    generation: int


class Refusal(Exception):
    """An HTTP error, with its words."""

    def __init__(self, status: int, words: str):
        super().__init__(words)
        self.status = status


class Buckets:
    """Buckets with their objects, behind a server; `refuses` is asked (method, path) for a refusal first."""

    def __init__(self, *names: str):
        self.objects: dict[str, dict[str, Object]] = {name: {} for name in names}
        self.refuses: Callable[[str, str], Refusal | None] = lambda method, path: None
        self.calls: collections.Counter[str] = collections.Counter()  # by method
        self.lock = threading.RLock()
        self._generation = 1_000_000
        self._uploads: dict[str, tuple[str, str, bytearray]] = {}

    def bucket(self, name: str) -> dict[str, Object]:
        if name not in self.objects:
            raise Refusal(404, "The specified bucket does not exist.")
        return self.objects[name]

    def get(self, bucket: str, name: str) -> Object:
        if (found := self.bucket(bucket).get(name)) is None:
            raise Refusal(404, f"No such object: {bucket}/{name}")
        return found

    def put(self, bucket: str, name: str, content: bytes) -> dict[str, Any]:
        self._generation += 1
        self.bucket(bucket)[name] = Object(bytes(content), self._generation)
        return self.about(bucket, name)

    def about(self, bucket: str, name: str) -> dict[str, Any]:
        found = self.get(bucket, name)
        times = dict.fromkeys(("timeCreated", "updated"), "2026-01-01T00:00:00.000Z")
        return times | {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(found.content)),
            "generation": str(found.generation),
            "metageneration": "1",
        }

    def check(self, bucket: str, name: str, query: dict[str, str]) -> None:
        """Refuses what is asked for another generation than there is; 0: there is none."""
        found = self.bucket(bucket).get(name)
        generation = found.generation if found else 0
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            raise Refusal(412, "At least one of the pre-conditions you specified did not hold.")
        if query.get("ifGenerationNotMatch") == str(generation):
            raise Refusal(304 if generation else 412, "")

    def listed(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, end = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
        names = sorted(name for name in self.bucket(bucket) if name.startswith(prefix) and first <= name < end)
        entries = []  # (an object's name, or a prefix, whether it is one)
        for name in names:
            inner = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            entry = (prefix + inner[0] + delimiter, True) if inner[1] else (name, False)
            if entry not in entries[-1:]:
                entries.append(entry)
        after = query.get("pageToken", "")
        entries = [entry for entry in entries if entry[0] > after]
        page = entries[: min(PAGE, int(query.get("maxResults", PAGE)))]
        answer = {
            "kind": "storage#objects",
            "items": [self.about(bucket, name) for name, is_prefix in page if not is_prefix],
            "prefixes": [name for name, is_prefix in page if is_prefix],
        }
        return answer | ({"nextPageToken": page[-1][0]} if len(entries) > len(page) else {})

    def begin_upload(self, bucket: str, name: str) -> str:
        self.bucket(bucket)
        upload = f"upload-{len(self._uploads)}"
        self._uploads[upload] = bucket, name, bytearray()
        return upload

    def go_on_upload(self, upload: str, content: bytes, content_range: str) -> dict[str, Any] | int:
        """Returns the object, or how many bytes there are so far; nobody sees it before it is whole."""
        bucket, name, so_far = self._uploads[upload]
        so_far += content
        total = content_range.rpartition("/")[2]
        return self.put(bucket, name, so_far) if total in ("", str(len(so_far))) else len(so_far)

    @contextlib.contextmanager
    def served(self) -> Iterator[dict[str, str]]:
        """Yields the environment of a process that is to find them."""
        server = _Server(("127.0.0.1", 0), lambda *args: _Handler(self, *args))
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield {
                "STORAGE_EMULATOR_HOST": url,
                "TENSORSTORE_GCS_HTTP_URL": url,
                "FSSPEC_GCS_TOKEN": "anon",
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anybody",
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks by gRPC what kind of bucket it is
            }
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, address: Any) -> None:
        """Says nothing of a client that has gone: gcsfs asks in two ways at once, and waits for the first answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, buckets: Buckets, *args: Any):
        self._buckets = buckets
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        body = self._body()
        try:
            if refusal := self._buckets.refuses(self.command, urllib.parse.unquote(self.path)):
                raise refusal
            with self._buckets.lock:
                self._buckets.calls[self.command] += 1
                self._serve(url.path, query, body)
        except Refusal as refusal:
            words = {"error": {"code": refusal.status, "message": str(refusal)}}
            self._send(refusal.status, b"" if refusal.status == 304 else json.dumps(words).encode())

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _json(self, answer: dict[str, Any]) -> None:
        self._send(200, json.dumps(answer).encode(), Content_Type="application/json")

    def _serve(self, path: str, query: dict[str, str], body: bytes) -> None:
        parts = re.fullmatch(r"(/upload|/download)?(?:/storage/v1)?/b/([^/]+)(?:/o)?(?:/([^/]+)(?:/(.+))?)?", path)
        if parts is None:
            raise Refusal(501, f"{self.command} {path} is not served here")
        kind, bucket, name, verb = parts.groups()
        name = name and urllib.parse.unquote(name)
        if kind == "/upload":
            self._upload(bucket, query, body)
        elif name is None:
            self._of_bucket(path, bucket, query)
        elif verb:
            self._move_or_copy(bucket, name, verb)
        elif self.command == "DELETE":
            self._buckets.check(bucket, name, query)
            self._buckets.get(bucket, name)
            del self._buckets.objects[bucket][name]
            self._send(204, b"")
        elif kind == "/download" or query.get("alt") == "media":
            self._download(bucket, name, query)
        else:
            self._json(self._buckets.about(bucket, name))

    def _of_bucket(self, path: str, bucket: str, query: dict[str, str]) -> None:
        if path.endswith("/o"):
            self._json(self._buckets.listed(bucket, query))
        else:
            self._buckets.bucket(bucket)
            self._json({"kind": "storage#bucket", "name": bucket, "id": bucket, "location": "HERE"})

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        if upload := query.get("upload_id"):
            answer = self._buckets.go_on_upload(upload, body, self.headers.get("Content-Range", ""))
            if isinstance(answer, int):
                self._send(308, b"", Range=f"bytes=0-{answer - 1}")
            else:
                self._json(answer)
            return
        kind, name = query["uploadType"], query.get("name")
        if kind == "multipart":
            mark = b"--" + re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, about, body, _ = body.split(mark)
            about, body = (re.split(b"\r?\n\r?\n", part, maxsplit=1)[1] for part in (about, body))
            name, body = json.loads(about)["name"], body.removesuffix(b"\n").removesuffix(b"\r")
        self._buckets.check(bucket, name, query)
        if kind == "resumable":
            upload = self._buckets.begin_upload(bucket, name)
            host = f"http://127.0.0.1:{self.server.server_port}"
            self._send(200, b"", Location=f"{host}/upload/storage/v1/b/{bucket}/o?upload_id={upload}")
        else:
            self._json(self._buckets.put(bucket, name, body))

    def _move_or_copy(self, bucket: str, name: str, verb: str) -> None:
        how, to_bucket, to = re.fullmatch("(moveTo|copyTo|rewriteTo)(?:/b/([^/]+))?/o/(.+)", verb).groups()
        content = self._buckets.get(bucket, name).content
        answer = self._buckets.put(to_bucket or bucket, urllib.parse.unquote(to), content)
        if how == "moveTo":
            del self._buckets.objects[bucket][name]
        if how == "rewriteTo":
            size = str(len(content))
            answer = {"done": True, "objectSize": size, "totalBytesRewritten": size, "resource": answer}
        self._json(answer)

    def _download(self, bucket: str, name: str, query: dict[str, str]) -> None:
        found = self._buckets.get(bucket, name)
        self._buckets.check(bucket, name, query)
        headers = {"x-goog-generation": str(found.generation), "Content_Type": "application/octet-stream"}
        content, size = found.content, len(found.content)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
            if start >= size:
                raise Refusal(416, "Request range not satisfiable")
            part = content[start : end + 1]
            self._send(206, part, Content_Range=f"bytes {start}-{end}/{size}", **headers)
        else:
            self._send(200, content, **headers)
