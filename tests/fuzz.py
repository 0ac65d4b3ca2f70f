"""Byte flips in every kind of file that the programs read: refused in one line, harmless, or not detectable.

    python tests/fuzz.py [FLIPS] [SEED]     2600 flips by default; exit code 1 for a crash or hang

A flip changes 1 to 4 neighbouring bytes of one file. A child process then runs the program that reads it:
    refused     it ends with one line,
    harmless    it gives what it gives for the whole file,
    undetected  it gives something else of the right form: the byte was a pixel, a weight, a free text,
    crash       it ends with anything else, or its process dies, or
    hang        it takes more than LIMIT seconds.
"""

import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)

import dit  # noqa: E402
import extract_features  # noqa: E402
import fid  # noqa: E402
import sample  # noqa: E402

LIMIT = 20  # seconds a reader may take
MAINS = {"extract": extract_features.main, "sample": sample.main, "fid": fid.main}
EXTRACT = "--data src.npz --out new --image-size 8 --patch 2 --vae none --encoder hog --workers 0"
EXTRACT += " --batch-size 4"
TRAIN = "--data cache --out new --model nano/2 --steps 2 --batch-size 4 --lr 1e-3 --ema 0.9 --log-every 1"
TRAIN += " --save-every 2 --sample-every 0 --workers 0"
SAMPLE = "--num 4 --steps 1 --out new.npz"
FID = "--features pixels --device cpu"
COMMANDS = {"extract": EXTRACT, "sample": SAMPLE, "fid": FID}
RUNS = {  # the folder of a run of each method
    "repa": "run",
    "diversedit": "rundiv",
    "sddit": "runsd",
    "meanflow": "runmean",
    "dit": "rundit",
}
for name in RUNS:
    MAINS[name] = importlib.import_module(f"train_{name}").main
    COMMANDS[name] = TRAIN


def call(command):
    """Run `PROGRAM FLAG...` in this process and folder, with the flags above before those of `command`.

    Raises whatever leaves main(): SystemExit with a line where the program ends in one.
    """
    program, *flags = shlex.split(command)
    return MAINS[program]([*COMMANDS[program].split(), *flags])


# ---- small whole files of every kind


def make_files(home):
    """Fill the folder: sources, caches, a run of each method, an official file, sets of samples."""
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8), np.arange(12) % 3
    here = os.getcwd()
    os.chdir(home)
    try:
        np.savez("src.npz", arr_0=pixels, arr_1=labels)
        np.savez("ref.npz", arr_0=pixels, arr_1=labels)
        np.savez("samples.npz", arr_0=pixels[::-1], arr_1=labels, protocol=np.array(json.dumps({"steps": 1})))
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            folder = Path("src", "abc"[label])
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(image).resize((24, 16))
            image.save(folder / f"{i:02d}{('.png', '.jpg')[i % 2]}")
        with zipfile.ZipFile("src.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(Path("src").glob("*/*")):
                archive.write(path, path.relative_to("src"))
        shutil.copytree("src", "listed")
        names = sorted(path.relative_to("listed").as_posix() for path in Path("listed").glob("*/*"))
        pairs = [[name, i % 3] for i, name in enumerate(names)]
        Path("listed/dataset.json").write_text(json.dumps({"labels": pairs}))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            call("extract --out cache --flip")
            call("extract --out plain --encoder none")
            for name, out in RUNS.items():
                call(f"{name} --out {out}")
        torch.manual_seed(0)
        options = dict(input_size=8, patch_size=2, num_classes=3, hidden_size=32, depth=2, num_heads=2)
        state = dit.DiT(**options).state_dict()
        torch.save({"ema": state}, "official.pt")  # of REPA or of SiT: it does not tell
        torch.save({"ema": state | {"projectors.0.0.weight": torch.zeros(3, 3)}}, "repa.pt")
    finally:
        os.chdir(here)


@contextlib.contextmanager
def small_nano():
    """A nano of 2 blocks of width 32: its checkpoint is small enough for a flip to hit more than weights."""
    whole, dit.SIZES["nano"] = dit.SIZES["nano"], (2, 32, 2)
    try:
        yield
    finally:
        dit.SIZES["nano"] = whole


# ---- kinds of files: path, first and last byte of the region, command, files that hold what it gives


def data_at(path):
    """Where the tensors of a .safetensors file begin: behind its length and its JSON header."""
    return 8 + int.from_bytes(Path(path).read_bytes()[:8], "little")


TRAINED = ("run/last.pt", "run/log.jsonl", "run/run.json")
RESUME = "repa --out run --steps 3"
EVALUATE = "fid ref.npz samples.npz --json new.json"
SHARD = "00000000.safetensors"  # the first file of a cache, or of a set of sampled images
PART = f"new.npz.partial/{SHARD}"
SAMPLE_ON = "sample run --batch-size 2"
CACHE = (f"new/{SHARD}",)
KINDS = {  # name: (path, "head" and "data" of a .safetensors, or "all", command, results)
    "cache meta.json": ("cache/meta.json", "all", "repa", ("new/last.pt",)),
    "cache shard, header": (f"cache/{SHARD}", "head", "repa", ("new/last.pt",)),
    "cache shard, data": (f"cache/{SHARD}", "data", "repa", ("new/last.pt",)),
    "cache shard, header, control": (f"cache/{SHARD}", "head", "sddit --control cosine", ("new/last.pt",)),
    "started cache meta.json": ("cache/meta.json", "all", "extract --out cache --flip", (f"cache/{SHARD}",)),
    "started cache shard, header": (
        f"cache/{SHARD}",
        "head",
        "extract --out cache --flip",
        (f"cache/{SHARD}",),
    ),
    "source .npz": ("src.npz", "all", "extract", CACHE),
    "source .zip": ("src.zip", "all", "extract --data src.zip", CACHE),
    "source dataset.json": ("listed/dataset.json", "all", "extract --data listed", CACHE),
    "PNG": ("src/a/00.png", "all", "extract --data src", CACHE),
    "JPEG": ("src/a/03.jpg", "all", "extract --data src", CACHE),
    "checkpoint, resumed": ("run/last.pt", "all", RESUME, TRAINED),
    "checkpoint, last 20 kB, resumed": ("run/last.pt", "tail", RESUME, TRAINED),
    "checkpoint, last 20 kB, sampled": ("run/last.pt", "tail", "sample run", ("new.npz",)),
    "checkpoint, pickle, sampled": ("run/last.pt", "first", "sample run", ("new.npz",)),
    "checkpoint, --init": ("run/last.pt", "all", "repa --init run", ("new/last.pt",)),
    "official checkpoint": ("repa.pt", "all", "repa --init repa.pt", ("new/last.pt",)),
    "run log.jsonl": ("run/log.jsonl", "all", RESUME, TRAINED),
    "run run.json": ("run/run.json", "all", RESUME, TRAINED),
    "sampling protocol.json": ("new.npz.partial/protocol.json", "all", SAMPLE_ON, ("new.npz",)),
    "sampling part, header": (PART, "head", SAMPLE_ON, ("new.npz",)),
    "sampling part, data": (PART, "data", SAMPLE_ON, ("new.npz",)),
    "fid reference .npz": ("ref.npz", "all", EVALUATE, ("new.json",)),
    "fid samples .npz": ("samples.npz", "all", EVALUATE, ("new.json",)),
    "fid PNG": ("src/a/00.png", "all", "fid src src --image-size 8 --json new.json", ("new.json",)),
}


def region(path, part):
    """First byte of a part of a file, and the one behind its last."""
    size = os.path.getsize(path)
    if part in ("head", "data"):
        return (0, data_at(path)) if part == "head" else (data_at(path), size)
    return {"all": (0, size), "tail": (max(0, size - 20_000), size), "first": (0, min(size, 12_000))}[part]


def start_sampling():
    """Leave new.npz.partial behind with the first of its two parts, as a kill does."""
    decode = sample.decode

    def killed(latents, autoencoder, data, indices):
        if indices[0]:
            sys.exit("killed")
        return decode(latents, autoencoder, data, indices)

    sample.decode = killed
    try:
        with contextlib.suppress(SystemExit):
            call(SAMPLE_ON)
    finally:
        sample.decode = decode


def outcome(path):
    """What a result file says, without times and paths."""
    if path.endswith(".pt"):
        content = torch.load(path, weights_only=True)
        weights = [value.numpy().tobytes() for key in ("model", "ema") for value in content[key].values()]
        return [content[key] for key in ("step", "config", "data")], weights
    if path.endswith(".npz"):
        with np.load(path) as content:
            return [content["arr_0"].tobytes(), content["arr_1"].tobytes()]
    if path == "new.json":
        return {key: value for key, value in json.loads(Path(path).read_text()).items() if key != "protocol"}
    if path.endswith("log.jsonl"):
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        return [{k: v for k, v in row.items() if k not in ("img_per_s", "tflops")} for row in rows]
    if path.endswith("run.json"):
        return json.loads(Path(path).read_text())
    return Path(path).read_bytes()


def run_command(command, results):
    """("done", outcomes), ("refused", line) or ("crash", what)."""
    try:
        call(command)
    except SystemExit as error:
        refused = isinstance(error.code, str) and "\n" not in error.code and len(error.code) < 600
        return ("refused" if refused else "crash", str(error)[:600])
    except BaseException as error:
        return "crash", f"{type(error).__name__}: {str(error)[:200]}"
    return "done", repr([outcome(path) for path in results])


def in_child(work):
    """The verdict of work() in a child process, a digest of what it gives, and the beginning of that."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for standard in (0, 1, 2):
                os.dup2(null, standard)
            signal.alarm(LIMIT)  # its default action ends the process, whatever it does
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * os.sysconf("SC_PAGE_SIZE") + 4 * 2**30
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            with warnings.catch_warnings(action="ignore"):
                answer = work()
            with open(write, "w") as file:
                digest = hashlib.sha256(answer[1].encode()).hexdigest()
                json.dump([answer[0], digest, answer[1][:300]], file)
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as file:
        answer = file.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return ("hang", "", "") if number == signal.SIGALRM else ("crash", "", f"signal {number}")
    return json.loads(answer) if answer else ("crash", "", "no answer")


def fuzz(flips, seed=0, scratch=None):
    """`flips` flips, evenly over the kinds -> Counter of (kind, verdict), a line for each crash or hang."""
    counts, reports, tqdm.monitor_interval = Counter(), [], 0  # a second thread could hold a lock in a fork
    scratch = scratch or ("/dev/shm" if os.path.isdir("/dev/shm") else None)
    here, folder = os.getcwd(), tempfile.mkdtemp(dir=scratch)
    whole = Path(folder, "whole")
    try:
        whole.mkdir()
        make_files(whole)
        for out in RUNS.values():
            if out != "run":
                shutil.rmtree(whole / out)
        os.chdir(whole)
        start_sampling()
        os.rename("new.npz.partial", "partial")
        for number, (kind, (path, part, command, results)) in enumerate(KINDS.items()):
            rng = random.Random(f"{seed} {kind}")

            def attempt(flip, path=path, part=part, command=command, results=results):
                os.chdir(whole)
                home = Path(folder, "home")
                shutil.rmtree(home, ignore_errors=True)
                ignored = shutil.ignore_patterns("run" if "run" not in command + path else "", "partial")
                shutil.copytree(whole, home, ignore=ignored)
                if path.startswith("new.npz.partial"):
                    shutil.copytree(whole / "partial", home / "new.npz.partial")
                os.chdir(home)
                if flip:
                    start, stop = region(path, part)
                    data = bytearray(Path(path).read_bytes())
                    at = flip.randrange(start, stop)
                    for i in range(at, min(stop, at + flip.choice((1, 1, 1, 2, 4)))):
                        data[i] ^= flip.randrange(1, 256) if flip.random() < 0.5 else 1 << flip.randrange(8)
                    Path(path).write_bytes(data)
                return in_child(lambda: run_command(command, results))

            right = attempt(None)
            assert right[0] == "done", (kind, right)
            for _ in range(flips // len(KINDS) + (number < flips % len(KINDS))):
                verdict, digest, words = attempt(rng)
                if verdict == "done":
                    verdict = "harmless" if digest == right[1] else "undetected"
                counts[kind, verdict] += 1
                if verdict in ("crash", "hang"):
                    reports.append(f"{kind}: {verdict}: {words}")
    finally:
        os.chdir(here)
        shutil.rmtree(folder, ignore_errors=True)
    return counts, reports


VERDICTS = ("refused", "harmless", "undetected", "crash", "hang")


def main():
    flips, seed = (int(text) for text in (*sys.argv[1:], *("2600", "0")[len(sys.argv) - 1 :]))
    torch.set_num_threads(1)
    with small_nano():
        counts, reports = fuzz(flips, seed)
    print(f"{'':34}", *(f"{verdict:>10}" for verdict in VERDICTS))
    for kind in KINDS:
        print(f"{kind:34}", *(f"{counts[kind, verdict]:10}" for verdict in VERDICTS))
    print(f"{'all':34}", *(f"{sum(counts[kind, verdict] for kind in KINDS):10}" for verdict in VERDICTS))
    for line, times in Counter(reports).most_common():
        print(f"{times} x {line}")
    sys.exit(bool(reports))


if __name__ == "__main__":
    main()
