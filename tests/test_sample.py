"""sample.py: samplers against closed forms, guidance, per-image noise, and the files it writes.

Also files.py: checkpoints that are damaged, files on a full disk, and the run folder.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, command_line, run, run_ranks
from PIL import Image

import dit
import files
import sample
from extract_features import CachedFeatures, load_autoencoder
from files import UserError


@pytest.fixture(scope="module")
def checkpoint(cache, tmp_path_factory):
    """A random model for the small cache, saved as a training script saves it."""
    torch.manual_seed(0)
    config = {"arch": "DiT", "input_size": 8, "in_channels": 3, "num_classes": 3}
    config |= dit.parse_model("nano/2") | {"depth": 2}
    model = dit.build(config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("run") / "last.pt"
    content = {
        "model": {name: torch.zeros_like(value) for name, value in model.state_dict().items()},
        "ema": model.state_dict(),
        "heads": {},
        "opt": {},
        "step": 7,
        "script": "train_repa.py",
        "args": {"ema": 0.99},
        "config": config,
        "data": CachedFeatures(cache).meta,
    }
    torch.save(content, path)
    return path


# --- samplers


def gaussian_velocity(mean, std):
    """The exact v = E[eps - x | x_t] for data N(mean, std^2).

    x_t is Gaussian, so v is linear in it.
    """

    def velocity(x, t):
        variance = (1 - t) ** 2 * std**2 + t**2
        residual = x - (1 - t) * mean
        return t * residual / variance - (mean + (1 - t) * std**2 * residual / variance)

    return velocity


@pytest.mark.parametrize("sampler", ["ode", "heun", "sde"])
def test_samplers_recover_a_gaussian(sampler):
    torch.manual_seed(0)
    start, velocity = torch.randn(200_000, 1, 1, 1), gaussian_velocity(0.7, 0.8)
    if sampler == "sde":
        times = sample.sde_times(250)
        x = sample.flow_sde(velocity, start, times, lambda: torch.randn(start.shape))
    else:
        times = sample.ode_times(250 if sampler == "ode" else 40)
        x = sample.flow_ode(velocity, start, times, heun=sampler == "heun")
    assert x.dtype == torch.float64
    assert x.mean().item() == pytest.approx(0.7, abs=0.004)
    assert x.std().item() == pytest.approx(0.8, abs=0.008)


def test_ode_order_of_convergence():
    """Halving the step divides the error of Euler by 2, of Heun by 4.

    The exact map is x -> mean + std x.
    """
    start, velocity = torch.linspace(-2, 2, 9).double(), gaussian_velocity(0.5, 0.5)
    for heun, order in ((False, 1), (True, 2)):
        errors = []
        for steps in (100, 200):
            x = sample.flow_ode(velocity, start, sample.ode_times(steps), heun)
            errors.append((x - (0.5 + 0.5 * start)).abs().max().item())
        assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


def test_sde_is_the_general_form():
    """One trajectory of x' = x + (v - t s) dt + sqrt(2 t |dt|) eps; the score of any path (SiT)."""
    rng = np.random.default_rng(0)
    steps, x = 250, rng.standard_normal(5)
    noise = rng.standard_normal((steps - 1, 5))

    def velocity(x, t):
        return np.sin(3 * x) * (1 + t) - x

    source = iter(torch.from_numpy(noise))

    def model(x, t):
        return torch.from_numpy(velocity(x.numpy(), t))

    grid = sample.sde_times(steps)
    result = sample.flow_sde(model, torch.from_numpy(x), grid, lambda: next(source))
    times = np.append(np.linspace(1, 0.04, steps), 0)
    for i in range(steps):
        t, dt, v = times[i], times[i + 1] - times[i], velocity(x, times[i])
        alpha, sigma, d_alpha, d_sigma = 1 - t, t, -1, 1
        score = (alpha / d_alpha * v - x) / (sigma**2 - alpha / d_alpha * d_sigma * sigma)
        x = x + (v - t * score) * dt
        if i < steps - 1:
            x = x + np.sqrt(2 * t * -dt) * noise[i]
    assert next(source, None) is None, "249 stochastic steps and a deterministic one"
    np.testing.assert_allclose(result.numpy(), x, rtol=1e-11)


# --- guidance


class Recorder(torch.nn.Module):
    """v = class index + t; counts rows and remembers times."""

    num_classes = 3

    def __init__(self, offset=0.0):
        super().__init__()
        self.offset, self.rows, self.times = offset, 0, []

    def forward(self, x, t, y, control=None):
        self.rows += len(x)
        self.times.append(t[0].item())
        bonus = 0 if control is None else 10 * control[:, 0]
        return (y + t + self.offset + bonus).view(-1, 1, 1, 1).expand_as(x)


def test_guidance_interval_counts():
    """On [0, 0.7], 172 of the 250 steps of the SDE are guided: 422 rows instead of 250."""
    model = Recorder()
    velocity = sample.guided(model, torch.tensor([1]), scale=1.8, interval=(0, 0.7))
    zeros = torch.zeros(1, 4, 2, 2)
    sample.flow_sde(velocity, zeros, sample.sde_times(250), lambda: zeros)
    assert len(model.times) == 250 and model.rows == 250 + 172


def test_guidance_formula():
    model, guide, x = Recorder(), Recorder(offset=-0.5), torch.zeros(2, 4, 2, 2)
    y = torch.tensor([0, 2])

    def value(t, **options):
        out = sample.guided(model, y, **options)(x, t)
        assert (out == out[:, :1, :1, :1]).all(), "all channels are guided alike"
        return out[:, 0, 0, 0].tolist()

    assert value(0.5) == [0.5, 2.5]
    assert value(0.5, scale=1.0) == [0.5, 2.5]
    assert value(0.5, scale=3.0) == [3.5 + 3 * (0.5 - 3.5), 3.5 + 3 * (2.5 - 3.5)]  # null class: 3
    inclusive = value(0.5, scale=3.0, interval=(0.25, 0.5))
    assert inclusive == value(0.5, scale=3.0) == value(0.5, scale=3.0, interval=(0.5, 0.75))
    assert value(0.75, scale=3.0, interval=(0.25, 0.5)) == [0.75, 2.75]
    assert value(0.5, scale=2.0, guide=guide) == [0.0 + 2 * 0.5, 2.0 + 2 * 0.5]


def test_guidance_with_control():
    """Same control on both branches by default; with two scales, the identities of three passes."""
    torch.manual_seed(0)
    model = dit.DiT(4, 2, 3, 16, 2, 2, num_classes=3, control="cosine").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t, y = torch.randn(2, 3, 4, 4), torch.full((2,), 0.4), torch.tensor([0, 2])
    control = torch.tensor([[20, 30, 0, 5, 20, 20, 0], [64, 64, 9, 9, 32, 32, 1]])
    none = torch.zeros(2, 7)
    null = torch.full_like(y, 3)

    def v(**options):
        return sample.guided(model, y, control=control, **options)(x, 0.4)

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        v_c, v_0 = model(x, t, y, control=control), model(x, t, null, control=control)
        v_y, v_00 = model(x, t, y, control=none), model(x, t, null)
        assert (v_c - v_y).abs().max() > 1e-3 < (v_0 - v_00).abs().max(), "the control matters"
        close(v(), v_c)
        close(v(scale=3.0), v_0 + 3 * (v_c - v_0))
        close(v(scale=1.0, control_scale=1.0), v_c)
        close(v(scale=1.0, control_scale=0.0), v_y)
        close(v(scale=3.0, control_scale=1.0), v_00 + 3 * (v_c - v_00))
        close(v(scale=3.0, control_scale=0.5), v_00 + 3 * (0.5 * v_c + 0.5 * v_y - v_00))
        close(v(scale=3.0, control_scale=0.5, interval=(0.5, 1)), v_c)


def test_guide_has_control():
    seen = []

    class Guide(Recorder):
        def forward(self, x, t, y, control=None):
            seen.append(control)
            return super().forward(x, t, y, control)

    control, x = torch.tensor([[2.0] * 7]), torch.zeros(1, 4, 2, 2)
    guide = Guide(offset=-0.5)
    v = sample.guided(Recorder(), torch.tensor([1]), scale=3.0, guide=guide, control=control)
    assert v(x, 0.5)[0, 0, 0, 0].item() == 21 + 3 * (21.5 - 21) and torch.equal(seen[0], control)


def tiny_checkpoint(path, classes=("0", "1", "2"), control=None, std=0.2, **data):
    """A random model of width 16 for images of 8 x 8 pixels, saved at `path`: its content."""
    torch.manual_seed(0)
    config = {"arch": "DiT", "input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 16}
    config |= {"depth": 2, "num_heads": 2, "num_classes": len(classes)}
    if control is not None:
        config["control"] = "constant"
    model = dit.build(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    data = {"vae": "none", "latent_scale": 1.0, "latent_shift": 0.0, "image_size": 8} | data
    content = {
        "model": model.state_dict(),
        "ema": model.state_dict(),
        "config": config,
        "data": data | {"classes": list(classes)},
        "control": control,
        "step": 0,
        "args": {"ema": 0.9},
    }
    torch.save(content, path)
    return content


def test_control_of_image_i_is_its_own(tmp_path):
    """With a table of different rows, images do not depend on the batch size."""
    torch.manual_seed(0)
    tiny_checkpoint(tmp_path / "last.pt", control=torch.randint(1, 4000, (3, 50, 7)))

    def images(name, *options):
        out = tmp_path / f"{name}.npz"
        sample.main(f"{tmp_path}/last.pt --num 9 --steps 3 --out {out}".split() + [*options])
        return load(out)

    few, _, protocol = images("few", "--batch-size", "2")
    many, _, _ = images("many", "--batch-size", "16")
    assert np.abs(few.astype(int) - many).max() <= 1 and few.std() > 5
    assert protocol["control"] == "empirical"
    without, _, protocol = images("none", "--batch-size", "16", "--control", "none")
    assert (without != many).mean() > 0.1, "the control matters"
    assert protocol["control"] == "none"


def test_choose_control():
    table = torch.arange(3 * 5 * 7).reshape(3, 5, 7)
    y = torch.tensor([2, 0, 2, 1])

    def rows(kind, indices=(4, 9, 1, 7), seed=0):
        return sample.choose_control(kind, table, y, indices, seed)

    drawn = rows("empirical")
    own = [(drawn[i] == table[label]).all(1).any() for i, label in enumerate(y.tolist())]
    assert all(own), "rows of the own class"
    assert torch.equal(sample.choose_control("empirical", table, y[1:2], [9], 0), drawn[1:2])
    assert not torch.equal(rows("empirical", seed=1), drawn)
    assert rows("fixed").tolist() == 4 * [[512, 512, 0, 0, 512, 512, 0]]
    assert rows([8, 9, 0, 1, 8, 8, 1]).tolist() == 4 * [[8, 9, 0, 1, 8, 8, 1]]
    assert rows("none") is None and sample.choose_control("empirical", None, y, range(4), 0) is None


def test_time_shift_reaches_every_sampler(monkeypatch):
    """The same times with each t moved to 2t / (1 + t), and noise levels doubled."""
    seen = []

    def spy(self, x, t, y, **options):
        seen.append(t[0].item())
        return torch.zeros_like(x)

    monkeypatch.setattr(dit.DiT, "forward", spy)
    monkeypatch.setattr(dit.SDDiT, "forward", spy)
    options = {"input_size": 4, "patch_size": 2, "in_channels": 3, "hidden_size": 16, "depth": 2}
    options |= {"num_heads": 2, "time_shift": 2.0}
    for sampler, plain in (("ode", [1, 0.75, 0.5, 0.25]), ("sde", [1, 0.68, 0.36, 0.04])):
        seen.clear()
        sample.generate(dit.DiT(**options), [0], torch.tensor([0]), sampler, 4)
        assert seen == pytest.approx([2 * t / (1 + t) for t in plain])
    seen.clear()
    options |= {"decoder_depth": 1, "decoder_width": 16, "decoder_heads": 2}
    sample.generate(dit.SDDiT(**options), [0], torch.tensor([0]), None, 5)
    assert (seen[0], seen[-1]) == pytest.approx((160, 0.004))


# --- images


def test_image_noise_is_its_own():
    def first(indices, seed=0):
        generators = sample.image_generators(seed, indices)
        return [generator.standard_normal(3).tolist() for generator in generators]

    assert first([4, 7]) == [first([4])[0], first([7])[0]]
    assert first([4]) != first([5]) and first([4]) != first([4], seed=1)


def test_no_two_images_share_their_noise():
    """A seed of 32 bits, as PyTorch's CPU generator has, would repeat one of 100,000 images."""
    first = [g.standard_normal() for g in sample.image_generators(0, range(100_000))]
    assert len(set(first)) == 100_000


def test_uses_of_a_seed_have_streams_of_their_own():
    """The noise of step 7, image 7, epoch 7 ... of one seed differ, and so do those of other seeds."""
    streams = [(use, seed, i) for use in files.USES for seed in (0, 1, 7) for i in (0, 1, 7, 2**31)]
    first = [files.random_stream(*stream).integers(2**63) for stream in streams]
    assert len(set(first)) == len(streams)


def test_labels():
    def labels(kind, indices, seed=0):
        return sample.choose_labels(kind, indices, range(10), seed).tolist()

    assert labels("balanced", range(12)) == [*range(10), 0, 1]
    assert labels([3, 8], range(5)) == [3, 8, 3, 8, 3]
    random = labels("random", range(4000))
    assert [random[17], random[3]] == labels("random", [17, 3])
    assert random != labels("random", range(4000), seed=1)
    assert np.bincount(random).min() > 330 and np.bincount(random).max() < 470


def test_labels_leave_out_classes_without_images():
    data = {"classes": list("abcdef"), "empty_classes": [1, 4]}
    classes = sample.used_classes(data)
    assert classes == [0, 2, 3, 5] and sample.used_classes({"classes": ["a", "b"]}) == [0, 1]
    balanced = sample.choose_labels("balanced", range(6), classes, 0)
    assert balanced.tolist() == [0, 2, 3, 5, 0, 2]
    random = sample.choose_labels("random", range(400), classes, 0)
    assert set(random.tolist()) == {0, 2, 3, 5}
    # the same draws, of the four classes that are left
    draws = [files.random_stream("label", 0, i).integers(4) for i in range(400)]
    assert random.tolist() == [classes[draw] for draw in draws]


def test_decode_rounds():
    class Identity:
        def decode(self, latents):
            return latents

    x = torch.tensor([-2.0, -1.0, 0.0, 2 * 200.4 / 255 - 1, 2 * 200.6 / 255 - 1, 1.0, 3.0])
    latents = (x.view(1, 1, 1, 7).expand(1, 3, 1, 7).double() - 0.25) * 0.5
    images = sample.decode(latents, Identity(), {"latent_scale": 0.5, "latent_shift": 0.25})
    assert images.shape == (1, 1, 7, 3) and images.dtype == np.uint8
    assert images[0, 0, :, 0].tolist() == [0, 0, 128, 200, 201, 255, 255]


def test_grid(tmp_path):
    images = np.zeros((5, 16, 16, 3), np.uint8) + np.arange(5, dtype=np.uint8)[:, None, None, None]
    sample.save_grid(images, tmp_path / "grid.png", columns=3)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 52 - 4, 3 * 52 - 4, 3)
    assert grid[24::52, 24::52, 0].tolist() == [[0, 1, 2], [3, 4, 96]]
    assert grid[:48, :48].max() == 0 and (grid[:48, 52:100] == 1).all()
    assert (grid[48:52] == 96).all()


def load(path):
    with np.load(path, allow_pickle=False) as file:
        return file["arr_0"], file["arr_1"], json.loads(str(file["protocol"]))


def test_image_i_is_the_same_for_any_batch_and_any_number_of_processes(
    checkpoint, tmp_path, processes
):
    options = f"{checkpoint} --num-images 15 --sampler sde --steps 8 --cfg 1.5 --interval 0 0.7"
    options = [*options.split(), "--out"]
    for batch in (1, 7):
        sample.main([*options, str(tmp_path / f"{batch}.npz"), "--batch-size", str(batch)])
    run_ranks(processes, sample.main, [*options, str(tmp_path / "two.npz"), "--batch-size", "4"])
    pixels, labels, protocol = load(tmp_path / "1.npz")
    assert pixels.shape == (15, 8, 8, 3) and pixels.dtype == np.uint8 and pixels.std() > 20
    assert len({image.tobytes() for image in pixels}) == 15
    for name in ("7", "two"):
        others, other_labels, other_protocol = load(tmp_path / f"{name}.npz")
        # other batch sizes round fp32 matrix products differently: at most the last bit of a pixel
        # may move
        assert np.abs(pixels.astype(int) - others).max() <= 1 and (pixels != others).mean() < 0.01
        assert np.array_equal(labels, other_labels) and protocol == other_protocol
    assert protocol["sampler"] == "sde" and protocol["interval"] == [0, 0.7]
    assert protocol["train_step"] == 7
    assert protocol["checkpoint"] == files.file_hash(checkpoint)


PROTOCOL = {
    *("checkpoint", "num", "labels", "control", "seed", "sampler", "steps", "cfg", "interval"),
    *("control_cfg", "guide", "weights", "official", "vae", "precision"),
    *("train_step", "ema", "rounding", "first_noise_level"),
}


def test_the_protocol_is_made_from_what_was_resolved(checkpoint, tmp_path):
    """The flags of the user stay as they are, so that a second use of them means the same."""
    argv = f"{checkpoint} --num 3 --labels 2,0 --out {tmp_path}/a.npz".split()
    args = sample.parse_args(argv)
    before = dict(vars(args))
    sample.sample_images(args)
    assert vars(args) == before
    protocol = load(tmp_path / "a.npz")[2]
    assert protocol.keys() == PROTOCOL
    expected = {"labels": [2, 0], "control": "none", "sampler": "ode", "steps": 50, "vae": "none"}
    expected |= {"num": 3, "seed": 0, "guide": None, "interval": None, "weights": "ema"}
    expected |= {"ema": 0.99, "train_step": 7, "rounding": "nearest", "first_noise_level": 1.0}
    assert expected.items() <= protocol.items()


# --- work in parts


def stop_after(monkeypatch, batches):
    """From now on Ctrl-C arrives when this many batches were drawn. Returns the batches begun."""
    generate, calls = sample.generate, []

    def generate_and_die(*args, **kwargs):
        calls.append(list(args[1]))
        if len(calls) == batches + 1:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(sample, "generate", generate_and_die)
    return calls


def parts(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_killed_sampling_continues(checkpoint, tmp_path, monkeypatch):
    options = f"{checkpoint} --num 9 --steps 2 --batch-size 2 --labels balanced --out".split()
    sample.main([*options, str(tmp_path / "whole.npz"), "--grid", str(tmp_path / "grid.png")])
    calls = stop_after(monkeypatch, 2)
    killed = str(tmp_path / "killed.npz")
    with pytest.raises(SystemExit, match="interrupted; run the same command again"):
        sample.main([*options, killed])
    names = ["00000000.safetensors", "00000002.safetensors"]
    assert parts(tmp_path / "killed.npz.partial") == names
    with pytest.raises(SystemExit, match="killed.npz.partial .*seed is 0 there, 1 here"):
        sample.main([*options, killed, "--seed", "1"])
    sample.main([*options, killed])
    assert calls[3:] == [[4, 5], [6, 7], [8]]
    assert np.array_equal(load(tmp_path / "whole.npz")[0], load(tmp_path / "killed.npz")[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grid.png", "killed.npz", "whole.npz"]
    assert Image.open(tmp_path / "grid.png").size == (3 * 52 - 4, 3 * 52 - 4)


def test_parts_that_do_not_fit_are_drawn_again(checkpoint, tmp_path, monkeypatch):
    """After damage (cut, longer, another header, empty, no part), and with another --batch-size."""
    options = f"{checkpoint} --num 13 --steps 2 --out".split()
    sample.main([*options, str(tmp_path / "whole.npz"), "--batch-size", "4"])
    killed = tmp_path / "killed.npz"
    calls = stop_after(monkeypatch, 3)
    with pytest.raises(SystemExit, match="interrupted"):
        sample.main([*options, str(killed), "--batch-size", "4"])
    folder = tmp_path / "killed.npz.partial"
    whole = (folder / "00000004.safetensors").read_bytes()
    for damage in (whole[:-1], whole + b"0", b"", b"hello", b"\xff" + whole[1:], whole[:20]):
        (folder / "00000004.safetensors").write_bytes(damage)
        calls[:] = [None] * 4
        monkeypatch.setattr(sample, "write_npz", stop)
        with pytest.raises(SystemExit, match="interrupted"):
            sample.main([*options, str(killed), "--batch-size", "4"])
        assert [4, 5, 6, 7] in calls[4:] and [0, 1, 2, 3] not in calls[4:]
        assert (folder / "00000004.safetensors").read_bytes() == whole
    monkeypatch.undo()

    calls = stop_after(monkeypatch, 99)
    sample.main([*options, str(killed), "--batch-size", "6"])
    assert calls == [[*range(6)], [*range(6, 12)]], "the last part has image 12 alone, as before"
    pixels = load(tmp_path / "whole.npz")[0].astype(int)
    assert np.abs(pixels - load(killed)[0]).max() <= 1
    assert not folder.exists()


def stop(*args):
    raise KeyboardInterrupt


def test_a_process_that_was_killed_continues(checkpoint, tmp_path):
    """kill -9 among the batches: the same command keeps the parts and draws the same images."""
    options = [checkpoint, "--num", 200, "--steps", 4, "--batch-size", 2, "--out"]
    first = subprocess.Popen(
        command_line("sample.py", *options, tmp_path / "a.npz"),
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    folder = tmp_path / "a.npz.partial"
    while len(parts(folder)) < 3 and first.poll() is None:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = {name: (folder / name).stat().st_mtime_ns for name in parts(folder)}
    assert 3 <= len(kept) < 100
    (folder / "00000198.safetensors.999.tmp").write_bytes(b"half a part")
    keep = "import shutil; shutil.rmtree = lambda *a, **k: None"
    run("sample.py", *options, tmp_path / "a.npz", first=keep)
    assert len(parts(folder)) == 100
    assert all((folder / name).stat().st_mtime_ns == stamp for name, stamp in kept.items())
    sample.main([str(word) for word in (*options, tmp_path / "b.npz")])
    assert np.array_equal(load(tmp_path / "a.npz")[0], load(tmp_path / "b.npz")[0])
    assert not (tmp_path / "b.npz.partial").exists()


JOIN = """
import sys
from pathlib import Path
import numpy as np
import torch
import files, sample
folder = Path(sys.argv[1])
images = (torch.arange(100 * 256 * 256 * 3) % 201).to(torch.uint8).view(100, 256, 256, 3)
parts = []
for start in range(0, 1000, 100):
    parts.append(folder / f"{start:08d}.safetensors")
    files.write_tensors(parts[-1], {"images": images + start // 100})
del images

def memory(name):
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index(name) + 1])

Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
before = memory("VmRSS:")
sample.write_npz(folder / "out.npz", parts, np.arange(1000), {"seed": 0}, 256)
print(memory("VmHWM:") - before)
"""


def test_joining_needs_little_memory(tmp_path):
    """1,000 images of 256 px are 197 MB; one part of 20 MB is in memory at a time."""
    line = [sys.executable, "-c", JOIN, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100_000, "kB"
    with np.load(tmp_path / "out.npz", allow_pickle=False) as content:
        assert content.files == ["arr_0", "arr_1", "protocol"]
        pixels = content["arr_0"]
        assert pixels.shape == (1000, 256, 256, 3) and pixels.dtype == np.uint8
        assert np.array_equal(content["arr_1"], np.arange(1000))
        assert json.loads(str(content["protocol"])) == {"seed": 0}
    first = (np.arange(3 * 256 * 256) % 201).reshape(256, 256, 3)
    for i in (0, 100, 900):
        assert np.array_equal(pixels[i], first + i // 100)


# --- what the user asks for


def test_a_run_folder_and_class_names(checkpoint, tmp_path, capsys):
    """A list has only names, or only indices; the closing line says which, if names are numbers."""
    content = torch.load(checkpoint, weights_only=True)
    content["data"]["classes"] = ["cat", "2", "hot dog, mustard"]
    torch.save(content, tmp_path / "last.pt")

    def labels(text, name):
        out = tmp_path / f"{name}.npz"
        sample.main(f"{tmp_path} --num 5 --steps 1 --out {out} --labels".split() + [text])
        return load(out)[1].tolist(), load(out)[2]["labels"], capsys.readouterr().out

    drawn, asked, said = labels("cat,2", "names")
    assert drawn == [0, 1, 0, 1, 0] and asked == [0, 1] and "read as names" in said
    drawn, asked, said = labels("2", "name")
    assert asked == [1] and "read as names" in said
    drawn, asked, said = labels("1,2", "indices")
    assert asked == [1, 2] and "read as indices" in said
    assert "read as" not in labels("balanced", "balanced")[2]
    for text in ("cat,1", "cat,1,2", "3", "-1", "cat,", "hot dog, mustard"):
        with pytest.raises(SystemExit, match=f"--labels {text}: .*cat, 2.* 0 to 2"):
            labels(text, "wrong")
    assert load(tmp_path / "name.npz")[2]["checkpoint"] == files.file_hash(tmp_path / "last.pt")

    content["data"]["classes"] = ["cat", "dog", "cow"]
    torch.save(content, tmp_path / "last.pt")
    assert "read as" not in labels("dog,cow", "words")[2]


def test_classes_without_images_are_not_drawn(tmp_path):
    tiny_checkpoint(tmp_path / "last.pt", classes="abcde", empty_classes=[0, 3])
    options = f"{tmp_path} --num 40 --steps 1 --out {tmp_path}/".split()
    for kind in ("balanced", "random"):
        out = tmp_path / f"{kind}.npz"
        grid = tmp_path / f"{kind}.png"
        sample.main([*options[:-1], str(out), "--grid", str(grid), "--labels", kind])
        assert set(load(out)[1].tolist()) == {1, 2, 4}
    assert Image.open(tmp_path / "balanced.png").size[0] == 3 * 52 - 4, "a column per class in use"
    sample.main([*options[:-1], str(tmp_path / "asked.npz"), "--labels", "a"])
    assert set(load(tmp_path / "asked.npz")[1].tolist()) == {0}


@pytest.mark.parametrize(
    "ema, step, start",
    [
        (0.99, 7, "93%"),
        (0.9999, 20, "100%"),
        (0.99, 290, "5%"),
        (0.99, 300, None),
        (0.9, None, None),
        (None, 7, None),  # of a fork that does not average
    ],
)
def test_averages_that_hold_their_start(tmp_path, capsys, ema, step, start):
    """After n steps the initial weights still have the share ema^n."""
    content = tiny_checkpoint(tmp_path / "last.pt")
    torch.save(content | {"args": {"ema": ema}, "step": step}, tmp_path / "last.pt")
    options = f"{tmp_path} --num 2 --steps 1 --out {tmp_path}/".split()
    sample.main([*options[:-1], str(tmp_path / "a.npz")])
    said = capsys.readouterr().out
    assert ("--weights model" in said) == (start is not None)
    assert start is None or start in said
    sample.main([*options[:-1], str(tmp_path / "b.npz"), "--weights", "model"])
    assert "--weights model" not in capsys.readouterr().out


def test_the_result_is_written_before_the_grid(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "save_grid", stop)
    options = f"{checkpoint} --num 4 --steps 1 --out {tmp_path}/a.npz --grid {tmp_path}/a.png"
    with pytest.raises(SystemExit, match="interrupted"):
        sample.main(options.split())
    assert load(tmp_path / "a.npz")[0].shape == (4, 8, 8, 3)


def test_a_grid_too_large_is_refused_before_any_work(checkpoint, tmp_path, monkeypatch):
    """48 x 48 pixels an image here: 2^26 pixels are 29,127 images."""
    monkeypatch.setattr(sample, "sample_images", lambda args: sample.prepare(args, "cpu"))
    options = f"{checkpoint} --grid {tmp_path}/a.png --num"
    sample.main([*options.split(), "29127"])
    for number in (29_128, 10**6):
        with pytest.raises(SystemExit, match=f"--grid.*: {number} images"):
            sample.main([*options.split(), str(number)])
    assert list(tmp_path.iterdir()) == []
    sample.main(f"{checkpoint} --out {tmp_path}/a.npz --num 1000000".split())


def test_the_hash_is_taken_before_the_weights_are_read(checkpoint, tmp_path, monkeypatch):
    """A training script may replace its last.pt at any time."""
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content, tmp_path / "last.pt")
    order = []
    for name in ("file_hash", "read_checkpoint"):
        function = getattr(files, name)

        def note(path, *args, name=name, function=function, **options):
            order.append((name, str(path)))
            return function(path, *args, **options)

        monkeypatch.setattr(files, name, note)
    options = f"{tmp_path} --guide {checkpoint} --cfg 2 --num 2 --steps 1 --out {tmp_path}/a.npz"
    sample.main(options.split())
    assert order == [
        ("file_hash", str(tmp_path)),
        ("read_checkpoint", str(tmp_path)),
        ("file_hash", str(checkpoint)),
        ("read_checkpoint", str(checkpoint)),
    ]


def test_precision_and_compile(checkpoint, tmp_path, monkeypatch):
    """The protocol has the precision; compiled blocks draw the same; no compiler is one line."""
    compiled, plain = [], torch.nn.Module.compile

    def eagerly(self, **options):
        compiled.append(type(self).__name__)
        plain(self, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", eagerly)
    images = {}
    commands = {
        "fp32": ["--no-compile"],
        "compiled": ["--compile"],
        "bf16": ["--precision", "bf16"],
    }
    for name, options in commands.items():
        out = str(tmp_path / f"{name}.npz")
        sample.main([str(checkpoint), "--num", "3", "--steps", "3", "--out", out, *options])
        images[name], _, protocol = load(tmp_path / f"{name}.npz")
        assert protocol["precision"] == (name if name == "bf16" else "fp32")
    assert compiled == ["DiTBlock"] * 2 and np.array_equal(images["fp32"], images["compiled"])
    assert 0 < np.abs(images["fp32"].astype(int) - images["bf16"]).mean() < 30
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match="--no-compile"):
        sample.main([str(checkpoint), "--compile", "--out", str(tmp_path / "none.npz")])


def test_a_bar_in_a_log_file_is_short(checkpoint, tmp_path, capsys):
    options = f"{checkpoint} --num 200 --steps 1 --batch-size 1 --out {tmp_path}/a.npz"
    sample.main(options.split())
    assert 1 <= capsys.readouterr().err.count("img") <= 4


def test_a_preview_has_the_sampler_that_was_asked_for(tmp_path, monkeypatch):
    """Classes with images only; sampler, steps and scale reach `generate`."""
    tiny_checkpoint(tmp_path / "last.pt", classes="abcdef")
    model, checkpoint = files.load_model(tmp_path / "last.pt")
    features = SimpleNamespace(meta=checkpoint["data"], control_table=None)
    features.labels = np.array([5, 0, 0, 3, 5])
    seen = []
    generate = sample.generate

    def note(model, indices, y, **options):
        seen.append((y.tolist(), options))
        return generate(model, indices, y, **options)

    monkeypatch.setattr(sample, "generate", note)
    autoencoder = load_autoencoder("none")
    picture = tmp_path / "picture.png"
    sample.preview(model, features, autoencoder, picture, 4, sampler="sde", steps=3, scale=2.0)
    (y, options), = seen
    assert y == [0, 3, 5] * 4 and options["seed"] == 4
    assert (options["sampler"], options["steps"], options["scale"]) == ("sde", 3, 2.0)
    assert Image.open(picture).size == (3 * 52 - 4, 4 * 52 - 4)
    features.labels = np.zeros(7, dtype=np.int64)
    sample.preview(model, features, autoencoder, picture, steps=1)
    assert seen[-1][0] == [0] * 40 and Image.open(picture).size == (10 * 52 - 4, 4 * 52 - 4)


# --- damaged checkpoints


def damaged(checkpoint, tmp_path, change, **options):
    """The refusal of a checkpoint after change(content), which alters it or returns another."""
    content = torch.load(checkpoint, weights_only=True)
    changed = change(content)
    torch.save(content if changed is None else changed, tmp_path / "bad.pt")
    with pytest.raises(UserError) as error:
        files.read_checkpoint(tmp_path / "bad.pt", **options)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/bad.pt: ") and "\n" not in message and len(message) < 500
    return message


DAMAGE = {
    "empty": (lambda c: {key: {} for key in c}, ""),
    "args": (lambda c: c.update(args=[]), "args"),
    "model": (lambda c: c.update(model={}), "model|state_dict"),
    "ema list": (lambda c: c.update(ema=[1]), "ema"),
    "no ema": (lambda c: c.update(ema={}), ""),
    "a list": (lambda c: [c], ""),
    "a tensor": (lambda c: torch.zeros(3), ""),
    "unknown arch": (lambda c: c["config"].update(arch="UNet"), "UNet"),
    "unknown keyword": (lambda c: c["config"].update(colour=1), "colour"),
    "no arch": (lambda c: c["config"].__delitem__("arch"), "arch"),
    "depth": (lambda c: c["config"].update(depth=3), "blocks.2"),
    "depth text": (lambda c: c["config"].update(depth="3"), ""),
    "large side": (lambda c: c["config"].update(input_size=512), "pos_embed"),
    "zero patch": (lambda c: c["config"].update(patch_size=0), ""),
    "more classes": (lambda c: c["config"].update(num_classes=10**9), "y_embedder"),
    "one more class": (lambda c: c["config"].update(num_classes=4), "y_embedder"),
    "negative depth": (lambda c: c["config"].update(depth=-1), "blocks.0"),
    "a missing weight": (lambda c: c["ema"].__delitem__("pos_embed"), "pos_embed"),
    "another shape": (
        lambda c: c["model"].update({"pos_embed": torch.zeros(1, 16, 4)}),
        "pos_embed",
    ),
    "a word as weight": (lambda c: c["model"].update({"pos_embed": "x"}), "pos_embed"),
    "NaN": (lambda c: c["ema"]["pos_embed"][0, 3].__setitem__(5, torch.nan), "ema is not finite"),
    "inf": (
        lambda c: c["model"]["pos_embed"][0, 3].__setitem__(5, torch.inf),
        "model is not finite",
    ),
    "no classes": (lambda c: c["data"].__delitem__("classes"), "classes"),
    "classes numbers": (lambda c: c["data"].update(classes=[0, 1, 2]), "classes"),
    "scale NaN": (lambda c: c["data"].update(latent_scale=float("nan")), "latent_scale"),
    "shift": (lambda c: c["data"].update(latent_shift=float("inf")), "latent_shift"),
    "vae": (lambda c: c["data"].update(vae=3), "vae"),
    "control without weights": (lambda c: c["config"].update(control="cosine"), "control"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoint(checkpoint, tmp_path, name):
    change, reason = DAMAGE[name]
    assert re.search(reason, damaged(checkpoint, tmp_path, change).split("bad.pt: ")[1])


@pytest.mark.parametrize(
    "key, value",
    [("opt", None), ("heads", None), ("step", None), ("step", -1), ("step", "7"), ("script", None)],
)
def test_resuming_needs_more_than_sampling(checkpoint, tmp_path, key, value):
    def change(content):
        content[key] = value

    assert key in damaged(checkpoint, tmp_path, change, resume=True)
    files.read_checkpoint(tmp_path / "bad.pt")
    files.read_checkpoint(checkpoint, resume=True)


def test_an_optimiser_of_another_run(checkpoint):
    content = files.read_checkpoint(checkpoint, resume=True)
    model = dit.build(content["config"])
    objective = torch.nn.ModuleDict({"model": model})
    with pytest.raises(UserError, match="does not fit this run .*param_groups"):
        files.restore(content, objective, model, torch.optim.AdamW(model.parameters()))


def test_official_is_for_official_files(checkpoint, tmp_path):
    with pytest.raises(SystemExit, match="--official.* is not an official file"):
        sample.main([str(checkpoint), "--official", "repa", "--grid", str(tmp_path / "a.png")])


def test_files_that_are_no_checkpoints(checkpoint, tmp_path):
    whole = checkpoint.read_bytes()
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    np.savez(tmp_path / "array.pt.npz", a=np.zeros(3))
    for name in ("text.pt", "empty.pt", "half.pt", "array.pt.npz"):
        with pytest.raises(UserError, match=f"{name}: not a readable checkpoint"):
            files.read_checkpoint(tmp_path / name)
    for path in (tmp_path, tmp_path / "no.pt", tmp_path / "text.pt" / "x.pt", "/dev/null"):
        with pytest.raises(UserError, match="no such checkpoint"):
            files.read_checkpoint(path)


def test_flipped_bytes(checkpoint, tmp_path):
    """A flip outside the weights is refused in one line or harmless: no other error, no hang."""
    whole, rng = bytearray(checkpoint.read_bytes()), np.random.default_rng(0)
    places = np.concatenate([np.arange(8000), np.arange(len(whole) - 6000, len(whole))])
    refused = 0
    for place in rng.choice(places, 60, replace=False):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(8)
        (tmp_path / "flipped.pt").write_bytes(flipped)
        try:
            files.load_model(tmp_path / "flipped.pt")
        except UserError as error:
            assert "flipped.pt: not a readable checkpoint" in str(error)
            refused += 1
    assert refused > 10


def test_a_flip_in_the_weights_is_found_before_a_run_resumes(checkpoint, tmp_path):
    whole = bytearray(checkpoint.read_bytes())
    rng = np.random.default_rng(1)
    for place in rng.integers(10_000, len(whole) - 20_000, 10):
        flipped = bytearray(whole)
        flipped[place] ^= 1  # the lowest bit of some byte: the weights stay finite
        (tmp_path / "flipped.pt").write_bytes(flipped)
        with pytest.raises(UserError, match="flipped.pt: .*"):
            files.read_checkpoint(tmp_path / "flipped.pt", resume=True)


def test_a_model_shares_no_memory_with_its_checkpoint(checkpoint):
    """Checking the mapped file leaves no trace in the dicts that are loaded afterwards."""
    content = files.read_checkpoint(checkpoint)
    model = dit.build(content["config"])
    model.load_state_dict(content["ema"])
    own = {parameter.untyped_storage().data_ptr() for parameter in model.state_dict().values()}
    mapped = {value.untyped_storage().data_ptr() for value in content["ema"].values()}
    assert len(own) > 1 and not own & mapped
    before = content["ema"]["pos_embed"].clone()
    for parameter in model.parameters():
        parameter.data.add_(1)
    assert torch.equal(content["ema"]["pos_embed"], before)

    loaded, content = files.load_model(checkpoint)
    own = {parameter.untyped_storage().data_ptr() for parameter in loaded.state_dict().values()}
    assert not own & {value.untyped_storage().data_ptr() for value in content["ema"].values()}

    with torch.device("meta"):
        empty = dit.build(content["config"])
    with pytest.warns(UserWarning, match="no-op"):
        empty.load_state_dict(content["ema"])
    assert all(parameter.is_meta for parameter in empty.parameters()), "nothing was assigned"


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    files.write_checkpoint(path, {"step": 1})
    before = path.read_bytes()
    with pytest.raises(UserError, match="cannot write .*last.pt/x.pt"):
        files.write_checkpoint(path / "x.pt", {"step": 2})
    os.symlink("/dev/full", f"{path}.{os.getpid()}.tmp")  # the real thing
    with pytest.raises(UserError, match=f"cannot write {path} ") as error:
        files.write_checkpoint(path, {"step": torch.zeros(100_000)})
    assert "\n" not in str(error.value)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=f"cannot write {path} .*No space left"):
        files.write_checkpoint(path, {"step": 2})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_guidance_without_a_null_class_names_the_flag_that_asked():
    model = SimpleNamespace(y_embedder=SimpleNamespace(dropout_prob=0))
    for flag, cfg, control_cfg in (("--cfg 2:", 2.0, None), ("--control-cfg 1.5:", 1.0, 1.5)):
        args = SimpleNamespace(guide=None, cfg=cfg, control_cfg=control_cfg)
        with pytest.raises(UserError, match=f"^{flag} .*null class"):
            sample.check_guidance(args, model, {}, "empirical", "ode")


def test_full_disk(checkpoint, tmp_path, monkeypatch):
    """One line that names the file; nothing half-written has its name; the same command goes on."""
    options = [str(checkpoint), "--num", "4", "--steps", "1", "--batch-size", "2", "--out"]
    with pytest.raises(SystemExit, match="sample.py: .*/dev/full"):
        sample.main([*options, "/dev/full/x.npz"])
    for owner, name in ((os, "fsync"), (np.lib.format, "write_array")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(SystemExit, match="a.npz.*No space left"):
                sample.main([*options, str(tmp_path / "a.npz")])
        assert [p.name for p in tmp_path.iterdir()] == ["a.npz.partial"]
    monkeypatch.setattr(sample, "generate", None)  # all images are there
    sample.main([*options, str(tmp_path / "a.npz")])
    assert load(tmp_path / "a.npz")[0].std() > 20


# --- poisoned numbers


@pytest.fixture
def poisoned(checkpoint, tmp_path):
    """A checkpoint whose class 2 overflows, with finite weights."""
    content = torch.load(checkpoint, weights_only=True)
    content["ema"]["y_embedder.embedding_table.weight"][2] = 3e38
    torch.save(content, tmp_path / "last.pt")
    return tmp_path / "last.pt"


POISONED = "--num-images 6 --steps 2 --batch-size 3 --labels 0,1,0,1,2,2 --out".split()


def test_images_that_are_not_finite_stop(poisoned, tmp_path):
    with pytest.raises(SystemExit, match="2 of 3 images are not finite: 4, 5"):
        sample.main([str(poisoned), *POISONED, str(tmp_path / "a.npz")])
    assert not (tmp_path / "a.npz").exists()
    assert parts(tmp_path / "a.npz.partial") == ["00000000.safetensors"], "the good images are kept"


def test_one_rank_that_fails_ends_all(poisoned, tmp_path):
    """Only the second process meets the bad images."""
    began = time.time()
    done = run("sample.py", poisoned, *POISONED, tmp_path / "a.npz", processes=2, check=False)
    assert done.returncode != 0
    assert "sample.py: 2 of 3 images are not finite: 4, 5" in done.stderr
    assert not (tmp_path / "a.npz").exists() and time.time() - began < 60


def test_a_preview_that_is_not_finite_does_not_end_a_run(poisoned, tmp_path, capsys):
    model, checkpoint = files.load_model(poisoned)
    features = SimpleNamespace(meta=checkpoint["data"], control_table=None, labels=np.arange(3))
    sample.preview(model, features, load_autoencoder("none"), tmp_path / "picture.png")
    assert "picture.png: 4 of 12 images are not finite: 2, 5, 8, 11" in capsys.readouterr().err
    assert not (tmp_path / "picture.png").exists()


def test_bad_input(checkpoint, tmp_path):
    def complain(*options, out="out.npz"):
        command = [*options, "--num", "4", "--steps", "1", "--out", tmp_path / out]
        with pytest.raises(SystemExit) as error:
            sample.main([*map(str, command)])
        message = str(error.value.code)
        assert message.startswith("sample.py: ") and "\n" not in message
        return message

    assert "nothing.pt: no such" in complain(tmp_path / "nothing.pt")
    torch.save({"state": torch.zeros(1)}, tmp_path / "foreign.pt")
    assert "foreign.pt" in complain(tmp_path / "foreign.pt")
    assert "--labels 2,3: " in complain(checkpoint, "--labels", "2,3")
    assert "--labels fish: " in complain(checkpoint, "--labels", "fish")
    for flag, value in (("batch-size", 0), ("seed", -1), ("cfg", 0.5), ("cfg", "nan")):
        assert f"--{flag}: {value}" in complain(checkpoint, f"--{flag}", value).replace("'", "")
    assert "--control-cfg: -1" in complain(checkpoint, "--control-cfg", "-1")
    assert "--steps: 0" in complain(checkpoint, "--steps", 0)
    assert "--num-images: 0" in complain(checkpoint, "--num", 0)
    assert "--out" in complain(checkpoint, out="out.png")
    (tmp_path / "there.npz").write_text("precious")
    assert "there.npz exists" in complain(checkpoint, out="there.npz")
    assert "there.npz/x.npz" in complain(checkpoint, out="there.npz/x.npz")
    assert (tmp_path / "there.npz").read_text() == "precious"
    assert "--grid x.pgn: " in complain(checkpoint, "--grid", "x.pgn")
    assert "no such folder" in complain(checkpoint, "--grid", tmp_path / "nodir" / "x.png")
    assert "--interval 0.7 0: " in complain(checkpoint, "--cfg", "2", "--interval", "0.7", "0")
    assert "--interval has no effect" in complain(checkpoint, "--interval", "0", "0.7")
    assert "--guide has no effect without --cfg" in complain(checkpoint, "--guide", checkpoint)
    assert "--control-cfg: needs" in complain(checkpoint, "--control-cfg", "1")
    assert "--sampler edm: " in complain(checkpoint, "--sampler", "edm")
    row = "8,8,0,0,8,8,0"
    assert f"--control {[8, 8, 0, 0, 8, 8, 0]}: " in complain(checkpoint, "--control", row)
    assert "--control fixed: " in complain(checkpoint, "--control", "fixed")
    outside = "8,8,1,0,8,8,0"
    for wrong in ("big", row[2:], f"{10**30},{row[2:]}", outside, row[:-1] + "2"):
        message = complain(checkpoint, "--control", wrong)
        assert f"--control: {wrong[:20]}" in message.replace("'", "")
    with pytest.raises(SystemExit, match="nothing to write"):
        sample.main([str(checkpoint)])


def test_help_names_every_default(capsys):
    """Also those that depend on the checkpoint, in words."""
    with pytest.raises(SystemExit) as error:
        sample.main(["--help"])
    assert error.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for text in (
        *("(default: 100)", "(default: random)", "(default: empirical)", "(default: ema)"),
        *("(default: 64)", "(default: 1.0)", "by default ode", "by default 50"),
    ):
        assert text in said


# --- the run folder of a training script


def start(folder, step, steps=1000, world=1):
    args = SimpleNamespace(out=str(folder), model="nano/2", steps=steps, batch_size=64)
    args.micro_batch = None
    args.precision = "fp32"
    model = dit.DiT(8, 2, 3, 16, 2, 2, num_classes=3)
    files.start_run(args, step, world, model)
    files.LOCKS.pop().close()


def test_a_start_is_described(tmp_path, capsys):
    start(tmp_path / "run", 0)
    said = capsys.readouterr().out
    assert re.fullmatch(
        r"DiT nano/2, 0\.\dM parameters, 16 tokens; cpu, fp32; "
        rf"batch 64 = 1 process x 1 x 64; steps 0 to 1000; {tmp_path}/run\n",
        said,
    )
    rows = '{"step": 5}\n{"step": 9}\n{"step": 1'  # cut by a kill
    (tmp_path / "run" / "log.jsonl").write_text(rows)
    start(tmp_path / "run", 5, steps=9, world=2)
    assert "batch 64 = 2 processes x 1 x 32; steps 5 to 9" in capsys.readouterr().out
    assert (tmp_path / "run" / "log.jsonl").read_text() == '{"step": 5}\n'
    starts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [each["step"] for each in starts] == [0, 5] and starts[1]["processes"] == 2
    start(tmp_path / "run", 5, steps=5)
    said = capsys.readouterr().out
    assert re.fullmatch(rf"{tmp_path}/run is at step 5 .*--steps.*\n", said)


def training_log(tmp_path):
    (tmp_path / "log.jsonl").touch()
    args = SimpleNamespace(out=str(tmp_path), batch_size=64, steps=100, ema=0.9)
    return files.TrainingLog(args, step=0, rank=0, world=1, flops=1e9)


@pytest.mark.parametrize("name", ["loss_fm", "loss_edm", "loss"])
def test_a_row_shows_the_denoising_loss(tmp_path, capsys, name):
    """Or the whole loss, of a method that names no other."""
    row = {"step": 3, "loss_own": 7.0, "loss": 9.0, name: 0.25, "grad_norm": 1.0, "img_per_s": 8.0}
    row["skipped"] = 0
    training_log(tmp_path).write(row)
    assert f"step 3: {name} 0.2500, 8 img/s\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "log.jsonl").read_text()) == row


def test_rows_show_what_was_skipped(tmp_path, capsys):
    log = training_log(tmp_path)
    row = {"step": 50, "loss": 0.0, "loss_fm": 0.5, "grad_norm": 1.0, "img_per_s": 700.0}
    rows = [
        row | {"skipped": 0},
        row | {"skipped": 3},
        row | {"skipped": 50, "loss": None, "loss_fm": None, "grad_norm": None},
    ]
    for row in rows:
        log.write(row)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert said == [
        "step 50: loss_fm 0.5000, 700 img/s",
        "step 50: loss_fm 0.5000, 700 img/s, 3 skipped",
        "step 50: no finite gradient, 700 img/s, 50 skipped",
    ]
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == rows


DAMAGED_LOGS = [
    *("hello\n", "[1]\n", '{"loss": 1}\n', '{"step": "x"}\n'),
    *('{"step": 1\n{"step": 2}\n', b"\xff"),
]


@pytest.mark.parametrize(
    "name, contents",
    [
        ("log.jsonl", DAMAGED_LOGS),
        ("run.json", ["", "hello", "{}x", "7", b"\xff"]),
    ],
)
def test_a_damaged_run_folder(tmp_path, name, contents):
    """One line that names the file, which stays; without it the run goes on."""
    start(tmp_path, 0)
    for content in contents:
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{tmp_path}/{name}: damaged .*delete it"):
            start(tmp_path, 5)
        files.LOCKS.pop().close()
        assert (tmp_path / name).read_bytes() == content
    (tmp_path / name).unlink()
    start(tmp_path, 5)
