"""Checkpoint -> images: samplers, guidance, and an ADM .npz for `fid.py` or a PNG grid to look at.

    python sample.py runs/repa-digits --num 100 --labels balanced --grid digits.png
    torchrun --nproc_per_node=8 sample.py runs/repa --num-images 50000 --sampler sde --steps 250 --cfg 1.8 \\
        --interval 0 0.7 --out samples.npz

Image i depends on (seed, i) alone. A run that was killed continues with the same command.

    flow matching   x_t = (1 - t) x + t eps, t = 0 data, t = 1 noise; predicts v = eps - x  (arXiv 2410.06940)
      ode, heun     dx/dt = v
      sde           dx = (v - t s) dt + sqrt(2t) dw, score s = -((1 - t) v + x) / t         (arXiv 2401.08740)
    EDM             x_sigma = x + sigma eps; predicts F of D = c_skip x_sigma + c_out F     (arXiv 2206.00364)
      edm           dx/dsigma = (x - D) / sigma, Heun's method; the only sampler of SD-DiT checkpoints

Shapes in the right margin: N batch, C, H, W latent channels, height, width.
"""

import argparse
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
import extract_features as ef
from extract_features import Parser, number


# ---- Samplers: pure functions of a model, a start and a schedule; model(x, t) takes a number t; x is float64
def ode_times(steps, first=1.0):
    """From `first` (1 = noise) to 0 = data in equal steps: float64 [steps + 1]."""
    return torch.linspace(first, 0, steps + 1, dtype=torch.float64)


def sde_times(steps, last=0.04, first=1.0):
    """REPA's grid: `steps` points from `first` to `last`, then 0: float64 [steps + 1]."""
    return torch.nn.functional.pad(torch.linspace(first, last, steps, dtype=torch.float64), (0, 1))


def edm_sigmas(steps=40, low=0.002, high=80.0, rho=7):
    """EDM's noise levels from `high` to `low`, then 0: float64 [steps + 1]."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    roots = high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))
    return torch.nn.functional.pad(roots**rho, (0, 1))


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

    denoiser(x, sigma) -> D. Heun's method: two evaluations a step, one in the last. Returns float64.
    """
    x = x.double() * sigmas[0].item()
    return flow_ode(lambda x, sigma: (x - denoiser(x, sigma).double()) / sigma, x, sigmas, heun=True)


def edm_denoiser(network):
    """network(x, sigma) -> F as the denoiser D = c_skip x + c_out F."""

    def denoiser(x, sigma):
        c_skip, c_out, _, _ = dit.edm_coefficients(torch.tensor(sigma, dtype=torch.float64))
        return c_skip * x + c_out * network(x, sigma).double()

    return denoiser


def guided(model, y, scale=1.0, interval=None, guide=None, control=None, control_scale=None):
    """model(x, t, y) -> a function of (x, t), with guidance at the noise levels of the inclusive interval.

    v = w + scale (v(y, c) - w) for classes y [N] and control c [N, 7]; w = v(null, c) (classifier-free), or
    that of a second network, w = guide(y, c) (autoguidance, arXiv 2406.02507). With a scale for the control
    as well (arXiv 2411.03177), and 0 for null class or no control:
        v = v(0, 0) + scale (v(y, 0) - v(0, 0)) + scale control_scale (v(y, c) - v(y, 0))
    EDM's denoiser is affine in F, so guiding F guides it.
    paper: its guidance formula was not read / here: reconstructed from the two scales that it names.
    official code: DiT and SiT guide only three of the four channels (DiT#41) / here: all, as in REPA.
    official code: Heun's second evaluation is guided if the step's start is / here: if its own t is inside.
    """
    cases = [(y, control), (torch.full_like(y, model.num_classes), control)]
    if control_scale is not None:
        cases = [(y, control), (y, 0 * control), (cases[1][0], 0 * control)]
    n, classes = len(cases), torch.cat([y for y, _ in cases])
    controls = None if control is None else torch.cat([control for _, control in cases])
    low, high = interval or (0, math.inf)

    def velocity(x, t):
        x, times = x.float(), torch.full((len(x),), t, device=x.device)
        if (scale <= 1 and control_scale is None) or not low <= t <= high:
            return model(x, times, y, control=control)                            # (N, C, H, W)
        if guide is not None:
            v, weak = (network(x, times, y, control=control) for network in (model, guide))
        else:  # all cases in one batch
            v, *v_y, weak = model(x.repeat(n, 1, 1, 1), times.repeat(n), classes, control=controls).chunk(n)
            v = v_y[0] + control_scale * (v - v_y[0]) if v_y else v
        return weak + scale * (v - weak)

    return velocity


# ---- Checkpoints: written, read, and proven; the official files of REPA, SiT and DiT
def write_checkpoint(path, checkpoint):
    ef.replace_file(path, lambda file: torch.save(checkpoint, file))


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
    state = file.get("ema", file)
    weights = {name: value.float() for name, value in state.items() if not name.startswith("projectors.")}
    shallow = sum(name.startswith("blocks.") and "qkv.weight" in name for name in weights)
    for name in [name for name in weights if name.startswith("decoder_blocks.")]:
        _, i, rest = name.split(".", 2)  # in older files of REPA: the blocks behind the aligned one
        weights[f"blocks.{int(i) + shallow}.{rest}"] = weights.pop(name)
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    depth = sum("qkv.weight" in name for name in weights)
    heads = {width: heads for _, width, heads in dit.SIZES.values()}[width]

    last = {name: value for name, value in weights.items() if name.startswith("final_layer.linear.")}
    last = {name: value.unflatten(0, (patch**2, -1, channels)) for name, value in last.items()}
    if last["final_layer.linear.bias"].shape[1] == 2:
        kind = "dit" if any(value[:, 1].any() for value in last.values()) else "sit"
    else:
        kind = "repa" if weights.keys() != state.keys() else official
    if kind is None or official not in (kind, None):
        either = "fit REPA and SiT: sample.py needs --official repa or --official sit"
        raise ValueError(f"its keys and shapes {f'are of {kind}' if kind else either}")
    for name, value in last.items():
        weights[name] = value[:, 0].flatten(0, 1) * (-1 if kind == "sit" else 1)
    if kind == "sit":
        cos, sin = weights["t_embedder.mlp.0.weight"].chunk(2, dim=1)
        f = dit.Sinusoids(cos.shape[1]).omega
        rotated = [cos * f.cos() + sin * f.sin(), cos * f.sin() - sin * f.cos()]
        weights["t_embedder.mlp.0.weight"] = torch.cat(rotated, dim=1)

    side = math.isqrt(weights["pos_embed"].shape[1]) * patch
    classes = [str(i) for i in range(len(weights["y_embedder.embedding_table.weight"]) - 1)]
    config = dict(arch="NoiseDiT" if kind == "dit" else "DiT", input_size=side, num_classes=len(classes))
    config |= dict(patch_size=patch, in_channels=channels, hidden_size=width, depth=depth, num_heads=heads)
    data = dict(vae="stabilityai/sd-vae-ft-ema", latent_scale=0.18215, latent_shift=0.0, image_size=8 * side)
    checkpoint = dict(model=weights, ema=weights, config=config, data=data | dict(classes=classes))
    return checkpoint | dict(step=file.get("steps"), args={"ema": 0.9999})


def prove(checkpoint, resume):
    """Raise something unless all parts of a checkpoint are there, fit each other, and are finite."""
    for key in ["model", "ema", "config", "data", "args", *(["heads", "opt"] if resume else [])]:
        if not isinstance(checkpoint.get(key), dict):
            raise ValueError(f"{key} is missing or of a wrong type")
    config, data, ema = checkpoint["config"], checkpoint["data"], checkpoint["ema"]
    sizes = {key: value for key, value in config.items() if isinstance(value, int)}
    largest = max(side for value in ema.values() for side in value.shape)
    needed = "input_size patch_size in_channels hidden_size depth num_heads num_classes".split()
    if min(sizes.values()) < 0 or min(sizes.get(key, 0) for key in needed) < 1:
        raise ValueError(f"config: {sizes} is out of range")
    width = ema["pos_embed"].numel() / (config["input_size"] // config["patch_size"]) ** 2
    if max(sizes.values()) > largest or width != config["hidden_size"]:  # or building fills the memory
        raise ValueError(f"its weights are not of {sizes}")
    with torch.device("meta"):
        model = dit.build(config)
    for part in ("model", "ema", "heads") if resume else ("model", "ema"):
        if part != "heads":
            model.load_state_dict(checkpoint[part], assign=True)  # raises for other names or shapes
        if not all(x.is_floating_point() and x.isfinite().all() for x in checkpoint[part].values()):
            raise ValueError(f"{part} is not finite")
    step, names, table = checkpoint["step"], data["classes"], checkpoint.get("control")
    rows = getattr(table, "shape", None)
    sound = dict(
        step=step >= 0 if isinstance(step, int) else step is None and not resume,
        args=all(isinstance(key, str) and not torch.is_tensor(x) for key, x in checkpoint["args"].items()),
        vae=isinstance(data["vae"], str),
        image_size=data.get("image_size") in (config["input_size"], 8 * config["input_size"]),
        latent_scale=0 < abs(data["latent_scale"]) < math.inf,
        latent_shift=abs(data["latent_shift"]) < math.inf,
        classes=len(names) == model.num_classes and all(isinstance(name, str) for name in names),
        control=rows == (len(names), 50, 7) if model.control_embedder else table is None,
    )
    for key in (key for key, good in sound.items() if not good):
        raise ValueError(f"{key} does not fit")


def checkpoint_file(path):
    """The path of a checkpoint, or that of last.pt in a run folder."""
    return Path(path, "last.pt") if os.path.isdir(path) else Path(path)


def read_checkpoint(path, resume=False, official=None, noise=False):
    """The dict of a checkpoint or a run folder's last.pt, on the CPU; official files take the same form.

    resume: it must also have heads, an optimiser state and a step. official: see from_official. noise: accept
    NoiseDiT, which cannot be trained here. ValueError, naming the file, if it is missing, damaged or foreign.
    """
    path = checkpoint_file(path)
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such checkpoint")
    with ef.reading(f"{path}: not a readable checkpoint", "use another one"):
        with torch.serialization.safe_globals([argparse.Namespace]):  # in files of REPA's and SiT's scripts
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if "config" not in checkpoint:
            checkpoint = from_official(checkpoint, official)
        prove(checkpoint, resume)
        if checkpoint["config"]["arch"] == "NoiseDiT" and not noise:
            raise ValueError("DiT's own networks predict noise: only sample.py takes them")
    return checkpoint


def load_model(path, weights="ema", device="cpu", official=None):
    """The model of a checkpoint, in eval mode, and the checkpoint (see read_checkpoint)."""
    checkpoint = read_checkpoint(path, official=official, noise=True)
    model = dit.build(checkpoint["config"])
    model.load_state_dict(checkpoint[weights])
    return model.to(device).eval(), checkpoint


# ---- The run folder of a training script: last.pt, log.jsonl, run.json
def read_run(folder, args, data, may_change):
    """The checkpoint of a run to resume, or None. ValueError if it is of another command or cache.

    args: the flags of the command, data: the meta.json of its cache; flags in `may_change` may differ.
    """
    path = Path(folder) / "last.pt"
    if Path(folder).is_file():
        raise ValueError(f"--out {folder}: is a file; choose a folder")
    if not path.exists():
        found = {file.name for file in Path(folder).glob("[!.]*") if file.suffix != ".png"}
        ours = {"run.json", "log.jsonl", "last.pt.tmp", "log.jsonl.tmp"} if "run.json" in found else set()
        if foreign := found - ours - {"run.json.tmp"}:
            raise ValueError(f"--out {folder} holds other files ({min(foreign)}); choose another --out")
        return None
    checkpoint = read_checkpoint(path, resume=True)
    there, here = checkpoint["args"] | {"cache": checkpoint["data"]}, args | {"cache": data}
    for key in sorted((there.keys() | here.keys()) - set(may_change)):
        if there.get(key) != here.get(key):
            found = f"{key} is {there.get(key, 'no flag')!s:.60} there, {here.get(key, 'no flag')!s:.60} here"
            raise ValueError(f"{folder} holds another run: {found}; choose another --out")
    return checkpoint


def restore(checkpoint, objective, ema, optimizer):
    """Load a checkpoint into the objective (model and heads), its averaged model and its optimiser."""
    weights = {f"model.{name}": value for name, value in checkpoint["model"].items()}
    with ef.reading("last.pt does not fit this run", "choose another --out"):
        objective.load_state_dict(weights | checkpoint["heads"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["opt"])
        for parameter, moments in optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # fused AdamW trusts them
                if moments[name].shape != parameter.shape or not moments[name].isfinite().all():
                    raise ValueError("the optimiser's state is damaged")
        if checkpoint["step"] and not optimizer.state:
            raise ValueError("the optimiser has no state")


def start_run(args, step, world, model):
    """Lock the run folder, describe this start in run.json, cut the log after `step`; returns the lock."""
    out = Path(args.out)
    lock, log, rows, starts = ef.lock_folder(out), out / "log.jsonl", [], []
    if step and log.exists():
        with ef.reading(f"{log}: damaged", "delete it to go on"):
            *whole, _ = log.read_text().split("\n")  # a kill may have cut the last one
            rows = [row + "\n" for row in whole if int(json.loads(row)["step"]) <= step]
    if step and (out / "run.json").exists():
        with ef.reading(f"{out}/run.json: damaged", "delete it to go on"):
            starts = [dict(start) for start in json.loads((out / "run.json").read_text())]
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    device = torch.cuda.get_device_name() if model.pos_embed.is_cuda else "cpu"
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, cuda=torch.version.cuda)
    start = dict(step=step, argv=sys.argv, args=vars(args), versions=versions, device=device)
    ef.write_json(out / "run.json", [*starts, start | dict(processes=world, git=commit)])
    ef.replace_file(log, lambda file: file.write("".join(rows).encode()))

    if step >= args.steps:
        print(f"{out} is at step {step} already; raise --steps to go on")
        return lock
    share = args.batch_size // world
    micro = args.micro_batch or share
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {model.grid**2} tokens"
    batch = f"{world} {'process' if world == 1 else 'processes'} x {share // micro} x {micro}"
    steps = f"batch {args.batch_size} = {batch}; steps {step} to {args.steps}"
    print(f"{type(model).__name__} {args.model}, {size}; {device}, {args.precision}; {steps}; {out}")
    return lock


def write_row(path, row, bar):
    """Append a row to log.jsonl and show its denoising loss (loss_fm or loss_edm), else the total loss."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
    name = next(name for name in ("loss_fm", "loss_edm", "loss") if name in row)
    text = f"{name} {row[name]:.4f}" if row["grad_norm"] > 0 else "no finite gradient"
    text += f", {row['img_per_s']:.0f} img/s" + (f", {row['skipped']} skipped" if row["skipped"] else "")
    bar.set_postfix_str(text)
    if bar.disable:  # no terminal
        print(f"step {row['step']}: {text}", flush=True)


# ---- From a model to images
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
    """The sampler and its times or noise levels [steps + 1]. ValueError if it is for other models."""
    edm = isinstance(model, dit.SDDiT)
    known, kind = (["edm"], "an EDM") if edm else (["ode", "heun", "sde"], "a flow-matching")
    sampler = sampler or known[0]
    if sampler not in known:
        raise ValueError(f"--sampler {sampler}: the checkpoint is {kind} model; use {', '.join(known)}")
    if edm:
        return sampler, model.time_shift * edm_sigmas(steps or 40)
    grid, first = sde_times if sampler == "sde" else ode_times, getattr(model, "first_time", 1.0)
    return sampler, dit.shift_time(grid(steps or 50, first=first), model.time_shift)


@torch.no_grad()
def generate(model, indices, y, sampler=None, steps=None, seed=0, control=None, **guidance):
    """Latents float64 [N, C, H, W] of the images `indices`, classes y [N], control [N, 7]; see `guided`."""
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
    images = autoencoder.decode(ef.to_autoencoder(latents, data).float())
    numbered = zip(indices or range(len(images)), images, strict=True)
    if bad := [str(i) for i, image in numbered if not image.isfinite().all()]:
        found = f"{len(bad)} of {len(images)} images are not finite: {', '.join(bad)}"
        raise ValueError(f"{found}; try --precision fp32")
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
    ef.replace_file(path, lambda file: Image.fromarray(grid[:-gap, :-gap]).save(file, "PNG"))


def preview(model, features, autoencoder, path, seed=0):
    """The picture of a training script: one class per column, default sampler, no guidance."""
    num_classes, device = len(features.meta["classes"]), model.pos_embed.device
    columns = min(10, num_classes) if num_classes > 1 else 10
    classes, indices = np.linspace(0, num_classes - 1, columns).astype(int).tolist(), range(4 * columns)
    y = choose_labels(classes, indices, num_classes, seed)
    control = choose_control("empirical", features.control_table, y, indices, seed)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        latents = generate(model, indices, y, seed=seed, control=control)
    try:
        save_grid(decode(latents, autoencoder, features.meta), path, columns)
    except ValueError as error:  # a run goes on without its picture
        print(f"{path}: {error}", file=sys.stderr)


# ---- Command line
def control_row(text):
    """An argparse type: empirical, fixed, none, or the seven numbers of a box inside its image."""
    if text in ("empirical", "fixed", "none"):
        return text
    h0, w0, top, left, h, w, flip, *more = [number(int, 0, 10**6)(x) for x in text.split(",")] + 7 * [-1]
    if more != 7 * [-1] or min(h, w) < 1 or top + h > h0 or left + w > w0 or flip > 1:
        expected = "empirical, fixed, none, or a box h0,w0,top,left,h,w,flip"
        raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
    return [h0, w0, top, left, h, w, flip]


def parse_args(argv=None):
    cuda, parser = torch.cuda.is_available(), Parser(__file__, __doc__)
    parser.add_argument("checkpoint", help="run folder, last.pt, STEP.pt, or a file of REPA, SiT or DiT")
    add = parser.add_argument_group("images").add_argument
    # torchrun before Python 3.12.7 takes --num for an ambiguous option of its own, but not --num-images
    add("--num", "--num-images", type=number(int, 1, 2**31), default=100, help="number of images")
    add("--out", type=Path, help="ADM .npz: arr_0 uint8 [N, H, W, 3], arr_1 labels, protocol")
    add("--grid", type=Path, help="PNG with all images; a column per class if balanced, up to 20 classes")
    add("--labels", default="random", help="random, balanced, or names or indices of classes: A,B")
    add("--control", type=control_row, default="empirical", help="fixed, none, or h0,w0,top,left,h,w,flip")
    add("--seed", type=number(int, 0), default=0, help="image i follows from the seed and i")
    add = parser.add_argument_group("sampler and guidance").add_argument
    add("--sampler", choices=["ode", "heun", "sde", "edm"], help="default: ode (Euler), edm for SD-DiT")
    add("--steps", type=number(int, 1, 10**6), help="default: 50, edm 40; REPA's numbers need sde with 250")
    add("--cfg", type=number(float, 1), default=1.0, help="guidance scale; no guidance at 1")
    add("--interval", type=number(float, 0), nargs=2, metavar=("LOW", "HIGH"), help="noise levels to guide")
    add("--control-cfg", type=number(float, 0), metavar="BETA", help="scale of the control, apart from --cfg")
    add("--guide", help="checkpoint of a weaker model: autoguidance instead of the null class")
    add = parser.add_argument_group("networks").add_argument
    add("--weights", choices=["ema", "model"], default="ema", help="averaged or raw weights")
    add("--official", choices=["repa", "sit"], help="origin of an official file that does not show it")
    add("--vae", help="default: that of the cache; REPA's numbers need stabilityai/sd-vae-ft-ema")
    add("--batch-size", type=number(int, 1), default=64, help="images at once, per process")
    add("--precision", choices=["fp32", "bf16"], default="bf16" if cuda else "fp32", help="of the network")
    add("--compile", action="onoff", default=cuda, help="default: on CUDA")
    args = parser.parse_args(argv)
    if not (args.out or args.grid):
        parser.error("nothing to write: give --out samples.npz, --grid grid.png, or both")
    for flag, path, suffix in (("--out", args.out, ".npz"), ("--grid", args.grid, ".png")):
        if path and path.suffix != suffix:
            parser.error(f"{flag} {path}: must be a file that ends in {suffix}")
    if args.interval and args.interval[0] >= args.interval[1]:
        parser.error("--interval {:g} {:g}: the lower noise level comes first".format(*args.interval))
    if (args.guide or args.interval) and args.cfg == 1 and args.control_cfg is None:
        parser.error(f"--{'guide' if args.guide else 'interval'} has no effect without --cfg above 1")
    return args


def prepare(args, device):
    """Model, guide or None, autoencoder and checkpoint, checked; completes `args`. ValueError if unfit."""
    if args.out and args.out.exists():
        raise ValueError(f"--out {args.out} exists; delete it or choose another name")
    if args.grid and (not args.grid.parent.is_dir() or args.grid.is_dir()):
        raise ValueError(f"--grid {args.grid}: no such folder, or itself a folder")
    model, checkpoint = load_model(args.checkpoint, args.weights, device, args.official)
    config, data, guide = checkpoint["config"], checkpoint["data"], None
    if args.guide:
        guide, theirs = load_model(args.guide, args.weights, device, args.official)
        same = all(theirs["config"][x] == config[x] for x in ("input_size", "in_channels", "num_classes"))
        if not same or any(isinstance(model, x) != isinstance(guide, x) for x in (dit.SDDiT, NoiseDiT)):
            raise ValueError(f"--guide {args.guide}: needs the same latents, classes and loss as the model")
    args.sampler, times = choose_sampler(model, args.sampler, args.steps)
    args.steps, args.vae = len(times) - 1, args.vae or data["vae"]
    if args.labels not in ("random", "balanced"):
        known = {str(i): i for i in range(model.num_classes)} | {x: i for i, x in enumerate(data["classes"])}
        if unknown := [name for name in args.labels.split(",") if name not in known]:
            classes = ", ".join(data["classes"][:9]) + ", ..." * (model.num_classes > 9)
            raise ValueError(f"--labels {unknown[0]}: classes are {classes}, or 0 to {model.num_classes - 1}")
        args.labels = [known[name] for name in args.labels.split(",")]
    if model.control_embedder is None:
        if args.control not in ("empirical", "none"):
            raise ValueError(f"--control {args.control}: the model was trained without --control")
        args.control = "none"
    apart = args.control_cfg is not None
    if apart and (guide or args.control == "none" or checkpoint["args"].get("control_drop") == 0):
        raise ValueError("--control-cfg: needs training with --control and --control-drop, and no --guide")
    if (apart or args.cfg > 1) and not guide and not model.y_embedder.dropout_prob:
        raise ValueError(f"--cfg {args.cfg:g}: the model has no null class (no label dropout in training)")
    autoencoder = ef.load_autoencoder(args.vae, device)
    made, needed = autoencoder.downsampling * config["input_size"], data["image_size"]
    if (autoencoder.channels, made) != (config["in_channels"], needed):
        found = f"decodes {autoencoder.channels} channels to {made} pixels"
        raise ValueError(f"--vae {args.vae}: {found}, not {config['in_channels']} to {needed}")
    if args.compile:
        dit.compile_blocks(torch.nn.ModuleList(filter(None, (model, guide))))
    return model, guide, autoencoder, checkpoint


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
        left_out = ("out", "grid", "batch_size", "compile")  # the images do not depend on these
        protocol = {key: value for key, value in vars(args).items() if key not in left_out}
        protocol |= dict(checkpoint=file_hash(args.checkpoint), guide=args.guide and file_hash(args.guide))
        protocol |= dict(train_step=checkpoint["step"], ema=checkpoint["args"].get("ema"), rounding="nearest")
        protocol["first_noise_level"] = choose_sampler(model, args.sampler, args.steps)[1][0].item()
        array = dict(shape=[args.num, size, size, 3], dtype="uint8")
        lock = ef.start_folder(folder, "protocol.json", protocol, {"images": array}, args.num, copies=2)
    barrier()

    done = np.load(folder / "progress.npy", mmap_mode="r")
    batches = [range(i, min(i + args.batch_size, args.num)) for i in range(0, args.num, args.batch_size)]
    batches = [batch for batch in batches if not done[batch.start : batch.stop].all()][rank::world]
    barrier()  # every rank has read the same `done` before any writes to it
    images, flags = (ef.ArrayFile(folder / f"{name}.npy") for name in ("images", "progress"))
    guidance = dict(scale=args.cfg, interval=args.interval, guide=guide, control_scale=args.control_cfg)
    pause = 0.1 if sys.stderr.isatty() else 60  # seconds between two states of the bar; longer in a log file
    bar = tqdm(total=args.num, initial=int(done.sum()), unit="img", disable=rank > 0, mininterval=pause)
    for batch in batches:
        y = choose_labels(args.labels, batch, classes, args.seed)
        control = choose_control(args.control, checkpoint.get("control"), y, batch, args.seed)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            latents = generate(model, batch, y, args.sampler, args.steps, args.seed, control, **guidance)
        images.write(batch.start, decode(latents, autoencoder, data, batch))
        flags.write(batch.start, np.ones(len(batch)))
        bar.update(int(done.sum()) - bar.n)
    bar.close()
    barrier()
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return

    pixels = np.load(folder / "images.npy", mmap_mode="r")
    if args.grid:
        by_class = args.labels == "balanced" and classes <= 20
        save_grid(pixels, args.grid, classes if by_class else math.isqrt(args.num))
    if args.out:
        labels = choose_labels(args.labels, range(args.num), classes, args.seed).numpy()
        content = dict(arr_0=pixels, arr_1=labels, protocol=np.array(json.dumps(protocol)))
        ef.replace_file(args.out, lambda file: np.savez(file, **content))
    shutil.rmtree(folder)
    lock.close()
    written = " and ".join(str(path) for path in (args.out, args.grid) if path)
    print(f"{written}:", ", ".join(f"{key} {value}" for key, value in protocol.items() if value is not None))


def file_hash(path):
    """First 16 hexadecimal digits of the SHA-256 of a checkpoint."""
    return hashlib.sha256(np.memmap(checkpoint_file(path), mode="r")).hexdigest()[:16]


def main(argv=None):
    args = parse_args(argv)
    try:
        sample_images(args)
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("sample.py: interrupted; run the same command again to go on")
