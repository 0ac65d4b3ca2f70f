"""The layout, and the promise of the training scripts: outside the fences they are the same text."""

import ast
import difflib
import re
import shutil
import subprocess

import pytest
import torch
from conftest import METHODS, ROOT, SCRIPTS, train

import train_diversedit
import train_repa

PATHS = sorted(ROOT.glob("train_*.py"))
LAYOUT = "LICENSE README.md requirements.txt tests dit.py files.py extract_features.py sample.py fid.py"


def split(path):
    """The shared and the fenced lines of a script, without blank lines; the docstring belongs to neither."""
    name = path.stem.removeprefix("train_")
    source = path.read_text()
    end_of_docstring = ast.parse(source).body[0].end_lineno
    shared, fenced, inside = [], [], False
    for line in source.splitlines()[end_of_docstring:]:
        fence = re.fullmatch(r" *# (>>>|<<<) (\w+)", line)
        if fence:
            assert fence[2] == name, f"{path.name}: a fence is named {fence[2]}"
            assert (fence[1] == "<<<") == inside, f"{path.name}: unbalanced fences at {line.strip()!r}"
            inside = not inside
        elif line.strip():
            (fenced if inside else shared).append(line)
    assert not inside, f"{path.name}: the last fence is open"
    return shared, fenced


def test_every_script_is_known_to_the_tests():
    found = {path.stem for path in PATHS}
    assert found == {f"train_{name}" for name in METHODS}, "add your method to METHODS in conftest.py"


@pytest.mark.parametrize("path", PATHS[1:], ids=lambda path: path.name)
def test_shared_text_is_the_same(path):
    reference, other = split(PATHS[0])[0], split(path)[0]
    diff = "\n".join(difflib.unified_diff(reference, other, PATHS[0].name, path.name, lineterm="", n=1))
    assert not diff, f"outside the fences the scripts differ:\n{diff}"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_imports_of_the_method_are_one_block_below_the_shared_ones(path):
    statements = ast.parse(path.read_text()).body[1:]
    imports = [node for node in statements if isinstance(node, ast.Import | ast.ImportFrom)]
    assert statements[: len(imports)] == imports, f"{path.name}: an import below other code"
    lines, inside, fenced = path.read_text().splitlines(), False, []
    for number, line in enumerate(lines[: imports[-1].end_lineno], start=1):
        inside = ">>>" in line if re.match("# (>>>|<<<) ", line) else inside
        fenced += [node for node in imports if inside and node.lineno == number]
    assert imports[len(imports) - len(fenced) :] == fenced, f"{path.name}: shared imports come first"
    everywhere = [node for statement in statements for node in ast.walk(statement)]
    everywhere = [node for node in everywhere if isinstance(node, ast.Import | ast.ImportFrom)]
    assert everywhere == imports, f"{path.name}: an import inside a function"


def test_layout():
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {name.split("/")[0] for name in tracked.splitlines() if not name.startswith(".")}
    assert {name for name in top if not name.startswith("train_")} <= set(LAYOUT.split())


def test_imports_run_one_way():
    ours = {path.stem for path in ROOT.glob("*.py")}
    allowed = {
        "dit": set(),
        "fid": set(),
        "files": {"dit"},
        "extract_features": {"files"},
        "sample": {"dit", "files", "extract_features"},
    }
    losses = {"train_meanflow": ["train_diversedit"]}  # the scripts whose loss a script also uses
    known = [ROOT / f"{name}.py" for name in allowed] + sorted(ROOT.glob("train_*.py"))
    for path in known:  # a user may keep other files beside them
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
        expected = allowed.get(path.stem)
        if path.stem.startswith("train_"):
            expected = {"dit", "files", "extract_features", "sample", *losses.get(path.stem, ["train_repa"])}
            expected -= {path.stem}
        assert imported & ours <= expected, path.name


INPUTS = ("x", "y", "uniform", "eps", "drop")


def recorded(script, cache, out, *options):
    """Every input of the loss that all methods have, and the loss, by micro-batches of 8."""
    seen, forward = [], script.Objective.forward

    def spy(self, **inputs):
        losses = forward(self, **inputs)
        seen.append({name: inputs[name].clone() for name in INPUTS} | {"loss": losses["loss"].detach()})
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.Objective, "forward", spy)
        train(cache, out, "--steps", 4, *options, script=script)
    return seen


def test_methods_see_the_same_run(cache, tmp_path, tiny_nano):
    """All see the same x, t, eps, y and labels dropped; with the method off, two make the same losses."""
    micro = ["--micro-batch", 8]
    repa = recorded(train_repa, cache, tmp_path / "a", *micro, "--repa-weight", 0)
    flags = [*micro, "--div-terms", "--no-long-residuals"]
    diverse = recorded(train_diversedit, cache, tmp_path / "b", *flags)
    assert len(repa) == 8 and [step["loss"] for step in repa] == [step["loss"] for step in diverse]
    for method, script in SCRIPTS.items():
        other = recorded(script, cache, tmp_path / method, *micro)
        for ours, theirs in zip(repa, other, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in INPUTS), method
        assert repa[-1]["loss"] != other[-1]["loss"]
    assert any(step["drop"].any() for step in repa)

    # micro-batches are the rows of the whole batch
    whole = recorded(train_repa, cache, tmp_path / "e", "--repa-weight", 0)
    for step, batch in enumerate(whole):
        halves = repa[2 * step : 2 * step + 2]
        for name in INPUTS:
            assert torch.equal(torch.cat([half[name] for half in halves]), batch[name])
