"""Files that are never half written, and the checks of what is read."""

import hashlib
import io
import json
import os
import platform
import resource
from pathlib import Path

import numpy as np
import torch


class InputError(ValueError):
    """Something the user gave (a file, a folder, its contents) cannot be used; says what, and why."""


def write_file(path, content):
    """Write the bytes `content` to `path` all or not at all: beside it, to disk, then a rename."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json_lines(path, rows):
    """Write `rows` as JSON, an object a line."""
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def write_tensors(path, content):
    """Write nested dicts, tuples and tensors for `torch.load(path, weights_only=True)`.

    By way of a buffer, since torch.save writes the file's own name into it: equal contents, equal bytes.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getvalue())


def write_json(path, value):
    """Write `value` as indented JSON."""
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def check_folder(folder):
    """Make `folder` if need be, and sure that files can be written there; returns its Path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / ".writable", b"")
    (folder / ".writable").unlink()
    return folder


def fingerprint(tensors):
    """A short hash of {name: tensor}: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def environment(device):
    """For result.json: the most bytes held so far, by the device's allocator or the process, and versions."""
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        unit = 1 if platform.system() == "Darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"peak_memory_bytes": peak, "versions": versions, "processor": platform.machine()}
