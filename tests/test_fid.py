"""fid.py against its peers, closed forms and numbers worked out here.    python -m pytest tests/test_fid.py

Scores go wrong in the same few ways everywhere: each of these traps is named in a sentence where it is tested.
"""

import errno
import hashlib
import io
import json
import math
import os
import pickle
import resource
import runpy
import shutil
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

import fid
from ae import InputError, open_images, to_uint8

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
ALL = ("--metrics", "fid,is,precision,recall,psnr,ssim")


def pictures(n, seed=0, h=40, w=40, contrast=70):
    """Smooth coloured fields with some noise, uint8 (n, h, w, 3): random Inception features tell them apart."""
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.interpolate(torch.randn(n, 3, 5, 5, generator=g), size=(h, w), mode="bicubic")
    x = x * contrast + 128 + 8 * torch.randn(x.shape, generator=g)
    return x.clamp(0, 255).round().byte().permute(0, 2, 3, 1).contiguous()


def save_folder(folder, images, suffix="png", nested=False):
    """One file for each image, written in a shuffled order: a listing of the folder is then not sorted by itself."""
    for i in np.random.RandomState(0).permutation(len(images)):
        path = Path(folder, f"class{i % 3}" if nested else "", f"{i:04}.{suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(images[i])).save(path)
    return str(folder)


class Tiny(torch.nn.Module):
    """A feature network that costs nothing: means and contrasts of colours -> (features (B, 6), logits (B, 10))."""

    def __init__(self, nchw=False, logits=True):
        super().__init__()
        self.nchw, self.logits = nchw, logits
        self.register_buffer("w", 3 * torch.randn(6, 10, generator=torch.Generator().manual_seed(0)))

    def forward(self, img):
        x = img.float() / 32
        x = x.flatten(2) if self.nchw else x.flatten(1, 2).transpose(1, 2)           # (B, 3, HW)
        f = torch.cat([x.mean(2), x.std(2)], 1)
        return (f, f @ self.w) if self.logits else f


def export(path, nchw=False, logits=True, batch=None, size=None, net=None):
    """torch.export of Tiny for any batch and size, or for the given ones alone."""
    h, w = size or (16, 16)
    x = torch.zeros(batch or 3, *((3, h, w) if nchw else (h, w, 3)), dtype=torch.uint8)
    side = torch.export.Dim.DYNAMIC if size is None else None
    dims = {0: torch.export.Dim.DYNAMIC if batch is None else None, **dict.fromkeys((2, 3) if nchw else (1, 2), side)}
    torch.export.save(torch.export.export(net or Tiny(nchw, logits), (x,), dynamic_shapes=(dims,)), str(path))
    return str(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return export(tmp_path_factory.mktemp("net") / "tiny.pt2")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two sets of 29 pictures, as folder, nested folder, npz and compressed npz. The second is duller."""
    root = tmp_path_factory.mktemp("sets")
    a, b = pictures(29, 1, 24, 24), pictures(29, 2, 24, 24, contrast=55)
    np.savez(root / "a.npz", a.numpy())
    np.savez_compressed(root / "a_small.npz", arr_0=a.numpy(), arr_1=np.zeros(29))
    np.savez(root / "b.npz", arr_0=b.numpy())
    return SimpleNamespace(
        root=root, a=a, b=b, flat=save_folder(root / "a", a), nested=save_folder(root / "b", b, nested=True),
        a_npz=str(root / "a.npz"), a_small=str(root / "a_small.npz"), b_npz=str(root / "b.npz"))


def run(capsys, *argv):
    """fid.py in this process -> (JSON of the last line, the lines before it)."""
    capsys.readouterr()
    fid.main(["--workers", "0", "--device", "cpu", *map(str, argv)])
    lines = capsys.readouterr().out.strip().splitlines()
    return json.loads(lines[-1]), "\n".join(lines[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# The scores once more, by numpy, scipy and torch-fidelity


def frechet_by_hand(a, b):
    from scipy.linalg import sqrtm
    (ma, sa), (mb, sb) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (np.asarray(y, np.float64) for y in (a, b)))
    return ((ma - mb) ** 2).sum() + np.trace(sa + sb - 2 * sqrtm(sa @ sb).real)


def inside(points, manifold, k=3):
    """The share of points in one of the balls around the manifold's points, each out to its k-th other point."""
    from scipy.spatial.distance import cdist
    points, manifold = np.asarray(points, np.float64), np.asarray(manifold, np.float64)
    radius = np.sort(cdist(manifold, manifold), 1)[:, k]
    return (cdist(points, manifold) <= radius).any(1).mean()


def psnr_by_hand(a, b):
    return 10 * np.log10(255 ** 2 / ((a.double().numpy() - b.double().numpy()) ** 2).mean((1, 2, 3)))


def ssim_by_hand(a, b):
    """Wang et al. 2004 with the variances as they are written, window by window."""
    g = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5 ** 2))
    g = np.outer(g, g) / g.sum() ** 2
    p, q = (np.lib.stride_tricks.sliding_window_view(x.double().numpy(), (11, 11), (1, 2)) for x in (a, b))

    def mean(x):
        return (x * g).sum((-2, -1), keepdims=True)

    mp, mq = mean(p), mean(q)
    vp, vq, cov = mean((p - mp) ** 2), mean((q - mq) ** 2), mean((p - mp) * (q - mq))
    c1, c2 = 2.55 ** 2, 7.65 ** 2
    return ((2 * mp * mq + c1) * (2 * cov + c2) / ((mp ** 2 + mq ** 2 + c1) * (vp + vq + c2))).mean((1, 2, 3, 4, 5))


def expected(samples, reference):
    """What fid.py must say of two sets of uint8 images, seen by Tiny."""
    from torch_fidelity.metric_isc import isc_features_to_metric
    (f1, logits), (f2, _) = Tiny()(samples), Tiny()(reference)
    score = isc_features_to_metric(logits)
    return {"fid": frechet_by_hand(f1, f2), "is": score["inception_score_mean"], "is_std": score["inception_score_std"],
            "precision": inside(f1, f2), "recall": inside(f2, f1)}


def agree(out, want, rel=1e-5):
    """The named entries of out are the wanted ones; numbers to rel."""
    got, want = ({k: x[k] for k in want} for x in (out, want))
    for k, value in want.items():
        if isinstance(value, float):
            want[k] = pytest.approx(value, rel=rel, abs=1e-9)
    assert got == want


# ---------------------------------------------------------------------------------------------------------------------
# Inception against torch-fidelity and pytorch-fid: the same random weights, the same images


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    net = fid.InceptionV3(seed=3)
    for name, value in net.state_dict().items():                # batch norms that do something
        g = torch.Generator().manual_seed(len(name))
        if name.endswith(("running_mean", "bn.bias")):
            value.normal_(0, 0.1, generator=g)
        if name.endswith(("running_var", "bn.weight")):
            value.uniform_(0.8, 1.25, generator=g)
    net.fc.bias.data.normal_(generator=torch.Generator().manual_seed(0))    # the Inception Score must not see it
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(weights):
    return fid.load_extractor(weights)


@pytest.fixture(scope="module")
def peers(weights):
    """14 samples and 8 reference images, with what torch-fidelity's network makes of them."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(weights))
    fake, real = pictures(14, 6), pictures(8, 5, contrast=60)
    f1, logits = theirs(fake.permute(0, 3, 1, 2))
    f2, _ = theirs(real.permute(0, 3, 1, 2))
    return SimpleNamespace(fake=fake, real=real, f1=f1, f2=f2, logits=logits)


def close(a, b, rel):
    return (a - b).norm() <= rel * b.norm() and (a - b).abs().max() <= rel * b.abs().max()


def test_features_and_scores_equal_torch_fidelity(peers, inception, weights, tmp_path, capsys):
    """By --inception FILE, and with the default resize, which is TensorFlow's."""
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full
    features, logits = inception(peers.fake[:3])
    assert features.shape == (3, 2048) and logits.shape == (3, 1008) and features.dtype == torch.float32
    assert close(features, peers.f1[:3], 1e-4) and close(logits, peers.logits[:3], 1e-4)

    np.savez(tmp_path / "fake.npz", peers.fake.numpy())
    real = save_folder(tmp_path / "real", peers.real)
    out, text = run(capsys, tmp_path / "fake.npz", real, "--inception", weights, "--allow_small")
    # 14 images in 10 splits: the score depends on which images RandomState(2020) puts together.
    isc = isc_features_to_metric(peers.logits)
    assert out["is"] - 1 == pytest.approx(isc["inception_score_mean"] - 1, rel=1e-3)
    assert out["is_std"] == pytest.approx(isc["inception_score_std"], rel=1e-3)
    # The arguments of their function changed places between versions; asking by meaning decides which: a collapsed set
    # has precision 1 and recall 0.
    line, point = torch.arange(20.)[:, None] * torch.ones(1, 3), torch.full((20, 3), 5.0) + 1e-3 * torch.randn(20, 3)
    fake_first = calculate_precision_recall_full(point, line)[0] == 1
    pair = (peers.f1, peers.f2) if fake_first else (peers.f2, peers.f1)
    want = calculate_precision_recall_full(*pair)
    assert (out["precision"], out["recall"]) == pytest.approx(want, rel=1e-3) and want[0] != want[1]
    # All 2048 features, few images: with A the centred features / sqrt(N - 1), tr((S1 S2)^.5) is the nuclear norm of
    # A1 A2^T.
    f1, f2 = peers.f1.double(), peers.f2.double()
    a1, a2 = ((f - f.mean(0)) / math.sqrt(len(f) - 1) for f in (f1, f2))
    exact = (f1.mean(0) - f2.mean(0)).square().sum() + a1.square().sum() + a2.square().sum()
    exact -= 2 * torch.linalg.matrix_norm(a1 @ a2.T, "nuc")
    assert out["fid"] == pytest.approx(exact.item(), rel=1e-3) and out["fid"] > 0.1
    assert (out["name"], out["resize"], out["features"]) == ("FID-14", "tf", "inception weights random.pth")
    assert out["features_hash"] == hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    assert f"\nFID-14 {exact:.2f}" in text and f"\nInception Score {out['is']:.4f} +- {out['is_std']:.4f}" in text
    # Fewer images than features leave a singular covariance and a distance that is too large: said.
    assert out["notes"] == ["14 images, 2048 features: the covariance is singular, the distance biased upwards"]


def test_resize_torch_equals_pytorch_fid_and_is_not_slower(weights, monkeypatch, tmp_path, capsys):
    import pytorch_fid.inception
    state = torch.load(weights, weights_only=True)
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *a, **k: state)
    theirs = pytorch_fid.inception.InceptionV3().eval()
    img = pictures(4, 6)
    ours, seconds = fid.load_extractor(weights, resize="torch"), {"ours": [], "theirs": []}
    with torch.no_grad():
        for _ in range(3):                                      # in turn, in seconds of this process alone
            start = time.process_time()
            want = theirs(img.permute(0, 3, 1, 2).float() / 255)[0].flatten(1)
            seconds["theirs"].append(time.process_time() - start)
            start = time.process_time()
            got, _ = ours(img)
            seconds["ours"].append(time.process_time() - start)
    assert close(got, want, 1e-4)
    assert min(seconds["ours"]) < 1.1 * min(seconds["theirs"]), seconds

    # By the flag: the score of four images, which make one split, from pytorch-fid's features and no bias.
    log_p = (want @ state["fc.weight"].T).double().log_softmax(1)
    score = (log_p.exp() * (log_p - log_p.exp().mean(0).log())).sum(1).mean().exp().item()
    np.savez(tmp_path / "four.npz", img.numpy())
    np.savez(tmp_path / "any.npz", mu=np.zeros(2), sigma=np.eye(2))
    flags = ("--inception", weights, "--resize", "torch", "--metrics", "is", "--allow_small")
    out, _ = run(capsys, tmp_path / "four.npz", tmp_path / "any.npz", *flags)
    assert out["is"] - 1 == pytest.approx(score - 1, rel=1e-3) and out["resize"] == "torch"


def test_full_precision_whatever_the_caller_allows(inception):
    """bf16 or TF32 in the feature network moves scores: it runs in fp32, and the caller's settings come back."""
    img = pictures(1, 6)
    ops = {"cuda matmul": torch.backends.cuda.matmul, "cuda conv": torch.backends.cudnn.conv,
           "cpu matmul": torch.backends.mkldnn.matmul, "cpu conv": torch.backends.mkldnn.conv}
    before, seen = {name: op.fp32_precision for name, op in ops.items()}, set()

    def look(*_):
        seen.update((name, op.fp32_precision) for name, op in ops.items())

    want, _ = inception(img)
    allowed = {name: "tf32" if "cuda" in name else "bf16" for name in ops}
    hook = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        for name, op in ops.items():
            op.fp32_precision = allowed[name]
        with torch.autocast("cpu", torch.bfloat16):
            got, _ = inception(img)
        after = {name: op.fp32_precision for name, op in ops.items()}
    finally:
        hook.remove()
        for name, op in ops.items():
            op.fp32_precision = before[name]
    assert got.dtype == torch.float32 and torch.equal(got, want)
    assert seen == {(name, "ieee") for name in ops} and after == allowed


@pytest.mark.parametrize("h,w", [(5, 7), (299, 299), (400, 1100)])
def test_resize_is_bilinear_on_the_legacy_grid_or_on_pixel_centres(h, w):
    """TensorFlow 1, torch and PIL resize differently. The default is TensorFlow's, without half-pixel centres; --resize
    torch has them; neither averages over more than four pixels when it makes an image smaller."""
    img = pictures(1, 0, h, w)
    x = img[0].double()
    for resize, shift, middle in ((fid.resize_tf, 0, 128), (fid.resize_torch, 0.5, 127.5)):
        out = resize(img)
        assert out.shape == (1, 3, 299, 299)
        for i, j in ((0, 0), (298, 298), (17, 250), (131, 4)):
            y, z = (max(0, (k + shift) * n / 299 - shift) for k, n in ((i, h), (j, w)))
            y0, z0 = int(y), int(z)
            y1, z1, dy, dz = min(y0 + 1, h - 1), min(z0 + 1, w - 1), y - y0, z - z0
            want = (1 - dy) * ((1 - dz) * x[y0, z0] + dz * x[y0, z1]) + dy * ((1 - dz) * x[y1, z0] + dz * x[y1, z1])
            assert torch.allclose(out[0, :, i, j].double() * middle + middle, want, atol=1e-3 if w < 1000 else 2e-2)


def test_random_features_are_seeded_and_never_called_fid(capsys, tmp_path):
    """Numbers of another network than the published Inception cannot be compared: they must not carry its name."""
    x = pictures(3, 0, 16, 16)
    np.savez(tmp_path / "x.npz", x.numpy())
    np.savez(tmp_path / "any.npz", mu=np.zeros(2), sigma=np.eye(2))
    flags = ("--inception", "random", "--allow_small", "--metrics", "is")
    out, text = run(capsys, tmp_path / "x.npz", tmp_path / "any.npz", *flags)
    assert "\nrandom features (seed 0): Inception Score" in text and "FID" not in text + json.dumps(out)
    assert out["features"].startswith("random features")
    assert out["name"].startswith("Frechet distance of random features")
    net = fid.InceptionV3()                                     # the seed is 0
    g = torch.Generator().manual_seed(0)
    he = torch.empty(32, 3, 3, 3).normal_(0, math.sqrt(2 / 27), generator=g)
    assert torch.allclose(net.state_dict()["Conv2d_1a_3x3.conv.weight"], he)
    assert net.fc.weight.std() == pytest.approx(1, rel=0.01) and not net.fc.bias.any() and not net.training
    _, logits = net(x)
    log_p = logits.double().log_softmax(1)                      # three images make one split
    score = (log_p.exp() * (log_p - log_p.exp().mean(0).log())).sum(1).mean().exp().item()
    assert out["is"] == pytest.approx(score, rel=1e-4) and score > 1.01


# ---------------------------------------------------------------------------------------------------------------------
# Metrics: closed forms, oracles, traps


def gaussian(n, d, seed, scale=1.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def moments(x, batch=64):
    m = fid.Moments()
    for part in x.split(batch):
        m.update(part)
    return m


def test_frechet_equals_the_peers_functions():
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(48, 48, generator=g)
    a, b = torch.randn(300, 48, generator=g) @ mix, torch.randn(200, 48, generator=g).exp() @ mix + 1
    sa, sb = (fid_features_to_statistics(x.double()) for x in (a, b))
    ours = fid.frechet_distance(sa["mu"], sa["sigma"], sb["mu"], sb["sigma"])
    assert ours == pytest.approx(fid_statistics_to_metric(sa, sb, False)["frechet_inception_distance"], rel=1e-6)
    assert ours == pytest.approx(calculate_frechet_distance(sa["mu"], sa["sigma"], sb["mu"], sb["sigma"]), rel=1e-6)
    ma, mb = moments(a), moments(b)
    assert ours == pytest.approx(fid.frechet_distance(ma.mean, ma.cov, mb.mean, mb.cov), rel=1e-6)


def test_frechet_of_known_gaussians():
    d = 5
    eye, zero = np.eye(d), np.zeros(d)
    assert fid.frechet_distance(zero, eye, zero + 2, eye) == pytest.approx(4 * d)                   # |mean gap|^2
    assert fid.frechet_distance(zero, 4 * eye, zero, 9 * eye) == pytest.approx(d * (2 - 3) ** 2)    # sum (s1 - s2)^2
    q, _ = np.linalg.qr(np.random.RandomState(0).randn(d, d))
    s1, s2 = np.arange(1, d + 1.0), np.arange(d, 0, -1.0)
    s1, s2 = s1 + 0.5, s2 ** 1.5
    rotated = [q @ np.diag(s ** 2) @ q.T for s in (s1, s2)]
    assert fid.frechet_distance(zero, rotated[0], zero + 1, rotated[1]) == pytest.approx(d + ((s1 - s2) ** 2).sum())
    assert fid.frechet_distance(zero, 0 * eye, zero + 1, 4 * eye) == pytest.approx(5 * d)           # one set a point
    small = 1e-12 * np.diag(s1 ** 2)                            # float32 would lose it beside 1
    assert fid.frechet_distance(zero + 1, small, zero + 1, 4 * small) == pytest.approx(1e-12 * (s1 ** 2).sum())


@pytest.mark.parametrize("n,rel", [(400, 1e-6), (30, 1e-3)])
def test_frechet_trace_equals_sqrtm(n, rel):
    """With fewer images than features a matrix square root turns complex; symmetric eigenvalues stay real and agree."""
    a, b = gaussian(n, 64, 0), gaussian(n, 64, 1) * torch.linspace(0.5, 2, 64).double()
    ma, mb = moments(a), moments(b)
    assert fid.frechet_distance(ma.mean, ma.cov, mb.mean, mb.cov) == pytest.approx(frechet_by_hand(a, b), rel=rel)


def test_collapsed_and_identical_samples_stay_finite_and_not_negative():
    """Where all samples are alike the matrix square root gives NaN, and rounding may turn a distance of 0 negative."""
    for seed in range(8):
        a = moments(gaussian(50, 64, seed))
        same = fid.frechet_distance(a.mean, a.cov, a.mean, a.cov)
        assert 0 <= same < 1e-5
    point = moments(torch.ones(50, 64))
    want = (a.mean - 1).square().sum() + a.cov.trace()
    assert fid.frechet_distance(a.mean, a.cov, point.mean, point.cov) == pytest.approx(want.item(), rel=1e-9)
    with pytest.raises(InputError, match="64 and 3 features come from different networks"):
        fid.frechet_distance(a.mean, a.cov, np.zeros(3), np.eye(3))
    good = (np.zeros(2), np.eye(2), np.ones(2), np.eye(2))
    for i in range(4):
        bad = list(good)
        bad[i] = bad[i] * math.nan if i % 2 else bad[i] + math.inf
        with pytest.raises(InputError, match="not finite"):
            fid.frechet_distance(*bad)
    with pytest.raises(InputError, match="one image"):
        moments(torch.ones(1, 4)).cov
    assert not moments(torch.ones(2, 4)).cov.any()


def test_moments_are_float64_unbiased_and_rows_are_samples():
    """float32 sums lose the spread, N for N - 1 shrinks it, torch.cov wants features as rows: all were published."""
    x = (gaussian(1000, 7, 0, 0.1) + 1000).float()
    m = moments(x, 33)
    assert m.n == 1000 and m.mean.dtype == m.cov.dtype == torch.float64
    assert np.allclose(m.mean, x.double().mean(0), rtol=1e-12)
    assert np.allclose(m.cov, np.cov(x.double().numpy(), rowvar=False), rtol=1e-6)    # N - 1, (D, D)
    few = moments(torch.tensor([[0.0, 1], [2, 1], [4, 4]]))     # by hand: 3 - 1 = 2 under the sums
    assert few.mean.tolist() == [2, 2] and few.cov.tolist() == [[4, 3], [3, 3]]


def test_few_images_are_biased_upwards():
    """The same Gaussian twice is not at distance 0, and farther with fewer images: hence a bound, and N in the name."""
    distance = []
    for n in (1000, 250, 60):
        a, b = moments(gaussian(n, 32, 1)), moments(gaussian(n, 32, 2))
        distance.append(fid.frechet_distance(a.mean, a.cov, b.mean, b.cov))
    assert 0 < distance[0] * 3 < distance[1] * 1.5 < distance[2]


def test_inception_score_of_uniform_and_one_hot():
    """Uniform predictions score 1, K classes in equal shares K. Samples sorted by class must be shuffled before the
    splits, and a probability of exactly 0 must not become 0 * log(0)."""
    assert fid.inception_score(torch.zeros(100, 8)) == pytest.approx((1, 0))
    one_hot = 1e4 * torch.eye(4).repeat_interleave(500, 0)      # unshuffled splits would score 1
    mean, std = fid.inception_score(one_hot)
    assert mean == pytest.approx(4, rel=0.01) and std < 0.05
    assert fid.inception_score(one_hot[::500])[0] == pytest.approx(4)         # fewer images than splits: one split
    assert fid.inception_score(one_hot, splits=1) == pytest.approx((4, 0))
    assert fid.inception_score(1e4 * torch.eye(10)) == (1, 0)   # ten images are ten splits of one


def test_inception_score_of_differing_images_equals_torch_fidelity():
    """10 splits, not all of one size, shuffled by RandomState(2020), in float64; the deviation over splits by N."""
    from torch_fidelity.metric_isc import isc_features_to_metric
    for n in (10, 53, 300):
        logits = gaussian(n, 12, n, 2.0).float()
        want = isc_features_to_metric(logits)
        want = want["inception_score_mean"], want["inception_score_std"]
        assert fid.inception_score(logits) == pytest.approx(want, rel=1e-10) and (n == 10 or want[1] > 0.1)
    want = isc_features_to_metric(logits, splits=3)
    assert fid.inception_score(logits, splits=3)[0] == pytest.approx(want["inception_score_mean"], rel=1e-10)


def test_precision_and_recall_are_not_swapped():
    """A generator that always draws nearly the same real image is precise and recalls nothing."""
    real = gaussian(200, 4, 0)
    collapsed = real[:1] + gaussian(300, 4, 1, 1e-3)
    precision, recall = fid.precision_recall(real, collapsed)
    assert precision == 1 and recall < 0.05
    assert fid.precision_recall(collapsed, real)[0] < 0.05
    assert fid.precision_recall(real, real) == (1, 1)
    assert fid.precision_recall(real, real + 100) == (0, 0)


def test_the_point_itself_is_not_its_neighbour():
    """The ball of a point reaches to its k-th other point; counting the point itself makes it one too small."""
    real = torch.tensor([[0.0], [1], [3], [7]])                 # k = 1 radii: 1, 1, 2, 4; themselves counted, 0
    fake = torch.tensor([[-1.5], [-0.9], [2.5], [10.9], [11.1]])
    assert fid.precision_recall(real, fake, k=1)[0] == 3 / 5
    # radii of fake: 0.6, 0.6, 3.4, 0.2, 0.2 -> 0 and 1 and 3 lie within 3.4 of 2.5; 7 in none
    assert fid.precision_recall(real, fake, k=1)[1] == 3 / 4
    edge = torch.tensor([[11.0], [30], [31], [34]])             # 11 lies on the edge of 7's ball
    assert fid.precision_recall(real, edge, k=1)[0] == 1 / 4
    with pytest.raises(InputError, match="more than k = 3"):
        fid.precision_recall(gaussian(9, 6, 0), gaussian(3, 6, 1))
    assert fid.precision_recall(gaussian(4, 6, 0), gaussian(4, 6, 0)) == (1, 1)


def test_precision_and_recall_by_hand():
    """k = 3, whatever the chunks, in float64: half precision, as ADM's, or float32 lose the gaps of long vectors."""
    real, fake = gaussian(101, 6, 0), gaussian(77, 6, 1, 0.8) + 0.3
    want = inside(fake, real), inside(real, fake)
    assert 0.2 < want[1] < want[0] < 1
    for rows in (None, 10, 1000):
        assert fid.precision_recall(real, fake, rows=rows) == pytest.approx(want, rel=1e-12)
    real, fake = (real * 0.1 + 100).float(), (fake * 0.1 + 100).float()
    assert fid.precision_recall(real, fake) == pytest.approx((inside(fake, real), inside(real, fake)), rel=1e-12)
    # The same image twice, its features rounded otherwise (1e-6 of their length), is still one image, at distance 0.
    same = torch.full((10, 2048), 0.3)
    assert fid.precision_recall(same, same) == (1, 1)
    rounded = 0.3 + 3e-7 * gaussian(10, 2048, 0)
    assert fid.precision_recall(same, rounded) == (1, 1)
    assert fid.precision_recall(same, 0.3 + 3e-4 * gaussian(10, 2048, 0))[0] == 0


def test_psnr_and_ssim_by_definition():
    a, b = pictures(3, 0, 20, 17), pictures(3, 1, 20, 17)
    b[1] = (a[1].int() + 3).clamp(0, 255).byte()
    a[2], b[2] = 250, 250                                       # bright and nearly flat: float32 has few digits left
    a[2, ::2, ::3], b[2, ::3, 1::2] = 252, 251
    assert fid.psnr(a, b).tolist() == pytest.approx(psnr_by_hand(a, b).tolist(), rel=1e-6)
    assert fid.psnr(a, a).tolist() == [math.inf] * 3
    want = ssim_by_hand(a, b).tolist()
    assert fid.ssim(a, b).tolist() == pytest.approx(want, rel=1e-5) and max(want) - min(want) > 0.1
    assert fid.ssim(a, a).tolist() == pytest.approx([1, 1, 1])
    with torch.autocast("cpu", torch.bfloat16):
        assert fid.ssim(a, b).tolist() == pytest.approx(want, rel=1e-5)
    one = a[:, :11, :11], b[:, :11, :11]                        # a single window
    assert fid.ssim(*one).tolist() == pytest.approx(ssim_by_hand(*one).tolist(), rel=1e-5)
    for small in ((slice(None), slice(10)), (slice(None), slice(None), slice(10))):
        with pytest.raises(InputError, match="11"):
            fid.ssim(a[small], b[small])


def test_pixels_are_rounded_not_truncated(tiny):
    """Truncation makes every image half a level darker. Floats and channels first are refused: no range is guessed."""
    x = torch.linspace(-1.1, 1.1, 100_002).view(1, 3, 1, -1)
    img = to_uint8(x).permute(0, 3, 1, 2).double()
    exact = (x.clamp(-1, 1).double() + 1) * 127.5
    assert (img - exact).abs().max() <= 0.5 + 1e-3 and abs((img - exact).mean()) < 1e-3
    extract = fid.load_extractor(features=tiny)
    for bad in (pictures(1).float(), pictures(1).permute(0, 3, 1, 2), pictures(1)[0]):
        with pytest.raises(InputError, match="uint8 \\(B, H, W, 3\\)"):
            extract(bad)


# ---------------------------------------------------------------------------------------------------------------------
# Networks of torch.export, and Inception's weight file


@pytest.mark.parametrize("nchw,logits,batch,size", [
    (False, True, None, None), (True, True, None, None), (False, False, 4, (24, 20)), (True, True, 9, (24, 20)),
    (False, True, 1, (24, 20))])
def test_exported_networks_of_any_layout_and_batch(tmp_path, nchw, logits, batch, size):
    """A fixed batch is filled up and what is too much dropped; a fixed size takes no other."""
    extract = fid.load_extractor(features=export(tmp_path / "net.pt2", nchw, logits, batch, size))
    for n in (7, 9):
        img = pictures(n, 3, 24, 20)
        features, scores = extract(img)
        want, want_scores = Tiny()(img)
        assert features.shape == (n, 6) and torch.allclose(features, want, rtol=1e-5)
        assert torch.allclose(scores, want_scores, rtol=1e-4, atol=1e-4) if logits else scores is None
    assert (extract.name, extract.resize) == ("net", "own")
    assert extract.hash == hashlib.sha256((tmp_path / "net.pt2").read_bytes()).hexdigest()[:16]
    other = img.transpose(1, 2).contiguous()                    # 20 high, 24 wide
    if size:
        with pytest.raises(InputError, match="24x20 images, not 20x24"):
            extract(other)
    else:
        assert torch.allclose(extract(other)[0], Tiny()(other)[0], rtol=1e-5)


class Odd(torch.nn.Module):
    """Features and logits in other precisions, and something else that is no use here; or features that are maps."""

    def __init__(self, maps=False):
        super().__init__()
        self.maps = maps

    def forward(self, img):
        x = img.double().mean((1, 2))
        return x[:, :, None] if self.maps else (x, x.half(), img)


def test_exported_networks_give_fp32_features_and_must_be_of_images(tmp_path):
    img = pictures(3, 0, 16, 16)
    features, logits = fid.load_extractor(features=export(tmp_path / "odd.pt2", net=Odd()))(img)
    assert features.dtype == logits.dtype == torch.float32
    assert torch.equal(features, img.double().mean((1, 2)).float())
    with pytest.raises(InputError, match="want features \\(B, D\\)"):
        fid.load_extractor(features=export(tmp_path / "maps.pt2", net=Odd(maps=True)))(img)

    class Two(torch.nn.Module):
        def forward(self, a, b=None):
            return a.float().flatten(1) if b is None else a.float().flatten(1) + b.float().flatten(1)

    grey, rgb = torch.zeros(2, 8, 8, 1, dtype=torch.uint8), torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    for args in ((grey,), (rgb, rgb), (rgb.float(),), (rgb[0],)):
        torch.export.save(torch.export.export(Two(), args), str(tmp_path / "two.pt2"))
        with pytest.raises(InputError, match="export it on one uint8 tensor"):
            fid.load_extractor(features=str(tmp_path / "two.pt2"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """torch.hub without a network: hub.files is its folder, hub.calls what was asked for."""
    hub = SimpleNamespace(files=tmp_path / "hub" / "checkpoints", calls=[], source=None)

    def download(url, path, hash_prefix=None, progress=True):
        hub.calls.append((url, path, hash_prefix))
        if hub.source is None:
            raise URLError("no network")
        os.symlink(hub.source, path)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return hub


def test_default_is_the_published_file_and_names_say_how_many(hub, weights, sets, tiny, monkeypatch, tmp_path, capsys):
    """torchvision's Inception is another network: the default is the one published file, checked by its hash. The name
    says how many images there were, and statistics made with another resize or network are refused, never mixed."""
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (fid.URL, fid.HASH) == (PUBLISHED, "6726825d")
    monkeypatch.setattr(fid, "HASH", digest[:8])
    run(capsys, sets.b_npz, "--save_stats", tmp_path / "own.npz", "--features", tiny)
    with np.load(tmp_path / "own.npz") as file:
        data = {"mu": file["mu"], "sigma": file["sigma"]}
        own = json.loads(str(file["meta"]))

    def stats(name, **meta):
        np.savez(tmp_path / name, **data, meta=json.dumps({**own, **meta}))
        return tmp_path / name

    published = dict(features="inception-2015-12-05", features_hash=digest[:16], resize="tf")
    a, b = stats("a.npz", n=50_000, **published), stats("b.npz", n=2049, **published)
    hub.source = weights
    out, text = run(capsys, a, b)
    assert hub.calls == [(PUBLISHED, str(hub.files / "pt_inception-2015-12-05-6726825d.pth"), digest[:8])]
    agree(out, {"name": "FID-50k", "n": 50_000, "n_reference": 2049, "fid": 0.0})
    assert (out["features"], out["features_hash"], out["resize"]) == ("inception-2015-12-05", digest[:16], "tf")
    assert "\nFID-50k 0.0000" in text and "\nfeatures: inception-2015-12-05" in text
    with pytest.raises(InputError, match="a.npz was.*2015-12-05, --resize tf: not.*2015-12-05, --resize torch"):
        run(capsys, a, b, "--inception", weights, "--resize", "torch")                # the file is known by its hash
    with pytest.raises(InputError, match="b.npz was made with inception-2015-12-05.*not comparable with tiny"):
        run(capsys, stats("own5k.npz", n=5000), b, "--features", tiny)
    for n, name in ((5000, "5k"), (5500, "5500"), (2049, "2049")):
        out, _ = run(capsys, stats("s.npz", n=n), stats("r.npz", n=9000), "--features", tiny)
        assert out["name"] == f"Frechet distance of tiny, {name} images"
    for small in ((2048, 9000), (9000, 2048)):                  # 2049 images are the fewest, on either side
        with pytest.raises(InputError, match="2048 images.*2049.*--allow_small"):
            run(capsys, stats("s.npz", n=small[0]), stats("r.npz", n=small[1]), "--features", tiny)


def test_weights_that_cannot_be_had_or_do_not_fit(hub, weights, tmp_path):
    with pytest.raises(InputError) as e:
        fid.load_extractor("default")
    line = str(e.value)
    assert len(line) < 200 and "\n" not in line
    assert fid.URL in line and fid.HASH in line and "--inception" in line
    (hub.files / Path(fid.URL).name).write_bytes(b"cut off")
    with pytest.raises(InputError, match="damaged.*delete it"):
        fid.load_extractor("default")
    state = torch.load(weights, weights_only=True)
    del state["Mixed_5b.branch1x1.bn.bias"]
    state["fc.weight"] = state["fc.weight"][:1000]              # torchvision's
    torch.save(state, tmp_path / "other.pth")                   # 94 convolutions of 5 tensors, and 2 more: 472
    with pytest.raises(InputError, match="other.pth: 2 of 472 tensors.*first Mixed_5b.branch1x1.bn.bias"):
        fid.load_extractor(tmp_path / "other.pth")


# ---------------------------------------------------------------------------------------------------------------------
# The command line: every number by hand, every flag changes what it says


def test_every_input_form_gives_the_numbers_worked_out_by_hand(sets, tiny, capsys):
    want = expected(sets.a, sets.b)
    want.update(psnr=psnr_by_hand(sets.a, sets.b).mean(), ssim=ssim_by_hand(sets.a, sets.b).mean())
    assert 0.2 < want["precision"] < want["recall"] < 0.8 and want["fid"] > 0.1     # swapped, they would be noticed
    flags = ["--features", tiny, "--allow_small", *ALL]
    for samples, *more in ((sets.flat,), (sets.a_npz, "--batch_size", 7), (sets.a_small, "--batch_size", 1),
                           (sets.flat, "--batch_size", 4, "--workers", 2)):
        out, text = run(capsys, samples, sets.b_npz, *flags, *more)
        agree(out, want)
    assert (out["n"], out["n_reference"], out["image_size"]) == (29, 29, [24, 24])
    assert (out["features"], out["resize"], out["name"]) == ("tiny", "own", "Frechet distance of tiny, 29 images")
    agree(out, {"samples": sets.flat, "reference": sets.b_npz, "reference_kind": "npz"})    # which reference, on record
    assert out["notes"] == [] and out["versions"]["torch"] == torch.__version__ and 0 <= out["seconds"] < 60
    assert text.splitlines()[-6:] == [
        f"Frechet distance of tiny, 29 images {out['fid']:.4f}",
        f"tiny: Inception Score {out['is']:.4f} +- {out['is_std']:.4f}",
        f"tiny: precision {out['precision']:.4f}", f"tiny: recall {out['recall']:.4f}",
        f"PSNR {out['psnr']:.4f}", f"SSIM {out['ssim']:.4f}"]


def test_equal_sets_are_noted(sets, tiny, capsys, tmp_path):
    out, text = run(capsys, sets.flat, sets.a_npz, "--features", tiny, "--allow_small", *ALL)
    agree(out, {"fid": 0.0, "precision": 1.0, "recall": 1.0, "ssim": 1.0, "psnr": None})      # JSON has no infinity
    assert out["fid"] < 1e-9 and "\nPSNR inf" in text and "\nnote: samples and reference are identical" in text
    assert out["notes"] == ["samples and reference are identical"]
    twisted, _ = run(capsys, sets.nested, sets.b_npz, "--features", tiny, "--allow_small")
    assert twisted["notes"] == out["notes"]                     # in another order, the same set
    for name, k in (("one", 1), ("four", 4)):                   # the same mean alone does not make them equal
        np.savez(tmp_path / f"{name}.npz", mu=np.zeros(6), sigma=k * np.eye(6))
    flags = ("--features", tiny, "--metrics", "fid")            # and their counts, unknown, are not said to be small
    out, _ = run(capsys, tmp_path / "one.npz", tmp_path / "four.npz", *flags)
    agree(out, {"fid": 6.0, "n": None})
    assert len(out["notes"]) == 2 and all("does not say" in note for note in out["notes"])


def test_metrics_asked_for_and_no_others(sets, tiny, capsys, monkeypatch):
    want, flags = expected(sets.a, sets.b), ("--features", tiny, "--allow_small")
    out, _ = run(capsys, sets.flat, sets.b_npz, *flags)         # without the flag: the first four
    agree(out, want)
    assert out.get("psnr") is out.get("ssim") is None
    for metrics, keys in (("fid", ["fid"]), ("is", ["is", "is_std"]), ("recall", ["precision", "recall"]),
                          ("precision", ["precision", "recall"])):
        out, text = run(capsys, sets.flat, sets.b_npz, *flags, "--metrics", metrics)
        agree(out, {k: v if k in keys else None for k, v in want.items()})
        assert ("Inception Score" in text) == (metrics == "is") and ("Frechet" in text) == (metrics == "fid")

    def never(*args):
        raise AssertionError("no network is needed")

    monkeypatch.setattr(fid, "load_extractor", never)           # image by image: no network, and any number of images
    out, _ = run(capsys, sets.flat, sets.b_npz, "--metrics", "psnr")
    agree(out, {"psnr": psnr_by_hand(sets.a, sets.b).mean()})
    assert "ssim" not in out and "fid" not in out
    with pytest.raises(InputError, match="29 images; .* 2049"):                       # refused before the work begins
        run(capsys, sets.flat, sets.b_npz)


def test_batch_size_and_workers_reach_their_places(sets, tiny, capsys, monkeypatch):
    batches, workers = [], []
    loader = torch.utils.data.DataLoader

    def spy(*args, **kwargs):
        workers.append(kwargs["num_workers"])
        return loader(*args, **kwargs)

    def look(module, args, output):
        if args and torch.is_tensor(args[0]) and args[0].dtype == torch.uint8:
            batches.append(len(args[0]))

    monkeypatch.setattr(torch.utils.data, "DataLoader", spy)
    hook = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        run(capsys, sets.flat, sets.b_npz, "--features", tiny, "--allow_small", "--batch_size", 12, "--workers", 1)
    finally:
        hook.remove()
    assert set(batches) == {12, 5} and workers == [1, 0]        # an .npz is mapped: nothing to decode


def test_json_alone_and_to_a_file(sets, tiny, capsys, tmp_path):
    flags = ("--features", tiny, "--allow_small", "--metrics", "fid", "--json")
    out, text = run(capsys, sets.flat, sets.b_npz, *flags)
    agree(out, {"fid": expected(sets.a, sets.b)["fid"]})
    assert text == ""
    out, text = run(capsys, sets.flat, sets.b_npz, *flags, tmp_path / "out.json")
    assert text == "" and json.loads((tmp_path / "out.json").read_text()) == out


def test_num_takes_samples_evenly_and_leaves_the_reference_whole(sets, tiny, capsys):
    """Class folders come one after another: the first N images would be of the first classes alone."""
    flags = ("--features", tiny, "--allow_small")
    out, _ = run(capsys, sets.a_npz, sets.b_npz, *flags, "--num", 12)
    agree(out, expected(sets.a[[0, 2, 4, 7, 9, 12, 14, 16, 19, 21, 24, 26]], sets.b))
    assert (out["n"], out["n_reference"]) == (12, 29)
    order = [*range(0, 29, 3), *range(1, 29, 3), *range(2, 29, 3)]            # class0/0000.png, class0/0003.png, ...
    out, _ = run(capsys, sets.nested, sets.flat, *flags, "--num", 7, "--metrics", "fid")
    few = [order[i] for i in (0, 4, 8, 12, 16, 20, 24)]
    agree(out, {"n": 7, "n_reference": 29, "fid": frechet_by_hand(Tiny()(sets.b[few])[0], Tiny()(sets.a)[0])})
    assert out["notes"] == []
    out, _ = run(capsys, sets.nested, sets.flat, *flags, "--num", 6, "--metrics", "fid")
    assert "6 images, 6 features: the covariance is singular" in out["notes"][0]
    for n, notes in ((3, ["precision and recall need images on both sides, more than 3"]), (4, [])):
        out, _ = run(capsys, sets.nested, sets.flat, *flags, "--num", n, "--metrics", "recall")
        assert out["notes"] == notes and (out["recall"] is None) == (n == 3)
    out, _ = run(capsys, sets.nested, sets.b_npz, "--metrics", "ssim", "--num", 29)
    assert out["ssim"] < 0.5                                    # sorted by path, the nested folder has another order


def crop_by_hand(x, size):
    """ADM's crop of a 50 x 70 image to 24, or of a 24 x 24 image to 16 or 30: halve by box, bicubic, the middle."""
    img = Image.fromarray(np.asarray(x))
    if size == 24:
        img = img.resize((35, 25), Image.BOX).resize((34, 24), Image.BICUBIC).crop((5, 0, 29, 24))
    else:
        img = img.resize((size, size), Image.BICUBIC)
    return torch.from_numpy(np.array(img))


def test_image_size_crops_both_sides_and_sizes_must_be_equal(sets, tiny, capsys, tmp_path):
    """Samples of 256 pixels against originals of another size or crop score several times too high: refused."""
    large = pictures(29, 0, 50, 70)
    big = save_folder(tmp_path / "big", large)
    np.savez(tmp_path / "big.npz", large.numpy())
    flags = ["--features", tiny, "--allow_small"]
    with pytest.raises(InputError, match="24x24.*50x70.*--image_size"):
        run(capsys, sets.flat, big, *flags)
    crops = torch.stack([crop_by_hand(x, 24) for x in large])
    for source in (big, tmp_path / "big.npz"):
        out, _ = run(capsys, source, sets.b_npz, *flags, "--image_size", 24)
        agree(out, expected(crops, sets.b))
    assert out["image_size"] == [24, 24]
    for size in (16, 30):                                       # both sides
        a, b = (torch.stack([crop_by_hand(x, size) for x in y]) for y in (sets.a, sets.b))
        out, _ = run(capsys, sets.flat, sets.b_npz, *flags, "--image_size", size)
        agree(out, {**expected(a, b), "image_size": [size, size]})
    narrow = np.zeros((4, 24, 20, 3), np.uint8)
    np.savez(tmp_path / "narrow.npz", narrow)
    np.savez(tmp_path / "low.npz", narrow.transpose(0, 2, 1, 3))
    for name, size in (("narrow", "24x20"), ("low", "20x24")):
        with pytest.raises(InputError, match=f"{size}.*24x24"):
            run(capsys, tmp_path / f"{name}.npz", sets.flat, *flags)


def test_folders_take_images_of_all_modes_and_nothing_else(sets, tiny, capsys, tmp_path):
    """Constant images have no spread, which is said. The artefacts of JPEGs count: samples that are JPEGs are named."""
    grey = np.full((7, 24, 24), 77, np.uint8)
    folder = Path(save_folder(tmp_path / "grey", grey))         # mode L
    (folder / "0003.png").rename(folder / "0003.PNG")
    Image.new("RGBA", (24, 24), (77, 77, 77, 255)).save(folder / "0004.png")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / ".0000.png")
    (folder / "readme.txt").write_text("no image")
    flags = ("--features", tiny, "--metrics", "fid", "--allow_small")
    out, text = run(capsys, folder, sets.flat, *flags)
    f = Tiny()(sets.a)[0].double()
    gap = f.mean(0) - torch.tensor([77 / 32] * 3 + [0.0] * 3, dtype=torch.float64)
    want = gap.square().sum().item() + np.trace(np.cov(f.numpy(), rowvar=False))      # from a point
    agree(out, {"n": 7, "fid": want})
    assert out["notes"] == ["the samples are all alike (constant images?)"] and "note: the samples are all" in text
    assert "left out: 1 .txt" in text
    zipped = shutil.make_archive(tmp_path / "grey", "zip", folder)
    same, _ = run(capsys, zipped, sets.flat, *flags)
    assert (same["n"], same["fid"], same["samples_hash"]) == (7, out["fid"], out["samples_hash"])
    start = time.time()
    with pytest.raises(InputError, match="none.zip"):
        fid.ImageSet(tmp_path / "none.zip")
    assert time.time() - start < 5                              # it is not waited for like a folder that went away

    jpegs = [save_folder(tmp_path / suffix, sets.a, suffix) for suffix in ("jpg", "JPEG")]
    decoded = torch.stack([torch.from_numpy(np.array(Image.open(Path(jpegs[0], f"{i:04}.jpg")))) for i in range(29)])
    for jpeg in jpegs:
        out, text = run(capsys, jpeg, sets.a_npz, *flags)
        agree(out, {"fid": frechet_by_hand(Tiny()(decoded)[0], f)}, rel=1e-3)
        assert out["fid"] > 1e-4 and len(out["notes"]) == 1
        assert out["notes"][0].startswith("the samples are JPEGs") and "note: the samples are JPEGs" in text
    assert run(capsys, sets.b_npz, jpeg, *flags)[0]["notes"] == []


def test_npz_pixels_equal_numpys_however_they_are_stored(sets, capsys, tmp_path):
    x = sets.a.numpy()
    np.savez(tmp_path / "late.npz", first=np.zeros(3, np.int8), arr_0=x, last=np.ones(2))
    np.savez(tmp_path / "fortran.npz", np.asfortranarray(x))    # as arrays of MATLAB come
    with zipfile.ZipFile(tmp_path / "odd.npz", "w") as z:       # header of version 2, odd offset, an extra field
        z.writestr("note.txt", "abc")
        info = zipfile.ZipInfo("arr_0.npy")
        info.extra = b"\x99\x99\x05\x00hello"
        with z.open(info, "w") as f:
            np.lib.format.write_array(f, x, version=(2, 0))
    with zipfile.ZipFile(tmp_path / "odd.npz") as z:
        assert z.getinfo("arr_0.npy").header_offset % 2 == 1
    others = (tmp_path / f"{name}.npz" for name in ("late", "fortran", "odd"))
    for path in (sets.a_npz, sets.a_small, *others):
        assert np.array_equal(np.load(path)["arr_0"], x)
        out, _ = run(capsys, path, sets.flat, "--metrics", "ssim")
        assert out["ssim"] == pytest.approx(1, abs=1e-5), path


def test_npz_is_mapped_not_read(capsys, tmp_path):
    """50,000 images of 512 x 512 are 39 GB: what --num leaves out is never in memory."""
    x = np.random.RandomState(0).randint(0, 256, (300, 128, 128, 3), np.uint8)        # 15 MB
    np.savez(tmp_path / "many.npz", x)
    np.savez(tmp_path / "two.npz", x[[0, 150]])
    tracemalloc.start()                                         # numpy tells it what it allocates
    out, _ = run(capsys, tmp_path / "many.npz", tmp_path / "two.npz", "--num", 2, "--metrics", "ssim")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert out["ssim"] == pytest.approx(1, abs=1e-5) and peak < 5e6


def test_toy_takes_after_the_other_side(sets, tiny, capsys, tmp_path):
    toy = open_images("toy", 16)
    x = np.stack([toy[i][0].double().numpy().transpose(1, 2, 0) for i in range(12)])
    x = ((x + 1) * 127.5).round().astype(np.uint8)
    np.savez(tmp_path / "toy.npz", x)
    flags = ("--features", tiny, "--allow_small", "--metrics", "fid")
    out, _ = run(capsys, tmp_path / "toy.npz", "toy", *flags)
    assert out["fid"] < 1e-9 and out["notes"] == ["samples and reference are identical"]
    assert (out["n_reference"], out["reference_kind"], out["image_size"]) == (12, "toy", [16, 16])
    out, _ = run(capsys, "toy", tmp_path / "toy.npz", *flags)
    assert out["fid"] < 1e-9 and out["n"] == 12 and out["samples"] == "toy"
    out, _ = run(capsys, tmp_path / "toy.npz", "toy", *flags, "--num", 11)            # toy: so many too
    agree(out, {"n": 11, "n_reference": 11, "fid": frechet_by_hand(*(Tiny()(torch.from_numpy(x[:11]))[0],) * 2)}, rel=1)
    out, _ = run(capsys, "toy", "--save_stats", tmp_path / "toy_stats.npz", "--features", tiny, "--num", 5)
    assert (out["n"], out["size"]) == (5, [32, 32])


def test_stream_of_batches_equals_files(sets, tiny, capsys):
    """fid.score, as the trainers call it: batches straight from a sampler, and a reference of any kind."""
    extract, want = fid.load_extractor(features=tiny), expected(sets.a, sets.b)
    for batch, reference in ((11, sets.b_npz), (29, Path(sets.nested))):
        out = fid.score(sets.a.split(batch), reference, extract, allow_small=True)
        agree(out, {**want, "n": 29, "n_reference": 29})
    out = fid.score(iter(sets.a.split(5)), sets.b_npz, extract, ("fid",), allow_small=True)
    agree(out, {"fid": want["fid"], "precision": None, "is": None, "notes": []})
    with pytest.raises(InputError, match="29 images.*--allow_small"):
        fid.score(sets.a.split(30), sets.b_npz, extract)
    with pytest.raises(InputError, match="2 sizes 20x24 24x24: one is wanted"):
        fid.score([sets.a[:9], sets.a[9:, :20]], sets.b_npz, extract, allow_small=True)


def test_statistics_round_trip_and_remember_how_they_were_made(sets, tiny, capsys, tmp_path):
    """Statistics of another size, resize or network make another number: their file says how they were made."""
    flags, fid_only = ("--features", tiny, "--allow_small"), ("--metrics", "fid")
    want = expected(sets.a, sets.b)
    saved, text = run(capsys, sets.b_npz, "--save_stats", tmp_path / "b.npz", "--features", tiny)
    agree(saved, {"n": 29, "size": [24, 24], "features": "tiny"})
    assert "statistics of 29 images" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.npz"]                    # no temporary file stays
    f = Tiny()(sets.b)[0].double().numpy()
    with np.load(tmp_path / "b.npz") as data:
        assert set(data.files) == {"mu", "sigma", "meta"} and data["mu"].dtype == data["sigma"].dtype == np.float64
        assert np.allclose(data["mu"], f.mean(0), rtol=1e-6)
        assert np.allclose(data["sigma"], np.cov(f, rowvar=False), rtol=1e-4, atol=1e-6)
        np.savez(tmp_path / "foreign.npz", mu=data["mu"], sigma=data["sigma"])
    out, text = run(capsys, sets.flat, tmp_path / "b.npz", *flags)
    agree(out, {**want, "precision": None, "recall": None, "n_reference": 29, "reference_kind": "statistics"})
    assert out["notes"] == ["precision and recall need images on both sides, more than 3"] and "note: precision" in text
    with pytest.raises(InputError, match="equal sizes"):        # the file knows its images' size ...
        run(capsys, sets.flat, tmp_path / "b.npz", *flags, "--image_size", 16)
    with pytest.raises(InputError, match="not comparable"):     # ... and network
        other = export(tmp_path / "other.pt2", logits=False)
        run(capsys, sets.flat, tmp_path / "b.npz", "--features", other, "--allow_small")
    out, text = run(capsys, sets.flat, tmp_path / "foreign.npz", *flags, *fid_only)   # pytorch-fid's know nothing: said
    agree(out, {"fid": want["fid"], "n_reference": None})
    assert len(out["notes"]) == 1 and "foreign.npz does not say" in out["notes"][0] and "make sure" in text
    out, text = run(capsys, tmp_path / "b.npz", tmp_path / "b.npz", *flags)           # both sides statistics
    assert out["fid"] < 1e-9 and out["is"] is None and "no logits of the samples" in text

    # A disk that is full by then: one line; what is there stays. The score has been printed before.
    held = (tmp_path / "b.npz").read_bytes()
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    for flag, name in (("--save_stats", "b.npz"), ("--json", "score.json")):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, usual[1]))
            with pytest.raises(InputError, match=f"{flag} .*{name}: .*File too large.*make room"):
                run(capsys, sets.flat, sets.b_npz, *flags, *fid_only, flag, tmp_path / name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert json.loads(capsys.readouterr().out)["fid"] == pytest.approx(want["fid"], rel=1e-3)
    assert (tmp_path / "b.npz").read_bytes() == held

    # With two sides it is the reference's that are written, whole; with one, --num says how many.
    run(capsys, sets.flat, sets.b_npz, *flags, *fid_only, "--save_stats", tmp_path / "both.npz", "--num", 9)
    run(capsys, sets.b_npz, "--features", tiny, "--save_stats", tmp_path / "few.npz", "--num", 3)
    assert np.allclose(np.load(tmp_path / "both.npz")["mu"], f.mean(0), rtol=1e-6)
    assert np.allclose(np.load(tmp_path / "few.npz")["mu"], f[[0, 9, 19]].mean(0), rtol=1e-6)


def test_adm_files_give_their_own_statistics_and_their_images(sets, tiny, capsys, tmp_path):
    """ADM's reference files hold the statistics of the whole training set, for the FID, beside 10,000 images, which are
    for precision and recall alone."""
    m = moments(Tiny()(sets.a)[0] + 1)
    stored = dict(mu=m.mean.numpy(), sigma=m.cov.numpy(), mu_s=np.zeros(3), sigma_s=np.eye(3))
    np.savez(tmp_path / "VIRTUAL.npz", arr_0=sets.b.numpy(), **stored)
    flags, want = ("--features", tiny, "--allow_small"), expected(sets.a, sets.b)
    out, _ = run(capsys, sets.flat, tmp_path / "VIRTUAL.npz", *flags)
    agree(out, {**want, "fid": 6.0, "reference_kind": "statistics", "n_reference": None})    # the gap of 1 in 6 means
    out, _ = run(capsys, sets.flat, tmp_path / "VIRTUAL.npz", *flags, "--metrics", "fid")
    agree(out, {"fid": 6.0, "precision": None})
    out, _ = run(capsys, tmp_path / "VIRTUAL.npz", sets.flat, *flags)                 # as samples
    agree(out, {**expected(sets.b, sets.a), "fid": 6.0})
    out, _ = run(capsys, sets.flat, tmp_path / "VIRTUAL.npz", *flags, "--metrics", "recall")
    agree(out, {"recall": want["recall"], "fid": None})
    with pytest.raises(InputError, match="20x24.*24x24.*equal sizes"):
        fid.score([sets.a[:, :20]], tmp_path / "VIRTUAL.npz", fid.load_extractor(features=tiny), allow_small=True)
    with pytest.raises(InputError, match="equal sizes"):
        run(capsys, save_folder(tmp_path / "small", sets.a[:, :20, :20]), tmp_path / "VIRTUAL.npz", *flags)


RANKS = """
import os, sys, numpy, torch, torch.distributed as dist, fid
if os.environ["RANK"] == "1":
    numpy.savez = None                                          # rank 0 alone writes
leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None
fid.main(sys.argv[1:])
npz, features = sys.argv[2], sys.argv[sys.argv.index("--features") + 1]
images = torch.from_numpy(numpy.load(npz)["arr_0"])
batches = images.split(9) if dist.get_rank() == 1 else []       # rank 0 has none
out = fid.score(batches, npz, fid.load_extractor(features=features), allow_small=True)
if dist.get_rank() == 0:
    print(out["fid"], out["n"])
    print(sorted({"scipy", "tensorflow", "torchvision", "torchmetrics"} & set(sys.modules)))
leave()
"""


def test_two_ranks_equal_one_process(sets, tiny, capsys, tmp_path):
    """29 images on two ranks, 14 and 15, to 1e-6; then a stream that one rank alone has. And no scipy or TensorFlow in
    it: their releases have broken most codes for FID."""
    flags = [sets.flat, sets.b_npz, "--features", tiny, "--allow_small", *ALL]
    one, _ = run(capsys, *flags)
    (tmp_path / "ranks.py").write_text(RANKS)
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
            "--rdzv_endpoint", "localhost:0", str(tmp_path / "ranks.py"), *flags, "--device", "cpu",
            "--batch_size", "4", "--json", str(tmp_path / "out.json"), "--save_stats", str(tmp_path / "b.npz")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(line, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=env) as torchrun:
        try:
            stdout, stderr = torchrun.communicate(timeout=120)
        finally:
            torchrun.terminate()                                # where one rank waits for ever, torchrun ends both
    assert torchrun.returncode == 0, stderr
    printed, alone, modules = stdout.strip().splitlines()  # rank 0 alone prints, with --json one line alone
    two = json.loads(printed)
    assert two == json.loads((tmp_path / "out.json").read_text())
    for key in ("fid", "is", "is_std", "precision", "recall", "psnr", "ssim"):
        assert two[key] == pytest.approx(one[key], rel=1e-6), key
    assert (two["n"], two["samples_hash"], two["reference_hash"]) == (29, one["samples_hash"], one["reference_hash"])
    assert np.allclose(np.load(tmp_path / "b.npz")["mu"], Tiny()(sets.b)[0].double().mean(0), rtol=1e-6)
    distance, n = alone.split()
    assert float(distance) < 1e-9 and n == "29" and modules == "[]"


# ---------------------------------------------------------------------------------------------------------------------
# Files of strangers: nothing in them is run


class Payload:
    """Unpickled, it makes a folder: proof that code of a file ran."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def pickled(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def rewritten(source, path, change):
    """A copy of a zip: change(members: {name without its root: bytes}) may do what it likes to them."""
    with zipfile.ZipFile(source) as z:
        root = z.namelist()[0].split("/")[0]
        members = {name.removeprefix(root + "/"): z.read(name) for name in z.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as z:
        for name, data in members.items():
            z.writestr(f"{root}/{name}", data)
    return str(path)


def edited_json(name, edit):
    """A change of rewritten: edit(what the JSON member holds)."""
    def change(members):
        content = json.loads(members[name])
        edit(content)
        members[name] = json.dumps(content).encode()
    return change


def legacy(source, path, weights=None):
    """The file of torch.export.save until torch 2.7, from a program of today."""
    from torch._export.serde.serialize import serialize
    parts = serialize(torch.export.load(source))
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("version", "8.20")
        z.writestr("serialized_exported_program.json", parts.exported_program)
        z.writestr("serialized_state_dict.pt", weights or parts.state_dict)
        z.writestr("serialized_constants.pt", parts.constants)
        z.writestr("serialized_example_inputs.pt", parts.example_inputs)
    return str(path)


def hostile_networks(tiny, folder, marker):
    """{what is wrong: file}. torch.export.load runs most of them; the rest are its other ways to names and text."""
    payload, code = pickled(Payload(marker)), f"__import__('os').mkdir({str(marker)!r})"
    model, weights = "models/model.json", "data/weights/model_weights_config.json"
    constants = "data/constants/model_constants_config.json"

    def node(target, *inputs):
        given = [{"name": name, "arg": arg, "kind": 1 + (name == "dtype")} for name, arg in inputs]
        return {"target": target, "outputs": [{"as_none": True}], "metadata": {}, "is_hop_single_tensor_return": None,
                "name": "x", "inputs": given}

    def calls(target, *inputs):
        def add(program):
            graph = program["graph_module"]["graph"]
            given = [spec["user_input"]["arg"] for spec in program["graph_module"]["signature"]["input_specs"]
                     if "user_input" in spec]
            graph["nodes"].insert(0, node(target, *[(name, arg or given[0]) for name, arg in inputs]))
        return edited_json(model, add)

    def input_meta(program):
        graph = program["graph_module"]["graph"]
        name = next(arg["as_tensor"]["name"] for arg in graph["inputs"] if arg["as_tensor"]["name"] == "img")
        return graph["tensor_values"][name]

    def expression(text):
        size = {"as_expr": {"expr_str": text, "hint": {"as_int": 3}}}
        return edited_json(model, lambda program: input_meta(program)["sizes"].__setitem__(0, size))

    def guards(program):
        program["guards_code"] = [code]

    def name(program):
        text = json.dumps(program["graph_module"]["graph"])
        renamed = f"mean={code}, mean"
        program["graph_module"]["graph"] = json.loads(text.replace('"mean"', json.dumps(renamed)))

    def pickled_weight(config):
        config["config"]["w"].update(use_pickle=True, path_name="weight_9")

    def constant(path_name):
        def change(members):
            opaque = "opaque" in path_name
            members["data/constants/" + path_name] = pickle.dumps(Payload(folder / "ran")) if opaque else payload
            edited_json(constants, lambda config: config["config"].update(
                w={"path_name": path_name, "is_param": False, "use_pickle": True, "tensor_meta": None}))(members)
        return change

    def weight_9(members):
        members["data/weights/weight_9"] = payload
        edited_json(weights, pickled_weight)(members)

    marker = {"as_string": str(marker)}
    changes = {
        "sample inputs": lambda members: members.update({"data/sample_inputs/model.pt": payload}),
        "pickled weight": weight_9,
        "pickled constant": constant("tensor_9"), "opaque constant": constant("opaque_obj_0"),
        "custom constant": constant("custom_obj_0"),
        "old weights": lambda members: members.update({"data/weights/model.pt": payload}),
        "os": calls("torch.os.mkdir", ("", marker)),
        "library": calls("torch.ops.load_library", ("", marker)),
        "call": calls("_operator.call", ("", {"as_operator": "torch.os.mkdir"}), ("", marker)),
        "method": calls("torch.ops.aten.save.op", ("", None), ("", marker)),
        "save": calls("torch.ops.aten.save.default", ("item", None), ("filename", marker)),
        "map": calls("torch.ops.aten.from_file.default", ("filename", marker), ("shared", {"as_bool": True}),
                     ("size", {"as_int": 4}), ("dtype", {"as_scalar_type": 1})),
        "expression": expression(code),
        "spelled": expression(f"S('{'%1c' * len(code)}'%({','.join(str(ord(x)) for x in code)}))"),
        "called": expression(f"Lambda(x, {code})(1)"), "attribute": expression("Symbol('s0').__class__"),
        "guards": edited_json(model, guards),
        "name": edited_json(model, name),
        "compiled": lambda members: members.update({"data/aotinductor/model/net.so": b"\x7fELF"}),
    }
    files = {what: rewritten(tiny, folder / f"{i}.pt2", change) for i, (what, change) in enumerate(changes.items())}
    files["legacy"] = legacy(tiny, folder / "legacy.pt2", payload)
    for what, data in (("saved", payload), ("pickle", pickle.dumps(Payload(marker["as_string"])))):
        files[what] = str(folder / f"{what}.pt2")
        Path(files[what]).write_bytes(data)
    return files


@pytest.mark.filterwarnings("ignore:Detected pickle")
def test_no_file_runs_code(sets, tiny, weights, capsys, tmp_path):
    """torch.export.load unpickles sample inputs, weights and constants, evaluates text, and calls by name."""
    marker = tmp_path / "ran"
    assert pickle.loads(pickle.dumps(Payload(marker))) is None and marker.is_dir()
    marker.rmdir()
    loads = {"guards", "compiled"}                              # what is not read, does no harm
    want = expected(sets.a, sets.b)["fid"]
    for what, file in hostile_networks(tiny, tmp_path, marker).items():
        flags = (sets.a_npz, sets.b_npz, "--features", file, "--metrics", "fid", "--allow_small")
        if what in loads:
            assert run(capsys, *flags)[0]["fid"] == pytest.approx(want, rel=1e-5), what
        else:
            with pytest.raises(InputError, match=Path(file).name):
                run(capsys, *flags)
        assert not marker.exists(), what

    objects = np.array([Payload(marker)], dtype=object)
    np.savez(tmp_path / "images.npz", arr_0=objects)
    np.savez(tmp_path / "mu.npz", mu=objects, sigma=np.eye(6))
    np.savez(tmp_path / "meta.npz", mu=np.zeros(6), sigma=np.eye(6), meta=objects)
    np.save(tmp_path / "array.npy", objects)
    torch.save({"fc.weight": Payload(marker)}, tmp_path / "weights.pth")
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps(Payload(marker)))
    for name in ("images.npz", "mu.npz", "meta.npz", "array.npy"):
        for sides in ((tmp_path / name, sets.b_npz), (sets.b_npz, tmp_path / name)):
            with pytest.raises(InputError, match=name):
                run(capsys, *sides, "--features", tiny, "--allow_small")
    for name in ("weights.pth", "weights.pkl"):
        with pytest.raises(InputError, match=name):
            fid.load_extractor(tmp_path / name)
    assert not marker.exists()


class Everything(torch.nn.Module):
    """What exported networks are made of: several outputs, lists, constants, sizes, blocks of their own."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.tied = self.conv
        self.register_buffer("mean", torch.rand(3, 1, 1, generator=g), persistent=False)
        for p in self.parameters():
            p.data.normal_(0, 0.3, generator=g)

    def forward(self, img):
        x = img.permute(0, 3, 1, 2) / 255 - self.mean
        x = torch.nn.functional.interpolate(x, size=(12, 12), mode="bicubic", antialias=True, align_corners=False)
        with torch.no_grad():
            x = self.norm(self.conv(x)).relu_()
            with torch.autocast("cpu", torch.bfloat16):
                x = x + self.tied(x[:, [0, 3, 5]])
        x = x.float().to(memory_format=torch.channels_last)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        low, high = tokens.chunk(2, 1)
        best, where = high.max(1)
        area = img.shape[1] * img.shape[2] // 2
        weight = torch.tensor([1.0, 2.0]) / area + torch.arange(2, device=img.device)
        weight = weight + torch.zeros(2).fill_(math.inf).exp().reciprocal()           # 0
        features = torch.cat([low.mean(1) * weight.sum(), best, where.to(torch.float16)], 1)
        return features, torch.einsum("bi,bj->bij", features, features).flatten(1)[:, :30]


def test_honest_networks_give_what_they_gave(tiny, tmp_path):
    net, d = Everything().eval(), torch.export.Dim.DYNAMIC
    example = torch.zeros(3, 16, 18, 3, dtype=torch.uint8)
    program = torch.export.export(net, (example,), dynamic_shapes=({0: d, 1: d, 2: d},))
    torch.export.save(program, str(tmp_path / "all.pt2"))
    torch.export.save(program.run_decompositions(), str(tmp_path / "core.pt2"))
    legacy(str(tmp_path / "all.pt2"), tmp_path / "legacy.pt2")
    with zipfile.ZipFile(tmp_path / "all.pt2") as old, zipfile.ZipFile(tmp_path / "zip.pt2", "w", 8) as new:
        for name in old.namelist():                             # compressed
            new.writestr(name, old.read(name))
    img = pictures(5, 0, 24, 20)
    with torch.no_grad():
        want = net(img)
    for name in ("all", "core", "legacy", "zip"):
        for _ in range(2):                                      # and again: nothing of it has changed
            got = fid.load_extractor(features=str(tmp_path / f"{name}.pt2"))(img)
            for a, b in zip(got, want):
                assert torch.allclose(a, b, rtol=1e-4, atol=1e-4), name
    with pytest.raises(InputError, match="sparse.pt2.*target torch.ops.aten._sparse"):
        bad = edited_json("models/model.json", lambda program: program["graph_module"]["graph"]["nodes"][0].update(
            target="torch.ops.aten._sparse_coo_tensor_unsafe.default"))
        fid.load_extractor(features=rewritten(tiny, tmp_path / "sparse.pt2", bad))


def test_no_flipped_bit_of_a_network_goes_unseen(tiny, tmp_path):
    """torch.export.load checks no sum of the zip."""
    data, img = Path(tiny).read_bytes(), pictures(2, 0, 16, 16)
    want = fid.load_extractor(features=tiny)(img)
    refused = 0
    for at in np.random.RandomState(0).randint(0, len(data), 60):
        (tmp_path / "bit.pt2").write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1:])
        try:
            got = fid.load_extractor(features=str(tmp_path / "bit.pt2"))(img)
        except InputError as e:
            refused += "bit.pt2" in str(e)
            continue
        assert all(torch.equal(a, b) for a, b in zip(got, want)), at                # of what is not read
    assert refused > 20
    with zipfile.ZipFile(tiny) as z:
        start = data.index(z.read(next(name for name in z.namelist() if name.endswith("weight_0"))))
    (tmp_path / "bit.pt2").write_bytes(data[:start] + bytes([data[start] ^ 4]) + data[start + 1:])
    with pytest.raises(InputError, match="bit.pt2.*BadZipFile"):
        fid.load_extractor(features=str(tmp_path / "bit.pt2"))


# ---------------------------------------------------------------------------------------------------------------------
# CUDA without a GPU: fake tensors have its device and know what does not go together


class OnDevice(torch.nn.Module):
    """Makes tensors of its own: of the device of its input, of a burnt-in one, and constants."""

    def forward(self, img):
        x = img.float().mean((1, 2)) + torch.arange(3, device=img.device) + torch.arange(3)
        x = x + torch.tensor([1.0, 2.0, 3.0])
        return x, x.half()


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_networks_and_metrics_run_on_cuda(tiny, tmp_path, monkeypatch):
    """A GPU is "cuda:0", a CPU tensor beside one of its own is an error, and autocast or TF32 must be off."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    fixed = export(tmp_path / "fixed.pt2", nchw=True, batch=2, size=(16, 16))
    own = export(tmp_path / "own.pt2", net=OnDevice())
    inceptions = [fid.load_extractor("random", resize=resize) for resize in ("tf", "torch")]
    cuda, img, modes = torch.device("cuda", 0), torch.zeros(3, 16, 16, 3, dtype=torch.uint8), []
    move = torch.export.passes.move_to_device_pass

    def fake_move(program, device):                             # among the fake tensors that a program has already
        modes.append(next(node.meta["val"].fake_mode for node in program.graph.nodes if node.op == "placeholder"))
        modes[-1].allow_non_fake_inputs = True
        with modes[-1]:
            return move(program, device)

    def look(extract, dims):
        for pixels in (torch.zeros(3, 16, 16, 3, dtype=torch.uint8), img.to("cuda")):
            for out, d in zip(extract(pixels), dims, strict=True):
                assert (out.device, out.dtype, out.shape) == (cuda, torch.float32, (3, d))

    monkeypatch.setattr(torch.export.passes, "move_to_device_pass", fake_move)
    for file, dims in ((tiny, (6, 10)), (fixed, (6, 10)), (own, (3, 3))):
        extract = fid.load_extractor(features=file, device="cuda")
        with modes[-1]:
            look(extract, dims)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cuda", torch.bfloat16):
        for extract in inceptions:
            extract.net.to("cuda")
            extract.device = torch.device("cuda")
            look(extract, (2048, 1008))
        features, m = extract(img)[0], fid.Moments()
        m.update(features)
        m.update(features)
        assert m.mean.device == m.cov.device == cuda and m.cov.dtype == torch.float64
        x, y = img.to("cuda"), img.to("cuda")
        assert fid.psnr(x, y).device == fid.ssim(x, y).device == cuda
        assert fid.ssim(x, y).dtype == torch.float32
        with pytest.raises(Exception, match="cuda.*cpu|cpu.*cuda|[Dd]evice"):         # and the check itself can fail
            fid.psnr(x, img)

        monkeypatch.setattr(torch.Tensor, "item", lambda self: 0.5)                   # fake numbers have no value
        monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: True)
        rows = features[:, :5].repeat(3, 1)
        assert fid.precision_recall(rows, rows[:7], rows=4) == (0.5, 0.5)
        assert fid.frechet_distance(m.mean, m.cov, m.mean, m.cov) == 0.5

# ---------------------------------------------------------------------------------------------------------------------
# Nothing silently wrong


def test_statistics_that_cannot_be_are_refused(sets, tiny, capsys, tmp_path):
    """A matrix with an eigenvalue below 0 is no covariance: its "distance" was 0.0. Rounding to float32 is allowed."""
    f = Tiny()(sets.b)[0].double().numpy()
    mu, sigma = f.mean(0), np.cov(f, rowvar=False)
    values, vectors = np.linalg.eigh(sigma)
    below = values.copy()
    below[0] = -2e-6 * values[-1]
    skew = sigma.copy()
    skew[0, 1] += 1e-4 * values[-1]
    how = {"n": 29, "size": [24, 24], "features": "tiny", "features_hash": fid.file_hash(tiny), "resize": "own"}
    bad = {
        "negative": dict(mu=mu, sigma=(vectors * below) @ vectors.T), "minus": dict(mu=mu, sigma=-sigma),
        "skew": dict(mu=mu, sigma=skew), "nan mu": dict(mu=mu * np.nan, sigma=sigma),
        "inf": dict(mu=mu, sigma=sigma * np.inf), "empty": dict(mu=mu[:0], sigma=sigma[:0, :0]),
        "complex": dict(mu=mu + 0j, sigma=sigma), "text": dict(mu=mu.astype(str), sigma=sigma),
        "huge": dict(mu=mu + 1e200, sigma=sigma), "wide": dict(mu=mu, sigma=np.eye(6) * 1e308),
        **{f"meta {i}": dict(mu=mu, sigma=sigma, meta=json.dumps(meta)) for i, meta in enumerate((
            [], 5, "text", {"n": 5}, {**how, "n": "29"}, {**how, "n": 29.5}, {**how, "n": -3}, {**how, "size": 24},
            {**how, "size": "24"}, {**how, "size": [24, None]}, {**how, "size": [24, 24, 3]},
            {**how, "features_hash": 7}, {**how, "resize": ["tf"]}, {**how, "features": None},
            {**how, "n": math.nan}))},
        "no json": dict(mu=mu, sigma=sigma, meta="tf"), "deep": dict(mu=mu, sigma=sigma, meta="[" * 100_000),
    }
    flags = ("--features", tiny, "--allow_small", "--metrics", "fid")
    for what, arrays in bad.items():
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(InputError) as e:
            run(capsys, sets.flat, tmp_path / "bad.npz", *flags)
        assert len(str(e.value)) < 200 and (what in ("huge", "wide") or "bad.npz" in str(e.value)), (what, str(e.value))
    # What is only rounded, stored the other way round, or truly singular, is right
    want = expected(sets.a, sets.b)["fid"]
    singular = (vectors * np.where(values < values[2], 0, values)) @ vectors.T
    for dtype in (">f8", "<f8", ">f4", "f4"):
        np.savez(tmp_path / "good.npz", mu=mu.astype(dtype), sigma=sigma.astype(dtype), meta=json.dumps(how))
        out, _ = run(capsys, sets.flat, tmp_path / "good.npz", *flags)
        assert out["fid"] == pytest.approx(want, rel=1e-5) and out["n_reference"] == 29, dtype
    np.savez(tmp_path / "good.npz", mu=mu, sigma=singular.astype("f4"))
    out, _ = run(capsys, sets.flat, tmp_path / "good.npz", *flags)
    g = Tiny()(sets.a)[0].double().numpy()
    from scipy.linalg import sqrtm
    sa = np.cov(g, rowvar=False)
    exact = ((g.mean(0) - mu) ** 2).sum() + np.trace(sa + singular - 2 * sqrtm(sa @ singular).real)
    assert out["fid"] == pytest.approx(exact, rel=1e-3)


def test_psnr_is_the_mean_of_the_finite_ones_and_json_stays_json(sets, tiny, capsys, tmp_path):
    """Equal pictures (blank pages) have a PSNR of infinity; one of them made the mean infinite, which JSON has not."""
    x, y = sets.a.numpy().copy(), sets.b.numpy().copy()
    x[[2, 7, 28]] = y[[2, 7, 28]]
    np.savez(tmp_path / "x.npz", x)
    np.savez(tmp_path / "y.npz", y)
    finite = np.delete(np.arange(29), [2, 7, 28])
    want = psnr_by_hand(torch.from_numpy(x[finite]), torch.from_numpy(y[finite])).mean()
    out, text = run(capsys, tmp_path / "x.npz", tmp_path / "y.npz", "--metrics", "psnr,ssim", "--batch_size", 4)
    agree(out, {"psnr": want, "psnr_n": 26, "ssim": ssim_by_hand(torch.from_numpy(x), torch.from_numpy(y)).mean()})
    assert "PSNR inf of 3 equal pairs" in text
    same = (tmp_path / "x.npz", tmp_path / "x.npz")
    out, text = run(capsys, *same, "--metrics", "psnr", "--json", tmp_path / "out.json")
    agree(out, {"psnr": None, "psnr_n": 0})
    assert "Infinity" not in (tmp_path / "out.json").read_text()

    class Broken(torch.nn.Module):
        def forward(self, img):
            x = img.float().mean((1, 2))
            return x, (x - x) / (x - x)

    net = export(tmp_path / "nan.pt2", net=Broken())
    with pytest.raises(InputError, match="nan gives numbers that are not finite"):    # never "is": NaN
        run(capsys, sets.flat, sets.b_npz, "--features", net, "--metrics", "is", "--allow_small")


def test_damaged_and_odd_npz_are_one_line(sets, tiny, capsys, tmp_path):
    """np.savez files have checksums, which a map of the file does not see."""
    for name, save in (("plain", np.savez), ("small", np.savez_compressed)):
        save(tmp_path / f"{name}.npz", sets.a.numpy())
        data = bytearray((tmp_path / f"{name}.npz").read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / f"{name}.npz").write_bytes(data)
    np.savez(tmp_path / "none.npz")
    np.savez(tmp_path / "zero.npz", sets.a.numpy()[:0])
    np.savez(tmp_path / "flat.npz", sets.a.numpy()[:, :0])
    np.savez(tmp_path / "float.npz", sets.a.numpy().astype(">f8"))
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as z:       # says 10^12 images
        header = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 24, 24, 3), }".ljust(117) + "\n"
        z.writestr("arr_0.npy", np.lib.format.magic(1, 0) + (118).to_bytes(2, "little") + header.encode())
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("plain", "small", "none", "zero", "flat", "float", "lie", "pipe"):
        with pytest.raises(InputError, match=f"{name}.npz") as e:
            run(capsys, tmp_path / f"{name}.npz", sets.b_npz, "--features", tiny, "--allow_small")
        assert len(str(e.value).replace(str(tmp_path), "")) < 200


def test_one_walk_of_folders(sets, capsys, tmp_path):
    """Symlinked classes count as in training; hidden folders, and what a link shows a second time, do not."""
    folder = Path(save_folder(tmp_path / "set", sets.a[:6], nested=True))             # class0, class1, class2: 2 each
    save_folder(tmp_path / "elsewhere", sets.a[:3])
    os.symlink(tmp_path / "elsewhere", folder / "linked")
    os.symlink("..", folder / "class0" / "up")
    os.symlink(".", folder / "class0" / "again")
    save_folder(folder / ".ipynb_checkpoints", sets.a[:4])
    (folder / "class1" / "0001.png").rename(folder / "class1" / "0001.PNG")
    images = fid.ImageSet(folder)
    relative = [os.path.relpath(path, folder) for path in images.data]
    linked = [f"linked/{i:04}.png" for i in range(3)]
    assert relative == ["class0/0000.png", "class0/0003.png", "class1/0001.PNG", "class1/0004.png", "class2/0002.png",
                        "class2/0005.png", *linked]


def test_files_that_change_or_fail_while_scoring(sets, monkeypatch, tmp_path):
    """A map of a file that became shorter ends the process by SIGBUS; an error of the system is tried again."""
    import ae
    monkeypatch.setattr(ae, "WAITS", (0, 0, 0))
    folder = Path(save_folder(tmp_path / "set", sets.a[:6]))
    np.savez(tmp_path / "set.npz", sets.a.numpy())
    images, pixels = fid.ImageSet(folder), fid.ImageSet(tmp_path / "set.npz")
    fails = [0]

    def at_times(read):
        def wrapped(*args, **kwargs):
            fails[0] += 1
            if fails[0] % 3:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(*args, **kwargs)
        return wrapped

    with monkeypatch.context() as m:
        m.setattr(ae, "read_bytes", at_times(ae.read_bytes))
        m.setattr(np, "fromfile", at_times(np.fromfile))
        for data in (images, pixels):
            assert torch.equal(torch.cat(list(fid.read_batches(data, 2)))[:6], sets.a[:6])
        m.setattr(np, "fromfile", lambda path, *args, **kwargs: open(f"{path}.gone"))
        with pytest.raises(InputError, match="set.npz.gone: No such file"):
            list(fid.read_batches(pixels))
    (folder / "0001.png").unlink()
    (folder / "0003.png").write_bytes(b"")
    (folder / "0004.png").write_bytes((folder / "0005.png").read_bytes()[:300])
    for i, why in ((1, "No such file"), (3, "not a readable image"), (4, "not a readable image")):
        with pytest.raises(InputError, match=f"000{i}.png: {why}"):
            images.read([i])
    os.truncate(tmp_path / "set.npz", 30_000)
    with pytest.raises(InputError, match=r"set.npz \[28\]: not a readable image \(the file has changed\)"):
        pixels.read([28])
    np.savez(tmp_path / "set.npz", sets.b.numpy())              # as long as before
    os.utime(tmp_path / "set.npz", ns=(0, 0))
    with pytest.raises(InputError, match="the file has changed"):
        pixels.read([0])


# ---------------------------------------------------------------------------------------------------------------------
# Before any work


def test_wrong_flags_are_said_before_the_work(sets, tiny, weights, monkeypatch, capsys, tmp_path):
    """Every flag of fid.py, wrong in its ways: one line that names it, no traceback, nothing computed before."""
    def never(*args, **kwargs):
        raise AssertionError("work has begun")

    monkeypatch.setattr(fid, "measure", never)
    monkeypatch.setattr(fid, "pairwise", never)
    (tmp_path / "folder").mkdir()
    for n in (1, 2):
        save_folder(tmp_path / f"few{n}", sets.a[:n])
    np.savez(tmp_path / "one.npz", sets.a[:1].numpy())
    flat, few = str(tmp_path / "few2"), ("--allow_small",)
    net = ("--features", tiny, *few)
    wrong = {
        "--metrics": ["", "fid,", "FID", "fid,kid", " fid"],
        "--num": ["0", "-1", "nan", "inf", "1.5", "", "1e3", str(2 ** 70), str(10 ** 30)],
        "--image_size": ["0", "-8", "nan", "1.5", "", str(10 ** 9), str(2 ** 70)],
        "--batch_size": ["0", "-1", "nan", "", str(10 ** 9), str(2 ** 70)],
        "--workers": ["-1", "nan", "", str(10 ** 6)],
        "--device": ["nonsense", "cuda:99", "", "meta", "cpu:x"],
        "--resize": ["", "bilinear", "299"],
        "--inception": ["", f"{tmp_path}/nowhere/x.pth", str(tmp_path / "folder"), "inception"],
        "--features": ["", f"{tmp_path}/nowhere/x.pt2", str(tmp_path / "folder"), "default"],
        "--json": [f"{tmp_path}/nowhere/x", str(tmp_path / "folder"), f"{flat}/0000.png/x.json"],
        "--save_stats": [f"{tmp_path}/nowhere/x.npz", "x", "", f"{flat}/0000.png/x.npz", "x.npy"],
    }
    cases = [([flat, flat, *few, flag, value], flag[2:]) for flag, values in wrong.items() for value in values]
    cases += [
        ([], "samples"), ([flat], "REFERENCE"), ([flat, flat, "--nonsense", "1"], "nonsense"), ([flat] * 3, "few2"),
        ([flat, flat, "--num"], "num"), ([f"{tmp_path}/a", flat, *net], "/a: want"),
        ([flat, f"{tmp_path}/b", *net], "/b: want"), (["", flat, *net], "want a folder"),
        ([f"{tmp_path}/folder", flat, *net], "folder: 0 images"),
        ([flat, f"{tmp_path}/few1", *net], "few1: one image"),
        ([f"{tmp_path}/one.npz", flat, *net], "one.npz: one image"),
        ([flat, flat, "--num", "1", *net], "few2: one image"),
        ([flat, sets.flat, "--metrics", "fid,psnr", *net], "equally many"),
        ([f"{tmp_path}/few1", "--save_stats", f"{tmp_path}/x.npz", *net], "few1: one image"),
        (["toy", flat, "--num", "2000000", *net], "--num 2000000"), ([flat, flat, "--features", tiny], "--allow_small"),
        ([flat, flat, "--features", tiny, "--resize", "torch", *few], "--resize"),
        ([flat, flat, "--features", tiny, "--inception", "random", *few], "--inception"),
        ([flat, flat, "--features", str(weights), *few], "random.pth"),
        ([flat, flat, "--inception", tiny, *few], "tiny.pt2"),
        (["/dev/zero", flat, *net], "/dev/zero"), (["/etc/passwd", flat, *net], "/etc/passwd"),
    ]
    for argv, match in cases:
        capsys.readouterr()
        with pytest.raises(InputError) as e:
            fid.main(["--workers", "0", *argv])
        line = str(e.value).replace(str(tmp_path), "").replace(str(sets.root), "")
        assert match in str(e.value) and "\n" not in line and len(line) < 200, (argv, line)
        assert e.value.code not in (0, None)                    # as SystemExit: the line, and exit code 1


def test_ssim_of_small_images_is_left_out_with_a_word(sets, tiny, capsys, tmp_path):
    np.savez(tmp_path / "a.npz", sets.a[:, :10].numpy())
    np.savez(tmp_path / "b.npz", sets.b[:, :10].numpy())
    flags = (tmp_path / "a.npz", tmp_path / "b.npz", "--features", tiny, "--allow_small")
    out, text = run(capsys, *flags, *ALL)
    agree(out, {"psnr": psnr_by_hand(sets.a[:, :10], sets.b[:, :10]).mean(), "psnr_n": 29})
    assert out["fid"] > 0 and "ssim" not in out and "note: no ssim: its window is 11 pixels wide" in text
    out, text = run(capsys, *flags, "--metrics", "ssim")
    assert out["notes"] == ["no ssim: its window is 11 pixels wide"]
    one = save_folder(tmp_path / "one", sets.a[:1]), save_folder(tmp_path / "other", sets.b[:1])
    out, _ = run(capsys, *one, "--metrics", "psnr,ssim")        # one pair is enough for these
    agree(out, {"psnr": psnr_by_hand(sets.a[:1], sets.b[:1]).mean(), "psnr_n": 1})


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line


def bad_inputs(root, sets, tiny, weights):
    def npz(name, **arrays):
        np.savez(root / name, **arrays)
        return root / name

    x = sets.a[:4].numpy()
    (root / "empty").mkdir()
    mixed = save_folder(root / "mixed", sets.a[:2])
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(root / "mixed" / "9999.png")
    broken = save_folder(root / "broken", sets.a[:4])
    (root / "broken" / "0001.png").write_bytes((root / "broken" / "0001.png").read_bytes()[:200])
    whole = Path(sets.a_npz).read_bytes()
    (root / "cut.npz").write_bytes(whole[:len(whole) // 2])
    (root / "text.npz").write_text("hello")
    torch.save({"a": torch.zeros(3)}, root / "foreign.pth")
    (root / "cut.pth").write_bytes(weights.read_bytes()[:1_000_000])
    (root / "cut.pt2").write_bytes(Path(tiny).read_bytes()[:2000])
    nan, wide = np.full((3, 3), np.nan), np.zeros((29, 24, 20, 3), np.uint8)
    net, flat, workers = ["--features", tiny], sets.flat, ["--workers", 2, "--batch_size", 1]
    return {
        "missing": ([root / "nowhere", flat, *net], "nowhere"),
        "empty": ([root / "empty", flat, *net], "0 images"),
        "mixed sizes": ([mixed, flat, *net], "9999.png is 9x9.*--image_size"),
        "unreadable": ([broken, flat, *net], "0001.png: not a readable image"),
        "unreadable for a worker": ([broken, flat, *net, *workers], "0001.png: not a readable image"),
        "cut npz": ([root / "cut.npz", flat, *net], "cut.npz"),
        "text npz": ([root / "text.npz", flat, *net], "text.npz"),
        "wrong keys": ([npz("keys.npz", images=x), flat, *net], "keys.npz: want .* arr_0"),
        "mu alone": ([npz("alone.npz", mu=np.zeros(3)), flat, *net], "alone.npz: want .* arr_0"),
        "float images": ([npz("float.npz", arr_0=x / 255.0), flat, *net], "float64.*want uint8"),
        "channels first": ([npz("nchw.npz", arr_0=x.transpose(0, 3, 1, 2)), flat, *net], "want uint8 \\(N, H, W, 3\\)"),
        "one picture": ([npz("hwc.npz", arr_0=x[0]), flat, *net], "want uint8 \\(N, H, W, 3\\)"),
        "objects": ([npz("object.npz", arr_0=np.array([{}], dtype=object)), flat, *net], "object.npz"),
        "bad statistics": ([flat, npz("mu.npz", mu=np.zeros(3), sigma=np.eye(4)), *net], "mu \\(D,\\) and sigma"),
        "flat sigma": ([flat, npz("var.npz", mu=np.zeros(3), sigma=np.ones(3)), *net], "mu \\(D,\\) and sigma"),
        "whole mu": ([flat, npz("int.npz", mu=np.zeros(3, int), sigma=np.eye(3)), *net], "not int64"),
        "NaN": ([flat, npz("nan.npz", mu=np.zeros(3), sigma=nan), *net], "want finite mu"),
        "other statistics": ([flat, npz("d.npz", mu=np.zeros(3), sigma=np.eye(3)), *net], "different networks"),
        "one image": ([npz("one.npz", arr_0=x[:1]), flat, *net], "one image has no covariance"),
        "too many": ([flat, flat, "--num", 30, *net], "29 images.*--num 30"),
        "none": ([flat, flat, "--num", 0, *net], "--num 0"),
        "metric": ([flat, flat, "--metrics", "fid,kid", *net], "--metrics"),
        "no reference": ([flat, *net], "REFERENCE"),
        "stats name": ([flat, "--save_stats", root / "stats", *net], "--save_stats"),
        "size": ([flat, flat, "--image_size", 0, *net], "--image_size"),
        "batch": ([flat, flat, "--batch_size", 0, *net], "--batch_size"),
        "workers": ([flat, flat, "--workers", -1, *net], "--workers"),
        "pairs": ([flat, flat, "--num", 3, "--metrics", "psnr"], "equally many"),
        "pairs of two sizes": ([flat, npz("wide.npz", arr_0=wide), "--metrics", "psnr"], "one size"),
        "pairs of statistics": ([flat, npz("e.npz", mu=np.zeros(6), sigma=np.eye(6)), "--metrics", "ssim"], "images"),
        "no network file": ([flat, flat, "--features", root / "none.pt2"], "none.pt2"),
        "cut network": ([flat, flat, "--features", root / "cut.pt2"], "cut.pt2"),
        "no weights": ([flat, flat, "--inception", root / "none.pth"], "none.pth"),
        "cut weights": ([flat, flat, "--inception", root / "cut.pth"], "cut.pth"),
        "text weights": ([flat, flat, "--inception", root / "text.npz"], "text.npz"),
        "foreign weights": ([flat, flat, "--inception", root / "foreign.pth"], "foreign.pth: 472 of 472 tensors"),
    }


def test_bad_input_is_one_clear_line(sets, tiny, weights, capsys, tmp_path):
    for name, (argv, match) in bad_inputs(tmp_path, sets, tiny, weights).items():
        with pytest.raises(InputError, match=match) as e:
            run(capsys, *argv, "--allow_small")
        line = str(e.value).replace(str(tmp_path), "").replace(str(sets.root), "")
        assert "\n" not in line and len(line) < 200, f"{name}: {line}"


def test_as_a_script_a_fault_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fid.py", "nowhere", "toy"])
    with pytest.raises(SystemExit) as e:                        # python prints a string given to it, and exits with 1
        runpy.run_path(str(ROOT / "fid.py"), run_name="__main__")
    assert isinstance(e.value.code, str) and e.value.code.startswith("nowhere: ") and "\n" not in e.value.code
