"""Both trainers: resume, ranks, phases, losses, flags.    python -m pytest tests/test_train.py"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_ae
import train_diffusion
from ae import DCAE, AEConfig, InputError, channel_mask
from train_ae import LPIPS, Guard, PatchGAN, Ranks, Stream, adamw, draw_channels, learning_rate, rank_samples, select_trainable

ROOT = Path(__file__).resolve().parent.parent
AE = ["--f", "4", "--c", "8", "--widths", "16,16,32", "--depths", "0,1,1", "--image_size", "16", "--channels", "2,4,8", "--batch_size", "4",
      "--lr", "1e-3", "--warmup", "2", "--eval_every", "0", "--save_every", "3"]
AE_1_0 = ["--version", "1.0", "--f", "8", "--c", "8", "--widths", "16,16,32,32", "--depths", "0,1,1,1", "--image_size", "16",
          "--channels", "2,4,8", "--batch_size", "4", "--lr", "1e-3", "--warmup", "2", "--eval_every", "0", "--save_every", "3"]
DIT = ["--depth", "2", "--hidden", "48", "--heads", "2", "--max_images", "64", "--channels", "2,4,8", "--batch_size", "12", "--lr", "1e-3",
       "--warmup", "2", "--eval_every", "0", "--save_every", "3"]


def command(script, *flags, ranks=1, wait=True, **env):
    line = [sys.executable] + ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] * (ranks > 1)
    p = subprocess.Popen([*line, str(ROOT / script), *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         env={**os.environ, **env}, cwd=env.get("cwd", ROOT),
                         start_new_session=True)
    if not wait:
        return p
    out, err = p.communicate(timeout=300)
    return p.returncode, out, err


def run(script, *flags, **kw):
    code, out, err = command(script, *flags, **kw)
    assert code == 0, err[-3000:]
    return out


def ckpt(folder):
    return torch.load(f"{folder}/ckpt.pt", weights_only=True)


def flat(state):
    """All tensors of a checkpoint, by path."""
    if isinstance(state, torch.Tensor):
        return {"": state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {f"{k}.{name}": t for k, v in items for name, t in flat(v).items()}


def assert_same_bits(a, b):
    a, b = flat(ckpt(a)), flat(ckpt(b))
    assert a.keys() == b.keys() and len(a) > 20
    for name in a:
        assert torch.equal(a[name], b[name]), name


def distance(a, b, part="model"):
    a, b = flat(ckpt(a)[part]), flat(ckpt(b)[part])
    assert a.keys() == b.keys()
    return (sum(((a[k] - b[k]).double() ** 2).sum() for k in a) / sum((a[k].double() ** 2).sum() for k in a)) ** 0.5


def log(folder):
    return [json.loads(line) for line in open(f"{folder}/log.jsonl")]


@pytest.fixture(scope="module")
def toy_ae(tmp_path_factory):
    out = tmp_path_factory.mktemp("ae")
    train_ae.main([*AE, "--steps", "6", "--out", str(out)])
    return out


# --- facts -------------------------------------------------------------------------------------------------------------

def test_learning_rate_is_the_official_warm_up():
    # facts/golden.json misc: ConstantLRwithWarmup, base 2e-4, warmup_lr 6.4e-6, 5000 steps
    for step, lr in ((0, 6.43872e-06), (1, 6.47744e-06), (2499, 1.0320e-4), (4998, 1.9996128e-4), (4999, 2e-4), (5001, 2e-4)):
        class args: lr, warmup, cooldown, steps = 2e-4, 5000, 0, 500_000
        assert learning_rate(step, args, 6.4e-6) == pytest.approx(lr, rel=1e-9)
    args.cooldown = 1000
    assert [learning_rate(s, args) for s in (498_999, 499_500, 499_999)] == pytest.approx([2e-4, 1e-4, 2e-7])


def test_ema_is_the_official_decay():
    # facts/golden.json misc: 0.9999 (1 - exp(-step / 2000))
    for step, decay in ((1, 0.000499825033328626), (100, 0.048765698441736054), (2000, 0.6320573467726748), (100000, 0.9999)):
        ema, net = torch.nn.Linear(1, 1, bias=False).double(), torch.nn.Linear(1, 1, bias=False).double()
        ema.weight.data.fill_(1), net.weight.data.fill_(0)
        train_diffusion.ema_update(ema, net, 0.9999, 2000, step, torch.tensor(1.0, dtype=torch.float64))
        assert ema.weight.item() == pytest.approx(decay, rel=1e-9)


def test_channel_draw():
    channels = list(range(16, 129, 4))
    draws = [draw_channels(channels, 0, s) for s in range(5000)]
    assert set(draws) == set(channels) and abs(np.mean(draws) - 72) < 2
    assert draws[:20] == [draw_channels(channels, 0, s) for s in range(20)] != [draw_channels(channels, 1, s) for s in range(20)]


def test_any_number_of_ranks_sees_the_same_samples():
    class A: batch_size, accumulate = 12, 1
    one = rank_samples(5, A, Ranks(0, 1))[0]
    assert one == list(range(60, 72))
    for size in (2, 3, 4):
        assert sum((rank_samples(5, A, Ranks(r, size))[0] for r in range(size)), []) == one
    A.accumulate = 2
    assert sum((m for r in range(3) for m in rank_samples(5, A, Ranks(r, 3))), []) == one


def test_stream_is_a_permutation_per_epoch():
    class Data:
        def __len__(self): return 10
        def get_batch(self, indices, keys): return indices, keys
    s = Stream(Data(), 0)
    first, second = s.__getitems__(range(10))[0], s.__getitems__(range(10, 20))[0]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert Stream(Data(), 0).__getitems__(range(8, 13))[0] == first[8:] + second[:3]


def test_eq_1_is_the_loss_of_a_masked_latent():
    torch.manual_seed(0)
    ae = DCAE(AEConfig(f=4, c=8, encoder_widths=(16, 16, 32), decoder_widths=(16, 16, 32), encoder_depths=(0, 1, 1), decoder_depths=(0, 1, 1)))
    img = torch.randn(2, 3, 16, 16)
    rec, z2 = train_ae.AutoencoderStep(ae)(img, channel_mask(8, 4))
    z = ae.encode(img)
    assert torch.equal(rec, ae.decode(torch.cat([z[:, :4], torch.zeros_like(z[:, 4:])], 1))) and torch.allclose(z2, (z**2).mean())
    rec.abs().mean().backward()
    assert ae.encoder.project_out.weight.grad[4:].abs().max() == 0 < ae.encoder.project_out.weight.grad[:4].abs().min()


# --- guard -------------------------------------------------------------------------------------------------------------

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


def test_ten_bad_steps_stop_the_run(tmp_path):
    code, out, err = command("train_ae.py", *AE, "--steps", "30", "--lr", "1e30", "--clip", "0", "--out", tmp_path)
    assert code != 0 and "Traceback" not in err and "last good checkpoint" in err and "--lr" in err
    assert all(t.isfinite().all() for t in flat(ckpt(tmp_path)["model"]).values())          # saved while every step was skipped
    assert "NaN" not in open(tmp_path / "log.jsonl").read()


# --- resume, kill, ranks -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [AE, AE_1_0, [*AE, "--image_size", "32", "--gan", "0.1", "--disc_warmup", "2", "--accumulate", "2"]], ids=["1.5", "1.0", "gan"])
def test_autoencoder_resumes_bit_for_bit(tmp_path, flags):
    train_ae.main([*flags, "--steps", "6", "--out", str(tmp_path / "a")])
    train_ae.main([*flags, "--steps", "3", "--out", str(tmp_path / "b")])
    train_ae.main([*flags, "--steps", "6", "--out", str(tmp_path / "b")])
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    assert not torch.equal(*(next(iter(flat(torch.load(tmp_path / "b" / f"{n}.pt", weights_only=True)["model"]).values())) for n in ("ckpt", "ckpt_prev")))


@pytest.mark.parametrize("flags", [["--phase", "2", "--image_size", "32"], ["--phase", "3", "--image_size", "32", "--disc_warmup", "1"], ["--train", "decoder"]], ids=" ".join)
def test_later_phases_resume_bit_for_bit(tmp_path, toy_ae, flags):
    flags = [*AE[AE.index("--image_size"):], *flags, "--init", str(toy_ae)]                # what the network is, --init says
    train_ae.main([*flags, "--steps", "4", "--out", str(tmp_path / "a")])
    train_ae.main([*flags, "--steps", "2", "--out", str(tmp_path / "b")])
    train_ae.main([*flags, "--steps", "4", "--out", str(tmp_path / "b")])
    assert_same_bits(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("model", ["USiT-T", "DiT-T"])
def test_diffusion_resumes_bit_for_bit(tmp_path, toy_ae, model):
    flags = [*DIT, "--ae", str(toy_ae), "--cache", str(tmp_path / "cache"), "--model", model]
    train_diffusion.main([*flags, "--steps", "6", "--out", str(tmp_path / "a")])
    train_diffusion.main([*flags, "--steps", "3", "--out", str(tmp_path / "b")])
    train_diffusion.main([*flags, "--steps", "6", "--out", str(tmp_path / "b")])
    assert_same_bits(tmp_path / "a", tmp_path / "b")


def test_kill_9_and_sigterm(tmp_path):
    flags = [*AE, "--steps", "1000", "--save_every", "5", "--workers", "2"]
    p = command("train_ae.py", *flags, "--out", tmp_path / "a", wait=False)
    while not (tmp_path / "a" / "ckpt_prev.pt").exists() and p.poll() is None:
        time.sleep(0.05)
    p.kill()
    p.communicate()
    step = ckpt(tmp_path / "a")["step"]
    p = command("train_ae.py", *flags, "--out", tmp_path / "a", wait=False)
    while ckpt(tmp_path / "a")["step"] == step and p.poll() is None:
        time.sleep(0.05)
    os.killpg(p.pid, signal.SIGTERM)                              # as torchrun and Slurm do: loader workers get it too
    out, err = p.communicate(timeout=60)
    assert p.returncode == 0 and "stopped by a signal" in out + err, err[-2000:]
    done = ckpt(tmp_path / "a")["step"]
    run("train_ae.py", *AE, "--steps", done, "--save_every", "5", "--out", tmp_path / "b")
    assert_same_bits(tmp_path / "a", tmp_path / "b")


def test_a_crash_does_not_hang_on_its_workers(tmp_path):
    code = "import train_ae\ndef bad(*a, **k): raise RuntimeError('bug')\ntrain_ae.Run.log = bad\ntrain_ae.main()"
    p = subprocess.run([sys.executable, "-c", code, *AE, "--steps", "50", "--workers", "2", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert p.returncode != 0 and "bug" in p.stderr


GAN = [*AE, "--image_size", "32", "--gan", "0.1", "--disc_warmup", "1"]


@pytest.mark.parametrize("flags, accumulate", [(AE, 2), (AE_1_0, 1), (GAN, 1)], ids=["1.5 accumulated", "1.0", "gan"])
def test_two_ranks_equal_one_autoencoder(tmp_path, flags, accumulate):
    train_ae.main([*flags, "--steps", "4", "--out", str(tmp_path / "one")])
    run("train_ae.py", *flags, "--steps", 4, "--accumulate", accumulate, "--out", tmp_path / "two", ranks=2)
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    for key in ("loss", "grad_norm"):
        assert one[0][key] == pytest.approx(two[0][key], rel=2e-6)
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-4
    assert ckpt(tmp_path / "one")["scale"] == pytest.approx(ckpt(tmp_path / "two")["scale"], rel=1e-5)


@pytest.mark.parametrize("flags, accumulate", [(AE, 2), (AE_1_0, 1)], ids=["1.5 accumulated", "1.0"])
def test_autoencoder_fsdp_equals_one_and_goes_on_without(tmp_path, flags, accumulate):
    train_ae.main([*flags, "--steps", "4", "--out", str(tmp_path / "one")])
    run("train_ae.py", *flags, "--fsdp", "--accumulate", accumulate, "--steps", 2, "--eval_every", 2, "--eval_num", 5, "--out", tmp_path / "two", ranks=2)
    train_ae.main([*flags, "--steps", "4", "--out", str(tmp_path / "two")])
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    for key in ("loss", "grad_norm"):
        assert one[0][key] == pytest.approx(two[0][key], rel=2e-6)
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-4


def test_sigterm_stops_two_ranks_together(tmp_path):
    p = command("train_ae.py", *AE, "--steps", "100000", "--log_every", "10", "--save_every", "100000", "--out", tmp_path, ranks=2, wait=False)
    while not (tmp_path / "log.jsonl").exists() and p.poll() is None:
        time.sleep(0.05)
    os.killpg(p.pid, signal.SIGTERM)
    out, err = p.communicate(timeout=60)
    assert "stopped by a signal" in out + err and ckpt(tmp_path)["step"] % 10 == 0, err[-2000:]


def test_two_ranks_and_accumulation_equal_one_diffusion(tmp_path, toy_ae):
    flags = [*DIT, "--ae", str(toy_ae), "--cache", str(tmp_path / "cache"), "--model", "USiT-T", "--steps", "4"]
    train_diffusion.main([*flags, "--out", str(tmp_path / "one")])
    run("train_diffusion.py", *flags, "--out", tmp_path / "two", "--accumulate", "2", ranks=2)
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    for a, b in zip(one, two):
        assert a["c_prime"] == b["c_prime"] and a["loss"] == pytest.approx(b["loss"], rel=2e-6)
    assert one[0]["grad_norm"] == pytest.approx(two[0]["grad_norm"], rel=2e-6)
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-4 and distance(tmp_path / "one", tmp_path / "two", "ema") < 1e-4


def test_fsdp_equals_one_and_resumes_on_other_ranks(tmp_path, toy_ae):
    flags = [*DIT, "--ae", str(toy_ae), "--cache", str(tmp_path / "cache"), "--model", "USiT-T"]
    train_diffusion.main([*flags, "--steps", "6", "--out", str(tmp_path / "one")])
    run("train_diffusion.py", *flags, "--fsdp", "--steps", 3, "--out", tmp_path / "two", ranks=2)
    run("train_diffusion.py", *flags, "--fsdp", "--checkpointing", "--steps", 6, "--out", tmp_path / "two", ranks=3)
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    for a, b in zip(one, two):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert one[0]["grad_norm"] == pytest.approx(two[0]["grad_norm"], rel=2e-6) and one[0]["loss"] == pytest.approx(two[0]["loss"], rel=2e-6)
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-4 and distance(tmp_path / "one", tmp_path / "two", "ema") < 1e-4
    import diffusion
    assert diffusion.from_pretrained(tmp_path / "two").info["step"] == 6                  # one file of whole weights
    code, _, err = command("train_diffusion.py", *flags, "--steps", 9, "--out", tmp_path / "two")
    assert code != 0 and "--fsdp" in err and "Traceback" not in err


def test_hybrid_sharding_over_two_nodes_equals_one(tmp_path, toy_ae):
    flags = [*DIT, "--ae", str(toy_ae), "--cache", str(tmp_path / "cache"), "--model", "USiT-T", "--steps", "3"]
    train_diffusion.main([*flags, "--out", str(tmp_path / "one")])
    nodes = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2", "--node_rank", str(k), "--master_port", "29617",
                               str(ROOT / "train_diffusion.py"), *flags, "--fsdp", "--out", str(tmp_path / "two")], stderr=subprocess.DEVNULL) for k in (0, 1)]
    assert [node.wait(timeout=200) for node in nodes] == [0, 0]
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-4 and log(tmp_path / "one")[0]["loss"] == pytest.approx(log(tmp_path / "two")[0]["loss"], rel=2e-6)


def test_two_ranks_resume_on_one_and_three(tmp_path, toy_ae):
    flags = [*DIT, "--ae", str(toy_ae), "--cache", str(tmp_path / "cache"), "--model", "SiT-T", "--out", str(tmp_path / "run")]
    run("train_diffusion.py", *flags, "--steps", 2, ranks=2)
    train_diffusion.main([*flags, "--steps", "4"])
    run("train_diffusion.py", *flags, "--steps", 6, ranks=3)
    train_diffusion.main([*flags[:-1], str(tmp_path / "one"), "--steps", "6"])
    assert distance(tmp_path / "one", tmp_path / "run") < 1e-4


# --- latent cache ------------------------------------------------------------------------------------------------------

def test_cache_is_scaled_resumable_and_guarded(tmp_path, toy_ae):
    flags = [*DIT, "--ae", str(toy_ae), "--cache", str(tmp_path / "cache"), "--model", "USiT-T", "--steps", "1"]
    train_diffusion.main([*flags, "--out", str(tmp_path / "a")])
    latents = np.load(tmp_path / "cache" / "latents.npy")
    scale = ckpt(tmp_path / "a")["scale"]
    assert latents.shape == (2, 64, 8, 4, 4) and latents.dtype == np.float16
    from ae import open_images
    ae, data = DCAE.from_pretrained(toy_ae), open_images("toy", 16, train=True)
    img = data.get_batch([5], [5])[0]
    with torch.no_grad():
        for k, x in enumerate((img, img.flip(3))):
            assert np.abs(latents[k, 5] - ae.encode(x)[0].numpy()).max() < 2e-3 * np.abs(latents).max()
    done = np.load(tmp_path / "cache" / "done.npy")
    latents[:], done[:] = 7, 0
    np.save(tmp_path / "cache" / "latents.npy", latents), np.save(tmp_path / "cache" / "done.npy", done)
    train_diffusion.main([*flags, "--out", str(tmp_path / "b")])          # unfinished chunks are made again
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    with pytest.raises(InputError, match="--cache"):
        train_diffusion.main([*flags, "--max_images", "32", "--out", str(tmp_path / "c")])
    assert scale == pytest.approx(DCAE.from_pretrained(toy_ae).scale)


def test_scale_makes_rms_one(tmp_path):
    train_ae.main([*AE, "--steps", "150", "--lr", "0", "--out", str(tmp_path)])          # an encoder that stays where it is
    ae = DCAE.from_pretrained(tmp_path)
    from ae import open_images
    with torch.no_grad():
        z = ae.encode(open_images("toy", 16, train=False).get_batch(list(range(512)), list(range(512)))[0])
    assert float((z * ae.scale).square().mean().sqrt()) == pytest.approx(1, abs=0.03)


# --- phases and losses -------------------------------------------------------------------------------------------------

def test_trainable_tensors_by_phase():
    ae = DCAE(AEConfig(f=8, c=8, version="1.0", encoder_widths=(16, 16, 32, 32), decoder_widths=(16, 16, 32, 32),
                       encoder_depths=(0, 1, 1, 1), decoder_depths=(0, 1, 1, 1)))
    assert len(select_trainable(ae, 1, "phase")) == len(list(ae.parameters()))
    heads = {n.split(".")[1] for n in select_trainable(ae, 2, "phase")}, {n.split(".")[1] for n in select_trainable(ae, 3, "phase")}
    assert heads == ({"project_out", "project_in"}, {"project_out"})
    assert all(n.startswith("decoder.project_out") for n in select_trainable(ae, 3, "phase"))
    assert not any(m.training for m in ae.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert all(n.startswith("decoder.") for n in select_trainable(ae, 1, "decoder"))
    assert all(m.training for m in ae.modules() if isinstance(m, torch.nn.BatchNorm2d))


@pytest.mark.parametrize("flags", [["--phase", "2", "--image_size", "32"], ["--phase", "3", "--disc_warmup", "1", "--image_size", "32"], ["--train", "decoder", "--channels", "4"]],
                         ids=["phase 2", "phase 3", "decoder"])
def test_frozen_parts_keep_their_bits(tmp_path, flags):
    train_ae.main([*AE_1_0, "--steps", "3", "--out", str(tmp_path / "init")])
    common = [*AE_1_0, "--batch_size", "2", "--lr", "1e-2"]
    for name in ("--version", "--f", "--c", "--widths", "--depths"):
        i = common.index(name)
        del common[i:i + 2]
    train_ae.main([*common, *flags, "--init", str(tmp_path / "init"), "--steps", "3", "--out", str(tmp_path / "next")])
    a, b = ckpt(tmp_path / "init"), ckpt(tmp_path / "next")
    moves = {"2": ("encoder.project_out", "decoder.project_in"), "3": ("decoder.project_out",)}.get(flags[1], ("decoder.",))
    for name in a["model"]:
        same = torch.equal(a["model"][name], b["model"][name])
        assert same == (not name.startswith(moves)), name
    assert (a["scale"] == pytest.approx(b["scale"], rel=1e-6)) == (flags[1] != "2")
    if flags[1] == "3":
        train_ae.main([*common, *flags, "--init", str(tmp_path / "init"), "--steps", "4", "--out", str(tmp_path / "next")])
        assert not any(torch.equal(x, ckpt(tmp_path / "next")["disc"][k]) for k, x in b["disc"].items())       # the discriminator moves
        assert all(k in log(tmp_path / "next")[-1] for k in ("logits_real", "logits_fake", "d", "g", "gan_weight"))


def test_gan_warm_up_and_players_do_not_leak(tmp_path):
    flags = [*AE, "--image_size", "32", "--steps", "2"]
    for name, extra in (("plain", []), ("warming", ["--gan", "0.5"]), ("on", ["--gan", "0.5", "--disc_warmup", "0"])):
        train_ae.main([*flags, *extra, "--out", str(tmp_path / name)])
    plain, warming, on = (ckpt(tmp_path / name) for name in ("plain", "warming", "on"))
    same = lambda a, b: all(torch.equal(a[k], b[k]) for k in a)
    assert same(plain["model"], warming["model"]) and not same(plain["model"], on["model"])     # no say during its warm-up
    first = log(tmp_path / "warming")[0], log(tmp_path / "on")[0]
    assert first[0]["d"] == first[1]["d"]                       # the discriminator's own first step knows nothing of the weight
    for weight in ("0.5", "50"):                                # nor do its later ones: --clip moves the autoencoder not at all
        train_ae.main([*flags, "--gan", weight, "--disc_warmup", "0", "--clip", "1e-12", "--lr", "1e-3", "--steps", "1", "--out", str(tmp_path / weight)])
    assert same(ckpt(tmp_path / "0.5")["disc"], ckpt(tmp_path / "50")["disc"])


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
    assert not any(p.requires_grad for p in ours.parameters())
    exact = ours(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(a, b), exact) and torch.equal(ours(a.bfloat16().float(), b), ours(a.bfloat16(), b))


def test_phase_3_reports_before_and_after(tmp_path, toy_ae, capsys):
    train_ae.main(["--phase", "3", "--init", str(toy_ae), "--image_size", "32", "--batch_size", "2", "--steps", "2", "--eval_num", "4",
                   "--channels", "4,8", "--out", str(tmp_path)])
    assert "before -> after" in capsys.readouterr().out
    assert len(list(tmp_path.glob("recon_*.png"))) == 2


# --- evaluation and commands -------------------------------------------------------------------------------------------

def exported_features(path):
    """A tiny feature network for --features: colour moments."""
    class Features(torch.nn.Module):
        def forward(self, img):                                  # uint8 (B,H,W,3) -> (B,6)
            img = img.float() / 255
            return torch.cat([img.mean((1, 2)), img.square().mean((1, 2))], 1)
    size = {0: torch.export.Dim("b", min=1), 1: torch.export.Dim("h"), 2: torch.export.Dim("w")}
    torch.export.save(torch.export.export(Features(), (torch.zeros(2, 16, 16, 3, dtype=torch.uint8),), dynamic_shapes=(size,)), path)
    return str(path)


def test_periodic_score_of_samples(tmp_path, toy_ae):
    train_diffusion.main([*DIT, "--eval_every", "2", "--steps", "2", "--ae", str(toy_ae), "--cache", str(tmp_path / "c"), "--model", "SiT-T",
                          "--fid", "toy", "--fid_num", "60", "--features", exported_features(tmp_path / "f.pt2"), "--out", str(tmp_path / "d")])
    line = json.loads(open(tmp_path / "d" / "fid.jsonl").readline())
    assert line["step"] == 2 and line["n"] == 60 and line["fid"] > 0 and (tmp_path / "d" / "samples_0000002.png").exists()


def test_autoencoder_kl_of_diffusers_stands_in(tmp_path):
    """The paper's Table 4 baselines: an f8 autoencoder, patch 2."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    kl = diffusers.AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4, scaling_factor=0.18215,
                                 down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    kl.save_pretrained(tmp_path / "kl")
    train_diffusion.main(["--ae", str(tmp_path / "kl"), "--model", "DiT-T", "--depth", "1", "--patch", "2", "--image_size", "32", "--max_images", "16", "--no-augment",
                          "--batch_size", "4", "--steps", "2", "--eval_every", "0", "--cache", str(tmp_path / "c"), "--out", str(tmp_path / "d")])
    c = ckpt(tmp_path / "d")
    assert c["scale"] == 0.18215 and c["config"]["patch"] == 2 and c["config"]["c"] == 4 and c["config"]["size"] == 4
    import sample
    sample.main(["--ckpt", str(tmp_path / "d"), "--n", "2", "--steps", "2", "--solver", "ddpm", "--out", str(tmp_path / "s")])
    with np.load(tmp_path / "s" / "samples.npz") as f:
        assert f["arr_0"].shape == (2, 32, 32, 3)


def test_eval_only_gives_a_row_per_c_prime(tmp_path, toy_ae):
    results = train_ae.main(["--eval_only", "--init", str(toy_ae), "--image_size", "16", "32", "--channels", "2,4,8", "--eval_num", "300",
                             "--batch_size", "100", "--features", exported_features(tmp_path / "f.pt2"), "--out", str(tmp_path)])
    assert set(results) == {16, 32} and [r["c_prime"] for r in results[16]] == [2, 4, 8]
    assert all(0 < r["psnr"] < 60 and -1 < r["ssim"] < 1 and r["rfid"] > 0 and r["n"] == 300 for r in results[16])
    assert (tmp_path / "eval_16.png").exists() and json.load(open(tmp_path / "eval.json"))["results"]["32"][0]["psnr"] == results[32][0]["psnr"]


def test_real_images_end_to_end(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(8):
        folder = tmp_path / "data" / ["cat", "dog"][k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20 + k, 30, 3), dtype=np.uint8)).save(folder / f"{k}.jpg")
    train_ae.main([*AE, "--data", str(tmp_path / "data"), "--lpips", "0", "--steps", "2", "--out", str(tmp_path / "ae")])
    train_diffusion.main([*DIT, "--max_images", "8", "--ae", str(tmp_path / "ae"), "--data", str(tmp_path / "data"), "--model", "SiT-T", "--steps", "2",
                          "--out", str(tmp_path / "d")])
    assert ckpt(tmp_path / "d")["classes"] == ["cat", "dog"]


@pytest.mark.parametrize("script, flags, words", [
    ("train_ae.py", ["--f", "6"], ["f"]), ("train_ae.py", ["--c", "0"], ["c"]), ("train_ae.py", ["--image_size", "100"], ["--image_size", "32"]),
    ("train_ae.py", ["--channels", "8:400:4"], ["--channels"]), ("train_ae.py", ["--data", "nowhere"], ["--data"]),
    ("train_ae.py", ["--phase", "3"], ["--init"]), ("train_ae.py", ["--init", "nowhere"], ["nowhere"]), ("train_ae.py", ["--batch_size", "5", "--accumulate", "2"], ["--batch_size"]),
    ("train_ae.py", ["--seed", "-1"], ["--seed"]), ("train_ae.py", ["--betas", "0.9", "2"], ["--betas"]), ("train_ae.py", ["--eval_only"], ["--init"]), ("train_ae.py", ["--steps", "0"], ["--steps"]), ("train_ae.py", ["--gpu", "x"], ["--gpu"]),
    ("train_diffusion.py", [], ["--ae"]), ("train_diffusion.py", ["--ae", "nowhere"], ["nowhere"]), ("train_diffusion.py", ["--model", "DiT-Z"], ["--model"]),
], ids=str)
def test_bad_input_is_one_line(tmp_path, script, flags, words):
    main = {"train_ae.py": train_ae, "train_diffusion.py": train_diffusion}[script].main
    try:
        main([*flags, "--out", str(tmp_path)])
    except InputError as e:
        message = str(e.code if e.code is not None else e)
        assert len(message) < 200 and "\n" not in message and all(w in message for w in words), message
    except SystemExit as e:                                      # argparse's own
        assert e.code == 2
    else:
        pytest.fail("accepted")


def test_the_checkpoint_says_its_channels_and_size(tmp_path, toy_ae, capsys):
    train_ae.main(["--train", "decoder", "--init", str(toy_ae), "--dry_run"])
    assert "16 px" in capsys.readouterr().out
    train_ae.main([*AE, "--channels", "8", "--steps", "2", "--out", str(tmp_path / "plain")])
    train_ae.main(["--phase", "2", "--init", str(tmp_path / "plain"), "--dry_run"])
    assert "no masks" in capsys.readouterr().out.split("training")[-1]
    train_ae.main(["--toy", "--c", "16", "--dry_run"])
    assert "from 2 to 16 (4 values)" in capsys.readouterr().out


def test_other_bad_input(tmp_path, toy_ae):
    with pytest.raises(InputError, match="--out"):
        train_ae.main([*AE, "--c", "4", "--channels", "2,4", "--steps", "9", "--out", str(toy_ae)])
    with pytest.raises(InputError, match="kind"):
        train_diffusion.main([*DIT, "--ae", str(toy_ae), "--model", "USiT-T", "--cache", str(tmp_path / "c"), "--out", str(toy_ae)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        train_ae.main([*AE, "--data", str(tmp_path / "empty"), "--lpips", "0", "--out", str(tmp_path / "o")])


def test_missing_vgg_names_file_url_and_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(InputError) as e:
        LPIPS("vgg")
    assert all(w in str(e.value.code) for w in ("vgg16-397923af.pth", "https://download.pytorch.org", "--lpips 0"))


def test_dry_run_and_bench(capsys):
    line = train_ae.main(["--c", "128", "--f", "64", "--dry_run"])
    assert line["parameters"] == 714741644 and line["forward_gmacs"] == 715.867          # facts/ae_models.json
    line = train_diffusion.main(["--model", "USiT-H", "--c", "128", "--size", "8", "--dry_run"])
    assert line["parameters"] == 500868992 and line["forward_gmacs"] == 33.2436          # facts/diffusion_models.json
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == line
    line = train_diffusion.main(["--model", "DiT-B", "--c", "128", "--size", "8", "--dry_run", "--batch_size", "8", "--gpus", "1"])
    assert line["memory_gib_per_rank"] == pytest.approx(3.518 - 0.693, rel=0.15)     # --bench, one CPU core: peak less an idle process
    line = train_ae.main(["--f", "32", "--c", "32", "--width", "32", "--image_size", "64", "--batch_size", "16", "--dry_run", "--gpus", "1"])
    assert line["memory_gib_per_rank"] == pytest.approx(1.717 - 0.689, rel=0.15)
    line = train_diffusion.main(["--model", "USiT-T", "--c", "8", "--size", "4", "--bench", "--batch_size", "4", "--channels", "4,8"])
    assert line["img_per_s"] > 0 and line["step_ms"] > 0 and line["latent"] == [8, 4, 4]
    line = train_ae.main([*AE, "--bench"])
    assert line["img_per_s"] > 0 and {"tflops", "share_of_peak", "peak_gib", "torch"} <= line.keys()


def test_batchnorm_of_one_process_stays_in_the_compiled_graph():
    ae = DCAE(AEConfig(f=8, c=8, version="1.0", encoder_widths=(16, 16, 32, 32), decoder_widths=(16, 16, 32, 32),
                       encoder_depths=(0, 1, 1, 1), decoder_depths=(0, 1, 1, 1)))
    select_trainable(ae, 1, "phase")
    step = torch.compile(train_ae.AutoencoderStep(ae), backend="eager", fullgraph=True)                   # raises at a graph break
    step(torch.randn(2, 3, 16, 16), channel_mask(8, 4))[0].mean().backward()
    assert next(m for m in ae.modules() if isinstance(m, train_ae.SyncBatchNorm)).num_batches_tracked == 1


def test_compiled_equals_eager(tmp_path, toy_ae):
    for name, extra in (("c", []), ("d", ["--compile"])):
        train_diffusion.main([*DIT, "--ae", str(toy_ae), "--cache", str(tmp_path / "cache"), "--model", "USiT-T", "--steps", "2", "--out", str(tmp_path / name), *extra])
    for a, b in zip(log(tmp_path / "c"), log(tmp_path / "d")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert distance(tmp_path / "c", tmp_path / "d") < 1e-4
    train_ae.main([*AE, "--steps", "2", "--out", str(tmp_path / "a")])
    train_ae.main([*AE, "--steps", "2", "--compile", "--out", str(tmp_path / "b")])
    for a, b in zip(log(tmp_path / "a"), log(tmp_path / "b")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert not any("_orig_mod" in k for k in ckpt(tmp_path / "b")["model"])
