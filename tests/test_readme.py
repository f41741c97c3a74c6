"""The commands, forks, links and pictures of both README pages.    python -m pytest tests/test_readme.py"""

import argparse
import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
README, STUDY = (ROOT / "README.md").read_text(), (ROOT / "tests" / "README.md").read_text()
STAGES = ["ae", "diffusion", "sample", "fid", "train_ae", "train_diffusion"]
FROM_AE = {"InputError", "channel_mask", "open_weights", "own_copy", "plain_names", "splitmix64", "whole"}        # for diffusion.py


def code_blocks(text, language=""):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
    return [body for name, body in blocks if name == language]


def commands(page):
    """(script, flags) of every command in a page's code blocks, loops and chains unrolled, notes stripped."""
    found = []
    for line in "\n".join(code_blocks(page)).splitlines():
        if not re.match(r"python|torchrun|srun|pip|for ", line):
            continue
        for part in re.split(r"&&|;", line.split("  #")[0]):
            if m := re.search(r"(?:python|torchrun .*?) ((?:tests/)?\w+\.py)(.*)", part):
                flags = m[2].replace("...", "").replace("[--fsdp]", "--fsdp").replace("$c", "32")
                flags = flags.replace("--$x", "--no-augment").replace("$x", "x").replace("$a", "ae-128")
                flags = flags.replace("$m", "DiT-XL" if "--model $m" in flags else "128")
                found.append((m[1], shlex.split(flags)))
    return found


@pytest.mark.parametrize("script, flags", commands(README) + commands(STUDY),
                         ids=lambda x: x if isinstance(x, str) else " ".join(x)[:60])
def test_command_parses(script, flags, monkeypatch):
    class Parsed(Exception):
        pass

    def parse_args(self, argv=None, namespace=None):
        args, rest = argparse.ArgumentParser.parse_known_args(self, argv)
        assert not rest, rest
        raise Parsed
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    if script == "tests/toy_classifier.py":                                     # no main(): its flags stand in its text
        known = re.findall(r'add_argument\("(--\w+)"', (ROOT / script).read_text())
        assert {flag for flag in flags if flag.startswith("--")} <= set(known)
        return
    monkeypatch.setattr(sys, "argv", [script, *flags])
    main = __import__(Path(script).stem).main
    with pytest.raises(Parsed):
        main() if script.startswith("tests/") else main(flags)


def test_there_are_commands_for_every_script():
    scripts = {script[:-3] for script, _ in commands(README)}
    assert len(commands(README)) >= 30 and set(STAGES) - {"diffusion"} <= scripts


def test_quick_start_and_own_images_on_tiny_settings(tmp_path):
    tiny = {"train_ae.py": "--steps 4 --eval_every 2 --eval_num 8 --save_every 2",
            "train_diffusion.py": "--steps 2 --eval_every 2 --max_images 64",
            "sample.py": "--n 10 --solver heun --steps 2", "fid.py": "--num 10"}
    rng = np.random.default_rng(0)
    for k in range(6):
        folder = tmp_path / "photos" / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (80, 90, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    quick = README[README.index("## Quick start"):README.index("## Results")]
    own = README[README.index("## Your own images"):README.index("## Does the claim")]
    runs = commands(quick) + commands(own)
    assert len(runs) == 8
    for script, flags in runs:
        result = subprocess.run([sys.executable, ROOT / script, *flags, *tiny[script].split()], cwd=tmp_path,
                                capture_output=True, text=True)
        assert result.returncode == 0, (script, flags, result.stderr[-1500:])
        if script == "fid.py":
            assert json.loads(result.stdout.strip().splitlines()[-1])["n"] == 10
    for file in ("out/toy-ae/recon_0000004.png", "out/toy-diffusion/samples_0000002.png",
                 "out/toy-samples/samples.png", "out/toy-samples/samples.npz"):
        assert (tmp_path / file).stat().st_size > 1000, file


def apply_fork(block, folder):
    """A fork names its file, then shows hunks: ' ' lines stand there, '-' lines go, '+' lines come."""
    head, *lines = block.splitlines()
    file = folder / head.split(":")[0]
    for hunk in "\n".join(lines).split("\n@@\n"):
        old = "\n".join(line[1:] for line in hunk.splitlines() if line[:1] in (" ", "-"))
        new = "\n".join(line[1:] for line in hunk.splitlines() if line[:1] in (" ", "+"))
        text = file.read_text()
        assert text.count(old) == 1, (head, old)
        file.write_text(text.replace(old, new))


def test_the_five_forks_apply_and_train(tmp_path):
    for name in STAGES:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    forks = re.split(r"\n(?=\w+\.py: )", "".join(code_blocks(README, "diff")).strip())
    assert len(forks) == 5
    for block in forks:
        apply_fork(block, tmp_path)
    fields = np.random.default_rng(0).uniform(-1, 1, (12, 5, 32, 32)).astype(np.float32)
    np.save(tmp_path / "fields.npy", fields)
    small = "--batch_size 2 --steps 2"
    diffusion = f"--model SiT-T {small} --max_images 8"
    for line in (f"train_ae.py --data fields.npy --in_channels 5 --lpips 0 --toy {small} --out ae",
                 f"train_diffusion.py --ae ae --data fields.npy {diffusion} --out d5",
                 f"train_diffusion.py --ae unshuffle --data toy --image_size 32 {diffusion} --out d",
                 "sample.py --ckpt d5 --n 2 --solver euler --steps 2 --out s5",
                 "sample.py --ckpt d --n 2 --solver euler --steps 2 --out s"):
        script, *flags = line.split()
        result = subprocess.run([sys.executable, tmp_path / script, *flags], cwd=tmp_path,
                                capture_output=True, text=True)
        assert result.returncode == 0, (line, result.stderr[-1500:])
    assert np.load(tmp_path / "s" / "samples.npz")["arr_0"].shape == (2, 32, 32, 3)
    assert np.load(tmp_path / "s5" / "samples.npz")["arr_0"].shape == (2, 32, 32, 5)
    assert (tmp_path / "d" / "samples_0000002.png").exists()
    with Image.open(tmp_path / "ae" / "recon_0000002.png") as shown:            # fields 0, 1, 2 as red, green, blue
        left = shown.width - 8 * 66
        first = np.asarray(shown)[:64, left:left + 64].reshape(32, 2, 32, 2, 3)[:, 0, :, 0]
    assert np.abs(first - (fields[0, :3].transpose(1, 2, 0) + 1) * 127.5).max() <= 0.51


def test_imports_only_point_upwards():
    for i, name in enumerate(STAGES):
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert not [m for m in modules if m in STAGES[i:]], (name, modules)
            if name == "diffusion" and "ae" in modules:
                assert isinstance(node, ast.ImportFrom) and {a.name for a in node.names} <= FROM_AE


@pytest.mark.parametrize("script", ["ae", "sample", "fid", "train_ae", "train_diffusion"])
def test_help_explains_every_flag(script, monkeypatch):
    parsers = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *a: parsers.append(self) or sys.exit())
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", lambda self, *a: self.parse_args())
    with pytest.raises(SystemExit):
        __import__(script).main([])
    flags = [a for a in parsers[0]._actions if a.option_strings]
    assert len(flags) > 5 and not [a.option_strings for a in flags if not a.help]


def test_the_lines_that_are_named_hold_what_they_are_named_for():
    named = re.findall(r"`(\w+)` \((\w+\.py):(\d+)\)", README)
    assert len(named) >= 4
    for name, file, number in named:
        line = (ROOT / file).read_text().splitlines()[int(number) - 1]
        assert re.match(rf"\s*(def|class) {name}\b", line), (name, file, number, line)


def test_pictures_and_links_exist():
    for page, folder in ((README, ROOT), (STUDY, ROOT / "tests")):
        for path in re.findall(r"\]\(([^)#]+)\)", page):
            assert path.startswith("http") or (folder / path).exists(), path
        assert "@@P" not in page and "TODO" not in page
