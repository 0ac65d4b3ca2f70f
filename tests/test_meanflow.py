"""MeanFlow: the identity and its exact solution, the loss, guidance inside its target, runs and samples."""

import functools
import importlib
import math
import statistics

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from conftest import difference, objective_for, randomize, refusal, rows, run_ranks, start, train
from PIL import Image
from torch.func import jvp

import dit
import sample
import train_diversedit
import train_meanflow
import train_repa
from train_diversedit import diversity_loss, gate
from train_meanflow import adaptive_loss, mean_flow_target

PLAIN = ["--omega", 1, "--kappa", 0]  # no guidance in the target


def meanflow(cache, out, *options):
    return train(cache, out, *options, script=train_meanflow)


def objective(cache, *options, std=0.05):
    return randomize(objective_for(train_meanflow, cache, *options), std)


def inputs(n=8, below=5):
    """A batch: the first label is dropped, and the last rows from `below` on have r < t."""
    torch.manual_seed(0)
    number = torch.arange(n)
    batch = {"x": torch.randn(n, 3, 8, 8), "eps": torch.randn(n, 3, 8, 8), "y": number % 3}
    batch |= {"uniform": torch.rand(n), "other_uniform": torch.rand(n), "drop": number < 1}
    return batch | {"r_below_t": number >= below}


def times(given):
    """t and r of a batch: larger and smaller of two logit-normal draws, and r = t where that is asked for."""
    t, r = [], []
    names = ("uniform", "other_uniform", "r_below_t")
    for pair in zip(*(given[name].tolist() for name in names), strict=True):
        logits = [-0.4 + statistics.NormalDist().inv_cdf(u) for u in pair[:2]]
        two = [1 / (1 + math.exp(-x)) for x in logits]
        t.append(max(two))
        r.append(min(two) if pair[2] else max(two))
    return torch.tensor(t), torch.tensor(r)


# --- the identity, on data whose mean velocity is known: x ~ N(0, S^2)

S = 0.7


def std_at(t):
    return ((1 - t) ** 2 * S**2 + t**2) ** 0.5


def exact_v(x, t):
    t = torch.as_tensor(t, dtype=x.dtype).view(-1, 1, 1, 1)
    return x * (t - (1 - t) * S**2) / std_at(t) ** 2


def exact_u(x, r, t):
    """x_t keeps its quantile along the path, so x_r = x_t std_at(r) / std_at(t)."""
    t, r = (torch.as_tensor(value, dtype=x.dtype).view(-1, 1, 1, 1) for value in (t, r))
    return x * (1 - std_at(r) / std_at(t)) / (t - r)


def gaussian_case():
    torch.manual_seed(0)
    t = torch.rand(500, dtype=torch.float64) * 0.9 + 0.1
    r = t * torch.rand(500, dtype=torch.float64) * 0.9
    return torch.randn(500, 1, 1, 1, dtype=torch.float64) * std_at(t).view(-1, 1, 1, 1), r, t


def test_the_exact_mean_velocity_is_the_target():
    """The path is x_s = x_t std(s) / std(t): u is the mean of v over it, and solves the identity."""
    x, r, t = gaussian_case()
    u = exact_u(x, r, t)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    mean = 0
    for node, weight in zip(nodes, weights, strict=True):
        s = r + (t - r) * (node + 1) / 2
        path = x * (std_at(s) / std_at(t)).view(-1, 1, 1, 1)
        mean = mean + weight / 2 * exact_v(path, s)
    torch.testing.assert_close(mean, u, rtol=1e-10, atol=1e-10)
    target = mean_flow_target(exact_u, x, r, t, exact_v(x, t), exact_v(x, t))
    assert (target - u).abs().max() < 1e-12


@pytest.mark.parametrize("tangent", [(1, 0, 0), (1, 1, 0), (1, 1, 1)])
def test_wrong_tangents_leave_a_residual(tangent):
    """Tangents of (x, r, t); (v, 0, 1) is right. The paper's table 1b has these three."""
    x, r, t = gaussian_case()
    v = exact_v(x, t)
    dx, dr, dt = tangent
    _, du_dt = jvp(exact_u, (x, r, t), (dx * v, dr * torch.ones_like(r), dt * torch.ones_like(t)))
    residual = exact_u(x, r, t) - (v - (t - r).view(-1, 1, 1, 1) * du_dt)
    assert residual.square().mean().sqrt() > 0.1


def test_any_number_of_steps_gives_the_same_samples():
    torch.manual_seed(0)
    noise = torch.randn(4000, 1, 1, 1, dtype=torch.float64)

    def u(x, t, r):
        return exact_u(x, r, t)

    one = sample.mean_flow(u, noise, sample.ode_times(1))
    assert one.std().item() == pytest.approx(S * noise.std().item(), rel=1e-12)
    for steps in (2, 7):
        torch.testing.assert_close(sample.mean_flow(u, noise, sample.ode_times(steps)), one)
    euler = sample.flow_ode(exact_v, noise, sample.ode_times(1))
    assert euler.std() < 0.01, "Euler's single step is the mean of the data"


def test_steps_of_the_sampler_are_the_formula():
    def u(x, t, r):
        return x * 0.5 + t - 3 * r

    x = torch.randn(2, 3, 4, 4).double()
    first = x - (1 - 0.6) * u(x, 1.0, 0.6)
    second = first - 0.6 * u(first, 0.6, 0.0)
    grid = torch.tensor([1, 0.6, 0], dtype=torch.float64)
    torch.testing.assert_close(sample.mean_flow(u, x, grid), second)


# --- the derivative of our own network

OPTIONS = [
    {},
    {"class_tokens": 3, "qk_norm": True},
    {"control": "cosine", "time_shift": 2.0},
    {"arch": "DiverseDiT"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_derivative_against_differences(options, monkeypatch):
    """Central differences along the path, all in float64, whose own error is about 1e-9."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    sizes = {"input_size": 8, "in_channels": 3, "num_classes": 3, **dit.parse_model("nano/2")}
    model = randomize(dit.build({"arch": "DiT", **sizes, "mean_velocity": True, **options}), std=0.1).double()
    x, v = torch.randn(2, 3, 3, 8, 8, dtype=torch.float64)
    y, t, r = torch.arange(3), torch.tensor([0.9, 0.5, 0.3]).double(), torch.tensor([0.1, 0.4, 0.0]).double()
    control = torch.tensor([[30, 40, 0, 5, 30, 30, i % 2] for i in range(3)]).double()

    def u(x, r, t):
        return model(x, t, y, control=control, r=r)

    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        target = mean_flow_target(u, x, r, t, v, v)
        h = 1e-5
        slope = (u(x + h * v, r, t + h) - u(x - h * v, r, t - h)) / (2 * h)
    expected = v - (t - r).view(-1, 1, 1, 1) * slope
    assert slope.norm() > 0.1 * v.norm()
    assert (target - expected).norm() < 1e-8 * slope.norm()
    assert not target.requires_grad


def test_tangent_moves_x(cache):
    """With another velocity as tangent, du/dt changes, and v in front of it stays."""
    x, r, t = gaussian_case()
    v, other = exact_v(x, t), torch.ones_like(x)
    h = 1e-6
    slope = (exact_u(x + h * other, r, t + h) - exact_u(x - h * other, r, t - h)) / (2 * h)
    target = mean_flow_target(exact_u, x, r, t, v, other)
    torch.testing.assert_close(target, v - (t - r).view(-1, 1, 1, 1) * slope, rtol=1e-6, atol=1e-6)


# --- the network with an interval

COUNTS = {
    ("DiT", "B/4"): 131_214_400,
    ("DiT", "B/2"): 131_288_080,
    ("DiT", "L/2"): 459_399_184,
    ("DiT", "XL/2"): 676_735_504,
    ("DiverseDiT", "XL/2"): 713_975_056,
}


@pytest.mark.parametrize("arch, model", COUNTS)
def test_parameter_counts(arch, model):
    with torch.device("meta"):
        built = dit.build({"arch": arch, "mean_velocity": True, **dit.parse_model(model)})
    assert sum(p.numel() for p in built.parameters()) == COUNTS[arch, model]


def test_size_m():
    """308M parameters and 54.0 GMAC in the paper's table."""
    config = {"arch": "DiT", "mean_velocity": True, "input_size": 32, "in_channels": 4}
    config |= dit.parse_model("M/2")
    with torch.device("meta"):
        built = dit.build(config)
    assert len(built.blocks) == 16 and built.blocks[0].attn.num_heads == 16
    assert sum(p.numel() for p in built.parameters()) == pytest.approx(308e6, rel=0.003)
    assert dit.forward_flops(config) / 2e9 == pytest.approx(54.0, rel=0.005)


def small(arch="DiT", **options):
    config = {"arch": arch, "input_size": 8, "in_channels": 3, "num_classes": 3, **dit.parse_model("nano/2")}
    torch.manual_seed(0)
    return dit.build({**config, **options})


@pytest.mark.parametrize("arch", ["DiT", "DiverseDiT"])
def test_the_interval_is_embedded(arch):
    """c = t_emb(t) + h_emb(t - r) + y_emb. Without an r, r = t. All other tensors are a plain model's."""
    plain, model = small(arch), randomize(small(arch, mean_velocity=True))
    names = {f"h_embedder.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert model.state_dict().keys() - plain.state_dict().keys() == names
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.9]), torch.tensor([0, 2])
    r = torch.tensor([0.1, 0.2])
    with torch.no_grad():
        assert torch.equal(model(x, t, y), model(x, t, y, r=t))
        assert not torch.allclose(model(x, t, y), model(x, t, y, r=r))
        c, _ = model.condition(t, t, y, None, None, r)
    expected = model.t_embedder(t) + model.h_embedder(t - r) + model.y_embedder(y)
    torch.testing.assert_close(c, expected)
    with pytest.raises(ValueError, match="mean_velocity"):
        plain(x, t, y, r=r)


def test_first_weights():
    """As for the other time; a model without the option draws what it always drew."""
    model = small(mean_velocity=True)
    for layer in (model.h_embedder.mlp[0], model.h_embedder.mlp[2]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05) and not layer.bias.any()
    assert "h_embedder.mlp.0.weight" not in small().state_dict()


# --- the loss


def test_adaptive_loss_and_its_gradient():
    """The gradient of a row is grad E / (E + c)^p / N, whatever p is."""
    torch.manual_seed(0)
    target = torch.randn(4, 3, 5, 5)
    for power in (0, 0.5, 1.0, 2.0):
        u = torch.randn(4, 3, 5, 5, requires_grad=True)
        loss, mse = adaptive_loss(u, target, power)
        loss.backward()
        errors = [((u - target)[i] ** 2).sum().item() for i in range(4)]
        assert loss.item() == pytest.approx(sum(e / (e + 0.01) ** power for e in errors) / 4, rel=1e-5)
        assert mse.tolist() == pytest.approx([e / 75 for e in errors], rel=1e-5)
        for i, e in enumerate(errors):
            expected = 2 * (u - target)[i].detach() / (e + 0.01) ** power / 4
            torch.testing.assert_close(u.grad[i], expected)


@pytest.mark.parametrize("tangent", ["data", "model"])
def test_objective_is_the_equation(cache, tangent):
    """Row by row: r = t rows learn v, the others v - (t - r) du/dt, here by differences of the network."""
    ours = objective(cache, *PLAIN, "--tangent", tangent)
    given = inputs()
    t, r = times(given)
    losses = ours(**given)
    total, mse = 0, []
    for i in range(8):
        x, eps, y = given["x"][i], given["eps"][i], given["y"][i : i + 1]
        drop = given["drop"][i : i + 1]
        x_t = ((1 - t[i]) * x + t[i] * eps)[None]
        v = (eps - x)[None]

        def u(x, r, t, y=y, drop=drop):
            with torch.no_grad():
                return ours.model(x, t.view(1), y, drop=drop, r=r.view(1))

        dx = v if tangent == "data" else u(x_t, t[i], t[i])
        h = 1e-2
        slope = (u(x_t + h * dx, r[i], t[i] + h) - u(x_t - h * dx, r[i], t[i] - h)) / (2 * h)
        error = (u(x_t, r[i], t[i]) - (v - (t[i] - r[i]) * slope)).square()
        total += (error.sum() / (error.sum() + 0.01)).item() / 8
        mse.append(error.mean().item())
    assert losses["loss"].item() == pytest.approx(total, rel=1e-5)
    # divided by the expected number of rows, 75 and 25 % of eight
    assert losses["loss_fm"].item() == pytest.approx(sum(mse[:5]) / 6, rel=1e-4)
    assert losses["loss_mean"].item() == pytest.approx(sum(mse[5:]) / 2, rel=1e-3)


def test_flow_matching_is_a_special_case(cache):
    """With r = t everywhere and p = 0, loss and gradients are train_repa's, times the number of values."""
    ours = objective(cache, *PLAIN, "--flow-ratio", 1, "--power", 0)
    normal = ["--time-normal", -0.4, 1]
    plain = randomize(objective_for(train_repa, cache, "--repa-weight", 0, *normal), 0.05)
    shared = {name: value for name, value in ours.model.state_dict().items() if "h_embedder" not in name}
    plain.model.load_state_dict(shared)
    for layer in ours.model.h_embedder.mlp[::2]:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    given = inputs(below=8)
    given["other_uniform"] = given["uniform"]
    flow = {name: given[name] for name in ("x", "y", "uniform", "eps", "drop")}
    expected, losses = plain(**flow), ours(**given)
    assert losses["loss"].item() == pytest.approx(192 * expected["loss"].item(), rel=1e-5)
    assert losses["loss_fm"].item() == pytest.approx(expected["loss_fm"].item(), rel=1e-5)
    assert "loss_mean" not in losses
    losses["loss"].backward()
    expected["loss"].backward()
    gradients = dict(ours.model.named_parameters())
    for name, parameter in plain.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name].grad, 192 * parameter.grad, rtol=1e-4, atol=1e-6)


def test_only_rows_with_an_interval_are_derived(cache, monkeypatch):
    seen = []

    def spy(u, x_t, r, t, *more):
        seen.append(t - r)
        return mean_flow_target(u, x_t, r, t, *more)

    monkeypatch.setattr(train_meanflow, "mean_flow_target", spy)
    ours = objective(cache, *PLAIN)
    ours(**inputs())
    assert len(seen[0]) == 3 and (seen[0] > 0).all()
    losses = ours(**inputs(below=8))  # a micro-batch may have no such row
    assert len(seen[1]) == 0 and losses["loss"].isfinite()


def test_the_target_is_a_constant(cache, monkeypatch):
    """No gradient through du/dt: the loss's gradient is that of |u - constant|^2."""
    ours = objective(cache, *PLAIN, "--power", 0)
    given = inputs(below=1)
    targets = []

    def spy(u, target, power):
        targets.append(target)
        return adaptive_loss(u, target, power)

    monkeypatch.setattr(train_meanflow, "adaptive_loss", spy)
    ours(**given)["loss"].backward()
    assert not targets[0].requires_grad
    found = {name: p.grad.clone() for name, p in ours.model.named_parameters() if p.requires_grad}
    ours.zero_grad()
    t, r = times(given)
    t_image = t.view(-1, 1, 1, 1)
    x_t = (1 - t_image) * given["x"] + t_image * given["eps"]
    u = ours.model(x_t, t, given["y"], drop=given["drop"], r=r)
    ((u - targets[0]).square().sum() / 8).backward()
    for name, parameter in ours.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)


# --- the draws


@pytest.mark.parametrize("ratio, drop", [(0.75, 0.1), (1, 0.1), (0, 0.1), (0.5, 0), (0.2, 0.5)])
def test_shares_of_the_rows(cache, ratio, drop):
    """P(r < t) = 1 - ratio as far as labels are kept, P(drop) is as ever, and never both."""
    flags = ["--data", cache, "--model", "nano/2", "--flow-ratio", ratio, "--label-drop", drop, *PLAIN]
    args = train_meanflow.parse_args([str(flag) for flag in flags])
    args.batch_size = 20_000
    model = small(class_dropout_prob=drop, mean_velocity=True)
    model.patch_size = model.grid = 1  # draws fewer numbers
    noise = train_meanflow.draw_noise(args, model, slice(None), 0, "cpu")
    assert not (noise["r_below_t"] & noise["drop"]).any()
    share = min(1 - ratio, 1 - drop)
    assert noise["r_below_t"].float().mean().item() == pytest.approx(share, abs=0.01)
    assert noise["drop"].float().mean().item() == pytest.approx(drop, abs=0.01)
    assert train_meanflow.Objective(model, args, {}).share_below == pytest.approx(share)


def test_times_reach_the_model(cache):
    """Both draws are shifted together with --time-shift."""
    for shift in (1, 3):
        ours = objective(cache, *PLAIN, "--time-shift", shift)
        seen = []
        ours.model.t_embedder.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        ours.model.h_embedder.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        given = inputs()
        ours(**given)
        t, r = (shift * time / (1 + (shift - 1) * time) for time in times(given))
        torch.testing.assert_close(seen[-2], t)
        torch.testing.assert_close(seen[-1], t - r)


# --- guidance inside the target


def test_guidance_where_it_belongs(cache):
    """v~ = omega v + kappa u(y) + (1 - omega - kappa) u(null) for kept labels and low <= t <= high."""
    ours = objective(cache, "--omega", 0.5, "--kappa", 0.7, "--guide-interval", 0.2, 0.6)
    t = torch.tensor([0.1, 0.2, 0.4, 0.6, 0.61, 0.4])
    drop = torch.tensor([False] * 5 + [True])
    x_t, v, y = torch.randn(6, 3, 8, 8), torch.randn(6, 3, 8, 8), torch.arange(6) % 3
    found = ours.guide(v, x_t, t, y, drop, None)
    with torch.no_grad():
        u, u_null = ours.model(x_t, t, y), ours.model(x_t, t, torch.full((6,), 3))
    guided = 0.5 * v + 0.7 * u - 0.2 * u_null
    for i in range(6):
        expected = guided if i in (1, 2, 3) else v
        torch.testing.assert_close(found[i], expected[i])
    assert not found.requires_grad


@pytest.mark.parametrize("omega, kappa", [(2, 0), (1, 0.5), (0.2, 0.92)])
def test_fixed_point_of_the_guidance(cache, omega, kappa):
    """u = w v + (1 - w) v_null with w = omega / (1 - kappa) maps to itself."""
    ours = objective_for(train_meanflow, cache, "--omega", omega, "--kappa", kappa, "--guide-interval", 0, 1)
    v_label, v_null = 1.7, -0.6
    w = omega / (1 - kappa)
    fixed = w * v_label + (1 - w) * v_null

    class Network(torch.nn.Module):
        def forward(self, x, t, y, drop=None, control=None):
            return torch.full_like(x, fixed if drop is None else v_null)

    ours.model = Network()
    x, t, keep = torch.zeros(1, 3, 8, 8), torch.tensor([0.5]), torch.tensor([False])
    found = ours.guide(torch.full_like(x, v_label), x, t, torch.tensor([0]), keep, None)
    torch.testing.assert_close(found, torch.full_like(x, fixed))


@pytest.mark.parametrize("flags, passes", [((1, 0), 0), ((2, 0), 1), ((0.5, 0.5), 1), ((0.2, 0.92), 2)])
def test_passes_and_flops(cache, flags, passes):
    """No pass without a weight; the FLOPs count each, and du/dt of a quarter of the rows as two more."""
    ours = objective(cache, "--omega", flags[0], "--kappa", flags[1])
    calls, derived = [], []
    ours.model.final_layer.register_forward_hook(lambda _, given, out: calls.append(len(given[0])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_meanflow, "mean_flow_target", lambda u, x, *_: (derived.append(len(x)), x)[1])
        ours(**inputs())
    assert calls == [8] * (passes + 1) and derived == [3]
    config = {"arch": "DiT", "mean_velocity": True, "input_size": 8, "in_channels": 3, "num_classes": 3}
    config |= dit.parse_model("nano/2")
    expected = (3 + passes + 0.25 * 2) * dit.forward_flops(config)
    assert ours.flops(config) == pytest.approx(expected)


# --- DiverseDiT


def test_diverse_is_diversedits_loss(cache):
    """L = L_mean + w(L_div) L_div with the tokens of the ordinary forward pass, at u(x_t, r, t)."""
    ours = objective(cache, *PLAIN, "--diverse")
    assert isinstance(ours.model, dit.DiverseDiT)
    given, chosen = inputs(), [2, 5, 6]
    t, r = times(given)
    t_image = t.view(-1, 1, 1, 1)
    x_t = (1 - t_image) * given["x"] + t_image * given["eps"]
    _, tokens = ours.model(x_t, t, given["y"], drop=given["drop"], r=r, return_blocks=chosen)
    loss_div, _ = diversity_loss(torch.stack(tokens))
    plain, losses = ours(**given), ours(**given, chosen=chosen)
    assert losses["loss_div"].item() == pytest.approx(loss_div.item(), rel=1e-5)
    expected = plain["loss"].item() + (gate(loss_div) * loss_div).item()
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_diverse_run(cache, tmp_path):
    meanflow(cache, tmp_path / "run", "--diverse", "--steps", 2, "--sample-every", 2)
    logged = rows(tmp_path / "run")[-1]
    assert {"loss", "loss_fm", "loss_mean", "loss_div", "div_weight", "div_closed"} <= logged.keys()
    assert logged["cka_off_diagonal"].keys() == {"0.05", "0.25", "0.5", "0.75", "0.95"}


# --- runs


@pytest.fixture
def short(tiny_nano):
    return ["--steps", 4]


@pytest.mark.parametrize("flags", [[], PLAIN, ["--tangent", "model", "--precision", "bf16"]])
def test_micro_batches_and_resume(cache, tmp_path, short, flags):
    """Four steps are two and two more; halves of the batch give the same gradients, losses and weights."""
    whole = meanflow(cache, tmp_path / "whole", *short, *flags)
    meanflow(cache, tmp_path / "cut", *short, *flags, "--steps", 2)
    assert difference(whole, meanflow(cache, tmp_path / "cut", *short, *flags)) == 0
    micro = meanflow(cache, tmp_path / "micro", *short, *flags, "--micro-batch", 8)
    assert difference(whole, micro) < (2e-2 if "bf16" in flags else 1e-4)
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "micro"), strict=True):
        assert a["loss_fm"] == pytest.approx(b["loss_fm"], rel=1e-2 if "bf16" in flags else 1e-4)
        assert a["loss_mean"] == pytest.approx(b["loss_mean"], rel=1e-2 if "bf16" in flags else 1e-3)


def test_two_processes_are_one(cache, tmp_path, short, processes):
    one = meanflow(cache, tmp_path / "one", *short)
    run_ranks(processes, start, "train_meanflow", cache, tmp_path / "two", *short)
    two = torch.load(tmp_path / "two" / "last.pt", weights_only=True)
    assert difference(one, two) < 1e-4
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert [a[name] for name in ("loss", "loss_fm")] == pytest.approx(
            [b[name] for name in ("loss", "loss_fm")], rel=1e-5
        )


def test_conditioning_options(cache, tmp_path, short):
    flags = ["--control", "cosine", "--class-tokens", 2, "--qk-norm", "--diverse", "--tangent", "model"]
    run = meanflow(cache, tmp_path / "run", *short, *flags)
    assert run["config"]["mean_velocity"] and run["config"]["class_tokens"] == 2
    assert all(np.isfinite(row["loss_mean"]) for row in rows(tmp_path / "run"))


@pytest.mark.parametrize("flags", [PLAIN, []])
def test_blocks_stay_compiled(cache, tmp_path, short, monkeypatch, flags):
    """Compiled blocks run in every step, also after the derivative: without force_eager they stop at once."""
    calls = []

    def counting(graph, _):
        def run(*arguments):
            calls.append(step[0])
            return graph(*arguments)

        return run

    step = [0]
    torch._dynamo.reset()
    compiled = functools.partialmethod(torch.nn.Module.compile, backend=counting)
    monkeypatch.setattr(dit.DiTBlock, "compile", compiled)
    draw = train_meanflow.draw_noise

    def next_step(*arguments):
        step[0] += 1
        return draw(*arguments)

    monkeypatch.setattr(train_meanflow, "draw_noise", next_step)
    meanflow(cache, tmp_path / "run", *short, "--compile", *flags)
    passes = 3 if not flags else 1  # u, and the two of the guidance; two blocks each
    assert [calls.count(k) for k in (1, 2, 3, 4)] == [2 * passes] * 4


def test_no_warning(cache, tmp_path, short, recwarn):
    meanflow(cache, tmp_path / "run", *short, "--flow-ratio", 0)
    assert not [warning for warning in recwarn if "deprecated" in str(warning.message)]


def test_a_plain_run_starts_this_one(cache, tmp_path, short, capsys):
    plain = train(cache, tmp_path / "plain", *short, "--repa-weight", 0)
    meanflow(cache, tmp_path / "mean", *short, "--init", tmp_path / "plain")
    count = len(plain["model"]) - 1  # the model computes its own position table
    message = capsys.readouterr().out
    assert f"{count} tensors loaded; resized: none; new: h_embedder; unused: none" in message
    train(cache, tmp_path / "back", *short, "--repa-weight", 0, "--init", tmp_path / "mean")
    assert f"{count} tensors loaded; resized: none; new: none; unused: h_embedder" in capsys.readouterr().out


def test_the_averages_are_sampled_in_one_step(cache, tmp_path, short, capsys):
    """Checkpoint -> sample.py: one evaluation by default; the other samplers use u(x, t, t)."""
    run = tmp_path / "run"
    meanflow(cache, run, *short, *PLAIN, "--lr", 0.05, "--ema", 0)
    drawn = {}
    cases = {
        "": "sampler mean, steps 1,",
        "--sampler mean": "sampler mean, steps 1,",
        "--steps 2": "sampler mean, steps 2,",
        "--sampler ode": "sampler ode, steps 50,",
    }
    for i, (flags, protocol) in enumerate(cases.items()):
        out = tmp_path / f"{i}.npz"
        sample.main([str(run), "--num", "4", "--out", str(out), *flags.split()])
        assert protocol in capsys.readouterr().out
        with np.load(out) as file:
            drawn[flags] = file["arr_0"]
    assert np.array_equal(drawn[""], drawn["--sampler mean"])
    assert not np.array_equal(drawn[""], drawn["--steps 2"])
    sample.main([str(run), "--num", "2", "--out", str(tmp_path / "g.npz"), "--sampler", "ode", "--cfg", "2"])


def test_the_picture_at_the_end(cache, tmp_path, short, capsys, monkeypatch):
    """Three rows of the same noises: one evaluation, one Euler step, 25; each is what `generate` gives."""
    seen, generate = [], sample.generate

    def spy(model, indices, y, **options):
        x = generate(model, indices, y, **options)
        seen.append((indices, options, x))
        return x

    monkeypatch.setattr(sample, "generate", spy)
    meanflow(cache, tmp_path / "run", *short, "--sample-every", 4)
    path = tmp_path / "run" / "samples-0000004-steps.png"
    assert Image.open(path).size == (3 * 52 - 4, 3 * 52 - 4)  # three classes, three rows, 48 pixels and a gap
    assert f"{path}: the same noises in three rows" in capsys.readouterr().out
    three = [(indices, options) for indices, options, _ in seen if "steps" in options]
    found = [(options["sampler"], options["steps"]) for _, options in three]
    assert found == [("mean", 1), ("ode", 1), ("ode", 25)]
    assert len({(indices, options["seed"]) for indices, options in three}) == 1
    one, euler, _ = (x for _, options, x in seen if "steps" in options)
    assert not torch.allclose(one, euler)
    # the previews are drawn with one evaluation
    previews = [options for _, options, _ in seen if "steps" not in options]
    assert previews and all("sampler" not in options for options in previews)


def test_preview_samples_with_the_mean_velocity():
    assert sample.choose_sampler(small(mean_velocity=True))[0] == "mean"
    assert sample.choose_sampler(small(mean_velocity=True))[1].tolist() == [1, 0]
    assert sample.choose_sampler(small())[0] == "ode"
    assert len(sample.choose_sampler(small(mean_velocity=True, time_shift=2.0), "mean", 4)[1]) == 5


# --- refusals


def sampled(*flags):
    with pytest.raises(SystemExit) as error:
        sample.main([str(flag) for flag in flags])
    assert "\n" not in str(error.value.code)
    return str(error.value.code)


def test_samplers_that_do_not_fit(cache, tmp_path, short):
    out = tmp_path / "new.npz"
    train(cache, tmp_path / "flow", *short, "--repa-weight", 0)
    assert "--sampler mean" in sampled(tmp_path / "flow", "--out", out, "--sampler", "mean")
    meanflow(cache, tmp_path / "plain", *short, *PLAIN)
    meanflow(cache, tmp_path / "guided", *short)
    message = sampled(tmp_path / "guided", "--out", out, "--cfg", 2, "--sampler", "ode")
    assert "--cfg 2" in message and "twice" in message
    message = sampled(tmp_path / "plain", "--out", out, "--cfg", 2)
    assert "--cfg 2" in message and "--sampler ode" in message
    train(cache, tmp_path / "control", *short, *PLAIN, "--control", "cosine", script=train_meanflow)
    message = sampled(tmp_path / "control", "--out", out, "--control-cfg", 0.5)
    assert "--control-cfg 0.5" in message and "--sampler ode" in message
    with pytest.raises(ValueError, match="guided"):
        sample.generate(small(mean_velocity=True), range(2), torch.arange(2), scale=2.0)
    assert not out.exists()


WRONG = [
    ("omega", 0),
    ("omega", "nan"),
    ("kappa", 1),
    ("kappa", -0.1),
    ("guide-interval", 0.5, 0.5),
    ("guide-interval", 0.8, 0.2),
    ("guide-interval", 0, 1.5),
    ("flow-ratio", 1.5),
    ("power", -1),
    ("tangent", "noise"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_bad_input(cache, tmp_path, wrong):
    flag, *values = wrong
    message = refusal(cache, tmp_path / "run", f"--{flag}", *values, script=train_meanflow)
    assert f"--{flag}" in message and str(values[-1]) in message
    assert not (tmp_path / "run").exists()


def test_guidance_needs_a_null_class(cache, tmp_path):
    flags = ["--label-drop", 0]
    message = refusal(cache, tmp_path / "run", *flags, script=train_meanflow)
    assert "--label-drop" in message and "--omega 0.2" in message
    meanflow(cache, tmp_path / "run", *flags, *PLAIN, "--steps", 1)


def test_settings_of_the_paper():
    args = train_meanflow.parse_args([])
    assert (args.steps, args.batch_size, args.lr, args.beta2, args.clip) == (1_200_000, 256, 1e-4, 0.95, 0)
    assert (args.omega, args.kappa, args.guide_interval) == (0.2, 0.92, [0, 0.75])
    assert args.omega / (1 - args.kappa) == pytest.approx(2.5)
    assert (args.time_normal, args.flow_ratio, args.power, args.precision) == ([-0.4, 1], 0.75, 1, "fp32")
    digits = train_meanflow.parse_args(["--digits"])
    assert (digits.steps, digits.omega, digits.kappa) == (1000, 1, 0)


def test_diversedit_is_taken_over():
    """No second copy of the loss, the gate and the blocks drawn."""
    for name in ("gated_diversity_loss", "choose_blocks"):
        assert getattr(train_meanflow, name) is getattr(train_diversedit, name)
    assert importlib.import_module("train_meanflow").F is F
