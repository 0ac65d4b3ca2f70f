"""SD-DiT: parameter counts, masking, EDM, the discriminative loss, teacher and centres, the Heun sampler."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import difference, objective_for, randomize, refusal, rows, train

import dit
import sample
import train_sddit

pytestmark = pytest.mark.usefixtures("tiny_nano")


def small_model(**options):
    torch.manual_seed(0)
    shape = dict(input_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=4, num_classes=5)
    return dit.SDDiT(decoder_depth=2, decoder_width=16, decoder_heads=2, **(shape | options))


def batch(n=4):
    torch.manual_seed(2)
    return dict(
        x=torch.randn(n, 3, 8, 8),
        eps=torch.randn(n, 3, 8, 8),
        y=torch.arange(n) % 3,
        uniform=torch.rand(n),
        drop=torch.arange(n) == 1,
        mask_noise=torch.rand(n, 16),
        teacher_uniform=torch.rand(n),
        step=0,
    )


# --- architecture


@pytest.mark.parametrize(
    "size, with_head, without",
    [
        ("S", 75_871_120, 68_264_592),
        ("B", 184_565_776, 176_172_816),
        ("L", 519_750_416, 510_833_168),
        ("XL", 740_623_504, 731_444_112),
    ],
)
def test_parameter_counts(size, with_head, without):
    """Trainable parameters; XL/2 with the student's head is the published 740.6M."""
    with torch.device("meta"):
        model = dit.build({"arch": "SDDiT", **dit.parse_model(f"{size}/2")})
        head = train_sddit.Head(model.pos_embed.shape[-1])
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == without
    assert count + sum(p.numel() for p in head.parameters()) == with_head


@pytest.mark.parametrize("ratio, kept", [(0.0, 256), (0.2, 204), (0.5, 128), (0.75, 64), (0.9, 25)])
def test_mask_keeps_the_stated_number(ratio, kept):
    """Of the 256 patches at 256 px, a different random subset for every image."""
    args = train_sddit.parse_args(["--mask-ratio", str(ratio)])
    with torch.device("meta"):
        model = dit.build({"arch": "SDDiT", **dit.parse_model("S/2")})
        objective = train_sddit.Objective(model, args, dict(images=1000))
    assert objective.num_visible == kept and objective.epoch_steps == 1000 // 256
    visible = objective.choose_visible(torch.rand(3, 256))
    assert visible.shape == (3, kept) and all(len(set(row.tolist())) == kept for row in visible)
    assert kept == 256 or visible[0].tolist() != visible[1].tolist()


def test_masked_patches_are_reinserted_before_the_decoder():
    """With blocks that do nothing, the decoder receives all patch embeddings, each at its own place."""
    model, received = small_model(), []
    model.decoder_embed.register_forward_pre_hook(lambda module, inputs: received.append(inputs[0]))
    x, sigma, y = torch.randn(3, 3, 8, 8), torch.tensor([0.1, 1.0, 10.0]), torch.tensor([0, 1, 2])
    visible = torch.rand(3, 16).argsort(1)[:, :11]
    model(x, sigma, y, visible=visible)  # adaLN-Zero: blocks are identities
    c_in = 1 / (sigma**2 + 0.25).sqrt()
    embedded = model.x_embedder(c_in.view(3, 1, 1, 1) * x) + model.pos_embed
    assert torch.equal(received[0], embedded)
    model.run_blocks = lambda tokens, c: (tokens + 100, {})
    model(x, sigma, y, visible=visible)
    for n in range(3):
        for patch in range(16):
            mark = 100 if patch in visible[n].tolist() else 0
            torch.testing.assert_close(received[1][n, patch], embedded[n, patch] + mark)


def test_masked_patches_do_not_reach_the_encoder():
    model = randomize(small_model()).eval()
    x, sigma, y = torch.randn(1, 3, 8, 8), torch.tensor([0.5]), torch.tensor([0])
    visible, other = torch.arange(15).view(1, 15), x.clone()
    other[:, :, 6:, 6:] += 1  # patch 15
    (a, ea), (b, eb) = (model(v, sigma, y, visible=visible, return_tokens=True) for v in (x, other))
    assert torch.equal(ea, eb) and not torch.equal(a, b) and ea.shape == (1, 16, 32)


def test_nothing_masked_is_the_plain_forward():
    model = randomize(small_model()).eval()
    x, sigma, y = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 2.0]), torch.tensor([0, 4])
    visible = torch.arange(16).expand(2, 16)
    torch.testing.assert_close(model(x, sigma, y, visible=visible), model(x, sigma, y))


def test_null_class_is_the_zero_vector():
    embedder = small_model(class_dropout_prob=0.5).y_embedder
    assert embedder.embedding_table.weight.shape == (5, 32)
    out = embedder(torch.tensor([0, 5, 3]), torch.tensor([False, False, True]))
    assert torch.equal(out[0], embedder.embedding_table.weight[0]) and (out[1:] == 0).all()


def test_cls_reaches_the_decoder_only_if_asked():
    for cls_condition in (True, False):
        model = randomize(small_model(cls_condition=cls_condition)).eval()
        arguments = torch.randn(1, 3, 8, 8), torch.tensor([0.5]), torch.tensor([0])
        seen = []
        model.decoder_embed.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[1]))
        model(*arguments)
        plain = model.t_embedder(arguments[1].log() / 4) + model.y_embedder(arguments[2])
        assert torch.equal(seen[0], plain) != cls_condition


# --- losses


def test_sigma_from_uniform_is_log_normal():
    sigma = train_sddit.sigma_from_uniform((torch.arange(100_000) + 0.5) / 100_000)
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=1e-3)
    assert sigma.log().std().item() == pytest.approx(1.2, abs=1e-3)
    assert sigma.median().item() == pytest.approx(math.exp(-1.2), rel=1e-3)
    assert train_sddit.sigma_from_uniform(torch.tensor([0.0, 1 - 2**-24])).isfinite().all()


def test_generative_loss_is_the_weighted_error_of_the_denoiser():
    torch.manual_seed(0)
    x, eps, output = (torch.randn(5, 3, 4, 4, dtype=torch.float64) for _ in range(3))
    sigma = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0], dtype=torch.float64)
    expected = 0.0
    for i, s in enumerate(sigma.tolist()):
        c_skip, c_out = 0.25 / (s**2 + 0.25), s * 0.5 / math.sqrt(s**2 + 0.25)
        denoised = c_skip * (x[i] + s * eps[i]) + c_out * output[i]
        weight = (s**2 + 0.25) / (s * 0.5) ** 2
        expected += weight * ((denoised - x[i]) ** 2).mean().item() / 5
    loss = train_sddit.generative_loss(output.float(), x, eps, sigma)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    c_skip, c_out, c_in, c_noise = dit.edm_coefficients(torch.tensor(0.002, dtype=torch.float64))
    assert [c_in.item(), c_noise.item()] == pytest.approx([1.99998, -1.55365], abs=1e-5)


def test_discriminative_loss_against_a_slow_loop():
    torch.manual_seed(0)
    student, teacher, center = torch.randn(4, 6), torch.randn(4, 6), torch.randn(6)
    loss, p_t = train_sddit.discriminative_loss(student, teacher, center, 0.1, 0.09)
    for token in range(4):
        q = [math.exp((teacher[token, k] - center[k]) / 0.09) for k in range(6)]
        p = [math.exp(student[token, k] / 0.1) for k in range(6)]
        expected = -sum(q[k] / sum(q) * math.log(p[k] / sum(p)) for k in range(6))
        assert loss[token].item() == pytest.approx(expected, rel=1e-4)
        assert p_t[token].tolist() == pytest.approx([value / sum(q) for value in q], abs=1e-5)


def test_cross_entropy_at_initialisation():
    """Same weights, same token, K = 8192: 8.77."""
    torch.manual_seed(0)
    head = train_sddit.Head(64)
    logits = head.cosines(head(torch.randn(64, 64)))
    loss, _ = train_sddit.discriminative_loss(logits, logits, torch.zeros(8192), 0.1, 0.09)
    assert loss.mean().item() == pytest.approx(8.77, abs=0.05)
    assert logits.abs().max() <= 1 + 1e-5, "logits are cosines: the gain is 1"


def test_step_zero(cache):
    """F = 0, so L_G is the mean square of F*; the encoder returns its input tokens."""
    objective, inputs = objective_for(train_sddit, cache), batch()
    losses = objective(**inputs)
    sigma = train_sddit.sigma_from_uniform(inputs["uniform"]).view(-1, 1, 1, 1)
    target = (2 * sigma * inputs["x"] - 0.5 * inputs["eps"]) / (sigma**2 + 0.25).sqrt()
    assert losses["loss_edm"].item() == pytest.approx((target**2).mean().item(), rel=1e-5)
    expected = losses["loss_edm"] + losses["loss_cls"] + losses["loss_patch"]
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert 0.9 * math.log(256) < losses["loss_patch"] < 1.1 * math.log(256)
    kl = losses["loss_patch"] - losses["teacher_entropy"]
    assert losses["kl"].item() == pytest.approx(kl.item(), rel=1e-4)
    assert 1 < losses["prototypes_used"] <= 4 * 12 and losses["batch_entropy"] >= losses["teacher_entropy"]


def test_the_whole_objective_without_chunks(cache):
    """The chunked losses are the plain cross-entropies of the same patches, with both views' conditions."""
    objective, inputs = randomize(objective_for(train_sddit, cache)), batch()
    torch.nn.init.normal_(objective.centers, std=0.1)
    randomize(objective.teacher.requires_grad_(True), 0.2).requires_grad_(False)
    losses = objective(**inputs)
    visible = objective.choose_visible(inputs["mask_noise"])
    sigma = train_sddit.sigma_from_uniform(inputs["uniform"])
    x_s = inputs["x"] + sigma.view(-1, 1, 1, 1) * inputs["eps"]
    given = dict(drop=inputs["drop"], visible=visible, return_tokens=True)
    _, tokens = objective.model(x_s, sigma, inputs["y"], **given)
    x_t = inputs["x"] + 0.002 * inputs["eps"]
    y = inputs["y"].masked_fill(inputs["drop"], 3)
    encoded, _, _ = objective.teacher.encode(x_t, torch.full((4,), 0.002), y)
    pairs = (objective.head, tokens), (objective.teacher_head, encoded)
    s, t = (head.cosines(head(v)) for head, v in pairs)
    cls, _ = train_sddit.discriminative_loss(s[:, 0], t[:, 0], objective.centers[0], 0.1, 0.09)
    patches = []
    for n in range(4):
        for k, patch in enumerate(visible[n].tolist()):
            rows = s[n, 1 + k][None], t[n, 1 + patch][None]
            patches.append(train_sddit.discriminative_loss(*rows, objective.centers[1], 0.1, 0.09)[0])
    assert len(patches) == 4 * 12
    assert losses["loss_cls"].item() == pytest.approx(cls.mean().item(), rel=1e-4)
    assert losses["loss_patch"].item() == pytest.approx(torch.cat(patches).mean().item(), rel=1e-4)
    small, _ = objective.discriminate(objective.head(tokens)[:, 0], objective.teacher_head(encoded)[:, 0],
                                      objective.centers[0], 0.09, chunk=3)
    assert small.item() == pytest.approx(cls.mean().item(), rel=1e-4)


def test_gradients_go_where_they_belong(cache):
    objective = randomize(objective_for(train_sddit, cache))
    losses = objective(**batch())
    (losses["loss_cls"] + losses["loss_patch"]).backward(retain_graph=True)
    decoder = ("cls_embedder", "decoder_embed", "decoder_blocks", "final_layer")
    for name, parameter in objective.named_parameters():
        grad = 0.0 if parameter.grad is None else parameter.grad.abs().max().item()
        if name.startswith("teacher") or name.endswith("pos_embed"):
            assert not parameter.requires_grad and parameter.grad is None, name
        else:
            assert (grad == 0) == name.startswith(tuple(f"model.{part}" for part in decoder)), name
    objective.zero_grad()
    losses["loss_edm"].backward()
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            grad = 0.0 if parameter.grad is None else parameter.grad.abs().max().item()
            assert (grad == 0) == name.startswith("head."), name


# --- teacher, centres, schedules


def test_schedules():
    temperatures = [train_sddit.teacher_temperature(step // 5004) for step in range(0, 30_024, 5004)]
    assert temperatures == pytest.approx([0.09, 0.09225, 0.0945, 0.09675, 0.099, 0.099])
    momentum = train_sddit.teacher_momentum
    assert [momentum(k, 1000) for k in (0, 500, 1000)] == pytest.approx([0.996, 0.9975, 0.999])
    assert [momentum(k, 8, 0.9, 0.98) for k in (0, 4, 8)] == pytest.approx([0.9, 0.94, 0.98])


def test_teacher_and_centre_updates(cache, monkeypatch):
    objective = randomize(objective_for(train_sddit, cache))
    before = {name: p.clone() for name, p in objective.teacher.named_parameters()}
    student = dict(objective.model.named_parameters())
    inputs = batch()
    objective(**inputs)
    encoded, _, _ = objective.teacher.encode(
        inputs["x"] + 0.002 * inputs["eps"], torch.full((4,), 0.002), inputs["y"], inputs["drop"]
    )
    logits = objective.teacher_head.cosines(objective.teacher_head(encoded))
    mean = torch.stack([logits[:, 0].mean(0), logits[:, 1:].mean((0, 1))])
    objective.after_step(0, 1)
    torch.testing.assert_close(objective.centers, 0.1 * mean)
    objective(**inputs)
    objective(**inputs)
    objective.after_step(0, 2)
    assert objective.centers.abs().max() > 0 and (objective.cosine_sum == 0).all()
    for name, parameter in objective.teacher.named_parameters():
        expected = 0.996 * (0.996 * before[name] + 0.004 * student[name]) + 0.004 * student[name]
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-6)
    objective.momenta = [0.0, 0.5]
    objective.after_step(0, 1)
    assert all(torch.equal(p, student[name]) for name, p in objective.teacher.named_parameters())


def test_a_skipped_step_does_not_poison_the_centres(cache):
    objective = randomize(objective_for(train_sddit, cache))
    objective(**batch())
    objective.cosine_sum[1, :5] = float("nan")
    objective.after_step(0, 1)
    cls, patches = objective.centers
    assert cls.isfinite().all() and cls.all() and not patches[:5].any() and patches[5:].all()


def test_teacher_starts_as_the_initialised_student(cache, tmp_path):
    first = train(cache, tmp_path / "first", "--steps", 2, script=train_sddit)
    flags = ["--steps", 1, "--lr", 0, "--init", tmp_path / "first" / "last.pt"]
    second = train(cache, tmp_path / "second", *flags, script=train_sddit)
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(second["heads"][f"teacher.{name}"], second["model"][name])
    assert torch.equal(second["model"][name], first["ema"][name])


# --- sampler


def test_edm_grid():
    sigmas = sample.edm_sigmas()
    expected = [80, 69.45, 60.12, 51.88]
    assert len(sigmas) == 41 and sigmas[:4].tolist() == pytest.approx(expected, abs=0.01)
    assert sigmas[-5:].tolist() == pytest.approx([0.01081, 0.00644, 0.00368, 0.002, 0], abs=1e-5)


def test_heun_recovers_a_gaussian():
    """The exact posterior mean of N(0.7, 0.5^2): 79 evaluations give its mean and standard deviation."""
    calls = []

    def denoiser(x, sigma):
        calls.append(sigma)
        return (0.25 * x + sigma**2 * 0.7) / (0.25 + sigma**2)

    torch.manual_seed(0)
    x = sample.edm_heun(denoiser, torch.randn(100_000, 1, 1, 1), sample.edm_sigmas())
    assert len(calls) == 79
    assert [x.mean().item(), x.std().item()] == pytest.approx([0.7, 0.5], abs=0.006)


def test_edm_denoiser():
    x = torch.randn(2, 3, 4, 4).double()
    out = sample.edm_denoiser(lambda x, sigma: torch.ones_like(x))(x, 0.5)
    torch.testing.assert_close(out, 0.5 * x + 0.5 * 0.5 / math.sqrt(0.5))


# --- runs


class Killed(BaseException):
    """No program catches it: whatever was written until then is all that there is."""


def test_resume_is_exact_with_teacher_and_centres(cache, tmp_path, monkeypatch):
    whole = train(cache, tmp_path / "whole", script=train_sddit)
    after_step = train_sddit.Objective.after_step

    def killed(self, step, accumulation):
        after_step(self, step, accumulation)
        if step == 4:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_sddit.Objective, "after_step", killed)
        train(cache, tmp_path / "cut", script=train_sddit)
    assert torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["step"] == 3
    assert difference(whole, train(cache, tmp_path / "cut", script=train_sddit)) == 0
    assert {"centers", "head.prototypes", "teacher.cls_token"} <= whole["heads"].keys()
    assert not any("decoder" in name for name in whole["heads"])
    logged = rows(tmp_path / "whole")
    monitors = {"teacher_entropy", "cls_entropy", "cls_batch_entropy", "batch_entropy", "kl", "head_std"}
    assert len(logged) == 6 and monitors | {"prototypes_used"} <= logged[0].keys()


def test_prototypes_rest_for_an_epoch(cache, tmp_path):
    """96 images in batches of 16: the prototypes move from step 6 on."""
    moved = train(cache, tmp_path / "run", "--steps", 7, "--keep-every", 1, script=train_sddit)
    first, kept = (torch.load(tmp_path / "run" / f"000000{step}.pt", weights_only=True) for step in (1, 6))
    before, then, after = (checkpoint["heads"]["head.prototypes"] for checkpoint in (first, kept, moved))
    assert torch.equal(before, then) and not torch.equal(then, after)


def test_uniform_collapse_is_announced(cache, tmp_path, capsys):
    """A teacher far too soft has nearly the entropy ln K, for CLS and for patches."""
    train(cache, tmp_path / "soft", "--steps", 1, "--tau-t", 100, 100, script=train_sddit)
    printed = capsys.readouterr()
    for name in ("cls_entropy", "teacher_entropy"):
        assert f"step 1: {name} is within 2 % of ln K" in printed.out + printed.err
    train(cache, tmp_path / "sharp", "--steps", 1, "--tau-t", 0.01, 0.01, script=train_sddit)
    printed = capsys.readouterr()
    assert "ln K" not in printed.out + printed.err


def test_no_teacher_without_its_loss(cache, tmp_path):
    checkpoint = train(cache, tmp_path / "run", "--sd-weight", 0, "--steps", 2, script=train_sddit)
    assert checkpoint["heads"] == {}


ABLATIONS = [["--mask-ratio", 0], ["--teacher-noise", "student"], ["--no-cls-condition"]]


@pytest.mark.parametrize("option", ABLATIONS, ids=lambda option: option[0])
def test_ablations_run(cache, tmp_path, option):
    flags = ["--steps", 2, "--precision", "bf16", *option]
    checkpoint = train(cache, tmp_path / "run", *flags, script=train_sddit)
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    assert ("cls_embedder.weight" in checkpoint["model"]) == (option != ["--no-cls-condition"])


def test_sampler_is_chosen_by_the_checkpoint(cache, tmp_path, capsys):
    train(cache, tmp_path / "run", "--steps", 1, script=train_sddit)
    options = [str(tmp_path / "run" / "last.pt"), "--num", "4", "--cfg", "1.5", "--interval", "0.1", "5"]
    sample.main([*options, "--out", str(tmp_path / "a.npz")])
    with np.load(tmp_path / "a.npz") as file:
        protocol = json.loads(str(file["protocol"]))
    assert protocol["sampler"] == "edm" and protocol["steps"] == 40
    train(cache, tmp_path / "flow", "--steps", 1)
    with pytest.raises(SystemExit, match="--guide .*flow.*last.pt"):
        guide = ["--guide", str(tmp_path / "flow" / "last.pt")]
        sample.main([*options, *guide, "--out", str(tmp_path / "b.npz")])
    with pytest.raises(SystemExit, match="--sampler sde"):
        sample.main([*options, "--sampler", "sde", "--out", str(tmp_path / "b.npz")])


def test_bad_input(cache, tmp_path):
    for flag, *values in (
        ["mask-ratio", 1],
        ["mask-ratio", -0.1],
        ["mask-ratio", 0.95],
        ["tau-s", 0],
        ["tau-t", 0.09, -1],
        ["prototypes", 1],
        ["teacher-noise", 0],
        ["teacher-noise", "pupil"],
        ["teacher-momentum", 0.9, 1.5],
        ["sd-weight", -1],
    ):
        message = refusal(cache, tmp_path / "run", f"--{flag}", *values, script=train_sddit)
        assert f"--{flag}" in message and str(values[-1]) in message
    assert not (tmp_path / "run").exists()


def test_noise_levels_are_shifted(cache, monkeypatch):
    """--time-shift 2 doubles sigma of the student's and of the teacher's view."""
    objective, seen, coefficients = objective_for(train_sddit, cache), [], dit.edm_coefficients
    monkeypatch.setattr(dit, "edm_coefficients", lambda sigma: seen.append(sigma) or coefficients(sigma))
    inputs = batch()
    objective(**inputs)
    objective.model.time_shift = 2.0
    objective(**inputs)
    student, teacher, student_2, teacher_2 = seen
    torch.testing.assert_close(student, train_sddit.sigma_from_uniform(inputs["uniform"]))
    assert torch.equal(student_2, 2 * student) and torch.equal(teacher_2, 2 * teacher)
    assert teacher.tolist() == pytest.approx(len(teacher) * [0.002])


def test_more_steps_later_keep_the_schedule_of_the_first_start(cache, tmp_path, tiny_nano):
    """The momentum rises over the steps of the first start: resumed or not, the run is the same."""
    whole = train(cache, tmp_path / "whole", "--steps", 4, script=train_sddit)
    train(cache, tmp_path / "cut", "--steps", 4, script=train_sddit)
    longer = train(cache, tmp_path / "cut", "--steps", 6, script=train_sddit)
    assert whole["heads"]["schedule_steps"] == longer["heads"]["schedule_steps"] == 4
    objective = objective_for(train_sddit, cache)
    objective.schedule_steps.fill_(4)
    for step, m in enumerate([0.996, 0.99644, 0.9975, 0.99856, 0.999, 0.999]):
        before = objective.teacher_head.mlp[0].weight.clone()
        objective.head.mlp[0].weight.data.add_(1.0)
        objective.after_step(step, 1)
        moved = (objective.teacher_head.mlp[0].weight - before).mean()
        gap = (objective.head.mlp[0].weight - before).mean()
        assert (moved / gap).item() == pytest.approx(1 - m, abs=2e-5)
