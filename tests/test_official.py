"""Official files of REPA, SiT and DiT are told apart, and equal independent formulas."""

import argparse
import json

import numpy as np
import pytest
import torch
from seeded import fill

import dit
import extract_features as ef
import files
import sample
import train_repa
from files import UserError


@pytest.fixture
def vae(monkeypatch, tmp_path):
    """A file of weights for the autoencoder, which here is small and shows three channels."""
    monkeypatch.setitem(ef.STABLE_DIFFUSION, "block_out_channels", [32] * 4)
    monkeypatch.setattr(ef.AutoencoderKL, "decode", lambda self, z: z[:, :3].repeat(1, 1, 8, 8))
    torch.save(fill(ef.AutoencoderKL().state_dict()), tmp_path / "vae.pt")
    return tmp_path / "vae.pt"


@pytest.fixture
def official(monkeypatch):
    """A small model in our convention and its state dict; the size is known as `small`."""
    monkeypatch.setitem(dit.SIZES, "small", (4, 32, 4))
    torch.manual_seed(0)
    model = dit.DiT(input_size=8, **dit.parse_model("small/2"), num_classes=7).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model, model.state_dict()


def eight_channels(state, second):
    """The final layer of DiT and SiT: 8 channels per position, channel index fastest."""
    out = dict(state)
    for kind, tail in (("weight", (32,)), ("bias", ())):
        four = state[f"final_layer.linear.{kind}"].view(4, 4, *tail)
        other = torch.full_like(four, second)
        out[f"final_layer.linear.{kind}"] = torch.cat([four, other], dim=1).reshape(32, *tail)
    return out


def with_projectors(state):
    return {**state, "projectors.0.0.weight": torch.zeros(5, 32)}


def inputs():
    torch.manual_seed(1)
    return torch.randn(3, 4, 8, 8), torch.rand(3) * 0.9 + 0.05, torch.tensor([0, 3, 7])


def linear_schedule():
    """alpha and sigma of DiT's 1000 steps, by a loop."""
    alphas, product = [], 1.0
    for i in range(1000):
        product *= 1 - (1e-4 + i * (2e-2 - 1e-4) / 999)
        alphas.append(product**0.5)
    alpha = np.array(alphas)
    return alpha, np.sqrt(1 - alpha**2)


def test_repa_file(official, tmp_path):
    """REPA's last.pt: a bare state dict with projectors.

    Old files call the deeper blocks decoder_blocks.
    """
    model, state = official
    legacy = {}
    for name, value in state.items():
        for i in (2, 3):
            name = name.replace(f"blocks.{i}.", f"decoder_blocks.{i - 2}.")
        legacy[name] = value
    assert "decoder_blocks.1.mlp.fc1.weight" in legacy and "blocks.3.mlp.fc1.weight" not in legacy
    state = with_projectors(state)
    arguments = {"args": argparse.Namespace(model="SiT-XL/2"), "steps": 400_000, "opt": {}}
    for content in (state, legacy, {"model": state, "ema": state, **arguments}):
        torch.save(content, tmp_path / "last.pt")
        loaded, checkpoint = files.load_model(tmp_path / "last.pt")
        expected = {"arch": "DiT", "input_size": 8, "num_classes": 7, "in_channels": 4}
        expected |= dit.parse_model("small/2") | {"qk_norm": False}
        assert checkpoint["config"] == expected
        assert torch.equal(loaded(*inputs()), model(*inputs()))
    assert checkpoint["step"] == 400_000


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(official, tmp_path, prefix):
    """DDP writes `module.` before every name, torch.compile writes `_orig_mod.`."""
    model, state = official
    state = {prefix + name: value for name, value in with_projectors(state).items()}
    torch.save({"model": state, "ema": state, "steps": 3}, tmp_path / "last.pt")
    loaded, checkpoint = files.load_model(tmp_path / "last.pt")
    assert checkpoint["config"]["depth"] == 4 and checkpoint["step"] == 3
    assert torch.equal(loaded(*inputs()), model(*inputs()))


def test_a_file_with_a_model_alone(official, tmp_path):
    """Then its weights are also the averages; where there are averages, these are taken."""
    model, state = official
    other = {name: value + 1 for name, value in state.items()}
    model_alone = {"model": with_projectors(state)}
    both = {"model": with_projectors(other), "ema": with_projectors(state)}
    for content in (model_alone, both):
        torch.save(content, tmp_path / "last.pt")
        for weights in ("ema", "model"):
            loaded, _ = files.load_model(tmp_path / "last.pt", weights)
            assert torch.equal(loaded(*inputs()), model(*inputs()))


def test_repa_file_with_qk_norm(official, tmp_path):
    """REPA's --qk-norm: a LayerNorm of the queries and keys of a head, which is 8 wide here."""
    options = {"input_size": 8, "num_classes": 7, "qk_norm": True}
    torch.manual_seed(0)
    model = dit.DiT(**options, **dit.parse_model("small/2")).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    state = model.state_dict()
    for name in ("q_norm", "k_norm"):
        for kind in ("weight", "bias"):
            assert state[f"blocks.3.attn.{name}.{kind}"].shape == (8,)
    torch.save(with_projectors(state), tmp_path / "last.pt")
    loaded, checkpoint = files.load_model(tmp_path / "last.pt")
    assert checkpoint["config"]["qk_norm"] is True
    assert torch.equal(loaded(*inputs()), model(*inputs()))
    plain = {name: value for name, value in state.items() if "_norm." not in name}
    torch.save(with_projectors(plain), tmp_path / "plain.pt")
    without, _ = files.load_model(tmp_path / "plain.pt")
    assert not torch.allclose(without(*inputs()), model(*inputs()), atol=1e-2), "the norms matter"


@pytest.mark.parametrize("channels", [4, 8])
def test_sit_file(official, tmp_path, channels):
    """v_REPA(x, t) = - v_SiT(x, 1 - t), from four channels, or the first four of eight."""
    model, state = official
    torch.save(eight_channels(state, 0.0) if channels == 8 else state, tmp_path / "SiT.pt")
    loaded, _ = files.load_model(tmp_path / "SiT.pt", official="sit" if channels == 4 else None)
    x, t, y = inputs()
    torch.testing.assert_close(loaded(x, t, y), -model(x, 1 - t, y), rtol=1e-4, atol=1e-4)


def test_dit_file(official, tmp_path):
    """v = eps - x0 at x_vp = (alpha + sigma) x_t, for the t of three timesteps of the schedule."""
    model, state = official
    torch.save(eight_channels(state, 0.1), tmp_path / "DiT.pt")
    loaded, checkpoint = files.load_model(tmp_path / "DiT.pt")
    assert checkpoint["config"]["arch"] == "NoiseDiT"
    assert (loaded.grid, loaded.in_channels, loaded.num_classes) == (4, 4, 7)
    assert loaded.time_shift == 1.0
    x, _, y = inputs()
    alpha, sigma = linear_schedule()
    steps = [10, 400, 990]
    a, s = (torch.tensor(v[steps], dtype=torch.float32).view(3, 1, 1, 1) for v in (alpha, sigma))
    x_vp = (a + s) * x
    eps = model(x_vp, torch.tensor(steps, dtype=torch.float32), y)
    expected = eps - (x_vp - s * eps) / a
    t = (s / (a + s)).view(3)
    # the timestep, interpolated in float32, is off by up to 1e-3: this moves the last digits
    torch.testing.assert_close(loaded(x, t, y), expected, rtol=5e-3, atol=5e-3)
    assert loaded.first_time == pytest.approx(0.9937, abs=5e-5)
    assert loaded.first_time == pytest.approx(sigma[-1] / (alpha[-1] + sigma[-1]), abs=1e-12)


def exact_noise(mean, std, seen=None):
    """DiT.forward as the exact E[eps | x_vp] for data N(mean, std^2), and channels for the variance.

    Timesteps are interpolated in log-SNR.
    """
    alpha, sigma = linear_schedule()
    log_snr = 2 * np.log(alpha / sigma)

    def forward(self, x, t, y, drop=None, control=None, return_blocks=None):
        ratio = np.exp(np.interp(t.double().numpy(), np.arange(1000), log_snr))
        a2 = torch.from_numpy(ratio / (1 + ratio)).float().view(-1, 1, 1, 1)
        if seen is not None:
            seen.append((x, t))
        eps = (1 - a2).sqrt() * (x - a2.sqrt() * mean) / (a2 * std**2 + 1 - a2)
        return torch.cat([eps, torch.full_like(eps, 7.0)], dim=1), []

    return forward


@pytest.fixture
def noise_model(monkeypatch):
    options = dict(input_size=32, patch_size=2, in_channels=4, hidden_size=16, depth=1, num_heads=2)
    return dit.NoiseDiT(**options, num_classes=3).eval(), monkeypatch


@pytest.mark.parametrize("sampler, steps", [("ode", 250), ("heun", 40), ("sde", 250)])
def test_noise_of_a_gaussian_ends_at_its_distribution(noise_model, sampler, steps):
    model, patch = noise_model
    patch.setattr(dit.DiT, "forward", exact_noise(0.7, 0.8))
    x = sample.generate(model, range(40), torch.zeros(40, dtype=torch.int64), sampler, steps)
    assert x.numel() == 163_840 and x.dtype == torch.float64
    assert x.mean().item() == pytest.approx(0.7, abs=0.02)
    assert x.std().item() == pytest.approx(0.8, abs=0.02)


def test_an_euler_step_is_a_ddim_step(noise_model):
    """Deterministic DDIM from timestep 600 to 350 in x_vp, against the Euler step in x_t."""
    model, patch = noise_model
    seen = []
    patch.setattr(dit.DiT, "forward", exact_noise(0.3, 0.5, seen))
    alpha, sigma = linear_schedule()
    (a, s), (a_next, s_next) = ((alpha[i], sigma[i]) for i in (600, 350))
    torch.manual_seed(0)
    x_vp = torch.randn(2, 4, 32, 32).double()
    network = sample.guided(model, torch.tensor([0, 1]))
    times = torch.tensor([s / (a + s), s_next / (a_next + s_next)], dtype=torch.float64)
    x = sample.flow_ode(network, x_vp / (a + s), times)
    output, _ = exact_noise(0.3, 0.5)(None, x_vp.float(), torch.tensor([600.0, 600.0]), None)
    eps = output[:, :4].double()
    ddim = a_next * (x_vp - s * eps) / a + s_next * eps
    torch.testing.assert_close(x * (a_next + s_next), ddim, rtol=0, atol=2e-5)
    assert seen[0][1].tolist() == pytest.approx([600, 600], abs=1e-3)
    torch.testing.assert_close(seen[0][0].double(), x_vp, rtol=0, atol=1e-5)


def test_times_of_noise_models_start_at_the_schedules_last(noise_model):
    model, _ = noise_model
    for sampler, last in (("ode", 0.99369 / 4), ("sde", 0.04)):
        name, times = sample.choose_sampler(model, sampler, 4)
        assert name == sampler and times[0] == model.first_time and times[-1] == 0
        assert times[3].item() == pytest.approx(last, abs=1e-4)


# --- refusals


def test_ambiguous_and_foreign_files(official, tmp_path):
    _, state = official
    nan = {**with_projectors(state), "blocks.1.mlp.fc1.bias": torch.full((128,), torch.nan)}
    for content, named, reason in (
        (state, None, "--official repa"),
        (with_projectors(state), "sit", "those of repa"),
        (eight_channels(state, 0.0), "repa", "those of sit"),
        (eight_channels(state, 0.1), "sit", "those of dit"),
        ({"layer.weight": torch.zeros(1)}, None, "x_embedder"),
        ({k: v for k, v in state.items() if "pos_embed" not in k}, "sit", "pos_embed"),
        ({k: v for k, v in state.items() if "2.attn.proj" not in k}, "sit", "blocks.2.attn.proj"),
        (nan, None, "model is not finite"),
    ):
        torch.save(content, tmp_path / "file.pt")
        with pytest.raises(UserError, match=f"file.pt: .*{reason}"):
            files.load_model(tmp_path / "file.pt", official=named)
    torch.save(state, tmp_path / "file.pt")
    loaded, _ = files.load_model(tmp_path / "file.pt", official="repa")
    assert torch.equal(loaded(*inputs()), official[0](*inputs()))


def test_labels_of_an_official_file_are_those_of_as_many_classes(official, tmp_path):
    """--init hands its label table on to class folders, which have names, if there are as many."""
    model, state = official
    torch.save(with_projectors(state), tmp_path / "file.pt")
    config = files.read_checkpoint(tmp_path / "file.pt")["config"]
    for count in (model.num_classes, 3):
        names = [f"n{i:08d}" for i in range(count)]
        init, _ = files.read_init(tmp_path / "file.pt", config, names)
        assert (init["data"]["classes"] == names) == (count == model.num_classes)


# --- end to end


@pytest.mark.parametrize("kind", ["repa", "sit", "sit4", "dit"])
def test_sample_draws_from_official_files(official, vae, tmp_path, kind):
    """Guided pixels are those of an Euler loop with the independent formula of each convention."""
    model, state = official
    contents = {
        "repa": with_projectors(state),
        "sit": eight_channels(state, 0),
        "sit4": state,
        "dit": eight_channels(state, 0.1),
    }
    torch.save(contents[kind], tmp_path / "file.pt")
    options = f"{tmp_path}/file.pt --num 2 --labels 3,5 --steps 4 --cfg 1.5".split()
    options += ["--out", f"{tmp_path}/out.npz"]
    if kind == "sit4":
        options += ["--official", "sit"]
    if kind == "dit":
        options += ["--sampler", "ode"]  # by default ddpm: see test_noise.py
    options.append("--vae")
    with pytest.raises(SystemExit, match="--vae none: decodes 3 channels to 8 pixels, not 4 to 64"):
        sample.main([*options, "none"])
    sample.main([*options, str(vae)])
    with np.load(tmp_path / "out.npz") as file:
        pixels, protocol = file["arr_0"], json.loads(str(file["protocol"]))
    assert pixels.shape == (2, 64, 64, 3)
    pixels = pixels[:, :8, :8].astype(int)
    alpha, sigma = linear_schedule()
    first = 1.0 if kind != "dit" else sigma[-1] / (alpha[-1] + sigma[-1])
    assert protocol["first_noise_level"] == pytest.approx(first, abs=1e-4)

    @torch.no_grad()
    def velocity(x, t, y):
        t = torch.full((2,), t)
        if kind == "repa":
            return model(x, t, y)
        if kind != "dit":
            return -model(x, 1 - t, y)
        step = np.interp(t[0].item(), sigma / (alpha + sigma), np.arange(1000))  # it is dense
        eps = model(x / (t[0] ** 2 + (1 - t[0]) ** 2).sqrt(), torch.full((2,), step).float(), y)
        return eps - (x - t[0] * eps) / (1 - t[0])

    generators = sample.image_generators(0, range(2))
    eps = [g.standard_normal((4, 8, 8), np.float32) for g in generators]
    x = torch.from_numpy(np.stack(eps)).double()
    if kind == "dit":
        x = x / (alpha[-1] + sigma[-1])
    for i in range(4):
        t = first * (4 - i) / 4
        null, v = (velocity(x.float(), t, torch.tensor(y)).double() for y in ([7, 7], [3, 5]))
        x = x - first / 4 * (null + 1.5 * (v - null))
    image = ((x / 0.18215)[:, :3].clamp(-1, 1) * 127.5 + 127.5).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(pixels - image).max() <= 1 and (pixels != image).mean() < 0.05


def test_a_noise_model_guides_and_is_guided(official, vae, tmp_path):
    torch.save(eight_channels(official[1], 0.1), tmp_path / "dit.pt")
    torch.save(eight_channels(official[1], 0.0), tmp_path / "sit.pt")
    options = f"{tmp_path}/dit.pt --num 2 --steps 2 --cfg 1.5 --sampler sde --vae {vae}"
    sample.main(f"{options} --guide {tmp_path}/dit.pt --out {tmp_path}/out.npz".split())
    assert np.load(tmp_path / "out.npz")["arr_0"].shape == (2, 64, 64, 3)
    with pytest.raises(SystemExit, match="--guide .*sit.pt: .*another loss"):
        sample.main(f"{options} --guide {tmp_path}/sit.pt --out {tmp_path}/other.npz".split())


@pytest.mark.parametrize("change", ["classes", "side"])
def test_a_guide_of_other_images(official, vae, tmp_path, change):
    model, state = official
    torch.save(with_projectors(state), tmp_path / "model.pt")
    torch.manual_seed(0)
    options = {"input_size": 8, "num_classes": 7}
    options |= {"input_size": 16} if change == "side" else {"num_classes": 8}
    other = dit.DiT(**options, **dit.parse_model("small/2"))
    torch.save(with_projectors(other.state_dict()), tmp_path / "other.pt")
    options = f"{tmp_path}/model.pt --num 2 --steps 2 --cfg 1.5 --vae {vae}"
    number = "16, not 8" if change == "side" else "8, not 7"
    with pytest.raises(SystemExit, match=f"--guide .*other.pt: .*{number}"):
        sample.main(f"{options} --guide {tmp_path}/other.pt --out {tmp_path}/out.npz".split())


def test_init_from_an_official_file(official, cache, tmp_path, capsys):
    torch.save(with_projectors(official[1]), tmp_path / "official.pt")
    run = "--model small/2 --steps 1 --batch-size 4 --repa-weight 0 --repa-depth 2 --lr 0"
    run += " --sample-every 0 --workers 0"
    names = ["--data", cache, "--out", tmp_path / "run", "--init", tmp_path / "official.pt"]
    train_repa.main([*map(str, names), *run.split()])
    said = capsys.readouterr().out
    assert "new: final_layer, x_embedder, y_embedder; unused: final_layer" in said
    weights = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    assert torch.equal(weights["blocks.3.mlp.fc1.weight"], official[1]["blocks.3.mlp.fc1.weight"])
