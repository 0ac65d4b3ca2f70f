"""The benchmark: known delays appear in the right part of a step, passes are those that the network makes."""

import json
import time
from collections import Counter

import bench
import pytest
import torch

import dit
import extract_features
import train_sddit

GEMM = {"bf16": 1.0, "fp32": 0.5}
SMALL = "--model nano/2 --image-size 64 --precision fp32 --compile off --batch 2 --steps 3 --repeats 1"
TRAIN = f"train {SMALL} --flags=--workers=0 --scripts "


@pytest.fixture
def rows_of(tmp_path, monkeypatch):
    """Runs a command of the benchmark, without its matrix products, and returns its rows."""
    monkeypatch.setattr(bench, "gemm_rates", lambda: GEMM)

    def run(command):
        bench.main([*command.split(), "--json", str(tmp_path / "rows.json")])
        return json.loads((tmp_path / "rows.json").read_text())["rows"]

    return run


def before(monkeypatch, owner, name, action):
    """From now on the function calls action(its first argument) first."""
    function = getattr(owner, name)

    def changed(*args, **kwargs):
        action(args[0])
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, changed)


def test_train(rows_of, monkeypatch):
    delays = {
        "data": (extract_features.CachedFeatures, "__getitems__", 20),
        "forward": (torch.nn.functional, "mse_loss", 40),
        "backward": (torch.Tensor, "backward", 60),
        "update": (torch.optim.AdamW, "step", 80),
    }
    for owner, name, ms in delays.values():
        before(monkeypatch, owner, name, lambda _, ms=ms: time.sleep(ms / 1e3))
    (row,) = rows_of(TRAIN + "repa")
    assert row["bench"] == "train" and row["script"] == "repa" and row["compile"] == "off"
    for part, (_, _, ms) in delays.items():
        assert row[part] > 0.95 * ms, part
    assert sum(row[part] for part in delays) == pytest.approx(row["ms"], rel=0.2)
    assert row["low"] <= row["img_per_s"] <= row["high"] and 0 < row["img_per_s"] <= 2 / 0.2
    # 6 FLOPs per parameter of a block's matrices and token, at least: 6 blocks of 12 D^2, 16 tokens
    assert row["tflops"] > row["img_per_s"] * 6 * 6 * 12 * 128**2 * 16 / 1e12
    assert row["of_gemm"] == pytest.approx(row["tflops"] / GEMM["fp32"])


def test_teacher_is_part_of_the_update(rows_of, monkeypatch):
    before(monkeypatch, train_sddit.Objective, "after_step", lambda _: time.sleep(0.1))
    (row,) = rows_of(TRAIN + "sddit")
    assert row["update"] > 95


def test_sample(rows_of, monkeypatch):
    images = Counter()

    build = dit.build
    monkeypatch.setattr(dit, "build", lambda config: hooked(build(config)))

    def hooked(model):
        def count(_, inputs):
            images[type(model)] += len(inputs[0])

        model.x_embedder.register_forward_pre_hook(count)  # NoiseDiT is also called by another name
        return model

    rows = rows_of(f"sample {SMALL}")
    passes = {row["sampler"]: row["passes"] for row in rows}
    # 2 images, a call to warm up and a timed one; guidance doubles the passes, Heun's last step is Euler's
    assert passes == {"ode": 3, "sde": 6, "mean": 3, "ddpm": 3, "edm": 5}
    assert images == {dit.DiT: (3 + 6 + 3) * 2 * 2, dit.NoiseDiT: 3 * 2 * 2, dit.SDDiT: 5 * 2 * 2}
    for row in rows:
        assert row["ms_per_pass"] == pytest.approx(2e3 / row["img_per_s"] / row["passes"])


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA H200", True),
        ("NVIDIA H100 PCIe", False),
        ("NVIDIA H100 NVL", False),
        ("NVIDIA H200 NVL", False),
        ("NVIDIA A100-SXM4-80GB", False),
        ("CPU, 1 threads", False),
    ],
)
def test_peak_is_that_of_the_sxm_cards(name, known):
    assert bench.has_peak(name) == known


def test_xl_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(bench, "CUDA", False)
    with pytest.raises(SystemExit, match="--model.*XL/2"):
        bench.parse_args(["train", "--model", "XL/2"])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train --model S", ["--model", "'S'", "nano/2"]),
        ("train --json nowhere/rows.json", ["--json", "nowhere"]),
        ("train --batch 0", ["--batch", "0"]),
        (TRAIN.replace("--workers=0", "--learning-rate=1") + "repa", ["note"]),
    ],
)
def test_bad_input(command, words, monkeypatch, capsys):
    monkeypatch.setattr(bench, "gemm_rates", lambda: GEMM)
    with pytest.raises(SystemExit) as refusal:
        bench.main(command.split())
    line = str(refusal.value)
    assert "\n" not in line and all(word in line for word in words), line
    if words == ["note"]:
        assert "--learning-rate" in capsys.readouterr().out
