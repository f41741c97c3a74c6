"""Solvers, guidance, generate, the command line.    python -m pytest tests/test_sample.py

Golden trajectories: the official samplers (DC-Gen @cae2205, SiT's transport, torchdiffeq) on the filled models of
test_diffusion.py, labels 3 and 7, guidance 1.5, injected noise.
"""
import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from ae import DCAE, AEConfig
from diffusion import build, ddpm_schedule, gaussian, vp_schedule
from sample import SOLVERS, flow_time, generate, log_alpha
from test_diffusion import filled, fingerprint, noise, tiny

ROOT = Path(__file__).resolve().parent.parent
FAMILY = {"ddpm": "DiT", "vp": "UViT", "flow": "USiT"}
EVERY = [(FAMILY[objective], solver) for solver, (*_, objectives) in SOLVERS.items() for objective in objectives]

# [mean, std, absmax, sum_i out_i sin(i / 10), out_0 .. out_3, out_-4, out_-3] of the samples
GOLDEN = {
    ("DiT", "ode"): [3.156905661, 174.146597, 559.5612321, -5159.281425, 60.89203553, 187.452024, 171.8473799, -141.8272002, -266.9263129, 150.7835897],
    ("UViT", "ode"): [-1.663897245, 16.69098838, 33.78061751, 50.89605741, 4.102440118, 18.53216405, 23.07586546, -5.316682523, -14.79973755, 22.23350131],
    ("SiT", "ode"): [-0.03313851112, 1.033580636, 2.906221381, 4.099784794, 0.1569419582, 1.015955348, 1.306760269, -0.7185447831, -1.035010979, 1.146912207],
    ("SiT", "sde"): [-0.05309387501, 0.5984786474, 1.598316036, 51.0351164, 0.4474705755, 0.7476383453, 0.6655251971, 0.2537608817, 0.001227519508, 0.04465354094],
    ("USiT", "ode"): [0.1059642819, 1.146942479, 2.309157978, -35.33082333, -0.3164293054, 0.5183705505, 0.9517963705, -0.9763536567, -1.509493085, 0.9279189635],
    ("USiT", "sde"): [0.1101358193, 0.6388036744, 1.180913743, -22.3569977, -0.3487611272, -0.2130573359, -0.08326812204, -0.4271771053, -0.5101473591, -0.03397991323]}


# ---------------------------------------------------------------------------------------------------------------------
# Against the official samplers

@pytest.mark.parametrize("family, solver, steps, tolerance", [
    ("DiT", "ddpm", 10, 1e-8), ("UViT", "dpm", 30, 2e-6),        # the official code keeps DPM-Solver's and the SDE's times in float32
    ("SiT", "sde", 10, 1e-6), ("USiT", "sde", 10, 1e-6), ("SiT", "heun", 200, 1e-4), ("USiT", "heun", 200, 1e-4),
    ("SiT", "dopri5", None, 1e-3), ("USiT", "dopri5", None, 1e-3)])   # flows by ODE: the converged solution (rtol 1e-10)
def test_golden_trajectories(monkeypatch, family, solver, steps, tolerance):
    monkeypatch.setattr(sample, "gaussian", lambda shape, seed, index, j, device, dtype: noise(j, shape))
    net = filled(family)
    got = fingerprint(generate(net, [3, 7], guidance=1.5, solver=solver, steps=steps))
    wanted = GOLDEN[family, "sde" if solver == "sde" else "ode"]
    assert got == pytest.approx(wanted, rel=tolerance, abs=tolerance * wanted[1])


def test_respaced_steps_and_evaluation_counts():
    seen = []
    for family, solver, steps, wanted in [("DiT", "ddpm", 250, 250), ("DiT", "ddpm", None, 250), ("UViT", "dpm", None, 30), ("UViT", "dpm", 7, 7),
                                          ("UViT", "dpm", 8, 8), ("UViT", "dpm++2m", 12, 12), ("USiT", "euler", 9, 9), ("USiT", None, 9, 18), ("USiT", "sde", 9, 9)]:
        net, seen = tiny(family), []
        net.register_forward_hook(lambda m, args, out: seen.append(args[1][0].item()))
        generate(net, [1], solver=solver, steps=steps)
        assert len(seen) == wanted, (solver, steps)
        if solver == "ddpm":
            assert seen[::-1][:5] == [0, 4, 8, 12, 16] and seen[::-1][40:44] == [160, 164, 169, 173] and seen[0] == 999
        if (solver, steps) == ("dpm", None):                                    # official model times
            assert seen[:3] == pytest.approx([1000, 966.7, 933.4]) and seen[-1] == pytest.approx(34.3)


# ---------------------------------------------------------------------------------------------------------------------
# The oracle: the exact denoiser of a Gaussian mixture stands in for the network

class Oracle(torch.nn.Module):
    """E[eps | z_t] (and v = E[z - eps | z_t]) of a mixture of axis-aligned Gaussians in two dimensions."""
    means = torch.tensor([[1.2, 0.3], [-0.8, 0.9], [-0.3, -1.1]])
    stds = torch.tensor([[0.3, 0.5], [0.6, 0.2], [0.4, 0.4]])
    weights = torch.tensor([0.5, 0.3, 0.2])

    def __init__(self, objective):
        super().__init__()
        self.objective, self.grid, self.info, self.calls = objective, (1, 1), {}, 0
        self.config = dict(name="oracle", c=2, size=1, num_classes=0)
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, z_t, t, y):
        self.calls += 1
        if self.objective == "flow":
            alpha, sigma = t, 1 - t
        else:
            alpha = log_alpha(self, (t + (self.objective == "ddpm")) / 1000).exp().float()
            sigma = (1 - alpha**2).sqrt()
        alpha, sigma, x = alpha.view(-1, 1, 1), sigma.view(-1, 1, 1), z_t.view(-1, 1, 2)
        var = (alpha * self.stds) ** 2 + sigma**2                               # (B, 3, 2), of z_t within a component
        away = (x - alpha * self.means) / var
        which = torch.softmax(self.weights.log() - 0.5 * (away**2 * var + var.log()).sum(2), dim=1)[..., None]
        eps = (which * sigma * away).sum(1).view(-1, 2, 1, 1)
        z = (which * (self.means + alpha * self.stds**2 * away)).sum(1).view(-1, 2, 1, 1)
        return z - eps if self.objective == "flow" else torch.cat([eps, torch.zeros_like(eps)], dim=1) if self.objective == "ddpm" else eps


@pytest.mark.parametrize("family, solver", EVERY)
def test_every_sampler_recovers_the_mixture(family, solver):
    n = 20000
    net = Oracle({v: k for k, v in FAMILY.items()}[family])
    x = generate(net, torch.zeros(n, dtype=torch.long), solver=solver, steps=100 if solver == "dpm++2m" else None).view(n, 2)
    mean = (Oracle.weights[:, None] * Oracle.means).sum(0)
    off = Oracle.means - mean
    cov = torch.diag((Oracle.weights[:, None] * Oracle.stds**2).sum(0)) + (Oracle.weights[:, None, None] * off[:, :, None] * off[:, None, :]).sum(0)
    assert (x.mean(0) - mean).abs().max() < 0.03, solver                        # 4 standard errors
    assert (x.T.cov() - cov).abs().max() < 0.04, solver
    near = ((x[:, None] - Oracle.means) / Oracle.stds).square().sum(2).min(1).values     # and the shape: nothing between the modes
    assert (near < 9).float().mean() > 0.97, solver


def test_higher_order_converges_faster():
    net = tiny("USiT").double()
    y = torch.arange(4)
    exact = generate(net, y, solver="heun", steps=400)
    error = {(s, n): (generate(net, y, solver=s, steps=n) - exact).abs().max().item() for s in ("euler", "heun") for n in (10, 20)}
    assert 1.7 < error["euler", 10] / error["euler", 20] < 2.3 and 3.2 < error["heun", 10] / error["heun", 20] < 5


def test_dpm_solver_2m_is_algorithm_2_of_its_paper():
    """arXiv 2211.01095, two steps written out: D = (1 + 1/2r) d_1 - 1/2r d_0 with r = h_1 / h_2."""
    net = Oracle("vp").double()
    log_a = log_alpha(net, torch.tensor([1.0, 0.5005, 0.001], dtype=torch.float64))
    a, s = log_a.exp(), (1 - (2 * log_a).exp()).sqrt()
    h1, h2 = ((a / s).log()[1:] - (a / s).log()[:-1]).tolist()
    x0 = gaussian((5, 2, 1, 1), 0, torch.arange(5), 0, dtype=torch.float64)
    data = lambda x, i, t: (x - s[i] * net(x, torch.full((5,), t, dtype=torch.float64), None)) / a[i]
    d0 = data(x0, 0, 1000.0)
    x1 = s[1] / s[0] * x0 - a[1] * (math.exp(-h1) - 1) * d0
    r = h1 / h2
    D = (1 + 1 / (2 * r)) * data(x1, 1, 500.5) - 1 / (2 * r) * d0
    x2 = s[2] / s[1] * x1 - a[2] * (math.exp(-h2) - 1) * D
    assert torch.allclose(generate(net, torch.zeros(5, dtype=torch.long), solver="dpm++2m", steps=2), x2, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
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


def test_dopri5_gives_every_image_its_own_steps():
    net, rows = Oracle("flow"), []
    net.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    generate(net, torch.zeros(64, dtype=torch.long))
    assert rows[0] == 64 and rows[-1] < 64 and sorted(rows, reverse=True) == rows
    net.forward = lambda z, t, y: z * math.nan                                  # a broken network ends; it does not hang
    assert generate(net, torch.zeros(2, dtype=torch.long)).isnan().all()


@pytest.mark.parametrize("family", ["DiT", "UViT", "SiT"])
def test_guidance_and_interval(family):
    net, calls = tiny(family), []
    net.register_forward_hook(lambda m, args, out: calls.append((args[1][0].item(), len(args[0]), args[2].tolist())))
    steps = 20
    plain = generate(net, [1, 2], steps=steps)
    assert {n for _, n, _ in calls} == {2}                                      # guidance 1: no pass for the null label
    calls.clear()
    generate(net, [1, 2], steps=steps, guidance=2.0)
    assert all(y == [1, 2, 10, 10] for _, _, y in calls)
    calls.clear()
    part = generate(net, [1, 2], steps=steps, guidance=2.0, interval=(0.31, 0.59))
    for t, n, _ in calls:
        s = flow_time(net, torch.tensor([t], dtype=torch.float64)).item()
        assert n == (4 if 0.31 <= s <= 0.59 else 2)
    assert {n for _, n, _ in calls} == {2, 4} and not torch.equal(part, plain)
    if family != "DiT":                                                         # (DiT's variances stay those of the label's pass)
        zero = generate(net, [1, 2], steps=steps, guidance=0.0)                 # guidance 0 is the unconditional model
        assert torch.allclose(zero, generate(net, [10, 10], steps=steps), atol=1e-4 * zero.abs().max().item())


def test_flow_time_is_the_noise_level():
    ddpm, vp, flow = tiny("DiT"), tiny("UViT"), tiny("SiT")
    t = torch.tensor([0.0, 10, 500, 999], dtype=torch.float64)
    alpha = ddpm_schedule().abar[t.long()].sqrt()
    assert torch.allclose(flow_time(ddpm, t), alpha / (alpha + (1 - alpha**2).sqrt()), rtol=1e-9)
    alpha = vp_schedule()[t.long()].sqrt()
    assert torch.allclose(flow_time(vp, t + 1), alpha / (alpha + (1 - alpha**2).sqrt()), rtol=1e-9)
    assert torch.equal(flow_time(flow, t / 1000), t / 1000)


@pytest.mark.parametrize("family, solver", EVERY)
def test_c_prime(family, solver):
    net, kw = tiny(family), dict(solver=solver, steps=None if solver == "dopri5" else 6, seed=1, guidance=1.2)
    z = generate(net, [1, 2], c_prime=3, **kw)
    assert z.shape == (2, 8, 4, 4) and (z[:, 3:] == 0).all() and (z[:, :3] != 0).all()
    assert torch.equal(generate(net, [1, 2], c_prime=8, **kw), generate(net, [1, 2], **kw))
    small = tiny(family, c=3)                                                   # the network cut to c' channels draws the same
    state = net.state_dict()
    for name in small.state_dict():
        if name in ("patch_embed.proj.weight", "x_embedder.proj.weight"):
            state[name] = state[name][:, :3]
        elif name.startswith(("decoder_pred", "final_layer.linear")):
            state[name] = state[name].unflatten(0, (-1, 8))[:, :3].flatten(0, 1)
    small.load_state_dict(state)
    assert torch.allclose(generate(small, [1, 2], **kw), z[:, :3], atol=1e-4 * z.abs().max().item())


@pytest.mark.parametrize("kw, word", [(dict(labels=[11]), "label 11"), (dict(labels=[-1]), "label -1"), (dict(guidance=-1), "--guidance -1"),
                                      (dict(guidance=math.nan), "--guidance nan"), (dict(interval=(0.6, 0.2)), "--interval 0.6 0.2"),
                                      (dict(interval=(0, 2)), "--interval"), (dict(solver="ddpm"), "does not fit SiT-T: one of dopri5"),
                                      (dict(solver="magic"), "--solver magic"), (dict(c_prime=9), "--c_prime 9"), (dict(c_prime=0), "--c_prime 0"),
                                      (dict(steps=0), "--steps 0"), (dict(solver="dopri5", steps=5), "heun"), (dict(solver="sde", steps=1), "2 .. 1000")])
def test_bad_arguments_are_one_line(kw, word):
    with pytest.raises(ValueError, match=word) as e:
        generate(build("SiT-T", c=8, size=4, num_classes=10), **{"labels": [1], **kw})
    assert len(str(e.value)) < 200 and "\n" not in str(e.value)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A random autoencoder (f4c8) and a random flow model on its 4x4 latents, as the trainers leave them."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("out")
    config = AEConfig(f=4, c=8, encoder_widths=(16, 16, 32), encoder_depths=(0, 1, 1), decoder_widths=(16, 16, 32), decoder_depths=(0, 1, 1))
    net = tiny("USiT", num_classes=3)
    for name, entries in {"ae": dict(kind="ae", config=asdict(config), model=DCAE(config).state_dict(), scale=2.0, image_size=16),
                          "run": dict(kind="diffusion", config=net.config, model=net.state_dict(), ema=net.state_dict(), scale=2.0,
                                      ae=str(root / "ae"), ae_hash="another", image_size=16, step=5, classes=["cat", "dog", "owl, barn"])}.items():
        (root / name).mkdir()
        torch.save(entries, root / name / "ckpt.pt")
    return root / "run"


def read(folder):
    file = np.load(folder / "samples.npz")
    return file["arr_0"], file["arr_1"], json.loads((folder / "samples.json").read_text())


def test_command_line(run_folder, tmp_path, capsys):
    sample.main(["--ckpt", str(run_folder), "--n", "7"])
    img, y, about = read(run_folder / "samples")
    assert img.shape == (7, 16, 16, 3) and img.dtype == np.uint8 and y.tolist() == [0, 1, 2, 0, 1, 2, 0] and img.std() > 1
    assert about["step"] == 5 and about["scale"] == 2.0 and about["model"]["name"] == "USiT" and about["guidance"] == 1.0 and about["solver"] == "dopri5"
    assert "is not the autoencoder" in capsys.readouterr().out and not list((run_folder / "samples").glob("*part*"))
    assert Image.open(run_folder / "samples" / "samples.png").width > 3 * 64    # a column per class, enlarged to 64 pixels

    sample.main([f"--ckpt={run_folder / 'ckpt.pt'}", "--n=7", "--batch_size=2", f"--out={tmp_path / 'b'}"])
    assert np.abs(img.astype(int) - read(tmp_path / "b")[0]).max() <= 1         # another batch size: at most a rounding step

    sample.main(["--ckpt", str(run_folder), "--n", "6", "--classes", "owl, barn", "--c_prime", "3", "--steps", "4", "--guidance", "1.5", "--interval", "0.2", "0.8",
                 "--out", str(tmp_path / "c")])
    coarse, y, about = read(tmp_path / "c")
    assert y.tolist() == [2] * 6 and about["c_prime"] == 3 and about["interval"] == [0.2, 0.8]
    assert Image.open(tmp_path / "c" / "samples.png").height > 2 * 64           # coarse above full

    sample.main(["--ckpt", str(run_folder), "--n", "4", "--classes", "dog,0-1", "--solver", "euler", "--steps", "2", "--dtype", "bf16", "--out", str(tmp_path / "d")])
    assert read(tmp_path / "d")[1].tolist() == [1, 0, 1, 0]


def test_random_labels_are_adms():
    y = sample.parse_classes("random", 50000, 0, 1000, [])
    assert y[:8].tolist() == [44, 239, 933, 760, 963, 379, 427, 503] and y.sum() == 24998842      # torch.randint, CPU generator, seed 0 [DC-Gen]
    assert sample.parse_classes("all", 10, 0, 1000, []).tolist() == list(range(0, 1000, 100))
    assert sample.parse_classes("all", 3, 0, 0, []).tolist() == [0, 0, 0]


def test_bench_is_one_json_line(run_folder, capsys):
    sample.main(["--ckpt", str(run_folder), "--n", "2", "--solver", "heun", "--steps", "2", "--bench"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["denoiser_img_per_s"] > 0 and line["decoder_img_per_s"] > 0 and line["img_per_s"] < line["denoiser_img_per_s"]


def test_two_ranks_write_what_one_writes(run_folder, tmp_path):
    flags = ["--ckpt", str(run_folder), "--n", "5", "--classes", "random", "--solver", "sde", "--steps", "4", "--batch_size", "2"]
    sample.main([*flags, "--out", str(tmp_path / "one")])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [subprocess.Popen([sys.executable, "sample.py", *flags, "--out", str(tmp_path / "two")], cwd=ROOT, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)})
             for r in range(2)]
    assert [r.wait(120) for r in ranks] == [0, 0]
    (a, ya, _), (b, yb, about) = read(tmp_path / "one"), read(tmp_path / "two")
    assert np.abs(a.astype(int) - b).max() <= 1 and (ya == yb).all() and about["ranks"] == 2


@pytest.mark.parametrize("flags, word", [([], "--ckpt"), (["--ckpt", "nowhere"], "nowhere: no such checkpoint"), (["--ckpt", "RUN", "--n", "0"], "--n"),
                                         (["--ckpt", "RUN", "--classes", "cow"], "--classes cow"), (["--ckpt", "RUN", "--classes", "3"], "0 .. 2"),
                                         (["--ckpt", "RUN", "--c_prime", "9"], "--c_prime 9"), (["--ckpt", "RUN", "--solver", "dpm"], "does not fit"),
                                         (["--ckpt", "RUN", "--ae", "WRONG"], "does not fit --ckpt"), (["--ckpt", "RUN", "--ae", "nowhere"], "nowhere"),
                                         (["--ckpt", "AE"], "kind 'ae'"), (["--ckpt", "RUN", "--ae", "RUN"], "diffusion checkpoint")])
def test_bad_command_lines_are_one_line(run_folder, tmp_path, flags, word):
    config = AEConfig(f=4, c=4, encoder_widths=(16, 16, 32), encoder_depths=(0, 1, 1), decoder_widths=(16, 16, 32), decoder_depths=(0, 1, 1))
    torch.save(dict(kind="ae", config=asdict(config), model=DCAE(config).state_dict(), scale=1.0), tmp_path / "wrong.pt")
    paths = {"RUN": str(run_folder), "AE": str(run_folder.parent / "ae"), "WRONG": str(tmp_path / "wrong.pt")}
    with pytest.raises(ValueError, match=word) as e:
        sample.main([paths.get(f, f) for f in flags])
    line = str(e.value)
    for path in paths.values():
        line = line.replace(path, "X")
    assert len(line) < 200 and "\n" not in line
