"""Files that are damaged or made to deceive, and adapters from strangers."""

import hashlib
import io
import os
import pickle
import random

import pytest
import torch

import data
import speft
import train
from data import files
from data.files import InputError
from runs import argv, learned, write_pairs, write_tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a tiny model, a .jsonl file)"""
    folder = tmp_path_factory.mktemp("made")
    return write_tiny(folder / "tiny"), write_pairs(folder / "pairs.jsonl")


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    """(the folder of a run with the base, its result)"""
    out = tmp_path_factory.mktemp("trained")
    return out, train.main(argv("base", out, "--data", made[1]))


@pytest.mark.slow
def test_an_adapter_takes_eight_bytes_an_entry_and_a_kilobyte_a_layer(trained):
    out, result = trained
    layers = len(torch.load(out / "adapter.pt", weights_only=True)["adapter"])
    assert (out / "adapter.pt").stat().st_size <= 8 * result["trained"] + 1000 * layers + 3000


@pytest.mark.slow
def test_a_run_starts_from_an_adapter(made, trained, tmp_path, capsys):
    out, result = trained
    adapter = ["--data", made[1], "--adapter", out / "adapter.pt"]
    again = train.main(argv("base", tmp_path / "none", *adapter, "--method", "none"))
    assert again["val_before"] == result["val_after"]
    more = train.main(argv("base", tmp_path / "more", *adapter, "--seed", 1))
    assert more["val_before"] == result["val_after"] != more["val_after"]
    assert "base: 5,853,184 weights" in capsys.readouterr().out  # the base's own
    model = data.load_model("base")
    speft.load_adapter(model, data.read_adapter(tmp_path / "more" / "adapter.pt", model.fingerprint()))
    assert learned(tmp_path / "more") != learned(out)
    layers = [layer for layer in model.modules() if isinstance(layer, speft.SparseLinear)]
    assert sum(len(layer.known) for layer in layers) > result["trained"]


@pytest.mark.slow
def test_flipped_and_missing_bytes_are_always_noticed(trained, tmp_path):
    out, _ = trained
    model = data.load_model("base")
    base = model.fingerprint()
    good = (out / "adapter.pt").read_bytes()
    chance = random.Random(1)
    for trial in range(600):
        damaged = bytearray(good)
        if trial % 3:
            for _ in range(chance.randint(1, 4)):
                damaged[chance.randrange(len(damaged))] ^= chance.randrange(1, 256)
        else:
            damaged = damaged[: chance.choice((chance.randrange(len(damaged)), chance.randrange(100)))]
        (tmp_path / "adapter.pt").write_bytes(damaged)
        if damaged != good:
            with pytest.raises(InputError, match="damaged"):
                data.read_adapter(tmp_path / "adapter.pt", base)
    assert model.fingerprint() == base


def sign(path, content):
    """Write `content` with the checksum that makes it look unharmed."""
    path.write_bytes(content + hashlib.sha256(content).digest())


@pytest.mark.slow
def test_signed_damage_ends_in_an_error_or_in_other_numbers_never_in_a_crash(trained, tmp_path):
    out, _ = trained
    model = data.load_model("base")
    base = model.fingerprint()
    saved = files.read_tensors(out / "adapter.pt")
    # Copies: of a slice torch.save writes all of the memory, and damage would hit what nobody reads.
    small = {name: (index[:40].clone(), values[:40].clone(), shape)
             for name, (index, values, shape) in list(saved["adapter"].items())[2:4]}  # fmt: skip
    settings = {"model": "base", "dtype": "float32"}
    files.write_tensors(tmp_path / "small.pt", {"adapter": small, "base": base, "settings": settings})
    good = (tmp_path / "small.pt").read_bytes()[:-32]
    assert len(good) < 6000
    chance, refused, differ = random.Random(2), 0, 0
    for _ in range(200):
        damaged = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(len(damaged))] ^= chance.randrange(1, 256)
        sign(tmp_path / "adapter.pt", bytes(damaged))
        try:
            adapter = data.read_adapter(tmp_path / "adapter.pt", base)
            speft.load_adapter(model, adapter)
            differ += any(not torch.equal(adapter[name][1], values) for name, (_, values, _) in small.items())
        except ValueError as error:
            refused += 1
            assert str(error).encode()
    print(f"{refused} of 200 refused, {differ} had other numbers")
    speft.load_adapter(model, {})
    assert refused + differ > 100 and model.fingerprint() == base


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_an_adapter_never_runs_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save({"adapter": Harm(), "base": "x"}, buffer)
    for content in (buffer.getvalue(), pickle.dumps(Harm()), b"", b"PK\x03\x04", b"\0" * 1000):
        sign(tmp_path / "adapter.pt", content)
        with pytest.raises(InputError):
            data.read_adapter(tmp_path / "adapter.pt", "x")
    assert not (tmp_path / "harmed").exists()


NAME, SHAPE = "blocks.0.attn.v", (256, 256)
ONE = torch.tensor([3, 7], dtype=torch.int32), torch.tensor([0.5, -0.5]), SHAPE
STRANGE = {  # an adapter -> what the message says
    "not a dict": ([], "no adapter"),
    "no triples": ({NAME: 3}, "no adapter"),
    "pairs": ({NAME: ONE[:2]}, "no adapter"),
    "lists": ({NAME: ([3, 7], [0.5, -0.5], SHAPE)}, "no adapter"),
    "no shape": ({NAME: (*ONE[:2], 256)}, "no adapter"),
    "unknown layer": ({"blocks.9.attn.v": ONE}, "blocks.9.attn.v"),
    "number for a name": ({3: ONE}, "3"),
    "the head": ({"wte": ONE}, "wte"),
    "out of range": ({NAME: (torch.tensor([3, 65536]), *ONE[1:])}, "indices"),
    "negative": ({NAME: (torch.tensor([-1, 3]), *ONE[1:])}, "indices"),
    "unsorted": ({NAME: (torch.tensor([7, 3]), *ONE[1:])}, "indices"),
    "twice": ({NAME: (torch.tensor([3, 3]), *ONE[1:])}, "indices"),
    "float indices": ({NAME: (torch.tensor([3.0, 7.0]), *ONE[1:])}, "indices"),
    "bool indices": ({NAME: (torch.tensor([False, True]), *ONE[1:])}, "indices"),
    "a matrix": ({NAME: (torch.tensor([[3, 7]]), *ONE[1:])}, "indices"),
    "a scalar": ({NAME: (torch.tensor(3), torch.tensor(0.5), SHAPE)}, "indices"),
    "too few values": ({NAME: (ONE[0], torch.ones(1), SHAPE)}, "not finite float32, one an index"),
    "double values": ({NAME: (ONE[0], ONE[1].double(), SHAPE)}, "not finite float32, one an index"),
    "NaN": ({NAME: (ONE[0], torch.tensor([0.5, torch.nan]), SHAPE)}, "not finite float32, one an index"),
    "infinite": ({NAME: (ONE[0], torch.tensor([0.5, torch.inf]), SHAPE)}, "not finite float32, one an index"),
    "another shape": ({NAME: (*ONE[:2], (128, 512))}, "shape"),
    "half right": ({NAME: ONE, "blocks.1.attn.v": (*ONE[:2], (1, 1))}, "shape"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_an_adapter_that_does_not_fit_changes_nothing(tmp_path, kind):
    strange, named = STRANGE[kind]
    model = data.load_model("base")
    settings = {"model": "base", "dtype": "float32"}
    base, kinds = model.fingerprint(), [type(module) for module in model.modules()]
    files.write_tensors(tmp_path / "adapter.pt", {"adapter": strange, "base": base, "settings": settings})
    with pytest.raises(ValueError, match=named):
        speft.load_adapter(model, data.read_adapter(tmp_path / "adapter.pt", base))
    assert model.fingerprint() == base and [type(module) for module in model.modules()] == kinds


@pytest.mark.slow
def test_an_adapter_of_another_base_is_refused(made, trained, tmp_path, capsys):
    out, _ = trained
    with pytest.raises(SystemExit):
        train.main(argv("scratch", tmp_path, "--data", made[1], "--adapter", out / "adapter.pt"))
    assert "another base" in capsys.readouterr().err


@pytest.mark.slow
def test_an_adapter_of_another_type_is_refused_by_name(made, trained, tmp_path, capsys):
    out, _ = trained
    with pytest.raises(SystemExit):
        adapter = ["--adapter", out / "adapter.pt", "--dtype", "bfloat16"]
        train.main(argv("base", tmp_path, "--data", made[1], *adapter))
    assert "base in float32" in capsys.readouterr().err and os.listdir(tmp_path) == []
