"""Stage 2: train a diffusion model on an autoencoder's latents, with DC-AE 1.5's augmented training.

    python train_diffusion.py --toy                             # minutes on a laptop CPU
    torchrun train_diffusion.py --ae out/dc-ae-1.5-f64c128 --model USiT-H --data imagenet/train
    torchrun --nproc_per_node 8 train_diffusion.py --ae dc-ai/dc-ae-1.5-f64c128 --model USiT-2B --fsdp ...
The same command again goes on from the last checkpoint in --out. --no-augment: ordinary training, a baseline.

Images are encoded once, plain and mirrored, into a memory-mapped cache of raw latents; training reads that.
Recipes per family are those of the official trainer (RECIPES); the paper's batch is 1024, 500,000 steps.
Ranks, data order, guard, checkpoints and log are train_ae.py's, in its second half.
Letters: B images of a batch, b of a micro-batch on a rank, c latent channels, c' = c_prime kept, (h, w) grid.
"""

import copy
import functools
import hashlib
import itertools
import json
import math
import os
import re
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import fid
from ae import (InputError, checksum, evenly_spaced, file_size, fingerprint, lock, open_autoencoder,
                open_images, patiently, read_bytes, read_json, save_grid, script, to_uint8, within, write,
                writing)
from diffusion import (DROP, MIRROR, MODELS, NOISE, SETTINGS, TIME, build, draw_t, forward_macs, gaussian,
                       training_loss, uniform)
from sample import generate
from train_ae import (COUNT, SHARE, SIZE, Guard, Run, Stream, adamw, autocast, batches, cost, draw_channels,
                      ema_update, end_ranks, learning_rate, load_state, loader, loss_names, parallel,
                      parse_flags, print_estimate, random_batch, sample_numbers, set_lr, settings_line,
                      settle_batch, shard, start_ranks, sync_gradients, training_channels, training_flags)


RECIPES = {  # defaults of the flags by family [DC-Gen projects/DC-AE.md @cae2205, batch 1024]
    "DiT": dict(lr=2e-4, weight_decay=0.0, betas=(0.9, 0.999), warmup=0),
    "SiT": dict(lr=2e-4, weight_decay=0.0, betas=(0.9, 0.999), warmup=0),   # none published: DiT's [ours]
    "UViT": dict(lr=2e-4, weight_decay=0.03, betas=(0.99, 0.99), warmup=5000),
    "USiT": dict(lr=1e-4, weight_decay=0.0, betas=(0.99, 0.99), warmup=5000),
}
WARMUP_START = 6.4e-6                                           # the warm-up's first rate [DC-Gen]
TOY = dict(ae="out/toy-ae", model="SiT-T", max_images=8192, batch_size=32, steps=5000, lr=2e-3,
           betas=(0.9, 0.99), clip=1.0, warmup=100, cooldown=4000, ema=0.995, ema_warmup=100, save_every=1000,
           eval_every=2500, log_every=25, out="out/toy-diffusion")
BENCH_DATA = SimpleNamespace(num_classes=1000, classes=[], scale=1.0)   # --bench: no images, no cache

# ----------------------------------------------------------------------------------------------------------
# The training step


def main(argv=None):
    args = parse(argv)                                          # flag > --toy > the family's recipe
    ranks = start_ranks()
    ae, c, size = configure(args, ranks)                        # ae: None for --bench and --dry_run
    if args.dry_run:
        return dry_run(args, ranks, c, size)
    with writing("--out", args.out):
        return train(args, ranks, ae, c, size)


def train(args, ranks, ae, c, size):
    # toy: its training set; a folder: no random crops, as each image is encoded once
    data = BENCH_DATA if args.bench else open_images(args.data, args.image_size, train=args.data == "toy")
    reference = Reference(args, ranks) if args.fid and args.eval_every else None
    run = Run(args, ranks)

    # The network, its average, its optimiser
    torch.manual_seed(args.seed)
    net = build_network(args, c, size, data.num_classes).to(ranks.device)
    announce(args, ranks, net)
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    net.checkpointing = args.checkpointing
    forward = parallel(net, net.layers(), ranks, args)          # compiled; DDP or FSDP2
    forward.objective = net.objective                           # DDP hides it, and Eq. (2) asks for it
    if args.fsdp:
        shard(ema, ema.layers(), ranks, args)                   # like the weights; it is never compiled
    opt = adamw(parameter_groups(net, args.weight_decay), args.lr, args.betas, args.weight_decay)
    params = [p for p in net.parameters() if p.requires_grad]

    # Where the run stands
    start_step = 0
    must_match = dict(config=net.config, channels=args.channels, ae_hash=ae and fingerprint(ae),
                      image_size=args.image_size, classes=list(data.classes))
    if ckpt := run.resume("diffusion", **must_match):
        start_step = ckpt["step"]
        load_state(net, opt, ckpt, args, ema)
    guard = Guard(ranks.device, ckpt)                           # skips non-finite steps
    ckpt = None                                                 # gives its memory back
    owed = run.owes(start_step, os.path.exists(preview_file(args, start_step)))
    if not owed and run.finished(start_step):
        return
    latents = BENCH_DATA if args.bench else cache_latents(args, ae, ranks, data)
    if reference:
        reference.measure()                                     # opened above: a wrong one is refused early
    if owed:                                                    # a preview that a kill cut off
        evaluate(run, start_step, ema, ae, latents, reference)

    # The loop
    shape = c, size, size
    stream = random_batch(args, ranks, *shape) if args.bench else batches(latents, args, ranks, start_step)
    for step in run.steps(start_step):
        lr = set_lr(opt, learning_rate(step, args, WARMUP_START))
        c_prime = draw_channels(args.channels, args.seed, step)  # one for all ranks and micro-batches

        for micro in range(args.accumulate):
            z, y = run.next(stream)                             # raw latents (b,c,h,w), labels (b,)
            numbers = sample_numbers(step, micro, args, ranks)
            n = torch.arange(numbers.start, numbers.stop, device=ranks.device)      # (b,): the random keys
            u = uniform(len(n), args.seed, TIME, n)             # (b,) in [0,1)
            t = draw_t(net, u)                                  # (b,): time
            noise = gaussian(z.shape, args.seed, NOISE, n)      # (b,c,h,w)
            if latents.num_classes:
                dropped = uniform(len(n), args.seed, DROP, n) < args.label_dropout
                y = torch.where(dropped, latents.num_classes, y)  # the null label

            sync_gradients(forward, micro == args.accumulate - 1)  # ranks average in the last one only
            z = z.float() * latents.scale                       # to rms 1
            with autocast(args, ranks):
                # DC-AE 1.5 Eq. (2): || mask * target - mask * net(mask * z_t, t, y) ||^2, over kept entries
                loss = training_loss(forward, z, y, c_prime, t, noise, reduction="none")  # (b,)
            mean = loss.mean()
            (mean / args.accumulate).backward()

            run.add(**{name: mean for name in loss_names(c, args.channels, c_prime)})
            add_quarters(run, loss.detach().float(), u)

        grad_norm, taken = guard.step(opt, params, args.clip)   # taken: 0 where a step was skipped
        run.add(grad_norm=grad_norm)
        ema_update(ema, net, args.ema, args.ema_warmup, step + 1, taken)
        run.log(step, guard, lr=lr, c_prime=c_prime)

        done, stop = step + 1, run.stop                         # read once: a signal may come at any line
        if stop or run.due(done, args.save_every):
            if run.may_save(done, guard, forward, z, t, y):
                run.save("diffusion", done, net, ema, opt, guard, **must_match, scale=latents.scale,
                         ae=absolute(args.ae))
        if stop:
            break
        if run.due(done, args.eval_every):
            evaluate(run, done, ema, ae, latents, reference)
    run.close()
    if args.bench:
        return run.bench_line(args.model, forward_macs(net), latent=list(shape))


def add_quarters(run, loss, u):
    """To the log: the mean of loss (b,) in each quarter of the time axis, u (b,) in [0,1)."""
    for quarter in range(4):
        here = ((u * 4).long() == quarter).float()
        mean = (loss * here).sum() / here.sum()                 # nan where none is: add() leaves it out
        run.add(weight=here.sum(), **{f"loss_t{quarter}": mean})


def absolute(x):
    """A path, so that it is found from any folder; a name on a hub as it is."""
    return os.path.abspath(x) if os.path.exists(x) else x


def parameter_groups(net, weight_decay):
    """No decay for names with norm.weight or bias; norm1 and norm2 are decayed, as officially [DC-Gen]."""
    decayed, others = [], []
    for name, p in net.named_parameters():
        if p.requires_grad:
            (others if "norm.weight" in name or "bias" in name else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


# ----------------------------------------------------------------------------------------------------------
# The latent cache: latents.npy float16 (2, N, c, h, w), raw, plain and mirrored; labels.npy (N,); done.npy, a
# checksum for each chunk, 0 where it is not yet encoded; manifest.json, what all was made from

CHUNK = 512                                                     # pictures under one checksum [ours]
HASHED = 256                                                    # files whose bytes are compared [ours]


class Latents:
    """get_batch(indices, keys) -> raw z (b,c,h,w) float16, y (b,); the mirror image is drawn from (seed,
    key). InputError: a chunk that is read for the first time does not have its checksum."""

    def __init__(self, folder, seed=0, held=None):
        # held: the lock of the run that has filled it; closing it would drop the run's own, if --out is here
        self.folder, self.seed, self.held = folder, seed, held
        self.manifest = read_json(Path(folder, "manifest.json"))
        self.num_classes = self.manifest["num_classes"]
        chunks = len(self.arrays["done"])
        self.checked = torch.zeros(chunks, dtype=torch.bool).share_memory_()    # among loader processes
        rows = np.arange(0, len(self), max(1, len(self) // 2048))
        rms = float(np.sqrt(np.square(self.arrays["latents"][0, rows], dtype=np.float32).mean()))
        self.scale = self.manifest["scale"]
        broken = not 0 < rms < math.inf
        if self.scale == 1 or broken:                           # rms decides: its rows must be whole
            self.check(rows)
        if broken:
            raise InputError(f"--cache {folder}: latents of rms {rms}; is the autoencoder trained?")
        if self.scale == 1:                                     # the autoencoder knows none
            self.scale = 1 / rms

    def __len__(self):
        return self.manifest["count"]

    @functools.cached_property
    def arrays(self):
        return open_arrays(self.folder, self.manifest)

    def __getstate__(self):                                     # every process opens the arrays itself
        return {name: x for name, x in self.__dict__.items() if name not in ("arrays", "held")}

    def get_batch(self, indices, keys):
        indices = np.asarray(indices)
        self.check(indices)
        u = uniform(len(keys), self.seed, MIRROR, torch.as_tensor(keys))
        mirrored = (u < 0.5).long().numpy()
        z = torch.from_numpy(self.arrays["latents"][mirrored, indices])
        return z, torch.from_numpy(self.arrays["labels"][indices])

    def check(self, rows):
        """The chunks of these rows that no process has checked. Where one is damaged, all that are lose their
        mark."""
        chunks = rows // CHUNK
        new = np.unique(chunks[~self.checked.numpy()[chunks]])
        if all(map(self.is_whole, new)):
            self.checked[new] = True
            return
        damaged = [k for k in range(len(self.checked)) if not self.is_whole(k)]
        for k in damaged:
            with suppress(OSError):
                write_rows(f"{self.folder}/done.npy", k, np.zeros(1, np.uint32))
        raise unusable(self.folder, f"{len(damaged)} chunks are damaged",
                       "the same command encodes them again, or ")

    def is_whole(self, k):
        part = slice(k * CHUNK, (k + 1) * CHUNK)
        latents, labels, done = self.arrays.values()
        return checksum(*latents[:, part], labels[part]) == done[k]


def cache_latents(args, ae, ranks, data):
    """The images' latents through the ADM crop, encoded where that is not yet done; ranks take chunks in
    turn. Finished chunks are marked, so that a killed run goes on."""
    indices = evenly_spaced(data, args.max_images)
    side = args.image_size // ae.config.f
    manifest = {"format": 2,                                    # 1: without checksums
                "ae_hash": fingerprint(ae),
                "crop": "adm",
                "image_size": args.image_size,
                "count": len(indices),
                "shape": [ae.config.c, side, side],
                "scale": ae.scale,
                "num_classes": data.num_classes,
                "classes": list(data.classes)}
    files = [data.files[i] for i in indices] if hasattr(data, "files") else []
    held = problem = None
    if ranks.is_main:
        try:
            held = open_cache(args, manifest, files)
        except InputError as e:
            problem = e
    if ranks.any(problem is not None):
        raise problem or InputError("--cache: the first rank says why")
    fill_cache(args, ae, ranks, data, indices)
    ranks.wait()
    return Latents(args.cache, args.seed, held)


def open_cache(args, manifest, files):
    """On the first rank: a cache that is there must have been made from the same things, wherever they now
    lie; else a new one is laid out. Returns its lock where something is left to encode."""
    folder, path = args.cache, Path(args.cache, "manifest.json")
    manifest["files"] = digest_files(args.data, files)
    new = not os.path.exists(path)
    if not new:
        have = read_json(path)
        if wrong := [name for name in manifest if have.get(name) != manifest[name]]:
            raise unusable(folder, f"made with another {', '.join(wrong)}")
        if open_arrays(folder, manifest)["done"].all():
            return None                                         # reading alone needs no lock
    with writing("--cache", folder):
        os.makedirs(folder, exist_ok=True)
        try:
            held = lock(folder)
        except InputError:
            raise unusable(folder, "another run is filling it", "wait for it, or ") from None
        if new:
            where = os.path.abspath(args.data) if files else "toy"
            lay_out(folder, manifest | {"data": where, "dtype": args.dtype})
    return held


def digest_files(root, files):
    """Of pictures below the folder `root`: their names and sizes, and the bytes of some."""
    h = hashlib.sha256()
    with ThreadPool(16) as pool:                                # a network folder answers slowly
        sizes = pool.imap(functools.partial(patiently, file_size), files, chunksize=1000)
        for file, size in zip(files, sizes):
            name = file.removeprefix(root).lstrip("/")
            h.update(os.fsencode(f"{name}\0{size}\0"))
    for file in files[::max(1, len(files) // HASHED)]:
        h.update(patiently(read_bytes, file))
    return h.hexdigest()


def lay_out(folder, manifest):
    """The empty files, with all their room on the disk; the manifest last."""
    for name, (dtype, shape) in layout(manifest).items():
        path = f"{folder}/{name}.npy"
        np.lib.format.open_memmap(path, "w+", dtype, shape)
        with open(path, "r+b") as f:
            if hasattr(os, "posix_fallocate"):                  # a Mac has none
                os.posix_fallocate(f.fileno(), 0, os.path.getsize(path))
    part = Path(folder, "manifest.json.tmp")
    part.write_text(json.dumps(manifest))
    part.replace(f"{folder}/manifest.json")


def layout(manifest):
    n = manifest["count"]
    return {"latents": (np.float16, (2, n, *manifest["shape"])),
            "labels": (np.int64, (n,)),
            "done": (np.uint32, (math.ceil(n / CHUNK),))}


def open_arrays(folder, manifest):
    """{name: memory map}. InputError: not what the manifest asks for."""
    arrays = {}
    for name, (dtype, shape) in layout(manifest).items():
        path, whole = f"{folder}/{name}.npy", False
        with suppress(Exception):                               # numpy raises many kinds
            if os.path.isfile(path):                            # a pipe would never end
                arrays[name] = x = np.lib.format.open_memmap(path, mode="r")
                whole = x.dtype == dtype and x.shape == shape
        if not whole:
            raise unusable(folder, f"{name}.npy is damaged")
    return arrays


def unusable(folder, what, mend=""):
    return InputError(f"--cache {folder}: {what}; {mend}remove the folder or name another --cache")


@torch.no_grad()
def fill_cache(args, ae, ranks, data, indices, batch_size=64):
    """Encodes this rank's chunks, in the dtype that the cache was begun in."""
    manifest = read_json(Path(args.cache, "manifest.json"))
    done = open_arrays(args.cache, manifest)["done"]
    chunks = {k: indices[k * CHUNK:(k + 1) * CHUNK] for k in range(ranks.rank, len(done), ranks.size)
              if not done[k]}
    order = [rows[i:i + batch_size] for rows in chunks.values() for i in range(0, len(rows), batch_size)]
    stream = iter(loader(Stream(data), order, args.workers, ranks.device))
    bar = tqdm(total=sum(map(len, order)), desc="caching latents", unit="img", dynamic_ncols=True,
               disable=not ranks.is_main or not chunks)
    for k, rows in chunks.items():
        parts = []
        for img, y in itertools.islice(stream, math.ceil(len(rows) / batch_size)):
            img = img.to(ranks.device, non_blocking=True)       # (b,3,H,W)
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=manifest.get("dtype") == "bf16"):
                plain, mirrored = (ae.encode(x).half().cpu() for x in (img, img.flip(3)))    # (b,c,h,w) each
            parts.append((plain, mirrored, y))
            bar.update(len(y))
        with writing("--cache", args.cache):
            write_chunk(args.cache, k, len(indices), parts)
    bar.close()


def write_chunk(folder, k, n, parts):
    plain, mirrored, labels = (torch.cat(batches).numpy() for batches in zip(*parts))
    write_rows(f"{folder}/latents.npy", k * CHUNK, plain)
    write_rows(f"{folder}/latents.npy", k * CHUNK + n, mirrored)
    write_rows(f"{folder}/labels.npy", k * CHUNK, labels)
    write_rows(f"{folder}/done.npy", k, np.array([checksum(plain, mirrored, labels)], np.uint32))


def write_rows(path, start, values):
    """Rows of a .npy file."""
    offset = np.load(path, mmap_mode="r").offset
    write(path, offset + start * values[0].nbytes, values.tobytes())


# ----------------------------------------------------------------------------------------------------------
# Pictures and scores along the way, from the averaged weights


class Reference:
    """--fid: what samples are compared with, and the network that looks at both."""

    def __init__(self, args, ranks):
        self.args = args
        size = None if args.fid.endswith(".npz") else args.image_size
        num = args.fid_num if args.fid == "toy" else None
        self.side = fid.open_side(args.fid, num, size)
        size = self.side.size
        if size and tuple(size) != (args.image_size, args.image_size):
            raise InputError(f"--fid {args.fid}: pictures of {size[0]} px, the samples have "
                             f"{args.image_size}; name another")
        self.extractor = fid.load_extractor(args.inception, args.features, ranks.device)

    def measure(self):
        self.statistics = fid.measure(self.side, self.extractor, ("fid",), workers=self.args.workers)


def preview_file(args, step):
    return f"{args.out}/samples_{step:07d}.png"


@torch.no_grad()
def evaluate(run, done, ema, ae, latents, reference):
    """With --fid a line in fid.jsonl, then a PNG at fixed seeds and classes: convergence by eye."""
    classes = max(1, latents.num_classes)
    with run.waiting():
        if reference and not run.has("fid.jsonl", done):
            score(run, done, ema, ae, latents, reference)
        if run.ranks.is_main or run.args.fsdp:                  # FSDP: all ranks gather weights
            z = sample_latents(run, ema, torch.arange(40) % classes)
    if run.ranks.is_main:
        pixels = torch.cat([to_uint8(ae.decode(part / latents.scale)) for part in z.split(8)])
        columns = min(10, latents.num_classes or 10)
        path = preview_file(run.args, done)
        save_grid(pixels, path, columns)
        run.publish(done, path)


def score(run, done, ema, ae, latents, reference):
    """Samples against the reference, straight from the sampler."""
    num, ranks = run.args.fid_num, run.ranks
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(max(1, latents.num_classes), (num,), generator=generator)

    def batches_of_pixels():
        for index in torch.arange(ranks.rank, num, ranks.size).split(50):
            z = sample_latents(run, ema, labels[index], index)
            yield to_uint8(ae.decode(z / latents.scale))
    scores = fid.score(batches_of_pixels(), reference.statistics, reference.extractor, ("fid", "is"),
                       allow_small=True, total=num)
    run.append("fid.jsonl", {"step": done, **scores})
    ranks.print0(f"step {done}: {scores['name']} {scores['fid']:.3f}")


def sample_latents(run, ema, labels, index=None):
    """Latents for these labels. Under --fsdp all ranks must take the same steps, as Heun's solver does."""
    solver = "heun" if run.args.fsdp and ema.objective == "flow" else None
    with autocast(run.args, run.ranks):
        z = generate(ema, labels, seed=run.args.seed, solver=solver, index=index)
    if hasattr(ema, "reshard"):                                 # FSDP2's root waits for a backward pass
        ema.reshard()
    return z


# ----------------------------------------------------------------------------------------------------------
# Flags of this stage


def parse(argv=None):
    p = training_flags("Train a diffusion model on autoencoder latents, with augmented diffusion training.")
    add = p.add
    add("--ae", str, None,
        "autoencoder: run folder, file, published name, or a diffusers AutoencoderKL folder")
    add("--model", str, "USiT-H", "one of " + ", ".join(MODELS))
    add("--patch", within(int, 1, 64), 1, "patch size; 1 for DC-AE latents, 2 for f8 autoencoders")
    add("--image_size", SIZE, None, "pixels; else the autoencoder's training size")
    add("--augment", bool, True,
        "augmented diffusion training (Eq. 2); --no-augment: ordinary, whatever --channels says")
    add("--depth", within(int, 1, 1000), None, "in place of the model's depth")
    add("--hidden", SIZE, None, "in place of the model's width")
    add("--heads", SIZE, None, "in place of the model's heads")
    add("--label_dropout", SHARE, 0.1, "share of labels replaced by the null label")
    add("--cache", str, None, "folder of cached latents; else in the autoencoder's run folder, or under out/")
    add("--max_images", COUNT, None, "use so many images, evenly spaced; built-in images: 50,000")
    add("--fid", str, None,
        "with every preview, score samples against this folder or .npz", metavar="REFERENCE")
    add("--fid_num", within(int, 2, 2**31), 10_000, "samples of that score, divisible by the ranks")
    add("--c", SIZE, None, "latent channels of --bench and --dry_run without --ae")
    add("--size", SIZE, None, "latent side of --bench and --dry_run without --ae")
    p.set_defaults(steps=500_000, clip=0.0, ema=0.9999)         # no clipping [DC-Gen]

    def recipe(args):
        if args.model not in MODELS:
            raise InputError(f"--model {args.model}: unknown; one of {', '.join(MODELS)}")
        max_images = 50_000 if args.data == "toy" else None
        return RECIPES[args.model.split("-")[0]] | {"max_images": max_images}
    return parse_flags(p, recipe, TOY, argv)


def configure(args, ranks):
    """Settle the flags that depend on the autoencoder, and check them. Returns (autoencoder, c, latent
    side)."""
    settle_batch(args, ranks, per_cuda_rank=128)                # 8 GPUs: 1024 [paper Sec. 4.1]
    if args.fid and args.fid_num % ranks.size:
        raise InputError(f"--fid_num {args.fid_num}: not divisible by {ranks.size} ranks")
    ae, c, size = open_latent_space(args)
    args.channels = training_channels(args, c, ranks) if args.augment else [c]
    with torch.device("meta"):                                  # what it refuses, it refuses now
        build_network(args, c, size, num_classes=1000)
    if args.out is None:
        patch = f"-p{args.patch}" if args.patch > 1 else ""
        f = f"f{ae.config.f}" if ae else ""
        plain = "-no-augment" if set(args.channels) == {c} else ""
        args.out = f"out/{args.model}{patch}-{f}c{c}x{size}{plain}"
    if ae:
        ae.to(ranks.device).requires_grad_(False)
        if args.cache is None:
            home = args.ae if os.path.isdir(args.ae) else f"out/latents-{fingerprint(ae)[:8]}"
            args.cache = f"{home}/latents-{os.path.basename(os.path.abspath(args.data))}-{args.image_size}"
    return ae, c, size


# ----------------------------------------------------------------------------------------------------------
# The network that the flags ask for, and its cost


def open_latent_space(args):
    """(autoencoder, c, latent side); --bench and --dry_run need no autoencoder, numbers or a name are
    enough."""
    free = args.bench or args.dry_run
    name = re.search(r"f([1-9]\d*)c([1-9]\d*)", args.ae or "")
    if free and args.c and args.size:
        return None, args.c, args.size
    if free and name and not os.path.exists(args.ae):
        f, c = int(name[1]), int(name[2])
        return None, c, (args.image_size or 512) // f
    if args.ae is None:
        also = ", or give --c and --size" if free else ""
        raise InputError(f"--ae: name the autoencoder (run folder, file or published name){also}")
    ae = open_autoencoder(args.ae)
    args.image_size = args.image_size or ae.info.get("image_size") or 256
    if args.image_size % (ae.config.f * args.patch):
        raise InputError(f"--image_size {args.image_size}: not a multiple of f x patch = "
                         f"{ae.config.f} x {args.patch}")
    return ae, ae.config.c, args.image_size // ae.config.f


def build_network(args, c, size, num_classes):
    dims = {name: getattr(args, name) for name in SETTINGS if getattr(args, name)}
    return build(args.model, c=c, size=size, num_classes=num_classes, patch=args.patch, **dims)


def announce(args, ranks, net):
    """The model line."""
    million = sum(p.numel() for p in net.parameters()) / 1e6
    gmacs = forward_macs(net) / 1e9
    c, size = net.config["c"], net.config["size"]
    source = f" of {args.ae}" if args.ae else ""
    ranks.print0(f"training {args.model}, {million:.1f} M parameters, {gmacs:.2f} GMACs, "
                 f"{net.config['num_classes']} classes, latents {c}x{size}x{size}{source}, "
                 f"{settings_line(args, ranks, c)}")


def dry_run(args, ranks, c, size):
    with torch.device("meta"):
        net = build_network(args, c, size, num_classes=1000)
        z = torch.empty(1, c, size, size)
        t = torch.empty(1)
        y = torch.empty(1, dtype=torch.long)
    announce(args, ranks, net)
    units = net.layers() if args.checkpointing else ()
    macs, activations = cost(lambda: net(z, t, y).square().mean(), net, units)
    return print_estimate(args, ranks, args.model, net, macs, activations, copies=2)    # 2: with the average


if __name__ == "__main__":
    script(main)
    end_ranks()
