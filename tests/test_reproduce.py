"""The parts of reproduce.py that its tables rest on.    python -m pytest tests/test_reproduce.py"""

import json
import sys
from types import SimpleNamespace

import torch

import reproduce
import train_ae
from ae import DCAE, open_images
from toy_classifier import Classifier, accuracy, export


def test_balanced_autoencoder_is_the_same_with_unit_channels(tmp_path):
    train_ae.main("--f 4 --c 8 --widths 16,16,32 --depths 0,1,1 --image_size 16 --channels 2,4,8 --batch_size 4 --lr 1e-3 --warmup 2 --eval_every 0 "
                  f"--steps 20 --out {tmp_path}/a".split())
    data = open_images("toy", 16)
    before, after = DCAE.from_pretrained(tmp_path / "a"), DCAE.from_pretrained(reproduce.balanced(tmp_path / "a", tmp_path / "b", data))
    x = data.get_batch(list(range(200)), list(range(200)))[0]
    with torch.no_grad():
        for c_prime in (2, 8):
            assert torch.allclose(before(x, c_prime), after(x, c_prime), atol=1e-5)
        std = after.encode(x).std((0, 2, 3))
    assert (std - 1).abs().max() < 0.2 < (before.encode(x).std((0, 2, 3)) - 1).abs().max()


def test_reached_is_where_the_curves_meet():
    plain = [(100, 8.0), (200, 4.0), (300, 5.0)]
    assert "at step 100: 2.0 x" in reproduce.reached(plain, [(50, 6.0), (150, 2.0)])
    assert "not reached" in reproduce.reached(plain, [(50, 6.0), (150, 5.0)])
    assert "before step 50: at least 4.0 x" in reproduce.reached(plain, [(50, 3.0), (150, 5.0)])


def test_exported_classifier_gives_the_same_features(tmp_path):
    net = Classifier(10).eval()
    export(net, 32, tmp_path / "f.pt2")
    img = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    for a, b in zip(net(img), torch.export.load(tmp_path / "f.pt2").module()(img)):
        assert torch.allclose(a, b, atol=1e-5)
    assert 0 <= accuracy(net, open_images("toy", 32), n=50) <= 0.5          # an untrained one guesses


def test_whole_study_on_tiny_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "AUTOENCODER", "--f 8 --widths 16,16,16,16 --depths 0,1,1,1 --steps 2 --cooldown 0 --eval_num 20")
    monkeypatch.setattr(reproduce.toy_classifier, "train", lambda data, steps: Classifier(data.num_classes).eval())
    monkeypatch.setattr(reproduce.fid, "MIN_IMAGES", 2)
    command = f"reproduce.py toy --only structure cure --arms neither both --seeds 0 1 --points 2 4 --images 64 --n 20 --out {tmp_path}".split()
    for _ in range(2):                                                                 # the second run has nothing left to do
        monkeypatch.setattr(sys, "argv", command)
        reproduce.main()
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    runs = [(r["arm"], r["seed"], r["step"]) for r in rows if r["experiment"] == "diffusion"]
    assert sorted(runs) == [(arm, seed, step) for arm in ("both", "neither") for seed in (0, 1) for step in (2, 4)]
    assert all(("front" in r) == (r["arm"] == "both") for r in rows if r["experiment"] == "diffusion")
    report = (tmp_path / "report.md").read_text()
    assert "| USiT | both | 96 | 2 |" in report and "| structured |" in report and "plain training's best" in report
    assert {"convergence.png", "samples-USiT.png"} <= {p.name for p in tmp_path.glob("*.png")}


def test_families_are_compared_at_steps_that_all_seeds_reached(tmp_path):
    study = reproduce.Study(reproduce.parse(["toy", "--out", str(tmp_path)]))
    for arm, seed, step, distance in [("neither", 0, 100, 8.0), ("neither", 0, 200, 4.0), ("neither", 1, 100, 6.0),
                                      ("both", 0, 100, 9.0), ("both", 0, 200, 7.0), ("both", 1, 100, 3.0)]:
        study.add(experiment="diffusion", family="DiT", arm=arm, c=96, size="", seed=seed, step=step, distance=distance, right=0.5)
    assert study.curve(family="DiT", arm="neither") == [(100, 7.0)]
    study.report()
    report = (tmp_path / "report.md").read_text()
    assert "| DiT | neither | 96 | 2 | 7.00 ± 1.41 / 50.0 ± 0.0 | 4.00 / 50.0 |" in report
    assert "DiT, seed 0: plain training's best distance 8.00 (step 100) is reached by both ideas at step 150: 0.7 x" in report
