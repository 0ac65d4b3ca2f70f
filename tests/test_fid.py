"""fid.py against golden values of the TensorFlow evaluator, closed forms and slow independent loops.

FID_GOLDEN=1 adds the full comparison on 300 + 300 images (five to ten minutes on one core).
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import run as launch
from golden_fid.images import FOLDER, images64, weights
from PIL import Image

import fid

ROWS = np.load(FOLDER / "rows64.npz")  # the evaluator's features of the first 8 images of each set
PIXELS = ("--features", "pixels")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """LAPACK's many small parallel loops wait for each other for seconds when the cores are busy."""
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
    torch.save({k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}, path)
    return path


@pytest.fixture
def tiny(monkeypatch):
    """The command line with a linear map of two mean colours in place of Inception: seconds become milliseconds."""

    class Tiny(torch.nn.Module):
        widths = (6, 3)

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
    return np.clip(rs.randint(0, 256, (n, 1, 1, 3)) + rs.randint(-60, 60, shape), 0, 255).astype(np.uint8)


def run(*argv, out=None):
    """fid.main with a JSON file -> its contents."""
    path = Path(out) / "result.json"
    fid.main([*map(str, argv), "--device", "cpu", "--json", str(path)])
    return json.loads(path.read_text())


def gaussian(x):
    return x.astype(np.float64).mean(0), np.cov(x.astype(np.float64), rowvar=False)


def exact_frechet(x, y):
    """Exact also for singular covariances: the trace term is the nuclear norm of the product of the centred rows."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    a, b = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    trace = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * trace


def loop_precision_recall(reference, samples, k):
    def radius(rows, row):
        return sorted(((rows - row) ** 2).sum(1))[k]

    def share(points, manifold):
        radii = [radius(manifold, row) for row in manifold]
        return np.mean([any(((m - p) ** 2).sum() <= r for m, r in zip(manifold, radii, strict=True)) for p in points])

    return share(samples, reference), share(reference, samples)


def loop_inception_score(p, split):
    scores = []
    for start in range(0, len(p), split):
        part = p[start : start + split].astype(np.float64)
        marginal = part.mean(0)
        kl = [sum(q * np.log(q / m) for q, m in zip(row, marginal, strict=True) if q > 0) for row in part]
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
    assert {"Mixed_6d.branch7x7dbl_5.bn.running_var", "Mixed_7c.branch3x3dbl_3b.conv.weight"} <= set(published)


def test_features_match_the_evaluator(net, tmp_path):
    args = SimpleNamespace(image_size=None, batch_size=4)
    for kind in ("ref", "sample"):
        np.savez(tmp_path / "images.npz", arr_0=images64(kind, 6))
        _, pooled, statistics = fid.extract(tmp_path / "images.npz", net, args, torch.device("cpu"))
        golden = [ROWS[f"{kind}_{name}"][:6].reshape(6, -1) for name in ("pool3", "spatial")]
        assert np.abs(pooled.numpy() - golden[0]).max() < 3e-4
        assert np.linalg.norm(pooled.numpy() - golden[0]) < 5e-5 * np.linalg.norm(golden[0])
        for ours, expected in zip(statistics, map(gaussian, golden), strict=True):
            assert np.abs(ours[0] - expected[0]).max() < 3e-4
            assert np.linalg.norm(ours[1] - expected[1]) < 1e-4 * np.linalg.norm(expected[1])
        softmax = (pooled @ net.fc.weight.T).softmax(1).numpy()  # the bias is large, so that its use would show
        assert np.abs(softmax - ROWS[f"{kind}_softmax"][:6]).max() < 1e-4


@pytest.mark.skipif("FID_GOLDEN" not in os.environ, reason="five minutes; set FID_GOLDEN=1")
def test_golden64(weights_file, tmp_path):
    golden = json.loads((FOLDER / "metrics64.json").read_text())
    for kind in ("ref", "sample"):
        np.savez(tmp_path / f"{kind}.npz", arr_0=images64(kind, 300))
    logits, score = [], fid.inception_score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "inception_score", lambda x: logits.append(x) or score(x))
        result = run(tmp_path / "ref.npz", tmp_path / "sample.npz", "--weights", weights_file, out=tmp_path)
        argv = (tmp_path / "ref.npz", tmp_path / "sample.npz", "--weights", weights_file, "--fp32-distances")
        fp32 = run(*argv, out=tmp_path)
    print({k: v for k, v in result.items() if k != "protocol"}, fp32["precision"], fp32["recall"])
    assert result["fid"] == pytest.approx(golden["main_stdout"]["FID"], abs=1e-3)
    assert fid.sha256(weights_file) in result["protocol"]["features"]
    assert result["sfid"] == pytest.approx(golden["main_stdout"]["sFID"], abs=1e-3)
    for split, value in golden["is_split"].items():
        print(split, score(logits[0], int(split)) / value - 1)
        assert score(logits[0], int(split)) == pytest.approx(value, rel=1e-6)
    assert result["precision"] == pytest.approx(golden["main_stdout"]["Precision"], abs=3.01 / 300)
    assert result["recall"] == pytest.approx(golden["main_stdout"]["Recall"], abs=3.01 / 300)
    assert [fp32["precision"], fp32["recall"]] == pytest.approx(golden["prec_recall_features_x16_fp32_fallback"])


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
    assert fid.frechet_distance(*ref, *sample) == pytest.approx(2.13444637167, abs=1e-9)  # the ADM evaluator's value
    assert abs(fid.frechet_distance(*ref, *ref)) < 1e-6
    (mu1, sigma1), (mu2, sigma2) = ((mu[:100], sigma[:100, :100]) for mu, sigma in (ref, sample))
    trace = np.trace(sigma1 + sigma2 - 2 * scipy.linalg.sqrtm(sigma1 @ sigma2).real)
    assert fid.frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(((mu1 - mu2) ** 2).sum() + trace, abs=1e-9)


@pytest.mark.parametrize("n, m", [(30, 20), (30, 900), (900, 30)])
def test_frechet_with_fewer_images_than_features(n, m):
    x, y = (x.numpy()[:rows] for x, rows in zip(full_rank_features(), (n, m), strict=True))
    assert fid.frechet_distance(*gaussian(x), *gaussian(y)) == pytest.approx(exact_frechet(x, y), abs=1e-5)
    assert abs(fid.frechet_distance(*gaussian(x), *gaussian(x))) < 1e-6


def test_frechet_rejects_shapes():
    with pytest.raises(ValueError, match="needs shapes"):
        fid.frechet_distance(np.zeros(3), np.eye(3), np.zeros(3), np.eye(4))


# ---- Inception Score, precision and recall


def test_inception_score():
    rs = np.random.RandomState(2)
    logits = torch.from_numpy(rs.randn(70, 9).astype(np.float32) * 2)
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    for split in (5000, 32, 7):
        assert fid.inception_score(logits, split) == pytest.approx(loop_inception_score(p, split), rel=1e-9)
    assert fid.inception_score(torch.zeros(10, 6)) == pytest.approx(1)
    # one certain image per class; exp(-200) underflows in fp32, where the original gives NaN
    assert fid.inception_score(torch.eye(7) * 200) == pytest.approx(7)


def test_precision_recall_equals_a_loop():
    rs = np.random.RandomState(3)
    reference, samples = rs.randint(-4, 5, (40, 3)), rs.randint(-2, 7, (30, 3))  # integers: exact in fp16, with ties
    for k in (1, 3):
        expected = loop_precision_recall(reference, samples, k)
        tensors = torch.from_numpy(reference).float(), torch.from_numpy(samples).float()
        assert fid.precision_recall(*tensors, k=k) == pytest.approx(expected)
        assert fid.precision_recall(*tensors, k=k, fp16=False) == pytest.approx(expected)
        assert fid.precision_recall(*tensors[::-1], k=k) == pytest.approx(expected[::-1])
    assert 0 < expected[0] != expected[1] < 1
    with pytest.raises(ValueError, match="more than 3 rows"):
        fid.precision_recall(tensors[0], tensors[1][:3])


def test_precision_recall_matches_the_evaluator(monkeypatch):
    ref, sample = full_rank_features()
    exact = (0.971, 0.6546154)
    assert fid.precision_recall(ref, sample, fp16=False) == pytest.approx(exact, abs=1e-7)
    precision, recall = fid.precision_recall(ref, sample)
    assert precision == pytest.approx(0.973, abs=3.01 / 1000) and recall == pytest.approx(0.660, abs=3.01 / 1300)
    assert (precision, recall) != pytest.approx(exact, abs=1e-7)  # fp16 does round
    assert fid.precision_recall(ref * 64, sample * 64) == pytest.approx(exact, abs=1e-7)  # fp16 overflows: fp32
    monkeypatch.setattr(fid, "PR_BLOCK", 300)
    assert fid.precision_recall(ref, sample) == (precision, recall)
    assert fid.precision_recall(sample, ref) == (recall, precision)


# ---- files


def test_all_containers_give_the_same_numbers(tmp_path):
    a, b = noise(9), noise(7, seed=1)
    np.savez(tmp_path / "ref.npz", arr_0=b)
    np.savez(tmp_path / "stored.npz", arr_0=a)
    np.savez_compressed(tmp_path / "deflated.npz", arr_0=a)
    np.save(tmp_path / "array.npy", a)
    (tmp_path / "folder" / "x").mkdir(parents=True)
    for i, image in enumerate(a):
        Image.fromarray(image).save(tmp_path / "folder" / "x" / f"{i}.png")
    grey = [x.astype(np.float64).mean(3).reshape(-1, 8, 2, 8, 2).mean((2, 4)).reshape(-1, 64) / 255 for x in (b, a)]
    for name in ("stored.npz", "deflated.npz", "array.npy", "folder"):
        for batch_size in (4, 64):
            result = run(tmp_path / "ref.npz", tmp_path / name, *PIXELS, "--batch-size", batch_size, out=tmp_path)
            assert result["fid"] == pytest.approx(exact_frechet(*grey), abs=1e-6)
            assert result["sfid"] is result["inception_score"] is None
            assert 0 <= result["precision"] <= 1 and "sanity" in result["protocol"]["features"]
            assert fid.sha256(tmp_path / "ref.npz") in result["protocol"]["reference"]


def test_center_crop_is_adms():
    image = Image.fromarray(noise(1, 300)[0][:200])  # 300 wide, 200 high
    expected = image.resize((150, 100), Image.BOX).resize((96, 64), Image.BICUBIC).crop((16, 0, 80, 64))
    assert np.array_equal(fid.center_crop(image, 64), expected)
    assert np.array_equal(fid.center_crop(image, 200), image.crop((50, 0, 250, 200)))
    up = image.resize((360, 240), Image.BICUBIC).crop((60, 0, 300, 240))
    assert np.array_equal(fid.center_crop(image, 240), up)


def test_folder_reads_rgb_and_ignores_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(noise(1, 24)[0][:16]).save(tmp_path / "a.jpg", exif=exif)
    Image.new("L", (24, 16), 7).save(tmp_path / "b.png")
    Image.new("RGBA", (24, 16), (1, 2, 3, 0)).save(tmp_path / "c.png")
    images = fid.FolderImages(tmp_path, None)
    assert images.shape == (3, 16, 24, 3)
    assert np.unique(images[1]) == 7 and np.array_equal(images[2][0, 0], [1, 2, 3])


def test_stats_file(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fid, "PR_IMAGES", 6)
    images, other = noise(11), noise(9, seed=1)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i:02}.png")
    out = tmp_path / "ref.npz"
    fid.main(["--stats", str(tmp_path / "folder"), "--image-size", "8", "--out", str(out), "--device", "cpu"])
    crops = np.stack([fid.center_crop(Image.fromarray(image), 8) for image in images])
    pooled, colour = (x.numpy() for x in tiny()(torch.from_numpy(crops).permute(0, 3, 1, 2)))
    file = dict(np.load(out, allow_pickle=False))
    for ours, expected in zip((file["mu"], file["sigma"]), gaussian(pooled), strict=True):
        assert ours.dtype == np.float64 and np.allclose(ours, expected, rtol=1e-6)
    assert np.allclose(file["sigma_s"], gaussian(colour)[1], rtol=1e-6) and len(file["arr_0"]) == 6
    assert sum((crop == kept).all() for crop in crops for kept in file["arr_0"]) == 6  # six different ones of ours

    np.savez(tmp_path / "other.npz", arr_0=other)
    sample = tiny()(torch.from_numpy(other).permute(0, 3, 1, 2))
    result = run(out, tmp_path / "other.npz", out=tmp_path)  # against all eleven, not the six in the file
    assert result["fid"] == pytest.approx(exact_frechet(pooled, sample[0].numpy()), rel=1e-5)
    assert result["sfid"] == pytest.approx(exact_frechet(colour, sample[1].numpy()), rel=1e-5)
    assert result["inception_score"] == pytest.approx(fid.inception_score(sample[0] @ tiny().fc.weight.T))  # no bias
    assert "stored" in result["protocol"]["reference"] and result["precision"] is not None
    result = run(out, out, out=tmp_path)
    assert abs(result["fid"]) < 1e-6 and abs(result["sfid"]) < 1e-6 and result["precision"] == result["recall"] == 1

    np.savez(tmp_path / "mu_only.npz", mu=file["mu"], sigma=file["sigma"])  # as the references of some repositories
    capsys.readouterr()
    result = run(tmp_path / "mu_only.npz", tmp_path / "other.npz", out=tmp_path)
    assert result["fid"] == pytest.approx(exact_frechet(pooled, sample[0].numpy()), rel=1e-5)
    assert result["sfid"] is result["precision"] is None and result["inception_score"] > 1
    assert "sFID also needs mu_s and sigma_s" in capsys.readouterr().err


def test_warnings(tiny, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", arr_0=noise(5), arr_1=np.array([2, 0, 1, 0, 2]))
    np.savez(tmp_path / "b.npz", arr_0=noise(8), arr_1=np.array([0, 0, 0, 0, 1, 1, 1, 1]))
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    run(tmp_path / "b.npz", tmp_path / "a.npz", out=tmp_path)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    out, err = capsys.readouterr()
    assert "samples: 5 images, fewer than 6 features" in err and "reference: 8 images;" in err
    assert "no stored statistics" in err and "sorted by class" not in err
    assert [line.split()[0] for line in out.splitlines()[:5]] == "fid sfid inception_score precision recall".split()
    run(tmp_path / "a.npz", tmp_path / "b.npz", out=tmp_path)
    assert "samples: sorted by class" in capsys.readouterr().err


def test_fp32_switch(tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "precision_recall", lambda reference, samples, fp16: (float(fp16), 0.0))
    np.savez(tmp_path / "a.npz", arr_0=noise(4))
    argv = (tmp_path / "a.npz", tmp_path / "a.npz", *PIXELS)
    for flags, fp16 in (((), 1), (("--fp32-distances",), 0)):
        result = run(*argv, *flags, out=tmp_path)
        assert result["precision"] == fp16 and ("fp16" in result["protocol"]["precision_recall"]) == fp16


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


BAD_IMAGES = {
    "float.npz": (lambda p: np.savez(p, arr_0=noise(5) / 255), "holds float64 .* expected uint8"),
    "nchw.npz": (
        lambda p: np.savez(p, arr_0=noise(5).transpose(0, 3, 1, 2).copy()),
        r"uint8 \[5, 3, 16, 16\], expected",
    ),
    "fortran.npy": (lambda p: np.save(p, np.asfortranarray(noise(5))), "Fortran-ordered"),
    "grey.npy": (lambda p: np.save(p, noise(5)[..., 0]), r"uint8 \[5, 16, 16\], expected"),
    "rgba.npy": (lambda p: np.save(p, np.zeros((5, 8, 8, 4), np.uint8)), r"\[5, 8, 8, 4\], expected"),
    "empty.npy": (lambda p: np.save(p, noise(5)[:0]), "holds 0 images"),
    "one.npz": (lambda p: np.savez(p, arr_0=noise(1)), "holds 1 images. At least 4"),
    "other.npz": (lambda p: np.savez(p, images=noise(5)), "no item named 'arr_0.npy'"),
    "object.npz": (lambda p: np.savez(p, arr_0=object_array()), "holds object"),
    "object.npy": (lambda p: np.save(p, object_array()), "holds object"),
    "labels.npz": (lambda p: np.savez(p, arr_0=noise(5), arr_1=object_array()), "Object arrays cannot be loaded"),
    "truncated.npz": (lambda p: truncated(p, lambda q, a: np.savez(q, arr_0=a), noise(5)), "download it again"),
    "truncated.npy": (lambda p: truncated(p, np.save, noise(5)), "download it again"),
    "flipped.npz": (flipped_bit, "cannot read .*flipped.npz.* download it again"),
    "text.npz": (lambda p: p.write_text("hello"), "cannot read"),
    "text.npy": (lambda p: p.write_text("hello"), "cannot read"),
    "missing.npz": (lambda p: None, "does not exist"),
    "no_images": (lambda p: p.mkdir(), "holds 0 images"),
    "sizes": (lambda p: folder(p, [*noise(4), noise(1, 8)[0]]), "different sizes. Crop them to one with --image-size"),
    "damaged": (damaged_folder, "cannot read .*3.png"),
    "nan.npz": (lambda p: np.savez(p, mu=np.full(6, np.nan), sigma=np.eye(6)), "not finite .* Remake it"),
    "width.npz": (lambda p: np.savez(p, mu=np.zeros(5), sigma=np.eye(5)), r"statistics \(5,\), \(5, 5\), not finite"),
    "pickled_mu.npz": (lambda p: np.savez(p, mu=object_array(), sigma=np.eye(6)), "Object arrays cannot be loaded"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images(name, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = BAD_IMAGES[name]
    make(tmp_path / name)
    np.savez("good.npz", arr_0=noise(5))
    Path("old.json").write_text("old")
    for pair in ((name, "good.npz"), ("good.npz", name)):
        with pytest.raises(SystemExit, match=message) as error:
            fid.main([*pair, "--device", "cpu", "--json", "old.json", "--batch-size", "2"])
        assert error.value.code.startswith("fid.py: ") and "\n" not in error.value.code and name in error.value.code
    assert Path("old.json").read_text() == "old" and not Path("unpickled").exists()


def test_a_truncated_npy_fails_before_any_work(tmp_path):
    truncated(tmp_path / "a.npy", np.save, noise(5))
    with pytest.raises(SystemExit, match="a.npy"):
        fid.ArrayImages(tmp_path / "a.npy")


def test_a_failed_write_keeps_the_old_reference(tmp_path):
    folder(tmp_path / "images", noise(5))
    images = fid.FolderImages(tmp_path / "images", None)
    images.files[4].unlink()  # the reader fails on the last image
    (tmp_path / "ref.npz").write_text("old")
    with pytest.raises(SystemExit, match="4.png"):
        fid.write_reference(tmp_path / "ref.npz", 2 * [(np.zeros(3), np.eye(3))], images, batch_size=2)
    assert (tmp_path / "ref.npz").read_text() == "old"


def spoil(state, name):
    if name == "short.pth":
        state["fc.weight"] = state["fc.weight"][:1000]
    elif name == "nan.pth":
        state["Conv2d_1a_3x3.conv.weight"] = state["Conv2d_1a_3x3.conv.weight"] * float("nan")
    else:
        state = {"resnet.weight": torch.zeros(3)}
    return state


@pytest.mark.parametrize(
    "name, message",
    [
        ("short.pth", "size mismatch"),
        ("nan.pth", "not finite"),
        ("other.pth", "Missing key"),
        ("text.pth", "cannot read"),
    ],
)
def test_bad_weights(name, message, net, tmp_path):
    path = tmp_path / name
    torch.save(spoil(net.state_dict(), name), path)
    if name == "text.pth":
        path.write_text("hello")
    np.savez(tmp_path / "a.npz", arr_0=noise(4))
    with pytest.raises(SystemExit, match=message) as error:
        fid.main([*2 * [str(tmp_path / "a.npz")], "--weights", str(path), "--device", "cpu", "--batch-size", "1"])
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
        ("a.npz", "give REF SAMPLES"),
        ("a.npz a.npz --batch-size 0", "above 0"),
        ("--stats a.npz", "--out REF.npz"),
        ("--stats a.npz --out ref.npy", "--out REF.npz"),
        ("--stats a.npz --out a.npz", "cannot write"),
        ("a.npz a.npz --json missing/x.json", "cannot write"),
        ("a.npz a.npz --image-size 8", "crops folders only"),
    ],
)
def test_bad_arguments(argv, message, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", arr_0=noise(4))
    before = Path("a.npz").read_bytes()
    with pytest.raises(SystemExit, match=message):
        fid.main([*argv.split(), "--device", "cpu"])
    assert Path("a.npz").read_bytes() == before and os.listdir() == ["a.npz"]


# ---- as a program


def test_two_processes_equal_one(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=noise(11))
    np.savez_compressed(tmp_path / "b.npz", arr_0=noise(9, seed=1))
    argv = [str(tmp_path / "a.npz"), str(tmp_path / "b.npz"), *PIXELS]
    one = run(*argv, "--batch-size", 2, out=tmp_path)
    launch("fid.py", *argv, "--batch-size", 2, "--device", "cpu", "--json", tmp_path / "two.json", processes=2)
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["fid"] == pytest.approx(one["fid"], abs=1e-6)
    assert (two["precision"], two["recall"]) == (one["precision"], one["recall"])
    assert two["protocol"]["versions"].endswith("cpu x 2")
