"""Images -> cache: autoencoder latents, encoder targets, labels and crops, as memory-mapped .npy files.

    python extract_features.py --data tests/digits.npz --image-size 8 --patch 2 --vae none --encoder hog \\
        --out features/digits
    torchrun --nproc_per_node=8 extract_features.py --data imagenet/train --out features/imagenet256

--data is a folder of class folders (class/*.jpg, png, webp), a .zip of one, or an ADM .npz (arr_0 uint8 NHWC,
arr_1 labels). Any number of processes share the work. After a kill, the same command continues.

The cache (--out), read back by `CachedFeatures`:
    moments.npy  [N, V, 2C, h, w] float16    mean, then standard deviation (not log variance) of the latent
    targets.npy  [N, V, T, F] float16, int8  encoder tokens, T = (h / patch)^2; absent with --encoder none
    labels.npy   [N] int64                   index of the sorted class name; -1: unreadable, skipped
    control.npy  [N, V, 7] int32             h0, w0, top, left, h, w, flip: the part of the image in the view
    meta.json                                what made the cache, and whether it is complete
N images, V views: the centre crop; with --flip its mirror image (which is encoded: mirroring the latent would
not do); with --crops K, K random squares. Targets and control are those of the view.

REPA's encoders and timm's names. MAE and CLIP give their tokens before the final norm, the others after it:
    dinov2-vit-b  vit_base_patch14_dinov2.lvd142m     dinov2reg-vit-b  vit_base_patch14_reg4_dinov2.lvd142m
    dinov1-vit-b  vit_base_patch16_224.dino           mae-vit-l        vit_large_patch16_224.mae
    jepa-vit-h    vit_huge_patch14_gap_224.in1k_ijepa clip-vit-L  vit_large_patch14_clip_quickgelu_224.openai
MoCo v3 is not in timm. SigLIP (vit_large_patch16_siglip_256.webli) is not in REPA's code.
"""

import argparse
import contextlib
import fcntl
import io
import json
import math
import os
import shutil
import socket
import sys
import urllib.parse
import urllib.request
import zipfile
from collections import Counter, OrderedDict
from datetime import timedelta
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import huggingface_hub
import numpy as np
import safetensors.torch
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from numpy.lib.format import open_memmap, read_array, read_array_header_1_0, read_magic
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_convert
from tqdm import tqdm

FORMAT_VERSION = 1
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


# ---- shared by the programs: command lines, files of a user, folders that one command fills
class Parser(argparse.ArgumentParser):
    """argparse that keeps the docstring's layout, shows every default, and reports an error in one line."""

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            silent = action.default is None or action.default is False or "default" in (action.help or "")
            return action.help if silent else super()._get_help_string(action)

    def __init__(self, file, description):
        super().__init__(prog=Path(file).name, description=description, formatter_class=self.Formatter)
        self.register("action", "onoff", argparse.BooleanOptionalAction)

    def error(self, message):
        raise SystemExit(f"{self.prog}: {message}")


def number(kind, low=-math.inf, high=math.inf, above=-math.inf):
    """An argparse type: a finite int or float with low <= value <= high and value > above."""
    limits = {"at least": low, "at most": high, "above": above}
    wanted = " and ".join(f"{word} {limit}" for word, limit in limits.items() if math.isfinite(limit))

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            name = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {name}") from None
        if not (low <= value <= high and above < value < math.inf):
            raise argparse.ArgumentTypeError(f"{text[:40]} must be {wanted or 'finite'}")
        return value

    return parse


@contextlib.contextmanager
def reading(what, remedy):
    """Turn whatever a decoder raises on a damaged or foreign file into a ValueError of one line."""
    try:
        yield
    except Exception as error:  # about ten types
        reason = " ".join(str(error).split()).split(". ")[0][:200] or type(error).__name__
        raise ValueError(f"{what} ({reason}); {remedy}") from None


def lock_folder(folder):
    """Create the folder and lock it until the result is closed or this process ends. ValueError if locked."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        remedy = "wait for it or choose another --out"
        raise ValueError(f"{folder}: another process is writing there; {remedy}") from None
    except OSError:
        pass  # a file system without locks
    return file


def start_folder(folder, file, description, arrays, parts, ignore=(), copies=1):
    """Create a folder of empty arrays to be filled part by part, or check the one that is there.

    folder/file: `description` as JSON; arrays: name -> dict(shape, dtype); progress.npy: a flag for each of
    the `parts` parts, made last. ignore: keys of the description that may differ. copies: of the arrays, for
    which the disk must have room. Returns the folder's lock. ValueError if the folder is foreign or damaged,
    or the disk too small.
    """
    if folder.exists() and not (folder / file).exists():
        if foreign := {path.name for path in folder.iterdir()} - {".lock", f"{file}.tmp"}:
            raise ValueError(f"{folder} holds other files, such as {min(foreign)}; choose another --out")
    lock, progress = lock_folder(folder), folder / "progress.npy"
    if (folder / file).exists():
        found = read_json(folder / file)
        for key in description:
            if key not in ignore and found.get(key) != description[key]:
                here = f"{key} is {found.get(key)!r:.80} there, {description[key]!r:.80} here"
                remedy = "delete it or choose another name"
                raise ValueError(f"{folder} holds the work of another command: {here}; {remedy}")
        if progress.exists():
            for name, array in arrays.items():
                open_array(folder / f"{name}.npy", **array)
            if open_array(progress, [parts], "uint8").max() > 1:
                raise ValueError(f"{progress}: damaged; delete the folder and make it again")
        if progress.exists() or found.get("complete"):
            return lock
    sizes = [math.prod(array["shape"]) * np.dtype(array["dtype"]).itemsize for array in arrays.values()]
    size, free = copies * sum(sizes), shutil.disk_usage(folder).free
    print(f"{folder}: needs {size / 1e9:.3f} GB, {free / 1e9:.1f} GB are free", flush=True)
    if size > free:
        raise ValueError(f"{folder}: needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    write_json(folder / file, description)
    try:
        for name, array in (arrays | {"progress.tmp": dict(shape=[parts], dtype="uint8")}).items():
            path = folder / f"{name}.npy"
            open_memmap(path, mode="w+", shape=tuple(array["shape"]), dtype=array["dtype"])
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}") from None
    os.replace(folder / "progress.tmp.npy", progress)
    return lock


def read_json(path):
    """The dict in a JSON file. ValueError if there is none."""
    with reading(f"{path}: damaged", "delete the folder and make it again"):
        return dict(json.loads(path.read_text()).items())


def replace_file(path, write):
    """write(file) beside the old file, then rename it. SystemExit, and the old file whole, if that fails."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = " ".join(str(cause).split())[:200]
        sys.exit(f"cannot write {path} ({reason}); free some space and run the same command again")


def write_json(path, value):
    """Replace the file at once: a kill leaves the old one or the new one."""
    replace_file(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def open_array(path, shape, dtype):
    """Memory map of an .npy file. ValueError unless it holds this shape and dtype in C order."""
    with reading(f"{path}: damaged", "delete the folder and make it again"):
        array = open_memmap(path, mode="r")
        whole = path.stat().st_size == array.offset + array.nbytes and array.flags.c_contiguous
        if array.shape != tuple(shape) or array.dtype != dtype or not whole:
            raise ValueError(f"{array.dtype} {list(array.shape)}, expected {dtype} {list(shape)} in C order")
    return array


class ArrayFile:
    """Rows of an .npy file written in place with ordinary writes: they raise when the disk is full (a memory
    map would kill the process) and do not touch the rows that other nodes write."""

    def __init__(self, path):
        array = open_memmap(path, mode="r")
        self.offset, self.row, self.dtype = array.offset, array.strides[0], array.dtype
        self.file = open(path, "r+b", buffering=0)

    def write(self, start, rows):
        data = memoryview(np.ascontiguousarray(rows, dtype=self.dtype)).cast("B")
        try:
            self.file.seek(self.offset + start * self.row)
            while data:  # one call writes 2 GB at most
                data = data[self.file.write(data) :]
            os.fsync(self.file.fileno())
        except OSError as error:
            raise OSError(f"{self.file.name}: {error.strerror}") from None


# ---- images
class Images:
    """A folder of class folders, a .zip of one, or an ADM .npz; `limit`: only so many images, evenly spread.

    `images[i]` is an RGB PIL image, `labels[i]` its class, `classes` the names. Files are class/file, sorted
    by path; a folder around everything in a .zip is left off; hidden files do not count. The classes of an
    .npz are the numbers up to the largest label or, if that is 100,000 or more, the labels that occur.
    ValueError for a source without usable images, and from `images[i]` for an unreadable one, which it names.
    """

    def __init__(self, source, limit=None):
        self.source, self.file = Path(source), None
        if not (self.source.is_file() or self.source.is_dir()):
            raise ValueError(f"--data {source}: no such file or folder")
        if self.source.suffix == ".npz":
            self._read_header()
        else:
            self._list_files()
        count = len(self.labels)
        if (limit or count) > count:
            raise ValueError(f"--limit {limit}: the source has {count} images")
        self.rows = np.linspace(0, count - 1, limit or count).astype(int)
        self.labels = self.labels[self.rows]

    def _read_header(self):
        expected = "it needs arr_0, uint8 [N, H, W, 3] in C order, and arr_1, N class indices >= 0"
        with reading(f"--data {self.source}: no ADM .npz", expected), zipfile.ZipFile(self.source) as archive:
            if damaged := archive.testzip():  # now, because images are read one by one
                raise ValueError(f"wrong checksum of {damaged}")
            with archive.open("arr_0.npy") as file:
                read_magic(file)
                self.shape, fortran_order, dtype = read_array_header_1_0(file)
                self.start, size = file.tell(), archive.getinfo("arr_0.npy").file_size
            whole = size - self.start == math.prod(self.shape) > 0
            if dtype != np.uint8 or self.shape[3:] != (3,) or fortran_order or not whole:
                raise ValueError(f"arr_0 is {dtype} {list(self.shape)}")
            labels = np.zeros(self.shape[0], np.int64)
            if "arr_1.npy" in archive.namelist():
                labels = read_array(archive.open("arr_1.npy"), allow_pickle=False)
            if labels.dtype.kind not in "iu" or labels.shape != self.shape[:1] or labels.min() < 0:
                raise ValueError(f"arr_1 is {labels.dtype} {list(labels.shape)}")
        if labels.max() < 100_000:
            names, self.labels = range(int(labels.max()) + 1), labels.astype(np.int64)
        else:
            names, self.labels = np.unique(labels, return_inverse=True)
        self.classes, self.paths = [str(name) for name in names], None

    def _list_files(self):
        if self.source.is_dir():
            names = [f"{path.name}/" if path.is_dir() else path.name for path in self.source.iterdir()]
            names += [path.relative_to(self.source).as_posix() for path in self.source.glob("*/**/*")]
        else:
            expected = "expected a folder of class folders, a .zip of one, or an ADM .npz"
            with reading(f"--data {self.source}: no .zip", expected), zipfile.ZipFile(self.source) as archive:
                names = archive.namelist()
                if outside := [name for name in names if name.startswith("/") or ".." in name.split("/")]:
                    raise ValueError(f"{outside[0]} points out of it")
        names = [name for name in names if "/." not in f"/{name}" and not name.startswith("__MACOSX/")]
        images = {name for name in names if name.lower().endswith(IMAGE_SUFFIXES)}
        images = sorted(images, key=lambda name: name.split("/"))
        above = {name: "/".join(name.split("/")[:-2]) for name in images}  # the folder of the class folders
        root = os.path.commonpath(above.values()) if images and self.source.is_file() else ""
        if deep := Counter(folder for folder in above.values() if folder != root):
            meant, _ = deep.most_common(1)[0]
            example = next(name for name in images if above[name] == meant)
            remedy = f"did you mean {self.source / meant}?"
            raise ValueError(f"--data {self.source}: {example} lies deeper than class/file; {remedy}")
        self.prefix = os.path.join(root, "")
        names = [name.removeprefix(self.prefix) for name in names if name.startswith(self.prefix)]
        self.paths = [name.removeprefix(self.prefix) for name in images]
        if loose := [name for name in self.paths if "/" not in name]:
            raise ValueError(f"--data {self.source}: {loose[0]} is in no class folder; make one or go up one")
        folders = [name.split("/")[0] for name in self.paths]
        self.classes = sorted(set(folders))
        empty = sorted({name.split("/")[0] for name in names if "/" in name}.difference(folders))
        if empty or not images:
            where = f"class folder {empty[0]!r}" if empty else "the source"
            raise ValueError(f"--data {self.source}: {where} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        index = {name: label for label, name in enumerate(self.classes)}
        self.labels = np.array([index[name] for name in folders], dtype=np.int64)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        i = self.rows[i]
        name = self.paths[i] if self.paths else i
        remedy = "repair or remove it, or pass --skip-bad"
        with reading(f"--data {self.source}: cannot read image {name}", remedy):
            image = self._open(i).convert("RGB")
            if max(image.size) >= 200 * min(image.size):  # scaled, it would fill the memory
                raise ValueError(f"{image.width} x {image.height} pixels")
            return image

    def _open(self, i):
        if self.source.is_dir():
            if not (self.source / self.paths[i]).is_file():
                raise ValueError("not a file")
            return Image.open(self.source / self.paths[i])
        if self.file is None:  # opened by the process that reads: a position in a file cannot be shared
            archive = zipfile.ZipFile(self.source)
            self.file = archive if self.paths else archive.open("arr_0.npy")
        if self.paths:
            member = self.file.getinfo(self.prefix + self.paths[i])
            if member.file_size > 2**28:
                raise ValueError(f"{member.file_size} bytes")
            return Image.open(io.BytesIO(self.file.read(member)))  # its end checks the checksum
        self.file.seek(self.start + int(i) * math.prod(self.shape[1:]))
        pixels = np.frombuffer(self.file.read(math.prod(self.shape[1:])), np.uint8)
        return Image.fromarray(pixels.reshape(self.shape[1:]))


def center_crop(image, size):
    """ADM's preprocessing: the centred `size` x `size` square of a PIL image (arXiv 2105.05233).

    Halve with BOX while the short side is at least 2 size, scale it to `size` with BICUBIC, crop.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def image_views(image, size, flip, crops, rng):
    """The views of a PIL image as uint8 [V, 3, size, size], and their rows of control.npy: int32 [V, 7].

    Random squares have 0.4 to 1 times the area of the centred one (arXiv 2411.03177; 0.4 is ours); with
    `flip`, half of them are mirrored. Boxes are in pixels of the image before it is mirrored.
    """
    (w0, h0), short = image.size, min(image.size)
    center = center_crop(image, size), ((h0 - short) // 2, (w0 - short) // 2, short)
    views = [(*center, False), (*center, True)][: 1 + flip]                       # square, box, mirrored?
    for _ in range(crops):
        side = max(1, round(short * rng.uniform(0.4, 1) ** 0.5))
        top, left = rng.integers(h0 - side, endpoint=True), rng.integers(w0 - side, endpoint=True)
        square = center_crop(image.crop((left, top, left + side, top + side)), size)
        views.append((square, (top, left, side), flip and rng.random() < 0.5))
    pixels = [np.asarray(square)[:, ::-1] if mirror else np.asarray(square) for square, _, mirror in views]
    control = [(h0, w0, top, left, side, side, mirror) for _, (top, left, side), mirror in views]
    return np.stack(pixels).transpose(0, 3, 1, 2), np.array(control, dtype=np.int32)


# ---- autoencoders: pixels in [-1, 1] <-> latents
class Pixels:
    """`--vae none`: the pixels themselves are the latents, mean = pixel, standard deviation = 0."""

    channels, downsampling, scale, shift = 3, 1, 1.0, 0.0

    def encode(self, images):                                                     # (N, 3, H, W) in [-1, 1]
        return images, torch.zeros_like(images)

    def decode(self, latents):
        return latents


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, c_in, eps=1e-6), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, c_out, eps=1e-6), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttentionBlock(nn.Module):
    """Self-attention over all positions, with one head."""

    def __init__(self, c):
        super().__init__()
        self.group_norm = nn.GroupNorm(32, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.Sequential(nn.Linear(c, c))

    def forward(self, x):
        h = self.group_norm(x).flatten(2).mT.unsqueeze(1)                         # (N, 1, H W, C)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out(h).squeeze(1).mT.reshape(x.shape)


class MiddleBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c, c), ResnetBlock(c, c)])
        self.attentions = nn.ModuleList([AttentionBlock(c)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def coder(c_in, c_out, channels, up):
    """The encoder or, with `up`, the decoder. Modules are named as in diffusers."""
    widths, blocks, name = (channels[::-1], 3, "upsamplers") if up else (channels, 2, "downsamplers")
    stages = nn.Sequential()
    for i, (before, c) in enumerate(pairwise([widths[0], *widths])):
        resnets = [ResnetBlock(before, c)] + [ResnetBlock(c, c) for _ in range(blocks - 1)]
        stage = OrderedDict(resnets=nn.Sequential(*resnets))
        resize = nn.Upsample(scale_factor=2.0) if up else nn.ZeroPad2d((0, 1, 0, 1))
        conv = nn.Conv2d(c, c, 3, padding=1) if up else nn.Conv2d(c, c, 3, stride=2)
        if i < len(widths) - 1:
            stage[name] = nn.Sequential(nn.Sequential(OrderedDict(resize=resize, conv=conv)))
        stages.append(nn.Sequential(stage))
    middle = MiddleBlock(channels[-1])
    stages = dict(mid_block=middle, up_blocks=stages) if up else dict(down_blocks=stages, mid_block=middle)
    layers = OrderedDict(conv_in=nn.Conv2d(c_in, widths[0], 3, padding=1), **stages)
    layers["conv_norm_out"], layers["act"] = nn.GroupNorm(32, widths[-1], eps=1e-6), nn.SiLU()
    layers["conv_out"] = nn.Conv2d(widths[-1], c_out, 3, padding=1)
    return nn.Sequential(layers)


class AutoencoderKL(nn.Module):
    """Stable Diffusion's autoencoder (arXiv 2112.10752): images <-> latents of 4 channels, 1/8 of the side.

    sd-vae-ft-mse and sd-vae-ft-ema have the same encoder and different decoders.
    """

    channels, downsampling, scale, shift = 4, 8, 0.18215, 0.0
    pixels_at_once = 16 * 256 * 256  # a slice of the batch: 512 px fit a small GPU

    def __init__(self, channels=(128, 256, 512, 512)):
        super().__init__()
        self.encoder, self.quant_conv = coder(3, 8, channels, up=False), nn.Conv2d(8, 8, 1)
        self.decoder, self.post_quant_conv = coder(4, 3, channels, up=True), nn.Conv2d(4, 4, 1)
        self.eval().requires_grad_(False)

    def slices(self, batch, side):
        return batch.split(max(1, self.pixels_at_once // side**2))

    def encode(self, images):
        """Images [N, 3, H, W] in [-1, 1] -> mean and standard deviation [N, 4, H/8, W/8], not scaled."""
        moments = [self.quant_conv(self.encoder(x)) for x in self.slices(images, max(images.shape[2:]))]
        mean, log_variance = torch.cat(moments).chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(-30, 20))

    def decode(self, latents):
        """Latents [N, 4, h, w], not scaled -> images [N, 3, 8 h, 8 w], about in [-1, 1]."""
        parts = self.slices(latents, 8 * max(latents.shape[2:]))
        return torch.cat([self.decoder(self.post_quant_conv(z)) for z in parts])


def read_weights(path):
    """The dict in a .safetensors or PyTorch file. ValueError if there is none."""
    with reading(f"{path}: not readable as weights", "copy or download it again"):
        if str(path).endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True).items())


def check_hub():
    """Where the hub does not answer, use only its local cache: its client would try again for a minute."""
    hub = huggingface_hub.constants
    address = urllib.parse.urlsplit(hub.ENDPOINT)
    if not urllib.request.getproxies():
        try:
            port = address.port or {"http": 80}.get(address.scheme, 443)
            socket.create_connection((address.hostname, port), timeout=3).close()
        except OSError:
            hub.HF_HUB_OFFLINE = True


def load_autoencoder(name, device="cpu"):
    """`name`: none, a hub repository, or a local folder or file with Stable Diffusion's autoencoder.

    The result has channels, downsampling, scale, shift, encode, decode; models see (latent - shift) * scale.
    ValueError if the weights cannot be had or are of another architecture.
    """
    if name == "none":
        return Pixels()
    path, file = Path(name), "diffusion_pytorch_model.safetensors"
    if path.is_dir():
        path = path / file
    elif not path.is_file():
        check_hub()
        remedy = f"pass a folder or file with its {file}; a run with --sample-every 0 needs none"
        with reading(f"--vae {name}: cannot be downloaded", remedy):
            path = huggingface_hub.hf_hub_download(name, file)
    weights, state, autoencoder = read_weights(path), {}, AutoencoderKL()
    renamed = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # in older files
    with reading(f"--vae {name}: weights of another architecture", "pass those of an SD autoencoder"):
        for key, value in weights.items():
            for old, new in renamed.items():
                key = key.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
            state[key] = value.flatten(1) if "attentions.0.to_" in key and value.ndim == 4 else value
        autoencoder.load_state_dict(state)
    return autoencoder.to(device)


# ---- encoders: pixels -> one target vector per token
class HOG:
    """Histograms of oriented gradients (Dalal and Triggs, 2005), one vector for each cell of a grid.

    Classical spatial features give part of REPA's gain (arXiv 2512.10794), need no weights and suit any image
    size. A vector holds the histograms of the cell and of its eight neighbours, L2-normalised together with a
    constant, so that a flat image gives a direction and not a zero vector.
    """

    bins, floor = 9, 0.02

    def __init__(self, grid):
        self.grid, self.widths = grid, [9 * self.bins + 1]

    def __call__(self, images):                                                   # (N, 3, H, W) uint8
        grey = F.pad(images.float().mean(1, keepdim=True) / 255, (1, 1, 1, 1), mode="replicate")
        dx = (grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]) / 2                     # (N, 1, H, W)
        dy = (grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]) / 2
        angle = torch.atan2(dy, dx).remainder(torch.pi) / torch.pi * self.bins    # in bins, [0, bins]
        centre = torch.arange(self.bins, device=images.device).view(1, -1, 1, 1)
        distance = (angle - centre).abs()                                         # (N, bins, H, W)
        distance = torch.minimum(distance, self.bins - distance)                  # orientations are periodic
        votes = torch.hypot(dx, dy) * (1 - distance).clamp(min=0)                 # linear between two bins
        cells = F.avg_pool2d(votes, images.shape[-1] // self.grid)                # (N, bins, G, G)
        blocks = F.pad(cells, (1, 1, 1, 1), mode="replicate").unfold(2, 3, 1).unfold(3, 3, 1)
        blocks = blocks.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)        # (N, T, 9 bins)
        return F.normalize(F.pad(blocks, (0, 1), value=self.floor), dim=-1)       # (N, T, F)


class ViT:
    """Patch tokens of a frozen timm ViT on a grid x grid raster, as REPA takes them (arXiv 2410.06940).

    The image is normalised as in the encoder's training, then scaled to grid x patch pixels (bicubic, no
    antialias); timm resamples the position table once (bicubic, antialias). Class and register tokens are
    dropped. ValueError if weights cannot be had.
    """

    def __init__(self, name, grid, weights=None, device="cpu"):
        quick = name.replace("_clip_", "_clip_quickgelu_")
        if quick != name and quick in timm.list_models(pretrained=True):
            raise ValueError(f"--encoder {name}: these weights need QuickGELU; pass {quick}")
        what, remedy = f"--encoder {name}: not a ViT that timm knows", "see timm.list_models('vit*')"
        with reading(what, remedy), torch.device("meta"):
            patch = timm.create_model(name).patch_embed.patch_size[0]
        options = dict(num_classes=0, img_size=grid * patch)
        if weights:
            options["pretrained_cfg_overlay"] = {"state_dict": read_weights(weights)}
            failure = f"--encoder-weights {weights}: not weights of {name}", "pass its own"
        else:
            check_hub()
            failure = f"--encoder {name}: its weights cannot be downloaded", "pass --encoder-weights FILE"
        with reading(*failure):
            self.model = timm.create_model(name, pretrained=True, **options)
            twin = timm.create_model(name, pretrained=True, **options).state_dict() if weights else {}
            # timm leaves at random what a file lacks, so that a second loading differs
            if not all(torch.equal(value, self.model.state_dict()[key]) for key, value in twin.items()):
                raise ValueError("some are missing")
        self.model.to(device).eval().requires_grad_(False)
        self.side, self.widths, self.device = grid * patch, [self.model.embed_dim], torch.device(device)
        self.norm = not any(family in name for family in (".mae", "_clip_"))
        config = timm.data.resolve_model_data_config(self.model)
        self.mean, self.std = (torch.tensor(config[k], device=device).view(3, 1, 1) for k in ("mean", "std"))
        with reading(what, remedy):
            self(torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device=device)).view(grid**2, *self.widths)

    def __call__(self, images):                                                   # (N, 3, H, W) uint8
        x = (images.float() / 255 - self.mean) / self.std
        x = F.interpolate(x, size=(self.side, self.side), mode="bicubic")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            options = dict(indices=1, norm=self.norm, output_fmt="NLC", intermediates_only=True)
            return self.model.forward_intermediates(x, **options)[0].float()      # (N, T, F)


class Encoders:
    """Encoders side by side: uint8 images [N, 3, H, W] -> tokens [N, grid^2, sum of `widths`].

    `names`: hog or timm ViTs, with commas between; `weights`: files for the ViTs, likewise.
    """

    def __init__(self, names, grid, weights=None, device="cpu"):
        names, files = names.split(","), weights.split(",") if weights else []
        vits = [name for name in names if name != "hog"]
        if files and len(files) != len(vits):
            raise ValueError(f"--encoder-weights: {len(files)} files for {len(vits)} encoders with weights")
        files = dict(zip(vits, files, strict=False))
        vits = {name: ViT(name, grid, files.get(name), device) for name in vits}
        self.encoders = [vits.get(name) or HOG(grid) for name in names]
        self.widths = [width for encoder in self.encoders for width in encoder.widths]

    def __call__(self, images):
        return torch.cat([encoder(images) for encoder in self.encoders], dim=-1)


def to_int8(targets):
    """Tokens [..., F] scaled to fill int8: the direction remains, which is all that REPA's loss sees."""
    return (targets / targets.abs().amax(-1, keepdim=True).clamp(min=1e-12) * 127).round().to(torch.int8)


# ---- the cache: its format and its reader
def layout(meta, target_dtype):
    """Shape and dtype of the arrays of a cache."""
    images, side, width = [meta["count"], meta["views"]], meta["latent_side"], sum(meta["target_widths"])
    arrays = {
        "moments": dict(shape=[*images, 2 * meta["latent_channels"], side, side], dtype="float16"),
        "labels": dict(shape=images[:1], dtype="int64"),
        "control": dict(shape=[*images, 7], dtype="int32"),
    }
    if width:
        arrays["targets"] = dict(shape=[*images, meta["grid"] ** 2, width], dtype=target_dtype)
    return arrays


def check_meta(meta):
    """Every entry of meta.json: its type, then its range. ValueError names the first that is not sound."""
    whole = "count image_size views latent_channels latent_side grid chunk".split()
    whole = dict.fromkeys(whole, 1) | dict(crops=0, seed=0)  # their minima
    types = dict.fromkeys(whole, int) | dict(limit=(int, type(None)), latent_scale=(int, float))
    types |= dict(latent_shift=(int, float), source=str, vae=str, encoder=str, flip=bool, complete=bool)
    types |= dict(classes=list, target_widths=list, skipped=list, arrays=dict)
    sound = {key: key in meta and isinstance(meta[key], kind) for key, kind in types.items()}
    if all(sound.values()):
        sound = {key: least <= meta[key] < 2**31 for key, least in whole.items()}
        names = {name for name in meta["classes"] if isinstance(name, str)}
        sound["classes"] = 0 < len(names) == len(meta["classes"])
        sound["views"] = meta["views"] == 1 + meta["flip"] + meta["crops"]
        sound["latent_scale"] = 0 < meta["latent_scale"] < 1e6
        sound["latent_shift"] = abs(meta["latent_shift"]) < 1e6
        sound["target_widths"] = all(type(width) is int and width > 0 for width in meta["target_widths"])
    if all(sound.values()):
        sound["grid"] = meta["latent_side"] % meta["grid"] == 0
        layouts = [layout(meta, dtype) for dtype in ("float16", "int8")]
        sound["arrays"] = any(meta["arrays"].items() <= arrays.items() for arrays in layouts)
    for key in (key for key, good in sound.items() if not good):
        raise ValueError(f"{key} is {meta.get(key)!r:.60}")


def to_autoencoder(latents, meta):
    """The inverse of CachedFeatures.latents: latents of a model -> latents that the autoencoder decodes."""
    return latents / meta["latent_scale"] + meta["latent_shift"]


def own_session(worker):
    """Shield a loader process from the signals that end a run: the last checkpoint still needs it."""
    os.setsid()


class CachedFeatures(Dataset):
    """Reader of a cache: item i is view i % V of image i // V. Batches are read in file order, the fastest.

    `features.__getitems__(indices)` returns a dict of arrays, a row per index: moments [n, 2C, h, w] float16
    and labels [n] int64; with `control`, control [n, 7] int32; with `targets`, targets [n, T, F].
    `features.meta` is meta.json, `features.labels` [number of images] the labels; images that were skipped as
    unreadable do not count. ValueError unless `path` holds a complete, sound cache with targets and control.
    """

    def __init__(self, path, targets=True, control=True):
        path = Path(path)
        self.opened = path, targets, control
        if not (path / "meta.json").is_file():
            below = sorted(str(meta.parent) for meta in path.glob("*/meta.json"))
            remedy = f"did you mean {below[0]}?" if below else "make one with extract_features.py"
            raise ValueError(f"{path}: no feature cache there; {remedy}")
        self.meta = meta = read_json(path / "meta.json")
        if meta.get("format_version") != FORMAT_VERSION:
            found = f"{meta.get('format_version')!r:.60}"
            raise ValueError(f"{path}: cache format {found}, not {FORMAT_VERSION}; extract it again")
        with reading(f"{path / 'meta.json'}: damaged", "delete the folder and extract it again"):
            check_meta(meta)
        if not meta["complete"]:
            raise ValueError(f"{path}: the cache is incomplete; run the same extraction again to complete it")
        names = ["moments", "labels"] + ["control"] * bool(control) + ["targets"] * bool(targets)
        if missing := [name for name in names if name not in meta["arrays"]]:
            remedy = "extract it with an --encoder" if missing[0] == "targets" else "extract it again"
            raise ValueError(f"{path}: the cache has no {missing[0]}; {remedy}")
        self.arrays = {name: open_array(path / f"{name}.npy", **meta["arrays"][name]) for name in names}
        self.views, labels = meta["views"], np.array(self.arrays["labels"])
        self.rows = np.flatnonzero(labels >= 0)
        self.labels = labels[self.rows]
        if not len(self.rows):
            raise ValueError(f"{path}: none of its images was readable; extract it again")
        if labels.max() >= len(meta["classes"]) or np.flatnonzero(labels < 0).tolist() != meta["skipped"]:
            raise ValueError(f"{path}/labels.npy: damaged, labels without a class; extract it again")
        for name in set(names) - {"labels"}:
            self.arrays[name] = self.arrays[name].reshape(-1, *self.arrays[name].shape[2:])

    def model_options(self, patch):
        """input_size, in_channels, num_classes of a model. ValueError if its tokens are not the targets'."""
        meta, side, grid = self.meta, self.meta["latent_side"], self.meta["grid"]
        if "targets" in self.arrays and side % patch == 0 and side // patch != grid:
            remedy = f"train with --model SIZE/{side // grid}, or extract with --patch {patch}"
            raise ValueError(f"the cache has {grid}x{grid} targets, the model has patch {patch}: {remedy}")
        return dict(input_size=side, in_channels=meta["latent_channels"], num_classes=len(meta["classes"]))

    def latents(self, moments, noise=0):
        """Moments [N, 2C, h, w], noise [N, C, h, w] or 0 for the mean -> latents as the model sees them."""
        mean, std = moments.float().chunk(2, dim=1)
        return (mean + std * noise - self.meta["latent_shift"]) * self.meta["latent_scale"]

    def spread(self, images):
        """A batch (see __getitems__): the first views of `images` images, evenly spread over the classes."""
        by_class = np.argsort(self.labels, kind="stable")
        chosen = by_class[np.linspace(0, len(by_class) - 1, min(images, len(by_class))).astype(int)]
        return default_convert(self.__getitems__(chosen * self.views))

    def loader(self, order, workers=None, pin_memory=False):
        """Iterator over dicts of tensors, one for each array of indices in `order`.

        workers: processes that read ahead, by default 4 for targets and none for latents alone.
        """
        if workers is None:
            workers = min(4, os.cpu_count()) if "targets" in self.arrays else 0
        options = dict(num_workers=workers, pin_memory=pin_memory, worker_init_fn=own_session)
        # the dataset returns whole batches: nothing to stack, default_convert only turns arrays into tensors
        return iter(DataLoader(self, batch_sampler=order, collate_fn=default_convert, **options))

    def __reduce__(self):
        return CachedFeatures, self.opened  # a spawned loader process opens the files, it gets no copies

    def __len__(self):
        return len(self.rows) * self.views

    def __getitems__(self, indices):
        indices = np.asarray(indices)
        indices = self.rows[indices // self.views] * self.views + indices % self.views
        order = np.argsort(indices)
        batch = {}
        for name, array in self.arrays.items():
            rows = indices // self.views if name == "labels" else indices
            batch[name] = np.empty((len(rows), *array.shape[1:]), array.dtype)
            batch[name][order] = array[rows[order]]
        return batch

    @cached_property
    def control_table(self):
        """int32 [classes, 50, 7]: control of 50 images of each class, centred and not mirrored; None without.

        Evenly spread over a class, repeated if it has fewer; zeros (no control) for a class without images.
        """
        if "control" not in self.arrays:
            return None
        table = torch.zeros(len(self.meta["classes"]), 50, 7, dtype=torch.int32)
        for label in np.unique(self.labels):
            images = self.rows[self.labels == label]
            images = images[np.linspace(0, len(images) - 1, 50).astype(int)]
            table[label] = torch.from_numpy(self.arrays["control"][images * self.views])
        return table


# ---- the cache: its writer
class Views(Dataset):
    """Item i: `image_views` of image i and "", or of a black image and why image i is unreadable (an
    exception would leave a loader process as a traceback)."""

    def __init__(self, images, args):
        self.images, self.seed, self.options = images, args.seed, (args.image_size, args.flip, args.crops)

    def __getitem__(self, i):
        try:
            image, error = self.images[i], ""
        except ValueError as reason:
            image, error = Image.new("RGB", self.options[:1] * 2), str(reason)
        return *image_views(image, *self.options, np.random.default_rng([self.seed, i])), error


@torch.inference_mode()
def extract(out, meta, images, autoencoder, encoder, args, rank, world, device):
    """Encode this rank's share of the chunks that `progress.npy` does not mark as written."""
    done, size = open_memmap(out / "progress.npy", mode="r"), meta["chunk"]
    chunks = [chunk for chunk in np.flatnonzero(done == 0).tolist() if chunk % world == rank]
    order = [range(chunk * size, min((chunk + 1) * size, meta["count"])) for chunk in chunks]
    loader = DataLoader(Views(images, args), batch_sampler=order, num_workers=args.workers)
    files = {name: ArrayFile(out / f"{name}.npy") for name in [*meta["arrays"], "progress"]}
    total, start = meta["count"], min(int(done.sum()) * size, meta["count"])
    pause = 0.1 if sys.stderr.isatty() else 30  # seconds between two states of the bar
    bar = tqdm(total=total, initial=start, unit="img", disable=rank > 0, mininterval=pause, miniters=1)
    for chunk, indices, (pixels, control, errors) in zip(chunks, order, loader, strict=True):
        labels = torch.from_numpy(images.labels[indices])
        for i, error in enumerate(errors):
            if error and not args.skip_bad:
                raise ValueError(error)
            if error:
                tqdm.write(f"skipped: {error.rpartition('; ')[0]}", file=sys.stderr)
                labels[i] = -1
        pixels = pixels.flatten(0, 1).to(device)                                  # (n V, 3, S, S) uint8
        moments = torch.cat(autoencoder.encode(pixels.float() / 127.5 - 1), dim=1)
        rows = {"moments": moments, "labels": labels, "control": control}
        if encoder:
            rows["targets"] = encoder(pixels)                                     # (n V, T, F)
        for name, values in rows.items():
            dtype, shape = (meta["arrays"][name][key] for key in ("dtype", "shape"))
            stored = to_int8(values) if dtype == "int8" else values.to(getattr(torch, dtype))
            if not (values.isfinite().all() and stored.isfinite().all()):
                raise ValueError(f"{name} of images {indices[0]} to {indices[-1]} are not finite in {dtype}")
            files[name].write(indices[0], stored.reshape(len(indices), *shape[1:]).cpu().numpy())
        files["progress"].write(chunk, [1])
        bar.update(min(int(done.sum()) * size, meta["count"]) - bar.n)            # of all ranks


def extract_digits(out):
    """Make the cache of tests/digits.npz for --digits of the training scripts, where there is none yet."""
    meta = Path(out, "meta.json")
    if meta.is_file() and '"complete": true' in meta.read_text(errors="replace"):
        return
    options = ["--data", str(Path(__file__).parent / "tests" / "digits.npz"), "--out", str(out)]
    main([*options, *"--image-size 8 --patch 2 --vae none --encoder hog --workers 0".split()])


def describe(args, images, autoencoder, encoder):
    """The contents of meta.json."""
    side = args.image_size // autoencoder.downsampling
    meta = {key: getattr(args, key) for key in "limit image_size flip crops seed vae encoder".split()}
    meta |= dict(format_version=FORMAT_VERSION, source=str(Path(args.data)), complete=False, skipped=[])
    meta |= dict(count=len(images), classes=images.classes, chunk=args.batch_size)
    meta |= dict(views=1 + args.flip + args.crops, latent_side=side, latent_channels=autoencoder.channels)
    meta |= dict(latent_scale=autoencoder.scale, latent_shift=autoencoder.shift)
    meta |= dict(grid=side // args.patch, target_widths=encoder.widths if encoder else [])
    return meta | {"arrays": layout(meta, args.target_dtype)}


def parse_args(argv=None):
    parser = Parser(__file__, __doc__)
    add = parser.add_argument_group("images").add_argument
    add("--data", required=True, help="folder of class folders, .zip of one, or ADM .npz")
    add("--out", required=True, help="folder of the cache")
    add("--image-size", type=number(int, 1, 4096), default=256, help="side of the square images, in pixels")
    add("--flip", action="store_true", help="also encode the mirrored image, as a second view")
    add("--crops", type=number(int, 0, 1000), default=0, metavar="K", help="also encode K random squares")
    add("--seed", type=number(int, 0, 2**31 - 1), default=0, help="seed of the random squares")
    add("--limit", type=number(int, 1), help="only this many images, evenly spread over the source")
    add("--skip-bad", action="store_true", help="leave unreadable images out instead of stopping")
    add = parser.add_argument_group("autoencoder and encoder").add_argument
    add("--vae", default="stabilityai/sd-vae-ft-mse", help="autoencoder, or none: pixels as latents")
    add("--patch", type=number(int, 1), default=2, help="patch size of the models to train")
    add("--encoder", default="vit_base_patch14_dinov2.lvd142m", help="timm ViT, hog, none, or several: A,B")
    add("--encoder-weights", help="local file for --encoder, or one for each, with commas between")
    add("--target-dtype", choices=["float16", "int8"], default="float16", help="int8 halves the disk space")
    add("--batch-size", type=number(int, 1, 2**16), default=64, help="images encoded at a time")
    workers = min(4, os.cpu_count())
    add("--workers", type=number(int, 0, 256), default=workers, help="processes that decode images, per rank")
    return parser.parse_args(argv)


def run(args, rank, world, device):
    """The work of one process, in one attempt. ValueError or OSError for whatever the user has to repair."""
    images, autoencoder = Images(args.data, args.limit), load_autoencoder(args.vae, device)
    grid, rest = divmod(args.image_size, step := autoencoder.downsampling * args.patch)
    if rest:
        fits = " or ".join(str(step * k) for k in (grid, grid + 1) if k)
        raise ValueError(f"--image-size {args.image_size} is not a multiple of {step}; try {fits}")
    encoder = None if args.encoder == "none" else Encoders(args.encoder, grid, args.encoder_weights, device)
    out, meta = Path(args.out), describe(args, images, autoencoder, encoder)
    parts, lock = math.ceil(meta["count"] / meta["chunk"]), contextlib.nullcontext()
    if rank == 0:
        lock = start_folder(out, "meta.json", meta, meta["arrays"], parts, ignore=("complete", "skipped"))
    with lock:
        if world > 1:
            dist.barrier()
        if (out / "progress.npy").exists():
            extract(out, meta, images, autoencoder, encoder, args, rank, world, device)
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()
        if rank == 0:
            finish(out, meta)


def finish(out, meta):
    """Mark a cache as complete, open it as a trainer will, say what it holds. ValueError if it is damaged."""
    labels = open_array(out / "labels.npy", **meta["arrays"]["labels"])
    skipped = np.flatnonzero(labels < 0).tolist()
    write_json(out / "meta.json", meta | {"complete": True, "skipped": skipped})
    CachedFeatures(out, targets="targets" in meta["arrays"])
    (out / "progress.npy").unlink(missing_ok=True)
    names = ", ".join(map(repr, meta["classes"][:3])) + ", ..." * (len(meta["classes"]) > 3)
    kept = f"{len(labels) - len(skipped):,} images of {len(meta['classes']):,} classes: {names}"
    print(f"{out}: complete, {kept}" + f"; {len(skipped)} unreadable, left out" * bool(skipped))


def main(argv=None):
    args = parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=1))  # only barriers; ranks may be uneven
    try:
        run(args, rank, world, device)
    except (ValueError, OSError) as error:
        sys.exit(f"extract_features.py: {error}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("extract_features.py: interrupted; run the same command again to go on")
