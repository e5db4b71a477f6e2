"""What every process of kills.py and compare.py needs, loaded once; never threaded, so that it can fork."""

import torch

import train  # noqa: F401
from data.corpus import load_corpus

torch.set_num_threads(1)
load_corpus("prose")
