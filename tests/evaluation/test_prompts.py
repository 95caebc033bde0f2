"""Prompts: a data set's own, ours, CLIP_benchmark's files; and what does not fit."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import tiny

from clip_jax.errors import UserError
from clip_jax.evaluation import prompts
from clip_jax.weights.download import Release

SOURCE = tiny.Memory(3)


def file(path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_a_data_set_has_its_own_templates_or_ours():
    found = prompts.of(SOURCE)
    assert found.classnames == tiny.CLASSNAMES
    assert found.sentences[1] == ("a photo of a dog.", "a picture of a dog.", "an image of a dog.")
    own = prompts.of(tiny.Memory(3, templates=("my {c}, the {c}!", "{c}")))
    assert own.sentences[0] == ("my cat, the cat!", "cat")
    assert prompts.of(tiny.Memory(3, name="captioned_digits")).sentences[0][0] == "a handwritten cat"


def test_files_are_looked_up_by_the_name_of_the_data_set(tmp_path):
    names = [name.upper() for name in tiny.CLASSNAMES]
    classnames = file(tmp_path / "names.json", {"memory": names, "other": ["x"]})
    templates = file(tmp_path / "templates.json", {"imagenet1k": ["usual {c}"], "other": ["other {c}"]})
    assert prompts.of(SOURCE, classnames, templates).sentences[0] == ("usual CAT",), (
        "that of ImageNet where it has none"
    )
    assert prompts.of(SOURCE, classnames, f"{templates}:other").sentences[0] == ("other CAT",)
    assert prompts.of(tiny.Memory(3, name="vtab/memory"), classnames).classnames == tuple(names)


def test_every_class_may_have_sentences_of_its_own(tmp_path):
    own = {name: [f"{name} number {i} with {{}}" for i in range(1 + i)] for i, name in enumerate(tiny.CLASSNAMES)}
    found = prompts.of(SOURCE, templates=file(tmp_path / "cupl.json", {"memory": own}))
    assert found.sentences == tuple(tuple(own[name]) for name in tiny.CLASSNAMES), "as they are"
    del own["fish"]
    with pytest.raises(UserError, match="no sentence for the class 'fish'"):
        prompts.of(SOURCE, templates=file(tmp_path / "cupl.json", {"memory": own}))


def test_the_installed_package_has_both_files():
    pytest.importorskip("clip_benchmark")
    found = prompts.of(tiny.Memory(3, name="pets", classnames=()), "clip_benchmark", "clip_benchmark")
    assert (len(found.classnames), len(found.sentences[0])) == (37, 1)
    assert found.sentences[0] == (f"a photo of a {found.classnames[0]}, a type of pet.",)
    source = tiny.Memory(3, name="imagenet2012", classnames=())
    cupl = prompts.of(source, "clip_benchmark:imagenet1k", "cupl:imagenet1k")
    assert (len(cupl.sentences), len(cupl.sentences[0])) == (1000, 150)
    assert cupl.sentences[0][0] == "A tench is a freshwater fish of the carp family."


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.server.content)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        http.asked, http.content = [], json.dumps({"memory": ["fetched {c}"]}).encode()
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield http
        http.shutdown()


def test_without_the_package_a_file_is_fetched_once_and_checked(server, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path))
    url = f"http://127.0.0.1:{server.server_port}/templates.json"
    known = Release(url, hashlib.sha256(server.content).hexdigest())
    monkeypatch.setattr(prompts, "TEMPLATE_FILES", {"clip_benchmark": known})
    for _ in range(2):
        assert prompts.of(SOURCE, templates="clip_benchmark").sentences[0] == ("fetched cat",)
    assert server.asked == ["/templates.json"]
    server.content = b'{"memory": ["another {c}"]}'
    (tmp_path / "prompts" / "templates.json").unlink()
    with pytest.raises(UserError, match="what comes has the sha256"):
        prompts.of(SOURCE, templates="clip_benchmark")


@pytest.mark.parametrize(
    ("classnames", "templates", "words"),
    [
        (
            {"memory": ["cat", "dog"]},
            None,
            "has 2 for memory, whose labels are of 6 classes (cat, dog, bird, fish, horse, …)",
        ),
        ({"memory": [1, 2, 3, 4, 5, 6]}, None, "should be {DATASET: [TEXT, …], …}"),
        (["cat"], None, "should be {DATASET: [TEXT, …], …}"),
        (None, {"memory": ["a photo"]}, "'a photo' has no {c} or {} where the class name goes"),
        (None, {"memry": ["{c}"]}, "has nothing for 'memory'; did you mean 'memry'?"),
        (None, {"memory": "a {c}"}, "should be {DATASET: [TEXT, …], …}"),
    ],
)
def test_what_does_not_fit_is_refused(classnames, templates, words, tmp_path):
    given = [None if x is None else file(tmp_path / f"{i}.json", x) for i, x in enumerate((classnames, templates))]
    with pytest.raises(UserError) as error:
        prompts.of(SOURCE, *given)
    assert words in str(error.value)


def test_a_data_set_without_class_names_says_what_to_do():
    with pytest.raises(UserError, match="memory:test has no class names; give them with --classnames"):
        prompts.of(tiny.Memory(3, classnames=()))
    with pytest.raises(UserError, match=r"nowhere\.json cannot be read"):
        prompts.of(SOURCE, templates="nowhere.json")
