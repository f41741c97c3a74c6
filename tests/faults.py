"""Both trainers under faults: killed at random moments, checkpoints damaged, gone on with by the same command.

    python tests/faults.py --trials 20                  # 8 minutes on two CPU cores; not collected by pytest

For each trainer, alone and as two ranks under torchrun: a run that nobody disturbs, then runs that are killed (kill -9
of all processes, kill -9 of one of them, SIGTERM) at a random moment of their life, between which now and then a bit of
ckpt.pt is flipped where a ckpt_prev.pt stands beside it. Each run starts again by the same command until it has ended
by itself. Then its checkpoint (weights, moments, average, z_square), latent cache, log and evaluations must be those of
the undisturbed run, bit for bit. A kill is survived where that holds of its run. Exit code 1 where one is not.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
COMMON = "--batch_size 4 --lr 1e-3 --warmup 2 --channels 2,4,8 --steps 60 --save_every 3 --log_every 2 --workers 1"
AE = "--f 4 --c 8 --widths 16,16,32 --depths 0,1,1 --image_size 16"
SCRIPTS = {
    "train_ae.py": f"{AE} {COMMON} --eval_every 20 --eval_num 8 --out OUT",
    "train_diffusion.py": f"--ae HOME/ae --cache OUT/cache --max_images 1200 --model SiT-T --depth 2 --hidden 48 "
                          f"--heads 2 {COMMON} --eval_every 0 --out OUT"}
KILLS = {"kill -9": 5, "kill -9 of one process": 2, "SIGTERM": 2}       # how, and how often


def start(script, flags, ranks, folder):
    """Its output goes to a file; a word in its environment tells all its processes from others."""
    launcher = f"-m torch.distributed.run --standalone --nproc_per_node {ranks}".split() if ranks > 1 else []
    word = f"{os.getpid()}-{time.time()}"
    env = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "FAULTS": word}
    with open(f"{folder}/output.txt", "w") as output:
        p = subprocess.Popen([sys.executable, *launcher, str(ROOT / script), *flags.split()], cwd=ROOT, env=env,
                             stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    p.word, p.output = f"FAULTS={word}".encode(), output.name
    return p


def processes(p):
    """Ids of all that run: torchrun, ranks, loaders."""
    pids = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            if p.word in file.read_bytes().split(b"\0"):
                pids.append(int(file.parent.name))
        except OSError:                                           # it has ended meanwhile, or is another user's
            pass
    return pids


def send(number, pids):
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def kill_all(p):
    while p.poll() is None or processes(p):
        send(signal.SIGKILL, processes(p))
        time.sleep(0.02)


def disturb(p, how, rng):
    pids = processes(p)
    if how == "kill -9":
        kill_all(p)
    elif how == "SIGTERM":
        send(signal.SIGTERM, pids)
    elif len(pids) > 1:                                           # a rank or a loader; torchrun ends the others
        send(signal.SIGKILL, [rng.choice([pid for pid in pids if pid != p.pid])])
    else:
        send(signal.SIGKILL, pids)


def end(p, timeout=120):
    """Exit code and output, once it has ended by itself."""
    try:
        code = p.wait(timeout)
    except subprocess.TimeoutExpired:
        code = "hangs"
    kill_all(p)
    return code, Path(p.output).read_text(errors="replace")


def flip_a_bit(path, rng):
    with open(path, "r+b") as f:
        f.seek(rng.randrange(os.path.getsize(path)))
        byte = f.read(1)[0] ^ 1 << rng.randrange(8)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte]))


def tensors(x, name=""):
    if isinstance(x, torch.Tensor):
        return {name: x}
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, (list, tuple)) else ()
    return {k: t for key, value in items for k, t in tensors(value, f"{name}.{key}").items()}


def difference(a, b):
    """In words, between what two runs have left; "" if there is none."""
    one, other = (torch.load(out / "ckpt.pt", weights_only=True) for out in (a, b))
    for name in ("step", "scale", "skipped"):
        if one[name] != other[name]:
            return f"{name} {one[name]}, not {other[name]}"
    one, other = tensors(one), tensors(other)
    wrong = [name for name in other if name not in one or not torch.equal(one[name], other[name])]
    if wrong or one.keys() != other.keys():
        return f"{len(wrong)} of {len(other)} tensors differ, as {wrong[:1]}"
    for file in b.glob("cache/*.npy"):
        if file.read_bytes() != (a / "cache" / file.name).read_bytes():
            return f"{file.name} differs"
    logs = [(out / "log.jsonl").read_text().splitlines() for out in (a, b)]
    steps = [[json.loads(line)["step"] for line in lines if json.loads(line)["step"] % 2 == 0] for lines in logs]
    if steps[0] != steps[1]:
        return "log.jsonl has other steps"
    if (b / "eval.jsonl").exists() and (a / "eval.jsonl").read_text() != (b / "eval.jsonl").read_text():
        return "eval.jsonl differs"
    return ""


def one_run(script, flags, ranks, folder, args, rng, seconds, left, bar):
    """A run that is disturbed up to `left` times. Returns (kills by kind, bits flipped, what is wrong or "")."""
    kills, flips, out = dict.fromkeys(KILLS, 0), 0, folder / "out"
    folder.mkdir()
    while True:
        p = start(script, flags.replace("OUT", str(out)), ranks, folder)
        if sum(kills.values()) < left:
            try:
                p.wait(rng.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                how = rng.choices(list(KILLS), list(KILLS.values()))[0]
                kills[how] += 1
                bar.update()
                disturb(p, how, rng)
                if end(p)[0] == "hangs":
                    return kills, flips, f"hangs after {how}"
                if rng.random() < args.flips and (out / "ckpt.pt").exists() and (out / "ckpt_prev.pt").exists():
                    flips += 1
                    flip_a_bit(out / "ckpt.pt", rng)
                continue
        code, text = end(p, timeout=600)
        if code:
            return kills, flips, f"exit code {code}: {text[-600:]}"
        return kills, flips, difference(out, folder.parent / "undisturbed" / "out")


def one_kind(script, ranks, home, args, rng, bar):
    """All trials of a trainer on so many ranks. Returns the number of runs that went wrong."""
    folder = Path(home, f"{script}-{ranks}")
    (folder / "undisturbed").mkdir(parents=True)
    flags, begun = SCRIPTS[script].replace("HOME", home), time.time()
    p = start(script, flags.replace("OUT", f"{folder}/undisturbed/out"), ranks, folder / "undisturbed")
    code, text = end(p, timeout=600)
    assert code == 0, text
    seconds = time.time() - begun
    tried, survived, flips, runs, failed = dict.fromkeys(KILLS, 0), 0, 0, 0, 0
    while sum(tried.values()) < args.trials:
        runs, left = runs + 1, args.trials - sum(tried.values())
        kills, flipped, wrong = one_run(script, flags, ranks, folder / f"run{runs}", args, rng, seconds, left, bar)
        tried, flips = {how: tried[how] + kills[how] for how in KILLS}, flips + flipped
        if wrong:
            failed += 1
            tqdm.write(f"{script}, {ranks} ranks, run {runs}, after {kills}: {wrong}")
            shutil.copytree(folder / f"run{runs}", f"faults-{script}-{ranks}-{runs}", dirs_exist_ok=True)
        else:
            survived += sum(kills.values())
    ways = ", ".join(f"{n} {how}" for how, n in tried.items())
    tqdm.write(f"{script}, {ranks} rank(s): {sum(tried.values())} tried / {survived} survived in {runs} runs "
               f"({ways}; {flips} bits flipped)")
    return failed


def main():
    p = argparse.ArgumentParser(description="Kill trainers at random moments and compare what they end with.")
    p.add_argument("--trials", type=int, default=20, help="kills of each trainer, alone and as two ranks")
    p.add_argument("--flips", type=float, default=0.25, help="share of kills after which a bit of ckpt.pt is flipped")
    p.add_argument("--scripts", nargs="+", default=list(SCRIPTS), choices=list(SCRIPTS))
    p.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    rng, failed = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as home:
        code, text = end(start("train_ae.py", f"{AE} {COMMON} --steps 3 --eval_every 0 --out {home}/ae", 1, home))
        assert code == 0, text
        with tqdm(total=args.trials * len(args.scripts) * len(args.ranks), unit="kill", dynamic_ncols=True) as bar:
            for script in args.scripts:
                for ranks in args.ranks:
                    failed += one_kind(script, ranks, home, args, rng, bar)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
