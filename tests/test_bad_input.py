"""Bad input of every kind, over all programs: refused in one clear line that names it, nothing on disk lost.

A case is a command (see fuzz.COMMANDS for what comes before its flags), the words that the line must hold,
what is spoilt before it runs, and the files that may appear. Every file that was there must stay as it was.
"""

import contextlib
import json
import os
import re
import resource
import runpy
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
    return lambda: [spoil() for spoil in spoils]


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
        |--patch -2|--patch two|--crops -1|--crops 1001|--seed -1|--seed 2147483648|--limit 0
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
    "sample": f"""--num 0|--num -3|--num {2**40}|--steps 0|--steps {10**7}|--cfg 0.5|--cfg nan|--cfg inf
        |--control-cfg -1|--control-cfg inf|--seed -1|--seed 1.5|--batch-size 0|--batch-size -4
        |--precision fp16|--weights best|--sampler ddim|--official adm|--interval nan 1|--interval 0.7 0.1
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
    "classes": ([], ["0", "1"], [0, 1, 2], 3, ...),
    "latent_scale": (float("nan"), "1", ...),
    "latent_shift": (float("inf"), ...),
    "vae": (3, ...),
    "image_size": (0, -8, "8", ...),
}
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
    "narrow png": Case("extract --data src", ("00.png", "5000000"), picture("src/a/00.png", (1, 5_000_000)), STARTED),
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
    # training: flags that do not fit each other or the cache
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
    # training: --init
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
    # sampling: flags and files to write
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
    params = getattr(request.node, "callspec", None)
    name = params.params.get("name") if params else None
    command = TABLE[name].command if name else "run"
    runs = [name for name in ("run", "rundiv", "runsd") if not re.search(rf"\b{name}\b", command)]
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
    kept = {path for path in before if not path.endswith(".tmp")}               # an own leftover may go
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


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize(
    "command", ["extract", "repa", "sample run", f"{FID} --json no/x.json", "extract --data src"]
)
def test_no_permission(home, command):
    closed = "src/a" if "--data" in command else "no" if "no/" in command else "."
    Path(closed).mkdir(exist_ok=True)
    mode = os.stat(closed).st_mode
    os.chmod(closed, 0o500 if closed == "." else 0)
    try:
        refusal(command)
    finally:
        os.chmod(closed, mode)


def some_flips():
    with fuzz.small_nano():
        counts, reports = fuzz.fuzz(flips=len(fuzz.KINDS))
    assert not reports and counts.total() == len(fuzz.KINDS)
    assert sum(count for (_, verdict), count in counts.items() if verdict == "refused") > 8


def test_some_flips(processes):
    """A few of the flips of `python tests/fuzz.py`: none crashes, none hangs. In a process without threads of
    autograd, because it forks."""
    assert exit_code(processes, some_flips) == 0


@pytest.mark.parametrize("name", ["sample.py", "extract_features.py"])
def test_ctrl_c_ends_in_one_line(name, monkeypatch):
    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dit.ARCHITECTURES", {})  # sample.py adds its own class to the one that it finds
    monkeypatch.setattr("argparse.ArgumentParser.parse_args", pressed)
    with pytest.raises(SystemExit, match=f"^{name}: .*same command"):
        runpy.run_path(str(fuzz.ROOT / name), run_name="__main__")
