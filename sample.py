"""Checkpoint -> images: samplers, guidance, and an ADM .npz for `fid.py` or a PNG grid to look at.

    python sample.py runs/digits/last.pt --num 100 --labels balanced --grid digits.png
    torchrun --nproc_per_node=8 sample.py runs/repa/last.pt --num-images 50000 --sampler sde --steps 250 \\
        --cfg 1.8 --interval 0 0.7 --out samples.npz

Image i depends on (seed, i) alone: not on the batch size, the number of processes, or what was drawn before it. The
images go to disk as they are made; a run that was killed continues with the same command.

    flow matching   x_t = (1 - t) x + t eps, t = 0 data, t = 1 noise; the model predicts v = eps - x  (arXiv 2410.06940)
      ode, heun     dx/dt = v
      sde           dx = (v - t s) dt + sqrt(2t) dw, score s = -((1 - t) v + x) / t                   (arXiv 2401.08740)
    EDM             x_sigma = x + sigma eps; the model predicts F of D = c_skip x + c_out F           (arXiv 2206.00364)
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
from extract_features import ArrayFile, load_autoencoder, lock_folder, start_folder, to_autoencoder, write_json

# ----------------------------------------------------------------------------------------------------------------------
# Samplers: pure functions of a model, a start and a schedule; model(x, t) with a number t; the state is float64


def ode_times(steps):
    """1 = noise to 0 = data in equal steps: float64 [steps + 1]."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def sde_times(steps, last=0.04):
    """REPA's grid: `steps` points from 1 to `last`, then 0: float64 [steps + 1]."""
    return torch.cat([torch.linspace(1, last, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])


def edm_sigmas(steps=40, low=0.002, high=80.0, rho=7):
    """EDM's noise levels from `high` to `low`, then 0: float64 [steps + 1]."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


def flow_ode(model, x, times, heun=False):
    """Probability-flow ODE dx/dt = v(x, t) along `times` (see ode_times) from noise x [N, C, H, W]: Euler or Heun.

    model(x, t) -> v. Heun corrects every step but the last. Returns float64 [N, C, H, W].
    """
    x = x.double()
    for t, t_next in pairwise(times.tolist()):
        v = model(x, t).double()                                                  # (N, C, H, W)
        if heun and t_next > 0:
            v = (v + model(x + (t_next - t) * v, t_next).double()) / 2
        x = x + (t_next - t) * v
    return x


def flow_sde(model, x, times, noise):
    """Reverse SDE by Euler-Maruyama along `times` (see sde_times) from noise x [N, C, H, W]; last step deterministic.

    model(x, t) -> v; noise() -> N(0, 1) like x. The diffusion coefficient is w_t = 2t as in REPA's code, whose paper
    says w_t = t in SiT's convention, where the noise is sqrt(2 w_t): the same sampler. Returns float64 [N, C, H, W].
    """
    x = x.double()
    for t, t_next in pairwise(times.tolist()):
        drift = (2 - t) * model(x, t).double() + x                                # v - t s, free of the division by t
        x = x + (t_next - t) * drift
        if t_next > 0:
            x = x + math.sqrt(2 * t * (t - t_next)) * noise()
    return x


def edm_heun(denoiser, x, sigmas):
    """EDM's deterministic sampler along `sigmas` (see edm_sigmas) from standard normal noise x [N, C, H, W].

    denoiser(x, sigma) -> D. Heun corrects every step but the last: 2 K - 1 evaluations. Returns float64 [N, C, H, W].
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
    """model(x, t, y) -> a function of (x, t): guidance on all channels at the noise levels of the inclusive interval.

    Classifier-free: v = v(null) + scale (v(y) - v(null)); with a second network `guide`: v = g(y) + scale (v(y) - g(y))
    (autoguidance, arXiv 2406.02507). Both branches see the same control [N, 7], which is not amplified. With scales of
    their own (arXiv 2411.03177), in three passes, 0 for null class or no control:
        v = v(0, 0) + scale (v(y, 0) - v(0, 0)) + scale control_scale (v(y, control) - v(y, 0))
    Outside the interval, or with scale <= 1 and no control_scale, there is one pass. For EDM's F it is the same as for
    the denoiser, which is affine in F.
    paper: its guidance formula was not read / here: reconstructed from the two scales that it names.
    official code: DiT and SiT guide only three of the four channels (DiT#41) / here: all, as in REPA.
    official code: Heun's second evaluation is guided if the step's start is / here: if its own t is in the interval.
    """

    def velocity(x, t):
        x, times = x.float(), torch.full((len(x),), t, device=x.device)
        single = scale <= 1 and control_scale is None
        if single or (interval and not interval[0] <= t <= interval[1]):
            return model(x, times, y, control=control)
        if guide is not None:
            v, v_weak = model(x, times, y, control=control), guide(x, times, y, control=control)
            return v_weak + scale * (v - v_weak)
        null = torch.full_like(y, model.num_classes)
        if control_scale is None:
            twice = None if control is None else torch.cat([control, control])
            v, v_null = model(x.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([y, null]), control=twice).chunk(2)
            return v_null + scale * (v - v_null)
        classes, controls = torch.cat([y, y, null]), torch.cat([control, 0 * control, 0 * control])
        v, v_y, v_null = model(x.repeat(3, 1, 1, 1), times.repeat(3), classes, control=controls).chunk(3)
        return v_null + scale * (v_y - v_null) + scale * control_scale * (v - v_y)

    return velocity


# ----------------------------------------------------------------------------------------------------------------------
# From a checkpoint to images

FIXED_CONTROL = [512, 512, 0, 0, 512, 512, 0]  # h0, w0, top, left, h, w, flip


def write_checkpoint(path, checkpoint):
    """Write beside the old file, then replace it: a kill or a full disk leaves the old checkpoint whole."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        sys.exit(f"cannot write {path} ({error}); free some space and run the same command again")


def from_official(state):
    """(config, state) in dit.py's terms for a state dict of REPA's or SiT's released models, by its keys and values.

    REPA's files load as they are (older ones call the blocks behind the aligned one `decoder_blocks`; projectors are
    left out). SiT's are converted exactly: the first four of eight output channels are its prediction, and with
    v_REPA(x, t) = - v_SiT(x, 1 - t) the last layer changes its sign and the time MLP absorbs t -> 1 - t, a rotation of
    every pair cos(t f), sin(t f). ValueError for DiT's own (they predict noise, not velocity) and any other dict.
    """
    if not {"pos_embed", "blocks.0.attn.qkv.weight", "final_layer.linear.weight"} <= state.keys():
        raise ValueError("neither a checkpoint of these training scripts nor of REPA or SiT")
    shallow = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    converted = {}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        if part == "decoder_blocks":
            i, _, rest = rest.partition(".")
            name = f"blocks.{int(i) + shallow}.{rest}"
        if part != "projectors":
            converted[name] = value.float()
    width, channels, patch, _ = converted["x_embedder.proj.weight"].shape
    depth = len({name.split(".")[1] for name in converted if name.startswith("blocks.")})
    heads = [h for d, w, h in dit.SIZES.values() if (d, w) == (depth, width)]
    if not heads:
        raise ValueError(f"{depth} blocks of width {width} are none of the sizes {', '.join(dit.SIZES)}")
    final = "final_layer.linear."
    if len(converted[final + "bias"]) == 2 * patch**2 * channels:  # eight channels: SiT or DiT
        for name in (final + "weight", final + "bias"):
            half = converted[name].view(patch**2, 2, channels, -1)
            if half[:, 1].any():  # SiT never trains its second half, which stays at its initial 0
                raise ValueError("a DiT checkpoint: it predicts the noise of a DDPM, these samplers need a velocity")
            converted[name] = -half[:, 0].reshape(-1, *converted[name].shape[1:])
        weight = converted["t_embedder.mlp.0.weight"]
        cos, sin = weight.chunk(2, dim=1)
        f = dit.Sinusoids(cos.shape[1]).omega
        mirrored = [cos * f.cos() + sin * f.sin(), cos * f.sin() - sin * f.cos()]
        converted["t_embedder.mlp.0.weight"] = torch.cat(mirrored, dim=1)
    classes, tokens = len(converted["y_embedder.embedding_table.weight"]) - 1, converted["pos_embed"].shape[1]
    config = dict(arch="DiT", input_size=math.isqrt(tokens) * patch, patch_size=patch, in_channels=channels)
    return config | dict(hidden_size=width, depth=depth, num_heads=heads[0], num_classes=classes), converted


def read_checkpoint(path):
    """The dict of a checkpoint of the training scripts, on the CPU; those of REPA and SiT are brought into its form.

    ValueError if the file is missing, unreadable or another thing.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # REPA's and SiT's scripts save their arguments
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except Exception as error:  # whatever the reader meets in a foreign or damaged file
        raise ValueError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: not a checkpoint")
    if {"model", "ema", "config", "data", "step"} <= checkpoint.keys():
        return {"control": None} | checkpoint
    try:
        config, state = from_official(checkpoint.get("ema", checkpoint))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    vae, scale = "stabilityai/sd-vae-ft-ema", 0.18215
    data = dict(vae=vae, latent_scale=scale, latent_shift=0.0, image_size=8 * config["input_size"])
    data["classes"] = [str(i) for i in range(config["num_classes"])]
    checkpoint = dict(step=checkpoint.get("steps"), args={"ema": 0.9999}, control=None)
    return checkpoint | dict(model=state, ema=state, config=config, data=data)


def read_run(folder, args, data, may_change):
    """The checkpoint of a run to resume, None if there is none. ValueError if it is of another command or cache.

    args: the flags of the command, data: the meta.json of its cache; flags in `may_change` may differ.
    """
    path = Path(folder) / "last.pt"
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"--out {folder}: is a file; choose a folder")
    if not path.exists():
        return None
    checkpoint = read_checkpoint(path)
    there, here = checkpoint["args"] | {"cache": checkpoint["data"]}, args | {"cache": data}
    for key in sorted(there.keys() | here.keys()):
        if key not in may_change and there.get(key) != here.get(key):
            was, now = (str(values.get(key, "absent"))[:60] for values in (there, here))
            raise ValueError(f"{folder} holds another run: {key} is {was} there, {now} here; choose another --out")
    return checkpoint


def restore(checkpoint, objective, ema, optimizer):
    """Load a checkpoint into the objective (model and heads), its averaged model and its optimiser. ValueError if it
    does not fit."""
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
    print(f"{type(model).__name__} {args.model}, {size}; {device}, {args.precision}; {batch}; {out} from step {step}")
    if step >= args.steps:
        print(f"{out} is at step {step} already; raise --steps to go on")
    return lock


def write_row(path, row, bar):
    """Append a row to log.jsonl and show its denoising loss, which methods have in common, unlike their totals."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
    name = "loss_fm" if "loss_fm" in row else "loss_edm"
    bar.set_postfix_str(f"{name} {row[name]:.4f}, {row['img_per_s']:.0f} img/s")
    if bar.disable:  # no terminal
        print(f"step {row['step']}: {name} {row[name]:.4f}, {row['img_per_s']:.0f} img/s", flush=True)


def load_model(path, weights="ema", device="cpu"):
    """The model of a checkpoint, in eval mode, and the checkpoint. ValueError if the file does not hold one."""
    checkpoint = read_checkpoint(path)
    model = dit.build(checkpoint["config"])
    model.load_state_dict(checkpoint[weights])
    return model.to(device).eval(), checkpoint


def load_guide(path, weights, device, model, config):
    """The model of a checkpoint that may guide `model`. ValueError if it is for other latents, classes or noise."""
    guide, checkpoint = load_model(path, weights, device)
    other = checkpoint["config"]
    different = [key for key in ("input_size", "in_channels", "num_classes") if other[key] != config[key]]
    if different or isinstance(guide, dit.SDDiT) != isinstance(model, dit.SDDiT):
        what = "the other kind of model"
        for key in different:
            what = f"{key} is {other[key]}, not {config[key]}"
        raise ValueError(f"--guide {path}: {what}; a guide needs the same latents, classes and loss")
    return guide


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
    512 x 512 pixels, as in arXiv 2411.03177 tables 2a and 2b; or seven numbers h0, w0, top, left, h, w, flip.
    """
    if control == "none" or table is None:
        return None
    if control == "empirical":
        draws = [np.random.default_rng([seed, int(i), 2]).integers(table.shape[1]) for i in indices]
        return table[y, torch.tensor(draws)]
    return torch.tensor(FIXED_CONTROL if control == "fixed" else control).expand(len(y), -1)


def choose_sampler(model, sampler=None, steps=None):
    """The sampler and its number of steps, by default edm with 40 for SD-DiT and ode with 50 for flow matching.

    ValueError if the sampler is for the other kind of model.
    """
    edm = isinstance(model, dit.SDDiT)
    sampler = sampler or ("edm" if edm else "ode")
    if (sampler == "edm") != edm:
        kind, known = ("an EDM", "edm") if edm else ("a flow-matching", "ode, heun, sde")
        raise ValueError(f"--sampler {sampler}: the checkpoint is {kind} model; its samplers: {known}")
    return sampler, steps or (40 if edm else 50)


@torch.no_grad()
def generate(model, indices, y, sampler=None, steps=None, seed=0, control=None, **guidance):
    """Latents float64 [N, C, H, W] of the images `indices` with classes y [N], on the model's device.

    control [N, 7], guidance: see `guided`. Times and noise levels are those of the model's time shift.
    """
    device, (sampler, steps) = model.pos_embed.device, choose_sampler(model, sampler, steps)
    generators = image_generators(seed, indices)
    side = model.grid * model.patch_size

    def noise():
        rows = [torch.randn(model.in_channels, side, side, generator=generator) for generator in generators]
        return torch.stack(rows).to(device)                                       # (N, C, H, W)

    control, shift = None if control is None else control.to(device), model.time_shift
    network = guided(model, y.to(device), control=control, **guidance)
    if sampler == "edm":
        return edm_heun(edm_denoiser(network), noise(), shift * edm_sigmas(steps))
    if sampler == "sde":
        return flow_sde(network, noise(), dit.shift_time(sde_times(steps), shift), noise)
    return flow_ode(network, noise(), dit.shift_time(ode_times(steps), shift), heun=sampler == "heun")


def decode(latents, autoencoder, data):
    """Latents as the model sees them -> uint8 images [N, H, W, 3], rounded.

    official code: REPA and ADM truncate 255 (x + 1) / 2, half a level darker / here: rounded, as in DiT and SiT.
    """
    images = autoencoder.decode(to_autoencoder(latents, data).float())
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
    Image.fromarray(grid[:-gap, :-gap]).save(path)


def preview(model, features, autoencoder, path, seed=0, columns=10):
    """The picture that training scripts draw of their EMA: a class per column, default sampler, no guidance."""
    data, table = features.meta, features.control_table
    num_classes = len(data["classes"])
    columns = min(columns, num_classes) if num_classes > 1 else columns
    classes = np.linspace(0, num_classes - 1, columns).astype(int).tolist()
    indices = range(4 * columns)
    y = choose_labels(classes, indices, num_classes, seed)
    latents = generate(model, indices, y, seed=seed, control=choose_control("empirical", table, y, indices, seed))
    save_grid(decode(latents, autoencoder, data), path, columns)


def file_hash(path):
    """First 16 hexadecimal digits of a file's SHA-256."""
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="last.pt or STEP.pt of a run")
    # torchrun before Python 3.12.7 takes --num for an ambiguous option of its own; it leaves --num-images alone
    parser.add_argument("--num", "--num-images", type=int, default=100, help="number of images")
    parser.add_argument("--out", help="ADM .npz: arr_0 uint8 [N, H, W, 3], arr_1 labels, protocol")
    parser.add_argument("--grid", help="PNG with all images; one column per class where labels are balanced")
    parser.add_argument("--labels", default="random", help="random, balanced, or class indices such as 207,360")
    parser.add_argument("--sampler", choices=["ode", "heun", "sde", "edm"], help="default: ode (Euler), edm for SD-DiT")
    parser.add_argument("--steps", type=int, help="default: 50, edm 40; REPA's numbers need sde with 250")
    parser.add_argument("--cfg", type=float, default=1.0, help="guidance scale w; no guidance at 1")
    parser.add_argument("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels to guide at")
    parser.add_argument("--control", default="empirical", help="empirical, fixed, none, or h0,w0,top,left,h,w,flip")
    parser.add_argument("--control-cfg", type=float, metavar="BETA", help="guide class and control apart: three passes")
    parser.add_argument("--guide", help="checkpoint of a weaker model: autoguidance instead of the null class")
    parser.add_argument("--weights", choices=["ema", "model"], default="ema", help="averaged or raw weights")
    parser.add_argument("--model", help="SIZE/PATCH the checkpoint must have, e.g. XL/2 (it is recognised without)")
    parser.add_argument("--vae", help="another autoencoder than the cache's, e.g. stabilityai/sd-vae-ft-ema")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64, help="images at once, per process")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the network, not the state")
    args = parser.parse_args(argv)
    if not (args.out or args.grid):
        parser.error("nothing to write: give --out samples.npz, --grid grid.png, or both")
    if min(args.num, args.batch_size, 1 if args.steps is None else args.steps) < 1:
        parser.error("--num, --steps and --batch-size must be at least 1")
    for name, suffix in (("out", ".npz"), ("grid", ".png")):
        if not (getattr(args, name) or suffix).endswith(suffix):
            parser.error(f"--{name} {getattr(args, name)}: must end in {suffix}")
        folder = Path(getattr(args, name) or ".").parent
        if name == "grid" and not folder.is_dir():
            parser.error(f"--grid {args.grid}: no such folder {folder}")
    if not 1 <= args.cfg < math.inf:
        parser.error(f"--cfg {args.cfg}: must be at least 1")
    if args.interval and not 0 <= args.interval[0] < args.interval[1]:
        parser.error("--interval {} {}: expected two noise levels, the lower one first".format(*args.interval))
    guiding = args.cfg > 1 or args.control_cfg is not None
    if not guiding and (args.guide or args.interval):
        parser.error(f"--{'guide' if args.guide else 'interval'} has no effect without --cfg above 1")
    good = args.control_cfg is None or (0 <= args.control_cfg < math.inf and not args.guide and args.control != "none")
    if not good:
        parser.error(f"--control-cfg {args.control_cfg}: needs a scale >= 0, a --control, and the null class as guide")
    if args.labels not in ("random", "balanced"):
        try:
            args.labels = [int(label) for label in args.labels.split(",")]
        except ValueError:
            parser.error(f"--labels {args.labels}: expected random, balanced or class indices such as 207,360")
    if args.control not in ("empirical", "fixed", "none"):
        try:
            h0, w0, top, left, h, w, flip = args.control = [int(value) for value in args.control.split(",")]
            good = min(top, left) >= 0 < min(h, w) and top + h <= h0 and left + w <= w0 and flip in (0, 1)
        except ValueError:
            good = False
        if not good:
            parser.error(f"--control {args.control}: expected empirical, fixed, none, or a box h0,w0,top,left,h,w,flip")
    return args


def main(argv=None):
    args = parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    torch.set_float32_matmul_precision("high")  # TF32 on the GPUs that have it
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=1))  # nothing but barriers, and ranks may be uneven
    target = Path(args.out or args.grid)
    folder = target.with_name(target.name + ".partial")
    try:
        model, checkpoint = load_model(args.checkpoint, args.weights, device)
        config = checkpoint["config"]
        if args.model and not dit.parse_model(args.model).items() <= config.items():
            found = f"{config['depth']} blocks of width {config['hidden_size']}, patch {config['patch_size']}"
            raise ValueError(f"--model {args.model}: the checkpoint has {found}")
        guide = load_guide(args.guide, args.weights, device, model, config) if args.guide else None
        args.sampler, args.steps = choose_sampler(model, args.sampler, args.steps)
        data, num_classes = checkpoint["data"], len(checkpoint["data"]["classes"])
        if isinstance(args.labels, list) and not all(0 <= label < num_classes for label in args.labels):
            raise ValueError(f"--labels {args.labels}: the model knows classes 0 to {num_classes - 1}")
        if model.control_embedder is None:
            if args.control not in ("none", "empirical") or args.control_cfg is not None:
                raise ValueError(f"--control {args.control}: the model was trained without --control")
            args.control = "none"
        if args.control_cfg is not None and checkpoint["args"].get("control_drop") == 0:
            raise ValueError(f"--control-cfg {args.control_cfg}: the model was trained with --control-drop 0")
        if (args.cfg > 1 or args.control_cfg is not None) and not guide and not model.y_embedder.dropout_prob:
            raise ValueError(f"--cfg {args.cfg}: the model was trained without label dropout and has no null class")
        if args.out and target.exists():
            raise ValueError(f"--out {args.out} exists; delete it or choose another name")
        autoencoder = load_autoencoder(args.vae or data["vae"], device)
        protocol = dict(
            sampler=args.sampler,
            steps=args.steps,
            cfg=args.cfg,
            interval=args.interval,
            guide=file_hash(args.guide) if args.guide else None,
            control=args.control,
            control_cfg=args.control_cfg,
            time_shift=model.time_shift,
            labels=args.labels,
            seed=args.seed,
            count=args.num,
            weights=args.weights,
            ema=checkpoint["args"]["ema"],
            checkpoint=file_hash(args.checkpoint),
            train_step=checkpoint["step"],
            vae=args.vae or data["vae"],
            image_size=data["image_size"],
            precision=args.precision,
            rounding="nearest",
        )
        if rank == 0:
            size, copies = data["image_size"], 1 + bool(args.out)
            arrays = {"images": dict(shape=[args.num, size, size, 3], dtype="uint8")}
            lock = start_folder(folder, "protocol.json", protocol, arrays, args.num, copies=copies)
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
    if world > 1:
        dist.barrier()

    done = np.load(folder / "progress.npy", mmap_mode="r")
    todo = np.flatnonzero(done == 0)
    guidance = dict(scale=args.cfg, interval=args.interval, guide=guide, control_scale=args.control_cfg)
    batches = [todo[i : i + args.batch_size] for i in range(0, len(todo), args.batch_size)][rank::world]
    if world > 1:
        dist.barrier()  # every rank has read the same `done` before any writes to it
    images, flags = ArrayFile(folder / "images.npy"), ArrayFile(folder / "progress.npy")
    bar = tqdm(total=args.num, initial=int(done.sum()), unit="img", disable=rank > 0)
    for indices in batches:
        y = choose_labels(args.labels, indices, num_classes, args.seed)
        control = choose_control(args.control, checkpoint["control"], y, indices, args.seed)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            latents = generate(model, indices, y, args.sampler, args.steps, args.seed, control, **guidance)
        pixels = decode(latents, autoencoder, data)
        for run in np.split(np.arange(len(indices)), np.flatnonzero(np.diff(indices) > 1) + 1):
            images.write(indices[run[0]], pixels[run])
            flags.write(indices[run[0]], np.ones(len(run)))
        bar.update(int(done.sum()) - bar.n)
    if world > 1:
        dist.barrier()
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
        temporary = folder / "samples.npz"
        np.savez(temporary, arr_0=pixels, arr_1=labels, protocol=np.array(json.dumps(protocol)))
        os.replace(temporary, args.out)
    shutil.rmtree(folder)
    lock.close()
    print(", ".join(f"{key} {value}" for key, value in protocol.items()))


if __name__ == "__main__":
    main()
