"""The diffusion transformer: embedders, block, and every architecture of this repository.

    DiT         adaLN-Zero transformer of DiT (arXiv 2212.09748), as in SiT (2401.08740) and REPA (2410.06940)
    DiverseDiT  DiT with long residual connections (2603.04239)
    SDDiT       masked encoder, decoder and EDM preconditioning of SD-DiT (2403.17004)

All three have the control conditioning and the transfer to a higher resolution of arXiv 2411.03177. Nothing
here reads a file, knows about processes or holds a loss, so `sample.py` rebuilds any model from the `config`
of its checkpoint with `build(config)`. State dicts are those of the official DiT / SiT / REPA checkpoints.

Shapes in the right margin: N batch, C, H, W latent channels, height, width, P patch size, T = (H/P)(W/P)
tokens, D width (hidden_size), K class tokens.
"""

import math
import os
import shutil
from collections import deque
from functools import partial

import numpy as np
import torch
import torch.nn as nn
from timm.layers import Attention, Mlp, PatchEmbed
from torch.utils.flop_counter import FlopCounterMode

# name: (blocks, width, heads); S to XL are the sizes of DiT, nano is ours, for laptops and tests
SIZES = dict(nano=(6, 128, 4), S=(12, 384, 6), B=(12, 768, 12), L=(24, 1024, 16), XL=(28, 1152, 16))


def sincos_positions(side, width, base=None):
    """Fixed 2-D sin-cos position table of a `side` x `side` grid of tokens: float64 array [side^2, width].

    The first half of the channels encodes the column, the second half the row; each half is [sin | cos] in
    blocks. base: position i becomes i base / side. With the grid of a model trained at a lower resolution,
    the image keeps its extent (interpolation, arXiv 2411.03177); with `side`, positions continue beyond it
    (extrapolation). paper: "adjusts the sampling grid" / here: without half-pixel shift.
    """
    omega = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    angles = np.outer(np.arange(side) * (base or side) / side, omega)             # (side, D/4)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)               # (side, D/2)
    column, row = np.tile(axis, (side, 1)), np.repeat(axis, side, axis=0)         # (side^2, D/2) each
    return np.concatenate([column, row], axis=1)


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def shift_time(t, s):
    """Time t' at which an image s times as wide is as noisy as this one at t: SNR(t') = SNR(t) / s^2.

    The law of arXiv 2411.03177 (figure A1) in the closed form of SD3 (2403.03206). Its inverse: s -> 1 / s.
    """
    return s * t / (1 + (s - 1) * t)


class Sinusoids(nn.Module):
    """Scalars [...] -> [cos | sin] of angles with periods from 2 pi to 2 pi 10000: [..., 2 frequencies]."""

    def __init__(self, frequencies=128):
        super().__init__()
        omega = torch.exp(-math.log(10000.0) * torch.arange(frequencies, dtype=torch.float32) / frequencies)
        self.register_buffer("omega", omega, persistent=False)

    def forward(self, values):
        angles = values.float().unsqueeze(-1) * self.omega
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """Scalar t -> 256 sinusoids -> two-layer MLP.

    Flow matching feeds t in [0, 1], not times 1000: unintended in SiT and REPA (SiT#24, REPA#40), but their
    checkpoints need it. Always fp32, also under autocast.
    """

    def __init__(self, hidden_size, frequencies=128):
        super().__init__()
        first, second = nn.Linear(2 * frequencies, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.mlp, self.sinusoids = nn.Sequential(first, nn.SiLU(), second), Sinusoids(frequencies)

    def forward(self, t):                                                         # (N,)
        with torch.autocast("cuda" if t.is_cuda else "cpu", enabled=False):
            return self.mlp(self.sinusoids(t))                                    # (N, D)


class ControlEmbedder(nn.Module):
    """Size, crop and flip of the training image -> an addition to the condition c (arXiv 2411.03177).

        keep (gamma(u) low(h0, w0) + high(top / h0, left / w0, h / h0, w / w0, flip))
        gamma(u) = (1 - cos(pi (1 - u)^alpha)) / 2,   u = 1 noise, u = 0 data           mode "cosine"
        gamma = 1, the micro-conditioning of SDXL (2307.01952)                          mode "constant"

    Sharpness is decided late in sampling, so the weight of the size is 0 at pure noise. Crop and flip move
    the layout, which is decided early, so their weight is 1. A row of zeros means no control: keep = 0.
    paper: curves from 0 at u = 1 to 1 at u = 0 with a parameter alpha (figure 3) / here: a power-cosine that
    fits them. Its formula, and the weight 1 and scale 1000 of crop and flip, are reconstructed, not read.
    """

    def __init__(self, hidden_size, mode="cosine", alpha=1.0, frequencies=128):
        super().__init__()
        if mode not in ("constant", "cosine") or not 0 < alpha < math.inf:
            raise ValueError(f"control {mode!r}, alpha {alpha}: expected constant or cosine, alpha above 0")
        self.mode, self.alpha, self.sinusoids = mode, alpha, Sinusoids(frequencies)

        def mlp(scalars):
            first = nn.Linear(scalars * 2 * frequencies, hidden_size)
            return nn.Sequential(first, nn.SiLU(), nn.Linear(hidden_size, hidden_size))

        self.low, self.high = mlp(2), mlp(5)

    def gamma(self, u):                                                           # (N,)
        if self.mode == "constant":
            return torch.ones_like(u)
        return (1 - torch.cos(torch.pi * (1 - u).clamp(0, 1) ** self.alpha)) / 2

    def forward(self, control, u):
        """control [N, 7]: h0, w0, top, left, h, w in original pixels, flip 0 or 1; u [N] -> fp32 [N, D]."""
        with torch.autocast("cuda" if u.is_cuda else "cpu", enabled=False):
            h0, w0, top, left, h, w, flip = control.float().unbind(1)             # (N,) each
            height, width = h0.clamp(min=1), w0.clamp(min=1)                      # no 0 / 0 in a row of zeros
            size = torch.stack([h0, w0], dim=1).clamp(max=4096)
            layout = 1000 * torch.stack([top / height, left / width, h / height, w / width, flip], dim=1)
            low = self.low(self.sinusoids(size).flatten(1))                       # (N, D)
            high = self.high(self.sinusoids(layout).flatten(1))
            return (h0 > 0).unsqueeze(1) * (self.gamma(u.float()).unsqueeze(1) * low + high)


class LabelEmbedder(nn.Module):
    """Class label -> row of a table; the last row is the null class of classifier-free guidance."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, y, drop=None):
        """drop [N] bool: labels that become null. Training draws it with probability `dropout_prob`."""
        if drop is not None and self.dropout_prob > 0:
            y = torch.where(drop, self.num_classes, y)
        return self.embed(y)                                                      # (N, D)

    def embed(self, y):
        return self.embedding_table(y)


class ZeroNullLabelEmbedder(LabelEmbedder):
    """The null class is the zero vector, without a row in the table (MaskDiT, SD-DiT)."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__(num_classes, hidden_size, dropout_prob)
        self.embedding_table = nn.Embedding(num_classes, hidden_size)

    def embed(self, y):
        known = (y < self.num_classes).unsqueeze(1)
        return self.embedding_table(y.clamp(max=self.num_classes - 1)) * known


class DiTBlock(nn.Module):
    """adaLN-Zero block: shift, scale and gate of both branches come from c, whose width is cond_size."""

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0, qk_norm=False, cond_size=None):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        gelu = partial(nn.GELU, approximate="tanh")
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=gelu)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_size or hidden_size, 6 * hidden_size))

    def forward(self, x, c):                                                      # (N, T, D), (N, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x


class FinalLayer(nn.Module):
    """Modulated LayerNorm and a linear map of every token to `out_size` values."""

    def __init__(self, hidden_size, out_size, cond_size=None):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, out_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_size or hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))            # (N, T, out_size)


class DiT(nn.Module):
    """Diffusion transformer with adaLN-Zero blocks. Keyword arguments are the official ones.

    Predicts as many channels as it reads, as in REPA. (DiT and SiT add variance channels.)
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, num_classes=1000, class_dropout_prob=0.1, qk_norm=False,
                 control="none", control_alpha=1.0, class_tokens=0, pos_base=None, time_shift=1.0):
        """input_size: side of the latent. class_tokens: 0 adds the class to c, K feeds it as K extra tokens.

        control (none, constant, cosine), control_alpha: see ControlEmbedder. pos_base: see sincos_positions.
        time_shift: see shift_time. ValueError if the sizes do not divide or an option is out of range.
        """
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"latents of side {input_size} do not divide into patches of {patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads} and 4")
        if class_tokens < 0 or not 0 < time_shift < math.inf or (pos_base or 1) < 0:
            wrong = f"class_tokens {class_tokens}, time_shift {time_shift}, pos_base {pos_base}"
            raise ValueError(f"{wrong}: one of them is out of range")
        self.patch_size, self.in_channels, self.num_classes = patch_size, in_channels, num_classes
        self.grid = input_size // patch_size
        self.class_tokens, self.pos_base, self.time_shift = class_tokens, pos_base, time_shift

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size * max(1, class_tokens), class_dropout_prob)
        self.pos_embed = self.positions(hidden_size)
        blocks = (DiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        self.control_embedder = None
        if control != "none":
            self.control_embedder = ControlEmbedder(hidden_size, control, control_alpha)
        self.initialize_weights()

    def initialize_weights(self):
        """Xavier, small normal embeddings, and zeros where adaLN-Zero wants them: the first output is 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, (DiTBlock, FinalLayer)):
                nn.init.zeros_(module.adaLN_modulation[-1].weight)
            if isinstance(module, FinalLayer):
                nn.init.zeros_(module.linear.weight)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.view(patch.out_channels, -1))
        nn.init.zeros_(patch.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for mlp in (self.control_embedder.low, self.control_embedder.high) if self.control_embedder else ():
            nn.init.normal_(mlp[0].weight, std=0.02)
            nn.init.zeros_(mlp[2].weight)

    def positions(self, width):
        table = torch.tensor(sincos_positions(self.grid, width, self.pos_base), dtype=torch.float32)
        return nn.Parameter(table.unsqueeze(0), requires_grad=False)              # (1, T, D)

    def condition(self, time, u, y, drop, control):
        """Condition c [N, D] and class tokens [N, K, D]. time [N] is embedded, u [N] weighs the control."""
        c, classes = self.t_embedder(time), self.y_embedder(y, drop)              # (N, D), (N, D or K D)
        if self.control_embedder and control is not None:
            c = c + self.control_embedder(control, u)
        if self.class_tokens:
            return c, classes.unflatten(1, (self.class_tokens, -1))
        return c + classes, c.new_empty(len(c), 0, c.shape[1])

    def unpatchify(self, x):                                                      # (N, T, P*P*C)
        G, P, C = self.grid, self.patch_size, self.in_channels
        x = x.reshape(-1, G, G, P, P, C).permute(0, 5, 1, 3, 2, 4)                # (N, C, G, P, G, P)
        return x.reshape(-1, C, G * P, G * P)                                     # (N, C, H, W)

    def run_blocks(self, x, c):
        """Yields the tokens [N, K + T, D] after each block."""
        for block in self.blocks:
            x = block(x, c)
            yield x

    def forward(self, x, t, y, drop=None, control=None, return_blocks=None):
        """Velocity of the noisy latents x [N, C, H, W] at times t [N] (1 is noise) for the classes y [N].

        drop [N] bool: labels replaced by the null class. control [N, 7]: see ControlEmbedder, None for none.
        return_blocks: block numbers from 1; the result is then (velocity, list of their tokens [N, T, D]).
        """
        c, classes = self.condition(t, shift_time(t, 1 / self.time_shift), y, drop, control)
        h, returned = torch.cat([classes, self.x_embedder(x) + self.pos_embed], dim=1), []
        for i, tokens in enumerate(self.run_blocks(h, c), start=1):
            if i in (return_blocks or ()):
                returned.append(tokens)                                           # (N, K + T, D)
        v = self.unpatchify(self.final_layer(tokens[:, self.class_tokens :], c))  # (N, C, H, W)
        return v if return_blocks is None else (v, [z[:, self.class_tokens :] for z in returned])


class LongResidual(nn.Module):
    """R_k of DiverseDiT: Linear(LayerNorm([stream; skip])) replaces the stream. There is no identity path.

    At initialisation its output has RMS sqrt(4/3), whatever the scale of its input.
    """

    def __init__(self, hidden_size):
        super().__init__()
        self.norm = nn.LayerNorm(2 * hidden_size, eps=1e-6)
        self.linear = nn.Linear(2 * hidden_size, hidden_size)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x, skip):                                                   # (N, T, D) each
        fused = self.linear(self.norm(torch.cat([x, skip], dim=-1)))
        return fused.to(x.dtype)                                                  # fp32, also under autocast


class DiverseDiT(DiT):
    """DiT whose deep half receives the inputs of the shallow half (arXiv 2603.04239, Eq. 8).

    Blocks count from 1. Before block L - i, i = 0 .. L/2 - 1, R([stream; input of block 1 + i]) replaces the
    stream: the last block sees the patch embedding again. A plain DiT checkpoint lacks only `long_residuals`.
    official code: train.py fuses after the block, with its output / here: before, because Eq. 8 and its index
    range say so, and the authors' second model file pairs the blocks the same way.
    """

    def __init__(self, **options):
        super().__init__(**options)
        width, depth = self.pos_embed.shape[-1], len(self.blocks)
        if depth % 2:
            raise ValueError(f"depth {depth}: long residuals pair the blocks, so their number must be even")
        self.long_residuals = nn.ModuleList(LongResidual(width) for _ in range(depth // 2))

    def run_blocks(self, x, c):
        skips, half = [], len(self.blocks) // 2
        for i, block in enumerate(self.blocks):
            if i < half:
                skips.append(x)
            else:
                x = self.long_residuals[i - half](x, skips.pop())                 # (N, T, D)
            x = block(x, c)
            yield x


def edm_coefficients(sigma, sigma_data=0.5):
    """c_skip, c_out, c_in, c_noise of D = c_skip x + c_out F(c_in x, c_noise): arXiv 2206.00364."""
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4


class SDDiT(DiT):
    """Encoder on a CLS token and the visible patches, decoder on all patches, EDM (arXiv 2403.17004).

    The DiT's blocks are the encoder. Masked patches skip it and are reinserted, as noised embeddings, before
    the decoder, whose width is the same for every size. The network predicts F of D = c_skip x + c_out F.
    paper: 8 decoder blocks; their width, where masked patches rejoin and the CLS path are not stated / here:
    width 512 as in MaskDiT, masked patches rejoin at the encoder's width, and the encoded CLS token is added
    to the decoder's condition. With the head these choices give the published 740.6M parameters of XL/2.
    """

    def __init__(self, decoder_depth=8, decoder_width=512, decoder_heads=16, cls_condition=True, **options):
        super().__init__(**options)
        width, dropout_prob = self.pos_embed.shape[-1], self.y_embedder.dropout_prob
        if decoder_width % decoder_heads or decoder_width % 4:
            raise ValueError(f"decoder_width {decoder_width} must be divisible by {decoder_heads} and by 4")
        label_width = self.y_embedder.embedding_table.embedding_dim
        self.y_embedder = ZeroNullLabelEmbedder(self.num_classes, label_width, dropout_prob)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.cls_embedder = nn.Linear(width, width) if cls_condition else None
        self.decoder_embed = FinalLayer(width, decoder_width)
        self.decoder_pos_embed = self.positions(decoder_width)
        block = partial(DiTBlock, decoder_width, decoder_heads, 4.0, options.get("qk_norm", False), width)
        self.decoder_blocks = nn.ModuleList(block() for _ in range(decoder_depth))
        self.final_layer = FinalLayer(decoder_width, self.patch_size**2 * self.in_channels, cond_size=width)
        self.initialize_weights()
        nn.init.normal_(self.cls_token, std=0.02)

    def encode(self, x, sigma, y, drop=None, keep=None, control=None):
        """Encoded tokens [N, 1 + V, D] (CLS, visible patches), patch embeddings [N, T, D], condition [N, D].

        keep [N, V]: indices of the visible patches; all of them by default.
        """
        _, _, c_in, c_noise = edm_coefficients(sigma)
        u = sigma / (self.time_shift + sigma)  # the time t of flow matching at this noise, before any shift
        c, classes = self.condition(c_noise, u, y, drop, control)
        h = self.x_embedder(c_in.view(-1, 1, 1, 1) * x) + self.pos_embed          # (N, T, D)
        visible = h if keep is None else h.gather(1, keep.unsqueeze(2).expand(-1, -1, h.shape[2]))
        tokens = torch.cat([classes, self.cls_token.expand(len(h), -1, -1), visible], dim=1)
        tokens = deque(self.run_blocks(tokens, c), maxlen=1).pop()                # of the last block
        return tokens[:, self.class_tokens :], h, c

    def forward(self, x, t, y, drop=None, control=None, keep=None, return_tokens=False):
        """F [N, C, H, W] of noisy latents x at noise levels sigma = t [N] for the classes y [N].

        drop, control: see DiT. keep: see encode. return_tokens: the result is then (F, encoded tokens).
        """
        tokens, h, c = self.encode(x, t, y, drop, keep, control)
        if self.cls_embedder is not None:
            c = c + self.cls_embedder(nn.functional.layer_norm(tokens[:, 0], h.shape[2:], eps=1e-6))
        x = tokens[:, 1:]
        if keep is not None:
            x = h.scatter(1, keep.unsqueeze(2).expand_as(x), x)                   # (N, T, D)
        x = self.decoder_embed(x, c) + self.decoder_pos_embed                     # (N, T, decoder_width)
        for block in self.decoder_blocks:
            x = block(x, c)
        x = self.unpatchify(self.final_layer(x, c))                               # (N, C, H, W)
        return (x, tokens) if return_tokens else x


def inherit_config(config, theirs):
    """What the model of `config` takes over from one trained at another resolution (arXiv 2411.03177).

    The grid of its positions, and its time shift times the ratio of the sides (1 for other latents).
    ValueError if its tokens differ, so that hardly a weight would fit.
    """
    for key in ("patch_size", "hidden_size", "depth", "num_heads"):
        if theirs[key] != config[key]:
            raise ValueError(f"--init: {key} is {theirs[key]} there, {config[key]} in the model to train")
    alike, grid = theirs["in_channels"] == config["in_channels"], theirs["input_size"] // theirs["patch_size"]
    ratio = config["input_size"] / theirs["input_size"] if alike else 1
    return dict(pos_base=theirs.get("pos_base") or grid, time_shift=theirs.get("time_shift", 1.0) * ratio)


def inherit_weights(model, state):
    """Copy what fits by name and shape, except position tables; returns a line that says what was loaded."""
    own = model.state_dict()
    fits = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict(fits | {name: own[name] for name in fits if "pos_embed" in name}, strict=False)
    resized = {name for name in own.keys() & state.keys() - fits.keys() if name.endswith("pos_embed")}
    new, unused = (names.keys() - fits.keys() - resized for names in (own, state))
    line = f"{len(fits)} tensors loaded"
    for kind, names in (("resized", resized), ("new", new), ("unused", unused)):
        line += f"; {kind}: {', '.join(sorted({name.split('.')[0] for name in names})) or 'none'}"
    return line


def forward_flops(config, call="forward", **options):
    """FLOPs of one image's forward pass, or of another method of the model: 2 per multiply-accumulate."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        x = torch.zeros(1, config["in_channels"], config["input_size"], config["input_size"])
        getattr(build(config), call)(x, torch.ones(1), torch.zeros(1, dtype=torch.int64), **options)
    return counter.get_total_flops()


def check_memory(config, images, precision):
    """ValueError if this device cannot hold a training step on `images` at once; it names sizes that fit.

    Counted are 20 bytes a parameter (weight, gradient, Adam's two moments, average) and the 17 values that a
    block keeps for the backward pass for every token and channel: a lower bound, unless most are masked.
    """

    def need(config):
        with torch.device("meta"):
            parameters = sum(p.numel() for p in build(config).parameters())
        tokens = (config["input_size"] // config["patch_size"]) ** 2
        values = 17 * images * tokens * config["depth"] * config["hidden_size"]
        return 20 * parameters + (2 if precision == "bf16" else 4) * values

    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else host
    if need(config) > memory:
        sizes = [f"{size}/{config['patch_size']}" for size in SIZES]
        fits = [size for size in sizes if need(config | parse_model(size)) <= memory] or ["none"]
        needs = f"{images} images at once need {need(config) / 1e9:.0f} GB, there are {memory / 1e9:.0f} GB"
        raise ValueError(f"{needs}: take a smaller --micro-batch, or a --model that fits ({', '.join(fits)})")


def compile_blocks(module):
    """torch.compile every DiTBlock: a whole model compiles for minutes. ValueError without a compiler."""
    if not shutil.which(os.environ.get("CXX", "c++")):
        raise ValueError("--compile needs a C++ compiler: install g++ or clang++, or pass --no-compile")
    torch._dynamo.config.optimize_ddp = False  # it would cut the model into dozens of graphs
    for block in module.modules():
        if isinstance(block, DiTBlock):
            block.compile(dynamic=False)  # a graph for each number of tokens, not a slower general one


ARCHITECTURES = {"DiT": DiT, "DiverseDiT": DiverseDiT, "SDDiT": SDDiT}


def parse_model(name):
    """Keyword arguments of `--model SIZE/PATCH`, e.g. "XL/2". ValueError if it does not read so."""
    size, _, patch = name.partition("/")
    if size not in SIZES or not patch.isdecimal() or int(patch) == 0:
        raise ValueError(f"--model {name!r}: expected SIZE/PATCH, such as XL/2; sizes: {', '.join(SIZES)}")
    depth, hidden_size, num_heads = SIZES[size]
    return dict(patch_size=int(patch), hidden_size=hidden_size, depth=depth, num_heads=num_heads)


def build(config):
    """The model of a checkpoint's `config`: {"arch": a class of this file, and its keyword arguments}.

    ValueError for an unknown architecture, TypeError for an unknown keyword.
    """
    if config["arch"] not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {config['arch']!r}, not one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[config["arch"]](**{key: value for key, value in config.items() if key != "arch"})
