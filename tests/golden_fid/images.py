"""Test images and network weights, reproducible to the bit: seeded uniform draws and element-wise + - * /
only.

The golden values beside this file were computed from them with the unmodified evaluator.py of
openai/guided-diffusion (TensorFlow 2.21): metrics64.json from the first 300 images of both kinds, rows64.npz
from the first 8.
"""

import zlib
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent


def triangle(t):
    """Triangle wave in [-1, 1] with period 1."""
    return 4.0 * np.abs(t - np.floor(t) - 0.5) - 1.0


def image(rs, kind, h, w):
    """One image of a colour gradient, a few shapes, waves and noise: uint8 [h, w, 3]. The order of draws is
    fixed."""
    y = ((np.arange(h, dtype=np.float64) + 0.5) / h)[:, None]
    x = ((np.arange(w, dtype=np.float64) + 0.5) / w)[None, :]

    def draw(low=0.0, high=1.0):
        return low + (high - low) * rs.random_sample()

    def colour(low, high):
        return np.array([draw(low, high) for _ in range(3)])

    low, high = (20.0, 235.0) if kind == "ref" else (50.0, 245.0)
    a, b, c = (colour(low, high) for _ in range(3))
    gx, gy = draw(-1, 1), draw(-1, 1)
    gradient = np.abs(gx) * (x if gx > 0 else 1 - x) + np.abs(gy) * (y if gy > 0 else 1 - y)
    gradient = (gradient / (np.abs(gx) + np.abs(gy) + 1e-3))[..., None]
    img = a * (1 - gradient) + b * gradient
    for _ in range(rs.randint(2, 7) if kind == "ref" else rs.randint(1, 5)):
        shape = rs.randint(0, 4)
        cx, cy, rx, ry = draw(0.05, 0.95), draw(0.05, 0.95), draw(0.06, 0.40), draw(0.06, 0.40)
        fill = colour(0.0, 255.0) if kind == "ref" else colour(20.0, 255.0)
        distance = ((x - cx) / rx) * ((x - cx) / rx) + ((y - cy) / ry) * ((y - cy) / ry)
        if shape == 0:
            mask = np.maximum(0.0, 1.0 - distance)
            mask = mask * mask
        elif shape == 1:
            mask = np.minimum(1.0, np.maximum(0.0, (1.0 - distance) * 12.0))
        elif shape == 2:
            mask = ((np.abs(x - cx) < rx) & (np.abs(y - cy) < ry)).astype(np.float64)
        else:
            fx, fy = draw(-9, 9), draw(-9, 9)
            mask = (distance < 1.0) * (0.5 + 0.5 * triangle(fx * x + fy * y + draw()))
        mask = (mask * draw(0.5, 1.0))[..., None]
        img = img * (1 - mask) + fill * mask
    amplitude = draw(0.0, 22.0) if kind == "ref" else draw(0.0, 14.0)
    waves = amplitude * triangle(draw(1, 6) * x + draw(-4, 4) * y)
    waves = waves * triangle(draw(-4, 4) * x + draw(1, 6) * y)
    img = img + waves[..., None] * (0.4 + 0.6 * (c / 255.0))
    k = rs.randint(0, 13) if kind == "ref" else rs.randint(0, 7)
    if k:
        img = img + rs.randint(-k, k + 1, size=(h, w, 1)) + rs.randint(-2, 3, size=(h, w, 3))
    return np.clip(np.floor(img + 0.5), 0, 255).astype(np.uint8)


def images64(kind, n):
    """The first n 64 x 64 images of kind "ref" or "sample": uint8 [n, 64, 64, 3]."""
    rs = np.random.RandomState({"ref": 101, "sample": 202}[kind])
    return np.stack([image(rs, kind, 64, 64) for _ in range(n)])


def weights(shapes):
    """Random network weights as {name: float32 array}, for the shapes in a state dict.

    BN statistics come from bn_stats.npz (calibrated once, so that activations neither vanish nor grow).
    Convolution outputs have a variance near 0.1, where the BN epsilon matters; fc.bias is large, and IS must
    ignore it.
    """

    def uniform(name, shape, low, high):
        rs = np.random.RandomState(zlib.crc32(f"adm-golden-v1/{name}".encode()) & 0x7FFFFFFF)
        return (low + (high - low) * rs.random_sample(shape)).astype(np.float32)

    state = dict(np.load(FOLDER / "bn_stats.npz"))
    for prefix in [name.removesuffix(".bn.running_mean") for name in state if name.endswith("mean")]:
        shape = tuple(shapes[f"{prefix}.conv.weight"])
        bound = np.sqrt(3.0 * 2.0 * 0.12 / np.prod(shape[1:]))
        state[f"{prefix}.conv.weight"] = uniform(f"{prefix}.conv.weight", shape, -bound, bound)
        state[f"{prefix}.bn.weight"] = uniform(f"{prefix}.bn.weight", shape[:1], 0.7, 1.3)
        state[f"{prefix}.bn.bias"] = uniform(f"{prefix}.bn.bias", shape[:1], -0.35, 0.45)
    half = uniform("fc.weight", (1008, 1024), -0.275, 0.275)
    # rows add up to 0: no class saturates
    state["fc.weight"] = np.stack([half, -half], axis=2).reshape(1008, 2048)
    state["fc.bias"] = uniform("fc.bias", (1008,), -2.0, 2.0)
    return state
