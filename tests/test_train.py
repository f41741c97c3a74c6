"""Both trainers around their step: flags, data, logs, saving, ranks, phases, evaluation.

    python -m pytest tests/test_train.py

What the step itself computes is pinned by tests/test_plain.py. Here the trainers run as by their command lines, on tiny
networks, and what they leave behind (ckpt.pt, log.jsonl, eval.json, pictures) is compared with numbers made by hand:
with numpy, pillow, the networks' own encode and decode, or copied from published settings.
"""

import atexit
import functools
import importlib
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import ae as ae_file
import diffusion
import fid
import sample
import train_ae
import train_diffusion
from ae import DCAE, AEConfig, InputError, channel_mask, open_images
from train_ae import LPIPS, Guard, PatchGAN, adamw, draw_channels, learning_rate, select_trainable

ROOT = Path(__file__).resolve().parent.parent
NETWORK = "--f 4 --c 8 --widths 16,16,32 --depths 0,1,1"
SIZE = "--image_size 16 --channels 2,4,8"
TINY = f"{NETWORK} {SIZE}"
RUN = "--batch_size 4 --lr 1e-3 --warmup 2 --eval_every 0 --save_every 3"
AE = f"{TINY} {RUN}"
AE_1_0 = f"--version 1.0 --f 8 --c 8 --widths 16,16,32,32 --depths 0,1,1,1 {SIZE} {RUN}"
AVERAGED = f"{AE_1_0} --ema 0.9 --ema_warmup 3 --checkpointing"
GAN = f"{AE} --image_size 32 --gan 0.1 --disc_warmup 1"
SMALL = "--depth 2 --hidden 16 --heads 2"
DIT = f"--depth 2 --hidden 48 --heads 2 --max_images 64 --channels 2,4,8 {RUN} --batch_size 12"
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="defaults of a machine without CUDA")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchvision")


# ----------------------------------------------------------------------------------------------------------------------
# Tools: files of a run, spies, processes


def stage1(flags):
    """python train_ae.py, in this process."""
    return train_ae.main(flags.split())


def stage2(flags):
    """python train_diffusion.py, in this process."""
    return train_diffusion.main(flags.split())


def ckpt(folder, name="ckpt"):
    return torch.load(f"{folder}/{name}.pt", weights_only=True)


def log(folder, name="log"):
    return [json.loads(line) for line in open(f"{folder}/{name}.jsonl")]


def flat(state):
    """All tensors of a checkpoint, by path."""
    if isinstance(state, torch.Tensor):
        return {"": state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {f"{k}.{name}": t for k, v in items for name, t in flat(v).items()}


def assert_same_bits(a, b, parts=None):
    """Two checkpoints, or the named parts of them."""
    a, b = (flat({k: v for k, v in c.items() if parts is None or k in parts}) for c in (a, b))
    assert a.keys() == b.keys() and len(a) > 20
    for name in a:
        assert torch.equal(a[name], b[name]), name


def distance(a, b, part="model"):
    """Relative distance of the weights of two checkpoints."""
    a, b = flat(a[part]), flat(b[part])
    assert a.keys() == b.keys()
    return (sum(((a[k] - b[k]).double() ** 2).sum() for k in a) / sum((a[k].double() ** 2).sum() for k in a)) ** 0.5


def wrap(monkeypatch, home, name, around):
    """Put around(original) in the place of home.name, also where a trainer holds it by that name."""
    original = getattr(home, name)
    for module in (home, train_ae, train_diffusion):
        if getattr(module, name, None) is original:
            monkeypatch.setattr(module, name, around(original))


@contextmanager
def after_forward(cls, function):
    """Call function(input, output) after every forward of a `cls`; what it returns, if anything, is the new output."""
    hook = lambda module, inputs, output: function(inputs[0], output) if isinstance(module, cls) else None
    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def at_steps(cls, steps, do):
    """Call do(output) in the training steps of these numbers; what it returns, if anything, is the new output."""
    count = iter(range(10**6))
    with after_forward(cls, lambda _, output: do(output) if torch.is_grad_enabled() and next(count) in steps else None):
        yield


def spy_on_losses(monkeypatch):
    """A list that each call of Eq. 2's loss adds to: (z, y, t, loss), as the trainer calls it and what it gets."""
    seen = []

    def around(training_loss):
        def spy(net, z, y, c_prime=None, t=None, noise=None, reduction="mean"):
            loss = training_loss(net, z, y, c_prime, t, noise, reduction)
            seen.append((z.clone(), y.clone(), t.clone(), loss.detach().clone()))
            return loss
        return spy
    wrap(monkeypatch, diffusion, "training_loss", around)
    return seen


@pytest.fixture(autouse=True)
def clean_up():
    """The trainers take over SIGTERM and SIGINT: give them back. No process outlives its test."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)
    while started:
        started.pop().signal(signal.SIGKILL)


started = []                                                      # jobs of the running test


def ranks_child(script, flags, env, output, patch):
    """What one rank of `torchrun script flags` does, in a process that has torch imported already."""
    os.setsid()
    os.environ.update(env)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    default = multiprocessing.get_all_start_methods()[0]
    multiprocessing.set_start_method(default, force=True)         # of loader workers, as in a script
    if patch:
        patch()
    try:
        importlib.import_module(script.removesuffix(".py")).main(flags)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        atexit._run_exitfuncs()      # a script runs them, a child of multiprocessing does not


class Job:
    """A trainer in its own processes, one for each rank, forked from a server that has imported it once."""

    def __init__(self, folder, script, flags, ranks=1, per_node=None, patch=None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["test_train"])
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder / f"job{port}"
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(per_node or ranks)}
        env |= {"WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
        self.ranks = []
        started.append(self)
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank % (per_node or ranks))}
            args = (script, flags.split(), env | own, self.output, patch)
            self.ranks.append(context.Process(target=ranks_child, args=args))
            with mock.patch.dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT}/tests"):      # for the server
                self.ranks[-1].start()

    def running(self):
        return all(rank.exitcode is None for rank in self.ranks)

    def signal(self, number):
        for rank in self.ranks:
            if rank.exitcode is None:
                with suppress(ProcessLookupError):                # it has just ended by itself
                    os.killpg(rank.pid, number)                   # as torchrun and Slurm do: loader workers get it too

    def end(self, timeout=120):
        """Wait for all ranks -> (the worst exit code, what they printed)."""
        deadline = time.time() + timeout
        while any(rank.exitcode is None for rank in self.ranks):
            if any(rank.exitcode for rank in self.ranks) or time.time() > deadline:
                self.signal(signal.SIGKILL)                       # one failed: the others would wait for it
            time.sleep(0.01)
        text = "".join(path.read_text() for path in self.output.parent.glob(f"{self.output.name}.*"))
        codes = [rank.exitcode for rank in self.ranks]            # a rank's own failure before those killed for it
        return max(codes, key=lambda code: (code > 0, code != 0)), text


def run(folder, script, flags, **settings):
    code, text = Job(folder, script, flags, **settings).end()
    assert code == 0, text[-3000:]
    return text


def command(script, flags, ranks=1):
    """The real command line."""
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node {ranks}".split() if ranks > 1 else []
    return subprocess.Popen([sys.executable, *torchrun, str(ROOT / script), *flags.split()], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)


# ----------------------------------------------------------------------------------------------------------------------
# Things that many tests use


@pytest.fixture(scope="module")
def toy_ae(tmp_path_factory):
    """The run folder of a tiny autoencoder, 6 steps old, with the checkpoint of step 3 beside it."""
    out = tmp_path_factory.mktemp("ae")
    stage1(f"{AE} --steps 6 --out {out}")
    return out


@pytest.fixture(scope="module")
def toy_cache(tmp_path_factory, toy_ae):
    """DIT's latents, cached once."""
    folder = tmp_path_factory.mktemp("cache")
    stage2(f"{DIT} --ae {toy_ae} --cache {folder}/c --model SiT-T --steps 1 --out {folder}/d")
    return f"--ae {toy_ae} --cache {folder}/c"


@pytest.fixture(scope="module")
def sit(toy_cache):
    """Flags of a small SiT on them."""
    return f"{DIT} {toy_cache} --model SiT-T"


def small_config(version):
    sizes = dict(encoder_widths=(8, 8, 8), decoder_widths=(8, 8, 8), encoder_depths=(0, 1, 1), decoder_depths=(0, 1, 1))
    return AEConfig(f=4, c=8, version=version, **sizes)


def write_autoencoder(folder, version="1.5", scale=1.0, size=16, seed=0):
    """A checkpoint whose weights are all random, none 0 or 1, and whose pictures leave [-1, 1]; c' was 2, 3 or 8."""
    torch.manual_seed(seed)
    config = small_config(version)
    state = DCAE(config).state_dict()
    for name, tensor in state.items():
        if "norm.weight" in name or "running_mean" in name:
            tensor.normal_()
        if "running_var" in name:
            tensor.uniform_(0.5, 2)
    state["decoder.project_out.up.conv.weight"] *= 4
    state["encoder.project_out.weight"] *= 4                      # latents of rms above 1, as in the published ones
    folder.mkdir(parents=True, exist_ok=True)
    about = {"scale": scale, "image_size": size, "channels": [2, 3, 8], "step": 0}
    torch.save({"kind": "ae", "config": asdict(config), "model": state, **about}, folder / "ckpt.pt")
    return folder


@pytest.fixture(scope="module")
def wild_ae(tmp_path_factory):
    """Such an autoencoder, with the scale that makes the latents of toy pictures rms 1."""
    out = write_autoencoder(tmp_path_factory.mktemp("wild"))
    scale = 1 / encode(out, toy_pictures(range(256), train=True)).square().mean().sqrt().item()
    return write_autoencoder(out, scale=scale)


def toy_pictures(numbers, train, size=16):
    data = open_images("toy", size, train=train)
    return torch.stack([data[i][0] for i in numbers])


@torch.no_grad()
def encode(folder, img):
    return DCAE.from_pretrained(folder).encode(img)


def to_pixels(img):
    """Float (B,3,H,W) in [-1, 1] -> uint8 (B,H,W,3), rounded to nearest."""
    return np.rint((img.clamp(-1, 1).permute(0, 2, 3, 1).double().numpy() + 1) * 127.5).astype(np.uint8)


@torch.no_grad()
def rebuild(folder, img, c_prime):
    """Reconstruction from the first c' channels alone, float."""
    ae = DCAE.from_pretrained(folder)
    z = ae.encode(img)
    z[:, c_prime:] = 0
    return ae.decode(z)


def psnr_by_hand(a, b):
    mse = ((a.astype(float) - b.astype(float)) ** 2).mean((1, 2, 3))
    return (10 * np.log10(255**2 / mse)).mean()


def frechet_by_hand(a, b):
    """Of two arrays of features (N, D)."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A tiny feature network for --features: moments of the colours."""
    class Features(torch.nn.Module):
        def forward(self, img):                                   # uint8 (B,H,W,3) -> (B,6)
            img = img.float() / 255
            return torch.cat([img.mean((1, 2)), img.square().mean((1, 2))], 1)
    path = tmp_path_factory.mktemp("features") / "f.pt2"
    size = {0: torch.export.Dim("b", min=1), 1: torch.export.Dim("h"), 2: torch.export.Dim("w")}
    example = (torch.zeros(2, 16, 16, 3, dtype=torch.uint8),)
    torch.export.save(torch.export.export(Features(), example, dynamic_shapes=(size,)), path)
    return str(path)


def features_by_hand(pixels):
    x = pixels.astype(float) / 255
    return np.concatenate([x.mean((1, 2)), (x**2).mean((1, 2))], 1)


def write_pictures(folder, seed, height=32, classes=("cat",) * 8 + ("dog",) * 4):
    """12 soft random PNGs in class folders, wider than high; the ADM crop to `height` keeps their middle as it is."""
    rng = np.random.default_rng(seed)
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8))
        picture.resize((height + 8, height), Image.BICUBIC).save(folder / name / f"{k:02}.png")
    return folder


def read_pictures(folder):
    """Their middle squares, uint8 (12,H,H,3), in the order of the sorted names."""
    files = sorted(folder.rglob("*.png"))
    return np.stack([np.asarray(Image.open(f))[:, 4:-4] for f in files])


def to_float(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two folders of pictures: to train on, to evaluate on."""
    folder = tmp_path_factory.mktemp("pictures")
    return write_pictures(folder / "train", 1), write_pictures(folder / "val", 2)


def tiles(path, columns, size):
    """Pictures of a sheet, uint8 (rows x columns, size, size, 3); tiny ones were enlarged, captions are at the left."""
    sheet, k = np.asarray(Image.open(path)), max(1, 64 // size)
    step = k * size + 2
    left = sheet.shape[1] - columns * step
    corners = [(y, x) for y in range(0, sheet.shape[0], step) for x in range(left, sheet.shape[1], step)]
    return np.stack([sheet[y : y + k * size : k, x : x + k * size : k] for y, x in corners])


def assert_close_pixels(a, b):
    assert a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).max() <= 1


# ----------------------------------------------------------------------------------------------------------------------
# Facts of single functions


def test_learning_rate_is_the_official_warm_up():
    # facts/golden.json misc: ConstantLRwithWarmup, base 2e-4, warmup_lr 6.4e-6, 5000 steps
    class args:
        lr, warmup, cooldown, steps = 2e-4, 5000, 0, 500_000
    rates = {0: 6.43872e-06, 1: 6.47744e-06, 2499: 1.0320e-4, 4998: 1.9996128e-4, 4999: 2e-4, 5001: 2e-4}
    for step, lr in rates.items():
        assert learning_rate(step, args, 6.4e-6) == pytest.approx(lr, rel=1e-9)
    args.cooldown = 1000
    assert [learning_rate(s, args) for s in (498_999, 499_500, 499_999)] == pytest.approx([2e-4, 1e-4, 2e-7])


def test_average_has_the_official_decay_and_no_say_in_a_skipped_step():
    # facts/golden.json misc: 0.9999 (1 - exp(-step / 2000))
    decays = {1: 0.000499825033328626, 100: 0.048765698441736054, 2000: 0.6320573467726748, 100000: 0.9999}
    for step, decay in decays.items():
        ema, net = torch.nn.Linear(1, 1, bias=False).double(), torch.nn.Linear(1, 1, bias=False).double()
        ema.weight.data.fill_(1), net.weight.data.fill_(0)
        train_diffusion.ema_update(ema, net, 0.9999, 2000, step, torch.tensor(0.0, dtype=torch.float64))
        assert ema.weight.item() == 1
        train_diffusion.ema_update(ema, net, 0.9999, 2000, step, torch.tensor(1.0, dtype=torch.float64))
        assert ema.weight.item() == pytest.approx(decay, rel=1e-9) and net.weight.item() == 0


def test_the_autoencoders_average_is_what_is_evaluated_and_read(tmp_path):
    """Three steps by hand; BatchNorm's statistics are the network's own."""
    flags = f"{AVERAGED} --save_every 1 --eval_every 3 --eval_num 4"
    weights = []
    for steps in (1, 2, 3):
        stage1(f"{flags} --steps {steps} --out {tmp_path}/a")
        weights.append(ckpt(tmp_path / "a")["model"])
    torch.manual_seed(0)
    config = AEConfig(**ckpt(tmp_path / "a")["config"])
    average = {name: p.detach().double() for name, p in DCAE(config).named_parameters()}
    for step, w in enumerate(weights, start=1):
        decay = 0.9 * (1 - math.exp(-step / 3))
        average = {name: decay * p + (1 - decay) * w[name] for name, p in average.items()}
    held = ckpt(tmp_path / "a")["ema"]
    for name, x in held.items():
        if name in average:
            torch.testing.assert_close(x.double(), average[name], rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(x, weights[-1][name])
    assert any("running_var" in name for name in held) and distance(ckpt(tmp_path / "a"), {"model": held}) > 1e-3
    read = DCAE.from_pretrained(tmp_path / "a").state_dict()
    assert all(torch.equal(read[name], x) for name, x in held.items())
    by_hand = evaluate_by_hand(tmp_path / "a", to_pixels(toy_pictures(range(4), train=False)), (2, 4, 8))
    assert psnr_of(log(tmp_path / "a", "eval")[-1]["table"]) == pytest.approx(by_hand, rel=1e-3)
    # A run goes on without it, and begins one where there was none: from the weights that are there
    stage1(f"{flags} --ema 0 --steps 4 --out {tmp_path}/a")
    plain = ckpt(tmp_path / "a")
    assert plain["ema"] is None
    stage1(f"{flags} --ema 0.9 --ema_warmup 1e9 --steps 5 --out {tmp_path}/a")      # d = 0: the weights themselves
    assert distance(ckpt(tmp_path / "a"), {"model": ckpt(tmp_path / "a")["ema"]}) < 1e-6


@pytest.mark.parametrize("version", ["1.5", "1.0"])
def test_checkpointing_of_stages_gives_equal_gradients_and_statistics(version):
    torch.manual_seed(0)
    ae, img, results, runs = DCAE(small_config(version)), torch.randn(2, 3, 16, 16), [], []
    for p in ae.parameters():
        p.data += 0.1 * torch.randn_like(p)
    ae.train()
    for stage in ae.stages():
        stage[0].register_forward_pre_hook(lambda *_: runs.append(1))
    start = {name: b.clone() for name, b in ae.named_buffers()}
    for on in (False, True):
        ae.load_state_dict(start, strict=False)
        ae.set_checkpointing(on)
        runs.clear()
        ae.zero_grad()
        ae(img, 4).square().mean().backward()
        results.append({name: p.grad.clone() for name, p in ae.named_parameters()} | dict(ae.named_buffers()))
        results[-1] = {name: x.clone() for name, x in results[-1].items()}
        once = 2 if version == "1.0" else 0                       # its decoder's stages with BatchNorm
        assert len(runs) == (2 * len(ae.stages()) - once if on else len(ae.stages())) == (8 - once if on else 4)
    assert results[0].keys() == results[1].keys()
    for name, x in results[0].items():
        torch.testing.assert_close(x, results[1][name], rtol=1e-6, atol=1e-8)


def test_channel_draw_is_uniform_over_the_list():
    channels = list(range(16, 129, 4))
    draws = [draw_channels(channels, 0, s) for s in range(5000)]
    assert set(draws) == set(channels) and abs(np.mean(draws) - 72) < 2
    again, other = ([draw_channels(channels, seed, s) for s in range(20)] for seed in (0, 1))
    assert draws[:20] == again != other
    often = [draw_channels([2, 4, 8, 8], 0, s) for s in range(4000)]                      # 8 stands there twice
    assert [np.mean([k == value for k in often]) for value in (2, 4, 8)] == pytest.approx([0.25, 0.25, 0.5], abs=0.025)


def test_a_non_finite_step_is_skipped_and_counted():
    p = torch.nn.Parameter(torch.ones(4))
    opt, guard = adamw([p], 0.1, (0.9, 0.99), 0.0), Guard(torch.device("cpu"))
    for value in (1.0, float("nan"), float("inf"), 1.0):
        before, moments = p.detach().clone(), [v.clone() for v in opt.state.get(p, {}).values()]
        p.grad = torch.full((4,), value)
        _, taken = guard.step(opt, [p], 1.0)
        assert taken == float(np.isfinite(value)) and torch.equal(before, p) == (not np.isfinite(value))
        if not np.isfinite(value):
            assert all(torch.equal(a, b) for a, b in zip(moments, opt.state[p].values()))
    assert guard.skipped == 2 and guard.worst == 2 and guard.in_a_row == 0


def test_the_discriminator_sees_patches_of_70_pixels():
    """Isola et al. 2017: five 4 x 4 convolutions, strides 2 2 2 1 1, norms in the middle three; GroupNorm is ours."""
    torch.manual_seed(0)
    disc, img = PatchGAN(), torch.randn(2, 3, 64, 64)
    assert sum(p.numel() for p in disc.parameters()) == 2_765_633
    state = disc.state_dict()
    layers = sorted({int(name.split(".")[0]) for name in state})
    convs = [k for k in layers if state[f"{k}.weight"].dim() == 4]
    x = img
    for i, (conv, stride) in enumerate(zip(convs, (2, 2, 2, 1, 1))):
        x = F.conv2d(x, state[f"{conv}.weight"], state.get(f"{conv}.bias"), stride, padding=1)
        if 0 < i < 4:
            norm = layers[layers.index(conv) + 1]
            x = F.group_norm(x, 32, state[f"{norm}.weight"], state[f"{norm}.bias"])
        x = torch.where(x > 0, x, 0.2 * x) if i < 4 else x
    assert len(convs) == 5 and x.shape == (2, 1, 6, 6) and torch.allclose(disc(img), x, atol=1e-5)
    patches = torch.nn.Sequential(*[layer for layer in disc if not isinstance(layer, torch.nn.GroupNorm)])
    wide = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = patches(wide)
    logits[0, 0, 7, 7].backward()
    rows, columns = wide.grad[0].abs().sum(0).nonzero().unbind(1)
    assert rows.max() - rows.min() + 1 == 70 == columns.max() - columns.min() + 1


def test_lpips_has_finite_gradients_and_the_package_value():
    import lpips
    torch.manual_seed(0)
    ours = LPIPS("alex", random=True)
    a, b = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.allclose(ours(a, b), ours.metric(a, b).flatten(), rtol=1e-4)
    assert (ours(a, a) == 0).all() and isinstance(ours.metric, lpips.LPIPS)
    for x in (a.clone(), torch.zeros(2, 3, 64, 64), torch.ones(2, 3, 64, 64)):
        x.requires_grad_()
        ours(a, x).sum().backward()
        assert x.grad.isfinite().all()
    assert not any(p.requires_grad for p in ours.parameters()) and not any(m.training for m in ours.metric.modules())
    exact = ours(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(a, b), exact) and torch.equal(ours(a.bfloat16().float(), b), ours(a.bfloat16(), b))


# ----------------------------------------------------------------------------------------------------------------------
# Recipes, presets, defaults


# ../shared/design.md section 4: resolution, lr, betas, weight decay of the phases
@pytest.mark.parametrize("phase, size, lr, betas, weight_decay", [
    (1, 256, 6.4e-5, (0.9, 0.999), 0.1), (2, 512, 1.6e-5, (0.9, 0.999), 0.001), (3, 256, 5.4e-5, (0.5, 0.9), 0.0)])
def test_recipe_of_each_phase(tmp_path, wild_ae, phase, size, lr, betas, weight_decay):
    network = "--f 4 --c 8 --widths 4,4,4 --depths 0,1,1" if phase == 1 else f"--init {wild_ae}"
    gan = "--gan 0" if phase == 3 else ""                         # slow at 256 px; its weight: next test
    stage1(f"{network} --phase {phase} {gan} --channels 8 --batch_size 1 --steps 1 --eval_every 0 --out {tmp_path}")
    state = ckpt(tmp_path)
    group = state["optimizer"]["param_groups"][0]
    assert state["image_size"] == size and tuple(group["betas"]) == betas and group["weight_decay"] == weight_decay
    assert log(tmp_path)[0]["lr"] == group["lr"] == pytest.approx(lr / 1000)      # first of 1,000 steps of warm-up
    assert state["disc"] is None and "lpips" not in log(tmp_path)[0]              # built-in images: nothing to download
    assert state["args"]["clip"] == 1.0 and state["args"]["cooldown"] == 0 and state["args"]["save_every"] == 1000


def test_recipe_of_the_discriminator(tmp_path, wild_ae):
    flags = f"--phase 3 --init {wild_ae} --image_size 24 --batch_size 2 --steps 1 --eval_every 0"
    stage1(f"{flags} --out {tmp_path}/a")
    stage1(f"{flags} --disc_warmup 0 --lr 0.5 --betas 0.8 0.95 --out {tmp_path}/b")
    assert log(tmp_path / "a")[0]["gan_weight"] == 0 and log(tmp_path / "b")[0]["gan_weight"] == pytest.approx(0.1)
    assert ckpt(tmp_path / "a")["args"]["disc_warmup"] == 1000
    group = ckpt(tmp_path / "b")["disc_optimizer"]["param_groups"][0]
    assert tuple(group["betas"]) == (0.5, 0.9) and group["weight_decay"] == 0
    assert group["lr"] == pytest.approx(0.5 / 1000)               # the autoencoder's


# facts/training_facts.md, Optimisation: batch 1024; SiT has none published and takes DiT's
@pytest.mark.parametrize("family, lr, weight_decay, betas, warmup", [
    ("DiT", 2e-4, 0.0, (0.9, 0.999), 0), ("SiT", 2e-4, 0.0, (0.9, 0.999), 0),
    ("UViT", 2e-4, 0.03, (0.99, 0.99), 5000), ("USiT", 1e-4, 0.0, (0.99, 0.99), 5000)])
def test_recipe_of_each_family(tmp_path, toy_cache, family, lr, weight_decay, betas, warmup):
    data = f"{toy_cache} --max_images 64 --channels 8 --batch_size 4"
    stage2(f"{data} --model {family}-T {SMALL} --steps 1 --eval_every 0 --out {tmp_path}")
    groups, args = ckpt(tmp_path)["optimizer"]["param_groups"], ckpt(tmp_path)["args"]
    assert {tuple(g["betas"]) for g in groups} == {betas} and {g["weight_decay"] for g in groups} == {weight_decay, 0.0}
    first = 6.4e-6 + (lr - 6.4e-6) / 5000 if warmup else lr       # DC-Gen's warm-up does not start at 0
    assert [log(tmp_path)[0]["lr"], *(g["lr"] for g in groups)] == pytest.approx([first] * 3, rel=1e-9)
    common = dict(ema=0.9999, ema_warmup=2000, label_dropout=0.1, clip=0, patch=1)
    assert {name: args[name] for name in common} == common
    config = ckpt(tmp_path)["config"]
    assert (config["depth"], config["hidden"], config["heads"]) == (2, 16, 2)
    assert ckpt(tmp_path)["image_size"] == 16                     # the autoencoder's


def edit_cache(folder, count):
    """Make a cache that a run has written into one of `count` made-up latents, finished."""
    manifest = json.load(open(folder / "manifest.json"))
    manifest["count"] = count
    json.dump(manifest, open(folder / "manifest.json", "w"))
    latents = np.random.default_rng(0).normal(size=(2, count, *manifest["shape"]))
    np.save(folder / "latents.npy", latents.astype(np.float16))
    np.save(folder / "labels.npy", np.arange(count) % 10)
    np.save(folder / "done.npy", chunk_sums(folder))


def chunk_sums(folder):
    """CRC-32 of each 512 rows: plain latents, mirrored ones, labels."""
    latents, labels = (np.load(folder / f"{name}.npy") for name in ("latents", "labels"))
    parts = [slice(k, k + 512) for k in range(0, len(labels), 512)]
    raw = [latents[0, part].tobytes() + latents[1, part].tobytes() + labels[part].tobytes() for part in parts]
    return np.array([zlib.crc32(data) for data in raw], np.uint32)


def commit():
    line = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(line, capture_output=True, text=True).stdout.strip()


@cpu_only
def test_the_toy_presets_and_flags_beside_them(tmp_path, monkeypatch):
    """README, Quick start: both commands without a flag, and where their runs lie."""
    monkeypatch.chdir(tmp_path)
    assert stage1("--toy --dry_run")["steps"] == 4500 and stage1("--toy --steps 7 --dry_run")["steps"] == 7
    stage1("--toy --steps 1 --weight_decay 0.5")
    state = ckpt("out/toy-ae")
    config, args = state["config"], state["args"]
    assert (config["f"], config["c"], state["image_size"], state["channels"]) == (8, 32, 32, [4, 8, 16, 32])
    assert tuple(config["encoder_widths"]) == (16, 32, 32, 64) == tuple(config["decoder_widths"])
    assert tuple(config["encoder_depths"]) == (0, 1, 1, 1) == tuple(config["decoder_depths"])
    preset = dict(batch_size=16, lr=2e-3, warmup=50, cooldown=4000, save_every=1000, eval_every=1500, log_every=25)
    assert {k: args[k] for k in preset} == preset and tuple(args["betas"]) == (0.9, 0.99)
    assert args["weight_decay"] == 0.5                            # the flag's
    table = log("out/toy-ae", "eval")[-1]["table"]
    assert [(row["c_prime"], row["n"]) for row in table] == [(k, 256) for k in (4, 8, 16, 32)]

    line = stage2("--toy --dry_run")
    assert (line["steps"], line["model"], line["batch_size"]) == (5000, "SiT-T", 32)
    flags = f"--toy --steps 1 {SMALL} --image_size 8 --eval_every 0"
    stage2(f"{flags} --max_images 4 --betas 0.8 0.95 --out out/d")
    args = ckpt("out/d")["args"]
    preset = dict(batch_size=32, lr=2e-3, warmup=100, cooldown=4000, ema=0.995, ema_warmup=100, clip=1)
    preset |= dict(save_every=1000, log_every=25)
    assert {k: args[k] for k in preset} == preset and tuple(args["betas"]) == (0.8, 0.95)
    assert ckpt("out/d")["config"]["name"] == "SiT-T" and ckpt("out/d")["channels"] == [4, 8, 16, 32]
    edit_cache(tmp_path / "out" / "toy-ae" / "latents-toy-8", 8192)      # in the autoencoder's own folder
    stage2(flags)                                                 # 8,192 images, or it would not fit
    assert tuple(ckpt("out/toy-diffusion")["args"]["betas"]) == (0.9, 0.99)


@cpu_only
def test_defaults_without_a_preset(tmp_path, toy_ae, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stage1(f"{TINY} --accumulate 3 --steps 1 --eval_every 0 --out a")
    args = ckpt("a")["args"]
    assert (args["dtype"], args["compile"], args["log_every"], args["workers"]) == ("fp32", False, 1, 0)
    assert ckpt("a")["torch"] == torch.__version__ and ckpt("a")["commit"] == commit()
    assert args["batch_size"] == 3 and "global batch 3, that is 1 per rank" in capsys.readouterr().out
    stage1(f"{TINY} --widths 4,4,4 --image_size 12 --batch_size 128 --eval_channels 8 --steps 1 --out b")
    row, = log("b", "eval")[0]["table"]
    assert row["c_prime"] == 8 and row["n"] == 1024               # while training
    assert ckpt("b")["args"]["eval_every"] == 5000
    flags = f"--ae {toy_ae} --model SiT-T {SMALL} --image_size 4 --channels 8 --eval_every 0 --steps 1 --cache c"
    stage2(f"{flags} --max_images 4 --out d")
    edit_cache(tmp_path / "c", 50_000)
    stage2(f"{flags} --out e")                                    # 50,000 built-in images, or it would not fit
    assert ckpt("e")["args"]["batch_size"] == 1 and ckpt("e")["args"]["fid_num"] == 10_000

    line = stage1("--width 4 --dry_run")
    default = ("DC-AE-1.5-f32c128", 16 * 8, 200_000)              # 16 on each of 8 GPUs
    assert (line["model"], line["batch_size"], line["steps"]) == default
    assert stage1(f"{TINY} --accumulate 2 --gpus 4 --dry_run")["batch_size"] == 16 * 2 * 4
    line = stage2("--c 128 --size 8 --dry_run")
    assert (line["model"], line["batch_size"], line["steps"]) == ("USiT-H", 1024, 500_000)      # the paper's batch
    assert "from 16 to 128 (29 values)" in capsys.readouterr().out      # 16, 20, ..., 128 [paper Sec. 4.1]


def test_default_run_folders_name_the_model(tmp_path, toy_ae, monkeypatch):
    """Two models never share a folder."""
    monkeypatch.chdir(tmp_path)
    step = "--image_size 16 --batch_size 2 --steps 1 --eval_every 0"
    tiny, init = "--f 4 --c 8 --depths 0,1,1", f"--init {toy_ae}"
    for flags, name in ((f"{tiny} --widths 4,8,8 --channels 2,8", "f4c8-w4-8-8-d0-1-1"),
                        (f"{tiny} --width 4 --channels 2,8", "f4c8-w4-d0-1-1"),
                        (f"{tiny} --width 4 --channels 8", "f4c8-w4-d0-1-1-plain"),
                        (f"{tiny} --width 4 --channels 2,8 --no-shortcuts", "f4c8-w4-d0-1-1-no-shortcuts"),
                        (f"{init} --phase 2", "f4c8-phase2"), (f"{init} --train decoder", "f4c8-decoder")):
        stage1(f"{flags} {step}")
        assert Path(f"out/dc-ae-1.5-{name}/ckpt.pt").exists(), name
    config = ckpt("out/dc-ae-1.5-f4c8-w4-d0-1-1-no-shortcuts")["config"]
    assert tuple(config["encoder_widths"]) == (4, 8, 16) and tuple(config["decoder_depths"]) == (0, 1, 1)
    assert config["shortcuts"] is False
    shutil.copytree(toy_ae, "ae")
    step = f"{SMALL} --max_images 4 --channels 2,8 --batch_size 2 --steps 1 --eval_every 0"
    for flags, name in (("", "SiT-T-f4c8x4"), ("--patch 2", "SiT-T-p2-f4c8x4"),
                        ("--no-augment", "SiT-T-f4c8x4-no-augment"), ("--channels 8", "SiT-T-f4c8x4-no-augment")):
        shutil.rmtree(f"out/{name}", ignore_errors=True)
        stage2(f"--ae ae --model SiT-T {step} {flags}")
        assert Path(f"out/{name}/ckpt.pt").exists(), name
    assert Path("ae/latents-toy-16/manifest.json").exists()
    assert ckpt("out/SiT-T-p2-f4c8x4")["config"]["patch"] == 2
    assert ckpt("out/SiT-T-f4c8x4-no-augment")["channels"] == [8]
    assert ckpt("out/SiT-T-f4c8x4")["ae"] == str(tmp_path / "ae")      # found again from any folder
    shutil.rmtree("out/SiT-T-f4c8x4")
    stage2(f"--ae ae/ckpt.pt --model SiT-T {step}")               # a file: no folder to keep latents in
    assert len(list(tmp_path.glob("out/latents-????????/latents-toy-16/manifest.json"))) == 1


def test_the_checkpoint_says_its_channels_and_size(tmp_path, toy_ae, capsys):
    stage1(f"--train decoder --init {toy_ae} --dry_run")
    assert "16 px" in capsys.readouterr().out
    stage1(f"{AE} --channels 8 --steps 2 --out {tmp_path}/plain")
    stage1(f"--phase 2 --init {tmp_path}/plain --dry_run")
    assert "no masks" in capsys.readouterr().out.split("training")[-1]
    stage1("--toy --c 16 --dry_run")
    assert "from 2 to 16 (4 values)" in capsys.readouterr().out


def test_channels_behind_the_largest_c_prime_never_train(tmp_path, capsys):
    """Eq. 1: the loss is that of the masked latent: rows of the encoder and columns of the decoder keep their bits."""
    flags = f"{AE} --channels 4 --weight_decay 0 --save_every 1"
    stage1(f"{flags} --steps 2 --out {tmp_path}")
    assert "--channels ends at 4 of 8" in capsys.readouterr().out
    a, b = ckpt(tmp_path, "ckpt_prev")["model"], ckpt(tmp_path)["model"]
    moved = lambda name, dim: [not torch.equal(x, y) for x, y in zip(a[name].unbind(dim), b[name].unbind(dim))]
    assert moved("encoder.project_out.weight", 0) == moved("decoder.project_in.weight", 1) == [True] * 4 + [False] * 4


LOWEST = dict(steps=1, batch_size=1, accumulate=1, save_every=1, log_every=1, gpus=1,
              seed=0, lr=0, weight_decay=0, warmup=0, cooldown=0, clip=0, workers=0, eval_every=0)
LATENT = f"--model SiT-T {SMALL} --c 8 --size 4 --channels 8"


@pytest.mark.parametrize("main, network", [(stage1, TINY), (stage2, LATENT)], ids=["train_ae", "train_diffusion"])
def test_lowest_values_of_flags(main, network):
    for flag, low in LOWEST.items():
        main(f"{network} --dry_run --{flag}={low}")
        with pytest.raises(InputError, match=f"--{flag} {low - 1}"):
            main(f"{network} --dry_run --{flag}={low - 1}")
    with pytest.raises(InputError, match="--lr nan"):
        main(f"{network} --dry_run --lr nan")
    shares = ["betas"] + ["ema", "label_dropout"] * (main is stage2)
    for flag in shares:
        first = "0.5" if flag == "betas" else ""
        main(f"{network} --dry_run --{flag} {first} 0")
        for value in ("1", "-0.1"):
            with pytest.raises(InputError, match=f"--{flag}"):
                main(f"{network} --dry_run --{flag} {first} {value}")


BAD_1 = {  # flags of train_ae.py: words of the message
    "--f 6": "f", "--c 0": "c", "--channels 8:400:4": "--channels", "--widths a,b": "--widths", "--gpu x": "--gpu",
    "--image_size 100": "--image_size 32", "--image_size 32 64": "--image_size --eval_only",
    "--gan 1 --f 4 --image_size 20": "--image_size --gan 24", "--batch_size 5 --accumulate 2": "--batch_size",
    "--data nowhere": "--data", "--init nowhere": "nowhere", "--phase 3": "--phase 3 --init",
    "--eval_only": "--eval_only --init", "--seed -1": "--seed", "--betas 0.9 2": "--betas", "--steps 0": "--steps",
    "--train decoder": "--train decoder --init", "--seed 9223372036854775808": "--seed", "--lr inf": "--lr",
    "--lpips nan": "--lpips", "--gan -1": "--gan", "--eval_num 0": "--eval_num", "--eval_num -3": "--eval_num",
    "--tflops 0": "--tflops", "--width 0": "--width", "--depths 0,10000000,1": "--depths", "--steps x": "--steps",
    "--f 4 --image_size 12 --lpips 1": "--image_size --lpips 16", "--out setup.cfg/x": "--out"}
BAD_2 = {  # and of train_diffusion.py
    "": "--ae", "--ae nowhere": "nowhere", "--model DiT-Z": "--model", "--data nowhere --ae x": "--data",
    "--dry_run": "--ae --c --size", "--patch 0 --ae x": "--patch", "--ema_warmup -5 --ae x": "--ema_warmup",
    "--ema_warmup 0 --ae x": "--ema_warmup", "--max_images 0 --ae x": "--max_images", "--fid_num 1 --ae x": "--fid_num",
    "--depth 0 --ae x": "--depth", "--hidden 10000000 --ae x": "--hidden",
    "--label_dropout nan --ae x": "--label_dropout",
    "--ae /etc/passwd": "/etc/passwd"}
BAD = [(stage1, *row) for row in BAD_1.items()] + [(stage2, *row) for row in BAD_2.items()]


@pytest.mark.parametrize("main, flags, words", BAD, ids=str)
def test_bad_input_is_one_line(tmp_path, main, flags, words):
    (tmp_path / "setup.cfg").write_text("a file")
    flags = flags.replace("setup.cfg", f"{tmp_path}/setup.cfg")
    try:
        main(f"--steps 1 --eval_every 0 --out {tmp_path}/out {flags}")
    except InputError as e:
        message = str(e.code if e.code is not None else e)
        assert len(message) < 200 and "\n" not in message and all(word in message for word in words.split()), message
        assert not list(tmp_path.glob("out/*.jsonl"))             # before any work
    else:
        pytest.fail("accepted")


def test_other_bad_input(tmp_path, toy_ae):
    for flag, value in (("f", "8"), ("c", "4"), ("version", "1.0")):
        with pytest.raises(InputError, match=f"--{flag} {value}.* has {flag}"):
            stage1(f"--init {toy_ae} --{flag} {value} --dry_run")
    for flag in ("widths 4,8,8", "depths 0,2,1", "width 64", "no-shortcuts"):
        with pytest.raises(InputError, match=f"--{flag.split()[0]}.* leave the flag out"):
            stage1(f"--init {toy_ae} --{flag} --dry_run")
    stage1(f"--toy --f 4 --c 8 --init {toy_ae} --dry_run")                    # its own widths win over the preset's
    with pytest.raises(InputError, match="--steps .*int value: '1e3'"):
        stage1("--steps 1e3")
    (tmp_path / "file").write_text("")
    for how in ("--bench", "--dry_run", "--eval_only"):
        with pytest.raises(InputError, match="--out .*no folder"):
            stage1(f"--toy {how} --out {tmp_path}/file/in")
    with pytest.raises(InputError, match="--out .*file"):
        stage1(f"{AE} --steps 1 --out {tmp_path}/file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        stage1(f"{AE} --data {tmp_path}/empty --lpips 0 --steps 1 --out {tmp_path}/o")
    with pytest.raises(InputError, match="--image_size 20.* 4 x 2"):
        stage2(f"--ae {toy_ae} --model SiT-T --image_size 20 --patch 2 --dry_run")


# ----------------------------------------------------------------------------------------------------------------------
# Skipped steps, signals, saving, going on


@pytest.fixture
def small_discriminator(monkeypatch):
    monkeypatch.setattr(train_ae, "PatchGAN", functools.partial(PatchGAN, width=16))


def test_skipped_steps_leave_no_trace_but_in_the_count(tmp_path, small_discriminator):
    """Nine in a row, BatchNorm and discriminator included."""
    flags = f"{AE_1_0} --image_size 32 --gan 0.1 --disc_warmup 1"
    nan = lambda z: z * float("nan")
    stage1(f"{flags} --steps 3 --out {tmp_path}/three")
    with at_steps(ae_file.Encoder, range(3, 12), nan):
        stage1(f"{flags} --steps 13 --log_every 4 --out {tmp_path}/twelve")
    state = ckpt(tmp_path / "three")
    state["step"] = 12                                            # as if nothing had been between
    ae_file.write_checkpoint(state, tmp_path / "three" / "ckpt.pt")
    stage1(f"{flags} --steps 13 --out {tmp_path}/three")
    a, b = ckpt(tmp_path / "three"), ckpt(tmp_path / "twelve")
    assert_same_bits(a, b, ("model", "optimizer", "z_square", "disc", "disc_optimizer"))
    assert a["scale"] == b["scale"] and (a["skipped"], b["skipped"]) == (0, 9)
    lines, three = log(tmp_path / "twelve"), log(tmp_path / "three")
    assert [(line["step"], line["skipped"]) for line in lines] == [(1, 0), (4, 1), (8, 5), (12, 9), (13, 9)]
    for key in ("loss", "l1", "grad_norm"):                       # of the steps that were taken
        assert lines[1][key] == pytest.approx((three[1][key] + three[2][key]) / 2, rel=5e-6)
    assert "loss" not in lines[2] and "NaN" not in open(tmp_path / "twelve" / "log.jsonl").read()
    with at_steps(ae_file.Encoder, [1], nan):                     # a tenth, but not in a row
        stage1(f"{flags} --steps 16 --out {tmp_path}/twelve")
    assert [line["skipped"] for line in log(tmp_path / "twelve")[4:]] == [9, 9, 10, 10]
    assert ckpt(tmp_path / "twelve")["skipped"] == 10
    bias = [ckpt(tmp_path / "twelve", name)["model"]["encoder.project_out.bias"] for name in ("ckpt", "ckpt_prev")]
    assert not torch.equal(*bias)                                 # it trains on


@pytest.mark.parametrize("stage", [1, 2])
def test_a_disk_that_is_full_ends_a_run_in_one_line_and_it_goes_on(tmp_path, toy_cache, stage, capsys):
    run, flags = (stage1, AE) if stage == 1 else (stage2, f"{DIT} {toy_cache} --model SiT-T")
    out = tmp_path / "out"
    run(f"{flags} --steps 3 --out {out}")
    held = (out / "ckpt.pt").read_bytes()
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (len(held) // 2, 0):                              # the checkpoint, the log; capsys needs no file
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, usual[1]))
            with pytest.raises(InputError, match=f"--out {out}: .*make room") as e:
                run(f"{flags} --steps 6 --out {out}")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        assert len(str(e.value)) < 200 and (out / "ckpt.pt").read_bytes() == held
        assert not (out / "ckpt.pt.tmp").exists()                 # its room is free again
    run(f"{flags} --steps 6 --out {out}")
    run(f"{flags} --steps 6 --out {tmp_path}/undisturbed")
    assert_same_bits(ckpt(out), ckpt(tmp_path / "undisturbed"), ("model", "optimizer"))
    assert [line["step"] for line in log(out)] == [line["step"] for line in log(tmp_path / "undisturbed")]


def test_a_skipped_step_of_the_denoiser_leaves_the_average_alone(tmp_path, toy_cache):
    flags = f"{DIT} {toy_cache} --model DiT-T"
    stage2(f"{flags} --steps 2 --out {tmp_path}/a")
    with at_steps(diffusion.DiT, (2, 3), lambda out: out * float("inf")):
        stage2(f"{flags} --steps 5 --out {tmp_path}/b")
    state = ckpt(tmp_path / "a")
    state["step"] = 4                                             # as if nothing had been between
    ae_file.write_checkpoint(state, tmp_path / "a" / "ckpt.pt")
    stage2(f"{flags} --steps 5 --out {tmp_path}/a")
    assert_same_bits(ckpt(tmp_path / "a"), ckpt(tmp_path / "b"), ("model", "ema", "optimizer"))
    assert log(tmp_path / "b")[-1]["skipped"] == 2 == ckpt(tmp_path / "b")["skipped"]


@pytest.mark.parametrize("end", ["steps", "signal"])
def test_nothing_is_saved_inside_a_streak_of_skipped_steps(tmp_path, end):
    def bad(z):
        if end == "signal" and next(count) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return z * float("nan")
    count = iter(range(10))
    with at_steps(ae_file.Encoder, range(3, 12), bad):
        with pytest.raises(InputError, match="ckpt.pt holds step 3") as e:
            stage1(f"{AE} --steps 8 --save_every 1 --out {tmp_path}")
    assert len(str(e.value.code)) < 200 and "not saved" in str(e.value.code)
    assert [ckpt(tmp_path, name)["step"] for name in ("ckpt", "ckpt_prev")] == [3, 2]
    stage1(f"{AE} --steps 8 --save_every 1 --out {tmp_path}")     # the same command goes on
    assert ckpt(tmp_path)["step"] == 8 and [line["step"] for line in log(tmp_path)] == [*range(1, 9)]


def test_ten_bad_steps_in_a_row_stop_the_run(tmp_path):
    """Also where the run has recovered before it is noticed."""
    with at_steps(ae_file.Encoder, range(4, 14), lambda z: z * float("nan")):
        with pytest.raises(InputError, match="10 steps in a row") as e:
            stage1(f"{AE} --steps 30 --log_every 15 --out {tmp_path}")
    last = log(tmp_path)[-1]
    assert f"{tmp_path}/ckpt.pt" in str(e.value.code) and (last["step"], last["skipped"]) == (15, 10)


def test_a_learning_rate_that_explodes_ends_in_one_line(tmp_path):
    p = command("train_ae.py", f"{AE} --steps 30 --lr 1e30 --clip 0 --out {tmp_path}")
    out, err = p.communicate(timeout=120)
    assert p.returncode != 0 and "Traceback" not in err and "not yet written" in err and "--lr" in err
    assert "NaN" not in open(tmp_path / "log.jsonl").read()
    with pytest.raises(InputError, match="was not yet written"):  # step 1 was taken; its weights give no finite loss
        stage1(f"{AE} --steps 1 --lr 1e30 --clip 0 --out {tmp_path}/one")
    assert not list((tmp_path / "one").glob("*.pt"))


def test_weights_whose_loss_overflows_are_not_saved(tmp_path, sit):
    with pytest.raises(InputError, match="step 1 was not saved"):
        stage2(f"{sit} --steps 1 --warmup 0 --lr 1e21 --clip 0 --out {tmp_path}")
    assert not list(tmp_path.glob("*.pt"))


def test_networks_that_say_nan_end_an_evaluation(tmp_path, wild_ae, toy_cache):
    state = ckpt(wild_ae)
    state["model"]["decoder.project_in.bias"] *= math.nan
    ae_file.write_checkpoint(state, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match="not finite"):
        stage1(f"--eval_only --init {tmp_path} --eval_num 4 --out {tmp_path}/e")
    assert not (tmp_path / "e" / "eval.json").exists()
    with pytest.raises(InputError, match="not finite"):
        stage2(f"{DIT} --ae {tmp_path} --cache {tmp_path}/c --model SiT-T --steps 1 --eval_every 1 --out {tmp_path}/d")


def test_flags_that_would_be_ignored_are_refused_or_named(tmp_path, toy_ae, capsys):
    def refused(flags, *words):
        with pytest.raises(InputError) as e:
            stage1(f"{flags} --out {tmp_path}/new")
        assert all(word in str(e.value) for word in words), e.value
        assert not (tmp_path / "new").exists()
    refused("--toy --width 64", "--width 64", "--widths")
    refused(f"--toy --f 4 --c 8 --init {toy_ae} --widths 8,8,8", "--widths", "leave the flag out")
    refused(f"{AE} --eval_every 1 --features {tmp_path}/none.pt2 --steps 1", "--features", "none.pt2")
    refused(f"{AE} --val {tmp_path}/none --steps 1", f"--val {tmp_path}/none")
    refused(f"{AE} --eval_every 1 --eval_channels nan --steps 1", "--eval_channels nan")
    refused(f"{AE} --in_channels 5 --steps 1", "--in_channels 5", "--data toy has 3")
    (tmp_path / "empty").mkdir()
    refused(f"{AE} --data {tmp_path}/empty --lpips 0 --steps 1", "empty: no images")
    with pytest.raises(InputError, match="f0c128: no such checkpoint"):
        stage2("--dry_run --ae f0c128")
    flags = f"{SIZE} {RUN} --train all --out {tmp_path}/run"
    stage1(f"{flags} --init {toy_ae} --steps 1")
    capsys.readouterr()
    stage1(f"{flags} --init {toy_ae}/ckpt.pt --steps 1")
    assert "changed since: init" in capsys.readouterr().out


def test_a_run_whose_newest_checkpoint_is_lost_is_evaluated_from_the_one_before(tmp_path, toy_ae):
    out = shutil.copytree(toy_ae, tmp_path / "run")
    (out / "ckpt.pt").unlink()
    row, = stage1(f"--eval_only --eval_num 4 --eval_channels 8 --out {out}")[16]
    assert psnr_of([row]) == pytest.approx(evaluate_by_hand(out, to_pixels(toy_pictures(range(4), train=False)), [8]),
                                           rel=1e-3)


def test_a_checkpoint_that_lacks_something_is_one_line(tmp_path, sit, toy_ae):
    stage2(f"{sit} --steps 1 --out {tmp_path}/d")
    for run, flags, out in ((stage2, sit, tmp_path / "d"), (stage1, AE, shutil.copytree(toy_ae, tmp_path / "a"))):
        whole = ckpt(out)
        first = next(iter(whole["model"]))
        less = {name: x for name, x in whole["model"].items() if name != first}
        changes = [{"model": {}}, {"model": less}, {"optimizer": {"state": {"x": 1}}}, {"optimizer": 3}]
        changes += [{key: None} for key in ("step", "args", "skipped", "scale")] + [{"ema": less}] * (out.name == "d")
        for change in changes:
            ae_file.write_checkpoint(whole | change, out / "ckpt.pt")
            (out / "ckpt_prev.pt").unlink(missing_ok=True)
            with pytest.raises(InputError, match=f"--out {out}: .*(checkpoint|older)") as e:
                run(f"{flags} --steps 9 --out {out}")
            assert "\n" not in str(e.value), change
        ae_file.write_checkpoint(whole, out / "ckpt.pt")
        (out / "log.jsonl").write_text('{"step": null}\n[]\n3\n')
        run(f"{flags} --steps {whole['step'] + 1} --out {out}")
        assert [line["step"] for line in log(out)] == [whole["step"] + 1]


def test_an_evaluation_cut_off_between_score_and_picture_scores_once(tmp_path, toy_cache, features):
    flags = f"{DIT} {toy_cache} --model SiT-T --eval_every 1 --fid toy --fid_num 12 --features {features}"
    stage2(f"{flags} --steps 1 --out {tmp_path}/d")
    (tmp_path / "d" / "samples_0000001.png").unlink()
    stage2(f"{flags} --steps 1 --out {tmp_path}/d")
    assert [line["step"] for line in log(tmp_path / "d", "fid")] == [1]
    assert (tmp_path / "d" / "samples_0000001.png").exists()


@pytest.mark.parametrize("trainer", ["ae", "diffusion"])
def test_one_signal_saves_and_stops_and_a_second_one_interrupts(tmp_path, sit, capsys, trainer):
    main, cls, flags = {"ae": (stage1, ae_file.Encoder, f"{AE} --eval_num 4"),
                        "diffusion": (stage2, diffusion.DiT, sit)}[trainer]
    flags += " --steps 6 --save_every 100 --eval_every 3"
    for number in (signal.SIGTERM, signal.SIGINT):
        out = tmp_path / str(int(number))
        with at_steps(cls, [2], lambda _: os.kill(os.getpid(), number)):
            main(f"{flags} --out {out}")
        text = capsys.readouterr().out
        assert ckpt(out)["step"] == 3 and "stopped by a signal" in text and "holds step 3" in text
        assert len(log(out)) == 3 and not list(out.glob("*_0000003.png"))      # preemption leaves no time for a picture

    def twice(_):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    with at_steps(cls, [1], twice), pytest.raises(KeyboardInterrupt):
        main(f"{flags} --out {tmp_path}/two")
    assert not (tmp_path / "two" / "ckpt.pt").exists()


def test_a_save_that_fails_leaves_the_old_checkpoint_whole(tmp_path, toy_ae, monkeypatch, capsys):
    three = tmp_path / "three"
    stage1(f"{AE} --steps 3 --out {three}")
    before = (three / "ckpt.pt").read_bytes()

    def disk_full(state, f):
        f = f if hasattr(f, "write") else open(f, "wb")
        f.write(before[:1000])
        raise OSError("No space left on device")
    with monkeypatch.context() as m, pytest.raises(OSError, match="No space"):
        m.setattr(torch, "save", disk_full)
        stage1(f"{AE} --steps 6 --out {three}")
    assert (three / "ckpt.pt").read_bytes() == before

    replace = os.replace

    def killed_between(source, target):                           # the old one has its new name, the new one not yet
        if str(target).endswith("/ckpt.pt"):
            raise KeyboardInterrupt
        replace(source, target)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(os, "replace", killed_between)
        stage1(f"{AE} --steps 6 --out {three}")
    assert not (three / "ckpt.pt").exists() and (three / "ckpt_prev.pt").read_bytes() == before
    capsys.readouterr()
    stage1(f"{AE} --steps 6 --out {three}")
    assert re.search(r"resuming \S+ckpt_prev.pt at step 3", capsys.readouterr().out)
    assert_same_bits(ckpt(three), ckpt(toy_ae))


def test_a_run_that_has_ended_goes_on_with_a_larger_number_of_steps(tmp_path, toy_ae, sit, capsys):
    stage2(f"{sit} --steps 2 --out {tmp_path}")
    for main, flags, out, step in ((stage1, AE, toy_ae, 6), (stage2, sit, tmp_path, 2)):
        before = os.stat(out / "ckpt.pt").st_mtime_ns, len(log(out))
        capsys.readouterr()
        main(f"{flags} --steps {step} --out {out}")
        assert f"already holds step {step}" in (text := capsys.readouterr().out) and "changed since" not in text
        assert before == (os.stat(out / "ckpt.pt").st_mtime_ns, len(log(out)))
    stage2(f"{sit} --steps 3 --out {tmp_path}")
    assert ckpt(tmp_path)["step"] == 3 and ckpt(tmp_path, "ckpt_prev")["step"] == 2 and log(tmp_path)[-1]["step"] == 3


def test_what_has_changed_since_is_said(tmp_path, toy_ae, sit, capsys):
    common = "data batch_size lr betas weight_decay warmup clip ema seed dtype workers".split()   # as in --help
    stage2(f"{sit} --steps 1 --out {tmp_path}/d")
    shutil.copytree(toy_ae, tmp_path / "a")
    for main, flags, out, names in ((stage1, AE, tmp_path / "a", [*common, "lpips", "gan"]),
                                    (stage2, sit, tmp_path / "d", [*common, "label_dropout", "max_images"])):
        state = ckpt(out)
        assert set(names) < set(state["args"])
        state["args"] |= dict.fromkeys(names, "another")
        torch.save(state, out / "ckpt.pt")
        main(f"{flags} --steps 1 --out {out}")
        assert re.search(r"changed since: ([\w, ]+)", capsys.readouterr().out)[1].split(", ") == names


def test_a_checkpoint_of_another_run_is_refused_by_the_right_word(tmp_path, toy_ae, wild_ae, toy_cache, sit):
    others = {"config": f"{NETWORK} --c 4 --channels 2,4", "phase": "--phase 2", "train": f"{NETWORK} --train all",
              "image_size": f"{NETWORK} --image_size 32", "channels": f"{NETWORK} --channels 4,8"}
    for word, other in others.items():
        with pytest.raises(InputError, match=f"--out .*another {word};"):
            stage1(f"{SIZE} {RUN} --steps 9 --out {toy_ae} {other}")
    with pytest.raises(InputError, match="kind ae, not diffusion"):
        stage2(f"{DIT} {toy_cache} --model USiT-T --out {toy_ae}")
    stage2(f"{sit} --steps 1 --out {tmp_path}/d")
    others = {"config": "--hidden 24", "channels": "--channels 4,8", "ae_hash": f"--ae {wild_ae} --cache {tmp_path}/w",
              "config|image_size": f"--image_size 8 --cache {tmp_path}/8"}      # another latent side is another network
    for word, other in others.items():
        with pytest.raises(InputError, match=f"--out .*another ({word});"):
            stage2(f"{sit} --steps 1 --out {tmp_path}/d {other}")
    with pytest.raises(InputError, match="kind diffusion, not ae"):
        stage1(f"{AE} --steps 9 --out {tmp_path}/d")
    with pytest.raises(InputError, match="--gan: .*no discriminator"):
        stage1(f"{AE} --image_size 32 --steps 1 --out {tmp_path}/g")
        stage1(f"{AE} --image_size 32 --steps 2 --gan 1 --out {tmp_path}/g")


@pytest.mark.parametrize("flags", [AE, AVERAGED, f"{GAN} --disc_warmup 2 --accumulate 2"],
                         ids=["1.5", "1.0 averaged", "gan"])
def test_autoencoder_resumes_bit_for_bit(tmp_path, small_discriminator, flags):
    stage1(f"{flags} --steps 6 --out {tmp_path}/a")
    stage1(f"{flags} --steps 3 --out {tmp_path}/b")
    stage1(f"{flags} --steps 6 --out {tmp_path}/b")
    assert_same_bits(ckpt(tmp_path / "a"), ckpt(tmp_path / "b"))
    six, three = ckpt(tmp_path / "b"), ckpt(tmp_path / "b", "ckpt_prev")
    assert (six["step"], three["step"]) == (6, 3)
    moved = {k: not torch.equal(six["model"][k], t) for k, t in three["model"].items()}
    assert all(moved[k] for k in moved if k.endswith("conv.weight"))


PHASE_2, PHASE_3 = "--phase 2 --image_size 32", "--phase 3 --image_size 32 --disc_warmup 1"


@pytest.mark.parametrize("flags", [PHASE_2, PHASE_3, "--train decoder"])
def test_later_phases_resume_bit_for_bit(tmp_path, toy_ae, small_discriminator, flags):
    flags = f"{SIZE} {RUN} {flags}"                               # what the network is, --init says
    stage1(f"{flags} --init {toy_ae} --steps 4 --out {tmp_path}/a")
    stage1(f"{flags} --init {toy_ae} --steps 2 --out {tmp_path}/b")
    init = f"--init {toy_ae}" if "decoder" in flags else ""       # a later phase finds it in its own run
    stage1(f"{flags} {init} --steps 4 --out {tmp_path}/b")
    assert_same_bits(ckpt(tmp_path / "a"), ckpt(tmp_path / "b"))


@pytest.mark.parametrize("model", ["USiT-T", "DiT-T"])
def test_diffusion_resumes_bit_for_bit(tmp_path, toy_cache, model):
    flags = f"{DIT} {toy_cache} --model {model}"
    stage2(f"{flags} --steps 6 --out {tmp_path}/a")
    stage2(f"{flags} --steps 3 --out {tmp_path}/b")
    stage2(f"{flags} --steps 6 --out {tmp_path}/b")
    assert_same_bits(ckpt(tmp_path / "a"), ckpt(tmp_path / "b"))


# ----------------------------------------------------------------------------------------------------------------------
# The log


BINS = {2: "loss_c2", 3: "loss_c4", 5: "loss_c8", 8: "loss_c8"}      # they double from the smallest c' to c


def with_prefix(line, prefix):
    return {key: value for key, value in line.items() if key.startswith(prefix)}


def test_log_lines_average_over_log_every_steps(tmp_path, sit, monkeypatch):
    flags = f"{sit} --channels 2,3,5,8"
    stage2(f"{flags} --steps 10 --out {tmp_path}/each")
    pause = lambda get_batch: lambda *args: [time.sleep(0.05), get_batch(*args)][1]
    monkeypatch.setattr(train_diffusion.Latents, "get_batch", pause(train_diffusion.Latents.get_batch))
    stage2(f"{flags} --log_every 3 --steps 7 --out {tmp_path}/third")
    stage2(f"{flags} --log_every 3 --steps 10 --out {tmp_path}/third")
    each, third = log(tmp_path / "each"), log(tmp_path / "third")
    assert [line["step"] for line in each] == list(range(1, 11))
    assert [line["step"] for line in third] == [1, 3, 6, 7, 8, 9, 10]      # also the first after going on, and the last
    assert len({line["c_prime"] for line in each}) > 2
    for line in each:
        assert with_prefix(line, "loss_c") == {BINS[line["c_prime"]]: line["loss"]}
    start = 0
    for line in third:
        steps, start = each[start : line["step"]], line["step"]
        for key in ("loss", "grad_norm", *(f"loss_c{k}" for k in (2, 4, 8))):
            values = [step[key] for step in steps if key in step]
            assert line.get(key) == (pytest.approx(np.mean(values), rel=5e-6) if values else None), key
        assert (line["lr"], line["c_prime"], line["skipped"]) == (steps[-1]["lr"], steps[-1]["c_prime"], 0)
        assert 12 / 0.05 >= line["img_per_s"] > 12 / 0.5          # 12 images, 0.05 s to wait for them
        seconds = 12 * len(steps) / line["img_per_s"]
        assert 0.045 * len(steps) <= line["wait"] * seconds <= seconds
    assert all(line["img_per_s"] > 0 and 0 <= line["wait"] < 1 for line in each)


def test_autoencoder_log_has_the_loss_of_each_c_prime(tmp_path):
    stage1(f"{AE} --channels 2,3,5,8 --steps 8 --out {tmp_path}")
    assert len({line["c_prime"] for line in log(tmp_path)}) > 2
    for line in log(tmp_path):
        assert with_prefix(line, "loss_c") == {BINS[line["c_prime"]]: line["loss"]}


def test_loss_by_quarters_of_time(tmp_path, sit, monkeypatch):
    """Over micro-batches and steps, each sample weighs the same."""
    seen = spy_on_losses(monkeypatch)
    stage2(f"{sit} --accumulate 2 --log_every 2 --steps 3 --out {tmp_path}")
    line, seen = log(tmp_path)[1], [pair for _, _, t, loss in seen[2:4] for pair in zip(t.tolist(), loss.tolist())]
    assert line["step"] == 2 and len(seen) == 12                  # the first line was step 1 alone
    for quarter in range(4):
        losses = [loss for t, loss in seen if quarter <= 4 * t < quarter + 1]
        assert line.get(f"loss_t{quarter}") == (pytest.approx(np.mean(losses), rel=2e-6) if losses else None)
    assert line["loss"] == pytest.approx(np.mean([loss for _, loss in seen]), rel=2e-6)


def test_bf16_keeps_master_weights_in_fp32(tmp_path, sit):
    for main, flags, cls in ((stage1, AE, ae_file.Encoder), (stage2, sit, torch.nn.Linear)):
        for dtype in ("fp32", "bf16"):
            seen = set()
            with after_forward(cls, lambda _, out: seen.add(out.dtype)):
                main(f"{flags} --dtype {dtype} --steps 2 --out {tmp_path}/{cls.__name__}/{dtype}")
            assert (torch.bfloat16 in seen) == (dtype == "bf16")
        a, b = (tmp_path / cls.__name__ / dtype for dtype in ("fp32", "bf16"))
        fp32, bf16 = log(a)[1]["loss"], log(b)[1]["loss"]
        assert fp32 != bf16 == pytest.approx(fp32, rel=0.03)
        assert {t.dtype for t in flat(ckpt(b)["model"]).values()} == {torch.float32}


# ----------------------------------------------------------------------------------------------------------------------
# Processes: kill -9, signals, crashes, ranks


def test_kill_9_and_sigterm(tmp_path):
    flags = f"{AE} --steps 1000 --save_every 5 --workers 2 --out {tmp_path}/a"
    job = Job(tmp_path, "train_ae.py", flags)
    while not (tmp_path / "a" / "ckpt_prev.pt").exists() and job.running():
        time.sleep(0.01)
    job.signal(signal.SIGKILL)
    assert job.end()[0] == -signal.SIGKILL
    before = os.stat(tmp_path / "a" / "ckpt_prev.pt").st_mtime_ns
    job = Job(tmp_path, "train_ae.py", flags)
    while os.stat(tmp_path / "a" / "ckpt_prev.pt").st_mtime_ns == before and job.running():
        time.sleep(0.01)
    job.signal(signal.SIGTERM)
    code, text = job.end()
    assert code == 0 and "stopped by a signal" in text, text[-2000:]
    done = ckpt(tmp_path / "a")["step"]
    stage1(f"{AE} --steps {done} --save_every 5 --out {tmp_path}/b")      # without workers
    assert_same_bits(ckpt(tmp_path / "a"), ckpt(tmp_path / "b"))


def stand_still_at_the_third_batch():
    count = iter(range(100))
    get_batch = ae_file.ToyImages.get_batch

    def slow(self, indices, keys=None):
        if next(count) == 2:
            time.sleep(600)
        return get_batch(self, indices, keys)
    ae_file.ToyImages.get_batch = slow
    train_ae.PATIENCE = 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_ends_a_run_that_waits_for_its_data(tmp_path, workers):
    flags = f"{AE} --steps 50 --save_every 1 --workers {workers} --out {tmp_path}/a"
    job = Job(tmp_path, "train_ae.py", flags, patch=stand_still_at_the_third_batch)
    while not (tmp_path / "a" / "ckpt_prev.pt").exists() and job.running():
        time.sleep(0.02)
    job.signal(signal.SIGTERM)
    code, text = job.end(timeout=60)
    assert code == 1 and "stopped by a signal while waiting" in text and "holds step 2" in text, text[-2000:]


def encode_slowly():
    encode = ae_file.DCAE.encode
    ae_file.DCAE.encode = lambda self, img: time.sleep(0.2) or encode(self, img)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_caching_at_once(tmp_path, toy_ae, number):
    flags = f"--ae {toy_ae} --model SiT-T {SMALL} --max_images 2000 --batch_size 4 --channels 8 --steps 1"
    job = Job(tmp_path, "train_diffusion.py", f"{flags} --cache {tmp_path}/c --out {tmp_path}/a", patch=encode_slowly)
    while not (tmp_path / "c" / "manifest.json").exists() and job.running():
        time.sleep(0.02)
    time.sleep(0.5)
    job.signal(number)
    code, text = job.end(timeout=30)
    assert code == 1 and "stopped by a signal" in text and "Traceback" not in text, text[-2000:]


def test_nobody_reads_what_a_run_prints(tmp_path):
    """A closed pipe (| head -1) leaves the run alone; a full one keeps no signal from it."""
    for name in ("closed", "full"):
        reader, writer = os.pipe()
        flags = f"train_ae.py {AE} --steps {8 if name == 'closed' else 10**6} --out {tmp_path}/{name}"
        code = f"import ae, tqdm; ae.Screen.drain.__defaults__ = (0.5,); w = tqdm.tqdm.write\n" \
               f"tqdm.tqdm.write = lambda *a, **k: [w('x' * 70000), w(*a, **k)]\n" \
               f"import sys, runpy; sys.argv = {flags.split()!r}; sys.path.insert(0, {str(ROOT)!r})\n" \
               f"runpy.run_path('train_ae.py', run_name='__main__')"
        p = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=writer)
        os.close(writer)
        if name == "closed":
            os.close(reader)
        else:
            while not (tmp_path / name / "ckpt.pt").exists() and p.poll() is None:
                time.sleep(0.02)
            p.send_signal(signal.SIGTERM)
        assert p.wait(timeout=60) == 0
        steps = [line["step"] for line in log(tmp_path / name)]
        assert steps == [*range(1, ckpt(tmp_path / name)["step"] + 1)] and len(steps) >= 8 - 6 * (name == "full")
    os.close(reader)


def test_a_second_training_in_one_folder_is_refused(tmp_path):
    first = Job(tmp_path, "train_ae.py", f"{AE} --steps 100000 --out {tmp_path}/a")
    while not (tmp_path / "a" / "log.jsonl").exists() and first.running():
        time.sleep(0.02)
    p = command("train_ae.py", f"{AE} --steps 3 --out {tmp_path}/a")
    out, err = p.communicate(timeout=60)
    assert p.returncode == 1 and "another process" in err and "--out" in err and "Traceback" not in err
    first.signal(signal.SIGKILL)                                  # gives the folder free
    first.end()
    stage1(f"{AE} --steps 3 --out {tmp_path}/a")
    assert ckpt(tmp_path / "a")["step"] >= 3


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "bit":
        data[len(data) // 3] ^= 4
    path.write_bytes({"bit": data, "short": data[:-100], "empty": b""}[how])


@pytest.mark.parametrize("how", ["bit", "short", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, how, capsys):
    flags = f"{AE} --save_every 2"
    stage1(f"{flags} --steps 6 --out {tmp_path}/whole")
    stage1(f"{flags} --steps 4 --out {tmp_path}/a")
    damage(tmp_path / "a" / "ckpt.pt", how)
    with open(tmp_path / "a" / "log.jsonl", "a") as f:
        f.write('{"step": 4, "lo')                                # and half a line
    capsys.readouterr()
    stage1(f"{flags} --steps 6 --out {tmp_path}/a")
    line, = [x for x in capsys.readouterr().err.splitlines() if "ckpt_prev.pt" in x]
    assert "ckpt.pt" in line.replace("ckpt_prev.pt", "") and len(line) < 300
    assert_same_bits(ckpt(tmp_path / "a"), ckpt(tmp_path / "whole"))
    assert [x["step"] for x in log(tmp_path / "a")] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "a" / "ckpt_damaged.pt").exists()
    assert ckpt(tmp_path / "a", "ckpt_prev")["step"] == 4         # the damaged one was never in its place
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        damage(tmp_path / "a" / name, how)
    with pytest.raises(InputError, match="ckpt"):
        stage1(f"{flags} --steps 8 --out {tmp_path}/a")


def test_an_evaluation_that_was_cut_off_is_made_up(tmp_path, sit):
    flags = f"{AE} --eval_every 2 --eval_num 4 --save_every 2"
    stage1(f"{flags} --steps 4 --out {tmp_path}/whole")

    def cut(*args):
        raise KeyboardInterrupt
    with mock.patch.object(train_ae.Evaluation, "report", cut), pytest.raises(KeyboardInterrupt):
        stage1(f"{flags} --steps 4 --out {tmp_path}/a")
    assert ckpt(tmp_path / "a")["step"] == 2 and not (tmp_path / "a" / "eval.jsonl").exists()
    for _ in range(2):                                            # and once only
        stage1(f"{flags} --steps 4 --out {tmp_path}/a")
        assert log(tmp_path / "a", "eval") == log(tmp_path / "whole", "eval")
    flags = f"{sit} --eval_every 2 --save_every 2 --steps 2 --out {tmp_path}/d"
    with mock.patch.object(train_diffusion, "evaluate", cut), pytest.raises(KeyboardInterrupt):
        stage2(flags)
    stage2(flags)
    assert (tmp_path / "d" / "samples_0000002.png").exists() and len(log(tmp_path / "d")) == 2


def test_logs_lose_what_is_beyond_the_checkpoint(tmp_path):
    flags = f"{AE} --save_every 2 --eval_every 3 --eval_num 4"
    stage1(f"{flags} --steps 6 --out {tmp_path}/a")
    stage1(f"{flags} --steps 3 --out {tmp_path}/b")
    os.remove(tmp_path / "b" / "ckpt.pt")                         # killed at step 3, before it was saved
    with open(tmp_path / "b" / "log.jsonl", "a") as f:
        f.write('{"step": 5, "loss": 1}\n{"step": 6, "lo')
    stage1(f"{flags} --steps 6 --out {tmp_path}/b")
    for name in ("log", "eval"):
        steps = [line["step"] for line in log(tmp_path / "b", name)]
        assert steps == [line["step"] for line in log(tmp_path / "a", name)]


def test_betas_and_weight_decay_of_a_resume_are_the_flags(tmp_path, sit, capsys):
    stage1(f"{AE} --steps 2 --out {tmp_path}/a")
    stage1(f"{AE} --steps 4 --betas 0.5 0.6 --weight_decay 0.3 --out {tmp_path}/a")
    assert "changed since: betas, weight_decay" in capsys.readouterr().out
    groups = ckpt(tmp_path / "a")["optimizer"]["param_groups"]
    assert {(tuple(g["betas"]), g["weight_decay"]) for g in groups} == {((0.5, 0.6), 0.3)}
    stage2(f"{sit} --steps 2 --out {tmp_path}/d")
    stage2(f"{sit} --steps 4 --betas 0.5 0.6 --weight_decay 0.3 --out {tmp_path}/d")
    groups = ckpt(tmp_path / "d")["optimizer"]["param_groups"]
    assert {(tuple(g["betas"]), g["weight_decay"]) for g in groups} == {((0.5, 0.6), 0.3), ((0.5, 0.6), 0.0)}


def fail_in_the_third_forward():
    count = iter(range(100))

    def hook(module, inputs, output):
        if isinstance(module, ae_file.Decoder) and next(count) == 2:
            raise RuntimeError("bug")
    torch.nn.modules.module.register_module_forward_hook(hook)


def test_a_crash_does_not_hang_on_its_workers(tmp_path):
    flags = f"{AE} --steps 50 --workers 2 --out {tmp_path}/a"
    job = Job(tmp_path, "train_ae.py", flags, patch=fail_in_the_third_forward)
    code, text = job.end(timeout=60)
    assert code == 1 and "bug" in text


def test_sigterm_stops_two_ranks_together(tmp_path):
    """The real torchrun."""
    p = command("train_ae.py", f"{AE} --steps 100000 --log_every 10 --save_every 100000 --out {tmp_path}", ranks=2)
    while not (tmp_path / "log.jsonl").exists() and p.poll() is None:
        time.sleep(0.05)
    os.killpg(p.pid, signal.SIGTERM)                              # torchrun sends it on, and the ranks get it, too
    out, err = p.communicate(timeout=120)
    assert "stopped by a signal" in out + err and ckpt(tmp_path)["step"] % 10 == 0, err[-2000:]


def assert_same_first_line(a, b):
    for key in ("loss", "grad_norm"):
        assert log(a)[0][key] == pytest.approx(log(b)[0][key], rel=2e-6)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """one(flags): the folder of a run of 4 steps in one process, made once."""
    folder, made = tmp_path_factory.mktemp("one"), {}

    def get(flags):
        if str(flags) not in made:
            made[str(flags)] = folder / str(len(made))
            stage1(f"{flags} --steps 4 --out {made[str(flags)]}")
        return made[str(flags)]
    return get


@pytest.mark.parametrize("flags, accumulate", [(AE, 2), (AE_1_0, 1), (GAN, 1)], ids=["1.5 accumulated", "1.0", "gan"])
def test_two_ranks_equal_one_autoencoder(tmp_path, one, flags, accumulate):
    run(tmp_path, "train_ae.py", f"{flags} --steps 4 --accumulate {accumulate} --out {tmp_path}/two", ranks=2)
    assert_same_first_line(one(flags), tmp_path / "two")
    a, b = ckpt(one(flags)), ckpt(tmp_path / "two")
    assert distance(a, b) < 1e-4 and a["scale"] == pytest.approx(b["scale"], rel=1e-5)
    statistics = [name for name in a["model"] if "running" in name or "num_batches" in name]
    assert bool(statistics) == (flags is AE_1_0)                  # BatchNorm counts the batches of all ranks
    for name in statistics:
        assert torch.allclose(a["model"][name], b["model"][name], rtol=1e-5, atol=1e-6), name
    if flags is GAN:
        assert distance(a, b, "disc") < 1e-4


def psnr_of(table):
    return {row["c_prime"]: row["psnr"] for row in table}


def evaluate_by_hand(folder, pixels, rows):
    """{c': mean PSNR} of a checkpoint on uint8 pictures."""
    img = to_float(pixels)
    return {k: psnr_by_hand(pixels, to_pixels(rebuild(folder, img, k))) for k in rows}


@pytest.mark.parametrize("flags, accumulate", [(AE, 2), (AVERAGED, 1)], ids=["1.5 accumulated", "1.0 averaged"])
def test_autoencoder_fsdp_equals_one_and_goes_on_without(tmp_path, one, flags, accumulate):
    two, evaluation = f"{flags} --out {tmp_path}/two", "--eval_every 2 --eval_num 5"
    run(tmp_path, "train_ae.py", f"{two} --fsdp --accumulate {accumulate} --steps 2 {evaluation}", ranks=2)
    table = log(tmp_path / "two", "eval")[0]["table"]             # ranks share the pictures
    by_hand = evaluate_by_hand(tmp_path / "two", to_pixels(toy_pictures(range(5), train=False)), (2, 4, 8))
    assert [row["n"] for row in table] == [5] * 3 and psnr_of(table) == pytest.approx(by_hand, rel=1e-3)
    assert set(table[0]) == {"c_prime", "psnr", "psnr_n", "ssim", "n"}      # on built-in images: nothing to download
    stage1(f"{two} --steps 4")
    assert_same_first_line(one(flags), tmp_path / "two")
    assert distance(ckpt(one(flags)), ckpt(tmp_path / "two")) < 1e-4
    if "--ema" in flags:
        assert distance(ckpt(one(flags)), ckpt(tmp_path / "two"), "ema") < 1e-4


def test_the_batch_is_divided_among_ranks(tmp_path):
    code, text = Job(tmp_path, "train_ae.py", f"{AE} --batch_size 3 --steps 1 --out {tmp_path}/a", ranks=2).end()
    assert code == 1 and "--batch_size 3" in text and "2 x 1" in text


@pytest.fixture(scope="module")
def one_diffusion(tmp_path_factory, toy_cache):
    """Flags of a diffusion run, and its folder after 6 steps in one process; its ckpt_prev.pt holds step 3."""
    out = tmp_path_factory.mktemp("one_diffusion")
    flags = f"{DIT} {toy_cache} --model USiT-T"
    stage2(f"{flags} --steps 6 --out {out}")
    return flags, out


def assert_equal_training(a, b):
    assert distance(a, b) < 1e-4 and distance(a, b, "ema") < 1e-4


def write_down_samples(folder):
    """In each rank: the sample numbers of every batch."""
    get_batch = train_diffusion.Latents.get_batch

    def spy(self, indices, keys):
        with open(f"{folder}/samples_{os.environ['RANK']}", "a") as f:
            f.write(json.dumps([int(k) for k in keys]) + "\n")
        return get_batch(self, indices, keys)
    train_diffusion.Latents.get_batch = spy


def test_two_ranks_then_one_then_three_equal_one_diffusion(tmp_path, one_diffusion):
    """Any number of ranks, with and without accumulation, sees the same samples, and is the same training."""
    flags, one = one_diffusion
    out = tmp_path / "run"
    spy = functools.partial(write_down_samples, str(tmp_path))
    run(tmp_path, "train_diffusion.py", f"{flags} --accumulate 2 --steps 2 --out {out}", ranks=2, patch=spy)
    stage2(f"{flags} --steps 4 --out {out}")
    run(tmp_path, "train_diffusion.py", f"{flags} --steps 6 --out {out}", ranks=3, patch=spy)
    read = {rank: [json.loads(line) for line in open(tmp_path / f"samples_{rank}")] for rank in range(3)}
    assert [len(n) for n in read[0]] == [3] * 4 + [4] * 2 and [len(n) for n in read[2]] == [4] * 2
    numbers = sum((n for batches in read.values() for n in batches), [])
    assert sorted(numbers) == [*range(24), *range(48, 72)]        # steps 0, 1 and 4, 5 of 12 samples: each once
    for a, b in zip(log(one), log(out), strict=True):
        assert a["c_prime"] == b["c_prime"] and a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert with_prefix(a, "loss_") == pytest.approx(with_prefix(b, "loss_"), rel=1e-5)
    assert_same_first_line(one, out)
    assert_equal_training(ckpt(one), ckpt(out))


def preview_by_hand(folder, seed=0, **how):
    """Four rows of ten samples, a column for each class: the average's, decoded."""
    net = diffusion.from_pretrained(folder)
    z = sample.generate(net, torch.arange(40) % 10, seed=seed, **how)
    with torch.no_grad():
        return to_pixels(DCAE.from_pretrained(net.info["ae"]).decode(z / net.info["scale"]))


def write_down_solvers(folder):
    """In each rank: how it draws samples."""
    generate = sample.generate

    def spy(*args, **kw):
        Path(f"{folder}/solver_{os.environ['RANK']}").write_text(str(kw.get("solver")))
        return generate(*args, **kw)
    sample.generate = train_diffusion.generate = spy


def test_fsdp_equals_one_and_resumes_on_other_ranks(tmp_path, one_diffusion):
    flags, one = one_diffusion
    spy = functools.partial(write_down_solvers, str(tmp_path))
    first = f"{flags} --fsdp --steps 3 --eval_every 2 --out {tmp_path}/two"       # a preview, and training goes on
    run(tmp_path, "train_diffusion.py", first, ranks=2, patch=spy)
    solvers = [(tmp_path / f"solver_{rank}").read_text() for rank in (0, 1)]
    assert solvers == ["heun", "heun"]                            # fixed steps: adaptive ones would differ among ranks
    assert_equal_training(ckpt(one, "ckpt_prev"), ckpt(tmp_path / "two"))
    shown = tiles(tmp_path / "two" / "samples_0000003.png", 10, 16)
    assert_close_pixels(shown, preview_by_hand(tmp_path / "two", solver="heun"))
    run(tmp_path, "train_diffusion.py", f"{flags} --fsdp --checkpointing --steps 6 --out {tmp_path}/two", ranks=3)
    for a, b in zip(log(one), log(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert_same_first_line(one, tmp_path / "two")
    assert_equal_training(ckpt(one), ckpt(tmp_path / "two"))
    assert diffusion.from_pretrained(tmp_path / "two").info["step"] == 6                   # one file of whole weights
    shutil.copytree(one, tmp_path / "further")
    for out in ("further", "two"):                                # and goes on without --fsdp, in one process
        stage2(f"{flags} --steps 8 --out {tmp_path}/{out}")
    assert_equal_training(ckpt(tmp_path / "further"), ckpt(tmp_path / "two"))


def test_a_run_of_before_the_common_checkpoint_is_sampled_and_not_gone_on_with(tmp_path, one_diffusion):
    flags, one = one_diffusion
    old = ckpt(one) | {"optimizer": {"state": {0: {}}, "param_groups": []}}   # moments by number
    for optimizer in (old["optimizer"], None):
        torch.save(old | {"optimizer": optimizer}, tmp_path / "ckpt.pt")
        with pytest.raises(InputError, match="older version"):
            stage2(f"{flags} --steps 9 --out {tmp_path}")
        assert diffusion.from_pretrained(tmp_path).info["step"] == 6


def test_hybrid_sharding_over_two_nodes_equals_one(tmp_path, one_diffusion):
    flags, one = one_diffusion
    run(tmp_path, "train_diffusion.py", f"{flags} --fsdp --steps 3 --out {tmp_path}/four", ranks=4, per_node=2)
    assert_same_first_line(one, tmp_path / "four")
    assert_equal_training(ckpt(one, "ckpt_prev"), ckpt(tmp_path / "four"))


# ----------------------------------------------------------------------------------------------------------------------
# The latent cache, and what the denoiser is fed


def test_cache_holds_the_latents_of_the_pictures_and_of_their_mirrors(tmp_path, wild_ae, pictures):
    """Of a folder: evenly spaced over the classes, through the evaluation crop, labels beside them, in fp16."""
    flags = f"--ae {wild_ae} --data {pictures[0]} --image_size 32 --max_images 5 --cache {tmp_path}/c"
    flags += f" --model SiT-T {SMALL} --channels 8 --batch_size 2 --steps 1 --eval_every 0"
    stage2(f"{flags} --out {tmp_path}/d")
    latents, labels = (np.load(tmp_path / "c" / f"{name}.npy") for name in ("latents", "labels"))
    img = to_float(read_pictures(pictures[0])[[0, 2, 4, 7, 9]])                            # 8 cats, then 4 dogs
    assert latents.shape == (2, 5, 8, 8, 8) and latents.dtype == np.float16 and labels.tolist() == [0, 0, 0, 0, 1]
    for stored, x in zip(latents, (img, img.flip(3))):
        z = encode(wild_ae, x).numpy()
        assert np.abs(stored - z).max() < 1e-3 * np.abs(z).max()
    assert ckpt(tmp_path / "d")["classes"] == ["cat", "dog"] and ckpt(tmp_path / "d")["config"]["num_classes"] == 2
    manifest = json.load(open(tmp_path / "c" / "manifest.json"))
    assert manifest["data"] == str(pictures[0]) and manifest["crop"] == "adm" and manifest["shape"] == [8, 8, 8]

    # what does not fit the manifest is refused by name
    state = ckpt(wild_ae)
    changes = {"ae_hash": lambda s: s["model"]["encoder.project_out.bias"].add_(1e-3),
               "scale": lambda s: s.update(scale=2.0)}
    for name, change in changes.items():
        changed = dict(state, model={k: t.clone() for k, t in state["model"].items()})
        change(changed)
        (tmp_path / name).mkdir()
        torch.save(changed, tmp_path / name / "ckpt.pt")
    others = {f"--ae {tmp_path}/ae_hash": "ae_hash", f"--ae {tmp_path}/scale": "scale",
              "--image_size 16": "image_size, shape", "--max_images 6": "count", "--max_images 12": "count"}
    for other, words in others.items():
        with pytest.raises(InputError, match=f"--cache .*another {words}(, files)?;"):
            stage2(f"{flags} {other} --out {tmp_path}/e")
    renamed = shutil.copytree(pictures[0], tmp_path / "renamed")
    stage2(f"{flags} --data {renamed} --out {tmp_path}/d")        # a copy of the same pictures
    (renamed / "cat").rename(renamed / "ant")                     # with another name of a class
    with pytest.raises(InputError, match="another classes"):
        stage2(f"{flags} --data {renamed} --out {tmp_path}/e")


@pytest.fixture(scope="module")
def long_cache(tmp_path_factory, wild_ae):
    """Flags of a cache with a second chunk: 520 toy pictures."""
    folder = tmp_path_factory.mktemp("long") / "c"
    flags = f"--ae {wild_ae} --cache {folder} --max_images 520"
    flags += f" --model SiT-T {SMALL} --channels 8 --eval_every 0 --lr 1e-3"
    stage2(f"{flags} --batch_size 4 --steps 1 --out {folder}/d")
    return flags, folder


def test_cache_has_all_chunks_and_goes_on_where_it_was_killed(tmp_path, long_cache, wild_ae):
    flags, folder = long_cache
    latents, labels = (np.load(folder / f"{name}.npy") for name in ("latents", "labels"))
    img = toy_pictures(range(520), train=True)                    # pictures that no evaluation shows
    for stored, x in zip(latents, (img, img.flip(3))):
        z = encode(wild_ae, x).numpy()
        assert np.abs(stored - z).max() < 2e-3 * np.abs(z).max()
    assert labels.tolist() == [k % 10 for k in range(520)]
    assert (np.load(folder / "done.npy") == chunk_sums(folder)).all()
    half = shutil.copytree(folder, tmp_path / "half")
    broken = latents.copy()
    broken[:, 510:], labels[510:] = 7, 3
    for name, array in (("latents", broken), ("labels", labels)):
        np.save(half / f"{name}.npy", array)
    np.save(half / "done.npy", chunk_sums(half) * np.array([1, 0], np.uint32))
    stage2(f"{flags} --cache {half} --batch_size 4 --steps 1 --out {tmp_path}/d")
    again = np.load(half / "latents.npy")
    assert np.array_equal(again[:, 512:], latents[:, 512:])
    assert (again[:, 510:512] == 7).all()                         # finished chunks stay as they are
    assert np.load(half / "labels.npy")[510:].tolist() == [3, 3, *(k % 10 for k in range(512, 520))]
    assert (np.load(half / "done.npy") == chunk_sums(half)).all()


def test_what_the_denoiser_is_fed(tmp_path, long_cache, wild_ae, monkeypatch):
    """Latents x scale, of rms 1; each with its own label or the null label; half of them of mirrored pictures."""
    flags, folder = long_cache
    seen, calls = spy_on_losses(monkeypatch), []
    get_batch = train_diffusion.Latents.get_batch

    def spy(self, indices, keys):
        calls.append((list(indices), list(keys)))
        return get_batch(self, indices, keys)
    monkeypatch.setattr(train_diffusion.Latents, "get_batch", spy)
    stage2(f"{flags} --batch_size 104 --label_dropout 0.3 --seed 3 --steps 20 --out {tmp_path}")
    indices, keys = (np.array(sum((list(call[k]) for call in calls), [])) for k in (0, 1))
    z, y = (torch.cat([batch[k] for batch in seen]) for k in (0, 1))
    latents = torch.from_numpy(np.load(folder / "latents.npy")).float()
    scale = ckpt(wild_ae)["scale"]
    assert ckpt(tmp_path)["scale"] == scale < 0.9 and z.dtype == torch.float32
    plain, mirrored = ((z - scale * latents[k][indices]).flatten(1).abs().amax(1) < 1e-5 for k in (0, 1))
    assert (plain ^ mirrored).all()
    assert z.square().mean().sqrt() == pytest.approx(1, abs=0.03)
    assert mirrored.float().mean() == pytest.approx(0.5, abs=0.035)      # 2,080 draws: three sigma
    assert 5 < mirrored[indices >= 512].sum() < (indices >= 512).sum() - 5 == 27      # in the second chunk, too
    null = y == 10                                                # the null label is the number of classes
    assert null.float().mean() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(y[~null], torch.from_numpy(indices % 10)[~null])
    assert mirrored[null].float().mean() == pytest.approx(0.5, abs=0.07)      # drops and mirrors are independent
    assert keys.tolist() == list(range(2080))
    epochs = indices.reshape(4, 520)
    assert all(sorted(epoch) == list(range(520)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 4
    calls.clear()
    stage2(f"{flags} --batch_size 520 --seed 4 --steps 1 --out {tmp_path}/other")
    assert sorted(calls[0][0]) == list(range(520)) and calls[0][0] != epochs[0].tolist()   # another seed, another order


def test_an_autoencoder_without_a_scale(tmp_path):
    """Published ones without a known scale say 1: the cache's own rms, of plain latents, takes its place."""
    flags = f"--model SiT-T {SMALL} --max_images 16 --channels 8 --batch_size 4 --steps 1 --eval_every 0"
    write_autoencoder(tmp_path / "ae", scale=1.0)
    stage2(f"{flags} --ae {tmp_path}/ae --cache {tmp_path}/c --out {tmp_path}/d")
    rms = np.sqrt((np.load(tmp_path / "c" / "latents.npy")[0].astype(float) ** 2).mean())
    assert ckpt(tmp_path / "d")["scale"] == pytest.approx(1 / rms, rel=1e-5) and abs(rms - 1) > 0.1
    write_autoencoder(tmp_path / "ae", scale=3.0)
    stage2(f"{flags} --ae {tmp_path}/ae --cache {tmp_path}/three --out {tmp_path}/three")
    assert ckpt(tmp_path / "three")["scale"] == 3                 # any other is taken at its word
    state = ckpt(tmp_path / "ae")
    for part in ("weight", "bias"):
        state["model"][f"encoder.project_out.{part}"].zero_()
    torch.save(state, tmp_path / "ae" / "ckpt.pt")
    with pytest.raises(InputError, match="--cache .*rms 0"):
        stage2(f"{flags} --ae {tmp_path}/ae --cache {tmp_path}/zero --out {tmp_path}/e")


def test_scale_makes_rms_one(tmp_path):
    stage1(f"{AE} --batch_size 16 --steps 40 --lr 0 --log_every 40 --save_every 40 --out {tmp_path}")
    z = encode(tmp_path, toy_pictures(range(512), train=False))   # the encoder has stayed where it was
    assert float((z * DCAE.from_pretrained(tmp_path).scale).square().mean().sqrt()) == pytest.approx(1, abs=0.03)


def test_a_flat_folder_is_unconditional(tmp_path, wild_ae, monkeypatch):
    write_pictures(tmp_path / "flat", 3, height=16, classes=("",) * 12)
    seen = spy_on_losses(monkeypatch)
    flags = f"--ae {wild_ae} --data {tmp_path}/flat --model SiT-T {SMALL} --channels 8 --batch_size 12"
    stage2(f"{flags} --label_dropout 0.9 --steps 2 --eval_every 2 --cache {tmp_path}/c --out {tmp_path}/d")
    state = ckpt(tmp_path / "d")
    assert state["config"]["num_classes"] == 0 and state["classes"] == []
    assert len(seen) == 2 and all((y == 0).all() for _, y, _, _ in seen)
    assert json.load(open(tmp_path / "c" / "manifest.json"))["count"] == 12      # all that there are
    assert len(tiles(tmp_path / "d" / "samples_0000002.png", 10, 16)) == 40


# ----------------------------------------------------------------------------------------------------------------------
# The average, previews, scores


def score_by_hand(folder, reference, seed=0, num=60):
    """Labels are drawn once, with seed 0, as DC-Gen draws them; the average's samples at the run's seed."""
    net = diffusion.from_pretrained(folder)
    labels = torch.randint(10, (num,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = sample.generate(net, labels, seed=seed)
        pixels = to_pixels(DCAE.from_pretrained(net.info["ae"]).decode(z / net.info["scale"]))
    return frechet_by_hand(features_by_hand(pixels), features_by_hand(reference))


def test_ranks_share_the_cache_and_the_score(tmp_path, long_cache, features):
    flags, folder = long_cache
    toys = to_pixels(toy_pictures(range(60), train=False))
    np.savez(tmp_path / "reference.npz", arr_0=toys)
    score = f"--eval_every 1 --fid {tmp_path}/reference.npz --fid_num 60 --features {features}"
    flags = f"{flags} --cache {tmp_path}/c --batch_size 4 --steps 1 {score} --out {tmp_path}/d"
    run(tmp_path, "train_diffusion.py", flags, ranks=2)
    for name in ("latents", "labels", "done"):                    # a chunk each
        a, b = (np.load(f"{x}/{name}.npy").astype(float) for x in (folder, tmp_path / "c"))
        assert np.abs(a - b).max() <= 1e-3 * np.abs(a).max(), name
    line, = log(tmp_path / "d", "fid")
    assert line["n"] == 60 and line["fid"] == pytest.approx(score_by_hand(tmp_path / "d", toys), rel=1e-3)
    code, text = Job(tmp_path, "train_diffusion.py", f"{flags} --fid_num 61 --out {tmp_path}/e", ranks=2).end()
    assert code == 1 and "--fid_num 61" in text


def test_the_average_is_what_samples_are_drawn_from(tmp_path, wild_ae, features, monkeypatch):
    flags = f"--ae {wild_ae} --cache {tmp_path}/c --model SiT-T {SMALL} --max_images 32 --channels 2,3,8 --batch_size 8"
    flags += f" --ema 0.9 --ema_warmup 1e-3 --warmup 0 --weight_decay 0 --seed 3 --out {tmp_path}/d"
    toys = to_pixels(toy_pictures(range(60), train=False))
    np.savez(tmp_path / "reference.npz", arr_0=toys)
    score = f"--fid {tmp_path}/reference.npz --fid_num 60 --features {features}"
    measured = []

    def around(measure):
        return lambda *args, **kw: [measured.append(1), measure(*args, **kw)][1]
    wrap(monkeypatch, fid, "measure", around)
    stage2(f"{flags} --lr 1e-2 --steps 4 --eval_every 3 {score}")
    state = ckpt(tmp_path / "d")
    assert [line["step"] for line in log(tmp_path / "d", "fid")] == [3, 4]
    assert len(measured) == 1                                     # the reference, once
    net = diffusion.from_pretrained(tmp_path / "d")
    assert distance(state, {"model": state["ema"]}) > 1e-4
    assert all(torch.equal(p, state["ema"][name]) for name, p in net.state_dict().items())

    # Pictures: its samples at the run's seed, divided by the scale, decoded
    assert sorted(p.name for p in (tmp_path / "d").glob("*.png")) == ["curves.png", "samples_0000003.png",
                                                                        "samples_0000004.png"]
    assert_close_pixels(tiles(tmp_path / "d" / "samples_0000004.png", 10, 16), preview_by_hand(tmp_path / "d", seed=3))

    line = log(tmp_path / "d", "fid")[-1]
    assert line["n"] == line["n_reference"] == 60
    assert line["fid"] == pytest.approx(score_by_hand(tmp_path / "d", toys, seed=3), rel=1e-3)

    # A step of learning rate 0: the raw weights stay, the average comes a tenth of the way
    stage2(f"{flags} --lr 0 --steps 5 --eval_every 0")
    later = ckpt(tmp_path / "d")
    assert_same_bits(state["model"] | {"x": state["model"]}, later["model"] | {"x": later["model"]})
    for name, average in later["ema"].items():
        assert torch.allclose(average, 0.9 * state["ema"][name] + 0.1 * state["model"][name], atol=1e-6), name


def test_periodic_score_of_samples_against_toy_images(tmp_path, sit, features):
    stage2(f"{sit} --eval_every 2 --steps 2 --fid toy --fid_num 60 --features {features} --out {tmp_path}")
    line = log(tmp_path, "fid")[0]
    assert (line["step"], line["n"], line["n_reference"]) == (2, 60, 60) and line["fid"] > 0
    assert (tmp_path / "samples_0000002.png").exists()


def test_autoencoder_kl_of_diffusers_stands_in(tmp_path):
    """The paper's Table 4 baselines: an f8 autoencoder, patch 2."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = dict(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    kl = diffusers.AutoencoderKL(**sizes, **blocks, scaling_factor=0.18215)
    kl.save_pretrained(tmp_path / "kl")
    flags = f"--ae {tmp_path}/kl --model DiT-T --depth 1 --patch 2 --image_size 32 --max_images 16 --no-augment"
    stage2(f"{flags} --batch_size 4 --steps 2 --eval_every 0 --cache {tmp_path}/c --out {tmp_path}/d")
    c = ckpt(tmp_path / "d")
    assert c["scale"] == 0.18215 and c["config"]["patch"] == 2 and c["config"]["c"] == 4 and c["config"]["size"] == 4
    sample.main(f"--ckpt {tmp_path}/d --n 2 --steps 2 --solver ddpm --out {tmp_path}/s".split())
    with np.load(tmp_path / "s" / "samples.npz") as f:
        assert f["arr_0"].shape == (2, 32, 32, 3)


# ----------------------------------------------------------------------------------------------------------------------
# Phases and losses of the autoencoder


def test_trainable_tensors_by_phase():
    ae = DCAE(small_config("1.0"))
    everything = [name for name, _ in ae.named_parameters()]
    assert select_trainable(ae, 1, "phase") == everything == select_trainable(ae, 2, "all")
    middle = [f"{end}.{part}" for end in ("encoder.project_out", "decoder.project_in") for part in ("weight", "bias")]
    assert select_trainable(ae, 2, "phase") == middle == [name for name, p in ae.named_parameters() if p.requires_grad]
    head = [f"decoder.project_out.{layer}.{part}" for layer in ("norm", "up.conv") for part in ("weight", "bias")]
    assert select_trainable(ae, 3, "phase") == head
    assert not any(m.training for m in ae.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert select_trainable(ae, 1, "decoder") == [name for name in everything if name.startswith("decoder.")]
    assert all(m.training for m in ae.modules() if isinstance(m, torch.nn.BatchNorm2d))


@pytest.mark.parametrize("flags, moves", [(PHASE_2, ("encoder.project_out", "decoder.project_in")),
                                          (PHASE_3, "decoder.project_out"),
                                          ("--train decoder --channels 4", "decoder.")])
def test_frozen_parts_keep_their_bits(tmp_path, one, small_discriminator, flags, moves):
    init = one(AE_1_0)
    common = f"{RUN} --batch_size 2 --lr 1e-2 --init {init} --out {tmp_path}"
    stage1(f"{common} {flags} --steps 3")
    a, b = ckpt(init), ckpt(tmp_path)
    for name in a["model"]:
        same = torch.equal(a["model"][name], b["model"][name])
        assert same == (not name.startswith(moves)), name
    encoder_trains = flags == PHASE_2
    assert (a["scale"] != pytest.approx(b["scale"], rel=1e-6)) == encoder_trains
    if flags == PHASE_3:
        stage1(f"{common} {flags} --steps 4")
        after = ckpt(tmp_path)["disc"]
        assert not any(torch.equal(x, after[k]) for k, x in b["disc"].items())      # the discriminator moves
        assert all(k in log(tmp_path)[-1] for k in ("logits_real", "logits_fake", "d", "g", "gan_weight"))


def test_gan_warm_up_and_players_do_not_leak(tmp_path, small_discriminator):
    flags = f"{AE} --image_size 32 --steps 2"
    for name, extra in (("plain", ""), ("warming", "--gan 0.5"), ("on", "--gan 0.5 --disc_warmup 0")):
        stage1(f"{flags} {extra} --out {tmp_path}/{name}")
    plain, warming, on = (ckpt(tmp_path / name) for name in ("plain", "warming", "on"))
    same = lambda a, b: all(torch.equal(a[k], b[k]) for k in a)
    assert same(plain["model"], warming["model"])                 # no say during its warm-up
    assert not same(plain["model"], on["model"])
    first = log(tmp_path / "warming")[0], log(tmp_path / "on")[0]
    assert first[0]["d"] == first[1]["d"]                         # its own first step knows nothing of the weight
    for weight in ("0.5", "50"):                                  # nor a later one: --clip holds the autoencoder still
        stage1(f"{flags} --gan {weight} --disc_warmup 0 --clip 1e-12 --lr 1e-3 --steps 1 --out {tmp_path}/{weight}")
    assert same(ckpt(tmp_path / "0.5")["disc"], ckpt(tmp_path / "50")["disc"])


class SquaredError(torch.nn.Module):
    """Stands in for LPIPS, whose weights are a download."""
    made = []

    def __init__(self, net="vgg", random=False):
        super().__init__()
        self.made.append((net, self))
        self.seen = []

    def forward(self, img, rec):
        self.seen.append((img, rec.detach()))
        return (img - rec).square().mean((1, 2, 3))


def test_perceptual_loss(tmp_path, pictures, monkeypatch):
    """L1 + weight x LPIPS-VGG; on real images its weight is 1."""
    monkeypatch.setattr(train_ae, "LPIPS", SquaredError)
    flags = f"{AE} --data {pictures[0]} --accumulate 2 --steps 1"
    for weight, extra in ((1.0, ""), (0.25, "--lpips 0.25"), (None, "--lpips 0")):
        SquaredError.made.clear()
        stage1(f"{flags} {extra} --out {tmp_path}/{weight}")
        line = log(tmp_path / str(weight))[0]
        if weight is None:
            assert not SquaredError.made and "lpips" not in line and line["loss"] == line["l1"]
            continue
        (net, metric), = SquaredError.made
        assert net == "vgg" and [img.shape for img, _ in metric.seen] == [(2, 3, 16, 16)] * 2
        img, rec = (torch.cat(x) for x in zip(*metric.seen))
        assert -1 <= img.min() < -0.5 and 0.5 < img.max() <= 1
        l1, square = (img - rec).abs().mean().item(), (img - rec).square().mean().item()
        assert (line["l1"], line["lpips"], line["loss"]) == pytest.approx((l1, square, l1 + weight * square), rel=2e-6)
    a, b = (ckpt(tmp_path / name)["model"]["encoder.project_out.weight"] for name in ("1.0", "None"))
    assert not torch.equal(a, b)


def test_phase_3_reports_before_and_after(tmp_path, wild_ae, capsys, small_discriminator):
    flags = f"--phase 3 --init {wild_ae} --image_size 24 --batch_size 2 --eval_num 4 --eval_every 2 --channels 4,8"
    flags += f" --warmup 0 --lr 1e-2 --out {tmp_path}"
    stage1(f"{flags} --steps 2")
    stage1(f"{flags} --steps 3")                       # "before" is that of the first step, whenever it went on
    tables = log(tmp_path, "eval")
    assert [line["step"] for line in tables] == [0, 2, 3] and len(list(tmp_path.glob("recon_*.png"))) == 3
    first, last = tables[0]["table"], tables[2]["table"]
    by_hand = evaluate_by_hand(wild_ae, to_pixels(toy_pictures(range(4), train=False, size=24)), (4, 8))
    assert psnr_of(first) == pytest.approx(by_hand, rel=1e-3)
    line = [text for text in capsys.readouterr().out.splitlines() if "before -> after" in text][-1]
    assert line.endswith(", ".join(f"{a['c_prime']}: {a['psnr']:.2f} -> {b['psnr']:.2f}" for a, b in zip(first, last)))


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.parametrize("version", ["1.5", "1.0"])
def test_evaluation_equals_decoding_each_prefix_by_hand(tmp_path, pictures, features, monkeypatch, capsys, version):
    """On --val, in eval mode (1.0 has BatchNorm), metrics on uint8, LPIPS on floats in [-1, 1]."""
    train, val = pictures
    ae = write_autoencoder(tmp_path / "ae", version, size=32)
    made = []
    monkeypatch.setattr(train_ae, "LPIPS", lambda net: made.append((net, LPIPS(net, random=True))) or made[-1][1])
    flags = f"--eval_only --init {ae} --data {train} --batch_size 5 --features {features}"
    results = stage1(f"{flags} --val {val} --out {tmp_path}/e")
    (net, metric), = made
    assert net == "alex" and set(results) == {32}                 # the checkpoint's size
    assert [row["c_prime"] for row in results[32]] == [2, 4, 8]   # doubling from the smallest c' it was trained with
    pixels = read_pictures(val)
    img, sheet = to_float(pixels), [pixels[[0, 1, 3, 4, 6, 7, 9, 10]]]                     # 8 of 12, evenly spaced
    for row in results[32]:
        rec = rebuild(ae, img, row["c_prime"])
        out = to_pixels(rec)
        assert rec.abs().max() > 1.5 and row["n"] == 12
        assert row["psnr"] == pytest.approx(psnr_by_hand(pixels, out), rel=1e-3)
        ssim = fid.ssim(torch.from_numpy(pixels), torch.from_numpy(out)).mean().item()
        assert row["ssim"] == pytest.approx(ssim, abs=1e-3)
        with torch.no_grad():
            assert row["lpips"] == pytest.approx(metric.metric(img, rec.clamp(-1, 1)).mean().item(), rel=1e-3)
        assert row["rfid"] == pytest.approx(frechet_by_hand(features_by_hand(pixels), features_by_hand(out)), rel=1e-3)
        sheet.append(out[[0, 1, 3, 4, 6, 7, 9, 10]])
    shown = tiles(tmp_path / "e" / "eval_32.png", 8, 32)
    assert_close_pixels(shown, np.concatenate(sheet))             # originals, then c' ascending
    saved = json.load(open(tmp_path / "e" / "eval.json"))
    assert saved["ckpt"] == str(ae) and saved["data"] == str(val) and saved["commit"] == commit()
    assert saved["results"] == {"32": results[32]}
    text = capsys.readouterr().out
    assert json.loads(text.strip().splitlines()[-1]) == saved["results"]
    for row in results[32]:
        printed = [str(row["c_prime"]), *(f"{row[k]:.3f}" for k in ("psnr", "ssim", "lpips", "rfid", "knn"))]
        assert printed in [line.split() for line in text.splitlines()]
    if version == "1.0":
        return
    # Other rows, other sizes, fewer images, evenly spaced over the classes; without --val those of --data
    results = stage1(f"{flags} --image_size 32 64 --eval_channels 8,1,8 --eval_num 4")      # into the folder of --init
    pixels = read_pictures(train)[[0, 3, 6, 9]]
    for table in results.values():
        assert [(row["c_prime"], row["n"]) for row in table] == [(1, 4), (8, 4)]
    assert psnr_of(results[32]) == pytest.approx(evaluate_by_hand(ae, pixels, (1, 8)), rel=1e-3)
    saved = json.load(open(ae / "eval.json"))
    assert saved["data"] == str(train) and saved["results"]["64"] == results[64] and (ae / "eval_64.png").exists()


def no_network():
    def refuse(*args, **kwargs):
        raise OSError("no network")
    torch.hub.download_url_to_file = refuse


def test_psnr_is_the_mean_over_pictures_that_have_one(tmp_path, toy_ae, monkeypatch):
    """Equal pictures have an infinite one, which JSON cannot say."""
    monkeypatch.setattr(fid, "psnr", lambda a, b: torch.tensor([math.inf, 20.0, math.inf, 30.0])[:len(a)])
    flags = f"--eval_only --init {toy_ae} --eval_channels 8 --batch_size 4 --out {tmp_path}"
    stage1(f"{flags} --eval_num 4")
    row, = json.load(open(tmp_path / "eval.json"))["results"]["16"]
    assert (row["psnr"], row["psnr_n"], row["n"]) == (25, 2, 4)
    stage1(f"{flags} --eval_num 1")
    row, = json.load(open(tmp_path / "eval.json"))["results"]["16"]
    assert (row["psnr"], row["psnr_n"], row["n"]) == (None, 0, 1)


def test_scores_below_their_size_are_left_out(tmp_path, pictures, features, monkeypatch, capsys):
    monkeypatch.setattr(train_ae, "LPIPS", lambda net: LPIPS(net, random=True))
    write_autoencoder(tmp_path / "ae", "1.5", size=8)
    flags = f"--eval_only --init {tmp_path}/ae --data {pictures[0]} --eval_channels 8 --inception random"
    row, = stage1(f"{flags} --image_size 8 --eval_num 1")[8]
    assert set(row) == {"c_prime", "psnr", "psnr_n", "n"}
    assert "left out" in capsys.readouterr().out


def test_knn_of_latents_by_hand(tmp_path, pictures, features):
    """Ten nearest others by cosine of the averaged latent, votes weighted by exp(cosine / 0.07)."""
    g = torch.Generator().manual_seed(0)
    features, labels = torch.randn(40, 6, generator=g), torch.arange(40) % 3
    right = 0
    for i in range(40):
        cosine = F.cosine_similarity(features[i], features)
        near = [j for j in cosine.argsort(descending=True).tolist() if j != i][:10]
        votes = [sum(math.exp(cosine[j] / 0.07) for j in near if labels[j] == k) for k in range(3)]
        right += votes.index(max(votes)) == labels[i]
    assert train_ae.knn_accuracy(features, labels) == pytest.approx(right / 40)
    ae = write_autoencoder(tmp_path / "ae", "1.5", size=32)
    rows = stage1(f"--eval_only --init {ae} --data {pictures[0]} --out {tmp_path}/e --eval_channels 2,8")[32]
    pixels = to_float(read_pictures(pictures[0]))
    with torch.no_grad():
        z = DCAE.from_pretrained(ae).encode(pixels).mean((2, 3))
    y = torch.tensor([label for _, label in open_images(pictures[0], 32)])
    for row in rows:
        assert row["knn"] == pytest.approx(train_ae.knn_accuracy(z[:, :row["c_prime"]], y))


def test_ranks_share_the_evaluation(tmp_path, pictures, features):
    ae, val = write_autoencoder(tmp_path / "ae", size=32), pictures[1]
    flags = f"--eval_only --init {ae} --data {val} --batch_size 4 --features {features} --out {tmp_path}/e"
    run(tmp_path, "train_ae.py", flags, ranks=2, patch=no_network)
    pixels = read_pictures(val)
    for row in json.load(open(tmp_path / "e" / "eval.json"))["results"]["32"]:
        out = to_pixels(rebuild(ae, to_float(pixels), row["c_prime"]))
        rfid = frechet_by_hand(features_by_hand(pixels), features_by_hand(out))
        assert (row["n"], row["psnr"], row["rfid"]) == pytest.approx((12, psnr_by_hand(pixels, out), rfid), rel=1e-3)


def test_evaluation_while_training(tmp_path, pictures, features, monkeypatch):
    """The network as it stands at that step, in eval mode; the training does not notice it."""
    monkeypatch.setattr(train_ae, "LPIPS", SquaredError)
    train, val = pictures
    flags = f"{AE_1_0} --image_size 32 --data {train} --lpips 0 --steps 5 --channels 3,8"
    seen = []
    with after_forward(ae_file.Encoder, lambda img, _: seen.append(img) if not torch.is_grad_enabled() else None):
        stage1(f"{flags} --val {val} --eval_every 2 --features {features} --out {tmp_path}/a")
    pixels, lines = read_pictures(val), log(tmp_path / "a", "eval")
    by_hand = evaluate_by_hand(tmp_path / "a", pixels, (3, 6, 8))
    assert [line["step"] for line in lines] == [2, 4, 5] and [row["n"] for row in lines[2]["table"]] == [12] * 3
    assert psnr_of(lines[2]["table"]) == pytest.approx(by_hand, rel=1e-3)
    assert psnr_of(lines[0]["table"]) != psnr_of(lines[2]["table"]) and {"lpips", "rfid"} < set(lines[0]["table"][0])
    shown = [pixels, *(to_pixels(rebuild(tmp_path / "a", to_float(pixels), k)) for k in (3, 6, 8))]
    shown = np.concatenate([x[[0, 1, 3, 4, 6, 7, 9, 10]] for x in shown])
    assert_close_pixels(tiles(tmp_path / "a" / "recon_0000005.png", 8, 32), shown)
    names = ["curves.png", *(f"recon_{step:07}.png" for step in (2, 4, 5))]
    assert sorted(p.name for p in (tmp_path / "a").glob("*.png")) == names
    stage1(f"{flags} --eval_every 5 --features {features} --out {tmp_path}/b")      # without --val: pictures of --data
    assert_same_bits(ckpt(tmp_path / "a"), ckpt(tmp_path / "b"))
    line, = log(tmp_path / "b", "eval")
    by_hand = evaluate_by_hand(tmp_path / "b", read_pictures(train), (3, 6, 8))
    assert line["step"] == 5 and psnr_of(line["table"]) == pytest.approx(by_hand, rel=1e-3)


def test_curves_show_what_the_logs_hold(tmp_path, toy_cache, monkeypatch):
    figures = []
    figure = pytest.importorskip("matplotlib.figure").Figure
    savefig = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, path: figures.append(self) or savefig(self, path))
    stage1(f"{AE} --log_every 1 --eval_every 2 --eval_num 2 --steps 4 --out {tmp_path}/a")
    stage2(f"{DIT} {toy_cache} --model SiT-T --log_every 1 --eval_every 3 --steps 3 --out {tmp_path}/d")
    assert len(figures) == 3 and all(Image.open(tmp_path / out / "curves.png").width > 500 for out in "ad")
    third = {"a": "PSNR by c', or distance of samples", "d": "loss by quarter of the time axis"}
    for shown, out in zip(figures[1:], "ad"):
        assert [axes.get_title() for axes in shown.axes] == ["loss and its parts", "loss by c'", third[out]]
        lines = {line.get_label(): line for axes in shown.axes for line in axes.lines}
        assert sum(name.startswith("loss_c") for name in lines) > 0
        for name in (name for name in lines if name.startswith("loss")):
            points = [(row["step"], row[name]) for row in log(tmp_path / out) if name in row]
            assert [tuple(xy) for xy in lines[name].get_xydata()] == points and len(points) > 0
    scores = [[row["psnr"] for row in line["table"]] for line in log(tmp_path / "a", "eval")]
    lines = {line.get_label(): line.get_ydata() for line in figures[1].axes[2].lines}
    assert [list(lines[f"psnr_c{k}"]) for k in (2, 4, 8)] == [list(column) for column in zip(*scores)]
    train_ae.draw_curves(tmp_path)                                # no logs: no picture
    assert not (tmp_path / "curves.png").exists()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)         # not installed: no picture
    stage1(f"{AE} --eval_every 2 --eval_num 2 --steps 2 --out {tmp_path}/b")
    assert not (tmp_path / "b" / "curves.png").exists() and (tmp_path / "b" / "recon_0000002.png").exists()


def test_wandb_gets_the_lines_of_the_log_and_the_pictures(tmp_path, toy_cache, monkeypatch):
    sent, begun = [], []

    class Wandb:
        Image = staticmethod(lambda path: ("image", Path(path).name, os.path.exists(path)))

        def init(**about):
            begun.append(about)
            return Wandb

        def log(line, step):
            sent.append((step, line))
    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    stage1(f"{AE} --log_every 2 --eval_every 4 --eval_num 2 --steps 4 --wandb mine --out {tmp_path}/a")
    assert begun[0]["project"] == "mine" and begun[0]["config"]["steps"] == 4 and begun[0]["name"] == "a"
    assert [(line["step"], line) for line in log(tmp_path / "a")] == sent[:3]
    assert sent[3:] == [(4, {"pictures": ("image", "recon_0000004.png", True)})]
    stage2(f"{DIT} {toy_cache} --model SiT-T --eval_every 1 --steps 1 --wandb mine --out {tmp_path}/d")
    assert sent[-1] == (1, {"pictures": ("image", "samples_0000001.png", True)})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="--wandb: .*pip install wandb"):
        stage1(f"{AE} --steps 4 --wandb mine --out {tmp_path}/new")
    assert not (tmp_path / "new").exists()


def test_training_and_evaluation_never_show_the_same_toy_picture(tmp_path, wild_ae):
    """And on folders training crops at random, anew in each epoch."""
    trained, shown = [], []
    with after_forward(ae_file.Encoder, lambda img, _: (trained if torch.is_grad_enabled() else shown).append(img)):
        stage1(f"{AE} --eval_every 1 --eval_num 8 --steps 1 --out {tmp_path}/a")
        assert torch.equal(shown[1][:4].contiguous(), toy_pictures(range(4), train=False))  # [0]: before saving
        order = np.random.default_rng((0, 0)).permutation(1_000_000)[:4]
        assert torch.equal(trained[0].contiguous(), toy_pictures(order, train=True))
        shown.clear()
        shutil.copytree(wild_ae, tmp_path / "b")
        results = stage1(f"--eval_only --out {tmp_path}/b --eval_channels 8")      # --out holds the run
        assert results[16][0]["n"] == 2048 and torch.equal(shown[0].contiguous(), toy_pictures(range(16), train=False))
        write_pictures(tmp_path / "one", 5, height=16, classes=("x",))
        trained.clear()
        flags = f"{AE} --data {tmp_path}/one --lpips 0 --batch_size 1"
        stage1(f"{flags} --steps 3 --out {tmp_path}/c")
        stage1(f"{flags} --steps 1 --seed 1 --out {tmp_path}/d")
    assert len({tuple(img.flatten().tolist()) for img in trained}) == 4


def test_weights_that_cannot_be_had(tmp_path, toy_ae, monkeypatch, capsys):
    """The loss is never changed silently; an evaluation says what it leaves out."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)  # given back after the test
    no_network()
    with pytest.raises(InputError) as e:
        LPIPS("vgg")
    assert all(w in str(e.value.code) for w in ("vgg16-397923af.pth", "https://download.pytorch.org", "--lpips 0"))
    row, = stage1(f"--eval_only --init {toy_ae} --eval_num 2 --eval_channels 8 --out {tmp_path}/e")[16]
    assert set(row) == {"c_prime", "psnr", "psnr_n", "ssim", "n"}
    text = capsys.readouterr().out
    assert "lpips left out" in text and "alexnet-owt-7be5be79.pth" in text and "rfid left out" in text


# ----------------------------------------------------------------------------------------------------------------------
# Cost, speed, compiling


def test_dry_run_equals_the_papers_tables_and_arithmetic(toy_ae, capsys):
    line = stage1("--c 128 --f 64 --dry_run")
    assert line["parameters"] == 714741644 == line["trainable"]   # facts/ae_models.json
    assert line["forward_gmacs"] == 715.867
    # 6 x MACs: forward, backward twice that; 200,000 steps of 128 images on 8 GPUs at 300 TFLOP/s
    assert line["days"] == pytest.approx(6 * 715.867e9 * 128 * 200_000 / (8 * 300e12) / 86400, rel=1e-3)
    flags = "--model USiT-H --c 128 --size 8 --dry_run --batch_size 1024"
    line = stage2(flags)
    assert line["parameters"] == 500868992 and line["forward_gmacs"] == 33.2436      # facts/diffusion_models.json
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == line
    # a published name says f and c, without its weights: f64 c128, at 512 px
    line = stage2("--ae dc-ai/dc-ae-f64c128-1.5 --dry_run --gpus 16 --tflops 450 --steps 100000")
    days = 6 * 33.2436e9 * 2048 * 100_000 / (16 * 450e12) / 86400
    assert line["forward_gmacs"] == 33.2436 and line["days"] == pytest.approx(days, rel=5e-3)
    large = stage2("--model SiT-S --ae dc-ai/dc-ae-f64c128-1.5 --image_size 1024 --dry_run")
    assert large["forward_gmacs"] == stage2("--model SiT-S --c 128 --size 16 --dry_run")["forward_gmacs"]
    ours = stage2(f"--ae {toy_ae} --model SiT-T --dry_run")
    assert ours["forward_gmacs"] == stage2("--model SiT-T --c 8 --size 4 --dry_run")["forward_gmacs"]
    stage1(f"{TINY} --dry_run")
    assert "trains encoder.project_out.weight (8, 32, 3, 3)" in capsys.readouterr().out


def test_dry_run_memory_is_weights_gradients_moments_average_and_activations():
    gib = 2**30
    flags = "--model USiT-H --depth 2 --hidden 2048 --heads 16 --c 128 --size 8"      # few layers, wide ones
    memory = lambda more: stage2(f"{flags} --dtype fp32 --gpus 1 {more} --dry_run")["memory_gib_per_rank"]
    P = stage2(f"{flags} --dry_run")["parameters"]
    half, full = memory("--batch_size 100"), memory("--batch_size 200")
    images = 2 * (full - half)                                    # activations of 200 images
    state = full - images
    assert images > 1 and state == pytest.approx(5 * 4 * P / gib, abs=0.005)      # weights, gradients, moments, average
    assert memory("--batch_size 800 --accumulate 4") == pytest.approx(full, abs=0.002)
    assert memory("--batch_size 800 --gpus 4") == pytest.approx(full, abs=0.002)
    assert memory("--batch_size 800 --gpus 4 --fsdp") == pytest.approx(images + state / 4, abs=0.005)
    bf16 = state + images / 2 + 2 * P / gib                       # and bf16 copies of the weights
    assert memory("--batch_size 200 --dtype bf16") == pytest.approx(bf16, abs=0.005)
    assert memory("--batch_size 200 --checkpointing") < state + images / 2
    one = "--gpus 1 --dtype fp32 --dry_run"
    line = stage1(f"--c 128 --f 64 --depths 0,1,1,1,1,1,1 --image_size 64 --batch_size 1 {one}")
    weights = 4 * 4 * line["parameters"] / gib                    # no average; activations of one small image
    assert line["memory_gib_per_rank"] == pytest.approx(weights, rel=0.02)
    # --bench, one CPU core: peak less an idle process
    line = stage2(f"--model DiT-B --c 128 --size 8 --batch_size 8 {one}")
    assert line["memory_gib_per_rank"] == pytest.approx(3.518 - 0.693, rel=0.15)
    line = stage1(f"--f 32 --c 32 --width 32 --image_size 64 --batch_size 16 {one}")
    assert line["memory_gib_per_rank"] == pytest.approx(1.717 - 0.689, rel=0.15)


def test_dry_run_lists_what_a_phase_trains(toy_ae, capsys):
    line = stage1(f"--phase 2 --init {toy_ae} --dry_run")
    names = re.findall(r"trains (\S+)", capsys.readouterr().out)
    ends = ("encoder.project_out", "decoder.project_in")
    assert names == [f"{end}.{part}" for end in ends for part in ("weight", "bias")]
    assert line["trainable"] == 32 * 8 * 9 + 8 + 8 * 32 * 9 + 32 < line["parameters"]


@cpu_only
def test_bench_times_the_training_step(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = "--model USiT-T --c 8 --size 4 --channels 4,8 --batch_size 4"
    seen = spy_on_losses(monkeypatch)
    line = stage2(f"{flags} --bench --accumulate 2")
    assert [z.shape for z, *_ in seen] == [(2, 8, 4, 4)] * 2 * 4  # one step to warm up, three timed
    assert line["latent"] == [8, 4, 4]
    small = stage1(f"{AE} --bench")
    for bench, dry in ((line, stage2(f"{flags} --dry_run")), (small, stage1(f"{AE} --dry_run"))):
        assert bench["img_per_s"] == pytest.approx(4 / bench["step_ms"] * 1e3, rel=1e-3) and bench["step_ms"] > 0
        tflops = 6 * dry["forward_gmacs"] * 1e9 * 4 / (bench["step_ms"] * 1e-3) / 1e12
        assert bench["tflops"] == pytest.approx(tflops, abs=1e-3)
        about = dict(batch_size=4, ranks=1, dtype="fp32", compile=False, device="cpu")
        assert {name: bench[name] for name in about} == about
        assert bench["model"] == dry["model"] and bench["share_of_peak"] is None and bench["torch"] == torch.__version__
        assert 0.1 < bench["peak_gib"] < 32 and {"python", "commit"} < bench.keys()
    printed = [text for text in capsys.readouterr().out.splitlines() if '"img_per_s"' in text]
    assert json.loads(printed[-1]) == small
    assert not list(tmp_path.iterdir())                           # and leaves no files


def test_batchnorm_of_one_process_stays_in_the_compiled_graph():
    ae = DCAE(small_config("1.0"))
    select_trainable(ae, 1, "phase")
    ae.forward = lambda img: ae.decode(ae.encode(img) * channel_mask(8, 4))
    whole = torch.compile(ae, backend="eager", fullgraph=True)    # raises at a graph break
    whole(torch.randn(2, 3, 16, 16)).mean().backward()
    assert {m.num_batches_tracked.item() for m in ae.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1}


def test_compiled_equals_eager(tmp_path, toy_cache, monkeypatch):
    """The denoiser by TorchInductor; the autoencoder as captured and differentiated, which takes half a minute less."""
    for name, extra in (("c", ""), ("d", "--compile")):
        stage2(f"{DIT} {toy_cache} --depth 1 --model SiT-T --steps 2 --out {tmp_path}/{name} {extra}")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for name, extra in (("c", ""), ("d", "--compile")):
        stage1(f"{AE} --steps 2 --out {tmp_path}/ae_{name} {extra}")
    for prefix in ("", "ae_"):
        eager, compiled = (tmp_path / f"{prefix}{name}" for name in "cd")
        for a, b in zip(log(eager), log(compiled), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert distance(ckpt(eager), ckpt(compiled)) < 1e-4
        assert not any("_orig_mod" in name for name in ckpt(compiled)["model"])
