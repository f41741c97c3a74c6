"""Stage 1: train a DC-AE, with or without the structured latent space of DC-AE 1.5.

    python train_ae.py --toy                                          # minutes on a laptop CPU, nothing to download
    torchrun train_ae.py --c 128 --f 64 --data imagenet/train         # one GPU, phase 1 of the full model
    torchrun --nproc_per_node 8 train_ae.py --phase 2 --init out/dc-ae-1.5-f64c128 --c 128 --f 64 --data imagenet/train
The same command again goes on from the last checkpoint in --out; a larger --steps goes on further.

Three phases (Decoupled High-Resolution Adaptation, DC-AE Sec. 3.3; 1.5 keeps its masks on in all of them):
    1 low-resolution full training        everything        L1 + LPIPS
    2 high-resolution latent adaptation   the middle        L1 + LPIPS
    3 low-resolution local refinement     the decoder head  L1 + LPIPS + PatchGAN
The authors published neither losses, weights, channel list nor optimiser of this stage; every number below says where
it comes from: [paper], [thread] mit-han-lab/efficientvit#143, [community] lavinal712/AutoencoderKL branch dc-ae, [ours].

The first half of this file is the training skeleton that train_diffusion.py uses too. Shapes: B batch, H W pixels.
"""

import argparse
import atexit
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.nn.functional import all_reduce as differentiable_all_reduce
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import fid
from ae import (DCAE, AEConfig, InputError, ToyImages, channel_mask, open_images, parse_channels, read_checkpoint, save_grid,
                to_uint8)

PHASES = {  # phase: trainable tensors (regular expression), default resolution, lr, AdamW betas, weight decay, GAN weight
    1: (r"", 256, 6.4e-5, (0.9, 0.999), 0.1, 0.0),                                        # [community] lr, betas, wd
    2: (r"encoder\.project_out|decoder\.project_in", 512, 1.6e-5, (0.9, 0.999), 0.001, 0.0),  # [community]
    3: (r"decoder\.project_out", 256, 5.4e-5, (0.5, 0.9), 0.0, 0.1),                      # [community]; GAN weight [ours]
}
TOY = dict(f=8, c=32, widths="16,32,32,64", depths="0,1,1,1", image_size=[32], batch_size=16, steps=4500, lr=2e-3, betas=(0.9, 0.99),
           weight_decay=0.01, warmup=50, cooldown=4000, save_every=1000, eval_every=1500, eval_num=256, log_every=25, lpips=0.0,
           out="out/toy-ae")

# ----------------------------------------------------------------------------------------------------------------------
# The training skeleton: ranks, data order, checkpoints, signals, guard, log


@dataclass
class Ranks:
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self):
        return self.rank == 0

    def mean(self, x):
        """Mean over ranks of a tensor, in place (a sum over ranks in fp32, then a division)."""
        if self.size > 1:
            dist.all_reduce(x)
            x /= self.size
        return x

    def say(self, *words):
        if self.first:
            tqdm.write(" ".join(str(w) for w in words))


def start_ranks():
    """One process per GPU under torchrun (gloo on CPU), a single process otherwise."""
    cuda = torch.cuda.is_available()
    rank, size, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    elif "OMP_NUM_THREADS" not in os.environ or size > 1:        # torchrun sets 1 thread for every rank
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=12))      # ranks wait while one decodes or draws
    return Ranks(rank, size, device)


def training_flags(description):
    """Flags of both trainers; values that depend on model or machine are None here and filled by the script."""
    p = argparse.ArgumentParser(description=description, usage="%(prog)s [--flag value ...]   (--help explains each)",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    a = p.add_argument
    a("--toy", action="store_true", help="small preset that a CPU trains in minutes; any flag beside it wins")
    a("--data", help="image folder (class folders, or flat: unconditional), or toy. Default: built-in toy images")
    a("--out", help="run folder: ckpt.pt, log.jsonl, pictures. Default: out/ + a name of the model")
    a("--steps", type=int, help="optimiser steps in total; a larger number goes on from the checkpoint")
    a("--batch_size", type=int, help="global batch, divisible by ranks x accumulate")
    a("--accumulate", type=int, default=1, help="micro-batches per step and rank")
    a("--lr", type=float, help="absolute learning rate, never rescaled")
    a("--betas", type=float, nargs=2, metavar=("B1", "B2"), help="AdamW")
    a("--weight_decay", type=float, help="AdamW")
    a("--warmup", type=int, help="steps of linear warm-up; constant afterwards")
    a("--cooldown", type=int, default=0, help="the last steps, in which the rate falls linearly to 0")
    a("--clip", type=float, default=1.0, help="gradient norm clipping; 0: off")
    a("--seed", type=int, default=0, help="of weights, data order, noise and c'")
    a("--dtype", choices=["bf16", "fp32"], help="autocast; master weights are fp32. Default: bf16 on CUDA, else fp32")
    a("--compile", action=argparse.BooleanOptionalAction, help="torch.compile. Default: on for CUDA")
    a("--save_every", type=int, default=1000, help="steps between checkpoints")
    a("--eval_every", type=int, help="steps between evaluations with pictures; 0: never")
    a("--log_every", type=int, help="steps between log lines: the only host synchronisation, and where ranks agree to stop. Default: CPU 1, CUDA 10")
    a("--workers", type=int, help="data loader processes per rank. Default: CPU 0, CUDA 8")
    a("--bench", action="store_true", help="time the real training step on random inputs; one JSON line, no files")
    a("--dry_run", action="store_true", help="print model, cost and memory; no data, no GPU; one JSON line last")
    a("--fsdp", action="store_true", help="shard weights, moments and average over ranks (FSDP2) instead of copying them (DDP)")
    a("--gpus", type=int, default=8, help="of --dry_run: GPUs, for memory per rank and days")
    a("--tflops", type=float, default=300.0, help="of --dry_run: sustained TFLOP/s per GPU for the days")
    return p


def parse_flags(p, toy, argv=None):
    """--toy replaces the defaults, so that any flag given beside it wins."""
    if p.parse_known_args(argv)[0].toy:
        p.set_defaults(**toy)
    args = p.parse_args(argv)
    least = dict.fromkeys(("steps", "batch_size", "accumulate", "save_every", "log_every", "gpus"), 1)
    least |= dict.fromkeys(("seed", "lr", "weight_decay", "warmup", "cooldown", "clip", "workers", "eval_every"), 0)
    for name, low in least.items():
        if getattr(args, name) is not None and not getattr(args, name) >= low:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least {low}")
    for name in {"betas", "ema", "label_dropout"} & set(vars(args)):
        if not all(0 <= v < 1 for v in np.atleast_1d(getattr(args, name) or 0)):
            raise InputError(f"--{name} {getattr(args, name)}: must lie in [0, 1)")
    return args


def settle_channels(args, c, ranks, known=None):
    """--channels; without it what the checkpoint was trained with, the toy preset's short list, or the paper's list."""
    if args.channels or not (known or args.toy):
        channels = parse_channels(args.channels, c)
    else:
        channels = known or eval_channels(c, [c])
    if channels[-1] < c:
        ranks.say(f"--channels ends at {channels[-1]} of {c}: the channels behind it never train")
    return channels


def fill_machine_flags(args, ranks, batch_per_cuda_rank):
    cuda = ranks.device.type == "cuda"
    args.dtype = args.dtype or ("bf16" if cuda else "fp32")
    args.compile = cuda if args.compile is None else args.compile
    args.log_every = args.log_every or (10 if cuda else 1)
    args.workers = (8 if cuda else 0) if args.workers is None else args.workers
    if args.batch_size is None:
        full = cuda or args.dry_run or getattr(args, "eval_only", False)             # only training is slow on a CPU
        args.batch_size = (batch_per_cuda_rank if full else 1) * args.accumulate * (args.gpus if args.dry_run else ranks.size)
        if not full:
            ranks.say(f"no --batch_size on a CPU: global batch {args.batch_size}, that is 1 per rank and micro-batch")
    if args.batch_size % (ranks.size * args.accumulate):
        raise InputError(f"--batch_size {args.batch_size}: must be divisible by ranks x --accumulate = "
                         f"{ranks.size} x {args.accumulate}")


class Stream(Dataset):
    """The endless training set: sample n is image perm_epoch[n mod N] under augmentation n, whatever rank asks."""

    def __init__(self, data, seed):
        self.data, self.seed, self.epoch = data, seed, None

    def __getitems__(self, samples):
        images = []
        for n in samples:
            epoch, k = divmod(n, len(self.data))
            if epoch != self.epoch:
                self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.data))
            images.append(int(self.order[k]))
        return self.data.get_batch(images, samples)                      # (b,3,H,W), (b,)

    def __len__(self):
        return len(self.data)


def rank_samples(step, args, ranks):
    """Global sample numbers of one step for this rank, a list for each micro-batch."""
    b = args.batch_size // (ranks.size * args.accumulate)
    start = step * args.batch_size + ranks.rank * args.accumulate * b
    return [list(range(start + i * b, start + (i + 1) * b)) for i in range(args.accumulate)]


class InOrder(Dataset):
    """Pictures of a set by number, as they stand: for evaluation and the latent cache."""

    def __init__(self, data, numbers):
        self.data, self.numbers = data, numbers

    def __getitems__(self, rows):
        numbers = [self.numbers[r] for r in rows]
        return self.data.get_batch(numbers, numbers)                     # (b,3,H,W), (b,)

    def __len__(self):
        return len(self.numbers)


def as_is(batch):
    return batch


def ignore_signals(worker):
    """torchrun and Slurm signal whole process groups: the trainer alone decides when to stop."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_workers():
    """At exit, whatever its reason: Python would send SIGTERM to workers that ignore it, and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


def load(dataset, order, workers, device):
    """DataLoader of ready batches, read ahead by `workers` processes into pinned memory; order: lists of item numbers."""
    if workers:
        atexit.register(end_workers)
    return DataLoader(dataset, batch_sampler=order, collate_fn=as_is, num_workers=workers, pin_memory=device.type == "cuda",
                      prefetch_factor=4 if workers else None, worker_init_fn=ignore_signals)


def batches(data, args, ranks, first):
    """Yields (x, y) micro-batches on the device from step `first` on."""
    order = (samples for step in range(first, args.steps) for samples in rank_samples(step, args, ranks))
    for x, y in load(Stream(data, args.seed), order, args.workers, ranks.device):
        yield x.to(ranks.device, non_blocking=True), y.to(ranks.device, non_blocking=True)


def draw_channels(channels, seed, step):
    """c' of this step, uniform over `channels`: one draw for all ranks and micro-batches, a function of (seed, step).
    NOTE differs from DC-Gen, whose ranks draw each their own [DC-Gen aecore/trainer.py @cae2205]."""
    return random.Random(f"{seed} {step}").choice(channels)


def learning_rate(step, args, start=0.0):
    """Of step 0, 1, ...: linear warm-up from `start`, constant, then linearly to 0 over the last --cooldown steps."""
    warm = start + (args.lr - start) * min(1.0, (step + 1) / max(1, args.warmup))
    return warm * min(1.0, (args.steps - step) / max(1, args.cooldown))


class Guard:
    """Steps with a non-finite gradient are skipped and counted on the device, without waiting for it."""

    def __init__(self, device):
        self.skipped, self.in_a_row, self.worst = (torch.zeros((), device=device) for _ in range(3))

    def step(self, opt, params, clip):
        """Clip, then step unless the norm is inf or nan. Returns (gradient norm, 1.0 where the step was taken)."""
        norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if clip:
            nn.utils.clip_grads_with_norm_(params, clip, norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm                # FSDP2: a DTensor
        bad = (~torch.isfinite(norm)).float()
        opt.found_inf = bad                    # fused AdamW leaves weights and moments alone where found_inf is 1
        opt.step()
        opt.zero_grad(set_to_none=True)
        self.skipped += bad
        self.in_a_row.add_(1).mul_(bad)
        torch.maximum(self.worst, self.in_a_row, out=self.worst)
        return norm, 1 - bad


def adamw(params, lr, betas, weight_decay):
    return torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


def shard(net, units, ranks, args, compile=False):
    """FSDP2: every unit gathers its weights when it runs, in bf16 with --dtype bf16; gradients are reduced in fp32. On
    several nodes shards stay within a node and gradients are averaged across nodes (hybrid sharding)."""
    if not dist.is_initialized():                                        # one process without torchrun
        dist.init_process_group("nccl" if ranks.device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    shape, names = ((ranks.size // local, local), ("replicate", "shard")) if ranks.size > local else ((ranks.size,), ("shard",))
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    bf16 = torch.bfloat16 if args.dtype == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32, cast_forward_inputs=False)      # t stays fp32
    if compile:
        torch._dynamo.config.recompile_limit = 64                        # units of one class share its compiled code
        for module in units:                                             # forward alone: FSDP's hooks stay outside the graph
            module.forward = torch.compile(module.forward, dynamic=False)
    for module in (*units, net):
        fully_shard(module, mesh=mesh, mp_policy=policy)


class Run:
    """A run folder: checkpoints, log, progress bar, SIGTERM. Every rank makes one; only the first rank writes."""

    def __init__(self, args, ranks):
        self.args, self.ranks, self.signalled, self.stop = args, ranks, False, False
        self.sums, self.count, self.wait, self.since = {}, 0, 0.0, time.time()
        if ranks.first:
            os.makedirs(args.out, exist_ok=True)
        for s in (signal.SIGTERM, signal.SIGINT):
            signal.signal(s, self.on_signal)

    def on_signal(self, number, frame):
        if self.signalled:
            raise KeyboardInterrupt
        self.signalled = True
        self.stop = self.ranks.size == 1              # several ranks agree on a step first: see log

    def resume(self, kind, **same):
        """The last checkpoint in --out, or None; `same` are entries that it must agree with, by flag."""
        path = next((p for p in (f"{self.args.out}/ckpt.pt", f"{self.args.out}/ckpt_prev.pt") if os.path.exists(p)), None)
        if path is None:
            return None
        ckpt = read_checkpoint(path)
        if ckpt["kind"] != kind:
            raise InputError(f"--out {self.args.out}: holds a checkpoint of kind {ckpt['kind']}, not {kind}; choose another --out")
        for name, value in same.items():
            if ckpt.get(name) != value:
                raise InputError(f"--out {self.args.out}: its checkpoint has another {name}; use the same flags or another --out"[:199])
        changed = [k for k in ("data", "batch_size", "lr", "betas", "weight_decay", "clip", "seed", "lpips", "gan",
                                "label_dropout", "ema") if ckpt["args"].get(k) != getattr(self.args, k, None)]
        self.ranks.say(f"resuming {path} at step {ckpt['step']}" + (f"; changed since: {', '.join(changed)}" if changed else ""))
        return ckpt

    def save(self, state):
        """Write to a temporary file, then rename: a kill at any moment leaves a whole checkpoint."""
        if self.ranks.first:
            path = f"{self.args.out}/ckpt.pt"
            with open(path + ".tmp", "wb") as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
            if os.path.exists(path):
                os.replace(path, f"{self.args.out}/ckpt_prev.pt")
            os.replace(path + ".tmp", path)
        if self.ranks.size > 1:
            dist.barrier()

    def steps(self, first):
        """Counts steps under a progress bar; what the loop body logs goes through self.log."""
        self.bar = tqdm(total=self.args.steps, initial=first, unit="step", disable=not self.ranks.first, dynamic_ncols=True,
                        mininterval=0.2 if sys.stderr.isatty() else 10)
        self.first = self.since_step = first
        self.since = time.time()
        for step in range(first, self.args.steps):
            yield step
            self.bar.update()
        self.bar.close()

    def next(self, iterator):
        start = time.time()
        batch = next(iterator)
        self.wait += time.time() - start
        return batch

    def log(self, step, guard, sums, **facts):
        """Add device scalars to running sums; every --log_every steps average over steps and ranks, print, append.
        `sums` maps name -> (sum, weight) or scalar; entries of weight 0 are left out of the line."""
        scalar = lambda v: v.float() if torch.is_tensor(v) else torch.full((), float(v), device=self.ranks.device)   # no host sync
        pairs = [v if isinstance(v, tuple) else (v, 1.0) for v in sums.values()]
        values = torch.stack([scalar(v) for pair in pairs for v in pair]).detach().view(-1, 2)
        values = values.where(values.isfinite().all(1, keepdim=True), 0.0)                 # a skipped step is not averaged in
        for name, value in zip(sums, values):
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        done = step + 1
        if done % self.args.log_every and done not in (self.first + 1, self.args.steps):
            return
        names = sorted(self.sums)
        flat = torch.stack([self.sums[n] for n in names] + [torch.tensor([float(self.signalled), guard.worst], device=self.ranks.device)])
        flat = self.ranks.mean(flat).tolist()
        stop, worst = flat.pop()
        self.stop = stop > 0
        values = {n: s / w for n, (s, w) in zip(names, flat) if w > 0}
        seconds = time.time() - self.since
        speed = (done - self.since_step) * self.args.batch_size / seconds
        line = {"step": done, **{k: float(f"{v:.6g}") for k, v in values.items()}, **facts,
                "skipped": int(guard.skipped), "img_per_s": float(f"{speed:.4g}"), "wait": round(self.wait / seconds, 3)}
        if self.ranks.first:
            with open(f"{self.args.out}/log.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")
            self.bar.set_postfix_str(f"loss {values.get('loss', float('nan')):.4f}, {speed:.3g} img/s, wait {self.wait / seconds:.0%}"
                                     + (f", skipped {line['skipped']}" if line["skipped"] else ""), refresh=done == self.first + 1)
        self.sums, self.wait, self.since, self.since_step = {}, 0.0, time.time(), done
        if worst >= 10:
            good = f"{self.args.out}/ckpt.pt" if os.path.exists(f"{self.args.out}/ckpt.pt") else "not yet written"
            raise InputError(f"10 steps in a row had a non-finite loss; the last good checkpoint is {good} (lower --lr, or --dtype fp32)")


def autocast(args, ranks):
    return torch.autocast(ranks.device.type, torch.bfloat16) if args.dtype == "bf16" else nullcontext()


def commit():
    try:
        return subprocess.run(["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "--short", "HEAD"],
                              capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def cost(loss_of_batch, inputs, parameters):
    """(forward MACs, bytes of activations kept for the backward pass) of a model on meta tensors; fp32 sizes.
    MACs are FLOPs / 2 of torch's counter, that is convolutions and matrix products only, as in facts of the papers."""
    from torch.utils.flop_counter import FlopCounterMode
    kept, weights = {}, {p.untyped_storage()._cdata for p in parameters}

    def pack(x):
        if x.untyped_storage()._cdata not in weights:                    # views of weights (a transpose, say) too
            kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x
    with FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = loss_of_batch(*inputs)
    del loss
    return flops.get_total_flops() // 2, sum(kept.values())


def estimate(args, name, parameters, trainable, macs, activation_bytes, copies):
    """The --dry_run line, for --gpus ranks. Memory per rank = 4 bytes x (weights + gradients + Adam's two moments + EMA) +
    activations of a micro-batch; `copies`: fp32 copies of all weights besides gradient and moments. Days at 3 x forward cost.
    Measured against this on a CPU: resident memory above an idle process's (README, Speed)."""
    micro = math.ceil(args.batch_size / (args.gpus * args.accumulate))
    scale = 0.5 if args.dtype == "bf16" else 1.0
    state = 4 * (copies * parameters + 3 * trainable) / (args.gpus if args.fsdp else 1)         # --fsdp: a shard each
    memory = state + (2 * parameters if scale < 1 else 0) + scale * activation_bytes * micro
    flops = 3 * 2 * macs * args.batch_size * args.steps             # backward = 2 x forward
    return {"model": name, "parameters": parameters, "trainable": trainable, "forward_gmacs": round(macs / 1e9, 4),
            "memory_gib_per_rank": round(memory / 2**30, 3), "batch_size": args.batch_size, "steps": args.steps,
            "gpus": args.gpus, "tflops_per_gpu": args.tflops,
            "days": round(flops / (args.gpus * args.tflops * 1e12) / 86400, 4)}


def bench(args, ranks, name, step_fn, macs, warmup=5, timed=20):
    """Times the training step; share_of_peak counts 3 x forward MACs against the chip's dense bf16 data-sheet rate."""
    cuda = ranks.device.type == "cuda"
    warmup, timed = (warmup, timed) if cuda else (1, 3)
    for i in range(warmup + timed):
        if i == warmup:
            torch.cuda.synchronize() if cuda else None
            start = time.time()
        step_fn(i)
    torch.cuda.synchronize() if cuda else None
    step_ms = (time.time() - start) / timed * 1e3
    tflops = 6 * macs * args.batch_size / ranks.size / (step_ms * 1e9)
    peak = 989.0 if cuda and re.search("H[12]00", torch.cuda.get_device_name()) else None      # H100 / H200 dense bf16, NVIDIA data sheet
    import resource
    gib = torch.cuda.max_memory_allocated() / 2**30 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"model": name, "img_per_s": round(args.batch_size / step_ms * 1e3, 3), "step_ms": round(step_ms, 3),
            "tflops": round(tflops, 3), "share_of_peak": round(tflops / peak, 4) if peak else None,
            "peak_gib": round(gib, 3), "batch_size": args.batch_size, "dtype": args.dtype, "compile": args.compile,
            "ranks": ranks.size, "device": torch.cuda.get_device_name() if cuda else "cpu", "torch": str(torch.__version__),
            "python": sys.version.split()[0], "commit": commit()}


# ----------------------------------------------------------------------------------------------------------------------
# Losses: L1, LPIPS, PatchGAN


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018) with the lpips package's networks, always in fp32.
    img, rec (B,3,H,W) in [-1,1] -> (B,). The package divides by sqrt(sum x^2) + eps, whose gradient is nan where all
    features are zero; here eps stands inside the root, so that gradients are finite everywhere."""

    def __init__(self, net="vgg", random=False):
        super().__init__()
        import lpips
        file = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}[net]
        try:
            self.metric = lpips.LPIPS(net=net, pnet_rand=random, verbose=False).requires_grad_(False).eval()
        except OSError as e:                                             # no network (URLError), no disk
            raise InputError(f"LPIPS needs {file}: https://download.pytorch.org/models/{file} in {torch.hub.get_dir()}/checkpoints"
                             f"; or --lpips 0") from e

    def forward(self, img, rec):
        with torch.autocast(img.device.type, enabled=False):
            m = self.metric
            distance = 0.0
            for a, b, lin in zip(m.net(m.scaling_layer(img.float())), m.net(m.scaling_layer(rec.float())), m.lins):
                a, b = (x * torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-10) for x in (a, b))
                distance = distance + lin((a - b).square()).mean((1, 2, 3))     # (B,1,h,w) -> (B,)
        return distance


class PatchGAN(nn.Sequential):
    """70 x 70 patch discriminator (Isola et al. 2017): (B,3,H,W) -> logits (B,1,h,w). GroupNorm in place of BatchNorm:
    real and fake then share no statistics, and ranks need no synchronisation [ours]."""

    def __init__(self, width=64):
        layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, stride in ((1, 2), (2, 2), (4, 1)):
            layers += [nn.Conv2d(i * width, 2 * i * width, 4, stride, 1, bias=False), nn.GroupNorm(32, 2 * i * width), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batches of all ranks; unlike torch's own it also runs under gloo on CPU."""

    def forward(self, x):
        return self.over_ranks(x) if self.training and dist.is_initialized() else super().forward(x)

    @torch.compiler.disable                                              # the differentiable all_reduce cannot be traced
    def over_ranks(self, x):
        n = x.numel() // x.shape[1] * dist.get_world_size()
        mean = differentiable_all_reduce(x.float().sum((0, 2, 3))) / n                             # (C,)
        var = differentiable_all_reduce((x.float() - mean[:, None, None]).square().sum((0, 2, 3))) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(x.dtype)


class AutoencoderStep(nn.Module):
    """One forward of the training step, the module that ranks wrap: (img, mask) -> reconstruction, mean of z^2."""

    def __init__(self, ae):
        super().__init__()
        self.ae = ae

    def forward(self, img, mask):
        z = self.ae.encode(img)                                          # (B,c,h,w)
        # DC-AE 1.5 Eq. (1): minimise l(x, D(E(x) * mask_{c,c'})) over a random c' in each step
        rec = self.ae.decode(z * mask)
        return rec, z.detach().float().square().mean()


def select_trainable(ae, phase, train):
    """Freeze all but the tensors that --phase / --train name; returns their names. BatchNorm of a frozen stage stays in
    eval mode, so that its statistics do not move; elsewhere it counts the batches of all ranks."""
    pattern = {"phase": PHASES[phase][0], "all": "", "decoder": r"decoder\."}[train]
    names = []
    for name, p in ae.named_parameters():
        p.requires_grad_(re.match(pattern, name) is not None)
        names += [name] * p.requires_grad
    ae.train()
    for m in ae.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.__class__ = SyncBatchNorm
            m.train(m.weight.requires_grad)
    return names


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation: one row per c'


def eval_channels(c, channels):
    """16, 32, 64, ..., c: doubling from the smallest c' of the list (16 or c/8 without masks)."""
    k, rows = (min(channels) if min(channels) < c else min(16, max(1, c // 8))), []
    while k < c:
        rows, k = rows + [k], 2 * k
    return rows + [c]


def optional_metrics(args, ranks, device):
    """LPIPS (AlexNet, as the published evaluation) and Inception for rFID; what cannot be had is named and left out."""
    found, reasons = {}, []
    for name, make in (("lpips", lambda: LPIPS("alex").to(device)),
                       ("rfid", lambda: fid.load_extractor(args.inception, args.features, device))):
        try:
            found[name] = make()
        except InputError as e:
            reasons.append(f"{name} left out: {e}")
    for line in reasons:
        ranks.say(line)
    return found


def spread(data, num=None):
    """`num` image numbers over all class folders; of the built-in images, whose classes take turns, the first ones."""
    num = min(num or len(data), len(data))
    return list(range(num)) if isinstance(data, ToyImages) else [i * len(data) // num for i in range(num)]


@torch.no_grad()
def evaluate(ae, data, rows, num, batch_size, ranks, metrics, workers=0):
    """PSNR and SSIM on uint8 (data range 255), LPIPS and rFID where at hand: a list of dicts, one for each c' of rows.
    Ranks share the images; pictures are taken through the ADM crop, in eval mode and fp32."""
    device, mine = ranks.device, spread(data, num)[ranks.rank::ranks.size]
    sums = torch.zeros(len(rows), 4, dtype=torch.float64, device=device)                # psnr, ssim, lpips, n
    real, fake = fid.Moments(), {k: fid.Moments() for k in rows}
    order = [range(i, min(i + batch_size, len(mine))) for i in range(0, len(mine), batch_size)]
    for x, _ in tqdm(load(InOrder(data, mine), order, workers, device), desc="evaluating", unit="batch", disable=not ranks.first, leave=False):
        x = x.to(device)
        img, z = to_uint8(x), ae.encode(x)
        if "rfid" in metrics:
            real.update(metrics["rfid"](img)[0])
        for j, k in enumerate(rows):
            rec = ae.decode(z * channel_mask(ae.config.c, k, device))
            out = to_uint8(rec)
            lpips = metrics["lpips"](x, rec.clamp(-1, 1)).sum() if "lpips" in metrics else 0
            sums[j] += torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in
                                    (fid.psnr(img, out).sum(), fid.ssim(img, out).sum(), lpips, len(x))])
            if "rfid" in metrics:
                fake[k].update(metrics["rfid"](out)[0])
    if ranks.size > 1:
        dist.all_reduce(sums)
        for m in (real, *fake.values()):
            m.reduce()
    table = []
    for j, k in enumerate(rows):
        psnr, ssim, lpips, n = sums[j].tolist()
        row = {"c_prime": k, "psnr": psnr / n, "ssim": ssim / n}
        if "lpips" in metrics:
            row["lpips"] = lpips / n
        if "rfid" in metrics:
            row["rfid"] = fid.frechet_distance(real.mean, real.cov, fake[k].mean, fake[k].cov)
        table.append({**row, "n": int(n)})
    return table


def show_table(table, size, metrics):
    names = [k for k in table[0] if k != "n"]
    rfid = f"; rfid: {metrics['rfid'].name}" if "rfid" in metrics else ""
    return "\n".join([f"reconstruction at {size} px, {table[0]['n']} images{rfid}", "".join(f"{n:>9}" for n in names)]
                     + ["".join(f"{row[n]:>9}" if n == "c_prime" else f"{row[n]:>9.3f}" for n in names) for row in table])


@torch.no_grad()
def picture(ae, data, rows, device, path, n=8):
    """PNG: originals, then their reconstructions from the first c' channels, a row for each c'."""
    indices = spread(data, n)
    x = data.get_batch(indices, indices)[0].to(device)
    z = ae.encode(x)
    shown = [x] + [ae.decode(z * channel_mask(ae.config.c, k, device)) for k in rows]
    save_grid(to_uint8(torch.cat(shown)), path, len(indices), rows=["original"] + [f"c' = {k}" for k in rows])


# ----------------------------------------------------------------------------------------------------------------------
# The command


def parse(argv=None):
    p = training_flags("Train a DC-AE (1.5 with masks, or 1.0): phases 1 to 3, decoder-only fine-tuning, evaluation.")
    a = p.add_argument
    a("--val", help="folder for the evaluation. Default: --data through the evaluation crop (toy: pictures never trained on)")
    a("--image_size", type=int, nargs="+", help="pixels, a multiple of f; several only with --eval_only. Default: 256, phase 2: 512")
    a("--f", type=int, help="spatial compression, 2^k >= 4. Default: 32")
    a("--c", type=int, help="latent channels. Default: 128")
    a("--version", choices=["1.5", "1.0"], help="network of DC-AE 1.5 or DC-AE 1.0. Default: 1.5")
    a("--width", type=int, help="base width of every stage; 128 is the published size. Default: 128")
    a("--widths", help="width of each stage, e.g. 16,32,64,64, in place of --width")
    a("--depths", help="blocks of each stage, e.g. 0,1,2,2, for encoder and decoder")
    a("--shortcuts", action=argparse.BooleanOptionalAction, default=True, help="residual autoencoding shortcuts; off for the ablation")
    a("--channels", help="c' of Eq. 1: 16:128:4, 16,32,64 (one given twice is drawn twice as often), or one number; c alone: no masks. "
                         "Default: the checkpoint's, else 16,20,...,c [paper Sec. 4.1] (--toy: c/8,c/4,c/2,c)")
    a("--phase", type=int, choices=[1, 2, 3], default=1, help="1 full training, 2 high-resolution adaptation, 3 GAN refinement")
    a("--init", help="autoencoder to start from (run folder, file, published name); needed by phases 2 and 3")
    a("--train", choices=["phase", "all", "decoder"], default="phase", help="which tensors train; decoder leaves the encoder as it is")
    a("--lpips", type=float, help="weight of LPIPS-VGG. Default: 1 [ours]; 0 with built-in images")
    a("--gan", type=float, help="weight of the PatchGAN hinge loss. Default: 0.1 in phase 3 [ours], else 0")
    a("--disc_warmup", type=int, default=1000, help="steps that the discriminator trains alone before its loss counts [ours]")
    a("--eval_only", action="store_true", help="evaluate --init or the run in --out: one row per c'")
    a("--eval_channels", help="rows of the evaluation. Default: doubling from the smallest c'")
    a("--eval_num", type=int, help="images of an evaluation. Default: 1024 while training, all with --eval_only")
    a("--inception", default="default", help="of rFID: default, random or a file, as in fid.py")
    a("--features", help="of rFID: another feature network, as in fid.py")
    return parse_flags(p, TOY, argv)


def configure(args):
    """The autoencoder's configuration, from --init, the run in --out, or the flags."""
    ints = lambda s, flag: None if s is None else tuple(parse_ints(s, flag))
    source = args.init
    if source is None and args.out and os.path.exists(f"{args.out}/ckpt.pt") and (args.eval_only or args.phase > 1):
        source = args.out
    if source is not None:
        ae = DCAE.from_pretrained(source)
        for flag, have in (("f", ae.config.f), ("c", ae.config.c), ("version", ae.config.version)):
            if getattr(args, flag) not in (None, have):
                raise InputError(f"--{flag} {getattr(args, flag)}: {source} has {flag} {have}; leave the flag out")
        return ae.config, ae
    if args.eval_only or args.phase > 1:
        raise InputError(f"{'--eval_only' if args.eval_only else '--phase ' + str(args.phase)} needs --init CKPT (the run before it)")
    widths, depths = ints(args.widths, "--widths"), ints(args.depths, "--depths")
    given = {k: getattr(args, k) for k in ("f", "c", "version", "width") if getattr(args, k) is not None}
    return AEConfig(**given, shortcuts=args.shortcuts, encoder_widths=widths, decoder_widths=widths, encoder_depths=depths, decoder_depths=depths), None


def parse_ints(text, flag):
    try:
        return [int(v) for v in text.split(",")]
    except ValueError:
        raise InputError(f"{flag} {text}: give whole numbers separated by commas") from None


def main(argv=None):
    args = parse(argv)
    ranks = start_ranks()
    builtin = args.data in (None, "toy")
    if not builtin and not args.dry_run and not os.path.isdir(args.data):
        raise InputError(f"--data {args.data}: no such folder")
    config, ae = configure(args)
    name = f"DC-AE-{config.version}-f{config.f}c{config.c}"
    known = ae.info if ae is not None else {}
    args.channels = settle_channels(args, config.c, ranks, known.get("channels"))
    masks = set(args.channels) != {config.c}
    same = args.eval_only or args.train == "decoder"                             # at the checkpoint's own size
    sizes = args.image_size or [same and known.get("image_size") or PHASES[args.phase][1]]
    for size in sizes:
        if size % config.f or size <= 0:
            raise InputError(f"--image_size {size}: not a multiple of f = {config.f}")
    if len(sizes) > 1 and not args.eval_only:
        raise InputError(f"--image_size {' '.join(map(str, sizes))}: several sizes only with --eval_only")
    _, _, lr, betas, weight_decay, gan = PHASES[args.phase]
    args.lr = lr if args.lr is None else args.lr
    args.betas = tuple(args.betas or betas)
    args.weight_decay = weight_decay if args.weight_decay is None else args.weight_decay
    args.gan = gan if args.gan is None else args.gan
    if args.gan and sizes[0] < 24:
        raise InputError(f"--image_size {sizes[0]}: the discriminator of --gan needs 24 px or more")
    args.lpips = (0.0 if builtin else 1.0) if args.lpips is None else args.lpips
    args.warmup = 1000 if args.warmup is None else args.warmup                   # [ours]
    args.steps = args.steps or 200_000                                           # [ours]
    args.eval_every = 5000 if args.eval_every is None else args.eval_every
    if args.eval_only and args.out is None and os.path.isdir(args.init or ""):
        args.out = args.init
    tags = {f"w{args.widths or args.width}": args.widths or args.width not in (None, 128), f"d{args.depths}": args.depths,
            "no-shortcuts": not config.shortcuts, "plain": not masks, f"phase{args.phase}": args.phase > 1, args.train: args.train != "phase"}
    args.out = args.out or "-".join([f"out/dc-ae-{config.version}-f{config.f}c{config.c}", *(t for t, on in tags.items() if on)]).replace(",", "-")
    fill_machine_flags(args, ranks, batch_per_cuda_rank=16)                      # 16: [ours]

    with torch.device("meta"):
        shadow = DCAE(config)
    parameters = sum(p.numel() for p in shadow.parameters())
    ranks.say(f"{'evaluating' if args.eval_only else 'training'} {name}, {parameters / 1e6:.1f} M parameters, phase {args.phase}, "
              f"on {'built-in toy images' if builtin else args.data}, {'/'.join(map(str, sizes))} px, global batch {args.batch_size}, c' "
              + (f"from {args.channels[0]} to {args.channels[-1]} ({len(set(args.channels))} values)" if masks else "= c: no masks")
              + f", L1 + {args.lpips:g} LPIPS + {args.gan:g} GAN, lr {args.lr:g}, {args.dtype} on {ranks.size} x {ranks.device.type}, {args.out}")
    if args.dry_run or args.bench:
        trainable = select_trainable(shadow, args.phase, args.train)
        img = torch.empty(1, 3, sizes[0], sizes[0], device="meta")
        mask = torch.empty(1, config.c, 1, 1, device="meta")
        macs, activations = cost(lambda x, m: AutoencoderStep(shadow)(x, m)[0].abs().mean(), (img, mask), shadow.parameters())
    if args.dry_run:
        sizes_of = dict(shadow.named_parameters())
        for n in trainable:
            ranks.say(f"  trains {n} {tuple(sizes_of[n].shape)}")
        numel = sum(sizes_of[n].numel() for n in trainable)
        line = estimate(args, name, parameters, numel, macs, activations, copies=1)
        print(json.dumps(line)) if ranks.first else None
        return line

    data = open_images(args.data or "toy", sizes[0], train=True, seed=args.seed) if not (args.eval_only or args.bench) else None
    bins = eval_channels(config.c, args.channels)
    rows = sorted(set(parse_channels(args.eval_channels, config.c))) if args.eval_channels else bins

    torch.manual_seed(args.seed)
    ae = (DCAE(config) if ae is None else ae).to(ranks.device)
    scale = ae.scale
    if ranks.device.type == "cuda" and not args.fsdp:
        ae = ae.to(memory_format=torch.channels_last)

    if args.eval_only:
        metrics, results = optional_metrics(args, ranks, ranks.device), {}
        ae.eval()
        for size in sizes:
            held_out = open_images(args.val or args.data or "toy", size, train=False, seed=args.seed)
            results[size] = evaluate(ae, held_out, rows, args.eval_num if args.eval_num or not builtin else 2048,
                                     args.batch_size // ranks.size, ranks, metrics, args.workers)
            if ranks.first:
                os.makedirs(args.out, exist_ok=True)
                picture(ae, held_out, rows, ranks.device, f"{args.out}/eval_{size}.png")
                print(show_table(results[size], size, metrics))
        if ranks.first:
            with open(f"{args.out}/eval.json", "w") as f:
                json.dump({"ckpt": args.init or args.out, "data": args.val or args.data or "toy", "commit": commit(), "results": results}, f)
            print(json.dumps(results))
        return results

    select_trainable(ae, args.phase, args.train)
    forward = AutoencoderStep(ae)
    if args.fsdp:
        shard(forward, [m for m in (*ae.encoder.stages, *ae.decoder.stages) if len(m)], ranks, args, args.compile)
    elif args.compile:
        forward = torch.compile(forward)
    if ranks.size > 1 and not args.fsdp:
        forward = DistributedDataParallel(forward, broadcast_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=200)
    params = [p for p in ae.parameters() if p.requires_grad]
    opt = adamw(params, args.lr, args.betas, args.weight_decay)
    disc = PatchGAN().to(ranks.device) if args.gan else None
    disc_opt = adamw(disc.parameters(), args.lr, (0.5, 0.9), 0.0) if args.gan else None
    perceptual = LPIPS("vgg").to(ranks.device, memory_format=torch.channels_last) if args.lpips else None
    if perceptual and args.compile:
        perceptual = torch.compile(perceptual)
    z_square = torch.tensor(1 / scale**2, device=ranks.device)            # running mean of z^2; scale = 1 / its root
    guard, disc_guard = Guard(ranks.device), Guard(ranks.device)
    buffers = [b for b in ae.buffers() if b.is_floating_point()]          # BatchNorm statistics

    def train_step(step, next_batch):
        """One optimiser step; `next_batch` gives micro-batches. Returns device scalars for the log."""
        nonlocal z_square
        for o in filter(None, (opt, disc_opt)):
            o.param_groups[0]["lr"] = learning_rate(step, args)
        c_prime = draw_channels(args.channels, args.seed, step)
        mask = channel_mask(config.c, c_prime, ranks.device)
        saved = [b.clone() for b in buffers]
        logs, micro_z = {}, 0.0
        for micro in range(args.accumulate):
            img, _ = next_batch()
            last = micro == args.accumulate - 1
            if args.fsdp:
                forward.set_requires_gradient_sync(last)
            with nullcontext() if last or args.fsdp or ranks.size == 1 else forward.no_sync():
                with autocast(args, ranks):
                    rec, z2 = forward(img, mask)
                rec = rec.float()
                terms = {"l1": (rec - img).abs().mean()}
                loss = terms["l1"]
                if perceptual:
                    terms["lpips"] = perceptual(img, rec).mean()
                    loss = loss + args.lpips * terms["lpips"]
                if disc:
                    disc.requires_grad_(False)                            # no gradient of this player reaches the other
                    terms["g"] = -disc(rec).mean()
                    weight = args.gan if step >= args.disc_warmup else 0.0
                    terms["gan_weight"] = torch.full_like(terms["g"], weight)
                    loss = loss + weight * terms["g"]
                    disc.requires_grad_(True)
                (loss / args.accumulate).backward()
            if disc:
                # hinge loss (Lim & Ye 2017): real logits above 1, fake logits below -1
                real, fake = disc(torch.cat([img, rec.detach()])).chunk(2)
                terms["d"] = (F.relu(1 - real) + F.relu(1 + fake)).mean() / 2
                terms |= {"logits_real": real.mean(), "logits_fake": fake.mean()}
                (terms["d"] / args.accumulate).backward()
            for k, v in {"loss": loss, **terms}.items():
                logs[k] = logs.get(k, 0.0) + v.detach() / args.accumulate
            micro_z = micro_z + z2 / args.accumulate
        logs["grad_norm"], taken = guard.step(opt, params, args.clip)
        if disc:
            for p in disc.parameters():
                ranks.mean(p.grad)
            disc_guard.step(disc_opt, list(disc.parameters()), args.clip)
        for b, old in zip(buffers, saved):                                # a skipped step leaves no trace
            b.copy_(torch.where(taken > 0, b, old))
        if any(p.requires_grad for p in ae.encoder.parameters()):
            z_square = torch.where(taken > 0, torch.lerp(z_square, micro_z, max(0.01, 1 / (step + 1))), z_square)
        if masks:                                                         # loss by c', in bins that double
            logs[f"loss_c{next(k for k in bins if k >= c_prime)}"] = (logs["loss"], 1.0)
        return logs, c_prime

    if args.bench:
        image = torch.randn(args.batch_size // (ranks.size * args.accumulate), 3, sizes[0], sizes[0], device=ranks.device).clamp(-1, 1)
        line = bench(args, ranks, name, lambda i: train_step(i, lambda: (image, None)), macs)
        print(json.dumps(line)) if ranks.first else None
        return line

    run = Run(args, ranks)
    kept = dict(config=asdict(config), phase=args.phase, train=args.train, image_size=sizes[0], channels=args.channels)
    first, before = 0, None
    whole = StateDictOptions(full_state_dict=args.fsdp)                   # by name and not in shards: goes on with or without --fsdp
    if ckpt := run.resume("ae", **kept):
        set_state_dict(ae, opt, model_state_dict=ckpt["model"], optim_state_dict=ckpt["optimizer"], options=whole)
        if disc and not ckpt["disc"]:
            raise InputError(f"--gan: the run in {args.out} has no discriminator; name it by --init, and another --out")
        if disc:
            disc.load_state_dict(ckpt["disc"])
            disc_opt.load_state_dict(ckpt["disc_optimizer"])
        z_square, first, before = ckpt["z_square"].to(ranks.device), ckpt["step"], ckpt["before"]
        guard.skipped += ckpt["skipped"]
        del ckpt
        if first >= args.steps:
            ranks.say(f"{args.out} already holds step {first}; a larger --steps goes on")
            return

    def save(step):
        mean_z = ranks.mean(z_square.clone())                             # ranks saw different images
        model, optimizer = get_state_dict(ae, opt, options=StateDictOptions(full_state_dict=args.fsdp, cpu_offload=args.fsdp))
        run.save({"kind": "ae", **kept, "model": model, "scale": float(mean_z.rsqrt()), "z_square": mean_z.cpu(), "step": step,
                  "optimizer": optimizer, "disc": disc.state_dict() if disc else None,
                  "disc_optimizer": disc_opt.state_dict() if disc else None, "skipped": int(guard.skipped), "before": before,
                  "args": vars(args), "commit": commit(), "torch": str(torch.__version__)})
        return mean_z

    held_out = open_images(args.val or args.data or "toy", sizes[0], train=False, seed=args.seed) if args.eval_every else None
    metrics = optional_metrics(args, ranks, ranks.device) if args.eval_every and not builtin else {}

    def assess(step):
        still = DCAE(config).to(ranks.device).eval()                      # the whole network on every rank
        still.load_state_dict(get_model_state_dict(ae, options=whole))
        table = evaluate(still, held_out, rows, args.eval_num or 1024, args.batch_size // ranks.size, ranks, metrics, args.workers)
        if ranks.first:
            picture(still, held_out, rows, ranks.device, f"{args.out}/recon_{step:07d}.png")
            with open(f"{args.out}/eval.jsonl", "a") as f:
                f.write(json.dumps({"step": step, "table": table}) + "\n")
        ranks.say(f"step {step}: " + show_table(table, sizes[0], metrics))
        return table

    if args.eval_every and args.phase == 3 and not before:
        before = assess(first)
    stream = batches(data, args, ranks, first)
    for step in run.steps(first):
        logs, c_prime = train_step(step, lambda: run.next(stream))
        run.log(step, guard, logs, lr=learning_rate(step, args), c_prime=c_prime)
        done, stop = step + 1, run.stop                                   # read once: a signal may come at any line
        if done % args.save_every == 0 or done == args.steps or stop:
            z_square = save(done)
        if stop:
            break
        if args.eval_every and (done % args.eval_every == 0 or done == args.steps):
            after = assess(done)
    if stop:
        ranks.say(f"stopped by a signal; {args.out}/ckpt.pt holds step {done}; the same command goes on")
    elif before:
        ranks.say("phase 3, before -> after, PSNR per c': "
                  + ", ".join(f"{b['c_prime']}: {b['psnr']:.2f} -> {a['psnr']:.2f}" for b, a in zip(before, after)))


if __name__ == "__main__":
    main()
    if dist.is_initialized():                                             # or threads of gloo may end the process badly
        dist.destroy_process_group()
