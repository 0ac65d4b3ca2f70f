"""DiverseDiT: long residual connections and a representation-diversity loss (arXiv 2603.04239).

    x_t = (1 - t) x + t eps,   t ~ U[0, 1)                      t = 0 is data, t = 1 is noise
    L     = |v(x_t, t, y) - (eps - x)|^2  +  w(L_div) L_div  (+ lambda L_repa)
    L_div = (L_orth + L_MI + L_disp) / 3                        for tokens f_b of m random blocks
    L_orth = mean over pairs a < b of cos(mean f_a, mean f_b)   their mean directions differ ...
    L_MI   = mean over pairs of |mean cos(f_a, f_b)|            ... and their tokens, one by one
    L_disp = - clip(var(a / max a) / 0.25, 0, 1)                channels c are used unevenly, where
    a_c    = mean over b of  mean |f_bc| / ||f_bc||_2           (mean and norm over N and T)
    w(L)   = 0 if L <= 0.1; (L - 0.1) / 0.5 if L <= 0.5; else 1     --div-gate

    x    latent, drawn from the posterior at each step          m       --div-blocks
    eps  noise                                                  lambda  --repa-weight, 0 by default
    v    `model`, a DiverseDiT from dit.py                      L_repa  see train_repa.py
    y    class label, dropped with probability 0.1
    L_MI has the paper's name: it stands in for the mutual information of two blocks.

Commands
    python train_diversedit.py --digits                     minutes on a laptop
    torchrun --nproc_per_node=8 train_diversedit.py         the paper's run: XL/2, ImageNet 256 px
    torchrun --nproc_per_node=8 train_diversedit.py --repa-weight 0.5       with REPA
    python train_diversedit.py --micro-batch 32             on one GPU
    Ablations (tables 6 to 8):
    --no-long-residuals     the loss alone                  --div-blocks 5          fewer blocks
    --div-terms orth        one term, or none               --div-gate 0.2 0.7      another band
    --div-gate -2 -1        a band below every loss, so that w = 1

To resume, run the same command again. The lines of the method stand between `# >>> diversedit` and
`# <<< diversedit`. Everything else is the same text in every train_*.py: a diff of two shows the
methods.

Shapes in the right margin: N batch, C, H, W of the latents, T tokens, D width, L blocks.
"""

from copy import deepcopy
from functools import partial
from itertools import count
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
from files import UserError, number

# >>> diversedit
from train_repa import Alignment  # REPA + DiverseDiT: tables 1 and 6 of the paper
# <<< diversedit

NAME = Path(__file__).stem.removeprefix("train_")

# >>> diversedit
TERMS = ("orth", "mi", "disp")
# <<< diversedit


def parse_args(argv=None):
    parser = files.Parser(__file__, __doc__)
    cuda = torch.cuda.is_available()

    add = parser.add_argument_group("run").add_argument
    add("--digits", action="store_true",
        help="laptop run: model nano/2, 1000 steps on 64 real digits each, learning rate 2e-3")
    add("--data", default="features/imagenet256",
        help="cache made by extract_features.py")
    add("--out", default=f"runs/{NAME}",
        help="run folder: checkpoints, log.jsonl, pictures")
    add("--seed", type=number(int, 0, 2**32), default=0,
        help="seed of weights, order and noise")
    add("--workers", type=number(int, 0, 256),
        help="processes that read the cache (default: 4 with targets, otherwise 0)")
    add("--log-every", type=number(int, 1), default=50,
        help="steps between rows of log.jsonl")
    add("--sample-every", type=number(int, 0), default=10_000,
        help="steps between previews; 0 for none")
    add("--save-every", type=number(int, 1), default=5_000,
        help="steps between checkpoints; one is also saved with every preview")
    add("--keep-every", type=number(int, 1), default=50_000,
        help="steps between snapshots STEP.pt, which are kept")

    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=number(int, 1), default=400_000,
        help="optimiser steps")
    add("--batch-size", type=number(int, 1), default=256,
        help="images per step, over all processes")
    add("--micro-batch", type=number(int, 1),
        help="images that a process handles at once (default: its whole share of the batch)")
    add("--lr", type=number(float, 0, 100), default=1e-4,
        help="learning rate of AdamW")
    add("--warmup", type=number(int, 0), default=0,
        help="steps over which the learning rate rises to --lr")
    add("--beta2", type=number(float, 0, below=1), default=0.999,
        help="AdamW's second beta")
    add("--clip", type=number(float, 0), default=1.0,
        help="largest norm of the gradient; 0 switches clipping off")
    add("--ema", type=number(float, 0, below=1), default=0.9999,
        help="decay of the averaged weights, per step")
    add("--precision", choices=["bf16", "fp32"], default="bf16" if cuda else "fp32",
        help="precision of the network; losses, weights and optimiser are always fp32")
    add("--compile", action="onoff", default=cuda,
        help="torch.compile the transformer blocks (default: on CUDA)")

    add = parser.add_argument_group("model and conditioning (arXiv 2411.03177)").add_argument
    add("--model", type=files.model_name, default="XL/2",
        help=f"SIZE/PATCH, where SIZE is one of {', '.join(dit.SIZES)}")
    add("--qk-norm", action="store_true",
        help="normalise queries and keys")
    add("--control", choices=["none", "constant", "cosine"], default="none",
        help="condition on original size, crop and flip; how the weight of the size depends on t")
    add("--control-alpha", type=number(float, above=0), default=1.0,
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
    add("--time-shift", type=number(float, above=0),
        help="a value above 1 shifts the training times towards noise, for a higher resolution"
             " (default: 1, or with --init the ratio of the sides)")

    digits = {  # defaults that --digits replaces
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
    # >>> diversedit
    add = parser.add_argument_group("diversedit").add_argument
    add("--div-blocks", type=number(int, 2),
        help="m, the number of blocks drawn per step (default: 10, or all if there are fewer)")
    add("--div-gate", type=number(float), nargs=2, default=[0.1, 0.5], metavar=("LOW", "HIGH"),
        help="lower and upper edge of the gate w")
    add("--div-terms", nargs="*", choices=TERMS, default=[*TERMS],
        help="terms of L_div; without a name, L_div is not used")
    add("--no-long-residuals", action="store_true",
        help="train a plain DiT, with the loss alone")
    add("--repa-weight", type=number(float, 0), default=0.0,
        help="lambda of REPA; 0 reads no targets")
    add("--repa-depth", type=number(int, 1),
        help="block that REPA aligns, from 1 (default: 8 for L and XL, 5 for S and B, 2 for nano)")
    # <<< diversedit
    if parser.parse_known_args(argv)[0].digits:  # a first pass, to see this one flag
        parser.set_defaults(**digits)
    return parser.parse_args(argv)


# >>> diversedit
def diversity_loss(blocks, terms=TERMS):
    """L_div, the mean of `terms`, and a dict of all three, for the tokens of blocks [m, N, T, D].

    L_orth in [-1, 1], L_MI in [0, 1], L_disp in [-1, 0] (arXiv 2603.04239, section 3); m >= 2.
    paper: L_MI is a signed mean / official code, here: the absolute value of each pair's mean.
    paper: L_disp without absolute values and scale / official code, here: |.| / max |.| / 0.25,
    clipped. official code: ten fixed pairs, and L_disp of all blocks / paper, here: the chosen
    blocks and all their pairs.
    """
    with torch.autocast(blocks.device.type, enabled=False):
        f = blocks.float().flatten(1, 2)                             # (m, N T, D)
        i, j = torch.triu_indices(len(f), len(f), 1, device=f.device)  # all pairs i < j

        means = F.normalize(f.mean(1), dim=-1, eps=1e-8)             # (m, D)
        loss_orth = (means @ means.T)[i, j].mean()

        unit = F.normalize(f, dim=-1, eps=1e-8).transpose(0, 1)      # (N T, m, D)
        cosines = (unit @ unit.mT).mean(0)                           # (m, m), mean over tokens
        loss_mi = cosines[i, j].abs().mean()

        a = (f.abs().mean(1) / f.norm(dim=1).clamp(min=1e-8)).mean(0)  # (D,)
        variance = (a / (a.max() + 1e-8)).var(correction=0)
        loss_disp = -(variance / 0.25).clamp(0, 1)
    values = {"orth": loss_orth, "mi": loss_mi, "disp": loss_disp}
    return torch.stack([values[term] for term in terms]).mean(), values


def gate(loss, low=0.1, high=0.5):
    """w(L): 0 up to `low`, (L - low) / 0.5 up to `high`, then 1.

    The gradient also flows through w: (w L)' = (2 L - low) / 0.5.
    paper, official code: the denominator is 0.5, not high - low, so that w jumps from 0.8 to 1 at
    L = 0.5; it is given for [0.1, 0.5] alone / here: 0.5 for every band.
    """
    ramp = (loss - low) / 0.5
    return torch.where(loss <= low, 0.0, torch.where(loss <= high, ramp, 1.0))


def mean_over_ranks(loss):
    """The mean over all processes, with the gradient of this process's own part.

    All of them then take the same branch of the gate.
    """
    if not dist.is_initialized():
        return loss
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    return loss + (mean - loss.detach())


def choose_blocks(seed, step, blocks, m):
    """m of the block numbers 1 .. `blocks`, the same in every process."""
    rng = np.random.default_rng([seed, step, 1])  # a stream of its own, apart from step_generator
    return (rng.choice(blocks, m, replace=False) + 1).tolist()


class Objective(nn.Module):
    """Model, training-only heads and loss in one module: DDP sees all parameters in one forward."""

    def __init__(self, model, args, meta):
        super().__init__()
        self.model = model
        self.terms = args.div_terms
        self.band = args.div_gate
        self.m = args.div_blocks or min(10, len(model.blocks))
        if self.m > len(model.blocks):
            raise UserError(f"--div-blocks {self.m}: the model has {len(model.blocks)} blocks")
        if self.band[0] >= self.band[1]:
            low, high = self.band
            raise UserError(f"--div-gate {low} {high}: the first number must be the smaller one")
        self.repa_weight = args.repa_weight
        self.alignment = None
        if self.repa_weight > 0:
            size = args.model.split("/")[0]
            default = {"nano": 2, "S": 5, "B": 5}.get(size, 8)  # REPA's own: 4 for S and B
            self.repa_depth = args.repa_depth or default
            self.alignment = Alignment(model, self.repa_depth, meta)

    def forward(self, x, y, t, eps, drop, chosen, targets=None, control=None):
        """A dict of scalar tensors: `loss` is minimised, the others are logged.

        x, eps [N, C, H, W]; y [N]; t [N] uniform in [0, 1): a fork changes its distribution here;
        drop [N], labels to drop; chosen, the block numbers of L_div; targets [N, T, sum of E];
        control [N, 7], see dit.ControlEmbedder.
        """
        t = dit.shift_time(t, self.model.time_shift)                 # identity without --time-shift
        t_ = t.view(-1, 1, 1, 1)
        x_t = (1 - t_) * x + t_ * eps                                # (N, C, H, W)
        # the tokens of all blocks: they cost no memory, because the backward pass needs them anyway
        blocks = range(1, len(self.model.blocks) + 1)
        v, tokens = self.model(x_t, t, y, drop=drop, control=control, return_blocks=blocks)
        loss = loss_fm = F.mse_loss(v.float(), eps - x)
        losses = {"loss_fm": loss_fm}
        if self.terms:
            f = torch.stack([tokens[b - 1] for b in chosen])         # (m, N, T, D)
            loss_div, values = diversity_loss(f, self.terms)
            loss_div = mean_over_ranks(loss_div)
            w = gate(loss_div, *self.band)
            loss = loss + w * loss_div
            for term, value in values.items():
                losses[f"loss_{term}"] = value
            losses["loss_div"] = loss_div
            losses["div_weight"] = w
            losses["div_closed"] = (w == 0).float()
        if self.alignment:
            losses["loss_repa"] = self.alignment(tokens[self.repa_depth - 1], targets)
            loss = loss + self.repa_weight * losses["loss_repa"]
        rms = [f.detach().norm() / f.numel() ** 0.5 for f in tokens]
        losses["block_rms"] = torch.stack(rms).max()
        return {"loss": loss, **losses}

    def flops(self, config):
        """FLOPs of a training step, per image: the backward pass costs twice the forward pass."""
        forward = dit.forward_flops(config)
        if self.alignment:
            forward += self.alignment.flops(self.model.grid**2)
        return 3 * forward


def cka(features):
    """Linear CKA of all pairs of blocks, unbiased HSIC (arXiv 1905.00414): [L, n, D] -> [L, L]."""
    n = features.shape[1]
    gram = features.double() @ features.double().mT                  # (L, n, n)
    gram = gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
    row = gram.sum(2)                                                # (L, n)
    total = row.sum(1)                                               # (L,)
    hsic = gram.flatten(1) @ gram.flatten(1).T - 2 / (n - 2) * row @ row.T
    hsic = hsic + torch.outer(total, total) / ((n - 1) * (n - 2))
    scale = hsic.diagonal().clamp(min=1e-30).sqrt()
    return hsic / torch.outer(scale, scale)


@torch.no_grad()
def report_cka(model, features, path, images=1024):
    """Write the CKA of the blocks' mean tokens, a matrix [L, L] for each of five t, as an .npz.

    Returns the means of their off-diagonal entries by t.
    """
    device = next(model.parameters()).device
    blocks = range(1, len(model.blocks) + 1)
    batch = features.fixed_batch(images, device)
    x = features.latents(batch["moments"])
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(device)
    matrices = {}
    for t in (0.05, 0.25, 0.5, 0.75, 0.95):
        x_t = (1 - t) * x + t * eps
        means = []
        for i in torch.arange(len(x), device=device).split(128):
            control = batch["control"][i] if "control" in batch else None
            times = torch.full((len(i),), t, device=device)
            _, tokens = model(x_t[i], times, batch["y"][i], control=control, return_blocks=blocks)
            means.append(torch.stack([f.mean(1) for f in tokens]))   # (L, 128, D)
        matrices[str(t)] = cka(torch.cat(means, dim=1)).cpu().numpy()  # (L, L)
    files.replace_file(path, lambda file: np.savez(file, **matrices))
    others = ~np.eye(len(blocks), dtype=bool)
    return {t: matrix[others].mean() for t, matrix in matrices.items()}
# <<< diversedit


def step_generator(seed, step, device):
    """Returns the generator that one step draws all its random numbers from."""
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state))


def data_order(dataset_size, views, global_batch, mine, seed, start):
    """Yields for each step, from `start` on, the indices of the images that this process trains on.

    mine: the slice of the global batch that is this process's. An epoch is a permutation of the
    images, each in one of its views: view v of image i has the index i * views + v. The incomplete
    batch at the end of an epoch is dropped.
    """
    steps_per_epoch = dataset_size // global_batch
    for step in count(start):
        epoch, i = divmod(step, steps_per_epoch)
        if i == 0 or step == start:  # a new epoch, or a resumed run
            rng = np.random.default_rng([seed, epoch])
            image = rng.permutation(dataset_size)
            view = rng.integers(views, size=dataset_size)
            epoch_order = image * views + view
        batch = epoch_order[i * global_batch : (i + 1) * global_batch]
        yield batch[mine]


def draw_noise(args, model, mine, step, device):
    """Draws the noise of the global batch of one step, and returns this process's rows of it.

    It comes from (seed, step) alone. A resumed run therefore continues exactly, and the noise is
    the same for any number of processes. The draws of a method come last: all methods share the
    others.
    """
    generator = step_generator(args.seed, step, device)
    side = model.grid * model.patch_size
    latents = (args.batch_size, model.in_channels, side, side)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, device=device)

    noise = {
        "vae_noise": normal(*latents),
        "t": uniform(args.batch_size),
        "eps": normal(*latents),
        "drop": uniform(args.batch_size) < model.y_embedder.dropout_prob,
    }
    if args.control != "none":
        noise["keep_control"] = uniform(args.batch_size, 1) >= args.control_drop
    return {name: value[mine] for name, value in noise.items()}


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay ema + (1 - decay) model, for all parameters in one call."""
    torch._foreach_lerp_([*ema.parameters()], [*model.parameters()], 1 - decay)


def prepare(args, world):
    """Checks the command, the cache and the run folder, and writes nothing.

    Returns the cache, the config of the model, and two checkpoints: the one to resume and that of
    --init, each of which may be None. Raises UserError if something does not fit.
    """
    # >>> diversedit
    arch = {"arch": "DiT" if args.no_long_residuals else "DiverseDiT"}
    read_targets = args.repa_weight > 0
    # <<< diversedit
    features = CachedFeatures(args.data, targets=read_targets, control=args.control != "none")
    pieces = world * (args.micro_batch or 1)  # every process gets whole micro-batches
    if args.batch_size % pieces:
        factors = "processes x micro-batch"
        raise UserError(f"--batch-size {args.batch_size}: not a multiple of {pieces} ({factors})")
    if args.batch_size > len(features.labels):
        found = f"{args.data} has {len(features.labels)} images"
        raise UserError(f"--batch-size {args.batch_size}: {found}")

    sizes = dit.parse_model(args.model)
    config = {
        **arch,
        **sizes,
        **features.model_options(sizes["patch_size"]),
        "qk_norm": args.qk_norm,
        "class_tokens": args.class_tokens,
        "control": args.control,
        "control_alpha": args.control_alpha,
    }
    init = None
    checkpoint = files.read_run(args, features.meta, __file__)
    if checkpoint:
        config = checkpoint["config"]  # a resumed run keeps its architecture
    elif args.init:
        init, inherited = files.read_init(args.init, config)
        config |= inherited
    if args.pos_base is not None:
        config["pos_base"] = args.pos_base
    if args.time_shift is not None:
        config["time_shift"] = args.time_shift
    files.check_memory(config, args.micro_batch or args.batch_size // world, args.precision)
    return features, config, checkpoint, init


def build(args, features, config, init, device):
    """Builds the objective (model, heads and loss), the averaged model and the optimiser."""
    torch.manual_seed(args.seed)
    model = dit.build(config)
    if init:
        same_classes = init["data"]["classes"] == features.meta["classes"]
        line = dit.inherit_weights(model, init["ema"], same_classes)
        print(f"--init {args.init}: {line}; time shift {model.time_shift:g}")
    objective = Objective(model, args, features.meta).to(device)
    ema = deepcopy(model).eval()
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, args.lr, betas=(0.9, args.beta2), weight_decay=0, fused=True
    )
    return objective, ema, optimizer


def train(args):
    # Launch, check, build; then resume if there is a checkpoint
    rank, world, device = files.launch(hours=1)
    if args.digits and args.data == "features/digits":
        extract_digits(args.data, rank, world, device)
    features, config, checkpoint, init = prepare(args, world)
    objective, ema, optimizer = build(args, features, config, init, device)
    model = objective.model
    parameters = optimizer.param_groups[0]["params"]
    out = Path(args.out)
    step = 0
    if checkpoint:
        step = checkpoint["step"]
        files.restore(checkpoint, objective, ema, optimizer)
    del checkpoint, init  # they are mapped files, which this closes
    files.require_same_step(step)
    if args.compile:
        files.compile_blocks(objective)
    if rank == 0:
        vae = load_autoencoder(features.meta["vae"], device) if args.sample_every else None
        files.start_run(args, step, world, model)
    ddp_objective = objective
    if world > 1:
        ddp_objective = DistributedDataParallel(
            objective, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    # Data: this process's rows of each global batch, in micro-batches
    global_batch = args.batch_size
    local_batch = global_batch // world
    micro_batch = args.micro_batch or local_batch
    accumulation = local_batch // micro_batch
    mine = slice(rank * local_batch, (rank + 1) * local_batch)
    dataset_size = len(features.labels)
    order = data_order(dataset_size, features.views, global_batch, mine, args.seed, step)

    log = files.TrainingLog(args, step, rank, world, objective.flops(config))
    save = partial(files.save_run, args, config, features, objective, ema, optimizer, __file__)
    batches = files.until_stopped(features.loader(order, args.workers, device), log)

    while step < args.steps:
        # 1. data and noise
        batch = next(batches, None)
        if batch is None:  # a process got a signal, or its data failed
            break
        batch |= draw_noise(args, model, mine, step, device)
        batch["x"] = features.latents(batch.pop("moments"), batch.pop("vae_noise"))
        if args.control != "none":
            batch["control"] *= batch.pop("keep_control")  # a row of zeros means no control

        # 2. forward and backward
        step_losses = 0
        for start in range(0, local_batch, micro_batch):
            part = {name: value[start : start + micro_batch] for name, value in batch.items()}
            # >>> diversedit
            part["chosen"] = choose_blocks(args.seed, step, len(model.blocks), objective.m)
            # <<< diversedit
            # only in the last micro-batch does DDP average the gradients over the processes
            last = start + micro_batch == local_batch
            ddp_objective.require_backward_grad_sync = last
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                losses = ddp_objective(**part)
            (losses["loss"] / accumulation).backward()
            values = torch.stack([value.detach() for value in losses.values()])
            step_losses = step_losses + values / accumulation

        # 3. optimiser step
        warmup = min((step + 1) / max(args.warmup, 1), 1)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warmup
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.clip or np.inf)
        # fused AdamW skips the step where found_inf is 1, as GradScaler asks it to: unlike an `if`,
        # this does not make the host wait for the GPU
        optimizer.found_inf = (~grad_norm.isfinite()).float()
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, model, args.ema)
        step += 1

        # 4. log
        log.add(list(losses), step_losses, grad_norm)
        due = files.due(args, step)
        if "row" in due:
            row = log.row(step, args.lr * warmup)
            # >>> diversedit
            if "preview" in due and rank == 0 and len(features.labels) > 3:  # what CKA needs
                path = out / f"cka-{step:07d}.npz"
                row["cka_off_diagonal"] = report_cka(ema, features, path)
            # <<< diversedit
            log.write(row)

        # 5. save and preview
        if "checkpoint" in due and rank == 0:
            save(step)
        if "preview" in due and rank == 0:
            sample.preview(ema, features, vae, out / f"samples-{step:07d}.png", args.seed)
        if "row" in due:
            log.restart(step)  # so that img_per_s does not count what a row or a preview took

    if rank == 0 and "checkpoint" not in files.due(args, step):
        save(step)
    if world > 1:
        dist.destroy_process_group()
    log.finish(step)


def main(argv=None):
    args = parse_args(argv)
    with files.program(__file__, args):
        train(args)


if __name__ == "__main__":
    files.catch_signals()
    main()
