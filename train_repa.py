"""REPA: hidden tokens of a diffusion transformer aligned with a frozen encoder (arXiv 2410.06940).

    x_t = (1 - t) x + t eps,   t ~ U[0, 1)                         t = 0 data, t = 1 noise
    L   = |v(x_t, t, y) - (eps - x)|^2  +  lambda L_repa           mean over batch, channels and pixels
    L_repa = - mean cos(z, h(tokens of block d))                   mean over encoders, batch and tokens

    x    latents, drawn anew each step from the cached mean and std     z       `targets`, tokens of the clean image
    eps  noise                                                          h       `projectors`, one MLP per encoder
    v    `model`, a DiT from dit.py                                     d       --repa-depth, counted from 1
    y    class label, dropped with probability 0.1                      lambda  --repa-weight; 0 is the plain SiT

Commands
    torchrun --nproc_per_node=8 train_repa.py                           the paper's run: XL/2, ImageNet 256 px
    python train_repa.py --micro-batch 32                               the same mathematics on one GPU
    python train_repa.py --data features/digits --model nano/2 --steps 1000 --batch-size 64 --lr 2e-3 --ema 0.99 \\
        --out runs/digits                                               three minutes on a laptop

Every script also has control conditioning (--control, --class-tokens) and starts from a lower resolution (--init,
--time-shift, --warmup): arXiv 2411.03177, see README.md.

To resume, run the same command again. The lines of the method stand between `# >>> repa` and `# <<< repa`; everything
outside is the same text in every train_*.py, by design: to add a method, copy this file and fill the fences.

Shapes in the right margin: N batch, C, H, W latent channels, height, width, T tokens, D width, F target width.
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
    # >>> repa
    parser.add_argument("--repa-weight", type=float, default=0.5, help="lambda; 0: plain SiT, no targets are read")
    parser.add_argument("--repa-depth", type=int, help="aligned block d (default: L, XL 8; S, B 4, REPA#5; nano 2)")
    # <<< repa
    return parser.parse_args(argv)


# >>> repa
def repa_loss(projected, targets):
    """L_repa = - mean cos(z, z~), in [-1, 1] (arXiv 2410.06940): fp32 scalar, whatever the input's precision.

    projected, targets: lists of [N, T, F], one entry per encoder.
    """
    cosines = [F.cosine_similarity(p.float(), z.float(), dim=-1) for p, z in zip(projected, targets, strict=True)]
    return -torch.stack([cosine.mean() for cosine in cosines]).mean()


def projector(width, target_width, hidden):
    """The MLP h from hidden tokens to encoder tokens: three linear layers and SiLU, initialised like the DiT."""
    linears = [nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, target_width)]
    for linear in linears:
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(linears[0], nn.SiLU(), linears[1], nn.SiLU(), linears[2])


class Alignment(nn.Module):
    """L_repa of the tokens of one block, and the projectors it trains. ValueError if depth or token grid do not fit."""

    def __init__(self, model, depth, meta):
        super().__init__()
        width, grid, patch = model.pos_embed.shape[-1], model.grid, model.patch_size
        if not 1 <= depth <= len(model.blocks):
            raise ValueError(f"--repa-depth {depth}: the model has blocks 1 to {len(model.blocks)}")
        if meta["grid"] != grid:
            found = f"the cache has targets for {meta['grid']}x{meta['grid']} tokens, the model {grid}x{grid} tokens"
            remedy = f"train with patch {meta['latent_side'] // meta['grid']}, or extract with --patch {patch}"
            raise ValueError(f"{found}: {remedy}")
        self.target_widths = meta["target_widths"]
        hidden = 2048 if width >= dit.SIZES["S"][1] else 4 * width  # nano, which is no size of the paper
        self.projectors = nn.ModuleList(projector(width, target_width, hidden) for target_width in self.target_widths)

    def forward(self, tokens, targets):                                           # (N, T, D), (N, T, sum of F)
        projected = [h(tokens) for h in self.projectors]                          # (N, T, F) each
        return repa_loss(projected, targets.split(self.target_widths, dim=-1))


class Objective(nn.Module):
    """The model, its training-only heads and the loss: one module, so that DDP sees every parameter in one forward."""

    def __init__(self, model, args, meta):
        super().__init__()
        self.model, self.weight = model, args.repa_weight
        size = args.model.split("/")[0]
        self.depth = {"nano": 2, "S": 4, "B": 4}.get(size, 8) if args.repa_depth is None else args.repa_depth
        if not self.weight >= 0:
            raise ValueError(f"--repa-weight {self.weight}: must not be negative")
        self.alignment = Alignment(model, self.depth, meta) if self.weight > 0 else None

    def forward(self, x, y, t, eps, drop, targets=None, control=None):
        """x, eps [N, C, H, W], y, t, drop [N], targets [N, T, sum of F], control [N, 7] -> named scalar losses."""
        t = dit.shift_time(t, self.model.time_shift)
        time = t.view(-1, 1, 1, 1)
        x_t = (1 - time) * x + time * eps                                         # (N, C, H, W)
        v, tokens = self.model(x_t, t, y, drop=drop, control=control, after=[self.depth])
        loss = loss_fm = F.mse_loss(v.float(), eps - x)
        losses = {"loss_fm": loss_fm}
        if self.alignment:
            losses["loss_repa"] = self.alignment(tokens[0], targets)
            loss = loss_fm + self.weight * losses["loss_repa"]
        return {"loss": loss, **losses}
# <<< repa


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
        # >>> repa
        arch, read_targets = {"arch": "DiT"}, args.repa_weight > 0
        # <<< repa
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
