"""Weights and data that other people have released, in the form that the lesson reads.

    python -m studies.released unet diffusion_pytorch_model.bin runs/ddpm-cifar10.pt
    python -m studies.released vgg16 runs/vgg16-397923af.pth runs/vgg16.pt
    python -m studies.released vgg16 runs/vgg16-397923af.pth runs/vgg16-lpips.pt \
        --lpips runs/lpips-vgg.pth --download
    python -m studies.released cifar10 runs/cifar-10-binary.tar.gz

The first takes google/ddpm-cifar10-32 or another U-Net of its kind, of the library diffusers (.bin,
or .safetensors by the package of that name, with its config.json). The next two take torchvision's
VGG-16 and, for LPIPS, its linear layers; --download fetches what is not there from its official
address. The last fetches the official binary archive. Hashes are checked.
"""
import argparse
import json
import sys
from pathlib import Path

if not __package__:
    print("expected `python -m studies.released`, from the project's folder", file=sys.stderr)
    sys.exit(2)

import torch

import le
import perceptual
import train
import unet
from perceptual import VGG, PerceptualDistance
from unet import BadInput, UNet, fit_weights, read, said


# -- Downloads -------------------------------------------------------------------------------------

# Official addresses, and their sha256
VGG16 = ("https://download.pytorch.org/models/vgg16-397923af.pth",
         "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0")
LPIPS = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/"
         "v0.1/vgg.pth", "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868")
CIFAR10 = (train.CIFAR10, "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")


def download(address, path):
    """Fetch (url, sha256) to a path, if one is given and nothing is there, and if its hash fits."""
    if not path or Path(path).exists():
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address[0], str(path), hash_prefix=address[1])
    except (OSError, RuntimeError) as error:
        raise BadInput(f"{address[0]}: {error}; fetch it elsewhere and put it at {path}") from None


# -- A U-Net of the library diffusers --------------------------------------------------------------

# What diffusers calls the layers of attention today, and called them in its first weights
RENAMED = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
# Its names of what our U-Net does, with what it takes where a configuration is silent; the shapes
# of the weights show the rest
SETTINGS = {
    "act_fn": ("silu", "silu"), "attention_head_dim": (None, 8), "freq_shift": (1, 0),
    "center_input_sample": (False, False), "downsample_padding": (0, 1), "norm_eps": (1e-6, 1e-5),
    "flip_sin_to_cos": (False, True), "mid_block_scale_factor": (1, 1),
    "norm_num_groups": (32, 32), "resnet_time_scale_shift": ("default", "default"),
    "time_embedding_type": ("positional", "positional")}


def is_ours(checkpoint):
    """Whether a file's content is a checkpoint of `train.py`, not bare weights."""
    return isinstance(checkpoint, dict) and "weights" in checkpoint


def bare_weights(path):
    """The state dict in a file of others. Raises BadInput if it holds something else."""
    if Path(path).suffix == ".safetensors":
        weights = safe_tensors(path)
    else:
        weights = read(path)
    if not isinstance(weights, dict):
        raise BadInput(f"{path}: holds a {type(weights).__name__}, expected a state dict")
    return {str(key): value for key, value in weights.items()}


def safe_tensors(path):
    """What is in a .safetensors file, read by the package of that name."""
    try:
        from safetensors.torch import load_file
        return load_file(path)
    except ImportError:
        raise BadInput(f"{path}: expected `pip install safetensors` for such a file") from None
    except OSError:
        raise
    except Exception as error:                             # that package raises its own
        raise BadInput(f"{path}: not a whole file of tensors ({said(error)})") from None


def check_settings(path):
    """Raise BadInput where the config.json beside released weights has other settings than our
    U-Net, which the weights do not show. Where there is none, say what is assumed."""
    beside = Path(path).with_name("config.json")
    if not beside.exists():
        print(f"{path}: no config.json beside it; assumed are the settings of ddpm-cifar10-32")
        return
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
        theirs = {name: config.get(name, default) for name, (_, default) in SETTINGS.items()}
    except (ValueError, AttributeError) as error:
        raise BadInput(f"{beside}: not a configuration ({said(error)})") from None
    for name, (ours, _) in SETTINGS.items():
        if theirs[name] != ours:
            raise BadInput(f"{beside}: {name} is {theirs[name]}, expected {ours}")


def any_unet(path):
    """The U-Net in a checkpoint of `train.py`, or in released weights, for evaluation. Raises
    BadInput, naming what differs, if it is neither."""
    if Path(path).suffix != ".safetensors" and is_ours(read(path)):
        return unet.load(path)
    weights = bare_weights(path)
    for new, old in RENAMED.items():
        weights = {key.replace(f".{new}.", f".{old}."): w for key, w in weights.items()}
    net = UNet()
    fit_weights(path, net, weights)
    check_settings(path)
    return net.eval().requires_grad_(False)


# -- torchvision's VGG-16, and LPIPS ---------------------------------------------------------------

def any_distance(path, lpips=None):
    """The distance over the VGG in a checkpoint of `train.py`, or in torchvision's vgg16.

    `lpips` is a file with LPIPS's linear layers, version 0.1; without it every channel counts the
    same. Raises BadInput if a file is something else, naming the first key that differs.
    """
    if is_ours(read(path)):
        distance = perceptual.load(path)
        return PerceptualDistance(distance.vgg, lpips_layers(lpips)) if lpips else distance
    weights = bare_weights(path)
    scores = {key: w for key, w in weights.items() if key.startswith("classifier.")}
    if any(isinstance(w, torch.Tensor) and w.isnan().any() for w in scores.values()):
        raise BadInput(f"{path}: its classifier is NaN, as in torchvision's vgg16_features, "
                       "which has another normalisation; expected vgg16-397923af.pth")
    vgg = VGG(classes=1)                                   # the distance needs no class scores
    nothing = {f"classifier.{key}": w for key, w in vgg.classifier.state_dict().items()}
    features = {key: w for key, w in weights.items() if key not in scores}
    fit_weights(path, vgg, features | nothing)
    if not lpips:
        return PerceptualDistance(vgg)
    try:
        return PerceptualDistance(vgg, lpips_layers(lpips))
    except BadInput as error:
        raise BadInput(f"{lpips}: {error}") from None


def lpips_layers(path):
    """LPIPS's weights of the channels of each stage, [(c,)] of five."""
    layers = read(path)
    names = [f"lin{i}.model.1.weight" for i in range(5)]
    if not isinstance(layers, dict) or not set(names) <= set(layers):
        raise BadInput(f"{path}: not LPIPS's linear layers; expected {names[0]} to {names[-1]}")
    return [layers[name].flatten() for name in names]


# -- Command line ----------------------------------------------------------------------------------

def checkpoint_of(net):
    """What `unet.load` reads back."""
    return dict(config=net.config, weights=net.state_dict())


def write(out, checkpoint):
    out.parent.mkdir(parents=True, exist_ok=True)
    unet.save(out, checkpoint)


def main(argv=None):
    parser = le.Parser(prog="studies.released", description=__doc__, allow_abbrev=False,
                       formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("unet", "vgg16", "cifar10"))
    parser.add_argument("files", nargs="+", metavar="FILE [OUT]", type=Path)
    parser.add_argument("--lpips", metavar="FILE", type=Path, help="LPIPS's linear layers")
    parser.add_argument("--download", action="store_true", help="first fetch what is missing")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    with le.one_line_errors("studies.released"):
        if len(options.files) != (1 if options.kind == "cifar10" else 2):
            raise BadInput("expected unet FILE OUT, vgg16 FILE OUT or cifar10 OUT")
        source, out = options.files[0], options.files[-1]
        if options.kind == "cifar10":
            download(CIFAR10, out)
        elif options.kind == "unet":
            write(out, checkpoint_of(any_unet(source)))
        else:
            if options.download:
                download(VGG16, source)
                download(LPIPS, options.lpips)
            distance = any_distance(source, options.lpips)
            weights = [w.detach() for w in distance.weights]
            write(out, checkpoint_of(distance.vgg) | dict(lpips=weights))
        print(f"{out}: written")


if __name__ == "__main__":
    main()
