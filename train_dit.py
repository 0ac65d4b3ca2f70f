"""DiT: noise prediction with learned variances (arXiv 2212.09748), alone or aligned by REPA.

    x_k = alpha_k x + sigma_k eps,   k ~ U{0, .., 999}      k = 0 is nearly data, k = 999 is noise
    L        = L_simple + L_vb  (+ lambda L_repa)
    L_simple = |e(x_k, k, y) - eps|^2                       mean over batch, channels and pixels
    L_vb     = KL(q || p) / ln 2, but - log2 p(x) if k = 0  the same mean, in bits (2102.09672)
    q = N(c1 x + c2 x_k, beta_tilde)                        x_l given x and x_k, for l = k - 1
    p = N(c1 x_e + c2 x_k, beta^f beta_tilde^(1 - f))       the model's: x_e for x, own variance
    x_e = (x_k - sigma_k e) / alpha_k,  f = (mix(x_k, k, y) + 1) / 2

    x      latent, drawn anew from the VAE's posterior      lambda  --repa-weight, 0 by default
    eps    noise                                            L_repa  see train_repa.py
    e, mix `model`, a NoiseDiT from dit.py: e is the        alpha, sigma, c1, c2, beta, beta_tilde
           noise, and mix sets the variance                         see dit.DDPMStep
    y      class label, sometimes dropped (--label-drop)
    L_vb trains mix alone, because e is detached in it. IDDPM weights the sum over the timesteps by
    0.001. For DiT's 1000 that is the mean, and a random timestep estimates it: the weight is 1.

Commands
    python train_dit.py --digits                            minutes on a laptop
    torchrun --nproc_per_node=8 train_dit.py                XL/2, ImageNet 256 px, 400K steps
    torchrun --nproc_per_node=8 train_dit.py --repa-weight 0.5      with REPA
    python train_dit.py --micro-batch 32                    on one GPU
    python sample.py runs/dit --grid dit.png                the sampler is ddpm, in 250 steps
For DiT's own run, extract with --flip, and train with --precision fp32 --clip 0.
To resume, run the same command again. The code of the method stands between `# >>> dit` and
`# <<< dit`. All other code is identical in every train_*.py, so a diff of two shows the methods.

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

# >>> dit
from train_repa import REPA_DEPTH, Alignment, report_cknna  # DiT + REPA: REPA's table 3
# <<< dit

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
    # >>> dit
    add = parser.add_argument_group(
        "dit",
        "The timesteps are DiT's, so that --time-shift and --time-normal are refused. --control"
        " weighs the size of an image by t = sigma / (alpha + sigma).",
    ).add_argument
    add("--repa-weight", type=number(float, 0), default=0.0,
        help="lambda of REPA; 0 reads no targets")
    add("--repa-depth", type=at_least_1, nargs="+", metavar="BLOCK",
        help="block that REPA aligns, counted from 1, or several (default: 4 for S and B, 8 for"
             " larger models, 2 for nano)")
    digits["lr"] = 4e-3  # 2e-3 and 1e-3 learn more slowly here
    # <<< dit
    if parser.parse_known_args(argv)[0].digits:  # a first pass, to see this one flag
        parser.set_defaults(**digits)
    return parser.parse_args(argv)


# >>> dit
def log_probability(x, mean, log_variance):
    """Returns ln P(x) if a normal variable is rounded to 256 levels from -1 to 1.

    The level of x reaches from x - 1/255 to x + 1/255; the outermost levels have no outer edge.
    official code: this is made for pixels, and DiT applies it to latents / here: the same.
    official code: the distribution function is approximated by a tanh / here: the same.
    """

    def probability_below(edge):
        z = (edge - mean) * torch.exp(-log_variance / 2)
        return (1 + torch.tanh((2 / np.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2

    upper = probability_below(x + 1 / 255)
    lower = probability_below(x - 1 / 255)
    p = torch.where(x > 0.999, 1 - lower, upper - lower)
    p = torch.where(x < -0.999, upper, p)
    return p.clamp(min=1e-12).log()


def variational_bound(x, eps, e, mix, at_k):
    """Returns L_vb (arXiv 2102.09672) of each image in bits, a mean over channels and pixels: [N].

    x, eps, e, mix [N, C, H, W]; at_k: the dit.DDPMStep of the images, with fields [N, 1, 1, 1].
    """
    log_variance = at_k.log_variance(mix)                            # of p, [N, C, H, W]
    # mean of p minus mean of q: c1 (x_e - x), where x_k = alpha x + sigma eps = alpha x_e + sigma e
    shift = at_k.c1 * at_k.sigma / at_k.alpha * (eps - e)
    # KL of two normals: (V_q / V_p + shift^2 / V_p - 1 - ln(V_q / V_p)) / 2
    log_ratio = at_k.log_beta_tilde - log_variance                   # ln(V_q / V_p)
    kl = (log_ratio.exp() + shift**2 * torch.exp(-log_variance) - 1 - log_ratio) / 2
    # at k = 0, c1 is 1 and c2 is 0, so that the mean of p is x_e = x + shift
    bound = torch.where(at_k.k > 0, kl, -log_probability(x, x + shift, log_variance))
    return bound.flatten(1).mean(1) / np.log(2)


class Objective(nn.Module):
    """Holds the model, the training-only heads and the loss: DDP wraps them as one module."""

    def __init__(self, model, args, meta):
        super().__init__()
        self.model = model
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
        k = (1000 * uniform).long()                                  # [N], 0 to 999
        at_k = self.model.steps_at(k)
        x_k = at_k.alpha * x + at_k.sigma * eps                      # [N, C, H, W]
        output, block_tokens = self.model.predict(
            x_k, k.float(), y, drop=drop, control=control, return_blocks=self.aligned_blocks
        )
        e, mix = output.float().chunk(2, dim=1)                      # [N, C, H, W] each

        loss_noise = F.mse_loss(e, eps)  # L_simple
        loss_vb = variational_bound(x, eps, e.detach(), mix, at_k).mean()  # trains mix alone
        loss = loss_noise + loss_vb
        losses = {"loss_noise": loss_noise, "loss_vb": loss_vb}
        if self.alignment is not None:
            losses["loss_repa"] = self.alignment(block_tokens, targets)
            loss = loss + self.repa_weight * losses["loss_repa"]
        return {"loss": loss, **losses}

    def flops(self, config):
        """Returns the FLOPs of a training step per image. Backward costs two times forward."""
        forward = dit.forward_flops(config)
        if self.alignment is not None:
            forward += self.alignment.flops(self.model.grid**2)
        return 3 * forward
# <<< dit


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
    # >>> dit
    arch = {"arch": "NoiseDiT"}
    read_targets = args.repa_weight > 0
    if args.time_shift not in (None, 1):
        raise UserError(f"--time-shift {args.time_shift:g}: leave it out; the timesteps are fixed")
    if args.time_normal:
        raise UserError("--time-normal: leave it out; the timesteps are uniform")
    # <<< dit
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
            # >>> dit
            if preview_now and rank == 0:
                row |= report_cknna(ema, cache, device)
            # <<< dit
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
