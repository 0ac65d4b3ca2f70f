"""SD-DiT: a masked student, an EMA teacher and self-supervised discrimination, with EDM (arXiv 2403.17004).

    x_S = x + sigma z,  ln sigma ~ N(-1.2, 1.2^2)   student's view, 20 % of its patches masked before the encoder
    x_T = x + 0.002 z                               teacher's view, nothing masked
    L     = L_G + weight (L_cls + L_patch)
    L_G   = |F(c_in x_S, c_noise, y) - F*|^2        F* = ((sigma / sigma_d) x - sigma_d z) / sqrt(sigma^2 + sigma_d^2)
    L_cls, L_patch = - sum_k P_T log P_S            CLS token; mean over the visible patches
    P_S = softmax(s / tau_s),  P_T = softmax((t - C) / tau_t)       s, t: cosines with K prototypes
    C <- 0.9 C + 0.1 mean t,   teacher <- m teacher + (1 - m) student

    x    latents, drawn anew each step from the cached mean and std     C      centres of CLS and of patches
    z    noise, `eps` in the code                                       m      0.996 -> 0.999, cosine over the run
    F    `model`, an SDDiT from dit.py                                  tau_t  0.09 -> 0.099 over the first 5 epochs
    y    class label, dropped with probability 0.1 for both networks    weight --sd-weight; 0: no teacher at all
    L_G is EDM's weighted error of the denoiser D, written for F: the weight times c_out^2 is 1.

Commands
    torchrun --nproc_per_node=8 train_sddit.py                          XL/2, ImageNet 256 px, 400K steps, bf16
    torchrun --nproc_per_node=8 train_sddit.py --steps 2400000 --precision fp32     the paper's longest table row
    python train_sddit.py --micro-batch 32                              one GPU
    python train_sddit.py --data features/digits --model nano/2 --steps 1000 --batch-size 64 --lr 2e-3 --ema 0.99 \\
        --teacher-momentum 0.9 0.99 --tau-t 0.06 0.06 --out runs/sddit     minutes on a laptop
    Ablations (table 3 and figures): --sd-weight 0; --mask-ratio 0.5; --teacher-noise 0.3 or student; --no-cls-condition

Every script also has control conditioning (--control, --class-tokens) and starts from a lower resolution (--init,
--time-shift, --warmup): arXiv 2411.03177, see README.md.

To resume, run the same command again. The lines of the method stand between `# >>> sddit` and `# <<< sddit`; everything
outside is the same text in every train_*.py, by design: to add a method, copy a script and fill the fences.

Shapes in the right margin: N batch, C, H, W latent channels, height, width, T patches, V visible ones, D width,
K prototypes, B bottleneck of the head, M tokens.
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
    # >>> sddit
    parser.add_argument("--mask-ratio", type=float, default=0.2, help="share of the student's patches to mask, [0, 1)")
    parser.add_argument("--sd-weight", type=float, default=1.0, help="weight of L_cls + L_patch; 0: no teacher")
    parser.add_argument("--teacher-noise", default="0.002", help="sigma of the teacher's view, or student: drawn alike")
    parser.add_argument("--no-cls-condition", action="store_true", help="keep the CLS token out of the decoder")
    parser.add_argument("--prototypes", type=int, help="K (default: 8192; 256 for nano)")
    parser.add_argument("--tau-s", type=float, default=0.1, help="temperature of the student")
    parser.add_argument("--tau-t", type=float, nargs=2, default=[0.09, 0.099], help="teacher's, first and from epoch 5")
    parser.add_argument("--teacher-momentum", type=float, nargs=2, default=[0.996, 0.999], help="m, first and last")
    # <<< sddit
    return parser.parse_args(argv)


# >>> sddit
def view_noise(t):
    """Uniform t in [0, 1) -> sigma with ln sigma ~ N(-1.2, 1.2^2): the inverse normal distribution of t."""
    return torch.exp(1.2 * torch.special.ndtri(t.clamp(1e-7, 1 - 1e-7)) - 1.2)


def generative_loss(output, x, eps, sigma, sigma_data=0.5):
    """L_G = mean (F - F*)^2 over all patches: EDM's weighted denoising loss (arXiv 2206.00364), free of its weight."""
    sigma = sigma.view(-1, 1, 1, 1)
    target = (sigma / sigma_data * x - sigma_data * eps) / (sigma**2 + sigma_data**2).sqrt()
    return F.mse_loss(output.float(), target)


def discriminative_loss(student, teacher, center, tau_s, tau_t):
    """Cross-entropy - sum_k P_T log P_S of each token [M], and P_T [M, K], from logits [M, K] of both networks."""
    p_t = ((teacher - center) / tau_t).softmax(-1).detach()
    s = student / tau_s
    return s.logsumexp(-1) - (p_t * s).sum(-1), p_t


def teacher_temperature(epoch, first=0.09, last=0.099, epochs=5):
    """Linear from `first` in epoch 0 to `last` in epoch epochs - 1, then constant."""
    return first + (last - first) * min(epoch / (epochs - 1), 1)


def teacher_momentum(step, steps, first=0.996, last=0.999):
    """`first` at the start, `last` at the end of the run, half a cosine in between."""
    return last - (last - first) * (np.cos(np.pi * step / steps) + 1) / 2


class Head(nn.Module):
    """DINO's projection head on encoder outputs: LayerNorm, MLP to a unit vector, cosines with K unit prototypes.

    paper: no sizes / here: iBOT's 2048, 256 and K = 8192, shared by CLS and patches, which give the published count.
    """

    def __init__(self, width, hidden=2048, bottleneck=256, prototypes=8192):
        super().__init__()
        linears = [nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, bottleneck)]
        self.mlp = nn.Sequential(linears[0], nn.GELU(), linears[1], nn.GELU(), linears[2])
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        for linear in linears:
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(self, tokens):                                                    # (..., D)
        tokens = F.layer_norm(tokens.float(), tokens.shape[-1:], eps=1e-6)
        return F.normalize(self.mlp(tokens), dim=-1, eps=1e-6)                    # (..., B)

    def logits(self, features):                                                   # (M, B)
        return features @ F.normalize(self.prototypes, dim=-1, eps=1e-6).T        # (M, K)


class Objective(nn.Module):
    """The model, its training-only heads and the loss: one module, so that DDP sees every parameter in one forward."""

    def __init__(self, model, args, meta):
        super().__init__()
        nano, patches = args.model.startswith("nano/"), model.grid**2
        prototypes = args.prototypes or (256 if nano else 8192)
        self.keep = int(patches * (1 - args.mask_ratio) + 1e-6)  # visible patches
        if not 0 <= args.mask_ratio < 1 or self.keep < 1:
            raise ValueError(f"--mask-ratio {args.mask_ratio}: must lie in [0, 1) and keep one of {patches} patches")
        fixed = args.teacher_noise.replace(".", "", 1)
        if args.teacher_noise != "student" and (not fixed.isdecimal() or int(fixed) == 0):
            raise ValueError(f"--teacher-noise {args.teacher_noise}: expected a noise level such as 0.002, or student")
        if not all(0 < tau < np.inf for tau in (args.tau_s, *args.tau_t)) or prototypes < 2:
            raise ValueError("--tau-s and --tau-t must be positive, and --prototypes at least 2")
        if not 0 <= args.sd_weight < np.inf or not all(0 <= m <= 1 for m in args.teacher_momentum):
            raise ValueError("--sd-weight must not be negative, and --teacher-momentum lie in [0, 1]")
        self.model, self.weight, self.tau_s, self.tau_range = model, args.sd_weight, args.tau_s, args.tau_t
        self.teacher_noise, self.momenta = args.teacher_noise, args.teacher_momentum
        self.steps, self.epoch_steps = args.steps, (meta["count"] - len(meta["skipped"])) // args.batch_size
        if self.weight == 0:
            return
        from copy import deepcopy  # the module's imports are those of the other scripts

        width = model.pos_embed.shape[-1]
        self.head = Head(width, prototypes=prototypes, **(dict(hidden=256, bottleneck=64) if nano else {}))
        self.teacher = deepcopy(model)
        for name in ("cls_embedder", "decoder_embed", "decoder_pos_embed", "decoder_blocks", "final_layer"):
            delattr(self.teacher, name)  # the teacher is an encoder
        self.teacher_head = deepcopy(self.head)
        self.teacher.requires_grad_(False).eval()
        self.teacher_head.requires_grad_(False)
        self.register_buffer("centers", torch.zeros(2, prototypes))               # of CLS and of patches
        self.register_buffer("seen", torch.zeros(2, prototypes), persistent=False)  # means of this step's micro-batches

    def visible(self, mask_noise):
        """Uniform noise [N, T] -> indices of a random subset of the patches for every image: [N, V]."""
        return mask_noise.argsort(dim=1)[:, : self.keep]

    def forward(self, x, y, t, eps, drop, mask_noise, teacher_t, step, control=None):
        """x, eps [N, C, H, W], y, t, drop, teacher_t [N], mask_noise [N, T], step, control [N, 7] -> named scalars."""
        shift = self.model.time_shift
        sigma = shift * view_noise(t)                                             # (N,)
        keep = self.visible(mask_noise)                                           # (N, V)
        x_s = x + sigma.view(-1, 1, 1, 1) * eps
        output, tokens = self.model(x_s, sigma, y, drop=drop, control=control, keep=keep, encoded=True)
        loss_edm = generative_loss(output, x, eps, sigma)
        if self.weight == 0:
            return {"loss": loss_edm, "loss_edm": loss_edm}

        with torch.no_grad():
            alike = self.teacher_noise == "student"
            sigma_t = shift * (view_noise(teacher_t) if alike else torch.full_like(t, float(self.teacher_noise)))
            x_t = x + sigma_t.view(-1, 1, 1, 1) * eps
            teacher_tokens, _, _ = self.teacher.encode(x_t, sigma_t, y, drop, control=control)     # (N, 1 + T, D)
        with torch.autocast(x.device.type, enabled=False):  # head, softmax and loss in fp32: arXiv 2403.17004 saw NaN
            with torch.no_grad():
                teacher = self.teacher_head(teacher_tokens)                       # (N, 1 + T, B)
                # logits are linear in the features, so the mean logit is the logit of the mean feature
                self.seen += self.teacher_head.logits(torch.stack([teacher[:, 0].mean(0), teacher[:, 1:].mean((0, 1))]))
            student = self.head(tokens)                                           # (N, 1 + V, B)
            same = keep.unsqueeze(2).expand(-1, -1, student.shape[2])             # (N, V, B): patch by patch
            student_patches = student[:, 1:].flatten(0, 1)                        # (M, B)
            teacher_patches = teacher[:, 1:].gather(1, same).flatten(0, 1)
            tau_t = teacher_temperature(step // self.epoch_steps, *self.tau_range)
            loss_cls, cls_monitors = self.discriminate(student[:, 0], teacher[:, 0], self.centers[0], tau_t)
            loss_patch, monitors = self.discriminate(student_patches, teacher_patches, self.centers[1], tau_t)
            monitors["cls_entropy"] = cls_monitors["teacher_entropy"]
            monitors["cls_batch_entropy"] = cls_monitors["batch_entropy"]         # no more than that: one CLS for all
            monitors["head_std"] = student_patches.detach().std(0).mean() * student.shape[2] ** 0.5
        loss = loss_edm + self.weight * (loss_cls + loss_patch)
        return {"loss": loss, "loss_edm": loss_edm, "loss_cls": loss_cls, "loss_patch": loss_patch, **monitors}

    def discriminate(self, student, teacher, center, tau_t, chunk=1024):
        """Mean cross-entropy of M tokens from their head features [M, B], and the monitors of collapse.

        In chunks that are computed again in the backward pass: there are never more than `chunk` x K logits of a kind.
        """

        def part(student, teacher):
            logits = self.head.logits(student), self.teacher_head.logits(teacher)
            loss, p_t = discriminative_loss(*logits, center, self.tau_s, tau_t)
            entropy = torch.special.entr(p_t).sum(-1)
            used = torch.zeros_like(center).index_fill(0, p_t.argmax(-1), 1.0)
            return loss.sum(), entropy.sum(), p_t.sum(0), used

        pieces = zip(student.split(chunk), teacher.split(chunk), strict=True)
        sums = [torch.utils.checkpoint.checkpoint(part, *piece, use_reentrant=False) for piece in pieces]
        loss, entropy, p_t, used = (torch.stack(column).sum(0) for column in zip(*sums, strict=True))
        loss, entropy, p_t = loss / len(student), entropy / len(student), p_t / len(student)
        monitors = {
            "teacher_entropy": entropy,                                           # ln K: uniform collapse
            "batch_entropy": torch.special.entr(p_t).sum(),                       # 0: constant collapse
            "kl": (loss - entropy).detach(),                                      # 0: both
            "prototypes_used": (used > 0).sum().float(),
        }
        return loss, monitors

    @torch.no_grad()
    def after_step(self, step, accumulation):
        """Momentum updates of the teacher (from the student after optimiser step `step`, from 0) and of the centres."""
        mean = self.seen / accumulation
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.centers.lerp_(torch.where(mean.isfinite(), mean, self.centers), 0.1)  # a step may have been skipped
        self.seen.zero_()
        m = teacher_momentum(step, self.steps, *self.momenta)
        for ours, source in ((self.teacher, self.model), (self.teacher_head, self.head)):
            trained = dict(source.named_parameters())
            names, averages = zip(*ours.named_parameters(), strict=True)
            torch._foreach_lerp_(averages, [trained[name] for name in names], 1 - m)
# <<< sddit


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
        # >>> sddit
        arch, read_targets = {"arch": "SDDiT", "cls_condition": not args.no_cls_condition}, False
        if args.model.startswith("nano/"):  # no size of the paper: a decoder in proportion
            arch |= {"decoder_depth": 2, "decoder_width": 128, "decoder_heads": 4}
        # <<< sddit
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
        # >>> sddit
        draws["mask_noise"] = torch.rand(args.batch_size, model.grid**2, generator=g, device=device)
        draws["teacher_t"] = torch.rand(args.batch_size, generator=g, device=device)
        # <<< sddit
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
            # >>> sddit
            inputs["step"] = step
            # <<< sddit
            with wrapped.no_sync() if world > 1 and (k + 1) % accumulation else nullcontext():
                losses = forward_backward(wrapped, inputs, args.precision, accumulation)
            means = means + torch.stack([value.detach() for value in losses.values()]) / accumulation
        # >>> sddit
        if args.sd_weight and step < objective.epoch_steps:  # DINO and iBOT keep the prototypes still for an epoch
            objective.head.prototypes.grad = None
        # <<< sddit
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
        # >>> sddit
        if args.sd_weight:
            objective.after_step(step - 1, accumulation)
        # <<< sddit
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
            # >>> sddit
            for name in ("cls_entropy", "teacher_entropy") if args.sd_weight else ():
                if row[name] > 0.98 * np.log(objective.centers.shape[1]):
                    bar.write(f"step {step}: {name} is within 2 % of ln K: uniform collapse; try a lower --tau-t")
            # <<< sddit
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
