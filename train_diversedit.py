"""DiverseDiT: long residual connections and a representation-diversity loss (arXiv 2603.04239).

    x_t = (1 - t) x + t eps,   t ~ U[0, 1)                      t = 0 is data, t = 1 is noise
    L     = L_fm + w(L_div) L_div  (+ lambda L_repa)
    L_fm  = |v(x_t, t, y) - (eps - x)|^2                        mean over batch, channels, pixels
    L_div = (L_orth + L_MI + L_disp) / 3                        of the tokens f_b of m random blocks
    L_orth = mean over pairs i < j of cos(<f_i>, <f_j>)         low: the block means point apart
    L_MI   = mean over pairs i < j of |<cos(f_i, f_j)>|         low: tokens at one place are unlike
    L_disp = - clip(var(u / max u) / 0.25, 0, 1)                low: channels differ in their u_c
    u_c    = mean over b of <|f_bc|> / ||f_bc||                 high: all tokens share channel c
    w(L)   = 0 if L <= 0.1; (L - 0.1) / 0.5 if L <= 0.5; else 1     --div-gate

    x    latent, drawn anew from the VAE's posterior            m       --div-blocks
    eps  noise                                                  lambda  --repa-weight, 0 by default
    v    `model`, a DiverseDiT from dit.py                      L_repa  see train_repa.py
    y    class label, sometimes dropped (--label-drop)
    < > is a mean, and || || a norm, over images and tokens; var and max are over channels. L_MI
    stands in for the mutual information.

Commands
    python train_diversedit.py --digits                     minutes on a laptop
    torchrun --nproc_per_node=8 train_diversedit.py         the paper's run: XL/2, ImageNet 256 px
    torchrun --nproc_per_node=8 train_diversedit.py --repa-weight 0.5       with REPA
    python train_diversedit.py --micro-batch 32             on one GPU
    Ablations (tables 6 to 8):
    --no-long-residuals     L_div on a plain DiT            --div-blocks 5          fewer blocks
    --div-terms orth        one term, or none               --div-gate 0.2 0.7      another band
    --div-gate -2 -1        a band below every loss, so that w = 1; L_disp alone needs it, because
                            it is never above 0

To resume, run the same command again. The code of the method stands between `# >>> diversedit` and
`# <<< diversedit`. All other code is identical in every train_*.py, so a diff of two shows the
methods.

Shapes in the right margin: N batch, C, H, W of the latents, T tokens, D width, L blocks.
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

# >>> diversedit
from train_repa import REPA_DEPTH, Alignment, mean_tokens  # tables 1 and 6: with REPA
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
    # >>> diversedit
    add = parser.add_argument_group("diversedit").add_argument
    add("--div-blocks", type=number(int, 2),
        help="m, the number of blocks drawn per step (default: 10, or all if there are fewer)")
    add("--div-gate", type=number(float), nargs=2, default=[0.1, 0.5], metavar=("LOW", "HIGH"),
        help="lower and upper edge of the gate w")
    add("--div-terms", nargs="*", choices=TERMS, default=[*TERMS],
        help="terms of L_div; without a name, L_div is not used")
    add("--no-long-residuals", action="store_true",
        help="train a plain DiT with L_div")
    add("--repa-weight", type=number(float, 0), default=0.0,
        help="lambda of REPA; 0 reads no targets")
    add("--repa-depth", type=at_least_1, nargs="+", metavar="BLOCK",
        help="block that REPA aligns, counted from 1, or several (default: 5 for S and B, 8 for"
             " larger models, 2 for nano)")
    # <<< diversedit
    if parser.parse_known_args(argv)[0].digits:  # a first pass, to see this one flag
        parser.set_defaults(**digits)
    return parser.parse_args(argv)


# >>> diversedit
def diversity_loss(tokens, terms=TERMS):
    """L_div (arXiv 2603.04239, section 3) of the tokens of m >= 2 blocks: [m, N, T, D].

    Returns the mean of the `terms`, and a dict of all three: L_orth in [-1, 1], L_MI in [0, 1],
    L_disp in [-1, 0].
    paper: L_MI is a signed mean / official code: it takes the absolute value of each pair's mean /
    here: as in the code.
    paper: L_disp has no |f| and no scale / official code: it takes |f|, divides u by its maximum
    and the variance by 0.25, and clips / here: as in the code. The clip never acts, because the
    variance of numbers in [0, 1] is at most 1/4.
    paper: all terms use the m blocks drawn / official code: it uses ten fixed pairs for L_orth and
    L_MI, and all blocks for L_disp / here: as in the paper.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        f = tokens.float().flatten(1, 2)                             # [m, N T, D]
        i, j = torch.triu_indices(len(f), len(f), offset=1, device=f.device)  # all pairs i < j

        means = F.normalize(f.mean(1), dim=-1, eps=1e-8)             # [m, D]
        loss_orth = (means @ means.T)[i, j].mean()

        unit = F.normalize(f, dim=-1, eps=1e-8).transpose(0, 1)      # [N T, m, D]
        cosines = (unit @ unit.mT).mean(0)                           # [m, m], mean over tokens
        loss_mi = cosines[i, j].abs().mean()

        shared = f.abs().mean(1) / f.norm(dim=1).clamp(min=1e-8)     # [m, D]
        u = shared.mean(0)                                           # [D,]
        variance = (u / (u.max() + 1e-8)).var(correction=0)
        loss_disp = -(variance / 0.25).clamp(0, 1)
    values = {"orth": loss_orth, "mi": loss_mi, "disp": loss_disp}
    return torch.stack([values[term] for term in terms]).mean(), values


def gate(loss, low=0.1, high=0.5):
    """w(L): 0 up to `low`, (L - low) / 0.5 up to `high`, then 1.

    The gradient also flows through w: inside the band, (w L)' = (2 L - low) / 0.5.
    paper, official code: 0.5 and not high - low divides, so that w jumps from 0.8 to 1 at L = 0.5;
    other bands are not stated / here: 0.5 divides for every band.
    """
    w = (loss - low) / 0.5
    w = torch.where(loss <= low, 0.0, w)
    return torch.where(loss <= high, w, 1.0)


def mean_over_ranks(loss):
    """Returns the mean of the loss over all processes, with the gradient of this process's loss.

    All processes need one value, because the gate branches on it. DDP averages the gradients.
    """
    if not dist.is_initialized():
        return loss
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    return mean + (loss - loss.detach())  # the bracket is 0, but it has the gradient of the loss


def gated_diversity_loss(tokens, terms=TERMS, band=(0.1, 0.5)):
    """Returns w(L_div) L_div of the tokens [m, N, T, D], and a dict of what is logged of it."""
    loss_div, values = diversity_loss(tokens, terms)
    loss_div = mean_over_ranks(loss_div)
    w = gate(loss_div, *band)
    log = {f"loss_{term}": value for term, value in values.items()}
    log["loss_div"] = loss_div
    log["div_weight"] = w
    log["div_closed"] = (w == 0).float()  # its mean is the share of steps with w = 0
    return w * loss_div, log


def choose_blocks(seed, step, depth, m):
    """Returns m of the block numbers 1 .. depth, the same in every process."""
    rng = files.random_stream("blocks", seed, step)
    return (rng.choice(depth, m, replace=False) + 1).tolist()


def check_options(args, depth):
    """Raises UserError if the flags of L_div do not fit each other or the `depth` of the model."""
    low, high = args.div_gate
    if args.div_blocks and args.div_blocks > depth:
        raise UserError(f"--div-blocks {args.div_blocks}: the model has {depth} blocks")
    if low >= high:
        raise UserError(f"--div-gate {low} {high}: the first number must be the smaller one")
    if args.div_terms == ["disp"] and low >= 0:
        raise UserError("--div-terms disp: never opens this gate; add --div-gate -2 -1")


class Objective(nn.Module):
    """Holds the model, the training-only heads and the loss: DDP wraps them as one module."""

    def __init__(self, model, args, meta):
        super().__init__()
        depth = len(model.blocks)
        check_options(args, depth)
        self.model = model
        self.time_normal = args.time_normal
        self.terms = args.div_terms
        self.band = args.div_gate
        self.num_blocks = args.div_blocks or min(10, depth)
        self.repa_weight = args.repa_weight
        self.alignment = None
        if self.repa_weight > 0:
            size = args.model.split("/")[0]
            default = REPA_DEPTH | {"S": 5, "B": 5}  # table A1
            self.aligned_blocks = args.repa_depth or [default[size]]
            self.alignment = Alignment(model, self.aligned_blocks, meta)

    def forward(self, x, y, uniform, eps, drop, chosen, targets=None, control=None):
        """Returns a dict of scalar tensors: `loss` is minimised, and all are logged.

        x, eps [N, C, H, W]; y [N]; uniform [N], in [0, 1); drop [N], true where the label is
        dropped; chosen, the block numbers of L_div; targets [N, T, sum of E]; control [N, 7], see
        dit.ControlEmbedder.
        """
        # by default, the times are the uniform numbers themselves
        t = dit.training_time(uniform, self.time_normal, self.model.time_shift)
        t_image = t.view(-1, 1, 1, 1)
        x_t = (1 - t_image) * x + t_image * eps                      # [N, C, H, W]
        # asking for the tokens of all blocks costs no memory: the backward pass needs them anyway
        every = range(1, len(self.model.blocks) + 1)
        v, tokens = self.model(x_t, t, y, drop=drop, control=control, return_blocks=every)
        loss_fm = F.mse_loss(v.float(), eps - x)
        loss = loss_fm
        losses = {"loss_fm": loss_fm}
        if self.terms:
            f = torch.stack([tokens[b - 1] for b in chosen])         # [m, N, T, D]
            gated, log = gated_diversity_loss(f, self.terms, self.band)
            loss = loss + gated
            losses |= log
        if self.alignment is not None:
            aligned = [tokens[b - 1] for b in self.aligned_blocks]
            losses["loss_repa"] = self.alignment(aligned, targets)
            loss = loss + self.repa_weight * losses["loss_repa"]
        rms = [block.detach().norm() / block.numel() ** 0.5 for block in tokens]
        losses["block_rms"] = torch.stack(rms).max()  # grows if the residual stream does
        return {"loss": loss, **losses}

    def flops(self, config):
        """Returns the FLOPs of a training step per image. Backward costs two times forward."""
        forward = dit.forward_flops(config)
        if self.alignment is not None:
            forward += self.alignment.flops(self.model.grid**2)
        return 3 * forward


def cka(features):
    """Returns the linear CKA of all pairs of blocks (arXiv 1905.00414): [L, n, D] -> [L, L].

    HSIC is the unbiased one: for Gram matrices K, M with zero diagonals, up to a factor,
    tr(K M) + (1 K 1) (1 M 1) / ((n - 1) (n - 2)) - 2 (1 K M 1) / (n - 2).
    """
    n = features.shape[1]
    gram = features.double() @ features.double().mT                  # [L, n, n]
    gram = gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
    row = gram.sum(2)                                                # [L, n]
    total = row.sum(1)                                               # [L,]
    hsic = gram.flatten(1) @ gram.flatten(1).T - 2 / (n - 2) * row @ row.T
    hsic = hsic + torch.outer(total, total) / ((n - 1) * (n - 2))
    scale = hsic.diagonal().clamp(min=1e-30).sqrt()
    return hsic / torch.outer(scale, scale)


def report_cka(model, cache, path, device):
    """Writes the CKA of the blocks' mean tokens on 1,024 fixed images: an .npz, [L, L] by time t.

    Returns {"cka_off_diagonal": {t: mean of the other entries}}; empty for fewer than four images.
    """
    if len(cache.labels) < 4:  # the unbiased HSIC needs as many
        return {}
    batch = cache.fixed_batch(1024, device)
    matrices = {}
    for t in (0.05, 0.25, 0.5, 0.75, 0.95):
        matrices[str(t)] = cka(mean_tokens(model, cache, batch, t)).cpu().numpy()
    files.replace_file(path, lambda file: np.savez(file, **matrices))
    others = ~np.eye(len(model.blocks), dtype=bool)
    return {"cka_off_diagonal": {t: matrix[others].mean() for t, matrix in matrices.items()}}
# <<< diversedit


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
    # >>> diversedit
    arch = {"arch": "DiT" if args.no_long_residuals else "DiverseDiT"}
    read_targets = args.repa_weight > 0
    # <<< diversedit
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
            # >>> diversedit
            part["chosen"] = choose_blocks(args.seed, step, len(model.blocks), objective.num_blocks)
            # <<< diversedit
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
            # >>> diversedit
            if preview_now and rank == 0:
                row |= report_cka(ema, cache, out / f"cka-{step:07d}.npz", device)
            # <<< diversedit
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
