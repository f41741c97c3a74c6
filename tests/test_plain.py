"""What a training step is, in plain PyTorch: each trainer equals its loop below.

    python -m pytest tests/test_plain.py

Two loops of about forty lines, one for each trainer. Only the networks come from the code; everything else
(learning rate, c', mask, data order, noise, times, label drops, mirrors, losses, clipping, AdamW, averages)
is written out here from its formula. A test trains a tiny network for three steps twice, by the trainer's
main([...]) and by the plain loop. Weights, moments, average, discriminator and scale agree to 1e-6 (norm of
the difference over the norm, tensor by tensor), and the logged numbers to their six printed digits.

Both run in fp32 and sum in the same order. It has to be so: Adam's first step is lr * sign(gradient), so an
entry whose gradient is nothing but rounding error would step to either side. For the same reason the rates
are small and the seeds fixed: three steps can magnify the last bit of PyTorch's fused AdamW tenfold.

Shapes: B batch, c channels, h w latent side, H W pixels.
"""

import json
import math
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion
import train_ae
import train_diffusion
from ae import DCAE, AEConfig, open_images

# ------------------------------------------------------------------------------------------------------------
# Stage 1, the autoencoder: L1, the mask of Eq. 1, PatchGAN


def plain_autoencoder(ae, pictures, channels=(8,), bins=None, trains="", seed=0, steps=3, batch=4,
                      accumulate=1, lr=2e-3, betas=(0.9, 0.999), weight_decay=0.1, warmup=0, cooldown=0,
                      clip=1.0, gan=0.0, disc_warmup=0):
    params = {name: p for name, p in ae.named_parameters() if re.match(trains, name)}
    moments = zero_moments(params)
    if gan:
        disc = train_ae.PatchGAN()
        disc_params = dict(disc.named_parameters())
        disc_moments = zero_moments(disc_params)
    z_square, log = 1 / ae.scale**2, []
    ae.train()

    for step in range(steps):
        rate = learning_rate(step, steps, lr, warmup, cooldown, start=0.0)
        c_prime = draw_channels(channels, seed, step)                   # one for the whole batch
        mask = torch.tensor([float(k < c_prime) for k in range(ae.config.c)])
        mask = mask.view(1, -1, 1, 1)                                   # (1, c, 1, 1): c' ones, then zeros
        grads, disc_grads, line, step_z = {}, {}, {}, 0.0

        for samples in micro_batches(step, batch, accumulate):
            img = pictures(samples)                                     # (B, 3, H, W) in [-1, 1]
            z = ae.encode(img)                                          # (B, c, h, w)
            rec = ae.decode(z * mask)                                   # (B, 3, H, W), Eq. 1
            l1 = (rec - img).abs().mean()
            loss, terms = l1, {"l1": l1}
            if gan:
                g = -disc(rec).mean()                                   # the autoencoder wants high logits
                weight = gan if step >= disc_warmup else 0.0
                loss = l1 + weight * g
                # the discriminator wants real logits above 1 and fake ones below -1: hinge loss, a half each
                real, fake = disc(torch.cat([img, rec.detach()])).chunk(2)  # 2 x (B, 1, h', w')
                d = ((1 - real).clamp(min=0) + (1 + fake).clamp(min=0)).mean() / 2
                add(disc_grads, gradient(d / accumulate, disc_params))
                terms |= {"g": g, "gan_weight": torch.tensor(weight), "d": d}
                terms |= {"logits_real": real.mean(), "logits_fake": fake.mean()}
            add(grads, gradient(loss / accumulate, params))
            add(line, {name: value.item() / accumulate for name, value in {"loss": loss, **terms}.items()})
            step_z += z.square().mean().item() / accumulate             # of all channels, before the mask

        norm = clip_gradients(grads, clip)
        adamw(params, grads, moments, step, rate, betas, weight_decay)
        if gan:
            clip_gradients(disc_grads, clip)
            adamw(disc_params, disc_grads, disc_moments, step, rate, (0.5, 0.9), weight_decay=0.0)
        if any(name.startswith("encoder") for name in params):          # a frozen encoder keeps its scale
            z_square += max(0.01, 1 / (step + 1)) * (step_z - z_square)
        if bins:
            line[f"loss_c{bins[c_prime]}"] = line["loss"]
        log.append({**line, "grad_norm": norm, "lr": rate, "c_prime": c_prime})

    plain = {"model": ae.state_dict(), "optimizer": moments, "log": log}
    plain |= {"z_square": z_square, "scale": z_square**-0.5}
    return plain | {"disc": disc.state_dict(), "disc_optimizer": disc_moments} if gan else plain


SMALL = ["--f", 4, "--c", 8, "--widths", "8,8,8", "--depths", "0,1,1", "--image_size", 8]
BATCH_4 = ["--batch_size", 4]
MASKS = ["--channels", "2,3,5,8,8"]                                     # 8 is drawn twice as often
MASKED = dict(channels=[2, 3, 5, 8, 8], bins={2: 2, 3: 4, 5: 8, 8: 8})  # the log's bins: 2, 4, 8


def network(seed, **settings):
    """As the trainer does it: the seed right before the first weight."""
    torch.manual_seed(seed)
    widths, depths = settings.pop("widths", (8, 8, 8)), settings.pop("depths", (0, 1, 1))
    sizes = dict(encoder_widths=widths, decoder_widths=widths, encoder_depths=depths, decoder_depths=depths)
    return DCAE(AEConfig(**{"f": 4, "c": 8, **sizes, **settings}))


def toy_pictures(size, seed):
    """Sample n of the endless training set is picture permutation[n] of a million."""
    data, order = open_images("toy", size, train=True), data_order(1_000_000, seed)
    return lambda samples: torch.stack([data[order(n)][0] for n in samples])


def run_autoencoder(out, *flags, steps=3):
    flags = [*flags, "--eval_every", 0, "--steps", steps, "--out", out]
    train_ae.main([str(flag) for flag in flags])
    return read_run(out)


def test_phase_1_with_masks(tmp_path):
    """Betas and weight decay are phase 1's, left out of the flags."""
    flags = ["--seed", 33, "--lr", 2e-3, "--warmup", 2, "--cooldown", 2, "--clip", 0.2]
    run = run_autoencoder(tmp_path, *SMALL, *BATCH_4, *MASKS, *flags)
    plain = plain_autoencoder(network(33), toy_pictures(8, 33), **MASKED, seed=33, lr=2e-3, warmup=2,
                              cooldown=2, clip=0.2, betas=(0.9, 0.999), weight_decay=0.1)
    assert_same(run, plain)


def test_phase_1_by_its_recipe(tmp_path):
    """Left out of the flags: lr, warm-up, clipping, and on a CPU the batch."""
    run = run_autoencoder(tmp_path, *SMALL, "--channels", 8)
    plain = plain_autoencoder(network(0), toy_pictures(8, 0), batch=1, lr=6.4e-5, warmup=1000, clip=1.0)
    assert_same(run, plain)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of an autoencoder after two steps of phase 1."""
    out = tmp_path_factory.mktemp("ae")
    run_autoencoder(out, *SMALL, *BATCH_4, *MASKS, "--lr", 1e-2, "--warmup", 0, steps=2)
    return out


def load_network(folder, seed=0):
    """--init: the seed decides no more than the discriminator's weights."""
    ckpt = torch.load(folder / "ckpt.pt", weights_only=True)
    ae = network(0)
    ae.load_state_dict(ckpt["model"])
    ae.scale = ckpt["scale"]
    torch.manual_seed(seed)
    return ae


def test_gan_with_two_micro_batches(trained, tmp_path):
    """The discriminator trains alone for one step. Nothing is clipped, or no factor of a loss would show."""
    flags = ["--init", trained, *BATCH_4, "--accumulate", 2, "--image_size", 24, "--gan", 0.5]
    flags += ["--disc_warmup", 1, "--seed", 7, "--lr", 5e-5, "--warmup", 0, "--clip", 0]
    run = run_autoencoder(tmp_path, *flags)
    plain = plain_autoencoder(load_network(trained, seed=7), toy_pictures(24, 7), **MASKED, seed=7,
                              accumulate=2, lr=5e-5, clip=0.0, gan=0.5, disc_warmup=1)
    assert_same(run, plain)


@pytest.mark.parametrize("lr", [None, 2e-3])
def test_phase_2_trains_the_middle(trained, tmp_path, lr):
    """c' are those of phase 1's checkpoint. At its own lr, 1.6e-5, the weight decay would not show."""
    flags = ["--phase", 2, "--init", trained, "--image_size", 8, *BATCH_4, "--warmup", 1, "--seed", 2]
    run = run_autoencoder(tmp_path, *flags, *(["--lr", lr] if lr else []))
    middle = r"encoder\.project_out|decoder\.project_in"
    plain = plain_autoencoder(load_network(trained), toy_pictures(8, 2), **MASKED, trains=middle, seed=2,
                              lr=lr or 1.6e-5, betas=(0.9, 0.999), weight_decay=0.001)
    assert_same(run, plain)


def test_phase_3_trains_the_head_against_a_gan(trained, tmp_path):
    flags = ["--phase", 3, "--init", trained, "--image_size", 24, "--batch_size", 2, "--warmup", 2]
    run = run_autoencoder(tmp_path, *flags, "--disc_warmup", 0)
    head = r"decoder\.project_out"
    plain = plain_autoencoder(load_network(trained), toy_pictures(24, 0), **MASKED, trains=head, batch=2,
                              lr=5.4e-5, warmup=2, betas=(0.5, 0.9), weight_decay=0.0, gan=0.1)
    assert_same(run, plain)


def test_decoder_alone(trained, tmp_path):
    """The encoder stands still, and with it the scale."""
    flags = ["--train", "decoder", "--init", trained, "--channels", "3,8", *BATCH_4]
    run = run_autoencoder(tmp_path, *flags, "--lr", 2e-3, "--warmup", 0)
    plain = plain_autoencoder(load_network(trained), toy_pictures(8, 0), channels=[3, 8], bins={3: 3, 8: 8},
                              trains=r"decoder\.")
    assert_same(run, plain)


def test_pictures_of_a_folder_in_the_network_of_1_0(tmp_path):
    """Without masks; BatchNorm counts the batch. Five pictures: an epoch ends in every step."""
    (tmp_path / "data").mkdir()
    draw = np.random.default_rng(0)
    for k, (height, width) in enumerate([(20, 30), (33, 17), (40, 40), (16, 70), (25, 19)]):
        Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / f"data/{k}.png")
    order = data_order(5, seed=7)

    def crop(n):
        """The short side at 1 to 1.25 times the size, a random square in it, mirrored half of the time."""
        img, draw = Image.open(tmp_path / f"data/{order(n)}.png"), np.random.default_rng((7, n))
        side = min(img.size) / draw.uniform(1, 1.25)
        left, top = draw.random() * (img.width - side), draw.random() * (img.height - side)
        img = img.resize((16, 16), Image.BICUBIC, box=(left, top, left + side, top + side))
        if draw.random() < 0.5:
            img = img.transpose(Image.FLIP_LEFT_RIGHT)
        return torch.tensor(np.array(img)).permute(2, 0, 1) / 127.5 - 1  # (3, 16, 16) in [-1, 1]

    flags = ["--version", "1.0", "--f", 8, "--c", 8, "--widths", "8,8,8,32", "--depths", "0,1,1,1"]
    flags += ["--data", tmp_path / "data", "--image_size", 16, "--channels", 8, "--lpips", 0]
    run = run_autoencoder(tmp_path / "run", *flags, *BATCH_4, "--lr", 2e-3, "--warmup", 0, "--seed", 7)
    ae = network(7, version="1.0", f=8, widths=(8, 8, 8, 32), depths=(0, 1, 1, 1))
    assert_same(run, plain_autoencoder(ae, lambda samples: torch.stack([crop(n) for n in samples]), seed=7))


def test_scale_is_from_the_mean_of_all_steps_and_later_of_about_the_last_hundred(tmp_path):
    """With lr 0 only the pictures change."""
    flags = ["--channels", 8, "--batch_size", 1, "--lr", 0, "--log_every", 104]
    run = run_autoencoder(tmp_path, *SMALL, *flags, steps=104)
    z = network(0).encode(toy_pictures(8, 0)(range(104)))               # (104, c, h, w)
    z_square = 0.0
    for step, step_z in enumerate(z.square().mean((1, 2, 3)).tolist()):
        z_square += (1 / (step + 1) if step < 100 else 0.01) * (step_z - z_square)
    assert float(run["z_square"]) == pytest.approx(z_square, rel=2e-6)
    assert run["scale"] == pytest.approx(z_square**-0.5, rel=1e-6)


def test_a_line_of_the_log_is_the_mean_since_the_line_before(tmp_path):
    flags = ["--lr", 2e-3, "--warmup", 0, "--log_every", 4]
    run = run_autoencoder(tmp_path, *SMALL, *BATCH_4, *MASKS, *flags, steps=8)
    steps = plain_autoencoder(network(0), toy_pictures(8, 0), **MASKED, steps=8)["log"]
    assert [line["step"] for line in run["log"]] == [1, 4, 8]
    for line, group in zip(run["log"], [steps[:1], steps[1:4], steps[4:]]):
        for name in ("loss", "l1", "grad_norm", "loss_c2", "loss_c4", "loss_c8"):
            values = [step[name] for step in group if name in step]     # no entry where no such c' was drawn
            assert line.get(name) == (pytest.approx(np.mean(values), rel=6e-6) if values else None), name


# ------------------------------------------------------------------------------------------------------------
# Stage 2, the denoiser: Eq. 2 on cached latents


def plain_diffusion(net, objective, data, channels=(8,), bins=None, seed=0, steps=3, batch=6, accumulate=1,
                    lr=2e-3, betas=(0.9, 0.999), weight_decay=0.0, warmup=0, cooldown=0, clip=0.0,
                    label_dropout=0.1, ema_decay=0.9999, ema_warmup=2000):
    params = {name: p for name, p in net.named_parameters() if p.requires_grad}
    moments, log = zero_moments(params), []
    ema = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    null_label = data["classes"]
    order = data_order(len(data["labels"]), seed)

    for step in range(steps):
        rate = learning_rate(step, steps, lr, warmup, cooldown, start=6.4e-6)
        c_prime = draw_channels(channels, seed, step)                   # one for the whole batch
        grads, losses, times = {}, [], []

        for samples in micro_batches(step, batch, accumulate):
            # what is random belongs to a sample: its key is (seed, stream, number of the sample)
            mirrored = [int(uniform(seed, 3, n) < 0.5) for n in samples]
            z = torch.stack([data["latents"][m][order(n)] for m, n in zip(mirrored, samples)])  # (B, c, h, w)
            z = z.float() * data["scale"]                               # rms 1
            labels = [data["labels"][order(n)] for n in samples]
            dropped = [uniform(seed, 2, n) < label_dropout for n in samples]
            y = torch.tensor([null_label if drop else label for drop, label in zip(dropped, labels)])  # (B,)
            u = torch.tensor([uniform(seed, 1, n) for n in samples])    # (B,) in [0, 1): the time
            noise = torch.stack([gaussian(z[0].shape, seed, 0, n) for n in samples])  # (B, c, h, w)

            loss = objective(net, z, noise, u, y, c_prime)              # (B,), Eq. 2
            add(grads, gradient(loss.mean() / accumulate, params))
            losses += loss.tolist()
            times += u.tolist()

        norm = clip_gradients(grads, clip)
        adamw(params, grads, moments, step, rate, betas, weight_decay, no_decay=("norm.weight", "bias"))
        decay = ema_decay * (1 - math.exp(-(step + 1) / ema_warmup))
        for name, tensor in net.state_dict().items():
            ema[name] += (1 - decay) * (tensor - ema[name])

        line = {"loss": np.mean(losses), "grad_norm": norm, "lr": rate, "c_prime": c_prime}
        quarters = [int(4 * t) for t in times]                          # of the time axis
        for quarter in set(quarters):
            line[f"loss_t{quarter}"] = np.mean([loss for loss, q in zip(losses, quarters) if q == quarter])
        if bins:
            line[f"loss_c{bins[c_prime]}"] = line["loss"]
        log.append(line)

    return {"model": net.state_dict(), "ema": ema, "optimizer": moments, "scale": data["scale"], "log": log}


def keep(x, c_prime):
    """m * x: the channels behind c' become zero."""
    return torch.cat([x[:, :c_prime], torch.zeros_like(x[:, c_prime:])], dim=1)


def flow(net, z, noise, u, y, c_prime):
    """SiT, USiT: a straight line from noise at t = 0 to data at t = 1. The network says the velocity."""
    z, noise, t = keep(z, c_prime), keep(noise, c_prime), u.view(-1, 1, 1, 1)
    pred = net(t * z + (1 - t) * noise, u, y)                           # (B, c, h, w)
    return (z - noise - pred)[:, :c_prime].square().mean((1, 2, 3))


def vp(net, z, noise, u, y, c_prime):
    """UViT: n = 1 .. 1000, scaled-linear betas. The network says the noise."""
    z, noise, n = keep(z, c_prime), keep(noise, c_prime), (1000 * u).long() + 1
    beta = torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - beta, 0)[n - 1].float().view(-1, 1, 1, 1)  # (B, 1, 1, 1)
    pred = net(abar.sqrt() * z + (1 - abar).sqrt() * noise, n, y)       # (B, c, h, w)
    return (noise - pred)[:, :c_prime].square().mean((1, 2, 3))


def ddpm(net, z, noise, u, y, c_prime):
    """DiT: t = 0 .. 999, linear betas. The network says the noise, and by v where its log-variance lies."""
    z, noise, t = keep(z, c_prime), keep(noise, c_prime), (1000 * u).long()
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - beta, 0)[t].float().view(-1, 1, 1, 1)      # (B, 1, 1, 1)
    z_t = abar.sqrt() * z + (1 - abar).sqrt() * noise
    eps, v = net(z_t, t, y).chunk(2, dim=1)                             # 2 x (B, c, h, w)
    loss = (noise - eps).square() + variational_bits(z, z_t, t, eps.detach(), v)  # the latter trains v alone
    return loss[:, :c_prime].mean((1, 2, 3))


def variational_bits(z, z_t, t, eps, v):
    """In bits: KL of two normals, q(z_{t-1} | z_t, z) and p(z_{t-1} | z_t); at t = 0 -log p(z) [iDDPM]."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])  # abar of t - 1
    variance = beta * (1 - before) / (1 - abar)                         # of q
    variance[0] = variance[1]                                           # 0 has no logarithm
    at = lambda table: table[t].float().view(-1, 1, 1, 1)

    z_hat = (z_t - (1 - at(abar)).sqrt() * eps) / at(abar).sqrt()
    of_z, of_z_t = at(beta * before.sqrt() / (1 - abar)), at((1 - before) * (1 - beta).sqrt() / (1 - abar))
    q_mean, mean = of_z * z + of_z_t * z_t, of_z * z_hat + of_z_t * z_t
    q_log_var, share = at(variance.log()), (v + 1) / 2
    log_var = share * at(beta.log()) + (1 - share) * q_log_var
    kl = (log_var - q_log_var + (q_log_var - log_var).exp() + (q_mean - mean) ** 2 * (-log_var).exp() - 1) / 2

    # z in bins of 2/255, the outer ones open; the normal's distribution function by its tanh approximation
    cdf = lambda x: (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2
    above, below = (cdf((z - mean + edge) * (-log_var / 2).exp()) for edge in (1 / 255, -1 / 255))
    mass = torch.where(z < -0.999, above, torch.where(z > 0.999, 1 - below, above - below))
    return torch.where((t == 0).view(-1, 1, 1, 1), -mass.clamp(min=1e-12).log(), kl) / math.log(2)


OBJECTIVE = {"DiT": ddpm, "UViT": vp, "SiT": flow, "USiT": flow}


@pytest.fixture(scope="module")
def latents(trained):
    """What the cache holds: the first 16 toy training pictures, plain and mirrored, encoded, in fp16."""
    ae, data = load_network(trained).eval(), open_images("toy", 8, train=True)
    img = torch.stack([data[k][0] for k in range(16)])                  # (16, 3, 8, 8)
    with torch.no_grad():
        z = [ae.encode(img).half(), ae.encode(img.flip(3)).half()]      # 2 x (16, c, 2, 2)
    return {"latents": z, "labels": [k % 10 for k in range(16)], "classes": 10, "scale": ae.scale}


BATCH_6 = ["--batch_size", 6]
# By seed 75 all three steps have c' < c, labels drop, both mirrors occur, and DiT's sample 7 has t = 0.
SEED = ["--seed", 75]


def denoiser(family, seed):
    torch.manual_seed(seed)
    return diffusion.build(f"{family}-T", c=8, size=2, num_classes=10, depth=2, hidden=16, heads=2)


def run_diffusion(ae, out, family, *flags, steps=3):
    sizes = ["--model", f"{family}-T", "--depth", 2, "--hidden", 16, "--heads", 2, "--max_images", 16]
    flags = ["--ae", ae, "--out", out, *sizes, *flags, "--eval_every", 0, "--steps", steps]
    train_diffusion.main([str(flag) for flag in flags])
    return read_run(out)


@pytest.mark.parametrize("family", OBJECTIVE)
def test_augmented_diffusion(trained, latents, family, tmp_path):
    flags = ["--lr", 2e-3, "--betas", 0.8, 0.95, "--weight_decay", 0.1, "--warmup", 2, "--cooldown", 2]
    flags += ["--clip", 0.5, "--label_dropout", 0.4, "--ema", 0.9, "--ema_warmup", 2]
    run = run_diffusion(trained, tmp_path, family, *BATCH_6, *SEED, *MASKS, *flags)
    plain = plain_diffusion(denoiser(family, 75), OBJECTIVE[family], latents, **MASKED, seed=75, lr=2e-3,
                            betas=(0.8, 0.95), weight_decay=0.1, warmup=2, cooldown=2, clip=0.5,
                            label_dropout=0.4, ema_decay=0.9, ema_warmup=2)
    assert_same(run, plain)


RECIPES = {  # DC-Gen projects/DC-AE.md at batch 1024; none is published for SiT, which has DiT's
    "DiT": dict(lr=2e-4, weight_decay=0.0, betas=(0.9, 0.999), warmup=0),
    "SiT": dict(lr=2e-4, weight_decay=0.0, betas=(0.9, 0.999), warmup=0),
    "UViT": dict(lr=2e-4, weight_decay=0.03, betas=(0.99, 0.99), warmup=5000),
    "USiT": dict(lr=1e-4, weight_decay=0.0, betas=(0.99, 0.99), warmup=5000),
}


@pytest.mark.parametrize("family", OBJECTIVE)
def test_diffusion_by_the_recipe_of_its_family(trained, latents, family, tmp_path):
    """Left out of the flags: all of the recipe."""
    run = run_diffusion(trained, tmp_path, family, *BATCH_6, *SEED, "--no-augment", steps=1)
    plain = plain_diffusion(denoiser(family, 75), OBJECTIVE[family], latents, **RECIPES[family], seed=75,
                            steps=1, clip=0.0, label_dropout=0.1, ema_decay=0.9999, ema_warmup=2000)
    assert_same(run, plain)


@pytest.mark.parametrize("family", OBJECTIVE)
def test_ordinary_diffusion(trained, latents, family, tmp_path):
    """Whatever c' are named. Here the recipe's betas and weight decay show, and so does the average's decay."""
    flags = ["--no-augment", *MASKS, "--lr", 2e-3, "--warmup", 0, "--ema_warmup", 1]
    run = run_diffusion(trained, tmp_path, family, *BATCH_6, *SEED, *flags)
    recipe = RECIPES[family] | dict(lr=2e-3, warmup=0)
    plain = plain_diffusion(denoiser(family, 75), OBJECTIVE[family], latents, **recipe, seed=75,
                            ema_decay=0.9999, ema_warmup=1)
    assert_same(run, plain)


def test_two_micro_batches_of_latents_of_unknown_scale(trained, latents, tmp_path):
    """An autoencoder that knows no scale has 1 there. Then it is 1 / rms of the plain latents."""
    ckpt = torch.load(trained / "ckpt.pt", weights_only=True)
    (tmp_path / "ae").mkdir()
    torch.save({**ckpt, "scale": 1.0}, tmp_path / "ae/ckpt.pt")
    flags = ["--accumulate", 2, "--lr", 2e-3, "--warmup", 0]
    run = run_diffusion(tmp_path / "ae", tmp_path / "run", "USiT", *BATCH_6, *MASKS, *flags)
    rms = latents["latents"][0].double().square().mean().sqrt()
    assert run["scale"] == pytest.approx(float(1 / rms), rel=1e-6)
    latents = {**latents, "scale": run["scale"]}                        # to the last bit
    plain = plain_diffusion(denoiser("USiT", 0), flow, latents, **MASKED, accumulate=2, betas=(0.99, 0.99))
    assert_same(run, plain)


# ------------------------------------------------------------------------------------------------------------
# The parts of both loops


def learning_rate(step, steps, lr, warmup, cooldown, start):
    """Of step 0, 1, ...: linear from `start` to lr, constant, linear to 0 over the last `cooldown` steps."""
    if step < warmup:
        lr = start + (lr - start) * (step + 1) / warmup
    if steps - step < cooldown:
        lr = lr * (steps - step) / cooldown
    return lr


def draw_channels(channels, seed, step):
    return random.Random(f"{seed} {step}").choice(channels)


def micro_batches(step, batch, accumulate):
    """Sample numbers run on through micro-batches and steps."""
    size = batch // accumulate
    return [range(start, start + size) for start in range(step * batch, (step + 1) * batch, size)]


def data_order(count, seed):
    """Sample n -> image: in each epoch a new permutation."""
    orders = {}

    def image(n):
        epoch, k = divmod(n, count)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng((seed, epoch)).permutation(count)
        return int(orders[epoch][k])

    return image


def gradient(loss, params):
    return dict(zip(params, torch.autograd.grad(loss, list(params.values()))))


def add(sums, values):
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value


def clip_gradients(grads, clip):
    """Shrink all gradients by one factor where their common norm is above `clip`. Returns that norm."""
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    if clip and norm > clip:
        for name in grads:
            grads[name] = grads[name] * (clip / (norm + 1e-6))          # 1e-6 is PyTorch's
    return norm.item()


def zero_moments(params):
    zero = torch.zeros_like
    return {name: {"exp_avg": zero(p), "exp_avg_sq": zero(p)} for name, p in params.items()}


@torch.no_grad()
def adamw(params, grads, moments, step, lr, betas, weight_decay, no_decay=()):
    """Adam with decoupled weight decay; names that contain a word of `no_decay` are spared."""
    for name, p in params.items():
        g, m, v = grads[name], moments[name]["exp_avg"], moments[name]["exp_avg_sq"]
        m.lerp_(g, 1 - betas[0])                                        # m <- m + (1 - beta1) (g - m)
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])             # v <- beta2 v + (1 - beta2) g^2
        spared = any(word in name for word in no_decay)
        p *= 1 - lr * (0.0 if spared else weight_decay)
        size, root = lr / (1 - betas[0] ** (step + 1)), math.sqrt(1 - betas[1] ** (step + 1))
        p -= size * m / (v.sqrt() / root + 1e-8)


# ------------------------------------------------------------------------------------------------------------
# Random numbers of a key: splitmix64 [Steele, Lea, Flood 2014], then uniform or by Box-Muller

GOLDEN, MASK_64 = 0x9E3779B97F4A7C15, 2**64 - 1


def mix(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK_64
    return x ^ (x >> 31)


def random_bits(count, *key):
    """The key's numbers are folded into a state, from which splitmix64 counts on."""
    state = 0
    for number in key:
        state = mix(((state ^ number) + GOLDEN) & MASK_64)
    return [mix((state + k * GOLDEN) & MASK_64) for k in range(1, count + 1)]


def uniform(*key):
    """The upper 24 bits, in [0, 1)."""
    return (random_bits(1, *key)[0] >> 40) / 2**24


def gaussian(shape, *key):
    """64 bits give two numbers: a radius from the upper half, an angle from the lower one."""
    count = math.prod(shape)
    bits = random_bits((count + 1) // 2, *key)
    upper = torch.tensor([b >> 32 for b in bits], dtype=torch.float32)
    lower = torch.tensor([b & (2**32 - 1) for b in bits], dtype=torch.float32)
    radius = (-2 * ((upper + 0.5) / 2**32).log()).clamp(min=0).sqrt()   # upper + 0.5 may round up to 2^32
    angle = lower * (2 * math.pi / 2**32)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1).flatten()[:count].view(shape)


# ------------------------------------------------------------------------------------------------------------
# The comparison


def read_run(out):
    ckpt = torch.load(out / "ckpt.pt", weights_only=True)
    return {**ckpt, "log": [json.loads(line) for line in open(out / "log.jsonl")]}


def assert_same(run, plain):
    steps = len(plain["log"])
    for part in ("model", "ema", "disc"):
        if part in plain:
            assert run[part].keys() == plain[part].keys()
            for name, tensor in plain[part].items():
                assert_close(f"{part} {name}", run[part][name], tensor, 1e-6)
    for part in ("optimizer", "disc_optimizer"):
        if part in plain:
            moments = moments_by_name(run[part], list(plain[part]))
            assert moments.keys() == plain[part].keys()
            for name, wanted in plain[part].items():
                got = moments[name]
                assert got["step"] == steps
                assert_close(f"{part} m {name}", got["exp_avg"], wanted["exp_avg"], 1e-6)
                assert_close(f"{part} v {name}", got["exp_avg_sq"], wanted["exp_avg_sq"], 2e-6)  # of a square
    assert run["scale"] == pytest.approx(plain["scale"], rel=1e-6)
    if "z_square" in plain:
        assert float(run["z_square"]) == pytest.approx(plain["z_square"], rel=2e-6)

    assert run["step"] == steps and [line["step"] for line in run["log"]] == list(range(1, steps + 1))
    for line, wanted in zip(run["log"], plain["log"]):
        assert line["skipped"] == 0
        assert line.keys() - {"step", "skipped", "img_per_s", "wait"} == wanted.keys()
        for name, value in wanted.items():
            assert line[name] == pytest.approx(value, rel=6e-6, abs=1e-12), f"{name} in step {line['step']}"


def assert_close(name, got, wanted, tolerance):
    """The norm of the difference over the norm."""
    got, wanted = got.double(), wanted.detach().double()
    if name.endswith("attn.qkv.bias"):
        # The softmax does not see a shift of all keys: the gradient of their bias is all rounding error.
        got, wanted = (torch.cat([q, v]) for q, k, v in (got.chunk(3), wanted.chunk(3)))
    difference, norm = (got - wanted).norm().item(), wanted.norm().item()
    assert difference <= tolerance * norm, f"{name}: {difference:.3g} apart at norm {norm:.3g}"


def moments_by_name(optimizer, names):
    """Adam's moments under the names of the tensors; a plain state_dict numbers them, in its order."""
    state, groups = optimizer["state"], optimizer["param_groups"]
    if names[0] in state:
        return state
    if len(groups) == 2:                                                # those without weight decay come last
        names = sorted(names, key=lambda name: "norm.weight" in name or "bias" in name)
    return {name: state[k] for k, name in enumerate(names)}
