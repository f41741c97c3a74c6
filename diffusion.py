"""Latents to denoiser: DiT and U-ViT, three objectives, DC-AE 1.5's augmented training; noise by key.

                          DiT network    U-ViT network
  learned-sigma DDPM      DiT            -                 t = 0 .. 999,  data at t = 0
  VP noise prediction     -              UViT              t = 1 .. 1000, data at t = 1 (almost)
  linear flow matching    SiT            USiT              t in [0, 1],   NOISE at t = 0, DATA at t = 1

In the noise-prediction families time grows from data to noise, in the flow families from noise to data.

The idea (arXiv 2508.00413, Eq. 2; `training_loss` below). The front channels of a structured latent are a
picture of their own, so the denoiser trains on "the first c' channels", with another c' at every step:

  L = E || m * eps - m * eps_theta(m * z_t, t, y) ||^2,    m = (1, .. c' times .., 1, 0, .., 0) over channels

The mask covers signal, noise and prediction (and DiT's variance term); flow families put a velocity for eps.
NOTE differs from paper: the paper writes a plain squared norm. Here, as in the official trainer, the mean
runs over the kept entries, so that every c' weighs the same.

Letters: B batch, c channels, (h, w) latent grid, p patch, T = hw/p^2 patch tokens, N all tokens, D hidden.
Module names are the published tensor names (DC-Gen, DiT, SiT, U-ViT): no map is needed.
This file never sees a picture: latents arrive scaled to rms 1, as (B, c, h, w).
Sources: [paper], [DC-Gen file] the authors' code @cae2205, [DiT] [SiT] [U-ViT] the original code, [ours].
"""
import math
import re
from collections import OrderedDict
from functools import lru_cache
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ae import InputError, channel_mask, open_weights, plain_names, splitmix64


# ------------------------------------------------------------------------------------------------------------
# The models

FAMILIES = {"DiT": "ddpm", "SiT": "flow", "UViT": "vp", "USiT": "flow"}     # family -> objective

# depth, hidden, heads [DC-Gen c2icore; T, which trains on a CPU: ours]
DIT_PRESETS = {
    "T": (4, 144, 4),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
UVIT_PRESETS = {
    "T": (4, 192, 3),
    "S": (12, 512, 8),
    "M": (16, 768, 12),
    "L": (20, 1024, 16),
    "H": (28, 1152, 16),
    "2B": (28, 2048, 32),
}
USIT_PRESETS = {**UVIT_PRESETS, "3B": (56, 2048, 32)}                       # 3B: also [paper Sec. 4.1]
PRESETS = {
    "DiT": DIT_PRESETS,
    "SiT": DIT_PRESETS,
    "UViT": UVIT_PRESETS,
    "USiT": USIT_PRESETS,
}
MODELS = {f"{family}-{size}": dims for family in PRESETS for size, dims in PRESETS[family].items()}
SETTINGS = ("depth", "hidden", "heads")
DEEPEST, LARGEST = 1000, 10**11                                         # blocks, weights of a network [ours]


def build(name, c, size, num_classes=1000, patch=1, **overrides):
    """A fresh network for latents (B, c, size, size). build(**net.config) rebuilds it.

    name: one of MODELS. size: an int, or (h, w). num_classes: 0 is unconditional. overrides: depth, hidden,
    heads; with all three of them the name may be a family's. InputError: there is no such network."""
    known = list(MODELS)
    if set(SETTINGS) <= set(overrides):
        known += list(FAMILIES)
    if name not in known:
        raise InputError(f"unknown model '{name}' (--model): one of {' '.join(MODELS)}")
    for setting in overrides:
        if setting not in SETTINGS:
            raise InputError(f"unknown setting {setting}= for {name}: it can be {', '.join(SETTINGS)}")
    family = name.split("-")[0]
    dims = dict(zip(SETTINGS, MODELS.get(name, ())))
    dims.update(overrides)
    grid = sides(size)
    check_dims(name, c, grid, num_classes, patch, **dims)

    Network = UViT if family.startswith("U") else DiT
    c_out = 2 * c if FAMILIES[family] == "ddpm" else c                  # (eps, v), or one prediction
    net = Network(c, c_out, grid, num_classes, patch, **dims)
    net.config = {
        "name": name,
        "c": c,
        "size": size if isinstance(size, int) else grid,
        "num_classes": num_classes,
        "patch": patch,
        **dims,
    }
    net.family = family
    net.objective = FAMILIES[family]
    net.info = {}
    return net


def check_dims(name, c, grid, num_classes, patch, depth, hidden, heads):
    """InputError where there is no such network, before it takes memory: a stranger's file may ask for it."""
    numbers = [("c", c), ("patch", patch), ("depth", depth), ("hidden", hidden), ("heads", heads),
               ("num_classes", num_classes), *(("size", side) for side in grid)]
    for setting, number in numbers:
        fewest = 0 if setting == "num_classes" else 1
        if type(number) is not int or not fewest <= number <= LARGEST:
            raise InputError(f"{name}: {setting} {number!r:.20} must be a whole number in "
                             f"{fewest} .. {LARGEST:g}")
    if len(grid) != 2 or grid[0] % patch or grid[1] % patch:
        latent = "x".join(map(str, grid))
        raise InputError(f"{name}: a {latent} latent is not divisible by --patch {patch}")
    if hidden % heads or hidden % 4:
        raise InputError(f"{name}: hidden {hidden} must be divisible by 4 and heads {heads}")
    if name.startswith("U") and depth % 2:
        raise InputError(f"{name}: depth {depth} must be even, half before and half after the middle")
    tokens = grid[0] * grid[1] // patch**2
    weights = hidden * (12 * depth * hidden + tokens + num_classes + 3 * c * patch**2)      # about
    if depth > DEEPEST or weights > LARGEST:
        raise InputError(f"{name}: depth {depth}, {weights:.0e} weights: the most are {DEEPEST} and "
                         f"{LARGEST:g}; take a smaller network")


def sides(size):
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


@torch.no_grad()
def forward_macs(net):
    """Multiply-adds of one latent's forward pass, as torch counts them (without memory). net: or its
    config."""
    config = net if isinstance(net, dict) else net.config
    with torch.device("meta"), FlopCounterMode(display=False) as flops:
        net = build(**config)
        zero = torch.zeros(1, dtype=torch.long)
        net(torch.zeros(1, config["c"], *net.grid), zero, zero)
    return flops.get_total_flops() // 2


# ------------------------------------------------------------------------------------------------------------
# Parts of both networks

def timestep_embedding(t, dim, dtype=torch.float32):
    """(B,) -> (B, dim): [cos(t f), sin(t f)], f_i = 10000^(-2i/dim). t is fed unscaled in all families, and
    in fp32 whatever the network runs in: bf16 has one step between 988 and 992."""
    i = torch.arange(dim // 2, device=t.device, dtype=dtype)
    f = torch.exp(-math.log(10000) * i / (dim // 2))
    angle = t[:, None].to(dtype) * f
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Attention(nn.Module):
    def __init__(self, D, heads, qkv_bias):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(D, 3 * D, bias=qkv_bias)
        self.proj = nn.Linear(D, D)

    def forward(self, x):                                               # (B, N, D)
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # 3 x (B, heads, N, D / heads)
        # NOTE differs from DC-Gen: its U-ViT casts q, k, v to fp32; flash attention, which is several times
        # faster, needs bf16
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


def mlp(D, approximate):
    return nn.Sequential(OrderedDict(
        fc1=nn.Linear(D, 4 * D),
        act=nn.GELU(approximate),
        fc2=nn.Linear(4 * D, D),
    ))


def unpatchify(x, grid, p):                                             # (B, hw/p^2, p*p*C)
    B = len(x)
    x = x.view(B, grid[0] // p, grid[1] // p, p, p, -1)
    x = x.permute(0, 5, 1, 3, 2, 4)                                     # (B, C, h/p, p, w/p, p)
    return x.reshape(B, -1, *grid).contiguous()                         # (B, C, h, w)


class Denoiser(nn.Module):
    """What both networks share. checkpointing = True: activations are recomputed in the backward pass."""
    checkpointing = False

    def __init__(self, grid, num_classes, patch):
        super().__init__()
        self.grid = grid
        self.num_classes = num_classes
        self.patch = patch

    def run(self, block, *args):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


# ------------------------------------------------------------------------------------------------------------
# Network 1: DiT (arXiv 2212.09748), transformer blocks modulated by adaLN-Zero

class DiTBlock(nn.Module):
    def __init__(self, D, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(D, heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.mlp = mlp(D, "tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x, cond):                                         # (B, T, D), (B, D)
        modulation = self.adaLN_modulation(cond)[:, None]               # (B, 1, 6 D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=2)
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
        super().__init__(grid, num_classes, patch)
        D = hidden
        T = grid[0] * grid[1] // patch**2
        self.pos_embed = nn.Parameter(torch.zeros(1, T, D), requires_grad=False)    # frozen, but saved
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(c, D, patch, patch)})
        time_mlp = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.t_embedder = nn.ModuleDict({"mlp": time_mlp})
        labels = nn.Embedding(num_classes + 1, D)                       # the last row: the null label
        self.y_embedder = nn.ModuleDict({"embedding_table": labels})
        self.blocks = nn.ModuleList(DiTBlock(D, heads) for _ in range(depth))
        self.final_layer = FinalLayer(D, patch**2 * c_out)
        self.init_weights()

    def init_weights(self):
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))     # as the matrix (D, c*p*p)
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for block in (*self.blocks, self.final_layer):                  # every block starts as the identity
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        with torch.no_grad():
            self.pos_embed.copy_(self.sincos_positions())

    def sincos_positions(self):                                         # (T, D); token = row * w + column
        h = self.grid[0] // self.patch
        w = self.grid[1] // self.patch
        D = self.pos_embed.shape[2]
        kw = dict(device=self.pos_embed.device, dtype=torch.float64)
        f = 10000 ** -(torch.arange(D // 4, **kw) * 4 / D)              # (D/4,)
        row = torch.arange(h, **kw).repeat_interleave(w)[:, None] * f   # (T, D/4)
        column = torch.arange(w, **kw).repeat(h)[:, None] * f
        return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)

    def layers(self):
        return list(self.blocks)

    def forward(self, z_t, t, y):                                       # (B, c, h, w), (B,), (B,)
        dtype = self.pos_embed.dtype
        x = self.x_embedder.proj(z_t.to(dtype))                         # (B, D, h/p, w/p)
        x = x.flatten(2).transpose(1, 2) + self.pos_embed               # (B, T, D)
        device = "cpu" if z_t.is_meta else z_t.device.type
        with torch.autocast(device, enabled=False):                     # time stays fp32 under bf16 autocast
            time = timestep_embedding(t, 256, torch.promote_types(dtype, torch.float32))
            cond = self.t_embedder.mlp(time.to(dtype))
            cond = cond + self.y_embedder.embedding_table(y)            # (B, D)
        for block in self.blocks:
            x = self.run(block, x, cond)
        return unpatchify(self.final_layer(x, cond), self.grid, self.patch)     # (B, c or 2c, h, w)


# ------------------------------------------------------------------------------------------------------------
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

    def forward(self, x, skip=None):                                    # (B, N, D)
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=2))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(Denoiser):
    def __init__(self, c, c_out, grid, num_classes, patch, depth, hidden, heads):
        super().__init__(grid, num_classes, patch)
        D = hidden
        T = grid[0] * grid[1] // patch**2
        self.pos_embed = nn.Parameter(torch.zeros(1, T + 2, D))         # trained; T patches, label, time
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(c, D, patch, patch)})
        labels = nn.Embedding(num_classes + 1, D)                       # the last row: the null label
        self.label_emb = nn.ModuleDict({"embedding_table": labels})
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
                m.reset_parameters()                                    # PyTorch's own, as published

    def layers(self):
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def forward(self, z_t, t, y):                                       # (B, c, h, w), (B,), (B,)
        dtype = self.pos_embed.dtype
        x = self.patch_embed.proj(z_t.to(dtype)).flatten(2).transpose(1, 2)     # (B, T, D)
        time = timestep_embedding(t, x.shape[2], torch.promote_types(dtype, torch.float32))
        time = time[:, None].to(dtype)                                  # (B, 1, D): a token, as the label
        label = self.label_emb.embedding_table(y)[:, None]
        x = torch.cat([label, time, x.to(dtype)], dim=1) + self.pos_embed       # (B, T + 2, D)
        skips = []
        for block in self.in_blocks:
            x = self.run(block, x)
            skips.append(x)
        x = self.run(self.mid_block, x)
        for block in self.out_blocks:
            x = self.run(block, x, skips.pop())
        x = self.decoder_pred(self.norm(x))[:, 2:]                      # (B, T, p*p*c)
        return unpatchify(x, self.grid, self.patch)                     # (B, c, h, w)


# ------------------------------------------------------------------------------------------------------------
# Three objectives. Each is a line that mixes z with noise, and the thing to predict.

@lru_cache
def ddpm_schedule(timesteps=None, device="cpu", dtype=torch.float64):
    """DDPM's tables, computed in fp64. timesteps: a tuple of kept indices (respaced sampling); None: all."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)        # [DiT]
    abar = (1 - beta).cumprod(0)
    if timesteps:
        abar = abar[list(timesteps)]
    abar_prev = F.pad(abar[:-1], (1, 0), value=1.0)
    beta = 1 - abar / abar_prev
    var = beta * (1 - abar_prev) / (1 - abar)                           # of q(z_{t-1} | z_t, z); 0 at t = 0
    tables = {
        "abar": abar,
        "beta": beta,
        "log_beta": beta.log(),
        "posterior_log_var": torch.cat([var[1:2], var[1:]]).log(),      # t = 0 takes t = 1's [DiT]
        "coef_z": beta * abar_prev.sqrt() / (1 - abar),
        "coef_zt": (1 - abar_prev) * (1 - beta).sqrt() / (1 - abar),
    }
    return SimpleNamespace(**{name: table.to(dtype).to(device) for name, table in tables.items()})


@lru_cache
def vp_schedule(device="cpu", dtype=torch.float64):
    """abar of scaled-linear betas [U-ViT]; entry n - 1 belongs to n = 1 .. 1000."""
    beta = torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - beta).cumprod(0)
    return abar.to(dtype).to(device)


def at(table, t):
    """Entries t (B,) of a table, as (B, 1, 1, 1)."""
    return table[t].view(-1, 1, 1, 1)


def draw_t(net, u):
    """u (B,), uniform in [0, 1), to timesteps; they are uniform in all families."""
    if net.objective == "flow":
        return u
    return (u * 1000).long() + (net.objective == "vp")                  # 0 .. 999, or 1 .. 1000


def noised(net, z, noise, t):
    """z_t, and what the network should say about it. z, noise (B, c, h, w), t (B,)."""
    if net.objective == "flow":                                         # a straight line from noise to data
        t = t.to(z.dtype).view(-1, 1, 1, 1)
        return t * z + (1 - t) * noise, z - noise                       # and its velocity
    if net.objective == "vp":
        abar = at(vp_schedule(z.device, z.dtype), t - 1)
    else:
        abar = at(ddpm_schedule(None, z.device, z.dtype).abar, t)
    return abar.sqrt() * z + (1 - abar).sqrt() * noise, noise


def model_mean_log_var(s, t, z_t, eps, v):
    """Mean and log variance of DDPM's p(z_{t-1} | z_t), from the network's eps and v. s: ddpm_schedule."""
    abar = at(s.abar, t)
    z_hat = (z_t - (1 - abar).sqrt() * eps) / abar.sqrt()
    mean = at(s.coef_z, t) * z_hat + at(s.coef_zt, t) * z_t
    share = (v + 1) / 2                                                 # of the largest possible variance
    log_var = share * at(s.log_beta, t) + (1 - share) * at(s.posterior_log_var, t)
    return mean, log_var


def variational_term(z, z_t, t, eps, v):
    """DiT's loss of its variances, (B, c, h, w) in bits: KL(q(z_{t-1} | z_t, z) || p); -log p(z) at t = 0."""
    s = ddpm_schedule(None, z.device, z.dtype)
    mean, log_var = model_mean_log_var(s, t, z_t, eps, v)
    q_mean = at(s.coef_z, t) * z + at(s.coef_zt, t) * z_t
    q_log_var = at(s.posterior_log_var, t)
    kl = -1 + log_var - q_log_var + (q_log_var - log_var).exp()
    kl = 0.5 * (kl + (q_mean - mean) ** 2 * (-log_var).exp())
    at_zero = t.view(-1, 1, 1, 1) == 0
    return torch.where(at_zero, bin_nll(z, mean, log_var), kl) / math.log(2)


def bin_nll(z, mean, log_var):
    """-log of a Gaussian's mass in the bin z +- 1/255; the outer bins are open [DiT: bins of pixels]."""
    def cdf(x):                                                         # approximate, of the unit Gaussian
        return 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))

    upper = cdf((z - mean + 1 / 255) * (-0.5 * log_var).exp())
    lower = cdf((z - mean - 1 / 255) * (-0.5 * log_var).exp())
    mass = torch.where(z > 0.999, 1 - lower, upper - lower)
    mass = torch.where(z < -0.999, upper, mass)
    return -mass.clamp(min=1e-12).log()


def training_loss(net, z, y, c_prime=None, t=None, noise=None, reduction="mean"):
    """Eq. 2 for all four families: a scalar, or (B,) with reduction="none".

    z (B, c, h, w) scaled to rms 1, y (B,). c_prime=None: ordinary training. t (B,) and noise (B, c, h, w) are
    drawn where None. net may be a wrapper (DDP, compiled, FSDP): only its `objective` is asked for."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    c = z.shape[1]
    if c_prime is None:
        c_prime = c
    if t is None:
        t = draw_t(net, torch.rand(len(z), device=z.device))
    if noise is None:
        noise = torch.randn_like(z)
    m = channel_mask(c, c_prime, z.device).to(z.dtype)                  # (1, c, 1, 1): c' ones, then zeros

    z = m * z
    noise = m * noise
    z_t, target = noised(net, z, noise, t)
    out = net(z_t, t, y).to(z.dtype)
    pred = out[:, :c]
    # DC-AE 1.5 Eq. (2): || m * target - m * net(m * z_t, t, y) ||^2 (z_t is masked, as z and noise are)
    loss = (m * target - m * pred) ** 2
    if net.objective == "ddpm":                                         # eps is detached: this trains v alone
        loss = loss + m * variational_term(z, z_t, t, pred.detach(), out[:, c:])
    kept = c_prime * z[0, 0].numel()
    loss = loss.flatten(1).sum(1) / kept                                # (B,)
    return loss.mean() if reduction == "mean" else loss


# ------------------------------------------------------------------------------------------------------------
# Random numbers that depend on a key alone (seed, step, image, ...): the same on any device, rank, batch size
# (gaussian's log and cos: up to rounding)
#
# All keys of this repository:
#   training   (seed, NOISE or TIME or DROP or MIRROR, n)     n: the sample's number in the run
#   sampling   (seed, i, j)     i: the image's; j: 0 for pure noise, then the solver's j-th fresh noise
# Images 0 to 3 are sampled under keys that training uses too (NOISE .. MIRROR are 0 .. 3): harmless, as
# sampling trains nothing. Other draws: c' and data order (train_ae.py), crops and toy pictures (ae.py),
# random labels (sample.parse_classes).
# A changed number changes every resumed run and every sample.

NOISE, TIME, DROP, MIRROR = range(4)        # of z_t; t; whether the label is dropped; whether to mirror


def random_bits(rows, n, key, device):
    """(rows, n) int64. A tensor (rows,) in the key keys each row; with ints alone the numbers run on from row
    to row."""
    tensors = [k for k in key if torch.is_tensor(k)]
    if device is None:
        device = tensors[0].device if tensors else "cpu"
    streams, length = (rows, n) if tensors else (1, rows * n)
    state = torch.zeros(streams, 1, dtype=torch.int64, device=device)
    for k in key:
        if torch.is_tensor(k):
            k = k.to(device).view(-1, 1)
        state = splitmix64(state ^ k)
    return splitmix64(state, torch.arange(length, device=device)).view(rows, n)


def uniform(n, *key, device=None):
    """(n,) fp32 in [0, 1). Key: ints, or int64 tensors (n,)."""
    bits = random_bits(n, 1, key, device)[:, 0]
    return ((bits >> 40) & (2**24 - 1)).float() * 2.0**-24


def gaussian(shape, *key, device=None, dtype=torch.float32):
    """Standard normal numbers by Box-Muller. Key: ints, or int64 tensors (shape[0],).
    Row i depends on its key alone; a shorter row is a prefix of it: fewer channels get the same noise."""
    n = math.prod(shape[1:])
    work = torch.promote_types(dtype, torch.float32)
    bits = random_bits(shape[0], (n + 1) // 2, key, device)             # 32 for the radius, 32 for the angle
    u = (((bits >> 32) & (2**32 - 1)).to(work) + 0.5) * 2.0**-32
    radius = (-2 * u.log()).clamp(min=0).sqrt()
    angle = (bits & (2**32 - 1)).to(work) * (2 * math.pi * 2.0**-32)
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2)
    return x.flatten(1)[:, :n].reshape(shape).to(dtype)


# ------------------------------------------------------------------------------------------------------------
# Our checkpoints and published weights

# What a folder is searched for
FILES = ("ckpt.pt", "ckpt_prev.pt", "model.safetensors", "*.index*.json", "*.safetensors", "*.pt", "*.pth")
HUB = (
    r"[\w.-]+/dc-ae-[\w.-]+-in-\d+px[\w.-]*",                           # published names
    "mit-han-lab/dc-ae-f32c32-in-1.0-usit-h-in-512px",                  # one of them
)

# What a published name or file name says
NAME_PATTERNS = (
    r"dc-ae-(?P<ae>[\w.-]+)-(?P<family>dit|sit|uvit|usit)-\w+-in-(?P<px>\d+)px",   # as in HUB
    r"(?P<family>dit|sit)-\w+-\d+-(?P<px>\d+)x\d+",                         # SiT-XL-2-256x256.pt
    r"imagenet(?P<px>\d+)_(?P<family>uvit)",                                # imagenet256_uvit_huge.pth
)
# The autoencoder of such a name, and its scaling factor [DC-Gen c2icore; the last: train.py of DiT and SiT]
AUTOENCODERS = {
    "f32c32-in-1.0": ("mit-han-lab/dc-ae-f32c32-in-1.0", 0.3189),
    "f64c128-in-1.0": ("mit-han-lab/dc-ae-f64c128-in-1.0", 0.2889),
    "f64c128-1.5": ("dc-ai/dc-ae-f64c128-1.5", 0.5935),
    "1.5-f64c128": ("dc-ai/dc-ae-1.5-f64c128", 0.5935),
    None: ("stabilityai/sd-vae-ft-ema", 0.18215),
}
# First layer, table of labels, last layer: their shapes tell the sizes
KEY_TENSORS = {
    "DiT": ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight"),
    "UViT": ("patch_embed.proj.weight", "label_emb.embedding_table.weight", "decoder_pred.weight"),
}


def from_pretrained(x, name=None, **config):
    """A network in eval mode. x: our checkpoint or run folder; published weights by hub name, folder or file.

    Published tensors tell depth, hidden, c, patch, size and num_classes; name ("USiT" or "USiT-H") and config
    (heads=, size=) tell what they cannot. net.info: what else is known of step, scale, ae, ae_hash,
    image_size, classes."""
    path, content = open_weights(x, FILES, HUB)
    try:
        if "kind" in content:
            settings, weights, info = read_ours(path, content, name)
        else:
            settings, weights, info = read_published(path, content, str(x), name, config)
        settings.update(config)
        with torch.device("meta"):
            net = build(**settings)
        check_shapes(net.state_dict(), weights, f"{path}: does not fit {settings['name']}")
        net.to_empty(device="cpu").load_state_dict(weights)
    except Exception as e:                                              # a stranger's file may hold anything
        line = str(e)
        if path.name not in line:
            line = f"{path}: not a diffusion model that can be read here: {type(e).__name__}, {line}"
        raise InputError(line) from None
    net.info = info
    return net.eval()


def check_shapes(wanted, given, complaint):
    wanted = {k: tuple(v.shape) for k, v in wanted.items()}
    given = {k: tuple(v.shape) for k, v in given.items()}
    for k in sorted(wanted | given):
        if given.get(k) != wanted.get(k):
            found = f"tensor {k[:60]} is {given.get(k, 'missing')}, wanted {wanted.get(k, 'none')}"
            raise InputError(f"{complaint}: {found}")


def read_ours(path, content, name):
    """-> settings for build, weights (the average where there is one), info."""
    if content["kind"] != "diffusion":
        raise InputError(f"{path}: holds a checkpoint of kind '{content['kind']}', wanted a diffusion model")
    held = content["config"]["name"]
    if name and name not in (held, held.split("-")[0]):
        raise InputError(f"{path}: holds a {held}, not the {name} asked for")
    kinds = dict(step=int, scale=float, ae=str, ae_hash=str, image_size=int, classes=list)
    info = {k: content[k] for k in kinds if content.get(k) is not None}
    for k, value in info.items():
        if type(value) is not kinds[k] or k == "scale" and not 0 < value < math.inf:
            raise ValueError(f"{k} is {value!r:.40}")
    return dict(content["config"]), plain_names(content.get("ema") or content["model"]), info


def read_published(path, content, x, name, config):
    """-> settings for build, weights under our names, info (ae, scale, image_size: if a name tells them)."""
    weights = content
    for k in ("model", "state_dict", "ema"):                            # the last of them that is there
        if isinstance(content.get(k), dict):
            weights = content[k]
    weights = plain_names(weights)
    if "label_emb.weight" in weights:                                   # U-ViT's own name of the same table
        weights["label_emb.embedding_table.weight"] = weights.pop("label_emb.weight")
    network = "UViT" if "patch_embed.proj.weight" in weights else "DiT"
    for k, ndim in zip((*KEY_TENSORS[network], "pos_embed"), (4, 2, 2, 3)):
        if k not in weights or weights[k].ndim != ndim:
            raise InputError(f"{path}: neither a DiT nor a class-conditional U-ViT: tensor {k} is missing")
    if network == "UViT" and any(k.startswith("final_layer") for k in weights):
        raise InputError(f"{path}: this U-ViT ends in a 3x3 convolution (final_layer); it is not supported")

    hint = hint_of(x, path.parent.name, path.name)
    first, labels, last = (weights[k] for k in KEY_TENSORS[network])
    hidden, c, patch, _ = first.shape
    sigma = len(last) == 2 * c * patch**2
    family = which_family(path, network, sigma, name, hint.get("family", ""))
    tokens = weights["pos_embed"].shape[1] - 2 * (network == "UViT")    # label and time
    depth = len(set(re.findall(r"\w*blocks\.\d+", " ".join(weights))))
    settings = {
        "c": c,
        "size": patch * square_root(path, tokens, config),
        "num_classes": len(labels) - 1,
        "patch": patch,
        **named_settings(path, family, depth, hidden, config),
    }
    if family == "SiT" and sigma:
        drop_sigma(weights, c, patch)
    info = {}
    if hint:
        info["image_size"] = int(hint["px"])
        if hint.get("ae") in AUTOENCODERS:
            info["ae"], info["scale"] = AUTOENCODERS[hint.get("ae")]
    return settings, weights, info


def hint_of(*names):
    """{"ae", "family", "px"} as far as published names tell them."""
    for name in names:
        for rule in NAME_PATTERNS:
            if found := re.search(rule, name, re.I):
                return found.groupdict()
    return {}


def which_family(path, network, sigma, name, hint):
    """By the tensors, then name=, then a published file name."""
    possible = ["UViT", "USiT"]
    if network == "DiT":
        possible = ["DiT", "SiT"] if sigma else ["SiT"]                 # original SiTs have unused sigmas
    for family in possible:
        if family.lower() == (name or hint).split("-")[0].lower():
            return family
    if name:
        raise InputError(f"{path}: the tensors are those of a {' or '.join(possible)}, not of the {name} "
                         "asked for")
    if network == "UViT":
        raise InputError(f"{path}: UViT and USiT have the same tensors; say which: "
                         'name="UViT" or name="USiT" (--model)')
    return possible[0]


def square_root(path, tokens, config):
    """Sides that are not equal cannot be read off tensors."""
    side = math.isqrt(tokens)
    if side * side != tokens and "size" not in config:
        raise InputError(f"{path}: {tokens} tokens are not a square; say size=(h, w)")
    return side


def named_settings(path, family, depth, hidden, config):
    """Name, depth, hidden, heads. Heads cannot be read off tensors: they are those of our preset."""
    settings = {"name": family, "depth": depth, "hidden": hidden}
    for name, (*dims, heads) in MODELS.items():
        if name.startswith(family + "-") and dims == [depth, hidden]:
            return settings | {"name": name, "heads": heads}
    if "heads" not in config:
        raise InputError(f"{path}: depth {depth}, hidden {hidden} is no {family} of ours, and heads "
                         "cannot be read off tensors; say heads=")
    return settings


def drop_sigma(weights, c, patch):
    """The unused half of the last layer, whose rows are (pixel of the patch, channel)."""
    for k in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = weights[k].unflatten(0, (patch**2, 2 * c))
        weights[k] = rows[:, :c].flatten(0, 1)
