"""FID, Inception Score, precision, recall, PSNR and SSIM: numbers that can be compared with the literature's.

  python fid.py samples.npz VIRTUAL_imagenet512.npz                            # FID-50k as ADM's evaluator; precision, recall
  python fid.py imagenet/train --image_size 512 --save_stats train512.npz      # a reference, once
  torchrun --nproc_per_node 8 fid.py samples/ train512.npz                     # the same number on 8 GPUs
  python fid.py rec/ val/ --image_size 512 --metrics fid,psnr,ssim             # rFID: the originals through the same crop

Inception with the TensorFlow-ported weights (URL, HASH) in fp32; pixels are uint8 RGB, taken as they are: only --image_size
crops. tests/test_fid.py holds it, weights and images being equal, to torch-fidelity (ADM's preprocessing, the default) and
pytorch-fid (--resize torch): features to 1e-4 relative, metrics to 1e-3. B images of H x W pixels, N in all, D features each.
"""
import argparse, hashlib, json, math, os, pickle, platform, time, zipfile, zlib
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ae import SUFFIXES, UNREADABLE, InputError, center_crop, open_images, read_image, to_uint8

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
HASH = "6726825d"                       # the sha256 of the file begins so (torch.hub's convention); TF's inception-2015-12-05
MIN_IMAGES = 2049                       # fewer than D + 1 = 2049 images leave the covariance of 2048 features singular
METRICS = ("fid", "is", "precision", "recall", "psnr", "ssim")
BROKEN = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, zipfile.BadZipFile,
          pickle.UnpicklingError)       # what numpy and torch raise on files that are cut off or something else

# ---------------------------------------------------------------------------------------------------------------------------
# Inception. Module names are the tensor names of the published file; widths and kernels are Szegedy et al. 2015.


class ConvBN(nn.Module):
    def __init__(self, c_in, c_out, kernel=1, stride=1, pad=True):
        super().__init__()
        k = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        self.conv = nn.Conv2d(c_in, c_out, k, stride, (k[0] // 2, k[1] // 2) if pad else 0, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def fold(self):
        """Batch norm in eval mode is an affine map: put it into the convolution (2e-7 relative in the features)."""
        self.conv, self.bn = nn.utils.fusion.fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()

    def forward(self, x):
        return F.relu_(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side on one input, concatenated. A branch is a chain of (channels, kernel[, stride]): its convolutions
    are called name_1, name_2, ..., or just name when alone; a list as the last link forks into name_2a and name_2b."""

    def __init__(self, c_in, branches, pool, c_pool=None):
        super().__init__()
        self.pool, self.chains = pool, []
        for branch, chain in branches.items():
            c, links = c_in, []
            for i, link in enumerate(chain, 1):
                name = branch + (f"_{i}" if len(chain) > 1 else "")
                fork = {name + "a": link[0], name + "b": link[1]} if isinstance(link, list) else {name: link}
                for name, (width, kernel, *stride) in fork.items():
                    self.add_module(name, ConvBN(c, width, kernel, *stride, pad=not stride))
                c = width
                links.append(list(fork))
            self.chains.append(links)
        if c_pool:
            self.branch_pool = ConvBN(c_in, c_pool)

    def forward(self, x):                                                           # (B, c, h, w)
        out = []
        for links in self.chains:
            hs = [x]
            for names in links:
                hs = [getattr(self, name)(hs[0]) for name in names]
            out += hs
        if self.pool == "stride":                               # Mixed_6a, 7a, as torchvision
            return torch.cat(out + [F.max_pool2d(x, 3, 2)], 1)
        if self.pool == "average":                              # not torchvision's: TensorFlow leaves the padding out of the mean
            return torch.cat(out + [self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))], 1)
        # Mixed_7c, not torchvision's: the graph of 2015 takes the maximum where the paper says average.
        return torch.cat(out + [self.branch_pool(F.max_pool2d(x, 3, 1, 1))], 1)


class InceptionV3(nn.Module):
    """uint8 (B, H, W, 3) -> (pool features (B, 2048), logits without their bias (B, 1008)), in eval mode. Its weights are
    random (He's, from seed) until load_state_dict takes the published ones."""

    def __init__(self, resize="tf", seed=0):
        super().__init__()
        self.resize = {"tf": resize_tf, "torch": resize_torch}[resize]
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, 2, pad=False)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, pad=False)
        for name, c, c_pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):         # 35 x 35
            self.add_module(f"Mixed_{name}", Mixed(c, {
                "branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)],
                "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}, "average", c_pool))
        self.Mixed_6a = Mixed(288, {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)]}, "stride")
        for name, k in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):                # 17 x 17
            self.add_module(f"Mixed_{name}", Mixed(768, {
                "branch1x1": [(192, 1)], "branch7x7": [(k, 1), (k, (1, 7)), (192, (7, 1))],
                "branch7x7dbl": [(k, 1), (k, (7, 1)), (k, (1, 7)), (k, (7, 1)), (192, (1, 7))]}, "average", 192))
        self.Mixed_7a = Mixed(768, {"branch3x3": [(192, 1), (320, 3, 2)],
                                    "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)]}, "stride")
        fork = [(384, (1, 3)), (384, (3, 1))]
        for name, c, pool in (("7b", 1280, "average"), ("7c", 2048, "max")):                # 8 x 8
            self.add_module(f"Mixed_{name}", Mixed(c, {
                "branch1x1": [(320, 1)], "branch3x3": [(384, 1), fork], "branch3x3dbl": [(448, 1), (384, 3), fork]}, pool, 192))
        self.fc = nn.Linear(2048, 1008)                         # 1008, not torchvision's 1000: the graph has 8 unused classes
        random = torch.Generator().manual_seed(seed)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, generator=random)
        nn.init.normal_(self.fc.weight, generator=random)       # [ours] wide: logits of random features then differ by about 1
        nn.init.zeros_(self.fc.bias)
        self.eval().requires_grad_(False)

    def forward(self, img):                                                         # uint8 (B, H, W, 3)
        x = self.resize(img)                                                        # (B, 3, 299, 299) in [-1, 1]
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))           # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))           # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))      # (B, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))    # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))             # (B, 2048)
        return x, x @ self.fc.weight.T                          # the Inception Score of the literature leaves the bias out


def resize_tf(img, size=299):
    """TensorFlow 1's bilinear resize without antialiasing, then (x - 128) / 128: ADM's evaluator, torch-fidelity.
    Its grid is the legacy one: no half-pixel shift, output i reads input i * (in / out)."""
    x = img                                                                         # (B, H, W, 3)
    for dim in (2, 1):                                          # columns, then rows: TF's order
        n = x.shape[dim]
        at = torch.arange(size, device=x.device, dtype=torch.float32) * torch.tensor(n / size, dtype=torch.float32)
        low = at.long()
        high, part = (low + 1).clamp(max=n - 1), (at - low).view([-1 if d == dim else 1 for d in range(4)])
        low, high = x.index_select(dim, low).float(), x.index_select(dim, high).float()
        x = low + (high - low) * part
    return (x.permute(0, 3, 1, 2) - 128) / 128                                      # (B, 3, size, size), channels last


def resize_torch(img, size=299):
    """torch's bilinear resize without antialiasing, half-pixel centres, on [0, 1], then 2x - 1: pytorch-fid, DC-Gen."""
    return 2 * F.interpolate(img.permute(0, 3, 1, 2) / 255, size=(size, size), mode="bilinear", align_corners=False) - 1


# ---------------------------------------------------------------------------------------------------------------------------
# Feature extractors


@contextmanager
def full_precision(device):
    """fp32 as written, whatever the caller allows: no autocast, TF32 or bf16 matmuls. Its settings come back after."""
    ops = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv]
    before = [op.fp32_precision for op in ops]
    try:
        for op in ops:
            op.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for op, value in zip(ops, before):
            op.fp32_precision = value


class Extractor:
    """Call it on uint8 (B, H, W, 3): (features (B, D), logits (B, K) or None), fp32. .name, .hash and .resize go on record."""

    def __init__(self, net, name, hash, resize, device, inception=False):
        self.net, self.name, self.hash, self.resize, self.device, self.inception = net, name, hash, resize, device, inception

    @torch.no_grad()
    def __call__(self, img):
        if img.dtype != torch.uint8 or img.ndim != 4 or img.shape[3] != 3:
            raise InputError(f"images must be uint8 (B, H, W, 3), not {img.dtype} {tuple(img.shape)}: see ae.to_uint8")
        with full_precision(self.device):
            return self.net(img.to(self.device, non_blocking=True))


class Exported:
    """A torch.export'ed network on uint8 images, (B, H, W, 3) or (B, 3, H, W): its example input tells which. It gives features
    (B, D), or (features, logits). A fixed batch is filled up with copies, which are dropped again."""

    def __init__(self, path, device):
        try:
            program = torch.export.load(path) if zipfile.is_zipfile(path) else None
        except BROKEN:
            program = None
        if program is None:
            raise InputError(f"--features {path}: no readable file of torch.export.save (missing, cut off, or something else)")
        x, *more = [n.meta["val"] for n in program.graph.nodes if n.name in program.graph_signature.user_inputs]
        if more or x.dtype != torch.uint8 or x.ndim != 4 or 3 not in x.shape[1::2]:
            raise InputError(f"--features {path}: export it on one uint8 tensor (B, H, W, 3) or (B, 3, H, W)")
        self.path, self.nhwc = path, x.shape[3] == 3
        shape = [n if isinstance(n, int) else None for n in x.shape]                # None: any
        self.batch, self.size = shape[0], shape[1:3] if self.nhwc else shape[2:4]
        self.run = (program if device.type == "cpu" else torch.export.passes.move_to_device_pass(program, device)).module()

    def __call__(self, img):
        if any(want not in (None, got) for want, got in zip(self.size, img.shape[1:3])):
            raise InputError(f"--features {self.path} takes {show(self.size)} images, not {show(img.shape[1:])}: pass --image_size")
        n, outs = len(img), []
        img = img if self.nhwc else img.permute(0, 3, 1, 2).contiguous()
        for x in img.split(self.batch or n):
            out = self.run(torch.cat([x, x[-1:].repeat((self.batch or len(x)) - len(x), 1, 1, 1)]))
            outs.append(out if isinstance(out, (tuple, list)) else [out])
            if any(o.ndim != 2 for o in outs[-1][:2]):
                raise InputError(f"--features {self.path}: want features (B, D), logits (B, K), not {tuple(outs[-1][0].shape)}")
        features, logits, *_ = *(torch.cat(o)[:n].float() for o in zip(*outs)), None
        return features, logits


def load_extractor(inception="default", features=None, device="cpu", resize="tf"):
    """inception: "default" (the published weights, downloaded once), "random" (seeded) or a file, taken as it is.
    features: a torch.export'ed network in its place, with its own preprocessing."""
    device = torch.device(device)
    if features:
        return Extractor(Exported(features, device), Path(features).stem, file_hash(features), "own", device)
    net, name, digest = InceptionV3(resize), "random features (seed 0)", "seed-0"
    if inception != "random":
        path = fetch_weights() if inception == "default" else Path(inception)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except BROKEN as e:
            raise InputError(f"--inception {path}: no readable weight file (missing, cut off, or something else)") from e
        want = {k: v.shape for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
        if bad := [k for k in want if not isinstance(state, dict) or getattr(state.get(k), "shape", None) != want[k]]:
            raise InputError(f"--inception {path}: {len(bad)} of {len(want)} tensors missing or misshapen, first {bad[0]}")
        net.load_state_dict({k: state[k] for k in want}, strict=False)
        digest = file_hash(path)
        name = "inception-2015-12-05" if digest.startswith(HASH) else f"inception weights {path.name}"
    for m in net.modules():
        if isinstance(m, ConvBN):
            m.fold()
    # On a CPU, folding and channels-last convolutions make the network 1.6 times as fast as pytorch-fid's.
    net.to(device, memory_format=torch.channels_last if device.type == "cpu" else torch.contiguous_format)
    return Extractor(net, name, digest, resize, device, inception != "random")


def fetch_weights():
    """The published file in torch.hub's cache, downloaded if it is not there; its hash is checked every time."""
    path = Path(torch.hub.get_dir(), "checkpoints", URL.split("/")[-1])
    try:
        if not path.is_file():                                  # ranks may do it side by side: each moves a whole file into place
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(path), hash_prefix=HASH, progress=ranks()[0] == 0)
    except (OSError, HTTPException, RuntimeError) as e:         # RuntimeError: the hash is wrong
        raise InputError(f"no Inception weights: {URL} (sha256 {HASH}...): {type(e).__name__}; --inception FILE takes a copy") from e
    if not file_hash(path).startswith(HASH):
        raise InputError(f"{path} is damaged (its sha256 is not {HASH}...): delete it")
    return path


def file_hash(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------------
# Metrics: pure functions of features, logits or pixels


class Moments:
    """Mean and covariance of features in float64 sums, batch by batch; reduce() adds up all ranks."""

    def __init__(self):
        self.n, self.sum, self.outer = 0, None, None

    def update(self, features):                                                     # (B, D)
        x = features.detach().to("cpu" if features.device.type == "mps" else features.device).double()
        if self.sum is None:
            self.sum, self.outer = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
        self.n += len(x)
        self.sum += x.sum(0)
        self.outer.addmm_(x.T, x)

    def reduce(self):
        """Adds up all ranks, in place."""
        if ranks()[1] > 1:
            d = max(gather(0 if self.sum is None else len(self.sum)))
            if self.sum is None:                                # a rank without images
                self.update(torch.zeros(0, d, device="cuda" if dist.get_backend() == "nccl" else "cpu"))
            dist.all_reduce(self.sum)
            dist.all_reduce(self.outer)
            self.n = sum(gather(self.n))

    @property
    def mean(self):
        return self.sum / self.n

    @property
    def cov(self):
        if self.n < 2:
            raise InputError("one image has no covariance: statistics need at least 2, thousands to mean much")
        return (self.outer - torch.outer(self.sum, self.sum) / self.n) / (self.n - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Frechet distance of two Gaussians, float64; arrays or tensors, mu (D,), sigma (D, D)."""
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a).detach().cpu().double() for a in (mu1, sigma1, mu2, sigma2))
    if not mu1.shape == mu2.shape == sigma1.shape[:1] == sigma2.shape[:1]:
        raise InputError(f"statistics of {len(mu1)} and {len(mu2)} features come from different networks: no distance between them")
    if not all(a.isfinite().all() for a in (mu1, sigma1, mu2, sigma2)):
        raise InputError("features are not finite: no distance")
    # |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1^.5 S2 S1^.5)^.5): a symmetric matrix has real eigenvalues, so nothing turns
    # complex when N <= D or samples collapse, as scipy's sqrtm(S1 S2) does; rounding below zero is clipped.
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ sigma2 @ root
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return max(0.0, ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace).item())


def inception_score(logits, splits=10):
    """(mean, std) over splits of exp(mean KL(p(y|x) || p(y))), float64, shuffled by RandomState(2020): samples often come
    sorted by class. The convention is torch-fidelity's; fewer images than splits make one split."""
    order = torch.from_numpy(np.random.RandomState(2020).permutation(len(logits)))
    logits = logits.detach().cpu()[order]
    n, scores = len(logits), []
    splits = splits if n >= splits else 1
    for i in range(splits):
        log_p = logits[i * n // splits:(i + 1) * n // splits].double().log_softmax(1)    # (n / splits, K)
        log_q = log_p.logsumexp(0) - math.log(len(log_p))       # log of the mean: never log(0)
        scores.append((log_p.exp() * (log_p - log_q)).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real, fake, k=3, rows=None):
    """Improved precision and recall (Kynkaanniemi et al. 2019) -> (share of fake inside the real manifold, share of real inside
    the fake one); a manifold is the union of balls around its points out to the k-th neighbour, the point itself not counted.
    Distances in float64 (ADM: fp16), `rows` rows at a time: 50k x 50k needs 2 GB, not 20."""
    if min(len(real), len(fake)) <= k:
        raise InputError(f"precision and recall need more than k = {k} images on each side, got {len(real)} and {len(fake)}")
    real, fake = real.double(), fake.double()
    rows = rows or max(1, 2 ** 27 // max(len(real), len(fake)))                     # 1 GiB of distances

    def chunks(a, b):
        norm_a, norm_b = a.square().sum(1), b.square().sum(1)
        for i in range(0, len(a), rows):
            scale = norm_a[i:i + rows, None] + norm_b
            d = torch.addmm(scale, a[i:i + rows], b.T, alpha=-2)                    # (rows, len(b)) squared distances
            # Below fp32's rounding of the features (1e-5 of their length) two images are one: exact for duplicates.
            yield i, d.masked_fill_(d < 1e-10 * scale, 0)

    def radius(a):
        return torch.cat([d.kthvalue(k + 1, dim=1).values for _, d in chunks(a, a)])    # + 1: the point itself comes first

    radius_real, radius_fake = radius(real), radius(fake)
    inside_real, inside_fake = [], real.new_zeros(len(real), dtype=torch.bool)
    for i, d in chunks(fake, real):
        inside_real.append((d <= radius_real).any(1))
        inside_fake |= (d <= radius_fake[i:i + rows, None]).any(0)
    return torch.cat(inside_real).double().mean().item(), inside_fake.double().mean().item()


def psnr(a, b):
    """uint8 (B, H, W, 3) twice -> (B,): 10 log10(255^2 / mse) of each image over pixels and channels; inf for equal images.
    The published evaluation takes it so, on uint8, and averages over images."""
    mse = (a.float() - b.float()).square().mean((1, 2, 3))      # exact to 1e-7: differences are whole numbers
    return 10 * torch.log10(255 ** 2 / mse)


def ssim(a, b):
    """uint8 (B, H, W, 3) twice -> (B,): SSIM with an 11 x 11 Gaussian window, sigma 1.5, K1 = 0.01, K2 = 0.03, range 255, of
    each RGB channel where the window fits, averaged: torchmetrics with data_range=(0, 255) as in the published evaluation, and
    scikit-image with gaussian_weights=True, use_sample_covariance=False, data_range=255."""
    if min(a.shape[1:3]) < 11:
        raise InputError(f"SSIM's window is 11 pixels wide, the images are {a.shape[1]}x{a.shape[2]}: leave ssim out of --metrics")
    x, y = (v.permute(0, 3, 1, 2).float() - 128 for v in (a, b))                    # around grey: float32 then has the digits
    window = torch.exp(-(torch.arange(11, device=x.device) - 5) ** 2 / (2 * 1.5 ** 2))
    maps = torch.stack([x, y, x * x, y * y, x * y])                                 # (5, B, 3, H, W)
    rows = (window / window.sum()).expand(maps[..., 0, 0].numel(), 1, 1, 11).contiguous()
    with full_precision(x.device):                              # one depthwise convolution: 5 times as fast as single channels
        flat = F.conv2d(maps.flatten(0, 2), rows, groups=len(rows))
        maps = F.conv2d(flat, rows.mT.contiguous(), groups=len(rows)).unflatten(0, maps.shape[:3])
    mx, my, xx, yy, xy = maps                                                       # (B, 3, H - 10, W - 10)
    vx, vy, cov = xx - mx * mx, yy - my * my, xy - mx * my
    mx, my, c1, c2 = mx + 128, my + 128, (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean((1, 2, 3))


# ---------------------------------------------------------------------------------------------------------------------------
# Images and reference statistics


def ranks():
    """(rank, number of ranks): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gather(thing):
    """[the thing of rank 0, of rank 1, ...], on every rank."""
    things = [thing] * ranks()[1]
    if len(things) > 1:
        dist.all_gather_object(things, thing)
    return things


def show(size):
    return "x".join(str(n) for n in size[:2])                                       # height x width


class Images(torch.utils.data.Dataset):
    """n uint8 images of one size: a folder (nested or flat, sorted by path), the arr_0 of an .npz, or "toy". num takes so many
    of them, evenly spaced, so that class folders keep all their classes; image_size is the ADM centre crop of each."""

    def __init__(self, path, num=None, image_size=None):
        self.path, self.image_size, self.size, self.stats = str(path), image_size, None, None
        if self.path == "toy":
            self.kind, self.data = "toy", open_images("toy", image_size or 32)
        elif os.path.isdir(path):
            self.kind, files = "folder", Path(path).rglob("*")
            self.data = sorted(str(p) for p in files if p.suffix.lower() in SUFFIXES and p.name[0] != ".")
        else:
            self.kind, self.data = "npz", npz_pixels(path)
        total = len(self.data) if self.kind != "toy" else num or 10_000
        if not total or num is not None and not 1 <= num <= total:
            raise InputError(f"{path}: {total} images in there" + (f", --num {num} asked for" if num is not None else ""))
        self.n = num or total
        self.indices = [i * total // self.n for i in range(self.n)]
        self.size = tuple(self.read(range(1)).shape[1:3])       # (H, W) of the first image: all must have it

    def read(self, span):                                                           # -> uint8 (B, H, W, 3)
        indices, images = [self.indices[i] for i in span], []
        if self.kind == "toy":
            return to_uint8(self.data.get_batch(indices, indices)[0])
        for i in indices:
            name = self.data[i] if self.kind == "folder" else f"{self.path} [{i}]"
            try:
                img = read_image(name) if self.kind == "folder" else PIL.Image.fromarray(self.data[i])
                images.append(np.array(center_crop(img, self.image_size) if self.image_size else img))
            except UNREADABLE as e:
                raise InputError(f"{name}: not a readable image ({type(e).__name__}): repair or remove it") from e
            if self.size not in (None, images[-1].shape[:2]):
                raise InputError(f"mixed sizes, {name} is {show(images[-1].shape)}, the first {show(self.size)}: pass --image_size S")
        return torch.from_numpy(np.stack(images))

    def __getitem__(self, span):                                # in the loader's processes, where an exit would go unheard
        try:
            return self.read(span)
        except InputError as e:
            return str(e)


def read_batches(path, batch=64, num=None, image_size=None, workers=0):
    """uint8 (B, H, W, 3) batches of a folder, .npz or "toy" (or Images), in order; under torchrun this rank's slice."""
    images, (rank, size) = path if isinstance(path, Images) else Images(path, num, image_size), ranks()
    stop = (rank + 1) * images.n // size
    spans = [range(i, min(i + batch, stop)) for i in range(rank * images.n // size, stop, batch)]
    for img in torch.utils.data.DataLoader(images, batch_size=None, sampler=spans, pin_memory=torch.cuda.is_available(),
                                           num_workers=min(workers, len(spans) // 2) if images.kind == "folder" else 0):
        if isinstance(img, str):
            raise InputError(img)
        yield img


def npz_pixels(path):
    """The arr_0 of an .npz, uint8 (N, H, W, 3): np.savez stores it uncompressed, so it is mapped, not read: 50,000 are GBs."""
    try:
        with zipfile.ZipFile(path) as z, z.open("arr_0.npy") as f:
            info, (version, _), npy = z.getinfo("arr_0.npy"), np.lib.format.read_magic(f), np.lib.format
            shape, fortran, dtype = (npy.read_array_header_1_0 if version == 1 else npy.read_array_header_2_0)(f)
            start = f.tell()
        with open(path, "rb") as f:                             # before the data: zip's local header (30 bytes, name, extra), npy's
            f.seek(info.header_offset + 26)
            start += info.header_offset + 30 + sum(np.frombuffer(f.read(4), "<u2").tolist())
        stored = info.compress_type == zipfile.ZIP_STORED and dtype == np.uint8
        array = np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C") if stored else np.load(path)["arr_0"]
    except BROKEN as e:
        raise InputError(f"{path}: want a folder of images, toy, or an .npz with arr_0 (uint8 NHWC) or mu and sigma "
                         f"({type(e).__name__}: missing, cut off, or something else)") from e
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise InputError(f"{path}: arr_0 is {array.dtype} {array.shape}; want uint8 (N, H, W, 3), rounded and clipped to 0..255")
    return array


def open_side(path, num=None, image_size=None):
    """-> Images, or the statistics of an .npz with mu and sigma: path, kind, n, size, hash, mu, sigma, meta (how they were made,
    in our files) and no features. ADM's files hold both: Images, the statistics as its .stats."""
    data = {}
    try:
        if zipfile.is_zipfile(path):
            with np.load(path) as file:
                data = {k: file[k] for k in ("mu", "sigma", "meta") if k in file}
                more = "arr_0" in file
    except BROKEN as e:
        raise InputError(f"{path}: cannot be read ({type(e).__name__}: cut off, or something else)") from e
    if not {"mu", "sigma"} <= set(data):
        return Images(path, num, image_size)
    mu, sigma, meta = data["mu"], data["sigma"], json.loads(str(data.get("meta", "{}")))
    if mu.ndim != 1 or sigma.shape != mu.shape * 2 or mu.dtype.kind != "f" or not np.isfinite(sigma).all():
        raise InputError(f"{path}: want finite mu (D,) and sigma (D, D), not {mu.dtype} {mu.shape} and {sigma.shape}")
    stats = SimpleNamespace(path=str(path), kind="statistics", n=meta.get("n"), size=meta.get("size"), meta=meta, features=None,
                            logits=None, mu=torch.from_numpy(mu), sigma=torch.from_numpy(sigma),
                            hash=hashlib.sha256(mu.tobytes() + sigma.tobytes()).hexdigest()[:16])
    if more:
        images = Images(path, num, image_size)
        images.stats = stats
    return images if more else stats


# ---------------------------------------------------------------------------------------------------------------------------
# Scores


def collect(batches, extractor, metrics=METRICS, total=None, path="samples", kind="stream"):
    """Batches of uint8 (B, H, W, 3), from a folder or straight from a sampler, through the network -> statistics (see open_side),
    with the (N, D) features and (N, K) logits that the metrics need. Under torchrun each rank gives its own batches and gets the
    statistics of all. The hash, a sum of CRC-32s, does not depend on the order."""
    moments, features, logits, sizes, digest = Moments(), [], [], set(), 0
    with tqdm(total=total and total // ranks()[1], desc=path[-30:], unit="img", disable=ranks()[0] > 0) as bar:
        for img in batches:
            f, l = extractor(img)
            moments.update(f)
            sizes.add(tuple(img.shape[1:3]))
            digest += sum(zlib.crc32(x) for x in img.cpu().numpy())                 # while a GPU works; the next lines wait for it
            if {"precision", "recall"} & set(metrics):
                features.append(f.cpu())
            if "is" in metrics and l is not None:
                logits.append(l.cpu())
            bar.update(len(img))
    parts = gather([torch.cat(x) if x else None for x in (features, logits)] + [sizes, digest])
    features, logits = [torch.cat(x) if (x := [p[i] for p in parts if p[i] is not None]) else None for i in (0, 1)]
    sizes = sorted(set().union(*(p[2] for p in parts)))
    if len(sizes) != 1:
        raise InputError(f"{path}: images of {len(sizes)} sizes {' '.join(map(show, sizes[:3]))}: one is wanted")
    moments.reduce()
    return SimpleNamespace(path=path, kind=kind, n=moments.n, size=sizes[0], mu=moments.mean, sigma=moments.cov, meta=None,
                           features=features, logits=logits, hash=f"{sum(p[3] for p in parts):016x}")


def measure(side, extractor, metrics=METRICS, batch=64, workers=0):
    """Statistics of what open_side has opened, with all that the metrics need."""
    if not isinstance(side, Images) or side.stats and not {"is", "precision", "recall"} & set(metrics):
        return getattr(side, "stats", side)
    stats = collect(read_batches(side, batch, workers=workers), extractor, metrics, side.n, side.path, side.kind)
    if side.stats:      # ADM's files: mu and sigma are of the whole training set, arr_0 has 10,000 images for precision and recall
        stats = SimpleNamespace(**{**vars(side.stats), "features": stats.features, "logits": stats.logits, "size": stats.size})
    return stats


def guard(samples, reference, allow_small):
    """Refuses what cannot be compared, as far as n and size are known."""
    if samples.size and reference.size and tuple(samples.size) != tuple(reference.size):
        raise InputError(f"{samples.path} is {show(samples.size)}, {reference.path} {show(reference.size)}: scores need equal sizes "
                         "(--image_size S crops images)")
    for side in (samples, reference):
        if side.n is not None and side.n < MIN_IMAGES and not allow_small:
            raise InputError(f"{side.path}: {side.n} images; scores are biased below {MIN_IMAGES}: add images, or pass --allow_small")


def compare(samples, reference, extractor, metrics=METRICS, allow_small=False):
    """Two statistics -> dict of scores (None where they cannot be had: the notes say why) and of what they depend on."""
    guard(samples, reference, allow_small)
    out, notes = dict.fromkeys(("fid", "is", "is_std", "precision", "recall")), []
    for side in (samples, reference):
        if side.meta and (side.meta["features_hash"], side.meta["resize"]) != (extractor.hash, extractor.resize):
            raise InputError(f"{side.path} was made with {side.meta['features']}, --resize {side.meta['resize']}: not comparable with "
                             f"{extractor.name}, --resize {extractor.resize}")
        if side.meta == {}:
            notes.append(f"{side.path} does not say its count, resize and network: make sure that they fit")
    if "fid" in metrics:
        out["fid"] = frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma)
        if samples.n and samples.n <= len(samples.mu):
            notes.append(f"{samples.n} images, {len(samples.mu)} features: the covariance is singular, the distance biased upwards")
        if samples.sigma.trace() <= 1e-9 * samples.mu.square().sum():
            notes.append("the samples are all alike (constant images?)")
    if samples.hash == reference.hash:
        notes.append("samples and reference are identical")
    if "is" in metrics and samples.logits is not None:
        out["is"], out["is_std"] = inception_score(samples.logits)
    elif "is" in metrics:
        notes.append("no logits of the samples: no score of them")
    if {"precision", "recall"} & set(metrics):
        device = "cuda" if extractor.device.type == "cuda" else "cpu"               # float64, which mps has not
        if min(0 if side.features is None else len(side.features) for side in (samples, reference)) > 3:
            out["precision"], out["recall"] = precision_recall(*(side.features.to(device) for side in (reference, samples)))
        else:
            notes.append("precision and recall need images on both sides, more than 3")
    count = "?" if samples.n is None else f"{samples.n // 1000}k" if samples.n % 1000 == 0 else samples.n
    return dict(out, name=f"FID-{count}" if extractor.inception else f"Frechet distance of {extractor.name}, {count} images",
                n=samples.n, n_reference=reference.n, samples=samples.path, samples_hash=samples.hash, reference=reference.path,
                reference_kind=reference.kind, reference_hash=reference.hash, image_size=samples.size or reference.size,
                features=extractor.name, features_hash=extractor.hash, resize=extractor.resize, notes=notes)


def score(batches, reference, extractor, metrics=METRICS[:4], allow_small=False, total=None):
    """Scores uint8 (B, H, W, 3) batches as a sampler makes them: FID-50k without a disk. reference: a path, or the statistics
    of collect or measure, which can serve again."""
    if isinstance(reference, (str, Path)):
        reference = measure(open_side(str(reference)), extractor, metrics)
    return compare(collect(batches, extractor, metrics, total), reference, extractor, metrics, allow_small)


def paired(samples, reference, metrics, batch, workers):
    """Mean PSNR and SSIM of two Images, the i-th against the i-th."""
    if not all(isinstance(s, Images) for s in (samples, reference)) or (samples.n, samples.size) != (reference.n, reference.size):
        raise InputError("psnr and ssim compare image with image: both sides must be images, equally many and of one size")
    sums = dict.fromkeys(metrics, 0)
    for a, b in zip(*(read_batches(side, batch, workers=workers) for side in (samples, reference))):
        sums = {m: sums[m] + {"psnr": psnr, "ssim": ssim}[m](a, b).double().sum().item() for m in metrics}
    return {m: sum(part[m] for part in gather(sums)) / samples.n for m in metrics}


def main(argv=None):
    p, start = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="fid.py SAMPLES REFERENCE [flags], or fid.py REFERENCE --save_stats FILE.npz; --help"), time.time()
    a = p.add_argument
    a("samples", help="folder of images (nested or flat), .npz of uint8 NHWC (arr_0) or of mu and sigma, or toy")
    a("reference", nargs="?", help="the same")
    a("--metrics", default=",".join(METRICS[:4]), help="some of " + ",".join(METRICS) + "; psnr and ssim: image by image")
    a("--inception", default="default", help="default: the published weights; random: seeded, no download; or a file of weights")
    a("--features", metavar="FILE.pt2", help="another network, of torch.export, on uint8 images (B,H,W,3) or (B,3,H,W)")
    a("--resize", choices=("tf", "torch"), default="tf", help="to 299 px: tf as ADM and torch-fidelity, torch as pytorch-fid")
    a("--image_size", type=int, metavar="S", help="ADM centre crop of the images to S; without it pixels are taken as they are")
    a("--num", type=int, metavar="N", help="score N samples, evenly spaced; the reference stays whole (toy: N too)")
    a("--allow_small", action="store_true", help=f"score fewer than {MIN_IMAGES} images")
    a("--save_stats", metavar="FILE.npz", help="write mu and sigma of the reference")
    a("--json", nargs="?", const="", metavar="FILE", help="print the JSON line only; with FILE, write it there too")
    a("--batch_size", type=int, default=64, help="images through the network at a time")
    a("--workers", type=int, default=min(8, os.cpu_count()), help="processes that decode images")
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the network runs (cuda where there is one)")
    args = p.parse_args(argv)
    metrics, two = args.metrics.split(","), args.reference is not None
    if set(metrics) - set(METRICS):
        raise InputError(f"--metrics {args.metrics}: some of {','.join(METRICS)}")
    if not two and not args.save_stats or args.save_stats and not args.save_stats.endswith(".npz"):
        raise InputError("want fid.py SAMPLES REFERENCE, or fid.py REFERENCE --save_stats FILE.npz")
    if min(args.batch_size, 1 if args.image_size is None else args.image_size) < 1 or args.workers < 0:
        raise InputError("--batch_size and --image_size must be positive, --workers not negative")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    say = print if ranks()[0] == 0 and args.json is None else lambda line: None

    paths = {"samples": args.samples, "reference": args.reference} if two else {"reference": args.samples}
    sides, stats, result, notes = {}, {}, {}, []
    for role in sorted(paths, key=lambda role: paths[role] == "toy"):               # toy comes last and takes after the other
        toy, other = paths[role] == "toy", next(iter(sides.values()), SimpleNamespace(n=None, size=None))
        num, size = args.num if toy or role == "samples" or not two else None, args.image_size
        if toy:
            num, size = other.n if num is None else num, size or (other.size and other.size[0])
        side = sides[role] = open_side(paths[role], num, size)
        say(f"{role}: {side.path}, {side.n or '?'} images, {show(side.size or '??')} ({side.kind})")
        if role == "samples" and side.kind == "folder" and side.data[0].lower().endswith((".jpg", ".jpeg")):
            notes.append("the samples are JPEGs, whose artefacts count: PNG and npz keep samples as they are")
    pairs = [m for m in ("psnr", "ssim") if m in metrics and two]
    if set(metrics) - set(pairs) or args.save_stats:
        if two:
            guard(sides["samples"], sides["reference"], args.allow_small)           # before the work
        extractor = load_extractor(args.inception, args.features, args.device, args.resize)
        say(f"features: {extractor.name} ({extractor.hash}), resize {extractor.resize}, fp32")
        for role, side in sides.items():
            needed = set(metrics) - ({"is"} if role == "reference" else set()) if two else ()
            stats[role] = measure(side, extractor, needed, args.batch_size, args.workers)
        if args.save_stats and ranks()[0] == 0:
            ref, temporary = stats["reference"], args.save_stats + ".tmp.npz"
            result = dict(n=ref.n, size=ref.size, hash=ref.hash, features=extractor.name, features_hash=extractor.hash,
                          resize=extractor.resize)
            np.savez(temporary, mu=ref.mu.cpu().numpy(), sigma=ref.sigma.cpu().numpy(), meta=json.dumps(result))
            os.replace(temporary, args.save_stats)
            say(f"statistics of {ref.n} images -> {args.save_stats}")
        if two:
            result = compare(stats["samples"], stats["reference"], extractor, metrics, args.allow_small)
    if pairs:
        result.update(paired(sides["samples"], sides["reference"], pairs, args.batch_size, args.workers))
    names = (result.get("name"), "Inception Score", "precision", "recall", "PSNR", "SSIM")
    for m, name in zip(METRICS, names):
        if result.get(m) is not None:
            of = f"{extractor.name}: " if m in METRICS[1:4] and not extractor.inception else ""
            say(f"{of}{name} {result[m]:.4f}" + (f" +- {result['is_std']:.4f}" if m == "is" else ""))
            result[m] = None if result[m] == math.inf else result[m]                # PSNR of equal images; JSON has no infinity
    result["notes"] = notes = result.get("notes", []) + notes
    for note in notes:
        say(f"note: {note}")
    result.update(seconds=round(time.time() - start, 1), versions={
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__})
    if ranks()[0] == 0:
        if args.json:
            Path(args.json).write_text(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)
    if ranks()[1] > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
