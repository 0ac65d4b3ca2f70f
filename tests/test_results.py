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
RESULTS = json.loads((PAGES / "digits.json").read_text())
README = (ROOT / "README.md").read_text()
PENDING = {"logit-normal", "irepa", "dit", "dit-repa", "meanflow", "meanflow-model", "meanflow-div"}


def test_figures_are_complete():
    found = {(result["row"], result["seed"]) for result in RESULTS}
    assert found == {(row, seed) for row in digits.ROWS.keys() - PENDING for seed in digits.SEEDS}
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


def test_the_table_of_one_seed_holds_the_packed_runs():
    page = (PAGES / "digits.md").read_text()
    results = digits.packed_results()
    if results:
        assert digits.first_seed(results) in page and digits.one_seed_evaluations(results) in page


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


def test_runs_are_packed_and_unpacked(tmp_path, monkeypatch, capsys):
    """Figures and logs of all runs, ten samples of the runs with the first seed; a second pack adds to it."""
    monkeypatch.setattr(digits, "RUNS", tmp_path / "runs.zip")
    monkeypatch.setattr(digits, "HERE", tmp_path)
    page = "before\n<!-- first seed -->\nold\n<!-- end of first seed -->\nafter\n"
    (tmp_path / "digits.md").write_text(page)
    for folder, name in (("a", "repa-2"), ("a", "repa-3"), ("b", "plain-2")):
        run = tmp_path / folder / name
        run.mkdir(parents=True)
        points = [{"step": step, "accuracy": 0.25, "fd": 1.5} for step in digits.STEPS]
        result = {"row": name.split("-")[0], "seed": int(name[-1]), "points": points}
        (run / "result.json").write_text(json.dumps(result))
        (run / "log.jsonl").write_text("log")
        np.savez(run / "samples-1000.npz", arr_0=np.arange(20), arr_1=np.arange(20))
    (tmp_path / "a" / "sddit-2").mkdir()  # not done
    for folder in ("a", "b"):
        digits.main(["--pack", "--out", str(tmp_path / folder)])
    assert "3 runs" in capsys.readouterr().out
    digits.unpack(tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"repa-2", "repa-3", "plain-2"}
    assert json.loads((tmp_path / "new" / "plain-2" / "result.json").read_text())["row"] == "plain"
    page = (tmp_path / "digits.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert page.count("25.0, 1.500") == 8, "two rows with the first seed, four steps"
    assert not (tmp_path / "new" / "repa-3" / "samples-1000.npz").exists()
    samples = np.load(tmp_path / "new" / "repa-2" / "samples-1000.npz")["arr_0"]
    assert samples.tolist() == list(range(10))


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
    monkeypatch.setattr(digits, "HERE", tmp_path)
    with pytest.raises(SystemExit, match="0 seeds"):
        digits.report(tmp_path)
    assert not list(tmp_path.iterdir())
