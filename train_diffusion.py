"""Stage 2: train a diffusion model on the latents of an autoencoder, with augmented diffusion training (DC-AE 1.5).

    python train_diffusion.py --toy                                            # minutes on a laptop CPU
    torchrun train_diffusion.py --ae out/dc-ae-1.5-f64c128 --model USiT-H --data imagenet/train --image_size 512
    torchrun --nproc_per_node 8 train_diffusion.py --ae dc-ai/dc-ae-f64c128-1.5 --model USiT-2B --data imagenet/train --fsdp
The same command again goes on from the last checkpoint in --out. --no-augment gives ordinary training, the baseline.

Images are encoded once, plain and mirrored, into a memory-mapped cache of raw latents; training reads only that.
Recipes per family are those of the official trainer (RECIPES); the paper's batch is 1024, 500,000 steps.
Ranks, data order, checkpoints, guard and log are train_ae.py's. Shapes: B batch, c channels, h w latent side.
"""

import argparse
import copy
import glob
import json
import math
import os
import re
import shutil
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import diffusion
import fid
from ae import InputError, fingerprint, open_autoencoder, open_images, save_grid, to_uint8
from sample import generate
from train_ae import (Guard, InOrder, Run, adamw, autocast, batches, bench, commit, cost, draw_channels, estimate, eval_channels,
                      fill_machine_flags, learning_rate, load, parse_flags, settle_channels, shard, spread, start_ranks, training_flags)

RECIPES = {  # family: lr, weight decay, betas, warm-up steps [DC-Gen projects/DC-AE.md @cae2205, batch 1024]
    "DiT": (2e-4, 0.0, (0.9, 0.999), 0),
    "SiT": (2e-4, 0.0, (0.9, 0.999), 0),            # none published at this batch: DiT's [ours]
    "UViT": (2e-4, 0.03, (0.99, 0.99), 5000),
    "USiT": (1e-4, 0.0, (0.99, 0.99), 5000),
}
WARMUP_START = 6.4e-6       # first learning rate of the warm-up [DC-Gen]
TOY = dict(ae="out/toy-ae", model="SiT-T", max_images=8192, batch_size=32, steps=5000, lr=2e-3, betas=(0.9, 0.99), clip=1.0, warmup=100,
           cooldown=4000, ema=0.995, ema_warmup=100, save_every=1000, eval_every=2500, log_every=25,
           out="out/toy-diffusion")

# ----------------------------------------------------------------------------------------------------------------------
# The latent cache


class Latents:
    """Raw latents on disk: latents.npy float16 (2, N, c, h, w), plain and mirrored; labels.npy (N,); manifest.json.
    get_batch(indices, keys) -> (z (b,c,h,w) float16, y (b,)); the mirror is drawn from (seed, key)."""

    def __init__(self, folder, seed=0):
        with open(f"{folder}/manifest.json") as f:
            self.manifest = json.load(f)
        self.latents = np.load(f"{folder}/latents.npy", mmap_mode="r")
        self.labels = np.load(f"{folder}/labels.npy")
        self.seed = seed
        rms = float(np.sqrt(np.square(self.latents[0, :: max(1, len(self.labels) // 2048)], dtype=np.float32).mean()))
        if not 0 < rms < math.inf:
            raise InputError(f"--cache {folder}: latents of rms {rms}; is the autoencoder trained?")
        self.scale = self.manifest["scale"] if self.manifest["scale"] != 1 else 1 / rms     # 1: the autoencoder knows none

    def __len__(self):
        return len(self.labels)

    def get_batch(self, indices, keys):
        mirror = (diffusion.uniform(len(keys), self.seed, 3, torch.as_tensor(keys)) < 0.5).numpy().astype(int)
        return torch.from_numpy(self.latents[mirror, np.asarray(indices)]), torch.from_numpy(self.labels[np.asarray(indices)])


def write_rows(path, first, values):
    """Rows of a .npy file, by plain writes: those of several nodes never clobber a page, as memory maps would over NFS."""
    offset = np.load(path, mmap_mode="r").offset
    with open(path, "r+b") as f:
        f.seek(offset + first * values[0].nbytes)
        f.write(values.tobytes())


@torch.no_grad()
def cache_latents(folder, ae, ae_hash, data_name, image_size, num, batch_size, ranks, args):
    """Encode the first `num` images through the ADM crop, plain and mirrored; all ranks write, a chunk each in turn.
    Finished chunks are marked, so that a killed run goes on; a manifest that disagrees is an error."""
    builtin = data_name in (None, "toy")
    data = open_images(data_name or "toy", image_size, train=builtin)          # built-in: pictures that no evaluation shows
    numbers = spread(data, num)
    n = len(numbers)
    manifest = {"ae_hash": ae_hash, "data": "toy" if builtin else os.path.abspath(data_name), "crop": "adm",
                "image_size": image_size, "count": n, "shape": [ae.config.c, image_size // ae.config.f, image_size // ae.config.f],
                "scale": ae.scale, "num_classes": data.num_classes, "classes": list(data.classes)}
    path = f"{folder}/manifest.json"
    if os.path.exists(path):
        with open(path) as f:
            have = json.load(f)
        wrong = [k for k in manifest if have.get(k) != manifest[k]]
        if wrong:
            raise InputError(f"--cache {folder}: made with another {', '.join(wrong)}; remove the folder or name another --cache"[:199])
    chunk, chunks = 512, math.ceil(n / 512)
    if ranks.first and not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        for name, shape, dtype in (("latents", (2, n, *manifest["shape"]), np.float16), ("labels", (n,), np.int64), ("done", (chunks,), np.uint8)):
            np.lib.format.open_memmap(f"{folder}/{name}.npy", "w+", dtype, shape).flush()
        with open(path + ".tmp", "w") as f:
            json.dump(manifest, f)
        os.replace(path + ".tmp", path)
    dist.barrier() if ranks.size > 1 else None
    done = np.load(f"{folder}/done.npy", mmap_mode="r")
    todo = [k for k in range(ranks.rank, chunks, ranks.size) if not done[k]]
    order = [range(i, min(i + batch_size, (k + 1) * chunk, n)) for k in todo for i in range(k * chunk, min(n, (k + 1) * chunk), batch_size)]
    with tqdm(total=sum(map(len, order)), desc="caching latents", unit="img", disable=not ranks.first or not todo, dynamic_ncols=True) as bar:
        for rows, (x, y) in zip(order, load(InOrder(data, numbers), order, args.workers, ranks.device)):
            x = x.to(ranks.device, non_blocking=True)
            with autocast(args, ranks):
                for mirrored in (0, 1):
                    z = ae.encode(x.flip(3) if mirrored else x)                                    # (b,c,h,w)
                    write_rows(f"{folder}/latents.npy", mirrored * n + rows[0], z.half().cpu().numpy())
            write_rows(f"{folder}/labels.npy", rows[0], y.numpy())
            if rows[-1] + 1 in (n, (rows[0] // chunk + 1) * chunk):
                write_rows(f"{folder}/done.npy", rows[0] // chunk, np.ones(1, np.uint8))
            bar.update(len(rows))
    dist.barrier() if ranks.size > 1 else None
    return Latents(folder, args.seed)


# ----------------------------------------------------------------------------------------------------------------------
# The training step


class DiffusionStep(nn.Module):
    """One forward of the training step, the module that ranks wrap: per-sample losses (B,) of Eq. 2."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, z, y, t, noise, c_prime):
        return diffusion.training_loss(self.net, z, y, c_prime=c_prime, t=t, noise=noise, reduction="none")


@torch.no_grad()
def ema_update(ema, net, decay, warmup, step, taken):
    """ema <- ema + (1 - d) (net - ema), d = decay (1 - exp(-step / warmup)), step from 1 [DC-Gen: 0.9999, 2000].
    `taken` is 0.0 on the device where the step was skipped."""
    rate = (1 - decay * (1 - math.exp(-step / warmup))) * taken
    local = lambda p: p.to_local() if hasattr(p, "to_local") else p                # FSDP2: each rank its own shard
    for e, p in zip(ema.parameters(), net.parameters()):
        local(e).lerp_(local(p), rate.to(e.dtype))


def parameter_groups(net, weight_decay):
    """No decay for names with norm.weight or bias, as the official trainer has it [DC-Gen]."""
    named = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    skip = [("norm.weight" in n or "bias" in n) for n, _ in named]
    return [{"params": [p for (_, p), s in zip(named, skip) if not s], "weight_decay": weight_decay},
            {"params": [p for (_, p), s in zip(named, skip) if s], "weight_decay": 0.0}]


def parse(argv=None):
    p = training_flags("Train a diffusion model on autoencoder latents, with augmented diffusion training.")
    a = p.add_argument
    a("--ae", help="autoencoder: run folder, file, published name, or a diffusers AutoencoderKL folder")
    a("--model", default="USiT-H", help="one of " + ", ".join(diffusion.MODELS))
    a("--patch", type=int, default=1, help="patch size; 1 for DC-AE latents, 2 for f8 autoencoders")
    a("--image_size", type=int, help="pixels. Default: the autoencoder's training size")
    a("--channels", help="c' of Eq. 2: 16:128:4, 16,32,64, or one number. Default: 16,20,...,c [paper Sec. 4.1], --toy c/8,c/4,c/2,c")
    a("--augment", action=argparse.BooleanOptionalAction, default=True, help="augmented diffusion training (Eq. 2); --no-augment: ordinary")
    a("--depth", type=int, help="overrides the model's depth")
    a("--hidden", type=int, help="overrides the model's width")
    a("--heads", type=int, help="overrides the model's heads")
    a("--ema", type=float, default=0.9999, help="decay of the weight average that samples are drawn from")
    a("--ema_warmup", type=float, default=2000.0, help="time constant in steps over which that decay sets in")
    a("--label_dropout", type=float, default=0.1, help="share of labels replaced by the null label")
    a("--checkpointing", action="store_true", help="recompute activations in the backward pass: less memory, a third more work")
    a("--cache", help="folder of cached latents. Default: in the autoencoder's run folder, or under out/")
    a("--max_images", type=int, help="use the first N images only; built-in images: 50,000")
    a("--fid", metavar="REFERENCE", help="with every preview, score samples against this folder or .npz (see fid.py)")
    a("--fid_num", type=int, default=10_000, help="samples of that score, divisible by the ranks")
    a("--inception", default="default", help="its network: default, random or a file, as in fid.py")
    a("--features", help="its network: an exported one, as in fid.py")
    a("--c", type=int, help="latent channels of --bench and --dry_run without --ae")
    a("--size", type=int, help="latent side of --bench and --dry_run without --ae")
    p.set_defaults(clip=0.0)                                                     # official: no clipping [DC-Gen]
    return parse_flags(p, TOY, argv)


def main(argv=None):
    args = parse(argv)
    ranks = start_ranks()
    if args.model not in diffusion.MODELS:
        raise InputError(f"--model {args.model}: unknown; one of {', '.join(diffusion.MODELS)}"[:199])
    builtin = args.data in (None, "toy")
    if not builtin and not args.dry_run and not os.path.isdir(args.data):
        raise InputError(f"--data {args.data}: no such folder")
    family = args.model.split("-")[0]
    lr, weight_decay, betas, warmup = RECIPES[family]
    args.lr = lr if args.lr is None else args.lr
    args.betas = tuple(args.betas or betas)
    args.weight_decay = weight_decay if args.weight_decay is None else args.weight_decay
    args.warmup = warmup if args.warmup is None else args.warmup
    args.steps = args.steps or 500_000                                           # [DC-Gen projects/DC-AE.md]
    args.eval_every = 5000 if args.eval_every is None else args.eval_every
    fill_machine_flags(args, ranks, batch_per_cuda_rank=128)                     # 8 GPUs: 1024 [paper Sec. 4.1]

    if args.fid and args.fid_num % ranks.size:
        raise InputError(f"--fid_num {args.fid_num}: not divisible by {ranks.size} ranks")
    free = args.bench or args.dry_run                                            # needs no autoencoder
    published = re.search(r"f(\d+)c(\d+)", args.ae or "")
    ae = None
    if free and args.c and args.size:
        c, size = args.c, args.size
    elif free and published and not os.path.exists(args.ae):
        c, size = int(published[2]), (args.image_size or 512) // int(published[1])
    elif args.ae is None:
        raise InputError("--ae: name the autoencoder (run folder, file or published name)" + (", or give --c and --size" if free else ""))
    else:
        ae = open_autoencoder(args.ae)
        ae = ae.to(ranks.device).requires_grad_(False)
        args.image_size = args.image_size or ae.info.get("image_size") or 256
        if args.image_size % (ae.config.f * args.patch):
            raise InputError(f"--image_size {args.image_size}: not a multiple of f x patch = {ae.config.f} x {args.patch}")
        c, size = ae.config.c, args.image_size // ae.config.f
    args.channels = settle_channels(args, c, ranks) if args.augment else [c]
    rows = eval_channels(c, args.channels)
    augmented = set(args.channels) != {c}
    f = f"f{ae.config.f}" if ae is not None else ""
    args.out = args.out or f"out/{args.model}{'-p%d' % args.patch if args.patch > 1 else ''}-{f}c{c}x{size}{'' if augmented else '-no-augment'}"
    overrides = {k: getattr(args, k) for k in ("depth", "hidden", "heads") if getattr(args, k)}

    num_classes, latents = 1000, None
    if not free:
        ae_hash = fingerprint(ae)
        args.max_images = args.max_images or (50_000 if builtin else None)
        args.cache = args.cache or os.path.join(args.ae if os.path.isdir(args.ae) else f"out/latents-{ae_hash[:8]}",
                                                f"latents-{'toy' if builtin else os.path.basename(os.path.abspath(args.data))}-{args.image_size}")
        latents = cache_latents(args.cache, ae, ae_hash, args.data, args.image_size, args.max_images, 64, ranks, args)
        num_classes = latents.manifest["num_classes"]
    with torch.device("meta"):
        shadow = diffusion.build(args.model, c=c, size=size, num_classes=num_classes, patch=args.patch, **overrides)
    parameters = sum(p.numel() for p in shadow.parameters())
    macs = diffusion.forward_macs(shadow)
    ranks.say(f"training {args.model}, {parameters / 1e6:.1f} M parameters, {macs / 1e9:.2f} GMACs, on latents {c}x{size}x{size}"
              + (f" of {args.ae}, {'built-in toy images' if builtin else args.data}" if latents else "")
              + f", {num_classes} classes, global batch {args.batch_size}, "
              + (f"augmented: c' from {args.channels[0]} to {args.channels[-1]} ({len(set(args.channels))} values)" if augmented else "not augmented")
              + f", lr {args.lr:g}, {args.dtype} on {ranks.size} x {ranks.device.type}, {args.out}")
    if args.dry_run:
        z, t = torch.empty(1, c, size, size, device="meta"), torch.empty(1, device="meta")
        y = torch.empty(1, dtype=torch.long, device="meta")
        shadow.checkpointing = args.checkpointing
        _, activations = cost(lambda z, t: shadow(z, t, y).square().mean(), (z, t), shadow.parameters())
        line = estimate(args, args.model, parameters, sum(p.numel() for p in shadow.parameters() if p.requires_grad), macs, activations, copies=2)
        print(json.dumps(line)) if ranks.first else None
        return line

    torch.manual_seed(args.seed)
    net = diffusion.build(args.model, c=c, size=size, num_classes=num_classes, patch=args.patch, **overrides).to(ranks.device)
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    net.checkpointing = args.checkpointing
    if args.fsdp:
        shard(net, net.layers(), ranks, args, args.compile), shard(ema, ema.layers(), ranks, args)
    opt = adamw(parameter_groups(net, args.weight_decay), args.lr, args.betas, args.weight_decay)
    params = [p for p in net.parameters() if p.requires_grad]
    forward = DiffusionStep(torch.compile(net) if args.compile and not args.fsdp else net)
    if ranks.size > 1 and not args.fsdp:
        forward = DistributedDataParallel(forward, broadcast_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=200)
    guard = Guard(ranks.device)
    scale = latents.scale if latents else 1.0
    micro_batch = args.batch_size // (ranks.size * args.accumulate)

    def train_step(step, next_batch):
        """One optimiser step; every random number is a function of (seed, global sample number)."""
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, args, WARMUP_START)
        c_prime = draw_channels(args.channels, args.seed, step)
        logs = {}
        for micro in range(args.accumulate):
            z, y = next_batch()
            z = z.float() * scale                                                # raw -> rms 1
            n = step * args.batch_size + (ranks.rank * args.accumulate + micro) * micro_batch
            n = torch.arange(n, n + micro_batch, device=ranks.device)            # global sample numbers
            noise = diffusion.gaussian(z.shape, args.seed, 0, n, device=ranks.device)
            u = diffusion.uniform(micro_batch, args.seed, 1, n, device=ranks.device)
            if num_classes:
                drop = diffusion.uniform(micro_batch, args.seed, 2, n, device=ranks.device) < args.label_dropout
                y = torch.where(drop, num_classes, y)
            last = micro == args.accumulate - 1
            if args.fsdp:
                net.set_requires_gradient_sync(last)
            with nullcontext() if last or args.fsdp or ranks.size == 1 else forward.no_sync():
                with autocast(args, ranks):
                    loss = forward(z, y, diffusion.draw_t(net, u), noise, c_prime)          # (b,)
                (loss.mean() / args.accumulate).backward()
            loss = loss.detach().float()
            values = {"loss": (loss.sum(), micro_batch)}
            values |= {f"loss_t{i}": ((loss * bin).sum(), bin.sum())
                       for i, bin in enumerate((u * 4).long()[None] == torch.arange(4, device=u.device)[:, None])}
            if augmented:
                values[f"loss_c{next(k for k in rows if k >= c_prime)}"] = (loss.sum(), micro_batch)
            for k, (s, w) in values.items():
                logs[k] = (logs[k][0] + s, logs[k][1] + w) if k in logs else (s, w)
        norm, taken = guard.step(opt, params, args.clip)
        ema_update(ema, net, args.ema, args.ema_warmup, step + 1, taken)
        return {**logs, "grad_norm": norm}, c_prime

    if args.bench:
        z = torch.randn(micro_batch, c, size, size, device=ranks.device)
        y = torch.randint(num_classes, (micro_batch,), device=ranks.device)
        line = bench(args, ranks, args.model, lambda i: train_step(i, lambda: (z, y)), macs)
        line["latent"] = [c, size, size]
        print(json.dumps(line)) if ranks.first else None
        return line

    run = Run(args, ranks)
    kept = dict(config=net.config, channels=args.channels, ae_hash=ae_hash, image_size=args.image_size)
    first = 0

    def train_state():
        model, optimizer = get_state_dict(net, opt)
        return {"model": model, "ema": get_model_state_dict(ema), "optimizer": optimizer}

    if ckpt := run.resume("diffusion", **kept):
        first = ckpt["step"]
        if (ckpt["optimizer"] is None) != args.fsdp:
            raise InputError(f"--out {args.out}: was trained {'without' if args.fsdp else 'with'} --fsdp; go on in the same way")
        if args.fsdp:
            state = train_state()
            dcp.load(state, checkpoint_id=f"{args.out}/shards_{first:07d}")
            set_state_dict(net, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            set_model_state_dict(ema, state["ema"])
        else:
            net.load_state_dict(ckpt["model"])
            ema.load_state_dict(ckpt["ema"])
            opt.load_state_dict(ckpt["optimizer"])
        guard.skipped += ckpt["skipped"]
        del ckpt
        if first >= args.steps:
            ranks.say(f"{args.out} already holds step {first}; a larger --steps goes on")
            return

    saved = first

    def save(step):
        """One file that sample.py reads; with --fsdp the train state goes first, sharded, to shards_<step>/ beside it."""
        nonlocal saved
        if args.fsdp:
            dcp.save(train_state(), checkpoint_id=f"{args.out}/shards_{step:07d}")
            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            model, average, optimizer = get_model_state_dict(net, options=whole), get_model_state_dict(ema, options=whole), None
        else:
            model, average, optimizer = net.state_dict(), ema.state_dict(), opt.state_dict()
        run.save({"kind": "diffusion", **kept, "model": model, "ema": average, "optimizer": optimizer, "step": step,
                  "scale": scale, "ae": os.path.abspath(args.ae) if os.path.exists(args.ae) else args.ae, "classes": latents.manifest["classes"],
                  "skipped": int(guard.skipped), "args": vars(args), "commit": commit(), "torch": str(torch.__version__)})
        if args.fsdp and ranks.first:
            for old in set(glob.glob(f"{args.out}/shards_*")) - {f"{args.out}/shards_{s:07d}" for s in (saved, step)}:
                shutil.rmtree(old)
        saved = step

    how = {"solver": "heun"} if args.fsdp and net.objective == "flow" else {}          # FSDP: all ranks take the same steps

    def preview(step):
        """PNG at fixed seeds and classes, from the averaged weights: convergence by eye."""
        labels = torch.arange(40) % num_classes if num_classes else torch.zeros(40, dtype=torch.long)
        z = generate(ema, labels, seed=args.seed, **how) if ranks.first or args.fsdp else None       # FSDP: all ranks gather weights
        if ranks.first:
            img = torch.cat([to_uint8(ae.decode(part / scale)) for part in z.split(8)])
            save_grid(img, f"{args.out}/samples_{step:07d}.png", min(10, num_classes or 10))

    @torch.no_grad()
    def score(step):
        """--fid: samples of the averaged weights against a reference, straight from the sampler; appended to fid.jsonl."""
        nonlocal reference
        labels = torch.randint(max(1, num_classes), (args.fid_num,), generator=torch.Generator().manual_seed(0))

        def pictures():
            for index in torch.arange(ranks.rank, args.fid_num, ranks.size).split(50):
                z = generate(ema, labels[index], index=index, seed=args.seed, **how)
                yield to_uint8(ae.decode(z / scale))
        if isinstance(reference, str):
            size = None if reference.endswith(".npz") else args.image_size
            reference = fid.measure(fid.open_side(reference, args.fid_num if reference == "toy" else None, size), extractor, ("fid", "is"),
                                    workers=args.workers)
        result = {"step": step, **fid.score(pictures(), reference, extractor, ("fid", "is"), allow_small=True, total=args.fid_num)}
        if ranks.first:
            with open(f"{args.out}/fid.jsonl", "a") as f:
                f.write(json.dumps(result) + "\n")
        ranks.say(f"step {step}: {result['name']} {result['fid']:.3f}")

    reference, extractor = args.fid, fid.load_extractor(args.inception, args.features, ranks.device) if args.fid else None
    stream = batches(latents, args, ranks, first)
    for step in run.steps(first):
        logs, c_prime = train_step(step, lambda: run.next(stream))
        run.log(step, guard, logs, lr=learning_rate(step, args, WARMUP_START), c_prime=c_prime)
        done, stop = step + 1, run.stop                                   # read once: a signal may come at any line
        if done % args.save_every == 0 or done == args.steps or stop:
            save(done)
        if stop:
            break
        if args.eval_every and (done % args.eval_every == 0 or done == args.steps):
            preview(done)
            if args.fid:
                score(done)
    if stop:
        ranks.say(f"stopped by a signal; {args.out}/ckpt.pt holds step {done}; the same command goes on")


if __name__ == "__main__":
    main()
    if dist.is_initialized():                                             # or threads of gloo may end the process badly
        dist.destroy_process_group()
