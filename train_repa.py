"""REPA: hidden tokens of a diffusion transformer aligned with a frozen encoder (arXiv 2410.06940).

    x_t = (1 - t) x + t eps,   t ~ U[0, 1)                  t = 0 is data, t = 1 is noise
    L      = L_fm + lambda L_repa
    L_fm   = |v(x_t, t, y) - (eps - x)|^2                   mean over batch, channels and pixels
    L_repa = - mean cos(h(tokens of block d), z)            mean over batch, tokens, encoders, d

    x    latent, drawn anew from the VAE's posterior        z       `targets`, of the clean image
    eps  noise                                              h       an MLP per d and encoder
    v    `model`, a DiT from dit.py                         d       --repa-depth, counted from 1
    y    class label, sometimes dropped (--label-drop)      lambda  --repa-weight (0: a plain SiT)

Commands
    python train_repa.py --digits                           two minutes on a laptop
    torchrun --nproc_per_node=8 train_repa.py               the paper's run: XL/2, ImageNet 256 px
    python train_repa.py --micro-batch 32                   the same run on one GPU: gradients of
                                                            eight micro-batches are accumulated
To resume, run the same command again. The code of the method stands between `# >>> repa` and
`# <<< repa`. All other code is identical in every train_*.py, so a diff of two shows the methods.

Shapes in the right margin: N batch, C, H, W of the latents, T tokens, D width, E encoder width.
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
    # >>> repa
    add = parser.add_argument_group("repa").add_argument
    add("--repa-weight", type=number(float, 0), default=0.5,
        help="lambda; 0 trains the plain SiT and reads no targets")
    add("--repa-depth", type=at_least_1, nargs="+", metavar="BLOCK",
        help="block whose tokens are aligned, counted from 1, or several (default: 4 for S and B, 8"
             " for larger models, 2 for nano)")
    digits["repa_weight"] = 2.0  # with HOG targets, the weight 0.5 has almost no effect
    # <<< repa
    if parser.parse_known_args(argv)[0].digits:  # a first pass, to see this one flag
        parser.set_defaults(**digits)
    return parser.parse_args(argv)


# >>> repa
# the block that is aligned by default; 4 for S and B is what the authors say in their issue 5
REPA_DEPTH = {"nano": 2, "S": 4, "B": 4, "M": 8, "L": 8, "XL": 8}


def repa_loss(projected, targets):
    """L_repa = - mean cos(h(tokens), z) (arXiv 2410.06940), an fp32 scalar from -1 to 1.

    projected: the h(tokens), one [N, T, E] per block and encoder. targets: the z of each of them.
    """
    cosines = []
    for h_tokens, z in zip(projected, targets, strict=True):
        cosine = F.cosine_similarity(h_tokens.float(), z.float(), dim=-1)  # [N, T]
        cosines.append(cosine.mean())
    return -torch.stack(cosines).mean()


def projector(width, target_width, hidden):
    """The MLP h maps hidden tokens to encoder tokens: three linear layers, SiLU between them."""
    h = nn.Sequential(
        nn.Linear(width, hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, target_width),
    )
    for layer in h:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return h


class Alignment(nn.Module):
    """Holds the projectors h and computes L_repa for the tokens of the blocks `depths`.

    There is one projector per block and encoder, all of the first block first. meta: meta.json of
    the cache, which knows the width of each encoder. Raises UserError if the model has no such
    block.
    """

    def __init__(self, model, depths, meta):
        super().__init__()
        if max(depths) > len(model.blocks):
            raise UserError(f"--repa-depth {max(depths)}: the model has {len(model.blocks)} blocks")
        hidden = 2048
        if model.hidden_size < 384:  # nano, which is no size of the paper
            hidden = 4 * model.hidden_size
        self.target_widths = meta["target_widths"]
        self.projectors = nn.ModuleList()
        for _ in depths:
            for target_width in self.target_widths:
                self.projectors.append(projector(model.hidden_size, target_width, hidden))

    def forward(self, block_tokens, targets):
        """Returns L_repa. block_tokens: [N, T, D] of each block; targets [N, T, sum of E]."""
        z = targets.split(self.target_widths, dim=-1)                # [N, T, E] of each encoder
        projectors = iter(self.projectors)
        projected = []
        for tokens in block_tokens:                                  # [N, T, D]
            for _ in self.target_widths:
                h = next(projectors)
                projected.append(h(tokens))                          # [N, T, E]
        return repa_loss(projected, z * len(block_tokens))  # z, repeated for each block

    def flops(self, num_tokens):
        """Returns the FLOPs of the forward pass for one image with num_tokens tokens."""
        weights = sum(p.numel() for p in self.projectors.parameters() if p.ndim > 1)
        return 2 * num_tokens * weights


class Objective(nn.Module):
    """Holds the model, the training-only heads and the loss: DDP wraps them as one module."""

    def __init__(self, model, args, meta):
        super().__init__()
        self.model = model
        self.time_normal = args.time_normal
        self.repa_weight = args.repa_weight
        self.alignment = None
        self.aligned_blocks = []
        if self.repa_weight > 0:
            size = args.model.split("/")[0]
            self.aligned_blocks = args.repa_depth or [REPA_DEPTH[size]]
            self.alignment = Alignment(model, self.aligned_blocks, meta)

    def forward(self, x, y, uniform, eps, drop, targets=None, control=None):
        """Returns a dict of scalar tensors: `loss` is minimised, and all are logged.

        x, eps [N, C, H, W]; y [N]; uniform [N], in [0, 1); drop [N], true where the label is
        dropped; targets [N, T, sum of E]; control [N, 7], see dit.ControlEmbedder.
        """
        # by default, the times are the uniform numbers themselves
        t = dit.training_time(uniform, self.time_normal, self.model.time_shift)
        t_image = t.view(-1, 1, 1, 1)
        x_t = (1 - t_image) * x + t_image * eps                      # [N, C, H, W]
        v, block_tokens = self.model(
            x_t, t, y, drop=drop, control=control, return_blocks=self.aligned_blocks
        )
        loss_fm = F.mse_loss(v.float(), eps - x)
        if self.alignment is None:
            return {"loss": loss_fm, "loss_fm": loss_fm}
        loss_repa = self.alignment(block_tokens, targets)
        loss = loss_fm + self.repa_weight * loss_repa
        return {"loss": loss, "loss_fm": loss_fm, "loss_repa": loss_repa}

    def flops(self, config):
        """Returns the FLOPs of a training step per image. Backward costs two times forward."""
        forward = dit.forward_flops(config)
        if self.alignment is not None:
            forward += self.alignment.flops(self.model.grid**2)
        return 3 * forward


# ---- a monitor, without which a run trains the same: do the blocks agree with the targets?

NEIGHBOURS = 10


def cknna(f, g, k=NEIGHBOURS):
    """Returns CKNNA: how well features f [n, D] and g [n, E] of n images agree (arXiv 2405.07987).

        A_ij = cos(f_i, f_j) - mean over l of cos(f_i, f_l)    if j is among the k nearest of i
        A_ij = 0                                               otherwise; B is made of g likewise
        CKNNA = sum over i, j of A_ij B_ij / (|A| |B|)         1 if f and g agree
    """

    def local_kernel(features):
        unit = F.normalize(features.double(), dim=1)
        kernel = unit @ unit.T                                       # [n, n]
        others = kernel.clone().fill_diagonal_(-2)  # below every cosine: i is not its own neighbour
        nearest = others.topk(k).indices                             # [n, k]
        mask = torch.zeros_like(kernel).scatter(1, nearest, 1)
        return mask * (kernel - kernel.mean(1, keepdim=True))

    a = local_kernel(f)
    b = local_kernel(g)
    agreement = (a * b).sum()  # only pairs that are neighbours in both count, the others are 0
    return (agreement / (a.norm() * b.norm())).item()


@torch.no_grad()
def mean_tokens(model, cache, batch, t):
    """Returns the mean token of every block, for the images of a batch at time t: [L, n, D]."""
    x = cache.latents(batch["moments"])
    generator = torch.Generator().manual_seed(0)  # the same noise in every report
    eps = torch.randn(x.shape, generator=generator).to(x)
    x_t = (1 - t) * x + t * eps
    times = x.new_full((len(x),), t)
    blocks = range(1, len(model.blocks) + 1)
    means = []
    for start in range(0, len(x), 32):  # in parts, because the tokens of all blocks take memory
        rows = slice(start, start + 32)
        y = batch["y"][rows]
        control = batch["control"][rows] if "control" in batch else None
        _, block_tokens = model(x_t[rows], times[rows], y, control=control, return_blocks=blocks)
        means.append(torch.stack([tokens.mean(1) for tokens in block_tokens]))  # [L, rows, D]
    return torch.cat(means, dim=1)


def report_cknna(model, cache, device):
    """Returns {"cknna": {t: [value by block]}} of mean tokens and mean targets of 256 fixed images.

    The dict is empty if the run reads no targets, or if there are at most 10 images. It is also
    empty for int8 targets, which have lost the norms of the tokens: a mean over tokens needs them.
    """
    float_targets = "targets" in cache.names and cache.meta["target_dtype"] == "float16"
    if not float_targets or len(cache.labels) <= NEIGHBOURS:
        return {}
    batch = cache.fixed_batch(256, device)
    targets = batch["targets"].float().mean(1)                       # [n, E]
    report = {}
    for t in (0.25, 0.5):
        tokens = mean_tokens(model, cache, batch, t)
        report[str(t)] = [cknna(block, targets) for block in tokens]
    return {"cknna": report}
# <<< repa


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
    # >>> repa
    arch = {"arch": "DiT"}
    read_targets = args.repa_weight > 0
    # <<< repa
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
            # >>> repa
            if preview_now and rank == 0:
                row |= report_cknna(ema, cache, device)
            # <<< repa
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
