"""device_checks.py, in a process of its own: a pretend device changes torch for all that comes after it."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_nothing_mixes_devices():
    checks = Path(__file__).with_name("device_checks.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=checks.parents[1])
    if ended.returncode == pytest.ExitCode.NO_TESTS_COLLECTED and "1 skipped" in ended.stdout:
        pytest.skip("this torch cannot pretend a device")
    assert ended.returncode == 0 and " passed" in ended.stdout, ended.stdout + ended.stderr
