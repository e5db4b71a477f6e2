"""Examples that are not plain text: .jsonl files, and `gsm`, word problems with worked solutions."""

import re

import torch

from data.files import InputError, parse_json

ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>")  # what ends a document, by family
SHAPES = "text, prompt and completion, or (if the tokenizer knows ChatML) messages of role and content"


def end_token(tokenizer):
    """The id of the token that ends a document."""
    for name in ENDS:
        if name in tokenizer.special_tokens_set:
            return tokenizer.encode_single_token(name)
    raise InputError(f"{tokenizer.name}: the tokenizer has no token to end a document, like {ENDS[0]}")


def read_records(path):
    """The objects of a .jsonl file, or the paragraphs of a .txt file as texts: a list of (where, record).

    Raises InputError, which names the file and the line.
    """
    if path.suffix == ".jsonl":
        lines = [(f"{path}, line {n}", line) for n, line in enumerate(path.read_bytes().splitlines(), 1)]
        return [(where, parse_json(where, line)) for where, line in lines if line.strip()]
    if path.suffix == ".txt":
        try:
            paragraphs = re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text: {error}") from None
        return [(str(path), {"text": text}) for text in paragraphs if text.strip()]
    raise InputError(f"no data set {path}: choose prose, stdlib, gsm, or a .jsonl or .txt file")


def make_gsm():
    """Some 4,000 records of `gsm_symbolic`, from the optional package reasoning-gym; no question twice.

    When these are split, what the splits share are the templates: problems of which each example has other
    names and numbers.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise InputError("--data gsm takes the package reasoning-gym: pip install reasoning-gym") from None
    rows = reasoning_gym.create_dataset("gsm_symbolic", size=4000, seed=0)
    solutions = {row["question"] + "\n": row["metadata"]["answer_cot"] for row in rows}
    return [("gsm", {"prompt": prompt, "completion": text}) for prompt, text in solutions.items()]


def encode_record(where, record, tokenizer):
    """A record as a sample (inputs, targets); targets are -100 where a text is only read.

    Prompt and completion, and the messages of a chat, are encoded one by one, so that a prompt has the same
    tokens with and without its completion. A chat is written in ChatML; its assistant's turns are learned.
    """
    ids, targets = [], []
    try:
        for part, learned in _parts(record, tokenizer):
            if part == "" and learned:
                raise InputError(f"{where}: the text to learn is empty")
            # "" + makes sure of a string: JSON may hold anything
            tokens = list(part) if isinstance(part, tuple) else tokenizer.encode_ordinary("" + part)
            ids += tokens
            targets += tokens if learned else [-100] * len(tokens)
    except (KeyError, TypeError):
        raise InputError(f"{where}: expected {SHAPES}") from None
    if set(targets) <= {-100}:
        raise InputError(f"{where}: no message is the assistant's")
    return torch.tensor(ids[:-1]), torch.tensor(targets[1:])


def _parts(record, tokenizer):
    """(text or a special token's id, whether it is learned) of a record, in order."""
    if "messages" in record:
        start, stop = ((tokenizer.encode_single_token(name),) for name in ("<|im_start|>", "<|im_end|>"))
        for message in record["messages"]:
            learned = message["role"] == "assistant"
            yield from ((start, False), (message["role"] + "\n", False))
            yield from ((message["content"], learned), (stop, learned), ("\n", False))
    else:
        end = (end_token(tokenizer),)
        prompt = "" if "text" in record else record["prompt"]
        yield from ((end, False), (prompt, False))
        yield from ((record.get("text", record.get("completion")), True), (end, True))


def final_number(text, mark):
    """The number after `mark`, the last one if it stands there more than once; None if there is none."""
    found = re.findall(mark + r"\$?(-?\d[\d,]*(?:\.\d+)?)", text)
    return float(found[-1].replace(",", "")) if found else None


def exact_match(said, right):
    """Compare the final numbers of solutions, pair by pair; the worked ones in `right` end in "#### number".

    strict: the number said after "####"; flexible: the last number said. Both are shares, with the standard
    error of strict.
    """
    pairs = [(text, final_number(solution, "#### ")) for text, solution in zip(said, right)]
    share = {}
    for name, mark in (("strict", "#### "), ("flexible", "")):
        hits = [final_number(text, mark) == number for text, number in pairs]
        share[name] = sum(hits) / len(hits)
    error = (share["strict"] * (1 - share["strict"]) / len(pairs)) ** 0.5
    return share | {"examples": len(pairs), "standard_error": error}
