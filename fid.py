"""FID, sFID, Inception Score, precision and recall as the ADM evaluation suite computes them, in PyTorch.

    python fid.py VIRTUAL_imagenet256_labeled.npz samples.npz           # the five numbers of the papers
    python fid.py REF A.npz B.npz C.npz                                 # several sets of samples, a row each
    python fid.py --stats imagenet/val --image-size 256 --out val.npz   # make a reference of your own images
    python fid.py tests/digits.npz samples.npz --features pixels        # no weights: a sanity figure only
    torchrun --nproc_per_node=8 fid.py REF SAMPLES                      # features on 8 GPUs

REF and SAMPLES are an .npz (`arr_0`) or an .npy, uint8 [N, H, W, 3], or a folder of images. Where an .npz
stores statistics (`mu sigma mu_s sigma_s`: ADM's references, of the training set), FID and sFID use them.
Judge generation against the training set, reconstruction against the validation set. The floor row is what
real images score: n random ones of REF against its others, n the smallest set, at most N // 2. If REF is
small, its others are too few and the floor is too high: good samples may go below.

    FID        arXiv 1706.08500   |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of 2048 pooled features
    sFID       arXiv 2103.03841   the same of 7 channels of a 17 x 17 map (2023 values): sees where things are
    IS         arXiv 1606.03498   exp(mean KL(p(class | image) || p(class))): sharp and varied
    precision  arXiv 1904.06991   share of samples inside the reference manifold; recall: the reverse
ADM: evaluations/evaluator.py of openai/guided-diffusion. Shapes: N, M images, D feature width, C classes.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
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

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
METRICS = ("fid", "sfid", "inception_score", "precision", "recall")
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
EXTRA = (*STATISTICS, "arr_1", "protocol")  # what an .npz may hold beside its images
PR_IMAGES = 10_000  # that --stats keeps for precision and recall, as many as ADM's references hold
PR_BLOCK = 10_000  # rows and columns per block of distances, ADM's: its test for fp16 overflow is per block


# ---- network: the Inception v3 of 2015-12-05; other trainings of Inception v3 give other numbers
def repool(block, inputs, output):
    """Forward hook: computes the last branch of a torchvision Inception block again, with block.pool."""
    branch = block.branch_pool(block.pool(*inputs))
    output[:, -branch.shape[1] :] = branch


class InceptionV3(inception.Inception3):
    """FID Inception v3, parameters named as in the published weights: 472 tensors, 1008 classes."""

    name, widths = "Inception 2015-12-05, TF1 bilinear resize to 299", (2048, 2023)  # D of its two features

    def __init__(self):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        # torchvision: averages count the padding, Mixed_7c averages / here: they leave it out, Mixed_7c takes
        # the maximum, because the TensorFlow graph of the weights does
        for block in (x for x in self.children() if hasattr(x, "branch_pool")):
            block.pool = torch.nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
            block.register_forward_hook(repool)
        self.Mixed_7c.pool = torch.nn.MaxPool2d(3, stride=1, padding=1)
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
    """TensorFlow 1's bilinear resize, without half-pixel offset: [N, C, H, W] -> fp32 [N, C, size, size]."""
    x = images.float()
    for dim in (3, 2):  # bit-equal to TensorFlow on the CPU, with y before x or torch.lerp not
        length = x.shape[dim]
        source = torch.arange(size, device=x.device).float() * (length / size)  # fp32, as in TensorFlow
        low = source.long()
        fraction = (source - low).view(-1, *[1] * (3 - dim))
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=length - 1))
        x = a + (b - a) * fraction
    return x


class PixelFeatures(torch.nn.Module):
    """images [N, 3, H, W] -> ([N, 64],), grey 8 x 8 thumbnails: shows that a toy run learns, and no more."""

    name, widths = "8 x 8 grey pixels: a sanity figure, comparable with nothing published", (64,)

    def forward(self, images):
        return (torch.nn.functional.adaptive_avg_pool2d(images.float().mean(1) / 255, 8).flatten(1),)


# ---- metrics: pure functions
def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance (arXiv 1706.08500, eq. 6): mu [D], sigma [D, D] -> float, or ValueError."""
    given = [torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in (mu1, sigma1, mu2, sigma2)]
    mu1, sigma1, mu2, sigma2 = given
    shapes = [tuple(x.shape) for x in given]
    if shapes != [(len(mu1),), (len(mu1), len(mu1))] * 2:
        raise ValueError(f"frechet_distance needs shapes (D,), (D, D), (D,), (D, D), got {shapes}")
    # official code: sqrtm(S1 S2) / here: eigenvalues of R^T S2 R with S1 = R R^T, the same but for zeros,
    # because sqrtm is inexact for fewer images than D. Square roots of rounding errors in S1 would add up.
    values, vectors = torch.linalg.eigh(sigma1)
    keep = values > values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
    R = vectors[:, keep] * values[keep].sqrt()  #              [D, rank of S1]
    eigenvalues = torch.linalg.eigvalsh(R.T @ sigma2 @ R)  #   [rank of S1]
    trace = eigenvalues.clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace).item()


def inception_score(logits, split_size=5000):
    """Inception Score (arXiv 1606.03498) of logits [N, C] without bias, averaged over splits of the rows."""
    scores = []
    for split in logits.split(split_size):
        log_p = split.double().log_softmax(1)  # official code: log(softmax), NaN where that underflows
        log_mean = log_p.logsumexp(0) - np.log(len(split))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def squared_distances(u, v, fp16):
    """|u|^2 - 2 u.v + |v|^2 of all pairs of rows: u [N, D], v [M, D] -> fp32 [N, M]."""
    # ADM rounds every intermediate but sums to fp16, unless one overflows: P, R rise by 0.001 to 0.002
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
    """Precision and recall (arXiv 1904.06991): reference [N, D], samples [M, D], N, M > k -> two floats."""
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
        reason = " ".join(str(error).split())[:200]  # PyTorch's messages go on for many lines
        fail(f"{path}: cannot be used ({type(error).__name__}: {reason}); {remedy}")


def write(path, save):
    """Calls save(file). Only a finished file takes the place of an old one."""
    temporary = path.with_name(f"{path.name}.tmp")
    with naming(path, "name another file or free the disk"):
        try:
            with open(temporary, "wb") as file:
                save(file)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def file_hash(path):
    """First 16 hexadecimal digits of a file's SHA-256; None for a folder."""
    return None if path.is_dir() else hashlib.sha256(np.memmap(path, mode="r")).hexdigest()[:16]


class ArrayImages:
    """Images of an .npz (`arr_0`, deflated or not) or .npy, read one by one: there may be 10 GB of them."""

    def __init__(self, path):
        self.path, self.shape, self.extra = path, (0,), {}  # extra: the small arrays of an .npz
        with naming(path):
            if path.suffix == ".npy":
                self.file, size = open(path, "rb"), path.stat().st_size
            else:
                archive = np.lib.npyio.NpzFile(path, allow_pickle=False)
                self.extra = {name: archive[name] for name in EXTRA if name in archive.files}
                if "mu" in self.extra and "arr_0" not in archive.files:
                    return
                self.file, size = archive.zip.open("arr_0.npy"), archive.zip.getinfo("arr_0.npy").file_size
            np.lib.format.read_magic(self.file)
            self.shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(self.file)
        self.start = self.file.tell()
        complete = not fortran_order and self.start + math.prod(self.shape) == size
        if dtype != np.uint8 or self.shape[3:] != (3,) or 0 in self.shape[1:] or not complete:
            found = f"{dtype} {list(self.shape)} in {size} bytes, expected uint8 [N, H, W, 3] in C order"
            fail(f"{path}: {found}; of float NCHW in [-1, 1] save 127.5 * x + 128, clipped and transposed")

    def __getitem__(self, i):
        size = math.prod(self.shape[1:])
        with naming(self.path):
            self.file.seek(self.start + int(i) * size)
            return np.frombuffer(self.file.read(size), np.uint8).reshape(self.shape[1:])


class FolderImages:
    """Images of a folder and its subfolders, sorted by path, as RGB; cropped if a size is given."""

    def __init__(self, path, size):
        self.path, self.size = path, size
        walk = os.walk(path, onerror=fail)  # without it, a folder that cannot be opened would be left out
        found = (Path(folder, name) for folder, _, names in walk for name in names)
        self.files = sorted(x for x in found if x.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
        self.extra = {"arr_1": np.unique([str(x.parent) for x in self.files], return_inverse=True)[1]}
        self.shape = (len(self.files), *(self[0].shape if self.files else ()))

    def __getitem__(self, i):
        if not self.files[i].is_file():
            fail(f"{self.files[i]}: not a file; remove it")
        with naming(self.files[i]), Image.open(self.files[i]) as image:  # ADM ignores EXIF orientation
            if max(image.size) >= 200 * min(image.size):  # scaled, it would fill the memory
                raise ValueError(f"{image.width} x {image.height} pixels")
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


def open_side(path, args):
    """One side of a comparison: its images, if any, and `stored`: (mu, sigma) and (mu_s, sigma_s), if any."""
    if not path.is_dir() and not path.is_file():
        fail(f"{path}: no such file or folder")
    side = FolderImages(path, args.image_size) if path.is_dir() else ArrayImages(path)
    side.stored, side.features = [], []
    widths = InceptionV3.widths if args.features == "inception" and not args.stats else ()
    with naming(path, "make it again with --stats"):
        arrays = iter([side.extra[name].astype(np.float64) for name in STATISTICS if name in side.extra])
        for d, mu, sigma in zip(widths, arrays, arrays, strict=False):
            # products of larger ones overflow; "not max < 1e100" because that refuses NaN as well
            if (mu.shape, sigma.shape) != ((d,), (d, d)) or not np.abs(np.vstack([mu, sigma])).max() < 1e100:
                raise ValueError(f"{STATISTICS} are not finite arrays of shape ({d},) and ({d}, {d})")
            side.stored.append((mu, sigma))
    side.statistics, (n, *shape) = side.stored, side.shape
    kind = "stored" if side.stored else "computed"
    side.summary = {"path": str(path), "images": list(side.shape), "statistics": kind}
    if n < 4 and (n or not side.stored):
        fail(f"{path}: holds {n} images; at least 4 are needed, and 50,000 for a figure to quote")
    if n and args.image_size and shape[:2] != 2 * [args.image_size]:
        fail(f"{path}: holds images of {shape}; --image-size {args.image_size} crops folders only")
    return side


def write_reference(path, side):
    """An ADM reference file: statistics, and 10,000 random images, or all, for precision and recall."""
    chosen = np.sort(np.random.RandomState(0).permutation(side.shape[0])[:PR_IMAGES])
    arrays = dict(zip(STATISTICS, (x for pair in side.statistics for x in pair), strict=True))
    write(path, lambda file: np.savez(file, **arrays, arr_0=np.stack([side[i] for i in chosen])))


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
def measure(side, model, args, rank, world):
    """Sets side.features, one [N, D] per kind, unless args.stats, and side.statistics, unless stored."""
    n, size = side.shape[0], args.batch_size
    steps = range(n * rank // world, n * (rank + 1) // world, size)  # rows stay in file order, for IS
    if not args.stats:
        side.features = [torch.zeros(n, d, device=args.device) for d in model.widths]
    sums = [torch.zeros(d + 1, d, dtype=torch.float64, device=args.device) for d in model.widths]
    with ThreadPoolExecutor(1 if isinstance(side, ArrayImages) else None) as pool:  # a file has one position
        for i in tqdm(steps, side.path.name, unit=" batches", disable=rank > 0):
            batch = list(pool.map(side.__getitem__, range(i, min(i + size, steps.stop))))
            if {image.shape for image in batch} != {side.shape[1:]}:
                fail(f"{side.path}: holds images of different sizes; crop them to one with --image-size")
            with naming(side.path, f"is --batch-size {size} too large for the memory?"):
                outputs = model(torch.from_numpy(np.stack(batch)).to(args.device).permute(0, 3, 1, 2))
            for x, total in zip(outputs, sums, strict=True):  # of x x^T and, in the last row, of x
                total += torch.nn.functional.pad(x, (0, 1), value=1).double().T @ x.double()
            for x, features in zip(outputs, side.features, strict=False):
                features[i : i + len(batch)] = x
    if world > 1:
        with naming("the other processes", "the first message says why"):
            for x in (*side.features, *sums):  # rows, too: those of other processes are 0 here
                dist.all_reduce(x)
    if not all(x.isfinite().all() for x in sums):
        fail(f"{side.path}: its features are not finite; are the weights intact?")
    moments = [(x[:-1].cpu() / n, x[-1].cpu() / n) for x in sums]
    side.statistics = side.stored or [(m, (xx - m.outer(m)) * n / (n - 1)) for xx, m in moments]


def compare(reference, samples, model, args):
    """The metrics by name; None where a side lacks the statistics or the features that one needs."""
    results = dict.fromkeys(METRICS)
    for name, r, s in zip(METRICS[:2], reference.statistics, samples.statistics, strict=False):
        results[name] = frechet_distance(*r, *s)
    if samples.features and args.features == "inception":  # logits without bias, as ADM
        results["inception_score"] = inception_score(samples.features[0] @ model.fc.weight.T)
    if samples.features and reference.features:
        pair = precision_recall(reference.features[0], samples.features[0], fp16=not args.fp32_distances)
        results["precision"], results["recall"] = pair
    return results


def floor(reference, sets, model, args):
    """The metrics of n random images of the reference against its N - n others; None below 8 images."""
    count = reference.shape[0]
    n = min([count // 2, *(side.shape[0] for side in sets if side.features)])
    if n < 4:
        return None
    order = torch.from_numpy(np.random.RandomState(0).permutation(count))
    parts = [argparse.Namespace(features=[x[i] for x in reference.features]) for i in (order[n:], order[:n])]
    for part in parts:
        part.statistics = [(x.mean(0), x.T.cov()) for x in map(torch.Tensor.double, part.features)]
    name = f"floor: {n} of REF against its other {count - n}"
    return {"set": name, "images": n} | compare(*parts, model, args)


def report(sides, model, weights, args, world):
    """Prints the metrics of all sets and of the floor, their protocol, and warnings; --json writes them."""
    reference, *sets = sides
    shared = {
        "reference": reference.summary | {"sha256": file_hash(reference.path)},
        "features": {"network": model.name, "weights_sha256": weights, "dtype": "fp32, statistics fp64"},
        "precision_recall": {"k": 3, "distances": "fp32" if args.fp32_distances else "fp16 rounding as ADM"},
        "run": {"device": args.device, "processes": world, "torch": torch.__version__},
    }
    rows, protocol = [], list(shared.items())
    for side in sets:
        own = {"samples": side.summary, "sampling": None}
        with contextlib.suppress(ValueError, TypeError, RecursionError):  # what sample.py stored, if it did
            own["sampling"] = dict(json.loads(str(side.extra.get("protocol"))))
        rows.append(compare(reference, side, model, args) | {"set": str(side.path), "protocol": shared | own})
        protocol += own.items()
    real = floor(reference, sets, model, args)
    result = (rows[0] if len(rows) == 1 else {"sets": rows}) | {"floor": real}
    print(*(f"{key:>15}" for key in METRICS))
    for row in filter(None, (*rows, real)):  # + 0 turns -0.0 into 0.0
        values = ("-" if row[key] is None else f"{round(row[key], 4) + 0:.4f}" for key in METRICS)
        print(*(f"{value:>15}" for value in values), "", row["set"])
    for key, value in protocol:
        print(f"{key:16}", ", ".join(f"{k} {v}" for k, v in value.items()) if value else "not recorded")
    for side in sides if args.features == "inception" else ():  # pixels are no figure to quote
        n, labels = side.shape[0], side.extra.get("arr_1", np.zeros(0))
        labelled = side in sets and labels.shape == (n,) and labels.dtype.kind in "iu"
        ascending = labelled and len(np.unique(labels)) > 1 and (labels == np.sort(labels)).all()
        for wrong, message in (
            (not side.stored and n < 50_000, f"{n} images; the fewer, the higher the FID; papers use 50,000"),
            (len(side.stored) == 1, "no mu_s and sigma_s, which sFID needs; --stats writes them"),
            (ascending, "sorted by class, which makes the Inception Score far too low"),
        ):
            if wrong:
                print(f"fid.py: warning: {side.path}: {message}", file=sys.stderr)
    if args.json:
        write(args.json, lambda file: file.write(json.dumps(result, indent=1).encode()))


# ---- command line
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = fail  # one line, without the usage
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add = parser.add_argument
    add("paths", nargs="*", type=Path, metavar="REF SAMPLES", help="each an .npz, .npy or folder")
    add("--stats", action="store_true", help="make a reference of one set of images; compare nothing")
    add("--out", type=Path, metavar="REF", help="the .npz that --stats writes")
    add("--json", type=Path, metavar="FILE", help="also write the results to this file (default: do not)")
    add("--image-size", type=int, metavar="PIXELS", help="crop images of folders (default: do not)")
    add("--features", choices=["inception", "pixels"], default="inception", help="(default: %(default)s)")
    add("--weights", type=Path, help="FID Inception weights (default: torch.hub's cache, or download)")
    add("--batch-size", type=int, default=64, help="images per process (default: %(default)s)")
    add("--device", choices=devices, default=devices[0], help="(default here: %(default)s)")
    add("--fp32-distances", action="store_true", help="do not round distances to fp16 (default: as ADM does)")
    args = parser.parse_intermixed_args(argv)
    output, inputs = args.out or args.json, [path.resolve() for path in (*args.paths, args.weights) if path]
    flag, size = "--out" if args.out else "--json", args.image_size
    writable = output and output.is_file() == output.exists() and os.access(f"{output.parent}/", os.W_OK)
    proper = args.stats and len(args.paths) == 1 and not args.json and args.features == "inception"
    for wrong, message in (
        (args.batch_size < 1, f"--batch-size {args.batch_size} must be above 0"),
        (size is not None and not 1 <= size <= 4096, f"--image-size {size} must be above 0, at most 4096"),
        (not args.stats and len(args.paths) < 2, "give REF and SAMPLES, or --stats IMAGES --out REF.npz"),
        (args.stats and not proper, "--stats takes one set of images, no --json, no --features pixels"),
        (args.stats != bool(args.out), "--stats IMAGES and --out REF.npz need each other; see also --json"),
        (args.out and args.out.suffix != ".npz", f"--out {args.out}: must end in .npz"),
        (output and output.resolve() in inputs, f"{flag} {output}: is an input as well; name another file"),
        (output and not writable, f"{flag} {output}: cannot be written; name a file in an existing folder"),
    ):
        if wrong:
            fail(message)
    return args


def main(argv=None):
    args = parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    sides = [open_side(path, args) for path in args.paths]  # all are looked at before the work begins
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # TF32 moves the features
    if args.device == "cuda":
        with naming("GPU", "start one process per GPU"):
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:  # hours: a later part of a deflated file has more before it to unpack
        dist.init_process_group("gloo" if args.device == "cpu" else "nccl", timeout=timedelta(hours=6))
    model = InceptionV3() if args.features == "inception" else PixelFeatures()
    weights = load_weights(model, args.weights) if args.features == "inception" else None
    layout = torch.channels_last if args.device == "cpu" else torch.contiguous_format
    model.to(args.device, memory_format=layout)  # channels_last makes a CPU 1.4 times as fast
    for side in (x for x in sides if x.shape[0]):
        measure(side, model, args, rank, world)
    if world > 1:
        dist.destroy_process_group()
    if rank == 0 and args.stats:
        write_reference(args.out, sides[0])
    elif rank == 0:
        report(sides, model, weights, args, world)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names and foreign protocols may hold anything
    main()
