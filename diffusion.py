"""Latents to denoiser: DiT and U-ViT, three objectives, and DC-AE 1.5's augmented diffusion training.

                          DiT network    U-ViT network
  learned-sigma DDPM      DiT            -                 t = 0 .. 999,  data at t = 0
  VP noise prediction     -              UViT              t = 1 .. 1000, data at t = 1 (almost)
  linear flow matching    SiT            USiT              t in [0, 1],   NOISE at t = 0, DATA at t = 1

Time: in the two noise-prediction families t grows from data to noise; in the flow families from noise to data.

The idea (arXiv 2508.00413, Eq. 2; `training_loss` below). The front channels of a structured latent are a picture
of their own, so the denoiser trains on "the first c' channels", with another c' at every step:

  L = E || m * eps  -  m * eps_theta(m * z_t, t, y) ||^2,     m = (1, .. c' times .., 1, 0, .., 0) over the channels

The mask covers signal, noise and prediction (and DiT's variance term); flow families put the velocity for eps.
NOTE differs from paper: the paper writes a plain squared norm. Here, as in the official trainer, the mean runs over the
kept entries, so that every c' weighs the same.

Letters: B batch, c channels, (h, w) latent grid, p patch, T = hw/p^2 patch tokens, N all tokens, D hidden width.
Module names are the published tensor names (DC-Gen, facebookresearch/DiT, willisma/SiT, baofff/U-ViT): no map needed.
This file never sees a picture: latents arrive scaled to rms 1, as (B, c, h, w).
"""
import argparse
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class InputError(SystemExit, ValueError):
    """Bad input, in one line: uncaught it ends the program without a traceback; a notebook catches a ValueError."""


# ----------------------------------------------------------------------------------------------------------------------
# The models. depth, hidden, heads [DC-Gen c2icore @cae2205; USiT-3B also paper Sec. 4.1; "T" (toy, trains on a CPU) ours]

FAMILIES = {"DiT": "ddpm", "SiT": "flow", "UViT": "vp", "USiT": "flow"}            # family -> objective
_DIT = dict(T=(4, 144, 4), S=(12, 384, 6), B=(12, 768, 12), L=(24, 1024, 16), XL=(28, 1152, 16))
_UVIT = dict(T=(4, 192, 3), S=(12, 512, 8), M=(16, 768, 12), L=(20, 1024, 16), H=(28, 1152, 16), **{"2B": (28, 2048, 32)})
_USIT = dict(_UVIT, **{"3B": (56, 2048, 32)})
MODELS = {f"{family}-{size}": dims for family, sizes in
          dict(DiT=_DIT, SiT=_DIT, UViT=_UVIT, USiT=_USIT).items() for size, dims in sizes.items()}


def build(name, c, size, num_classes=1000, patch=1, **overrides):
    """A fresh network. `size`: latent side, or (h, w). Overrides: depth, hidden, heads. build(**net.config) rebuilds."""
    family = name.split("-")[0]
    if name not in MODELS and not (name in FAMILIES and {"depth", "hidden", "heads"} <= set(overrides)):
        raise InputError(f"unknown model '{name}' (--model): one of {' '.join(MODELS)}")
    dims = dict(zip(("depth", "hidden", "heads"), MODELS.get(name, ())))
    if unknown := set(overrides) - {"depth", "hidden", "heads"}:
        raise InputError(f"unknown setting {sorted(unknown)[0]}= for {name}: depth, hidden and heads can be overridden")
    dims.update(overrides)
    h, w = grid = (size, size) if isinstance(size, int) else tuple(size)
    if min(c, h, w, patch, *dims.values()) < 1 or num_classes < 0:
        raise InputError(f"{name}: c {c}, size {size}, patch {patch}, {dims} must be positive, num_classes not negative")
    if h % patch or w % patch:
        raise InputError(f"{name}: a {h}x{w} latent is not divisible by --patch {patch}")
    if dims["hidden"] % dims["heads"] or dims["hidden"] % 4:
        raise InputError(f"{name}: hidden {dims['hidden']} must be divisible by 4 and by heads {dims['heads']}")
    if family in ("UViT", "USiT") and dims["depth"] % 2:
        raise InputError(f"{name}: depth {dims['depth']} must be even (as many blocks after the middle as before it)")
    c_out = 2 * c if FAMILIES[family] == "ddpm" else c                              # (eps, sigma) or one prediction
    net = (UViT if family in ("UViT", "USiT") else DiT)(c, c_out, grid, num_classes, patch, **dims)
    net.config = dict(name=name, c=c, size=size if isinstance(size, int) else grid, num_classes=num_classes, patch=patch, **dims)
    net.family, net.objective, net.info = family, FAMILIES[family], {}
    return net


def forward_macs(net):
    """Multiply-adds of one forward pass of one latent, attention's two products counted. Also takes a net.config."""
    k = SimpleNamespace(**(net if isinstance(net, dict) else net.config))
    h, w = (k.size, k.size) if isinstance(k.size, int) else k.size
    T, D = h * w // k.patch**2, k.hidden
    patches = T * k.c * k.patch**2 * D
    if k.name.startswith("U"):
        N = T + 2
        return (k.depth + 1) * (12 * N * D**2 + 2 * N**2 * D) + k.depth // 2 * 2 * N * D**2 + patches * (T + N) // T
    out = patches * (2 if k.name.startswith("DiT") else 1)
    return k.depth * (12 * T * D**2 + 2 * T**2 * D + 6 * D**2) + patches + 256 * D + 3 * D**2 + out


# ----------------------------------------------------------------------------------------------------------------------
# Parts of both networks

def timestep_embedding(t, dim, dtype=torch.float32):
    """(B,) -> (B, dim): [cos(t f), sin(t f)], f_i = 10000^(-2i/dim). In fp32 whatever the network runs in: bf16 has
    one step between 988 and 992. t is used as it is fed, unscaled, in all four families."""
    f = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device, dtype=dtype) / (dim // 2))
    return torch.cat([(t[:, None].to(dtype) * f).cos(), (t[:, None].to(dtype) * f).sin()], dim=1)


class Attention(nn.Module):
    def __init__(self, D, heads, qkv_bias):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(D, 3 * D, bias=qkv_bias)
        self.proj = nn.Linear(D, D)

    def forward(self, x):                                                           # (B, N, D)
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)   # 3 x (B, heads, N, D/heads)
        # NOTE differs from DC-Gen: its U-ViT casts q, k, v to fp32 first; flash attention in bf16 is several times faster
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))


def mlp(D, approximate):
    return nn.Sequential(OrderedDict(fc1=nn.Linear(D, 4 * D), act=nn.GELU(approximate), fc2=nn.Linear(4 * D, D)))


def unpatchify(x, grid, p):                                                         # (B, hw/p^2, p*p*C)
    h, w = grid[0] // p, grid[1] // p
    x = x.view(x.shape[0], h, w, p, p, -1).permute(0, 5, 1, 3, 2, 4)                # (B, C, h/p, p, w/p, p)
    return x.reshape(x.shape[0], -1, *grid).contiguous()                            # (B, C, h, w)


class Denoiser(nn.Module):
    """What both networks share. `checkpointing = True` trades time for memory: activations are recomputed per block."""
    checkpointing = False

    def run(self, block, *args):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


# ----------------------------------------------------------------------------------------------------------------------
# Network 1: DiT (arXiv 2212.09748), transformer blocks modulated by adaLN-Zero

class DiTBlock(nn.Module):
    def __init__(self, D, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(D, heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.mlp = mlp(D, "tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x, cond):                                                     # (B, T, D), (B, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(cond)[:, None].chunk(6, dim=2)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    def __init__(self, D, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(D, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x, cond):
        shift, scale = self.adaLN_modulation(cond)[:, None].chunk(2, dim=2)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DiT(Denoiser):
    def __init__(self, c, c_out, grid, num_classes, patch, depth, hidden, heads):
        super().__init__()
        D, self.grid, self.patch, self.num_classes = hidden, grid, patch, num_classes
        T = grid[0] * grid[1] // patch**2
        self.pos_embed = nn.Parameter(torch.zeros(1, T, D), requires_grad=False)    # sin-cos, frozen, yet in every checkpoint
        self.x_embedder = nn.ModuleDict(dict(proj=nn.Conv2d(c, D, patch, patch)))
        self.t_embedder = nn.ModuleDict(dict(mlp=nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))))
        self.y_embedder = nn.ModuleDict(dict(embedding_table=nn.Embedding(num_classes + 1, D)))   # last row: the null label
        self.blocks = nn.ModuleList(DiTBlock(D, heads) for _ in range(depth))
        self.final_layer = FinalLayer(D, patch**2 * c_out)
        self.init_weights()

    def init_weights(self):
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))             # as the matrix (D, c*p*p)
        nn.init.zeros_(self.x_embedder.proj.bias)
        for w in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(w.weight, std=0.02)
        for m in [b.adaLN_modulation[1] for b in self.blocks] + [self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(m.weight)                                                # every block starts as the identity
        with torch.no_grad():
            h, w = self.grid[0] // self.patch, self.grid[1] // self.patch
            kw = dict(device=self.pos_embed.device, dtype=torch.float64)            # token index = row * w + column
            row, col = torch.arange(h, **kw).repeat_interleave(w), torch.arange(w, **kw).repeat(h)
            f = 10000 ** -(torch.arange(self.pos_embed.shape[2] // 4, **kw) * 4 / self.pos_embed.shape[2])
            waves = [fn(x[:, None] * f) for x in (col, row) for fn in (torch.sin, torch.cos)]     # the column first
            self.pos_embed.copy_(torch.cat(waves, dim=1)[None])

    def layers(self):
        return list(self.blocks)

    def forward(self, z_t, t, y):                                                   # (B, c, h, w), (B,), (B,)
        x = self.x_embedder.proj(z_t.to(self.pos_embed.dtype)).flatten(2).transpose(1, 2) + self.pos_embed   # (B, T, D)
        with torch.autocast("cpu" if z_t.is_meta else z_t.device.type, enabled=False):       # time stays fp32 under bf16 autocast
            emb = timestep_embedding(t, 256, torch.promote_types(self.pos_embed.dtype, torch.float32))
            cond = self.t_embedder.mlp(emb.to(self.pos_embed.dtype)) + self.y_embedder.embedding_table(y)    # (B, D)
        for block in self.blocks:
            x = self.run(block, x, cond)
        return unpatchify(self.final_layer(x, cond), self.grid, self.patch)         # (B, c, h, w); DiT: (B, 2c, h, w)


# ----------------------------------------------------------------------------------------------------------------------
# Network 2: U-ViT (arXiv 2209.12152), time and label are tokens, long skips join the two halves

class UViTBlock(nn.Module):
    def __init__(self, D, heads, skip=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(D)
        self.attn = Attention(D, heads, qkv_bias=False)
        self.norm2 = nn.LayerNorm(D)
        self.mlp = mlp(D, "none")
        if skip:
            self.skip_linear = nn.Linear(2 * D, D)

    def forward(self, x, skip=None):                                                # (B, N, D)
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=2))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(Denoiser):
    def __init__(self, c, c_out, grid, num_classes, patch, depth, hidden, heads):
        super().__init__()
        D, self.grid, self.patch, self.num_classes = hidden, grid, patch, num_classes
        T = grid[0] * grid[1] // patch**2
        self.pos_embed = nn.Parameter(torch.zeros(1, T + 2, D))                     # trained; the two extra tokens have theirs
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(c, D, patch, patch)))
        self.label_emb = nn.ModuleDict(dict(embedding_table=nn.Embedding(num_classes + 1, D)))    # last row: the null label
        self.in_blocks = nn.ModuleList(UViTBlock(D, heads) for _ in range(depth // 2))
        self.mid_block = UViTBlock(D, heads)
        self.out_blocks = nn.ModuleList(UViTBlock(D, heads, skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(D)
        self.decoder_pred = nn.Linear(D, patch**2 * c_out)
        self.init_weights()

    def init_weights(self):
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            elif isinstance(m, (nn.Conv2d, nn.Embedding, nn.LayerNorm)):
                m.reset_parameters()                                                # PyTorch's own, as published

    def layers(self):
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def forward(self, z_t, t, y):                                                   # (B, c, h, w), (B,), (B,)
        dtype = self.pos_embed.dtype
        x = self.patch_embed.proj(z_t.to(dtype)).flatten(2).transpose(1, 2)         # (B, T, D)
        time = timestep_embedding(t, x.shape[2], torch.promote_types(dtype, torch.float32))      # (B, D), the time token itself
        label = self.label_emb.embedding_table(y)
        x = torch.cat([label[:, None], time[:, None].to(dtype), x.to(dtype)], dim=1) + self.pos_embed        # (B, T + 2, D)
        skips = []
        for block in self.in_blocks:
            x = self.run(block, x)
            skips.append(x)
        x = self.run(self.mid_block, x)
        for block in self.out_blocks:
            x = self.run(block, x, skips.pop())
        return unpatchify(self.decoder_pred(self.norm(x))[:, 2:], self.grid, self.patch)          # (B, c, h, w)


# ----------------------------------------------------------------------------------------------------------------------
# Three objectives. Each is a line that mixes z with noise, and the thing to predict.

@lru_cache
def ddpm_schedule(timesteps=None, device="cpu", dtype=torch.float64):
    """DDPM's tables, computed in fp64. `timesteps`: a tuple of kept indices (respaced sampling); None keeps all 1000."""
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)   # [DiT: linear betas, T = 1000]
    abar = abar[list(timesteps)] if timesteps else abar
    abar_prev = F.pad(abar[:-1], (1, 0), value=1.0)
    beta = 1 - abar / abar_prev
    var = beta * (1 - abar_prev) / (1 - abar)                                       # of q(z_{t-1} | z_t, z); 0 at t = 0
    s = dict(abar=abar, beta=beta, posterior_var=var, log_beta=beta.log(),
             posterior_log_var=torch.cat([var[1:2], var[1:]]).log(),                # t = 0 takes t = 1's, as published
             coef_z=beta * abar_prev.sqrt() / (1 - abar), coef_zt=(1 - abar_prev) * (1 - beta).sqrt() / (1 - abar))
    return SimpleNamespace(**{k: v.to(dtype).to(device) for k, v in s.items()})


@lru_cache
def vp_schedule(device="cpu", dtype=torch.float64):
    """abar of U-ViT's scaled-linear betas; entry n - 1 belongs to n = 1 .. 1000."""
    beta = torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - beta).cumprod(0).to(dtype).to(device)


def draw_t(net, u):
    """Uniform u in [0, 1), (B,), to timesteps of the family's training distribution (uniform in all of them)."""
    return u if net.objective == "flow" else (u * 1000).long() + (net.objective == "vp")


def noised(net, z, noise, t):
    """z_t and what the network should say about it."""
    if net.objective == "flow":                       # straight line from noise (t = 0) to data (t = 1); its velocity
        t = t.to(z.dtype).view(-1, 1, 1, 1)
        return t * z + (1 - t) * noise, z - noise
    abar = vp_schedule(z.device, z.dtype)[t - 1] if net.objective == "vp" else ddpm_schedule(None, z.device, z.dtype).abar[t]
    abar = abar.view(-1, 1, 1, 1)
    return abar.sqrt() * z + (1 - abar).sqrt() * noise, noise


def model_mean_log_var(s, t, z_t, eps, v):
    """DDPM's p(z_{t-1} | z_t) from the network's eps and v; s = ddpm_schedule. Training and sampling share it."""
    at = lambda table: table[t].view(-1, 1, 1, 1)
    z_hat = (z_t - (1 - at(s.abar)).sqrt() * eps) / at(s.abar).sqrt()
    frac = (v + 1) / 2                                                              # between the smallest and the largest variance
    log_var = frac * at(s.log_beta) + (1 - frac) * at(s.posterior_log_var)
    return at(s.coef_z) * z_hat + at(s.coef_zt) * z_t, log_var


def variational_term(z, z_t, t, eps, v):
    """DiT's loss for its variances, in bits per entry: KL(q(z_{t-1} | z_t, z) || p); at t = 0 -log p(z), bins of 1/255."""
    s = ddpm_schedule(None, z.device, z.dtype)
    at = lambda table: table[t].view(-1, 1, 1, 1)
    mean, log_var = model_mean_log_var(s, t, z_t, eps, v)
    q_mean, q_log_var = at(s.coef_z) * z + at(s.coef_zt) * z_t, at(s.posterior_log_var)
    kl = 0.5 * (-1 + log_var - q_log_var + (q_log_var - log_var).exp() + (q_mean - mean) ** 2 * (-log_var).exp())
    cdf = lambda x: 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
    upper = cdf((z - mean + 1 / 255) * (-0.5 * log_var).exp())
    lower = cdf((z - mean - 1 / 255) * (-0.5 * log_var).exp())
    mass = torch.where(z < -0.999, upper, torch.where(z > 0.999, 1 - lower, upper - lower))      # the outer bins are open
    nll = -mass.clamp(min=1e-12).log()
    return torch.where(t.view(-1, 1, 1, 1) == 0, nll, kl) / math.log(2)


def training_loss(net, z, y, c_prime=None, t=None, noise=None, reduction="mean"):
    """Eq. 2 for all four families. z (B, c, h, w) scaled to rms 1. c_prime=None: ordinary training. reduction "none": (B,)."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    c_prime = z.shape[1] if c_prime is None else c_prime
    if not 1 <= c_prime <= z.shape[1]:
        raise InputError(f"c' = {c_prime} is outside 1 .. {z.shape[1]}, the latent's channels (--channels)")
    t = draw_t(net, torch.rand(z.shape[0], device=z.device)) if t is None else t
    noise = torch.randn_like(z) if noise is None else noise
    m = (torch.arange(z.shape[1], device=z.device) < c_prime).to(z.dtype).view(1, -1, 1, 1)       # (1, c, 1, 1)

    # DC-AE 1.5 Eq. (2): || m * target - m * net(m * z_t) ||^2; mean over the kept entries (official), the paper: plain norm
    z, noise = m * z, m * noise
    z_t, target = noised(net, z, noise, t)
    out = net(z_t, t, y).to(z.dtype)
    pred = out[:, : z.shape[1]]
    loss = (m * target - m * pred) ** 2
    if net.objective == "ddpm":                                                     # eps detached: this term trains v alone
        loss = loss + m * variational_term(z, z_t, t, pred.detach(), out[:, z.shape[1]:])
    loss = loss.flatten(1).sum(1) / (c_prime * z[0, 0].numel())                     # (B,)
    return loss.mean() if reduction == "mean" else loss


# ----------------------------------------------------------------------------------------------------------------------
# Random numbers that depend on a key alone, (seed, step, image, ...): the same on any device, rank, and batch size.

def _signed(x):
    return x - 2**64 if x >= 2**63 else x

_GAMMA, _MUL1, _MUL2 = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))   # [splitmix64]


def _mix(x):
    """splitmix64's finaliser in wrapping int64; >> is arithmetic there, so the mask makes it a logical shift."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _MUL1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _MUL2
    return x ^ ((x >> 31) & (2**33 - 1))


def _bits(rows, n, key, device):
    """(rows, n) random int64. A tensor in the key, (rows,), keys each row; with ints only, numbering runs on through the rows."""
    per_row = any(torch.is_tensor(k) for k in key)
    device = device or next((k.device for k in key if torch.is_tensor(k)), "cpu")
    state = torch.zeros(rows if per_row else 1, 1, dtype=torch.int64, device=device)
    for k in key:
        k = k.to(device).view(-1, 1) if torch.is_tensor(k) else k
        state = _mix((state ^ k) + _GAMMA)
    number = torch.arange(1, n + 1 if per_row else rows * n + 1, device=device)
    return _mix(state + number * _GAMMA).view(rows, n)


def uniform(n, *key, device=None):
    """(n,) fp32 in [0, 1). Key: ints, or int64 tensors (n,)."""
    return ((_bits(n, 1, key, device)[:, 0] >> 40) & (2**24 - 1)).float() * 2.0**-24


def gaussian(shape, *key, device=None, dtype=torch.float32):
    """Standard normal numbers by Box-Muller. Key: ints, or int64 tensors (shape[0],). Row i depends on its key alone."""
    n, work = math.prod(shape[1:]), torch.promote_types(dtype, torch.float32)
    bits = _bits(shape[0], (n + 1) // 2, key, device)                               # one hash, two numbers
    radius = (-2 * ((((bits >> 32) & (2**32 - 1)).to(work) + 0.5) * 2.0**-32).log()).clamp(min=0).sqrt()
    angle = (bits & (2**32 - 1)).to(work) * (2 * math.pi * 2.0**-32)
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).flatten(1)[:, :n]       # a shorter row is a prefix
    return x.reshape(shape).to(dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Published weights and our own

AUTOENCODERS = {   # of published denoisers: name, scaling factor [DC-Gen c2icore @cae2205; sd-vae: DiT's and SiT's train.py]
    "f32c32-in-1.0": ("mit-han-lab/dc-ae-f32c32-in-1.0", 0.3189), "f64c128-in-1.0": ("mit-han-lab/dc-ae-f64c128-in-1.0", 0.2889),
    "f64c128-1.5": ("dc-ai/dc-ae-f64c128-1.5", 0.5935), "sd": ("stabilityai/sd-vae-ft-ema", 0.18215)}
PUBLISHED = (      # what a published name or file name says: "dc-ae-f32c32-in-1.0-usit-2b-in-512px", "SiT-XL-2-256x256.pt", ...
    r"dc-ae-(?P<ae>f\d+c\d+-(?:in-)?[\d.]+)-(?P<family>dit|sit|uvit|usit)-\w+-in-(?P<px>\d+)px",
    r"(?P<family>dit|sit)-\w+-\d+-(?P<px>\d+)x\d+", r"imagenet(?P<px>\d+)_(?P<family>uvit)")


def read_file(path):
    """A dict of tensors and plain values from .safetensors, .pt or .pth."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError                                 # optional package
            from safetensors.torch import load_file
            try:
                return load_file(path)
            except SafetensorError:
                raise InputError(f"{path}: truncated, or not a safetensors file")
        with torch.serialization.safe_globals([argparse.Namespace]):                # original DiT and SiT checkpoints carry their args
            file = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except ImportError:
        raise InputError(f"{path}: reading it takes the package safetensors: pip install safetensors")
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, KeyError):
        raise InputError(f"{path}: truncated, or not a checkpoint that holds only tensors and plain values")
    if not isinstance(file, dict):
        raise InputError(f"{path}: not a checkpoint (it holds a {type(file).__name__}, not a dict)")
    return file


def find_file(x):
    """A file, a run folder (ckpt.pt), a folder with one file of weights, or a name on the Hugging Face hub."""
    path = Path(x)
    if path.is_dir():
        found = [path / n for n in ("ckpt.pt", "model.safetensors") if (path / n).exists()]
        found = found or [p for p in sorted(path.iterdir()) if p.suffix in (".safetensors", ".pt", ".pth")]
        if not found:
            raise InputError(f"{x}: no ckpt.pt, model.safetensors, .pt or .pth in this folder")
        return found[0]
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(x)) and re.search(PUBLISHED[0], str(x)):
        try:
            from huggingface_hub import hf_hub_download                             # optional package
            return Path(hf_hub_download(str(x), "model.safetensors"))
        except ImportError:
            raise InputError(f"{x}: pip install huggingface_hub safetensors, or download model.safetensors and pass its path")
        except (OSError, ValueError) as e:                                          # no network, no such name: both are OSErrors there
            raise InputError(f"{x}: could not be had from the hub ({type(e).__name__}); pass a downloaded file instead")
    if not path.exists():
        raise InputError(f"{x}: no such checkpoint (a file, a run folder, or a published name such as "
                         "mit-han-lab/dc-ae-f32c32-in-1.0-usit-h-in-512px)")
    return path


def from_pretrained(x, name=None, **config):
    """A network in eval mode. x: our checkpoint, or published weights (by hub name, folder or file). The tensors tell depth,
    hidden, c, patch, size and num_classes; `name` ("USiT", "USiT-H") and config (heads=, size=) tell what they cannot."""
    path = find_file(x)
    file = read_file(path)
    if file.get("kind") == "diffusion":                                             # ours
        weights, settings = file.get("ema") or file["model"], {**file["config"], **config}
        if name and name not in (settings["name"], settings["name"].split("-")[0]):
            raise InputError(f"{path}: holds a {settings['name']}, not the {name} asked for")
        info = {k: v for k, v in file.items() if k not in ("config", "model", "ema", "kind") and "opt" not in k}
    elif "kind" in file:
        raise InputError(f"{path}: holds a checkpoint of kind '{file['kind']}', wanted a diffusion model")
    else:
        weights = next((file[k] for k in ("ema", "state_dict", "model") if isinstance(file.get(k), dict)), file)
        settings, weights, info = read_published(path, x, weights, name, config)
    with torch.device("meta"):
        net = build(**settings)
    wanted = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    given = {k: tuple(v.shape) for k, v in weights.items()}
    if wrong := sorted(set(wanted.items()) ^ set(given.items())):
        k = wrong[0][0]
        raise InputError(f"{path}: does not fit {settings['name']}: tensor {k[:60]} is {given.get(k, 'missing')}, wanted {wanted.get(k, 'none')}")
    net.to_empty(device="cpu").load_state_dict(weights)
    net.info = info
    return net.eval()


def read_published(path, x, weights, name, config):
    """settings for build, weights under our names, info (autoencoder, scale, image_size), from a published state dict."""
    if "label_emb.weight" in weights:                                               # baofff/U-ViT's name for the same table
        weights = {("label_emb.embedding_table.weight" if k == "label_emb.weight" else k): v for k, v in weights.items()}
    hint = next((m for part in (str(x), path.parent.name, path.name) for rule in PUBLISHED if (m := re.search(rule, part, re.I))), None)
    net = "UViT" if "patch_embed.proj.weight" in weights else "DiT"
    head, stem, table = (("decoder_pred", "patch_embed", "label_emb") if net == "UViT" else ("final_layer.linear", "x_embedder", "y_embedder"))
    keys = (f"{stem}.proj.weight", f"{table}.embedding_table.weight", f"{head}.weight", "pos_embed")
    if missing := [k for k in keys if k not in weights]:
        raise InputError(f"{path}: neither a DiT nor a class-conditional U-ViT: tensor {missing[0]} is missing")
    if any(k.startswith("final_layer") for k in weights) and net == "UViT":
        raise InputError(f"{path}: this U-ViT ends in a 3x3 convolution (final_layer), which is not supported")
    (D, c, patch, _), rows, out = weights[keys[0]].shape, len(weights[keys[1]]), len(weights[keys[2]])

    # the family: tensors, then name=, then a published file name
    sigma = out == 2 * c * patch**2
    possible = ["UViT", "USiT"] if net == "UViT" else ["DiT", "SiT"] if sigma else ["SiT"]       # original SiTs have unused sigmas
    said = name.split("-")[0] if name else next((f for f in FAMILIES if hint and f.lower() == hint["family"].lower()), None)
    if name and said not in possible:
        raise InputError(f"{path}: the tensors are those of a {' or '.join(possible)}, not of the {name} asked for")
    if net == "UViT" and said not in possible:
        raise InputError(f'{path}: UViT and USiT have the same tensors; say which: name="UViT" or name="USiT" (--model)')
    family = said if said in possible else possible[0]
    if family == "SiT" and sigma:                                                   # rows are ordered (pixel of the patch, channel)
        weights = {k: v.unflatten(0, (patch**2, 2 * c))[:, :c].flatten(0, 1) if k.startswith(head) else v for k, v in weights.items()}

    depth = len({k.split("blocks.")[1].split(".")[0] + k.split("blocks.")[0] for k in weights if "blocks." in k})
    preset = next((n for n, dims in MODELS.items() if n.startswith(family + "-") and dims[:2] == (depth, D)), None)
    T = weights["pos_embed"].shape[1] - (2 if net == "UViT" else 0)
    side = math.isqrt(T)
    if "size" not in config and side * side != T:
        raise InputError(f"{path}: {T} tokens are not a square; say size=(h, w)")
    if "heads" not in config and preset is None:
        raise InputError(f"{path}: depth {depth}, hidden {D} is no {family} of ours and heads cannot be read off tensors; say heads=")
    settings = dict(name=preset or family, c=c, size=side * patch, num_classes=rows - 1, patch=patch, depth=depth, hidden=D,
                    heads=MODELS[preset][2] if preset else None)
    settings.update(config)
    info = {}
    if hint:
        info["image_size"] = int(hint["px"])
        kind = hint["ae"] if "ae" in hint.groupdict() else "sd"
        if kind in AUTOENCODERS:
            info["ae"], info["scale"] = AUTOENCODERS[kind]
    return settings, weights, info
