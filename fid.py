"""FID, sFID, Inception Score, precision and recall as the ADM evaluation suite computes them, in PyTorch.

    python fid.py VIRTUAL_imagenet256_labeled.npz samples.npz           # the five numbers of the papers
    python fid.py REF A.npz B.npz C.npz                                 # several sets of samples, a row each
    python fid.py --stats imagenet/val --image-size 256 --out val.npz   # make a reference of your own images
    python fid.py digits.npz samples.npz --features pixels              # no weights: a sanity figure only
    torchrun --nproc_per_node=8 fid.py REF SAMPLES                      # features on 8 GPUs

REF and SAMPLES are an ADM .npz (`arr_0`, uint8 [N, H, W, 3]) or a folder of images. Where an .npz stores
statistics (`mu sigma mu_s sigma_s`, in ADM's references of the training set), FID and sFID use them, and the
images serve precision and recall only. Judge generation against the training set, reconstruction against the
validation set. The floor row is what real images score, which is not 0: two random disjoint parts of the
reference against each other, each as large as the smallest set of samples, or half the reference. FID falls
with the number of images on either side: samples against a larger reference may score below the floor.

"ADM" below is evaluations/evaluator.py of openai/guided-diffusion, the official code.
    FID        arXiv 1706.08500   |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of 2048 pooled features
    sFID       arXiv 2103.03841   the same of 7 channels of a 17 x 17 map (2023 values): sees where things are
    IS         arXiv 1606.03498   exp(mean KL(p(class | image) || p(class))): sharp and varied
    precision  arXiv 1904.06991   share of samples inside the reference manifold; recall: the reverse
Shapes: N, M images, H, W height and width, D feature width, C classes.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torchvision.models import inception
from tqdm import tqdm

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
METRICS = ("fid", "sfid", "inception_score", "precision", "recall")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
PR_IMAGES = 10_000  # that --stats keeps for precision and recall, as many as ADM's references hold
PR_BLOCK = 10_000  # rows and columns per block of distances, ADM's: its test for fp16 overflow is per block


# ---- network: the Inception v3 of 2015-12-05; other trainings of Inception v3 give other numbers
def fid_block(block, pool):
    """torchvision's Inception block with another pooling in front of its last branch."""

    class FIDBlock(block):
        def _forward(self, x):  # torchvision's last branch is computed in vain: 5 % of the time
            return [*super()._forward(x)[:-1], self.branch_pool(pool(x))]

    return FIDBlock


class InceptionV3(inception.Inception3):
    """FID Inception v3, parameters named as in the published weights: 472 tensors, 1008 classes."""

    widths = (2048, 2023)  # D of the features that forward returns

    def __init__(self):
        # torchvision: averages count the padding, Mixed_7c averages / here: they leave it out, Mixed_7c takes
        # the maximum, because the TensorFlow graph of the weights does
        mean = torch.nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        a, c, e = (fid_block(getattr(inception, f"Inception{x}"), mean) for x in "ACE")
        b, d, aux = inception.InceptionB, inception.InceptionD, inception.InceptionAux
        blocks = [inception.BasicConv2d, a, b, c, d, e, aux]
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False, inception_blocks=blocks)
        self.Mixed_7c = fid_block(inception.InceptionE, torch.nn.MaxPool2d(3, stride=1, padding=1))(2048)
        self.eval().requires_grad_(False)

    def forward(self, images):
        """images [N, 3, H, W], values 0..255 -> pooled [N, 2048], spatial features [N, 2023], both fp32."""
        x = (tf1_resize(images, 299) - 128) / 128  #                         [N, 3, 299, 299]
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [N, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x)))  #      [N, 192, 71, 71]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.maxpool2(x))))  # [N, 288, 35, 35]
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # [N, 768, 17, 17]
        # sFID: the first 7 channels, of Mixed_6d.branch1x1, in the NHWC order of stored sigma_s
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  #                 [N, 17 * 17 * 7]
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # [N, 2048, 8, 8]
        return x.mean((2, 3)), spatial


def tf1_resize(images, size):
    """Bilinear resize of TensorFlow 1: no half-pixel offset, no antialiasing, no rounding.

    images [N, C, H, W], uint8 or float -> float32 [N, C, size, size], on the CPU bit-equal to TensorFlow's
    """
    x = images.float()
    for dim in (3, 2):  # x before y, and not torch.lerp: both would round differently
        length = x.shape[dim]
        source = torch.arange(size, device=x.device).float() * (length / size)  # fp32, as in TensorFlow
        low = source.long()
        fraction = (source - low).view(-1, *[1] * (3 - dim))
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=length - 1))
        x = a + (b - a) * fraction
    return x


class PixelFeatures(torch.nn.Module):
    """Grey 8 x 8 thumbnails instead of a network: shows that a toy run learns, and no more."""

    widths = (64,)

    def forward(self, images):
        """images [N, 3, H, W], values 0..255 -> one kind of features, [N, 64] in 0..1."""
        return (F.adaptive_avg_pool2d(images.float().mean(1) / 255, 8).flatten(1),)


# ---- metrics: pure functions
def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians (arXiv 1706.08500, eq. 6), computed in fp64.

    mu [D], sigma [D, D], tensors or arrays -> float, in squared units of the features. ValueError otherwise.
    """
    given = (mu1, sigma1, mu2, sigma2)
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in given)
    shapes = [tuple(x.shape) for x in (mu1, sigma1, mu2, sigma2)]
    if shapes != [(len(mu1),), (len(mu1), len(mu1))] * 2:
        raise ValueError(f"frechet_distance needs shapes (D,), (D, D), (D,), (D, D), got {shapes}")
    # official code: sqrtm(S1 S2) / here: eigenvalues of the symmetric R^T S2 R with S1 = R R^T, because they
    # are the non-zero ones of S1 S2, and sqrtm is inexact for fewer images than D. R leaves out eigenvalues
    # of S1 at rounding level, because their square roots would add up.
    values, vectors = torch.linalg.eigh(sigma1)
    keep = values > values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
    R = vectors[:, keep] * values[keep].sqrt()  #              [D, rank of S1]
    eigenvalues = torch.linalg.eigvalsh(R.T @ sigma2 @ R)  #   [rank of S1]
    trace = eigenvalues.clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace).item()


def inception_score(logits, split_size=5000):
    """Inception Score (arXiv 1606.03498): exp(mean KL(p(y|x) || p(y))), averaged over splits of the rows.

    logits [N, C], without bias -> float in [1, C]. Splits are consecutive: too low for rows sorted by class.
    """
    scores = []
    for split in logits.split(split_size):
        log_p = split.double().log_softmax(1)  # official code: log(softmax), NaN where that underflows
        log_mean = log_p.logsumexp(0) - np.log(len(split))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def squared_distances(u, v, fp16):
    """|u|^2 - 2 u.v + |v|^2 of all pairs of rows: u [N, D], v [M, D] -> fp32 [N, M].

    fp16 rounds every intermediate to half precision as ADM does (sums are fp32), unless one overflows.
    """
    for dtype in (torch.float16, torch.float32) if fp16 else (torch.float32,):
        x, y = u.to(dtype), v.to(dtype)
        norm_x, norm_y = ((z * z).float().sum(1).to(dtype) for z in (x, y))
        product = (x.float() @ y.float().T).to(dtype)
        squared = (norm_x[:, None] - 2 * product + norm_y).clamp(min=0)
        if squared.isfinite().all():
            break
    return squared.float()


def manifold_share(points, manifold, k, fp16):
    """Share of points [N, D] in balls around the rows of manifold [M, D], each up to its k-th neighbour."""
    inside = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for u in manifold.split(PR_BLOCK):
        blocks = (squared_distances(u, v, fp16) for v in manifold.split(PR_BLOCK))
        near = torch.cat([x.topk(min(k + 1, x.shape[1]), largest=False).values for x in blocks], 1)
        radii = near.kthvalue(k + 1, keepdim=True).values  # k + 1: each row is its own nearest
        inside |= torch.cat([(squared_distances(u, v, fp16) <= radii).any(0) for v in points.split(PR_BLOCK)])
    return inside.double().mean().item()


def precision_recall(reference, samples, k=3, fp16=True):
    """Improved precision and recall (arXiv 1904.06991): the share of each set in the manifold of the other.

    reference [N, D], samples [M, D] -> two floats. ValueError for sets of k rows or fewer.
    fp16=True rounds distances as ADM does, which adds 0.001 to 0.002 to both, and to all published figures.
    """
    if min(len(reference), len(samples)) <= k:
        raise ValueError(f"precision_recall needs more than {k} rows: {len(reference)}, {len(samples)}")
    return manifold_share(samples, reference, k, fp16), manifold_share(reference, samples, k, fp16)


# ---- files
def fail(message):
    """Ends with one line on stderr and exit code 1."""
    raise SystemExit(f"fid.py: {message}")


@contextlib.contextmanager
def naming(path, remedy="is the name right, the file complete? copy or download it again"):
    """Turns whatever a reader raises on a damaged file (ten types and more) into one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())
        reason = reason.split(". ")[0].rstrip(".")[:200]  # PyTorch's messages go on for many lines
        fail(f"{path}: cannot be used ({type(error).__name__}: {reason}); {remedy}")


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path. Only a finished file takes the place of an old one."""
    temporary = path.with_name(f"{path.name}.tmp")
    with naming(path, "name another file or free the disk"):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def file_hash(path):
    """First 16 hexadecimal digits of a file's SHA-256."""
    with naming(path):
        return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()[:16]


def read_members(path, *names):
    """Those of the named arrays that an .npz has; none of a folder. Pickled objects are refused."""
    if os.path.isdir(path):
        return {}
    with naming(path), np.lib.npyio.NpzFile(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in names if name in archive.files}


class ArrayImages:
    """Images of an .npz (`arr_0`, stored or deflated), read one by one: 50,000 of 256 x 256 are 10 GB."""

    threads = 1  # more would share the position in the file

    def __init__(self, path):
        self.path = path
        with naming(path):
            archive = zipfile.ZipFile(path)
            self.file, size = archive.open("arr_0.npy"), archive.getinfo("arr_0.npy").file_size
            np.lib.format.read_magic(self.file)
            self.shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(self.file)
            self.start = self.file.tell()
            if self.start + math.prod(self.shape) > size:  # before anything of that size is allocated
                raise ValueError(f"arr_0 claims {list(self.shape)} images, but has {size} bytes")
        if dtype != np.uint8 or fortran_order or self.shape[3:] != (3,) or 0 in self.shape[1:]:
            found = f"{'Fortran-ordered ' if fortran_order else ''}{dtype} {list(self.shape)}"
            remedy = "(127.5 * x + 128).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1).copy()"
            fail(f"{path}: {found}, expected uint8 [N, H, W, 3]; for float NCHW x in [-1, 1] save {remedy}")
        labels = read_members(path, "arr_1").get("arr_1", np.zeros(0))
        self.labels = labels.tolist() if labels.dtype.kind in "iu" and labels.shape == self.shape[:1] else []

    def __getitem__(self, i):
        size = math.prod(self.shape[1:])
        with naming(self.path):
            self.file.seek(self.start + int(i) * size)
            return np.frombuffer(self.file.read(size), np.uint8).reshape(self.shape[1:])


class FolderImages:
    """Images of a folder and its subfolders, sorted by path, as RGB; cropped if a size is given."""

    threads = None  # the executor's choice: PIL decodes outside the interpreter lock

    def __init__(self, path, size):
        self.path, self.size = path, size
        walk = os.walk(path, onerror=fail)  # without it, a folder that cannot be opened would be left out
        found = (Path(folder, name) for folder, _, names in walk for name in names)
        self.files = sorted(file for file in found if file.suffix.lower() in IMAGE_SUFFIXES)
        self.labels = [str(file.parent) for file in self.files]
        self.shape = (len(self.files), *(self[0].shape if self.files else ()))

    def __getitem__(self, i):
        with naming(self.files[i]), Image.open(self.files[i]) as image:  # ADM ignores EXIF orientation
            image = image.convert("RGB")
            return np.asarray(center_crop(image, self.size) if self.size else image)


def center_crop(image, size):
    """ADM's crop of a PIL image to size x size: halve (box) while possible, resize (bicubic), cut out."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def batches(images, indices, batch_size):
    """Yields uint8 [batch, H, W, 3]."""
    with ThreadPoolExecutor(images.threads) as pool:
        for i in range(0, len(indices), batch_size):
            batch = list(pool.map(images.__getitem__, indices[i : i + batch_size]))
            if {image.shape for image in batch} != {images.shape[1:]}:
                fail(f"{images.path}: holds images of different sizes; crop them to one with --image-size")
            yield np.stack(batch)


def stored_statistics(path):
    """The pairs (mu, sigma) and (mu_s, sigma_s) of an .npz, as far as it has them."""
    pairs = []
    for d, names in zip(InceptionV3.widths, (("mu", "sigma"), ("mu_s", "sigma_s")), strict=True):
        pair = list(read_members(path, *names).values())
        if len(pair) < 2:
            break
        numbers = all(x.dtype.kind == "f" and (np.abs(x) < 1e100).all() for x in pair)  # no NaN, no overflow
        if [x.shape for x in pair] != [(d,), (d, d)] or not numbers:
            found = " and ".join(f"{x.dtype} {x.shape}" for x in pair)
            fail(f"{path}: {names} are {found}, not finite ({d},) and ({d}, {d}); make it again with --stats")
        pairs.append([x.astype(np.float64) for x in pair])
    return pairs


def open_side(path, args):
    """One side of a comparison: stored statistics, perhaps none, and images, None if there are none."""
    stored = stored_statistics(path) if args.features == "inception" and not args.stats else []
    side = SimpleNamespace(path=path, stored=stored, statistics=stored, images=None, features=[])
    if not stored or "arr_0.npy" in zipfile.ZipFile(path).namelist():
        side.images = FolderImages(path, args.image_size) if os.path.isdir(path) else ArrayImages(path)
        n, *shape = side.images.shape
        if n < 4:
            fail(f"{path}: holds {n} images; at least 4 are needed, and 50,000 for a figure to quote")
        if args.image_size and shape[:2] != 2 * [args.image_size]:
            fail(f"{path}: holds images of {shape}; --image-size {args.image_size} crops folders only")
    return side


def write_reference(path, statistics, images, batch_size):
    """An ADM reference file: statistics, and 10,000 random images, or all, for precision and recall."""
    chosen = np.sort(np.random.RandomState(0).permutation(images.shape[0])[:PR_IMAGES])
    (mu, sigma), (mu_s, sigma_s) = statistics
    with replacing(path) as temporary:
        with open(temporary, "wb") as f:
            np.savez(f, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(chosen), *images.shape[1:])}
        with zipfile.ZipFile(temporary, "a") as file, file.open("arr_0.npy", "w", force_zip64=True) as f:
            np.lib.format.write_array_header_1_0(f, header)
            for batch in batches(images, chosen, batch_size):  # 10,000 images of 512 x 512 are 8 GB
                f.write(batch.tobytes())


def load_weights(model, path):
    """Loads a file, or the published one from torch.hub's cache or the internet -> file_hash of the file."""
    file = path or Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)
    with naming(file, f"put the FID Inception weights there, or name your copy with --weights: {URL}"):
        if path is None:
            torch.hub.load_state_dict_from_url(URL, map_location="cpu", check_hash=True, weights_only=True)
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        if not all(x.isfinite().all() for x in model.state_dict().values()):
            raise ValueError("weights that are not finite")
    return file_hash(file)


# ---- features and report
def measure(side, model, args, rank=0, world=1, keep=1):
    """Sets the first `keep` kinds of features of a side, [N, D], and, unless stored, the statistics of all.

    Each process takes a contiguous part: rows stay in file order, which the Inception Score depends on.
    keep=0 needs no memory that grows with N.
    """
    n = side.images.shape[0]
    indices = range(n * rank // world, n * (rank + 1) // world)
    side.features = [torch.zeros(n, d, device=args.device) for d in model.widths[:keep]]
    sums = [torch.zeros(d + 1, d, dtype=torch.float64, device=args.device) for d in model.widths]
    with tqdm(total=len(indices), desc=side.path.name, unit="img", disable=rank > 0) as progress:
        starts = indices[:: args.batch_size]
        for i, batch in zip(starts, batches(side.images, indices, args.batch_size), strict=True):
            with naming(side.path, f"is --batch-size {args.batch_size} too large for the memory?"):
                outputs = model(torch.from_numpy(batch).to(args.device).permute(0, 3, 1, 2))
            for x, total in zip(outputs, sums, strict=True):  # of x x^T and, in the last row, of x
                total += F.pad(x, (0, 1), value=1).double().T @ x.double()
            for x, features in zip(outputs, side.features, strict=False):
                features[i : i + len(batch)] = x
            progress.update(len(batch))
    if world > 1:
        with naming("the other processes", "the first message says why"):
            for x in (*side.features, *sums):  # rows, too: those of other processes are 0 here
                dist.all_reduce(x)
    sums = [x.cpu().numpy() for x in sums]
    if not all(np.isfinite(x).all() for x in sums):
        fail(f"{side.path}: its features are not finite; are the weights intact?")
    computed = [(x[-1] / n, (x[:-1] - np.outer(x[-1], x[-1]) / n) / (n - 1)) for x in sums]
    side.statistics = side.stored or computed


def compare(reference, samples, model, args):
    """The metrics by name; None where a side lacks the statistics or the features that one needs."""
    results = dict.fromkeys(METRICS)
    for name, r, s in zip(METRICS[:2], reference.statistics, samples.statistics, strict=False):
        results[name] = frechet_distance(*r, *s)
    if samples.features and args.features == "inception":
        logits = samples.features[0] @ model.fc.weight.T  # no bias, as ADM
        results["inception_score"] = inception_score(logits)
    if samples.features and reference.features:
        pair = precision_recall(reference.features[0], samples.features[0], fp16=not args.fp32_distances)
        results["precision"], results["recall"] = pair
    return results


def floor(reference, sets, model, args):
    """The metrics of two random disjoint parts of the reference, and their size; None below 8 images."""
    if not reference.features or len(reference.features[0]) < 8:
        return None
    count = len(reference.features[0])
    n = min([count // 2, *(len(side.features[0]) for side in sets if side.features)])
    parts, order = [], torch.from_numpy(np.random.RandomState(0).permutation(count))
    for rows in (order[:n], order[n : 2 * n]):
        features = [x[rows] for x in reference.features]
        statistics = [(x.mean(0), x.T.cov()) for x in map(torch.Tensor.double, features)]
        parts.append(SimpleNamespace(features=features, statistics=statistics))
    return compare(*parts, model, args) | {"images": n}


def describe(side):
    """What the protocol says of a side."""
    shape = list(side.images.shape) if side.images else None
    return {"path": str(side.path), "images": shape, "statistics": "stored" if side.stored else "computed"}


def sampling_protocol(path):
    """The options that sample.py stored beside its images; None in other files."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(str(read_members(path, "protocol").get("protocol")))
        return found if isinstance(found, dict) else None


def warn(side):
    """Says what makes the numbers of a side incomparable or missing."""
    warning, n = f"fid.py: warning: {side.path}", side.images.shape[0] if side.images else 0
    if not side.stored and n < 50_000:
        print(f"{warning}: {n} images; the fewer, the higher is FID; papers use 50,000", file=sys.stderr)
    if len(side.stored) == 1:
        print(f"{warning}: no mu_s and sigma_s, which sFID needs; --stats writes them", file=sys.stderr)
    labels = side.images.labels if side.images else []
    if labels == sorted(labels) != labels[::-1]:  # in order, and not all equal
        print(f"{warning}: sorted by class, which makes the Inception Score far too low", file=sys.stderr)


def report(reference, sets, model, weights, args, world):
    """Prints the metrics of all sets and of the floor, their protocol, and warnings; --json writes them."""
    network = {"network": "Inception 2015-12-05", "weights_sha256": weights, "resize": "TF1 bilinear to 299"}
    pixels = {"network": "8 x 8 grey pixels: a sanity figure, comparable with nothing published"}
    sha256 = None if reference.path.is_dir() else file_hash(reference.path)
    shared = {
        "reference": describe(reference) | {"sha256": sha256},
        "features": (network if weights else pixels) | {"dtype": "fp32, statistics fp64"},
        "precision_recall": {"k": 3, "distances": "fp32" if args.fp32_distances else "fp16 rounding as ADM"},
        "run": {"device": args.device, "processes": world, "torch": torch.__version__},
    }
    names, rows, lines = [str(side.path) for side in sets], [], list(shared.items())
    for side in sets:
        own = {"samples": describe(side), "sampling": sampling_protocol(side.path)}
        rows.append(compare(reference, side, model, args) | {"protocol": shared | own})
        lines += own.items()
    result = (rows[0] if len(rows) == 1 else {"sets": rows}) | {"floor": floor(reference, sets, model, args)}
    if result["floor"]:
        names.append("floor, {images} against {images} of REF".format(**result["floor"]))
    width = max(map(len, names))
    print(" " * width, *(f"{key:>15}" for key in METRICS))
    for name, row in zip(names, [*rows, result["floor"]], strict=False):
        values = ("-" if row[key] is None else f"{row[key]:.4f}" for key in METRICS)
        print(f"{name:{width}}", *(f"{value:>15}" for value in values))
    for key, value in lines:
        print(f"{key:16}", ", ".join(f"{k} {v}" for k, v in value.items()) if value else "not recorded")
    for side in (reference, *sets):
        warn(side)
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(result, indent=1))


# ---- command line
def above_zero(text):
    """argparse type: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def output_file(text):
    """argparse type: a file to write, new or in place of an old one."""
    taken = os.path.exists(text) and not os.path.isfile(text)
    if taken or not text or not os.access(os.path.join(os.path.dirname(text), "."), os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written; name a file in an existing folder")
    return Path(text)


def parse_args(argv=None):
    parser = argparse.ArgumentParser("fid.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = fail  # one line, without the usage
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add = parser.add_argument
    add("reference", nargs="?", type=Path, metavar="REF", help=".npz or folder of images")
    add("samples", nargs="*", type=Path, metavar="SAMPLES", help="the same, any number of them")
    add("--stats", type=Path, metavar="IMAGES", help="make a reference of these images; compare nothing")
    add("--out", type=output_file, help="the .npz that --stats writes")
    add("--json", type=output_file, help="also write the results to this file (default: do not)")
    add("--image-size", type=above_zero, metavar="PIXELS", help="crop images of folders (default: do not)")
    add("--features", choices=["inception", "pixels"], default="inception", help="(default: %(default)s)")
    add("--weights", type=Path, help="FID Inception weights (default: torch.hub's cache, or download)")
    add("--batch-size", type=above_zero, default=64, help="images per process (default: %(default)s)")
    add("--device", choices=devices, default=devices[0], help="(default here: %(default)s)")
    add("--fp32-distances", action="store_true", help="do not round distances to fp16 (default: as ADM does)")
    args = parser.parse_intermixed_args(argv)
    output = args.out or args.json
    inputs = {path.resolve() for path in (args.reference, *args.samples, args.stats, args.weights) if path}
    for wrong, message in (
        (not args.samples and not args.stats, "give REF and SAMPLES, or --stats IMAGES --out REF.npz"),
        (args.stats and args.reference, f"--stats compares nothing; leave out {args.reference}"),
        (args.stats and args.json, "--json: --stats has no results; leave it out"),
        (args.stats and args.features == "pixels", "--features pixels: --stats is of Inception only"),
        (args.stats and not args.out, "--stats: name the file to make with --out REF.npz"),
        (args.out and args.out.suffix != ".npz", f"--out {args.out}: must end in .npz"),
        (args.out and not args.stats, "--out: only --stats makes a reference; results go to --json FILE"),
        (output and output.resolve() in inputs, f"{output}: is an input and an output; name another file"),
    ):
        if wrong:
            fail(message)
    return args


def main(argv=None):
    args = parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    paths = [args.stats] if args.stats else [args.reference, *args.samples]
    sides = [open_side(path, args) for path in paths]  # all are looked at before the work begins
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # TF32 moves the features
    if args.device == "cuda":
        gpu = int(os.environ.get("LOCAL_RANK", 0))
        with naming(f"GPU {gpu}", "start one process per GPU"):
            torch.cuda.set_device(gpu)
    if world > 1:  # hours: a later part of a deflated file has more before it to unpack
        dist.init_process_group("gloo" if args.device == "cpu" else "nccl", timeout=timedelta(hours=6))
    model, weights = PixelFeatures(), None
    if args.features == "inception":
        model = InceptionV3()
        weights = load_weights(model, args.weights)
        layout = torch.channels_last if args.device == "cpu" else torch.contiguous_format
        model.to(args.device, memory_format=layout)  # channels_last makes a CPU 1.4 times as fast
    for side, keep in zip(sides, [len(model.widths)] + [1] * len(args.samples), strict=True):
        if side.images:  # the floor takes all kinds of features of the reference
            measure(side, model, args, rank, world, keep=0 if args.stats else keep)
    if world > 1:
        dist.destroy_process_group()
    if rank == 0 and args.stats:
        write_reference(args.out, sides[0].statistics, sides[0].images, args.batch_size)
    elif rank == 0:
        report(sides[0], sides[1:], model, weights, args, world)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names and foreign protocols may hold anything
    main()
