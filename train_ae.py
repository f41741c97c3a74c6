"""Stage 1: train a DC-AE, with or without the structured latent space of DC-AE 1.5.

    python train_ae.py --toy                                    # minutes on a laptop CPU, nothing to download
    torchrun train_ae.py --c 128 --f 64 --data imagenet/train   # one GPU, phase 1 of the full model
    torchrun --nproc_per_node 8 train_ae.py --phase 2 --init out/dc-ae-1.5-f64c128 --data imagenet/train
The same command again goes on from the last checkpoint in --out; a larger --steps goes on further.

Three phases (Decoupled High-Resolution Adaptation, DC-AE Sec. 3.3; 1.5 keeps its masks on in all of them):
    1 low-resolution full training        everything        L1 + LPIPS
    2 high-resolution latent adaptation   the middle        L1 + LPIPS
    3 low-resolution local refinement     the decoder head  L1 + LPIPS + PatchGAN
The authors published neither losses, weights, channel list nor optimiser of this stage; each number of the
recipe says where it comes from: [paper], [thread] mit-han-lab/efficientvit#143, [community]
lavinal712/AutoencoderKL branch dc-ae, [ours]. A reader may stop at the rule "The machinery of both trainers".
Letters: B images of a batch, b of a micro-batch on a rank, H W pixels, c latent channels, c' = c_prime kept.
"""

import atexit
import copy
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_state_dict,
                                                     set_model_state_dict, set_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.nn.functional import all_reduce as differentiable_all_reduce
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import fid
from ae import (DCAE, AEConfig, Flags, InputError, channel_mask, check_out, doubling, evenly_spaced, lock,
                make_folder, open_images, open_weights, parse_channels, save_grid, script,
                synchronized_time, to_uint8, within, write_checkpoint, writing)

PHASES = {  # defaults of the flags. lr, betas, weight decay: [community]; sizes: [paper]; GAN weight: [ours]
    1: dict(image_size=[256], lr=6.4e-5, betas=(0.9, 0.999), weight_decay=0.1, gan=0.0),
    2: dict(image_size=[512], lr=1.6e-5, betas=(0.9, 0.999), weight_decay=0.001, gan=0.0),
    3: dict(image_size=[256], lr=5.4e-5, betas=(0.5, 0.9), weight_decay=0.0, gan=0.1),
}
TRAINABLE = {  # phase: tensors that train, as the papers' "middle" and "head" layers are read here [ours]
    1: r".*",
    2: r"encoder\.project_out|decoder\.project_in",
    3: r"decoder\.project_out",
}
TOY = dict(f=8, c=32, widths="16,32,32,64", depths="0,1,1,1", image_size=[32], batch_size=16, steps=4500,
           lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup=50, cooldown=4000, save_every=1000,
           eval_every=1500, eval_num=256, log_every=25, lpips=0.0, out="out/toy-ae")

# ----------------------------------------------------------------------------------------------------------
# Losses besides L1: LPIPS and a PatchGAN


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018) with the lpips package's networks, always in fp32. img,
    rec (B,3,H,W) in [-1,1] -> (B,). The package divides by sqrt(sum x^2) + eps, whose gradient is nan where
    all features are zero; here eps stands inside the root, so that gradients are finite everywhere."""

    def __init__(self, net="vgg", random=False):
        super().__init__()
        import lpips
        file = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}[net]
        try:
            self.metric = lpips.LPIPS(net=net, pnet_rand=random, verbose=False).requires_grad_(False).eval()
        except OSError as e:                                    # no network (URLError), no disk
            raise InputError(f"LPIPS needs {file}: https://download.pytorch.org/models/{file} in "
                             f"{torch.hub.get_dir()}/checkpoints; or --lpips 0") from e

    def forward(self, img, rec):
        metric, distance = self.metric, 0.0
        with torch.autocast(img.device.type, enabled=False):
            of_img, of_rec = (metric.net(metric.scaling_layer(x.float())) for x in (img, rec))
            for a, b, linear in zip(of_img, of_rec, metric.lins):           # (B,C,h,w) of each layer
                a, b = (x * torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-10) for x in (a, b))
                distance = distance + linear((a - b).square()).mean((1, 2, 3))
        return distance


class PatchGAN(nn.Sequential):
    """70 x 70 patch discriminator (Isola et al. 2017): (B,3,H,W) -> logits (B,1,h,w). GroupNorm in place of
    BatchNorm: real and fake then share no statistics, and ranks need no synchronisation [ours]."""

    def __init__(self, in_channels=3, width=64):
        layers = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for k, stride in ((1, 2), (2, 2), (4, 1)):
            layers += [nn.Conv2d(k * width, 2 * k * width, 4, stride, padding=1, bias=False),
                       nn.GroupNorm(32, 2 * k * width), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(8 * width, 1, 4, stride=1, padding=1))


class Adversary:
    """Phase 3's other player: a PatchGAN with its own AdamW [ours]. No gradient of one player reaches the
    other."""

    def __init__(self, args, ranks, in_channels):
        self.args, self.ranks = args, ranks
        self.disc = PatchGAN(in_channels).to(ranks.device)
        self.params = list(self.disc.parameters())
        self.opt = adamw(self.params, args.lr, (0.5, 0.9), 0.0)
        self.guard = Guard(ranks.device)

    def weight(self, step):
        """Of the adversarial loss: none during the discriminator's warm-up."""
        return self.args.gan if step >= self.args.disc_warmup else 0.0

    def autoencoder_loss(self, rec):
        self.disc.requires_grad_(False)
        loss = -self.disc(rec).mean()
        self.disc.requires_grad_(True)
        return loss

    def discriminator_loss(self, img, rec):
        """-> its own loss, terms for the log."""
        real, fake = self.disc(torch.cat([img, rec.detach()])).chunk(2)
        # hinge loss (Lim & Ye 2017): real logits above 1, fake logits below -1
        loss = (F.relu(1 - real) + F.relu(1 + fake)).mean() / 2
        return loss, {"d": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}

    def step(self, lr):
        set_lr(self.opt, lr)
        for p in self.params:
            self.ranks.mean(p.grad)
        self.guard.step(self.opt, self.params, self.args.clip)

    def load(self, ckpt):
        if not ckpt.get("disc"):
            raise InputError(f"--gan: the run in {self.args.out} has no discriminator; "
                             "name it by --init, and another --out")
        self.disc.load_state_dict(ckpt["disc"])
        self.opt.load_state_dict(ckpt["disc_optimizer"])


# ----------------------------------------------------------------------------------------------------------
# The training step


def draw_channels(channels, seed, step):
    """c' of this step, uniform over `channels`: one draw for all ranks and micro-batches, a function of
    (seed, step). NOTE differs from DC-Gen, whose ranks draw each their own [DC-Gen aecore/trainer.py
    @cae2205]."""
    return random.Random(f"{seed} {step}").choice(channels)


class AutoencoderStep(nn.Module):
    """The module that ranks wrap: img (b,3,H,W), mask (1,c,1,1) -> reconstruction (b,3,H,W), mean of z^2."""

    def __init__(self, ae):
        super().__init__()
        self.ae = ae

    def forward(self, img, mask):
        z = self.ae.encode(img)                                 # (b,c,h,w)
        # DC-AE 1.5 Eq. (1): minimise l(x, D(E(x) * mask_{c,c'})) over a random c' in each step
        rec = self.ae.decode(z * mask)
        return rec.float(), z.detach().float().square().mean()


def main(argv=None):
    args = parse(argv)                                          # flag > --toy > the phase's recipe
    ranks = start_ranks()
    config, ae = configure(args, ranks)                         # ae: of --init, else None
    if args.dry_run:
        return dry_run(args, ranks, config)
    with writing("--out", args.out):
        if args.eval_only:
            return evaluate_only(args, ranks, ae)
        return train(args, ranks, config, ae)


def train(args, ranks, config, ae):
    data = None if args.bench else open_data(args, config)
    run = Run(args, ranks)

    # The network, and what trains it
    torch.manual_seed(args.seed)
    ae = prepare(ae or DCAE(config), args, ranks)
    select_trainable(ae, args.phase, args.train)
    ema = copy.deepcopy(ae).requires_grad_(False).eval() if args.ema else None      # its average
    forward = parallel(AutoencoderStep(ae), ae.stages(), ranks, args)       # compiled; DDP or FSDP2
    if ema and args.fsdp:
        shard(ema, ema.stages(), ranks, args)                   # like the weights; it is never compiled
    params = [p for p in ae.parameters() if p.requires_grad]
    opt = adamw(params, args.lr, args.betas, args.weight_decay)
    adversary = Adversary(args, ranks, config.in_channels) if args.gan else None

    # Where the run stands. z_square: running mean of z^2; a checkpoint's scale is 1 / its root
    start_step, z_square = 0, torch.tensor(1 / ae.scale**2, device=ranks.device)
    must_match = dict(config=asdict(config), phase=args.phase, train=args.train, image_size=args.size,
                      channels=args.channels)
    if ckpt := run.resume("ae", **must_match):
        start_step, z_square = ckpt["step"], ckpt["z_square"].to(ranks.device)
        load_state(ae, opt, ckpt, args, ema)
        if adversary:
            adversary.load(ckpt)
    guard = Guard(ranks.device, ckpt, ae.buffers())             # skips non-finite steps; puts BatchNorm back
    ckpt = None                                                 # gives its memory back
    owed = run.owes(start_step, run.has("eval.jsonl", start_step), at_start=args.phase == 3)
    if not owed and run.finished(start_step):
        return
    perceptual = open_perceptual(args, ranks) if args.lpips else None
    evaluation = Evaluation(args, ranks, config) if args.eval_every else None
    if owed:                                                    # cut off by a kill; phase 3: before step 1
        evaluation.report(run, ema or ae, start_step)

    # The loop
    shape = config.in_channels, args.size, args.size
    stream = random_batch(args, ranks, *shape) if args.bench else batches(data, args, ranks, start_step)
    encoder_trains = any(p.requires_grad for p in ae.encoder.parameters())
    for step in run.steps(start_step):
        lr = set_lr(opt, learning_rate(step, args))
        c_prime = draw_channels(args.channels, args.seed, step)  # one for all ranks and micro-batches
        mask = channel_mask(config.c, c_prime, ranks.device)    # (1,c,1,1): c' ones, then zeros
        step_z_square = 0.0

        for micro in range(args.accumulate):
            img, _ = run.next(stream)                           # (b,3,H,W) in [-1,1]
            sync_gradients(forward, micro == args.accumulate - 1)  # ranks average in the last one only
            with autocast(args, ranks):
                rec, z2 = forward(img, mask)                    # Eq. (1)
            l1 = (rec - img).abs().mean()
            loss, terms = l1, {"l1": l1}
            if perceptual:
                terms["lpips"] = perceptual(img, rec).mean()
                loss = loss + args.lpips * terms["lpips"]
            if adversary:
                terms["g"] = adversary.autoencoder_loss(rec)
                terms["gan_weight"] = torch.full_like(l1, adversary.weight(step))   # a tensor, as the others
                loss = loss + terms["gan_weight"] * terms["g"]
            (loss / args.accumulate).backward()
            if adversary:                                       # the other player's turn
                d_loss, d_terms = adversary.discriminator_loss(img, rec)
                (d_loss / args.accumulate).backward()
                terms |= d_terms
            step_z_square = step_z_square + z2 / args.accumulate
            run.add(**{name: loss for name in loss_names(config.c, args.channels, c_prime)}, **terms)

        grad_norm, taken = guard.step(opt, params, args.clip)   # taken: 0 where a step was skipped
        run.add(grad_norm=grad_norm)
        if adversary:
            adversary.step(lr)
        if ema:
            ema_update(ema, ae, args.ema, args.ema_warmup, step + 1, taken)
        z_square = running_mean(z_square, step_z_square, step, taken * encoder_trains)
        run.log(step, guard, lr=lr, c_prime=c_prime)

        done, stop = step + 1, run.stop                         # read once: a signal may come at any line
        if stop or run.due(done, args.save_every):
            if run.may_save(done, guard, forward, img, mask):
                z_square = ranks.mean(z_square)                 # ranks saw different images
                run.save("ae", done, ae, ema, opt, guard, **must_match, scale=float(z_square.rsqrt()),
                         z_square=z_square.cpu(), disc=adversary and adversary.disc.state_dict(),
                         disc_optimizer=adversary and adversary.opt.state_dict())
        if stop:
            break
        if run.due(done, args.eval_every):
            evaluation.report(run, ema or ae, done)
    run.close()
    if args.bench:
        return run.bench_line(model_name(config), meta_cost(config, args)[0])


def running_mean(z_square, step_z_square, step, counts):
    """Mean of z^2 over about the last 100 steps that count [ours]."""
    moved = torch.lerp(z_square, step_z_square, max(0.01, 1 / (step + 1)))
    return torch.where(counts > 0, moved, z_square)


def open_data(args, config):
    data = open_images(args.data, args.size, train=True, seed=args.seed)
    if config.in_channels != 3 and config.in_channels != len(data[0][0]):
        raise InputError(f"--in_channels {config.in_channels}: --data {args.data} has {len(data[0][0])}")
    return data


def prepare(ae, args, ranks):
    """To the device; with --checkpointing."""
    ae = ae.to(ranks.device)
    ae.set_checkpointing(args.checkpointing)
    if ranks.device.type == "cuda" and not args.fsdp:
        ae = ae.to(memory_format=torch.channels_last)
    return ae


def open_perceptual(args, ranks):
    perceptual = LPIPS("vgg").to(ranks.device, memory_format=torch.channels_last)
    if args.compile:
        perceptual.compile()
    return perceptual


def select_trainable(ae, phase, train):
    """Freeze all but the tensors that --phase and --train name; returns their names. BatchNorm of a frozen
    stage stays in eval mode, so that its statistics do not move; elsewhere it counts the batches of all
    ranks."""
    pattern = {"phase": TRAINABLE[phase], "all": r".*", "decoder": r"decoder\."}[train]
    for name, p in ae.named_parameters():
        p.requires_grad_(re.match(pattern, name) is not None)
    ae.train()
    for m in ae.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.__class__ = SyncBatchNorm                         # same tensors, another forward
            m.train(m.weight.requires_grad)
    return [name for name, p in ae.named_parameters() if p.requires_grad]


# ----------------------------------------------------------------------------------------------------------
# Evaluation: one row per c'


class Evaluation:
    """Pictures of --val, else of --data in the evaluation crop (toy: others), rebuilt from the first c'
    channels: PSNR and SSIM on uint8 (data range 255), LPIPS and rFID where their weights are at hand. In eval
    mode and fp32 (TF32 on CUDA); ranks share the pictures. --eval_only: also how well latents tell classes
    (knn)."""

    def __init__(self, args, ranks, config):
        self.args, self.ranks, self.config = args, ranks, config
        self.rows = doubling(config.c, args.channels[0])
        if args.eval_channels:
            self.rows = sorted(set(args.eval_channels))
        self.scores = {"psnr": fid.psnr, "ssim": fid.ssim}      # of uint8 pixels; lpips: of float img
        self.extractor = None
        self.open(args.size)
        named = args.features or args.inception != "default"    # rFID's network
        # Training on toy images downloads nothing unasked
        if config.in_channels == 3 and (named or args.eval_only or args.data != "toy"):
            self.add_networks(named)

    def open(self, size):
        """The pictures, at `size` px."""
        self.size = size
        self.data = open_images(self.args.val or self.args.data, size, seed=self.args.seed)
        self.indices = evenly_spaced(self.data, self.args.eval_num)

    def add_networks(self, named):
        """LPIPS (AlexNet, as the published evaluation) and rFID's network; what cannot be downloaded is named
        and left out."""
        try:
            lpips = LPIPS("alex").to(self.ranks.device)
            self.scores["lpips"] = lambda img, rec: lpips(img, rec.clamp(-1, 1))
        except InputError as e:
            self.ranks.print0(f"lpips left out: {e}")
        try:
            self.extractor = fid.load_extractor(self.args.inception, self.args.features, self.ranks.device)
        except InputError as e:
            if named:
                raise
            self.ranks.print0(f"rfid left out: {e}")

    def fitting(self):
        """The scores that pictures of this size allow."""
        smallest = {"ssim": 11, "lpips": 31}                    # px: SSIM's window, AlexNet's strides
        fitting = {name: score for name, score in self.scores.items() if self.size >= smallest.get(name, 1)}
        if left_out := [name for name in self.scores if name not in fitting]:
            self.ranks.print0(f"left out for pictures of {self.size} px: {', '.join(left_out)}")
        return fitting

    @torch.no_grad()
    def table(self, ae):
        """[{c_prime, psnr, psnr_n, ssim, lpips, rfid, knn, n}, ...]; ae: in eval mode, whole on every rank.
        psnr_n: pictures of finite PSNR, over which psnr is the mean (None: there are none)."""
        ranks, n = self.ranks, len(self.indices)
        mine = self.indices[ranks.rank::ranks.size]
        size = max(1, micro_batch(self.args, ranks))
        order = [mine[i:i + size] for i in range(0, len(mine), size)]
        scores = self.fitting()
        extractor = self.extractor if n > 1 else None           # one picture has no covariance
        values = [[] for _ in self.rows]                        # by c': (b,scores) of each batch
        latents, labels = [], []
        real, fake = fid.Moments(), [fid.Moments() for _ in self.rows]
        stream = loader(Stream(self.data), order, self.args.workers, ranks.device)
        for img, y in tqdm(stream, desc="evaluating", unit="batch", disable=not ranks.is_main, leave=False):
            img = img.to(ranks.device)
            z = ae.encode(img)
            latents.append(z.mean((2, 3)).cpu())                # (b,c)
            labels.append(y)
            pixels = to_uint8(img)
            if extractor:
                real.update(extractor(pixels)[0])
            for c_prime, moments, parts in zip(self.rows, fake, values):
                rec = ae.decode(z[:, :c_prime])
                rec_pixels = to_uint8(rec)
                part = [score(img, rec) if name == "lpips" else score(pixels, rec_pixels)
                        for name, score in scores.items()]
                parts.append(torch.stack(part, dim=1).double().cpu())
                if extractor:
                    moments.update(extractor(rec_pixels)[0])
        if extractor:
            for moments in (real, *fake):
                moments.reduce()
        latents, labels = fid.gather_rows(latents), fid.gather_rows(labels)     # (n,c), (n,)

        table = []
        for c_prime, moments, parts in zip(self.rows, fake, values):
            of_all = fid.gather_rows(parts)                     # (n,scores)
            finite = of_all.isfinite()                          # the PSNR of equal pictures is not
            means = of_all.where(finite, math.nan).nanmean(0).tolist()
            row = {"c_prime": c_prime, "n": n, "psnr_n": finite[:, 0].sum().item()}   # psnr: the first
            row |= {name: None if math.isnan(mean) else mean for name, mean in zip(scores, means)}
            if extractor:
                row["rfid"] = fid.frechet_distance(real.mean, real.cov, moments.mean, moments.cov)
            if self.args.eval_only and self.data.num_classes > 1 and n > 10:
                row["knn"] = knn_accuracy(latents[:, :c_prime], labels)
            table.append(row)
        return table

    @torch.no_grad()
    def picture(self, ae, path):
        """PNG: pictures in the top row, their reconstructions from the first c' channels below, a row for
        each c'."""
        if not self.ranks.is_main:
            return
        indices = evenly_spaced(self.data, 8)
        img = self.data.get_batch(indices, indices)[0].to(self.ranks.device)
        z = ae.encode(img)
        recs = [ae.decode(z[:, :c_prime]) for c_prime in self.rows]
        titles = ["original"] + [f"c' = {c_prime}" for c_prime in self.rows]
        save_grid(to_uint8(torch.cat([img, *recs])), path, len(indices), rows=titles)

    def as_text(self, table):
        names = [name for name in table[0] if name not in ("c_prime", "psnr_n", "n")]
        by = f"; rfid: {self.extractor.name}" if self.extractor else ""
        lines = [f"reconstruction at {self.size} px, {len(self.indices)} images{by}"]
        lines += [f"{'c_prime':>9}" + "".join(f"{name:>9}" for name in names)]
        for row in table:
            numbers = [math.nan if row[name] is None else row[name] for name in names]
            lines += [f"{row['c_prime']:>9}" + "".join(f"{number:>9.3f}" for number in numbers)]
        return "\n".join(lines)

    def report(self, run, ae, step):
        """The table of a training run's network: on the screen, in eval.jsonl, with a picture beside it."""
        eval_ae = DCAE(self.config).to(self.ranks.device).eval()    # whole on every rank, also under --fsdp
        eval_ae.load_state_dict(get_model_state_dict(ae, options=WHOLE))
        path = f"{self.args.out}/recon_{step:07d}.png"
        with run.waiting():
            table = self.table(eval_ae)
            self.picture(eval_ae, path)
        run.append("eval.jsonl", {"step": step, "table": table})
        self.ranks.print0(f"step {step}: {self.as_text(table)}")
        run.publish(step, path)
        if self.args.phase == 3 and step == self.args.steps:
            show_gain(run)


def knn_accuracy(features, labels, k=10, temperature=0.07):
    """(N,c), (N,) -> share of pictures whose class their k nearest others vote for, each with the weight
    exp(cosine / temperature): structure as a number [DC-Gen's evaluation]."""
    unit = F.normalize(features.float(), dim=1)
    right = 0
    for start in range(0, len(unit), 1000):
        cosine = unit[start:start + 1000] @ unit.T              # (1000,N)
        cosine[:, start:].fill_diagonal_(-math.inf)             # not itself
        near, index = cosine.topk(k)
        votes = torch.zeros(len(cosine), labels.max() + 1)
        votes.scatter_add_(1, labels[index], (near / temperature).exp())
        right += (votes.argmax(1) == labels[start:start + 1000]).sum().item()
    return right / len(labels)


def show_gain(run):
    """What phase 3 did to the PSNR of each c': the first table of the run and the last one."""
    tables = [line["table"] for line in read_log(run.args.out, "eval.jsonl")]
    pairs = [f"{b['c_prime']}: {b['psnr'] or math.nan:.2f} -> {a['psnr'] or math.nan:.2f}"
             for b, a in zip(tables[0], tables[-1])]
    run.ranks.print0("phase 3, before -> after, PSNR per c': " + ", ".join(pairs))


def evaluate_only(args, ranks, ae):
    """--eval_only: a table and a picture for each --image_size; all of it in eval.json."""
    ae, results = prepare(ae, args, ranks).eval(), {}
    make_folder(args.out)
    evaluation = Evaluation(args, ranks, ae.config)
    for size in args.image_size:
        if size != evaluation.size:
            evaluation.open(size)
        results[size] = evaluation.table(ae)
        evaluation.picture(ae, f"{args.out}/eval_{size}.png")
        ranks.print0(evaluation.as_text(results[size]))
    if ranks.is_main:
        about = {"ckpt": args.init or args.out, "data": args.val or args.data, "commit": commit(),
                 "results": results}
        with open(f"{args.out}/eval.json", "w") as f:
            json.dump(about, f, allow_nan=False)
    ranks.print0(json.dumps(results))
    return results


# ----------------------------------------------------------------------------------------------------------
# Flags of this stage


def parse(argv=None):
    p = training_flags("Train a DC-AE (1.5 with masks, or 1.0): phases 1 to 3, decoder-only, evaluation.")
    add = p.add
    add("--val", str, None,
        "folder of the evaluation; else --data in the evaluation crop (toy: other pictures)")
    add("--image_size", within(int, 1, 2**13), None,
        "pixels, a multiple of f; several only with --eval_only, which like --train decoder takes the "
        "checkpoint's own size", nargs="+")
    add("--f", SIZE, None, "spatial compression, 2^k >= 4; without --init 32")
    add("--c", SIZE, None, "latent channels; without --init 128")
    add("--version", str, None, "network of DC-AE 1.5 or 1.0; without --init 1.5", choices=["1.5", "1.0"])
    add("--in_channels", SIZE, None, "of the images; without --init 3; others need a data set of yours")
    add("--width", SIZE, None, "base width of every stage; without --init 128, the published size")
    add("--widths", several(SIZE), None, "width of each stage, e.g. 16,32,64,64, in place of --width")
    add("--depths", several(within(int, 0, 1000)), None,
        "blocks of each stage, e.g. 0,1,2,2, for encoder and decoder")
    add("--shortcuts", bool, None, "residual autoencoding shortcuts; off for the ablation")
    add("--phase", int, 1, "1 full training, 2 high-resolution adaptation, 3 GAN refinement", choices=PHASES)
    add("--init", str, None,
        "autoencoder to start from (run folder, file, published name); phases 2 and 3 need it")
    add("--train", str, "phase",
        "which tensors train; decoder leaves the encoder as it is", choices=["phase", "all", "decoder"])
    add("--lpips", WEIGHT, None, "weight of LPIPS-VGG [ours]; 0 with built-in images")
    add("--gan", WEIGHT, None, "weight of the PatchGAN hinge loss")
    add("--disc_warmup", COUNT_OR_0, 1000, "steps before the adversarial loss counts [ours]")
    add("--eval_only", bool, False, "evaluate --init or the run in --out: one row per c'")
    add("--eval_channels", str, None, "rows of the evaluation; else doubling from the smallest c'")
    add("--eval_num", COUNT, None, "images; else 1024 in training, with --eval_only all (toy: 2048)")
    p.set_defaults(steps=200_000, warmup=1000)                  # [ours]

    def recipe(args):
        defaults = PHASES[args.phase] | {"lpips": 0.0 if args.data == "toy" else 1.0, "eval_num": 1024}
        if args.eval_only:
            defaults["eval_num"] = 2048 if (args.val or args.data) == "toy" else None
        if args.eval_only or args.train == "decoder":           # the checkpoint's own
            defaults["image_size"] = None
        return defaults
    args = parse_flags(p, recipe, TOY, argv)
    check_folder("val", args.val or "toy")
    return args


def configure(args, ranks):
    """Settle what depends on the network, check it, say it in a line. Returns (config, the autoencoder of
    --init)."""
    ae = open_init(args)
    config, info = (ae.config, ae.info) if ae else (AEConfig(**config_of_flags(args)), {})
    args.channels = training_channels(args, config.c, ranks, info.get("channels"))
    args.image_size = args.image_size or [info.get("image_size") or PHASES[args.phase]["image_size"][0]]
    args.size = args.image_size[0]
    if args.eval_channels:
        args.eval_channels = parse_channels(args.eval_channels, config.c, "--eval_channels")
    for size in args.image_size:
        if size < 1 or size % config.f:
            raise InputError(f"--image_size {size}: not a multiple of f = {config.f}")
    if not args.eval_only:
        check_training(args, config)
    args.out = args.out or default_out(args, config)
    settle_batch(args, ranks, per_cuda_rank=16, training=not args.eval_only)  # 16: [ours]

    with torch.device("meta"):
        parameters = sum(p.numel() for p in DCAE(config).parameters())
    ranks.print0(f"{'evaluating' if args.eval_only else 'training'} {model_name(config)}, "
                 f"{parameters / 1e6:.1f} M parameters, phase {args.phase}, "
                 f"L1 + {args.lpips:g} LPIPS + {args.gan:g} GAN, {'/'.join(map(str, args.image_size))} px, "
                 f"{settings_line(args, ranks, config.c)}")
    return config, ae


def check_training(args, config):
    if args.lpips and config.in_channels != 3:
        raise InputError(f"--in_channels {config.in_channels}: LPIPS sees RGB alone; --lpips 0")
    if len(args.image_size) > 1:
        raise InputError(f"--image_size {args.image_size}: several sizes only with --eval_only")
    for flag, smallest in (("gan", 24), ("lpips", 16)):         # their strides
        if getattr(args, flag) and args.size < smallest:
            raise InputError(f"--image_size {args.size}: --{flag} needs {smallest} px or more; or --{flag} 0")


# ----------------------------------------------------------------------------------------------------------
# The network that the flags ask for, and its cost


def open_init(args):
    """The autoencoder of --init, or of the run in --out that a later phase or --eval_only goes on with; else
    None."""
    needs = {"--eval_only": args.eval_only, f"--phase {args.phase}": args.phase > 1,
             "--train decoder": args.train == "decoder"}
    needs = [flag for flag in needs if needs[flag]]
    held = [f"{args.out}/{name}" for name in ("ckpt.pt", "ckpt_prev.pt")]
    source = args.init
    if source is None and needs:
        if not (args.out and any(map(os.path.isfile, held))):
            raise InputError(f"{needs[0]} needs --init CKPT (the run before it)")
        source = args.out
    if source is None:
        return None
    ae = DCAE.from_pretrained(source)
    if args.shortcuts is False and ae.config.shortcuts:
        raise InputError(f"--no-shortcuts: {source} has them; leave the flag out")
    toy = [several(int)(TOY[flag]) for flag in ("widths", "depths")] if args.toy else []
    for name, given in config_of_flags(args).items():
        flag = re.sub("(en|de)coder_", "", name)
        have = "of its own" if flag == "width" else getattr(ae.config, name)    # 128 may hide --widths
        if given != have and given not in toy:
            raise InputError(f"--{flag} {given}: {source} has {flag} {have}; leave the flag out")
    return ae


def config_of_flags(args):
    """The entries of a network's configuration that flags name."""
    if args.width and args.widths:
        raise InputError(f"--width {args.width}: --widths, which --toy sets, says it too; name only --widths")
    flags = ("f", "c", "version", "width", "in_channels", "shortcuts")
    given = {flag: getattr(args, flag) for flag in flags}
    given |= dict.fromkeys(("encoder_widths", "decoder_widths"), args.widths)
    given |= dict.fromkeys(("encoder_depths", "decoder_depths"), args.depths)
    return {name: value for name, value in given.items() if value is not None}


def model_name(config):
    return f"DC-AE-{config.version}-f{config.f}c{config.c}"


def default_out(args, config):
    """A folder named after the model, so that two models never share one."""
    if args.eval_only and os.path.isdir(args.init or ""):
        return args.init
    name = f"out/{model_name(config)}".lower()
    if args.widths or args.width not in (None, 128):
        name += "-w" + "-".join(map(str, args.widths or [args.width]))
    if args.depths:
        name += "-d" + "-".join(map(str, args.depths))
    if not config.shortcuts:
        name += "-no-shortcuts"
    if set(args.channels) == {config.c}:
        name += "-plain"
    if args.phase > 1:
        name += f"-phase{args.phase}"
    if args.train != "phase":
        name += f"-{args.train}"
    return name


def meta_cost(config, args):
    """(forward MACs, activation bytes, network) of one image, without memory for it."""
    with torch.device("meta"):
        ae = DCAE(config)
        img = torch.empty(1, config.in_channels, args.size, args.size)
        mask = torch.empty(1, config.c, 1, 1)
    select_trainable(ae, args.phase, args.train)
    step = AutoencoderStep(ae)
    units = ae.stages() if args.checkpointing else ()
    return *cost(lambda: step(img, mask)[0].abs().mean(), ae, units), ae


def dry_run(args, ranks, config):
    macs, activations, ae = meta_cost(config, args)
    for name, p in ae.named_parameters():
        if p.requires_grad:
            ranks.print0(f"  trains {name} {tuple(p.shape)}")
    copies = 2 if args.ema else 1
    return print_estimate(args, ranks, model_name(config), ae, macs, activations, copies)


# ==========================================================================================================
# The machinery of both trainers: ranks, flags, data order, guard, DDP and FSDP2, save and resume, log, cost
# ==========================================================================================================


@dataclass
class Ranks:
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self):
        return self.rank == 0

    def mean(self, x):
        """Mean over ranks of a tensor, in place."""
        if self.size > 1:
            dist.all_reduce(x)
            x /= self.size
        return x

    def any(self, flag):
        """Whether a rank says so."""
        return self.mean(torch.tensor(float(flag), device=self.device)).item() > 0

    def wait(self):
        """For all ranks."""
        if self.size > 1:
            dist.barrier()

    def print0(self, text):
        if self.is_main:
            tqdm.write(text)

    def print_line(self, line):
        """One of JSON, with four decimal places; returns it."""
        line = {name: round(x, 4) if isinstance(x, float) else x for name, x in line.items()}
        self.print0(json.dumps(line))
        return line


def start_ranks():
    """One process per GPU under torchrun (gloo on CPU), a single process otherwise."""
    cuda = torch.cuda.is_available()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")              # TF32; cuDNN's convolutions too
    elif size > 1:                                              # torchrun leaves one thread to every rank
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", size))))
    if size > 1 and not dist.is_initialized():                  # 12 h: ranks wait while one decodes
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=12),
                                device_id=device if cuda else None)
    return Ranks(rank, size, device)


def end_ranks():
    if dist.is_initialized():                                   # or gloo's threads may end it badly
        dist.destroy_process_group()


# --- Flags ------------------------------------------------------------------------------------------------


COUNT, COUNT_OR_0, SIZE = within(int, 1, 2**31), within(int, 0, 2**31), within(int, 1, 2**16)
WEIGHT, SHARE, ABOVE_0 = within(float, 0, 1e38), within(float, 0, 1 - 1e-9), within(float, 1e-9, 1e38)


def several(kind):
    """Of a flag: such numbers, with commas between them -> tuple."""
    def numbers(text):
        return tuple(kind(number) for number in text.split(","))
    return numbers


def training_flags(description):
    """Flags of both trainers. A default of None is filled by the recipe, or by what the text says."""
    cuda = torch.cuda.is_available()
    p = Flags(description=description, usage="%(prog)s [--flag value ...]   (--help explains each)")
    add = p.add
    add("--toy", bool, False, "small preset that a CPU trains in minutes; flags beside it win")
    add("--data", str, "toy", "folder of class folders or flat (unconditional), a .zip of it, or toy")
    add("--out", str, None, "run folder: ckpt.pt, log.jsonl, pictures; else out/ + a name of the model")
    add("--steps", COUNT, None, "optimiser steps in total; a larger number goes on from the checkpoint")
    add("--batch_size", COUNT, None, "global batch, divisible by ranks x accumulate")
    add("--accumulate", COUNT, 1, "micro-batches per step and rank")
    add("--lr", WEIGHT, None, "absolute learning rate, never rescaled")
    add("--betas", SHARE, None, "AdamW", nargs=2, metavar=("B1", "B2"))
    add("--weight_decay", WEIGHT, None, "AdamW")
    add("--warmup", COUNT_OR_0, None, "steps of linear warm-up; constant afterwards")
    add("--cooldown", COUNT_OR_0, 0, "the last steps, in which the rate falls linearly to 0")
    add("--clip", WEIGHT, 1.0, "gradient norm clipping; 0: off")
    add("--ema", SHARE, 0.0,
        "decay of an average of the weights, which evaluations and all that read the checkpoint use; 0: none")
    add("--ema_warmup", ABOVE_0, 2000.0, "steps (time constant) over which that sets in")
    add("--checkpointing", bool, False,
        "recompute activations of a stage or block in the backward pass: less memory, a third more work")
    add("--seed", within(int, 0, 2**63 - 1), 0, "of weights, data order, noise and c'")
    add("--dtype", str, "bf16" if cuda else "fp32", "autocast; weights are fp32", choices=["bf16", "fp32"])
    add("--compile", bool, cuda, "torch.compile")
    add("--save_every", COUNT, 1000, "steps between checkpoints")
    add("--eval_every", COUNT_OR_0, 5000, "steps between evaluations with pictures; 0: never")
    add("--log_every", COUNT, 10 if cuda else 1,
        "steps between log lines: the only host synchronisation, and where ranks agree to stop")
    add("--channels", str, None,
        "c' of Eqs. 1 and 2: 16:128:4, 16,32,64 (given twice: drawn twice as often), or one number; c alone: "
        "no masks. Else those of --init, 16,20,...,c [paper], or with --toy c/8,...,c")
    add("--inception", str, "default", "of rFID and --fid: default, random or a file, as in fid.py")
    add("--features", str, None, "of rFID and --fid: another feature network, as in fid.py")
    add("--workers", within(int, 0, 1024), 8 if cuda else 0, "data loader processes per rank")
    add("--bench", bool, False, "time the loop on a random batch; one JSON line, no files")
    add("--dry_run", bool, False, "model, cost, memory; no data, no GPU; one JSON line last")
    add("--fsdp", bool, False, "FSDP2: weights, moments, average sharded over ranks; else DDP")
    add("--wandb", str, None, "log lines and pictures go to Weights & Biases too", metavar="PROJECT")
    add("--gpus", COUNT, 8, "of --dry_run: GPUs, for memory per rank and days")
    add("--tflops", ABOVE_0, 300.0, "of --dry_run: sustained TFLOP/s per GPU for the days")
    return p


def parse_flags(p, recipe, toy, argv=None):
    """flag > --toy > recipe > default: recipes and --toy replace defaults, so that any flag given beside them
    wins. `recipe` maps the flags as given so far (phase, model, ...) to defaults."""
    argv = sys.argv[1:] if argv is None else argv
    known = [word for word in argv if word not in ("-h", "--help")]  # help waits for the recipe's numbers
    if not p.parse_known_args(known)[0].toy:
        toy = {}
    p.set_defaults(**toy)
    p.set_defaults(**recipe(p.parse_known_args(known)[0]) | toy)
    args = p.parse_args(argv)
    if args.wandb:
        import_wandb()
    if args.out:
        check_out(args.out)
    fid.check_files(args.inception, args.features)
    if not args.dry_run:
        check_folder("data", args.data)
    args.betas = tuple(args.betas)
    if args.bench:                                              # the first steps are not timed
        args.timed, warm = (20, 5) if torch.cuda.is_available() else (3, 1)
        args.steps = args.timed + warm
        args.save_every = args.eval_every = 0
    return args


def check_folder(flag, path):
    if path != "toy" and not os.path.exists(path):
        raise InputError(f"--{flag} {path}: no such folder")


def training_channels(args, c, ranks, known=None):
    """The list that c' is drawn from: --channels, else the checkpoint's, the toy preset's short one, or the
    paper's."""
    channels = parse_channels(args.channels, c)
    if args.channels is None and (known or args.toy):
        channels = known or doubling(c)
    if channels[-1] < c:
        ranks.print0(f"--channels ends at {channels[-1]} of {c}: the channels behind it never train")
    return channels


def settle_batch(args, ranks, per_cuda_rank, training=True):
    """The default global batch: the recipe's per rank; 1 where a CPU trains."""
    if args.batch_size is None:
        slow = training and ranks.device.type == "cpu" and not args.dry_run
        per_rank = (1 if slow else per_cuda_rank) * args.accumulate
        args.batch_size = per_rank * (args.gpus if args.dry_run else ranks.size)
        if slow:
            ranks.print0(f"no --batch_size on a CPU: global batch {args.batch_size}, "
                         "that is 1 per rank and micro-batch")
    if args.batch_size % (ranks.size * args.accumulate):
        raise InputError(f"--batch_size {args.batch_size}: must be divisible by ranks x --accumulate = "
                         f"{ranks.size} x {args.accumulate}")


def settings_line(args, ranks, c):
    """What both stages say at their start."""
    data = "built-in toy images" if args.data == "toy" else args.data
    masks = "no masks"
    if set(args.channels) != {c}:
        masks = f"c' from {args.channels[0]} to {args.channels[-1]} ({len(set(args.channels))} values)"
    return (f"{data}, {masks}, global batch {args.batch_size}, lr {args.lr:g}, "
            f"{args.dtype} on {ranks.size} x {ranks.device.type}, {args.out}")


# --- Data order -------------------------------------------------------------------------------------------


class Stream(Dataset):
    """The endless training set: sample n is image perm_epoch[n mod N] under augmentation n, whatever rank
    asks. Without a seed: sample n is image n as it stands (evaluation, latent cache)."""

    def __init__(self, data, seed=None):
        self.data, self.seed, self.epoch = data, seed, None

    def __getitem__(self, samples):                             # -> img (b,3,H,W), labels (b,)
        images = samples if self.seed is None else [self.shuffled(n) for n in samples]
        return self.data.get_batch(images, samples)

    def shuffled(self, n):
        epoch, k = divmod(n, len(self.data))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng((self.seed, epoch)).permutation(len(self.data))
        return int(self.order[k])


def random_batch(args, ranks, *shape):
    """One micro-batch of noise and labels, for ever: --bench."""
    b = micro_batch(args, ranks)
    x = torch.randn(b, *shape, device=ranks.device)
    y = torch.randint(1000, (b,), device=ranks.device)
    return itertools.repeat((x, y))


def micro_batch(args, ranks):
    """Its size, on a rank."""
    return args.batch_size // (ranks.size * args.accumulate)


def sample_numbers(step, micro, args, ranks):
    """Global sample numbers of one micro-batch on this rank, the keys of all that is random in it."""
    b = micro_batch(args, ranks)
    start = step * args.batch_size + (ranks.rank * args.accumulate + micro) * b
    return range(start, start + b)


def batches(data, args, ranks, start_step):
    """Yields (x, y) micro-batches on the device, from step `start_step` on."""
    steps, micros = range(start_step, args.steps), range(args.accumulate)
    order = (sample_numbers(step, micro, args, ranks) for step in steps for micro in micros)
    for x, y in loader(Stream(data, args.seed), order, args.workers, ranks.device):
        yield x.to(ranks.device, non_blocking=True), y.to(ranks.device, non_blocking=True)


def loader(dataset, order, workers, device):
    """DataLoader of ready batches, read ahead by `workers` processes; order: iterable of lists of sample
    numbers."""
    if workers:
        atexit.register(end_workers)
    return DataLoader(dataset, batch_size=None, sampler=order, num_workers=workers,
                      prefetch_factor=4 if workers else None, pin_memory=device.type == "cuda",
                      worker_init_fn=ignore_signals)


def ignore_signals(worker):
    """torchrun and Slurm signal whole process groups: the trainer alone decides when to stop."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_workers():
    """At exit, whatever its reason: Python would send SIGTERM to workers that ignore it, and wait for
    ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


# --- Steps ------------------------------------------------------------------------------------------------


def loss_names(c, channels, c_prime):
    """What the loss is logged as: loss, and with masks also by c', in bins that double."""
    if set(channels) == {c}:
        return ["loss"]
    return ["loss", f"loss_c{next(k for k in doubling(c, channels[0]) if k >= c_prime)}"]


def learning_rate(step, args, start=0.0):
    """Of step 0, 1, ...: linear warm-up from `start`, constant, then linearly to 0 in the last --cooldown
    steps."""
    warm = start + (args.lr - start) * min(1.0, (step + 1) / max(1, args.warmup))
    return warm * min(1.0, (args.steps - step) / max(1, args.cooldown))


def set_lr(opt, lr):
    for group in opt.param_groups:
        group["lr"] = lr
    return lr


def adamw(params, lr, betas, weight_decay):
    return torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


def autocast(args, ranks):
    return torch.autocast(ranks.device.type, torch.bfloat16) if args.dtype == "bf16" else nullcontext()


@torch.no_grad()
def ema_update(ema, net, decay, warmup, step, taken):
    """ema <- ema + (1 - d) (net - ema), d = decay (1 - exp(-step / warmup)), step from 1 [DC-Gen: 0.9999,
    2000]. `taken` is 0.0 on the device where the step was skipped."""
    average, weights = list(ema.parameters()), list(net.parameters())
    if hasattr(weights[0], "to_local"):                         # FSDP2: each rank its own shards
        average, weights = [e.to_local() for e in average], [p.to_local() for p in weights]
    rate = (1 - decay * (1 - math.exp(-step / warmup))) * taken
    torch._foreach_lerp_(average, weights, [rate.to(average[0].dtype)] * len(weights))
    for e, b in zip(ema.buffers(), net.buffers()):              # BatchNorm's, which are averages themselves
        e.copy_(b)


class Guard:
    """Steps with a non-finite gradient are skipped and counted on the device, without waiting for it.
    `buffers`, such as BatchNorm's statistics, have been moved by the forward pass of a skipped step: they are
    put back."""

    def __init__(self, device, ckpt=None, buffers=()):
        self.skipped, self.in_a_row, self.worst = (torch.zeros((), device=device) for _ in range(3))
        self.skipped += ckpt["skipped"] if ckpt else 0
        self.buffers = list(buffers)
        self.good = [b.clone() for b in self.buffers]

    def step(self, opt, params, clip):
        """Clip, then step unless the norm is inf or nan. Returns (gradient norm, 1.0 where the step was
        taken)."""
        norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if clip:
            nn.utils.clip_grads_with_norm_(params, clip, norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2: a DTensor
        bad = (~torch.isfinite(norm)).float()
        opt.found_inf = bad                # fused AdamW leaves weights and moments alone where found_inf is 1
        opt.step()
        opt.zero_grad(set_to_none=True)
        self.skipped += bad
        self.in_a_row.add_(1).mul_(bad)
        torch.maximum(self.worst, self.in_a_row, out=self.worst)
        for b, good in zip(self.buffers, self.good):
            b.copy_(torch.where(bad > 0, good, b))
            good.copy_(b)
        return norm, 1 - bad

    def restore(self):
        for b, good in zip(self.buffers, self.good):
            b.copy_(good)


# --- Many ranks -------------------------------------------------------------------------------------------


def parallel(module, units, ranks, args):
    """The module as the loop calls it: FSDP2 over `units`, or DDP; compiled in place, so that names stay as
    they are."""
    if args.fsdp:
        return shard(module, units, ranks, args, args.compile)
    if args.compile:
        module.compile()
    if ranks.size > 1:
        return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True,
                                       bucket_cap_mb=200)
    return module


def sync_gradients(module, on):
    """Whether the next backward averages gradients over ranks: what no_sync() switches."""
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = on
    elif hasattr(module, "set_requires_gradient_sync"):         # FSDP2
        module.set_requires_gradient_sync(on)


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batches of all ranks; unlike torch's own it also runs under gloo on CPU."""

    def forward(self, x):                                       # (b,C,H,W)
        return self.over_ranks(x) if self.training and dist.is_initialized() else super().forward(x)

    @torch.compiler.disable                                     # its all_reduce cannot be traced
    def over_ranks(self, x):
        n = x.numel() // x.shape[1] * dist.get_world_size()
        mean = differentiable_all_reduce(x.float().sum((0, 2, 3))) / n      # (C,)
        away = x.float() - mean[:, None, None]
        var = differentiable_all_reduce(away.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(x.dtype)


def shard(module, units, ranks, args, compile=False):
    """FSDP2: every unit gathers its weights when it runs, in bf16 with --dtype bf16; gradients are reduced in
    fp32. On several nodes shards stay within a node and gradients are averaged across nodes (hybrid
    sharding)."""
    if not dist.is_initialized():                               # one process without torchrun
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    shape, names = (ranks.size,), ("shard",)
    if ranks.size > local:
        shape, names = (ranks.size // local, local), ("replicate", "shard")
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if args.dtype == "bf16" else None,
                                  reduce_dtype=torch.float32, cast_forward_inputs=False)      # t stays fp32
    if compile:
        torch._dynamo.config.recompile_limit = 64               # units of one class share compiled code
        for unit in units:                                      # FSDP's hooks stay outside the graph
            unit.forward = torch.compile(unit.forward, dynamic=False)
    for m in (*units, module):
        fully_shard(m, mesh=mesh, mp_policy=policy)
    return module


# One save and one resume for one process, DDP and FSDP, on any number of ranks: the whole state, by name. It
# is gathered tensor by tensor into the first rank's host memory. USiT-3B: 3.1 G parameters x 16 bytes
# (weights, average and two moments in fp32) = 50 GB there, 25 s to write at 2 GB/s while the others wait.

WHOLE = StateDictOptions(full_state_dict=True)                  # on every rank
ON_THE_FIRST = StateDictOptions(full_state_dict=True, cpu_offload=True)     # elsewhere empty


def load_state(module, opt, ckpt, args, ema=None):
    flags = [{name: group[name] for name in ("betas", "weight_decay")} for group in opt.param_groups]
    try:
        model, average, moments = ckpt["model"], ckpt.get("ema") or ckpt["model"], ckpt["optimizer"]
        names = module.state_dict().keys()
        if not (model.keys() == average.keys() == names >= moments["state"].keys() and moments["state"]):
            raise KeyError
        set_state_dict(module, opt, model_state_dict=model, optim_state_dict=moments, options=WHOLE)
        if ema is not None:
            set_model_state_dict(ema, average, options=WHOLE)
    except Exception as e:                                      # of torch there are many kinds
        raise InputError(f"--out {args.out}: its checkpoint is not whole ({type(e).__name__}), or of an "
                         f"older version (commit {ckpt.get('commit')}); pick another --out") from e
    for group, given in zip(opt.param_groups, flags):           # the moments are the run's, these are flags
        group.update(given)


# --- A run ------------------------------------------------------------------------------------------------


PATIENCE = 10                                                   # seconds that a signal waits [ours]


class Run:
    """A run folder: checkpoints, log, progress bar, signals. Every rank makes one; only the first writes."""

    def __init__(self, args, ranks):
        self.args, self.ranks = args, ranks
        self.signalled = self.stop = self.interruptible = False
        self.lock = self.bar = self.wandb = self.saved = None   # saved: the step that ckpt.pt holds
        self.sums, self.data_seconds = {}, 0.0                  # since the last log line
        self.start_step = self.logged = 0                       # of this process; of the last log line
        if ranks.is_main and not args.bench:
            self.lock = lock(make_folder(args.out))
            if args.wandb:
                name = os.path.basename(os.path.abspath(args.out))
                self.wandb = import_wandb().init(project=args.wandb, name=name, dir=args.out,
                                                 config=vars(args))
        for s in (signal.SIGTERM, signal.SIGINT):
            signal.signal(s, self.on_signal)

    def on_signal(self, number, frame):
        if self.signalled or self.args.bench:
            raise KeyboardInterrupt
        if self.bar is None:                                    # nothing is lost before the first step
            sys.exit(f"stopped by a signal; {self.where()}")
        self.signalled = True
        self.stop = self.ranks.size == 1                        # several ranks agree in log()
        signal.signal(signal.SIGALRM, self.on_alarm)
        signal.alarm(PATIENCE)

    def on_alarm(self, number, frame):
        if self.interruptible:
            sys.exit(f"stopped by a signal while waiting; {self.where()}")

    @contextmanager
    def waiting(self):
        """Around what may take for ever, but holds nothing that a checkpoint needs: a signal ends it after
        PATIENCE seconds."""
        self.interruptible = True
        if self.signalled:
            signal.alarm(PATIENCE)
        try:
            yield
        finally:
            self.interruptible = False

    def where(self):
        path, held = f"{self.args.out}/ckpt.pt", "was not yet written"
        if self.saved is not None:
            held = f"holds step {self.saved}"
        elif os.path.exists(path):
            held = "is as it was"
        return f"{path} {held}; the same command goes on"

    def resume(self, kind, **must_match):
        """The last checkpoint in --out, or None; `must_match` are entries that it must agree with, by flag.
        The logs lose what is beyond it. A damaged ckpt.pt is set aside."""
        if self.args.bench:
            return None
        last, before = f"{self.args.out}/ckpt.pt", f"{self.args.out}/ckpt_prev.pt"
        if not os.path.exists(last) and not os.path.exists(before):
            self.trim_logs(-1)
            return None
        file, ckpt = open_weights(self.args.out, ("ckpt.pt", "ckpt_prev.pt"))
        for name, value in {"kind": kind, **must_match}.items():
            if ckpt.get(name) != value:
                raise InputError(f"--out {self.args.out}: its checkpoint has another {name}; {name} "
                                 f"{ckpt.get(name)!s:.20}, not {value!s:.20}; same flags, or another --out")
        for name, type_ in dict(step=int, skipped=int, args=dict, scale=float).items():
            if not isinstance(ckpt.get(name), type_):
                raise InputError(f"--out {self.args.out}: its checkpoint has no usable {name}; another --out")
        self.saved = ckpt["step"]
        self.trim_logs(self.saved)
        self.ranks.wait()                                       # every rank has read it
        if file.name == "ckpt_prev.pt" and self.ranks.is_main:
            if os.path.exists(last):
                os.replace(last, f"{self.args.out}/ckpt_damaged.pt")
            os.replace(before, last)
        changed = [flag for flag, value in vars(self.args).items() if flag not in ("steps", "out")
                   and None not in (value, ckpt["args"].get(flag)) and value != ckpt["args"][flag]]
        note = f"; changed since: {', '.join(changed)}" if changed else ""
        self.ranks.print0(f"resuming {file} at step {self.saved}{note}")
        return ckpt

    def trim_logs(self, step):
        """Whole lines up to `step`, of all that a run appends to: what a kill left beyond it comes again."""
        for name in ("log.jsonl", "eval.jsonl", "fid.jsonl") if self.ranks.is_main else ():
            path = f"{self.args.out}/{name}"
            if os.path.exists(path):
                with open(path, errors="replace") as f:
                    lines = [line for line in f if step_of(line) <= step]
                with open(path + ".tmp", "w") as f:
                    f.writelines(lines)
                os.replace(path + ".tmp", path)

    def append(self, name, line):
        if self.ranks.is_main:
            with open(f"{self.args.out}/{name}", "a") as f:
                f.write(json.dumps(line, allow_nan=False) + "\n")
            if self.wandb and name == "log.jsonl":
                self.wandb.log(line, step=line["step"])

    def has(self, name, step):
        """Whether a log has a line of this step."""
        return any(line["step"] == step for line in read_log(self.args.out, name))

    def publish(self, step, path):
        """After an evaluation: its picture to --wandb; curves.png."""
        if self.wandb:
            self.wandb.log({"pictures": import_wandb().Image(path)}, step=step)
        if self.ranks.is_main:
            draw_curves(self.args.out)

    def owes(self, step, there, at_start=False):
        """Whether an evaluation is due before this step, at the start or because a signal or a kill cut it
        off."""
        due = self.due(step, self.args.eval_every) and (step > 0 or at_start)
        return due and self.ranks.any(not there)

    def finished(self, step):
        if step < self.args.steps:
            return False
        self.ranks.print0(f"{self.args.out} already holds step {step}; a larger --steps goes on")
        self.unlock()
        return True

    def unlock(self):
        if self.lock:
            self.lock.close()

    def may_save(self, done, guard, forward, *inputs):
        """Whether a checkpoint may be written: its weights give a finite output on these inputs, and the last
        step was taken. InputError where the run ends here."""
        # nothing is compiled for this pass
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), autocast(self.args, self.ranks):
            output = forward(*inputs)
        output = output[0] if isinstance(output, tuple) else output
        guard.restore()                                         # BatchNorm's statistics
        if hasattr(forward, "reshard"):                         # FSDP2's root waits for a backward pass
            forward.reshard()
        finite = output.float().square().mean().isfinite().item()
        if not self.ranks.any(not finite or guard.in_a_row > 0):
            return True
        if self.stop or done == self.args.steps:
            raise InputError(f"step {done} was not saved: its loss or weights are not finite (lower --lr, or "
                             f"--dtype fp32); {self.where()}")
        return False

    def save(self, kind, step, net, ema, opt, guard, **more):
        model, optimizer = get_state_dict(net, opt, options=ON_THE_FIRST)
        average = get_model_state_dict(ema, options=ON_THE_FIRST) if ema else None
        if self.ranks.is_main:
            state = {"kind": kind, "step": step, "model": model, "ema": average, "optimizer": optimizer,
                     **more, "skipped": int(guard.skipped), "args": vars(self.args), "commit": commit(),
                     "torch": str(torch.__version__)}
            write_checkpoint(state, f"{self.args.out}/ckpt.pt", keep=f"{self.args.out}/ckpt_prev.pt")
        self.saved = step
        self.ranks.wait()

    def steps(self, start_step):
        """Counts steps under a progress bar."""
        self.bar = tqdm(total=self.args.steps, initial=start_step, unit="step", dynamic_ncols=True,
                        disable=not self.ranks.is_main, mininterval=0.2 if sys.stderr.isatty() else 10)
        self.start_step = self.logged = start_step
        self.since = time.time()
        for step in range(start_step, self.args.steps):
            if self.args.bench and step == self.args.steps - self.args.timed:
                self.since = synchronized_time()
            yield step
            self.bar.update()

    def due(self, done, every):
        return bool(every) and (done % every == 0 or done == self.args.steps)

    def next(self, stream):
        start = time.time()
        with self.waiting():
            batch = next(stream)
        self.data_seconds += time.time() - start
        return batch

    def add(self, weight=1.0, **terms):
        """Device scalars for the next log line, as weighted sums; non-finite ones are left out. No host
        sync."""
        for name, value in terms.items():
            value = value.detach().float()
            pair = torch.stack([value, torch.ones_like(value)]) * weight    # (2,): sum, weight
            self.sums[name] = self.sums.get(name, 0.0) + pair.where(pair.isfinite().all(), 0.0)

    def log(self, step, guard, **facts):
        """Every --log_every steps: average over steps and ranks, append to log.jsonl, show; agree whether to
        stop."""
        done = step + 1
        due = done % self.args.log_every == 0 or done in (self.start_step + 1, self.args.steps)
        if self.args.bench or not due:
            return
        terms, seconds = self.averages(), time.time() - self.since
        speed = (done - self.logged) * self.args.batch_size / seconds
        line = {"step": done, **terms, **facts, "skipped": int(guard.skipped),
                "img_per_s": float(f"{speed:.4g}"), "wait": round(self.data_seconds / seconds, 3)}
        self.append("log.jsonl", line)
        text = (f"loss {terms.get('loss', math.nan):.4f}, {speed:.3g} img/s, wait {line['wait']:.0%}, "
                f"skipped {line['skipped']}")
        self.bar.set_postfix_str(text, refresh=done == self.start_step + 1)
        self.sums, self.data_seconds, self.since, self.logged = {}, 0.0, time.time(), done
        self.stop = self.ranks.any(self.signalled)
        if guard.worst >= 10:
            raise InputError(f"10 steps in a row had a non-finite loss (lower --lr, or --dtype fp32); "
                             f"{self.where()}")

    def averages(self):
        names = sorted(self.sums)
        sums = self.ranks.mean(torch.stack([self.sums[name] for name in names]))  # (terms, 2)
        return {name: float(f"{s / w:.6g}") for name, (s, w) in zip(names, sums.tolist()) if w > 0}

    def close(self):
        self.until = synchronized_time()
        self.bar.close()
        self.unlock()
        signal.alarm(0)
        if self.stop:
            self.ranks.print0(f"stopped by a signal; {self.where()}")

    def bench_line(self, name, macs, **facts):
        """Of the last steps; share_of_peak counts 3 x forward MACs against the chip's dense bf16 data-sheet
        rate."""
        args = self.args
        seconds = (self.until - self.since) / args.timed
        tflops = 3 * 2 * macs * args.batch_size / self.ranks.size / seconds / 1e12
        device, gib = "cpu", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if self.ranks.device.type == "cuda":
            device, gib = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() / 2**30
        peak = 989 if re.search("H100 80GB|H200$", device) else None    # TFLOP/s, H100 and H200 [data sheet]
        return self.ranks.print_line({
            "model": name, "img_per_s": args.batch_size / seconds, "step_ms": seconds * 1e3,
            "tflops": tflops, "share_of_peak": peak and tflops / peak, "peak_gib": gib, **facts,
            "batch_size": args.batch_size, "dtype": args.dtype, "compile": args.compile,
            "ranks": self.ranks.size, "device": device, "torch": str(torch.__version__),
            "python": sys.version.split()[0], "commit": commit()})


def read_log(folder, name):
    """The lines of log.jsonl and the like, as dicts; none where there is no such file."""
    path = f"{folder}/{name}"
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [json.loads(line) for line in f]


def step_of(line):
    """Of a line of a log; of half a line more than any."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, LookupError, TypeError):
        return math.inf


PANELS = {"loss and its parts": "loss|l1|lpips|g|d",            # of curves.png: names in the logs
          "loss by c'": r"loss_c\d+",
          "loss by quarter of the time axis": r"loss_t\d",
          "PSNR by c', or distance of samples": r"psnr_c\d+|fid"}


def draw_curves(folder):
    """All logs of a run -> curves.png, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = read_log(folder, "log.jsonl") + read_log(folder, "fid.jsonl")
    for line in read_log(folder, "eval.jsonl"):
        psnr = {f"psnr_c{row['c_prime']}": row["psnr"] for row in line["table"]}
        lines.append(psnr | {"step": line["step"]})
    curves = defaultdict(list)                                  # name -> [(step, value), ...]
    for line in lines:
        for name, value in line.items():
            curves[name].append((line["step"], value))
    panels = {}
    for title, pattern in PANELS.items():
        if names := [name for name in curves if re.fullmatch(pattern, name)]:
            panels[title] = sorted(names, key=lambda name: (len(name), name))   # by number
    if not panels:
        return
    figure = Figure((6 * len(panels), 4), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for name in panels[title]:
            axes.plot(*zip(*curves[name]), label=name)
        axes.set(title=title, xlabel="step")
        axes.legend()
    figure.savefig(f"{folder}/curves.png")


def import_wandb():
    try:
        import wandb
    except ImportError:
        raise InputError("--wandb: needs one more package: pip install wandb") from None
    return wandb


def commit():
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        return subprocess.run(["git", "-C", folder, "rev-parse", "--short", "HEAD"],
                              capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


# --- Cost without running: --dry_run ----------------------------------------------------------------------


def cost(loss, net, checkpointed=()):
    """(forward MACs, bytes of activations kept for the backward pass, fp32) of loss(), with `net` on the meta
    device. MACs are FLOPs / 2 of torch's counter: convolutions and matrix products, as the papers count.
    checkpointed: modules of which all inputs are kept, and at a time one module's activations."""
    kept, unit = Counter(), None                                # bytes of each unit; None: of all outside
    seen = {p.untyped_storage()._cdata for p in net.parameters()}       # weights and their views do not count

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            kept[unit] += storage.nbytes()
        return x

    def enter(module, args):
        nonlocal unit
        unit = module
        kept[None] += args[0].untyped_storage().nbytes()

    def leave(*_):
        nonlocal unit
        unit = None

    for module in checkpointed:
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    saved = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with FlopCounterMode(display=False) as flops, saved:
        loss()
    return flops.get_total_flops() // 2, kept.pop(None, 0) + max(kept.values(), default=0)


def print_estimate(args, ranks, name, net, macs, activation_bytes, copies):
    """One JSON line for --gpus ranks. Memory of a rank = 4 bytes x (weights, gradients, Adam's two moments,
    average) + activations of a micro-batch; `copies`: of all weights, besides gradients and moments. Days: 3
    x forward cost. tests/README.md compares it with measured memory."""
    parameters = sum(p.numel() for p in net.parameters())
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    images = math.ceil(args.batch_size / (args.gpus * args.accumulate))        # of a micro-batch
    memory = 4 * (copies * parameters + 3 * trainable) / (args.gpus if args.fsdp else 1)
    if args.dtype == "bf16":
        memory += 2 * parameters + 0.5 * activation_bytes * images
    else:
        memory += activation_bytes * images
    flops = 3 * 2 * macs * args.batch_size * args.steps         # backward = 2 x forward
    days = flops / (args.gpus * args.tflops * 1e12) / 86400
    return ranks.print_line({
        "model": name, "parameters": parameters, "trainable": trainable, "forward_gmacs": macs / 1e9,
        "memory_gib_per_rank": memory / 2**30, "batch_size": args.batch_size, "steps": args.steps,
        "gpus": args.gpus, "tflops_per_gpu": args.tflops, "days": days})


if __name__ == "__main__":
    script(main)
    end_ranks()
