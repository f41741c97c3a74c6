"""The latent cache: what it was made from, what its checksums see, how it ends when something is wrong."""

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import ae as ae_file
import train_diffusion
from ae import DCAE, InputError
from test_train import ROOT, SMALL, Job, clean_up, encode, to_float, write_autoencoder  # noqa: F401
from train_diffusion import Latents

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
STEP = f"--model SiT-T {SMALL} --channels 8 --batch_size 4 --steps 1 --eval_every 0"
INDEX = [0, 2, 4, 7, 9]                                           # 5 of 12 pictures, evenly spaced


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An autoencoder, 12 pictures in two classes (.ppm: another picture has the same size), and two caches: of 5 of
    these pictures, and of 520 toy pictures, that is with a second chunk."""
    folder = tmp_path_factory.mktemp("home")
    write_autoencoder(folder / "ae", scale=0.5)
    rng = np.random.default_rng(0)
    for k in range(12):
        name = folder / "data" / ("cat" if k < 8 else "dog") / f"{k:02}.ppm"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(name)
    stage2(folder_flags(folder, folder / "small"))
    stage2(toy_flags(folder, folder / "long"))
    return folder


def stage2(flags):
    """A new run on a cache; one that has ended would not look at it."""
    flags = flags.split()
    shutil.rmtree(flags[flags.index("--out") + 1], ignore_errors=True)
    train_diffusion.main(flags)


def folder_flags(home, cache, data=None):
    data = data or home / "data"
    return f"--ae {home}/ae --data {data} --max_images 5 --image_size 16 {STEP} --cache {cache} --out {cache}.run"


def toy_flags(home, cache):
    return f"--ae {home}/ae --max_images 520 {STEP} --cache {cache} --out {cache}.run"


def crc_by_hand(folder, rows):
    latents, labels = (np.load(f"{folder}/{name}.npy") for name in ("latents", "labels"))
    return zlib.crc32(latents[0, rows].tobytes() + latents[1, rows].tobytes() + labels[rows].tobytes())


def contents(folder):
    return {name: (folder / name).read_bytes() for name in ("latents.npy", "labels.npy", "done.npy", "manifest.json")}


def write(path, values):
    """Into the middle of a file, as it stands."""
    with open(path, "r+b") as f:
        f.seek(os.path.getsize(path) // 2)
        f.write(values)


def no_encoding():
    return mock.patch.object(DCAE, "encode", side_effect=AssertionError("encoded"))


def refused(flags, *words):
    """One line that names these words, before anything is encoded."""
    with no_encoding(), pytest.raises(InputError) as e:
        stage2(flags)
    line = str(e.value)
    assert len(line) < 200 and "\n" not in line and all(str(word) in line for word in words), line


# ----------------------------------------------------------------------------------------------------------------------
# What is written


def test_the_manifest_and_the_checksums_by_hand(home):
    files = sorted((home / "data").rglob("*.ppm"))
    files = [files[k] for k in INDEX]
    names = [f"{file.parent.name}/{file.name}\0{file.stat().st_size}\0".encode() for file in files]
    assert names[:2] == [b"cat/00.ppm\x00781\x00", b"cat/02.ppm\x00781\x00"]      # 13 bytes, then 16 x 16 x 3
    manifest = json.load(open(home / "small" / "manifest.json"))
    assert manifest["files"] == hashlib.sha256(b"".join(names + [file.read_bytes() for file in files])).hexdigest()
    assert (manifest["data"], manifest["dtype"], manifest["format"]) == (str(home / "data"), "fp32", 2)
    assert np.load(home / "small" / "done.npy").tolist() == [crc_by_hand(home / "small", slice(None))]

    manifest = json.load(open(home / "long" / "manifest.json"))
    assert manifest["data"] == "toy" and manifest["files"] == hashlib.sha256().hexdigest()
    done = np.load(home / "long" / "done.npy")
    assert done.dtype == np.uint32
    assert done.tolist() == [crc_by_hand(home / "long", rows) for rows in (slice(512), slice(512, 520))]


def test_a_checksum_is_written_after_its_data_are_on_the_disk(home, tmp_path, monkeypatch):
    """Data, a wait for the disk, then the mark."""
    seen = []
    fsync = os.fsync

    def spy(number):
        path = os.readlink(f"/proc/self/fd/{number}")
        if path.startswith(f"{tmp_path}/c/"):
            seen.append((os.path.basename(path), bool(np.load(tmp_path / "c" / "done.npy").all())))
        fsync(number)
    monkeypatch.setattr(os, "fsync", spy)
    stage2(folder_flags(home, tmp_path / "c"))
    assert seen == [("latents.npy", False), ("latents.npy", False), ("labels.npy", False), ("done.npy", True)]


def test_a_cache_goes_on_in_the_dtype_that_it_was_begun_in(home, tmp_path):
    flags = toy_flags(home, tmp_path / "c")
    stage2(f"{flags} --dtype bf16")
    whole = contents(tmp_path / "c")
    assert json.loads(whole["manifest.json"])["dtype"] == "bf16"
    pixels = ae_file.open_images("toy", 16, train=True).get_batch(range(512, 520))[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        z = DCAE.from_pretrained(home / "ae").encode(pixels)
    stored = np.load(tmp_path / "c" / "latents.npy")
    assert np.array_equal(stored[0, 512:], z.half().numpy())
    assert not np.array_equal(stored, np.load(home / "long" / "latents.npy"))
    done = np.load(tmp_path / "c" / "done.npy")
    np.save(tmp_path / "c" / "done.npy", done * np.array([1, 0], np.uint32))      # killed in the second chunk
    stage2(f"{flags} --dtype fp32 --out {tmp_path}/d")
    assert contents(tmp_path / "c") == whole


# ----------------------------------------------------------------------------------------------------------------------
# The data set has changed, or only seems to


def test_other_data_are_refused_and_the_same_elsewhere_are_not(home, tmp_path):
    data = shutil.copytree(home / "data", tmp_path / "data")
    cache = shutil.copytree(home / "small", tmp_path / "c")       # both copied
    flags, before = folder_flags(home, cache, data), contents(cache)
    with no_encoding():
        stage2(flags)
        for file in data.rglob("*.ppm"):
            os.utime(file, (0, 0))                                # touched
        stage2(flags)
        stage2(folder_flags(home, cache, f"{data}/"))
        (data / "cat" / "01.ppm").unlink()
        (data / "cat" / "011.ppm").write_bytes(b"not one of the five")
        stage2(flags)
    assert contents(cache) == before

    picture, times = data / "cat" / "04.ppm", (0, 0)
    honest = picture.read_bytes()
    picture.write_bytes(honest[:-1] + bytes([honest[-1] ^ 1]))    # another picture of the same size, and time
    os.utime(picture, times)
    refused(flags, "--cache", cache, "another files;", "remove the folder or name another")
    picture.write_bytes(honest)
    picture.rename(data / "cat" / "03b.ppm")                      # another name, the same order
    refused(flags, "--cache", "another files;")
    (data / "cat" / "03b.ppm").rename(picture)
    (data / "cat" / "07.ppm").rename(data / "dog" / "07.ppm")     # moved to the other class
    refused(flags, "--cache", "another files;")
    (data / "dog" / "07.ppm").rename(data / "cat" / "07.ppm")
    picture.write_bytes(honest + b"\0")                           # another size
    refused(flags, "--cache", "another files;")
    picture.write_bytes(honest)
    refused(flags.replace(str(data), "toy"), "--cache", "files")
    with no_encoding():
        stage2(flags)


def test_a_zip_of_the_folder_is_the_same_cache(home, tmp_path):
    """Images are as many, in the same order and the same bits; its digest too."""
    shutil.make_archive(tmp_path / "data", "zip", home / "data")
    stage2(folder_flags(home, tmp_path / "c", tmp_path / "data.zip"))
    ours, theirs = contents(tmp_path / "c"), contents(home / "small")
    manifest, other = (json.loads(x.pop("manifest.json")) for x in (ours, theirs))
    assert ours == theirs and manifest.pop("data").endswith("data.zip")
    assert manifest == {name: value for name, value in other.items() if name != "data"}
    with no_encoding():                                           # and either reads the other's
        stage2(folder_flags(home, shutil.copytree(home / "small", tmp_path / "d"), tmp_path / "data.zip"))


def test_a_short_outage_while_caching_replaces_no_picture(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ae_file, "WAITS", (0.001,) * 5)
    read, failed = ae_file.read_bytes, set()

    def fail_once(path):
        if path.endswith(".ppm") and path not in failed:
            failed.add(path)
            raise OSError(errno.EIO, "Input/output error", path)
        return read(path)
    with mock.patch.object(ae_file, "read_bytes", fail_once):
        stage2(folder_flags(home, tmp_path / "c"))
    assert len(failed) >= 5 and "replaced" not in capsys.readouterr().err
    pixels = np.stack([np.asarray(Image.open(file)) for file in sorted((home / "data").rglob("*.ppm"))])
    z = encode(home / "ae", to_float(pixels[INDEX])).numpy()
    assert np.abs(np.load(tmp_path / "c" / "latents.npy")[0] - z).max() < 1e-3 * np.abs(z).max()


# ----------------------------------------------------------------------------------------------------------------------
# Damage


def test_any_flipped_bit_is_one_line_or_changes_nothing(home, tmp_path):
    """Bits of the headers, of the data and of the checksums; 5 pictures in one chunk."""
    cache = shutil.copytree(home / "small", tmp_path / "c")
    keys = range(5)
    z, y = Latents(cache).get_batch(range(5), keys)
    stored = np.load(home / "small" / "latents.npy")
    assert all(any(np.array_equal(z[k], stored[m, k]) for m in (0, 1)) for k in range(5))
    assert y.tolist() == [0, 0, 0, 0, 1]
    rng, caught = np.random.default_rng(0), 0
    for name, content in contents(cache).items():
        if name == "manifest.json":
            continue
        bits = [*rng.integers(0, 128 * 8, 25), *rng.integers(128 * 8, 8 * len(content), 25)]
        for bit in bits:
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            (cache / name).write_bytes(damaged)
            try:
                z2, y2 = Latents(cache).get_batch(range(5), keys)
                assert torch.equal(z, z2) and torch.equal(y, y2) and bit < 128 * 8
            except InputError as e:
                assert len(str(e)) < 200 and f"--cache {cache}" in str(e) and "remove the folder" in str(e)
                caught += 1
            for again, whole in contents(home / "small").items():
                (cache / again).write_bytes(whole)                # done.npy has lost its mark, too
    assert caught >= 75 + 25


def page_of_zeros(cache):
    """In both mirrors: of the plain pictures 512 to 519, which are the second chunk, and of mirrored ones."""
    write(cache / "latents.npy", bytes(4096))


def wrong_label(cache):
    labels = np.load(cache / "labels.npy")
    labels[100] += 1
    np.save(cache / "labels.npy", labels)


def marks_of_chunks_that_were_never_written(cache):
    write(cache / "latents.npy", bytes(os.path.getsize(cache / "latents.npy") // 2))
    np.save(cache / "done.npy", np.array([1, 1], np.uint32))


def infinite_number(cache):
    with open(cache / "latents.npy", "r+b") as f:                 # the first number, of which the rms is made, too
        f.seek(128)
        f.write(b"\x00\x7c")


@pytest.mark.parametrize("harm, chunks", [
    (page_of_zeros, 2), (wrong_label, 1), (marks_of_chunks_that_were_never_written, 2), (infinite_number, 1)])
def test_damaged_chunks_end_the_run_and_are_encoded_again_at_the_next_start(home, tmp_path, harm, chunks):
    cache = shutil.copytree(home / "long", tmp_path / "c")
    whole = contents(cache)
    harm(cache)
    flags = f"{toy_flags(home, cache)} --batch_size 520"
    refused(flags, f"--cache {cache}", f"{chunks} chunks are damaged", "the same command encodes", "remove the folder")
    encoded, encode = [], DCAE.encode
    with mock.patch.object(DCAE, "encode", lambda self, img: encoded.append(len(img)) or encode(self, img)):
        stage2(flags)
    assert sum(encoded) == 2 * {1: 512, 2: 520}[chunks]           # these alone, plain and mirrored
    assert contents(cache) == whole


def test_a_damaged_cache_that_cannot_be_written_is_refused_all_the_same(home, tmp_path):
    cache = shutil.copytree(home / "long", tmp_path / "c")
    page_of_zeros(cache)
    with mock.patch("train_diffusion.write_rows", side_effect=OSError(errno.EROFS, "Read-only file system")):
        refused(f"{toy_flags(home, cache)} --batch_size 520", f"--cache {cache}", "damaged", "remove the folder")


def truncated(cache):
    os.truncate(cache / "latents.npy", os.path.getsize(cache / "latents.npy") - 1)


def saved(name, change):
    def harm(cache):
        np.save(cache / name, change(np.load(cache / name)))
    return harm


def manifest(text):
    def harm(cache):
        (cache / "manifest.json").write_bytes(text)
    return harm


def without(name):
    return lambda cache: (cache / name).unlink()


@pytest.mark.parametrize("harm", [
    truncated,
    saved("latents.npy", lambda x: x[:, :4]), saved("latents.npy", lambda x: x.astype(np.float32)),
    saved("latents.npy", lambda x: np.array([{}])), saved("labels.npy", lambda x: x[:3]),
    saved("done.npy", lambda x: x.astype(np.uint8) * 0 + 1),      # marks of an older version
    without("latents.npy"), without("labels.npy"), without("done.npy"),
    manifest(b""), manifest(b"{"), manifest(b"[1]"), manifest(b"{}"), manifest(b"3"), manifest(b"\xff\xfe\x00"),
    manifest(b"[" * 100_000), manifest(json.dumps({"ae_hash": None, "count": "x"}).encode())])
def test_what_is_no_cache_is_one_line(home, tmp_path, harm):
    cache = shutil.copytree(home / "small", tmp_path / "c")
    harm(cache)
    latents = cache / "latents.npy"
    before = latents.exists() and latents.read_bytes()
    words = ["remove"] if harm.__qualname__.startswith("manifest") else [".npy is damaged;", "--cache", "remove"]
    refused(folder_flags(home, cache), cache, *words)
    assert before == (latents.exists() and latents.read_bytes())  # never laid out anew over it


def test_an_older_cache_is_refused_by_name(home, tmp_path):
    cache = shutil.copytree(home / "long", tmp_path / "c")
    content = json.load(open(cache / "manifest.json"))
    for name in ("format", "files", "dtype"):
        del content[name]
    (cache / "manifest.json").write_text(json.dumps(content))
    np.save(cache / "done.npy", np.ones(2, np.uint8))
    refused(toy_flags(home, cache), f"--cache {cache}", "another format", "remove the folder")


# ----------------------------------------------------------------------------------------------------------------------
# Places where no cache can be


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere", "/dev/null/c", "n" * 300])
def test_places_where_nothing_can_be_written(home, tmp_path, place):
    (tmp_path / "file").write_text("x")
    flags = toy_flags(home, tmp_path / "c").replace(f"--cache {tmp_path}/c", f"--cache {tmp_path / place}")
    refused(flags, "--cache" if len(place) < 99 else "nnn")


def test_a_full_disk_shows_before_anything_is_encoded(home, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))    # latents.npy needs 266,368 bytes
    try:
        refused(toy_flags(home, tmp_path / "c"), f"--cache {tmp_path}/c", "File too large", "make room")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch.object(os, "posix_fallocate", side_effect=full):
        refused(toy_flags(home, tmp_path / "c"), f"--cache {tmp_path}/c", "No space left on device", "make room")
    stage2(toy_flags(home, tmp_path / "c"))                       # there is room now
    assert contents(tmp_path / "c") == contents(home / "long")
    file = os.stat(tmp_path / "c" / "latents.npy")
    assert file.st_blocks * 512 >= file.st_size                   # not sparse


def test_a_disk_that_fills_up_while_caching_is_one_line_and_the_cache_goes_on(home, tmp_path):
    count = iter(range(100))

    def full(number):
        if next(count) == 4:                                      # after the first chunk
            raise OSError(errno.ENOSPC, "No space left on device")
    with mock.patch.object(os, "fsync", full), pytest.raises(InputError, match="--cache .*No space left.*make room"):
        stage2(toy_flags(home, tmp_path / "c"))
    assert (np.load(tmp_path / "c" / "done.npy") > 0).tolist() == [True, False]
    stage2(toy_flags(home, tmp_path / "c"))
    assert contents(tmp_path / "c") == contents(home / "long")


def test_what_can_be_refused_is_refused_before_anything_is_encoded(home, tmp_path):
    """A network that cannot be built; a run of another network, or of other classes."""
    refused(toy_flags(home, tmp_path / "c").replace("--hidden 16", "--hidden 30"), "hidden 30")
    assert not (tmp_path / "c").exists()
    data = shutil.copytree(home / "data", tmp_path / "data")
    stage2(folder_flags(home, tmp_path / "a", data))
    shutil.copytree(tmp_path / "a.run", tmp_path / "kept")
    flags = folder_flags(home, tmp_path / "b", data).replace(f"{tmp_path}/b.run", f"{tmp_path}/kept")
    os.rename(data / "cat", data / "zebra")                       # labels 0 and 1 now mean dog and zebra
    for other, word in ((flags, "another classes"), (flags.replace("--depth 2", "--depth 4"), "another config")):
        with no_encoding(), pytest.raises(InputError, match=f"--out .*kept: .*{word}"):
            train_diffusion.main([*other.split(), "--steps", "9"])
    assert not (tmp_path / "b").exists()


def test_a_signal_while_caching_is_no_broken_picture(home, tmp_path):
    decode, count = ae_file.decode, iter(range(100))

    def stopped(*args):
        if next(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        return decode(*args)
    usual = signal.getsignal(signal.SIGTERM)
    with mock.patch.object(ae_file, "decode", stopped), pytest.raises(SystemExit, match="stopped by a signal"):
        stage2(folder_flags(home, tmp_path / "c"))
    signal.signal(signal.SIGTERM, usual)
    assert not np.load(tmp_path / "c" / "done.npy").any()


@pytest.mark.parametrize("name", ["manifest.json", "latents.npy", "done.npy"])
def test_a_pipe_in_the_cache_is_not_waited_for(home, tmp_path, name):
    cache = shutil.copytree(home / "small", tmp_path / "c")
    (cache / name).unlink()
    os.mkfifo(cache / name)
    refused(folder_flags(home, cache), "--cache", "remove the folder")


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


@pytest.fixture
def locked(tmp_path):
    """Another process has the lock of tmp_path/c."""
    (tmp_path / "c").mkdir()
    code = f"import fcntl; f = open('{tmp_path}/c/.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1); input()"
    p = subprocess.Popen([sys.executable, "-uc", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    p.stdout.readline()
    yield tmp_path / "c"
    p.kill()
    p.communicate()


def test_a_second_run_that_would_fill_a_cache_is_refused_and_one_that_reads_is_not(home, locked):
    refused(toy_flags(home, locked), f"--cache {locked}", "another run is filling it", "wait for it")
    for name, content in contents(home / "long").items():
        (locked / name).write_bytes(content)
    with no_encoding():
        stage2(toy_flags(home, locked))
    np.save(locked / "done.npy", np.load(locked / "done.npy") * np.array([1, 0], np.uint32))
    refused(toy_flags(home, locked), f"--cache {locked}", "another run is filling it", "wait for it")


def test_a_cache_in_the_run_folder_leaves_the_run_its_lock(home, tmp_path, monkeypatch):
    """POSIX: a process that closes any descriptor of a file loses all its locks on it."""
    real, tried = train_diffusion.batches, []

    def batches(*args):
        code = f"import ae; ae.lock({str(tmp_path)!r})"
        tried.append(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True))
        return real(*args)
    monkeypatch.setattr(train_diffusion, "batches", batches)
    train_diffusion.main(f"{toy_flags(home, tmp_path)} --max_images 8 --out {tmp_path}".split())
    assert tried[0].returncode == 1 and "another process is writing there" in tried[0].stderr


def test_ranks_are_refused_together(home, tmp_path):
    flags = f"{toy_flags(home, home / 'long')} --max_images 300 --out {tmp_path}/out"
    job = Job(tmp_path, "train_diffusion.py", flags, ranks=2)
    for rank in job.ranks:
        rank.join(60)                                             # none waits for the other
    code, text = job.end()
    assert [rank.exitcode for rank in job.ranks] == [1, 1]
    assert "another count;" in text and "Traceback" not in text, text[-2000:]


def worker_batches(latents, start, workers):
    """All 520 rows through loader processes."""
    order = [list(range(i, i + 52)) for i in range(0, 520, 52)]
    loader = torch.utils.data.DataLoader(Rows(latents), batch_size=None, sampler=order, num_workers=workers,
                                         multiprocessing_context=start)
    return [torch.cat(part) for part in zip(*loader)]


class Rows(torch.utils.data.Dataset):
    def __init__(self, latents):
        self.latents = latents

    def __getitem__(self, rows):
        return self.latents.get_batch(rows, rows)


def test_a_pickled_cache_is_small_and_opens_its_files_anew(home):
    latents = Latents(home / "long", seed=3)
    before = latents.get_batch(range(520), range(520))
    text = pickle.dumps(latents)
    assert len(text) < 4000 < os.path.getsize(home / "long" / "latents.npy") // 50
    after = pickle.loads(text).get_batch(range(520), range(520))
    assert all(torch.equal(a, b) for a, b in zip(before, after))


@pytest.mark.parametrize("start, workers", [("fork", 2), ("forkserver", 1)])
def test_loader_processes_read_and_check_the_cache(home, start, workers, monkeypatch):
    """forkserver pickles what workers are given, as Python 3.14 does by default. What one process has checked, no
    other checks again."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT}/tests")        # for the server
    multiprocessing.set_forkserver_preload(["test_train"])
    latents = Latents(home / "long", seed=3)
    z, y = worker_batches(latents, start, workers)
    with mock.patch("zlib.crc32", side_effect=AssertionError("checked again")):
        z2, y2 = latents.get_batch(range(520), range(520))
    assert torch.equal(z, z2) and torch.equal(y, y2)


def test_damage_that_a_loader_process_finds_is_one_line(home, tmp_path):
    cache = shutil.copytree(home / "long", tmp_path / "c")
    page_of_zeros(cache)
    with pytest.raises(InputError) as e:
        worker_batches(Latents(cache), "fork", 1)
    line = str(e.value)
    assert len(line) < 200 and f"--cache {cache}" in line and "damaged" in line, line
