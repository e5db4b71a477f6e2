"""Puts the repository's root on the path, so that `pytest` finds the modules from a clean checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
