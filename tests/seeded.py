"""Weights and inputs that any machine makes again bit by bit: uniform draws seeded by a name, in float64."""

import zlib

import numpy as np
import torch


def uniform(name, shape, low=-1.0, high=1.0):
    state = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
    return torch.from_numpy((low + (high - low) * state.random_sample(tuple(shape))).astype(np.float32))


def fill(state):
    """A state dict of these names and shapes: matrices of variance 1.5 / fan-in, scales in [0.5, 1.5], small
    biases."""
    filled = {}
    for name, value in state.items():
        if value.ndim > 1:
            bound = (4.5 / value[0].numel()) ** 0.5
            filled[name] = uniform(name, value.shape, -bound, bound)
        elif name.endswith("weight"):
            filled[name] = uniform(name, value.shape, 0.5, 1.5)
        else:
            filled[name] = uniform(name, value.shape, -0.2, 0.2)
    return filled
