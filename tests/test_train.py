"""The training script: the main job on a small budget, its files, its errors."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch

import data
import speft
import train
from data import files

ROOT = Path(__file__).parent.parent
SMALL = "--steps 4 --batch-size 4 --seq-len 64 --lr 2e-3 --score-examples 6 --eval-examples 4 --eval-every 3"
SMALL = [*SMALL.split(), "--device", "cpu"]


def run(out, *argv):
    return train.main([*SMALL, "--out", str(out), *map(str, argv)])


def load(out, onto="base"):
    """A fresh base with the adapter of the run in `out`."""
    model = data.load_model(onto)
    speft.load_adapter(model, torch.load(out / "adapter.pt", weights_only=True)["adapter"])
    return model


def validation_loss(model):
    splits = data.load_examples("prose", data.load_tokenizer("base"), 64)
    return model.mean_loss(splits["val"].spread(4, 4))


@pytest.mark.parametrize(("metric", "scope"), [(m, "global") for m in speft.METRICS] + [("grad", "local")])
def test_every_metric_and_scope_trains_the_share_it_should(tmp_path, metric, scope):
    result = run(tmp_path, "--metric", metric, "--scope", scope, "--density", 0.02)
    linear = 6 * 12 * 256**2
    assert abs(result["trained"] - 0.02 * linear) < 36
    assert result["val_after"] < result["val_before"] or metric in ("magnitude", "synflow", "random")
    assert validation_loss(load(tmp_path)) == pytest.approx(result["val_after"], abs=1e-6)


def test_dynamic_masks_move_and_their_union_is_saved(tmp_path):
    result = run(tmp_path, "--mask", "dynamic", "--refresh", 2)
    saved = torch.load(tmp_path / "adapter.pt", weights_only=True)["adapter"]
    assert sum(len(index) for index, _, _ in saved.values()) > result["trained"]
    assert validation_loss(load(tmp_path)) == pytest.approx(result["val_after"], abs=1e-6)
    assert [("score_seconds" in row) for row in read_log(tmp_path)] == [True, False, True, False]


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_run_leaves_the_files_it_promises(tmp_path, capsys):
    result = run(tmp_path / "new" / "folder", "--seed", 3)
    out = tmp_path / "new" / "folder"
    assert sorted(os.listdir(out)) == ["adapter.pt", "log.jsonl", "result.json"]
    assert json.loads((out / "result.json").read_text()) == result
    flags = {name.replace("-", "_") for name in (*train.FLAGS, "resume")}
    measured = {"trained", "total", "val_before", "val_after", "test_after", "source_before", "source_after",
                "seconds", "score_seconds", "peak_memory_bytes", "versions", "base", "corpus"}  # fmt: skip
    assert flags | measured <= result.keys()
    log = read_log(out)
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert [("val" in row) for row in log] == [False, False, True, False]
    saved = torch.load(out / "adapter.pt", weights_only=True)
    assert saved["base"] == data.load_model("base").fingerprint()
    assert saved["settings"]["seed"] == 3
    printed = capsys.readouterr().out
    assert f"training {result['trained']:,} weights: attn.q" in printed
    for promised in ("validation", "sample before", "sample after", "tokens/s", "s left", "test loss"):
        assert promised in printed


def test_the_same_seed_gives_the_same_adapter_bit_for_bit(tmp_path):
    flags = "--mask dynamic --refresh 2 --metric random".split()
    for name in ("one", "another"):
        run(tmp_path / name, *flags)
    run(tmp_path / "other", *flags, "--seed", 1)
    one, another, other = (load(tmp_path / name).state_dict() for name in ("one", "another", "other"))
    assert all(torch.equal(one[name], another[name]) for name in one)
    assert not all(
        one[name].shape == other[name].shape and torch.equal(one[name], other[name]) for name in one
    )


def test_layers_narrow_what_is_trained(tmp_path):
    run(tmp_path, "--layers", r"\.[01]\.mlp")
    saved = torch.load(tmp_path / "adapter.pt", weights_only=True)["adapter"]
    assert set(saved) == {f"blocks.{i}.mlp.{kind}" for i in (0, 1) for kind in ("up", "down")}


def test_method_none_only_evaluates(tmp_path):
    result = run(tmp_path, "--method", "none")
    assert result["val_before"] == result["val_after"] and result["trained"] == result["steps_done"] == 0
    assert not (tmp_path / "adapter.pt").exists()


def test_full_fine_tuning_writes_a_model_that_loads(tmp_path):
    result = run(tmp_path, "--method", "full", "--lr", 1e-3)
    assert result["trained"] == result["total"]
    assert validation_loss(data.load_model(tmp_path)) == pytest.approx(
        result["val_after"], abs=0.01
    )  # float16
    again = run(tmp_path / "again", "--model", tmp_path, "--method", "none")
    assert again["val_before"] == pytest.approx(result["val_after"], abs=0.01)


def test_full_fine_tuning_from_an_adapter_trains_every_weight(tmp_path):
    run(tmp_path / "sparse")
    start = load(tmp_path / "sparse").state_dict()
    adapter = ["--adapter", tmp_path / "sparse" / "adapter.pt"]
    result = run(tmp_path / "full", "--method", "full", "--lr", 1e-3, "--steps", 1, *adapter)
    assert result["trained"] == result["total"]
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
        assert sum(len(batch[0]) for batch in batches) == 6
        model.requires_grad_(False)
        chosen = [p for name, p in model.named_parameters() if name.endswith("bias")]
        return [p.requires_grad_(True) for p in chosen]

    result = train.main([*SMALL, "--out", str(tmp_path), "--lr", "1e-2"], adapt=biases)
    assert result["trained"] == 6 * (4 * 256 + 1024 + 256 + 2 * 256) + 256
    assert result["val_after"] < result["val_before"]


def test_two_micro_steps_are_one_step_with_completions_of_unequal_length(tmp_path):
    words = "the of a model is trained on some text that was read before and more".split()
    lines = [{"prompt": words[n % 14], "completion": " ".join(words[: 1 + n * n % 13])} for n in range(40)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    saved, losses = [], []
    for size, count in ((8, 1), (2, 4)):
        out = tmp_path / str(size)
        run(out, "--data", path, "--batch-size", size, "--accumulate", count, "--score-examples", 16)
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


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_ends_the_run_after_the_step_with_what_was_learned(tmp_path, monkeypatch, number):
    finished = []

    def interrupt(row, steps):
        finished.append(row)
        if len(finished) == 2:
            signal.raise_signal(number)

    monkeypatch.setattr(train, "show_progress", interrupt)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, "--steps", 1000)
    assert ended.value.code == 128 + number and len(finished) == 2
    assert signal.getsignal(number) == before
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["steps_done"] == 2
    assert "val_after" not in result  # whoever stops a run does not want to wait for an evaluation
    assert validation_loss(load(tmp_path)) < validation_loss(data.load_model("base"))


def test_a_second_signal_ends_the_run_at_once(tmp_path, monkeypatch, capsys):
    finished = []

    def impatient(row, steps):
        finished.append(row)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "show_progress", impatient)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--steps", 1000)
    assert len(finished) == 1 and "once more" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


USAGE = (
    ("--metric wanda", "wanda"),
    ("--density 0", "--density"),
    ("--density 1.5", "--density"),
    ("--density nan", "--density"),
    ("--density much", "--density"),
    ("--scope both", "both"),
    ("--mask none", "--mask"),
    ("--refresh 0", "--refresh"),
    ("--method lora", "lora"),
    ("--layers (", "--layers"),
    ("--score-examples 0", "--score-examples"),
    ("--steps -1", "--steps"),
    ("--steps 1.5", "--steps"),
    ("--batch-size 0", "--batch-size"),
    ("--accumulate 0", "--accumulate"),
    ("--seq-len 0", "--seq-len"),
    ("--lr 0", "--lr"),
    ("--lr inf", "--lr"),
    ("--warmup 2", "--warmup"),
    ("--weight-decay -1", "--weight-decay"),
    ("--clip 0", "--clip"),
    ("--eval-every 0", "--eval-every"),
    ("--seed -1", "--seed"),
    ("--device tpu", "tpu"),
    ("--dtype int8", "int8"),
    ("--no-such-flag", "--no-such-flag"),
)
FAILURES = (
    ("--model {tmp}/nowhere", "nowhere"),
    ("--model {tmp}", "config.json"),
    ("--data nonsense", "nonsense"),
    ("--adapter {tmp}/nothing.pt", "nothing.pt"),
    ("--data {tmp}/nothing.jsonl", "nothing.jsonl"),
    ("--val {tmp}/nothing.txt", "nothing.txt"),
    ("--seq-len 257", "257"),
    ("--out /dev/null/out", "/dev/null"),
    ("--merge /dev/null/out", "/dev/null"),
    ("--layers no.such.layer", "no layer to score"),
    ("--density 1e-9", "1e-09"),
    ("--lr 1e30", "step"),
)


@pytest.mark.parametrize(
    ("flags", "named", "code"), [(*case, 2) for case in USAGE] + [(*case, 1) for case in FAILURES]
)
def test_what_cannot_work_ends_with_one_clear_line(tmp_path, capsys, flags, named, code):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        run(out, *flags.format(tmp=tmp_path).split())
    assert ended.value.code == code
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(
        "train.py: error: " if code == 1 else ("train.py: error: ", "pytest", "__main__.py")
    )
    assert named in last
    assert not out.exists() or os.listdir(out) == []


def test_no_space_left_is_reported_and_the_last_run_kept(tmp_path, monkeypatch, capsys):
    run(tmp_path, "--steps", 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "write_tensors", full)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, "--steps", 2)
    assert ended.value.code == 1 and "No space left" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_memory_left_is_reported(tmp_path, monkeypatch, capsys):
    def fit(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train, "fit", fit)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "train.py: error: CUDA out of memory. Tried to allocate 2.00 GiB.\n"


def test_help_explains_every_flag_in_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for name, (_, _, text) in train.FLAGS.items():
        assert f"--{name} " in printed and len(text) < 80
    assert "--resume " in printed


def code_lines(path):
    """Lines of code by Python's own tokenizer: no blank lines, comments or docstrings."""
    import ast
    import io
    import tokenize

    text = path.read_text()
    skipped = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_the_promise_on_lines_of_code_is_kept():
    assert code_lines(ROOT / "speft.py") + code_lines(ROOT / "train.py") < 500
    assert code_lines(ROOT / "model.py") < 350
    assert sum(code_lines(path) for path in (ROOT / "data").glob("*.py")) < 700
    for path in (*ROOT.glob("*.py"), *ROOT.glob("data/*.py")):
        assert max(map(len, path.read_text().splitlines())) <= 110, path


def test_nothing_of_the_hugging_face_stack_is_imported():
    for path in (*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("tests/*.py")):
        stack = "transformers|tokenizers|peft|safetensors|huggingface_hub|datasets"
        found = re.findall(rf"^\s*(?:import|from) ({stack})\b", path.read_text(), re.M)
        assert not found, path
