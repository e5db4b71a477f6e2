"""Safetensors files: a length (8 bytes), a JSON header of that length, and the tensors' bytes.

Source: huggingface.co/docs/safetensors. Nothing that a file says about itself is trusted before it was
checked against the file.
"""

import functools
import json
import math

import numpy as np
import torch

from data.files import InputError, parse_json

DTYPES = {  # of weights, and of the masks that are stored beside them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def open_safetensors(path):
    """{name: function that returns the tensor} of a safetensors file.

    The tensor is a view of a private memory map of its bytes, which lasts as long as the tensor. Raises
    InputError unless all dtypes, shapes and offsets fit the file, without gap or overlap.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < start <= size:
            raise InputError(f"{path}: the header should end at byte {start}, but the file has {size} bytes")
        header = parse_json(path, file.read(start - 8))
    header.pop("__metadata__", None)
    tensors, position = {}, 0
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (begin, end), dtype, shape = entry["data_offsets"], DTYPES[entry["dtype"]], entry["shape"]
            numbers = len(shape) <= 8 and all(type(n) is int and n > 0 for n in (begin + 1, end, *shape))
            right = begin == position and end == begin + math.prod(shape) * dtype.itemsize <= size - start
            if not (numbers and right):
                raise ValueError(f"tensor {name!r:.100} of shape {shape!r:.100} is not at {begin} to {end}")
            tensors[name] = functools.partial(_map_tensor, path, start + begin, dtype, shape)
            position = end
        if start + position != size:
            raise ValueError(f"{size - start - position} bytes belong to no tensor")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: the header is wrong ({type(error).__name__}: {str(error):.300})") from None
    return tensors


def _map_tensor(path, offset, dtype, shape):
    raw = np.memmap(path, dtype=np.uint8, mode="c", offset=offset, shape=math.prod(shape) * dtype.itemsize)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def safetensors_bytes(tensors, dtype):
    """The bytes of a safetensors file that holds `tensors`, converted to `dtype`.

    Raises InputError where a finite value would become an infinite one.
    """
    names = {known: name for name, known in DTYPES.items()}
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        offsets = [position, position + tensor.numel() * dtype.itemsize]
        header[name] = {"dtype": names[dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the bytes after it start aligned
    content = bytearray(len(text).to_bytes(8, "little") + text)
    for name, tensor in tensors.items():
        stored = tensor.to(dtype).flatten()
        if not torch.equal(stored.isfinite(), tensor.flatten().isfinite()):
            raise InputError(f"tensor {name!r:.100} has values beyond {dtype}")
        content += stored.view(torch.uint8).numpy().tobytes()
    return content
