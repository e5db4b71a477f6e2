"""Break every function of speft.py and train.py in small ways, one at a time: do the fast tests see it?

    python tests/bench/mutants.py                      # all functions; goes on where it was stopped
    python tests/bench/mutants.py select SparseLinear  # these functions, and these classes' methods
    python tests/bench/mutants.py --sample 12          # at most a dozen of each function
    python tests/bench/mutants.py --slow --again       # with slow tests, too, on those that lived
    python tests/bench/mutants.py --report             # only print what is known

Writes a row a mutant to --out and prints, a line a function, how many were killed, and every one that lived.
A mutant lives if all these tests pass. Some must: what they change, nobody can observe.
"""

import argparse
import ast
import contextlib
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import tiktoken  # noqa: F401  for the children
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
TESTS = {  # the files of tests that are run on each
    "speft.py": "toy select metrics synflow linearised scoring layer cover weight remask adapter method "
    "anybody processes".split(),
    "train.py": "fit train resume settings processes progress".split(),
}

# ----------------------------------------------------------------------------------------------------------
# 1. Mutants: (the node to replace, the text to put there)

SWAPS = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.And: (ast.Or,), ast.Or: (ast.And,),
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,), ast.Mod: (ast.FloorDiv,), ast.Pow: (ast.Mult,), ast.BitOr: (ast.BitAnd,),
    ast.BitAnd: (ast.BitOr,),
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}  # functions and methods
STATEMENTS = (ast.Expr, ast.Assign, ast.AugAssign, ast.Raise, ast.Delete, ast.If, ast.For, ast.While)


def functions(tree):
    """(name, node) of every function of a module, and of every method as Class.method."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        if isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{part.name}", part) for part in node.body
                        if isinstance(part, ast.FunctionDef))  # fmt: skip


def inside(node):
    """The node and what it is made of, in order; of texts, nothing."""
    yield node
    if not isinstance(node, ast.JoinedStr):
        for child in ast.iter_child_nodes(node):
            yield from inside(child)


def changed(node, **parts):
    """The text of a copy of the node with other parts, in parentheses if it is an expression."""
    copied = type(node)(**{field: getattr(node, field) for field in node._fields} | parts)
    text = ast.unparse(ast.fix_missing_locations(ast.copy_location(copied, node)))
    return f"({text})" if isinstance(node, ast.expr) else text


def swapped(operator):
    return [kind() for kind in SWAPS.get(type(operator), ())]


def mutations(function):
    """(node, text) for every small change of the function."""
    for node in inside(function):
        match node:
            case ast.Expr(value=ast.Constant()):
                pass  # a docstring
            case ast.Return(value=ast.expr()):
                yield node, "return None"
            case ast.Continue() | ast.Break():
                yield node, "pass"
            case _ if isinstance(node, STATEMENTS):
                yield node, "pass"
        match node:
            case ast.Compare(ops=[first, *others]):
                for other in swapped(first):
                    yield node, changed(node, ops=[other, *others])
                for i, operator in enumerate(others):
                    for other in swapped(operator):
                        yield node, changed(node, ops=[first, *others[:i], other, *others[i + 1 :]])
            case ast.BoolOp() | ast.BinOp() | ast.AugAssign():
                for other in swapped(node.op):
                    yield node, changed(node, op=other)
            case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
                yield node, f"({ast.unparse(node.operand)})"
            case ast.Constant(value=bool()):
                yield node, str(not node.value)
            case ast.Constant(value=int() | float()):
                yield node, f"({node.value + 1!r})"
            case ast.Name(id=name) if name in NAMES:
                yield node, NAMES[name]
            case ast.Attribute(attr=name) if name in NAMES:
                yield node, changed(node, attr=NAMES[name])
            case ast.Call(keywords=[_, *_]):
                for keyword in node.keywords:
                    yield node, changed(node, keywords=[k for k in node.keywords if k is not keyword])
            case ast.If() | ast.While() | ast.IfExp() if not isinstance(node.test, ast.Compare):
                yield node.test, f"(not ({ast.unparse(node.test)}))"
            case ast.comprehension(ifs=[condition]):
                yield condition, f"(not ({ast.unparse(condition)}))"


def replaced(source, node, text):
    """The source with the node's place taken by the text."""
    lines = source.encode().splitlines(keepends=True)
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    return (b"".join(lines)[:start] + text.encode() + b"".join(lines)[end:]).decode()


def mutants(file, chosen):
    """(row, source) of every mutant of the chosen functions of this file."""
    source = (ROOT / file).read_text()
    tree = ast.parse(source)
    seen = {ast.dump(tree)}
    for name, function in functions(tree):
        if chosen and not {name, name.split(".")[0]} & set(chosen):
            continue
        body = ast.get_source_segment(source, function)
        version = hashlib.sha256(body.encode()).hexdigest()[:12]  # of the function: a later one starts anew
        for number, (node, text) in enumerate(mutations(function)):
            mutant = replaced(source, node, text)
            try:
                program = ast.dump(ast.parse(mutant))
            except SyntaxError:  # as where an `elif` was dropped
                continue
            if program not in seen:
                seen.add(program)
                yield {"file": file, "function": name, "version": version, "number": number,
                       "line": node.lineno, "from": ast.get_source_segment(source, node),
                       "to": text}, mutant  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# 2. Running the tests on one


def child(copy, tests, log, marked):
    """Run tests, up to the first failure, in a process group of its own; ends with pytest's exit code."""
    os.setsid()
    os.chdir(copy)
    sys.argv = ["pytest"]
    with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = pytest.main(["-x", "-q", "-m", marked, "-p", "no:cacheprovider", *tests])
    os._exit(code)


def failing(copy, tests, seconds, marked):
    """The first test of these (or of these files) that fails in the copy, or what else ended them early."""
    log = copy / "printed"
    process = multiprocessing.get_context("fork").Process(target=child, args=(copy, tests, log, marked))
    process.start()
    process.join(seconds)
    in_time = not process.is_alive()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # also whatever it has started
    process.join()
    if in_time and process.exitcode in (0, pytest.ExitCode.NO_TESTS_COLLECTED):  # all of a file may be slow
        return None
    found = re.findall(r"^FAILED (.+?)(?: - .*)?$", log.read_text(), re.M)
    return found[0] if found else f"exit code {process.exitcode}" if in_time else f"{seconds:.0f} s"


def preload():
    """Load once what every child needs, but nothing that is mutated; unthreaded, so that it can fork."""
    torch.set_num_threads(1)
    with FlopCounterMode(display=False):
        torch.zeros(1).nonzero()  # the first time under such a mode imports a great deal


def put(copy, file, source):
    (copy / file).write_text(source)
    # Python would take what it compiled in the same second for the new source.
    Path(importlib.util.cache_from_source(copy / file)).unlink(missing_ok=True)


def time_limits(copy, names, marked):
    """{file of tests: seconds after which it hangs}, from the time it takes as things are."""
    limits = {}
    for test in (f"tests/test_{name}.py" for name in names):
        start = time.time()
        if failing(copy, [test], 900, marked):
            sys.exit(f"{test} fails without any change:\n" + (copy / "printed").read_text()[-3000:])
        limits[test] = 20 + 5 * (time.time() - start)
    return limits


def a_sample(waiting, size):
    """Of the (row, source) pairs at most `size` of every function, spread over its text."""
    by_function = {}
    for pair in waiting:
        by_function.setdefault(pair[0]["function"], []).append(pair)
    return [pair for pairs in by_function.values() for pair in pairs[:: math.ceil(len(pairs) / size)]]


def try_all(files, chosen, out, marked, again, size):
    """Run the tests on each mutant that has no row in `out` yet (`again`: or that lived); write its row."""
    preload()
    found = {key(row): row["by"] for row in read(out)}
    known = {mutant for mutant, by in found.items() if by or not again}
    with tempfile.TemporaryDirectory() as folder, open(out, "a") as rows:
        rows.write("\n" * bool(found))  # the last line may have been cut off
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", "out", "__pycache__", ".*")
        shutil.copytree(ROOT, copy, ignore=ignored, symlinks=True)
        for file in files:
            waiting = a_sample(list(mutants(file, chosen)), size)
            waiting = [(row, source) for row, source in waiting if key(row) not in known]
            limits = time_limits(copy, TESTS[file], marked) if waiting else {}
            killers = {row["function"]: Counter() for row, _ in waiting}
            for row, source in waiting:
                put(copy, file, source)
                start = time.time()
                # Most mutants of a function fall to the tests that killed others of it.
                first = [test for test, _ in killers[row["function"]].most_common(8)]
                row["by"] = failing(copy, first, max(limits.values()), marked) if first else None
                for test in limits:
                    row["by"] = row["by"] or failing(copy, [test], limits[test], marked)
                killers[row["function"]].update([row["by"]] if "::" in (row["by"] or "") else [])
                row["seconds"] = round(time.time() - start, 1)
                rows.write(json.dumps(row) + "\n")
                rows.flush()
                print(f"{row['function']}:{row['line']} {row['by'] or 'LIVED'}", flush=True)
            put(copy, file, (ROOT / file).read_text())


# ----------------------------------------------------------------------------------------------------------
# 3. What became of them


def key(row):
    return row["file"], row["function"], row["version"], row["number"]


def read(out):
    """The rows so far; a last line that was cut off is none."""
    rows = []
    for line in out.read_text().splitlines() if out.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def report(files, chosen, rows):
    """Print a line for each function, and below it what lived."""
    found, total = {key(row): row for row in rows}, Counter()
    for file in files:
        tried = {}
        for row, _ in mutants(file, chosen):
            tried.setdefault(row["function"], []).append(row | {"by": found.get(key(row), {"by": ""})["by"]})
        for function, part in tried.items():
            done = [row for row in part if row["by"] != ""]
            lived = [row for row in done if row["by"] is None]
            total.update(made=len(part), tried=len(done), lived=len(lived))
            print(f"{file} {function}: {counts(len(part), len(done), len(lived))}")
            for row in lived:
                print(f"    line {row['line']}: {flat(row['from'])}  ->  {flat(row['to'])}")
    print(f"in all: {counts(total['made'], total['tried'], total['lived'])}")


def counts(made, tried, lived):
    text = f"{made} mutants, {tried - lived} killed, {lived} lived"
    return text + f", {made - tried} not tried" * (made > tried)


def flat(text):
    """The text in one line, at most 60 characters of it."""
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("functions", nargs="*", help="functions or classes (default: all)")
    parser.add_argument("--file", choices=TESTS, action="append", help="only of this file")
    parser.add_argument("--out", type=Path, default=ROOT / "out/mutants.jsonl", help="where the rows are")
    parser.add_argument("--slow", action="store_true", help="run also the tests that are marked slow")
    parser.add_argument("--sample", type=int, default=1000, help="at most so many of each function")
    parser.add_argument("--again", action="store_true", help="try those that lived once more")
    parser.add_argument("--report", action="store_true", help="run nothing, print what is known")
    args = parser.parse_args()
    args.out.parent.mkdir(exist_ok=True)
    files = args.file or list(TESTS)
    if not args.report:
        marked = "slow or not slow" if args.slow else "not slow"
        try_all(files, args.functions, args.out, marked, args.again, args.sample)
    report(files, args.functions, read(args.out))


if __name__ == "__main__":
    main()
