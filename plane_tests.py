import pytest
import torch
from PIL import Image

import unet
from studies import labels, pictures, plane, slide


def test_protect_moves_points_by_epsilon_off_the_circle_to_the_side_of_their_class():
    points, classes = plane.natural_points(500, torch.Generator().manual_seed(0))
    ue = plane.protect(points, classes)
    assert ((ue - points).flatten(1).norm(dim=1) - plane.EPSILON).abs().max() < 1e-5
    assert plane.moved(ue, points, classes) == pytest.approx((0, plane.EPSILON), abs=0.01)


def test_the_perceptual_distance_of_the_plane_is_blind_to_the_perturbation_alone():
    points, classes = plane.natural_points(50, torch.Generator().manual_seed(0))
    distance, ue = plane.Directions(), plane.protect(points, classes)
    seen = distance.embed(points / 2 + 0.5)
    assert distance.to_embedding(ue / 2 + 0.5, seen).max() < 1e-8
    assert distance.to_embedding(points.flip(1) / 2 + 0.5, seen).mean() > 0.1


def test_conditions_keep_points_in_place_and_too_much_of_one_brings_the_protection_back():
    points, classes = plane.natural_points(400, torch.Generator().manual_seed(0))
    net = plane.fit(plane.Denoiser(), lambda net: unet.ddpm_loss(
        net, points, torch.randint(1, 101, (400,)), torch.randn(points.shape)), 600, 0.005)
    ue, ways = plane.protect(points, classes), []
    for name in ("LEs, no condition", "LEs, both", "LEs, pixels x 50"):
        made = plane.way_back(net, ue, plane.SAMPLERS[name], torch.Generator().manual_seed(0))
        ways.append(plane.moved(made, points, classes))
    (along, off), (along_both, off_both), (_, off_pixels) = ways
    assert along_both < along / 2 and off < off_both < off_pixels and off_both < plane.EPSILON / 3


def test_pictures_of_the_plane_are_drawn(tmp_path):
    points, classes = plane.natural_points(50, torch.Generator().manual_seed(0))
    found = {"points": (points, plane.perceptron(2, 8, 2), (99.0, 0.0, 0.0))}
    slide.draw_panels(["points"] * 6, found, classes, plane.summary([found]), tmp_path / "a.png")
    slide.draw_pipeline(tmp_path / "b.png")
    assert all(Image.open(tmp_path / name).width > 1000 for name in ("a.png", "b.png"))


def test_labels_of_a_plot_overlap_neither_each_other_nor_dots_and_stay_inside():
    torch.manual_seed(0)
    dots = (torch.rand(25, 2) * torch.tensor([860, 460]) + 20).tolist()
    taken = [labels.square(x, y, 6) for x, y in dots]
    boxes = labels.placed([(x, y, 120) for x, y in dots], taken, (900, 500))
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert not any(labels.overlap(boxes[i], other) for other in [*taken, *boxes[:i]])
        assert left >= 0 and top >= 0 and right <= 900 and bottom <= 500


@pytest.mark.parametrize("t", [0, 36, 1000])
def test_rows_of_forward_differ_by_exactly_the_perturbation_that_is_left(t):
    original, move, eps = torch.randn(3, 3, 8, 8)
    noisy, left, noise = pictures.forward_rows(original, original + move, eps, t)
    kept = unet.ALPHA_BAR[t].sqrt().item()
    torch.testing.assert_close(left - noise, kept * move, atol=1e-6, rtol=0)
    torch.testing.assert_close(noisy - left, kept * (original - 0.5) + 0.5, atol=1e-6, rtol=0)
