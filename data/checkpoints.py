"""Checkpoints in the usual hub layout (config.json, model.safetensors) to tensors by `model.py`'s names, and back.

The safetensors format is a length (8 bytes), a JSON header of that length, and raw bytes; here it is memory
mapped, and nothing in the header is trusted before it was checked against the file.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch

from data.files import InputError, write_file, write_json

BASE = Path(__file__).parent / "base"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip

# model.py's module names -> the family's. gpt2 fuses q, k and v into one tensor, and stores (in, out).
NAMES = {
    "gpt2": {
        "wte": "wte", "wpe": "wpe", "norm": "ln_f", "head": "lm_head",
        "norm1": "h.{}.ln_1", "norm2": "h.{}.ln_2",
        "attn.q": "h.{}.attn.c_attn", "attn.k": "h.{}.attn.c_attn", "attn.v": "h.{}.attn.c_attn",
        "attn.o": "h.{}.attn.c_proj", "mlp.up": "h.{}.mlp.c_fc", "mlp.down": "h.{}.mlp.c_proj",
    },
}  # fmt: skip


def find(name):
    """The path behind a model's name: "base" is the shipped one, anything else a path that must exist."""
    path = BASE if str(name) == "base" else Path(name)
    if not path.exists():
        raise InputError(f"no model at {path}")
    return path


def read_config(folder):
    """The keyword arguments of `GPTConfig` for the checkpoint in `folder`."""
    config = _config(folder)
    try:
        return {
            "vocab_size": config["vocab_size"],
            "block_size": config["n_positions"],
            "n_layer": config["n_layer"],
            "n_head": config["n_head"],
            "n_embd": config["n_embd"],
            "norm_eps": config["layer_norm_epsilon"],
        }
    except KeyError as missing:
        raise InputError(f"{folder / 'config.json'} has no field {missing}") from None


def _config(folder):
    path = folder / "config.json"
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def read_weights(folder, shapes):
    """The tensors {name: tensor} for `shapes` {name: shape}, by model.py's names, as float32 on the CPU.

    Raises InputError for a tensor that is missing, left over, or of another shape.
    """
    family = _config(folder)["model_type"]
    stored = read_safetensors(folder / "model.safetensors")
    tensors = {}
    used = set()
    for name, shape in shapes.items():
        source, part = _source(family, name)
        if source not in stored:
            raise InputError(f"{folder}: tensor {source} is missing")
        tensor = stored[source]
        if family == "gpt2" and name.startswith("blocks.") and tensor.dim() == 2:
            tensor = tensor.T
        if part is not None:
            tensor = tensor.chunk(3)[part]
        if tensor.shape != shape:
            raise InputError(f"{folder}: tensor {source} does not fit: {tuple(tensor.shape)}, not {tuple(shape)}")
        tensors[name] = tensor.to(torch.float32, copy=True).contiguous()
        used.add(source)
    if surplus := sorted(stored.keys() - used):
        raise InputError(f"{folder}: {len(surplus)} tensors have no place in the model, the first is {surplus[0]}")
    return tensors


def _source(family, name):
    """model.py's tensor name -> (the family's tensor name, which third of it or None)."""
    module, _, kind = name.rpartition(".")
    if module.startswith("blocks."):
        _, layer, module = module.split(".", 2)
        part = "qkv".index(module[-1]) if family == "gpt2" and module[:-1] == "attn." and module != "attn.o" else None
        return f"{NAMES[family][module].format(layer)}.{kind}", part
    return f"{NAMES[family][module]}.{kind}", None


def write_checkpoint(folder, config, tensors, dtype):
    """Write a GPT-2 style model in the hub layout, its tensors as `dtype`.

    config: the fields of `GPTConfig` as a dict; tensors: {model.py's name: tensor}.
    """
    stored = {}
    for name, tensor in tensors.items():
        source, part = _source("gpt2", name)
        tensor = tensor.detach().to("cpu", dtype)
        stored[source] = tensor if part in (None, 0) else torch.cat((stored[source], tensor))
    for source, tensor in stored.items():
        if source.startswith("h.") and tensor.dim() == 2:
            stored[source] = tensor.T.contiguous()
    write_file(folder / "model.safetensors", _safetensors(stored))
    write_json(folder / "config.json", {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": config["vocab_size"],
        "n_positions": config["block_size"], "n_layer": config["n_layer"], "n_head": config["n_head"],
        "n_embd": config["n_embd"], "layer_norm_epsilon": config["norm_eps"],
        "activation_function": "gelu_new", "tie_word_embeddings": True,
    })  # fmt: skip


def read_safetensors(path):
    """{name: tensor} of a safetensors file; the tensors are views of a private memory map of it.

    Raises InputError unless every tensor's dtype, shape and offsets fit the file, without gap or overlap.
    """
    size = path.stat().st_size
    if size < 8:
        raise InputError(f"{path}: too short for a safetensors file ({size} bytes)")
    content = np.memmap(path, dtype=np.uint8, mode="c")
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    if start > size:
        raise InputError(f"{path}: the header ends at byte {start}, the file at {size}")
    try:
        header = json.loads(content[8:start].tobytes())
        header.pop("__metadata__", None)
        entries = [(*entry["data_offsets"], name, entry["dtype"], entry["shape"]) for name, entry in header.items()]
        entries.sort(key=lambda entry: entry[:2])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: the header cannot be read ({type(error).__name__}: {error})") from None
    tensors = {}
    position = 0
    for begin, end, name, dtype, shape in entries:
        if dtype not in DTYPES:
            raise InputError(f"{path}: tensor {name} has the unknown dtype {dtype!r}")
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise InputError(f"{path}: tensor {name} has the shape {shape!r}")
        if begin != position or end != begin + math.prod(shape) * DTYPES[dtype].itemsize or start + end > size:
            raise InputError(f"{path}: tensor {name} cannot lie at bytes {begin} to {end}")
        raw = torch.from_numpy(content[start + begin : start + end])
        tensors[name] = raw.view(DTYPES[dtype]).reshape(shape)
        position = end
    if start + position != size:
        raise InputError(f"{path}: {size - start - position} bytes belong to no tensor")
    return tensors


def _safetensors(tensors):
    """The bytes of a safetensors file that holds `tensors`."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, parts, position = {}, [], 0
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        offsets = [position, position + len(raw)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        parts.append(raw)
        position += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the bytes after it start aligned
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])
