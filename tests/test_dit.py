"""dit.py against published parameter counts, the official key list, and a forward pass written out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

import dit

COUNTS = {  # 256 px, patch 2, four channels: all parameters, and those that are trained
    "S": (32_957_200, 32_858_896),
    "B": (130_500_112, 130_303_504),
    "L": (458_086_416, 457_824_272),
    "XL": (675_111_184, 674_816_272),
}


def small_dit(**options):
    torch.manual_seed(0)
    shape = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=3, num_heads=4, num_classes=5)
    return dit.DiT(**(shape | options))


def randomize(model):
    """Fill the zero-initialised layers, so that every part of the network has a say."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


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
    modules += ["final_layer.adaLN_modulation.1"] + [f"blocks.{i}.{name}" for i in range(28) for name in block]
    keys = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    assert set(state) == keys | {"pos_embed", "y_embedder.embedding_table.weight"}
    assert len(state) == 292
    assert state["x_embedder.proj.weight"].shape == (1152, 4, 2, 2)
    assert state["y_embedder.embedding_table.weight"].shape == (1001, 1152)
    assert state["final_layer.linear.weight"].shape == (16, 1152)


def test_output_is_zero_at_initialisation():
    model = small_dit()
    out, (tokens,) = model(torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 4]), after=[3])
    assert out.shape == (2, 3, 8, 8) and (out == 0).all()
    assert tokens.shape == (2, 16, 32) and tokens.std() > 0.1


def test_position_table():
    """First half of the channels: column, second half: row; each [sin | cos] of p / 10000^(i / quarter)."""
    table = dit.sincos_positions(3, 8)
    for row in range(3):
        for column in range(3):
            expected = []
            for p in (column, row):
                expected += [math.sin(p), math.sin(p / 100)] + [math.cos(p), math.cos(p / 100)]
            assert table[row * 3 + column] == pytest.approx(expected, abs=1e-12)


def test_timestep_embedding():
    """[cos | sin] of raw t: emb(0) and emb(1) have cosine 0.972 (REPA#40); times 1000 it would be 0.19."""
    captured = []
    embedder = dit.TimestepEmbedder(16)
    embedder.mlp = torch.nn.Module()
    embedder.mlp.forward = lambda x: captured.append(x) or x
    embedder(torch.tensor([0.0, 1.0]))
    zero, one = captured[0]
    assert zero.tolist() == [1.0] * 128 + [0.0] * 128
    expected = [f(math.exp(-math.log(10000) * i / 128)) for f in (math.cos, math.sin) for i in range(128)]
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
    shift1, scale1, gate1, shift2, scale2, gate2 = (modulation[i * D : (i + 1) * D] for i in range(6))
    tokens = [x[0, i] for i in range(T)]
    qkv = [linear("attn.qkv", norm(v) * (1 + scale1) + shift1) for v in tokens]
    attended = []
    for i in range(T):
        per_head = []
        for h in range(heads):
            part = [[u[k * D + h * 4 : k * D + h * 4 + 4] for u in qkv] for k in range(3)]
            if qk_norm:
                for k, name in enumerate(("q_norm", "k_norm")):
                    part[k] = [norm(u, 1e-5) * w[f"attn.{name}.weight"] + w[f"attn.{name}.bias"] for u in part[k]]
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
    """Token = row-major patch; within the output of a token the index is (row * P + column) * C + channel."""
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
    torch.testing.assert_close(model.x_embedder(image)[1, 6], (weight * patch).sum((1, 2, 3)) + bias)


def test_tokens_on_request_are_block_outputs():
    model = randomize(small_dit()).eval()
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 2])
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    plain = model(x, t, y)
    v, tokens = model(x, t, y, after=[1, 3])
    assert torch.equal(plain, v)
    assert torch.equal(tokens[0], outputs[0]) and torch.equal(tokens[1], outputs[2]) and len(tokens) == 2


def test_label_dropout():
    model = small_dit(class_dropout_prob=0.4)
    embedder, y = model.y_embedder, torch.zeros(20_000, dtype=torch.int64)
    table = embedder.embedding_table.weight
    assert table.shape[0] == 6
    dropped = (embedder(y) == table[5]).all(1)
    assert dropped.float().mean().item() == pytest.approx(0.4, abs=0.02)
    drop = torch.arange(20_000) % 2 == 0
    assert torch.equal((embedder(y, drop) == table[5]).all(1), drop), "a given mask is used as it is, not added to"
    assert not (embedder.eval()(y) == table[5]).all(1).any()


@pytest.mark.parametrize("patch, side, channels, classes", [(1, 5, 1, 1), (4, 8, 7, 3), (3, 9, 4, 1000)])
def test_any_patch_latent_and_class_count(patch, side, channels, classes):
    options = dict(patch_size=patch, input_size=side, in_channels=channels, num_classes=classes)
    model = randomize(small_dit(**options))
    out = model(torch.randn(1, channels, side, side), torch.rand(1), torch.tensor([classes - 1]))
    assert out.shape == (1, channels, side, side) and out.isfinite().all() and out.std() > 0


def test_bad_configurations():
    with pytest.raises(ValueError, match="side 9 do not divide into patches of 2"):
        small_dit(input_size=9)
    with pytest.raises(TypeError, match="learn_sigma"):
        small_dit(learn_sigma=True)
    with pytest.raises(ValueError, match="unknown architecture 'UNet'"):
        dit.build({"arch": "UNet"})
    for name in ("XXL/2", "XL", "XL/0", "XL/two", "DiT-XL/2"):
        with pytest.raises(ValueError, match="SIZE/PATCH"):
            dit.parse_model(name)
