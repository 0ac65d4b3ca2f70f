"""SD-DiT: parameter counts, masking, EDM, the discriminative loss, teacher and centres, the Heun sampler."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import run

import dit
import sample
import train_sddit
from extract_features import CachedFeatures

SMALL = "--model nano/2 --steps 6 --batch-size 16 --lr 1e-3 --ema 0.9 --log-every 1 --workers 0 --sample-every 0"


@pytest.fixture(autouse=True)
def tiny_nano(monkeypatch):
    monkeypatch.setitem(dit.SIZES, "nano", (2, 32, 2))


def small_model(**options):
    torch.manual_seed(0)
    shape = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=4, num_classes=5)
    return dit.SDDiT(decoder_depth=2, decoder_width=16, decoder_heads=2, **(shape | options))


def randomize(module, std=0.1):
    torch.manual_seed(1)
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=std)
    return module


def objective_for(cache, *options):
    args = train_sddit.parse_args(["--data", str(cache), "--model", "nano/2", "--batch-size", "16", *map(str, options)])
    torch.manual_seed(0)
    config = dict(arch="SDDiT", input_size=8, in_channels=3, num_classes=3, decoder_depth=2, decoder_width=16)
    model = dit.build(config | {"decoder_heads": 2} | dit.parse_model(args.model))
    return train_sddit.Objective(model, args, CachedFeatures(cache).meta)


def batch(n=4):
    torch.manual_seed(2)
    return dict(
        x=torch.randn(n, 3, 8, 8),
        eps=torch.randn(n, 3, 8, 8),
        y=torch.arange(n) % 3,
        t=torch.rand(n),
        drop=torch.arange(n) == 1,
        mask_noise=torch.rand(n, 16),
        teacher_t=torch.rand(n),
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
    objective = train_sddit.Objective.__new__(train_sddit.Objective)
    torch.nn.Module.__init__(objective)
    objective.keep = int(256 * (1 - ratio) + 1e-6)
    keep = objective.visible(torch.rand(3, 256))
    assert keep.shape == (3, kept) and all(len(set(row.tolist())) == kept for row in keep)
    assert kept == 256 or keep[0].tolist() != keep[1].tolist()


def test_invisible_patches_take_their_places_again():
    """With blocks that do nothing, the decoder receives all patch embeddings, each at its own place."""
    model, received = small_model(), []
    model.decoder_embed.register_forward_pre_hook(lambda module, inputs: received.append(inputs[0]))
    x, sigma, y = torch.randn(3, 3, 8, 8), torch.tensor([0.1, 1.0, 10.0]), torch.tensor([0, 1, 2])
    keep = torch.rand(3, 16).argsort(1)[:, :11]
    model(x, sigma, y, keep=keep)                                                 # adaLN-Zero: blocks are identities
    c_in = 1 / (sigma**2 + 0.25).sqrt()
    embedded = model.x_embedder(c_in.view(3, 1, 1, 1) * x) + model.pos_embed
    assert torch.equal(received[0], embedded)
    model.run_blocks = lambda tokens, c: (tokens + 100, [])
    model(x, sigma, y, keep=keep)
    for n in range(3):
        for patch in range(16):
            mark = 100 if patch in keep[n].tolist() else 0
            torch.testing.assert_close(received[1][n, patch], embedded[n, patch] + mark)


def test_invisible_patches_do_not_reach_the_encoder():
    model = randomize(small_model()).eval()
    x, sigma, y, keep = torch.randn(1, 3, 8, 8), torch.tensor([0.5]), torch.tensor([0]), torch.arange(15).view(1, 15)
    other = x.clone()
    other[:, :, 6:, 6:] += 1                                                      # patch 15
    (a, ea), (b, eb) = (model(v, sigma, y, keep=keep, encoded=True) for v in (x, other))
    assert torch.equal(ea, eb) and not torch.equal(a, b) and ea.shape == (1, 16, 32)


def test_nothing_masked_is_the_plain_forward():
    model = randomize(small_model()).eval()
    x, sigma, y = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 2.0]), torch.tensor([0, 4])
    keep = torch.arange(16).expand(2, 16)
    torch.testing.assert_close(model(x, sigma, y, keep=keep), model(x, sigma, y))


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
        model.decoder_embed.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[1]))
        model(*arguments)
        plain = model.t_embedder(arguments[1].log() / 4) + model.y_embedder(arguments[2])
        assert torch.equal(seen[0], plain) != cls_condition


# --- losses


def test_view_noise_is_log_normal():
    sigma = train_sddit.view_noise((torch.arange(100_000) + 0.5) / 100_000)
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=1e-3)
    assert sigma.log().std().item() == pytest.approx(1.2, abs=1e-3)
    assert sigma.median().item() == pytest.approx(math.exp(-1.2), rel=1e-3)
    assert train_sddit.view_noise(torch.tensor([0.0, 1 - 2**-24])).isfinite().all()


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
    assert train_sddit.generative_loss(output.float(), x, eps, sigma).item() == pytest.approx(expected, rel=1e-5)
    c_skip, c_out, c_in, c_noise = dit.edm_coefficients(torch.tensor(0.002, dtype=torch.float64))
    assert c_in.item() == pytest.approx(1.99998, abs=1e-5) and c_noise.item() == pytest.approx(-1.55365, abs=1e-5)


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
    logits = head.logits(head(torch.randn(64, 64)))
    loss, _ = train_sddit.discriminative_loss(logits, logits, torch.zeros(8192), 0.1, 0.09)
    assert loss.mean().item() == pytest.approx(8.77, abs=0.05)
    assert logits.abs().max() <= 1 + 1e-5, "logits are cosines: the gain is 1"


def test_step_zero(cache):
    """F = 0, so L_G is the mean square of F*; the encoder returns its input tokens."""
    objective, inputs = objective_for(cache), batch()
    losses = objective(**inputs)
    sigma = train_sddit.view_noise(inputs["t"]).view(-1, 1, 1, 1)
    target = (2 * sigma * inputs["x"] - 0.5 * inputs["eps"]) / (sigma**2 + 0.25).sqrt()
    assert losses["loss_edm"].item() == pytest.approx((target**2).mean().item(), rel=1e-5)
    expected = losses["loss_edm"] + losses["loss_cls"] + losses["loss_patch"]
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert 0.9 * math.log(256) < losses["loss_patch"] < 1.1 * math.log(256)
    assert losses["kl"].item() == pytest.approx((losses["loss_patch"] - losses["teacher_entropy"]).item(), rel=1e-4)
    assert 1 < losses["prototypes_used"] <= 4 * 12 and losses["batch_entropy"] >= losses["teacher_entropy"]


def test_the_whole_objective_without_chunks(cache):
    """The chunked losses are the plain cross-entropies of the same patches, with noise and conditions of both views."""
    objective, inputs = randomize(objective_for(cache)), batch()
    torch.nn.init.normal_(objective.centers, std=0.1)
    randomize(objective.teacher.requires_grad_(True), 0.2).requires_grad_(False)
    losses = objective(**inputs)
    keep = objective.visible(inputs["mask_noise"])
    sigma = train_sddit.view_noise(inputs["t"])
    x_s = inputs["x"] + sigma.view(-1, 1, 1, 1) * inputs["eps"]
    _, tokens = objective.model(x_s, sigma, inputs["y"], drop=inputs["drop"], keep=keep, encoded=True)
    x_t = inputs["x"] + 0.002 * inputs["eps"]
    y = inputs["y"].masked_fill(inputs["drop"], 3)
    encoded, _, _ = objective.teacher.encode(x_t, torch.full((4,), 0.002), y)
    s, t = (head.logits(head(v)) for head, v in ((objective.head, tokens), (objective.teacher_head, encoded)))
    cls, _ = train_sddit.discriminative_loss(s[:, 0], t[:, 0], objective.centers[0], 0.1, 0.09)
    patches = []
    for n in range(4):
        for k, patch in enumerate(keep[n].tolist()):
            rows = s[n, 1 + k][None], t[n, 1 + patch][None]
            patches.append(train_sddit.discriminative_loss(*rows, objective.centers[1], 0.1, 0.09)[0])
    assert len(patches) == 4 * 12
    assert losses["loss_cls"].item() == pytest.approx(cls.mean().item(), rel=1e-4)
    assert losses["loss_patch"].item() == pytest.approx(torch.cat(patches).mean().item(), rel=1e-4)
    small, _ = objective.discriminate(objective.head(tokens)[:, 0], objective.teacher_head(encoded)[:, 0],
                                      objective.centers[0], 0.09, chunk=3)
    assert small.item() == pytest.approx(cls.mean().item(), rel=1e-4)


def test_gradients_go_where_they_belong(cache):
    objective = randomize(objective_for(cache))
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
    assert [train_sddit.teacher_momentum(k, 1000) for k in (0, 500, 1000)] == pytest.approx([0.996, 0.9975, 0.999])
    assert [train_sddit.teacher_momentum(k, 8, 0.9, 0.98) for k in (0, 4, 8)] == pytest.approx([0.9, 0.94, 0.98])


def test_teacher_and_centre_updates(cache, monkeypatch):
    objective = randomize(objective_for(cache))
    before = {name: p.clone() for name, p in objective.teacher.named_parameters()}
    student = dict(objective.model.named_parameters())
    inputs = batch()
    objective(**inputs)
    encoded, _, _ = objective.teacher.encode(
        inputs["x"] + 0.002 * inputs["eps"], torch.full((4,), 0.002), inputs["y"], inputs["drop"]
    )
    logits = objective.teacher_head.logits(objective.teacher_head(encoded))
    mean = torch.stack([logits[:, 0].mean(0), logits[:, 1:].mean((0, 1))])
    objective.after_step(0, 1)
    torch.testing.assert_close(objective.centers, 0.1 * mean)
    objective(**inputs)
    objective(**inputs)
    objective.after_step(0, 2)
    assert objective.centers.abs().max() > 0 and (objective.seen == 0).all()
    for name, parameter in objective.teacher.named_parameters():
        expected = 0.996 * (0.996 * before[name] + 0.004 * student[name]) + 0.004 * student[name]
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-6)
    objective.momenta = [0.0, 0.5]
    objective.after_step(0, 1)
    assert all(torch.equal(p, student[name]) for name, p in objective.teacher.named_parameters())


def test_a_skipped_step_does_not_poison_the_centres(cache):
    objective = randomize(objective_for(cache))
    objective(**batch())
    objective.seen[1, :5] = float("nan")
    objective.after_step(0, 1)
    assert objective.centers.isfinite().all() and (objective.centers[1, :5] == 0).all() and objective.centers[1].any()


def test_teacher_starts_as_the_initialised_student(cache, tmp_path):
    train(cache, tmp_path / "first", "--steps", 2)
    second = train(cache, tmp_path / "second", "--steps", 1, "--lr", 0, "--init", tmp_path / "first" / "last.pt")
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(second["heads"][f"teacher.{name}"], second["model"][name])
    first = torch.load(tmp_path / "first" / "last.pt", weights_only=True)
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
    assert x.mean().item() == pytest.approx(0.7, abs=0.006) and x.std().item() == pytest.approx(0.5, abs=0.006)


def test_edm_denoiser():
    x = torch.randn(2, 3, 4, 4).double()
    out = sample.edm_denoiser(lambda x, sigma: torch.ones_like(x))(x, 0.5)
    torch.testing.assert_close(out, 0.5 * x + 0.5 * 0.5 / math.sqrt(0.5))


# --- runs


def train(cache, out, *options):
    train_sddit.main(["--data", str(cache), "--out", str(out), *SMALL.split(), *map(str, options)])
    return torch.load(out / "last.pt", weights_only=True)


def difference(a, b):
    pairs = [(a[part][name], b[part][name]) for part in ("model", "ema", "heads") for name in a[part]]
    return max((x - y).abs().max().item() for x, y in pairs)


def test_resume_is_exact_with_teacher_and_centres(cache, tmp_path, monkeypatch):
    whole = train(cache, tmp_path / "whole")
    after_step = train_sddit.Objective.after_step

    def killed(self, step, accumulation):
        after_step(self, step, accumulation)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_sddit.Objective, "after_step", killed)
        train(cache, tmp_path / "cut", "--save-every", 3)
    assert torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["step"] == 3
    assert difference(whole, train(cache, tmp_path / "cut", "--save-every", 3)) == 0
    assert {"centers", "head.prototypes", "teacher.cls_token", "teacher_head.prototypes"} <= whole["heads"].keys()
    assert not any("decoder" in name for name in whole["heads"])
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()[1:]]
    monitors = {"teacher_entropy", "cls_entropy", "cls_batch_entropy", "batch_entropy", "kl", "head_std"}
    assert len(rows) == 6 and monitors | {"prototypes_used"} <= rows[0].keys()


def test_ranks_and_accumulation(cache, tmp_path):
    """Teacher, centres and weights are those of one process, cut into two ranks or two micro-batches."""
    one = train(cache, tmp_path / "one", "--steps", 3)
    accumulated = train(cache, tmp_path / "accumulated", "--steps", 3, "--micro-batch", 8)
    code = "import sys, dit, train_sddit; dit.SIZES['nano'] = (2, 32, 2); train_sddit.main(sys.argv[1:])"
    (tmp_path / "small.py").write_text(code)
    options = ["--data", cache, "--out", tmp_path / "two", *SMALL.split(), "--steps", 3]
    run(tmp_path / "small.py", *options, processes=2, PYTHONPATH=".")
    two = torch.load(tmp_path / "two" / "last.pt", weights_only=True)
    assert difference(one, accumulated) < 1e-5 and difference(one, two) < 1e-5
    assert one["heads"]["centers"].abs().max() > 1e-3


def test_prototypes_rest_for_an_epoch(cache, tmp_path):
    """96 images in batches of 16: the prototypes move from step 6 on."""
    moved = train(cache, tmp_path / "more", "--steps", 7, "--keep-every", 6)["heads"]["head.prototypes"]
    kept = torch.load(tmp_path / "more" / "0000006.pt", weights_only=True)["heads"]["head.prototypes"]
    first = train(cache, tmp_path / "one", "--steps", 1)["heads"]["head.prototypes"]
    assert torch.equal(kept, first) and not torch.equal(moved, first)


def test_uniform_collapse_is_announced(cache, tmp_path, capsys):
    """A teacher far too soft has nearly the entropy ln K, for CLS and for patches."""
    train(cache, tmp_path / "soft", "--steps", 1, "--tau-t", 100, 100)
    printed = capsys.readouterr()
    for name in ("cls_entropy", "teacher_entropy"):
        assert f"step 1: {name} is within 2 % of ln K" in printed.out + printed.err
    train(cache, tmp_path / "sharp", "--steps", 1, "--tau-t", 0.01, 0.01)
    printed = capsys.readouterr()
    assert "collapse" not in printed.out + printed.err


def test_no_teacher_without_its_loss(cache, tmp_path):
    checkpoint = train(cache, tmp_path / "run", "--sd-weight", 0, "--steps", 2)
    assert checkpoint["heads"] == {}


@pytest.mark.parametrize("option", [["--mask-ratio", 0], ["--teacher-noise", "student"], ["--no-cls-condition"]])
def test_ablations_run(cache, tmp_path, option):
    checkpoint = train(cache, tmp_path / "run", "--steps", 2, "--precision", "bf16", *option)
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    assert ("cls_embedder.weight" in checkpoint["model"]) == (option != ["--no-cls-condition"])


def test_sampler_is_chosen_by_the_checkpoint(cache, tmp_path, capsys):
    train(cache, tmp_path / "run", "--steps", 1)
    options = [str(tmp_path / "run" / "last.pt"), "--num", "4", "--cfg", "1.5", "--interval", "0.1", "5"]
    sample.main([*options, "--out", str(tmp_path / "a.npz")])
    with np.load(tmp_path / "a.npz") as file:
        protocol = json.loads(str(file["protocol"]))
    assert protocol["sampler"] == "edm" and protocol["steps"] == 40
    plain = dict(arch="DiT", input_size=8, in_channels=3, num_classes=3, **dit.parse_model("nano/2"))
    flow = torch.load(tmp_path / "run" / "last.pt", weights_only=True) | {"config": plain}
    torch.save(flow | {"ema": dit.build(plain).state_dict()}, tmp_path / "flow.pt")
    with pytest.raises(SystemExit, match="flow.pt: the other kind of model; a guide needs the same latents"):
        sample.main([*options, "--guide", str(tmp_path / "flow.pt"), "--out", str(tmp_path / "b.npz")])
    with pytest.raises(SystemExit, match="--sampler sde: the checkpoint is an EDM model"):
        sample.main([*options, "--sampler", "sde", "--out", str(tmp_path / "b.npz")])


def test_bad_input(cache, tmp_path):
    def complain(*options):
        with pytest.raises(SystemExit) as error:
            train(cache, tmp_path / "run", *options)
        assert "\n" not in str(error.value.code)
        return str(error.value.code)

    assert "--mask-ratio 1.0: must lie in [0, 1)" in complain("--mask-ratio", 1)
    assert "must lie in [0, 1)" in complain("--mask-ratio", -0.1)
    assert "keep one of 16 patches" in complain("--mask-ratio", 0.95)
    assert "--tau-s and --tau-t must be positive" in complain("--tau-s", 0)
    assert "--tau-s and --tau-t must be positive" in complain("--tau-t", 0.09, -1)
    assert "--prototypes at least 2" in complain("--prototypes", 1)
    assert "--teacher-noise 0: expected a noise level" in complain("--teacher-noise", 0)
    assert not (tmp_path / "run").exists()


def test_noise_levels_are_shifted(cache, monkeypatch):
    """--time-shift 2 doubles sigma of the student's and of the teacher's view."""
    objective, seen, coefficients = objective_for(cache), [], dit.edm_coefficients
    monkeypatch.setattr(dit, "edm_coefficients", lambda sigma: seen.append(sigma) or coefficients(sigma))
    inputs = batch()
    objective(**inputs)
    objective.model.time_shift = 2.0
    objective(**inputs)
    student, teacher, student_2, teacher_2 = seen
    torch.testing.assert_close(student, train_sddit.view_noise(inputs["t"]))
    assert torch.equal(student_2, 2 * student) and torch.equal(teacher_2, 2 * teacher)
    assert teacher.tolist() == pytest.approx(len(teacher) * [0.002])
