"""Denoisers, objectives, Eq. 2, random numbers, published weights.    python -m pytest tests/test_diffusion.py

Golden numbers were made with the official models in float64 (DC-Gen @cae2205, facebookresearch/DiT, willisma/SiT),
every tensor filled by a formula of its sorted place k and shape (`filled` below). Everything else is written out here:
Eq. 2, the schedules, attention, and the random numbers in plain Python integers.
"""
import argparse
import ast
import hashlib
import json
import math
import os
import pickle
import shutil
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import diffusion
from diffusion import (MODELS, build, draw_t, forward_macs, from_pretrained, gaussian, noised, timestep_embedding,
                       training_loss, uniform)

# name: depth, hidden, heads, parameters at c128 8x8, multiply-adds of a forward there and at c32 16x16 [DC-Gen]
COUNTS = {"DiT-S": (12, 384, 6, 33018880, 1417297920, 6060392448),
          "DiT-B": (12, 768, 12, 130623232, 5574623232, 23014539264),
          "DiT-L": (24, 1024, 16, 458250496, 19708248064, 80710205440),
          "DiT-XL": (28, 1152, 16, 675295744, 29057826816, 118635577344),
          "SiT-S": (12, 384, 6, 32969600, 1414152192, 6057246720),
          "SiT-B": (12, 768, 12, 130524800, 5568331776, 23008247808),
          "SiT-L": (24, 1024, 16, 458119296, 19699859456, 80701816832),
          "SiT-XL": (28, 1152, 16, 675148160, 29048389632, 118626140160),
          "UViT-S": (12, 512, 8, 44788864, 2973159424, 12256890880),
          "UViT-M": (16, 768, 12, 130916480, 8690767872, 35229161472),
          "UViT-L": (20, 1024, 16, 286795904, 19028418560, 76464496640),
          "UViT-H": (28, 1152, 16, 500868992, 33243632640, 133206193152),
          "UViT-2B": (28, 2048, 32, 1580396672, 104637349888, 414821466112),
          "USiT-S": (12, 512, 8, 44788864, 2973159424, 12256890880),
          "USiT-M": (16, 768, 12, 130916480, 8690767872, 35229161472),
          "USiT-L": (20, 1024, 16, 286795904, 19028418560, 76464496640),
          "USiT-H": (28, 1152, 16, 500868992, 33243632640, 133206193152),
          "USiT-2B": (28, 2048, 32, 1580396672, 104637349888, 414821466112),
          "USiT-3B": (56, 2048, 32, 3107725440, 205900890112, 816351035392)}
TOYS = {"DiT-T": (4, 144, 4), "SiT-T": (4, 144, 4), "UViT-T": (4, 192, 3), "USiT-T": (4, 192, 3)}               # ours

# name: [mean, std, absmax, sum_i out_i sin(i / 10), out_0 .. out_3, out_-4, out_-3] of the output
GOLDEN = {
    "DiT": [-0.04029202641, 2.04314012, 3.790293355, 424.9847077,
            2.309588067, 3.461467923, 2.30708019, 1.077120474, -1.794145666, -2.61522253],
    "DiT null": [-0.04709276774, 2.301340599, 4.132780168, 486.2355164,
                 2.901057071, 3.884608429, 2.738612692, 1.272792838, -1.917092158, -3.245222666],
    "DiT 4": [-0.0467166595, 1.01732961, 2.138238702, 106.7695777,
              1.734404264, 2.138238702, 1.028537269, 0.3286123328, -0.186613693, -1.050471262],
    "DiT sincos": [-0.009046687698, 0.4932777221, 1.346417252, -47.16335635,
                   0.2078969804, -0.01866471024, -0.1844065429, -0.2140685739, 0.6814308033, 0.9980574797],
    "SiT": [-0.1444344104, 2.032319064, 3.789222564, 237.1411,
            2.312958332, 3.464738999, 2.309987051, 1.077451373, 0.4328023802, -0.5233343782],
    "SiT null": [-0.1642046302, 2.284479743, 4.141342456, 268.1549282,
                 2.905416897, 3.887307556, 2.73838053, 1.272836764, 0.410620052, -0.7986292266],
    "SiT 4": [-0.06809560479, 0.9982693028, 2.138483822, 40.0590532,
              1.734885503, 2.138483822, 1.028481553, 0.3284349478, 0.5748166588, 0.4899262466],
    "SiT sincos": [-0.0005254899889, 0.4942478526, 1.245770747, -45.65370958,
                   0.2077607265, -0.01884822656, -0.184737198, -0.2145824497, 0.6566968506, 0.653424676],
    "UViT": [0.1104552925, 0.605649968, 0.9349663477, -19.21110502,
             -0.3197868737, -0.383554803, -0.3553508303, -0.3059489049, -0.2691439641, -0.2929951437],
    "UViT null": [0.110218356, 0.6038819008, 0.9343757671, -19.18425313,
                  -0.3327575639, -0.3830516661, -0.3517066632, -0.3034267525, -0.2663564853, -0.293020028],
    "UViT 4": [0.102427422, 0.6045132754, 0.8918839166, 7.370393304,
               -0.338162437, -0.3844346809, -0.3574734329, -0.3074893211, -0.5689135327, -0.6162342787],
    "USiT": [0.1104561512, 0.6056577363, 0.9352410471, -19.21721674,
             -0.3196649846, -0.3834146565, -0.3552079531, -0.305830777, -0.2690778104, -0.292926277],
    "USiT null": [0.1101723565, 0.6035392478, 0.9346730154, -19.18619191,
                  -0.3325985925, -0.3828705049, -0.3494834292, -0.3023385527, -0.2662946169, -0.2929559746],
    "USiT 4": [0.1024296888, 0.6045246735, 0.8920089624, 7.367633472,
               -0.338021238, -0.3843003155, -0.3573359191, -0.3073693404, -0.5689444625, -0.6163832176]}
TIMES = {"DiT": [17.0, 640.0], "UViT": [17.0, 640.0], "SiT": [0.137, 0.82], "USiT": [0.137, 0.82]}

# abar of the two discrete families, from their papers' betas; UViT's entry n - 1 belongs to n = 1 .. 1000
BETA = {"DiT": torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64),
        "UViT": torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2}
ABAR = {family: (1 - beta).cumprod(0) for family, beta in BETA.items()}


def grid(*shape):
    return torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in shape], indexing="ij")


def filled(family):
    """The four golden models: depth 4, hidden 64, 4 heads, 10 classes, 8x4x4 latents, float64."""
    net = build(family, c=8, size=4, num_classes=10, depth=4, hidden=64, heads=4)
    state = {}
    for k, (name, v) in enumerate(sorted(net.state_dict().items())):
        s = torch.sin(0.37 * torch.arange(v.numel(), dtype=torch.float64) + 1.1 * k).view(v.shape)
        vector = 1 + 0.1 * s if name.endswith("weight") else 0.05 * s
        state[name] = s / math.sqrt(v[0].numel()) if v.ndim > 1 else vector
    net.double().load_state_dict(state)
    return net.eval()


def noise(j, shape):
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (1.4 * torch.sin(0.7 * i**1.5 + 1.3 * j)).view(shape)


def fingerprint(out):
    out = out.detach().flatten()
    check = (out * torch.sin(0.1 * torch.arange(len(out), dtype=torch.float64))).sum()
    return [out.mean().item(), out.std(correction=0).item(), out.abs().max().item(), check.item(),
            *out[:4].tolist(), *out[-4:-2].tolist()]


def tiny(family, **kw):
    """A small network without zero-initialised outputs, so that everything has a gradient."""
    torch.manual_seed(0)
    net = build(family, **{**dict(c=8, size=4, num_classes=10, depth=2, hidden=32, heads=2), **kw})
    for p in net.parameters():
        if p.requires_grad and p.ndim > 1:
            torch.nn.init.normal_(p, std=0.1)
    return net


def first_inputs(net, *inputs):
    """What the first block is given: (tokens, condition) of a DiT, (tokens,) of a U-ViT."""
    seen = []
    hook = net.layers()[0].register_forward_pre_hook(lambda module, args: seen.append(args))
    net(*inputs)
    hook.remove()
    return seen[0]


# ----------------------------------------------------------------------------------------------------------------------
# Networks

def test_every_preset_and_its_counts():
    assert set(MODELS) == set(COUNTS) | set(TOYS)
    for name, (*dims, parameters, macs_8, macs_16) in COUNTS.items():
        with torch.device("meta"):
            net = build(name, c=128, size=8)
        assert [net.config[k] for k in ("depth", "hidden", "heads")] == dims, name
        assert sum(p.numel() for p in net.parameters()) == parameters, name
        assert forward_macs(net) == macs_8 and forward_macs({**net.config, "c": 32, "size": 16}) == macs_16, name
    for name, dims in TOYS.items():
        assert tuple(build(name, c=4, size=4).config[k] for k in ("depth", "hidden", "heads")) == dims, name
    with torch.device("meta"):
        dit, uvit = (build(name, c=4, size=32, patch=2) for name in ("DiT-XL", "UViT-H"))
    assert sum(p.numel() for p in dit.parameters()) == 675129632                # facebookresearch/DiT
    assert sum(p.numel() for p in uvit.parameters()) == 500832016               # baofff/U-ViT
    assert round(forward_macs(dit) / 1e9, 3) == 118.621 and round(forward_macs(uvit) / 1e9, 3) == 133.197


@pytest.mark.parametrize("family", TIMES)
def test_multiply_adds_are_those_torch_counts(family):
    with torch.device("meta"):
        net = build(f"{family}-T", c=3, size=(4, 6), patch=2)
        with FlopCounterMode(display=False) as counter:
            net(torch.zeros(1, 3, 4, 6), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert 2 * forward_macs(net) == counter.get_total_flops()


@pytest.mark.parametrize("name, c, size, hashed", [
    ("DiT-S", 32, 16, "c80c981a98072f70"), ("SiT-S", 32, 16, "0c422f1bcad96745"),
    ("UViT-S", 128, 8, "ebae78a665a60187"), ("USiT-H", 128, 8, "29253a478d0b67bd")])
def test_tensor_names_shapes_and_order(name, c, size, hashed):
    with torch.device("meta"):
        names = [[k, list(v.shape)] for k, v in build(name, c, size).state_dict().items()]
    assert hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16] == hashed


@pytest.mark.parametrize("family", TIMES)
def test_golden_forward(family):
    net, t, y = filled(family), torch.tensor(TIMES[family], dtype=torch.float64), torch.tensor([3, 7])
    b, c, h, w = grid(2, 8, 4, 4)
    x = torch.sin(0.01 * (b * 7919 + c * 104729 + h * 31 + w * 17))
    assert fingerprint(net(x, t, y)) == pytest.approx(GOLDEN[family], rel=1e-8, abs=1e-9)
    assert fingerprint(net(x, t, y * 0 + 10)) == pytest.approx(GOLDEN[f"{family} null"], rel=1e-8, abs=1e-9)
    if family in ("DiT", "SiT"):                                                # with its own position embedding
        own = filled(family)
        own.pos_embed.data.copy_(build("SiT", c=8, size=4, depth=1, hidden=64, heads=4).pos_embed)
        assert fingerprint(own(x, t, y)) == pytest.approx(GOLDEN[f"{family} sincos"], rel=1e-8, abs=1e-9)
    x[:, 4:] = 0                                                                # the official model slices its weights
    out = net(x, t, y)
    out = torch.cat([out[:, :4], out[:, 8:12]], dim=1) if family == "DiT" else out[:, :4]
    assert fingerprint(out) == pytest.approx(GOLDEN[f"{family} 4"], rel=1e-8, abs=1e-9)


def test_position_embedding_fingerprint():
    p = build("DiT-T", c=4, size=8, hidden=192, heads=3).pos_embed[0]           # token = row * 8 + column, width 192
    assert p[1, [0, 1, 48, 96, 144]].tolist() == pytest.approx([0.8414709568, 0.7348219752, 0.5403022766, 0, 1])
    assert p[8, [0, 1, 48, 96, 144]].tolist() == pytest.approx([0, 0, 1, 0.8414709568, 0.5403022766])
    assert p[27, :4].tolist() == pytest.approx([0.1411200017, 0.6173582077, 0.8901692033, 0.9932531714])
    assert p.double().sum().item() == pytest.approx(5979.796476608259, rel=1e-9)
    wide = build("DiT-T", c=4, size=(8, 16), patch=2, hidden=192, heads=3).pos_embed[0]
    assert torch.equal(wide, p[:32])                                            # 4 x 8 tokens: the upper half


def test_init_statistics():
    torch.manual_seed(0)
    dit = dict(build("DiT", c=32, size=8, depth=2, hidden=192, heads=6).named_parameters())
    std = {"x_embedder.proj.weight": 0.0940, "t_embedder.mlp.0.weight": 0.02, "t_embedder.mlp.2.weight": 0.02,
           "y_embedder.embedding_table.weight": 0.02, "blocks.0.attn.qkv.weight": 0.0511,
           "blocks.1.attn.proj.weight": 0.0722, "blocks.1.mlp.fc1.weight": 0.0456, "blocks.0.mlp.fc2.weight": 0.0456}
    for name, p in dit.items():
        if name in std:
            assert p.std().item() == pytest.approx(std[name], rel=0.03), name
        elif name.endswith("bias") or "adaLN" in name or name == "final_layer.linear.weight":
            assert p.abs().max() == 0, name
    assert not dit["pos_embed"].requires_grad
    uvit = dict(build("UViT", c=32, size=8, depth=2, hidden=192, heads=6).named_parameters())
    std = {"pos_embed": 0.02, "patch_embed.proj.weight": 0.102, "patch_embed.proj.bias": 0.102,
           "label_emb.embedding_table.weight": 1.0, "in_blocks.0.attn.qkv.weight": 0.02,
           "mid_block.mlp.fc2.weight": 0.02, "out_blocks.0.skip_linear.weight": 0.02, "decoder_pred.weight": 0.02}
    for name, value in std.items():
        assert uvit[name].std().item() == pytest.approx(value, rel=0.12 if name.endswith("bias") else 0.03), name
    assert uvit["mid_block.norm1.weight"].eq(1).all() and uvit["pos_embed"].requires_grad
    assert all(uvit[k].eq(0).all() for k in uvit if k.endswith("bias") and k != "patch_embed.proj.bias")


def test_timestep_embedding_against_official_numbers():
    t = torch.tensor([0.137, 17, 1000], dtype=torch.float64)
    wanted = [[0.990630169, 0.9999061565, 0.9999990616, 0.9999999906,
               0.1365718432, 0.01369957145, 0.001369999571, 0.0001369999996],
              [-0.2751633381, -0.1288444943, 0.9855847669, 0.9998555035,
               -0.9613974919, 0.9916648105, 0.1691823491, 0.01699918118],
              [0.5623790763, 0.8623188723, -0.8390715291, 0.5403023059,
               0.8268795405, -0.5063656411, -0.5440211109, 0.8414709848]]
    wanted = torch.tensor(wanted, dtype=torch.float64)
    assert torch.allclose(timestep_embedding(t, 8, torch.float64), wanted, atol=2e-10)
    assert timestep_embedding(t.to(torch.bfloat16), 8).dtype == torch.float32


@pytest.mark.parametrize("family", ["DiT", "UViT"])
def test_time_tokens_and_norms_are_fp32_under_bf16_autocast(family):
    net, y = tiny(family), torch.tensor([1, 1])
    near = torch.tensor([988.4937, 987.1741])                                   # one in bf16 [DiffSynth-Studio#562]
    assert near.to(torch.bfloat16).unique().numel() == 1
    z, norms = torch.randn(1, 8, 4, 4).expand(2, -1, -1, -1), []
    exact, whole = first_inputs(net, z, near, y), net(z, near, y)
    net.layers()[1].norm1.register_forward_hook(lambda module, args, out: norms.extend([args[0].dtype, out.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        given, half = first_inputs(net, z, near, y), net(z, near, y)
    assert given[0].dtype == torch.float32 and set(norms) == {torch.float32}    # what runs through the blocks
    half_width = 128 if family == "DiT" else 16
    angle = near.double()[:, None] * 10000 ** (-torch.arange(half_width, dtype=torch.float64) / half_width)
    token = torch.cat([angle.cos(), angle.sin()], dim=1)
    if family == "DiT":
        first, _, second = net.t_embedder.mlp.double()
        cond = second(torch.nn.functional.silu(first(token))) + net.y_embedder.embedding_table.weight[1]
        assert torch.allclose(given[1].double(), cond, atol=1e-4) and torch.equal(given[1], exact[1])
    else:
        assert torch.allclose(given[0][:, 1].double(), token + net.pos_embed[0, 1], atol=1e-4)
        label = net.label_emb.embedding_table.weight[1] + net.pos_embed[0, 0]
        assert torch.equal(given[0][:, 0], label.expand(2, -1))                 # tokens: label, time, patches
    assert 0 < (half - whole).abs().max() < 0.03 * whole.abs().max()
    a, b = net.bfloat16()(z, near, y)                                           # weights in bf16, as under FSDP
    assert a.dtype == torch.bfloat16 and (a - b).abs().max() > 0.02


@pytest.mark.parametrize("family", ["DiT", "UViT"])
def test_attention_is_softmax_written_out(family):
    attn, x = tiny(family, hidden=24, heads=3).layers()[0].attn.double(), torch.randn(2, 5, 24).double()
    qkv = x @ attn.qkv.weight.mT + (attn.qkv.bias if family == "DiT" else 0)
    assert family == "DiT" or attn.qkv.bias is None
    heads = []
    for k in range(3):
        q, key, v = (qkv[..., s * 24 + k * 8 : s * 24 + k * 8 + 8] for s in range(3))
        heads.append((q @ key.mT / 8**0.5).softmax(dim=2) @ v)
    assert torch.allclose(attn(x), torch.cat(heads, dim=2) @ attn.proj.weight.mT + attn.proj.bias, rtol=1e-10)


def test_attention_sums_over_many_tokens_in_fp32():
    """2048 equal weights: the mean of the values. A running sum in bf16 would stop at a quarter of it."""
    attn = tiny("UViT").layers()[0].attn
    with torch.no_grad():
        attn.qkv.weight.copy_(torch.cat([torch.zeros(64, 32), torch.eye(32)]))
        attn.proj.weight.copy_(torch.eye(32))
        attn.proj.bias.zero_()
    x = torch.rand(1, 2048, 32, generator=torch.Generator().manual_seed(0)) + 0.5
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(attn(x).float(), x.mean(1, keepdim=True), rtol=0.01)


@pytest.mark.parametrize("family", TIMES)
def test_patch_two_any_grid_unconditional(family):
    torch.manual_seed(0)
    net = build(family, c=3, size=(4, 6), patch=2, num_classes=0, depth=2, hidden=32, heads=2)
    z, t, y = torch.randn(2, 3, 4, 6), draw_t(net, torch.tensor([0.1, 0.7])), torch.zeros(2, dtype=torch.long)
    out = 6 if family == "DiT" else 3
    assert net(z, t, y).shape == (2, out, 4, 6) and build(**net.config).config == net.config
    assert training_loss(net, z, y, c_prime=2).isfinite()
    head = net.final_layer.linear if family in ("DiT", "SiT") else net.decoder_pred
    torch.nn.init.zeros_(head.weight)
    head.bias.data.copy_(torch.arange(4.0 * out))                               # rows: (row, column, channel)
    b, c, h, w = grid(2, out, 4, 6)
    assert torch.equal(net(z, t, y).double(), ((h % 2) * 2 + w % 2) * out + c)
    if family in ("DiT", "SiT"):                                                # every block starts as the identity:
        torch.nn.init.ones_(head.weight[:, :5])                                 # a patch sees itself and stays in place
        moved = z.clone()
        moved[:, :, 2:4, 4:6] += 1
        changed = (net(moved, t, y) != net(z, t, y)).flatten(0, 1).any(0)
        assert changed.nonzero().tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]


@pytest.mark.parametrize("family", TIMES)
def test_checkpointing_recomputes_and_gives_equal_gradients(family):
    net, z, y, grads, runs = tiny(family), torch.randn(2, 8, 4, 4), torch.tensor([1, 10]), [], []
    assert len(net.layers()) == (3 if family[0] == "U" else 2)
    for layer in net.layers():
        layer.register_forward_pre_hook(lambda *a: runs.append(1))
    for net.checkpointing in (False, True):
        runs.clear()
        net.zero_grad()
        torch.manual_seed(1)
        training_loss(net, z, y).backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.requires_grad])
        assert len(runs) == len(net.layers()) * (2 if net.checkpointing else 1)
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("name, kw, word", [
    ("DiT-Z", {}, "unknown model"), ("DiT", {}, "unknown model"), ("DiT", dict(depth=2, hidden=8), "unknown model"),
    ("UViT-T", dict(depth=3), "even"), ("USiT-T", dict(depth=3), "even"), ("DiT-T", dict(heads=5), "heads"),
    ("DiT-T", dict(hidden=6, heads=2), "by 4"), ("SiT-T", dict(size=(4, 3), patch=2), "4x3 .* --patch 2"),
    ("SiT-T", dict(size=(3, 4), patch=2), "3x4 .* --patch 2"), ("SiT-T", dict(width=3), "width"),
    ("SiT-T", dict(size=(4, 4, 4)), "4x4x4"), ("SiT-T", dict(size=()), "latent"),
    ("USiT-T", dict(depth=10**7), "depth"),
    ("SiT-T", dict(hidden=10**6), "take a smaller network"), ("SiT-T", dict(num_classes=10**10), "smaller network"),
    ("SiT-T", dict(size=2**20), "smaller network"), ("SiT-T", dict(c=10**10), "smaller network"),
    ("SiT-T", dict(size=2**30, patch=2**30), "smaller network"), (None, {}, "unknown model"), ([], {}, "unknown model"),
    *(("SiT-T", {setting: value}, f"{setting} .*whole number")                  # what a stranger's file may say
      for setting in ("c", "size", "num_classes", "patch", "depth", "hidden", "heads")
      for value in (-1, 2.0, math.nan, math.inf, True, "4", None, [4, 4.0], 10**13))])
def test_bad_settings_are_one_line(name, kw, word):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=word) as e:
        build(name, **{**dict(c=8, size=4), **kw})
    assert isinstance(e.value, SystemExit) and len(str(e.value)) < 200 and "\n" not in str(e.value)
    assert time.perf_counter() - start < 1


def test_zero_is_refused_but_for_the_classes():
    for setting in ("c", "size", "patch", "depth", "hidden", "heads"):
        with pytest.raises(ValueError, match=f"{setting} 0 must be a whole number"):
            build("SiT-T", **{**dict(c=8, size=4), setting: 0})
    assert build("SiT-T", c=8, size=4, num_classes=0).num_classes == 0


def test_build_says_what_it_built():
    net = build("DiT-T", 8, 4, depth=3, heads=8)                                # an odd depth suits a DiT
    assert net.config == dict(name="DiT-T", c=8, size=4, num_classes=1000, patch=1, depth=3, hidden=144, heads=8)
    assert len(net.layers()) == 3 and net.layers()[0].attn.qkv.weight.shape == (432, 144)
    assert net.info == {} and build("UViT-T", 8, (2, 4), num_classes=3).config["size"] == (2, 4)
    families = {family: build(f"{family}-T", 8, 4) for family in TIMES}
    assert {family: (net.family, net.objective) for family, net in families.items()} == {
        "DiT": ("DiT", "ddpm"), "UViT": ("UViT", "vp"), "SiT": ("SiT", "flow"), "USiT": ("USiT", "flow")}


def test_needs_no_optional_package():
    top = ast.parse(Path(diffusion.__file__).read_text()).body
    names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in top if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "torch", "ae"}


# ----------------------------------------------------------------------------------------------------------------------
# Objectives and Eq. 2

def test_noised_is_each_familys_line():
    torch.manual_seed(0)
    z, eps = torch.randn(1000, 2, 1, 1).double(), torch.randn(1000, 2, 1, 1).double()
    wide = lambda x: x.view(-1, 1, 1, 1)
    for family, t in ("DiT", torch.arange(1000)), ("UViT", torch.arange(1, 1001)):
        z_t, target = noised(tiny(family), z, eps, t)
        assert torch.allclose(z_t, wide(ABAR[family].sqrt()) * z + wide((1 - ABAR[family]).sqrt()) * eps, rtol=1e-9)
        assert torch.equal(target, eps)
        z_t = noised(tiny(family), z.float(), eps.float(), t)[0]
        assert z_t.dtype == torch.float32
    t = torch.arange(1000).double() / 1000
    for family in ("SiT", "USiT"):                                              # t = 0 is noise
        z_t, target = noised(tiny(family), z, eps, t)
        assert torch.allclose(z_t, wide(t) * z + (1 - wide(t)) * eps, rtol=1e-9) and torch.equal(z_t[0], eps[0])
        assert torch.equal(target, z - eps)
    at = [0, 1, 10, 100, 500, 998, 999]                                         # official numbers
    assert ABAR["DiT"][at].tolist() == pytest.approx(
        [0.9999, 0.9997800921, 0.9978065725, 0.8951415909, 0.07779665837, 4.118193638e-05, 4.035829765e-05], rel=1e-9)
    assert ABAR["UViT"][[0, 1, 9, 99, 499, 998, 999]].tolist() == pytest.approx(
        [0.99915, 0.9982960278, 0.9913210885, 0.8954627735, 0.2776696505, 0.0047166989, 0.004660098513], rel=1e-9)


# per-sample losses at these t; DiT's = squared error + variational term
@pytest.mark.parametrize("family, t, wanted", [
    ("DiT", [0, 17, 640, 999], [4.792950775 + 6.980385805, 3.720452689 + 0.2571623217, 1.087123164 + 0.01036862795,
                                2.528089622 + 0.03721847952]),
    ("UViT", [1, 17, 640, 1000], [1.324530417, 1.338803566, 1.262487716, 1.421646252]),
    ("SiT", [0.0, 0.137, 0.5, 0.97], [1.370554167, 1.24262542, 1.384146455, 5.213026061]),
    ("USiT", [0.0, 0.137, 0.5, 0.97], [1.517603139, 1.369983873, 1.524222101, 1.596312988])])
def test_golden_losses(family, t, wanted):
    b, c, h, w = grid(4, 8, 4, 4)
    z, y = 0.5 * torch.sin(0.1 * (b * 101 + c * 37 + h * 11 + w * 3)), torch.tensor([3, 7, 0, 10])
    t = torch.tensor(t, dtype=torch.float64 if family in ("SiT", "USiT") else torch.int64)
    net = filled(family)
    loss = training_loss(net, z, y, t=t, noise=noise(0, z.shape), reduction="none")
    assert loss.tolist() == pytest.approx(wanted, rel=1e-8)
    assert training_loss(net, z, y, t=t, noise=noise(0, z.shape)).item() == pytest.approx(sum(wanted) / 4, rel=1e-8)


def test_times_and_noise_drawn_inside():
    u = torch.tensor([0.0, 0.5, 1 - 2.0**-24])
    for family, wanted in ("DiT", [0, 500, 999]), ("UViT", [1, 501, 1000]):
        t = draw_t(tiny(family), u)
        assert t.tolist() == wanted and t.dtype == torch.int64
    assert torch.equal(draw_t(tiny("SiT"), u), u) and torch.equal(draw_t(tiny("USiT"), u), u)
    n = 20000
    for family, low, high in ("DiT", 0, 999), ("UViT", 1, 1000), ("SiT", 0, 1):
        net, seen = tiny(family, c=1, size=1), []
        net.forward = lambda *args: seen.append(args) or torch.zeros(n, 2 if family == "DiT" else 1, 1, 1)
        training_loss(net, torch.zeros(n, 1, 1, 1), torch.zeros(n, dtype=torch.long))
        z_t, t, _ = seen[0]
        assert low <= t.min() < low + 0.01 * high and high * 0.99 < t.max() <= high
        assert abs((t.double().mean() - (low + high) / 2) / high) < 5 * (1 / 12 / n) ** 0.5
        sigma = 1 - t if family == "SiT" else (1 - ABAR[family][t - low]).sqrt()
        eps = z_t.flatten().double() / sigma
        assert abs(eps.mean()) < 5 / n**0.5 and abs(eps.var() - 1) < 5 * (2 / n) ** 0.5


def case(family):
    torch.manual_seed(0)
    net = tiny(family).double()
    return net, torch.randn(4, 8, 4, 4).double(), torch.tensor([1, 2, 10, 3]), dict(
        t=draw_t(net, torch.tensor([0.0, 0.001, 0.4, 0.9])), noise=torch.randn(4, 8, 4, 4).double())


def variances_in_bits(z, z_t, t, eps, v):
    """Improved DDPM's term for learned variances: KL of two Gaussians; at t = 0 the likelihood of a bin of +- 1/255."""
    wide = lambda x: x.view(-1, 1, 1, 1)
    beta, abar = BETA["DiT"][t], ABAR["DiT"][t]
    prev = torch.where(t > 0, ABAR["DiT"][t - 1], 1.0)
    one = t.clamp(min=1)                                                        # t = 0 takes the variance of t = 1
    small = wide((BETA["DiT"][one] * (1 - ABAR["DiT"][one - 1]) / (1 - ABAR["DiT"][one])).log())
    mean = lambda z: wide(beta * prev.sqrt() / (1 - abar)) * z + wide((1 - prev) * (1 - beta).sqrt() / (1 - abar)) * z_t
    z_hat = (z_t - wide((1 - abar).sqrt()) * eps) / wide(abar.sqrt())
    std = (0.5 * ((v + 1) / 2 * wide(beta.log()) + (1 - v) / 2 * small)).exp()
    kl = kl_divergence(Normal(mean(z), (0.5 * small).exp()), Normal(mean(z_hat), std))
    cdf = lambda x: 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
    above = torch.where(z > 0.999, 1.0, cdf((z - mean(z_hat) + 1 / 255) / std))
    below = torch.where(z < -0.999, 0.0, cdf((z - mean(z_hat) - 1 / 255) / std))
    return torch.where(wide(t) == 0, -(above - below).clamp(min=1e-12).log(), kl) / math.log(2)


def eq_2(family, net, z, y, t, noise, k):
    """|| m eps - m eps_theta(m z_t) ||^2, its mean over the first k channels; with the velocity for eps in flows."""
    m = torch.tensor([1.0] * k + [0.0] * (8 - k)).double().view(8, 1, 1)
    if family in ("SiT", "USiT"):
        s = t.double().view(-1, 1, 1, 1)
        z_t, target = s * z + (1 - s) * noise, z - noise
    else:
        abar = ABAR[family][t - int(family == "UViT")].view(-1, 1, 1, 1)
        z_t, target = abar.sqrt() * z + (1 - abar).sqrt() * noise, noise
    out = net(m * z_t, t, y)
    error = (m * target - m * out[:, :8]) ** 2
    if family == "DiT":
        error = error + m * variances_in_bits(m * z, m * z_t, t, out[:, :8].detach(), out[:, 8:])
    return error[:, :k].flatten(1).mean(1)


@pytest.mark.parametrize("c_prime", [3, None])
@pytest.mark.parametrize("family", TIMES)
def test_training_loss_is_eq_2_written_out(family, c_prime):
    net, z, y, kw = case(family)
    grads = []
    for loss in (training_loss(net, z, y, c_prime=c_prime, reduction="none", **kw),
                 eq_2(family, net, z, y, k=c_prime or 8, **kw)):
        net.zero_grad()
        loss.mean().backward()
        grads.append([loss.detach()] + [p.grad.clone() for p in net.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-11) for a, b in zip(*grads))


def test_variational_term_at_its_edges():
    """Latents beyond the outer bins, and predictions so far off that the likelihood is cut at 1e-12."""
    net, z, y, kw = case("DiT")
    kw["t"] = kw["t"] * 0
    z[0], z[1] = 1.0, -1.0
    z[3, 0, 0] = torch.tensor([0.9985, -0.9985, 0.9995, -0.9995])               # the outer bins begin at 0.999
    out = torch.cat([kw["noise"], torch.zeros_like(z)], dim=1)
    out[2, :8] += 30
    net.forward = lambda *a: out
    loss = training_loss(net, z, y, reduction="none", **kw)
    assert torch.allclose(loss, eq_2("DiT", net, z, y, k=8, **kw), rtol=1e-8)
    assert 900 + 30 < loss[2] < 900 + 12 * math.log2(10) + 1 and loss[0] < 1 and loss[1] < 1


@pytest.mark.parametrize("family", TIMES)
def test_all_channels_is_ordinary_training_to_the_bit(family):
    net, z, y, _ = case(family)
    losses = []
    for c_prime in (None, 8):                                                   # t and noise are drawn inside
        torch.manual_seed(5)
        losses.append(training_loss(net, z, y, c_prime=c_prime))
    assert torch.equal(*losses)
    for c_prime in (0, 9):
        with pytest.raises(ValueError, match=f"c_prime={c_prime}"):
            training_loss(net, z, y, c_prime=c_prime)


def test_the_loss_is_fp32_in_bf16():
    net, seen = tiny("UViT"), []
    z, eps, out = torch.randn(3, 2, 8, 4, 4)
    z, out, t = z.to(torch.bfloat16), out.to(torch.bfloat16), torch.tensor([1, 700])
    net.forward = lambda *args: seen.append(args[0]) or out
    loss = training_loss(net, z, torch.tensor([1, 2]), t=t, noise=eps)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((eps - out.float()).square().mean().item(), rel=1e-5)
    abar = ABAR["UViT"][t - 1].float().view(-1, 1, 1, 1)
    assert torch.allclose(seen[0], abar.sqrt() * z.float() + (1 - abar).sqrt() * eps, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("family", TIMES)
def test_masking_equals_slicing_the_weights(family, patch):
    torch.manual_seed(0)
    full, small = tiny(family, patch=patch).double(), tiny(family, c=3, patch=patch).double()
    state = full.state_dict()
    for name, v in small.state_dict().items():
        if name.endswith("_embed.proj.weight") or name == "x_embedder.proj.weight":
            state[name] = state[name][:, :3]
        elif name.startswith(("decoder_pred", "final_layer.linear")):           # (pixel, [eps, sigma], channel)
            rows = state[name].unflatten(0, (patch**2, -1, 8))[:, :, :3]
            state[name] = rows.flatten(0, 2)
    small.load_state_dict(state)
    _, z, y, kw = case(family)
    a = training_loss(full, z, y, c_prime=3, reduction="none", **kw)
    b = training_loss(small, z[:, :3], y, reduction="none", t=kw["t"], noise=kw["noise"][:, :3])
    assert torch.allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("family", TIMES)
def test_hidden_channels_get_exactly_zero_gradient(family):
    net, z, y, kw = case(family)
    training_loss(net, z, y, c_prime=3, **kw).backward()
    head = net.final_layer.linear if family in ("DiT", "SiT") else net.decoder_pred
    stem = net.x_embedder.proj if family in ("DiT", "SiT") else net.patch_embed.proj
    for grad in (head.weight.grad, head.bias.grad):
        grad = grad.unflatten(0, (-1, 8))                                       # ([eps, sigma], channel)
        assert (grad[:, 3:] == 0).all() and (grad[:, :3] != 0).any(dim=1).all()
    assert (stem.weight.grad[:, 3:] == 0).all() and (stem.weight.grad[:, :3] != 0).any()


# ----------------------------------------------------------------------------------------------------------------------
# CUDA on a machine that has none. Fake tensors have a device, a shape and a dtype, no numbers; to mix devices is an
# error. Forward passes only, and what depends on data is left out.

@pytest.fixture
def fake_cuda(monkeypatch):
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)     # or autocast is off
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *args: True)
    caches = diffusion.ddpm_schedule, diffusion.vp_schedule                     # no fake table may stay in them
    for cache in caches:
        cache.cache_clear()
    yield FakeTensorMode()
    for cache in caches:
        cache.cache_clear()


class OneDevice(TorchDispatchMode):
    """No operation takes tensors of two devices, except to copy. (Fake tensors let some pass, like table[index].)"""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves([args, kwargs or {}]) if isinstance(t, torch.Tensor) and t.ndim]
        devices = {t.device.type for t in tensors}
        assert len(devices) <= 1 or "copy_" in str(func), f"{func} on {sorted(devices)}"
        return func(*args, **(kwargs or {}))


def on_cuda(net):
    """Within fake_cuda: a network made outside of it (U-ViT draws its weights) with fake weights on the GPU."""
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = torch.empty(p.shape, dtype=p.dtype, device="cuda")
                module._parameters[name] = torch.nn.Parameter(fake, p.requires_grad)
    return net


def loss_on_cuda(family, fake_cuda, given=True):
    """As the trainer computes it, in bf16 -> loss (b,), what the network was given, what its blocks computed in."""
    net, seen, inputs = tiny(family), set(), []
    with fake_cuda, OneDevice():
        for layer in on_cuda(net).layers():
            layer.mlp.register_forward_hook(lambda m, args, out: seen.add((out.device.type, out.dtype)))
        net.register_forward_pre_hook(lambda m, args: inputs.extend(args))
        n = torch.arange(3, device="cuda")
        z = torch.randn(3, 8, 4, 4, device="cuda").half().float()
        u = diffusion.uniform(3, 0, diffusion.TIME, n)
        kw = dict(t=draw_t(net, u), noise=diffusion.gaussian(z.shape, 0, diffusion.NOISE, n)) if given else {}
        with torch.autocast("cuda", torch.bfloat16):
            loss = training_loss(net, z, n, c_prime=3, reduction="none", **kw)
    return loss, inputs, seen


@pytest.mark.parametrize("family", TIMES)
def test_training_runs_on_cuda(fake_cuda, family):
    for given in (True, False):                                                 # time and noise: drawn inside
        loss, (z_t, t, y), seen = loss_on_cuda(family, fake_cuda, given)
        assert loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.shape == (3,)
        assert {x.device.type for x in (z_t, t, y)} == {"cuda"} and z_t.dtype == torch.float32
        assert t.dtype == (torch.float32 if family in ("SiT", "USiT") else torch.int64)
        assert seen == {("cuda", torch.bfloat16)}
    with fake_cuda, OneDevice():                                                # keys that are ints
        assert gaussian((3, 2), 0, 1, device="cuda").device.type == uniform(3, 0, device="cuda").device.type == "cuda"


@pytest.mark.parametrize("family, name, wrong", [
    ("SiT", "channel_mask", lambda c, c_prime, device: torch.ones(1, c, 1, 1)),
    ("DiT", "ddpm_schedule", lambda kept, device, dtype, real=diffusion.ddpm_schedule: real(kept, "cpu", dtype)),
    ("UViT", "vp_schedule", lambda device, dtype, real=diffusion.vp_schedule: real("cpu", dtype)),
    ("USiT", "timestep_embedding", lambda t, dim, dtype, real=timestep_embedding: real(t.to("cpu"), dim, dtype)),
    ("USiT", "gaussian", lambda shape, *key: torch.zeros(shape)),
    ("SiT", "draw_t", lambda net, u: torch.zeros(3))])
def test_one_tensor_left_on_the_cpu_fails(monkeypatch, fake_cuda, family, name, wrong):
    monkeypatch.setattr(diffusion, name, wrong)
    monkeypatch.setitem(globals(), name, wrong)
    with pytest.raises(Exception, match="cpu"):
        loss_on_cuda(family, fake_cuda)


def test_one_tensor_of_the_wrong_dtype_shows(monkeypatch, fake_cuda):
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: True)    # no autocast
    with pytest.warns(UserWarning, match="autocast"):
        assert loss_on_cuda("SiT", fake_cuda)[2] == {("cuda", torch.float32)}


# ----------------------------------------------------------------------------------------------------------------------
# Counter-based random numbers

def mix(x):
    """splitmix64's finaliser [Steele, Lea, Flood 2014]."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def words(n, *key):
    state = 0
    for k in key:
        state = mix(((state ^ k % 2**64) + 0x9E3779B97F4A7C15) % 2**64)
    return [mix((state + i * 0x9E3779B97F4A7C15) % 2**64) for i in range(1, n + 1)]


def box_muller(n, *key):
    out = []
    for word in words((n + 1) // 2, *key):
        radius = math.sqrt(-2 * math.log(((word >> 32) + 0.5) / 2**32))
        angle = 2 * math.pi * (word % 2**32) / 2**32
        out += [radius * math.cos(angle), radius * math.sin(angle)]
    return out[:n]


def test_uniform_is_splitmix64():
    assert words(3) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]    # published, of seed 0
    assert (uniform(3) * 2**24).tolist() == [0xE220A8, 0x6E789E, 0x06C45D]
    assert (uniform(4, 0, 1) * 2**24).tolist() == [4515257, 10958882, 9700275, 8511629]
    for key in ((0,), (5, 1), (1, 5), (-3,), (2**62 + 1, 10**12, 7)):
        u = uniform(50, *key)
        assert u.dtype == torch.float32 and (u * 2**24).tolist() == [word >> 40 for word in words(50, *key)]
    index = torch.tensor([5, 0, 10**12, 7, -1])                                 # a tensor keys each row
    for key in ((11, index, 1), (index, 3), (2, index, index.flip(0))):
        rows = zip(*(k.tolist() if torch.is_tensor(k) else [k] * 5 for k in key))
        assert (uniform(5, *key) * 2**24).tolist() == [words(1, *row)[0] >> 40 for row in rows]


def test_gaussian_is_box_muller_of_splitmix64():
    assert gaussian((2, 3), 0, dtype=torch.float64).flatten().tolist() == pytest.approx(
        [-0.2920317057478688, 0.8767916882996422, 0.8077852538348415,
         1.3699199857970934, -0.14607858311685412, -0.9063021422761134], abs=1e-12)   # changed: so is every resumed run
    index = torch.tensor([5, 0, 10**12, -7])
    for n in (1, 2, 3, 12):                                                     # per image
        for key in ((11, index, 1), (index,), (2, index, index.flip(0))):
            rows = zip(*(k.tolist() if torch.is_tensor(k) else [k] * 4 for k in key))
            wanted = torch.tensor([box_muller(n, *row) for row in rows], dtype=torch.float64)
            assert torch.allclose(gaussian((4, n), *key, dtype=torch.float64), wanted, rtol=1e-12, atol=1e-12)
            x = gaussian((4, n), *key)
            assert x.dtype == torch.float32 and torch.allclose(x.double(), wanted, atol=1e-5)
            assert torch.equal(gaussian((4, n), *key, dtype=torch.bfloat16), x.to(torch.bfloat16))    # rounded last
        for key in ((3,), (4, 2**40)):                                          # ints alone: the rows go on
            run = box_muller(2 * 3 * ((n + 1) // 2), *key)
            wanted = torch.tensor(run, dtype=torch.float64).view(3, -1)[:, :n]
            assert torch.allclose(gaussian((3, n), *key, dtype=torch.float64), wanted, rtol=1e-12, atol=1e-12)
    whole = gaussian((4, 3, 2, 2), 11, index, 1)
    assert torch.equal(whole.flatten(1), gaussian((4, 12), 11, index, 1))
    assert torch.equal(whole[:, :1], gaussian((4, 1, 2, 2), 11, index, 1))      # fewer channels: a prefix


def test_moments_of_large_draws():
    n = 400_000
    x = gaussian((n,), 0, 1)
    y = gaussian((n,), 0, 2)                                                    # a neighbouring key
    rows = gaussian((2000, 200), 7, torch.arange(2000))                         # a key per row
    for s in (x, y, rows.flatten()):
        assert abs(s.mean()) < 5 / n**0.5 and abs(s.var() - 1) < 5 * (2 / n) ** 0.5
        assert abs((s**3).mean()) < 5 * (15 / n) ** 0.5 and abs((s**4).mean() - 3) < 5 * (96 / n) ** 0.5
        assert s.isfinite().all() and 4.2 < s.abs().max() < 6.8
        assert abs((s[1:] * s[:-1]).mean()) < 5 / n**0.5                        # neighbours (Box-Muller pairs too)
        assert abs(((s[1:] ** 2 - 1) * (s[:-1] ** 2 - 1)).mean()) < 5 * 2 / n**0.5
    assert abs((x * y).mean()) < 5 / n**0.5 and abs((rows[1:] * rows[:-1]).mean()) < 5 / n**0.5
    for u in (uniform(n, 3, 4), uniform(n, 3, torch.arange(n))):
        assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
        assert torch.histc(u, 20, 0, 1).sub(n / 20).abs().max() < 5 * (n / 20) ** 0.5


# ----------------------------------------------------------------------------------------------------------------------
# from_pretrained

def save(net, path, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(net.state_dict(), path)
    else:
        torch.save({**more, "model": net.state_dict()} if more else net.state_dict(), path)
    return path


def same(a, b):
    return a.config == b.config and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def shifted(net):
    """Another network of the same settings."""
    other = build(**net.config)
    other.load_state_dict({k: v + 1 for k, v in net.state_dict().items()})
    return other


def test_our_checkpoint_file_and_folder(tmp_path):
    ema = tiny("USiT", c=8, size=(4, 6))
    net, kept = shifted(ema), {"step": 7, "scale": 0.5, "ae": "out/ae", "image_size": 32, "classes": ["a"]}
    file = {"kind": "diffusion", "config": ema.config, "model": net.state_dict(), "ema": ema.state_dict(), **kept,
            "optimizer": {}}
    torch.save(file, tmp_path / "ckpt.pt")
    torch.save({}, tmp_path / "best.pt")                                        # other files do not matter
    for x in (tmp_path, tmp_path / "ckpt.pt", str(tmp_path)):                   # the average, not the raw weights
        got = from_pretrained(x)
        assert same(got, ema) and not got.training and all(p.requires_grad for p in got.parameters())
        assert got.info == kept
    assert same(from_pretrained(tmp_path, name="USiT"), ema)
    assert from_pretrained(tmp_path, heads=4).config == {**ema.config, "heads": 4}
    for name in ("DiT", "UViT", "USiT-H"):
        with pytest.raises(ValueError, match=f"holds a USiT, not the {name}"):
            from_pretrained(tmp_path, name=name)
    torch.save({**file, "ema": None}, tmp_path / "ckpt.pt")                     # --ema 0: there is no average
    assert same(from_pretrained(tmp_path), net)
    named = build("SiT-T", c=8, size=4, num_classes=3)
    torch.save({"kind": "diffusion", "config": named.config, "model": named.state_dict()}, tmp_path / "ckpt.pt")
    assert same(from_pretrained(tmp_path, name="SiT"), named) and same(from_pretrained(tmp_path, name="SiT-T"), named)


F32, F64, NEW, NEW2, SD = (dict(ae=ae, scale=scale) for ae, scale in [
    ("mit-han-lab/dc-ae-f32c32-in-1.0", 0.3189), ("mit-han-lab/dc-ae-f64c128-in-1.0", 0.2889),
    ("dc-ai/dc-ae-f64c128-1.5", 0.5935), ("dc-ai/dc-ae-1.5-f64c128", 0.5935), ("stabilityai/sd-vae-ft-ema", 0.18215)])


@pytest.mark.parametrize("name, family, info", [
    ("mit-han-lab/dc-ae-f32c32-in-1.0-dit-xl-in-512px/model.safetensors", "DiT", dict(F32, image_size=512)),
    ("mit-han-lab/dc-ae-f32c32-in-1.0-dit-xl-in-512px-trainbs1024/model.pt", "DiT", dict(F32, image_size=512)),
    ("mit-han-lab/dc-ae-f32c32-in-1.0-sit-xl-in-256px/model.pth", "SiT", dict(F32, image_size=256)),
    ("mit-han-lab/dc-ae-f32c32-in-1.0-uvit-s-in-512px/model.safetensors", "UViT", dict(F32, image_size=512)),
    ("mit-han-lab/dc-ae-f32c32-in-1.0-usit-2b-in-512px/weights.pt", "USiT", dict(F32, image_size=512)),
    ("mit-han-lab/dc-ae-f64c128-in-1.0-uvit-h-in-512px-train2000k/model.pt", "UViT", dict(F64, image_size=512)),
    ("dc-ai/dc-ae-f64c128-1.5-usit-3b-in-512px/model.safetensors", "USiT", dict(NEW, image_size=512)),
    ("dc-ai/dc-ae-1.5-f64c128-usit-2b-in-512px/model.pt", "USiT", dict(NEW2, image_size=512)),  # later names
    ("dc-ai/dc-ae-f32c128-1.5-usit-h-in-256px/model.pt", "USiT", dict(image_size=256)),       # no published scale
    ("files/DiT-XL-2-256x256.pt", "DiT", dict(SD, image_size=256)),
    ("files/dit-xl-2-512x512.pt", "DiT", dict(SD, image_size=512)),
    ("files/SiT-B-4-256x256.pt", "SiT", dict(SD, image_size=256)),
    ("files/imagenet256_uvit_huge.pth", "UViT", dict(SD, image_size=256)),
    ("files/imagenet512_uvit_large.pth", "UViT", dict(SD, image_size=512)), ("files/mine.pt", "DiT", {})])
def test_published_names_tell_family_autoencoder_scale_and_size(tmp_path, name, family, info):
    net, file = tiny(family), tmp_path / name
    save(net, file)
    for x in (file, file.parent, str(file)):                                    # each folder holds one file
        got = from_pretrained(x, heads=2)
        assert same(got, net) and got.family == family and got.info == info and not got.training


def test_family_from_tensors_or_name(tmp_path):
    for patch, family in [(1, "DiT"), (2, "SiT"), (1, "UViT"), (2, "USiT")]:
        net = tiny(family, patch=patch)
        file = save(net, tmp_path / f"{family}.pt", step=3)                     # nested under "model"
        assert same(from_pretrained(file, name=family, heads=2), net)
        assert from_pretrained(file, name=family + "-S", heads=2).family == family
    assert from_pretrained(tmp_path / "DiT.pt", heads=2).family == "DiT"
    assert from_pretrained(tmp_path / "SiT.pt", heads=2).family == "SiT"
    save(tiny("DiT", hidden=144), tmp_path / "short.pt")                        # DiT-T's width, but not its depth
    for x, kw, word in [("USiT.pt", dict(heads=2), 'name="UViT" or name="USiT"'), ("short.pt", {}, "say heads="),
                        ("USiT.pt", dict(name="USiT"), "say heads="),
                        ("UViT.pt", dict(name="DiT", heads=2), "not of the DiT"),
                        ("SiT.pt", dict(name="DiT", heads=2), "not of the DiT")]:
        with pytest.raises(ValueError, match=word) as e:
            from_pretrained(tmp_path / x, **kw)
        assert len(str(e.value).replace(str(tmp_path), "")) < 200 and "\n" not in str(e.value)
    file = save(tiny("UViT"), tmp_path / "imagenet256_uvit_huge.pth")           # what is said wins over the file's name
    assert from_pretrained(file, name="USiT", heads=2).family == "USiT"
    for name in ("UViT-T", "DiT-T"):                                            # a preset's width tells heads
        net = build(name, c=4, size=4, num_classes=3)
        assert same(from_pretrained(save(net, tmp_path / "t.pt"), name=name.split("-")[0]), net)
    wide = tiny("DiT", size=(2, 4))
    with pytest.raises(ValueError, match="8 tokens are not a square"):
        from_pretrained(save(wide, tmp_path / "wide.pt"), heads=2)
    assert same(from_pretrained(tmp_path / "wide.pt", heads=2, size=(2, 4)), wide)


def test_original_files_average_wrappers_and_dtypes(tmp_path):
    """DiT's and SiT's files carry their arguments, and both the raw weights and their average."""
    ema = tiny("DiT")
    raw = shifted(ema).state_dict()
    for file in (dict(model=raw, ema=ema.state_dict(), opt={}, args=argparse.Namespace(lr=1e-4)),
                 dict(state_dict=ema.state_dict())):
        torch.save(file, tmp_path / "DiT-XL-2-256x256.pt")
        assert same(from_pretrained(tmp_path / "DiT-XL-2-256x256.pt", heads=2), ema)
    torch.save(ema.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)   # as before PyTorch 1.6
    assert same(from_pretrained(tmp_path / "old.pt", heads=2), ema)
    half = {k: v.to(torch.bfloat16) for k, v in ema.state_dict().items()}
    torch.save(half, tmp_path / "half.pt")
    got = from_pretrained(tmp_path / "half.pt", heads=2).state_dict()
    assert all(v.dtype == torch.float32 and torch.equal(v, half[k].float()) for k, v in got.items())


def test_original_sit_has_unused_variances(tmp_path):
    with_sigma, plain = tiny("DiT", patch=2), tiny("SiT", patch=2)
    file = save(with_sigma, tmp_path / "SiT-XL-2-256x256.pt")
    got, t, y = from_pretrained(file, heads=2), torch.tensor([0.3, 0.8]), torch.tensor([1, 2])
    z = torch.randn(2, 8, 4, 4)
    assert got.family == "SiT" and [p.shape for p in got.parameters()] == [p.shape for p in plain.parameters()]
    assert torch.allclose(got(z, t, y), with_sigma(z, t, y)[:, :8], atol=1e-6)


def test_original_uvit_names(tmp_path):
    net = tiny("UViT", patch=2)
    state = net.state_dict()
    state["label_emb.weight"] = state.pop("label_emb.embedding_table.weight")
    torch.save(state, tmp_path / "imagenet256_uvit_huge.pth")
    assert same(from_pretrained(tmp_path / "imagenet256_uvit_huge.pth", heads=2), net)
    torch.save({**state, "final_layer.weight": torch.zeros(8, 8, 3, 3)}, tmp_path / "conv.pth")
    with pytest.raises(ValueError, match="3x3 convolution"):
        from_pretrained(tmp_path / "conv.pth", name="UViT", heads=2)


def test_a_hub_name_is_downloaded_where_there_is_no_such_path(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    net, name, asked = tiny("USiT"), "mit-han-lab/dc-ae-f32c32-in-1.0-usit-h-in-512px", []
    file = save(net, tmp_path / "blobs" / "model.safetensors")

    def download(name, allow_patterns, local_files_only):
        asked.append((name, local_files_only))
        return str(file.parent)

    monkeypatch.setattr(hub, "snapshot_download", download)
    got = from_pretrained(name, heads=2)
    assert same(got, net) and got.info == dict(F32, image_size=512) and asked == [(name, False)]
    for size in ("2b", "3b"):                                                   # the newest names
        got = from_pretrained(f"dc-ai/dc-ae-1.5-f64c128-usit-{size}-in-512px", heads=2)
        assert same(got, net) and got.info == dict(ae="dc-ai/dc-ae-1.5-f64c128", scale=0.5935, image_size=512)

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match="no download; put the files of https://huggingface.co/mit-han-lab"):
        from_pretrained(name, heads=2)
    with pytest.raises(ValueError, match="no such checkpoint"):
        from_pretrained("somebody/something")
    monkeypatch.chdir(tmp_path)
    save(net, Path(name) / "model.safetensors")                                 # a folder of that name needs no hub
    (Path(name) / "extra.safetensors").write_bytes(b"")
    torch.save({}, Path(name) / "extra.pt")
    assert same(from_pretrained(name, heads=2), net)


def test_names_behind_the_prefixes_of_ddp_and_compile(tmp_path):
    net = tiny("USiT")
    ours = dict(kind="diffusion", config=net.config)
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        state = {prefix + k: v for k, v in net.state_dict().items()}
        torch.save({**ours, "ema": state}, tmp_path / "ckpt.pt")
        torch.save(state, tmp_path / "uvit.pt")
        assert same(from_pretrained(tmp_path / "ckpt.pt"), net)
        assert same(from_pretrained(tmp_path / "uvit.pt", name="USiT", heads=2), net)
    state = {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in net.state_dict().items()}    # block by block
    torch.save({**ours, "model": state}, tmp_path / "ckpt.pt")
    assert any("_orig_mod" in k for k in state) and same(from_pretrained(tmp_path), net)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    net = tiny("USiT")
    file = dict(kind="diffusion", config=net.config, model=net.state_dict())
    torch.save({**file, "step": 3}, tmp_path / "ckpt_prev.pt")
    for damaged in (b"", b"no zip"):
        (tmp_path / "ckpt.pt").write_bytes(damaged)
        for x in (tmp_path, tmp_path / "ckpt.pt"):
            got = from_pretrained(x)
            assert same(got, net) and got.info["step"] == 3
            line = capsys.readouterr().err
            assert "ckpt.pt" in line and "ckpt_prev.pt" in line and line.count("\n") == 1
    (tmp_path / "ckpt.pt").unlink()
    assert same(from_pretrained(tmp_path), net)                                 # killed between two renames


class Payload:
    """What a pickle can do: run a command when it is read."""
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def strange():
    """Entries that a stranger may have put into a checkpoint of ours, in the place of the right ones."""
    net = tiny("USiT")
    config, state = net.config, net.state_dict()
    first = next(iter(state))
    cases = dict(
        no_config=dict(config=None), list_config=dict(config=[1, 2]), no_model=dict(model=None),
        list_model=dict(model=[1, 2]), empty_model=dict(model={}), number_kind=dict(kind=7), dict_kind=dict(kind=state),
        unknown=dict(config={**config, "flavour": 1}), number_key=dict(config={**config, 3: 1}),
        scale=dict(scale=math.nan), scale_0=dict(scale=0.0), scale_text=dict(scale="wide"),
        ae=dict(ae=7), classes=dict(classes=5), image_size=dict(image_size="32"), step=dict(step=None, ae_hash=3))
    for key in config:
        cases[f"no_{key}"] = dict(config={k: v for k, v in config.items() if k != key})
        cases[f"{key}_list"] = dict(config={**config, key: [1, 2, 3]})
        cases[f"{key}_huge"] = dict(config={**config, key: 10**7})
    pib = 2**50
    claims = dict(expanded=torch.zeros(1).expand(pib), sparse=torch.sparse_coo_tensor([[0]], [0.0], (pib,)),
                  meta=torch.empty(pib, device="meta"), number=3, text="x", none=None, dataless=state[first].to("meta"))
    for name, claim in claims.items():
        cases[f"tensor_{name}"] = dict(model={**state, first: claim})
        wide = {k: claim.view(1, -1, 1) if name == "expanded" and k == "pos_embed" else v for k, v in state.items()}
        cases[f"pos_embed_{name}"] = dict(model={**wide, "3": claim})
    return net, cases


@pytest.mark.filterwarnings("ignore")
def test_whatever_a_strangers_checkpoint_holds_is_one_line(tmp_path):
    net, cases = strange()
    cases = {k: v for k, v in cases.items() if k not in ("no_num_classes", "no_patch")}     # these have defaults
    for name, entries in cases.items():
        file = dict(kind="diffusion", config=net.config, model=net.state_dict(), scale=1.0)
        torch.save({**file, **entries}, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=f"{name}.pt") as e:
            from_pretrained(tmp_path / f"{name}.pt")
        assert isinstance(e.value, SystemExit), name
        assert len(str(e.value)) < 200 and "\n" not in str(e.value), name
    state = net.state_dict()
    for key in ("pos_embed", "patch_embed.proj.weight", "label_emb.embedding_table.weight", "decoder_pred.weight"):
        for value in (5, *map(torch.zeros, ((), 3, (0, 0, 0, 0))), torch.zeros(1).expand(2**40, 2, 2, 2)):
            torch.save({**state, key: value}, tmp_path / "published.pt")
            with pytest.raises(ValueError, match="published.pt") as e:
                from_pretrained(tmp_path / "published.pt", name="USiT", heads=2)
            assert isinstance(e.value, SystemExit) and len(str(e.value)) < 200 and "\n" not in str(e.value), key


def test_no_file_runs_code(tmp_path):
    marker = tmp_path / "ran"
    payload = Payload(marker)
    net = tiny("DiT")
    ours = dict(kind="diffusion", config=net.config, model=net.state_dict())
    for name, content in dict(bare=payload, config={**ours, "config": payload}, entry={**ours, "note": payload},
                              published={**net.state_dict(), "blocks": payload}).items():
        for old in (False, True):                                               # the two formats of torch.save
            torch.save(content, tmp_path / f"{name}.pt", _use_new_zipfile_serialization=not old)
            with pytest.raises(ValueError, match=f"{name}.pt"):
                from_pretrained(tmp_path / f"{name}.pt", heads=2)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(payload))
    with pytest.raises(ValueError, match="safetensors"):
        from_pretrained(tmp_path / "model.safetensors")
    assert not marker.exists()
    pickle.loads(pickle.dumps(payload))
    assert marker.exists()                                                      # the payload itself works


def test_bad_files_are_one_line(tmp_path, monkeypatch):
    whole = save(tiny("DiT"), tmp_path / "a" / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00")
    torch.save({"kind": "ae"}, tmp_path / "ae.pt")
    torch.save({"conv.weight": torch.zeros(2, 2)}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": types.SimpleNamespace()}, tmp_path / "pickled.pt")     # a file may not run code
    state = tiny("DiT").state_dict()
    torch.save({**state, "extra": torch.zeros(1)}, tmp_path / "extra.pt")
    torch.save({k: v for k, v in state.items() if k != "blocks.1.attn.proj.bias"}, tmp_path / "less.pt")
    (tmp_path / "empty").mkdir()
    for x, word in [("cut.pt", "truncated"), ("cut.safetensors", "truncated"), ("ae.pt", "kind 'ae'"),
                    ("foreign.pt", "missing"), ("list.pt", "a list"), ("pickled.pt", "plain tensors"),
                    ("extra.pt", r"extra is \(1,\), wanted none"),
                    ("less.pt", "blocks.1.attn.proj.bias is missing"), ("empty", "no ckpt.pt"),
                    ("nowhere", "no such checkpoint")]:
        with pytest.raises(ValueError, match=word) as e:
            from_pretrained(tmp_path / x, heads=2)
        assert isinstance(e.value, SystemExit) and "\n" not in str(e.value), x
        assert len(str(e.value).replace(str(tmp_path), "")) < 200, x
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        from_pretrained(tmp_path / "cut.safetensors")
