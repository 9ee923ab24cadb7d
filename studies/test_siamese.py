"""Tests of SimSiam, and of noise that is made against it."""
import torch
import torch.nn.functional as F

import train
from attacks import PROTECTIONS
from studies import siamese
from studies.siamese import Siamese, SimSiam, other_views
from test_le import SMALL, close, images, seeded

RESNET = dict(widths=(8, 8), blocks=1, strides=(2,), classes=10)


def one_view(x, generator):
    """A view that is new each time: the image, times a number that is drawn."""
    return x * torch.rand(1, generator=generator)


def drawn():
    return torch.Generator().manual_seed(0)


def test_SimSiam_predicts_what_the_other_view_shows():
    net, x = SimSiam(**RESNET).eval(), images(3)
    generator = drawn()
    first, second = one_view(x, generator), one_view(x, generator)
    predicted, shown = other_views(net, x, None, drawn(), one_view)
    close(predicted, net.predictor(net.projection(net.features(torch.cat([first, second])))))
    close(shown, net.projection(net.features(torch.cat([second, first]))))


def test_Siamese_loss_is_minus_the_mean_cosine_of_both_views():
    net, x = SimSiam(**RESNET).eval(), images(3)
    victim = Siamese(SimSiam, other_views, choice=dict(view=one_view))
    predicted, shown = other_views(net, x, None, drawn(), one_view)
    cosines = (F.normalize(predicted, dim=1) * F.normalize(shown, dim=1)).sum(1)
    close(victim.loss(net, x, None, drawn()), -cosines.mean())


def test_SimSiam_stops_the_gradient_of_what_is_shown():
    _, shown = SimSiam(**RESNET)(images(3))
    assert not shown.requires_grad


def test_main_judges_noise_that_is_made_against_SimSiam(tmp_path, capsys):
    siamese.register()
    small = ["--protections", "simsiam-class", "--simsiam.view", "quadrant"]
    train.main([*SMALL, *small, "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "simsiam on simsiam-class-le: " in said and "| simsiam-class |" in said
    assert PROTECTIONS["simsiam-class"].settings is PROTECTIONS["cp-class"].settings
