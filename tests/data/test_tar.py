"""The members of a tar file are those that Python's `tarfile` finds, and what is broken is said: never guessed."""

import gzip
import io
import itertools
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clip_jax.data import tar
from clip_jax.data.tar import BLOCK, BrokenTarError, Member

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
END = bytes(2 * BLOCK)  # what ends an archive
OTHERS = [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE]

formats = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def entry(name: str, size: int = 0, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def archive(entries: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.PAX_FORMAT, **options) -> bytes:
    """Returns an archive that Python's `tarfile` makes, with two blocks of zeros at its end and no more."""
    headers = [info.tobuf(form, "utf-8", "surrogateescape") for info, _ in entries]
    parts = [header + padded(content) for header, (_, content) in zip(headers, entries, strict=True)]
    start = tarfile.TarInfo.create_pax_global_header(options["pax_headers"]) if options else b""
    return start + b"".join(parts) + END


def of(names: list[str], form: int = tarfile.PAX_FORMAT, content: bytes = b"content") -> bytes:
    return archive([(entry(name, len(content)), content) for name in names], form)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def sealed(header: bytes) -> bytes:
    """Returns a header with the checksum that it ought to have."""
    total = sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")
    return header[:148] + b"%06o\0 " % total + header[156:]


def patched(header: bytes, at: int, field: bytes) -> bytes:
    """Returns a header of which a field is another."""
    return sealed(header[:at] + field + header[at + len(field) :])


def read(data: bytes) -> tuple[list[Member], str | None]:
    """Returns the members, and what is wrong after them. It must go forwards only, and end."""
    members, before = [], -1

    def part(start: int, size: int) -> bytes:
        nonlocal before
        assert start > before or not size
        before = start if size else before
        return data[start : start + size]

    try:
        for member in tar.members(part, len(data)):
            members.append(member)
            assert member.start >= BLOCK
            assert 0 <= member.size <= len(data) - member.start
            assert member.check == tar.check_of(data[member.start - BLOCK : member.start])
    except BrokenTarError as error:
        return members, str(error)
    return members, None


def listed(data: bytes) -> list[tuple[str, int, int]]:
    members, wrong = read(data)
    assert wrong is None
    return [(member.name, member.start, member.size) for member in members]


def entries_of(data: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8", errors="surrogateescape") as file:
        return file.getmembers()


def by_python(data: bytes) -> list[tuple[str, int, int]]:
    return [(info.name, info.offset_data, info.size) for info in entries_of(data) if info.isreg()]


# --- what `tarfile` finds ---

LONG = ["a" * 99, "b" * 100, "c" * 101, "d/" * 50 + "e", "f" * 300, "g" * 154 + "/" + "h" * 99]
STRANGE = ["../up.jpg", "/etc/absolute.jpg", "./here.jpg", " space .txt ", "a//b", "line\nbreak", "a=b", "x"]
UNICODE = ["größe.jpg", "写真/猫.png", "🐈.txt", "é" * 60, "写" * 120, "e\u0301.txt"]
NOT_UTF8 = [raw.decode("utf-8", "surrogateescape") for raw in (b"\xff.jpg", b"caf\xe9.txt", b"\xe5\x86" * 70)]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
@pytest.mark.parametrize("names", [LONG, STRANGE, UNICODE, NOT_UTF8], ids=["long", "strange", "unicode", "not UTF-8"])
def test_names_of_every_kind_are_as_tarfile_reads_them(names, form):
    data = of(names, form)
    assert listed(data) == by_python(data)
    assert [name for name, *_ in listed(data)] == names


def test_a_ustar_prefix_is_the_names_beginning():
    names = ["short", "p" * 155 + "/" + "n" * 100, "folder/" * 20 + "写真.jpg", "q" * 3 + "/" + "r" * 99]
    data = of(names, tarfile.USTAR_FORMAT)
    assert any(data[at + 345] for at in range(0, len(data), 2 * BLOCK))
    assert listed(data) == by_python(data)
    assert [name for name, *_ in listed(data)] == names


def test_what_old_gnu_headers_have_in_the_place_of_a_prefix_is_no_name():
    header = entry("a.jpg").tobuf(tarfile.GNU_FORMAT)
    assert listed(patched(header, 345, b"12345670123\0") + END) == [("a.jpg", BLOCK, 0)]


@formats
def test_sizes_around_a_block_and_no_size_at_all(form):
    sizes = [0, 1, 511, 512, 513, 0, 1023, 1024, 1025, 10_000]
    data = archive([(entry(f"{i}", size), b"\1" * size) for i, size in enumerate(sizes)], form)
    assert listed(data) == by_python(data)
    assert [size for *_, size in listed(data)] == sizes


@formats
def test_folders_links_and_devices_between_files_are_passed_over(form):
    between = [(entry(f"other{kind!r}", 0, type=kind, linkname="a" * 90), b"") for kind in OTHERS]
    files = [(entry(f"{i}.jpg", 600), b"\1" * 600) for i in range(len(between))]
    data = archive([part for pair in zip(between, files, strict=True) for part in pair], form)
    assert listed(data) == by_python(data)
    assert [name for name, *_ in listed(data)] == [f"{i}.jpg" for i in range(6)]


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_file_has_no_content_whatever_size_it_gives(kind):
    data = archive([(entry("link", 5000, type=kind), b""), (entry("a.jpg", 3), b"abc")])
    assert listed(data) == by_python(data) == [("a.jpg", 2 * BLOCK, 3)]


@pytest.mark.parametrize("kind", [b"A", b"Z", b"D", b"M", b"V", b"N"])
def test_what_is_of_a_kind_that_nobody_knows_is_passed_over_with_its_content(kind):
    data = archive([(entry("what", 700, type=kind), b"\1" * 700), (entry("a.jpg", 3), b"abc")])
    assert listed(data) == by_python(data) == [("a.jpg", 4 * BLOCK, 3)]


def test_a_sparse_file_is_passed_over():
    sparse = patched(entry("holes", 700, type=tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT), 483, b"00000010000\0")
    data = sparse + padded(b"\1" * 700) + of(["a.jpg"])
    assert [info.name for info in entries_of(data)] == ["holes", "a.jpg"]
    assert listed(data) == [("a.jpg", 4 * BLOCK, 7)]


@pytest.mark.parametrize("kind", [b"0", b"\0", b"7"], ids=["0", "NUL", "7"])
def test_all_three_kinds_of_regular_files_count(kind):
    data = archive([(entry("a", 700, type=kind), b"\1" * 700), (entry("b", 3), b"abc")])
    assert listed(data) == by_python(data) == [("a", BLOCK, 700), ("b", 4 * BLOCK, 3)]


def test_a_folder_of_the_oldest_tars_is_a_file_whose_name_ends_in_a_slash():
    data = archive([(entry("folder/", type=tarfile.AREGTYPE), b""), (entry("folder/a", 3), b"abc")])
    assert listed(data) == by_python(data) == [("folder/a", 2 * BLOCK, 3)]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_long_targets_of_links_and_long_names_of_folders_are_not_the_next_files(form):
    others = [
        entry("s", type=tarfile.SYMTYPE, linkname="target" * 60),
        entry("n" * 200, type=tarfile.SYMTYPE, linkname="target" * 60),
        entry("folder" * 60, type=tarfile.DIRTYPE),
    ]
    data = archive([(info, b"") for info in others] + [(entry("a.jpg", 5), b"\1" * 5)], form)
    assert listed(data) == by_python(data)
    assert [name for name, *_ in listed(data)] == ["a.jpg"]


def test_pax_headers_of_other_things_change_neither_name_nor_place():
    times = [(entry(f"{i}.jpg", 5, mtime=1.25 + i), b"\1" * 5) for i in range(3)]
    data = archive(times, pax_headers={"comment": "global", "mtime": "3.5"})
    assert data.count(b"mtime=") == 4
    assert listed(data) == by_python(data)
    assert [name for name, *_ in listed(data)] == ["0.jpg", "1.jpg", "2.jpg"]


def test_a_size_in_a_pax_header_goes_before_the_headers_own():
    info = entry("a.jpg", 700, pax_headers={"size": "700"})
    data = archive([(info, b"\1" * 700), (entry("b", 3), b"abc")])
    own = 2 * BLOCK  # after the pax header and its block
    data = data[:own] + patched(data[own : own + BLOCK], 124, b"00000000000\0") + data[own + BLOCK :]
    assert listed(data) == by_python(data)
    assert [size for *_, size in listed(data)] == [700, 3]


def test_solaris_has_a_letter_of_its_own_for_pax_headers():
    data = of(["a" * 200 + ".jpg", "b.txt"])
    assert data[156:157] == b"x"
    data = patched(data[:BLOCK], 156, b"X") + data[BLOCK:]
    assert listed(data) == by_python(data)
    assert [name for name, *_ in listed(data)] == ["a" * 200 + ".jpg", "b.txt"]


def test_numbers_in_gnus_binary_form_are_read():
    header = entry("a", 0, uid=2**40, mtime=-1).tobuf(tarfile.GNU_FORMAT)
    assert header[108] == 0x80
    data = patched(header, 124, b"\x80" + (700).to_bytes(11, "big")) + padded(b"\1" * 700) + of(["b"])
    assert listed(data) == by_python(data)
    assert [size for *_, size in listed(data)] == [700, 7]


def test_a_file_of_40_gigabytes_is_stepped_over_and_not_read():
    size, after = 40 << 30, of(["b.jpg"])
    header = entry("a.jpg", size).tobuf(tarfile.GNU_FORMAT)
    asked = []

    def part(start: int, length: int) -> bytes:
        asked.append(length)
        return header if not start else after[start - BLOCK - size :][:length]

    found = list(tar.members(part, BLOCK + size + len(after)))
    assert [member[:3] for member in found] == [("a.jpg", BLOCK, size), ("b.jpg", 2 * BLOCK + size, 7)]
    assert asked == [BLOCK] * 4  # the last: what may be behind the end


def test_a_tar_file_in_a_tar_file_is_not_looked_into():
    inner = of(["inner.jpg"])
    data = archive([(entry("outer.tar", len(inner)), inner), (entry("a", 3), b"abc")])
    assert listed(data) == by_python(data)
    assert [name for name, *_ in listed(data)] == ["outer.tar", "a"]


@pytest.mark.skipif(not shutil.which("tar"), reason="no tar on this machine")
@pytest.mark.parametrize("form", ["v7", "ustar", "gnu", "oldgnu", "posix"])
def test_what_the_tar_command_writes_is_found_where_it_is(form, tmp_path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    for name, size in {"a.jpg": 700, "inner/é.txt": 0, "n" * 90: 512, "inner/b": 20_000}.items():
        (folder / name).write_bytes(b"\1" * size)
    (folder / "link").symlink_to("a.jpg")
    (folder / "hard").hardlink_to(folder / "a.jpg")
    if form != "v7":
        os.mkfifo(folder / "fifo")
    if form in ("gnu", "posix"):
        (folder / ("m" * 200)).write_bytes(b"\2")
    run = ["tar", f"--format={form}", "-cf", tmp_path / "a.tar", "-C", tmp_path, "folder"]
    if subprocess.run(run, stderr=subprocess.PIPE, check=False).returncode:
        pytest.skip("not GNU's tar")
    data = (tmp_path / "a.tar").read_bytes()
    assert listed(data) == by_python(data)
    assert len(listed(data)) == (5 if form in ("gnu", "posix") else 4)


def written_names(form: int) -> st.SearchStrategy[str]:
    def name(least: int, most: int) -> st.SearchStrategy[str]:
        text = st.text(st.characters(exclude_characters="\0/", codec="utf-8"), min_size=1).map(str.encode)
        raw = st.binary(min_size=least, max_size=most)
        parts = st.one_of(raw, text, st.sampled_from(["a", "a" * 99, "ä" * 50, "b" * 100]).map(str.encode))
        clean = parts.map(lambda part: part.replace(b"\0", b"_").replace(b"/", b"-")[:most])
        return clean.map(lambda part: part.decode("utf-8", "surrogateescape"))

    if form == tarfile.USTAR_FORMAT:  # a prefix of 155 bytes, and 100
        return st.one_of(name(1, 100), st.tuples(name(1, 155), name(1, 100)).map("/".join))
    return st.lists(name(1, 300), min_size=1, max_size=3).map("/".join)


@formats
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_tarfile_writes_is_found_where_it_is(form, data):
    contents = st.one_of(st.binary(max_size=20), st.integers(0, 2000).map(bytes))
    files = data.draw(st.lists(st.tuples(written_names(form), contents), max_size=6))
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:", format=form, encoding="utf-8", errors="surrogateescape") as writer:
        for name, content in files:
            writer.addfile(entry(name, len(content)), io.BytesIO(content))
    found = listed(file.getvalue())
    assert found == by_python(file.getvalue())
    assert [name for name, *_ in found] == [name for name, _ in files]
    assert [file.getvalue()[start:][:size] for _, start, size in found] == [content for _, content in files]


# --- where it ends ---

SMALL = archive(
    [
        (entry("a.jpg", 700), b"\1" * 700),
        (entry("b" * 120, 3), b"abc"),
        (entry("link", type=tarfile.SYMTYPE, linkname="l" * 120), b""),
        (entry("empty", mtime=0.5), b""),
        (entry("c.txt", BLOCK), b"\2" * BLOCK),
    ]
)


def test_an_archive_ends_with_a_block_of_zeros_and_what_comes_after_it_is_not_read_in_silence():
    data = of(["a", "b"])
    assert listed(data[:-BLOCK]) == listed(data) == by_python(data)
    assert listed(data + bytes(20 * BLOCK)) == listed(data + bytes(7)) == listed(data)
    members, wrong = read(data + of(["c"]))
    assert members == read(data)[0]
    assert wrong.startswith("has a mark of its end before byte ")


def test_an_archive_that_only_stops_may_have_been_cut_short_between_two_members():
    data = of(["a", "b"])
    members, wrong = read(data[: -len(END)])
    assert members == read(data)[0]
    assert wrong == "has no end mark, as a file that was cut short between two members"


@pytest.mark.parametrize("data", [b"", END, bytes(BLOCK), bytes(10_240)])
def test_of_nothing_there_is_nothing_wrong(data):
    assert read(data) == ([], None)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_of_an_archive_cut_at_any_byte_all_whole_members_are_there_and_the_cut_is_said(form):
    infos = [entry("a", 700), entry("b" * 120, 3), entry("l", type=b"2", linkname="l" * 120), entry("é" * 70)]
    data = archive([(info, b"\1" * info.size) for info in infos], form)
    whole, end = read(data)[0], len(data) - len(END)
    for cut in range(len(data) + 1):
        members, wrong = read(data[:cut])
        assert members == [member for member in whole if member.start + member.size <= cut]
        if cut == 0 or cut >= end + BLOCK:
            assert wrong is None
        else:
            assert wrong.startswith(("cut short", "has no end mark")), cut


def test_where_it_is_cut_is_said():
    assert read(SMALL[:100])[1] == "cut short at byte 0"
    assert read(SMALL[: BLOCK + 500])[1] == "cut short in 'a.jpg': 200 bytes are missing"
    assert read(archive([(entry("big", 2**35), b"")], tarfile.GNU_FORMAT)) == (
        [],
        f"cut short in 'big': {2**35 - len(END):,} bytes are missing",
    )


# --- what is broken ---


def test_a_byte_of_a_header_that_is_another_ends_the_archive_there():
    members = listed(SMALL)
    for info in entries_of(SMALL):
        header, before = info.offset, [found for found in members if found[1] <= info.offset]
        for at in range(header, header + BLOCK):
            broken = bytearray(SMALL)
            broken[at] ^= 0xFF
            found, wrong = read(bytes(broken))
            assert [member[:3] for member in found] == before
            assert wrong == f"no tar header at byte {header:,}"


def test_a_compressed_archive_is_to_be_unpacked():
    with pytest.raises(BrokenTarError, match=r"gzip.*unpack it"):
        list(tar.members(lambda start, size: gzip.compress(SMALL * 9)[start : start + size], 9 * len(SMALL)))


@pytest.mark.parametrize("text", [b"<html>not here</html>" * 100, b"\1" * 2000, b"PK\3\4" + bytes(2000)])
def test_what_is_no_tar_file_is_said(text):
    assert read(text) == ([], "no tar header at byte 0")


@pytest.mark.parametrize(
    ("records", "wrong"),
    [
        (b"19 path=other.name\n", None),
        (b"19 path=other.name\n\0\0\0", None),
        (b"x path=name\n", "no pax header at byte 0"),
        (b"99 path=name\n", "no pax header at byte 0"),
        (b"0 path=name\n", "no pax header at byte 0"),
        (b"-5 path=name\n", "no pax header at byte 0"),
        (b"3 path=name\n", "no pax header at byte 0"),
        (b"no digits and no space".replace(b" ", b"_"), "no pax header at byte 0"),
        (b"12 size=few\n", "no pax header at byte 0"),
        (b"15 size=-10000\n", "no pax header at byte 0"),
        (b"11 size=-1\n", "no pax header at byte 0"),
        (b"9 size=\n", "no pax header at byte 0"),
        (b"9999 size=" + b"9" * 9988 + b"\n", "no pax header at byte 0"),
    ],
)
def test_a_pax_header_says_what_it_may(records, wrong):
    header = entry("pax", len(records), type=b"x").tobuf(tarfile.USTAR_FORMAT)
    members, found = read(header + padded(records) + of(["name"]))
    assert found == wrong
    assert [member.name for member in members] == ([] if wrong else ["other.name"])


def test_a_pax_header_of_too_many_bytes_is_not_even_read():
    size = tar.MAX_EXTENSION + 1
    data = entry("pax", size, type=b"x").tobuf(tarfile.USTAR_FORMAT) + padded(bytes(size)) + of(["a"])
    assert read(data) == ([], f"a header of {size:,} bytes at byte 0")


def test_a_pax_header_of_very_many_words_takes_no_longer_than_its_length():
    records = b"5 a=\n" * (tar.MAX_EXTENSION // 5)
    header = entry("pax", len(records), type=b"x").tobuf(tarfile.USTAR_FORMAT)
    started = time.monotonic()
    assert read(header + padded(records) + of(["a"]))[1] is None
    assert time.monotonic() - started < 3  # 0.1 s; with a copy of the rest for every word, 20 s


def headers() -> Iterator[int]:
    at = 0
    for info in entries_of(SMALL):
        yield from range(at, info.offset_data, BLOCK)
        at = info.offset_data + -(-info.size // BLOCK) * BLOCK


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=3000))
@example(b"\x1f\x8b")
@example(b"\xff" * BLOCK)
def test_random_bytes_are_an_archive_or_a_broken_one(data):
    read(data)


FLIPS = st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(1, 255)), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None)
@given(flips=FLIPS, seal=st.booleans(), cut=st.integers(0, len(SMALL)))
def test_flipped_bits_break_an_archive_and_nothing_else(flips, seal, cut):
    """Also where the checksums are made to agree: then what headers say is taken at its word, and must make sense."""
    data = bytearray(SMALL)
    for at, bits in flips:
        data[at] ^= bits
    if seal:
        for at in headers():
            data[at : at + BLOCK] = sealed(bytes(data[at : at + BLOCK]))
    read(bytes(data[:cut]))
    read(bytes(data))


NUMBERS = [b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0", b"-0000000001\0", b"0x000000001\0", b"\0" * 12]
NUMBERS += [b" " * 12, b"00000000008\0", b"1_0\0" + bytes(8), "٣".encode() * 6, b"\x80" + bytes(10) + b"\3"]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("kind", [b"0", b"5", b"x", b"L", b"K", b"g", b"Z"])
def test_a_size_of_any_kind_is_a_size_or_breaks_the_archive(number, kind):
    header = patched(entry("a.jpg", type=kind).tobuf(tarfile.USTAR_FORMAT), 124, number)
    members, wrong = read(header + of(["b"]))
    assert wrong or members[-1].start == len(header) + BLOCK


def test_members_are_found_one_by_one():
    """So that a shard is read once, from its beginning to its end."""
    asked = []

    def part(start: int, size: int) -> bytes:
        asked.append(start)
        return SMALL[start : start + size]

    found = tar.members(part, len(SMALL))
    next(found)
    assert asked == [0]
    assert len(list(itertools.islice(found, 10))) == 3
