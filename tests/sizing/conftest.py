"""The models that plans are made for, once."""

from __future__ import annotations

import pytest

from triward_server.sizing.models import NAMED, Subject, subject_of


@pytest.fixture(scope="session")
def large() -> Subject:
    """The 7B in bfloat16."""
    return subject_of("7b", None, None, "bfloat16")


@pytest.fixture(scope="session")
def small() -> Subject:
    """The random checkpoint that CPUs were measured with."""
    assert "small" in NAMED
    return subject_of("small", None, None, "float32")
