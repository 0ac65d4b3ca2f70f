"""The methods on the digits: every row of digits.md, five seeds, four snapshots of each run.

    python tests/results/digits.py --jobs 2                  the whole table, hours; to resume, run it again
    python tests/results/digits.py --rows repa --seeds 2     one run and its four lines of figures
    python tests/results/digits.py --report                  digits.md and the pictures (needs matplotlib)

Each row of ROWS is a command that can be pasted; this script adds --seed, --out and --keep-every 250. Every
snapshot draws 500 samples, fifty per class, in 25 steps and with the seed of the run: so the rows of a seed
share all their noise. MeanFlow's are drawn in one evaluation, and those of its last snapshot in other numbers
as well. The blocks of the last snapshot are probed (probe.py). Two judges: `fid.py --features pixels` against
the 1,797 real digits, and the class of the nearest real digit in pixels, right for 98.8 % of the real
digits, each left out in turn. A run uses one thread, so that its bits do not depend on what else the machine
does. iREPA's script is the fork of fork-irepa.md. Runs that are in digits.json are not run again unless they
are named.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import re
import shlex
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import t as student_t

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import probe

import extract_features
import fid
import files
import sample

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
REAL = ROOT / "tests" / "digits.npz"
RESULTS = HERE / "digits.json"
LOGS = HERE / "digits-logs.zip"
STEPS = (250, 500, 750, 1000)
SAMPLES = 500
SEEDS = (2, 3, 4, 5, 6)  # --digits was tuned on seeds 0 and 1
# row: (what it is, the row it is compared with, command)
ROWS = {
    "plain": ("plain SiT", None, "train_repa.py --digits --repa-weight 0"),
    "logit-normal": (
        "SiT, logit-normal t",
        "plain",
        "train_repa.py --digits --repa-weight 0 --time-normal 0 1",
    ),
    "repa": ("REPA", "plain", "train_repa.py --digits"),
    "irepa": ("iREPA", "repa", "train_irepa.py --digits"),
    "div-loss": ("DiverseDiT, loss alone", "plain", "train_diversedit.py --digits --no-long-residuals"),
    "div-residuals": ("DiverseDiT, residuals alone", "plain", "train_diversedit.py --digits --div-terms"),
    "diversedit": ("DiverseDiT", "plain", "train_diversedit.py --digits"),
    "diversedit-repa": ("DiverseDiT + REPA", "repa", "train_diversedit.py --digits --repa-weight 2"),
    "dit": ("DiT", None, "train_dit.py --digits"),
    "dit-repa": ("DiT + REPA", "dit", "train_dit.py --digits --repa-weight 2"),
    "edm": ("plain EDM", None, "train_sddit.py --digits --sd-weight 0 --mask-ratio 0"),
    "edm-mask": ("EDM, masked student", "edm", "train_sddit.py --digits --sd-weight 0"),
    "sddit": ("SD-DiT", "edm-mask", "train_sddit.py --digits"),
    "meanflow": ("MeanFlow, one evaluation", "plain", "train_meanflow.py --digits"),
    "meanflow-model": (
        "MeanFlow, model's tangent",
        "meanflow",
        "train_meanflow.py --digits --tangent model",
    ),
    "meanflow-div": ("MeanFlow + DiverseDiT", "meanflow", "train_meanflow.py --digits --diverse"),
}
# how the snapshots of a run are sampled: MeanFlow's in one evaluation, and the last one in others, too
FLOW = "--steps 25"
MEAN = "--sampler mean --steps 1"
MORE = {"2": "--sampler mean --steps 2", "4": "--sampler mean --steps 4"}
MORE |= {"Euler 1": "--sampler ode --steps 1", "Euler 25": "--sampler ode --steps 25"}
PROBE = "--t 0.1 --batch-size 64 --lr 1e-2"


def nearest_class(images, real, labels):
    """Class of the nearest real digit, of images [N, 8, 8, 3] among real ones [M, 8, 8, 3]: [N]."""
    a, b = (torch.from_numpy(x).float().flatten(1) for x in (images, real))
    return labels[torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").argmin(1).numpy()]


def draw(checkpoint, flags, seed, path):
    if not path.exists():
        flags = f"{flags} --seed {seed} --num-images {SAMPLES} --labels balanced --out {path}"
        sample.main([str(checkpoint), *flags.split()])


def evaluate(folder, seed, mean_velocity=False):
    """Samples of the four snapshots of a run, and their figures: a list of dicts."""
    paths = [folder / f"samples-{step}.npz" for step in STEPS]
    for step, path in zip(STEPS, paths, strict=True):
        draw(folder / f"{step:07d}.pt", MEAN if mean_velocity else FLOW, seed, path)
    more = {}
    if mean_velocity:
        more = {name: folder / f"more-{name.replace(' ', '-')}.npz" for name in MORE}
        for name, path in more.items():
            draw(folder / f"{STEPS[-1]:07d}.pt", MORE[name], seed, path)
    every = [*map(str, paths), *map(str, more.values())]
    fid.main([str(REAL), *every, "--features", "pixels", "--json", str(folder / "fid.json")])
    report = json.loads((folder / "fid.json").read_text())
    found = [metrics["fid"] for metrics in report["sets"][len(paths) :]]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    real, rows = np.load(REAL), []
    for step, path, metrics in zip(STEPS, paths, report["sets"], strict=False):
        drawn = np.load(path)
        right = nearest_class(drawn["arr_0"], real["arr_0"], real["arr_1"]) == drawn["arr_1"]
        row = next(row for row in log if row["step"] == step)
        loss = next(row[name] for name in ("loss_fm", "loss_edm", "loss_noise") if name in row)
        seconds = 64 / max(row["img_per_s"] for row in log)  # the fastest 50 steps
        judged = {
            "step": step,
            "accuracy": right.mean(),
            "fd": metrics["fid"],
            "mind": metrics["mind"],
            "precision": metrics["precision"],
            "recall": metrics["recall"],
            "loss": loss,
            "seconds_per_step": seconds,
        }
        rows.append(judged)
    return rows, report["floor"], dict(zip(more, found, strict=True))


def probe_blocks(folder, seed):
    """The share of held-out digits that a linear layer classifies from each block of the last snapshot."""
    flags = f"--data {folder.parent / 'digits'} --json {folder / 'probe.json'} --seed {seed} {PROBE}"
    probe.main([str(folder / f"{STEPS[-1]:07d}.pt"), *flags.split()])
    return json.loads((folder / "probe.json").read_text())["test"]


def write_irepa(folder):
    """Writes train_irepa.py: train_repa.py with the diff of fork-irepa.md."""
    text = re.sub(r"(>>>|<<<) repa", r"\1 irepa", (ROOT / "train_repa.py").read_text())
    diff = re.search(r"```diff\n(.*?)```", (HERE / "fork-irepa.md").read_text(), re.S)[1]
    for hunk in re.split(r"^@@.*@@.*\n", diff, flags=re.M)[1:]:
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] != "+")
        assert text.count(before) == 1
        text = text.replace(before, "".join(line[1:] for line in lines if line[0] != "-"))
    (folder / "train_irepa.py").write_text(text)


def run(job):
    """Train and judge one row with one seed, where that is not done yet: writes result.json."""
    row, seed, folder = job
    torch.set_num_threads(1)
    if (folder / "result.json").exists():
        return job
    script, *flags = shlex.split(ROWS[row][2])
    if script == "train_irepa.py":
        sys.path.insert(0, str(folder.parent))
    train = importlib.import_module(script.removesuffix(".py"))
    flags += ["--seed", str(seed), "--out", str(folder), "--data", str(folder.parent / "digits")]
    flags += ["--keep-every", str(STEPS[0]), "--sample-every", "0"]
    with open(f"{folder}.txt", "a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            train.main(flags)
            rows, floor, more = evaluate(folder, seed, script == "train_meanflow.py")
            probed = probe_blocks(folder, seed)
        except SystemExit as error:  # which would end a process of the pool in silence
            raise RuntimeError(str(error)) from error
    partial = folder / "result.partial"
    result = {"row": row, "seed": seed, "floor": floor["fid"], "points": rows, "probe": probed}
    if more:
        result["evaluations"] = {"1": rows[-1]["fd"], **more}
    partial.write_text(json.dumps(result, indent=1))
    partial.rename(folder / "result.json")
    return job


def figures(results, row, step, key):
    """The values of one key, by seed in ascending order: [seeds]."""
    runs = sorted((result["seed"], result["points"]) for result in results if result["row"] == row)
    return np.array([point[key] for _, points in runs for point in points if point["step"] == step])


def paired(ours, baseline):
    """Mean difference of pairs, and the half-width of its 95 % interval (Student's t)."""
    difference = ours - baseline
    error = difference.std(ddof=1) / len(difference) ** 0.5
    return difference.mean(), student_t.ppf(0.975, len(difference) - 1) * error


def markdown(head, lines):
    """A table of cells."""
    return [" | ".join(["", *cells, ""]).strip() for cells in (head, ["---"] * len(head), *lines)]


def table(results):
    """Mean and standard deviation over the seeds, then mean differences of pairs, bold where 0 is outside."""
    rows = [row for row in ROWS if any(result["row"] == row for result in results)]
    seeds = ", ".join(map(str, sorted({result["seed"] for result in results})))
    floor, steps = results[0]["floor"], [f"step {step}" for step in STEPS]
    text = [f"Seeds {seeds}. FD of {SAMPLES} real digits against the other real ones: {floor:.3f}."]
    for title, key, scale, form in (("accuracy, %", "accuracy", 100, ".1f"), ("FD", "fd", 1, ".3f")):
        lines, changes = [], []
        for row in rows:
            name, baseline, _ = ROWS[row]
            values = [scale * figures(results, row, step, key) for step in STEPS]
            lines.append([name, *(f"{x.mean():{form}} ± {x.std(ddof=1):{form}}" for x in values)])
            if baseline in rows:
                others = [scale * figures(results, baseline, step, key) for step in STEPS]
                pairs = [paired(*each) for each in zip(values, others, strict=True)]
                cells = [(f"{mean:+{form}} ± {half:{form}}", abs(mean) > half) for mean, half in pairs]
                cells = [f"**{cell}**" if sure else cell for cell, sure in cells]
                changes.append([f"{name} - {ROWS[baseline][0]}", *cells])
        text += ["", *markdown([title, *steps], lines)]
        text += ["", *markdown([f"change of {title}", *steps], changes)]
    lines, keys = [], ("mind", "precision", "recall", "loss")
    for row in rows:
        values = [figures(results, row, STEPS[-1], key) for key in keys]
        seconds = figures(results, row, STEPS[-1], "seconds_per_step").min()
        cells = [f"{x.mean():.3f} ± {x.std(ddof=1):.3f}" for x in values]
        lines.append([ROWS[row][0], *cells, f"{seconds:.2f}", f"`{ROWS[row][2]}`"])
    head = [f"step {STEPS[-1]}", "MIND", "precision", "recall", "denoising loss", "s per step", "command"]
    return "\n".join([*text, "", *markdown(head, lines), *evaluations(results), *probes(results)])


def evaluations(results):
    """The FD of one network by the number of its evaluations: a table of the rows of MeanFlow."""
    names = ["1", *MORE]
    lines = []
    for row, (name, _, _) in ROWS.items():
        runs = [result for result in results if result["row"] == row]
        runs = [result["evaluations"] for result in runs if "evaluations" in result]
        values = [np.array([run[name] for run in runs]) for name in names]
        if runs:
            lines.append([name, *(f"{x.mean():.3f} ± {x.std(ddof=1):.3f}" for x in values)])
    if not lines:
        return []
    return ["", *markdown([f"FD by evaluations, step {STEPS[-1]}", *names], lines)]


def probes(results):
    """What a linear layer reads from the blocks: a table of all rows."""
    lines = []
    for row, (name, _, _) in ROWS.items():
        found = [result["probe"] for result in results if result["row"] == row]
        values = 100 * np.array(found)                                   # [seeds, blocks]
        cells = zip(values.mean(0), values.std(0, ddof=1), strict=True)
        lines.append([name, *(f"{mean:.1f} ± {spread:.1f}" for mean, spread in cells)])
    blocks = [f"block {b}" for b in range(1, len(lines[0]))]
    return ["", *markdown([f"linear probe, %, step {STEPS[-1]}", *blocks], lines)]


def summary(results, row):
    """The README's cells: accuracy at the second step, FD at the second and at the last."""
    shown = ("accuracy", 100, ".0f", 1), ("fd", 1, ".2f", 1), ("fd", 1, ".2f", -1)
    values = [(scale * figures(results, row, STEPS[i], key), form) for key, scale, form, i in shown]
    return [f"{x.mean():{form}} ± {x.std(ddof=1):{form}}" for x, form in values]


def family(command):
    """The panel of a row in the picture of the curves."""
    if command.startswith("train_sddit"):
        return "EDM"
    if command.startswith(("train_dit.py", "train_meanflow")):
        return "DiT and MeanFlow"
    return "flow matching"


def draw_curves(results, path):
    """Accuracy and FD over steps, mean and standard deviation, in panels by family."""
    import matplotlib.pyplot as plt  # not among the requirements

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    families = ["flow matching", "DiT and MeanFlow", "EDM"]
    figure, axes = plt.subplots(3, 2, figsize=(9, 9), sharex=True, layout="constrained")
    for i, (row, (name, _, command)) in enumerate(ROWS.items()):
        line, colour = axes[families.index(family(command))], plt.get_cmap("tab20").colors[i]
        for axis, key, scale in zip(line, ("accuracy", "fd"), (100, 1), strict=True):
            values = [scale * figures(results, row, step, key) for step in STEPS]
            mean, spread = np.mean(values, axis=1), np.std(values, axis=1, ddof=1)
            axis.plot(STEPS, mean, label=name, color=colour, lw=1.5)
            axis.fill_between(STEPS, mean - spread, mean + spread, color=colour, alpha=0.15, lw=0)
    for (left, right), title in zip(axes, families, strict=True):
        left.set_ylabel("samples of the class asked for, %")
        right.set_ylabel("FD, pixels")
        right.set_yscale("log")
        right.axhline(results[0]["floor"], color="grey", lw=0.8, ls=":")
        right.text(STEPS[0], results[0]["floor"], "real digits", color="grey", va="bottom")
        left.set_title(title, loc="left")
        left.legend(frameon=False, loc="lower right")
    for axis in axes[-1]:
        axis.set_xlabel("step")
        axis.set_xticks(STEPS)
    figure.savefig(path, dpi=110)


def draw_samples(folder, seed, path, scale=6):
    """Five digits of the same noises: a line for each method, a block for each step but the third."""
    steps, font = [*STEPS[:2], STEPS[-1]], ImageFont.load_default(15)
    side, left, top = 8 * scale + 2, 190, 24
    block = 5 * side + 14
    sheet = Image.new("RGB", (left + len(steps) * block, top + len(ROWS) * (side + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, step in enumerate(steps):
        pen.text((left + i * block, 2), f"step {step}", fill="black", font=font)
    for j, (row, (name, _, _)) in enumerate(ROWS.items()):
        y = top + j * (side + 4)
        pen.text((2, y + side // 2), name, fill="black", font=font, anchor="lm")
        for i, step in enumerate(steps):
            images = np.load(folder / f"{row}-{seed}" / f"samples-{step}.npz")["arr_0"][:10:2]
            for k, image in enumerate(images.repeat(scale, axis=1).repeat(scale, axis=2)):
                sheet.paste(Image.fromarray(image), (left + i * block + k * side, y))
    sheet.save(path, optimize=True)


ONE_STEP = {  # what the second picture shows: row, flags of sample.py, text
    "plain 1": ("plain", "--sampler ode --steps 1", "SiT, 1 evaluation"),
    "mean 1": ("meanflow", "--sampler mean --steps 1", "MeanFlow, 1 evaluation"),
    "plain 25": ("plain", "--sampler ode --steps 25", "SiT, 25 evaluations"),
    "mean 25": ("meanflow", "--sampler ode --steps 25", "MeanFlow, 25 evaluations"),
}


def draw_one_step(folder, path, scale=6):
    """Ten noises, and what one and 25 evaluations of plain flow matching and of MeanFlow make of them."""
    side, left = 8 * scale + 2, 190
    sheet = Image.new("RGB", (left + 10 * side, len(ONE_STEP) * (side + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for j, (name, (row, flags, text)) in enumerate(ONE_STEP.items()):
        run = folder / f"{row}-{SEEDS[0]}"
        drawn = run / f"one-step-{name.replace(' ', '-')}.npz"
        if not drawn.exists():
            flags = f"{flags} --num 10 --labels balanced --out {drawn}"
            sample.main([str(run / f"{STEPS[-1]:07d}.pt"), *flags.split()])
        y = j * (side + 4)
        pen.text((2, y + side // 2), text, fill="black", font=ImageFont.load_default(15), anchor="lm")
        images = np.load(drawn)["arr_0"]
        for k, image in enumerate(images.repeat(scale, axis=1).repeat(scale, axis=2)):
            sheet.paste(Image.fromarray(image), (left + k * side, y))
    sheet.save(path, optimize=True)


def write_tables(text):
    """Puts the tables between their marks in digits.md."""
    head, _, rest = (HERE / "digits.md").read_text().partition("<!-- tables -->")
    tail = rest.partition("<!-- end of tables -->")[2]
    text = f"{head}<!-- tables -->\n{text}\n<!-- end of tables -->{tail}"
    (HERE / "digits.md").write_text(text)


def committed():
    """The results in digits.json: {(row, seed): result}."""
    return {(result["row"], result["seed"]): result for result in json.loads(RESULTS.read_text())}


def complete(results):
    """The results, a list, of the seeds with all rows done, because pairs need them: a list."""
    done = {(result["row"], result["seed"]): result for result in results}
    seeds = [seed for seed in SEEDS if all((row, seed) in done for row in ROWS)]
    return [done[row, seed] for row in ROWS for seed in seeds]


def report(folder):
    """Adds the runs that are done to digits.json and digits-logs.zip, and writes the tables of digits.md.

    The pictures of samples are drawn if the runs of the first seed are in the folder.
    """
    results = committed()
    with zipfile.ZipFile(LOGS) as archive:
        logs = {name: archive.read(name) for name in archive.namelist()}
    for path in folder.glob("*/result.json"):
        result = json.loads(path.read_text())
        row, seed = result["row"], result["seed"]
        results[row, seed] = result
        logs[f"{row}-{seed}.jsonl"] = (path.parent / "log.jsonl").read_bytes()
    shown = complete(results.values())
    seeds = {result["seed"] for result in shown}
    if len(seeds) < 2:
        raise SystemExit(f"digits.py: {len(seeds)} seeds with all rows done; run at least 2")

    RESULTS.write_text(json.dumps([results[name] for name in sorted(results)], indent=1) + "\n")
    with zipfile.ZipFile(LOGS, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(logs):
            info = zipfile.ZipInfo(name)  # without a date
            archive.writestr(info, logs[name], zipfile.ZIP_DEFLATED)
    write_tables(table(shown))
    draw_curves(shown, HERE / "digits-curves.png")
    if all((folder / f"{row}-{SEEDS[0]}" / f"{STEPS[-1]:07d}.pt").exists() for row in ROWS):
        draw_samples(folder, SEEDS[0], HERE / "digits-samples.png")
        draw_one_step(folder, HERE.parent / "one-step.png")


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="default: all that are not in digits.json")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 2 to 6")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "table", help="folder of the runs")
    parser.add_argument("--report", action="store_true", help="run nothing; write digits.md and the pictures")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.report:
        return report(args.out)
    with files.program(__file__, args):
        extract_features.extract_digits(args.out / "digits", rank=0, world=1, device="cpu")
    write_irepa(args.out)
    done = {} if args.rows or args.seeds else committed()
    jobs = []
    for seed in args.seeds or SEEDS:
        for row in args.rows or ROWS:
            if (row, seed) not in done:
                jobs.append((row, seed, args.out / f"{row}-{seed}"))
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool:
        for row, seed, folder in pool.imap_unordered(run, jobs):
            for point in json.loads((folder / "result.json").read_text())["points"]:
                print(row, seed, *(f"{key} {value:.4g}" for key, value in point.items()), flush=True)


if __name__ == "__main__":
    main()
