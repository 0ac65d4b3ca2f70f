"""SD-DiT: a masked student, an EMA teacher and self-supervised discrimination, with EDM (arXiv 2403.17004).

    x_S = x + sigma z,  ln sigma ~ N(-1.2, 1.2^2)   student's view, 20 % of its patches skip the encoder
    x_T = x + 0.002 z                               teacher's view, nothing masked
    L     = L_G + weight (L_cls + L_patch)
    L_G   = |F(c_in x_S, c_noise, y) - F*|^2        F* = (sigma x / s_d - s_d z) / sqrt(sigma^2 + s_d^2)
    L_cls, L_patch = - sum_k P_T log P_S            CLS token; mean over the visible patches
    P_S = softmax(s / tau_s),  P_T = softmax((t - C) / tau_t)       s, t: cosines with K prototypes
    C <- 0.9 C + 0.1 mean t,   teacher <- m teacher + (1 - m) student

    x    latents, drawn anew each step              C      centres of CLS and of patches
    z    noise, `eps` in the code                   m      0.996 -> 0.999, cosine over the run
    F    `model`, an SDDiT from dit.py              tau_t  0.09 -> 0.099 over the first 5 epochs
    y    class label, dropped with probability 0.1  weight --sd-weight; 0: no teacher at all
    L_G is EDM's weighted error of the denoiser D, written for F: the weight times c_out^2 is 1. s_d = 0.5.

Commands
    python train_sddit.py --digits                  minutes on a laptop
    torchrun --nproc_per_node=8 train_sddit.py      the paper's run: XL/2, ImageNet 256 px, 2400K steps, fp32
    torchrun --nproc_per_node=8 train_sddit.py --model B/2 --steps 400000      its ablations
    Ablations: --sd-weight 0; --mask-ratio 0.5; --teacher-noise 0.3 or student; --no-cls-condition

To resume, run the same command again. The lines of the method stand between `# >>> sddit` and `# <<< sddit`;
everything outside is the same text in every train_*.py, so a diff of two scripts shows only their methods.

Shapes in the right margin: N batch, T patches, V visible ones, D width, K prototypes, B bottleneck, M tokens.
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

# >>> sddit
from copy import deepcopy

from torch.utils.checkpoint import checkpoint as recompute
# <<< sddit

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
    # >>> sddit
    add = parser.add_argument_group("sddit").add_argument
    positive, share = number(float, above=0), number(float, 0, 1)
    add("--mask-ratio", type=share, default=0.2, help="share of the student's patches to mask")
    add("--sd-weight", type=number(float, 0), default=1.0, help="weight of L_cls + L_patch; 0: no teacher")
    noise = "sigma of the teacher's view, or student: drawn like the student's"
    add("--teacher-noise", type=lambda s: s if s == "student" else positive(s), default=0.002, help=noise)
    add("--no-cls-condition", action="store_true", help="keep the CLS token out of the decoder's condition")
    add("--prototypes", type=number(int, 2, 2**20), help="K (default: 8192; 256 for nano)")
    add("--tau-s", type=positive, default=0.1, help="temperature of the student")
    add("--tau-t", type=positive, nargs=2, default=[0.09, 0.099], help="teacher's: in epoch 1, from epoch 5")
    add("--teacher-momentum", type=share, nargs=2, default=[0.996, 0.999], help="m, first and last")
    parser.set_defaults(steps=2_400_000, precision="fp32")
    digits |= dict(teacher_momentum=[0.9, 0.99], tau_t=[0.06, 0.06])  # the teacher must turn over often
    # <<< sddit
    if parser.parse_known_args(argv)[0].digits:
        parser.set_defaults(**digits)
    return parser.parse_args(argv)


# >>> sddit
# nano is no size of the paper: its decoder and head are in proportion
NANO_DECODER = dict(decoder_depth=2, decoder_width=128, decoder_heads=4)
NANO_HEAD = dict(hidden=256, bottleneck=64, prototypes=256)


def view_noise(t):
    """Uniform t in [0, 1) -> sigma with ln sigma ~ N(-1.2, 1.2^2): by the inverse of the normal CDF."""
    return torch.exp(1.2 * torch.special.ndtri(t.clamp(1e-7, 1 - 1e-7)) - 1.2)


def generative_loss(output, x, eps, sigma, sigma_data=0.5):
    """L_G = mean (F - F*)^2 over all patches: EDM's loss (arXiv 2206.00364), whose weight cancels for F."""
    sigma = sigma.view(-1, 1, 1, 1)
    target = (sigma / sigma_data * x - sigma_data * eps) / (sigma**2 + sigma_data**2).sqrt()
    return F.mse_loss(output.float(), target)


def discriminative_loss(student, teacher, center, tau_s, tau_t):
    """Cross-entropy - sum_k P_T log P_S of each token [M], and P_T [M, K], from logits [M, K] of both."""
    p_t = ((teacher - center) / tau_t).softmax(-1).detach()
    s = student / tau_s
    return s.logsumexp(-1) - (p_t * s).sum(-1), p_t


def teacher_temperature(epoch, first=0.09, last=0.099, epochs=5):
    """Linear from `first` in epoch 0 to `last` in epoch `epochs` - 1, then constant."""
    return first + (last - first) * min(epoch / (epochs - 1), 1)


def teacher_momentum(step, steps, first=0.996, last=0.999):
    """`first` at the start, `last` at the end of the run, half a cosine in between."""
    return last - (last - first) * (np.cos(np.pi * step / steps) + 1) / 2


class Head(nn.Module):
    """DINO's projection head: LayerNorm, MLP to a unit vector, cosines with K unit prototypes.

    paper: no sizes, no LayerNorm / here: iBOT's 2048, 256, K = 8192, for CLS and patches; see dit.SDDiT.
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
    """Model, training-only heads and loss in one module: DDP sees every parameter in one forward."""

    def __init__(self, model, args, meta):
        super().__init__()
        self.keep = int(model.grid**2 * (1 - args.mask_ratio) + 1e-6)  # visible patches
        if self.keep < 1:
            raise ValueError(f"--mask-ratio {args.mask_ratio}: keeps none of {model.grid**2} patches")
        self.model, self.weight, self.tau_s, self.tau_range = model, args.sd_weight, args.tau_s, args.tau_t
        self.teacher_noise, self.momenta, self.steps = args.teacher_noise, args.teacher_momentum, args.steps
        self.epoch_steps = (meta["count"] - len(meta["skipped"])) // args.batch_size
        if self.weight == 0:
            return
        options = NANO_HEAD if args.model.startswith("nano/") else {}
        options = options | ({"prototypes": args.prototypes} if args.prototypes else {})
        self.head = Head(model.pos_embed.shape[-1], **options)
        self.teacher = deepcopy(model)
        for name in ("cls_embedder", "decoder_embed", "decoder_pos_embed", "decoder_blocks", "final_layer"):
            delattr(self.teacher, name)  # the teacher is an encoder
        self.teacher_head = deepcopy(self.head)
        self.teacher.requires_grad_(False).eval()
        self.teacher_head.requires_grad_(False)
        self.register_buffer("centers", torch.zeros(2, len(self.head.prototypes)))  # of CLS and of patches
        self.register_buffer("seen", torch.zeros_like(self.centers), persistent=False)

    def visible(self, mask_noise):
        """Uniform noise [N, T] -> indices of a random subset of the patches for every image: [N, V]."""
        return mask_noise.argsort(dim=1)[:, : self.keep]

    def forward(self, x, y, t, eps, drop, mask_noise, teacher_t, step, control=None):
        """x, eps [N, C, H, W], y, t, drop, teacher_t [N], mask_noise [N, T], control [N, 7] -> losses."""
        shift = self.model.time_shift
        sigma = shift * view_noise(t)                                             # (N,)
        keep = self.visible(mask_noise)                                           # (N, V)
        x_s = x + sigma.view(-1, 1, 1, 1) * eps
        output, tokens = self.model(x_s, sigma, y, drop=drop, control=control, keep=keep, return_tokens=True)
        loss_edm = generative_loss(output, x, eps, sigma)
        if self.weight == 0:
            return {"loss": loss_edm, "loss_edm": loss_edm}

        with torch.no_grad():
            if self.teacher_noise == "student":  # paper: drawn alike / here: a second draw, and the same z
                sigma_t = shift * view_noise(teacher_t)
            else:
                sigma_t = torch.full_like(t, shift * self.teacher_noise)
            x_t = x + sigma_t.view(-1, 1, 1, 1) * eps
            encoded, _, _ = self.teacher.encode(x_t, sigma_t, y, drop, control=control)  # (N, 1 + T, D)
        with torch.autocast(x.device.type, enabled=False):  # fp32: arXiv 2403.17004 saw NaN
            with torch.no_grad():
                teacher = self.teacher_head(encoded)                              # (N, 1 + T, B)
                # logits are linear in the features, so the mean logit is the logit of the mean feature
                mean = torch.stack([teacher[:, 0].mean(0), teacher[:, 1:].mean((0, 1))])
                self.seen += self.teacher_head.logits(mean)
            student = self.head(tokens)                                           # (N, 1 + V, B)
            index = keep.unsqueeze(2).expand(-1, -1, student.shape[2])            # (N, V, B): patch by patch
            student_patches = student[:, 1:].flatten(0, 1)                        # (M, B)
            teacher_patches = teacher[:, 1:].gather(1, index).flatten(0, 1)
            tau_t = teacher_temperature(step // self.epoch_steps, *self.tau_range)
            loss_cls, cls_monitors = self.discriminate(student[:, 0], teacher[:, 0], self.centers[0], tau_t)
            loss_patch, monitors = self.discriminate(student_patches, teacher_patches, self.centers[1], tau_t)
            monitors["cls_entropy"] = cls_monitors["teacher_entropy"]
            monitors["cls_batch_entropy"] = cls_monitors["batch_entropy"]  # equals it if all CLS agree
            monitors["head_std"] = student_patches.detach().std(0).mean() * student.shape[2] ** 0.5
        loss = loss_edm + self.weight * (loss_cls + loss_patch)
        losses = {"loss": loss, "loss_edm": loss_edm, "loss_cls": loss_cls, "loss_patch": loss_patch}
        return losses | monitors

    def discriminate(self, student, teacher, center, tau_t, chunk=8192):
        """Mean cross-entropy of M tokens from their head features [M, B], and the monitors of collapse.

        teacher_entropy at ln K is uniform collapse, batch_entropy at 0 constant collapse, kl at 0 either.
        In chunks that are computed again in the backward pass, so that only chunk x K logits exist at once.
        """

        def part(student, teacher):
            logits = self.head.logits(student), self.teacher_head.logits(teacher)
            loss, p_t = discriminative_loss(*logits, center, self.tau_s, tau_t)
            entropy = torch.special.entr(p_t).sum(-1)
            used = torch.zeros_like(center).index_fill(0, p_t.argmax(-1), 1.0)
            return loss.sum(), entropy.sum(), p_t.sum(0), used

        pieces = zip(student.split(chunk), teacher.split(chunk), strict=True)
        sums = [recompute(part, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
        loss, entropy, p_t, used = (torch.stack(column).sum(0) for column in zip(*sums, strict=True))
        loss, entropy, p_t = loss / len(student), entropy / len(student), p_t / len(student)
        monitors = {"teacher_entropy": entropy, "batch_entropy": torch.special.entr(p_t).sum()}
        monitors |= {"kl": (loss - entropy).detach(), "prototypes_used": (used > 0).sum().float()}
        return loss, monitors

    @torch.no_grad()
    def after_step(self, step, accumulation):
        """Momentum updates of the teacher and of the centres after optimiser step `step`, counted from 0."""
        mean = self.seen / accumulation
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.centers.lerp_(torch.where(mean.isfinite(), mean, self.centers), 0.1)  # a step may be skipped
        self.seen.zero_()
        m = teacher_momentum(step, self.steps, *self.momenta)
        for teacher, student in ((self.teacher, self.model), (self.teacher_head, self.head)):
            trained = dict(student.named_parameters())
            pairs = [(average, trained[name]) for name, average in teacher.named_parameters()]
            torch._foreach_lerp_(*zip(*pairs, strict=True), 1 - m)

    def warn(self, row):
        """Announce a uniform collapse that a row of the log shows."""
        for name in ("cls_entropy", "teacher_entropy"):
            if name in row and row[name] > 0.98 * np.log(self.centers.shape[1]):
                tqdm.write(f"step {row['step']}: {name} within 2 % of ln K, uniform collapse: lower --tau-t")

    def flops(self, config):
        """Of a training step, per image: masked student and its head forward and backward, teacher once."""
        visible = torch.zeros(1, self.keep, dtype=torch.int64, device="meta")
        student = dit.forward_flops(config, keep=visible)
        if self.weight == 0:
            return 3 * student
        mlp = 2 * sum(p.numel() for p in self.head.mlp.parameters() if p.ndim == 2)
        logits = 2 * self.head.prototypes.numel() * (1 + self.keep)
        student += mlp * (1 + self.keep) + logits
        teacher = dit.forward_flops(config, "encode") + mlp * (1 + self.model.grid**2) + logits
        return 3 * student + teacher
# <<< sddit


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
    # >>> sddit
    arch, read_targets = {"arch": "SDDiT", "cls_condition": not args.no_cls_condition}, False
    arch |= NANO_DECODER if args.model.startswith("nano/") else {}
    # <<< sddit
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
        # >>> sddit
        draws["mask_noise"] = torch.rand(images, model.grid**2, **draw)
        draws["teacher_t"] = torch.rand(images, **draw)
        # <<< sddit
        inputs = {name: value[rows] for name, value in draws.items()}
        inputs |= {name: value.to(device, non_blocking=True) for name, value in next(loader).items()}
        inputs |= dict(x=features.latents(inputs.pop("moments"), noise[rows]), y=inputs.pop("labels"))
        if args.control != "none":
            inputs["control"] = inputs["control"] * inputs.pop("keep")            # (N, 7), zeros: no control
        means = 0
        for start in range(0, share, micro):
            part = {name: value[start : start + micro] for name, value in inputs.items()}
            # >>> sddit
            part["step"] = step
            # <<< sddit
            with nullcontext() if world == 1 or start + micro == share else wrapped.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                    losses = wrapped(**part)
                (losses["loss"] / accumulation).backward()
            means = means + torch.stack([value.detach() for value in losses.values()]) / accumulation

        lr = args.lr * min((step + 1) / max(args.warmup, 1), 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # >>> sddit
        if args.sd_weight and step < objective.epoch_steps:  # prototypes rest for an epoch, as in DINO, iBOT
            objective.head.prototypes.grad = None
        # <<< sddit
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.clip or np.inf)
        finite = grad_norm.isfinite()
        optimizer.found_inf = (~finite).float()  # fused AdamW skips the step where this is 1: no host sync
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
                # >>> sddit
                objective.warn(row)
                # <<< sddit
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
