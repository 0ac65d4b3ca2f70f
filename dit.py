"""The diffusion transformer: its embedders, its block, and every architecture that is trained here.

    DiT         the adaLN-Zero transformer of DiT (arXiv 2212.09748), as used by SiT (2401.08740)
                and REPA (2410.06940)
    DiverseDiT  DiT with long residual connections (2603.04239)
    SDDiT       masked encoder, decoder and EDM preconditioning of SD-DiT (2403.17004)
    NoiseDiT    a DiT that predicts the noise, used as a velocity model (2212.09748)

The first three have the control conditioning of arXiv 2411.03177, and all have its transfer to a
higher resolution. Nothing here reads a file, knows about processes or holds a loss. `build(config)`
makes a model from the `config` of its checkpoint. State dicts are those of the official DiT / SiT /
REPA checkpoints.

Every file says where it deviates from a paper or from the authors' code, always in this form:
    paper: what the paper says / official code: what the authors' code does / here: what this file
    does, because ...
A part is left out if there is nothing to say.

Shapes stand in the right margin. N: batch. C, H, W: channels, height and width of the latent.
P: side of a patch. G = H/P: side of the grid. T = G G: number of patches. D: width of the network
(hidden_size). K: number of class tokens. V: number of visible patches (SD-DiT).
"""

import math

import numpy as np
import torch
import torch.nn as nn
from timm.layers import Attention, Mlp, PatchEmbed
from torch.utils.flop_counter import FlopCounterMode

SIZES = {  # name: (blocks, width, heads)
    "nano": (6, 128, 4),  # our own size, for laptops and tests; the others are DiT's
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}


# ---- Small functions
def sincos_positions(side, width, base=None):
    """Fixed 2-D sin-cos positions of a `side` x `side` grid of tokens: float64 [side^2, width].

    The first half of the channels encodes the column, the second half the row. Each half holds the
    sines, then the cosines. Position i counts as i base / side. If `base` is the grid of a model
    trained at a lower resolution, the image keeps its extent (interpolation, arXiv 2411.03177).
    With the default, `side`, positions continue beyond that grid (extrapolation).
    paper: "adjusts the sampling grid" / here: without half-pixel shift.
    ValueError if the width does not divide.
    """
    if width % 4:
        raise ValueError(f"width {width} must be a multiple of 4: sines, cosines, columns, rows")
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    positions = np.arange(side) * (base or side) / side
    angles = np.outer(positions, frequencies)                         # (side, D/4)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)   # (side, D/2)
    column = np.tile(axis, (side, 1))                                 # (side^2, D/2)
    row = np.repeat(axis, side, axis=0)                               # (side^2, D/2)
    return np.concatenate([column, row], axis=1)


def modulate(x, shift, scale):
    """Shift and scale all tokens x [N, T, D] of an image alike; shift and scale are [N, D]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def shift_time(t, s):
    """Time t' at which an image s times as wide looks as noisy as this one does at time t.

    A wider image averages away s^2 times more noise, so that SNR(t') = SNR(t) / s^2.
    This is the law of arXiv 2411.03177 (figure A1) in the closed form of SD3 (2403.03206).
    Its inverse is the shift by 1 / s.
    """
    return s * t / (1 + (s - 1) * t)


def edm_coefficients(sigma, sigma_data=0.5):
    """c_skip, c_out, c_in, c_noise of D = c_skip x + c_out F(c_in x, c_noise): arXiv 2206.00364."""
    total = sigma**2 + sigma_data**2
    c_skip = sigma_data**2 / total
    c_out = sigma * sigma_data / total.sqrt()
    c_in = 1 / total.sqrt()
    c_noise = sigma.log() / 4
    return c_skip, c_out, c_in, c_noise


def without_autocast(tensor):
    """A context in which autocast is off on the device of this tensor."""
    return torch.autocast("cuda" if tensor.is_cuda else "cpu", enabled=False)


# ---- Embedders
class Sinusoids(nn.Module):
    """Numbers [...] -> [cos | sin] of angles, periods 2 pi to 2 pi 10000: [..., 2 frequencies]."""

    def __init__(self, frequencies=128):
        super().__init__()
        steps = torch.arange(frequencies, dtype=torch.float32)
        omega = torch.exp(-math.log(10000.0) * steps / frequencies)
        self.register_buffer("omega", omega, persistent=False)

    def forward(self, values):
        angles = values.float().unsqueeze(-1) * self.omega
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sinusoid_mlp(numbers, hidden_size):
    """Two-layer MLP that reads 256 sinusoids of each number."""
    return nn.Sequential(
        nn.Linear(256 * numbers, hidden_size),
        nn.SiLU(),
        nn.Linear(hidden_size, hidden_size),
    )


class TimestepEmbedder(nn.Module):
    """Time t -> sinusoids -> MLP.

    Flow matching feeds t in [0, 1], not times 1000. In SiT and REPA this was not intended (SiT#24,
    REPA#40), but their checkpoints need it. It is computed in fp32, also under autocast.
    """

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = sinusoid_mlp(1, hidden_size)
        self.sinusoids = Sinusoids()

    def forward(self, t):                                             # (N,)
        with without_autocast(t):
            return self.mlp(self.sinusoids(t))                        # (N, D)


class ControlEmbedder(nn.Module):
    """Tells the network the original size, the crop and the flip of an image (arXiv 2411.03177).

    So images of low resolution can be used in training without teaching blur. The condition c gains
        gamma(t) low(h0, w0) + high(top / h0, left / w0, h / h0, w / w0, flip)
        gamma(t) = (1 - cos(pi (1 - t)^alpha)) / 2,  t = 1 noise, t = 0 data       mode "cosine"
        gamma(t) = 1, the micro-conditioning of SDXL (2307.01952)                  mode "constant"

    Sharpness is decided late in sampling, so the weight of the size is 0 at pure noise. Crop and
    flip move the layout, which is decided early, so their weight is 1. A row of zeros means no
    control: it adds 0.
    paper: curves from 0 at t = 1 to 1 at t = 0 with a parameter alpha (figure 3) / here: a
    power-cosine that fits them. Its formula, and the weight 1 and scale 1000 of crop and flip, are
    reconstructed, not read.
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
        self.low = sinusoid_mlp(2, hidden_size)
        self.high = sinusoid_mlp(5, hidden_size)

    def gamma(self, t):                                               # (N,)
        if self.mode == "constant":
            return torch.ones_like(t)
        return (1 - torch.cos(torch.pi * (1 - t).clamp(0, 1) ** self.alpha)) / 2

    def forward(self, control, t):
        """control [N, 7]: h0, w0, top, left, h, w in original pixels, flip 0 or 1; t [N]: time.

        Returns what c gains: [N, D] in fp32.
        """
        with without_autocast(t):
            h0, w0, top, left, h, w, flip = control.float().unbind(1)  # (N,) each
            height = h0.clamp(min=1)  # no 0 / 0 in a row of zeros
            width = w0.clamp(min=1)

            size = torch.stack([h0, w0], dim=1).clamp(max=4096)
            fractions = [top / height, left / width, h / height, w / width, flip]
            layout = 1000 * torch.stack(fractions, dim=1)             # (N, 5)
            low = self.low(self.sinusoids(size).flatten(1))           # (N, D)
            high = self.high(self.sinusoids(layout).flatten(1))       # (N, D)

            given = (h0 > 0).unsqueeze(1)
            return given * (self.gamma(t.float()).unsqueeze(1) * low + high)


class LabelEmbedder(nn.Module):
    """Class label -> row of a table; the last row is the null class of classifier-free guidance."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        rows = num_classes + (1 if dropout_prob > 0 else 0)           # one more for the null class
        self.embedding_table = nn.Embedding(rows, hidden_size)

    def forward(self, y, drop=None):
        """drop [N] bool: labels that become null; training draws it with `dropout_prob`."""
        if drop is not None and self.dropout_prob > 0:
            y = torch.where(drop, self.num_classes, y)
        return self.embed(y)                                          # (N, D)

    def embed(self, y):
        return self.embedding_table(y)


class ZeroNullLabelEmbedder(LabelEmbedder):
    """The null class is the zero vector and has no row in the table (MaskDiT, SD-DiT)."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__(num_classes, hidden_size, dropout_prob)
        self.embedding_table = nn.Embedding(num_classes, hidden_size)

    def embed(self, y):
        known = (y < self.num_classes).unsqueeze(1)
        return self.embedding_table(y.clamp(max=self.num_classes - 1)) * known


# ---- Block and final layer
class DiTBlock(nn.Module):
    """adaLN-Zero block: c, of width cond_size, gives shift, scale and gate of both branches."""

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0, qk_norm=False, cond_size=None):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"width {hidden_size} does not divide into {num_heads} heads")
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(
            hidden_size, num_heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm
        )
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        mlp_size = int(hidden_size * mlp_ratio)
        self.mlp = Mlp(hidden_size, mlp_size, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(),
            nn.Linear(cond_size or hidden_size, 6 * hidden_size),
        )

    def forward(self, x, c):                                          # (N, T, D), (N, D)
        modulation = self.adaLN_modulation(c)                         # (N, 6 D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x


class FinalLayer(nn.Module):
    """Modulated LayerNorm and a linear map of every token to `out_size` values."""

    def __init__(self, hidden_size, out_size, cond_size=None):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, out_size)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(),
            nn.Linear(cond_size or hidden_size, 2 * hidden_size),
        )

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (N, T, out_size)


# ---- Architectures
class DiT(nn.Module):
    """Diffusion transformer with adaLN-Zero blocks. Keyword arguments are the official ones.

    It predicts as many channels as it reads, as in REPA. (DiT and SiT add variance channels.)
    """

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
        class_tokens=0,  # 0 adds the class to c, K feeds it as K extra tokens
        pos_base=None,  # see sincos_positions
        time_shift=1.0,  # see shift_time
    ):
        """ValueError if the sizes do not divide, or if control or control_alpha is out of range."""
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
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        self.control_embedder = None
        if control != "none":
            self.control_embedder = ControlEmbedder(hidden_size, control, control_alpha)
        self.initialize_weights()

    def initialize_weights(self):
        """Xavier, small normal embeddings, and the zeros of adaLN-Zero: the first output is 0."""
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
        mlp = self.t_embedder.mlp
        for layer in (self.y_embedder.embedding_table, mlp[0], mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)

        if self.control_embedder:
            for mlp in (self.control_embedder.low, self.control_embedder.high):
                nn.init.normal_(mlp[0].weight, std=0.02)
                nn.init.zeros_(mlp[2].weight)

    def positions(self, width):
        """The fixed position table of this model's grid."""
        table = sincos_positions(self.grid, width, self.pos_base)
        table = torch.tensor(table[None], dtype=torch.float32)        # (1, T, width)
        return nn.Parameter(table, requires_grad=False)

    def condition(self, t, unshifted_t, y, drop, control):
        """Condition c [N, D], and the class tokens [N, K, D] that go before the patches.

        t [N] is embedded. unshifted_t [N], the time before any shift, weighs the control vector.
        """
        c = self.t_embedder(t)                                        # (N, D)
        classes = self.y_embedder(y, drop)                            # (N, D) or (N, K D)
        if self.control_embedder and control is not None:
            c = c + self.control_embedder(control, unshifted_t)
        if self.class_tokens:
            return c, classes.unflatten(1, (self.class_tokens, self.hidden_size))
        no_tokens = c.new_empty(len(c), 0, self.hidden_size)  # the caller can always concatenate
        return c + classes, no_tokens

    def unpatchify(self, x):                                          # (N, T, P*P*C)
        G, P, C = self.grid, self.patch_size, self.in_channels
        x = x.reshape(-1, G, G, P, P, C).permute(0, 5, 1, 3, 2, 4)    # (N, C, G, P, G, P)
        return x.reshape(-1, C, G * P, G * P)                         # (N, C, H, W)

    def run_block(self, block, x, c):
        """Every transformer block of every architecture is run here, those of SD-DiT's decoder too.

        This is the place for gradient checkpointing: return
        torch.utils.checkpoint.checkpoint(block, x, c, use_reentrant=False) instead.
        """
        return block(x, c)

    def run_blocks(self, x, c):
        """Yields the tokens [N, K + T, D] after each block."""
        for block in self.blocks:
            x = self.run_block(block, x, c)
            yield x

    def forward(self, x, t, y, drop=None, control=None, return_blocks=None):
        """Velocity of noisy latents x [N, C, H, W] at times t [N] (1 is noise) for classes y [N].

        drop [N] bool: labels replaced by the null class. control [N, 7]: see ControlEmbedder.
        return_blocks: numbers of blocks, from 1. The result is then the velocity and a list of the
        tokens [N, T, D] after these blocks, in this order. KeyError if there is no such block.
        """
        unshifted_t = shift_time(t, 1 / self.time_shift)
        c, classes = self.condition(t, unshifted_t, y, drop, control)
        patches = self.x_embedder(x) + self.pos_embed                 # (N, T, D)
        h = torch.cat([classes, patches], dim=1)                      # (N, K + T, D)

        outputs = {}
        for number, tokens in enumerate(self.run_blocks(h, c), start=1):
            if return_blocks is not None and number in return_blocks:
                outputs[number] = tokens                              # (N, K + T, D)

        K = self.class_tokens
        v = self.unpatchify(self.final_layer(tokens[:, K:], c))       # (N, C, H, W)
        if return_blocks is None:
            return v
        return v, [outputs[number][:, K:] for number in return_blocks]


class LongResidual(nn.Module):
    """R_k of DiverseDiT: Linear(LayerNorm([stream; skip])) replaces the stream.

    There is no identity path. At initialisation its output has RMS sqrt(4/3), whatever the scale of
    its input.
    """

    def __init__(self, hidden_size):
        super().__init__()
        self.norm = nn.LayerNorm(2 * hidden_size, eps=1e-6)
        self.linear = nn.Linear(2 * hidden_size, hidden_size)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x, skip):                                       # (N, T, D) each
        fused = self.linear(self.norm(torch.cat([x, skip], dim=-1)))
        return fused.to(x.dtype)  # keeps the residual stream in fp32 under autocast


class DiverseDiT(DiT):
    """DiT whose deep half receives the inputs of the shallow half (arXiv 2603.04239, Eq. 8).

    Blocks count from 1. Of L blocks, block 1 feeds block L, block 2 feeds L - 1, and so on: just
    before block L - i runs, i = 0 .. L/2 - 1, its input is replaced by R([its input; input of block
    1 + i]). So the last block sees the patch embedding again. A plain DiT checkpoint lacks only
    `long_residuals`.
    official code: train.py fuses after the block has run, with its output / here: before, because
    Eq. 8 and its index range say so, and the authors' second model file pairs the blocks the same
    way.
    """

    def __init__(self, **options):
        """ValueError if the number of blocks is odd."""
        super().__init__(**options)
        depth = len(self.blocks)
        if depth % 2:
            raise ValueError(f"depth {depth} is odd, but long residuals pair the blocks")
        self.long_residuals = nn.ModuleList(
            LongResidual(self.hidden_size) for _ in range(depth // 2)
        )

    def run_blocks(self, x, c):
        half = len(self.blocks) // 2
        skips = []
        for i, block in enumerate(self.blocks):
            if i < half:
                skips.append(x)
            else:
                x = self.long_residuals[i - half](x, skips.pop())     # (N, T, D)
            x = self.run_block(block, x, c)
            yield x


class SDDiT(DiT):
    """Encoder on a CLS token and visible patches, decoder on all patches, EDM (arXiv 2403.17004).

    The DiT's blocks are the encoder. Masked patches skip it and are put back, as noised embeddings,
    before the decoder, whose width is the same for every size. The network predicts F of EDM's
    D = c_skip x + c_out F (see edm_coefficients).
    paper: 8 decoder blocks; their width, where masked patches rejoin and the CLS path are not
    stated / here: width 512 as in MaskDiT, masked patches rejoin at the encoder's width, and the
    encoded CLS token is added to the decoder's condition. With the head these choices give the
    published 740.6M parameters of XL/2.
    """

    def __init__(
        self,
        decoder_depth=8,
        decoder_width=512,
        decoder_heads=16,
        cls_condition=True,  # False leaves the CLS token out of the decoder's condition
        qk_norm=False,  # in both
        **options,  # of DiT
    ):
        super().__init__(qk_norm=qk_norm, **options)
        width = self.hidden_size
        self.y_embedder = ZeroNullLabelEmbedder(
            self.num_classes,
            self.y_embedder.embedding_table.embedding_dim,
            self.y_embedder.dropout_prob,
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.cls_embedder = nn.Linear(width, width) if cls_condition else None

        self.decoder_embed = FinalLayer(width, decoder_width)
        self.decoder_pos_embed = self.positions(decoder_width)
        self.decoder_blocks = nn.ModuleList(
            DiTBlock(decoder_width, decoder_heads, qk_norm=qk_norm, cond_size=width)
            for _ in range(decoder_depth)
        )
        out_size = self.patch_size**2 * self.in_channels
        self.final_layer = FinalLayer(decoder_width, out_size, cond_size=width)
        self.initialize_weights()
        nn.init.normal_(self.cls_token, std=0.02)

    def encode(self, x, sigma, y, drop=None, visible=None, control=None):
        """Encoded tokens [N, 1 + V, D], patch embeddings [N, T, D] and condition [N, D].

        The tokens are CLS and the visible patches. visible [N, V]: their indices; None for all.
        """
        _, _, c_in, c_noise = edm_coefficients(sigma)
        # flow matching's t at this noise level, before any shift
        unshifted_t = sigma / (self.time_shift + sigma)
        c, classes = self.condition(c_noise, unshifted_t, y, drop, control)

        patches = self.x_embedder(c_in.view(-1, 1, 1, 1) * x) + self.pos_embed  # (N, T, D)
        seen = patches
        if visible is not None:
            index = visible.unsqueeze(2).expand(-1, -1, self.hidden_size)
            seen = patches.gather(1, index)                           # (N, V, D)
        cls = self.cls_token.expand(len(x), -1, -1)                   # (N, 1, D)
        h = torch.cat([classes, cls, seen], dim=1)                    # (N, K + 1 + V, D)
        for tokens in self.run_blocks(h, c):
            h = tokens                                                # ends with the last block's
        return h[:, self.class_tokens :], patches, c

    def forward(self, x, t, y, drop=None, control=None, visible=None, return_tokens=False):
        """F [N, C, H, W] of the noisy latents x at noise levels sigma = t [N] for classes y [N].

        drop, control: see DiT. visible: see encode. With return_tokens, F and the encoded tokens.
        """
        tokens, patches, c = self.encode(x, t, y, drop, visible, control)
        if self.cls_embedder:
            cls = nn.functional.layer_norm(tokens[:, 0], (self.hidden_size,), eps=1e-6)
            c = c + self.cls_embedder(cls)

        h = tokens[:, 1:]                                             # (N, V, D)
        if visible is not None:
            h = patches.scatter(1, visible.unsqueeze(2).expand_as(h), h)  # (N, T, D)
        h = self.decoder_embed(h, c) + self.decoder_pos_embed         # (N, T, decoder_width)
        for block in self.decoder_blocks:
            h = self.run_block(block, h, c)
        output = self.unpatchify(self.final_layer(h, c))              # (N, C, H, W)
        if return_tokens:
            return output, tokens
        return output


class NoiseDiT(DiT):
    """DiT's own network (arXiv 2212.09748), which predicts eps, as a velocity model.

    The network reads x_vp = alpha x + sigma eps. Flow matching has the same image and noise in
        x_t = x_vp / (alpha + sigma)  at  t = sigma / (alpha + sigma),  so that
        v = eps - x = eps - (x_vp - sigma eps) / alpha = (eps - x_t) / (1 - t).
    Sampling starts at `first_time`, the largest t of DiT's schedule. Below the smallest, 0.0099,
    the timestep stays 0.
    official code: 250 ancestral steps in x_vp, learned variances / here: the flow's samplers, no
    variances.
    """

    def __init__(self, **options):
        super().__init__(**options)
        beta = np.linspace(1e-4, 2e-2, 1000)
        alpha = np.cumprod(1 - beta) ** 0.5  # of the timesteps 0 to 999
        sigma = (1 - alpha**2) ** 0.5
        self.log_snr = 2 * np.log(alpha / sigma)
        self.first_time = float(sigma[-1] / (alpha[-1] + sigma[-1]))  # 0.9937

    def forward(self, x, t, y, drop=None, control=None):
        """Velocity of x [N, C, H, W] at times t [N], 0 < t <= first_time, for classes y [N].

        drop: see DiT. control is ignored.
        """
        log_snr = 2 * torch.log((1 - t) / t).cpu().numpy()
        timestep = np.interp(-log_snr, -self.log_snr, np.arange(1000))
        timestep = torch.from_numpy(timestep).to(x)                   # (N,)
        t = t.view(-1, 1, 1, 1)
        x_vp = x / torch.hypot(1 - t, t)                              # (alpha + sigma) x_t
        eps = super().forward(x_vp, timestep, y, drop)
        return (eps - x) / (1 - t)


ARCHITECTURES = {"DiT": DiT, "DiverseDiT": DiverseDiT, "SDDiT": SDDiT, "NoiseDiT": NoiseDiT}


# ---- Building from a config
def parse_model(name):
    """Keyword arguments of `--model SIZE/PATCH`, e.g. "XL/2". ValueError if it does not read so."""
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
    """The model of a checkpoint's `config`: {"arch": a key of ARCHITECTURES, keyword: argument}.

    ValueError for an unknown architecture, TypeError for an unknown keyword.
    """
    options = dict(config)
    arch = options.pop("arch")
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}, not one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[arch](**options)


# ---- Inheriting from another model
def inherit_config(config, theirs):
    """What the model of `config` takes over from one trained at another resolution (2411.03177).

    This is the grid of its positions, and its time shift times the ratio of the two sides. The
    ratio counts as 1 if the latents are of another kind: with another number of channels.
    ValueError if the tokens of the two differ, so that hardly a weight would fit.
    """
    for key in ("patch_size", "hidden_size", "depth", "num_heads"):
        if theirs[key] != config[key]:
            raise ValueError(
                f"--init: {key} is {theirs[key]} there, {config[key]} in the model to train"
            )
    grid = theirs["input_size"] // theirs["patch_size"]
    ratio = 1
    if theirs["in_channels"] == config["in_channels"]:
        ratio = config["input_size"] / theirs["input_size"]
    return {
        "pos_base": theirs.get("pos_base") or grid,
        "time_shift": theirs.get("time_shift", 1.0) * ratio,
    }


def inherit_weights(model, state, same_classes=True):
    """Copy from `state` what fits by name and shape. Returns a line that says what was loaded.

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
        "resized": positions - fits,
        "new": own.keys() - copied - positions,
        "unused": state.keys() - copied - positions,
    }
    for kind, names in groups.items():
        parts = sorted({name.split(".")[0] for name in names})
        line += f"; {kind}: {', '.join(parts) or 'none'}"
    return line


# ---- What a model costs
def forward_flops(config, call="forward", **options):
    """FLOPs of one image's forward pass, or of another method `call` of the model.

    A multiply-accumulate counts as 2. The options go to the method.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        side = config["input_size"]
        x = torch.zeros(1, config["in_channels"], side, side)
        y = torch.zeros(1, dtype=torch.int64)
        getattr(build(config), call)(x, torch.ones(1), y, **options)
    return counter.get_total_flops()


def training_memory(config, images, precision):
    """Bytes that a training step on `images` at once needs at least; precision is "bf16" or "fp32".

    Counted are 20 bytes per parameter (weight, gradient, Adam's two moments, average) and the 17
    values that every block keeps for the backward pass for every token and channel. It is a lower
    bound, unless most patches are masked.
    """
    with torch.device("meta"):
        model = build(config)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = (config["input_size"] // config["patch_size"]) ** 2
    values = 17 * images * tokens * config["depth"] * config["hidden_size"]
    bytes_per_value = 2 if precision == "bf16" else 4
    return 20 * parameters + bytes_per_value * values
