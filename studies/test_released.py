"""Tests of other people's weights and data: studies/released.py."""
import json

import pytest
import torch

import unet
from studies import released
from test_le import awake, same, seeded
from unet import T, BadInput, UNet


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
