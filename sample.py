"""Checkpoint -> images: samplers, guidance, and an ADM .npz for `fid.py` or a PNG grid to look at.

    python sample.py runs/digits --num 100 --labels balanced --grid digits.png
    torchrun --nproc_per_node=8 sample.py runs/repa --num-images 50000 --sampler sde --steps 250 --cfg 1.8 \\
        --interval 0 0.7 --out samples.npz

Image i depends on (seed, i) alone: not on the batch size, the number of processes, or the images before it.
The images go to disk as they are made; a run that was killed continues with the same command.

    flow matching   x_t = (1 - t) x + t eps, t = 0 data, t = 1 noise; predicts v = eps - x  (arXiv 2410.06940)
      ode, heun     dx/dt = v
      sde           dx = (v - t s) dt + sqrt(2t) dw, score s = -((1 - t) v + x) / t         (arXiv 2401.08740)
    EDM             x_sigma = x + sigma eps; predicts F of D = c_skip x + c_out F           (arXiv 2206.00364)
      edm           dx/dsigma = (x - D) / sigma, Heun's method; the only sampler of SD-DiT checkpoints

Shapes in the right margin: N batch, C, H, W latent channels, height, width.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import dit
from extract_features import ArrayFile, Parser, load_autoencoder, number, start_folder, to_autoencoder

# ------------------------------------------------------------------------------------------------------------
# Samplers: pure functions of a model, a start and a schedule; model(x, t) takes a number t; float64 throughout


def ode_times(steps, first=1.0):
    """From `first` (1 = noise) to 0 = data in equal steps: float64 [steps + 1]."""
    return torch.linspace(first, 0, steps + 1, dtype=torch.float64)


def sde_times(steps, last=0.04, first=1.0):
    """REPA's grid: `steps` points from `first` to `last`, then 0: float64 [steps + 1]."""
    times = torch.linspace(first, last, steps, dtype=torch.float64)
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


def edm_sigmas(steps=40, low=0.002, high=80.0, rho=7):
    """EDM's noise levels from `high` to `low`, then 0: float64 [steps + 1]."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


def flow_ode(model, x, times, heun=False):
    """Probability-flow ODE dx/dt = v(x, t) along `times` (see ode_times) from noise x [N, C, H, W].

    model(x, t) -> v. Euler's method, or Heun's, which corrects every step but the last. Returns float64.
    """
    x = x.double()
    for t, t_next in pairwise(times.tolist()):
        v = model(x, t).double()                                                  # (N, C, H, W)
        if heun and t_next > 0:
            v = (v + model(x + (t_next - t) * v, t_next).double()) / 2
        x = x + (t_next - t) * v
    return x


def flow_sde(model, x, times, noise):
    """Reverse SDE by Euler-Maruyama along `times` (see sde_times) from noise x [N, C, H, W]; last step without noise.

    model(x, t) -> v; noise() -> N(0, 1) like x. Returns float64. The diffusion coefficient is w_t = 2t as in REPA's
    code; its paper says w_t = t in SiT's convention, where the noise is sqrt(2 w_t): the same sampler.
    """
    x = x.double()
    for t, t_next in pairwise(times.tolist()):
        drift = (2 - t) * model(x, t).double() + x                                # v - t s without dividing by t
        x = x + (t_next - t) * drift
        if t_next > 0:
            x = x + math.sqrt(2 * t * (t - t_next)) * noise()
    return x


def edm_heun(denoiser, x, sigmas):
    """EDM's deterministic sampler along `sigmas` (see edm_sigmas) from standard normal noise x [N, C, H, W].

    denoiser(x, sigma) -> D. Heun corrects every step but the last: 2 K - 1 evaluations. Returns float64.
    """
    x = x.double() * sigmas[0].item()
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        slope = (x - denoiser(x, sigma).double()) / sigma                         # (N, C, H, W)
        if sigma_next > 0:
            ahead = x + (sigma_next - sigma) * slope
            slope = (slope + (ahead - denoiser(ahead, sigma_next).double()) / sigma_next) / 2
        x = x + (sigma_next - sigma) * slope
    return x


def edm_denoiser(network):
    """network(x, sigma) -> F as the denoiser D = c_skip x + c_out F."""

    def denoiser(x, sigma):
        c_skip, c_out, _, _ = dit.edm_coefficients(torch.tensor(sigma, dtype=torch.float64))
        return c_skip * x + c_out * network(x, sigma).double()

    return denoiser


def guided(model, y, scale=1.0, interval=None, guide=None, control=None, control_scale=None):
    """model(x, t, y) -> a function of (x, t), with guidance at the noise levels of the inclusive interval.

    Classifier-free: v = v(null) + scale (v(y) - v(null)). With a second network `guide` (autoguidance, arXiv
    2406.02507): v = g(y) + scale (v(y) - g(y)). Both see the same control [N, 7], which is not amplified.
    With a scale for the control as well (arXiv 2411.03177), in three passes, 0 for null class or no control:
        v = v(0, 0) + scale (v(y, 0) - v(0, 0)) + scale control_scale (v(y, control) - v(y, 0))
    Outside the interval, or with scale <= 1 and no control_scale, there is one pass. Guiding EDM's F guides its
    denoiser, which is affine in F.
    paper: its guidance formula was not read / here: reconstructed from the two scales that it names.
    official code: DiT and SiT guide only three of the four channels (DiT#41) / here: all, as in REPA.
    official code: Heun's second evaluation is guided if the step's start is / here: if its own t is inside.
    """
    null = torch.full_like(y, model.num_classes)

    def passes(x, times, *cases):
        """One v for each (classes, control) of `cases`, from one forward pass of a larger batch."""
        n, (classes, controls) = len(cases), zip(*cases, strict=True)
        controls = None if control is None else torch.cat(controls)
        return model(x.repeat(n, 1, 1, 1), times.repeat(n), torch.cat(classes), control=controls).chunk(n)

    def velocity(x, t):
        x, times = x.float(), torch.full((len(x),), t, device=x.device)
        single = scale <= 1 and control_scale is None
        if single or (interval and not interval[0] <= t <= interval[1]):
            return model(x, times, y, control=control)
        if guide is not None:
            v, v_weak = model(x, times, y, control=control), guide(x, times, y, control=control)
            return v_weak + scale * (v - v_weak)
        if control_scale is None:
            v, v_null = passes(x, times, (y, control), (null, control))
            return v_null + scale * (v - v_null)
        v, v_y, v_null = passes(x, times, (y, control), (y, 0 * control), (null, 0 * control))
        return v_null + scale * (v_y - v_null) + scale * control_scale * (v - v_y)

    return velocity


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: written, read, and proven; the official files of REPA, SiT and DiT


def replace_file(path, write):
    """write(file) beside the old file, then replace it: a kill or a full disk leaves the old one whole.

    SystemExit with one line if it fails.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        if os.path.exists(temporary):
            os.unlink(temporary)
        sys.exit(f"cannot write {path} ({error}); free some space and run the same command again")


def write_checkpoint(path, checkpoint):
    """See replace_file."""
    replace_file(path, lambda file: torch.save(checkpoint, file))


class NoiseDiT(dit.DiT):
    """DiT's own networks (arXiv 2212.09748), which predict the eps of x_vp = alpha x + sigma eps, as velocity models.

    alpha^2 is the product of 1 - beta, sigma^2 = 1 - alpha^2. The flow has the same noise at t = sigma / (alpha +
    sigma), where x_t = x_vp / (alpha + sigma) and v = eps - (x_vp - sigma eps) / alpha = (eps - x_t) / (1 - t).
    Sampling starts at the schedule's largest t, `first_time`; below its smallest, 0.0099, the timestep stays 0.
    """

    def __init__(self, **options):
        super().__init__(**options)
        alpha = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)) ** 0.5
        sigma = (1 - alpha**2) ** 0.5
        self.log_snr = 2 * np.log(alpha / sigma)                                  # of the timesteps 0 to 999
        self.first_time = float(sigma[-1] / (alpha[-1] + sigma[-1]))              # 0.9937

    def forward(self, x, t, y, drop=None, control=None):
        """Velocity of x [N, C, H, W] at times t [N], 0 < t <= first_time, for the classes y [N]."""
        log_snr = 2 * torch.log((1 - t) / t).cpu().numpy()
        timestep = np.interp(-log_snr, -self.log_snr, np.arange(1000))            # it wants rising numbers
        t = t.view(-1, 1, 1, 1)
        x_vp = x / torch.hypot(1 - t, t)                                          # 1 / (alpha + sigma)
        eps = super().forward(x_vp, torch.from_numpy(timestep).to(x), y, drop)
        return (eps - x) / (1 - t)


dit.ARCHITECTURES["NoiseDiT"] = NoiseDiT


def from_official(file, official=None):
    """A checkpoint like those of the training scripts, from a file of REPA, SiT or DiT: weights, or a dict with `ema`.

    Four output channels with projectors: REPA. Eight: the first four are the prediction; SiT never trains the rest,
    which stay 0, DiT does. Four without projectors: `official`, "repa" or "sit", must say. ValueError otherwise.
    As v_REPA(x, t) = - v_SiT(x, 1 - t), SiT's last layer changes its sign and its time MLP absorbs t -> 1 - t, a
    rotation of every pair cos(t f), sin(t f).
    """
    state, first, time = file.get("ema", file), "x_embedder.proj.weight", "t_embedder.mlp.0.weight"
    if not {first, time, "pos_embed", "blocks.0.attn.qkv.weight"} <= state.keys():
        raise ValueError("neither a checkpoint of these training scripts nor of REPA, SiT or DiT")
    kind = "repa" if any(name.startswith(("projectors.", "decoder_blocks.")) for name in state) else None
    shallow = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    converted = {}
    for name, value in state.items():
        if not name.startswith("projectors."):
            # older files of REPA call the blocks behind the aligned one decoder_blocks
            name = re.sub(r"^decoder_blocks\.(\d+)", lambda match: f"blocks.{int(match[1]) + shallow}", name)
            converted[name] = value.float()
    width, channels, patch, _ = converted[first].shape
    depth = len({name.split(".")[1] for name in converted if name.startswith("blocks.")})
    heads = {(d, w): h for d, w, h in dit.SIZES.values()}.get((depth, width))
    if heads is None:
        raise ValueError(f"{depth} blocks of width {width} are none of the sizes {', '.join(dit.SIZES)}")

    last = {name: value for name, value in converted.items() if name.startswith("final_layer.linear.")}
    if all(len(value) == 2 * patch**2 * channels for value in last.values()):
        halves = {name: value.unflatten(0, (patch**2, 2, channels)) for name, value in last.items()}
        kind = "dit" if any(half[:, 1].any() for half in halves.values()) else "sit"
        last = {name: half[:, 0].flatten(0, 1) for name, half in halves.items()}
    if official and kind not in (official, None):
        raise ValueError(f"--official {official}: by its keys and shapes the file is of {kind}")
    kind = kind or official
    if kind is None:
        raise ValueError("a file of REPA or of SiT? Its keys do not tell: say --official repa or --official sit")
    if kind == "sit":
        last = {name: -value for name, value in last.items()}
        cos, sin = converted[time].chunk(2, dim=1)
        f = dit.Sinusoids(cos.shape[1]).omega
        converted[time] = torch.cat([cos * f.cos() + sin * f.sin(), cos * f.sin() - sin * f.cos()], dim=1)

    weights, side = converted | last, math.isqrt(converted["pos_embed"].shape[1]) * patch
    classes = len(converted["y_embedder.embedding_table.weight"]) - 1
    config = dict(arch="NoiseDiT" if kind == "dit" else "DiT", input_size=side, patch_size=patch, in_channels=channels)
    config |= dict(hidden_size=width, depth=depth, num_heads=heads, num_classes=classes)
    data = dict(vae="stabilityai/sd-vae-ft-ema", latent_scale=0.18215, latent_shift=0.0, image_size=8 * side)
    data["classes"] = [str(i) for i in range(classes)]
    checkpoint = dict(model=weights, ema=weights, config=config, data=data, control=None)
    return checkpoint | dict(step=file.get("steps"), args={"ema": 0.9999})


def prove(checkpoint, resume=False):
    """Raise unless all parts of a checkpoint are there and fit each other, and the weights are finite."""
    kinds = dict(model=dict, ema=dict, config=dict, data=dict, args=dict, step=(int, type(None)))
    for key, kind in (kinds | (dict(opt=dict, heads=dict, step=int) if resume else {})).items():
        if not isinstance(checkpoint.get(key), kind):
            raise ValueError(f"{key} is missing or of a wrong type")
    config, ema, data, control = (checkpoint.get(key) for key in ("config", "ema", "data", "control"))

    # the weights bound the sizes before anything is built: a damaged size could take all memory
    largest = max(side for value in ema.values() for side in value.shape)
    for key, value in config.items():
        if isinstance(value, int) and value > (len(ema) if key.endswith("depth") else largest):
            raise ValueError(f"config: {key} {value} is larger than the weights")
    tokens = (config["input_size"] // config["patch_size"]) ** 2
    if tokens * config["hidden_size"] != ema["pos_embed"].numel():
        raise ValueError(f"config: {tokens} tokens of width {config['hidden_size']} do not fit pos_embed")
    with torch.device("meta"):
        model = dit.build(config)
    for part in ("model", "ema"):
        model.load_state_dict(checkpoint[part], assign=True)  # raises if a name or a shape is another
        for name, value in checkpoint[part].items():
            if value.nbytes > value.untyped_storage().nbytes() or not value.isfinite().all():
                raise ValueError(f"{part}: {name} is not finite")

    sound = {
        "step": (checkpoint["step"] or 0) >= 0,
        "vae": isinstance(data["vae"], str),
        "latent_scale": 0 < abs(data["latent_scale"]) < math.inf,
        "latent_shift": abs(data["latent_shift"]) < math.inf,
        "classes": len(data["classes"]) == config["num_classes"] and set(map(type, data["classes"])) <= {str},
        "control": list(control.shape[::2]) == [config["num_classes"], 7] if model.control_embedder else control is None,
    }
    if not all(sound.values()):
        raise ValueError(f"{', '.join(key for key, good in sound.items() if not good)}: not as a training script writes")


def checkpoint_file(path):
    """The path itself, or last.pt of a run folder."""
    return Path(path) / "last.pt" if os.path.isdir(path) else Path(path)


def read_checkpoint(path, resume=False, official=None):
    """The dict of a checkpoint (see checkpoint_file), on the CPU; official files are brought into the same form.

    resume: demand also what a run needs to go on. official: see from_official. ValueError if it is missing or unsound.
    """
    path = checkpoint_file(path)
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such checkpoint")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # REPA's and SiT's scripts save their arguments
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if "config" not in checkpoint:
            checkpoint = from_official(checkpoint, official)
        prove(checkpoint, resume)
    except Exception as error:  # whatever a foreign or damaged file leads to
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{path}: not a readable checkpoint ({reason}); use another one") from None
    return {"control": None} | checkpoint


def load_model(path, weights="ema", device="cpu", official=None):
    """The model of a checkpoint, in eval mode, and the checkpoint. ValueError if it is missing or unsound."""
    checkpoint = read_checkpoint(path, official=official)
    model = dit.build(checkpoint["config"])
    model.load_state_dict(checkpoint[weights])
    return model.to(device).eval(), checkpoint


# ------------------------------------------------------------------------------------------------------------
# From a model to images


def image_generators(seed, indices):
    """One generator per image, seeded by (seed, index)."""
    states = [np.random.SeedSequence([seed, int(i)]).generate_state(1, np.uint64)[0] for i in indices]
    return [torch.Generator().manual_seed(int(state)) for state in states]


def choose_labels(labels, indices, num_classes, seed):
    """Class of each image index: int64 [n]. "random", "balanced" (index modulo classes) or a list, repeated in turn."""
    if labels == "random":
        # a stream of its own: the noise of image i is the same whatever its label
        draws = [np.random.default_rng([seed, int(i), 1]).integers(num_classes) for i in indices]
        return torch.tensor(draws, dtype=torch.int64)
    choices = range(num_classes) if labels == "balanced" else labels
    return torch.tensor([choices[int(i) % len(choices)] for i in indices])


def choose_control(control, table, y, indices, seed):
    """Control rows [n, 7] of the images `indices` with classes y [n]; None for "none" or a model without control.

    "empirical": a random row of the image's class in `table` [classes, rows, 7]; "fixed": a sharp whole image of
    512 x 512 pixels (our choice); or seven numbers h0, w0, top, left, h, w, flip.
    """
    if control == "none" or table is None:
        return None
    if control == "empirical":
        draws = [np.random.default_rng([seed, int(i), 2]).integers(table.shape[1]) for i in indices]
        return table[y, torch.tensor(draws)]
    return torch.tensor([512, 512, 0, 0, 512, 512, 0] if control == "fixed" else control).expand(len(y), -1)


def choose_sampler(model, sampler=None, steps=None):
    """The sampler, by default edm for SD-DiT and ode for flow matching, and its times or noise levels [steps + 1].

    The default number of steps is 40 for edm and 50 for flow matching. Times and noise levels are those of the
    model's time shift. ValueError if the sampler is for the other kind of model.
    """
    edm = isinstance(model, dit.SDDiT)
    sampler = sampler or ("edm" if edm else "ode")
    if (sampler == "edm") != edm:
        kind, known = ("an EDM", "edm") if edm else ("a flow-matching", "ode, heun, sde")
        raise ValueError(f"--sampler {sampler}: the checkpoint is {kind} model; its samplers: {known}")
    if edm:
        return sampler, model.time_shift * edm_sigmas(steps or 40)
    times = sde_times if sampler == "sde" else ode_times
    return sampler, dit.shift_time(times(steps or 50, first=getattr(model, "first_time", 1.0)), model.time_shift)


@torch.no_grad()
def generate(model, indices, y, sampler=None, steps=None, seed=0, control=None, **guidance):
    """Latents float64 [N, C, H, W] of the images `indices` with classes y [N], on the model's device.

    control [N, 7], guidance: see `guided`.
    """
    device, (sampler, times) = model.pos_embed.device, choose_sampler(model, sampler, steps)
    generators, side = image_generators(seed, indices), model.grid * model.patch_size

    def noise():
        rows = [torch.randn(model.in_channels, side, side, generator=generator) for generator in generators]
        return torch.stack(rows).to(device)                                       # (N, C, H, W)

    control = None if control is None else control.to(device)
    network = guided(model, y.to(device), control=control, **guidance)
    if sampler == "edm":
        return edm_heun(edm_denoiser(network), noise(), times)
    if sampler == "sde":
        return flow_sde(network, noise(), times, noise)
    return flow_ode(network, noise(), times, heun=sampler == "heun")


def decode(latents, autoencoder, data, indices=None):
    """Latents as the model sees them -> uint8 images [N, H, W, 3], rounded. ValueError names those not finite.

    official code: REPA and ADM truncate 255 (x + 1) / 2, half a level darker / here: rounded, as in DiT and SiT.
    """
    images = autoencoder.decode(to_autoencoder(latents, data).float())
    bad = np.flatnonzero(~images.isfinite().flatten(1).all(1).cpu())
    if len(bad):
        which = ", ".join(str(i) for i in (bad if indices is None else np.asarray(indices)[bad]))
        raise ValueError(f"{len(bad)} of {len(images)} images are not finite: {which}; try --precision fp32")
    return (images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def save_grid(images, path, columns, gap=4):
    """uint8 [n, H, W, 3] -> a picture with `columns` images per row, small ones enlarged to at least 48 pixels."""
    zoom = max(1, -(-48 // images.shape[1]))
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    h, w = images.shape[1] + gap, images.shape[2] + gap
    rows = -(-len(images) // columns)
    grid = np.full((rows * columns, h, w, 3), 96, np.uint8)  # grey between the images
    grid[: len(images), :-gap, :-gap] = images
    grid = grid.reshape(rows, columns, h, w, 3).swapaxes(1, 2).reshape(rows * h, columns * w, 3)
    replace_file(path, lambda file: Image.fromarray(grid[:-gap, :-gap]).save(file, "PNG"))


def preview(model, data, autoencoder, path, seed=0, table=None):
    """The picture that training scripts draw of their EMA: a class per column, default sampler, no guidance.

    table: control rows by class, of which `empirical` draws.
    """
    num_classes, device = len(data["classes"]), model.pos_embed.device
    columns = min(10, num_classes) if num_classes > 1 else 10
    classes, indices = np.linspace(0, num_classes - 1, columns).astype(int).tolist(), range(4 * columns)
    y = choose_labels(classes, indices, num_classes, seed)
    control = choose_control("empirical", table, y, indices, seed)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        latents = generate(model, indices, y, seed=seed, control=control)
    try:
        save_grid(decode(latents, autoencoder, data), path, columns)
    except ValueError as error:  # a run goes on without its picture
        print(f"{path}: {error}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------
# Command line


def box(text):
    """An argparse type: empirical, fixed, none, or seven numbers of a box inside its image."""
    if text in ("empirical", "fixed", "none"):
        return text
    try:
        h0, w0, top, left, h, w, flip = numbers = [int(value) for value in text.split(",")]
    except ValueError:
        numbers = None
    if not numbers or min(top, left) < 0 or min(h, w) < 1 or top + h > h0 or left + w > w0 or flip not in (0, 1):
        raise argparse.ArgumentTypeError(f"{text}: expected empirical, fixed, none, or a box h0,w0,top,left,h,w,flip")
    return numbers


def file_type(suffix):
    """An argparse type: the path of a file with this suffix."""

    def parse(text):
        if not text.endswith(suffix):
            raise argparse.ArgumentTypeError(f"{text}: must end in {suffix}")
        return Path(text)

    return parse


def parse_args(argv=None):
    cuda = torch.cuda.is_available()
    parser = Parser(__file__, __doc__)
    parser.add_argument("checkpoint", help="run folder, its last.pt or STEP.pt, or an official file of REPA, SiT or DiT")
    add = parser.add_argument_group("images").add_argument
    # torchrun before Python 3.12.7 takes --num for an ambiguous option of its own; it leaves --num-images alone
    add("--num", "--num-images", type=number(int, 1, 2**31), default=100, help="number of images")
    add("--labels", default="random", help="random, balanced, or names or indices of classes, such as 207,360")
    add("--control", type=box, default="empirical", help="empirical, fixed, none, or h0,w0,top,left,h,w,flip")
    add("--seed", type=number(int, 0), default=0, help="image i depends on it and on i")
    add("--out", type=file_type(".npz"), help="ADM .npz: arr_0 uint8 [N, H, W, 3], arr_1 labels, protocol")
    add("--grid", type=file_type(".png"), help="PNG with all images; a column per class where labels are balanced")
    add = parser.add_argument_group("sampler").add_argument
    add("--sampler", choices=["ode", "heun", "sde", "edm"], help="default: ode (Euler), edm for SD-DiT")
    add("--steps", type=number(int, 1, 10**6), help="default: 50, edm 40; REPA's numbers need sde with 250")
    add("--cfg", type=number(float, 1), default=1.0, help="guidance scale w; no guidance at 1")
    add("--interval", type=number(float, 0), nargs=2, metavar=("LOW", "HIGH"), help="noise levels to guide at")
    add("--control-cfg", type=number(float, 0), metavar="BETA", help="guide class and control apart: three passes")
    add("--guide", help="checkpoint of a weaker model: autoguidance instead of the null class")
    add = parser.add_argument_group("weights").add_argument
    add("--weights", choices=["ema", "model"], default="ema", help="averaged or raw weights")
    add("--official", choices=["repa", "sit"], help="convention of an official file whose keys do not tell")
    add("--vae", help="default: the cache's; REPA's numbers need stabilityai/sd-vae-ft-ema")
    add = parser.add_argument_group("machine").add_argument
    add("--batch-size", type=number(int, 1), default=64, help="images at once, per process")
    add("--precision", choices=["fp32", "bf16"], default="bf16" if cuda else "fp32", help="of the network")
    add("--compile", action=argparse.BooleanOptionalAction, default=cuda, help="compile the blocks")
    args = parser.parse_args(argv)
    if not (args.out or args.grid):
        parser.error("nothing to write: give --out samples.npz, --grid grid.png, or both")
    if args.interval and args.interval[0] >= args.interval[1]:
        parser.error(f"--interval {args.interval[0]:g} {args.interval[1]:g}: the lower noise level comes first")
    if (args.guide or args.interval) and args.cfg == 1 and args.control_cfg is None:
        parser.error(f"--{'guide' if args.guide else 'interval'} has no effect without --cfg above 1")
    if args.control_cfg is not None and (args.guide or args.control == "none"):
        parser.error(f"--control-cfg {args.control_cfg:g}: guides with the null class and a --control, not --guide")
    return args


def prepare(args, device):
    """Model, guide or None, autoencoder and checkpoint, all checked; completes `args`. ValueError for anything wrong."""
    for path in (args.out, args.grid):
        if path and (path.is_dir() or path == args.out and path.exists()):
            raise ValueError(f"{path} exists; delete it or choose another name")
    (model, checkpoint), guide = load_model(args.checkpoint, args.weights, device, args.official), None
    config, data = checkpoint["config"], checkpoint["data"]
    if args.guide:
        guide, theirs = load_model(args.guide, args.weights, device, args.official)
        for key in ("input_size", "in_channels", "num_classes"):
            if theirs["config"][key] != config[key]:
                raise ValueError(f"--guide {args.guide}: {key} is {theirs['config'][key]}, not {config[key]}")
        if any(isinstance(model, kind) != isinstance(guide, kind) for kind in (dit.SDDiT, NoiseDiT)):
            raise ValueError(f"--guide {args.guide}: the other kind of model; a guide needs the same latents and loss")
    args.sampler, times = choose_sampler(model, args.sampler, args.steps)
    args.steps, args.first, args.vae = len(times) - 1, round(times[0].item(), 4), args.vae or data["vae"]
    if args.labels not in ("random", "balanced"):
        names = {str(i): i for i in range(config["num_classes"])}
        names |= {name: i for i, name in enumerate(data["classes"])}  # a name counts before an index
        unknown = [name for name in args.labels.split(",") if name not in names]
        if unknown:
            known = ", ".join(data["classes"][:3])
            raise ValueError(f"--labels {unknown[0]}: no index below {config['num_classes']} nor a class such as {known}")
        args.labels = [names[name] for name in args.labels.split(",")]
    if model.control_embedder is None:
        if args.control not in ("none", "empirical") or args.control_cfg is not None:
            raise ValueError(f"--control {args.control}: the model was trained without --control")
        args.control = "none"
    if args.control_cfg is not None and checkpoint["args"].get("control_drop") == 0:
        raise ValueError(f"--control-cfg {args.control_cfg:g}: the model was trained with --control-drop 0")
    if (args.cfg > 1 or args.control_cfg is not None) and not guide and not model.y_embedder.dropout_prob:
        raise ValueError(f"--cfg {args.cfg:g}: the model was trained without label dropout and has no null class")
    autoencoder = load_autoencoder(args.vae, device)
    made = autoencoder.channels, autoencoder.downsampling * config["input_size"]
    if made != (config["in_channels"], data["image_size"]):
        raise ValueError(f"--vae {args.vae}: decodes {made[0]} channels to {made[1]} pixels, not as in training")
    for network in [model, guide][: 1 + bool(guide)] if args.compile else []:
        dit.compile_blocks(network)
    return model, guide, autoencoder, checkpoint


def sample_images(args):
    """Draw this process's share of the images into a folder; the first process makes the files of them."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    torch.set_float32_matmul_precision("high")  # TF32 on the GPUs that have it
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=1))  # nothing but barriers, and ranks may be uneven
    barrier = dist.barrier if world > 1 else (lambda: None)
    model, guide, autoencoder, checkpoint = prepare(args, device)
    data, num_classes, table = checkpoint["data"], model.num_classes, checkpoint["control"]
    target = args.out or args.grid
    folder = target.with_name(target.name + ".partial")
    if rank == 0:
        names = "sampler steps first cfg interval control control_cfg labels seed weights vae precision".split()
        protocol = {name: getattr(args, name) for name in names} | dict(
            guide=file_hash(args.guide) if args.guide else None,
            time_shift=model.time_shift,
            count=args.num,
            ema=checkpoint["args"].get("ema"),
            checkpoint=file_hash(args.checkpoint),
            train_step=checkpoint["step"],
            image_size=data["image_size"],
            state="float64",
            rounding="nearest",
        )
        arrays = {"images": dict(shape=[args.num, data["image_size"], data["image_size"], 3], dtype="uint8")}
        lock = start_folder(folder, "protocol.json", protocol, arrays, args.num, copies=1 + bool(args.out))
    barrier()
    done = np.load(folder / "progress.npy", mmap_mode="r")
    todo = np.flatnonzero(done == 0)
    batches = [todo[i : i + args.batch_size] for i in range(0, len(todo), args.batch_size)][rank::world]
    barrier()  # every rank has read the same `done` before any writes to it
    images, flags = ArrayFile(folder / "images.npy"), ArrayFile(folder / "progress.npy")
    guidance = dict(scale=args.cfg, interval=args.interval, guide=guide, control_scale=args.control_cfg)
    seldom = 0.1 if sys.stderr.isatty() else 60  # a log file gets a line a minute
    bar = tqdm(total=args.num, initial=int(done.sum()), unit="img", disable=rank > 0, mininterval=seldom)
    for indices in batches:
        y = choose_labels(args.labels, indices, num_classes, args.seed)
        control = choose_control(args.control, table, y, indices, args.seed)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            latents = generate(model, indices, y, args.sampler, args.steps, args.seed, control, **guidance)
        pixels = decode(latents, autoencoder, data, indices)
        for run in np.split(np.arange(len(indices)), np.flatnonzero(np.diff(indices) > 1) + 1):
            images.write(indices[run[0]], pixels[run])
            flags.write(indices[run[0]], np.ones(len(run)))
        bar.update(int(done.sum()) - bar.n)
    barrier()
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return

    bar.close()
    pixels = np.load(folder / "images.npy", mmap_mode="r")
    labels = choose_labels(args.labels, range(args.num), num_classes, args.seed).numpy()
    if args.grid:
        by_class = args.labels == "balanced" and num_classes <= 20
        save_grid(pixels, args.grid, columns=num_classes if by_class else math.isqrt(args.num))
    if args.out:
        text = np.array(json.dumps(protocol))
        replace_file(args.out, lambda file: np.savez(file, arr_0=pixels, arr_1=labels, protocol=text))
    shutil.rmtree(folder)
    lock.close()
    print(", ".join(f"{key} {value}" for key, value in protocol.items()))


def file_hash(path):
    """First 16 hexadecimal digits of the SHA-256 of a checkpoint file."""
    return hashlib.sha256(np.memmap(checkpoint_file(path), mode="r")).hexdigest()[:16]


def main(argv=None):
    args = parse_args(argv)
    try:
        sample_images(args)
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")


if __name__ == "__main__":
    main()
