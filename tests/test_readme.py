"""Every command of the README and of the docstrings parses, every picture exists, and CI runs the test command."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
TEXTS = [README] + [path.read_text().split('"""')[1] for path in sorted(ROOT.glob("*.py"))]
JOINED = [re.sub(r"\\+\n *", " ", text) for text in TEXTS]
COMMANDS = sorted({line.strip() for text in JOINED for line in re.findall(r"^    (?:python|torchrun) .*$", text, re.M)})


@pytest.mark.parametrize("command", [command for command in COMMANDS if ".py" in command])
def test_commands_parse(command):
    words = shlex.split(re.sub(r" {3,}.*", "", command))                          # a remark stands after three spaces
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    if words[script + 1 :] and "[" in command:
        pytest.skip("a synopsis")
    module = importlib.import_module(words[script].removesuffix(".py"))
    module.parse_args(words[script + 1 :])


def test_there_are_commands():
    assert len(COMMANDS) > 12


def test_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://arxiv.org/") or (ROOT / target).exists(), target


def test_ci_runs_the_test_command():
    section = README.partition("## Tests")[2]
    command = re.search(r"^    (.+)$", section, re.M)[1]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()
