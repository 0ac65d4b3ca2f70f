"""How fast everything is, in one command: no data, no weights and no network are needed.

    python tests/bench.py train --model XL/2 --batch 64 256    the training scripts, eager and compiled
    python tests/bench.py sample                               the other programs: sample, extract, fid
    python tests/bench.py all --json speed.json                everything

Training runs the scripts' own `main` on a synthetic cache. Only the clock is patched in, and checkpoints are
not written. The cache stays in the machine's memory, so a slow disk is not seen. The parts of a step:

    data                noise, waiting for the batch, copies to the device, latents; also logging
    forward, backward   of the networks and the loss
    update              clipping, AdamW, averaged weights, SD-DiT's teacher

Parts are in ms. Variants take turns (A, B, A, B); shown are medians, `low` and `high` are the quartiles.
"""

import gc
import importlib
import io
import json
import os
import platform
import shlex
import sys
import time
import warnings
from contextlib import ExitStack
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import timm
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import dit
import extract_features
import fid
import files
import sample

SCRIPTS = {}
for path in sorted(Path(dit.__file__).parent.glob("train_*.py")):
    SCRIPTS[path.stem.removeprefix("train_")] = importlib.import_module(path.stem)
PARTS = ["data", "forward", "backward", "update"]
WARM_UP = 5  # steps of each run that are not counted; the first one compiles
FEATURES = 2048  # Inception's, in the Fréchet distance
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
NAME = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
PEAK = dict(bf16=989, fp32=495)  # dense TFLOP/s of the data sheets of H100 and H200, both SXM; fp32 is TF32


def parse_args(argv=None):
    parser, number = files.Parser(__file__, __doc__), files.number
    models = [f"{size}/2" for size in dit.SIZES if CUDA or size != "XL"]  # XL would take a CPU hours
    add = parser.add_argument
    add("what", choices=[*BENCHES, "all"])
    add("--model", choices=models, default="XL/2" if CUDA else "nano/2", help="XL/2 on CUDA only")
    add("--batch", type=number(int, 1), nargs="+", default=[64, 256] if CUDA else [8], help="images at once")
    add("--image-size", type=int, choices=[64, 128, 256, 512], default=256 if CUDA else 64, help="pixels")
    add("--precision", choices=["bf16", "fp32"], default="bf16" if CUDA else "fp32", help="autocast")
    add("--compile", choices=["both", "on", "off"], default="both", help="compile the blocks")
    add("--steps", type=number(int, 1), default=20, help="timed steps of a training run; steps of a sampler")
    add("--repeats", type=number(int, 1), default=3, help="rounds over all variants")
    add("--scripts", choices=SCRIPTS, nargs="+", default=list(SCRIPTS), help="training scripts to run")
    add("--flags", default="", help="more flags for them, by default none: --flags='--micro-batch 128'")
    add("--json", type=Path, help="also write the rows with machine, versions and command to this file")
    args = parser.parse_args(argv)
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: no such folder {args.json.parent}")
    args.compile = ["off", "on"] if args.compile == "both" else [args.compile]
    return args


def has_peak(name):
    """Whether PEAK holds for a GPU of this name: the PCIe and NVL cards are slower."""
    return ("H100" in name or "H200" in name) and "PCIe" not in name and "NVL" not in name


def rate(images, seconds):
    """Median ms of a call, and if it is about images, median and quartiles of img/s."""
    slow, median, fast = np.percentile(seconds, [75, 50, 25])
    speed = dict(img_per_s=images / median, low=images / slow, high=images / fast) if images else {}
    return speed | dict(ms=1e3 * median)


def take_turns(jobs, repeats):
    """Call functions in turn, once to warm up, then `repeats` times. jobs: pairs of a row and a function.

    Returns the rows with the rates of the calls; row["batch"] is the number of images.
    """
    seconds = np.zeros((len(jobs), 1 + repeats))
    for i, (j, (_, call)) in product(range(1 + repeats), enumerate(jobs)):
        start = time.perf_counter()
        call()
        if CUDA:
            torch.cuda.synchronize()
        seconds[j, i] = time.perf_counter() - start
    return [row | rate(row.get("batch"), times[1:]) for (row, _), times in zip(jobs, seconds, strict=True)]


def gemm_rates():
    """TFLOP/s of large matrix products by precision, the ceiling of this machine."""
    torch.set_float32_matmul_precision("high")  # as the scripts do
    n = 8192 if CUDA else 1024
    fp32 = torch.randn(n, n, device=DEVICE)
    jobs = [({}, partial(torch.matmul, x, x)) for x in (fp32.bfloat16(), fp32)]
    bf16, fp32 = (round(2e-9 * n**3 / float(row["ms"]), 3) for row in take_turns(jobs, 9))
    return dict(bf16=bf16, fp32=fp32)


# ---- training
def write_cache(folder, images, size):
    """A cache like ImageNet's: random latents, 1000 classes, targets of width 768; 16 images, repeated."""
    rng, side, grid = np.random.default_rng(0), size // 8, size // 16
    arrays = {
        "moments": rng.uniform(0.1, 1, (16, 1, 8, side, side)).astype(np.float16),
        "labels": rng.integers(1000, size=16),
        "control": np.tile(np.int32([size, size, 0, 0, size, size, 0]), (16, 1, 1)),
        "targets": rng.standard_normal((16, 1, grid**2, 768), np.float32).astype(np.float16),
    }
    tensors = {}
    for name, array in arrays.items():
        tensors[name] = torch.from_numpy(np.resize(array, (images, *array.shape[1:])))
    files.write_tensors(extract_features.shard_file(folder, 0), tensors)
    meta = {
        "format_version": extract_features.FORMAT_VERSION,
        "count": images,
        "shard": images,
        "views": 1,
        "image_size": size,
        "classes": [str(i) for i in range(1000)],
        "vae": "none",
        "latent_channels": 4,
        "latent_side": side,
        "latent_scale": 0.18215,
        "latent_shift": 0.0,
        "grid": grid,
        "target_widths": [768],
        "target_dtype": "float16",
    }
    files.write_json(folder / "meta.json", meta)


def marking(function, part, marks, syncs):
    """The function, which at its end appends to `marks`: the part that ends, the time, the syncs so far.

    On CUDA the time is an event in the stream: nothing waits for the device, and a part is the device's time
    from mark to mark, so that the parts add up to the step.
    """

    def marked(*args, **kwargs):
        result = function(*args, **kwargs)
        now = torch.cuda.Event(enable_timing=True) if CUDA else time.perf_counter()
        if CUDA:
            now.record()
        marks.append((part, now, len(syncs)))
        return result

    return marked


def on_device(build):
    """The function, which makes the weights of a model on the device: XL/2 takes a CPU many seconds."""

    def build_there(config):
        if torch.get_default_device().type == "meta":
            return build(config)
        with DEVICE:
            return build(config)

    return build_there


def run_script(script, flags):
    """Run script.main. Returns a dict for each step and the last row of the log.

    The dict holds ms by part, the number of `syncs`, and the `lines` of Python that made the host wait.
    """
    torch._dynamo.reset()  # or the compiled blocks of all variants add up to Dynamo's limit
    gc.collect()
    ends = [
        (files, "start_run", "start"),  # from here to the first latents: the data of the first step
        (extract_features.CachedFeatures, "latents", "data"),
        (script.Objective, "forward", "forward"),
        (torch.Tensor, "backward", "backward"),
        (script, "update_ema", "update"),
    ]
    if hasattr(script.Objective, "after_step"):  # SD-DiT's teacher
        ends.append((script.Objective, "after_step", "update"))
    marks, steps = [], []
    with ExitStack() as stack:
        out = stack.enter_context(TemporaryDirectory())
        syncs = stack.enter_context(warnings.catch_warnings(record=True))  # PyTorch warns of each host sync
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", "called a synchronizing CUDA operation")
        for owner, name, part in ends:
            function = marking(getattr(owner, name), part, marks, syncs)
            stack.enter_context(patch.object(owner, name, function))
        stack.enter_context(patch.object(dit, "build", on_device(dit.build)))
        stack.enter_context(patch.object(files, "write_checkpoint", lambda path, state: None))
        stack.enter_context(patch.object(sys, "stdout", io.StringIO()))
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_sync_debug_mode("warn")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
        script.main([*flags, "--out", out])
        log = json.loads(Path(out, "log.jsonl").read_text().splitlines()[-1])
    for (_, start, earlier), (part, end, later) in pairwise(marks):
        if part == "data":
            steps.append(dict.fromkeys([*PARTS, "syncs"], 0) | dict(lines=[]))
        steps[-1][part] += start.elapsed_time(end) if CUDA else 1e3 * (end - start)
        steps[-1]["syncs"] += later - earlier
        steps[-1]["lines"] += [f"{Path(w.filename).name}:{w.lineno}" for w in syncs[earlier:later]]
    return steps, log


def bench_train(args, gemm):
    variants = product(args.batch, args.scripts, args.compile)
    rows = [dict(script=script, batch=batch, compile=mode) for batch, script, mode in variants]
    runs = [[] for _ in rows]
    with TemporaryDirectory() as data:
        write_cache(Path(data), max(args.batch), args.image_size)
        flags = ["--data", data, "--model", args.model, "--precision", args.precision, "--sample-every", "0"]
        flags += ["--steps", str(WARM_UP + args.steps), *shlex.split(args.flags)]
        for row, mine in [*zip(rows, runs, strict=True)] * args.repeats:
            own = [f"--batch-size={row['batch']}", "--compile" if row["compile"] == "on" else "--no-compile"]
            try:
                if "note" not in row:
                    mine.append(run_script(SCRIPTS[row["script"]], [*flags, *own]))
            except (torch.OutOfMemoryError, SystemExit) as error:
                row["note"] = str(error)[:120]
    for row, mine in zip(rows, runs, strict=True):
        if not mine:
            continue
        log, steps = mine[-1][1], [step for steps, _ in mine for step in steps[WARM_UP:]]
        row |= rate(row["batch"], [sum(step[part] for part in PARTS) / 1e3 for step in steps])
        row |= {part: np.median([step[part] for step in steps]) for part in PARTS}
        row["tflops"] = row["img_per_s"] * log["tflops"] / log["img_per_s"]
        row["of_gemm"] = row["tflops"] / gemm[args.precision]
        row["loss"] = log["loss"]  # after as many steps, eager and compiled agree
        if CUDA:
            row["of_peak"] = row["tflops"] / PEAK[args.precision] if has_peak(NAME) else "-"
            row |= dict(memory_gb=log["memory_gb"], syncs=np.mean([step["syncs"] for step in steps]))
    return rows


# ---- the other programs
def bench_sample(args, gemm):
    """Latents by sampler; `passes` are the network's forward passes for each image."""
    torch._dynamo.reset()
    config = dit.parse_model(args.model) | dict(input_size=args.image_size // 8, in_channels=4)
    n, jobs = args.steps, []
    kinds = [
        # network, sampler, guidance, passes
        (dict(arch="DiT"), "ode", 1.0, n),
        (dict(arch="DiT"), "sde", 1.8, 2 * n),
        (dict(arch="DiT", mean_velocity=True), "mean", 1.0, n),
        (dict(arch="NoiseDiT"), "ddpm", 1.0, n),
        (dict(arch="SDDiT"), "edm", 1.0, 2 * n - 1),
    ]
    for batch, (network, sampler, cfg, passes), mode in product(args.batch, kinds, args.compile):
        model = on_device(dit.build)(config | network).eval()
        if mode == "on":
            files.compile_blocks(model)
        call = partial(sample.generate, model, range(batch), torch.arange(batch), sampler, n, scale=cfg)
        row = dict(arch=network["arch"], sampler=sampler, cfg=cfg)
        row |= dict(batch=batch, compile=mode, passes=passes)
        jobs.append((row, call))
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.precision == "bf16"):
        rows = take_turns(jobs, args.repeats)
    return [row | dict(ms_per_pass=row["ms"] / row["passes"]) for row in rows]


@torch.no_grad()
def bench_extract(args, gemm):
    """The networks of an extraction, each alone; reading images depends on the images."""
    torch.set_float32_matmul_precision("highest")  # the default, which the program keeps
    name = "vit_base_patch14_dinov2.lvd142m" if CUDA else "vit_small_patch14_dinov2.lvd142m"
    side, jobs = args.image_size, []
    layout = torch.channels_last if CUDA else torch.contiguous_format  # as load_autoencoder
    torch.backends.cudnn.benchmark = True
    autoencoder = extract_features.AutoencoderKL().to(DEVICE, memory_format=layout)
    with TemporaryDirectory() as folder:
        torch.save(timm.create_model(name).state_dict(), Path(folder, "random.pth"))
        vit = extract_features.ViT(name, side // 16, str(Path(folder, "random.pth")), DEVICE)
    for batch in args.batch:
        pixels = torch.randint(256, (batch, 3, side, side), device=DEVICE).byte()
        latents = torch.randn(batch, 4, side // 8, side // 8, device=DEVICE)
        jobs += [
            (dict(part="AutoencoderKL.encode", batch=batch), partial(autoencoder.encode, pixels / 127.5 - 1)),
            (dict(part="AutoencoderKL.decode", batch=batch), partial(autoencoder.decode, latents)),
            (dict(part=name, batch=batch), partial(vit, pixels)),
        ]
    return take_turns(jobs, args.repeats)


@torch.no_grad()
def bench_fid(args, gemm):
    """Inception's features, and the two costs that a comparison has once."""
    torch.set_float32_matmul_precision("highest")  # fid.py does without TF32
    torch.backends.cudnn.allow_tf32 = False
    layout, n = (torch.contiguous_format, 10_000) if CUDA else (torch.channels_last, 1000)
    model, jobs = fid.InceptionV3().to(DEVICE, memory_format=layout), []
    for batch in args.batch:
        images = torch.randint(256, (batch, 3, args.image_size, args.image_size), device=DEVICE)
        jobs.append((dict(part="InceptionV3", batch=batch), partial(model, images.byte())))
    x = torch.randn(n, FEATURES, device=DEVICE)
    moments = x.mean(0).cpu().double().numpy(), x.T.cov().cpu().double().numpy()
    frechet = partial(fid.frechet_distance, *moments, *moments)
    jobs.append((dict(part=f"frechet_distance, D = {FEATURES}"), frechet))
    jobs.append((dict(part=f"precision_recall, N = {n}"), partial(fid.precision_recall, x, x)))
    return take_turns(jobs, args.repeats)


BENCHES = {"train": bench_train, "sample": bench_sample, "extract": bench_extract, "fid": bench_fid}


def show(rows):
    """Print the rows as a table with a column for each key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[row.get(key, "-") for key in columns] for row in rows]
    lines = [columns] + [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def main(argv=None):
    args, rows = parse_args(argv), []
    report = dict(device=NAME, cpu=platform.machine(), cores=os.cpu_count(), torch=torch.__version__)
    report |= dict(command=argv or sys.argv, gemm_tflops=gemm_rates())
    print(*(f"{name}: {value}" for name, value in report.items()), sep="\n")
    for name in BENCHES if args.what == "all" else [args.what]:
        try:
            table = BENCHES[name](args, report["gemm_tflops"])
        except (ValueError, torch.OutOfMemoryError) as error:
            sys.exit(f"bench.py {name}: {str(error)[:200]}")
        print(f"\n{name}, {args.model}, {args.image_size} pixels, {args.precision}")
        show(table)
        rows += [dict(bench=name) | row for row in table]
        if args.json:
            args.json.write_text(json.dumps(report | dict(rows=rows), indent=1) + "\n")
    if any("note" in row for row in rows):
        sys.exit("bench.py: a row with a note was not measured to its end; the note says why")


if __name__ == "__main__":
    main()
