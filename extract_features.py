"""Images -> cache: autoencoder latents, encoder targets, labels and crops, in .safetensors files.

    python extract_features.py --data tests/digits.npz --image-size 8 --patch 2 --vae none \\
        --encoder hog --out features/digits
    torchrun --nproc_per_node=8 extract_features.py --data imagenet/train --out features/imagenet256

--data is one of these:
    a folder of class folders      class/*.jpg, png, webp
    a folder with dataset.json     as StyleGAN, EDM2 and REPA write it; its labels are the classes
    a .zip of either
    an ADM .npz                    arr_0 uint8 [N, H, W, 3], arr_1 labels
Any number of processes share the work. After a kill, the same command continues.

The cache (--out) is a folder that `CachedFeatures` reads. meta.json says what made it. Every 1,024
images (--shard) are one file, named after the first of them: 00000000.safetensors and so on. A file
is whole, or it is not there. Its tensors:
    moments [n, V, 2C, h, w] float16    mean, then std (not log variance), of the latent
    targets [n, V, T, F] float16, int8  encoder tokens, T = (h / patch)^2; none with --encoder none
    labels  [n] int64                   index of the class
    control [n, V, 7] int32             h0, w0, top, left, h, w, flip: what the view shows
    index   [n] int64                   number of the image; only where --skip-bad left some out
n images, V views: the centre crop; with --flip its mirror image (which is encoded: mirroring the
latent would not do); with --crops K, K random squares. Targets and control are those of the view.

REPA's encoders and timm's names. MAE and CLIP give their tokens before the final norm, the others
after it:
    dinov2-vit-b     vit_base_patch14_dinov2.lvd142m
    dinov2reg-vit-b  vit_base_patch14_reg4_dinov2.lvd142m
    dinov1-vit-b     vit_base_patch16_224.dino
    mae-vit-l        vit_large_patch16_224.mae
    jepa-vit-h       vit_huge_patch14_gap_224.in1k_ijepa
    clip-vit-L       vit_large_patch14_clip_quickgelu_224.openai
MoCo v3 is not in timm. SigLIP (vit_large_patch16_siglip_256.webli) is not in REPA's code.

Shapes in the right margin: N images, V views, C, H, W channels, height, width, T = G^2 tokens on a
G x G grid, F the width of a token.
"""

import atexit
import contextlib
import hashlib
import io
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import zipfile
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
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
from PIL import ExifTags, Image
from torch.utils.data import DataLoader, Dataset, default_convert
from tqdm import tqdm

import files
from files import COUNT, UserError, explaining, number

# ---- views of an image

MOST_PIXELS = 2**28  # of a scaled image


def center_crop(image, size):
    """ADM's preprocessing: the centred `size` x `size` square of a PIL image (arXiv 2105.05233).

    Halve with BOX while the short side is at least 2 size, scale it to `size` with BICUBIC, crop.
    ValueError if the image is so narrow that the scaled one would fill the memory.
    """
    while min(image.size) >= 2 * size:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, Image.Resampling.BOX)
    scale = size / min(image.size)
    width = round(image.width * scale)
    height = round(image.height * scale)
    if width * height > MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels become {width} x {height}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left = (width - size) // 2
    top = (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def image_views(image, size, flip, crops, rng):
    """The views of a PIL image, uint8 [V, 3, size, size], and their control, int32 [V, 7].

    Random squares have 0.4 to 1 times the area of the centred one (arXiv 2411.03177; 0.4 is ours);
    with `flip`, half of them are mirrored. Boxes are in pixels of the image before it is mirrored.
    """
    w0, h0 = image.size
    short = min(w0, h0)
    center = center_crop(image, size)
    box = ((h0 - short) // 2, (w0 - short) // 2, short)              # top, left, side
    views = [(center, box, False)]
    if flip:
        views.append((center, box, True))
    for _ in range(crops):
        side = max(1, round(short * rng.uniform(0.4, 1) ** 0.5))
        top = rng.integers(h0 - side, endpoint=True)
        left = rng.integers(w0 - side, endpoint=True)
        square = image.crop((left, top, left + side, top + side))
        mirrored = flip and rng.random() < 0.5
        views.append((center_crop(square, size), (top, left, side), mirrored))

    pixels = []
    control = []
    for square, (top, left, side), mirrored in views:
        array = np.asarray(square)                                   # (size, size, 3)
        pixels.append(array[:, ::-1] if mirrored else array)
        control.append((h0, w0, top, left, side, side, mirrored))
    return np.stack(pixels).transpose(0, 3, 1, 2), np.array(control, dtype=np.int32)


# ---- autoencoders: pixels in [-1, 1] <-> latents


class Pixels:
    """`--vae none`: the pixels are the latents, mean = pixel, standard deviation = 0."""

    channels = 3
    downsampling = 1
    scale = 1.0
    shift = 0.0

    def encode(self, images):                                        # (N, 3, H, W) in [-1, 1]
        return images, torch.zeros_like(images)

    def decode(self, latents):
        return latents


def group_norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


def conv3(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = conv3(c_in, c_out)
        self.norm2 = group_norm(c_out)
        self.conv2 = conv3(c_out, c_out)
        self.conv_shortcut = nn.Identity()
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class AttentionBlock(nn.Module):
    """Self-attention over all positions, with one head."""

    def __init__(self, c):
        super().__init__()
        self.group_norm = group_norm(c)
        self.to_q = nn.Linear(c, c)
        self.to_k = nn.Linear(c, c)
        self.to_v = nn.Linear(c, c)
        self.to_out = nn.Sequential(nn.Linear(c, c))

    def forward(self, x):
        h = self.group_norm(x).flatten(2).mT.unsqueeze(1)            # (N, 1, H W, C)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out(h).squeeze(1).mT.reshape(x.shape)


class MiddleBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c, c), ResnetBlock(c, c)])
        self.attentions = nn.ModuleList([AttentionBlock(c)])

    def forward(self, x):
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


def named(**layers):
    return nn.Sequential(OrderedDict(layers))


def down_block(c_in, c_out, last):
    block = named(resnets=nn.Sequential(ResnetBlock(c_in, c_out), ResnetBlock(c_out, c_out)))
    if not last:
        pad = nn.ZeroPad2d((0, 1, 0, 1))
        conv = nn.Conv2d(c_out, c_out, 3, stride=2)
        block.add_module("downsamplers", nn.Sequential(named(pad=pad, conv=conv)))
    return block


def up_block(c_in, c_out, last):
    first = ResnetBlock(c_in, c_out)
    resnets = nn.Sequential(first, ResnetBlock(c_out, c_out), ResnetBlock(c_out, c_out))
    block = named(resnets=resnets)
    if not last:
        upsample = nn.Upsample(scale_factor=2.0)
        conv = conv3(c_out, c_out)
        block.add_module("upsamplers", nn.Sequential(named(upsample=upsample, conv=conv)))
    return block


def stack(block, widths):
    """A block for each width. All but the last one change the resolution."""
    blocks = nn.Sequential()
    for i, (before, width) in enumerate(pairwise([widths[0], *widths])):
        blocks.append(block(before, width, last=i == len(widths) - 1))
    return blocks


def conv_encoder(widths):
    """Images [N, 3, H, W] -> [N, 8, H/8, W/8]. Modules are named as in diffusers."""
    return named(
        conv_in=conv3(3, widths[0]),
        down_blocks=stack(down_block, widths),
        mid_block=MiddleBlock(widths[-1]),
        conv_norm_out=group_norm(widths[-1]),
        act=nn.SiLU(),
        conv_out=conv3(widths[-1], 8),
    )


def conv_decoder(widths):
    """Latents [N, 4, h, w] -> images [N, 3, 8 h, 8 w]; widths from the latents to the images."""
    return named(
        conv_in=conv3(4, widths[0]),
        mid_block=MiddleBlock(widths[0]),
        up_blocks=stack(up_block, widths),
        conv_norm_out=group_norm(widths[-1]),
        act=nn.SiLU(),
        conv_out=conv3(widths[-1], 3),
    )


class AutoencoderKL(nn.Module):
    """Stable Diffusion's autoencoder (arXiv 2112.10752): images <-> latents, 1/8 of the side.

    sd-vae-ft-mse and sd-vae-ft-ema have the same encoder and different decoders.
    """

    channels = 4
    downsampling = 8
    scale = 0.18215
    shift = 0.0
    pixels_at_once = 16 * 256 * 256  # a slice of the batch: 512 px fit a small GPU

    def __init__(self, widths=(128, 256, 512, 512)):
        super().__init__()
        self.encoder = conv_encoder(widths)
        self.quant_conv = nn.Conv2d(8, 8, 1)
        self.decoder = conv_decoder(widths[::-1])
        self.post_quant_conv = nn.Conv2d(4, 4, 1)
        self.eval().requires_grad_(False)

    def slices(self, batch, side):
        return batch.split(max(1, self.pixels_at_once // side**2))

    def encode(self, images):
        """Images [N, 3, H, W] in [-1, 1] -> mean and std [N, 4, H/8, W/8], not scaled."""
        moments = []
        for x in self.slices(images, max(images.shape[2:])):
            moments.append(self.quant_conv(self.encoder(x)))
        mean, log_variance = torch.cat(moments).chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(-30, 20))

    def decode(self, latents):
        """Latents [N, 4, h, w], not scaled -> images [N, 3, 8 h, 8 w], about in [-1, 1]."""
        images = []
        for z in self.slices(latents, 8 * max(latents.shape[2:])):
            images.append(self.decoder(self.post_quant_conv(z)))
        return torch.cat(images)


def load_autoencoder(name, device="cpu"):
    """The autoencoder of a hub repository, or of a local folder or file; Pixels for the name none.

    The result has channels, downsampling, scale, shift, encode and decode; models see
    (latent - shift) * scale. UserError if the weights cannot be had or are of another architecture.
    """
    if name == "none":
        return Pixels()
    autoencoder = AutoencoderKL()
    path = find_autoencoder(name)

    config = {}
    if path.with_name("config.json").exists():
        with explaining(f"--vae {name}: damaged config.json", "copy or download it again"):
            config = dict(json.loads(path.with_name("config.json").read_text()))
    kind = config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise UserError(f"--vae {name}: is of class {kind}; pass an AutoencoderKL")
    autoencoder.scale = config.get("scaling_factor") or autoencoder.scale
    autoencoder.shift = config.get("shift_factor") or autoencoder.shift

    weights = read_weights(path)
    what = f"--vae {name}: weights of another architecture"
    with explaining(what, "pass those of Stable Diffusion's autoencoder"):
        autoencoder.load_state_dict(modern_names(weights))
    return autoencoder.to(device)


OFFLINE = "HF_HUB_OFFLINE=1 skips the wait"


def find_autoencoder(name):
    """The path of the weights of a folder, a file or a hub repository."""
    path = Path(name)
    file = "diffusion_pytorch_model.safetensors"
    if path.is_file():
        return path
    if path.is_dir():
        return path / file
    remedy = f"pass a folder or file with its {file}, or --vae none for pixels; {OFFLINE}"
    with explaining(f"--vae {name}: cannot be downloaded", remedy):
        huggingface_hub.hf_hub_download(name, "config.json")  # into the folder of the weights
        return Path(huggingface_hub.hf_hub_download(name, file))


def modern_names(weights):
    """Older files name the layers of the attention otherwise and store them as 1x1 convolutions."""
    renamed = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    state = {}
    for key, value in weights.items():
        for old, new in renamed.items():
            key = key.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
        if "attentions.0.to_" in key and value.ndim == 4:
            value = value.flatten(1)
        state[key] = value
    return state


def read_weights(path):
    """The dict in a .safetensors or PyTorch file. UserError if there is none."""
    with explaining(f"{path}: not readable as weights", "copy or download it again"):
        if str(path).endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True).items())


# ---- encoders: pixels -> one target vector per token


class HOG:
    """Histograms of oriented gradients (Dalal and Triggs, 2005), a vector for each cell of a grid.

    Classical spatial features give part of REPA's gain (arXiv 2512.10794), need no weights and suit
    any image size. A vector holds the histograms of the cell and of its eight neighbours,
    L2-normalised with a constant, so that a flat image gives a direction and not a zero vector.
    """

    bins = 9
    floor = 0.02

    def __init__(self, grid):
        self.grid = grid
        self.widths = [9 * self.bins + 1]

    def __call__(self, images):                                      # (N, 3, H, W) uint8
        grey = images.float().mean(1, keepdim=True) / 255
        grey = F.pad(grey, (1, 1, 1, 1), mode="replicate")
        dx = (grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]) / 2        # (N, 1, H, W)
        dy = (grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]) / 2
        angle = torch.atan2(dy, dx).remainder(torch.pi) / torch.pi * self.bins  # in [0, bins]

        # each pixel votes for the two nearest of the bins, which are periodic
        centre = torch.arange(self.bins, device=images.device).view(1, -1, 1, 1)
        distance = (angle - centre).abs()                            # (N, bins, H, W)
        distance = torch.minimum(distance, self.bins - distance)
        votes = torch.hypot(dx, dy) * (1 - distance).clamp(min=0)

        cells = F.avg_pool2d(votes, images.shape[-1] // self.grid)   # (N, bins, G, G)
        cells = F.pad(cells, (1, 1, 1, 1), mode="replicate")
        blocks = cells.unfold(2, 3, 1).unfold(3, 3, 1)               # (N, bins, G, G, 3, 3)
        blocks = blocks.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return F.normalize(F.pad(blocks, (0, 1), value=self.floor), dim=-1)  # (N, T, F)


class ViT:
    """Patch tokens of a frozen timm ViT on a grid x grid raster, as in REPA (arXiv 2410.06940).

    The image is normalised as in the encoder's training, then scaled to grid x patch pixels
    (bicubic, no antialias); timm resamples the position table once (bicubic, antialias). Class and
    register tokens are dropped. UserError if weights cannot be had.
    """

    def __init__(self, name, grid, weights=None, device="cpu"):
        quick = name.replace("_clip_", "_clip_quickgelu_")
        if quick != name and quick in timm.list_models(pretrained=True):
            raise UserError(f"--encoder {name}: these weights need QuickGELU; pass {quick}")
        unknown = (f"--encoder {name}: not a ViT that timm knows", "see timm.list_models('vit*')")
        with explaining(*unknown), torch.device("meta"):
            patch = timm.create_model(name).patch_embed.patch_size[0]
        self.side = grid * patch
        self.device = torch.device(device)
        self.model = load_vit(name, self.side, weights).to(device).eval().requires_grad_(False)
        self.widths = [self.model.embed_dim]
        self.norm = not (".mae" in name or "_clip_" in name)
        config = timm.data.resolve_model_data_config(self.model)
        self.mean = torch.tensor(config["mean"], device=device).view(3, 1, 1)
        self.std = torch.tensor(config["std"], device=device).view(3, 1, 1)
        with explaining(*unknown):
            black = torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device=device)
            self(black).view(grid**2, *self.widths)

    def __call__(self, images):                                      # (N, 3, H, W) uint8
        x = (images.float() / 255 - self.mean) / self.std
        x = F.interpolate(x, size=(self.side, self.side), mode="bicubic")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            [tokens] = self.model.forward_intermediates(
                x, indices=1, norm=self.norm, output_fmt="NLC", intermediates_only=True
            )
        return tokens.float()                                        # (N, T, F)


def load_vit(name, side, file=None):
    """A timm ViT for images of `side` pixels, with the hub's weights or those of a file."""
    options = {"pretrained": True, "num_classes": 0, "img_size": side}
    if file is None:
        what = f"--encoder {name}: its weights cannot be downloaded"
        with explaining(what, f"pass --encoder-weights FILE; {OFFLINE}"):
            return timm.create_model(name, **options)

    weights = read_weights(file)
    with explaining(f"--encoder-weights {file}: not weights of {name}", "pass its own"):
        overlay = {"state_dict": dict(weights)}
        model = timm.create_model(name, pretrained_cfg_overlay=overlay, **options)
        # timm leaves at random what a file lacks: compare the names, after its own conversion
        convert = sys.modules[type(model).__module__].checkpoint_filter_fn
        missing = model.state_dict().keys() - convert(weights, model).keys()
        if missing:
            raise ValueError(f"{min(missing)} is missing")
        return model


class Encoders:
    """Encoders side by side: uint8 images [N, 3, H, W] -> tokens [N, grid^2, sum of `widths`].

    names: hog or timm ViTs, with commas between; weights: files for the ViTs, likewise. An encoder
    of your own needs a list `widths` and __call__(uint8 images [N, 3, H, W]) -> tokens [N, T, F].
    """

    def __init__(self, names, grid, weights=None, device="cpu"):
        names = names.split(",")
        paths = weights.split(",") if weights else []
        vits = [name for name in names if name != "hog"]
        if paths and len(paths) != len(vits):
            found = f"{len(paths)} files for {len(vits)} encoders with weights"
            raise UserError(f"--encoder-weights: {found}; name one for each")
        paths = dict(zip(vits, paths, strict=False))
        self.encoders = []
        self.widths = []
        for name in names:
            encoder = HOG(grid) if name == "hog" else ViT(name, grid, paths.get(name), device)
            self.encoders.append(encoder)
            self.widths += encoder.widths

    def __call__(self, images):
        return torch.cat([encoder(images) for encoder in self.encoders], dim=-1)


def to_int8(targets):
    """Tokens [..., F] scaled to fill int8: REPA's loss only sees their direction, which remains."""
    largest = targets.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return (targets / largest * 127).round().to(torch.int8)


# ---- the reader of a cache


class CachedFeatures(Dataset):
    """A cache, mapped into memory: item i is view i % V of image i // V.

    meta: meta.json, and the entries `images` (their number) and `empty_classes` (indices); labels:
    int64 [images]; views: V; names: the tensors that are read.
    UserError unless `path` holds a complete cache, with targets if they are wanted.
    """

    def __init__(self, path, targets=True, control=True):
        self.opened = (path, targets, control)
        self.meta = read_meta(Path(path))
        self.views = self.meta["views"]
        self.names = ["moments", "labels"]
        if control:
            self.names.append("control")
        if targets:
            self.names.append("targets")
        if targets and not self.meta["target_widths"]:
            raise UserError(f"{path}: the cache has no targets; extract it with an --encoder")

        labels = []
        self.shards = []  # dicts of arrays, with a row for each view
        for start in range(0, self.meta["count"], self.meta["shard"]):
            tensors = open_shard(shard_file(path, start), self.meta)
            labels.append(tensors["labels"])
            tensors["labels"] = tensors["labels"].view(-1, 1).expand(-1, self.views)
            rows = {name: tensors[name].flatten(0, 1).numpy() for name in self.names}
            self.shards.append(rows)
        self.labels = torch.cat(labels).numpy()
        # what the files say beyond meta.json: the number of readable images, classes without one
        classes = range(len(self.meta["classes"]))
        self.meta["images"] = len(self.labels)
        self.meta["empty_classes"] = sorted(set(classes) - set(self.labels.tolist()))
        sizes = [len(rows["labels"]) for rows in self.shards]
        self.starts = np.cumsum([0, *sizes[:-1]])  # the first item of each shard

    def model_options(self, patch):
        """Keywords of a model for this cache: input_size, in_channels, num_classes.

        UserError if its patches do not fit the latents, or its tokens are not those of the targets.
        """
        side = self.meta["latent_side"]
        grid = self.meta["grid"]
        if side % patch:
            fitting = [str(p) for p in range(1, side + 1) if side % p == 0]
            remedy = f"train with --model SIZE/P, where P is one of {', '.join(fitting)}"
            raise UserError(f"patch {patch} does not divide latents of {side} x {side}: {remedy}")
        if "targets" in self.names and side // patch != grid:
            remedy = f"train with --model SIZE/{side // grid}, or extract with --patch {patch}"
            found = f"the cache has {grid}x{grid} targets, the model has patch {patch}"
            raise UserError(f"{found}: {remedy}")
        return {
            "input_size": side,
            "in_channels": self.meta["latent_channels"],
            "num_classes": len(self.meta["classes"]),
        }

    def latents(self, moments, vae_noise=0):
        """Latents of a model from moments [N, 2C, h, w] and vae_noise [N, C, h, w]; 0: the mean."""
        mean, std = moments.float().chunk(2, dim=1)
        sample = mean + std * vae_noise
        return (sample - self.meta["latent_shift"]) * self.meta["latent_scale"]

    def fixed_batch(self, count, device=None):
        """A batch (see loader) of the first views of `count` images, spread over the classes."""
        by_class = np.argsort(self.labels, kind="stable")
        places = np.linspace(0, len(by_class) - 1, min(count, len(by_class)))
        batch = to_batch(self.__getitems__(by_class[places.astype(int)] * self.views))
        return {name: value.to(device) for name, value in batch.items()}

    def loader(self, order, workers=None, device=None):
        """Yield a batch on `device` for each array of indices in `order`.

        A batch is a dict of tensors: moments [N, 2C, h, w] float16, y [N] (the labels) and, where
        asked for, targets [N, T, F] and control [N, 7]. workers: processes that read ahead, by
        default 4 for targets and none for latents alone. UserError if one of them dies.
        """
        if workers is None:
            workers = min(4, os.cpu_count()) if "targets" in self.names else 0
        pin = device is not None and torch.device(device).type == "cuda"
        options = {"batch_sampler": order, "collate_fn": to_batch, "pin_memory": pin}
        for batch in read_ahead(self, workers, **options):
            yield {name: value.to(device, non_blocking=True) for name, value in batch.items()}

    def __reduce__(self):
        return CachedFeatures, self.opened  # a spawned process opens the files, it gets no copies

    def __len__(self):
        return len(self.labels) * self.views

    def __getitems__(self, indices, names=None):
        """A dict of arrays, a row for each index: `names`, or all tensors that are read.

        They are read in file order, which is the fastest.
        """
        indices = np.asarray(indices)
        rows = {}
        for name in names or self.names:
            array = self.shards[0][name]
            rows[name] = np.empty((len(indices), *array.shape[1:]), array.dtype)
        order = np.argsort(indices)
        shards = np.searchsorted(self.starts, indices[order], side="right") - 1
        for shard in np.unique(shards):
            places = order[shards == shard]                          # where this shard's rows go
            inside = indices[places] - self.starts[shard]
            for name, array in rows.items():
                array[places] = self.shards[shard][name][inside]
        return rows

    @cached_property
    def control_table(self):
        """int32 [classes, 50, 7]: control of 50 images of each class, centred and not mirrored.

        They are evenly spread over a class, repeated if it has fewer; a class without images has
        zeros (no control). None if control is not read.
        """
        if "control" not in self.names:
            return None
        classes = np.unique(self.labels)
        chosen = []
        for label in classes:
            images = np.flatnonzero(self.labels == label)
            chosen.append(images[np.linspace(0, len(images) - 1, 50).astype(int)])
        rows = self.__getitems__(np.concatenate(chosen) * self.views, ["control"])
        table = torch.zeros(len(self.meta["classes"]), 50, 7, dtype=torch.int32)
        table[classes] = torch.from_numpy(rows["control"]).view(-1, 50, 7)
        return table


def to_batch(rows):
    """Arrays of CachedFeatures -> tensors, under the names that training scripts use."""
    batch = default_convert(rows)
    batch["y"] = batch.pop("labels")
    return batch


def read_ahead(dataset, workers, **options):
    """Yield the batches of a DataLoader. UserError if one of its `workers` processes dies."""
    loader = DataLoader(
        dataset, num_workers=workers, worker_init_fn=files.shield_worker, **options
    )
    batches = iter(loader)
    atexit.register(kill_children)
    # PyTorch's own handler raises at any point of the program when a process dies. Without it, the
    # loader notices within five seconds.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield from batches
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        what = f"a loader process died ({files.first_sentence(error)})"
        raise UserError(f"{what}; try fewer --workers") from None


def kill_children():
    """Loader processes ignore SIGTERM: after an error, Python would wait for them forever."""
    for process in multiprocessing.active_children():
        process.kill()


# ---- extraction


class Views(Dataset):
    """Item i: the views of image i, or black ones and an `error` that says why it is unreadable.

    An exception would leave a loader process as a traceback.
    """

    def __init__(self, images, args):
        self.images = images
        self.args = args

    def __getitem__(self, i):
        size = self.args.image_size
        what = f"--data {self.args.data}: cannot read image {self.images.name(i)}"
        remedy = "pass --skip-bad, or repair it and extract into another --out"
        item = {"error": "", "rotated": False, "transparent": False}
        try:
            with explaining(what, remedy):
                image = self.images[i]
                views = self.views(to_rgb(image), i)
                item["rotated"] = is_rotated(image)
                item["transparent"] = image.has_transparency_data
        except UserError as error:
            item["error"] = str(error)
            views = self.views(Image.new("RGB", (size, size)), i)
        item["pixels"], item["control"] = views
        return item

    def views(self, image, i):
        args = self.args
        rng = np.random.default_rng([args.seed, i])
        return image_views(image, args.image_size, args.flip, args.crops, rng)


def encode(batch, pixels, autoencoder, encoder, target_dtype):
    """uint8 pixels [n, V, 3, S, S] of the images in range `batch` -> their moments and targets.

    UserError if they are not finite.
    """
    x = pixels.flatten(0, 1)                                         # (n V, 3, S, S)
    mean, std = autoencoder.encode(x.float() / 127.5 - 1)
    tensors = {"moments": torch.cat([mean, std], dim=1).half()}      # (n V, 2C, h, w)
    if encoder:
        tensors["targets"] = encoder(x)                              # (n V, T, F)
        if target_dtype == "float16":
            tensors["targets"] = tensors["targets"].half()
    for name, values in tensors.items():
        if not values.isfinite().all():
            what = f"{name} of images {batch[0]} to {batch[-1]} are not finite"
            raise UserError(f"{what}; are the weights of the network damaged?")
    if encoder and target_dtype == "int8":
        tensors["targets"] = to_int8(tensors["targets"])
    return {name: values.unflatten(0, pixels.shape[:2]).cpu() for name, values in tensors.items()}


@torch.inference_mode()
def extract(args, meta, images, autoencoder, encoder, rank, world, device):
    """Write this process's files of the cache, those that are not there yet.

    Returns the numbers of images whose EXIF rotation and whose transparency were ignored.
    """
    batches = []
    for start in missing_shards(args.out, meta, rank, world):
        stop = min(start + args.shard, len(images))
        for first in range(start, stop, args.batch_size):
            batches.append(range(first, min(first + args.batch_size, stop)))
    loader = read_ahead(Views(images, args), args.workers, batch_sampler=batches)
    total = sum(len(batch) for batch in batches)
    pause = 0.1 if sys.stderr.isatty() else 30  # seconds between two states of the bar
    silent = rank > 0 or total == 0
    bar = tqdm(total=total, unit="img", disable=silent, mininterval=pause, miniters=1)

    ignored = torch.zeros(2, dtype=torch.int64)
    parts = []
    writing = None
    with bar, ThreadPoolExecutor(1) as writer:  # writes a file while the next one is encoded
        for batch, views in zip(batches, loader, strict=True):
            readable = refuse_or_skip(images, batch, views["error"], args.skip_bad)
            pixels = views["pixels"].to(device)
            rows = encode(batch, pixels, autoencoder, encoder, args.target_dtype)
            rows["control"] = views["control"]
            rows["labels"] = torch.from_numpy(images.labels[batch.start : batch.stop])
            rows["index"] = torch.arange(batch.start, batch.stop)
            parts.append({name: values[readable] for name, values in rows.items()})
            ignored += torch.stack([views["rotated"].sum(), views["transparent"].sum()])
            bar.update(len(batch))
            if batch.stop % args.shard and batch.stop < len(images):
                continue

            start = (batch.stop - 1) // args.shard * args.shard
            tensors = join(parts, batch.stop - start)
            parts = []
            if writing:
                writing.result()  # raises its error
            writing = writer.submit(files.write_tensors, shard_file(args.out, start), tensors)
        if writing:
            writing.result()
    return ignored


def join(parts, count):
    """The tensors of a file for `count` images from those of its batches."""
    tensors = {}
    for name in parts[0]:
        tensors[name] = torch.cat([part[name] for part in parts])
    readable = len(tensors["index"])
    if readable == 0:
        raise UserError(f"none of {count} images in a row is readable; is this the right --data?")
    if readable == count:
        del tensors["index"]
    return tensors


def refuse_or_skip(images, batch, errors, skip):
    """Which images of a batch are readable: bool [n]. UserError if one is not, unless `skip`."""
    for i, error in zip(batch, errors, strict=True):
        if error and images.is_gone(i):
            remedy = "run the same command again when it is back"
            raise UserError(f"--data {images.source}: is not there any more; {remedy}")
        if error and not skip:
            raise UserError(error)
        if error:
            tqdm.write(f"skipped: {error.rpartition('; ')[0]}", file=sys.stderr)
    return torch.tensor([not error for error in errors])


def run(args, rank, world, device):
    """The work of one process. UserError for whatever the user has to repair."""
    images = Images(args.data, args.limit)
    autoencoder = load_autoencoder(args.vae, device)
    step = autoencoder.downsampling * args.patch
    grid = args.image_size // step
    if args.image_size % step:
        fits = " or ".join(str(step * k) for k in (grid, grid + 1) if k)
        raise UserError(f"--image-size {args.image_size} is not a multiple of {step}; try {fits}")
    encoder = None
    if args.encoder != "none":
        encoder = Encoders(args.encoder, grid, args.encoder_weights, device)

    if rank == 0:
        meta = describe(args, images, autoencoder, encoder)
        size = 0
        for shape, dtype in layout(meta).values():
            size += len(images) * math.prod(shape) * dtype.itemsize
        files.start_folder(Path(args.out), "meta.json", meta, size)
    files.barrier()
    meta = read_meta(Path(args.out))
    ignored = extract(args, meta, images, autoencoder, encoder, rank, world, device)
    if world > 1:
        dist.all_reduce(ignored)  # every process is ready
    if rank == 0:
        report(args.out, meta, *ignored.tolist())


def report(out, meta, rotated, transparent):
    """Open the cache as a trainer will, and say what it holds. UserError if it is incomplete."""
    features = CachedFeatures(out, targets=bool(meta["target_widths"]))
    classes = meta["classes"]
    names = ", ".join(repr(name) for name in classes[:3])
    if len(classes) > 3:
        names += ", ..."
    images = len(features.labels)
    line = f"{out}: complete, {images:,} images of {len(classes):,} classes: {names}"
    empty = len(classes) - len(np.unique(features.labels))
    notes = {
        "unreadable images were left out": meta["count"] - images,
        f"of {len(classes):,} classes hold no image": empty,
        "images carry an EXIF rotation, which is ignored as in ADM": rotated,
        "images are transparent, which is ignored as in ADM": transparent,
    }
    for note, count in notes.items():
        if count:
            line += f"; {count:,} {note}"
    print(line)


def extract_digits(out, rank, world, device):
    """Make the cache of tests/digits.npz, for --digits, unless there is a complete one."""
    with contextlib.suppress(UserError):
        CachedFeatures(out)
        return
    digits = Path(__file__).parent / "tests" / "digits.npz"
    options = "--image-size 8 --patch 2 --vae none --encoder hog --workers 0".split()
    args = parse_args(["--data", str(digits), "--out", str(out), *options])
    run(args, rank, world, device)


# ---- sources of images

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
OTHER_IMAGES = ".avif .bmp .gif .heic .heif .jfif .jp2 .jxl .pgm .pnm .ppm .tga .tif .tiff"
SPLITS = "train training val valid validation test"


class Images:
    """The images of a source (see the top of this file); `limit`: so many of them, evenly spread.

    `images[i]` is a PIL image as it is stored, `name(i)` its file, `labels[i]` its class, `classes`
    the names of the classes. UserError for a source without usable images.
    """

    def __init__(self, source, limit=None):
        self.source = Path(source)
        self.root = ""  # of all names in a .zip
        self.archive = None
        self.pixels = None
        if not (self.source.is_file() or self.source.is_dir()):
            raise UserError(f"--data {source}: no such file or folder")
        if self.source.suffix.lower() == ".npz" and self.source.is_file():
            self.pixels, labels, self.classes = read_npz(self.source)
            self.names = range(len(labels))
        else:
            labels = self.list_files()
        count = len(labels)
        if limit and limit > count:
            raise UserError(f"--limit {limit}: the source has {count} images")
        self.rows = np.linspace(0, count - 1, limit or count).astype(int)
        self.labels = labels[self.rows]
        self.archive = None  # each process opens its own, because a file has one position

    def list_files(self):
        """Set `names` and `classes`; returns the labels."""
        if self.source.is_dir():
            listed = list(list_folder(self.source))
        else:
            self.root, listed = list_zip(self.source)
        self.names = with_suffix(listed, IMAGES)
        others = with_suffix(listed, tuple(OTHER_IMAGES.split()))
        if others:
            left_out = f"{len(others)} images are left out, such as {others[0]}"
            print(f"--data {self.source}: {left_out}; only {', '.join(IMAGES)} are read")
        if not self.names:
            raise UserError(f"--data {self.source}: it holds no image ({', '.join(IMAGES)})")
        if "dataset.json" in listed:
            labels, self.classes = self.read_dataset_json()
        else:
            labels, self.classes = class_folders(self.source, self.names, listed)
        return labels

    def read_dataset_json(self):
        """Labels and classes from {"labels": [["00000/img00000000.png", 6], ...]}, or null."""
        what = f"--data {self.source}: dataset.json does not fit the images"
        with explaining(what, "make it again, or remove it to use the folders as classes"):
            entries = json.loads(self.read("dataset.json"))["labels"]
            if entries is None:
                entries = [(name, 0) for name in self.names]
            labels = dict(entries)
            unpaired = labels.keys() ^ set(self.names)
            if unpaired:
                raise ValueError(f"{min(unpaired)} is not listed, or not there")
            return number_classes(np.array([labels[name] for name in self.names]))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if self.pixels is not None:
            return Image.fromarray(self.pixels[self.rows[i]])
        return Image.open(io.BytesIO(self.read(self.name(i))))

    def name(self, i):
        return self.names[self.rows[i]]

    def read(self, name):
        if self.source.is_dir():
            return (self.source / name).read_bytes()
        if self.archive is None:
            self.archive = zipfile.ZipFile(self.source)
        return self.archive.read(self.root + name)  # verifies the checksum

    def is_gone(self, i):
        """Whether the source, or the folder of image i, has disappeared."""
        if self.source.is_dir():
            return not (self.source / self.name(i)).parent.exists()
        return not self.source.exists()

    def digest(self):
        """16 hexadecimal digits for the names and sizes of the files, and for the labels."""
        if self.source.is_dir():
            entries = [(name, os.path.getsize(self.source / name)) for name in self.names]
        else:
            with zipfile.ZipFile(self.source) as archive:  # an .npz is one, too
                entries = [(m.filename, m.file_size, m.CRC) for m in archive.infolist()]
        content = repr((entries, self.labels.tolist()))
        return hashlib.sha256(content.encode(errors="backslashreplace")).hexdigest()[:16]


def is_hidden(name):
    return name.startswith(".") or name == "__MACOSX"


def list_folder(folder, above="", parents=()):
    """Yield what lies below a folder, folders with a slash at the end. Links are followed."""
    real = os.path.realpath(folder)
    if real in parents:  # a link that leads back
        return
    for entry in os.scandir(folder):
        if is_hidden(entry.name):
            continue
        if entry.is_dir():
            yield f"{above}{entry.name}/"
            yield from list_folder(entry.path, f"{above}{entry.name}/", (*parents, real))
        else:
            yield f"{above}{entry.name}"


def list_zip(path):
    """The folder around everything in a .zip ("a/b/", or ""), and what lies below it."""
    expected = "expected a folder or .zip of class folders, or an ADM .npz"
    with explaining(f"--data {path}: not a readable .zip", expected):
        names = []
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if not any(map(is_hidden, name.split("/"))):
                    names.append(name)
        above = [os.path.dirname(os.path.dirname(name)) for name in with_suffix(names, IMAGES)]
        root = os.path.join(os.path.commonpath(above or [""]), "")
    return root, [name.removeprefix(root) for name in names if name.startswith(root)]


def with_suffix(names, suffixes):
    """Those of the names that end in a suffix, sorted folder by folder."""
    return sorted((n for n in names if n.lower().endswith(suffixes)), key=lambda n: n.split("/"))


def class_folders(source, names, listed):
    """Labels and classes of images called class/file. UserError if they have other names."""
    deep = [name for name in names if name.count("/") > 1]
    if deep:
        above = Counter(os.path.dirname(os.path.dirname(name)) for name in deep)
        [(meant, _)] = above.most_common(1)
        question = f"did you mean {source / meant}?"
        raise UserError(f"--data {source}: {deep[0]} lies deeper than class/file; {question}")
    loose = [name for name in names if "/" not in name]
    if loose:
        remedy = "make one, or pass the folder above"
        raise UserError(f"--data {source}: {loose[0]} is in no class folder; {remedy}")

    folders = [name.split("/")[0] for name in names]
    classes = sorted(set(folders))
    if set(classes).issubset(SPLITS.split()):
        question = f"did you mean {source / classes[0]}?"
        raise UserError(f"--data {source}: {', '.join(classes)} are no class folders; {question}")
    empty = {name.split("/")[0] for name in listed if "/" in name}.difference(classes)
    if empty:
        what = f"class folder {min(empty)!r} holds no image ({', '.join(IMAGES)})"
        raise UserError(f"--data {source}: {what}; remove it")
    index = {name: label for label, name in enumerate(classes)}
    return np.array([index[folder] for folder in folders]), classes


def read_npz(path):
    """Pixels uint8 [N, H, W, 3], labels and classes of an ADM .npz."""
    expected = "it needs arr_0, uint8 [N, H, W, 3], and arr_1, N class indices >= 0"
    with explaining(f"--data {path}: no ADM .npz", expected), np.load(path) as archive:
        pixels = archive["arr_0"]  # reading it verifies the checksum
        if pixels.dtype != np.uint8 or pixels.shape[3:] != (3,) or pixels.size == 0:
            raise ValueError(f"arr_0 is {pixels.dtype} {list(pixels.shape)}")
        labels = np.zeros(len(pixels), np.int64)
        if "arr_1" in archive:
            labels = archive["arr_1"]
        if labels.shape != pixels.shape[:1]:
            raise ValueError(f"arr_1 is {labels.dtype} {list(labels.shape)}")
        return pixels, *number_classes(labels)


def number_classes(labels):
    """Labels and classes: the numbers up to the largest or, from 100,000 on, those that occur."""
    if labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(f"the labels are {labels.dtype} {list(labels.shape)} from {labels.min()}")
    if labels.max() < 100_000:
        names = range(int(labels.max()) + 1)
        labels = labels.astype(np.int64)
    else:
        names, labels = np.unique(labels, return_inverse=True)
    return labels, [str(name) for name in names]


def to_rgb(image):
    """An RGB image, as PIL converts it, but 16-bit grey, which PIL would clip to white, is scaled.

    ValueError for 32 bits per pixel, whose range is unknown.
    """
    # older versions of Pillow open a 16-bit PNG in mode I
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = np.asarray(image).astype(np.int32)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode} has 32 bits per pixel, save it with 8 or 16")
    return image.convert("RGB")


def is_rotated(image):
    with contextlib.suppress(Exception):  # damaged EXIF data is ignored as well
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return False


# ---- what a cache consists of

FORMAT_VERSION = 2
META = {  # entries of meta.json that readers need
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


def describe(args, images, autoencoder, encoder):
    """The contents of meta.json."""
    side = args.image_size // autoencoder.downsampling
    encoder_digest = None
    if args.encoder_weights:
        encoder_digest = [files.file_hash(path) for path in args.encoder_weights.split(",")]
    return {
        "format_version": FORMAT_VERSION,
        "source": str(Path(args.data)),
        "source_digest": images.digest(),
        "limit": args.limit,
        "count": len(images),
        "shard": args.shard,
        "classes": images.classes,
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
        "target_widths": encoder.widths if encoder else [],
        "target_dtype": args.target_dtype,
    }


def layout(meta):
    """Shape for one image, and dtype, of the tensors of a cache."""
    views = meta["views"]
    side = meta["latent_side"]
    tensors = {
        "moments": ([views, 2 * meta["latent_channels"], side, side], torch.float16),
        "labels": ([], torch.int64),
        "control": ([views, 7], torch.int32),
    }
    if meta["target_widths"]:
        shape = [views, meta["grid"] ** 2, sum(meta["target_widths"])]
        tensors["targets"] = (shape, getattr(torch, meta["target_dtype"]))
    return tensors


def read_meta(folder):
    """The dict in meta.json. UserError if the folder holds no cache of this format."""
    file = folder / "meta.json"
    if not file.is_file():
        remedy = "make one with extract_features.py"
        for below in folder.glob("*/meta.json"):
            remedy = f"did you mean {below.parent}?"
        raise UserError(f"{folder}: no feature cache there; {remedy}")
    version = files.read_json(file).get("format_version")
    if version != FORMAT_VERSION:
        found = f"cache format {version!r:.60}, not {FORMAT_VERSION}"
        raise UserError(f"{folder}: {found}; extract it again")
    return files.read_json(file, META)


def shard_file(folder, start):
    """The file of a cache that begins with image `start`."""
    return Path(folder, f"{start:08d}.safetensors")


def open_shard(path, meta):
    """The tensors of a file, mapped into memory. UserError if it is missing or damaged."""
    remedy = "run the same extraction again"
    if not path.exists():
        raise UserError(f"{path.parent}: the cache is incomplete, {path.name} is missing; {remedy}")
    with explaining(f"{path}: damaged", remedy):
        tensors = safetensors.torch.load_file(path)
        for name, (shape, dtype) in layout(meta).items():
            values = tensors[name]
            if list(values.shape[1:]) != shape or values.dtype != dtype:
                raise ValueError(f"{name} is {values.dtype} {list(values.shape)}")
    return tensors


def missing_shards(folder, meta, rank, world):
    """The first images of this process's files that are to be made. Damaged files are deleted."""
    missing = []
    for start in range(0, meta["count"], meta["shard"])[rank::world]:
        path = shard_file(folder, start)
        try:
            open_shard(path, meta)
        except UserError as error:
            if path.exists():
                print(f"{str(error).rpartition('; ')[0]}; it is made again", file=sys.stderr)
                path.unlink()
            missing.append(start)
    return missing


# ---- command line


def parse_args(argv=None):
    parser = files.Parser(__file__, __doc__)
    add = parser.add_argument_group("images").add_argument
    add("--data", required=True, help="where the images are, see above")
    add("--out", required=True, help="folder of the cache")
    add("--image-size", type=number(int, 1, 4096), default=256,
        help="side of the square images, in pixels")
    add("--flip", action="store_true",
        help="also encode the mirrored image, as a second view")
    add("--crops", type=number(int, 0, 1000), default=0, metavar="K",
        help="also encode K random squares")
    add("--seed", type=number(int, 0, 2**31 - 1), default=0,
        help="seed of the random squares")
    add("--limit", type=number(int, 1),
        help="take only this many images, evenly spread over the source")
    add("--skip-bad", action="store_true",
        help="leave unreadable images out instead of stopping")
    add = parser.add_argument_group("autoencoder and encoder").add_argument
    add("--vae", default="stabilityai/sd-vae-ft-mse",
        help="autoencoder: a hub repository, a folder, a file, or none to use pixels as latents")
    add("--patch", type=number(int, 1), default=2,
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
