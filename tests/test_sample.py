"""Solvers, guidance, generate, the command line.    python -m pytest tests/test_sample.py

Golden trajectories: the official samplers (DC-Gen @cae2205, SiT's transport, torchdiffeq) on the filled models of
test_diffusion.py, labels 3 and 7, guidance 1.5, injected noise. The command line's pictures are drawn a second time,
flag by flag, by the Euler loop of `pictures`; dopri5 by a numpy loop with scipy's table.
"""
import json
import math
import os
import resource
import runpy
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import types
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.integrate import RK45
from tqdm import tqdm

import diffusion
import sample
from ae import DCAE, AEConfig
from diffusion import build, from_pretrained, gaussian
from sample import generate
from test_diffusion import (ABAR, OneDevice, Payload, box_muller, fake_cuda, filled, fingerprint, noise, on_cuda,
                            save, shifted, tiny)

ROOT = Path(__file__).resolve().parent.parent
EVERY = [("DiT", "ddpm"), ("DiT", "dpm"), ("DiT", "dpm++2m"), ("UViT", "dpm"), ("UViT", "dpm++2m"),
         ("USiT", "dopri5"), ("USiT", "heun"), ("USiT", "euler"), ("USiT", "sde")]
OBJECTIVE = {"DiT": "ddpm", "UViT": "vp", "USiT": "flow"}

# [mean, std, absmax, sum_i out_i sin(i / 10), out_0 .. out_3, out_-4, out_-3] of the samples
GOLDEN = {
    ("DiT", "ddpm"): [3.156905661, 174.146597, 559.5612321, -5159.281425,
                      60.89203553, 187.452024, 171.8473799, -141.8272002, -266.9263129, 150.7835897],
    ("UViT", "dpm"): [-1.663897245, 16.69098838, 33.78061751, 50.89605741,
                      4.102440118, 18.53216405, 23.07586546, -5.316682523, -14.79973755, 22.23350131],
    ("SiT", "ode"): [-0.03313851112, 1.033580636, 2.906221381, 4.099784794,
                     0.1569419582, 1.015955348, 1.306760269, -0.7185447831, -1.035010979, 1.146912207],
    ("SiT", "sde"): [-0.05309387501, 0.5984786474, 1.598316036, 51.0351164,
                     0.4474705755, 0.7476383453, 0.6655251971, 0.2537608817, 0.001227519508, 0.04465354094],
    ("USiT", "ode"): [0.1059642819, 1.146942479, 2.309157978, -35.33082333,
                      -0.3164293054, 0.5183705505, 0.9517963705, -0.9763536567, -1.509493085, 0.9279189635],
    ("USiT", "sde"): [0.1101358193, 0.6388036744, 1.180913743, -22.3569977,
                      -0.3487611272, -0.2130573359, -0.08326812204, -0.4271771053, -0.5101473591, -0.03397991323]}


def alpha_of(family, t):
    """sqrt(abar) at the time fed to a network: DiT's 0 .. 999, UViT's 1 .. 1000; its log is linear in between."""
    n = np.asarray(t, dtype=np.float64) + (family == "DiT")
    return np.exp(np.interp(n, np.arange(1, 1001), 0.5 * ABAR[family].log().numpy()))


class Known(torch.nn.Module):
    """A stand-in for a network on two channels: what it says is any function of (x, t, y). In float64."""
    grid = (1, 1)

    def __init__(self, says, family="USiT"):
        super().__init__()
        self.says, self.family, self.objective, self.info, self.calls = says, family, OBJECTIVE[family], {}, []
        self.config = dict(name="known", c=2, size=1, num_classes=10)
        self.unused = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x, t, y):
        self.calls.append((x, t, y))
        return self.says(x, t.view(-1, 1, 1, 1), y)

    def times(self):
        return [t[0].item() for _, t, _ in self.calls]


# ----------------------------------------------------------------------------------------------------------------------
# Against the official samplers, and by hand

@pytest.mark.parametrize("family, solver, steps, golden, tolerance", [
    ("DiT", "ddpm", 10, "ddpm", 1e-8),
    ("UViT", "dpm", 30, "dpm", 2e-6),                                           # official times: float32
    ("SiT", "sde", 10, "sde", 1e-6), ("USiT", "sde", 10, "sde", 1e-6),
    ("SiT", "dopri5", None, "ode", 1e-3), ("USiT", "dopri5", None, "ode", 1e-3)])     # flows: the converged solution
def test_golden_trajectories(monkeypatch, family, solver, steps, golden, tolerance):
    monkeypatch.setattr(sample, "gaussian", lambda shape, seed, index, j, device, dtype: noise(j, shape))
    got = fingerprint(generate(filled(family), [3, 7], guidance=1.5, solver=solver, steps=steps))
    wanted = GOLDEN[family, golden]
    assert got == pytest.approx(wanted, rel=tolerance, abs=tolerance * wanted[1])


def test_default_solvers_steps_and_the_times_they_visit():
    def visit(family, solver, steps):
        net = Known(lambda x, t, y: torch.zeros(1, 4 if family == "DiT" else 2, 1, 1).double(), family)
        generate(net, [1], solver=solver, steps=steps)
        return net.times()

    for solver in (None, "ddpm"):
        seen = visit("DiT", solver, None)[::-1]
        assert len(seen) == 250 and seen[:5] == [0, 4, 8, 12, 16] and seen[-1] == 999
        assert seen[40:44] == [160, 164, 169, 173]
    for solver in (None, "dpm"):
        seen = visit("UViT", solver, None)                                      # official model times
        assert len(seen) == 30 and seen[:3] == pytest.approx([1000, 966.7, 933.4]) and seen[-1] == pytest.approx(34.3)
    assert visit("DiT", "dpm", 3) == pytest.approx([999, 666, 333])             # a DiT counts from 0
    assert len(visit("UViT", "dpm", 7)) == 7 and len(visit("UViT", "dpm", 8)) == 8
    assert len(visit("UViT", "dpm++2m", None)) == 30 and visit("UViT", "dpm++2m", 3) == pytest.approx([1000, 667, 334])
    assert visit("USiT", "euler", None) == pytest.approx([i / 250 for i in range(250)])
    assert visit("USiT", "sde", None) == pytest.approx([0.96 * i / 249 for i in range(250)])
    assert visit("USiT", "heun", None) == pytest.approx([(i + j) / 50 for i in range(50) for j in (0, 1)])
    assert visit("USiT", None, 2) == pytest.approx([0, 0.5, 0.5, 1])            # steps without a solver: heun
    assert visit("USiT", None, None)[:2] == [0, 1e-6] and len(visit("USiT", None, None)) % 6 == 2     # dopri5


def test_euler_and_heun_by_hand():
    y = torch.zeros(3, dtype=torch.long)
    growth, rising = Known(lambda x, t, y: x), Known(lambda x, t, y: t.expand_as(x))
    x0 = torch.tensor([box_muller(2, 7, i, 0) for i in range(3)]).double().view(3, 2, 1, 1)   # keyed (seed, image, 0)
    say = lambda net, solver, n: generate(net, y, solver=solver, steps=n, seed=7)
    for n in (1, 4):
        h = 1 / n
        assert torch.allclose(say(growth, "euler", n), x0 * (1 + h) ** n, rtol=1e-6)
        assert torch.allclose(say(growth, "heun", n), x0 * (1 + h + h**2 / 2) ** n, rtol=1e-6)
        assert torch.allclose(say(rising, "euler", n), x0 + (n - 1) / (2 * n), rtol=1e-6)
        assert torch.allclose(say(rising, "heun", n), x0 + 0.5, rtol=1e-6)
    assert torch.allclose(say(growth, "dopri5", None), x0 * math.e, rtol=1e-4)
    some = generate(growth, [0, 0], solver="euler", steps=1, seed=7, index=[2, 0])
    assert torch.allclose(some, 2 * x0[[2, 0]], rtol=1e-6)


def test_sde_by_hand():
    """SiT's: diffusion 1 - t, 0.96 / (N - 1) a step, then 0.04 without noise. The j-th noise: key (seed, image, j)."""
    net = Known(lambda x, t, y: 0.5 - x)
    eps = [torch.tensor([box_muller(2, 3, i, j) for i in (4, 9)]).double().view(2, 2, 1, 1) for j in range(3)]
    x = eps[0]
    for t, h, fresh in (0.0, 0.48, eps[1]), (0.48, 0.48, eps[2]), (0.96, 0.04, None):
        v, w = 0.5 - x, 1 - t
        x = x + (v + w * (t * v - x) / ((1 - t) ** 2 + t * (1 - t))) * h
        x = x if fresh is None else x + math.sqrt(2 * w * h) * fresh
    got = generate(net, [0, 0], solver="sde", steps=3, seed=3, index=[4, 9])
    assert torch.allclose(got, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["UViT", "DiT"])
def test_dpm_solvers_are_the_algorithms_of_their_paper(family):
    """arXiv 2211.01095. 2M, two steps: D = (1 + 1/2r) d_1 - 1/2r d_0 with r = h_1 / h_2. Single-step: one evaluation is
    first order, two are second order from the node in between."""
    net, shift = tiny(family).double(), int(family == "DiT")
    t = [1000.0 - shift, 500.5 - shift, 1.0 - shift]
    a = alpha_of(family, t)
    s = np.sqrt(1 - a**2)
    lam = np.log(a / s)
    x0 = gaussian((2, 8, 4, 4), 0, torch.arange(2), 0, dtype=torch.float64)
    y = torch.tensor([1, 2])
    data = lambda x, i: (x - s[i] * net(x, torch.full((2,), t[i], dtype=torch.float64), y)[:, :8]) / a[i]
    first = lambda x, i, j, d: s[j] / s[i] * x - a[j] * (np.exp(lam[i] - lam[j]) - 1) * d
    d0 = data(x0, 0)
    x1 = first(x0, 0, 1, d0)
    d1 = data(x1, 1)
    r = (lam[1] - lam[0]) / (lam[2] - lam[1])
    multi = first(x1, 1, 2, (1 + 1 / (2 * r)) * d1 - 1 / (2 * r) * d0)
    r = (lam[1] - lam[0]) / (lam[2] - lam[0])
    single = first(x0, 0, 2, d0) - a[2] * (np.exp(lam[0] - lam[2]) - 1) / (2 * r) * (d1 - d0)
    for solver, steps, wanted in ("dpm++2m", 2, multi), ("dpm", 2, single), ("dpm", 1, first(x0, 0, 2, d0)):
        got = generate(net, y, solver=solver, steps=steps)
        assert torch.allclose(got, wanted, rtol=1e-6, atol=1e-8), (solver, steps)


# ----------------------------------------------------------------------------------------------------------------------
# dopri5

def stiff(x, t, y):
    """Three velocities: a gentle one; one whose pull grows fifty times at t = 0.5; one that quivers at the end, where
    steps below 1e-4 are taken whatever their error."""
    exp, sin = (torch.exp, torch.sin) if torch.is_tensor(x) else (np.exp, np.sin)
    pull = 2 + 100 / (1 + exp(-100 * (t - 0.5)))
    quiver = (t > 0.999) * 1e3 * sin(1e7 * t)
    return (y == 0) * (1 - x) + (y == 1) * pull * (sin(5 * t) - x) + (y == 2) * (quiver - x)


def dormand_prince(f, x, rtol=1e-3, atol=1e-6):
    """torchdiffeq's rules with scipy's table; and [ours] no single error above atol + rtol / 2 * the picture's rms."""
    rms = lambda e: np.sqrt(np.mean(e**2))
    k = [f(x, 0.0)]
    scale = atol + rtol * np.abs(x)
    d0, d1 = rms(x / scale), rms(k[0] / scale)
    h0 = 0.01 * d0 / d1
    h = min(100 * h0, (0.01 / max(d1, rms((f(x + h0 * k[0], h0) - k[0]) / scale) / h0)) ** 0.2)
    t, calls, rejected = 0.0, 2, 0
    while t < 1:
        last = h >= 1 - t
        h, k = min(h, 1 - t), k[:1]
        for a, c in zip(RK45.A[1:], RK45.C[1:]):
            k.append(f(x + h * sum(w * ki for w, ki in zip(a, k)), t + c * h))
        x_new = x + h * sum(w * ki for w, ki in zip(RK45.B, k))
        k.append(f(x_new, t + h))
        error = h * sum(w * ki for w, ki in zip(RK45.E, k))
        ratio = rms(error / (atol + rtol * np.maximum(np.abs(x), np.abs(x_new))))
        ratio = max(ratio, np.abs(error).max() / (atol + rtol / 2 * rms(x_new)), 1e-10)
        calls, factor = calls + 6, 0.9 * ratio**-0.2
        if ratio <= 1 or h < 1e-4:
            t, x, k = 1.0 if last else t + h, x_new, k[-1:]
            h *= min(max(factor, 1), 10)
        else:
            h, rejected = h * min(max(factor, 0.2), 1), rejected + 1
    return x, calls, rejected


def test_dopri5_steps_as_torchdiffeq_does_image_by_image():
    net, y = Known(stiff), torch.tensor([0, 1, 2, 1])
    net.says = lambda x, t, y: stiff(x, t, y.view(-1, 1, 1, 1))
    got = generate(net, y)
    wide = [len(t) for _, t, _ in net.calls]
    seen = torch.cat([y for _, _, y in net.calls])                              # images 1 and 3 differ in their start
    assert wide[0] == 4 and wide == sorted(wide, reverse=True)                  # who has arrived leaves the batch
    total = {}
    for i in range(4):
        x0 = gaussian((1, 2), 0, torch.tensor([i]), 0, dtype=torch.float64)[0].numpy()
        wanted, calls, rejected = dormand_prince(lambda x, t: stiff(x, t, np.array(y[i].item())), x0)
        assert got[i].flatten().numpy() == pytest.approx(wanted, rel=1e-7), i
        total[y[i].item()] = total.get(y[i].item(), 0) + calls
        assert y[i] == 0 or rejected > 3
    assert [(seen == k).sum().item() for k in range(3)] == [total[k] for k in range(3)]
    alone = generate(net, y[1:2], index=[1])
    assert torch.allclose(alone, got[1:2], rtol=1e-9)


def test_dopri5_rejects_what_a_thousand_heun_steps_resolve():
    net, y = Known(lambda x, t, y: stiff(x, t, 1)), torch.zeros(3, dtype=torch.long)
    got = generate(net, y)
    visited = net.times()
    exact = generate(net, y, solver="heun", steps=1000)
    assert (got - exact).abs().max() < 2e-3 * exact.abs().max()
    assert any(later < t - 1e-9 for t, later in zip(visited[1:], visited[6:]))  # a step was taken back
    net.says = lambda x, t, y: x * math.nan                                 # a broken network ends; it does not hang
    assert generate(net, y).isnan().all()


# ----------------------------------------------------------------------------------------------------------------------
# CUDA on a machine that has none: see fake_cuda in test_diffusion.py

def sample_on_cuda(family, solver, monkeypatch, fake_cuda):
    """Two steps or so under bf16 autocast, with guidance -> latents, and the dtypes that the blocks computed in."""
    net, steps = tiny(family), 4
    nodes = sample.dpm_nodes(net, steps) if solver.startswith("dpm") else None  # numbers: fake tensors have none
    for table in (diffusion.ddpm_schedule, diffusion.vp_schedule):
        table.cache_clear()
    monkeypatch.setattr(sample, "dpm_nodes", lambda *args: nodes)
    # which images are guided depends on data: here all of them, by an index on the same device
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda x: torch.arange(len(x), device=x.device)[:, None])
    seen = set()
    with fake_cuda, OneDevice():
        for layer in on_cuda(net).layers():
            layer.mlp.register_forward_hook(lambda m, args, out: seen.add((out.device.type, out.dtype)))
        index = torch.arange(3, device="cuda")
        draw = lambda j: gaussian((3, 5, 4, 4), 0, index, j, device="cuda")
        model = sample.guided(net, index, 1.5, (0.2, 0.9))
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            x = sample.SOLVERS[solver][0](net, model, draw(0), steps, draw)
            assert model(x, index)[0].dtype == torch.float32                    # no solver computes in bf16
    return x, seen


@pytest.mark.parametrize("family, solver", [*(pair for pair in EVERY if pair[1] != "dopri5"), ("SiT", "heun")])
def test_every_fixed_step_solver_runs_on_cuda(monkeypatch, fake_cuda, family, solver):
    x, seen = sample_on_cuda(family, solver, monkeypatch, fake_cuda)
    assert x.device.type == "cuda" and x.dtype == torch.float32 and x.shape == (3, 5, 4, 4)
    assert seen == {("cuda", torch.bfloat16)}


@pytest.mark.parametrize("family, solver, name, wrong", [
    ("USiT", "sde", "flow_time", lambda net, t: t.cpu()),
    ("UViT", "dpm", "log_alpha", lambda net, t: torch.zeros(len(t), dtype=torch.float64)),
    ("DiT", "ddpm", "ddpm_schedule", lambda kept=None, *where, real=sample.ddpm_schedule: real(kept, "cpu"))])
def test_one_tensor_left_on_the_cpu_fails_there(monkeypatch, fake_cuda, family, solver, name, wrong):
    monkeypatch.setattr(sample, name, wrong)
    with pytest.raises(Exception, match="cpu"):
        sample_on_cuda(family, solver, monkeypatch, fake_cuda)


# ----------------------------------------------------------------------------------------------------------------------
# The oracle: the exact denoiser of a Gaussian mixture stands in for the network

class Oracle(torch.nn.Module):
    """E[eps | z_t] (and v = E[z - eps | z_t]) of a mixture of axis-aligned Gaussians in two dimensions."""
    means = torch.tensor([[1.2, 0.3], [-0.8, 0.9], [-0.3, -1.1]])
    stds = torch.tensor([[0.3, 0.5], [0.6, 0.2], [0.4, 0.4]])
    weights = torch.tensor([0.5, 0.3, 0.2])

    def __init__(self, family):
        super().__init__()
        self.family, self.objective, self.grid, self.info = family, OBJECTIVE[family], (1, 1), {}
        self.config = dict(name="oracle", c=2, size=1, num_classes=0)
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, z_t, t, y):
        alpha = t if self.family == "USiT" else torch.from_numpy(alpha_of(self.family, t)).float()
        sigma = 1 - t if self.family == "USiT" else (1 - alpha**2).sqrt()
        alpha, sigma, x = alpha.view(-1, 1, 1), sigma.view(-1, 1, 1), z_t.view(-1, 1, 2)
        var = (alpha * self.stds) ** 2 + sigma**2                               # (B, 3, 2), of z_t within a component
        away = (x - alpha * self.means) / var
        which = torch.softmax(self.weights.log() - 0.5 * (away**2 * var + var.log()).sum(2), dim=1)[..., None]
        eps = (which * sigma * away).sum(1).view(-1, 2, 1, 1)
        z = (which * (self.means + alpha * self.stds**2 * away)).sum(1).view(-1, 2, 1, 1)
        return {"USiT": z - eps, "UViT": eps, "DiT": torch.cat([eps, torch.zeros_like(eps)], dim=1)}[self.family]


@pytest.mark.parametrize("family, solver", EVERY)
def test_every_sampler_recovers_the_mixture(family, solver):
    n = 20000
    steps = {"ddpm": 120, "euler": 80, "sde": 100, "heun": 25, "dpm++2m": 60}.get(solver)
    x = generate(Oracle(family), torch.zeros(n, dtype=torch.long), solver=solver, steps=steps).view(n, 2)
    mean = (Oracle.weights[:, None] * Oracle.means).sum(0)
    off = Oracle.means - mean
    cov = torch.diag((Oracle.weights[:, None] * Oracle.stds**2).sum(0))
    cov += (Oracle.weights[:, None, None] * off[:, :, None] * off[:, None, :]).sum(0)
    assert (x.mean(0) - mean).abs().max() < 0.03, solver                        # 4 standard errors
    assert (x.T.cov() - cov).abs().max() < 0.04, solver
    near = ((x[:, None] - Oracle.means) / Oracle.stds).square().sum(2).min(1).values     # nothing between the modes
    assert (near < 9).float().mean() > 0.97, solver


# ----------------------------------------------------------------------------------------------------------------------
# generate

@pytest.mark.parametrize("family, solver", EVERY)
def test_an_image_depends_on_seed_and_index_alone(family, solver):
    net, y = tiny(family), torch.tensor([1, 4, 2, 10, 0])
    kw = dict(guidance=1.5, interval=(0.2, 0.9), solver=solver, steps=None if solver == "dopri5" else 8, seed=3)
    whole = generate(net, y, **kw)
    parts = [generate(net, y[i], index=i, **kw) for i in (torch.tensor([4]), torch.tensor([2, 0]))]
    assert torch.allclose(whole[[4, 2, 0]], torch.cat(parts), atol=1e-4 * whole.abs().max().item())
    assert not torch.allclose(whole, generate(net, y, **{**kw, "seed": 4}), atol=0.1)
    assert whole[0].ne(generate(net, y[:1], index=[1], **kw)[0]).all()


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 3.0])
def test_guidance_is_null_plus_g_times_the_difference_on_all_channels(guidance):
    said = torch.arange(22.0, dtype=torch.float64).view(11, 2, 1, 1) ** 1.5     # per label and channel; row 10: null
    net = Known(lambda x, t, y: said[y])
    y = torch.tensor([1, 4])
    x0 = gaussian((2, 2, 1, 1), 0, torch.arange(2), 0, dtype=torch.float64)
    v = said[10] + guidance * (said[y] - said[10])
    assert torch.allclose(generate(net, y, guidance=guidance, solver="euler", steps=4), x0 + v, rtol=1e-9)
    assert {len(t) for _, t, _ in net.calls} == ({2} if guidance == 1 else {4})    # 1: no pass for the null label
    some = generate(net, y, guidance=guidance, interval=(0.25, 0.5), solver="euler", steps=4)    # both bounds count
    assert torch.allclose(some, x0 + (v + said[y]) / 2, rtol=1e-9)
    late = generate(net, y, guidance=guidance, interval=(0.6, 1), solver="euler", steps=4)    # 1 is data
    assert torch.allclose(late, x0 + v / 4 + 3 * said[y] / 4, rtol=1e-9)


@pytest.mark.parametrize("family", ["DiT", "UViT"])
def test_the_interval_is_measured_in_signal_over_signal_plus_noise(family):
    net, calls = tiny(family), []
    net.register_forward_hook(lambda m, args, out: calls.append((args[1][0].item(), args[2].tolist())))
    plain = generate(net, [1, 2], steps=20)
    alpha = alpha_of(family, [t for t, _ in calls])
    share = alpha / (alpha + np.sqrt(1 - alpha**2))
    assert (np.diff(share) > 0).all() and share[0] < 0.07                       # 0 is noise
    for inside, i, j in ((1e-9, 4, 11), (-1e-9, 5, 10)):
        calls.clear()
        interval = share[4] * (1 - inside), share[11] * (1 + inside)
        part = generate(net, [1, 2], steps=20, guidance=2.0, interval=interval)
        assert [y for _, y in calls] == [[1, 2, 10, 10] if i <= k <= j else [1, 2] for k in range(20)]
        assert not torch.equal(part, plain)


@pytest.mark.parametrize("family, solver", EVERY)
def test_c_prime(family, solver):
    net, kw = tiny(family), dict(solver=solver, steps=None if solver == "dopri5" else 6, seed=1, guidance=1.2)
    z = generate(net, [1, 2], c_prime=3, **kw)
    assert z.shape == (2, 8, 4, 4) and (z[:, 3:] == 0).all() and (z[:, :3] != 0).all()
    assert torch.equal(generate(net, [1, 2], c_prime=8, **kw), generate(net, [1, 2], **kw))
    small = tiny(family, c=3)                                                   # the network cut to c' channels
    state = net.state_dict()
    for name in small.state_dict():
        if name in ("patch_embed.proj.weight", "x_embedder.proj.weight"):
            state[name] = state[name][:, :3]
        elif name.startswith(("decoder_pred", "final_layer.linear")):
            state[name] = state[name].unflatten(0, (-1, 8))[:, :3].flatten(0, 1)
    small.load_state_dict(state)
    assert torch.allclose(generate(small, [1, 2], **kw), z[:, :3], atol=1e-4 * z.abs().max().item())


def test_latents_are_fp32_from_a_bf16_network_and_the_null_label_is_a_label():
    net = tiny("USiT", size=(2, 4)).to(torch.bfloat16)
    z = generate(net, [10], solver="euler", steps=2)
    assert z.dtype == torch.float32 and z.shape == (1, 8, 2, 4) and not z.requires_grad


@pytest.mark.parametrize("kw, word", [
    (dict(labels=[11]), "label 11"), (dict(labels=[-1]), "label -1"), (dict(guidance=-1), "--guidance -1"),
    (dict(guidance=math.nan), "--guidance nan"), (dict(interval=(0.6, 0.2)), "--interval 0.6 0.2"),
    (dict(interval=(0, 2)), "--interval"), (dict(interval=(-0.1, 1)), "--interval"),
    (dict(interval=(0.5, 0.5)), "--interval"), (dict(solver="magic"), "--solver magic"),
    (dict(solver="ddpm"), "does not fit SiT-T: one of dopri5, heun, euler, sde"),
    (dict(c_prime=9), "--c_prime 9"), (dict(c_prime=0), "--c_prime 0"),
    (dict(steps=0), "--steps 0"), (dict(steps=1001), "1 .. 1000"), (dict(solver="dopri5", steps=5), "heun"),
    (dict(solver="sde", steps=1), "2 .. 1000")])
def test_bad_arguments_are_one_line(kw, word):
    with pytest.raises(ValueError, match=word) as e:
        generate(build("SiT-T", c=8, size=4, num_classes=10), **{"labels": [1], **kw})
    assert len(str(e.value)) < 200 and "\n" not in str(e.value)


def test_ddpm_needs_two_steps():
    with pytest.raises(ValueError, match="2 .. 1000"):
        generate(tiny("DiT"), [1], steps=1)


# ----------------------------------------------------------------------------------------------------------------------
# Command line

SMALL = dict(encoder_widths=(16, 16, 32), encoder_depths=(0, 1, 1),
             decoder_widths=(16, 16, 32), decoder_depths=(0, 1, 1))


def save_autoencoder(path, seed, **kw):
    torch.manual_seed(seed)
    config = AEConfig(**{**dict(f=4, c=8), **SMALL, **kw})
    ae = DCAE(config)
    torch.save(dict(kind="ae", config=asdict(config), model=ae.state_dict(), scale=2.0, image_size=16), path)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Random autoencoders (f4c8) and a random flow model on 4x4 latents, as the trainers leave them."""
    root = tmp_path_factory.mktemp("out")
    for seed, name in enumerate(("ae", "run", "other")):
        (root / name).mkdir()
        if name != "run":
            save_autoencoder(root / name / "ckpt.pt", seed)
    net = tiny("USiT", num_classes=3)
    ckpt = dict(kind="diffusion", config=net.config, model=shifted(net).state_dict(), ema=net.state_dict(), scale=1.25,
                ae=str(root / "ae"), ae_hash="another", image_size=16, step=5, classes=["cat", "dog", "owl, barn"])
    torch.save(ckpt, root / "run" / "ckpt.pt")
    return root / "run"


def change(run_folder, folder, **entries):
    """The run in another folder, with some of its entries changed; None drops one."""
    ckpt = {**torch.load(run_folder / "ckpt.pt"), **entries}
    folder.mkdir(parents=True)
    torch.save({k: v for k, v in ckpt.items() if v is not None}, folder / "ckpt.pt")
    return folder


def pictures(run_folder, y, steps=4, seed=0, guidance=1.0, interval=(0, 1), c_prime=8, scale=1.25, ae="ae", net=None):
    """The same pictures by Euler's rule written out, and the autoencoder's decoder."""
    net, ae = net or from_pretrained(run_folder), DCAE.from_pretrained(run_folder.parent / ae)
    z = torch.zeros(len(y), 8, *net.grid)
    z[:, :c_prime] = gaussian((len(y), c_prime, *net.grid), seed, torch.arange(len(y)), 0)
    with torch.no_grad():
        for i in range(steps):
            t = torch.full((len(y),), i / steps)
            v = net(z, t, torch.tensor(y))
            if guidance != 1 and interval[0] <= i / steps <= interval[1]:
                null = net(z, t, torch.full((len(y),), net.config["num_classes"]))
                v = null + guidance * (v - null)
            z[:, :c_prime] += v[:, :c_prime] / steps
        img = ae.decode(z / scale)
    return ((img.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def draw(run_folder, out, *flags):
    """sample.py with Euler's rule and four steps, unless flags say otherwise: pictures, labels, samples.json."""
    usual = ["--ckpt", run_folder, "--solver", "euler", "--steps", 4, "--n", 3, "--out", out]
    sample.main([str(flag) for flag in (*usual, *flags)])
    return read(out)


def read(folder):
    file = np.load(folder / "samples.npz")
    return file["arr_0"], file["arr_1"], json.loads((folder / "samples.json").read_text())


def shown(folder):
    return sorted(p.name for p in folder.iterdir() if p.name[0] != ".")


def close(a, b):
    """Another batch size or order of sums: at most a rounding step, in few places."""
    gap = np.abs(a.astype(int) - b)
    return a.shape == b.shape and gap.max() <= 1 and gap.mean() < 0.02


@pytest.mark.parametrize("flags, how", [
    ("", {}), ("--seed 3", dict(seed=3)), ("--steps 3", dict(steps=3)), ("--c_prime 3", dict(c_prime=3)),
    ("--guidance 2.5", dict(guidance=2.5)), ("--guidance 0", dict(guidance=0.0)),
    ("--guidance 4 --interval 0.25 0.5", dict(guidance=4.0, interval=(0.25, 0.5))),
    ("--classes dog", dict(y=[1, 1, 1])), ("--ae OTHER", dict(ae="other")),
    ("--n 5 --batch_size 2", dict(y=[0, 1, 2, 0, 1]))])
def test_every_flag_changes_the_pictures_as_it_says(run_folder, tmp_path, flags, how):
    given = flags.replace("OTHER", str(run_folder.parent / "other")).split()
    img, y, _ = draw(run_folder, tmp_path, *given)
    how = {"y": [0, 1, 2], **how}
    assert img.dtype == np.uint8 and y.tolist() == how["y"] and close(img, pictures(run_folder, **how))
    same = flags in ("", "--n 5 --batch_size 2")                                # the others matter
    assert close(img[:3], pictures(run_folder, [0, 1, 2])) == same


@pytest.fixture(scope="module")
def default_run(run_folder):
    folder = run_folder.parent / "moved"
    shutil.copytree(run_folder, folder)
    sample.main(["--ckpt", str(folder)])
    return folder


def test_defaults_and_samples_json(run_folder, default_run):
    """100 pictures, all classes in turn, dopri5, no guidance, seed 0, fp32 on a CPU; written into the run's folder."""
    img, y, about = read(default_run / "samples")
    net, ae = from_pretrained(run_folder), DCAE.from_pretrained(run_folder.parent / "ae")
    assert y.tolist() == [i % 3 for i in range(100)]
    with torch.no_grad():
        latents = generate(net, y[:6], solver="dopri5")
        wanted = ((ae.decode(latents / 1.25).clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)
    assert close(img[:6], wanted.numpy()) and img.shape == (100, 16, 16, 3)
    assert about.pop("img_per_s") > 0 and len(about.pop("ae_hash")) == len(about.pop("weights")) == 16
    assert about == dict(
        ckpt=str(default_run), toy=False, model=net.config, ae=str(run_folder.parent / "ae"), n=100, classes="all",
        guidance=1.0, interval=[0, 1], solver="dopri5", steps=None, c_prime=None, batch_size=50, seed=0, out=None,
        dtype="fp32", bench=False, step=5, scale=1.25, ranks=1, device="cpu", torch=str(torch.__version__))
    assert shown(default_run / "samples") == ["samples.json", "samples.npz", "samples.png"]


def test_where_the_pictures_go(run_folder, tmp_path, monkeypatch):
    file = shutil.copy(run_folder / "ckpt.pt", tmp_path / "a.pt")
    sample.main([f"--ckpt={file}", "--n=1", "--solver=euler", "--steps=1"])
    assert (tmp_path / "samples" / "samples.npz").exists()                      # beside the file

    monkeypatch.chdir(tmp_path)                                                 # --toy: its folders, guidance 2
    change(run_folder, tmp_path / "out" / "toy-diffusion")
    sample.main(["--toy", "--n", "3", "--solver", "euler", "--steps", "4"])
    img, y, about = read(tmp_path / "out" / "toy-samples")
    assert close(img, pictures(run_folder, [0, 1, 2], guidance=2.0))
    assert about["guidance"] == 2.0 and about["ckpt"] == "out/toy-diffusion"
    img, _, about = draw(run_folder, tmp_path / "mine", "--toy", "--guidance", 3)       # flags beside it win
    assert close(img, pictures(run_folder, [0, 1, 2], guidance=3.0)) and about["ckpt"] == str(run_folder)


def test_scale_is_the_checkpoints_else_the_autoencoders(run_folder, tmp_path):
    img, _, about = draw(change(run_folder, tmp_path / "a", scale=0.5), tmp_path / "b")
    assert close(img, pictures(run_folder, [0, 1, 2], scale=0.5)) and about["scale"] == 0.5
    img, _, about = draw(change(run_folder, tmp_path / "c", scale=None), tmp_path / "d")
    assert close(img, pictures(run_folder, [0, 1, 2], scale=2.0)) and about["scale"] == 2.0


def test_dtype_is_the_denoisers_alone(run_folder, tmp_path, monkeypatch):
    seen, real = [], generate

    def spy(*args, **kw):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), real(*args, **kw)))
        return seen[-1][2]

    monkeypatch.setattr(sample, "generate", spy)
    fp32, half = (draw(run_folder, tmp_path / d, "--dtype", d)[0] for d in ("fp32", "bf16"))
    assert [on for on, *_ in seen] == [False, True] and seen[1][1] == torch.bfloat16
    exact, z = seen[0][2], seen[1][2]
    assert z.dtype == torch.float32 and 0.001 < (z - exact).abs().max() < 0.1 * exact.abs().max()
    with torch.no_grad():
        wanted = DCAE.from_pretrained(run_folder.parent / "ae").decode(z / 1.25).clamp(-1, 1)
    wanted = ((wanted + 1) * 127.5).round().permute(0, 2, 3, 1)
    assert np.array_equal(wanted.numpy(), half)                                 # decoded in fp32


def test_wide_latents_and_published_weights(run_folder, tmp_path):
    """--model tells UViT from USiT where the file cannot; a run without classes; latents need not be square."""
    torch.manual_seed(0)
    net = build("USiT-T", c=8, size=4, num_classes=3)
    file = save(net, tmp_path / "weights.pt")
    img, _, about = draw(file, tmp_path / "a", "--model", "USiT", "--ae", run_folder.parent / "ae")
    assert close(img, pictures(run_folder, [0, 1, 2], net=net.eval(), scale=2.0)) and about["model"] == net.config
    wide = tiny("USiT", num_classes=0, size=(4, 2))
    folder = change(run_folder, tmp_path / "b", config=wide.config, model=wide.state_dict(), ema=None, classes=None)
    img, y, _ = draw(folder, tmp_path / "c")
    assert img.shape == (3, 16, 8, 3) and y.tolist() == [0, 0, 0]
    assert close(img, pictures(run_folder, [0, 0, 0], net=wide))


@pytest.fixture()
def quick(run_folder, monkeypatch):
    """Labels and grid of a run whose pictures do not matter: every pixel of image i is i."""
    grid = []
    number = lambda net, y, index, **kw: index.view(-1, 1, 1, 1).expand(-1, 8, 4, 4) * 1.0
    flat = lambda self, z: (z[:, :1].mean((2, 3), keepdim=True) * 1.25 / 127.5 - 1).expand(-1, 3, 16, 16)
    monkeypatch.setattr(sample, "generate", number)
    monkeypatch.setattr(sample, "save_grid", lambda *args: grid.append(args))
    monkeypatch.setattr(DCAE, "decode", flat)

    def run(out, *flags, folder=run_folder):
        sample.main(["--ckpt", str(folder), "--out", str(out), *map(str, flags)])
        img, y, about = read(out)
        assert img[:, 0, 0, 0].tolist() == list(range(len(img)))
        shown, path, ncol, titles, rows = grid.pop()
        assert Path(path) == out / "samples.png"
        return y.tolist(), shown[:, 0, 0, 0].tolist(), ncol, titles, rows
    return run


def test_classes(run_folder, tmp_path, quick):
    names = ["zero", "one", "two", "x-ray", "a, b", *map(str, range(5, 12))]
    net = tiny("USiT", num_classes=12)
    twelve = change(run_folder, tmp_path / "twelve", config=net.config, ema=net.state_dict(), classes=names)
    say = lambda text, n: quick(tmp_path / "a", "--n", n, "--classes", text, folder=twelve)[0]
    default = lambda n: quick(tmp_path / "a", "--n", n, folder=twelve)[0]
    assert say("7", 3) == [7, 7, 7] and say("3-5", 4) == [3, 4, 5, 3]           # both ends
    assert say("two,0-1", 4) == [2, 0, 1, 2] and say("1,0-2, 1", 4) == [1, 0, 2, 1]   # each once, in this order
    assert say("x-ray", 1) == [3] and say("a, b", 1) == [4] and say("11", 1) == [11]
    assert say("all", 25) == [*range(12), *range(12), 0]
    assert say("all", 4) == [0, 3, 6, 9] and say("11,9,7,5,3", 2) == [11, 7]    # more classes than pictures: spread
    assert default(12) == list(range(12)) and default(100) == [i % 12 for i in range(100)]     # up to 100: all
    for text in ("12", "9-12", "2-1", "5-", "one,twelve", "", "0-99999999999999", "9" * 5000):
        with pytest.raises(ValueError, match="--classes"):
            say(text, 3)


def test_numbers_are_names_where_all_names_are_numbers(run_folder, tmp_path, quick):
    """Folders sort as text: 0, 1, 10, 11, 2, ... So the folder 2 is class 4, and 2-3 must not be 10 and 11."""
    names = sorted(map(str, range(12)))
    assert names[:5] == ["0", "1", "10", "11", "2"]
    net = tiny("USiT", num_classes=12)
    config = dict(config=net.config, ema=net.state_dict())
    folder = change(run_folder, tmp_path / "run", **config, classes=names)
    say = lambda text, n, folder=folder: [names[y] for y in quick(tmp_path / "a", "--n", n, "--classes", text,
                                                                  folder=folder)[0]]
    assert say("2-3", 4) == ["2", "3", "2", "3"] and say("2,3", 2) == ["2", "3"] and say("10", 1) == ["10"]
    assert say("9-11,0", 4) == ["9", "10", "11", "0"]
    below = change(run_folder, tmp_path / "below", **config, classes=sorted(map(str, range(-1, 11))))
    assert quick(tmp_path / "a", "--n", 2, "--classes", "0-1", folder=below)[0] == [1, 2]     # -1, 0, 1, 10, 2, ...
    assert quick(tmp_path / "a", "--n", 1, "--classes", "-1", folder=below)[0] == [0]
    years = [str(1990 + k) for k in range(12)]                                  # not from 0 on
    gaps = ["007", *(str(10 * k) for k in range(1, 12))]
    mixed = [*names[:11], "cat"]                                                # one word: numbers are positions again
    for k, (names, text, wanted) in enumerate([(years, "1995-1997", ["1995", "1996", "1997"]), (gaps, "7", ["007"]),
                                               (gaps, "7-20", ["007", "10", "20"]), (mixed, "4-5", ["2", "3"])]):
        assert say(text, len(wanted), change(run_folder, tmp_path / str(k), **config, classes=names)) == wanted
    for k, (names, text) in enumerate([(years, "3"), (gaps, "7-8"), (gaps, "8")]):
        with pytest.raises(ValueError, match="--classes"):
            say(text, 1, change(run_folder, tmp_path / f"{k} not", **config, classes=names))


def test_random_labels_are_adms(run_folder, tmp_path, quick):
    """torch.randint(0, 1000, (n,)), CPU generator, seed 0 [DC-Gen]: the default beyond 100 pictures."""
    official = [44, 239, 933, 760, 963, 379, 427, 503, 497, 683, 101, 866, 756, 399, 878, 376]
    net = tiny("USiT", num_classes=1000)
    folder = change(run_folder, tmp_path / "run", config=net.config, ema=net.state_dict(), classes=None)
    y, shown, ncol, titles, _ = quick(tmp_path / "a", "--n", 101, folder=folder)
    assert y[:16] == official and shown == list(range(100)) and ncol == 10 and titles is None
    assert quick(tmp_path / "b", "--n", 16, "--classes", "random", folder=folder)[0] == official
    assert quick(tmp_path / "c", "--n", 16, "--classes", "random", "--seed", 1, folder=folder)[0] != official
    assert sample.parse_classes("random", 50000, 0, 1000, []).sum() == 24998842


def test_the_grid_has_a_column_per_class(run_folder, tmp_path, quick):
    _, shown, ncol, titles, rows = quick(tmp_path / "a", "--n", 7)
    assert shown == list(range(7)) and ncol == 3 and titles == ["cat", "dog", "owl, barn"] and rows is None
    assert quick(tmp_path / "a", "--n", 7, "--classes", "owl, barn")[2:] == (7, None, None)    # one class: ten in a row
    assert quick(tmp_path / "a", "--n", 30, "--classes", 2)[2:] == (10, None, None)
    assert quick(tmp_path / "a", "--n", 6, "--classes", "2,0")[1:4] == (list(range(6)), 2, ["owl, barn", "cat"])
    _, shown, ncol, titles, rows = quick(tmp_path / "a", "--n", 100, "--c_prime", 3)
    assert ncol == 3 and titles == ["cat", "dog", "owl, barn"] and rows == ["c' = 3", "all 8"] * 13
    assert shown == [i + 3 * k for k in range(13) for _ in range(2) for i in range(3)]   # 39 of 100, each twice
    assert quick(tmp_path / "a", "--n", 5, "--c_prime", 3)[1] == [0, 1, 2, 0, 1, 2]   # whole rows alone
    nameless = tiny("USiT", num_classes=12)
    folder = change(run_folder, tmp_path / "n", config=nameless.config, ema=nameless.state_dict(), classes=None)
    numbers = [str(i) for i in range(2, 12)]
    assert quick(tmp_path / "b", "--n", 20, "--classes", "2-11", folder=folder)[2:4] == (10, numbers)
    assert quick(tmp_path / "b", "--n", 22, folder=folder)[2:4] == (10, None)   # more than ten classes


def test_full_pictures_stand_below_the_coarse_ones_from_the_same_noise(run_folder, tmp_path):
    flags = "--c_prime 3 --n 6 --batch_size 2 --guidance 1.5 --interval 0 0.9 --classes 0-2 --dtype fp32"
    about = draw(run_folder, tmp_path, *flags.split())[2]
    given = dict(c_prime=3, n=6, batch_size=2, guidance=1.5, interval=[0, 0.9], classes="0-2", dtype="fp32", steps=4)
    assert {k: about[k] for k in given} == given
    sheet = np.asarray(Image.open(tmp_path / "samples.png"))                    # tiles of 16 pixels, enlarged 4 times
    coarse, full = (pictures(run_folder, [0, 1, 2, 0, 1, 2], c_prime=k, guidance=1.5) for k in (3, 8))
    shown = coarse[:3], full[:3], coarse[3:], full[3:]
    top, left = sheet.shape[0] - 4 * 66, sheet.shape[1] - 3 * 66                # the captions' room
    assert top > 0 and left > 0 and (sheet[:top, left:] < 128).any() and (sheet[top:, :left] < 128).any()
    for r, row in enumerate(shown):
        for k, tile in enumerate(row):
            y, x = top + 66 * r, left + 66 * k
            assert close(sheet[y : y + 64 : 4, x : x + 64 : 4], tile), (r, k)


def test_a_note_says_that_the_autoencoder_is_another(run_folder, default_run, tmp_path, capsys):
    own = read(default_run / "samples")[2]["ae_hash"]
    for ae_hash, flags, noted in ((own, [], False), (None, [], False), ("another", [], True),
                                  (own, ["--ae", run_folder.parent / "other"], True)):
        folder = change(run_folder, tmp_path / f"{ae_hash} {len(flags)}", ae_hash=ae_hash)
        about = draw(folder, tmp_path / "a", "--n", 1, "--steps", 1, *flags)[2]
        said = capsys.readouterr().out
        assert ("is not the autoencoder this model's latents came from" in said) == noted and "1 pictures in" in said
        assert (about["ae_hash"] == own) == (not flags)


def test_bench_is_one_json_line(run_folder, tmp_path, capsys):
    flags = ["--ckpt", str(run_folder), "--solver", "heun", "--steps", "2", "--bench", "--out", str(tmp_path / "none")]
    seen, real = [], generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "generate", lambda net, y, **kw: seen.append(len(y)) or real(net, y, **kw))
        sample.main([*flags, "--n", "4", "--batch_size", "3"])
        sample.main([*flags, "--n", "2"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    den, dec = line["denoiser_img_per_s"], line["decoder_img_per_s"]
    assert line["img_per_s"] == pytest.approx(1 / (1 / den + 1 / dec)) and den > 0 and dec > 0
    assert line["model"] == "USiT" and line["solver"] == "heun" and seen == [3, 3, 2, 2]    # a warm-up, then the clock
    assert not (tmp_path / "none").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Ended before the end

def start(flags, errors, **env):
    """python sample.py FLAGS as a process: a fork, which saves the seconds of an import. -> its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        tqdm.set_lock(threading.RLock())                                        # its own, which a kill may leave held
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)           # not those that a trainer of another test has left
        torch.set_num_threads(1)
        os.environ.update(env)
        sys.argv = ["sample.py", *map(str, flags)]
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(errors, "a", buffering=1)
        runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
        code = 0
    except SystemExit as e:
        Path(errors).open("a").write(f"{e}\n")
    except BaseException:
        Path(errors).open("a").write(traceback.format_exc())
    finally:
        os._exit(code)


FIVE = "--solver sde --steps 2 --n 5 --batch_size 2 --classes random --guidance 1.5".split()    # three batches


class Stopped(BaseException):
    """Any end of a process, where a test can catch it."""


def begin(run_folder, out, batches, *flags):
    """A run that ends while it draws the batch after so many."""
    with pytest.MonkeyPatch.context() as patch:
        calls, real = [], sample.generate

        def stop(*args, **kw):
            calls.append(1)
            if len(calls) > batches:
                raise Stopped
            return real(*args, **kw)
        patch.setattr(sample, "generate", stop)
        with pytest.raises(Stopped):
            sample.main([*map(str, ("--ckpt", run_folder, "--out", out, *FIVE, *flags))])


def go_on(run_folder, out, *flags):
    """The same command again -> how many batches it drew, and the bytes of samples.npz."""
    drawn, real = [], sample.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "generate", lambda *args, **kw: drawn.append(1) or real(*args, **kw))
        sample.main([*map(str, ("--ckpt", run_folder, "--out", out, *FIVE, *flags))])
    assert shown(out) == ["samples.json", "samples.npz", "samples.png"]
    return len(drawn), (out / "samples.npz").read_bytes()


@pytest.fixture(scope="module")
def whole(run_folder, tmp_path_factory):
    """samples.npz of FIVE, never ended."""
    return go_on(run_folder, tmp_path_factory.mktemp("whole"))[1]


def test_a_run_that_was_ended_goes_on_and_ends_with_the_same_bytes(run_folder, tmp_path, whole):
    for batches in (0, 1, 2):
        out = tmp_path / str(batches)
        begin(run_folder, out, batches)
        assert not (out / "samples.npz").exists()
        assert go_on(run_folder, out) == (3 - batches, whole)
    begin(run_folder, out, 2)                                                   # beside a finished one
    assert go_on(run_folder / "ckpt.pt", out) == (1, whole)                     # a setting in another spelling
    assert go_on(run_folder, out) == (3, whole)


def test_ended_at_any_write_to_the_disk(run_folder, tmp_path, whole):
    """Pixels come before their mark: a batch counts once all of it is there."""
    real = os.fsync
    for stop in range(1, 8):
        for after in (False, True):
            out, calls = tmp_path / f"{stop} {after}", []

            def fsync(file):
                calls.append(1)
                if len(calls) == stop and not after:
                    raise Stopped
                real(file)
                if len(calls) == stop:
                    raise Stopped
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "fsync", fsync)
                with pytest.raises(Stopped):
                    sample.main([*map(str, ("--ckpt", run_folder, "--out", out, *FIVE))])
            drawn, data = go_on(run_folder, out)
            assert data == whole and drawn <= 3 - (stop - 1) // 2, (stop, after)
    assert len(calls) == 7                                                      # two for each batch, and samples.npz


def test_an_unfinished_run_of_other_settings_is_refused(run_folder, tmp_path, whole):
    out = tmp_path / "out"
    begin(run_folder, out, 1)
    held = {p: (out / p).read_bytes() for p in shown(out)}
    assert len(held) == 3 and all(name.startswith("samples.part.") for name in held)
    other = change(run_folder, tmp_path / "weights", ema=shifted(from_pretrained(run_folder)).state_dict())
    scaled = change(run_folder, tmp_path / "scaled", scale=0.5)
    for flags, word in [(["--seed", 1], "seed"), (["--guidance", 2], "guidance"), (["--interval", 0, 0.5], "interval"),
                        (["--steps", 3], "steps"), (["--solver", "heun"], "solver"), (["--c_prime", 3], "c_prime"),
                        (["--n", 6], "n"), (["--batch_size", 3], "batch_size"), (["--classes", 1], "classes"),
                        (["--dtype", "bf16"], "dtype"), (["--ae", run_folder.parent / "other"], "ae_hash"),
                        (["--ckpt", other], "weights"), (["--ckpt", scaled], "scale"),
                        (["--seed", 1, "--guidance", 2], "guidance, seed")]:
        with pytest.raises(ValueError, match=rf"--out .*{word}.*samples.part") as e:
            go_on(run_folder, out, *flags)
        assert isinstance(e.value, SystemExit) and "\n" not in str(e.value) and len(str(e.value)) < 200
        assert {p: (out / p).read_bytes() for p in shown(out)} == held, flags
    assert go_on(run_folder, out) == (2, whole)
    begin(run_folder, out, 1)
    for name in held:
        (out / name).unlink()
    drawn, data = go_on(run_folder, out, "--seed", 1)                           # the mend
    assert drawn == 3 and data != whole
    begin(run_folder, tmp_path / "new", 0)                                      # where none was drawn, none is lost
    assert go_on(run_folder, tmp_path / "new", "--seed", 1) == (3, data)


def test_damaged_batches_of_an_unfinished_run_are_drawn_again(run_folder, tmp_path, whole):
    def flip(data):
        return data[:5] + bytes([data[5] ^ 4]) + data[6:]

    picture = 2 * 16 * 16 * 3                                                   # bytes of a batch
    for name, change, again in (("pixels", flip, 1), ("pixels", lambda data: bytes(picture) + data[picture:], 1),
                                ("pixels", lambda data: data[:-1], 2), ("pixels", lambda data: b"", 2),
                                ("done", flip, 1), ("done", lambda data: data[:1], 2), ("done", lambda data: data, 0)):
        out = tmp_path / "out"
        begin(run_folder, out, 2)
        file = out / f"samples.part.{name}"
        file.write_bytes(change(file.read_bytes()))
        assert go_on(run_folder, out) == (1 + again, whole), (name, again)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_second_run_is_refused_and_a_signal_ends_the_first(run_folder, tmp_path, one_thread, number):
    flags = ["--ckpt", run_folder, "--n", 12, "--batch_size", 2, "--solver", "heun", "--steps", 60]
    out, marks = tmp_path / "out", tmp_path / "out" / "samples.part.done"
    run = start([*flags, "--out", out], tmp_path / "errors")
    end = time.time() + 60
    while not marks.exists() or not any(marks.read_bytes()):
        assert time.time() < end and os.waitpid(run, os.WNOHANG)[0] == 0
        time.sleep(0.01)
    os.kill(run, signal.SIGSTOP)
    with pytest.raises(ValueError, match="--out .*another process is writing") as e:
        sample.main([*map(str, [*flags, "--out", out])])
    assert isinstance(e.value, SystemExit) and "\n" not in str(e.value)
    os.kill(run, number)
    os.kill(run, signal.SIGCONT)
    status = os.waitpid(run, 0)[1]
    if number == signal.SIGINT:
        assert os.waitstatus_to_exitcode(status) == 1
        said = (tmp_path / "errors").read_text()
        assert "stopped by Ctrl-C; the same command goes on" in said and "Traceback" not in said
    else:
        assert os.waitstatus_to_exitcode(status) == -number
    assert 0 < np.count_nonzero(np.fromfile(marks, np.uint32)) < 6
    for folder in ("whole", "out"):
        sample.main([*map(str, [*flags, "--out", tmp_path / folder])])
    assert (out / "samples.npz").read_bytes() == (tmp_path / "whole" / "samples.npz").read_bytes()


def test_a_full_disk_is_one_line_before_any_work(run_folder, tmp_path, monkeypatch):
    pixels = 5 * 16 * 16 * 3
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)

    def refused(**limit):
        with pytest.raises(ValueError, match="--out") as e:
            go_on(run_folder, tmp_path, **limit)
        assert isinstance(e.value, SystemExit) and "\n" not in str(e.value) and len(str(e.value)) < 200
        return str(e.value)

    with monkeypatch.context() as patch:
        patch.setattr(sample, "generate", None)                                 # nothing is drawn
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (pixels - 1, usual[1]))   # no file may grow beyond that
            assert f"{2 * pixels:,} bytes" in refused()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        patch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2 * pixels - 1))    # and the npz
        line = refused()
        assert f"{2 * pixels:,} bytes are needed" in line and f"{2 * pixels - 1:,} are free" in line
    assert shown(tmp_path) == []
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (pixels, usual[1]))           # later: samples.npz is a little larger
        refused()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert not (tmp_path / "samples.npz").exists()
    assert go_on(run_folder, tmp_path)[0] == 0                                  # all had been drawn


def test_two_ranks_go_on_with_what_one_began(run_folder, tmp_path, one_thread):
    """Batches are the same ones for any number of ranks, so pixels are equal to the byte."""
    out = tmp_path / "two"
    begin(run_folder, out, 1)
    flat = np.full(2 * 16 * 16 * 3, 7, np.uint8)                                # a batch that is there stays as it is
    with open(out / "samples.part.pixels", "r+b") as f:
        f.write(flat.tobytes())
    with open(out / "samples.part.done", "r+b") as f:
        f.write(np.uint32(zlib.crc32(flat)).tobytes())
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    flags = [*FIVE, "--ckpt", run_folder, "--out", out]
    ranks = [start(flags, tmp_path / f"errors {r}", **env, RANK=str(r), LOCAL_RANK=str(r)) for r in range(2)]
    assert [os.waitpid(run, 0)[1] for run in ranks] == [0, 0]
    go_on(run_folder, tmp_path / "one")
    (one, y, _), (two, y_two, about) = read(tmp_path / "one"), read(out)
    assert (one[2:] == two[2:]).all() and (two[:2] == 7).all() and (y == y_two).all() and about["ranks"] == 2


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be right

def test_pictures_that_are_not_finite_are_counted_and_end_in_an_error(run_folder, tmp_path, monkeypatch):
    state = from_pretrained(run_folder).state_dict()
    broken = change(run_folder, tmp_path / "nan", ema={**state, "norm.bias": state["norm.bias"] * math.nan})
    ae = torch.load(run_folder.parent / "ae" / "ckpt.pt")
    name = next(k for k in ae["model"] if k.startswith("decoder") and k.endswith("bias"))
    torch.save({**ae, "model": {**ae["model"], name: ae["model"][name] * math.inf}}, tmp_path / "ae.pt")
    real = sample.generate

    def one(net, y, **kw):
        z = real(net, y, **kw)
        z[kw["index"] == 1, 0, 0, 0] = value
        return z
    for folder, flags, count in ((broken, [], "3 of 3"), (run_folder, ["--ae", tmp_path / "ae.pt"], "3 of 3"),
                                 (run_folder, [math.nan], "1 of 3"), (run_folder, [-math.inf], "1 of 3")):
        if isinstance(flags[-1:][0] if flags else "", float):
            value, flags = flags[0], []
            monkeypatch.setattr(sample, "generate", one)
        for solver in ("euler", "dopri5"):
            steps = ["--steps", 2] if solver == "euler" else []
            with pytest.raises(ValueError, match=f"{count} pictures are not finite") as e:
                sample.main([*map(str, ("--ckpt", folder, "--n", 3, "--solver", solver, *steps, "--out",
                                        tmp_path / "out", *flags))])
            assert isinstance(e.value, SystemExit) and "\n" not in str(e.value) and len(str(e.value)) < 200
            assert not (tmp_path / "out" / "samples.npz").exists()


NUMBERS = "nan inf -inf -1 1e999 ten".split() + [""]
WRONG = {
    "--ckpt": ["nowhere", "/etc/passwd", "/dev/null", "EMPTY", "FOLDER", "AE", "dc-ai/nothing", "x" * 5000],
    "--ae": ["nowhere", "/etc/passwd", "/dev/null", "EMPTY", "FOLDER", "RUN", "x" * 5000],
    "--model": ["DiT", "USiT-H", "usit", "magic", ""],
    "--n": [*NUMBERS, "0", "1.5", str(10**12), "9" * 5000],
    "--batch_size": [*NUMBERS, "0", "1.5", str(10**12)],
    "--classes": ["cow", "3", "2-3", "-1", "1-", "", "0,", "nan", "0-999999999999"],
    "--guidance": [*NUMBERS, "-0.1", "1e30"],
    "--interval": ["0.5", "nan 1", "0 nan", "0 inf", "-inf 1", "-0.1 1", "0 1.1", "0.5 0.5", "0.6 0.2", "a b"],
    "--solver": ["dpm", "ddpm", "magic", ""],
    "--steps": [*NUMBERS, "0", "1.5", "1001", str(2**70)],
    "--c_prime": [*NUMBERS, "0", "9", "1.5", str(2**70)],
    "--seed": [*NUMBERS, "1.5", str(2**63), str(2**70)],
    "--out": ["FILE", "FILE/below/it", "/proc/nowhere/x", "/dev/null", "x" * 5000],
    "--dtype": ["fp16", ""],
    "--no_such_flag": ["1"]}


@pytest.mark.parametrize("flag, value", [(flag, value) for flag, values in WRONG.items() for value in values])
def test_each_flag_that_is_wrong_is_one_line_before_any_work(run_folder, tmp_path, monkeypatch, flag, value):
    paths = dict(RUN=run_folder, AE=run_folder.parent / "ae", EMPTY=tmp_path / "empty.pt", FOLDER=tmp_path / "folder",
                 FILE=tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.pt").touch()
    (tmp_path / "file").touch()
    monkeypatch.setattr(sample, "generate", None)
    value = [str(paths[word]) + rest if word in paths else word + rest
             for word, rest in ((part[:i], part[i:]) for part in value.split(" ") for i in [len(part.split("/")[0])])]
    given = [f"{flag}={value[0]}"] if len(value) == 1 else [flag, *value]
    with pytest.raises(SystemExit) as e:
        sample.main(["--ckpt", str(run_folder), "--n", "3", "--out", str(tmp_path / "out"), *given])
    line = str(e.value.code)
    assert line not in ("0", "None") and "\n" not in line and len(line) < 200, line
    assert flag in line or value[0][:50] in line, line
    assert not (tmp_path / "out").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.pt", "file", "folder"]


def test_no_file_given_to_sample_py_runs_code(run_folder, tmp_path):
    payload = Payload(tmp_path / "ran")
    ckpt = torch.load(run_folder / "ckpt.pt")
    ae = torch.load(run_folder.parent / "ae" / "ckpt.pt")
    contents = payload, {**ckpt, "note": payload}, {**ckpt, "ema": payload}, {**ae, "note": payload}
    for k, content in enumerate(contents):
        file = tmp_path / f"{k}.pt"
        torch.save(content, file)
        for flags in (["--ckpt", file], ["--ckpt", run_folder, "--ae", file]):
            with pytest.raises(ValueError, match=f"{k}.pt"):
                sample.main([*map(str, flags), "--n", "1", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "ran").exists()


def test_only_a_name_that_the_user_gave_contacts_the_network(run_folder, tmp_path, monkeypatch):
    asked = []

    def offline(*args, **kw):
        asked.append(args)
        raise OSError("no network")
    here = tmp_path / "here"

    def snapshot_download(name, allow_patterns, local_files_only):
        if name == hub:
            return str(here)
        if not local_files_only:
            asked.append(name)
        raise OSError("not in the cache")
    monkeypatch.setattr(pytest.importorskip("huggingface_hub"), "snapshot_download", snapshot_download)
    monkeypatch.setattr(socket.socket, "connect", offline)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    hub = "mit-han-lab/dc-ae-f32c32-in-1.0-usit-h-in-512px"
    published, kl = "mit-han-lab/dc-ae-f32c32-in-1.0", "stabilityai/sd-vae-ft-ema"
    for k, name in enumerate((published, kl)):
        folder = change(run_folder, tmp_path / f"stranger {k}", ae=name)
        with pytest.raises(ValueError, match="--ae") as e:
            sample.main(["--ckpt", str(folder), "--n", "1", "--out", str(tmp_path / "out")])
        assert isinstance(e.value, SystemExit) and name in str(e.value) and not asked
    with pytest.raises(ValueError, match="no download"):
        sample.main(["--ckpt", str(folder), "--ae", published, "--n", "1", "--out", str(tmp_path / "out")])
    assert asked == [published] and asked.pop()

    here.mkdir()                                                                # the partner of a name may be fetched
    torch.manual_seed(0)
    save(build("USiT-T", c=32, size=16, num_classes=3), here / "model.safetensors")
    with pytest.raises(ValueError, match="no download"):
        sample.main(["--ckpt", hub, "--n", "1", "--out", str(tmp_path / "out")])
    assert asked == [published]


@pytest.mark.parametrize("flags, word", [
    ([], "--ckpt"), (["--ckpt", "nowhere"], "nowhere: no such checkpoint"), (["--ckpt", "RUN", "--n", "0"], "--n"),
    (["--ckpt", "RUN", "--batch_size", "0"], "--batch_size"), (["--ckpt", "RUN", "--classes", "cow"], "--classes cow"),
    (["--ckpt", "RUN", "--classes", "3"], "0 .. 2"), (["--ckpt", "RUN", "--c_prime", "9"], "--c_prime 9"),
    (["--ckpt", "RUN", "--solver", "dpm"], "does not fit"), (["--ckpt", "RUN", "--model", "DiT"], "holds a USiT"),
    (["--ckpt", "RUN", "--ae", "WRONG"], "does not fit --ckpt"),
    (["--ckpt", "RUN", "--ae", "COARSE"], "does not fit --ckpt"),
    (["--ckpt", "RUN", "--ae", "nowhere"], "nowhere"), (["--ckpt", "ALONE"], "give --ae"),
    (["--ckpt", "AE"], "kind 'ae'"), (["--ckpt", "RUN", "--ae", "RUN"], "diffusion checkpoint")])
def test_bad_command_lines_are_one_line(run_folder, tmp_path, flags, word):
    paths = {"RUN": run_folder, "AE": run_folder.parent / "ae", "WRONG": tmp_path / "wrong.pt",
             "COARSE": tmp_path / "coarse.pt", "ALONE": tmp_path / "alone"}
    if "WRONG" in flags:
        save_autoencoder(paths["WRONG"], 0, c=4)
    if "COARSE" in flags:                                                       # f8: 4x4 latents would be 32 pixels
        save_autoencoder(paths["COARSE"], 0, f=8, **{k: (*v, v[-1]) for k, v in SMALL.items()})
    if "ALONE" in flags:
        change(run_folder, paths["ALONE"], ae=None)
    with pytest.raises(ValueError, match=word) as e:
        sample.main([str(paths.get(flag, flag)) for flag in flags])
    line = str(e.value)
    for path in paths.values():
        line = line.replace(str(path), "X")
    assert len(line) < 200 and "\n" not in line
