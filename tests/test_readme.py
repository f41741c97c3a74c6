"""The README's commands: all parse, the quick start runs.    python -m pytest tests/test_readme.py"""

import argparse
import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```\w*\n(.*?)```", README, re.S))
STAGES = ["ae", "diffusion", "sample", "fid", "train_ae", "train_diffusion"]


def commands():
    """(script, flags) of every command of the README's code blocks, loops and chains unrolled, notes stripped."""
    found = []
    for line in BLOCKS.splitlines():
        for part in re.split(r"&&|;", line.split("  #")[0]) if re.match(r"python|torchrun|srun|pip|for ", line) else ():
            if m := re.search(r"(?:python|torchrun .*?) (\w+\.py)(.*)", part):
                found.append((m[1], shlex.split(m[2].replace("...", "").replace("$c", "32").replace("$m", "DiT-XL" if "--model $m" in m[2] else "128").replace("[--fsdp]", "--fsdp"))))
    return found


@pytest.mark.parametrize("script, flags", commands(), ids=lambda x: x if isinstance(x, str) else " ".join(x)[:60])
def test_command_parses(script, flags, monkeypatch):
    class Parsed(Exception):
        pass

    def parse_args(self, argv=None, namespace=None):
        args, rest = argparse.ArgumentParser.parse_known_args(self, argv)
        assert not rest, rest
        raise Parsed
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Parsed):
        __import__(script[:-3]).main(flags)


def test_there_are_commands_for_every_script():
    assert len(commands()) > 30 and {s[:-3] for s, _ in commands()} == set(STAGES) - {"diffusion"}


def test_quick_start_on_tiny_settings(tmp_path):
    tiny = {"train_ae.py": "--steps 4 --eval_every 2 --eval_num 8 --save_every 2", "train_diffusion.py": "--steps 2 --eval_every 2 --max_images 64",
            "sample.py": "--n 10 --solver heun --steps 2", "fid.py": "--num 10"}
    rng = np.random.default_rng(0)
    for k in range(6):
        folder = tmp_path / "photos" / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (80, 90, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    part = README[README.index("## Quick start"):README.index("## Real images")]
    lines = [line.split("  #")[0] for block in re.findall(r"```\w*\n(.*?)```", part, re.S) for line in block.splitlines()]
    assert len(lines) == 8
    for line in lines:
        script, *flags = shlex.split(line)[1:]
        result = subprocess.run([sys.executable, ROOT / script, *flags, *tiny[script].split()], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, (line, result.stderr[-1500:])
        if script == "fid.py":
            assert json.loads(result.stdout.strip().splitlines()[-1])["n"] == 10
    for file in ("out/toy-ae/recon_0000004.png", "out/toy-diffusion/samples_0000002.png", "out/toy-samples/samples.png", "out/toy-samples/samples.npz"):
        assert (tmp_path / file).stat().st_size > 1000, file


def test_imports_only_point_upwards():
    for i, name in enumerate(STAGES):
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not [m for m in modules if m in STAGES and (STAGES.index(m) >= i or (name, m) == ("diffusion", "ae"))]


@pytest.mark.parametrize("script", ["ae", "sample", "fid", "train_ae", "train_diffusion"])
def test_help_explains_every_flag(script, monkeypatch):
    parsers = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *a: parsers.append(self) or sys.exit())
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", lambda self, *a: self.parse_args())
    with pytest.raises(SystemExit):
        __import__(script).main([])
    flags = [a for a in parsers[0]._actions if a.option_strings]
    assert len(flags) > 5 and not [a.option_strings for a in flags if not a.help]


def test_pictures_of_the_readme_exist():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).exists(), path
    assert "@@" not in README
