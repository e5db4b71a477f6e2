"""What every process of kills.py and compare.py needs, loaded once; never threaded, so that it can fork."""

import torch

import data
import train  # noqa: F401
from data.corpus import load_corpus

torch.set_num_threads(1)
load_corpus("prose")
data.load_model("base")  # some parts of torch load when first used
