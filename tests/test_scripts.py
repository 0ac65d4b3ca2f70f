"""The layout, and the promise of the training scripts: outside the fences of the method they are the same text."""

import ast
import difflib
import re
import shutil
import subprocess

import pytest
import torch
from conftest import ROOT

import train_diversedit
import train_repa

SCRIPTS = sorted(ROOT.glob("train_*.py"))
METHOD_LINES = {"repa": 80, "diversedit": 165, "sddit": 200}
LAYOUT = "LICENSE README.md requirements.txt tests dit.py extract_features.py sample.py fid.py"


def split(path):
    """The shared lines and the fenced lines of a script, both without blank lines; the docstring belongs to neither."""
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


@pytest.mark.parametrize("path", SCRIPTS[1:], ids=lambda path: path.name)
def test_shared_text_is_the_same(path):
    reference, other = split(SCRIPTS[0])[0], split(path)[0]
    diff = "\n".join(difflib.unified_diff(reference, other, SCRIPTS[0].name, path.name, lineterm="", n=1))
    assert not diff, f"outside the fences the scripts differ:\n{diff}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_fences(path):
    name = path.stem.removeprefix("train_")
    _, fenced = split(path)
    assert 30 < len(fenced) <= METHOD_LINES.get(name, 200), f"{len(fenced)} lines of the method"
    inside = False
    for line in path.read_text().splitlines():
        if re.fullmatch(r" *# (>>>|<<<) \w+", line):
            inside = ">>>" in line
        assert not (inside and re.match(r"(import|from) ", line)), f"{path.name}: module import in a fence: {line}"


def test_layout():
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {name.split("/")[0] for name in tracked.splitlines() if not name.startswith(".")}
    assert {name for name in top if not name.startswith("train_")} <= set(LAYOUT.split())


def test_imports_run_one_way():
    ours = {path.stem for path in ROOT.glob("*.py")}
    allowed = {"dit": set(), "extract_features": set(), "fid": set(), "sample": {"dit", "extract_features"}}
    for path in ROOT.glob("*.py"):
        tree = ast.walk(ast.parse(path.read_text()))
        imported = set()
        for node in tree:
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
        expected = allowed.get(path.stem, {"dit", "extract_features", "sample"})
        if path.stem == "train_diversedit":
            expected = expected | {"train_repa"}
        assert imported & ours <= expected, path.name


def recorded(script, cache, out, monkeypatch, *options):
    """Every input of the loss, step by step, and the baseline loss where there is one."""
    seen, forward = [], script.Objective.forward

    def spy(self, **inputs):
        losses = forward(self, **inputs)
        seen.append({name: inputs[name].clone() for name in ("x", "y", "t", "eps", "drop")})
        seen[-1]["loss"] = losses["loss"].detach()
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(script.Objective, "forward", spy)
        small = "--model nano/2 --steps 4 --batch-size 16 --micro-batch 8 --lr 1e-3 --sample-every 0 --workers 0"
        script.main(["--data", str(cache), "--out", str(out), *small.split(), *options])
    assert len(seen) == 8
    return seen


def test_methods_off_is_the_same_run(cache, tmp_path, monkeypatch):
    """With the methods off, the scripts see the same x, t, eps, y and labels dropped, and make the same losses."""
    repa = recorded(train_repa, cache, tmp_path / "a", monkeypatch, "--repa-weight", "0")
    diverse = recorded(train_diversedit, cache, tmp_path / "b", monkeypatch, "--div-terms", "--no-long-residuals")
    for ours, theirs in zip(repa, diverse, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    on = recorded(train_repa, cache, tmp_path / "c", monkeypatch)
    for ours, theirs in zip(repa, on, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ("x", "y", "t", "eps", "drop"))
    assert not torch.equal(repa[-1]["loss"], on[-1]["loss"])
