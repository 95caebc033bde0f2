"""Features on disk: the rows of all files are of the same records, a cut run goes on, and others' are left alone."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pytest
import tiny
from noise import Noise
from pyarrow import parquet as pq

from clip_jax.errors import UserError
from clip_jax.evaluation import features
from clip_jax.evaluation.chunks import Chunks
from clip_jax.evaluation.encode import Images, encode_texts
from clip_jax.evaluation.on_mesh import OnMesh


@pytest.fixture(scope="module")
def model() -> OnMesh:
    return tiny.model()


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names(folder)}


def test_the_files_are_named_and_laid_out_as_clip_retrieval_does(model, tmp_path):
    features.write(model, Noise(11), tmp_path, chunk=1)
    kinds = {"img_emb": "npy", "text_emb": "npy", "metadata": "parquet"}
    expected = [f"{kind}/{kind}_{i:02d}.{suffix}" for kind, suffix in kinds.items() for i in range(11)]
    assert names(tmp_path) == sorted(["features.json", *expected]), "eleven chunks have two digits"
    about = json.loads((tmp_path / "features.json").read_text())
    asked = {
        "model": tiny.VARIANT,
        "pretrained": "random",
        "dataset": "noise",
        "split": "test",
        "feature": "embedding",
    }
    assert about.items() >= (asked | {"dtype": "float32", "records": 11, "chunk": 1}).items()


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 19, 100])
def test_row_j_of_all_files_is_of_one_record_whatever_the_chunk(model, tmp_path, chunk):
    source = Noise()
    features.write(model, source, tmp_path, chunk=chunk)
    found = features.read(tmp_path)
    images = [model.gathered(part.features)[part.rows] for part in Images(model, source, shows=False)]
    np.testing.assert_array_equal(found.images[:], np.concatenate(images))
    captions = [source[i].captions[0] for i in range(len(source))]
    np.testing.assert_allclose(found.texts[:], encode_texts(model, captions), atol=1e-6)
    columns = found.metadata.to_pydict()
    assert list(columns) == ["image_path", "caption", "index", "label"]
    assert columns["index"] == list(range(19))
    assert columns["caption"] == captions
    assert columns["label"] == [i % 3 for i in range(19)]
    assert columns["image_path"] == [f"{i:03d}" if i % 2 else str(i) for i in range(19)]
    assert found.images.dtype == found.texts.dtype == np.float32


@pytest.mark.parametrize(("captions", "labels"), [(0, True), (0, False), (1, False)])
def test_what_records_do_not_have_has_no_file_and_no_column(model, tmp_path, captions, labels):
    features.write(model, Noise(captions=captions, labels=labels), tmp_path, feature="pooled", chunk=10)
    found = features.read(tmp_path)
    assert found.metadata.column_names == ["image_path", *["caption"] * captions, "index", *["label"] * labels]
    assert (found.texts is None) == (captions == 0)
    assert found.images.shape == (19, 64)


def test_what_cannot_be_read_has_no_row_and_is_counted(model, tmp_path, capsys):
    source = Noise(bad=(0, 1, 2, 3, 4, 9, 18))  # of four chunks the first has nothing, and the last neither
    features.write(model, source, tmp_path, chunk=3)
    found = features.read(tmp_path)
    kept = [i for i in range(19) if i not in source.bad]
    assert found.metadata["index"].to_pylist() == kept
    assert len(found.images) == len(found.texts) == len(kept)
    assert "noise:test: left out: no image 7" in capsys.readouterr().err
    (tmp_path / "img_emb" / "img_emb_6.npy").unlink()
    features.write(model, source, tmp_path, chunk=3)  # all that is to do cannot be read
    assert features.read(tmp_path).metadata["index"].to_pylist() == kept
    assert "6 of 7 chunks were there, without 6 records" in " ".join(capsys.readouterr().err.split())


def test_a_data_set_of_which_nothing_can_be_read_is_an_error(model, tmp_path):
    with pytest.raises(UserError, match="no image of noise:test can be read: no image 3"):
        features.write(model, Noise(3, bad=(0, 1, 2)), tmp_path)


@pytest.mark.parametrize("lost", [{6}, {0}, {2, 3, 5}])
def test_a_cut_run_reads_what_is_missing_only_and_ends_as_one_that_was_not(model, tmp_path, lost):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    features.write(model, Noise(), whole, chunk=3)
    shutil.copytree(whole, cut)
    kinds = ("metadata/metadata_{}.parquet", "img_emb/img_emb_{}.npy", "text_emb/text_emb_{}.npy")
    for at, i in enumerate(sorted(lost)):
        (cut / kinds[at].format(i)).unlink()
    source = Noise()
    features.write(model, source, cut, chunk=3)
    assert sorted(source.asked) == [i for i in range(19) if i // 3 in lost]
    left, right = features.read(whole), features.read(cut)
    np.testing.assert_allclose(left.images[:], right.images[:], atol=1e-6)
    np.testing.assert_allclose(left.texts[:], right.texts[:], atol=1e-6)
    assert left.metadata.equals(right.metadata)


def test_what_is_complete_is_left_as_it_is(model, tmp_path, monkeypatch):
    features.write(model, Noise(), tmp_path, chunk=6)
    before = bytes_of(tmp_path)
    monkeypatch.setattr(OnMesh, "encode_image", lambda *_: pytest.fail("it is there"))
    source = Noise()
    features.write(model, source, tmp_path, chunk=6)
    assert not source.asked
    assert bytes_of(tmp_path) == before


@pytest.mark.parametrize("spoil", ["rows", "dtype", "width", "cut", "not one"])
def test_a_chunk_that_does_not_go_with_the_others_is_computed_anew(model, tmp_path, spoil):
    features.write(model, Noise(), tmp_path, chunk=6)
    before, file = bytes_of(tmp_path), tmp_path / "img_emb" / "img_emb_1.npy"
    rows = np.load(file)
    wrong = {"rows": rows[1:], "dtype": rows.astype(np.float16), "width": rows[:, 1:]}
    if spoil in wrong:
        np.save(file, wrong[spoil])
    else:
        file.write_bytes(file.read_bytes()[:-5] if spoil == "cut" else b"nothing of the kind")
    source = Noise()
    features.write(model, source, tmp_path, chunk=6)
    assert sorted(source.asked) == list(range(6, 12))
    assert names(tmp_path) == list(before)
    np.testing.assert_allclose(np.load(file), rows, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": Noise(20)}, "records 19, not 20"),
        ({"source": Noise(captions=1)}, "data '"),
        ({"feature": "pooled"}, "feature 'embedding', not 'pooled'"),
        ({"chunk": 7}, "chunk 6, not 7"),
    ],
)
def test_a_folder_of_something_else_is_refused_and_left_alone(model, tmp_path, change, said):
    features.write(model, Noise(), tmp_path, chunk=6)
    before = bytes_of(tmp_path)
    asked = {"model": model, "source": Noise(), "folder": tmp_path, "chunk": 6} | change
    with pytest.raises(UserError, match=f"has other features: .*{said}.*choose another folder"):
        features.write(**asked)
    assert bytes_of(tmp_path) == before
    (tmp_path / "features.json").unlink()
    with pytest.raises(UserError, match=r"no features\.json says whose"):
        features.write(model, Noise(), tmp_path, chunk=6)


def test_mistakes_are_said_before_anything_is_read(model, tmp_path):
    for wrong, said in [({"feature": "pool"}, "did you mean 'pooled'"), ({"chunk": 0}, "chunk=0 should be at least 1")]:
        with pytest.raises(UserError, match=said):
            features.write(model, Noise(), tmp_path, **wrong)
    with pytest.raises(UserError, match="a folder of this machine"):
        features.write(model, Noise(), Path("gs://bucket/features"))
    assert not names(tmp_path)


def test_the_first_process_writes_and_what_goes_wrong_there_all_others_say(model, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(features.distributed, "gather", lambda fact: [[None, "the disk of process 0 is full"], fact])
    with pytest.raises(UserError, match="the disk of process 0 is full"):
        features.write(model, Noise(), tmp_path)
    assert not names(tmp_path)


def test_rows_over_all_chunks_are_those_of_one_array():
    random = np.random.default_rng(0)
    parts = [random.normal(size=(n, 3)).astype(np.float16) for n in (4, 0, 1, 7)]
    chunks, whole = Chunks(parts), np.concatenate(parts)
    assert (len(chunks), chunks.shape, chunks.dtype) == (12, whole.shape, whole.dtype)
    wanted = [0, 11, -1, -12, np.int64(5), slice(None), slice(2, 9), slice(None, None, -3), slice(5, 5), slice(20, 30)]
    wanted += [np.array([11, 0, -3, 0]), [3, 4], [], whole[:, 0] > 0, np.array([], np.int64)]
    for rows in wanted:
        np.testing.assert_array_equal(chunks[rows], whole[rows])
        assert chunks[rows].dtype == np.float16
    for rows in (12, -13, [0, 12], np.array([True])):
        with pytest.raises(IndexError):
            chunks[rows]
    np.testing.assert_array_equal(np.stack(list(chunks)), whole)


def by_hand(folder: Path, rows: tuple[int, ...] = (3, 2)) -> Path:
    """Returns a folder as clip-retrieval writes it, in float16 and without a word of whose it is."""
    for i, n in enumerate(rows):
        for kind in ("img_emb", "text_emb"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            np.save(folder / kind / f"{kind}_{i}.npy", np.full((n, 4), i, np.float16))
        (folder / "metadata").mkdir(exist_ok=True)
        table = pa.table({"image_path": [f"{i}/{j}" for j in range(n)], "caption": ["x"] * n})
        pq.write_table(table, folder / "metadata" / f"metadata_{i}.parquet")
    return folder


def test_what_clip_retrieval_wrote_is_read(tmp_path):
    found = features.read(by_hand(tmp_path))
    assert found.images.shape == found.texts.shape == (5, 4)
    assert found.images.dtype == np.float16
    assert found.metadata["image_path"].to_pylist() == ["0/0", "0/1", "0/2", "1/0", "1/1"]


def damage(folder: Path, how: str) -> None:
    file = folder / "img_emb" / "img_emb_1.npy"
    match how:
        case "no folder":
            shutil.rmtree(folder)
        case "a file less":
            (folder / "text_emb" / "text_emb_1.npy").unlink()
        case "a row less":
            np.save(file, np.zeros((1, 4), np.float16))
        case "other columns":
            np.save(file, np.zeros((2, 5), np.float16))
        case "a list":
            np.save(file, np.zeros(2, np.float16))
        case "cut":
            file.write_bytes(file.read_bytes()[:-1])
        case "empty":
            file.write_bytes(b"")
        case "pickled":
            np.save(file, np.array([[{}], [{}]], object), allow_pickle=True)
        case "no parquet":
            (folder / "metadata" / "metadata_1.parquet").write_bytes(b"PAR1")
        case "unfinished":
            (folder / "features.json").write_text('{"records": 9, "chunk": 3}')
        case "other words":
            (folder / "features.json").write_text("[]")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no folder", "has no features: there is no img_emb/img_emb_0.npy in it"),
        ("a file less", "as many files of each kind: img_emb 2, text_emb 1, metadata 2"),
        ("a row less", "img_emb_1.npy 1, .*text_emb_1.npy 2"),
        ("other columns", "img_emb_1.npy is not as .*img_emb_0.npy is"),
        ("a list", "img_emb_1.npy should be a matrix of floats"),
        ("cut", "img_emb_1.npy cannot be read"),
        ("empty", "img_emb_1.npy cannot be read"),
        ("pickled", "img_emb_1.npy cannot be read"),
        ("no parquet", "metadata_1.parquet cannot be read"),
        ("unfinished", "has 2 of 3 chunks: run what wrote them again"),
        ("other words", "does not say how many records"),
    ],
)
def test_what_is_missing_or_damaged_is_named(tmp_path, how, said):
    damage(by_hand(tmp_path / "features"), how)
    with pytest.raises(UserError, match=said):
        features.read(tmp_path / "features")
