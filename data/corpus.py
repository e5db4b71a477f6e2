"""The two corpora every Python ships: `stdlib` (source code) and `prose` (English documentation).

Both are read from the running Python's own files, so nobody else's text lies in this repository. A corpus
is a dict {"train": documents, "val": documents, "test": documents}; a document is a string, and belongs to
a split by the checksum of its name, so that a newer Python keeps old documents where they were.
"""

import ast
import functools
import re
import sysconfig
import warnings
import zlib
from pathlib import Path

from pydoc_data import topics

STDLIB = Path(sysconfig.get_paths()["stdlib"])
# Tests are repetitive, pydoc_data and docstrings are `prose`, and _sysconfigdata describes one machine.
SKIPPED = re.compile(r"(^|/)((site|dist)-packages|tests?|idle_test|pydoc_data|_sysconfigdata[^/]*)(/|$)")
GRAM = 12  # words: two texts that share this many in a row count as overlapping
MIN_WORDS = 60  # a docstring shorter than this is a remark, not a document


@functools.cache
def load_corpus(name):
    """The corpus `name` ("stdlib" or "prose") as {split: list of documents}. Cached: it takes seconds."""
    return {"stdlib": _stdlib, "prose": _prose}[name]()


@functools.cache
def _sources():
    """{relative path: (source lines, `_docstrings`)} of the standard library's modules.

    The syntax trees are let go: two million objects, which the garbage collector would walk again and again.
    """
    sources = {}
    for path in sorted(STDLIB.rglob("*.py")):
        relative = path.relative_to(STDLIB).as_posix()
        if SKIPPED.search(relative):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in lib2to3 and friends are not our business
                tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue  # a few files are deliberately in another encoding or another Python
        sources[relative] = text.splitlines(), list(_docstrings(tree))
    return sources


def _docstrings(tree):
    """(name, the docstring's node) of a module and of its classes and functions."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False):
                yield getattr(node, "name", ""), node.body[0]


def _stdlib():
    corpus = {"train": [], "val": [], "test": []}
    for path, (lines, docstrings) in _sources().items():
        inside = {n for _, node in docstrings for n in range(node.lineno, node.end_lineno + 1)}
        text = "\n".join(line.rstrip() for number, line in enumerate(lines, 1) if number not in inside)
        corpus[split_of(path, held_out=0.04)].append(text.strip() + "\n")
    return corpus


def _prose():
    documents = [(f"topic {name}", text) for name, text in sorted(topics.topics.items())]
    for path, (_, docstrings) in _sources().items():
        documents += [(path + name, node.value.value) for name, node in docstrings]
    # A paragraph is kept only if no dozen of its words stands in `stdlib` or in an earlier paragraph: the
    # base has never read any of it, and train, validation and test share nothing.
    seen = set()
    for split in load_corpus("stdlib").values():
        for text in split:
            seen.update(_grams(text))
    corpus = {"train": [], "val": [], "test": []}
    for name, text in documents:
        kept = []
        for paragraph in _paragraphs(text):
            grams = _grams(paragraph)
            if seen.isdisjoint(grams):
                kept.append(paragraph)
            seen.update(grams)
        if sum(len(paragraph.split()) for paragraph in kept) >= MIN_WORDS:
            corpus[split_of(name, held_out=0.1)].append("\n\n".join(kept) + "\n")
    return corpus


def _paragraphs(text):
    """The paragraphs of `text` that read as English, each on one line."""
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        wordlike = len(re.findall(r"\b[A-Za-z][a-z]*\b[,.;:)]?(?= |$)", paragraph))
        if ">>>" not in block and wordlike >= 8 and wordlike >= 0.8 * len(paragraph.split()):
            yield paragraph


def _grams(text):
    """Every run of GRAM words, hashed; a shorter text is one run."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {hash(tuple(words[i : i + GRAM])) for i in range(max(1, len(words) - GRAM + 1))}


def split_of(name, held_out):
    """"val" and "test" take a share `held_out` of the documents each."""
    place = zlib.crc32(name.encode()) / 2**32
    return "val" if place < held_out else "test" if place < 2 * held_out else "train"
