"""Bad input of every kind, over all programs: refused in one clear line that names it, nothing on disk lost.

A case is a command (see fuzz.COMMANDS for what comes before its flags), the words that the line must hold,
what is spoilt before it runs, and the files that may appear. Every file that was there must stay as it was.
"""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
import zlib
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import fuzz
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import exit_code
from PIL import Image

import files
import train_repa

SHARD = fuzz.SHARD
CACHED = f"cache/{SHARD}"
LOCKS = (".lock", "*/.lock")  # empty files
STARTED = (*LOCKS, "new/*")  # a folder of work that goes on with the same command
PARTIAL = ("new.npz.partial/*",)
HUGE = 10**30
FID = "fid ref.npz samples.npz"


class Case(NamedTuple):
    command: str
    words: tuple
    spoil: object = None
    new: tuple = LOCKS


# ---- what can happen to a file


def both(*spoils):
    return lambda: [spoil() for spoil in spoils] and None


def text(path, content=""):
    return lambda: Path(path).write_bytes(content.encode() if isinstance(content, str) else content)


def cut(path, share=0.5):
    return lambda: os.truncate(path, int(os.path.getsize(path) * share))


def gone(path):
    return lambda: Path(path).unlink()


def folder(path):
    return lambda: (Path(path).unlink(missing_ok=True), Path(path).mkdir())


def moved(source, target):
    return lambda: (Path(target).parent.mkdir(exist_ok=True), shutil.copy(source, target))


def link(path, target="/dev/full"):
    return lambda: (
        Path(path).parent.mkdir(exist_ok=True),
        Path(path).unlink(missing_ok=True),
        os.symlink(target, path),
    )


def pipe(path):
    return lambda: (Path(path).unlink(missing_ok=True), os.mkfifo(path))


def flipped(path, start=-200, stop=-100):
    """Invert some bytes."""

    def spoil():
        data = bytearray(Path(path).read_bytes())
        data[start:stop] = bytes(255 - byte for byte in data[start:stop])
        Path(path).write_bytes(data)

    return spoil


def record(path, **changes):
    """Change keys of a JSON file; ... removes one."""

    def spoil():
        content = json.loads(Path(path).read_text()) | changes
        Path(path).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return spoil


def tensors(path=CACHED, **changes):
    """Change tensors of a .safetensors file: a function of the old one, a tensor, or ... for none."""

    def spoil():
        content = {name: value.clone() for name, value in safetensors.torch.load_file(path).items()}
        for name, change in changes.items():
            content[name] = change(content[name]) if callable(change) else change
        kept = {name: value.contiguous() for name, value in content.items() if value is not ...}
        safetensors.torch.save_file(kept, path)

    return spoil


def header(path=CACHED, **words):
    """Replace words in the JSON header of a .safetensors file by words of the same length."""

    def spoil():
        data = Path(path).read_bytes()
        for old, new in words.items():
            assert len(old) == len(new) and old.encode() in data
            data = data.replace(old.encode(), new.encode(), 1)
        Path(path).write_bytes(data)

    return spoil


def archive(path, **arrays):
    """Change arrays of an .npz; ... removes one."""

    def spoil():
        with np.load(path) as old:
            content = {name: old[name] for name in old.files} | arrays
        np.savez(path, **{name: value for name, value in content.items() if value is not ...})

    return spoil


def checkpoint(change, path="run/last.pt"):
    """change(content) alters the checkpoint or returns another."""

    def spoil():
        content = torch.load(path, weights_only=True)
        changed = change(content)
        torch.save(content if changed is None else changed, path)

    return spoil


def part(name, path="run/last.pt", **changes):
    """Change keys of one dict in a checkpoint; ... removes one."""

    def change(content):
        content[name].update(changes)
        for key in [key for key, value in changes.items() if value is ...]:
            del content[name][key]

    return checkpoint(change, path)


def poison(name, value, path="run/last.pt"):
    def change(content):
        content[name]["final_layer.linear.bias"].view(-1)[1] = value

    return checkpoint(change, path)


def listed(change):
    """change(pairs) gives the labels of dataset.json, from pairs [name, label]."""

    def spoil():
        pairs = json.loads(Path("listed/dataset.json").read_text())["labels"]
        Path("listed/dataset.json").write_text(json.dumps({"labels": change(pairs)}))

    return spoil


def calls(*commands):
    """Other commands come first."""
    return lambda: [fuzz.call(command) for command in commands]


def moving(source, target):
    return lambda: os.rename(source, target)


def picture(path, size, **options):
    return lambda: (Path(path).parent.mkdir(exist_ok=True), Image.new("RGB", size).save(path, **options))


def bomb(path):
    """A PNG that claims 60,000 x 60,000 pixels."""

    def spoil():
        Image.new("L", (1, 1)).save(path)
        data = bytearray(Path(path).read_bytes())
        data[16:24] = (60_000).to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        Path(path).write_bytes(data)

    return spoil


def zipped(**members):
    def spoil():
        with zipfile.ZipFile("src.zip", "w") as file:
            for name, content in members.items():
                file.writestr(name.replace("__", "/").replace("DOTS", ".."), content)

    return spoil


def encrypted():
    data = bytearray(Path("src.zip").read_bytes())
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        start = data.find(signature)
        while start >= 0:
            data[start + offset] |= 1
            start = data.find(signature, start + 4)
    Path("src.zip").write_bytes(data)


# ---- the table
FLAGS = {  # refused beside the flag, for what it is
    "extract": """--image-size 0|--image-size -8|--image-size 5000|--image-size nan|--image-size 8.5|--patch 0
        |--patch -2|--patch two|--crops -1|--crops 1001|--seed -1|--seed 4294967296|--limit 0
        |--batch-size -4|--batch-size 0|--batch-size 65537|--workers -1|--workers 257
        |--target-dtype float32""",
    "repa": f"""--seed -1|--workers -1|--log-every 0|--sample-every -1|--save-every 0|--keep-every 0|--steps 0
        |--steps 1e3|--batch-size 0|--batch-size -4|--micro-batch 0|--micro-batch -1|--lr inf|--lr nan
        |--lr -1|--lr 1e400|--warmup -1|--beta2 1.5|--beta2 1|--clip -1|--clip nan|--ema 1.1|--ema nan
        |--precision fp16|--control size|--control-alpha 0|--control-alpha nan|--control-drop 1.5
        |--class-tokens -1|--pos-base 0|--pos-base -3|--time-shift 0|--time-shift inf|--repa-weight -1
        |--repa-weight nan|--repa-depth 0|--seed {2**64}|--class-tokens {HUGE}|--pos-base {HUGE}
        |--repa-depth 3|--batch-size 13|--batch-size {HUGE}""",
    "diversedit": """--div-blocks 1|--div-blocks 3|--div-terms mutual|--repa-weight inf|--repa-depth -1
        |--div-gate nan 1|--div-gate 0.5 0.1""",
    "sddit": f"""--mask-ratio 1.5|--mask-ratio 1|--mask-ratio nan|--sd-weight -1|--teacher-noise 0
        |--teacher-noise teacher|--teacher-noise nan|--prototypes 1|--prototypes {10**15}|--tau-s 0
        |--tau-t 0.1 inf|--teacher-momentum 2 0""",
    "meanflow": """--omega 0|--omega nan|--kappa 1|--kappa -0.1|--kappa inf|--guide-interval 0.5 0.5
        |--guide-interval 0.8 0.2|--guide-interval 0 1.5|--flow-ratio 1.5|--flow-ratio -1|--power -1
        |--tangent noise|--label-drop 0""",
    "dit": """--repa-weight -1|--repa-weight inf|--repa-depth 0|--time-shift 2|--time-normal 0 1""",
    "sample": f"""--num 0|--num -3|--num {2**40}|--steps 0|--steps {10**7}|--cfg 0.5|--cfg nan|--cfg inf
        |--control-cfg -1|--control-cfg inf|--seed -1|--seed 1.5|--batch-size 0|--batch-size -4
        |--precision fp16|--weights best
        |--control 0,0,0,0,0,0,0|--control 8,8,0,0,9,8,0|--control 8,8,8,0,0,8,0
        |--control 8,8,0,0,8,8,2|--control 8,8,-1,0,8,8,0|--control nan,8,0,0,8,8,0|--control 8.0,8,0,0,8,8,0
        |--control 1000001,8,0,0,8,8,0|--control 8,8,0,0,8,8,0,0|--control fixed,|--control 8,,0,0,8,8,0
        |--interval 0 0|--interval 0.5 0.5|--num 2147483649|--steps 1000001|--labels ,|--labels 0,
        |--labels 0:2
        |--labels Balanced|--labels none|--sampler ddim|--official adm|--interval nan 1|--interval 0.7 0.1
        |--interval -1 1|--control 8,8|--labels cat|--labels 3|--labels -1|--labels 0,,1|--labels 0,1.5""",
    "fid": f"""--batch-size 0|--batch-size -4|--batch-size 1.5|--image-size 0|--image-size nan|--image-size -1
        |--image-size {10**6}|--features vgg|--device tpu""",
}
META = {  # of the cache
    "count": (0, -1, 12.0, "12", HUGE, 2000, ...),
    "shard": (0, -1, "12", True, 5, ...),
    "classes": ({}, [0, 1, 2], ["0", "1", 2], "abc", ...),
    "image_size": (0, "8", ...),
    "views": (0, 3, 1.5, None, ...),
    "latent_channels": (0, 4, "3", ...),
    "latent_side": (0, 16, ...),
    "latent_scale": ("1", float("nan"), None, ...),
    "latent_shift": (float("inf"), ...),
    "grid": (0, 3, ...),
    "target_widths": ([82.0], [0], [-1], 82, [10**12], ...),
    "target_dtype": ("int8", "bool", "save", 16, ...),
    "vae": (None, ...),
    "format_version": (1, 3, "2", [2], None, ...),
}
SHARDS = {  # what can happen to the file of a cache
    "empty": text(CACHED),
    "cut": cut(CACHED, 0.9),
    "cut in its header": cut(CACHED, 0.01),
    "text": text(CACHED, "hello " * 99),
    "zeros": text(CACHED, bytes(5000)),
    "a header of 2^62 bytes": text(CACHED, (2**62).to_bytes(8, "little") + b"{}"),
    "an npz": moved("src.npz", CACHED),
    "a folder": folder(CACHED),
    "endless": link(CACHED, "/dev/zero"),
    "longer": lambda: text(CACHED, Path(CACHED).read_bytes() + b"x")(),
    "a bit flipped in its header": flipped(CACHED, 12, 13),
    "another type in its header": header(F16="I16"),
    "another shape in its header": header(**{"[12,2,7]": "[12,7,2]"}),
    "of another cache": moved(f"plain/{SHARD}", CACHED),
    "a checkpoint": moved("official.pt", CACHED),
    "weights": lambda: safetensors.torch.save_file({"w": torch.zeros(3)}, CACHED),
    "no moments": tensors(moments=...),
    "no targets": tensors(targets=...),
    "no labels": tensors(labels=...),
    "moments of float32": tensors(moments=lambda x: x.float()),
    "targets of int8": tensors(targets=lambda x: x.to(torch.int8)),
    "labels of int32": tensors(labels=lambda x: x.int()),
    "moments of one view": tensors(moments=lambda x: x[:, :1]),
    "moments of 4 channels": tensors(moments=lambda x: x[:, :, :4]),
    "targets of fewer tokens": tensors(targets=lambda x: x[:, :, 1:]),
    "labels of two columns": tensors(labels=lambda x: torch.stack([x, x], 1)),
}
NO_JSON = {
    "empty": "",
    "open": '{"a": ',
    "list": "[]",
    "number": "5",
    "nulls": "\0" * 9,
    "binary": b"\xff\xfe\0",
}
NO_CHECKPOINTS = {
    "empty": text("run/last.pt"),
    "text": text("run/last.pt", "weights"),
    "cut": cut("run/last.pt"),
    "an npz": moved("src.npz", "run/last.pt"),
    "a zip": moved("src.zip", "run/last.pt"),
    "a folder": folder("run/last.pt"),
    "endless": link("run/last.pt", "/dev/zero"),
    "a pickle of a function": lambda: torch.save({"config": print}, "run/last.pt"),
    "a list": checkpoint(lambda c: [c]),
    "a tensor": checkpoint(lambda c: torch.zeros(3)),
    "nothing inside": checkpoint(lambda c: dict.fromkeys(c, {})),
    "of a classifier": checkpoint(lambda c: {"state_dict": {"fc.weight": torch.zeros(3, 3)}}),
    "model is a list": checkpoint(lambda c: c.update(model=[])),
    "no model": checkpoint(lambda c: c.pop("model") and None),
    "no ema": checkpoint(lambda c: c.pop("ema") and None),
    "no data": checkpoint(lambda c: c.pop("data") and None),
    "no step": checkpoint(lambda c: c.pop("step") and None),
    "no args": checkpoint(lambda c: c.pop("args") and None),
    "a NaN weight": poison("ema", torch.nan),
    "an infinite weight": poison("model", torch.inf),
    "another shape": part("ema", pos_embed=torch.zeros(1, 9, 32)),
    "a missing tensor": part("model", pos_embed=...),
    "one tensor more": part("ema", extra=torch.zeros(1)),
}
CONFIG = {
    "arch": ("UNet", 3, ...),
    "depth": (0, -2, 3, "2", ...),
    "hidden_size": (64, ...),
    "num_heads": (0, 3, 2.5),
    "patch_size": (0, -2, 4),
    "input_size": (0, 9, 10**9, ...),
    "num_classes": (0, 10**9, -1, ...),
    "in_channels": (4, ...),
    "colour": (1,),
    "control": ("cosine", 5),
    "mlp_ratio": (10**9, "4"),
}
DATA = {
    "classes": ([0, 1, 2], 3, ...),
    "latent_scale": (float("nan"), "1", ...),
    "latent_shift": (float("inf"), ...),
    "vae": (3, ...),
    "image_size": (0, -8, "8", ...),
}
OTHER_RUN = {  # a flag of each kind with which no run is resumed
    "repa --out run": """--seed 1|--batch-size 6|--warmup 9|--beta2 0.9|--ema 0|--model S/2|--qk-norm
        |--control constant|--control-alpha 2|--control-drop 0|--class-tokens 1|--init run|--pos-base 3
        |--time-shift 2|--repa-weight 0|--repa-depth 1|--label-drop 0.2|--time-normal 0 1""",
    "diversedit --out rundiv": "--init rundiv|--qk-norm|--seed 4294967295|--model B/2|--repa-depth 2",
    "sddit --out runsd": """--mask-ratio 0|--sd-weight 0|--prototypes 7|--tau-s 1|--tau-t 0.2 0.3
        |--teacher-momentum 0 1|--teacher-noise 1|--init runsd""",
    "meanflow --out runmean": """--flow-ratio 1|--omega 1|--kappa 0|--power 0|--tangent model|--diverse
        |--guide-interval 0 1|--time-normal 0 1""",
    "dit --out rundit": "--seed 1|--repa-weight 0.5|--label-drop 0.2|--init run",
}
NO_LISTS = {  # what dataset.json may hold instead of a label for each image
    "an image less": listed(lambda pairs: pairs[1:]),
    "an image more": listed(lambda pairs: [*pairs, ["a/zz.png", 1]]),
    "other slashes": listed(lambda pairs: [[name.replace("/", "\\"), i] for name, i in pairs]),
    "dots before names": listed(lambda pairs: [["./" + name, i] for name, i in pairs]),
    "word labels": listed(lambda pairs: [[name, str(i)] for name, i in pairs]),
    "labels with a point": listed(lambda pairs: [[name, i + 0.5] for name, i in pairs]),
    "labels below 0": listed(lambda pairs: [[name, -1] for name, _ in pairs]),
    "true labels": listed(lambda pairs: [[name, True] for name, _ in pairs]),
    "null labels": listed(lambda pairs: [[name, None] for name, _ in pairs]),
    "labels of 31 digits": listed(lambda pairs: [[name, HUGE] for name, _ in pairs]),
    "one-hot labels": listed(lambda pairs: [[name, [0, 1, 0]] for name, _ in pairs]),
    "dicts as labels": listed(lambda pairs: [[name, {}] for name, _ in pairs]),
    "triples": listed(lambda pairs: [[name, i, 1] for name, i in pairs]),
    "names alone": listed(lambda pairs: [name for name, _ in pairs]),
    "lists as names": listed(lambda pairs: [[[name], i] for name, i in pairs]),
    "no labels": listed(lambda pairs: []),
    "a word": listed(lambda pairs: "abc"),
    "a number": listed(lambda pairs: 3),
}
NO_LABELS = {  # arr_1 of an .npz
    "in a column": np.zeros((12, 1), int),
    "one-hot": np.eye(12, dtype=int),
    "one": np.array(3),
    "none": np.zeros(0, int),
    "words": np.array(["a"] * 12),
    "true and false": np.zeros(12, bool),
    "dates": np.zeros(12, "M8[s]"),
}
NO_PIXELS = {  # arr_0 of an .npz
    "of 64 bits": np.zeros((12, 8, 8, 3), int),
    "with alpha": np.zeros((12, 8, 8, 4), "u1"),
    "true and false": np.zeros((12, 8, 8, 3), bool),
    "of a word": np.array("x"),
    "without a dimension": np.uint8(3),
    "of one image": np.zeros((8, 8, 3), "u1"),
    "of no height": np.zeros((12, 0, 8, 3), "u1"),
    "of records": np.zeros((12, 8, 8, 3), [("a", "u1")]),
}
LONG = "x" * 300
# where nothing can be: the same path is also given with a dot before it, and with a slash too many
NOWHERE = {
    "extract --out": ("ref.npz/x", "loop", "loop/x", "nothing-link", LONG, "pipe"),
    "repa --out": ("ref.npz/x", "loop", "loop/x", "nothing-link", LONG, "pipe"),
    "sample run --out": ("ref.npz/x.npz", "loop/x.npz", f"{LONG}.npz"),
    "sample run --grid": ("ref.npz/x.png", "loop/x.png", "nothing/x.png"),
    "fid ref.npz samples.npz --json": ("ref.npz/x", "loop", "loop/x", "nothing/x", "pipe"),
    "extract --data": ("nothing", "loop", LONG, "pipe"),
    "repa --data": ("nothing", "loop", LONG, "pipe", "src/a"),
    "repa --init": ("nothing", "run/1.pt", "loop", LONG, "pipe", "src"),
    "sample": ("nothing", "run/1.pt", "loop", LONG, "src"),
    "sample run --cfg 2 --guide": ("nothing", "run/1.pt", "loop", LONG, "src"),
    "extract --vae": ("no-thing", LONG),
    "extract --encoder vit_tiny_patch16_224 --encoder-weights": ("nothing", "loop", LONG, "src"),
    "fid ref.npz": ("nothing", "loop", LONG, "pipe"),
}


def odd_places():
    link("loop", "loop")()
    link("nothing-link", "nothing")()
    pipe("pipe")()


CASES = {
    # extraction: the source
    "no source": Case("extract --data nothing", ("--data nothing",)),
    "a device as source": Case("extract --data /dev/zero", ("--data /dev/zero",)),
    "empty npz": Case("extract", ("src.npz",), text("src.npz")),
    "cut npz": Case("extract", ("src.npz",), cut("src.npz")),
    "text as npz": Case("extract", ("src.npz",), text("src.npz", "hello")),
    "wrong checksum in npz": Case("extract", ("src.npz", "arr_0"), flipped("src.npz", 900, 904)),
    "float images": Case(
        "extract", ("src.npz", "float32"), archive("src.npz", arr_0=np.zeros((9, 8, 8, 3), "f4"))
    ),
    "channels first": Case(
        "extract", ("src.npz", "3, 8, 8"), archive("src.npz", arr_0=np.zeros((9, 3, 8, 8), "u1"))
    ),
    "grey images": Case(
        "extract", ("src.npz", "8, 1"), archive("src.npz", arr_0=np.zeros((9, 8, 8, 1), "u1"))
    ),
    "no images": Case(
        "extract", ("src.npz", "arr_0"), archive("src.npz", arr_0=np.zeros((0, 8, 8, 3), "u1"))
    ),
    "images of no pixels": Case(
        "extract", ("src.npz", "arr_0"), archive("src.npz", arr_0=np.zeros((9, 0, 8, 3), "u1"))
    ),
    "no arr_0": Case("extract", ("src.npz", "arr_0"), archive("src.npz", arr_0=...)),
    "objects in npz": Case("extract", ("src.npz",), archive("src.npz", arr_1=np.array([{}] * 12))),
    "a label below 0": Case("extract", ("src.npz", "arr_1"), archive("src.npz", arr_1=np.arange(12) - 1)),
    "labels of too few images": Case(
        "extract", ("src.npz", "arr_1"), archive("src.npz", arr_1=np.arange(11))
    ),
    "labels with a point": Case("extract", ("src.npz", "float64"), archive("src.npz", arr_1=np.zeros(12))),
    "empty zip": Case("extract --data src.zip", ("src.zip",), text("src.zip")),
    "cut zip": Case("extract --data src.zip", ("src.zip",), cut("src.zip")),
    "text as zip": Case("extract --data src.zip", ("src.zip",), text("src.zip", "PK\3\4 hello")),
    "zip of texts": Case("extract --data src.zip", ("src.zip",), zipped(a__b="hello")),
    "zip that leaves its folder": Case("extract --data src.zip", ("src.zip",), zipped(DOTS__a__b="x")),
    "zip with a password": Case("extract --data src.zip", ("src.zip",), encrypted, STARTED),
    "zip with a text as png": Case(
        "extract --data src.zip", ("a/b.png",), zipped(**{"a__b.png": "x"}), STARTED
    ),
    "wrong checksum in zip": Case(
        "extract --data src.zip", ("src.zip",), flipped("src.zip", 60, 80), STARTED
    ),
    "empty folder": Case("extract --data empty", ("--data empty",), lambda: os.mkdir("empty")),
    "empty class folder": Case("extract --data src", ("--data src", "'z'"), lambda: os.mkdir("src/z")),
    "image outside the classes": Case("extract --data src", ("loose.png",), picture("src/loose.png", (8, 8))),
    "images too deep": Case("extract --data .", ("did you mean", "listed"), gone("src.npz")),
    "cut jpg": Case("extract --data src", ("03.jpg",), cut("src/a/03.jpg"), STARTED),
    "empty png": Case("extract --data src", ("00.png",), text("src/a/00.png"), STARTED),
    "text as png": Case("extract --data src", ("00.png",), text("src/a/00.png", "hello"), STARTED),
    "bomb as png": Case("extract --data src", ("00.png",), bomb("src/a/00.png"), STARTED),
    "narrow png": Case(
        "extract --data src", ("00.png", "5000000"), picture("src/a/00.png", (1, 5_000_000)), STARTED
    ),
    "link to nothing": Case("extract --data src", ("00.png",), link("src/a/00.png", "nothing"), STARTED),
    "link to itself": Case("extract --data src", ("00.png",), link("src/a/00.png", "00.png"), STARTED),
    # extraction: flags that do not fit each other or the source
    "too many images asked": Case("extract --limit 13", ("--limit 13", "12")),
    "side and patch": Case("extract --image-size 9", ("--image-size 9",)),
    "patch above side": Case("extract --patch 16", ("--image-size 8", "16")),
    "wrong number first": Case(
        "extract --image-size 9 --batch-size -4 --data nothing", ("--batch-size", "-4")
    ),
    "unknown flag": Case("extract --colour red", ("--colour",)),
    "vae: no such": Case("extract --vae nobody/nothing", ("--vae nobody/nothing",)),
    "vae: empty file": Case("extract --vae v.safetensors", ("v.safetensors",), text("v.safetensors")),
    "vae: text": Case("extract --vae v.bin", ("v.bin",), text("v.bin", "hello")),
    "vae: foreign weights": Case("extract --vae official.pt", ("--vae official.pt",)),
    "vae: foreign folder": Case("extract --vae src", ("src",)),
    "encoder: no such": Case("extract --encoder resnot", ("--encoder resnot",)),
    "encoder: no name": Case("extract --encoder hog,", ("--encoder",)),
    "encoder: no ViT": Case("extract --encoder resnet18", ("--encoder resnet18",)),
    "encoder: wrong CLIP": Case("extract --encoder vit_large_patch14_clip_224.openai", ("quickgelu",)),
    "encoder: one file too many": Case(
        "extract --encoder hog --encoder-weights official.pt", ("--encoder-weights", "1")
    ),
    "encoder: weights for none": Case(
        "extract --encoder none --encoder-weights official.pt", ("--encoder-weights", "1")
    ),
    "encoder: no such file": Case(
        "extract --encoder vit_tiny_patch16_224 --encoder-weights no.pt", ("no.pt",)
    ),
    "encoder: foreign file": Case(
        "extract --encoder vit_tiny_patch16_224 --encoder-weights official.pt",
        ("--encoder-weights official.pt",),
    ),
    # extraction: the folder to write
    "cache: a file is there": Case("extract --out ref.npz", ("ref.npz",)),
    "cache: below a file": Case("extract --out ref.npz/x/y", ("ref.npz",)),
    "cache: below a device": Case("extract --out /dev/full/x", ("/dev/full",)),
    "cache: is a device": Case("extract --out /dev/null", ("/dev/null",)),
    "cache: too long a name": Case(f"extract --out {'x' * 300}", ("xxx",)),
    "cache: the source": Case("extract --data src --out src", ("src",)),
    "cache: a run folder": Case("extract --out run", ("run",)),
    "cache: of other flags": Case("extract --out cache --flip --seed 1", ("cache", "seed", "1")),
    "cache: of other images": Case("extract --out cache --flip --limit 5", ("cache",)),
    "cache: of another source": Case("extract --out cache --flip --data src", ("cache", "source")),
    "cache: no space for meta.json": Case(
        "extract",
        ("new/meta",),
        lambda: link(temporary("new/meta.json"))(),
        (*LOCKS, "new/meta.json.*.tmp"),
    ),
    "cache: beside the images, again": Case(
        "extract --data src --out src/new", ("--data src", "new"), calls("extract --data src --out src/new")
    ),
    "source: the current folder": Case(
        "extract --data . --out new", ("did you mean listed",), gone("src.npz")
    ),
    "source: a checkpoint": Case("extract --data run/last.pt", ("run/last.pt",)),
    "source: a cache": Case("extract --data cache", ("--data cache",)),
    "source: splits": Case(
        "extract --data splits",
        ("train", "splits/train"),
        lambda: shutil.copytree("src/a", "splits/train"),
    ),
    "zip of folders alone": Case("extract --data src.zip", ("src.zip",), zipped(**{"a__": "", "b__": ""})),
    "zip with backslashes": Case("extract --data src.zip", ("src.zip",), zipped(**{"a\\x.png": "x"})),
    "zip with an open dataset.json": Case(
        "extract --data src.zip", ("dataset.json",), zipped(**{"a__x.png": "x", "dataset.json": "["})
    ),
    "dataset.json is a folder": Case(
        "extract --data listed", ("dataset.json",), folder("listed/dataset.json")
    ),
    "dataset.json with a byte order mark": Case(
        "extract --data listed", ("dataset.json",), text("listed/dataset.json", "\ufeff{}")
    ),
    # training: the cache
    "train: no cache": Case("repa --data nothing", ("nothing",)),
    "train: a file as cache": Case("repa --data src.npz", ("src.npz",)),
    "train: a folder of images as cache": Case("sddit --data src", ("src",)),
    "train: a run as cache": Case("diversedit --data run", ("run",)),
    "train: below a file": Case("repa --data src.npz/x", ("src.npz/x",)),
    "train: incomplete cache": Case("repa", ("cache", "incomplete", SHARD), gone(CACHED)),
    "train: meta.json of more images": Case(
        "repa", ("cache", "incomplete"), record("cache/meta.json", count=3000)
    ),
    "train: no targets": Case("repa --data plain", ("plain", "targets", "--encoder")),
    "train: no targets with DiverseDiT": Case(
        "diversedit --data plain --repa-weight 0.5", ("plain", "targets")
    ),
    "train: targets of another grid": Case("repa --model nano/4", ("4x4", "--patch 4")),
    "train: no control": Case("sddit --control cosine", (CACHED, "control"), tensors(control=...)),
    "train: control of floats": Case(
        "sddit --control cosine", (CACHED, "control"), tensors(control=lambda x: x.float())
    ),
    "train: labels of another cache": Case("repa", (CACHED, "labels"), tensors(labels=lambda x: x + 1)),
    "train: label 10^12": Case("sddit", (CACHED, "labels"), tensors(labels=lambda x: x + 10**12)),
    "train: label -1": Case("repa", (CACHED, "labels"), tensors(labels=lambda x: x - 1)),
    "train: no readable image": Case("repa", ("--batch-size 4", "0"), lambda: emptied()),
    "train: meta.json of fewer classes": Case(
        "repa", ("cache",), record("cache/meta.json", classes=["0", "1"])
    ),
    "train: a folder above the cache": Case("repa --data .", ("did you mean",)),
    "train: a file of the cache": Case(f"repa --data {CACHED}", (CACHED,)),
    "train: NaN in the targets": Case(
        "repa", ("step 1", "loss_repa nan"), tensors(targets=lambda x: x * torch.nan), STARTED
    ),
    "train: an autoencoder that is not there": Case(
        "repa --sample-every 1", ("nobody/nothing",), record("cache/meta.json", vae="nobody/nothing")
    ),
    # training: flags that do not fit each other or the cache
    "train: batch of one image more": Case("sddit --batch-size 13", ("--batch-size 13", "12")),
    "train: micro-batch above the batch": Case("repa --micro-batch 8", ("--batch-size 4", "8")),
    "train: patch 2^32": Case("repa --model nano/4294967296", ("4294967296", "8")),
    "train: a small size": Case("repa --model NANO/2", ("--model", "NANO/2")),
    "train: two patches": Case("repa --model nano/2/2", ("--model", "nano/2/2")),
    "train: no patch is visible": Case("sddit --mask-ratio 0.999", ("--mask-ratio 0.999", "16")),
    "train: time shift 10^300": Case("repa --time-shift 1e300", ("step 1", "nan"), None, STARTED),
    "train: weight 10^300": Case("repa --repa-weight 1e300", ("step 1", "inf"), None, STARTED),
    "train: tau 10^-300": Case("sddit --tau-s 1e-300", ("step 1", "nan"), None, STARTED),
    "train: unknown size": Case("repa --model XXL/2", ("--model", "XXL/2")),
    "train: no patch": Case("repa --model nano", ("--model", "nano")),
    "train: patch 0": Case("sddit --model nano/0", ("--model", "nano/0")),
    "train: patch that does not divide": Case("diversedit --model nano/3", ("8", "3")),
    "train: micro-batch": Case("repa --batch-size 4 --micro-batch 3", ("--batch-size 4", "3")),
    "train: wrong number first": Case(
        "repa --batch-size -4 --data nothing --model XXL/2", ("--batch-size", "-4")
    ),
    # training: the run folder
    "run: a file is there": Case("repa --out ref.npz", ("--out ref.npz",)),
    "run: below a file": Case("diversedit --out ref.npz/x", ("ref.npz/x",)),
    "run: below a device": Case("sddit --out /dev/full/x", ("/dev/full/x",)),
    "run: too long a name": Case(f"repa --out {'x' * 300}", ("xxx",)),
    "run: in use": Case("repa", ("new", "another process"), lambda: lock("new")),
    "run: a cache": Case("repa --out cache", ("cache",)),
    "run: of DiverseDiT": Case("repa --out rundiv", ("rundiv", "holds another run")),
    "run: of REPA": Case("sddit --out run", ("run", "holds another run")),
    "run: of SD-DiT": Case("diversedit --out runsd", ("runsd", "holds another run")),
    "run: of MeanFlow": Case("repa --out runmean", ("runmean", "holds another run")),
    "run: of DiT": Case("meanflow --out rundit", ("rundit", "holds another run")),
    "run: of another rate": Case("repa --out run --ema 0.5", ("run", "ema", "0.9", "0.5")),
    "run: of another cache": Case("repa --out run --data plain --repa-weight 0", ("run", "another run")),
    "run: of the same folder, other images": Case(
        "diversedit --out rundiv", ("rundiv", "cache"), record("cache/meta.json", seed=5)
    ),
    "run: no optimiser": Case(
        "repa --out run", ("run/last.pt", "opt"), checkpoint(lambda c: c.pop("opt") and None)
    ),
    "run: no heads": Case(
        "repa --out run", ("run/last.pt", "heads"), checkpoint(lambda c: c.pop("heads") and None)
    ),
    "run: empty optimiser": Case("repa --out run", ("run", "fit"), checkpoint(lambda c: c.update(opt={}))),
    "run: another optimiser": Case("repa --out run", ("run", "fit"), part("opt", param_groups=[])),
    "run: NaN in the heads": Case(
        "repa --out run --steps 4 --log-every 9", ("last.pt", "heads"), lambda: nan_heads()
    ),
    "run: other heads": Case(
        "repa --out run",
        ("run", "fit"),
        part("heads", **{"alignment.projectors.0.0.weight": torch.zeros(3, 3)}),
    ),
    "run: step below 0": Case(
        "repa --out run", ("run/last.pt", "step"), checkpoint(lambda c: c.update(step=-2))
    ),
    "run: an official file": Case("repa --out run", ("run/last.pt",), moved("official.pt", "run/last.pt")),
    "run: no space for run.json": Case(
        "sddit", ("new/run",), lambda: link(temporary("new/run.json"))(), (*LOCKS, "new/run.json.*.tmp")
    ),
    "run: log without steps": Case(
        "repa --out run --steps 4", ("log.jsonl",), text("run/log.jsonl", '{"a": 1}\n')
    ),
    "run: log of words": Case("repa --out run --steps 4", ("log.jsonl",), text("run/log.jsonl", "{hello}\n")),
    "run: log of word steps": Case(
        "repa --out run --steps 4", ("log.jsonl",), text("run/log.jsonl", '{"step": "x"}\n')
    ),
    "run: binary log": Case(
        "repa --out run --steps 4", ("log.jsonl",), text("run/log.jsonl", b"\xff\xfe}\n")
    ),
    "run: log is a folder": Case("repa --out run --steps 4", ("log.jsonl",), folder("run/log.jsonl")),
    "run: a foreign log": Case(
        "repa", ("log.jsonl",), both(lambda: os.mkdir("new"), text("new/log.jsonl", '{"a": 1}\n'))
    ),
    "run: the current folder": Case("repa --out .", ("--out .",)),
    "run: a folder with notes": Case(
        "repa", ("--out new", "notes.txt"), lambda: (os.mkdir("new"), text("new/notes.txt")())
    ),
    "run: run.json is a folder": Case("repa --out run --steps 4", ("run/run.json",), folder("run/run.json")),
    "run: last.pt is lost, a snapshot is left": Case(
        "repa --out run", ("run", "0000002.pt"), moving("run/last.pt", "run/0000002.pt")
    ),
    "run: last.pt is lost, notes are left": Case(
        "repa --out run", ("run", "notes.txt"), moving("run/last.pt", "run/notes.txt")
    ),
    "run: the lock is a folder": Case("repa --out run --steps 4", ("run/.lock",), folder("run/.lock")),
    # training: --init
    "init: the current folder": Case("repa --init .", ("last.pt",)),
    "init: a log": Case("repa --init run/log.jsonl", ("run/log.jsonl",)),
    "init: another patch": Case(
        "repa --data c4 --init run --model nano/4",
        ("--init run", "patch_size"),
        calls("extract --out c4 --patch 4"),
    ),
    "init: no such": Case("repa --init nothing", ("nothing", "checkpoint")),
    "init: foreign": Case("diversedit --init src.npz", ("src.npz",)),
    "init: NaN": Case("sddit --init run", ("run/last.pt",), poison("ema", torch.nan)),
    "init: other blocks": Case("repa --model nano/2 --init deep.pt", ("--init", "4", "2"), lambda: deeper()),
    "init: ambiguous official file": Case("repa --init official.pt", ("official.pt",)),
    # numbers that are not finite
    "train: NaN in the cache": Case(
        "repa", ("step 1", "--lr"), tensors(moments=lambda x: x * torch.nan), STARTED
    ),
    "train: lr far too large": Case(
        "repa --lr 100 --clip 0 --steps 150 --save-every 999", ("step", "--lr"), None, STARTED
    ),
    # sampling: the checkpoint is in NO_CHECKPOINTS, CONFIG and DATA
    "sample: no such": Case("sample nothing", ("nothing",)),
    "sample: a folder without checkpoint": Case("sample src", ("src/last.pt",)),
    "sample: below a file": Case("sample ref.npz/last.pt", ("ref.npz/last.pt",)),
    "sample: ambiguous official file": Case("sample official.pt", ("official.pt", "--official repa")),
    "sample: official file of nothing": Case(
        "sample run", ("run/last.pt",), lambda: torch.save({"ema": {}}, "run/last.pt")
    ),
    "sample: official with a hole": Case(
        "sample official.pt --official sit",
        ("official.pt",),
        part("ema", "official.pt", **{"blocks.0.mlp.fc1.bias": ...}),
    ),
    "sample: official with NaN": Case(
        "sample official.pt --official sit",
        ("official.pt", "finite"),
        poison("ema", torch.nan, "official.pt"),
    ),
    "sample: official and no autoencoder": Case(
        "sample official.pt --official sit --vae none", ("--vae none", "3")
    ),
    "sample: huge weights": Case(
        "sample run --steps 2", ("4 of 4", "0, 1, 2, 3"), poison("ema", 3e38), PARTIAL
    ),
    "sample: the current folder": Case("sample .", ("last.pt",)),
    "sample: the current folder as guide": Case("sample run --cfg 2 --guide .", ("last.pt",)),
    "sample: a device": Case("sample /dev/null", ("/dev/null",)),
    "sample: a cache": Case("sample cache", ("cache",)),
    "sample: a shard": Case(f"sample {CACHED}", (CACHED,)),
    "sample: an old kind of checkpoint": Case("sample run/../old.pt", ("old.pt",), lambda: old_checkpoint()),
    # sampling: flags and files to write
    "sample: labels of two kinds": Case("sample run --labels random,0", ("--labels random,0", "2")),
    "sample: labels with a space": Case("sample run --labels 'balanced '", ("--labels balanced ",)),
    "sample: labels in full width": Case("sample run --labels \uff10", ("--labels \uff10",)),
    "sample: labels with zeros before": Case("sample run --labels 00", ("--labels 00",)),
    "sample: labels of 5,000 characters": Case(f"sample run --labels {5000 * 'x'}", ("--labels xxx",)),
    "sample: commas in a class name": Case(
        "sample comma --labels a,b,c", ("--labels a,b,c",), lambda: comma()
    ),
    "sample: guided to infinity": Case("sample run --cfg 1e308", ("4 of 4",), None, PARTIAL),
    "sample: mean velocity of a flow": Case("sample run --sampler mean", ("--sampler mean", "ode")),
    "sample: guided twice": Case("sample runmean --sampler ode --cfg 2", ("--cfg 2", "--omega")),
    "sample: guided mean velocity": Case(
        "sample m --cfg 2", ("--cfg 2", "--sampler ode"), calls("meanflow --omega 1 --kappa 0 --out m")
    ),
    "sample: guide alone": Case("sample run --guide run", ("--guide", "--cfg")),
    "sample: guide with a control": Case(
        "sample run --cfg 2 --control-cfg 2 --guide run", ("--control-cfg", "--guide")
    ),
    "sample: control scale without control": Case("sample run --control-cfg 1", ("--control-cfg",)),
    "sample: 2^31 images": Case("sample run --num 2147483648", ("new.npz.partial", "GB")),
    "sample: a grid of 10^8 images": Case("sample run --num 99999999 --grid new.png", ("--grid", "99999999")),
    "sample: no name before the ending": Case("sample run --out .npz", ("--out .npz",)),
    "sample: the ending in capitals": Case("sample run --out new.NPZ", ("--out new.NPZ",)),
    "sample: a link to a file": Case("sample run --out l.npz", ("--out l.npz",), link("l.npz", "ref.npz")),
    "sample: a link to a device": Case("sample run --out l.npz", ("--out l.npz",), link("l.npz")),
    "sample: a grid is a folder": Case(
        "sample run --grid l.png", ("--grid l.png",), lambda: os.mkdir("l.png")
    ),
    "sample: partial is a link to nothing": Case(
        "sample run", ("new.npz.partial",), link("new.npz.partial", "nothing")
    ),
    "sample: protocol is a folder": Case(
        "sample run", ("protocol.json",), lambda: os.makedirs("new.npz.partial/protocol.json")
    ),
    "sample: fewer images than before": Case(
        f"{fuzz.SAMPLE_ON} --num 3", ("new.npz.partial", "num is 4"), lambda: started()
    ),
    "sample: another checkpoint than before": Case(
        fuzz.SAMPLE_ON,
        ("new.npz.partial", "checkpoint"),
        both(lambda: started(), checkpoint(lambda c: c.update(step=3))),
    ),
    "sample: another precision than before": Case(
        f"{fuzz.SAMPLE_ON} --precision bf16", ("new.npz.partial", "precision"), lambda: started()
    ),
    "sample: part is a folder": Case(
        fuzz.SAMPLE_ON, (fuzz.PART,), lambda: (started(), folder(fuzz.PART)()), PARTIAL
    ),
    "sample: a folder as vae": Case("sample run --vae run", ("run/diffusion_pytorch_model.safetensors",)),
    "sample: a device as vae": Case("sample run --vae /dev/null", ("--vae /dev/null",)),
    "sample: an npz as vae": Case("sample run --vae src.npz", ("src.npz",)),
    "sample: there already": Case("sample run --out ref.npz", ("--out ref.npz", "exists")),
    "sample: another ending": Case("sample run --out new.npy", ("--out new.npy", ".npz")),
    "sample: a grid of another ending": Case("sample run --grid new.jpg", ("--grid new.jpg", ".png")),
    "sample: a folder is there": Case("sample run --out d.npz", ("--out d.npz",), lambda: os.mkdir("d.npz")),
    "sample: output below a file": Case("sample run --out ref.npz/x.npz", ("ref.npz",)),
    "sample: below a device": Case("sample run --out /dev/full/x.npz", ("/dev/full/x.npz",)),
    "sample: a grid below a file": Case("sample run --grid ref.npz/x.png", ("--grid ref.npz/x.png",)),
    "sample: a grid nowhere": Case("sample run --grid no/x.png", ("--grid no/x.png", "no")),
    "sample: edm for a flow": Case("sample run --sampler edm", ("--sampler edm", "ode")),
    "sample: ode for SD-DiT": Case("sample runsd --sampler ode", ("--sampler ode", "edm")),
    "sample: interval alone": Case("sample run --interval 0 0.5", ("--interval", "--cfg")),
    "sample: guide of another kind": Case("sample run --cfg 2 --guide runsd", ("--guide runsd",)),
    "sample: no such guide": Case("sample run --cfg 2 --guide nothing", ("nothing",)),
    "sample: control without training": Case("sample run --control fixed", ("--control fixed",)),
    "sample: side of another autoencoder": Case(
        "sample run", ("--vae none", "8", "16"), part("data", image_size=16)
    ),
    "sample: no such vae": Case("sample run --vae nobody/nothing", ("--vae nobody/nothing",)),
    "sample: a file is there": Case("sample run", ("new.npz.partial",), text("new.npz.partial", "mine")),
    "sample: a foreign folder is there": Case("sample run", ("new.npz.partial", "photo"), lambda: foreign()),
    "sample: work of another seed": Case(
        "sample run --seed 1", ("new.npz.partial", "seed"), lambda: started()
    ),
    "sample: protocol is no JSON": Case(
        "sample run", ("protocol.json",), lambda: started("protocol.json", b"{")
    ),
    "sample: protocol is a list": Case(
        "sample run", ("protocol.json",), lambda: started("protocol.json", b"[]")
    ),
    "sample: no space for the protocol": Case(
        "sample run", ("new.npz",), lambda: link(temporary("new.npz.partial/protocol.json"))(), PARTIAL
    ),
    # evaluation
    "fid: no such": Case("fid ref.npz nothing.npz", ("nothing.npz",)),
    "fid: a device": Case("fid ref.npz /dev/zero", ("/dev/zero",)),
    "fid: empty": Case(FID, ("samples.npz",), text("samples.npz")),
    "fid: cut": Case(FID, ("samples.npz",), cut("samples.npz")),
    "fid: cut reference": Case(FID, ("ref.npz",), cut("ref.npz", 0.9)),
    "fid: text": Case(FID, ("ref.npz",), text("ref.npz", "hello")),
    "fid: wrong checksum": Case(FID, ("ref.npz",), flipped("ref.npz", 900, 904)),
    "fid: float images": Case(
        FID, ("ref.npz", "float32"), archive("ref.npz", arr_0=np.zeros((9, 8, 8, 3), "f4"))
    ),
    "fid: channels first": Case(
        FID, ("ref.npz", "3, 8, 8"), archive("ref.npz", arr_0=np.zeros((9, 3, 8, 8), "u1"))
    ),
    "fid: no images": Case(FID, ("ref.npz", "0"), archive("ref.npz", arr_0=np.zeros((0, 8, 8, 3), "u1"))),
    "fid: three images": Case(
        FID, ("samples.npz", "3"), archive("samples.npz", arr_0=np.zeros((3, 8, 8, 3), "u1"))
    ),
    "fid: no arr_0": Case(FID, ("ref.npz",), archive("ref.npz", arr_0=...)),
    "fid: objects": Case(FID, ("ref.npz",), archive("ref.npz", arr_0=np.array([{}] * 12))),
    "fid: objects beside images": Case(FID, ("ref.npz",), archive("ref.npz", arr_1=np.array([{}] * 12))),
    "fid: a checkpoint": Case("fid ref.npz run/last.pt", ("run/last.pt",)),
    "fid: a folder of no images": Case("fid ref.npz cache", ("cache", "0 images")),
    "fid: images of many sizes": Case(
        "fid ref.npz src", ("src", "--image-size"), picture("src/a/x.png", (9, 9))
    ),
    "fid: cut jpg": Case("fid ref.npz src", ("03.jpg",), cut("src/a/03.jpg")),
    "fid: text as png": Case("fid ref.npz src", ("00.png",), text("src/a/00.png", "hello")),
    "fid: bomb as png": Case("fid ref.npz src", ("00.png",), bomb("src/a/00.png")),
    "fid: narrow png": Case("fid src src --image-size 299", ("x.png",), picture("src/a/x.png", (1, 9000))),
    "fid: crops that fill the memory": Case("fid src src --image-size 60000", ("--image-size", "60000")),
    "fid: pipe as png": Case("fid ref.npz src", ("00.png",), pipe("src/a/00.png")),
    "fid: pipe as npz": Case(FID, ("ref.npz",), pipe("ref.npz")),
    "fid: crop of an npz": Case(f"{FID} --image-size 4", ("ref.npz", "--image-size 4")),
    "fid: results into a folder": Case(f"{FID} --json cache", ("cache",)),
    "fid: results below a file": Case(f"{FID} --json ref.npz/x", ("ref.npz/x",)),
    "fid: results on a device": Case(f"{FID} --json /dev/full", ("/dev/full",)),
    "fid: results over the samples": Case(f"{FID} --json samples.npz", ("samples.npz",)),
    "fid: results nowhere": Case(f"{FID} --json no/x.json", ("no/x.json",)),
    "fid: --out without --stats": Case(f"{FID} --out x.npz", ("--out",)),
    "fid: NaN statistics": Case(
        f"{FID} --features inception",
        ("ref.npz", "mu"),
        archive("ref.npz", mu=np.zeros(2048) * np.nan, sigma=np.eye(2048)),
    ),
    "fid: statistics of another network": Case(
        f"{FID} --features inception",
        ("ref.npz", "mu"),
        archive("ref.npz", mu=np.zeros(768), sigma=np.eye(768)),
    ),
    "fid: one set": Case("fid ref.npz", ("SAMPLES",)),
    "fid: a photo": Case("fid src/a/00.png ref.npz", ("src/a/00.png",)),
    "fid: a zip": Case("fid src.zip ref.npz", ("src.zip",)),
    "fid: a shard": Case(f"fid ref.npz {CACHED}", (CACHED,)),
    "fid: results over the reference by a link": Case(
        f"{FID} --json l.json", ("--json l.json",), link("l.json", "ref.npz")
    ),
    "fid: results through a link to a device": Case(
        f"{FID} --json l.json", ("--json l.json",), link("l.json")
    ),
    "fid: an npy in Fortran order": Case(
        "fid ref.npz x.npy", ("x.npy",), lambda: np.save("x.npy", np.zeros((12, 8, 9, 3), "u1", order="F"))
    ),
    "fid: an npy with a byte more": Case(
        "fid ref.npz x.npy", ("x.npy",), lambda: text("x.npy", npy_bytes() + b"x")()
    ),
    "fid: half an npy": Case("fid ref.npz x.npy", ("x.npy",), lambda: text("x.npy", npy_bytes()[:900])()),
    "fid: statistics of words": Case(
        f"{FID} --features inception", ("ref.npz",), archive("ref.npz", mu=np.array("x"), sigma=np.array("y"))
    ),
    "fid: a device as weights": Case(f"{FID} --features inception --weights /dev/null", ("/dev/null",)),
    "fid: no such weights": Case(f"{FID} --features inception --weights w.pth", ("w.pth",)),
    "fid: weights of another network": Case(
        f"{FID} --features inception --weights official.pt", ("official.pt",)
    ),
    "fid: weights that are text": Case(
        f"{FID} --features inception --weights w.pth", ("w.pth",), text("w.pth", "hello")
    ),
}


def cases():
    """The table and what follows from the lists above it."""
    files = {"sample": "sample run", "fid": FID}
    for program, flags in FLAGS.items():
        for flag in map(str.strip, flags.split("|")):
            name, *values = flag.split()
            named = [name] + [value for value in values if value in ("nan", "inf")]
            yield f"{program} {flag:.40}", Case(f"{files.get(program, program)} {flag}", named)
    for key, values in META.items():
        for value in values:
            spoil = record("cache/meta.json", **{key: value})
            yield f"meta {key} {value!r:.30}", Case("repa", ("cache",), spoil)
    for kind, content in NO_JSON.items():
        yield f"meta.json {kind}", Case("diversedit", ("cache/meta.json",), text("cache/meta.json", content))
        yield (
            f"meta.json of a started cache {kind}",
            Case("extract --out cache --flip", ("cache/meta.json",), text("cache/meta.json", content)),
        )
        if kind != "list":
            yield (
                f"run.json {kind}",
                Case("repa --out run --steps 4", ("run/run.json",), text("run/run.json", content)),
            )
    for kind, spoil in SHARDS.items():
        yield f"shard {kind}", Case("repa", (CACHED,), spoil)
    for kind, spoil in NO_CHECKPOINTS.items():
        if kind != "no step":  # only a run that goes on needs it
            yield f"sample: checkpoint {kind}", Case("sample run", ("run/last.pt",), spoil)
        yield f"run: checkpoint {kind}", Case("repa --out run --steps 4", ("run/last.pt",), spoil)
    for name, table in (("config", CONFIG), ("data", DATA)):
        for key, values in table.items():
            for value in values:
                yield (
                    f"{name} {key} {value!r:.30}",
                    Case("sample run", ("run/last.pt",), part(name, **{key: value})),
                )
    for command, flags in OTHER_RUN.items():
        run = command.split()[-1]
        for flag in map(str.strip, flags.split("|")):
            key = flag.split()[0].strip("-").replace("-", "_")
            yield f"{command} {flag}", Case(f"{command} {flag}", (f"{run} holds another run", f"{key} is"))
    for kind, spoil in NO_LISTS.items():
        yield f"dataset.json: {kind}", Case("extract --data listed", ("--data listed", "dataset.json"), spoil)
    for kind, values in NO_LABELS.items():
        yield f"npz labels {kind}", Case("extract", ("src.npz", "arr_1"), archive("src.npz", arr_1=values))
    for kind, values in NO_PIXELS.items():
        yield f"npz pixels {kind}", Case("extract", ("src.npz", "arr_0"), archive("src.npz", arr_0=values))
        yield f"fid: npz pixels {kind}", Case(FID, ("samples.npz",), archive("samples.npz", arr_0=values))
    for command, paths in NOWHERE.items():
        for path in paths:
            for given in (path, f"./{path}", path.replace("/", "//")):
                yield f"{command} {given:.30}", Case(f"{command} {given}", (path[:30],), odd_places, ())
    yield from CASES.items()


def temporary(path):
    """Where a file is written before it is renamed."""
    return f"{path}.{os.getpid()}.tmp"


def emptied():
    none = safetensors.torch.load_file(CACHED)
    safetensors.torch.save_file({name: value[:0].clone() for name, value in none.items()}, CACHED)


LOCK = """
import fcntl, sys
file = open(sys.argv[1] + "/.lock", "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def lock(path):
    """Another process is at work in the folder until the case ends."""
    os.makedirs(path, exist_ok=True)
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-S", "-c", LOCK, path], **pipes)
    assert process.stdout.readline() == b"locked\n"
    return process


def foreign():
    os.mkdir("new.npz.partial")
    Path("new.npz.partial/photo.jpg").write_text("mine")


def started(file=None, content=None):
    """Work on new.npz as a kill leaves it, with one file replaced."""
    fuzz.start_sampling()
    if file:
        Path("new.npz.partial", file).write_bytes(content)


def comma():
    os.rename("src/a", "src/a,b")
    fuzz.call("extract --data src --out named")
    fuzz.call("repa --data named --out comma")


def old_checkpoint():
    content = torch.load("run/last.pt", weights_only=True)
    torch.save(content, "old.pt", _use_new_zipfile_serialization=False)


def npy_bytes():
    np.save("x.npy", np.zeros((12, 8, 8, 3), "u1"))
    return Path("x.npy").read_bytes()


def deeper():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fuzz.dit.SIZES, "nano", (4, 32, 2))
        fuzz.call("repa --out deep")
    shutil.copy("deep/last.pt", "deep.pt")


def nan_heads():
    def spoil(content):
        for value in content["heads"].values():
            value.fill_(torch.nan)

    checkpoint(spoil)()


# ---- the tests


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    home = tmp_path_factory.mktemp("whole")
    with fuzz.small_nano():
        fuzz.make_files(home)
    return home


@pytest.fixture
def scratch():
    """A folder in memory where there is such a place: a thousand copies of the files go there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield folder


@pytest.fixture
def home(whole, scratch, monkeypatch, request):
    """A fresh copy of the whole files, as current folder; of the runs, those that are named."""
    monkeypatch.setitem(fuzz.dit.SIZES, "nano", (2, 32, 2))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    vae = fuzz.extract_features.STABLE_DIFFUSION  # built before its weights are found wanting
    monkeypatch.setitem(vae, "block_out_channels", [32] * 4)
    params = getattr(request.node, "callspec", None)
    name = params.params.get("name") if params else None
    table = TABLE if name in TABLE else FINE
    needed = table[name][0] if name else "run rundiv runsd"
    if name in FINE or name in ("init: no such", "shard a checkpoint"):
        needed += " run"
    runs = [name for name in ("run", "rundiv", "runsd") if not re.search(rf"\b{name}\b", needed)]
    home = shutil.copytree(whole, Path(scratch, "home"), ignore=shutil.ignore_patterns(*runs))
    monkeypatch.chdir(home)
    return home


def contents(folder):
    """Path -> what is there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = path.read_bytes()
        elif not path.is_dir():
            found[name] = "pipe"
    return found


class Hang(BaseException):
    pass


@contextlib.contextmanager
def limits(seconds, gigabytes=2):
    """Raise Hang after so long; let allocations beyond so much more memory fail."""

    def stop(*_):
        raise Hang

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before, (_, most) = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + gigabytes * 2**30, most))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def refusal(command, seconds=20):
    """The one line in which the command ends."""
    with limits(seconds), pytest.raises(SystemExit) as end:
        fuzz.call(command)
    message = end.value.code
    assert isinstance(message, str) and "\n" not in message and 10 < len(message) < 600, message
    assert "Error:" not in message.split("(")[0] and "MemoryError" not in message, message
    return message


TABLE = dict(cases())


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name, home, capsys, recwarn):
    case = TABLE[name]
    held = case.spoil() if case.spoil else None
    before = contents(home)
    capsys.readouterr()
    message = refusal(case.command, 20)
    after, shown = contents(home), capsys.readouterr()
    for word in case.words:
        assert word in message, message
    kept = {path for path in before if not path.endswith(".tmp")}  # an own leftover may go
    assert all(after.get(path) == before[path] for path in kept), "a file that was there has changed"
    new = after.keys() - before.keys()
    assert not [path for path in new if not any(fnmatch(path, pattern) for pattern in case.new)], new
    for path in new:
        assert not path.endswith(("last.pt", "new.npz", ".png"))
        assert not path.endswith(".safetensors")
    assert "Traceback" not in shown.err + shown.out, shown.err
    assert not [warning.message for warning in recwarn if warning.category is not ResourceWarning]
    if isinstance(held, subprocess.Popen):
        held.communicate()


def test_the_table_is_large():
    assert len(TABLE) >= 100
    assert {case.command.split()[0] for case in TABLE.values()} == fuzz.COMMANDS.keys()


def test_labels_of_any_size(home):
    """12 labels around 10^12 are at most 12 classes, and no list of 10^12 names is made."""
    archive("src.npz", arr_1=10**12 + np.arange(12) % 3)()
    with limits(20):
        fuzz.call("extract")
    assert len(json.loads(Path("new/meta.json").read_text())["classes"]) == 3


FULL = [(5000, "repa"), (9000, "sddit"), (500, "sample run"), (5000, "extract")]


@pytest.mark.parametrize("size, command", FULL)
def test_full_disk(home, size, command):
    """No file may grow beyond `size` bytes: one line that names a file, and no result."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = contents(home)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        message = refusal(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "new" in message, message
    after = contents(home)
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in after.keys() - before.keys() if path.endswith(("last.pt", "new.npz"))]


CLOSED = [  # command, what is closed, in a folder that is otherwise open to all
    ("extract --out new", "."),
    ("extract --out a/b", "."),
    ("extract --data src", "src/a"),
    ("extract --data src", "src/a/00.png"),
    ("extract --data src", "src"),
    ("extract --data src.zip", "src.zip"),
    ("extract --data src.npz", "src.npz"),
    ("extract --data listed", "listed/dataset.json"),
    ("extract --vae autoencoder", "autoencoder"),
    ("repa --out new", "."),
    ("repa --out a/b", "."),
    ("repa --data cache", "cache"),
    ("repa --data cache", "cache/meta.json"),
    ("repa --data cache", CACHED),
    ("repa --init run", "run/last.pt"),
    ("repa --out run --steps 4", "run"),
    ("repa --out run --steps 4", "run/last.pt"),
    ("repa --out run --steps 4", "run/log.jsonl"),
    ("repa --out run --steps 4", "run/run.json"),
    ("repa --out run --steps 4", "run/.lock"),
    ("sample run", "run"),
    ("sample run", "run/last.pt"),
    ("sample run --cfg 2 --guide rundiv", "rundiv/last.pt"),
    ("sample run --out a/new.npz", "."),
    ("fid ref.npz samples.npz", "ref.npz"),
    ("fid ref.npz src", "src/a"),
    ("fid src src", "src/a/00.png"),
    ("fid ref.npz samples.npz --json new.json", "."),
]


@pytest.mark.parametrize("dot", ["", "./"])
@pytest.mark.parametrize("command, closed", CLOSED)
def test_no_permission(home, command, closed, dot):
    """One line that names what could not be opened, with and without a dot before the paths."""
    os.mkdir("autoencoder")
    for path in [home.parent, home, *home.rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o666)
    os.chmod(closed, 0o555 if closed == "." else 0)
    *words, last = command.split()
    user = os.geteuid()
    if user == 0:  # root may open everything
        os.seteuid(65534)
    try:
        message = refusal(" ".join([*words, last if last == "4" else dot + last]))
    finally:
        os.seteuid(user)
        os.chmod(closed, 0o777)
    named = command.split()[-1].split("/")[0] if closed == "." else closed.split("/")[0]
    assert named in message, message


def odd_name(name):
    return moving("src/a", name if isinstance(name, bytes) else f"src/{name}")


FINE = {  # what looks odd and is right: (command, what comes before, files that may change)
    **{
        f"class {name!r:.20}": ("extract --data src", odd_name(name))
        for name in ("a b", "a,b", "\xfc\U0001f41f", "a\nb", "'", '"', "-x", "%s{0}", "train", "~", 200 * "a")
    },
    "class of no characters": (
        "sample named --labels balanced",
        both(
            odd_name(b"src/\xff\xfe"),
            calls("extract --data src --out bytes", "repa --data bytes --out named --sample-every 1"),
        ),
    ),
    "one image": ("extract --limit 1 --crops 100 --seed 2147483647", None),
    "a file per image": ("extract --shard 1 --batch-size 65536", None),
    "REPA on one image": (
        "repa --data one --batch-size 1 --sample-every 1",
        calls("extract --limit 1 --out one"),
    ),
    "SD-DiT on one image": ("sddit --data one --batch-size 1", calls("extract --limit 1 --out one")),
    "DiverseDiT on one image": (
        "diversedit --data one --batch-size 1 --sample-every 1",
        calls("extract --limit 1 --out one"),
    ),
    "MeanFlow on one image": (
        "meanflow --data one --batch-size 1 --sample-every 1 --diverse",
        calls("extract --limit 1 --out one"),
    ),
    "a mean velocity in steps": ("sample runmean --steps 3", None),
    "a grid of one class": (
        "sample of-one --labels balanced --grid new.png",
        calls("extract --limit 1 --out one", "repa --data one --out of-one --batch-size 1"),
    ),
    "one class": ("sddit --control cosine --steps 1 --sample-every 1", tensors(labels=lambda x: x * 0)),
    "batch of all images": ("repa --batch-size 12 --micro-batch 1", None),
    "images of one pixel": ("extract", archive("src.npz", arr_0=np.zeros((12, 1, 1, 3), "u1"))),
    "more arrays": ("extract", archive("src.npz", x=np.zeros(3), y=np.array("a"))),
    "labels of 64 bits": ("extract", archive("src.npz", arr_1=np.full(12, 2**63, np.uint64))),
    "pixels in Fortran order": (
        "extract",
        archive("src.npz", arr_0=np.zeros((12, 8, 9, 3), "u1", order="F")),
    ),
    "an npz in capitals": ("extract --data SRC.NPZ", moving("src.npz", "SRC.NPZ")),
    "a folder called npz": ("extract --data d.npz", moving("src", "d.npz")),
    "null in dataset.json": ("extract --data listed", text("listed/dataset.json", '{"labels": null}')),
    "a dict in dataset.json": ("extract --data listed", listed(dict)),
    "large labels in dataset.json": (
        "extract --data listed",
        listed(lambda pairs: [[name, 10**12 + i] for name, i in pairs]),
    ),
    "a slash behind a folder": ("extract --out new/", None),
    "a folder that is a link": ("extract --out l", both(lambda: os.mkdir("d"), link("l", "d"))),
    "a run that is a link": ("repa --out l", both(lambda: os.mkdir("d"), link("l", "d"))),
    "a cache that is a link": ("repa --data l", link("l", "cache")),
    "a lock that is a device": ("repa", link("new/.lock", "/dev/null")),
    "spaces in a run": ("repa --out 'a b/\xfc'", None),
    "last seed": ("repa --seed 4294967295", None),
    "lr 0, ema 0, beta2 0": ("repa --lr 0 --ema 0 --beta2 0", None),
    "lr 10^-320": ("sddit --lr 1e-320", None),
    "clip 10^-300": ("repa --clip 1e-300", None),
    "warmup 10^18": ("repa --warmup 1000000000000000000 --log-every 1000000000000000000", None),
    "control always dropped": ("repa --control constant --control-drop 1 --class-tokens 3", None),
    "alpha 10^300": ("sddit --control cosine --control-alpha 1e300", None),
    "another file in the cache": ("repa", text("cache/00001024.safetensors", "x")),
    "half-precision weights": ("sample run", lambda: halved()),
    "a run of half-precision weights": ("repa --out run --steps 3", lambda: halved(), ("run/*",)),
    "a moved cache": ("repa --out run --steps 3 --data moved", moving("cache", "moved"), ("run/*",)),
    "a moved run": ("repa --out moved --steps 3", moving("run", "moved"), ("moved/*",)),
    "a read-only checkpoint": (
        "repa --out run --steps 3",
        lambda: os.chmod("run/last.pt", 0o444),
        ("run/*",),
    ),
    "a lost log": ("repa --out run --steps 3", gone("run/log.jsonl"), ("run/*",)),
    "a lost run.json": ("repa --out run --steps 3", gone("run/run.json"), ("run/*",)),
    "rescue flags": ("repa --out run --steps 3 --lr 0 --clip 0 --precision bf16", None, ("run/*",)),
    "fewer steps than done": ("repa --out run --steps 1", None, ("run/run.json",)),
    "init at another side": ("repa --data c16 --init run", calls("extract --image-size 16 --out c16")),
    "init with other classes": (
        "repa --data c5 --init run",
        both(archive("src.npz", arr_1=np.arange(12) % 5), calls("extract --out c5")),
    ),
    "init of another method": ("repa --init runsd", None),
    "a damaged shard, again": ("extract --out cache --flip", cut(CACHED), (CACHED,)),
    "a lost shard, again": ("extract --out cache --flip", gone(CACHED)),
    "a shard of another cache, again": (
        "extract --out cache --flip",
        moved(f"plain/{SHARD}", CACHED),
        (CACHED,),
    ),
    "one image to sample": ("sample run --num 1 --steps 1 --sampler sde", None),
    "a batch of 10^12": ("sample run --batch-size 1000000000000", None),
    "last seed of samples": ("sample run --seed 4294967295", None),
    "a class three times": ("sample run --labels 0,0,0", None),
    "guided from 10^300 on": ("sample run --cfg 2 --interval 1e300 2e300", None),
    "guided by itself": ("sample run --cfg 2 --guide run", None),
    "the smallest control box": (
        "sample boxed --control 1,1,0,0,1,1,0",
        calls("repa --out boxed --control cosine"),
    ),
    "the last pixel": ("sample boxed --control 8,8,7,7,1,1,1", calls("repa --out boxed --control constant")),
    "a box of 10^6": (
        "sample boxed --control 1000000,1000000,0,0,1000000,1000000,1",
        calls("repa --out boxed --control cosine"),
    ),
    "--out twice": ("sample run --out other.npz", lambda: started()),
    "a grid in a run": ("sample run --grid run/x.png", None),
    "a grid over a link to a device": ("sample run --grid l.png", link("l.png"), ("l.png",)),
    "partial is a link": (
        "sample run",
        both(lambda: os.mkdir("d"), link("new.npz.partial", "d")),
        ("new.npz.partial",),
    ),
    **{
        f"part {kind}, again": (fuzz.SAMPLE_ON, both(lambda: started(), spoil), ("new.npz.partial/*",))
        for kind, spoil in {
            "empty": text(fuzz.PART),
            "cut": cut(fuzz.PART),
            "flipped": flipped(fuzz.PART, 8, 9),
            "endless": link(fuzz.PART, "/dev/zero"),
            "foreign": moved(CACHED, fuzz.PART),
            "of three images": lambda: safetensors.torch.save_file(
                {"images": torch.zeros(3, 8, 8, 3, dtype=torch.uint8)}, fuzz.PART
            ),
            "of other names": lambda: safetensors.torch.save_file(
                {"image": torch.zeros(2, 8, 8, 3, dtype=torch.uint8)}, fuzz.PART
            ),
            "of another batch size": lambda: None,
        }.items()
    },
    "fid of itself": ("fid ref.npz ref.npz --batch-size 1000000000000", None),
    "fid of four images": (FID, archive("samples.npz", arr_0=np.zeros((4, 8, 8, 3), "u1"))),
    "fid of an npy": ("fid ref.npz x.npy", lambda: npy_bytes()),
    "fid with labels of another number": (FID, archive("samples.npz", arr_1=np.zeros((3, 2)))),
    "fid with a protocol of numbers": (
        f"{FID} --json new.json",
        archive("samples.npz", protocol=np.zeros(3)),
    ),
}


def halved():
    def change(content):
        for part in ("model", "ema"):
            content[part] = {name: value.half() for name, value in content[part].items()}

    checkpoint(change)()


@pytest.mark.parametrize("name", FINE)
def test_odd_and_right(name, home):
    """It ends without a message, and what was there is still there."""
    command, before, *changing = FINE[name]
    if before:
        before()
    there = contents(home)
    with limits(20):
        fuzz.call(command)
    after = contents(home)
    patterns = changing[0] if changing else ()
    for path in there:
        assert after.get(path) == there[path] or any(fnmatch(path, pattern) for pattern in patterns), path


def test_every_flag_is_free_or_refused():
    """OTHER_RUN has every flag of train_repa.py that does not belong to files.FREE_FLAGS or RESCUE_FLAGS."""
    flags = {flag.split()[0].strip("-") for flag in OTHER_RUN["repa --out run"].replace("\n", " ").split("|")}
    flags = {flag.strip().replace("-", "_") for flag in flags}
    known = vars(train_repa.parse_args([])).keys()
    assert flags == known - files.FREE_FLAGS - files.RESCUE_FLAGS


def some_flips():
    with fuzz.small_nano():
        counts, reports = fuzz.fuzz(flips=len(fuzz.KINDS))
    assert not reports and counts.total() == len(fuzz.KINDS)
    assert sum(count for (_, verdict), count in counts.items() if verdict == "refused") > 8


def test_some_flips(processes):
    """A few of the flips of `python tests/fuzz.py`: none crashes, none hangs. In a process without threads of
    autograd, because it forks."""
    assert exit_code(processes, some_flips) == 0


@pytest.mark.parametrize("command", ["sample run", "extract", "repa", "sddit --out runsd --steps 9"])
def test_ctrl_c_ends_in_one_line(home, command, monkeypatch):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("files.launch", pressed)
    assert "same command" in refusal(command)
