"""MIND and the Frechet distance in other spaces: slow loops, closed forms, torch-fidelity, plain code."""

import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import timm
import torch
from conftest import ROOT
from golden_fid.images import FOLDER
from PIL import Image
from safetensors.torch import save_file
from test_fid import folder, full_rank_features, gaussian, noise, run, tiny  # noqa: F401

import fid

WIDTHS = {"convnext": 1024, "dinov2": 1024, "mae": 1024, "siglip": 1152, "clip": 1024}
CENTRE = {"dinov2": "token", "mae": "token", "siglip": "map", "clip": "token"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with random weights of three tiny models, under the short names of TINY."""
    path = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for space, (name, *_) in TINY.items():
            if name:
                net = timm.create_model(name)
                for parameter in net.parameters():  # gamma, scales and biases of 0 or 1 hide mistakes
                    parameter.data += 0.1 * torch.randn_like(parameter)
                save_file(net.state_dict(), path / f"{space}.safetensors")
                torch.save({"model": net.state_dict()}, path / f"{space}.pth")
    return path


TINY = {
    "inception": (None, 299, 2.0),
    "convnext": ("test_convnext.r160_in1k", 64, 4.0),
    "dinov2": ("test_vit.r160_in1k", 72, 0.5),  # 72 is not a multiple of its patch of 16
    "siglip": ("test_vit3.r160_in1k", 96, 8.0),
}


@pytest.fixture
def catalogue(monkeypatch):
    monkeypatch.setattr(fid, "SPACES", TINY)


# ---- MIND


def slow_mind(x, y, lines):
    """One line after the other, one number after the other, in fp64."""
    total = 0
    for line in lines.double():
        a, b = (sorted((z.double() @ line / line.norm()).tolist()) for z in (x, y))
        total += sum((i - j) ** 2 for i, j in zip(a, b, strict=True)) / len(a)
    return 3 * x.shape[1] * total / len(lines)


def test_mind_equals_a_loop():
    ref, sample = (x[:40, :30] for x in full_rank_features())
    lines = torch.randn(120, 30, generator=torch.Generator().manual_seed(2020))
    expected = slow_mind(ref, sample, lines)
    assert fid.monge_distance(ref, sample, lines=120) == pytest.approx(expected, rel=1e-5)
    assert fid.monge_distance(ref, ref) == 0


def test_mind_in_one_dimension_is_optimal_transport():
    """There, all directions are 1 or -1. The best assignment is found without sorting anything."""
    rs = np.random.RandomState(0)
    x, y = rs.randn(50, 1), rs.rand(50, 1) * 3
    cost = (x - y.T) ** 2
    expected = 3 * cost[scipy.optimize.linear_sum_assignment(cost)].mean()
    ours = fid.monge_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert ours == pytest.approx(expected, rel=1e-5)


def test_mind_of_gaussians_has_a_closed_form():
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(1))
    shift = torch.linspace(-1, 2, 64)
    # a shift by s: 3 D E (u.s)^2 = 3 |s|^2, and a scale by 2: 3 D E |u.x|^2, about 3 D
    assert fid.monge_distance(x, x + shift) == pytest.approx(3 * shift.square().sum().item(), rel=0.15)
    assert fid.monge_distance(x, 2 * x) == pytest.approx(3 * 64, rel=0.02)
    y = torch.randn(4000, 64, generator=torch.Generator().manual_seed(2))
    assert fid.monge_distance(x, y) < 0.01 * 3 * 64  # two draws of one distribution


def test_mind_is_torch_fidelitys():
    golden = json.loads((FOLDER / "mind.json").read_text())
    ref, sample = full_rank_features()
    ours = fid.monge_distance(ref, sample)
    assert ours == pytest.approx(golden["mind"], rel=1e-6)
    assert fid.monge_distance(sample, ref) == ours  # which set is larger does not matter
    assert fid.monge_distance(ref[:1000], sample) == pytest.approx(golden["equal_sizes"], rel=1e-6)
    others = golden["seeds 0 to 4"]
    assert abs(ours - np.mean(others)) < 3 * np.std(others)


def test_mind_of_a_run_and_its_floor(tiny, tmp_path):  # noqa: F811
    images, other = noise(20), noise(9, seed=1)
    np.savez(tmp_path / "ref.npz", arr_0=images)
    np.savez(tmp_path / "a.npz", arr_0=other)
    result = run(tmp_path / "ref.npz", tmp_path / "a.npz", out=tmp_path)
    pooled, samples = (tiny()(torch.from_numpy(x).permute(0, 3, 1, 2))[0] for x in (images, other))
    assert result["mind"] == pytest.approx(fid.monge_distance(pooled, samples), rel=1e-5)
    order = np.random.RandomState(0).permutation(20)
    floor = fid.monge_distance(pooled[order[9:]], pooled[order[:9]])
    assert result["floor"]["mind"] == pytest.approx(floor, rel=1e-5) and floor > 0

    fid.main(["--stats", str(tmp_path / "a.npz"), "--out", str(tmp_path / "b.npz")])
    stored = dict(np.load(tmp_path / "b.npz"))
    del stored["arr_0"]
    np.savez(tmp_path / "b.npz", **stored)
    assert run(tmp_path / "b.npz", tmp_path / "a.npz", out=tmp_path)["mind"] is None  # no images


# ---- the spaces


def test_the_catalogue_is_that_of_fdr6():
    assert [space[2] for space in fid.SPACES.values()] == [1.68, 56.87, 14.19, 0.04, 0.60, 5.60]
    assert [space[1] for space in fid.SPACES.values()] == [299, 224, 256, 224, 224, 256]
    assert {name for name, *_ in fid.SPACES.values() if name} <= set(timm.list_pretrained())
    assert list(fid.SPACES) == ["inception", *WIDTHS]


@pytest.mark.parametrize("space", WIDTHS)
def test_real_models_without_their_weights(space, monkeypatch):
    """On the meta device, where nothing is computed: what is asked of timm, and the widths."""
    create, asked = timm.create_model, []

    def unloaded(name, pretrained, **options):
        asked.append((name, pretrained))
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", unloaded)
    with torch.device("meta"):
        model = fid.TimmFeatures(space, None)
        (x,) = model(torch.zeros(2, 3, 256, 256, dtype=torch.uint8))
    assert asked == [(fid.SPACES[space][0], True)]
    assert x.shape == (2, WIDTHS[space]) and model.widths == {"fid": WIDTHS[space]}
    assert getattr(model.net, "global_pool", None) == CENTRE.get(space)
    assert str(fid.SPACES[space][1]) in model.name and not model.training


def prepared(images, side, net):
    """PIL's bicubic resize of floats, then the normalisation of the model: [N, 3, side, side]."""
    batch = []
    for image in images:
        channels = [Image.fromarray(image[..., c].astype(np.float32) / 255) for c in range(3)]
        channels = [np.asarray(c.resize((side, side), Image.Resampling.BICUBIC)) for c in channels]
        batch.append(np.stack(channels))
    mean, std = (np.float32(net.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    return torch.from_numpy((np.stack(batch) - mean) / std)


def plain_features(space, images, weights):
    """The features of TINY's models, put together by hand: float64 [N, D]."""
    name, side, _ = TINY[space]
    net = timm.create_model(name).eval()
    net.load_state_dict(torch.load(weights / f"{space}.pth", weights_only=True)["model"])
    x = prepared(images, side, net)
    with torch.no_grad():
        if space == "convnext":
            for part in (net.stem, *net.stages):
                x = part(x)
            return x.flatten(2).mean(2).double().numpy()
        patch = net.patch_embed.proj.stride[0]
        x = torch.nn.functional.pad(x, (0, -side % patch, 0, -side % patch))
        grid = -(-side // patch)
        x = net.patch_embed.proj(x).flatten(2).mT
        table = net.pos_embed[:, net.pos_embed.shape[1] - 100 :]  # of 10 x 10 patches
        table = table.unflatten(1, (10, 10)).permute(0, 3, 1, 2)
        table = torch.nn.functional.interpolate(table, (grid, grid), mode="bicubic", antialias=True)
        table = table.flatten(2).mT
        first = net.reg_token if net.cls_token is None else net.cls_token
        x = torch.cat([first.expand(len(x), -1, -1), x], 1)
        x = x + torch.cat([net.pos_embed[:, :1], table], 1)
        x = net.norm(net.blocks(net.norm_pre(x)))
        x = net.attn_pool(x) if net.attn_pool is not None else x[:, 0]
    return x.double().numpy()


def sqrtm_distance(x, y):
    (mu1, sigma1), (mu2, sigma2) = gaussian(x), gaussian(y)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)


def sets(tmp_path, size=40):
    images, other = noise(130, size), noise(120, size, seed=1)
    np.savez(tmp_path / "ref.npz", arr_0=images)
    np.savez(tmp_path / "a.npz", arr_0=other)
    return images, other


@pytest.mark.parametrize("space", ["convnext", "dinov2", "siglip"])
def test_distance_against_plain_code(space, weights, catalogue, tmp_path):
    images, other = sets(tmp_path)
    x, y = (plain_features(space, z, weights) for z in (images, other))
    model = fid.TimmFeatures(space, weights / f"{space}.pth")
    ours = model(torch.from_numpy(images).permute(0, 3, 1, 2))[0].numpy()
    assert np.linalg.norm(ours - x) < 1e-4 * np.linalg.norm(x)
    assert len(x) > x.shape[1] and np.linalg.norm(x - x.mean(0)) > 0.01 * np.linalg.norm(x)

    argv = (tmp_path / "ref.npz", tmp_path / "a.npz", "--features", space)
    result = run(*argv, "--features-weights", weights / f"{space}.pth", out=tmp_path)
    assert result["fid"] == pytest.approx(sqrtm_distance(x, y), rel=1e-3)
    mind = fid.monge_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert result["mind"] == pytest.approx(mind, rel=1e-3)
    assert result["sfid"] is result["inception_score"] is None and result["floor"]["fid"] > 0
    found = result["protocol"]["features"]
    assert TINY[space][0] in found["network"]
    assert found["weights_sha256"] == fid.file_hash(weights / f"{space}.pth")
    # the folder, and timm's own name of the model
    argv = (tmp_path / "ref.npz", tmp_path / "a.npz", "--features", TINY[space][0])
    again = run(*argv, "--features-weights", weights, out=tmp_path)
    assert {key: again[key] for key in fid.METRICS} == {key: result[key] for key in fid.METRICS}


def test_a_model_outside_the_catalogue_has_its_own_size(weights):
    model = fid.TimmFeatures("test_vit.r160_in1k", weights / "dinov2.pth")
    assert model.side == 160 and model(torch.zeros(1, 3, 9, 9))[0].shape == (1, 64)


# ---- FDr^6, references


def test_fdr6(weights, catalogue, tiny, tmp_path, capsys):  # noqa: F811
    """Every distance is that of a run of its own, for images and for stored statistics."""
    images, _ = sets(tmp_path, 24)
    np.savez(tmp_path / "b.npz", arr_0=noise(30, 24, seed=2))
    paths = [tmp_path / name for name in ("ref.npz", "a.npz", "b.npz")]
    offline = ("--features-weights", weights)
    result = run(*paths, "--fdr6", *offline, out=tmp_path)
    out, err = capsys.readouterr()
    alone = {}
    for space in TINY:
        more = () if space == "inception" else ("--features", space, *offline)
        alone[space] = run(*paths, *more, out=tmp_path)["sets"]
    for i, row in enumerate(result["sets"]):
        for space, (_, _, validation) in TINY.items():
            assert row["fd"][space] == pytest.approx(alone[space][i]["fid"], abs=1e-6)
            assert row["ratio"][space] == pytest.approx(row["fd"][space] / validation)
        assert row["fdr6"] == pytest.approx(np.mean(list(row["ratio"].values())))
        assert row["set"] == str(paths[i + 1])
        assert "test_vit3" in row["protocol"]["features"]["siglip"]
    lines = out.splitlines()
    assert lines[0].split() == [*TINY, "mean"]
    first, second = result["sets"][0], lines[2].split()
    assert lines[1].split() == [*[f"{first['fd'][space]:.4f}" for space in TINY], "-", str(paths[1])]
    assert second[:5] == [f"{x:.4f}" for x in (*first["ratio"].values(), first["fdr6"])]
    assert err.count("24 x 24") == 3 and "256 x 256" in err

    capsys.readouterr()
    argv = ["--stats", paths[0], "--fdr6", *offline, "--out", tmp_path / "six.npz", "--device", "cpu"]
    fid.main(list(map(str, argv)))
    names = {"mu", "sigma", "mu_s", "sigma_s", "arr_0"}
    assert set(np.load(tmp_path / "six.npz")) == names | {
        f"{x}_{space}" for x in ("mu", "sigma") for space in ("convnext", "dinov2", "siglip")
    }
    stored = run(tmp_path / "six.npz", *paths[1:], "--fdr6", *offline, out=tmp_path)["sets"]
    for row, expected in zip(stored, result["sets"], strict=True):
        assert row["fd"] == pytest.approx(expected["fd"], abs=1e-6)
        assert row["protocol"]["reference"]["statistics"] == "stored"
    one = run(tmp_path / "six.npz", paths[1], "--features", "siglip", *offline, out=tmp_path)
    assert one["fid"] == pytest.approx(first["fd"]["siglip"], abs=1e-6)
    assert one["mind"] == pytest.approx(alone["siglip"][0]["mind"], rel=1e-5)


def test_spaces_are_not_mixed(weights, catalogue, tiny, tmp_path):  # noqa: F811
    sets(tmp_path)
    ref, offline = str(tmp_path / "ref.npz"), ["--features-weights", str(weights), "--device", "cpu"]
    for name, more in (("adm", []), ("dino", ["--features", "dinov2", *offline])):
        fid.main(["--stats", ref, "--out", str(tmp_path / f"{name}.npz"), *more])
    cases = [
        ("adm", ["--features", "dinov2", *offline], "sigma .*dinov2.* --stats"),
        ("adm", ["--fdr6", *offline], "sigma .*convnext.* --stats"),
        ("dino", ["--features", "siglip", *offline], "sigma_dinov2.*siglip.* --stats"),
        ("dino", [], "sigma_dinov2.*inception.* --stats"),
    ]
    for name, more, message in cases:
        with pytest.raises(SystemExit, match=f"^fid.py: .*{name}.npz.*{message}") as error:
            fid.main([str(tmp_path / f"{name}.npz"), str(tmp_path / "a.npz"), *more])
        assert "\n" not in error.value.code
    argv = (tmp_path / "dino.npz", tmp_path / "a.npz", "--features", "pixels")
    assert run(*argv, out=tmp_path)["fid"] > 0  # pixels have no statistics to mix


def test_sets_of_two_sizes_are_named(tiny, tmp_path, capsys):  # noqa: F811
    np.savez(tmp_path / "ref.npz", arr_0=noise(8, 32))
    np.savez(tmp_path / "a.npz", arr_0=noise(8, 64))
    np.savez(tmp_path / "b.npz", arr_0=noise(8, 32, seed=1))
    run(*[tmp_path / name for name in ("ref.npz", "a.npz", "b.npz")], out=tmp_path)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if " x " in line]
    assert "a.npz" in line and "64 x 64" in line and "32 x 32" in line and "ref.npz" in line


BAD = {
    "no_such_net": (["--features", "no_such_net"], "--features no_such_net.*Unknown model"),
    "another model": (["--features", "dinov2", "--features-weights", "siglip.pth"], "siglip.pth"),
    "a classifier missing": (["--features", "dinov2", "--features-weights", "short.pth"], "head.weight"),
    "text": (["--features", "dinov2", "--features-weights", "text.pth"], "text.pth"),
    "no file": (["--features", "dinov2", "--features-weights", "none.pth"], "none.pth"),
    "not in the folder": (["--fdr6", "--features-weights", "empty"], "empty/convnext.safetensors"),
    "two flags": (["--fdr6", "--features", "dinov2"], "--features"),
    "no model": (["--features-weights", "text.pth"], "--features-weights"),
    "weights of pixels": (["--features", "pixels", "--features-weights", "text.pth"], "--features-weights"),
    "empty": (["--features", ""], "--features"),
    "three images": (["--features", "dinov2"], "three.npz: holds 3 images"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, weights, catalogue, tiny, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", arr_0=noise(4))
    np.savez("three.npz", arr_0=noise(3))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "siglip.pth").write_bytes((weights / "siglip.pth").read_bytes())
    state = torch.load(weights / "dinov2.pth", weights_only=True)["model"]
    del state["head.weight"]
    torch.save(state, "short.pth")
    flags, message = BAD[name]
    monkeypatch.setattr(fid, "measure", None)  # nothing is measured
    samples = "three.npz" if name == "three images" else "a.npz"
    with pytest.raises(SystemExit, match=message) as error:
        fid.main(["a.npz", samples, *flags, "--device", "cpu"])
    assert error.value.code.startswith("fid.py: ") and "\n" not in error.value.code


def test_the_file_alone_needs_no_timm(tmp_path):
    """In an empty folder, in a Python that has no timm: all works but --features of timm."""
    (tmp_path / "fid.py").write_text((ROOT / "fid.py").read_text())
    np.savez(tmp_path / "a.npz", arr_0=noise(8))
    code = "import sys; sys.modules['timm'] = sys.modules['safetensors'] = None; import fid; fid.main()"
    for features, expected in (("pixels", "1.0000"), ("dinov2", "--features vit_large_patch14_dinov2")):
        line = [sys.executable, "-c", code, "a.npz", "a.npz", "--features", features, "--device", "cpu"]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
        assert expected in done.stdout + done.stderr and "Traceback" not in done.stderr
        assert (done.returncode == 0) == (features == "pixels")
    assert "timm" in done.stderr and len(done.stderr.splitlines()) == 1
