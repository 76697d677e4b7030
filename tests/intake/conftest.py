"""The tiny checkpoint's preprocessing with the default limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from triward_server.config import PreprocessConfig
from triward_server.intake.preprocess import Preprocessor


@pytest.fixture(scope="session")
def preprocessor(checkpoint: Path) -> Preprocessor:
    return Preprocessor(checkpoint, PreprocessConfig())
