"""Where the programs of Debian's package ``prometheus`` are found."""

from __future__ import annotations

import shutil

import pytest


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"there is no {name}; apt-get install prometheus")
    return path


@pytest.fixture(scope="session")
def promtool() -> str:
    """The path of promtool."""
    return _program("promtool")


@pytest.fixture(scope="session")
def prometheus_program() -> str:
    """The path of prometheus."""
    return _program("prometheus")
