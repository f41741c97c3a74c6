"""Does the paper's claim hold at a size that fits? Its experiments, through this repository's commands, with a table each.

    python tests/reproduce.py toy                                                     # no download, no GPU: USiT, one seed
    python tests/reproduce.py toy --models USiT DiT --seeds 0 1 2 --only cure          # three seeds, two families
    python tests/reproduce.py cifar --data cifar/train --val cifar/test --images 50000 # real images: class folders of 32 px
    python tests/reproduce.py texture --texture 0.08 --c 64 --channels 8:64:8 --widths 16,32,32,128 --batch_size 32 \
        --cooldown 0.2 --points 5000 10000 30000 --models SiT --images 50000 --seeds 0 1 2       # the long runs

structure  Table 1, Figures 2, 3, 9, 10: PSNR and feature distance from the first c' channels
cure       Table 5, Figure 5b: {plain, structured latent} x {ordinary, augmented training}, scored along the way
problem    Figure 1b: plain autoencoders of three channel counts, ordinary training on each
small_c    Table 6: neither idea and both where c is small
sizes      Figures 6, 8: neither idea and both, three model sizes

Score: Frechet distance on the features of a small classifier (toy_classifier.py), and the share of samples that it assigns
to the class they were asked for. One autoencoder of each kind (seed 0) serves all seeds of the diffusion models; samples have
seed 0 throughout and are compared with held-out pictures (toy, --texture) or the training set (class folders). The learning
rate is constant, so that every point is the end of a run of that length; with --cooldown every point is a run of its own,
branched off the constant one where its rate begins to fall. Hyper-parameters [ours] are near the toy preset's.
"Gaussian": pictures decoded from a Gaussian with the latents' mean and covariance; only below its distance do samples show
more than linear structure.
Everything lies in out/reproduce/NAME, and finished parts are not run again.
"""

import argparse
import json
import math
import re
import shlex
import shutil
import signal
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import ae
import fid
import sample
import toy_classifier
import train_ae
import train_diffusion
from diffusion import gaussian
from train_ae import commit

AUTOENCODER = "--f 8 --depths 0,1,1,1"
POINTS = [2500, 5000, 10000]                          # training steps at which 1,000 samples are scored
ARMS = {"neither": ("plain", False), "structured": ("structured", False),         # autoencoder, augmented training
        "augmented": ("plain", True), "both": ("structured", True),
        "balanced": ("balanced", True)}                           # both, every latent channel scaled to variance 1 (not in the paper)
# family -> network and solver: small enough that a CPU core takes 20 to 30 steps per second
MODELS = {"USiT": "--model USiT-T --hidden 128 --heads 4", "DiT": "--model DiT-T", "SiT": "--model SiT-T",
          "UViT": "--model UViT-T --hidden 128 --heads 4"}
SOLVERS = {"USiT": "--solver heun --steps 10", "SiT": "--solver heun --steps 10", "DiT": "--steps 50", "UViT": "--steps 20"}
STUDY = ("data", "val", "images", "n", "c", "channels", "widths", "texture", "batch_size", "cooldown")    # one of each per folder
SIZES = {"small": "--hidden 64 --heads 2 --depth 2", "": "", "large": "--hidden 256 --heads 4 --depth 6"}
SMALL = "--lpips 0 --image_size 32 --batch_size 32 --lr 2e-3 --betas 0.9 0.99 " \
        "--weight_decay 0.01 --warmup 50 --steps 4000 --cooldown 3000 --eval_every 0 --save_every 1000 --log_every 50"
DIFFUSION = "--lr 2e-3 --betas 0.9 0.99 --weight_decay 0 --clip 1 --warmup 100 --ema 0.998 --ema_warmup 100 " \
            "--save_every 2500 --eval_every 0 --log_every 100"


def run(module, *flags):
    """A command of this repository, printed so that it can be typed, run in this process."""
    flags = shlex.split(" ".join(shlex.quote(str(f)) if isinstance(f, Path) else str(f) for f in flags))
    print(f"\n$ python {module.__name__}.py {shlex.join(flags)}", flush=True)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    result = module.main(flags)
    for s, handler in handlers.items():                          # trainers take signals, and return when one came
        signal.signal(s, handler)
    if module in (train_ae, train_diffusion) and "--eval_only" not in flags:
        log = Path(flags[flags.index("--out") + 1], "log.jsonl").read_text().splitlines()
        wanted = int(flags[flags.index("--steps") + 1]) if "--steps" in flags else train_ae.TOY["steps"]
        if (step := json.loads(log[-1])["step"]) != wanted:                        # at a signal trainers save and return
            sys.exit("stopped; the same command goes on" if step < wanted else f"--points {wanted}: the run is at step {step} already")
    return result


class Study:
    def __init__(self, args):
        self.args, self.home = args, Path(args.out or f"out/reproduce/{args.name}")
        self.home.mkdir(parents=True, exist_ok=True)
        self.data = Path(args.data) if args.data else "toy"
        self.val = Path(args.val) if args.val else self.data
        settings, path = {k: getattr(args, k) for k in STUDY}, self.home / "study.json"
        if path.exists() and json.loads(path.read_text()) != settings:
            sys.exit(f"{self.home}: made with {path.read_text()}: give the same flags or another --out")
        path.write_text(json.dumps(settings))
        if args.texture:
            self.data, self.val = self.home / "train", self.home / "val"
            textured(self.data, args.texture, args.images, train=True)
            textured(self.val, args.texture, min(10_000, args.images), train=False)

    def rows(self, **match):
        """Finished results: one JSON line each."""
        path = self.home / "results.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [r for r in lines if all(r.get(k) == v for k, v in match.items())]

    def add(self, **row):
        with open(self.home / "results.jsonl", "a") as f:
            f.write(json.dumps({**row, "commit": commit(), "torch": str(torch.__version__)}) + "\n")

    def features(self):
        """The classifier behind both scores, trained once, and the reference statistics of its features."""
        self.network, self.reference = self.home / "features.pt2", self.home / "reference.npz"
        if not self.reference.exists():
            train, val = (ae.open_images(str(x), 32, train=t) for x, t in ((self.data, True), (self.val, False)))
            net = toy_classifier.train(train, steps=600 if self.data == "toy" else 4000)
            self.add(experiment="classifier", accuracy=toy_classifier.accuracy(net, val))
            toy_classifier.export(net, 32, self.network)
            source = self.val if self.args.texture else self.data            # toy: fid.py itself takes held-out ones
            run(fid, source, "--image_size 32 --num", 10_000 if self.data == "toy" else min(10_000, len(train)), "--features", self.network,
                "--save_stats", self.reference)
        self.classifier = torch.export.load(self.network).module()

    def autoencoder(self, kind, c=None, channels=None):
        """Trains, or finds, the structured, plain or balanced autoencoder; returns its run folder."""
        c, channels = c or self.args.c, channels or self.args.channels
        out = self.home / f"ae-{kind}-c{c}"
        if kind == "balanced":
            return out if (out / "ckpt.pt").exists() else balanced(self.autoencoder("structured", c, channels), out, ae.open_images(str(self.data), 32))
        recipe = ["--toy --eval_every 4500"] if self.data == "toy" else ["--data", self.data, SMALL]
        run(train_ae, *recipe, AUTOENCODER, "--widths", self.args.widths, "--c", c, "--channels", channels if kind == "structured" else c, "--out", out)
        return out

    def reconstructions(self, folder, channels):
        table = run(train_ae, "--eval_only --init", folder, "--data", self.data, "--val", self.val, "--image_size 32 --batch_size 100",
                    "--eval_num 2000 --eval_channels", channels, "--features", self.network)
        return table[32]

    def train(self, arm, c=None, channels=None, size=""):
        """Trains the diffusion models of one arm, one for each family and seed, and scores their samples at every point."""
        c, channels = c or self.args.c, channels or self.args.channels
        kind, augmented = ARMS[arm]
        for seed in self.args.seeds:
            for family in self.args.models:
                key = dict(experiment="diffusion", family=family, arm=arm, c=c, size=size, seed=seed)
                points = [p for p in sorted(set(self.args.points)) if not self.rows(**key, step=p)]
                if not points:
                    continue
                folder = self.autoencoder(kind, c, channels)
                self.gaussian(kind, c, folder)
                flags = ("--data", self.data, "--max_images", self.args.images, "--ae", folder, MODELS[family], SIZES[size], DIFFUSION,
                         "--batch_size", self.args.batch_size, f"--channels {channels}" if augmented else "--no-augment", "--seed", seed)
                for step in points:
                    out, constant = self.folder(family, arm, c, size, seed), step - round(step * self.args.cooldown)
                    run(train_diffusion, *flags, "--steps", constant, "--out", out)
                    if constant < step:
                        trunk, out = out, self.folder(family, arm, c, size, seed, step)
                        branch(trunk, out)
                        run(train_diffusion, *flags, "--steps", step, "--cooldown", step - constant, "--out", out)
                    row = self.score(out, family)
                    if augmented and kind != "plain":                    # the coarse picture: the first channels alone
                        front = self.score(out, family, f"--c_prime {ae.parse_channels(channels, c)[0]}")
                        row.update(front=front["distance"], front_right=front["right"])
                    self.add(**key, step=step, **row)

    def folder(self, family, arm, c, size, seed, step=None):
        """Of a run; with a step, of the branch that ends there."""
        return self.home / re.sub(r"\W+", "-", f"{family} {arm} c{c} {size} {seed} {step or ''}").rstrip("-")

    @torch.no_grad()
    def gaussian(self, kind, c, folder):
        """Scores pictures decoded from a Gaussian with the mean and covariance of the training latents."""
        if self.rows(experiment="gaussian", arm=kind, c=c):
            return
        model, data = ae.DCAE.from_pretrained(folder), ae.open_images(str(self.data), 32)
        numbers = ae.evenly_spaced(data, min(self.args.images, 20_000))
        z = torch.cat([model.encode(data.get_batch(part, part)[0]) for part in np.array_split(numbers, math.ceil(len(numbers) / 100))])
        mean, values = z.flatten(1).mean(0), z.flatten(1)
        # x = mean + noise (z - mean) / sqrt(n): its covariance is that of z, of any rank
        noise = torch.randn(self.args.n, len(z), generator=torch.Generator().manual_seed(0))
        drawn = (mean + noise @ (values - mean) / len(z) ** 0.5).view(-1, *z.shape[1:])
        pixels = torch.cat([ae.to_uint8(model.decode(part)) for part in drawn.split(100)]).numpy()
        np.savez(folder / "gaussian.npz", arr_0=pixels)
        self.add(experiment="gaussian", arm=kind, c=c, distance=self.distance(folder / "gaussian.npz"))

    def distance(self, samples):
        run(fid, samples, self.reference, "--features", self.network, "--metrics fid --allow_small --json", samples.with_name("fid.json"))
        return json.loads(samples.with_name("fid.json").read_text())["fid"]

    def score(self, folder, family, *flags):
        samples = folder / ("front" if flags else "samples")
        run(sample, "--ckpt", folder, "--n", self.args.n, "--classes random --seed 0 --batch_size 100", SOLVERS[family], *flags, "--out", samples)
        with np.load(samples / "samples.npz") as f:
            right = toy_classifier.right(self.classifier, f["arr_0"], f["arr_1"])
        return dict(distance=self.distance(samples / "samples.npz"), right=right)

    # ------------------------------------------------------------------------------------------------------------------

    def structure(self):
        shown = ",".join(str(self.args.c // k) for k in (8, 4, 2, 1))
        for kind in ("structured", "plain"):
            if not self.rows(experiment="structure", arm=kind):
                self.add(experiment="structure", arm=kind, table=self.reconstructions(self.autoencoder(kind), shown))
        if not (self.home / "figures").exists():
            classes = [] if self.data == "toy" else sorted(d for d in self.val.iterdir() if d.is_dir())
            run(ae, *([min(d.iterdir()) for d in classes[:4]] or ["toy"]), "--ckpt", self.autoencoder("structured"),
                "--ckpt2", self.autoencoder("plain"), f"--channels {shown} --image_size 32 --out", self.home / "figures")

    def cure(self):
        for arm in self.args.arms:
            self.train(arm)

    def problem(self):
        for c in (self.args.c // 4, self.args.c // 2, self.args.c):
            self.train("neither", c)
            if not self.rows(experiment="problem", c=c):
                self.add(experiment="problem", c=c, table=self.reconstructions(self.autoencoder("plain", c), c))

    def small_c(self):
        for arm in ("neither", "both"):
            self.train(arm, 24, "6:24:6")

    def sizes(self):
        for size in SIZES:
            for arm in ("neither", "both"):
                self.train(arm, size=size)

    # ------------------------------------------------------------------------------------------------------------------

    def families(self):
        return list(dict.fromkeys(r["family"] for r in self.rows(experiment="diffusion", c=self.args.c, size="")))

    def curve(self, key="distance", **match):
        """[(step, mean over seeds)] of one family and arm, at the steps that all seeds reached; key "front": of the first channels alone."""
        rows = [r for r in self.rows(experiment="diffusion", c=self.args.c, size="", **match) if key in r]
        at = {s: [r[key] for r in rows if r["step"] == s] for s in sorted({r["step"] for r in rows})}
        return [(s, statistics.mean(v)) for s, v in at.items() if len(v) == len({r["seed"] for r in rows})]

    def ratios(self, family):
        """[(step, both / neither)]: means over the seeds that have both."""
        rows = {(r["arm"], r["seed"], r["step"]): r["distance"] for r in self.rows(experiment="diffusion", c=self.args.c, size="", family=family)}
        pairs = {}
        for (arm, seed, step), distance in rows.items():
            if arm == "both" and ("neither", seed, step) in rows:
                pairs.setdefault(step, []).append((distance, rows["neither", seed, step]))
        return [(step, sum(b for b, _ in pair) / sum(n for _, n in pair)) for step, pair in sorted(pairs.items())]

    def report(self):
        """Markdown tables of all that has been run."""
        text, runs = [], self.rows(experiment="diffusion")

        def spread(values, digits):
            return f"{statistics.mean(values):.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")

        def cell(rows, distance="distance", right="right"):
            rows = [r for r in rows if distance in r]
            return f"{spread([r[distance] for r in rows], 2)} / {spread([100 * r[right] for r in rows], 1)}" if rows else ""
        for r in self.rows(experiment="classifier")[-1:]:
            text += [f"Classifier: {100 * r['accuracy']:.1f} % right on held-out images.", ""]
        structure = self.rows(experiment="structure")
        if structure:
            text += ["| autoencoder | " + " | ".join(f"c' = {r['c_prime']}: PSNR / distance" for r in structure[0]["table"]) + " |", "| --- " * 5 + "|"]
            text += ["| " + r["arm"] + " | " + " | ".join(f"{t['psnr']:.1f} / {t['rfid']:.2f}" for t in r["table"]) + " |" for r in structure] + [""]
        for r in self.rows(experiment="problem"):
            text += [f"* plain autoencoder, c = {r['c']}: PSNR {r['table'][0]['psnr']:.1f}, distance {r['table'][0]['rfid']:.2f}"]
        for r in self.rows(experiment="gaussian"):
            text += [f"* Gaussian of the {r['arm']} autoencoder's latents, c = {r['c']}: distance {r['distance']:.2f}"]
        steps = sorted({r["step"] for r in runs})
        text += ["", "distance / right class in %: mean ± standard deviation over training seeds; samples have the same seed and labels", "",
                 "| network | arm | c | seeds | " + " | ".join(f"step {s:,}" for s in steps)
                 + " | its first channels alone, at the step that most seeds reached |", "| --- " * (5 + len(steps)) + "|"]
        kinds = {(r["family"], r["c"], r["size"], r["arm"]) for r in runs}
        for family, c, size, arm in sorted(kinds, key=lambda kind: (*kind[:3], list(ARMS).index(kind[3]))):
            mine = self.rows(experiment="diffusion", family=family, arm=arm, c=c, size=size)
            at = {step: [r for r in mine if r["step"] == step] for step in steps}
            last = at[max(steps, key=lambda step: (len(at[step]), step))]
            cells = [cell(rows) for rows in at.values()] + [cell(last, "front", "front_right")]
            text += [f"| {' '.join(filter(None, (family, size)))} | {arm} | {c} | {len(last)} | " + " | ".join(cells) + " |"]
        text += [""]
        for family in self.families():
            ratios = self.ratios(family)
            text += [f"* {family}, distance of both / neither: " + ", ".join(f"{r:.2f} at step {s:,}" for s, r in ratios)] if ratios else []
        for family, seed in dict.fromkeys((r["family"], r["seed"]) for r in runs if r["c"] == self.args.c and not r["size"]):
            plain, both = (self.curve(family=family, arm=arm, seed=seed) for arm in ("neither", "both"))
            plain = [p for p in plain if p[0] in dict(self.curve(family=family, arm="neither"))]      # the same goal for all seeds
            text += [f"* {family}, seed {seed}: {reached(plain, both)}"] if plain and both else []
        (self.home / "report.md").write_text("\n".join(text) + "\n")
        print("\n" + "\n".join(text))

    def plot(self):
        """Figure 5b: distance against training step, a panel for each family, a point for each seed, lines through the means."""
        families = self.families()
        if not families:
            return
        try:
            import matplotlib
        except ImportError:
            return print("no plot: pip install matplotlib (tests/requirements.txt)")
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        figure, axes = plt.subplots(1, len(families), figsize=(5 * len(families), 4), squeeze=False)
        lines = [(arm, "distance") for arm in ARMS] + [("both", "front")]
        for axis, family in zip(axes[0], families):
            for k, (arm, key) in enumerate(lines):
                rows = [r for r in self.rows(experiment="diffusion", family=family, arm=arm, c=self.args.c, size="") if key in r]
                if rows:
                    label = arm if key == "distance" else f"{arm}, first channels alone"
                    axis.plot(*zip(*self.curve(key, family=family, arm=arm)), color=f"C{k}", linestyle="-" if key == "distance" else ":", label=label)
                    axis.scatter([r["step"] for r in rows], [r[key] for r in rows], color=f"C{k}", s=8)
            axis.set(title=f"{family}, {self.args.name}", xlabel="training step", ylabel="feature distance")
            axis.legend()
        figure.tight_layout(), figure.savefig(self.home / "convergence.png", dpi=90), plt.close(figure)

    def pictures(self):
        """Samples of the first seed: a column for each class, two rows for each arm, two more for its first channels alone."""
        for family in self.families():
            seed = min(r["seed"] for r in self.rows(experiment="diffusion", family=family, c=self.args.c, size=""))
            last = max(self.args.points) if self.args.cooldown else None
            shown, titles = [], []
            for arm, kind in [(arm, kind) for arm in ARMS for kind in ("samples", "front")]:
                path = self.folder(family, arm, self.args.c, "", seed, last) / kind / "samples.npz"
                if path.exists():
                    with np.load(path) as f:
                        img, labels = f["arr_0"], f["arr_1"]
                    classes = sorted(set(labels.tolist()))[:10]                       # the same for all arms: same seed
                    picks = np.stack([np.resize(np.flatnonzero(labels == k), 2) for k in classes])                    # (classes, 2)
                    shown.append(torch.from_numpy(img[picks.T.flatten()]))
                    titles += [arm if kind == "samples" else "first channels"] * 2
            if shown:
                ae.save_grid(torch.cat(shown), self.home / f"samples-{family}.png", len(classes), rows=titles)


def textured(folder, rms, n, train):
    """Toy pictures under white texture, as PNGs of 32 px in class folders: 0.2 + 0.6 x picture + Gaussian noise of that rms,
    high-passed at 0.2 cycles per pixel, all in [0, 1]; picture i and its noise are functions of i."""
    data = ae.ToyImages(32, train)
    u, v = torch.meshgrid(torch.fft.fftfreq(32), torch.fft.fftfreq(32), indexing="ij")
    high = (torch.hypot(u, v) > 0.2).float()
    for start in range(0, n, 500):
        numbers = torch.arange(start, min(start + 500, n))
        files = [folder / data.classes[i % 10] / f"{i:06d}.png" for i in numbers.tolist()]
        if files[-1].exists():
            continue
        img, _ = data.get_batch(numbers)
        noise = gaussian(img.shape, 17 + train, 0, numbers)
        noise = torch.fft.ifft2(torch.fft.fft2(noise) * high).real * (rms / high.mean().sqrt())
        for file, pixels in zip(files, ae.to_uint8(2 * (0.2 + 0.6 * (img + 1) / 2 + noise) - 1)):
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(file)


def branch(trunk, out):
    """A copy of a run at the step where its learning rate begins to fall; one that has begun is left alone."""
    if not (out / "ckpt.pt").exists():
        out.mkdir(exist_ok=True)
        shutil.copyfile(trunk / "ckpt.pt", out / "new.pt")
        (out / "new.pt").rename(out / "ckpt.pt")


@torch.no_grad()
def balanced(source, out, data):
    """The same autoencoder with every latent channel scaled to variance 1: the scales go into the convolutions beside it."""
    model, ckpt = ae.DCAE.from_pretrained(source), ae.read_checkpoint(source / "ckpt.pt")
    numbers = ae.evenly_spaced(data, 2000)
    z = torch.cat([model.encode(data.get_batch(part, part)[0]) for part in (numbers[i::4] for i in range(4))])
    std, m = z.std((0, 2, 3)), ckpt["model"]
    m["encoder.project_out.weight"] /= std[:, None, None, None]
    m["encoder.project_out.bias"] /= std
    m["decoder.project_in.weight"] *= std[None, :, None, None]
    ckpt["scale"] = float((z / std[:, None, None]).square().mean().rsqrt())
    out.mkdir(exist_ok=True)
    torch.save(ckpt, out / "new.pt")
    (out / "new.pt").rename(out / "ckpt.pt")
    return out


def reached(plain, both):
    """Where the curve of both ideas, linear between points, first meets plain training's best distance."""
    best, step = min((d, s) for s, d in plain)
    goal = f"plain training's best distance {best:.2f} (step {step:,}) is"
    for (s0, d0), (s1, d1) in zip([(0, math.inf), *both], both):
        if d1 <= best and d0 == math.inf:
            return f"{goal} reached by both ideas before step {s1:,}: at least {step / s1:.1f} x as fast"
        if d1 <= best:
            s = s0 + (s1 - s0) * (d0 - best) / (d0 - d1)
            return f"{goal} reached by both ideas at step {s:,.0f}: {step / s:.1f} x as fast"
    return f"{goal} not reached by both ideas within {both[-1][0]:,} steps"


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = p.add_argument
    a("name", help="of the study: its folder under out/reproduce; toy uses the built-in images")
    a("--data", help="class folders of training images (default: the built-in images)")
    a("--val", help="class folders that nothing trains on")
    a("--only", nargs="*", default=["structure", "cure"], choices=["structure", "cure", "problem", "small_c", "sizes"],
      help="experiments to run (default: structure cure; with none after it, tables and plots alone)")
    a("--models", nargs="+", default=["USiT"], choices=MODELS, help="diffusion families")
    a("--arms", nargs="+", default=list(ARMS)[:4], choices=ARMS, help="of cure; balanced: both, with every latent channel scaled to variance 1 (not in the paper)")
    a("--seeds", nargs="+", type=int, default=[0], help="of the diffusion models")
    a("--points", nargs="+", type=int, default=POINTS, help="training steps at which samples are scored; the last one ends the run")
    a("--images", type=int, default=8192, help="training images (encoded once, plain and mirrored)")
    a("--c", type=int, default=96, help="channels of the latent: at 32 px, 4 x 4 x 96 numbers for 32 x 32 x 3 pixel values")
    a("--channels", default="12:96:12", help="the c' of structured latents and of augmented training")
    a("--widths", default="16,32,32,64", help="of the autoencoder's stages")
    a("--texture", type=float, default=0.0, help="toy pictures under white texture of this rms (0.08)")
    a("--batch_size", type=int, default=16, help="of the diffusion models")
    a("--cooldown", type=float, default=0.0, help="share of each run in which the learning rate falls to zero")
    a("--n", type=int, default=1000, help="samples of a score")
    a("--out", help="folder (default: out/reproduce/NAME)")
    return p.parse_args(argv)


def main(argv=None):
    study = Study(parse(argv))
    study.features()
    for experiment in study.args.only:
        getattr(study, experiment)()
    study.report()
    study.plot()
    study.pictures()


if __name__ == "__main__":
    main()
