"""Paths, so that `pytest` finds everything from a clean checkout."""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path[:0] = map(str, (TESTS.parent, TESTS, TESTS / "bench"))
pytest.register_assert_rewrite("helpers", "oracles")  # their assertions show values, too
