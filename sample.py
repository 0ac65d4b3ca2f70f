"""Checkpoint -> images: an ADM .npz for `fid.py`, or a PNG grid to look at.

    python sample.py runs/repa-digits --num-images 100 --labels balanced --grid digits.png
    torchrun --nproc_per_node=8 sample.py runs/repa --num-images 50000 --sampler sde --steps 250 \\
        --cfg 1.8 --interval 0 0.7 --out samples.npz

The noise of image i depends on (seed, i) alone, not on the batch size or the number of processes.
(Another batch size may round an image differently.) Run a killed command again to continue it.

    flow matching   x_t = (1 - t) x + t eps, t = 0 is data and t = 1 is noise (arXiv 2410.06940)
                    the network predicts v = eps - x
      ode, heun     dx_t/dt = v
      sde           dx_t = (v - t s) dt + sqrt(2t) dW, with the score s = -((1 - t) v + x_t) / t
                    (arXiv 2401.08740)
    MeanFlow        the network predicts u(x_t, r, t), the mean velocity from r to t; v = u(x, t, t)
      mean          x_r = x_t - (t - r) u, by default in a single step (arXiv 2505.13447)
    noise           x_k = alpha x + sigma eps, k = 0 .. 999 (arXiv 2212.09748)
                    the network predicts eps and a variance
      ddpm          x_l = c1 x + c2 x_k + exp(log_variance / 2) n, for the next lower timestep l;
                    ode, heun and sde also take this network, as a velocity (see dit.NoiseDiT)
    EDM             x_sigma = x + sigma eps (arXiv 2206.00364)
                    the network predicts F of the denoiser D = c_skip x_sigma + c_out F
      edm           dx_sigma/dsigma = (x_sigma - D) / sigma, Heun's method; SD-DiT uses it

Shapes stand in the right margin. N: batch. C, H, W: channels, height and width of the latent.
"""

import argparse
import json
import math
import shutil
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import dit
import files
from extract_features import load_autoencoder, per_channel, spread
from files import UserError, at_least_1, number

# ---- samplers
# They are functions of model(x, t), a start x and a list of times; t is a float. (MeanFlow's model
# also takes r.) They keep x in float64. Only noise() has a state.


def ode_times(steps, first=1.0):
    """Returns times from `first` (1 = noise) to 0 (= data) in equal steps: float64 [steps + 1]."""
    return torch.linspace(first, 0, steps + 1, dtype=torch.float64)


def sde_times(steps, last=0.04, first=1.0):
    """Returns REPA's `steps` times from `first` to `last`, then 0: float64 [steps + 1].

    The last step adds no noise. It starts as early as `last`, because the score has a factor 1 / t.
    """
    times = torch.linspace(first, last, steps, dtype=torch.float64)
    return torch.nn.functional.pad(times, (0, 1))  # appends 0


def edm_sigmas(steps=40, low=0.002, high=80.0, rho=7):
    """Returns EDM's noise levels from `high` to `low`, then 0: float64 [steps + 1]."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    roots = high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))
    return torch.nn.functional.pad(roots**rho, (0, 1))  # appends 0


def flow_ode(model, x, times, heun=False):
    """Solves dx/dt = v(x, t) along `times` (see ode_times), from noise x [N, C, H, W].

    model(x, t) -> v. The method is Euler's, or Heun's, which corrects every step but the last.
    Returns float64.
    """
    x = x.double()
    for t, t_next in pairwise(times.tolist()):
        v = model(x, t).double()                                      # [N, C, H, W]
        if heun and t_next > 0:  # the last step is Euler's: EDM's slope would divide by 0
            x_next = x + (t_next - t) * v
            v_next = model(x_next, t_next).double()
            v = (v + v_next) / 2
        x = x + (t_next - t) * v
    return x


def flow_sde(model, x, times, noise):
    """Solves the reverse SDE by Euler-Maruyama along `times` (see sde_times), from noise x.

    model(x, t) -> v; noise() -> N(0, 1) like x [N, C, H, W]. Returns float64.
    The diffusion coefficient is w = 2t, as in REPA's code. Its paper writes the same sampler with
    w = t and noise sqrt(2 w dt) eps.
    """
    x = x.double()
    for t, t_next in pairwise(times.tolist()):
        v = model(x, t).double()                                      # [N, C, H, W]
        score = -((1 - t) * v + x) / t
        drift = v - t * score
        x = x + (t_next - t) * drift
        if t_next > 0:
            x = x + math.sqrt(2 * t * (t - t_next)) * noise()
    return x


def mean_flow(model, x, times):
    """Jumps from each of `times` t (see ode_times) to the next, r, from noise x [N, C, H, W].

    model(x, t, r) -> u, the mean velocity. This is Euler's method with a network that is told where
    the step ends. An exact u gives the same x for all `times`. Returns float64.
    """
    x = x.double()
    for t, r in pairwise(times.tolist()):
        x = x - (t - r) * model(x, t, r).double()
    return x


def ddpm_times(steps=250):
    """Returns the t of DDPM's timesteps (see dit.NoiseDiT), then 0: float64 [steps + 1]."""
    schedule = dit.ddpm_schedule(steps)
    times = [step.sigma / (step.alpha + step.sigma) for step in reversed(schedule)]
    return torch.tensor([*times, 0], dtype=torch.float64)


def ddpm(model, x, times, noise):
    """Runs DiT's ancestral sampler along `times` (see ddpm_times), from N(0, 1) noise x.

    model(x, t) -> eps and the variance's channels, [N, 2 C, H, W]; it takes t and not the timestep,
    so that guidance in an interval means the same for all samplers. noise() -> N(0, 1) like x
    [N, C, H, W]. Neither x nor the variance is clamped, as in DiT. Returns float64.
    """
    x_k = x.double()
    steps = reversed(dit.ddpm_schedule(len(times) - 1))
    for t, step in zip(times[:-1].tolist(), steps, strict=True):
        eps, mix = model(x_k, t).double().chunk(2, dim=1)
        x = (x_k - step.sigma * eps) / step.alpha                     # [N, C, H, W]
        x_k = step.c1 * x + step.c2 * x_k
        if step.k > 0:
            x_k = x_k + (step.log_variance(mix) / 2).exp() * noise()
    return x_k


def edm_heun(denoiser, x, sigmas):
    """Runs EDM's deterministic sampler along `sigmas` (see edm_sigmas), from N(0, 1) noise x.

    denoiser(x, sigma) -> D; x [N, C, H, W]. Heun's method evaluates it twice in every step but the
    last. Returns float64.
    """

    def slope(x, sigma):
        return (x - denoiser(x, sigma).double()) / sigma

    x = x.double() * sigmas[0].item()
    return flow_ode(slope, x, sigmas, heun=True)  # sigma plays the role of t


def edm_denoiser(network):
    """Turns network(x, sigma) -> F into the denoiser (x, sigma) -> D = c_skip x + c_out F."""

    def denoiser(x, sigma):
        c_skip, c_out, _, _ = dit.edm_coefficients(torch.tensor(sigma, dtype=torch.float64))
        return c_skip * x + c_out * network(x, sigma).double()

    return denoiser


# ---- guidance


def guided(
    model,
    y,
    scale=1.0,
    interval=None,
    guide=None,
    control=None,
    control_scale=None,
    predict_noise=False,
):
    """Returns the function (x, t) -> v of a model for classes y [N], guided if t is in `interval`.

    Guidance turns v into v_weak + scale (v - v_weak). control is None or [N, 7]; zeros mean none.
        classifier-free guidance       v = model(y, control)    v_weak = model(null, control)
        autoguidance (2406.02507)      v = model(y, control)    v_weak = guide(y, control)
        control guidance (2411.03177)  v = v_0 + control_scale (model(y, control) - v_0)
                                       v_0 = model(y, zeros)    v_weak = model(null, zeros)
    null is the null class, and guide a weaker model. There is no guidance if the scale is at most 1
    and control_scale is None. With an SDDiT, v is F: EDM's denoiser is affine in F, so guiding F
    guides the denoiser. With predict_noise (for ddpm), v is the noise. The channels for the
    variance are not guided: they are those of model(y, control).
    paper: the formula of 2411.03177 was not available / here: reconstructed from its two scales.
    official code: DiT and SiT guide three of four channels (DiT#41) / here: all, as in REPA.
    official code: Heun's second evaluation is guided if the step starts inside the interval / here:
    it is guided if its own t is inside.
    """
    null = torch.full_like(y, model.num_classes)
    low, high = interval or (0, math.inf)
    unguided = scale <= 1 and control_scale is None
    predict = model.predict_at if predict_noise else model

    def terms(x, t):
        """Returns v and v_weak of the table above, and model(y, control)."""
        if guide is not None:
            predict_weak = guide.predict_at if predict_noise else guide
            v = predict(x, t, y, control=control)
            v_weak = predict_weak(x, t, y, control=control)
            return v, v_weak, v
        if control_scale is None:
            controls = [control, control]
            v, v_weak = predict_copies(predict, x, t, [y, null], controls)
            return v, v_weak, v
        zeros = torch.zeros_like(control)
        classes = [y, y, null]
        controls = [control, zeros, zeros]
        full, v_0, v_weak = predict_copies(predict, x, t, classes, controls)
        v = v_0 + control_scale * (full - v_0)
        return v, v_weak, full

    def velocity(x, t):
        x = x.float()
        t_rows = torch.full((len(x),), t, device=x.device)            # [N]
        if unguided or not low <= t <= high:
            return predict(x, t_rows, y, control=control)
        v, v_weak, full = terms(x, t_rows)
        v = v_weak + scale * (v - v_weak)
        C = x.shape[1]  # for DDPM, the channels for the variance come after these
        return torch.cat([v[:, :C], full[:, C:]], dim=1)

    return velocity


def predict_copies(predict, x, t, classes, controls):
    """Predicts several copies of a batch at once: copy i has classes[i] and controls[i].

    Returns the velocities of the copies, [N, C, H, W] each.
    """
    copies = len(classes)
    control = None
    if controls[0] is not None:
        control = torch.cat(controls)                                 # [copies N, 7]
    x = x.repeat(copies, 1, 1, 1)
    v = predict(x, t.repeat(copies), torch.cat(classes), control=control)
    return v.chunk(copies)


def mean_velocity(model, y, control=None, scale=1.0, control_scale=None, **others):
    """Returns the function (x, t, r) -> u of a MeanFlow model for classes y [N].

    The arguments are those of `guided`. Raises ValueError if u is to be guided: guidance mixes
    velocities, and not their means.
    """
    if scale > 1 or control_scale is not None:
        raise ValueError("a mean velocity cannot be guided; use another sampler")

    def u(x, t, r):
        t_rows = torch.full((len(x),), t, device=x.device)            # [N]
        return model(x.float(), t_rows, y, control=control, r=torch.full_like(t_rows, r))

    return u


# ---- from a model to images


@torch.no_grad()
def generate(model, indices, y, sampler=None, steps=None, seed=0, control=None, **guidance):
    """Draws the images `indices` with classes y [N] and control [N, 7].

    Returns latents, float64 [N, C, H, W]. sampler, steps: see choose_sampler. guidance: see guided.
    """
    sampler, times = choose_sampler(model, sampler, steps)
    device = next(model.parameters()).device
    side = model.grid * model.patch_size
    generators = image_generators(seed, indices)

    def noise():
        shape = (model.in_channels, side, side)
        eps = [generator.standard_normal(shape, np.float32) for generator in generators]
        return torch.from_numpy(np.stack(eps)).to(device)             # [N, C, H, W]

    y = y.to(device)
    if control is not None:
        control = control.to(device)
    if sampler == "mean":
        u = mean_velocity(model, y, control=control, **guidance)
        return mean_flow(u, noise(), times)
    if sampler == "ddpm":
        eps_and_mix = guided(model, y, control=control, predict_noise=True, **guidance)
        return ddpm(eps_and_mix, noise(), times, noise)
    network = guided(model, y, control=control, **guidance)  # predicts v, or F for an SDDiT
    if sampler == "edm":
        return edm_heun(edm_denoiser(network), noise(), times)

    # x_t = (1 - t) x + t eps has the standard deviation hypot(1 - t, t) if x has 1. At t = 1 this
    # is 1, but a NoiseDiT starts a little below, at t = 0.9937
    first = times[0].item()
    start = noise() * math.hypot(1 - first, first)
    if sampler == "sde":
        return flow_sde(network, start, times, noise)
    return flow_ode(network, start, times, heun=sampler == "heun")


def choose_sampler(model, sampler=None, steps=None):
    """Returns the name of the sampler, and its times or noise levels [steps + 1].

    The default is ode in 50 steps; for an SDDiT edm in 40, for a NoiseDiT ddpm in 250, and for a
    model of mean velocities mean in one. Raises UserError if the sampler does not fit the model, or
    if ddpm is to take fewer than 2 or more than 1000 steps.
    """
    fitting = ["ode", "heun", "sde"]
    if isinstance(model, dit.SDDiT):
        fitting = ["edm"]
    elif isinstance(model, dit.NoiseDiT):
        fitting = ["ddpm", *fitting]
    elif model.h_embedder is not None:
        fitting = ["mean", *fitting]
    sampler = sampler or fitting[0]
    if sampler not in fitting:
        raise UserError(f"--sampler {sampler}: does not fit this model; use {' or '.join(fitting)}")

    if sampler == "edm":
        return sampler, model.time_shift * edm_sigmas(steps or 40)
    if sampler == "ddpm":
        steps = steps or 250
        if not 2 <= steps <= 1000:
            raise UserError(f"--steps {steps}: ddpm takes 2 to 1000 of DiT's 1000 timesteps")
        return sampler, ddpm_times(steps)
    make_times = sde_times if sampler == "sde" else ode_times
    default = 1 if sampler == "mean" else 50
    times = make_times(steps or default, first=model.first_time)
    return sampler, dit.shift_time(times, model.time_shift)


def choose_labels(labels, indices, classes, seed):
    """Returns the class of each image index: int64 [n].

    labels: "random" among `classes`; "balanced", in which `classes` take turns; or a list of
    classes that take turns instead.
    """
    if labels == "random":
        # streams of their own, so that the noise of image i does not depend on its label
        generators = image_generators(seed, indices, "label")
        chosen = [classes[generator.integers(len(classes))] for generator in generators]
    else:
        if labels != "balanced":
            classes = labels
        chosen = [classes[i % len(classes)] for i in indices]
    return torch.tensor(chosen, dtype=torch.int64)


def choose_control(control, table, y, indices, seed):
    """Returns the control [n, 7] of the images `indices` with classes y [n], or None for none.

    control: "none"; "empirical", a random row of the image's class in `table` [classes, rows, 7];
    "fixed", a sharp whole image of 512 x 512 pixels (our choice); or seven numbers h0, w0, top,
    left, h, w, flip. Without a table there is no control.
    """
    if control == "none" or table is None:
        return None
    if control == "empirical":
        generators = image_generators(seed, indices, "control")
        rows = [generator.integers(table.shape[1]) for generator in generators]
        return table[y, torch.tensor(rows)]
    if control == "fixed":
        control = [512, 512, 0, 0, 512, 512, 0]
    return torch.tensor(control).expand(len(y), -1)


def image_generators(seed, indices, use="image"):
    """Returns a generator for each image, seeded by (use, seed, index). Noise uses "image"."""
    return [files.random_stream(use, seed, int(i)) for i in indices]


def decode(latents, autoencoder, data, indices=None):
    """Turns latents of a model into uint8 images [N, H, W, 3].

    Raises UserError if images are not finite, and names them by their `indices` (default: from 0).
    official code: REPA and ADM truncate 255 (x + 1) / 2, which is half a level darker / here: it is
    rounded, as in SiT.
    """
    scale = per_channel(data["latent_scale"], latents)
    shift = per_channel(data["latent_shift"], latents)
    latents = latents / scale + shift  # the inverse of CachedFeatures.latents
    images = autoencoder.decode(latents.float())                      # [N, 3, H, W]
    finite = images.isfinite().flatten(1).all(1).tolist()
    indices = indices or range(len(images))
    bad = [str(i) for i, good in zip(indices, finite, strict=True) if not good]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(images)} images are not finite: {', '.join(bad)};"
            " try --precision fp32"
        )
    pixels = (images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def save_grid(images, path, columns, gap=4):
    """Writes images, uint8 [n, H, H, 3], as a PNG with `columns` images in a row.

    Small images are enlarged to at least 48 pixels.
    """
    side = images.shape[1]
    zoom = max(1, math.ceil(48 / side))
    cell = zoom * side + gap
    rows = math.ceil(len(images) / columns)
    canvas = np.full((rows * cell, columns * cell, 3), 96, np.uint8)  # grey between the images
    for i, image in enumerate(images):
        top = i // columns * cell
        left = i % columns * cell
        enlarged = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
        canvas[top : top + zoom * side, left : left + zoom * side] = enlarged
    picture = Image.fromarray(canvas[:-gap, :-gap])
    files.replace_file(path, lambda file: picture.save(file, "PNG"))


def preview(model, cache, autoencoder, path, seed=0, precision="fp32", rows=None, **options):
    """Draws the picture of a training script: four rows of images, with a class in each column.

    cache: the CachedFeatures of the run. options: those of `generate`, such as sampler, steps and
    scale. rows: a list of such options; each draws one row, and all rows begin with the same noise.
    Writes no picture if images are not finite.
    """
    classes = np.unique(cache.labels)  # those with images
    columns = min(len(classes), 10)
    if columns == 1:
        columns = 10  # a single class fills a picture of the usual width
    indices = range(columns if rows else 4 * columns)
    shown = classes[spread(columns, len(classes))].tolist()
    y = choose_labels("balanced", indices, shown, seed)
    control = choose_control("empirical", cache.control_table, y, indices, seed)
    device = next(model.parameters()).device
    latents = []
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for row in rows or [{}]:
            how = {"seed": seed, "control": control, **options, **row}
            latents.append(generate(model, indices, y, **how))
    try:
        images = decode(torch.cat(latents), autoencoder, cache.meta)
    except UserError as error:  # the run goes on without its picture
        print(f"{path}: {error}", file=sys.stderr)
        return
    save_grid(images, path, columns)


# ---- all images of a command


def sample_images(args):
    """Draws this process's share of the images, in parts. The first process joins all parts.

    A part is a file with one batch. Its indices are those of the images in it.
    """
    rank, world, device = files.launch()
    model, guide, autoencoder, checkpoint, protocol = prepare(args, device)
    data = checkpoint["data"]
    side = data["image_size"]
    output = args.out or args.grid
    folder = output.with_name(f"{output.name}.partial")
    if rank == 0:
        size = 2 * args.num * side * side * 3  # the parts, and the .npz that joins them
        files.start_folder(folder, "protocol.json", protocol, size)
    files.barrier()

    parts = {}  # the file of each range of indices
    missing = []
    for start in range(0, args.num, args.batch_size):
        indices = range(args.num)[start : start + args.batch_size]
        parts[indices] = folder / f"{start:08d}.safetensors"
        if not part_is_whole(parts[indices], indices, side):
            missing.append(indices)
    files.barrier()  # all processes have looked before one of them writes

    remaining = sum(len(indices) for indices in missing)
    pause = 0.1 if sys.stderr.isatty() else 60  # seconds between two states of the bar
    bar = tqdm(total=remaining, unit="img", mininterval=pause, disable=rank > 0)
    for i, indices in enumerate(missing):
        if i % world == rank:
            images = draw_batch(indices, model, guide, autoencoder, checkpoint, protocol)
            files.write_tensors(parts[indices], {"images": torch.from_numpy(images)})
        bar.update(len(indices))
    bar.close()
    files.barrier()
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return

    classes = used_classes(data)
    if args.out:
        labels = choose_labels(protocol["labels"], range(args.num), classes, args.seed)
        write_npz(args.out, parts.values(), labels.numpy(), protocol, side)
    if args.grid:
        columns = math.isqrt(args.num)
        if args.labels == "balanced" and len(classes) <= 20:
            columns = len(classes)
        images = np.concatenate([read_part(part) for part in parts.values()])
        save_grid(images, args.grid, columns)
    shutil.rmtree(folder, ignore_errors=True)  # another process with the same --out may do it
    print(closing_line(args, protocol, data["classes"]))


def draw_batch(indices, model, guide, autoencoder, checkpoint, protocol):
    """Draws the images `indices`: uint8 [n, H, W, 3]."""
    data = checkpoint["data"]
    seed = protocol["seed"]
    y = choose_labels(protocol["labels"], indices, used_classes(data), seed)
    control = choose_control(protocol["control"], checkpoint.get("control"), y, indices, seed)
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=protocol["precision"] == "bf16"):
        latents = generate(
            model,
            indices,
            y,
            protocol["sampler"],
            protocol["steps"],
            seed,
            control,
            scale=protocol["cfg"],
            interval=protocol["interval"],
            guide=guide,
            control_scale=protocol["control_cfg"],
        )
    return decode(latents, autoencoder, data, indices)


def used_classes(data):
    """Returns the indices of the classes that have training images."""
    empty = data.get("empty_classes", [])
    return [i for i in range(len(data["classes"])) if i not in empty]


def part_is_whole(path, indices, side):
    """Returns whether a part is there, undamaged, and has the images `indices`.

    It has others if a killed command goes on with another --batch-size.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.get_slice("images").get_shape() == [len(indices), side, side, 3]
    except (OSError, safetensors.SafetensorError):
        return False


def read_part(path):
    return safetensors.torch.load_file(path)["images"].numpy()


def write_npz(path, parts, labels, protocol, side):
    """Joins the parts to the array arr_0 of an .npz, which also gets the labels and the protocol.

    Together, the images may not fit into memory, so they are read and written one part at a time.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), side, side, 3)}
    arrays = {"arr_1": labels, "protocol": np.array(json.dumps(protocol))}

    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for part in parts:
                    member.write(read_part(part))
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    files.replace_file(path, write)


def closing_line(args, protocol, classes):
    """Returns the line that says what was written, with the protocol.

    It also says how --labels were read if names of classes are numbers, and whether the averages
    are still close to the initial weights.
    """
    written = " and ".join(str(path) for path in (args.out, args.grid) if path)
    entries = [f"{key} {value}" for key, value in protocol.items() if value is not None]
    line = f"{written}: {', '.join(entries)}"

    if isinstance(protocol["labels"], list) and any(name.isdecimal() for name in classes):
        kind = "names" if set(args.labels.split(",")) <= set(classes) else "indices"
        line += f"; the --labels were read as {kind} of classes"

    step = protocol["train_step"]
    if args.weights == "ema" and step is not None:
        line += files.note_on_average(protocol["ema"], step)
    return line


def prepare(args, device):
    """Returns what sample_images needs: model, guide or None, autoencoder, checkpoint, protocol.

    The protocol is a dict of all that the images depend on. It is stored with them, and a command
    that was killed goes on only if it is the same. Nothing is written here. Raises UserError if
    anything does not fit.
    """
    check_outputs(args)
    # at once, before the slow checks: a training script may replace its last.pt at any time
    checkpoint_hash = files.file_hash(args.checkpoint)
    model, checkpoint = files.load_model(args.checkpoint, args.weights, device, args.official)
    if args.official and "official" not in checkpoint:
        raise UserError(f"--official: {args.checkpoint} is not an official file; leave it out")
    guide = guide_hash = None
    if args.guide:
        guide_hash = files.file_hash(args.guide)
        guide = load_guide(args, model, checkpoint["config"], device)
    data = checkpoint["data"]
    check_grid(args, data["image_size"])

    sampler, times = choose_sampler(model, args.sampler, args.steps)
    labels = args.labels
    if labels not in ("random", "balanced"):
        labels = class_indices(labels, data["classes"])
    control = args.control
    if model.control_embedder is None:
        if control not in ("empirical", "none"):
            raise UserError(f"--control {args.control}: the model was trained without --control")
        control = "none"
    check_guidance(args, model, checkpoint["args"], control, sampler)
    vae = args.vae or data["vae"]
    autoencoder = fitting_autoencoder(vae, checkpoint, device)
    if args.compile:
        files.compile_blocks(model)
        if guide is not None:
            files.compile_blocks(guide)

    protocol = {
        "checkpoint": checkpoint_hash,
        "num": args.num,
        "labels": labels,
        "control": control,
        "seed": args.seed,
        "sampler": sampler,
        "steps": len(times) - 1,
        "cfg": args.cfg,
        "interval": args.interval,
        "control_cfg": args.control_cfg,
        "guide": guide_hash,
        "weights": args.weights,
        "official": args.official,
        "vae": vae,
        "precision": args.precision,
        "train_step": checkpoint.get("step"),
        "ema": checkpoint["args"].get("ema"),
        "rounding": "nearest",
        "first_noise_level": times[0].item(),
    }
    return model, guide, autoencoder, checkpoint, protocol


# ---- checks of the arguments


def check_outputs(args):
    """Refuses an --out that exists, and a --grid that is a folder or whose folder is missing."""
    if args.out and args.out.exists():
        raise UserError(f"--out {args.out} exists; delete it or choose another name")
    if args.grid and (not args.grid.parent.is_dir() or args.grid.is_dir()):
        raise UserError(f"--grid {args.grid}: no such folder, or itself a folder")


MAX_GRID = 2**26  # pixels


def check_grid(args, side):
    """Refuses a --grid of more than MAX_GRID pixels."""
    pixels = args.num * max(48, side) ** 2
    if args.grid and pixels > MAX_GRID:
        raise UserError(
            f"--grid: {args.num} images are over {MAX_GRID} pixels;"
            " lower --num-images or drop --grid"
        )


def class_indices(text, classes):
    """Returns the indices of the classes in a list A,B, whose words are all names or all indices.

    Raises UserError for any other list.
    """
    words = text.split(",")
    if set(words) <= set(classes):
        return [classes.index(word) for word in words]
    numbers = [str(i) for i in range(len(classes))]
    if set(words) <= set(numbers):
        return [int(word) for word in words]
    raise UserError(
        f"--labels {text[:60]}: give only names of classes, such as {', '.join(classes[:9])},"
        f" or only indices from 0 to {len(classes) - 1}"
    )


def check_guidance(args, model, trained, control, sampler):
    """Refuses guidance that the model was not trained for. trained: the flags of its training."""
    if args.control_cfg is not None:
        dropped = trained.get("control_drop") != 0
        if args.guide or control == "none" or not dropped:
            raise UserError(
                "--control-cfg: needs training with --control and --control-drop, and no --guide"
            )
    # the weight of the null class in MeanFlow's target. It is 0 if the target was not guided. Other
    # methods do not have these flags
    omega = trained.get("omega", 1)
    kappa = trained.get("kappa", 0)
    null_weight = 1 - omega - kappa
    if args.cfg > 1 and abs(null_weight) > 1e-6:
        raise UserError(
            f"--cfg {args.cfg:g}: this model was trained towards guided samples (--omega, --kappa),"
            " and would be guided twice; leave --cfg out"
        )
    if args.cfg == 1 and args.control_cfg is None:
        return
    flag = f"--cfg {args.cfg:g}" if args.cfg > 1 else f"--control-cfg {args.control_cfg:g}"
    if sampler == "mean":
        raise UserError(
            f"{flag}: sampler mean cannot be guided, because guidance mixes velocities and not"
            " their means; add --sampler ode"
        )
    if not args.guide and not model.y_embedder.dropout_prob:
        raise UserError(f"{flag}: the model has no null class (no label dropout in training)")


def load_guide(args, model, config, device):
    """Returns the model of --guide. Refuses one of other latents, other classes or another loss."""
    guide, checkpoint = files.load_model(args.guide, args.weights, device, args.official)
    for key in ("input_size", "in_channels", "num_classes"):
        found = checkpoint["config"][key]
        if found != config[key]:
            raise UserError(f"--guide {args.guide}: its {key} is {found}, not {config[key]}")
    for kind in (dit.SDDiT, dit.NoiseDiT):
        if isinstance(guide, kind) != isinstance(model, kind):
            raise UserError(f"--guide {args.guide}: was trained with another loss")
    return guide


def fitting_autoencoder(vae, checkpoint, device):
    """Returns the autoencoder named `vae`. Refuses one for latents or images of other shapes."""
    autoencoder = load_autoencoder(vae, device)
    channels = checkpoint["config"]["in_channels"]
    side = checkpoint["data"]["image_size"]
    decoded = autoencoder.downsampling * checkpoint["config"]["input_size"]
    if (autoencoder.channels, decoded) != (channels, side):
        raise UserError(
            f"--vae {vae}: decodes {autoencoder.channels} channels to {decoded} pixels,"
            f" not {channels} to {side}"
        )
    return autoencoder


# ---- command line


def control_row(text):
    """An argparse type: empirical, fixed, none, or seven numbers. The box must lie in its image."""
    if text in ("empirical", "fixed", "none"):
        return text
    row = [number(int, 0, 10**6)(word) for word in text.split(",")]
    if len(row) != 7:
        raise argparse.ArgumentTypeError(
            f"{text}: expected empirical, fixed, none, or h0,w0,top,left,h,w,flip"
        )
    h0, w0, top, left, h, w, flip = row
    if min(h, w) < 1 or top + h > h0 or left + w > w0 or flip > 1:
        raise argparse.ArgumentTypeError(
            f"{text}: the box top,left,h,w must lie inside the image h0,w0, and flip must be 0 or 1"
        )
    return row


def parse_args(argv=None):
    cuda = torch.cuda.is_available()
    parser = files.Parser(__file__, __doc__)
    parser.add_argument("checkpoint",
        help="a run folder, its last.pt or STEP.pt, or an official file of REPA, SiT or DiT")

    add = parser.add_argument_group("images").add_argument
    add("--num-images", dest="num", type=number(int, 1, 2**31), default=100,
        help="number of images")
    add("--out", type=Path,
        help="write an ADM .npz: arr_0 uint8 [N, H, W, 3], arr_1 labels, protocol")
    add("--grid", type=Path,
        help="write a PNG with all images, also over an old one; balanced labels of up to 20"
             " classes get a column each")
    add("--labels", default="random",
        help="random or balanced among classes with images, or a list A,B of names or of indices")
    add("--control", type=control_row, default="empirical",
        help="size, crop and flip: empirical draws those of a training image of the class, fixed"
        " is a whole image of 512 x 512 pixels, none leaves them open; or h0,w0,top,left,h,w,flip")
    add("--seed", type=files.seed_number, default=0,
        help="the noise of image i depends on the seed and i alone")

    add = parser.add_argument_group("sampler and guidance").add_argument
    add("--sampler", choices=["ode", "heun", "sde", "mean", "ddpm", "edm"],
        help="by default ode (Euler's method), mean for MeanFlow, ddpm for DiT, or edm for SD-DiT")
    add("--steps", type=number(int, 1, 10**6),
        help="by default 50 (mean: 1, ddpm: 250, edm: 40); REPA's numbers need --sampler sde with"
             " 250")
    add("--cfg", type=number(float, 1), default=1.0,
        help="scale of the guidance of all channels; 1 means that there is none. A scale w that DiT"
             " or SiT apply to three of four channels is about 1 + 0.75 (w - 1) here")
    add("--interval", type=number(float, 0), nargs=2, metavar=("LOW", "HIGH"),
        help="guide only at noise levels from LOW to HIGH")
    add("--control-cfg", type=number(float, 0), metavar="BETA",
        help="guide the control with a scale of its own, which --cfg multiplies")
    add("--guide",
        help="guide by the weaker model of this checkpoint (autoguidance), not by the null class")

    add = parser.add_argument_group("networks").add_argument
    add("--weights", choices=["ema", "model"], default="ema",
        help="use the averaged or the raw weights")
    add("--official", choices=["repa", "sit"],
        help="says where an official file is from, if its layout does not show it")
    add("--vae",
        help="by default that of the cache; REPA's numbers need stabilityai/sd-vae-ft-ema")
    add("--batch-size", type=at_least_1, default=64,
        help="images that each process draws at once")
    add("--precision", choices=["fp32", "bf16"], default="bf16" if cuda else "fp32",
        help="precision of the network; x itself is kept in float64")
    add("--compile", action="onoff", default=cuda,
        help="compile the transformer blocks (by default on CUDA)")

    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser, args):
    """Refuses a command without an output, wrong endings, and guidance without a scale."""
    if not (args.out or args.grid):
        parser.error("nothing to write: give --out samples.npz, --grid grid.png, or both")
    for flag, path, suffix in (("--out", args.out, ".npz"), ("--grid", args.grid, ".png")):
        if path and path.suffix != suffix:
            parser.error(f"{flag} {path}: must be a file that ends in {suffix}")
    if args.interval:
        low, high = args.interval
        if low >= high:
            parser.error(f"--interval {low:g} {high:g}: the lower noise level comes first")
    if args.cfg == 1 and args.control_cfg is None:
        for flag, value in (("--guide", args.guide), ("--interval", args.interval)):
            if value:
                parser.error(f"{flag} has no effect without --cfg above 1")


def main(argv=None):
    args = parse_args(argv)
    with files.program(__file__, args):
        sample_images(args)


if __name__ == "__main__":
    main()
