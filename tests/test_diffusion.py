"""Denoisers, objectives, Eq. 2, random numbers, published weights.    python -m pytest tests/test_diffusion.py

Golden numbers were made with the official models in float64 (DC-Gen @cae2205, facebookresearch/DiT, willisma/SiT), every
tensor filled by a formula of its sorted place k and shape (`filled` below).
"""
import hashlib
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import diffusion
from diffusion import build, draw_t, forward_macs, from_pretrained, gaussian, timestep_embedding, training_loss, uniform

# parameters and forward multiply-adds at c128 8x8 and c32 16x16, 1000 classes
COUNTS = {"DiT-S": (33018880, 1417297920, 32981824, 6060392448), "DiT-B": (130623232, 5574623232, 130549312, 23014539264),
          "DiT-L": (458250496, 19708248064, 458152000, 80710205440), "DiT-XL": (675295744, 29057826816, 675184960, 118635577344),
          "SiT-S": (32969600, 1414152192, 32969504, 6057246720), "SiT-B": (130524800, 5568331776, 130524704, 23008247808),
          "SiT-L": (458119296, 19699859456, 458119200, 80701816832), "SiT-XL": (675148160, 29048389632, 675148064, 118626140160),
          "UViT-S": (44788864, 2973159424, 44788768, 12256890880), "UViT-M": (130916480, 8690767872, 130916384, 35229161472),
          "UViT-L": (286795904, 19028418560, 286795808, 76464496640), "UViT-H": (500868992, 33243632640, 500868896, 133206193152),
          "UViT-2B": (1580396672, 104637349888, 1580396576, 414821466112), "USiT-H": (500868992, 33243632640, 500868896, 133206193152),
          "USiT-2B": (1580396672, 104637349888, 1580396576, 414821466112), "USiT-3B": (3107725440, 205900890112, 3107725344, 816351035392)}

# name: [mean, std, absmax, sum_i out_i sin(i / 10), out_0 .. out_3, out_-4, out_-3] of the output
GOLDEN = {
    "DiT": [-0.04029202641, 2.04314012, 3.790293355, 424.9847077, 2.309588067, 3.461467923, 2.30708019, 1.077120474, -1.794145666, -2.61522253],
    "DiT null": [-0.04709276774, 2.301340599, 4.132780168, 486.2355164, 2.901057071, 3.884608429, 2.738612692, 1.272792838, -1.917092158, -3.245222666],
    "DiT 4": [-0.0467166595, 1.01732961, 2.138238702, 106.7695777, 1.734404264, 2.138238702, 1.028537269, 0.3286123328, -0.186613693, -1.050471262],
    "DiT sincos": [-0.009046687698, 0.4932777221, 1.346417252, -47.16335635, 0.2078969804, -0.01866471024, -0.1844065429, -0.2140685739, 0.6814308033, 0.9980574797],
    "SiT": [-0.1444344104, 2.032319064, 3.789222564, 237.1411, 2.312958332, 3.464738999, 2.309987051, 1.077451373, 0.4328023802, -0.5233343782],
    "SiT null": [-0.1642046302, 2.284479743, 4.141342456, 268.1549282, 2.905416897, 3.887307556, 2.73838053, 1.272836764, 0.410620052, -0.7986292266],
    "SiT 4": [-0.06809560479, 0.9982693028, 2.138483822, 40.0590532, 1.734885503, 2.138483822, 1.028481553, 0.3284349478, 0.5748166588, 0.4899262466],
    "SiT sincos": [-0.0005254899889, 0.4942478526, 1.245770747, -45.65370958, 0.2077607265, -0.01884822656, -0.184737198, -0.2145824497, 0.6566968506, 0.653424676],
    "UViT": [0.1104552925, 0.605649968, 0.9349663477, -19.21110502, -0.3197868737, -0.383554803, -0.3553508303, -0.3059489049, -0.2691439641, -0.2929951437],
    "UViT null": [0.110218356, 0.6038819008, 0.9343757671, -19.18425313, -0.3327575639, -0.3830516661, -0.3517066632, -0.3034267525, -0.2663564853, -0.293020028],
    "UViT 4": [0.102427422, 0.6045132754, 0.8918839166, 7.370393304, -0.338162437, -0.3844346809, -0.3574734329, -0.3074893211, -0.5689135327, -0.6162342787],
    "USiT": [0.1104561512, 0.6056577363, 0.9352410471, -19.21721674, -0.3196649846, -0.3834146565, -0.3552079531, -0.305830777, -0.2690778104, -0.292926277],
    "USiT null": [0.1101723565, 0.6035392478, 0.9346730154, -19.18619191, -0.3325985925, -0.3828705049, -0.3494834292, -0.3023385527, -0.2662946169, -0.2929559746],
    "USiT 4": [0.1024296888, 0.6045246735, 0.8920089624, 7.367633472, -0.338021238, -0.3843003155, -0.3573359191, -0.3073693404, -0.5689444625, -0.6163832176]}
TIMES = {"DiT": [17.0, 640.0], "UViT": [17.0, 640.0], "SiT": [0.137, 0.82], "USiT": [0.137, 0.82]}


def grid(*shape):
    return torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in shape], indexing="ij")


def filled(family):
    """The four golden models: depth 4, hidden 64, 4 heads, 10 classes, 8x4x4 latents, float64."""
    net = build(family, c=8, size=4, num_classes=10, depth=4, hidden=64, heads=4)
    state = {}
    for k, (name, v) in enumerate(sorted(net.state_dict().items())):
        s = torch.sin(0.37 * torch.arange(v.numel(), dtype=torch.float64) + 1.1 * k).view(v.shape)
        state[name] = s / math.sqrt(v[0].numel()) if v.ndim > 1 else 1 + 0.1 * s if name.endswith("weight") else 0.05 * s
    net.double().load_state_dict(state)
    return net.eval()


def noise(j, shape):
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (1.4 * torch.sin(0.7 * i**1.5 + 1.3 * j)).view(shape)


def fingerprint(out):
    out = out.detach().flatten()
    check = (out * torch.sin(0.1 * torch.arange(len(out), dtype=torch.float64))).sum()
    return [out.mean().item(), out.std(correction=0).item(), out.abs().max().item(), check.item(), *out[:4].tolist(), *out[-4:-2].tolist()]


def tiny(family, **kw):
    """A small network without zero-initialised outputs, so that everything has a gradient."""
    torch.manual_seed(0)
    net = build(family, **{**dict(c=8, size=4, num_classes=10, depth=2, hidden=32, heads=2), **kw})
    for p in net.parameters():
        if p.requires_grad and p.ndim > 1:
            torch.nn.init.normal_(p, std=0.1)
    return net


# ---------------------------------------------------------------------------------------------------------------------
# Networks

def test_counts_of_every_published_model():
    for name, (p8, m8, p16, m16) in COUNTS.items():
        with torch.device("meta"):
            nets = build(name, c=128, size=8), build(name, c=32, size=16)
        assert [sum(p.numel() for p in net.parameters()) for net in nets] == [p8, p16], name
        assert [forward_macs(net) for net in nets] == [m8, m16] and forward_macs(nets[0].config) == m8, name
    with torch.device("meta"):
        assert sum(p.numel() for p in build("DiT-XL", c=4, size=32, patch=2).parameters()) == 675129632      # facebookresearch/DiT
        assert sum(p.numel() for p in build("UViT-H", c=4, size=32, patch=2).parameters()) == 500832016      # baofff/U-ViT
        assert round(forward_macs(build("DiT-XL", c=4, size=32, patch=2)) / 1e9, 3) == 118.621
        assert round(forward_macs(build("UViT-H", c=4, size=32, patch=2)) / 1e9, 3) == 133.197


@pytest.mark.parametrize("name, c, size, hashed", [("DiT-S", 32, 16, "c80c981a98072f70"), ("SiT-S", 32, 16, "0c422f1bcad96745"),
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
    x[:, 4:] = 0                                                                # the official model slices its weights to c' = 4
    out = net(x, t, y)
    out = torch.cat([out[:, :4], out[:, 8:12]], dim=1) if family == "DiT" else out[:, :4]
    assert fingerprint(out) == pytest.approx(GOLDEN[f"{family} 4"], rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("family", ["DiT", "SiT"])
def test_golden_forward_with_its_own_position_embedding(family):
    net, t = filled(family), torch.tensor(TIMES[family], dtype=torch.float64)
    net.pos_embed.data.copy_(build("SiT", c=8, size=4, depth=1, hidden=64, heads=4).pos_embed)
    b, c, h, w = grid(2, 8, 4, 4)
    out = net(torch.sin(0.01 * (b * 7919 + c * 104729 + h * 31 + w * 17)), t, torch.tensor([3, 7]))
    assert fingerprint(out) == pytest.approx(GOLDEN[f"{family} sincos"], rel=1e-8, abs=1e-9)


def test_position_embedding_fingerprint():
    p = build("DiT-T", c=4, size=8, hidden=192, heads=3).pos_embed[0]                                # token = row * 8 + column, width 192
    assert p[1, [0, 1, 48, 96, 144]].tolist() == pytest.approx([0.8414709568, 0.7348219752, 0.5403022766, 0, 1])
    assert p[8, [0, 1, 48, 96, 144]].tolist() == pytest.approx([0, 0, 1, 0.8414709568, 0.5403022766])
    assert p[27, :4].tolist() == pytest.approx([0.1411200017, 0.6173582077, 0.8901692033, 0.9932531714])
    assert p.double().sum().item() == pytest.approx(5979.796476608259, rel=1e-9)
    wide = build("DiT-T", c=4, size=(4, 8), hidden=192, heads=3).pos_embed[0]
    assert torch.equal(wide, p[:32])                                            # the upper half of the square


def test_init_statistics():
    torch.manual_seed(0)
    dit = dict(build("DiT", c=32, size=8, depth=2, hidden=192, heads=6).named_parameters())
    std = {"x_embedder.proj.weight": 0.0940, "t_embedder.mlp.0.weight": 0.02, "y_embedder.embedding_table.weight": 0.02,
           "blocks.0.attn.qkv.weight": 0.0511, "blocks.1.attn.proj.weight": 0.0722, "blocks.1.mlp.fc1.weight": 0.0456}
    for name, p in dit.items():
        if name in std:
            assert p.std().item() == pytest.approx(std[name], rel=0.03), name
        elif name.endswith("bias") or "adaLN" in name or name == "final_layer.linear.weight":
            assert p.abs().max() == 0, name
    assert not dit["pos_embed"].requires_grad
    uvit = dict(build("UViT", c=32, size=8, depth=2, hidden=192, heads=6).named_parameters())
    std = {"pos_embed": 0.02, "patch_embed.proj.weight": 0.102, "patch_embed.proj.bias": 0.102, "label_emb.embedding_table.weight": 1.0,
           "in_blocks.0.attn.qkv.weight": 0.02, "out_blocks.0.skip_linear.weight": 0.02, "decoder_pred.weight": 0.02}
    for name, value in std.items():
        assert uvit[name].std().item() == pytest.approx(value, rel=0.12 if name.endswith("bias") else 0.03), name
    assert uvit["mid_block.norm1.weight"].eq(1).all() and uvit["decoder_pred.bias"].eq(0).all() and uvit["pos_embed"].requires_grad


def test_timestep_embedding_in_fp32_and_not_bf16():
    t = torch.tensor([0.137, 17, 1000], dtype=torch.float64)
    wanted = [[0.990630169, 0.9999061565, 0.9999990616, 0.9999999906, 0.1365718432, 0.01369957145, 0.001369999571, 0.0001369999996],
              [-0.2751633381, -0.1288444943, 0.9855847669, 0.9998555035, -0.9613974919, 0.9916648105, 0.1691823491, 0.01699918118],
              [0.5623790763, 0.8623188723, -0.8390715291, 0.5403023059, 0.8268795405, -0.5063656411, -0.5440211109, 0.8414709848]]
    assert torch.allclose(timestep_embedding(t, 8, torch.float64), torch.tensor(wanted, dtype=torch.float64), atol=2e-10)
    assert timestep_embedding(t.to(torch.bfloat16), 8).dtype == torch.float32
    near = torch.tensor([988.4937, 987.1741])                                   # DiffSynth-Studio#562: one and the same in bf16
    assert near.to(torch.bfloat16).unique().numel() == 1
    for net in tiny("DiT"), tiny("UViT"):
        z = torch.randn(1, 8, 4, 4).expand(2, -1, -1, -1)
        with torch.autocast("cpu", torch.bfloat16):
            a, b = net(z, near, torch.tensor([1, 1]))
        assert (a - b).abs().max() > 0.02
        a, b = net.bfloat16()(z, near, torch.tensor([1, 1]))                    # weights in bf16, as under FSDP
        assert a.dtype == torch.bfloat16 and (a - b).abs().max() > 0.02


@pytest.mark.parametrize("family", TIMES)
def test_patch_two_any_grid_unconditional(family):
    net = tiny(family, c=3, size=(4, 6), patch=2, num_classes=0)
    z, t, y = torch.randn(2, 3, 4, 6), draw_t(net, torch.tensor([0.1, 0.7])), torch.zeros(2, dtype=torch.long)
    assert net(z, t, y).shape == (2, 6 if family == "DiT" else 3, 4, 6)
    assert build(**net.config).config == net.config
    assert training_loss(net, z, y, c_prime=2).isfinite()
    x = torch.arange(2 * 2 * 3 * 4.0).view(1, 6, 8)                             # unpatchify: pixel (2i + p, 2j + q), channel last
    out = diffusion.unpatchify(x, (4, 6), 2)
    assert out[0, 1, 3, 4] == x[0, 1 * 3 + 2, (1 * 2 + 0) * 2 + 1]


@pytest.mark.parametrize("family", TIMES)
def test_checkpointing_changes_nothing(family):
    net, z, y = tiny(family), torch.randn(2, 8, 4, 4), torch.tensor([1, 10])
    grads = []
    for net.checkpointing in (False, True):
        net.zero_grad()
        torch.manual_seed(1)
        training_loss(net, z, y).backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert len(net.layers()) == (3 if family[0] == "U" else 2)


@pytest.mark.parametrize("name, kw, word", [("DiT-Z", {}, "unknown model"), ("DiT", {}, "unknown model"), ("UViT-T", dict(depth=3), "even"),
                                            ("DiT-T", dict(heads=5), "heads"), ("SiT-T", dict(patch=3), "--patch 3"), ("SiT-T", dict(c=0), "c 0"),
                                            ("SiT-T", dict(width=3), "width")])
def test_bad_settings_are_one_line(name, kw, word):
    with pytest.raises(ValueError, match=word) as e:
        build(name, **{**dict(c=8, size=4), **kw})
    assert len(str(e.value)) < 200 and "\n" not in str(e.value)


def test_never_imports_the_autoencoder():
    code = "import sys, diffusion; assert not {'ae', 'sample', 'train_ae', 'safetensors'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=diffusion.__file__.rpartition("/")[0]).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# Objectives and Eq. 2

def test_schedules():
    s, at = diffusion.ddpm_schedule(), [0, 1, 10, 100, 500, 998, 999]
    assert s.beta[at].tolist() == pytest.approx([0.0001, 0.0001199199199, 0.0002991991992, 0.002091991992, 0.01005995996, 0.01998008008, 0.02], rel=1e-9)
    assert s.abar[at].tolist() == pytest.approx([0.9999, 0.9997800921, 0.9978065725, 0.8951415909, 0.07779665837, 4.118193638e-05, 4.035829765e-05], rel=1e-9)
    assert s.posterior_log_var[at].tolist() == pytest.approx([-9.816725135, -9.816725135, -8.260755607, -6.187696715, -4.60004974, -3.913020337, -3.912023829], rel=1e-9)
    assert s.coef_z[at].tolist() == pytest.approx([1.0, 0.5452914995, 0.1362778598, 0.01889545559, 0.003058057076, 0.0001295242362, 0.0001283514872], rel=1e-9)
    assert s.coef_zt[at].tolist() == pytest.approx([0.0, 0.454708499, 0.8637220693, 0.9810761026, 0.9941043508, 0.9899587235, 0.9899486783], rel=1e-9, abs=1e-12)
    kept = tuple(round(i * 999 / 249) for i in range(250))
    assert diffusion.ddpm_schedule(kept).beta[[0, 1, 2, -3, -2, -1]].tolist() == pytest.approx(
        [0.0001, 0.0005990655645, 0.0009176029928, 0.07691919273, 0.07721930546, 0.07751934499], rel=1e-9)
    assert diffusion.vp_schedule()[[0, 1, 9, 99, 499, 998, 999]].tolist() == pytest.approx(
        [0.99915, 0.9982960278, 0.9913210885, 0.8954627735, 0.2776696505, 0.0047166989, 0.004660098513], rel=1e-9)


# per-sample losses at these t; DiT's = squared error + variational term
@pytest.mark.parametrize("family, t, wanted", [
    ("DiT", [0, 17, 640, 999], [4.792950775 + 6.980385805, 3.720452689 + 0.2571623217, 1.087123164 + 0.01036862795, 2.528089622 + 0.03721847952]),
    ("UViT", [1, 17, 640, 1000], [1.324530417, 1.338803566, 1.262487716, 1.421646252]),
    ("SiT", [0.0, 0.137, 0.5, 0.97], [1.370554167, 1.24262542, 1.384146455, 5.213026061]),
    ("USiT", [0.0, 0.137, 0.5, 0.97], [1.517603139, 1.369983873, 1.524222101, 1.596312988])])
def test_golden_losses(family, t, wanted):
    b, c, h, w = grid(4, 8, 4, 4)
    z, t, y = 0.5 * torch.sin(0.1 * (b * 101 + c * 37 + h * 11 + w * 3)), torch.tensor(t), torch.tensor([3, 7, 0, 10])
    t = t if t.dtype == torch.int64 else torch.tensor([0.0, 0.137, 0.5, 0.97], dtype=torch.float64)
    net = filled(family)
    loss = training_loss(net, z, y, t=t, noise=noise(0, z.shape), reduction="none")
    assert loss.tolist() == pytest.approx(wanted, rel=1e-8)
    assert training_loss(net, z, y, t=t, noise=noise(0, z.shape)).item() == pytest.approx(sum(wanted) / 4, rel=1e-8)


def test_draw_t_covers_its_range():
    u = torch.tensor([0.0, 0.5, 1 - 2.0**-24])
    assert draw_t(tiny("DiT"), u).tolist() == [0, 500, 999] and draw_t(tiny("UViT"), u).tolist() == [1, 501, 1000]
    assert torch.equal(draw_t(tiny("SiT"), u), u)


def case(family):
    torch.manual_seed(0)
    net = tiny(family).double()
    return net, torch.randn(3, 8, 4, 4).double(), torch.tensor([1, 2, 10]), dict(
        t=draw_t(net, torch.tensor([0.0, 0.4, 0.9])), noise=torch.randn(3, 8, 4, 4).double())


def ordinary_loss(net, z, y, t, noise):
    """The families' losses as their papers write them, without a mask."""
    z_t, target = diffusion.noised(net, z, noise, t)
    out = net(z_t, t, y)
    loss = F.mse_loss(out[:, :8], target, reduction="none")
    if net.objective == "ddpm":
        loss = loss + diffusion.variational_term(z, z_t, t, out[:, :8].detach(), out[:, 8:])
    return loss.flatten(1).mean(1)


@pytest.mark.parametrize("family", TIMES)
def test_all_channels_is_ordinary_training_to_the_bit(family):
    net, z, y, kw = case(family)
    grads = []
    for c_prime in (None, 8):
        net.zero_grad()
        loss = training_loss(net, z, y, c_prime=c_prime, **kw)
        loss.backward()
        grads.append([loss] + [p.grad.clone() for p in net.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert torch.allclose(training_loss(net, z, y, reduction="none", **kw), ordinary_loss(net, z, y, **kw), rtol=1e-12)
    random = []
    for c_prime in (None, 8):                                                   # also where t and noise are drawn inside
        torch.manual_seed(5)
        random.append(training_loss(net, z, y, c_prime=c_prime))
    assert torch.equal(*random)


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("family", TIMES)
def test_masking_equals_slicing_the_weights(family, patch):
    torch.manual_seed(0)
    full, small = tiny(family, patch=patch).double(), tiny(family, c=3, patch=patch).double()
    state = full.state_dict()
    for name, v in small.state_dict().items():
        if name.endswith("_embed.proj.weight") or name == "x_embedder.proj.weight":
            state[name] = state[name][:, :3]
        elif name.startswith(("decoder_pred", "final_layer.linear")):           # rows are (pixel of the patch, [eps | sigma], channel)
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


@pytest.mark.parametrize("family", TIMES)
def test_hidden_channels_do_not_matter(family):
    net, z, y, kw = case(family)
    a = training_loss(net, z, y, c_prime=3, **kw)
    z2, noise2 = z.clone(), kw["noise"].clone()
    z2[:, 3:], noise2[:, 3:] = 7.0, -7.0
    assert torch.equal(a, training_loss(net, z2, y, c_prime=3, t=kw["t"], noise=noise2))
    with pytest.raises(ValueError, match="c' = 9"):
        training_loss(net, z, y, c_prime=9)


def test_variances_are_trained_by_the_variational_term_alone():
    net, z, y, kw = case("DiT")
    out = torch.randn(3, 16, 4, 4, dtype=torch.float64, requires_grad=True)
    net.forward = lambda *a: out
    training_loss(net, z, y, **kw).backward()
    eps_only = 2 * (out.detach()[:, :8] - kw["noise"]) / out[:, :8].numel()     # gradient of the squared error, nothing more
    assert torch.allclose(out.grad[:, :8], eps_only, rtol=1e-12) and out.grad[:, 8:].abs().min() > 0


# ---------------------------------------------------------------------------------------------------------------------
# Counter-based random numbers

def test_gaussian_moments_and_independence():
    n = 400_000
    x = gaussian((n,), 0, 1)
    y = gaussian((n,), 0, 2)                                                    # a neighbouring key
    rows = gaussian((2000, 200), 7, torch.arange(2000))                         # a key per row
    for s in (x, y, rows.flatten()):
        assert abs(s.mean()) < 5 / n**0.5 and abs(s.var() - 1) < 5 * (2 / n) ** 0.5
        assert abs((s**3).mean()) < 5 * (15 / n) ** 0.5 and abs((s**4).mean() - 3) < 5 * (96 / n) ** 0.5
        assert s.isfinite().all() and 4.2 < s.abs().max() < 6.8
        assert abs((s[1:] * s[:-1]).mean()) < 5 / n**0.5                        # neighbouring elements (Box-Muller pairs too)
        assert abs(((s[1:] ** 2 - 1) * (s[:-1] ** 2 - 1)).mean()) < 5 * 2 / n**0.5
    assert abs((x * y).mean()) < 5 / n**0.5 and abs((rows[1:] * rows[:-1]).mean()) < 5 / n**0.5
    assert gaussian((100,), 1, 0).ne(gaussian((100,), 0, 1)).all()              # the order of the key counts
    u = uniform(n, 3, 4)
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    assert torch.histc(u, 20, 0, 1).sub(n / 20).abs().max() < 5 * (n / 20) ** 0.5
    assert abs(uniform(n, 3, torch.arange(n)).mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5


def test_gaussian_depends_on_its_key_alone():
    index = torch.tensor([5, 0, 10**12, 7])
    whole = gaussian((4, 3, 2, 2), 11, index, 1)
    assert torch.equal(whole[1:3], gaussian((2, 3, 2, 2), 11, index[1:3], 1))
    assert torch.equal(whole[:, :1], gaussian((4, 1, 2, 2), 11, index, 1))      # fewer channels: a prefix
    assert torch.equal(whole[1], gaussian((4, 3, 2, 2), torch.full((4,), 11), torch.zeros(4, dtype=torch.int64), 1)[0])
    assert torch.allclose(whole.double(), gaussian((4, 3, 2, 2), 11, index, 1, dtype=torch.float64), atol=1e-5)
    assert torch.equal(uniform(4, 2, index)[2:], uniform(2, 2, index[2:]))
    assert gaussian((4, 5), 3).flatten().unique().numel() == 20                 # ints only: rows differ as well
    assert gaussian((2, 3), 0, dtype=torch.float64)[0].tolist() == pytest.approx(
        [-0.2920317057478688, 0.8767916882996422, 0.8077852538348415], abs=1e-12)        # ours: a changed generator would change every resumed run


# ---------------------------------------------------------------------------------------------------------------------
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


def test_our_checkpoint_file_and_folder(tmp_path):
    net, ema = tiny("USiT", c=8, size=(4, 6)), tiny("USiT", c=8, size=(4, 6))
    ema.pos_embed.data += 1
    torch.save({"kind": "diffusion", "config": net.config, "model": net.state_dict(), "ema": ema.state_dict(), "step": 7, "scale": 0.5, "ae": "out/ae",
                "image_size": 32, "classes": ["a"], "optimizer": {}}, tmp_path / "ckpt.pt")
    for x in (tmp_path, tmp_path / "ckpt.pt", str(tmp_path)):
        got = from_pretrained(x)
        assert same(got, ema) and not got.training and all(p.requires_grad for p in got.parameters())
        assert got.info == {"step": 7, "scale": 0.5, "ae": "out/ae", "image_size": 32, "classes": ["a"]}
    assert same(from_pretrained(tmp_path, name="USiT"), ema)
    with pytest.raises(ValueError, match="holds a USiT, not the DiT"):
        from_pretrained(tmp_path, name="DiT")


@pytest.mark.parametrize("file", ["model.safetensors", "model.pt", "model.pth"])
@pytest.mark.parametrize("folder, family, info", [
    ("dc-ae-f32c32-in-1.0-dit-xl-in-512px", "DiT", dict(ae="mit-han-lab/dc-ae-f32c32-in-1.0", scale=0.3189, image_size=512)),
    ("dc-ae-f32c32-in-1.0-uvit-s-in-512px", "UViT", dict(ae="mit-han-lab/dc-ae-f32c32-in-1.0", scale=0.3189, image_size=512)),
    ("dc-ae-f32c32-in-1.0-usit-2b-in-512px", "USiT", dict(ae="mit-han-lab/dc-ae-f32c32-in-1.0", scale=0.3189, image_size=512)),
    ("dc-ae-f64c128-in-1.0-uvit-h-in-512px", "UViT", dict(ae="mit-han-lab/dc-ae-f64c128-in-1.0", scale=0.2889, image_size=512))])
def test_published_names(tmp_path, folder, family, info, file):
    net = tiny(family)
    save(net, tmp_path / "mit-han-lab" / folder / file)
    for x in (tmp_path / "mit-han-lab" / folder, tmp_path / "mit-han-lab" / folder / file):
        got = from_pretrained(x, heads=2)
        assert same(got, net) and got.family == family and got.info == info and not got.training


def test_family_from_tensors_or_name(tmp_path):
    for patch, family in [(1, "DiT"), (2, "SiT"), (1, "UViT"), (2, "USiT")]:
        net = tiny(family, patch=patch)
        file = save(net, tmp_path / f"{family}.pt", step=3)                     # nested under "model"
        assert same(from_pretrained(file, name=family, heads=2), net)
        assert from_pretrained(file, name=family + "-S", heads=2).family == family
    assert from_pretrained(tmp_path / "DiT.pt", heads=2).family == "DiT" and from_pretrained(tmp_path / "SiT.pt", heads=2).family == "SiT"
    for x, kw, word in [("USiT.pt", dict(heads=2), 'name="UViT" or name="USiT"'), ("USiT.pt", dict(name="USiT"), "say heads="),
                        ("UViT.pt", dict(name="DiT", heads=2), "not of the DiT"), ("SiT.pt", dict(name="DiT", heads=2), "not of the DiT")]:
        with pytest.raises(ValueError, match=word) as e:
            from_pretrained(tmp_path / x, **kw)
        assert len(str(e.value).replace(str(tmp_path), "")) < 200 and "\n" not in str(e.value)
    net = build("UViT-T", c=4, size=4, num_classes=3)                           # a preset's width: heads need not be said
    assert same(from_pretrained(save(net, tmp_path / "t.pt"), name="UViT"), net)
    wide = tiny("DiT", size=(2, 4))
    with pytest.raises(ValueError, match="8 tokens are not a square"):
        from_pretrained(save(wide, tmp_path / "wide.pt"), heads=2)
    assert same(from_pretrained(tmp_path / "wide.pt", heads=2, size=(2, 4)), wide)


def test_original_sit_has_unused_variances(tmp_path):
    with_sigma, plain = tiny("DiT", patch=2), tiny("SiT", patch=2)
    file = save(with_sigma, tmp_path / "SiT-XL-2-256x256.pt")
    got, t, y, z = from_pretrained(file, heads=2), torch.tensor([0.3, 0.8]), torch.tensor([1, 2]), torch.randn(2, 8, 4, 4)
    assert got.family == "SiT" and got.info == dict(ae="stabilityai/sd-vae-ft-ema", scale=0.18215, image_size=256)
    assert [p.shape for p in got.parameters()] == [p.shape for p in plain.parameters()]
    assert torch.allclose(got(z, t, y), with_sigma(z, t, y)[:, :8], atol=1e-6)


def test_original_uvit_names(tmp_path):
    net = tiny("UViT", patch=2)
    state = net.state_dict()
    state["label_emb.weight"] = state.pop("label_emb.embedding_table.weight")
    torch.save(state, tmp_path / "imagenet256_uvit_huge.pth")
    got = from_pretrained(tmp_path / "imagenet256_uvit_huge.pth", heads=2)
    assert same(got, net) and got.info["ae"] == "stabilityai/sd-vae-ft-ema"
    torch.save({**state, "final_layer.weight": torch.zeros(8, 8, 3, 3)}, tmp_path / "conv.pth")
    with pytest.raises(ValueError, match="3x3 convolution"):
        from_pretrained(tmp_path / "conv.pth", name="UViT", heads=2)


def test_bad_files_are_one_line(tmp_path):
    whole = save(tiny("DiT"), tmp_path / "a" / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00")
    torch.save({"kind": "ae"}, tmp_path / "ae.pt")
    torch.save({"conv.weight": torch.zeros(2, 2)}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    state = tiny("DiT").state_dict()
    torch.save({**state, "extra": torch.zeros(1)}, tmp_path / "extra.pt")
    (tmp_path / "empty").mkdir()
    for x, word in [("cut.pt", "truncated"), ("cut.safetensors", "truncated"), ("ae.pt", "kind 'ae'"), ("foreign.pt", "missing"), ("list.pt", "a list"),
                    ("extra.pt", "extra"), ("empty", "no ckpt.pt"), ("nowhere", "no such checkpoint")]:
        with pytest.raises(ValueError, match=word) as e:
            from_pretrained(tmp_path / x, heads=2)
        assert isinstance(e.value, SystemExit) and "\n" not in str(e.value) and len(str(e.value).replace(str(tmp_path), "")) < 200
