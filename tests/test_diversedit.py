"""DiverseDiT: wiring, parameter counts, the diversity loss against slow loops, the gate, CKA."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import difference, objective_for, randomize, refusal, rows, run_ranks, train

import dit
import sample
import train_diversedit
import train_repa
from train_diversedit import cka, diversity_loss, gate


@pytest.fixture(autouse=True)
def six_blocks(monkeypatch):
    monkeypatch.setitem(dit.SIZES, "nano", (6, 32, 2))


def small_model(depth):
    torch.manual_seed(0)
    return dit.DiverseDiT(input_size=8, in_channels=3, hidden_size=32, depth=depth, num_heads=4)


# --- architecture


EXTRA = [("S", 1_780_992), ("B", 7_100_928), ("L", 25_227_264), ("XL", 37_239_552)]


@pytest.mark.parametrize("size, extra", EXTRA)
def test_parameter_counts(size, extra):
    shape = dit.parse_model(f"{size}/2")
    with torch.device("meta"):
        plain, diverse = (dit.build({"arch": arch} | shape) for arch in ("DiT", "DiverseDiT"))
    count = sum(p.numel() for p in diverse.parameters())
    assert count - sum(p.numel() for p in plain.parameters()) == extra
    if size == "XL":
        assert round(count / 1e6, 2) == 712.35


def test_wiring():
    """The stream before deep block i is R(stream, input of its partner), first in, last out."""
    model = small_model(6)
    fed, fused = {}, []
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda module, inputs, i=i: fed.update({i: inputs[0].clone()}))
        block.forward = lambda x, c, i=i: x + (i + 1) * 100  # every block leaves a mark
    for layer in model.long_residuals:
        layer.register_forward_hook(lambda module, inputs, output: fused.append((*inputs, output)))
    embedding = torch.randn(2, 16, 32)
    last, kept = model.run_blocks(embedding, torch.zeros(2, 32), range(1, 7))
    outputs = [kept[b] for b in range(1, 7)]
    assert last is outputs[-1]
    assert len(fused) == 3 and len(outputs) == 6
    for k, partner in enumerate((2, 1, 0)):
        stream, skip, output = fused[k]
        assert torch.equal(skip, fed[partner]), "the skip is the INPUT of the partner"
        assert torch.equal(stream, fed[2 + k] + (3 + k) * 100), "fused before block, after the one before"
        assert torch.equal(fed[3 + k], output), "the fusion replaces the stream"
    assert torch.equal(fused[2][1], embedding), "the last block sees the patch embedding"
    for i, output in enumerate(outputs):
        assert torch.equal(output, fed[i] + (i + 1) * 100), "what is returned is the block's output"


def test_long_residual_is_the_formula():
    layer = dit.LongResidual(6).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x, skip = torch.randn(6).double(), torch.randn(6).double()
    joined = torch.cat([x, skip])
    normal = (joined - joined.mean()) / torch.sqrt(((joined - joined.mean()) ** 2).mean() + 1e-6)
    expected = layer.linear.weight @ (normal * layer.norm.weight + layer.norm.bias) + layer.linear.bias
    torch.testing.assert_close(layer(x.view(1, 1, 6), skip.view(1, 1, 6))[0, 0], expected)


def test_long_residual_rms_at_initialisation():
    """sqrt(4/3) whatever the scale of the input, and the output has the dtype of the stream."""
    torch.manual_seed(0)
    layer = dit.LongResidual(256)
    for scale in (0.01, 100):
        out = layer(scale * torch.randn(4, 32, 256), scale * torch.randn(4, 32, 256))
        assert out.square().mean().sqrt().item() == pytest.approx(math.sqrt(4 / 3), rel=0.03)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(1, 2, 256), torch.randn(1, 2, 256)).dtype == torch.float32


def test_odd_depth():
    with pytest.raises(ValueError, match="depth 5 "):
        small_model(5)


# --- loss


def slow_terms(blocks):
    """From the equations, a pair, an image, a token and a channel at a time."""
    m, N, T, D = blocks.shape
    f = blocks.tolist()
    pairs = [(i, j) for i in range(m) for j in range(i + 1, m)]

    def cosine(u, v):
        return sum(a * b for a, b in zip(u, v, strict=True)) / math.hypot(*u) / math.hypot(*v)

    every = [(n, t) for n in range(N) for t in range(T)]
    mean = [[sum(f[b][n][t][d] for n, t in every) / N / T for d in range(D)] for b in range(m)]
    orth = sum(cosine(mean[i], mean[j]) for i, j in pairs) / len(pairs)
    mi = 0
    for i, j in pairs:
        mi += abs(sum(cosine(f[i][n][t], f[j][n][t]) for n, t in every) / N / T) / len(pairs)
    a = []
    for d in range(D):
        per_block = []
        for b in range(m):
            column = [f[b][n][t][d] for n, t in every]
            per_block.append(sum(abs(value) for value in column) / math.hypot(*column) / N / T)
        a.append(sum(per_block) / m)
    a = [value / max(a) for value in a]
    variance = sum((value - sum(a) / D) ** 2 for value in a) / D
    return orth, mi, -min(variance / 0.25, 1)


@pytest.mark.parametrize("spiky", [False, True])
def test_terms_against_a_slow_loop(spiky):
    torch.manual_seed(0)
    blocks = torch.randn(4, 3, 5, 6) + torch.randn(4, 1, 1, 6)
    if spiky:  # half of the channels nearly always zero: the dispersion term wakes up
        blocks[..., :3] *= torch.rand(4, 3, 5, 1) < 0.1
    expected = slow_terms(blocks.double())
    loss, values = diversity_loss(blocks)
    assert [value.item() for value in values.values()] == pytest.approx(expected, abs=1e-6)
    assert loss.item() == pytest.approx(sum(expected) / 3, abs=1e-6)
    assert diversity_loss(blocks, ["mi"])[0].item() == pytest.approx(expected[1], abs=1e-6)
    assert (expected[2] < -0.05) == spiky


def test_equal_and_opposite_blocks():
    """Copies are as similar as can be; L_orth is signed, L_MI is not."""
    f = torch.randn(2, 3, 8) + 1
    _, same = diversity_loss(torch.stack([f, f]))
    _, opposite = diversity_loss(torch.stack([f, -f]))
    assert [same["orth"].item(), same["mi"].item()] == pytest.approx([1, 1], abs=1e-6)
    assert [opposite["orth"].item(), opposite["mi"].item()] == pytest.approx([-1, 1], abs=1e-6)


GATE = [(0.05, 0, 0), (0.1, 0, 0), (0.3, 0.4, 1.0), (0.5, 0.8, 1.8), (0.6, 1, 1)]


@pytest.mark.parametrize("value, w, slope", GATE)
def test_gate(value, w, slope):
    """w is 0 / (L - 0.1) / 0.5 / 1, and w L has the slope 0 / 4 L - 0.2 / 1, because w is not detached."""
    loss = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    assert gate(loss).item() == pytest.approx(w, abs=1e-12)
    (gate(loss) * loss).backward()
    assert loss.grad.item() == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize("arch, similarity, total", [("DiverseDiT", 0.235, 0.155), ("DiT", 1.0, 0.66)])
def test_diversity_loss_at_initialisation(arch, similarity, total):
    """Over B's twelve blocks, L_orth and L_MI are 0.22 to 0.25, L_div 0.15 to 0.16; 1 and 0.66 in a DiT.

    The width matters little: 256 instead of B's 768. Ten blocks drawn at random average the same.
    """
    torch.manual_seed(0)
    model = dit.build(dict(arch=arch, input_size=16, hidden_size=256, depth=12, num_heads=4))
    with torch.no_grad():
        x, t, y = torch.randn(16, 4, 16, 16), torch.rand(16), torch.randint(0, 1000, (16,))
        _, tokens = model(x, t, y, return_blocks=range(1, 13))
    loss, values = diversity_loss(torch.stack(tokens))
    assert values["orth"].item() == pytest.approx(similarity, abs=0.035)
    assert values["mi"].item() == pytest.approx(similarity, abs=0.035)
    assert loss.item() == pytest.approx(total, abs=0.012)
    drawn = [train_diversedit.choose_blocks(0, step, 12, 10) for step in range(40)]
    losses = [diversity_loss(torch.stack([tokens[b - 1] for b in chosen]))[0].item() for chosen in drawn]
    assert np.mean(losses) == pytest.approx(total, abs=0.03)


def test_block_draw():
    choose = train_diversedit.choose_blocks
    draws = [choose(0, step, 12, 10) for step in range(400)]
    assert all(len(set(draw)) == 10 and set(draw) <= set(range(1, 13)) for draw in draws)
    assert draws[5] == choose(0, 5, 12, 10) != choose(1, 5, 12, 10)
    counts = np.bincount(np.concatenate(draws), minlength=13)[1:]
    assert counts.min() > 290 and counts.max() < 370


def test_objective_is_the_equation(cache):
    flags = ["--repa-weight", 0.3, "--repa-depth", 2, "--div-blocks", 3]
    objective = randomize(objective_for(train_diversedit, cache, *flags), std=0.05)
    x, eps, t = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.rand(4)
    y, drop, targets = torch.tensor([0, 1, 2, 0]), torch.zeros(4, dtype=torch.bool), torch.randn(4, 16, 82)
    losses = objective(x, y, t, eps, drop, [2, 5, 6], targets)
    x_t = (1 - t.view(4, 1, 1, 1)) * x + t.view(4, 1, 1, 1) * eps
    v, tokens = objective.model(x_t, t, y, return_blocks=[2, 5, 6])
    loss_fm = F.mse_loss(v, eps - x).item()
    loss_div, values = diversity_loss(torch.stack(tokens))
    loss_repa = train_repa.repa_loss([objective.alignment.projectors[0](tokens[0])], [targets]).item()
    expected = loss_fm + (gate(loss_div) * loss_div).item() + 0.3 * loss_repa
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert losses["div_weight"].item() == pytest.approx(gate(loss_div).item(), rel=1e-4)
    _, tokens = objective.model(x_t, t, y, return_blocks=range(1, 7))
    rms = max(f.square().mean().sqrt().item() for f in tokens)
    assert losses["block_rms"].item() == pytest.approx(rms, rel=1e-5)


def test_loss_off_is_plain_flow_matching_through_the_long_residuals(cache):
    objective = randomize(objective_for(train_diversedit, cache, "--div-terms"))
    x, eps, t, y = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 0])
    losses = objective(x, y, t, eps, torch.zeros(4, dtype=torch.bool), [1, 2])
    assert losses["loss"] is losses["loss_fm"] and "loss_div" not in losses
    losses["loss"].backward()
    assert all(p.grad.abs().max() > 0 for p in objective.model.long_residuals.parameters())


# --- ranks


def gated_loss(path):
    dist.init_process_group("gloo")
    blocks = torch.load(path, weights_only=True)[dist.get_rank()].requires_grad_()
    loss = train_diversedit.mean_over_ranks(diversity_loss(blocks)[0])
    (gate(loss) * loss / dist.get_world_size()).backward()
    torch.save((loss.detach(), blocks.grad), f"{path}.{dist.get_rank()}")


def test_the_mean_of_the_ranks_is_one_number(monkeypatch):
    """To the last bit, because the gate branches on it; a thousand pairs of losses of two ranks."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    losses = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0)) ** 2
    means = []
    for own, other in ((losses[0], losses[1]), (losses[1], losses[0])):
        monkeypatch.setattr(dist, "all_reduce", lambda mean, other=other: mean.add_(other / 2))
        means.append(train_diversedit.mean_over_ranks(own))
    assert torch.equal(*means) and torch.equal(means[0], losses.mean(0))


def test_gate_sees_the_mean_of_the_ranks(tmp_path, processes):
    """Two ranks on different sides of the gate: value and gradient of w(mean) mean in one process."""
    torch.manual_seed(0)
    common = torch.randn(1, 4, 6, 16)
    blocks = torch.stack([torch.randn(3, 4, 6, 16), common + 0.3 * torch.randn(3, 4, 6, 16)]).requires_grad_()
    each = [diversity_loss(rank)[0] for rank in blocks]
    assert each[0] < 0.1 < 0.5 < each[1]
    mean = sum(each) / 2
    (gate(mean) * mean).backward()
    torch.save(blocks.detach(), tmp_path / "blocks")
    run_ranks(processes, gated_loss, tmp_path / "blocks")
    for rank in (0, 1):
        loss, grad = torch.load(tmp_path / f"blocks.{rank}", weights_only=True)
        assert loss.item() == pytest.approx(mean.item(), abs=1e-6)
        torch.testing.assert_close(grad, blocks.grad[rank], rtol=1e-4, atol=1e-8)
        assert grad.abs().max() > 0


# --- CKA


def test_cka_against_a_slow_estimator():
    """The unbiased HSIC as U-statistic: mean of K_ij (L_ij + L_kl - 2 L_ik) over all distinct i, j, k, l."""
    torch.manual_seed(0)
    n, features = 7, torch.randn(2, 7, 3, dtype=torch.float64)
    K, L = (f @ f.T for f in features)

    def hsic(K, L):
        total, count = 0.0, 0
        for i in range(n):
            for j in set(range(n)) - {i}:
                for k in set(range(n)) - {i, j}:
                    for m in set(range(n)) - {i, j, k}:
                        total += (K[i, j] * (L[i, j] + L[k, m] - 2 * L[i, k])).item()
                        count += 1
        return total / count

    result = cka(features)
    assert result[0, 1].item() == pytest.approx(hsic(K, L) / math.sqrt(hsic(K, K) * hsic(L, L)), rel=1e-9)
    assert result.diagonal().tolist() == pytest.approx([1, 1])


def test_cka_invariances():
    torch.manual_seed(0)
    f = torch.randn(200, 5)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5))
    result = cka(torch.stack([f, 3 * f @ rotation + 7, torch.randn(200, 5)]))
    assert result[0, 1].item() == pytest.approx(1, abs=1e-4)
    assert abs(result[0, 2].item()) < 0.05, "independent features: unbiased, so about zero"


# --- runs


def test_run_resume_and_sample(cache, tmp_path):
    options = ["--steps", 4, "--sample-every", 1000, "--repa-weight", 0.5]
    whole = train(cache, tmp_path / "whole", *options, script=train_diversedit)
    train(cache, tmp_path / "cut", *options, "--steps", 2, script=train_diversedit)
    cut = train(cache, tmp_path / "cut", *options, script=train_diversedit)
    assert difference(whole, cut) == 0
    logged = rows(tmp_path / "whole")
    assert {"loss_orth", "loss_mi", "loss_disp", "loss_div", "loss_repa", "block_rms"} <= logged[0].keys()
    assert {"div_weight", "div_closed"} <= logged[0].keys()
    similarity = logged[-1]["cka_off_diagonal"]
    assert similarity.keys() == {"0.05", "0.25", "0.5", "0.75", "0.95"}
    assert all(-1 < value <= 1 for value in similarity.values())
    with np.load(tmp_path / "whole" / "cka-0000004.npz") as file:
        matrices = dict(file)
    assert matrices.keys() == similarity.keys()
    for t, matrix in matrices.items():
        assert matrix.shape == (6, 6) and np.allclose(matrix, matrix.T)
        assert matrix.diagonal() == pytest.approx(np.ones(6)), "a block equals itself"
        others = [matrix[a, b] for a in range(6) for b in range(6) if a != b]
        assert similarity[t] == pytest.approx(sum(others) / 30)
    assert whole["config"]["arch"] == "DiverseDiT"
    options = ["--num", "3", "--steps", "2", "--grid", str(tmp_path / "grid.png")]
    sample.main([str(tmp_path / "whole" / "last.pt"), *options])
    assert (tmp_path / "grid.png").exists()


def test_plain_checkpoint_starts_a_diverse_run(cache, tmp_path, capsys):
    flags = ["--steps", 1]
    plain = train(cache, tmp_path / "plain", "--no-long-residuals", *flags, script=train_diversedit)
    assert plain["config"]["arch"] == "DiT"
    flags += ["--init", tmp_path / "plain" / "last.pt"]
    train(cache, tmp_path / "diverse", *flags, script=train_diversedit)
    message = capsys.readouterr().out
    count = len(plain["model"]) - 1  # the model computes its own position table
    assert f"{count} tensors loaded; resized: none; new: long_residuals; unused: none" in message


def test_bad_input(cache, tmp_path):
    def complain(*options):
        return refusal(cache, tmp_path / "run", *options, script=train_diversedit)

    wrong = [["div-blocks", 1], ["div-blocks", 7], ["div-gate", 0.5, 0.1], ["div-gate", 0.1, "nan"]]
    for flag, *values in wrong:
        assert f"--{flag}" in (message := complain(f"--{flag}", *values)) and str(values[-1]) in message
    assert "sideways" in (message := complain("--div-terms", "sideways")) and "--div-terms" in message
    assert "--repa-depth 9" in complain("--repa-weight", 0.5, "--repa-depth", 9)
    assert not (tmp_path / "run").exists()
