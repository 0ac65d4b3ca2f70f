"""The training scripts: losses against slow loops, and runs that resume, split and accumulate without a difference."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image

import dit
import sample
import train_diversedit
import train_repa
import train_sddit
from extract_features import CachedFeatures

SMALL = "--model nano/2 --steps 6 --batch-size 16 --lr 1e-3 --ema 0.9 --log-every 1 --save-every 3 --workers 0"


@pytest.fixture(autouse=True)
def tiny_nano(monkeypatch):
    monkeypatch.setitem(dit.SIZES, "nano", (2, 32, 2))


def train(cache, out, *options, script=train_repa):
    script.main(["--data", str(cache), "--out", str(out), *SMALL.split(), *map(str, options)])
    return torch.load(out / "last.pt", weights_only=True)


def rows(out):
    return [row for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "step" in row]


def difference(a, b):
    """Largest difference between the weights, averages, heads and optimiser states of two checkpoints."""
    worst = 0.0
    for part in ("model", "ema", "heads"):
        assert a[part].keys() == b[part].keys()
        worst = max([worst] + [(a[part][name] - b[part][name]).abs().max().item() for name in a[part]])
    for i, state in a["opt"]["state"].items():
        worst = max(worst, *[(state[name] - b["opt"]["state"][i][name]).abs().max().item() for name in state])
    return worst


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


def objective_for(cache, *options):
    args = train_repa.parse_args(["--data", str(cache), "--model", "nano/2", *map(str, options)])
    torch.manual_seed(0)
    config = dict(arch="DiT", input_size=8, in_channels=3, num_classes=3, **dit.parse_model(args.model))
    return train_repa.Objective(dit.build(config), args, CachedFeatures(cache).meta)


def test_objective_is_the_equation(cache):
    """Total = |v - (eps - x)|^2 + lambda L_repa at x_t = (1 - t) x + t eps, from the tokens of block d."""
    torch.manual_seed(1)
    objective = objective_for(cache, "--repa-weight", 0.3, "--repa-depth", 1)
    for parameter in objective.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    x, eps, t = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0.0, 0.3, 0.9, 1.0])
    y, drop, targets = torch.tensor([0, 1, 2, 0]), torch.tensor([False, True, False, False]), torch.randn(4, 16, 82)
    losses = objective(x, y, t, eps, drop, targets)
    x_t = torch.stack([(1 - s) * a + s * b for a, b, s in zip(x, eps, t.tolist(), strict=True)])
    null = torch.tensor([0, 3, 2, 0])
    v, (tokens,) = objective.model.eval()(x_t, t, null, after=[1])
    expected = ((v - (eps - x)) ** 2).mean()
    assert losses["loss_fm"].item() == pytest.approx(expected.item(), rel=1e-5)
    aligned = train_repa.repa_loss([objective.alignment.projectors[0](tokens)], [targets])
    assert losses["loss_repa"].item() == pytest.approx(aligned.item(), rel=1e-4)
    assert losses["loss"].item() == pytest.approx((expected + 0.3 * aligned).item(), rel=1e-4)


def test_first_loss_is_the_mean_square_of_the_target(cache):
    """The output is zero at initialisation, and the alignment reaches blocks 1 to d only."""
    objective = objective_for(cache, "--repa-depth", 1)
    x, eps = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    draws = dict(t=torch.rand(4), eps=eps, drop=torch.zeros(4, dtype=torch.bool))
    losses = objective(x, torch.zeros(4, dtype=torch.int64), targets=torch.randn(4, 16, 82), **draws)
    assert losses["loss_fm"].item() == pytest.approx(((eps - x) ** 2).mean().item(), rel=1e-6)
    losses["loss_repa"].backward()
    touched = [any(p.grad is not None for p in block.parameters()) for block in objective.model.blocks]
    assert touched == [True, False] and all(p.grad is not None for p in objective.alignment.parameters())


def test_projector_sizes():
    """Parameter counts of REPA's three-layer projector (D -> 2048 -> 2048 -> z)."""
    for width, target, count in ((384, 768, 6_558_464), (1152, 768, 8_131_328), (1152, 1536, 9_704_960)):
        with torch.device("meta"):
            head = train_repa.projector(width, target, 2048)
        assert sum(p.numel() for p in head.parameters()) == count


# --- data order and noise


def test_micro_batches_cut_the_same_global_batches():
    def batches(micro, world, steps, start=0):
        accumulation = 12 // (micro * world)
        streams = [train_repa.micro_batches(50, 2, 12, micro, accumulation, rank, 3, start) for rank in range(world)]
        return [[i for s in streams for _ in range(accumulation) for i in next(s).tolist()] for _ in range(steps)]

    whole = batches(12, 1, 9)
    assert batches(6, 1, 9) == batches(3, 2, 9) == batches(2, 3, 9) == whole
    assert batches(12, 1, 4, start=5) == whole[5:]
    epoch = [i // 2 for step in whole[:4] for i in step]
    assert len(set(epoch)) == 48, "an epoch shows every image at most once"
    assert epoch != [i // 2 for step in whole[4:8] for i in step]
    assert {i % 2 for i in whole[0]} == {0, 1}, "both views are drawn"


# --- runs


def test_run_and_resume(cache, tmp_path):
    """Stopped after three steps and continued by the same command: every bit as if it had not stopped."""
    whole = train(cache, tmp_path / "whole")
    train(cache, tmp_path / "cut", "--steps", 3)
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": 5}) + '\n{"step": 6, "lo')  # rows after the last save, the last cut by a kill
    cut = train(cache, tmp_path / "cut")
    assert difference(whole, cut) == 0
    clocks = ("img_per_s", "memory_gb")
    timeless = [{k: v for k, v in row.items() if k not in clocks} for row in rows(tmp_path / "whole")]
    assert timeless == [{k: v for k, v in row.items() if k not in clocks} for row in rows(tmp_path / "cut")]
    assert [row["step"] for row in timeless] == [1, 2, 3, 4, 5, 6]
    assert all(row["skipped"] == 0 and row["grad_norm"] > 0 for row in timeless)
    picture = Image.open(tmp_path / "whole" / "samples-0000006.png")
    assert picture.size == (3 * 52 - 4, 4 * 52 - 4)
    first = json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[0])
    assert first["versions"]["torch"] == torch.__version__ and first["args"]["lr"] == 1e-3
    # the checkpoint is enough to build and fill the model
    dit.build(whole["config"]).load_state_dict(whole["ema"])


def test_ema_is_the_recursion(cache, tmp_path):
    """ema <- 0.9 ema + 0.1 weights after every step, from the initial weights."""
    initial = objective_for(cache).model.state_dict()
    options = ["--keep-every", 1, "--sample-every", 0]
    train(cache, tmp_path / "run", *options)
    for name in ("blocks.1.mlp.fc1.weight", "final_layer.linear.bias", "pos_embed"):
        expected = initial[name].double()
        for step in range(1, 7):
            kept = torch.load(tmp_path / "run" / f"{step:07d}.pt", weights_only=True)
            expected = 0.9 * expected + 0.1 * kept["model"][name]
        torch.testing.assert_close(kept["ema"][name].double(), expected, rtol=0, atol=1e-7)


def test_one_process_is_two_ranks_is_accumulation(cache, tmp_path):
    one = train(cache, tmp_path / "one", "--sample-every", 0)
    accumulated = train(cache, tmp_path / "accumulated", "--sample-every", 0, "--micro-batch", 4)
    assert difference(one, accumulated) < 1e-5
    # torchrun cannot be given a smaller nano: the same comparison at its full size
    code = "import sys, dit, train_repa; dit.SIZES['nano'] = (2, 32, 2); train_repa.main(sys.argv[1:])"
    script = tmp_path / "train_small.py"
    script.write_text(code)
    options = ["--data", cache, "--out", tmp_path / "two", "--sample-every", 0, "--micro-batch", 4, *SMALL.split()]
    run(script, *options, processes=2, PYTHONPATH=".")
    two = torch.load(tmp_path / "two" / "last.pt", weights_only=True)
    assert difference(one, two) < 1e-5
    for a, b, c in zip(rows(tmp_path / "one"), rows(tmp_path / "accumulated"), rows(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) == pytest.approx(c["loss"], abs=1e-5)


def test_loss_falls(cache, tmp_path):
    train(cache, tmp_path / "run", "--steps", 60, "--sample-every", 0)
    losses = [row["loss_fm"] for row in rows(tmp_path / "run")]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:3])
    aligned = [row["loss_repa"] for row in rows(tmp_path / "run")]
    assert aligned[-1] < aligned[0] - 0.2


def test_baseline_needs_no_targets(small_npz, cache, tmp_path, monkeypatch):
    """--repa-weight 0 on a cache without targets: no projector, one loss, and the same run as on a cache with them."""
    import extract_features

    options = "--image-size 8 --patch 2 --vae none --encoder none --flip --batch-size 16 --workers 0"
    extract_features.main(["--data", str(small_npz), "--out", str(tmp_path / "bare"), *options.split()])
    monkeypatch.setattr(train_repa, "repa_loss", None)
    with_targets = train(cache, tmp_path / "a", "--repa-weight", 0, "--sample-every", 0)
    without = train(tmp_path / "bare", tmp_path / "b", "--repa-weight", 0, "--sample-every", 0)
    assert difference(with_targets, without) == 0 and without["heads"] == {}
    assert "loss_repa" not in rows(tmp_path / "b")[0]


def test_non_finite_step_is_skipped_and_counted(cache, tmp_path, monkeypatch):
    forward, calls = train_repa.Objective.forward, []

    def poisoned(self, *args, **kwargs):
        calls.append(self.model.pos_embed.shape)
        losses = forward(self, *args, **kwargs)
        bad = float("nan") if len(calls) in poison else 1.0
        return {name: value * bad for name, value in losses.items()}

    monkeypatch.setattr(train_repa.Objective, "forward", poisoned)
    poison = {2}
    checkpoint = train(cache, tmp_path / "one", "--log-every", 3, "--sample-every", 0)
    logged = rows(tmp_path / "one")
    assert [row["skipped"] for row in logged] == [1, 0]
    assert all(math.isfinite(value) for row in logged for value in row.values() if isinstance(value, float))
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    assert checkpoint["opt"]["state"][0]["step"] == 5, "AdamW made five of the six steps"
    calls.clear()
    poison = set(range(4, 7))
    with pytest.raises(SystemExit, match="no finite gradient in steps 4 to 6: lower --lr"):
        train(cache, tmp_path / "all", "--log-every", 3, "--sample-every", 0)
    assert torch.load(tmp_path / "all" / "last.pt", weights_only=True)["step"] == 3


def test_init_loads_what_fits(cache, tmp_path, capsys):
    first = train(cache, tmp_path / "first", "--sample-every", 0)
    source = tmp_path / "source.pt"
    first["ema"]["y_embedder.embedding_table.weight"] = torch.zeros(8, 32)
    first["config"]["num_classes"] = 7
    torch.save(first, source)
    args = ["--init", source, "--steps", 1, "--lr", 0, "--sample-every", 0]
    second = train(cache, tmp_path / "second", *args)
    message = capsys.readouterr().out
    assert "resized: none; new: y_embedder; unused: y_embedder; time shift 1" in message
    assert torch.equal(second["model"]["blocks.0.mlp.fc1.weight"], first["ema"]["blocks.0.mlp.fc1.weight"])
    assert second["model"]["y_embedder.embedding_table.weight"].shape == (4, 32) and second["step"] == 1


def test_bf16_changes_little(cache, tmp_path):
    """bf16 changes the numbers a little, and neither the fp32 weights nor the keys."""
    fp32 = train(cache, tmp_path / "fp32", "--sample-every", 0, "--steps", 2)
    bf16 = train(cache, tmp_path / "bf16", "--sample-every", 0, "--steps", 2, "--precision", "bf16")
    assert 0 < difference(fp32, bf16) < 0.1
    assert all(value.dtype == torch.float32 for value in bf16["model"].values())


def test_bench(cache, tmp_path, capsys):
    train_repa.main(["--data", str(cache), "--out", str(tmp_path / "run"), *SMALL.split(), "--bench", "3"])
    out = capsys.readouterr().out
    assert "bare forward + backward + AdamW" in out and "samples/s" in out
    assert not (tmp_path / "run").exists()


def test_full_disk_keeps_the_old_checkpoint(cache, tmp_path, monkeypatch):
    train(cache, tmp_path / "run", "--steps", 3, "--sample-every", 0)
    before = (tmp_path / "run" / "last.pt").read_bytes()

    def full(*args):
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit, match="last.pt .*No space left.*free some space and run the same command again"):
        train(cache, tmp_path / "run")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_bad_input(cache, tmp_path):
    def complain(*options, data=cache, out="run"):
        with pytest.raises(SystemExit) as error:
            train(data, tmp_path / out, "--sample-every", 0, *options)
        assert "\n" not in str(error.value.code) and error.value.code not in (0, None)
        return str(error.value.code)

    assert "no feature cache there" in complain(data=tmp_path / "nowhere")
    assert "--batch-size 16 is not a multiple of 1 process(es) x micro-batch 5" in complain("--micro-batch", 5)
    assert "larger than the 96 images" in complain("--batch-size", 128)
    assert "expected SIZE/PATCH" in complain("--model", "huge/2")
    assert "latents of side 8 do not divide into patches of 3" in complain("--model", "nano/3")
    assert "train with patch 2, or extract with --patch 4" in complain("--model", "nano/4")
    assert "--repa-depth 3: the model has blocks 1 to 2" in complain("--repa-depth", 3)
    assert "no such checkpoint" in complain("--init", tmp_path / "nothing.pt")
    for name, value in (("lr", -1), ("ema", -0.1), ("workers", -1), ("seed", -1), ("warmup", -1), ("control-drop", -1)):
        assert f"--{name} {value}" in complain(f"--{name}", value)
    for name in ("steps", "micro-batch", "bench", "batch-size"):
        assert f"--{name} 0: must be at least 1" in complain(f"--{name}", 0)
    assert "must not be above 1" in complain("--ema", 1.5)
    assert "--repa-weight -0.5: must not be negative" in complain("--repa-weight", -0.5)
    assert "--repa-depth 0: the model has blocks 1 to 2" in complain("--repa-depth", 0)
    (tmp_path / "file").write_text("precious")
    assert "is a file" in complain(out="file")
    assert "control alpha 0.0: must be positive" in complain("--control", "cosine", "--control-alpha", 0)
    shutil.copytree(cache, tmp_path / "bare")
    meta = json.loads((cache / "meta.json").read_text())
    del meta["arrays"]["control"]
    (tmp_path / "bare" / "meta.json").write_text(json.dumps(meta))
    assert "the cache has no control; extract it again" in complain("--control", "cosine", data=tmp_path / "bare")
    assert not (tmp_path / "run").exists()

    train(cache, tmp_path / "run", "--steps", 1, "--sample-every", 0)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    assert "holds another run: {'lr': 0.001} there, {'lr': 0.01} here" in complain("--lr", 0.01)
    shutil.copytree(cache, tmp_path / "copy")
    train(tmp_path / "copy", tmp_path / "run", "--steps", 1, "--sample-every", 0)  # the same cache elsewhere
    meta = json.loads((cache / "meta.json").read_text()) | {"source": "other.npz"}
    (tmp_path / "copy" / "meta.json").write_text(json.dumps(meta))
    assert "holds a run on another cache" in complain(data=tmp_path / "copy")
    (tmp_path / "run" / "last.pt").write_bytes(before[:1000])
    assert "not a readable checkpoint" in complain()
    assert (tmp_path / "run" / "last.pt").read_bytes() == before[:1000]


def test_a_sample_of_the_checkpoint_is_the_preview_of_the_ema(cache, tmp_path):
    """The preview uses the averaged weights in eval mode: sample.py draws the same picture from the checkpoint."""
    train(cache, tmp_path / "run")
    options = ["--num", "12", "--labels", "balanced", "--grid", str(tmp_path / "grid.png")]
    sample.main([str(tmp_path / "run" / "last.pt"), *options])
    ours, preview = (np.asarray(Image.open(tmp_path / p)) for p in ("grid.png", "run/samples-0000006.png"))
    assert np.abs(ours.astype(int) - preview).max() <= 1


# --- conditioning and transfer (arXiv 2411.03177)


@pytest.mark.parametrize("script", [train_repa, train_diversedit, train_sddit], ids=lambda script: script.__name__)
def test_control_is_trained(cache, tmp_path, script, monkeypatch):
    """The rows of the cache reach the model with zeros for the dropped images; sampling draws from the kept table."""
    seen, condition = [], dit.DiT.condition

    def spy(self, time, u, y, drop, control):
        seen.append(control)
        return condition(self, time, u, y, drop, control)

    options = ["--control", "cosine", "--control-drop", 0.25, "--class-tokens", 3, "--steps", 4]
    with monkeypatch.context() as patch:
        patch.setattr(dit.DiT, "condition", spy)
        checkpoint = train(cache, tmp_path / "run", *options, "--sample-every", 0, script=script)
    rows = {tuple(row) for row in CachedFeatures(cache).arrays["control"].tolist()}
    assert rows == {(8, 12, 0, 2, 8, 8, 0), (8, 12, 0, 2, 8, 8, 1)}
    batches = [control.tolist() for control in seen if control is not None and len(control) == 16]
    assert len(batches) == (8 if script is train_sddit else 4), "the teacher sees the same control"
    assert {tuple(row) for batch in batches for row in batch} == rows | {7 * (0,)}
    before = train(cache, tmp_path / "start", *options, "--sample-every", 0, "--lr", 0, script=script)
    for name, value in checkpoint["model"].items():
        if name.startswith("control_embedder.low.2") or name.startswith("control_embedder.high.2"):
            assert (value != before["model"][name]).any() and not before["model"][name].any(), name
    assert checkpoint["control"].tolist() == 3 * [50 * [[8, 12, 0, 2, 8, 8, 0]]], "centred and not mirrored"
    grid = ["--grid", str(tmp_path / "grid.png"), "--num", "3", "--steps", "2"]
    for more in ([], ["--control", "fixed"], ["--control", "8,12,0,2,8,8,1"], ["--cfg", "2", "--control-cfg", "0.5"]):
        sample.main([str(tmp_path / "run" / "last.pt"), *grid, *more])


def test_flips_are_learned(tmp_path, monkeypatch):
    """Trained on an asymmetric glyph and its mirror image, samples have the orientation asked for; else about half."""
    import extract_features

    glyph = np.zeros((8, 8))
    glyph[1:7, 1:3], glyph[5:7, 1:7] = 1, 1                                       # an L
    levels = np.random.default_rng(0).uniform(150, 255, (32, 1, 1))
    images = np.repeat((glyph * levels)[..., None], 3, axis=3).astype(np.uint8)
    np.savez(tmp_path / "glyphs.npz", arr_0=images, arr_1=np.zeros(32, np.int64))
    options = "--image-size 8 --patch 2 --vae none --encoder none --flip --workers 0"
    extract_features.main(["--data", str(tmp_path / "glyphs.npz"), "--out", str(tmp_path / "cache"), *options.split()])

    def mirrored(name, *control):
        grid = ["--num", "40", "--steps", "20", "--out", str(tmp_path / f"{name}.npz"), *control]
        sample.main([str(tmp_path / name[:-1] / "last.pt"), *grid])
        with np.load(tmp_path / f"{name}.npz") as file:
            samples = file["arr_0"].astype(float).mean(3) - 128
        weights = glyph - glyph[:, ::-1]
        return np.mean([(sample * weights).sum() < 0 for sample in samples])

    training = ["--repa-weight", 0, "--steps", 300, "--batch-size", 32, "--lr", 5e-3, "--sample-every", 0]
    train(tmp_path / "cache", tmp_path / "with", *training, "--control", "cosine")
    train(tmp_path / "cache", tmp_path / "without", *training)
    assert mirrored("with0", "--control", "8,8,0,0,8,8,0") <= 0.1
    assert mirrored("with1", "--control", "8,8,0,0,8,8,1") >= 0.9
    assert 0.2 < mirrored("without0") < 0.8


def test_control_off_is_the_run_without_it(cache, tmp_path, monkeypatch):
    """With every row dropped, a control model trains as one without: same draws, and its embedder never acts."""
    monkeypatch.setattr(dit.ControlEmbedder, "__init__", lambda self, *args: torch.nn.Module.__init__(self))
    monkeypatch.setattr(dit.ControlEmbedder, "initialize_weights", lambda self: None)
    monkeypatch.setattr(dit.ControlEmbedder, "forward", lambda self, control, u: 0 * control.sum(1, keepdim=True))
    plain = train(cache, tmp_path / "plain", "--sample-every", 0)
    off = train(cache, tmp_path / "off", "--sample-every", 0, "--control", "cosine")
    assert difference(plain, off) == 0


def test_warm_up(cache, tmp_path):
    train(cache, tmp_path / "run", "--warmup", 4, "--sample-every", 0)
    assert [row["lr"] for row in rows(tmp_path / "run")] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


@pytest.mark.parametrize("script", [train_repa, train_sddit], ids=lambda script: script.__name__)
def test_transfer_to_a_higher_resolution(small_npz, cache, tmp_path, capsys, script):
    """Weights and averages of 8 px start a 16 px run: positions between the old ones, times of the same noise."""
    import extract_features

    options = "--image-size 16 --patch 2 --vae none --encoder hog --batch-size 16 --workers 0"
    extract_features.main(["--data", str(small_npz), "--out", str(tmp_path / "high"), *options.split()])
    low = train(cache, tmp_path / "low", "--sample-every", 0, script=script)
    init = ["--init", tmp_path / "low" / "last.pt", "--sample-every", 0, "--steps", 1]
    capsys.readouterr()
    high = train(tmp_path / "high", tmp_path / "run", *init, "--lr", 0, script=script)
    tables = [name for name in low["ema"] if name.endswith("pos_embed")]
    message = capsys.readouterr().out
    assert f"{len(low['ema']) - len(tables)} tensors loaded; resized: {', '.join(sorted(tables))}; new: none" in message
    assert "unused: none; time shift 2" in message
    assert high["config"]["pos_base"] == 4 and high["config"]["time_shift"] == 2
    for name, value in low["ema"].items():
        if name in tables:
            width = value.shape[-1]
            assert torch.equal(high["model"][name].view(8, 8, width)[::2, ::2], value.view(4, 4, width))
        else:
            assert torch.equal(high["model"][name], value) and torch.equal(high["ema"][name], value), name
    (tmp_path / "low" / "last.pt").unlink()  # not needed to resume
    resumed = train(tmp_path / "high", tmp_path / "run", *init, "--lr", 0, "--steps", 2, script=script)
    assert resumed["config"] == high["config"]

    # a second doubling counts from the first grid; --time-shift has the last word
    options = "--image-size 32 --patch 2 --vae none --encoder hog --batch-size 16 --workers 0 --limit 16"
    extract_features.main(["--data", str(small_npz), "--out", str(tmp_path / "higher"), *options.split()])
    init[1] = tmp_path / "run" / "last.pt"
    third = train(tmp_path / "higher", tmp_path / "third", *init, "--batch-size", 8, script=script)
    assert (third["config"]["pos_base"], third["config"]["time_shift"]) == (4, 4)
    own = train(tmp_path / "high", tmp_path / "own", *init, "--time-shift", 1.5, script=script)
    assert (own["config"]["pos_base"], own["config"]["time_shift"]) == (4, 1.5)


def test_transfer_needs_the_same_tokens(cache, tmp_path, monkeypatch):
    train(cache, tmp_path / "low", "--sample-every", 0, "--steps", 1, "--repa-weight", 0, "--model", "nano/4")
    init = ["--init", tmp_path / "low" / "last.pt", "--sample-every", 0]
    with pytest.raises(SystemExit, match="its patch_size is 4, that of the model to train 2"):
        train(cache, tmp_path / "run", *init)
    monkeypatch.setitem(dit.SIZES, "nano", (2, 64, 2))
    with pytest.raises(SystemExit, match="its hidden_size is 32, that of the model to train 64"):
        train(cache, tmp_path / "run", *init, "--repa-weight", 0, "--model", "nano/4")
    assert not (tmp_path / "run").exists()


def test_flow_times_are_shifted(cache):
    """With --time-shift 2, the loss at uniform t is the plain loss at 2 t / (1 + t)."""
    plain, shifted = objective_for(cache, "--repa-weight", 0), objective_for(cache, "--repa-weight", 0)
    shifted.model.time_shift = 2.0
    x, eps, t = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0.0, 0.3, 0.9, 1.0])
    torch.nn.init.normal_(plain.model.final_layer.linear.weight)
    shifted.model.load_state_dict(plain.model.state_dict())
    rest = dict(x=x, eps=eps, y=torch.zeros(4, dtype=torch.int64), drop=torch.zeros(4, dtype=torch.bool))
    expected = plain(t=2 * t / (1 + t), **rest)["loss"]
    assert shifted(t=t, **rest)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert plain(t=t, **rest)["loss"].item() != pytest.approx(expected.item(), rel=1e-3)


def test_preview_has_control(cache, tmp_path, monkeypatch):
    seen, generate = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda *a, **k: seen.append(k["control"]) or generate(*a, **k))
    train(cache, tmp_path / "run", "--steps", 1, "--control", "constant")
    assert seen[0].tolist() == 12 * [[8, 12, 0, 2, 8, 8, 0]]


@pytest.mark.parametrize("processes, workers", [(1, 2), (2, 0)])
def test_interrupt_saves(cache, tmp_path, processes, workers):
    """SIGTERM to the group, or Ctrl-C under torchrun to every process: a checkpoint, long before a row of the log."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    options = "--model nano/2 --steps 100000 --batch-size 16 --log-every 99999 --save-every 30 --sample-every 0".split()
    command += ["train_repa.py", "--data", str(cache), "--out", str(tmp_path / "run"), *options]
    command += ["--workers", str(workers)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    process = subprocess.Popen(command, cwd=ROOT, env=env, **pipes)
    last = tmp_path / "run" / "last.pt"
    while process.poll() is None and not last.exists():
        time.sleep(0.1)
    if processes == 1:
        os.killpg(process.pid, signal.SIGTERM)
    else:
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        for pid in (*children, process.pid):
            os.kill(pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    step = torch.load(last, weights_only=True)["step"]
    assert step == rows(tmp_path / "run")[-1]["step"] > 30, "a row and a save of the last step"
    assert f"interrupted at step {step}; run the same command again" in errors and process.returncode != 0


def test_handlers_are_restored(cache, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(cache, tmp_path / "run", "--steps", 1, "--sample-every", 0)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_run_from_before_these_flags(cache, tmp_path):
    """Flags that an older checkpoint does not know count as their defaults."""
    train(cache, tmp_path / "run", "--steps", 1, "--sample-every", 0)
    old = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    del old["control"]
    for key in ("control", "control_alpha", "class_tokens"):
        del old["args"][key], old["config"][key]
    for key in ("control_drop", "warmup", "time_shift"):
        del old["args"][key]
    torch.save(old, tmp_path / "run" / "last.pt")
    with pytest.raises(SystemExit, match="holds another run: .*'control': 'none'.* there, .*'control': 'cosine'"):
        train(cache, tmp_path / "run", "--steps", 2, "--sample-every", 0, "--control", "cosine")
    assert train(cache, tmp_path / "run", "--steps", 2, "--sample-every", 0)["step"] == 2


def test_a_finished_run_says_so(cache, tmp_path, capsys):
    for _ in range(2):
        train(cache, tmp_path / "run", "--sample-every", 0)
    assert "is at step 6 already; raise --steps" in capsys.readouterr().out


GMACS = [
    ("DiT", "XL/2", 32, 118.6),
    ("DiT", "B/2", 32, 23.0),
    ("DiT", "S/2", 32, 6.05),
    ("DiT", "XL/2", 64, 524.5),
    ("DiverseDiT", "XL/2", 32, 128.1),
    ("SDDiT", "S/2", 32, 6.07 + 7.0),
]


@pytest.mark.parametrize("arch, model, side, gmac", GMACS)
def test_forward_flops(arch, model, side, gmac):
    """Published multiply-accumulates per image, which MFU rests on (1 MAC = 2 FLOP)."""
    config = dict(arch=arch, input_size=side, in_channels=4, num_classes=1000, **dit.parse_model(model))
    assert train_repa.forward_flops(config) / 2e9 == pytest.approx(gmac, rel=0.005)
