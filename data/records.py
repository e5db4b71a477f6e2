"""Examples that are not a corpus: one's own .jsonl and .txt files, and the tasks of reasoning-gym."""

import codecs
import difflib
import itertools
import json
import os
import subprocess
import sys

import torch

from data.files import InputError, parse_json
from data.tokenizer import begin_token, end_token

TURN = ("<|im_start|>", "<|im_end|>")  # ChatML's tokens around a turn
SHAPES = "text, prompt and completion, or messages of role and content"
MAKE_QUESTIONS = """
import contextlib, json, sys
import reasoning_gym
with contextlib.redirect_stdout(sys.stderr):  # some tasks print while they work
    rows = list(reasoning_gym.create_dataset(sys.argv[1], size=4000, seed=0))
json.dump([(row["question"], row["metadata"].get("answer_cot", row["answer"])) for row in rows], sys.stdout)
"""


def read_records(path):
    """What a file holds, as (a list of (where, record), how much of it is a record, like "line").

    The objects of a .jsonl file, or the texts of a .txt file: its paragraphs where blank lines stand between
    some, else its lines. Raises InputError, which names the file and the line.
    """
    if path.suffix == ".jsonl":
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
        named = [(f"{path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
        return [(where, parse_json(where, line)) for where, line in named], "line"
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text: {error}") from None
        return _texts(path, lines)
    raise InputError(f"no data set {path}: choose prose, stdlib, gsm, gym:NAME, or a .jsonl or .txt file")


def _texts(path, lines):
    """The paragraphs of `lines`, or the lines of the only one."""
    runs = itertools.groupby(enumerate(lines, 1), key=lambda numbered: bool(numbered[1].strip()))
    unit, texts = "paragraph", [list(run) for is_text, run in runs if is_text]
    if len(texts) == 1:
        unit, texts = "line", [[numbered] for numbered in texts[0]]
    records = []
    for text in texts:
        first = text[0][0]
        records.append((f"{path}, line {first}", {"text": "\n".join(line for _, line in text)}))
    return records, unit


def make_questions(task):
    """Some 4,000 questions of a task of the optional package reasoning-gym, no question twice, as records.

    The answer is the worked solution where the task has one (`gsm_symbolic`, which ends it in "#### number").
    When these are split, what the splits may share are templates: problems of which each question has other
    names and numbers. They are made in a process of its own with a fixed hash seed, since some tasks go
    through sets of strings: every run, and every process of a run, has the same questions.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise InputError(f"--data gym:{task} takes a package: pip install reasoning-gym") from None
    known = reasoning_gym.factory.DATASETS
    if task not in known:
        near = difflib.get_close_matches(task, known) or sorted(known)
        raise InputError(f"reasoning-gym has no task {task!r}; is it {', '.join(near)}?")
    command = [sys.executable, "-c", MAKE_QUESTIONS, task]
    made = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "0"}, capture_output=True, text=True)
    if made.returncode:
        raise InputError(f"gym:{task} cannot be made: {made.stderr.strip().splitlines()[-1]}")
    answers = {question + "\n": answer for question, answer in json.loads(made.stdout)}
    records = [{"prompt": prompt, "completion": text} for prompt, text in answers.items() if text]
    if not records:
        raise InputError(f"gym:{task} has no answers to learn: many are right, and it only checks them")
    return [(f"gym:{task}", record) for record in records]


def encode_record(where, record, tokenizer):
    """A record as (inputs, targets, length of the prompt); targets are -100 where a text is only read.

    Prompt and completion, and the messages of a chat, are encoded one by one, so that a prompt has the same
    tokens with and without its completion. A chat is written in ChatML; its assistant's turns are learned,
    and its prompt is what stands before the last of them. A text has no prompt: the length is None.
    """
    record = {key: value for key, value in record.items() if value is not None}
    ids, targets, asked = [], [], None
    try:
        for part, learned in _parts(record, tokenizer):
            if learned and not isinstance(part, tuple):
                asked = len(ids)
                if part == "":
                    raise ValueError("the text to learn is empty")
            # "" + makes sure of a string: JSON may hold anything
            tokens = list(part) if isinstance(part, tuple) else tokenizer.encode_ordinary("" + part)
            ids += tokens
            targets += tokens if learned else [-100] * len(tokens)
        if asked is None:
            raise ValueError("no message is the assistant's")
    except (KeyError, TypeError):
        raise InputError(f"{where}: expected {SHAPES}") from None
    except ValueError as error:  # the tokenizer's, too
        raise InputError(f"{where}: {error}") from None
    is_text = "text" in record and "messages" not in record
    return torch.tensor(ids[:-1]), torch.tensor(targets[1:]), None if is_text else asked


def _parts(record, tokenizer):
    """(text or a special token's id in a tuple, whether it is learned) of a record, in order."""
    begin = begin_token(tokenizer)
    if "messages" in record:
        if begin is not None:
            yield (begin,), False
        if not tokenizer.special_tokens_set.issuperset(TURN):
            raise ValueError("a chat is written in ChatML, whose tokens the model's tokenizer does not have")
        start, stop = ((tokenizer.encode_single_token(name),) for name in TURN)
        for message in record["messages"]:
            learned = message["role"] == "assistant"
            yield from ((start, False), (message["role"] + "\n", False))
            yield from ((message["content"], learned), (stop, learned), ("\n", False))
    else:
        end = (end_token(tokenizer),)
        prompt = "" if "text" in record else record["prompt"]
        completion = record["text"] if "text" in record else record["completion"]
        first = end if begin is None else (begin,)
        yield from ((first, False), (prompt, False), (completion, True), (end, True))
