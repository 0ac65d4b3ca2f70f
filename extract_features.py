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
N images, V views: 1, or 2 with --flip (the mirrored image encoded; a mirrored latent is not the latent of the mirror).
"""

import argparse
import json
import os
import shutil
import sys
import zipfile
from datetime import timedelta
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.lib.format import open_memmap
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

FORMAT_VERSION = 1
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

# ----------------------------------------------------------------------------------------------------------------------
# Images


class Images:
    """A folder of class folders, a .zip of one, or an ADM .npz: `images[i]` is an RGB PIL image, `labels[i]` its class.

    Sorted by path; the class is the first folder of the path, its label the index of the sorted name.
    ValueError for a source without usable images, and from `images[i]` for an unreadable one, which it names.
    """

    def __init__(self, source):
        self.source, self.archive, self.pixels = Path(source), None, None
        if not self.source.exists():
            raise ValueError(f"--data {source}: no such file or folder")
        if self.source.suffix == ".npz":
            self._open_npz()
        else:
            self._list_files()

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


# ----------------------------------------------------------------------------------------------------------------------
# Autoencoders: pixels in [-1, 1] <-> latents


class Pixels:
    """`--vae none`: the pixels themselves are the latents, mean = pixel, standard deviation = 0."""

    channels, downsampling, scale, shift = 3, 1, 1.0, 0.0

    def encode(self, images):                                                     # (N, 3, H, W) in [-1, 1]
        return images, torch.zeros_like(images)

    def decode(self, latents):
        return latents


def load_autoencoder(name):
    """The autoencoder called `name`: `channels, downsampling, scale, shift, encode, decode`. ValueError if unknown.

    A model sees (latent - shift) * scale.
    """
    if name == "none":
        return Pixels()
    raise ValueError(f"--vae {name!r}: unknown autoencoder; known: none (pixels are the latents)")


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


def load_encoder(name, grid):
    """The encoder called `name` for grid x grid tokens: uint8 [N, 3, H, W] -> [N, T, sum of `widths`], or None."""
    if name == "none":
        return None
    if name == "hog":
        return HOG(grid)
    raise ValueError(f"--encoder {name!r}: unknown encoder; known: hog, none")


def to_int8(targets):
    """Tokens [..., F] as int8, each scaled to its largest value: the direction remains, all that REPA's loss sees."""
    return (targets / targets.abs().amax(-1, keepdim=True).clamp(min=1e-12) * 127).round().to(torch.int8)


# ----------------------------------------------------------------------------------------------------------------------
# The cache: reader


class CachedFeatures(Dataset):
    """Reader of a cache: item i is view i % V of image i // V. Batched gathers in file order, so that a disk keeps up.

    `features.__getitems__(indices)` returns a dict of arrays, one row per index:
        moments [n, 2C, h, w] float16, labels [n] int64, control [n, 7] int32, and with `targets` targets [n, T, F].
    `features.meta` is meta.json. ValueError if `path` is no complete cache of this version, or lacks the targets.
    """

    def __init__(self, path, targets=True):
        path = Path(path)
        if not (path / "meta.json").is_file():
            raise ValueError(f"{path}: no feature cache there (no meta.json); make one with extract_features.py")
        self.meta = json.loads((path / "meta.json").read_text())
        if self.meta.get("format_version") != FORMAT_VERSION:
            found = self.meta.get("format_version")
            raise ValueError(f"{path}: cache format {found}, this version reads {FORMAT_VERSION}; extract it again")
        if not self.meta["complete"]:
            raise ValueError(f"{path}: the cache is incomplete; run the same extract_features.py command again")
        names = ["moments", "labels", "control"] + ["targets"] * bool(targets)
        missing = [name for name in names if name not in self.meta["arrays"]]
        if missing:
            raise ValueError(f"{path}: the cache has no {missing[0]}; extract it with an --encoder")
        self.arrays = {}
        for name in names:
            try:
                array = np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}/{name}.npy: unreadable ({error}); extract the cache again") from None
            if list(array.shape) != self.meta["arrays"][name]["shape"]:
                raise ValueError(f"{path}/{name}.npy: shape {array.shape} is not that of meta.json; extract it again")
            self.arrays[name] = array if name == "labels" else array.reshape(-1, *array.shape[2:])
        self.views = self.meta["views"]

    def __len__(self):
        return self.meta["count"] * self.views

    def __getitems__(self, indices):
        indices = np.asarray(indices)
        order = np.argsort(indices)
        batch = {}
        for name, array in self.arrays.items():
            rows = indices // self.views if name == "labels" else indices
            batch[name] = np.empty((len(rows), *array.shape[1:]), array.dtype)
            batch[name][order] = array[rows[order]]
        return batch

    def __getitem__(self, index):
        return {name: rows[0] for name, rows in self.__getitems__([index]).items()}


# ----------------------------------------------------------------------------------------------------------------------
# The cache: writer


class Chunks(Dataset):
    """Item c: the views of images c * size .. (c+1) * size - 1 as uint8 [n, V, 3, S, S], their control rows [n, V, 7],
    and an error text, empty when all is well (an exception would cross the worker's process as a traceback)."""

    def __init__(self, images, size, image_size, flip):
        self.images, self.size, self.image_size, self.flip = images, size, image_size, flip

    def __len__(self):
        return -(-len(self.images) // self.size)

    def __getitem__(self, chunk):
        pixels, control = [], []
        for i in range(chunk * self.size, min((chunk + 1) * self.size, len(self.images))):
            try:
                image = self.images[i]
            except ValueError as error:
                return chunk, None, None, str(error)
            view = np.asarray(center_crop(image, self.image_size)).transpose(2, 0, 1)
            views = [view, view[:, :, ::-1]] if self.flip else [view]
            pixels.append(np.stack(views))
            control.append([(*center_box(image), flip) for flip in range(len(views))])
        return chunk, np.stack(pixels), np.array(control, dtype=np.int32), ""


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


def start_cache(out, meta, labels):
    """Create the files of a cache, or check that the unfinished one in `out` is the same. ValueError if it is not, or
    if the disk is too small. `progress.npy` [number of chunks] marks what is written; it is made last."""
    meta_file, arrays = out / "meta.json", meta["arrays"]
    if meta_file.exists():
        found = json.loads(meta_file.read_text()) | {"complete": False}
        different = [key for key in meta if found.get(key) != meta[key]]
        if different:
            key = different[0]
            here = f"{key} is {found.get(key)!r} there, {meta[key]!r} here"
            raise ValueError(f"--out {out} holds another cache: {here}; choose another --out")
        if (out / "progress.npy").exists() or json.loads(meta_file.read_text())["complete"]:
            return
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out} holds files that are no feature cache; choose another --out")
    size = sum(np.prod(a["shape"], dtype=np.int64) * np.dtype(a["dtype"]).itemsize for a in arrays.values())
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    print(f"{out}: {size / 1e9:.3f} GB for {meta['count']:,} images, {free / 1e9:.1f} GB free", flush=True)
    if size > free:
        raise ValueError(f"--out {out}: the cache needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    write_json(meta_file, meta)
    for name, array in arrays.items():
        open_memmap(out / f"{name}.npy", mode="w+", shape=tuple(array["shape"]), dtype=array["dtype"])
    np.save(out / "labels.npy", labels)
    open_memmap(out / "progress.npy", mode="w+", shape=(-(-meta["count"] // meta["chunk"]),), dtype=np.uint8)


def write_json(path, value):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


@torch.inference_mode()
def extract(out, meta, images, autoencoder, encoder, args, rank, world, device):
    """Encode this rank's share of the chunks that `progress.npy` does not mark as written."""
    done = np.load(out / "progress.npy", mmap_mode="r")
    todo = [chunk for chunk in np.flatnonzero(done == 0).tolist() if chunk % world == rank]
    chunks = Chunks(images, meta["chunk"], meta["image_size"], args.flip)
    loader = DataLoader(chunks, batch_size=None, sampler=todo, num_workers=args.workers)
    files = {name: ArrayFile(out / f"{name}.npy") for name in meta["arrays"] if name != "labels"}
    progress = ArrayFile(out / "progress.npy")
    bar = tqdm(total=meta["count"], initial=int(done.sum()) * meta["chunk"], unit="img", disable=rank > 0)
    for chunk, pixels, control, error in loader:
        if error:
            sys.exit(f"extract_features.py: {error}")
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


def describe(args, images, autoencoder, encoder):
    """The contents of meta.json."""
    count, views, side = len(images), 1 + args.flip, args.image_size // autoencoder.downsampling
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
        source=args.data,
        count=count,
        classes=images.classes,
        image_size=args.image_size,
        views=views,
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
        complete=False,
    )


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of class folders, .zip of one, or ADM .npz")
    parser.add_argument("--out", required=True, help="folder of the cache")
    parser.add_argument("--image-size", type=int, default=256, help="side of the square images, in pixels")
    parser.add_argument("--patch", type=int, default=2, help="patch size of the models to train: fixes the token grid")
    parser.add_argument("--vae", default="stabilityai/sd-vae-ft-mse", help="autoencoder, or none: pixels as latents")
    parser.add_argument("--encoder", default="vit_base_patch14_dinov2.lvd142m", help="targets: an encoder, hog or none")
    parser.add_argument("--target-dtype", choices=["float16", "int8"], default="float16", help="int8 halves the disk")
    parser.add_argument("--flip", action="store_true", help="also encode the mirrored image, as a second view")
    parser.add_argument("--batch-size", type=int, default=64, help="images encoded and marked as done together")
    workers = min(4, os.cpu_count())
    parser.add_argument("--workers", type=int, default=workers, help="processes that decode images, per rank")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=1))  # nothing but barriers, and ranks may be uneven
    try:
        images, autoencoder = Images(args.data), load_autoencoder(args.vae)
        step = autoencoder.downsampling * args.patch
        if min(args.image_size, args.patch, args.batch_size) < 1 or args.image_size % step:
            raise ValueError(f"--image-size {args.image_size} must be a multiple of downsampling x --patch = {step}")
        encoder = load_encoder(args.encoder, grid=args.image_size // step)
        out, meta = Path(args.out), describe(args, images, autoencoder, encoder)
        if rank == 0:
            start_cache(out, meta, images.labels)
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
        write_json(out / "meta.json", meta | {"complete": True})
        (out / "progress.npy").unlink(missing_ok=True)
        print(f"{out}: complete, {meta['count']:,} images of {len(meta['classes']):,} classes")


if __name__ == "__main__":
    main()
