"""Images -> cache: autoencoder latents, encoder targets, labels and crops, in .safetensors files.

    python extract_features.py --data tests/digits.npz --image-size 8 --patch 2 --vae none \\
        --encoder hog --out features/digits
    torchrun --nproc_per_node=8 extract_features.py --data imagenet/train --out features/imagenet256

--data is one of these:
    a folder of class folders      class/*.jpg, png, webp
    a folder with dataset.json     as StyleGAN, EDM2 and REPA write it; its labels are the classes
    a .zip of either
    an ADM .npz                    arr_0 uint8 [N, H, W, 3], arr_1 labels
Any number of processes share the work. Run a killed command again to continue it.

The cache (--out) is a folder that `CachedFeatures` reads. meta.json says what made it. Every 1,024
images (--shard) are one file, named after the number of the first: 00000000.safetensors and so on.
A file is written under another name and then renamed. Its tensors are:
    moments [n, V, 2C, h, w] float16    mean, then std (not log variance), of the latent
    targets [n, V, T, E] float16, int8  encoder tokens, T = (h / patch)^2; not with --encoder none
    labels  [n] int64                   index of the class
    control [n, V, 7] int32             h0, w0, top, left, h, w, flip: what the view shows
    index   [n] int64                   number of the image; only if --skip-bad left some out
An image has V views: the center crop, with --flip its mirror image, and with --crops K also K
random squares. A mirror image is encoded anew: mirroring a latent does not give its latent.
Targets and control belong to the view.

REPA's name -> timm's name. Tokens are taken after the final norm, those of MAE and CLIP before it:
    dinov2-vit-b     vit_base_patch14_dinov2.lvd142m
    dinov2reg-vit-b  vit_base_patch14_reg4_dinov2.lvd142m
    dinov1-vit-b     vit_base_patch16_224.dino
    mae-vit-l        vit_large_patch16_224.mae
    jepa-vit-h       vit_huge_patch14_gap_224.in1k_ijepa
    clip-vit-L       vit_large_patch14_clip_quickgelu_224.openai
MoCo v3 is not in timm. SigLIP (vit_large_patch16_siglip_256.webli) is not in REPA's code.

--vae takes any AutoencoderKL of diffusers, with the sizes and the scale in its config.json:
    stabilityai/sd-vae-ft-mse, -ema                      4 channels, 1/8 of the side
    stabilityai/sdxl-vae                                 4, 1/8
    stabilityai/stable-diffusion-3-medium-diffusers/vae  16, 1/8 (a folder inside the repository)
    black-forest-labs/FLUX.1-schnell/vae                 16, 1/8
    REPA-E/e2e-sdvae-hf                                  4, 1/8 (arXiv 2504.10483)
    REPA-E/e2e-vavae-hf, e2e-invae-hf                    32, 1/16: use --patch 1

Shapes in the right margin: N images, V views, C, H, W channels, height, width, T = G^2 tokens on a
G x G grid, E the width of a token.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import sys
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import huggingface_hub
import numpy as np
import safetensors.torch
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import Dataset, default_convert
from torchvision.transforms import Normalize
from tqdm import tqdm

import files
from files import COUNT, UserError, at_least_1, explaining, number

# ---- one batch: pixels -> latents and targets


def encode(pixels, autoencoder, encoder, target_dtype, numbers):
    """Returns what a cache holds of the views of n images, uint8 pixels [n, V, 3, S, S].

    The result is a dict of tensors on the CPU: moments, float16 [n, V, 2C, h, w], and, if there is
    an encoder, targets, float16 or int8 [n, V, T, E]. Raises UserError if a value is not finite;
    `numbers` are those of the images, for its message.
    """
    images = pixels.flatten(0, 1)                                    # [n V, 3, S, S]
    mean, std = autoencoder.encode(images.float() / 127.5 - 1)
    moments = torch.cat([mean, std], dim=1).half()                   # [n V, 2C, h, w]
    require_finite("moments", moments, numbers)
    encoded = {"moments": moments}
    if encoder.widths:
        targets = encoder(images)                                    # [n V, T, E]
        if target_dtype == "float16":
            targets = targets.half()  # may overflow, so it comes before the check
        require_finite("targets", targets, numbers)
        if target_dtype == "int8":
            targets = to_int8(targets)  # always finite, so it comes after the check
        encoded["targets"] = targets
    sizes = pixels.shape[:2]                                         # n, V
    return {name: values.unflatten(0, sizes).cpu() for name, values in encoded.items()}


def require_finite(name, values, numbers):
    if not values.isfinite().all():
        raise UserError(
            f"{name} of images {numbers[0]} to {numbers[-1]} are not finite;"
            " are the weights of the network damaged?"
        )


def to_int8(targets):
    """Scales each token of targets [..., E] to fill int8.

    This keeps its direction, and REPA's loss sees nothing else.
    """
    largest = targets.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return (targets / largest * 127).round().to(torch.int8)


# ---- the reader of a cache

TABLE_ROWS = 50  # images per class in control_table: 1.4 MB in a checkpoint of 1,000 classes


class CachedFeatures(Dataset):
    """Reads a cache, whose files are mapped into memory. Item i is view i % V of image i // V.

    meta: meta.json, and in addition `images`, the number of images that could be read, and
        `empty_classes`, a list of class indices
    labels: int64 [number of images]
    views: V
    names: the tensors that are read
    Raises UserError unless `path` holds a complete cache, with targets if they are wanted.
    """

    def __init__(self, path, targets=True, control=True):
        self.arguments = (path, targets, control)
        meta = read_meta(Path(path))
        self.meta = meta
        self.views = meta["views"]
        self.names = ["moments", "labels"]
        if control:
            self.names.append("control")
        if targets:
            self.names.append("targets")
            if not meta["target_widths"]:
                raise UserError(f"{path}: the cache has no targets; extract it with an --encoder")

        self.shards = []  # for each file a dict of arrays, with a row for each view of an image
        for numbers in chunks(range(meta["count"]), meta["shard"]):
            tensors = open_shard(shard_file(path, numbers.start), meta)
            labels = tensors["labels"].view(-1, 1)                   # [n, 1]
            tensors["labels"] = labels.expand(-1, self.views)        # [n, V], as all others
            arrays = {}
            for name in self.names:
                arrays[name] = tensors[name].flatten(0, 1).numpy()   # [n V, ...]
            self.shards.append(arrays)

        lengths = [len(shard["labels"]) for shard in self.shards]
        self.starts = np.cumsum(lengths) - lengths  # the first item of each file
        labels_of_items = np.concatenate([shard["labels"] for shard in self.shards])
        self.labels = labels_of_items[:: self.views]  # one per image
        meta["images"] = len(self.labels)
        all_labels = range(len(meta["classes"]))
        meta["empty_classes"] = np.setdiff1d(all_labels, self.labels).tolist()

    def loader(self, order, workers=None, device="cpu"):
        """Yields a batch on `device` for each array of indices in `order`.

        A batch is a dict of tensors: moments [N, 2C, h, w] float16, y [N] (the labels) and, where
        asked for, targets [N, T, E] and control [N, 7]. workers: processes that read ahead, by
        default 4 for targets and none for latents alone. Raises UserError if one of them dies.
        """
        if workers is None:
            workers = min(4, os.cpu_count()) if "targets" in self.names else 0
        batches = files.read_ahead(
            self,
            workers,
            batch_sampler=order,
            collate_fn=to_batch,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in batches:
            yield {name: value.to(device, non_blocking=True) for name, value in batch.items()}

    def latents(self, moments, vae_noise=0):
        """Returns a draw of the latents that models see, from moments [N, 2C, h, w].

        mean + std * vae_noise is a draw from the autoencoder's posterior if vae_noise [N, C, h, w]
        is normal, and its mean if it is 0. Models see it shifted and scaled.
        """
        mean, std = moments.float().chunk(2, dim=1)
        shift = per_channel(self.meta["latent_shift"], mean)
        scale = per_channel(self.meta["latent_scale"], mean)
        return (mean + std * vae_noise - shift) * scale

    def model_options(self, patch):
        """Returns keywords of a model for this cache: input_size, in_channels, num_classes.

        Raises UserError if its patches do not fit the latents, or its tokens the targets.
        """
        side = self.meta["latent_side"]
        grid = self.meta["grid"]
        if side % patch:
            fitting = [str(p) for p in range(1, side + 1) if side % p == 0]
            raise UserError(
                f"patch {patch} does not divide latents of {side} x {side}:"
                f" train with --model SIZE/P, where P is one of {', '.join(fitting)}"
            )
        if "targets" in self.names and side // patch != grid:
            raise UserError(
                f"the cache has {grid}x{grid} targets, the model has patch {patch}:"
                f" train with --model SIZE/{side // grid}, or extract with --patch {patch}"
            )
        return {
            "input_size": side,
            "in_channels": self.meta["latent_channels"],
            "num_classes": len(self.meta["classes"]),
        }

    def fixed_batch(self, count, device="cpu"):
        """Returns a batch as loader does, of the center crops of `count` images of all classes."""
        by_class = np.argsort(self.labels, kind="stable")
        total = len(by_class)
        chosen = by_class[spread(min(count, total), total)]
        center_crops = chosen * self.views  # view 0 of each image
        batch = to_batch(self.__getitems__(center_crops))
        return {name: value.to(device) for name, value in batch.items()}

    @cached_property
    def control_table(self):
        """int32 [classes, 50, 7]: control of 50 images of each class, centered and not mirrored.

        They are evenly spread over a class, and repeated if it has fewer. A class without images
        has zeros (no control). It is None if control is not read.
        """
        if "control" not in self.names:
            return None
        table = torch.zeros(len(self.meta["classes"]), TABLE_ROWS, 7, dtype=torch.int32)
        for label in np.unique(self.labels):
            members = np.flatnonzero(self.labels == label)
            chosen = members[spread(TABLE_ROWS, len(members))]
            center_crops = chosen * self.views
            rows = self.__getitems__(center_crops, ["control"])
            table[label] = torch.from_numpy(rows["control"])
        return table

    def __len__(self):
        return len(self.labels) * self.views

    def __getitems__(self, indices, names=None):
        """Returns a dict of arrays with a row for each index: `names`, or all that are read.

        A DataLoader calls this once for a batch, in place of __getitem__ for every item.
        """
        indices = np.asarray(indices)
        batch = {}
        for name in names or self.names:
            first = self.shards[0][name]
            shape = (len(indices), *first.shape[1:])
            batch[name] = np.empty(shape, first.dtype)

        shard_of = np.searchsorted(self.starts, indices, side="right") - 1
        row_of = indices - self.starts[shard_of]
        for i in np.argsort(indices):  # in the order of the files, which is the fastest to read
            shard = self.shards[shard_of[i]]
            for name, array in batch.items():
                array[i] = shard[name][row_of[i]]
        return batch

    def __reduce__(self):
        return CachedFeatures, self.arguments  # a spawned process opens the files again


def to_batch(arrays):
    """Converts what __getitems__ returns to tensors, with the name that training scripts use: y."""
    batch = default_convert(arrays)
    batch["y"] = batch.pop("labels")
    return batch


def spread(count, total):
    """Returns `count` indices that are evenly spread over `total` places."""
    return np.linspace(0, total - 1, count).astype(int)


# ---- extraction, from run() downwards


def run(args, rank, world, device):
    """Makes a cache: the work of one of `world` processes.

    Raises UserError for whatever the user has to repair.
    """
    source = Images(args.data, args.limit)
    autoencoder = load_autoencoder(args.vae, device)
    token_side = autoencoder.downsampling * args.patch  # in pixels of the image
    grid = args.image_size // token_side
    if args.image_size % token_side:
        below = max(grid, 1) * token_side
        raise UserError(
            f"--image-size {args.image_size} is not a multiple of {token_side};"
            f" try {below} or {below + token_side}"
        )
    encoder = Encoders(args.encoder, grid, args.encoder_weights, device)

    if rank == 0:
        meta = describe(args, source, autoencoder, encoder)
        num_bytes = 0
        for shape, dtype in tensor_specs(meta).values():
            num_bytes += len(source) * math.prod(shape) * dtype.itemsize
        files.start_folder(args.out, "meta.json", meta, num_bytes)
    files.barrier()
    missing = missing_files(args.out, rank, world)
    ignored = extract(args, missing, source, autoencoder, encoder, rank, device)
    if world > 1:
        dist.all_reduce(ignored)  # also waits for every process
    if rank == 0:
        rotated, transparent = ignored.tolist()
        report(args.out, rotated, transparent)


@torch.inference_mode()
def extract(args, missing, source, autoencoder, encoder, rank, device):
    """Writes the files of a cache that are `missing`: a list of their ranges of image numbers.

    Returns the numbers of images whose EXIF rotation and whose transparency were ignored.
    """
    batches = []
    for file_range in missing:
        batches += chunks(file_range, args.batch_size)
    loader = files.read_ahead(DecodedImages(source, args), args.workers, batch_sampler=batches)
    pause = 0.1 if sys.stderr.isatty() else 30  # seconds between two states of the bar
    bar = tqdm(
        total=sum(map(len, missing)),
        unit="img",
        disable=rank > 0 or not missing,
        mininterval=pause,
        miniters=1,
    )
    ignored = torch.zeros(2, dtype=torch.int64)  # EXIF rotations, transparency
    last_write = None
    with bar, ThreadPoolExecutor(1) as writer:  # writes a file while the next one is encoded
        for file_range in missing:
            parts = []
            for numbers in chunks(file_range, args.batch_size):
                loaded = next(loader)
                refuse_or_skip(source, numbers, loaded.pop("error"), args.skip_bad)
                ignored += loaded.pop("ignored").sum(0)
                pixels = loaded.pop("pixels").to(device)
                encoded = encode(pixels, autoencoder, encoder, args.target_dtype, numbers)
                parts.append(loaded | encoded)  # loaded: index, labels, control, readable
                bar.update(len(numbers))

            if last_write:
                last_write.result()  # waits, and raises the error of the file before
            path = shard_file(args.out, file_range.start)
            last_write = writer.submit(files.write_tensors, path, join(parts))
        if last_write:
            last_write.result()
    return ignored


class DecodedImages(Dataset):
    """Item i holds the views of image i and what belongs to it.

    If the image is unreadable, they are black and `error` says why. An exception would reach the
    user as the traceback of a loader process.
    """

    def __init__(self, source, args):
        self.source = source
        self.args = args

    def __getitem__(self, i):
        args = self.args
        rng = files.random_stream("crop", args.seed, i)
        options = (args.image_size, args.flip, args.crops, rng)
        error = ""
        ignored = [False, False]  # EXIF rotation, transparency
        try:
            image = self.source[i]
            pixels, control = image_views(to_rgb(image), *options)
            ignored = [is_rotated(image), image.has_transparency_data]
        except Exception as problem:  # decoders raise about ten types for a damaged file
            reason = files.first_sentence(problem)
            error = f"--data {args.data}: cannot read image {self.source.name(i)} ({reason})"
            pixels, control = image_views(Image.new("RGB", (1, 1)), *options)
        return {
            "index": i,
            "labels": self.source.labels[i],
            "pixels": pixels,
            "control": control,
            "ignored": np.array(ignored),
            "error": error,
            "readable": not error,
        }


def refuse_or_skip(source, numbers, errors, skip):
    """Raises UserError if an image is unreadable, unless `skip`: then it says so.

    It always raises UserError if the source has disappeared.
    """
    for i, error in zip(numbers, errors, strict=True):
        if not error:
            continue
        if source.is_gone(i):
            raise UserError(
                f"--data {source.path}: is not there any more;"
                " run the same command again when it is back"
            )
        if not skip:
            raise UserError(
                f"{error}; pass --skip-bad, or repair it and extract into another --out"
            )
        tqdm.write(f"skipped: {error}", file=sys.stderr)


def join(parts):
    """Concatenates the batches of a file, and leaves out its unreadable images.

    `index`, the numbers of the images, stays only if some were left out.
    """
    tensors = {}
    for name in parts[0]:
        tensors[name] = torch.cat([part[name] for part in parts])
    readable = tensors.pop("readable")
    if readable.all():
        del tensors["index"]
        return tensors
    if not readable.any():
        raise UserError(
            f"none of {len(readable)} images in a row is readable; is this the right --data?"
        )
    return {name: values[readable] for name, values in tensors.items()}


def chunks(numbers, size):
    """Returns the parts of a range or list, `size` numbers each; the last one may be shorter."""
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]


def report(out, rotated, transparent):
    """Opens the cache as a trainer will, and says what it holds. Raises UserError if incomplete."""
    meta = CachedFeatures(out, targets=False).meta
    names = ", ".join(map(repr, meta["classes"][:3]))
    if len(meta["classes"]) > 3:
        names += ", ..."
    classes = f"{len(meta['classes']):,} classes"
    line = f"{out}: complete, {meta['images']:,} images of {classes}: {names}"
    notes = {
        "unreadable images were left out": meta["count"] - meta["images"],
        f"of {classes} hold no image": len(meta["empty_classes"]),
        "images carry an EXIF rotation, which is ignored as in ADM": rotated,
        "images are transparent, which is ignored as in ADM": transparent,
    }
    for note, count in notes.items():
        if count:
            line += f"; {count:,} {note}"
    print(line)


def extract_digits(out, rank, world, device):
    """Makes the cache of tests/digits.npz for --digits, unless `out` holds a complete one."""
    try:
        CachedFeatures(out)
        return  # it is complete
    except UserError:
        pass  # it is not, so it is made
    digits = Path(__file__).parent / "tests/digits.npz"
    options = "--image-size 8 --patch 2 --vae none --encoder hog --workers 0".split()
    args = parse_args(["--data", str(digits), "--out", str(out), *options])
    run(args, rank, world, device)


# ---- encoders: pixels -> one target vector per token

OFFLINE = "HF_HUB_OFFLINE=1 skips the wait"  # ends the message of a failed download


class Encoders:
    """Encoders side by side: uint8 images [N, 3, H, W] -> tokens [N, T, E], E = sum of `widths`.

    names: none, or hog and names of timm ViTs with commas between. weight_files: one for each of
    these ViTs, with commas between. The T tokens form a grid x grid raster.

    To add an encoder, write a class with a list `widths` (empty: no tokens) and the method
    __call__(uint8 images [N, 3, H, W]) -> tokens [N, T, E].
    """

    def __init__(self, names, grid, weight_files=None, device="cpu"):
        names = [] if names == "none" else names.split(",")
        num_vits = len(names) - names.count("hog")
        paths = weight_files.split(",") if weight_files else [None] * num_vits
        if len(paths) != num_vits:
            raise UserError(
                f"--encoder-weights: {len(paths)} files for {num_vits} encoders with weights;"
                " name one for each"
            )
        self.encoders = []
        self.widths = []
        for name in names:
            if name == "hog":
                encoder = HOG(grid)
            else:
                encoder = ViT(name, grid, paths.pop(0), device)
            self.encoders.append(encoder)
            self.widths += encoder.widths

    def __call__(self, images):
        return torch.cat([encoder(images) for encoder in self.encoders], dim=-1)


class HOG:
    """Histograms of oriented gradients (Dalal and Triggs, 2005), a vector for each cell of a grid.

    Classical spatial features give part of REPA's gain (arXiv 2512.10794). They need no weights and
    suit any image size. A vector holds the histograms of the cell and of its eight neighbours and a
    constant, and has length 1. The constant gives a flat image a direction: its gradients are 0.
    """

    bins = 9
    constant = 0.02

    def __init__(self, grid):
        self.grid = grid
        self.widths = [3 * 3 * self.bins + 1]

    def __call__(self, images):                                      # [N, 3, H, W]
        grey = images.float().mean(1, keepdim=True) / 255
        grey = F.pad(grey, [1] * 4, mode="replicate")
        dx = (grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]) / 2        # [N, 1, H, W]
        dy = (grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]) / 2
        angle = torch.atan2(dy, dx).remainder(torch.pi)
        position = angle / torch.pi * self.bins  # in [0, bins]

        # each pixel votes for the two nearest of the bins, which are periodic
        center = torch.arange(self.bins, device=images.device).view(-1, 1, 1)
        distance = (position - center).abs()                         # [N, bins, H, W]
        distance = torch.minimum(distance, self.bins - distance)
        votes = torch.hypot(dx, dy) * (1 - distance).clamp(min=0)

        # the vector of a cell: its own histogram, those of its neighbours, and the constant
        cells = F.avg_pool2d(votes, images.shape[-1] // self.grid)   # [N, bins, G, G]
        cells = F.pad(cells, [1] * 4, mode="replicate")
        vectors = F.unfold(cells, 3).mT                              # [N, T, 9 bins]
        vectors = F.pad(vectors, (0, 1), value=self.constant)
        return F.normalize(vectors, dim=-1)                          # [N, T, E]


class ViT:
    """Patch tokens of a frozen timm ViT on a grid x grid raster, as in REPA (arXiv 2410.06940).

    The image is normalised as in the encoder's training, then scaled to grid x patch pixels
    (bicubic, no antialias). timm resamples the position table once (bicubic, antialias). Class and
    register tokens are dropped. Raises UserError if the weights cannot be had.
    """

    def __init__(self, name, grid, file, device):
        self.side = grid * patch_size(name)
        model = load_vit(name, self.side, file)
        self.model = model.to(device).eval().requires_grad_(False)
        self.widths = [self.model.embed_dim]
        self.final_norm = not (".mae" in name or "_clip_" in name)  # as in REPA's code
        config = timm.data.resolve_model_data_config(self.model)
        self.normalize = Normalize(config["mean"], config["std"])
        # if the tokens do not form the grid, this fails now and not at the first batch
        with explaining_vit(name):
            black = torch.zeros(1, 3, 8, 8, device=device)
            self(black).view(grid**2, self.model.embed_dim)

    def __call__(self, images):                                      # [N, 3, H, W]
        x = self.normalize(images.float() / 255)
        x = F.interpolate(x, self.side, mode="bicubic")
        with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
            [tokens] = self.model.forward_intermediates(
                x,
                indices=1,  # of the last block only
                norm=self.final_norm,
                output_fmt="NLC",
                intermediates_only=True,
            )
        return tokens.float()                                        # [N, T, E]


def load_vit(name, side, file):
    """Returns a timm ViT for images of `side` pixels, with the hub's weights or those of a file."""
    options = {"pretrained": True, "num_classes": 0, "img_size": side}
    if file is None:
        remedy = f"pass --encoder-weights FILE; {OFFLINE}"
        with explaining(f"--encoder {name}: its weights cannot be downloaded", remedy):
            return timm.create_model(name, **options)

    weights = read_weights(file)
    with explaining(f"--encoder-weights {file}: not weights of {name}", "pass its own"):
        overlay = {"state_dict": dict(weights)}
        model = timm.create_model(name, pretrained_cfg_overlay=overlay, **options)
        # timm leaves random what the file lacks, and does not say so. `convert` gives the file's
        # tensors timm's names; every module of models has its own.
        convert = sys.modules[type(model).__module__].checkpoint_filter_fn
        missing = model.state_dict().keys() - convert(weights, model).keys()
        if missing:
            raise ValueError(f"{min(missing)} is missing")
        return model


def patch_size(name):
    """Returns the patch size of a timm ViT.

    Raises UserError if timm has no ViT of this name, or if the weights were trained with QuickGELU
    and the name is that of a CLIP with GELU.
    """
    quick = name.replace("_clip_", "_clip_quickgelu_")
    if quick != name and quick in timm.list_models(pretrained=True):
        raise UserError(f"--encoder {name}: these weights need QuickGELU; pass {quick}")
    with explaining_vit(name), torch.device("meta"):  # which has no weights
        return timm.create_model(name).patch_embed.patch_size[0]


def explaining_vit(name):
    """Returns a context in which any error becomes a UserError: timm has no such ViT."""
    remedy = "see --help and timm.list_models('vit*')"
    return explaining(f"--encoder {name}: not a ViT that timm knows", remedy)


# ---- views of an image


def image_views(image, size, flip, crops, rng):
    """Returns the views of an RGB image, uint8 [V, 3, size, size], and their control, int32 [V, 7].

    Random squares have 0.4 to 1 times the area of the centered one (arXiv 2411.03177; 0.4 is ours).
    With `flip`, half of them are mirrored. Boxes are in pixels of the image before it is mirrored.
    """
    w0, h0 = image.size
    short = min(w0, h0)
    top = (h0 - short) // 2
    left = (w0 - short) // 2
    center = center_crop(image, size)
    views = [center]
    control = [(h0, w0, top, left, short, short, False)]
    if flip:
        views.append(ImageOps.mirror(center))
        control.append((h0, w0, top, left, short, short, True))
    for _ in range(crops):
        side = round(short * rng.uniform(0.4, 1) ** 0.5)
        top = rng.integers(h0 - side, endpoint=True)
        left = rng.integers(w0 - side, endpoint=True)
        square = image.crop((left, top, left + side, top + side))
        view = center_crop(square, size)  # only scales a square
        mirrored = flip and rng.random() < 0.5
        views.append(ImageOps.mirror(view) if mirrored else view)
        control.append((h0, w0, top, left, side, side, mirrored))
    pixels = np.stack(views)                                         # [V, size, size, 3]
    return pixels.transpose(0, 3, 1, 2), np.array(control, dtype=np.int32)


MOST_PIXELS = 2**28  # a narrow image that would be scaled to more is refused


def center_crop(image, size):
    """Returns the centered `size` x `size` square of a PIL image, as ADM does (arXiv 2105.05233).

    It halves the image with BOX while the short side is at least 2 size, scales that side to `size`
    with BICUBIC, and crops. Raises ValueError if a narrow image would become larger than memory.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width = round(image.width * scale)
    height = round(image.height * scale)
    if width * height > MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels become {width} x {height}")
    image = image.resize((width, height), Image.BICUBIC)
    left = (width - size) // 2
    top = (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_rgb(image):
    """Returns an RGB image, as PIL converts it, but with 16-bit grey scaled, which PIL would clip.

    Raises ValueError for 32 bits per pixel, whose range is unknown.
    """
    # older versions of Pillow open a 16-bit PNG in mode I
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = np.asarray(image, np.int32)
        grey = (grey + 128) // 257  # 65535 becomes 255
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode} has 32 bits per pixel, save it with 8 or 16")
    return image.convert("RGB")


def is_rotated(image):
    """Returns whether EXIF data say that the image is to be turned; damaged data say nothing."""
    with contextlib.suppress(Exception):
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return False


# ---- autoencoders: pixels in [-1, 1] <-> latents
#
# The networks are written out here to avoid a dependency on diffusers. Their modules have the names
# that it uses, so that its weight files load.


class Pixels:
    """`--vae none`: the pixels are the latents, mean = pixel, standard deviation = 0."""

    channels = 3
    downsampling = 1
    scale = 1.0
    shift = 0.0

    def encode(self, images):                                        # [N, 3, H, W]
        return images, torch.zeros_like(images)

    def decode(self, latents):
        return latents


STABLE_DIFFUSION = {  # its config.json; an entry that another config.json lacks is taken from here
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "shift_factor": 0.0,
}
UNDERSTOOD = {  # values that are implemented, see files.fits
    "_class_name": {"AutoencoderKL"},
    "act_fn": {"silu"},
    "down_block_types": [{"DownEncoderBlock2D", "AttnDownEncoderBlock2D"}],
    "up_block_types": [{"UpDecoderBlock2D", "AttnUpDecoderBlock2D"}],
    "scaling_factor": files.PER_CHANNEL,
    "shift_factor": files.PER_CHANNEL,
}


class AutoencoderKL(nn.Module):
    """The autoencoder of latent diffusion (arXiv 2112.10752): images <-> smaller latents.

    entries: those of diffusers' config.json. Where one is missing, Stable Diffusion's holds. Raises
    ValueError if one is not implemented. sd-vae-ft-mse and sd-vae-ft-ema have the same encoder, and
    different decoders.
    """

    pixels_at_once = 16 * 256 * 256  # in_slices bounds the memory by this: 512 px fit a small GPU

    def __init__(self, entries=None):
        super().__init__()
        config = complete_config(entries or {})
        widths = config["block_out_channels"]
        depth = config["layers_per_block"]
        groups = config["norm_num_groups"]
        num_attentions = int(config["mid_block_add_attention"])  # in the middle: one or none
        first = widths[0]
        last = widths[-1]
        self.channels = config["latent_channels"]
        self.downsampling = 2 ** (len(widths) - 1)
        self.scale = config["scaling_factor"]
        self.shift = config["shift_factor"]

        self.encoder = sequence(
            conv_in=conv3x3(3, first),
            down_blocks=levels(widths, config["down_block_types"], depth, groups),
            mid_block=Level(last, last, 2, num_attentions, groups),
            conv_norm_out=group_norm(last, groups),
            act=nn.SiLU(),
            conv_out=conv3x3(last, 2 * self.channels),
        )
        self.quant_conv = conv1x1(2 * self.channels, config["use_quant_conv"])
        self.decoder = sequence(
            conv_in=conv3x3(self.channels, last),
            mid_block=Level(last, last, 2, num_attentions, groups),
            up_blocks=levels(widths[::-1], config["up_block_types"], depth + 1, groups),
            conv_norm_out=group_norm(first, groups),
            act=nn.SiLU(),
            conv_out=conv3x3(first, 3),
        )
        self.post_quant_conv = conv1x1(self.channels, config["use_post_quant_conv"])
        self.eval().requires_grad_(False)

    def encode(self, images):
        """Images [N, 3, H, W] in [-1, 1] -> mean and std [N, C, h, w], not scaled."""
        networks = nn.Sequential(self.encoder, self.quant_conv)
        moments = self.in_slices(networks, images, images.shape[2:].numel())
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(-30, 20))

    def decode(self, latents):
        """Latents [N, C, h, w], not scaled -> images [N, 3, H, W], about in [-1, 1]."""
        networks = nn.Sequential(self.post_quant_conv, self.decoder)
        pixels = latents.shape[2:].numel() * self.downsampling**2
        return self.in_slices(networks, latents, pixels)

    def in_slices(self, networks, inputs, pixels):
        """Applies networks to a few inputs at a time. pixels: how many one image has."""
        slices = inputs.split(max(1, self.pixels_at_once // pixels))
        return torch.cat([networks(part) for part in slices])


def per_channel(value, latents):
    """Returns a scale or shift, a number or a list of C, in a form that fits [N, C, h, w]."""
    if isinstance(value, list):
        value = torch.tensor(value).view(-1, 1, 1).to(latents, non_blocking=True)
    return value


def complete_config(entries):
    """Returns all entries that an AutoencoderKL needs, from those of its config.json.

    Raises ValueError if one is not implemented, or if the scale of the latents is not known.
    """
    config = STABLE_DIFFUSION | entries
    config["shift_factor"] = config["shift_factor"] or 0.0  # null is 0
    if config.get("latents_std"):
        # official code: a pipeline of diffusers also multiplies by scaling_factor, REPA-E's code
        # does not / here: as in REPA-E's, because models expect a standard deviation near 1
        config["shift_factor"] = config["latents_mean"]
        config["scaling_factor"] = [1 / std for std in config["latents_std"]]
    elif STABLE_DIFFUSION.items() <= config.items():  # it is Stable Diffusion's
        config.setdefault("scaling_factor", 0.18215)  # its config.json is older than this entry
    files.expect(config, UNDERSTOOD)
    return config


def sequence(**modules):
    """Returns an nn.Sequential of modules with names: those in diffusers' weight files."""
    return nn.Sequential(OrderedDict(modules))


def levels(widths, types, depth, groups):
    """Returns one Level per width, each with `depth` residual blocks. types: as in config.json.

    Every level but the last halves or doubles the resolution, as its type says.
    """
    network = nn.Sequential()
    c_in = widths[0]
    for c_out, block_type in zip(widths, types, strict=True):
        num_attentions = depth if "Attn" in block_type else 0
        level = Level(c_in, c_out, depth, num_attentions, groups)
        if len(network) < len(widths) - 1:
            if "Down" in block_type:
                pad = nn.ZeroPad2d((0, 1, 0, 1))
                conv = nn.Conv2d(c_out, c_out, 3, stride=2)
                level.downsamplers.append(sequence(pad=pad, conv=conv))
            else:
                nearest = nn.Upsample(scale_factor=2.0)
                level.upsamplers.append(sequence(upsample=nearest, conv=conv3x3(c_out, c_out)))
        network.append(level)
        c_in = c_out
    return network


class Level(nn.Module):
    """Residual blocks, and then what changes the resolution, in downsamplers or upsamplers.

    Self-attention follows each of the first `num_attentions` residual blocks.
    """

    def __init__(self, c_in, c_out, depth, num_attentions, groups):
        super().__init__()
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()
        for i in range(depth):
            self.resnets.append(ResnetBlock(c_in, c_out, groups))
            c_in = c_out
            if i < num_attentions:
                self.attentions.append(AttentionBlock(c_out, groups))
        self.downsamplers = nn.Sequential()
        self.upsamplers = nn.Sequential()

    def forward(self, x):
        for i, resnet in enumerate(self.resnets):
            x = resnet(x)
            if i < len(self.attentions):
                x = self.attentions[i](x)
        return self.upsamplers(self.downsamplers(x))


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = group_norm(c_in, groups)
        self.conv1 = conv3x3(c_in, c_out)
        self.norm2 = group_norm(c_out, groups)
        self.conv2 = conv3x3(c_out, c_out)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class AttentionBlock(nn.Module):
    """Self-attention over all positions, with one head."""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = group_norm(c, groups)
        self.to_q = nn.Linear(c, c)
        self.to_k = nn.Linear(c, c)
        self.to_v = nn.Linear(c, c)
        self.to_out = nn.Sequential(nn.Linear(c, c))  # to_out.0 in weight files

    def forward(self, x):
        h = self.group_norm(x).flatten(2).mT.unsqueeze(1)            # [N, 1, H W, C]
        q = self.to_q(h)
        k = self.to_k(h)
        v = self.to_v(h)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.to_out(h).squeeze(1).mT.reshape(x.shape)


def group_norm(channels, groups):
    return nn.GroupNorm(groups, channels, eps=1e-6)


def conv3x3(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def conv1x1(c, wanted):
    return nn.Conv2d(c, c, 1) if wanted else nn.Identity()


# ---- weights of an autoencoder


def load_autoencoder(name, device="cpu"):
    """Returns the autoencoder of a hub repository, a folder or a file, or Pixels for the name none.

    A folder of a repository may follow its name: owner/name/vae. Without a config.json beside them,
    the weights are Stable Diffusion's. The result has channels, downsampling, scale, shift, encode
    and decode. Models see (latent - shift) * scale, where both are a number or a list with one for
    each channel. Raises UserError if the weights cannot be had, or do not fit.
    """
    if name == "none":
        return Pixels()
    wanted = "diffusion_pytorch_model.safetensors"
    path = Path(name)
    if path.is_dir():
        path /= wanted
    elif not path.is_file():
        remedy = f"pass a folder or file with its {wanted}, or --vae none for pixels; {OFFLINE}"
        with explaining(f"--vae {name}: cannot be downloaded", remedy):
            parts = name.split("/")
            repository = "/".join(parts[:2])
            folder = "/".join([*parts[2:], ""])  # with a slash at its end, unless it is ""
            huggingface_hub.hf_hub_download(repository, folder + "config.json")
            path = Path(huggingface_hub.hf_hub_download(repository, folder + wanted))

    entries = {}
    config_file = path.with_name("config.json")
    remedy = "pass an AutoencoderKL of diffusers with all its entries"
    with explaining(f"--vae {name}: config.json does not describe a known autoencoder", remedy):
        if config_file.exists():
            entries = json.loads(config_file.read_text())
        autoencoder = AutoencoderKL(entries)

    weights = read_weights(path)
    remedy = "pass the folder that has their config.json, too, or those of Stable Diffusion"
    with explaining(f"--vae {name}: weights of another architecture", remedy):
        autoencoder.load_state_dict(modern_names(weights))
    if torch.device(device).type == "cuda":
        torch.backends.cudnn.benchmark = True  # most batches have one shape
        autoencoder.to(memory_format=torch.channels_last)
    return autoencoder.to(device)


def modern_names(weights):
    """Returns weights as diffusers names them today.

    Older files have other names for the layers of the attention, stored as 1x1 convolutions.
    """
    renamed = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    state = {}
    for key, value in weights.items():
        if ".attentions." in key:
            for old, new in renamed.items():
                key = key.replace(f".{old}.", f".{new}.")
            value = value.squeeze()
        state[key] = value
    return state


def read_weights(path):
    """Returns the dict in a .safetensors or PyTorch file. Raises UserError if there is none."""
    with explaining(f"{path}: not readable as weights", "copy or download it again"):
        if str(path).endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))


# ---- the files of a cache

FORMAT_VERSION = 2
META = {  # the entries of meta.json that CachedFeatures needs, and their kinds, see files.fits
    **files.DATA,
    "count": COUNT,
    "shard": COUNT,
    "views": COUNT,
    "latent_channels": COUNT,
    "latent_side": COUNT,
    "grid": COUNT,
    "target_widths": [int],
    "target_dtype": str,
}


def describe(args, source, autoencoder, encoder):
    """Returns the contents of meta.json."""
    side = args.image_size // autoencoder.downsampling
    encoder_digest = None
    if args.encoder_weights:
        encoder_digest = [files.file_hash(path) for path in args.encoder_weights.split(",")]
    return {
        "format_version": FORMAT_VERSION,
        "source": str(Path(args.data)),
        "source_digest": source.digest(),
        "limit": args.limit,
        "count": len(source),
        "shard": args.shard,
        "classes": source.classes,
        "image_size": args.image_size,
        "flip": args.flip,
        "crops": args.crops,
        "seed": args.seed,
        "views": 1 + args.flip + args.crops,
        "vae": args.vae,
        "latent_channels": autoencoder.channels,
        "latent_side": side,
        "latent_scale": autoencoder.scale,
        "latent_shift": autoencoder.shift,
        "encoder": args.encoder,
        "encoder_digest": encoder_digest,
        "grid": side // args.patch,
        "target_widths": encoder.widths,
        "target_dtype": args.target_dtype,
    }


def tensor_specs(meta):
    """Returns the tensors of a cache, a dict: name -> its shape for one image, and its dtype."""
    views = meta["views"]
    side = meta["latent_side"]
    specs = {
        "moments": ([views, 2 * meta["latent_channels"], side, side], torch.float16),
        "labels": ([], torch.int64),
        "control": ([views, 7], torch.int32),
    }
    if meta["target_widths"]:
        shape = [views, meta["grid"] ** 2, sum(meta["target_widths"])]
        specs["targets"] = (shape, getattr(torch, meta["target_dtype"]))
    return specs


def read_meta(folder):
    """Returns the dict in meta.json. Raises UserError if there is no cache of this format."""
    file = folder / "meta.json"
    if not file.is_file():
        remedy = "make one with extract_features.py"
        for below in folder.glob("*/meta.json"):
            remedy = f"did you mean {below.parent}?"
        raise UserError(f"{folder}: no feature cache there; {remedy}")
    version = files.read_json(file).get("format_version")  # first: other formats lack other entries
    if version != FORMAT_VERSION:
        raise UserError(
            f"{folder}: cache format {version!r:.60}, not {FORMAT_VERSION}; extract it again"
        )
    return files.read_json(file, META)


def shard_file(folder, start):
    """Returns the path of the file of a cache that begins with image `start`."""
    return Path(folder, f"{start:08d}.safetensors")


def open_shard(path, meta):
    """Returns the dict of tensors in a file of a cache, mapped into memory.

    Raises UserError if it is missing or damaged.
    """
    remedy = "run the same extraction again"
    if not path.exists():
        raise UserError(f"{path.parent}: the cache is incomplete, {path.name} is missing; {remedy}")
    with explaining(f"{path}: damaged", remedy):
        tensors = safetensors.torch.load_file(path)
        for name, (shape, dtype) in tensor_specs(meta).items():
            values = tensors[name]
            if list(values.shape[1:]) != shape or values.dtype != dtype:
                raise ValueError(f"{name} is {values.dtype} {list(values.shape)}")
        classes = len(meta["classes"])
        if np.setdiff1d(tensors["labels"], range(classes)).size:
            raise ValueError(f"labels that are none of {classes} classes")
    return tensors


def missing_files(folder, rank, world):
    """Returns what this process has to make: for each missing file, its range of image numbers.

    Damaged files are deleted, and so they are missing.
    """
    meta = read_meta(folder)
    missing = []
    for numbers in chunks(range(meta["count"]), meta["shard"])[rank::world]:
        path = shard_file(folder, numbers.start)
        try:
            open_shard(path, meta)
        except UserError:
            missing.append(numbers)
            if path.exists():
                print(f"{path}: damaged; it is made again", file=sys.stderr)
                path.unlink()
    return missing


# ---- where images come from

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
OTHER_IMAGES = ".avif .bmp .gif .heic .heif .jfif .jp2 .jxl .pgm .pnm .ppm .tga .tif .tiff"
SPLITS = "train training val valid validation test"  # a source with no other folders is refused


class Images:
    """The images of a source, one of those at the top of this file.

    images[i] is a PIL image as it is stored, and labels[i] its class. `classes` are the names of
    the classes. `names` are the files of all images. With `limit`, only so many of them are
    `chosen`, evenly spread, and i counts these. Raises UserError for a source that is not usable.
    """

    def __init__(self, path, limit=None):
        self.path = Path(path)
        self.is_folder = self.path.is_dir()
        self.pixels = None
        self.archive = None  # `read` opens a .zip when it first needs it
        if not (self.is_folder or self.path.is_file()):
            raise UserError(f"--data {path}: no such file or folder")
        if self.path.suffix.lower() == ".npz" and not self.is_folder:
            self.pixels, labels, self.classes = read_npz(self.path)
            self.names = range(len(labels))
        else:
            labels, self.classes = self.list_files()
        limit = limit or len(labels)
        if limit > len(labels):
            raise UserError(f"--limit {limit}: the source has {len(labels)} images")
        self.chosen = spread(limit, len(labels))
        self.labels = labels[self.chosen]
        self.archive = None  # loader processes are copies of this one, and must not share a file

    def list_files(self):
        """Sets `names`, of a .zip also `root`. Returns the labels of all images and classes."""
        if self.is_folder:
            listed = list(list_folder(self.path))
        else:
            self.root, listed = list_zip(self.path)
        self.names = with_suffix(listed, IMAGES)
        others = with_suffix(listed, tuple(OTHER_IMAGES.split()))
        if others:
            print(
                f"--data {self.path}: {len(others)} images are left out, such as {others[0]};"
                f" only {', '.join(IMAGES)} are read"
            )
        if not self.names:
            raise UserError(f"--data {self.path}: it holds no image ({', '.join(IMAGES)})")
        if "dataset.json" in listed:
            return self.read_dataset_json()
        return class_folders(self.path, self.names, listed)

    def read_dataset_json(self):
        """Returns labels and classes from {"labels": [["00000/img00000000.png", 6], ...]}.

        If "labels" is null, all images are of one class.
        """
        what = f"--data {self.path}: dataset.json does not fit the images"
        with explaining(what, "make it again, or remove it to use the folders as classes"):
            entries = json.loads(self.read("dataset.json"))["labels"]
            if entries is None:
                return number_classes(np.zeros(len(self.names), int))
            labels = dict(entries)
            unpaired = labels.keys() ^ self.names
            if unpaired:
                raise ValueError(f"{min(unpaired)} is not listed, or not there")
            return number_classes(np.array([labels[name] for name in self.names]))

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, i):
        if self.pixels is not None:
            return Image.fromarray(self.pixels[self.chosen[i]])
        return Image.open(io.BytesIO(self.read(self.name(i))))

    def name(self, i):
        return self.names[self.chosen[i]]

    def read(self, name):
        """Returns the bytes of a file in the folder or .zip."""
        if self.is_folder:
            file = self.path / name
            if not file.is_file():  # reading a pipe would wait for ever
                raise ValueError("not a file")
            return file.read_bytes()
        if self.archive is None:
            self.archive = zipfile.ZipFile(self.path)
        return self.archive.read(self.root + name)  # verifies the checksum

    def is_gone(self, i):
        """Returns whether the source, or the folder of image i, has disappeared."""
        path = self.path
        if self.is_folder:
            path = (self.path / self.name(i)).parent
        return not path.exists()

    def digest(self):
        """Returns 16 digits that change with the names and sizes of the files, or the labels."""
        if self.is_folder:
            entries = [(name, os.path.getsize(self.path / name)) for name in self.names]
        else:
            with zipfile.ZipFile(self.path) as archive:  # an .npz is one, too
                entries = [(m.filename, m.file_size, m.CRC) for m in archive.infolist()]
        content = repr((entries, self.labels.tolist()))
        return hashlib.sha256(content.encode(errors="backslashreplace")).hexdigest()[:16]


def list_folder(folder, above="", parents=()):
    """Yields what lies below a folder, with `above` before its name. Links are followed.

    Folders have a slash at the end. parents: real paths, to which a link must not lead back.
    """
    real = os.path.realpath(folder)
    if real in parents:
        return
    for entry in os.scandir(folder):
        if is_hidden(entry.name):
            continue
        name = above + entry.name
        if entry.is_dir():
            name += "/"
            yield from list_folder(entry.path, name, (*parents, real))
        yield name


def list_zip(path):
    """Returns the root of a .zip, and what lies below it.

    The root is the folder around everything: "a/b/", or "" if there is none.
    """
    expected = "expected a folder or .zip of class folders, or an ADM .npz"
    with explaining(f"--data {path}: not a readable .zip", expected):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        names = [name for name in names if not any(map(is_hidden, name.split("/")))]
        # a/b/cat/1.png is in the class folder a/b/cat: the root is what all a/b have in common
        images = with_suffix(names, IMAGES)
        above = {os.path.dirname(os.path.dirname(name)) for name in images}
        shared = os.path.commonpath(above or [""])
        root = os.path.join(shared, "")  # with a slash at its end, unless it is ""
    return root, [name.removeprefix(root) for name in names if name.startswith(root)]


def is_hidden(name):
    return name.startswith(".") or name == "__MACOSX"


def with_suffix(names, suffixes):
    """Returns those of the names that end in one of the suffixes, sorted folder by folder."""
    chosen = [name for name in names if name.lower().endswith(suffixes)]
    return sorted(chosen, key=lambda name: name.split("/"))


def class_folders(source, names, listed):
    """Returns labels and classes of images called class/file.

    names: those of the images; listed: those of other files and of folders, too. Raises UserError
    for images at other depths, for splits such as train and val, and for empty classes.
    """
    deep = [name for name in names if name.count("/") > 1]
    if deep:
        hint = pass_folder(source, Path(deep[0]).parent.parent)
        raise UserError(f"--data {source}: {deep[0]} lies deeper than class/file; {hint}")
    labels = []
    label_of = {}  # class -> label, in order, because the images are sorted
    for name in names:
        folder = os.path.dirname(name)
        if not folder:
            raise UserError(
                f"--data {source}: {name} is in no class folder;"
                " make one, or pass the folder above"
            )
        labels.append(label_of.setdefault(folder, len(label_of)))

    classes = list(label_of)
    if set(classes).issubset(SPLITS.split()):
        hint = pass_folder(source, classes[0])
        raise UserError(f"--data {source}: {', '.join(classes)} are no class folders; {hint}")
    folders = {name.split("/")[0] for name in listed if "/" in name}
    empty = folders.difference(classes)
    if empty:
        raise UserError(
            f"--data {source}: class folder {min(empty)!r} holds no image"
            f" ({', '.join(IMAGES)}); move it elsewhere if it is no class"
        )
    return np.array(labels), classes


def pass_folder(source, folder):
    """Returns the advice to pass one folder of a source."""
    if source.is_dir():
        return f"did you mean {source / folder}?"
    return f"did you mean its folder {folder}? Then pack that folder"


def read_npz(path):
    """Returns pixels uint8 [N, H, W, 3], labels and classes of an ADM .npz."""
    expected = "it needs arr_0, uint8 [N, H, W, 3], and arr_1, N class indices >= 0"
    with explaining(f"--data {path}: no ADM .npz", expected), np.load(path) as archive:
        pixels = archive["arr_0"]  # reading it verifies the checksum
        is_rgb = pixels.ndim == 4 and pixels.shape[3] == 3
        if pixels.dtype != np.uint8 or not is_rgb or pixels.size == 0:
            raise ValueError(f"arr_0 is {pixels.dtype} {list(pixels.shape)}")
        labels = archive.get("arr_1", np.zeros(len(pixels), int))
        if labels.shape != pixels.shape[:1]:
            raise ValueError(f"arr_1 is {labels.dtype} {list(labels.shape)}")
        return pixels, *number_classes(labels)


def number_classes(labels):
    """Returns labels, int64 [N], and the names of the classes, a list of texts.

    If all labels are below 100,000, they stay as they are, and every number up to the largest is a
    class. Otherwise only the numbers that occur are classes, and the labels count these. Raises
    ValueError unless the labels are integers that are not negative.
    """
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or labels.min() < 0:
        raise ValueError(f"the labels are {labels.dtype} {list(labels.shape)} from {labels.min()}")
    if labels.max() < 100_000:
        names = range(int(labels.max()) + 1)
        labels = labels.astype(np.int64)
    else:
        names, labels = np.unique(labels, return_inverse=True)
    return labels, list(map(str, names))


# ---- command line


def parse_args(argv=None):
    parser = files.Parser(__file__, __doc__)
    add = parser.add_argument_group("images").add_argument
    add("--data", required=True, help="where the images are, see above")
    add("--out", type=Path, required=True, help="folder of the cache")
    add("--image-size", type=number(int, 1, 4096), default=256,
        help="side of the square images, in pixels")
    add("--flip", action="store_true",
        help="also encode the mirrored image, as a second view")
    add("--crops", type=number(int, 0, 1000), default=0, metavar="K",
        help="also encode K random squares")
    add("--seed", type=files.seed_number, default=0,
        help="seed of the random squares")
    add("--limit", type=at_least_1,
        help="take only this many images, evenly spread over the source")
    add("--skip-bad", action="store_true",
        help="leave unreadable images out instead of stopping")
    add = parser.add_argument_group("autoencoder and encoder").add_argument
    add("--vae", default="stabilityai/sd-vae-ft-mse",
        help="autoencoder: a hub repository, a folder, a file, or none to use pixels as latents")
    add("--patch", type=at_least_1, default=2,
        help="patch size of the models to train, which decides the number of targets")
    add("--encoder", default="vit_base_patch14_dinov2.lvd142m",
        help="a ViT of timm, hog, none, or several with commas between")
    add("--encoder-weights", metavar="FILE",
        help="local weights of --encoder, one file for each ViT, with commas between")
    add("--target-dtype", choices=["float16", "int8"], default="float16",
        help="int8 halves the disk space, and keeps the directions that REPA's loss compares")
    add = parser.add_argument_group("work").add_argument
    add("--batch-size", type=number(int, 1, 2**16), default=64,
        help="number of images that are encoded at a time")
    add("--shard", type=number(int, 1, 2**20), default=1024,
        help="number of images per file, which is also what a kill can lose")
    add("--workers", type=number(int, 0, 256), default=min(4, os.cpu_count()),
        help="number of processes that decode images, per GPU")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with files.program(__file__, args):
        run(args, *files.launch())
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
