"""FID, Inception Score, precision, recall, PSNR and SSIM: numbers that can be compared with the literature's.

  python fid.py samples.npz VIRTUAL_imagenet512.npz                         # FID-50k as ADM's evaluator
  python fid.py imagenet/train --image_size 512 --save_stats train512.npz   # a reference, once
  torchrun --nproc_per_node 8 fid.py samples/ train512.npz                  # the same number on 8 GPUs
  python fid.py rec/ val/ --image_size 512 --metrics fid,psnr,ssim          # rFID: both through one crop

Inception with the TensorFlow-ported weights (URL, HASH) in fp32; pixels are uint8 RGB, taken as they are:
only --image_size crops. tests/test_fid.py holds it, weights and images being equal, to torch-fidelity (ADM's
preprocessing, the default) and pytorch-fid (--resize torch): features to 1e-4 relative, metrics to 1e-3.

Letters: B images of H x W pixels at a time, N in all; D features and K logits of each.
"""
import argparse
import hashlib
import io
import json
import logging
import math
import os
import platform
import re
import time
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.export.passes
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from ae import (Flags, InputError, Unreadable, center_crop, check_device, evenly_spaced, holds_images,
                left_out, list_images, open_images, patiently, read_image, read_weights, script, to_uint8,
                within, writing)

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")
HASH = "6726825d"                   # the file's sha256 begins so, as torch.hub names files
MIN_IMAGES = 2049                   # fewer leave the covariance of Inception's D = 2048 features singular
METRICS = ("fid", "is", "precision", "recall", "psnr", "ssim")


# ----------------------------------------------------------------------------------------------------------
# What all parts use: ranks, sizes as text, precision


def rank_and_world():
    """(rank, number of ranks): (0, 1) without torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(thing):
    """[the thing of rank 0, of rank 1, ...], on every rank."""
    things = [thing] * rank_and_world()[1]
    if len(things) > 1:
        dist.all_gather_object(things, thing)
    return things


def gather_rows(parts):
    """A list of (B, D) tensors on each rank -> the rows of all ranks, (N, D), or None if there are none."""
    parts = sum(gather(parts), [])
    if not parts:
        return None
    return torch.cat(parts)


def hxw(size):
    return f"{size[0]}x{size[1]}" if size else "?x?"


@contextmanager
def full_precision(device):
    """fp32 as written, whatever the caller allows: no autocast, TF32, bf16. The settings come back after."""
    ops = (torch.backends.cuda.matmul, torch.backends.cudnn.conv,
           torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)
    before = [op.fp32_precision for op in ops]
    try:
        for op in ops:
            op.fp32_precision = "ieee"
        with torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False):
            yield
    finally:
        for op, value in zip(ops, before):
            op.fp32_precision = value


# ----------------------------------------------------------------------------------------------------------
# Metrics: pure functions of features, logits or pixels


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Frechet distance of two Gaussians, float64; of Inception features it is the FID [Heusel et al. 2017].

    mu (D,), sigma (D, D): arrays or tensors. InputError where D differs or a number is not finite.
    """
    given = (mu1, sigma1, mu2, sigma2)
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x).detach().cpu().double() for x in given)
    if not mu1.shape == mu2.shape == sigma1.shape[:1] == sigma2.shape[:1]:
        raise InputError(f"statistics of {len(mu1)} and {len(mu2)} features come from different networks: "
                         "no distance between them")
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace()
    if not (distance + (sigma1 @ sigma2).sum()).isfinite():
        raise InputError("features are not finite, or too large for numbers of 64 bits: no distance")

    # tr((S1 S2)^.5) as tr((S1^.5 S2 S1^.5)^.5): a symmetric matrix has real eigenvalues, so nothing turns
    # complex when N <= D or samples collapse, as scipy's sqrtm(S1 S2) does; rounding below zero is clipped.
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ sigma2 @ root
    values = torch.linalg.eigvalsh((product + product.T) / 2)
    distance -= 2 * values.clamp(min=0).sqrt().sum()            # |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr(...)
    return max(0.0, distance.item())


def inception_score(logits, splits=10):
    """logits (N, K) -> (mean, std) over splits of exp(mean KL(p(y|x) || p(y))) [Salimans et al. 2016].

    Shuffled by RandomState(2020), as torch-fidelity does: samples often come sorted by class. Fewer images
    than splits make one split.
    """
    n = len(logits)
    order = np.random.RandomState(2020).permutation(n)
    logits = logits.cpu()[order]
    if n < splits:
        splits = 1
    scores = []
    for i in range(splits):
        part = logits[i * n // splits:(i + 1) * n // splits]
        log_p = part.double().log_softmax(1)                    # (n / splits, K)
        log_q = log_p.logsumexp(0) - math.log(len(log_p))       # log of the mean: never log(0)
        kl = (log_p.exp() * (log_p - log_q)).sum(1)
        scores.append(kl.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real, fake, k=3, rows=None):
    """Improved precision and recall [Kynkaanniemi et al. 2019]: features of real (N, D) and of fake (M, D)
    -> (share of fake inside the real manifold, share of real inside the fake one).

    A manifold is the union of balls around its points out to the k-th neighbour, the point itself excluded.
    Distances in float64 (ADM: fp16), `rows` rows at a time: 50k x 50k needs 2 GB, not 20. InputError for
    k images or fewer.
    """
    if min(len(real), len(fake)) <= k:
        raise InputError(f"precision and recall need more than k = {k} images on each side, "
                         f"got {len(real)} and {len(fake)}")
    real = real.double()
    fake = fake.double()
    rows = rows or max(1, 2 ** 27 // max(len(real), len(fake)))         # 1 GiB of distances

    def distances(a, b):                                        # (rows, len(b)) at a time, squared
        norm_a = a.square().sum(1)
        norm_b = b.square().sum(1)
        for i in range(0, len(a), rows):
            scale = norm_a[i:i + rows, None] + norm_b
            d = torch.addmm(scale, a[i:i + rows], b.T, alpha=-2)
            # Images closer than fp32's rounding of features (1e-5 of their length) count as one
            yield d.masked_fill_(d < 1e-10 * scale, 0)

    def share_inside(points, manifold):
        near = [d.kthvalue(k + 1, dim=1).values for d in distances(manifold, manifold)]     # + 1: itself
        radius = torch.cat(near)                                # (len(manifold),), squared
        inside = [(d <= radius).any(1) for d in distances(points, manifold)]
        return torch.cat(inside).double().mean().item()

    return share_inside(fake, real), share_inside(real, fake)


def psnr(a, b):
    """uint8 (B, H, W, 3) twice -> (B,) dB: 10 log10(255^2 / mse) of each image, over pixels and channels; inf
    for equal images. The published evaluation takes it so, on uint8, and averages over images."""
    mse = (a.float() - b.float()).square().mean((1, 2, 3))      # exact to 1e-7: differences are whole numbers
    return 10 * torch.log10(255 ** 2 / mse)


def ssim(a, b):
    """uint8 (B, H, W, 3) twice -> (B,): SSIM [Wang et al. 2004] with an 11 x 11 Gaussian window, sigma 1.5,
    K1 = 0.01, K2 = 0.03, range 255, of each RGB channel where the window fits, averaged.

    As torchmetrics with data_range=(0, 255), which the published evaluation uses, and scikit-image with
    gaussian_weights=True, use_sample_covariance=False, data_range=255. InputError below 11 pixels.
    """
    if min(a.shape[1:3]) < 11:
        raise InputError(f"SSIM's window is 11 pixels wide, the images are {hxw(a.shape[1:])}: "
                         "leave ssim out of --metrics")
    x, y = (pixels.permute(0, 3, 1, 2).float() - 128 for pixels in (a, b))      # around grey: more digits
    maps = torch.stack([x, y, x * x, y * y, x * y])             # (5, B, 3, H, W)

    # Local means: one depthwise convolution over rows, one over columns, 5 times as fast as single channels
    window = torch.exp(-(torch.arange(11, device=x.device) - 5) ** 2 / (2 * 1.5 ** 2))
    planes = maps.flatten(0, 2)                                 # (15 B, H, W)
    across = (window / window.sum()).expand(len(planes), 1, 1, 11).contiguous()
    with full_precision(x.device):
        planes = F.conv2d(planes, across, groups=len(planes))
        planes = F.conv2d(planes, across.mT.contiguous(), groups=len(planes))
    mx, my, xx, yy, xy = planes.unflatten(0, maps.shape[:3])    # (B, 3, H - 10, W - 10) each

    vx = xx - mx * mx
    vy = yy - my * my
    cov = xy - mx * my
    mx = mx + 128
    my = my + 128
    c1 = (0.01 * 255) ** 2
    c2 = (0.03 * 255) ** 2
    # (2 mx my + c1) (2 cov + c2) / ((mx^2 + my^2 + c1) (vx + vy + c2))
    score = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return score.mean((1, 2, 3))


class Moments:
    """Mean (D,) and unbiased covariance (D, D) of features, in float64 sums, batch by batch."""
    n = total = outer = 0

    def update(self, features):                                 # (B, D)
        device = "cpu" if features.device.type == "mps" else features.device    # mps has no float64
        x = features.detach().to(device).double()
        self.n += len(x)
        self.total = self.total + x.sum(0)
        self.outer = self.outer + x.T @ x

    def reduce(self):
        """Adds up all ranks, in place; a rank without images adds 0."""
        mine = self.n, torch.as_tensor(self.total).cpu(), torch.as_tensor(self.outer).cpu()
        self.n, self.total, self.outer = (sum(parts) for parts in zip(*gather(mine)))

    @property
    def mean(self):
        return self.total / self.n

    @property
    def cov(self):
        if self.n < 2:
            raise InputError("one image has no covariance: "
                             "statistics need at least 2, thousands to mean much")
        return (self.outer - torch.outer(self.total, self.total) / self.n) / (self.n - 1)


# ----------------------------------------------------------------------------------------------------------
# Inception. Module names are the tensor names of the published file; widths and kernels: Szegedy et al. 2015.


class ConvBN(nn.Sequential):
    def __init__(self, c_in, c_out, kernel=1, stride=1, padding="same"):
        super().__init__()
        if stride > 1:
            padding = 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)
        self.relu = nn.ReLU(inplace=True)


# The pools beside the branches: the first as torchvision, the others not
POOL_STRIDE = nn.MaxPool2d(3, 2)
POOL_AVERAGE = nn.AvgPool2d(3, 1, 1, count_include_pad=False)   # TF: padding is not in the mean
POOL_MAX = nn.MaxPool2d(3, 1, 1)                                # the graph of 2015; the paper says average


class Mixed(nn.Module):
    """Branches side by side on one input, concatenated; the last is a pool, with a 1x1 convolution if c_pool.

    A branch is a chain of (channels, kernel[, stride]): its convolutions are called name_1, name_2, ..., or
    just name when alone; a dict as the last link forks, into name_2a and name_2b.
    """

    def __init__(self, c_in, branches, pool, c_pool=None):
        super().__init__()
        self.pool = pool
        self.chains = []                                        # per branch its links, per link its names
        for branch, chain in branches.items():
            c = c_in
            links = []
            for i, link in enumerate(chain, 1):
                name = f"{branch}_{i}" if len(chain) > 1 else branch
                forks = link if isinstance(link, dict) else {"": link}
                for letter, (c_out, *kernel) in forks.items():
                    self.add_module(name + letter, ConvBN(c, c_out, *kernel))
                c = c_out
                links.append([name + letter for letter in forks])
            self.chains.append(links)
        self.branch_pool = ConvBN(c_in, c_pool) if c_pool else nn.Identity()

    def forward(self, x):                                       # (B, c, h, w)
        out = []
        for links in self.chains:
            hs = [x]
            for names in links:
                hs = [getattr(self, name)(hs[0]) for name in names]
            out += hs
        return torch.cat([*out, self.branch_pool(self.pool(x))], 1)


class InceptionV3(nn.Module):
    """uint8 (B, H, W, 3) -> (pool features (B, 2048), logits without their bias (B, 1008)), fp32, in eval.

    resize: "tf" or "torch". Its weights are random (He's, from seed) until others are loaded.
    """

    def __init__(self, resize="tf", seed=0):
        super().__init__()
        self.resize = {"tf": resize_tf, "torch": resize_torch}[resize]
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)                                              # 147 x 147
        self.pool_2 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = ConvBN(64, 80)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, padding=0)                                  # 71 x 71
        self.pool_4 = nn.MaxPool2d(3, 2)
        for name, c_in, c_pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):      # 35 x 35
            self.add_module(f"Mixed_{name}", Mixed(c_in, {
                "branch1x1": [(64, 1)],
                "branch5x5": [(48, 1), (64, 5)],
                "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
            }, POOL_AVERAGE, c_pool))
        self.Mixed_6a = Mixed(288, {
            "branch3x3": [(384, 3, 2)],
            "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)],
        }, POOL_STRIDE)
        for name, k in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):                # 17 x 17
            self.add_module(f"Mixed_{name}", Mixed(768, {
                "branch1x1": [(192, 1)],
                "branch7x7": [(k, 1), (k, (1, 7)), (192, (7, 1))],
                "branch7x7dbl": [(k, 1), (k, (7, 1)), (k, (1, 7)), (k, (7, 1)), (192, (1, 7))],
            }, POOL_AVERAGE, 192))
        self.Mixed_7a = Mixed(768, {
            "branch3x3": [(192, 1), (320, 3, 2)],
            "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)],
        }, POOL_STRIDE)
        fork = {"a": (384, (1, 3)), "b": (384, (3, 1))}
        for name, c_in, pool in (("7b", 1280, POOL_AVERAGE), ("7c", 2048, POOL_MAX)):       # 8 x 8
            self.add_module(f"Mixed_{name}", Mixed(c_in, {
                "branch1x1": [(320, 1)],
                "branch3x3": [(384, 1), fork],
                "branch3x3dbl": [(448, 1), (384, 3), fork],
            }, pool, 192))
        self.fc = nn.Linear(2048, 1008)                         # not 1000: the graph has 8 unused classes

        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, generator=generator)
        nn.init.normal_(self.fc.weight, generator=generator)    # [ours] wide: random logits differ by about 1
        nn.init.zeros_(self.fc.bias)
        self.eval().requires_grad_(False)

    def forward(self, pixels):                                  # uint8 (B, H, W, 3)
        x = self.resize(pixels)                                 # (B, 3, 299, 299) in [-1, 1]
        *layers, fc = self.children()                           # in the order of __init__
        for layer in layers:
            x = layer(x)
        x = x.mean((2, 3))                                      # (B, 2048)
        return x, x @ fc.weight.T                               # without the bias, as the literature's score


def resize_tf(pixels, side=299):
    """uint8 (B, H, W, 3) -> (B, 3, side, side): TensorFlow 1's bilinear resize without antialiasing, then
    (x - 128) / 128, as ADM's evaluator and torch-fidelity. Its grid is the legacy one: no half-pixel shift,
    output i reads input i * (in / out)."""
    x = pixels
    for dim, shape in ((2, (-1, 1)), (1, (-1, 1, 1))):          # columns, then rows: TF's order
        n = x.shape[dim]
        scale = torch.tensor(n / side, dtype=torch.float32)
        place = torch.arange(side, device=x.device, dtype=torch.float32) * scale
        low = place.long()
        high = (low + 1).clamp(max=n - 1)
        part = (place - low).view(shape)
        x_low = x.index_select(dim, low).float()
        x_high = x.index_select(dim, high).float()
        x = x_low + (x_high - x_low) * part
    return (x.permute(0, 3, 1, 2) - 128) / 128


def resize_torch(pixels, side=299):
    """uint8 (B, H, W, 3) -> (B, 3, side, side): torch's bilinear resize without antialiasing, half-pixel
    centres, on [0, 1], then 2x - 1, as pytorch-fid and DC-Gen."""
    x = pixels.permute(0, 3, 1, 2) / 255
    return 2 * F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False) - 1


# ----------------------------------------------------------------------------------------------------------
# Feature extractors


@dataclass
class Extractor:
    """Call it on uint8 (B, H, W, 3): (features (B, D), logits (B, K) or None), fp32. InputError otherwise."""
    net: object                     # InceptionV3 or Exported
    name: str                       # goes on record with each score, like hash and resize
    hash: str                       # of the file of weights
    resize: str                     # tf, torch, or own: an exported network sees the pixels as they are
    device: torch.device
    inception: bool = False         # weights from a file: only then is the distance called FID

    @torch.no_grad()
    def __call__(self, pixels):
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise InputError(f"images must be uint8 (B, H, W, 3), not {pixels.dtype} {tuple(pixels.shape)}: "
                             "see ae.to_uint8")
        with full_precision(self.device):
            return self.net(pixels.to(self.device, non_blocking=True))


class Exported:
    """A torch.export'ed network on uint8 images, (B, H, W, 3) or (B, 3, H, W): its example input tells which.

    It gives features (B, D), or (features, logits (B, K)). A fixed batch is filled up with copies, which are
    dropped again. InputError for a file or images that do not fit.
    """

    def __init__(self, path, device):
        self.path = path
        logging.getLogger("torch.export").setLevel(logging.CRITICAL)            # or it prints tracebacks
        try:
            program = torch.export.load(plain_copy(path))
        except Exception as e:                                  # a stranger's file may hold anything
            raise InputError(f"--features {path}: no readable file of torch.export.save "
                             f"({type(e).__name__}: {str(e)[:60]})") from e
        names = program.graph_signature.user_inputs
        inputs = [node.meta["val"] for node in program.graph.nodes if node.name in names]
        x = inputs[0]
        if len(inputs) > 1 or x.dtype != torch.uint8 or x.ndim != 4 or 3 not in (x.shape[1], x.shape[3]):
            raise InputError(f"--features {path}: export it on one uint8 tensor (B, H, W, 3) or (B, 3, H, W)")
        self.nhwc = x.shape[3] == 3
        shape = [n if isinstance(n, int) else None for n in x.shape]            # None: any
        self.batch = shape[0]
        self.hw = shape[1:3] if self.nhwc else shape[2:4]
        if device.type != "cpu":
            program = torch.export.passes.move_to_device_pass(program, device)
        self.run = program.module()

    def __call__(self, pixels):
        if any(want not in (None, got) for want, got in zip(self.hw, pixels.shape[1:3])):
            raise InputError(f"--features {self.path} takes {hxw(self.hw)} images, "
                             f"not {hxw(pixels.shape[1:])}: pass --image_size")
        n = len(pixels)
        batch = self.batch or max(1, n)
        copies = pixels[-1:].expand(-n % batch, -1, -1, -1)
        x = torch.cat([pixels, copies])
        if not self.nhwc:
            x = x.permute(0, 3, 1, 2).contiguous()
        try:
            outs = [self.run(part) for part in x.split(batch)]
            outs = [out[:2] if isinstance(out, (tuple, list)) else [out] for out in outs]
            outs = [torch.cat(parts).float() for parts in zip(*outs)]
        except Exception as e:
            raise InputError(f"--features {self.path} fails on {hxw(pixels.shape[1:])} images: {e}") from e
        if any(out.ndim != 2 or len(out) != len(x) for out in outs):
            raise InputError(f"--features {self.path}: want features (B, D), logits (B, K), "
                             f"not {tuple(outs[0].shape)}")
        return (*(out[:n] for out in outs), None)[:2]


def check_files(inception, features):
    for flag, file in (("features", features), ("inception", inception)):
        if file not in (None, "default", "random") and not os.path.isfile(file):
            raise InputError(f"--{flag} {file}: no such file")


def load_extractor(inception="default", features=None, device="cpu", resize="tf"):
    """-> Extractor. InputError for files that cannot be had or are something else.

    inception: "default" (the published weights, downloaded once), "random" (seeded), or a file, as it is.
    features: a torch.export'ed network in its place, with its own preprocessing. resize: "tf" or "torch".
    """
    device = torch.device(device)
    if device == torch.device("cuda"):                          # exported operators want a number
        device = torch.device("cuda", 0)
    check_files(inception, features)
    if features:
        return Extractor(Exported(features, device), Path(features).stem, file_hash(features), "own", device)
    net = InceptionV3(resize)
    name = "random features (seed 0)"
    digest = "seed-0"
    if inception != "random":
        path = fetch_weights() if inception == "default" else Path(inception)
        load_weights(net, read_weights(path), path)
        digest = file_hash(path)
        name = "inception-2015-12-05" if digest.startswith(HASH) else f"inception weights {path.name}"
    return Extractor(net.to(device), name, digest, resize, device, inception != "random")


def fetch_weights():
    """The published file in torch.hub's cache, downloaded if need be; its hash is checked every time."""
    path = Path(torch.hub.get_dir(), "checkpoints", URL.split("/")[-1])
    try:
        if not path.is_file():                                  # several ranks may do it: files move whole
            path.parent.mkdir(parents=True, exist_ok=True)
            is_main = rank_and_world()[0] == 0
            torch.hub.download_url_to_file(URL, str(path), hash_prefix=HASH, progress=is_main)
    except Exception as e:                                      # of the network, the disk, or a wrong hash
        raise InputError(f"no Inception weights: {URL} (sha256 {HASH}...): {type(e).__name__}; "
                         "--inception FILE takes a copy") from e
    if not file_hash(path).startswith(HASH):
        raise InputError(f"{path} is damaged (its sha256 is not {HASH}...): delete it")
    return path


def load_weights(net, state, path):
    want = {k: v.shape for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    bad = [k for k in want if getattr(state.get(k), "shape", None) != want[k]]
    if bad:
        raise InputError(f"--inception {path}: {len(bad)} of {len(want)} tensors missing or misshapen, "
                         f"first {bad[0]}")
    net.load_state_dict(state, strict=False)


def file_hash(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------
# Images


class ImageSet(torch.utils.data.Dataset):
    """n uint8 images of one size: a folder (nested or flat, sorted by path), the arr_0 of an .npz, or "toy".

    num takes so many of them, evenly spaced, so that class folders keep all their classes; image_size is the
    ADM centre crop of each. InputError names the file that cannot be read.
    """

    def __init__(self, path, num=None, image_size=None):
        self.path = str(path)
        self.image_size = image_size
        self.left_out = ""
        self.stored = None                                      # Statistics that stand beside ADM's images
        if self.path == "toy":
            self.kind = "toy"
            self.data = open_images("toy", image_size or 32)
            num = num or 10_000                                 # there are nearly as many as one likes
        elif holds_images(path):
            self.kind = "folder"
            found, others = list_images(self.path)
            self.data = sorted(file for file, _ in found)
            self.left_out = "; " + left_out(others)
        else:
            self.kind = "npz"
            self.data = self.open_npz(path)
        total = len(self.data)
        self.n = num or total
        if not 1 <= self.n <= total:
            raise InputError(f"{path}: {total} images in there" + (f", --num {num} asked for" if num else ""))
        self.indices = evenly_spaced(self.data, self.n)
        self.size = None                                        # read_one compares with it
        self.size = tuple(self.read([0]).shape[1:3])            # (H, W) of the first image: all must have it

    def open_npz(self, path):
        try:
            if not os.path.isfile(path):                        # a pipe would never end
                raise FileNotFoundError
            data = NpzImages(path)
            if data.packed:
                data = np.load(path)["arr_0"]
        except Exception as e:                                  # a stranger's file may hold anything
            raise InputError(f"{path}: want a folder of images, toy, or an .npz with arr_0 (uint8 NHWC) "
                             f"or mu and sigma ({type(e).__name__}: missing, damaged, or else)") from e
        if data.dtype != np.uint8 or len(data.shape) != 4 or data.shape[3] != 3 or 0 in data.shape[1:]:
            raise InputError(f"{path}: arr_0 is {data.dtype} {data.shape}; want uint8 (N, H, W, 3), "
                             "rounded and clipped to 0..255")
        return data

    def read(self, span):                                       # -> uint8 (B, H, W, 3)
        indices = [self.indices[i] for i in span]
        if self.kind == "toy":
            img, _ = self.data.get_batch(indices, indices)
            return to_uint8(img)
        return torch.from_numpy(np.stack([self.read_one(i) for i in indices]))

    def read_one(self, i):                                      # -> uint8 array (H, W, 3)
        name = self.data[i] if self.kind == "folder" else f"{self.path} [{i}]"
        try:
            picture = read_image(name) if self.kind == "folder" else Image.fromarray(self.data[i])
            if self.image_size:
                picture = center_crop(picture, self.image_size)
            pixels = np.array(picture)
        except Unreadable as e:
            raise InputError(f"{name}: not a readable image ({str(e)[:40]}): repair or remove it") from e
        if self.size not in (None, pixels.shape[:2]):
            raise InputError(f"mixed sizes, {name} is {hxw(pixels.shape)}, the first {hxw(self.size)}: "
                             "pass --image_size S")
        return pixels

    __getitem__ = read                                          # of a DataLoader, whose samples are batches


class NpzImages:
    """The arr_0 of an .npz, stored as np.savez does. Images are read when they are asked for: 50,000 are
    gigabytes. (A memory map would do that too, and end the process where the file becomes shorter.)

    packed: compressed or in Fortran order, so not to be read in this way.
    """

    def __init__(self, path):
        npy = np.lib.format
        self.path = path
        self.time = os.stat(path).st_mtime_ns
        with zipfile.ZipFile(path) as z:
            if rank_and_world()[0] == 0 and z.testzip():
                raise ValueError("checksum")
            member = z.getinfo("arr_0.npy")
            with z.open(member) as f:
                self.start = z.fp.tell()                        # in the zip
                version = npy.read_magic(f)
                read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                self.shape, fortran, self.dtype = read_header(f)
                header = f.tell()
        if header + math.prod(self.shape) * self.dtype.itemsize != member.file_size:
            raise ValueError("size")
        self.start += header
        self.packed = fortran or member.compress_type != zipfile.ZIP_STORED

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, i):                                   # -> uint8 (H, W, 3)
        count = math.prod(self.shape[1:])

        def read(path):
            pixels = np.fromfile(path, np.uint8, count, offset=self.start + i * count)
            if len(pixels) < count or os.stat(path).st_mtime_ns != self.time:
                raise Unreadable("the file has changed")
            return pixels.reshape(self.shape[1:])

        return patiently(read, self.path)


def read_batches(images, batch=64, workers=0):
    """An ImageSet -> batches of uint8 (B, H, W, 3), in order; under torchrun this rank's slice. workers:
    processes that decode a folder's files."""
    rank, world = rank_and_world()
    first = images.n * rank // world
    last = images.n * (rank + 1) // world
    spans = [range(i, min(i + batch, last)) for i in range(first, last, batch)]
    workers = min(workers, len(spans) // 2) if images.kind == "folder" else 0
    yield from torch.utils.data.DataLoader(images, batch_size=None, sampler=spans, num_workers=workers,
                                           pin_memory=torch.cuda.is_available())


# ----------------------------------------------------------------------------------------------------------
# Statistics and scores. A side of a comparison is an ImageSet or, where a file holds no more, Statistics.


@dataclass
class Statistics:
    """What the scores need to know of a set of images."""
    path: str
    kind: str                       # folder, npz, toy, stream (of a sampler), or statistics (from an .npz)
    n: int                          # None: a file that does not say
    size: tuple                     # (H, W), or None
    mu: torch.Tensor                # (D,) float64
    sigma: torch.Tensor             # (D, D)
    features: torch.Tensor = None   # (n, D) fp32, where a metric needs them
    logits: torch.Tensor = None     # (n, K)
    meta: dict = None               # of a file: what it says of network and resize, {} for nothing

    @property
    def hash(self):
        """samples_hash and reference_hash: of mu and tr(sigma) in fp32, so of what the network saw. Sums in
        float64 make it the same in any order and on any ranks."""
        moments = torch.cat([self.mu, self.sigma.trace()[None]]).float()
        return hashlib.sha256(moments.numpy().tobytes()).hexdigest()[:16]


def open_side(path, num=None, image_size=None, least=2):
    """A folder, "toy" or an .npz with arr_0 -> ImageSet; an .npz with mu and sigma alone -> Statistics.
    InputError for anything else, and for fewer than `least` images."""
    stored = None
    has_images = True
    if os.path.isfile(path) and zipfile.is_zipfile(path):
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in ("mu", "sigma", "meta") if name in file}
                has_images = "arr_0" in file
        except Exception as e:
            raise InputError(f"{path}: damaged, or something else ({type(e).__name__})") from e
        if "mu" in arrays and "sigma" in arrays:
            stored = stored_statistics(str(path), **arrays)
    if stored and not has_images:
        return stored
    images = ImageSet(path, num, image_size)
    images.stored = stored
    if images.n < least:
        raise InputError(f"{path}: one image has no covariance: "
                         "statistics need at least 2, thousands to mean much")
    return images


def stored_statistics(path, mu, sigma, meta="{}"):
    """Arrays of an .npz -> Statistics. InputError for what they cannot be."""
    try:
        meta = json.loads(str(meta))
        n, size, *names = [meta.get(key) for key in ("n", "size", "features", "features_hash", "resize")]
        fits = not meta or set(map(type, names)) == {str}
        fits &= n is None or type(n) is int and n > 1
        fits &= size is None or list(map(type, size)) == [int, int]
    except Exception:
        fits = False
    if not fits:
        raise InputError(f"{path}: its meta is not what --save_stats writes: make these statistics anew")
    floats = mu.dtype.kind == sigma.dtype.kind == "f" and mu.size > 0
    if not floats or sigma.shape != mu.shape * 2 or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise InputError(f"{path}: want finite mu (D,) and sigma (D, D), "
                         f"not {mu.dtype} {mu.shape} and {sigma.shape}")
    mu, sigma = (torch.from_numpy(x.astype(np.float64)) for x in (mu, sigma))   # big-endian ones too
    values = torch.linalg.eigvalsh(sigma)
    rounding = 1e-6 * values.abs().max()
    if values[0] < -rounding or (sigma - sigma.T).abs().max() > rounding:
        raise InputError(f"{path}: sigma is no covariance (symmetric, no eigenvalue below 0; here from "
                         f"{values[0]:.1e} to {values[-1]:.1e}): make these statistics anew")
    return Statistics(path, "statistics", n, size, mu, sigma, meta=meta)


def measure(side, extractor, metrics=METRICS, batch=64, workers=0):
    """What open_side gives -> Statistics, with the features and logits that the metrics need."""
    if isinstance(side, Statistics):
        return side
    stored = side.stored
    if stored and not {"is", "precision", "recall"} & set(metrics):
        return stored
    batches = read_batches(side, batch, workers)
    made = statistics_of(batches, extractor, metrics, side.n, side.path, side.kind)
    if stored:      # ADM's files: mu and sigma of all training images; 10,000 images for precision and recall
        return replace(stored, features=made.features, logits=made.logits, size=made.size)
    return made


def statistics_of(batches, extractor, metrics=METRICS, total=None, path="samples", kind="stream"):
    """Batches of uint8 (B, H, W, 3), from a folder or straight from a sampler, through the network ->
    Statistics, with the features (N, D) and logits (N, K) that the metrics need.

    Under torchrun each rank gives its own batches and gets the statistics of all. total: of the progress bar.
    InputError for images of different sizes.
    """
    rank, world = rank_and_world()
    moments = Moments()
    features = []
    logits = []
    sizes = set()
    with tqdm(total=total and total // world, desc=path[-30:], unit="img", disable=rank > 0) as bar:
        for pixels in batches:
            new_features, new_logits = extractor(pixels)        # (B, D), (B, K) or None
            moments.update(new_features)
            sizes.add(tuple(pixels.shape[1:3]))
            if {"precision", "recall"} & set(metrics):
                features.append(new_features.cpu())
            if "is" in metrics and new_logits is not None:
                logits.append(new_logits.cpu())
            bar.update(len(pixels))
    sizes = sorted(set().union(*gather(sizes)))
    if len(sizes) != 1:
        some = " ".join(map(hxw, sizes[:3]))
        raise InputError(f"{path}: images of {len(sizes)} sizes {some}: one is wanted")
    moments.reduce()
    mu = moments.mean.cpu()
    sigma = moments.cov.cpu()
    features = gather_rows(features)
    logits = gather_rows(logits)
    if not sigma.isfinite().all() or logits is not None and not logits.isfinite().all():
        raise InputError(f"{path}: {extractor.name} gives numbers that are not finite: use another network")
    return Statistics(path, kind, moments.n, sizes[0], mu, sigma, features, logits)


def check_comparable(samples, reference, allow_small):
    """InputError for two ImageSets or Statistics that cannot be compared, as far as n and size are known."""
    if samples.size and reference.size and tuple(samples.size) != tuple(reference.size):
        raise InputError(f"{samples.path} is {hxw(samples.size)}, {reference.path} {hxw(reference.size)}: "
                         "scores need equal sizes (--image_size S crops images)")
    for side in (samples, reference):
        if side.n is not None and side.n < MIN_IMAGES and not allow_small:
            raise InputError(f"{side.path}: {side.n} images; scores are biased below {MIN_IMAGES}: "
                             "add images, or pass --allow_small")


def compare(samples, reference, extractor, metrics=METRICS, allow_small=False):
    """Two Statistics -> dict of the scores, None where one cannot be had (the notes say why), and of all that
    they depend on. InputError where they cannot be compared."""
    check_comparable(samples, reference, allow_small)
    notes = []
    for side in (samples, reference):
        if side.meta == {}:
            notes.append(f"{side.path} does not say its count, resize and network: make sure that they fit")
        elif side.meta:
            how = side.meta["features_hash"], side.meta["resize"]
            if how != (extractor.hash, extractor.resize):
                raise InputError(f"{side.path} was made with {side.meta['features']}, --resize {how[1]}: "
                                 f"not comparable with {extractor.name}, --resize {extractor.resize}")
    scores = dict.fromkeys(("fid", "is", "is_std", "precision", "recall"))
    if "fid" in metrics:
        scores["fid"] = frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma)
        d = len(samples.mu)
        if samples.n and samples.n <= d:
            notes.append(f"{samples.n} images, {d} features: the covariance is singular, "
                         "the distance biased upwards")
        if samples.sigma.trace() <= 1e-9 * samples.mu.square().sum():
            notes.append("the samples are all alike (constant images?)")
    if samples.hash == reference.hash:
        notes.append("samples and reference are identical")
    if "is" in metrics and samples.logits is not None:
        scores["is"], scores["is_std"] = inception_score(samples.logits)
    elif "is" in metrics:
        notes.append("no logits of the samples: no score of them")
    if {"precision", "recall"} & set(metrics):
        real = reference.features
        fake = samples.features
        if real is None or fake is None or min(len(real), len(fake)) <= 3:
            notes.append("precision and recall need images on both sides, more than 3")
        else:
            device = "cuda" if extractor.device.type == "cuda" else "cpu"       # float64, which mps has not
            scores["precision"], scores["recall"] = precision_recall(real.to(device), fake.to(device))
    count = str(samples.n or "?")
    if count.endswith("000"):
        count = count[:-3] + "k"
    other = f"Frechet distance of {extractor.name}, {count} images"
    return dict(
        scores, name=f"FID-{count}" if extractor.inception else other, n=samples.n, n_reference=reference.n,
        samples=samples.path, samples_hash=samples.hash,
        reference=reference.path, reference_kind=reference.kind, reference_hash=reference.hash,
        image_size=samples.size or reference.size,
        features=extractor.name, features_hash=extractor.hash, resize=extractor.resize, notes=notes)


def score(batches, reference, extractor, metrics=METRICS[:4], allow_small=False, total=None):
    """Batches of uint8 (B, H, W, 3) as a sampler makes them -> the dict of compare: FID-50k without a disk.
    reference: a path, or the Statistics of measure or statistics_of, which can serve again."""
    if isinstance(reference, (str, Path)):
        reference = measure(open_side(str(reference)), extractor, metrics)
    samples = statistics_of(batches, extractor, metrics, total)
    return compare(samples, reference, extractor, metrics, allow_small)


def is_jpeg(side):
    return side.kind == "folder" and side.data[0].lower().endswith((".jpg", ".jpeg", ".jpe", ".jfif"))


def check_pairs(samples, reference):
    images = isinstance(samples, ImageSet) and isinstance(reference, ImageSet)
    if not images or (samples.n, samples.size) != (reference.n, reference.size):
        raise InputError("psnr and ssim compare image with image: both sides must be images, "
                         "equally many and of one size")


def pairwise(samples, reference, metrics, batch=64, workers=0):
    """Mean PSNR and SSIM of two ImageSets that pair up, the i-th against the i-th -> {metric: mean}, with
    psnr_n, the number of pairs of finite PSNR: the mean is theirs, None where all pairs are equal."""
    functions = {"psnr": psnr, "ssim": ssim}
    finite = {m: [] for m in metrics}
    for a, b in zip(read_batches(samples, batch, workers), read_batches(reference, batch, workers)):
        for m in metrics:
            values = functions[m](a, b).double()
            finite[m].append(values[values.isfinite()])
    result = {}
    for m in metrics:
        values = gather_rows(finite[m])
        result[m] = values.mean().item() if len(values) else None
        if m == "psnr":
            result["psnr_n"] = len(values)
    return result


# ----------------------------------------------------------------------------------------------------------
# A stranger's exported network (--features): what of its file may be loaded

# torch.export.load unpickles parts of a file, evaluates its text and calls what it names. So it gets a copy:
# of tensors and JSON alone, in which each text must match the pattern of its key in TEXT, else -?[\w.]*.
OPERATOR = (
    r"torch\.ops\.(aten|prims)\.(?!save\.|from_file\.|_?sparse)\w+\.[a-zA-Z]\w*|torch\._?sym_\w+|"
    r"torch\.ops\.higher_order\.(cond|wrap_with_(autocast|set_grad_enabled))|math\.[a-z]\w*|_operator\.(add|"
    r"and_|eq|floordiv|ge|getitem|gt|le|lshift|lt|mod|mul|ne|neg|or_|pos|pow|rshift|sub|truediv)")
SIZE = (                            # what sizes of tensors are written with: sympy evaluates it
    "Symbol|Integer|Rational|Float|Add|Mul|Pow|Max|Min|Abs|(Python)?Mod|(Floor|Ceil|Clean)Div|And|Or|Not|"
    "(Int|Float)TrueDiv|PowByNatural|FloatPow|(Trunc|Floor|Ceil|Round)ToInt|ToFloat|ModularIndexing|Identity|"
    "Equality|Unequality|(Strict)?(Less|Greater)Than")
TEXT = {
    "target": OPERATOR, "as_operator": OPERATOR, "name": r"\w*", "as_name": r"\w*", "as_string": r"(?s:.*)",
    "expr_str": rf"(({SIZE})\(|'[a-z]+\d+'|'[-\d.e]+'|[a-z]+=(True|False|\d+)|-?\d+|true|false|[), ])*",
    "torch_version": r"[\w.+]*",
    "type": r"builtins\.(tuple|list|dict)|[a-z]+", "context": r'null|\[[\w", ]*\]',
    "path_name": r"(weight|tensor)_\d+",
}
MEMBERS = (                         # and those of older files
    r"[^/]+/(models/model\.json|data/\w+/(model_\w+_config\.json|model\.pt|weight_\d+|tensor_\d+)|"
    r"archive_\w+|byteorder|\.data/\w+)|version|serialized_exported_program\.json|serialized_\w+\.pt")


def check_text(x, key=None):
    """JSON -> the same. ValueError for text that may do anything."""
    if isinstance(x, list):
        return [check_text(part, key) for part in x]
    if isinstance(x, dict):
        if x.get("use_pickle"):
            raise ValueError("pickled weights")
        for name in x.keys() & {"metadata", "guards_code"}:
            x[name] = type(x[name])()                           # text of other kinds, not needed
        return {check_text(name): check_text(part, name) for name, part in x.items()}
    if key in ("in_spec", "out_spec"):
        return json.dumps(check_text(json.loads(x)))
    if isinstance(x, str) and not re.fullmatch(TEXT.get(key, r"-?[\w.]*"), x):
        raise ValueError(f"{key} {x}")
    return x


def plain_copy(path):
    """A file of torch.export.save -> what of it may be loaded, as a file in memory. Raises for others."""
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            if re.fullmatch(MEMBERS, name):
                data = old.read(name)                           # checks its sum
                if name.endswith(".json"):
                    data = json.dumps(check_text(json.loads(data)))
                if name.endswith(".pt") and data:               # pickled: no more than tensors
                    torch.load(io.BytesIO(data), weights_only=True)
                new.writestr(name, data)
    copy.seek(0)
    return copy


# ----------------------------------------------------------------------------------------------------------
# The command line


def parse(argv):
    parser = Flags(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="fid.py SAMPLES REFERENCE [flags], or fid.py REFERENCE --save_stats FILE.npz; --help")
    add = parser.add_argument
    add("samples",
        help="folder or .zip of images, .npz with arr_0 (uint8 NHWC) or mu and sigma, or toy")
    add("reference", nargs="?", help="the same")
    add("--metrics", default=",".join(METRICS[:4]),
        help=f"some of {','.join(METRICS)}; psnr and ssim: image by image")
    add("--inception", default="default",
        help="default: the published weights; random: seeded, no download; or a file of weights")
    add("--features", metavar="FILE.pt2",
        help="another network, of torch.export, on uint8 images (B,H,W,3) or (B,3,H,W)")
    add("--resize", choices=("tf", "torch"), default="tf",
        help="to 299 px: tf as ADM and torch-fidelity, torch as pytorch-fid")
    add("--image_size", type=within(int, 1, 2**13), metavar="S",
        help="ADM centre crop of the images to S; without it pixels are taken as they are")
    add("--num", type=within(int, 1, 10**9), metavar="N",
        help="score N samples, evenly spaced; the reference stays whole (toy: N too)")
    add("--allow_small", action="store_true", help=f"score fewer than {MIN_IMAGES} images")
    add("--save_stats", metavar="FILE.npz", help="write mu and sigma of the reference")
    add("--json", nargs="?", const="", metavar="FILE",
        help="print the JSON line only; with FILE, write it there too")
    add("--batch_size", type=within(int, 1, 2**16), default=64,
        help="images through the network at a time")
    add("--workers", type=within(int, 0, 1024), default=min(8, os.cpu_count()),
        help="processes that decode images")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="where the network runs (cuda where there is one)")
    args = parser.parse_args(argv)
    args.metrics = args.metrics.split(",")
    if not set(args.metrics) <= set(METRICS):
        raise InputError(f"--metrics {','.join(args.metrics)}: some of {','.join(METRICS)}")
    if args.features and (args.inception, args.resize) != ("default", "tf"):
        raise InputError("--inception and --resize are of Inception: leave them out beside --features")
    path = args.save_stats
    if path is None and args.reference is None or path is not None and not path.endswith(".npz"):
        raise InputError("want fid.py SAMPLES REFERENCE, or fid.py REFERENCE --save_stats FILE.npz")
    for flag in ("json", "save_stats"):
        path = getattr(args, flag)
        if path and (os.path.isdir(path) or not os.access(f"{os.path.dirname(path) or '.'}/.", os.W_OK)):
            raise InputError(f"--{flag} {path}: cannot be written; name a file in a folder that exists")
    return args


def open_sides(args, least):
    """{"samples": .., "reference": ..} as open_side gives them; one positional argument is the reference."""
    paths = {"reference": args.samples}
    if args.reference is not None:
        paths = {"samples": args.samples, "reference": args.reference}
    sides = {}
    for role in sorted(paths, key=lambda role: paths[role] == "toy"):   # toy last: it follows the other
        num = args.num
        size = args.image_size
        if paths[role] == "toy":
            for other in sides.values():
                num = num or other.n
                size = size or other.size and other.size[0]
        elif role == "reference" and len(paths) == 2:
            num = None                                          # it stays whole
        sides[role] = open_side(paths[role], num, size, least)
    return sides


def save_statistics(path, statistics, extractor):
    """mu, sigma and meta, which says how they were made, to an .npz; returns meta."""
    meta = dict(n=statistics.n, size=statistics.size, hash=statistics.hash, features=extractor.name,
                features_hash=extractor.hash, resize=extractor.resize)
    with writing("--save_stats", path):
        np.savez(path + ".tmp.npz", mu=statistics.mu, sigma=statistics.sigma, meta=json.dumps(meta))
        os.replace(path + ".tmp.npz", path)
    return meta


def main(argv=None):
    start = time.time()
    args = parse(argv)
    torchrun = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if torchrun and args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    check_device(args.device)
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    if torchrun:
        backend = "nccl" if args.device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=12))       # ranks wait while one decodes
    rank, world = rank_and_world()

    def print0(line):
        if rank == 0 and args.json is None:
            print(line)

    two = args.reference is not None
    pairs = [m for m in ("psnr", "ssim") if m in args.metrics and two]
    needs_network = set(args.metrics) - set(pairs) or args.save_stats
    sides = open_sides(args, least=2 if needs_network else 1)
    for role, side in sides.items():
        print0(f"{role}: {side.path}, {side.n or '?'} images, {hxw(side.size)} ({side.kind})"
               + getattr(side, "left_out", ""))
    n = sides["reference"].n
    result = {}
    notes = []
    prefix = ""
    if pairs:
        check_pairs(**sides)
        if "ssim" in pairs and min(sides["samples"].size) < 11:
            pairs.remove("ssim")
            notes.append("no ssim: its window is 11 pixels wide")
    if needs_network:
        if two:
            check_comparable(**sides, allow_small=args.allow_small)             # before the work
        extractor = load_extractor(args.inception, args.features, args.device, args.resize)
        print0(f"features: {extractor.name} ({extractor.hash}), resize {extractor.resize}, fp32")
        if not extractor.inception:
            prefix = f"{extractor.name}: "
        needed = {"samples": set(args.metrics), "reference": set(args.metrics) - {"is"} if two else set()}
        statistics = {role: measure(side, extractor, needed[role], args.batch_size, args.workers)
                      for role, side in sides.items()}
        if args.save_stats and rank == 0:
            result = save_statistics(args.save_stats, statistics["reference"], extractor)
            print0(f"statistics of {result['n']} images -> {args.save_stats}")
        if two:
            result = compare(**statistics, extractor=extractor, metrics=args.metrics,
                             allow_small=args.allow_small)
    if pairs:
        result |= pairwise(**sides, metrics=pairs, batch=args.batch_size, workers=args.workers)

    names = {"fid": result.get("name"), "is": prefix + "Inception Score", "psnr": "PSNR", "ssim": "SSIM"}
    for metric in METRICS:
        if result.get(metric) is not None:
            spread = f" +- {result['is_std']:.4f}" if metric == "is" else ""
            print0(f"{names.get(metric, prefix + metric)} {result[metric]:.4f}{spread}")
    if result.get("psnr_n", n) != n:
        print0(f"PSNR inf of {n - result['psnr_n']} equal pairs, which its mean leaves out")
    if two and is_jpeg(sides["samples"]):
        notes.append("the samples are JPEGs, whose artefacts count: PNG and npz keep samples as they are")
    result["notes"] = result.get("notes", []) + notes
    for note in result["notes"]:
        print0(f"note: {note}")
    result["seconds"] = round(time.time() - start, 1)
    result["versions"] = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                              pillow=PIL.__version__)
    if rank == 0:
        line = json.dumps(result, allow_nan=False)
        print(line, flush=True)
        if args.json:
            with writing("--json", args.json):
                Path(args.json).write_text(line + "\n")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    script(main)
