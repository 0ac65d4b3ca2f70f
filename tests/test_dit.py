"""dit.py against published numbers, the official keys, and a forward pass written out by hand."""

import importlib
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import randomize

import dit

COUNTS = {  # 256 px, patch 2, four channels: all parameters, and those that are trained
    "S": (32_957_200, 32_858_896),
    "B": (130_500_112, 130_303_504),
    "L": (458_086_416, 457_824_272),
    "XL": (675_111_184, 674_816_272),
}

SMALL = dict(input_size=8, patch_size=2, in_channels=3, num_classes=5)
SMALL |= dict(hidden_size=32, depth=2, num_heads=2)


def small_dit(**options):
    torch.manual_seed(0)
    return dit.DiT(**(SMALL | dict(depth=3, num_heads=4) | options))


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts(size):
    with torch.device("meta"):
        model = dit.build({"arch": "DiT", **dit.parse_model(f"{size}/2")})
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == COUNTS[size][0]
    assert sum(p.numel() for p in parameters if p.requires_grad) == COUNTS[size][1]


def test_parameter_count_at_512_pixels():
    with torch.device("meta"):
        model = dit.build({"arch": "DiT", "input_size": 64, **dit.parse_model("XL/2")})
    assert sum(p.numel() for p in model.parameters()) == 674_816_272 + 1_179_648


def test_state_dict_keys_are_the_official_ones():
    with torch.device("meta"):
        state = dit.DiT().state_dict()
    block = "attn.qkv attn.proj mlp.fc1 mlp.fc2 adaLN_modulation.1".split()
    modules = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    modules += ["final_layer.adaLN_modulation.1"]
    modules += [f"blocks.{i}.{name}" for i in range(28) for name in block]
    keys = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    assert set(state) == keys | {"pos_embed", "y_embedder.embedding_table.weight"}
    assert len(state) == 292
    assert state["x_embedder.proj.weight"].shape == (1152, 4, 2, 2)
    assert state["y_embedder.embedding_table.weight"].shape == (1001, 1152)
    assert state["final_layer.linear.weight"].shape == (16, 1152)


def test_output_is_zero_at_initialisation():
    model = small_dit()
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 4])
    out, (tokens,) = model(x, t, y, return_blocks=[3])
    assert out.shape == (2, 3, 8, 8) and (out == 0).all()
    assert tokens.shape == (2, 16, 32) and tokens.std() > 0.1


def test_position_table():
    """Channels: column, then row; each [sin | cos] of p / 10000^(i / quarter)."""
    table = dit.sincos_positions(3, 8)
    for row in range(3):
        for column in range(3):
            expected = []
            for p in (column, row):
                expected += [math.sin(p), math.sin(p / 100)] + [math.cos(p), math.cos(p / 100)]
            assert table[row * 3 + column] == pytest.approx(expected, abs=1e-12)


def test_timestep_embedding():
    """[cos | sin] of raw t: emb(0), emb(1) have cosine 0.972 (REPA#40); times 1000 it were 0.19."""
    captured = []
    embedder = dit.TimestepEmbedder(16)
    embedder.mlp = torch.nn.Module()
    embedder.mlp.forward = lambda x: captured.append(x) or x
    embedder(torch.tensor([0.0, 1.0]))
    zero, one = captured[0]
    assert zero.tolist() == [1.0] * 128 + [0.0] * 128
    angles = [math.exp(-math.log(10000) * i / 128) for i in range(128)]
    expected = [*map(math.cos, angles), *map(math.sin, angles)]
    assert one.tolist() == pytest.approx(expected, abs=1e-6)
    assert F.cosine_similarity(zero, one, dim=0).item() == pytest.approx(0.9721, abs=1e-4)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_block_against_a_slow_forward(qk_norm):
    """One block, one token and one head at a time, from its weights alone, in float64."""
    D, heads, T = 12, 3, 5
    block = randomize(dit.DiTBlock(D, heads, qk_norm=qk_norm)).double()
    x, c = torch.randn(1, T, D, dtype=torch.float64), torch.randn(1, D, dtype=torch.float64)
    w = {name: value.detach() for name, value in block.state_dict().items()}

    def linear(name, v):
        return w[f"{name}.weight"] @ v + w[f"{name}.bias"]

    def norm(v, eps=1e-6):
        return (v - v.mean()) / torch.sqrt(((v - v.mean()) ** 2).mean() + eps)

    modulation = linear("adaLN_modulation.1", c[0] * torch.sigmoid(c[0]))
    parts = [modulation[i * D : (i + 1) * D] for i in range(6)]
    shift1, scale1, gate1, shift2, scale2, gate2 = parts
    tokens = [x[0, i] for i in range(T)]
    qkv = [linear("attn.qkv", norm(v) * (1 + scale1) + shift1) for v in tokens]
    attended = []
    for i in range(T):
        per_head = []
        for h in range(heads):
            part = [[u[k * D + h * 4 : k * D + h * 4 + 4] for u in qkv] for k in range(3)]
            if qk_norm:
                for k, name in enumerate(("q_norm", "k_norm")):
                    scale, bias = w[f"attn.{name}.weight"], w[f"attn.{name}.bias"]
                    part[k] = [norm(u, 1e-5) * scale + bias for u in part[k]]
            q, k, v = part
            weights = torch.softmax(torch.stack([q[i] @ k[j] / 2 for j in range(T)]), 0)
            per_head.append(sum(weights[j] * v[j] for j in range(T)))
        attended.append(linear("attn.proj", torch.cat(per_head)))
    tokens = [v + gate1 * a for v, a in zip(tokens, attended, strict=True)]
    expected = []
    for v in tokens:
        u = linear("mlp.fc1", norm(v) * (1 + scale2) + shift2)
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        expected.append(v + gate2 * linear("mlp.fc2", u))
    torch.testing.assert_close(block(x, c)[0], torch.stack(expected), rtol=1e-9, atol=1e-9)


def test_patches_and_unpatchify_are_inverse_in_layout():
    """Token = row-major patch; index within a token: (row * P + column) * C + channel."""
    model = small_dit()
    image = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8)
    tokens = torch.zeros(2, 16, 12)
    for token in range(16):
        for row in range(2):
            for column in range(2):
                for channel in range(3):
                    y, x = 2 * (token // 4) + row, 2 * (token % 4) + column
                    tokens[:, token, (row * 2 + column) * 3 + channel] = image[:, channel, y, x]
    assert torch.equal(model.unpatchify(tokens), image)
    weight, bias = model.x_embedder.proj.weight, model.x_embedder.proj.bias
    patch = image[1, :, 2:4, 4:6]  # token 1 * 4 + 2
    expected = (weight * patch).sum((1, 2, 3)) + bias
    torch.testing.assert_close(model.x_embedder(image)[1, 6], expected)


def test_tokens_on_request_are_block_outputs():
    model = randomize(small_dit()).eval()
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 2])
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    plain = model(x, t, y)
    v, tokens = model(x, t, y, return_blocks=[1, 3])
    assert torch.equal(plain, v)
    assert len(tokens) == 2
    assert torch.equal(tokens[0], outputs[0]) and torch.equal(tokens[1], outputs[2])


def test_tokens_come_in_the_order_asked_for():
    """Also if a block is asked for twice; a block that does not exist is no silent gap."""
    model = randomize(small_dit()).eval()
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 2])
    v, (first, second, third) = model(x, t, y, return_blocks=[1, 2, 3])
    again, tokens = model(x, t, y, return_blocks=[3, 1, 3])
    assert torch.equal(v, again) and len(tokens) == 3
    assert torch.equal(tokens[0], third) and torch.equal(tokens[1], first)
    assert torch.equal(tokens[2], third) and not torch.equal(first, third)
    assert model(x, t, y, return_blocks=[])[1] == []
    with pytest.raises(KeyError, match="4"):
        model(x, t, y, return_blocks=[1, 4])


def test_label_dropout():
    """Labels to drop become the null class, the last row; without a mask or a null class none."""
    embedder, y = small_dit(class_dropout_prob=0.4).y_embedder, torch.tensor([0, 4, 2, 0])
    table, drop = embedder.embedding_table.weight, torch.tensor([True, False, True, False])
    assert embedder.dropout_prob == 0.4 and len(table) == 6
    assert torch.equal(embedder(y, drop), table[[5, 4, 5, 0]])
    assert torch.equal(embedder(y), table[y])
    without = small_dit(class_dropout_prob=0.0).y_embedder
    assert len(without.embedding_table.weight) == 5
    assert torch.equal(without(y, drop), without.embedding_table.weight[y])


SHAPES = [(1, 5, 1, 1), (4, 8, 7, 3), (3, 9, 4, 1000)]


@pytest.mark.parametrize("patch, side, channels, classes", SHAPES)
def test_any_patch_latent_and_class_count(patch, side, channels, classes):
    options = dict(patch_size=patch, input_size=side, in_channels=channels, num_classes=classes)
    model = randomize(small_dit(**options))
    out = model(torch.randn(1, channels, side, side), torch.rand(1), torch.tensor([classes - 1]))
    assert out.shape == (1, channels, side, side) and out.isfinite().all() and out.std() > 0


def test_bad_configurations():
    with pytest.raises(ValueError, match="side 9 do not divide into patches of 2"):
        small_dit(input_size=9)
    for options, message in (
        (dict(hidden_size=30, num_heads=3), "width 30 must be a multiple of 4"),
        (dict(num_heads=3), "width 32 does not divide into 3 heads"),
    ):
        with pytest.raises(ValueError, match=message):
            small_dit(**options)
    with pytest.raises(ValueError, match="width 18 .* 4"):
        dit.SDDiT(**SMALL, decoder_width=18, decoder_heads=2)
    with pytest.raises(ValueError, match="width 20 .* 3 heads"):
        dit.SDDiT(**SMALL, decoder_width=20, decoder_heads=3)
    with pytest.raises(ValueError, match="depth 3"):
        dit.DiverseDiT(**SMALL | dict(depth=3))
    with pytest.raises(TypeError, match="learn_sigma"):
        small_dit(learn_sigma=True)
    with pytest.raises(ValueError, match="unknown architecture 'UNet'"):
        dit.build({"arch": "UNet"})
    for name in ("XXL/2", "XL", "XL/0", "XL/two", "DiT-XL/2"):
        with pytest.raises(ValueError, match="SIZE/PATCH"):
            dit.parse_model(name)


# --- cost

GMACS = [
    ("DiT", "XL/2", 32, 118.6),
    ("DiT", "B/2", 32, 23.0),
    ("DiT", "S/2", 32, 6.05),
    ("DiT", "XL/2", 64, 524.5),
    ("DiverseDiT", "XL/2", 32, 128.1),
    ("SDDiT", "S/2", 32, 6.07 + 7.0),
]


@pytest.mark.parametrize("arch, model, side, gmac", GMACS)
def test_forward_flops(arch, model, side, gmac):
    """Published multiply-accumulates of a forward pass, 2 FLOP each: the TFLOP/s of the log."""
    config = dict(arch=arch, input_size=side, in_channels=4, num_classes=1000)
    config |= dit.parse_model(model)
    assert dit.forward_flops(config) / 2e9 == pytest.approx(gmac, rel=0.005)


STEP_GFLOPS = [
    ("train_repa", "DiT", 3 * 2 * (118.6 + 256 * (1152 * 2048 + 2048**2 + 2048 * 768) / 1e9)),
    ("train_diversedit", "DiverseDiT", 3 * 2 * 128.1),
    ("train_sddit", "SDDiT", 863),
    # forward and backward, two passes of the guidance, du/dt of a quarter of the rows
    ("train_meanflow", "DiT", (3 + 2 + 0.25 * 2) * 2 * 118.6),
]


@pytest.mark.parametrize("script, arch, expected", STEP_GFLOPS)
def test_flops_of_a_training_step(script, arch, expected):
    """XL/2, per image: REPA's projector, DiverseDiT's residuals, SD-DiT's student and teacher."""
    script = importlib.import_module(script)
    config = dict(arch=arch, input_size=32, in_channels=4, num_classes=1000)
    config |= dit.parse_model("XL/2")
    meta = dict(grid=16, latent_side=32, target_widths=[768], images=1_281_167)
    with torch.device("meta"):
        objective = script.Objective(dit.build(config), script.parse_args([]), meta)
    assert objective.flops(config) / 1e9 == pytest.approx(expected, rel=0.005)


# arch, precision, compiled: exact peaks of PyTorch's allocator in GB, fixed and per image
PEAKS = {
    ("DiT", "bf16", False): (12.4, 0.410),
    ("DiT", "bf16", True): (12.5, 0.311),
    ("DiT", "fp32", False): (11.0, 0.680),
    ("DiverseDiT", "bf16", False): (13.0, 0.532),
    ("DiverseDiT", "bf16", True): (13.0, 0.433),
    ("SDDiT", "bf16", False): (17.6, 0.386),
    ("SDDiT", "bf16", True): (17.7, 0.293),
    ("SDDiT", "fp32", False): (16.0, 0.635),
    ("SDDiT", "fp32", True): (16.0, 0.542),
}


@pytest.mark.parametrize("arch, precision, compiled", PEAKS)
@pytest.mark.parametrize("images", [16, 64, 128])
def test_training_memory_is_that_of_the_allocator(arch, precision, compiled, images):
    """XL/2 at 256 px, within 10 %; the README's sentence holds the same figures."""
    config = dict(arch=arch, input_size=32, in_channels=4, num_classes=1000, **dit.parse_model("XL/2"))
    fixed, each = PEAKS[arch, precision, compiled]
    visible = 0.8 if arch == "SDDiT" else 1.0
    needed = dit.training_memory(config, images, precision, compiled, visible)
    assert needed == pytest.approx(1e9 * (fixed + each * images), rel=0.1)
    with_gradients = dit.training_memory(config, images, precision, compiled, visible, True)
    if arch == "DiT":  # the others have more parameters
        assert with_gradients - needed == pytest.approx(2.9e9, rel=0.1)


# --- conditioning and resolution (arXiv 2411.03177)

SMALL_SDDIT = SMALL | dict(decoder_depth=1, decoder_width=16, decoder_heads=2)
CONTROL = torch.tensor([[30, 40, 0, 5, 30, 30, 0], [512, 400, 7, 9, 200, 200, 1]])
ARCHS = [(dit.DiT, SMALL), (dit.DiverseDiT, SMALL), (dit.SDDiT, SMALL_SDDIT)]


def randomised(arch, options, **more):
    return randomize(arch(**options, **more))


@pytest.mark.parametrize("arch, options", ARCHS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_block_goes_through_the_hook(arch, options, monkeypatch):
    """Gradient checkpointing in run_block changes no gradient, and reaches the decoder as well."""
    model, seen = randomised(arch, options), []
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9]), torch.tensor([1, 4])

    def gradients():
        model.zero_grad()
        model(x, t, y).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def checkpointed(self, block, x, c):
        seen.append(block)
        return torch.utils.checkpoint.checkpoint(block, x, c, use_reentrant=False)

    plain = gradients()
    monkeypatch.setattr(dit.DiT, "run_block", checkpointed)
    assert all(map(torch.equal, plain, gradients()))
    assert seen == [block for block in model.modules() if isinstance(block, dit.DiTBlock)]
    assert model.hidden_size == SMALL["hidden_size"] == model.pos_embed.shape[-1]


def test_noise_dit_is_the_velocity_of_a_noise_prediction():
    """At the times of single timesteps k of the schedule, from eps of the plain DiT at k."""
    model, plain = randomised(dit.NoiseDiT, SMALL), dit.DiT(**SMALL)
    state = model.state_dict()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):  # without the variance's channels
        state[name] = state[name].unflatten(0, (4, 2, 3))[:, 0].flatten(0, 1)
    plain.load_state_dict(state)
    x, y = torch.randn(1, 3, 8, 8), torch.tensor([2])
    alpha_bar = 1.0
    for k in range(1000):
        alpha_bar *= 1 - (1e-4 + (2e-2 - 1e-4) * k / 999)
        if k not in (0, 1, 500, 999):
            continue
        alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        t = sigma / (alpha + sigma)
        eps = plain((alpha + sigma) * x, torch.tensor([float(k)]), y)
        v = model(x, torch.tensor([t]), y)
        torch.testing.assert_close(v, (eps - x) / (1 - t), rtol=1e-3, atol=1e-3)
    assert model.first_time == pytest.approx(t) and round(t, 4) == 0.9937
    config = dict(arch="NoiseDiT", **SMALL)
    assert type(dit.build(config)) is dit.NoiseDiT


def test_gamma_table():
    """The values of the power-cosine, by alpha, to four digits."""
    u = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.0])
    table = {
        1: [0, 0.0245, 0.2061, 0.5, 0.7939, 0.9045, 0.9755, 1],
        2: [0, 0.0002, 0.0199, 0.1464, 0.4843, 0.7129, 0.9135, 1],
        4: [0, 0, 0.0002, 0.0096, 0.1356, 0.3599, 0.7355, 1],
        8: [0, 0, 0, 0, 0.0082, 0.0679, 0.3916, 1],
    }
    for alpha, expected in table.items():
        gamma = dit.ControlEmbedder(8, "cosine", alpha).gamma(u)
        torch.testing.assert_close(gamma, torch.tensor(expected), rtol=0, atol=6e-5)
        assert gamma[0] == 0 and gamma[-1] == 1 and (gamma.diff() >= 0).all()
    assert dit.ControlEmbedder(8, "constant").gamma(u).tolist() == 8 * [1]


@pytest.mark.parametrize("arch, options", ARCHS, ids=lambda value: getattr(value, "__name__", ""))
def test_new_control_changes_no_bit(arch, options):
    """A model with new control embedders and another's weights is that model."""
    plain = randomised(arch, options)
    model = arch(**options, control="cosine").eval()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    layers = ["size_mlp.0", "size_mlp.2", "layout_mlp.0", "layout_mlp.2"]
    parts = [f"control_embedder.{layer}.{what}" for layer in layers for what in ("weight", "bias")]
    assert missing == parts and not unexpected
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9]), torch.tensor([1, 5])
    assert torch.equal(model(x, t, y, control=CONTROL), plain(x, t, y))


@pytest.mark.parametrize("arch, options", ARCHS, ids=lambda value: getattr(value, "__name__", ""))
def test_size_acts_late_and_layout_acts_always(arch, options):
    """Six doubled numbers change the size: no effect at t = 1, all at t = 0. A flip always acts."""
    model = randomised(arch, options, control="cosine")
    constant = randomised(arch, options, control="constant")
    x, y, edm = torch.randn(2, 3, 8, 8), torch.tensor([1, 4]), arch is dit.SDDiT
    noise, data = (1e9, 1e-9) if edm else (1.0, 0.0)
    doubled, flipped = CONTROL.clone(), CONTROL.clone()
    doubled[:, :6] *= 2
    flipped[:, 6] = 1 - flipped[:, 6]

    def effect(network, t, other):
        t = torch.full((2,), t)
        change = network(x, t, y, control=CONTROL) - network(x, t, y, control=other)
        return change.abs().max().item()

    with torch.no_grad():
        assert effect(model, noise, doubled) == 0 and effect(constant, noise, doubled) > 1e-4
        assert effect(model, noise, flipped) > 1e-4
        full = effect(constant, data, doubled)
        assert 1e-4 < effect(model, data, doubled) == pytest.approx(full, rel=1e-3)


@pytest.mark.parametrize("arch, options", ARCHS, ids=lambda value: getattr(value, "__name__", ""))
def test_zero_row_is_no_control(arch, options):
    model = randomised(arch, options, control="cosine")
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9]), torch.tensor([1, 4])
    half = CONTROL.clone()
    half[0] = 0
    without, mixed, full = (model(x, t, y, control=control) for control in (None, half, CONTROL))
    assert mixed.isfinite().all() and torch.equal(without, model(x, t, y, control=0 * CONTROL))
    assert torch.equal(mixed[0], without[0]) and torch.equal(mixed[1], full[1])
    assert not torch.equal(full[0], without[0])


def test_control_embedder_by_hand():
    """One row from the definition: clamped size, fractions times 1000, sinusoids, MLP, weight."""
    model = dit.ControlEmbedder(8, "cosine", 2.0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    h0, w0, top, left, h, w, flip = row = [9000, 400, 70, 9, 200, 300, 1]
    frequencies = np.exp(-np.log(10000) * np.arange(128) / 128)

    def mlp(layers, values):
        angles = [v * frequencies for v in values]
        x = np.concatenate([f(angle) for angle in angles for f in (np.cos, np.sin)])
        weights = [layer.detach().numpy().astype(np.float64) for layer in layers.parameters()]
        x = weights[0] @ x + weights[1]
        return weights[2] @ (x / (1 + np.exp(-x))) + weights[3]

    c_size = mlp(model.size_mlp, [4096, 400])
    layout = [1000 * 70 / 9000, 1000 * 9 / 400, 1000 * 200 / 9000, 1000 * 300 / 400, 1000]
    c_layout = mlp(model.layout_mlp, layout)
    expected = (1 - np.cos(np.pi * 0.4**2)) / 2 * c_size + c_layout
    found = model(torch.tensor([row]), torch.tensor([0.6]))[0].detach().numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)  # fp32 cosines of numbers up to 4096
    with torch.device("meta"):
        assert sum(p.numel() for p in dit.ControlEmbedder(1152).parameters()) == 4_723_200


def test_positions_of_another_resolution():
    """p_i = i g0 / g: even rows and columns of a doubled grid are the old table."""
    low = dit.sincos_positions(8, 32)
    high = dit.sincos_positions(16, 32, base=8).reshape(16, 16, 32)
    assert np.array_equal(high[::2, ::2].reshape(64, 32), low)
    assert np.array_equal(dit.sincos_positions(8, 32, base=8), low)
    frequencies = 10000.0 ** (-np.arange(8) / 8)
    np.testing.assert_allclose(high[3, 5, :8], np.sin(2.5 * frequencies))
    np.testing.assert_allclose(high[3, 5, 16:24], np.sin(1.5 * frequencies))
    model = dit.SDDiT(**SMALL_SDDIT | dict(input_size=16), pos_base=4)
    for table, width in ((model.pos_embed, 32), (model.decoder_pos_embed, 16)):
        expected = torch.from_numpy(dit.sincos_positions(4, width)).float()
        assert torch.equal(table[0].view(8, 8, width)[::2, ::2].reshape(16, width), expected)
    stretched = dit.DiT(**SMALL, pos_base=2000).pos_embed  # any base: 4 tokens a side, 500 apart
    np.testing.assert_allclose(stretched[0, 3, :8], np.sin(1500 * frequencies), atol=1e-6)


# --- weights of another model

TABLE = "y_embedder.embedding_table.weight"


@pytest.mark.parametrize("side, resized", [(8, "none"), (16, "pos_embed")])
@pytest.mark.parametrize("same_classes", [True, False])
def test_inherited_weights(side, resized, same_classes):
    """The line counts what really changed: no position table, no label table of other classes."""
    source = randomised(dit.DiT, SMALL)
    with torch.no_grad():
        source.pos_embed += 1
    theirs = source.state_dict()
    model = dit.DiverseDiT(**SMALL | dict(input_size=side))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    line = dit.inherit_weights(model, theirs, same_classes)
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == theirs.keys() - {"pos_embed"} - (set() if same_classes else {TABLE})
    assert all(torch.equal(after[name], theirs[name]) for name in changed)
    new, unused = ("", "none") if same_classes else (", y_embedder", "y_embedder")
    groups = f"resized: {resized}; new: long_residuals{new}; unused: {unused}"
    assert line == f"{len(changed)} tensors loaded; {groups}"


@pytest.mark.parametrize("arch, options", ARCHS)
def test_qk_norm_is_in_every_block(arch, options):
    model = arch(**options, qk_norm=True)
    blocks = [block for block in model.modules() if isinstance(block, dit.DiTBlock)]
    assert all(isinstance(block.attn.q_norm, torch.nn.LayerNorm) for block in blocks)


def test_training_time():
    """Uniform as it comes; logit-normal against scipy's distribution; then shifted."""
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert torch.equal(dit.training_time(u), u)
    t = dit.training_time(u, (-0.4, 1.3))
    logits = scipy.stats.norm(-0.4, 1.3).ppf(u.numpy())
    torch.testing.assert_close(t, torch.from_numpy(scipy.special.expit(logits)))
    assert torch.equal(dit.training_time(u, (-0.4, 1.3), 2.0), dit.shift_time(t, 2.0))
    assert dit.training_time(torch.tensor([0.0, 1 - 2**-24]), (0.0, 1.0)).isfinite().all()


def test_shift_time():
    """Values for s = 2; SNR / s^2; a model weighs the size by the time before the shift."""
    t = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    shifted = dit.shift_time(t, 2)
    assert shifted.tolist() == pytest.approx([0.1818, 0.4, 0.6667, 0.8571, 0.9474], abs=5e-5)
    for s in (1.5, 2.0, 4.0):
        moved = dit.shift_time(t, s)
        torch.testing.assert_close(((1 - moved) / moved) ** 2, ((1 - t) / t) ** 2 / s**2)
        torch.testing.assert_close(dit.shift_time(moved, 1 / s), t)
    assert torch.equal(dit.shift_time(t, 1.0), t)
    for arch, options, to_input in (
        (dit.DiT, SMALL, lambda t: t),
        (dit.SDDiT, SMALL_SDDIT, lambda t: t / (1 - t)),  # sigma of the same SNR
    ):
        seen = []
        model = arch(**options, control="cosine", time_shift=2.0).eval()
        model.control_embedder.register_forward_pre_hook(lambda _, i, seen=seen: seen.append(i[1]))
        y, control = torch.zeros(5, dtype=torch.int64), CONTROL[:1].repeat(5, 1)
        model(torch.randn(5, 3, 8, 8), to_input(shifted).float(), y, control=control)
        torch.testing.assert_close(seen[0].double(), t, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch, options", ARCHS, ids=lambda value: getattr(value, "__name__", ""))
def test_class_tokens(arch, options):
    """The class reaches attention as K tokens, not the condition. Only patches are returned."""
    model = randomised(arch, options, class_tokens=4)
    state, plain = model.state_dict(), arch(**options).state_dict()
    assert {name for name in plain if state[name].shape != plain[name].shape} == {TABLE}
    assert state[TABLE].shape == (len(plain[TABLE]), 4 * 32)
    x, t, lengths = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9]), []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    a, b, null = (model(x, t, torch.tensor([label, label])) for label in (0, 3, 5))
    assert lengths == 3 * [16 + 4 + (arch is dit.SDDiT)] and a.shape == x.shape
    assert not torch.allclose(a, b) and not torch.allclose(a, null)
    c, tokens = model.condition(t, t, torch.tensor([0, 3]), None, None)
    assert torch.equal(c, model.t_embedder(t)) and tokens.shape == (2, 4, 32)
    if arch is not dit.SDDiT:
        _, returned = model(x, t, torch.tensor([0, 3]), return_blocks=[1, 2])
        assert [tokens.shape for tokens in returned] == 2 * [(2, 16, 32)]
        # by hand: the second block's output without the class tokens is what the final layer sees
        v = model.unpatchify(model.final_layer(returned[1], c))
        torch.testing.assert_close(v, model(x, t, torch.tensor([0, 3])))


def test_bad_conditioning():
    for options, message in (
        (dict(control="linear"), "control 'linear'"),
        (dict(control="cosine", control_alpha=0.0), "alpha 0.0"),
        (dict(control="cosine", control_alpha=math.nan), "alpha nan"),
    ):
        with pytest.raises(ValueError, match=message):
            dit.DiT(**SMALL, **options)
