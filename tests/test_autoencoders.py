"""Autoencoders by diffusers' config.json: SDXL's, SD3's, FLUX's, CogView4's and the E2E-VAEs of REPA-E."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TINY, train
from seeded import fill, uniform

import dit
import extract_features as ef
import files
import sample
from files import UserError

# what diffusers 0.42.1 computes in float64, for five of its configs with few channels; weights of seeded.fill
GOLDEN = np.load(Path(__file__).with_name("golden_vaes.npz"))
NAMES = ("sdxl", "sd3", "flux", "e2e", "cogview4")
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"


def golden_config(name):
    """The config.json that diffusers wrote."""
    return json.loads(str(GOLDEN[f"{name}.config"]))


def write_folder(folder, config, dtype=torch.float32, **changes):
    """A folder as diffusers saves it, of an autoencoder with the weights of seeded.fill."""
    folder.mkdir(exist_ok=True)
    state = fill(ef.AutoencoderKL(config).state_dict())
    state = {name: value.to(dtype) for name, value in state.items()}
    safetensors.torch.save_file(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


@pytest.mark.parametrize("name", NAMES)
def test_equals_diffusers(name, tmp_path):
    config = golden_config(name)
    autoencoder = ef.load_autoencoder(write_folder(tmp_path / name, config))
    side, channels = autoencoder.downsampling, autoencoder.channels
    assert channels == config["latent_channels"] == GOLDEN[f"{name}.mean"].shape[1]
    assert GOLDEN[f"{name}.mean"].shape[2:] == (1, 2)
    assert GOLDEN[f"{name}.decoded"].shape[2:] == (side, 2 * side)
    images = uniform("images", (2, 3, side, 2 * side))
    latents = uniform("latents", (1, channels, 1, 2), -2, 2)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-5)):
        autoencoder.to(dtype)
        mean, std = autoencoder.encode(images.to(dtype))
        decoded = autoencoder.decode(latents.to(dtype))
        for key, value in (("mean", mean), ("std", std), ("decoded", decoded)):
            np.testing.assert_allclose(value, GOLDEN[f"{name}.{key}"], rtol=0, atol=tolerance)


FULL = {  # config, number of tensors and of weights in diffusers' network
    "sdxl": ({"scaling_factor": 0.13025}, 248, 83_653_863),
    "sd3, flux": (
        {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.5},
        244,
        83_819_683,
    ),
    "e2e-vavae": (
        {
            "block_out_channels": [128, 128, 256, 256, 512],
            "down_block_types": [DOWN] * 4 + [f"Attn{DOWN}"],
            "up_block_types": [f"Attn{UP}"] + [UP] * 4,
            "latent_channels": 32,
            "scaling_factor": 1.0,
        },
        342,
        69_836_067,
    ),
}


@pytest.mark.parametrize("name", FULL)
def test_full_size(name):
    config, tensors, weights = FULL[name]
    with torch.device("meta"):
        state = ef.AutoencoderKL(config).state_dict()
    assert len(state) == tensors and sum(value.numel() for value in state.values()) == weights


def test_scale_and_shift():
    """Published values, and the channels' own statistics, which win."""
    for name, scale, shift in (("sdxl", 0.13025, 0), ("sd3", 1.5305, 0.0609), ("flux", 0.3611, 0.1159)):
        autoencoder = ef.AutoencoderKL(golden_config(name))
        assert (autoencoder.scale, autoencoder.shift) == (scale, shift)
    config = golden_config("e2e")
    autoencoder = ef.AutoencoderKL(config)
    assert config["scaling_factor"] == 0.18215 and config["shift_factor"] is None
    assert autoencoder.shift == config["latents_mean"]
    np.testing.assert_allclose(autoencoder.scale, 1 / np.array(config["latents_std"]))
    assert (ef.AutoencoderKL({}).scale, ef.AutoencoderKL({}).shift) == (0.18215, 0)
    # the config.json of sd-vae-ft-mse has no scaling_factor
    old = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.4.2", "act_fn": "silu", "in_channels": 3}
    old |= {"block_out_channels": [128, 256, 512, 512], "down_block_types": [DOWN] * 4, "latent_channels": 4}
    old |= {"layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "up_block_types": [UP] * 4}
    assert ef.complete_config(old)["scaling_factor"] == 0.18215


def test_half_precision_and_old_names(tmp_path):
    """FLUX's file is bfloat16; older files have other names, in every block with attention."""
    config = golden_config("e2e")
    state = fill(ef.AutoencoderKL(config).state_dict())
    halves = ef.load_autoencoder(write_folder(tmp_path / "half", config, torch.bfloat16)).state_dict()
    for name, value in state.items():
        assert torch.equal(halves[name], value.bfloat16().float())
    old = {}
    for name, value in state.items():
        for new, other in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{other}.")
        old[name] = value[:, :, None, None] if "attentions" in name and value.ndim == 2 else value
    assert "decoder.up_blocks.0.attentions.2.proj_attn.weight" in old
    write_folder(tmp_path / "old", config)
    safetensors.torch.save_file(old, tmp_path / "old" / "diffusion_pytorch_model.safetensors")
    loaded = ef.load_autoencoder(str(tmp_path / "old")).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_folder_in_a_hub_repository(tmp_path, monkeypatch):
    """SD3's and FLUX's autoencoders lie in the folder vae of their repositories."""
    write_folder(tmp_path / "vae", golden_config("sd3"))
    asked = []

    def download(repository, name):
        asked.append((repository, name))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert ef.load_autoencoder("owner/name/vae").channels == 16
    assert asked == [
        ("owner/name", "vae/config.json"),
        ("owner/name", "vae/diffusion_pytorch_model.safetensors"),
    ]


WRONG = {
    "another class": ({"_class_name": "AutoencoderKLQwenImage"}, "AutoencoderKLQwenImage"),
    "no scale": ({"scaling_factor": None}, "scaling_factor is None"),
    "scale NaN": ({"scaling_factor": float("nan")}, "scaling_factor is nan"),
    "scale text": ({"scaling_factor": "1"}, "scaling_factor is '1'"),
    "block": ({"down_block_types": ["DownBlock2D"] * 4}, "DownBlock2D"),
    "up block": ({"up_block_types": ["AttnDownEncoderBlock2D"] * 4}, "AttnDownEncoderBlock2D"),
    "blocks": ({"down_block_types": [DOWN] * 3}, "config.json"),
    "activation": ({"act_fn": "gelu"}, "act_fn is 'gelu'"),
    "channels": ({"latent_channels": 4}, "weights of another architecture"),
    "layers": ({"layers_per_block": 3}, "weights of another architecture"),
    "widths": ({"block_out_channels": [8, 16, 24, 32]}, "weights of another architecture"),
    "widths as text": ({"block_out_channels": "8, 16"}, "config.json"),
    "groups": ({"norm_num_groups": 7}, "config.json"),
    "quant": ({"use_quant_conv": True}, "weights of another architecture"),
    "attention": ({"mid_block_add_attention": False}, "weights of another architecture"),
    "std without mean": ({"latents_std": [1.0] * 16, "shift_factor": None}, "shift_factor is None"),
    "std 0": ({"latents_std": [0.0] * 16, "latents_mean": [0.0] * 16}, "config.json"),
    "std text": ({"latents_std": ["1"] * 16, "latents_mean": [0.0] * 16}, "config.json"),
    "mean text": ({"latents_std": [1.0] * 16, "latents_mean": ["0"] * 16}, "shift_factor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_line_for_a_config_that_does_not_fit(name, tmp_path):
    changes, found = WRONG[name]
    folder = write_folder(tmp_path / "vae", golden_config("sd3"), **changes)
    with pytest.raises(UserError) as error:
        ef.load_autoencoder(folder)
    message = str(error.value)
    assert message.startswith(f"--vae {folder}: ") and found in message
    assert "\n" not in message and len(message) < 500 + len(folder)


# --- what follows the autoencoder


def test_latents_of_a_model_have_unit_variance_in_every_channel():
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=5), rng.uniform(0.2, 3, size=5)
    raw = torch.from_numpy(mean[:, None, None] + std[:, None, None] * rng.standard_normal((4, 5, 64, 64)))
    meta = {"latent_scale": (1 / std).tolist(), "latent_shift": mean.tolist()}
    cache = ef.CachedFeatures.__new__(ef.CachedFeatures)
    cache.meta = json.loads(json.dumps(meta))
    latents = cache.latents(torch.cat([raw, torch.zeros_like(raw)], dim=1))
    for channel in range(5):
        expected = (raw[:, channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(latents[:, channel].double(), expected, rtol=1e-5, atol=1e-5)
        assert abs(latents[:, channel].std() - 1) < 0.02 and abs(latents[:, channel].mean()) < 0.02
    decoded = []  # what sample.py gives to the autoencoder
    autoencoder = SimpleNamespace(decode=lambda x: decoded.append(x) or x)
    sample.decode(latents.double(), autoencoder, cache.meta)
    torch.testing.assert_close(decoded[0].double(), raw, rtol=1e-5, atol=1e-5)
    # the noise of the posterior has the channel's scale, and is not shifted
    noisy = cache.latents(torch.cat([raw, torch.ones_like(raw)], dim=1), vae_noise=1)
    torch.testing.assert_close((noisy - latents)[0, :, 0, 0].double(), torch.from_numpy(1 / std))


def test_numbers_and_lists_agree_bit_by_bit():
    moments = torch.randn(3, 8, 4, 4).half()
    cache = ef.CachedFeatures.__new__(ef.CachedFeatures)
    cache.meta = {"latent_scale": 0.18215, "latent_shift": 0.1}
    one = cache.latents(moments, torch.ones(3, 4, 4, 4))
    cache.meta = {"latent_scale": [0.18215] * 4, "latent_shift": [0.1] * 4}
    assert torch.equal(one, cache.latents(moments, torch.ones(3, 4, 4, 4)))


def test_kinds():
    """What files.expect takes for a number per channel, and the other kinds."""
    for good in (1.0, 2, [1.0, 2], []):
        assert files.fits(good, files.PER_CHANNEL)
    for bad in ("1", None, [1.0, "2"], [float("nan")], float("inf"), {"a": 1}, [[1.0]]):
        assert not files.fits(bad, files.PER_CHANNEL)
    assert files.fits("a", {"a", "b"}) and not files.fits(["a"], {"a", "b"}) and files.fits(["a"], [{"a"}])
    one_to_three = range(1, 4)
    assert [files.fits(x, one_to_three) for x in (3, 3.0, True, 4)] == [True, False, False, False]


def test_cache_training_preview_and_sampling(tmp_path, monkeypatch):
    """From images to samples with an E2E-VAE of few channels: 1/16 of the side, 32 channels."""
    monkeypatch.setitem(dit.SIZES, "nano", TINY)
    vae = write_folder(tmp_path / "vae", golden_config("e2e"))
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "src.npz", arr_0=pixels, arr_1=np.arange(24) % 3)
    options = f"--data {tmp_path}/src.npz --out {tmp_path}/cache --vae {vae} --image-size 32 --patch 1"
    ef.main([*options.split(), "--encoder", "hog", "--workers", "0"])

    cache = ef.CachedFeatures(tmp_path / "cache")
    assert cache.meta["latent_channels"] == 32 and cache.meta["latent_side"] == 2
    assert cache.meta["latent_shift"] == golden_config("e2e")["latents_mean"]
    autoencoder = ef.load_autoencoder(vae)
    mean, _ = autoencoder.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
    shift = torch.tensor(golden_config("e2e")["latents_mean"]).view(32, 1, 1)
    std = torch.tensor(golden_config("e2e")["latents_std"]).view(32, 1, 1)
    latents = cache.latents(cache.fixed_batch(24)["moments"])
    by_class = np.argsort(np.arange(24) % 3, kind="stable")
    torch.testing.assert_close(latents, ((mean - shift) / std)[by_class], rtol=0.01, atol=0.01)
    images = sample.decode(latents, autoencoder, cache.meta)
    decoded = (autoencoder.decode(mean[by_class]).clamp(-1, 1) + 1) * 127.5
    assert np.abs(images - decoded.permute(0, 2, 3, 1).numpy()).max() < 3

    # the shared small runs have --model nano/2, whose one token is not this cache's
    monkeypatch.setattr("conftest.SMALL", "--steps 2 --batch-size 8 --workers 0 --sample-every 2".split())
    checkpoint = train(tmp_path / "cache", tmp_path / "run", "--model", "nano/1")
    assert checkpoint["config"]["in_channels"] == 32 and checkpoint["config"]["input_size"] == 2
    assert checkpoint["data"]["latent_scale"] == cache.meta["latent_scale"]
    assert (tmp_path / "run" / "samples-0000002.png").stat().st_size > 0
    sample.main([str(tmp_path / "run"), "--num", "3", "--steps", "2", "--out", str(tmp_path / "out.npz")])
    assert np.load(tmp_path / "out.npz")["arr_0"].shape == (3, 32, 32, 3)
    other = write_folder(tmp_path / "other", golden_config("sd3"))
    with pytest.raises(SystemExit, match="decodes 16 channels to 16 pixels, not 32 to 32"):
        sample.main([str(tmp_path / "run"), "--num", "3", "--out", str(tmp_path / "b.npz"), "--vae", other])
