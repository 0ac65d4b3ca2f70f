"""The training scripts: REPA's loss against slow loops, and runs that resume and split exactly."""

import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ENVIRONMENT,
    ROOT,
    SCRIPTS,
    WITH_TINY_NANO,
    command_line,
    difference,
    extract,
    objective_for,
    randomize,
    refusal,
    rows,
    run,
    run_ranks,
    start,
    train,
)
from PIL import Image

import dit
import files
import sample
import train_diversedit
import train_repa
import train_sddit
from extract_features import CachedFeatures

each_script = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
pytestmark = pytest.mark.usefixtures("tiny_nano")


def inputs():
    """x, y, t, eps, drop and REPA's targets for four images of the small cache; image 1 loses its label."""
    torch.manual_seed(0)
    x, eps, targets = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.randn(4, 16, 82)
    y, t, drop = torch.tensor([0, 1, 2, 0]), torch.tensor([0.0, 0.3, 0.9, 1.0]), torch.arange(4) == 1
    return dict(x=x, y=y, uniform=t, eps=eps, drop=drop, targets=targets)


# --- the loss


def test_repa_loss_against_a_slow_loop():
    torch.manual_seed(0)
    projected = [torch.randn(3, 5, 7), torch.randn(3, 5, 4)]
    targets = [torch.randn(3, 5, 7).half(), torch.randint(-127, 128, (3, 5, 4), dtype=torch.int8)]
    total, terms = 0.0, 0
    for p, z in zip(projected, targets, strict=True):
        mean, count = 0.0, 0
        for n in range(3):
            for token in range(5):
                u, v = p[n, token].tolist(), z[n, token].tolist()
                mean -= sum(a * b for a, b in zip(u, v, strict=True)) / math.hypot(*u) / math.hypot(*v)
                count += 1
        total, terms = total + mean / count, terms + 1
    assert train_repa.repa_loss(projected, targets).item() == pytest.approx(total / terms, abs=1e-6)


def test_objective_is_the_equation(cache):
    """|v - (eps - x)|^2 + lambda L_repa at x_t = (1 - t) x + t eps, from the tokens of block d."""
    objective = randomize(objective_for(train_repa, cache, "--repa-weight", 0.3, "--repa-depth", 1))
    given = inputs()
    losses = objective(**given)
    x, eps, t = given["x"], given["eps"], given["uniform"]
    x_t = torch.stack([(1 - s) * a + s * b for a, b, s in zip(x, eps, t.tolist(), strict=True)])
    null = torch.tensor([0, 3, 2, 0])
    v, (tokens,) = objective.model(x_t, t, null, return_blocks=[1])
    expected = ((v - (eps - x)) ** 2).mean()
    assert losses["loss_fm"].item() == pytest.approx(expected.item(), rel=1e-5)
    aligned = train_repa.repa_loss([objective.alignment.projectors[0](tokens)], [given["targets"]])
    assert losses["loss_repa"].item() == pytest.approx(aligned.item(), rel=1e-4)
    assert losses["loss"].item() == pytest.approx((expected + 0.3 * aligned).item(), rel=1e-4)


def test_aligned_blocks_have_projectors_of_their_own(cache):
    """--repa-depth 2 1: the mean over the blocks, in this order, each through its own projector."""
    objective = randomize(objective_for(train_repa, cache, "--repa-depth", 2, 1))
    given = inputs()
    t = given["uniform"].view(-1, 1, 1, 1)
    x_t = (1 - t) * given["x"] + t * given["eps"]
    _, tokens = objective.model(x_t, given["uniform"], given["y"], drop=given["drop"], return_blocks=[1, 2])
    first, second = objective.alignment.projectors
    one = train_repa.repa_loss([first(tokens[1])], [given["targets"]])
    other = train_repa.repa_loss([second(tokens[0])], [given["targets"]])
    assert objective(**given)["loss_repa"].item() == pytest.approx((one + other).item() / 2, rel=1e-5)
    both = objective_for(train_diversedit, cache, "--repa-weight", 0.5, "--repa-depth", 2, 1)
    assert len(both.alignment.projectors) == 2 and both.aligned_blocks == [2, 1]


@pytest.mark.parametrize("script", [train_repa, train_diversedit])
def test_logit_normal_times_reach_the_model(cache, script):
    objective = objective_for(script, cache, "--time-normal", -0.4, 1.3)
    seen = []
    objective.model.t_embedder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    given = inputs() | {"uniform": torch.tensor([0.1, 0.3, 0.5, 0.9])}
    extra = {"chosen": torch.tensor([1, 2])} if script is train_diversedit else {}
    objective(**given, **extra)
    logits = [-0.4 + 1.3 * statistics.NormalDist().inv_cdf(u) for u in given["uniform"].tolist()]
    expected = [1 / (1 + math.exp(-x)) for x in logits]
    assert seen[0].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("probability", [0, 0.5])
def test_label_drop(cache, tmp_path, probability):
    """The share of null labels in the batches; with 0 there is no null class, and no guidance."""
    flags = ["--data", cache, "--model", "nano/2", "--batch-size", 16, "--label-drop", probability]
    args = train_repa.parse_args([str(flag) for flag in flags])
    args.out = str(tmp_path / "run")
    _, config, _, _ = train_repa.prepare(args, 1)
    model = dit.build(config)
    assert model.y_embedder.dropout_prob == probability
    assert len(model.y_embedder.embedding_table.weight) == model.num_classes + (probability > 0)
    args.batch_size = 2000
    drop = train_repa.draw_noise(args, model, slice(None), 0, "cpu")["drop"]
    assert drop.float().mean().item() == pytest.approx(probability, abs=0.05)


def test_first_loss_is_the_mean_square_of_the_target(cache):
    """The output is zero at initialisation, and the alignment reaches blocks 1 to d only."""
    objective, given = objective_for(train_repa, cache, "--repa-depth", 1), inputs()
    losses = objective(**given)
    expected = ((given["eps"] - given["x"]) ** 2).mean().item()
    assert losses["loss_fm"].item() == pytest.approx(expected, rel=1e-6)
    losses["loss_repa"].backward()
    touched = [any(p.grad is not None for p in block.parameters()) for block in objective.model.blocks]
    assert touched == [True, False] and all(p.grad is not None for p in objective.alignment.parameters())


def test_projector_sizes():
    """Parameter counts of REPA's three-layer projector (D -> 2048 -> 2048 -> z)."""
    for width, target, count in ((384, 768, 6_558_464), (1152, 768, 8_131_328), (1152, 1536, 9_704_960)):
        with torch.device("meta"):
            head = train_repa.projector(width, target, 2048)
        assert sum(p.numel() for p in head.parameters()) == count


def test_flow_times_are_shifted(cache):
    """With --time-shift 2, the loss at uniform u is the plain loss at 2 u / (1 + u)."""
    plain = randomize(objective_for(train_repa, cache, "--repa-weight", 0), std=0.3)
    shifted = objective_for(train_repa, cache, "--repa-weight", 0, "--time-shift", 2)
    shifted.load_state_dict(plain.state_dict())
    given = inputs()
    u = given.pop("uniform")
    expected = plain(uniform=2 * u / (1 + u), **given)["loss"].item()
    assert shifted(uniform=u, **given)["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert plain(uniform=u, **given)["loss"].item() != pytest.approx(expected, rel=1e-3)


# --- CKNNA


def slow_cknna(f, g, k):
    """Align(K, L) / sqrt(Align(K, K) Align(L, L)) from the definition in arXiv 2405.07987, a pair at a time.

    Align(K, L) = sum over i, j of alpha(i, j) (<f_i, f_j> - E_l <f_i, f_l>) (<g_i, g_j> - E_l <g_i, g_l>),
    alpha(i, j) = 1 if j is not i and among the k nearest of i in both, of features of length 1.
    """
    f, g = ([[v / math.hypot(*row) for v in row] for row in features.tolist()] for features in (f, g))
    n = len(f)

    def product(features, i, j):
        return sum(a * b for a, b in zip(features[i], features[j], strict=True))

    def nearest(features, i):
        others = sorted(set(range(n)) - {i}, key=lambda j: -product(features, i, j))
        return set(others[:k])

    def centred(features, i, j):
        return product(features, i, j) - sum(product(features, i, m) for m in range(n)) / n

    def align(a, b):
        total = 0.0
        for i in range(n):
            for j in nearest(a, i) & nearest(b, i):
                total += centred(a, i, j) * centred(b, i, j)
        return total

    return align(f, g) / math.sqrt(align(f, f) * align(g, g))


def test_cknna_against_a_slow_loop():
    torch.manual_seed(0)
    f = torch.randn(20, 4)
    g = torch.cat([f[:, :2], torch.randn(20, 3)], dim=1) + 0.3
    expected = slow_cknna(f, g, 5)
    assert 0.2 < expected < 0.9
    assert train_repa.cknna(f, g, k=5) == pytest.approx(expected, rel=1e-6)
    assert train_repa.cknna(f, g, k=3) == pytest.approx(slow_cknna(f, g, 3), rel=1e-6)


def test_cknna_of_identical_and_independent_features():
    torch.manual_seed(0)
    f = torch.randn(500, 8)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8))
    assert train_repa.cknna(f, 7 * f @ rotation) == pytest.approx(1, abs=1e-6)
    assert abs(train_repa.cknna(f, torch.randn(500, 8))) < 0.05


# --- data order and noise


def test_ranks_take_their_rows_of_the_same_global_batches():
    def batches(world, steps, start=0):
        share = 12 // world
        slices = [slice(rank * share, (rank + 1) * share) for rank in range(world)]
        ranks = [train_repa.data_order(50, 2, 12, rows, 3, start) for rows in slices]
        return [np.concatenate([next(rank) for rank in ranks]).tolist() for _ in range(steps)]

    whole = batches(1, 9)
    assert batches(2, 9) == batches(3, 9) == batches(12, 9) == whole
    assert batches(1, 4, start=5) == batches(4, 4, start=5) == whole[5:]
    epoch = [i // 2 for step in whole[:4] for i in step]
    assert len(set(epoch)) == 48, "an epoch shows every image at most once"
    assert epoch != [i // 2 for step in whole[4:8] for i in step]
    assert {i % 2 for i in whole[0]} == {0, 1}, "both views are drawn"


# --- runs


def test_run_and_resume(cache, tmp_path):
    """Stopped after three steps and continued by the same command: every bit as if it had not stopped."""
    pictures = ["--sample-every", 16]
    whole = train(cache, tmp_path / "whole", *pictures)
    train(cache, tmp_path / "cut", *pictures, "--steps", 3)
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:  # rows after the last save, one cut by a kill
        file.write(json.dumps({"step": 5}) + '\n{"step": 6, "lo')
    cut = train(cache, tmp_path / "cut", *pictures)
    assert difference(whole, cut) == 0
    clocks = ("img_per_s", "tflops", "memory_gb")
    timeless, resumed = (
        [{key: value for key, value in row.items() if key not in clocks} for row in rows(tmp_path / name)]
        for name in ("whole", "cut")
    )
    assert resumed[2].pop("cknna") and resumed == [timeless[0], timeless[1], resumed[2], *timeless[3:]]
    assert [row["step"] for row in timeless] == [1, 2, 3, 4, 5, 6]
    assert all(row["skipped"] == 0 and row["grad_norm"] > 0 for row in timeless)
    # pictures after 1/16, 1/8 and 1/4 of --sample-every, and at the end
    pictures = sorted(path.name for path in (tmp_path / "whole").glob("*.png"))
    assert pictures == [f"samples-000000{step}.png" for step in (1, 2, 4, 6)]
    assert Image.open(tmp_path / "whole" / pictures[-1]).size == (3 * 52 - 4, 4 * 52 - 4)
    starts = json.loads((tmp_path / "cut" / "run.json").read_text())
    assert [start["step"] for start in starts] == [0, 3]
    assert starts[0]["torch"] == torch.__version__ and starts[0]["args"]["lr"] == 1e-3
    # the checkpoint is enough to build and fill the model
    dit.build(whole["config"]).load_state_dict(whole["ema"])


def test_cknna_is_logged_with_pictures(cache, tmp_path):
    """Of every block, at two times, in the rows of pictures; not without targets."""
    train(cache, tmp_path / "run", "--sample-every", 4, "--steps", 5)
    values = [row.get("cknna") for row in rows(tmp_path / "run")]
    assert [value is not None for value in values] == [True, True, False, True, True]
    for value in filter(None, values):
        assert value.keys() == {"0.25", "0.5"}
        assert all(len(blocks) == 2 and all(0 < one < 1 for one in blocks) for blocks in value.values())
    train(cache, tmp_path / "plain", "--sample-every", 4, "--steps", 1, "--repa-weight", 0)
    assert "cknna" not in rows(tmp_path / "plain")[0]


def test_ema_is_the_recursion(cache, tmp_path):
    """ema <- 0.9 ema + 0.1 weights after every step, from the initial weights."""
    initial = objective_for(train_repa, cache).model.state_dict()
    train(cache, tmp_path / "run", "--keep-every", 1)
    for name in ("blocks.1.mlp.fc1.weight", "final_layer.linear.bias", "pos_embed"):
        expected = initial[name].double()
        for step in range(1, 7):
            kept = torch.load(tmp_path / "run" / f"{step:07d}.pt", weights_only=True)
            expected = 0.9 * expected + 0.1 * kept["model"][name]
        torch.testing.assert_close(kept["ema"][name].double(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("script", [train_repa, train_sddit], ids=lambda script: script.__name__)
def test_one_process_is_two_ranks_is_accumulation(cache, tmp_path, processes, script):
    """Weights, averages, heads (teacher and centres too) and optimiser; both at once with two ranks."""
    one = train(cache, tmp_path / "one", script=script)
    accumulated = train(cache, tmp_path / "accumulated", "--micro-batch", 4, script=script)
    run_ranks(processes, start, script.__name__, cache, tmp_path / "two", "--micro-batch", 4)
    two = torch.load(tmp_path / "two" / "last.pt", weights_only=True)
    assert difference(one, accumulated) < 1e-5 and difference(one, two) < 1e-5
    logs = (rows(tmp_path / name) for name in ("one", "accumulated", "two"))
    for a, b, c in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) == pytest.approx(c["loss"], abs=1e-5)
    assert script is train_repa or one["heads"]["centers"].abs().max() > 1e-3


def test_loss_falls(cache, tmp_path):
    train(cache, tmp_path / "run", "--steps", 60)
    losses = [row["loss_fm"] for row in rows(tmp_path / "run")]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:3])
    aligned = [row["loss_repa"] for row in rows(tmp_path / "run")]
    assert aligned[-1] < aligned[0] - 0.2


def test_baseline_needs_no_targets(small_npz, cache, tmp_path, monkeypatch):
    """--repa-weight 0 on a cache without targets: no projector, and the same run as on a cache with them."""
    extract(small_npz, tmp_path / "bare", "--encoder", "none", "--flip")
    monkeypatch.setattr(train_repa, "repa_loss", None)
    with_targets = train(cache, tmp_path / "a", "--repa-weight", 0)
    without = train(tmp_path / "bare", tmp_path / "b", "--repa-weight", 0)
    assert difference(with_targets, without) == 0 and without["heads"] == {}
    assert "loss_repa" not in rows(tmp_path / "b")[0]


def poison(monkeypatch, steps):
    """Make the losses of these steps, counted from 1, not a number."""
    forward, calls = train_repa.Objective.forward, []

    def poisoned(self, **inputs):
        calls.append(None)
        losses = forward(self, **inputs)
        bad = math.nan if len(calls) in steps else 1.0
        return {name: value * bad for name, value in losses.items()}

    monkeypatch.setattr(train_repa.Objective, "forward", poisoned)


def test_non_finite_step_is_skipped_and_counted(cache, tmp_path, monkeypatch):
    poison(monkeypatch, {2})
    checkpoint = train(cache, tmp_path / "run", "--log-every", 3)
    logged = rows(tmp_path / "run")
    assert [row["skipped"] for row in logged] == [1, 0]
    assert all(math.isfinite(value) for row in logged for value in row.values())
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    assert checkpoint["opt"]["state"][0]["step"] == 5, "AdamW made five of the six steps"


def test_a_hundred_skipped_steps_in_a_row_stop_the_run(cache, tmp_path, monkeypatch):
    poison(monkeypatch, {*range(3, 99), *range(101, 300)})
    options = ["--steps", 400, "--log-every", 100, "--save-every", 99, "--repa-weight", 0]
    with pytest.raises(SystemExit, match=r"step 200: .* 100 steps.*loss_fm nan.*--lr"):
        train(cache, tmp_path / "run", *options)
    kept = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert kept["step"] == 198 and all(value.isfinite().all() for value in kept["model"].values())


def test_a_run_goes_on_with_the_flags_that_its_message_names(cache, tmp_path, monkeypatch, capsys):
    """--lr, --clip and --precision may change on resume; a line says so."""
    with monkeypatch.context() as patch:
        poison(patch, {*range(4, 200)})
        with pytest.raises(SystemExit, match=r"last 3 steps.*--lr.*--precision fp32"):
            train(cache, tmp_path / "run")  # of 6 steps
    row = rows(tmp_path / "run")[-1]
    assert row["step"] == 6 and row["loss_fm"] is None and row["skipped"] == 1
    capsys.readouterr()
    again = train(cache, tmp_path / "run", "--steps", 8, "--lr", 1e-4, "--clip", 0.5)
    printed = capsys.readouterr().out
    assert "--lr changes from 0.001 to 0.0001 at step 6" in printed and "--clip" in printed
    assert again["step"] == 8 and rows(tmp_path / "run")[-1]["loss_fm"] > 0


def test_init_loads_what_fits(cache, tmp_path, capsys):
    first = train(cache, tmp_path / "first")
    first["config"]["num_classes"] = 7
    first["data"]["classes"] = [*"abcdefg"]
    for part in ("model", "ema"):
        first[part]["y_embedder.embedding_table.weight"] = torch.zeros(8, 32)
    torch.save(first, tmp_path / "source.pt")
    second = train(cache, tmp_path / "second", "--init", tmp_path / "source.pt", "--steps", 1, "--lr", 0)
    message = capsys.readouterr().out
    assert "resized: none; new: y_embedder; unused: y_embedder; time shift 1" in message
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(second["model"][name], first["ema"][name])
    assert second["model"]["y_embedder.embedding_table.weight"].shape == (4, 32) and second["step"] == 1


def test_bf16_changes_little(cache, tmp_path):
    """bf16 changes the numbers a little, and neither the fp32 weights nor the keys."""
    fp32 = train(cache, tmp_path / "fp32", "--steps", 2)
    bf16 = train(cache, tmp_path / "bf16", "--steps", 2, "--precision", "bf16")
    assert 0 < difference(fp32, bf16) < 0.1
    assert all(value.dtype == torch.float32 for value in bf16["model"].values())


def first_gradient(checkpoint, beta1=0.9):
    """All gradients of a run's only step, from AdamW's first moment m = (1 - beta1) g."""
    states = checkpoint["opt"]["state"].values()
    return torch.cat([state["exp_avg"].flatten() for state in states]) / (1 - beta1)


@pytest.mark.parametrize("clip", [0, 0.01, 100])
def test_clip(cache, tmp_path, clip):
    """The optimiser sees a gradient of norm `clip` at most, with 0 the whole; the log has the norm before."""
    flags = ["--steps", 1, "--repa-weight", 50, "--clip", clip]
    gradient = first_gradient(train(cache, tmp_path / "run", *flags))
    logged = rows(tmp_path / "run")[0]["grad_norm"]
    assert 2 < logged < 100
    assert gradient.norm().item() == pytest.approx(clip if clip == 0.01 else logged, rel=1e-3)


def test_beta2(cache, tmp_path):
    """AdamW's second moment after a step is (1 - beta2) g^2."""
    checkpoint = train(cache, tmp_path / "run", "--steps", 1, "--beta2", 0.95)
    gradient, states = first_gradient(checkpoint), checkpoint["opt"]["state"].values()
    second = torch.cat([state["exp_avg_sq"].flatten() for state in states])
    torch.testing.assert_close(second, 0.05 * gradient**2, rtol=1e-3, atol=1e-12)


def test_qk_norm(cache, tmp_path):
    """The norms are in the model of the checkpoint, and trained."""
    plain, normed = train(cache, tmp_path / "plain"), train(cache, tmp_path / "normed", "--qk-norm")
    norms = {f"blocks.{i}.attn.{n}_norm.{kind}" for i in (0, 1) for n in "qk" for kind in ("weight", "bias")}
    assert normed["model"].keys() - plain["model"].keys() == norms
    trained = [name for name in norms if (normed["model"][name] != name.endswith("weight")).any()]
    assert len(trained) >= 6, "a bias of the keys shifts all attention logits of a query alike"
    dit.build(normed["config"]).load_state_dict(normed["ema"])


def test_full_disk_keeps_the_old_checkpoint(cache, tmp_path, monkeypatch):
    train(cache, tmp_path / "run", "--steps", 3)
    before = (tmp_path / "run" / "last.pt").read_bytes()

    def full(*args):
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit, match="last.pt .*No space left"):
        train(cache, tmp_path / "run")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.tmp"))


BAD_FLAGS = """
    lr -1, lr inf, lr nan, lr fast, ema -0.1, ema 1.5, workers -1, seed -1, warmup -1, clip -1, clip nan
    steps 0, micro-batch 0, batch-size 0, batch-size -4, batch-size 2.5, beta2 1.5, pos-base 0, time-shift 0
    control-alpha 0, control-drop -1, control-drop 1.1, class-tokens -1, log-every 0, save-every 0
    sample-every -1, precision fp8, repa-weight -0.5, repa-depth 0, model huge/2, model nano/0
"""
BAD_FLAGS = [flag.strip() for line in BAD_FLAGS.strip().splitlines() for flag in line.split(",")]


@pytest.mark.parametrize("flag", BAD_FLAGS)
def test_bad_flag(tmp_path, flag):
    """A wrong value is refused with its flag and itself, before anything is looked at."""
    name, value = flag.split()
    message = refusal(tmp_path / "no cache", tmp_path / "run", f"--{name}", value)
    assert f"--{name}" in message and value in message and not list(tmp_path.iterdir())


def test_bad_input(cache, tmp_path):
    def complain(*options, data=cache, out="run"):
        return refusal(data, tmp_path / out, *options)

    assert str(tmp_path / "nowhere") in complain(data=tmp_path / "nowhere")
    assert "no feature cache" in complain("--digits", data=tmp_path / "nowhere")  # no digits under that name
    message = complain("--micro-batch", 5)
    assert "--batch-size 16" in message and " 5 " in message
    message = complain("--batch-size", 128)
    assert "--batch-size 128" in message and "96 images" in message
    assert "patch 3" in (message := complain("--model", "nano/3")) and "8 x 8" in message
    assert "SIZE/2" in (message := complain("--model", "nano/4")) and "--patch 4" in message
    assert "--repa-depth 3" in (message := complain("--repa-depth", 1, 3)) and "2 blocks" in message
    assert "--time-normal" in complain("--time-normal", 0, 0)
    assert "nothing.pt" in complain("--init", tmp_path / "nothing.pt")
    (tmp_path / "file").write_text("precious")
    assert f"--out {tmp_path / 'file'}" in complain(out="file")
    assert f"{tmp_path / 'file'}" in complain(out="file/below")
    assert (tmp_path / "file").read_text() == "precious"
    shutil.copytree(cache, tmp_path / "bare")
    (tmp_path / "bare" / "00000000.safetensors").unlink()
    assert "00000000.safetensors" in complain(data=tmp_path / "bare")
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_run(cache, tmp_path):
    """Another command, cache or method is refused, and the run keeps every byte."""
    train(cache, tmp_path / "run", "--steps", 1)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    message = refusal(cache, tmp_path / "run", "--beta2", 0.5)
    assert "beta2 is 0.999 there, 0.5 here" in message and "--out" in message
    shutil.copytree(cache, tmp_path / "copy")
    train(tmp_path / "copy", tmp_path / "run", "--steps", 1)  # the same cache in another place
    meta = json.loads((cache / "meta.json").read_text()) | {"source": "other.npz"}
    (tmp_path / "copy" / "meta.json").write_text(json.dumps(meta))
    assert "cache" in refusal(tmp_path / "copy", tmp_path / "run")
    for script in (train_sddit, train_diversedit):
        assert str(tmp_path / "run") in refusal(cache, tmp_path / "run", script=script)
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    (tmp_path / "run" / "last.pt").write_bytes(before[:1000])
    assert "last.pt" in refusal(cache, tmp_path / "run")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before[:1000]


def test_a_forgotten_model_is_refused_at_once(cache, tmp_path, monkeypatch):
    """The default, XL/2, on a machine of 8 GB: one line that names two flags, before anything is written."""
    monkeypatch.setattr(os, "sysconf", lambda name: 2**33 // 4096 if name == "SC_PHYS_PAGES" else 4096)
    began = time.perf_counter()
    message = refusal(cache, tmp_path / "run", "--model", train_repa.parse_args([]).model)
    assert time.perf_counter() - began < 5
    assert "--model" in message and "--micro-batch" in message and "9 GB" in message
    assert not (tmp_path / "run").exists()


def test_a_sample_of_the_checkpoint_is_the_preview_of_the_ema(cache, tmp_path):
    """The preview uses the averaged weights: sample.py draws the same picture from the checkpoint."""
    train(cache, tmp_path / "run", "--sample-every", 1000)
    options = ["--num", "12", "--labels", "balanced", "--grid", str(tmp_path / "grid.png")]
    sample.main([str(tmp_path / "run" / "last.pt"), *options])
    ours, preview = (np.asarray(Image.open(tmp_path / p)) for p in ("grid.png", "run/samples-0000006.png"))
    assert np.abs(ours.astype(int) - preview).max() <= 1


def test_a_finished_run_says_so(cache, tmp_path, capsys):
    for _ in range(2):
        train(cache, tmp_path / "run", "--steps", 1)
    assert "is at step 1 already" in (printed := capsys.readouterr().out) and "--steps" in printed


def test_warm_up(cache, tmp_path):
    train(cache, tmp_path / "run", "--warmup", 4)
    expected = [2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3]
    assert [row["lr"] for row in rows(tmp_path / "run")] == pytest.approx(expected)


# --- one command from a fresh clone


def test_without_flags_a_script_is_the_run_of_its_paper():
    own = {
        "sddit": {"steps": 2_400_000, "precision": "fp32"},
        "meanflow": {"steps": 1_200_000, "precision": "fp32", "beta2": 0.95, "clip": 0},
    }
    for name, script in SCRIPTS.items():
        precision = "bf16" if torch.cuda.is_available() else "fp32"
        expected = {"steps": 400_000, "precision": precision, "beta2": 0.999, "clip": 1}
        expected |= own.get(name, {})
        args = script.parse_args([])
        assert {key: vars(args)[key] for key in expected} == expected
        assert (args.model, args.batch_size, args.lr, args.ema) == ("XL/2", 256, 1e-4, 0.9999)
        assert (args.data, args.warmup) == ("features/imagenet256", 0)
        assert args.out == f"runs/{script.NAME}" and args.control == "none" and not args.digits
    args = train_repa.parse_args([])
    assert args.repa_weight == 0.5 and args.repa_depth is None
    args = train_diversedit.parse_args([])
    assert args.div_gate == [0.1, 0.5] and args.repa_weight == 0 and not args.no_long_residuals
    args = train_sddit.parse_args([])
    assert (args.mask_ratio, args.sd_weight, args.teacher_noise, args.tau_s) == (0.2, 1, 0.002, 0.1)
    assert args.tau_t == [0.09, 0.099] and args.teacher_momentum == [0.996, 0.999]


@each_script
def test_digits_flags(script):
    """--digits sets the defaults of the laptop run; every flag beside it, before or after, wins."""
    args = script.parse_args(["--digits"])
    lr = 4e-3 if script.NAME == "dit" else 2e-3
    assert (args.model, args.batch_size, args.lr, args.ema, args.workers) == ("nano/2", 64, lr, 0.99, 0)
    assert (args.steps, args.data, args.out) == (1000, "features/digits", f"runs/{script.NAME}-digits")
    own = dict(model="S/2", batch_size=32, lr=1e-3, ema=0.5, workers=1, steps=7, data="d", out="o")
    own |= dict(sample_every=3)
    flags = [text for name, value in own.items() for text in ("--" + name.replace("_", "-"), str(value))]
    for command in (["--digits", *flags], [*flags, "--digits"]):
        given = vars(script.parse_args(command))
        assert {name: given[name] for name in own} == own and given["digits"]
    assert given.keys() == vars(script.parse_args([])).keys()


def test_digits_flags_of_the_methods():
    assert train_repa.parse_args(["--digits"]).repa_weight == 2
    assert train_repa.parse_args(["--digits", "--repa-weight", "0.5"]).repa_weight == 0.5
    args = train_sddit.parse_args(["--digits"])
    assert args.teacher_momentum == [0.9, 0.99] and args.tau_t == [0.06, 0.06] and args.precision == "fp32"
    args = train_sddit.parse_args(["--digits", "--tau-t", "0.04", "0.05"])
    assert args.tau_t == [0.04, 0.05] and args.teacher_momentum == [0.9, 0.99]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return tmp_path_factory.mktemp("digits")


@each_script
def test_digits_run(digits, script, monkeypatch, capsys):
    """The cache is made where it is not there yet; the run ends with a picture and a line that names it."""
    monkeypatch.chdir(digits)
    script.main(["--digits", "--steps", "2"])
    out = Path(f"runs/{script.NAME}-digits")
    meta = json.loads(Path("features/digits/meta.json").read_text())
    assert meta["count"] == 1797 and len(meta["classes"]) == 10
    assert Image.open(out / "samples-0000002.png").size == (10 * 52 - 4, 4 * 52 - 4)
    assert rows(out)[-1]["step"] == 2 and str(out / "samples-") in capsys.readouterr().out.splitlines()[-1]


def test_a_picture_comes_with_its_checkpoint(cache, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(files, "write_checkpoint", lambda path, state: steps.append(state["step"]))
    start("train_repa", cache, tmp_path / "run", "--steps", 5, "--sample-every", 4, "--save-every", 99)
    assert steps == [1, 2, 4, 5]


# --- conditioning and transfer (arXiv 2411.03177)


@each_script
def test_control_is_trained(cache, tmp_path, script, monkeypatch):
    """The rows of the cache reach the model, zeros for dropped images; sampling draws from the kept table."""
    seen, condition = [], dit.DiT.condition

    def spy(self, t, unshifted_t, y, drop, control, *more):
        if control is not None and not t.is_meta:
            seen.append(control.tolist())
        return condition(self, t, unshifted_t, y, drop, control, *more)

    options = ["--control", "cosine", "--control-drop", 0.25, "--class-tokens", 3, "--steps", 4]
    grid = ["--grid", str(tmp_path / "grid.png"), "--num", "3", "--steps", "2"]
    if script.NAME == "meanflow":
        options += ["--omega", 1, "--kappa", 0]
        grid += ["--sampler", "ode"]
    with monkeypatch.context() as patch:
        patch.setattr(dit.DiT, "condition", spy)
        checkpoint = train(cache, tmp_path / "run", *options, script=script)
    features = CachedFeatures(cache)
    table = {tuple(row) for row in features.__getitems__(range(len(features)))["control"].tolist()}
    assert table == {(8, 12, 0, 2, 8, 8, 0), (8, 12, 0, 2, 8, 8, 1)}
    passes = {"sddit": 2, "meanflow": 2}.get(script.NAME, 1)  # with the teacher, with the derivative
    assert len(seen) == 4 * passes, "the teacher sees the same control"
    assert script is not train_sddit or seen[::2] == seen[1::2]
    assert {tuple(row) for batch in seen for row in batch} == table | {7 * (0,)}
    before = train(cache, tmp_path / "start", *options, "--lr", 0, script=script)
    for name, value in checkpoint["model"].items():
        if name.startswith(("control_embedder.size_mlp.2", "control_embedder.layout_mlp.2")):
            assert (value != before["model"][name]).any() and not before["model"][name].any(), name
    assert checkpoint["control"].tolist() == 3 * [50 * [[8, 12, 0, 2, 8, 8, 0]]], "centred and not mirrored"
    for more in ([], ["--control", "fixed"], ["--cfg", "2", "--control-cfg", "0.5"]):
        sample.main([str(tmp_path / "run" / "last.pt"), *grid, *more])


def test_flips_are_learned(tmp_path):
    """Trained on a glyph and its mirror image, samples have the orientation asked for; else about half."""
    glyph = np.zeros((8, 8))
    glyph[1:7, 1:3], glyph[5:7, 1:7] = 1, 1                                       # an L
    levels = np.random.default_rng(0).uniform(150, 255, (32, 1, 1))
    images = np.repeat((glyph * levels)[..., None], 3, axis=3).astype(np.uint8)
    np.savez(tmp_path / "glyphs.npz", arr_0=images, arr_1=np.zeros(32, np.int64))
    extract(tmp_path / "glyphs.npz", tmp_path / "cache", "--encoder", "none", "--flip")

    def mirrored(name, *control):
        grid = ["--num", "40", "--steps", "20", "--out", str(tmp_path / f"{name}.npz"), *control]
        sample.main([str(tmp_path / name[:-1] / "last.pt"), *grid])
        with np.load(tmp_path / f"{name}.npz") as file:
            samples = file["arr_0"].astype(float).mean(3) - 128
        weights = glyph - glyph[:, ::-1]
        return np.mean([(sample * weights).sum() < 0 for sample in samples])

    # two blocks of width 32 do not learn it with every seed; nano does (tests/results/conditioning.md)
    training = ["--repa-weight", 0, "--steps", 300, "--batch-size", 32, "--lr", 3e-3, "--seed", 1]
    train(tmp_path / "cache", tmp_path / "with", *training, "--control", "cosine")
    train(tmp_path / "cache", tmp_path / "without", *training)
    assert mirrored("with0", "--control", "8,8,0,0,8,8,0") <= 0.1
    assert mirrored("with1", "--control", "8,8,0,0,8,8,1") >= 0.9
    assert 0.2 < mirrored("without0") < 0.8


def test_dropped_control_is_no_control(cache, tmp_path):
    """With control dropped for all images, a run is bit for bit that of the same start without it."""
    train(cache, tmp_path / "start", "--steps", 1)
    options = ["--init", tmp_path / "start" / "last.pt", "--repa-weight", 0]
    plain = train(cache, tmp_path / "plain", *options)
    dropped = train(cache, tmp_path / "dropped", *options, "--control", "cosine", "--control-drop", 1)
    new = {name for name in dropped["model"] if name.startswith("control_embedder.")}
    assert dropped["model"].keys() - plain["model"].keys() == new and len(new) == 8
    assert all(torch.equal(dropped["model"][name], value) for name, value in plain["model"].items())
    assert not any(dropped["model"][name].any() for name in new if ".2." in name), "zeros, never trained"


@pytest.mark.parametrize("script", [train_repa, train_sddit], ids=lambda script: script.__name__)
def test_transfer_to_a_higher_resolution(small_npz, cache, tmp_path, capsys, script):
    """Weights and averages of 8 px start a run at 16 px: positions between the old ones, shifted times."""
    extract(small_npz, tmp_path / "high", "--image-size", 16)
    low = train(cache, tmp_path / "low", script=script)
    init = ["--init", tmp_path / "low" / "last.pt", "--steps", 1]
    capsys.readouterr()
    high = train(tmp_path / "high", tmp_path / "run", *init, "--lr", 0, script=script)
    tables = [name for name in low["ema"] if name.endswith("pos_embed")]
    message = capsys.readouterr().out
    resized = f"{len(low['ema']) - len(tables)} tensors loaded; resized: {', '.join(sorted(tables))}"
    assert f"{resized}; new: none; unused: none; time shift 2" in message
    assert high["config"]["pos_base"] == 4 and high["config"]["time_shift"] == 2
    for name, value in low["ema"].items():
        if name in tables:
            width = value.shape[-1]
            assert torch.equal(high["model"][name].view(8, 8, width)[::2, ::2], value.view(4, 4, width))
        else:
            assert torch.equal(high["model"][name], value) and torch.equal(high["ema"][name], value), name
    (tmp_path / "low" / "last.pt").rename(tmp_path / "low.pt")  # not needed to resume
    resumed = train(tmp_path / "high", tmp_path / "run", *init, "--lr", 0, "--steps", 2, script=script)
    assert resumed["config"] == high["config"]

    # the flags have the last word; positions of the own grid continue the old ones: extrapolation
    init[1] = tmp_path / "low.pt"
    flags = ["--time-shift", 1.5, "--pos-base", 8]
    own = train(tmp_path / "high", tmp_path / "own", *init, *flags, script=script)
    assert (own["config"]["pos_base"], own["config"]["time_shift"]) == (8, 1.5)
    for name in tables:
        width = low["ema"][name].shape[-1]
        assert torch.equal(own["model"][name].view(8, 8, width)[:4, :4], low["ema"][name].view(4, 4, width))


def test_a_second_doubling_counts_from_the_first_grid(small_npz, cache, tmp_path):
    for size in (16, 32):
        extract(small_npz, tmp_path / f"{size}px", "--image-size", size, "--encoder", "none", "--limit", 16)
    small = ["--steps", 1, "--batch-size", 8, "--repa-weight", 0]
    train(cache, tmp_path / "a", *small)
    train(tmp_path / "16px", tmp_path / "b", *small, "--init", tmp_path / "a" / "last.pt")
    third = train(tmp_path / "32px", tmp_path / "c", *small, "--init", tmp_path / "b" / "last.pt")
    assert (third["config"]["pos_base"], third["config"]["time_shift"]) == (4, 4)


def test_positions_are_not_inherited(cache, tmp_path):
    """--pos-base on the grid of the checkpoint: positions of that base, all else from the checkpoint."""
    low = train(cache, tmp_path / "low", script=train_sddit)
    init = ["--init", tmp_path / "low" / "last.pt", "--pos-base", 8, "--steps", 1, "--lr", 0]
    own = train(cache, tmp_path / "own", *init, script=train_sddit)
    changed = {name for name, value in low["ema"].items() if not torch.equal(own["model"][name], value)}
    assert changed == {"pos_embed", "decoder_pos_embed"}
    expected = dit.sincos_positions(4, own["model"]["pos_embed"].shape[-1], base=8)
    np.testing.assert_allclose(own["model"]["pos_embed"][0], expected, atol=1e-6)


@pytest.mark.parametrize("script", [train_repa, train_diversedit], ids=lambda script: script.__name__)
@pytest.mark.parametrize("images", [1, 2, 3])
def test_a_few_images_are_enough(small_npz, tmp_path, script, images):
    """Too few for the diagnostic of a picture: the run goes on without it."""
    extract(small_npz, tmp_path / "few", "--limit", images)
    options = ["--steps", 2, "--batch-size", 1, "--sample-every", 1, "--log-every", 1]
    train(tmp_path / "few", tmp_path / "run", *options, script=script)
    for row in rows(tmp_path / "run"):
        assert all(math.isfinite(v) for value in row.values() for v in flat(value)), row
    assert len(list((tmp_path / "run").glob("samples-*.png"))) == 2


def flat(value):
    """The numbers in a number, or in a dict of lists or numbers."""
    if isinstance(value, dict):
        value = list(value.values())
    return [x for v in value for x in flat(v)] if isinstance(value, list) else [value]


def test_transfer_needs_the_same_tokens(cache, tmp_path, monkeypatch):
    options = ["--steps", 1, "--repa-weight", 0, "--model", "nano/4"]
    train(cache, tmp_path / "low", *options)
    init = ["--init", tmp_path / "low" / "last.pt"]
    assert "patch_size is 4" in (message := refusal(cache, tmp_path / "run", *init)) and " 2" in message
    monkeypatch.setitem(dit.SIZES, "nano", (2, 64, 2))
    message = refusal(cache, tmp_path / "run", *options, *init)
    assert "hidden_size is 32" in message and " 64" in message and not (tmp_path / "run").exists()


def test_a_large_base_of_positions_does_not_keep_a_run_from_resuming(cache, tmp_path):
    """A number of the config may exceed every side of the weights."""
    train(cache, tmp_path / "run", "--steps", 1, "--pos-base", 2000)
    resumed = train(cache, tmp_path / "run", "--steps", 2, "--pos-base", 2000)
    assert resumed["step"] == 2 and resumed["config"]["pos_base"] == 2000


@pytest.mark.parametrize("precision, enabled", [("fp32", False), ("bf16", True)])
def test_a_preview_has_the_precision_of_the_run(cache, tmp_path, monkeypatch, precision, enabled):
    seen, generate = [], sample.generate

    def spy(*args, **kwargs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return generate(*args, **kwargs)

    monkeypatch.setattr(sample, "generate", spy)
    options = ["--steps", 1, "--sample-every", 1000, "--repa-weight", 0, "--precision", precision]
    train(cache, tmp_path / "run", *options)
    assert seen == [enabled]


def test_help_shows_a_default_of_zero(capsys):
    with pytest.raises(SystemExit):
        train_repa.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "seed of weights, order and noise (default: 0)" in text


def test_preview_has_control(cache, tmp_path, monkeypatch):
    seen, generate = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda *a, **k: seen.append(k["control"]) or generate(*a, **k))
    train(cache, tmp_path / "run", "--steps", 1, "--control", "constant", "--sample-every", 1000)
    assert seen[0].tolist() == 12 * [[8, 12, 0, 2, 8, 8, 0]]


# --- interrupts, failing processes, two runs in one folder

ENDLESS = "--model nano/2 --batch-size 16 --log-every 99999 --save-every 30 --sample-every 0".split()


def test_interrupt_saves(cache, tmp_path, ranks=2, workers=0):
    """Ctrl-C under torchrun: a checkpoint, long before a row of the log is due."""
    options = ["--data", cache, "--out", tmp_path / "run", *ENDLESS, "--workers", workers]
    command = command_line("train_repa.py", *options, processes=ranks, first=WITH_TINY_NANO)
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, **pipes)
    last = tmp_path / "run" / "last.pt"
    while process.poll() is None and not last.exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    step = torch.load(last, weights_only=True)["step"]
    assert step >= 30
    assert f"interrupted at step {step}" in errors and process.returncode != 0


IN_THE_LOSS = """
import os, torch
def fail(*_, **__): raise RuntimeError(f"rank {os.environ['RANK']} meets an error in the loss")
if os.environ["RANK"] == "1": torch.nn.functional.cosine_similarity = fail
"""


def test_an_exception_on_one_rank_ends_all(cache, tmp_path):
    """With the message of that rank before any other, and within a minute."""
    first = f"{WITH_TINY_NANO}; exec({IN_THE_LOSS!r})"
    check_failure(cache, tmp_path, first, "rank 1 meets an error in the loss")


def test_a_bad_file_on_one_rank_ends_all(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "damaged")
    shard = tmp_path / "damaged" / "00000000.safetensors"
    shard.write_bytes(shard.read_bytes()[:5000])
    swap = f"sys.argv[sys.argv.index('--data') + 1] = {str(tmp_path / 'damaged')!r}"
    first = f"{WITH_TINY_NANO}; import os; exec({swap!r} if os.environ['RANK'] == '1' else '')"
    check_failure(cache, tmp_path, first, f"train_repa.py: {shard}")


def check_failure(cache, tmp_path, first, message):
    options = ["--data", cache, "--out", tmp_path / "run", *ENDLESS, "--steps", 2000]
    began = time.perf_counter()
    ended = run("train_repa.py", *options, processes=2, check=False, first=first)
    assert ended.returncode != 0 and time.perf_counter() - began < 60
    reports = [line for line in ended.stderr.splitlines() if re.search("Error|^train_repa.py: ", line)]
    assert message in reports[0], ended.stderr[-3000:]


def test_a_run_of_another_script_is_refused(cache, tmp_path):
    """Their flags may be the same: then, only the name tells one method from another."""
    train(cache, tmp_path / "run", "--repa-weight", 0, script=SCRIPTS["dit"])
    message = refusal(cache, tmp_path / "run", "--repa-weight", 0, "--steps", 9, script=train_repa)
    assert "train_dit.py" in message and "--out" in message


def test_two_runs_in_one_folder(cache, tmp_path, processes):
    """The second is refused; a first that was killed does not stand in the way."""
    options = [tmp_path / "run", *ENDLESS, "--steps", 10**6]
    first = processes.Process(target=start, args=("train_repa", cache, *options))
    first.start()
    while first.is_alive() and not (tmp_path / "run" / "last.pt").exists():
        time.sleep(0.05)
    assert str(tmp_path / "run") in (message := refusal(cache, *options)) and "--out" in message
    first.kill()
    first.join()
    step = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"]
    assert train(cache, tmp_path / "run", *ENDLESS, "--steps", step + 1)["step"] == step + 1


def test_a_damaged_checkpoint_of_a_run(cache, tmp_path):
    """The line says how to go on, and that works: a snapshot takes the place of last.pt."""
    options = [cache, tmp_path / "run", "--keep-every", 3]
    whole = train(*options)
    last = tmp_path / "run" / "last.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    assert "STEP.pt" in refusal(*options)
    shutil.copy(tmp_path / "run" / "0000003.pt", last)
    assert difference(whole, train(*options)) == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
