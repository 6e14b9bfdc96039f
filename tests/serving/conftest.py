"""Services in the test process stop at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from addenda.serving import snapshot


@pytest.fixture(autouse=True, scope="session")
def short_waits() -> Iterator[None]:
    """Ends each wait for a registry change soon, and with it the wait of a service that stops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot, "WAIT_S", 0.05)
        yield
