"""Does the paper's claim hold at a size that fits? Its experiments, through this repository's commands, with a table each.

    python tests/reproduce.py toy                                                     # a laptop CPU, within the hour: USiT, one seed
    python tests/reproduce.py toy --models USiT DiT --seeds 0 1 2 --only cure          # three seeds, two families
    python tests/reproduce.py cifar --data cifar/train --val cifar/test --images 50000 # real images: class folders of 32 px

structure  Table 1, Figures 2, 3, 9, 10: PSNR and feature distance from the first c' channels
cure       Table 5: {plain, structured latent} x {ordinary, augmented training}, the learning rate falling to 0
speed      Figure 5b: score against training step at a constant learning rate, neither idea and both (channels balanced, see below)
problem    Figure 1b: plain autoencoders of three channel counts, ordinary training on each
small_c    Table 6: both ideas where c is small
sizes      Figures 6, 8: three model sizes, neither idea and both
balance    not in the paper: the structured latent with every channel scaled to variance 1 (the same autoencoder otherwise)

Score: Frechet distance on the features of a small classifier (toy_classifier.py), and the share of samples that it assigns
to the class they were asked for. Everything lies in out/reproduce/NAME; finished parts are not run again. One autoencoder
of each kind (seed 0) serves all seeds of the diffusion models. Hyper-parameters [ours]: near those of the toy preset.
"""

import argparse
import json
import math
import re
import shlex
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import ae
import fid
import sample
import toy_classifier
import train_ae
import train_diffusion
from train_ae import commit

C, LIST = 96, "12:96:12"                                     # f8 at 32 px: 96 numbers for 8 x 8 x 3 = 192 pixel values
STEPS, POINTS = 6000, [1500, 3000, 5000, 8000, 11000, 14000] # of cure and its like; of speed: where samples are scored
ARMS = {"neither": ("plain", False), "structured": ("structured", False),         # latent, augmented training
        "augmented": ("plain", True), "both": ("structured", True)}
# family -> network and solver: small enough that a CPU core takes about 15 steps per second
MODELS = {"USiT": "--model USiT-T --hidden 128 --heads 4", "DiT": "--model DiT-T", "SiT": "--model SiT-T",
          "UViT": "--model UViT-T --hidden 128 --heads 4"}
SOLVERS = {"USiT": "--solver heun --steps 10", "SiT": "--solver heun --steps 10", "DiT": "--steps 50", "UViT": "--steps 20"}
SIZES = {"depth 2, width 64": "--hidden 64 --heads 2 --depth 2", "depth 4, width 128": "--hidden 128 --heads 4",
         "depth 6, width 256": "--hidden 256 --heads 4 --depth 6"}
SMALL = "--f 8 --widths 16,32,32,64 --depths 0,1,1,1 --lpips 0 --image_size 32 --batch_size 32 --lr 2e-3 --betas 0.9 0.99 " \
        "--weight_decay 0.01 --warmup 50 --steps 4000 --cooldown 3000 --eval_every 0 --save_every 1000 --log_every 50"
DIFFUSION = "--lr 2e-3 --betas 0.9 0.99 --weight_decay 0 --clip 1 --warmup 100 --ema 0.998 --ema_warmup 100 --save_every 1000 " \
            "--eval_every 0 --log_every 100"


def run(module, *flags):
    """A command of this repository, printed so that it can be typed, run in this process."""
    flags = shlex.split(" ".join(str(f) for f in flags))
    print(f"\n$ python {module.__name__}.py {shlex.join(flags)}", flush=True)
    result = module.main(flags)
    if module in (train_ae, train_diffusion) and "--eval_only" not in flags:
        log = Path(flags[flags.index("--out") + 1], "log.jsonl").read_text().splitlines()
        wanted = int(flags[flags.index("--steps") + 1]) if "--steps" in flags else train_ae.TOY["steps"]
        if json.loads(log[-1])["step"] < wanted:                                   # a signal: trainers save and return
            sys.exit("stopped; the same command goes on")
    return result


class Study:
    def __init__(self, args):
        self.args, self.home = args, Path(args.out or f"out/reproduce/{args.name}")
        self.home.mkdir(parents=True, exist_ok=True)
        self.data = args.data or "toy"
        self.val = args.val or self.data

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
        self.net, ref = self.home / "features.pt2", self.home / "reference.npz"
        if not ref.exists():
            train, val = (ae.open_images(x, 32, train=t) for x, t in ((self.data, True), (self.val, False)))
            net = toy_classifier.train(train, steps=600 if self.data == "toy" else 4000)
            self.add(experiment="classifier", accuracy=toy_classifier.accuracy(net, val))
            toy_classifier.export(net, 32, self.net)
            run(fid, self.data, "--image_size 32 --num 10000 --features", self.net, "--save_stats", ref)
        self.reference, self.classifier = ref, torch.export.load(self.net).module()
        return self.rows(experiment="classifier")[-1]["accuracy"]

    def autoencoder(self, kind, c=C, channels=LIST):
        """Trains, or finds, the structured, plain or balanced autoencoder; returns its run folder."""
        out = self.home / f"ae-{kind}-c{c}"
        if kind == "balanced":
            return out if out.exists() else balanced(self.autoencoder("structured", c, channels), out, ae.open_images(self.data, 32))
        train = "--toy --eval_every 4500" if self.data == "toy" else f"--data {self.data} {SMALL}"
        run(train_ae, train, "--c", c, "--channels", channels if kind == "structured" else c, "--out", out)
        return out

    def train(self, experiment, arm, family, seed, latent, augmented, points=None, c=C, channels=LIST, size=None):
        """Trains one diffusion model and scores its samples: at the end of a cool-down, or at `points` of a constant rate."""
        out = self.home / re.sub(r"\W+", "-", f"{experiment}-{arm}-{family}-{seed}")
        network = f"--model {family}-T {SIZES[size]}" if size else MODELS[family]
        schedule = "--batch_size 32" if points else f"--batch_size 16 --cooldown {self.args.steps * 5 // 6}"
        for step in points or [self.args.steps]:
            if self.rows(experiment=experiment, arm=arm, family=family, seed=seed, step=step):
                continue
            start = time.time()
            run(train_diffusion, "--data", self.data, "--max_images", self.args.images, "--ae", self.autoencoder(latent, c, channels), network,
                DIFFUSION, schedule, f"--channels {channels}" if augmented else "--no-augment", "--seed", seed, "--steps", step, "--out", out)
            seconds = time.time() - start
            row = dict(experiment=experiment, arm=arm, family=family, seed=seed, step=step, seconds=seconds, **self.score(out, family))
            if augmented and latent != "plain":                          # the coarse picture: the first channels alone
                row["front"] = self.score(out, family, f"--c_prime {channels.split(':')[0]}")["distance"]
            self.add(**row)

    def score(self, folder, family, *flags):
        samples = folder / ("samples" if not flags else "front")
        run(sample, "--ckpt", folder, "--n", self.args.n, "--classes random --seed 0 --batch_size 100", SOLVERS[family], *flags, "--out", samples)
        run(fid, samples / "samples.npz", self.reference, "--features", self.net, "--metrics fid --allow_small --json", samples / "fid.json")
        with np.load(samples / "samples.npz") as f:
            right = toy_classifier.right(self.classifier, f["arr_0"], f["arr_1"])
        return dict(distance=json.loads((samples / "fid.json").read_text())["fid"], right=right)

    # ------------------------------------------------------------------------------------------------------------------

    def cure(self):
        for seed in self.args.seeds:
            for family in self.args.models:
                for arm in self.args.arms:
                    self.train("cure", arm, family, seed, *ARMS[arm])

    def speed(self):
        for seed in self.args.seeds:
            for family in self.args.models:
                for arm, latent, augmented in (("neither", "plain", False), ("both", "balanced", True)):
                    self.train("speed", arm, family, seed, latent, augmented, points=self.args.points)

    def balance(self):
        for seed in self.args.seeds:
            for family in self.args.models:
                for arm, augmented in (("structured, balanced", False), ("both, balanced", True)):
                    self.train("balance", arm, family, seed, "balanced", augmented)

    def structure(self):
        if not self.rows(experiment="structure"):
            a, b = self.autoencoder("structured"), self.autoencoder("plain")
            for kind, folder in (("structured", a), ("plain", b)):
                table = run(train_ae, "--eval_only --init", folder, "--data", self.data, "--val", self.val, "--image_size 32 --batch_size 100",
                            "--eval_num 2000 --eval_channels 12,24,48,96 --features", self.net)
                self.add(experiment="structure", arm=kind, table=table[32])
            pictures = ["toy"] if self.data == "toy" else sorted(str(next(iter(sorted(d.iterdir())))) for d in Path(self.val).iterdir())[:4]
            run(ae, *pictures, "--ckpt", a, "--ckpt2", b, "--channels 12,24,48,96 --image_size 32 --out", self.home / "figures")

    def problem(self):
        for c in (24, 48, 96):
            for seed in self.args.seeds:
                self.train("problem", f"plain c {c}", self.args.models[0], seed, "plain", False, c=c)
            if not self.rows(experiment="problem_ae", c=c):
                table = run(train_ae, "--eval_only --init", self.autoencoder("plain", c), "--data", self.data, "--val", self.val,
                            "--image_size 32 --batch_size 100 --eval_num 2000 --eval_channels", c, "--features", self.net)
                self.add(experiment="problem_ae", c=c, table=table[32])

    def small_c(self):
        for arm in ("neither", "both"):
            for seed in self.args.seeds:
                self.train("small_c", arm, self.args.models[0], seed, *ARMS[arm], c=24, channels="6:24:6")

    def sizes(self):
        for size in SIZES:
            for arm in ("neither", "both"):
                for seed in self.args.seeds:
                    self.train("sizes", f"{size}, {arm}", self.args.models[0], seed, *ARMS[arm], size=size)

    # ------------------------------------------------------------------------------------------------------------------

    def curve(self, family, arm, key="distance"):
        """[(step, mean over seeds)] of the speed experiment; key "front": of the first channels alone."""
        rows = [r for r in self.rows(experiment="speed", family=family, arm=arm) if key in r]
        return [(s, statistics.mean(r[key] for r in rows if r["step"] == s)) for s in sorted({r["step"] for r in rows})]

    def report(self):
        """Markdown tables of all that has been run."""
        text = []
        spread = lambda v, digits=2: f"{statistics.mean(v):.{digits}f}" + (f" ± {statistics.stdev(v):.{digits}f}" if len(v) > 1 else "")
        for r in self.rows(experiment="classifier")[-1:]:
            text += [f"Classifier: {100 * r['accuracy']:.1f} % right on held-out images.", ""]
        structure = self.rows(experiment="structure")
        if structure:
            text += ["| autoencoder | " + " | ".join(f"c' = {r['c_prime']}: PSNR / distance" for r in structure[0]["table"]) + " |", "| --- " * 5 + "|"]
            text += ["| " + r["arm"] + " | " + " | ".join(f"{t['psnr']:.1f} / {t['rfid']:.2f}" for t in r["table"]) + " |" for r in structure] + [""]
        for experiment in ("cure", "balance", "speed", "problem", "small_c", "sizes"):
            rows = self.rows(experiment=experiment)
            steps = sorted({r["step"] for r in rows})
            if rows:
                text += [f"{experiment}: distance / right class, %", "", "| network | arm | seeds | " + " | ".join(f"step {s:,}" for s in steps)
                         + " | distance of the first channels alone |", "| --- " * (4 + len(steps)) + "|"]
            for family, arm in dict.fromkeys((r["family"], r["arm"]) for r in rows):
                mine = [[r for r in rows if (r["family"], r["arm"], r["step"]) == (family, arm, s)] for s in steps]
                cells = [f"{spread([r['distance'] for r in m])} / {spread([100 * r['right'] for r in m], 1)}" if m else "" for m in mine]
                front = [r["front"] for r in mine[-1] if "front" in r]
                text += [f"| {family} | {arm} | {len(mine[-1])} | " + " | ".join(cells) + f" | {spread(front) if front else ''} |"]
            text += [""] * bool(rows)
        for family in dict.fromkeys(r["family"] for r in self.rows(experiment="speed")):
            text += [reached(self.curve(family, "neither"), self.curve(family, "both"), family), ""]
        (self.home / "report.md").write_text("\n".join(text))
        print("\n" + "\n".join(text))

    def plot(self):
        """Figure 5b: distance against training step; and rows of samples for each arm, a column for each class."""
        families = list(dict.fromkeys(r["family"] for r in self.rows(experiment="speed")))
        try:
            import matplotlib
        except ImportError:
            families = print("no plot: pip install matplotlib (tests/requirements.txt)") or []
        for family in families:
            matplotlib.use("Agg")
            import matplotlib.pyplot as plt
            figure, axis = plt.subplots(figsize=(5, 3.5))
            for arm, key, label in (("neither", "distance", "neither"), ("both", "distance", "both"), ("both", "front", "both, first channels alone")):
                axis.plot(*zip(*self.curve(family, arm, key)), marker="o", label=label)
            axis.set(title=f"{family}, {self.args.name}", xlabel="training step", ylabel="feature distance", yscale="log")
            axis.legend(), figure.tight_layout(), figure.savefig(self.home / f"convergence-{family}.png", dpi=90), plt.close(figure)
        for family in dict.fromkeys(r["family"] for r in self.rows(experiment="cure")):
            shown, titles = [], []
            for arm in ARMS:
                path = self.home / f"cure-{arm}-{family}-{self.args.seeds[0]}/samples/samples.npz"
                if path.exists():
                    with np.load(path) as f:
                        img, labels = f["arr_0"], f["arr_1"]
                    picks = np.stack([np.flatnonzero(labels == k)[:2] for k in sorted(set(labels.tolist()))[:10]])      # (10, 2)
                    shown.append(torch.from_numpy(img[picks.T.flatten()]))
                    titles += [arm, arm]
            if shown:
                ae.save_grid(torch.cat(shown), self.home / f"samples-{family}.png", 10, rows=titles)


@torch.no_grad()
def balanced(source, out, data):
    """The same autoencoder with every latent channel scaled to variance 1: the scales go into the convolutions beside it."""
    model, ckpt = ae.DCAE.from_pretrained(source), ae.read_checkpoint(source / "ckpt.pt")
    numbers = train_ae.spread(data, 2000)
    z = torch.cat([model.encode(data.get_batch(part, part)[0]) for part in (numbers[i::4] for i in range(4))])
    std, m = z.std((0, 2, 3)), ckpt["model"]
    m["encoder.project_out.weight"] /= std[:, None, None, None]
    m["encoder.project_out.bias"] /= std
    m["decoder.project_in.weight"] *= std[None, :, None, None]
    ckpt["scale"] = float((z / std[:, None, None]).square().mean().rsqrt())
    out.mkdir()
    torch.save(ckpt, out / "ckpt.pt")
    return out


def reached(plain, both, family):
    """Where the curve of both ideas, linear between points, first meets plain training's best distance."""
    best, step = min((d, s) for s, d in plain)
    for (s0, d0), (s1, d1) in zip([(0, math.inf), *both], both):
        if d1 <= best:
            s = s1 if d0 == math.inf else s0 + (s1 - s0) * (d0 - best) / (d0 - d1)
            return f"{family}: plain training's best distance {best:.2f} (step {step:,}) is reached by both ideas at step {s:,.0f}: {step / s:.1f} x as fast."
    return f"{family}: plain training's best distance {best:.2f} (step {step:,}) is not reached by both ideas within {both[-1][0]:,} steps."


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = p.add_argument
    a("name", help="of the study: its folder under out/reproduce; toy uses the built-in images")
    a("--data", help="class folders of training images (default: the built-in images)")
    a("--val", help="class folders that nothing trains on")
    a("--only", nargs="+", default=["structure", "cure", "speed"],
      choices=["structure", "cure", "speed", "balance", "problem", "small_c", "sizes", "report"])
    a("--models", nargs="+", default=["USiT"], choices=MODELS)
    a("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    a("--seeds", nargs="+", type=int, default=[0])
    a("--steps", type=int, default=STEPS, help="training steps of a diffusion model, the last five sixths of them cooling down")
    a("--points", nargs="+", type=int, default=POINTS, help="of speed: training steps at which samples are scored")
    a("--images", type=int, default=8192, help="training images (encoded once, plain and mirrored)")
    a("--n", type=int, default=1000, help="samples of a score")
    a("--out", help="folder (default: out/reproduce/NAME)")
    study = Study(p.parse_args())
    study.features()
    for experiment in study.args.only:
        if experiment != "report":
            getattr(study, experiment)()
    study.report()
    study.plot()


if __name__ == "__main__":
    main()
