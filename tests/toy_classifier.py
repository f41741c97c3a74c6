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
    """uint8 (B,H,W,3) -> features (B,128), logits (B,classes)."""

    def __init__(self, classes):
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for b in widths[1:])
        self.head = nn.Linear(128, classes)

    def forward(self, img):
        x = img.permute(0, 3, 1, 2).float() / 127.5 - 1
        for conv, norm in zip(self.convs, self.norms):
            x = F.silu(norm(conv(x)))
        features = x.mean((2, 3))
        return features, self.head(features)


def train(data, steps=600, batch=128, seed=0):
    torch.manual_seed(seed)
    net, stream = Classifier(data.num_classes), Stream(data, seed)
    opt = torch.optim.AdamW(net.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="classifier", mininterval=10):
        x, y = stream[range(step * batch, (step + 1) * batch)]
        # blur and noise, so that the score is about shapes and not about the crispness of an autoencoder's texture
        if step % 2:
            x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear") + 0.05 * torch.randn_like(x)
        img = ((x + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1)
        F.cross_entropy(net(img)[1], y).backward()
        opt.step(), opt.zero_grad(), schedule.step()
    return net.eval()


@torch.no_grad()
def right(net, img, labels):
    """Share of uint8 pictures (B,H,W,3) whose class the network says."""
    said = torch.cat([net(part)[1].argmax(1) for part in torch.as_tensor(img).split(500)])
    return float((said == torch.as_tensor(labels)).float().mean())


def accuracy(net, data, n=2000):
    numbers = evenly_spaced(data, n)
    x, y = data.get_batch(numbers, numbers)
    return right(net, to_uint8(x), y)


def export(net, size, path):
    shape = (torch.zeros(2, size, size, 3, dtype=torch.uint8),)
    torch.export.save(torch.export.export(net, shape, dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)), path)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("samples", help="samples.npz of sample.py")
    p.add_argument("--data", default="toy", help="what the classifier learns from: class folders, or the built-in images")
    p.add_argument("--val", help="what its accuracy is measured on (default: --data through the evaluation crop)")
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--export", help="write the network for fid.py --features")
    args = p.parse_args()
    with np.load(args.samples) as f:
        img, labels = f["arr_0"], f["arr_1"]
    size = img.shape[1]
    net = train(open_images(args.data, size, train=True), args.steps)
    if args.export:
        export(net, size, args.export)
    print(json.dumps({"held_out_accuracy": accuracy(net, open_images(args.val or args.data, size)), "samples_of_their_class": right(net, img, labels),
                      "n": len(img)}))
