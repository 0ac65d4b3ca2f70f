"""extract_features.py: sources, the ADM crop, HOG, the cache on disk and its reader."""

import json
import math
import os
import pickle
import shutil
import signal
import zipfile
from collections import namedtuple

import numpy as np
import pytest
import torch
from conftest import exit_code, run
from PIL import Image

import extract_features as ef


@pytest.fixture
def folder(tmp_path):
    """Two classes, three pictures each, in mixed formats and modes."""
    rng = np.random.default_rng(1)
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "src" / name).mkdir(parents=True)
        for i, (suffix, mode) in enumerate([("png", "RGB"), ("jpg", "L"), ("webp", "RGB")]):
            pixels = rng.integers(0, 256, (20 + i, 30 + label, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(tmp_path / "src" / name / f"{i}.{suffix}")
    return tmp_path / "src"


def extract(data, out, *options):
    base = "--image-size 8 --patch 2 --vae none --encoder hog --workers 0".split()
    ef.main(["--data", str(data), "--out", str(out), *base, *map(str, options)])


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != ".lock"}


# --- images


def test_folder_zip_and_npz_give_the_same_images(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "src.zip", "w") as archive:
        for path in sorted(folder.rglob("*.*"), reverse=True):
            archive.write(path, path.relative_to(folder))
    from_folder, from_zip = ef.Images(folder), ef.Images(tmp_path / "src.zip")
    assert from_folder.classes == from_zip.classes == ["cat", "dog"]
    assert from_folder.labels.tolist() == from_zip.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for i, path in enumerate(sorted(folder.rglob("*.*"))):
        expected = np.asarray(Image.open(path).convert("RGB"))
        assert np.array_equal(from_folder[i], expected) and np.array_equal(from_zip[i], expected)
    pixels = np.stack([np.asarray(ef.center_crop(from_folder[i], 8)) for i in range(6)])
    np.savez(tmp_path / "src.npz", arr_0=pixels, arr_1=from_folder.labels)
    from_npz = ef.Images(tmp_path / "src.npz")
    assert np.array_equal(from_npz[4], pixels[4]) and from_npz.labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("width, height", [(8, 8), (8, 31), (97, 64), (33, 17), (250, 16), (11, 9)])
def test_center_crop_is_adm(width, height):
    """Written out again: box halving, bicubic scaling, centre offsets by integer division."""
    image = Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))
    w, h, expected = width, height, image
    while min(w, h) >= 16:
        w, h = w // 2, h // 2
        expected = expected.resize((w, h), Image.BOX)
    w, h = (8, round(h * 8 / w)) if w < h else (round(w * 8 / h), 8)
    expected = np.asarray(expected.resize((w, h), Image.BICUBIC))
    y, x = (h - 8) // 2, (w - 8) // 2
    assert np.array_equal(np.asarray(ef.center_crop(image, 8)), expected[y : y + 8, x : x + 8])


def test_unusable_sources(folder, tmp_path, monkeypatch):
    def complain(data):
        with pytest.raises(SystemExit) as error:
            extract(data, tmp_path / "out")
        assert "\n" not in str(error.value) and not (tmp_path / "out" / "meta.json").exists()
        return str(error.value)

    assert "no such file" in complain(tmp_path / "nowhere")
    (folder / "empty").mkdir()
    assert "class folder 'empty' holds no image" in complain(folder)
    (folder / "empty" / "loose.txt").write_text("no image")
    assert "class folder 'empty' holds no image" in complain(folder)
    (folder / "top.png").write_bytes(b"")
    assert "top.png is in no class folder" in complain(folder)
    (tmp_path / "text.zip").write_text("no zip")
    assert "expected a folder" in complain(tmp_path / "text.zip")
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((4, 8, 8, 3)), arr_1=np.zeros(4, int))
    found = complain(tmp_path / "float.npz")
    assert "uint8 [N, H, W, 3]" in found and "float64 [4, 8, 8, 3]" in found
    np.savez(tmp_path / "object.npz", arr_0=np.array([{}], dtype=object))
    assert "no ADM .npz" in complain(tmp_path / "object.npz")
    np.savez(tmp_path / "good.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8), arr_1=np.zeros(4, int))
    usage = namedtuple("usage", "total used free")(1, 1, 100)
    monkeypatch.setattr(ef.shutil, "disk_usage", lambda path: usage)
    assert "0.0 GB are free" in complain(tmp_path / "good.npz")


def complaint(data, out, *options):
    """The one line that an extraction ends in."""
    with pytest.raises(SystemExit) as error:
        extract(data, out, *options)
    assert "\n" not in str(error.value) and str(error.value).startswith("extract_features.py: ")
    return str(error.value)


def zip_folder(folder, path, above=""):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, f"{above}{file.relative_to(folder)}")
    return path


def test_one_folder_around_a_zip_is_left_off(folder, tmp_path):
    """As `zip -r ds.zip ds` makes it, with what a Mac adds."""
    path = zip_folder(folder, tmp_path / "ds.zip", above="my/ds/")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/my/ds/cat/._0.png", b"")
        archive.writestr("my/ds/cat/._0.png", b"")
        archive.writestr("my/ds/.cache/0.png", b"")
        archive.writestr("my/ds/README.txt", b"")
    wrapped, plain = ef.Images(path), ef.Images(folder)
    assert wrapped.classes == ["cat", "dog"] and wrapped.labels.tolist() == plain.labels.tolist()
    assert all(np.array_equal(wrapped[i], plain[i]) for i in range(6))


def test_one_level_too_high(folder, tmp_path):
    """The folder meant is named: the one with most of the images, not the one with loose test images."""
    shutil.move(folder, tmp_path / "imagenet" / "train")
    (tmp_path / "imagenet" / "test").mkdir()
    shutil.copy(tmp_path / "imagenet" / "train" / "cat" / "0.png", tmp_path / "imagenet" / "test")
    message = complaint(tmp_path / "imagenet", tmp_path / "out")
    assert "train/cat/0.png" in message and f"did you mean {tmp_path}/imagenet/train?" in message
    message = complaint(zip_folder(tmp_path / "imagenet", tmp_path / "i.zip"), tmp_path / "out")
    assert "train/cat/0.png" in message and "i.zip/train?" in message
    (tmp_path / "one" / "cat" / "kitten").mkdir(parents=True)
    for where in ("cat", "cat/kitten"):
        shutil.copy(tmp_path / "imagenet" / "test" / "0.png", tmp_path / "one" / where)
    assert "cat/kitten/0.png" in complaint(tmp_path / "one", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_to_class_folders(folder, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "cat").symlink_to(folder / "cat")
    (folder / "cat" / "loop").symlink_to(folder)
    assert ef.Images(tmp_path / "linked").paths == ["cat/0.png", "cat/1.jpg", "cat/2.webp"]


def test_closing_line_names_classes(folder, small_npz, tmp_path, capsys):
    extract(small_npz, tmp_path / "a")
    assert "96 images of 3 classes: '0', '1', '2'\n" in capsys.readouterr().out
    for name in ("bee", "emu"):
        shutil.copytree(folder / "cat", folder / name)
    extract(folder, tmp_path / "b")
    shown = capsys.readouterr()
    assert "12 images of 4 classes: 'bee', 'cat', 'dog', ...\n" in shown.out
    assert shown.err.count("\r") <= 3, "a bar that is no terminal's prints rarely"


# --- .npz sources


def test_npz_is_streamed(tmp_path):
    """Any order, stored or deflated, without holding the images; the reader can go to another process."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 20, 10, 3), dtype=np.uint8)
    np.savez(tmp_path / "stored.npz", arr_0=pixels, arr_1=np.arange(300) % 7)
    np.savez_compressed(tmp_path / "deflated.npz", arr_0=pixels, arr_1=np.arange(300) % 7)
    for name in ("stored.npz", "deflated.npz"):
        images = ef.Images(tmp_path / name, limit=150)
        images = pickle.loads(pickle.dumps(images))
        assert max(getattr(value, "nbytes", 0) for value in vars(images).values()) < 3000
        for i in (149, 0, 75, 74):
            assert np.array_equal(images[i], pixels[images.rows[i]])


def test_npz_with_large_labels(tmp_path):
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    for labels, classes, expected in (
        (np.array([3, 1, 3, 0]), list("0123"), [3, 1, 3, 0]),
        (np.array([127, 0, 1, 2], np.int8), [str(i) for i in range(128)], [127, 0, 1, 2]),
        (np.array([10**12, 5, 7, 10**12]), ["5", "7", str(10**12)], [2, 0, 1, 2]),
        (np.array([2**64 - 1, 0, 0, 1], np.uint64), ["0", "1", str(2**64 - 1)], [2, 0, 0, 1]),
    ):
        np.savez(tmp_path / "source.npz", arr_0=pixels, arr_1=labels)
        images = ef.Images(tmp_path / "source.npz")
        assert images.classes == classes
        assert images.labels.tolist() == expected and images.labels.dtype == np.int64


def flip_byte(path, needle, offset=0):
    data = bytearray(path.read_bytes())
    data[data.rindex(needle) + offset] ^= 1
    path.write_bytes(data)


def test_damaged_npz(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    labels = np.zeros(40, int)
    path, out = tmp_path / "source.npz", tmp_path / "out"
    for arr_0, arr_1, found in (
        (pixels[:0], labels[:0], "[0, 8, 8, 3]"),
        (np.asfortranarray(pixels), labels, "uint8 [40, 8, 8, 3]"),
        (pixels, labels[:7], "int64 [7]"),
        (pixels, labels - 1, "int64 [40]"),
        (pixels, labels + 0.5, "float64 [40]"),
        (pixels, np.array([{}] * 40, object), "Object arrays"),
    ):
        np.savez(path, arr_0=arr_0, arr_1=arr_1)
        assert found in complaint(path, out)
    np.savez(path, arr_0=pixels, arr_1=labels)
    whole = path.read_bytes()
    flip_byte(path, pixels[20].tobytes())
    assert "wrong checksum of arr_0.npy" in complaint(path, out)
    path.write_bytes(whole[:5000])
    assert "source.npz" in complaint(path, out)
    path.write_bytes(whole.replace(b"(40, 8, 8, 3)", b"(10**9, 8, 3)"))
    assert "source.npz" in complaint(path, out)
    np.savez(path, arr_0=pixels)
    data = path.read_bytes().replace(b"(40, 8, 8, 3), }  ", b"(4000000000, 8, 8, 3), }  "[:18].ljust(18))
    path.write_bytes(data)
    assert "source.npz" in complaint(path, out)
    assert not out.exists()


# --- damaged files and folders


def test_damaged_archives(folder, tmp_path):
    out = tmp_path / "out"
    path = zip_folder(folder, tmp_path / "src.zip")
    flip_byte(path, (folder / "dog" / "0.png").read_bytes(), 100)
    assert "dog/0.png" in complaint(path, out)
    for name in ("/cat/9.png", "../cat/9.png", "cat/../../9.png"):
        with zipfile.ZipFile(zip_folder(folder, path), "a") as archive:
            archive.writestr(name, b"")
        assert name in complaint(path, tmp_path / "no")
    data = bytearray(zip_folder(folder, path).read_bytes())
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # the bit for encrypted members
        data[data.rindex(mark) + place] |= 1
    path.write_bytes(data)
    assert "dog/2.webp" in complaint(path, tmp_path / "locked") and not (tmp_path / "no").exists()
    path.write_bytes(b"")
    assert "src.zip" in complaint(path, tmp_path / "no")


@pytest.mark.parametrize("name", ["truncated.jpg", "narrow.png", "empty.png", "bomb.png", "folder.png"])
def test_damaged_images_are_named(folder, tmp_path, name):
    path = folder / "cat" / name
    if name == "truncated.jpg":
        Image.new("RGB", (64, 64)).save(path)
        path.write_bytes(path.read_bytes()[:400])
    elif name == "narrow.png":
        Image.new("L", (1, 60_000)).save(path)
    elif name == "empty.png":
        Image.new("L", (1, 1)).save(path)
        path.write_bytes(path.read_bytes().replace(b"IHDR\0\0\0\1", b"IHDR\0\0\0\0"))
    elif name == "bomb.png":
        Image.new("1", (20_000, 10_000)).save(path)
    else:
        path.mkdir()
    assert f"cat/{name}" in complaint(folder, tmp_path / "out")


def test_unwritable_output(small_npz, tmp_path):
    (tmp_path / "file").write_text("precious")
    for out in ("file", "file/below", "/dev/full/below"):
        assert str(out) in complaint(small_npz, tmp_path / out)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_full_disk_is_named():
    class Full(ef.ArrayFile):
        def __init__(self):
            self.offset, self.row, self.dtype = 0, 8, np.int64
            self.file = open("/dev/full", "wb", buffering=0)

    with pytest.raises(OSError, match="/dev/full: "):
        Full().write(0, np.zeros(1))


def test_repaired_images_count_again(folder, tmp_path, capsys):
    """Skipped by a run that was killed, repaired, found again by the run that ends the work."""
    good = (folder / "dog" / "1.jpg").read_bytes()
    (folder / "dog" / "1.jpg").write_bytes(b"no picture")
    (folder / "dog" / "2.webp").write_bytes(b"no picture")
    complaint(folder, tmp_path / "out", "--batch-size", 2)
    labels = np.load(tmp_path / "out" / "labels.npy", mmap_mode="r+")
    labels[4] = -1
    labels.flush()
    (folder / "dog" / "1.jpg").write_bytes(good)
    extract(folder, tmp_path / "out", "--batch-size", 2, "--skip-bad")
    features = ef.CachedFeatures(tmp_path / "out")
    assert features.labels.tolist() == [0, 0, 0, 1, 1] and features.meta["skipped"] == [5]
    said, warned = capsys.readouterr()
    assert "complete, 5 images of 2 classes: 'cat', 'dog'; 1 unreadable" in said
    assert "skipped: " in warned and "2.webp" in warned and "--skip-bad" not in warned


def test_nothing_readable(folder, tmp_path):
    for path in folder.rglob("*.*"):
        path.write_bytes(b"no picture")
    assert "none of its images" in complaint(folder, tmp_path / "out", "--skip-bad")


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_targets_that_are_not_finite(small_npz, tmp_path, monkeypatch, dtype):
    call = ef.HOG.__call__
    monkeypatch.setattr(ef.HOG, "__call__", lambda self, images: call(self, images) * math.nan)
    message = complaint(small_npz, tmp_path / "out", "--target-dtype", dtype, "--batch-size", 32)
    assert "targets of images 0 to 31" in message and dtype in message


FLAGS = "--image-size 0|--patch 2.5|--patch 0|--crops -1|--seed -1|--limit 0|--workers -1|--batch-size 0"


@pytest.mark.parametrize("flag", [*FLAGS.split("|"), "--image-size 1" + 400 * "0", "--limit 97"])
def test_wrong_numbers_are_refused_beside_their_flag(small_npz, tmp_path, flag):
    message = complaint(small_npz, tmp_path / "out", *flag.split())
    assert flag.split()[0] in message and len(message) < 300 and not (tmp_path / "out").exists()


def test_unreadable_image_is_named(folder, tmp_path):
    (folder / "dog" / "1.jpg").write_bytes(b"not a picture")
    for workers in ("0", "1"):
        with pytest.raises(SystemExit, match="dog/1.jpg"):
            extract(folder, tmp_path / f"out{workers}", "--workers", workers)


def test_size_must_divide(small_npz, tmp_path):
    with pytest.raises(SystemExit, match="--image-size 8 .* 6 or 9"):
        extract(small_npz, tmp_path / "out", "--patch", 3)
    with pytest.raises(SystemExit, match="not a ViT that timm knows"):
        extract(small_npz, tmp_path / "out", "--encoder", "resnet")


# --- HOG


def test_hog_against_a_slow_loop():
    """Votes of every pixel, one at a time, for a 12 x 12 picture in cells of 3 x 3."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8, generator=generator)
    grid, cell, bins = 4, 3, 9
    for image, result in zip(images, ef.HOG(grid)(images), strict=True):
        grey = image.double().mean(0) / 255

        def at(y, x, grey=grey):
            return grey[min(max(y, 0), 11), min(max(x, 0), 11)].item()

        cells = np.zeros((grid, grid, bins))
        for y in range(12):
            for x in range(12):
                dx, dy = (at(y, x + 1) - at(y, x - 1)) / 2, (at(y + 1, x) - at(y - 1, x)) / 2
                position = (math.atan2(dy, dx) % math.pi) / math.pi * bins
                low, share = int(position), position - int(position)
                cells[y // cell, x // cell, low % bins] += math.hypot(dx, dy) * (1 - share) / cell**2
                cells[y // cell, x // cell, (low + 1) % bins] += math.hypot(dx, dy) * share / cell**2
        padded = np.pad(cells, ((1, 1), (1, 1), (0, 0)), mode="edge")
        for row in range(grid):
            for column in range(grid):
                block = padded[row : row + 3, column : column + 3].transpose(2, 0, 1).ravel()
                vector = np.append(block, ef.HOG.floor)
                expected = vector / np.linalg.norm(vector)
                np.testing.assert_allclose(result[row * grid + column], expected, atol=1e-5)


def test_hog_of_a_flat_image_is_no_zero_vector():
    targets = ef.HOG(2)(torch.full((1, 3, 8, 8), 7, dtype=torch.uint8))
    assert torch.allclose(targets.norm(dim=-1), torch.ones(1, 4))


# --- cache


def test_cache_contents(cache, small_npz):
    """Latents are pixels, the second view is the mirror image with its own targets, control is its box."""
    features = ef.CachedFeatures(cache)
    assert len(features) == 192 and features.meta["views"] == 2
    assert features.meta["classes"] == ["0", "1", "2"]
    indices = [7, 0, 191, 7, 64]
    batch = features.__getitems__(indices)
    source = ef.Images(small_npz)
    for row, index in enumerate(indices):
        crop = np.asarray(ef.center_crop(source[index // 2], 8)).transpose(2, 0, 1)
        crop = (crop[:, :, ::-1] if index % 2 else crop).copy()
        np.testing.assert_allclose(batch["moments"][row, :3], crop / 127.5 - 1, atol=2**-11)
        assert (batch["moments"][row, 3:] == 0).all()
        assert batch["labels"][row] == source.labels[index // 2]
        assert batch["control"][row].tolist() == [8, 12, 0, 2, 8, 8, index % 2]
        expected = ef.HOG(4)(torch.from_numpy(crop)[None])[0]
        np.testing.assert_allclose(batch["targets"][row], expected, atol=1e-3)
    assert batch["moments"].dtype == batch["targets"].dtype == np.float16


def test_crops(tmp_path):
    """K random squares: inside the image, as large as promised; pixels and targets are those of the box."""
    rng = np.random.default_rng(1)
    source = tmp_path / "source.npz"
    pixels = rng.integers(0, 256, (40, 24, 20, 3), dtype=np.uint8)
    np.savez(source, arr_0=pixels, arr_1=np.zeros(40, np.int64))

    def cache(out, *options):
        extract(source, tmp_path / out, "--crops", "5", *options)
        return ef.CachedFeatures(tmp_path / out)

    flipped, plain, other = cache("a", "--flip"), cache("b"), cache("c", "--seed", "1")
    assert [features.meta["views"] for features in (flipped, plain, other)] == [7, 6, 6]
    images = ef.Images(source)
    batch = flipped.__getitems__(range(280))
    for index, (h0, w0, top, left, h, w, flip) in enumerate(batch["control"].tolist()):
        view = index % 7
        assert (h0, w0) == (24, 20) and h == w and 0 <= top <= 24 - h and 0 <= left <= 20 - w
        if view < 2:
            assert (top, left, h, flip) == (2, 0, 20, view)
        assert 12 <= h <= 20  # round(20 sqrt(0.4)) = 13, less half a pixel
        if view < 2:  # the centre crop is ADM's, cut after scaling
            continue
        pixels = images[index // 7].crop((left, top, left + w, top + h))
        if h >= 16:
            pixels = pixels.resize((h // 2, h // 2), Image.Resampling.BOX)
        pixels = pixels.resize((8, 8), Image.Resampling.BICUBIC)
        pixels = np.asarray(pixels).transpose(2, 0, 1)
        pixels = (pixels[:, :, ::-1] if flip else pixels).copy()
        np.testing.assert_allclose(batch["moments"][index, :3], pixels / 127.5 - 1, atol=2**-11)
        expected = ef.HOG(4)(torch.from_numpy(pixels)[None])[0]
        np.testing.assert_allclose(batch["targets"][index], expected, atol=1e-3)
    random = batch["control"].reshape(40, 7, 7)[:, 2:].reshape(200, 7)
    areas = random[:, 4] ** 2 / 400
    assert 0.38 < areas.min() < 0.45 and 0.95 < areas.max() <= 1 and abs(areas.mean() - 0.7) < 0.04
    assert 0.35 < random[:, 6].mean() < 0.65 and len(np.unique(random[:, 2])) > 8
    assert not plain.arrays["control"][:, 6].any(), "without --flip nothing is mirrored"
    assert (plain.arrays["control"] != other.arrays["control"]).any()


def test_random_squares_stay_inside():
    rng = np.random.default_rng(0)
    for _ in range(100):
        width, height = rng.integers(1, 50, 2).tolist()
        _, control = ef.image_views(Image.new("RGB", (width, height)), 2, False, 20, rng)
        h0, w0, top, left, h, w, _ = control.T
        assert (h0 == height).all() and (w0 == width).all() and (h == w).all() and (h >= 1).all()
        assert (top >= 0).all() and (left >= 0).all() and (top + h <= h0).all() and (left + w <= w0).all()


def test_control_table(cache):
    """Rows of the class's own centred views; zeros for a class without images."""
    features = ef.CachedFeatures(cache)
    rows = np.array(features.arrays["control"])
    rows[::2, 0] = np.arange(96)
    features.arrays["control"], features.meta = rows, features.meta | {"classes": ["0", "1", "2", "empty"]}
    table = features.control_table
    assert table.shape == (4, 50, 7) and table.dtype == torch.int32 and not table[3].any()
    for label in range(3):
        assert (table[label, :, 0] % 3 == label).all() and (table[label, :, 6] == 0).all()
        assert len(np.unique(table[label, :, 0])) == 32


def test_a_pickled_reader_opens_the_files_itself(cache):
    features = ef.CachedFeatures(cache)
    content = pickle.dumps(features)
    assert len(content) < 1000
    for name, rows in pickle.loads(content).__getitems__([3]).items():
        assert np.array_equal(rows, features.__getitems__([3])[name])


def test_int8_targets_keep_the_direction(small_npz, cache, tmp_path):
    extract(small_npz, tmp_path / "int8", "--target-dtype", "int8", "--flip")
    whole = torch.from_numpy(ef.CachedFeatures(cache).__getitems__(range(192))["targets"]).float()
    small = torch.from_numpy(ef.CachedFeatures(tmp_path / "int8").__getitems__(range(192))["targets"])
    assert small.dtype == torch.int8
    assert torch.nn.functional.cosine_similarity(whole, small.float(), dim=-1).min() > 0.9995


def extract_and_die(command):
    write, calls = ef.ArrayFile.write, []

    def write_and_die(self, *args):
        calls.append(write(self, *args))
        if len(calls) == 17:
            os.kill(os.getpid(), signal.SIGKILL)

    ef.ArrayFile.write = write_and_die
    ef.main(command)


def test_cache_does_not_depend_on_ranks_or_a_kill(small_npz, tmp_path, processes):
    """Written by one process, or by one that is killed halfway and then two: the same bytes."""
    command = "--image-size 8 --patch 1 --vae none --encoder hog --batch-size 8 --workers 0".split()
    command += ["--data", str(small_npz), "--out", str(tmp_path / "two")]
    extract(small_npz, tmp_path / "one", "--patch", 1, "--batch-size", 8)
    assert exit_code(processes, extract_and_die, command) == -signal.SIGKILL
    with pytest.raises(ValueError, match="incomplete; run the same"):
        ef.CachedFeatures(tmp_path / "two")
    done = np.load(tmp_path / "two" / "progress.npy")
    assert 0 < done.sum() < len(done)
    run("extract_features.py", *command, processes=2)
    one = contents(tmp_path / "one")
    assert set(one) == {"meta.json", "moments.npy", "labels.npy", "control.npy", "targets.npy"}
    assert contents(tmp_path / "two") == one


def test_existing_output(small_npz, tmp_path, capsys):
    extract(small_npz, tmp_path / "out")
    before = contents(tmp_path / "out")
    extract(small_npz, tmp_path / "out")
    with pytest.raises(SystemExit, match="views is 1 there, 2 here|flip is False there, True here"):
        extract(small_npz, tmp_path / "out", "--flip")
    assert contents(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(SystemExit, match="holds other files, such as thesis.txt"):
        extract(small_npz, tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"thesis.txt": b"precious"}


def test_reader_refuses(small_npz, tmp_path):
    with pytest.raises(ValueError, match="no feature cache there"):
        ef.CachedFeatures(tmp_path)
    extract(small_npz, tmp_path / "out", "--encoder", "none")
    with pytest.raises(ValueError, match=f"did you mean {tmp_path / 'out'}"):
        ef.CachedFeatures(tmp_path)
    assert "targets" not in ef.CachedFeatures(tmp_path / "out", targets=False).__getitems__([0])
    with pytest.raises(ValueError, match="no targets; extract it with an --encoder"):
        ef.CachedFeatures(tmp_path / "out")
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    (tmp_path / "out" / "meta.json").write_text(json.dumps(meta | {"format_version": 0}))
    with pytest.raises(ValueError, match="cache format 0"):
        ef.CachedFeatures(tmp_path / "out", targets=False)


# --- what the reader and a continued extraction find


WRONG = dict(
    count=[0, -1, 95, 2**40, "96", 1.5, None, 10**30],
    classes=[[], {}, ["0", "1"], ["0", "1", 2], ["0", "0", "1"], None],
    image_size=[0, None],
    views=[0, 2, "1"],
    flip=[True, None],
    crops=[-1, 1],
    latent_channels=[0, 4, 3.0],
    latent_side=[0, 7, 16],
    latent_scale=[0, -1, math.inf, math.nan, 10**400, "0.18215", None],
    latent_shift=[math.nan, math.inf, "0", None],
    target_widths=[[], [81], [82, -1], ["82"], [[82]], 82],
    grid=[0, 3, 8, None],
    arrays=[{}, [], {"moments": None}, {"labels": {"shape": [96], "dtype": "object"}}, None],
    skipped=[[0], None],
    limit=["6"],
    chunk=[0],
    complete=["yes", 1, None],
    source=[None],
    encoder=[None],
)


@pytest.fixture(scope="module")
def plain(small_npz, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "out"
    extract(small_npz, out)
    return out


@pytest.mark.parametrize("key", WRONG)
def test_unsound_meta(plain, tmp_path, key):
    """Each refused by a line that names the file and what to do."""
    out = shutil.copytree(plain, tmp_path / "out")
    meta = json.loads((out / "meta.json").read_text())
    for value in [*WRONG[key], KeyError]:
        changed = {k: v for k, v in meta.items() if k != key} | ({} if value is KeyError else {key: value})
        (out / "meta.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError) as error:
            ef.CachedFeatures(out)
        message = str(error.value)
        assert str(out) in message and "\n" not in message and len(message) < 400
        assert "again" in message or "with an --encoder" in message


NO_DICTS = ["", "{", "[]", "null", '"text"', "NaN", "\0" * 9, "[" * 100_000, '{"a": 1' + "0" * 9999 + "}"]


@pytest.mark.parametrize("text", NO_DICTS, ids=range(len(NO_DICTS)))
def test_meta_that_is_no_dict(plain, small_npz, tmp_path, text):
    out = shutil.copytree(plain, tmp_path / "out")
    (out / "meta.json").write_text(text)
    with pytest.raises(ValueError, match="meta.json.* again"):
        ef.CachedFeatures(out)
    assert "meta.json" in complaint(small_npz, out) and (out / "meta.json").read_text() == text


def damage(path, kind):
    array, size = np.load(path), path.stat().st_size
    if kind == "missing":
        path.unlink()
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[: size - 1])
    elif kind == "big endian":
        np.save(path, array.astype(array.dtype.newbyteorder(">")))
    elif kind == "Fortran order":
        np.save(path, np.asfortranarray(array) if array.ndim > 1 else array[::2])
    elif kind == "another shape":
        np.save(path, array[1:])
    elif kind == "another dtype":
        np.save(path, array.astype(np.float64))
    elif kind == "objects":
        np.save(path, array.astype(object))
    elif kind == "an archive":
        with open(path, "wb") as file:
            np.savez(file, array)
    elif kind == "absurd header":
        path.write_bytes(path.read_bytes().replace(b"'shape': (96,", b"'shape': (9**9999999,"[:13]))


KINDS = ["missing", "a folder", "empty", "truncated", "big endian", "Fortran order", "another shape"]


@pytest.mark.parametrize("kind", [*KINDS, "another dtype", "objects", "an archive", "absurd header"])
def test_damaged_arrays(plain, small_npz, tmp_path, kind):
    for name in ("moments", "labels", "control", "targets"):
        out = shutil.copytree(plain, tmp_path / name)
        damage(out / f"{name}.npy", kind)
        with pytest.raises(ValueError, match=f"{name}.npy: damaged .* again"):
            ef.CachedFeatures(out)
        assert f"{name}.npy" in complaint(small_npz, out), "the same command does not call it complete"


def test_labels_that_are_no_classes(plain, tmp_path):
    for wrong in (3, -1, -2, 2**62):
        out = shutil.copytree(plain, tmp_path / str(wrong))
        labels = np.load(out / "labels.npy", mmap_mode="r+")
        labels[5] = wrong
        labels.flush()
        with pytest.raises(ValueError, match="labels.npy"):
            ef.CachedFeatures(out)


@pytest.mark.parametrize("kind", ["empty", "another shape", "another dtype"])
def test_damaged_progress(plain, small_npz, tmp_path, kind):
    out = shutil.copytree(plain, tmp_path / "out")
    meta = json.loads((out / "meta.json").read_text())
    (out / "meta.json").write_text(json.dumps(meta | {"complete": False}))
    np.save(out / "progress.npy", np.array([1, 0], np.uint8))
    damage(out / "progress.npy", kind)
    before = contents(out)
    assert "progress.npy" in complaint(small_npz, out) and contents(out) == before


def test_two_extractions_do_not_share_a_folder(small_npz, tmp_path):
    lock = ef.lock_folder(tmp_path / "out")
    assert "another process" in complaint(small_npz, tmp_path / "out")
    lock.close()
    extract(small_npz, tmp_path / "out")
