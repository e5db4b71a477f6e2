"""Crash-only: a run may end at any moment, and loses the steps since the last checkpoint and nothing else."""

import json
import os
import random
import shutil
import signal
import time

import pytest

import data
import kills
import speft
import train
from data import files
from runs import Together, argv, contents, learned, read_log, write_pairs, write_tiny

pytestmark = pytest.mark.slow
KINDS = {
    "static": "",
    "dynamic": "--mask dynamic --refresh 3 --metric snip --density 0.05",
    "random": "--metric random --mask dynamic --refresh 4",
    "local": "--scope local --weight-decay 0.1",
    "full": "--method full --lr 1e-3",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a tiny model, a .jsonl file)"""
    folder = tmp_path_factory.mktemp("made")
    return write_tiny(folder / "tiny"), write_pairs(folder / "pairs.jsonl")


@pytest.fixture
def run(made):
    """run(out, *flags): a run on the .jsonl file into the folder `out`."""
    tiny, pairs = made
    return lambda out, *flags: train.main(argv(tiny, out, "--data", pairs, *flags))


@pytest.fixture
def cut(run, monkeypatch):
    """cut(out, step, *flags): a run that Ctrl-C ends after this step."""

    def cut(out, step, *flags):
        shown = data.show_step

        def show_step(row, steps):
            shown(row, steps)
            if row["step"] == step:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(data, "show_step", show_step)
            with pytest.raises(SystemExit) as ended:
                run(out, *flags)
        assert ended.value.code == 130

    return cut


def steps_kept(out):
    """The numbers of steps after which there is a checkpoint, and that it holds."""
    logs = {path.name: len(files.read_tensors(path)["log"]) for path in out.glob("checkpoint-*.pt")}
    assert set(logs) == {f"checkpoint-{step}.pt" for step in logs.values()}
    return sorted(logs.values())


# --- a run that ends and goes on ------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "step"), list(zip(KINDS, (3, 5, 4, 2, 6))))  # 4: a new mask is due
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(run, cut, tmp_path, capsys, kind, step):
    flags = [*KINDS[kind].split(), "--checkpoint-every", 2]
    whole = run(tmp_path / "whole", *flags)
    cut(tmp_path / "cut", step, *flags)
    # The interrupt came before this step's checkpoint was written.
    assert steps_kept(tmp_path / "cut")[-1:] == [(step - 1) // 2 * 2][: step > 2]
    capsys.readouterr()
    resumed = run(tmp_path / "cut", *flags, "--resume")
    assert f"going on after step {(step - 1) // 2 * 2}" in capsys.readouterr().out
    for name in ("val_after", "test_after", "source_after", "accuracy_after", "trained", "steps_done"):
        assert resumed[name] == whole[name]
    here, there = read_log(tmp_path / "whole"), read_log(tmp_path / "cut")
    assert [(row["step"], row["loss"]) for row in here] == [(row["step"], row["loss"]) for row in there]
    result = "model.safetensors" if kind == "full" else "adapter.pt"
    assert (tmp_path / "cut" / result).read_bytes() == (tmp_path / "whole" / result).read_bytes()


def test_a_baseline_resumes_too(made, tmp_path, monkeypatch):
    def biases(model, batches):
        model.requires_grad_(False)
        chosen = [p for name, p in model.named_parameters() if name.endswith("bias")]
        return [p.requires_grad_(True) for p in chosen]

    flags = ["--data", made[1], "--checkpoint-every", 5]
    whole = train.main(argv(made[0], tmp_path, *flags), biases)
    (tmp_path / "result.json").unlink()
    (tmp_path / "checkpoint-8.pt").unlink()
    resumed = train.main(argv(made[0], tmp_path, *flags, "--resume"), biases)
    assert resumed["val_after"] == whole["val_after"] != whole["val_before"]


def test_ctrl_c_says_in_one_line_where_it_stopped(cut, tmp_path, capsys):
    cut(tmp_path, 3, "--checkpoint-every", 1)
    printed = capsys.readouterr()
    assert printed.err == ""
    said = f"stopped after step 3; --resume goes on from {tmp_path}'s newest checkpoint"
    assert printed.out.splitlines()[-1] == said
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1.pt", "checkpoint-2.pt"]


def test_no_signal_is_handled(run, tmp_path, monkeypatch):
    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    before, seen = handlers(), []
    monkeypatch.setattr(data, "show_step", lambda row, steps: seen.append(handlers()))
    run(tmp_path, "--steps", 2)
    assert seen == [before, before]


def endless_scoring(flags):
    """A run whose scoring takes for ever."""

    def losses(model, batch):
        data.show("scoring has begun")
        time.sleep(1000)

    train.speft.METRICS["grad"] = lambda model, weights, batches, loss_fn: losses(model, batches[0])
    train.main(flags)


def test_ctrl_c_while_scoring_ends_at_once(made, tmp_path):
    flags = argv(made[0], tmp_path / "out", "--data", made[1])
    one = Together(1, tmp_path / "printed", endless_scoring, flags)
    one.wait_for("scoring has begun")
    sent = time.time()
    os.kill(one.processes[0].pid, signal.SIGINT)
    assert one.exit_codes() == [130] and time.time() - sent < 10
    said = f"stopped after step 0; --resume goes on from {tmp_path}/out's newest checkpoint\n"
    assert one.printed(0).endswith(said)
    assert one.printed(0, "err") == "" and os.listdir(tmp_path / "out") == []


def test_killed_runs_lose_little_and_end_the_same(tmp_path):
    # The other kinds, and fifty kills: tests/bench/kills.py.
    ended, finished, redone = kills.survive("dynamic", 3, tmp_path)
    print(f"{ended}, {finished} runs equal byte for byte, {redone} steps redone")
    assert ended.total() >= 3 and finished >= 1


# --- what is there already ------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", ("reading", "scoring", "step 1"))
def test_a_run_that_ends_early_leaves_an_earlier_one_as_it_was(run, cut, tmp_path, monkeypatch, stop):
    run(tmp_path, "--checkpoint-every", 3)
    before = contents(tmp_path)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    if stop == "step 1":
        cut(tmp_path, 1, "--seed", 1)
    else:
        where = (train.speft, "salience") if stop == "scoring" else (train.data, "load_examples")
        monkeypatch.setattr(*where, interrupt)
        with pytest.raises(SystemExit):
            run(tmp_path, "--seed", 1)
    assert contents(tmp_path) == before


def test_without_a_checkpoint_a_run_starts_anew_and_a_finished_one_says_so(run, tmp_path, capsys):
    result = run(tmp_path, "--resume")
    assert "going on after step 0" in capsys.readouterr().out
    before = contents(tmp_path)
    assert run(tmp_path, "--resume") == json.loads((tmp_path / "result.json").read_text())
    losses = ", ".join(f"{name} {result[f'{name}_after']:.4f}" for name in ("val", "test", "source"))
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}: this run is finished: {losses}"
    assert contents(tmp_path) == before and result["steps_done"] == 8


def test_a_result_without_losses_is_not_finished(run, tmp_path, monkeypatch, capsys):
    whole = run(tmp_path / "whole")

    def interrupt(self, model, when):
        if when == "after":
            raise KeyboardInterrupt
        return {}

    with monkeypatch.context() as patched:
        patched.setattr(data.Report, "__call__", interrupt)  # after the last step
        with pytest.raises(SystemExit):
            run(tmp_path / "cut")
    assert sorted(os.listdir(tmp_path / "cut")) == ["adapter.pt", "checkpoint-8.pt"]
    # What an earlier version left when it was stopped in the last step:
    unfinished = {name: value for name, value in whole.items() if not name.endswith("_after")}
    (tmp_path / "cut" / "result.json").write_text(json.dumps(unfinished))
    capsys.readouterr()
    resumed = run(tmp_path / "cut", "--resume")
    assert "going on after step 8" in capsys.readouterr().out
    assert resumed["val_after"] == whole["val_after"]
    assert json.loads((tmp_path / "cut" / "result.json").read_text()) == resumed


def test_what_comes_after_the_training_may_be_asked_for_later(run, tmp_path, capsys):
    whole = run(tmp_path / "out")
    capsys.readouterr()
    flags = "--resume", "--merge", tmp_path / "merged", "--prompt", "import"
    assert run(tmp_path / "out", *flags)["val_after"] == whole["val_after"]
    printed = capsys.readouterr().out
    assert "going on after step 8" in printed and "sample after: '<|endoftext|>import" in printed
    assert data.load_model(tmp_path / "merged").config.n_embd == 32
    run(tmp_path / "out", *flags)
    assert "this run is finished" in capsys.readouterr().out


def test_an_earlier_run_in_the_same_folder_is_not_resumed(run, cut, tmp_path, monkeypatch):
    run(tmp_path / "cut", "--checkpoint-every", 3)  # leaves a result and checkpoints
    monkeypatch.setitem(speft.METRICS, "grad", speft.magnitude)  # the reader changes the code, runs it again,
    whole = run(tmp_path / "whole", "--checkpoint-every", 3)
    cut(tmp_path / "cut", 5, "--checkpoint-every", 3)  # and stops it after the checkpoint of step 3
    resumed = run(tmp_path / "cut", "--checkpoint-every", 3, "--resume")
    assert resumed["val_after"] == whole["val_after"]
    assert learned(tmp_path / "cut") == learned(tmp_path / "whole")


# --- which checkpoint -----------------------------------------------------------------------------------


def test_the_last_two_checkpoints_are_kept(cut, tmp_path):
    kept = []
    for step, every in ((2, 1), (4, 1), (7, 3)):
        cut(tmp_path, step, "--checkpoint-every", every, "--resume")
        kept.append(steps_kept(tmp_path))
    assert kept == [[1], [2, 3], [3, 6]]


def test_what_a_killed_run_left_unfinished_goes(run, tmp_path):
    (tmp_path / ".checkpoint-2.pt.4711").write_bytes(b"half of it")
    run(tmp_path, "--checkpoint-every", 3)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_files_of_other_names_are_left_alone(run, tmp_path):
    for name in ("checkpoint-3 (copy).pt", "checkpoint-.pt", "checkpoint-2b.pt", "notes.pt"):
        (tmp_path / name).write_bytes(b"mine")
    run(tmp_path, "--checkpoint-every", 3)
    run(tmp_path, "--checkpoint-every", 3, "--resume")
    assert {path.name for path in tmp_path.iterdir() if path.read_bytes() == b"mine"} == {
        "checkpoint-3 (copy).pt", "checkpoint-.pt", "checkpoint-2b.pt", "notes.pt"}  # fmt: skip


def test_checkpoints_are_ordered_by_their_step_not_by_the_clock(run, tmp_path, capsys):
    flags = ["--steps", 12, "--checkpoint-every", 2]  # 10 comes after 8, though not in the alphabet
    whole = run(tmp_path / "whole", *flags)
    for order in ((10, 12), (12, 10)):
        out = tmp_path / f"copied {order}"
        out.mkdir()
        for age, step in enumerate(order):
            shutil.copy(tmp_path / "whole" / f"checkpoint-{step}.pt", out)
            os.utime(out / f"checkpoint-{step}.pt", (time.time() - 3600 * age,) * 2)
        capsys.readouterr()
        resumed = run(out, *flags, "--resume")
        assert "going on after step 12" in capsys.readouterr().out
        assert resumed["val_after"] == whole["val_after"]
    shutil.rmtree(tmp_path / "whole")
    run(tmp_path / "whole", *flags, "--steps", 11)
    assert steps_kept(tmp_path / "whole") == [10, 11]


OTHER_FLAGS = {"--lr 1e-3": "lr", "--steps 9": "steps", "--metric snip": "metric", "--seq-len 24": "seq_len",
               "--batch-size 3": "step_examples"}  # fmt: skip


@pytest.mark.parametrize("flags", OTHER_FLAGS)
def test_a_checkpoint_and_a_result_of_other_flags_are_refused(run, cut, tmp_path, capsys, flags):
    run(tmp_path / "finished")
    cut(tmp_path / "cut", 5, "--checkpoint-every", 2)
    for out in (tmp_path / "finished", tmp_path / "cut"):
        before = contents(out)
        with pytest.raises(SystemExit) as ended:
            run(out, "--resume", *flags.split())
        assert ended.value.code == 1 and contents(out) == before
        error = capsys.readouterr().err
        assert f"{out}: the run to resume had another " in error and OTHER_FLAGS[flags] in error


def test_a_step_may_be_divided_otherwise(run, cut, tmp_path):
    whole = run(tmp_path / "whole", "--batch-size", 4)
    cut(tmp_path / "cut", 5, "--batch-size", 4, "--checkpoint-every", 2)
    resumed = run(tmp_path / "cut", "--accumulate", 2, "--checkpoint-every", 3, "--resume")
    assert resumed["val_after"] == pytest.approx(whole["val_after"], abs=1e-4)


@pytest.mark.parametrize("finished", (False, True))
def test_resume_goes_by_what_the_files_hold(made, tmp_path, capsys, finished):
    tiny, pairs = made
    val, adapter = write_pairs(tmp_path / "val.jsonl", 12), tmp_path / "start" / "adapter.pt"
    train.main(argv(tiny, tmp_path / "start", "--data", pairs, "--steps", 2))
    own = shutil.copy(pairs, tmp_path / "pairs.jsonl")
    flags = argv(tiny, tmp_path / "out", "--data", own, "--val", val, "--adapter", adapter)
    train.main([*flags, "--checkpoint-every", "5"])
    if not finished:
        (tmp_path / "out" / "result.json").unlink()
    before = contents(tmp_path / "out")

    def refused(named):
        with pytest.raises(SystemExit) as ended:
            train.main([*flags, "--resume"])
        assert ended.value.code == 1 and contents(tmp_path / "out") == before
        error = capsys.readouterr().err
        assert f"had another {named}\n" in error

    text = val.read_text()
    val.write_text(text.replace("model", "house"))
    refused("val_data")
    val.write_text(text)
    text = own.read_text()
    own.write_text(text.replace("model", "house", 1))
    refused("train_data")
    own.write_text(text)
    kept = adapter.read_bytes()
    train.main(argv(tiny, tmp_path / "start", "--data", pairs, "--steps", 2, "--seed", 1))
    refused("start")
    adapter.write_bytes(kept)
    capsys.readouterr()
    train.main([*flags, "--resume"])
    assert ("finished" if finished else "going on after step 8") in capsys.readouterr().out


# --- damage ---------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(run, tmp_path, capsys):
    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", "--checkpoint-every", 5)  # leaves those of steps 5 and 8
    newest, chance = tmp_path / "cut" / "checkpoint-8.pt", random.Random(0)
    for kind in ("a bit", "missing", "empty", "strange"):
        (tmp_path / "cut" / "result.json").unlink()
        damaged = bytearray(newest.read_bytes())
        if kind == "a bit":
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        elif kind == "strange":
            files.write_tensors(newest, {"made by": "another program"})
            damaged = newest.read_bytes()
        else:
            damaged = damaged[: kind == "missing" and chance.randrange(len(damaged))]
        newest.write_bytes(damaged)
        with pytest.warns(UserWarning, match="checkpoint-8.pt"):
            resumed = run(tmp_path / "cut", "--checkpoint-every", 5, "--resume")
        assert "going on after step 5" in capsys.readouterr().out
        assert resumed["val_after"] == whole["val_after"]
        assert learned(tmp_path / "cut") == learned(tmp_path / "whole")


def test_a_full_disk_leaves_the_checkpoint_before(run, tmp_path, monkeypatch, capsys):
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
    assert os.listdir(tmp_path) == ["checkpoint-3.pt"]
    run(tmp_path, "--checkpoint-every", 3, "--resume")
    assert "going on after step 3" in capsys.readouterr().out


def test_a_checkpoint_holds_what_is_learned_and_no_base(made, tmp_path):
    result = train.main(argv("base", tmp_path, "--data", made[1], "--steps", 1))
    size = (tmp_path / "checkpoint-1.pt").stat().st_size
    assert size < 30 * result["trained"] + 100_000  # index 8, delta 4, Adam's moments 8 bytes
