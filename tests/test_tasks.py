"""Questions, answers and their marks; prompts in the data's form; the tasks of reasoning-gym."""

import json
import math
import random
import sys

import pytest
import torch
from test_records import PAIRS, chat_tokenizer, write

import data
from data import examples as examples_of_data
from data.files import InputError
from data.records import make_questions
from data.tasks import final_number, mark

WORDS = "the of a model is trained on some text that was read before and more".split()


def chat(*turns, system=None):
    """A record of the messages `turns`, of the user and the assistant in turn."""
    messages = [{"role": "system", "content": system}] if system else []
    return {"messages": messages + [{"role": ("user", "assistant")[n % 2], "content": text}
                                    for n, text in enumerate(turns)]}  # fmt: skip


def load(path, records, tokenizer):
    """All of the records as one split."""
    path = write(path, records)
    return data.load_examples(path, tokenizer, 999, only=["val"], val=path)["val"]


def test_a_question_is_what_stands_before_the_answer(tmp_path):
    tokenizer = chat_tokenizer(tmp_path)
    records = [{"prompt": "What is it? ", "completion": "it is the best"}, {"text": "a text"}]
    records += [chat("in", "here"), chat("in the", "one", "is it", "at ease", system="Be.")]
    records += [chat("a", "b", "and the user has it")]
    rendered = {
        "<|endoftext|>What is it? ": "it is the best",
        "<|im_start|>user\nin<|im_end|>\n<|im_start|>assistant\n": "here",
        "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nin the<|im_end|>\n"
        "<|im_start|>assistant\none<|im_end|>\n<|im_start|>user\nis it<|im_end|>\n"
        "<|im_start|>assistant\n": "at ease",
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n": "b",
    }  # fmt: skip
    examples = load(tmp_path / "a.jsonl", records, tokenizer)
    questions = examples.questions(9)
    assert {tokenizer.decode(prompt): tokenizer.decode(right) for prompt, right in questions} == rendered
    assert [len(prompt) for prompt, _ in questions] == sorted(len(prompt) for prompt, _ in questions)
    begun = {tokenizer.decode(ids) for ids in examples.beginnings(9)}
    assert set(rendered) < begun and len(begun) == len(records)  # the text has a beginning, too
    for prompt, right in questions:
        # As they are learned: what follows the prompt is the answer, and then the token that ends it.
        ids = [s[0].tolist() for s in examples.samples if s[0].tolist()[: len(prompt)] == prompt]
        assert any(found[len(prompt) :][: len(right)] == right for found in ids)


def test_questions_and_beginnings_are_spread_over_the_examples(tmp_path):
    tokenizer = data.load_tokenizer("base")
    examples = load(tmp_path / "a.jsonl", PAIRS, tokenizer)  # 30, in the order of their number
    for count in (1, 3, 10, 30, 99):
        wanted = [PAIRS[i * 30 // min(count, 30)] for i in range(min(count, 30))]
        asked = {tokenizer.decode(prompt) for prompt, _ in examples.questions(count)}
        assert asked == {"<|endoftext|>" + pair["prompt"] for pair in wanted}
        assert asked == {tokenizer.decode(ids) for ids in examples.beginnings(count)}


@pytest.mark.parametrize("seed", range(3))
def test_a_beginning_never_holds_anything_to_learn(tmp_path, seed):
    chance = random.Random(seed)
    tokenizer = chat_tokenizer(tmp_path)
    some = lambda least=1: " ".join(chance.choices(WORDS, k=chance.randint(least, 40)))  # noqa: E731
    records = []
    for _ in range(40):
        forms = {"prompt": some(0), "completion": some()}, chat(some(), some()), {"text": some()}
        records.append(chance.choice(forms))
    examples = load(tmp_path / "a.jsonl", records, tokenizer)
    assert len(examples) == 40
    for record, ids, (inputs, targets) in zip(records, examples.beginnings(40), examples.samples):
        assert 1 <= len(ids) <= len(inputs) and ids == inputs[: len(ids)].tolist()
        if "text" in record:
            assert len(ids) <= 16 and len(ids) <= (len(inputs) + 1) / 2
        else:
            assert (targets[: len(ids) - 1] == -100).all() and targets[len(ids) - 1] != -100


def test_a_prompt_takes_the_form_of_the_data(tmp_path):
    tokenizer = chat_tokenizer(tmp_path)
    forms = {
        "<|endoftext|>is it": [{"text": "in"}],
        "<|endoftext|>is it ": [{"prompt": "in", "completion": "it"}],
        "<|im_start|>user\nis it<|im_end|>\n<|im_start|>assistant\n": [
            chat("a", "b", system="Be."), chat("in", "it")],
        "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nis it<|im_end|>\n<|im_start|>assistant\n": [
            chat("in", "it", "and", "more", system="Be."), chat("a", "b", system="Be.")],
    }  # fmt: skip
    for wanted, records in forms.items():
        like = load(tmp_path / "a.jsonl", records, tokenizer)
        ids = data.format_prompt("is it " if wanted.endswith(" ") else "is it", tokenizer, like)
        assert tokenizer.decode(ids) == wanted
    # What is tried has the tokens of what was trained.
    like = load(tmp_path / "a.jsonl", [chat("is it", "here", system="Be.")], tokenizer)
    assert data.format_prompt("is it", tokenizer, like) == like.questions(1)[0][0]
    like = load(tmp_path / "a.jsonl", [{"prompt": "is it", "completion": " here"}], tokenizer)
    assert data.format_prompt("is it", tokenizer, like) == like.questions(1)[0][0]


def test_an_answer_ends_where_a_document_or_a_turn_ends(tmp_path):
    base, chats = data.load_tokenizer("base"), chat_tokenizer(tmp_path)
    assert data.stop_tokens(base) == [data.end_token(base)]
    assert [chats.decode([token]) for token in data.stop_tokens(chats)] == ["<|endoftext|>", "<|im_end|>"]


class Parrot:
    """What a model is to `data.answer`: it says a line of its own for each prompt."""

    def __init__(self, lines):
        self.lines = lines

    def complete(self, prompts, max_new_tokens, stop, batch_size):
        assert len(prompts) <= batch_size
        return [self.lines[tuple(prompt)][:max_new_tokens] for prompt in prompts]


def test_answers_are_marked_whatever_the_batches_and_the_parts(tmp_path):
    tokenizer = data.load_tokenizer("base")
    questions = load(tmp_path / "a.jsonl", PAIRS, tokenizer).questions(30)
    lines = {}
    for n, (prompt, right) in enumerate(questions):
        spaced = tokenizer.encode_ordinary(f" {tokenizer.decode(right)}\n")
        lines[tuple(prompt)] = [right, spaced, right[:-1], right * 2][n % 4]
    wanted = [{"exact": n % 4 < 2} for n in range(30)]
    for size in (1, 4, 99):
        seen = []
        progress = lambda done, total: seen.append((done, total))  # noqa: E731
        marks = data.answer(Parrot(lines), questions, tokenizer, size, progress)
        assert marks == wanted
        assert seen == [(min(done, 30), 30) for done in range(size, 30 + size, size)]
        parts = [data.answer(Parrot(lines), questions[rank::3], tokenizer, size) for rank in range(3)]
        assert data.accuracy(sum(parts, [])) == data.accuracy(wanted)
    error = pytest.approx(math.sqrt(16 * 14 / 30**3))
    assert data.accuracy(wanted) == {"examples": 30, "exact": 16 / 30, "exact_error": error}


def test_an_answer_has_room_for_twice_the_right_one_in_every_batch(tmp_path):
    tokenizer = data.load_tokenizer("base")
    right = tokenizer.encode_ordinary("one\n#### 7")
    questions = [([1], right), ([2], right * 9)]
    (seven,) = tokenizer.encode_ordinary("7")
    lines = {(1,): [100] * (2 * len(right) + 8 - 1) + [seven] * 50, (2,): right * 9}  # one 7 has room
    for size in (1, 2):
        first, second = data.answer(Parrot(lines), questions, tokenizer, size)
        assert first == {"exact": False, "strict": False, "flexible": True} and second["exact"]


def test_a_model_answers_as_if_each_question_stood_alone(tmp_path):
    tokenizer, model = data.load_tokenizer("base"), data.load_model("base")
    prompts = ["def main(", "import os\nimport s", "x = [1, 2, ", "class Foo:\n    def __init__("]
    said = []
    for prompt in prompts:  # what the model says is made the right answer of every other question
        ids = [data.end_token(tokenizer), *tokenizer.encode_ordinary(prompt)]
        for _ in range(5):
            ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
        said.append(tokenizer.decode(ids[-5:]))
    rights = [text if n % 2 else "no" for n, text in enumerate(said)]
    records = [{"prompt": prompt, "completion": text} for prompt, text in zip(prompts, rights)]
    questions = load(tmp_path / "a.jsonl", records, tokenizer).questions(4)
    order = [prompts.index(tokenizer.decode(ids[1:])) for ids, _ in questions]

    class Brief:
        """Ends after five tokens, as a model that has learned the answers would."""

        def complete(self, prompts, max_new_tokens, stop, batch_size):
            return model.complete(prompts, 5, stop, batch_size)

    for size in (1, 3, 4):
        marks = data.answer(Brief(), questions, tokenizer, size)
        assert [found["exact"] for found in marks] == [n % 2 == 1 for n in order]


def test_texts_have_no_accuracy(tmp_path):
    tokenizer = data.load_tokenizer("base")
    assert load(tmp_path / "a.jsonl", [{"text": "a text"}], tokenizer).questions(9) == []
    assert data.load_examples("stdlib", tokenizer, 64, only=["test"])["test"].questions(9) == []
    assert data.accuracy(data.answer(None, [], tokenizer, 4)) is None


@pytest.mark.parametrize(("text", "strict", "flexible"), (
    ("6 * 7 = 42\n#### 42", 42, 42), ("so 1,234.50\n#### 1,234.50", 1234.5, 1234.5), ("#### -3", -3, -3),
    ("The answer is 42.", None, 42), ("#### 7 or 8", 7, 8), ("#### $5", 5, 5), ("####9", None, 9),
    ("no", None, None), ("", None, None), ("a 3-4 split", None, -4), ("#### 10\nFour more: #### 11", 11, 11),
    ("#### " + "9" * 400, 10**400 - 1, 10**400 - 1),
))  # fmt: skip
def test_final_numbers(text, strict, flexible):
    assert final_number(text, "#### ") == strict and final_number(text, "") == flexible


@pytest.mark.parametrize(("said", "right", "marks"), (
    (" dog\n", "dog", {"exact": True}), ("dog", " dog ", {"exact": True}), ("dog.", "dog", {"exact": False}),
    ("Dog", "dog", {"exact": False}), ("a  b", "a b", {"exact": False}), ("", "dog", {"exact": False}),
    ("7", "7", {"exact": True}),  # no worked solution: one reading
    ("6 + 1\n#### 7", "so 7\n#### 7", {"exact": False, "strict": True, "flexible": True}),
    ("it is 7", "so 7\n#### 7", {"exact": False, "strict": False, "flexible": True}),
    ("#### 7.0", "#### 7", {"exact": False, "strict": True, "flexible": True}),
    ("#### 7 of 9", "#### 7", {"exact": False, "strict": True, "flexible": False}),
    ("no number", "#### 7", {"exact": False, "strict": False, "flexible": False}),
    ("no number", "#### none", {"exact": False, "strict": False, "flexible": False}),
    ("#### none", "#### none", {"exact": True, "strict": False, "flexible": False}),
))  # fmt: skip
def test_marks(said, right, marks):
    assert mark(said, right) == marks


def test_the_readings_of_worked_solutions_are_shares_of_these():
    marks = [mark("I say 1", "1\n#### 1"), mark("#### 2", "#### 2"), mark("#### 4", "#### 3"), mark("x", "x"),
             mark("three\n#### 4.0", "#### 4")]  # fmt: skip
    found = data.accuracy(marks)
    measured = {reading + kind for reading in ("exact", "strict", "flexible") for kind in ("", "_error")}
    assert found.keys() == measured | {"examples"}
    assert (found["examples"], found["exact"], found["strict"], found["flexible"]) == (5, 0.4, 0.5, 0.75)
    for reading, count in (("exact", 5), ("strict", 4), ("flexible", 4)):
        share = found[reading]
        assert found[f"{reading}_error"] == pytest.approx(math.sqrt(share * (1 - share) / count))
    assert json.loads(json.dumps(found)) == found
    shares = "exact 40.0% ± 21.9%, strict 50.0% ± 25.0%, flexible 75.0% ± 21.7%"
    assert data.in_words(found) == f"{shares} of 5 answers"
    assert data.in_words(data.accuracy(marks[3:4])) == "exact 100.0% ± 0.0% of 1 answers"


@pytest.mark.slow
@pytest.mark.parametrize("name", ("gsm", "gym:coin_flip", "gym:bf"))
def test_the_splits_of_a_task_share_no_question(name):
    pytest.importorskip("reasoning_gym")
    tokenizer = data.load_tokenizer("base")
    splits = data.load_examples(name, tokenizer, 1000)
    seen = {}
    for split, examples in splits.items():
        questions = examples.questions(len(examples))
        assert len(questions) == len(examples) > 10
        for prompt, right in questions:
            assert seen.setdefault(tuple(prompt), split) == split
            is_worked = final_number(tokenizer.decode(right), "#### ") is not None
            assert is_worked == (name == "gsm")
    assert len(seen) == sum(map(len, splits.values()))
    assert f"questions of {name}" in splits["train"].note
    if name == "gsm":
        assert len(seen) > 3900 and min(map(len, splits.values())) > 380


def test_gsm_is_short_for_a_task_and_a_task_may_be_validated_on(tmp_path, monkeypatch):
    asked = []

    def make(task):
        asked.append(task)
        return [(f"gym:{task}", pair) for pair in PAIRS]

    monkeypatch.setattr(examples_of_data, "make_questions", make)
    tokenizer = data.load_tokenizer("base")
    gsm, full = (data.load_examples(name, tokenizer, 64)["train"] for name in ("gsm", "gym:gsm_symbolic"))
    assert gsm.fingerprint() == full.fingerprint() and asked == ["gsm_symbolic", "gsm_symbolic"]
    path = write(tmp_path / "a.jsonl", PAIRS[:3])
    assert len(data.load_examples(path, tokenizer, 64, val="gym:chain_sum")["val"]) == 30


@pytest.mark.slow
def test_a_task_has_the_same_questions_whatever_the_hash_seed(monkeypatch):
    pytest.importorskip("reasoning_gym")
    made = []
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        made.append(make_questions("ransom_note"))  # goes through a set of words
    assert made[0] == made[1] and len(made[0]) > 3900


@pytest.mark.slow
@pytest.mark.parametrize(("name", "said"), (
    ("gym:chain_sums", "no task 'chain_sums'; is it .*chain_sum"), ("gym:", "no task ''"),
    ("gym:composite", "composite cannot be made: .*dataset"), ("gym:graph_color", "no answers to learn"),
))  # fmt: skip
def test_tasks_that_cannot_be_learned_are_named(name, said):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(InputError, match=said) as error:
        data.load_examples(name, data.load_tokenizer("base"), 64)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ("gsm", "gym:chain_sum"))
def test_a_task_names_the_package_it_needs(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError, match="pip install reasoning-gym"):
        data.load_examples(name, data.load_tokenizer("base"), 64)
