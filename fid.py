"""FID, sFID, Inception Score, precision and recall, as the ADM evaluation suite computes them, in PyTorch.

    python fid.py VIRTUAL_imagenet256_labeled.npz samples.npz            # the five numbers of the papers
    python fid.py --stats imagenet/val --image-size 256 --out val.npz    # make a reference of your own images
    python fid.py digits.npz samples.npz --features pixels               # no weights: a sanity figure only
    torchrun --nproc_per_node=8 fid.py REF SAMPLES                       # features on 8 GPUs

REF and SAMPLES are an ADM .npz (`arr_0`) or .npy, uint8 [N, H, W, 3], or a folder of images. Where an .npz stores
statistics (`mu sigma mu_s sigma_s`, in ADM's references of the training set), FID and sFID use them; the images serve
precision and recall only. Judge generation against the training set, reconstruction against the validation set.

"ADM" below is evaluations/evaluator.py of openai/guided-diffusion, the TensorFlow original.
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

WEIGHTS = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
PR_IMAGES = 10_000  # reference images that --stats keeps for precision and recall, as many as ADM's files hold
PR_BLOCK = 10_000  # rows and columns per block of distances, ADM's: its test for fp16 overflow is per block
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # processes, as torchrun sets them


# ---- network: the Inception v3 of 2015-12-05; other trainings of Inception v3 give other numbers
def fid_block(block, pool):
    """torchvision's Inception block with another pooling in front of its last branch."""

    class FIDBlock(block):
        def _forward(self, x):  # torchvision's own last branch is thrown away: 5 % of the multiplications
            return [*super()._forward(x)[:-1], self.branch_pool(pool(x))]

    return FIDBlock


class InceptionV3(inception.Inception3):
    """FID Inception v3, parameters named as in the published weights (472 tensors, 1008 classes, no auxiliary head)."""

    widths = (2048, 2023)  # D of the features that forward returns

    def __init__(self):
        # torchvision: padding counts in averages, Mixed_7c averages / here: the TensorFlow graph of the weights
        mean = torch.nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        a, c, e = (fid_block(x, mean) for x in (inception.InceptionA, inception.InceptionC, inception.InceptionE))
        blocks = [inception.BasicConv2d, a, inception.InceptionB, c, inception.InceptionD, e, inception.InceptionAux]
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False, inception_blocks=blocks)
        self.Mixed_7c = fid_block(inception.InceptionE, torch.nn.MaxPool2d(3, stride=1, padding=1))(2048)
        self.eval().requires_grad_(False)

    def forward(self, images):
        """images [N, 3, H, W], values 0..255 -> pooled features [N, 2048], spatial features [N, 2023], both fp32."""
        x = (tf1_resize(images, 299) - 128) / 128  #                         [N, 3, 299, 299]
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [N, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x)))  #      [N, 192, 71, 71]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.maxpool2(x))))  # [N, 288, 35, 35]
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # [N, 768, 17, 17]
        # sFID: 7 channels of Mixed_6d.branch1x1, which leads the block's output, in the NHWC order of stored sigma_s
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  #                 [N, 17 * 17 * 7]
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # [N, 2048, 8, 8]
        return x.mean((2, 3)), spatial


def tf1_resize(images, size):
    """Bilinear resize of TensorFlow 1: no half-pixel offset, no antialiasing, no rounding; on the CPU bit-equal to it.

    images [N, C, H, W], uint8 or float -> float32 [N, C, size, size]
    """
    x = images.float()
    for dim in (3, 2):  # x before y, and not torch.lerp: both would round differently
        length = x.shape[dim]
        source = torch.arange(size, device=x.device).float() * (length / size)  # in fp32, like the original's fractions
        low = source.long()
        fraction = (source - low).view(-1, *[1] * (3 - dim))
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=length - 1))
        x = a + (b - a) * fraction
    return x


class PixelFeatures(torch.nn.Module):
    """Grey 8 x 8 thumbnails in place of a network: enough to see a toy run learn, comparable with nothing published."""

    widths = (64,)

    def forward(self, images):
        """images [N, 3, H, W], values 0..255 -> one kind of features, [N, 64] in 0..1."""
        return (F.adaptive_avg_pool2d(images.float().mean(1) / 255, 8).flatten(1),)


# ---- metrics: pure functions
def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians (arXiv 1706.08500, eq. 6) in fp64, in squared units of the features.

    mu [D], sigma [D, D], tensors or arrays -> float. Raises ValueError if the shapes do not fit together.
    """
    mu1, sigma1, mu2, sigma2 = (
        torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in (mu1, sigma1, mu2, sigma2)
    )
    shapes = [tuple(x.shape) for x in (mu1, sigma1, mu2, sigma2)]
    if shapes != [(len(mu1),), (len(mu1), len(mu1))] * 2:
        raise ValueError(f"frechet_distance needs shapes (D,), (D, D), (D,), (D, D), got {shapes}")
    # original: sqrtm(S1 S2), which is slow and, for fewer images than D, inexact or failing / here: with S1 = R R^T the
    # symmetric R^T S2 R has the non-zero eigenvalues of S1 S2. Rounding-level eigenvalues of S1 are left out of R,
    # because their square roots would add up.
    values, vectors = torch.linalg.eigh(sigma1)
    keep = values > values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
    R = vectors[:, keep] * values[keep].sqrt()  #              [D, rank of S1]
    eigenvalues = torch.linalg.eigvalsh(R.T @ sigma2 @ R)  #   [rank of S1]
    trace = eigenvalues.clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace).item()


def inception_score(logits, split_size=5000):
    """Inception Score (arXiv 1606.03498): exp(mean KL(p(y|x) || p(y))), averaged over splits of consecutive rows.

    logits [N, C], without bias -> float in [1, C]. The last split may be shorter. Rows sorted by class score too low.
    """
    scores = []
    for split in logits.split(split_size):
        log_p = split.double().log_softmax(1)  # original: log(softmax), NaN where that underflows
        log_mean = log_p.logsumexp(0) - np.log(len(split))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def distances(u, v, fp16):
    """Squared distances |u|^2 - 2 u.v + |v|^2 of all pairs of rows: u [N, D], v [M, D] -> fp32 [N, M].

    fp16 rounds every intermediate to half precision as ADM does (sums accumulate in fp32), unless one overflows.
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
    """Share of points [N, D] in the balls around the rows of manifold [M, D] that reach to their k-th neighbours."""
    inside = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for u in manifold.split(PR_BLOCK):
        near = [distances(u, v, fp16).topk(min(k + 1, len(v)), largest=False).values for v in manifold.split(PR_BLOCK)]
        radii = torch.cat(near, 1).kthvalue(k + 1, keepdim=True).values  # k + 1: each row is its own nearest
        inside |= torch.cat([(distances(u, v, fp16) <= radii).any(0) for v in points.split(PR_BLOCK)])
    return inside.double().mean().item()


def precision_recall(reference, samples, k=3, fp16=True):
    """Improved precision and recall (arXiv 1904.06991): how much of each set lies in the manifold of the other.

    reference [N, D], samples [M, D] -> share of samples near the reference, share of the reference near samples.
    fp16=True rounds distances as ADM does, which adds 0.001 to 0.002 to both: all figures published with ADM have it.
    Raises ValueError for sets of k rows or fewer.
    """
    if min(len(reference), len(samples)) <= k:
        raise ValueError(f"precision_recall needs more than {k} rows, got {len(reference)} and {len(samples)}")
    return manifold_share(samples, reference, k, fp16), manifold_share(reference, samples, k, fp16)


# ---- files
def fail(message):
    """Ends with one line on stderr and exit code 1."""
    raise SystemExit(f"fid.py: {message}")


@contextlib.contextmanager
def reading(path, remedy="Is the file complete? Copy or download it again."):
    """Turns whatever a decoder raises on a damaged file (about ten types) into one line that names the file."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")  # PyTorch writes essays
        fail(f"cannot read {path}: {reason[:200] or type(error).__name__}. {remedy}")


def read_members(path, *names):
    """Those of the named arrays that an .npz has; none of other files. Pickled objects are refused."""
    if path.suffix != ".npz":
        return {}
    with reading(path), np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in names if name in archive.files}


class ArrayImages:
    """Images of an .npz (`arr_0`, stored or deflated) or .npy, read one by one: 50,000 of 256 x 256 are 10 GB."""

    def __init__(self, path):
        self.path, self.threads = path, 1  # more threads would share the position in the file
        self.labels = read_members(path, "arr_1").get("arr_1", np.zeros(0)).tolist()
        with reading(path):
            self.file = zipfile.ZipFile(path).open("arr_0.npy") if path.suffix == ".npz" else open(path, "rb")
            np.lib.format.read_magic(self.file)
            self.shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(self.file)
            self.start = self.file.tell()
        if dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3 or fortran_order:
            found = f"{'Fortran-ordered ' if fortran_order else ''}{dtype} {list(self.shape)}"
            remedy = "(127.5 * x + 128).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1).copy()"
            fail(f"{path} holds {found}, expected uint8 [N, H, W, 3]. For float NCHW x in [-1, 1] save {remedy}")
        if path.suffix == ".npy" and self.shape[0]:  # a truncated file fails now, not after an hour, as an .npz does
            self[self.shape[0] - 1]

    def __getitem__(self, i):
        size = np.prod(self.shape[1:])
        with reading(self.path):
            self.file.seek(self.start + int(i) * size)
            return np.frombuffer(self.file.read(size), np.uint8).reshape(self.shape[1:])


class FolderImages:
    """Images of a folder and its subfolders, sorted by path, as RGB; cropped if a size is given."""

    def __init__(self, path, size):
        self.path, self.size, self.threads = path, size, None  # the default: PIL decodes outside the interpreter lock
        suffixes = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
        self.files = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
        self.labels = [str(file.parent) for file in self.files]
        self.shape = (len(self.files), *(self[0].shape if self.files else ()))

    def __getitem__(self, i):
        with reading(self.files[i]), Image.open(self.files[i]) as image:  # EXIF orientation is ignored, as in ADM
            image = image.convert("RGB")
            return np.asarray(center_crop(image, self.size) if self.size else image)


def center_crop(image, size):
    """ADM's crop of a PIL image to size x size: halve (box filter) while possible, resize (bicubic), cut the centre."""
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
                fail(f"{images.path} holds images of different sizes. Crop them to one with --image-size.")
            yield np.stack(batch)


def stored_statistics(path):
    """The pairs (mu, sigma) and (mu_s, sigma_s), as far as the file has them."""
    arrays = read_members(path, "mu", "sigma", "mu_s", "sigma_s")
    pairs = [(arrays[m], arrays[s]) for m, s in (("mu", "sigma"), ("mu_s", "sigma_s")) if m in arrays and s in arrays]
    for (mu, sigma), d in zip(pairs, InceptionV3.widths, strict=False):
        if mu.shape != (d,) or sigma.shape != (d, d) or not np.isfinite(mu.sum() + sigma.sum()):
            fail(f"{path} has statistics {mu.shape}, {sigma.shape}, not finite ({d},), ({d}, {d}). Remake it: --stats.")
    return pairs


def write_reference(path, statistics, images, batch_size):
    """An ADM reference file: statistics, and 10,000 seeded images (all, if fewer) for precision and recall."""
    chosen = np.sort(np.random.RandomState(0).permutation(images.shape[0])[:PR_IMAGES])
    arrays = zip(("mu", "sigma", "mu_s", "sigma_s"), (x for pair in statistics for x in pair), strict=True)
    with zipfile.ZipFile(f"{path}.tmp", "w") as archive:
        for name, array in arrays:
            with archive.open(f"{name}.npy", "w") as f:
                np.lib.format.write_array(f, array)
        with archive.open("arr_0.npy", "w", force_zip64=True) as f:  # in batches: 10,000 of 512 x 512 are 8 GB
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(chosen), *images.shape[1:])}
            np.lib.format.write_array_header_1_0(f, header)
            for batch in batches(images, chosen, batch_size):
                f.write(batch.tobytes())
    os.replace(f"{path}.tmp", path)  # only a finished file takes the place of an old one


def load_weights(model, path):
    """Loads a file, or else the published one from torch.hub's cache or the internet -> sha256 of the file used."""
    remedy = f"Needed are the FID Inception weights, {WEIGHTS}"
    if path is None:
        path = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS.rpartition("/")[2])
        with reading(path, f"{remedy}: put the file there, or name your copy with --weights."):
            torch.hub.load_state_dict_from_url(WEIGHTS, map_location="cpu", check_hash=True, weights_only=True)
    with reading(path, remedy):
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return sha256(path)


def sha256(path):
    """First 16 hex digits of the sha256 of a file."""
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()[:16]


# ---- features and report
def extract(path, model, args, device, keep=True):
    """Features of all images -> the images, [N, D] of the first kind, fp64 arrays (mu [D], sigma [D, D]) of each kind.

    Each process takes a contiguous part: rows stay in file order, which the Inception Score depends on.
    keep=False returns [0, D]: no memory that grows with N.
    """
    images = FolderImages(path, args.image_size) if path.is_dir() else ArrayImages(path)
    n, size = images.shape[0], args.image_size
    if n < 4:
        fail(f"{path} holds {n} images. At least 4 are needed, and 50,000 for a figure to quote.")
    if size and images.shape[1:3] != (size, size):
        fail(f"{path} holds images of {list(images.shape[1:])}. --image-size {size} crops folders only.")
    indices = range(n * RANK // WORLD, n * (RANK + 1) // WORLD)
    features = torch.zeros(n if keep else 0, model.widths[0], device=device)
    sums = [torch.zeros(d + 1, d, dtype=torch.float64, device=device) for d in model.widths]  # of x x^T and, last, of x
    with tqdm(total=len(indices), desc=path.name, unit="img", disable=RANK > 0) as progress:
        for i, batch in zip(indices[:: args.batch_size], batches(images, indices, args.batch_size), strict=True):
            outputs = model(torch.from_numpy(batch).to(device).permute(0, 3, 1, 2))
            for x, total in zip(outputs, sums, strict=True):
                if not x.isfinite().all():
                    fail(f"the features of {path} are not finite. Are the weights intact?")
                total += F.pad(x, (0, 1), value=1).double().T @ x.double()
            if keep:
                features[i : i + len(batch)] = outputs[0]
            progress.update(len(batch))
    if WORLD > 1:
        for x in (features, *sums):  # a sum collects the rows, too: those of other processes are 0 here
            dist.all_reduce(x)
    sums = [x.cpu().numpy() for x in sums]
    return images, features, [(x[-1] / n, (x[:-1] - np.outer(x[-1], x[-1]) / n) / (n - 1)) for x in sums]


def measure(path, model, args, device):
    """One side of the comparison: a description, images and features [N, D] (None without images), statistics."""
    stored = stored_statistics(path) if args.features == "inception" else []
    images = features = computed = None
    if not stored or "arr_0.npy" in zipfile.ZipFile(path).namelist():
        images, features, computed = extract(path, model, args, device)
    text = f"{path}, {list(images.shape) if images else 'no images'}, {'stored' if stored else 'computed'} statistics"
    return SimpleNamespace(text=text, images=images, features=features, statistics=stored or computed, stored=stored)


def cautions(reference, samples, width):
    """What makes the numbers incomparable or missing, one sentence each."""
    for name, side in (("reference", reference), ("samples", samples)):
        if not side.stored and len(side.features) < 50_000:
            few = f", fewer than {width} features" if len(side.features) < width else ""
            yield f"{name}: {len(side.features)} images{few}; the fewer, the higher is FID; papers use 50,000"
        if len(side.stored) == 1:
            yield f"{name}: mu and sigma only; sFID also needs mu_s and sigma_s, which --stats writes"
    if not reference.stored:
        yield "reference: no stored statistics; FID is against these images, not against a whole training set"
    labels = samples.images.labels if samples.images else []
    if labels == sorted(labels) != labels[::-1]:  # in order, and not all equal
        yield "samples: sorted by class, which makes the Inception Score far too low; shuffle them"


def report(reference, samples, model, weights, args):
    """Prints the five numbers, the protocol they hold for, and warnings; --json writes the same."""
    results = dict.fromkeys(("fid", "sfid", "inception_score", "precision", "recall"))
    for key, r, s in zip(("fid", "sfid"), reference.statistics, samples.statistics, strict=False):
        results[key] = frechet_distance(*r, *s)
    if weights and samples.images:
        results["inception_score"] = inception_score(samples.features @ model.fc.weight.T)  # no bias, as ADM
    if reference.images and samples.images:
        pair = precision_recall(reference.features, samples.features, fp16=not args.fp32_distances)
        results["precision"], results["recall"] = pair
    inception = f"Inception 2015-12-05, weights sha256 {weights}, TF1 bilinear resize to 299, fp32, statistics fp64"
    protocol = {
        "reference": reference.text + ("" if args.reference.is_dir() else f", sha256 {sha256(args.reference)}"),
        "samples": samples.text,
        "sampling": str(read_members(args.samples, "protocol").get("protocol", "not recorded")),  # from sample.py
        "features": inception if weights else "8 x 8 grey pixels: a sanity figure, comparable with nothing published",
        "precision_recall": f"k = 3, {'fp32' if args.fp32_distances else 'fp16 rounding as ADM'}",
        "versions": f"torch {torch.__version__}, numpy {np.__version__}, {args.device} x {WORLD}",
    }
    for key, value in (results | protocol).items():
        print(f"{key:16} {round(value, 6) if isinstance(value, float) else value}")
    for line in cautions(reference, samples, model.widths[0]):
        print(f"fid.py: warning: {line}", file=sys.stderr)
    if args.json:
        Path(f"{args.json}.tmp").write_text(json.dumps(results | {"protocol": protocol}, indent=1))
        os.replace(f"{args.json}.tmp", args.json)


def parse_args(argv=None):
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("reference", nargs="?", type=Path, help=".npz, .npy or folder of images; an .npz may hold statistics")
    add("samples", nargs="?", type=Path, help="the same")
    add("--stats", type=Path, metavar="IMAGES", help="make a reference file of these images, instead of comparing")
    add("--out", type=Path, help="the .npz that --stats writes")
    add("--json", type=Path, help="also write the results to this file")
    add("--image-size", type=int, metavar="PIXELS", help="crop the images of folders to this size")
    add("--features", choices=["inception", "pixels"], default="inception", help="pixels: no weights, a sanity figure")
    add("--weights", type=Path, help="FID Inception weights (default: torch.hub's cache, or download)")
    add("--batch-size", type=int, default=64, help="images per step and process")
    add("--device", choices=devices, default=devices[0])
    add("--fp32-distances", action="store_true", help="precision and recall without ADM's fp16 rounding")
    args = parser.parse_args(argv)
    inputs, output = ([args.stats], args.out) if args.stats else ([args.reference, args.samples], args.json)
    incomplete = None in inputs or (args.stats and (Path(args.out or "").suffix != ".npz" or args.features == "pixels"))
    if incomplete or min(args.batch_size, args.image_size or 1) < 1:
        fail("give REF SAMPLES, or --stats IMAGES --out REF.npz (not of pixels), and sizes above 0. See --help.")
    if output and (
        output.is_dir() or not output.absolute().parent.is_dir() or output.resolve() in map(Path.resolve, inputs)
    ):
        fail(f"cannot write to {output}: name a new file in an existing folder.")
    return args


def main(argv=None):
    args = parse_args(argv)
    for path in (args.stats, args.reference, args.samples, args.weights):
        if path and not path.exists():
            fail(f"{path} does not exist.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # TF32 moves the features
    device = torch.device("cpu") if args.device == "cpu" else torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1:  # hours, as processes drift apart: later parts of a deflated file have more before them to unpack
        dist.init_process_group("gloo" if args.device == "cpu" else "nccl", timeout=timedelta(hours=6))
    model, weights = PixelFeatures(), None
    if args.features == "inception":
        model = InceptionV3()
        weights = load_weights(model, args.weights)
        # channels_last makes a CPU 1.4 times as fast
        model.to(device, memory_format=torch.channels_last if args.device == "cpu" else torch.contiguous_format)
    if args.stats:
        images, _, statistics = extract(args.stats, model, args, device, keep=False)
        if RANK == 0:
            write_reference(args.out, statistics, images, args.batch_size)
    else:
        reference, samples = (measure(path, model, args, device) for path in (args.reference, args.samples))
        if RANK == 0:
            report(reference, samples, model, weights, args)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
