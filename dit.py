"""The diffusion transformer: its embedders, its block, and every architecture that is trained here.

    DiT         the adaLN-Zero transformer of DiT (arXiv 2212.09748), as used by SiT (2401.08740)
                and REPA (2410.06940)
    DiverseDiT  DiT with long residual connections (2603.04239)
    SDDiT       masked encoder, decoder and EDM preconditioning of SD-DiT (2403.17004)
    NoiseDiT    DiT's own network, which predicts the noise and a variance (2212.09748)

Read `DiTBlock` and `DiT.forward` first. The other architectures are subclasses of DiT; what only
one of them needs stands just above it. All have the control conditioning of arXiv 2411.03177 and
its transfer to a higher resolution. `build(config)` makes a model from the `config` of its
checkpoint. Nothing here reads a file, knows about processes or holds a loss.

Parameters have the official names and shapes. A plain DiT has those of REPA's model, and a NoiseDiT
those of DiT's, which predicts twice the channels. (So does SiT's official model, but SiT does not
use the second half.) Control, mean velocities, long residuals and class tokens add or widen
tensors. An SDDiT has a CLS token, a label table, a decoder and a last layer of its own.

Where a file deviates from a paper or from the authors' code, it says so in one form:
    paper: what the paper says / official code: what the authors' code does / here: what this file
    does, because ...

Shapes stand in the right margin. N: batch. C, H, W: channels, height and width of the latent.
P: side of a patch. G = H/P: side of the grid. T = G G: number of patches. K: number of class
tokens, 0 by default. D: width of the network (hidden_size).
"""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from timm.layers import Attention, Mlp, PatchEmbed
from torch.utils.flop_counter import FlopCounterMode

SIZES = {  # name: (blocks, width, heads)
    "nano": (6, 128, 4),  # our own size, for laptops and tests; the others are DiT's
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "M": (16, 1024, 16),  # MeanFlow's (arXiv 2505.13447)
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}


# ---- Positions and time
def sincos_positions(side, width, base=None):
    """Fixed 2-D sin-cos positions of a `side` x `side` grid of tokens: float64 [side^2, width].

    The first half of the channels encodes the column, the second half the row. Each half holds the
    sines, then the cosines. Position i is encoded as i * base / side. By default, base = side, and
    a larger grid has positions that a model trained on a smaller one has never seen
    (extrapolation). With the smaller grid as `base`, they stay below it (interpolation, arXiv
    2411.03177). Raises ValueError unless the width is a multiple of 4.

    paper: it "adjusts the sampling grid" / here: positions are scaled without a half-pixel shift.
    """
    if width % 4:
        raise ValueError(f"width {width} must be a multiple of 4")
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    positions = np.arange(side) * (base or side) / side
    angles = np.outer(positions, frequencies)                         # [side, D/4]
    encoding = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [side, D/2]
    column = np.tile(encoding, (side, 1))                             # [side^2, D/2]
    row = np.repeat(encoding, side, axis=0)                           # [side^2, D/2]
    return np.concatenate([column, row], axis=1)


def shift_time(t, ratio):
    """Returns the time t' at which an image `ratio` times as wide looks as noisy as one at time t.

    Seen at the same size, ratio^2 of its pixels are averaged into one, which divides the variance
    of the noise by ratio^2. So it needs more noise: SNR(t') = SNR(t) / ratio^2. This law is from
    arXiv 2411.03177 (figure A1), its closed form from SD3 (2403.03206). The inverse shifts by 1 /
    ratio.
    """
    return ratio * t / (1 + (ratio - 1) * t)


def normal_from_uniform(uniform, mean, std):
    """Turns uniform numbers in [0, 1) into normal ones, by the inverse distribution function."""
    return mean + std * torch.special.ndtri(uniform.clamp(1e-7, 1 - 1e-7))


def training_time(uniform, time_normal=None, time_shift=1.0):
    """Turns uniform numbers in [0, 1) into the times t at which a flow-matching model trains.

    With time_normal = (mean, std), logit t ~ N(mean, std^2) (SD3, arXiv 2403.03206). Otherwise t is
    uniform. In both cases t is then shifted (see shift_time).
    """
    t = uniform
    if time_normal is not None:
        t = torch.sigmoid(normal_from_uniform(uniform, *time_normal))
    return shift_time(t, time_shift)


# ---- Embedders
def autocast_off(tensor):
    """Returns a context in which autocast is off on the device of this tensor."""
    # not tensor.device.type, because the meta device (see forward_flops) has no autocast
    return torch.autocast("cuda" if tensor.is_cuda else "cpu", enabled=False)


class Sinusoids(nn.Module):
    """Turns values [...] into [cos | sin] of angles, [..., 2 * num_frequencies].

    The periods grow from 2 pi towards 2 pi 10000.
    """

    def __init__(self, num_frequencies=128):
        super().__init__()
        steps = torch.arange(num_frequencies, dtype=torch.float32)
        omega = torch.exp(-math.log(10000.0) * steps / num_frequencies)
        self.register_buffer("omega", omega, persistent=False)

    def forward(self, values):
        angles = values.float().unsqueeze(-1) * self.omega
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sinusoid_mlp(num_values, hidden_size):
    """Returns a two-layer MLP that reads `num_values` values, each as 256 sinusoids."""
    return nn.Sequential(
        nn.Linear(256 * num_values, hidden_size),
        nn.SiLU(),
        nn.Linear(hidden_size, hidden_size),
    )


class TimestepEmbedder(nn.Module):
    """Embeds a time t by sinusoids and an MLP, in fp32 even under autocast.

    SiT and REPA feed t in [0, 1]. Their authors meant 1000 t (SiT#24, REPA#40), but their
    checkpoints need t itself.
    """

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = sinusoid_mlp(1, hidden_size)
        self.sinusoids = Sinusoids()

    def forward(self, t):                                             # [N]
        with autocast_off(t):
            return self.mlp(self.sinusoids(t))                        # [N, D]


class ControlEmbedder(nn.Module):
    """Tells the network the original size, the crop and the flip of an image (arXiv 2411.03177).

    A network that knows the original size can train on images of low resolution without learning
    to draw blurred ones. The condition c gains
        gamma(t) size_mlp(h0, w0) + layout_mlp(top / h0, left / w0, h / h0, w / w0, flip)
        gamma(t) = (1 - cos(pi (1 - t)^alpha)) / 2,  t = 1 noise, t = 0 data       mode "cosine"
        gamma(t) = 1, the micro-conditioning of SDXL (2307.01952)                  mode "constant"

    Sharpness is decided late in sampling, so the weight of the size is 0 at pure noise. Crop and
    flip move the layout, which is decided early, so their weight is 1. A row of zeros means that
    there is no control: it adds 0.

    paper: gamma rises from 0 at t = 1 to 1 at t = 0 with a parameter alpha (figure 3) / here: it is
    a power-cosine, because we could not read the formula, and this one fits figure 3.
    paper: crop and flip have a weight and a scale that we could not read / here: the weight is 1
    and the scale is 1000.
    """

    def __init__(self, hidden_size, mode="cosine", alpha=1.0):
        super().__init__()
        if mode not in ("constant", "cosine") or not 0 < alpha < math.inf:
            raise ValueError(
                f"control {mode!r}, alpha {alpha}: expected constant or cosine, and alpha above 0"
            )
        self.mode = mode
        self.alpha = alpha
        self.sinusoids = Sinusoids()
        self.size_mlp = sinusoid_mlp(2, hidden_size)
        self.layout_mlp = sinusoid_mlp(5, hidden_size)

    def gamma(self, t):                                               # [N]
        if self.mode == "constant":
            return torch.ones_like(t)
        angle = torch.pi * (1 - t).clamp(0, 1) ** self.alpha
        return (1 - angle.cos()) / 2

    def forward(self, control, t):
        """Returns what c gains, [N, D] in fp32, from control [N, 7] at times t [N].

        A row of control is h0, w0 (the original size), top, left, h, w (the crop), all in pixels of
        the original image, and flip, which is 0 or 1.
        """
        with autocast_off(t):
            h0, w0, top, left, h, w, flip = control.float().unbind(1)  # [N] each
            given = (h0 > 0).unsqueeze(1)                             # [N, 1]
            h0 = h0.clamp(min=1)  # avoids 0 / 0 in a row of zeros
            w0 = w0.clamp(min=1)

            # our limit: an image of more than 4096 pixels a side counts as equally sharp
            size = torch.stack([h0, w0], dim=1).clamp(max=4096)       # [N, 2]
            c_size = self.size_mlp(self.sinusoids(size).flatten(1))   # [N, D]

            layout = torch.stack([top / h0, left / w0, h / h0, w / w0, flip], dim=1)
            c_layout = self.layout_mlp(self.sinusoids(1000 * layout).flatten(1))

            gamma = self.gamma(t.float()).unsqueeze(1)                # [N, 1]
            return given * (gamma * c_size + c_layout)


class LabelEmbedder(nn.Module):
    """Looks class labels up in a table. Its last row is the null class of classifier-free guidance.

    Without dropout there is no null class.
    """

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        rows = num_classes
        if dropout_prob > 0:
            rows += 1  # the null class
        self.embedding_table = nn.Embedding(rows, hidden_size)

    def forward(self, y, drop=None):
        """Embeds labels y [N]. drop [N] bool says which labels become the null class.

        Training draws `drop` with the probability `dropout_prob`.
        """
        if drop is not None and self.dropout_prob > 0:
            y = torch.where(drop, self.num_classes, y)
        return self.embed(y)                                          # [N, D]

    def embed(self, y):
        """Looks labels up, including the null class. ZeroNullLabelEmbedder overrides this."""
        return self.embedding_table(y)


# ---- Block and final layer
PlainNorm = partial(nn.LayerNorm, elementwise_affine=False, eps=1e-6)
TanhGELU = partial(nn.GELU, approximate="tanh")


def modulate(x, shift, scale):
    """Shifts and scales all tokens x [N, T, D] of an image alike; shift and scale are [N, 1, D]."""
    return x * (1 + scale) + shift


class DiTBlock(nn.Module):
    """adaLN-Zero block: the condition c [N, cond_size] sets shift, scale and gate of both branches.

    cond_size is hidden_size by default. Raises ValueError unless num_heads divides hidden_size.
    """

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0, qk_norm=False, cond_size=None):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"width {hidden_size} does not divide into {num_heads} heads")
        self.norm1 = PlainNorm(hidden_size)
        self.attn = Attention(
            hidden_size, num_heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm
        )
        self.norm2 = PlainNorm(hidden_size)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=TanhGELU)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(),
            nn.Linear(cond_size or hidden_size, 6 * hidden_size),
        )

    def forward(self, x, c):                                          # [N, T, D], [N, D]
        modulation = self.adaLN_modulation(c).unsqueeze(1)            # [N, 1, 6 D]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=2)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x


class FinalLayer(nn.Module):
    """Modulated LayerNorm and a linear map of every token to `out_size` values."""

    def __init__(self, hidden_size, out_size, cond_size=None):
        super().__init__()
        self.norm_final = PlainNorm(hidden_size)
        self.linear = nn.Linear(hidden_size, out_size)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(),
            nn.Linear(cond_size or hidden_size, 2 * hidden_size),
        )

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=2)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # [N, T, out_size]


# ---- DiT
class DiT(nn.Module):
    """Diffusion transformer with adaLN-Zero blocks.

    It predicts as many channels as it reads, as REPA does. NoiseDiT adds those of the variance. The
    keyword arguments up to qk_norm have the official names. Those from control on are our own.
    """

    first_time = 1.0  # sampling starts here, at pure noise
    outputs = 1  # the last layer predicts outputs * in_channels channels

    def __init__(
        self,
        input_size=32,  # side of the latent
        patch_size=2,
        in_channels=4,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        mlp_ratio=4.0,
        num_classes=1000,
        class_dropout_prob=0.1,
        qk_norm=False,
        control="none",  # or constant, or cosine: see ControlEmbedder
        control_alpha=1.0,
        class_tokens=0,  # 0 adds the class to c; K > 0 feeds it as K tokens before the patches
        pos_base=None,  # see sincos_positions
        time_shift=1.0,  # see shift_time
        mean_velocity=False,  # True embeds t - r as well: see forward
    ):
        """Raises ValueError if sizes do not divide, or if control or control_alpha is invalid."""
        super().__init__()
        if input_size % patch_size:
            raise ValueError(
                f"latents of side {input_size} do not divide into patches of {patch_size}"
            )
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.hidden_size = hidden_size
        self.num_classes = num_classes
        self.class_tokens = class_tokens
        self.pos_base = pos_base
        self.time_shift = time_shift
        self.grid = input_size // patch_size

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        label_width = hidden_size * max(1, class_tokens)
        self.y_embedder = LabelEmbedder(num_classes, label_width, class_dropout_prob)
        self.pos_embed = self.positions(hidden_size)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.outputs * in_channels)
        self.control_embedder = None
        if control != "none":
            self.control_embedder = ControlEmbedder(hidden_size, control, control_alpha)
        self.h_embedder = TimestepEmbedder(hidden_size) if mean_velocity else None  # of t - r
        self.initialize_weights()

    def initialize_weights(self):
        """Draws the first weights: Xavier for linear layers, small normal numbers for embeddings.

        The zeros of adaLN-Zero make the first output 0, and at first control changes nothing.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

        # a second pass, because modules() yields a block before the linear layers inside it
        for module in self.modules():
            if isinstance(module, (DiTBlock, FinalLayer)):
                nn.init.zeros_(module.adaLN_modulation[-1].weight)
            if isinstance(module, FinalLayer):
                nn.init.zeros_(module.linear.weight)

        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.flatten(1))
        nn.init.zeros_(patch.bias)

        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for embedder in (self.t_embedder, self.h_embedder):
            if embedder is not None:
                nn.init.normal_(embedder.mlp[0].weight, std=0.02)
                nn.init.normal_(embedder.mlp[2].weight, std=0.02)
        if self.control_embedder is not None:
            for mlp in (self.control_embedder.size_mlp, self.control_embedder.layout_mlp):
                nn.init.normal_(mlp[0].weight, std=0.02)
                nn.init.zeros_(mlp[2].weight)

    def positions(self, width):
        """Returns the fixed position table [1, T, width] of this model's grid."""
        table = sincos_positions(self.grid, width, self.pos_base)
        table = torch.tensor(table[None], dtype=torch.float32)
        return nn.Parameter(table, requires_grad=False)  # no buffer, as in the official code

    def condition(self, t, unshifted_t, y, drop, control, r=None):
        """Returns the condition c [N, D], and the class tokens [N, K, D] that precede the patches.

        By default K = 0, and the class is part of c. With the option `mean_velocity`, so is t - r.
        t [N] is what the network is told: a time, in a NoiseDiT a timestep, in an SDDiT c_noise.
        unshifted_t [N] is the time of flow matching before any shift (see shift_time). It says how
        noisy an image looks at any resolution, and the weight of the control depends on it.
        """
        c = self.t_embedder(t)                                        # [N, D]
        if self.h_embedder is not None:
            h = torch.zeros_like(t) if r is None else t - r
            c = c + self.h_embedder(h)
        elif r is not None:
            raise ValueError("r needs a model with the option mean_velocity")
        if self.control_embedder is not None and control is not None:
            c = c + self.control_embedder(control, unshifted_t)
        label = self.y_embedder(y, drop)                              # [N, D] or [N, K D]
        if self.class_tokens:
            return c, label.unflatten(1, (self.class_tokens, self.hidden_size))
        no_tokens = c.new_empty(len(c), 0, self.hidden_size)
        return c + label, no_tokens

    def unpatchify(self, x):                                          # [N, T, P*P*C]
        G, P, C = self.grid, self.patch_size, self.outputs * self.in_channels
        x = x.reshape(-1, G, G, P, P, C).permute(0, 5, 1, 3, 2, 4)    # [N, C, G, P, G, P]
        return x.reshape(-1, C, G * P, G * P)                         # [N, C, H, W]

    def control_time(self, t):
        """Returns the time before any shift, on which the weight of the control depends."""
        return shift_time(t, 1 / self.time_shift)

    def run_block(self, block, x, c):
        """Runs one block. Every block of every architecture runs here, even in SD-DiT's decoder.

        For gradient checkpointing, return this instead:
            torch.utils.checkpoint.checkpoint(block, x, c, use_reentrant=False)
        Then lower KEPT, too: files.check_memory would refuse what fits only with checkpointing.
        """
        return block(x, c)

    def run_blocks(self, x, c, return_blocks=()):
        """Returns the tokens after the last block, and {b: tokens after block b} for return_blocks.

        The tokens are K class tokens, then T patches: [N, K + T, D].
        """
        kept = {}
        for b, block in enumerate(self.blocks, start=1):
            x = self.run_block(block, x, c)
            if b in return_blocks:
                kept[b] = x
        return x, kept

    def forward(self, x_t, t, y, drop=None, control=None, return_blocks=None, r=None):
        """Returns the velocity [N, C, H, W] of noisy latents x_t at times t [N] for classes y [N].

        t = 1 is noise. drop [N] bool says which labels become the null class. control [N, 7]: see
        ControlEmbedder.

        return_blocks: None, or a list of block numbers, counted from 1. With a list, even an empty
        one, it returns the velocity and a list of the tokens [N, T, D] after these blocks, in this
        order. Raises KeyError if there is no such block.

        A model with the option `mean_velocity` is MeanFlow's (arXiv 2505.13447). It returns the
        mean velocity u(x_t, r, t) from time r [N] to t. By default r = t, where u is the velocity.
        Raises ValueError for an r without this option.
        """
        c, class_sequence = self.condition(t, self.control_time(t), y, drop, control, r)
        patches = self.x_embedder(x_t) + self.pos_embed               # [N, T, D]
        tokens = torch.cat([class_sequence, patches], dim=1)          # [N, K + T, D]

        tokens, kept = self.run_blocks(tokens, c, return_blocks or ())

        K = self.class_tokens
        v = self.unpatchify(self.final_layer(tokens[:, K:], c))       # [N, C, H, W]
        if return_blocks is None:
            return v
        return v, [kept[b][:, K:] for b in return_blocks]


# ---- DiverseDiT
class LongResidual(nn.Module):
    """R of DiverseDiT: x <- Linear(LayerNorm([x, skip])), without an identity path.

    So it forgets the scale of its input: at initialisation its output has RMS sqrt(4/3).
    """

    def __init__(self, hidden_size):
        super().__init__()
        self.norm = nn.LayerNorm(2 * hidden_size, eps=1e-6)
        self.linear = nn.Linear(2 * hidden_size, hidden_size)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x, skip):                                       # [N, T, D] each
        fused = self.linear(self.norm(torch.cat([x, skip], dim=-1)))
        return fused.to(x.dtype)  # keeps the residual stream in fp32 under autocast


class DiverseDiT(DiT):
    """DiT whose deep half receives the inputs of the shallow half (arXiv 2603.04239, Eq. 8).

    Each block of the shallow half puts its input on a stack, and each block of the deep half takes
    one off: just before it runs, its own input x becomes R([x, the input taken off]). So of L
    blocks, block L/2 + 1 gets the input of block L/2, and the last block gets that of the first,
    the patch embedding. A plain DiT checkpoint lacks only `long_residuals`.

    official code: train.py fuses after the block has run, with its output / here: R fuses before
    the block runs, because Eq. 8 and its index range say so, and because the authors' second model
    file pairs the blocks the same way.
    """

    def __init__(self, **options):
        """Raises ValueError if the number of blocks is odd."""
        super().__init__(**options)
        depth = len(self.blocks)
        if depth % 2:
            raise ValueError(f"depth {depth} is odd, but long residuals pair the blocks")
        self.long_residuals = nn.ModuleList(
            LongResidual(self.hidden_size) for _ in range(depth // 2)
        )

    def run_blocks(self, x, c, return_blocks=()):
        half = len(self.blocks) // 2
        skips = []
        kept = {}
        for b, block in enumerate(self.blocks, start=1):
            if b <= half:
                skips.append(x)
            else:
                x = self.long_residuals[b - half - 1](x, skips.pop())  # [N, K + T, D]
            x = self.run_block(block, x, c)
            if b in return_blocks:
                kept[b] = x
        return x, kept


# ---- SD-DiT
def edm_coefficients(sigma, sigma_data=0.5):
    """Returns EDM's c_skip, c_out, c_in, c_noise (arXiv 2206.00364), each of the shape of sigma.

    The denoiser is D = c_skip x + c_out F(c_in x, c_noise).
    """
    variance = sigma**2 + sigma_data**2
    std = variance.sqrt()
    c_skip = sigma_data**2 / variance
    c_out = sigma * sigma_data / std
    c_in = 1 / std
    c_noise = sigma.log() / 4
    return c_skip, c_out, c_in, c_noise


class ZeroNullLabelEmbedder(LabelEmbedder):
    """A LabelEmbedder whose null class is the zero vector, without a row (MaskDiT, SD-DiT)."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__(num_classes, hidden_size, dropout_prob)
        self.embedding_table = nn.Embedding(num_classes, hidden_size)

    def embed(self, y):
        known = (y < self.num_classes).unsqueeze(1)
        return self.embedding_table(y.clamp(max=self.num_classes - 1)) * known


class SDDiT(DiT):
    """Encoder on a CLS token and visible patches, decoder on all patches, EDM (arXiv 2403.17004).

    The DiT's blocks are the encoder. Masked patches skip it and are put back, as noised embeddings,
    before the decoder, whose width is the same for every size. The network predicts F of EDM's
    D = c_skip x + c_out F (see edm_coefficients). V is the number of visible patches.

    paper: it does not state the width of the 8 decoder blocks / here: it is 512, as in MaskDiT.
    paper: it does not state where masked patches rejoin / here: they rejoin at the encoder's width.
    paper: it does not state where the CLS token goes / here: the encoded token is added to the
    decoder's condition.
    We made these choices because, with the head, they give the published 740.6M parameters of XL/2.
    """

    def __init__(
        self,
        decoder_depth=8,
        decoder_width=512,
        decoder_heads=16,
        cls_condition=True,  # False leaves the CLS token out of the decoder's condition
        qk_norm=False,  # in the encoder and in the decoder
        **options,  # those of DiT
    ):
        super().__init__(qk_norm=qk_norm, **options)
        width = self.hidden_size
        self.y_embedder = ZeroNullLabelEmbedder(  # replaces DiT's
            self.num_classes,
            self.y_embedder.embedding_table.embedding_dim,
            self.y_embedder.dropout_prob,
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.cls_embedder = nn.Linear(width, width) if cls_condition else None

        # a modulated norm and a linear map from the encoder's width to the decoder's
        self.decoder_embed = FinalLayer(width, decoder_width)
        self.decoder_pos_embed = self.positions(decoder_width)
        self.decoder_blocks = nn.ModuleList(
            DiTBlock(decoder_width, decoder_heads, qk_norm=qk_norm, cond_size=width)
            for _ in range(decoder_depth)
        )
        self.final_layer = FinalLayer(
            decoder_width, self.patch_size**2 * self.in_channels, cond_size=width
        )
        self.initialize_weights()
        nn.init.normal_(self.cls_token, std=0.02)

    def encode(self, x, sigma, y, drop=None, visible=None, control=None):
        """Returns the encoded tokens [N, 1 + V, D], all patch embeddings [N, T, D] and c [N, D].

        The tokens are CLS and the visible patches. visible [N, V] has the indices of these patches.
        With None, all are visible.
        """
        _, _, c_in, c_noise = edm_coefficients(sigma)
        # the t of flow matching at the unshifted noise level, sigma / time_shift
        unshifted_t = sigma / (self.time_shift + sigma)
        c, class_sequence = self.condition(c_noise, unshifted_t, y, drop, control)

        patches = self.x_embedder(c_in.view(-1, 1, 1, 1) * x) + self.pos_embed
        visible_patches = patches                                     # [N, V, D]
        if visible is not None:
            visible_patches = patches.take_along_dim(visible.unsqueeze(2), dim=1)
        cls = self.cls_token.expand(len(x), -1, -1)                   # [N, 1, D]
        tokens = torch.cat([class_sequence, cls, visible_patches], dim=1)  # [N, K + 1 + V, D]
        tokens, _ = self.run_blocks(tokens, c)
        return tokens[:, self.class_tokens :], patches, c

    def forward(self, x, sigma, y, drop=None, control=None, visible=None, return_tokens=False):
        """Returns F [N, C, H, W] of noisy latents x at noise levels sigma [N] for classes y [N].

        drop, control: see DiT.forward. visible: see encode. With return_tokens, it returns F and
        the encoded tokens.
        """
        encoded, patches, c = self.encode(x, sigma, y, drop, visible, control)
        if self.cls_embedder is not None:
            cls = nn.functional.layer_norm(encoded[:, 0], (self.hidden_size,), eps=1e-6)
            c = c + self.cls_embedder(cls)

        tokens = encoded[:, 1:]                                       # [N, V, D]
        if visible is not None:
            # puts the encoded patches back among the masked ones, which keep their embeddings
            index = visible.unsqueeze(2).expand_as(tokens)
            tokens = patches.scatter(1, index, tokens)                # [N, T, D]
        tokens = self.decoder_embed(tokens, c) + self.decoder_pos_embed  # [N, T, decoder_width]
        for block in self.decoder_blocks:
            tokens = self.run_block(block, tokens, c)
        output = self.unpatchify(self.final_layer(tokens, c))         # [N, C, H, W]
        if return_tokens:
            return output, encoded
        return output


# ---- DiT's own network, which predicts noise
class DDPMStep(NamedTuple):
    """The numbers of a timestep k, and of the sampling step from k to l, the next lower timestep.

    x_k = alpha_k x + sigma_k eps, with alpha_k^2 + sigma_k^2 = 1. For the lowest k, x_l is the
    image itself: alpha_l = 1 and sigma_l = 0. Given x and x_k, x_l is normal: its mean is c1 x +
    c2 x_k, its variance beta_tilde (arXiv 2006.11239, Eq. 7). The fields are floats, or tensors of
    one shape.
    """

    k: float
    alpha: float  # alpha_k
    sigma: float  # sigma_k
    log_beta: float  # beta = 1 - alpha_k^2 / alpha_l^2
    log_beta_tilde: float  # beta_tilde = beta sigma_l^2 / sigma_k^2
    c1: float  # beta alpha_l / sigma_k^2
    c2: float  # sqrt(1 - beta) sigma_l^2 / sigma_k^2

    def log_variance(self, mix):
        """Returns the log-variance of a sampling step, from the model's channels for it.

        mix [N, C, H, W]: 1 stands for log beta and -1 for log beta_tilde (arXiv 2102.09672, Eq.
        15). Nothing is clamped.
        """
        fraction = (mix + 1) / 2
        return fraction * self.log_beta + (1 - fraction) * self.log_beta_tilde


def ddpm_schedule(steps=1000):
    """Returns DiT's 1000 timesteps, or `steps` >= 2 of them, evenly spaced: a list of DDPMStep.

    The list goes from data to noise, from k = 0 to k = 999. At k = 0 beta_tilde is 0, so its
    logarithm is replaced by that of the next step (arXiv 2102.09672).
    """
    all_alpha = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))
    k = np.linspace(0, 999, steps).round()
    alpha = all_alpha[k.astype(int)]                                  # [steps], as all below
    alpha_l = np.append(1.0, alpha[:-1])
    variance = 1 - alpha**2
    variance_l = 1 - alpha_l**2

    beta = 1 - (alpha / alpha_l) ** 2
    beta_tilde = beta * variance_l / variance
    beta_tilde[0] = beta_tilde[1]
    c1 = beta * alpha_l / variance
    c2 = alpha / alpha_l * variance_l / variance
    fields = (k, alpha, np.sqrt(variance), np.log(beta), np.log(beta_tilde), c1, c2)
    return [DDPMStep(*values) for values in np.stack(fields, axis=1).tolist()]


class NoiseDiT(DiT):
    """DiT's own network (arXiv 2212.09748): it predicts eps, and is a velocity model as well.

    `predict` reads x_k = alpha x + sigma eps at a timestep k (see DDPMStep). Its first C output
    channels are eps, and the others set the variance of a step (see DDPMStep.log_variance).

    `forward` turns eps into a velocity. Divided by alpha + sigma, x_k is flow matching's
        x_t = (1 - t) x + t eps  with  t = sigma / (alpha + sigma).
    So x = (x_t - t eps) / (1 - t), and v = eps - x = (eps - x_t) / (1 - t). The way back from x_t
    is x_k = x_t / hypot(1 - t, t), because alpha^2 + sigma^2 = 1.

    So the samplers of flow matching can draw from this model. They start at `first_time`, the
    largest t of DiT's schedule, and use no variance. Below the smallest t, 0.0099, the timestep
    stays 0.
    """

    outputs = 2

    def __init__(self, **options):
        super().__init__(**options)
        schedule = ddpm_schedule()
        last = schedule[-1]
        self.first_time = last.sigma / (last.alpha + last.sigma)  # 0.9937
        table = torch.tensor(schedule, dtype=torch.float64)           # [1000, fields]
        self.register_buffer("schedule", table, persistent=False)
        steps = DDPMStep(*table.T)
        logit_t = -(steps.alpha / steps.sigma).log()                  # [1000], rising
        self.register_buffer("logit_t", logit_t, persistent=False)

    def steps_at(self, k):
        """Returns the DDPMStep of timesteps k [N], int64. Its fields are fp32 [N, 1, 1, 1]."""
        table = self.schedule[k].float()                              # [N, fields]
        fields = [column.view(-1, 1, 1, 1) for column in table.unbind(1)]
        return DDPMStep(*fields)

    def timestep(self, t):
        """Returns the timesteps [N] of times t [N], interpolated in logit t = -log-SNR / 2."""
        logit_t = t.double().logit()
        i = torch.searchsorted(self.logit_t, logit_t).clamp(1, 999)
        left = self.logit_t[i - 1]
        right = self.logit_t[i]
        share = (logit_t - left) / (right - left)
        return (i - 1 + share.clamp(0, 1)).float()

    def control_time(self, k):
        """Returns the t of flow matching at the timesteps k [N]: the inverse of `timestep`."""
        left = k.long()
        right = (left + 1).clamp(max=999)
        logit_t = torch.lerp(self.logit_t[left], self.logit_t[right], k.double() - left)
        return torch.sigmoid(logit_t).float()

    def predict(self, x_k, k, y, **options):
        """Returns eps and the variance's channels, [N, 2 C, H, W], of x_k at timesteps k [N].

        options: see DiT.forward; with return_blocks, it returns the tokens as well.
        """
        return super().forward(x_k, k, y, **options)

    def predict_at(self, x_k, t, y, control=None):
        """Does the same at the times t [N] of whole timesteps."""
        return self.predict(x_k, self.timestep(t).round(), y, control=control)

    def forward(self, x_t, t, y, drop=None, control=None, return_blocks=None):
        """Does what DiT.forward does, at times 0 < t <= first_time."""
        t_image = t.view(-1, 1, 1, 1)
        x_k = x_t / torch.hypot(1 - t_image, t_image)
        blocks = return_blocks or ()
        output, tokens = self.predict(
            x_k, self.timestep(t), y, drop=drop, control=control, return_blocks=blocks
        )
        eps = output[:, : self.in_channels]
        v = (eps - x_t) / (1 - t_image)                               # [N, C, H, W]
        if return_blocks is None:
            return v
        return v, tokens


# ---- Building from a config
ARCHITECTURES = {"DiT": DiT, "DiverseDiT": DiverseDiT, "SDDiT": SDDiT, "NoiseDiT": NoiseDiT}


def parse_model(name):
    """Returns the keyword arguments that `--model SIZE/PATCH`, such as XL/2, stands for.

    Raises ValueError for any other text.
    """
    size, _, patch = name.partition("/")
    if size not in SIZES or not patch.isdecimal() or int(patch) == 0:
        raise ValueError(
            f"--model {name!r}: expected SIZE/PATCH, such as XL/2; sizes: {', '.join(SIZES)}"
        )
    depth, hidden_size, num_heads = SIZES[size]
    return {
        "patch_size": int(patch),
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": num_heads,
    }


def build(config):
    """Builds the model of a checkpoint's `config`.

    config: {"arch": a key of ARCHITECTURES, keyword: argument, ...}.
    Raises ValueError for an unknown architecture and TypeError for an unknown keyword.
    """
    options = dict(config)
    arch = options.pop("arch")
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}, not one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[arch](**options)


# ---- Inheriting from another model
def inherit_config(config, other_config):
    """Returns what the model of `config` takes over from one trained at another resolution.

    This is the grid of the other model's positions, and its time shift times the ratio of the two
    sides (arXiv 2411.03177). The ratio counts as 1 if the numbers of channels differ, because the
    sides of two kinds of latents do not compare, and for a NoiseDiT, whose timesteps are fixed.
    Raises ValueError if patch size, width, depth or heads differ: most weights would not fit.
    """
    for key in ("patch_size", "hidden_size", "depth", "num_heads"):
        if other_config[key] != config[key]:
            raise ValueError(
                f"--init: {key} is {other_config[key]} there, {config[key]} in the model to train"
            )
    grid = other_config["input_size"] // other_config["patch_size"]
    ratio = 1
    same_latents = other_config["in_channels"] == config["in_channels"]
    if same_latents and config["arch"] != "NoiseDiT":
        ratio = config["input_size"] / other_config["input_size"]
    return {
        "pos_base": other_config.get("pos_base") or grid,
        "time_shift": other_config.get("time_shift", 1.0) * ratio,
    }


def inherit_weights(model, state, same_classes=True):
    """Copies from `state` what fits by name and shape. Returns a line that says what was loaded.

    Position tables are not copied, because the model has computed its own. With same_classes=False
    the label table is not copied either, because its rows mean the classes of another data set.
    """
    own = model.state_dict()
    common = own.keys() & state.keys()
    positions = {name for name in common if name.endswith("pos_embed")}
    fits = {name for name in common if own[name].shape == state[name].shape}
    copied = fits - positions
    if not same_classes:
        copied.discard("y_embedder.embedding_table.weight")
    model.load_state_dict({name: state[name] for name in copied}, strict=False)

    line = f"{len(copied)} tensors loaded"
    groups = {
        "resized": positions - fits,  # the model's own table of another grid replaces them
        "new": own.keys() - copied - positions,
        "unused": state.keys() - copied - positions,
    }
    for kind, names in groups.items():
        parts = sorted({name.split(".")[0] for name in names})
        line += f"; {kind}: {', '.join(parts) or 'none'}"
    return line


# ---- What a model costs
def forward_flops(config, call="forward", **options):
    """Returns the FLOPs of one model.forward(..., **options) for one image.

    `call` names another method. A multiply-accumulate counts as 2.
    """
    side = config["input_size"]
    with torch.device("meta"):
        method = getattr(build(config), call)
        x = torch.zeros(1, config["in_channels"], side, side)
        y = torch.zeros(1, dtype=torch.int64)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            method(x, torch.ones(1), y, **options)
    return counter.get_total_flops()


# KEPT[precision, compiled] is the number of bytes that the forward pass keeps for the backward
# pass, for each channel of each token in each block
KEPT = {("bf16", False): 50, ("bf16", True): 38, ("fp32", False): 82, ("fp32", True): 70}


def training_memory(config, images, precision, compiled=False, visible=1.0, gradients_stay=False):
    """Returns the bytes that a training step on `images` images at once needs, to about 10 %.

    precision: "bf16" or "fp32". visible: share of the patches that SD-DiT's student sees.

    A parameter takes
        16 bytes for the weight, Adam's two moments and the average
        2 bytes for autocast's copy, in bf16 only
        4 bytes for its gradient
    Gradients appear while the backward pass frees what the blocks have kept, so only the larger of
    the two counts. With gradients_stay both count, because some gradients are there before the
    pass begins: those of earlier micro-batches, or DDP's buckets.
    The constants are fitted to the peaks of PyTorch's allocator on a simulated GPU, for XL/2 at 256
    px with flash attention.
    """
    with torch.device("meta"):
        model = build(config)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = (config["input_size"] // config["patch_size"]) ** 2
    kept = KEPT[precision, compiled]
    values = visible * tokens * config["depth"] * config["hidden_size"]
    copies = 2 if precision == "bf16" else 0
    states = (16 + copies) * parameters
    if config["arch"] == "DiverseDiT":
        kept += 15  # for its loss and its long residuals
    if config["arch"] == "SDDiT":
        decoder = sum(p.numel() for p in model.decoder_blocks.parameters())
        states += (4 + copies) * (parameters - decoder)  # the teacher is an encoder
        values += tokens * len(model.decoder_blocks) * model.decoder_pos_embed.shape[-1]
    gradients = 4 * parameters
    activations = images * kept * values
    if gradients_stay:
        return states + gradients + activations
    return states + max(gradients, activations)
