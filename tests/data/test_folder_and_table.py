"""`folder:` and `csv:` — files as they lie about: each record is its own affair, and a table is read once."""

import dataclasses
import io
import json
import pickle
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet as pq
from tar_shards import picture

from clip_jax.data import index_file, storage
from clip_jax.data.problems import BadRecord, Problem
from clip_jax.data.sources import Keys, Record, Source, open_source, table
from clip_jax.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The folder for what cannot lie beside a table."""
    monkeypatch.setenv(index_file.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """The tables that were read, as often as they were."""
    read, keep = [], table._keep

    def counted(of, tag, columns):
        read.append(storage.name_of(of.path))
        return keep(of, tag, columns)

    monkeypatch.setattr(table, "_keep", counted)
    return read


def put(root: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def all_of(source: Source) -> list[Record]:
    return [source[i] for i in range(len(source))]


def problem_of(source: Source, index: int) -> Problem:
    with pytest.raises(BadRecord) as error:
        source[index]
    return error.value.problem


# --- folders ---

IMAGES = {f"{name}.png": picture(5 + i, 9) for i, name in enumerate(["cat/1", "cat/2", "hot_dog/x", "hot_dog/deep/y"])}


@pytest.fixture
def folder(tmp_path) -> Path:
    return put(tmp_path / "pets", IMAGES)


def test_a_folders_records_are_the_images_of_its_sub_folders_in_order_with_their_labels(folder):
    source = open_source(f"folder:{folder}", needs=("image", "captions", "label"))
    assert isinstance(source, Source)
    assert (source.name, source.split, source.classnames) == ("pets", "all", ("cat", "hot_dog"))
    names = ["cat/1", "cat/2", "hot_dog/deep/y", "hot_dog/x"]
    assert [record.id for record in all_of(source)] == [f"{name}.png" for name in names]
    assert [record.image for record in all_of(source)] == [IMAGES[f"{name}.png"] for name in names]
    assert [record.label for record in all_of(source)] == [0, 0, 1, 1]
    assert [source.shard_of(i) for i in range(4)] == ["cat", "cat", "hot_dog", "hot_dog"]
    assert source.inventory().shards == 2
    assert source.inventory().image_bytes == sum(map(len, IMAGES.values()))


def test_the_caption_of_an_image_is_its_class(folder):
    source = open_source(f"folder:{folder}")
    assert [record.captions for record in all_of(source)] == [("cat",)] * 2 + [("hot dog",)] * 2


def test_a_text_beside_an_image_is_its_caption(folder):
    put(folder, {"cat/1.txt": "a tabby – asleep\n".encode(), "cat/1.alt": b"more", "hot_dog/x.TXT": b"not this"})
    captions = [record.captions for record in all_of(open_source(f"folder:{folder}"))]
    assert captions == [("a tabby – asleep\n",), ("cat",), ("hot dog",), ("hot dog",)]
    both = open_source(f"folder:{folder}", keys=Keys(captions="txt;alt"))
    assert both[0].captions == ("a tabby – asleep\n", "more")


@pytest.mark.parametrize(
    ("text", "problem"),
    [(b"", Problem.NO_CAPTION), (b" \n", Problem.NO_CAPTION), (b"caf\xe9", Problem.NOT_TEXT)],
)
def test_a_text_beside_an_image_that_is_no_caption_makes_that_record_bad_and_no_other(text, problem, folder):
    put(folder, {"cat/2.txt": text})
    source = open_source(f"folder:{folder}")
    assert problem_of(source, 1) == problem
    assert [source[i].captions for i in (0, 2, 3)] == [("cat",), ("hot dog",), ("hot dog",)]


def test_only_images_count_and_their_kinds_may_be_chosen(folder):
    put(folder, {"cat/notes.md": b"", "cat/3.gif": b"gif", "cat/4.JPG": b"jpg", "5.png": b"in no class", "a.txt": b""})
    assert [record.id for record in all_of(open_source(f"folder:{folder}"))][:3] == [
        "cat/1.png",
        "cat/2.png",
        "cat/4.JPG",
    ]
    chosen = open_source(f"folder:{folder}", keys=Keys(image="gif;jpg"))
    assert [record.id for record in all_of(chosen)] == ["cat/3.gif", "cat/4.JPG"]


def test_an_empty_sub_folder_is_a_class_without_images(folder):
    (folder / "dog").mkdir()
    source = open_source(f"folder:{folder}")
    assert source.classnames == ("cat", "dog", "hot_dog")
    assert [record.label for record in all_of(source)] == [0, 0, 2, 2]


def test_names_may_have_dots_spaces_and_any_letters(tmp_path):
    names = ["größe/ein bild.v2.png", "写真/猫.png", "写真/[1].png"]
    root = put(tmp_path / "x", {name: picture() for name in names} | {"größe/ein bild.v2.txt": b"words"})
    source = open_source(f"folder:{root}")
    assert [record.id for record in all_of(source)] == sorted(names)
    assert source[0].captions == ("words",)


def test_a_sub_folder_that_is_named_like_an_image_is_none(folder):
    put(folder, {"cat/album.jpg/3.png": picture()})
    ids = [record.id for record in all_of(open_source(f"folder:{folder}"))]
    assert ids[:3] == ["cat/1.png", "cat/2.png", "cat/album.jpg/3.png"]


def test_an_image_that_leads_nowhere_is_a_bad_record_and_no_reason_to_stop(folder):
    (folder / "cat/1.png").unlink()
    (folder / "cat/1.png").symlink_to("nothing.png")
    source = open_source(f"folder:{folder}")
    assert problem_of(source, 0) == Problem.NO_IMAGE
    assert source[1].image == IMAGES["cat/2.png"]
    (folder / "cat/2.png").unlink()  # under the run
    assert problem_of(source, 1) == Problem.NO_IMAGE


def test_a_folder_without_images_is_refused(tmp_path):
    put(tmp_path / "x", {"1.png": picture(), "cat/notes.md": b""})
    with pytest.raises(UserError, match=r"^no sub-folder of '\S+/x' has an image \(\.jpeg, \.jpg, \.png, \.webp\); "):
        open_source(f"folder:{tmp_path}/x")
    with pytest.raises(UserError, match=r"^there is no folder '\S+/none'; write folder:DIR"):
        open_source(f"folder:{tmp_path}/none")
    with pytest.raises(UserError, match=r"^there is no folder '\S+/1\.png'"):
        open_source(f"folder:{tmp_path}/x/1.png")


def test_a_folders_fingerprint_changes_with_any_file_and_not_with_its_place(folder, tmp_path):
    before = open_source(f"folder:{folder}").fingerprint()
    assert before == json.loads(json.dumps(before))
    copy = put(tmp_path / "copy", IMAGES)
    assert open_source(f"folder:{copy}").fingerprint() == before
    seen = [before]
    for change in ({"cat/1.png": picture(50, 50)}, {"cat/3.png": picture()}):
        put(folder, change)
        seen.append(open_source(f"folder:{folder}").fingerprint())
    (folder / "cat/3.png").rename(folder / "cat/4.png")
    seen.append(open_source(f"folder:{folder}").fingerprint())
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])
    assert (seen[0]["records"], seen[-1]["records"]) == (4, 5)


def test_a_folder_can_be_read_by_another_process(folder):
    source = open_source(f"folder:{folder}")
    assert all_of(pickle.loads(pickle.dumps(source))) == all_of(source)


# --- tables ---

PICTURES = {f"images/{i}.png": picture(5 + i, 9) for i in range(3)}
CSV = "filepath,title\nimages/0.png,nought\nimages/1.png,one\nimages/2.png,two\n"
CAPTIONS = [("nought",), ("one",), ("two",)]


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder of pictures that tables speak of."""
    return put(tmp_path / "data", PICTURES)


def written(root: Path, content: str | bytes | dict[str, list], name: str = "train.csv", **keys) -> Source:
    """Writes a table, and opens it."""
    path = root / name
    if isinstance(content, dict):
        pq.write_table(pa.table(content), path, row_group_size=2)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_source(f"csv:{path}", keys=Keys(**keys))


def test_a_tables_rows_are_records(root):
    source = written(root, CSV)
    assert isinstance(source, Source)
    assert (source.name, source.split, source.classnames, len(source)) == ("train", "all", (), 3)
    assert [record.image for record in all_of(source)] == list(PICTURES.values())
    assert [record.captions for record in all_of(source)] == CAPTIONS
    assert [record.id for record in all_of(source)] == list(PICTURES)
    assert {record.label for record in all_of(source)} == {None}
    assert source.shard_of(2) == "train.csv, rows 0 …"
    assert source.fingerprint() == {"source": "csv", "records": 3, "size": len(CSV)}


COLUMNS = {"filepath": list(PICTURES), "title": ["nought", "one", "two"]}


def test_csv_tsv_and_parquet_are_the_same(root):
    expected = all_of(written(root, CSV))
    assert all_of(written(root, CSV.replace(",", "\t"), "train.tsv")) == expected
    assert all_of(written(root, COLUMNS, "train.parquet")) == expected
    assert all_of(written(root, CSV.replace("\n", "\r\n"), "windows.csv")) == expected
    assert all_of(written(root, b"\xef\xbb\xbf" + CSV.encode(), "excel.csv")) == expected
    assert all_of(written(root, CSV.removesuffix("\n"), "unended.csv")) == expected


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_parquets_texts_may_be_of_any_kind(kind, root):
    """Those of a dictionary, as pandas writes categories, have another dictionary in every group of rows."""
    columns = {name: pa.array(values).cast(kind) for name, values in COLUMNS.items()}
    source = written(root, columns, "train.parquet")
    assert [record.captions for record in all_of(source)] == CAPTIONS
    assert [record.image for record in all_of(source)] == list(PICTURES.values())


@pytest.mark.parametrize("image", table.IMAGES.split(";"))
@pytest.mark.parametrize("text", table.CAPTIONS.split(";"))
def test_columns_are_known_by_their_usual_names(image, text, root):
    content = CSV.replace("filepath", f"number,{image}").replace("title", text).replace("\nimages", "\n7,images")
    assert [record.captions for record in all_of(written(root, content))] == CAPTIONS


def test_other_columns_are_named_by_keys(root):
    content = "short,where,long\n0,images/0.png,nought\n1,images/1.png,\n"
    source = written(root, content, image="path;where", captions="long;short")
    assert [record.captions for record in all_of(source)] == [("nought", "0"), ("1",)]
    assert all_of(written(root, content, image="where", captions="short"))[0].captions == ("0",)


def test_of_several_usual_captions_the_first_counts_and_all_that_are_named(root):
    content = {"filepath": ["images/0.png"], "text": ["text"], "caption": ["caption"]}
    assert written(root, content, "a.parquet")[0].captions == ("caption",)
    assert written(root, content, "a.parquet", captions="caption;text")[0].captions == ("caption", "text")


def test_values_may_have_quotes_commas_and_lines(root):
    words = ['a "b"', "c, d", "e\nf", "  g  ", "NA", "null", "1.50", "true"]
    rows = "".join(f'images/0.png,"{text.replace(chr(34), chr(34) * 2)}"\n' for text in words)
    source = written(root, f"filepath,title\n{rows}")
    assert [record.captions for record in all_of(source)] == [(text,) for text in words]


def test_a_value_with_lines_may_lie_anywhere_in_a_large_table(root):
    """It is read in pieces of a MiB, that end within a record here and there."""
    texts = [f"{i}\n" * (i % 50) + "end" for i in range(20_000)]
    rows = "".join(f'images/0.png,"{text}"\n' for text in texts)
    assert len(rows) > 2 << 20
    source = written(root, f"filepath,title\n{rows}")
    assert len(source) == len(texts)
    assert [source[i].captions for i in range(0, len(source), 97)] == [(text,) for text in texts[::97]]


@pytest.mark.parametrize("row", [0, 1, 19_999])
def test_a_caption_that_is_not_utf_8_makes_that_record_bad_and_no_other(row, root):
    rows = [b"images/0.png,a caption of some length\n"] * 20_000
    rows[row] = b"images/0.png,caf\xe9\n"
    source = written(root, b"filepath,title\n" + b"".join(rows))
    assert problem_of(source, row) == Problem.NOT_TEXT
    assert len(source) == len(rows)
    assert all(source[i].captions == ("a caption of some length",) for i in (0, 1, 2, 19_998, 19_999) if i != row)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("images/none.png,words", Problem.NO_IMAGE),
        (",words", Problem.NO_IMAGE),
        ("images/0.png\0,words", Problem.NO_IMAGE),
        ("images/0.png,", Problem.NO_CAPTION),
        ('images/0.png,"  "', Problem.NO_CAPTION),
        (f"images/0.png,{'a' * 70_000}", Problem.LONG_CAPTION),
        ("memory://nowhere/at/all.png,words", Problem.NO_IMAGE),
    ],
)
def test_a_row_that_is_no_record_is_bad_and_no_other(row, problem, root):
    source = written(root, CSV + f"{row}\nimages/0.png,last\n")
    assert problem_of(source, 3) == problem
    assert [source[i].captions for i in (0, 4)] == [("nought",), ("last",)]


def test_what_parquet_has_not_is_a_bad_record(root):
    columns = {"filepath": ["images/0.png", None, "images/2.png"], "title": ["nought", "one", None]}
    source = written(root, columns, "train.parquet")
    assert source[0].captions == ("nought",)
    assert [problem_of(source, i) for i in (1, 2)] == [Problem.NO_IMAGE, Problem.NO_CAPTION]


def test_a_list_in_parquet_is_several_captions(root):
    texts = [["a", "b", "c"], [], ["", "d", None], None, [" "]]
    columns = {"filepath": ["images/0.png"] * 5, "captions": pa.array(texts, pa.list_(pa.string()))}
    source = written(root, columns, "train.parquet")
    assert [source[i].captions for i in (0, 2)] == [("a", "b", "c"), ("d",)]
    assert [problem_of(source, i) for i in (1, 3, 4)] == [Problem.NO_CAPTION] * 3


def test_paths_may_be_relative_absolute_or_urls(root, tmp_path, monkeypatch):
    system = fsspec.filesystem("memory")
    system.pipe_file(f"memory://{tmp_path.name}/far.png", picture(33, 44))
    paths = ["images/0.png", f"{root}/images/1.png", f"memory://{tmp_path.name}/far.png", "../data/images/2.png"]
    pictures = [PICTURES["images/0.png"], PICTURES["images/1.png"], picture(33, 44), PICTURES["images/2.png"]]
    source = written(root, "filepath,title\n" + "".join(f"{path},words\n" for path in paths))
    assert [record.image for record in all_of(source)] == pictures
    monkeypatch.chdir(root)
    assert [record.image for record in all_of(open_source("csv:train.csv"))] == pictures
    monkeypatch.setenv("HOME", str(root))
    assert [record.image for record in all_of(open_source("csv:~/train.csv"))] == pictures
    system.rm(f"memory://{tmp_path.name}", recursive=True)


def test_a_table_behind_a_url_speaks_of_what_lies_beside_it(root, tmp_path, cache):
    system, url = fsspec.filesystem("memory"), f"memory://{tmp_path.name}"
    expected = all_of(written(root, CSV))
    pq.write_table(pa.table(COLUMNS), root / "train.parquet")
    for name in [*PICTURES, "train.csv", "train.parquet"]:
        system.pipe_file(f"{url}/{name}", (root / name).read_bytes())
    for name in ("train.csv", "train.parquet"):
        assert all_of(open_source(f"csv:{url}/{name}")) == expected
    assert len(list(cache.glob("*.index"))) == 2
    system.rm(url, recursive=True)


def test_a_table_can_be_read_by_another_process(root):
    source = written(root, CSV)
    assert all_of(pickle.loads(pickle.dumps(source))) == all_of(source)


def test_a_table_has_captions_and_no_labels(root):
    written(root, CSV)
    with pytest.raises(UserError, match=r"^records of csv: have no label; they have: image, captions$"):
        open_source(f"csv:{root}/train.csv", needs=("image", "label"))


# --- its copy ---


def test_a_table_is_read_once(root, made):
    first = written(root, CSV)
    [kept] = root.glob("*.index")
    before = kept.stat().st_mtime_ns
    again = open_source(f"csv:{root}/train.csv")
    assert made == ["train.csv"]
    assert kept.stat().st_mtime_ns == before
    assert all_of(again) == all_of(first)


def test_a_table_that_changes_is_read_anew(root, made):
    assert len(written(root, CSV)) == 3
    longer = written(root, CSV + "images/0.png,again\n")
    assert [record.captions for record in all_of(longer)] == [*CAPTIONS, ("again",)]
    same_size = written(root, CSV.replace("one", "uno") + "images/1.png,again\n")
    assert [record.captions for record in all_of(same_size)] == [("nought",), ("uno",), ("two",), ("again",)]
    assert same_size[3].id == "images/1.png"
    assert made == ["train.csv"] * 3
    assert longer.fingerprint() != written(root, CSV).fingerprint()


def test_two_choices_of_columns_have_copies_of_their_own(root, made):
    content = CSV.replace("title", "title,alt").replace("\n", ",x\n").replace("alt,x", "alt")
    sources = [written(root, content, captions=name) for name in ("title", "alt")]
    (root / "train.csv").touch()
    assert [source[0].captions for source in sources] == [("nought",), ("x",)]
    assert len(made) == len(list(root.glob("*.index"))) == 2


def test_a_copy_that_cannot_lie_beside_its_table_is_whole_in_the_cache_folder(root, cache):
    """A folder has the copy's name, which is seen only when all has been written."""
    path = put(root, {"train.csv": CSV.encode()}) / "train.csv"
    [of] = storage.look_up([str(path)])
    (index_file.places(of, index_file.tag_of(["filepath", "title"]))[0] / "something").mkdir(parents=True)
    assert [record.captions for record in all_of(open_source(f"csv:{path}"))] == CAPTIONS
    assert len(list(cache.glob("*.index"))) == 1
    assert [record.captions for record in all_of(open_source(f"csv:{path}"))] == CAPTIONS


# --- what is no table ---


def test_rows_of_more_or_fewer_fields_are_left_out_and_counted(root):
    rows = [f"images/{i % 3}.png,number {i}" for i in range(1000)]
    odd = ["images/0.png,an unquoted, comma", "images/0.png"]
    content = "filepath,title\n" + "\n".join([*rows[:500], odd[0], *rows[500:], odd[1]]) + "\n"
    source = written(root, content)
    assert [source[i].captions for i in (0, 500, 999)] == [("number 0",), ("number 500",), ("number 999",)]
    assert (len(source), source.inventory().left_out) == (1000, {"row of another length": 2})
    again = open_source(f"csv:{root}/train.csv")
    assert (len(again), again.inventory().left_out) == (1000, {"row of another length": 2})


def test_a_tsv_has_no_quotes_so_that_a_lone_one_swallows_no_other_row(root):
    content = 'filepath\ttitle\nimages/0.png\t"a lone quote\nimages/1.png\tthe next\nimages/2.png\tan 8" pipe\n'
    source = written(root, content, "train.tsv")
    assert [record.captions[0] for record in all_of(source)] == ['"a lone quote', "the next", 'an 8" pipe']


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "", "Empty CSV file"),
        ("a.csv", b"filepath,title,caf\xe9\na,b,c\n", "utf-8"),
        ("a.parquet", "filepath,title\na,b\n", "Parquet magic bytes not found"),
        ("a.parquet", "", "Parquet file size is 0 bytes"),
    ],
    ids=["empty", "Latin-1 names", "csv", "empty parquet"],
)
def test_a_table_that_cannot_be_read_is_said_in_a_line(name, content, words, root, cache):
    with pytest.raises(UserError, match=rf"^\S+/{name} cannot be read as a table: .*{words}") as error:
        written(root, content, name)
    assert "\n" not in str(error.value)
    assert index_file.CACHE not in str(error.value)
    assert not [*root.glob("*.index"), *cache.glob("*")]


@pytest.mark.parametrize(
    "content", ["filepath,title\n", {"filepath": pa.array([], "string"), "title": pa.array([], "string")}]
)
def test_a_table_without_rows_is_refused(content, root):
    with pytest.raises(UserError, match=r"/a\.parquet has no row$|/a\.csv has no row$"):
        written(root, content, "a.csv" if isinstance(content, str) else "a.parquet")


@pytest.mark.parametrize(
    ("content", "keys", "words"),
    [
        ("url,title\na,b\n", {}, "paths of images by a usual name; it has url, title; say which in data.image_keys"),
        ("path,words\na,b\n", {}, "captions by a usual name; it has path, words; say which in data.caption_keys"),
        (CSV, {"image": "picture"}, "paths of images by a usual name; it has filepath, title; "),
        (CSV, {"captions": "words;alt"}, "captions by a usual name; it has filepath, title; "),
        (
            {"image": [{"bytes": b"x", "path": None}], "caption": ["a"]},
            {},
            r"paths of images by a usual name; it has image \(struct<.*>\), caption; ",
        ),
        ({"path": ["a"], "title": [5]}, {}, r"captions by a usual name; it has path, title \(int64\); "),
    ],
)
def test_without_a_column_of_paths_or_of_captions_those_that_there_are_are_named(content, keys, words, root):
    with pytest.raises(UserError, match=rf"^\S+/a\.\w+ has no column of {words}"):
        written(root, content, "a.parquet" if isinstance(content, dict) else "a.csv", **keys)


def test_a_column_of_another_kind_is_no_reason_to_stop_where_another_fits(root):
    columns = {"image": [{"bytes": b"x"}], "path": ["images/0.png"], "title": [5], "text": ["words"]}
    assert written(root, columns, "a.parquet")[0] == Record(PICTURES["images/0.png"], ("words",), None, "images/0.png")


def test_a_table_that_is_not_there_is_said(root):
    with pytest.raises(UserError, match=r"^1 of 1 files are not there: \S+/none\.csv$"):
        open_source(f"csv:{root}/none.csv")


def test_a_server_that_fails_within_a_table_is_said_and_leaves_no_half_of_it(root, tmp_path, cache, monkeypatch):
    """Not taken for a place that cannot be written: nothing half is written to another one then."""
    system, url = fsspec.filesystem("memory"), f"memory://{tmp_path.name}/train.csv"
    rows = b"images/0.png,a caption of some length\n" * 200_000
    system.pipe_file(url, b"filepath,title\n" + rows)

    class Failing(io.BytesIO):
        def read(self, size: int = -1) -> bytes:
            if self.tell() > 5 << 20:
                raise RuntimeError("the server\nis gone")
            return super().read(size)

    opened = storage.opened
    monkeypatch.setattr(storage, "opened", lambda of: Failing(system.cat_file(of.path)))
    with pytest.raises(UserError, match=r"^memory://\S+/train\.csv cannot be read as a table: the server is gone$"):
        open_source(f"csv:{url}")
    assert not list(cache.glob("*"))
    monkeypatch.setattr(storage, "opened", opened)
    assert len(open_source(f"csv:{url}")) == 200_000
    system.rm(f"memory://{tmp_path.name}", recursive=True)


def test_keys_are_what_they_were_written_as():
    keys = Keys(image=" a ; b;", captions=None)
    assert (keys.images_or("x"), keys.captions_or("y;z")) == (("a", "b"), ("y", "z"))
    assert dataclasses.asdict(Keys())["min_image_size"] == 1
