"""REPA: hidden tokens of a diffusion transformer aligned with a frozen encoder (arXiv 2410.06940).

    x_t = (1 - t) x + t eps,   t ~ U[0, 1)                  t = 0 data, t = 1 noise
    L   = |v(x_t, t, y) - (eps - x)|^2  +  lambda L_repa    mean over batch, channels and pixels
    L_repa = - mean cos(z, h(tokens of block d))            mean over encoders, batch and tokens

    x    latents, drawn anew each step                      z       `targets`, encoder tokens of the image
    eps  noise                                              h       `projectors`, one MLP per encoder
    v    `model`, a DiT from dit.py                         d       --repa-depth, counted from 1
    y    class label, dropped with probability 0.1          lambda  --repa-weight; 0 is the plain SiT

Commands
    python train_repa.py --digits                           two minutes on a laptop
    torchrun --nproc_per_node=8 train_repa.py               the paper's run: XL/2, ImageNet 256 px
    python train_repa.py --micro-batch 32                   the same mathematics on one GPU

To resume, run the same command again. The lines of the method stand between `# >>> repa` and `# <<< repa`;
everything outside is the same text in every train_*.py, so a diff of two scripts shows only their methods.

Shapes in the right margin: N batch, C, H, W of the latents, T tokens, D width, F target width.
"""

import os
import signal
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
from tqdm import tqdm

import dit
import sample
from extract_features import CachedFeatures, Parser, extract_digits, load_autoencoder, number

NAME = Path(__file__).stem.removeprefix("train_")
MAY_CHANGE = {"data", "out", "digits", "steps", "micro_batch", "compile", "workers"}  # when a run is resumed
MAY_CHANGE |= {"log_every", "sample_every", "save_every", "keep_every"}
SIGNALS = []  # those received: see interrupt


def parse_args(argv=None):
    parser = Parser(__file__, __doc__)
    add = parser.add_argument_group("run").add_argument
    add("--digits", action="store_true", help="laptop run: nano/2, 1000 steps of 64 real digits, lr 2e-3")
    add("--data", default="features/imagenet256", help="cache made by extract_features.py")
    add("--out", default=f"runs/{NAME}", help="run folder: checkpoints, log.jsonl, pictures")
    add("--seed", type=number(int, 0, 2**32), default=0, help="seed of weights, order and noise")
    add("--workers", type=number(int, 0, 256), help="loader processes (default: 4 for targets, else 0)")
    add("--log-every", type=number(int, 1), default=50, help="steps between rows of log.jsonl")
    add("--sample-every", type=number(int, 0), default=10_000, help="steps between pictures, 0 for none")
    add("--save-every", type=number(int, 1), default=5_000, help="steps between saves; pictures save, too")
    add("--keep-every", type=number(int, 1), default=50_000, help="steps between snapshots STEP.pt")
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=number(int, 1), default=400_000, help="optimiser steps")
    add("--batch-size", type=number(int, 1), default=256, help="images per step over all processes")
    add("--micro-batch", type=number(int, 1), help="images at once per process (default: all of its share)")
    add("--lr", type=number(float, 0), default=1e-4, help="learning rate of AdamW")
    add("--warmup", type=number(int, 0), default=0, help="linear warm-up steps")
    add("--beta2", type=number(float, 0, 0.999999), default=0.999, help="AdamW's second beta")
    add("--clip", type=number(float, 0), default=1.0, help="largest norm of the gradient, 0 for no clipping")
    add("--ema", type=number(float, 0, 1), default=0.9999, help="decay of the averaged weights, per step")
    cuda = torch.cuda.is_available()
    add("--precision", choices=["bf16", "fp32"], default="bf16" if cuda else "fp32", help="of autocast")
    add("--compile", action="onoff", default=cuda, help="torch.compile the blocks (default: on CUDA)")
    add = parser.add_argument_group("model and conditioning (arXiv 2411.03177)").add_argument
    add("--model", default="XL/2", help=f"SIZE/PATCH, SIZE one of {', '.join(dit.SIZES)}")
    add("--qk-norm", action="store_true", help="LayerNorm on queries and keys")
    add("--control", choices=["none", "constant", "cosine"], default="none", help="size, crop and flip")
    add("--control-alpha", type=number(float, above=0), default=1.0, help="exponent of the cosine weight")
    add("--control-drop", type=number(float, 0, 1), default=0.1, help="share of images without control")
    add("--class-tokens", type=number(int, 0, 1024), default=0, help="feed the class as K extra tokens")
    add("--init", metavar="CKPT", help="start from the EMA weights of this checkpoint where they fit")
    add("--pos-base", type=number(int, 1, 10**4), help="range of positions (default: its grid, or by --init)")
    add("--time-shift", type=number(float, above=0), help="over 1: more noise (default: 1, or by --init)")
    digits = dict(data="features/digits", out=f"runs/{NAME}-digits", model="nano/2", steps=1000)
    digits |= dict(batch_size=64, lr=2e-3, ema=0.99, sample_every=1000, workers=0)
    # >>> repa
    add = parser.add_argument_group("repa").add_argument
    add("--repa-weight", type=number(float, 0), default=0.5, help="lambda; 0: plain SiT, no targets are read")
    add("--repa-depth", type=number(int, 1), help="aligned block d (default: 8; S, B 4, REPA#5; nano 2)")
    digits |= dict(repa_weight=2.0)  # HOG targets at weight 0.5 hardly show
    # <<< repa
    if parser.parse_known_args(argv)[0].digits:
        parser.set_defaults(**digits)
    return parser.parse_args(argv)


# >>> repa
def repa_loss(projected, targets):
    """L_repa = - mean cos(z, z~), in [-1, 1] (arXiv 2410.06940): fp32 scalar, whatever the input's precision.

    projected, targets: lists of [N, T, F], one entry per encoder.
    """
    pairs = zip(projected, targets, strict=True)
    cosines = [F.cosine_similarity(p.float(), z.float(), dim=-1).mean() for p, z in pairs]
    return -torch.stack(cosines).mean()


def projector(width, target_width, hidden):
    """The MLP h from hidden tokens to encoder tokens: three linear layers, SiLU, Xavier weights."""
    linears = [nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, target_width)]
    for linear in linears:
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(linears[0], nn.SiLU(), linears[1], nn.SiLU(), linears[2])


class Alignment(nn.Module):
    """L_repa of one block's tokens, and its projectors. ValueError if there is no such block."""

    def __init__(self, model, depth, meta):
        super().__init__()
        width = model.pos_embed.shape[-1]
        if depth > len(model.blocks):
            raise ValueError(f"--repa-depth {depth}: the model has blocks 1 to {len(model.blocks)}")
        self.target_widths = meta["target_widths"]
        hidden = 2048 if width >= dit.SIZES["S"][1] else 4 * width  # nano is no size of the paper
        self.projectors = nn.ModuleList(projector(width, n, hidden) for n in self.target_widths)
        matrices = [p for p in self.projectors.parameters() if p.ndim == 2]
        self.flops = 2 * model.grid**2 * sum(p.numel() for p in matrices)         # forward, of T tokens

    def forward(self, tokens, targets):                                           # (N, T, D), (N, T, all F)
        projected = [h(tokens) for h in self.projectors]                          # (N, T, F) each
        return repa_loss(projected, targets.split(self.target_widths, dim=-1))


def cknna(f, g, k=10):
    """Alignment of features f [n, D] and g [n, F] of n images, 1 if alike: a float (arXiv 2405.07987).

    Centred kernels are correlated over the pairs (i, j) with j among the k nearest neighbours of i in both.
    """

    def local_kernel(features):
        features = F.normalize(features.double(), dim=1)
        kernel = features @ features.T                                            # (n, n)
        nearest = kernel.clone().fill_diagonal_(-2).topk(k).indices               # (n, k), never i itself
        return torch.zeros_like(kernel).scatter(1, nearest, 1) * (kernel - kernel.mean(1, keepdim=True))

    K, L = local_kernel(f), local_kernel(g)                 # 0 but for neighbours; K L: but for mutual ones
    return ((K * L).sum() / (K.square().sum() * L.square().sum()).sqrt()).item()


@torch.no_grad()
def report_cknna(model, features, images=256):
    """CKNNA of each block's token means with those of the targets, {t: [value by block]}, on fixed images."""
    device, blocks, report = model.pos_embed.device, range(1, len(model.blocks) + 1), {}
    batch = {name: value.to(device) for name, value in features.spread(images).items()}
    x, targets = features.latents(batch["moments"]), batch["targets"].float().mean(1)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(device)
    for t in (0.25, 0.5):
        x_t, times, means = (1 - t) * x + t * eps, torch.full((len(x),), t, device=device), []
        for i in torch.arange(len(x), device=device).split(32):
            control = batch["control"][i] if "control" in batch else None
            _, tokens = model(x_t[i], times[i], batch["labels"][i], control=control, return_blocks=blocks)
            means.append(torch.stack([z.mean(1) for z in tokens]))                # (blocks, n, D)
        report[str(t)] = [cknna(block, targets) for block in torch.cat(means, dim=1)]
    return report


class Objective(nn.Module):
    """Model, training-only heads and loss in one module: DDP sees every parameter in one forward."""

    def __init__(self, model, args, meta):
        super().__init__()
        self.model, self.weight = model, args.repa_weight
        self.depth = args.repa_depth or {"nano": 2, "S": 4, "B": 4}.get(args.model.split("/")[0], 8)
        self.alignment = Alignment(model, self.depth, meta) if self.weight > 0 else None

    def forward(self, x, y, t, eps, drop, targets=None, control=None):
        """x, eps [N, C, H, W], y, t, drop [N], targets [N, T, sum of F], control [N, 7] -> named losses."""
        t = dit.shift_time(t, self.model.time_shift)
        time = t.view(-1, 1, 1, 1)
        x_t = (1 - time) * x + time * eps                                         # (N, C, H, W)
        v, tokens = self.model(x_t, t, y, drop=drop, control=control, return_blocks=[self.depth])
        loss = loss_fm = F.mse_loss(v.float(), eps - x)
        losses = {"loss_fm": loss_fm}
        if self.alignment:
            losses["loss_repa"] = self.alignment(tokens[0], targets)
            loss = loss_fm + self.weight * losses["loss_repa"]
        return {"loss": loss, **losses}

    def flops(self, config):
        """Of a training step, per image: the backward pass costs twice the forward pass."""
        return 3 * (dit.forward_flops(config) + (self.alignment.flops if self.alignment else 0))
# <<< repa


def step_generator(seed, step, device):
    """The source of all randomness of one step, on the device."""
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state))


def data_order(images, views, batch, rows, seed, start):
    """Indices of this process's `rows` (a slice) of each global batch, from step `start` on, without end.
    An epoch is a permutation of the images, each with one of its views; an incomplete batch is dropped."""
    steps_per_epoch = images // batch
    for step in count(start):
        epoch, i = divmod(step, steps_per_epoch)
        if step == start or i == 0:
            rng = np.random.default_rng([seed, epoch])
            # view v of image i has index i * views + v
            order = rng.permutation(images) * views + rng.integers(views, size=images)
        yield order[i * batch : (i + 1) * batch][rows]


def prepare(args, world):
    """Look at the command, the cache and the run folder; write nothing. ValueError if anything is wrong.

    Returns the cache, the config of the model, and the checkpoint to resume, or None.
    """
    # >>> repa
    arch, read_targets = {"arch": "DiT"}, args.repa_weight > 0
    # <<< repa
    pieces = world * (args.micro_batch or 1)
    if args.batch_size % pieces:
        raise ValueError(f"--batch-size {args.batch_size}: not a multiple of {pieces} (processes x micro)")
    config = arch | dit.parse_model(args.model)
    features = CachedFeatures(args.data, targets=read_targets, control=args.control != "none")
    if args.batch_size > len(features.labels):
        raise ValueError(f"--batch-size {args.batch_size}: {args.data} has {len(features.labels)} images")
    options = "qk_norm class_tokens control control_alpha".split()
    config |= features.model_options(config["patch_size"]) | {name: getattr(args, name) for name in options}
    checkpoint = sample.read_run(args.out, vars(args), features.meta, MAY_CHANGE)
    if checkpoint:
        config = checkpoint["config"]
    elif args.init:
        config |= dit.inherit_config(config, sample.read_checkpoint(args.init)["config"])
    overrides = dict(pos_base=args.pos_base, time_shift=args.time_shift)
    config |= {name: value for name, value in overrides.items() if value is not None}
    dit.check_memory(config, args.micro_batch or args.batch_size // world, args.precision)
    return features, config, checkpoint


def interrupt(signum, _):
    """Ctrl-C or SIGTERM: end the run with a checkpoint; a second one ends a single process at once."""
    if SIGNALS and "RANK" not in os.environ:
        raise KeyboardInterrupt
    SIGNALS.append(signum)
    os.write(2, b"\nfinishing this step, then saving\n")  # print is not safe in a signal handler


def interrupted(step, device):
    """Whether any process got a signal. Under torchrun the processes ask one another every tenth step."""
    if not dist.is_initialized():
        return len(SIGNALS) > 0
    signals = torch.tensor(float(len(SIGNALS)), device=device)
    if step % 10 == 0:
        dist.all_reduce(signals)
    return step % 10 == 0 and signals.item() > 0


def launch():
    """One process, or one per GPU (or CPU) under torchrun: rank, number of processes, device."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if world > 1:
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # its successor is too new
        dist.init_process_group("nccl" if cuda else "gloo")
        sys.stdout = sys.stdout if rank == 0 else open(os.devnull, "w")  # one process prints
    return rank, world, device


def main(argv=None):
    args = parse_args(argv)
    if args.digits and args.data == "features/digits":
        extract_digits(args.data)
    rank, world, device = launch()

    # Prepare and build: model, heads and loss, averaged weights, optimiser; then restore an earlier start
    out, step = Path(args.out), 0
    try:
        features, config, checkpoint = prepare(args, world)
        torch.manual_seed(args.seed)
        model = dit.build(config)
        if args.init and not checkpoint:
            line = dit.inherit_weights(model, sample.read_checkpoint(args.init)["ema"])
            print(f"--init {args.init}: {line}; time shift {model.time_shift:g}")
        objective = Objective(model, args, features.meta).to(device)
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema)).eval()
        ema.update_parameters(model)  # the first call copies: the average starts from the initial weights
        parameters = [p for p in objective.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, args.lr, (0.9, args.beta2), weight_decay=0, fused=True)
        if checkpoint:
            step = checkpoint["step"]
            sample.restore(checkpoint, objective, ema.module, optimizer)
        if args.compile:
            dit.compile_blocks(objective)
        if rank == 0 and args.sample_every:
            vae = load_autoencoder(features.meta["vae"], device)
        _lock = sample.start_run(args, step, world, model) if rank == 0 else None  # held to the end
    except (ValueError, OSError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    wrapped = objective
    if world > 1:
        wrapped = DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)

    # Data: this process's rows of each global batch, in micro-batches
    images, share = args.batch_size, args.batch_size // world
    micro = args.micro_batch or share
    rows, accumulation = slice(rank * share, (rank + 1) * share), share // micro
    order = data_order(len(features.labels), features.meta["views"], images, rows, args.seed, step)
    loader = features.loader(order, args.workers, device.type == "cuda")
    latent = model.in_channels, config["input_size"], config["input_size"]

    bar = tqdm(total=args.steps, initial=step, unit="step", disable=None if rank == 0 else True)
    early = {args.sample_every // n for n in (2, 4, 8, 16)} | {args.steps}  # more pictures
    flops, totals, skipped, since, clock = objective.flops(config), 0, 0, step, time.perf_counter()

    while step < args.steps:
        # The noise of a global batch comes from (seed, step), and a process takes its rows of it: a resumed
        # run goes on exactly, and the noise is the same for any number of processes and micro-batches.
        draw = dict(generator=step_generator(args.seed, step, device), device=device)
        noise = torch.randn(images, *latent, **draw)                              # of the VAE's posterior
        draws = {"t": torch.rand(images, **draw), "eps": torch.randn(images, *latent, **draw)}
        draws["drop"] = torch.rand(images, **draw) < model.y_embedder.dropout_prob
        if args.control != "none":
            draws["keep"] = torch.rand(images, 1, **draw) >= args.control_drop
        inputs = {name: value[rows] for name, value in draws.items()}
        inputs |= {name: value.to(device, non_blocking=True) for name, value in next(loader).items()}
        inputs |= dict(x=features.latents(inputs.pop("moments"), noise[rows]), y=inputs.pop("labels"))
        if args.control != "none":
            inputs["control"] = inputs["control"] * inputs.pop("keep")            # (N, 7), zeros: no control
        means = 0
        for start in range(0, share, micro):
            part = {name: value[start : start + micro] for name, value in inputs.items()}
            with nullcontext() if world == 1 or start + micro == share else wrapped.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                    losses = wrapped(**part)
                (losses["loss"] / accumulation).backward()
            means = means + torch.stack([value.detach() for value in losses.values()]) / accumulation

        lr = args.lr * min((step + 1) / max(args.warmup, 1), 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.clip or np.inf)
        finite = grad_norm.isfinite()
        optimizer.found_inf = (~finite).float()  # fused AdamW skips the step where this is 1: no host sync
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
        step += 1
        bar.update()
        totals = totals + torch.where(finite, torch.stack([*means, grad_norm, torch.ones_like(grad_norm)]), 0)
        skipped = torch.where(finite, 0, skipped + 1)

        stop = step == args.steps or interrupted(step, device)
        picture = args.sample_every and (step % args.sample_every == 0 or step in early)
        log = stop or picture or step % args.log_every == 0
        if (log or step % 100 == 0) and skipped >= min(100, step):
            terms = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
            sys.exit(f"step {step}: no finite gradient in {int(skipped)} steps, {terms}: lower --lr, or fp32")
        if log:
            if world > 1:
                dist.all_reduce(totals)
            *sums, applied = totals.tolist()  # the last one counts the steps that were applied
            row = {name: s / max(applied, 1) for name, s in zip([*losses, "grad_norm"], sums, strict=True)}
            rate = (step - since) * images / (time.perf_counter() - clock)
            row = {"step": step, **row, "skipped": step - since - round(applied / world), "lr": lr}
            row |= {"img_per_s": rate, "tflops": rate * flops / world / 1e12}
            row |= {"memory_gb": torch.cuda.max_memory_allocated() / 1e9}         # 0 without a GPU
            if rank == 0:
                # >>> repa
                if picture and "targets" in features.arrays and len(features.labels) > 10:  # ten neighbours
                    row["cknna"] = report_cknna(ema.module, features)
                # <<< repa
                sample.write_row(out / "log.jsonl", row, bar)
        if rank == 0 and (stop or picture or step % args.save_every == 0 or step % args.keep_every == 0):
            heads = {name: x for name, x in objective.state_dict().items() if not name.startswith("model.")}
            state = dict(step=step, args=vars(args), config=config, data=features.meta)
            state |= dict(control=features.control_table, opt=optimizer.state_dict())
            state |= dict(model=model.state_dict(), ema=ema.module.state_dict(), heads=heads)
            sample.write_checkpoint(out / "last.pt", state)
            if step % args.keep_every == 0:
                sample.write_checkpoint(out / f"{step:07d}.pt", state)
        if picture and rank == 0:
            sample.preview(ema.module, features, vae, out / f"samples-{step:07d}.png", args.seed)
        if log:  # only now, so that img_per_s is that of training alone
            totals, since, clock = 0, step, time.perf_counter()
        if stop:
            break

    bar.close()
    if world > 1:
        dist.destroy_process_group()
    if step < args.steps:
        sys.exit(f"interrupted at step {step}; run the same command again to go on" if rank == 0 else 1)
    print(f"{out} is at step {step}; pictures: {out}/samples-*.png")


if __name__ == "__main__":
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt)
    try:
        main()
    except OSError as error:  # a full disk, a folder that is gone
        sys.exit(f"{Path(__file__).name}: {error}")
