"""Does the paper's claim hold at a size that fits? Its experiments, by this repository's commands, with tables.

    python tests/reproduce.py toy                                             # no download, no GPU: USiT, one seed
    python tests/reproduce.py toy --models USiT DiT --seeds 0 1 2 --only cure  # three seeds, two families
    python tests/reproduce.py cifar --data cifar/train --val cifar/test --images 50000      # class folders of 32 px
    python tests/reproduce.py texture --texture 0.08 --c 64 --channels 8:64:8 --widths 16,32,32,128 --batch_size 32 \
        --cooldown 0.2 --points 5000 10000 30000 --models SiT --images 50000 --ae_steps 14000 --seeds 0 1 2

50 classes of ImageNet at 64 px, f16, judged by a real network: unpack, export the network once, run.

    python -m zipfile -e tiny-imagenet-train.zip tiny
    python -m zipfile -e tiny-imagenet-val.zip tiny
    python tests/efficientnet.py --size 64 --out tiny/lite0.pt2 --classes tiny/train
    python tests/reproduce.py tiny --data tiny/train --val tiny/val --features tiny/lite0.pt2 --images 25000 \
        --image_size 64 --f 16 --c 64 --channels 8:64:8 --widths 16,32,32,64,128 --models SiT --arms neither both \
        --only structure problem cure --n 2500

structure  Table 1, Figures 2, 3, 9, 10: PSNR and feature distance from the first c' channels
cure       Table 5, Figure 5b: {plain, structured latent} x {ordinary, augmented training}, scored along the way
problem    Figure 1b: plain autoencoders of c/4, c/2, c channels, ordinary training on each
small_c    Table 6: neither idea and both where c is small
sizes      Figures 6, 8: neither idea and both, three model sizes

Score: Frechet distance on the features of a small classifier (toy_classifier.py), and the share of samples that it
assigns to the class they were asked for. --features FILE.pt2 gives the features of another network; with FILE.json
beside it, the logit of each class folder, that network also says the class. One autoencoder of each kind (seed 0)
serves all seeds of the diffusion models; samples have seed 0 throughout and are compared with held-out pictures (toy,
--texture) or the training set (class folders). The learning rate is constant, so that every point is the end of a run
of that length; with --cooldown every point is a run of its own, branched off the constant one where its rate begins
to fall. Hyper-parameters [ours] are near the toy preset's.
"Gaussian": pictures decoded from a Gaussian with the latents' mean and covariance; only below its distance do samples
show more than linear structure.
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

# ----------------------------------------------------------------------------------------------------------------------
# Settings [ours]

# arm -> autoencoder, augmented training
ARMS = {"neither": ("plain", False),
        "structured": ("structured", False),
        "augmented": ("plain", True),
        "both": ("structured", True),
        "balanced": ("balanced", True)}         # both, every latent channel scaled to variance 1 (not in the paper)

# family -> network, solver of its samples: small enough that a CPU core takes 20 to 30 steps per second
MODELS = {"USiT": "--model USiT-T --hidden 128 --heads 4",
          "DiT": "--model DiT-T",
          "SiT": "--model SiT-T",
          "UViT": "--model UViT-T --hidden 128 --heads 4"}
SOLVERS = {"USiT": "--solver heun --steps 10",
           "DiT": "--steps 50",
           "SiT": "--solver heun --steps 10",
           "UViT": "--steps 20"}
SIZES = {"small": "--hidden 64 --heads 2 --depth 2",
         "": "",                                # that of MODELS
         "large": "--hidden 256 --heads 4 --depth 6"}

# Recipes: of autoencoders on built-in pictures and on class folders, and of all diffusion models
TOY_RECIPE = "--toy --eval_every 4500"
FOLDER_RECIPE = "--lpips 0 --batch_size 32 --lr 2e-3 --betas 0.9 0.99 --weight_decay 0.01 --warmup 50 --steps 4000 " \
                "--cooldown 3000 --eval_every 0 --save_every 1000 --log_every 50"
DIFFUSION_RECIPE = "--lr 2e-3 --betas 0.9 0.99 --weight_decay 0 --clip 1 --warmup 100 --ema 0.998 --ema_warmup 100 " \
                   "--save_every 2500 --eval_every 0 --log_every 100"

POINTS = [2500, 5000, 10000]                    # training steps at which samples are scored
CLASSIFIER_STEPS = {"toy": 600, "folders": 4000}
REFERENCE = 10_000                              # pictures, at most, that samples are compared with
RECONSTRUCTIONS = 2000                          # held-out pictures that an autoencoder is scored on
LATENTS = 20_000                                # pictures, at most, whose latents the Gaussian is fitted to
SPECTRUM = 2000                                 # pictures whose latents give the channels' covariance

# Flags that all of a folder shares: what lies there was made with them
STUDY = ("data", "val", "images", "n", "c", "channels", "widths", "texture", "ae_steps", "batch_size", "cooldown",
         "image_size", "f", "features")


def run(module, *flags):
    """A command of this repository, printed so that it can be typed, run in this process. Strings hold several flags,
    Paths and numbers are one word each. Ends the program where a signal ended the training."""
    words = []
    for flag in flags:
        words += [str(flag)] if isinstance(flag, Path) else shlex.split(str(flag))
    print(f"\n$ python {module.__name__}.py {shlex.join(words)}", flush=True)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    result = module.main(words)
    for number, handler in handlers.items():                    # trainers take signals, and return when one came
        signal.signal(number, handler)
    if module in (train_ae, train_diffusion) and "--eval_only" not in words:
        check_finished(words)
    return result


def check_finished(words):
    """Ends the program unless the training that these words started stands at its last step."""
    wanted = train_ae.TOY["steps"]
    if "--steps" in words:
        wanted = int(words[len(words) - words[::-1].index("--steps")])      # the last one counts
    log = Path(words[words.index("--out") + 1], "log.jsonl").read_text().splitlines()
    step = json.loads(log[-1])["step"]
    if step < wanted:
        sys.exit("stopped; the same command goes on")
    if step > wanted:
        sys.exit(f"--points {wanted}: the run is at step {step} already")


# ----------------------------------------------------------------------------------------------------------------------
# A study: its data, autoencoders, diffusion runs and scores


class Study:
    """All of one folder: settings in study.json, results in results.jsonl, one line each, with what made them."""

    def __init__(self, args):
        self.args = args
        self.home = Path(args.out or f"out/reproduce/{args.name}")
        self.home.mkdir(parents=True, exist_ok=True)
        self.check_settings()
        self.data = Path(args.data) if args.data else "toy"
        self.val = Path(args.val) if args.val else self.data
        if args.texture:
            self.data = self.home / "train"
            self.val = self.home / "val"
            textured(self.data, args.texture, args.images, train=True, size=args.image_size)
            textured(self.val, args.texture, min(REFERENCE, args.images), train=False, size=args.image_size)

    def check_settings(self):
        """Ends the program where the folder was made with others. What study.json does not name had its default."""
        path = self.home / "study.json"
        settings = {name: getattr(self.args, name) for name in STUDY}
        if not path.exists():
            path.write_text(json.dumps(settings))
            return
        defaults = vars(parse(["name"]))
        before = {name: defaults[name] for name in STUDY} | json.loads(path.read_text())
        if before != settings:
            sys.exit(f"{self.home}: made with {path.read_text()}: give the same flags or another --out")

    def rows(self, **match):
        """Finished results with these entries: a list of dicts."""
        path = self.home / "results.jsonl"
        if not path.exists():
            return []
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [row for row in lines if all(row.get(name) == value for name, value in match.items())]

    def add(self, **row):
        with open(self.home / "results.jsonl", "a") as f:
            f.write(json.dumps({**row, "commit": commit(), "torch": str(torch.__version__)}) + "\n")

    def pictures(self, held_out=False):
        """The training pictures through the evaluation crop, or those that nothing trains on."""
        source = self.val if held_out else self.data
        return ae.open_images(str(source), self.args.image_size, train=source == "toy" and not held_out)

    # --- What looks at pictures ---------------------------------------------------------------------------------------

    def open_networks(self):
        """self.network: of the features, a file. self.judge: says the class, of the logits self.among (None: all).
        self.reference: statistics of the features of real pictures. What is missing is made, once."""
        small = self.home / "features.pt2"
        self.network = Path(self.args.features) if self.args.features else small
        self.reference = self.home / "reference.npz"
        table = self.network.with_suffix(".json")
        judged = self.args.features and table.exists()
        self.among = self.logits_of_classes(table) if judged else None
        judge = self.network if judged else small
        measured = self.rows(experiment="classifier")
        if judge == small and not measured:
            train_pictures = ae.open_images(str(self.data), self.args.image_size, train=True)
            steps = CLASSIFIER_STEPS["toy" if self.data == "toy" else "folders"]
            toy_classifier.export(toy_classifier.train(train_pictures, steps=steps), self.args.image_size, small)
        self.judge = fid.load_extractor(features=judge)
        if not measured:
            accuracy = toy_classifier.accuracy(self.judge, self.pictures(held_out=True), among=self.among)
            self.add(experiment="classifier", accuracy=accuracy)
        if not self.reference.exists():
            source = self.val if self.args.texture else self.data           # toy: fid.py itself takes held-out ones
            number = REFERENCE if self.data == "toy" else min(REFERENCE, len(self.pictures()))
            run(fid, source, "--image_size", self.args.image_size, "--num", number, "--features", self.network,
                "--save_stats", self.reference)

    def logits_of_classes(self, table):
        """A .json of {class folder: logit} -> the logits of our classes, in the order of their labels."""
        logits = json.loads(table.read_text())
        classes = self.pictures(held_out=True).classes
        missing = [name for name in classes if name not in logits]
        if missing:
            sys.exit(f"{table}: no logit of {missing[0]}; make the table from the folders of --data, or remove it")
        return [logits[name] for name in classes]

    def distance(self, samples):
        """Frechet distance of an .npz of samples from real pictures; also in fid.json beside it."""
        path = samples.with_name("fid.json")
        run(fid, samples, self.reference, "--features", self.network, "--metrics fid --allow_small --json", path)
        return json.loads(path.read_text())["fid"]

    def score(self, folder, family, *flags):
        """Draws samples of the diffusion model in a run folder -> {distance, right: share of their class}."""
        samples = folder / ("front" if flags else "samples")
        run(sample, "--ckpt", folder, "--n", self.args.n, "--classes random --seed 0 --batch_size 100",
            SOLVERS[family], *flags, "--out", samples)
        with np.load(samples / "samples.npz") as f:
            right = toy_classifier.right(self.judge, f["arr_0"], f["arr_1"], self.among)
        return {"distance": self.distance(samples / "samples.npz"), "right": right}

    # --- Autoencoders -------------------------------------------------------------------------------------------------

    def autoencoder(self, kind, c=None, channels=None):
        """Trains, or finds, the structured, plain or balanced autoencoder; returns its run folder."""
        c = c or self.args.c
        channels = channels or self.args.channels
        out = self.autoencoder_folder(kind, c)
        if kind == "balanced":
            if not (out / "ckpt.pt").exists():
                balanced(self.autoencoder("structured", c, channels), out, self.pictures())
            return out
        recipe = [TOY_RECIPE] if self.data == "toy" else ["--data", self.data, FOLDER_RECIPE]
        if self.args.ae_steps:
            recipe.append(f"--steps {self.args.ae_steps} --cooldown {self.args.ae_steps * 3 // 4}")
        depths = "0" + ",1" * int(math.log2(self.args.f))       # one block in each stage but the first, empty one
        run(train_ae, "--image_size", self.args.image_size, "--f", self.args.f, "--depths", depths,
            "--widths", self.args.widths, "--c", c, "--channels", channels if kind == "structured" else c,
            *recipe, "--out", out)
        return out

    def autoencoder_folder(self, kind, c):
        return self.home / f"ae-{kind}-c{c}"

    def reconstructions(self, folder, channels):
        """[{c_prime, psnr (dB), rfid, ...}] of an autoencoder on held-out pictures."""
        size = self.args.image_size
        tables = run(train_ae, "--eval_only --init", folder, "--data", self.data, "--val", self.val,
                     "--image_size", size, "--batch_size 100 --eval_num", RECONSTRUCTIONS,
                     "--eval_channels", channels, "--features", self.network)
        return tables[size]

    @torch.no_grad()
    def latents(self, folder, num):
        """(model, z (num, c, h, w)) of an autoencoder and `num` of the training pictures, or all where fewer."""
        model = ae.DCAE.from_pretrained(folder)
        data = self.pictures()
        numbers = ae.evenly_spaced(data, num)
        parts = np.array_split(numbers, math.ceil(len(numbers) / 100))
        return model, torch.cat([model.encode(data.get_batch(part, part)[0]) for part in parts])

    @torch.no_grad()
    def gaussian(self, kind, c, folder):
        """Scores pictures decoded from a Gaussian with the mean and covariance of the training latents."""
        if self.rows(experiment="gaussian", arm=kind, c=c):
            return
        model, z = self.latents(folder, min(self.args.images, LATENTS))
        drawn = draw_like(z, self.args.n)
        pixels = torch.cat([ae.to_uint8(model.decode(part)) for part in drawn.split(100)])
        np.savez(folder / "gaussian.npz", arr_0=pixels.numpy())
        self.add(experiment="gaussian", arm=kind, c=c, distance=self.distance(folder / "gaussian.npz"))

    def spectra(self):
        """Covariance of the latent's channels, for every autoencoder that results rest on."""
        used = [(ARMS[row["arm"]][0], row["c"]) for row in self.rows(experiment="diffusion")]
        used += [(row["arm"], self.args.c) for row in self.rows(experiment="structure")]
        used += [("plain", row["c"]) for row in self.rows(experiment="problem")]
        for kind, c in dict.fromkeys(used):
            folder = self.autoencoder_folder(kind, c)
            if (folder / "ckpt.pt").exists() and not self.rows(experiment="spectrum", arm=kind, c=c):
                variances, eigenvalues = spectrum(self.latents(folder, SPECTRUM)[1])
                self.add(experiment="spectrum", arm=kind, c=c, variances=variances, eigenvalues=eigenvalues)

    # --- Diffusion runs -----------------------------------------------------------------------------------------------

    def train(self, arm, c=None, channels=None, size=""):
        """Trains the diffusion models of one arm, one for each seed and family, and scores their samples at every
        point that has no result yet."""
        c = c or self.args.c
        channels = channels or self.args.channels
        kind, augmented = ARMS[arm]
        for seed in self.args.seeds:
            for family in self.args.models:
                key = {"experiment": "diffusion", "family": family, "arm": arm, "c": c, "size": size, "seed": seed}
                points = [p for p in sorted(set(self.args.points)) if not self.rows(**key, step=p)]
                if not points:
                    continue
                autoencoder = self.autoencoder(kind, c, channels)
                self.gaussian(kind, c, autoencoder)
                flags = ["--data", self.data, "--max_images", self.args.images, "--ae", autoencoder, MODELS[family],
                         SIZES[size], DIFFUSION_RECIPE, "--batch_size", self.args.batch_size,
                         f"--channels {channels}" if augmented else "--no-augment", "--seed", seed]
                for step in points:
                    folder = self.train_to(step, key, flags)
                    row = self.score(folder, family)
                    if augmented and kind != "plain":           # the coarse picture: the first channels alone
                        front = self.score(folder, family, f"--c_prime {ae.parse_channels(channels, c)[0]}")
                        row.update(front=front["distance"], front_right=front["right"])
                    self.add(**key, step=step, **row)

    def train_to(self, step, key, flags):
        """A run to this step; returns its folder. With --cooldown it is a branch: the run of constant rate goes on to
        where the rate begins to fall, a copy of it to the end."""
        constant = step - round(step * self.args.cooldown)
        trunk = self.run_folder(**key)
        run(train_diffusion, *flags, "--steps", constant, "--out", trunk)
        if constant == step:
            return trunk
        out = self.run_folder(**key, step=step)
        branch(trunk, out)
        run(train_diffusion, *flags, "--steps", step, "--cooldown", step - constant, "--out", out)
        return out

    def run_folder(self, family, arm, c, size, seed, step="", experiment=None):
        """Of a diffusion run; with a step, of the branch that ends there."""
        return self.home / re.sub(r"\W+", "-", f"{family} {arm} c{c} {size} {seed} {step}").rstrip("-")


def textured(folder, rms, n, train, size=32):
    """Toy pictures 0 .. n-1 under white texture, as PNGs in class folders: 0.2 + 0.6 x picture + texture, in [0, 1].
    A picture and its texture are functions of its number."""
    data = ae.ToyImages(size, train)
    for start in range(0, n, 500):
        numbers = torch.arange(start, min(start + 500, n))
        files = [folder / data.classes[i % len(data.classes)] / f"{i:06d}.png" for i in numbers.tolist()]
        if files[-1].exists():
            continue
        img, _ = data.get_batch(numbers)                                    # (B, 3, size, size) in [-1, 1]
        picture = 0.2 + 0.6 * (img + 1) / 2 + texture(numbers, rms, train, size)
        for file, pixels in zip(files, ae.to_uint8(2 * picture - 1)):
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(file)


def texture(numbers, rms, train, size=32):
    """(B, 1, size, size), grey as the toy pictures' own grain: Gaussian noise, of which the frequencies up to 0.2
    cycles per pixel are taken out; rms is what it then has, on average, in the pictures' range [0, 1]."""
    frequency = torch.fft.fftfreq(size)                                     # cycles per pixel
    u, v = torch.meshgrid(frequency, frequency, indexing="ij")
    high = (torch.hypot(u, v) > 0.2).float()
    noise = gaussian((len(numbers), 1, size, size), 17 + train, 0, numbers)
    return torch.fft.ifft2(torch.fft.fft2(noise) * high).real * (rms / high.mean().sqrt())


@torch.no_grad()
def balanced(source, out, data):
    """The same autoencoder with every latent channel scaled to variance 1, as a run folder `out`: the scales go into
    the convolutions beside the latent."""
    model = ae.DCAE.from_pretrained(source)
    ckpt = ae.read_checkpoint(source / "ckpt.pt")
    numbers = ae.evenly_spaced(data, 2000)
    z = torch.cat([model.encode(data.get_batch(part, part)[0]) for part in (numbers[i::4] for i in range(4))])
    std = z.std((0, 2, 3))                                                  # (c,)
    weights = ckpt["model"]
    weights["encoder.project_out.weight"] /= std[:, None, None, None]
    weights["encoder.project_out.bias"] /= std
    weights["decoder.project_in.weight"] *= std[None, :, None, None]
    ckpt["scale"] = float((z / std[:, None, None]).square().mean().rsqrt())
    out.mkdir(exist_ok=True)
    torch.save(ckpt, out / "new.pt")
    (out / "new.pt").rename(out / "ckpt.pt")
    return out


def draw_like(z, n):
    """(n, ...) numbers of a Gaussian with the mean and covariance of z (N, ...), seed 0."""
    values = z.flatten(1)
    mean = values.mean(0)
    # mean + noise (z - mean) / sqrt(N): its covariance is that of z, of any rank
    noise = torch.randn(n, len(z), generator=torch.Generator().manual_seed(0))
    return (mean + noise @ (values - mean) / len(z) ** 0.5).view(n, *z.shape[1:])


def spectrum(z):
    """z (N, c, h, w) -> variance of each channel, and the eigenvalues, largest first, of the channels' covariance
    (c, c) over pictures and positions: two lists of c numbers."""
    covariance = torch.cov(z.double().transpose(0, 1).flatten(1), correction=0)
    eigenvalues = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
    return covariance.diag().tolist(), eigenvalues.tolist()


def branch(trunk, out):
    """A copy of a run at the step where its learning rate begins to fall; one that has begun is left alone."""
    if not (out / "ckpt.pt").exists():
        out.mkdir(exist_ok=True)
        shutil.copyfile(trunk / "ckpt.pt", out / "new.pt")
        (out / "new.pt").rename(out / "ckpt.pt")


# ----------------------------------------------------------------------------------------------------------------------
# The paper's experiments


def structure(study):
    shown = ",".join(str(study.args.c // k) for k in (8, 4, 2, 1))
    for kind in ("structured", "plain"):
        if not study.rows(experiment="structure", arm=kind):
            table = study.reconstructions(study.autoencoder(kind), shown)
            study.add(experiment="structure", arm=kind, table=table)
    if not (study.home / "figures").exists():
        pictures = ["toy"]
        if study.data != "toy":
            classes = sorted(folder for folder in study.val.iterdir() if folder.is_dir())
            pictures = [min(folder.iterdir()) for folder in classes[:4]] or pictures
        run(ae, *pictures, "--ckpt", study.autoencoder("structured"), "--ckpt2", study.autoencoder("plain"),
            "--channels", shown, "--image_size", study.args.image_size, "--out", study.home / "figures")


def cure(study):
    for arm in study.args.arms:
        study.train(arm)


def problem(study):
    for c in (study.args.c // 4, study.args.c // 2, study.args.c):
        study.train("neither", c)
        if not study.rows(experiment="problem", c=c):
            table = study.reconstructions(study.autoencoder("plain", c), c)
            study.add(experiment="problem", c=c, table=table)


def small_c(study):
    for arm in ("neither", "both"):
        study.train(arm, 24, "6:24:6")


def sizes(study):
    for size in SIZES:
        for arm in ("neither", "both"):
            study.train(arm, size=size)


EXPERIMENTS = {"structure": structure, "cure": cure, "problem": problem, "small_c": small_c, "sizes": sizes}


# ----------------------------------------------------------------------------------------------------------------------
# The report: Markdown tables of all that has been run


def report(study):
    lines = [*report_classifier(study), *report_structure(study), *report_spectra(study), *report_problem(study),
             *report_gaussians(study), *report_runs(study), *report_ratios(study), *report_speed(study)]
    text = "\n".join(lines) + "\n"
    (study.home / "report.md").write_text(text)
    print("\n" + text)


def table_lines(head, rows):
    """Lists of cells -> the lines of a Markdown table, and an empty one."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return [lines[0], "| --- " * len(head) + "|", *lines[1:], ""]


def report_classifier(study):
    for row in study.rows(experiment="classifier")[-1:]:
        network = f" Distances: {study.args.features}." if study.args.features else ""
        return [f"Classifier: {100 * row['accuracy']:.1f} % right on held-out images.{network}", ""]
    return []


def report_structure(study):
    """One row for each autoencoder, a column for each c'."""
    found = study.rows(experiment="structure")
    if not found:
        return []
    knn = any("knn" in entry for row in found for entry in row["table"])
    what = "PSNR / distance" + (" / kNN in %" if knn else "")
    head = ["autoencoder"] + [f"c' = {entry['c_prime']}: {what}" for entry in found[0]["table"]]
    return table_lines(head, [[row["arm"], *map(reconstruction_cell, row["table"])] for row in found])


def reconstruction_cell(entry):
    """PSNR in dB / distance / share of pictures in % whose nearest neighbours in the latent tell their class."""
    cell = f"{entry['psnr']:.1f} / {entry['rfid']:.2f}"
    if "knn" in entry:
        cell += f" / {100 * entry['knn']:.1f}"
    return cell


def report_spectra(study):
    """Where an autoencoder's latents have their variance, and how many directions of the channels they use."""
    rows = []
    for row in study.rows(experiment="spectrum"):
        c = row["c"]
        shares = [sum(row["variances"][:max(1, c // k)]) / sum(row["variances"]) for k in (8, 4, 2)]
        needed = eigenvalues_for(row["eigenvalues"], 0.99)
        rows.append([row["arm"], c, *(f"{100 * share:.1f} %" for share in shares), needed])
    head = ["autoencoder", "c", "variance in the first c/8 channels", "c/4", "c/2", "eigenvalues that hold 99 %"]
    return table_lines(head, rows) if rows else []


def eigenvalues_for(eigenvalues, share):
    """How many of them, the largest first, hold this share of their sum."""
    held = np.cumsum(eigenvalues) / np.sum(eigenvalues)
    return int(np.searchsorted(held, share)) + 1


def report_problem(study):
    """Figure 1b: reconstruction and generation against c, at the longest runs."""
    rows = []
    for row in study.rows(experiment="problem"):
        cells = [row["c"], reconstruction_cell(row["table"][0])]
        for family in families(study):
            runs = study.rows(experiment="diffusion", family=family, arm="neither", c=row["c"], size="")
            last = max((run["step"] for run in runs), default=0)
            cells.append(f"{score_cell([run for run in runs if run['step'] == last])} (step {last:,})")
        rows.append(cells)
    head = ["plain autoencoder, c", "reconstructions: PSNR / distance / kNN in %",
            *(f"samples of {family}: distance / right class in %" for family in families(study))]
    return table_lines(head, rows) if rows else []


def report_gaussians(study):
    lines = [f"* Gaussian of the {row['arm']} autoencoder's latents, c = {row['c']}: distance {row['distance']:.2f}"
             for row in study.rows(experiment="gaussian")]
    return [*lines, ""] if lines else []


def report_runs(study):
    """One row for each network and arm, a column for each step."""
    runs = study.rows(experiment="diffusion")
    if not runs:
        return []
    steps = sorted({run["step"] for run in runs})
    kinds = {(run["family"], run["c"], run["size"], run["arm"]) for run in runs}
    rows = []
    for family, c, size, arm in sorted(kinds, key=lambda kind: (*kind[:3], list(ARMS).index(kind[3]))):
        mine = study.rows(experiment="diffusion", family=family, arm=arm, c=c, size=size)
        at = {step: [run for run in mine if run["step"] == step] for step in steps}
        last = at[max(steps, key=lambda step: (len(at[step]), step))]
        rows.append([f"{family} {size}".strip(), arm, c, len(last), *map(score_cell, at.values()),
                     score_cell(last, "front", "front_right")])
    head = ["network", "arm", "c", "seeds", *(f"step {step:,}" for step in steps),
            "its first channels alone, at the step that most seeds reached"]
    note = "distance / right class in %: mean ± standard deviation over training seeds; samples have the same seed " \
           "and labels"
    return [note, "", *table_lines(head, rows)]


def score_cell(runs, distance="distance", right="right"):
    """Distance / right class in %, over the runs that have them; empty where none has."""
    runs = [run for run in runs if distance in run]
    if not runs:
        return ""
    return f"{spread([run[distance] for run in runs], 2)} / {spread([100 * run[right] for run in runs], 1)}"


def spread(values, digits):
    """Mean ± standard deviation; of one value that alone."""
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def report_ratios(study):
    lines = []
    for family in families(study):
        found = ", ".join(f"{ratio:.2f} at step {step:,}" for step, ratio in ratios(study, family))
        lines += [f"* {family}, distance of both / neither: {found}"] if found else []
    return lines


def report_speed(study):
    """For each family and seed, where both ideas reach plain training's best distance."""
    lines = []
    runs = study.rows(experiment="diffusion", c=study.args.c, size="")
    for family, seed in dict.fromkeys((run["family"], run["seed"]) for run in runs):
        common = [step for step, _ in curve(study, family=family, arm="neither")]       # the same goal for all seeds
        plain = [(step, d) for step, d in curve(study, family=family, arm="neither", seed=seed) if step in common]
        both = curve(study, family=family, arm="both", seed=seed)
        lines += [f"* {family}, seed {seed}: {reached(plain, both)}"] if plain and both else []
    return lines


def families(study):
    """Those with runs at the study's own c and size."""
    return list(dict.fromkeys(run["family"] for run in study.rows(experiment="diffusion", c=study.args.c, size="")))


def curve(study, key="distance", **match):
    """[(step, mean over seeds)] of one family and arm, at the steps that all its seeds reached.
    key "front": of samples from the first channels alone."""
    runs = [run for run in study.rows(experiment="diffusion", c=study.args.c, size="", **match) if key in run]
    seeds = {run["seed"] for run in runs}
    points = []
    for step in sorted({run["step"] for run in runs}):
        values = [run[key] for run in runs if run["step"] == step]
        if len(values) == len(seeds):
            points.append((step, statistics.mean(values)))
    return points


def ratios(study, family):
    """[(step, distance of both / of neither)]: means over the seeds that have the two."""
    runs = study.rows(experiment="diffusion", c=study.args.c, size="", family=family)
    distance = {(run["arm"], run["seed"], run["step"]): run["distance"] for run in runs}
    pairs = {}                                                  # step -> [(both, neither)]
    for (arm, seed, step), both in distance.items():
        if arm == "both" and ("neither", seed, step) in distance:
            pairs.setdefault(step, []).append((both, distance["neither", seed, step]))
    return [(step, sum(both for both, _ in pair) / sum(neither for _, neither in pair))
            for step, pair in sorted(pairs.items())]


def reached(plain, both):
    """Two curves [(step, distance)] -> a sentence: where that of both ideas, linear between points, first meets plain
    training's best distance."""
    best, step = min((distance, step) for step, distance in plain)
    goal = f"plain training's best distance {best:.2f} (step {step:,}) is"
    for (s0, d0), (s1, d1) in zip([(0, math.inf), *both], both):
        if d1 > best:
            continue
        if d0 == math.inf:
            return f"{goal} reached by both ideas before step {s1:,}: at least {step / s1:.1f} x as fast"
        s = s0 + (s1 - s0) * (d0 - best) / (d0 - d1)
        return f"{goal} reached by both ideas at step {s:,.0f}: {step / s:.1f} x as fast"
    return f"{goal} not reached by both ideas within {both[-1][0]:,} steps"


# ----------------------------------------------------------------------------------------------------------------------
# The plot and the pictures


def plot(study):
    """Figure 5b: distance against training step, a panel for each family, a point for each seed, lines through the
    means."""
    shown = families(study)
    if not shown:
        return
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib (tests/requirements.txt)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(shown), figsize=(5 * len(shown), 4), squeeze=False)
    for axis, family in zip(axes[0], shown):
        for k, (arm, key) in enumerate([*((arm, "distance") for arm in ARMS), ("both", "front")]):
            runs = study.rows(experiment="diffusion", family=family, arm=arm, c=study.args.c, size="")
            runs = [run for run in runs if key in run]
            if not runs:
                continue
            label = arm if key == "distance" else f"{arm}, first channels alone"
            style = "-" if key == "distance" else ":"
            axis.plot(*zip(*curve(study, key, family=family, arm=arm)), color=f"C{k}", linestyle=style, label=label)
            axis.scatter([run["step"] for run in runs], [run[key] for run in runs], color=f"C{k}", s=8)
        axis.set(title=f"{family}, {study.args.name}", xlabel="training step", ylabel="feature distance")
        axis.legend()
    figure.tight_layout()
    figure.savefig(study.home / "convergence.png", dpi=90)
    plt.close(figure)


def draw_samples(study):
    """Samples of the first seed: a column for each class, two rows for each arm, two more for its first channels
    alone."""
    c = study.args.c
    last = max(study.args.points) if study.args.cooldown else ""
    for family in families(study):
        seed = min(run["seed"] for run in study.rows(experiment="diffusion", family=family, c=c, size=""))
        tiles, titles = [], []
        for arm in ARMS:
            for kind, title in (("samples", arm), ("front", "first channels")):
                path = study.run_folder(family, arm, c, "", seed, last) / kind / "samples.npz"
                if not path.exists():
                    continue
                with np.load(path) as f:
                    pixels, labels = f["arr_0"], f["arr_1"]
                classes = sorted(set(labels.tolist()))[:10]                 # the same for all arms: same seed
                picks = np.stack([np.resize(np.flatnonzero(labels == k), 2) for k in classes])      # (classes, 2)
                tiles.append(torch.from_numpy(pixels[picks.T.flatten()]))
                titles += [title] * 2
        if tiles:
            ae.save_grid(torch.cat(tiles), study.home / f"samples-{family}.png", len(classes), rows=titles)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("name", help="of the study: its folder under out/reproduce; toy uses the built-in images")
    add("--data", help="class folders of training images (default: the built-in images)")
    add("--val", help="class folders that nothing trains on")
    add("--only", nargs="*", default=["structure", "cure"], choices=list(EXPERIMENTS),
        help="experiments to run (default: structure cure; with none after it, tables and plots alone)")
    add("--models", nargs="+", default=["USiT"], choices=MODELS, help="diffusion families")
    add("--arms", nargs="+", default=list(ARMS)[:4], choices=ARMS,
        help="of cure; balanced: both, with every latent channel scaled to variance 1 (not in the paper)")
    add("--seeds", nargs="+", type=int, default=[0], help="of the diffusion models")
    add("--points", nargs="+", type=int, default=POINTS,
        help="training steps at which samples are scored; the last one ends the run")
    add("--images", type=int, default=8192, help="training images (encoded once, plain and mirrored)")
    add("--image_size", type=int, default=32, help="pixels, a multiple of f")
    add("--f", type=int, default=8, help="spatial compression of the autoencoders: 2^k, with k + 1 --widths")
    add("--c", type=int, default=96,
        help="channels of the latent: at 32 px and f8, 4 x 4 x 96 numbers for 32 x 32 x 3 pixel values")
    add("--channels", default="12:96:12", help="the c' of structured latents and of augmented training")
    add("--widths", default="16,32,32,64", help="of the autoencoder's stages")
    add("--texture", type=float, default=0.0, help="toy pictures under white texture of this rms (0.08)")
    add("--ae_steps", type=int, help="training steps of the autoencoders, in the last 3/4 of which the rate falls "
        "(default: the toy preset's, or 4,000)")
    add("--batch_size", type=int, default=16, help="of the diffusion models")
    add("--cooldown", type=float, default=0.0, help="share of each run in which the learning rate falls to zero")
    add("--n", type=int, default=1000, help="samples of a score")
    add("--features", metavar="FILE.pt2",
        help="network of the distances, as in fid.py (tests/efficientnet.py exports one); FILE.json: its classes")
    add("--out", help="folder (default: out/reproduce/NAME)")
    return p.parse_args(argv)


def main(argv=None):
    study = Study(parse(argv))
    study.open_networks()
    for name in study.args.only:
        EXPERIMENTS[name](study)
    study.spectra()
    report(study)
    plot(study)
    draw_samples(study)


if __name__ == "__main__":
    main()
