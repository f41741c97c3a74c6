"""Noise to pictures: solvers, guidance, `generate`, and the command line.

  python sample.py --toy                                                  # a grid, ten pictures per class
  python sample.py --ckpt out/USiT-H --c_prime 16                         # coarse: the first 16 channels
  torchrun --nproc_per_node 8 -- sample.py --ckpt out/USiT-H --n 50000    # samples.npz for fid.py

Default solvers: DiT ddpm, 250 respaced steps; UViT dpm, 30 evaluations; SiT and USiT dopri5 (adaptive).
Image i starts from, and uses, noise keyed by (seed, i) alone: batch size, ranks and devices change rounding,
nothing else. With c' < c the solvers run in the first c' channels only; the network sees zeros behind them,
as in training. The same command goes on with a run that was cut off.

Letters: b images, c latent channels, c' = c_prime kept ones, h w the latent's grid, H W pixels. Time t is the
family's own (diffusion.py): SiT and USiT go from 0 (noise) to 1 (data), DiT from 999 to 0, UViT from 1000
to 1.
"""
import json
import math
import os
import re
import shutil
import time
from collections import namedtuple
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import diffusion
from ae import (Flags, InputError, check_out, checksum, evenly_spaced, fingerprint, lock, make_folder,
                open_autoencoder, read_json, save_grid, script, synchronized_time, to_uint8, within, write,
                writing)
from diffusion import ddpm_schedule, gaussian, model_mean_log_var, vp_schedule

TOY = dict(ckpt="out/toy-diffusion", out="out/toy-samples", guidance=2.0)   # what --toy sets


# ----------------------------------------------------------------------------------------------------------
# Time, and the guided network


def log_alpha(net, t):
    """log sqrt(abar) at continuous t in [0.001, 1], linear between the 1000 training steps. fp64."""
    abar = vp_schedule() if net.objective == "vp" else ddpm_schedule().abar
    table = 0.5 * abar.log().to(t.device)
    i = (t.double() * 1000 - 1).clamp(0, 999)
    low = i.floor().long().clamp(max=998)
    return torch.lerp(table[low], table[low + 1], i - low)


def time_offset(net):
    """1 for DiT, whose discrete times are 0 .. 999; 0 for UViT, whose are 1 .. 1000."""
    return int(net.objective == "ddpm")


def flow_time(net, t):
    """The family's t -> signal / (signal + noise): 0 noise, 1 data; for flows t itself. --interval is
    measured in it: the same interval then means the same noise levels in every family."""
    if net.objective == "flow":
        return t
    alpha = log_alpha(net, (t.double() + time_offset(net)) / 1000).exp()
    sigma = (1 - alpha**2).sqrt()
    return alpha / (alpha + sigma)


def guided(net, y, guidance, interval):
    """model(x, t, rows) -> (prediction, v): the network with classifier-free guidance on all channels [all of
    DC-Gen's runs; the original DiT and SiT guide three].

    x (b, c', h, w) are the images `rows` of y, t is a number or (b,); v is what DiT says of its variance,
    else empty.
    """
    c = net.config["c"]

    def model(x, t, rows=slice(None)):
        b, k = x.shape[:2]
        z_t = F.pad(x, (0, 0, 0, 0, 0, c - k))                              # (b, c, h, w), zeros behind c'
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(b)
        s = flow_time(net, t)
        inside = (interval[0] <= s) & (s <= interval[1])
        g = inside.nonzero()[:, 0] if guidance != 1 else t[:0].long()       # the images guided at this t
        null = torch.full_like(g, net.config["num_classes"])

        # one pass: all images with their labels, then the guided ones without
        out = net(
            torch.cat([z_t, z_t[g]]),
            torch.cat([t, t[g]]),
            torch.cat([y[rows], null]),
        ).to(x.dtype)
        pred = out[:b, :k]
        pred_null = out[b:, :k]
        pred_guided = pred_null + guidance * (pred[g] - pred_null)
        return pred.index_copy(0, g, pred_guided), out[:b, c : c + k]

    return model


# ----------------------------------------------------------------------------------------------------------
# Solvers: (net, model, x at pure noise, steps, noise) -> x at data. noise(j): the j-th fresh Gaussian, from 1


def ddpm(net, model, x, steps, noise):
    """Ancestral sampling on respaced steps; the network is told the original indices."""
    kept = tuple(round(i * 999 / (steps - 1)) for i in range(steps))
    s = ddpm_schedule(kept, x.device, x.dtype)
    for j, i in enumerate(reversed(range(steps)), start=1):
        eps, v = model(x, kept[i])
        step = torch.full((len(x),), i, device=x.device)
        x, log_var = model_mean_log_var(s, step, x, eps, v)
        if i > 0:                                               # no noise at the last step
            x = x + (0.5 * log_var).exp() * noise(j)
    return x


def dpm_nodes(net, steps):
    """Lists of steps + 1 numbers: the network's t, evenly spaced from pure noise to almost none, and there
    alpha, sigma, lam = log(alpha / sigma)."""
    t = torch.linspace(1, 1 / 1000, steps + 1, dtype=torch.float64)
    log_a = log_alpha(net, t)
    var = -torch.expm1(2 * log_a)                               # sigma^2 = 1 - alpha^2
    return SimpleNamespace(
        t=(1000 * t - time_offset(net)).tolist(),
        alpha=log_a.exp().tolist(),
        sigma=var.sqrt().tolist(),
        lam=(log_a - 0.5 * var.log()).tolist(),
    )


def predict_data(model, x, nodes, i):
    """The data that the network sees behind x, which is at node i."""
    eps, _ = model(x, nodes.t[i])
    return (x - nodes.sigma[i] * eps) / nodes.alpha[i]


def phi(nodes, i, j):
    """exp(-h) - 1 of the step h in lam from node i to node j."""
    return np.expm1(nodes.lam[i] - nodes.lam[j])


def first_order(x, data, nodes, i, j):
    """x at node i -> at node j, as if the data were known (DDIM)."""
    return nodes.sigma[j] / nodes.sigma[i] * x - nodes.alpha[j] * phi(nodes, i, j) * data


def dpm(net, model, x, steps, noise):
    """DPM-Solver++, single-step "fast" (arXiv 2211.01095): third-order steps over three nodes, the rest of
    lower order."""
    nodes = dpm_nodes(net, steps)
    last = {0: [2, 1], 1: [1], 2: [2]}[steps % 3]
    orders = [3] * ((steps - sum(last)) // 3) + last
    i = 0
    for order in orders:
        n = i + order                                           # the step: i to n, by way of those between
        h = nodes.lam[n] - nodes.lam[i]
        data = predict_data(model, x, nodes, i)
        x_n = first_order(x, data, nodes, i, n)
        if order > 1:
            r1 = (nodes.lam[i + 1] - nodes.lam[i]) / h
            x_1 = first_order(x, data, nodes, i, i + 1)
            change_1 = predict_data(model, x_1, nodes, i + 1) - data
        if order == 2:
            x_n = x_n - 0.5 / r1 * nodes.alpha[n] * phi(nodes, i, n) * change_1
        if order == 3:
            r2 = (nodes.lam[i + 2] - nodes.lam[i]) / h
            slope = nodes.alpha[i + 2] * (phi(nodes, i, i + 2) / (r2 * h) + 1)
            x_2 = first_order(x, data, nodes, i, i + 2) + r2 / r1 * slope * change_1
            change_2 = predict_data(model, x_2, nodes, i + 2) - data
            x_n = x_n + 1 / r2 * nodes.alpha[n] * (phi(nodes, i, n) / h + 1) * change_2
        x = x_n
        i = n
    return x


def dpm2m(net, model, x, steps, noise):
    """DPM-Solver++ 2M: second order from the previous evaluation, one evaluation per step."""
    nodes = dpm_nodes(net, steps)
    lam = nodes.lam
    data_prev = None
    for i in range(steps):
        data = predict_data(model, x, nodes, i)
        mixed = data
        if data_prev is not None:
            mixed = data + 0.5 * (lam[i + 1] - lam[i]) / (lam[i] - lam[i - 1]) * (data - data_prev)
        x = first_order(x, mixed, nodes, i, i + 1)
        data_prev = data
    return x


def euler(net, model, x, steps, noise):
    for i in range(steps):
        v, _ = model(x, i / steps)
        x = x + v / steps
    return x


def heun(net, model, x, steps, noise):
    for i in range(steps):
        v, _ = model(x, i / steps)
        v_next, _ = model(x + v / steps, (i + 1) / steps)
        x = x + (v + v_next) / (2 * steps)
    return x


def sde(net, model, x, steps, noise):
    """Euler-Maruyama with diffusion w(t) = 1 - t on [0, 0.96], then one noise-free step of 0.04
    [SiT: "sigma", "Mean"]."""
    dt = 0.96 / (steps - 1)
    for i in range(steps):
        t = i * dt
        w = 1 - t
        v, _ = model(x, t)
        score = (t * v - x) / (1 - t)           # -E[noise] / (1 - t): x = t z + (1 - t) noise, v = z - noise
        drift = v + w * score
        if i == steps - 1:
            return x + drift * 0.04
        x = x + drift * dt
        x = x + (2 * w * dt) ** 0.5 * noise(i + 1)


# The tableau of Dormand and Prince 1980
DOPRI = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
DOPRI_C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
# fifth minus fourth order
DOPRI_ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def per_image(values, x):
    """(b,) -> (b, 1, 1, 1), in the precision of x."""
    return values.to(x.dtype).view(-1, 1, 1, 1)


def rms(x):
    """Of each image: (b, c', h, w) -> (b,)."""
    return x.flatten(1).double().square().mean(1).sqrt()


def weighted_sum(weights, slopes):
    return sum(weight * k for weight, k in zip(weights, slopes) if weight)


def dopri5(net, model, x, steps, noise, rtol=1e-3, atol=1e-6, smallest=1e-4):
    """Dormand-Prince 5(4). NOTE differs from torchdiffeq: the step is controlled per image, so that an image
    does not depend on its batch; images that have arrived leave the batch. Step rules (first step, 0.9,
    0.2 .. 10) as there [Hairer II.4]. smallest: a step below it is taken whatever its error [ours]."""
    rows = torch.arange(len(x), device=x.device)                # the images on their way
    result = torch.empty_like(x)
    t = torch.zeros(len(x), dtype=torch.float64, device=x.device)

    # The first step
    k1, _ = model(x, t)
    scale = atol + rtol * x.abs()
    d0 = rms(x / scale)
    d1 = rms(k1 / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    k2, _ = model(x + per_image(h0, x) * k1, h0)
    d2 = rms((k2 - k1) / scale) / h0
    h1 = (0.01 / torch.maximum(d1, d2).clamp(min=1e-9)) ** 0.2
    h = torch.minimum(100 * h0, h1)

    while len(rows):
        last = h >= 1 - t
        h = torch.where(last, 1 - t, h)
        slopes = [k1]
        for weights, node in zip(DOPRI, DOPRI_C):
            x_new = x + per_image(h, x) * weighted_sum(weights, slopes)
            k, _ = model(x_new, t + node * h, rows)
            slopes.append(k)                                    # the last one is the next step's first

        # Is the step good enough?
        error = per_image(h, x) * weighted_sum(DOPRI_ERROR, slopes)
        ratio = rms(error / (atol + rtol * torch.maximum(x.abs(), x_new.abs())))
        worst = error.flatten(1).abs().amax(1) / (atol + rtol / 2 * rms(x_new))
        ratio = torch.maximum(ratio, worst)                     # [ours] and no entry far off
        nonfinite = ~ratio.isfinite()                           # a network that says NaN ends here
        ok = (ratio <= 1) | (h < smallest) | nonfinite

        taken = ok.view(-1, 1, 1, 1)
        x = torch.where(taken, x_new, x)
        k1 = torch.where(taken, slopes[-1], k1)
        t = torch.where(ok, t + h, t)
        t = torch.where(nonfinite | (ok & last), 1.0, t)
        factor = 0.9 * ratio.clamp(min=1e-10) ** -0.2
        h = h * torch.where(ok, factor.clamp(1, 10), factor.clamp(0.2, 1))

        arrived = t >= 1
        result[rows[arrived]] = x[arrived]
        x, k1, h, rows, t = (values[~arrived] for values in (x, k1, h, rows, t))
    return result


# steps: the default [DC-Gen; heun, dpm++2m ours]; fewest; objectives that it fits
Solver = namedtuple("Solver", "function steps fewest objectives")
SOLVERS = {
    "ddpm": Solver(ddpm, 250, 2, ("ddpm",)),
    "dpm": Solver(dpm, 30, 1, ("vp", "ddpm")),
    "dpm++2m": Solver(dpm2m, 30, 1, ("vp", "ddpm")),
    "dopri5": Solver(dopri5, None, 1, ("flow",)),               # picks its own steps
    "heun": Solver(heun, 50, 1, ("flow",)),
    "euler": Solver(euler, 250, 1, ("flow",)),
    "sde": Solver(sde, 250, 2, ("flow",)),
}


def check_settings(net, labels, guidance, interval, solver, steps, c_prime):
    """-> (solver, its number of steps). Refuses what does not fit with an InputError of one line."""
    c = net.config["c"]
    num_classes = net.config["num_classes"]
    wrong = [y for y in labels.unique().tolist() if not 0 <= y <= num_classes]
    if wrong:
        raise InputError(f"label {wrong[0]} is outside 0 .. {num_classes} "
                         f"(--classes; {num_classes} is the null label)")
    if not 0 <= guidance <= 1000:                               # NaN too
        raise InputError(f"--guidance {guidance} must lie in 0 .. 1000 (1 is no guidance)")
    low, high = interval
    if not 0 <= low < high <= 1:
        raise InputError(f"--interval {low} {high}: wanted 0 <= LO < HI <= 1 (0 is noise, 1 is data)")
    if c_prime is not None and not 1 <= c_prime <= c:
        raise InputError(f"--c_prime {c_prime} is outside 1 .. {c}, the latent's channels")

    if solver is None:
        flow = "dopri5" if steps is None else "heun"
        solver = {"ddpm": "ddpm", "vp": "dpm", "flow": flow}[net.objective]
    fitting = [s for s in SOLVERS if net.objective in SOLVERS[s].objectives]
    if solver not in fitting:
        raise InputError(f"--solver {solver} does not fit {net.config['name']}: one of {', '.join(fitting)}")
    default, fewest = SOLVERS[solver].steps, SOLVERS[solver].fewest
    if steps is None:
        return solver, default
    if default is None:
        raise InputError(f"--steps {steps} does not fit --solver {solver}: it picks its own; try heun")
    if not fewest <= steps <= 1000:
        raise InputError(f"--steps {steps} does not fit --solver {solver}: {fewest} .. 1000")
    return solver, steps


@torch.no_grad()
def generate(net, labels, guidance=1.0, interval=(0, 1), solver=None, steps=None, seed=0, c_prime=None,
             index=None):
    """Latents (B, c, h, w) as the network sees them (decode z / scale), one per label.

    labels: (B,) ints; num_classes is the null label. guidance: 1 is none; interval: where, in flow_time.
    solver, steps: see SOLVERS; None takes the family's. c_prime: channels >= c' are exactly zero.
    index: (B,) global image numbers (default 0, 1, ..): image i's noise depends on (seed, i) alone.
    Raises InputError for what does not fit.
    """
    weight = next(net.parameters())
    device = weight.device
    dtype = torch.promote_types(weight.dtype, torch.float32)
    y = torch.as_tensor(labels, dtype=torch.int64, device=device)
    if index is None:
        index = torch.arange(len(y))
    index = torch.as_tensor(index, dtype=torch.int64, device=device)
    solver, steps = check_settings(net, y, guidance, interval, solver, steps, c_prime)
    solve = SOLVERS[solver].function

    c = net.config["c"]
    k = c_prime or c
    shape = (len(y), k, *net.grid)
    noise = lambda j: gaussian(shape, seed, index, j, device=device, dtype=dtype)
    model = guided(net, y, guidance, interval)
    x = solve(net, model, noise(0), steps, noise)                           # (B, c', h, w)
    return F.pad(x, (0, 0, 0, 0, 0, c - k))


# ----------------------------------------------------------------------------------------------------------
# An unfinished run, in files of --out: whatever ends it, the same command goes on


NOT_COMPARED = ("ckpt", "ae", "out", "toy")     # paths: what lies there is, as weights, ae_hash and scale


class Unfinished:
    """samples.part.pixels: uint8 (n, H, W, 3), raw. samples.part.done: uint32, the checksum of each batch
    whose pixels are on the disk, else 0. samples.part.json: what decides pixels; comes last, goes first."""

    def __init__(self, out, shape, batch_size):
        self.out = out
        self.shape = shape
        self.batch_size = batch_size
        self.batches = math.ceil(shape[0] / batch_size)         # the same for any number of ranks
        self.pixels = out / "samples.part.pixels"
        self.done = out / "samples.part.done"
        self.settings = out / "samples.part.json"

    def open(self, settings):
        """Makes the files, or goes on with those of the same settings. InputError where others have drawn."""
        text = json.dumps(settings)
        wanted = json.loads(text)
        held = read_json(self.settings)
        begun = held and self.done.is_file() and any(self.done.read_bytes())
        others = [name for name in wanted if name not in NOT_COMPARED and held.get(name) != wanted[name]]
        if begun and others:
            raise InputError(f"--out {self.out}: an unfinished run of another {', '.join(others)}; end it "
                             "with its own flags, or remove samples.part.* in there")
        if not begun or not self.verified():
            self.allocate()
            self.done.write_bytes(bytes(4 * self.batches))
            new = self.out / "samples.part.tmp"
            new.write_text(text)
            os.replace(new, self.settings)

    def allocate(self):
        """A full disk ends a run here: it must hold the pixels, and at the end samples.npz too."""
        size = math.prod(self.shape)
        free = shutil.disk_usage(self.out).free
        try:
            if free < 2 * size:
                raise OSError
            with open(self.pixels, "wb") as f:
                f.truncate(size)
        except OSError:
            self.pixels.unlink(missing_ok=True)
            raise InputError(f"--out {self.out}: {2 * size:,} bytes are needed there, {free:,} are free; "
                             "make room, or name another --out") from None

    def verified(self):
        """Whether there are batches to go on with. Those that are damaged lose their mark."""
        try:
            done = np.memmap(self.done, np.uint32, "c", shape=self.batches)
            pixels = np.memmap(self.pixels, np.uint8, "r", shape=self.shape)
        except (OSError, ValueError):                           # gone, or too short
            return False
        for k in np.flatnonzero(done):
            if checksum(pixels[self.index(k)]) != done[k]:
                done[k] = 0
        write(self.done, 0, done.tobytes())
        return done.any()

    def left(self, rank=0, world=1):
        """The batches of a rank's contiguous share that are not drawn yet."""
        done = np.fromfile(self.done, np.uint32)
        share = range(self.batches * rank // world, self.batches * (rank + 1) // world)
        return [k for k in share if not done[k]]

    def index(self, k):
        """The images of batch k, (b,)."""
        first = k * self.batch_size
        return torch.arange(first, min(first + self.batch_size, self.shape[0]))

    def put(self, k, pixels):
        """Batch k, (b, H, W, 3), and then its mark."""
        write(self.pixels, k * self.batch_size * pixels[0].numel(), pixels.numpy().tobytes())
        write(self.done, 4 * k, np.uint32(checksum(pixels.numpy())).tobytes())

    def save(self, labels):
        """Writes samples.npz, in ADM's layout. -> the pixels."""
        pixels = np.memmap(self.pixels, np.uint8, "r", shape=self.shape)
        npz = self.out / "samples.part.npz"
        np.savez(npz, arr_0=pixels, arr_1=labels.numpy())
        write(npz, 0, b"")                                      # on the disk, before it gets its name
        os.replace(npz, self.out / "samples.npz")
        return pixels

    def remove(self):
        for file in (self.settings, self.done, self.pixels):
            file.unlink()


# ----------------------------------------------------------------------------------------------------------
# Command line


def class_numbers(part, names, known):
    """The classes that one part of --classes means: a name, a number, or a range whose ends both count. Where
    all names are numbers, numbers are names (folders sort as 0, 1, 10, 11, 2), else positions."""
    if part in names:
        return [names.index(part)]
    numbers = list(range(known))
    if names and all(re.fullmatch(r"-?\d{1,18}", name) for name in names):
        numbers = [int(name) for name in names]
    found = re.fullmatch(r"(\d{1,18})(-(\d{1,18}))?", part)
    if found:
        low = int(found[1])
        high = int(found[3] or low)
        if low <= high and {low, high} <= set(numbers):
            return [numbers.index(number) for number in sorted(numbers) if low <= number <= high]
    choice = ", ".join(names) or "none known"
    raise InputError(f"--classes {part}: not a number in {min(numbers)} .. {max(numbers)}, a range (3-7), "
                     f"all, random, or a name: {choice}")


def parse_classes(text, n, seed, num_classes, names):
    """-> n labels, int64 (n,). "random": uniform, as ADM and DC-Gen draw them for FID; "all", or a list of
    names, numbers and ranges: in turn, and evenly spread where there are more than n."""
    known = max(num_classes, 1)
    names = names[:known]
    if text == "random":
        return torch.randint(0, known, (n,), generator=torch.Generator().manual_seed(seed))
    classes = list(range(known))
    if text != "all":
        parts = [text] if text in names else [part.strip() for part in text.split(",")]
        chosen = [y for part in parts for y in class_numbers(part, names, known)]
        classes = list(dict.fromkeys(chosen))                   # each once, in the order given
    classes = [classes[i] for i in evenly_spaced(classes, n)]
    return torch.tensor(classes)[torch.arange(n) % len(classes)]


def parse(argv):
    """Flags > --toy > defaults."""
    cuda = torch.cuda.is_available()
    usage = "sample.py --ckpt CKPT [--flag value ...]   (--help explains each)"
    parser = Flags(description="Sample pictures.", usage=usage)
    add = parser.add_argument
    add("--ckpt", help="our checkpoint (file or run folder), or published weights (hub name, folder, file)")
    add("--toy", action="store_true",
        help="the toy run: --ckpt out/toy-diffusion --out out/toy-samples --guidance 2")
    add("--model", choices=[*diffusion.FAMILIES, *diffusion.MODELS], metavar="MODEL",
        help="what published tensors cannot say: UViT, USiT, USiT-H, ...")
    add("--ae", help="another autoencoder than the one named in the checkpoint (its decoder fine-tuned, say)")
    add("--n", type=within(int, 1, 10**8), default=100, help="number of pictures")
    add("--classes",
        help="all, random, or names, numbers, ranges: cat,7,10-19. Default: all, beyond 100 pictures random")
    add("--guidance", type=within(float, 0, 1000), default=1.0,
        help="classifier-free guidance on all channels; 1: none")
    add("--interval", type=within(float, 0, 1), nargs=2, default=(0, 1), metavar=("LO", "HI"),
        help="guide only at signal / (signal + noise) in LO .. HI")
    add("--solver", choices=SOLVERS, help="default: DiT ddpm, UViT dpm, SiT and USiT dopri5")
    add("--steps", type=within(int, 1, 1000),
        help="solver steps (dpm: evaluations); for flows without --solver: of heun")
    add("--c_prime", type=within(int, 1, 2**16),
        help="sample and decode the first c' channels only; the grid shows full pictures below them")
    add("--batch_size", type=within(int, 1, 10**5), default=50, help="pictures at a time, per rank")
    add("--seed", type=within(int, 0, 2**63 - 1), default=0, help="of the noise and of random labels")
    add("--out", help="folder for samples.png, .npz, .json. Default: `samples` in the run folder")
    add("--dtype", choices=["bf16", "fp32"], default="bf16" if cuda else "fp32",
        help="of the denoiser; the decoder runs in fp32 [DC-Gen]")
    add("--bench", action="store_true",
        help="only time one batch: images/s of denoiser and decoder, one JSON line")
    if parser.parse_known_args(argv)[0].toy:
        parser.set_defaults(**TOY)
    args = parser.parse_args(argv)
    if args.ckpt is None:
        raise InputError("sample.py needs --ckpt CKPT (or --toy)")
    if args.classes is None:
        args.classes = "all" if args.n <= 100 else "random"
    if not args.bench:
        check_out(output_folder(args))
    return args


def output_folder(args):
    """--out, or `samples` in the run folder; published weights have out/NAME for theirs."""
    if args.out:
        return Path(args.out)
    ckpt = Path(args.ckpt)
    if os.path.isdir(ckpt):
        return ckpt / "samples"
    if os.path.exists(ckpt):
        return ckpt.parent / "samples"
    return Path("out", ckpt.name, "samples")


def open_models(args, device):
    """-> (denoiser, autoencoder, scale of the latents): a pair that fits, in eval mode. Sets args.ae."""
    net = diffusion.from_pretrained(args.ckpt, name=args.model).to(device)
    download = bool(args.ae) or not os.path.exists(args.ckpt)   # a name that the user gave, or its partner
    args.ae = args.ae or net.info.get("ae")
    if args.ae is None:
        raise InputError(f"--ckpt {args.ckpt}: does not say which autoencoder it belongs to; give --ae")
    ae = open_autoencoder(args.ae, download).to(device).eval()
    f = ae.config.f
    c = net.config["c"]
    h, w = net.grid
    if ae.config.c != c or net.info.get("image_size", h * f) != h * f:
        raise InputError(f"--ae {args.ae}: f{f}c{ae.config.c} does not fit --ckpt {args.ckpt}, "
                         f"whose latents are {c}x{h}x{w}")
    return net, ae, net.info.get("scale") or ae.scale


def bench(sample_latents, to_pixels, index):
    """Images per second of the denoiser, of the decoder, and of both, after one batch of warm-up."""
    to_pixels(sample_latents(index))
    start = synchronized_time()
    z = sample_latents(index)
    sampled = synchronized_time()
    to_pixels(z)
    decoded = synchronized_time()
    return dict(
        denoiser_img_per_s=len(index) / (sampled - start),
        decoder_img_per_s=len(index) / (decoded - sampled),
        img_per_s=len(index) / (decoded - start),
    )


def write_grid(path, pixels, labels, net, args, full_pictures):
    """A PNG of up to 100 pictures, a column per class where there are at most ten. With --c_prime, below each
    row the same noise in all channels: full_pictures(count) makes the first ones again."""
    ncol = min(10, args.n)
    titles = None
    classes = list(dict.fromkeys(labels.tolist()))              # each once, in order
    if args.classes != "random" and 1 < len(classes) <= 10:
        ncol = len(classes)
        names = dict(enumerate(net.info.get("classes") or []))
        titles = [str(names.get(y, y)) for y in classes]
    shown = torch.from_numpy(pixels[:100].copy())
    rows = None
    if args.c_prime:
        count = min(40, args.n) // ncol * ncol                  # whole rows
        coarse = shown[:count].split(ncol)
        full = full_pictures(count).split(ncol)
        shown = torch.cat([row for pair in zip(coarse, full) for row in pair])
        rows = [f"c' = {args.c_prime}", f"all {net.config['c']}"] * len(full)
    save_grid(shown, path, ncol, titles, rows)


def main(argv=None):
    args = parse(argv)
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)

    net, ae, scale = open_models(args, device)
    names = [str(name) for name in net.info.get("classes") or []]
    labels = parse_classes(args.classes, args.n, args.seed, net.config["num_classes"], names)
    args.solver, args.steps = check_settings(
        net, labels, args.guidance, args.interval, args.solver, args.steps, args.c_prime)

    def sample_latents(index, c_prime=args.c_prime):            # -> (b, c, h, w)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
            return generate(
                net, labels[index], guidance=args.guidance, interval=args.interval, solver=args.solver,
                steps=args.steps, seed=args.seed, c_prime=c_prime, index=index)

    def to_pixels(z):                                           # -> uint8 (b, H, W, 3)
        with torch.no_grad():
            return to_uint8(ae.decode(z / scale)).cpu()

    def full_pictures(count):                                   # -> uint8 (count, H, W, 3), all channels
        batches = torch.arange(count).split(args.batch_size)
        return torch.cat([to_pixels(sample_latents(index, None)) for index in batches])

    if args.bench:
        speed = bench(sample_latents, to_pixels, torch.arange(min(args.batch_size, args.n)))
        about = {"model": net.config["name"], **speed, "torch": str(torch.__version__)}
        if rank == 0:
            print(json.dumps({**vars(args), **about}))
        return

    out = output_folder(args)
    h, w = net.grid
    f = ae.config.f
    part = Unfinished(out, (args.n, h * f, w * f, ae.config.in_channels), args.batch_size)
    with writing("--out", out):
        if rank == 0:
            locked = lock(make_folder(out))                     # as long as this process lives
            settings = {
                **vars(args),
                "step": net.info.get("step"),
                "model": net.config,
                "weights": fingerprint(net),
                "ae_hash": fingerprint(ae),
                "scale": scale,
                "device": device.type,
            }
            part.open(settings)
            to_draw = min(args.n, len(part.left()) * args.batch_size)
        if world > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
            dist.barrier()
        start = time.perf_counter()
        with tqdm(part.left(rank, world), f"rank 0 of {world}", unit="img", unit_scale=args.batch_size,
                  disable=rank > 0) as bar:
            for k in bar:
                part.put(k, to_pixels(sample_latents(part.index(k))))
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()
        if rank > 0:
            return
        about = {
            **settings,
            "ranks": world,
            "img_per_s": to_draw / (time.perf_counter() - start),
            "torch": str(torch.__version__),
        }
        pixels = part.save(labels)
        (out / "samples.json").write_text(json.dumps(about, indent=1) + "\n")
        write_grid(out / "samples.png", pixels, labels, net, args, full_pictures)
        part.remove()
        locked.close()
    print(f"{args.n} pictures in {out}: samples.png, samples.npz, samples.json")
    if net.info.get("ae_hash") not in (None, about["ae_hash"]):
        print(f"note: {args.ae} is not the autoencoder this model's latents came from "
              "(fine if only its decoder was trained on)")


if __name__ == "__main__":
    script(main, then="; the same command goes on")
