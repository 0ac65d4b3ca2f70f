"""Images -> cache: autoencoder latents, encoder targets, labels and crops, as plain memory-mapped .npy files.

    python extract_features.py --data tests/digits.npz --image-size 8 --patch 2 --vae none --encoder hog \\
        --out features/digits
    torchrun --nproc_per_node=8 extract_features.py --data imagenet/train --image-size 256 --out features/imagenet256

--data is a folder of class folders (class/*.jpg, png, webp), a .zip of one, or an ADM-layout .npz (arr_0 uint8 NHWC,
arr_1 labels). Any number of processes share the work; a run that was killed continues with the same command.

The cache (--out), read back by `CachedFeatures`:
    moments.npy  [N, V, 2C, h, w] float16    mean, then standard deviation (not log variance) of the latent
    targets.npy  [N, V, T, F] float16, int8  encoder tokens on the grid of T = (h / patch)^2; absent with --encoder none
    labels.npy   [N] int64                   index of the sorted class name
    control.npy  [N, V, 7] int32             h0, w0, top, left, h, w, flip: which part of which image the view shows
    meta.json                                what made the cache, and whether it is complete
N images, V views: the centre crop; with --flip its mirror image (encoded: a mirrored latent is not the latent of the
mirror); with --crops K, K random squares. Targets and control are those of the view.
"""

import argparse
import fcntl
import json
import math
import os
import shutil
import sys
import zipfile
from datetime import timedelta
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePosixPath

import huggingface_hub
import numpy as np
import safetensors.torch
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from numpy.lib.format import open_memmap
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_convert
from tqdm import tqdm

FORMAT_VERSION = 1
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

# ----------------------------------------------------------------------------------------------------------------------
# Shared by the programs: command lines, and folders that one command fills, whether or not it is interrupted


class Parser(argparse.ArgumentParser):
    """argparse whose --help keeps the docstring as it stands and shows every default, and whose errors are one line."""

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

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'an integer' if kind is int else 'a number'}") from None
        if not (low <= value <= high and value > above and math.isfinite(value)):
            bounds = ((low, "at least"), (high, "at most"), (above, "above"))
            bounds = [f"{word} {bound}" for bound, word in bounds if math.isfinite(bound)]
            raise argparse.ArgumentTypeError(f"{text}: must be {' and '.join(bounds or ['finite'])}")
        return value

    return parse


def lock_folder(folder):
    """Create the folder and lock it against a second process, until the result is closed or this process ends.

    ValueError if another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder}: another process is writing there; wait for it or choose another --out") from None
    except OSError:
        pass  # a file system without locks
    return file


def start_folder(folder, file, description, arrays, parts, ignore=(), copies=1):
    """Create a folder of empty arrays to be filled part by part, or check that the one there is of the same command.

    folder/file: `description` as JSON; arrays: name -> dict(shape, dtype); progress.npy: a flag for each of `parts`,
    made last. ignore: keys of the description that may differ. copies: how often the disk must hold all.
    Returns the folder's lock. ValueError if the folder holds something else, or if the disk is too small.
    """
    foreign = folder.exists() and not (folder / file).exists() and {p.name for p in folder.iterdir()} - {".lock"}
    if foreign:
        raise ValueError(f"{folder} holds other files, such as {min(foreign)}; choose another --out")
    lock = lock_folder(folder)
    if (folder / file).exists():
        found = json.loads((folder / file).read_text())
        for key in description:
            if key not in ignore and found.get(key) != description[key]:
                here = f"{key} is {found.get(key)!r} there, {description[key]!r} here"
                raise ValueError(f"{folder} holds the work of another command: {here}; choose another --out")
        if (folder / "progress.npy").exists() or found.get("complete"):
            return lock
    size = copies * sum(np.prod(a["shape"], dtype=np.int64) * np.dtype(a["dtype"]).itemsize for a in arrays.values())
    free = shutil.disk_usage(folder).free
    print(f"{folder}: {size / 1e9:.3f} GB, {free / 1e9:.1f} GB free", flush=True)
    if size > free:
        raise ValueError(f"{folder}: needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    write_json(folder / file, description)
    for name, array in arrays.items():
        open_memmap(folder / f"{name}.npy", mode="w+", shape=tuple(array["shape"]), dtype=array["dtype"])
    open_memmap(folder / "progress.npy", mode="w+", shape=(parts,), dtype=np.uint8)
    return lock


def write_json(path, value):
    """Replace the file at once: a kill leaves the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


class ArrayFile:
    """Rows of an .npy file written in place with ordinary writes: they raise when the disk is full (a memory map would
    kill the process) and do not touch the rows that other nodes write."""

    def __init__(self, path):
        array = np.load(path, mmap_mode="r")
        self.offset, self.row, self.dtype = array.offset, array.strides[0], array.dtype
        self.file = open(path, "r+b", buffering=0)

    def write(self, start, rows):
        data = np.ascontiguousarray(rows, dtype=self.dtype)
        self.file.seek(self.offset + start * self.row)
        if self.file.write(data) != data.nbytes:
            raise OSError(f"{self.file.name}: short write; is the disk full?")
        os.fsync(self.file.fileno())


# ----------------------------------------------------------------------------------------------------------------------
# Images


class Images:
    """A folder of class folders, a .zip of one, or an ADM .npz: `images[i]` is an RGB PIL image, `labels[i]` its class.

    Sorted by path; the class is the first folder of the path, its label the index of the sorted name.
    ValueError for a source without usable images, and from `images[i]` for an unreadable one, which it names.
    """

    def __init__(self, source, limit=None):
        """`limit`: only so many images, evenly spread."""
        self.source, self.archive, self.pixels = Path(source), None, None
        if not self.source.exists():
            raise ValueError(f"--data {source}: no such file or folder")
        if self.source.suffix == ".npz":
            self._open_npz()
        else:
            self._list_files()
        self.rows = np.arange(len(self.labels))
        if limit is not None:
            if not 1 <= limit <= len(self.rows):
                raise ValueError(f"--limit {limit}: the source has {len(self.rows)} images")
            self.rows = self.rows[np.linspace(0, len(self.rows) - 1, limit).astype(int)]
            self.labels = self.labels[self.rows]

    def _open_npz(self):
        try:
            with np.load(self.source, allow_pickle=False) as file:
                self.pixels, labels = file["arr_0"], file["arr_1"] if "arr_1" in file else None
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"--data {self.source}: not an ADM .npz with arr_0 and arr_1 ({error})") from None
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 4 or self.pixels.shape[3] != 3 or not len(self.pixels):
            found = f"{self.pixels.dtype} {list(self.pixels.shape)}"
            raise ValueError(f"--data {self.source}: arr_0 must be uint8 [N, H, W, 3] with N > 0, found {found}")
        self.labels = np.zeros(len(self.pixels), np.int64) if labels is None else labels.astype(np.int64)
        if self.labels.shape != (len(self.pixels),) or self.labels.min() < 0:
            raise ValueError(f"--data {self.source}: arr_1 must hold one class index >= 0 per image of arr_0")
        self.classes = [str(i) for i in range(self.labels.max() + 1)]

    def _list_files(self):
        if self.source.is_dir():
            paths = [PurePosixPath(p.relative_to(self.source).as_posix()) for p in self.source.rglob("*")]
            folders = {p.name for p in self.source.iterdir() if p.is_dir() and not p.name.startswith(".")}
        elif zipfile.is_zipfile(self.source):
            with zipfile.ZipFile(self.source) as archive:
                paths = [PurePosixPath(name) for name in archive.namelist() if not name.startswith("__MACOSX/")]
            folders = {p.parts[0] for p in paths if len(p.parts) > 1}
        else:
            raise ValueError(f"--data {self.source}: expected a folder of class folders, a .zip of one, or an .npz")
        self.paths = sorted(p for p in paths if p.suffix.lower() in IMAGE_SUFFIXES)
        loose = [p for p in self.paths if len(p.parts) == 1]
        if loose:
            raise ValueError(f"--data {self.source}: {loose[0]} lies outside the class folders; put it into one")
        self.classes = sorted({p.parts[0] for p in self.paths})
        empty = sorted(folders.difference(self.classes))
        if empty or not self.paths:
            where = f"class folder {empty[0]!r}" if empty else "the source"
            raise ValueError(f"--data {self.source}: {where} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        self.labels = np.array([self.classes.index(p.parts[0]) for p in self.paths], dtype=np.int64)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        i = self.rows[i]
        if self.pixels is not None:
            return Image.fromarray(self.pixels[i])
        try:
            if self.source.is_dir():
                return Image.open(self.source / self.paths[i]).convert("RGB")
            if self.archive is None:  # opened by the process that reads: a file position cannot be shared
                self.archive = zipfile.ZipFile(self.source)
            with self.archive.open(str(self.paths[i])) as file:
                return Image.open(file).convert("RGB")
        except (OSError, ValueError, SyntaxError, zipfile.BadZipFile, Image.DecompressionBombError) as error:
            raise ValueError(f"--data {self.source}: cannot read image {self.paths[i]} ({error})") from None


def center_crop(image, size):
    """ADM's preprocessing: the centred `size` x `size` square of a PIL image (guided-diffusion, arXiv 2105.05233).

    Halve with BOX while the short side is at least 2 size, scale it to `size` with BICUBIC, cut out the centre.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def center_box(image):
    """(h0, w0, top, left, h, w): size of a PIL image and the box of its centred square, in pixels of the original."""
    side = min(image.size)
    return image.height, image.width, (image.height - side) // 2, (image.width - side) // 2, side, side


def random_box(image, rng):
    """Like center_box, for a random square of 0.4 to 1 times the centred one's area (arXiv 2411.03177; 0.4 is ours)."""
    side = min(image.size)
    side = max(1, round(side * rng.uniform(0.4, 1) ** 0.5))
    top, left = rng.integers(image.height - side, endpoint=True), rng.integers(image.width - side, endpoint=True)
    return image.height, image.width, top, left, side, side


def image_views(image, size, flip, crops, rng):
    """The views of a PIL image as uint8 [V, 3, size, size], and their rows of control.npy: int32 [V, 7].

    Boxes are in pixels of the image before it is mirrored. With `flip`, half of the random crops are mirrored as well.
    """
    center = center_crop(image, size)
    squares, control = [center], [(*center_box(image), 0)]
    if flip:
        squares.append(center.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        control.append((*center_box(image), 1))
    for _ in range(crops):
        _, _, top, left, h, w = box = random_box(image, rng)
        square = center_crop(image.crop((left, top, left + w, top + h)), size)
        mirror = flip and rng.random() < 0.5
        squares.append(square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else square)
        control.append((*box, mirror))
    return np.stack([np.asarray(square).transpose(2, 0, 1) for square in squares]), np.array(control, dtype=np.int32)


# ----------------------------------------------------------------------------------------------------------------------
# Autoencoders: pixels in [-1, 1] <-> latents


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
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class AttentionBlock(nn.Module):
    """Self-attention over all positions with one head."""

    def __init__(self, c):
        super().__init__()
        self.group_norm = nn.GroupNorm(32, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).mT.unsqueeze(1)                         # (N, 1, H W, C)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h).squeeze(1).mT.reshape(x.shape)


class Resample(nn.Module):
    """Halve (padded at the right and the bottom only) or double the sides, with a convolution."""

    def __init__(self, c, up):
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(c, c, 3, padding=1) if up else nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class Stage(nn.Module):
    """Residual blocks, attention between the two of the middle stage, and a change of resolution after the others."""

    def __init__(self, channels, attention=False, resample=None):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(a, b) for a, b in pairwise(channels))
        if attention:
            self.attentions = nn.ModuleList([AttentionBlock(channels[-1])])
        if resample:
            setattr(self, resample, nn.ModuleList([Resample(channels[-1], up=resample == "upsamplers")]))

    def forward(self, x):
        layers = list(self.resnets)
        for name, place in (("attentions", 1), ("downsamplers", len(layers)), ("upsamplers", len(layers))):
            layers[place:place] = getattr(self, name, [])
        for layer in layers:
            x = layer(x)
        return x


class Coder(nn.Module):
    """The encoder or the decoder: convolution, stages (the middle one last or first), normalised convolution."""

    def __init__(self, c_in, c_out, channels, up):
        super().__init__()
        widths = channels[::-1] if up else channels
        kind, blocks = ("upsamplers", 3) if up else ("downsamplers", 2)
        stages = nn.ModuleList()
        for i, (before, c) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            stages.append(Stage([before] + [c] * blocks, resample=kind if i < len(widths) - 1 else None))
        self.conv_in = nn.Conv2d(c_in, widths[0], 3, padding=1)
        self.mid_block = Stage([channels[-1]] * 3, attention=True)
        setattr(self, "up_blocks" if up else "down_blocks", stages)
        self.order = [self.mid_block, *stages] if up else [*stages, self.mid_block]  # a list: no modules of its own
        self.conv_norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c_out, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for stage in self.order:
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Stable Diffusion's autoencoder (arXiv 2112.10752): images of sides divisible by 8 <-> latents of 4 channels.

    Module names are diffusers'. sd-vae-ft-mse and sd-vae-ft-ema have the same encoder.
    """

    channels, downsampling, scale, shift = 4, 8, 0.18215, 0.0
    pixels_at_once = 16 * 256 * 256  # a slice of the batch: 512 px fit a small GPU

    def __init__(self, channels=(128, 256, 512, 512)):
        super().__init__()
        self.encoder, self.quant_conv = Coder(3, 8, channels, up=False), nn.Conv2d(8, 8, 1)
        self.decoder, self.post_quant_conv = Coder(4, 3, channels, up=True), nn.Conv2d(4, 4, 1)
        self.eval().requires_grad_(False)

    def slices(self, batch, side):
        return batch.split(max(1, self.pixels_at_once // side**2))

    def encode(self, images):
        """Images [N, 3, H, W] in [-1, 1] -> mean and standard deviation [N, 4, H/8, W/8] of the latents, not scaled."""
        moments = [self.quant_conv(self.encoder(x)) for x in self.slices(images, max(images.shape[2:]))]
        mean, log_variance = torch.cat(moments).chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(-30, 20))

    def decode(self, latents):
        """Latents [N, 4, h, w], not scaled -> images [N, 3, 8 h, 8 w], about in [-1, 1]."""
        parts = self.slices(latents, 8 * max(latents.shape[2:]))
        return torch.cat([self.decoder(self.post_quant_conv(z)) for z in parts])


def read_weights(path):
    """The state dict of a .safetensors or PyTorch file. ValueError if it is no such file."""
    try:
        if str(path).endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the readers meet in a foreign or damaged file
        raise ValueError(f"{path}: not readable as weights ({str(error).splitlines()[0]})") from None


def load_autoencoder(name, device="cpu"):
    """`name`: none, a hub repository, or a local folder or file with the weights of Stable Diffusion's autoencoder.

    The result has `channels, downsampling, scale, shift, encode, decode`; a model sees (latent - shift) * scale.
    ValueError if the weights cannot be had or are of another architecture.
    """
    if name == "none":
        return Pixels()
    path, names = Path(name), ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    if path.is_dir():
        path = next((path / name for name in names if (path / name).exists()), None)
        if path is None:
            raise ValueError(f"--vae {name}: the folder holds neither {names[0]} nor {names[1]}")
    elif not path.is_file():
        try:
            path = huggingface_hub.hf_hub_download(name, names[0])
        except Exception as error:  # no network, no such repository, no such file: a zoo of types
            reason = f"cannot be downloaded ({str(error).splitlines()[0]})"
            remedy = f"pass a folder or file with its {names[0]} (training needs it for pictures: --sample-every 0)"
            raise ValueError(f"--vae {name}: {reason}; {remedy}") from None
    renamed = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # older files
    state = {}
    for key, value in read_weights(path).items():
        for old, new in renamed.items():
            key = key.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
        state[key] = value.flatten(1) if "attentions.0.to_" in key and value.ndim == 4 else value
    autoencoder = AutoencoderKL()
    try:
        autoencoder.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"--vae {name}: weights of another architecture ({reason[:200]})") from None
    return autoencoder.to(device)


# ----------------------------------------------------------------------------------------------------------------------
# Encoders: pixels -> one target vector per token


class HOG:
    """Histograms of oriented gradients (Dalal and Triggs, 2005), one vector for each cell of a grid x grid raster.

    Classical spatial features are enough for part of REPA's gain (arXiv 2512.10794), need no weights, and suit images
    of any size. A vector holds the histograms of the cell and of its eight neighbours, L2-normalised together with a
    constant, which leaves a direction, not a zero vector, where an image is flat.
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

    The image is normalised as the encoder's training did, then scaled to grid x patch pixels (bicubic, no antialias);
    timm resamples the position table once (bicubic, antialias). Class and register tokens are dropped. Tokens of the
    last block pass the final norm, except those of MAE and CLIP, as in REPA. ValueError if weights cannot be had.
    """

    def __init__(self, name, grid, weights=None, device="cpu"):
        try:
            with torch.device("meta"):
                patch = timm.create_model(name).patch_embed.patch_size[0]
        except (RuntimeError, AttributeError, ValueError) as error:
            raise ValueError(f"--encoder {name}: not a ViT that timm knows ({str(error).splitlines()[0]})") from None
        source = {"state_dict": read_weights(weights)} if weights else None
        options = dict(num_classes=0, img_size=grid * patch, pretrained_cfg_overlay=source)
        try:
            self.model = timm.create_model(name, pretrained=True, **options).to(device).eval().requires_grad_(False)
        except Exception as error:  # no network, or weights that do not fit: a zoo of types
            reason = str(error).strip().splitlines()[0][:200]
            if weights:
                raise ValueError(f"--encoder-weights {weights}: not weights of {name} ({reason})") from None
            reason = f"its weights cannot be downloaded ({reason})"
            raise ValueError(f"--encoder {name}: {reason}; on an offline machine pass --encoder-weights FILE") from None
        self.side, self.widths, self.device = grid * patch, [self.model.embed_dim], torch.device(device)
        self.norm = not any(family in name for family in (".mae", "_clip_"))
        config = timm.data.resolve_model_data_config(self.model)
        self.mean, self.std = (torch.tensor(config[key], device=device).view(3, 1, 1) for key in ("mean", "std"))

    def __call__(self, images):                                                   # (N, 3, H, W) uint8
        x = (images.float() / 255 - self.mean) / self.std
        x = F.interpolate(x, size=(self.side, self.side), mode="bicubic")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            options = dict(indices=1, norm=self.norm, output_fmt="NLC", intermediates_only=True)
            return self.model.forward_intermediates(x, **options)[0].float()      # (N, T, F)


class Several:
    """Several encoders side by side: their tokens concatenated, `widths` says where to cut."""

    def __init__(self, encoders):
        self.encoders, self.widths = encoders, [width for encoder in encoders for width in encoder.widths]

    def __call__(self, images):
        return torch.cat([encoder(images) for encoder in self.encoders], dim=-1)


def load_encoder(names, grid, weights=None, device="cpu"):
    """`names`: none, or hog and timm ViTs with commas between; `weights`: files for the ViTs, likewise.

    The result maps uint8 images [N, 3, H, W] to tokens [N, grid^2, sum of `widths`]; None for none.
    """
    if names == "none":
        return None
    names, files = names.split(","), weights.split(",") if weights else []
    vits = [name for name in names if name != "hog"]
    if files and len(files) != len(vits):
        raise ValueError(f"--encoder-weights: {len(files)} files for {len(vits)} encoders with weights")
    files = dict(zip(vits, files, strict=False))
    return Several([HOG(grid) if name == "hog" else ViT(name, grid, files.get(name), device) for name in names])


def to_int8(targets):
    """Tokens [..., F] as int8, each scaled to its largest value: the direction remains, all that REPA's loss sees."""
    return (targets / targets.abs().amax(-1, keepdim=True).clamp(min=1e-12) * 127).round().to(torch.int8)


# ----------------------------------------------------------------------------------------------------------------------
# The cache: reader


def to_autoencoder(latents, meta):
    """The inverse of CachedFeatures.latents: latents as a model makes them -> as the autoencoder decodes them."""
    return latents / meta["latent_scale"] + meta["latent_shift"]


def own_session(worker):
    """Put a loader process out of reach of the signals that end a run: it is needed until the checkpoint is written."""
    os.setsid()


class CachedFeatures(Dataset):
    """Reader of a cache: item i is view i % V of image i // V. Batched gathers in file order, so that a disk keeps up.

    `features.__getitems__(indices)` returns a dict of arrays, one row per index:
        moments [n, 2C, h, w] float16, labels [n] int64, control [n, 7] int32, and with `targets` targets [n, T, F].
    `features.meta` is meta.json, `features.labels` [number of images] the labels; images that were skipped as
    unreadable are not counted. ValueError if `path` is no complete cache of this version, or lacks targets or control.
    """

    def __init__(self, path, targets=True, control=True):
        path = Path(path)
        self.opened = path, targets, control
        if not (path / "meta.json").is_file():
            raise ValueError(f"{path}: no feature cache there (no meta.json); make one with extract_features.py")
        self.meta = json.loads((path / "meta.json").read_text())
        if self.meta.get("format_version") != FORMAT_VERSION:
            found = self.meta.get("format_version")
            raise ValueError(f"{path}: cache format {found}, this version reads {FORMAT_VERSION}; extract it again")
        if not self.meta["complete"]:
            raise ValueError(f"{path}: the cache is incomplete; run the same extract_features.py command again")
        names = ["moments", "labels"] + ["control"] * bool(control) + ["targets"] * bool(targets)
        missing = [name for name in names if name not in self.meta["arrays"]]
        if missing:
            remedy = "extract it with an --encoder" if missing[0] == "targets" else "extract it again"
            raise ValueError(f"{path}: the cache has no {missing[0]}; {remedy}")
        self.arrays = {}
        for name in names:
            try:
                array = np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}/{name}.npy: unreadable ({error}); extract the cache again") from None
            if list(array.shape) != self.meta["arrays"][name]["shape"]:
                raise ValueError(f"{path}/{name}.npy: shape {array.shape} is not that of meta.json; extract it again")
            self.arrays[name] = array if name == "labels" else array.reshape(-1, *array.shape[2:])
        self.views, self.rows = self.meta["views"], np.flatnonzero(self.arrays["labels"] >= 0)
        self.labels = np.asarray(self.arrays["labels"])[self.rows]

    @property
    def model_options(self):
        """What a model must know of the cache: input_size, in_channels, num_classes."""
        names = dict(input_size="latent_side", in_channels="latent_channels")
        return {name: self.meta[key] for name, key in names.items()} | {"num_classes": len(self.meta["classes"])}

    def latents(self, moments, noise=0):
        """Moments [N, 2C, h, w] and noise [N, C, h, w] -> latents as the model sees them; noise 0: the mean."""
        mean, std = moments.float().chunk(2, dim=1)
        return (mean + std * noise - self.meta["latent_shift"]) * self.meta["latent_scale"]

    def spread(self, images):
        """A batch (see __getitems__) of the first views of about so many images, evenly spread over the classes."""
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
        # the dataset returns whole batches, so there is nothing to stack: default_convert only makes tensors of arrays
        return iter(DataLoader(self, batch_sampler=order, collate_fn=default_convert, **options))

    def __reduce__(self):
        return CachedFeatures, self.opened  # a spawned loader process opens the files itself: a pickle would copy them

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
    def control_table(self, per_class=50):
        """int32 [classes, 50, 7]: control rows of 50 images of each class, centred and not mirrored; None without.

        Evenly spread over a class, repeated if it has fewer; zeros (no control) for a class without images.
        """
        if "control" not in self.arrays:
            return None
        table = torch.zeros(len(self.meta["classes"]), per_class, 7, dtype=torch.int32)
        for label in np.unique(self.labels):
            images = self.rows[self.labels == label]
            images = images[np.linspace(0, len(images) - 1, per_class).astype(int)]
            table[label] = torch.from_numpy(self.arrays["control"][images * self.views])
        return table

    def __getitem__(self, index):
        return {name: rows[0] for name, rows in self.__getitems__([index]).items()}


# ----------------------------------------------------------------------------------------------------------------------
# The cache: writer


class Chunks(Dataset):
    """Item c: the views of images c * size .. (c+1) * size - 1 as uint8 [n, V, 3, S, S], their control rows [n, V, 7],
    and a dict of the unreadable ones, index -> error (an exception would leave the worker as a traceback)."""

    def __init__(self, images, size, image_size, flip=False, crops=0, seed=0):
        self.images, self.size, self.image_size, self.views, self.seed = images, size, image_size, (flip, crops), seed

    def __len__(self):
        return -(-len(self.images) // self.size)

    def __getitem__(self, chunk):
        pixels, control, bad = [], [], {}
        for i in range(chunk * self.size, min((chunk + 1) * self.size, len(self.images))):
            try:
                image = self.images[i]
            except ValueError as error:
                image, bad[i] = Image.new("RGB", (self.image_size, self.image_size)), str(error)
            views, rows = image_views(image, self.image_size, *self.views, np.random.default_rng([self.seed, i]))
            pixels.append(views)
            control.append(rows)
        return chunk, np.stack(pixels), np.stack(control), bad


@torch.inference_mode()
def extract(out, meta, images, autoencoder, encoder, args, rank, world, device):
    """Encode this rank's share of the chunks that `progress.npy` does not mark as written."""
    done = np.load(out / "progress.npy", mmap_mode="r")
    todo = [chunk for chunk in np.flatnonzero(done == 0).tolist() if chunk % world == rank]
    chunks = Chunks(images, meta["chunk"], meta["image_size"], args.flip, args.crops, args.seed)
    loader = DataLoader(chunks, batch_size=None, sampler=todo, num_workers=args.workers)
    files = {name: ArrayFile(out / f"{name}.npy") for name in meta["arrays"]}
    progress = ArrayFile(out / "progress.npy")
    bar = tqdm(total=meta["count"], initial=int(done.sum()) * meta["chunk"], unit="img", disable=rank > 0)
    for chunk, pixels, control, bad in loader:
        for i, error in bad.items():
            if not args.skip_bad:
                sys.exit(f"extract_features.py: {error}; repair or remove it, or pass --skip-bad")
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            files["labels"].write(i, np.array([-1]))
        start, (n, views) = chunk * meta["chunk"], pixels.shape[:2]
        pixels = torch.as_tensor(pixels).flatten(0, 1).to(device)                 # (n V, 3, S, S) uint8
        moments = torch.cat(autoencoder.encode(pixels.float() / 127.5 - 1), dim=1)
        rows = {"moments": moments, "control": control}
        if encoder:
            targets = encoder(pixels)                                             # (n V, T, F)
            rows["targets"] = to_int8(targets) if args.target_dtype == "int8" else targets
        for name, values in rows.items():
            values = torch.as_tensor(values).cpu().numpy().reshape(n, views, *meta["arrays"][name]["shape"][2:])
            values = values.astype(meta["arrays"][name]["dtype"])
            if not np.isfinite(values).all():
                which = f"{name} of images {start} to {start + n - 1}"
                sys.exit(f"extract_features.py: {which} are not finite in {values.dtype}")
            files[name].write(start, values)
        progress.write(chunk, np.ones(1))
        bar.update(min(int(done.sum()) * meta["chunk"], meta["count"]) - bar.n)   # of all ranks


def check_cache(path, size=1024):
    """Read all of a cache and return a line that says what it holds. ValueError names what is missing or unsound."""
    meta = CachedFeatures(path, targets=False).meta
    features = CachedFeatures(path, targets="targets" in meta["arrays"])
    if not len(features) or features.labels.max() >= len(meta["classes"]):
        raise ValueError(f"{path}: labels that are no classes")
    for start in tqdm(range(0, len(features), size), unit="chunk"):
        batch = features.__getitems__(range(start, min(start + size, len(features))))
        h0, w0, top, left, h, w, flip = batch["control"].T
        std = batch["moments"][:, meta["latent_channels"] :]
        sound = {
            "moments": np.isfinite(batch["moments"]).all() and (std >= 0).all(),
            "control": ((h > 0) & (w > 0) & (top >= 0) & (left >= 0) & (top + h <= h0) & (left + w <= w0)).all(),
        }
        if "targets" in batch:
            tokens = batch["targets"].astype(np.float32)
            sound["targets"] = np.isfinite(tokens).all() and (np.abs(tokens).max(-1) > 0).all()
        for name in (name for name, good in sound.items() if not good):
            raise ValueError(f"{path}: {name}.npy is unsound in views {start} to {start + size - 1}; extract it again")
    return f"{path}: sound, {len(features):,} views of {len(features.labels):,} images"


def extract_digits(out):
    """The cache of the real digits in tests/digits.npz that --digits of the training scripts uses."""
    options = ["--data", str(Path(__file__).parent / "tests" / "digits.npz"), "--out", str(out)]
    main([*options, *"--image-size 8 --patch 2 --vae none --encoder hog --workers 0".split()])


def describe(args, images, autoencoder, encoder):
    """The contents of meta.json."""
    count, views, side = len(images), 1 + args.flip + args.crops, args.image_size // autoencoder.downsampling
    grid = side // args.patch
    arrays = {
        "moments": dict(shape=[count, views, 2 * autoencoder.channels, side, side], dtype="float16"),
        "labels": dict(shape=[count], dtype="int64"),
        "control": dict(shape=[count, views, 7], dtype="int32"),
    }
    if encoder:
        arrays["targets"] = dict(shape=[count, views, grid**2, sum(encoder.widths)], dtype=args.target_dtype)
    return dict(
        format_version=FORMAT_VERSION,
        source=str(Path(args.data)),
        count=count,
        limit=args.limit,
        classes=images.classes,
        image_size=args.image_size,
        views=views,
        flip=args.flip,
        crops=args.crops,
        seed=args.seed,
        vae=args.vae,
        latent_channels=autoencoder.channels,
        latent_side=side,
        latent_scale=autoencoder.scale,
        latent_shift=autoencoder.shift,
        encoder=args.encoder,
        target_widths=encoder.widths if encoder else [],
        grid=grid,
        chunk=args.batch_size,
        arrays=arrays,
        skipped=[],
        complete=False,
    )


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of class folders, .zip of one, or ADM .npz")
    parser.add_argument("--out", help="folder of the cache")
    parser.add_argument("--image-size", type=int, default=256, help="side of the square images, in pixels")
    parser.add_argument("--patch", type=int, default=2, help="patch size of the models to train: fixes the token grid")
    parser.add_argument("--vae", default="stabilityai/sd-vae-ft-mse", help="autoencoder, or none: pixels as latents")
    parser.add_argument("--encoder", default="vit_base_patch14_dinov2.lvd142m", help="timm ViT, hog, none, or A,B")
    parser.add_argument("--encoder-weights", help="local file for --encoder, or files with commas between")
    parser.add_argument("--target-dtype", choices=["float16", "int8"], default="float16", help="int8 halves the disk")
    parser.add_argument("--flip", action="store_true", help="also encode the mirrored image, as a second view")
    parser.add_argument("--crops", type=int, default=0, metavar="K", help="also encode K random squares of each image")
    parser.add_argument("--seed", type=int, default=0, help="of the random squares")
    parser.add_argument("--limit", type=int, help="only this many images, evenly spread over the source")
    parser.add_argument("--skip-bad", action="store_true", help="leave unreadable images out instead of stopping")
    parser.add_argument("--check", metavar="DIR", help="prove that a cache is complete and sound, and exit")
    parser.add_argument("--batch-size", type=int, default=64, help="images encoded and marked as done together")
    workers = min(4, os.cpu_count())
    parser.add_argument("--workers", type=int, default=workers, help="processes that decode images, per rank")
    args = parser.parse_args(argv)
    if not args.check and not (args.data and args.out):
        parser.error("--data and --out are needed, or --check DIR")
    for name in ("crops", "seed", "workers"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} {getattr(args, name)}: must not be negative")
    return args


def main(argv=None):
    args = parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    if args.check:
        try:
            print(check_cache(args.check))
        except (ValueError, OSError) as error:
            sys.exit(f"extract_features.py: {error}")
        return
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=1))  # nothing but barriers, and ranks may be uneven
    try:
        images, autoencoder = Images(args.data, args.limit), load_autoencoder(args.vae, device)
        step = autoencoder.downsampling * args.patch
        if min(args.image_size, args.patch, args.batch_size) < 1 or args.image_size % step:
            fits = f"{max(args.image_size // step, 1) * step} or {(args.image_size // step + 1) * step}"
            raise ValueError(f"--image-size {args.image_size} must be a multiple of downsampling x --patch, say {fits}")
        encoder = load_encoder(args.encoder, args.image_size // step, args.encoder_weights, device)
        out, meta = Path(args.out), describe(args, images, autoencoder, encoder)
        if rank == 0:
            parts = -(-meta["count"] // meta["chunk"])
            lock = start_folder(out, "meta.json", meta, meta["arrays"], parts, ignore=("complete", "skipped"))
            if (out / "progress.npy").exists() and not np.load(out / "progress.npy").any():
                np.save(out / "labels.npy", images.labels)
    except (ValueError, OSError) as error:
        sys.exit(f"extract_features.py: {error}")
    if world > 1:
        dist.barrier()

    if (out / "progress.npy").exists():
        extract(out, meta, images, autoencoder, encoder, args, rank, world, device)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        skipped = np.flatnonzero(np.load(out / "labels.npy") < 0).tolist()
        write_json(out / "meta.json", meta | {"complete": True, "skipped": skipped})
        (out / "progress.npy").unlink(missing_ok=True)
        without = f", without {len(skipped)} unreadable ones" if skipped else ""
        print(f"{out}: complete, {meta['count']:,} images of {len(meta['classes']):,} classes{without}")
        lock.close()


if __name__ == "__main__":
    main()
