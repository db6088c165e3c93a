"""Probes on toy features whose answer is known."""

import pytest
import torch
import torch.nn.functional as F

from eve.tasks.probes import LinearProbe, fit_logistic, majority_accuracy, nearest_neighbour_probe


def blobs(per_class: int, num_classes: int, dimensions: int, spread: float, seed: int):
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, dimensions, generator=torch.Generator().manual_seed(99)) * 3
    labels = torch.arange(num_classes).repeat(per_class)
    return centres[labels] + spread * torch.randn(len(labels), dimensions, generator=random), labels


def test_separable_classes_are_told_apart():
    train, train_labels = blobs(40, 5, 16, 0.3, seed=0)
    test, test_labels = blobs(20, 5, 16, 0.3, seed=1)
    assert LinearProbe(train, train_labels, seed=0).accuracy(test, test_labels) == 1.0
    assert nearest_neighbour_probe(train, train_labels, test, test_labels) == 1.0


def test_features_without_information_stay_near_chance():
    random = torch.Generator().manual_seed(0)
    train, test = torch.randn(800, 8, generator=random), torch.randn(800, 8, generator=random)
    train_labels, test_labels = torch.arange(800) % 4, torch.arange(800) % 4
    assert LinearProbe(train, train_labels, seed=0).accuracy(test, test_labels) < 0.33
    assert nearest_neighbour_probe(train, train_labels, test, test_labels) < 0.33


def test_scale_and_offset_of_a_feature_do_not_matter():
    train, train_labels = blobs(40, 3, 6, 2.0, seed=0)
    test, test_labels = blobs(200, 3, 6, 2.0, seed=1)
    scale, offset = torch.tensor([1e-3, 1, 10, 1e3, 5, 2]), torch.tensor([0, 7, -3, 1e4, 0, 1])
    plain = LinearProbe(train, train_labels, seed=0).accuracy(test, test_labels)
    moved = LinearProbe(train * scale + offset, train_labels, seed=0).accuracy(
        test * scale + offset, test_labels
    )
    assert 0.5 < plain < 1.0
    assert moved == pytest.approx(plain, abs=0.01)


def test_logistic_regression_reaches_the_minimum():
    """The objective is convex: where the gradient vanishes is the minimum. Gradient written out by hand."""
    features, labels = blobs(50, 3, 4, 4.0, seed=0)
    features, weight = features.double(), 0.01
    weights, bias = fit_logistic(features, labels, 3, weight)
    residual = (features @ weights.T + bias).softmax(1) - F.one_hot(labels, 3)
    assert (residual.T @ features / len(features) + weight * weights).abs().max() < 1e-4
    assert residual.mean(0).abs().max() < 1e-4


def test_neighbours_vote_by_cosine_not_by_distance():
    """Around the training mean (0, 0): the test point (9, 1) is nearest by angle to (1, 0)."""
    train = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 9.0], [0.0, -9.0]])
    labels = torch.tensor([0, 1, 2, 3])
    test = torch.tensor([[9.0, 1.0], [-0.1, 0.01], [0.2, 5.0]])
    assert nearest_neighbour_probe(train, labels, test, torch.tensor([0, 1, 2]), k=1) == 1.0


def test_fewer_training_features_than_neighbours():
    train, labels = torch.tensor([[1.0], [-1.0], [1.1]]), torch.tensor([0, 1, 0])
    assert nearest_neighbour_probe(train, labels, torch.tensor([[2.0], [-2.0]]), torch.tensor([0, 1])) == 1.0


def test_a_class_that_training_never_showed_is_only_missed():
    train, train_labels = blobs(20, 2, 4, 0.1, seed=0)
    test_labels = torch.cat([train_labels, torch.tensor([2])])
    test = torch.cat([train, torch.zeros(1, 4)])
    assert LinearProbe(train, train_labels, seed=0).accuracy(test, test_labels) == pytest.approx(40 / 41)
    assert nearest_neighbour_probe(train, train_labels, test, test_labels) == pytest.approx(40 / 41)


def test_majority_is_that_of_the_training_labels():
    assert majority_accuracy(torch.tensor([1, 1, 0]), torch.tensor([0, 0, 0, 1])) == 0.25
