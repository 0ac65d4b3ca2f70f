"""Everything that nine minutes on a GPU should tell about this repository, in one command.

    python tests/gpu.py --out gpu                      writes gpu/gpu.md, gpu/gpu.json and gpu/log.txt
    python tests/gpu.py --only sanity "train repa"     these sections alone
    python tests/gpu.py --smoke                        everything on a CPU with tiny networks: is it alive?

No data, weights or network are needed. The figures stand beside predictions that were made before any GPU ran
this code; tests/results/gpu.md explains both. Timings come from bench.py, runs from the scripts' own `main`.

A section is a process of its own with a limit in seconds, so that a crash or a lack of memory costs no other
section. A measurement that fails is a row that says why. The files are complete after every measurement.
"""

import gc
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import bench  # also makes the top-level modules importable
import numpy as np
import PIL
import scipy
import timm
import torch
import torch._dynamo  # bench needs it: imported once, before sections are forked
import torch.distributed as dist
import torchvision
from bench import CUDA, DEVICE, SCRIPTS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile, schedule

import dit
import extract_features
import fid
import files
import sample

FULL = SimpleNamespace(
    model="XL/2",  # the network that is timed
    small="S/2",  # the one whose losses and host syncs are looked at
    pixels=256,
    precision="bf16",
    batch=64,
    more_batches=[(128, "on"), (32, "on"), (128, "off"), (32, "off"), (192, "on")],  # of REPA
    modes=["on", "off"],  # of --compile
    steps=16,  # timed steps of training
    sampler_steps=8,
    repeats=2,
    digits="--steps 100 --log-every 50 --micro-batch 32",
    half=50,
    preview=True,  # in a resumed run
    compared_steps=100,
    tokens=[256, 257, 1024],
    set_sizes=(50_000, 10_000),  # samples and reference of an evaluation
)
SMOKE = SimpleNamespace(
    model="nano/2",
    small="nano/2",
    pixels=64,
    precision="fp32",
    batch=2,
    more_batches=[],
    modes=["off"],
    steps=1,
    sampler_steps=2,
    repeats=1,
    digits="--steps 2 --log-every 1 --batch-size 8 --micro-batch 4",
    half=1,
    preview=False,
    compared_steps=1,
    tokens=[16],
    set_sizes=(400, 100),
)
MODES = {"on": "compiled", "off": "eager"}

SECONDS = {  # the limit of a section, 90 for the others
    "ceilings": 90,  # with the imports
    "sanity": 110,
    "train repa": 150,
    "sample": 75,
    "programs": 75,
    "checkpoint": 70,
    "syncs": 45,
    "precision": 90,
    "profile": 60,
}

# what H100 and H200 (both SXM) were expected to do, before any of it ran; the page says how well
PREDICTED = {
    "matrix product, bf16: TFLOP/s": (750, 760),
    "matrix product, TF32: TFLOP/s": (380, 385),
    "16384 x 1152 x 4608, bf16: TFLOP/s": (640, 650),
    "4608 x 16384 x 1152, bf16: TFLOP/s": (520, 530),
    "copy on the device: TB/s": (3.0, 4.3),
    "attention of a layer, 64 x 256 tokens: ms": (0.30, 0.29),
    "AdamW skips a step by found_inf": (True, True),
    "repa, digits: loss at step 100": (0.501, 0.501),  # five seeds on a CPU, ± 0.004
    "diversedit, digits: loss at step 100": (0.566, 0.566),  # ± 0.006
    "sddit, digits: loss at step 100": (0.805, 0.805),  # ± 0.034
    "repa, 64 images, compiled: img/s": (415, 470),
    "repa, 64 images, eager: img/s": (330, 385),
    "repa, 128 images, compiled: img/s": (445, 505),
    "repa, 128 images, eager: img/s": (350, 410),
    "repa, 32 images, compiled: img/s": (365, 415),
    "repa, 32 images, eager: img/s": (300, 345),
    "repa, 192 images, compiled: img/s": (455, 515),
    "repa, 4 x 64 images, compiled: img/s": (440, 500),
    "diversedit, 64 images, compiled: img/s": (350, 405),
    "sddit, 64 images, compiled: img/s": (305, 345),
    "sddit, 64 images, fp32, compiled: img/s": (190, 210),
    "dit, 64 images, compiled: img/s": (420, 475),  # REPA's rate, by GFLOP
    "dit, 64 images, eager: img/s": (335, 390),
    "meanflow, 64 images, compiled: img/s": (210, 240),  # ± 30 %: du/dt is eager
    "repa, 64 images, compiled: GB": (32.4, 32.4),
    "repa, 64 images, eager: GB": (38.6, 38.6),
    "repa, 128 images, compiled: GB": (52.3, 52.3),
    "repa, 128 images, eager: GB": (64.9, 64.9),
    "repa, 32 images, compiled: GB": (22.5, 22.5),
    "repa, 32 images, eager: GB": (25.5, 25.5),
    "repa, 192 images, compiled: GB": (72.2, 72.2),
    "repa, 4 x 64 images, compiled: GB": (35.3, 35.3),
    "diversedit, 64 images, compiled: GB": (40.7, 40.7),
    "diversedit, 64 images, eager: GB": (47.0, 47.0),
    "sddit, 64 images, compiled: GB": (36.5, 36.5),
    "sddit, 64 images, eager: GB": (42.3, 42.3),
    "sddit, 64 images, fp32, compiled: GB": (50.7, 50.7),
    "ode, 64 images, compiled: ms per pass": (42, 37),
    "ode, 64 images, eager: ms per pass": (54, 46),
    "sde, 64 images, compiled: ms per pass": (43, 38),
    "sde, 64 images, eager: ms per pass": (55, 47),
    "edm, 64 images, compiled: ms per pass": (45, 40),
    "edm, 64 images, eager: ms per pass": (58, 50),
    "50,000 images, 250 steps, compiled: hours": (2.3, 2.0),
    "50,000 images, 250 steps, cfg on [0, 0.7], compiled: hours": (3.9, 3.5),
    "AutoencoderKL.encode: img/s": (270, 310),
    "AutoencoderKL.decode: img/s": (125, 145),
    "DINOv2-B: img/s": (2500, 2800),
    "extraction, networks alone: img/s": (240, 280),
    "InceptionV3: img/s": (1900, 2000),
    "Fréchet distance: s": (3, 3),
    "precision and recall of 50,000: s": (1.0, 0.9),
    "clip: ms": (3.0, 2.1),
    "AdamW: ms": (6.8, 4.8),
    "averaged weights: ms": (2.9, 2.1),
    "checkpoint: GB": (10.9, 10.9),
    "save a checkpoint: s": (15, 15),
    "read and check it: s": (4, 4),
    "restore it: s": (4, 4),
    "preview: s": (2.5, 2.2),
    # of every script
    "SCRIPT, digits: a resumed run differs by": ("< 1e-4", "< 1e-4"),  # a GPU adds in any order
    "SCRIPT, digits: DDP with one process differs by": ("< 1e-4", "< 1e-4"),
    "SCRIPT: host syncs in a step": (0, 0),
    "meanflow: host syncs in a step": (1, 1),  # it counts the rows with r < t
    "SCRIPT, 100 steps: loss of bf16 against fp32": ("< 0.01", "< 0.01"),
}


def predicted(name):
    """The predictions for H100 and H200, or two empty texts."""
    of_every_script = re.sub("^[a-z]+(?=[,:] )", "SCRIPT", name)
    return PREDICTED.get(name) or PREDICTED.get(of_every_script, ("", ""))


# ---- the sections. Each returns pairs: the names of some figures, and a function that measures them. It
# returns a dict with a value for each name; other entries are details.


def mean_ms(call, calls=10):
    """Mean ms of a call, the median of five times `calls` calls; on a CPU of one call."""
    rounds = 5 if CUDA else 1
    calls = calls if CUDA else 1

    def several():
        for _ in range(calls):
            call()

    return bench.take_turns([({}, several)], rounds)[0]["ms"] / calls


def seconds_of(call):
    """Seconds that a call takes, with the work it leaves to the device, and its result."""
    start = time.perf_counter()
    result = call()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def ceilings(size):
    """What this machine can do at all, and whether its attention is right."""

    def machine():
        found = {
            "device": bench.NAME,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "compiler": shutil.which("c++"),
        }
        for module in (np, scipy, timm, torchvision, PIL):
            found[module.__name__] = module.__version__
        if CUDA:
            found["GB"] = torch.cuda.mem_get_info()[1] / 1e9
            query = "clocks.sm,clocks.mem,power.limit,temperature.gpu,driver_version"
            command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
            found[query] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        return found

    def gemm():
        rates = bench.gemm_rates()
        return dict(zip(products, [rates["bf16"], rates["fp32"]], strict=True))

    def product(m, k, n, name):
        a = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
        b = torch.randn(k, n, device=DEVICE, dtype=torch.bfloat16)
        return {name: 2e-9 * m * k * n / mean_ms(lambda: a @ b)}

    def copies():
        x = torch.randn(2**29 if CUDA else 2**20, device=DEVICE)
        y = torch.empty_like(x)
        pinned = torch.empty(2**26 if CUDA else 2**20, pin_memory=CUDA)
        target = torch.empty_like(pinned, device=DEVICE)
        return {
            "copy on the device: TB/s": 2e-9 * x.nbytes / mean_ms(lambda: y.copy_(x)),
            "copy to the device: GB/s": 1e-6 * pinned.nbytes / mean_ms(lambda: target.copy_(pinned, True), 2),
        }

    products = ["matrix product, bf16: TFLOP/s", "matrix product, TF32: TFLOP/s"]
    yield ["device"], machine
    yield products, gemm
    if size is FULL:  # a layer of the MLP, and the gradient of its weights
        for shape in [(16384, 1152, 4608), (4608, 16384, 1152)]:
            name = "{} x {} x {}, bf16: TFLOP/s".format(*shape)
            yield [name], partial(product, *shape, name)
    yield ["copy on the device: TB/s", "copy to the device: GB/s"], copies
    for tokens in size.tokens:
        name = f"attention of a layer, {size.batch} x {tokens} tokens: ms"
        yield [name], partial(measure_attention, size, tokens, name)


def measure_attention(size, tokens, name):
    """Forward and backward, with the errors of two images against fp32 without fused kernels."""
    _, width, heads = dit.SIZES[size.model.split("/")[0]]

    def inputs(images, dtype):
        """q, k and v as the model has them, and the gradient of the output; the same in both precisions."""
        generator = torch.Generator(DEVICE).manual_seed(0)
        shape = (images, tokens, 4, heads, width // heads)
        numbers = torch.randn(shape, generator=generator, device=DEVICE).bfloat16().to(dtype)
        qkv, grad = numbers.requires_grad_().split([3, 1], dim=2)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0), grad.permute(2, 0, 3, 1, 4)[0].detach()

    def attention(qkv, grad):
        out = scaled_dot_product_attention(*qkv)
        return out, *torch.autograd.grad(out, qkv, grad)

    with sdpa_kernel(SDPBackend.MATH):
        exact = attention(*inputs(2, torch.float32))
    errors = []
    for a, b in zip(attention(*inputs(2, torch.bfloat16)), exact, strict=True):
        errors.append(((a.float() - b).norm() / b.norm()).item())
    qkv, grad = inputs(size.batch, torch.bfloat16)
    found = {name: mean_ms(lambda: attention(qkv, grad))}
    return found | {"error of the output": errors[0], "of the gradients": max(errors[1:])}


class OneOfMany(int):
    """The number 1, but `world > 1` is true: the loop takes the way of several processes."""

    def __gt__(self, other):
        return True


def largest_difference(a, b):
    """Largest relative difference between two nested dicts of tensors that have the same keys."""
    if isinstance(a, dict):
        return max((largest_difference(a[key], b[key]) for key in a), default=0.0)
    a, b = a.double(), b.double()
    difference = ((a - b).norm() / (a.norm() + 1e-30)).item()
    return difference if math.isfinite(difference) else math.inf


def sanity(size, work):
    """Is what it computes right? Skipped steps, resumed runs, DistributedDataParallel."""

    def skip():
        model = torch.nn.Linear(64, 64).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0, fused=True)
        right = True
        for bad in (False, True, False, True):
            model(torch.randn(8, 64, device=DEVICE)).square().sum().backward()
            if bad:
                model.weight.grad[0, 0] = math.nan
            before = model.weight.detach().clone()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.found_inf = (~norm.isfinite()).float()
            optimizer.step()
            optimizer.zero_grad()
            right = right and torch.equal(before, model.weight) == bad
        steps = {int(state["step"]) for state in optimizer.state.values()}
        return {"AdamW skips a step by found_inf": right and steps == {2}}

    @cache
    def digits(script, kind, *flags):
        """A run on the digits in folder `kind`. Returns its checkpoint and the last row of its log."""
        out = work / script / kind
        data = work / "digits"
        extract_features.extract_digits(data, 0, 1, DEVICE)
        fixed = f"--digits --data {data} --out {out} --no-compile --workers 0 --keep-every {size.half}"
        SCRIPTS[script].main([*fixed.split(), *size.digits.split(), *flags])
        row = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
        checkpoint = torch.load(out / "last.pt", map_location="cpu", weights_only=True)
        checkpoint["moments"] = checkpoint["opt"]["state"]
        return {part: checkpoint[part] for part in ("model", "ema", "heads", "moments")}, row

    def whole(script, kind="whole"):
        return digits(script, kind, "--sample-every", "0")

    def loss(script, name):
        row = whole(script)[1]
        return {name: row[denoising_loss(row)], "skipped": row["skipped"], "img/s": row["img_per_s"]}

    def resume(script, name):
        """A run continued from half time, with a picture, against the whole run; on a GPU also chance."""
        checkpoint = whole(script)[0]
        out = work / script / "resumed"
        out.mkdir()
        shutil.copy(work / script / "whole" / f"{size.half:07d}.pt", out / "last.pt")
        resumed = digits(script, "resumed", "--sample-every", str(size.preview * size.half))[0]
        found = {name: largest_difference(checkpoint, resumed)}
        if CUDA:
            found["the same command twice"] = largest_difference(checkpoint, whole(script, "again")[0])
        return found

    def ddp(script, name):
        checkpoint = whole(script)[0]
        backend = "cpu:gloo,cuda:nccl" if CUDA else "gloo"
        device = torch.device("cuda", 0) if CUDA else DEVICE
        dist.init_process_group(backend, f"file://{work}/{script}/store", rank=0, world_size=1)
        try:
            with patch.object(files, "launch", lambda **_: (0, OneOfMany(1), device)):
                parallel = whole(script, "ddp")[0]
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return {name: largest_difference(checkpoint, parallel)}

    yield ["AdamW skips a step by found_inf"], skip
    for script in in_order():
        for name, measure in {
            f"{script}, digits: loss at step {2 * size.half}": loss,
            f"{script}, digits: a resumed run differs by": resume,
            f"{script}, digits: DDP with one process differs by": ddp,
        }.items():
            yield [name], partial(measure, script, name)


def denoising_loss(row):
    """The name of the loss that says most about a run."""
    return next(name for name in ("loss_fm", "loss_edm", "loss_noise", "loss") if name in row)


def in_order():
    """The names of the scripts, REPA's first."""
    return sorted(SCRIPTS, key=lambda name: (name != "repa", name))


def training(size, script):
    """Images per second and memory of one script, by bench.py."""

    @cache
    def gemm():
        return bench.gemm_rates() if CUDA else {"bf16": math.inf, "fp32": math.inf}

    def variant(names, batch, mode, precision, *flags):
        words = f"train --scripts {script} --model {size.model} --image-size {size.pixels} --batch {batch}"
        words += f" --compile {mode} --precision {precision} --steps {size.steps} --repeats 1"
        args = bench.parse_args([*words.split(), *flags])
        (row,) = bench.bench_train(args, gemm())
        if "note" in row:
            raise RuntimeError(row["note"])
        for key in ("script", "batch", "compile"):
            del row[key]
        return {names[0]: row.pop("img_per_s"), names[1]: row.pop("memory_gb", 0.0)} | row

    plan = [(f"{size.batch} images", size.batch, mode, size.precision) for mode in size.modes]
    if script == "repa":
        plan += [(f"{batch} images", batch, mode, size.precision) for batch, mode in size.more_batches]
        flags = f"--flags=--micro-batch {size.batch}"
        plan += [(f"4 x {size.batch} images", 4 * size.batch, size.modes[0], size.precision, flags)]
    if script == "sddit" and size is FULL:
        plan += [(f"{size.batch} images, fp32", size.batch, "on", "fp32")]  # its default
    for images, batch, mode, *rest in plan:
        label = f"{script}, {images}, {MODES[mode]}"
        names = [f"{label}: img/s", f"{label}: GB"]
        yield names, partial(variant, names, batch, mode, *rest)


def sampling(size):
    """Milliseconds of a forward pass in every sampler, and what they make of 50,000 images."""

    def passes(mode):
        words = f"sample --model {size.model} --image-size {size.pixels} --batch {size.batch}"
        words += f" --compile {mode} --precision {size.precision} --steps {size.sampler_steps}"
        args = bench.parse_args([*words.split(), "--repeats", str(size.repeats)])
        ms = {row["sampler"]: row["ms_per_pass"] for row in bench.bench_sample(args, None)}
        hours = 50_000 / size.batch / 3.6e6
        found = {f"{name}, {size.batch} images, {MODES[mode]}: ms per pass": ms[name] for name in ms}
        found[f"50,000 images, 250 steps, {MODES[mode]}: hours"] = 250 * hours * ms["ode"]
        # 172 of the 250 times lie in [0, 0.7] and take two passes
        found[f"50,000 images, 250 steps, cfg on [0, 0.7], {MODES[mode]}: hours"] = 422 * hours * ms["sde"]
        return found

    for mode in size.modes:
        names = [f"{name}, {size.batch} images, {MODES[mode]}: ms per pass" for name in ("ode", "sde", "edm")]
        names += [f"50,000 images, 250 steps, {MODES[mode]}: hours"]
        names += [f"50,000 images, 250 steps, cfg on [0, 0.7], {MODES[mode]}: hours"]
        yield names, partial(passes, mode)


def programs(size):
    """The networks of extract_features.py and fid.py, and the parts of an evaluation."""
    words = f"extract --batch {size.batch} --image-size {size.pixels} --repeats {size.repeats}"
    args = bench.parse_args(words.split())

    def extract():
        encode, decode, encoder = (row["img_per_s"] for row in bench.bench_extract(args, None))
        together = 1 / (1 / encode + 1 / encoder)
        return {
            "AutoencoderKL.encode: img/s": encode,
            "AutoencoderKL.decode: img/s": decode,
            "DINOv2-B: img/s": encoder,
            "extraction, networks alone: img/s": together,
            "hours of ImageNet on 8 GPUs": 1_281_167 / together / 8 / 3600,
        }

    def evaluate():
        inception, frechet, _ = bench.bench_fid(args, None)
        return {"InceptionV3: img/s": inception["img_per_s"], "Fréchet distance: s": frechet["ms"] / 1e3}

    def neighbours():
        samples, reference = (torch.randn(n, 2048, device=DEVICE) for n in size.set_sizes)
        seconds, _ = seconds_of(lambda: fid.precision_recall(reference, samples))
        return {"precision and recall of 50,000: s": seconds}

    @torch.no_grad()
    def layout(names, layout, benchmark):
        torch.backends.cudnn.benchmark = benchmark
        autoencoder = extract_features.AutoencoderKL().to(DEVICE, memory_format=layout)
        images = torch.rand(16 if CUDA else 1, 3, size.pixels, size.pixels, device=DEVICE)
        latents = torch.randn(len(images), 4, size.pixels // 8, size.pixels // 8, device=DEVICE)
        return {
            names[0]: mean_ms(lambda: autoencoder.encode(images), 1),
            names[1]: mean_ms(lambda: autoencoder.decode(latents), 1),
        }

    yield [
        "AutoencoderKL.encode: img/s",
        "AutoencoderKL.decode: img/s",
        "DINOv2-B: img/s",
        "extraction, networks alone: img/s",
    ], extract
    yield ["InceptionV3: img/s", "Fréchet distance: s"], evaluate
    yield ["precision and recall of 50,000: s"], neighbours
    for memory in ("contiguous_format", "channels_last"):
        for tuned in (False, True) if CUDA else (False,):
            label = f"{memory}{', cudnn.benchmark' * tuned}: ms"
            names = [f"encode 16 images, {label}", f"decode 16 images, {label}"]
            yield names, partial(layout, names, getattr(torch, memory), tuned)


def stalls(size, work):
    """What a run does beside the networks: the update of the weights, checkpoints, previews."""

    script = SCRIPTS["repa"]

    @cache
    def state():
        data = work / "cache"
        data.mkdir(exist_ok=True)
        bench.write_cache(data, 64, size.pixels)
        flags = f"--data {data} --out {work / 'checkpoint'} --model {size.model} --batch-size 1"
        args = script.parse_args(flags.split())
        features, config, _, _ = script.prepare(args, 1)
        with patch.object(dit, "build", bench.on_device(dit.build)):
            objective, ema, optimizer = script.build(args, features, config, None, DEVICE)
        parameters = optimizer.param_groups[0]["params"]
        for parameter in parameters:
            parameter.grad = 1e-3 * torch.randn_like(parameter)
        optimizer.step()
        return args, features, config, (objective, ema, optimizer)

    def update():
        objective, ema, optimizer = state()[-1]
        parameters = optimizer.param_groups[0]["params"]
        return {
            "clip: ms": mean_ms(lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0)),
            "AdamW: ms": mean_ms(optimizer.step),
            "averaged weights: ms": mean_ms(lambda: script.update_ema(ema, objective.model, 0.9999)),
        }

    def checkpoint():
        args, features, config, parts = state()
        parts[-1].zero_grad()
        last = work / "checkpoint" / "last.pt"
        last.parent.mkdir()
        save = partial(files.save_run, args, config, features, *parts, script.__file__, step=1)
        saving, _ = seconds_of(save)
        gigabytes = last.stat().st_size / 1e9
        reading, found = seconds_of(lambda: files.read_run(args, features.meta, script.__file__))
        restoring, _ = seconds_of(lambda: files.restore(found, *parts))
        last.unlink()
        return {
            "checkpoint: GB": gigabytes,
            "save a checkpoint: s": saving,
            "read and check it: s": reading,
            "restore it: s": restoring,
        }

    def preview():
        _, features, _, (_, ema, _) = state()
        autoencoder = extract_features.AutoencoderKL().to(DEVICE)
        picture = partial(sample.preview, ema, features, autoencoder, work / "preview.png")
        if CUDA:
            picture(precision=size.precision, steps=1)  # loads the kernels
        return {"preview: s": seconds_of(lambda: picture(precision=size.precision))[0]}

    yield ["clip: ms", "AdamW: ms", "averaged weights: ms"], update
    yield ["checkpoint: GB", "save a checkpoint: s", "read and check it: s", "restore it: s"], checkpoint
    yield ["preview: s"], preview


def cache_flags(size, work, model, images):
    """Flags of a training run on synthetic data without checkpoints and pictures."""
    data = work / f"cache-{images}"
    if not data.exists():
        data.mkdir()
        bench.write_cache(data, images, size.pixels)
    flags = f"--data {data} --model {model} --batch-size {size.batch} --precision {size.precision}"
    return f"{flags} --sample-every 0 --workers 0 --no-compile".split()


def host_syncs(size, work):
    """Lines that make the host wait for the device in a step of training, and how often."""

    def syncs(script, name):
        flags = cache_flags(size, work, size.small, size.batch)
        steps, _ = bench.run_script(SCRIPTS[script], [*flags, "--steps", str(bench.WARM_UP + size.steps)])
        steps = steps[bench.WARM_UP :]
        lines = Counter(line for step in steps for line in step["lines"])
        return {name: sum(step["syncs"] for step in steps) / len(steps)} | lines

    for script in in_order():
        name = f"{script}: host syncs in a step"
        yield [name], partial(syncs, script, name)


def precisions(size, work):
    """The same run in bf16 and in fp32: how far the losses of the last fifth of the steps are apart."""

    def compare(script, name):
        means = {}
        for precision in ("bf16", "fp32"):
            out = work / script / precision
            flags = [*cache_flags(size, work, size.small, 4 * size.batch), "--precision", precision]
            flags += ["--steps", str(size.compared_steps)]
            flags += ["--log-every", str(max(1, size.compared_steps // 5))]
            SCRIPTS[script].main([*flags, "--out", str(out)])
            means[precision] = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
        key = denoising_loss(means["fp32"])
        norms = [means[precision]["grad_norm"] for precision in means]
        return {
            name: abs(means["bf16"][key] / means["fp32"][key] - 1),
            key: means["fp32"][key],
            "gradient's norm": norms[0] / norms[1] - 1,
        }

    for script in in_order():
        name = f"{script}, {size.compared_steps} steps: loss of bf16 against fp32"
        yield [name], partial(compare, script, name)


KERNELS = {  # kind: words in the names of its kernels
    "fused by the compiler": ("triton",),
    "attention": ("attention", "flash", "fmha", "sdpa"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "mm"),
    "optimiser": ("multi_tensor", "foreach", "adam", "lerp"),
}


def profiles(size, work):
    """Where the time of three steps of REPA goes, by kinds of kernels. A table of kernels goes to the log."""

    def steps(mode, name):
        activities = [ProfilerActivity.CUDA] if CUDA else [ProfilerActivity.CPU]
        profiler = profile(activities=activities, schedule=schedule(wait=4, warmup=1, active=3, repeat=1))
        flags = cache_flags(size, work, size.model, size.batch)
        flags += ["--steps", "9", "--compile" if mode == "on" else "--no-compile"]
        hook = register_optimizer_step_post_hook(lambda *_: profiler.step())
        try:
            with profiler:
                bench.run_script(SCRIPTS["repa"], flags)
        finally:
            hook.remove()
        events = profiler.key_averages()
        clock = "self_device_time_total" if CUDA else "self_cpu_time_total"
        print(events.table(sort_by=clock, row_limit=40, max_name_column_width=90))
        kinds = Counter()
        for event in events:
            key = event.key.lower()
            kind = next((kind for kind, words in KERNELS.items() if any(w in key for w in words)), "the rest")
            kinds[kind] += getattr(event, clock) / 3e3
        return {name: kinds.total(), **kinds}

    for mode in size.modes:
        name = f"repa, {size.batch} images, {MODES[mode]}: ms of kernels in a step"
        yield [name], partial(steps, mode, name)


def plan(size, work):
    """The sections in the order of their value."""
    others = [script for script in in_order() if script != "repa"]
    return {
        "ceilings": ceilings(size),
        "sanity": sanity(size, work),
        "train repa": training(size, "repa"),
        "sample": sampling(size),
        **{f"train {script}": training(size, script) for script in others},
        "programs": programs(size),
        "checkpoint": stalls(size, work),
        "syncs": host_syncs(size, work),
        "precision": precisions(size, work),
        "profile": profiles(size, work),
    }


# ---- the report


def text(value):
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str(value).split()).replace("|", "/")


def off(value, expected):
    """How far a figure is from its prediction, in words."""
    if not isinstance(expected, (int, float)):
        return ""
    if isinstance(expected, bool) or expected == 0:
        return "as predicted" if value == expected else "OFF"
    return f"{value / expected - 1:+.0%}"


def prediction_table():
    """All predictions in Markdown."""
    lines = ["| figure | H100 | H200 |", "|---|---|---|"]
    for name, (h100, h200) in PREDICTED.items():
        lines.append(f"| {name} | {text(h100)} | {text(h200)} |")
    return "\n".join(lines) + "\n"


def table(report, size):
    """The report in Markdown, with all figures that are planned, measured or not."""
    found = {}
    for row in report["rows"]:
        for name in row["names"]:
            found[name] = row
    card = report["device"]
    lines = [f"{card}, torch {report['torch']}, {report['date']}", ""]
    for section, measurements in plan(size, Path()).items():
        state = report["sections"].get(section, "not run")
        lines += [f"### {section}: {state}", ""]
        lines += ["| figure | H100, predicted | H200, predicted | measured | | details |"]
        lines += ["|---|---|---|---|---|---|"]
        for names, _ in measurements:
            for name in names:
                cells = [name, *map(text, predicted(name)), *measured(found.get(name), name, card)]
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def measured(row, name, card):
    """Three cells of the table: the value, its distance from the prediction, the details of the row."""
    if row is None:
        return "", "", ""
    if "error" in row:
        return "failed", "", text(row["error"])
    value = row["values"][name]
    details = ""
    if name == row["names"][0]:
        details = ", ".join(f"{key} {text(value)}" for key, value in row["details"].items())
    distance = ""
    if bench.has_peak(card):
        distance = off(value, predicted(name)["H200" in card])
    return text(value), distance, details


def add_to_report(out, size, rows=(), sections=()):
    """Adds rows and states of sections. Only the section that runs writes, or the parent after its end."""
    report = json.loads((out / "gpu.json").read_text())
    report["rows"] += rows
    report["sections"] |= sections
    files.write_json(out / "gpu.json", report)
    files.replace_file(out / "gpu.md", lambda file: file.write(table(report, size).encode()))


# ---- processes


def measure_section(section, size, out, work):
    """Measures the figures of a section. A failure is a row with an `error`."""
    for names, measure in plan(size, work)[section]:
        start = time.perf_counter()
        row = {"section": section, "names": names}
        try:
            found = measure()
            row["values"] = {name: found.pop(name) for name in names}
            row["details"] = found
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {str(error)[:400]}"
        row["seconds"] = time.perf_counter() - start
        add_to_report(out, size, rows=[row])
        sys.stdout.flush()
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


def become_section(section, smoke, out, work, go):
    """A process of its own, which waits for its turn. Its output goes to the log."""
    log = os.open(out / "log.txt", os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if smoke:
        dit.SIZES["nano"] = (2, 32, 2)
        bench.FEATURES = 64
        entries = {"block_out_channels": [32, 32, 32, 32], "scaling_factor": 0.18215}
        extract_features.AutoencoderKL = partial(extract_features.AutoencoderKL, entries)
    gc.freeze()  # what is imported need not be looked through after every row
    go.wait()
    print(f"\n######## {section}", flush=True)
    measure_section(section, SMOKE if smoke else FULL, out, work)
    sys.stdout.flush()
    os._exit(0)  # what libraries do at the end may wait for their helpers


def run_sections(sections, args, work, end):
    """Runs the sections one after the other, each at most until its limit or the `end` of all."""
    # spawned, because a forked process cannot use CUDA; but it imports for seconds, so it starts early
    context = multiprocessing.get_context("spawn" if CUDA else "fork")
    size = SMOKE if args.smoke else FULL
    started = {}

    def start(section):
        go = context.Event()
        arguments = section, args.smoke, args.out, work, go
        process = context.Process(target=become_section, args=arguments)
        process.start()
        started[section] = process, go

    try:
        start(sections[0])
        for section, following in zip_longest(sections, sections[1:]):
            if following:
                start(following)
            process, go = started[section]
            limit = SECONDS.get(section, 90) * (10 if args.smoke else 1)  # the CPU may be busy
            state = wait_for(process, go, min(limit, end - time.monotonic()))
            add_to_report(args.out, size, sections={section: state})
            print(f"{section}: {state}", flush=True)
    finally:
        for process, _ in started.values():
            process.kill()


def wait_for(process, go, limit):
    """Lets a section go, and ends it at its limit. Returns its state in words."""
    start = time.monotonic()
    go.set()
    process.join(max(0, limit))
    seconds = f"{time.monotonic() - start:.0f} s"
    if process.exitcode is None:
        process.kill()
        process.join()
        return f"stopped after {seconds}"
    if process.exitcode:
        return f"FAILED with exit code {process.exitcode} after {seconds}"
    return seconds


def parse_args(argv=None):
    parser = files.Parser(__file__, __doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/gpu"), help="folder of the report")
    add("--minutes", type=files.number(float, above=0), default=8.8, help="the end of all sections")
    add("--only", nargs="+", metavar="SECTION", help="these sections alone")
    add("--smoke", action="store_true", help="tiny networks, on a CPU")
    args = parser.parse_args(argv)
    known = list(plan(FULL, Path()))
    for section in args.only or []:
        if section not in known:
            parser.error(f"--only {section}: the sections are {', '.join(known)}")
    args.only = args.only or known
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.smoke == CUDA:
        sys.exit("gpu.py: needs a GPU; with --smoke, which runs tiny networks, a CPU")
    end = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "log.txt").write_bytes(b"")
    report = {
        "device": bench.NAME,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "predicted": PREDICTED,
        "sections": {},
        "rows": [],
    }
    files.write_json(args.out / "gpu.json", report)
    with TemporaryDirectory() as work:
        run_sections(args.only, args, Path(work), end)
    print((args.out / "gpu.md").read_text())


if __name__ == "__main__":
    main()
