"""What a benchmark makes of its seconds: who is beside whom, whether a bar is kept, and nothing lost as JSON."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import side_by_side
from peers import OURS
from side_by_side import Row, in_turns


def test_the_ratio_is_the_fastest_peers_median_over_ours_and_spreads_from_round_to_round():
    row = Row("a job", {OURS: [1.0, 2.0, 4.0], "slow": [9.0, 9.0, 9.0], "fast": [3.0, 4.0, 2.0]}, bar=1.5)
    assert (row.fastest, row.ratio, row.spread, row.is_kept) == ("fast", 1.5, (0.5, 3.0), True)
    assert Row("a job", row.found, bar=1.6).is_kept is False


def test_another_way_of_ours_stands_beside_it_only_where_there_is_no_peer():
    found = {OURS: [2.0], "dense": [1.0], "peer": [3.0]}
    assert Row("a job", found, baselines=("dense",)).fastest == "peer"
    del found["peer"]
    assert Row("a job", found, baselines=("dense",)).fastest == "dense"
    alone = Row("a job", {OURS: [2.0]}, bar=1.0, gaps={"peer": "not installed"})
    assert (alone.fastest, alone.ratio, alone.spread, alone.is_kept) == (None, None, None, None)


@pytest.mark.parametrize(("most", "kept"), [(1.9, False), (2.0, True), (None, None)])
def test_what_may_be_taken_at_most_needs_no_peer(most, kept):
    assert Row("a job", {OURS: [2.0]}, most=most).is_kept is kept


def test_rows_of_unlike_rounds_are_none():
    with pytest.raises(AssertionError, match="all take turns"):
        Row("a job", {OURS: [1.0, 2.0], "peer": [1.0]})


def test_turns_begin_with_another_each_round_and_what_comes_before_does_not_count():
    called, clock = [], iter(range(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side_by_side.time, "perf_counter", lambda: next(clock))
        taken = in_turns({who: lambda who=who: called.append(who) for who in "ab"}, 2, before=1)
    assert "".join(called) == "aabb" + "bbaa" + "aabb"
    assert taken == {"a": [1, 1], "b": [1, 1]}


def test_rows_survive_json_and_the_picture_is_drawn(tmp_path):
    rows = [
        Row("faster", {OURS: [1.0, 1.1], "peer": [2.0, 2.1]}, bar=1.0, gaps={"other": "not installed"}, note="a note"),
        Row("slower", {OURS: [3.0, 3.1], "peer": [2.0, 2.1]}, "MB", most=1.0),
        Row("alone", {OURS: [3.0, 3.1]}),
    ]
    there = json.loads(side_by_side.to_json({"processor": "one"}, {"group": rows}))
    assert [Row.of_json(one).as_json() for one in there["groups"]["group"]] == [
        row.as_json() | {"baselines": []} for row in rows
    ]
    assert there["groups"]["group"][0]["ratio"] == pytest.approx(2.05 / 1.05)
    side_by_side.draw(tmp_path / "bench.png", "a title", {"group": rows})
    with Image.open(tmp_path / "bench.png") as picture:
        assert picture.width > 800
    assert side_by_side.table("group", rows).row_count == 3
