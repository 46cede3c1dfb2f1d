"""The stamp that a request carries to the worker."""

from __future__ import annotations

import pytest

from steering.engine.stamp import Stamp, read_stamp


@pytest.mark.parametrize("phased", [False, True])
def test_a_stamp_is_read_as_it_was_written_beside_what_else_there_is(phased: bool) -> None:
    stamp, others = Stamp("p", -0.5, phased), {"mine": 1}
    carried = stamp.to_extra_args(others)
    assert read_stamp(carried) == stamp
    assert carried["mine"] == 1
    assert others == {"mine": 1}


def test_a_stamp_from_outside_need_not_say_whether_it_is_phased() -> None:
    assert read_stamp({"trimtab": {"plan": "a", "strength": 1}}) == Stamp("a", 1.0, False)
    assert read_stamp({"other": 1}) is None
    assert read_stamp(None) is None


@pytest.mark.parametrize(("strength", "kept"), [(1e-46, 0.0), (0.5, 0.5), (-2.0, -2.0)])
def test_a_strength_that_float32_rounds_to_0_is_0(strength: float, kept: float) -> None:
    stamp = read_stamp({"trimtab": {"plan": "a", "strength": strength}})
    assert stamp is not None
    assert stamp.strength == kept


def test_a_strength_beyond_float32_is_refused() -> None:
    with pytest.raises(ValueError, match="32-bit"):
        read_stamp({"trimtab": {"plan": "a", "strength": 1e39}})
