"""Runs that are killed, files that are damaged, adapters from strangers."""

import hashlib
import io
import json
import os
import pickle
import random
import signal
import sys
from pathlib import Path

import pytest
import torch

import data
import speft
import train
from data import files
from data.files import InputError

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import kills  # noqa: E402

SMALL = "--device cpu --steps 8 --batch-size 2 --seq-len 32 --lr 2e-3 --score-examples 4 --eval-examples 2"
KINDS = {
    "static": "",
    "dynamic": "--mask dynamic --refresh 3 --metric snip",
    "random": "--metric random --mask dynamic --refresh 4",
    "local": "--scope local --weight-decay 0.1",
}


def run(out, *flags):
    return train.main([*SMALL.split(), "--out", str(out), *map(str, flags)])


def learned(out):
    """The adapter's numbers as bytes."""
    saved = torch.load(out / "adapter.pt", weights_only=True)["adapter"]
    return [(name, shape, i.numpy().tobytes(), v.numpy().tobytes()) for name, (i, v, shape) in saved.items()]


def stop_after(monkeypatch, step):
    """Send the run SIGTERM after this step."""
    show = train.show_progress

    def shown(row, steps):
        show(row, steps)
        if row["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train, "show_progress", shown)


@pytest.mark.parametrize(("kind", "step"), list(zip(KINDS, (3, 5, 4, 2))))  # 4: a new mask is due
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, capsys, kind, step):
    flags = KINDS[kind].split()
    whole = run(tmp_path / "whole", *flags)
    with monkeypatch.context() as patched:
        stop_after(patched, step)
        with pytest.raises(SystemExit) as ended:
            run(tmp_path / "cut", *flags)
    assert ended.value.code == 128 + signal.SIGTERM
    capsys.readouterr()
    resumed = run(tmp_path / "cut", *flags, "--resume")
    assert f"going on after step {step}" in capsys.readouterr().out
    assert learned(tmp_path / "cut") == learned(tmp_path / "whole")
    for name in ("val_after", "test_after", "source_after", "trained", "steps_done"):
        assert resumed[name] == whole[name]
    rows = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))


def test_full_fine_tuning_and_baselines_resume_too(tmp_path, monkeypatch):
    def biases(model, batches):
        model.requires_grad_(False)
        chosen = [p for name, p in model.named_parameters() if name.endswith("bias")]
        return [p.requires_grad_(True) for p in chosen]

    for adapt, method in ((None, "full"), (biases, "sparse")):
        results = []
        for cut in (False, True):
            out = str(tmp_path / f"{method} {cut}")
            argv = [*SMALL.split(), "--steps", "4", "--method", method, "--out", out]
            if cut:
                with monkeypatch.context() as patched:
                    stop_after(patched, 2)
                    with pytest.raises(SystemExit):
                        train.main(argv, adapt)
                argv.append("--resume")
            results.append(train.main(argv, adapt))
        assert results[0]["val_after"] == results[1]["val_after"] != results[0]["val_before"]


def test_killed_runs_lose_little_and_end_the_same(tmp_path):
    # The other kinds, and fifty kills: tests/bench/kills.py.
    killed, finished, redone = kills.survive("dynamic", 2, tmp_path)
    print(f"{killed} kills survived, {finished} runs equal bit for bit, {redone} steps redone")
    assert killed >= 2 and finished >= 1


def test_without_a_checkpoint_a_run_starts_anew_and_a_finished_one_stays(tmp_path, capsys):
    result = run(tmp_path, "--resume")
    assert "going on after step 0" in capsys.readouterr().out
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert run(tmp_path, "--resume") == json.loads((tmp_path / "result.json").read_text())
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()} == before
    assert result["steps_done"] == 8


def test_what_comes_after_the_training_may_be_asked_for_later(tmp_path, capsys):
    whole = run(tmp_path / "out", "--checkpoint-every", 3)
    capsys.readouterr()
    flags = "--resume", "--merge", tmp_path / "merged", "--prompt", "import"
    assert run(tmp_path / "out", *flags)["val_after"] == whole["val_after"]
    printed = capsys.readouterr().out
    assert "going on after step 6" in printed and "sample after: '<|endoftext|>import" in printed
    assert data.load_model(tmp_path / "merged").config == data.load_model("base").config
    assert learned(tmp_path / "out")


def test_a_checkpoint_takes_the_place_of_the_older_one(tmp_path, monkeypatch):
    kept = []
    for step in (1, 2, 4):  # stopped at irregular steps
        with monkeypatch.context() as patched:
            stop_after(patched, step)
            with pytest.raises(SystemExit):
                run(tmp_path, "--resume")
        (tmp_path / "result.json").unlink()
        logs = [len(files.read_tensors(path)["log"]) for path in tmp_path.glob("checkpoint-*.pt")]
        kept.append(sorted(logs))
    assert kept == [[1], [1, 2], [2, 4]]


def test_an_earlier_run_in_the_same_folder_is_not_resumed(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", "--metric", "magnitude")
    run(tmp_path / "cut", "--checkpoint-every", 3)  # leaves result.json and checkpoints of steps 3 and 6
    monkeypatch.setitem(speft.METRICS, "grad", speft.magnitude)  # the reader changes the code, runs it again,
    with monkeypatch.context() as patched:
        show_progress = train.show_progress

        def killed(row, steps):
            show_progress(row, steps)
            if row["step"] == 5:  # after the checkpoint of step 3
                raise KeyboardInterrupt

        patched.setattr(train, "show_progress", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", "--checkpoint-every", 3)
    resumed = run(tmp_path / "cut", "--resume")
    assert resumed["val_after"] == whole["val_after"]
    assert learned(tmp_path / "cut") == learned(tmp_path / "whole")


def test_the_result_of_another_run_is_not_replaced_by_resuming(tmp_path, capsys):
    run(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, "--resume", "--metric", "snip")
    assert ended.value.code == 1 and "another metric" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("flags", ("--lr 1e-3", "--steps 9", "--data stdlib"))
def test_a_checkpoint_of_another_run_is_refused(tmp_path, monkeypatch, capsys, flags):
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(SystemExit):
            run(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, "--resume", *flags.split())
    assert ended.value.code == 1
    assert flags.split()[0][2:] in capsys.readouterr().err.splitlines()[-1].replace("_", "-")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(tmp_path, capsys):
    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", "--checkpoint-every", 3)  # leaves those of steps 3 and 6
    (tmp_path / "cut" / "result.json").unlink()
    newest = max((tmp_path / "cut").glob("checkpoint-*.pt"), key=lambda p: len(files.read_tensors(p)["log"]))
    whole_file = newest.read_bytes()
    chance = random.Random(0)
    for trial in range(2):
        damaged = bytearray(whole_file)
        if trial % 2:
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        else:
            damaged = damaged[: chance.randrange(len(damaged))]
        newest.write_bytes(damaged)
        with pytest.warns(UserWarning, match="damaged"):
            resumed = run(tmp_path / "cut", "--resume")
        assert "going on after step 3" in capsys.readouterr().out
        assert resumed["val_after"] == whole["val_after"]
        assert learned(tmp_path / "cut") == learned(tmp_path / "whole")
        (tmp_path / "cut" / "result.json").unlink()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, capsys):
    real, written = os.fsync, []

    def fsync(number):
        written.append(number)
        if len(written) == 2:  # the second checkpoint
            raise OSError(28, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, "--checkpoint-every", 3)
    assert ended.value.code == 1 and "No space left" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["checkpoint-0.pt"]
    run(tmp_path, "--resume")
    assert "going on after step 3" in capsys.readouterr().out


def test_a_checkpoint_holds_what_is_learned_and_no_base(tmp_path):
    result = run(tmp_path, "--checkpoint-every", 8)
    (path,) = tmp_path.glob("checkpoint-*.pt")
    assert path.stat().st_size < 30 * result["trained"] + 100_000  # index 8, delta 4, Adam's moments 8 bytes


# --- adapters ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    return out, run(out)


def test_an_adapter_takes_eight_bytes_an_entry_and_a_kilobyte_a_layer(trained):
    out, result = trained
    layers = len(torch.load(out / "adapter.pt", weights_only=True)["adapter"])
    assert (out / "adapter.pt").stat().st_size <= 8 * result["trained"] + 1000 * layers + 3000


def test_a_run_starts_from_an_adapter(trained, tmp_path, capsys):
    out, result = trained
    again = run(tmp_path / "none", "--method", "none", "--adapter", out / "adapter.pt")
    assert again["val_before"] == again["val_after"] == result["val_after"]
    more = run(tmp_path / "more", "--adapter", out / "adapter.pt", "--seed", 1)
    assert more["val_before"] == result["val_after"] != more["val_after"]
    model = data.load_model("base")
    speft.load_adapter(model, data.read_adapter(tmp_path / "more" / "adapter.pt", model.fingerprint()))
    assert learned(tmp_path / "more") != learned(out)
    layers = [layer for layer in model.modules() if isinstance(layer, speft.SparseLinear)]
    assert sum(len(layer.known) for layer in layers) > result["trained"]


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


def test_signed_damage_ends_in_an_error_or_in_other_numbers_never_in_a_crash(trained, tmp_path):
    out, _ = trained
    model = data.load_model("base")
    base = model.fingerprint()
    saved = files.read_tensors(out / "adapter.pt")
    small = {name: (i[:2], v[:2], shape) for name, (i, v, shape) in list(saved["adapter"].items())[2:4]}
    files.write_tensors(tmp_path / "small.pt", saved | {"adapter": small})
    good = (tmp_path / "small.pt").read_bytes()[:-32]
    chance, refused = random.Random(2), 0
    for _ in range(150):
        damaged = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(len(damaged))] ^= chance.randrange(1, 256)
        sign(tmp_path / "adapter.pt", bytes(damaged))
        try:
            speft.load_adapter(model, data.read_adapter(tmp_path / "adapter.pt", base))
        except ValueError as error:
            refused += 1
            assert str(error).encode()
    speft.load_adapter(model, {})
    assert 0 < refused < 150 and model.fingerprint() == base


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
    "too few values": ({NAME: (ONE[0], torch.ones(1), SHAPE)}, "corrections"),
    "double values": ({NAME: (ONE[0], ONE[1].double(), SHAPE)}, "corrections"),
    "NaN": ({NAME: (ONE[0], torch.tensor([0.5, torch.nan]), SHAPE)}, "corrections"),
    "infinite": ({NAME: (ONE[0], torch.tensor([0.5, torch.inf]), SHAPE)}, "corrections"),
    "another shape": ({NAME: (*ONE[:2], (128, 512))}, "shape"),
    "half right": ({NAME: ONE, "blocks.1.attn.v": (*ONE[:2], (1, 1))}, "shape"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_an_adapter_that_does_not_fit_changes_nothing(tmp_path, kind):
    strange, named = STRANGE[kind]
    model = data.load_model("base")
    base, kinds = model.fingerprint(), [type(module) for module in model.modules()]
    files.write_tensors(tmp_path / "adapter.pt", {"adapter": strange, "base": base, "settings": {}})
    with pytest.raises(ValueError, match=named):
        speft.load_adapter(model, data.read_adapter(tmp_path / "adapter.pt", base))
    assert model.fingerprint() == base and [type(module) for module in model.modules()] == kinds


def test_an_adapter_of_another_base_is_refused(trained, tmp_path, capsys):
    out, _ = trained
    with pytest.raises(SystemExit):
        run(tmp_path, "--model", "scratch", "--adapter", out / "adapter.pt")
    assert "another base" in capsys.readouterr().err
