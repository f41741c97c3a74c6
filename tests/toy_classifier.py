"""A small classifier of the training images: do samples show the class they were asked for?

    python tests/toy_classifier.py out/toy-samples/samples.npz            # trains in about half a minute, then scores
    python tests/toy_classifier.py out/toy-samples/samples.npz --export features.pt2      # and serves fid.py --features
    python tests/toy_classifier.py samples.npz --data cifar/train --val cifar/test --steps 4000
Prints one JSON line: its accuracy on pictures it never saw, and the share of samples it assigns to their label.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ae import evenly_spaced, open_images, to_uint8
from train_ae import Stream


class Classifier(nn.Module):
    """uint8 (B, H, W, 3) -> features (B, 128), logits (B, classes)."""

    def __init__(self, classes):
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        pairs = list(zip(widths, widths[1:]))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for _, b in pairs)
        self.head = nn.Linear(128, classes)

    def forward(self, pixels):
        x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        for conv, norm in zip(self.convs, self.norms):
            x = F.silu(norm(conv(x)))
        features = x.mean((2, 3))
        return features, self.head(features)


def train(data, steps=600, batch=128, seed=0):
    """A Classifier of these images, in eval mode: AdamW, one cycle of the learning rate up to 2e-3."""
    torch.manual_seed(seed)
    net = Classifier(data.num_classes)
    stream = Stream(data, seed)
    opt = torch.optim.AdamW(net.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="classifier", mininterval=10):
        x, y = stream[range(step * batch, (step + 1) * batch)]              # (B, 3, H, W) in [-1, 1], (B,)
        # blur and noise, so that the score is about shapes and not about the crispness of an autoencoder's texture
        if step % 2:
            x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear") + 0.05 * torch.randn_like(x)
        pixels = ((x + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1)        # not rounded: (B, H, W, 3)
        F.cross_entropy(net(pixels)[1], y).backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
    return net.eval()


@torch.no_grad()
def right(net, pixels, labels, among=None):
    """Share, 0 to 1, of uint8 pictures (B, H, W, 3) whose class the network says: the largest logit.
    among: one logit for each class, where the network has more than these classes."""
    logits = torch.cat([net(part)[1] for part in torch.as_tensor(pixels).split(500)])
    if among is not None:
        logits = logits[:, among]
    said = logits.argmax(1)
    return float((said == torch.as_tensor(labels)).float().mean())


def accuracy(net, data, n=2000, among=None):
    """right() of n pictures of a data set, evenly spaced over its classes."""
    numbers = evenly_spaced(data, n)
    x, y = data.get_batch(numbers, numbers)
    return right(net, to_uint8(x), y, among)


def export(net, size, path, batch=None):
    """Write a network for fid.py --features, on pictures of `size` px; batch: pictures at a time (None: any)."""
    example = torch.zeros(batch or 2, size, size, 3, dtype=torch.uint8)
    dynamic = None if batch else ({0: torch.export.Dim("batch", min=1)},)
    torch.export.save(torch.export.export(net, (example,), dynamic_shapes=dynamic), path)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("samples", help="samples.npz of sample.py")
    p.add_argument("--data", default="toy", help="what the classifier learns from: class folders, or built-in images")
    p.add_argument("--val", help="what its accuracy is measured on (default: --data through the evaluation crop)")
    p.add_argument("--steps", type=int, default=600, help="of its training, with 128 images each (600)")
    p.add_argument("--export", help="write the network for fid.py --features")
    args = p.parse_args()
    with np.load(args.samples) as f:
        pixels, labels = f["arr_0"], f["arr_1"]
    size = pixels.shape[1]
    net = train(open_images(args.data, size, train=True), args.steps)
    if args.export:
        export(net, size, args.export)
    held_out = open_images(args.val or args.data, size)
    line = {"held_out_accuracy": accuracy(net, held_out),
            "samples_of_their_class": right(net, pixels, labels),
            "n": len(pixels)}
    print(json.dumps(line))
