"""Every command of papers.md parses, and sets exactly what its row says.

A row's table states model, steps and batch, or run, w and interval. EXPECTED states what else its commands
change. Compared is all that differs from the defaults of a script, so a missing flag fails as well as a wrong
or a superfluous one.
"""

import json
import re
import shlex
from collections import defaultdict

import pytest
import timm
import torch
from conftest import ROOT, SCRIPTS

import dit
import extract_features
import fid
import sample
import train_dit
import train_diversedit
import train_repa
from tests import bench

PAGE = (ROOT / "tests" / "results" / "papers.md").read_text()

# A line for each command: its row, its script, and the settings that the table does not state. SHORT explains
# the words in capitals.
EXPECTED = """
cache-256             extract_features  data=imagenet/train out=features/imagenet256
cache-512             extract_features  data=imagenet/train out=features/imagenet512 image_size=512
cache-flip            extract_features  data=imagenet/train out=features/flip encoder=none flip=true

repa-b                train_repa
repa-l                train_repa
repa-xl               train_repa
repa-xl               sample            checkpoint=runs/repa-xl/0400000.pt sampler=sde steps=250 vae=EMA
repa-xl               fid               paths=["VIRTUAL_imagenet256_labeled.npz","repa-xl.npz"]
repa-xl-4m            train_repa        out=runs/repa-xl keep_every=500000
repa-xl-150k          sample            sampler=sde steps=250 vae=EMA
repa-xl-1m            sample            sampler=sde steps=250 vae=EMA
repa-cfg-1m           sample            sampler=sde steps=250 vae=EMA
repa-cfg-1.35         sample            sampler=sde steps=250 vae=EMA
repa-cfg-1.8-0.7      sample            sampler=sde steps=250 vae=EMA
repa-cfg-1.3          sample            sampler=sde steps=250 vae=EMA
repa-cfg-1.325        sample            sampler=sde steps=250 vae=EMA
repa-cfg-1.375        sample            sampler=sde steps=250 vae=EMA
repa-cfg-1.4          sample            sampler=sde steps=250 vae=EMA
repa-cfg-2-0.8        sample            sampler=sde steps=250 vae=EMA
repa-cfg-2-0.75       sample            sampler=sde steps=250 vae=EMA
repa-cfg-2-0.7        sample            sampler=sde steps=250 vae=EMA
repa-cfg-2-0.65       sample            sampler=sde steps=250 vae=EMA
repa-cfg-2-0.6        sample            sampler=sde steps=250 vae=EMA
repa-cfg-1.9-0.7      sample            sampler=sde steps=250 vae=EMA
repa-lambda-0.25      train_repa        repa_weight=0.25
repa-lambda-0.75      train_repa        repa_weight=0.75
repa-lambda-1         train_repa        repa_weight=1
repa-l-dinov2l        extract_features  data=imagenet/train out=features/dinov2l encoder=DINOV2_L
repa-l-dinov2l        train_repa        data=features/dinov2l
repa-l-dinov2g        extract_features  data=imagenet/train out=features/dinov2g encoder=DINOV2_G
repa-l-dinov2g        train_repa        data=features/dinov2g
repa-l-clip           extract_features  data=imagenet/train out=features/clip encoder=CLIP_L
repa-l-clip           train_repa        data=features/clip
repa-l-ijepa          extract_features  data=imagenet/train out=features/ijepa encoder=IJEPA_H
repa-l-ijepa          train_repa        data=features/ijepa
repa-l-dino           extract_features  data=imagenet/train out=features/dino encoder=DINO_B
repa-l-dino           train_repa        data=features/dino
repa-l-mae            extract_features  data=imagenet/train out=features/mae encoder=MAE_L
repa-l-mae            train_repa        data=features/mae
repa-l-block-6        train_repa        data=features/dinov2l repa_depth=[6]
repa-l-block-10       train_repa        data=features/dinov2l repa_depth=[10]
repa-l-block-12       train_repa        data=features/dinov2l repa_depth=[12]
repa-l-block-14       train_repa        data=features/dinov2l repa_depth=[14]
repa-l-block-16       train_repa        data=features/dinov2l repa_depth=[16]
repa-xl-512-1m        train_repa        out=runs/repa-xl-512 data=features/imagenet512
repa-cfg-512-400k     sample            sampler=sde steps=250 vae=EMA
repa-cfg-512-500k     sample            sampler=sde steps=250 vae=EMA
repa-cfg-512-1m       sample            sampler=sde steps=250 vae=EMA

sit-b                 train_repa        repa_weight=0
sit-l                 train_repa        repa_weight=0
sit-xl                train_repa        repa_weight=0
sit-b-flip            train_repa        repa_weight=0 data=features/flip clip=0 precision=fp32
sit-l-flip            train_repa        repa_weight=0 data=features/flip clip=0 precision=fp32
sit-xl-flip           train_repa        repa_weight=0 data=features/flip clip=0 precision=fp32
sit-xl-flip-7m        train_repa        repa_weight=0 data=features/flip clip=0 precision=fp32 \
                                        out=runs/sit-xl-flip keep_every=500000
sit-cfg               sample            sampler=heun steps=125 vae=EMA

div-b                 train_diversedit
div-b                 sample            checkpoint=runs/div-b/0400000.pt sampler=sde steps=250
div-b                 sample            checkpoint=runs/div-b/0400000.pt sampler=sde steps=250 cfg=1.35 \
                                        out=div-b-cfg.npz
div-b                 fid               paths=["VIRTUAL_imagenet256_labeled.npz","div-b.npz","div-b-cfg.npz"]
div-l                 train_diversedit
div-xl                train_diversedit
repa-b5               train_repa        repa_depth=[5]
div-repa-b            train_diversedit  repa_weight=0.5
div-repa-l            train_diversedit  repa_weight=0.5
div-repa-xl           train_diversedit  repa_weight=0.5
repa-b8               train_repa        repa_depth=[8]
div-repa-b8           train_diversedit  repa_weight=0.5 repa_depth=[8]
repa-l5               train_repa        repa_depth=[5]
div-repa-l5           train_diversedit  repa_weight=0.5 repa_depth=[5]
repa-xl5              train_repa        repa_depth=[5]
div-repa-xl5          train_diversedit  repa_weight=0.5 repa_depth=[5]
div-repa-xl-1m        train_diversedit  repa_weight=0.5 out=runs/div-repa-xl
div-repa-xl-512-1m    train_diversedit  repa_weight=0.5 out=runs/div-repa-xl-512 data=features/imagenet512
div-cfg-400k          sample            sampler=sde steps=250
div-cfg-400k-code     sample            sampler=sde steps=250
div-cfg-1m            sample            sampler=sde steps=250
div-cfg-1m-code       sample            sampler=sde steps=250
div-cfg-512-400k      sample            sampler=sde steps=250
div-cfg-512-400k      fid               paths=["VIRTUAL_imagenet512.npz","div-cfg-512-400k.npz"]
div-cfg-512-400k-code sample            sampler=sde steps=250
div-cfg-512-1m        sample            sampler=sde steps=250
div-cfg-512-1m-code   sample            sampler=sde steps=250
sit-b-512             train_repa        data=features/imagenet512 repa_weight=0
sit-l-512             train_repa        data=features/imagenet512 repa_weight=0
sit-xl-512            train_repa        data=features/imagenet512 repa_weight=0
div-b-512             train_diversedit  data=features/imagenet512
div-l-512             train_diversedit  data=features/imagenet512
div-xl-512            train_diversedit  data=features/imagenet512
repa-b-512            train_repa        data=features/imagenet512 repa_depth=[5]
repa-l-512            train_repa        data=features/imagenet512
repa-xl-512           train_repa        data=features/imagenet512
div-repa-b-512        train_diversedit  data=features/imagenet512 repa_weight=0.5
div-repa-l-512        train_diversedit  data=features/imagenet512 repa_weight=0.5
div-repa-xl-512       train_diversedit  data=features/imagenet512 repa_weight=0.5
div-b-lrc             train_diversedit  div_terms=[]
div-b-loss            train_diversedit  no_long_residuals=true
div-repa-b-lrc        train_diversedit  repa_weight=0.5 div_terms=[]
div-repa-b-loss       train_diversedit  repa_weight=0.5 no_long_residuals=true
div-b-orth            train_diversedit  div_terms=["orth"]
div-b-mi              train_diversedit  div_terms=["mi"]
div-b-disp            train_diversedit  div_terms=["disp"] div_gate=[-2,-1]
div-repa-b-orth       train_diversedit  repa_weight=0.5 div_terms=["orth"]
div-repa-b-mi         train_diversedit  repa_weight=0.5 div_terms=["mi"]
div-repa-b-disp       train_diversedit  repa_weight=0.5 div_terms=["disp"] div_gate=[-2,-1]
div-b-gate-0.2        train_diversedit  div_gate=[0.2,0.7]
div-b-gate-0.3        train_diversedit  div_gate=[0.3,0.9]
div-b-constant        train_diversedit  div_gate=[-2,-1]
div-l-5               train_diversedit  div_blocks=5
div-l-15              train_diversedit  div_blocks=15
div-l-20              train_diversedit  div_blocks=20
div-l-24              train_diversedit  div_blocks=24
a2-sit                train_repa        repa_weight=0 out=runs/sit-b
a2-dinov2-5           train_repa        repa_depth=[5] out=runs/repa-b5
a2-dinov2-8           train_repa        repa_depth=[8] out=runs/repa-b8
a2-dinov2-10          train_repa        repa_depth=[10]
a2-dinov2-2-5-8       train_repa        repa_depth=[2,5,8]
a2-dinov2-3-6-9       train_repa        repa_depth=[3,6,9]
a2-mae-5              train_repa        repa_depth=[5] data=features/mae
a2-mae-8              train_repa        repa_depth=[8] data=features/mae
a2-mae-10             train_repa        repa_depth=[10] data=features/mae
a2-both-5             extract_features  data=imagenet/train out=features/both encoder=BOTH
a2-both-5             train_repa        repa_depth=[5] data=features/both
a2-both-8             train_repa        repa_depth=[8] data=features/both
a2-both-10            train_repa        repa_depth=[10] data=features/both

sddit-s               train_sddit
sddit-b               train_sddit
sddit-xl              train_sddit
sddit-xl              sample            checkpoint=runs/sddit-xl/2400000.pt vae=EMA
sddit-xl              fid               paths=["VIRTUAL_imagenet256_labeled.npz","sddit-xl.npz"]
sddit-xl-3500k        train_sddit
sddit-xl-1024         train_sddit
sddit-xl-1100k        sample            vae=EMA
sddit-xl-1300k        sample            vae=EMA
sddit-xl-cfg          sample            vae=EMA
sddit-s-mask-0.5      train_sddit       mask_ratio=0.5
sddit-s-no-teacher    train_sddit       mask_ratio=0.5 sd_weight=0
sddit-s-mask-0        train_sddit       mask_ratio=0
sddit-s-mask-0.9      train_sddit       mask_ratio=0.9
sddit-s-noise-student train_sddit       mask_ratio=0.5 teacher_noise=student
sddit-s-noise-0.3     train_sddit       mask_ratio=0.5 teacher_noise=0.3
sddit-s-noise-0.5     train_sddit       mask_ratio=0.5 teacher_noise=0.5
sddit-speed           tests/bench       model=S/2 batch=[32] precision=fp32

cond-constant         extract_features  data=imagenet/train out=features/crops encoder=none flip=true crops=2
cond-constant         train_repa        repa_weight=0 control=constant data=features/crops
cond-cosine           train_repa        repa_weight=0 control=cosine data=features/crops
cond-cosine-2         train_repa        repa_weight=0 control=cosine data=features/crops control_alpha=2
cond-cosine-4         train_repa        repa_weight=0 control=cosine data=features/crops control_alpha=4
cond-cosine-8         train_repa        repa_weight=0 control=cosine data=features/crops control_alpha=8
cond-tokens           train_repa        repa_weight=0 control=cosine data=features/crops class_tokens=16
cond-512              extract_features  data=imagenet/train out=features/512 encoder=none image_size=512
cond-512              train_repa        repa_weight=0 control=cosine data=features/512 init=FIRST lr=5e-5 \
                                        warmup=1000
cond-512-extrapolated train_repa        repa_weight=0 control=cosine data=features/512 init=FIRST lr=5e-5 \
                                        warmup=1000 pos_base=32
cond-512-unshifted    train_repa        repa_weight=0 control=cosine data=features/512 init=FIRST lr=5e-5 \
                                        warmup=1000 time_shift=1
cond-512-scratch      train_repa        repa_weight=0 control=cosine data=features/512
cond-data             extract_features  data=imagenet22k out=features/imagenet22k encoder=none
cond-data             train_repa        repa_weight=0 control=cosine data=features/imagenet22k init=FIRST \
                                        lr=5e-5 warmup=1000
cond-beta2            train_repa        repa_weight=0 beta2=0.95

mf-b                  train_meanflow    omega=1 kappa=0.5 guide_interval=[0,1]
mf-m                  train_meanflow    omega=1 kappa=0.5 guide_interval=[0,1]
mf-l                  train_meanflow    guide_interval=[0,0.8]
mf-xl                 train_meanflow
mf-xl                 sample            checkpoint=runs/mf-xl/1200000.pt
mf-xl                 sample            checkpoint=runs/mf-xl/1200000.pt steps=2 out=mf-xl-2.npz
mf-xl                 fid               paths=["VIRTUAL_imagenet256_labeled.npz","mf-xl.npz","mf-xl-2.npz"]
mf-xl-plus            train_meanflow    omega=1 kappa=0.5 guide_interval=[0.3,0.8] keep_every=500000
mf-b4                 train_meanflow    omega=1 kappa=0
mf-b4-ratio-1         train_meanflow    omega=1 kappa=0 flow_ratio=1
mf-b4-ratio-0.5       train_meanflow    omega=1 kappa=0 flow_ratio=0.5
mf-b4-ratio-0         train_meanflow    omega=1 kappa=0 flow_ratio=0
mf-b4-normal-0.2-1    train_meanflow    omega=1 kappa=0 time_normal=[-0.2,1]
mf-b4-normal-0.2-1.2  train_meanflow    omega=1 kappa=0 time_normal=[-0.2,1.2]
mf-b4-normal-0.4-1.2  train_meanflow    omega=1 kappa=0 time_normal=[-0.4,1.2]
mf-b4-power-0         train_meanflow    omega=1 kappa=0 power=0
mf-b4-power-0.5       train_meanflow    omega=1 kappa=0 power=0.5
mf-b4-power-1.5       train_meanflow    omega=1 kappa=0 power=1.5
mf-b4-power-2         train_meanflow    omega=1 kappa=0 power=2
mf-b4-omega-1.5       train_meanflow    omega=1.5 kappa=0 guide_interval=[0,1]
mf-b4-omega-2         train_meanflow    omega=2 kappa=0 guide_interval=[0,1]
mf-b4-omega-3         train_meanflow    omega=3 kappa=0 guide_interval=[0,1]
mf-b4-omega-5         train_meanflow    omega=5 kappa=0 guide_interval=[0,1]
mf-b4-kappa-0.5       train_meanflow    omega=1 kappa=0.5 guide_interval=[0,1]
mf-b4-kappa-0.8       train_meanflow    omega=0.4 kappa=0.8 guide_interval=[0,1]
mf-b4-kappa-0.9       train_meanflow    omega=0.2 kappa=0.9 guide_interval=[0,1]
mf-b4-kappa-0.95      train_meanflow    omega=0.1 kappa=0.95 guide_interval=[0,1]
mf-b4-240             train_meanflow    omega=1 kappa=0.5 guide_interval=[0,1]
mf-b4-240-plain       train_meanflow    omega=1 kappa=0
imf-b                 train_meanflow    omega=1 kappa=0.5 guide_interval=[0,1] tangent=model
imf-b-plain           train_meanflow    omega=1 kappa=0 tangent=model
imf-xl                train_meanflow    tangent=model
mf-b-400k             train_meanflow    omega=1 kappa=0.5 guide_interval=[0,1]
mf-l-400k             train_meanflow    omega=1 kappa=0.5 guide_interval=[0,1]
mf-xl-400k            train_meanflow    omega=1 kappa=0.5 guide_interval=[0,1]
mf-div-b              train_meanflow    omega=1 kappa=0.5 guide_interval=[0,1] diverse=true
mf-div-l              train_meanflow    omega=1 kappa=0.5 guide_interval=[0,1] diverse=true
mf-div-xl             train_meanflow    omega=1 kappa=0.5 guide_interval=[0,1] diverse=true
mf-div-xl-240         train_meanflow    diverse=true
dit-l                 train_dit         data=features/flip clip=0 precision=fp32
dit-xl                train_dit         data=features/flip clip=0 precision=fp32
dit-xl-7m             train_dit         data=features/flip clip=0 precision=fp32 out=runs/dit-xl \
                                        keep_every=500000
dit-repa-l            train_dit         repa_weight=0.5
dit-repa-xl           train_dit         repa_weight=0.5
dit-repa-xl           sample            checkpoint=runs/dit-repa-xl/0400000.pt vae=EMA
dit-repa-xl           fid               paths=["VIRTUAL_imagenet256_labeled.npz","dit-repa-xl.npz"]
dit-repa-xl-850k      train_dit         repa_weight=0.5 out=runs/dit-repa-xl
dit-cfg               sample            vae=EMA

official-repa         sample            sampler=sde steps=250
official-repa-cfg     sample            sampler=sde steps=250
official-sit          sample            sampler=sde steps=250
official-dit          sample
official-dit-cfg      sample
official-dit-512      sample
"""
SHORT = {
    "EMA": "stabilityai/sd-vae-ft-ema",
    "DINOV2_L": "vit_large_patch14_dinov2.lvd142m",
    "DINOV2_G": "vit_giant_patch14_dinov2.lvd142m",
    "CLIP_L": "vit_large_patch14_clip_quickgelu_224.openai",
    "IJEPA_H": "vit_huge_patch14_gap_224.in1k_ijepa",
    "DINO_B": "vit_base_patch16_224.dino",
    "MAE_L": "vit_large_patch16_224.mae",
    "BOTH": "vit_base_patch14_dinov2.lvd142m,vit_large_patch16_224.mae",
    "FIRST": "runs/cond-cosine/last.pt",
}
PROGRAMS = {  # with the shortest command of each, whose settings are its defaults
    "extract_features": (extract_features, "--data D --out O"),
    **{f"train_{method}": (script, "") for method, script in SCRIPTS.items()},
    "sample": (sample, "C --out O.npz"),
    "fid": (fid, "A B"),
    "tests/bench": (bench, "train"),
}
TRAINING = {
    "model": "XL/2",
    "steps": 400_000,
    "batch_size": 256,
    "lr": 1e-4,
    "warmup": 0,
    "beta2": 0.999,
    "clip": 1,
    "ema": 0.9999,
    "precision": "bf16",
    "data": "features/imagenet256",
    "init": None,
    "control": "none",
    "class_tokens": 0,
    "label_drop": 0.1,
    "time_normal": None,
}
DEFAULTS = {  # what the rows take for granted
    "extract_features": {
        "image_size": 256,
        "patch": 2,
        "encoder": "vit_base_patch14_dinov2.lvd142m",
        "vae": "stabilityai/sd-vae-ft-mse",
        "flip": False,
        "crops": 0,
    },
    "train_repa": {**TRAINING, "repa_weight": 0.5, "repa_depth": None},
    "train_diversedit": {
        **TRAINING,
        "repa_weight": 0,
        "repa_depth": None,
        "div_terms": ["orth", "mi", "disp"],
        "div_gate": [0.1, 0.5],
        "div_blocks": None,
        "no_long_residuals": False,
    },
    "train_sddit": {
        **TRAINING,
        "steps": 2_400_000,
        "precision": "fp32",
        "time_normal": [-1.2, 1.2],
        "mask_ratio": 0.2,
        "sd_weight": 1,
        "teacher_noise": 0.002,
        "tau_s": 0.1,
        "tau_t": [0.09, 0.099],
        "teacher_momentum": [0.996, 0.999],
    },
    "train_meanflow": {
        **TRAINING,
        "steps": 1_200_000,
        "precision": "fp32",
        "beta2": 0.95,
        "clip": 0,
        "time_normal": [-0.4, 1],
        "flow_ratio": 0.75,
        "omega": 0.2,
        "kappa": 0.92,
        "guide_interval": [0, 0.75],
        "power": 1,
        "tangent": "data",
        "diverse": False,
    },
    "train_dit": {**TRAINING, "repa_weight": 0, "repa_depth": None},
    "sample": {
        "cfg": 1,
        "interval": None,
        "sampler": None,
        "steps": None,
        "labels": "random",
        "weights": "ema",
        "vae": None,
    },
}


def read_tables(page):
    """Every row that has a name, as {row: {column: cell}}. The same name in two tables must agree."""
    rows = {}
    header = None
    for line in page.splitlines():
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if header is None:
            header = cells
        elif name := re.fullmatch(r"`([a-z0-9.-]+)`", cells[0]):
            stated = dict(zip(header, cells, strict=True))
            known = rows.setdefault(name[1], {})
            for column in ("model", "steps", "batch", "run", "w", "interval"):
                if column in stated:
                    assert known.setdefault(column, stated[column]) == stated[column], f"{name[1]}: {column}"
    return rows


def read_commands(page):
    """The commands of each row. In a block, a line `# ROW` or `# ROW: remark` stands above them."""
    commands = defaultdict(list)
    row = None
    for line in re.sub(r" *\\\n *", " ", page).splitlines():
        if name := re.match(r"    # ([a-z0-9.-]+)", line):
            row = name[1]
        elif line.startswith("    "):
            commands[row].append(line.strip())
        elif line:
            row = None
    return dict(commands)


def split(command):
    """The program of a command, and its arguments."""
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert words[:place] in (["python"], ["torchrun", "--nproc_per_node=8"])
    return words[place].removesuffix(".py"), words[place + 1 :]


def settings(script, arguments):
    """All settings, in JSON's types."""
    module, _ = PROGRAMS[script]
    return json.loads(json.dumps(vars(module.parse_args(arguments)), default=str))


def without_defaults(script, values):
    _, shortest = PROGRAMS[script]
    defaults = settings(script, shortest.split())
    return {name: value for name, value in values.items() if value != defaults[name]}


def read_expected(text):
    """The scripts of each row, with the settings: {row: [(script, {setting: value})]}."""
    expected = defaultdict(list)
    for line in filter(None, text.splitlines()):
        row, script, *pairs = line.split()
        values = {}
        for name, value in (pair.split("=", 1) for pair in pairs):
            try:
                values[name] = json.loads(value)
            except json.JSONDecodeError:
                values[name] = SHORT.get(value, value)
        expected[row].append((script, values))
    return dict(expected)


def count(text):
    """400K -> 400000, 4M -> 4000000, 256 -> 256"""
    unit = {"K": 10**3, "M": 10**6}.get(text[-1], 1)
    return int(text.rstrip("KM")) * unit


def stated(row, script, tables):
    """What the tables say of a row's command: everything that differs from the default."""
    columns = tables[row]
    values = {}
    if script.startswith("train_"):
        values = {"out": f"runs/{row}", "model": columns["model"]}
        values |= {"steps": count(columns["steps"]), "batch_size": count(columns["batch"])}
    if script == "sample":
        values = {"out": f"{row}.npz", "num": 50_000}
        if "run" in columns:
            values["checkpoint"] = columns["run"].strip("`")
        if columns.get("w", "-") != "-":
            values["cfg"] = float(columns["w"])
        if columns.get("interval", "-") != "-":
            values["interval"] = [float(edge) for edge in columns["interval"].split(" to ")]
    return values


TABLES = read_tables(PAGE)
COMMANDS = read_commands(PAGE)
ROWS = read_expected(EXPECTED)
ALL = [split(command) for commands in COMMANDS.values() for command in commands]


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch):
    """The commands are for GPUs, where bf16 is the default of most programs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "CUDA", True)


def wanted(row, script, values):
    return without_defaults(script, stated(row, script, TABLES) | values)


def test_every_row_has_its_commands():
    assert set(TABLES) == set(COMMANDS) == set(ROWS)
    assert len(ALL) > 120


@pytest.mark.parametrize("row", ROWS)
def test_commands_set_what_the_row_says(row):
    for command, (script, values) in zip(COMMANDS[row], ROWS[row], strict=True):
        program, arguments = split(command)
        assert program == script
        assert without_defaults(script, settings(script, arguments)) == wanted(row, script, values)


@pytest.mark.parametrize("row", ROWS)
def test_no_flag_can_be_left_out(row):
    """Without one of its flags, a command is refused or no longer sets what the row says."""
    for command, (script, values) in zip(COMMANDS[row], ROWS[row], strict=True):
        _, arguments = split(command)
        starts = [i for i, word in enumerate(arguments) if word.startswith("--")]
        ends = [*starts[1:], len(arguments)]
        for start, end in zip(starts, ends, strict=False):
            try:
                found = settings(script, arguments[:start] + arguments[end:])
            except SystemExit:
                continue
            assert without_defaults(script, found) != wanted(row, script, values), arguments[start:end]


@pytest.mark.parametrize("script", DEFAULTS)
def test_defaults(script):
    _, shortest = PROGRAMS[script]
    found = settings(script, shortest.split())
    assert {name: found[name] for name in DEFAULTS[script]} == DEFAULTS[script]


@pytest.mark.parametrize("sizes, repa, diversedit", [("S B", 4, 5), ("M L XL", 8, 8)])
def test_blocks_that_the_rows_name(sizes, repa, diversedit):
    """REPA#5 and table 6 of REPA; table A1 of DiverseDiT."""
    meta = {"target_widths": [768]}
    for size in sizes.split():
        flags = ["--model", f"{size}/2", "--repa-weight", "0.5"]
        with torch.device("meta"):
            model = dit.build({"arch": "DiT", **dit.parse_model(f"{size}/2")})
            for script, block in ((train_repa, repa), (train_diversedit, diversedit), (train_dit, repa)):
                objective = script.Objective(model, script.parse_args(flags), meta)
                assert objective.aligned_blocks == [block]


def test_what_a_command_reads_another_one_writes():
    caches = {}
    written = set()
    for script, arguments in ALL:
        args = settings(script, arguments)
        if script == "extract_features":
            caches[args["out"]] = args["encoder"].split(",")
        if script == "sample":
            written.add(args["out"])
        if script.startswith("train_"):
            every = args["keep_every"]
            snapshots = [f"{step:07d}" for step in range(every, args["steps"] + 1, every)]
            written |= {f"{args['out']}/{name}.pt" for name in [*snapshots, "last"]}

    for script, arguments in ALL:
        args = settings(script, arguments)
        if script == "sample":
            assert args["checkpoint"] in written or args["checkpoint"].startswith("weights/")
        if script == "fid":
            assert set(args["paths"][1:]) <= written
        if script.startswith("train_"):
            assert args["data"] in caches
            assert args["init"] in {None, *written}
            assert not args.get("repa_weight") or caches[args["data"]] != ["none"]
    encoders = {name for names in caches.values() for name in names} - {"none"}
    assert encoders <= set(timm.list_pretrained())


def test_commands_with_one_folder_are_one_run():
    """A run that is continued may change how long it is and what it keeps, and nothing else."""
    runs = defaultdict(list)
    for script, arguments in ALL:
        if script.startswith("train_"):
            args = settings(script, arguments)
            del args["steps"], args["keep_every"]
            runs[args["out"]].append((script, args))
    assert all(part == parts[0] for parts in runs.values() for part in parts)
    # SD-DiT's schedule depends on the number of steps, so none of its runs is continued
    assert all(len(parts) == 1 for parts in runs.values() if parts[0][0] == "train_sddit")
