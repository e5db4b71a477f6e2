"""The training script: the main job on a small budget, and its files."""

import json
import os
import re

import pytest
import torch

import data
import speft
import train
from helpers import run
from runs import argv, contents, learned, read_log, write_pairs, write_tiny

pytestmark = pytest.mark.slow
WEIGHTS = sum(parameter.numel() for parameter in data.load_model("base").parameters())
FILES = ["adapter.pt", "checkpoint-4.pt", "log.jsonl", "result.json"]


def load(out, onto="base"):
    """A fresh base with the adapter of the run in `out`."""
    model = data.load_model(onto)
    speft.load_adapter(model, torch.load(out / "adapter.pt", weights_only=True)["adapter"])
    return model


def validation_loss(model):
    splits = data.load_examples("prose", data.load_tokenizer("base"), 64)
    return data.mean_loss(model, splits["val"].spread(4, 4))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a tiny model, a .jsonl file of completions of unequal length)"""
    folder = tmp_path_factory.mktemp("made")
    return write_tiny(folder / "tiny"), write_pairs(folder / "pairs.jsonl")


@pytest.mark.parametrize(("metric", "scope"), [(m, "global") for m in speft.METRICS] + [("grad", "local")])
def test_every_metric_and_scope_trains_the_share_it_should(made, tmp_path, metric, scope):
    tiny, _ = made
    flags = ["--metric", metric, "--scope", scope, "--density", 0.02, "--lr", 1e-2, "--steps", 40]
    flags += ["--batch-size", 8, "--eval-examples", 32]
    result = train.main(argv(tiny, tmp_path, *flags))
    linear, layers = 2 * 12 * 32**2, 12
    assert abs(result["trained"] - 0.02 * linear) < layers
    assert result["val_after"] < result["val_before"] or metric in ("magnitude", "synflow", "random")
    assert sum(len(index) for _, _, index, _ in learned(tmp_path)) == 4 * result["trained"]  # int32


def test_the_main_job_on_a_small_budget(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    result = run(out, "--seed", 3)
    assert result["val_after"] < result["val_before"]
    assert validation_loss(load(out)) == pytest.approx(result["val_after"], abs=1e-6)
    assert sorted(os.listdir(out)) == FILES
    assert json.loads((out / "result.json").read_text()) == result
    flags = {name.replace("-", "_") for name in (*data.FLAGS, "resume")}
    measured = {"trained", "steps_done", "processes", "val_before", "val_after", "test_after",
                "source_before", "source_after", "seconds", "score_seconds", "peak_memory_bytes", "versions",
                "base", "train_data", "val_data", "test_data", "source_data"}  # fmt: skip
    assert flags | measured <= result.keys()
    log = read_log(out)
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert [("val" in row) for row in log] == [False, False, True, False]
    saved = torch.load(out / "adapter.pt", weights_only=True)
    assert saved["base"] == data.load_model("base").fingerprint()
    assert saved["settings"]["seed"] == 3
    printed = capsys.readouterr().out
    assert printed.startswith("reading base and prose\n")
    assert f"training {result['trained']:,} weights: attn.q" in printed
    for promised in ("validation", "sample before", "sample after", "tokens/s", "s left", "test loss"):
        assert promised in printed


def test_dynamic_masks_move_and_their_union_is_saved(tmp_path):
    result = run(tmp_path, "--mask", "dynamic", "--refresh", 2)
    saved = torch.load(tmp_path / "adapter.pt", weights_only=True)["adapter"]
    assert sum(len(index) for index, _, _ in saved.values()) > result["trained"]
    assert validation_loss(load(tmp_path)) == pytest.approx(result["val_after"], abs=1e-6)
    assert [("score_seconds" in row) for row in read_log(tmp_path)] == [True, False, True, False]


def test_the_same_run_leaves_the_same_bytes(made, tmp_path):
    tiny, pairs = made
    flags = ["--data", pairs, "--mask", "dynamic", "--refresh", 3, "--metric", "random"]
    train.main(argv(tiny, tmp_path / "one", *flags))
    wanted = (tmp_path / "one" / "adapter.pt").read_bytes()
    # Where the results go, when checkpoints are written and whether it resumes is not what was trained.
    for n, others in enumerate((["--resume"], ["--checkpoint-every", 2], ["--merge", tmp_path / "merged"],
                                ["--checkpoint-every", 0, "--prompt", "the"])):  # fmt: skip
        train.main(argv(tiny, tmp_path / f"another {n}", *flags, *others))
        assert (tmp_path / f"another {n}" / "adapter.pt").read_bytes() == wanted, others
    train.main(argv(tiny, tmp_path / "other", *flags, "--seed", 1))
    assert learned(tmp_path / "other") != learned(tmp_path / "one")


def test_layers_narrow_what_is_trained(made, tmp_path):
    train.main(argv(made[0], tmp_path, "--layers", r"\.1\.mlp"))
    assert [name for name, *_ in learned(tmp_path)] == ["blocks.1.mlp.up", "blocks.1.mlp.down"]


def test_an_evaluation_leaves_no_files(made, tmp_path, monkeypatch, capsys):
    tiny, pairs = made
    monkeypatch.chdir(tmp_path)
    flags = argv(tiny, "out", "--data", pairs)
    at = flags.index("--out")
    without_out = flags[:at] + flags[at + 2 :]
    result = train.main([*without_out, "--method", "none"])
    assert os.listdir(tmp_path) == []
    assert {"val_before", "test_before", "source_before", "accuracy_before"} <= result.keys()
    assert not [name for name in result if name.endswith("_after")]
    train.main(without_out)
    before = contents(tmp_path / "out")
    train.main([*without_out, "--method", "none", "--adapter", "out/adapter.pt", "--merge", "merged"])
    assert contents(tmp_path / "out") == before  # though --out, by default, is that folder
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(os.listdir("merged")) == files
    capsys.readouterr()
    train.main([*without_out, "--method", "none", "--adapter", "out/adapter.pt", "--prompt", "the"])
    printed = capsys.readouterr().out
    assert printed.count("sample before: '<|endoftext|>the") == printed.count("sample") == 1
    assert "loss" not in printed


def test_full_fine_tuning_writes_a_model_that_loads(tmp_path):
    result = run(tmp_path, "--method", "full", "--lr", 1e-3)
    assert result["trained"] == WEIGHTS
    reread = validation_loss(data.load_model(tmp_path))
    assert reread == pytest.approx(result["val_after"], abs=0.01)  # float16
    again = run(tmp_path / "again", "--model", tmp_path, "--method", "none")
    assert again["val_before"] == pytest.approx(result["val_after"], abs=0.01)


def test_full_fine_tuning_from_an_adapter_trains_every_weight(tmp_path):
    run(tmp_path / "sparse")
    start = load(tmp_path / "sparse").state_dict()
    adapter = ["--adapter", tmp_path / "sparse" / "adapter.pt"]
    result = run(tmp_path / "full", "--method", "full", "--lr", 1e-3, "--steps", 1, *adapter)
    assert result["trained"] == WEIGHTS
    tuned = data.load_model(tmp_path / "full").state_dict()
    for name, weight in tuned.items():
        moved = (weight - start[name]).abs()
        assert (moved <= 1.01e-3 + 1e-3 * start[name].abs()).all(), name  # the rate, and float16's rounding
        # One step of Adam moves every weight that has a gradient by the rate. Most embeddings have none, and
        # a key's bias never does: it adds the same to all scores of a query.
        if not name.endswith("attn.k.bias"):
            assert (moved > 5e-4).float().mean() > (0.5 if "blocks" in name else 0.01), name


def test_a_model_from_scratch_knows_nothing(tmp_path):
    result = run(tmp_path, "--method", "full", "--model", "scratch", "--steps", 1)
    assert result["val_before"] == pytest.approx(torch.log(torch.tensor(4096.0)).item(), abs=0.3)


def test_a_baseline_takes_the_place_of_the_mask(tmp_path):
    def biases(model, batches):
        assert sum(len(batch[0]) for batch in batches) == 4
        model.requires_grad_(False)
        chosen = [p for name, p in model.named_parameters() if name.endswith("bias")]
        return [p.requires_grad_(True) for p in chosen]

    result = train.main(argv("base", tmp_path, "--lr", 1e-2), adapt=biases)
    assert result["trained"] == 6 * (4 * 256 + 1024 + 256 + 2 * 256) + 256
    assert result["val_after"] < result["val_before"]


def test_two_micro_steps_are_one_step_with_completions_of_unequal_length(made, tmp_path):
    tiny, pairs = made
    saved, losses = [], []
    for size, count in ((8, 1), (2, 4)):
        out = tmp_path / str(size)
        flags = ["--data", pairs, "--batch-size", size, "--accumulate", count, "--score-examples", 16]
        train.main(argv(tiny, out, *flags))
        saved.append(torch.load(out / "adapter.pt", weights_only=True)["adapter"])
        losses.append([row["loss"] for row in read_log(out)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    for name, (index, values, _) in saved[0].items():
        assert torch.equal(saved[1][name][0], index)
        # Adam's first steps have the size of the rate, whatever the gradient's: rounding shows.
        assert (saved[1][name][1] - values).norm() <= 0.02 * values.norm()
    assert losses[0] != losses[1]  # the sums are really taken in another order


def test_merging_writes_the_model_with_what_was_learned(tmp_path):
    result = run(tmp_path / "out", "--merge", tmp_path / "merged")
    merged, corrected = data.load_model(tmp_path / "merged"), load(tmp_path / "out")
    idx = torch.arange(40)[None] * 7
    assert torch.equal(merged(idx)[0], corrected(idx)[0])
    assert validation_loss(merged) == pytest.approx(result["val_after"], abs=1e-6)
    later = ["--method", "none", "--adapter", tmp_path / "out" / "adapter.pt", "--merge", tmp_path / "later"]
    run(tmp_path / "none", *later)
    assert data.load_model(tmp_path / "later").fingerprint() == merged.fingerprint()


def test_a_prompt_is_continued_by_the_model_before_and_after(tmp_path, capsys):
    run(tmp_path, "--prompt", "def main(argv):", "--lr", 1e-2)
    samples = re.findall(r"sample (?:before|after): (.*)", capsys.readouterr().out)
    assert len(samples) == 2
    tokenizer = data.load_tokenizer("base")
    prompt = [data.end_token(tokenizer), *tokenizer.encode_ordinary("def main(argv):")]
    for sample, model in zip(samples, (data.load_model("base"), load(tmp_path))):
        ids = model.generate(torch.tensor([prompt]), 48, stop=[data.end_token(tokenizer)])[0].tolist()
        expected = repr(tokenizer.decode(ids))
        assert sample.rstrip("'\"") == expected.rstrip("'\"").removesuffix("<|endoftext|>")
