"""What the project promises of its size, and of what it is built from."""

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]
NO_CODE = {getattr(tokenize, name) for name in "COMMENT NL NEWLINE INDENT DEDENT ENDMARKER".split()}


def code_lines(path):
    """Lines of code by Python's own tokenizer: no blank lines, comments or docstrings."""
    text, lines = path.read_text(), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def all_lines(path):
    return len(path.read_text().splitlines())


def test_method_and_loop_have_less_than_500_lines_of_code():
    assert code_lines(ROOT / "speft.py") + code_lines(ROOT / "train.py") < 500
    assert all_lines(ROOT / "speft.py") < 500 and all_lines(ROOT / "train.py") < 500
    assert code_lines(ROOT / "model.py") < 350


def test_every_file_can_be_read_at_a_sitting():
    assert all(all_lines(path) < 300 for path in ROOT.glob("data/*.py"))
    assert all(all_lines(path) < 600 for path in (*ROOT.glob("tests/*.py"), *ROOT.glob("tests/bench/*.py")))
    for path in (*MODULES, *ROOT.glob("tests/*.py"), *ROOT.glob("tests/bench/*.py")):
        assert max(map(len, path.read_text().splitlines())) <= 110, path


def test_nothing_of_the_hugging_face_stack_is_imported():
    stack = "transformers|tokenizers|peft|safetensors|huggingface_hub|datasets"
    for path in (*MODULES, *ROOT.glob("tests/*.py")):
        assert not re.findall(rf"^\s*(?:import|from) ({stack})\b", path.read_text(), re.M), path
