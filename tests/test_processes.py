"""Several processes, by torch.distributed: what two compute together is what one computes alone."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import speft
import train
from helpers import ALL, NEEDS_DATA, gpt_losses, mlp, random_gpt, random_mlp, sample_losses
from runs import Together, argv, learned, read_log, train_together, write_pairs, write_tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
KINDS = {
    "static": ["--metric", "snip"],
    "dynamic": ["--mask", "dynamic", "--refresh", 3, "--density", 0.05],
    "full": ["--method", "full", "--lr", 1e-3],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a tiny model, a .jsonl file of completions of unequal length)"""
    folder = tmp_path_factory.mktemp("made")
    return write_tiny(folder / "tiny"), write_pairs(folder / "pairs.jsonl")


# --- scores and masks -----------------------------------------------------------------------------------


def scored():
    """{(model, metric): (scores, mask)} of random models in float64, whose batches are shared out."""
    found = {}
    made = {"gpt2": random_gpt("gpt2", 0), "llama": random_gpt("llama", 1), "mlp": random_mlp(0)}
    for kind, (model, batches) in made.items():
        losses = sample_losses if kind == "mlp" else gpt_losses
        for metric in ALL:
            torch.manual_seed(data.rank_and_world()[0])  # "random" draws something else in every process
            scores = speft.salience(model, metric, data.share(batches), losses)
            found[kind, metric] = scores, speft.select(scores, 0.3, "global")
    return found


def test_every_metric_gives_every_process_the_mask_of_one(tmp_path):
    alone = scored()
    first, second = Together(2, tmp_path / "two", scored).results()
    for key, (scores, mask) in alone.items():
        for name, index in mask.items():
            torch.testing.assert_close(first[key][0][name], scores[name], rtol=1e-9, atol=1e-15)
            assert torch.equal(first[key][0][name], second[key][0][name])
            assert torch.equal(first[key][1][name], index), key
            assert torch.equal(second[key][1][name], index), key


def refusals():
    """The message of every metric that needs data, where the second process has none."""
    model, batches = random_mlp(0)
    found = []
    for metric in (*NEEDS_DATA, "synflow"):
        try:
            speft.salience(model, metric, data.share(batches[:1]), sample_losses)
        except ValueError as error:
            found.append(str(error))
    return found


def test_a_process_without_batches_is_an_error_in_all_of_them(tmp_path):
    for messages in Together(2, tmp_path / "two", refusals).results():
        assert len(messages) == len(NEEDS_DATA) + 1
        assert all("`batches` holds no tensors, at least in one process" in message for message in messages)


# --- train.py -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_what_one_trains_with_twice_the_batch(made, tmp_path, kind):
    tiny, pairs = made
    flags = ["--data", pairs, "--checkpoint-every", 4, "--eval-every", 3, "--eval-examples", 5, *KINDS[kind]]
    alone = train.main(argv(tiny, tmp_path / "alone", *flags, "--batch-size", 4))
    train.main(argv(tiny, tmp_path / "accumulated", *flags, "--batch-size", 2, "--accumulate", 2))
    two = train_together(2, tmp_path / "printed", *argv(tiny, tmp_path / "two", *flags, "--batch-size", 2))
    first, second = two.results()
    wanted = read_log(tmp_path / "alone")
    for other in ("accumulated", "two"):
        rows = read_log(tmp_path / other)
        for name in ("loss", "val", "gradient_norm", "lr"):
            here, there = ([row.get(name) for row in log] for log in (wanted, rows))
            assert here == pytest.approx(there, abs=1e-4), name
    for name in ("val_before", "test_after", "source_after"):
        assert first[name] == pytest.approx(alone[name], abs=1e-5) and first[name] == second[name]
    assert first["accuracy_after"] == second["accuracy_after"] == alone["accuracy_after"]
    assert first["trained"] == second["trained"] == alone["trained"] and first["processes"] == 2
    # The first process alone prints and writes.
    assert "step 8/8" in two.printed(0) and two.printed(1) == two.printed(1, "err") == ""
    assert sorted(os.listdir(tmp_path / "two")) == sorted(os.listdir(tmp_path / "alone"))
    if kind != "full":
        here, there = learned(tmp_path / "alone"), learned(tmp_path / "two")
        assert [entry[:3] for entry in there] == [entry[:3] for entry in here]  # the same masks


def summed_losses():
    """Of narrow gradients in every process, beside a loss that they could not hold."""
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    return train.sum_gradients([parameter], 5.0628 + data.rank_and_world()[0]), parameter.grad.tolist()


def test_the_loss_is_summed_in_float32_beside_narrower_gradients(tmp_path):
    for loss, gradients in Together(2, tmp_path / "two", summed_losses).results():
        assert loss == pytest.approx(2 * 5.0628 + 1, abs=1e-6) and gradients == [2.0] * 3


def communicated(flags):
    """The bytes of every all_reduce of a run."""
    sizes, real = [], dist.all_reduce

    def counting(tensor, *args, **kwargs):
        sizes.append(tensor.numel() * tensor.element_size())
        return real(tensor, *args, **kwargs)

    dist.all_reduce = counting
    return train.main(flags), sizes


def test_a_step_communicates_the_trained_numbers_and_the_loss_once(made, tmp_path):
    tiny, pairs = made
    steps = {}
    for kind in ("static", "full"):
        flags = argv(tiny, tmp_path / kind, "--data", pairs, "--accumulate", 2, *KINDS[kind])
        result, sizes = Together(2, tmp_path / "printed", communicated, flags).results()[1]
        steps[kind] = sizes[-8:]  # before them come those of the scoring
        assert steps[kind] == [4 * (result["trained"] + 1)] * 8
        assert len(sizes) == 8 + (kind == "static") * (1 + len(speft.linear_layers(data.load_model(tiny))))
    print(f"bytes communicated a step: sparse {steps['static'][0]:,}, full {steps['full'][0]:,}")
    assert steps["static"][0] < 0.01 * steps["full"][0]


def stalling(flags, step):
    """A run that after this step waits for its end."""
    shown = data.show_step

    def show_step(row, steps):
        shown(row, steps)
        if row["step"] == step:
            data.show("waiting")
            time.sleep(1000)

    data.show_step = show_step
    train.main(flags)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_processes_resume_and_their_number_may_change(made, tmp_path, kind):
    tiny, pairs = made
    flags = ["--data", pairs, "--checkpoint-every", 2, "--density", 0.02, *KINDS[kind]]
    four = ["--batch-size", 4]  # two processes have batches of 2
    train_together(2, tmp_path / "printed", *argv(tiny, tmp_path / "whole", *flags)).results()
    cut = Together(2, tmp_path / "printed", stalling, argv(tiny, tmp_path / "cut", *flags), 5)
    cut.wait_for("waiting")
    cut.kill()
    assert sorted(os.listdir(tmp_path / "cut")) == ["checkpoint-2.pt", "checkpoint-4.pt"]
    for name in ("alone", "unlike"):
        shutil.copytree(tmp_path / "cut", tmp_path / name)
    two = train_together(2, tmp_path / "printed", *argv(tiny, tmp_path / "cut", *flags, "--resume"))
    two.results()
    assert "going on after step 4" in two.printed(0)
    whole, resumed = read_log(tmp_path / "whole"), read_log(tmp_path / "cut")
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole]
    if kind != "full":
        assert learned(tmp_path / "cut") == learned(tmp_path / "whole")
    train.main(argv(tiny, tmp_path / "alone", *flags, *four, "--resume"))
    resumed = read_log(tmp_path / "alone")
    assert [row["loss"] for row in resumed] == pytest.approx([row["loss"] for row in whole], abs=1e-4)
    flags = argv(tiny, tmp_path / "unlike", *flags, "--accumulate", 2, "--resume")
    unlike = train_together(2, tmp_path / "printed", *flags)
    assert all(unlike.exit_codes()) and "step_examples" in unlike.printed(0, "err")


def test_a_run_begun_alone_goes_on_with_two_processes(made, tmp_path):
    tiny, pairs = made
    flags = ["--data", pairs, "--checkpoint-every", 3]
    train.main(argv(tiny, tmp_path / "whole", *flags, "--batch-size", 4))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "result.json").unlink()
    (tmp_path / "cut" / "checkpoint-8.pt").unlink()
    two = train_together(2, tmp_path / "printed", *argv(tiny, tmp_path / "cut", *flags, "--resume"))
    two.results()
    assert "going on after step 6" in two.printed(0)
    here, there = ([row["loss"] for row in read_log(tmp_path / name)] for name in ("whole", "cut"))
    assert here[:6] == there[:6] and here == pytest.approx(there, abs=1e-4)
    again = train_together(2, tmp_path / "printed", *argv(tiny, tmp_path / "cut", *flags, "--resume"))
    first, second = again.results()
    assert first == second and "this run is finished: val 8." in again.printed(0)


def test_ctrl_c_ends_all_processes_with_one_line(made, tmp_path):
    tiny, pairs = made
    flags = argv(tiny, tmp_path / "out", "--data", pairs)
    two = Together(2, tmp_path / "printed", stalling, flags, 3)
    two.wait_for("waiting")
    for process in two.processes:
        os.kill(process.pid, signal.SIGINT)
    assert two.exit_codes() == [130, 130]
    said = f"stopped after step 3; --resume goes on from {tmp_path}/out's newest checkpoint\n"
    assert two.printed(0).endswith(said)
    assert two.printed(1) == two.printed(0, "err") == two.printed(1, "err") == ""


# --- what goes wrong ------------------------------------------------------------------------------------


def test_two_examples_are_enough_to_score_with_two_processes_and_one_is_an_error(made, tmp_path):
    tiny, pairs = made
    flags = argv(tiny, tmp_path / "out", "--data", pairs, "--score-examples")
    one = train_together(2, tmp_path / "printed", *flags, 1)
    assert one.exit_codes() == [1, 1]
    assert "--score-examples 1: too few for 2 processes" in one.printed(0, "err")
    assert os.listdir(tmp_path / "out") == []
    two = train_together(2, tmp_path / "printed", *flags, 2)
    two.results()
    assert "scoring" in two.printed(0) and (tmp_path / "out" / "adapter.pt").exists()


def failing(flags, step):
    """A run of which the second process fails in this step, while the first waits for its gradients."""
    if data.rank_and_world()[0] == 1:
        real = train.learning_rate

        def learning_rate(at, args):
            if at == step:
                raise data.InputError("this one cannot go on")
            return real(at, args)

        train.learning_rate = learning_rate
    train.main(flags)


def test_a_process_that_fails_leaves_no_other_waiting(made, tmp_path):
    tiny, pairs = made
    two = Together(2, tmp_path / "printed", failing, argv(tiny, tmp_path / "out", "--data", pairs), 3)
    assert all(two.exit_codes())
    assert two.printed(1, "err") == "train.py: error: this one cannot go on\n"
    assert os.listdir(tmp_path / "out") == []


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
LAUNCH += ["--nproc-per-node", "2"]


@pytest.mark.slow
def test_torchrun_ends_all_when_one_fails(made, tmp_path):
    tiny, pairs = made
    (tmp_path / "script.py").write_text(
        "import os, data, train\n"
        "def fail(name):\n"
        "    raise data.InputError('this one cannot go on')\n"
        "if os.environ['RANK'] == '1':\n"
        "    data.load_tokenizer = fail\n"
        "train.main()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*LAUNCH, tmp_path / "script.py", *argv(tiny, tmp_path / "out", "--data", pairs)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode == 1 and "train.py: error: this one cannot go on\n" in ended.stderr
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.slow
def test_the_command_for_two_processes(made, tmp_path):
    tiny, pairs = made
    flags = argv(tiny, tmp_path / "out", "--data", pairs, "--checkpoint-every", 3)
    command = [*LAUNCH, ROOT / "train.py", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert re.findall(r"^step (\d)/8", ended.stdout, re.M) == ["1", "8"]
    assert sorted(os.listdir(tmp_path / "out")) == [
        "adapter.pt", "checkpoint-6.pt", "checkpoint-8.pt", "log.jsonl", "result.json"]  # fmt: skip
    train.main(argv(tiny, tmp_path / "alone", "--data", pairs, "--batch-size", 4))
    here, there = ([row["loss"] for row in read_log(tmp_path / name)] for name in ("alone", "out"))
    assert here == pytest.approx(there, abs=1e-4)


# --- DistributedDataParallel ----------------------------------------------------------------------------


def parallel():
    """What a sparse MLP with an empty delta has learned after some steps; the data are shared out."""
    model, generator = mlp(seed=1), torch.Generator().manual_seed(3)
    indices = {"0": torch.tensor([1, 7, 30]), "3": torch.tensor([], dtype=torch.int64)}
    indices["5"] = torch.tensor([0, 19])
    deltas = speft.sparsify(model, indices)
    whole = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.AdamW(deltas, lr=0.05)
    for _ in range(4):
        x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 4, generator=generator)
        optimizer.zero_grad()
        (whole(data.share(x)) - data.share(y)).square().mean().backward()
        optimizer.step()
    return speft.adapter(model)


def test_distributed_data_parallel_trains_a_sparsified_model(tmp_path):
    alone = parallel()
    assert alone["0"][1].abs().max() > 0.05 and len(alone["3"][0]) == 0
    for found in Together(2, tmp_path / "two", parallel).results():
        for name, (index, values, _) in alone.items():
            assert torch.equal(found[name][0], index)
            torch.testing.assert_close(found[name][1], values, rtol=1e-4, atol=1e-5)
