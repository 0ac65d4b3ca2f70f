"""DiT's own objective: the variational bound, the schedule, the ancestral sampler, and the script."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import objective_for, randomize, refusal, rows, train
from test_official import official, vae  # noqa: F401

import dit
import files
import sample
import train_dit
import train_repa

SMALL = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=3)


def alpha_bars():
    """a_k = prod (1 - beta_i) of the 1000 timesteps, by a loop."""
    products, product = [], 1.0
    for i in range(1000):
        product *= 1 - (1e-4 + i * (2e-2 - 1e-4) / 999)
        products.append(product)
    return products


A = alpha_bars()


def posterior(x, x_k, k, l_bar):
    """Mean and variance of x_l given x and x_k, from Bayes' rule: a product of two normal densities."""
    keep = A[k] / l_bar  # 1 - beta
    prior, likelihood = 1 / (1 - l_bar), keep / (1 - keep)  # precisions of x_l
    mean = (prior * math.sqrt(l_bar) * x + likelihood * x_k / math.sqrt(keep)) / (prior + likelihood)
    return mean, 1 / (prior + likelihood)


def noise_model(**more):
    return randomize(dit.NoiseDiT(**SMALL | more)).eval()


def images(n=4):
    torch.manual_seed(0)
    return torch.randn(4, n, 3, 8, 8)  # x, eps, e, v


# --- the schedule


def test_schedule_of_all_timesteps():
    schedule = dit.ddpm_schedule()
    assert [step.k for step in schedule] == list(range(1000))
    for k, share in ((249, 0.5241), (499, 0.0786), (749, 0.0034)):
        assert schedule[k].alpha ** 2 == pytest.approx(share, abs=5e-5)
    for k, step in enumerate(schedule):
        beta = 1e-4 + k * (2e-2 - 1e-4) / 999
        assert step.alpha**2 == pytest.approx(A[k], rel=1e-10)
        assert step.alpha**2 + step.sigma**2 == pytest.approx(1, rel=1e-10)
        assert math.exp(step.log_beta) == pytest.approx(beta, rel=1e-9)
        if k:
            c2, variance = posterior(0.0, 1.0, k, A[k - 1])
            c1, _ = posterior(1.0, 0.0, k, A[k - 1])
            assert (step.c1, step.c2) == pytest.approx((c1, c2), rel=1e-9)
            assert math.exp(step.log_beta_tilde) == pytest.approx(variance, rel=1e-9)
    assert (schedule[0].c1, schedule[0].c2) == (pytest.approx(1), 0)
    assert schedule[0].log_beta_tilde == schedule[1].log_beta_tilde


@pytest.mark.parametrize("steps", [2, 50, 250])
def test_respaced_schedule(steps):
    """Steps over several timesteps: beta_j multiply to the same product, and Bayes' rule holds for each."""
    schedule = dit.ddpm_schedule(steps)
    ks = [int(step.k) for step in schedule]
    if steps == 250:
        assert ks[:6] == [0, 4, 8, 12, 16, 20] and ks[-3:] == [991, 995, 999]
    assert ks == sorted({round(999 * i / (steps - 1)) for i in range(steps)})
    product = math.prod(1 - math.exp(step.log_beta) for step in schedule)
    assert product == pytest.approx(A[999], rel=1e-9)
    for lower, step in zip(ks[:-1], schedule[1:], strict=True):
        c2, variance = posterior(0.0, 1.0, int(step.k), A[lower])
        c1, _ = posterior(1.0, 0.0, int(step.k), A[lower])
        expected = (c1, c2, math.log(variance))
        assert (step.c1, step.c2, step.log_beta_tilde) == pytest.approx(expected, rel=1e-9)
    assert schedule[0].log_beta_tilde == schedule[1].log_beta_tilde


def test_times_and_timesteps_are_inverse():
    """Also in float32: the t of a whole timestep is rounded to that timestep."""
    model = dit.NoiseDiT(**SMALL)
    times = sample.ddpm_times(1000)[:-1].flip(0)
    expected = [math.sqrt(1 - a) / (math.sqrt(a) + math.sqrt(1 - a)) for a in A]
    assert times.tolist() == pytest.approx(expected, rel=1e-9)
    known = [0.0099, 0.4880, 0.7740, 0.9452, 0.9937]
    assert times[[0, 249, 499, 749, 999]].tolist() == pytest.approx(known, abs=5e-5)
    k = torch.arange(1000).float()
    assert torch.equal(model.timestep(times.float()).round(), k)
    torch.testing.assert_close(model.timestep(times.float()), k, rtol=0, atol=2e-3)
    torch.testing.assert_close(model.control_time(k), times.float(), rtol=0, atol=1e-6)
    between = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(model.control_time(model.timestep(between)), between, rtol=0, atol=1e-6)
    assert model.timestep(torch.tensor([0.001, 0.9999])).tolist() == [0, 999]


# --- the loss


def test_variational_bound_is_a_divergence_of_two_normal_distributions():
    """k > 0: against torch.distributions in float64, for noise and variances of any value."""
    ks = [1, 2, 17, 400, 998, 999]
    x, eps, e, v = images(len(ks))
    model = dit.NoiseDiT(**SMALL)
    found = train_dit.variational_bound(x, eps, e, v, model.steps_at(torch.tensor(ks)))
    for i, k in enumerate(ks):
        a, beta = A[k], 1 - A[k] / A[k - 1]
        x_i, eps_i, e_i, v_i = (tensor[i].double() for tensor in (x, eps, e, v))
        x_k = math.sqrt(a) * x_i + math.sqrt(1 - a) * eps_i
        x_e = (x_k - math.sqrt(1 - a) * e_i) / math.sqrt(a)
        mean_q, variance = posterior(x_i, x_k, k, A[k - 1])
        mean_p, _ = posterior(x_e, x_k, k, A[k - 1])
        std_p = torch.exp((v_i + 1) / 4 * math.log(beta) + (1 - v_i) / 4 * math.log(variance))
        q = torch.distributions.Normal(mean_q, math.sqrt(variance))
        p = torch.distributions.Normal(mean_p, std_p)
        bits = torch.distributions.kl_divergence(q, p).mean() / math.log(2)
        assert found[i].item() == pytest.approx(bits.item(), rel=2e-4)


def test_variational_bound_of_the_last_step_is_a_likelihood():
    """k = 0: bits of the levels, from the exact normal distribution; the tanh is off by up to 3e-4."""
    x, eps, e, v = images(2)
    x = x.clamp(-1, 1) * torch.tensor([1.0, 0.3]).view(2, 1, 1, 1)
    e = eps + 0.3 * e
    model = dit.NoiseDiT(**SMALL)
    found = train_dit.variational_bound(x, eps, e, v, model.steps_at(torch.tensor([0, 0])))
    sigma = math.sqrt(1 - A[0])
    x_e = (math.sqrt(A[0]) * x + sigma * eps - sigma * e) / math.sqrt(A[0])
    _, variance = posterior(0.0, 0.0, 1, A[0])  # replaces that of k = 0, which is 0
    std = torch.exp((v + 1) / 4 * math.log(1e-4) + (1 - v) / 4 * math.log(variance))
    p = torch.distributions.Normal(x_e.double(), std.double())
    upper = torch.where(x > 0.999, 1.0, p.cdf(x.double() + 1 / 255))
    lower = torch.where(x < -0.999, 0.0, p.cdf(x.double() - 1 / 255))
    bits = -(upper - lower).log2().flatten(1).mean(1)
    assert found.tolist() == pytest.approx(bits.tolist(), rel=0.01)


def test_levels_sum_to_one():
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean in (-1.5, -0.3, 0.0, 0.999):
        p = train_dit.log_probability(levels, torch.tensor(mean), torch.tensor(2 * math.log(0.05))).exp()
        assert p.sum().item() == pytest.approx(1, abs=1e-6)


def test_variance_is_best_at_the_posteriors():
    """With exact noise the bound is 0 at v = -1, log beta_tilde, and rises on both sides."""
    x, eps, _, _ = images()
    step = dit.NoiseDiT(**SMALL).steps_at(torch.tensor([1, 2, 5, 20]))  # later, beta is nearly beta_tilde
    middle = (step.log_beta + step.log_beta_tilde) / 2
    for v, value in ((-1.0, step.log_beta_tilde), (1.0, step.log_beta), (0.0, middle)):
        torch.testing.assert_close(step.log_variance(torch.tensor(v)), value)
    bounds = [train_dit.variational_bound(x, eps, eps, torch.full_like(x, v), step) for v in (-2, -1, 0)]
    assert (bounds[1].abs() < 1e-6).all() and (bounds[0] > bounds[1]).all() and (bounds[2] > bounds[1]).all()


def inputs():
    torch.manual_seed(0)
    x, eps, targets = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.randn(4, 16, 82)
    t = torch.tensor([0.0, 0.3334, 0.75, 1 - 2**-24])
    y, drop = torch.tensor([0, 1, 2, 0]), torch.arange(4) == 1
    return dict(x=x, eps=eps, y=y, uniform=t, drop=drop, targets=targets)


@pytest.mark.parametrize("weight", [0, 0.5])
def test_objective_is_the_equation(cache, tiny_nano, weight):
    objective = randomize(objective_for(train_dit, cache, "--repa-weight", weight, "--repa-depth", 1))
    given = inputs()
    losses = objective(**given)
    ks = [0, 333, 750, 999]
    triples = zip(ks, given["x"], given["eps"], strict=True)
    x_k = torch.stack([math.sqrt(A[k]) * x + math.sqrt(1 - A[k]) * eps for k, x, eps in triples])
    y = torch.tensor([0, 3, 2, 0])  # one label is dropped
    plain = super(dit.NoiseDiT, objective.model).forward
    output, (tokens,) = plain(x_k, torch.tensor(ks).float(), y, return_blocks=[1])
    loss = (output[:, :3] - given["eps"]).square().mean()
    assert losses["loss_noise"].item() == pytest.approx(loss.item(), rel=1e-5)
    step = objective.model.steps_at(torch.tensor(ks))
    bound = train_dit.variational_bound(given["x"], given["eps"], output[:, :3], output[:, 3:], step).mean()
    assert losses["loss_vb"].item() == pytest.approx(bound.item(), rel=1e-4)
    total = loss + bound
    if weight:
        repa = train_repa.repa_loss([objective.alignment.projectors[0](tokens)], [given["targets"]])
        assert losses["loss_repa"].item() == pytest.approx(repa.item(), rel=1e-5)
        total = total + 0.5 * repa
    assert losses["loss"].item() == pytest.approx(total.item(), rel=1e-4)
    assert losses.keys() == {"loss", "loss_noise", "loss_vb"} | ({"loss_repa"} if weight else set())


def test_each_loss_trains_its_channels(cache, tiny_nano):
    """The bound does not reach the noise, L_simple does not reach the variance: rows of the last layer."""
    objective = randomize(objective_for(train_dit, cache))
    weight = objective.model.final_layer.linear.weight
    for name, trained in (("loss_noise", 0), ("loss_vb", 1)):
        gradient = torch.autograd.grad(objective(**inputs())[name], weight)[0].view(4, 2, 3, -1)
        assert (gradient[:, trained] != 0).any((0, 2)).all() and not gradient[:, 1 - trained].any()


def test_losses_at_the_start(cache, tiny_nano):
    """Zero output: L_simple is the mean of eps^2, and L_vb 0.014 bits for k > 0, by a closed form."""
    objective = objective_for(train_dit, cache)
    losses = objective(**inputs())
    assert losses["loss_noise"].item() == pytest.approx(inputs()["eps"].square().mean().item(), rel=1e-6)
    torch.manual_seed(1)
    x, eps = torch.randn(2, 1000, 3, 8, 8)
    zero = torch.zeros_like(x)
    bounds = train_dit.variational_bound(x, eps, zero, zero, objective.model.steps_at(torch.arange(1000)))
    total = 0
    for k in range(1, 1000):
        c1, variance = posterior(1.0, 0.0, k, A[k - 1])
        between = math.sqrt((1 - A[k] / A[k - 1]) * variance)  # of the model: half way in the logarithm
        error = c1**2 * (1 / A[k] - 1)
        total += ((variance + error) / between - 1 + math.log(between / variance)) / 2 / math.log(2)
    assert bounds[1:].mean().item() == pytest.approx(total / 999, rel=0.02)
    assert total / 999 == pytest.approx(0.01416, rel=1e-3) and 1 < bounds[0] < 3


def test_velocity_has_the_error_of_the_noise():
    """|e - eps|^2 = (1 - t)^2 |v - (eps - x)|^2, and the variance's channels are left out."""
    model, (x, eps, _, _) = noise_model(), images()
    k, y = torch.tensor([5, 300, 700, 990]), torch.tensor([0, 1, 2, 3])
    step = model.steps_at(k)
    e = model.predict(step.alpha * x + step.sigma * eps, k.float(), y)[:, :3]
    t = (step.sigma / (step.alpha + step.sigma)).flatten()
    t_image = t.view(-1, 1, 1, 1)
    v, tokens = model((1 - t_image) * x + t_image * eps, t, y, return_blocks=[2])
    assert v.shape == x.shape and tokens[0].shape == (4, 16, 32)
    noise_error, error = ((a - b).square().flatten(1).mean(1) for a, b in ((e, eps), (v, eps - x)))
    torch.testing.assert_close(noise_error, (1 - t) ** 2 * error, rtol=5e-3, atol=0)


# --- the network


COUNTS = {"S": 32_963_360, "B": 130_512_416, "L": 458_102_816, "XL": 675_129_632}


@pytest.mark.parametrize("size, count", COUNTS.items())
def test_official_parameters(size, count):
    with torch.device("meta"):
        model = dit.build({"arch": "NoiseDiT", **dit.parse_model(f"{size}/2")})
    state = model.state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == count
    if size == "XL":
        assert len(state) == 292 == 28 * 10 + 12
        assert state["final_layer.linear.weight"].shape == (32, 1152)
        assert state["final_layer.linear.bias"].shape == (32,)
        assert state["y_embedder.embedding_table.weight"].shape == (1001, 1152)


def test_order_of_the_channels():
    """Output index of a token: (row P + column) 2C + channel, noise first, as in the official files."""
    model = dit.NoiseDiT(**SMALL).eval()
    torch.nn.init.zeros_(model.final_layer.linear.weight)
    model.final_layer.linear.bias.data = torch.arange(24.0)
    output = model.predict(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.tensor([0]))
    for row, column, channel in ((0, 0, 0), (0, 1, 2), (1, 0, 3), (1, 1, 5)):
        assert (output[0, channel, row::2, column::2] == (2 * row + column) * 6 + channel).all()


def test_control_is_weighed_by_the_time_of_flow_matching():
    model = noise_model(control="cosine")
    seen = []
    model.control_embedder.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    control = torch.tensor([[512, 512, 0, 0, 512, 512, 0]])
    x, t, y = images()[0][:1], torch.tensor([0.3]), torch.tensor([1])
    model(x, t, y, control=control)
    model.predict(x, torch.tensor([499.0]), y, control=control)
    assert seen[0].item() == pytest.approx(0.3, abs=1e-6)
    assert seen[1].item() == pytest.approx(0.7740, abs=5e-5)


# --- the sampler


def exact_model(std, seen=None):
    """E[eps | x_k] of data N(0, std^2), and the channel for the variance of x_l given x_k, at 250 steps."""
    schedule = dit.ddpm_schedule(250)
    times = sample.ddpm_times(250).tolist()

    def model(x, t):
        step = schedule[249 - times.index(t)]
        if seen is not None:
            seen.append(x)
        total = step.alpha**2 * std**2 + step.sigma**2  # the variance of x_k
        eps = step.sigma / total * x
        left = std**2 * step.sigma**2 / total  # the variance of x given x_k
        wanted = math.log(math.exp(step.log_beta_tilde) + step.c1**2 * left)
        share = (wanted - step.log_beta_tilde) / (step.log_beta - step.log_beta_tilde)
        return torch.cat([eps, torch.full_like(eps, 2 * share - 1)], dim=1)

    return model


def drawn(generators, shape):
    return torch.from_numpy(np.stack([g.standard_normal(shape, np.float32) for g in generators])).double()


def test_exact_noise_and_variance_give_the_distribution_of_the_data():
    generator, seen = torch.Generator().manual_seed(0), []

    def noise():
        return torch.randn(50, 4, 25, 25, generator=generator)

    x = sample.ddpm(exact_model(0.7, seen), noise(), sample.ddpm_times(), noise)
    assert seen[0].std().item() == pytest.approx(1, abs=0.01), "it starts from N(0, 1), not from x_t"
    assert x.dtype == torch.float64 and x.std().item() == pytest.approx(0.7, abs=0.01)


def test_ddpm_is_the_written_out_step(monkeypatch):
    """Three steps of generate: integer timesteps, the model's variance, no noise in the last step."""
    model, seen = noise_model(), []
    predict = dit.DiT.forward

    def spy(self, x, t, y, **options):
        seen.append(t)
        return predict(self, x, t, y, **options)

    monkeypatch.setattr(dit.DiT, "forward", spy)
    y = torch.tensor([0, 2])
    found = sample.generate(model, range(2), y, "ddpm", 3, seed=5)
    assert [t.tolist() for t in seen] == [[999, 999], [500, 500], [0, 0]]

    generators = sample.image_generators(5, range(2))

    def draw():
        return drawn(generators, (3, 8, 8))

    x = draw()
    for k, l_bar in ((999, A[500]), (500, A[0]), (0, 1.0)):
        with torch.no_grad():
            e, v = predict(model, x.float(), torch.full((2,), float(k)), y).double().chunk(2, dim=1)
        x_e = (x - math.sqrt(1 - A[k]) * e) / math.sqrt(A[k])
        if k == 0:
            x = x_e
            continue
        x, variance = posterior(x_e, x, k, l_bar)
        log_beta = math.log(1 - A[k] / l_bar)
        x = x + torch.exp((v + 1) / 4 * log_beta + (1 - v) / 4 * math.log(variance)) * draw()
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_guidance_of_the_noise_leaves_the_variance_alone():
    model, (x, _, _, _) = noise_model(control="constant"), images(2)
    y, t = torch.tensor([0, 2]), torch.full((2,), sample.ddpm_times(250)[100].item())
    control = torch.tensor([[512, 512, 0, 0, 512, 512, 0], [64, 64, 0, 0, 64, 64, 1]])

    def at(classes, c):
        return model.predict_at(x, t, torch.tensor(classes), control=c)

    full, null, zero = at([0, 2], control), at([3, 3], control), 0 * control
    guided = sample.guided(model, y, 2.5, control=control, predict_noise=True)(x, t[0].item())
    torch.testing.assert_close(guided[:, :3], (null + 2.5 * (full - null))[:, :3])
    torch.testing.assert_close(guided[:, 3:], full[:, 3:])
    options = dict(control=control, control_scale=1.5, predict_noise=True)
    guided = sample.guided(model, y, 2.0, **options)(x, t[0].item())
    only_class, nothing = at([0, 2], zero), at([3, 3], zero)
    v = only_class + 1.5 * (full - only_class)
    torch.testing.assert_close(guided[:, :3], (nothing + 2 * (v - nothing))[:, :3])
    torch.testing.assert_close(guided[:, 3:], full[:, 3:])
    guide = randomize(dit.NoiseDiT(**SMALL, control="constant"), std=0.2).eval()
    weak = guide.predict_at(x, t, y, control=control)
    guided = sample.guided(model, y, 2.0, guide=guide, control=control, predict_noise=True)(x, t[0].item())
    torch.testing.assert_close(guided, torch.cat([(2 * full - weak)[:, :3], full[:, 3:]], dim=1))


def test_default_and_refused_samplers(cache, tmp_path, tiny_nano):
    name, times = sample.choose_sampler(dit.NoiseDiT(**SMALL))
    assert name == "ddpm" and len(times) == 251 and times[-1] == 0
    assert times[0].item() == pytest.approx(0.9937, abs=5e-5)
    train(cache, tmp_path / "flow", "--steps", 1)
    train(cache, tmp_path / "noise", "--steps", 1, script=train_dit)
    for run, flags, said in (
        ("flow", "--sampler ddpm", "--sampler ddpm: .*ode"),
        ("noise", "--sampler ddpm --steps 1001", "--steps 1001: .*1000"),
        ("noise", "--steps 1", "--steps 1: .*2 to 1000"),
        ("noise", "--sampler edm", "--sampler edm: .*ddpm or ode"),
        ("noise", f"--cfg 2 --guide {tmp_path / 'flow'}", "--guide .*another loss"),
    ):
        with pytest.raises(SystemExit, match=said):
            sample.main([str(tmp_path / run), *flags.split(), "--num", "1", "--out", str(tmp_path / "x.npz")])
    for sampler in ("ddpm", "ode", "heun", "sde"):
        out = tmp_path / f"{sampler}.npz"
        flags = f"--sampler {sampler} --steps 3 --num 2 --cfg 1.5 --out {out}"
        sample.main([str(tmp_path / "noise"), *flags.split()])
        assert np.load(out)["arr_0"].shape == (2, 8, 8, 3)


def test_official_file_through_the_program(official, vae, tmp_path):  # noqa: F811
    """A DiT file with random weights keeps its variances: guided pixels are those of a written-out loop."""
    torch.manual_seed(2)
    model = randomize(dit.NoiseDiT(input_size=8, **dit.parse_model("small/2"), num_classes=7)).eval()
    torch.save(model.state_dict(), tmp_path / "DiT.pt")
    loaded, checkpoint = files.load_model(tmp_path / "DiT.pt")
    state = model.state_dict()
    assert checkpoint["config"]["arch"] == "NoiseDiT" and loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())

    options = f"{tmp_path}/DiT.pt --num 2 --labels 3,5 --sampler ddpm --steps 4 --cfg 1.5 --vae {vae}"
    sample.main([*options.split(), "--out", f"{tmp_path}/out.npz"])
    with np.load(tmp_path / "out.npz") as file:
        pixels, protocol = file["arr_0"][:, :8, :8].astype(int), json.loads(str(file["protocol"]))
    assert (protocol["sampler"], protocol["steps"]) == ("ddpm", 4)
    generators = sample.image_generators(0, range(2))

    def draw():
        return drawn(generators, (4, 8, 8))

    x, ks = draw(), [999, 666, 333, 0]
    for k, lower in zip(ks, [*ks[1:], None], strict=True):
        with torch.no_grad():
            times = torch.full((2,), float(k))
            null, full = (model.predict(x.float(), times, torch.tensor(y)).double() for y in ([7, 7], [3, 5]))
        null, (e, v) = null[:, :4], full.chunk(2, dim=1)
        x_e = (x - math.sqrt(1 - A[k]) * (null + 1.5 * (e - null))) / math.sqrt(A[k])
        if lower is None:
            x = x_e
            continue
        x, variance = posterior(x_e, x, k, A[lower])
        std = torch.exp((v + 1) / 4 * math.log(1 - A[k] / A[lower]) + (1 - v) / 4 * math.log(variance))
        x = x + std * draw()
    image = ((x / 0.18215)[:, :3].clamp(-1, 1) * 127.5 + 127.5).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(pixels - image).max() <= 1 and (pixels != image).mean() < 0.05


# --- the script


def test_timesteps_are_uniform(cache, tiny_nano, monkeypatch):
    """Whole numbers, each for a thousandth of t; the largest t below 1 is the timestep 999."""
    objective, seen, steps_at = objective_for(train_dit, cache), [], dit.NoiseDiT.steps_at
    monkeypatch.setattr(dit.NoiseDiT, "steps_at", lambda self, k: (seen.append(k), steps_at(self, k))[1])
    t = (torch.arange(4000) + 0.5) / 4000
    t = torch.cat([t, torch.tensor([0.0, 1 - 2**-24])])
    one = {name: value[:1].expand(4002, *value.shape[1:]) for name, value in inputs().items()}
    with torch.no_grad():
        objective(**one | {"uniform": t})
    assert torch.bincount(seen[0]).tolist() == [5, *[4] * 998, 5]


def test_log_and_refusals(cache, tmp_path, tiny_nano, capsys):
    train(cache, tmp_path / "run", "--repa-weight", 0.5, "--repa-depth", 1, 2, script=train_dit)
    row = rows(tmp_path / "run")[0]
    assert 0.9 < row["loss_noise"] < 1.1 and 0 < row["loss_vb"] < 0.5 and -1 <= row["loss_repa"] <= 1
    assert row["loss"] == pytest.approx(row["loss_noise"] + row["loss_vb"] + 0.5 * row["loss_repa"], rel=1e-5)
    assert f"step 1: loss_noise {row['loss_noise']:.4f}" in capsys.readouterr().out
    for flags, said in (
        (("--time-shift", 2), "--time-shift 2"),
        (("--time-normal", -1, 1), "--time-normal"),
        (("--repa-weight", 0.5, "--repa-depth", 3), "--repa-depth 3"),
    ):
        assert said in refusal(cache, tmp_path / "new", *flags, script=train_dit)
    train(cache, tmp_path / "one", "--time-shift", 1, "--steps", 1, script=train_dit)


def test_init_goes_from_noise_to_noise_alone(cache, tmp_path, tiny_nano):
    config = dict(arch="NoiseDiT", **SMALL)
    other = dict(config, input_size=4)
    inherited = dit.inherit_config(config, other)
    assert inherited == {"pos_base": 2, "time_shift": 1.0}, "DiT's timesteps are those of every resolution"
    first = train(cache, tmp_path / "first", "--steps", 2, script=train_dit)
    train(cache, tmp_path / "flow", "--steps", 1, "--repa-weight", 0)
    init = ["--steps", 1, "--lr", 0, "--init"]
    second = train(cache, tmp_path / "second", *init, tmp_path / "first", script=train_dit)
    assert all(torch.equal(second["model"][name], value) for name, value in first["ema"].items())
    assert second["config"]["time_shift"] == 1
    assert "predicts noise" in refusal(cache, tmp_path / "x", *init, tmp_path / "flow", script=train_dit)
    assert "predicts noise" in refusal(cache, tmp_path / "x", *init, tmp_path / "first")
