"""The diffusion transformer: embedders, block, and every architecture of this repository.

    DiT         adaLN-Zero transformer of DiT (arXiv 2212.09748), as used by SiT (2401.08740) and REPA (2410.06940)
    DiverseDiT  DiT with long residual connections (2603.04239)
    SDDiT       masked encoder, decoder and EDM preconditioning of SD-DiT (2403.17004)

Options of all three: control conditioning, the class as tokens, positions and noise of another resolution (2411.03177).

Plain modules: nothing here reads a file, knows about processes or holds a loss, so `sample.py` rebuilds any model from
the `config` of its checkpoint with `build(config)`. Names and shapes of the state dict are those of the official
DiT / SiT / REPA checkpoints.

Shapes in the right margin:
    N batch    C, H, W latent channels, height, width    P patch size    T = (H/P)(W/P) tokens    D width (hidden_size)
"""

import math
import os
import shutil

import numpy as np
import torch
import torch.nn as nn
from timm.layers import Attention, Mlp, PatchEmbed

# name: (blocks, width, heads); S to XL are the sizes of DiT, nano is ours, for laptops and tests
SIZES = {
    "nano": (6, 128, 4),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}


def sincos_positions(side, width, base=None):
    """Fixed 2-D sin-cos position table of a `side` x `side` grid of tokens: float64 array [side^2, width].

    The first half of the channels encodes the column, the second half the row; each half is [sin | cos] in blocks.
    base: the grid's side in the model this one starts from; position i is then i base / side, so that the image keeps
    its extent (interpolation, arXiv 2411.03177). paper: "adjusts the sampling grid" / here: without half-pixel shift.
    """
    omega = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    angles = np.outer(np.arange(side) * (base or side) / side, omega)             # (side, D/4)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)               # (side, D/2)
    column, row = np.tile(axis, (side, 1)), np.repeat(axis, side, axis=0)         # (side^2, D/2) each
    return np.concatenate([column, row], axis=1)


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def shift_time(t, s):
    """Time t' at which s times the side has the noise that t means: SNR(t') = SNR(t) / s^2; t = 0 data, t = 1 noise.

    The law of arXiv 2411.03177 (figure A1) in the closed form of SD3 (2403.03206); 1 / s undoes it. In EDM: s sigma.
    """
    return s * t / (1 + (s - 1) * t)


class Sinusoids(nn.Module):
    """Scalars [...] -> [cos | sin] of `frequencies` angles, with periods up to 2 pi 10000: [..., 2 frequencies]."""

    def __init__(self, frequencies=128):
        super().__init__()
        omega = torch.exp(-math.log(10000.0) * torch.arange(frequencies, dtype=torch.float32) / frequencies)
        self.register_buffer("omega", omega, persistent=False)

    def forward(self, values):
        angles = values.float().unsqueeze(-1) * self.omega
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """Scalar t -> 256 sinusoids -> two-layer MLP.

    Flow matching feeds t in [0, 1] as it is: SiT and REPA do not multiply by 1000 (acknowledged by their authors as
    unintended: SiT#24, REPA#40), and their checkpoints need the same. Always fp32, also under autocast.
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

    The size says how sharp the image is, so it has no say while the noise still hides everything; a crop or a flip
    moves the layout, which is fixed early, and has weight 1. A row of zeros is no control: keep = 0.
    paper: curves from 0 at u = 1 to 1 at u = 0 with a parameter alpha (figure 3) / here: the power-cosine that fits
    them, with alpha = 1: reconstructed, not read. So are the weight of crop and flip and their scale of 1000.
    """

    def __init__(self, hidden_size, mode="cosine", alpha=1.0, frequencies=128):
        super().__init__()
        if mode not in ("constant", "cosine"):
            raise ValueError(f"control {mode!r}: expected none, constant or cosine")
        if not 0 < alpha < math.inf:
            raise ValueError(f"control alpha {alpha}: must be positive")
        self.mode, self.alpha, self.sinusoids = mode, alpha, Sinusoids(frequencies)
        widths = 2 * (2 * frequencies), 5 * (2 * frequencies)
        self.low, self.high = (
            nn.Sequential(nn.Linear(width, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
            for width in widths
        )

    def initialize_weights(self):
        for mlp in (self.low, self.high):
            nn.init.normal_(mlp[0].weight, std=0.02)
            nn.init.zeros_(mlp[2].weight)

    def gamma(self, u):                                                           # (N,)
        if self.mode == "constant":
            return torch.ones_like(u)
        return (1 - torch.cos(torch.pi * (1 - u).clamp(0, 1) ** self.alpha)) / 2

    def forward(self, control, u):
        """control [N, 7]: h0, w0, top, left, h, w, flip in pixels of the original; u [N] in [0, 1] -> [N, D], fp32."""
        with torch.autocast("cuda" if u.is_cuda else "cpu", enabled=False):
            h0, w0, top, left, h, w, flip = control.float().unbind(1)             # (N,) each
            height, width = h0.clamp(min=1), w0.clamp(min=1)                      # a row of zeros must not give 0 / 0
            size = torch.stack([h0, w0], dim=1).clamp(max=4096)
            layout = 1000 * torch.stack([top / height, left / width, h / height, w / width, flip], dim=1)
            low, high = self.low(self.sinusoids(size).flatten(1)), self.high(self.sinusoids(layout).flatten(1))
            return (h0 > 0).unsqueeze(1) * (self.gamma(u.float()).unsqueeze(1) * low + high)


class LabelEmbedder(nn.Module):
    """Class label -> row of a table; the last row, `num_classes`, is the null class of classifier-free guidance."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, y, drop=None):
        """`drop` [N] bool: which labels become null. None: drawn here while training, none dropped in eval mode."""
        if drop is None and self.training and self.dropout_prob > 0:
            drop = torch.rand(y.shape, device=y.device) < self.dropout_prob
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
        return self.embedding_table(y.clamp(max=self.num_classes - 1)) * (y < self.num_classes).unsqueeze(1)


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning: shift, scale and gate of both branches come from c.

    `cond_size`: width of c where it is not the width of the tokens.
    """

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0, qk_norm=False, cond_size=None):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_size or hidden_size, 6 * hidden_size))

    def forward(self, x, c):                                                      # (N, T, D), (N, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class FinalLayer(nn.Module):
    """Modulated LayerNorm and a linear map of every token: to the C values of each of its P x P positions, usually."""

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

    Predicts as many channels as it reads: the velocity of flow matching needs no variance channels (as in REPA; the
    official DiT and SiT train twice as many).
    """

    def __init__(
        self,
        input_size=32,
        patch_size=2,
        in_channels=4,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        mlp_ratio=4.0,
        num_classes=1000,
        class_dropout_prob=0.1,
        qk_norm=False,
        control="none",
        control_alpha=1.0,
        class_tokens=0,
        pos_base=None,
        time_shift=1.0,
    ):
        """`input_size`: side of the latent. ValueError if the sizes do not divide, or an option below is unknown.

        control: none, constant or cosine, with control_alpha (see ControlEmbedder). class_tokens: 0 adds the class to
        the condition; K > 0 shows it to attention instead, as K tokens before the patches. pos_base, time_shift: of a
        model that starts from a lower resolution (see sincos_positions, shift_time).
        """
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"latents of side {input_size} do not divide into patches of {patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads} and of 4")
        if class_tokens < 0:
            raise ValueError(f"class tokens {class_tokens}: must not be negative")
        if not 0 < time_shift < math.inf:
            raise ValueError(f"time shift {time_shift}: must be positive")
        self.patch_size, self.in_channels, self.num_classes = patch_size, in_channels, num_classes
        self.grid = input_size // patch_size
        self.class_tokens, self.pos_base, self.time_shift = class_tokens, pos_base, time_shift

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size * max(1, class_tokens), class_dropout_prob)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        self.control_embedder = ControlEmbedder(hidden_size, control, control_alpha) if control != "none" else None
        self.initialize_weights()

    def initialize_weights(self):
        """Xavier everywhere, small normal embeddings, and zeros where adaLN-Zero wants them: the first output is 0."""
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
        positions = sincos_positions(self.grid, self.pos_embed.shape[-1], self.pos_base)
        self.pos_embed.data.copy_(torch.from_numpy(positions))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        if self.control_embedder:
            self.control_embedder.initialize_weights()

    def condition(self, time, u, y, drop, control):
        """Condition c [N, D] and class tokens [N, K, D]; `time` [N] is embedded, u [N] in [0, 1] weighs the control."""
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

    def run_blocks(self, x, c, after=()):
        """All blocks in order. Returns the tokens and the list of those that left the 1-based blocks `after`."""
        taps = []
        for i, block in enumerate(self.blocks, start=1):
            x = block(x, c)                                                       # (N, T, D)
            if i in after:
                taps.append(x)
        return x, taps

    def forward(self, x, t, y, drop=None, control=None, after=None):
        """Velocity of the noisy latents x [N, C, H, W] at times t [N] (0 data, 1 noise) for the classes y [N].

        drop [N] bool: labels replaced by the null class (default: drawn in training mode, see LabelEmbedder).
        control [N, 7]: see ControlEmbedder; None, or a model without one: no control.
        after: 1-based block numbers; then the result is (velocity, list of their output tokens [N, T, D]).
        """
        c, classes = self.condition(t, shift_time(t, 1 / self.time_shift), y, drop, control)
        x = self.x_embedder(x) + self.pos_embed                                   # (N, T, D)
        x, taps = self.run_blocks(torch.cat([classes, x], dim=1), c, after or ())
        x = self.unpatchify(self.final_layer(x[:, self.class_tokens :], c))       # (N, C, H, W)
        return x if after is None else (x, [tap[:, self.class_tokens :] for tap in taps])


class LongResidual(nn.Module):
    """R_k of DiverseDiT: Linear(LayerNorm([stream; skip])) replaces the stream; it has no identity path of its own.

    At initialisation its output has RMS sqrt(4/3), whatever the scale of its input.
    """

    def __init__(self, hidden_size):
        super().__init__()
        self.norm = nn.LayerNorm(2 * hidden_size, eps=1e-6)
        self.linear = nn.Linear(2 * hidden_size, hidden_size)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x, skip):                                                   # (N, T, D) each
        return self.linear(self.norm(torch.cat([x, skip], dim=-1))).to(x.dtype)   # fp32 stream, also under autocast


class DiverseDiT(DiT):
    """DiT whose deep half receives the inputs of the shallow half (arXiv 2603.04239, Eq. 8).

    Before block L - i, the stream is replaced by R([stream; input of block 1 + i]), i = 0 .. L/2 - 1, counted from 1:
    the last block sees the patch embedding again. A plain DiT checkpoint lacks only `long_residuals`.
    official code: fuses after the block, with its output / here: before, because Eq. 8 and its index range say so.
    """

    def __init__(self, **options):
        super().__init__(**options)
        width, depth = self.pos_embed.shape[-1], len(self.blocks)
        if depth % 2:
            raise ValueError(f"depth {depth}: long residual connections pair the blocks, so their number must be even")
        self.long_residuals = nn.ModuleList(LongResidual(width) for _ in range(depth // 2))

    def run_blocks(self, x, c, after=()):
        taps, skips, half = [], [], len(self.blocks) // 2
        for i, block in enumerate(self.blocks, start=1):
            if i <= half:
                skips.append(x)
            else:
                x = self.long_residuals[i - half - 1](x, skips.pop())
            x = block(x, c)                                                       # (N, T, D)
            if i in after:
                taps.append(x)
        return x, taps


def edm_coefficients(sigma, sigma_data=0.5):
    """c_skip, c_out, c_in, c_noise of EDM's preconditioning D = c_skip x + c_out F(c_in x, c_noise) (arXiv 2206.00364).

    `sigma`: a tensor, noise level in units of the data.
    """
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4


class SDDiT(DiT):
    """Encoder on a CLS token and the visible patches, decoder on all patches, EDM preconditioning (arXiv 2403.17004).

    The DiT's blocks are the encoder. Invisible patches wait as noised patch embeddings with their positions and take
    their places again before the decoder, whose width is the same for every size; its condition keeps the encoder's
    width and includes the encoded CLS token. The network predicts F of D = c_skip x + c_out F.
    paper: neither sizes of the decoder nor the CLS path are stated / here: those of MaskDiT, which give the published
    740.6M parameters for XL/2 with the student's head.
    """

    def __init__(self, decoder_depth=8, decoder_width=512, decoder_heads=16, cls_condition=True, **options):
        super().__init__(**options)
        width, dropout_prob = self.pos_embed.shape[-1], self.y_embedder.dropout_prob
        if decoder_width % decoder_heads or decoder_width % 4:
            raise ValueError(f"decoder_width {decoder_width} must divide by 4 and by decoder_heads {decoder_heads}")
        label_width = self.y_embedder.embedding_table.embedding_dim
        self.y_embedder = ZeroNullLabelEmbedder(self.num_classes, label_width, dropout_prob)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.cls_embedder = nn.Linear(width, width) if cls_condition else None
        self.decoder_embed = FinalLayer(width, decoder_width)
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, self.grid**2, decoder_width), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            DiTBlock(decoder_width, decoder_heads, cond_size=width) for _ in range(decoder_depth)
        )
        self.final_layer = FinalLayer(decoder_width, self.patch_size**2 * self.in_channels, cond_size=width)
        self.initialize_weights()
        positions = sincos_positions(self.grid, decoder_width, self.pos_base)
        self.decoder_pos_embed.data.copy_(torch.from_numpy(positions))
        nn.init.normal_(self.cls_token, std=0.02)

    def encode(self, x, sigma, y, drop=None, keep=None, control=None):
        """Encoded tokens [N, 1 + K, D] (CLS, then the K visible patches), patch embeddings [N, T, D], condition [N, D].

        keep [N, K]: indices of the visible patches; all of them by default.
        """
        _, _, c_in, c_noise = edm_coefficients(sigma)
        u = sigma / (self.time_shift + sigma)  # the flow's time of this noise, (1 - u) x + u eps, before any shift
        c, classes = self.condition(c_noise, u, y, drop, control)
        h = self.x_embedder(c_in.view(-1, 1, 1, 1) * x) + self.pos_embed          # (N, T, D)
        visible = h if keep is None else h.gather(1, keep.unsqueeze(2).expand(-1, -1, h.shape[2]))
        tokens = torch.cat([classes, self.cls_token.expand(len(h), -1, -1), visible], dim=1)
        return self.run_blocks(tokens, c)[0][:, self.class_tokens :], h, c

    def forward(self, x, t, y, drop=None, control=None, keep=None, encoded=False):
        """F [N, C, H, W] of noisy latents x at noise levels sigma = t [N] for the classes y [N] (`num_classes`: null).

        drop [N] bool: labels replaced by the null class. control [N, 7]: see ControlEmbedder. keep: see encode.
        encoded: also return the encoded tokens.
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
        return (x, tokens) if encoded else x


def compile_blocks(module):
    """torch.compile every DiTBlock below `module`, in place: one small graph for all blocks of a shape.

    Whole models compile for minutes, and DistributedDataParallel would cut them into dozens of graphs. dynamic=False:
    another number of tokens is another graph, not a slower general one. ValueError without a C++ compiler.
    """
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        raise ValueError("--compile needs a C++ compiler (g++ or clang++): install one, or pass --no-compile")
    torch._dynamo.config.optimize_ddp = False
    for block in module.modules():
        if isinstance(block, DiTBlock):
            block.compile(dynamic=False)


ARCHITECTURES = {"DiT": DiT, "DiverseDiT": DiverseDiT, "SDDiT": SDDiT}


def parse_model(name):
    """Keyword arguments of `--model SIZE/PATCH`, e.g. "XL/2". ValueError if it does not read so."""
    size, _, patch = name.partition("/")
    if size not in SIZES or not patch.isdecimal() or int(patch) == 0:
        raise ValueError(f"--model {name!r}: expected SIZE/PATCH with SIZE one of {', '.join(SIZES)}, for example XL/2")
    depth, hidden_size, num_heads = SIZES[size]
    return dict(patch_size=int(patch), hidden_size=hidden_size, depth=depth, num_heads=num_heads)


def build(config):
    """The model of a checkpoint's `config`: {"arch": name of a class of this file, and its keyword arguments}.

    ValueError for an unknown architecture, TypeError for an unknown keyword.
    """
    config = dict(config)
    arch = config.pop("arch")
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}; this version knows {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[arch](**config)
