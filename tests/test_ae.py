"""python -m pytest tests/test_ae.py        (CPU, no downloads, under a minute)"""
import hashlib
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ae as A
from ae import (DCAE, AEConfig, InputError, center_crop, channel_mask, open_images, parse_channels, read_checkpoint,
                read_image, to_uint8)

TINY = dict(encoder_depths=(0, 1, 1, 1, 1), decoder_depths=(0, 1, 1, 1, 1))


def tiny(version="1.5", c=8, seed=0, **more):
    """f16, random weights that leave no branch at zero."""
    torch.manual_seed(seed)
    ae = DCAE(AEConfig(f=16, c=c, version=version, width=16, **{**TINY, **more}))
    for name, t in ae.state_dict().items():
        if t.is_floating_point():
            t.copy_(torch.randn(t.shape) / math.sqrt(t[0].numel()) if t.dim() > 1 else 0.1 * torch.randn(t.shape))
            if name.endswith(("norm.weight", "running_var")):
                t.abs_().add_(1)
    return ae.eval()


def official(state, version):
    """Our names -> published names; 1.0 wraps its two latent projections in .main because of their shortcuts."""
    names = {A.rename(name, A.OURS, A.OFFICIAL): t for name, t in state.items()}
    if version == "1.0":
        names = {n.replace("encoder.project_out.", "encoder.project_out.main.").replace("decoder.project_in.", "decoder.project_in.main."): t
                 for n, t in names.items()}
    return names


def save_ours(ae, path, **more):
    torch.save({"kind": "ae", "config": asdict(ae.config), "model": ae.state_dict(), "scale": 0.5, "image_size": 32, "step": 7,
                "channels": [4, 8], **more}, path)


def one_line(call, *words):
    """The call fails with one line under 200 characters that holds the words."""
    with pytest.raises(InputError) as e:
        call()
    text = str(e.value)
    assert "\n" not in text and len(text) < 200 and all(word in text for word in words), text


# --------------------------------------------------------------------------------------------------------------------
# Structure: facts of the published models (DC-Gen @cae2205, their tensor lists hashed)

PUBLISHED = [   # f, c, version, parameters, official tensors: number, hash; diffusers tensors: number, hash
    (32, 32, "1.0", 323356460, 338, "6a85fb48c5c4741c", 362, "cee2c5d7f2730330"),
    (64, 128, "1.0", 676896140, 386, "df87969a63eabeb1", 418, "0409824763060178"),
    (128, 512, "1.0", 1120682252, 434, "fe7f929176f36236", 474, "7ca1c14eef0a730f"),
    (32, 128, "1.5", 523609740, 296, "f269541da2444362", 296, "6547e83be94f3f40"),
    (64, 128, "1.5", 714741644, 340, "4c1361c9a78d145c", 340, "ec385284a63ddff7"),
]


def name_hash(state):
    lines = sorted(f"{name} {list(t.shape)}" for name, t in state.items())
    return len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@pytest.mark.parametrize("f, c, version, params, n_off, hash_off, n_dif, hash_dif", PUBLISHED)
def test_published_models_exactly(f, c, version, params, n_off, hash_off, n_dif, hash_dif):
    with torch.device("meta"):
        ae = DCAE(AEConfig(f=f, c=c, version=version))
    assert sum(p.numel() for p in ae.parameters()) == params
    theirs = official(ae.state_dict(), version)
    assert name_hash(theirs) == (n_off, hash_off)
    assert name_hash(A.to_diffusers(ae.state_dict())) == (n_dif, hash_dif)
    assert A.read_config(A.to_ours(theirs, "x"), "x") == ae.config                  # the configuration is read off the tensors


def test_any_power_of_two_any_c_any_width():
    for f, c, version, width in ((4, 3, "1.5", 4), (8, 5, "1.5", 20), (256, 1000, "1.5", 128), (4, 4, "1.0", 8), (512, 64, "1.0", 32)):
        with torch.device("meta"):
            ae = DCAE(AEConfig(f=f, c=c, version=version, width=width))
            assert ae.encode(torch.empty(1, 3, f, 2 * f)).shape == (1, c, 1, 2)
            assert ae.decode(torch.empty(1, c, 1, 2)).shape == (1, 3, f, 2 * f)


# --------------------------------------------------------------------------------------------------------------------
# Golden numbers: outputs of the authors' code on sine weights and sine images in float64 (facts/golden.json, DC-Gen @cae2205):
# mean, std, sum of out_i * sin(i / 10), out_0, out_1, out_last of encode(image), decode(encode(image)), decode(latent_probe)

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
    ours = {name: A.rename(name, A.OURS, A.OFFICIAL) for name in ae.state_dict()}
    theirs = official({name: name for name in ours}, config.version)                # official name -> ours
    for k, name in enumerate(sorted(theirs)):
        t = ae.state_dict()[theirs[name]]
        s = torch.sin(0.37 * torch.arange(t.numel(), dtype=torch.float64) + 1.1 * k).view(t.shape)
        if name.endswith("num_batches_tracked"):
            t.zero_()
        elif t.dim() > 1:
            t.copy_(s / math.sqrt(t[0].numel()))
        else:
            t.copy_(1 + 0.1 * s if name.endswith(".weight") else 1 + 0.1 * s ** 2 if name.endswith("running_var") else 0.05 * s)
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
            for x, numbers in zip((z[:, :c_prime], ae.decode(z[:, :c_prime]), ae.decode(probe[:, :c_prime])), want):
                agree(x, numbers)
            agree(ae(image, c_prime=c_prime), want[1])                              # Eq. 1 is the published slicing


# --------------------------------------------------------------------------------------------------------------------
# The mask

@pytest.mark.parametrize("version", ["1.0", "1.5"])
@torch.no_grad()
def test_mask_is_slice(version):
    ae, img = tiny(version), torch.randn(2, 3, 32, 64)
    z = ae.encode(img)
    assert channel_mask(8, 3).flatten().tolist() == [1, 1, 1, 0, 0, 0, 0, 0] and channel_mask(8, 3).shape == (1, 8, 1, 1)
    for k in (1, 3, 8):
        assert torch.equal(ae(img, c_prime=k), ae.decode(z[:, :k]))
        assert torch.equal(ae.decode(z * channel_mask(8, k)), ae.decode(z[:, :k]))
    assert torch.equal(ae(img), ae.decode(z))
    assert not torch.equal(ae(img, c_prime=3), ae(img))
    if version == "1.5":                                                            # and slicing the weights says the same
        w, b = ae.decoder.project_in.weight, ae.decoder.project_in.bias
        torch.testing.assert_close(F.conv2d(z[:, :3], w[:, :3], b, padding=1), ae.decoder.project_in(z * channel_mask(8, 3)))


def test_masked_channels_get_no_gradient():
    ae = tiny()
    ae(torch.randn(1, 3, 32, 32), c_prime=3).square().mean().backward()
    assert ae.encoder.project_out.weight.grad[3:].abs().max() == 0 < ae.encoder.project_out.weight.grad[:3].abs().max()
    assert ae.decoder.project_in.weight.grad[:, 3:].abs().max() == 0


def test_fresh_blocks_are_the_identity_and_all_parameters_learn():
    for version in ("1.0", "1.5"):
        for shortcuts in (True, False):
            ae = DCAE(AEConfig(f=16, c=8, version=version, width=16, shortcuts=shortcuts, **TINY))
            x = torch.randn(2, ae.config.encoder_widths[3], 4, 4)
            assert torch.equal(ae.encoder.stages[3][0](x), x)
            opt = torch.optim.SGD(ae.parameters(), 0.1)
            for _ in range(2):
                opt.zero_grad()
                (ae(torch.rand(2, 3, 32, 32)) - 1).abs().mean().backward()
                opt.step()
            assert all(p.grad.abs().sum() > 0 for p in ae.parameters())


@torch.no_grad()
def test_shortcuts_switch():
    on, off = tiny("1.0"), tiny("1.0", shortcuts=False)
    off.load_state_dict(on.state_dict())                                            # non-parametric: the tensors are the same
    x, y = torch.randn(1, 32, 8, 8), torch.randn(1, 64, 4, 4)
    down, up = on.encoder.stages[1][-1], on.decoder.stages[1][0]
    bare = lambda m, x: {True: F.pixel_unshuffle, False: F.pixel_shuffle}[m is down](m.conv(x), 2)
    # by loops: output channel o averages group o of the unshuffled input; output channel o of the shuffle repeats inputs
    u = F.pixel_unshuffle(x, 2)
    want = torch.stack([u[:, 2 * o:2 * o + 2].mean(1) for o in range(64)], 1)
    torch.testing.assert_close(down(x) - bare(down, x), want, atol=1e-5, rtol=0)
    want = F.pixel_shuffle(torch.stack([y[:, o // 2] for o in range(128)], 1), 2)
    torch.testing.assert_close(up(y) - bare(up, y), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(off.encoder.stages[1][-1](x), bare(down, x))
    img = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(on.encode(img), off.encode(img))


# --------------------------------------------------------------------------------------------------------------------
# Attention and norms in low precision

def test_linear_attention_never_nan_and_equals_the_quadratic_form():
    torch.manual_seed(0)
    m = A.LinearAttention(64)
    torch.nn.init.ones_(m.norm.weight)
    x = torch.randn(2, 64, 5, 7)
    q, k, v = m.qkv(x).view(2, 2, 96, 35).chunk(3, 2)                               # per head: q, k, v
    att = F.relu(k).mT @ F.relu(q)                                                  # (keys, queries)
    out = v @ (att / (att.sum(2, keepdim=True) + 1e-15))
    torch.testing.assert_close(m(x), x + m.norm(m.proj(out.reshape(2, 64, 5, 7))), atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        m.qkv.weight.view(2, 96, -1)[:, :64] = -m.qkv.weight.view(2, 96, -1)[:, :64].abs()       # q = k = 0 behind the ReLU
    x = torch.rand(2, 64, 16, 16).requires_grad_()
    y = m(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in m.parameters())


def test_bf16_autocast_is_close_and_finite():
    ae, img = tiny("1.0"), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exact = ae(img)
        with torch.autocast("cpu", torch.bfloat16):
            fast = ae(1.0 * img)
    assert fast.isfinite().all() and F.mse_loss(fast.float(), exact) < 0.01 * exact.var()
    m = A.LinearAttention(32)
    with torch.autocast("cpu", torch.bfloat16):
        assert m(1e4 * torch.randn(1, 32, 64, 64)).isfinite().all()


def test_rms_norm_is_over_channels():
    m, x = A.RMSNorm(6), torch.randn(2, 6, 3, 4)
    with torch.no_grad():
        m.weight.copy_(torch.arange(6.0)), m.bias.copy_(torch.randn(6))
    want = F.rms_norm(x.movedim(1, -1), (6,), m.weight, 1e-5) + m.bias
    torch.testing.assert_close(m(x), want.movedim(-1, 1))


# --------------------------------------------------------------------------------------------------------------------
# Peers and files

def diffusers_dc():
    return pytest.importorskip("diffusers").AutoencoderDC


@pytest.mark.parametrize("version", ["1.0", "1.5"])
@torch.no_grad()
def test_equals_diffusers(version, tmp_path):
    ae = tiny(version, decoder_depths=(0, 2, 1, 2, 1))
    ae.scale = 0.25
    ae.save_pretrained(tmp_path)
    peer = diffusers_dc().from_pretrained(tmp_path).eval()
    assert peer.config.scaling_factor == 0.25
    for h, w in ((32, 80), (64, 16)):
        img = torch.randn(2, 3, h, w)
        z, z_peer = ae.encode(img), peer.encode(img).latent
        assert z.shape == (2, 8, h // 16, w // 16)
        assert (z - z_peer).abs().max() < 1e-4 * z.abs().max()
        rec, rec_peer = ae.decode(z), peer.decode(z).sample
        assert (rec - rec_peer).abs().max() < 1e-4 * rec.abs().max()


@pytest.mark.parametrize("version", ["1.0", "1.5"])
def test_published_to_ours_to_diffusers_to_ours(version, tmp_path):
    st = pytest.importorskip("safetensors.torch")
    ae = tiny(version)
    published, folder = official(ae.state_dict(), version), tmp_path / "dc-ae-f64c128-1.5"
    folder.mkdir()
    st.save_file({k: v.contiguous() for k, v in published.items()}, folder / "model.safetensors")
    torch.save(published, tmp_path / "weights.bin")
    a, b = DCAE.from_pretrained(folder), DCAE.from_pretrained(tmp_path / "weights.bin")
    assert a.scale == 0.5935 and b.scale == 1.0 and not a.training and all(p.requires_grad for p in a.parameters())
    a.save_pretrained(tmp_path / "diffusers")
    c = DCAE.from_pretrained(str(tmp_path / "diffusers"))
    assert c.scale == 0.5935
    for x in (a, b, c):
        assert x.config == ae.config
        assert all(torch.equal(t, u) for t, u in zip(ae.state_dict().values(), x.state_dict().values()))
        assert list(x.state_dict()) == list(ae.state_dict())


def test_our_checkpoint(tmp_path):
    ae = tiny(shortcuts=False)
    save_ours(ae, tmp_path / "ckpt.pt", optimiser={"state": {}})
    for x in (tmp_path, tmp_path / "ckpt.pt"):
        b = DCAE.from_pretrained(x)
        assert b.config == ae.config and b.scale == 0.5 and b.info == {"image_size": 32, "step": 7, "channels": [4, 8]}
        assert A.fingerprint(b) == A.fingerprint(ae)
    assert read_checkpoint(tmp_path)["step"] == 7
    with torch.no_grad():
        b.decoder.project_in.bias[0] += 1e-6
    assert A.fingerprint(b) != A.fingerprint(ae)
    assert DCAE.from_pretrained(tmp_path).decoder.project_in.bias[0] == ae.decoder.project_in.bias[0]      # the file is not touched
    assert A.open_autoencoder(tmp_path).config == ae.config


@torch.no_grad()
def test_diffusers_kl_stands_in(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    kl = diffusers.AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, scaling_factor=0.3, shift_factor=0.1,
                                 down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2).eval()
    kl.save_pretrained(tmp_path)
    ae, img = A.open_autoencoder(str(tmp_path)), torch.randn(1, 3, 16, 16)
    assert (ae.config.f, ae.config.c, ae.scale) == (2, 4, 0.3)
    z = ae.encode(img)
    torch.testing.assert_close(z * ae.scale, (kl.encode(img).latent_dist.mean - 0.1) * 0.3)
    torch.testing.assert_close(ae.decode(z), kl.decode(z * 0.3 / 0.3 + 0.1).sample)


@pytest.fixture
def one_thread():
    """Times of a process count the threads that spin at barriers; beside another job that is most of them."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def test_training_step_is_no_slower_than_diffusers(tmp_path, one_thread):
    """Timed in turn in one process; the median ratio, with room for a noisy machine."""
    for version in ("1.0", "1.5"):
        ae = tiny(version)
        ae.save_pretrained(tmp_path / version)
        peer, img = diffusers_dc().from_pretrained(tmp_path / version), torch.randn(2, 3, 64, 64)

        def seconds(step):
            t = time.process_time()
            (step(img) - img).abs().mean().backward()
            return time.process_time() - t
        ae.train(), peer.train()
        times = [(seconds(ae), seconds(lambda x: peer(x).sample)) for _ in range(13)][2:]
        ratio = np.median([a for a, _ in times]) / np.median([b for _, b in times])
        print(f"DC-AE {version}: a training step takes {ratio:.2f} x diffusers'")
        assert ratio < 1.15, ratio


def test_hub_name_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(url, dst, **_):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    one_line(lambda: DCAE.from_pretrained("dc-ai/dc-ae-f64c128-1.5"), "https://huggingface.co/dc-ai/dc-ae-f64c128-1.5/", "model.safetensors")

    ae = tiny()
    ae.scale = 0.5

    def online(url, dst, **_):                                                      # what the hub would hold
        ae.save_pretrained(tmp_path / "hub")
        Path(dst).write_bytes((tmp_path / "hub" / url.split("/")[-1]).read_bytes())
    monkeypatch.setattr(torch.hub, "download_url_to_file", online)
    name = "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers"
    assert DCAE.from_pretrained(name).scale == 0.5
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert A.fingerprint(DCAE.from_pretrained(name)) == A.fingerprint(ae)           # cached: no second download


# --------------------------------------------------------------------------------------------------------------------
# Bad input: one line each

@pytest.mark.parametrize("kw, word", [
    (dict(f=48), "--f 48"), (dict(f=2), "--f 2"), (dict(c=0), "--c 0"), (dict(version="2.0"), "--version 2.0"), (dict(width=1), "--width 1"),
    (dict(c=96, version="1.0"), "--c 96"), (dict(f=32, c=16, version="1.0", width=12), "--width 12"),
    (dict(f=8, encoder_widths=(8, 16)), "f=8"), (dict(f=8, encoder_depths=(1, 1, 1, 1)), "depth"),
    (dict(f=8, decoder_widths=(8, 16, 48, 64)), "decoder"),
])
def test_impossible_configurations(kw, word):
    one_line(lambda: AEConfig(**kw), word)


def test_bad_files_and_shapes(tmp_path):
    ae = tiny()
    one_line(lambda: ae.encode(torch.zeros(1, 3, 30, 32)), "f=16")
    one_line(lambda: ae.decode(torch.zeros(1, 9, 2, 2)), "c=8")
    one_line(lambda: ae(torch.zeros(1, 3, 32, 32), c_prime=9), "c_prime=9")
    one_line(lambda: DCAE.from_pretrained(tmp_path / "nowhere"), "nowhere")
    one_line(lambda: DCAE.from_pretrained(tmp_path), str(tmp_path))
    file = tmp_path / "ckpt.pt"
    save_ours(ae, file)
    whole = file.read_bytes()
    for content in (b"", b"hello, this is a text", whole[:len(whole) // 2]):
        file.write_bytes(content)
        one_line(lambda: DCAE.from_pretrained(file), "ckpt.pt")
        one_line(lambda: read_checkpoint(tmp_path), "ckpt.pt")
    for content in ([1, 2], {"w": torch.zeros(3)}, {"layer.weight": torch.zeros(3)}, {"kind": "diffusion"}, {}):
        torch.save(content, file)
        one_line(lambda: DCAE.from_pretrained(file), "ckpt.pt")
    one_line(lambda: read_checkpoint(tmp_path), "ckpt.pt", "not a checkpoint")
    state = official(ae.state_dict(), "1.5")
    torch.save({k: v for k, v in state.items() if "conv1" not in k}, file)
    one_line(lambda: DCAE.from_pretrained(file), "ckpt.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"1234567890")
    one_line(lambda: DCAE.from_pretrained(tmp_path / "cut.safetensors"), "cut.safetensors")
    one_line(lambda: tiny(shortcuts=False).save_pretrained(tmp_path / "x"), "shortcuts")
    one_line(lambda: open_images(tmp_path / "nowhere", 32), "--data", "nowhere")
    one_line(lambda: open_images(tmp_path, 32), "no images")
    one_line(lambda: open_images("toy", 0), "--image_size 0")


def test_input_error_prints_one_line_and_exits_1():
    run = subprocess.run([sys.executable, "-c", "from ae import AEConfig; AEConfig(f=3)"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and "--f 3" in run.stderr


def test_parse_channels():
    assert parse_channels("16:128:4", 128) == list(range(16, 129, 4)) == parse_channels(None, 128)
    assert parse_channels("32,16,16", 64) == [16, 16, 32] and parse_channels("8", 64) == [8] and parse_channels(None, 32) == [16, 20, 24, 28, 32]
    assert parse_channels(None, 16) == [16] and parse_channels(None, 8) == [8] and parse_channels("1:3", 8) == [1, 2, 3]
    for bad in ("0,4", "129", "8:4:1", "", "x", "1:2:3:4:5", "4:8:0"):
        one_line(lambda: parse_channels(bad, 128), "--channels")


# --------------------------------------------------------------------------------------------------------------------
# Images in and out

def test_reading_any_mode(tmp_path):
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (10, 14, 3), dtype=np.uint8)
    img = Image.fromarray(rgb)

    def reread(image, name, **kw):
        image.save(tmp_path / name, **kw)
        out = read_image(tmp_path / name)
        assert out.mode == "RGB"
        return np.asarray(out).astype(int)
    assert (reread(img, "a.png") == rgb).all()
    grey = np.asarray(img.convert("L"))
    assert (reread(img.convert("L"), "l.png") == grey[..., None]).all()
    assert (reread(img.convert("1"), "1.png") == np.asarray(img.convert("1").convert("RGB"))).all()
    deep = grey.astype(np.uint16) * 257                                             # 16 bit: full scale stays full scale
    assert (reread(Image.fromarray(deep), "16.png") == grey[..., None]).all()
    palette = img.quantize(16)
    assert (reread(palette, "p.png") == np.asarray(palette.convert("RGB"))).all()
    alpha = np.concatenate([rgb, np.full((10, 14, 1), 128, np.uint8)], 2)
    want = rgb * (128 / 255) + 255 * (127 / 255)                                    # over white
    assert abs(reread(Image.fromarray(alpha), "rgba.png") - want).max() <= 1
    la = Image.fromarray(alpha).convert("LA")
    assert abs(reread(la, "la.png") - (np.asarray(la)[..., :1] * (128 / 255) + 127)).max() <= 1
    palette.info["transparency"] = 0
    assert (reread(palette, "pt.png", transparency=0)[np.asarray(palette) == 0] == 255).all()
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert abs(reread(flat, "cmyk.jpg", quality=95) - [255, 0, 0]).max() <= 6
    exif = Image.Exif()
    exif[0x0112] = 6                                                                # turn by 90 degrees to show
    assert (reread(img, "exif.png", exif=exif) == np.rot90(rgb, -1)).all()
    big = Image.new("RGB", (640, 400), "red")
    big.save(tmp_path / "big.jpg")
    assert read_image(tmp_path / "big.jpg", 64).size == (160, 100)                  # draft: 1/4, both sides still >= 64
    assert read_image(tmp_path / "big.jpg").size == (640, 400)


def test_center_crop_is_adms():
    for w, h, size in ((50, 77, 32), (200, 131, 32), (32, 32, 32), (20, 31, 32), (64, 64, 32), (127, 64, 32)):
        assert center_crop(Image.new("RGB", (w, h)), size).size == (size, size)
    exact = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    assert (np.asarray(center_crop(exact, 32)) == np.asarray(exact)).all()          # the right size: unchanged
    wide = np.zeros((32, 97, 3), np.uint8)
    wide[:, :, 0] = np.arange(97)
    assert (np.asarray(center_crop(Image.fromarray(wide), 32))[:, :, 0] == np.arange(32, 64)).all()        # floor((97 - 32) / 2)
    checks = Image.fromarray(np.tile(np.kron([[0, 200], [100, 40]], np.ones((1, 1))).astype(np.uint8)[..., None], (32, 32, 3)))
    assert (np.asarray(center_crop(checks, 32)) == 85).all()                        # 64 -> 32 is one box halving: the mean of 2x2


def test_to_uint8_clips_and_rounds():
    x = torch.tensor([-3.0, -1, -1 + 0.9 / 255, -1 + 1.1 / 255, 0.001, 1, 7]).view(1, 1, 1, 7).expand(1, 3, 1, 7)
    y = to_uint8(x)
    assert y.dtype == torch.uint8 and y.shape == (1, 1, 7, 3) and y[0, 0, :, 0].tolist() == [0, 0, 0, 1, 128, 255, 255]
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    back = torch.stack([A.to_float(Image.fromarray(t.numpy())) for t in every])
    assert torch.equal(to_uint8(back), every)                                       # uint8 -> float -> uint8 loses nothing
    noise = torch.rand(1, 3, 256, 256) * 2 - 1
    assert abs((to_uint8(noise).float() / 127.5 - 1).mean() - noise.mean()) < 1e-4  # truncation would be off by 1/255


def make_folder(root, n=3):
    rng = np.random.default_rng(0)
    for k, name in enumerate(("cat", "ant")):
        (root / name / "deep").mkdir(parents=True)
        for i in range(n):
            file = root / name / ("deep" if i == 0 else "") / f"{i}.{'JPG' if i % 2 else 'png'}"
            Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)).save(file)
    (root / ".hidden").mkdir()
    Image.new("RGB", (8, 8)).save(root / ".hidden" / "x.png")
    Image.new("RGB", (8, 8)).save(root / "cat" / "._1.png")
    (root / "cat" / "notes.txt").write_text("no image")


def test_class_folders_flat_folders_and_broken_images(tmp_path, capsys):
    make_folder(tmp_path / "data")
    data = open_images(tmp_path / "data", 32)
    assert data.classes == ["ant", "cat"] and data.num_classes == 2 and len(data) == 6 and [y for _, y in data] == [0, 0, 0, 1, 1, 1]
    img, label = data[0]
    assert img.shape == (3, 32, 32) and img.dtype == torch.float32 and -1 <= img.min() < img.max() <= 1 and isinstance(label, int)
    flat = open_images(tmp_path / "data" / "ant", 32)
    assert flat.num_classes == 1                                                    # ant/deep is a class folder of its own
    os.rename(tmp_path / "data" / "ant" / "deep" / "0.png", tmp_path / "data" / "ant" / "0.png")
    os.symlink(tmp_path / "data" / "cat", tmp_path / "data" / "dog")
    flat = open_images(tmp_path / "data" / "ant", 32)
    assert flat.num_classes == 0 and len(flat) == 3 and flat[1][1] == 0
    assert open_images(tmp_path / "data", 32).classes == ["ant", "cat", "dog"]      # symlinks are followed
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    assert next(iter(loader))[0].shape == (2, 3, 32, 32)

    capsys.readouterr()
    whole = (tmp_path / "data" / "cat" / "1.JPG").read_bytes()
    (tmp_path / "data" / "cat" / "1.JPG").write_bytes(whole[:200])
    (tmp_path / "data" / "ant" / "0.png").write_bytes(b"")
    data = open_images(tmp_path / "data", 32)
    first = [(x.clone(), y) for x, y in data]
    assert torch.equal(first[0][0], data[1][0])                                     # replaced by the next readable one
    for _ in data:
        pass
    err = capsys.readouterr().err
    assert err.count("1.JPG") == 2 and err.count("0.png: ") == 1                    # cat/1.JPG and dog/1.JPG, once each
    for file in (tmp_path / "data").rglob("*.*"):
        if file.suffix.lower() in (".png", ".jpg"):
            file.write_bytes(b"broken")
    one_line(lambda: open_images(tmp_path / "data", 32), "none of the 9 images")


def test_train_crops_follow_seed_and_key(tmp_path):
    make_folder(tmp_path)
    a, b = open_images(tmp_path, 32, train=True, seed=1), open_images(tmp_path, 32, train=True, seed=2)
    assert torch.equal(a.get(2, 5)[0], a.get(2, 5)[0]) and torch.equal(a[3][0], a.get(3, 3)[0])
    assert not torch.equal(a.get(2, 5)[0], a.get(2, 6)[0]) and not torch.equal(a.get(2, 5)[0], b.get(2, 5)[0])
    img, label = a.get_batch([0, 4], [7, 8])
    assert torch.equal(img[1], a.get(4, 8)[0]) and label.tolist() == [0, 1] and label.dtype == torch.int64
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 60, dtype=np.uint8)[None, :, None], (60, 1, 3)))
    flips, spans = 0, []
    for key in range(200):
        row = np.asarray(A.train_crop(ramp, 48, np.random.default_rng((0, key))))[24, :, 0].astype(int)
        flips += row[0] > row[-1]
        spans.append(abs(row[-1] - row[0]) / 255)
    assert 70 < flips < 130 and 0.74 < min(spans) < 0.82 and 0.95 < max(spans) < 1.01           # 1 / 1.25 to 1 of the short side


# --------------------------------------------------------------------------------------------------------------------
# Toy images

def test_toy_is_a_function_of_the_index(one_thread):
    data = open_images("toy", 32)
    img, label = data.get_batch([5, 17, 999_999], [0, 0, 0])
    for k, i in enumerate((5, 17, 999_999)):
        assert torch.equal(img[k], data[i][0]) and torch.equal(img[k], data.get(i, 3)[0]) and int(label[k]) == data[i][1]
    assert len(data) == 1_000_000 and data.num_classes == len(data.classes) == 10 and img.min() > -1.02 and img.max() < 1.02
    train = open_images("toy", 32, train=True).get_batch(range(200), None)[0]
    other = data.get_batch(range(200), None)[0]
    assert (train[:, None] - other[None]).abs().amax((2, 3, 4)).min() > 0.1         # no picture of one set is near one of the other
    pairs = data.__getitems__([3, 4])
    assert torch.equal(pairs[1][0], data[4][0]) and pairs[0][1] == data[3][1]
    with pytest.raises(IndexError):
        data[1_000_000]
    seconds = []
    for _ in range(5):
        start = time.process_time()
        data.get_batch(range(500), None)
        seconds.append(time.process_time() - start)
    assert 500 / min(seconds) > 1000                                                # thousands a second; slack for a busy machine


def test_toy_is_the_same_picture_at_any_size():
    big, small = (open_images("toy", s).get_batch(range(50), None)[0] for s in (128, 32))
    assert (F.avg_pool2d(big, 4) - small).abs().mean() < 0.02 and open_images("toy", 17)[0][0].shape == (3, 17, 17)


def test_toy_classes_are_apart():
    """Nearest neighbour on the outlines, moved and scaled to one box: no colour, no texture, no learning."""
    def outlines(data, n):
        img, label = data.get_batch(range(n), None)
        on = img.amax(1) > -0.25                                                    # (n, S, S)
        out = []
        for m in on:
            ys, xs = m.any(1).nonzero(), m.any(0).nonzero()
            cut = m[ys.min():ys.max() + 1, xs.min():xs.max() + 1].float()
            out.append(F.interpolate(cut[None, None], size=(24, 24), mode="bilinear")[0, 0].flatten())
        return torch.stack(out), label
    x, y = outlines(open_images("toy", 32, train=True), 600)
    u, v = outlines(open_images("toy", 32), 200)
    assert (y[torch.cdist(u, x).argmin(1)] == v).float().mean() > 0.97


# --------------------------------------------------------------------------------------------------------------------
# The figure command

def test_figures_command(tmp_path):
    for k, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        save_ours(tiny(seed=k), tmp_path / name / "ckpt.pt")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (45, 70, 3), dtype=np.uint8)).save(tmp_path / "photo.png")      # no multiple of 16
    Image.fromarray(rng.integers(0, 256, (9, 11), dtype=np.uint8)).save(tmp_path / "small.png")          # smaller than f
    run = subprocess.run([sys.executable, "ae.py", str(tmp_path / "photo.png"), str(tmp_path / "small.png"), "toy", "--ckpt", str(tmp_path / "a"),
                          "--ckpt2", str(tmp_path / "b"), "--channels", "2,8", "--out", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == sorted(["reconstruction.png", "channel_average.png"] + [f"latent_{i}_{w}.png" for i in range(6) for w in "AB"])
    for name in ("reconstruction.png", "channel_average.png"):
        sheet = Image.open(tmp_path / "out" / name)
        assert sheet.height == 14 + 12 * 47 and (sheet.width - 3 * 72) > 20         # 6 pictures x 2 models, 3 columns, captions
    sheet = np.asarray(Image.open(tmp_path / "out" / "reconstruction.png"))
    left = sheet.shape[1] - 3 * 72
    assert (sheet[30:59, left + 2:left + 72 - 2] == np.asarray(Image.open(tmp_path / "photo.png"))[16:45, 2:70]).all()    # the input, as it is
    assert (sheet[14:59, left + 72:] != sheet[14 + 47:59 + 47, left + 72:]).any()   # the two models differ
    A.main([str(tmp_path / "photo.png"), "--ckpt", str(tmp_path / "a"), "--image_size", "32", "--out", str(tmp_path / "one")])
    assert (tmp_path / "one" / "latent_0_A.png").exists()


def test_figures_command_bad_input(tmp_path):
    save_ours(tiny(), tmp_path / "ckpt.pt")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    for args, word in ((["broken.png"], "broken.png"), (["nowhere.png"], "nowhere.png"), (["toy", "--channels", "9"], "--channels 9"), (["toy", "--image_size", "0"], "--image_size 0"),
                       (["toy", "--ckpt", "nowhere"], "nowhere")):
        args = [str(tmp_path / x) if x.endswith(".png") else x for x in args]
        one_line(lambda: A.main(["--ckpt", str(tmp_path), "--out", str(tmp_path / "out"), *args]), word)


def test_importing_does_no_work_and_needs_no_optional_package():
    code = "import sys, ae; assert not {'safetensors', 'diffusers', 'lpips', 'scipy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
