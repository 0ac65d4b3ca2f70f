"""The ADM evaluation suite in PyTorch (FID, sFID, Inception Score, precision, recall), and MIND.

This file can be copied alone. It imports nothing from the repository, so crop, errors and file
helpers are repeated here.

    python fid.py VIRTUAL_imagenet256_labeled.npz samples.npz           # papers' numbers, and MIND
    python fid.py REF A.npz B.npz C.npz                                 # one row per set of samples
    python fid.py --stats imagenet/val --image-size 256 --out val.npz   # make your own reference
    python fid.py tests/digits.npz samples.npz --features pixels        # sanity check, no weights
    torchrun --nproc_per_node=8 fid.py REF SAMPLES                      # features on 8 GPUs
    python fid.py --stats imagenet/train --image-size 256 --fdr6 --out six.npz
    python fid.py six.npz samples.npz --fdr6                            # six spaces and their mean
    python fid.py six.npz samples.npz --features dinov2                 # FD-DINOv2 and its MIND

REF and SAMPLES are uint8 images [N, H, W, 3] in an .npz (`arr_0`) or .npy file, or folders of
images. If an .npz stores statistics (`mu sigma mu_s sigma_s`), FID and sFID use these. ADM's
references do: their statistics are those of the whole training set. Compare generated images with
the training set, and reconstructions with the validation set.

The row "floor" compares two random parts of REF: n images with the N - n others. n is the size of
the smallest set of samples, but at most N // 2. A perfect generator would reach about this score.
If REF is small, so are its parts. Then their FID is too high, and good samples can score below it.

    FID        arXiv 1706.08500   |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of 2048 features
    sFID       arXiv 2103.03841   the same of spatial features: 7 channels of a 17 x 17 map
    IS         arXiv 1606.03498   exp(mean KL(p(class | image) || p(class))): sharp, varied images
    precision  arXiv 1904.06991   share of the samples inside the manifold of the reference
    recall     arXiv 1904.06991   share of the reference inside the manifold of the samples
    MIND       arXiv 2605.06797   3 D mean(W2^2) of the features, projected onto 1,000 random lines
ADM is evaluations/evaluator.py of openai/guided-diffusion. MIND's authors find that it needs 5,000
samples where FID needs 50,000.

With --features NAME, `fid` is FD: the same distance of another network's features. Its statistics
in an .npz are named after it: mu_dinov2, sigma_dinov2. FDr^6 (arXiv 2604.28190) is the mean, over
six networks, of the FD of the samples divided by the FD of ImageNet's validation set.
Shapes: N, M images; D feature width (FID 2048, sFID 17 * 17 * 7 = 2023); C = 1008 classes.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torchvision.models import inception
from tqdm import tqdm

METRICS = ("fid", "sfid", "inception_score", "precision", "recall", "mind")
PR_BLOCK = 10_000  # distances come in blocks of this many rows and columns, as in ADM
PR_IMAGES = 10_000  # what --stats keeps for precision and recall, as many as ADM's references


# ---- network: the Inception v3 of 2015-12-05; another training of Inception v3 gives other numbers


class InceptionV3(inception.Inception3):
    """The Inception v3 of FID. Its 472 tensors are named as in the published weights."""

    name = "Inception 2015-12-05, TF1 bilinear resize to 299"
    widths = {"fid": 2048, "sfid": 2023}  # D of the two features

    def __init__(self):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        # torchvision: averages count the padding / here: they do not, because TensorFlow's do not
        # torchvision: Mixed_7c averages / here: it takes the maximum, because TensorFlow's does
        for block in self.children():
            if hasattr(block, "branch_pool"):
                block.pool = torch.nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
                block.register_forward_hook(repool)
        self.Mixed_7c.pool = torch.nn.MaxPool2d(3, stride=1, padding=1)
        self.eval().requires_grad_(False)

    def forward(self, images):
        """Turns images [N, 3, H, W] of 0 .. 255 into two fp32 features: [N, 2048] and [N, 2023].

        The first are pooled, the second are spatial.
        """
        x = (tf1_resize(images, 299) - 128) / 128                     # [N, 3, 299, 299]
        for name, layer in self.named_children():  # in the order of the network
            if name == "avgpool":  # Mixed_7c was the last block
                break
            x = layer(x)
            if name == "Mixed_6d":                                    # x: [N, 768, 17, 17]
                # the first 7 channels belong to branch1x1; ADM's sigma_s has them in NHWC order
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)     # [N, 17 * 17 * 7]
        return x.mean((2, 3)), spatial                                # x: [N, 2048, 8, 8]


def repool(block, inputs, output):
    """A forward hook: recomputes torchvision's last branch with the right pooling, block.pool."""
    branch = block.branch_pool(block.pool(*inputs))
    output[:, -branch.shape[1] :] = branch


def tf1_resize(images, size):
    """Resizes images [N, C, H, W] to fp32 [N, C, size, size] as TensorFlow 1 does, bilinearly.

    There is no half-pixel offset. The result is bit-equal to TensorFlow's on the CPU, because the
    width is resized first, and because torch.lerp, which rounds differently, is not used.
    """
    x = resize_width(images.float(), size)                            # [N, C, H, size]
    return resize_width(x.mT, size).mT


def resize_width(x, size):
    """Resizes x [..., W] to [..., size]."""
    width = x.shape[-1]
    position = torch.arange(size, device=x.device).float() * (width / size)  # fp32, as TensorFlow
    low = position.long()
    high = (low + 1).clamp(max=width - 1)
    a = x.index_select(-1, low)
    b = x.index_select(-1, high)
    return a + (b - a) * (position - low)


class PixelFeatures(torch.nn.Module):
    """Turns images [N, 3, H, W] into grey 8 x 8 thumbnails, ([N, 64],), which suit toy runs."""

    name = "8 x 8 grey pixels: a sanity figure, not comparable with published ones"
    widths = {"fid": 64}

    def forward(self, images):
        grey = images.float().mean(1) / 255
        return (torch.nn.functional.adaptive_avg_pool2d(grey, 8).flatten(1),)


# A space of FDr^6 (arXiv 2604.28190, FD-loss): timm's model, the side of its input, and the FD of
# ImageNet's 50,000 validation images, as published, with images of 256 x 256.
SPACES = {
    "inception": (None, 299, 1.68),
    "convnext": ("convnextv2_base.fcmae_ft_in22k_in1k", 224, 56.87),
    "dinov2": ("vit_large_patch14_dinov2.lvd142m", 256, 14.19),
    "mae": ("vit_large_patch16_224.mae", 224, 0.04),
    "siglip": ("vit_so400m_patch16_siglip_256.v2_webli", 224, 0.60),
    # OpenAI trained it with QuickGELU / here, as in FD-loss: GELU, because 5.60 was found with it
    "clip": ("vit_large_patch14_clip_224.openai", 256, 5.60),
}


class TimmFeatures(torch.nn.Module):
    """Turns images [N, 3, H, W] of 0 .. 255 into what a timm model pools of them, ([N, D],).

    weights: a file of them, or None for timm's, which are downloaded and kept. Raises UserError
    unless it holds all of the model's weights.
    """

    def __init__(self, space, weights):
        super().__init__()
        name, side, _ = SPACES.get(space, (space, None, None))
        options = {}
        if side and "vit" in name:  # patches of 14 do not fill 256 pixels: zeros are added
            options = {"dynamic_img_size": True, "dynamic_img_pad": True}
        remedy = "it must be in timm.list_pretrained(); pass its weights with --features-weights"
        with explaining(f"--features {name}, weights {weights or 'of timm'}", remedy):
            import timm  # only here: the file works without it

            if weights:
                state = timm.models.load_state_dict(str(weights), weights_only=True)
                options["pretrained_cfg_overlay"] = {"state_dict": state}
            self.net = timm.create_model(name, pretrained=True, **options)
        config = self.net.pretrained_cfg
        self.side = side or config["input_size"][-1]
        self.name = f"{name}, bicubic resize to {self.side} with antialias"
        self.widths = {"fid": self.net.num_features}
        for constant in ("mean", "std"):
            self.register_buffer(constant, torch.tensor(config[constant]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, images):
        x = images.float() / 255
        x = torch.nn.functional.interpolate(x, self.side, mode="bicubic", antialias=True)
        x = self.net.forward_features((x - self.mean) / self.std)
        if "convnext" in self.name:  # FD-loss averages the map before the last norm
            return (x.mean((2, 3)),)
        return (self.net.forward_head(x, pre_logits=True),)  # CLS, or as the model pools


# ---- metrics: pure functions


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Returns the squared Frechet distance of two Gaussians (arXiv 1706.08500, eq. 6): a float.

    mu [D] and sigma [D, D] are arrays or tensors. Raises ValueError for other shapes.
    """
    mu1 = as_float64(mu1)
    mu2 = as_float64(mu2)
    sigma1 = as_float64(sigma1)
    sigma2 = as_float64(sigma2)
    d = len(mu1)
    means_fit = mu1.shape == mu2.shape == (d,)
    covariances_fit = sigma1.shape == sigma2.shape == (d, d)
    if not (means_fit and covariances_fit):
        raise ValueError(
            f"frechet_distance needs mu [D] and sigma [D, D], got {list(mu1.shape)},"
            f" {list(sigma1.shape)} and {list(mu2.shape)}, {list(sigma2.shape)}"
        )

    # The trace of (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of S1 S2. With
    # S1 = R R^T, these are the eigenvalues of R^T S2 R and some zeros.
    # official code: it takes the trace of sqrtm(S1 S2) / here: the roots are summed, because sqrtm
    # is inexact for fewer images than D.
    values, vectors = torch.linalg.eigh(sigma1)
    rounding_error = values[-1].clamp(min=0) * d * torch.finfo(torch.float64).eps
    keep = values > rounding_error  # the others are 0 but for rounding; their roots would add up
    R = vectors[:, keep] * values[keep].sqrt()                        # [D, rank of S1]
    eigenvalues = torch.linalg.eigvalsh(R.T @ sigma2 @ R)             # [rank of S1]
    root_trace = eigenvalues.clamp(min=0).sqrt().sum()
    between_means = (mu1 - mu2).square().sum()
    distance = between_means + sigma1.trace() + sigma2.trace() - 2 * root_trace
    return distance.item()


def as_float64(x):
    return torch.as_tensor(x, dtype=torch.float64, device="cpu")


def inception_score(logits, split_size=5000):
    """Returns the Inception Score (arXiv 1606.03498), a mean over splits of consecutive rows.

    logits [N, C] are without bias, as in ADM.
    """
    scores = []
    for split in logits.split(split_size):
        # official code: log(softmax), which is NaN if a softmax underflows / here: log_softmax
        log_p = split.double().log_softmax(1)
        log_mean = log_p.logsumexp(0) - np.log(len(split))
        kl = (log_p.exp() * (log_p - log_mean)).sum(1)
        scores.append(kl.mean().exp())
    return torch.stack(scores).mean().item()


def precision_recall(reference, samples, k=3, fp16=True):
    """Returns precision and recall (arXiv 1904.06991) of samples [M, D] and a reference [N, D].

    fp16 rounds distances as ADM does, which raises both by 0.001 to 0.002. Raises ValueError unless
    both sets have more than k rows.
    """
    if min(len(reference), len(samples)) <= k:
        raise ValueError(
            f"precision_recall needs more than {k} rows: {len(reference)}, {len(samples)}"
        )
    precision = manifold_share(samples, reference, k, fp16)
    recall = manifold_share(reference, samples, k, fp16)
    return precision, recall


def manifold_share(points, manifold, k, fp16):
    """Returns the share of points [P, D] inside a ball around a row of manifold [Q, D].

    Each ball reaches to the k-th nearest neighbour of its center within the manifold.
    """
    inside = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for centers in manifold.split(PR_BLOCK):
        # the k + 1 smallest distances of all are among the k + 1 smallest of each block
        nearest = []
        for others in manifold.split(PR_BLOCK):
            distances = squared_distances(centers, others, fp16)
            nearest.append(distances.topk(min(k + 1, len(others)), largest=False).values)
        # k + 1, because each center is its own nearest neighbour
        radii = torch.cat(nearest, 1).kthvalue(k + 1, keepdim=True).values

        for start in range(0, len(points), PR_BLOCK):
            block = slice(start, start + PR_BLOCK)
            distances = squared_distances(centers, points[block], fp16)
            inside[block] |= (distances <= radii).any(0)
    return inside.double().mean().item()


def squared_distances(u, v, fp16):
    """Returns |u|^2 - 2 u.v + |v|^2 for all pairs of rows of u [N, D] and v [M, D]: fp32 [N, M]."""
    if fp16:
        distances = rounded_distances(u, v, torch.float16)
        if distances.isfinite().all():  # if a value overflows, ADM takes fp32 for the block
            return distances
    return rounded_distances(u, v, torch.float32)


def rounded_distances(u, v, dtype):
    """Rounds every intermediate of squared distances to dtype, as in ADM, but sums in fp32."""
    u = u.to(dtype)
    v = v.to(dtype)
    norm_u = (u * u).float().sum(1, keepdim=True).to(dtype)           # [N, 1]
    norm_v = (v * v).float().sum(1).to(dtype)                         # [M]
    product = (u.float() @ v.float().T).to(dtype)                     # [N, M]
    return (norm_u - 2 * product + norm_v).clamp(min=0).float()


def monge_distance(reference, samples, lines=1000):
    """Returns MIND (arXiv 2605.06797) of samples [M, D] and a reference [N, D]: a float.

    It is 3 D times the mean, over random lines through 0, of the squared 2-Wasserstein distance of
    both sets projected onto the line. If one set is larger, some random rows of it are taken.
    """
    d = reference.shape[1]
    n = min(len(reference), len(samples))
    generator = torch.Generator().manual_seed(2020)  # rows and lines are those of torch-fidelity
    sets = []
    for x in (reference, samples):
        if len(x) > n:
            x = x[torch.randperm(len(x), generator=generator)[:n]]
        sets.append(x)
    reference, samples = sets
    directions = torch.randn(lines, d, generator=generator).to(reference)
    directions = torch.nn.functional.normalize(directions)            # [lines, D]

    # In one dimension the best transport joins the i-th smallest numbers of both sets.
    total = 0
    for block in directions.split(50):  # 50 lines of 50,000 images take 10 MB
        sorted_reference = (block @ reference.T).sort().values        # [50, n]
        sorted_samples = (block @ samples.T).sort().values
        squared_w2 = (sorted_reference - sorted_samples).square().mean(1)  # [50]
        total += squared_w2.double().sum().item()
    return 3 * d * total / lines


# ---- features and report


@dataclasses.dataclass
class Measured:
    """What the metrics need of a set of images. Keys of both dicts: "fid" and "sfid", if known."""

    features: dict                                                    # [N, D], fp32
    statistics: dict                                                  # (mu [D], sigma [D, D]), fp64


def read_batches(source, args, rank, world):
    """Yields the images of this process in batches: their rows, and uint8 [n, 3, H, W].

    Each process has consecutive images, so that all rows stay in file order, as the Inception Score
    needs. Raises UserError if images differ in size.
    """
    count = source.shape[0]
    first = count * rank // world
    last = count * (rank + 1) // world
    starts = range(first, last, args.batch_size)
    with ThreadPoolExecutor(source.threads) as pool:
        for start in tqdm(starts, source.path.name, unit=" batches", disable=rank > 0):
            rows = range(start, min(start + args.batch_size, last))
            batch = list(pool.map(source.__getitem__, rows))
            if {image.shape for image in batch} != {source.shape[1:]}:
                raise UserError(
                    f"{source.path}: holds images of different sizes; "
                    "crop them to one with --image-size"
                )
            images = torch.from_numpy(np.stack(batch)).to(args.device)
            yield slice(rows.start, rows.stop), images.permute(0, 3, 1, 2)


def measure(source, space, model, args, rank, world):
    """Returns a Measured with the features and the statistics of a source of images.

    Statistics that the source stores win over computed ones, as in ADM. Features are not kept for
    --stats, because a training set has too many, nor for --fdr6, which needs none. Raises UserError
    if images differ in size, or if features are not finite.
    """
    count = source.shape[0]
    stored = source.stored[space]
    if count == 0 or (args.fdr6 and stored):  # without images, there are stored statistics
        return Measured({}, stored)

    keep = not (args.stats or args.fdr6)
    features = {}
    sum_x = {}
    sum_xx = {}
    for kind, d in model.widths.items():
        if keep:
            features[kind] = torch.zeros(count, d, device=args.device)
        sum_x[kind] = torch.zeros(d, dtype=torch.float64, device=args.device)
        sum_xx[kind] = torch.zeros(d, d, dtype=torch.float64, device=args.device)

    for rows, images in read_batches(source, args, rank, world):
        for kind, x in zip(model.widths, model(images), strict=True):
            if keep:
                features[kind][rows] = x
            x = x.double()
            sum_x[kind] += x.sum(0)
            sum_xx[kind] += x.T @ x

    if world > 1:  # every process holds zeros in the rows of the others
        with explaining("the other processes", "their first message says why", RuntimeError):
            for tensors in (features, sum_x, sum_xx):
                for x in tensors.values():
                    dist.all_reduce(x)

    statistics = {}
    for kind in model.widths:
        mean = sum_x[kind].cpu() / count
        second_moment = sum_xx[kind].cpu() / count
        if not second_moment.isfinite().all():
            raise UserError(f"{source.path}: its features are not finite; are the weights intact?")
        covariance = (second_moment - mean.outer(mean)) * count / (count - 1)
        statistics[kind] = (mean, covariance)
    return Measured(features, stored or statistics)


def compare(reference, samples, model, args):
    """Returns the metrics of two Measured by name, with None where one lacks what is needed."""
    results = dict.fromkeys(METRICS)
    for kind, gaussian in reference.statistics.items():
        if kind in samples.statistics:
            results[kind] = frechet_distance(*gaussian, *samples.statistics[kind])
    if samples.features and args.features == "inception":
        logits = samples.features["fid"] @ model.fc.weight.T  # without bias, as in ADM
        results["inception_score"] = inception_score(logits)
    if samples.features and reference.features:
        results["precision"], results["recall"] = precision_recall(
            reference.features["fid"], samples.features["fid"], fp16=not args.fp32_distances
        )
        results["mind"] = monge_distance(reference.features["fid"], samples.features["fid"])
    return results


def compare_floor(reference, sets, model, args):
    """Compares n random images of the reference with its others. Returns None if n is below 4."""
    if not reference.features:
        return None
    count = len(reference.features["fid"])
    n = count // 2
    for samples in sets:
        if samples.features:
            n = min(n, len(samples.features["fid"]))
    if n < 4:
        return None

    order = torch.from_numpy(np.random.RandomState(0).permutation(count))
    row = {"set": f"floor: {n} of REF against its other {count - n}", "images": n}
    chosen = subset(reference, order[:n])
    others = subset(reference, order[n:])
    return row | compare(others, chosen, model, args)


def subset(measured, rows):
    """Returns some rows of a Measured, with their own statistics."""
    part = Measured({}, {})
    for kind, features in measured.features.items():
        x = features[rows].double()
        part.features[kind] = features[rows]
        part.statistics[kind] = (x.mean(0), x.T.cov())
    return part


def report(sources, measured, model, weights, args, world):
    """Compares every set of samples with the reference, the first. Writes --json, then prints."""
    reference, *sets = measured
    rows = [compare(reference, samples, model, args) for samples in sets]
    distances = "fp32" if args.fp32_distances else "fp16 rounding as ADM"
    how = {
        "features": {"network": model.name, "weights_sha256": weights},
        "precision_recall": {"k": 3, "distances": distances},
    }
    add_protocol(rows, sources, how, args, world)
    floor_row = compare_floor(reference, sets, model, args)
    shown = [*rows, floor_row] if floor_row else rows
    publish(rows, {"floor": floor_row}, METRICS, shown, sources, args)


def report_fdr6(sources, measured, networks, args, world):
    """Prints and writes the six distances of every set of samples, their ratios and FDr^6.

    measured: {space: the Measured of all sources}; networks: {space: a description}.
    """
    rows = []
    shown = []
    for i, source in enumerate(sources[1:], start=1):
        distances = {}
        ratios = {}
        for space, sets in measured.items():
            reference = sets[0].statistics["fid"]
            distances[space] = frechet_distance(*reference, *sets[i].statistics["fid"])
            ratios[space] = distances[space] / SPACES[space][2]
        mean = sum(ratios.values()) / len(ratios)
        rows.append({"fdr6": mean, "fd": distances, "ratio": ratios})
        shown.append({"set": str(source.path), "mean": None} | distances)
        shown.append({"set": "divided by ImageNet's validation set", "mean": mean} | ratios)
    add_protocol(rows, sources, {"features": networks}, args, world)
    publish(rows, {}, [*SPACES, "mean"], shown, sources, args)


def add_protocol(rows, sources, how, args, world):
    """Adds to the row of every set of samples its name, and how its numbers were found."""
    how["features"]["dtype"] = "fp32, statistics fp64"
    shared = {
        "reference": describe(sources[0]) | {"sha256": file_hash(sources[0].path)},
        **how,
        "run": {"device": args.device, "processes": world, "torch": torch.__version__},
    }
    for row, source in zip(rows, sources[1:], strict=True):
        row["set"] = str(source.path)
        row["protocol"] = shared | {"samples": describe(source), "sampling": sampling(source)}


def publish(rows, more, names, shown, sources, args):
    """Writes rows and more to --json, then prints a table of what is shown, and warnings."""
    try:
        if args.json:
            result = rows[0] if len(rows) == 1 else {"sets": rows}
            text = json.dumps(result | more, indent=1)
            write(args.json, lambda file: file.write(text.encode()))
    finally:  # the results are printed even if the disk is full
        print_table(names, shown)
        print_protocol(rows)
        if args.features != "pixels":  # figures of pixels need no warnings
            for source in sources:
                warn_about(source, sources[0], args)


def describe(source):
    return {
        "path": str(source.path),
        "images": list(source.shape),
        "statistics": "stored" if all(source.stored.values()) else "computed",
    }


def sampling(source):
    """Returns the settings that sample.py stored beside its images, or None."""
    try:
        return dict(json.loads(str(source.extra["protocol"])))
    except (KeyError, ValueError, TypeError):
        return None


def print_table(names, rows):
    print(*[f"{name:>15}" for name in names])
    for row in rows:
        for name in names:
            cell = "-"
            if row[name] is not None:
                cell = f"{round(row[name], 4) + 0.0:.4f}"  # + 0.0 makes 0 of a rounded -0.0
            print(f"{cell:>15}", end=" ")
        print("", row["set"])


def print_protocol(rows):
    for row in rows:
        for name, settings in row["protocol"].items():
            if row is not rows[0] and name not in ("samples", "sampling"):
                continue  # all rows share it
            words = [f"{key} {value}" for key, value in (settings or {}).items()]
            print(f"{name:16}", ", ".join(words) or "not recorded")


def warn_about(source, reference, args):
    count, *size = source.shape[:3]
    expected = [256, 256] if args.fdr6 else list(reference.shape[1:3])
    labels = source.extra.get("arr_1")
    if not all(source.stored.values()) and count < 50_000:
        warn(
            f"{source.path}: {count} images; "
            "the fewer there are, the higher the FID is; papers use 50,000"
        )
    if size and expected and size != expected:
        whose = "the validation set of FDr^6" if args.fdr6 else reference.path
        warn(
            f"{source.path}: its images are {size[0]} x {size[1]}, those of {whose} are"
            f" {expected[0]} x {expected[1]}; this alone raises the distances"
        )
    if args.spaces != ["inception"]:
        return

    stored = source.stored["inception"]
    if stored and "sfid" not in stored:
        warn(f"{source.path}: no mu_s and sigma_s, which sFID needs; --stats writes them")
    if source is reference or labels is None or labels.shape != (count,):
        return
    if labels[0] < labels[-1] and (labels[:-1] <= labels[1:]).all():
        warn(f"{source.path}: sorted by class, which makes the Inception Score far too low")


# ---- files


EXTRA = ("mu", "sigma", "arr_1", "protocol")  # what begins like them is read as well: mu_s
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
OTHER_IMAGES = ".avif .bmp .gif .heic .heif .jfif .jp2 .jxl .pgm .pnm .ppm .tga .tif .tiff"
MOST_PIXELS = 2**28  # a resized image may have as many: 0.8 GB


def open_source(path, args):
    """Opens and checks a set of images: an ArrayImages or a FolderImages.

    source[i] is image i, and source.shape is (N, H, W, 3). source.threads says how many threads may
    read at once, None how many suit the machine. source.extra has the small arrays of an .npz.
    source.stored[space] has the statistics of the .npz that are to be used.
    Raises UserError if there are too few images, or images of another size than --image-size, or
    statistics of other spaces only.
    """
    if os.path.isdir(path):  # unlike path.is_dir, this does not raise if the name is too long
        source = FolderImages(path, args.image_size)
    elif os.path.isfile(path):
        source = ArrayImages(path)
    else:
        raise UserError(f"{path}: no such file or folder")

    source.stored = {}
    for space in args.spaces:
        source.stored[space] = {}
        if space != "pixels" and not args.stats:
            source.stored[space] = stored_statistics(source, space)

    count = source.shape[0]
    shape = list(source.shape[1:])
    if count < 4 and not (count == 0 and all(source.stored.values())):
        raise UserError(
            f"{path}: holds {count} images; "
            "at least 4 are needed, and 50,000 for a figure to quote"
        )
    if count and args.image_size and shape[:2] != [args.image_size, args.image_size]:
        raise UserError(
            f"{path}: holds images of {shape}; "
            f"--image-size {args.image_size} crops folders only"
        )
    return source


def suffixes(space):
    """Returns how the names of a space's statistics end in an .npz: ADM's mu and mu_s, mu_clip."""
    if space == "inception":
        return {"fid": "", "sfid": "_s"}
    return {"fid": f"_{space}"}


def stored_statistics(source, space):
    """Returns the statistics that an .npz holds: {"fid": (mu, sigma), "sfid": (mu_s, sigma_s)}.

    Raises UserError if it holds those of other spaces only.
    """
    stored = {}
    for kind, suffix in suffixes(space).items():
        mu = source.extra.get(f"mu{suffix}")
        sigma = source.extra.get(f"sigma{suffix}")
        if mu is None or sigma is None:
            continue
        with explaining(source.path, "make it again with --stats"):
            d = InceptionV3.widths[kind] if space == "inception" else mu.size
            finite = np.isfinite(mu).all() and np.isfinite(sigma).all()
            if mu.shape != (d,) or sigma.shape != (d, d) or not finite:
                raise ValueError(
                    f"mu{suffix} and sigma{suffix} are "
                    f"not finite arrays of shape ({d},) and ({d}, {d})"
                )
        stored[kind] = (mu, sigma)

    others = [name for name in source.extra if name.startswith("sigma")]
    if others and "fid" not in stored:
        raise UserError(
            f"{source.path}: holds {' '.join(others)} of other spaces, and nothing of {space}; make"
            f" a reference with --stats --features {space}, or save its arr_0 as an .npy"
        )
    return stored


class ArrayImages:
    """Images of an .npz (`arr_0`) or .npy, read one by one, because there may be 10 GB of them."""

    threads = 1  # the file has one position

    def __init__(self, path):
        self.path = path
        self.shape = (0,)
        self.extra = {}
        with explaining(path):
            if path.suffix.lower() == ".npy":
                self.file = open(path, "rb")
                size = path.stat().st_size
            else:
                archive = np.lib.npyio.NpzFile(path, allow_pickle=False)
                small = [name for name in archive.files if name.startswith(EXTRA)]
                self.extra = {name: archive[name] for name in small}
                if small and "arr_0" not in archive.files:
                    return  # statistics alone: there are no images, and shape stays (0,)
                self.file = archive.zip.open("arr_0.npy")
                size = archive.zip.getinfo("arr_0.npy").file_size
            if np.lib.format.read_magic(self.file) == (1, 0):
                header = np.lib.format.read_array_header_1_0(self.file)
            else:
                header = np.lib.format.read_array_header_2_0(self.file)
        self.shape, fortran_order, dtype = header
        self.start = self.file.tell()

        complete = self.start + math.prod(self.shape) == size
        flat = 0 in self.shape[1:]
        if dtype != np.uint8 or self.shape[3:] != (3,) or flat or fortran_order or not complete:
            raise UserError(
                f"{path}: {dtype} {list(self.shape)} in {size} bytes, "
                "expected uint8 [N, H, W, 3] in C order; "
                "if it is float NCHW in [-1, 1], save 127.5 * x + 128, clipped and transposed"
            )

    def __getitem__(self, i):
        shape = self.shape[1:]
        size = math.prod(shape)
        with explaining(self.path):
            self.file.seek(self.start + int(i) * size)
            return np.frombuffer(self.file.read(size), np.uint8).reshape(shape)


class FolderImages:
    """RGB images of a folder and its subfolders, sorted by path, and cropped if a size is given."""

    threads = None  # as many as suit the machine

    def __init__(self, path, size):
        self.path = path
        self.size = size
        self.files = []
        others = []
        with explaining(path, "make it readable", OSError):
            for file in list_files(path):
                suffix = file.suffix.lower()
                if suffix in IMAGES:
                    self.files.append(file)
                elif suffix in OTHER_IMAGES.split():
                    others.append(file)
        if others:
            kinds = sorted({file.suffix.lower() for file in others})
            warn(
                f"{path}: left out {len(others)} images of other types ({' '.join(kinds)}), "
                f"such as {others[0]}; only {' '.join(IMAGES)} are read"
            )

        folders = [str(file.parent) for file in self.files]
        self.extra = {"arr_1": np.unique(folders, return_inverse=True)[1]}
        self.shape = (len(self.files),)
        if self.files:
            self.shape += self[0].shape

    def __getitem__(self, i):
        file = self.files[i]
        if not file.is_file():
            raise UserError(f"{file}: not a file; remove it")
        with explaining(file, "replace or remove it"), Image.open(file) as image:
            rgb = to_rgb(image)  # like ADM, this ignores the orientation in EXIF
            if self.size:
                rgb = center_crop(rgb, self.size)
            return np.asarray(rgb)


def list_files(folder, parents=()):
    """Yields the files below a folder, sorted. Links are followed; hidden files are left out."""
    real = os.path.realpath(folder)
    if real in parents:  # a link that leads back
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if entry.is_dir():
            yield from list_files(entry.path, (*parents, real))
        else:
            yield Path(entry.path)


def to_rgb(image):
    """Converts a PIL image to RGB as ADM does, but scales 16-bit grey, which PIL would clip.

    Raises ValueError for 32-bit integers and floats, because their range is unknown.
    """
    # older versions of Pillow open a 16-bit PNG in mode I
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = np.asarray(image).astype(np.int32)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))  # 65535 / 257 = 255
    elif image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode} has 32 bits per pixel; save it with 8 or 16")
    return image.convert("RGB")


def center_crop(image, size):
    """Crops a PIL image to size x size as ADM does: halves it (box), resizes it (bicubic), cuts.

    Raises ValueError if it is so narrow that the resized image would fill the memory.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width = round(image.width * scale)
    height = round(image.height * scale)
    if width * height > MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels would become {width} x {height}")
    image = image.resize((width, height), Image.BICUBIC)
    left = (width - size) // 2
    top = (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def write_reference(path, source, statistics):
    """Writes what ADM's references hold: statistics, and images for precision and recall.

    statistics: {space: {"fid": (mu, sigma)}}, with "sfid" for Inception.
    """
    arrays = {}
    for space, kinds in statistics.items():
        for kind, suffix in suffixes(space).items():
            arrays[f"mu{suffix}"], arrays[f"sigma{suffix}"] = kinds[kind]
    order = np.random.RandomState(0).permutation(source.shape[0])
    arrays["arr_0"] = np.stack([source[i] for i in sorted(order[:PR_IMAGES])])
    write(path, lambda file: np.savez(file, **arrays))


def write(path, save):
    """Calls save(file). Only a finished file takes the place of an old one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with explaining(path, "name another file or free the disk", OSError):
        try:
            with open(temporary, "wb") as file:
                save(file)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def file_hash(path):
    """Returns the first 16 hexadecimal digits of a file's SHA-256, or None for a folder."""
    if path.is_dir():
        return None
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()[:16]


WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"


def load_weights(model, path):
    """Loads a file, by default the published weights, which torch.hub downloads and keeps.

    Returns its file_hash.
    """
    file = path or Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)
    remedy = f"put the FID Inception weights there, or name your copy with --weights: {URL}"
    with explaining(file, remedy):
        if path is None:
            torch.hub.load_state_dict_from_url(URL, check_hash=True, weights_only=True)
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return file_hash(file)


def build(space, args):
    """Returns the network of a space, and the hash of the file that held its weights or None."""
    if space == "pixels":
        return PixelFeatures(), None
    if space == "inception":
        model = InceptionV3()
        return model, load_weights(model, args.weights)
    file = args.features_weights
    if file and file.is_dir():
        file = file / f"{space}.safetensors"
    model = TimmFeatures(space, file)
    return model, file and file_hash(file)


# ---- errors and warnings


class UserError(Exception):
    """An error that the user can repair: one line, which names the thing and the remedy."""


def warn(message):
    """Prints a warning, in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"fid.py: warning: {message}", file=sys.stderr)


@contextlib.contextmanager
def explaining(what, remedy="is the file complete? copy or download it again", errors=Exception):
    """Turns what a decoder of a user's file raises, ten types and more, into a UserError."""
    try:
        yield
    except errors as error:
        reason = " ".join(str(error).split())[:200]  # PyTorch's messages go on for many lines
        kind = type(error).__name__
        raise UserError(f"{what}: cannot be used ({kind}: {reason}); {remedy}") from None


# ---- command line


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        raise UserError(message)


def parse_args(argv=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="fid.py", description=__doc__, formatter_class=layout)
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add = parser.add_argument
    add("paths", nargs="*", type=path_name, metavar="REF SAMPLES",
        help="each is an .npz, an .npy or a folder of images")
    add("--stats", action="store_true",
        help="make a reference of one set of images; compare nothing")
    add("--out", type=path_name, metavar="REF",
        help="the .npz that --stats writes")
    add("--json", type=path_name, metavar="FILE",
        help="also write the results to this file (default: do not)")
    add("--image-size", type=int, metavar="PIXELS",
        help="crop the images of folders to this size (default: do not)")
    add("--features", type=space_name, metavar="NAME", default="inception",
        help=f"what the metrics compare: {', '.join(SPACES)}, pixels, or a model of timm"
        " (default: %(default)s)")
    add("--fdr6", action="store_true",
        help="compare in the six spaces of FDr^6, with no other metric")
    add("--weights", type=path_name,
        help="a file of FID Inception weights (default: torch.hub's cache, or download them)")
    add("--features-weights", type=path_name, metavar="FILE",
        help="weights of the timm model, .safetensors or .pth, or a folder of NAME.safetensors"
        " (default: timm downloads them)")
    add("--batch-size", type=int, default=64,
        help="number of images per process (default: %(default)s)")
    add("--device", choices=devices, default=devices[0],
        help="where the network runs (default here: %(default)s)")
    add("--fp32-distances", action="store_true",
        help="do not round distances to fp16 (default: round them, as ADM does)")
    args = parser.parse_intermixed_args(argv)

    size = args.image_size
    args.spaces = list(SPACES) if args.fdr6 else [args.features]
    if args.fdr6 and args.features != "inception":
        parser.error("--fdr6 names six spaces; leave --features out")
    if args.features_weights and args.spaces in (["inception"], ["pixels"]):
        parser.error("--features-weights needs --fdr6, or --features with a model of timm")
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size} must be above 0")
    if size is not None and not 1 <= size <= 4096:
        parser.error(f"--image-size {size} must be above 0, at most 4096")
    if not args.stats and len(args.paths) < 2:
        parser.error("give REF and SAMPLES, or --stats IMAGES --out REF.npz")
    if args.stats and (len(args.paths) != 1 or args.json or args.features == "pixels"):
        parser.error("--stats takes one set of images, no --json, no --features pixels")
    if args.stats != (args.out is not None):
        parser.error("--stats IMAGES and --out REF.npz need each other; see also --json")
    if args.out and args.out.suffix.lower() != ".npz":
        parser.error(f"--out {args.out}: must end in .npz")
    for flag, path in (("--out", args.out), ("--json", args.json)):
        if path:
            inputs = [*args.paths, args.weights, args.features_weights]
            check_output(f"{flag} {path}", path, inputs)
    return args


def path_name(text):
    """An argparse type. It refuses the empty name, because Path("") is the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; name a file or a folder")
    return Path(text)


def space_name(text):
    """An argparse type. A timm model of the catalogue has its short name from here on."""
    for short, (model, _, _) in SPACES.items():
        if text == model:
            return short
    return text


def check_output(what, path, inputs):
    """Refuses a file that cannot be written, before the work begins."""
    taken = [os.path.realpath(file) for file in inputs if file]
    if os.path.realpath(path) in taken:
        raise UserError(f"{what}: is an input as well; name another file")
    usable = os.path.isfile(path) or not os.path.lexists(path)
    if not usable or not os.path.isdir(path.parent) or not os.access(path.parent, os.W_OK):
        raise UserError(f"{what}: cannot be written; name a file in an existing folder")


TORCHRUN = "start several processes with torchrun, or unset RANK, LOCAL_RANK and WORLD_SIZE"


def torchrun_ranks():
    """Returns rank, rank on this machine and number of processes, as torchrun sets them."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    words = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
    with explaining(words, TORCHRUN, ValueError):
        rank = int(os.environ.get("RANK", 0))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        world = int(os.environ.get("WORLD_SIZE", 1))
        one_is_missing = ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ)
        if one_is_missing or local_rank < 0 or not 0 <= rank < world:
            raise ValueError("RANK must be below WORLD_SIZE, and both must be set")
    return rank, local_rank, world


def evaluate(args):
    """Runs the program. It checks all sources before the work begins."""
    rank, local_rank, world = torchrun_ranks()
    sources = [open_source(path, args) for path in args.paths]

    torch.backends.cuda.matmul.allow_tf32 = False  # TF32 moves the features
    torch.backends.cudnn.allow_tf32 = False
    if args.device == "cuda":
        with explaining("GPU", "start one process per GPU", RuntimeError):
            torch.cuda.set_device(local_rank)
    if world > 1:
        backend = "nccl" if args.device == "cuda" else "gloo"
        with explaining("the other processes", TORCHRUN, (RuntimeError, ValueError)):
            # six hours, because whoever reads the end of a deflated file unpacks all before it
            dist.init_process_group(backend, timeout=timedelta(hours=6))

    models = {space: build(space, args) for space in args.spaces}  # first: some may be missing
    measured = {}
    networks = {}
    for space, (model, weights) in models.items():
        networks[space] = f"{model.name}, weights {weights or 'of timm'}"
        if args.device == "cpu":
            model.to(memory_format=torch.channels_last)  # 1.4 times as fast
        model.to(args.device)
        measured[space] = [measure(source, space, model, args, rank, world) for source in sources]

    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    if args.stats:
        statistics = {space: sets[0].statistics for space, sets in measured.items()}
        write_reference(args.out, sources[0], statistics)
    elif args.fdr6:
        report_fdr6(sources, measured, networks, args, world)
    else:
        model, weights = models[args.features]
        report(sources, measured[args.features], model, weights, args, world)


def main(argv=None):
    """Runs the command line. What a user can repair becomes one line and exit code 1."""
    try:
        args = parse_args(argv)
        evaluate(args)
    except UserError as error:
        sys.exit(f"fid.py: {error}")
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        no_memory = re.search("(out of|enough|allocate) memory", str(error))
        if isinstance(error, RuntimeError) and not no_memory:
            raise
        sys.exit(f"fid.py: --batch-size {args.batch_size} does not fit into the memory; lower it")


# ---- the terminal


def interrupt(*_):
    """Ends in one line on Ctrl-C. A second one is ignored, because it would disturb the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise SystemExit("fid.py: interrupted")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None if it is closed
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name may hold what it cannot encode
    try:
        try:
            main()
        finally:  # also after --help
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
