"""What a run leaves in its folder: adapter.pt, checkpoints, log.jsonl and result.json."""

import math
import platform
import re
import resource
import warnings
from pathlib import Path

import numpy as np
import torch

from data.files import InputError, read_json, read_tensors, write_json, write_json_lines, write_tensors
from data.processes import gather, rank_and_world, show
from data.settings import MAY_CHANGE


def run_settings(args, base, start, splits):
    """What makes a run the same one: flags, and the contents of what is read.

    base, start: fingerprints of the model, without and with the adapter that it starts from.
    """
    settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    settings |= {"step_examples": args.batch_size * args.accumulate * rank_and_world()[1]}
    settings |= {"base": base, "start": start}
    return settings | {f"{name}_data": split.fingerprint() for name, split in splits.items()}


def write_adapter(folder, learned, settings):
    """Write `learned` (of `speft.adapter`) and the settings that it was trained with as adapter.pt.

    Its indices are int32 where they fit, so that an entry takes 8 bytes. Equal contents have equal bytes.
    """
    small = {name: ((index.int() if math.prod(shape) < 2**31 else index).cpu(), values.cpu(), shape)
             for name, (index, values, shape) in learned.items()}  # fmt: skip
    saved = {"adapter": small, "base": settings["base"], "settings": settings}
    write_tensors(Path(folder) / "adapter.pt", saved)


def read_adapter(path, base):
    """The "adapter" of an adapter.pt, for `speft.load_adapter`, which checks it against the model.

    Raises InputError unless it was trained on the base with this fingerprint.
    """
    saved = read_tensors(path)
    try:
        adapter = {name: (i.cpu(), v.cpu(), tuple(shape)) for name, (i, v, shape) in saved["adapter"].items()}
        trained_on, settings = saved["base"], saved["settings"]
        described = f"{settings['model']} in {settings['dtype']}"
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path} holds no adapter") from None
    if trained_on != base:
        raise InputError(f"{path} was trained on another base ({trained_on!r:.100}, not {base}): "
                         f"it was {described}")  # fmt: skip
    return adapter


def write_progress(folder, progress):
    """Write a checkpoint: a dict of the run's "settings", its "log" and what else `train.fit` goes on from.

    Named by its step. The one before stays, so that one always is whole; all others go, and so does the
    result of an earlier run, which is not what these lead to.
    """
    step = len(progress["log"])
    for unfinished in Path(folder).glob(".checkpoint-*.pt.*"):  # of a run that was killed meanwhile
        unfinished.unlink()
    write_tensors(Path(folder) / f"checkpoint-{step}.pt", progress)
    (Path(folder) / "result.json").unlink(missing_ok=True)
    others = find_checkpoints(folder)
    before = max((number for number in others if number < step), default=None)
    for number, path in others.items():
        if number not in (step, before):
            path.unlink()


def find_checkpoints(folder):
    """{step: path} of the checkpoints in `folder`, the latest step first."""
    matches = {path: re.fullmatch(r"checkpoint-(\d+)\.pt", path.name) for path in Path(folder).glob("*.pt")}
    found = {int(match[1]): path for path, match in matches.items() if match}
    return dict(sorted(found.items(), reverse=True))


def read_progress(folder, settings):
    """The intact checkpoint of the latest step of a run with these settings in `folder`, or None.

    Warns of a damaged file; raises InputError if all there is, a result included, is of other settings.
    """
    different = set()
    for path in find_checkpoints(folder).values():
        try:
            saved = read_tensors(path)
            if not (isinstance(saved, dict) and isinstance(saved.get("settings"), dict)):
                raise InputError(f"{path} holds no checkpoint")
        except InputError as error:
            warnings.warn(f"{error}; going on from the one before", stacklevel=2)
            continue
        changed = changes(saved["settings"], settings)
        if not changed:
            return saved
        different.update(changed)
    result = Path(folder) / "result.json"
    if result.exists():
        different.update(changes(read_json(result), settings))
    if different:
        raise InputError(f"{folder}: the run to resume had another {', '.join(sorted(different))}")
    return None


def changes(saved, settings):
    """The names of the settings that have another value in `saved`."""
    return [name for name, value in settings.items() if saved.get(name) != value]


def write_result(folder, log, result):
    """Write log.jsonl, a row a step, and result.json."""
    write_json_lines(Path(folder) / "log.jsonl", log)
    write_json(Path(folder) / "result.json", result)


def read_result(folder, settings):
    """The result of the run with these settings in `folder` if it has the losses after training, or None."""
    path = Path(folder) / "result.json"
    result = read_json(path) if path.exists() else {}
    return result if "val_after" in result and not changes(result, settings) else None


def resume(args, settings):
    """(the result, if the run with these settings in --out is finished; the checkpoint to go on from)

    Both may be None, and are without --resume. The first process reads for all.
    """
    if not args.resume:
        return None, None
    folder, found = args.out, None
    afterwards = {"merge": args.merge, "prompt": args.prompt}  # where they have changed, it is done again
    if rank_and_world()[0] == 0:
        found = read_result(folder, settings | afterwards), read_progress(folder, settings)
    finished, saved = gather(found)[0]
    if finished:
        losses = [f"{name} {finished[f'{name}_after']:.4f}" for name in ("val", "test", "source")]
        show(f"{folder}: this run is finished: {', '.join(losses)}")
    else:
        show(f"{folder}: going on after step {len(saved['log']) if saved else 0}")
    return finished, saved


def environment(device):
    """For result.json: the most bytes held so far, by the device's allocator or here; what is computing."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else held
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"peak_memory_bytes": peak, "versions": versions, "processor": platform.machine(),
            "processes": rank_and_world()[1]}  # fmt: skip
