"""A window of steps under the profiler."""

import gzip
import json

import jax
import pytest
from test_loop import small_config

from clip_jax.errors import UserError
from clip_jax.training import profiler
from clip_jax.training.loop import train


@pytest.mark.parametrize("text", ["", "3", "3:", "a:b", "-1:2", "1:2:3", "1.5:2"])
def test_what_is_no_window_is_refused(text):
    with pytest.raises(UserError, match="should be the first and the last step to look at, as in --profile=20:22"):
        profiler.window(text, done=0, total=10)


@pytest.mark.parametrize(("text", "done"), [("0:3", 0), ("5:4", 0), ("9:11", 0), ("4:6", 4), ("5:6", 10)])
def test_a_window_that_the_run_will_not_see_is_refused_with_the_steps_it_has(text, done):
    has = "steps 1 to 10" if done == 0 else "steps 5 to 10" if done == 4 else "none, for it is done with all 10 steps"
    with pytest.raises(UserError, match=f"--profile={text} should lie.*: {has}$"):
        profiler.window(text, done=done, total=10)
    assert profiler.window("5:6", done=4, total=10) == (5, 6)


def test_where_libtpu_finds_no_tpu_the_profiler_is_refused_for_it_would_crash(monkeypatch):
    monkeypatch.setattr(profiler.importlib.util, "find_spec", lambda name: object())
    jax.config.update("jax_platforms", None)
    try:
        with pytest.raises(UserError, match="there is no TPU; set JAX_PLATFORMS=cpu to leave it out"):
            profiler.window("1:2", done=0, total=10)
    finally:
        jax.config.update("jax_platforms", "cpu")
    assert profiler.window("1:2", done=0, total=10) == (1, 2)


@pytest.mark.full
def test_a_run_leaves_a_trace_of_the_windows_steps_alone_and_says_how_to_open_it(data_dir, tmp_path, capfd):
    devices = jax.devices()[:1]
    with pytest.raises(UserError, match="--profile=3:5 should lie"):
        train(small_config(data_dir, duration="4 steps"), tmp_path / "run", devices=devices, profile="3:5")
    assert not (tmp_path / "run").exists()
    train(small_config(data_dir, duration="4 steps"), tmp_path / "run", devices=devices, profile="3:4")
    said = capfd.readouterr().err
    assert f"steps 3 to 4 are profiled in {tmp_path}/run/profile: open perfetto_trace.json.gz at https://" in said
    (trace,) = (tmp_path / "run" / "profile").glob("**/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert [event["args"]["step_num"] for event in events if event.get("name") == "train"] == ["3", "4"]
