"""What long work will take is said in readable units, and only if it is long."""

from __future__ import annotations

import pytest

from addenda.text import duration, estimate


def test_an_estimate_is_of_the_rest_and_empty_if_that_is_soon() -> None:
    assert estimate("views", 1000, 8, 0.4) == "1000 views at 20 per second: about 50 s."
    assert estimate("images", 40, 8, 2.0) == "40 images at 4.0 per second: about 8 s."
    assert estimate("views", 100_000, 64, 0.5) == "100000 views at 128 per second: about 13 min."
    assert estimate("views", 1000, 1, 30.0) == "1000 views at 30 s each: about 8.3 h."
    assert estimate("images", 16, 8, 2.0) == ""
    assert estimate("images", 8, 8, 200.0) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.2, "5 s"), (99.4, "99 s"), (100, "2 min"), (3600, "60 min"), (6000, "1.7 h")]
)
def test_a_duration_has_a_readable_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text
