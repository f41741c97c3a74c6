"""Noise to pictures: solvers, guidance, `generate`, and the command line.

  python sample.py --toy                                                   # a grid, ten pictures per class
  torchrun --nproc_per_node 8 sample.py --ckpt out/USiT-H --n 50000        # samples.npz for fid.py (random labels, seed 0)
  python sample.py --ckpt out/USiT-H --c_prime 16                          # coarse pictures from the first 16 channels

Default solvers: DiT ddpm, 250 respaced steps; UViT dpm, 30 evaluations; SiT and USiT dopri5 (adaptive).
Image i starts from, and uses, noise keyed by (seed, i) alone: batch size, ranks and devices change rounding, nothing else.
With c' < c the solvers run in the first c' channels only; the network sees zeros behind them, as in training.
"""
import argparse
import json
import os
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import diffusion
from ae import InputError, fingerprint, open_autoencoder, save_grid, to_uint8
from diffusion import ddpm_schedule, gaussian, model_mean_log_var, vp_schedule


# ----------------------------------------------------------------------------------------------------------------------
# Time, and the guided network

def log_alpha(net, t):
    """log sqrt(abar) at continuous t in [0.001, 1], linear between the 1000 training steps. fp64."""
    abar = vp_schedule() if net.objective == "vp" else ddpm_schedule().abar
    table, i = 0.5 * abar.log().to(t.device), (t.double() * 1000 - 1).clamp(0, 999)
    low = i.floor().long().clamp(max=998)
    return torch.lerp(table[low], table[low + 1], i - low)


def flow_time(net, t):
    """The family's t -> signal / (signal + noise): 0 noise, 1 data; for flows t itself. --interval is measured in it, so
    the same interval means the same noise levels in every family."""
    if net.objective == "flow":
        return t
    alpha = log_alpha(net, (t.double() + (net.objective == "ddpm")) / 1000).exp()   # DDPM counts 0 .. 999, VP 1 .. 1000
    return alpha / (alpha + (1 - alpha**2).sqrt())


def guided(net, y, guidance, interval):
    """model(x, t, rows) -> (prediction, v): the network with classifier-free guidance on all channels [all of DC-Gen's
    runs; the original DiT and SiT guide three]. x (b, c', h, w) are the images `rows`, t (b,); v is DiT's variance, or None."""
    c = net.config["c"]

    def model(x, t, rows=slice(None)):
        b, k = x.shape[:2]
        z_t = F.pad(x, (0, 0, 0, 0, 0, c - k))                                      # (b, c, h, w), zeros behind c'
        s = flow_time(net, t)
        g = ((interval[0] <= s) & (s <= interval[1])).nonzero()[:, 0] if guidance != 1 else t[:0].long()
        null = torch.full_like(g, net.config["num_classes"])
        out = net(torch.cat([z_t, z_t[g]]), torch.cat([t, t[g]]), torch.cat([y[rows], null])).to(x.dtype)
        pred, v = out[:b, :k], (out[:b, c : c + k] if net.objective == "ddpm" else None)
        return pred.index_copy(0, g, out[b:, :k] + guidance * (pred[g] - out[b:, :k])), v

    return model


# ----------------------------------------------------------------------------------------------------------------------
# Solvers: (net, model, x at pure noise, steps, noise) -> x at data. noise(j) is the j-th fresh Gaussian, j = 1, 2, ..

def ddpm(net, model, x, steps, noise):
    """Ancestral sampling on respaced steps; the network is told the original indices."""
    kept = tuple(round(i * 999 / (steps - 1)) for i in range(steps))
    s = ddpm_schedule(kept, x.device, x.dtype)
    for j, i in enumerate(reversed(range(steps)), start=1):
        eps, v = model(x, x.new_full((len(x),), kept[i]))
        x, log_var = model_mean_log_var(s, torch.full((len(x),), i, device=x.device), x, eps, v)
        if i > 0:                                                                   # no noise at the last step
            x = x + (0.5 * log_var).exp() * noise(j)
    return x


def dpm_nodes(net, model, steps):
    """alpha, sigma, lambda = log(alpha / sigma) at times evenly spaced from 1 to 1/1000, and the data prediction there."""
    ts = torch.linspace(1, 1 / 1000, steps + 1, dtype=torch.float64)
    log_a = log_alpha(net, ts)
    sigma = -torch.expm1(2 * log_a)
    a, s, lam = log_a.exp().tolist(), sigma.sqrt().tolist(), (log_a - 0.5 * sigma.log()).tolist()

    def data(x, i):
        t = x.new_full((len(x),), 1000 * float(ts[i]) - (net.objective == "ddpm"))
        return (x - s[i] * model(x, t)[0]) / a[i]

    return a, s, lam, data


def dpm(net, model, x, steps, noise):
    """DPM-Solver++, single-step "fast" (arXiv 2211.01095): third-order steps over three nodes, the rest of lower order."""
    a, s, lam, data = dpm_nodes(net, model, steps)
    orders = [3] * (steps // 3 - (steps % 3 == 0)) + {0: [2, 1], 1: [1], 2: [2]}[steps % 3]
    i = 0
    for order in orders:
        n = i + order
        h, d = lam[n] - lam[i], data(x, i)
        phi = lambda j: np.expm1(-(lam[j] - lam[i]))                                # of the node j
        first = lambda j: s[j] / s[i] * x - a[j] * phi(j) * d                       # the first-order step from i to j
        if order == 1:
            x_n = first(n)
        else:
            r1, d1 = (lam[i + 1] - lam[i]) / h, data(first(i + 1), i + 1)
            if order == 2:
                x_n = first(n) - 0.5 / r1 * a[n] * phi(n) * (d1 - d)
            else:
                r2 = (lam[i + 2] - lam[i]) / h
                x_2 = first(i + 2) + r2 / r1 * a[i + 2] * (phi(i + 2) / (r2 * h) + 1) * (d1 - d)
                x_n = first(n) + 1 / r2 * a[n] * (phi(n) / h + 1) * (data(x_2, i + 2) - d)
        x, i = x_n, n
    return x


def dpm2m(net, model, x, steps, noise):
    """DPM-Solver++ 2M: second order from the previous evaluation, one evaluation per step."""
    a, s, lam, data = dpm_nodes(net, model, steps)
    for i in range(steps):
        h, d = lam[i + 1] - lam[i], data(x, i)
        mixed = d if i == 0 else d + 0.5 * h / (lam[i] - lam[i - 1]) * (d - d_prev)
        x, d_prev = s[i + 1] / s[i] * x - a[i + 1] * np.expm1(-h) * mixed, d
    return x


def euler(net, model, x, steps, noise):
    for i in range(steps):
        x = x + model(x, x.new_full((len(x),), i / steps))[0] / steps
    return x


def heun(net, model, x, steps, noise):
    for i in range(steps):
        v = model(x, x.new_full((len(x),), i / steps))[0]
        v_next = model(x + v / steps, x.new_full((len(x),), (i + 1) / steps))[0]
        x = x + (v + v_next) / (2 * steps)
    return x


def sde(net, model, x, steps, noise):
    """Euler-Maruyama with diffusion w(t) = 1 - t on [0, 0.96], then one noise-free step of 0.04 [SiT: "sigma", "Mean"]."""
    dt, last = 0.96 / (steps - 1), 0.04
    for i in range(steps):
        t = i * dt
        v, w = model(x, x.new_full((len(x),), t))[0], 1 - t
        score = (t * v - x) / ((1 - t) ** 2 + t * (1 - t))
        x = x + (v + w * score) * (dt if i < steps - 1 else last)
        if i < steps - 1:
            x = x + (2 * w * dt) ** 0.5 * noise(i + 1)
    return x


DOPRI = ((1 / 5,), (3 / 40, 9 / 40), (44 / 45, -56 / 15, 32 / 9), (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
         (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656), (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84))
DOPRI_C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
DOPRI_ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)   # fifth minus fourth order


def dopri5(net, model, x, steps, noise, rtol=1e-3, atol=1e-6):
    """Dormand-Prince 5(4). NOTE differs from torchdiffeq: the step is controlled per image, so that an image does not depend
    on its batch; images that have arrived leave the batch. Step rules (first step, 0.9, 0.2 .. 10) as there [Hairer II.4]."""
    wide = lambda s: s.to(x.dtype).view(-1, 1, 1, 1)
    rms = lambda e: e.flatten(1).double().square().mean(1).sqrt()                   # (b,)
    f = lambda x, t: model(x, t.to(x.dtype), rows)[0]
    rows, result = torch.arange(len(x), device=x.device), torch.empty_like(x)
    t = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    k1, scale = f(x, t), atol + rtol * x.abs()
    d0, d1 = rms(x / scale), rms(k1 / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    d2 = rms((f(x + wide(h0) * k1, h0) - k1) / scale) / h0
    h = torch.minimum(100 * h0, (0.01 / torch.maximum(d1, d2).clamp(min=1e-9)) ** 0.2)
    while len(rows):
        last = h >= 1 - t
        h = torch.where(last, 1 - t, h)
        k = [k1]
        for weights, node in zip(DOPRI, DOPRI_C):
            x_new = x + wide(h) * sum(a * ki for a, ki in zip(weights, k) if a)
            k.append(f(x_new, t + node * h))                                        # the last one is the next step's first
        error = wide(h) * sum(a * ki for a, ki in zip(DOPRI_ERROR, k) if a)
        ratio = rms(error / (atol + rtol * torch.maximum(x.abs(), x_new.abs())))
        ratio = torch.maximum(ratio, error.flatten(1).abs().amax(1) / (atol + rtol / 2 * rms(x_new)))   # [ours] and no entry far off
        lost = ~ratio.isfinite()                                                    # a network that says NaN ends here
        ok = (ratio <= 1) | (h < 1e-4) | lost
        x, k1 = (torch.where(ok.view(-1, 1, 1, 1), new, old) for new, old in ((x_new, x), (k[-1], k1)))
        t = torch.where(lost | (ok & last), 1.0, torch.where(ok, t + h, t))
        h = h * (0.9 * ratio.clamp(min=1e-10) ** -0.2).clamp(torch.where(ok, 1.0, 0.2), torch.where(ok, 10.0, 1.0))
        result[rows[t >= 1]] = x[t >= 1]
        x, k1, h, rows, t = (s[t < 1] for s in (x, k1, h, rows, t))
    return result


SOLVERS = {   # name: function, default steps [DC-Gen; heun, dpm++2m ours], smallest number of steps, objectives that it fits
    "ddpm": (ddpm, 250, 2, ("ddpm",)), "dpm": (dpm, 30, 1, ("vp", "ddpm")), "dpm++2m": (dpm2m, 30, 1, ("vp", "ddpm")),
    "dopri5": (dopri5, None, 1, ("flow",)), "heun": (heun, 50, 1, ("flow",)), "euler": (euler, 250, 1, ("flow",)), "sde": (sde, 250, 2, ("flow",))}


def settle(net, labels, guidance, interval, solver, steps, c_prime):
    """Refuses what does not fit, in one line; returns the solver and its number of steps."""
    name, c, num_classes = (net.config[k] for k in ("name", "c", "num_classes"))
    solver = solver or {"ddpm": "ddpm", "vp": "dpm", "flow": "dopri5" if steps is None else "heun"}[net.objective]
    _, default_steps, fewest, objectives = SOLVERS.get(solver, (None, None, 1, ()))
    if wrong := [y for y in labels.unique().tolist() if not 0 <= y <= num_classes]:
        raise InputError(f"label {wrong[0]} is outside 0 .. {num_classes} (--classes; {num_classes} is the null label)")
    if not guidance >= 0:
        raise InputError(f"--guidance {guidance} is below zero (1 is no guidance)")
    if not 0 <= interval[0] < interval[1] <= 1:
        raise InputError(f"--interval {interval[0]} {interval[1]}: wanted 0 <= LO < HI <= 1 (0 is noise, 1 is data)")
    if net.objective not in objectives:
        raise InputError(f"--solver {solver} does not fit {name}: one of {', '.join(n for n in SOLVERS if net.objective in SOLVERS[n][3])}")
    if steps is not None and (default_steps is None or not fewest <= steps <= 1000):
        raise InputError(f"--steps {steps} does not fit --solver {solver}: " + (f"{fewest} .. 1000" if default_steps else "it picks its own; try heun"))
    if c_prime is not None and not 1 <= c_prime <= c:
        raise InputError(f"--c_prime {c_prime} is outside 1 .. {c}, the latent's channels")
    return solver, steps or default_steps


@torch.no_grad()
def generate(net, labels, guidance=1.0, interval=(0, 1), solver=None, steps=None, seed=0, c_prime=None, index=None):
    """Latents (B, c, h, w) as the network sees them (decode z / scale), one per label. index: global image numbers (default
    0, 1, ..); image i's noise depends on (seed, i) alone. c_prime: channels >= c' are exactly zero."""
    c, weight = net.config["c"], next(net.parameters())
    y = torch.as_tensor(labels, dtype=torch.int64, device=weight.device)
    solver, steps = settle(net, y, guidance, interval, solver, steps, c_prime)
    k, dtype = c_prime or c, torch.promote_types(weight.dtype, torch.float32)
    index = torch.arange(len(y), device=y.device) if index is None else torch.as_tensor(index, dtype=torch.int64, device=y.device)
    noise = lambda j: gaussian((len(y), k, *net.grid), seed, index, j, device=y.device, dtype=dtype)
    x = SOLVERS[solver][0](net, guided(net, y, guidance, interval), noise(0), steps, noise)
    return F.pad(x, (0, 0, 0, 0, 0, c - k))


# ----------------------------------------------------------------------------------------------------------------------
# Command line

def parse_classes(text, n, seed, num_classes, names):
    """n labels. "random": uniform, as ADM and DC-Gen draw them for FID; "all" or a list (names, numbers, 3-7): in turn."""
    classes = list(range(max(num_classes, 1)))
    if text == "random":
        return torch.randint(0, len(classes), (n,), generator=torch.Generator().manual_seed(seed))
    if text != "all":
        chosen = []
        for part in [text] if text in names else [part.strip() for part in text.split(",")]:
            lo, dash, hi = part.partition("-")
            if part not in names and not (lo.isdigit() and (hi.isdigit() or not dash)):
                raise InputError(f"--classes {part}: not a number, a range (3-7), all, random, or a name: {', '.join(names) or 'none known'}"[:199])
            chosen += [names.index(part)] if part in names else range(int(lo), int(hi or lo) + 1)
        if not chosen or max(chosen) > classes[-1]:
            raise InputError(f"--classes {text}: the model knows the classes 0 .. {classes[-1]}")
        classes = list(dict.fromkeys(chosen))                                       # each once, in the order given
    classes = [classes[i * len(classes) // n] for i in range(n)] if len(classes) > n else classes      # too many: spread
    return torch.tensor([classes[i % len(classes)] for i in range(n)])


def main(argv=None):
    p = argparse.ArgumentParser(description="Draw pictures.", usage="sample.py --ckpt CKPT [--flag value ...]   (--help explains each)")
    a = p.add_argument
    a("--ckpt", help="our checkpoint (file or run folder), or published weights (hub name, folder, file)")
    a("--toy", action="store_true", help="the toy run: --ckpt out/toy-diffusion --out out/toy-samples --guidance 2")
    a("--model", help="what published tensors cannot say: UViT, USiT, USiT-H, ...")
    a("--ae", help="another autoencoder than the one named in the checkpoint (its decoder fine-tuned, say)")
    a("--n", type=int, default=100, help="number of pictures (100)")
    a("--classes", help="all, random, or names, numbers, ranges: cat,7,10-19. Default: all up to 100 pictures, random beyond")
    a("--guidance", type=float, help="classifier-free guidance on all channels. Default: 1, none; 2 with --toy")
    a("--interval", type=float, nargs=2, default=(0, 1), metavar=("LO", "HI"), help="guide only at signal / (signal + noise) in LO .. HI")
    a("--solver", choices=SOLVERS, help="default: DiT ddpm, UViT dpm, SiT and USiT dopri5")
    a("--steps", type=int, help="solver steps (dpm: evaluations); for flows without --solver: of heun")
    a("--c_prime", type=int, help="sample and decode the first c' channels only; the grid shows full pictures below them")
    a("--batch_size", type=int, default=50, help="pictures at a time, per rank (50)")
    a("--seed", type=int, default=0, help="of the noise and of random labels (0)")
    a("--out", help="folder for samples.png, .npz, .json. Default: `samples` in the run folder")
    a("--dtype", choices=["bf16", "fp32"], help="of the denoiser (bf16 on CUDA, else fp32); the decoder runs in fp32 [DC-Gen]")
    a("--bench", action="store_true", help="only time one batch: images/s of denoiser and decoder, one JSON line")
    args = p.parse_args(argv)
    if args.toy:
        args.ckpt, args.out = args.ckpt or "out/toy-diffusion", args.out or "out/toy-samples"
    args.guidance = (2.0 if args.toy else 1.0) if args.guidance is None else args.guidance
    if args.ckpt is None or min(args.n, args.batch_size) < 1:
        raise InputError("sample.py needs --ckpt CKPT (or --toy), and --n and --batch_size of at least 1")
    ckpt = Path(args.ckpt)
    out = Path(args.out) if args.out else (ckpt if ckpt.is_dir() else ckpt.parent if ckpt.exists() else Path("out", ckpt.name)) / "samples"
    rank, world, cuda = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    args.dtype = args.dtype or ("bf16" if cuda else "fp32")
    args.classes = args.classes or ("all" if args.n <= 100 else "random")
    net = diffusion.from_pretrained(args.ckpt, name=args.model).to(device)
    names, args.ae = net.info.get("classes") or [], args.ae or net.info.get("ae")
    if args.ae is None:
        raise InputError(f"--ckpt {args.ckpt}: does not say which autoencoder it belongs to; give --ae")
    ae, (h, w) = open_autoencoder(args.ae).to(device).eval(), net.grid
    f, c, scale = ae.config.f, ae.config.c, net.info.get("scale") or ae.scale
    if c != net.config["c"] or net.info.get("image_size", h * f) != h * f:
        raise InputError(f"--ae {args.ae}: f{f}c{c} does not fit --ckpt {args.ckpt}, whose latents are {net.config['c']}x{h}x{w}")
    labels = parse_classes(args.classes, args.n, args.seed, net.config["num_classes"], names)
    args.solver, args.steps = settle(net, labels, args.guidance, args.interval, args.solver, args.steps, args.c_prime)

    def draw(index, c_prime=args.c_prime):
        how = {k: getattr(args, k) for k in ("guidance", "interval", "solver", "steps", "seed")}
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
            return generate(net, labels[index], index=index, c_prime=c_prime, **how)

    @torch.no_grad()
    def decode(z, c_prime=args.c_prime):
        return to_uint8(ae.decode(z[:, :c_prime] / scale)).cpu()                    # (b, H, W, 3)

    if args.bench:
        clock = lambda: (cuda and torch.cuda.synchronize(), time.perf_counter())[1]
        index = torch.arange(min(args.batch_size, args.n))
        decode(draw(index))                                                         # warm-up
        t0, z, t1, _, t2 = [clock(), z := draw(index), clock(), decode(z), clock()]
        den, dec = len(index) / (t1 - t0), len(index) / (t2 - t1)
        print(json.dumps({**vars(args), "model": net.config["name"], "denoiser_img_per_s": den, "decoder_img_per_s": dec,
                          "img_per_s": 1 / (1 / den + 1 / dec), "torch": str(torch.__version__)}))
        return
    barrier = dist.barrier if world > 1 else lambda: None
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=12))
    out.mkdir(parents=True, exist_ok=True)
    raw = out / "samples.part.npy"                                                  # one file for all ranks, nothing gathered in memory
    if rank == 0:
        np.lib.format.open_memmap(raw, "w+", np.uint8, (args.n, h * f, w * f, 3)).flush()
    barrier()
    img, start = np.lib.format.open_memmap(raw, "r+"), time.perf_counter()
    mine = torch.arange(args.n * rank // world, args.n * (rank + 1) // world)       # a contiguous slice
    with tqdm(total=len(mine), unit="img", disable=rank > 0, desc=f"{net.config['name']}, rank 0 of {world}") as bar:
        for index in mine.split(args.batch_size) if len(mine) else ():
            img[index] = decode(draw(index)).numpy()
            bar.update(len(index))
    img.flush()
    barrier()
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    about = {**vars(args), "step": net.info.get("step"), "model": net.config, "ae_hash": fingerprint(ae), "scale": scale, "ranks": world,
             "img_per_s": args.n / (time.perf_counter() - start), "torch": str(torch.__version__)}
    np.savez(out / "samples.part.npz", arr_0=img, arr_1=labels.numpy())             # ADM's layout
    os.replace(out / "samples.part.npz", out / "samples.npz")
    raw.unlink()
    (out / "samples.json").write_text(json.dumps(about, indent=1) + "\n")
    shown, ncol, titles, rows = torch.from_numpy(img[:100].copy()), min(10, args.n), None, None
    if args.classes != "random" and 1 < len(set(labels.tolist())) <= 10:            # a column per class
        ncol = len(set(labels.tolist()))
        titles = [names[y] if names else str(y) for y in labels[:ncol].tolist()]
    if args.c_prime:                                                                # below each row: all channels, from the same noise
        shown = shown[: max(1, 40 // ncol) * ncol]
        full = torch.cat([decode(draw(i, None), None) for i in torch.arange(len(shown)).split(args.batch_size)])
        shown = torch.cat([row for pair in zip(shown.split(ncol), full.split(ncol)) for row in pair])
        rows = [f"c' = {args.c_prime}", f"all {c}"] * (len(shown) // ncol)
    save_grid(shown, out / "samples.png", ncol, titles, rows)
    print(f"{args.n} pictures in {out}: samples.png, samples.npz, samples.json")
    if net.info.get("ae_hash") not in (None, about["ae_hash"]):
        print(f"note: {args.ae} is not the autoencoder this model's latents came from (fine if only its decoder was trained on)")


if __name__ == "__main__":
    main()
