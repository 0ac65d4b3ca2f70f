"""extract_features.py: sources, the ADM crop, HOG, the cache on disk and its reader."""

import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import threading
import time
import zipfile
from collections import namedtuple

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from conftest import EXTRACT, ROOT, command_line, exit_code, run
from conftest import extract as extract_small
from PIL import Image

import extract_features as ef
import fid
import files


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
    extract_small(data, out, "--batch-size", 64, *options)


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def rgb(images, i):
    return np.asarray(ef.to_rgb(images[i]))


def complaint(data, out, *options):
    """The one line that an extraction ends in."""
    with pytest.raises(SystemExit) as error:
        extract(data, out, *options)
    message = str(error.value)
    assert "\n" not in message and message.startswith("extract_features.py: ")
    return message


def zip_folder(folder, path, above=""):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, f"{above}{file.relative_to(folder)}")
    return path


# --- images


def test_folder_zip_and_npz_give_the_same_images(folder, tmp_path):
    from_folder = ef.Images(folder)
    from_zip = ef.Images(zip_folder(folder, tmp_path / "src.ZIP"))
    assert from_folder.classes == from_zip.classes == ["cat", "dog"]
    assert from_folder.labels.tolist() == from_zip.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for i, path in enumerate(sorted(folder.rglob("*.*"))):
        expected = np.asarray(Image.open(path).convert("RGB"))
        assert np.array_equal(rgb(from_folder, i), expected)
        assert np.array_equal(rgb(from_zip, i), expected)
    crops = [np.asarray(ef.center_crop(ef.to_rgb(from_folder[i]), 8)) for i in range(6)]
    for name in ("src.npz", "SRC.NPZ"):
        with open(tmp_path / name, "wb") as file:
            np.savez(file, arr_0=np.stack(crops), arr_1=from_folder.labels)
        from_npz = ef.Images(tmp_path / name)
        assert np.array_equal(rgb(from_npz, 4), crops[4])
        assert from_npz.labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.fixture
def numbered(folder):
    """The pictures in shards with dataset.json, as StyleGAN, EDM2 and REPA write them."""
    paths = sorted(folder.rglob("*.*"))
    entries = []
    for i, path in enumerate(paths):
        name = f"{i % 2:05d}/img{i:08d}{path.suffix}"
        (folder / name).parent.mkdir(exist_ok=True)
        path.rename(folder / name)
        entries.append([name, [6, 2, 6, 0, 2, 6][i]])
    for name in ("cat", "dog"):
        (folder / name).rmdir()
    (folder / "dataset.json").write_text(json.dumps({"labels": entries}))
    return folder


def test_labels_of_dataset_json(numbered, tmp_path):
    sources = [numbered]
    for above in ("", "my/ds/"):
        sources.append(zip_folder(numbered, tmp_path / f"{len(above)}.zip", above))
    labels = dict(json.loads((numbered / "dataset.json").read_text())["labels"])
    for source in sources:
        images = ef.Images(source)
        assert images.classes == list("0123456")
        assert {images.name(i): label for i, label in enumerate(images.labels)} == labels
        assert rgb(images, 2).shape[2] == 3
    extract(sources[2], tmp_path / "zipped", "--workers", 2)
    extract(sources[0], tmp_path / "plain")
    zipped, plain = ef.CachedFeatures(tmp_path / "zipped"), ef.CachedFeatures(tmp_path / "plain")
    assert plain.labels.tolist() == [6, 6, 2, 2, 0, 6]
    for name, rows in plain.__getitems__(range(6)).items():
        assert np.array_equal(rows, zipped.__getitems__(range(6))[name])
    (numbered / "dataset.json").write_text('{"labels": null}')
    images = ef.Images(numbered)
    assert images.classes == ["0"] and images.labels.tolist() == 6 * [0]


def test_dataset_json_that_does_not_fit(numbered, tmp_path):
    entries = json.loads((numbered / "dataset.json").read_text())["labels"]
    name = entries[3][0]
    for content, found in (
        ({"labels": entries[:3] + entries[4:]}, name),
        ({"labels": [*entries, ["00000/gone.png", 1]]}, "00000/gone.png"),
        ({"labels": [[name, [0.0, 1.0]] for name, _ in entries]}, "float64"),
        ({"labels": [[name, -1] for name, _ in entries]}, "int64"),
        ({"labels": [[name, "cat"] for name, _ in entries]}, "dataset.json"),
        ({}, "labels"),
        ([], "dataset.json"),
    ):
        (numbered / "dataset.json").write_text(json.dumps(content))
        message = complaint(numbered, tmp_path / "out")
        assert "dataset.json" in message and found in message
    (numbered / "dataset.json").write_text("{")
    assert "dataset.json" in complaint(numbered, tmp_path / "out")


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


def test_narrow_images_do_not_fill_the_memory():
    image = Image.new("L", (1, 199))
    assert ef.center_crop(image, 1024).size == (1024, 1024)                       # 2.1e8 pixels
    with pytest.raises(ValueError, match="4096 x 815104"):
        ef.center_crop(image, 4096)
    with pytest.raises(ValueError, match="815104 x 4096"):
        ef.center_crop(image.transpose(Image.Transpose.ROTATE_90), 4096)


def test_unusable_sources(folder, tmp_path, monkeypatch):
    def complain(data):
        message = complaint(data, tmp_path / "out")
        assert not (tmp_path / "out" / "meta.json").exists()
        return message

    assert "no such file" in complain(tmp_path / "nowhere")
    (folder / "empty").mkdir()
    assert "'empty' holds no image" in complain(folder)
    (folder / "empty" / "loose.txt").write_text("no image")
    assert "'empty' holds no image" in complain(folder)
    (folder / "top.png").write_bytes(b"")
    assert "top.png is in no class folder" in complain(folder)
    (tmp_path / "nothing" / "cat").mkdir(parents=True)
    assert "holds no image" in complain(tmp_path / "nothing")
    (tmp_path / "text.zip").write_text("no zip")
    assert "expected a folder" in complain(tmp_path / "text.zip")
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((4, 8, 8, 3)), arr_1=np.zeros(4, int))
    found = complain(tmp_path / "float.npz")
    assert "uint8 [N, H, W, 3]" in found and "float64 [4, 8, 8, 3]" in found
    np.savez(tmp_path / "object.npz", arr_0=np.array([{}], dtype=object))
    assert "no ADM .npz" in complain(tmp_path / "object.npz")
    np.savez(tmp_path / "good.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8), arr_1=np.zeros(4, int))
    usage = namedtuple("usage", "total used free")(1, 1, 100)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    assert "0.0 GB are free" in complain(tmp_path / "good.npz")


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
    assert all(np.array_equal(rgb(wrapped, i), rgb(plain, i)) for i in range(6))


def test_hidden_files_and_other_formats(folder, tmp_path, capsys):
    """Hidden files are no images; other formats are counted, and one of them is named."""
    for name in (".cache/0.png", "cat/.0.png", "cat/._1.jpg", "__MACOSX/cat/0.png", ".png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    Image.open(folder / "cat" / "0.png").save(folder / "dog" / "B.BMP")
    shutil.copy(folder / "dog" / "B.BMP", folder / "dog" / "a.gif")
    shutil.copy(folder / "cat" / "0.png", folder / "cat" / "UPPER.PNG")
    images = ef.Images(folder)
    assert images.names == [
        *("cat/0.png", "cat/1.jpg", "cat/2.webp", "cat/UPPER.PNG"),
        *("dog/0.png", "dog/1.jpg", "dog/2.webp"),
    ]
    shown = capsys.readouterr().out
    assert "2 images are left out" in shown and "dog/B.BMP" in shown and shown.count("\n") == 1


def test_one_level_too_high(folder, tmp_path):
    """The folder meant is named: the one with most of the images, not that with loose ones."""
    shutil.move(folder, tmp_path / "imagenet" / "train")
    (tmp_path / "imagenet" / "test").mkdir()
    shutil.copy(tmp_path / "imagenet" / "train" / "cat" / "0.png", tmp_path / "imagenet" / "test")
    message = complaint(tmp_path / "imagenet", tmp_path / "out")
    assert "train/cat/0.png" in message and f"did you mean {tmp_path}/imagenet/train?" in message
    message = complaint(zip_folder(tmp_path / "imagenet", tmp_path / "i.zip"), tmp_path / "out")
    assert "train/cat/0.png" in message and "its folder train" in message
    (tmp_path / "one" / "cat" / "kitten").mkdir(parents=True)
    for where in ("cat", "cat/kitten"):
        shutil.copy(tmp_path / "imagenet" / "test" / "0.png", tmp_path / "one" / where)
    assert "cat/kitten/0.png" in complaint(tmp_path / "one", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_splits_are_no_classes(folder, tmp_path):
    for split, name in (("train", "cat"), ("val", "dog")):
        shutil.move(folder / name, folder / split)
    message = complaint(folder, tmp_path / "out")
    assert "train, val" in message and f"did you mean {folder}/train?" in message
    assert "0.png is in no class folder" in complaint(folder / "train", tmp_path / "out")
    shutil.move(folder / "val", folder / "cat")
    assert ef.Images(folder).classes == ["cat", "train"], "one may be called so"


def test_links_to_class_folders(folder, tmp_path):
    """Links are followed, but none that leads back, whether by one step or by two."""
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "cat").symlink_to(folder / "cat")
    (folder / "cat" / "loop").symlink_to(folder / "cat")
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "again").symlink_to(folder / "cat")
    (folder / "cat" / "back").symlink_to(tmp_path / "back")
    assert ef.Images(tmp_path / "linked").names == ["cat/0.png", "cat/1.jpg", "cat/2.webp"]


def test_closing_line_names_classes(folder, small_npz, tmp_path, capsys):
    extract(small_npz, tmp_path / "a")
    assert "96 images of 3 classes: '0', '1', '2'\n" in capsys.readouterr().out
    for name in ("bee", "emu"):
        shutil.copytree(folder / "cat", folder / name)
    extract(folder, tmp_path / "b")
    shown = capsys.readouterr()
    assert "12 images of 4 classes: 'bee', 'cat', 'dog', ...\n" in shown.out
    assert shown.err.count("\r") <= 3, "a bar that is no terminal's prints rarely"
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "few.npz", arr_0=pixels, arr_1=np.array([900, 900]))
    extract(tmp_path / "few.npz", tmp_path / "c")
    shown = capsys.readouterr().out
    assert "2 images of 901 classes" in shown and "900 of 901 classes hold no image" in shown


def test_what_is_ignored_is_counted(folder, tmp_path, capsys):
    """EXIF rotations and transparency, as in ADM; a damaged EXIF block is no reason to stop."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (20, 30))
    image.save(folder / "cat" / "turned.jpg", exif=exif)
    image.save(folder / "cat" / "turned.png", exif=exif)
    image.save(folder / "cat" / "broken.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09broken")
    image.convert("RGBA").save(folder / "dog" / "alpha.png")
    extract(folder, tmp_path / "out", "--workers", 1)
    shown = capsys.readouterr().out
    assert "10 images" in shown and "2 images carry an EXIF rotation" in shown
    assert "1 images are transparent" in shown
    extract(folder, tmp_path / "out")
    assert "EXIF" not in capsys.readouterr().out, "nothing was read"


# --- .npz sources


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


def test_limit_of_an_npz(tmp_path):
    """Stored or deflated, evenly spread."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 20, 10, 3), dtype=np.uint8)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "source.npz", arr_0=pixels, arr_1=np.arange(300) % 7)
        images = ef.Images(tmp_path / "source.npz", limit=150)
        chosen = np.linspace(0, 299, 150).astype(int)
        assert images.labels.tolist() == (chosen % 7).tolist()
        for i in (149, 0, 75, 74):
            assert np.array_equal(images[i], pixels[chosen[i]])


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
        (pixels, labels[:7], "int64 [7]"),
        (pixels, labels - 1, "int64 [40]"),
        (pixels, labels + 0.5, "float64 [40]"),
        (pixels, np.array([{}] * 40, object), "Object arrays"),
    ):
        np.savez(path, arr_0=arr_0, arr_1=arr_1)
        assert found in complaint(path, out)
    for save in (np.savez, np.savez_compressed):
        save(path, arr_0=pixels, arr_1=labels)
        whole = path.read_bytes()
        flip_byte(path, whole[3000:3020])
        assert "no ADM .npz" in complaint(path, out)
        path.write_bytes(whole[:5000])
        assert "source.npz" in complaint(path, out)
    np.savez(path, arr_0=pixels, arr_1=labels)
    flip_byte(path, pixels[20].tobytes())
    assert "CRC" in complaint(path, out)
    np.savez(path, arr_0=pixels)
    whole = path.read_bytes()
    for shape in (b"(10**9, 8, 3)    ", b"(4000000000, 8, 8"):
        path.write_bytes(whole.replace(b"(40, 8, 8, 3), }  ", shape + b"}"))
        assert "source.npz" in complaint(path, out)
    assert not out.exists()


# --- damaged files and folders


def test_damaged_archives(folder, tmp_path):
    path = zip_folder(folder, tmp_path / "src.zip")
    flip_byte(path, (folder / "dog" / "0.png").read_bytes(), 100)
    assert "dog/0.png" in complaint(path, tmp_path / "out")
    data = bytearray(zip_folder(folder, path).read_bytes())
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # the bit for encrypted members
        for i in range(len(data)):
            if data.startswith(mark, i):
                data[i + place] |= 1
    path.write_bytes(data)
    assert "cat/0.png" in complaint(path, tmp_path / "locked")
    path.write_bytes(b"")
    assert "src.zip" in complaint(path, tmp_path / "no")


@pytest.mark.parametrize("name", ["truncated.jpg", "narrow.png", "empty.png", "bomb.png", "float.png"])
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
        Image.new("F", (8, 8)).save(path, format="TIFF")  # PIL looks at the content
    message = complaint(folder, tmp_path / "out", "--image-size", 128)
    assert f"cat/{name}" in message and "--skip-bad" in message


def test_unwritable_output(small_npz, tmp_path):
    (tmp_path / "file").write_text("precious")
    for out in ("file", "file/below", "/dev/full/below"):
        assert str(out) in complaint(small_npz, tmp_path / out)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("calls", [1, 2, 6])
def test_an_error_of_the_writer_ends_the_program(small_npz, tmp_path, monkeypatch, calls):
    """The first, a middle and the last of six files cannot be written: the others are whole."""
    write, written = files.write_tensors, []

    def full_disk(path, tensors):
        written.append(path)
        if len(written) == calls:
            raise files.UserError(f"cannot write {path} (No space left on device); free some space")
        write(path, tensors)

    monkeypatch.setattr(files, "write_tensors", full_disk)
    assert "No space left" in complaint(small_npz, tmp_path / "out", "--shard", 16)
    assert len(written) <= calls + 1
    monkeypatch.undo()
    extract(small_npz, tmp_path / "out", "--shard", 16)
    extract(small_npz, tmp_path / "whole", "--shard", 16)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_source_of_the_same_shape_is_refused(folder, small_npz, tmp_path):
    """Names, sizes and labels of the files; for archives the checksums."""
    extract(folder, tmp_path / "out")
    whole = (folder / "dog" / "1.jpg").read_bytes()
    (folder / "dog" / "1.jpg").write_bytes(whole + b"\0")
    assert "source_digest" in complaint(folder, tmp_path / "out")
    (folder / "dog" / "1.jpg").write_bytes(whole)
    extract(folder, tmp_path / "out")
    (folder / "dog" / "1.jpg").rename(folder / "dog" / "1b.jpg")
    assert "source_digest" in complaint(folder, tmp_path / "out")
    content = dict(np.load(small_npz))
    source = tmp_path / "source.npz"
    np.savez(source, **content)
    extract(source, tmp_path / "npz")
    content["arr_0"][5, 0, 0, 0] ^= 1
    np.savez(source, **content)
    assert "source_digest" in complaint(source, tmp_path / "npz")


def test_skipped_images(folder, tmp_path, capsys):
    """They are named; `index` says which images remain; whole files have no such tensor."""
    (folder / "dog" / "1.jpg").write_bytes(b"no picture")
    options = ["--batch-size", 2, "--shard", 3]
    assert "dog/1.jpg" in complaint(folder, tmp_path / "out", *options)
    extract(folder, tmp_path / "out", *options, "--skip-bad")
    said, warned = capsys.readouterr()
    assert "complete, 5 images of 2 classes: 'cat', 'dog'; 1 unreadable" in said
    assert "skipped: " in warned and "dog/1.jpg" in warned and "--skip-bad" not in warned
    assert ef.CachedFeatures(tmp_path / "out").labels.tolist() == [0, 0, 0, 1, 1]
    first = safetensors.torch.load_file(tmp_path / "out" / "00000000.safetensors")
    second = safetensors.torch.load_file(tmp_path / "out" / "00000003.safetensors")
    assert "index" not in first and second["index"].tolist() == [3, 5]


def test_nothing_readable(folder, tmp_path):
    for path in (folder / "cat").rglob("*.*"):
        path.write_bytes(b"no picture")
    message = complaint(folder, tmp_path / "out", "--skip-bad", "--shard", 3)
    assert "none of 3 images in a row is readable" in message


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_source_that_goes_away(folder, tmp_path, monkeypatch, kind):
    """With --skip-bad as well: what is gone is not what is damaged."""
    source = folder if kind == "folder" else zip_folder(folder, tmp_path / "src.zip")
    to_rgb = ef.to_rgb

    def unmount(image):
        if source.exists():
            source.rename(tmp_path / "elsewhere")
            return to_rgb(image)
        raise OSError("Input/output error")

    monkeypatch.setattr(ef, "to_rgb", unmount)
    message = complaint(source, tmp_path / "out", "--skip-bad", "--batch-size", 1)
    assert str(source) in message and "not there any more" in message


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_targets_that_are_not_finite(small_npz, tmp_path, monkeypatch, dtype):
    call = ef.HOG.__call__
    monkeypatch.setattr(ef.HOG, "__call__", lambda self, images: call(self, images) * math.nan)
    message = complaint(small_npz, tmp_path / "out", "--target-dtype", dtype)
    assert "targets of images 0 to 63 are not finite" in message


FLAGS = "--image-size 0|--patch 2.5|--patch 0|--crops -1|--seed -1|--limit 0|--workers -1"
FLAGS += "|--batch-size 0|--shard 0"


@pytest.mark.parametrize("flag", [*FLAGS.split("|"), "--image-size 1" + 400 * "0", "--limit 97"])
def test_wrong_numbers_are_refused_beside_their_flag(small_npz, tmp_path, flag):
    message = complaint(small_npz, tmp_path / "out", *flag.split())
    assert flag.split()[0] in message and len(message) < 300 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named(folder, tmp_path, workers):
    (folder / "dog" / "1.jpg").write_bytes(b"not a picture")
    assert "dog/1.jpg" in complaint(folder, tmp_path / "out", "--workers", workers)


def test_a_pipe_that_is_called_an_image(folder, tmp_path):
    """Reading it would wait for ever."""
    (folder / "dog" / "1.jpg").unlink()
    os.mkfifo(folder / "dog" / "1.jpg")
    assert "dog/1.jpg" in complaint(folder, tmp_path / "out")


def test_size_must_divide(small_npz, tmp_path):
    message = complaint(small_npz, tmp_path / "out", "--patch", 3)
    assert "--image-size 8" in message and "6 or 9" in message
    message = complaint(small_npz, tmp_path / "out", "--encoder", "resnet")
    assert "not a ViT that timm knows" in message


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
                vector = np.append(block, ef.HOG.constant)
                expected = vector / np.linalg.norm(vector)
                np.testing.assert_allclose(result[row * grid + column], expected, atol=1e-5)


def test_hog_of_a_flat_image_is_no_zero_vector():
    targets = ef.HOG(2)(torch.full((1, 3, 8, 8), 7, dtype=torch.uint8))
    assert torch.allclose(targets.norm(dim=-1), torch.ones(1, 4))


# --- cache


def test_cache_contents(cache, small_npz):
    """Latents are pixels, the second view is the mirror image with its own targets and box."""
    features = ef.CachedFeatures(cache)
    assert len(features) == 192 and features.meta["views"] == features.views == 2
    assert features.meta["classes"] == ["0", "1", "2"]
    assert sorted(features.names) == ["control", "labels", "moments", "targets"]
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


def test_files_of_any_size_hold_the_same(small_npz, cache, tmp_path):
    """Batches of all sizes, and files that end with the images or go on."""
    whole = ef.CachedFeatures(cache)
    indices = np.random.default_rng(0).integers(192, size=300)
    sizes = [(7, 3), (20, 64), (32, 32), (95, 10), (96, 96), (5, 1)]
    for shard, batch in sizes:
        out = tmp_path / f"{shard}-{batch}"
        extract(small_npz, out, "--flip", "--shard", shard, "--batch-size", batch)
        assert len(list(out.glob("*.safetensors"))) == math.ceil(96 / shard)
        parts = ef.CachedFeatures(out)
        assert parts.labels.tolist() == whole.labels.tolist()
        for name, rows in whole.__getitems__(indices).items():
            assert np.array_equal(rows, parts.__getitems__(indices)[name])
        assert torch.equal(parts.control_table, whole.control_table)


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
    plain = plain.__getitems__(range(240))["control"]
    assert not plain[:, 6].any(), "without --flip nothing is mirrored"
    assert (plain != other.__getitems__(range(240))["control"]).any()


def test_random_squares_stay_inside():
    rng = np.random.default_rng(0)
    for _ in range(100):
        width, height = rng.integers(1, 50, 2).tolist()
        _, control = ef.image_views(Image.new("RGB", (width, height)), 2, False, 20, rng)
        h0, w0, top, left, h, w, _ = control.T
        assert (h0 == height).all() and (w0 == width).all() and (h == w).all() and (h >= 1).all()
        assert (top >= 0).all() and (left >= 0).all() and (top + h <= h0).all() and (left + w <= w0).all()


def test_control_table(tmp_path):
    """Rows of the class's own centred views; zeros for a class without images."""
    source = tmp_path / "source.npz"
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (96, 8, 12, 3), dtype=np.uint8)
    np.savez(source, arr_0=pixels, arr_1=np.array([0, 1, 3])[np.arange(96) % 3])
    extract(source, tmp_path / "out", "--flip", "--shard", 10)
    features = ef.CachedFeatures(tmp_path / "out")
    numbers = iter(range(96))
    for rows in features.shards:  # number the images, which are all of one size
        rows["control"] = rows["control"].copy()
        rows["control"][::2, 0] = [next(numbers) for _ in rows["control"][::2]]
    table = features.control_table
    assert table.shape == (4, 50, 7) and table.dtype == torch.int32 and not table[2].any()
    for label, rest in ((0, 0), (1, 1), (3, 2)):
        assert (table[label, :, 0] % 3 == rest).all() and (table[label, :, 6] == 0).all()
        assert len(np.unique(table[label, :, 0])) == 32
    assert ef.CachedFeatures(tmp_path / "out", control=False).control_table is None


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
    write, calls = files.write_tensors, []

    def write_and_die(path, tensors):
        write(path, tensors)
        calls.append(path)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    files.write_tensors = write_and_die
    ef.main(command)


def test_cache_does_not_depend_on_ranks_or_a_kill(small_npz, tmp_path, processes):
    """Written by one process, or by one that is killed halfway and then two: the same bytes."""
    command = [*EXTRACT, "--patch", "1", "--batch-size", "3", "--shard", "8"]
    command += ["--data", str(small_npz), "--out", str(tmp_path / "two")]
    extract(small_npz, tmp_path / "one", "--patch", 1, "--batch-size", 3, "--shard", 8)
    assert exit_code(processes, extract_and_die, command) == -signal.SIGKILL
    with pytest.raises(files.UserError, match="incomplete.* run the same"):
        ef.CachedFeatures(tmp_path / "two")
    assert len(list((tmp_path / "two").glob("*.safetensors"))) == 5
    run("extract_features.py", *command, processes=2)
    one = contents(tmp_path / "one")
    assert set(one) == {"meta.json", *(f"{i:08d}.safetensors" for i in range(0, 96, 8))}
    assert contents(tmp_path / "two") == one


def test_existing_output(small_npz, tmp_path):
    extract(small_npz, tmp_path / "out")
    before = contents(tmp_path / "out")
    extract(small_npz, tmp_path / "out")
    assert "flip is False there, True here" in complaint(small_npz, tmp_path / "out", "--flip")
    assert "shard is 1024 there, 7 here" in complaint(small_npz, tmp_path / "out", "--shard", 7)
    assert contents(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert "thesis.txt" in complaint(small_npz, tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"thesis.txt": b"precious"}


def test_reader_refuses(small_npz, tmp_path):
    with pytest.raises(files.UserError, match="no feature cache there"):
        ef.CachedFeatures(tmp_path)
    extract(small_npz, tmp_path / "out", "--encoder", "none")
    with pytest.raises(files.UserError, match=f"did you mean {tmp_path / 'out'}"):
        ef.CachedFeatures(tmp_path)
    features = ef.CachedFeatures(tmp_path / "out", targets=False)
    assert "targets" not in features.__getitems__([0])
    with pytest.raises(files.UserError, match="no targets; extract it with an --encoder"):
        ef.CachedFeatures(tmp_path / "out")
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    (tmp_path / "out" / "meta.json").write_text(json.dumps(meta | {"format_version": 1}))
    with pytest.raises(files.UserError, match="cache format 1, not 2; extract it again"):
        ef.CachedFeatures(tmp_path / "out", targets=False)


def test_model_options(cache):
    features = ef.CachedFeatures(cache)
    assert features.model_options(2) == {"input_size": 8, "in_channels": 3, "num_classes": 3}
    with pytest.raises(files.UserError, match="4x4 targets.* patch 4: train with --model SIZE/2, or"):
        features.model_options(4)
    with pytest.raises(files.UserError, match="patch 3 .*8 x 8.* 1, 2, 4, 8"):
        features.model_options(3)
    assert ef.CachedFeatures(cache, targets=False).model_options(4)["input_size"] == 8


def test_fixed_batch(cache):
    """First views, spread over the classes."""
    features = ef.CachedFeatures(cache)
    batch = features.fixed_batch(6)
    assert batch["y"].tolist() == [0, 0, 1, 1, 2, 2]
    assert (batch["control"][:, 6] == 0).all()
    assert len(features.fixed_batch(1000)["y"]) == 96


def test_extract_digits(tmp_path, monkeypatch):
    """It makes the cache once, repairs it, and uses no process group but that of its caller."""
    monkeypatch.setattr(files, "launch", None)
    monkeypatch.setattr(dist, "destroy_process_group", None)
    out = tmp_path / "digits"
    ef.extract_digits(out, 0, 1, torch.device("cpu"))
    features = ef.CachedFeatures(out)
    assert len(features.labels) == 1797 and features.meta["latent_side"] == 8
    before = contents(out)
    monkeypatch.setattr(ef, "Images", None)
    ef.extract_digits(out, 0, 1, torch.device("cpu"))
    monkeypatch.undo()
    (out / "00001024.safetensors").write_bytes(b"")
    ef.extract_digits(out, 0, 1, torch.device("cpu"))
    assert contents(out) == before


# --- what the reader and a continued extraction find

WRONG = {
    "count": [0, -1, 2**40, "96", 1.5, None, 10**30],
    "classes": [{}, ["0", "1", 2], None],
    "image_size": [0, None],
    "views": [0, 2, "1"],
    "shard": [0, None, 10, "96"],
    "latent_channels": [0, 4, 3.0],
    "latent_side": [0, 7, 16],
    "latent_scale": [math.nan, math.inf, "0.18215", None, ["1"], [math.nan]],
    "latent_shift": [math.nan, math.inf, "0", None, [None]],
    "target_widths": [[], [81], [82, -1], ["82"], [[82]], 82],
    "target_dtype": ["int8", None],
    "grid": [0, 3, 8, None],
    "vae": [None],
    "format_version": [0, "2", None],
}


@pytest.fixture(scope="module")
def plain(small_npz, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "out"
    extract(small_npz, out, "--shard", 40)
    return out


@pytest.mark.parametrize("key", WRONG)
def test_unsound_meta(plain, tmp_path, key):
    """Each refused by a line that names the file and what to do."""
    out = shutil.copytree(plain, tmp_path / "out")
    meta = json.loads((out / "meta.json").read_text())
    for value in [*WRONG[key], KeyError]:
        changed = dict(meta)
        del changed[key]
        if value is not KeyError:
            changed[key] = value
        (out / "meta.json").write_text(json.dumps(changed))
        with pytest.raises(files.UserError) as error:
            ef.CachedFeatures(out)
        message = str(error.value)
        assert str(out) in message and "\n" not in message and len(message) < 400
        assert "again" in message or "with an --encoder" in message


NO_DICTS = ["", "{", "[]", "null", '"text"', "NaN", "\0" * 9, "[" * 100_000]
NO_DICTS.append('{"a": 1' + "0" * 9999 + "}")


@pytest.mark.parametrize("text", NO_DICTS, ids=range(len(NO_DICTS)))
def test_meta_that_is_no_dict(plain, small_npz, tmp_path, text):
    out = shutil.copytree(plain, tmp_path / "out")
    (out / "meta.json").write_text(text)
    with pytest.raises(files.UserError, match="meta.json.* again"):
        ef.CachedFeatures(out)
    message = complaint(small_npz, out, "--shard", 40)
    assert "meta.json" in message and (out / "meta.json").read_text() == text


def damage(path, kind):
    tensors = safetensors.torch.load(path.read_bytes())
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(data[:-1])
    elif kind == "too long":
        path.write_bytes(data + b"\0")
    elif kind == "foreign":
        path.write_text("no tensors\n" * 100)
    elif kind == "another shape":
        tensors["control"] = tensors["control"][:, :, :6].contiguous()
    elif kind == "another dtype":
        tensors["moments"] = tensors["moments"].float()
    elif kind == "no labels":
        del tensors["labels"]
    elif kind == "absurd header":
        path.write_bytes(data.replace(b'"shape":[40', b'"shape":[90'))
    if kind in ("another shape", "another dtype", "no labels"):
        safetensors.torch.save_file(tensors, path)


KINDS = ["missing", "empty", "truncated", "too long", "foreign", "another shape", "another dtype"]


@pytest.mark.parametrize("kind", [*KINDS, "no labels", "absurd header"])
def test_damaged_files(plain, small_npz, tmp_path, capsys, kind):
    """The reader names the file and the remedy; the same command makes this file again, no other."""
    out = shutil.copytree(plain, tmp_path / "out")
    before = contents(out)
    damage(out / "00000040.safetensors", kind)
    with pytest.raises(files.UserError, match="00000040.safetensors.*; run the same extraction again"):
        ef.CachedFeatures(out)
    first = (out / "00000000.safetensors").stat().st_ino
    extract(small_npz, out, "--shard", 40)
    said = capsys.readouterr()
    assert ("made again" in said.err) == (kind != "missing")
    assert contents(out) == before and (out / "00000000.safetensors").stat().st_ino == first


# --- the loader


def order_of(features, batch=12):
    order = np.random.default_rng(0).permutation(len(features))
    return [order[i : i + batch] for i in range(0, len(order), batch)]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(cache, workers):
    """The batches in the order that was asked for, as tensors."""
    features = ef.CachedFeatures(cache)
    order = order_of(features)
    batches = list(features.loader(iter(order), workers, torch.device("cpu")))
    assert len(batches) == len(order)
    for indices, batch in zip(order, batches, strict=True):
        expected = features.__getitems__(indices)
        expected["y"] = expected.pop("labels")
        assert batch.keys() == expected.keys()
        for name, values in batch.items():
            assert torch.equal(values, torch.from_numpy(expected[name]))
    assert next(ef.CachedFeatures(cache, False, False).loader(order)).keys() == {"moments", "y"}


def test_a_loader_process_that_dies(cache):
    """One line that names --workers, and nothing before the next batch is asked for."""
    features = ef.CachedFeatures(cache)
    before = signal.getsignal(signal.SIGCHLD)
    others = multiprocessing.active_children()
    batches = features.loader(200 * order_of(features), 1)
    next(batches)
    loaders = [child for child in multiprocessing.active_children() if child not in others]
    assert loaders
    for loader in loaders:
        loader.kill()
    time.sleep(0.3)  # PyTorch's handler would raise here
    with pytest.raises(files.UserError, match="--workers") as error:
        for _ in batches:
            pass
    assert "\n" not in str(error.value)
    signal.signal(signal.SIGCHLD, before)


BUG = """
import numpy, extract_features
features = extract_features.CachedFeatures({!r})
batches = features.loader([numpy.arange(8)] * 100, 2)
next(batches)
raise ValueError("a bug of a fork")
"""


def test_a_bug_does_not_wait_for_the_loader(cache):
    """Loader processes ignore SIGTERM, with which Python would end them, to wait for them then."""
    code = BUG.format(str(cache))
    done = subprocess.run(command_line("-c", code), cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 1 and b"ValueError: a bug of a fork" in done.stderr


def test_a_loader_in_another_thread(cache):
    """Signals belong to the main thread."""
    features = ef.CachedFeatures(cache)
    results = []
    thread = threading.Thread(target=lambda: results.extend(features.loader(order_of(features), 1)))
    thread.start()
    thread.join(60)
    assert len(results) == len(order_of(features))


class Broken(torch.utils.data.Dataset):
    def __getitem__(self, i):
        raise RuntimeError("a bug of a fork")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_in_a_loader_keeps_its_traceback(workers):
    with pytest.raises(RuntimeError, match="a bug of a fork"):
        next(files.read_ahead(Broken(), workers, batch_sampler=[[0]]))


def test_both_programs_list_the_same_images(tmp_path, capsys):
    """Linked class folders, hidden files, a Mac's sidecars, other suffixes, a link that leads back."""
    real = tmp_path / "elsewhere" / "cat"
    source = tmp_path / "source"
    for folder in (real, source / "dog", source / ".hidden", source / "__MACOSX"):
        folder.mkdir(parents=True)
        for name in ("a.png", "B.JPG", "._a.png", ".b.png", "c.webp", "d.bmp", "e.tif", "notes.txt"):
            (folder / name).write_bytes(b"")
    (source / "cat").symlink_to(real)
    (source / "dog" / "again").symlink_to(source)
    found = [path for path in fid.list_files(source) if path.suffix.lower() in fid.IMAGES]
    (source / "dog" / "again").unlink()  # images below a class are refused by an extraction
    images = ef.Images(source)
    assert sorted(images.names) == sorted(path.relative_to(source).as_posix() for path in found)
    assert images.names == ["cat/B.JPG", "cat/a.png", "cat/c.webp", "dog/B.JPG", "dog/a.png", "dog/c.webp"]
    assert "4 images" in capsys.readouterr().out, "d.bmp and e.tif of both classes"
    assert set(ef.IMAGES) == set(fid.IMAGES) and ef.OTHER_IMAGES == fid.OTHER_IMAGES
    for mode, value in (("I;16", 40000), ("L", 77), ("RGBA", (1, 2, 3, 0))):
        picture = Image.new(mode, (3, 2), value)
        assert np.array_equal(np.asarray(ef.to_rgb(picture)), np.asarray(fid.to_rgb(picture)))
