"""Every command of the README, the result pages and the docstrings parses; links exist; the fork works."""

import difflib
import importlib
import json
import re
import shlex

import pytest
from conftest import METHODS, ROOT, run

README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "tests" / "results").glob("*.md"))
TEXTS = [README, *(path.read_text() for path in PAGES)]
TEXTS += [path.read_text().split('"""')[1] for path in sorted(ROOT.glob("*.py"))]
JOINED = [re.sub(r"\\+\n *", " ", text) for text in TEXTS]
FOUND = [line for text in JOINED for line in re.findall(r"^    (?:python|torchrun) .*$", text, re.M)]
COMMANDS = sorted({line.strip() for line in FOUND})


@pytest.mark.parametrize("command", [command for command in COMMANDS if ".py" in command])
def test_commands_parse(command):
    words = shlex.split(re.sub(r" {3,}.*", "", command))                 # a remark stands after three spaces
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    if not (ROOT / words[script]).exists() or (words[script + 1 :] and "[" in command):
        pytest.skip("a synopsis")
    module = importlib.import_module(words[script].removesuffix(".py").replace("/", "."))
    module.parse_args(words[script + 1 :])


def test_there_are_commands():
    assert len(COMMANDS) > 20


def test_flags_of_the_tables_exist(capsys):
    """Two pages name flags of ours without their script: each is known to one of the programs."""
    for name in [*(f"train_{method}" for method in METHODS), "sample", "extract_features"]:
        with pytest.raises(SystemExit):
            importlib.import_module(name).parse_args(["--help"])
    known = set(re.findall(r"--[a-z][a-z0-9-]+", capsys.readouterr().out))
    papers = (ROOT / "tests" / "results" / "papers.md").read_text()
    table = (ROOT / "tests" / "results" / "repa-flags.md").read_text()
    ours = [line.split("|")[2].partition("(theirs")[0] for line in table.splitlines() if "|" in line]
    for text in (papers, " ".join(ours)):
        flags = set(re.findall(r"--[a-z][a-z0-9-]+", text))
        assert len(flags) > 20 and flags - known <= {"--nproc", "--batch"}  # --batch is of tests/bench.py


def test_size_of_the_readme():
    lines = README.splitlines()
    assert len(lines) <= 180 and max(map(len, lines)) <= 110


def test_links_exist():
    for text, folder in [(README, ROOT), *((path.read_text(), path.parent) for path in PAGES)]:
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("https://arxiv.org/") or (folder / target).exists(), target


def test_ci_runs_the_test_command():
    section = README.partition("## Tests")[2]
    command = re.search(r"^    (.+)$", section, re.M)[1]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_fork_trains(cache, tmp_path):
    """The diff of fork.md, applied to train_repa.py with its fences emptied and renamed, trains."""
    text = (ROOT / "train_repa.py").read_text()
    pattern = r"^( *# >>> )repa\n.*?^( *# <<< )repa\n"
    empty = re.sub(pattern, r"\1dispersive\n\2dispersive\n", text, flags=re.S | re.M)
    empty = empty.splitlines(keepends=True)
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "tests" / "results" / "fork.md").read_text(), re.S)[1]
    added, full = 0, list(empty)
    for hunk in re.split(r"^@@.*@@\n", diff, flags=re.M)[1:]:
        before = [line[1:] for line in hunk.splitlines(keepends=True) if line[0] != "+"]
        after = [line[1:] for line in hunk.splitlines(keepends=True)]
        places = [i for i in range(len(full)) if full[i : i + len(before)] == before]
        full[places[0] : places[0] + len(before)] = after
        added += len(after) - len(before)
    assert len(full) == len(empty) + added and f"A whole fork, {added} lines" in README
    assert not [line for line in difflib.ndiff(empty, full) if line.startswith("- ")], "nothing is removed"
    (tmp_path / "train_dispersive.py").write_text("".join(full))
    options = "--model nano/2 --steps 2 --batch-size 16 --log-every 1 --sample-every 0 --workers 0".split()
    command = [tmp_path / "train_dispersive.py", "--data", cache, "--out", tmp_path / "run", *options]
    run(*command, PYTHONPATH=str(ROOT))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["loss_disp"] < 0
    assert rows[0]["loss"] == pytest.approx(rows[0]["loss_fm"] + 0.5 * rows[0]["loss_disp"], rel=1e-5)
