"""DiverseDiT: long residual connections and a representation-diversity loss (arXiv 2603.04239).

    x_t = (1 - t) x + t eps,   t ~ U[0, 1)                  t = 0 data, t = 1 noise
    L     = |v(x_t, t, y) - (eps - x)|^2  +  w(L_div) L_div  (+ lambda L_repa)
    L_div = (L_orth + L_MI + L_disp) / 3                    over the tokens f_b of m random blocks b
    L_orth = mean over pairs i < j of cos(mean f_i, mean f_j)    means over batch and tokens
    L_MI   = mean over pairs of |mean cos(f_i, f_j)|        mean over batch and tokens
    L_disp = - clip(var(a / max a) / 0.25, 0, 1)            a [D]: mean |f_b|, every channel normalised
    w(L)   = 0 if L <= 0.1; (L - 0.1) / 0.5 if L <= 0.5; else 1    --div-gate

    x    latents, drawn anew each step                      m       --div-blocks
    eps  noise                                              lambda  --repa-weight, 0 by default: no encoder
    v    `model`, a DiverseDiT from dit.py                  L_repa  see train_repa.py
    y    class label, dropped with probability 0.1

Commands
    python train_diversedit.py --digits                     minutes on a laptop
    torchrun --nproc_per_node=8 train_diversedit.py         the paper's run: XL/2, ImageNet 256 px
    torchrun --nproc_per_node=8 train_diversedit.py --repa-weight 0.5    with REPA
    python train_diversedit.py --micro-batch 32             one GPU
    Ablations (tables 6 to 8): --no-long-residuals; --div-terms and one name or none; --div-gate 0.2 0.7;
    --div-gate -2 -1 for the constant weight 1; --div-blocks 5

To resume, run the same command again. The lines of the method stand between `# >>> diversedit` and
`# <<< diversedit`; everything outside is the same text in every train_*.py, so a diff of two scripts shows
only their methods.

Shapes in the right margin: N batch, C, H, W of the latents, T tokens, D width, L blocks.
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

# >>> diversedit
from PIL import Image, ImageDraw

from train_repa import Alignment  # REPA + DiverseDiT: tables 1 and 6 of the paper
# <<< diversedit

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
    # >>> diversedit
    add = parser.add_argument_group("diversedit").add_argument
    add("--div-blocks", type=number(int, 2), help="m, blocks drawn per step (default: 10, or all there are)")
    add("--div-gate", type=number(float), nargs=2, default=[0.1, 0.5], metavar=("LO", "HI"), help="band of w")
    add("--div-terms", nargs="*", choices=TERMS, default=[*TERMS], help="terms of L_div; no name: no loss")
    add("--no-long-residuals", action="store_true", help="a plain DiT with the loss alone")
    add("--repa-weight", type=number(float, 0), default=0.0, help="lambda of REPA; 0: no targets are read")
    add("--repa-depth", type=number(int, 1), help="aligned block (default: 8; S, B 5; nano 2)")
    # <<< diversedit
    if parser.parse_known_args(argv)[0].digits:
        parser.set_defaults(**digits)
    return parser.parse_args(argv)


# >>> diversedit
TERMS = ("orth", "mi", "disp")


def diversity_loss(blocks, terms=TERMS):
    """L_div, the mean of `terms`, and the dict of all three, of the tokens of m >= 2 blocks [m, N, T, D].

    L_orth in [-1, 1], L_MI in [0, 1], L_disp in [-1, 0] (arXiv 2603.04239, section 3).
    paper: L_MI is a signed mean / official code, here: the absolute value of each pair's mean.
    paper: L_disp without absolute values and scale / official code, here: |.| / max |.| / 0.25, clipped.
    official code: ten fixed pairs, L_disp of all blocks / paper, here: the chosen blocks and all their pairs.
    """
    with torch.autocast(blocks.device.type, enabled=False):
        f = blocks.float().flatten(1, 2)                                          # (m, N T, D)
        i, j = torch.triu_indices(len(f), len(f), 1, device=f.device)             # all pairs i < j
        means = F.normalize(f.mean(1), dim=-1, eps=1e-8)                          # (m, D)
        unit = F.normalize(f, dim=-1, eps=1e-8).transpose(0, 1)                   # (N T, m, D)
        cosines = (unit @ unit.mT).mean(0)                                        # (m, m), mean over tokens
        a = (f.abs().mean(1) / f.norm(dim=1).clamp(min=1e-8)).mean(0)             # (D,)
        values = {
            "orth": (means @ means.T)[i, j].mean(),
            "mi": cosines[i, j].abs().mean(),
            "disp": -((a / (a.max() + 1e-8)).var(correction=0) / 0.25).clamp(0, 1),
        }
    return torch.stack([values[name] for name in terms]).mean(), values


def gate(loss, low=0.1, high=0.5):
    """w(L): 0 up to `low`, (L - low) / 0.5 up to `high`, then 1. Not detached: (w L)' = (2L - low) / 0.5.

    paper, official code: the denominator is 0.5, not high - low, so w jumps from 0.8 to 1 at L = 0.5; it is
    given for [0.1, 0.5] alone / here: 0.5 for every band. A band below every L makes w 1 (table 8).
    """
    return torch.where(loss <= low, 0.0, torch.where(loss <= high, (loss - low) / 0.5, 1.0))


def mean_over_ranks(loss):
    """The mean of all ranks with the gradient of this rank's part: all are on the same side of the gate."""
    if not dist.is_initialized():
        return loss
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    return loss + (mean - loss.detach())


def choose_blocks(seed, step, blocks, m):
    """m of the block numbers 1 .. `blocks`, the same on every rank."""
    return (np.random.default_rng([seed, step, 1]).choice(blocks, m, replace=False) + 1).tolist()


class Objective(nn.Module):
    """Model, training-only heads and loss in one module: DDP sees every parameter in one forward."""

    def __init__(self, model, args, meta):
        super().__init__()
        self.model, self.blocks = model, len(model.blocks)
        self.terms, self.band = args.div_terms, args.div_gate
        self.m = args.div_blocks or min(10, self.blocks)
        if self.m > self.blocks:
            raise ValueError(f"--div-blocks {self.m}: the model has {self.blocks} blocks")
        if self.band[0] >= self.band[1]:
            raise ValueError("--div-gate {} {}: the first number must be the smaller one".format(*self.band))
        self.repa_weight, self.alignment = args.repa_weight, None
        if self.repa_weight > 0:
            depth = {"nano": 2, "S": 5, "B": 5}.get(args.model.split("/")[0], 8)  # REPA's own: 4 for S and B
            self.repa_depth = args.repa_depth or depth
            self.alignment = Alignment(model, self.repa_depth, meta)

    def forward(self, x, y, t, eps, drop, chosen, targets=None, control=None):
        """x, eps [N, C, H, W], y, t, drop [N], chosen blocks, targets [N, T, F], control [N, 7] -> losses."""
        t = dit.shift_time(t, self.model.time_shift)
        time = t.view(-1, 1, 1, 1)
        x_t = (1 - time) * x + time * eps                                         # (N, C, H, W)
        # all blocks are returned, whatever is chosen: backward keeps their tokens anyway
        blocks = range(1, self.blocks + 1)
        v, tokens = self.model(x_t, t, y, drop=drop, control=control, return_blocks=blocks)
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
        norms = torch.stack(torch._foreach_norm([f.detach() for f in tokens]))
        losses["block_rms"] = norms.max() / tokens[0].numel() ** 0.5
        return {"loss": loss, **losses}

    def flops(self, config):
        """Of a training step, per image: the backward pass costs twice the forward pass."""
        return 3 * (dit.forward_flops(config) + (self.alignment.flops if self.alignment else 0))


def cka(features):
    """Linear CKA of all pairs of blocks, unbiased HSIC (arXiv 1905.00414): [L, n, D] -> float64 [L, L]."""
    n = features.shape[1]
    gram = features.double() @ features.double().mT                               # (L, n, n)
    gram = gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
    row, total = gram.sum(2), gram.sum((1, 2))                                    # (L, n), (L,)
    hsic = gram.flatten(1) @ gram.flatten(1).T - 2 / (n - 2) * row @ row.T
    hsic = hsic + torch.outer(total, total) / ((n - 1) * (n - 2))
    scale = hsic.diagonal().clamp(min=1e-30).sqrt()
    return hsic / torch.outer(scale, scale)


@torch.no_grad()
def report_cka(model, features, path, images=1024):
    """CKA of the blocks' token means on fixed images, drawn as matrices [L, L] for five t (black 0, white 1).

    Returns the means of their off-diagonal entries by t.
    """
    device, blocks = model.pos_embed.device, range(1, len(model.blocks) + 1)
    batch = {name: value.to(device) for name, value in features.spread(images).items()}
    x = features.latents(batch["moments"])
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(device)
    means, pictures = {}, []
    for t in (0.05, 0.25, 0.5, 0.75, 0.95):
        x_t, time, pooled = (1 - t) * x + t * eps, torch.full((len(x),), t, device=device), []
        for n in torch.arange(len(x), device=device).split(128):
            control = batch["control"][n] if "control" in batch else None
            _, tokens = model(x_t[n], time[n], batch["labels"][n], control=control, return_blocks=blocks)
            pooled.append(torch.stack([f.mean(1) for f in tokens]))               # (L, n, D)
        matrix = cka(torch.cat(pooled, dim=1)).cpu().numpy()                      # (L, L)
        means[str(t)] = matrix[~np.eye(len(matrix), dtype=bool)].mean()
        picture = Image.fromarray(np.uint8(255 * matrix.clip(0, 1)))
        pictures.append((f"t = {t}", picture.resize((160, 160), Image.Resampling.NEAREST)))
    ramp = np.repeat(np.arange(255, -1, -1, dtype=np.uint8)[:, None], 16, axis=1)
    pictures.append(("0 to 1", Image.fromarray(ramp).resize((16, 160))))
    sheet = Image.new("L", (168 * len(pictures), 180), 96)
    for i, (title, picture) in enumerate(pictures):
        ImageDraw.Draw(sheet).text((168 * i + 4, 2), title, fill=255)
        sheet.paste(picture, (168 * i + 4, 16))
    sheet.save(path)
    return means
# <<< diversedit


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
    # >>> diversedit
    arch, read_targets = {"arch": "DiT" if args.no_long_residuals else "DiverseDiT"}, args.repa_weight > 0
    # <<< diversedit
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
            # >>> diversedit
            part["chosen"] = choose_blocks(args.seed, step, objective.blocks, objective.m)
            # <<< diversedit
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
                # >>> diversedit
                if picture and len(features.labels) > 3:  # unbiased HSIC needs four images
                    row["cka_off_diagonal"] = report_cka(ema.module, features, out / f"cka-{step:07d}.png")
                # <<< diversedit
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
