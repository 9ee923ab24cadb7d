"""Tests of other people's weights and data: studies/released.py."""
import json
import math

import pytest
import torch

import perceptual
import unet
from perceptual import VGG, PerceptualDistance
from studies import released
from test_le import awake, images, same, seeded
from unet import T, BadInput, UNet


# Some of the keys of google/ddpm-cifar10-32's diffusion_pytorch_model.bin, and their shapes
RELEASED_KEYS = {
    "conv_in.weight": (128, 3, 3, 3), "time_embedding.linear_1.weight": (512, 128),
    "down_blocks.0.resnets.1.time_emb_proj.weight": (128, 512),
    "down_blocks.0.downsamplers.0.conv.weight": (128, 128, 3, 3),
    "down_blocks.1.resnets.0.conv_shortcut.weight": (256, 128, 1, 1),
    "down_blocks.1.attentions.1.query.weight": (256, 256),
    "mid_block.attentions.0.proj_attn.bias": (256,), "up_blocks.0.upsamplers.0.conv.bias": (256,),
    "up_blocks.0.resnets.2.conv1.weight": (256, 512, 3, 3), "conv_norm_out.weight": (128,)}


def test_UNet_defaults_are_the_released_network():
    with torch.device("meta"):
        weights = {name: tuple(w.shape) for name, w in UNet().state_dict().items()}
    assert {name: weights.get(name) for name in RELEASED_KEYS} == RELEASED_KEYS
    assert sum(map(math.prod, weights.values())) == 35_746_307


def test_VGG_defaults_are_the_released_layers():
    with torch.device("meta"):
        vgg = VGG()
    convolutions = [i for i, layer in enumerate(vgg.features) if isinstance(layer, torch.nn.Conv2d)]
    assert convolutions == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # as in torchvision
    assert sum(p.numel() for p in vgg.features.parameters()) == 14_714_688
    assert vgg.taps == [3, 8, 15, 22, 29]                  # relu1_2 ... relu5_3, as in LPIPS


def test_any_unet_reads_bare_weights_of_the_released_layout(tmp_path, monkeypatch):
    defaults = (8, (1, 2), 1, (16,), 0.0, 2, 32, T)        # a small network for the paper's
    monkeypatch.setattr(UNet.__init__, "__defaults__", defaults)
    net, x = awake(UNet()), torch.randn(1, 3, 32, 32)
    torch.save(net.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    same(released.any_unet(tmp_path / "diffusion_pytorch_model.bin")(x, 7), net(x, 7))
    files = [str(tmp_path / name) for name in ("diffusion_pytorch_model.bin", "ours.pt")]
    released.main(["unet", *files])
    same(unet.load(files[1])(x, 7), net(x, 7))


def test_any_unet_reads_diffusers_names_of_today_and_refuses_other_settings(
        tmp_path, monkeypatch, capsys):
    defaults = (8, (1, 2), 1, (16,), 0.0, 2, 32, T)
    monkeypatch.setattr(UNet.__init__, "__defaults__", defaults)
    net, x, file = awake(UNet()), torch.randn(1, 3, 32, 32), tmp_path / "weights.bin"
    weights = net.state_dict()
    for ours, theirs in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"),
                         ("proj_attn", "to_out.0")):
        weights = {name.replace(f".{ours}.", f".{theirs}."): w for name, w in weights.items()}
    torch.save(weights, file)
    same(released.any_unet(file)(x, 7), net(x, 7))
    assert "no config.json beside it" in capsys.readouterr().out
    config = {name: ours for name, (ours, _) in released.SETTINGS.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    same(released.any_unet(file)(x, 7), net(x, 7))
    for change in (dict(flip_sin_to_cos=True), dict(attention_head_dim=8)):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(BadInput, match=f"config.json: {next(iter(change))} is .*, expected"):
            released.any_unet(file)
    del config["freq_shift"]                               # then diffusers takes its own default
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="config.json: freq_shift is 0, expected 1"):
        released.any_unet(file)


def test_any_distance_reads_torchvisions_vgg16_and_lpips_layers(tmp_path, monkeypatch):
    narrow = (8, (2, 2, 3, 3, 3), 10)                      # VGG-16's names, fewer channels
    monkeypatch.setattr(VGG.__init__, "__defaults__", narrow)
    vgg, linear = awake(VGG()), [torch.rand(c) for c in (8, 16, 32, 64, 64)]
    theirs = {name: w for name, w in vgg.state_dict().items() if "features" in name}
    torch.save(theirs | {"classifier.0.weight": torch.ones(1)}, tmp_path / "vgg16.pth")
    layers = {f"lin{i}.model.1.weight": w.view(1, -1, 1, 1) for i, w in enumerate(linear)}
    torch.save(layers, tmp_path / "lpips.pth")
    x, y = images(2), images(2)
    plain = released.any_distance(tmp_path / "vgg16.pth")
    weighted = released.any_distance(tmp_path / "vgg16.pth", tmp_path / "lpips.pth")
    same(plain(x, y), PerceptualDistance(vgg)(x, y))
    same(weighted(x, y), PerceptualDistance(vgg, linear)(x, y))
    with pytest.raises(BadInput, match="lin0.model.1.weight"):
        released.any_distance(tmp_path / "vgg16.pth", tmp_path / "vgg16.pth")
    with pytest.raises(BadInput, match="features.0.weight"):
        released.any_distance(tmp_path / "lpips.pth")
    command = ["vgg16", tmp_path / "vgg16.pth", tmp_path / "ours.pt", "--lpips",
               tmp_path / "lpips.pth"]
    released.main(list(map(str, command)))                 # the checkpoint that the story reads
    same(perceptual.load(tmp_path / "ours.pt")(x, y), weighted(x, y))
    layers["lin0.model.1.weight"] = layers["lin0.model.1.weight"][:, :3]
    torch.save(layers, tmp_path / "narrow.pth")
    with pytest.raises(BadInput, match="narrow.pth: need .* weights for"):
        released.any_distance(tmp_path / "vgg16.pth", tmp_path / "narrow.pth")
    features = theirs | {"classifier.0.weight": torch.full((1,), math.nan)}
    torch.save(features, tmp_path / "vgg16_features.pth")  # torchvision's other VGG-16
    with pytest.raises(BadInput, match="vgg16_features.pth: its classifier is NaN"):
        released.any_distance(tmp_path / "vgg16_features.pth")


def test_download_keeps_only_what_has_the_hash(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"data")
    for url in (source, tmp_path / "missing"):
        with pytest.raises(BadInput, match="put it at"):
            released.download((url.as_uri(), "0" * 64), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    right = "3a6eb0790f39ac87c94f3856b2dd2c5d110e6811602261a9a923d3bb23adc8b7"
    released.download((source.as_uri(), right), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"data"
