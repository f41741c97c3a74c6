"""The GPU path on a machine without one: both training loops on torch's fake "cuda" tensors.

Fake tensors have shapes, dtypes and devices, and no numbers: tensors of two devices, or of two dtypes where the
operator wants one, end in an error here as they do on a GPU. What runs is the trainers' own train() with --bench.
Three things have to be done for it: modules are moved by making new tensors; backward() is left out, since
autograd's engine asks for a driver, and gradients are zeros in its place; autocast believes that there is a GPU.
"""

import copy
import warnings
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import ae as ae_file
import fid
import train_ae
import train_diffusion
from test_train import clean_up  # noqa: F401

CUDA = torch.device("cuda", 0)
NETWORK = "--f 8 --c 8 --image_size 32 --channels 2,4,8 --batch_size 4 --accumulate 2 --dtype bf16 --no-compile --bench"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")


def move(module, device=None, memory_format=None):
    """Module.to on fake tensors."""
    for m in module.modules():
        for tensors in (m._parameters, m._buffers):
            for name, t in tensors.items():
                if t is not None:
                    new = torch.empty(t.shape, dtype=t.dtype, device=device or t.device)
                    tensors[name] = nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
    return module


def twin(module):
    """copy.deepcopy of a module with fake tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    memo = {id(t): nn.Parameter(torch.empty_like(t)) if isinstance(t, nn.Parameter) else t.clone() for t in tensors}
    return copy.deepcopy(module, memo)


@contextmanager
def fake_cuda():
    """Yields a list of all optimisers that are made."""
    optimisers = []

    def adamw(*args, original=train_ae.adamw):
        optimisers.append(original(*args))
        return optimisers[-1]

    def backward(loss):
        assert loss.device == CUDA and loss.dtype == torch.float32 and loss.shape == () and loss.requires_grad
        for opt in optimisers:
            for group in opt.param_groups:
                for p in group["params"]:
                    p.grad = torch.zeros_like(p)

    def inside(train):
        def inside_fake_mode(*args):
            with FakeTensorMode(allow_non_fake_inputs=False):
                result = train(*args)
                assert_on_cuda(optimisers)
            return result
        return inside_fake_mode
    with ExitStack() as stack:
        patch = lambda *args, **how: stack.enter_context(mock.patch(*args, **how))
        patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False)
        patch("torch.cuda.is_bf16_supported", return_value=True)
        patch("torch.nn.Module.to", move)
        patch("torch.Tensor.backward", backward)
        patch("train_ae.Run.bench_line", return_value="ran to its end")
        patch("train_ae.meta_cost", return_value=[0])
        patch("train_diffusion.forward_macs", return_value=0)
        patch("train_diffusion.copy", SimpleNamespace(deepcopy=twin))
        for trainer in (train_ae, train_diffusion):
            patch(f"{trainer.__name__}.adamw", adamw)
            patch(f"{trainer.__name__}.start_ranks", return_value=train_ae.Ranks(device=CUDA))
            patch(f"{trainer.__name__}.train", inside(trainer.train))
        yield optimisers


def assert_on_cuda(optimisers):
    """Weights and moments alike, in fp32."""
    for opt in optimisers:
        tensors = [t for state in opt.state.values() for t in state.values()] + list(opt.state)
        assert len(tensors) > 40 and {(t.device, t.dtype) for t in tensors} == {(CUDA, torch.float32)}


@contextmanager
def outputs_of(cls):
    """A list of (dtype, device) of what all modules of this class return."""
    seen = []
    look = lambda m, inputs, output: seen.append((output.dtype, output.device)) if isinstance(m, cls) else None
    handle = nn.modules.module.register_module_forward_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def vgg():
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        return train_ae.LPIPS("vgg", random=True)


@pytest.mark.parametrize("flags, optimisers", [
    ("--widths 16,16,32,32 --depths 0,1,1,1", 1),
    ("--version 1.0 --widths 16,16,32,32 --depths 0,1,1,1", 1),
    ("--widths 16,16,32,32 --depths 0,1,1,1 --gan 0.1 --disc_warmup 1 --lpips 1", 2)])
def test_the_autoencoder_trains(vgg, flags, optimisers):
    with outputs_of(nn.Conv2d) as seen, fake_cuda() as made, mock.patch("train_ae.LPIPS", return_value=vgg):
        assert train_ae.main(f"{NETWORK} {flags}".split()) == "ran to its end"
    assert len(made) == optimisers
    assert (torch.bfloat16, CUDA) in seen and {device for _, device in seen} == {CUDA}     # autocast is on


@pytest.mark.parametrize("model", ["SiT-T", "DiT-T"])
def test_the_denoiser_trains(model):
    flags = f"--model {model} --c 8 --size 4 --depth 2 --hidden 32 --heads 2 --channels 2,4,8"
    flags += " --batch_size 4 --accumulate 2 --dtype bf16 --no-compile --bench"
    with outputs_of(nn.Linear) as seen, fake_cuda() as made:
        assert train_diffusion.main(flags.split()) == "ran to its end"
    assert len(made) == 1 and (torch.bfloat16, CUDA) in seen and {device for _, device in seen} == {CUDA}


all_finite = mock.patch.object(FakeTensor, "item", lambda t: 0)   # what to_uint8 asks for


def test_scores_of_pictures():
    with FakeTensorMode(allow_non_fake_inputs=False), all_finite:
        img, rec = torch.randn(2, 2, 3, 32, 32, device=CUDA, dtype=torch.bfloat16)
        for score in (fid.psnr, fid.ssim):
            values = score(ae_file.to_uint8(img), ae_file.to_uint8(rec))
            assert values.device == CUDA and values.shape == (2,) and values.dtype in (torch.float32, torch.float64)


class Black:
    """Fake pictures, on the CPU as loaders give them."""
    num_classes = 2

    def get_batch(self, indices, keys):
        return torch.zeros(len(indices), 3, 32, 32), torch.zeros(len(indices), dtype=torch.long)


def test_the_evaluation(vgg):
    args = train_ae.parse(f"{NETWORK} --widths 16,16,32,32 --depths 0,1,1,1 --eval_num 8".split())
    config, _ = train_ae.configure(args, train_ae.Ranks())
    evaluation = train_ae.Evaluation(args, train_ae.Ranks(device=CUDA), config)
    evaluation.data = Black()
    evaluation.scores["lpips"] = vgg
    in_turn = lambda dataset, order, workers, device: [dataset[numbers] for numbers in order]
    zeros = lambda t: [0.0] * len(t) if t.dim() == 1 else [zeros(row) for row in t]
    with fake_cuda(), mock.patch("train_ae.loader", in_turn), mock.patch.object(FakeTensor, "tolist", zeros):
        with FakeTensorMode(allow_non_fake_inputs=False), all_finite, outputs_of(nn.Conv2d) as seen:
            vgg.to(CUDA)
            table = evaluation.table(ae_file.DCAE(config).to(CUDA).eval())
    assert [row["c_prime"] for row in table] == [2, 4, 8] and {"psnr", "ssim", "lpips"} <= table[0].keys()
    assert set(seen) == {(torch.float32, CUDA)}                   # no autocast here
