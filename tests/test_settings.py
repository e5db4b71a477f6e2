"""The command line: what cannot work ends before any work, with one line that names the cause."""

import contextlib
import itertools
import math
import os

import pytest
import torch

import data
import speft
import train
from data.settings import RATES, RATES_ELSEWHERE
from runs import argv, write_pairs, write_tiny

USAGE = {  # flags -> what the line names
    "--metric wanda": "wanda",
    "--density 0": "--density: 0.0 is out of range: Above zero, up to one.",
    "--density 1.5": "--density",
    "--density nan": "--density",
    "--density much": "--density",
    "--scope both": "both",
    "--mask none": "--mask",
    "--refresh 0": "--refresh",
    "--method lora": "lora",
    "--layers (": "--layers",
    "--score-examples 0": "--score-examples",
    "--steps -1": "--steps",
    "--steps 1.5": "--steps",
    "--batch-size 0": "--batch-size",
    "--accumulate 0": "--accumulate",
    "--seq-len 0": "--seq-len",
    "--lr 0": "--lr",
    "--lr inf": "--lr",
    "--warmup 2": "--warmup: 2.0 is out of range: From zero to one.",
    "--weight-decay -1": "--weight-decay",
    "--clip 0": "--clip",
    "--eval-every 0": "--eval-every",
    "--eval-examples 0": "--eval-examples",
    "--checkpoint-every -1": "--checkpoint-every",
    "--seed -1": "--seed",
    "--device tpu": "tpu",
    "--dtype int8": "int8",
    "--no-such-flag": "--no-such-flag",
    "--xyzzy 1": "--xyzzy 1; --help lists the flags",
    "--densty 0.1": "--densty 0.1; the nearest flag is --density",
    "--resum": "the nearest flag is --resume",
    "stray": "stray",
}
BEFORE_WORK = {
    "--model {tmp}/nowhere": "nowhere",
    "--model {tmp}": "config.json",
    "--data nonsense": "nonsense",
    "--adapter {tmp}/nothing.pt": "nothing.pt",
    "--data {tmp}/nothing.jsonl": "nothing.jsonl",
    "--val {tmp}/nothing.txt": "nothing.txt",
    "--seq-len 65": "--seq-len 65: the model's context has 64 tokens\n",
    "--out /dev/null/out": "--out /dev/null/out",
    "--out {tmp}/file": "--out {tmp}/file: no files can be written there",
    "--merge {tmp}/file": "--merge {tmp}/file: no files can be written there",
    "--layers no.such.layer": "--layers no.such.layer: matches no linear layer; there are blocks.0.attn.q",
    "--density 1e-9": "--density 1e-09: keeps none of ",
    "--method full --layers attn": "--layers attn: chooses layers to mask, but --method full has no mask",
    "--method full --out {tmp}/tiny": "--out {tmp}/tiny: the model to start from is there",
    "--method full --out {tmp}/other --merge {tmp}/other/../tiny": "--merge {tmp}/other/../tiny: the",
    "--merge {tmp}/tiny": "--merge {tmp}/tiny: the model to start from is there, and would be lost",
    "--merge {tmp}/parts": "--merge {tmp}/parts: model-00001-of-00002.safetensors, of another model",
}
IN_WORK = {"--method full --lr 2e9": "step 2: the loss or its gradient is not finite"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    (folder / "file").write_text("no folder")
    (folder / "parts").mkdir()
    (folder / "parts" / "model-00001-of-00002.safetensors").write_text("a part")
    return write_tiny(folder / "tiny"), write_pairs(folder / "pairs.jsonl")


@pytest.mark.parametrize("flags", (*USAGE, *BEFORE_WORK, *IN_WORK))
def test_what_cannot_work_ends_with_one_line(made, tmp_path, capsys, flags):
    tiny, pairs = made
    out, tmp = tmp_path / "out", pairs.parent
    named = (USAGE | BEFORE_WORK | IN_WORK)[flags].format(tmp=tmp)
    with pytest.raises(SystemExit) as ended:
        train.main(argv(tiny, out, "--data", pairs, *flags.format(tmp=tmp).split()))
    assert ended.value.code == (2 if flags in USAGE else 1)
    printed = capsys.readouterr()
    assert printed.err.startswith("train.py: error: ") and printed.err.count("\n") == 1
    assert named in printed.err
    if flags not in IN_WORK:
        assert "before" not in printed.out  # no evaluation
    assert not out.exists() or os.listdir(out) == []


def test_the_adapter_to_start_from_is_not_replaced(made, tmp_path, capsys):
    tiny, pairs = made
    train.main(argv(tiny, tmp_path / "out", "--data", pairs, "--steps", 1))
    first = (tmp_path / "out" / "adapter.pt").read_bytes()
    more = ["--data", pairs, "--steps", 1, "--adapter", tmp_path / "other" / ".." / "out" / "adapter.pt"]
    (tmp_path / "other").mkdir()
    with pytest.raises(SystemExit):
        train.main(argv(tiny, tmp_path / "out", *more))
    assert "out: the adapter to start from is there, and would be lost\n" in capsys.readouterr().err
    train.main(argv(tiny, tmp_path / "out", *more, "--method", "none"))
    train.main(argv(tiny, tmp_path / "other", *more))
    assert (tmp_path / "out" / "adapter.pt").read_bytes() == first


def test_every_process_needs_an_example_to_score(made, tmp_path, monkeypatch):
    tiny, pairs = made
    flags = ["--data", pairs, "--score-examples", 3, "--batch-size", 3]
    args, model = data.parse_args(argv(tiny, tmp_path, *flags), speft.METRICS), data.load_model(tiny)
    for processes in (3, 4):
        monkeypatch.setattr("data.settings.rank_and_world", lambda: (0, processes))
        for method, resume in itertools.product(("sparse", "full"), (False, True)):  # resumed, it has a mask
            args.method, args.resume = method, resume
            too_few = processes == 4 and method == "sparse" and not resume
            message = "--score-examples 3: too few for 4 processes"
            with pytest.raises(data.InputError, match=message) if too_few else contextlib.nullcontext():
                data.check_fit(args, model.config, speft.linear_layers(model))


@pytest.mark.parametrize("flags", (["--merge", "merged"], ["--method", "full"]))
def test_what_adapt_makes_is_not_written_as_a_checkpoint(made, tmp_path, monkeypatch, capsys, flags):
    """Said before the training, not after it."""
    tiny, pairs = made
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        train.main(argv(tiny, "out", "--data", pairs, *flags), lambda model, batches: 1 / 0)
    assert ended.value.code == 1 and f"error: {' '.join(flags)}: not with" in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*.*"))


def test_no_memory_left_is_reported(made, tmp_path, monkeypatch, capsys):
    tiny, pairs = made

    def fit(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train, "fit", fit)
    with pytest.raises(SystemExit) as ended:
        train.main(argv(tiny, tmp_path, "--data", pairs))
    assert ended.value.code == 1
    assert capsys.readouterr().err == "train.py: error: CUDA out of memory. Tried to allocate 2.00 GiB.\n"


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    assert ended.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name, (_, _, text) in data.FLAGS.items():
        assert f"--{name} " in printed and " ".join(text.split()) in printed
    assert "--resume " in printed and "nan" not in printed


def test_the_default_rate_follows_method_and_metric(capsys):
    def rate(*flags):
        return data.parse_args(list(flags), speft.METRICS).lr

    assert rate("--method", "full") == rate("--method", "full", "--metric", "random") <= 1e-3
    assert rate() == rate("--metric", "grad") == rate("--metric", "snip") == 1e-2
    assert rate("--metric", "random") == 3 * rate()
    assert rate("--metric", "random", "--lr", "0.5") == rate("--method", "full", "--lr", "0.5") == 0.5
    for model in ("smollm2", "some/folder"):  # where the best rates of the studies are lower
        assert rate("--model", model, "--metric", "grad") == 3e-4
        assert rate("--model", model, "--metric", "magnitude") < rate("--metric", "magnitude")
        assert rate("--model", model, "--method", "full") < rate("--method", "full")
    assert rate("--model", "scratch", "--method", "full") == rate("--method", "full")
    assert RATES.keys() == RATES_ELSEWHERE.keys() <= {*speft.METRICS, "full", "others"}
    with pytest.raises(SystemExit):
        train.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"full {rate('--method', 'full'):g}, random 0.03" in printed and "others 0.0003)" in printed


@pytest.mark.slow
def test_full_fine_tuning_at_its_default_rate_learns(tmp_path):
    flags = "--device cpu --method full --steps 12 --batch-size 4 --seq-len 64 --eval-examples 8".split()
    result = train.main([*flags, "--out", str(tmp_path)])
    assert result["val_after"] < result["val_before"] and not math.isnan(result["lr"])
