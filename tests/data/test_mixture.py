"""Several sources as one: exact proportions, ranges, unions; and the specs that say so."""

import collections
import itertools
from fractions import Fraction

import pytest
import shards

from clip_jax.data.pipeline import Order
from clip_jax.data.sources import Keys, open_source
from clip_jax.data.sources.mixture import Mixture, Range
from clip_jax.errors import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    """Specs of 30 and of 50 records."""
    root = tmp_path_factory.mktemp("two")
    return (
        f"wds:{shards.write_several(root / 'first', shards=1, records=30)}",
        f"wds:{shards.write_several(root / 'second', shards=2, records=25)}",
    )


def drawn(source, count: int, seed: int = 0) -> list[tuple[int, int]]:
    order = Order.of(source, seed)
    return [order[position] for position in range(count)]


@pytest.mark.parametrize("draws", [4000, pytest.param(100_000, marks=pytest.mark.full)])
def test_three_quarters_of_the_draws_are_of_the_first_and_so_are_those_of_every_batch(folders, draws):
    source = open_source(f"3 * {folders[0]} + 1 * {folders[1]}")
    assert len(source) == 80
    first = [index < 30 for _, index in drawn(source, draws)]
    assert 4 * sum(first) == 3 * draws
    assert all(sum(first[start : start + 4]) == 3 for start in range(0, draws, 4))


def test_each_source_has_epochs_of_its_own(folders):
    source = open_source(f"3 * {folders[0]} + 1 * {folders[1]}")
    seen = collections.defaultdict(list)
    for epoch, index in drawn(source, 400):
        seen[index < 30, epoch].append(index)
    assert all(sorted(seen[True, epoch]) == list(range(30)) for epoch in range(10))
    assert all(sorted(seen[False, epoch]) == list(range(30, 80)) for epoch in range(2))
    assert seen[True, 0] != seen[True, 1]


@pytest.mark.parametrize(
    "weights", [("1", "1"), ("0.25", "0.75"), ("2", "3", "5"), ("0.1", "0.02", "7"), ("1", "9999")]
)
def test_any_weights_are_exact_over_a_cycle_and_never_far_from_it(folders, weights):
    specs = itertools.cycle(folders)
    source = open_source(" + ".join(f"{weight} * {spec}" for weight, spec in zip(weights, specs, strict=False)))
    shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    slots = [slot for slot, _ in Order.of(source, 0)._slots]
    assert all(slots.count(i) == share * len(slots) for i, share in enumerate(shares))
    for end in range(1, len(slots), max(1, len(slots) // 200)):
        assert all(abs(slots[:end].count(i) - share * end) < len(weights) for i, share in enumerate(shares))


def test_records_come_from_where_their_index_says(folders):
    source = open_source(f"{folders[0]} + {folders[1]}")
    first, second = map(open_source, folders)
    assert [source[i] for i in (0, 29, 30, 79)] == [first[0], first[29], second[0], second[49]]
    assert source.shard_of(29) == "first/00000.tar"
    assert source.shard_of(79) == "second/00001.tar"
    assert source.inventory().shards == 3


def test_without_weights_an_epoch_has_every_record_once(folders):
    source = open_source(f"{folders[0]} + {folders[1]}")
    assert sorted(index for _, index in drawn(source, 80)) == list(range(80))


def test_a_range_is_a_part_of_a_source(folders):
    whole = open_source(folders[0])
    for spec, start, stop in (("[10:20]", 10, 20), ("[:5]", 0, 5), ("[25:]", 25, 30), ("[25:100]", 25, 30)):
        part = open_source(folders[0] + spec)
        assert isinstance(part, Range)
        assert [part[i] for i in range(len(part))] == [whole[i] for i in range(start, stop)]
        assert part.fingerprint()["range"] == [start, stop]
    assert len(open_source(f"2 * {folders[0]}[:5] + 1 * {folders[1]}[5:]")) == 50


def test_the_fingerprint_tells_weights_ranges_and_order_of_the_sources_apart(folders):
    one, two = folders
    specs = (one, f"{one}[:29]", f"{one} + {two}", f"{two} + {one}", f"1 * {one} + 1 * {two}", f"2 * {one} + 1 * {two}")
    prints = [open_source(spec).fingerprint() for spec in specs]
    assert all(a != b for a, b in itertools.combinations(prints, 2))
    assert open_source(f"4 * {one} + 2 * {two}").fingerprint() == prints[-1]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("3 * {0} + {1}", "gives a weight to some"),
        ("0 * {0} + 1 * {1}", "the weight 0 of .* must be a number above 0"),
        ("1.2.3 * {0} + 1 * {1}", "the weight 1.2.3 of"),
        ("1 * {0} + 0.33333 * {1}", "repeat exactly after 133,333 examples only, more than 10,000; round them"),
        ("{0}[30:]", r"\[30:\] leaves nothing of the 30 records"),
        ("{0}[7:7]", r"\[7:7\] leaves nothing"),
        ("{0} + nonsense", "'nonsense' is not a data set; write tfds:"),
        ("{0} + ", "'' is not a data set"),
        ("wds:", "'wds:' is not a data set"),
        ("wds:/nowhere/{{0..2}}.tar", "3 of 3 files are not there: /nowhere/0.tar, /nowhere/1.tar"),
    ],
)
def test_what_is_wrong_with_a_spec_is_said(folders, spec, words):
    with pytest.raises(UserError, match=words):
        open_source(spec.format(*folders))


def test_what_records_do_not_have_is_said(folders):
    with pytest.raises(UserError, match="records of wds: have no label; they have: image, captions"):
        open_source(folders[0], needs=("image", "label"))
    with pytest.raises(UserError, match=r"no record to train on: no image \(30\)"):
        open_source(folders[0], keys=Keys(image="png"))


def test_a_mixture_is_the_same_object_for_the_order_and_for_its_records(folders):
    sources = [open_source(folder) for folder in folders]
    mixture = Mixture(sources, [Fraction(3), Fraction(1)])
    assert (mixture.lengths, mixture.turns) == ((30, 50), (3, 1))
