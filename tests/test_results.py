"""The committed figures of the digits: complete, the same in table, README and logs, and judged soundly."""

import importlib
import importlib.util
import json
import re
import subprocess
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, objective_for, randomize, train
from scipy.stats import ttest_rel

import extract_features

PAGES = ROOT / "tests" / "results"
SPEC = importlib.util.spec_from_file_location("digits", PAGES / "digits.py")
digits = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(digits)
RESULTS = digits.complete(digits.committed().values())
README = (ROOT / "README.md").read_text()


def test_figures_are_complete():
    found = {(result["row"], result["seed"]) for result in RESULTS}
    seeds = {seed for _, seed in found}
    assert len(seeds) >= 5 and len(found) == len(digits.ROWS) * len(seeds)
    for result in RESULTS:
        assert [point["step"] for point in result["points"]] == list(digits.STEPS)
        assert all(0 <= point[key] <= 1 for point in result["points"] for key in ("accuracy", "recall"))


def test_the_tables_hold_the_figures():
    assert digits.table(RESULTS) in (PAGES / "digits.md").read_text()
    commands = {row: command.replace(" --digits", "") for row, (_, _, command) in digits.ROWS.items()}
    shown = {}
    for row, command in commands.items():
        for line in re.findall(rf"^\| .*\| `{re.escape(command)}` \|.*$", README, re.M):
            assert row not in shown
            shown[row] = line
    assert len(shown) >= 5
    for row, line in shown.items():
        assert line.endswith(" | ".join(["", *digits.summary(RESULTS, row), ""]).rstrip()), row


def test_the_logs_hold_the_losses():
    with zipfile.ZipFile(PAGES / "digits-logs.zip") as logs:
        for result in RESULTS:
            log = logs.read(f"{result['row']}-{result['seed']}.jsonl").decode().splitlines()
            rows = {row["step"]: row for row in map(json.loads, log)}
            for point in result["points"]:
                row = rows[point["step"]]
                names = {"loss_fm", "loss_edm", "loss_noise"} & row.keys()
                assert [point["loss"]] == [row[name] for name in names]


def test_the_judge_finds_the_nearest_digit():
    rng = np.random.default_rng(0)
    real, images = (rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8) for n in (30, 7))
    labels = rng.integers(0, 10, 30)
    for image, found in zip(images, digits.nearest_class(images, real, labels), strict=True):
        distances = [((image.astype(int) - other.astype(int)) ** 2).sum() for other in real]
        assert found == labels[int(np.argmin(distances))]


def test_paired_differences():
    ours, theirs = np.random.default_rng(1).normal(size=(2, 5))
    interval = ttest_rel(ours, theirs).confidence_interval(0.95)
    mean, half = digits.paired(ours, theirs)
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_the_readme_shows_the_diff():
    command = ["diff", "-u", "train_repa.py", "train_sddit.py"]
    diff = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    (shown,) = re.findall(r"(?:^    \+ .*\n)+", README, re.M)
    shown = re.sub("^    ", "", shown, flags=re.M)
    assert shown.count("\n") == 4 and shown in diff


def test_a_row_runs_and_is_resumed(tmp_path, monkeypatch):
    """Two steps of three rows, judged: the figures are there, and a second start trains nothing."""
    flags = "--digits --steps 2 --batch-size 16 --log-every 1 --lr 0.02"
    monkeypatch.setattr(digits, "STEPS", (1, 2))
    monkeypatch.setattr(digits, "SAMPLES", 20)
    monkeypatch.setattr(digits, "PROBE", "--epochs 1 --batch-size 256")
    rows = {"a": ("A", None, f"train_repa.py {flags} --repa-weight 0")}
    rows["b"] = "B", "a", f"train_repa.py {flags}"
    rows["c"] = "C", "a", f"train_meanflow.py {flags}"
    monkeypatch.setattr(digits, "ROWS", rows)
    extract_features.extract_digits(tmp_path / "digits", rank=0, world=1, device="cpu")
    results = []
    for row in rows:
        folder = tmp_path / f"{row}-0"
        digits.run((row, 0, folder))
        before = (folder / "last.pt").stat().st_mtime_ns
        digits.run((row, 0, folder))
        assert (folder / "last.pt").stat().st_mtime_ns == before
        results.append(json.loads((folder / "result.json").read_text()))
    assert [point["step"] for point in results[0]["points"]] == [1, 2]
    assert results[0]["points"][1]["fd"] > results[0]["floor"] > 0
    assert results[0]["points"] != results[1]["points"]
    assert "evaluations" not in results[0] and results[2]["evaluations"].keys() == {"1", *digits.MORE}
    assert results[2]["evaluations"]["1"] == results[2]["points"][1]["fd"]
    assert len(set(results[2]["evaluations"].values())) == 5
    text = digits.table([*results, *(result | {"seed": 1} for result in results)])
    assert "B - A" in text and text.count("| A |") == 4 and text.count("| C |") == 5
    probed = json.loads((tmp_path / "a-0" / "probe.json").read_text())["test"]
    assert len(probed) == 6 and f"| A | {100 * probed[0]:.1f} ± 0.0 | {100 * probed[1]:.1f} ± 0.0 |" in text
    digits.draw_samples(tmp_path, 0, tmp_path / "samples.png")
    assert (tmp_path / "samples.png").stat().st_size > 1000


def test_a_report_adds_to_what_is_committed(tmp_path, monkeypatch):
    """The figures and logs of new runs join the old ones; the tables show the seeds that are complete."""
    rows = {"a": ("A", None, "train_repa.py"), "b": ("B", "a", "train_dit.py")}
    monkeypatch.setattr(digits, "ROWS", rows)
    monkeypatch.setattr(digits, "HERE", tmp_path)
    monkeypatch.setattr(digits, "RESULTS", tmp_path / "digits.json")
    monkeypatch.setattr(digits, "LOGS", tmp_path / "logs.zip")
    monkeypatch.setattr(digits, "draw_curves", lambda results, path: path.write_text(str(len(results))))
    keys = ("accuracy", "fd", "mind", "precision", "recall", "loss", "seconds_per_step")
    points = [{"step": step} | dict.fromkeys(keys, 0.25) for step in digits.STEPS]

    def result(row, seed):
        return {"row": row, "seed": seed, "floor": 0.1, "points": points, "probe": [0.5] * 6}

    digits.RESULTS.write_text(json.dumps([result("a", 2), result("b", 2), result("a", 3)]))
    with zipfile.ZipFile(digits.LOGS, "w") as archive:
        archive.writestr("a-2.jsonl", "old")
    (tmp_path / "digits.md").write_text("before\n<!-- tables -->\nold\n<!-- end of tables -->\nafter\n")
    for row, seed in (("b", 3), ("a", 4)):
        run = tmp_path / "runs" / f"{row}-{seed}"
        run.mkdir(parents=True)
        (run / "result.json").write_text(json.dumps(result(row, seed)))
        (run / "log.jsonl").write_text("new")
    digits.report(tmp_path / "runs")
    assert sorted(digits.committed()) == [("a", 2), ("a", 3), ("a", 4), ("b", 2), ("b", 3)]
    assert {result["seed"] for result in digits.complete(digits.committed().values())} == {2, 3}
    with zipfile.ZipFile(digits.LOGS) as archive:
        assert {name: archive.read(name).decode() for name in archive.namelist()} == {
            "a-2.jsonl": "old",
            "a-4.jsonl": "new",
            "b-3.jsonl": "new",
        }
    page = (tmp_path / "digits.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "Seeds 2, 3. " in page
    assert (tmp_path / "digits-curves.png").read_text() == "4"


def test_irepa_is_a_fork(cache, tmp_path, monkeypatch):
    """The diff of fork-irepa.md makes train_irepa.py: a convolution, targets normalised over the patches."""
    digits.write_irepa(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    irepa = importlib.import_module("train_irepa")

    objective = randomize(objective_for(irepa, cache, "--repa-depth", 2))
    (h,) = objective.alignment.projectors
    tokens, targets = torch.randn(2, 16, 128), torch.randn(2, 16, 82)
    weight, bias = h.weight.detach(), h.bias.detach()
    total = 0
    for n in range(2):
        shared, spread = targets[n].mean(0), targets[n].std(0)
        for row in range(4):
            for column in range(4):
                projected = bias.clone()
                for i in (-1, 0, 1):
                    for j in (-1, 0, 1):
                        if 0 <= row + i < 4 and 0 <= column + j < 4:
                            neighbour = tokens[n, 4 * (row + i) + column + j]
                            projected += weight[:, :, i + 1, j + 1] @ neighbour
                z = (targets[n, 4 * row + column] - 0.6 * shared) / spread
                total -= torch.cosine_similarity(projected, z, dim=0).item()
    found = objective.alignment([tokens], targets)
    assert found.item() == pytest.approx(total / 32, abs=1e-5)
    train(cache, tmp_path / "run", "--steps", 1, script=irepa)


def test_a_report_needs_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "RESULTS", tmp_path / "digits.json")
    monkeypatch.setattr(digits, "HERE", tmp_path)
    digits.RESULTS.write_text("[]")
    with pytest.raises(SystemExit, match="0 seeds"):
        digits.report(tmp_path)
    assert digits.RESULTS.read_text() == "[]"
