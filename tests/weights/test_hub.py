"""Repositories of the Hugging Face Hub, fetched by the real `huggingface_hub` from a server that plays the hub.

The library reads where the hub and its cache are when it is imported, so every fetch here is a process of its own.
"""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest

from clip_jax.errors import UserError
from clip_jax.weights.hub import fetch

ROOT = Path(__file__).parents[2]
TOKENIZER = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}
EVERYTHING = {
    **{"config.json": b"{}", "preprocessor_config.json": b"{}", **TOKENIZER},
    **{"model.safetensors": b"weights", "pytorch_model.bin": b"the same", "flax_model.msgpack": b"the same"},
    **{
        "tf_model.h5": b"the same",
        "onnx/model.onnx": b"the same",
        "README.md": b"# A model",
        "model.fp16.safetensors": b"",
    },
}
PIECES = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
REPOSITORIES = {
    "org/model": EVERYTHING,
    "org/sharded": {"config.json": b"{}", "model.safetensors.index.json": b"{}", **dict.fromkeys(PIECES, b"piece")},
    "org/bin": {"config.json": b"{}", "pytorch_model.bin": b"weights", "rust_model.ot": b"the same"},
    "org/both": {**EVERYTHING, "open_clip_config.json": b"{}", "open_clip_model.safetensors": b"weights"},
    "org/mixed": {**EVERYTHING, "open_clip_config.json": b"{}", "open_clip_pytorch_model.bin": b"the same"},
    "org/dataset": {"README.md": b"# No model", "data.csv": b"1,2"},
    "org/gated": EVERYTHING,
    "org/broken": EVERYTHING,
}
BRANCHES = {"main": "1" * 40, "v2": "2" * 40}


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers what `snapshot_download` asks."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")
        if path.startswith("api/models/"):
            organisation, name, kind, revision = [*path.split("/")[2:], "revision", "main"][:4]
            self.describe(f"{organisation}/{name}", kind, revision)
        elif "/resolve/" not in path:
            self.refuse(404, "", "not played here")
        else:
            organisation, name, _, revision, file = path.split("/", 4)
            self.give(f"{organisation}/{name}", revision, file)

    def describe(self, repo: str, kind: str, revision: str):
        commit = BRANCHES.get(revision, revision)
        if repo == "org/broken":
            self.refuse(403, "", "no more today")
        elif repo not in REPOSITORIES:
            self.refuse(401, "RepoNotFound", "Repository not found")
        elif commit not in BRANCHES.values():
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        elif kind == "tree":
            files = REPOSITORIES[repo].items()
            entries = [{"type": "file", "path": name, "size": len(x), "oid": self.tag(x)} for name, x in files]
            self.send(json.dumps(entries).encode(), "application/json")
        else:
            siblings = [{"rfilename": name} for name in REPOSITORIES[repo]]
            content = {"id": repo, "sha": commit, "siblings": siblings, "tags": [], "private": False}
            self.send(json.dumps(content).encode(), "application/json")

    def give(self, repo: str, revision: str, file: str):
        if repo == "org/gated" and self.headers.get("Authorization") != "Bearer hf_member":
            self.refuse(403, "GatedRepo", "Access to model org/gated is restricted")
            return
        content = REPOSITORIES[repo][file]
        content = content if BRANCHES["main"] == revision or not content else content + b" of v2"
        self.send(content, "application/octet-stream", ETag=f'"{self.tag(content)}"', **{"X-Repo-Commit": revision})
        if self.command == "GET":
            self.server.given.append(f"{repo}/{file}")

    @staticmethod
    def tag(content: bytes) -> str:
        return hashlib.sha1(content).hexdigest()

    def send(self, content: bytes, kind: str, **headers: str):
        self.send_response(200)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def refuse(self, status: int, code: str, message: str):
        self.send_response(status)
        for name, value in {"X-Error-Code": code, "X-Error-Message": message, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.given = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def fetched(endpoint: str, cache: Path, *sources: str, **environment: str) -> list[list]:
    """Returns [folder, {file: content}] of each source that a fresh process fetched, or what it said instead."""
    code = """
import json, pathlib, sys
from clip_jax.errors import UserError
from clip_jax.weights.hub import fetch
for source in sys.argv[1:]:
    try:
        folder = fetch(source)
        files = {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}
        print(json.dumps([str(folder), files]))
    except UserError as error:
        print(json.dumps(str(error)))
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment = kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"} | environment
    command = [sys.executable, "-c", code, *sources]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def endpoint_of(server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def models(hub, cache) -> dict[str, list]:
    """What one process fetched of several repositories."""
    names = ("model", "model@v2", "sharded", "bin", "both", "mixed")
    sources = [f"hf://org/{name}" for name in names]
    return dict(zip(names, fetched(endpoint_of(hub), cache, *sources), strict=True))


@pytest.fixture(scope="module")
def refusals(hub, cache) -> dict[str, str]:
    """What one process, that is nobody's, said to several sources."""
    names = ("gated", "nothing", "model@v9", "dataset", "broken", "a--b")
    sources = [f"hf://org/{name}" for name in names]
    return dict(zip(names, fetched(endpoint_of(hub), cache, *sources), strict=True))


def test_a_repository_becomes_a_folder_of_what_is_read_here(models):
    assert set(models["model"][1]) == {"config.json", "preprocessor_config.json", "model.safetensors", *TOKENIZER}
    assert models["model"][1]["model.safetensors"] == "weights"


def test_nothing_else_is_fetched(models, hub):
    assert not [
        name for name in hub.given if name.endswith((".msgpack", ".h5", ".onnx", ".ot", ".md", "fp16.safetensors"))
    ]
    assert not [name for name in hub.given if name.endswith(".bin") and name != "org/bin/pytorch_model.bin"]


def test_a_revision_is_what_follows_the_at_sign(models):
    assert models["model@v2"][1]["model.safetensors"] == "weights of v2"
    assert models["model@v2"][0] != models["model"][0]


def test_all_pieces_of_a_model_are_fetched(models):
    assert set(models["sharded"][1]) == {"config.json", "model.safetensors.index.json", *PIECES}


def test_files_of_pytorch_are_fetched_where_there_is_nothing_else(models):
    assert set(models["bin"][1]) == {"config.json", "pytorch_model.bin"}


def test_of_two_formats_one_is_fetched_with_its_own_config(models):
    companions = {"preprocessor_config.json", *TOKENIZER}
    assert set(models["both"][1]) == {"open_clip_config.json", "open_clip_model.safetensors", *companions}
    assert set(models["mixed"][1]) == {"config.json", "model.safetensors", *companions}


def test_offline_the_cache_is_enough(models, cache):
    (again,) = fetched("http://127.0.0.1:9", cache, "hf://org/model@v2", HF_HUB_OFFLINE="1")
    assert again == models["model@v2"]


def test_without_a_network_the_cache_is_enough(models, cache):
    assert fetched("http://127.0.0.1:9", cache, "hf://org/sharded") == [models["sharded"]]


def test_offline_without_the_cache_both_ways_on_are_named(tmp_path):
    (said,) = fetched("http://127.0.0.1:9", tmp_path, "hf://org/model", HF_HUB_OFFLINE="1")
    assert "cannot fetch hf://org/model: HF_HUB_OFFLINE is set" in said
    assert f"{tmp_path}/hub does not have it" in said
    assert "put the files of http://127.0.0.1:9/org/model into a folder" in said


def test_without_a_network_the_reason_and_the_ways_on_are_named(tmp_path):
    (said,) = fetched("http://127.0.0.1:9", tmp_path, "hf://org/model")
    assert "efused" in said
    assert "try again with a network that reaches http://127.0.0.1:9, or put the files" in said


def test_a_gated_repository_says_how_to_get_access(refusals, hub):
    page = f"{endpoint_of(hub)}/org/gated"
    assert f"ask for access at {page}, then log in with `hf auth login`, or set HF_TOKEN" in refusals["gated"]


def test_a_token_opens_what_is_gated(hub, tmp_path):
    ((_, files),) = fetched(endpoint_of(hub), tmp_path, "hf://org/gated", HF_TOKEN="hf_member")
    assert files["model.safetensors"] == "weights"


def test_what_cannot_be_fetched_is_said_in_one_line_with_the_next_move(refusals):
    assert "no such repository, or does not show it to everybody: mend the name, or log in" in refusals["nothing"]
    assert "no such revision" in refusals["model@v9"]
    assert "leave it out for the newest" in refusals["model@v9"]
    assert "it should have one of these: open_clip_config.json with" in refusals["dataset"]
    assert "403" in refusals["broken"]
    assert "a--b" in refusals["a--b"]
    assert not [said for said in refusals.values() if "\n" in said]


@pytest.mark.parametrize(
    "source", ["hf://model", "hf://", "hf://a/b/c", "hf://a/b@", "hf://a b/c", "hf:/a/b", "hf://a/b@c d"]
)
def test_a_name_that_is_none_is_refused_without_asking(source):
    with pytest.raises(UserError, match="should be hf://ORGANISATION/REPOSITORY"):
        fetch(source)
