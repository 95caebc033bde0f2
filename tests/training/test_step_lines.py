"""Files of a line a step: what a kill or a power cut leaves at their end is no line, and in the middle it is told."""

import pytest

from clip_jax.errors import UserError
from clip_jax.training.step_lines import StepLines, read_lines

WHOLE = b'{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("end", [b'{"step": 3', b"\0" * 40, b"\0" * 40 + b"\n", b'{"st\0\0\n\0\0\n\xff'])
def test_what_is_no_line_at_the_end_is_left_out_and_a_run_that_goes_on_writes_behind_the_last(end, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(WHOLE + end)
    assert [line["step"] for line in read_lines(path)] == [1, 2]
    lines = StepLines(path, resumed_at=2)
    lines.write({"step": 3})
    lines.close()
    assert path.read_bytes() == WHOLE + b'{"step": 3}\n'


def test_what_is_no_line_in_the_middle_is_told_with_its_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\0\0\n" + WHOLE)
    with pytest.raises(UserError, match=r"metrics.jsonl: line 1 is damaged .*; remove it, and start again"):
        StepLines(path, resumed_at=2)
    assert path.read_bytes() == b"\0\0\n" + WHOLE
