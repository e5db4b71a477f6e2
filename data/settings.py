"""What a run is told: the flags of train.py, their values, and which of them --resume may change."""

import argparse
import difflib
import math
import re
from pathlib import Path

import torch

from data.files import InputError, check_folder, check_model_folder
from data.processes import rank_and_world

DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
# The default of --lr by method, or of masks by metric, after the studies (data/results/README.md): of the
# project's own small models, and of all others. Where best rates differ, or forget much, it is a lower one.
OWN_MODELS = ("base", "scratch")
RATES = {"full": 3e-4, "random": 3e-2, "magnitude": 3e-2, "synflow": 3e-2, "others": 1e-2}
RATES_ELSEWHERE = {"full": 1e-4, "random": 1e-2, "magnitude": 1e-2, "synflow": 3e-3, "others": 3e-4}


def said(rates):
    """The rates as --help has them."""
    return ", ".join(f"{name} {rate:g}" for name, rate in rates.items())


def positive(x):
    """Above zero, and not beyond what torch takes."""
    return 0 < x < 2**31


def not_negative(x):
    """Zero or positive."""
    return 0 <= x < 2**31


def fraction(x):
    """From zero to one."""
    return 0 <= x <= 1


def density(x):
    """Above zero, up to one."""
    return 0 < x <= 1


FLAGS = {  # name: (default, the values allowed, help)
    "metric": ("grad", None, "how weights are scored"),
    "density": (0.01, density, "share of the linear layers' weights to train"),
    "scope": ("global", ["global", "local"], "rank the weights of the whole model, or of each layer"),
    "mask": ("static", ["static", "dynamic"], "score once, or again every --refresh steps"),
    "refresh": (40, positive, "steps between the masks of --mask dynamic"),
    "method": ("sparse", ["sparse", "full", "none"], "what to train: a mask, every weight, or nothing"),
    "model": ("base", None, "base (shipped), scratch (random weights), smollm2, gemma3, or a checkpoint"),
    "adapter": ("", None, "adapter.pt of an earlier run, to start from"),
    "data": ("prose", None, "prose, stdlib, gsm, gym:TASK of reasoning-gym, or a .jsonl or .txt file"),
    "val": ("", None, "file to validate on; by default a tenth of the examples is held out"),
    "layers": ("", None, "regular expression: mask only linear layers whose name it matches"),
    "score-examples": (128, positive, "training examples to score with"),
    "steps": (120, not_negative, "optimizer steps"),
    "batch-size": (8, positive, "examples that a process reads at once"),
    "accumulate": (1, positive, "batches of each process whose gradients make a step"),
    "seq-len": (256, positive, "longest example, in tokens"),
    "lr": (math.nan, positive, f"peak learning rate (default: {said(RATES)}; "
           f"of models but {' and '.join(OWN_MODELS)}: {said(RATES_ELSEWHERE)})"),
    "warmup": (0.03, fraction, "share of the steps in which the learning rate rises"),
    "weight-decay": (0.0, not_negative, "AdamW's; of a mask's corrections, so towards where it began"),
    "clip": (1.0, positive, "norm that a larger gradient is scaled down to"),
    "eval-every": (40, positive, "steps between validations"),
    "eval-examples": (64, positive, "held-out examples that an evaluation reads"),
    "seed": (0, not_negative, "of the data order and of random numbers"),
    "device": (DEVICES[0], DEVICES, "where to compute"),
    "dtype": ("float32", ["float32", "bfloat16"], "type of the weights; corrections are always float32"),
    "prompt": ("", None, "text for the samples to continue, instead of held-out examples' beginnings"),
    "out": ("out", None, "folder for the results"),
    "merge": ("", None, "folder for the whole model; --method full: in float16, by default in --out"),
    "checkpoint-every": (40, not_negative, "steps between checkpoints in --out; 0: none"),
}
# What --resume may change: the same is trained, however the examples of a step are divided.
MAY_CHANGE = {"prompt", "out", "merge", "checkpoint_every", "batch_size", "accumulate", "resume"}


class Parser(argparse.ArgumentParser):
    """An error is one line, with exit code 2."""

    def error(self, message):
        if message.startswith("unrecognized"):
            unknown, known = message.split()[2], [f"--{name}" for name in (*FLAGS, "resume")]
            nearest = difflib.get_close_matches(unknown, known, n=1)
            message += f"; the nearest flag is {nearest[0]}" if nearest else "; --help lists the flags"
        self.exit(2, f"train.py: error: {message}\n")


def parse_args(argv, metrics):
    """The command line `argv` (None: the program's own) as a namespace; metrics: the names that there are.

    What is wrong with it ends the program with exit code 2 and one line that names the flag.
    """
    parser = Parser("train.py", description="Salience-aware sparse fine-tuning.", allow_abbrev=False)
    flags = FLAGS | {"metric": ("grad", list(metrics), "how weights are scored")}
    for name, (default, allowed, text) in flags.items():
        choices = allowed if isinstance(allowed, list) else None
        text += "" if default == "" or default != default else f" (default: {default})"
        parser.add_argument(f"--{name}", type=type(default), default=default, choices=choices, help=text)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    args = parser.parse_args(argv)
    if math.isnan(args.lr):
        rates = RATES if args.model in OWN_MODELS else RATES_ELSEWHERE
        args.lr = rates.get(args.method, rates.get(args.metric, rates["others"]))
    for name, (_, allowed, _) in FLAGS.items():
        value = getattr(args, name.replace("-", "_"))
        if callable(allowed) and not allowed(value):
            parser.error(f"argument --{name}: {value} is out of range: {allowed.__doc__}")
    try:
        re.compile(args.layers)
    except re.error as error:
        parser.error(f"argument --layers: {args.layers!r} is no regular expression: {error}")
    return args


def check_fit(args, config, layers, adapt=None):
    """Raise InputError, naming the flag, for what cannot work with a model, before any work is done.

    config: the model's. layers: its linear layers by name. adapt: what takes the place of masks, if anything
    does, and may leave layers that nobody here can write.
    """
    _check_folders(args)
    if adapt is not None and (args.merge or args.method == "full"):
        flag = f"--merge {args.merge}" if args.merge else "--method full"
        raise InputError(f"{flag}: not with `adapt`, whose layers no checkpoint has")
    if args.method == "full" and args.layers:
        raise InputError(f"--layers {args.layers}: chooses layers to mask, but --method full has no mask")
    world = rank_and_world()[1]
    if args.method == "sparse" and not args.resume and args.score_examples < world:
        raise InputError(f"--score-examples {args.score_examples}: too few for {world} processes")
    weights = [layer.weight.numel() for name, layer in layers.items() if re.search(args.layers, name)]
    if args.method == "sparse" and not weights:
        names = ", ".join(layers)
        raise InputError(f"--layers {args.layers}: matches no linear layer; there are {names:.200}")
    if args.method == "sparse" and args.scope == "global" and round(args.density * sum(weights)) == 0:
        raise InputError(f"--density {args.density}: keeps none of {sum(weights):,} weights")
    if args.seq_len > config.block_size:
        raise InputError(f"--seq-len {args.seq_len}: the model's context has {config.block_size} tokens")


def _check_folders(args):
    """Folders that can be written, in which nothing that the run starts from is lost."""
    for flag in ("merge",) if args.method == "none" else ("out", "merge"):  # an evaluation leaves no files
        if vars(args)[flag]:
            check_folder(flag, vars(args)[flag])
    if args.merge:
        check_model_folder("merge", args.merge, args.model)
    elif args.method == "full":
        check_model_folder("out", args.out, args.model)
    if args.method == "sparse" and Path(args.adapter).resolve() == Path(args.out, "adapter.pt").resolve():
        raise InputError(f"--out {args.out}: the adapter to start from is there, and would be lost")
