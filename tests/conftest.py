"""Paths, so that `pytest` finds everything from a clean checkout, and the marker of slow tests."""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path[:0] = map(str, (TESTS.parent, TESTS, TESTS / "bench"))
pytest.register_assert_rewrite("helpers", "oracles")  # their assertions show values, too


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: takes long; pytest -m "not slow" leaves it out')
