"""How thickly the top-level files are packed: tokens, width, tuples and comprehensions per line of code."""

import ast
import io
import re
import tokenize

import pytest
from conftest import ROOT

FILES = sorted(ROOT.glob("*.py"))
LAYOUT = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}
LOOPS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DENSER = {"dit.py": 11.2, "fid.py": 11.2}  # networks and metrics: formulas are dense
TOKENS = {"train_repa.py": 3_600}
ALL_TOKENS = 43_250  # of the files that are not LATER
LATER = {"train_meanflow.py", "train_dit.py"}


def docstring_lines(tree):
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            if ast.get_docstring(node) is not None:
                lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def measure(source):
    """Figures of a file; `per_line` counts are over lines of code, without docstrings and comments."""
    tree = ast.parse(source)
    skipped = docstring_lines(tree)
    tokens, ends = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT and token.start[0] not in skipped:
            tokens[token.start[0]] = tokens.get(token.start[0], 0) + 1
            ends[token.end[0]] = max(ends.get(token.end[0], 0), token.end[1])
    nodes = list(ast.walk(tree))
    loops = [node for node in nodes if isinstance(node, LOOPS)]
    nested = [loop for loop in loops if sum(isinstance(x, LOOPS) for x in ast.walk(loop)) > 1]
    assigned = [node for node in nodes if isinstance(node, ast.Assign)]
    pairs = [(node.targets[0], node.value) for node in assigned]
    tuples = [pair for pair in pairs if all(isinstance(side, ast.Tuple) for side in pair)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    code = len(tokens)
    return {
        "tokens": sum(tokens.values()),
        "per_line": sum(tokens.values()) / code,
        "wide": 100 * sum(end > 90 for end in ends.values()) / code,
        "tuples": 100 * len(tuples) / code,
        "loops": 100 * len(loops) / code,
        "nested": len(nested),
        "functions": {node.name: node.end_lineno - node.lineno + 1 for node in functions},
        "longest_line": max(map(len, source.splitlines())),
    }


def test_measure_counts_as_by_hand():
    source = '"""Doc."""\n\na, b = 1, 2  # two\n\n\ndef f(x):\n    """Doc."""\n    return [y for y in x]\n'
    found = measure(source)
    # a , b = 1 , 2 / def f ( x ) : / return [ y for y in x ]
    assert found["tokens"] == 7 + 6 + 8 and found["per_line"] == 21 / 3
    assert found["tuples"] == found["loops"] == pytest.approx(100 / 3)
    assert found["nested"] == 0 and found["functions"] == {"f": 3} and found["wide"] == 0
    assert measure("x = [[z for z in y] for y in w]\n")["nested"] == 1
    assert measure(f"x = '{'-' * 90}'\n")["wide"] == 100


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_density(path):
    found = measure(path.read_text())
    assert found["per_line"] <= DENSER.get(path.name, 10.5) + 0.05, "tokens per line of code"
    assert found["wide"] <= 6.5, "percent of the lines of code reach beyond column 90"
    assert found["tuples"] <= 1, "assignments of a tuple to a tuple, per 100 lines"
    assert found["loops"] <= 4.5, "comprehensions, per 100 lines"
    assert found["nested"] == 0 and found["longest_line"] <= 100
    assert found["tokens"] <= TOKENS.get(path.name, 10_000)
    long = {"train", "parse_args"} if path.name.startswith("train_") else set()  # flat lists
    for name, lines in found["functions"].items():
        assert lines <= (120 if name in long else 60), f"{name} has {lines} lines"


def test_tokens_in_all():
    counts = [measure(path.read_text())["tokens"] for path in FILES if path.name not in LATER]
    assert sum(counts) <= ALL_TOKENS


def test_loop_fits_on_a_screen():
    """At most 55 lines outside the fences, in five sections with a blank line before each."""
    for path in FILES:
        if not path.name.startswith("train_"):
            continue
        source = path.read_text()
        (loop,) = [
            node
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.For) and ast.unparse(node.iter).startswith("islice(batches")
        ]
        text = "\n".join(source.splitlines()[loop.lineno - 1 : loop.end_lineno]) + "\n"
        text = re.sub(r"^ *# >>> .*?# <<< \w+\n", "", text, flags=re.S | re.M)
        assert len(text.splitlines()) <= 55, path.name
        sections = re.findall(r"^ *# (\d\. [^.:\n]+)", text, flags=re.M)
        expected = ["data and noise", "forward and backward", "optimiser step", "log", "save and preview"]
        assert sections == [f"{i}. {name}" for i, name in enumerate(expected, start=1)], path.name
        assert len(re.findall(r"\n\n *# \d\. ", text)) == 4, path.name
