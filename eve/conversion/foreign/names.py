"""A reader over an official state: hands out tensors by name and remembers which were asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from eve.errors import UserError

# Names that an error lists.
SHOWN = 5


class Names:
    """`ignore`: patterns (fnmatch) of names that are left out of the state, and that it may lack."""

    def __init__(self, state: Mapping[str, Tensor], where: str, ignore: Sequence[str] = ()) -> None:
        self.where = where
        self._ignore = tuple(ignore)
        self._state = {name: tensor for name, tensor in state.items() if not self._ignored(name)}
        self._used: set[str] = set()
        self._missing: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._state

    def any(self, prefix: str) -> bool:
        """Whether a name begins so."""
        return any(name.startswith(prefix) for name in self._state)

    def count(self, prefix: str) -> int:
        """Of `prefix0.`, `prefix1.`, ...: how many there are. Raises UserError where one is left out."""
        match = re.compile(re.escape(prefix) + r"(\d+)\.").match
        numbers = {int(found[1]) for name in self._state if (found := match(name))}
        if numbers != set(range(len(numbers))):
            missing = min(set(range(len(numbers))) - numbers)
            raise UserError(f"{self.where} has no {prefix}{missing}, but {prefix}{max(numbers)}")
        return len(numbers)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises UserError where the name is missing."""
        if name not in self._state:
            raise UserError(f"{self.where} has no {name}")
        return tuple(self._state[name].shape)

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name and shape, floats in fp32.

        One that is missing is all NaN, until `check` raises; if it is ignored, what is made of it comes from
        the seed (formats.fill). Raises UserError where it is of another shape or not finite.
        """
        self._used.add(name)
        if name not in self._state:
            if not self._ignored(name):
                self._missing.append(name)
            return torch.full(shape, torch.nan)
        tensor = self._state[name]
        if tuple(tensor.shape) != shape:
            raise UserError(f"{self.where}: {name} is {tuple(tensor.shape)}, expected {shape}")
        if not tensor.is_floating_point():
            return tensor
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{self.where}: {name} has values that are not finite")
        return tensor.to(torch.float32)

    def layer(self, source: str, target: str, *shape: int) -> dict[str, Tensor]:
        """`target`.weight and `target`.bias of a layer whose weight has that shape."""
        return {
            f"{target}.weight": self.take(f"{source}.weight", *shape),
            f"{target}.bias": self.take(f"{source}.bias", shape[0]),
        }

    def skip(self, *patterns: str) -> None:
        """Names that a format is known to hold and that say nothing."""
        self._used |= {name for name in self._state if _matches(name, patterns)}

    def check(self) -> None:
        """Raises UserError for names that were asked for and are missing, or that none asked for."""
        if self._missing:
            raise UserError(f"{self.where} has no {_listed(self._missing)}; do without by --ignore PATTERN")
        unknown = [name for name in self._state if name not in self._used]
        if unknown:
            names = "name" if len(unknown) == 1 else "names"
            raise UserError(
                f"{self.where} has the unknown {names} {_listed(unknown)}; leave out with --ignore PATTERN"
            )

    def _ignored(self, name: str) -> bool:
        return _matches(name, self._ignore)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(sorted(names)[:SHOWN]) + more
