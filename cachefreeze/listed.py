"""Inputs that are lists with one entry a sample: the images and the targets of a detector.

The detector puts the images into one batch itself, in a module without weights. That batch is the first value of its
forward that has a row a sample; the lists have none, so they are given with every batch of rows. Of the images only
sizes are left by then: they are on torch's meta device, where nothing can be read and nothing costs anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cachefreeze.errors import UsageError
from cachefreeze.tracing import LISTS_OF_IMAGES, Example


@dataclass(frozen=True)
class SampleLists(Example):
    """A detector's inputs: the first is the list of images, each other one a list as long, or None."""

    @property
    def images(self) -> Sequence[Tensor]:
        """One image a sample."""
        images: Sequence[Tensor] = next(iter((*self.args, *self.kwargs.values())))
        return images

    @property
    def batch(self) -> int:
        """Samples in the batch: the entries of a list."""
        return len(self.images)

    @property
    def beside(self) -> tuple[Example, ...]:
        """The same lists with the sizes of the images alone: the pixels are in the rows."""
        return (self.with_images([torch.empty(i.shape, dtype=i.dtype, device="meta") for i in self.images]),)

    def with_images(self, images: Sequence[Tensor]) -> SampleLists:
        """The same lists with other images."""
        values = [images, *(*self.args, *self.kwargs.values())[1:]]
        count = len(self.args)
        return SampleLists(tuple(values[:count]), dict(zip(self.kwargs, values[count:], strict=True)))

    def take(self, indices: list[int]) -> SampleLists:
        """The entries ``indices`` of every list."""

        def pick(entries: Any) -> Any:
            return None if entries is None else [entries[i] for i in indices]

        return SampleLists(tuple(map(pick, self.args)), {key: pick(value) for key, value in self.kwargs.items()})

    def first_two(self) -> list[tuple[Tensor, Tensor]]:
        """The first two images: boxes may well be equal."""
        return [(self.images[0], self.images[1])]

    def map(self, change: Callable[[Tensor], Tensor]) -> Example:
        """``change`` applied to every tensor that has values."""
        return super().map(lambda tensor: tensor if tensor.is_meta else change(tensor))


def batching_module(model: nn.Module) -> str | None:
    """Name of the module that makes one batch of a list of images; None where there is none."""
    return next((name for name, module in model.named_modules() if type(module).__name__ == LISTS_OF_IMAGES), None)


def example_of(model: nn.Module, inputs: Any) -> Example:
    """What the user gave as the inputs of ``model``.

    Raises:
        UsageError: The model takes lists with one entry a sample and these are none, or the other way round.
    """
    example = Example.of(inputs)
    batching = batching_module(model)
    if isinstance(example, SampleLists) and batching is None:
        raise UsageError(
            f"the inputs of {type(model).__name__} are lists with one entry a sample, and nothing in it is known to "
            f"make one batch of them (torchvision's {LISTS_OF_IMAGES}); stack or pad them in the collate function"
        )
    if isinstance(example, SampleLists) or batching is None:
        return example
    values = [value for value in (*example.args, *example.kwargs.values()) if value is not None]
    lists = [value for value in values if isinstance(value, list | tuple)]
    if not values or len(lists) < len(values) or len({len(value) for value in lists}) > 1:
        raise UsageError(
            f"the inputs of {type(model).__name__} are {', '.join(type(v).__name__ for v in values) or 'empty'}: "
            "expected lists of equal length with one entry a sample, (images, targets), the images first"
        )
    return SampleLists(example.args, example.kwargs)
