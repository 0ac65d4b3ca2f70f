"""fid.py against golden values of the TensorFlow evaluator, closed forms and slow loops.

FID_GOLDEN=1 adds the full comparison on 300 + 300 images (five to ten minutes on one core).
"""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT, command_line, run_ranks
from conftest import run as launch
from golden_fid.images import FOLDER, images64, weights
from PIL import Image

import fid

ROWS = np.load(FOLDER / "rows64.npz")  # the evaluator's features of the first 8 images of each set
PIXELS = ("--features", "pixels")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """LAPACK's small parallel loops wait for each other for seconds when the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def net():
    model = fid.InceptionV3()
    state = weights({name: value.shape for name, value in model.state_dict().items()})
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return model


@pytest.fixture(scope="module")
def weights_file(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(
        {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}, path
    )
    return path


@pytest.fixture
def tiny(monkeypatch):
    """The command line with a linear map of two mean colours in place of Inception: it is fast."""

    class Tiny(torch.nn.Module):
        name = "two mean colours"
        widths = {"fid": 6, "sfid": 3}

        def __init__(self):
            super().__init__()
            self.mix, self.fc = torch.nn.Linear(6, 6), torch.nn.Linear(6, 4)
            rs = np.random.RandomState(0)
            for p in self.parameters():
                p.requires_grad_(False).copy_(torch.from_numpy(rs.randn(*p.shape)))

        def forward(self, images):
            halves = torch.nn.functional.adaptive_avg_pool2d(images.float(), (2, 1)).flatten(1) / 16
            return self.mix(halves), halves[:, :3]

    monkeypatch.setattr(fid, "InceptionV3", Tiny)
    monkeypatch.setattr(fid, "load_weights", lambda model, path: "0123")
    return Tiny


def noise(n, size=16, seed=0):
    shape = (n, size, size, 3)
    rs = np.random.RandomState(seed)
    return np.clip(rs.randint(0, 256, (n, 1, 1, 3)) + rs.randint(-60, 60, shape), 0, 255).astype(
        np.uint8
    )


def run(*argv, out=None):
    """fid.main with a JSON file -> its contents."""
    path = Path(out) / "result.json"
    fid.main([*map(str, argv), "--device", "cpu", "--json", str(path)])
    return json.loads(path.read_text())


def gaussian(x):
    return x.astype(np.float64).mean(0), np.cov(x.astype(np.float64), rowvar=False)


def exact_frechet(x, y):
    """Exact for singular covariances, too: the trace is a nuclear norm of centred rows' product."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    a, b = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    trace = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * trace


def loop_precision_recall(reference, samples, k):
    def radius(rows, row):
        return sorted(((rows - row) ** 2).sum(1))[k]

    def share(points, manifold):
        radii = [radius(manifold, row) for row in manifold]
        balls = list(zip(manifold, radii, strict=True))
        return np.mean([any(((m - p) ** 2).sum() <= r for m, r in balls) for p in points])

    return share(samples, reference), share(reference, samples)


def loop_inception_score(p, split):
    scores = []
    for start in range(0, len(p), split):
        part = p[start : start + split].astype(np.float64)
        marginal = part.mean(0)
        kl = [
            sum(q * np.log(q / m) for q, m in zip(row, marginal, strict=True) if q > 0)
            for row in part
        ]
        scores.append(np.exp(np.mean(kl)))
    return np.mean(scores)


def full_rank_features():
    rs = np.random.RandomState(77)
    mix = rs.uniform(-1, 1, (48, 512)) * np.linspace(1, 0.05, 48)[:, None]

    def features(n, shift, scale):
        z = rs.uniform(-1, 1, (n, 48)) * scale + shift
        x = np.maximum(0, 0.35 + 0.22 * (z @ mix) + 0.12 * rs.uniform(-1, 1, (n, 512)))
        return torch.from_numpy(x.astype(np.float32))

    return features(1300, 0, 1), features(1000, 0.06, 0.92)


# ---- resize and network


@pytest.mark.parametrize("h, w", [(64, 64), (256, 256), (512, 512), (48, 80)])
def test_resize_is_bit_equal_to_a_scalar_loop(h, w):
    image = np.random.RandomState(h + w).randint(0, 256, (h, w)).astype(np.uint8)
    f32, pixels = np.float32, [[np.float32(v) for v in row] for row in image]
    expected = np.empty((299, 299), np.float32)
    for i in range(299):
        y = f32(i) * (f32(h) / f32(299))
        y0 = int(y)
        fy, y1 = y - f32(y0), min(y0 + 1, h - 1)
        for j in range(299):
            x = f32(j) * (f32(w) / f32(299))
            x0 = int(x)
            fx, x1 = x - f32(x0), min(x0 + 1, w - 1)
            top = pixels[y0][x0] + (pixels[y0][x1] - pixels[y0][x0]) * fx
            bottom = pixels[y1][x0] + (pixels[y1][x1] - pixels[y1][x0]) * fx
            expected[i, j] = top + (bottom - top) * fy
    images = torch.from_numpy(np.stack([image, image[::-1].copy(), image]))[None]
    assert np.array_equal(fid.tf1_resize(images, 299)[0, 0].numpy(), expected)
    half_pixel = torch.nn.functional.interpolate(images.float(), (299, 299), mode="bilinear")[0, 0]
    assert np.abs(half_pixel.numpy() - expected).max() > 1  # the usual mistake does not pass


def test_resize_at_299_is_the_identity():
    images = torch.from_numpy(noise(1, 299)).permute(0, 3, 1, 2)
    assert torch.equal(fid.tf1_resize(images, 299), images.float())


def test_network_has_the_tensors_of_the_published_file(net):
    published = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert len(published) == 472 and sum(v.numel() for v in published.values()) == 23_885_392
    assert net.load_state_dict(published)  # strict, though the counters are missing
    assert "Mixed_6d.branch7x7dbl_5.bn.running_var" in published
    assert "Mixed_7c.branch3x3dbl_3b.conv.weight" in published


def test_features_match_the_evaluator(net, tmp_path):
    path = tmp_path / "images.npz"
    args = fid.parse_args([str(path), str(path), "--batch-size", "4", "--device", "cpu"])
    for kind in ("ref", "sample"):
        np.savez(path, arr_0=images64(kind, 6))
        source = fid.open_source(path, args)
        measured = fid.measure(source, "inception", net, args, rank=0, world=1)
        pooled, spatial = measured.features["fid"], measured.features["sfid"]
        golden = [ROWS[f"{kind}_{name}"][:6].reshape(6, -1) for name in ("pool3", "spatial")]
        assert np.abs(pooled.numpy() - golden[0]).max() < 3e-4
        assert np.linalg.norm(pooled.numpy() - golden[0]) < 5e-5 * np.linalg.norm(golden[0])
        assert np.linalg.norm(spatial.numpy() - golden[1]) < 5e-5 * np.linalg.norm(golden[1])
        for name, expected in zip(("fid", "sfid"), map(gaussian, golden), strict=True):
            ours = [x.numpy() for x in measured.statistics[name]]
            assert np.abs(ours[0] - expected[0]).max() < 3e-4
            assert np.linalg.norm(ours[1] - expected[1]) < 1e-4 * np.linalg.norm(expected[1])
        softmax = (
            (pooled @ net.fc.weight.T).softmax(1).numpy()
        )  # the bias is large: its use would show
        assert np.abs(softmax - ROWS[f"{kind}_softmax"][:6]).max() < 1e-4


@pytest.mark.skipif("FID_GOLDEN" not in os.environ, reason="five minutes; set FID_GOLDEN=1")
def test_golden64(weights_file, tmp_path):
    golden = json.loads((FOLDER / "metrics64.json").read_text())
    for kind in ("ref", "sample"):
        np.savez(tmp_path / f"{kind}.npz", arr_0=images64(kind, 300))
    logits, score = [], fid.inception_score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "inception_score", lambda x: logits.append(x) or score(x))
        result = run(
            tmp_path / "ref.npz", tmp_path / "sample.npz", "--weights", weights_file, out=tmp_path
        )
        argv = (
            tmp_path / "ref.npz",
            tmp_path / "sample.npz",
            "--weights",
            weights_file,
            "--fp32-distances",
        )
        fp32 = run(*argv, out=tmp_path)
    print({k: v for k, v in result.items() if k != "protocol"}, fp32["precision"], fp32["recall"])
    assert result["fid"] == pytest.approx(golden["main_stdout"]["FID"], abs=1e-3)
    assert fid.file_hash(weights_file) == result["protocol"]["features"]["weights_sha256"]
    assert result["sfid"] == pytest.approx(golden["main_stdout"]["sFID"], abs=1e-3)
    for split, value in golden["is_split"].items():
        print(split, score(logits[0], int(split)) / value - 1)
        assert score(logits[0], int(split)) == pytest.approx(value, rel=1e-6)
    assert result["precision"] == pytest.approx(golden["main_stdout"]["Precision"], abs=3.01 / 300)
    assert result["recall"] == pytest.approx(golden["main_stdout"]["Recall"], abs=3.01 / 300)
    expected = golden["prec_recall_features_x16_fp32_fallback"]
    assert [fp32["precision"], fp32["recall"]] == pytest.approx(expected)


# ---- Frechet distance


def test_frechet_of_commuting_gaussians_has_a_closed_form():
    rs = np.random.RandomState(1)
    q = np.linalg.qr(rs.randn(40, 40))[0]
    a, b = rs.uniform(0, 9, 40), rs.uniform(0, 9, 40)
    a[:10], b[5:15] = 0, 0  # singular, with different null spaces
    mu1, mu2 = rs.randn(40), rs.randn(40)
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    sigma1, sigma2 = (q * a) @ q.T, (q * b) @ q.T
    # a null direction leaves the square root of the rounding error, here about 1e-7
    assert fid.frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, abs=1e-5)
    assert fid.frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(expected, abs=1e-5)


def test_frechet_full_rank():
    ref, sample = (gaussian(x.numpy()) for x in full_rank_features())
    assert fid.frechet_distance(*ref, *sample) == pytest.approx(
        2.13444637167, abs=1e-9
    )  # as the evaluator
    assert abs(fid.frechet_distance(*ref, *ref)) < 1e-6
    (mu1, sigma1), (mu2, sigma2) = ((mu[:100], sigma[:100, :100]) for mu, sigma in (ref, sample))
    trace = np.trace(sigma1 + sigma2 - 2 * scipy.linalg.sqrtm(sigma1 @ sigma2).real)
    expected = ((mu1 - mu2) ** 2).sum() + trace
    assert fid.frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n, m", [(30, 20), (30, 900), (900, 30)])
def test_frechet_with_fewer_images_than_features(n, m):
    x, y = (x.numpy()[:rows] for x, rows in zip(full_rank_features(), (n, m), strict=True))
    assert fid.frechet_distance(*gaussian(x), *gaussian(y)) == pytest.approx(
        exact_frechet(x, y), abs=1e-5
    )
    assert abs(fid.frechet_distance(*gaussian(x), *gaussian(x))) < 1e-6


def test_frechet_rejects_shapes():
    with pytest.raises(ValueError, match=r"\[3\], \[4, 4\]"):
        fid.frechet_distance(np.zeros(3), np.eye(3), np.zeros(3), np.eye(4))


# ---- Inception Score, precision and recall


def test_inception_score():
    rs = np.random.RandomState(2)
    logits = torch.from_numpy(rs.randn(70, 9).astype(np.float32) * 2)
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    for split in (5000, 32, 7):
        assert fid.inception_score(logits, split) == pytest.approx(
            loop_inception_score(p, split), rel=1e-9
        )
    assert fid.inception_score(torch.zeros(10, 6)) == pytest.approx(1)
    # one certain image per class; exp(-200) underflows in fp32, where the original gives NaN
    assert fid.inception_score(torch.eye(7) * 200) == pytest.approx(7)


def test_precision_recall_equals_a_loop():
    rs = np.random.RandomState(3)
    # integers: exact in fp16, with ties
    reference, samples = rs.randint(-4, 5, (40, 3)), rs.randint(-2, 7, (30, 3))
    for k in (1, 3):
        expected = loop_precision_recall(reference, samples, k)
        tensors = torch.from_numpy(reference).float(), torch.from_numpy(samples).float()
        assert fid.precision_recall(*tensors, k=k) == pytest.approx(expected)
        assert fid.precision_recall(*tensors, k=k, fp16=False) == pytest.approx(expected)
        assert fid.precision_recall(*tensors[::-1], k=k) == pytest.approx(expected[::-1])
    assert 0 < expected[0] != expected[1] < 1
    with pytest.raises(ValueError, match="more than 3 rows: 40, 3"):
        fid.precision_recall(tensors[0], tensors[1][:3])


def test_precision_recall_matches_the_evaluator(monkeypatch):
    ref, sample = full_rank_features()
    exact = (0.971, 0.6546154)
    assert fid.precision_recall(ref, sample, fp16=False) == pytest.approx(exact, abs=1e-7)
    precision, recall = fid.precision_recall(ref, sample)
    assert precision == pytest.approx(0.973, abs=3.01 / 1000)
    assert recall == pytest.approx(0.660, abs=3.01 / 1300)
    assert (precision, recall) != pytest.approx(exact, abs=1e-7)  # fp16 does round
    assert fid.precision_recall(ref * 64, sample * 64) == pytest.approx(
        exact, abs=1e-7
    )  # overflow: fp32
    monkeypatch.setattr(fid, "PR_BLOCK", 300)
    assert fid.precision_recall(ref, sample) == (precision, recall)
    assert fid.precision_recall(sample, ref) == (recall, precision)


# ---- files


def test_all_containers_give_the_same_numbers(tmp_path):
    a, b = noise(9), noise(7, seed=1)
    np.savez(tmp_path / "ref.npz", arr_0=b)
    np.savez(tmp_path / "stored.npz", arr_0=a)
    np.savez_compressed(tmp_path / "deflated.npz", arr_0=a)
    np.save(tmp_path / "lone.npy", a)
    (tmp_path / "folder" / "x").mkdir(parents=True)
    for i, image in enumerate(a):
        Image.fromarray(image).save(tmp_path / "folder" / "x" / f"{i}.png")
    means = [x.astype(np.float64).mean(3).reshape(-1, 8, 2, 8, 2).mean((2, 4)) for x in (b, a)]
    grey = [x.reshape(-1, 64) / 255 for x in means]
    for name in ("stored.npz", "deflated.npz", "lone.npy", "folder"):
        for batch_size in (4, 64):
            argv = (tmp_path / "ref.npz", tmp_path / name, *PIXELS, "--batch-size", batch_size)
            result = run(*argv, out=tmp_path)
            assert result["fid"] == pytest.approx(exact_frechet(*grey), abs=1e-6)
            assert result["sfid"] is result["inception_score"] is None
            assert (
                0 <= result["precision"] <= 1
                and "sanity" in result["protocol"]["features"]["network"]
            )
            assert result["protocol"]["samples"]["images"] == [9, 16, 16, 3]
    sha256 = hashlib.sha256((tmp_path / "ref.npz").read_bytes()).hexdigest()[:16]
    assert (
        result["protocol"]["reference"]["sha256"] == sha256 == fid.file_hash(tmp_path / "ref.npz")
    )


def test_center_crop_is_adms():
    image = Image.fromarray(noise(1, 300)[0][:200])  # 300 wide, 200 high
    expected = (
        image.resize((150, 100), Image.BOX).resize((96, 64), Image.BICUBIC).crop((16, 0, 80, 64))
    )
    assert np.array_equal(fid.center_crop(image, 64), expected)
    assert np.array_equal(fid.center_crop(image, 200), image.crop((50, 0, 250, 200)))
    up = image.resize((360, 240), Image.BICUBIC).crop((60, 0, 300, 240))
    assert np.array_equal(fid.center_crop(image, 240), up)


def test_folder_reads_rgb_and_ignores_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(noise(1, 24)[0][:16]).save(tmp_path / "a.jpg", exif=exif)
    Image.new("L", (24, 16), 7).save(tmp_path / "b.png")
    Image.new("RGBA", (24, 16), (1, 2, 3, 0)).save(tmp_path / "c.PNG")
    Image.new("RGB", (8, 8)).save(tmp_path / "d.bmp")  # not read by extract_features.py either
    images = fid.FolderImages(tmp_path, None)
    assert images.shape == (3, 16, 24, 3)
    assert np.unique(images[1]) == 7 and np.array_equal(images[2][0, 0], [1, 2, 3])


def sixteen_bits(mode, values):
    """A grey image of a 16-bit mode of PIL, one row of values."""
    order = ">u2" if mode.endswith("B") else "<u2"
    return Image.frombytes(mode, (len(values), 1), values.astype(order).tobytes())


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_16_bit_grey_is_scaled(mode):
    """PIL's convert would make everything from 256 on white."""
    values = np.arange(2**16)
    rgb = np.asarray(fid.to_rgb(sixteen_bits(mode, values)))
    assert rgb.shape == (1, 2**16, 3) and (rgb == rgb[..., :1]).all()
    assert np.array_equal(rgb[0, :, 0], np.rint(values / 65535 * 255))


def test_16_bit_png(tmp_path):
    values = np.array([0, 128, 129, 256, 32767, 65535])
    sixteen_bits("I;16", values).save(tmp_path / "a.png")
    images = fid.FolderImages(tmp_path, None)
    assert images[0][0, :, 1].tolist() == [0, 0, 1, 1, 127, 255]
    older = Image.fromarray(values[None].astype(np.int32))  # as Pillow 10 opens a 16-bit PNG
    older.format = "PNG"
    assert older.mode == "I" and np.array_equal(np.asarray(fid.to_rgb(older)), images[0])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_8_bit_modes_are_converted_as_pil_does(mode):
    image = Image.fromarray(noise(1)[0]).convert(mode)
    assert np.array_equal(np.asarray(fid.to_rgb(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_modes_are_refused_by_name(mode, tmp_path):
    Image.new(mode, (8, 8), 7).save(tmp_path / "x.tif")
    (tmp_path / "x.tif").rename(tmp_path / "x.png")
    with pytest.raises(SystemExit, match=f"x.png: .*mode {mode} "):
        fid.main([str(tmp_path), str(tmp_path), *PIXELS])


def test_listing_of_a_folder(tmp_path, capsys):
    """Links are followed, but not in circles; hidden files and a Mac's leftovers are left out."""
    source, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    folder(elsewhere, noise(2))
    (source / "b" / "c").mkdir(parents=True)
    for name in ("b/1.JPG", "b/c/2.webp", "b/0.jpeg", "a.Png"):
        Image.fromarray(noise(1)[0]).save(source / name)
    (source / "linked").symlink_to(elsewhere)
    (source / "b" / "circle").symlink_to(source)
    (source / "b" / "c" / "itself").symlink_to(".")
    for name in ("._0.jpg", ".hidden/0.png", "__MACOSX/0.png", "b/.0.png"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("no image")
    images = fid.FolderImages(source, None)
    names = [str(file.relative_to(source)) for file in images.files]
    expected = ["a.Png", "b/0.jpeg", "b/1.JPG", "b/c/2.webp", "linked/0.png", "linked/1.png"]
    assert names == expected and images.shape == (6, 16, 16, 3)
    assert len(np.unique(images.extra["arr_1"])) == 4 and capsys.readouterr().err == ""

    for name in ("x.bmp", "b/y.GIF", "b/z.tiff", "labels.txt", "b/.w.bmp"):
        (source / name).touch()
    assert fid.FolderImages(source, None).files == images.files
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{source}: left out 3 " in line and all(x in line for x in (".bmp", ".gif", ".tiff"))


def test_a_folder_of_other_images_is_refused_with_the_reason(tmp_path, capsys):
    folder(tmp_path / "images", noise(5))
    for file in (tmp_path / "images").iterdir():
        file.rename(file.with_suffix(".bmp"))
    with pytest.raises(SystemExit, match="holds 0 images"):
        fid.main([str(tmp_path / "images"), str(tmp_path / "images"), *PIXELS])
    assert "left out 5 images of other types (.bmp)" in capsys.readouterr().err


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_versions_of_the_npy_format(version, tmp_path):
    with open(tmp_path / "a.NPY", "wb") as file:
        np.lib.format.write_array(file, noise(5), version=version)
    with zipfile.ZipFile(tmp_path / "a.NPZ", "w") as archive:
        archive.write(tmp_path / "a.NPY", "arr_0.npy")
    for name in ("a.NPY", "a.NPZ"):
        images = fid.ArrayImages(tmp_path / name)
        assert np.array_equal([images[i] for i in range(5)], noise(5))


def test_out_may_end_in_upper_case(tiny, tmp_path):
    np.save(tmp_path / "a.npy", noise(5))
    fid.main(["--stats", str(tmp_path / "a.npy"), "--out", str(tmp_path / "REF.NPZ")])
    assert sorted(os.listdir(tmp_path)) == ["REF.NPZ", "a.npy"]


@pytest.mark.parametrize("width, size", [(199, 4096), (9000, 299)])
def test_narrow_images_are_not_scaled_up(width, size, tmp_path):
    """They would be 815,104 and 2,691,000 pixels wide, and fill the memory."""
    Image.new("RGB", (width, 1)).save(tmp_path / "x.png")
    with pytest.raises(SystemExit, match=f"x.png: .*{width} x 1 pixels .*{width * size} x {size}"):
        fid.main([str(tmp_path), str(tmp_path), *PIXELS, "--image-size", str(size)])
    assert fid.center_crop(Image.new("RGB", (199, 1)), 256).size == (256, 256)


def test_stats_file(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fid, "PR_IMAGES", 6)
    images, other = noise(11), noise(9, seed=1)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i:02}.png")
    out = tmp_path / "ref.npz"
    fid.main(
        [
            "--stats",
            str(tmp_path / "folder"),
            "--image-size",
            "8",
            "--out",
            str(out),
            "--device",
            "cpu",
        ]
    )
    crops = np.stack([fid.center_crop(Image.fromarray(image), 8) for image in images])
    pooled, colour = (x.numpy() for x in tiny()(torch.from_numpy(crops).permute(0, 3, 1, 2)))
    file = dict(np.load(out, allow_pickle=False))
    for ours, expected in zip((file["mu"], file["sigma"]), gaussian(pooled), strict=True):
        assert ours.dtype == np.float64 and np.allclose(ours, expected, rtol=1e-6)
    assert np.allclose(file["sigma_s"], gaussian(colour)[1], rtol=1e-6) and len(file["arr_0"]) == 6
    assert (
        sum((crop == kept).all() for crop in crops for kept in file["arr_0"]) == 6
    )  # six different ones

    np.savez(tmp_path / "other.npz", arr_0=other)
    sample = tiny()(torch.from_numpy(other).permute(0, 3, 1, 2))
    result = run(
        out, tmp_path / "other.npz", out=tmp_path
    )  # against all eleven, not the six in the file
    assert result["fid"] == pytest.approx(exact_frechet(pooled, sample[0].numpy()), rel=1e-5)
    assert result["sfid"] == pytest.approx(exact_frechet(colour, sample[1].numpy()), rel=1e-5)
    logits = sample[0] @ tiny().fc.weight.T  # no bias
    assert result["inception_score"] == pytest.approx(fid.inception_score(logits))
    assert (
        result["protocol"]["reference"]["statistics"] == "stored"
        and result["precision"] is not None
    )
    result = run(out, out, out=tmp_path)
    assert abs(result["fid"]) < 1e-6 and abs(result["sfid"]) < 1e-6
    assert result["precision"] == result["recall"] == 1

    # as the references of some repositories
    np.savez(tmp_path / "mu_only.npz", mu=file["mu"], sigma=file["sigma"])
    capsys.readouterr()
    result = run(tmp_path / "mu_only.npz", tmp_path / "other.npz", out=tmp_path)
    assert result["fid"] == pytest.approx(exact_frechet(pooled, sample[0].numpy()), rel=1e-5)
    assert result["sfid"] is result["precision"] is None and result["inception_score"] > 1
    assert "no mu_s and sigma_s" in capsys.readouterr().err


def test_warnings(tiny, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", arr_0=noise(5), arr_1=np.array([2, 0, 1, 0, 2]))
    np.savez(tmp_path / "b.npz", arr_0=noise(8), arr_1=np.array([0, 0, 0, 0, 1, 1, 1, 1]))
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    run(tmp_path / "b.npz", tmp_path / "a.npz", out=tmp_path)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    err = capsys.readouterr().err
    assert "a.npz: 5 images;" in err and "b.npz: 8 images;" in err
    assert "sorted" not in err  # the Inception Score is not of the reference
    run(tmp_path / "a.npz", tmp_path / "b.npz", out=tmp_path)
    assert "b.npz: sorted by class" in capsys.readouterr().err


# ---- several sets, the floor, the report


def rows_of(text):
    """The table that fid.py prints: name of a row -> its six entries."""
    lines = text.splitlines()
    assert lines[0].split() == "fid sfid inception_score precision recall mind".split()
    rows = {}
    for line in lines[1:]:
        if line.startswith("reference "):
            return rows
        assert len(line[:95].split()) == 6 and line[95:97] == "  "  # aligned, 15 characters each
        rows[line[97:]] = line[:95].split()


def test_several_sets_equal_separate_runs(tiny, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    np.savez(tmp_path / "ref.npz", arr_0=noise(20))
    protocol = np.array(json.dumps({"sampler": "ode", "steps": 2}))
    np.savez(tmp_path / "a.npz", arr_0=noise(9, seed=1), protocol=protocol)
    np.savez(tmp_path / "b.npz", arr_0=noise(7, seed=2), protocol=np.array("[1]"))
    sets = [tmp_path / "a.npz", tmp_path / "b.npz"]
    alone = [run(tmp_path / "ref.npz", path, out=tmp_path) for path in sets]
    capsys.readouterr()
    together = run(tmp_path / "ref.npz", *sets, out=tmp_path)
    rows = rows_of(capsys.readouterr().out)
    assert set(together) == {"sets", "floor"}
    assert together["floor"] == alone[1]["floor"]  # of the smallest set
    for path, row, expected in zip(sets, together["sets"], alone, strict=True):
        assert row == {key: value for key, value in expected.items() if key != "floor"}
        assert rows[str(path)] == [f"{row[key]:.4f}" for key in fid.METRICS]
    assert list(rows) == [*map(str, sets), "floor: 7 of REF against its other 13"]
    assert [row["protocol"]["sampling"] for row in alone] == [{"sampler": "ode", "steps": 2}, None]


def test_floor_is_the_reference_against_its_other_images(tiny, tmp_path, monkeypatch):
    """n distinct images and all others are taken; numpy's statistics give the same numbers."""
    images, taken = noise(30), []
    features = tiny()(torch.from_numpy(images).permute(0, 3, 1, 2))
    rows = {tuple(x): i for i, x in enumerate(features[0].tolist())}

    def spy(reference, samples, k=3, fp16=True):
        taken.append([[rows.get(tuple(x)) for x in part.tolist()] for part in (reference, samples)])
        return loop_precision_recall(reference.numpy(), samples.numpy(), k)

    np.savez(tmp_path / "ref.npz", arr_0=images)
    np.savez(tmp_path / "more.npz", arr_0=images)
    np.savez(tmp_path / "few.npz", arr_0=noise(8, seed=1))
    for name, n in (("more.npz", 15), ("few.npz", 8)):
        with monkeypatch.context() as patch:
            patch.setattr(fid, "precision_recall", spy)
            floor = run(tmp_path / "ref.npz", tmp_path / name, "--batch-size", "30", out=tmp_path)[
                "floor"
            ]
        rest, few = taken[-1]  # the floor is measured after the sets
        assert floor["images"] == len(few) == n and len(rest) == 30 - n and len({*rest, *few}) == 30
        assert floor["set"] == f"floor: {n} of REF against its other {30 - n}"
        pooled, colour = (x.numpy() for x in features)
        assert floor["fid"] == pytest.approx(exact_frechet(pooled[rest], pooled[few]), abs=1e-5)
        expected = fid.frechet_distance(*gaussian(colour[rest]), *gaussian(colour[few]))
        assert floor["sfid"] == pytest.approx(expected, abs=1e-5) and floor["fid"] > 0
        expected = loop_precision_recall(pooled[rest], pooled[few], 3)
        assert (floor["precision"], floor["recall"]) == expected
    assert sorted(few) != list(range(n))  # random, not the first images


def test_what_was_not_measured_is_a_dash(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", arr_0=noise(5))
    result = run(tmp_path / "a.npz", tmp_path / "a.npz", *PIXELS, out=tmp_path)
    rows = rows_of(capsys.readouterr().out)
    assert rows == {str(tmp_path / "a.npz"): [f"{result['fid']:.4f}", "-", "-", *["1.0000"] * 2, "0.0000"]}
    assert result["floor"] is None  # two images are too few
    assert set(result) == {*fid.METRICS, "set", "protocol", "floor"} and result["sfid"] is None


def test_no_row_shows_a_negative_zero(tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "a.npz", arr_0=noise(8))
    monkeypatch.setattr(fid, "frechet_distance", lambda *statistics: -1e-7)
    result = run(tmp_path / "a.npz", tmp_path / "a.npz", *PIXELS, out=tmp_path)
    shown = {row[0] for row in rows_of(capsys.readouterr().out).values()}
    assert result["fid"] == -1e-7 and shown == {"0.0000"}


def test_fp32_switch(tmp_path, monkeypatch):
    monkeypatch.setattr(
        fid, "precision_recall", lambda reference, samples, fp16: (float(fp16), 0.0)
    )
    np.savez(tmp_path / "a.npz", arr_0=noise(4))
    argv = (tmp_path / "a.npz", tmp_path / "a.npz", *PIXELS)
    for flags, fp16 in (((), 1), (("--fp32-distances",), 0)):
        result = run(*argv, *flags, out=tmp_path)
        found = result["protocol"]["precision_recall"]["distances"]
        assert result["precision"] == fp16 and ("fp16" in found) == fp16


# ---- bad input: one line with the remedy, and nothing lost


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


def object_array():
    array = np.empty(4, object)
    array[:] = [Bomb()] * 4
    return array


def folder(path, images):
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i}.png")


def truncated(path, save, array):
    save(path, array)
    path.write_bytes(path.read_bytes()[:-2000])


def damaged_folder(path):
    folder(path, noise(5))
    truncated(path / "3.png", lambda p, a: Image.fromarray(a).save(p), noise(1, 64)[0])


def flipped_bit(path):
    np.savez_compressed(path, arr_0=noise(5))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def header(path, array, shape=None, dtype=None):
    """An .npz whose arr_0 claims another shape or type than its data has."""
    claim = {
        "descr": dtype or array.dtype.str,
        "fortran_order": False,
        "shape": shape or array.shape,
    }
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as f:
        np.lib.format.write_array_header_1_0(f, claim)
        f.write(array.tobytes())


def statistics(path, mu, sigma):
    np.savez(path, mu=mu, sigma=sigma)


BAD_IMAGES = {
    "float.npz": (lambda p: np.savez(p, arr_0=noise(5) / 255), "float64 .* expected uint8"),
    "nchw.npz": (
        lambda p: np.savez(p, arr_0=noise(5).transpose(0, 3, 1, 2).copy()),
        r"\[5, 3, 16, 16\] in",
    ),
    "fortran.npz": (lambda p: np.savez(p, arr_0=np.asfortranarray(noise(5))), "in C order"),
    "grey.npz": (
        lambda p: np.savez(p, arr_0=noise(5)[..., 0]),
        r"uint8 \[5, 16, 16\] in .*expected",
    ),
    "rgba.npz": (
        lambda p: np.savez(p, arr_0=np.zeros((5, 8, 8, 4), np.uint8)),
        r"8, 8, 4\] in .*expected",
    ),
    "scalar.npz": (lambda p: np.savez(p, arr_0=np.uint8(3)), r"uint8 \[\] in .*expected"),
    "empty.npz": (lambda p: np.savez(p, arr_0=noise(5)[:0]), "holds 0 images"),
    "one.npz": (lambda p: np.savez(p, arr_0=noise(1)), "holds 1 images; at least 4"),
    "other.npz": (lambda p: np.savez(p, images=noise(5)), "no item named 'arr_0.npy'"),
    "object.npz": (lambda p: np.savez(p, arr_0=object_array()), "object"),
    "labels.npz": (
        lambda p: np.savez(p, arr_0=noise(5), arr_1=object_array()),
        "Object arrays cannot",
    ),
    "huge.npz": (
        lambda p: header(p, noise(5), shape=(10**12, 16, 16, 3)),
        r"000, 16, 16, 3\] in 3968 bytes",
    ),
    "longer.npz": (
        lambda p: header(p, noise(5), shape=(6, 16, 16, 3)),
        r"\[6, 16, 16, 3\] in 3968 bytes",
    ),
    "negative.npz": (lambda p: header(p, noise(5), shape=(-5, -16, 16, 3)), "-5"),
    "truncated.npz": (
        lambda p: truncated(p, lambda q, a: np.savez(q, arr_0=a), noise(5)),
        "download it",
    ),
    "flipped.npz": (flipped_bit, "flipped.npz: .*download it again"),
    "no_bytes.npz": (lambda p: p.touch(), "not a zip file"),
    "text.npz": (lambda p: p.write_text("hello"), "not a zip file"),
    "array.npz": (lambda p: np.save(p.open("wb"), noise(5)), "not a zip file"),
    "float.npy": (lambda p: np.save(p, noise(5) / 255), "float64 .* expected uint8"),
    "short.npy": (
        lambda p: truncated(p, np.save, noise(5)),
        r"uint8 \[5, 16, 16, 3\] in 1968 bytes",
    ),
    "text.npy": (lambda p: p.write_text("hello"), "magic string"),
    "photo.png": (lambda p: Image.new("RGB", (8, 8)).save(p), "not a zip file"),
    "missing.npz": (lambda p: None, "no such file"),
    "no_images": (lambda p: p.mkdir(), "holds 0 images"),
    "sizes": (
        lambda p: folder(p, [*noise(4), noise(1, 8)[0]]),
        "different sizes; crop .* --image-size",
    ),
    "damaged": (damaged_folder, "damaged/3.png: cannot be used"),
    "nan.npz": (lambda p: statistics(p, np.full(6, np.nan), np.eye(6)), "not finite .* --stats"),
    "infinite.npz": (
        lambda p: statistics(p, np.zeros(6), np.full((6, 6), np.inf)),
        "not finite .* --stats",
    ),
    "width.npz": (
        lambda p: statistics(p, np.zeros(5), np.eye(5)),
        r"shape \(6,\) and \(6, 6\).* --stats",
    ),
    "words.npz": (
        lambda p: statistics(p, np.full(6, "x"), np.eye(6)),
        "mu.* --stats|isfinite.* --stats",
    ),
    "pickled_mu.npz": (
        lambda p: statistics(p, object_array(), np.eye(6)),
        "Object arrays cannot be loaded",
    ),
    "half.npz": (lambda p: np.savez(p, mu=np.zeros(6)), "holds 0 images"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images(name, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = BAD_IMAGES[name]
    make(tmp_path / name)
    np.savez("good.npz", arr_0=noise(9))
    Path("old.json").write_text("old")
    for pair in ((name, "good.npz"), ("good.npz", name)):
        with pytest.raises(SystemExit, match=message) as error:
            fid.main([*pair, "--device", "cpu", "--json", "old.json", "--batch-size", "2"])
        line = error.value.code
        assert line.startswith("fid.py: ") and "\n" not in line and name in line
    assert Path("old.json").read_text() == "old" and not Path("unpickled").exists()


def test_a_bad_set_is_found_before_any_work(tiny, tmp_path, monkeypatch):
    np.savez(tmp_path / "good.npz", arr_0=noise(5))
    header(tmp_path / "short.npz", noise(5), shape=(6, 16, 16, 3))
    monkeypatch.setattr(fid, "measure", None)
    with pytest.raises(SystemExit, match="short.npz"):
        fid.main([str(tmp_path / name) for name in ("good.npz", "good.npz", "short.npz")])


ODD_LABELS = [
    np.arange(7),
    np.ones((5, 2), int),
    np.full(5, np.nan),
    np.array(["a"] * 5),
    np.int8(1),
]


@pytest.mark.parametrize("labels", ODD_LABELS)
def test_odd_labels_are_ignored(labels, tiny, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", arr_0=noise(5), arr_1=labels, protocol=np.zeros(3))
    result = run(tmp_path / "a.npz", tmp_path / "a.npz", out=tmp_path)
    assert result["fid"] == pytest.approx(0, abs=1e-6) and result["protocol"]["sampling"] is None
    assert "sorted" not in capsys.readouterr().err


def test_a_folder_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    folder(tmp_path / "images", noise(5))
    (tmp_path / "images" / "closed").mkdir()
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(fid.UserError, match="Permission denied.*images/closed"):
        fid.FolderImages(tmp_path / "images", None)


def test_a_full_disk_keeps_the_old_file(tiny, tmp_path, capsys):
    """The limit on the size of files stands for the full disk. The table is printed anyway."""
    np.savez(tmp_path / "a.npz", arr_0=noise(9))
    (tmp_path / "result.json").write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        compared = ("a.npz", "a.npz", "--json", "result.json")
        for argv in (("--stats", "a.npz", "--out", "result.npz"), compared):
            paths = [str(tmp_path / x) if "." in x else x for x in argv]
            with pytest.raises(SystemExit, match=f"{argv[-1]}: .*File too large"):
                fid.main(paths)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "result.json").read_text() == "old" and "a.npz" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "result.json"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(), None]
)
def test_a_lack_of_memory_names_the_batch_size(error, tiny, tmp_path, monkeypatch):
    def forward(self, images):
        if error:
            raise error
        return torch.empty(2**50)  # the CPU's own error

    np.savez(tmp_path / "a.npz", arr_0=noise(5))
    monkeypatch.setattr(tiny, "forward", forward)
    with pytest.raises(SystemExit, match="^fid.py: .*--batch-size 5 ") as end:
        fid.main([*2 * [str(tmp_path / "a.npz")], "--batch-size", "5"])
    assert "\n" not in end.value.code


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes"), ValueError("x"), OSError(2, "x"), KeyError(1)]
)
def test_a_bug_keeps_its_traceback(error, tiny, tmp_path, monkeypatch):
    def forward(self, images):
        raise error

    np.savez(tmp_path / "a.npz", arr_0=noise(5))
    monkeypatch.setattr(tiny, "forward", forward)
    with pytest.raises(type(error)) as end:
        fid.main(2 * [str(tmp_path / "a.npz")])
    assert end.value is error


def test_interrupts_pass(tiny, tmp_path, monkeypatch):
    def interrupted(path, allow_pickle):
        raise KeyboardInterrupt

    np.savez(tmp_path / "a.npz", arr_0=noise(5))
    monkeypatch.setattr(np.lib.npyio, "NpzFile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fid.ArrayImages(tmp_path / "a.npz")


def test_a_failed_write_keeps_the_old_reference(tmp_path):
    folder(tmp_path / "images", noise(5))
    images = fid.FolderImages(tmp_path / "images", None)
    images.files[4].unlink()  # the reader fails on the last image
    (tmp_path / "ref.npz").write_text("old")
    statistics = {"inception": dict.fromkeys(["fid", "sfid"], (np.zeros(3), np.eye(3)))}
    with pytest.raises(fid.UserError, match="4.png"):
        fid.write_reference(tmp_path / "ref.npz", images, statistics)
    assert (tmp_path / "ref.npz").read_text() == "old"


def spoil(state, name):
    if name == "short.pth":
        state["fc.weight"] = state["fc.weight"][:1000]
    elif name == "nan.pth":
        state["Mixed_5b.branch1x1.conv.weight"][7, 7] = float("nan")
    else:
        state = {"resnet.weight": torch.zeros(3)}
    return state


@pytest.mark.parametrize(
    "name, message",
    [
        ("short.pth", "size mismatch"),
        ("nan.pth", "not finite"),
        ("other.pth", "Missing key"),
        ("text.pth", "cannot be used"),
        ("missing.pth", "No such file"),
    ],
)
def test_bad_weights(name, message, net, tmp_path):
    path = tmp_path / name
    state = {key: value.clone() for key, value in net.state_dict().items()}
    if name == "text.pth":
        path.write_text("hello")
    elif name != "missing.pth":
        torch.save(spoil(state, name), path)
    np.savez(tmp_path / "a.npz", arr_0=noise(4))
    with pytest.raises(SystemExit, match=message) as error:
        argv = [*2 * [str(tmp_path / "a.npz")], "--weights", str(path)]
        fid.main([*argv, "--device", "cpu", "--batch-size", "1"])
    assert "\n" not in error.value.code


def test_no_weights_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    np.savez(tmp_path / "a.npz", arr_0=noise(4))
    with pytest.raises(SystemExit) as error:
        fid.main(2 * [str(tmp_path / "a.npz")])
    for part in (
        str(tmp_path / "hub" / "checkpoints"),
        "pt_inception-2015-12-05-6726825d.pth",
        "https://",
        "--weights",
    ):
        assert part in error.value.code


@pytest.mark.parametrize(
    "argv, message",
    [
        ("", "give REF and SAMPLES, or --stats"),
        ("a.npz", "give REF and SAMPLES, or --stats"),
        ("a.npz a.npz --batch-size 0", "--batch-size .*above 0"),
        ("a.npz a.npz --batch-size 1e3", "--batch-size: invalid int value: '1e3'"),
        ("a.npz a.npz --image-size -8", "--image-size"),
        ("a.npz a.npz --image-size 4097", "--image-size 4097 .* 4096"),
        ("a.npz a.npz --features no_net", "--features no_net.*Unknown model"),
        ("a.npz a.npz --nonsense", "--nonsense"),
        ("a.npz /dev/full/x", "/dev/full/x: no such file"),
        ("--stats a.npz", "--out REF.npz"),
        ("--stats a.npz --out ref.npy", "--out .*ref.npy: must end in .npz"),
        ("--stats a.npz --out a.npz", "a.npz: is an input as well"),
        ("--stats a.npz --out /dev/full/x.npz", "/dev/full/x.npz: cannot be written"),
        ("--stats a.npz --out r.npz --features pixels", "--features pixels"),
        ("--stats a.npz --out r.npz --json x.json", "--stats takes .* no --json"),
        ("a.npz --stats a.npz --out r.npz", "--stats takes one set"),
        ("a.npz a.npz --out r.npz", "--stats .* --out .*need each other"),
        ("a.npz a.npz --json missing/x.json", "missing/x.json: cannot be written"),
        ("a.npz a.npz --json .", "[.]: cannot be written"),
        ("a.npz a.npz --json /dev/null", "/dev/null: cannot be written"),
        ("a.npz a.npz --json a.npz", "a.npz: is an input as well"),
        ("a.npz a.npz --image-size 8", "crops folders only"),
    ],
)
def test_bad_arguments(argv, message, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", arr_0=noise(4))
    before = Path("a.npz").read_bytes()
    with pytest.raises(SystemExit, match=message) as error:
        fid.main([*argv.split(), "--device", "cpu"])
    assert error.value.code.startswith("fid.py: ") and "\n" not in error.value.code
    assert Path("a.npz").read_bytes() == before and os.listdir() == ["a.npz"]


@pytest.mark.parametrize(
    "argv, named",
    [
        (["", "a.npz"], "REF SAMPLES"),
        (["a.npz", "a.npz", " "], "REF SAMPLES"),
        (["a.npz", "a.npz", "--weights", ""], "--weights"),
        (["a.npz", "a.npz", "--json", ""], "--json"),
        (["a.npz", "a.npz", "--json="], "--json"),
        (["--stats", "a.npz", "--out", ""], "--out"),
    ],
)
def test_empty_names_are_refused(argv, named, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", arr_0=noise(4))
    with pytest.raises(SystemExit, match=f"^fid.py: argument {named}: is empty"):
        fid.main([*argv, "--device", "cpu"])


ODD_ENVIRONMENTS = ["RANK=0", "RANK=1", "WORLD_SIZE=1", "WORLD_SIZE=2", "RANK= WORLD_SIZE=1"]
ODD_ENVIRONMENTS += ["RANK=0 WORLD_SIZE=", "RANK=one WORLD_SIZE=2", "RANK=0 WORLD_SIZE=2.0"]
ODD_ENVIRONMENTS += ["RANK=-1 WORLD_SIZE=2", "RANK=2 WORLD_SIZE=2", "RANK=0 WORLD_SIZE=0"]


@pytest.mark.parametrize("variables", [*ODD_ENVIRONMENTS, "RANK=0 WORLD_SIZE=1 LOCAL_RANK=x"])
def test_odd_environments_are_refused(variables, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", arr_0=noise(4))
    for name, value in [variable.split("=") for variable in variables.split()]:
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="^fid.py: .*(RANK|WORLD_SIZE)=.* torchrun") as end:
        fid.main(["a.npz", "a.npz", *PIXELS])
    assert "\n" not in end.value.code


# ---- as a program


def test_two_processes_equal_one(tmp_path, processes):
    np.savez(tmp_path / "a.npz", arr_0=noise(11))
    np.savez_compressed(tmp_path / "b.npz", arr_0=noise(9, seed=1))
    argv = [str(tmp_path / "a.npz"), str(tmp_path / "b.npz"), *PIXELS]
    one = run(*argv, "--batch-size", 2, out=tmp_path)
    options = ("--batch-size", 2, "--device", "cpu", "--json", tmp_path / "two.json")
    run_ranks(processes, fid.main, [*argv, *map(str, options)])
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["fid"] == pytest.approx(one["fid"], abs=1e-6)
    assert (two["precision"], two["recall"]) == (one["precision"], one["recall"])
    assert two["floor"]["images"] == 5 and two["floor"]["fid"] == pytest.approx(
        one["floor"]["fid"], abs=1e-6
    )
    assert two["protocol"]["run"]["processes"] == 2


def test_a_failing_rank_ends_all(tmp_path):
    """Only the second process reads the damaged image; the first one waits for its features."""
    damaged_folder(tmp_path / "images")
    np.savez(tmp_path / "a.npz", arr_0=noise(8))
    argv = (tmp_path / "a.npz", tmp_path / "images", *PIXELS, "--json", tmp_path / "x.json")
    start = time.monotonic()
    done = launch("fid.py", *argv, processes=2, check=False)
    assert done.returncode and time.monotonic() - start < 60
    first = done.stderr.index("fid.py: ")
    assert "3.png: cannot be used" in done.stderr[first:].splitlines()[0]
    assert "Traceback" not in done.stderr[:first] and "[rank0]" not in done.stderr
    assert not (tmp_path / "x.json").exists()


def test_odd_text_does_not_stop_the_report(tmp_path):
    text = np.array('{"sampler": "\\ud800"}')  # half of a character: no terminal can show it
    np.savez(tmp_path / "a.npz", arr_0=noise(4), protocol=text)
    done = launch("fid.py", tmp_path / "a.npz", tmp_path / "a.npz", *PIXELS, "--device", "cpu")
    assert "sampler" in done.stdout


def test_help_shows_the_defaults(capsys):
    with pytest.raises(SystemExit):
        fid.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in (
        "mae, siglip, clip, pixels, or a model of timm (default: inception)",
        "images per process (default: 64)",
    ):
        assert option in text


def test_the_file_works_alone(tmp_path):
    """In a folder of its own, without the rest of the repository."""
    (tmp_path / "fid.py").write_text((ROOT / "fid.py").read_text())
    np.savez(tmp_path / "a.npz", arr_0=noise(4))
    line = [sys.executable, "-I", "fid.py", "a.npz", "a.npz", *PIXELS, "--device", "cpu"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "a.npz" in done.stdout, done.stderr


def test_odd_file_names(tmp_path):
    """One letter that an ASCII terminal cannot show, and one byte that is no letter at all."""
    path = tmp_path / "\u00fc\udcff.npz"
    np.savez(open(path, "wb"), arr_0=noise(4))
    argv = ("fid.py", path, path, *PIXELS, "--json", tmp_path / "x.json")
    done = launch(*argv, PYTHONIOENCODING="ascii")
    assert "\\xfc\\udcff.npz" in done.stdout
    assert json.loads((tmp_path / "x.json").read_text())["set"] == str(path)


@pytest.mark.parametrize("closed", ["a reader that has gone"])
def test_a_closed_stdout(closed, tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=noise(4))
    argv = (
        "fid.py",
        tmp_path / "a.npz",
        tmp_path / "a.npz",
        *PIXELS,
        "--json",
        tmp_path / "x.json",
    )
    for line in (command_line(*argv), command_line("fid.py", "--help")):
        if closed == "no stdout":
            line = ["sh", "-c", 'exec "$@" >&-', "sh", *line]
        reader, writer = os.pipe()
        os.close(reader)
        pipes = {"stdout": writer, "stderr": subprocess.PIPE}
        done = subprocess.run(line, cwd=ROOT, text=True, **pipes)
        os.close(writer)
        assert done.returncode == 0
        assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert "fid" in json.loads((tmp_path / "x.json").read_text())


def test_ctrl_c_twice_ends_in_one_line(tmp_path):
    """The first comes while a batch is made, the second while the program ends."""
    np.savez(tmp_path / "a.npz", arr_0=noise(4))
    slow = "import atexit, time, numpy; atexit.register(time.sleep, 2); "
    slow += "numpy.stack = lambda x: print('ready', flush=True) or time.sleep(60)"
    line = command_line("fid.py", tmp_path / "a.npz", tmp_path / "a.npz", *PIXELS, first=slow)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(line, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert err.splitlines()[-1] == "fid.py: interrupted" and "Traceback" not in err
