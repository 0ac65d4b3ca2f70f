"""Stable Diffusion's autoencoder, timm encoders, difficult images, official checkpoints."""

import functools
import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from seeded import fill, uniform

import extract_features as ef
import train_repa
from files import UserError

GOLDEN = np.load(Path(__file__).with_name("golden_vae.npz"))
CHANNELS = [32, 64, 64, 96]


@pytest.fixture
def small_vae(monkeypatch):
    """The autoencoder with a quarter of the channels, everywhere."""
    monkeypatch.setitem(ef.STABLE_DIFFUSION, "block_out_channels", CHANNELS)
    autoencoder = ef.AutoencoderKL()
    autoencoder.load_state_dict(fill(autoencoder.state_dict()))
    return autoencoder


@pytest.fixture
def small_vits(monkeypatch):
    """Every timm model with two blocks of width 64: the families differ in everything else."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", functools.partial(create, depth=2, embed_dim=64, num_heads=2))
    return timm.create_model


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


# --- autoencoder


def test_autoencoder_parameters():
    with torch.device("meta"):
        state = ef.AutoencoderKL().state_dict()
    assert len(state) == 248 and sum(value.numel() for value in state.values()) == 83_653_863
    assert state["encoder.down_blocks.1.resnets.0.conv_shortcut.weight"].shape == (256, 128, 1, 1)
    assert state["decoder.up_blocks.2.upsamplers.0.conv.weight"].shape == (256, 256, 3, 3)
    assert state["encoder.mid_block.attentions.0.to_out.0.weight"].shape == (512, 512)


def test_autoencoder_is_diffusers(small_vae):
    """Golden values of diffusers' AutoencoderKL with the same weights, on images that are not square."""
    mean, std = small_vae.encode(uniform("images", (2, 3, 16, 24)))
    np.testing.assert_allclose(mean, GOLDEN["mean"], atol=1e-5)
    np.testing.assert_allclose(std, GOLDEN["std"], atol=1e-5)
    decoded = small_vae.decode(uniform("latents", (2, 4, 2, 3), -2, 2))
    np.testing.assert_allclose(decoded, GOLDEN["decoded"], atol=5e-5)


def test_slices_do_not_matter(small_vae, monkeypatch):
    images, latents = uniform("images", (3, 3, 16, 16)), uniform("latents", (3, 4, 2, 2))
    whole = (*small_vae.encode(images), small_vae.decode(latents))
    sizes = []
    small_vae.encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(ef.AutoencoderKL, "pixels_at_once", 2 * 16 * 16)
    for a, b in zip(whole, (*small_vae.encode(images), small_vae.decode(latents)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert sizes == [2, 1]


def test_both_key_dialects_and_all_kinds_of_files(small_vae, tmp_path):
    state = small_vae.state_dict()
    old = {}
    for key, value in state.items():
        for new, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f"attentions.0.{new}", f"attentions.0.{name}")
        old[key] = value[:, :, None, None] if "attentions" in key and value.ndim == 2 else value
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in old
    (tmp_path / "folder").mkdir()
    safetensors.torch.save_file(state, tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    torch.save(old, tmp_path / "old.bin")
    for name in ("folder", "old.bin", "folder/diffusion_pytorch_model.safetensors"):
        loaded = ef.load_autoencoder(str(tmp_path / name)).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in loaded.items())


def test_autoencoder_complaints(small_vae, tmp_path, no_network):
    def complain(name):
        with pytest.raises(UserError) as error:
            ef.load_autoencoder(str(name))
        assert "\n" not in str(error.value)
        return str(error.value)

    offline = complain("stabilityai/sd-vae-ft-mse")
    assert "cannot be downloaded" in offline and "pass a folder or file" in offline
    assert "--vae none" in offline and "HF_HUB_OFFLINE=1" in offline
    (tmp_path / "empty").mkdir()
    assert "not readable as weights" in complain(tmp_path / "empty")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pt")
    assert "weights of another architecture" in complain(tmp_path / "other.pt")
    (tmp_path / "text.safetensors").write_text("hello")
    assert "not readable as weights" in complain(tmp_path / "text.safetensors")
    for content in ([], {}, {1: 2}, torch.zeros(3), {"decoder.conv_in.bias": "text"}):
        torch.save(content, tmp_path / "other.pt")
        assert "other.pt" in complain(tmp_path / "other.pt")


def test_config_of_an_autoencoder(small_vae, tmp_path):
    """Scale and shift are those of config.json, for a folder and for the file in it."""
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    safetensors.torch.save_file(small_vae.state_dict(), file)
    for config, expected in (
        ({}, (0.18215, 0.0)),
        ({"_class_name": "AutoencoderKL", "scaling_factor": 0.13025}, (0.13025, 0.0)),  # SDXL
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, (0.3611, 0.1159)),
        ({"scaling_factor": 0.2, "shift_factor": None}, (0.2, 0.0)),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        for name in (tmp_path, file):
            autoencoder = ef.load_autoencoder(str(name))
            assert (autoencoder.scale, autoencoder.shift) == expected
    for text, found in (('{"_class_name": "AutoencoderDC"}', "AutoencoderDC"), ("{", "config.json")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=found):
            ef.load_autoencoder(str(tmp_path))
    assert (ef.AutoencoderKL().scale, ef.AutoencoderKL().shift) == (0.18215, 0)


def test_config_of_a_hub_repository(small_vae, tmp_path, monkeypatch):
    """The hub puts both files into one folder."""
    files = {"diffusion_pytorch_model.safetensors": safetensors.torch.save(small_vae.state_dict())}
    files["config.json"] = b'{"scaling_factor": 0.13025}'

    def download(repository, name):
        assert repository == "stabilityai/sdxl-vae"
        (tmp_path / name).write_bytes(files[name])
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert ef.load_autoencoder("stabilityai/sdxl-vae").scale == 0.13025


# --- encoders

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
FAMILIES = [  # name, patch, tokens before the patches, normalisation, does the last block pass the final norm
    ("vit_small_patch14_dinov2.lvd142m", 14, 1, IMAGENET, True),
    ("vit_base_patch14_reg4_dinov2.lvd142m", 14, 5, IMAGENET, True),
    ("vit_base_patch16_224.dino", 16, 1, IMAGENET, True),
    ("vit_large_patch16_224.mae", 16, 1, IMAGENET, False),
    ("vit_large_patch14_clip_quickgelu_224.openai", 14, 1, CLIP, False),
    ("vit_base_patch16_siglip_224.webli", 16, 0, HALF, True),
    ("vit_huge_patch14_gap_224.in1k_ijepa", 14, 0, IMAGENET, True),
]


@pytest.mark.parametrize("name, patch, prefix, normalisation, norm", FAMILIES, ids=lambda x: str(x)[:40])
def test_encoder_families(name, patch, prefix, normalisation, norm, small_vits, tmp_path):
    """Tokens equal a direct timm call on a tensor prepared by hand; weights have the family's resolution."""
    torch.manual_seed(0)
    native = small_vits(name, num_classes=0)
    for parameter in native.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save(native.state_dict(), tmp_path / "weights.pt")
    encoder = ef.Encoders(name, 4, str(tmp_path / "weights.pt"))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    tokens = encoder(images)
    assert tokens.shape == (2, 16, 64) and encoder.widths == [64] and tokens.dtype == torch.float32

    direct = small_vits(name, num_classes=0, img_size=4 * patch)
    state = dict(native.state_dict())
    if state["pos_embed"].shape != direct.pos_embed.shape:
        table = 0 if getattr(direct, "no_embed_class", False) else prefix  # its rows before the patches
        grid, side = state["pos_embed"][:, table:], int((state["pos_embed"].shape[1] - table) ** 0.5)
        grid = grid.reshape(1, side, side, 64).permute(0, 3, 1, 2)
        grid = torch.nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True)
        state["pos_embed"] = torch.cat([state["pos_embed"][:, :table], grid.flatten(2).mT], dim=1)
    direct.load_state_dict(state)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in normalisation)
    x = torch.stack([(image / 255.0 - mean) / std for image in images])
    x = torch.nn.functional.interpolate(x, size=(4 * patch, 4 * patch), mode="bicubic", align_corners=False)
    outputs = []
    direct.blocks[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        final = direct.eval().forward_features(x)[:, prefix:]
    expected = final if norm else outputs[0][:, prefix:]
    torch.testing.assert_close(tokens, expected.detach(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(final, outputs[0][:, prefix:], atol=1e-2), "the norm makes a difference"
    assert not any(parameter.requires_grad for parameter in encoder.encoders[0].model.parameters())


def test_grid_at_512_pixels(small_vits, tmp_path):
    """512 px: 32 x 32 tokens, a teacher that sees 448 px."""
    native = small_vits("vit_small_patch14_dinov2.lvd142m", num_classes=0)
    torch.save(native.state_dict(), tmp_path / "weights.pt")
    encoder = ef.Encoders("vit_small_patch14_dinov2.lvd142m", 32, str(tmp_path / "weights.pt"))
    assert encoder.encoders[0].side == 448
    assert encoder(torch.zeros(1, 3, 512, 512, dtype=torch.uint8)).shape == (1, 1024, 64)


def test_clip_is_built_with_quick_gelu(small_vits, tmp_path):
    """OpenAI's CLIP has x sigmoid(1.702 x): an MLP computed by hand."""
    name = "vit_large_patch14_clip_quickgelu_224.openai"
    torch.manual_seed(0)
    native = small_vits(name, num_classes=0)
    for parameter in native.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.save(native.state_dict(), tmp_path / "weights.pt")
    encoder = ef.Encoders(name, 4, str(tmp_path / "weights.pt"))
    mlp, seen = encoder.encoders[0].model.blocks[-1].mlp, []
    mlp.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    encoder(torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8))
    x, output = seen[0]
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    expected = (hidden * torch.sigmoid(1.702 * hidden)) @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    gelu = torch.nn.functional.gelu(hidden) @ mlp.fc2.weight.T + mlp.fc2.bias
    assert not torch.allclose(output, gelu, atol=1e-2)


CLIPS = [name for name in timm.list_models("vit_*_clip_*", pretrained=True) if name.endswith(".openai")]


@pytest.mark.parametrize("name", CLIPS)
def test_every_clip_of_openai_is_quick_gelu_or_refused(name, small_vits, no_network):
    """The error names a model that timm has; the right names get as far as the download."""
    with pytest.raises(UserError) as error:
        ef.Encoders(name, 2)
    if "quickgelu" in name:
        assert "downloaded" in str(error.value)
    else:
        assert "QuickGELU" in str(error.value) and str(error.value).split()[-1] in CLIPS


def test_encoder_complaints(small_vits, tmp_path, no_network, monkeypatch):
    def complain(*arguments):
        with pytest.raises(UserError) as error:
            ef.Encoders(*arguments)
        assert "\n" not in str(error.value)
        return str(error.value)

    name = "vit_small_patch14_dinov2.lvd142m"
    offline = complain(name, 4)
    assert "cannot be downloaded" in offline and "pass --encoder-weights FILE" in offline
    torch.save({"blocks.0.attn.qkv.weight": torch.zeros(3)}, tmp_path / "other.pt")
    assert "not weights of" in complain(name, 4, str(tmp_path / "other.pt"))
    torch.save({}, tmp_path / "other.pt")
    assert "other.pt" in complain(name, 4, str(tmp_path / "other.pt"))
    clip = "vit_large_patch14_clip_quickgelu_224.openai"  # timm would leave at random what lacks
    for vit in (name, clip):
        whole = small_vits(vit, num_classes=0).state_dict()
        for key in ("blocks.1.mlp.fc2.bias", "cls_token", "pos_embed", "norm.weight"):
            torch.save({k: v for k, v in whole.items() if k != key}, tmp_path / "part.pt")
            message = complain(vit, 4, str(tmp_path / "part.pt"))
            assert "not weights of" in message and key in message
    assert "not a ViT that timm knows" in complain("vit_of_my_dreams", 4)
    assert "1 files for 2 encoders" in complain(f"{name},hog,vit_base_patch16_224.dino", 4, "one.pt")
    monkeypatch.undo()  # a ResNet has no depth to change
    assert "not a ViT that timm knows" in complain("resnet50", 4)
    swin = "swin_tiny_patch4_window7_224"
    torch.save(timm.create_model(swin, num_classes=0).state_dict(), tmp_path / "swin.pt")
    assert "not a ViT that timm knows" in complain(swin, 8, str(tmp_path / "swin.pt"))


# --- images that ADM's loader would take


def test_difficult_images(tmp_path):
    """Modes, orientations and shapes: converted by PIL, orientation tags ignored, as in ADM."""
    folder = tmp_path / "src" / "all"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6                                                              # to be turned by 90 degrees
    pictures = {
        "alpha.png": colour.convert("RGBA"),
        "bilevel.png": colour.convert("1"),
        "cmyk.jpg": colour.convert("CMYK"),
        "grey.webp": colour.convert("L"),
        "palette.png": colour.convert("P"),
        "rotated.jpg": colour,
        "tiny.png": colour.crop((0, 0, 1, 2)),
        "wide.png": colour.resize((400, 3)),
    }
    for name, picture in pictures.items():
        picture.save(folder / name, **({"exif": exif} if name == "rotated.jpg" else {}))
    images = ef.Images(tmp_path / "src")
    for i, name in enumerate(sorted(pictures)):
        with Image.open(folder / name) as stored:
            assert np.array_equal(ef.to_rgb(images[i]), stored.convert("RGB")), name
        assert ef.center_crop(images[i], 16).size == (16, 16), name
    assert images[5].size == (30, 40), "rotated.jpg"


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled(tmp_path, suffix):
    """Every value, rounded; PIL's own conversion would clip nearly all of them to white."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    with Image.open(tmp_path / f"deep.{suffix}") as stored:
        grey = np.asarray(ef.to_rgb(stored))
    expected = np.round(values.astype(np.float64) / 257)
    assert all(np.array_equal(grey[..., c], expected) for c in range(3))
    big_endian = Image.frombytes("I;16B", (256, 256), values.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(ef.to_rgb(big_endian)), grey)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_images_are_refused(mode):
    with pytest.raises(ValueError, match=f"mode {mode} "):
        ef.to_rgb(Image.new(mode, (4, 4)))


# --- extraction


def extract(data, out, *options):
    base = ["--data", data, "--out", out, "--image-size", 16, "--patch", 1, "--workers", 0, "--batch-size", 4]
    ef.main([str(option) for option in (*base, *options)])


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(2)
    for label in "abc":
        (tmp_path / "src" / label).mkdir(parents=True)
        for i in range(4):
            image = Image.fromarray(rng.integers(0, 256, (20, 17 + i, 3), dtype=np.uint8))
            image.save(tmp_path / "src" / label / f"{i}.png")
    return tmp_path / "src"


def test_extraction_with_autoencoder_and_two_encoders(folder, tmp_path, small_vae, small_vits):
    """Moments and targets of every view are those of the crop, and a run with two projectors trains on it."""
    torch.save(small_vae.state_dict(), tmp_path / "vae.pt")
    name = "vit_small_patch14_dinov2.lvd142m"
    torch.manual_seed(0)
    torch.save(timm.create_model(name, num_classes=0).state_dict(), tmp_path / "vit.pt")
    encoders = ["--encoder", f"hog,{name}", "--encoder-weights", tmp_path / "vit.pt"]
    extract(folder, tmp_path / "out", "--vae", tmp_path / "vae.pt", *encoders, "--flip")
    features = ef.CachedFeatures(tmp_path / "out")
    assert features.meta["latent_scale"] == 0.18215 and features.meta["target_widths"] == [82, 64]
    batch = features.__getitems__([9])                                            # image 4, mirrored
    crop = np.asarray(ef.center_crop(ef.Images(folder)[4], 16)).transpose(2, 0, 1)[:, :, ::-1].copy()
    mean, std = small_vae.encode(torch.from_numpy(crop)[None] / 127.5 - 1)
    np.testing.assert_allclose(batch["moments"][0], torch.cat([mean, std], 1)[0], atol=2e-3)
    tokens = ef.Encoders(name, 2, str(tmp_path / "vit.pt"))(torch.from_numpy(crop)[None])[0]
    np.testing.assert_allclose(batch["targets"][0, :, 82:], tokens, atol=1e-2)
    hog = ef.HOG(2)(torch.from_numpy(crop)[None])[0]
    np.testing.assert_allclose(batch["targets"][0, :, :82], hog, atol=1e-3)
    run = "--model nano/1 --steps 2 --batch-size 8 --workers 0".split()
    train_repa.main(["--data", str(tmp_path / "out"), "--out", str(tmp_path / "run"), *run])
    heads = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["heads"]
    assert [len(heads[f"alignment.projectors.{k}.4.bias"]) for k in (0, 1)] == [82, 64]
    assert Image.open(tmp_path / "run" / "samples-0000002.png").size == (3 * 52 - 4, 4 * 52 - 4)


def test_int8_targets_of_an_encoder_barely_move_the_loss(small_vits):
    torch.manual_seed(0)
    targets, projected = torch.randn(64, 16, 768) * torch.rand(64, 16, 1) * 5, torch.randn(64, 16, 768)
    projected = projected + targets
    small = ef.to_int8(targets)
    cosine = torch.nn.functional.cosine_similarity(small.float(), targets, dim=-1)
    assert cosine.min() >= 0.9995
    losses = [train_repa.repa_loss([projected], [z]).item() for z in (targets, small)]
    assert losses[0] < -0.5 and losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_limit_takes_an_even_part(folder, tmp_path):
    extract(folder, tmp_path / "out", "--vae", "none", "--encoder", "none", "--limit", 6)
    features = ef.CachedFeatures(tmp_path / "out", targets=False)
    assert features.labels.tolist() == [0, 0, 1, 1, 2, 2] and features.meta["classes"] == ["a", "b", "c"]
    with pytest.raises(SystemExit, match="--limit 13: the source has 12 images"):
        extract(folder, tmp_path / "more", "--vae", "none", "--encoder", "none", "--limit", 13)


def test_skip_bad(folder, tmp_path, capsys):
    (folder / "b" / "2.png").write_bytes(b"no picture")
    options = ["--vae", "none", "--encoder", "hog", "--flip"]
    with pytest.raises(SystemExit, match="b/2.png .*--skip-bad"):
        extract(folder, tmp_path / "out", *options)
    extract(folder, tmp_path / "out", *options, "--skip-bad")  # continues where the other stopped
    assert "skipped" in capsys.readouterr().err
    features = ef.CachedFeatures(tmp_path / "out")
    assert len(features) == 22
    assert features.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    batch = features.__getitems__(range(22))
    assert batch["labels"].tolist() == np.repeat(features.labels, 2).tolist()
    crop = np.asarray(ef.center_crop(ef.Images(folder)[7], 16)).transpose(2, 0, 1)
    np.testing.assert_allclose(batch["moments"][12, :3], crop / 127.5 - 1, atol=2**-11)


def test_other_weights_of_the_encoder_are_refused(folder, tmp_path, small_vits):
    """A killed extraction does not go on with another encoder of the same shape."""
    name = "vit_small_patch14_dinov2.lvd142m"
    options = ["--vae", "none", "--encoder", name, "--encoder-weights", tmp_path / "vit.pt"]
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(timm.create_model(name, num_classes=0).state_dict(), tmp_path / "vit.pt")
        if seed == 0:
            extract(folder, tmp_path / "out", *options)
            continue
        with pytest.raises(SystemExit, match="encoder_digest"):
            extract(folder, tmp_path / "out", *options)
