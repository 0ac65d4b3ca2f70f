"""The linear probe: features of the right tokens at the right noise, known answers, an independent solver."""

import importlib.util
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, train
from scipy.optimize import minimize

import dit
import extract_features
import files
import train_diversedit
import train_repa
import train_sddit

SPEC = importlib.util.spec_from_file_location("probe", ROOT / "tests" / "results" / "probe.py")
probe = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(probe)

CPU = torch.device("cpu")
SCRIPTS = (train_repa, train_diversedit, train_sddit)
SHAPE = dict(input_size=8, in_channels=3, hidden_size=32, depth=4, num_heads=4, num_classes=5)


def awake(model):
    """The model with weights that are nowhere zero."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


# --- features


@pytest.mark.parametrize("options", [{}, {"class_tokens": 3}, {"control": "cosine"}])
@pytest.mark.parametrize("architecture", [dit.DiT, dit.DiverseDiT])
def test_features_are_means_of_the_returned_blocks(architecture, options):
    model = awake(architecture(**SHAPE, **options))
    x_t = torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        null = torch.full((6,), 5)  # the null class is the row behind the classes
        _, tokens = model(x_t, torch.full((6,), 0.3), null, return_blocks=[1, 2, 3, 4])
    features = probe.block_features(model, x_t, 0.3, [4, 1])
    assert features.shape == (6, 2, 32)
    for i, b in enumerate((4, 1)):
        expected = sum(tokens[b - 1][:, k] for k in range(16)) / 16
        torch.testing.assert_close(features[:, i], expected, rtol=1e-4, atol=1e-5)
    assert not any(block._forward_hooks for block in model.blocks)


def test_features_of_sd_dit_are_those_of_its_encoder():
    """At sigma = t / (1 - t), without the CLS token."""
    small = dict(decoder_depth=2, decoder_width=16, decoder_heads=2)
    model = awake(dit.SDDiT(**SHAPE, **small))
    x, eps, t = torch.randn(6, 3, 8, 8), torch.randn(6, 3, 8, 8), 0.8
    features = probe.block_features(model, (1 - t) * x + t * eps, t, [2, 4])
    with torch.no_grad():
        sigma = torch.full((6,), 4.0)
        tokens, _, _ = model.encode(x + 4 * eps, sigma, torch.full((6,), 5))
    assert tokens.shape == (6, 17, 32)
    torch.testing.assert_close(features[:, 1], tokens[:, 1:].mean(1), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory):
    """A cache of 60 images and their mirror images; the class is visible: it is the brightness."""
    folder = tmp_path_factory.mktemp("probe")
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    pixels = 40 + 80 * labels[:, None, None, None] + rng.integers(-30, 30, (60, 8, 8, 3))
    np.savez(folder / "src.npz", arr_0=pixels.clip(0, 255).astype(np.uint8), arr_1=labels)
    options = "--image-size 8 --patch 2 --vae none --encoder hog --flip --workers 0"
    paths = ["--data", str(folder / "src.npz"), "--out", str(folder / "cache")]
    extract_features.main([*paths, *options.split()])
    return folder / "cache"


def test_noisy_latents_of_the_cache(cache_folder):
    """First views, at time t, and no label reaches the model."""
    seen = []

    class Spy(torch.nn.Module):
        grid, hidden_size = 4, 2

        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Identity()])

        def forward(self, x, t, y, drop):
            seen.append((x, t, y, drop))
            self.blocks[0](torch.zeros(len(x), 16, 2))

    cache = extract_features.CachedFeatures(cache_folder, targets=False, control=False)
    features, labels = probe.cache_features(Spy(), cache, 0.25, [1], 16, 0, CPU)
    assert features.shape == (60, 1, 2) and torch.equal(labels, torch.arange(60) % 3)
    x_t, times, y, drop = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert [len(parts[0]) for parts in seen] == [16, 16, 16, 12]
    assert (times == 0.25).all() and (y == 0).all() and drop.all()
    clean = cache.latents(torch.from_numpy(cache.__getitems__(np.arange(60) * 2)["moments"]))
    eps = (x_t - 0.75 * clean) / 0.25
    assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.05
    # the noise of an image does not depend on the batches
    seen.clear()
    probe.cache_features(Spy(), cache, 0.25, [1], 7, 0, CPU)
    assert torch.equal(torch.cat([x for x, *_ in seen]), x_t)


# --- the probes


def test_two_gaussians_have_a_known_accuracy():
    """The best rule for N(m, 1) and N(-m, 1) is right with probability Phi(|m|); blocks stay apart."""
    generator = torch.Generator().manual_seed(0)
    distances = torch.tensor([0.0, 0.5, 1.0, 2.0])
    labels = torch.arange(8000) % 2
    features = torch.randn(8000, 4, 6, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(6, generator=generator), dim=0)
    features += (2 * labels - 1).view(-1, 1, 1) * distances.view(1, 4, 1) * direction
    features = 30 * features + torch.arange(6) * 100  # the batch norm makes up for it
    train, test = slice(0, 4000), slice(4000, 8000)
    probes = probe.train_probes(features[train], labels[train], 2, 20, 500, 1e-2, 0, CPU)
    found = probe.accuracies(probes, features[test], labels[test], 900, CPU)
    for accuracy, distance in zip(found, distances.tolist(), strict=True):
        assert abs(accuracy - 0.5 * math.erfc(-distance / 2**0.5)) < 0.025


def test_batch_norm_without_parameters():
    """A batch is normalised by itself in training, and by running averages afterwards."""
    features = 5 + 3 * torch.randn(64, 2, 4, generator=torch.Generator().manual_seed(0))
    probes = probe.Probes(2, 4, 3)
    assert {name for name, _ in probes.named_parameters()} == {"weight", "bias"}
    x = (features - features.mean(0)) / features.std(0, correction=0)
    expected = torch.stack([x[:, block] @ probes.weight[block] for block in range(2)])
    torch.testing.assert_close(probes(features), expected, rtol=1e-4, atol=1e-4)

    trained = probe.train_probes(features, torch.arange(64) % 3, 3, 100, 64, 1e-3, 0, CPU)
    x = (features - features.mean(0)) / features.std(0)
    expected = [x[:, block] @ trained.weight[block] + trained.bias[block] for block in range(2)]
    torch.testing.assert_close(trained(features), torch.stack(expected), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(trained(features[:1]), trained(features)[:, :1])


def test_agrees_with_an_independent_solver():
    """Long training ends at the maximum of the likelihood, which L-BFGS of scipy finds as well."""
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=240)
    raw = rng.normal(size=(240, 2, 5)) * rng.uniform(0.5, 3, (2, 5)) + rng.normal(size=(3, 2, 5))[labels]
    probes = probe.train_probes(torch.tensor(raw), torch.tensor(labels), 3, 1500, 240, 3e-2, 0, CPU)
    logits = probes(torch.tensor(raw)).detach().double()
    for block in range(2):
        x = raw[:, block]
        x = np.hstack([(x - x.mean(0)) / x.std(0), np.ones((240, 1))])

        def loss(weights, x=x):
            scores = x @ weights.reshape(6, 3)
            return (np.log(np.exp(scores).sum(1)) - scores[np.arange(240), labels]).mean()

        best = minimize(loss, np.zeros(18), method="L-BFGS-B").x.reshape(6, 3)
        ours = torch.softmax(logits[block], dim=1).numpy()
        theirs = np.exp(x @ best) / np.exp(x @ best).sum(1, keepdims=True)
        np.testing.assert_allclose(ours, theirs, atol=0.02)


# --- the program


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.NAME)
def test_program(script, cache_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(dit.SIZES, "nano", TINY)
    train(cache_folder, tmp_path / "run", script=script)
    flags = f"--data {cache_folder} --t 0.1 --epochs 60 --batch-size 16 --lr 1e-2"
    flags += f" --json {tmp_path}/figures.json"
    probe.main([str(tmp_path / "run"), *flags.split()])
    result = json.loads((tmp_path / "figures.json").read_text())
    assert result["blocks"] == [1, 2] and result["step"] == 6
    assert result["images"] == {"train": 48, "test": 12}
    assert min(result["test"]) > 0.6, "brightness is easy to read"
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"| 2 | {100 * result['test'][1]:.1f} % | {100 * result['train'][1]:.1f} % |"

    # the same noise and training set give the same figures; another set is not split
    flags += f" --test {cache_folder} --blocks 2"
    probe.main([str(tmp_path / "run"), *flags.split()])
    other = json.loads((tmp_path / "figures.json").read_text())
    assert other["blocks"] == [2] and other["images"] == {"train": 60, "test": 60}


def test_one_line_for_what_does_not_fit(cache_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(dit.SIZES, "nano", TINY)
    train(cache_folder, tmp_path / "run")

    def complain(*arguments):
        with pytest.raises(SystemExit) as error:
            probe.main([str(argument) for argument in arguments])
        assert "\n" not in error.value.code
        return error.value.code

    assert "the model has blocks 1 to 2" in complain(tmp_path / "run", "--data", cache_folder, "--blocks", 3)
    assert "no feature cache" in complain(tmp_path / "run", "--data", tmp_path)
    assert "no such checkpoint" in complain(tmp_path / "no", "--data", cache_folder)
    meta = json.loads((cache_folder / "meta.json").read_text())
    assert meta["latent_side"] == 8
    options = "--image-size 4 --patch 2 --vae none --encoder none --workers 0".split()
    source = cache_folder.parent / "src.npz"
    extract_features.main(["--data", str(source), "--out", str(tmp_path / "four"), *options])
    message = complain(tmp_path / "run", "--data", cache_folder, "--test", tmp_path / "four")
    assert "latent_side is 4, that of the model is 8" in message
    checkpoint = files.read_checkpoint(tmp_path / "run")
    checkpoint["config"]["class_dropout_prob"] = 0.0
    for part in ("model", "ema"):
        rows = checkpoint[part]["y_embedder.embedding_table.weight"]
        checkpoint[part]["y_embedder.embedding_table.weight"] = rows[:-1].clone()
    files.write_checkpoint(tmp_path / "sure.pt", checkpoint)
    assert "no null class" in complain(tmp_path / "sure.pt", "--data", cache_folder)
