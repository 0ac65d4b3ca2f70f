"""Linear probe: how well one linear layer reads the class from the tokens of each block of a model.

    python tests/results/probe.py runs/repa-digits --data features/digits --batch-size 64 --lr 1e-2
    python tests/results/probe.py runs/repa --data features/imagenet256 --test features/imagenet-val

The probe of block b sees the mean of the patch tokens after b, for the noisy latent x_t. It is a batch norm
without parameters and a linear layer, which are trained on the images of --data. The accuracy is that on the
images of --test or, without it, on every fifth image of --data, which the probe then is not trained on (but
the model may have been). The label is never shown to the model: it gets the null class, and no control.

--t is the time of flow matching, from 0 (data) to 1 (noise). SD-DiT's models get the noise level t / (1 - t),
at which noise and data have the same ratio; their probes read the encoder.

paper: REPA reports 68.2 % for SiT-L/2 after 400K steps with the cosine loss and DINOv2-L (arXiv 2410.06940,
table 2), and 61.2, 69.4 and 70.3 % for B, L and XL with DINOv2-B (table 7). Its probes are trained for 90
epochs in batches of 16,384 by Adam, at 1e-3 with a cosine schedule. The code is not published / here: these
numbers are the defaults, the noise of an image is drawn once, and t = 0.5 is our choice. The features of a
block take 2 N D bytes of memory, 3 GB for ImageNet and XL: name the blocks with --blocks, then.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dit
import files
import sample
from extract_features import CachedFeatures, chunks
from files import UserError, number


@torch.no_grad()
def block_features(model, x_t, t, blocks):
    """Mean patch tokens after the blocks, counted from 1, of x_t [N, C, H, W] at time t: [N, L, D]."""
    if isinstance(model, dit.SDDiT):  # x + sigma eps, with sigma = t / (1 - t), is x_t / (1 - t)
        x_t, t = x_t / (1 - t), t / (1 - t)
    patches = model.grid**2
    means = {}

    def keep(b, module, inputs, tokens):
        means[b] = tokens[:, -patches:].float().mean(1)              # [N, D]

    hooks = []
    for b in blocks:
        hook = model.blocks[b - 1].register_forward_hook(lambda *args, b=b: keep(b, *args))
        hooks.append(hook)
    times = torch.full((len(x_t),), t, device=x_t.device)
    null = torch.ones(len(x_t), dtype=torch.bool, device=x_t.device)
    model(x_t, times, torch.zeros_like(null, dtype=torch.int64), drop=null)
    for hook in hooks:
        hook.remove()
    return torch.stack([means[b] for b in blocks], dim=1)


def cache_features(model, cache, t, blocks, batch_size, seed, device):
    """Features of the first view of every image: float16 [N, L, D], and the labels, int64 [N]."""
    images = range(len(cache.labels))
    batches = chunks(images, batch_size)
    order = [np.array(batch) * cache.views for batch in batches]
    features = torch.empty(len(images), len(blocks), model.hidden_size, dtype=torch.float16)
    bar = tqdm(cache.loader(order, device=device), total=len(order), disable=None)
    for batch, loaded in zip(batches, bar, strict=True):
        x = cache.latents(loaded["moments"])
        generators = sample.image_generators(seed, batch)
        eps = [generator.standard_normal(x.shape[1:], np.float32) for generator in generators]
        x_t = (1 - t) * x + t * torch.from_numpy(np.stack(eps)).to(x)
        features[batch.start : batch.stop] = block_features(model, x_t, t, blocks)
    return features, torch.from_numpy(cache.labels)


class Probes(nn.Module):
    """A probe for each of L blocks: batch norm without parameters, then a linear layer."""

    def __init__(self, num_blocks, width, num_classes):
        super().__init__()
        self.norm = nn.BatchNorm1d(num_blocks * width, affine=False)
        self.weight = nn.Parameter(0.01 * torch.randn(num_blocks, width, num_classes))
        self.bias = nn.Parameter(torch.zeros(num_blocks, 1, num_classes))

    def forward(self, features):                                     # [N, L, D]
        h = self.norm(features.float().flatten(1)).view(features.shape)
        return torch.baddbmm(self.bias, h.transpose(0, 1), self.weight)  # [L, N, classes]


def train_probes(features, labels, num_classes, epochs, batch_size, lr, seed, device):
    """Trains probes for all blocks at once; they share nothing but the order of the images."""
    torch.manual_seed(seed)
    probes = Probes(*features.shape[1:], num_classes).to(device).train()
    optimizer = torch.optim.Adam(probes.parameters(), lr)
    batch_size = min(batch_size, len(labels))
    steps = epochs * (len(labels) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(batch_size):
            if len(rows) < batch_size:  # the rest of an epoch, too few for a batch norm
                break
            logits = probes(features[rows].to(device))
            y = labels[rows].to(device).expand(len(logits), -1)      # [L, N]
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / batch_size
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return probes.eval()


@torch.no_grad()
def accuracies(probes, features, labels, batch_size, device):
    """Share of images whose largest logit is that of their class, a float for each block."""
    right = 0
    for rows in torch.arange(len(labels)).split(batch_size):
        guesses = probes(features[rows].to(device)).argmax(2).cpu()  # [L, N]
        right = right + (guesses == labels[rows]).sum(1)
    return (right / len(labels)).tolist()


def read(path, config):
    """Opens a cache, whose latents must be those that the model was trained on."""
    cache = CachedFeatures(path, targets=False, control=False)
    for key, name in (("latent_side", "input_size"), ("latent_channels", "in_channels")):
        if cache.meta[key] != config[name]:
            raise UserError(f"{path}: {key} is {cache.meta[key]}, that of the model is {config[name]}")
    return cache


def probe(args):
    """Probes a checkpoint. Returns a dict with a list of accuracies by block for "train" and "test"."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, checkpoint = files.load_model(args.checkpoint, args.weights, device, args.official)
    if not model.y_embedder.dropout_prob:
        raise UserError(f"{args.checkpoint}: it has no null class, without which the label would be shown")
    depth = len(model.blocks)
    blocks = args.blocks or list(range(1, depth + 1))
    if max(blocks) > depth:
        raise UserError(f"--blocks {max(blocks)}: the model has blocks 1 to {depth}")

    parts = {}
    for name, path in (("train", args.data), ("test", args.test)):
        if path:
            cache = read(path, checkpoint["config"])
            seed = args.seed + (name == "test")
            parts[name] = cache_features(model, cache, args.t, blocks, args.forward_batch, seed, device)
    features, labels = parts["train"]
    if not args.test:
        held_out = torch.arange(len(labels)) % 5 == 4
        parts["test"] = (features[held_out], labels[held_out])
        parts["train"] = (features[~held_out], labels[~held_out])
    num_classes = 1 + max(int(labels.max()) for _, labels in parts.values())
    settings = (args.epochs, args.batch_size, args.lr, args.seed, device)
    probes = train_probes(*parts["train"], num_classes, *settings)

    result = {"checkpoint": str(args.checkpoint), "step": checkpoint.get("step"), "t": args.t}
    result["blocks"] = blocks
    for name, part in parts.items():
        result[name] = accuracies(probes, *part, args.batch_size, device)
    result["images"] = {name: len(labels) for name, (_, labels) in parts.items()}
    return result


def table(result):
    lines = [f"| block | top-1, {result['images']['test']:,} images | on those trained on |", "|---|---|---|"]
    for b, test, train in zip(result["blocks"], result["test"], result["train"], strict=True):
        lines.append(f"| {b} | {100 * test:.1f} % | {100 * train:.1f} % |")
    return "\n".join(lines)


def parse_args(argv=None):
    parser = files.Parser(__file__, __doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="checkpoint or run folder, also an official file")
    add("--data", required=True, help="cache whose images the probes are trained on; it needs no targets")
    add("--test", help="cache of other images (default: every fifth of --data)")
    add("--t", type=number(float, 0, below=1), default=0.5, help="time of flow matching")
    add("--blocks", type=number(int, 1), nargs="+", help="blocks to probe, counted from 1 (default: all)")
    add("--weights", choices=["ema", "model"], default="ema", help="which weights of the checkpoint")
    add("--official", choices=["repa", "sit"], help="origin of an official file, see sample.py")
    add("--epochs", type=number(int, 1), default=90, help="epochs of the probes")
    add("--batch-size", type=number(int, 2), default=16_384, help="images per step of the probes")
    add("--lr", type=number(float, 0), default=1e-3, help="Adam's first learning rate")
    add("--forward-batch", type=number(int, 1), default=64, help="images that the model sees at once")
    add("--seed", type=files.seed_number, default=0, help="seed of noise, first weights and order")
    add("--json", type=Path, help="file for the figures")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with files.program(__file__, args):
        result = probe(args)
        print(table(result))
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
