"""fid.py against its peers, closed forms, and each trap of the literature.    python -m pytest tests/test_fid.py"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

import fid
from ae import InputError, center_crop, to_uint8

ROOT = Path(__file__).resolve().parent.parent


def pictures(n, seed=0, h=40, w=40):
    """Smooth coloured fields with some noise, uint8 (n, h, w, 3): random Inception features tell them apart."""
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.interpolate(torch.randn(n, 3, 5, 5, generator=g), size=(h, w), mode="bicubic") * 70 + 128
    return (x + 8 * torch.randn(x.shape, generator=g)).clamp(0, 255).round().byte().permute(0, 2, 3, 1).contiguous()


def save_folder(folder, images, suffix="png", nested=False):
    for i, img in enumerate(images):
        path = Path(folder, f"class{i % 3}" if nested else "", f"{i:04}.{suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(img.numpy()).save(path)
    return str(folder)


class Tiny(torch.nn.Module):
    """A feature network that costs nothing: means and contrasts of colours -> (features (B, 6), logits (B, 10))."""

    def __init__(self, nchw=False, logits=True):
        super().__init__()
        self.nchw, self.logits = nchw, logits
        self.register_buffer("w", torch.randn(6, 10, generator=torch.Generator().manual_seed(0)))

    def forward(self, img):
        x = img.float() / 32
        x = x.flatten(2) if self.nchw else x.flatten(1, 2).transpose(1, 2)           # (B, 3, HW)
        f = torch.cat([x.mean(2), x.std(2)], 1)
        return (f, f @ self.w) if self.logits else f


def export(path, nchw=False, logits=True, batch=None, size=None):
    x = torch.zeros(batch or 3, *((3, size or 16, size or 16) if nchw else (size or 16, size or 16, 3)), dtype=torch.uint8)
    side = torch.export.Dim.DYNAMIC if size is None else None
    dims = {0: torch.export.Dim.DYNAMIC if batch is None else None, **dict.fromkeys((2, 3) if nchw else (1, 2), side)}
    torch.export.save(torch.export.export(Tiny(nchw, logits), (x,), dynamic_shapes=(dims,)), str(path))
    return str(path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return export(tmp_path_factory.mktemp("net") / "tiny.pt2")


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """Two sets of 30 pictures, as folder, nested folder, npz and compressed npz."""
    root = tmp_path_factory.mktemp("sets")
    a, b = pictures(30, 1, 24, 24), pictures(30, 2, 24, 24)
    np.savez(root / "a.npz", a.numpy())
    np.savez_compressed(root / "a_small.npz", arr_0=a.numpy(), arr_1=np.zeros(30))
    np.savez(root / "b.npz", arr_0=b.numpy())
    return SimpleNamespace(root=root, a=a, b=b, flat=save_folder(root / "a", a), nested=save_folder(root / "b", b, nested=True),
                           a_npz=str(root / "a.npz"), a_small=str(root / "a_small.npz"), b_npz=str(root / "b.npz"))


def run(capsys, *argv):
    """fid.py in this process -> (JSON of the last line, the lines before it)."""
    capsys.readouterr()
    fid.main([str(a) for a in argv] + ["--workers", "0", "--device", "cpu"])
    lines = capsys.readouterr().out.strip().splitlines()
    return json.loads(lines[-1]), "\n".join(lines[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# Inception against torch-fidelity and pytorch-fid: the same random weights, the same images


@pytest.fixture(scope="session")
def peers(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    net = fid.InceptionV3(seed=3)
    for name, value in net.state_dict().items():                # batch norms that do something
        g = torch.Generator().manual_seed(len(name))
        if name.endswith(("running_mean", "bn.bias")):
            value.normal_(0, 0.1, generator=g)
        if name.endswith(("running_var", "bn.weight")):
            value.uniform_(0.8, 1.25, generator=g)
    net.fc.bias.data.normal_(generator=torch.Generator().manual_seed(0))              # the Inception Score must not see it
    torch.save(net.state_dict(), path)
    return SimpleNamespace(path=path, real=pictures(8, 5), fake=pictures(10, 6))


def close(a, b, rel):
    return (a - b).norm() <= rel * b.norm() and (a - b).abs().max() <= rel * b.abs().max()


def test_features_and_scores_equal_torch_fidelity(peers, tmp_path, capsys):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(peers.path))
    f2, _ = theirs(peers.real.permute(0, 3, 1, 2))
    f1, l1 = theirs(peers.fake.permute(0, 3, 1, 2))
    ours = fid.load_extractor(peers.path)
    features, logits = ours(peers.fake)
    assert features.shape == (10, 2048) and logits.shape == (10, 1008) and features.dtype == torch.float32
    assert close(features, f1, 1e-4) and close(logits, l1, 1e-4)

    np.savez(tmp_path / "fake.npz", peers.fake.numpy())
    out, _ = run(capsys, tmp_path / "fake.npz", save_folder(tmp_path / "real", peers.real), "--inception", peers.path, "--allow_small")
    isc = isc_features_to_metric(l1)
    assert out["is"] - 1 == pytest.approx(isc["inception_score_mean"] - 1, rel=1e-3)
    assert out["is_std"] == pytest.approx(isc["inception_score_std"], rel=1e-3)
    # Their function's arguments changed places between versions; asking by meaning decides which: a collapsed set has recall 0.
    line, point = torch.arange(20.)[:, None] * torch.ones(1, 3), torch.full((20, 3), 5.0) + 1e-3 * torch.randn(20, 3)
    fake_first = calculate_precision_recall_full(point, line) == pytest.approx(fid.precision_recall(line, point))
    pair = (f1, f2) if fake_first else (f2, f1)
    assert (out["precision"], out["recall"]) == pytest.approx(calculate_precision_recall_full(*pair), rel=1e-3)
    # All 2048 features, few images: with A the centred features / sqrt(N - 1), tr((S1 S2)^.5) is the nuclear norm of A1 A2^T.
    a1, a2 = ((f.double() - f.double().mean(0)) / math.sqrt(len(f) - 1) for f in (f1, f2))
    exact = (f1.double().mean(0) - f2.double().mean(0)).square().sum() + a1.square().sum() + a2.square().sum()
    exact -= 2 * torch.linalg.matrix_norm(a1 @ a2.T, "nuc")
    assert out["fid"] == pytest.approx(exact.item(), rel=1e-3) and out["fid"] > 0.1


def test_frechet_equals_the_peers_functions():
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(48, 48, generator=g)
    a, b = torch.randn(300, 48, generator=g) @ mix, torch.randn(200, 48, generator=g).exp() @ mix + 1
    sa, sb = (fid_features_to_statistics(x.double()) for x in (a, b))
    ma, mb = fid.Moments(), fid.Moments()
    ma.update(a), mb.update(b)
    ours = fid.frechet_distance(ma.mean, ma.cov, mb.mean, mb.cov)
    assert ours == pytest.approx(fid_statistics_to_metric(sa, sb, False)["frechet_inception_distance"], rel=1e-6)
    assert ours == pytest.approx(calculate_frechet_distance(sa["mu"], sa["sigma"], sb["mu"], sb["sigma"]), rel=1e-6)


def test_resize_torch_equals_pytorch_fid_and_is_not_slower(peers, monkeypatch):
    import pytorch_fid.inception
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *a, **k: torch.load(peers.path, weights_only=True))
    theirs = pytorch_fid.inception.InceptionV3().eval()
    x = peers.fake.permute(0, 3, 1, 2).float() / 255
    ours, seconds = fid.load_extractor(peers.path, resize="torch"), {"ours": [], "theirs": []}
    with torch.no_grad():
        for _ in range(2):                                      # in turn: whatever else runs here disturbs both
            start = time.time()
            want = theirs(x)[0].flatten(1)
            seconds["theirs"].append(time.time() - start)
            start = time.time()
            got, _ = ours(peers.fake)
            seconds["ours"].append(time.time() - start)
    assert close(got, want, 1e-4)
    assert min(seconds["ours"]) < 1.1 * min(seconds["theirs"]), seconds


def test_network_is_not_torchvisions(peers):                    # trap 1
    from torchvision.models import inception_v3
    plain = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).eval()
    plain.load_state_dict(torch.load(peers.path, weights_only=True))                  # the names are the same, the pooling is not
    plain.fc = plain.dropout = torch.nn.Identity()
    with torch.no_grad():
        want = plain(fid.resize_tf(peers.fake[:2]))
    got, _ = fid.load_extractor(peers.path)(peers.fake[:2])
    assert not close(got, want, 1e-2)


def test_full_precision_whatever_the_caller_allows(peers):      # trap 16
    extract = fid.load_extractor(peers.path)
    want, _ = extract(peers.fake[:1])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            got, _ = extract(peers.fake[:1])
        assert torch.get_float32_matmul_precision() == "medium"
        with fid.full_precision(torch.device("cpu")):
            assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
    assert got.dtype == torch.float32 and torch.equal(got, want)


@pytest.mark.parametrize("h,w", [(5, 7), (299, 299), (400, 311)])
def test_resize_tf_is_the_legacy_grid(h, w):                    # trap 2
    img = pictures(1, 0, h, w)
    out = fid.resize_tf(img)
    assert out.shape == (1, 3, 299, 299)
    x = img[0].double()
    for i, j in ((0, 0), (298, 298), (17, 250), (131, 4)):
        y, z = i * h / 299, j * w / 299                         # no half pixel
        y0, z0 = int(y), int(z)
        y1, z1, dy, dz = min(y0 + 1, h - 1), min(z0 + 1, w - 1), y - y0, z - z0
        want = (1 - dy) * ((1 - dz) * x[y0, z0] + dz * x[y0, z1]) + dy * ((1 - dz) * x[y1, z0] + dz * x[y1, z1])
        assert torch.allclose(out[0, :, i, j].double() * 128 + 128, want, atol=2e-2 if h == 400 else 1e-3)
    if h != 299:
        assert (out - fid.resize_torch(img)).abs().max() > 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Metrics: closed forms, oracles, traps


def gaussian(n, d, seed, scale=1.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def moments(x, batch=64):
    m = fid.Moments()
    for part in x.split(batch):
        m.update(part)
    return m


def test_frechet_of_known_gaussians():
    d = 5
    eye, zero = np.eye(d), np.zeros(d)
    assert fid.frechet_distance(zero, eye, zero + 2, eye) == pytest.approx(4 * d)                       # |mean gap|^2
    assert fid.frechet_distance(zero, 4 * eye, zero, 9 * eye) == pytest.approx(d * (2 - 3) ** 2)        # sum (s1 - s2)^2
    q, _ = np.linalg.qr(np.random.RandomState(0).randn(d, d))
    s1, s2 = np.arange(1, d + 1.0), np.arange(d, 0, -1.0)
    rotated = [q @ np.diag(s ** 2) @ q.T for s in (s1, s2)]
    assert fid.frechet_distance(zero, rotated[0], zero + 1, rotated[1]) == pytest.approx(d + ((s1 - s2) ** 2).sum())
    assert fid.frechet_distance(zero, rotated[0], zero, rotated[0]) == pytest.approx(0, abs=1e-9)
    assert fid.frechet_distance(zero, 0 * eye, zero + 1, 4 * eye) == pytest.approx(5 * d)               # one set is a point


@pytest.mark.parametrize("n,rel", [(400, 1e-6), (30, 1e-3)])
def test_frechet_trace_equals_sqrtm(n, rel):                    # trap 8: N < D too, where sqrtm turns complex
    from scipy.linalg import sqrtm
    a, b = moments(gaussian(n, 64, 0)), moments(gaussian(n, 64, 1) * torch.linspace(0.5, 2, 64).double())
    covmean = sqrtm((a.cov @ b.cov).numpy())
    want = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * np.trace(covmean).real
    got = fid.frechet_distance(a.mean, a.cov, b.mean, b.cov)
    assert got == pytest.approx(want.item(), rel=rel)


def test_collapsed_and_identical_samples_stay_finite():         # trap 8
    a = moments(gaussian(50, 64, 0))
    point = moments(torch.ones(50, 64))
    assert fid.frechet_distance(a.mean, a.cov, a.mean, a.cov) == pytest.approx(0, abs=1e-5)
    want = (a.mean - 1).square().sum() + a.cov.trace()
    assert fid.frechet_distance(a.mean, a.cov, point.mean, point.cov) == pytest.approx(want.item(), rel=1e-9)
    with pytest.raises(ValueError, match="different networks"):
        fid.frechet_distance(a.mean, a.cov, np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="one image"):
        moments(torch.ones(1, 4)).cov


def test_moments_are_float64_unbiased_and_rows_are_samples():   # trap 9
    x = (gaussian(1000, 7, 0, 0.1) + 1000).float()              # float32 sums would lose the spread entirely
    m = moments(x, 33)
    assert m.n == 1000 and m.mean.dtype == m.cov.dtype == torch.float64
    assert np.allclose(m.mean, x.double().mean(0), rtol=1e-12)
    assert np.allclose(m.cov, np.cov(x.double().numpy(), rowvar=False), rtol=1e-6)    # N - 1, (D, D)


def test_few_images_are_biased_upwards():                       # trap 10: the same Gaussian twice
    distance = []
    for n in (1000, 250, 60):
        a, b = moments(gaussian(n, 32, 1)), moments(gaussian(n, 32, 2))
        distance.append(fid.frechet_distance(a.mean, a.cov, b.mean, b.cov))
    assert 0 < distance[0] * 3 < distance[1] * 1.5 < distance[2]


def test_inception_score_of_uniform_and_one_hot():              # trap 13
    assert fid.inception_score(torch.zeros(100, 8)) == pytest.approx((1, 0))
    one_hot = 1e4 * torch.eye(4).repeat_interleave(500, 0)      # sorted by class: unshuffled splits would score 1; p of exactly 0
    mean, std = fid.inception_score(one_hot)
    assert mean == pytest.approx(4, rel=0.01) and std < 0.05
    assert fid.inception_score(one_hot[::500])[0] == pytest.approx(4)                 # fewer images than splits: one split
    assert fid.inception_score(one_hot, splits=1) == pytest.approx((4, 0))


def test_precision_and_recall_are_not_swapped():                # trap 14
    real = gaussian(200, 4, 0)
    collapsed = real[:1] + gaussian(300, 4, 1, 1e-3)
    precision, recall = fid.precision_recall(real, collapsed)
    assert precision == 1 and recall < 0.05
    assert fid.precision_recall(collapsed, real)[0] < 0.05
    assert fid.precision_recall(real, real) == (1, 1)
    assert fid.precision_recall(real, real + 100) == (0, 0)


def test_the_point_itself_is_not_its_neighbour():               # trap 14
    real = torch.tensor([[0.0], [1], [3], [7]])                 # k = 1 radii: 1, 1, 2, 4; a point too many would make them 0
    fake = torch.tensor([[-1.5], [-0.9], [2.5], [10.9], [11.1]])
    assert fid.precision_recall(real, fake, k=1)[0] == 3 / 5
    # radii of fake: 0.6, 0.6, 3.4, 0.2, 0.2 -> 0 and 1 and 3 lie within 3.4 of 2.5; 7 in none
    assert fid.precision_recall(real, fake, k=1)[1] == 3 / 4
    a, b = gaussian(101, 6, 0), gaussian(77, 6, 1)
    assert fid.precision_recall(a, b, rows=10) == fid.precision_recall(a, b, rows=1000)
    same = torch.full((10, 2048), 0.3)
    assert fid.precision_recall(same, same) == (1, 1)           # distances and radii of exactly 0
    with pytest.raises(ValueError, match="more than k = 3"):
        fid.precision_recall(a, b[:3])


def test_psnr_and_ssim_by_definition():
    a, b = pictures(2, 0, 20, 17), pictures(2, 1, 20, 17)
    b[1] = (a[1].int() + 3).clamp(0, 255).byte()
    x, y = a.double().numpy(), b.double().numpy()
    assert fid.psnr(a, b).tolist() == pytest.approx([10 * math.log10(255 ** 2 / ((p - q) ** 2).mean()) for p, q in zip(x, y)], rel=1e-6)
    assert fid.psnr(a, a).tolist() == [math.inf] * 2
    g = np.exp(-np.arange(-5, 6) ** 2 / 4.5)
    g = np.outer(g, g) / g.sum() ** 2
    for n in range(2):
        values = []
        for i in range(10):
            for j in range(7):
                for c in range(3):
                    p, q = x[n, i:i + 11, j:j + 11, c], y[n, i:i + 11, j:j + 11, c]
                    mp, mq = (g * p).sum(), (g * q).sum()
                    vp, vq, cov = (g * (p - mp) ** 2).sum(), (g * (q - mq) ** 2).sum(), (g * (p - mp) * (q - mq)).sum()
                    values.append((2 * mp * mq + 2.55 ** 2) * (2 * cov + 7.65 ** 2) / ((mp ** 2 + mq ** 2 + 2.55 ** 2) * (vp + vq + 7.65 ** 2)))
        assert fid.ssim(a, b)[n].item() == pytest.approx(np.mean(values), rel=1e-5)
    assert fid.ssim(a, a).tolist() == pytest.approx([1, 1])
    with pytest.raises(ValueError, match="11"):
        fid.ssim(a[:, :10], b[:, :10])


def test_pixels_are_rounded_not_truncated():                    # trap 6
    x = torch.linspace(-1.1, 1.1, 100_002).view(1, 3, 1, -1)
    img = to_uint8(x).permute(0, 3, 1, 2).double()
    exact = (x.clamp(-1, 1).double() + 1) * 127.5
    assert (img - exact).abs().max() <= 0.5 + 1e-3 and abs((img - exact).mean()) < 1e-3
    for bad in (pictures(1).float(), pictures(1).permute(0, 3, 1, 2)):
        with pytest.raises(ValueError, match="uint8 \\(B, H, W, 3\\)"):
            fid.load_extractor("random")(bad)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def test_every_input_form_gives_the_same_numbers(sets, tiny, capsys):
    keys = ("fid", "is", "is_std", "precision", "recall", "psnr", "ssim")
    flags = ["--features", tiny, "--allow_small", "--metrics", "fid,is,precision,recall,psnr,ssim"]
    outs = [run(capsys, a, sets.b_npz, *flags, "--batch_size", batch)[0]
            for a, batch in ((sets.flat, 64), (sets.a_npz, 7), (sets.a_small, 1))]
    for out in outs[1:]:
        assert [out[k] for k in keys] == pytest.approx([outs[0][k] for k in keys], rel=1e-9)
    out = outs[0]
    tnet = Tiny()
    (fa, la), (fb, _) = tnet(sets.a), tnet(sets.b)
    ma, mb = moments(fa), moments(fb)
    assert out["fid"] == pytest.approx(fid.frechet_distance(ma.mean, ma.cov, mb.mean, mb.cov), rel=1e-9)
    assert (out["is"], out["is_std"]) == pytest.approx(fid.inception_score(la))
    assert (out["precision"], out["recall"]) == pytest.approx(fid.precision_recall(fb, fa))
    assert out["psnr"] == pytest.approx(fid.psnr(sets.a, sets.b).mean().item())
    assert out["ssim"] == pytest.approx(fid.ssim(sets.a, sets.b).mean().item())
    assert (out["n"], out["n_reference"], out["image_size"], out["features"], out["resize"]) == (30, 30, [24, 24], "tiny", "own")
    assert out["reference"] == sets.b_npz and out["reference_kind"] == "npz"          # trap 4: which reference, on record
    nested = run(capsys, sets.flat, sets.nested, *flags)[0]     # sorted by path: another order, the same set
    assert nested["reference_hash"] == out["reference_hash"] and nested["fid"] == pytest.approx(out["fid"], rel=1e-9)
    same, text = run(capsys, sets.flat, sets.a_npz, *flags)
    assert same["fid"] < 1e-9 and same["precision"] == same["recall"] == 1 and same["psnr"] is None and "identical" in text


def test_stream_of_batches_equals_files(sets, tiny, capsys):
    extractor = fid.load_extractor(features=tiny)
    out = fid.score(sets.a.split(11), sets.b_npz, extractor, allow_small=True)
    assert out["fid"] == pytest.approx(run(capsys, sets.a_npz, sets.b_npz, "--features", tiny, "--allow_small")[0]["fid"], rel=1e-9)
    reference = fid.collect(sets.b.split(30), extractor)
    assert fid.score(sets.a.split(30), reference, extractor, allow_small=True)["recall"] == out["recall"]
    with pytest.raises(ValueError, match="--allow_small"):
        fid.score(sets.a.split(30), reference, extractor)
    assert torch.equal(torch.cat(list(fid.read_batches(sets.flat, batch=8))), sets.a)
    assert [len(x) for x in fid.read_batches("toy", batch=8, num=20, image_size=16)] == [8, 8, 4]


def test_statistics_round_trip_and_remember_how_they_were_made(sets, tiny, capsys, tmp_path):
    direct = run(capsys, sets.a_npz, sets.b_npz, "--features", tiny, "--allow_small")[0]
    saved, _ = run(capsys, sets.b_npz, "--save_stats", tmp_path / "b.npz", "--features", tiny)
    assert saved["n"] == 30 and set(np.load(tmp_path / "b.npz").files) == {"mu", "sigma", "meta"}
    out, text = run(capsys, sets.flat, tmp_path / "b.npz", "--features", tiny, "--allow_small")
    assert out["fid"] == pytest.approx(direct["fid"], rel=1e-9) and out["n_reference"] == 30
    assert out["precision"] is None and "precision and recall need images" in text
    assert run(capsys, tmp_path / "b.npz", tmp_path / "b.npz", "--features", tiny, "--allow_small")[0]["fid"] < 1e-9
    with pytest.raises(InputError, match="equal sizes"):        # the file knows its images' size ...
        run(capsys, sets.flat, tmp_path / "b.npz", "--features", tiny, "--allow_small", "--image_size", 16)
    with pytest.raises(InputError, match="not comparable"):     # ... and network
        run(capsys, sets.flat, tmp_path / "b.npz", "--features", export(tmp_path / "other.pt2", logits=False), "--allow_small")
    with np.load(tmp_path / "b.npz") as data:                   # a file of pytorch-fid knows nothing: said
        np.savez(tmp_path / "foreign.npz", mu=data["mu"], sigma=data["sigma"])
    out, text = run(capsys, sets.flat, tmp_path / "foreign.npz", "--features", tiny, "--allow_small")
    assert out["fid"] == pytest.approx(direct["fid"], rel=1e-9) and out["n_reference"] is None and "make sure" in text


def test_statistics_of_another_resize_are_refused():            # trap 2: never mix a stored .npz with another resize
    side = dict(path="x", kind="statistics", n=5000, size=(8, 8), mu=torch.zeros(2), sigma=torch.eye(2), hash="0", features=None, logits=None)
    reference = SimpleNamespace(**side, meta=dict(features="inception-2015-12-05", features_hash="h", resize="tf"))
    for resize in ("tf", "torch"):
        extractor = SimpleNamespace(name="inception-2015-12-05", hash="h", resize=resize, inception=True, device="cpu")
        args = (SimpleNamespace(**{**side, "hash": "1", "meta": None}), reference, extractor, ("fid",))
        if resize == "tf":
            assert fid.compare(*args)["name"] == "FID-5k"       # trap 10: N in the name
        else:
            with pytest.raises(InputError, match="--resize tf: not comparable .* --resize torch"):
                fid.compare(*args)


def test_adm_reference_uses_its_mu_and_sigma(sets, tiny, capsys, tmp_path):         # trap 5
    m = moments(Tiny()(sets.a)[0] + 1)
    np.savez(tmp_path / "VIRTUAL.npz", arr_0=sets.b.numpy(), mu=m.mean.numpy(), sigma=m.cov.numpy(), mu_s=np.zeros(3), sigma_s=np.eye(3))
    out, _ = run(capsys, sets.flat, tmp_path / "VIRTUAL.npz", "--features", tiny, "--allow_small")
    plain, _ = run(capsys, sets.flat, sets.b_npz, "--features", tiny, "--allow_small")
    assert out["fid"] == pytest.approx(6, rel=1e-5)             # the mean gap alone, not arr_0's distance
    assert (out["precision"], out["recall"]) == (plain["precision"], plain["recall"]) and out["reference_kind"] == "statistics"


def test_random_features_are_never_called_fid(capsys, tmp_path):
    np.savez(tmp_path / "x.npz", pictures(5, 0, 16, 16).numpy())
    out, text = run(capsys, tmp_path / "x.npz", "toy", "--inception", "random", "--allow_small", "--num", 5)
    assert "random features" in text and "FID" not in text + json.dumps(out)
    assert out["features"].startswith("random features") and out["n_reference"] == 5 and out["fid"] > 0 and out["is"] > 1
    assert "covariance is singular" in text                     # N smaller than the dimension, said


def test_sizes_counts_and_crops(sets, tiny, capsys, tmp_path):  # traps 3 and 10
    big = save_folder(tmp_path / "big", pictures(4, 0, 50, 70))
    flags = ["--features", tiny, "--metrics", "fid"]
    with pytest.raises(InputError, match="24x24.*50x70.*--image_size"):
        run(capsys, sets.flat, big, *flags, "--allow_small")
    with pytest.raises(InputError, match="30 images.*2049.*--allow_small"):
        run(capsys, sets.flat, sets.b_npz, *flags)
    out, _ = run(capsys, sets.flat, big, *flags, "--allow_small", "--image_size", 24)
    crops = torch.stack([torch.from_numpy(np.array(center_crop(Image.fromarray(x.numpy()), 24))) for x in pictures(4, 0, 50, 70)])
    a, b = moments(Tiny()(sets.a)[0]), moments(Tiny()(crops)[0])
    assert out["fid"] == pytest.approx(fid.frechet_distance(a.mean, a.cov, b.mean, b.cov), rel=1e-6) and out["image_size"] == [24, 24]
    out, _ = run(capsys, sets.nested, sets.flat, *flags, "--allow_small", "--num", 6)
    assert out["n"] == 6 and out["n_reference"] == 30           # every fifth image: all three class folders
    few = fid.Images(sets.nested, 6)
    assert len({Path(few.data[i]).parent for i in few.indices}) == 3
    out, text = run(capsys, save_folder(tmp_path / "grey", torch.full((6, 24, 24, 3), 77, dtype=torch.uint8)), sets.flat,
                    *flags, "--allow_small")
    assert out["fid"] > 0 and "all alike" in text
    jpeg = save_folder(tmp_path / "jpeg", sets.a, "jpg")        # trap 7: artefacts count, and are named
    out, text = run(capsys, jpeg, sets.a_npz, *flags, "--allow_small")
    assert out["fid"] > 1e-4 and "JPEG" in text and any("JPEG" in note for note in out["notes"])


@pytest.mark.parametrize("nchw,logits,batch,size", [(True, True, None, None), (False, False, 4, 24), (True, True, 64, 24)])
def test_exported_networks_of_any_layout_and_batch(sets, tiny, capsys, tmp_path, nchw, logits, batch, size):
    path = export(tmp_path / "net.pt2", nchw, logits, batch, size)
    out, text = run(capsys, sets.flat, sets.b_npz, "--features", path, "--allow_small", "--batch_size", 7)
    want, _ = run(capsys, sets.flat, sets.b_npz, "--features", tiny, "--allow_small")
    assert out["fid"] == pytest.approx(want["fid"], rel=1e-5) and out["precision"] == want["precision"]
    assert out["is"] == pytest.approx(want["is"], rel=1e-5) if logits else out["is"] is None and "no logits" in text
    if size:
        with pytest.raises(InputError, match="24x24 images, not 16x16"):
            run(capsys, sets.flat, sets.b_npz, "--features", path, "--allow_small", "--image_size", 16)


def test_two_ranks_equal_one_process(sets, tiny, capsys, tmp_path):                 # issue 5: to 1e-6
    flags = [sets.flat, sets.b_npz, "--features", tiny, "--allow_small", "--metrics", "fid,is,precision,recall,psnr,ssim"]
    one, _ = run(capsys, *flags)
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint",
            "localhost:0", str(ROOT / "fid.py"), *flags, "--device", "cpu", "--batch_size", "4", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout.strip())                       # rank 0 alone prints, with --json one line alone
    assert two == json.loads((tmp_path / "out.json").read_text())
    for key in ("fid", "is", "is_std", "precision", "recall", "psnr", "ssim"):
        assert two[key] == pytest.approx(one[key], rel=1e-6), key
    assert (two["n"], two["samples_hash"], two["reference_hash"]) == (30, one["samples_hash"], one["reference_hash"])


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line


def bad_inputs(root, sets, tiny):
    def npz(name, **arrays):
        np.savez(root / name, **arrays)
        return root / name

    x = sets.a[:4].numpy()
    (root / "empty").mkdir()
    mixed = save_folder(root / "mixed", sets.a[:2])
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(root / "mixed" / "9999.png")
    broken = save_folder(root / "broken", sets.a[:2])
    (root / "broken" / "0001.png").write_bytes((root / "broken" / "0001.png").read_bytes()[:200])
    whole = Path(sets.a_npz).read_bytes()
    (root / "cut.npz").write_bytes(whole[:len(whole) // 2])
    (root / "text.npz").write_text("hello")
    torch.save({"a": torch.zeros(3)}, root / "foreign.pth")
    torch.save(fid.InceptionV3().state_dict(), root / "whole.pth")
    (root / "cut.pth").write_bytes((root / "whole.pth").read_bytes()[:1_000_000])
    (root / "cut.pt2").write_bytes(Path(tiny).read_bytes()[:2000])
    torch.export.save(torch.export.export(torch.nn.Linear(3, 3), (torch.zeros(2, 3),)), str(root / "linear.pt2"))
    net = ["--features", tiny]
    return {
        "missing": ([root / "nowhere", sets.flat, *net], "nowhere"),
        "empty": ([root / "empty", sets.flat, *net], "0 images"),
        "mixed sizes": ([mixed, sets.flat, *net], "9999.png is 9x9.*--image_size"),
        "unreadable": ([broken, sets.flat, *net], "0001.png: not a readable image"),
        "cut npz": ([root / "cut.npz", sets.flat, *net], "cut.npz"),
        "text npz": ([root / "text.npz", sets.flat, *net], "text.npz"),
        "wrong keys": ([npz("keys.npz", images=x), sets.flat, *net], "keys.npz: want .* arr_0"),
        "float images": ([npz("float.npz", arr_0=x / 255.0), sets.flat, *net], "float64.*want uint8"),
        "channels first": ([npz("nchw.npz", arr_0=x.transpose(0, 3, 1, 2)), sets.flat, *net], "want uint8 \\(N, H, W, 3\\)"),
        "objects": ([npz("object.npz", arr_0=np.array([{}], dtype=object)), sets.flat, *net], "object.npz"),
        "bad statistics": ([sets.flat, npz("mu.npz", mu=np.zeros(3), sigma=np.eye(4)), *net], "mu \\(D,\\) and sigma"),
        "other statistics": ([sets.flat, npz("d.npz", mu=np.zeros(3), sigma=np.eye(3)), *net], "different networks"),
        "one image": ([npz("one.npz", arr_0=x[:1]), sets.flat, *net], "one image has no covariance"),
        "too many": ([sets.flat, sets.flat, "--num", 31, *net], "30 images.*--num 31"),
        "none": ([sets.flat, sets.flat, "--num", 0, *net], "--num 0"),
        "metric": ([sets.flat, sets.flat, "--metrics", "fid,kid", *net], "--metrics"),
        "no reference": ([sets.flat, *net], "REFERENCE"),
        "stats name": ([sets.flat, "--save_stats", root / "stats", *net], "--save_stats"),
        "size": ([sets.flat, sets.flat, "--image_size", 0, *net], "--image_size"),
        "pairs": ([sets.flat, sets.flat, "--num", 3, "--metrics", "psnr"], "equally many"),
        "no network file": ([sets.flat, sets.flat, "--features", root / "none.pt2"], "none.pt2"),
        "cut network": ([sets.flat, sets.flat, "--features", root / "cut.pt2"], "cut.pt2"),
        "float network": ([sets.flat, sets.flat, "--features", root / "linear.pt2"], "uint8"),
        "no weights": ([sets.flat, sets.flat, "--inception", root / "none.pth"], "none.pth"),
        "cut weights": ([sets.flat, sets.flat, "--inception", root / "cut.pth"], "cut.pth"),
        "text weights": ([sets.flat, sets.flat, "--inception", root / "text.npz"], "text.npz"),
        "foreign weights": ([sets.flat, sets.flat, "--inception", root / "foreign.pth"], "272 of 272|tensors missing"),
    }


def test_bad_input_is_one_clear_line(sets, tiny, capsys, tmp_path):
    for name, (argv, match) in bad_inputs(tmp_path, sets, tiny).items():
        with pytest.raises(InputError, match=match) as e:
            run(capsys, *argv, "--allow_small")
        line = str(e.value).replace(str(tmp_path), "").replace(str(sets.root), "")
        assert "\n" not in line and len(line) < 200, f"{name}: {line}"
    done = subprocess.run([sys.executable, str(ROOT / "fid.py"), str(tmp_path / "nowhere"), "toy"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "nowhere" in done.stderr, done.stderr
    # the loader's own processes report too, instead of dying
    with pytest.raises(InputError, match="not a readable image"):
        list(fid.read_batches(tmp_path / "broken", batch=1, workers=1))


def test_weights_that_cannot_be_had(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(InputError) as e:
        fid.load_extractor("default")
    assert len(str(e.value)) < 200 and fid.URL in str(e.value) and fid.HASH in str(e.value) and "--inception" in str(e.value) and "\n" not in str(e.value)
    path = tmp_path / "checkpoints" / Path(fid.URL).name
    path.write_bytes(b"cut off")
    with pytest.raises(InputError, match="damaged.*delete it"):
        fid.load_extractor("default")


def test_needs_neither_scipy_nor_tensorflow():                  # traps 8 and 15
    code = "import sys, fid; print(sorted({'scipy', 'tensorflow', 'torchvision', 'torchmetrics'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
