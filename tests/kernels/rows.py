"""Rows of choices for the tests of dispatch and combine, placed one by one in Python."""

from __future__ import annotations

import torch
from torch import Tensor

SHAPES = [  # tokens, experts, choices, width
    (0, 3, 2, 8),
    (1, 1, 1, 1),
    (1, 4, 2, 5),
    (17, 5, 2, 24),
    (33, 64, 4, 33),
    (130, 8, 2, 40),
    (9, 3, 1, 770),
]


def placed(
    num_tokens: int,
    num_experts: int,
    num_choices: int,
    *,
    skew: bool = False,
    drop: float = 0.0,
    align: int = 1,
) -> tuple[Tensor, Tensor, int]:
    """row_token_N, token_row_TK, and the end of the last expert's rows; `skew`: all choices are expert 0."""
    generator = torch.Generator().manual_seed(num_tokens + 7 * num_choices)
    rows: list[list[tuple[int, int]]] = [[] for _ in range(num_experts)]
    dropped = []
    for k in range(num_choices):
        for t in range(num_tokens):
            expert = int(torch.randint(num_experts, (), generator=generator)) * (not skew)
            if float(torch.rand((), generator=generator)) < drop:
                dropped.append(t)
            else:
                rows[expert].append((t, k))
    row_token, token_row = [], [[-1] * num_choices for _ in range(num_tokens)]
    for mine in rows:
        for t, k in mine:
            token_row[t][k] = len(row_token)
            row_token.append(t)
        row_token += [-1] * (-len(mine) % align)
    end = len(row_token)
    # The number of rows is known beforehand: all choices, and the most padding there can be.
    row_token += dropped
    row_token += [0] * (num_tokens * num_choices + num_experts * (align - 1) - len(row_token))
    return (
        torch.tensor(row_token, dtype=torch.int64),
        torch.tensor(token_row, dtype=torch.int64).view(num_tokens, num_choices),
        end,
    )


def poisoned(rows_ND: Tensor, row_token_N: Tensor, token_row_TK: Tensor) -> Tensor:
    """With NaN in every row that nobody owns."""
    owned = torch.zeros(rows_ND.shape[0], dtype=torch.bool, device=rows_ND.device)
    owned[token_row_TK[token_row_TK >= 0]] = True
    owned |= row_token_N < 0
    return rows_ND.masked_fill(~owned[:, None], float("nan"))
