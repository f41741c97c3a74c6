"""python -m pytest tests/test_ae.py        (CPU, no downloads, under a minute)"""
import atexit
import errno
import hashlib
import io
import json
import math
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
import zlib
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ae as A
from ae import (DCAE, AEConfig, InputError, center_crop, channel_mask, open_images, parse_channels, read_checkpoint,
                read_image, to_uint8)

TINY = dict(encoder_depths=(0, 1, 1, 1, 1), decoder_depths=(0, 1, 1, 1, 1))


def picture(data, index, key):
    """The picture of this index under the augmentation of this key."""
    return data.get_batch([index], [key])[0][0]


def shake(ae, seed=0):
    """Random weights that leave no branch at zero."""
    torch.manual_seed(seed)
    for name, t in ae.state_dict().items():
        if t.is_floating_point():
            t.copy_(torch.randn(t.shape) / math.sqrt(t[0].numel()) if t.dim() > 1 else 0.1 * torch.randn(t.shape))
            if name.endswith(("norm.weight", "running_var")):
                t.abs_().add_(1)
    return ae.eval()


def tiny(version="1.5", c=8, seed=0, **more):
    """f16, 1.5 M parameters."""
    return shake(DCAE(AEConfig(f=16, c=c, version=version, width=16, **{**TINY, **more})), seed)


def small(version="1.5", seed=0):
    """f4, 20,000 parameters, for what only moves files about."""
    config = AEConfig(f=4, c=4, version=version, width=4, encoder_depths=(0, 1, 1), decoder_depths=(0, 2, 1))
    return shake(DCAE(config), seed)


# The published tensor names, written out; their hashes below are those of DC-Gen's own lists.
ENDS = {
    "encoder.project_in.conv": "encoder.project_in.conv.conv",
    "encoder.project_out": "encoder.project_out.op_list.0.conv",
    "decoder.project_in": "decoder.project_in.conv",
    "decoder.project_out.norm": "decoder.project_out.op_list.0",
    "decoder.project_out.up.conv": "decoder.project_out.op_list.2.conv.conv",
}
BLOCKS = {
    "conv": "main.conv.conv",
    "conv1": "main.conv1.conv",
    "conv2": "main.conv2.conv",
    "norm": "main.conv2.norm",
    "attn.qkv": "context_module.main.qkv.conv",
    "attn.proj": "context_module.main.proj.conv",
    "attn.norm": "context_module.main.proj.norm",
    "mlp.inverted": "local_module.main.inverted_conv.conv",
    "mlp.depth": "local_module.main.depth_conv.conv",
    "mlp.point": "local_module.main.point_conv.conv",
    "mlp.norm": "local_module.main.point_conv.norm",
}


def official(state, version):
    """Our names -> published names; 1.0 wraps its two latent projections in .main because of their shortcuts."""
    out = {}
    for name, t in state.items():
        stem, leaf = name.rsplit(".", 1)
        if stem in ENDS:
            new = ENDS[stem]
            if version == "1.0" and stem in ("encoder.project_out", "decoder.project_in"):
                new = new.replace(stem, stem + ".main")
        else:
            side, _, stage, block, part = stem.split(".", 4)
            new = f"{side}.stages.{stage}.op_list.{block}.{BLOCKS[part]}"
        out[f"{new}.{leaf}"] = t
    return out


def save_ours(ae, path, **more):
    torch.save({"kind": "ae", "config": asdict(ae.config), "model": ae.state_dict(), "scale": 0.5, "image_size": 32,
                "step": 7, "channels": [4, 8], **more}, path)


def same_tensors(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def one_line(call, *words, folder="no folder"):
    """The call fails with one line that holds the words; under 200 characters, not counting the test's own folder."""
    with pytest.raises(InputError) as e:
        call()
    text = str(e.value)
    assert all(word in text for word in words), text
    assert "\n" not in text and len(text.replace(str(folder), "")) < 200, text


# --------------------------------------------------------------------------------------------------------------------
# Structure: facts of the published models (DC-Gen @cae2205, facts/ae_models.json, their tensor lists hashed)

W32 = (128, 256, 512, 512, 1024, 1024)
# f, c, version, widths, encoder and decoder depths, parameters; official and diffusers tensors: number, hash
PUBLISHED = [
    (32, 32, "1.0", W32, (0, 4, 8, 2, 2, 2), (0, 5, 10, 2, 2, 2), 323356460,
     338, "6a85fb48c5c4741c", 362, "cee2c5d7f2730330"),
    (64, 128, "1.0", (*W32, 2048), (0, 4, 8, 2, 2, 2, 2), (0, 5, 10, 2, 2, 2, 2), 676896140,
     386, "df87969a63eabeb1", 418, "0409824763060178"),
    (128, 512, "1.0", (*W32, 2048, 2048), (0, 4, 8, 2, 2, 2, 2, 2), (0, 5, 10, 2, 2, 2, 2, 2), 1120682252,
     434, "fe7f929176f36236", 474, "7ca1c14eef0a730f"),
    (32, 128, "1.5", W32, (0, 5, 10, 4, 4, 4), (0, 5, 10, 4, 4, 4), 523609740,
     296, "f269541da2444362", 296, "6547e83be94f3f40"),
    (64, 128, "1.5", (*W32, 1024), (0, 5, 10, 4, 4, 4, 4), (0, 5, 10, 4, 4, 4, 4), 714741644,
     340, "4c1361c9a78d145c", 340, "ec385284a63ddff7"),
]


def name_hash(state):
    lines = sorted(f"{name} {list(t.shape)}" for name, t in state.items())
    return len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@pytest.mark.parametrize("f, c, version, widths, encoder, decoder, params, n_off, hash_off, n_dif, hash_dif", PUBLISHED,
                         ids=[f"f{row[0]}c{row[1]}-{row[2]}" for row in PUBLISHED])
def test_published_models_exactly(f, c, version, widths, encoder, decoder, params, n_off, hash_off, n_dif, hash_dif,
                                  tmp_path, monkeypatch):
    config = AEConfig(f=f, c=c, version=version)
    assert config.encoder_widths == config.decoder_widths == widths
    assert config.encoder_depths == encoder and config.decoder_depths == decoder
    with torch.device("meta"):
        ae = DCAE(config)
    assert sum(p.numel() for p in ae.parameters()) == params
    published = official(ae.state_dict(), version)
    assert name_hash(published) == (n_off, hash_off)

    assert A.read_published(published, tmp_path / "published.bin")[0] == config     # read off names and shapes

    st, written = pytest.importorskip("safetensors.torch"), {}
    monkeypatch.setattr(st, "save_file", lambda tensors, path: written.update(tensors))
    ae.save_pretrained(tmp_path)
    assert name_hash(written) == (n_dif, hash_dif)
    meta, low = json.loads((tmp_path / "config.json").read_text()), 3 if version == "1.0" else 0
    assert meta["decoder_norm_types"] == ["batch_norm"] * low + ["rms_norm"] * (len(widths) - low)
    assert meta["decoder_act_fns"] == ["relu"] * low + ["silu"] * (len(widths) - low)


def test_the_default_is_f32c128_1_5_and_larger_f_repeats_the_last_stage():
    assert asdict(AEConfig()) == dict(
        f=32, c=128, version="1.5", width=128, shortcuts=True, in_channels=3,
        encoder_widths=W32, encoder_depths=(0, 5, 10, 4, 4, 4), decoder_widths=W32, decoder_depths=(0, 5, 10, 4, 4, 4))
    assert AEConfig(f=128).decoder_widths == (*W32, 1024, 1024) and AEConfig(f=128).encoder_depths[5:] == (4, 4, 4)
    assert AEConfig(f=256, version="1.0").encoder_widths == (*W32, 2048, 2048, 2048)
    assert AEConfig(f=8, width=12).encoder_widths == (12, 24, 48, 48)
    with torch.device("meta"):
        assert DCAE().config == AEConfig()


@torch.no_grad()
def test_any_power_of_two_any_c_any_width():
    for f, c, version, width in ((4, 1, "1.5", 4), (8, 5, "1.5", 6), (4, 4, "1.0", 8), (8, 4, "1.0", 8),
                                 (128, 16, "1.0", 8)):
        ae = DCAE(AEConfig(f=f, c=c, version=version, width=width, encoder_depths=(0,) + (1,) * int(math.log2(f))))
        assert ae.encode(torch.zeros(1, 3, f, 2 * f)).shape == (1, c, 1, 2)
        assert ae.decode(torch.zeros(1, c, 1, 2)).shape == (1, 3, f, 2 * f)
    with torch.device("meta"):                                          # sizes can be counted without memory
        ae = DCAE(AEConfig(f=16, c=1000, version="1.0", width=32, shortcuts=False))
        assert ae(torch.empty(1, 3, 16, 16)).shape == (1, 3, 16, 16)


# --------------------------------------------------------------------------------------------------------------------
# Golden numbers: outputs of the authors' code on sine weights and sine images in float64 (facts/golden.json, DC-Gen
# @cae2205): mean, std, sum of out_i * sin(i / 10), out_0, out_1, out_last of encode(image), decode(encode(image)),
# decode(latent_probe)

W6 = dict(encoder_widths=(16, 32, 64, 64, 128, 128), decoder_widths=(16, 32, 64, 64, 128, 128),
          encoder_depths=(0, 1, 2, 1, 1, 1), decoder_depths=(0, 2, 1, 1, 1, 1))
W5 = dict(encoder_widths=(16, 32, 64, 64, 64), decoder_widths=(16, 32, 64, 64, 64), **TINY)
GOLDEN = {
    "1.0 six stages": (AEConfig(f=32, c=16, version="1.0", **W6), 2732924, (
        (-0.09579547528, 0.7592925116, 12.94459862, -0.2476867829, -0.3166351365, 0.2042704494),
        (-0.2553117487, 0.6396322056, -254.4069047, 0.5223399309, 0.3858774742, -0.1942564767),
        (-0.0406587945, 0.6219304404, 72.9597603, 0.3251398657, 0.2646051464, 0.007563998125))),
    "1.0 five stages": (AEConfig(f=16, c=8, version="1.0", **W5), 876004, (
        (0.1132456334, 0.711363056, 17.24585627, -0.3063423572, 1.060078213, -0.2952190017),
        (-0.3823504508, 0.8967692838, 386.4254744, 0.5166614172, 0.4324622056, -0.3194407209),
        (-0.1862030408, 1.031167811, 1306.023603, 0.4405857744, 0.3702769251, -0.070749665))),
    "1.5": (AEConfig(f=32, c=16, **W6), 2823420, (
        (0.006497224907, 0.2720274317, 4.169687699, 0.2501063361, 0.2023475512, 0.1380615097),
        (0.1372124491, 0.2746744799, 105.0932216, 0.04182389634, 0.09319471142, -0.0001173498038),
        (0.06862326727, 0.2457549543, 184.5660156, 0.1386913378, 0.1396076493, -0.04899384827))),
}
GOLDEN_SLICES = {   # of the 1.5 entry: encode(image, latent_channels=c'), decode of it, decode(latent_probe[:, :c'])
    4: ((0.06590303129, 0.2664530757, 0.03444141466, 0.2501063361, 0.2023475512, 0.03517689761),
        (0.1106318316, 0.2456924687, 3.754806585, 0.07147623826, 0.1066043698, -0.1505205803),
        (0.006117153037, 0.2385283007, 38.1988993, 0.01595432999, 0.03348979622, 0.08059187283)),
    12: ((0.01560474704, 0.2697960318, 0.486516474, 0.2501063361, 0.2023475512, -0.5014742125),
         (0.09256522797, 0.2409375406, -55.913076, 0.08805032992, 0.1120978649, -0.1209565015),
         (0.002133845048, 0.2395605193, 190.0586474, -0.0002928338499, -0.03577230454, -0.1489594579)),
}


def waves(shape, b, c, h, w, k):
    index = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")
    return torch.sin(k * sum(i * m for i, m in zip(index, (b, c, h, w))))


def golden_model(config):
    ae = DCAE(config).double().eval()
    state = official(ae.state_dict(), config.version)
    for k, name in enumerate(sorted(state)):
        t = state[name]
        s = torch.sin(0.37 * torch.arange(t.numel(), dtype=torch.float64) + 1.1 * k).view(t.shape)
        if name.endswith("num_batches_tracked"):
            t.zero_()
        elif t.dim() > 1:
            t.copy_(s / math.sqrt(t[0].numel()))
        elif name.endswith("running_var"):
            t.copy_(1 + 0.1 * s ** 2)
        else:
            t.copy_(1 + 0.1 * s if name.endswith(".weight") else 0.05 * s)
    return ae


def agree(x, want):
    flat = x.flatten()
    wave = torch.sin(0.1 * torch.arange(len(flat), dtype=torch.float64))
    got = [flat.mean(), flat.std(unbiased=False), (flat * wave).sum(), flat[0], flat[1], flat[-1]]
    for a, b in zip(map(float, got), want):
        assert abs(a - b) < 1e-8 * max(1, abs(b)), (got, want)


@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_golden(name):
    config, params, want = GOLDEN[name]
    ae = golden_model(config)
    assert sum(p.numel() for p in ae.parameters()) == params
    image = waves((2, 3, 64, 64), 7919, 104729, 31, 17, 0.01)
    probe = waves((2, config.c, 64 // config.f, 64 // config.f), 101, 37, 11, 3, 0.1)
    z = ae.encode(image)
    for x, numbers in zip((z, ae.decode(z), ae.decode(probe)), want):
        agree(x, numbers)
    if name == "1.5":
        for c_prime, want in GOLDEN_SLICES.items():
            agree(z[:, :c_prime], want[0])
            agree(ae(image, c_prime=c_prime), want[1])                  # Eq. 1 is the published slicing
            agree(ae.decode(probe[:, :c_prime]), want[2])               # and absent channels count as zeros


# --------------------------------------------------------------------------------------------------------------------
# The mask, and the fresh network

@pytest.mark.parametrize("version", ["1.0", "1.5"])
@torch.no_grad()
def test_mask_is_slice(version):
    ae, img = tiny(version), torch.randn(2, 3, 32, 64)
    z = ae.encode(img)
    for k in (1, 3, 8):
        zeroed = z.clone()
        zeroed[:, k:] = 0
        want = ae.decode(zeroed)
        assert torch.equal(ae(img, c_prime=k), want) and torch.equal(ae.decode(z[:, :k]), want)
    assert torch.equal(ae(img), ae.decode(z)) and not torch.equal(ae(img, c_prime=3), ae(img))
    if version == "1.5":                                                # and slicing the weights says the same
        w, b = ae.decoder.project_in.weight, ae.decoder.project_in.bias
        masked = ae.decoder.project_in(z * channel_mask(8, 3))
        torch.testing.assert_close(F.conv2d(z[:, :3], w[:, :3], b, padding=1), masked)
        assert ae.bfloat16()(img.bfloat16(), c_prime=3).dtype == torch.bfloat16  # the mask follows the latent's dtype


def test_mask_keeps_the_first_of_1_to_c():
    for k, want in ((1, [1, 0, 0, 0]), (3, [1, 1, 1, 0]), (4, [1, 1, 1, 1])):
        mask = channel_mask(4, k)
        assert mask.flatten().tolist() == want and mask.shape == (1, 4, 1, 1) and mask.dtype == torch.float32
    assert channel_mask(4, 2, "meta").is_meta
    for k in (0, 5, -1):
        one_line(lambda: channel_mask(4, k), f"c_prime={k}")


def test_masked_channels_get_no_gradient():
    ae = tiny()
    ae(torch.randn(1, 3, 32, 32), c_prime=3).square().mean().backward()
    assert ae.encoder.project_out.weight.grad[3:].abs().max() == 0 < ae.encoder.project_out.weight.grad[:3].abs().max()
    assert ae.decoder.project_in.weight.grad[:, 3:].abs().max() == 0


def test_fresh_blocks_are_the_identity_and_all_parameters_learn():
    for version in ("1.0", "1.5"):
        for shortcuts in (True, False):
            torch.manual_seed(0)
            ae = DCAE(AEConfig(f=16, c=8, version=version, width=16, shortcuts=shortcuts, **TINY))
            torch.manual_seed(0)                                        # all else is as PyTorch starts it
            assert torch.equal(ae.encoder.project_in.conv.weight, torch.nn.Conv2d(3, 8, 3).weight)
            x = torch.randn(2, ae.config.encoder_widths[3], 4, 4)
            assert torch.equal(ae.encoder.stages[3][0](x), x)
            for name, p in ae.named_parameters():
                if "norm." in name:
                    assert (p == (1 if name == "decoder.project_out.norm.weight" else 0)).all(), name
            opt = torch.optim.SGD(ae.parameters(), 0.1)
            for _ in range(2):
                opt.zero_grad()
                (ae(torch.rand(2, 3, 32, 32)) - 1).abs().mean().backward()
                opt.step()
            assert all(p.grad.abs().sum() > 0 for p in ae.parameters())
    assert ae.scale == 1 and ae.info == {} and ae.training
    norm = DCAE(AEConfig(f=4, c=4, version="1.0", width=8)).decoder.stages[1][1].norm
    assert norm.momentum == 0.1                                         # facts/ae_models.json, norm bn2d


@torch.no_grad()
def test_shortcuts_switch():
    on, off = tiny("1.0"), tiny("1.0", shortcuts=False)
    off.load_state_dict(on.state_dict())                                # non-parametric: the tensors are the same
    x, y = torch.randn(1, 32, 8, 8), torch.randn(1, 64, 4, 4)
    down, up = on.encoder.stages[1][-1], on.decoder.stages[1][0]
    # by loops: output channel o averages group o of the unshuffled input; channel o before the shuffle repeats inputs
    u = F.pixel_unshuffle(x, 2)
    want = torch.stack([u[:, 2 * o:2 * o + 2].mean(1) for o in range(64)], 1)
    torch.testing.assert_close(down(x) - F.pixel_unshuffle(down.conv(x), 2), want, atol=1e-5, rtol=0)
    want = F.pixel_shuffle(torch.stack([y[:, o // 2] for o in range(128)], 1), 2)
    torch.testing.assert_close(up(y) - F.pixel_shuffle(up.conv(y), 2), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(off.encoder.stages[1][-1](x), F.pixel_unshuffle(down.conv(x), 2))
    torch.testing.assert_close(off.decoder.stages[1][0](y), F.pixel_shuffle(up.conv(y), 2))
    # around the two latent projections: 128 channels in groups of 16, one for each of the 8 of the latent
    for net, there in ((on, 1), (off, 0)):
        seen, enc, dec = {}, net.encoder, net.decoder
        enc.project_out.register_forward_hook(lambda m, x, y: seen.update(wide=x[0], z=y))
        dec.project_in.register_forward_hook(lambda m, x, y: seen.update(narrow=x[0], x=y))
        dec.stages[-1].register_forward_pre_hook(lambda m, x: seen.update(inner=x[0]))
        z = net.encode(torch.randn(1, 3, 32, 32))
        means = torch.stack([seen["wide"][:, 16 * o:16 * o + 16].mean(1) for o in range(8)], 1)
        torch.testing.assert_close(z, seen["z"] + there * means)
        net.decode(z.contiguous())
        copies = torch.stack([z[:, o // 16] for o in range(128)], 1)
        torch.testing.assert_close(seen["inner"], seen["x"] + there * copies)
        assert all(seen[k].is_contiguous(memory_format=torch.channels_last) for k in ("wide", "narrow"))  # faster so


# --------------------------------------------------------------------------------------------------------------------
# Norms and attention in low precision, against float64 written out

def rounding(dtype):
    """The largest relative error of one rounding to this type."""
    return torch.finfo(dtype).eps / 2


def test_rms_norm_is_over_channels_with_eps_1e_5_and_fp32_statistics():
    torch.manual_seed(0)
    m = A.RMSNorm(48)
    with torch.no_grad():
        m.weight.copy_(1 + torch.rand(48)), m.bias.copy_(0.1 * torch.randn(48))

    def want(x):
        x, weight, bias = (t.detach().double().numpy() for t in (x, m.weight, m.bias))
        y = x / np.sqrt((x ** 2).mean(1, keepdims=True) + 1e-5)
        return torch.from_numpy(y * weight[:, None, None] + bias[:, None, None])
    x = 3e-3 * torch.randn(2, 48, 3, 4)                                 # a mean square near eps
    torch.testing.assert_close(m(x).double(), want(x), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(m(x).double(), want(x), rtol=1e-5, atol=1e-6)
    m.bias.data.zero_()
    for dtype, size in ((torch.bfloat16, 1), (torch.float16, 2000)):    # 2000^2 is infinite in fp16
        x = (size * torch.randn(2, 48, 30, 4)).to(dtype)
        y = m(x)
        assert y.dtype == dtype
        assert ((y.double() - want(x)).abs() <= 1.001 * rounding(dtype) * want(x).abs() + 1e-7).all()


def linear_attention(qkv):
    """(B, 96 h, H, W) -> (B, 32 h, H, W) by the quadratic form: weights relu(q) . relu(k), normalised over the keys."""
    B, C, H, W = qkv.shape
    q, k, v = np.split(qkv.detach().double().numpy().reshape(B, C // 96, 96, H * W), 3, 2)  # heads of 32
    weight = np.einsum("bhcn,bhcm->bhnm", q.clip(0), k.clip(0))
    total = weight.sum(3)
    out = np.einsum("bhnm,bhcm->bhcn", weight, v) / np.where(total > 0, total, 1)[:, :, None]
    return torch.from_numpy(out.reshape(B, C // 3, H, W))


@torch.no_grad()
def test_linear_attention_sums_in_fp32_and_a_token_with_q_0_gives_0():
    torch.manual_seed(0)
    m, seen = A.LinearAttention(64), {}
    m.qkv.register_forward_hook(lambda m, x, y: seen.update(qkv=y))
    m.proj.register_forward_hook(lambda m, x, y: seen.update(out=x[0], proj=y))
    x = torch.randn(2, 64, 15, 17)
    x[:, :, 2, 3] = 0                                                   # no bias: q = k = v = 0 there
    x[:, :, 4] *= 1e-8                                                  # a small q is as good as a large one
    torch.nn.init.ones_(m.norm.weight)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = m(x)
        assert seen["qkv"].dtype == (torch.bfloat16 if autocast else torch.float32) and y.dtype == torch.float32
        torch.testing.assert_close(seen["out"].double(), linear_attention(seen["qkv"]), rtol=1e-4, atol=1e-5)
        assert (seen["out"][:, :, 2, 3] == 0).all() and y.isfinite().all()
        torch.testing.assert_close(y, x + m.norm(seen["proj"]))
    m.bfloat16()(x.bfloat16())
    want = linear_attention(seen["qkv"])
    assert seen["out"].dtype == torch.bfloat16
    assert ((seen["out"].double() - want).abs() <= 1.001 * rounding(torch.bfloat16) * want.abs() + 1e-5).all()


def test_attention_without_any_key_has_finite_gradients():
    torch.manual_seed(0)
    m = A.LinearAttention(64)
    torch.nn.init.ones_(m.norm.weight)
    with torch.no_grad():
        m.qkv.weight.view(2, 96, -1)[:, :64].abs_().neg_()              # q = k = 0 behind the ReLU
    x = torch.rand(2, 64, 16, 16).requires_grad_()
    y = m(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in m.parameters())


@torch.no_grad()
def test_bf16_autocast_is_close_and_finite():
    ae, img = tiny("1.0"), torch.randn(1, 3, 64, 64)
    exact = ae(img)
    with torch.autocast("cpu", torch.bfloat16):
        fast = ae(1.0 * img)
        assert A.LinearAttention(32)(1e4 * torch.randn(1, 32, 64, 64)).isfinite().all()
    assert fast.isfinite().all() and F.mse_loss(fast.float(), exact) < 0.01 * exact.var()


# --------------------------------------------------------------------------------------------------------------------
# Peers and files

def diffusers_dc():
    return pytest.importorskip("diffusers").AutoencoderDC


UNEVEN = dict(encoder_depths=(0, 1, 1, 1, 2), decoder_depths=(0, 2, 1, 2, 1), decoder_widths=(8, 32, 64, 32, 64))


@pytest.mark.parametrize("version", ["1.0", "1.5"])
@torch.no_grad()
def test_equals_diffusers(version, tmp_path):
    peer, ae = diffusers_dc(), tiny(version, **UNEVEN)
    ae.scale = 0.25
    ae.save_pretrained(tmp_path)
    peer = peer.from_pretrained(tmp_path).eval()
    assert peer.config.scaling_factor == 0.25 and peer.config.latent_channels == 8
    img = torch.randn(2, 3, 32, 80)
    z, z_peer = ae.encode(img), peer.encode(img).latent
    assert z.shape == (2, 8, 2, 5) and (z - z_peer).abs().max() < 1e-4 * z.abs().max()
    rec, rec_peer = ae.decode(z), peer.decode(z).sample
    assert (rec - rec_peer).abs().max() < 1e-4 * rec.abs().max()


@torch.no_grad()
def test_any_number_of_channels_in_all_layouts(tmp_path):
    dc = diffusers_dc()
    for channels in (1, 2, 5):
        ae, img = tiny(in_channels=channels), torch.randn(1, channels, 32, 16)
        folder = tmp_path / str(channels)
        ae.save_pretrained(folder)
        save_ours(ae, folder / "ours.pt")
        torch.save(official(ae.state_dict(), "1.5"), folder / "official.pt")
        z = ae.encode(img)
        assert z.shape == (1, 8, 2, 1) and ae.decode(z).shape == img.shape
        assert (dc.from_pretrained(folder).encode(img).latent - z).abs().max() < 1e-4 * z.abs().max()
        for file in (folder, folder / "ours.pt", folder / "official.pt"):
            again = DCAE.from_pretrained(file)
            assert again.config.in_channels == channels and torch.equal(again.encode(img), z)
        one_line(lambda: ae.encode(torch.zeros(1, 3, 16, 16)), f"(B,{channels},H,W) is needed")
        A.save_grid(to_uint8(img), folder / "grid.png", 1)
        three = [0, 1, 2] if channels == 5 else [0, 0, 0]
        sheet = np.asarray(Image.open(folder / "grid.png"))[:64:2, :32:2]       # twice as large, below no caption
        assert np.array_equal(sheet, to_uint8(img)[0].numpy()[..., three])
    for bad in (0, -1, 2.5, "3"):
        one_line(lambda: AEConfig(in_channels=bad), "--in_channels")


@pytest.mark.parametrize("version", ["1.0", "1.5"])
def test_published_to_ours_to_diffusers_to_ours(version, tmp_path):
    st = pytest.importorskip("safetensors.torch")
    ae = tiny(version, **UNEVEN)
    published, folder = official(ae.state_dict(), version), tmp_path / "dc-ae-f64c128-1.5"
    folder.mkdir()
    st.save_file({k: v.contiguous() for k, v in published.items()}, folder / "model.safetensors")
    torch.save({"state_dict": published, "epoch": 3}, tmp_path / "weights.bin")
    a, b = DCAE.from_pretrained(folder), DCAE.from_pretrained(tmp_path / "weights.bin")
    assert a.scale == 0.5935 and b.scale == 1.0 and not a.training and all(p.requires_grad for p in a.parameters())
    a.save_pretrained(tmp_path / "new" / "diffusers")
    c = A.open_autoencoder(str(tmp_path / "new" / "diffusers"))
    assert c.scale == 0.5935 and c.info == {}
    for x in (a, b, c):                                                 # stage 0 has no tensors: its width is a guess
        assert x.config.encoder_widths == ae.config.encoder_widths and x.config.decoder_widths[1:] == (32, 64, 32, 64)
        assert (x.config.f, x.config.c, x.config.version, x.config.width) == (16, 8, version, 16)
        assert x.config.encoder_depths == (0, 1, 1, 1, 2) and x.config.decoder_depths == (0, 2, 1, 2, 1)
        assert same_tensors(x, ae)
    low = small(version=version)                                        # f4: 1.0 without attention
    torch.save(official(low.state_dict(), version), tmp_path / "weights.bin")
    assert DCAE.from_pretrained(tmp_path / "weights.bin").config == low.config


def test_half_precision_weights_become_fp32(tmp_path):
    ae = tiny("1.0")
    whole = ae.state_dict()
    for dtype in (torch.float16, torch.bfloat16):
        half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in whole.items()}
        torch.save(official(half, "1.0"), tmp_path / "x.pt")
        got = DCAE.from_pretrained(tmp_path / "x.pt").state_dict()
        for k, v in whole.items():                                      # a counter stays an integer
            assert got[k].dtype == v.dtype and torch.equal(got[k], half[k].to(v.dtype))


def test_published_scales_by_name_or_by_config(tmp_path, monkeypatch):
    """0.3189, 0.2889, 0.5935: facts/training_facts.md. config.json's scaling_factor wins; without either it is 1."""
    tensors = official(small().state_dict(), "1.5")
    known = {"dc-ae-f32c32-in-1.0": 0.3189, "dc-ae-f64c128-in-1.0": 0.2889, "dc-ae-f64c128-1.5": 0.5935}
    for name, scale in {**known, "dc-ae-f32c128-1.5": 1, "dc-ae-f128c512-in-1.0": 1, "anything": 1}.items():
        torch.save(tensors, tmp_path / f"{name}.pt")
        assert DCAE.from_pretrained(tmp_path / f"{name}.pt").scale == scale
        folder = tmp_path / f"mit-han-lab--{name}"                      # as a download is kept
        folder.mkdir()
        torch.save(tensors, folder / "model.pt")
        monkeypatch.chdir(folder)
        assert DCAE.from_pretrained("model.pt").scale == scale == DCAE.from_pretrained(folder).scale
        for meta, want in ((dict(scaling_factor=None), scale), (dict(scaling_factor=2), 2.0)):
            (folder / "config.json").write_text(json.dumps(meta))
            got = DCAE.from_pretrained(folder).scale
            assert got == want and type(got) is float
    (folder / "config.json").write_text(json.dumps(dict(_name_or_path="mit-han-lab/dc-ae-f64c128-in-1.0-diffusers")))
    assert DCAE.from_pretrained(folder).scale == 0.2889


def test_which_file_of_a_folder_is_read(tmp_path):
    st = pytest.importorskip("safetensors.torch")
    names = ["ckpt.pt", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "model.safetensors",
             "pytorch_model.bin", "model.pt"]
    for i, name in enumerate(names):
        ae = small(seed=i)
        if name == "ckpt.pt":
            save_ours(ae, tmp_path / name)
        else:
            save = st.save_file if name.endswith("safetensors") else torch.save
            save(official(ae.state_dict(), "1.5"), tmp_path / name)
    for i, name in enumerate(names):
        assert same_tensors(DCAE.from_pretrained(tmp_path), small(seed=i)), name
        (tmp_path / name).unlink()


def test_our_checkpoint(tmp_path):
    ae = tiny(shortcuts=False)
    file = tmp_path / "ckpt.pt"
    save_ours(ae, file, optimiser={"state": {}})
    for x in (tmp_path, file):
        b = DCAE.from_pretrained(x)
        assert b.config == ae.config and b.scale == 0.5 and same_tensors(b, ae)
        assert b.info == {"image_size": 32, "step": 7, "channels": [4, 8]}
    assert read_checkpoint(tmp_path)["step"] == 7
    assert A.open_autoencoder(tmp_path).config == ae.config
    with torch.no_grad():
        b.decoder.project_in.bias[0] += 1
    assert same_tensors(DCAE.from_pretrained(tmp_path), ae)             # the file is not touched,
    c = DCAE.from_pretrained(file)
    file.write_bytes(bytes(file.stat().st_size))
    assert same_tensors(c, ae)                                          # nor needed any more
    plain = dict(kind="ae", config=asdict(ae.config), model=ae.state_dict(), scale=2)
    torch.save(plain, file, _use_new_zipfile_serialization=False)
    c = DCAE.from_pretrained(file)                                      # torch's older format
    assert same_tensors(c, ae) and c.info == {}
    save_ours(ae, file, config=ae.config)                               # a pickled class is never executed
    one_line(lambda: DCAE.from_pretrained(file), "plain tensors", folder=tmp_path)


def test_fingerprint_covers_all_tensors_names_shapes_and_types():
    def net(**tensors):
        m = torch.nn.Module()
        for name, t in tensors.items():
            m.register_buffer(name, t)
        return A.fingerprint(m)
    a, b = torch.arange(4.0), torch.ones(2, 3)
    first = net(a=a, b=b)
    text = b"a (4,) torch.float32" + a.numpy().tobytes() + b"b (2, 3) torch.float32" + b.numpy().tobytes()
    assert first == hashlib.sha256(text).hexdigest()[:16] == net(b=b, a=a)  # old latent caches stay good
    others = [net(a=b, b=a), net(a=a, c=b), net(a=a), net(a=a, b=b.T), net(a=a, b=b.int()), net(a=a, b=b + 1e-6),
              net(a=a + 1e-6, b=b), net(a=a.view(2, 2), b=b), net(a=a, b=b.bfloat16())]
    assert len({first, *others}) == 10
    ae = small()
    before = A.fingerprint(ae)
    assert before == A.fingerprint(small())
    ae.decoder.project_in.bias.data[0] += 1e-6
    assert before != A.fingerprint(ae)


@torch.no_grad()
def test_diffusers_kl_stands_in(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    for shift, blocks in ((0.1, 3), (None, 1)):
        torch.manual_seed(0)
        kl = diffusers.AutoencoderKL(
            block_out_channels=(8, 16, 16)[:blocks], norm_num_groups=4, latent_channels=4, scaling_factor=0.3,
            shift_factor=shift, down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks).eval()
        kl.save_pretrained(tmp_path)
        ae, img = A.open_autoencoder(str(tmp_path)), torch.randn(1, 3, 16, 16)
        assert (ae.config.f, ae.config.c, ae.scale, ae.info, ae.training) == ({3: 4, 1: 1}[blocks], 4, 0.3, {}, False)
        z = ae.encode(img)
        torch.testing.assert_close(z * ae.scale, (kl.encode(img).latent_dist.mean - (shift or 0)) * 0.3)
        torch.testing.assert_close(ae.decode(z), kl.decode(z + (shift or 0)).sample)


def test_which_names_mean_a_diffusers_kl(tmp_path, monkeypatch):
    kl = pytest.importorskip("diffusers").AutoencoderKL

    def offline(*_, **__):
        raise OSError("no network here,\nnone")
    monkeypatch.setattr(kl, "from_pretrained", offline)
    monkeypatch.setattr(pytest.importorskip("huggingface_hub"), "snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    kl, ours = "nor a diffusers AutoencoderKL (no network here, none", "no such checkpoint"
    for name, word in (("stabilityai/sd-vae-ft-mse", kl), ("out/my_run", ours), ("runs/mine", ours), ("mine", ours),
                       ("a/b/c", ours), ("dc-ai/dc-ae-f64c128-1.5", "no download")):
        one_line(lambda: A.open_autoencoder(name), word, folder=tmp_path)
    one_line(lambda: A.open_autoencoder("stabilityai/sd-vae-ft-mse", download=False), "pass --ae stabilityai/sd-vae")
    one_line(lambda: A.open_autoencoder(5, download=False), "5: no such checkpoint")


def test_training_step_is_no_slower_than_diffusers(tmp_path, one_thread):
    """Timed in turn in one process; the median ratio, with room for a noisy machine."""
    theirs = diffusers_dc()
    for version in ("1.0", "1.5"):
        ae = tiny(version)
        ae.save_pretrained(tmp_path / version)
        peer, img = theirs.from_pretrained(tmp_path / version), torch.randn(2, 3, 64, 64)

        def seconds(step):
            t = time.process_time()
            (step(img) - img).abs().mean().backward()
            return time.process_time() - t
        ae.train(), peer.train()
        times = [(seconds(ae), seconds(lambda x: peer(x).sample)) for _ in range(13)][2:]
        ratio = np.median([a for a, _ in times]) / np.median([b for _, b in times])
        print(f"DC-AE {version}: a training step takes {ratio:.2f} x diffusers'")
        assert ratio < 1.15, ratio


def test_published_names_are_fetched_by_huggingface_hub(tmp_path, monkeypatch):
    st, hub = pytest.importorskip("safetensors.torch"), pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    asked, ae, online = [], small(), False
    ae.scale = 0.5

    def snapshot_download(name, allow_patterns, local_files_only):      # what the hub would hold
        folder = tmp_path / "cache" / name
        if not folder.exists():
            asked.append((name, local_files_only))
            if local_files_only or not online:
                raise OSError("no network")
            ae.save_pretrained(folder)
            if not name.endswith("-diffusers"):
                (folder / "config.json").unlink()
                (folder / "diffusion_pytorch_model.safetensors").unlink()
                st.save_file(official(ae.state_dict(), "1.5"), folder / "model.safetensors")
        assert all(any(file.match(pattern) for pattern in allow_patterns) for file in folder.iterdir())
        return str(folder)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    name = "dc-ai/dc-ae-f64c128-1.5"
    for open_it in (DCAE.from_pretrained, A.open_autoencoder):          # a name that came out of a file: no network
        one_line(lambda: open_it(name, download=False), f"pass --ae {name}")
    assert asked == [(name, True)] * 2
    one_line(lambda: DCAE.from_pretrained(name), f"no download; put the files of https://huggingface.co/{name} into a")

    online = True
    scales = {name: 0.5935, "dc-ai/dc-ae-1.5-f64c128": 0.5935, "mit-han-lab/dc-ae-f32c32-in-1.0": 0.3189,
              "mit-han-lab/dc-ae-f64c128-in-1.0": 0.2889, "dc-ai/dc-ae-1.5-f32c128": 1, "dc-ai/dc-ae-f32c128-1.1": 1,
              "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers": 0.5, "dc-ai/dc-ae-1.5-f64c128-diffusers": 0.5}
    for published, scale in scales.items():                             # of facts/training_facts.md
        b = DCAE.from_pretrained(published)
        assert b.scale == scale and same_tensors(b, ae), published
    online = False
    assert same_tensors(A.open_autoencoder(name, download=False), ae)   # what is here needs no network
    (tmp_path / "dc-ai" / "dc-ae-mine").mkdir(parents=True)
    save_ours(small(seed=1), tmp_path / "dc-ai" / "dc-ae-mine" / "ckpt.pt")
    assert same_tensors(DCAE.from_pretrained("dc-ai/dc-ae-mine"), small(seed=1))  # a folder of that name is that folder
    one_line(lambda: DCAE.from_pretrained("somebody/dc-ae-f64c128-1.5"), "dc-ae-f64c128-1.5: no such checkpoint")
    assert len(asked) == 2 + len(scales) + 1

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)           # not installed
    one_line(lambda: DCAE.from_pretrained("dc-ai/dc-ae-new"), "pip install huggingface_hub",
             "https://huggingface.co/dc-ai/dc-ae-new")


# --------------------------------------------------------------------------------------------------------------------
# Bad input: one line each

OLD = dict(f=16, c=4, version="1.0")


@pytest.mark.parametrize("kw, word", [
    (dict(f=48), "--f 48"),
    (dict(f=2), "--f 2"),
    (dict(f=0), "--f 0"),
    (dict(c=0), "--c 0"),
    (dict(version="2.0"), "--version 2.0"),
    (dict(version="1"), "--version 1"),
    (dict(width=1), "--width 1"),
    (dict(width=5), "--width 5"),
    (dict(c=96, version="1.0"), "--c 96"),
    (dict(OLD, decoder_widths=(16, 32, 64, 64, 64), c=128), "last decoder width, 64"),
    (dict(OLD, f=32, width=12), "--width 12"),
    (dict(OLD, encoder_widths=(16, 32, 64, 48, 64)), "of 32 from 1.0's stage 3 on"),
    (dict(OLD, encoder_widths=(16, 32, 64, 64, 80)), "of 32 from 1.0's stage 3 on"),
    (dict(f=8, encoder_widths=(8, 16)), "f=8 needs 4"),
    (dict(f=8, encoder_widths=(8, 16, 16, 16, 16)), "f=8 needs 4"),
    (dict(f=8, encoder_depths=(0, 1, 1)), "f=8 needs 4"),
    (dict(f=8, decoder_depths=(0, 1, 1, 1, 1)), "decoder"),
    (dict(f=8, encoder_depths=(1, 1, 1, 1)), "depth 0 first"),
    (dict(f=8, decoder_depths=(0, 1, 0, 1)), "then >= 1"),
    (dict(f=8, encoder_widths=(2, 16, 16, 16)), "multiples of 4"),
    (dict(f=8, encoder_widths=(8, 16, 16, 48)), "encoder widths (8, 16, 16, 48)"),
    (dict(f=8, decoder_widths=(8, 16, 48, 64)), "decoder widths (8, 16, 48, 64)"),
])
def test_impossible_configurations(kw, word):
    one_line(lambda: AEConfig(**kw), word)


def test_possible_configurations():
    AEConfig(f=8, encoder_widths=(8, 64, 64, 64))                       # nothing spans the empty stage 0
    AEConfig(f=8, encoder_widths=(8, 16, 64, 32))
    AEConfig(f=8, encoder_widths=(8, 16, 48, 64), shortcuts=False)
    AEConfig(f=32, c=96, version="1.0", shortcuts=False)
    AEConfig(f=8, c=4, version="1.0", encoder_widths=(8, 12, 24, 32), decoder_widths=(8, 12, 24, 32), shortcuts=False)
    AEConfig(f=8, c=48)                                                 # only 1.0's shortcuts ask for a divisor


def test_bad_files_and_shapes(tmp_path):
    ae, line = small(), partial(one_line, folder=tmp_path)
    for shape in ((1, 3, 30, 32), (1, 3, 32, 30), (1, 4, 32, 32), (3, 32, 32), (1, 3, 32), (0, 3, 32, 32),
                  (1, 3, 0, 32)):
        line(lambda: ae.encode(torch.zeros(shape)), f"{shape}", "f=4")
    line(lambda: ae.decode(torch.zeros(1, 5, 2, 2)), "5 channels", "c=4")
    line(lambda: ae(torch.zeros(1, 3, 32, 32), c_prime=5), "c_prime=5")
    line(lambda: ae(torch.zeros(1, 3, 32, 32), c_prime=0), "c_prime=0")
    line(lambda: DCAE.from_pretrained(tmp_path / "nowhere"), "nowhere")
    for x in (5000 * "x", "x\0y", "/dev/zero", "", "a/b/c"):
        line(lambda: A.open_autoencoder(x), "no such checkpoint" if x else "in this folder")
    line(lambda: DCAE.from_pretrained(tmp_path), f"{tmp_path}: no ckpt.pt")
    file = tmp_path / "ckpt.pt"
    save_ours(ae, file)
    whole = file.read_bytes()
    flipped = whole.replace(b"kind", b"k\xffnd"), whole[:9] + whole[9:].replace(b"PK\3\4", b"PK\3\5", 1)
    for content in (b"", b"hello, this is a text", whole[:len(whole) // 2], *flipped):
        file.write_bytes(content)
        line(lambda: DCAE.from_pretrained(file), "ckpt.pt", "truncated")
        line(lambda: read_checkpoint(tmp_path), "ckpt.pt", "truncated")
    for content, word in (([1, 2], "list"), ({"w": torch.zeros(3)}, "'w'"), ({"a.weight": torch.zeros(3)}, "a.weight"),
                          ({"kind": "diffusion"}, "a diffusion checkpoint"), ({}, "not complete")):
        torch.save(content, file)
        line(lambda: DCAE.from_pretrained(file), "ckpt.pt", word)
    line(lambda: read_checkpoint(tmp_path), "ckpt.pt", "not a checkpoint")
    state = official(ae.state_dict(), "1.5")
    for gone in ("conv1", "decoder.stages.1", "encoder.stages.1", "project_out.op_list.0.conv.bias", "stages.2"):
        torch.save({k: v for k, v in state.items() if gone not in k}, file)
        word = "" if gone == "conv1" else "not complete"
        line(lambda: DCAE.from_pretrained(file), "ckpt.pt", "not a whole DC-AE", word)
    (tmp_path / "cut.safetensors").write_bytes(b"1234567890")
    line(lambda: DCAE.from_pretrained(tmp_path / "cut.safetensors"), "cut.safetensors", "truncated")
    line(lambda: tiny(shortcuts=False).save_pretrained(tmp_path / "x"), "shortcuts")
    line(lambda: open_images(tmp_path / "nowhere", 32), "--data", "nowhere")
    line(lambda: open_images(file, 32), "--data", "ckpt.pt: no such folder")
    line(lambda: open_images(tmp_path, 32), "no images")
    line(lambda: open_images("toy", 0), "--image_size 0")
    line(lambda: open_images("toy", 10**9), "--image_size 1000000000")


def test_the_command_fails_in_one_line_and_importing_needs_no_optional_package(tmp_path):
    command = [sys.executable, "-X", "importtime", "ae.py", "toy", "--ckpt", "nowhere", "--out", str(tmp_path / "out")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = run.stderr.splitlines()
    imported = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    assert {"torch", "PIL.Image"} <= imported
    assert not {"safetensors", "diffusers", "lpips", "scipy", "torchvision"} & imported
    said = [line for line in lines if not line.startswith("import time:")]
    assert run.returncode == 1 and run.stdout == "" and len(said) == 1
    assert said[0].startswith("nowhere: no such checkpoint")
    assert issubclass(InputError, ValueError)                           # what a notebook catches


def test_parse_channels():
    assert parse_channels("16:128:4", 128) == list(range(16, 129, 4)) == parse_channels(None, 128)
    assert parse_channels(None, 32) == [16, 20, 24, 28, 32]
    assert parse_channels(None, 30) == [16, 20, 24, 28, 30] and parse_channels(None, 18) == [16, 18]  # c itself always
    assert parse_channels(None, 16) == [16] and parse_channels(None, 8) == [8]
    assert parse_channels("32,16,16", 64) == [16, 16, 32]               # twice is twice as often
    assert parse_channels("8", 64) == [8] == parse_channels(8, 64) and parse_channels("64", 64) == [64]
    assert parse_channels("1:3", 8) == [1, 2, 3] and parse_channels("2:8:3", 8) == [2, 5, 8]  # both ends count
    assert parse_channels("3:8:2", 8) == [3, 5, 7]
    for bad in ("0,4", "129", "16,129", "8:4:1", "", "x", "4,,8", "1:2:3:4:5", "4:8:0", "1.5", "-4:8"):
        one_line(lambda: parse_channels(bad, 128), f"--channels {bad}")


# --------------------------------------------------------------------------------------------------------------------
# Weights of others: any wrapper, any file, nothing executed

class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


def test_no_file_of_weights_executes_anything(tmp_path):
    import pickle
    marker, kl = tmp_path / "executed", tmp_path / "kl"
    kl.mkdir()
    (kl / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "block_out_channels": [32]}))
    payload = Payload(marker)
    for name in ("ckpt.pt", "model.pt", "x.bin", "x.safetensors", "x.index.json"):
        torch.save({"kind": "ae", "config": payload, "state_dict": {"w": payload}}, tmp_path / name)
        one_line(lambda: A.open_autoencoder(tmp_path / name), name, folder=tmp_path)
        (tmp_path / name).write_bytes(pickle.dumps({"w": payload}))
        one_line(lambda: A.open_autoencoder(tmp_path / name), name, folder=tmp_path)
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"):
        torch.save({"w": payload}, kl / name)
        one_line(lambda: A.open_autoencoder(kl), "AutoencoderKL", folder=tmp_path)
    assert not marker.exists()


def test_names_behind_wrappers(tmp_path):
    ae = small()
    published = official(ae.state_dict(), "1.5")
    for wrap in ("module.{}", "_orig_mod.{}", "model.{}", "model.module._orig_mod.{}", "_orig_mod.module.{}"):
        torch.save({wrap.format(k): v for k, v in published.items()}, tmp_path / "x.pt")
        assert same_tensors(DCAE.from_pretrained(tmp_path / "x.pt"), ae), wrap
        save_ours(ae, tmp_path / "ckpt.pt", model={wrap.format(k): v for k, v in ae.state_dict().items()})
        assert same_tensors(DCAE.from_pretrained(tmp_path / "ckpt.pt"), ae), wrap
    inside = {k.replace("stages.1.", "stages.1._orig_mod."): v for k, v in published.items()}      # one stage compiled
    torch.save({"state_dict": inside}, tmp_path / "y.pt")
    assert same_tensors(DCAE.from_pretrained(tmp_path / "y.pt"), ae)


def test_half_precision_file_names_and_sharded_files(tmp_path):
    st = pytest.importorskip("safetensors.torch")
    ae = small()
    published = official(ae.state_dict(), "1.5")
    for i, name in enumerate(("diffusion_pytorch_model.fp16.safetensors", "model.bf16.safetensors")):
        folder = tmp_path / str(i)
        folder.mkdir()
        st.save_file(published, folder / name)
        assert same_tensors(DCAE.from_pretrained(folder), ae)
    names, part = sorted(published), "diffusion_pytorch_model-0000{}-of-00002.{}"
    for suffix in ("safetensors", "bin"):
        folder = tmp_path / suffix
        folder.mkdir()
        files = [part.format(i, suffix) for i in (1, 2)]
        for i, file in enumerate(files):
            save = st.save_file if suffix == "safetensors" else torch.save
            save({k: published[k] for k in names[i::2]}, folder / file)
        index = folder / f"diffusion_pytorch_model.{suffix}.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": {k: files[i % 2] for i, k in enumerate(names)}}))
        assert same_tensors(DCAE.from_pretrained(folder), ae) and same_tensors(DCAE.from_pretrained(index), ae)
        one_line(lambda: DCAE.from_pretrained(folder / files[0]), "one of several", "index.json", folder=tmp_path)
    (folder / files[1]).unlink()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(A, "WAITS", ())
        one_line(lambda: DCAE.from_pretrained(folder), files[1], "No such file", folder=tmp_path)
    for bad in ('{"weight_map": 3}', "{}", "[]", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../x.bin"}}'):
        index.write_text(bad)
        one_line(lambda: DCAE.from_pretrained(folder), index.name, folder=tmp_path)


HUGE = 10 ** 7, 10 ** 9, 10 ** 30, -1, 2.5, math.nan, math.inf, True, "3", [[3]], None


def test_configurations_of_strangers_are_one_line_at_once(tmp_path):
    ae, file, start = small(), tmp_path / "ckpt.pt", time.time()

    def refused(*words, **more):
        save_ours(ae, file, **more)
        one_line(lambda: DCAE.from_pretrained(file), "ckpt.pt", *words, folder=tmp_path)
    good = asdict(ae.config)
    for bad in HUGE:
        for key in ("f", "c", "width", "version"):
            refused(config={**good, key: bad})
            with pytest.raises(InputError):
                AEConfig(**{key: bad})
        for key in ("encoder_depths", "decoder_widths"):
            refused(config={**good, key: [0, bad, 4]})
        refused(config=bad)
        refused(model=bad)
        if bad is not None:
            refused(image_size=bad)
            refused(channels=[4, bad])
    refused(config={**good, "unknown": 1})
    refused("width 0", config={**good, "width": 0, "encoder_widths": None, "decoder_widths": None})
    refused("depth 0", config={**good, "encoder_depths": [0, 0, 1]})
    refused(config={**good, "f": 8})
    for bad in (0, -1, math.nan, math.inf, 10 ** 400, "x", None, [], {}):
        refused(scale=bad)
    for key in ("config", "model", "scale"):
        content = {"kind": "ae", "config": good, "model": ae.state_dict(), "scale": 1}
        torch.save({k: v for k, v in content.items() if k != key}, file)
        one_line(lambda: DCAE.from_pretrained(file), "ckpt.pt", key, folder=tmp_path)
    # Shapes of a PiB, of one number each
    published = official(ae.state_dict(), "1.5")
    for name in ("encoder.project_out.op_list.0.conv.bias", "decoder.stages.1.op_list.1.main.conv2.norm.weight"):
        assert name in published
        torch.save({**published, name: torch.zeros(1).expand(2 ** 48)}, file)
        one_line(lambda: DCAE.from_pretrained(file), "ckpt.pt", "larger than the file", folder=tmp_path)
    for kind in (torch.complex64, torch.complex128):
        torch.save({**published, name: published[name].to(kind)}, file)
        one_line(lambda: DCAE.from_pretrained(file), "ckpt.pt", "complex", folder=tmp_path)
    stages = {f"encoder.stages.{10 ** 9}.op_list.0.main.conv2.norm.weight": torch.ones(4)}
    for content in ({**published, **stages}, {**published, "w": 3}, {"state_dict": 3}, {3: torch.ones(4)},
                    {"model": []}):
        torch.save(content, file)
        one_line(lambda: DCAE.from_pretrained(file), "ckpt.pt", folder=tmp_path)
    assert time.time() - start < 20                                     # none was built


def test_config_json_of_strangers(tmp_path):
    pytest.importorskip("diffusers").AutoencoderKL                      # the import takes its time
    torch.save(official(small().state_dict(), "1.5"), tmp_path / "model.pt")
    config = tmp_path / "config.json"
    for bad in (b"{", b"\xff\xfe{}", b"[1]", b"3", b"null", b"[" * 100_000, b'{"scaling_factor": "x"}',
                b'{"scaling_factor": NaN}', b'{"scaling_factor": -1}', b'{"scaling_factor": 1e999}', b""):
        config.write_bytes(bad)
        for call in (DCAE.from_pretrained, A.open_autoencoder):
            one_line(lambda: call(tmp_path), tmp_path.name, folder=tmp_path)
    for key, bad in (("layers_per_block", 10 ** 7), ("block_out_channels", [10 ** 9]), ("block_out_channels", 7),
                     ("block_out_channels", [64] * 10 ** 6), ("layers_per_block", "x"), ("block_out_channels", []),
                     ("layers_per_block", [3]), ("block_out_channels", ["64"]), ("layers_per_block", 1e99)):
        config.write_text(json.dumps({"_class_name": "AutoencoderKL", key: bad}))
        start = time.time()
        one_line(lambda: A.open_autoencoder(tmp_path), "AutoencoderKL", folder=tmp_path)
        assert time.time() - start < 5


# --------------------------------------------------------------------------------------------------------------------
# What a run leaves behind, and what it prints

def write_run(folder):
    """ckpt_prev.pt of step 1 and ckpt.pt of step 2, as trainers write them."""
    for step in (1, 2):
        ae = small(seed=step)
        content = {"kind": "ae", "config": asdict(ae.config), "model": ae.state_dict(), "scale": 0.5, "step": step}
        A.write_checkpoint(content, folder / "ckpt.pt", keep=folder / "ckpt_prev.pt")
    assert sorted(p.name for p in folder.iterdir()) == ["ckpt.pt", "ckpt_prev.pt"]
    return (folder / "ckpt.pt").read_bytes()


def test_a_checkpoint_ends_in_the_sha256_of_all_before(tmp_path):
    whole = write_run(tmp_path)
    assert whole[-71:-64] == b"sha256 " and hashlib.sha256(whole[:-64]).hexdigest().encode() == whole[-64:]
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == 2 and read_checkpoint(tmp_path)["step"] == 2
    assert zipfile.ZipFile(tmp_path / "ckpt.pt").testzip() is None      # to all others it is a zip as any
    assert read_checkpoint(tmp_path / "ckpt_prev.pt")["step"] == 1


def test_only_the_writers_own_error_is_called_a_full_disk(tmp_path, monkeypatch):
    def out_of_memory(*args):
        raise RuntimeError("CUDA error: out of memory")
    monkeypatch.setattr(torch, "save", out_of_memory)
    with pytest.raises(RuntimeError, match="CUDA error"):
        A.write_checkpoint({}, tmp_path / "ckpt.pt")


def test_any_flipped_bit_of_a_checkpoint_is_seen(tmp_path):
    whole, file = write_run(tmp_path), tmp_path / "x.pt"
    rng = np.random.default_rng(0)
    places = [*rng.integers(0, len(whole), 100), *range(4), *rng.integers(0, 900, 20)]
    places += range(len(whole) - 120, len(whole))
    for at in places:                                                   # headers, pickle, tensors, directory, digest
        data = bytearray(whole)
        data[at] ^= 1 << rng.integers(8)
        file.write_bytes(data)
        with pytest.raises(InputError, match="x.pt: truncated, damaged"):
            A.read_weights(file)
    cut = [whole[:-k] for k in range(1, 100)]                           # 71: the digest, and nothing else
    for data in (b"", *cut, whole[:len(whole) // 2], whole[1:], whole + b"\0", bytes(len(whole))):
        file.write_bytes(data)
        with pytest.raises(InputError, match="x.pt: truncated, damaged"):
            A.read_weights(file)


def test_checkpoints_without_a_digest_are_held_to_the_sums_of_their_zip(tmp_path):
    """Of torch.save alone, as before; and packed anew with compression, which the memory map would take for numbers."""
    file, ae = tmp_path / "x.pt", small()
    save_ours(ae, file)
    whole = file.read_bytes()
    at = whole.index(ae.state_dict()["decoder.project_in.weight"].numpy().tobytes())
    for k in range(0, 400, 7):
        data = bytearray(whole)
        data[at + k] ^= 16
        file.write_bytes(data)
        one_line(lambda: DCAE.from_pretrained(file), "x.pt", "damaged", folder=tmp_path)
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    assert same_tensors(DCAE.from_pretrained(file), ae)


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(tmp_path, capsys, monkeypatch):
    whole = write_run(tmp_path)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for data in (flipped, whole[:-100], b""):
        (tmp_path / "ckpt.pt").write_bytes(data)
        for x in (tmp_path, tmp_path / "ckpt.pt"):
            assert read_checkpoint(x)["step"] == 1
            line, = capsys.readouterr().err.splitlines()
            assert "ckpt.pt: truncated, damaged" in line
            assert line.endswith(f"using {tmp_path / 'ckpt_prev.pt'}, of step 1")
            got = DCAE.from_pretrained(x)
            assert got.info["step"] == 1 and same_tensors(got, small(seed=1))
            assert len(capsys.readouterr().err.splitlines()) == 1
        assert (tmp_path / "ckpt.pt").read_bytes() == data              # set aside by the trainer alone
    before = (tmp_path / "ckpt_prev.pt").read_bytes()
    (tmp_path / "ckpt_prev.pt").write_bytes(before[:-100])              # both: both are named, in one line
    one_line(lambda: read_checkpoint(tmp_path), "/ckpt.pt", "ckpt_prev.pt: truncated, damaged", folder=tmp_path)
    assert capsys.readouterr().err == ""
    (tmp_path / "ckpt_prev.pt").write_bytes(before)
    (tmp_path / "ckpt.pt").unlink()
    assert read_checkpoint(tmp_path)["step"] == 1                       # a kill between the two renamings
    # An outage is no damage: nobody goes on from an older step because of it
    (tmp_path / "ckpt.pt").write_bytes(whole)
    monkeypatch.setattr(A, "WAITS", (0.001,) * 3)
    load, left = torch.load, [errno.EIO] * 3

    def away(*args, **kw):
        if left:
            raise OSError(left.pop(), "away")
        return load(*args, **kw)
    monkeypatch.setattr(torch, "load", away)
    assert read_checkpoint(tmp_path)["step"] == 2 and not left
    left[:] = [errno.ESTALE] * 4
    one_line(lambda: read_checkpoint(tmp_path), "ckpt.pt", "away", "start again", folder=tmp_path)
    assert capsys.readouterr().err == ""
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        (tmp_path / name).write_bytes(flipped)
    one_line(lambda: read_checkpoint(tmp_path), "ckpt_prev.pt", "damaged", folder=tmp_path)


def forked(call, stdout=2, stderr=2):
    """call() as a script's main in a process of its own, with these files as its stdout and stderr -> pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        atexit._clear()
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            A.script(call)
            code = 0
        except SystemExit as e:                                         # as Python ends
            print(e, file=sys.stderr)
            code = 1
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid, seconds):
    """Its exit code; None where it still ran after so many seconds, and was killed."""
    end = time.time() + seconds
    while time.time() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def wait_for(file):
    end = time.time() + 10
    while not file.exists():
        assert time.time() < end
        time.sleep(0.002)


def test_a_folder_is_locked_against_another_process_until_that_one_ends(tmp_path):
    def hold():
        kept = A.lock(tmp_path)                                         # noqa: F841
        (tmp_path / "held").touch()
        time.sleep(60)
    pid = forked(hold)
    wait_for(tmp_path / "held")
    one_line(lambda: A.lock(tmp_path), f"--out {tmp_path}", "another process", folder=tmp_path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    mine = A.lock(tmp_path)                                             # what a kill leaves behind locks nothing

    def second():
        A.lock(tmp_path)
    with open(tmp_path / "said", "w") as said:
        assert ended(forked(second, stderr=said.fileno()), 10) == 1
    assert "another process is writing there" in (tmp_path / "said").read_text()
    mine.close()
    assert ended(forked(second), 10) == 0


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_printing_never_ends_or_holds_a_run(tmp_path, stream, monkeypatch):
    monkeypatch.setattr(A.Screen.drain, "__defaults__", (0.3,))         # seconds that are left to a slow reader

    def talk():
        for i in range(3000):
            print(f"{i:09d}" * 10, file=getattr(sys, stream))           # 270 KB, more than a pipe takes
        (tmp_path / "done").touch()

    for reader in ("closed after one line", "never reads"):
        read, write = os.pipe()
        pid = forked(talk, **{stream: write})
        os.close(write)
        if reader == "closed after one line":
            with os.fdopen(read) as head:
                assert head.readline() == "000000000" * 10 + "\n"
        wait_for(tmp_path / "done")
        assert ended(pid, 10) == 0
        (tmp_path / "done").unlink()
        if reader == "never reads":
            os.close(read)
    with open(tmp_path / "all", "w") as file:                           # and where one reads, nothing is lost
        assert ended(forked(talk, **{stream: file.fileno()}), 10) == 0
    assert (tmp_path / "all").read_text().splitlines() == [f"{i:09d}" * 10 for i in range(3000)]


def test_ctrl_c_is_one_line_and_a_full_pipe_does_not_keep_it(tmp_path, monkeypatch):
    monkeypatch.setattr(A.Screen.drain, "__defaults__", (0.3,))

    def work():
        for i in range(10 ** 9):
            print("x" * 1000)
            if i == 100:
                (tmp_path / "busy").touch()
    read, write = os.pipe()
    with open(tmp_path / "said", "w") as said:
        pid = forked(work, write, said.fileno())
    wait_for(tmp_path / "busy")
    os.kill(pid, signal.SIGINT)
    assert ended(pid, 10) == 1 and (tmp_path / "said").read_text() == "stopped by Ctrl-C\n"
    os.close(read), os.close(write)


def test_closed_streams_hold_nothing_up_and_an_error_has_a_line_of_its_own(tmp_path):
    code = "import sys, ae\ndef work():\n    print(1)\n    sys.stderr.write('5%')\n    raise ae.InputError('bad')\n"
    for closed in ("2>&-", ">&-", ">&- 2>&-", "<&-"):
        start = time.time()
        p = subprocess.run(["bash", "-c", f"exec {sys.executable} -c \"$0\" {closed}", code + "ae.script(work)"],
                           cwd=ROOT, capture_output=True, text=True)
        assert p.returncode == 1 and time.time() - start < 30
        assert p.stderr == ("" if "2>" in closed else "5%\nbad\n"), p.stderr


def test_files_that_are_pipes_or_folders_are_not_waited_for(tmp_path):
    write_run(tmp_path)
    (tmp_path / "ckpt.pt").unlink()
    for make in (os.mkfifo, os.mkdir):
        make(tmp_path / "ckpt.pt")
        assert read_checkpoint(tmp_path)["step"] == 1                   # ckpt_prev.pt
        (tmp_path / "ckpt.pt").unlink() if make is os.mkfifo else (tmp_path / "ckpt.pt").rmdir()
    (tmp_path / "kl").mkdir()
    os.mkfifo(tmp_path / "kl" / "config.json")
    one_line(lambda: A.open_autoencoder(tmp_path / "kl"), "no ckpt.pt", folder=tmp_path)


def test_pictures_that_are_not_finite_are_an_error_and_no_half_picture_stays(tmp_path):
    img = torch.zeros(3, 3, 4, 4)
    img[1, 0, 0, 0] = math.nan
    img[2, 1, 3, 3] = -math.inf
    one_line(lambda: to_uint8(img), "2 of 3 pictures are not finite")
    ae = small()
    ae.decoder.project_in.bias.data.fill_(math.nan)
    save_ours(ae, tmp_path / "ckpt.pt")
    one_line(lambda: A.main(["toy", "--ckpt", str(tmp_path), "--out", str(tmp_path / "a")]), "not finite")
    save_ours(small(), tmp_path / "ckpt.pt")
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, usual[1]))
        one_line(lambda: A.main(["toy", "--ckpt", str(tmp_path), "--image_size", "16", "--out", str(tmp_path / "b")]),
                 f"--out {tmp_path}/b", "File too large", folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert not list((tmp_path / "b").glob("*.png"))


# --------------------------------------------------------------------------------------------------------------------
# Images in and out

def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_reading_any_mode(tmp_path):
    rgb = noise(10, 14, 3)
    img = Image.fromarray(rgb)

    def reread(image, name, **kw):
        image.save(tmp_path / name, **kw)
        out = read_image(tmp_path / name)
        assert out.mode == "RGB"
        return np.asarray(out).astype(int)
    grey = np.asarray(img.convert("L"))
    palette = img.quantize(16)
    for mode in ("RGB", "L", "1"):
        assert (reread(img.convert(mode), "a.png") == np.asarray(img.convert(mode).convert("RGB"))).all()
    assert (reread(palette, "a.png") == np.asarray(palette.convert("RGB"))).all()
    k = np.arange(0, 255, 15)                                           # 16 bit: 65535 is white, nearest step
    deep = np.concatenate([257 * k, 257 * k + 128, 257 * k + 129, [65535]])[None]
    want = np.concatenate([k, k, k + 1, [255]])[None, :, None]
    assert (reread(Image.fromarray(deep.astype(np.uint16)), "16.png") == want).all()
    alpha = np.concatenate([rgb, noise(10, 14, 1, seed=1)], 2)
    a = alpha[..., 3:] / 255
    assert abs(reread(Image.fromarray(alpha), "rgba.png") - (rgb * a + 255 * (1 - a))).max() <= 1  # over white
    la = np.stack([grey, alpha[..., 3]], 2)
    assert abs(reread(Image.fromarray(la, "LA"), "la.png") - (grey[..., None] * a + 255 * (1 - a))).max() <= 1
    clear = np.asarray(palette) == 3
    got = reread(palette, "pt.png", transparency=3)
    assert 0 < clear.sum() < 70 and (got[clear] == 255).all()
    assert (got[~clear] == np.asarray(palette.convert("RGB"))[~clear]).all()
    assert (reread(Image.new("RGB", (3, 3), (9, 8, 7)), "key.png", transparency=(9, 8, 7)) == 255).all()
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert abs(reread(flat, "cmyk.jpg", quality=95) - [255, 0, 0]).max() <= 6
    exif = Image.Exif()
    for turn, want in ((6, np.rot90(rgb, -1)), (8, np.rot90(rgb)), (3, rgb[::-1, ::-1]), (2, rgb[:, ::-1])):
        exif[0x0112] = turn                                             # the camera was held otherwise
        assert (reread(img, "exif.png", exif=exif) == want).all()


def test_draft_mode_never_falls_below_the_wanted_size(tmp_path):
    Image.new("RGB", (640, 400), "red").save(tmp_path / "big.jpg")
    for at_least, size in ((None, (640, 400)), (50, (80, 50)), (51, (160, 100)), (100, (160, 100)), (101, (320, 200)),
                           (200, (320, 200)), (201, (640, 400))):       # JPEG: 1, 1/2, 1/4 or 1/8
        assert read_image(tmp_path / "big.jpg", at_least).size == size
    Image.new("RGB", (2100, 2050), "red").save(tmp_path / "huge.jpg")
    assert read_image(tmp_path / "huge.jpg").size == (2100, 2050)       # only where it is asked for


def halves(x):
    """Means of 2 x 2 pixels."""
    return x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2, 3).mean((1, 3))


def test_center_crop_halves_by_box_and_cuts_the_middle():
    x = 64 * (noise(16, 48, 3) // 64).astype(int)                       # all means below are whole numbers
    for turn in (0, 1):
        x = x.swapaxes(0, 1) if turn else x
        crop = lambda size: np.asarray(center_crop(Image.fromarray(x.astype(np.uint8)), size)).swapaxes(0, turn)
        y = x.swapaxes(0, turn)                                         # the wide one
        assert (crop(16) == y[:, 16:32]).all()                          # the right size: untouched
        assert (crop(8) == halves(y)[:, 8:16]).all()                    # exactly 2x: by box, not bicubic
        assert abs(crop(4) - halves(halves(y))[:, 4:8]).max() <= 0.5
    for w, first in ((19, 1), (21, 2), (22, 3), (16, 0)):               # the middle: floor((w - 16) / 2)
        y = noise(16, w, 3)
        assert (np.asarray(center_crop(Image.fromarray(y), 16)) == y[:, first:first + 16]).all()
    assert center_crop(Image.new("RGB", (20, 31)), 32).size == (32, 32)  # smaller ones are enlarged


@pytest.mark.parametrize("w, h, size, box, bicubic, x, y", [
    (52, 37, 24, [], (34, 24), 5, 0),                                   # 33.7 -> 34; 10 / 2
    (37, 52, 24, [], (24, 34), 0, 5),
    (101, 67, 24, [(50, 33)], (36, 24), 6, 0),                          # 36.4 -> 36
    (135, 261, 16, [(67, 130), (33, 65), (16, 32)], (16, 32), 0, 8),
    (201, 130, 16, [(100, 65), (50, 32), (25, 16)], (25, 16), 4, 0),
    (47, 47, 24, [], (24, 24), 0, 0),                                   # just below 2x: no box
    (21, 30, 32, [], (32, 46), 0, 7),                                   # 45.7 -> 46
])
def test_center_crop_is_adms_by_pillow_alone(w, h, size, box, bicubic, x, y):
    img = want = Image.fromarray(noise(h, w, 3))
    for half in box:
        want = want.resize(half, Image.Resampling.BOX)
    want = want.resize(bicubic, Image.Resampling.BICUBIC).crop((x, y, x + size, y + size))
    assert (np.asarray(center_crop(img, size)) == np.asarray(want)).all()


def test_float_and_uint8():
    rgb = noise(5, 7, 3)
    x = A.to_float(Image.fromarray(rgb))
    assert x.dtype == torch.float32 and x.is_contiguous()
    assert abs(x.double().numpy() - (rgb.transpose(2, 0, 1) / 127.5 - 1)).max() < 1e-6
    y = to_uint8(x[None])
    assert y.dtype == torch.uint8 and y.is_contiguous() and (y[0].numpy() == rgb).all()
    levels = torch.tensor([-3.0, -1, -1 + 0.9 / 255, -1 + 1.1 / 255, -0.0001, 0, 0.0001, 1, 7])
    assert to_uint8(levels.expand(1, 3, 1, 9))[0, 0, :, 0].tolist() == [0, 0, 0, 1, 127, 128, 128, 255, 255]
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    back = torch.stack([A.to_float(Image.fromarray(t.numpy())) for t in every])
    assert torch.equal(to_uint8(back), every)                           # uint8 -> float -> uint8 loses nothing
    low = (torch.rand(1, 3, 64, 64) * 2.2 - 1.1).bfloat16()             # a bf16 decoder: rounded from its own numbers
    want = np.rint((low.double().numpy().clip(-1, 1) + 1) * 127.5).transpose(0, 2, 3, 1)
    assert (to_uint8(low).numpy() == want).all()


# --------------------------------------------------------------------------------------------------------------------
# Colours, sizes and files of all kinds

def icc(kind, tags):
    """A version 2 monitor profile: big-endian, 128 bytes of header, then a table of tags."""
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    space = b"Lab " if kind == b"CMYK" else b"XYZ "
    head = struct.pack(">I4sI4s4s4s", start + len(data), b"", 0x02400000, b"mntr", kind, space)
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)      # D50
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + data


def xyz(*values):
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * v) for v in values))


def gamma(value):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * value))


# Adobe RGB (1998): gamma 563/256, primaries adapted to D50
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
COLOURS = {b"rXYZ": xyz(*ADOBE[0]), b"gXYZ": xyz(*ADOBE[1]), b"bXYZ": xyz(*ADOBE[2])}
ADOBE_RGB = icc(b"RGB ", {b"wtpt": xyz(0.9642, 1, 0.8249), **COLOURS,
                          **{name: gamma(563 / 256) for name in (b"rTRC", b"gTRC", b"bTRC")}})
LINEAR_GREY = icc(b"GRAY", {b"wtpt": xyz(0.9642, 1, 0.8249), b"kTRC": gamma(1)})
SRGB_OF_XYZ = ((3.1338561, -1.6168667, -0.4906146), (-0.9787684, 1.9161415, 0.0334540),
               (0.0719453, -0.2289914, 1.4052427))                      # from D50 (Lindbloom)


def ink_profile():
    """CMYK of two points a channel: paper is white, any full ink takes 40 % of the light off, black all."""
    nodes = b""
    for i in range(16):
        c, m, y, k = (i >> 3) & 1, (i >> 2) & 1, (i >> 1) & 1, i & 1
        nodes += bytes([round(255 * 0.6 ** (c + m + y) * (1 - k)), 128, 128])              # L, a, b
    ramp = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    return icc(b"CMYK", {b"wtpt": xyz(0.9642, 1, 0.8249), b"A2B0": lut + 4 * ramp + nodes + 3 * ramp})


def encoded(linear):
    """sRGB, 0 to 255, of linear light."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_an_icc_profile_is_applied_and_a_broken_one_is_not(tmp_path):
    def read(image, name="x.png", profile=ADOBE_RGB):
        image.save(tmp_path / name, icc_profile=profile)
        return np.asarray(read_image(tmp_path / name)).astype(int)
    # grey, Adobe's green, a photo's colours: by the formulas, and as ImageCms has them
    values = np.array([[(128, 128, 128), (40, 200, 60), (200, 120, 90), (255, 255, 255), (0, 0, 0)]], np.uint8)
    light = (values / 255) ** (563 / 256) @ np.array(ADOBE)
    want = encoded(light @ np.array(SRGB_OF_XYZ).T)
    got = read(Image.fromarray(values))
    assert abs(got - want).max() < 2 and got[0, 1].tolist() != [40, 200, 60]
    source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(ADOBE_RGB)), ImageCms.createProfile("sRGB")
    theirs = np.asarray(ImageCms.profileToProfile(Image.fromarray(values), source, srgb)).astype(int)
    assert abs(got - theirs).max() <= 1
    assert abs(read(Image.new("RGB", (16, 16), (40, 200, 60)), "x.jpg", ADOBE_RGB)[8, 8] - theirs[0, 1]).max() <= 3
    palette = Image.fromarray(np.repeat(values, 5, 0)).quantize(8)
    assert abs(read(palette)[0] - theirs[0]).max() <= 3
    alpha = np.concatenate([values, np.array([[[255], [0], [51], [255], [0]]], np.uint8)], 2)
    part = alpha[..., 3:] / 255
    assert abs(read(Image.fromarray(alpha)) - (theirs * part + 255 * (1 - part))).max() <= 1   # alpha stays as it is
    # Grey: linear light; with alpha, and of 16 bits
    grey = np.array([[0, 10, 55, 128, 255]], np.uint8)
    want = encoded(grey / 255)[..., None]
    assert abs(read(Image.fromarray(grey), profile=LINEAR_GREY) - want).max() <= 1
    assert abs(read(Image.fromarray(np.stack([grey, 0 * grey + 255], 2), "LA"), profile=LINEAR_GREY) - want).max() <= 1
    assert abs(read(Image.fromarray(grey.astype(np.uint16) * 257), profile=LINEAR_GREY) - want).max() <= 1
    # Inks: L* = 100 * 0.6 for cyan alone, 36 for blue, whatever pillow makes of CMYK without a profile
    inks = np.array([[[255, 0, 0, 0], [255, 255, 0, 0], [0, 0, 0, 0], [0, 0, 0, 255]]], np.uint8)
    inks = Image.fromarray(inks, "CMYK")
    light = np.array([((60 + 16) / 116) ** 3, ((36 + 16) / 116) ** 3, 1, 0])
    assert abs(read(inks, "x.tif", ink_profile()) - encoded(light)[None, :, None]).max() <= 2
    # Broken, or of another kind of picture: as without
    for profile in (b"no profile", ADOBE_RGB[:200], LINEAR_GREY, ink_profile()):
        assert (read(Image.fromarray(values), profile=profile) == values).all()
    assert (read(Image.fromarray(grey), profile=ADOBE_RGB)[..., 0] == grey).all()


def test_floats_and_32_bits_are_scaled_by_1_255_or_65535(tmp_path):
    def read(values, dtype):
        Image.fromarray(np.array([values], dtype)).save(tmp_path / "x.tif")
        return np.asarray(read_image(tmp_path / "x.tif"))[0, :, 1].tolist()
    for dtype in (np.float32, np.int32):
        assert read([0, 1, 1], dtype) == [0, 255, 255]
        assert read([0, 2, 100, 255], dtype) == [0, 2, 100, 255]
        assert read([0, 257, 514, 65535], dtype) == [0, 1, 2, 255] and read([256, 0, 128], dtype) == [1, 0, 0]
        for bad in ([-1, 0, 1], [0, 65536]):
            with pytest.raises(A.Unreadable, match="below 0, or above 65535"):
                read(bad, dtype)
    assert read([0, 0.5, 0.25, 1], np.float32) == [0, 128, 64, 255]
    for bad in (math.nan, math.inf, -0.01):
        with pytest.raises(A.Unreadable, match="no number, below 0"):
            read([0, bad, 1], np.float32)
    assert read([0, 100, 255], np.uint16) == [0, 0, 1]                  # 16 bits are 16 bits, however dark
    (tmp_path / "x.pgm").write_bytes(b"P5 3 1 65535\n" + np.array([0, 255, 65535], ">u2").tobytes())
    assert np.asarray(read_image(tmp_path / "x.pgm"))[0, :, 0].tolist() == [0, 1, 255]


def png(depth, colour_type, row, width, transparent):
    """A PNG of one row of packed pixels."""
    head = struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"tRNS", transparent)
            + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b""))


def test_a_transparent_value_is_white_at_every_depth(tmp_path):
    def read(*args):
        (tmp_path / "x.png").write_bytes(png(*args))
        return np.asarray(read_image(tmp_path / "x.png"))[0].tolist()
    white, black = [255] * 3, [0] * 3
    assert read(8, 0, bytes([0, 4, 255]), 3, b"\0\0") == [white, [4] * 3, white]
    assert read(16, 0, struct.pack(">3H", 0, 1028, 65535), 3, b"\0\0") == [white, [4] * 3, white]
    assert read(16, 0, struct.pack(">3H", 0, 1028, 1029), 3, struct.pack(">H", 1028)) == [black, white, [4] * 3]
    assert read(2, 0, bytes([0b00011011]), 4, b"\0\1") == [black, white, [170] * 3, white]
    assert read(4, 0, bytes([0x03]), 2, b"\0\3") == [black, white]
    assert read(8, 2, bytes([255, 0, 0, 0, 255, 0]), 2, struct.pack(">3H", 255, 0, 0)) == [white, [0, 255, 0]]
    assert read(16, 2, struct.pack(">6H", 65535, 0, 0, 0, 65535, 0), 2, struct.pack(">3H", 65535, 0, 0)) == \
        [white, [0, 255, 0]]


def test_broken_metadata_counts_as_none(tmp_path, monkeypatch):
    picture = noise(8, 9, 3)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(picture).save(tmp_path / "x.png", exif=exif)
    assert (np.asarray(read_image(tmp_path / "x.png")) == picture[::-1, ::-1]).all()
    for error in (struct.error("x"), KeyError(3), ZeroDivisionError(), SyntaxError("x"), AttributeError("x")):
        def transpose(_):
            raise error
        monkeypatch.setattr(ImageOps, "exif_transpose", transpose)
        assert (np.asarray(read_image(tmp_path / "x.png")) == picture).all()


@pytest.mark.filterwarnings("ignore")
def test_flipped_bytes_give_a_picture_or_an_unreadable_one(tmp_path):
    """Whatever pillow raises: 240 files, each with three bytes of its first 400 replaced."""
    exif = Image.Exif()
    exif[0x0112], exif[0x9286] = 6, "comment"
    rng, seen = np.random.default_rng(0), set()
    for suffix in ("jpg", "png", "tif", "gif", "webp", "bmp"):
        kw = {"exif": exif} if suffix in ("jpg", "png", "tif", "webp") else {}
        Image.fromarray(noise(6, 7, 3)).save(tmp_path / f"whole.{suffix}", **kw)
        whole = (tmp_path / f"whole.{suffix}").read_bytes()
        for _ in range(40):
            data = bytearray(whole)
            for at in rng.integers(0, min(400, len(data)), 3):
                data[at] = rng.integers(256)
            file = tmp_path / f"x.{suffix}"
            file.write_bytes(data)
            try:
                seen.add(read_image(file).mode)
            except A.Unreadable as e:
                seen.add(str(e).split(":")[0])
    assert {"RGB", "UnidentifiedImageError", "OSError"} <= seen


def test_a_jpeg_above_the_limit_of_pixels_is_reduced_and_nothing_else_is(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)                # pillow refuses twice as many
    (tmp_path / "a").mkdir()
    Image.new("RGB", (190, 95), (200, 0, 0)).save(tmp_path / "a" / "large.jpg", quality=95)        # 18,050 pixels
    Image.new("RGB", (100, 90), (0, 200, 0)).save(tmp_path / "a" / "middle.png")                   # 9,000: a warning
    Image.new("RGB", (190, 95), (0, 0, 200)).save(tmp_path / "large.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for train in (True, False):
            got = colours(open_images(tmp_path / "a", 16, train))
            assert abs(np.array([c for c, _ in got]) - [(200, 0, 0), (0, 200, 0)]).max() <= 3
        assert read_image(tmp_path / "a" / "large.jpg", 32, only_large=True).size == (95, 48)      # half, the least
        assert read_image(tmp_path / "a" / "middle.png", 32, only_large=True).size == (100, 90)
        for at_least in (None, 94):                                     # the whole of it is asked for
            with pytest.raises(A.Unreadable, match="190 x 95 pixels, more than 10000"):
                read_image(tmp_path / "a" / "large.jpg", at_least)
        with pytest.raises(A.Unreadable, match="190 x 95 pixels"):
            read_image(tmp_path / "large.png", 32)
    assert Image.MAX_IMAGE_PIXELS == 5000


@pytest.mark.parametrize("w, h, size", [(1, 20_000, 256), (20_000, 2, 64), (3, 601, 32), (640, 64, 16)])
def test_of_a_strip_only_the_middle_is_resized(w, h, size, monkeypatch):
    strip, made = Image.fromarray(noise(h, w, 3)), []
    resize = Image.Image.resize

    def watched(image, shape, *args, **kw):
        made.append(shape)
        return resize(image, shape, *args, **kw)
    monkeypatch.setattr(Image.Image, "resize", watched)
    got = np.asarray(center_crop(strip, size)).astype(int)
    assert max(a * b for a, b in made) <= max(11 * size * size, w * h / 4)
    want = strip                                                        # ADM's, of the whole
    while min(want.size) >= 2 * size:
        want = resize(want, (want.width // 2, want.height // 2), Image.Resampling.BOX)
    side = min(want.size)
    a, b = (round(n * size / side) for n in want.size)                  # as large as the whole would become
    x, y = (a - size) // 2, (b - size) // 2
    box = [x * want.width / a, y * want.height / b, (x + size) * want.width / a, (y + size) * want.height / b]
    want = resize(want, (size, size), Image.Resampling.BICUBIC, box)
    assert got.shape == (size, size, 3) and abs(got - np.asarray(want)).max() <= 4


# --------------------------------------------------------------------------------------------------------------------
# Folders

def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def broken_files(whole):
    """A PNG -> one broken file for each kind of error that pillow raises (OSError, SyntaxError, ValueError)."""
    at = whole.index(b"IDAT") - 4
    n = struct.unpack(">I", whole[at:at + 4])[0]
    pixels = whole[at + 8:at + 8 + n]
    return {"empty": b"", "text": b"no image", "cut": whole[:len(whole) // 2],
            "chunk": whole[:at] + chunk(b"IDAT", pixels[:500]) + struct.pack(">I", n) + b"\1\2\3\4" + pixels,
            "header": whole[:8] + chunk(b"IHDR", b"abc") + whole[at:]}


def colour(path, rgb, size=(50, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, rgb).save(path, "PNG")


def colours(data):
    """The mean colour of each picture, 0 to 255, and its label."""
    return [(tuple(((x.mean((1, 2)) + 1) * 127.5).round().int().tolist()), y) for x, y in data]


def test_classes_are_the_sorted_folders_and_labels_belong_to_their_pictures(tmp_path, capsys):
    red, green, blue, black = (250, 0, 0), (0, 250, 0), (0, 0, 250), (0, 0, 0)
    colour(tmp_path / "cat" / "e.png", red)                             # a folder's files, then its folders
    colour(tmp_path / "cat" / "a.png", (200, 0, 0))
    colour(tmp_path / "cat" / "deep" / "down" / "c.png", (100, 0, 0))
    colour(tmp_path / "ant" / "x.JPG", green)
    colour(tmp_path / "10" / "x.png", blue)
    colour(tmp_path / "9" / "x.png", black)
    colour(tmp_path / ".hidden" / "x.png", (9, 9, 9))
    colour(tmp_path / "cat" / ".thumbs" / "x.png", (9, 9, 9))
    colour(tmp_path / "cat" / "._1.png", (9, 9, 9))
    (tmp_path / "empty").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    data = open_images(tmp_path, 32)
    assert data.classes == ["10", "9", "ant", "cat"] and data.num_classes == 4 and len(data) == 6
    assert colours(data) == [(blue, 0), (black, 1), (green, 2), ((200, 0, 0), 3), (red, 3), ((100, 0, 0), 3)]
    img, label = data[0]
    assert img.shape == (3, 32, 32) and img.dtype == torch.float32 and isinstance(label, int)
    assert capsys.readouterr().out == f"{tmp_path}: 6 images, 4 classes; left out: 1 .txt\n"
    for i in (6, -1):
        with pytest.raises(IndexError):
            data[i]
    img, label = data.get_batch([4, 0], [0, 0])
    assert torch.equal(img, torch.stack([data[4][0], data[0][0]]))
    assert label.tolist() == [3, 0] and label.dtype == torch.int64
    img, label = next(iter(torch.utils.data.DataLoader(data, batch_size=4)))
    assert torch.equal(img[3], data[3][0]) and label.tolist() == [0, 1, 2, 3]

    colour(tmp_path / "beside.png", red)                                # beside class folders: left out, and said
    os.symlink(tmp_path / "cat", tmp_path / "dog")                      # links are followed
    data = open_images(tmp_path, 32)
    assert data.classes == ["10", "9", "ant", "cat", "dog"] and len(data) == 9
    line = f"{tmp_path}: 9 images, 5 classes; left out: 2 .txt, 1 images beside class folders\n"
    assert capsys.readouterr().out == line

    flat = open_images(tmp_path / "10", 32)                             # no folder in it: no classes
    assert flat.num_classes == 0 and flat.classes == [] and colours(flat) == [(blue, 0)]
    nested = open_images(tmp_path / "cat", 32)                          # one folder in it: that is its one class
    assert nested.classes == ["deep"] and colours(nested) == [((100, 0, 0), 0)]


def test_all_suffixes_in_any_case(tmp_path):
    for i, suffix in enumerate("jpg jpeg png webp bmp tif tiff ppm pgm gif".split()):
        colour(tmp_path / f"{i}.{suffix}", (i, 0, 0))
        colour(tmp_path / f"{i}.{suffix.upper()}", (i, 1, 0))
    colour(tmp_path / "x.txt", (0, 0, 0))
    colour(tmp_path / "png", (0, 0, 0))
    assert sorted(colours(open_images(tmp_path, 8))) == [((i, j, 0), 0) for i in range(10) for j in range(2)]


def test_a_broken_image_is_named_once_and_replaced_by_the_next(tmp_path, capfd, monkeypatch):
    Image.fromarray(noise(40, 50, 3)).save(tmp_path / "whole.png")
    bad = broken_files((tmp_path / "whole.png").read_bytes())
    (tmp_path / "whole.png").unlink()
    colour(tmp_path / "a" / "0.png", (10, 0, 0))
    for name, content in bad.items():
        (tmp_path / "a" / f"1{name}.png").write_bytes(content)
    colour(tmp_path / "a" / "1xlarge.png", (20, 0, 0), (100, 100))
    colour(tmp_path / "b" / "0.png", (30, 0, 0))
    (tmp_path / "b" / "1.png").write_bytes(b"")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)                # pillow refuses twice as many: a bomb
    capfd.readouterr()
    data = open_images(tmp_path, 32)
    # with its own label; after the last, the first
    first, next_class, last = ((10, 0, 0), 0), ((30, 0, 0), 1), ((10, 0, 0), 0)
    want = [first] + [next_class] * 6 + [next_class, last]
    for _ in range(2):
        assert colours(data) == want
    err = capfd.readouterr().err
    for name in (*bad, "xlarge"):
        assert err.count(f"1{name}.png: unreadable, replaced by the next image") == 1
    assert err.count("unreadable") == 7 and all(len(line.replace(str(tmp_path), "")) < 200 for line in err.splitlines())
    data = open_images(tmp_path, 32)
    loader = torch.utils.data.DataLoader(data, batch_size=9, num_workers=1)  # workers of each epoch are new processes
    for _ in range(2):
        assert colours(zip(*next(iter(loader)))) == want
    assert capfd.readouterr().err.count("unreadable") == 7

    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"broken")
    one_line(lambda: open_images(tmp_path, 32), "--data", "9 images in a row", "0.png on", folder=tmp_path)


def test_every_suffix_that_pillow_opens_is_read_and_what_is_no_picture_is_not(tmp_path, capsys):
    from PIL import features
    suffixes = "jfif jpe apng tga pcx sgi rgb ico icns im dds ppm pnm dib jp2 j2k".split()
    suffixes += ["avif"] if features.check("avif") else []
    for i, suffix in enumerate(suffixes):
        kind = Image.registered_extensions()[f".{suffix}"]
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i:02d}.{suffix.upper()}", kind)
    for suffix in ("pdf", "mpg", "h5", "eps", "ps", "wmf", "txt", "npy"):
        (tmp_path / f"x.{suffix}").write_bytes(b"x")
    assert {os.path.splitext(file)[1][1:].lower() for file, _ in A.list_images(tmp_path)[0]} == set(suffixes)
    assert len(open_images(tmp_path, 8)) == len(suffixes)
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path}: {len(suffixes)} images, 0 classes; left out: 1 .") and "others" not in line
    assert len(line.replace(str(tmp_path), "")) < 200
    (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(A.Unreadable, match="UnidentifiedImageError"):   # under any name: Ghostscript would run it
        read_image(tmp_path / "x.jpg")


def test_links_are_followed_and_loops_of_links_end(tmp_path, capsys):
    data = tmp_path / "data"
    for name in ("a/1.png", "a/deep/2.PNG", "b/3.png", ".hidden/4.png", "b/.ipynb_checkpoints/5.png", "b/.6.png"):
        colour(data / name, (10, 0, 0))
    colour(tmp_path / "elsewhere" / "7.png", (10, 0, 0))
    for link, target in (("a/up", ".."), ("a/up2", ".."), ("b/up", ".."), ("b/up2", "../../data"), ("a/deep/self", "."),
                         ("c", "../elsewhere"), ("b/one", "../c"), ("loop", "loop"), ("nowhere", "gone"),
                         (".link", "../elsewhere")):
        os.symlink(target, data / link)
    found = [(os.path.relpath(file, data), label) for file, label in A.list_images(data)[0]]
    # What a class reaches by links is its own: a/up leads to the top, which a class does not enter again
    assert found == [("a/1.png", "a"), ("a/deep/2.PNG", "a"), ("b/3.png", "b"), ("b/one/7.png", "b"), ("c/7.png", "c")]
    images = open_images(data, 8)
    assert images.classes == ["a", "b", "c"] and list(images.labels) == [0, 0, 1, 1, 2]
    assert capsys.readouterr().out == f"{data}: 5 images, 3 classes; left out: 2 without suffix\n"
    assert A.list_images(str(data) + "/")[0] == [(f"{data}/{file}", label) for file, label in found]


@pytest.mark.parametrize("top", ["", "train/"])
def test_a_zip_of_a_folder_is_that_folder(tmp_path, capfd, top):
    data = tmp_path / "train"
    names = "b/2.png", "b/a/9.png", "a/1.PNG", "b/10.png", "a b/é.png", ".hidden/4.png", "b/.5.png"
    for i, name in enumerate(names):
        colour(data / name, (40 * i, 0, 0), (20, 10 + i))
    (data / "b" / "notes.txt").write_text("x")
    with zipfile.ZipFile(tmp_path / "train.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for file in sorted(data.rglob("*"), reverse=True):              # in another order, folders too
            z.write(file, top + str(file.relative_to(data)))
        z.writestr("__MACOSX/b/._2.png", b"x")
    folder, zipped = (open_images(path, 8, train=True, seed=3) for path in (data, tmp_path / "train.zip"))
    said = capfd.readouterr().out.splitlines()
    assert said[0].replace(str(data), "") == said[1].replace(f"{data}.zip", "") == (
        ": 5 images, 3 classes; left out: 1 .txt")
    assert folder.classes == zipped.classes == ["a", "a b", "b"] and folder.labels == zipped.labels
    assert [file.replace(".zip/" + top, "/") for file in zipped.files] == list(folder.files)
    assert [A.file_size(file) for file in zipped.files] == [os.stat(file).st_size for file in folder.files]
    for i in range(5):
        assert torch.equal(folder[i][0], zipped[i][0])
    loader = torch.utils.data.DataLoader(zipped, batch_size=None, sampler=[0, 1, 2, 3, 4] * 20, num_workers=2)
    for k, (img, label) in enumerate(loader):                           # each process opens it for itself
        assert torch.equal(img, folder[k % 5][0]) and label == folder.labels[k % 5]


def test_a_flat_zip_and_a_damaged_one(tmp_path, capfd):
    for i in range(3):
        colour(tmp_path / f"{i}.png", (40 * i, 0, 0))
    file = tmp_path / "flat.zip"
    with zipfile.ZipFile(file, "w") as z:
        for i in range(3):
            z.write(tmp_path / f"{i}.png", f"{i}.png")
    flat = open_images(file, 8)
    assert flat.num_classes == 0
    assert [c for c, _ in colours([flat[i] for i in range(3)])] == [(0, 0, 0), (40, 0, 0), (80, 0, 0)]
    whole = file.read_bytes()
    at = whole.index((tmp_path / "1.png").read_bytes())
    file.write_bytes(whole[:at + 50] + b"\xff" + whole[at + 51:])      # its checksum shows it
    os.utime(file, ns=(1, 1))
    A.open_zip.cache_clear()
    assert colours([open_images(file, 8)[1]]) == [((80, 0, 0), 0)]
    assert "1.png: unreadable, replaced by the next image (BadZipFile" in capfd.readouterr().err
    for data in (b"", b"PK", whole[:-30]):
        file.write_bytes(data)
        A.open_zip.cache_clear()
        one_line(lambda: open_images(file, 8), "flat.zip", "not a whole .zip", folder=tmp_path)
    one_line(lambda: open_images(tmp_path / "none.zip", 8), "none.zip: no such folder or .zip", folder=tmp_path)


def test_a_named_pipe_among_the_images_holds_nothing_up(tmp_path, capfd):
    colour(tmp_path / "2.png", (10, 0, 0))
    os.mkfifo(tmp_path / "1.png")
    assert colours([open_images(tmp_path, 8)[0]]) == [((10, 0, 0), 0)]
    assert "1.png: unreadable" in capfd.readouterr().err


def test_errors_of_the_system_are_one_line_and_others_pass(tmp_path):
    def fails(e):
        with A.writing("--out", tmp_path):
            raise e
    one_line(lambda: fails(OSError(errno.ENOSPC, "No space left on device", "x.pt")), f"--out {tmp_path}", "x.pt",
             "No space left", "make room", folder=tmp_path)
    for e in (OSError("of a library"), ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(e)) as got:
            fails(e)
        assert got.value is e


def test_ranks_other_than_the_first_say_nothing_of_the_folder(tmp_path, capsys, monkeypatch):
    colour(tmp_path / "1.png", (1, 2, 3))
    for rank, lines in (("0", 1), ("3", 0)):
        monkeypatch.setenv("RANK", rank)
        open_images(tmp_path, 8)
        assert len(capsys.readouterr().out.splitlines()) == lines


def test_an_outage_is_waited_for_and_then_ends_in_one_line(tmp_path, monkeypatch, capfd):
    for i in range(20):
        colour(tmp_path / "data" / "a" / f"{i:02d}.png", (i, 0, 0))
    data = open_images(tmp_path / "data", 8)
    assert 9 <= sum(A.WAITS) <= 11
    monkeypatch.setattr(A, "WAITS", (0.001, 0.002, 0.003))
    read, left = A.read_bytes, []

    def away(path):
        if left:
            raise OSError(left.pop(), "away", str(path))
        return read(path)
    monkeypatch.setattr(A, "read_bytes", away)
    for number in (errno.ENOENT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES):
        left[:] = [number] * 3
        assert colours([data[5]]) == [((5, 0, 0), 0)] and not left      # not its neighbour
        left[:] = [number] * 4
        one_line(lambda: data[5], "05.png", "away", "start again", folder=tmp_path)
    assert not data.bad.any() and capfd.readouterr().err == ""

    monkeypatch.setattr(A, "read_bytes", read)
    os.rename(tmp_path / "data", tmp_path / "gone")
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=1)
    one_line(lambda: next(iter(loader)), "00.png", "No such file", folder=tmp_path)     # out of a worker as well
    one_line(lambda: A.list_images(tmp_path / "data"), "No such file", folder=tmp_path)
    os.rename(tmp_path / "gone", tmp_path / "data")
    assert len(colours(data)) == 20 and not data.bad.any()


def test_a_folder_that_goes_away_for_20_ms_costs_no_image(tmp_path, monkeypatch):
    for i in range(30):
        colour(tmp_path / "data" / f"{i:02d}.png", (i, 0, 0), (8, 8))
    data = open_images(tmp_path / "data", 8)
    monkeypatch.setattr(A, "WAITS", (0.01,) * 1000)
    pid = os.fork()
    if not pid:
        try:
            for _ in range(3):
                os.rename(tmp_path / "data", tmp_path / "gone")
                time.sleep(0.02)
                os.rename(tmp_path / "gone", tmp_path / "data")
                time.sleep(0.02)
        finally:
            os._exit(0)
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        assert [c[0] for c, _ in colours(data)] == list(range(30))
    assert not data.bad.any()


def test_at_most_ten_images_in_a_row_are_replaced(tmp_path):
    for i in range(30):
        colour(tmp_path / f"{i:02d}.png", (i, 0, 0))
    for i in [*range(3, 13), *range(15, 26)]:                           # ten, and eleven
        (tmp_path / f"{i:02d}.png").write_bytes(b"broken")
    data = open_images(tmp_path, 8)
    assert colours([data[2], data[3], data[12], data[16]]) == [((i, 0, 0), 0) for i in (2, 13, 13, 26)]
    for _ in range(2):
        one_line(lambda: data[15], "--data", "11 images in a row", "15.png on", folder=tmp_path)


def test_train_crops(tmp_path):
    """Of a picture whose red is x and whose green is y: the crop's box is read off its colours."""
    W, H, S = 300, 200, 64
    y, x = np.mgrid[0:H, 0:W]
    ramp = np.stack([x * 255 / W, y * 255 / H, 0 * x], 2).round().astype(np.uint8)
    grain = Image.fromarray(noise(H, W, 3))
    for name, img in (("0.bmp", Image.fromarray(ramp)), ("1.bmp", Image.fromarray(ramp)), ("2.bmp", grain)):
        img.save(tmp_path / name)
    data = open_images(tmp_path, S, train=True, seed=3)
    column = np.arange(8, S - 8) + 0.5                                  # bicubic's border left out

    def box(img):
        """left, top, width, height in pixels of the picture; width < 0 where mirrored."""
        assert img.shape == (3, S, S)
        red, green = ((img[k].double().numpy() + 1) * 127.5 for k in range(2))
        slope_x, x0 = np.polyfit(column, red[8:-8, 8:-8].mean(0) * W / 255 + 0.5, 1)
        slope_y, y0 = np.polyfit(column, green[8:-8, 8:-8].mean(1) * H / 255 + 0.5, 1)
        return min(x0, x0 + slope_x * S), y0, slope_x * S, slope_y * S
    boxes = np.array([box(picture(data, 0, key)) for key in range(300)])
    left, top, width, height = boxes.T
    mirrored, side = width < 0, abs(width)
    assert abs(side - height).max() < 1.5                               # square, never upside down
    zoom = H / side
    assert 0.99 < zoom.min() < 1.01 and 1.24 < zoom.max() < 1.26 and abs(zoom.mean() - 1.125) < 0.015
    assert 120 < mirrored.sum() < 180
    room, ok = H - side, H - side > 10
    u, v = left / (W - side), (top[ok] / room[ok])
    for part in (u, v):                                                 # uniform from end to end
        assert -0.03 < part.min() < 0.03 and 0.97 < part.max() < 1.03
        assert (abs(np.histogram(part, 4, (-0.05, 1.05))[0] / len(part) - 0.25) < 0.08).all()
    assert abs(np.corrcoef([u[ok], v, zoom[ok], mirrored[ok]]) - np.eye(4)).max() < 0.2
    turned = set()
    for key in range(4):                                                # and pixel by pixel: bicubic, from (seed, key)
        rng = np.random.default_rng((3, key))
        s = H / rng.uniform(1, 1.25)
        x0, y0 = rng.random() * (W - s), rng.random() * (H - s)
        want = np.asarray(grain.resize((S, S), Image.Resampling.BICUBIC, box=(x0, y0, x0 + s, y0 + s)))
        turned.add(flip := rng.random() < 0.5)
        got = picture(data, 2, key).numpy().transpose(1, 2, 0)
        assert abs(got - ((want[:, ::-1] if flip else want) / 127.5 - 1)).max() < 1e-6
    assert turned == {True, False}

    assert torch.equal(picture(data, 0, 5), picture(data, 1, 5)) and torch.equal(data[1][0], picture(data, 0, 1))
    img, _ = data.get_batch([0, 1], [7, 8])
    assert torch.equal(img[0], picture(data, 0, 7)) and torch.equal(img[1], picture(data, 0, 8))
    one, two = (open_images(tmp_path, S, train=True, seed=k) for k in (1, 2))
    assert not torch.equal(picture(one, 0, 2), picture(two, 0, 1))
    assert not torch.equal(picture(one, 0, 2), picture(two, 0, 2))
    plain, zero = open_images(tmp_path, S, True), open_images(tmp_path, S, train=True, seed=0)
    assert torch.equal(picture(plain, 0, 2), picture(zero, 0, 2))


def test_only_train_crops_use_draft_mode_and_only_down_to_twice_the_size(tmp_path):
    for name in ("jpg", "quarter", "whole"):
        (tmp_path / name).mkdir()
    Image.fromarray(noise(256, 256, 3)).save(tmp_path / "jpg" / "0.jpg", quality=95)
    with Image.open(tmp_path / "jpg" / "0.jpg") as img:
        img.convert("RGB").save(tmp_path / "whole" / "0.png")
    with Image.open(tmp_path / "jpg" / "0.jpg") as img:
        img.draft(None, (64, 64))
        assert img.size == (64, 64)
        img.convert("RGB").save(tmp_path / "quarter" / "0.png")
    for train, same in ((True, "quarter"), (False, "whole")):
        a, b = (picture(open_images(tmp_path / name, 32, train), 0, 1) for name in ("jpg", same))
        assert torch.equal(a, b)
    assert torch.equal(open_images(tmp_path / "jpg", 32)[0][0], b)      # train is off unless asked for
    want = np.asarray(center_crop(Image.open(tmp_path / "whole" / "0.png"), 32)).transpose(2, 0, 1) / 127.5 - 1
    assert abs(b.numpy() - want).max() < 1e-6                           # evaluation: the ADM crop of all pixels


# --------------------------------------------------------------------------------------------------------------------
# Toy images

def splitmix(counter):
    """Output number `counter` of splitmix64 from state 0, in plain integers."""
    mask = 2 ** 64 - 1
    x = (counter + 1) * 0x9E3779B97F4A7C15 & mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


def unit(index, n, k, salt):
    """Number k of the n that belong to an index: the upper 24 bits as a fraction."""
    return (splitmix((salt << 48) + index * n + k) >> 40) / 2 ** 24


class Drawn:
    """The toy picture of an index as its description says, in float64: everything but the object's outline."""
    colours = [(0.9, 0.3, 0.25), (0.3, 0.75, 0.3), (0.3, 0.45, 0.95), (0.9, 0.8, 0.25), (0.85, 0.4, 0.85),
               (0.3, 0.8, 0.85)]

    def __init__(self, index, S, train):
        u = [unit(index, 9, k, 2 if train else 1) for k in range(9)]
        self.radius, self.turn = 0.26 + 0.14 * u[0], math.radians(-12 + 24 * u[1])
        self.centre = [self.radius + (1 - 2 * self.radius) * u[k] for k in (5, 6)]  # the unit disk stays in the picture
        self.y, self.x = np.mgrid[0:S, 0:S] / S + 0.5 / S               # pixel centres, picture widths
        tilt = math.pi * u[3]
        waves = (6 + 2 * u[2]) * (self.x * math.cos(tilt) + self.y * math.sin(tilt)) + u[4]
        self.object = np.array(self.colours[int(6 * u[7])])[:, None, None] * (0.85 + 0.15 * np.sin(2 * math.pi * waves))
        self.ground = 0.06 + 0.12 * u[8]

    def place(self, points):
        """Points of the object's unit disk -> picture widths: turned, enlarged, moved."""
        c, s, r, (x0, y0) = math.cos(self.turn), math.sin(self.turn), self.radius, self.centre
        return [(x0 + r * (c * x - s * y), y0 + r * (s * x + c * y)) for x, y in points]

    def picture(self, inside):
        """Coverage (S, S) -> (3, S, S) in [-1, 1], without the grain."""
        return 2 * (self.ground + inside * (self.object - self.ground)) - 1


def test_toy_pixels_against_plain_integers():
    # as published
    assert [splitmix(i) for i in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    S = 16
    for index, train in ((12, False), (12, True), (999_992, False)):    # 2 modulo 10: a square of half side 0.72
        d = Drawn(index, S, train)
        x, y = (d.x - d.centre[0]) / d.radius, (d.y - d.centre[1]) / d.radius
        x, y = x * math.cos(d.turn) + y * math.sin(d.turn), y * math.cos(d.turn) - x * math.sin(d.turn)
        distance = np.maximum(abs(x), abs(y)) - 0.72
        inside = np.clip(0.5 - distance * d.radius * S, 0, 1)           # a ramp of one pixel
        grain = np.array([unit(index, S * S, k, 4 if train else 3) - 0.5 for k in range(S * S)]).reshape(S, S)
        img, label = open_images("toy", S, train)[index]
        assert label == 2 and img.dtype == torch.float32
        assert abs(img.numpy() - (d.picture(inside) + 2 * 0.02 * grain)).max() < 1e-4


def rectangle(x, y, a, b):
    return [(x - a, y - b), (x + a, y - b), (x + a, y + b), (x - a, y + b)]


def disk(x, y, r):
    angle = np.linspace(0, 2 * math.pi, 361)
    return [*zip(x + r * np.cos(angle), y + r * np.sin(angle))]


# a tip upwards
STAR = [(r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k, r in enumerate((1, 0.45) * 5)]
OUTLINES = {        # polygons in the unit disk, y down: (1, drawn) or (0, cut out again)
    "disk": [(1, disk(0, 0, 0.85))],
    "ring": [(1, disk(0, 0, 0.92)), (0, disk(0, 0, 0.48))],
    "square": [(1, rectangle(0, 0, 0.72, 0.72))],
    "triangle": [(1, [(0, -0.9), (0.866, 0.6), (-0.866, 0.6)])],
    "plus": [(1, rectangle(0, 0, 0.28, 0.92)), (1, rectangle(0, 0, 0.92, 0.28))],
    "star": [(1, STAR)],
    "moon": [(1, disk(0, 0, 0.9)), (0, disk(0.45, 0, 0.72))],
    "hourglass": [(1, [(-0.94, -0.88), (0.94, -0.88), (0.06, 0), (0.94, 0.88), (-0.94, 0.88), (-0.06, 0)])],
    "heart": [(1, disk(-0.42, -0.3, 0.48)), (1, disk(0.42, -0.3, 0.48)),
              (1, [(-0.42, -0.3), (-0.76, 0.04), (0, 0.8), (0.76, 0.04), (0.42, -0.3)])],
    "bars": [(1, rectangle(0, -0.52, 0.85, 0.26)), (1, rectangle(0, 0.52, 0.85, 0.26))],
}


def test_toy_objects_are_the_outlines_drawn_by_pillow():
    S, fine = 160, 8
    data = open_images("toy", S)
    assert data.classes == list(OUTLINES) and data.num_classes == 10
    img, label = data.get_batch(range(160, 170), None)             # all six colours
    assert label.tolist() == list(range(10)) and label.dtype == torch.int64  # the class: the index modulo 10
    for k, polygons in enumerate(OUTLINES.values()):
        d = Drawn(160 + k, S, False)
        mask = Image.new("L", (fine * S, fine * S))
        for ink, polygon in polygons:
            corners = [(fine * S * x - 0.5, fine * S * y - 0.5) for x, y in d.place(polygon)]
            ImageDraw.Draw(mask).polygon(corners, 255 * ink)
        inside = np.asarray(mask).reshape(S, fine, S, fine).mean((1, 3)) / 255
        off = abs(img[k].numpy() - d.picture(inside)).max(0) / np.ptp(d.picture(1.0) - d.picture(0.0), 0).max()
        around = np.lib.stride_tricks.sliding_window_view(np.pad(inside, 1, "edge"), (3, 3))
        plain = around.max((2, 3)) == around.min((2, 3))                # all nine pixels in or out: only the grain
        assert abs(img[k].numpy() - d.picture(inside))[:, plain].max() < 0.0201, data.classes[k]
        soft = (img[k].numpy() - d.picture(0.0)).sum(0) / (d.picture(1.0) - d.picture(0.0)).sum(0)
        width = (soft * (1 - soft))[~plain].sum() / (inside * (1 - inside))[~plain].sum()
        assert off[~plain].mean() < 0.045 and 0.9 < width < 1.1, data.classes[k]


def test_toy_is_a_function_of_the_index(one_thread):
    data = open_images("toy", 32)
    img, label = data.get_batch([5, 17, 999_999], [0, 0, 0])
    for k, i in enumerate((5, 17, 999_999)):
        assert torch.equal(img[k], data[i][0]) and torch.equal(img[k], picture(data, i, 3))
        assert int(label[k]) == data[i][1] == i % 10 and isinstance(data[i][1], int)
    assert len(data) == 1_000_000 and img.min() > -1.02 and img.max() < 1.02 and img.shape == (3, 3, 32, 32)
    train = open_images("toy", 32, train=True).get_batch(range(50), None)[0]
    other = data.get_batch(range(50), None)[0]
    # no picture of one set is near one of the other
    assert (train[:, None] - other[None]).abs().amax((2, 3, 4)).min() > 0.1
    for i in (-1, 1_000_000):
        with pytest.raises(IndexError):
            data[i]
    seconds = []
    for _ in range(5):
        start = time.process_time()
        data.get_batch(range(200), None)
        seconds.append(time.process_time() - start)
    assert 200 / min(seconds) > 1000                                    # thousands a second; slack for a busy machine


def test_toy_is_the_same_picture_at_any_size():
    big, small = (open_images("toy", s).get_batch(range(20), None)[0] for s in (128, 32))
    assert (F.avg_pool2d(big, 4) - small).abs().mean() < 0.02 and open_images("toy", 17)[0][0].shape == (3, 17, 17)


def test_toy_classes_are_apart():
    """Nearest neighbour on the outlines, moved and scaled to one box: no colour, no texture, no learning."""
    def outlines(data, n):
        img, label = data.get_batch(range(n), None)
        on = img.amax(1) > -0.25                                        # (n, S, S)
        out = []
        for m in on:
            ys, xs = m.any(1).nonzero(), m.any(0).nonzero()
            cut = m[ys.min():ys.max() + 1, xs.min():xs.max() + 1].float()
            out.append(F.interpolate(cut[None, None], size=(24, 24), mode="bilinear")[0, 0].flatten())
        return torch.stack(out), label
    x, y = outlines(open_images("toy", 32, train=True), 400)
    u, v = outlines(open_images("toy", 32), 100)
    assert (y[torch.cdist(u, x).argmin(1)] == v).float().mean() > 0.97


# --------------------------------------------------------------------------------------------------------------------
# Sheets of pictures, and the figure command

def write(text, size):
    """Black on white at (0, 0), by pillow's own font."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text((0, 0), text, "black", ImageFont.load_default(10))
    return np.asarray(image)


def test_save_grid(tmp_path):
    tiles = [noise(20, 10, 3, seed=k) for k in range(4)] + [noise(12, 30, 3)]
    A.save_grid(tiles, tmp_path / "x.png", 2, ["one", "two"], ["a", "bc", "def"])
    sheet = np.asarray(Image.open(tmp_path / "x.png"))
    left, top = 8 + 6 * 3, 14                                           # room for the captions
    # 2: at most 64 pixels; 3 rows; gaps of 2
    assert sheet.shape == (top + 3 * (2 * 20 + 2), left + 2 * (2 * 30 + 2), 3)
    white = np.full(sheet.shape, 255)
    for k, tile in enumerate(tiles):
        y, x = top + k // 2 * 42, left + k % 2 * 62
        white[y:y + 2 * len(tile), x:x + 2 * tile.shape[1]] = np.kron(tile, np.ones((2, 2, 1)))
    for k, text in enumerate(("one", "two")):
        white[1:14, left + 62 * k + 2:left + 62 * k + 42] = write(text, (40, 13))
    for k, text in enumerate(("a", "bc", "def")):
        y = top + 42 * k + 20 - 6
        white[y:y + 14, 2:left] = write(text, (left - 2, 14))
    assert (sheet == white).all()
    A.save_grid(torch.from_numpy(noise(3, 70, 65, 3)), tmp_path / "y.png", 4)  # no captions, no enlargement
    sheet = np.asarray(Image.open(tmp_path / "y.png"))
    assert sheet.shape == (72, 4 * 67, 3) and (sheet[:70, 67:132] == noise(3, 70, 65, 3)[1]).all()


def bytes_of(x):
    """float (3, H, W) -> uint8 (H, W, 3)"""
    return np.rint((x.numpy().clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)


def stretched(x):
    """A map (h, w) -> 0 to 255, black where it is least."""
    x = x.double().numpy()
    return np.rint((x - x.min()) / max(np.ptp(x), 1e-12) * 255)[..., None] + np.zeros(3)


@torch.no_grad()
def test_figures_command(tmp_path, capsys):
    models = tiny(c=10), tiny(c=9, seed=1)
    for name, ae in zip("ab", models):
        (tmp_path / name).mkdir()
        save_ours(ae, tmp_path / name / "ckpt.pt")
    # no multiples of 16; less than 16; just 16
    photos = noise(45, 70, 3), noise(9, 11, 3, seed=1), noise(16, 21, 3, seed=2)
    files = [str(tmp_path / f"{name}.png") for name in ("photo_of_a_cat_on_a_mat", "small", "just")]
    for file, photo in zip(files, photos):
        Image.fromarray(photo).save(file)
    out = tmp_path / "out" / "x"
    models_at = ["--ckpt", str(tmp_path / "a"), "--ckpt2", str(tmp_path / "b")]
    A.main([*files, "toy", *models_at, "--out", str(out), "--device", "cpu"])
    assert "reconstruction.png, channel_average.png, latent_*.png" in capsys.readouterr().out
    latents = [f"latent_{i}_{w}.png" for i in range(7) for w in "AB"]
    assert {p.name for p in out.iterdir()} == {"reconstruction.png", "channel_average.png", *latents}

    sheets = [np.asarray(Image.open(out / f"{name}.png")).astype(int) for name in ("reconstruction", "channel_average")]
    channels = [1, 2, 4, 9]                                              # c/8, c/4, c/2, c of the smaller c, each once
    left, top, H, W = 8 + 6 * len("photo_of_a_c A"), 14, 45, 70
    toy = open_images("toy", 32)                                        # the size that the checkpoint was trained at
    pictures = [(toy.classes[i], toy[i][0]) for i in range(4)]
    for name, x in zip(("just", "small", "photo_of_a_c"), reversed(photos)):
        pictures.insert(0, (name, torch.from_numpy(x).permute(2, 0, 1) / 127.5 - 1))
    assert all(sheet.shape == (top + 14 * (H + 2), left + 5 * (W + 2), 3) for sheet in sheets)
    for sheet in sheets:
        for k, title in enumerate(("input", "c'=1", "c'=2", "c'=4", "c'=9")):
            assert (sheet[1:14, left + 72 * k + 2:left + 72 * k + 70] == write(title, (68, 13))).all()
    for row in range(14):
        (name, img), ae = pictures[row // 2], models[row % 2]           # both models of a picture, A above B
        h, w = img.shape[1:]
        y = top + row * (H + 2)
        padded = np.pad(img.numpy(), ((0, 0), (0, -h % 16), (0, -w % 16)), "edge" if h < 16 else "reflect")
        z = ae.encode(torch.from_numpy(padded)[None])
        recs = [bytes_of(ae.decode(z[:, :k])[0, :, :h, :w]) for k in channels]
        means = [np.kron(stretched(z[0, :k].mean(0)), np.ones((16, 16, 1)))[:h, :w] for k in channels]
        caption = write(f"{name} {'AB'[row % 2]}", (left - 2, 14))
        for sheet, tiles in zip(sheets, (recs, means)):
            assert (sheet[y + 16:y + 30, 2:left] == caption).all()
            for k, tile in enumerate([bytes_of(img), *tiles]):
                got = sheet[y:y + h, left + 72 * k:left + 72 * k + w]
                assert abs(got - tile).max() <= (k > 0) and (got == tile).mean() > 0.99, (row, k)
        latent = np.asarray(Image.open(out / latents[row])).astype(int)
        n = max(1, 64 // max(z.shape[2:]))
        hz, wz = n * z.shape[2], n * z.shape[3]
        ncol = 4 if ae is models[0] else 3                              # of 10 and 9 maps: the square root, rounded up
        assert latent.shape == (3 * (hz + 2), ncol * (wz + 2), 3)
        for k in range(ae.config.c):
            got = latent[k // ncol * (hz + 2):][:hz, k % ncol * (wz + 2):][:, :wz]
            assert abs(got - np.kron(stretched(z[0, k]), np.ones((n, n, 1)))).max() <= 1


def test_figures_of_one_model(tmp_path):
    save_ours(tiny(), tmp_path / "ckpt.pt")
    Image.fromarray(noise(45, 70, 3)).save(tmp_path / "photo.png")
    command = [str(tmp_path / "photo.png"), "--ckpt", str(tmp_path), "--out", str(tmp_path / "one")]
    A.main([*command, "--image_size", "32", "--channels", "2,8,2"])
    sheet = np.asarray(Image.open(tmp_path / "one" / "reconstruction.png"))
    left = 8 + 6 * len("photo")
    assert sheet.shape == (14 + 66, left + 3 * 66, 3)                   # a crop of 32, enlarged to 64; c' = 2, 8
    assert (sheet[14:78:2, left:left + 64:2] == np.asarray(center_crop(Image.fromarray(noise(45, 70, 3)), 32))).all()
    assert (sheet[14 + 26:14 + 40, 2:left] == write("photo", (left - 2, 14))).all()
    assert (tmp_path / "one" / "latent_0_A.png").exists()
    torch.save(official(small().state_dict(), "1.5"), tmp_path / "ckpt.pt")  # not known what it was trained at
    for more, size, columns in ((["--channels", "4"], 256, 2), (["--image_size", "80"], 80, 4)):
        A.main(["toy", *command[1:], *more])                            # of c = 4 channels: 1, 1, 2, 4
        sheet = Image.open(tmp_path / "one" / "reconstruction.png")
        assert sheet.size == (8 + 6 * len("triangle") + columns * (size + 2), 14 + 4 * (size + 2))


def test_figures_command_bad_input(tmp_path):
    save_ours(tiny(), tmp_path / "ckpt.pt")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    for args, word in ((["toy", "--channels", "9"], "--channels 9"), (["toy", "--image_size", "0"], "--image_size 0"),
                       (["toy", "--ckpt", "nowhere"], "nowhere"), ([str(tmp_path / "broken.png")], "broken.png"),
                       ([str(tmp_path / "nowhere.png")], "nowhere.png")):
        command = ["--ckpt", str(tmp_path), "--out", str(tmp_path / "out"), *args]
        one_line(lambda: A.main(command), word, folder=tmp_path)
    (tmp_path / "file").write_text("x")
    for args, word in ((["--image_size", "-1"], "--image_size -1"), (["--image_size", str(10**9)], "--image_size"),
                       (["--image_size", "x"], "--image_size"), (["--device", "gpu"], "--device gpu"),
                       (["--device", "meta"], "--device meta"), (["--device", "cuda:99"], "--device cuda:99"),
                       (["--out", str(tmp_path / "file")], "--out"), (["--out", str(tmp_path / "file" / "x")], "--out"),
                       (["--unknown"], "--unknown"), (["nowhere.png"], "nowhere.png: no such image"),
                       ([str(tmp_path)], "no such image")):
        command = [*args, "--ckpt", "nowhere"]
        if word.startswith("--"):
            command = ["toy", "--out", str(tmp_path / "out"), *command]
        else:
            command += ["--out", str(tmp_path / "out")]
        one_line(lambda: A.main(command), word, folder=tmp_path)        # before the checkpoint is looked for
    for flag, value, word in (("--channels", "x", "--channels x"), ("--channels", "0", "--channels 0"),
                              ("--ckpt2", "nowhere", "nowhere: no such")):
        command = ["toy", "--ckpt", str(tmp_path), "--out", str(tmp_path / "out"), flag, value]
        one_line(lambda: A.main(command), word)
    for args in (["toy", "--ckpt", "x"], ["toy", "--out", "x"], ["--ckpt", "x", "--out", "x"]):
        one_line(lambda: A.main(args), "required", "--help")
