"""Pixels to latents and back: DC-AE and DC-AE 1.5.

What DC-AE 1.5 (arXiv 2508.00413) adds to DC-AE (arXiv 2410.10733):
  * a structured latent: while the autoencoder trains, a mask keeps only the first c' of the c latent channels
    (Eq. 1), with c' drawn anew each step; so front channels learn the object and later ones its details,
  * augmented diffusion training on the same channel prefixes (Eq. 2; lives in diffusion.py),
  * a plainer network: ResBlocks with RMSNorm and SiLU only, no shortcut around the two latent projections.

    img (B,3,H,W) --encode--> z (B,c,H/f,W/f) --first c'--> z (B,c',H/f,W/f) --decode--> img (B,3,H,W)

Letters: B batch, H W pixels, f spatial compression, c latent channels, c' = c_prime kept ones, h heads, N
tokens (pixels of a map). `img` is always float in [-1,1]; `pixels` are uint8 (B,H,W,3), an `image` is PIL's.
Sources: [paper] arXiv 2508.00413, [DC-Gen file] the authors' code @cae2205, [ours] chosen or measured here.
A reader of the network may stop at the double rule, "What every script shares".

    ae = DCAE.from_pretrained("out/my_run")     # or a published name, folder or file, or diffusers' folder
    rec = ae(img, c_prime=16)
    python ae.py photo.jpg toy --ckpt out/structured --ckpt2 out/plain --out figures     # Figures 2, 3, 9, 10
"""
import argparse
import atexit
import errno
import hashlib
import io
import json
import math
import os
import queue
import re
import sys
import threading
import time
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps
from torch.utils.checkpoint import checkpoint

try:
    import fcntl
except ImportError:                                                     # Windows: lock() does nothing
    fcntl = None


class InputError(SystemExit, ValueError):
    """Bad input, in one line of less than 200 characters; a longer one is cut in its middle. As SystemExit it
    ends a script with that line; as ValueError one catches it."""

    def __init__(self, message):
        message = str(message).split("\nae.InputError: ")[-1]           # below a loader process's traceback
        line = " ".join(message.split())
        super().__init__(line if len(line) < 200 else f"{line[:100]} ... {line[-90:]}")


# ------------------------------------------------------------------------------------------------------------
# Configuration

# The published models [DC-Gen ae_model_zoo.py]: width of each stage as a multiple of stage 0's, blocks of
# each encoder stage and of each decoder stage. Further stages repeat the last number.
PUBLISHED = {
    "1.0": ((1, 2, 4, 4, 8, 8, 16), (0, 4, 8, 2), (0, 5, 10, 2)),
    "1.5": ((1, 2, 4, 4, 8, 8, 8), (0, 5, 10, 4), (0, 5, 10, 4)),
}


def are_sizes(*numbers):
    """True where all are whole numbers, of 0 .. 65536: in files of strangers they may be anything."""
    return all(type(n) is int and 0 <= n <= 65536 for n in numbers)


@dataclass
class AEConfig:
    """Widths and depths left None are the published ones. InputError where no such network can be built."""
    f: int = 32                     # spatial compression, 2^k >= 4: k + 1 stages, of which stage 0 is empty
    c: int = 128                    # latent channels
    version: str = "1.5"            # "1.5" ResBlocks; "1.0" EfficientViT from stage 3 on, latent shortcuts
    width: int = 128                # channels of stage 0, of which the others are multiples; 128: published
    shortcuts: bool = True          # without parameters, over space and channels; False: DC-AE's ablation
    in_channels: int = 3            # of the images; others than RGB's need a data set of one's own
    encoder_widths: tuple = None    # channels of each stage
    encoder_depths: tuple = None    # blocks of each stage
    decoder_widths: tuple = None
    decoder_depths: tuple = None

    def __post_init__(self):
        for flag in ("f", "c", "width", "in_channels"):
            number = getattr(self, flag)
            if not are_sizes(number) or number < 1:
                raise InputError(f"--{flag} {number}: must be a whole number in 1 .. 65536")
        if not 4 <= self.f <= 4096 or self.f & (self.f - 1):
            raise InputError(f"--f {self.f}: the spatial compression must be a power of two in 4 .. 4096")
        if self.version not in list(PUBLISHED):                         # a stranger's may be unhashable
            raise InputError(f"--version {self.version}: the versions are 1.0 and 1.5")
        self.fill()
        self.check("encoder", self.encoder_widths, self.encoder_depths)
        self.check("decoder", self.decoder_widths, self.decoder_depths)

    def fill(self):
        n = self.f.bit_length()                                         # stages
        # The last number repeated, n in all
        growth, encoder, decoder = ((row + n * row[-1:])[:n] for row in PUBLISHED[self.version])
        widths = [self.width * k for k in growth]
        self.encoder_widths = tuple(self.encoder_widths or widths)
        self.decoder_widths = tuple(self.decoder_widths or widths)
        self.encoder_depths = tuple(self.encoder_depths or encoder)
        self.decoder_depths = tuple(self.decoder_depths or decoder)

    def check(self, side, widths, depths):
        n = self.f.bit_length()
        given = f"--width {self.width}: {side} widths {widths}"
        if [len(widths), len(depths)] != [n, n] or not are_sizes(*widths, *depths):
            raise InputError(f"{given}, depths {depths}: f={self.f} needs {n} whole numbers for each")
        if depths[0] != 0 or min(depths[1:]) < 1 or sum(depths) > 1000:
            raise InputError(f"--depths: {side} depths {depths}: depth 0 first, then >= 1, in all <= 1000")
        if min(widths) < 4 or any(w % 4 for w in widths[1:]):
            raise InputError(f"{given} must be multiples of 4")
        if self.version == "1.0" and any(w % 32 for w in widths[3:]):
            raise InputError(f"{given} must be multiples of 32 from 1.0's stage 3 on")
        if self.shortcuts and any(4 * a % b for a, b in zip(widths[1:], widths[2:])):
            raise InputError(f"{given}: each must divide 4x the one before it, or shortcuts=False")
        if self.latent_shortcuts() and widths[-1] % self.c:
            raise InputError(f"--c {self.c}: 1.0 needs a c that divides the last {side} width, {widths[-1]}")

    def latent_shortcuts(self):
        return self.shortcuts and self.version == "1.0"


# ------------------------------------------------------------------------------------------------------------
# The mask of Eq. 1 and Eq. 2

def channel_mask(c, c_prime, device=None):
    """(1, c, 1, 1): c' ones, then zeros."""
    if not 1 <= c_prime <= c:
        raise InputError(f"c_prime={c_prime}: of a latent with {c} channels the first 1 to {c} can be kept")
    return (torch.arange(c, device=device) < c_prime).float().view(1, c, 1, 1)


# ------------------------------------------------------------------------------------------------------------
# Building blocks

class RMSNorm(nn.Module):
    """Each pixel's channel vector over its root mean square, then an affine map; eps from [DC-Gen ops.py]."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x):                                               # (B, C, H, W)
        u = x.to(torch.promote_types(x.dtype, torch.float32))           # statistics in fp32 under bf16
        u = u * torch.rsqrt(u.square().mean(1, keepdim=True) + 1e-5)
        return torch.addcmul(self.bias.view(-1, 1, 1), u, self.weight.view(-1, 1, 1)).to(x.dtype)


class ResBlock(nn.Module):
    def __init__(self, dim, batchnorm_relu=False):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(dim) if batchnorm_relu else RMSNorm(dim)
        self.act = F.relu if batchnorm_relu else F.silu

    def forward(self, x):
        return x + self.norm(self.conv2(self.act(self.conv1(x))))


class LinearAttention(nn.Module):
    """ReLU linear attention, heads of 32 channels: the cost grows with N, not N^2."""

    def __init__(self, dim):
        super().__init__()
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False)               # per head: 32 q, 32 k, 32 v
        self.proj = nn.Conv2d(dim, dim, 1, bias=False)
        self.norm = RMSNorm(dim)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(x).permute(0, 2, 3, 1).reshape(B, H * W, C // 32, 96)    # (B, N, h, 96)
        device = "cpu" if x.is_meta else x.device.type
        with torch.autocast(device, enabled=False):                     # sums over N tokens need fp32
            qkv = qkv.to(torch.promote_types(x.dtype, torch.float32))
            q, k, v = qkv.transpose(1, 2).chunk(3, -1)                  # 3 x (B, h, N, 32)
            v = F.pad(v, (0, 1), value=1.0)                             # ones: they sum to the normaliser
            out = F.relu(q) @ (F.relu(k).mT @ v)                        # (B, h, N, 33)
            out = out[..., :-1] / (out[..., -1:] + 1e-15)               # q = 0 gives 0, never NaN
        out = out.to(x.dtype).transpose(1, 2).reshape(B, H, W, C).permute(0, 3, 1, 2)
        return x + self.norm(self.proj(out))


class GLUMBConv(nn.Module):
    """Inverted bottleneck (expand ratio 4) with a gated linear unit behind the depthwise convolution."""

    def __init__(self, dim):
        super().__init__()
        self.inverted = nn.Conv2d(dim, 8 * dim, 1)
        self.depth = nn.Conv2d(8 * dim, 8 * dim, 3, padding=1, groups=8 * dim)
        self.point = nn.Conv2d(4 * dim, dim, 1, bias=False)
        self.norm = RMSNorm(dim)

    def forward(self, x):
        y, gate = self.depth(F.silu(self.inverted(x))).chunk(2, 1)      # 2 x (B, 4C, H, W)
        return x + self.norm(self.point(y * F.silu(gate)))


def make_block(config, stage, dim, in_decoder=False):
    """1.5: ResBlocks. 1.0: EfficientViT from stage 3 on; before, ResBlocks, in the decoder with BatchNorm."""
    if config.version == "1.0" and stage >= 3:
        return nn.Sequential(OrderedDict(attn=LinearAttention(dim), mlp=GLUMBConv(dim)))
    return ResBlock(dim, batchnorm_relu=config.version == "1.0" and in_decoder)


def average_channels(x, dim):
    """(B, C, H, W) -> (B, dim, H, W): the mean of each C / dim neighbours."""
    return x.unflatten(1, (dim, -1)).mean(2)


def duplicate_channels(x, dim):
    """(B, C, H, W) -> (B, dim, H, W): each channel dim / C times."""
    return x.repeat_interleave(dim // x.shape[1], 1)


class Down(nn.Module):
    """Halve H and W by space-to-channel; the shortcut does the same to x itself and averages channels."""

    def __init__(self, dim_in, dim_out, shortcut):
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim_out // 4, 3, padding=1)
        self.shortcut = shortcut

    def forward(self, x):                               # (B, C, H, W) -> (B, dim_out, H/2, W/2)
        y = F.pixel_unshuffle(self.conv(x), 2)
        if self.shortcut:
            y = y + average_channels(F.pixel_unshuffle(x, 2), y.shape[1])
        return y


class Up(nn.Module):
    """Double H and W by channel-to-space; the shortcut duplicates channels, added before the shuffle."""

    def __init__(self, dim_in, dim_out, shortcut):
        super().__init__()
        self.conv = nn.Conv2d(dim_in, 4 * dim_out, 3, padding=1)
        self.shortcut = shortcut

    def forward(self, x):                               # (B, C, H, W) -> (B, dim_out, 2H, 2W)
        y = self.conv(x)
        if self.shortcut:
            y = y + duplicate_channels(x, y.shape[1])
        return F.pixel_shuffle(y, 2)


# ------------------------------------------------------------------------------------------------------------
# The autoencoder

class Stage(nn.Sequential):
    """A stage's blocks and its Down or Up. checkpointing: activations are recomputed in the backward pass, to
    save memory."""
    checkpointing = False

    def forward(self, x):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(super().forward, x, use_reentrant=False)
        return super().forward(x)


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = config.encoder_widths
        self.shortcut = config.latent_shortcuts()
        self.project_in = Down(config.in_channels, widths[1], shortcut=False)       # for the empty stage 0
        self.stages = nn.ModuleList()
        for i, depth in enumerate(config.encoder_depths):
            stage = [make_block(config, i, widths[i]) for _ in range(depth)]
            if 0 < i < len(widths) - 1:
                stage.append(Down(widths[i], widths[i + 1], config.shortcuts))
            self.stages.append(Stage(*stage))
        self.project_out = nn.Conv2d(widths[-1], config.c, 3, padding=1)

    def forward(self, x):                               # (B, 3, H, W) -> (B, c, H/f, W/f)
        x = self.project_in(x)
        for stage in self.stages:
            x = stage(x)
        z = self.project_out(x)
        if self.shortcut:
            z = z + average_channels(x, z.shape[1])
        return z


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = config.decoder_widths
        self.shortcut = config.latent_shortcuts()
        self.project_in = nn.Conv2d(config.c, widths[-1], 3, padding=1)
        self.stages = nn.ModuleList()                                   # stage 0 comes last
        for i, depth in enumerate(config.decoder_depths):
            stage = [Up(widths[i + 1], widths[i], config.shortcuts)] if 0 < i < len(widths) - 1 else []
            stage += [make_block(config, i, widths[i], in_decoder=True) for _ in range(depth)]
            self.stages.append(Stage(*stage))
        act = nn.ReLU() if config.version == "1.0" else nn.SiLU()
        up = Up(widths[1], config.in_channels, shortcut=False)
        self.project_out = nn.Sequential(OrderedDict(norm=RMSNorm(widths[1]), act=act, up=up))

    def forward(self, z):                               # (B, c, H/f, W/f) -> (B, 3, H, W)
        x = self.project_in(z)
        if self.shortcut:
            x = x + duplicate_channels(z, x.shape[1])
        for stage in reversed(self.stages):
            x = stage(x)
        return self.project_out(x)


class DCAE(nn.Module):
    """The autoencoder. Its latents are unscaled: scale, 1 / rms of training latents, is multiplied once on
    the way to the diffusion model. info: image_size, step, channels of the checkpoint that it came from."""

    def __init__(self, config=None):
        super().__init__()
        self.config = config or AEConfig()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.scale = 1.0
        self.info = {}
        # [ours] residual branches start at zero (toy, 1,100 steps: 22.2 -> 25.2 dB); all else is PyTorch's
        for m in self.modules():
            if isinstance(m, (ResBlock, LinearAttention, GLUMBConv)):
                nn.init.zeros_(m.norm.weight)

    def encode(self, img):
        """(B, 3, H, W) -> (B, c, H/f, W/f), unscaled. InputError unless f divides H and W."""
        f, channels = self.config.f, self.config.in_channels
        shape = tuple(img.shape)
        if len(shape) != 4 or shape[1] != channels or 0 in shape or shape[2] % f or shape[3] % f:
            raise InputError(f"images of shape {shape}: (B,{channels},H,W) is needed, H and W divisible by "
                             f"f={f}")
        # [ours] channels last: faster norms on CPU, faster convolutions on CUDA
        return self.encoder(img.contiguous(memory_format=torch.channels_last))

    def decode(self, z):
        """(B, c', H/f, W/f), any c' <= c -> (B, 3, H, W). Missing channels count as zero: slice == mask."""
        missing = self.config.c - z.shape[1]
        if missing < 0:
            raise InputError(f"latent with {z.shape[1]} channels: this autoencoder has c={self.config.c}")
        if missing:
            z = F.pad(z, (0, 0, 0, 0, 0, missing))
        return self.decoder(z.contiguous(memory_format=torch.channels_last))

    def forward(self, img, c_prime=None):
        z = self.encode(img)
        if c_prime is None:
            return self.decode(z)
        # DC-AE 1.5 Eq. (1): x' = D(E(x) * mask(c'))
        return self.decode(z * channel_mask(self.config.c, c_prime, z.device).to(z.dtype))

    def stages(self):
        """The modules that FSDP shards: every stage that is not empty."""
        return [stage for stage in (*self.encoder.stages, *self.decoder.stages) if len(stage)]

    def set_checkpointing(self, on):
        """For all stages but those with BatchNorm, which would count each batch twice."""
        for stage in self.stages():
            stage.checkpointing = on and not any(isinstance(m, nn.BatchNorm2d) for m in stage.modules())

    @classmethod
    def from_pretrained(cls, x, download=True):
        """In eval mode. x: our checkpoint or run folder; a published name, folder or file (the configuration
        is read off the tensors); a diffusers AutoencoderDC folder. download: a name may go to the hub."""
        file, content = open_weights(x, download=download)
        try:
            ours = "kind" in content
            config, tensors, scale, info = read_ours(content) if ours else read_published(content, file)
            with torch.device("meta"):
                ae = cls(config)
            ae.to_empty(device="cpu").load_state_dict(tensors)          # copies: fp32, and off a mapped file
            ae.scale = float(scale)
            if not 0 < ae.scale < math.inf:
                raise ValueError(f"scale {scale}")
        except Exception as e:
            raise InputError(f"{file}: not a whole DC-AE 1.0 or 1.5, name another: {e}") from e
        ae.info = info
        return ae.eval()

    def save_pretrained(self, folder):
        """The diffusers layout: diffusers.AutoencoderDC.from_pretrained(folder) runs it."""
        if not self.config.shortcuts:
            raise InputError("save_pretrained: diffusers' AutoencoderDC always has the shortcuts")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = to_diffusers(self.state_dict())
        import_safetensors().torch.save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
        settings = {**diffusers_settings(self.config), "scaling_factor": self.scale}
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


# ============================================================================================================
# What every script shares: flags, files, random numbers, images, weights; and the paper's figures
# ============================================================================================================


# ------------------------------------------------------------------------------------------------------------
# Flags, lists of c', files, screen

class DefaultsHelp(argparse.ArgumentDefaultsHelpFormatter):
    """Says the default of each flag that has one."""

    def _get_help_string(self, action):
        plain = action.default is None or action.default is False
        return action.help if plain else super()._get_help_string(action)


class Flags(argparse.ArgumentParser):
    """Wrong flags end in one line, in every script."""

    def __init__(self, formatter_class=DefaultsHelp, **about):
        super().__init__(formatter_class=formatter_class, **about)

    def add(self, flag, kind, default, help, **more):
        """kind: of its value; bool: a switch, with a --no- form."""
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        self.add_argument(flag, default=default, help=help, **how, **more)

    def error(self, message):
        message = re.sub(r"argument (--\w+):", r"\1", " ".join(message.split()))
        raise InputError(f"{message[:150]} (--help explains each flag)")


def within(kind, low, high):
    """The kind of a flag: a number, int or float, that must lie there."""
    def number(text):
        if not low <= kind(text) <= high:                               # nor NaN
            raise argparse.ArgumentTypeError(f"{text}: must lie in {low:g} .. {high:g}")
        return kind(text)
    number.__name__ = kind.__name__                                     # argparse says it of other words
    return number


def parse_channels(text, c, flag="--channels"):
    """Text -> sorted list of c'. InputError: not in 1 .. c.
        "16:128:4"     from 16 in steps of 4, none above 128
        "16,32,64,64"  these; a number given twice is drawn twice as often
        None           16, 20, ..., c [paper], where c itself always counts"""
    if text is None:
        return [*range(16, c, 4), c]
    try:
        channels = [int(x) for x in re.split("[:,]", str(text))]
        if ":" in str(text):
            low, high, *stride = channels
            channels = list(range(low, high + 1, *stride))
    except (ValueError, TypeError):
        raise InputError(f"{flag} {text}: write 16:128:4, or 16,32,64, or one number") from None
    if not channels or min(channels) < 1 or max(channels) > c:
        raise InputError(f"{flag} {text}: the numbers must lie in 1..{c}, the autoencoder's channels")
    return sorted(channels)


def doubling(c, smallest=None):
    """smallest, 2 smallest, 4 smallest, ..., c. Without one, or where it is c (no masks): from c / 8 or 16
    on, whichever is less."""
    if smallest in (None, c):
        smallest = min(16, max(1, c // 8))
    channels = []
    while smallest < c:
        channels.append(smallest)
        smallest *= 2
    return channels + [c]


def synchronized_time():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time()


def check_device(device):
    try:
        torch.zeros(1, device=device).cpu()
    except Exception:                                                   # torch raises several kinds
        raise InputError(f"--device {device}: not on this machine; cpu always is") from None


@contextmanager
def writing(flag, path):
    """Around what writes there: errors of the system, a full disk and the like, become one line."""
    try:
        yield
    except OSError as e:
        if e.strerror is None:                                          # not of the system
            raise
        raise InputError(f"{flag} {path}: {e}; make room there, or name another") from None


def write(path, offset, data):
    """Bytes into a file that is there; returns when it is on the disk. (Memory maps end in a signal where the
    disk is full, and ranks lose each other's pages over NFS.)"""
    with open(path, "r+b") as f:
        f.seek(offset)
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def checksum(*arrays):
    """CRC-32 of their bytes, one after the other; never 0."""
    crc = 0
    for x in arrays:
        crc = zlib.crc32(np.ascontiguousarray(x), crc)
    return crc or 1


def check_out(folder):
    """InputError where no such folder can be made or written to: said before any work."""
    there = next(path for path in (Path(folder), *Path(folder).absolute().parents) if os.path.exists(path))
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise InputError(f"--out {folder}: {there} is no folder that can be written to; name another --out")


def make_folder(path):
    with writing("--out", path):
        os.makedirs(path, exist_ok=True)
    return path


def lock(folder):
    """Makes the folder this process's own until it ends, kill -9 included, or until the file that is returned
    is closed. InputError where another process has it."""
    file = open(Path(folder, ".lock"), "w")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)            # a forked process does not hold it on
    except OSError:
        raise InputError(f"--out {folder}: another process is writing there; wait for it, or name another "
                         "--out") from None
    return file


WAITS = (0.1, 0.4, 1.5, 3, 5)                                           # s between tries to read [ours]


def patiently(call, path):
    """call(path). Errors of the system, like those of a network folder that went away, are waited for, about
    10 s in all, then an InputError. Other errors pass."""
    for wait in (*WAITS, None):
        try:
            return call(path)
        except OSError as e:
            if e.errno in (None, errno.EINVAL):                         # a library's, of what the file holds
                raise
            if wait is None:
                raise InputError(f"{e.filename or path}: {e.strerror}, for {sum(WAITS):.0f} s now; start "
                                 "again when it can be read") from None
        time.sleep(wait)


class Screen:
    """In the place of stdout or stderr: a thread of its own writes, so that a pipe that nobody reads, or that
    was closed, neither ends a run nor keeps a signal from it."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")                   # None: was closed from the start
        self.last = "\n"
        self.start()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.start)              # loader processes print too
        atexit.register(self.drain)

    def start(self):
        self.texts = queue.Queue(10_000)
        threading.Thread(target=self.pump, daemon=True).start()

    def write(self, text):
        self.last = text[-1:] or self.last
        if not self.texts.full():
            self.texts.put(text)

    def flush(self):
        pass

    def pump(self):
        while True:
            data = self.texts.get().encode(self.stream.encoding, "replace")
            try:
                while data:
                    data = data[os.write(self.stream.fileno(), data):]
            except OSError:                                             # closed
                pass
            self.texts.task_done()

    def drain(self, seconds=5):
        end = time.time() + seconds
        while self.texts.unfinished_tasks and time.time() < end:
            time.sleep(0.01)

    def __getattr__(self, name):                                        # isatty, fileno, encoding, ...
        return getattr(self.stream, name)


def script(main, then=""):
    """main() as a command: Ctrl-C ends it in one line, `then` at its end, and printing never holds it up."""
    sys.stdout, sys.stderr = Screen(sys.stdout), Screen(sys.stderr)
    try:
        main()
    except BaseException as e:
        if sys.stderr.last != "\n":                                     # a progress bar's line
            sys.stderr.write("\n")
        if isinstance(e, KeyboardInterrupt):
            sys.exit("stopped by Ctrl-C" + then)
        raise


# ------------------------------------------------------------------------------------------------------------
# Random numbers by key: of toy images here, of all noise in diffusion.py

def splitmix64(state, n=0):
    """Random int64: number n = 0, 1, ... of the generator in `state` [Steele, Lea, Flood 2014]. Of ints or
    int64 tensors; keys the noise of diffusion.py too."""
    def xor_shift(x, k):
        return x ^ ((x >> k) & (2 ** (64 - k) - 1))                     # the mask: >> repeats the sign bit

    x = state + (n + 1) * (0x9E3779B97F4A7C15 - 2**64)                  # the published constants, as signed
    x = xor_shift(x, 30) * (0xBF58476D1CE4E5B9 - 2**64)                 # numbers; all of it wraps around
    x = xor_shift(x, 27) * (0x94D049BB133111EB - 2**64)
    return xor_shift(x, 31)


def hash_uniform(index, n, salt):
    """index (B,) int64 -> (B, n) fp32 in [0, 1), a function of index and salt."""
    counter = index[:, None] * n + torch.arange(n) + (salt << 48)
    return ((splitmix64(0, counter) >> 40) & (2**24 - 1)).float() * 2.0**-24


# ------------------------------------------------------------------------------------------------------------
# Images: folders and files

Image.preinit()                                                         # the common formats, tried first
Image.init()                                                            # and all others
# EPS runs Ghostscript; the others pillow knows by name, but does not decode
FORMATS = [kind for kind in Image.ID if kind not in ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")]
SUFFIXES = {suffix for suffix, kind in Image.EXTENSION.items() if kind in FORMATS}
warnings.filterwarnings("ignore", module="PIL")                         # of sizes and of odd metadata
IN_A_ROW = 10                                                           # broken images replaced [ours]


class Unreadable(Exception):
    """A file that does not decode as an image, and why."""


def open_images(path, size, train=False, seed=0):
    """A folder, a .zip of it, or "toy" -> Dataset of (img (3, size, size), label); .num_classes, .classes.
    train: random crops and mirrors, drawn from `seed`; of toy images the training set. InputError: no folder,
    or no readable image in it."""
    if not 1 <= size <= 2**13:
        raise InputError(f"--image_size {size}: must lie in 1 .. {2**13}")
    if str(path) == "toy":
        return ToyImages(size, train)
    if not holds_images(path):
        raise InputError(f"--data {path}: no such folder or .zip (images, or one folder per class; or toy)")
    return ImageFolder(path, size, train, seed)


def evenly_spaced(data, num=None):
    """`num` indices over all class folders; of toy images, whose classes take turns, the first ones."""
    n = min(num or len(data), len(data))
    if isinstance(data, ToyImages):
        return list(range(n))
    return [i * len(data) // n for i in range(n)]


class Images(torch.utils.data.Dataset):
    """get_batch(indices, keys) -> img (B, 3, size, size), label (B,); (seed, key) decides the random crop."""

    def __getitem__(self, i):
        img, label = self.get_batch([i], [i])
        return img[0], label.item()


class ImageFolder(Images):
    """Class folders (labels follow the sorted names) or a flat folder (num_classes 0, label 0)."""

    def __init__(self, path, size, train, seed):
        self.path = path
        self.size = size
        self.train = train
        self.seed = seed
        found, others = list_images(str(path))
        self.classes = sorted({folder for _, folder in found} - {"."})
        self.num_classes = len(self.classes)
        number = {name: i for i, name in enumerate(self.classes or ["."])}
        labelled = [(file, number[folder]) for file, folder in found if folder in number]
        if not labelled:
            raise InputError(f"--data {path}: no images in there (.jpg, .png, .webp, what else pillow reads)")
        others["images beside class folders"] = len(found) - len(labelled)
        if os.environ.get("RANK", "0") == "0":
            print(f"{path}: {len(labelled)} images, {self.num_classes} classes; {left_out(others)}")
        self.files, self.labels = zip(*labelled)
        self.bad = torch.zeros(len(self.files), dtype=torch.bool).share_memory_()   # between loader processes
        self.read(0)

    def __len__(self):
        return len(self.files)

    def get_batch(self, indices, keys):
        imgs, labels = [], []
        for i, key in zip(indices, keys):
            image, label = self.read(int(i))
            if self.train:
                image = train_crop(image, self.size, np.random.default_rng((self.seed, int(key))))
            else:
                image = center_crop(image, self.size)
            imgs.append(to_float(image))
            labels.append(label)
        return torch.stack(imgs), torch.tensor(labels)

    def read(self, i):
        """The image at i and its label; where that does not decode, those of the next index that does.
        InputError where more than IN_A_ROW do not: something larger than a file is broken."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        for k in range(min(len(self), IN_A_ROW + 1)):
            j = (i + k) % len(self)
            if self.bad[j]:
                continue
            try:
                image = read_image(self.files[j], 2 * self.size, only_large=not self.train)
                return image, self.labels[j]
            except Unreadable as e:
                self.bad[j] = True                                      # so that it is named once
                text = f"{self.files[j]}: unreadable, replaced by the next image ({str(e)[:60]})"
                print(text, file=sys.stderr)
        raise InputError(f"--data {self.path}: {k + 1} images in a row cannot be read, from "
                         f"{os.path.basename(self.files[i])} on; repair or remove them")


def holds_images(path):
    """Whether it is a folder, or a .zip of one."""
    return os.path.isdir(path) or str(path).endswith(".zip") and os.path.isfile(path)


def list_images(path):
    """-> [(file, class folder or "." at the top)] in sorted order, of all that pillow reads, and a Counter of
    other files by suffix. Hidden names are skipped. path: a folder, or a .zip that holds the same."""
    found, others = [], Counter()
    for file, label in patiently(walk_zip if os.path.isfile(path) else walk, path):
        suffix = os.path.splitext(file)[1].lower()
        if suffix in SUFFIXES:
            found.append((file, label))
        else:
            others[suffix or "without suffix"] += 1
    return found, others


def walk(path):
    """All files, (file, label). Links are followed, but within a class no folder is entered twice, so that
    loops end. OSError: a folder does not open."""
    def stop(error):
        raise error

    files, entered = [], set()
    for root, folders, names in os.walk(path, onerror=stop, followlinks=True):
        label = os.path.relpath(root, path).split(os.sep)[0]
        place = os.path.realpath(root)
        if (label, place) in entered or (".", place) in entered:
            folders.clear()
            continue
        entered.add((label, place))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        files += [(os.path.join(root, name), label) for name in sorted(names) if name[0] != "."]
    return files


def walk_zip(path):
    """All files as f"{path}/{member}", in walk's order; where all lie in folders of one single folder, that
    one does not count."""
    names = [info.filename.split("/") for info in open_zip(path, os.getpid()).infolist() if not info.is_dir()]
    names = [name for name in names if not any(part[:1] == "." or part == "__MACOSX" for part in name)]
    names.sort(key=lambda name: (name[:-1], name[-1]))                  # by folder: files come first
    top = int(len({name[0] for name in names}) == 1 and min(map(len, names)) > 2)
    return [("/".join([path, *name]), name[top] if len(name) > top + 1 else ".") for name in names]


@lru_cache(16)
def open_zip(path, pid):                                                # processes share no open file
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise InputError(f"{path}: no folder, and not a whole .zip") from None


def in_zip(file):
    """Of "train.zip/cat/1.png": the archive, and the name in it. Of other files None."""
    archive, slash, name = file.partition(".zip/")
    if slash and os.path.isfile(archive + ".zip"):
        return open_zip(archive + ".zip", os.getpid()), name
    return None


def file_size(file):
    if member := in_zip(file):
        archive, name = member
        return archive.getinfo(name).file_size
    return os.stat(file).st_size


def left_out(others):
    """A Counter of files -> words."""
    return "left out: " + (", ".join(f"{n} {what}" for what, n in others.most_common(6) if n) or "nothing")


def read_bytes(file):
    """What a file, also one in a .zip, holds; a named pipe nothing, where a read would wait for ever."""
    if member := in_zip(file):
        archive, name = member
        return archive.read(name)
    return b"" if Path(file).is_fifo() else Path(file).read_bytes()


def read_image(path, at_least=None, only_large=False):
    """Any file -> PIL RGB in sRGB, turned by its EXIF, transparency over white. Unreadable: what does not
    decode. InputError: what the system cannot read. at_least: a JPEG may be decoded smaller, which is faster;
    both sides stay >= that. only_large: only where it has more pixels than pillow allows (178,956,970)."""
    try:
        return decode(patiently(read_bytes, str(path)), at_least, only_large)
    except InputError:
        raise
    except Exception as e:                                              # pillow raises nearly all there are
        raise Unreadable(f"{type(e).__name__}: {e}".split(" <")[0]) from None


def decode(data, at_least, only_large):
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None        # pillow would refuse before draft
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    most = 2 * (limit or math.inf)                                      # where pillow refuses
    if at_least and (not only_large or image.width * image.height > most):
        image.draft(None, (at_least, at_least))
    if image.width * image.height > most:
        raise ValueError(f"{image.width} x {image.height} pixels, more than {most}")
    profile = image.info.get("icc_profile")
    grey16 = ";" in image.mode or image.mode == "I" and image.format in ("PNG", "PPM")
    if image.format == "PNG" and "transparency" in image.info:
        image.info["transparency"] = eight_bits(image.info["transparency"], image.tile[0][3])
    image.load()
    with suppress(Exception):                                           # broken EXIF data counts as none
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":
        image = scale_grey(image, [65535] if grey16 else [1, 255, 65535])
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    image = to_srgb(image, profile)
    if alpha:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return image


def eight_bits(transparent, raw):
    """A PNG's transparent value, of pixels stored as `raw` -> of the 8-bit pixels that pillow makes of it."""
    if raw == "RGB;16B":
        return tuple(k >> 8 for k in transparent)
    return transparent * {"L;2": 85, "L;4": 17}.get(raw, 1)


def scale_grey(image, whites):
    """-> 8 bits. White is the first of `whites` that holds the largest value, and any transparent value."""
    x = np.asarray(image).astype(np.float64)
    white = next((k for k in whites if 0 <= x.min() and x.max() <= k), None)
    if white is None:
        raise ValueError("values that are no number, below 0, or above 65535")
    y = (x / (white / 255)).round()
    y[x == image.info.get("transparency")] = 255
    return Image.fromarray(y.astype(np.uint8))


def to_srgb(image, profile):
    """By its ICC profile -> RGB. Where that is broken, or for other kinds of pictures, as pillow converts."""
    if profile:
        with suppress(Exception):
            plain = image.convert({"LA": "L", "L": "L", "CMYK": "CMYK"}.get(image.mode, "RGB"))
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(plain, io.BytesIO(profile), srgb, outputMode="RGB")
    return image.convert("RGB")


def center_crop(image, size):
    """ADM's centre crop: halve by box while >= 2x, bicubic to the short side, cut the middle. [ours] Strips
    of more than 10 squares lose their ends before (which may move the middle, by less than a pixel)."""
    x, y = (max(0, side - 10 * min(image.size)) // 2 for side in image.size)
    image = ImageOps.crop(image, (x, y))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    image = ImageOps.scale(image, size / min(image.size), Image.BICUBIC)
    x = (image.width - size) // 2
    y = (image.height - size) // 2
    return image.crop((x, y, x + size, y + size))


def train_crop(image, size, rng):
    """[ours] Short side drawn from [size, 1.25 size], in it a random square, mirrored half of the time."""
    side = min(image.size) / rng.uniform(1, 1.25)                       # of the square, in the given image
    x = rng.random() * (image.width - side)
    y = rng.random() * (image.height - side)
    image = image.resize((size, size), Image.BICUBIC, box=(x, y, x + side, y + side))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def to_float(image):
    """PIL RGB -> img (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 127.5 - 1


def to_uint8(img):
    """img (B, 3, H, W) -> pixels, uint8 (B, H, W, 3): clipped, rounded to nearest. InputError where some are
    not finite: they would be black."""
    lost = (~img.flatten(1).isfinite().all(1)).sum().item()
    if lost:
        raise InputError(f"{lost} of {len(img)} pictures are not finite: damaged weights in --ckpt, --ae or "
                         "--init, or too large a --guidance")
    pixels = ((img.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous()


def save_grid(pixels, path, ncol, titles=None, rows=None):
    """(B, H, W, 3), or a list of (H, W, 3) -> PNG, ncol in a row. titles, rows: captions of columns, rows.
    Of other numbers of channels the first three are shown, or the first."""
    H = max(tile.shape[0] for tile in pixels)
    W = max(tile.shape[1] for tile in pixels)
    zoom = max(1, 64 // max(H, W))                                      # tiny pictures are enlarged
    step_x = zoom * W + 2
    step_y = zoom * H + 2
    left = 8 + 6 * max(map(len, rows)) if rows else 0                   # room for captions
    top = 14 if titles else 0
    sheet = Image.new("RGB", (left + ncol * step_x, top + math.ceil(len(pixels) / ncol) * step_y), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(10)
    for i, tile in enumerate(pixels):
        x = left + i % ncol * step_x
        y = top + i // ncol * step_y
        image = Image.fromarray(np.asarray(tile[..., :3] if tile.shape[-1] >= 3 else tile[..., 0]))
        sheet.paste(ImageOps.scale(image, zoom, Image.NEAREST), (x, y))
        if rows and i % ncol == 0:
            pen.text((2, y + zoom * H // 2 - 6), rows[i // ncol], "black", font)
        if titles and i < ncol:
            pen.text((x + 2, 1), titles[i], "black", font)
    sheet.save(f"{path}.tmp", "PNG")                                    # a kill leaves no half picture
    os.replace(f"{path}.tmp", path)


# ------------------------------------------------------------------------------------------------------------
# Toy images [ours]: functions of their index, an object (structure) under stripes and grain (detail)

def box(x, y, a, b):
    return torch.maximum(x.abs() - a, y.abs() - b)


def star(x, y):
    """Five tips at radius 1, five dents at 0.45."""
    angle = torch.remainder(torch.atan2(x, -y) + math.pi / 5, math.pi / 2.5) - math.pi / 5
    r = torch.hypot(x, y)                                               # angle: folded into one tip's sector
    edge_x = 0.45 * math.sin(math.pi / 5)                               # from tip to dent
    edge_y = 0.45 * math.cos(math.pi / 5) - 1
    return ((r * angle.cos() - 1) * edge_x - r * angle.sin().abs() * edge_y) / math.hypot(edge_x, edge_y)


def heart(x, y):
    lobe = torch.hypot(x.abs() - 0.42, y + 0.3) - 0.48
    tip = torch.maximum((x.abs() + (y - 0.04).abs()) * 0.707 - 0.537, -0.3 - y)
    return torch.minimum(lobe, tip)


# Signed distances (negative inside) to ten objects in the unit disk, y down. None is another one turned by up
# to 12 degrees: every picture shows its class.
SHAPES = {
    "disk": lambda x, y: torch.hypot(x, y) - 0.85,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.70).abs() - 0.22,
    "square": lambda x, y: box(x, y, 0.72, 0.72),
    "triangle": lambda x, y: torch.maximum(y - 0.6, 0.866 * x.abs() - 0.5 * y - 0.45),
    "plus": lambda x, y: torch.minimum(box(x, y, 0.28, 0.92), box(x, y, 0.92, 0.28)),
    "star": star,
    "moon": lambda x, y: torch.maximum(torch.hypot(x, y) - 0.9, 0.72 - torch.hypot(x - 0.45, y)),
    "hourglass": lambda x, y: torch.maximum(y.abs() - 0.88, (x.abs() - y.abs() - 0.06) * 0.707),
    "heart": heart,
    "bars": lambda x, y: box(x, y.abs() - 0.52, 0.85, 0.26),
}
COLOURS = torch.tensor([[0.9, 0.3, 0.25], [0.3, 0.75, 0.3], [0.3, 0.45, 0.95],
                        [0.9, 0.8, 0.25], [0.85, 0.4, 0.85], [0.3, 0.8, 0.85]])


class ToyImages(Images):
    """One of ten objects (the class) on plain dark ground, the same picture at any size. No use for keys."""
    classes = list(SHAPES)
    num_classes = len(SHAPES)

    def __init__(self, size, train):
        self.size = size
        self.train = train

    def __len__(self):
        return 1_000_000

    def get_batch(self, indices, keys=None):
        S = self.size
        index = torch.as_tensor(indices, dtype=torch.int64)
        if index.min() < 0 or index.max() >= len(self):
            raise IndexError(f"toy images are numbered 0 to {len(self) - 1}")
        label = index % len(SHAPES)
        # Salts: 1, 2 of evaluation's and of training's objects, 3, 4 of their grain
        u = hash_uniform(index, 9, 1 + self.train)[:, :, None, None]    # u[:, k]: (B, 1, 1)
        radius = 0.26 + 0.14 * u[:, 0]                                  # in picture widths
        turn = math.radians(24) * (u[:, 1] - 0.5)                       # up to 12 degrees
        pixel = ((torch.arange(S) + 0.5) / S)[None]                     # centres of pixels, (1, S)
        x = pixel[:, None, :]                                           # (1, 1, S)
        y = pixel[:, :, None]                                           # (1, S, 1)

        # Stripes across the whole picture
        cycles = 6 + 2 * u[:, 2]
        tilt = math.pi * u[:, 3]
        phase = cycles * (x * tilt.cos() + y * tilt.sin()) + u[:, 4]    # (B, S, S)
        stripes = (2 * math.pi * phase).sin()[:, None]                  # (B, 1, S, S)

        # The object, in its own frame
        x = (x - radius - (1 - 2 * radius) * u[:, 5]) / radius
        y = (y - radius - (1 - 2 * radius) * u[:, 6]) / radius
        x, y = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()             # (B, S, S)
        distance = torch.empty_like(x)
        for k, shape in enumerate(SHAPES.values()):
            rows = label == k
            distance[rows] = shape(x[rows], y[rows])
        inside = (0.5 - distance * radius * S).clamp(0, 1)[:, None]     # antialiased over one pixel

        # Colours in [0, 1]
        colour = COLOURS[(u[:, 7, 0, 0] * len(COLOURS)).long()][:, :, None, None]           # (B, 3, 1, 1)
        ground = 0.06 + 0.12 * u[:, 8:9]                                # (B, 1, 1, 1)
        grain = hash_uniform(index, S * S, 3 + self.train).view(-1, 1, S, S) - 0.5
        picture = ground + inside * (colour * (0.85 + 0.15 * stripes) - ground) + 0.02 * grain
        return 2 * picture - 1, label


# ------------------------------------------------------------------------------------------------------------
# Weight files: checkpoints and published weights

FILES = ("ckpt.pt", "ckpt_prev.pt", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
         "model.safetensors", "pytorch_model.bin", "model.pt", "*.index*.json", "*.safetensors")
HUB = (r"(mit-han-lab|dc-ai)/dc-ae-[\w.-]+", "dc-ai/dc-ae-1.5-f64c128")        # published names, and one
NOT_DOWNLOADED = "{0}: named by a checkpoint, not by you; to download it, pass --ae {0} yourself"
DIGEST = b"sha256 "                                                     # marks a checkpoint's zip comment


def find_weights(x, names, hub, download=True):
    """x: a file, a folder, or a published name -> Path of the file. names: what a folder is searched for, in
    order, * allowed. hub: like HUB. download=False: no network, the name came out of a stranger's file."""
    path = Path(x)
    pattern, example = hub
    if not os.path.exists(path) and re.fullmatch(pattern, str(x)):
        path = fetch(str(x), download)
    if os.path.isdir(path):
        found = [file for name in names for file in sorted(path.glob(name)) if file.is_file()]
        if not found:
            raise InputError(f"{x}: no {names[0]}, {names[1]} or the like in this folder")
        return found[0]
    if not os.path.isfile(path):
        raise InputError(f"{x}: no such checkpoint (a file, a folder, or a published name like {example})")
    return path


def fetch(name, download):
    """A name on the Hugging Face hub -> the folder in that package's cache that holds its files."""
    url = f"https://huggingface.co/{name}"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(f"{name}: pip install huggingface_hub, or name a folder that holds {url}") from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"],
                                      local_files_only=not download))
    except Exception:                                                   # of the network, the hub, or the disk
        lost = f"{name}: no download; put the files of {url} into a folder, and name that"
        raise InputError(lost if download else NOT_DOWNLOADED.format(name)) from None


class Damaged(InputError):
    """A file of weights that was read, but holds something else."""


def open_weights(x, names=FILES, hub=HUB, download=True):
    """(file, its content) of what find_weights finds. Where a run's ckpt.pt is damaged, those of the
    ckpt_prev.pt beside it, with a line that says so."""
    file = find_weights(x, names, hub, download)
    before = file.with_name("ckpt_prev.pt")
    try:
        return file, read_weights(file)
    except Damaged as e:
        if file.name != "ckpt.pt" or not before.exists():
            raise
        try:
            content = read_weights(before)
        except Damaged as worse:
            raise Damaged(f"{e}; {worse}") from None
        print(f"{str(e)[:110]}; using {before}, of step {content.get('step')}", file=sys.stderr)
        return before, content


def read_weights(file):
    """Path -> dict of tensors and plain values; of an index.json those of all its files. Memory-mapped: what
    is not used, costs nothing. Damaged: truncated, some bits flipped, or no weights at all."""
    if re.search(r"-\d{5}-of-\d{5}\.", file.name):
        raise InputError(f"{file}: one of several files; name their folder, or the index.json in it")
    try:
        if file.suffix != ".json":
            content = patiently(load_file, file)
        else:
            content = {}
            for name in sorted(set(read_json(file)["weight_map"].values())):
                content |= patiently(load_file, file.with_name(name))
    except InputError:
        raise
    except Exception as e:
        reason = type(e).__name__
        raise Damaged(f"{file}: truncated, damaged, or not a file of plain tensors ({reason})") from None
    if not isinstance(content, dict):
        raise Damaged(f"{file}: holds a {type(content).__name__}, a checkpoint (dict) is needed")
    return content


def load_file(file):
    if file.suffix == ".safetensors":
        return import_safetensors().torch.load_file(file)
    stored = False                                                      # whether a memory map can read it
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as z:
            check_zip(z, file)
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in z.infolist())
    with torch.serialization.safe_globals([argparse.Namespace]):        # in DiT's and SiT's files
        return torch.load(file, map_location="cpu", weights_only=True, mmap=stored)


def read_json(file):
    """Path -> dict; empty where there is no such file."""
    try:
        content = json.loads(file.read_text("utf-8")) if os.path.isfile(file) else {}
        return dict(content.items())
    except Exception as e:
        raise InputError(f"{file}: not a JSON dict ({type(e).__name__}); get it anew, or remove it") from None


def plain_names(tensors):
    """Tensors by name, without what DataParallel, torch.compile or Lightning put before it. Raises where
    there is something else, or a shape that claims more than the file holds."""
    for name, t in tensors.items():
        if t.is_complex() or t.numel() * t.element_size() > t.untyped_storage().nbytes():
            raise ValueError(f"{name}: complex, or it claims to be larger than the file")
    return {re.sub(r"^((module|model|_orig_mod)\.)+|_orig_mod\.", "", name): t for name, t in tensors.items()}


def check_zip(z, file):
    """By the digest that write_checkpoint left at its end, else by the zip's own sums, neither of which
    torch.load does. ValueError: damaged."""
    if z.comment or np.memmap(file, mode="r")[-2:].any():               # the length of a comment that was cut
        if z.comment != digest(file):
            raise ValueError("another digest")
    elif z.testzip():
        raise ValueError("another checksum")


def write_checkpoint(content, file, keep=None):
    """torch.save, safely: to a temporary file, whose last bytes are a digest of all bytes before; flushed to
    the disk, then renamed. A kill at any moment leaves the old file or the new one. keep: the name that the
    old one gets."""
    part = f"{file}.tmp"
    try:
        torch.save(content, part)
    except RuntimeError as e:
        if "inline_container" not in str(e):                            # torch's writer of zips
            raise
        Path(part).unlink(missing_ok=True)
        raise OSError(errno.ENOSPC, "could not be written to its end; is the disk full?", part) from e
    with zipfile.ZipFile(part, "a") as z:
        z.comment = DIGEST + bytes(64)                                  # room for it
    end = digest(part)
    write(part, os.path.getsize(part) - len(end), end)
    if keep and os.path.exists(file):
        os.replace(file, keep)
    os.replace(part, file)


def digest(file):
    """DIGEST + sha256, in hexadecimal, of all of the file but its last 64 bytes."""
    return DIGEST + hashlib.sha256(np.memmap(file, mode="r")[:-64]).hexdigest().encode()


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise InputError(".safetensors files need one more package: pip install safetensors") from None
    return safetensors


def read_checkpoint(path):
    """One of our own checkpoints (a dict with "kind"): a file, or the run folder that holds ckpt.pt."""
    file, content = open_weights(path)
    if "kind" not in content:
        raise InputError(f"{file}: not a checkpoint of this repository, but perhaps published weights")
    return content


def fingerprint(module):
    """A short hash of all tensors: a latent cache remembers which weights wrote it."""
    h = hashlib.sha256()
    for name, t in sorted(module.state_dict().items()):
        h.update(f"{name} {tuple(t.shape)} {t.dtype}".encode())
        h.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return h.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------
# Our checkpoints and published autoencoders

# Tensor names: ours, official (DC-Gen, efficientvit), diffusers; # is a stage or block number
BLOCK_NAMES = (
    ("conv", "main.conv.conv", "conv"),
    ("conv1", "main.conv1.conv", "conv1"),
    ("conv2", "main.conv2.conv", "conv2"),
    ("norm", "main.conv2.norm", "norm"),
    ("attn.qkv", "context_module.main.qkv.conv", "attn.to_qkv"),        # diffusers' files: to_q, to_k, to_v
    ("attn.proj", "context_module.main.proj.conv", "attn.to_out"),
    ("attn.norm", "context_module.main.proj.norm", "attn.norm_out"),
    ("mlp.inverted", "local_module.main.inverted_conv.conv", "conv_out.conv_inverted"),
    ("mlp.depth", "local_module.main.depth_conv.conv", "conv_out.conv_depth"),
    ("mlp.point", "local_module.main.point_conv.conv", "conv_out.conv_point"),
    ("mlp.norm", "local_module.main.point_conv.norm", "conv_out.norm"))
NAMES = (
    ("encoder.project_in.conv", "encoder.project_in.conv.conv", "encoder.conv_in.conv"),
    ("encoder.project_out", "encoder.project_out.op_list.0.conv", "encoder.conv_out"),
    ("decoder.project_in", "decoder.project_in.conv", "decoder.conv_in"),
    ("decoder.project_out.norm", "decoder.project_out.op_list.0", "decoder.norm_out"),
    ("decoder.project_out.up.conv", "decoder.project_out.op_list.2.conv.conv", "decoder.conv_out.conv"),
    *((f"{side}.stages.#.#.{a}", f"{side}.stages.#.op_list.#.{b}", f"{side}.{blocks}.#.#.{c}")
      for side, blocks in (("encoder", "down_blocks"), ("decoder", "up_blocks")) for a, b, c in BLOCK_NAMES))
OURS, OFFICIAL, DIFFUSERS = range(3)                                    # columns of both tables
NUMBERS = r"(stages|blocks)\.(\d{1,4})(\.op_list|)\.(\d{1,4})"

# Scaling factors of published names [DC-Gen c2icore], 1.5 in both orders that were used; of others it is
# measured when their latents are cached
SCALES = {
    "dc-ae-f32c32-in-1.0": 0.3189,
    "dc-ae-f64c128-in-1.0": 0.2889,
    "dc-ae-f64c128-1.5": 0.5935,
    "dc-ae-1.5-f64c128": 0.5935,
}


def read_ours(content):
    """One of our checkpoints -> config, tensors (the average where there is one), scale, info."""
    if content["kind"] != "ae":
        raise InputError(f"a {content['kind']} checkpoint, an autoencoder is needed here")
    info = {key: content[key] for key in ("image_size", "step", "channels") if key in content}
    if not are_sizes(info.get("image_size", 1), *info.get("channels", ())):
        raise ValueError("its image_size or channels")
    tensors = plain_names(content.get("ema") or content["model"])
    return AEConfig(**content["config"]), tensors, content["scale"], info


def read_published(content, file):
    """Tensors under official or diffusers' names -> config, tensors, scale, info."""
    for key in ("state_dict", "model"):
        content = content.get(key, content)
    tensors = to_ours(plain_names(content))
    settings = read_json(file.with_name("config.json"))
    scale = settings.get("scaling_factor")
    for name, published in SCALES.items():
        if not scale and name in f"{file.absolute()} {settings}":
            scale = published
    return read_config(tensors), tensors, scale or 1.0, {}


def rename(name, src, dst):
    """A tensor's name in column dst, from its name in column src. KeyError, ValueError: unknown."""
    stem, leaf = name.rsplit(".", 1)
    numbers = re.search(NUMBERS, stem)
    table = {row[src]: row[dst] for row in NAMES}
    new = table[re.sub(NUMBERS, r"\1.#\3.#", stem)]
    if numbers:
        new = new.replace("#", numbers[2], 1).replace("#", numbers[4], 1)
    return f"{new}.{leaf}"


def to_ours(tensors):
    """Official or diffusers' tensors -> ours."""
    column = OFFICIAL
    if any("_blocks." in name for name in tensors):
        column = DIFFUSERS
        tensors = fuse_qkv(tensors)
    ours = {}
    for name, t in tensors.items():
        plain = re.sub(r"(project_\w+)\.main\.", r"\1.", name)          # 1.0 has shortcuts around a .main
        try:
            ours[rename(plain, column, OURS)] = t
        except (KeyError, ValueError):
            raise InputError(f"unknown tensor {name[:60]!r} (sana variants are not read)") from None
    return ours


def fuse_qkv(tensors):
    """Of diffusers' linear layers to_q, to_k, to_v, to_out in attention: 1x1 convolutions to_qkv, to_out."""
    fused = {}
    for name, t in tensors.items():
        if ".attn.to_k." in name or ".attn.to_v." in name:
            continue                                                    # went with to_q
        if ".attn.to_q." in name:
            thirds = [name.replace("to_q", part) for part in ("to_q", "to_k", "to_v")]
            t = torch.cat([tensors[third] for third in thirds if third in tensors])
            name = name.replace("to_q", "to_qkv")
        if ".attn.to_" in name:
            t = t[:, :, None, None]
        fused[name] = t
    return fused


def to_diffusers(tensors):
    """A state_dict of ours -> diffusers'."""
    theirs = {}
    for name, t in tensors.items():
        name = rename(name, OURS, DIFFUSERS)
        t = t.contiguous()
        if ".attn.to_" in name:
            t = t[:, :, 0, 0]
        if ".attn.to_qkv." in name:
            for part, third in zip(("to_q", "to_k", "to_v"), t.chunk(3)):
                theirs[name.replace("to_qkv", part)] = third.clone()    # safetensors writes no views
        else:
            theirs[name] = t
    return theirs


def read_config(tensors):
    """AEConfig, off our tensors: every block has one norm (EfficientViT: attn.norm), as wide as its stage."""
    sizes = {}
    for side in ("encoder", "decoder"):
        norm = re.compile(side + r"\.stages\.(\d{1,4})\.\d+\.(attn\.)?norm\.weight")
        blocks = [(int(found[1]), len(t)) for name, t in tensors.items() if (found := norm.fullmatch(name))]
        widths = dict(sorted(blocks))                                   # of each stage but the empty one
        if [*widths][:2] != [1, 2] or "encoder.project_out.bias" not in tensors:
            raise InputError("not complete (sana variants are not read)")
        depths = Counter(stage for stage, _ in blocks)
        sizes[side + "_widths"] = (widths[1] // 2, *widths.values())
        sizes[side + "_depths"] = (0, *(depths[stage] for stage in widths))
    if len(sizes["encoder_widths"]) != len(sizes["decoder_widths"]):
        raise InputError("not complete (sana variants are not read)")
    version = "1.0" if any(name.endswith("running_mean") for name in tensors) else "1.5"
    return AEConfig(f=2 ** len(widths), c=len(tensors["encoder.project_out.bias"]), version=version,
                    width=sizes["encoder_widths"][0],
                    in_channels=tensors["encoder.project_in.conv.weight"].shape[1], **sizes)


def diffusers_settings(config):
    """config.json of a diffusers AutoencoderDC that computes what DCAE(config) does."""
    old = config.version == "1.0"
    stages = range(len(config.encoder_widths))
    blocks = ["EfficientViTBlock" if old and i >= 3 else "ResBlock" for i in stages]
    return {
        "_class_name": "AutoencoderDC",
        "in_channels": config.in_channels,
        "latent_channels": config.c,
        "attention_head_dim": 32,
        "encoder_block_types": blocks,
        "decoder_block_types": blocks,
        "encoder_block_out_channels": config.encoder_widths,
        "decoder_block_out_channels": config.decoder_widths,
        "encoder_layers_per_block": config.encoder_depths,
        "decoder_layers_per_block": config.decoder_depths,
        "encoder_qkv_multiscales": [[] for _ in stages],
        "decoder_qkv_multiscales": [[] for _ in stages],
        "upsample_block_type": "pixel_shuffle",
        "downsample_block_type": "pixel_unshuffle",
        "decoder_norm_types": ["batch_norm" if old and i < 3 else "rms_norm" for i in stages],
        "decoder_act_fns": ["relu" if old and i < 3 else "silu" for i in stages],
        "encoder_out_shortcut": old,
        "decoder_in_shortcut": old,
        "decoder_conv_act_fn": "relu" if old else "silu",
    }


class DiffusersKL(nn.Module):
    """A diffusers AutoencoderKL (SD-VAE-f8c4, Flux-VAE-f8c16: Table 4 of the paper) behind DCAE's names."""

    def __init__(self, x):
        super().__init__()
        settings = read_json(Path(x, "config.json"))
        widths, depth = settings.get("block_out_channels", [64]), settings.get("layers_per_block", 1)
        try:
            from diffusers import AutoencoderKL
            if not are_sizes(*widths, depth) or len(widths) > 12 or max(*widths, 128 * depth) > 4096:
                raise ValueError(f"block_out_channels {widths}, layers_per_block {depth}")
            self.vae = AutoencoderKL.from_pretrained(x, use_safetensors=True)   # the others are pickles
            config = self.vae.config
            self.scale = float(config.scaling_factor)
            self.shift = float(config.shift_factor or 0)
        except Exception as e:
            reason = " ".join(str(e).split())[:80]
            raise InputError(f"{x}: no such folder, nor a diffusers AutoencoderKL ({reason})") from None
        f = 2 ** (len(config.block_out_channels) - 1)
        self.config = SimpleNamespace(f=f, c=config.latent_channels, version="kl", in_channels=3)
        self.info = {}

    def encode(self, img):
        return self.vae.encode(img).latent_dist.mean - self.shift

    def decode(self, z):
        return self.vae.decode(z + self.shift).sample


def open_autoencoder(x, download=True):
    """DCAE, or a diffusers AutoencoderKL where x is the folder or hub name of one. download=False: no
    network, as x is not the user's own word but came out of a file."""
    x = str(x)
    config = Path(x, "config.json")
    if os.path.exists(config):
        kl = "AutoencoderKL" in str(read_json(config))
    else:                               # owner/name on a hub; neither a run of ours (in out/) nor a DC-AE
        hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", x) and not Path(x).parent.exists()
        kl = hub_name and not x.startswith("out/") and "dc-ae" not in x
        if kl and not download:
            raise InputError(NOT_DOWNLOADED.format(x))
    return DiffusersKL(x).eval() if kl else DCAE.from_pretrained(x, download)


# ------------------------------------------------------------------------------------------------------------
# The paper's figures for given images

def open_pictures(paths, size, toy_size):
    """Image files or "toy" -> list of (name, img (3, H, W)); size: centre crop, None: as they are."""
    pictures = []
    for path in paths:
        if path == "toy":
            data = open_images("toy", size or toy_size)
            pictures += [(data.classes[i], data[i][0]) for i in range(4)]
            continue
        try:
            image = read_image(path, size and 2 * size, only_large=True)
        except Unreadable as e:
            raise InputError(f"{path}: cannot be read as an image: {str(e)[:80]}") from None
        if size:
            image = center_crop(image, size)
        pictures.append((Path(path).stem[:12], to_float(image)))
    return pictures


def grey(x):
    """(n, h, w) -> pixels (n, h, w, 3), each map stretched from black to white."""
    low = x.amin((1, 2), keepdim=True)
    high = x.amax((1, 2), keepdim=True)
    pixels = ((x - low) / (high - low).clamp_min(1e-12) * 255).round().to(torch.uint8).cpu()
    return pixels[..., None].expand(-1, -1, -1, 3)


@torch.no_grad()
def draw_figures(models, pictures, channels, device, out):
    """A row for each picture and model, a column for each c'; PNGs in the folder out."""
    reconstructions, averages, rows = [], [], []
    for n, (name, img) in enumerate(pictures):
        H, W = img.shape[1:]
        original = to_uint8(img[None])[0]
        for which, ae in models.items():
            f = ae.config.f                                             # padded to multiples of f, cut later
            mode = "reflect" if f <= min(H, W) else "replicate"
            z = ae.encode(F.pad(img[None], (0, -W % f, 0, -H % f), mode).to(device))    # (1, c, h, w)
            recs = torch.cat([ae.decode(z[:, :k]) for k in channels])[:, :, :H, :W]
            means = torch.cat([z[:, :k].mean(1) for k in channels])     # (len(channels), h, w)
            means = means.repeat_interleave(f, 1).repeat_interleave(f, 2)[:, :H, :W]
            reconstructions += [original, *to_uint8(recs).cpu()]
            averages += [original, *grey(means)]
            rows.append(f"{name} {which}" if len(models) > 1 else name)
            ncol = math.ceil(ae.config.c ** 0.5)
            save_grid(grey(z[0]), out / f"latent_{n}_{which}.png", ncol)            # Figures 9, 10
    titles = ["input"] + [f"c'={k}" for k in channels]
    save_grid(reconstructions, out / "reconstruction.png", len(titles), titles, rows)   # Figure 3
    save_grid(averages, out / "channel_average.png", len(titles), titles, rows)         # Figure 2
    print(f"{out}: reconstruction.png, channel_average.png, latent_*.png")


def main(argv=None):
    p = Flags(description="Draw the paper's Figures 2, 3, 9 and 10 for given images.",
              usage="python ae.py IMAGE... --ckpt CKPT [--ckpt2 CKPT] --out DIR")
    p.add_argument("images", nargs="+", metavar="IMAGE", help="image files of any size, or toy")
    p.add_argument("--ckpt", required=True, help="run folder, checkpoint, published name or folder")
    p.add_argument("--ckpt2", help="a second one, drawn beside it (structured and unstructured, say)")
    p.add_argument("--channels", help="the c' to show, like 16,32,64,128 (default: c/8, c/4, c/2, c)")
    p.add_argument("--image_size", type=within(int, 1, 2**13),
                   help="centre-crop to this size first (default: as they are)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    p.add_argument("--out", required=True, help="folder for the PNGs")
    args = p.parse_args(argv)
    check_device(args.device)
    for path in args.images:
        if path != "toy" and not os.path.isfile(path):
            raise InputError(f"{path}: no such image file, nor toy")
    out = Path(make_folder(args.out))

    models = {"A": DCAE.from_pretrained(args.ckpt).to(args.device)}
    if args.ckpt2:
        models["B"] = DCAE.from_pretrained(args.ckpt2).to(args.device)
    c = min(ae.config.c for ae in models.values())
    channels = [max(1, c // k) for k in (8, 4, 2, 1)]
    if args.channels:
        channels = parse_channels(args.channels, c)
    pictures = open_pictures(args.images, args.image_size, models["A"].info.get("image_size", 256))
    with writing("--out", out):
        draw_figures(models, pictures, sorted(set(channels)), args.device, out)


if __name__ == "__main__":
    script(main)
