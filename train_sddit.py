"""SD-DiT: a masked student, an EMA teacher and self-supervised discrimination (arXiv 2403.17004).

    x_S = x + sigma eps,  ln sigma ~ N(-1.2, 1.2^2)     student's view: 20 % of patches are masked
    x_T = x + 0.002 eps                                 teacher's view: nothing is masked
    L     = L_G + weight (L_cls + L_patch)
    L_G   = |F_theta(x_S, sigma, y) - F*|^2             mean over all patches, masked ones too
            F* = (sigma x / s - s eps) / sqrt(sigma^2 + s^2)
    L_cls, L_patch = - sum_k P_T log P_S                of the CLS token; mean over visible patches
    P_S = softmax(a_S / tau_s)                          a_S, a_T: cosines with K prototypes
    P_T = softmax((a_T - c) / tau_t)
    c <- 0.9 c + 0.1 mean a_T                           one c for CLS, one for patches
    teacher <- m teacher + (1 - m) student

    x    latent, drawn anew from the VAE's posterior    c      centers; mean over all processes
    eps  noise, the same in both views                  m      0.996 -> 0.999, half a cosine
    y    label, sometimes dropped (--label-drop)        tau_t  0.09 -> 0.099 in five epochs
    F_theta  `model`, an SDDiT from dit.py, which scales its input with EDM's c_in and c_noise
    s    0.5, EDM's sigma_data                          weight --sd-weight (0: no teacher)
    L_G is EDM's loss lambda |D - x|^2. With D = c_skip x_S + c_out F_theta, it is lambda c_out^2
    |F_theta - F*|^2, and EDM chooses lambda = 1 / c_out^2. The student's prototypes are frozen in
    the first epoch.

Commands
    python train_sddit.py --digits                          minutes on a laptop
    torchrun --nproc_per_node=8 train_sddit.py              the paper's run: XL/2, 256 px, fp32
    torchrun --nproc_per_node=8 train_sddit.py --precision bf16
                                                            1.6 times as fast on H100 (predicted)
    torchrun --nproc_per_node=8 train_sddit.py --model S/2 --steps 400000
                                                            its ablations, with one of
    --sd-weight 0, --mask-ratio 0.5, --teacher-noise 0.3 or student, --no-cls-condition

To resume, run the same command again. The code of the method stands between `# >>> sddit` and
`# <<< sddit`. All other code is identical in every train_*.py, so a diff of two shows the methods.

Shapes in the right margin: N batch, T patches, V visible patches, D width, K prototypes,
B bottleneck, M tokens.
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

# >>> sddit
from torch.utils.checkpoint import checkpoint as recompute  # gradient checkpointing
from tqdm import tqdm
# <<< sddit

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
    # >>> sddit
    add = parser.add_argument_group("sddit").add_argument
    add("--mask-ratio", type=number(float, 0, 1), default=0.2,
        help="share of the student's patches that are masked")
    add("--sd-weight", type=number(float, 0), default=1.0,
        help="weight of L_cls + L_patch; 0 trains without a teacher")
    add("--teacher-noise", type=teacher_noise, default=0.002,
        help="sigma of the teacher's view, or `student` to draw it like the student's")
    add("--no-cls-condition", action="store_true",
        help="do not add the CLS token to the decoder's condition")
    add("--prototypes", type=number(int, 2, 2**20),
        help="K (default: 8192; 256 for nano)")
    add("--tau-s", type=positive, default=0.1,
        help="temperature of the student")
    add("--tau-t", type=positive, nargs=2, default=[0.09, 0.099],
        help="temperature of the teacher, in the first epoch and from the fifth on")
    add("--teacher-momentum", type=number(float, 0, 1), nargs=2, default=[0.996, 0.999],
        help="momentum m of the teacher, at the first and at the last step; a resumed run keeps the"
             " last step of its first start")
    parser.set_defaults(steps=2_400_000, precision="fp32", time_normal=[-1.2, 1.2])
    digits["teacher_momentum"] = [0.9, 0.99]  # a short run needs a faster teacher
    digits["tau_t"] = [0.06, 0.06]
    # <<< sddit
    if parser.parse_known_args(argv)[0].digits:  # a first pass, to see this one flag
        parser.set_defaults(**digits)
    return parser.parse_args(argv)


# >>> sddit
# nano is our own size; the decoder and the head are scaled down with it
NANO_DECODER = {"decoder_depth": 2, "decoder_width": 128, "decoder_heads": 4}
NANO_HEAD = {"hidden": 256, "bottleneck": 64, "prototypes": 256}


def teacher_noise(text):
    """An argparse type: `student`, or a noise level above 0."""
    return text if text == "student" else number(float, above=0, high=1e4)(text)


def sigma_from_uniform(uniform, mean=-1.2, std=1.2):
    """Turns uniform numbers in [0, 1) into noise levels sigma with ln sigma ~ N(mean, std^2)."""
    return dit.normal_from_uniform(uniform, mean, std).exp()


def generative_loss(output, x, eps, sigma, sigma_data=0.5):
    """L_G = mean (F_theta - F*)^2 over all patches (EDM, arXiv 2206.00364); the log's loss_edm."""
    sigma = sigma.view(-1, 1, 1, 1)
    target = (sigma / sigma_data * x - sigma_data * eps) / (sigma**2 + sigma_data**2).sqrt()
    return F.mse_loss(output.float(), target)


def discriminative_loss(a_student, a_teacher, center, tau_s, tau_t):
    """Returns - sum_k P_T log P_S of each token [M], and P_T [M, K].

    a_student, a_teacher: cosines with the prototypes [M, K]; center: c [K].
    """
    p_teacher = ((a_teacher - center) / tau_t).softmax(-1).detach()
    logits = a_student / tau_s
    # log P_S = logits - logsumexp(logits), and P_T sums to 1
    return logits.logsumexp(-1) - (p_teacher * logits).sum(-1), p_teacher


def teacher_temperature(epoch, first=0.09, last=0.099):
    """Linear from `first` in epoch 0 to `last` in epoch 4, the fifth, then constant."""
    return first + (last - first) * min(epoch / 4, 1)


def teacher_momentum(step, steps, first=0.996, last=0.999):
    """`first` at the start, `last` at the end of the run, half a cosine in between."""
    return last - (last - first) * (np.cos(np.pi * step / steps) + 1) / 2


class Head(nn.Module):
    """DINO's projection head: LayerNorm, MLP to a unit vector, cosines with K unit prototypes.

    paper: it states no sizes and no LayerNorm / here: iBOT's 2048, 256 and K = 8192, one head for
    CLS and patches, because with them the model has the published size (see dit.SDDiT).
    """

    def __init__(self, width, hidden=2048, bottleneck=256, prototypes=8192):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(self, tokens):                                       # [..., D]
        tokens = F.layer_norm(tokens.float(), tokens.shape[-1:], eps=1e-6)
        return F.normalize(self.mlp(tokens), dim=-1, eps=1e-6)       # [..., B]

    def cosines(self, features):                                     # [M, B]
        return features @ F.normalize(self.prototypes, dim=-1, eps=1e-6).T  # [M, K]


class Objective(nn.Module):
    """Holds the model, the training-only heads and the loss: DDP wraps them as one module."""

    def __init__(self, model, args, meta):
        super().__init__()
        patches = model.grid**2
        # the small number makes up for rounding: 100 * (1 - 0.9) = 9.999999999999998
        self.num_visible = int(patches * (1 - args.mask_ratio) + 1e-6)
        if self.num_visible < 1:
            raise UserError(f"--mask-ratio {args.mask_ratio}: keeps none of {patches} patches")
        self.model = model
        self.time_normal = args.time_normal
        self.sd_weight = args.sd_weight
        self.tau_s = args.tau_s
        self.tau_range = args.tau_t
        self.teacher_noise = args.teacher_noise
        self.momenta = args.teacher_momentum
        self.epoch_steps = meta["images"] // args.batch_size
        if self.sd_weight == 0:
            return  # without a head and a teacher

        sizes = {}
        if args.model.startswith("nano/"):
            sizes |= NANO_HEAD
        if args.prototypes:
            sizes["prototypes"] = args.prototypes
        self.head = Head(model.hidden_size, **sizes)
        self.teacher = deepcopy(model).requires_grad_(False).eval()
        decoder = ("decoder_embed", "decoder_pos_embed", "decoder_blocks", "final_layer")
        for name in ("cls_embedder", *decoder):
            delattr(self.teacher, name)  # the teacher only encodes, and this saves memory
        self.teacher_head = deepcopy(self.head).requires_grad_(False)
        # m rises over this many steps. A checkpoint holds the buffer, so a resumed run keeps the
        # number of its first start, even if --steps has changed
        self.register_buffer("schedule_steps", torch.tensor(float(args.steps)))
        self.total_steps = None  # the same as a Python number, which after_step reads once
        self.register_buffer("centers", torch.zeros(2, len(self.head.prototypes)))  # CLS, patches
        self.register_buffer("cosine_sum", torch.zeros_like(self.centers), persistent=False)

    def choose_visible(self, mask_noise):
        """Uniform noise [N, T] -> indices of a random subset of each image's patches: [N, V]."""
        return mask_noise.argsort(dim=1)[:, : self.num_visible]

    def forward(self, x, y, uniform, eps, drop, mask_noise, teacher_uniform, step, control=None):
        """Returns a dict of scalar tensors: `loss` is minimised, and all are logged.

        x, eps [N, C, H, W]; y [N]; uniform, teacher_uniform [N], in [0, 1); drop [N], true where
        the label is dropped; mask_noise [N, T]; control [N, 7], see dit.ControlEmbedder.
        """
        shift = self.model.time_shift  # 1 without --time-shift
        sigma = shift * sigma_from_uniform(uniform, *self.time_normal)  # [N,]
        x_student = x + sigma.view(-1, 1, 1, 1) * eps
        visible = self.choose_visible(mask_noise)                    # [N, V]
        output, student_tokens = self.model(
            x_student, sigma, y, drop=drop, control=control, visible=visible, return_tokens=True
        )
        loss_edm = generative_loss(output, x, eps, sigma)
        if self.sd_weight == 0:
            return {"loss": loss_edm, "loss_edm": loss_edm}

        if self.teacher_noise == "student":
            # paper: drawn from the student's distribution / here: sigma is drawn anew, eps is not
            sigma_teacher = shift * sigma_from_uniform(teacher_uniform, *self.time_normal)
        else:
            sigma_teacher = torch.full_like(uniform, shift * self.teacher_noise)
        x_teacher = x + sigma_teacher.view(-1, 1, 1, 1) * eps
        with torch.no_grad():
            teacher_tokens, _, _ = self.teacher.encode(
                x_teacher, sigma_teacher, y, drop, control=control
            )
        with torch.autocast(x.device.type, enabled=False):  # the authors report NaN in fp16
            losses = self.compare(student_tokens, teacher_tokens, visible, step)
        loss = loss_edm + self.sd_weight * (losses["loss_cls"] + losses["loss_patch"])
        return {"loss": loss, "loss_edm": loss_edm, **losses}

    def compare(self, student_tokens, teacher_tokens, visible, step):
        """Returns L_cls, L_patch and the monitors of collapse.

        student_tokens [N, 1 + V, D]: CLS and visible patches; teacher_tokens [N, 1 + T, D]: CLS and
        all patches. f_student and f_teacher are the features that the heads make of them.
        """
        with torch.no_grad():
            f_teacher = self.teacher_head(teacher_tokens)            # [N, 1 + T, B]
            # cosines are linear in the features, so the mean cosine is that of the mean feature
            mean_cls = f_teacher[:, 0].mean(0)                       # [B]
            mean_patch = f_teacher[:, 1:].mean((0, 1))
            means = torch.stack([mean_cls, mean_patch])              # [2, B]
            self.cosine_sum += self.teacher_head.cosines(means)
        f_student = self.head(student_tokens)                        # [N, 1 + V, B]

        # the two views are compared in CLS, and in the patches that both networks have seen
        student_cls = f_student[:, 0]                                # [N, B]
        teacher_cls = f_teacher[:, 0]
        student_patches = f_student[:, 1:].flatten(0, 1)             # [M, B]
        teacher_visible = f_teacher[:, 1:].take_along_dim(visible.unsqueeze(2), dim=1)
        teacher_patches = teacher_visible.flatten(0, 1)              # [M, B]

        tau_t = teacher_temperature(step // self.epoch_steps, *self.tau_range)
        center_cls, center_patch = self.centers
        loss_cls, cls_monitors = self.discriminate(student_cls, teacher_cls, center_cls, tau_t)
        loss_patch, patch_monitors = self.discriminate(
            student_patches, teacher_patches, center_patch, tau_t
        )
        deviation = student_patches.detach().std(0).mean()
        return {
            "loss_cls": loss_cls,
            "loss_patch": loss_patch,
            **patch_monitors,  # teacher_entropy, batch_entropy, kl and prototypes_used
            "cls_entropy": cls_monitors["teacher_entropy"],
            # equal to cls_entropy if every image has the same CLS assignment
            "cls_batch_entropy": cls_monitors["batch_entropy"],
            # 1 if the features spread over the sphere, 0 if they collapsed
            "head_std": deviation * f_student.shape[2] ** 0.5,
        }

    def discriminate(self, student, teacher, center, tau_t, chunk=8192):
        """Returns the mean discriminative_loss of M tokens, and monitors of collapse.

        student, teacher: head features [M, B]. Tokens go through in chunks, which the backward pass
        computes again, so that only chunk x K cosines exist at once. The monitors:
        - teacher_entropy of the assignments: ln K is uniform collapse
        - batch_entropy of the mean assignment: 0 means that all tokens share one prototype
        - kl of teacher and student: 0 with either collapse
        """

        def sums(student, teacher):
            a_student = self.head.cosines(student)                   # [chunk, K]
            a_teacher = self.teacher_head.cosines(teacher)
            loss, p_teacher = discriminative_loss(a_student, a_teacher, center, self.tau_s, tau_t)
            entropy = torch.special.entr(p_teacher).sum(-1)
            used = torch.zeros_like(center).index_fill(0, p_teacher.argmax(-1), 1.0)
            return loss.sum(), entropy.sum(), p_teacher.sum(0), used

        parts = []
        for pair in zip(student.split(chunk), teacher.split(chunk), strict=True):
            parts.append(recompute(sums, *pair, use_reentrant=False, preserve_rng_state=False))
        losses, entropies, assignments, uses = zip(*parts, strict=True)
        loss = sum(losses) / len(student)
        entropy = sum(entropies) / len(student)
        mean_assignment = sum(assignments) / len(student)            # [K]
        monitors = {
            "teacher_entropy": entropy.detach(),
            "batch_entropy": torch.special.entr(mean_assignment).sum(),
            "kl": (loss - entropy).detach(),
            "prototypes_used": (sum(uses) > 0).sum().float(),
        }
        return loss, monitors

    @torch.no_grad()
    def after_step(self, step, accumulation):
        """Updates the centers and the teacher after optimiser step `step`, counted from 0."""
        mean = self.cosine_sum / accumulation
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        mean = torch.where(mean.isfinite(), mean, self.centers)  # the old one if it is not finite
        self.centers.lerp_(mean, 0.1)
        self.cosine_sum.zero_()

        if self.total_steps is None:  # read once: reading a buffer makes the CPU wait for the GPU
            self.total_steps = self.schedule_steps.item()
        m = teacher_momentum(min(step, self.total_steps), self.total_steps, *self.momenta)
        for teacher, student in ((self.teacher, self.model), (self.teacher_head, self.head)):
            averaged = dict(teacher.named_parameters())  # without the decoder's
            current = [student.get_parameter(name) for name in averaged]
            torch._foreach_lerp_([*averaged.values()], current, 1 - m)

    def warn(self, row):
        """Announces a uniform collapse that a row of the log shows, without breaking the bar."""
        for name in ("cls_entropy", "teacher_entropy"):
            entropy = row.get(name)
            if entropy is not None and entropy > 0.98 * np.log(self.centers.shape[1]):
                found = f"{name} is within 2 % of ln K, a uniform collapse"
                tqdm.write(f"step {row['step']}: {found}; lower --tau-t")

    def flops(self, config):
        """Returns the FLOPs of a training step per image: the teacher only runs forward."""
        visible = torch.zeros(1, self.num_visible, dtype=torch.int64, device="meta")
        student = dit.forward_flops(config, visible=visible)
        if self.sd_weight == 0:
            return 3 * student
        mlp = 2 * sum(p.numel() for p in self.head.mlp.parameters() if p.ndim == 2)
        cosines = 2 * self.head.prototypes.numel() * (1 + self.num_visible)
        student += mlp * (1 + self.num_visible) + cosines
        teacher = dit.forward_flops(config, "encode")
        teacher += mlp * (1 + self.model.grid**2) + cosines
        return 3 * student + teacher
# <<< sddit


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
    # >>> sddit
    noise["mask_noise"] = rand(args.batch_size, model.grid**2)
    noise["teacher_uniform"] = rand(args.batch_size)
    # <<< sddit
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
    # >>> sddit
    arch = {"arch": "SDDiT", "cls_condition": not args.no_cls_condition}
    if args.model.startswith("nano/"):
        arch |= NANO_DECODER
    read_targets = False
    # <<< sddit
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
            # >>> sddit
            part["step"] = step
            # <<< sddit
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
        # >>> sddit
        # as in DINO and iBOT: AdamW leaves a parameter without a gradient as it is
        if args.sd_weight and step < objective.epoch_steps:
            objective.head.prototypes.grad = None
        # <<< sddit
        grad_norm = nn.utils.clip_grad_norm_(objective.parameters(), args.clip or np.inf)
        # fused AdamW changes nothing if found_inf is 1 (a flag that GradScaler sets, too). So a
        # step without a finite gradient is skipped. An `if` would make the CPU wait for the GPU
        not_finite = ~grad_norm.isfinite()
        optimizer.found_inf = not_finite.float()
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, model, args.ema)
        # >>> sddit
        if args.sd_weight:
            objective.after_step(step, accumulation)
        # <<< sddit
        step += 1

        # 4. log
        log.add(losses.keys(), step_losses, grad_norm)
        log_now, save_now, preview_now = files.due(args, step)
        if log_now:
            row = log.end_interval(step, lr)
            # >>> sddit
            objective.warn(row)
            # <<< sddit
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
