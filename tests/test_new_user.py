"""A new user's path: a file with a rule to learn, a run on it, and the adapter used from the command line."""

import itertools
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import speft
import train

ROOT = Path(__file__).parent.parent
COLORS = "red blue green white black brown".split()
ANIMALS = "dog cat cow fox hen owl pig rat".split()
PLACES = "house river field wood barn hill road".split()
FLAGS = "--metric random --lr 3e-2 --seq-len 64 --device cpu".split()


def question(color, animal, place):
    return f"The {color} {animal} ran to the {place}. Which animal ran?\nAnswer:"


def write_rule(path):
    """Two hundred of the 336 questions with their answers as a .jsonl file; returns the other questions."""
    words = list(itertools.product(COLORS, ANIMALS, PLACES))
    random.Random(0).shuffle(words)
    records = [{"prompt": question(*some), "completion": f" {some[1]}"} for some in words[:200]]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [question(*some) for some in words[200:]]


def answers_in(samples):
    """[(the animal that ran, what the model says), ...] of printed samples."""
    found = [re.search(r"The \w+ (\w+) ran to .*Answer:\W*(\w*)", sample) for sample in samples]
    assert samples and all(found)
    return [match.groups() for match in found]


@pytest.mark.slow
def test_a_rule_is_learned_from_two_hundred_prompts_and_used_from_the_command_line(tmp_path, capsys):
    rule, out = tmp_path / "mine.jsonl", tmp_path / "out"
    new = write_rule(rule)
    started = time.process_time()
    train.main(["--data", str(rule), "--out", str(out), *FLAGS])
    assert time.process_time() - started < 120  # CPU seconds: a minute on two cores

    printed = capsys.readouterr().out
    before, after = (re.findall(f"^sample {when}.*", printed, re.M) for when in ("before", "after"))
    assert not any(said.startswith(right) for right, said in answers_in(before))
    assert all(right == said for right, said in answers_in(after))

    tokenizer, model = data.load_tokenizer("base"), data.load_model("base")
    test = data.load_examples(str(rule), tokenizer, 64, only=["test"])["test"]
    found = data.accuracy(data.answer(model, test.questions(64), tokenizer, 32))
    assert found["exact"] < 0.2 and found["examples"] == 20
    saved = torch.load(out / "adapter.pt", weights_only=True)["adapter"]
    assert sum(len(index) for index, _, _ in saved.values()) == 47186  # 1%
    speft.load_adapter(model, saved)
    assert data.accuracy(data.answer(model, test.questions(64), tokenizer, 32))["exact"] > 0.8

    command = [sys.executable, str(ROOT / "train.py"), "--data", str(rule), *FLAGS, "--method", "none",
               "--adapter", str(out / "adapter.pt"), "--prompt", new[0],
               "--out", str(tmp_path / "other")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    right, said = answers_in(re.findall("^sample.*", done.stdout, re.M))[-1]
    assert right == said
