"""MeanFlow: a network that goes from noise to data in one evaluation (arXiv 2505.13447).

    x_t = (1 - t) x + t eps                                 t = 0 is data, t = 1 is noise
    v(x_t, t) = mean of eps - x over all x, eps at x_t      a path solves dx_t/dt = v
    (t - r) u(x_t, r, t) = integral of v from r to t        u is the mean of v along the path
    u + (t - r) du/dt = v                                   the same, differentiated in t
    u = v - (t - r) du/dt                                   the MeanFlow identity
    du/dt = (d_x u) v + d_t u                               x moves with v, and r stays

    u_tgt = v~ - (t - r) ((d_x u) v~ + d_t u)               a constant for the gradient
    v~  = omega (eps - x) + kappa u(x_t, t, t, y) + (1 - omega - kappa) u(x_t, t, t, null)
    L   = mean over images of E / sg(E + c)^p               --diverse adds w(L_div) L_div
    E   = |u(x_t, r, t, y) - u_tgt|^2                       sum over channels and pixels
    x_r = x_t - (t - r) u(x_t, r, t)                        sampling: t = 1, r = 0 is a single step

    x    latent, drawn anew from the VAE's posterior        omega  --omega, together with --kappa;
    eps  noise                                                     the scale is omega / (1 - kappa)
    u    `model`, a DiT that also embeds t - r;             kappa  --kappa (0, omega 1: no guidance)
         u(x_t, t, t) is the velocity                       p      --power; c is 0.01
    y    class label, sometimes dropped (--label-drop)      sg     without gradient
    t, r the larger and the smaller of two draws (--time-normal). A share --flow-ratio of the rows
         has r = t. There u_tgt is v~: this is flow matching, guided and weighted

v~ stands for v, which is not known. u_tgt is linear in v~, and a squared error learns the mean of
its targets (exactly with p = 0). So v~ may use the eps - x of one sample. It is guided where t is
in --guide-interval and the label is kept. Elsewhere v~ = eps - x.
With p = 1 a row's gradient is that of its squared error, divided by that error. So `loss` is near
1 for ever. Watch loss_fm, the mean squared error of the rows with r = t, and loss_mean, r < t.

Commands
    python train_meanflow.py --digits                       three minutes on a laptop
    torchrun --nproc_per_node=8 train_meanflow.py           the paper's run: XL/2, ImageNet 256 px
    torchrun --nproc_per_node=8 train_meanflow.py --diverse     with DiverseDiT (2603.04239)
    python train_meanflow.py --micro-batch 32               on one GPU
    Variants:
    --tangent model         x moves with u(x_t, t, t, y) in du/dt, as in iMF (2512.02012)
    --omega 1 --kappa 0     no guidance in the target
    --flow-ratio 1 --power 0 --omega 1 --kappa 0        flow matching, at the larger of two times

To resume, run the same command again. The code of the method stands between `# >>> meanflow` and
`# <<< meanflow`. All other code is identical in every train_*.py, so a diff of two shows the
methods.

Shapes in the right margin: N batch, M rows with r < t, C, H, W of the latents, T tokens, D width.
"""

from copy import deepcopy
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import dit
import files
import sample
from extract_features import CachedFeatures, extract_digits, load_autoencoder
from files import UserError, at_least_1, fraction, number, positive

# >>> meanflow
import warnings

from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from train_diversedit import choose_blocks, gated_diversity_loss, report_cka
# <<< meanflow

NAME = Path(__file__).stem.removeprefix("train_")


def parse_args(argv=None):
    parser = files.Parser(__file__, __doc__)
    cuda = torch.cuda.is_available()

    add = parser.add_argument_group("run").add_argument
    add("--digits", action="store_true",
        help="laptop run: model nano/2, 1000 steps on 64 real digits each")
    add("--data", default="features/imagenet256",
        help="cache made by extract_features.py")
    add("--out", default=f"runs/{NAME}",
        help="run folder: checkpoints, log.jsonl, pictures")
    add("--seed", type=files.seed_number, default=0,
        help="seed of weights, order and noise")
    add("--workers", type=number(int, 0, 256),
        help="processes that read the cache (default: 4 with targets, otherwise 0)")
    add("--log-every", type=at_least_1, default=50,
        help="steps between rows of log.jsonl")
    add("--sample-every", type=number(int, 0), default=10_000,
        help="steps between previews, of which the first come sooner; 0 for none")
    add("--save-every", type=at_least_1, default=10_000,
        help="steps between checkpoints; one is also saved with every preview")
    add("--keep-every", type=at_least_1, default=50_000,
        help="steps between snapshots STEP.pt, which are kept")

    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=at_least_1, default=400_000,
        help="optimiser steps")
    add("--batch-size", type=at_least_1, default=256,
        help="images per step, over all processes")
    add("--micro-batch", type=at_least_1,
        help="images that a process handles at once (default: its whole share of the batch)")
    add("--lr", type=number(float, 0, 100), default=1e-4,
        help="learning rate of AdamW")
    add("--warmup", type=number(int, 0), default=0,
        help="steps over which the learning rate rises to --lr")
    add("--beta2", type=fraction, default=0.999,
        help="AdamW's second beta")
    add("--clip", type=number(float, 0), default=1.0,
        help="largest norm of the gradient; 0 switches clipping off")
    add("--ema", type=fraction, default=0.9999,
        help="decay of the averaged weights, per step")
    add("--label-drop", type=fraction, default=0.1,
        help="probability of replacing the label of an image by the null class, for guidance")
    add("--time-normal", type=number(float, -20, 20), nargs=2, metavar=("MEAN", "STD"),
        help="draw logit t, for SD-DiT ln sigma, from N(MEAN, STD^2) (default: t is uniform;"
             " MeanFlow: -0.4 1.0; SD-DiT: -1.2 1.2)")
    add("--precision", choices=["bf16", "fp32"], default="bf16" if cuda else "fp32",
        help="precision of the network (on CUDA, fp32 products use TF32); weights and optimiser are"
             " always fp32 (default: bf16 on CUDA, otherwise fp32)")
    add("--compile", action="onoff", default=cuda,
        help="torch.compile the transformer blocks (default: on CUDA)")

    add = parser.add_argument_group("model and conditioning (arXiv 2411.03177)").add_argument
    add("--model", type=files.model_name, default="XL/2",
        help=f"SIZE/PATCH, where SIZE is one of {', '.join(dit.SIZES)}")
    add("--qk-norm", action="store_true",
        help="normalise queries and keys")
    add("--control", choices=["none", "constant", "cosine"], default="none",
        help="condition on original size, crop and flip; how the weight of the size depends on t")
    add("--control-alpha", type=positive, default=1.0,
        help="exponent of the cosine weight")
    add("--control-drop", type=number(float, 0, 1), default=0.1,
        help="probability of dropping the control of an image")
    add("--class-tokens", type=number(int, 0, 1024), default=0,
        help="feed the class as this many extra tokens instead of adding it to the condition")
    add("--init", metavar="CKPT",
        help="start from the EMA weights of this checkpoint, as far as names and shapes agree")
    add("--pos-base", type=number(int, 1, 10**4),
        help="side of the grid that the position table is stretched over; a smaller one"
             " interpolates (default: the model's own grid, or with --init the checkpoint's)")
    add("--time-shift", type=positive,
        help="a value above 1 shifts the training times towards noise, for a higher resolution"
             " (default: 1, or with --init the ratio of the sides)")

    digits = {  # --digits puts these in place of the defaults
        "data": "features/digits",
        "out": f"runs/{NAME}-digits",
        "model": "nano/2",
        "steps": 1000,
        "batch_size": 64,
        "lr": 2e-3,
        "ema": 0.99,
        "sample_every": 1000,
        "workers": 0,
    }
    # >>> meanflow
    add = parser.add_argument_group("meanflow").add_argument
    add("--flow-ratio", type=number(float, 0, 1), default=0.75,
        help="share of the rows with r = t, whose target is v~ itself")
    add("--power", type=number(float, 0, 10), default=1.0,
        help="p of the adaptive loss; 0 is the squared error, summed over channels and pixels")
    add("--tangent", choices=["data", "model"], default="data",
        help="how x moves in du/dt: with v~, or with the network's velocity u(x_t, t, t, y)")
    add("--omega", type=number(float, above=0, high=100), default=0.2,
        help="weight of eps - x in v~")
    add("--kappa", type=fraction, default=0.92,
        help="weight of the network's velocity in v~; --omega 1 --kappa 0 means no guidance")
    add("--guide-interval", type=number(float, 0, 1), nargs=2, default=[0.0, 0.75],
        metavar=("LOW", "HIGH"),
        help="guide only where t is in this interval")
    add("--diverse", action="store_true",
        help="architecture, loss and gate of train_diversedit.py, with its defaults")
    parser.set_defaults(
        steps=1_200_000, precision="fp32", beta2=0.95, clip=0.0, time_normal=[-0.4, 1.0]
    )
    digits |= {"omega": 1.0, "kappa": 0.0}  # guidance would leave the distribution of the digits
    # <<< meanflow
    if parser.parse_known_args(argv)[0].digits:  # a first pass, to see this one flag
        parser.set_defaults(**digits)
    return parser.parse_args(argv)


# >>> meanflow
@torch.no_grad()
def mean_flow_target(u, x_t, r, t, v, dx_dt):
    """Returns u_tgt = v - (t - r) du/dt (arXiv 2505.13447), the MeanFlow identity, as a constant.

    u: a function (x, r, t) -> mean velocity; x_t, v, dx_dt and what is returned: [N, C, H, W];
    r, t [N]. du/dt is the derivative of u(x_t, r, t) along a path, by the chain rule.
    """
    dr_dt = torch.zeros_like(r)
    dt_dt = torch.ones_like(t)
    _, du_dt = jvp(u, (x_t, r, t), (dx_dt, dr_dt, dt_dt))
    return v - (t - r).view(-1, 1, 1, 1) * du_dt


def adaptive_loss(u, target, power=1.0, c=0.01):
    """Returns the mean of E / sg(E + c)^power over the images, and their mean squared errors [N].

    E is the squared error of an image, summed over channels and pixels.
    official code: c is 0.01 in JAX, 0.001 in PyTorch / here: 0.01. It hardly matters, because E is
    in the thousands for latents of 4 x 32 x 32.
    """
    squares = F.mse_loss(u.float(), target, reduction="none").flatten(1)  # [N, C H W]
    error = squares.sum(1)                                           # [N]
    weight = (error.detach() + c) ** -power
    return (weight * error).mean(), squares.mean(1)


def check_options(args, null_weight, label_drop):
    """Raises UserError for an empty --guide-interval, and for guidance without a null class."""
    low, high = args.guide_interval
    if low >= high:
        raise UserError(f"--guide-interval {low} {high}: the lower time comes first")
    if null_weight and not label_drop:
        raise UserError(
            f"--omega {args.omega} --kappa {args.kappa}: guidance needs a null class;"
            " use --label-drop above 0, or --omega 1 --kappa 0"
        )


class Objective(nn.Module):
    """Holds the model, the training-only heads and the loss: DDP wraps them as one module."""

    def __init__(self, model, args, meta):
        super().__init__()
        self.model = model
        self.time_normal = args.time_normal
        self.power = args.power
        self.tangent = args.tangent
        self.omega = args.omega
        self.kappa = args.kappa
        self.null_weight = round(1 - args.omega - args.kappa, 6)
        self.guide_interval = args.guide_interval
        self.num_blocks = min(10, len(model.blocks))
        label_drop = model.y_embedder.dropout_prob
        self.share_below = min(1 - args.flow_ratio, 1 - label_drop)  # the rows with r < t
        check_options(args, self.null_weight, label_drop)
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # of torch's own jvp

    def forward(
        self, x, y, uniform, eps, drop, other_uniform, r_below_t, chosen=(), control=None
    ):
        """Returns a dict of scalar tensors: `loss` is minimised, and all are logged.

        x, eps [N, C, H, W]; y [N]; uniform, other_uniform [N], in [0, 1); drop [N], true where the
        label is dropped; r_below_t [N], true where r < t; chosen, the block numbers of L_div;
        control [N, 7], see dit.ControlEmbedder.
        """
        first = dit.training_time(uniform, self.time_normal, self.model.time_shift)
        second = dit.training_time(other_uniform, self.time_normal, self.model.time_shift)
        t = torch.maximum(first, second)
        r = torch.where(r_below_t, torch.minimum(first, second), t)
        t_image = t.view(-1, 1, 1, 1)
        x_t = (1 - t_image) * x + t_image * eps                      # [N, C, H, W]
        v_tilde = self.guide(eps - x, x_t, t, y, drop, control)      # [N, C, H, W]

        # u_tgt is v~ where r = t; only the other rows need du/dt. To count them, the CPU waits once
        # for the GPU
        target = v_tilde.clone()
        rows = r_below_t.nonzero().flatten()                         # [M]
        target[rows] = self.target_of_rows(rows, v_tilde, x_t, r, t, y, control)

        # an ordinary forward pass: compiled, with fused attention, and seen by DDP
        u, tokens = self.model(
            x_t, t, y, drop=drop, control=control, r=r, return_blocks=chosen
        )
        loss, mse = adaptive_loss(u, target, self.power)
        losses = {}
        # divided by the expected number of rows, so that the split of the batch changes nothing
        if self.share_below < 1:
            losses["loss_fm"] = (mse * ~r_below_t).mean() / (1 - self.share_below)
        if self.share_below > 0:
            losses["loss_mean"] = (mse * r_below_t).mean() / self.share_below
        if chosen:
            gated, log = gated_diversity_loss(torch.stack(tokens))   # of [m, N, T, D]
            loss = loss + gated
            losses |= log
        return {"loss": loss, **losses}

    @torch.no_grad()
    def guide(self, v, x_t, t, y, drop, control):
        """Returns v~ [N, C, H, W]: v = eps - x, guided where t is inside and the label is kept."""
        if not (self.kappa or self.null_weight):
            return v
        guided = self.omega * v
        if self.kappa:
            guided = guided + self.kappa * self.model(x_t, t, y, control=control)
        if self.null_weight:
            null = torch.ones_like(drop)
            guided = guided + self.null_weight * self.model(x_t, t, y, drop=null, control=control)
        low, high = self.guide_interval
        inside = (low <= t) & (t <= high) & ~drop                    # [N]
        return torch.where(inside.view(-1, 1, 1, 1), guided, v)

    @torch.no_grad()
    def target_of_rows(self, rows, v_tilde, x_t, r, t, y, control):
        """Returns u_tgt [M, C, H, W] of rows with r < t, none of which has lost its label."""
        v_tilde = v_tilde[rows]                                      # [M, C, H, W]
        x_t = x_t[rows]
        r = r[rows]                                                  # [M]
        t = t[rows]
        y = y[rows]
        if control is not None:
            control = control[rows]

        def u(x, r, t):
            return self.model(x, t, y, control=control, r=r)

        # jvp has no formula for fused attention. It cannot pass compiled blocks either: without
        # force_eager, they would silently stay uncompiled for the rest of the run
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            dx_dt = v_tilde  # x moves with v~
            if self.tangent == "model":
                dx_dt = u(x_t, t, t).float()
            return mean_flow_target(u, x_t, r, t, v_tilde, dx_dt)

    def flops(self, config):
        """Returns the FLOPs of a training step per image.

        These are an ordinary forward and backward pass, the passes of the guidance, and du/dt of
        the rows with r < t. It counts as two passes, because every product with a weight is also
        taken of the tangent.
        """
        passes = 3 + bool(self.kappa) + bool(self.null_weight)
        passes += self.share_below * (3 if self.tangent == "model" else 2)
        return passes * dit.forward_flops(config)


def compare_samplers(model, cache, autoencoder, path, args):
    """Draws three rows of the same noises, and prints what they are."""
    rows = [
        {"sampler": "mean", "steps": 1},
        {"sampler": "ode", "steps": 1},
        {"sampler": "ode", "steps": 25},
    ]
    sample.preview(model, cache, autoencoder, path, args.seed, args.precision, rows=rows)
    print(
        f"{path}: the same noises in three rows: one evaluation of u(x, 0, 1), one Euler step of"
        " the velocity u(x, t, t), and 25 of them"
    )
# <<< meanflow


def step_generator(seed, step, device):
    """Returns the generator that one step draws all its random numbers from."""
    stream = files.random_stream("step", seed, step)
    return torch.Generator(device).manual_seed(int(stream.integers(2**63)))


def data_order(dataset_size, views, global_batch, mine, seed, start):
    """Yields for each step, from `start` on, the indices of the images that this process trains on.

    mine: this process's slice of the global batch. An epoch is a permutation of the images, each in
    one of its views: view v of image n has the index n * views + v. The incomplete batch at the end
    of an epoch is dropped.
    """
    steps_per_epoch = dataset_size // global_batch
    for step in count(start):
        epoch, k = divmod(step, steps_per_epoch)
        if k == 0 or step == start:  # a new epoch, or a resumed run
            rng = files.random_stream("epoch", seed, epoch)
            image_order = rng.permutation(dataset_size)
            chosen_views = rng.integers(views, size=dataset_size)
            epoch_order = image_order * views + chosen_views
        batch = epoch_order[k * global_batch : (k + 1) * global_batch]
        yield batch[mine]


def draw_noise(args, model, mine, step, device):
    """Draws all random numbers of one step for the global batch, and returns this process's rows.

    Every process draws them all. So they depend on (seed, step) alone: they are the same for any
    number of processes, and in a resumed run. A method draws its own noise last, so that all
    methods share the rest.
    """
    generator = step_generator(args.seed, step, device)
    side = model.grid * model.patch_size
    latent_shape = (args.batch_size, model.in_channels, side, side)

    randn = partial(torch.randn, generator=generator, device=device)
    rand = partial(torch.rand, generator=generator, device=device)

    noise = {
        "vae_noise": randn(latent_shape),
        "uniform": rand(args.batch_size),  # the method turns these into times
        "eps": randn(latent_shape),
        "drop": rand(args.batch_size) < model.y_embedder.dropout_prob,
    }
    if args.control != "none":
        noise["keep_control"] = rand(args.batch_size, 1) >= args.control_drop
    # >>> meanflow
    noise["other_uniform"] = rand(args.batch_size)
    # official code: the first rows have r = t, and the first of these lose their labels / here:
    # random rows do. In both, a row with r < t keeps its label. So rows that keep it have r < t
    # with the probability (1 - flow_ratio) / kept: then the share of all rows is 1 - flow_ratio
    kept = 1 - model.y_embedder.dropout_prob
    below = kept * rand(args.batch_size) < 1 - args.flow_ratio
    noise["r_below_t"] = below & ~noise["drop"]
    # <<< meanflow
    return {name: value[mine] for name, value in noise.items()}


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay ema + (1 - decay) model, in one call: this is faster than a loop."""
    torch._foreach_lerp_([*ema.parameters()], [*model.parameters()], 1 - decay)


def prepare(args, world):
    """Checks the command, the cache and the run folder, and writes nothing.

    Returns the cache, the config of the model, and two checkpoints: the one to resume and that of
    --init, each of which may be None. Raises UserError if something does not fit.
    """
    # >>> meanflow
    arch = {"arch": "DiverseDiT" if args.diverse else "DiT", "mean_velocity": True}
    read_targets = False
    # <<< meanflow
    cache = CachedFeatures(args.data, targets=read_targets, control=args.control != "none")
    files.check_flags(args, world, len(cache.labels))
    sizes = dit.parse_model(args.model)
    config = {
        **arch,
        **sizes,
        **cache.model_options(sizes["patch_size"]),
        "class_dropout_prob": args.label_drop,
        "qk_norm": args.qk_norm,
        "class_tokens": args.class_tokens,
        "control": args.control,
        "control_alpha": args.control_alpha,
    }
    init = None
    checkpoint = files.read_run(args, cache.meta, __file__)
    if checkpoint:
        config = checkpoint["config"]  # a resumed run keeps its architecture
    elif args.init:
        init, inherited = files.read_init(args.init, config, cache.meta["classes"])
        config |= inherited
    # these flags override --init; in a resumed run they change nothing, because read_run has
    # compared them
    if args.pos_base:
        config["pos_base"] = args.pos_base
    if args.time_shift:
        config["time_shift"] = args.time_shift
    files.check_memory(config, args.micro_batch or args.batch_size // world, args)
    return cache, config, checkpoint, init


def build(args, cache, config, init, device):
    """Builds the objective (model, heads and loss), the averaged model and the optimiser."""
    torch.manual_seed(args.seed)
    model = dit.build(config)
    if init:
        same_classes = init["data"]["classes"] == cache.meta["classes"]
        line = dit.inherit_weights(model, init["ema"], same_classes)
        print(f"--init {args.init}: {line}; time shift {model.time_shift:g}")
    objective = Objective(model, args, cache.meta).to(device)
    ema = deepcopy(model).eval()
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, args.lr, betas=(0.9, args.beta2), weight_decay=0, fused=True
    )
    return objective, ema, optimizer


def train(args):
    # Launch, check and build; then resume, if there is a checkpoint
    rank, world, device = files.launch(hours=1)
    if args.digits and args.data == "features/digits":
        extract_digits(args.data, rank, world, device)
    cache, config, checkpoint, init = prepare(args, world)
    objective, ema, optimizer = build(args, cache, config, init, device)
    model = objective.model
    out = Path(args.out)
    step = 0
    if checkpoint:
        step = checkpoint["step"]
        files.restore(checkpoint, objective, ema, optimizer)
    del checkpoint, init  # both are memory-mapped files, and this closes them
    files.require_same_step(step)  # processes disagree if the nodes have no common disk
    if args.compile:
        files.compile_blocks(objective)
    if rank == 0:
        vae = load_autoencoder(cache.meta["vae"], device) if args.sample_every else None
        files.start_run(args, step, world, model)
    ddp_objective = objective
    if world > 1:
        ddp_objective = DistributedDataParallel(
            objective, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    # The data: this process trains on its rows of each global batch, in micro-batches
    local_batch = args.batch_size // world
    micro_batch = args.micro_batch or local_batch
    accumulation = local_batch // micro_batch
    mine = slice(rank * local_batch, (rank + 1) * local_batch)
    order = data_order(len(cache.labels), cache.views, args.batch_size, mine, args.seed, step)

    log = files.TrainingLog(args, step, rank, world, objective.flops(config))
    batches = files.until_stopped(cache.loader(order, args.workers, device), log)
    saved = True  # the newest checkpoint holds all steps so far

    def save():
        files.save_run(args, config, cache, objective, ema, optimizer, __file__, step)

    # after a signal, or if the data fails, `batches` ends early; log.finish reports it
    for batch in islice(batches, max(args.steps - step, 0)):
        # 1. data and noise: the arguments of Objective.forward
        batch |= draw_noise(args, model, mine, step, device)
        batch["x"] = cache.latents(batch.pop("moments"), batch.pop("vae_noise"))
        if args.control != "none":
            batch["control"] *= batch.pop("keep_control")  # a row of zeros means no control

        # 2. forward and backward
        step_losses = 0
        for start in range(0, local_batch, micro_batch):
            part = {name: value[start : start + micro_batch] for name, value in batch.items()}
            # >>> meanflow
            if args.diverse:
                depth = len(model.blocks)
                part["chosen"] = choose_blocks(args.seed, step, depth, objective.num_blocks)
            # <<< meanflow
            # DDP averages the gradients once, in the last micro-batch; one process ignores this
            last = start + micro_batch == local_batch
            ddp_objective.require_backward_grad_sync = last
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                losses = ddp_objective(**part)
            (losses["loss"] / accumulation).backward()
            micro_losses = torch.stack([*losses.values()]).detach()
            step_losses += micro_losses / accumulation

        # 3. optimiser step
        warmed = min((step + 1) / max(args.warmup, 1), 1)  # rises to 1 over the warm-up
        lr = args.lr * warmed
        for group in optimizer.param_groups:
            group["lr"] = lr
        grad_norm = nn.utils.clip_grad_norm_(objective.parameters(), args.clip or np.inf)
        # fused AdamW changes nothing if found_inf is 1 (a flag that GradScaler sets, too). So a
        # step without a finite gradient is skipped. An `if` would make the CPU wait for the GPU
        not_finite = ~grad_norm.isfinite()
        optimizer.found_inf = not_finite.float()
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, model, args.ema)
        step += 1

        # 4. log
        log.add(losses.keys(), step_losses, grad_norm)
        log_now, save_now, preview_now = files.due(args, step)
        if log_now:
            row = log.end_interval(step, lr)
            # >>> meanflow
            if preview_now and rank == 0:
                if args.diverse:
                    row |= report_cka(ema, cache, out / f"cka-{step:07d}.npz", device)
                if step == args.steps:
                    path = out / f"samples-{step:07d}-steps.png"
                    compare_samplers(ema, cache, vae, path, args)
            # <<< meanflow
            log.write(row)

        # 5. save and preview
        saved = save_now
        if save_now and rank == 0:
            save()
        if preview_now and rank == 0:
            path = out / f"samples-{step:07d}.png"
            sample.preview(ema, cache, vae, path, args.seed, args.precision)

    if rank == 0 and not saved:
        save()
    if world > 1:
        dist.destroy_process_group()
    log.finish(step)


def main(argv=None):
    args = parse_args(argv)
    with files.program(__file__, args):
        train(args)


if __name__ == "__main__":
    files.catch_signals()  # a signal ends the run after its step, with a checkpoint
    main()
