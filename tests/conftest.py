"""Paths, so that `pytest` finds everything from a clean checkout; one thread; the marker of slow tests."""

import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path[:0] = map(str, (TESTS.parent, TESTS, TESTS / "bench"))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on small tensors threads mostly wait for each other
pytest.register_assert_rewrite("helpers", "oracles")  # their assertions show values, too


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: takes long; pytest -m "not slow" leaves it out')
