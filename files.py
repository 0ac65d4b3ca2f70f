"""Runs, checkpoints, files, processes, command lines: what programs need and no paper mentions.

A run of a training script is a folder, and the same command resumes it exactly:
    last.pt           model, ema, heads, opt, step, args, config, data: the whole state
    STEP.pt           the same, kept every --keep-every steps
    log.jsonl         a row for every --log-every steps
    run.json          one entry per start: command, versions, device, commit
    samples-STEP.png  the previews
Work that has many parts (a cache of features, a set of sampled images) is a folder with a JSON
description and one .safetensors file per part. Every file but log.jsonl is written beside its place
and then renamed, so it is whole or absent. To continue a command that was killed, run it again.

Raise `UserError` for what the user can repair: `program` turns it into one line. Every other
exception is a bug and keeps its traceback.
"""

import argparse
import atexit
import contextlib
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

import dit

# ---- errors


class UserError(Exception):
    """Something that the user can repair. Its message is one line with the thing and the remedy."""


@contextlib.contextmanager
def explaining(what, remedy):
    """Turns whatever is raised inside, a bug too, into a UserError. So put little inside."""
    try:
        yield
    except Exception as error:  # libraries raise about ten types for a damaged file
        raise UserError(f"{what} ({first_sentence(error)}); {remedy}") from None


def first_sentence(error):
    """Returns the first sentence of an exception's text, or its type if there is no text."""
    text = " ".join(str(error).split())
    return text.split(". ")[0][:200] or type(error).__name__


# ---- random numbers

# what random numbers are used for; append a new use: its position, from 1, is part of the seed
USES = ("step", "epoch", "blocks", "image", "label", "control", "crop")


def random_stream(use, seed, index):
    """Returns NumPy's generator for one use of (seed, index). No two uses share a stream."""
    return np.random.default_rng([1 + USES.index(use), seed, index])


# ---- a run of a training script: when it saves, what it saves, how it resumes


def due(args, step):
    """Returns whether a row of the log, a checkpoint and a preview are due after this step.

    There is a preview at the end, and also at 1/16, 1/8, 1/4 and 1/2 of the first interval. A
    preview comes with a checkpoint, and a checkpoint with a row.
    """
    preview = False
    if args.sample_every:
        early = [args.sample_every // n for n in (16, 8, 4, 2)]
        preview = step in early or step % args.sample_every == 0 or step == args.steps
    regular = step % args.save_every == 0 or step % args.keep_every == 0
    save = preview or regular or step == args.steps
    log = save or step % args.log_every == 0
    return log, save, preview


def save_run(args, config, cache, objective, ema, optimizer, script, step):
    """Writes the whole state of a run to last.pt, and every --keep-every steps also to STEP.pt."""
    heads = {}
    for name, value in objective.state_dict().items():
        if not name.startswith("model."):  # the model is saved on its own
            heads[name] = value
    checkpoint = {
        "step": step,
        "args": vars(args),
        "config": config,
        "data": cache.meta,
        "control": cache.control_table,
        "script": Path(script).name,
        "code": file_hash(script),
        "model": objective.model.state_dict(),
        "ema": ema.state_dict(),
        "heads": heads,
        "opt": optimizer.state_dict(),
    }
    write_checkpoint(Path(args.out, "last.pt"), checkpoint)
    if step % args.keep_every == 0:
        write_checkpoint(Path(args.out, f"{step:07d}.pt"), checkpoint)


def restore(checkpoint, objective, ema, optimizer):
    """Copies a checkpoint into the objective (model and heads), the average and the optimiser."""
    weights = {f"model.{name}": value for name, value in checkpoint["model"].items()}
    with explaining("last.pt does not fit this run", "choose another --out"):
        objective.load_state_dict(weights | checkpoint["heads"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["opt"])
    for state in optimizer.state.values():
        for name, value in state.items():
            state[name] = value.clone()  # on a CPU it is still a part of the mapped file


# A resumed run may change these flags: paths and intervals, the length of the run, and how its work
# is divided. (Only L_div of DiverseDiT depends on the micro-batch, over which it averages.)
FREE_FLAGS = {
    "data", "out", "digits",
    "log_every", "sample_every", "save_every", "keep_every",
    "steps", "workers", "compile", "micro_batch",
}
# It may also change these, to rescue a run without finite gradients. The change is printed.
RESCUE_FLAGS = {"lr", "clip", "precision"}


def read_run(args, meta, script):
    """Returns the checkpoint of the run in folder args.out, or None if the run is new.

    meta: meta.json of the cache; script: path of the training script. Prints what changed since.
    Raises UserError if the folder holds another run or other files.
    """
    folder = Path(args.out)
    if not (folder / "last.pt").exists():
        refuse_other_files(folder)
        return None

    checkpoint = read_checkpoint(folder, resume=True)
    step = checkpoint["step"]
    there = {"script": checkpoint["script"], **checkpoint["args"]}
    here = {"script": Path(script).name, **vars(args)}
    difference = first_difference(there, here, FREE_FLAGS | RESCUE_FLAGS)
    if not difference and checkpoint["data"] != meta:
        difference = f"in the cache, {first_difference(checkpoint['data'], meta)}"
    if difference:
        raise UserError(f"{folder} holds another run: {difference}; choose another --out")
    for flag in sorted(RESCUE_FLAGS):
        if there[flag] != here[flag]:
            print(f"--{flag} changes from {there[flag]} to {here[flag]} at step {step}")
    if checkpoint["code"] != file_hash(script):
        print(f"the code of {Path(script).name} changed since step {step}")
    return checkpoint


def refuse_other_files(folder):
    """Raises UserError if the folder of a new run holds files, except pictures and .npz files."""
    if folder.is_file():
        raise UserError(f"--out {folder}: is a file; choose a folder")
    found = folder.glob("[!.]*")  # all but what begins with a dot
    foreign = {path.name for path in found if path.suffix not in (".png", ".npz", ".tmp")}
    if "run.json" in foreign:  # a run that ended before its first checkpoint
        foreign -= {"run.json", "log.jsonl"}
    if foreign:
        raise UserError(f"--out {folder} holds other files ({min(foreign)}); choose another --out")


def start_run(args, step, world, model):
    """Locks the run folder, notes this start in run.json, cuts the log, and says what begins."""
    out = Path(args.out)
    log = out / "log.jsonl"
    lock_folder(out)
    rows = rows_until(step, log)
    note_start(out / "run.json", args, step, world)
    replace_file(log, lambda file: file.write(rows.encode()))

    if step >= args.steps:
        print(f"{out} is at step {step} already; raise --steps to go on")
        return
    local_batch = args.batch_size // world
    micro_batch = args.micro_batch or local_batch
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    processes = "1 process" if world == 1 else f"{world} processes"
    print(
        f"{type(model).__name__} {args.model}, {parameters:.1f}M parameters,"
        f" {model.grid**2} tokens;"
        f" {device_name()}, {args.precision};"
        f" batch {args.batch_size} = {processes} x {local_batch // micro_batch} x {micro_batch};"
        f" steps {step} to {args.steps}; {out}"
    )


def rows_until(step, log):
    """Returns the text of the rows of a log up to `step`: a killed run wrote more than it saved."""
    rows = ""
    if step and log.exists():
        with explaining(f"{log}: damaged", "delete it to go on"):
            for row in log.read_text().split("\n")[:-1]:  # a kill may have cut the last row
                if json.loads(row)["step"] <= step:
                    rows += row + "\n"
    return rows


def note_start(path, args, step, world):
    """Adds an entry to run.json: at which step the run starts, by which command, and on what."""
    starts = []
    if step and path.exists():
        with explaining(f"{path}: damaged", "delete it to go on"):
            starts = list(json.loads(path.read_text()))
    commit = None
    if shutil.which("git"):
        command = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    start = {
        "step": step,
        "argv": sys.argv,
        "args": vars(args),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": device_name(),
        "processes": world,
        "git": commit,
    }
    write_json(path, [*starts, start])


def device_name():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


LOCKS = []  # open files: a folder stays locked as long as this process lives


def lock_folder(folder):
    """Makes a folder and locks it until this process ends.

    Raises UserError if another process has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    LOCKS.append(file)
    try:
        # not flock: loader processes would inherit it, and keep it when this process is killed
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(
            f"{folder}: another process is writing there; wait for it or choose another --out"
        ) from None
    except OSError:
        pass  # this file system has no locks


# ---- the log of a run


class TrainingLog:
    """Writes log.jsonl and shows the bar.

    A row holds means over its interval: the steps since the row before. The sums stay on the
    device, so that no step makes the host wait for the GPU. A step whose gradient was not finite
    was skipped by the optimiser and does not count.
    """

    def __init__(self, args, step, rank, world, flops):
        """flops: those of one training step, per image."""
        self.args = args
        self.path = Path(args.out, "log.jsonl")
        self.rank = rank
        self.world = world
        self.flops = flops
        self.failure = None  # the exception that ends the run, if there is one
        self.sums = 0  # over the finite steps of the interval: losses, grad_norm, number of steps
        self.bad_in_a_row = 0  # the newest steps whose gradient was not finite
        self.interval_step = step  # the step after which the interval began
        self.interval_clock = None  # when it began: until_stopped sets this
        disable = rank > 0 or None  # tqdm: None shows the bar only in a terminal
        self.bar = tqdm(total=args.steps, initial=step, unit="step", disable=disable)

    def add(self, names, losses, grad_norm):
        """Notes one step: the names and values of its losses [n], and the norm of its gradient."""
        self.names = [*names, "grad_norm"]
        finite = grad_norm.isfinite()
        self.last = torch.stack([*losses, grad_norm])
        values = torch.cat([self.last, torch.ones(1, device=finite.device)])
        self.sums = self.sums + torch.where(finite, values, 0)
        self.bad_in_a_row = torch.where(finite, 0, self.bad_in_a_row + 1)
        self.bar.update()

    def end_interval(self, step, lr):
        """Returns the row of the interval that ends after this step. All processes must call it.

        A mean is None if no step was finite. Raises UserError after 100 steps in a row without a
        finite gradient, or if a new run never had one.
        """
        if self.bad_in_a_row >= min(100, step):
            self.bar.close()
            raise UserError(f"step {step}: {self.explain_bad()}")
        if dist.is_initialized():
            dist.all_reduce(self.sums)
        *sums, count = self.sums.tolist()
        means = {}
        for name, total in zip(self.names, sums, strict=True):
            means[name] = total / count if count else None
        steps = step - self.interval_step
        finite_steps = round(count / self.world)  # every process has counted the same ones
        seconds = time.perf_counter() - self.interval_clock
        rate = steps * self.args.batch_size / seconds
        self.sums = 0
        self.interval_step = step
        self.interval_clock = None  # a checkpoint or a preview that follows is not timed
        return {
            "step": step,
            **means,
            "skipped": steps - finite_steps,
            "lr": lr,
            "img_per_s": rate,
            "tflops": rate * self.flops / self.world / 1e12,
            "memory_gb": torch.cuda.max_memory_allocated() / 1e9,  # 0 without a GPU
        }

    def write(self, row):
        """Appends the row to log.jsonl, and shows its denoising loss beside the bar."""
        if self.rank > 0:
            return
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            self.failure = UserError(
                f"cannot write {self.path} ({error.strerror});"
                " free some space and run the same command again"
            )
        shown = "loss"
        for name in ("loss_fm", "loss_edm", "loss_noise"):  # the denoising loss of a method
            if name in row:
                shown = name
        text = "no finite gradient"
        if row[shown] is not None:
            text = f"{shown} {row[shown]:.4f}"
        text += f", {row['img_per_s']:.0f} img/s"
        if row["skipped"]:
            text += f", {row['skipped']} skipped"
        self.bar.set_postfix_str(text)
        if self.bar.disable:  # there is no terminal
            print(f"step {row['step']}: {text}")

    def explain_bad(self):
        """Returns the message for a run whose newest steps had no finite gradient."""
        values = []
        for name, value in zip(self.names, self.last.tolist(), strict=True):
            values.append(f"{name} {value:.3g}")
        return (
            f"no finite gradient in the last {int(self.bad_in_a_row)} steps, which were skipped"
            f" ({', '.join(values)}); run the same command again with a lower --lr, or with"
            " --precision fp32"
        )

    def finish(self, step):
        """Prints the end of a run. Raises `failure`, or UserError if the run is not complete."""
        self.bar.close()
        if self.failure:
            raise self.failure
        if step < self.args.steps:
            if self.rank > 0:
                sys.exit(1)  # only the first process prints the message
            raise UserError(f"interrupted at step {step}; run the same command again to go on")
        if self.bad_in_a_row:
            raise UserError(f"at the last step, {step}: {self.explain_bad()}")
        folder = self.path.parent
        text = f"{folder} is at step {step}"
        if any(folder.glob("samples-*.png")):
            text += f"; pictures: {folder}/samples-*.png"
            text += note_on_average(self.args.ema, step)
        print(text)


def note_on_average(decay, step):
    """Returns a remark if more than 5 % of the averaged weights are initial ones, otherwise ""."""
    share = (decay or 0) ** step
    if share < 0.05:
        return ""
    return f"; the averages are still {share:.0%} initial weights: try sample.py --weights model"


# ---- checkpoints

# kinds of values, see fits
COUNT = range(1, 2**31)
PER_CHANNEL = (float, [float])  # a number, or a list with one for each channel
# what a model must know of its data: entries of a cache's meta.json, and of a checkpoint's "data"
DATA = {
    "vae": str,
    "image_size": COUNT,
    "classes": [str],
    "latent_scale": PER_CHANNEL,
    "latent_shift": PER_CHANNEL,
}


def read_checkpoint(path, resume=False, official=None):
    """Returns the dict of a checkpoint, or of a run folder's last.pt, mapped into memory.

    resume: whether it must hold all that a run needs to continue. Its checksums are then verified.
    official: see from_official, which gives such files the form of ours.
    Raises UserError if the file is missing, damaged or foreign.
    """
    path = checkpoint_file(path)
    remedy = "use another one"
    if resume:
        remedy = "copy a snapshot of the run, STEP.pt, over it, or choose another --out"
    with explaining(f"{path}: not a readable checkpoint", remedy):
        if resume:
            check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # in files of REPA and SiT
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if "config" not in checkpoint:
            checkpoint = from_official(checkpoint, official)
        validate_checkpoint(checkpoint, resume)
    return checkpoint


def load_model(path, weights="ema", device="cpu", official=None):
    """Returns the model of a checkpoint, in eval mode, and the checkpoint (see read_checkpoint)."""
    checkpoint = read_checkpoint(path, official=official)
    model = dit.build(checkpoint["config"])
    model.load_state_dict(checkpoint[weights])
    return model.to(device).eval(), checkpoint


def read_init(path, config, classes):
    """Returns the checkpoint of --init, and the entries of `config` that its model hands on.

    classes: the cache's names of its classes. An official file has no names: its labels are
    ImageNet's in the order of the class folders, so it gets these names if there are as many.
    """
    init = read_checkpoint(path)
    if "official" in init and len(classes) == len(init["data"]["classes"]):
        init["data"]["classes"] = classes
    with explaining(f"--init {path}: does not fit this model", "choose another one"):
        there = init["config"]["arch"]
        here = config["arch"]
        if there != here and "NoiseDiT" in (there, here):
            raise ValueError("one of the two predicts noise: train_dit.py goes on from such models")
        check_archive(checkpoint_file(path))
        return init, dit.inherit_config(config, init["config"])


def write_checkpoint(path, checkpoint):
    replace_file(path, lambda file: torch.save(checkpoint, file))


def checkpoint_file(path):
    """Returns the path of a checkpoint, or that of last.pt in a run folder.

    Raises UserError if there is none.
    """
    path = Path(path)
    if path.is_dir():
        path /= "last.pt"
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    return path


def check_archive(path):
    """Raises ValueError if a checksum in a checkpoint is wrong. torch.load ignores them."""
    damaged = zipfile.ZipFile(path).testzip()
    if damaged:
        raise ValueError(f"wrong checksum of {damaged}")


def validate_checkpoint(checkpoint, resume):
    """Raises an error unless all parts of a checkpoint are there, are finite and fit each other."""
    for name in ("model", "ema", "config", "data", "args"):
        expect(checkpoint, {name: dict})
    expect(checkpoint["data"], DATA)
    must_be_finite = ["model", "ema"]
    if resume:
        expect(checkpoint, {"heads": dict, "opt": dict, "step": range(2**63), "script": str})
        must_be_finite.append("heads")
    with torch.device("meta"):
        model = dit.build(checkpoint["config"])
    for name in ("model", "ema"):
        # a plain dict: load_state_dict notes `assign` in a state dict, and the next load of it,
        # which must copy, would assign, too
        model.load_state_dict(dict(checkpoint[name]), assign=True)
    for name in must_be_finite:
        for value in checkpoint[name].values():
            if not value.isfinite().all():
                raise ValueError(f"{name} is not finite")


# ---- checkpoints of REPA, SiT and DiT


def from_official(content, official):
    """Returns a checkpoint in our form from the content of a file of REPA, SiT or DiT.

    The number of output channels tells them apart. If there are eight, the last four are variances:
    DiT trains them, and they are kept; in SiT's files they are still 0, and left out. If there are
    four, the file is REPA's if it holds projectors; otherwise `official` must be "repa" or "sit".
    Raises ValueError for others.
    """
    weights, is_repa = official_weights(content)
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    side = math.isqrt(weights["pos_embed"].shape[1]) * patch
    heads_of_width = {w: heads for _, w, heads in dit.SIZES.values()}
    num_classes = len(weights["y_embedder.embedding_table.weight"]) - 1
    expected = "repa" if is_repa else official
    origin = convert_last_layer(weights, patch, channels, expected)
    if official and official != origin:
        raise ValueError(f"its keys and shapes are those of {origin}")

    return {
        "official": origin,
        "model": weights,
        "ema": weights,
        "step": content.get("steps"),
        "args": {"ema": 0.9999},
        "config": {
            "arch": "NoiseDiT" if origin == "dit" else "DiT",
            "input_size": side,
            "patch_size": patch,
            "in_channels": channels,
            "hidden_size": width,
            "depth": sum("qkv.weight" in name for name in weights),
            "num_heads": heads_of_width[width],
            "num_classes": num_classes,
            "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        },
        "data": {
            "vae": "stabilityai/sd-vae-ft-ema",
            "image_size": 8 * side,
            "latent_scale": 0.18215,
            "latent_shift": 0.0,
            "classes": [str(i) for i in range(num_classes)],
        },
    }


def official_weights(content):
    """Returns the weights of an official file under our names, and whether REPA surely wrote it."""
    state = content.get("ema", content.get("model", content))
    is_repa = any(re.search("projectors|decoder_blocks", name) for name in state)
    # older files of REPA: the blocks behind the aligned one are called decoder_blocks
    aligned_depth = sum("qkv.weight" in name and "decoder" not in name for name in state)
    weights = {}
    for name, value in state.items():
        name = name.removeprefix("module.").removeprefix("_orig_mod.")
        if name.startswith("decoder_blocks."):
            _, i, rest = name.split(".", 2)
            name = f"blocks.{int(i) + aligned_depth}.{rest}"
        if not name.startswith("projectors."):
            weights[name] = value.float()
    return weights, is_repa


def convert_last_layer(weights, patch, channels, expected):
    """Makes the last layer predict what ours predicts. Returns the origin: repa, sit or dit.

    It drops SiT's variances, and turns its velocity round, in sign and in time. A file without
    variances does not show its origin: this is `expected`. Raises ValueError if that is None.
    """
    shape = (patch**2, -1, channels)  # the second axis: 0 is the prediction, 1 the variance
    outputs = weights["final_layer.linear.weight"].unflatten(0, shape)
    if outputs.shape[1] == 1:
        origin = expected
    elif outputs[:, 1].any():
        origin = "dit"  # its variances are trained
    else:
        origin = "sit"
    if origin is None:
        raise ValueError(
            "it may be REPA's or SiT's: sample.py needs --official repa or sit, --init a file of"
            " REPA with projectors"
        )
    if origin == "sit":
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            prediction = weights[name].unflatten(0, shape)[:, 0]
            weights[name] = -prediction.flatten(0, 1)
        reverse_time(weights)
    return origin


def reverse_time(weights):
    """Turns SiT's weights, for which t = 1 is data, into ours: v(x, t) = - v_SiT(x, 1 - t).

    The caller changes the sign. The first layer of the time MLP absorbs t -> 1 - t, because
        cos((1 - t) f) = cos(f) cos(t f) + sin(f) sin(t f)
        sin((1 - t) f) = sin(f) cos(t f) - cos(f) sin(t f)
    """
    of_cos, of_sin = weights["t_embedder.mlp.0.weight"].chunk(2, dim=1)
    f = dit.Sinusoids(of_cos.shape[1]).omega
    new_of_cos = of_cos * f.cos() + of_sin * f.sin()
    new_of_sin = of_cos * f.sin() - of_sin * f.cos()
    weights["t_embedder.mlp.0.weight"] = torch.cat([new_of_cos, new_of_sin], dim=1)


# ---- files that are whole or absent


def replace_file(path, write):
    """Calls write(file) for a file beside `path` and renames it. Raises UserError if that fails."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # others may write the same file
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error
        if isinstance(error.__context__, OSError):  # torch.save made a RuntimeError of it
            cause = error.__context__
        raise UserError(
            f"cannot write {path} ({first_sentence(cause)});"
            " free some space and run the same command again"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path, value):
    text = json.dumps(value, indent=1) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))


def write_tensors(path, tensors):
    """Writes a dict of tensors as a .safetensors file."""
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    content = safetensors.torch.save(contiguous)
    replace_file(path, lambda file: file.write(content))


def read_json(path, expected=None):
    """Returns the dict in a JSON file. Raises UserError if it lacks what is `expected`."""
    with explaining(f"{path}: damaged", "delete the folder and make it again"):
        entries = dict(json.loads(path.read_text()).items())  # a list has no items
        expect(entries, expected or {})
        return entries


def expect(entries, kinds):
    """Raises ValueError unless the dict has every entry of `kinds`, and each of its kind."""
    for name, kind in kinds.items():
        value = entries.get(name)
        if not fits(value, kind):
            raise ValueError(f"{name} is {value!r:.60}")


def fits(value, kind):
    """Returns whether a value is of a kind.

    A kind is a type, [a kind] for a list of such values, a range for an integer inside it, a set of
    possible values, or a tuple of kinds, of which one is enough.
    """
    if isinstance(kind, tuple):
        return any(fits(value, option) for option in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(x, kind[0]) for x in value)
    if isinstance(kind, range):
        return type(value) is int and value in kind
    if isinstance(kind, set):
        return value in list(kind)  # a set would fail for a value that cannot be hashed
    if kind is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, kind)


def first_difference(there, here, may_differ=()):
    """Returns a text about the first entry in which two dicts differ, or None if none does."""
    for name in [*here, *there]:
        if name not in may_differ and there.get(name) != here.get(name):
            return f"{name} is {there.get(name)!s:.60} there, {here.get(name)!s:.60} here"
    return None


def start_folder(folder, name, description, size):
    """Makes a folder for work of `size` bytes in many parts, and writes its description to `name`.

    description: a dict that JSON gives back as it is, so without tuples.
    Raises UserError if the folder holds other work or other files, or if the disk has less room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    if file.exists():
        difference = first_difference(read_json(file), description)
        if difference:
            raise UserError(
                f"{folder} holds the work of another command: {difference};"
                " delete it or choose another name"
            )
        return
    foreign = {path.name for path in folder.iterdir() if path.suffix != ".tmp"}
    if foreign:
        raise UserError(f"{folder} holds other files, such as {min(foreign)}; choose another --out")
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f"{folder}: needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    print(f"{folder}: needs at most {size / 1e9:.3f} GB, {free / 1e9:.1f} GB are free")
    write_json(file, description)


def file_hash(path):
    """Returns the first 16 digits of the SHA-256 of a file, or of the last.pt of a run folder."""
    with open(checkpoint_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


# ---- processes

RENDEZVOUS = timedelta(minutes=5)  # how long a process waits for the others to appear


def launch(hours=24):
    """Joins the processes that torchrun started, one per GPU.

    Returns rank, world (the number of processes) and device. hours: how long a process waits for
    the others later on. CPU tensors travel by gloo and CUDA tensors by nccl.
    Raises UserError if torchrun's variables make no sense, if there is no GPU for this process, or
    if the other processes do not appear in time.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    variables = ", ".join(f"{name}={os.getenv(name)}" for name in names)
    with explaining(variables, "start several processes with torchrun, or unset these variables"):
        rank, world, local_rank = torchrun_ranks()

    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK={local_rank}: this machine has {torch.cuda.device_count()} GPUs;"
                " lower --nproc_per_node"
            )
        device = torch.device("cuda", local_rank)
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32

    if world > 1:
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # of DDP
        remedy = "are MASTER_ADDR and MASTER_PORT right, and were all processes started?"
        with explaining(f"{variables}: the processes do not find each other", remedy):
            # in two steps, because a missing process is noticed in minutes, a late one in hours
            store, _, _ = next(dist.rendezvous("env://", timeout=RENDEZVOUS))
            dist.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=world,
                timeout=timedelta(hours=hours),
            )
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # only the first process prints
    return rank, world, device


def torchrun_ranks():
    """Returns rank, number of processes, and rank on this machine, as torchrun sets them.

    Raises ValueError if they make no sense.
    """
    rank = int(os.getenv("RANK", 0))
    world = int(os.getenv("WORLD_SIZE", 1))
    local_rank = int(os.getenv("LOCAL_RANK", 0))
    one_is_missing = ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ)
    if one_is_missing or local_rank < 0 or not 0 <= rank < world:
        raise ValueError("RANK must be below WORLD_SIZE, and both must be set")
    return rank, world, local_rank


def barrier():
    """Waits until every process is here: an all-reduce ends only when all have joined it."""
    any_process(False)


def any_process(flag):
    """Returns whether `flag` is true in any process. All processes must call it."""
    if not dist.is_initialized():
        return bool(flag)
    flags = torch.tensor(float(bool(flag)))  # on the CPU, so that no GPU waits
    dist.all_reduce(flags)
    return flags.item() > 0


def require_same_step(step):
    """Raises UserError if the processes would start at different steps: their disks differ."""
    if not dist.is_initialized():
        return
    lowest = torch.tensor(step)
    highest = torch.tensor(step)
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    if lowest != highest:
        raise UserError(
            f"the processes would start at steps {lowest} to {highest}:"
            " all nodes need the same --out"
        )


# ---- reading ahead, and stopping between two steps


def until_stopped(batches, log):
    """Yields batches until any process gets a signal, or cannot fetch its data or write its log.

    The processes agree on this before every step. So all of them stop after the same one, and the
    state can be saved. log.failure keeps the exception, and log.finish raises it. The log's clock
    starts here, so that an interval includes the time of fetching its first batch.
    """
    while True:
        if log.interval_clock is None:
            log.interval_clock = time.perf_counter()
        try:
            batch = next(batches)
        except Exception as error:
            log.failure = error
        if any_process(log.failure or SIGNALS):
            return
        yield batch


# Ctrl-C, a scheduler's end, a lost terminal, and the warning that Slurm sends before the end
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SIGNALS = []  # the signals received so far


def catch_signals():
    """From now on, signals are only noted in SIGNALS, so that the run can save before it ends.

    A second Ctrl-C ends a program of one process at once.
    """
    for signum in ENDING:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(signum, note_signal)


def note_signal(signum, _):
    if SIGNALS and signum == signal.SIGINT and "RANK" not in os.environ:
        raise KeyboardInterrupt
    SIGNALS.append(signum)
    with contextlib.suppress(OSError):  # the terminal may be gone; print is not safe here
        os.write(2, b"\nfinishing this step, then saving\n")


def read_ahead(dataset, workers, **options):
    """Yields the batches of a DataLoader, whose `workers` processes read ahead.

    A worker that dies raises UserError here, within five seconds. Workers ignore signals, because
    the last step still needs their data. They are killed when the caller stops or the program ends:
    Python would only send them SIGTERM, and wait.
    """
    others = multiprocessing.active_children()
    loader = DataLoader(dataset, num_workers=workers, worker_init_fn=shield_worker, **options)
    batches = iter(loader)  # starts the workers
    processes = [child for child in multiprocessing.active_children() if child not in others]
    atexit.register(kill, processes)
    # PyTorch's handler would raise anywhere in the program when a worker dies
    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:  # a worker that dies may cause any of these
        for process in processes:
            process.join(0.1)  # one that is just dying has no exitcode yet
        if not any(process.exitcode for process in processes):
            raise
        raise UserError(
            f"a loader process died ({first_sentence(error)}); try fewer --workers"
        ) from None
    finally:
        kill(processes)


def shield_worker(_):
    """Makes a loader process ignore the signals that end a run."""
    for signum in ENDING:
        signal.signal(signum, signal.SIG_IGN)


def kill(processes):
    for process in processes:
        process.kill()


# ---- what a run needs: flags that fit, memory, compiled blocks


def check_flags(args, world, num_images):
    """Raises UserError if the batch cannot be divided or filled, or if STD is not above 0."""
    pieces = world * (args.micro_batch or 1)  # every process gets whole micro-batches
    if args.batch_size % pieces:
        raise UserError(
            f"--batch-size {args.batch_size}: not a multiple of {pieces} (processes x micro-batch)"
        )
    if args.batch_size > num_images:
        raise UserError(f"--batch-size {args.batch_size}: {args.data} has {num_images} images")
    if args.time_normal and args.time_normal[1] <= 0:
        raise UserError("--time-normal: the second number, STD, must be above 0")


def check_memory(config, images, args):
    """Raises UserError if this device has too little memory to train on `images` at once."""
    visible = 1 - getattr(args, "mask_ratio", 0)  # what SD-DiT's student sees
    gradients_stay = images < args.batch_size  # those of other micro-batches or processes
    needed = dit.training_memory(
        config, images, args.precision, args.compile, visible, gradients_stay
    )
    if torch.cuda.is_available():
        memory = torch.cuda.mem_get_info()[1]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"{images} images at once need {needed / 1e9:.0f} GB, there are {memory / 1e9:.0f} GB:"
            " take a smaller --micro-batch or --model"
        )


def compile_blocks(module):
    """Compiles every transformer block. Raises UserError if there is no C++ compiler."""
    if not shutil.which(os.getenv("CXX", "c++")):
        raise UserError("--compile needs a C++ compiler: install g++, or pass --no-compile")
    torch._dynamo.config.optimize_ddp = False  # it would cut the model into dozens of graphs
    for block in module.modules():
        if isinstance(block, dit.DiTBlock):
            block.compile(dynamic=False)  # one graph per number of tokens is faster


# ---- command lines, and how a program ends


@contextlib.contextmanager
def program(script, args):
    """A context for the work of a whole program: it turns what a user can repair into one line.

    These are a UserError, an OSError about a path that the user gave, a lack of memory, and Ctrl-C.
    Other exceptions keep their traceback.
    """
    name = Path(script).name
    stdout = Stream(sys.stdout)
    stderr = Stream(sys.stderr)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            yield
        except UserError as error:
            sys.exit(f"{name}: {error}")
        except OSError as error:
            if not is_given(error.filename, args):
                raise
            sys.exit(f"{name}: {error.filename}: {error.strerror}")
        except (RuntimeError, MemoryError) as error:
            if not re.search("(out of|enough|allocate) memory|MemoryError", repr(error)):
                raise
            flag = "--micro-batch" if "micro_batch" in args else "--batch-size"
            sys.exit(f"{name}: out of memory; lower {flag} ({first_sentence(error)})")
        except KeyboardInterrupt:
            sys.exit(f"{name}: interrupted; run the same command again to go on")


def is_given(path, args):
    """Returns whether a path is an argument, or above one, or begins like one (out.npz.partial)."""
    if not isinstance(path, str):
        return False
    path = os.path.abspath(path)
    for value in vars(args).values():
        given = os.path.abspath(str(value))
        if path.startswith(given) or given.startswith(path):
            return True
    return False


class Stream:
    """stdout or stderr for a run that must not end when its reader goes away (`| head -1`)."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: the shell closed it, as by `2>&-`
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()  # at once, so that no later flush can fail
        except OSError:  # discard all further output, and what is still in the buffer
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())


class Parser(argparse.ArgumentParser):
    """An argparse parser that keeps the docstring's layout, shows defaults, fails in one line."""

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            silent = action.default is None or action.default is False
            if silent or "default" in action.help:
                return action.help
            return super()._get_help_string(action)

    def __init__(self, script, doc):
        super().__init__(prog=Path(script).name, description=doc, formatter_class=self.Formatter)
        self.register("action", "onoff", argparse.BooleanOptionalAction)  # --flag and --no-flag

    def parse_known_args(self, argv=None, namespace=None):
        """First refuses empty values, which come from shell variables that are not set."""
        words = sys.argv[1:] if argv is None else argv
        flag = "argument"
        for word in words:
            is_flag = word.startswith("--")
            if is_flag:
                flag = word
            if not word.strip() or (is_flag and word.endswith("=")):
                self.error(f"{flag}: the value is empty; is a variable not set?")
        return super().parse_known_args(argv, namespace)

    def error(self, message):
        raise SystemExit(f"{self.prog}: {message}")


def number(kind, low=-math.inf, high=math.inf, above=-math.inf, below=math.inf):
    """An argparse type: a finite int or float, low <= value <= high and above < value < below."""
    limits = {"at least": low, "at most": high, "above": above, "below": below}
    phrases = [f"{word} {limit}" for word, limit in limits.items() if math.isfinite(limit)]
    expected = " and ".join(phrases) or "finite"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            noun = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {noun}") from None
        if not (low <= value <= high and above < value < below):  # inf and nan fail, too
            raise argparse.ArgumentTypeError(f"{text[:40]} must be {expected}")
        return value

    return parse


def model_name(text):
    """An argparse type: SIZE/PATCH, such as XL/2."""
    try:
        dit.parse_model(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(error) from None
    return text


# argparse types
at_least_1 = number(int, 1)
positive = number(float, above=0)
fraction = number(float, 0, below=1)
seed_number = number(int, 0, 2**32 - 1)  # NumPy's seeds have words of 32 bits
