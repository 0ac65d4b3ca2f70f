"""tests/gpu.py on a CPU: all of it runs, its sums are right, and no failure costs another figure."""

import json
import os
import re
import time
import warnings
from functools import partial

import gpu
import pytest
import torch
from conftest import ROOT, run

import train_repa

PAGE = (ROOT / "tests" / "results" / "gpu.md").read_text()


def names_of(size, work):
    sections = gpu.plan(size, work).values()
    return [name for measurements in sections for names, _ in measurements for name in names]


def test_smoke(tmp_path):
    run("tests/gpu.py", "--smoke", "--minutes", "60", "--out", tmp_path)
    report = json.loads((tmp_path / "gpu.json").read_text())
    values = {}
    for row in report["rows"]:
        assert "error" not in row, row
        values |= row["values"]
    assert list(values) == names_of(gpu.SMOKE, tmp_path)
    assert list(report["sections"]) == list(gpu.plan(gpu.SMOKE, tmp_path))
    assert all(re.fullmatch(r"\d+ s", state) for state in report["sections"].values())

    assert values["AdamW skips a step by found_inf"] is True
    for path in ROOT.glob("train_*.py"):
        script = path.stem.removeprefix("train_")
        assert values[f"{script}, digits: a resumed run differs by"] == 0
        assert values[f"{script}, digits: DDP with one process differs by"] == 0
        assert values[f"{script}: host syncs in a step"] == 0
        assert values[f"{script}, 2 images, eager: img/s"] > 0
    ms = values["ode, 2 images, eager: ms per pass"]
    hours = values["50,000 images, 250 steps, eager: hours"]
    assert hours == pytest.approx(ms / 1000 / 3600 * 250 * 50_000 / 2)
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) == len(values) + len(report["sections"])


def test_a_failure_costs_nothing_else(tmp_path, monkeypatch, capsys):
    """An error is a row that says why; a crash and a hang end their section alone."""

    def fail(error):
        raise error

    sections = {
        "errors": [
            (["a"], partial(fail, ValueError("no | luck"))),
            (["b"], partial(fail, SystemExit("refused"))),
            (["c", "d"], lambda: {"c": 1.5, "d": 2, "seen": 3}),
            (["e"], lambda: {"another": 1}),
        ],
        "crash": [(["f"], lambda: {"f": 1}), (["g"], lambda: os._exit(3)), (["h"], dict)],
        "hang": [(["i"], lambda: time.sleep(60))],
        "last": [(["j"], lambda: {"j": "fine"})],
    }
    monkeypatch.setattr(gpu, "plan", lambda size, work: sections)
    monkeypatch.setattr(gpu, "SECONDS", {"hang": 0.1})
    gpu.main(["--smoke", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "gpu.json").read_text())
    found = {}
    for row in report["rows"]:
        for name in row["names"]:
            found[name] = row.get("error") or row["values"][name]
    errors = {"a": "ValueError: no | luck", "b": "SystemExit: refused", "e": "KeyError: 'e'"}
    assert found == errors | {"c": 1.5, "d": 2, "f": 1, "j": "fine"}
    states = [re.sub(r"\d+ s", "n s", state) for state in report["sections"].values()]
    assert states == ["n s", "FAILED with exit code 3 after n s", "stopped after n s", "n s"]
    table = capsys.readouterr().out
    assert "| a |  |  | failed |  | ValueError: no / luck |" in table
    assert "| c |  |  | 1.5 |  | seen 3 |" in table and "| d |  |  | 2 |  |  |" in table


def test_all_sections_share_the_time(tmp_path, monkeypatch):
    sections = {name: [([name], lambda: time.sleep(60))] for name in ("a", "b", "c")}
    monkeypatch.setattr(gpu, "plan", lambda size, work: sections)
    start = time.monotonic()
    gpu.main(["--smoke", "--out", str(tmp_path), "--minutes", "0.02"])
    assert time.monotonic() - start < 10
    states = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert all(state.startswith("stopped") for state in states.values()) and len(states) == 3


def test_the_table_compares_with_the_right_card():
    name = "repa, 64 images, compiled: img/s"
    row = {"names": [name], "values": {name: 517.0}, "details": {}}
    assert gpu.measured(row, name, "NVIDIA H100 80GB HBM3")[:2] == ("517", "+25%")
    assert gpu.measured(row, name, "NVIDIA H200")[:2] == ("517", "+10%")
    assert gpu.measured(row, name, "NVIDIA A100-SXM4-80GB")[:2] == ("517", "")
    assert gpu.off(0, 0) == gpu.off(True, True) == "as predicted"
    assert gpu.off(1.5, 0) == gpu.off(False, True) == "OFF"
    assert gpu.predicted("another: host syncs in a step") == (0, 0)
    assert gpu.off(1e-6, gpu.predicted("another, digits: a resumed run differs by")[0]) == ""


def test_predictions_are_of_figures_that_are_measured(tmp_path):
    names = set(names_of(gpu.FULL, tmp_path))
    for name in gpu.PREDICTED:
        assert name.replace("SCRIPT", "repa") in names
    assert not list(tmp_path.iterdir()), "a plan does nothing"


def test_the_page_holds_the_predictions():
    assert gpu.prediction_table() in PAGE


def test_the_lines_of_host_syncs(tmp_path, monkeypatch):
    """What PyTorch warns of in a step is counted, under the line of Python it happens in."""
    update = train_repa.update_ema

    def waiting(*arguments):
        warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, "/there/loop.py", 17)
        update(*arguments)

    monkeypatch.setattr(train_repa, "update_ema", waiting)
    monkeypatch.setitem(gpu.dit.SIZES, "nano", (2, 32, 2))
    name = "repa: host syncs in a step"
    (measure,) = [call for names, call in gpu.host_syncs(gpu.SMOKE, tmp_path) if names == [name]]
    assert measure() == {name: 1, "loop.py:17": gpu.SMOKE.steps}


def test_one_process_takes_the_way_of_several(tmp_path, monkeypatch):
    wrapped = []
    parallel = train_repa.DistributedDataParallel

    def wrap(*arguments, **options):
        wrapped.append(parallel(*arguments, **options))
        return wrapped[-1]

    monkeypatch.setattr(train_repa, "DistributedDataParallel", wrap)
    monkeypatch.setitem(gpu.dit.SIZES, "nano", (2, 32, 2))
    name = "repa, digits: DDP with one process differs by"
    (measure,) = [call for names, call in gpu.sanity(gpu.SMOKE, tmp_path) if names == [name]]
    assert measure() == {name: 0} and len(wrapped) == 1


def test_largest_difference():
    a = {"x": torch.tensor([3.0, 4.0]), "y": {"z": torch.tensor([1, 2])}}
    b = {"x": torch.tensor([3.0, 4.5]), "y": {"z": torch.tensor([1, 2])}}
    assert gpu.largest_difference(a, a) == 0
    assert gpu.largest_difference(a, b) == pytest.approx(0.1)
    b["y"]["z"] = torch.tensor([1.0, float("nan")])
    assert gpu.largest_difference(a, b) == float("inf")


def test_refusals(monkeypatch):
    with pytest.raises(SystemExit, match="--only everything.*ceilings, sanity, train repa"):
        gpu.main(["--only", "everything"])
    with pytest.raises(SystemExit, match="needs a GPU"):
        gpu.main([])
