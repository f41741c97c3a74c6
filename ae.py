"""
DC-AE and DC-AE 1.5: pixels <-> latents, in one file.

What DC-AE 1.5 (arXiv 2508.00413) adds to DC-AE (arXiv 2410.10733):
  * a structured latent: while the autoencoder trains, a mask keeps only the first c' of the c latent channels (Eq. 1), with
    c' drawn anew each step; so the front channels learn the object and the later ones its details,
  * augmented diffusion training on the same channel prefixes (Eq. 2; lives in diffusion.py),
  * a plainer network: ResBlocks with RMSNorm and SiLU only, and no shortcut around the two latent projections.

    img (B,3,H,W) in [-1,1] --encode--> z (B,c,H/f,W/f) --first c'--> z (B,c',H/f,W/f) --decode--> img (B,3,H,W)

Letters: B batch, H W pixels, f spatial compression, c latent channels, c' = c_prime kept ones, h heads, N = H*W tokens.
Sources: [paper] arXiv 2508.00413, [DC-Gen] the authors' code @cae2205, [ours] chosen or measured here.

    ae = DCAE.from_pretrained("out/my_run")        # or a published name, folder or file, or a diffusers AutoencoderDC folder
    rec = ae(img, c_prime=16)
    python ae.py photo.jpg toy --ckpt out/structured --ckpt2 out/plain --out figures      # the paper's Figures 2, 3, 9, 10
"""
import argparse, hashlib, json, math, os, pickle, re, sys, zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

class InputError(SystemExit, ValueError):
    """Bad input: uncaught it prints its one line and exits 1; a notebook or a test catches it as ValueError."""

# --- Configuration -----------------------------------------------------------------------------------------------------

@dataclass
class AEConfig:
    f: int = 32                      # spatial compression, a power of two >= 4; there are log2(f) + 1 stages, stage 0 is empty
    c: int = 128                     # latent channels
    version: str = "1.5"             # "1.5": ResBlocks, RMSNorm, SiLU; "1.0": EfficientViT blocks from stage 3, latent shortcuts
    width: int = 128                 # channels of stage 0: scales every stage; 128 is the published size
    shortcuts: bool = True           # the non-parametric shortcuts of residual autoencoding; False is DC-AE's ablation
    encoder_widths: tuple = None     # per stage; None: filled from f, version and width
    encoder_depths: tuple = None     # blocks per stage
    decoder_widths: tuple = None
    decoder_depths: tuple = None

    def __post_init__(self):
        if self.f < 4 or self.f & (self.f - 1):
            raise InputError(f"--f {self.f}: the spatial compression must be a power of two, 4 or more")
        if self.c < 1 or self.version not in ("1.0", "1.5"):
            raise InputError(f"--c {self.c} --version {self.version}: at least one channel is needed; versions are 1.0 and 1.5")
        n, old = self.f.bit_length(), self.version == "1.0"                          # n stages
        grow = ([1, 2, 4, 4, 8, 8] + [16 if old else 8] * n)[:n]                     # widths, depths [DC-Gen ae_model_zoo.py]
        for side, depths in (("encoder", [0, 4, 8] if old else [0, 5, 10]), ("decoder", [0, 5, 10])):
            w = tuple(getattr(self, side + "_widths") or [self.width * g for g in grow])
            d = tuple(getattr(self, side + "_depths") or (depths + [2 if old else 4] * n)[:n])
            setattr(self, side + "_widths", w), setattr(self, side + "_depths", d)
            if len(w) != n or len(d) != n or d[0] != 0 or min(d[1:]) < 1:
                raise InputError(f"{side} widths {w}, depths {d}: f={self.f} needs {n} of each; depth 0 first (empty), then >= 1")
            if min(w) < 4 or any(x % 4 for x in w[1:]) or old and any(x % 32 for x in w[3:]):
                raise InputError(f"--width {self.width}: {side} widths {w} must be multiples of 4; of 32 from 1.0's stage 3 on")
            if self.shortcuts and any(4 * a % b for a, b in zip(w[1:], w[2:])):
                raise InputError(f"{side} widths {w}: each must divide 4x the one before it, or shortcuts=False")
            if self.shortcuts and old and w[-1] % self.c:
                raise InputError(f"--c {self.c}: 1.0's latent shortcuts need a c that divides the last {side} width, {w[-1]}")

# --- Building blocks ---------------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """Each pixel's channel vector divided by its root mean square, then an affine map; eps as published [DC-Gen ops.py]."""
    def __init__(self, dim):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):                                                            # (B, C, H, W)
        u = x.to(torch.promote_types(x.dtype, torch.float32))                        # statistics in fp32 under bf16
        u = u * torch.rsqrt(u.square().mean(1, keepdim=True) + 1e-5)
        return torch.addcmul(self.bias.view(-1, 1, 1), u, self.weight.view(-1, 1, 1)).to(x.dtype)

class ResBlock(nn.Module):
    def __init__(self, dim, batchnorm_relu=False):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(dim) if batchnorm_relu else RMSNorm(dim)
        self.act = F.relu if batchnorm_relu else F.silu

    def forward(self, x):
        return x + self.norm(self.conv2(self.act(self.conv1(x))))

class LinearAttention(nn.Module):
    """ReLU linear attention, heads of 32 channels: the cost grows with N, not N^2."""
    def __init__(self, dim):
        super().__init__()
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False)                            # per head: 32 q, 32 k, 32 v
        self.proj = nn.Conv2d(dim, dim, 1, bias=False)
        self.norm = RMSNorm(dim)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(x).permute(0, 2, 3, 1).reshape(B, H * W, C // 32, 96)         # (B, N, h, 96)
        device = "cpu" if x.is_meta else x.device.type
        with torch.autocast(device, enabled=False):                                  # sums over N tokens need fp32
            q, k, v = qkv.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2).chunk(3, -1)     # 3 x (B, h, N, 32)
            v = F.pad(v, (0, 1), value=1.0)                                          # the column of ones carries the normaliser
            out = F.relu(q) @ (F.relu(k).mT @ v)                                     # (B, h, N, 33)
            out = out[..., :-1] / (out[..., -1:] + 1e-15)                            # a token with q = 0 gives 0, never NaN
        out = out.to(x.dtype).transpose(1, 2).reshape(B, H, W, C).permute(0, 3, 1, 2)
        return x + self.norm(self.proj(out))

class GLUMBConv(nn.Module):
    """Inverted bottleneck (expand ratio 4) with a gated linear unit behind the depthwise convolution."""
    def __init__(self, dim):
        super().__init__()
        self.inverted = nn.Conv2d(dim, 8 * dim, 1)
        self.depth = nn.Conv2d(8 * dim, 8 * dim, 3, padding=1, groups=8 * dim)
        self.point = nn.Conv2d(4 * dim, dim, 1, bias=False)
        self.norm = RMSNorm(dim)

    def forward(self, x):
        y, gate = self.depth(F.silu(self.inverted(x))).chunk(2, 1)                   # 2 x (B, 4C, H, W)
        return x + self.norm(self.point(y * F.silu(gate)))

def evit_block(dim):
    return nn.Sequential(OrderedDict(attn=LinearAttention(dim), mlp=GLUMBConv(dim)))

class Down(nn.Module):
    """Halve H and W by space-to-channel; the shortcut does the same to x itself and averages channel groups."""
    def __init__(self, dim_in, dim_out, shortcut):
        super().__init__()
        self.conv, self.shortcut = nn.Conv2d(dim_in, dim_out // 4, 3, padding=1), shortcut

    def forward(self, x):                                                            # (B, C, H, W) -> (B, dim, H/2, W/2)
        y = F.pixel_unshuffle(self.conv(x), 2)
        return y + F.pixel_unshuffle(x, 2).unflatten(1, (y.shape[1], -1)).mean(2) if self.shortcut else y

class Up(nn.Module):
    """Double H and W by channel-to-space; the shortcut duplicates channels of x (added before the shuffle: the same sums)."""
    def __init__(self, dim_in, dim_out, shortcut):
        super().__init__()
        self.conv, self.shortcut = nn.Conv2d(dim_in, 4 * dim_out, 3, padding=1), shortcut

    def forward(self, x):                                                            # (B, C, H, W) -> (B, dim, 2H, 2W)
        y = self.conv(x)
        return F.pixel_shuffle(y + x.repeat_interleave(y.shape[1] // x.shape[1], 1) if self.shortcut else y, 2)

class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        w, depths, last = config.encoder_widths, config.encoder_depths, len(config.encoder_widths) - 1
        old, self.shortcut = config.version == "1.0", config.shortcuts and config.version == "1.0"
        self.project_in = Down(3, w[1], shortcut=False)                              # stage 0 is empty: straight to H/2, W/2
        self.stages = nn.ModuleList()
        for i, depth in enumerate(depths):
            stage = [evit_block(w[i]) if old and i >= 3 else ResBlock(w[i]) for _ in range(depth)]
            stage += [Down(w[i], w[i + 1], config.shortcuts)] if 0 < i < last else []
            self.stages.append(nn.Sequential(*stage))
        self.project_out = nn.Conv2d(w[-1], config.c, 3, padding=1)

    def forward(self, x):                                                            # (B, 3, H, W) -> (B, c, H/f, W/f)
        x = self.project_in(x)
        for stage in self.stages:
            x = stage(x)
        z = self.project_out(x)
        return z + x.unflatten(1, (z.shape[1], -1)).mean(2) if self.shortcut else z   # channel averaging

class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        w, depths, last = config.decoder_widths, config.decoder_depths, len(config.decoder_widths) - 1
        old, self.shortcut = config.version == "1.0", config.shortcuts and config.version == "1.0"
        self.project_in = nn.Conv2d(config.c, w[-1], 3, padding=1)
        self.stages = nn.ModuleList()                                                # index 0 = highest resolution, run in reverse
        for i, depth in enumerate(depths):
            stage = [Up(w[i + 1], w[i], config.shortcuts)] if 0 < i < last else []
            stage += [evit_block(w[i]) if old and i >= 3 else ResBlock(w[i], batchnorm_relu=old) for _ in range(depth)]
            self.stages.append(nn.Sequential(*stage))
        self.project_out = nn.Sequential(OrderedDict(norm=RMSNorm(w[1]), act=nn.ReLU() if old else nn.SiLU(), up=Up(w[1], 3, False)))

    def forward(self, z):                                                            # (B, c, H/f, W/f) -> (B, 3, H, W)
        x = self.project_in(z)
        x = x + z.repeat_interleave(x.shape[1] // z.shape[1], 1) if self.shortcut else x     # channel duplicating
        for stage in reversed(self.stages):
            x = stage(x)
        return self.project_out(x)

# --- The autoencoder ---------------------------------------------------------------------------------------------------

def channel_mask(c, c_prime, device=None):                                           # -> (1, c, 1, 1): c' ones, then zeros
    if not 1 <= c_prime <= c:
        raise InputError(f"c_prime={c_prime}: of a latent with {c} channels the first 1 to {c} can be kept")
    return (torch.arange(c, device=device) < c_prime).float().view(1, c, 1, 1)

class DCAE(nn.Module):
    def __init__(self, config=None):
        super().__init__()
        self.config = config or AEConfig()
        self.encoder, self.decoder = Encoder(self.config), Decoder(self.config)
        for m in self.modules():            # [ours] each residual branch starts at zero (toy, 1,100 steps: 22.2 -> 25.2 dB);
            if isinstance(m, (ResBlock, LinearAttention, GLUMBConv)):                # all else is PyTorch's initialisation
                nn.init.zeros_(m.norm.weight)
        self.scale = 1.0                    # 1 / rms of training latents: multiplied once on the way to the diffusion model
        self.info = {}                      # image_size, step, channels, ... of the checkpoint it came from

    def encode(self, img):                                                           # (B, 3, H, W) -> (B, c, H/f, W/f), unscaled
        f, shape = self.config.f, tuple(img.shape)
        if len(shape) != 4 or shape[1] != 3 or shape[2] % f or shape[3] % f or 0 in shape:
            raise InputError(f"image batch of shape {shape}: (B,3,H,W) with H and W divisible by f={f} is needed")
        return self.encoder(img.contiguous(memory_format=torch.channels_last))       # [ours] faster norms on CPU, faster convs on CUDA

    def decode(self, z):                                                             # (B, c', H/f, W/f) -> (B, 3, H, W)
        missing = self.config.c - z.shape[1]
        if missing < 0:
            raise InputError(f"latent with {z.shape[1]} channels: this autoencoder has c={self.config.c}")
        z = F.pad(z, (0, 0, 0, 0, 0, missing)) if missing else z                     # absent channels count as zero: mask == slice
        return self.decoder(z.contiguous(memory_format=torch.channels_last))

    def forward(self, img, c_prime=None):
        z = self.encode(img)
        if c_prime is None:
            return self.decode(z)
        # DC-AE 1.5 Eq. (1): x' = D(E(x) * mask(c'))
        return self.decode(z * channel_mask(self.config.c, c_prime, z.device).to(z.dtype))

    @classmethod
    def from_pretrained(cls, x):
        """Our checkpoint or run folder; a published name, folder or file; a diffusers AutoencoderDC folder."""
        file = find_weights(x)
        tensors, meta = load_file(file), file.with_name("config.json")
        if tensors.get("kind", "ae") != "ae":
            raise InputError(f"{file}: a {tensors['kind']} checkpoint, an autoencoder is needed here")
        if "kind" in tensors:                                                        # our own
            config, state, scale = AEConfig(**tensors["config"]), tensors["model"], tensors["scale"]
        else:
            meta = meta.read_text() if meta.exists() else "{}"
            state = to_ours(tensors.get("state_dict", tensors), file)
            config = read_config(state, file)
            known = (scale for name, scale in SCALES.items() if name in f"{file.absolute()} {meta}")
            scale = json.loads(meta).get("scaling_factor") or next(known, 1.0)
        with torch.device("meta"):
            ae = cls(config)
        try:
            ae.load_state_dict({k: v.to(torch.promote_types(v.dtype, torch.float32) if v.is_floating_point() else v.dtype, copy=True)
                                for k, v in state.items()}, assign=True)
        except RuntimeError as e:
            raise InputError(f"{file}: not a DC-AE 1.0 or 1.5: {' '.join(str(e).split())[:90]}") from None
        ae.scale = float(scale)
        ae.info = {k: tensors[k] for k in ("image_size", "step", "channels") if k in tensors}
        return ae.requires_grad_(True).eval()

    def save_pretrained(self, folder):
        """The diffusers layout: diffusers.AutoencoderDC.from_pretrained(folder) runs it."""
        cfg, old = self.config, self.config.version == "1.0"
        if not cfg.shortcuts:
            raise InputError("save_pretrained: diffusers' AutoencoderDC cannot switch the shortcuts off; keep our checkpoint")
        n, folder = len(cfg.encoder_widths), Path(folder)
        blocks = ["EfficientViTBlock" if old and i >= 3 else "ResBlock" for i in range(n)]
        meta = {"_class_name": "AutoencoderDC", "in_channels": 3, "latent_channels": cfg.c, "attention_head_dim": 32,
                "encoder_block_types": blocks, "decoder_block_types": blocks,
                "encoder_block_out_channels": cfg.encoder_widths, "decoder_block_out_channels": cfg.decoder_widths,
                "encoder_layers_per_block": cfg.encoder_depths, "decoder_layers_per_block": cfg.decoder_depths,
                "encoder_qkv_multiscales": [[]] * n, "decoder_qkv_multiscales": [[]] * n,
                "upsample_block_type": "pixel_shuffle", "downsample_block_type": "pixel_unshuffle",
                "decoder_norm_types": ["batch_norm" if old and i < 3 else "rms_norm" for i in range(n)],
                "decoder_act_fns": ["relu" if old and i < 3 else "silu" for i in range(n)],
                "encoder_out_shortcut": old, "decoder_in_shortcut": old, "decoder_conv_act_fn": "relu" if old else "silu",
                "scaling_factor": self.scale}
        folder.mkdir(parents=True, exist_ok=True)
        safetensors().torch.save_file(to_diffusers(self.state_dict()), folder / "diffusion_pytorch_model.safetensors")
        (folder / "config.json").write_text(json.dumps(meta, indent=2) + "\n")

# --- Files. Tensor names: ours, official (DC-Gen, efficientvit), diffusers; # is a stage or block number ---------------

BLOCKS = (("conv", "main.conv.conv", "conv"),
          ("conv1", "main.conv1.conv", "conv1"),
          ("conv2", "main.conv2.conv", "conv2"),
          ("norm", "main.conv2.norm", "norm"),
          ("attn.qkv", "context_module.main.qkv.conv", "attn.to_qkv"),               # in diffusers' files: to_q, to_k, to_v
          ("attn.proj", "context_module.main.proj.conv", "attn.to_out"),
          ("attn.norm", "context_module.main.proj.norm", "attn.norm_out"),
          ("mlp.inverted", "local_module.main.inverted_conv.conv", "conv_out.conv_inverted"),
          ("mlp.depth", "local_module.main.depth_conv.conv", "conv_out.conv_depth"),
          ("mlp.point", "local_module.main.point_conv.conv", "conv_out.conv_point"),
          ("mlp.norm", "local_module.main.point_conv.norm", "conv_out.norm"))
NAMES = (("encoder.project_in.conv", "encoder.project_in.conv.conv", "encoder.conv_in.conv"),
         ("encoder.project_out", "encoder.project_out.op_list.0.conv", "encoder.conv_out"),     # 1.0: project_out.main.op_list
         ("decoder.project_in", "decoder.project_in.conv", "decoder.conv_in"),                  # 1.0: project_in.main.conv
         ("decoder.project_out.norm", "decoder.project_out.op_list.0", "decoder.norm_out"),
         ("decoder.project_out.up.conv", "decoder.project_out.op_list.2.conv.conv", "decoder.conv_out.conv"),
         *((f"encoder.stages.#.#.{a}", f"encoder.stages.#.op_list.#.{b}", f"encoder.down_blocks.#.#.{c}") for a, b, c in BLOCKS),
         *((f"decoder.stages.#.#.{a}", f"decoder.stages.#.op_list.#.{b}", f"decoder.up_blocks.#.#.{c}") for a, b, c in BLOCKS))
OURS, OFFICIAL, DIFFUSERS = range(3)
SCALES = {"dc-ae-f32c32-in-1.0": 0.3189, "dc-ae-f64c128-in-1.0": 0.2889, "dc-ae-f64c128-1.5": 0.5935}     # [DC-Gen, published]
WEIGHTS = ("ckpt.pt", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "model.safetensors",
           "pytorch_model.bin", "model.pt")

def rename(name, src, dst):
    stem, leaf = name.rsplit(".", 1)
    m = re.match(r"(.*(?:stages|blocks)\.)(\d+)((?:\.op_list)?\.)(\d+)(\..*)", stem)
    new = {row[src]: row[dst] for row in NAMES}[f"{m[1]}#{m[3]}#{m[5]}" if m else stem]
    for number in m.group(2, 4) if m else ():
        new = new.replace("#", number, 1)
    return f"{new}.{leaf}"

def to_ours(state, file):
    """Official or diffusers tensors -> ours."""
    src, ours = DIFFUSERS if any("_blocks." in name for name in state) else OFFICIAL, {}
    try:
        for name, t in state.items():
            if ".attn.to_q." in name:                                                # diffusers cuts the fused qkv rows in thirds
                t = torch.cat([t, state[name.replace("to_q", "to_k")], state[name.replace("to_q", "to_v")]])
            if ".attn.to_" in name:
                t = t[:, :, None, None]                                              # Linear -> 1x1 convolution
            if ".attn.to_k." not in name and ".attn.to_v." not in name:              # these went with to_q
                ours[rename(re.sub(r"(project_\w+)\.main\.", r"\1.", name.replace("to_q.", "to_qkv.")), src, OURS)] = t
    except (KeyError, ValueError):
        raise InputError(f"{file}: unknown tensor {name[:60]!r}, not a DC-AE 1.0 or 1.5 (sana variants are not read)") from None
    return ours

def to_diffusers(state):
    theirs = {}
    for name, t in state.items():
        name, t = rename(name, OURS, DIFFUSERS), t.detach().contiguous()
        t = t[:, :, 0, 0] if ".attn.to_" in name else t
        thirds = zip(("to_q.", "to_k.", "to_v."), t.chunk(3)) if "to_qkv." in name else [("to_qkv.", t)]
        theirs |= {name.replace("to_qkv.", x): part.clone() for x, part in thirds}
    return theirs

def read_config(state, file):
    """The configuration, off names and shapes: every block has one norm (EViT blocks: attn.norm), as wide as its stage."""
    found = {"encoder": {}, "decoder": {}}
    for name, t in state.items():
        if m := re.fullmatch(r"(encoder|decoder)\.stages\.(\d+)\.\d+\.(attn\.)?norm\.weight", name):
            found[m[1]].setdefault(int(m[2]), []).append(len(t))
    n = max(found["encoder"], default=0) + 1
    if n < 3 or "encoder.project_out.bias" not in state or any(sorted(side) != list(range(1, n)) for side in found.values()):
        raise InputError(f"{file}: not a complete DC-AE 1.0 or 1.5 (encoder and decoder, empty stage 0; sana variants are not read)")
    version = "1.0" if any(name.endswith("running_mean") for name in state) else "1.5"
    size = {}
    for side, stages in found.items():
        size[side + "_widths"] = (stages[1][0] // 2, *(stages[i][0] for i in range(1, n)))      # stage 0 has no tensors
        size[side + "_depths"] = (0, *(len(stages[i]) for i in range(1, n)))
    return AEConfig(2 ** (n - 1), len(state["encoder.project_out.bias"]), version, size["encoder_widths"][0], **size)

def safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise InputError(".safetensors files need one more package: pip install safetensors") from None
    return safetensors

def load_file(file):
    """A dict of tensors, or one of our checkpoints; memory-mapped, so that a checkpoint's optimiser costs nothing here."""
    safe = safetensors() if file.suffix == ".safetensors" else None
    broken = (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) + ((safe.SafetensorError,) if safe else ())
    try:
        if safe:
            return safe.torch.load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except broken as e:
        raise InputError(f"{file}: truncated, or not a file of plain tensors ({type(e).__name__})") from None
    if not isinstance(tensors, dict):
        raise InputError(f"{file}: holds a {type(tensors).__name__}, a checkpoint (dict) is needed")
    return tensors

def find_weights(x):
    """A file, a folder, or a published name (downloaded once into torch.hub's folder) -> the weights' file."""
    path = Path(x)
    if not path.exists() and re.fullmatch(r"(mit-han-lab|dc-ai)/dc-ae-[\w.-]+", str(x)):
        path = Path(torch.hub.get_dir(), "checkpoints", str(x).replace("/", "--"))
        path.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS[1], "config.json") if str(x).endswith("-diffusers") else ("model.safetensors",):
            url = f"https://huggingface.co/{x}/resolve/main/{name}"
            if not (path / name).exists():
                print(f"downloading {url}")
                try:
                    torch.hub.download_url_to_file(url, str(path / name), progress=sys.stderr.isatty())
                except OSError:                                                      # urllib's errors are OSErrors
                    raise InputError(f"no download: fetch {url} into {path}") from None
    if path.is_dir():
        path = next((path / name for name in WEIGHTS if (path / name).exists()), path)
    if not path.is_file():
        raise InputError(f"{x}: no checkpoint there (a file, a run folder, a published folder, or a name like dc-ai/dc-ae-f64c128-1.5)")
    return path

def read_checkpoint(path):
    """Our own checkpoint (a dict with "kind"): a file, or the run folder that holds ckpt.pt."""
    file = find_weights(path)
    ckpt = load_file(file)
    if "kind" not in ckpt:
        raise InputError(f"{file}: not a checkpoint of this repository (published weights: DCAE.from_pretrained)")
    return ckpt

class DiffusersKL(nn.Module):
    """A diffusers AutoencoderKL (SD-VAE-f8c4, Flux-VAE-f8c16: the paper's Table 4) behind DCAE's names."""
    def __init__(self, x):
        super().__init__()
        try:
            from diffusers import AutoencoderKL
            self.vae = AutoencoderKL.from_pretrained(x)
        except (ImportError, OSError, ValueError) as e:
            raise InputError(f"{x}: no such folder, nor a diffusers AutoencoderKL ({' '.join(str(e).split())[:80]})") from None
        config = self.vae.config
        self.config = SimpleNamespace(f=2 ** (len(config.block_out_channels) - 1), c=config.latent_channels, version="kl")
        self.scale, self.shift, self.info = float(config.scaling_factor), float(config.shift_factor or 0), {}

    def encode(self, img):
        return self.vae.encode(img).latent_dist.mean - self.shift

    def decode(self, z):
        return self.vae.decode(z + self.shift).sample

def open_autoencoder(x):
    """DCAE, or a diffusers AutoencoderKL where x is the folder or hub name of one."""
    config = Path(x, "config.json")
    hub = re.fullmatch(r"(?!out/)[\w.-]+/[\w.-]+", str(x)) and "dc-ae" not in str(x) and not Path(x).parent.exists()      # out/: runs of ours
    kl = hub or config.exists() and "AutoencoderKL" in config.read_text()
    return DiffusersKL(x).eval() if kl else DCAE.from_pretrained(x)

def fingerprint(module):
    """A short hash of all tensors: a latent cache remembers which weights wrote it."""
    h = hashlib.sha256()
    for name, t in sorted(module.state_dict().items()):
        h.update(f"{name} {tuple(t.shape)} {t.dtype}".encode())
        h.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return h.hexdigest()[:16]

# --- Images ------------------------------------------------------------------------------------------------------------

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)        # what PIL raises on broken files

def read_image(path, at_least=None):
    """Any file -> PIL RGB. at_least: a JPEG may be decoded smaller, both sides still >= that (for the train crop)."""
    img = Image.open(path)
    if at_least:
        img.draft(None, (at_least, at_least))
    img = ImageOps.exif_transpose(img)
    if img.mode.startswith("I"):                                                     # 16-bit greyscale: 0..65535 -> 0..255
        img = Image.fromarray((np.asarray(img).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if img.mode in ("RGBA", "LA", "PA") or "transparency" in img.info:
        img = img.convert("RGBA")
        img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
    return img.convert("RGB")

def center_crop(img, size):
    """ADM's centre crop: halve by box while >= 2x, bicubic to the short side, cut the middle."""
    while min(img.size) >= 2 * size:
        img = img.resize((img.width // 2, img.height // 2), Image.BOX)
    k = size / min(img.size)
    img = img.resize((round(img.width * k), round(img.height * k)), Image.BICUBIC)
    x, y = (img.width - size) // 2, (img.height - size) // 2
    return img.crop((x, y, x + size, y + size))

def train_crop(img, size, rng):
    """[ours] short side drawn from [size, 1.25 size], a random square of size x size in it, mirrored half of the time."""
    side = min(img.size) / rng.uniform(1, 1.25)
    x, y = rng.random() * (img.width - side), rng.random() * (img.height - side)
    img = img.resize((size, size), Image.BICUBIC, box=(x, y, x + side, y + side))
    return ImageOps.mirror(img) if rng.random() < 0.5 else img

def to_float(img):                                                                   # PIL RGB -> float (3, H, W) in [-1, 1]
    return torch.from_numpy(np.array(img)).permute(2, 0, 1).contiguous().float() / 127.5 - 1

def to_uint8(img):                                                                   # float (B, 3, H, W) -> uint8 (B, H, W, 3)
    return ((img.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

class Images(torch.utils.data.Dataset):
    """data[i] = data.get(i, i); data.get(i, key): the image at i, its augmentation drawn from (seed, key)."""
    def __getitem__(self, i):
        return self.get(i, i)

    def __getitems__(self, indices):                                                 # DataLoader's batched fetch
        img, label = self.get_batch(indices, indices)
        return list(zip(img, label.tolist()))

class ImageFolder(Images):
    """Class folders (labels follow the sorted names) or a flat folder (num_classes 0, label 0)."""
    def __init__(self, path, size, train, seed):
        self.size, self.train, self.seed, found = size, train, seed, []
        for root, folders, names in os.walk(path, followlinks=True):
            folders[:] = sorted(x for x in folders if x[0] != ".")
            top = os.path.relpath(root, path).split(os.sep)[0]                       # the class folder; "." at the top
            found += [(os.path.join(root, x), top) for x in sorted(names) if x[0] != "." and os.path.splitext(x)[1].lower() in SUFFIXES]
        self.classes = sorted({top for _, top in found} - {"."})
        self.num_classes, number = len(self.classes), {name: i for i, name in enumerate(self.classes)}
        pairs = [(file, number.get(top, 0)) for file, top in found if top in number or not number]
        if len(pairs) < len(found):
            print(f"{path}: {len(found) - len(pairs)} images beside the class folders are left out")
        if not pairs:
            raise InputError(f"--data {path}: no images there ({' '.join(sorted(SUFFIXES))}), nor in its folders")
        self.files, self.labels = zip(*pairs)
        self.bad = torch.zeros(len(pairs), dtype=torch.bool).share_memory_()         # workers see it: each file is named once
        self.read(0)

    def read(self, i):
        """The image at i, or, where that is unreadable, at the next readable index."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        for j in range(len(self)):
            j = (i + j) % len(self)
            try:
                if not self.bad[j]:
                    return read_image(self.files[j], 2 * self.size if self.train else None), self.labels[j]
            except UNREADABLE as e:
                self.bad[j] = True
                print(f"{self.files[j]}: unreadable, replaced by the next image ({str(e)[:60]})", file=sys.stderr)
        raise InputError(f"--data {Path(self.files[0]).parent}: none of the {len(self)} images can be read")

    def get(self, i, key):
        (img, label), rng = self.read(int(i)), np.random.default_rng((self.seed, int(key)))
        return to_float(train_crop(img, self.size, rng) if self.train else center_crop(img, self.size)), label

    def get_batch(self, indices, keys):
        img, label = zip(*map(self.get, indices, keys))
        return torch.stack(img), torch.tensor(label)

    def __len__(self):
        return len(self.files)

def box(x, y, a, b):
    return torch.maximum(x.abs() - a, y.abs() - b)

def star(x, y):                                                                      # tips at radius 1, dents at 0.45
    angle = torch.remainder(torch.atan2(x, -y) + math.pi / 5, math.pi / 2.5) - math.pi / 5      # folded into one tip's sector
    r, ex, ey = torch.hypot(x, y), 0.45 * math.sin(math.pi / 5), 0.45 * math.cos(math.pi / 5) - 1      # edge: tip to dent
    return ((r * angle.cos() - 1) * ex - r * angle.sin().abs() * ey) / math.hypot(ex, ey)

# Signed distances (negative inside) to ten objects in the unit disk, y down [ours]. No one is another turned by up to 12 degrees,
# so that every picture shows its class.
SHAPES = {
    "disk": lambda x, y: torch.hypot(x, y) - 0.85,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.70).abs() - 0.22,
    "square": lambda x, y: box(x, y, 0.72, 0.72),
    "triangle": lambda x, y: torch.maximum(y - 0.6, 0.866 * x.abs() - 0.5 * y - 0.45),
    "plus": lambda x, y: torch.minimum(box(x, y, 0.28, 0.92), box(x, y, 0.92, 0.28)),
    "star": star,
    "moon": lambda x, y: torch.maximum(torch.hypot(x, y) - 0.9, 0.72 - torch.hypot(x - 0.45, y)),
    "hourglass": lambda x, y: torch.maximum(y.abs() - 0.88, (x.abs() - y.abs() - 0.06) * 0.707),
    "heart": lambda x, y: torch.minimum(torch.hypot(x.abs() - 0.42, y + 0.3) - 0.48,
                                        torch.maximum((x.abs() + (y - 0.04).abs()) * 0.707 - 0.537, -0.3 - y)),
    "bars": lambda x, y: box(x, y.abs() - 0.52, 0.85, 0.26),
}
COLOURS = torch.tensor([[0.9, 0.3, 0.25], [0.3, 0.75, 0.3], [0.3, 0.45, 0.95], [0.9, 0.8, 0.25], [0.85, 0.4, 0.85], [0.3, 0.8, 0.85]])

def hash_uniform(index, n, salt):
    """(B,) indices -> (B, n) float32 numbers in [0, 1): splitmix64's finaliser over a counter."""
    x = np.asarray(index, np.uint64)[:, None] * np.uint64(n) + np.arange(n, dtype=np.uint64) + np.uint64(salt << 48)
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((x ^ (x >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) / 2 ** 24)

class ToyImages(Images):
    """Pictures drawn from their index: one of ten objects (the class) under fine stripes and grain (detail), on plain dark ground."""
    classes, num_classes = list(SHAPES), len(SHAPES)

    def __init__(self, size, train):
        self.size, self.train = size, train

    def get_batch(self, indices, keys=None):                                         # keys: unused, each index is a new picture
        S, index = self.size, np.asarray(indices, np.int64)
        if index.min() < 0 or index.max() >= len(self):
            raise IndexError(f"toy images are numbered 0 to {len(self) - 1}")
        label, u = torch.from_numpy(index % 10), hash_uniform(index, 9, 1 + self.train)[:, :, None, None]      # u[:, k]: (B, 1, 1)
        radius, turn = 0.26 + 0.14 * u[:, 0], math.radians(24) * (u[:, 1] - 0.5)     # in picture widths; up to 12 degrees
        px = ((torch.arange(S) + 0.5) / S)[None]                                     # pixel centres (1, S)
        x, y = px[:, None, :], px[:, :, None]                                        # (1, 1, S), (1, S, 1)
        cycles, tilt = 6 + 2 * u[:, 2], math.pi * u[:, 3]                            # stripes across the picture
        stripes = (2 * math.pi * (cycles * (x * tilt.cos() + y * tilt.sin()) + u[:, 4])).sin()[:, None]        # (B, 1, S, S)
        x, y = ((p - radius - (1 - 2 * radius) * u[:, k]) / radius for p, k in ((x, 5), (y, 6)))
        x, y = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()      # (B, S, S): the object's own frame
        distance = torch.empty_like(x)
        for k, shape in enumerate(SHAPES.values()):
            rows = label == k
            distance[rows] = shape(x[rows], y[rows])
        inside = (0.5 - distance * radius * S).clamp(0, 1)[:, None]                  # (B, 1, S, S), antialiased over one pixel
        grain = hash_uniform(index, S * S, 3 + self.train).view(-1, 1, S, S) - 0.5
        colour = COLOURS[(u[:, 7, 0, 0] * len(COLOURS)).long()][:, :, None, None]
        ground = 0.06 + 0.12 * u[:, 8:9]
        return 2 * (ground + inside * (colour * (0.85 + 0.15 * stripes) - ground) + 0.02 * grain) - 1, label

    def get(self, i, key=None):
        img, label = self.get_batch([i])
        return img[0], int(label)

    def __len__(self):
        return 1_000_000

def open_images(path, size, train=False, seed=0):
    """A folder of images, or "toy" -> Dataset of (float (3, size, size) in [-1, 1], label)."""
    if size < 1:
        raise InputError(f"--image_size {size}: must be positive")
    if str(path) != "toy" and not os.path.isdir(path):
        raise InputError(f"--data {path}: no such folder (images, or one folder per class; or toy)")
    return ToyImages(size, train) if str(path) == "toy" else ImageFolder(path, size, train, seed)

def save_grid(img, path, ncol, titles=None, rows=None):
    """uint8 tiles (B, H, W, 3), or a list of (H, W, 3) -> PNG, ncol in a row; titles: captions of columns, rows: of rows."""
    H, W = (max(t.shape[k] for t in img) for k in (0, 1))
    k = max(1, 64 // max(H, W))                                                      # tiny pictures: enlarged k times
    top, left = 14 if titles else 0, 8 + 6 * max(map(len, rows)) if rows else 0
    sheet = Image.new("RGB", (left + ncol * (k * W + 2), top + -(-len(img) // ncol) * (k * H + 2)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, tile in enumerate(img):
        x, y = left + i % ncol * (k * W + 2), top + i // ncol * (k * H + 2)
        tile = Image.fromarray(np.asarray(tile))
        sheet.paste(tile.resize((k * tile.width, k * tile.height), Image.NEAREST), (x, y))
        if rows and i % ncol == 0:
            draw.text((2, y + k * H // 2 - 6), rows[i // ncol], "black", font)
        if titles and i < ncol:
            draw.text((x + 2, 1), titles[i], "black", font)
    sheet.save(path)

# --- The paper's figures -----------------------------------------------------------------------------------------------

def parse_channels(text, c):
    """"16:128:4" (both ends count), "16,32,64" or "64" -> sorted list; None -> the paper's 16, 20, ..., c. A number given
    twice stays twice: c' is drawn uniformly from the list, so that "16,32,64,64" takes 64 in half of the steps."""
    if text is None:
        return [*range(16, c, 4), c]
    try:
        part = [int(x) for x in re.split("[:,]", str(text))]
        channels = list(range(part[0], part[1] + 1, *part[2:])) if ":" in str(text) else part
    except (ValueError, TypeError):
        raise InputError(f"--channels {text}: write 16:128:4, or 16,32,64, or one number") from None
    if not channels or min(channels) < 1 or max(channels) > c:
        raise InputError(f"--channels {text}: the numbers must lie in 1..{c}, the autoencoder's channels")
    return sorted(channels)

def grey(x):                                                                         # (n, h, w) -> uint8 (n, h, w, 3), each map black..white
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return ((x - low) / (high - low).clamp_min(1e-12) * 255).round().to(torch.uint8).cpu()[..., None].expand(-1, -1, -1, 3)

@torch.no_grad()
def figures(args):
    models = {which: DCAE.from_pretrained(x).to(args.device) for which, x in (("A", args.ckpt), ("B", args.ckpt2)) if x}
    c, size, pictures = min(ae.config.c for ae in models.values()), args.image_size, []
    if size is not None and size < 1:
        raise InputError(f"--image_size {size}: must be positive")
    channels = sorted(set(parse_channels(args.channels or ",".join(str(max(1, c // k)) for k in (8, 4, 2, 1)), c)))
    for path in args.images:
        if path == "toy":
            data = open_images("toy", size or models["A"].info.get("image_size", 256))
            pictures += [(data.classes[i], data[i][0]) for i in range(4)]
            continue
        try:
            img = read_image(path)
        except UNREADABLE as e:
            raise InputError(f"{path}: cannot be read as an image: {str(e)[:80]}") from None
        pictures.append((Path(path).stem[:12], to_float(center_crop(img, size) if size else img)))
    os.makedirs(args.out, exist_ok=True)
    recs, means, rows = [], [], []
    for n, (name, img) in enumerate(pictures):
        for which, ae in models.items():
            (H, W), f = img.shape[1:], ae.config.f                                   # padded to multiples of f, cut back below
            z = ae.encode(F.pad(img[None], (0, -W % f, 0, -H % f), "reflect" if f <= min(H, W) else "replicate").to(args.device))
            rows.append(f"{name} {which}" if args.ckpt2 else name)
            recs += [to_uint8(x)[0].cpu() for x in (img[None], *(ae.decode(z[:, :k])[:, :, :H, :W] for k in channels))]
            mean = torch.cat([z[:, :k].mean(1) for k in channels])                   # (channels, h, w)
            means += [recs[-len(channels) - 1], *grey(mean.repeat_interleave(f, 1).repeat_interleave(f, 2)[:, :H, :W])]
            save_grid(grey(z[0]), f"{args.out}/latent_{n}_{which}.png", math.ceil(ae.config.c ** 0.5))       # Figures 9, 10
    titles = ["input"] + [f"c'={k}" for k in channels]
    save_grid(recs, f"{args.out}/reconstruction.png", len(titles), titles, rows)     # Figure 3
    save_grid(means, f"{args.out}/channel_average.png", len(titles), titles, rows)   # Figure 2
    print(f"{args.out}: reconstruction.png, channel_average.png, latent_*.png")

def main(argv=None):
    p = argparse.ArgumentParser(description="Draw the paper's Figures 2, 3, 9 and 10 for given images.",
                                usage="python ae.py IMAGE... --ckpt CKPT [--ckpt2 CKPT] [--channels LIST] --out DIR")
    p.add_argument("images", nargs="+", metavar="IMAGE", help="image files of any size, or toy")
    p.add_argument("--ckpt", required=True, help="autoencoder: run folder, checkpoint, published name or folder")
    p.add_argument("--ckpt2", help="a second one, drawn beside it (structured and unstructured, say)")
    p.add_argument("--channels", help="the c' to show, like 16,32,64,128 (default: c/8, c/4, c/2, c)")
    p.add_argument("--image_size", type=int, help="centre-crop the images to this size first (default: as they are)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: CUDA where there is one")
    p.add_argument("--out", required=True, help="folder for the PNGs")
    figures(p.parse_args(argv))

if __name__ == "__main__":
    main()
