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
import contextlib
import hashlib
import json
import math
import os
import shutil
import subprocess
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
from extract_features import (
    ArrayFile,
    Parser,
    load_autoencoder,
    lock_folder,
    number,
    start_folder,
    to_autoencoder,
    write_json,
)

# ------------------------------------------------------------------------------------------------------------
# Samplers: pure functions of a model, a start and a schedule; model(x, t) takes a number t; x is float64


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
    """Reverse SDE by Euler-Maruyama along `times` (see sde_times) from noise x [N, C, H, W].

    model(x, t) -> v; noise() -> N(0, 1) like x. Returns float64. The diffusion coefficient is w_t = 2t, as in
    REPA's code; its paper says w_t = t in SiT's convention, where the noise is sqrt(2 w_t): the same sampler.
    """
    x = x.double()
    for t, t_next in pairwise(times.tolist()):
        drift = (2 - t) * model(x, t).double() + x                                # v - t s without 1 / t
        x = x + (t_next - t) * drift
        if t_next > 0:
            x = x + math.sqrt(2 * t * (t - t_next)) * noise()
    return x


def edm_heun(denoiser, x, sigmas):
    """EDM's deterministic sampler along `sigmas` (see edm_sigmas) from standard normal noise x [N, C, H, W].

    denoiser(x, sigma) -> D. Heun's method for dx/dsigma: 2 K - 1 evaluations. Returns float64.
    """

    def slope(x, sigma):
        return (x - denoiser(x, sigma).double()) / sigma                          # (N, C, H, W)

    return flow_ode(slope, x.double() * sigmas[0].item(), sigmas, heun=True)


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
    Outside the interval, or with scale <= 1 and no control_scale, there is one pass. EDM's denoiser is affine
    in F, so guiding F guides it.
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
    """write(file) beside the old file, then replace it. SystemExit, and the old file whole, if that fails."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        reason = " ".join(str(error).split())[:200]
        sys.exit(f"cannot write {path} ({reason}); free some space and run the same command again")


def write_checkpoint(path, checkpoint):
    """Replace the checkpoint at `path` (see replace_file)."""
    replace_file(path, lambda file: torch.save(checkpoint, file))


class NoiseDiT(dit.DiT):
    """DiT's own networks (arXiv 2212.09748) as velocity models: they predict eps in alpha x + sigma eps.

    Call that x_vp. It is the flow's x_t = x_vp / (alpha + sigma) at t = sigma / (alpha + sigma), so that
    v = eps - x = eps - (x_vp - sigma eps) / alpha = (eps - x_t) / (1 - t). Sampling starts at `first_time`,
    the largest t of their schedule; below the smallest, 0.0099, the timestep stays 0.
    official code: 250 ancestral steps in x_vp, learned variances / here: the flow's samplers, no variances.
    """

    def __init__(self, **options):
        super().__init__(**options)
        alpha = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)) ** 0.5              # of the timesteps 0 to 999
        sigma = (1 - alpha**2) ** 0.5
        self.log_snr = 2 * np.log(alpha / sigma)
        self.first_time = float(sigma[-1] / (alpha[-1] + sigma[-1]))              # 0.9937

    def forward(self, x, t, y, drop=None, control=None):
        """Velocity of x [N, C, H, W] at times t [N], 0 < t <= first_time, for the classes y [N]."""
        log_snr = 2 * torch.log((1 - t) / t).cpu().numpy()
        timestep = np.interp(-log_snr, -self.log_snr, np.arange(1000))            # (N,)
        t = t.view(-1, 1, 1, 1)
        x_vp = x / torch.hypot(1 - t, t)                                          # (alpha + sigma) x
        return (super().forward(x_vp, torch.from_numpy(timestep).to(x), y, drop) - x) / (1 - t)


dit.ARCHITECTURES["NoiseDiT"] = NoiseDiT


def from_official(file, official=None):
    """A checkpoint like those of the training scripts from a file of REPA, SiT or DiT, or of their scripts.

    Eight output channels: the first four are the prediction; SiT never trains the others, which stay 0, DiT
    does. Four: REPA with projectors; without, `official` must be "repa" or "sit". ValueError for other files.
    SiT: with v_REPA(x, t) = - v_SiT(x, 1 - t) the last layer changes its sign, and the time MLP absorbs
    t -> 1 - t, a rotation of every pair cos(t f), sin(t f).
    """
    state, first, time = file.get("ema", file), "x_embedder.proj.weight", "t_embedder.mlp.0.weight"
    if not {first, time, "pos_embed", "blocks.0.attn.qkv.weight", "final_layer.linear.bias"} <= state.keys():
        raise ValueError("neither a checkpoint of these training scripts nor of REPA, SiT or DiT")
    blocks = [name.split(".")[0] for name in state if name.endswith("attn.qkv.weight")]
    weights = {}
    for name, value in state.items():
        part, *rest = name.split(".")
        if part == "decoder_blocks":  # in older files of REPA: the blocks behind the aligned one
            name = ".".join(["blocks", str(int(rest[0]) + blocks.count("blocks")), *rest[1:]])
        if part != "projectors":
            weights[name] = value.float()
    width, channels, patch, _ = weights[first].shape
    heads = {(depth, width): heads for depth, width, heads in dit.SIZES.values()}.get((len(blocks), width))
    if heads is None:
        raise ValueError(f"{len(blocks)} blocks of width {width} are no size of {', '.join(dit.SIZES)}")

    eight = len(weights["final_layer.linear.bias"]) == 2 * patch**2 * channels
    last = {name: value for name, value in weights.items() if name.startswith("final_layer.linear.")}
    last = {name: value.unflatten(0, (patch**2, 1 + eight, channels)) for name, value in last.items()}
    if eight:
        kind = "dit" if any(value[:, 1].any() for value in last.values()) else "sit"
    else:
        kind = "repa" if len(weights) < len(state) or "decoder_blocks" in blocks else official
    if kind is None or official not in (kind, None):
        found = f"is of {kind}" if kind else "may be of REPA or of SiT: say --official repa or --official sit"
        raise ValueError(f"by its keys and shapes the file {found}")
    for name, value in last.items():
        weights[name] = value[:, 0].flatten(0, 1) * (-1 if kind == "sit" else 1)
    if kind == "sit":
        cos, sin = weights[time].chunk(2, dim=1)
        f = dit.Sinusoids(cos.shape[1]).omega
        weights[time] = torch.cat([cos * f.cos() + sin * f.sin(), cos * f.sin() - sin * f.cos()], dim=1)

    side = math.isqrt(weights["pos_embed"].shape[1]) * patch
    classes = len(weights["y_embedder.embedding_table.weight"]) - 1
    arch = "NoiseDiT" if kind == "dit" else "DiT"
    config = dict(arch=arch, input_size=side, patch_size=patch, in_channels=channels, num_classes=classes)
    config |= dict(hidden_size=width, depth=len(blocks), num_heads=heads)
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
    config, ema, data = checkpoint["config"], checkpoint["ema"], checkpoint["data"]
    # sizes are checked against the weights before anything is built: a damaged one could take all memory
    largest = max(side for value in ema.values() for side in value.shape)
    for key, value in config.items():
        if isinstance(value, int) and value > (len(ema) if key.endswith("depth") else largest):
            raise ValueError(f"{key} {value} is larger than the weights")
    tokens = (config["input_size"] // config["patch_size"]) ** 2
    if tokens * config["hidden_size"] != ema["pos_embed"].numel():
        raise ValueError(f"input_size {config['input_size']} does not fit the weights")
    with torch.device("meta"):
        model = dit.build(config)
    for part in ("model", "ema"):
        model.load_state_dict(checkpoint[part], assign=True)  # raises for other names or shapes
        for name, value in checkpoint[part].items():
            if value.nbytes > value.untyped_storage().nbytes() or not value.isfinite().all():
                raise ValueError(f"{part}: {name} is not whole and finite")
    classes, control = config["num_classes"], checkpoint.get("control")
    sound = dict(
        step=(checkpoint["step"] or 0) >= 0,
        vae=isinstance(data["vae"], str),
        latent_scale=0 < abs(data["latent_scale"]) < math.inf,
        latent_shift=abs(data["latent_shift"]) < math.inf,
        classes=len(data["classes"]) == classes and all(isinstance(name, str) for name in data["classes"]),
        control=list(control.shape[::2]) == [classes, 7] if model.control_embedder else control is None,
    )
    for key in (key for key, good in sound.items() if not good):
        raise ValueError(f"{key} does not fit the model")


def checkpoint_file(path):
    """The path of a checkpoint, or that of last.pt in a run folder."""
    return Path(path, "last.pt") if os.path.isdir(path) else Path(path)


def read_checkpoint(path, resume=False, official=None):
    """The dict of a checkpoint or a run folder's last.pt, on the CPU; official files take the same form.

    resume: prove also the parts that only training needs. official: see from_official. ValueError, naming the
    file, if it is missing, damaged or another thing.
    """
    path = checkpoint_file(path)
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such checkpoint")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # in files of REPA's and SiT's scripts
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if "config" not in checkpoint:
            checkpoint = from_official(checkpoint, official)
        prove(checkpoint, resume)
    except Exception as error:  # whatever a foreign or damaged file leads to
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200].removeprefix("ValueError: ")
        raise ValueError(f"{path}: not a readable checkpoint ({reason}); use another one") from None
    return {"control": None} | checkpoint


def load_model(path, weights="ema", device="cpu", official=None):
    """The model of a checkpoint, in eval mode, and the checkpoint (see read_checkpoint)."""
    checkpoint = read_checkpoint(path, official=official)
    model = dit.build(checkpoint["config"])
    model.load_state_dict(checkpoint[weights])
    return model.to(device).eval(), checkpoint


# ------------------------------------------------------------------------------------------------------------
# The run folder of a training script: last.pt, log.jsonl, run.json


def read_run(folder, args, data, may_change):
    """The checkpoint of a run to resume, None if there is none. ValueError if it is of another command or
    cache.

    args: the flags of the command, data: the meta.json of its cache; flags in `may_change` may differ.
    """
    path = Path(folder) / "last.pt"
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"--out {folder}: is a file; choose a folder")
    if not path.exists():
        return None
    checkpoint = read_checkpoint(path, resume=True)
    there, here = checkpoint["args"] | {"cache": checkpoint["data"]}, args | {"cache": data}
    for key in sorted(there.keys() | here.keys()):
        if key not in may_change and there.get(key) != here.get(key):
            was, now = (str(values.get(key, "absent"))[:60] for values in (there, here))
            where = f"{folder} holds another run: {key} is {was} there, {now} here"
            raise ValueError(f"{where}; choose another --out")
    return checkpoint


def restore(checkpoint, objective, ema, optimizer):
    """Load a checkpoint into the objective (model and heads), its averaged model and its optimiser.
    ValueError if it does not fit."""
    weights = {f"model.{name}": value for name, value in checkpoint["model"].items()}
    try:
        objective.load_state_dict(weights | checkpoint["heads"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["opt"])
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the checkpoint does not fit this run ({str(error).splitlines()[0]})") from None


def start_run(args, step, world, model):
    """Lock the run folder, describe this start in run.json, cut the log after `step`, and print one line.

    Returns the lock, which is held until it is closed or the process ends.
    """
    out, lock = Path(args.out), lock_folder(Path(args.out))
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        commit = None
    device = torch.cuda.get_device_name() if model.pos_embed.is_cuda else "cpu"
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, cuda=torch.version.cuda)
    start = dict(step=step, argv=sys.argv, args=vars(args), versions=versions, device=device)
    start |= dict(processes=world, git=commit)
    starts = json.loads((out / "run.json").read_text()) if step and (out / "run.json").exists() else []
    write_json(out / "run.json", [*starts, start])
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may have cut the last one
    temporary = log.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
    os.replace(temporary, log)
    share = args.batch_size // world
    micro = args.micro_batch or share
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {model.grid**2} tokens"
    batch = f"batch {args.batch_size} = {world} processes x {share // micro} x {micro}"
    print(f"{type(model).__name__} {args.model}, {size}; {device}, {args.precision}; {batch}; steps {step} to")
    if step >= args.steps:
        print(f"{out} is at step {step} already; raise --steps to go on")
    return lock


def write_row(path, row, bar):
    """Append a row to log.jsonl and show its denoising loss, which methods have in common, unlike their
    totals."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
    name = "loss_fm" if "loss_fm" in row else "loss_edm"
    bar.set_postfix_str(f"{name} {row[name]:.4f}, {row['img_per_s']:.0f} img/s")
    if bar.disable:  # no terminal
        print(f"step {row['step']}: {name} {row[name]:.4f}, {row['img_per_s']:.0f} img/s", flush=True)


# ------------------------------------------------------------------------------------------------------------
# From a model to images


def image_generators(seed, indices):
    """One generator per image, seeded by (seed, index)."""
    states = [np.random.SeedSequence([seed, int(i)]).generate_state(1, np.uint64)[0] for i in indices]
    return [torch.Generator().manual_seed(int(state)) for state in states]


def choose_labels(labels, indices, num_classes, seed):
    """Class of each image index: int64 [n]. "random", "balanced" (index modulo classes) or a list."""
    if labels == "random":
        # a stream of its own: the noise of image i does not depend on its label
        draws = [np.random.default_rng([seed, int(i), 1]).integers(num_classes) for i in indices]
        return torch.tensor(draws, dtype=torch.int64)
    choices = range(num_classes) if labels == "balanced" else labels
    return torch.tensor([choices[int(i) % len(choices)] for i in indices])


def choose_control(control, table, y, indices, seed):
    """Control rows [n, 7] of the images `indices` with classes y [n]; None for "none" or without a table.

    "empirical": a random row of the image's class in `table` [classes, rows, 7]; "fixed": a sharp whole image
    of 512 x 512 pixels, our choice; or seven numbers h0, w0, top, left, h, w, flip.
    """
    if control == "none" or table is None:
        return None
    if control == "empirical":
        draws = [np.random.default_rng([seed, int(i), 2]).integers(table.shape[1]) for i in indices]
        return table[y, torch.tensor(draws)]
    return torch.tensor([512, 512, 0, 0, 512, 512, 0] if control == "fixed" else control).expand(len(y), -1)


def choose_sampler(model, sampler=None, steps=None):
    """The sampler and its times or noise levels [steps + 1], shifted as the model's.

    By default edm in 40 steps for SD-DiT, ode in 50 for flow matching. ValueError if it is for other models.
    """
    edm = isinstance(model, dit.SDDiT)
    sampler = sampler or ("edm" if edm else "ode")
    if (sampler == "edm") != edm:
        kind, known = ("an EDM", "edm") if edm else ("a flow-matching", "ode, heun, sde")
        raise ValueError(f"--sampler {sampler}: the checkpoint is {kind} model; its samplers: {known}")
    if edm:
        return sampler, model.time_shift * edm_sigmas(steps or 40)
    grid, first = sde_times if sampler == "sde" else ode_times, getattr(model, "first_time", 1.0)
    return sampler, dit.shift_time(grid(steps or 50, first=first), model.time_shift)


@torch.no_grad()
def generate(model, indices, y, sampler=None, steps=None, seed=0, control=None, **guidance):
    """Latents float64 [N, C, H, W] of the images `indices` with classes y [N], on the model's device.

    control [N, 7]; guidance: see `guided`; sampler, steps: see `choose_sampler`.
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
    start = noise() * math.hypot(1 - times[0], times[0])                          # 1 at t = 1; see NoiseDiT
    if sampler == "sde":
        return flow_sde(network, start, times, noise)
    return flow_ode(network, start, times, heun=sampler == "heun")


def decode(latents, autoencoder, data, indices=None):
    """Latents as the model makes them -> uint8 images [N, H, W, 3]. ValueError names those not finite.

    official code: REPA and ADM truncate 255 (x + 1) / 2, half a level darker / here: rounded, as in SiT.
    """
    images = autoencoder.decode(to_autoencoder(latents, data).float())
    bad = np.flatnonzero(~images.isfinite().flatten(1).all(1).cpu())
    if len(bad):
        which = ", ".join(map(str, bad if indices is None else np.asarray(indices)[bad]))
        raise ValueError(f"{len(bad)} of {len(images)} images are not finite: {which}; try --precision fp32")
    return (images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def save_grid(images, path, columns, gap=4):
    """uint8 [n, H, W, 3] -> a picture with `columns` images per row, enlarged to at least 48 pixels each."""
    zoom = max(1, -(-48 // images.shape[1]))
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    h, w = images.shape[1] + gap, images.shape[2] + gap
    rows = -(-len(images) // columns)
    grid = np.full((rows * columns, h, w, 3), 96, np.uint8)  # grey between the images
    grid[: len(images), :-gap, :-gap] = images
    grid = grid.reshape(rows, columns, h, w, 3).swapaxes(1, 2).reshape(rows * h, columns * w, 3)
    replace_file(path, lambda file: Image.fromarray(grid[:-gap, :-gap]).save(file, "PNG"))


def preview(model, features, autoencoder, path, seed=0):
    """The picture that training scripts draw of their EMA: a class per column, default sampler, no
    guidance."""
    data, table, device = features.meta, features.control_table, model.pos_embed.device
    num_classes = len(data["classes"])
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
    """An argparse type: empirical, fixed, none, or the seven numbers of a box inside its image."""
    if text in ("empirical", "fixed", "none"):
        return text
    try:
        h0, w0, top, left, h, w, flip = numbers = [number(int, 0, 10**6)(value) for value in text.split(",")]
        if min(h, w) < 1 or top + h > h0 or left + w > w0 or flip > 1:
            raise ValueError
    except (ValueError, argparse.ArgumentTypeError):
        expected = "empirical, fixed, none, or a box h0,w0,top,left,h,w,flip"
        raise argparse.ArgumentTypeError(f"{text}: expected {expected}") from None
    return numbers


def parse_args(argv=None):
    cuda, parser = torch.cuda.is_available(), Parser(__file__, __doc__)
    add = parser.add_argument
    add("checkpoint", help="a run folder, its last.pt or STEP.pt, or an official file of REPA, SiT or DiT")
    # torchrun before Python 3.12.7 takes --num for an ambiguous option of its own, but not --num-images
    add("--num", "--num-images", type=number(int, 1, 2**31), default=100, help="number of images")
    add("--out", type=Path, help="ADM .npz: arr_0 uint8 [N, H, W, 3], arr_1 labels, protocol")
    add("--grid", type=Path, help="PNG with all images; a column per class where labels are balanced")
    add("--labels", default="random", help="random, balanced, or classes: names without a comma, or indices")
    add("--sampler", choices=["ode", "heun", "sde", "edm"], help="default: ode (Euler), edm for SD-DiT")
    add("--steps", type=number(int, 1, 10**6), help="default: 50, edm 40; REPA's numbers need sde with 250")
    add("--cfg", type=number(float, 1), default=1.0, help="guidance scale; no guidance at 1")
    add("--interval", type=number(float, 0), nargs=2, metavar=("LOW", "HIGH"), help="noise levels to guide")
    add("--control", type=box, default="empirical", help="empirical, fixed, none, or h0,w0,top,left,h,w,flip")
    add("--control-cfg", type=number(float, 0), metavar="BETA", help="guide class and control apart")
    add("--guide", help="checkpoint of a weaker model: autoguidance instead of the null class")
    add("--weights", choices=["ema", "model"], default="ema", help="averaged or raw weights")
    add("--official", choices=["repa", "sit"], help="convention of an official file that does not tell")
    add("--vae", help="default: that of the cache; REPA's numbers need stabilityai/sd-vae-ft-ema")
    add("--seed", type=number(int, 0), default=0, help="image i follows from the seed and i")
    add("--batch-size", type=number(int, 1), default=64, help="images at once, per process")
    precision = "bf16" if cuda else "fp32"
    add("--precision", choices=["fp32", "bf16"], default=precision, help="of the network; bf16 on CUDA")
    add("--compile", action="onoff", default=cuda, help="default: on CUDA")
    args = parser.parse_args(argv)
    if not (args.out or args.grid):
        parser.error("nothing to write: give --out samples.npz, --grid grid.png, or both")
    for name, path, suffix in (("--out", args.out, ".npz"), ("--grid", args.grid, ".png")):
        if path and (path.suffix != suffix or path.is_dir()):
            parser.error(f"{name} {path}: must be a file that ends in {suffix}")
    low, high = args.interval or (0, math.inf)
    if low >= high:
        parser.error(f"--interval {low:g} {high:g}: the lower noise level comes first")
    if (args.guide or args.interval) and args.cfg == 1 and args.control_cfg is None:
        parser.error(f"--{'guide' if args.guide else 'interval'} has no effect without --cfg above 1")
    if args.control_cfg is not None and (args.guide or args.control == "none"):
        parser.error(f"--control-cfg {args.control_cfg:g}: needs a --control and no --guide")
    return args


def class_indices(text, classes):
    """--labels: random, balanced, or the indices of classes given by name or index; a name is tried first."""
    if text in ("random", "balanced"):
        return text
    known = {str(i): i for i in range(len(classes))} | {name: i for i, name in enumerate(classes)}
    unknown = [name for name in text.split(",") if name not in known]
    if unknown:
        raise ValueError(f"--labels {unknown[0]}: neither one of the classes nor of 0 to {len(classes) - 1}")
    return [known[name] for name in text.split(",")]


def prepare(args, device):
    """Model, guide or None, autoencoder and checkpoint, checked; completes `args`. ValueError if unfit."""
    if args.out and args.out.exists():
        raise ValueError(f"--out {args.out} exists; delete it or choose another name")
    if args.grid and not args.grid.parent.is_dir():
        raise ValueError(f"--grid {args.grid}: no such folder {args.grid.parent}")
    model, checkpoint = load_model(args.checkpoint, args.weights, device, args.official)
    config, data, guide = checkpoint["config"], checkpoint["data"], None
    if args.guide:
        guide, theirs = load_model(args.guide, args.weights, device, args.official)
        keys = ("input_size", "in_channels", "num_classes")
        different = [f"another {key}" for key in keys if theirs["config"][key] != config[key]]
        if any(isinstance(model, kind) != isinstance(guide, kind) for kind in (dit.SDDiT, NoiseDiT)):
            different.append("the other kind of model")
        if different:
            needs = "a guide needs the same latents, classes and loss"
            raise ValueError(f"--guide {args.guide}: {different[0]}; {needs}")
    args.sampler, times = choose_sampler(model, args.sampler, args.steps)
    args.steps, args.labels = len(times) - 1, class_indices(args.labels, data["classes"])
    if model.control_embedder is None:
        if args.control not in ("none", "empirical") or args.control_cfg is not None:
            raise ValueError(f"--control {args.control}: the model was trained without --control")
        args.control = "none"
    if args.control_cfg is not None and checkpoint["args"].get("control_drop") == 0:
        raise ValueError(f"--control-cfg {args.control_cfg:g}: the model was trained with --control-drop 0")
    if (args.cfg > 1 or args.control_cfg is not None) and not guide and not model.y_embedder.dropout_prob:
        raise ValueError(f"--cfg {args.cfg:g}: the model has no null class (no label dropout in training)")
    args.vae = args.vae or data["vae"]
    autoencoder = load_autoencoder(args.vae, device)
    made = autoencoder.channels, autoencoder.downsampling * config["input_size"]
    if made != (config["in_channels"], data["image_size"]):
        raise ValueError(f"--vae {args.vae}: is for {made[0]} channels and makes images of {made[1]} pixels")
    if args.compile:
        dit.compile_blocks(torch.nn.ModuleList(filter(None, (model, guide))))
    return model, guide, autoencoder, checkpoint


def describe(args, model, checkpoint):
    """The protocol: everything that the images depend on."""
    names = "sampler steps cfg interval control control_cfg labels seed weights vae".split()
    _, times = choose_sampler(model, args.sampler, args.steps)
    return {name: getattr(args, name) for name in names} | dict(
        count=args.num,
        first_noise_level=round(times[0].item(), 4),
        time_shift=model.time_shift,
        guide=args.guide and file_hash(args.guide),
        checkpoint=file_hash(args.checkpoint),
        train_step=checkpoint["step"],
        ema=checkpoint["args"].get("ema"),
        image_size=checkpoint["data"]["image_size"],
        precision=f"{args.precision}, state fp64",
        rounding="nearest",
    )


def sample_images(args):
    """Draw this process's share of the images into a folder; the first process then writes the result."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    torch.set_float32_matmul_precision("high")  # TF32 on the GPUs that have it
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=1))  # only barriers, and ranks may be uneven
    barrier = dist.barrier if world > 1 else (lambda: None)
    model, guide, autoencoder, checkpoint = prepare(args, device)
    data, classes, size = checkpoint["data"], model.num_classes, checkpoint["data"]["image_size"]
    target = args.out or args.grid
    folder = target.with_name(target.name + ".partial")
    if rank == 0:
        protocol = describe(args, model, checkpoint)
        arrays = {"images": dict(shape=[args.num, size, size, 3], dtype="uint8")}
        lock = start_folder(folder, "protocol.json", protocol, arrays, args.num, copies=1 + bool(args.out))
    barrier()

    done = np.load(folder / "progress.npy", mmap_mode="r")
    todo = np.flatnonzero(done == 0)
    batches = [todo[i : i + args.batch_size] for i in range(0, len(todo), args.batch_size)][rank::world]
    barrier()  # every rank has read the same `done` before any writes to it
    images, flags = ArrayFile(folder / "images.npy"), ArrayFile(folder / "progress.npy")
    guidance = dict(scale=args.cfg, interval=args.interval, guide=guide, control_scale=args.control_cfg)
    pause = 0.1 if sys.stderr.isatty() else 60  # seconds between two states of the bar; fewer in a log file
    bar = tqdm(total=args.num, initial=int(done.sum()), unit="img", disable=rank > 0, mininterval=pause)
    for indices in batches:
        y = choose_labels(args.labels, indices, classes, args.seed)
        control = choose_control(args.control, checkpoint["control"], y, indices, args.seed)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            latents = generate(model, indices, y, args.sampler, args.steps, args.seed, control, **guidance)
        pixels = decode(latents, autoencoder, data, indices)
        for run in np.split(np.arange(len(indices)), np.flatnonzero(np.diff(indices) > 1) + 1):
            images.write(indices[run[0]], pixels[run])
            flags.write(indices[run[0]], np.ones(len(run)))
        bar.update(int(done.sum()) - bar.n)
    bar.close()
    barrier()
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return

    pixels = np.load(folder / "images.npy", mmap_mode="r")
    labels = choose_labels(args.labels, range(args.num), classes, args.seed).numpy()
    if args.grid:
        by_class = args.labels == "balanced" and classes <= 20
        save_grid(pixels, args.grid, columns=classes if by_class else math.isqrt(args.num))
    if args.out:
        content = dict(arr_0=pixels, arr_1=labels, protocol=np.array(json.dumps(protocol)))
        replace_file(args.out, lambda file: np.savez(file, **content))
    shutil.rmtree(folder)
    lock.close()
    print(", ".join(f"{key} {value}" for key, value in protocol.items()))


def file_hash(path):
    """First 16 hexadecimal digits of the SHA-256 of a checkpoint."""
    return hashlib.sha256(np.memmap(checkpoint_file(path), mode="r")).hexdigest()[:16]


def main(argv=None):
    args = parse_args(argv)
    try:
        sample_images(args)
    except (ValueError, OSError) as error:
        where = "" if getattr(error, "filename", True) else f"{args.out or args.grid}: "  # of a full disk
        sys.exit(f"sample.py: {where}{error}")


if __name__ == "__main__":
    main()
