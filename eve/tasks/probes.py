"""What frozen features know: a linear probe and a k-nearest-neighbour probe.

Shape suffixes: B sample, D feature, C class.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Weights of |W|^2 / 2 in the mean cross-entropy that the linear probe chooses from.
L2_WEIGHTS = (1e-4, 1e-3, 1e-2, 1e-1)


class LinearProbe:
    """A multinomial logistic regression on standardised features, fitted once for all that it is tested on.

    The weight of the L2 penalty is chosen on a fifth of the training features, held out by the seed, then
    the regression is fitted on all of them. Mean and standard deviation are those of the training features.
    """

    def __init__(self, train_BD: Tensor, labels_B: Tensor, *, seed: int) -> None:
        self._mean_D, self._std_D = train_BD.mean(0), train_BD.std(0) + 1e-6
        features_BD = (train_BD - self._mean_D) / self._std_D
        num_classes = int(labels_B.max()) + 1
        order_B = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels_B)))
        held_out, kept = order_B[: len(order_B) // 5], order_B[len(order_B) // 5 :]

        def held_out_accuracy(weight: float) -> float:
            fitted = fit_logistic(features_BD[kept], labels_B[kept], num_classes, weight)
            return _accuracy(*fitted, features_BD[held_out], labels_B[held_out])

        best = max(L2_WEIGHTS, key=held_out_accuracy)
        self._weights_CD, self._bias_C = fit_logistic(features_BD, labels_B, num_classes, best)

    def accuracy(self, test_BD: Tensor, labels_B: Tensor) -> float:
        """Top-1 accuracy; a class that training did not show is missed."""
        features_BD = (test_BD - self._mean_D) / self._std_D
        return _accuracy(self._weights_CD, self._bias_C, features_BD, labels_B)


def _accuracy(weights_CD: Tensor, bias_C: Tensor, features_BD: Tensor, labels_B: Tensor) -> float:
    return float(((features_BD @ weights_CD.T + bias_C).argmax(1) == labels_B).float().mean())


def fit_logistic(
    features_BD: Tensor, labels_B: Tensor, num_classes: int, l2_weight: float
) -> tuple[Tensor, Tensor]:
    """Weights (C, D) and bias (C,) that minimise mean cross-entropy + l2_weight |W|^2 / 2, by LBFGS."""
    weights_CD = features_BD.new_zeros(num_classes, features_BD.shape[1]).requires_grad_()
    bias_C = features_BD.new_zeros(num_classes).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights_CD, bias_C],
        max_iter=100,
        tolerance_grad=1e-5,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features_BD @ weights_CD.T + bias_C, labels_B)
        loss = loss + l2_weight * weights_CD.square().sum() / 2
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weights_CD.detach(), bias_C.detach()


def nearest_neighbour_probe(
    train_BD: Tensor, train_labels_B: Tensor, test_BD: Tensor, test_labels_B: Tensor, *, k: int = 20
) -> float:
    """Top-1 accuracy of the vote of the k training features of largest cosine (fewer where there are fewer).

    Features are centred on the training mean first: mean-pooled Transformer features share a large common
    part that would leave all cosines near 1. Votes weigh exp(cosine / 0.07) as in Wu et al. 2018.
    """
    num_classes = int(max(train_labels_B.max(), test_labels_B.max())) + 1
    mean_D = train_BD.mean(0)
    train_BD, test_BD = F.normalize(train_BD - mean_D, dim=1), F.normalize(test_BD - mean_D, dim=1)
    hits = 0
    for rows_BD, labels_B in zip(test_BD.split(1024), test_labels_B.split(1024), strict=True):
        cosine_BK, index_BK = (rows_BD @ train_BD.T).topk(min(k, len(train_BD)), dim=1)
        votes_BC = rows_BD.new_zeros(len(rows_BD), num_classes)
        votes_BC.scatter_add_(1, train_labels_B[index_BK], (cosine_BK / 0.07).exp())
        hits += int((votes_BC.argmax(1) == labels_B).sum())
    return hits / len(test_BD)


def majority_accuracy(train_labels_B: Tensor, test_labels_B: Tensor) -> float:
    """Accuracy of always answering the most frequent training label."""
    return float((test_labels_B == train_labels_B.bincount().argmax()).float().mean())
