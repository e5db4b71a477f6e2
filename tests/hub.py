"""Small checkpoints in the hub layout, made apart from the project's own reader and writer.

`logits.json` holds what the transformers library computed for them, with the recipe.
"""

import json
import math
import struct
from pathlib import Path

import numpy as np
import torch

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "logits.json").read_text())
IDS = torch.tensor(FIXTURE["ids"])
MODELS = {model["title"]: model for model in FIXTURE["models"]}
SCALED = "llama, all biases, head size, scaled rope"


def fill(name, shape):
    """The formula that filled the fixture's tensors."""
    start = sum(name.encode())
    wave = np.sin(start + 12.9898 * np.arange(math.prod(shape), dtype=np.float64) ** 1.1)
    norm = len(shape) == 1 and name.endswith("weight")
    return torch.from_numpy((norm + 0.3 * wave).astype(np.float32).reshape(shape))


def weights_of(title):
    return {name: fill(name, shape) for name, shape in MODELS[title]["shapes"].items()}


def safetensors(tensors):
    """The bytes of a safetensors file, made apart from the project's own writer."""
    names = {
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write(folder, config, tensors, shards=1):
    """A checkpoint folder in the hub layout."""
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors(tensors))
        return folder
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        chosen = dict(list(tensors.items())[shard::shards])
        (folder / file).write_bytes(safetensors(chosen))
        index |= {name: file for name in chosen}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def logits_of(model):
    with torch.no_grad():
        return model(IDS)[0]
