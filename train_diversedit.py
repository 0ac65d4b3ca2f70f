"""DiverseDiT: long residual connections and a representation-diversity loss (arXiv 2603.04239).

    x_t = (1 - t) x + t eps,   t ~ U[0, 1)                         t = 0 data, t = 1 noise
    L     = |v(x_t, t, y) - (eps - x)|^2  +  w(L_div) L_div  (+ lambda L_repa)
    L_div = (L_orth + L_MI + L_disp) / 3                           over the tokens f_b of m random blocks b
    L_orth = mean over pairs i < j of cos(mean f_i, mean f_j)      means over batch and tokens
    L_MI   = mean over pairs of |mean cos(f_i, f_j)|               mean over batch and tokens
    L_disp = - clip(var(a / max a) / 0.25, 0, 1)                   a [D]: mean |f_b| with every channel normalised
    w(L)   = 0 if L <= 0.1; (L - 0.1) / 0.5 if L <= 0.5; else 1    --div-gate

    x    latents, drawn anew each step from the cached mean and std     m       --div-blocks
    eps  noise                                                          lambda  --repa-weight, 0 by default: no encoder
    v    `model`, a DiverseDiT from dit.py                              L_repa  see train_repa.py
    y    class label, dropped with probability 0.1

Commands
    torchrun --nproc_per_node=8 train_diversedit.py                     the paper's run: XL/2, ImageNet 256 px
    torchrun --nproc_per_node=8 train_diversedit.py --repa-weight 0.5   with REPA
    python train_diversedit.py --micro-batch 32                         one GPU
    python train_diversedit.py --data features/digits --model nano/2 --steps 1000 --batch-size 64 --lr 2e-3 \\
        --ema 0.99 --out runs/diverse                                   minutes on a laptop
    Ablations (tables 6 to 8): --no-long-residuals; --div-terms and one name or none; --div-gate 0.2 0.7; --div-blocks 5

Every script also has control conditioning (--control, --class-tokens) and starts from a lower resolution (--init,
--time-shift, --warmup): arXiv 2411.03177, see README.md.

To resume, run the same command again. The lines of the method stand between `# >>> diversedit` and `# <<< diversedit`;
everything outside is the same text in every train_*.py, by design: to add a method, copy a script and fill the fences.

Shapes in the right margin: N batch, C, H, W latent channels, height, width, T tokens, D width, L blocks.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, default_convert
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import dit
import sample
from extract_features import CachedFeatures, load_autoencoder

NAME = Path(__file__).stem.removeprefix("train_")
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16, for the model FLOP utilisation
MAY_CHANGE = {"data", "out", "steps", "micro_batch", "compile", "workers"}  # when a run is resumed
MAY_CHANGE |= {"log_every", "sample_every", "save_every", "keep_every"}
AT_LEAST = dict(steps=1, batch_size=1, micro_batch=1, log_every=1, sample_every=0, save_every=1, keep_every=1, bench=1)
AT_LEAST |= dict(lr=0, ema=0, seed=0, workers=0, warmup=0, control_drop=0, class_tokens=0)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="features/imagenet256", help="cache made by extract_features.py")
    parser.add_argument("--out", default=f"runs/{NAME}", help="run folder: checkpoints, log.jsonl, sample pictures")
    parser.add_argument("--model", default="XL/2", help=f"SIZE/PATCH, SIZE one of {', '.join(dit.SIZES)}")
    parser.add_argument("--steps", type=int, default=400_000, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=256, help="images per step over all processes")
    parser.add_argument("--micro-batch", type=int, help="images at once per process (default: all of its share)")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate of AdamW")
    parser.add_argument("--ema", type=float, default=0.9999, help="decay of the averaged weights, per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="default: bf16 on CUDA, fp32 on the CPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument("--log-every", type=int, default=50, help="steps between rows of log.jsonl")
    parser.add_argument("--sample-every", type=int, default=10_000, help="steps between pictures; 0: none at all")
    parser.add_argument("--save-every", type=int, default=5_000, help="steps between saves of last.pt")
    parser.add_argument("--keep-every", type=int, default=50_000, help="steps between snapshots STEP.pt")
    parser.add_argument("--workers", type=int, help="loader processes (default: 4 if targets are read, else 0)")
    parser.add_argument("--init", metavar="CKPT", help="start from the EMA weights of this checkpoint where they fit")
    parser.add_argument("--warmup", type=int, default=0, help="first steps, in which the rate rises to --lr")
    parser.add_argument("--time-shift", type=float, help="of dit.shift_time (default: 1; with --init: ratio of sides)")
    parser.add_argument("--control", choices=["none", "constant", "cosine"], default="none", help="size, crop and flip")
    parser.add_argument("--control-alpha", type=float, default=1.0, help="exponent of the cosine weight of the size")
    parser.add_argument("--control-drop", type=float, default=0.1, help="share of images trained without control")
    parser.add_argument("--class-tokens", type=int, default=0, help="show the class as so many tokens, not in adaLN")
    parser.add_argument("--bench", type=int, metavar="N", help="time N steps of the loop against bare steps, and exit")
    # >>> diversedit
    parser.add_argument("--div-blocks", type=int, help="m, blocks drawn per step (default: 10, or all there are)")
    parser.add_argument("--div-gate", type=float, nargs=2, default=[0.1, 0.5], metavar=("LO", "HI"))
    parser.add_argument("--div-terms", nargs="*", choices=TERMS, default=[*TERMS], help="no name: no loss")
    parser.add_argument("--no-long-residuals", action="store_true", help="a plain DiT with the loss alone")
    parser.add_argument("--repa-weight", type=float, default=0.0, help="lambda of train_repa.py; 0: no targets read")
    parser.add_argument("--repa-depth", type=int, help="aligned block (default: L, XL 8; S, B 5; nano 2)")
    # <<< diversedit
    return parser.parse_args(argv)


# >>> diversedit
TERMS = ("orth", "mi", "disp")


def diversity_loss(blocks, terms=TERMS):
    """L_div, the mean of `terms`, and the dict of all three terms, from the tokens of m >= 2 blocks [m, N, T, D]; fp32.

    L_orth in [-1, 1], L_MI in [0, 1], L_disp in [-1, 0] (arXiv 2603.04239, section 3).
    paper: L_MI is a signed mean / official code, here: the absolute value of each pair's mean.
    paper: L_disp without absolute values and scale / official code, here: |.| over its maximum, / 0.25, clipped.
    official code: ten fixed pairs, L_disp of all blocks / here: the chosen blocks and all their pairs, as in the paper.
    """
    with torch.autocast(blocks.device.type, enabled=False):
        f = blocks.float().flatten(1, 2)                                          # (m, N T, D)
        i, j = torch.triu_indices(len(f), len(f), 1, device=f.device)             # all pairs i < j
        means = F.normalize(f.mean(1), dim=-1, eps=1e-8)                          # (m, D)
        tokens = F.normalize(f, dim=-1, eps=1e-8).flatten(1)                      # (m, N T D)
        a = (f.abs().mean(1) / f.norm(dim=1).clamp(min=1e-8)).mean(0)             # (D,)
        values = {
            "orth": (means @ means.T)[i, j].mean(),
            "mi": (tokens @ tokens.T / f.shape[1])[i, j].abs().mean(),
            "disp": -((a / (a.max() + 1e-8)).var(correction=0) / 0.25).clamp(0, 1),
        }
    return torch.stack([values[name] for name in terms]).mean(), values


def gate(loss, low=0.1, high=0.5):
    """w(L): 0 up to `low`, (L - low) / 0.5 up to `high`, then 1. Not detached: between, w L has slope (2L - low) / 0.5.

    The denominator is 0.5, not high - low, in the paper and the official code: w jumps from 0.8 to 1 at 0.5.
    """
    return torch.where(loss <= low, 0.0, torch.where(loss <= high, (loss - low) / 0.5, 1.0))


def mean_over_ranks(loss):
    """The mean of all ranks with the gradient of this rank's part: all ranks are on the same side of the gate."""
    if not dist.is_initialized():
        return loss
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    return loss + (mean - loss.detach())


def choose_blocks(seed, step, blocks, m):
    """m of the block numbers 1 .. `blocks`, the same on every rank."""
    return (np.random.default_rng([seed, step, 1]).choice(blocks, m, replace=False) + 1).tolist()


class Objective(nn.Module):
    """The model, its training-only heads and the loss: one module, so that DDP sees every parameter in one forward."""

    def __init__(self, model, args, meta):
        super().__init__()
        self.model, self.blocks, self.terms, self.band = model, len(model.blocks), args.div_terms, args.div_gate
        self.m = min(10, self.blocks) if args.div_blocks is None else args.div_blocks
        if not 2 <= self.m <= self.blocks:
            raise ValueError(f"--div-blocks {self.m}: pairs need at least 2 blocks, and the model has {self.blocks}")
        if self.band[0] >= self.band[1]:
            raise ValueError("--div-gate {} {}: the first number must be the smaller one".format(*self.band))
        self.repa_weight, self.alignment = args.repa_weight, None
        if self.repa_weight < 0:
            raise ValueError(f"--repa-weight {self.repa_weight}: must not be negative")
        if self.repa_weight > 0:
            from train_repa import Alignment  # REPA + DiverseDiT: tables 1 and 6 of the paper

            size = args.model.split("/")[0]
            depth = {"nano": 2, "S": 5, "B": 5}.get(size, 8)  # REPA's own: 4 for B
            self.repa_depth = depth if args.repa_depth is None else args.repa_depth
            self.alignment = Alignment(model, self.repa_depth, meta)

    def forward(self, x, y, t, eps, drop, chosen, targets=None, control=None):
        """x, eps [N, C, H, W], y, t, drop [N], chosen: m block numbers, targets [N, T, F], control [N, 7] -> losses."""
        t = dit.shift_time(t, self.model.time_shift)
        time = t.view(-1, 1, 1, 1)
        x_t = (1 - time) * x + time * eps                                         # (N, C, H, W)
        # all blocks are tapped, whatever is chosen: one graph for torch.compile, and backward keeps the tokens anyway
        v, tokens = self.model(x_t, t, y, drop=drop, control=control, after=range(1, self.blocks + 1))
        loss = loss_fm = F.mse_loss(v.float(), eps - x)
        losses = {"loss_fm": loss_fm}
        if self.terms:
            loss_div, values = diversity_loss(torch.stack([tokens[b - 1] for b in chosen]), self.terms)
            loss_div = mean_over_ranks(loss_div)
            w = gate(loss_div, *self.band)
            loss = loss + w * loss_div
            losses |= {f"loss_{name}": value for name, value in values.items()}
            losses |= {"loss_div": loss_div, "div_weight": w, "div_closed": (w == 0).float()}
        if self.alignment:
            losses["loss_repa"] = self.alignment(tokens[self.repa_depth - 1], targets)
            loss = loss + self.repa_weight * losses["loss_repa"]
        losses["block_rms"] = torch.stack([f.detach().float().square().mean() for f in tokens]).max().sqrt()
        return {"loss": loss, **losses}


def cka(features):
    """Linear CKA of every pair of blocks with the unbiased HSIC (arXiv 1905.00414): [L, n, D] -> [L, L], float64."""
    n = features.shape[1]
    gram = features.double() @ features.double().mT                               # (L, n, n)
    gram = gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
    row, total = gram.sum(2), gram.sum((1, 2))                                    # (L, n), (L,)
    hsic = gram.flatten(1) @ gram.flatten(1).T - 2 / (n - 2) * row @ row.T
    hsic = hsic + torch.outer(total, total) / ((n - 1) * (n - 2))
    scale = hsic.diagonal().clamp(min=1e-30).sqrt()
    return hsic / torch.outer(scale, scale)


@torch.no_grad()
def report_cka(model, features, seed, path, images=1024, micro=128):
    """CKA of the blocks' token-mean features on real images, the same in every call and spread over the classes.

    Draws the matrices [L, L] at t = 0.05, 0.25, 0.5, 0.75, 0.95 side by side (black 0, white 1) and returns the means
    of their off-diagonal entries by t.
    """
    device, meta, depth = model.pos_embed.device, features.meta, len(model.blocks)
    by_class = np.argsort(features.labels, kind="stable")
    chosen = by_class[np.linspace(0, len(by_class) - 1, min(images, len(by_class))).astype(int)]
    batch = features.__getitems__(chosen * meta["views"])
    mean = torch.as_tensor(batch["moments"]).float()[:, : meta["latent_channels"]]
    x, y = (mean - meta["latent_shift"]) * meta["latent_scale"], torch.as_tensor(batch["labels"])
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    matrices = {}
    for t in (0.05, 0.25, 0.5, 0.75, 0.95):
        pooled = []
        for rows in torch.arange(len(x)).split(micro):
            x_t, time = (1 - t) * x[rows] + t * eps[rows], torch.full((len(rows),), t)
            control = torch.as_tensor(batch["control"])[rows].to(device) if "control" in batch else None
            options = dict(control=control, after=range(1, depth + 1))
            _, tokens = model(x_t.to(device), time.to(device), y[rows].to(device), **options)
            pooled.append(torch.stack([f.mean(1) for f in tokens]))               # (L, rows, D)
        matrices[t] = cka(torch.cat(pooled, dim=1)).cpu().numpy()                 # (L, L)
    pictures = [np.uint8(255 * m.clip(0, 1)) for m in matrices.values()]
    sample.save_grid(np.stack(pictures)[..., None].repeat(3, axis=3), path, columns=5)
    return {str(t): m[~np.eye(depth, dtype=bool)].mean() for t, m in matrices.items()}
# <<< diversedit


def step_generator(seed, step, device):
    """The source of all randomness of one step, on the device."""
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state))


def micro_batches(images, views, batch, micro, accumulation, rank, seed, start):
    """Endless view indices [micro] for this rank from step `start`; an epoch is a permutation, its rest dropped."""
    steps_per_epoch = images // batch
    order_epoch = None
    for step in count(start):
        epoch, i = divmod(step, steps_per_epoch)
        if epoch != order_epoch:
            rng = np.random.default_rng([seed, epoch])
            order_epoch, order = epoch, rng.permutation(images) * views + rng.integers(views, size=images)
        for k in range(rank * accumulation, (rank + 1) * accumulation):
            yield order[i * batch + k * micro :][:micro]


def transfer(path, config):
    """What a model needs of the checkpoint --init to start from it at another resolution (arXiv 2411.03177).

    The grid of its positions, and its time shift times the ratio of the sides. ValueError if the checkpoint has other
    tokens than `config`, so that hardly a weight would fit.
    """
    theirs = sample.read_checkpoint(path)["config"]
    for key in ("patch_size", "hidden_size", "depth", "num_heads"):
        if theirs[key] != config[key]:
            raise ValueError(f"--init {path}: its {key} is {theirs[key]}, that of the model to train {config[key]}")
    alike = theirs["in_channels"] == config["in_channels"]  # latents of another kind have no ratio of resolutions
    grid = theirs["input_size"] // theirs["patch_size"]
    ratio = config["input_size"] / theirs["input_size"] if alike else 1
    return dict(pos_base=theirs.get("pos_base") or grid, time_shift=theirs.get("time_shift", 1.0) * ratio)


def load_init(path, model):
    """Copy the EMA weights of a checkpoint into `model` where names and shapes fit; returns a line that says which."""
    own, found = model.state_dict(), sample.read_checkpoint(path)["ema"]
    fits = {name: value for name, value in found.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict(fits, strict=False)
    resized = {name for name in own.keys() & found.keys() - fits.keys() if name.endswith("pos_embed")}
    new, unused = (names.keys() - fits.keys() - resized for names in (own, found))
    parts = [f"{len(fits)} tensors loaded"]
    for kind, names in (("resized", resized), ("new", new), ("unused", unused)):
        parts.append(f"{kind}: {', '.join(sorted({name.split('.')[0] for name in names})) or 'none'}")
    return f"--init {path}: {'; '.join(parts)}"


def own_session(worker):
    """A loader process out of reach of the signals that end a run: it is needed until the checkpoint is written."""
    os.setsid()


def on_any_rank(flag, device):
    if not dist.is_initialized():
        return bool(flag)
    total = torch.tensor(float(bool(flag)), device=device)
    dist.all_reduce(total)
    return total.item() > 0


def save(path, checkpoint):
    """Write beside the old file, then replace it: a kill or a full disk leaves the old checkpoint whole."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        sys.exit(f"cannot write {path} ({error}); free some space and run the same command again")


def write_rows(path, rows):
    """Replace the log by these rows, at once."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, path)


def write_row(path, row):
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def git_hash():
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def forward_backward(objective, inputs, precision, accumulation):
    with torch.autocast(inputs["x"].device.type, torch.bfloat16, enabled=precision == "bf16"):
        losses = objective(**inputs)
    (losses["loss"] / accumulation).backward()
    return losses


def forward_flops(config):
    """Floating-point operations of the model's forward pass for one image (2 per multiply-accumulate)."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        side, channels = config["input_size"], config["in_channels"]
        dit.build(config)(torch.zeros(1, channels, side, side), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    return counter.get_total_flops()


def peak_flops(device):
    """Of the GPU; None for the CPU and for GPUs that PEAK_FLOPS does not list."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def memory_gb(device):
    """Peak memory of this process in GB: of the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report_bench(timings, loader, batch_size, micro, mfu_scale, device):
    """Print medians of the alternating loop and bare steps (the first tenth warms up), and the loader's own speed."""
    loop, bare = np.array(timings[len(timings) // 10 :]).T
    low, ratio, high = np.percentile(loop / bare, [25, 50, 75])
    rate = batch_size / np.median(loop)
    utilisation = f", MFU {rate * mfu_scale:.1%}" if mfu_scale else ""
    print(f"step {np.median(loop) * 1e3:.1f} ms, bare forward + backward + AdamW {np.median(bare) * 1e3:.1f} ms")
    print(f"ratio {ratio:.3f} (quartiles {low:.3f} to {high:.3f}) over {len(loop)} pairs of steps")
    print(f"{rate:.0f} img/s{utilisation}, {memory_gb(device):.1f} GB")
    began = time.perf_counter()
    for _ in range(200):
        next(loader)
    print(f"loader alone {200 * micro / (time.perf_counter() - began):.0f} samples/s per process")


def main(argv=None):
    args = parse_args(argv)

    # One process, or one per GPU (or CPU) under torchrun
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    args.precision = args.precision or ("bf16" if cuda else "fp32")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")

    out, last = Path(args.out), Path(args.out) / "last.pt"
    try:
        for name, least in AT_LEAST.items():
            if getattr(args, name) is not None and not getattr(args, name) >= least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
        if args.ema > 1 or args.control_drop > 1:
            raise ValueError("--ema and --control-drop must not be above 1")
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out}: is a file; choose a folder")

        # Batch: the global batch is split over processes, then into micro-batches
        micro = args.micro_batch or max(args.batch_size // world, 1)
        accumulation = args.batch_size // (micro * world)
        if micro * world * accumulation != args.batch_size:
            share = f"{world} process(es) x micro-batch {micro}"
            raise ValueError(f"--batch-size {args.batch_size} is not a multiple of {share}")

        # Data, model, heads and loss
        # >>> diversedit
        arch, read_targets = {"arch": "DiT" if args.no_long_residuals else "DiverseDiT"}, args.repa_weight > 0
        # <<< diversedit
        features = CachedFeatures(args.data, targets=read_targets, control=args.control != "none")
        meta = features.meta
        images = len(features.labels)
        if args.batch_size > images:
            raise ValueError(f"--batch-size {args.batch_size} is larger than the {images} images of {args.data}")
        side, channels, classes = meta["latent_side"], meta["latent_channels"], len(meta["classes"])
        config = arch | dict(input_size=side, in_channels=channels, num_classes=classes) | dit.parse_model(args.model)
        config |= dict(control=args.control, control_alpha=args.control_alpha, class_tokens=args.class_tokens)

        # Resume, or start at step 0
        step, checkpoint = 0, sample.read_checkpoint(last) if last.exists() and not args.bench else None
        if checkpoint:
            mine, theirs = vars(args), vars(parse_args([])) | checkpoint["args"]
            different = [key for key in mine if key not in MAY_CHANGE and mine[key] != theirs[key]]
            if different:
                was, now = ({key: each.get(key) for key in different} for each in (theirs, mine))
                raise ValueError(f"{out} holds another run: {was} there, {now} here; choose another --out")
            if checkpoint["data"] != meta:
                raise ValueError(f"{out} holds a run on another cache than {args.data}; choose another --out")
            step, config = checkpoint["step"], checkpoint["config"]
        elif args.init:
            config |= transfer(args.init, config)
        if args.time_shift is not None:
            config["time_shift"] = args.time_shift
        torch.manual_seed(args.seed)
        model = dit.build(config)
        if args.init and not checkpoint:
            message = load_init(args.init, model)
            if rank == 0:
                print(f"{message}; time shift {model.time_shift:g}")
        objective = Objective(model, args, meta).to(device)
        control_table = torch.from_numpy(features.control_table()) if args.control != "none" else None
        autoencoder = load_autoencoder(meta["vae"], device) if rank == 0 and args.sample_every else None
    except (ValueError, OSError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")

    # Averaged weights, optimiser, and the state of an earlier run
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema)).eval()
    ema.update_parameters(model)  # the first call copies, so that the average starts from the initial weights
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, fused=True)
    if checkpoint:
        weights = {f"model.{name}": value for name, value in checkpoint["model"].items()}
        objective.load_state_dict(weights | checkpoint["heads"])
        ema.module.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["opt"])
        del checkpoint
    if args.compile:
        model.compile()
    wrapped = objective
    if world > 1:
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # its successor is too new
        wrapped = DistributedDataParallel(objective, device_ids=[device] if cuda else None, broadcast_buffers=False)

    # Ctrl-C and SIGTERM end the run with a checkpoint; a second one ends a single process at once
    interrupted = []

    def interrupt(number, _):
        if interrupted and world == 1:
            raise KeyboardInterrupt
        interrupted.append(number)

    numbers = [] if args.bench else [signal.SIGINT, signal.SIGTERM]
    handlers = {number: signal.signal(number, interrupt) for number in numbers}

    # Data: moments, labels and targets of this rank's micro-batches, from `step` on
    order = micro_batches(images, meta["views"], args.batch_size, micro, accumulation, rank, args.seed, step)
    workers = min(4, os.cpu_count()) * read_targets if args.workers is None else args.workers  # latents need no help
    options = dict(num_workers=workers, pin_memory=cuda, collate_fn=default_convert, worker_init_fn=own_session)
    loader = iter(DataLoader(features, batch_sampler=order, **options))
    scale, shift = meta["latent_scale"], meta["latent_shift"]

    log = out / "log.jsonl"
    if rank == 0 and not args.bench:
        out.mkdir(parents=True, exist_ok=True)
        lines = log.read_text().splitlines() if log.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may have cut the last one
        write_rows(log, [row for row in rows if row.get("step", 0) <= step])
        versions = dict(python=sys.version.split()[0], torch=torch.__version__, cuda=torch.version.cuda)
        name = torch.cuda.get_device_name() if cuda else "cpu"
        start = dict(argv=sys.argv, versions=versions, device=name, processes=world, git=git_hash())
        write_row(log, start | {"args": vars(args)})
        if step >= args.steps:
            print(f"{last} is at step {step} already; raise --steps to go on")
    bar = tqdm(total=args.steps, initial=step, unit="step", disable=rank > 0)
    peak = peak_flops(device)
    mfu_scale = 3 * forward_flops(config) / world / peak if peak else None  # backward = 2 x forward
    totals, since, clock, timings = 0, step, time.perf_counter(), []

    while step < args.steps:
        began = time.perf_counter()
        # The noise of the global batch comes from (seed, step) and each micro-batch takes its rows of it: a resumed run
        # goes on exactly, and the noise is the same for any number of processes and micro-batches.
        g, shape = step_generator(args.seed, step, device), (args.batch_size, channels, side, side)
        noise = torch.randn(shape, generator=g, device=device)                    # of the autoencoder's posterior
        draws = {
            "t": torch.rand(args.batch_size, generator=g, device=device),
            "eps": torch.randn(shape, generator=g, device=device),
            "drop": torch.rand(args.batch_size, generator=g, device=device) < 0.1,
        }
        if args.control != "none":
            draws["control_drop"] = torch.rand(args.batch_size, generator=g, device=device) < args.control_drop
        means = 0
        for k in range(rank * accumulation, (rank + 1) * accumulation):
            batch = {name: value.to(device, non_blocking=True) for name, value in next(loader).items()}
            mean, std = batch["moments"].float().chunk(2, dim=1)
            rows = slice(k * micro, (k + 1) * micro)
            x = (mean + std * noise[rows] - shift) * scale                        # (N, C, H, W)
            inputs = dict(x=x, y=batch["labels"], **{name: value[rows] for name, value in draws.items()})
            if args.control != "none":
                dropped = inputs.pop("control_drop").unsqueeze(1)
                inputs["control"] = batch["control"].masked_fill(dropped, 0)      # (N, 7), zeros: no control
            if read_targets:
                inputs["targets"] = batch["targets"]
            # >>> diversedit
            inputs["chosen"] = choose_blocks(args.seed, step, objective.blocks, objective.m)
            # <<< diversedit
            with wrapped.no_sync() if world > 1 and (k + 1) % accumulation else nullcontext():
                losses = forward_backward(wrapped, inputs, args.precision, accumulation)
            means = means + torch.stack([value.detach() for value in losses.values()]) / accumulation
        lr = args.lr * min((step + 1) / max(args.warmup, 1), 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        grad_norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        finite = grad_norm.isfinite()
        optimizer.found_inf = (~finite).float()  # a non-finite step skips itself on the device: no host synchronisation
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
        step += 1
        bar.update()
        totals = totals + torch.where(finite, torch.stack([*means, grad_norm, torch.ones_like(grad_norm)]), 0)

        if args.bench:
            synchronize(device)
            middle = time.perf_counter()
            for _ in range(accumulation):
                forward_backward(wrapped, inputs, args.precision, accumulation)
            optimizer.step()
            optimizer.zero_grad()
            synchronize(device)
            timings.append((middle - began, time.perf_counter() - middle))
            if len(timings) == args.bench:
                break
            continue

        stop = step == args.steps
        if world == 1 or step % 10 == 0:  # torchrun leaves 30 s between its signal and a kill
            stop = stop or on_any_rank(interrupted, device)
        if step % args.log_every == 0 or stop:
            if world > 1:
                dist.all_reduce(totals)
            *sums, applied = totals.tolist()
            if applied == 0:
                bar.close()
                which = f"steps {since + 1} to {step}" if step > since + 1 else f"step {step}"
                sys.exit(f"no finite gradient in {which}: lower --lr, or use --precision fp32")
            rate = (step - since) * args.batch_size / (time.perf_counter() - clock)
            row = {"step": step, **{name: s / applied for name, s in zip([*losses, "grad_norm"], sums, strict=True)}}
            row |= {"lr": lr, "img_per_s": rate, "mfu": rate * mfu_scale if peak else None}
            row |= {"memory_gb": memory_gb(device), "skipped": step - since - round(applied / world)}
            bar.set_postfix(loss=f"{row['loss']:.4f}", img_s=f"{rate:.0f}")
            if rank == 0:
                write_row(log, row)
            totals, since, clock = 0, step, time.perf_counter()

        paused = time.perf_counter()
        if rank == 0 and (step % args.save_every == 0 or step % args.keep_every == 0 or stop):
            heads = {name: value for name, value in objective.state_dict().items() if not name.startswith("model.")}
            checkpoint = dict(step=step, args=vars(args), config=config, data=meta, control=control_table, heads=heads)
            checkpoint |= dict(model=model.state_dict(), ema=ema.module.state_dict(), opt=optimizer.state_dict())
            save(last, checkpoint)
            if step % args.keep_every == 0:
                save(out / f"{step:07d}.pt", checkpoint)
        if autoencoder and (step % args.sample_every == 0 or step == args.steps):
            sample.preview(ema.module, meta, autoencoder, out / f"samples-{step:07d}.png", args.seed, control_table)
            # >>> diversedit
            similarity = report_cka(ema.module, features, args.seed, out / f"cka-{step:07d}.png")
            write_row(log, {"step": step, "cka_off_diagonal": similarity})
            # <<< diversedit
        clock += time.perf_counter() - paused  # img_per_s speaks of training alone
        if stop:
            break

    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if args.bench and rank == 0:
        report_bench(timings, loader, args.batch_size, micro, mfu_scale, device)
    if world > 1:
        dist.destroy_process_group()
    if step < args.steps and not args.bench:
        sys.exit(f"interrupted at step {step}; run the same command again to go on" if rank == 0 else 1)


if __name__ == "__main__":
    main()
