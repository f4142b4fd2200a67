"""Which value of a recording every tensor of a forward is, by identity and memory; none of them is held."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from cachefreeze.splitting.memory import Memory, Region, address_of
from cachefreeze.splitting.values import Place, Value


@dataclass
class Known:
    """A tensor of the forward, and which value it is now.

    Attributes:
        tensor: The tensor, while it lives.
        number: Of the value.
        region: Its memory, which others may share.
    """

    tensor: TensorWeakRef
    number: int = -1
    region: Region | None = None

    def address(self, tensor: Tensor | None) -> int:
        """Where its memory begins, which may outlive the tensor; 0 where there is none, or none any more."""
        if tensor is not None:
            return address_of(tensor)
        return self.region.address if self.region is not None and self.region.lives else 0


class Tensors:
    """The tensors of a forward.

    Attributes:
        arguments: Numbers of the values that enter a boundary.
    """

    def __init__(self, values: list[Value], memory: Memory) -> None:
        self.arguments: set[int] = set()
        self._values = values
        self._memory = memory
        self._of: MutableMapping[Tensor, Known] = WeakIdKeyDictionary()
        self._all: list[Known] = []

    def known(self, tensor: Tensor) -> Known | None:
        """What is known of a tensor."""
        return self._of.get(tensor)

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._of

    def add(
        self,
        tensor: Tensor,
        inputs: frozenset[int],
        made: int,
        place: Place | None = None,
        *,
        opaque: bool = False,
        random: bool = False,
    ) -> int:
        """From now on a tensor is a value of its own; the number of the value."""
        number = self._append(Value(*_about(tensor), inputs, made, place, opaque, random))
        known = self._of.get(tensor)
        if known is None:
            known = self._of[tensor] = Known(TensorWeakRef(tensor))
            self._all.append(known)
        known.number, known.region = number, self._memory.note(tensor, frozenset({number}))
        return number

    def describe(self, tensor: Tensor, made: int, place: Place) -> int:
        """The number of a value that is none to what is made of its tensor: it depends on no input."""
        return self._append(Value(*_about(tensor), frozenset(), made, place))

    def write(
        self, written: list[Tensor], inputs: frozenset[int], tick: Callable[[], int], *, random: bool = False
    ) -> None:
        """A write reaches every tensor in the same memory: each is another value afterwards.

        Args:
            written: Tensors that an operation wrote into.
            inputs: Values that went into it.
            tick: The recording's clock.
            random: Whether a random draw did.
        """
        if not inputs and not random:
            return
        reached = {address: leaf for leaf in written if (address := address_of(leaf))}
        placed = [(known, tensor, known.address(tensor)) for known in self._all for tensor in [known.tensor()]]
        self._all = [known for known, tensor, address in placed if tensor is not None or address]
        for known, tensor, address in placed:
            if address not in reached:
                continue
            value, made_of = self._values[known.number], inputs | {known.number}
            value.written = True
            if known.number in self.arguments:
                value.place = None  # what the boundary writes into is seen outside it too
            if tensor is not None:
                self.add(tensor, made_of, tick(), random=random)
            else:  # numbered all the same: when a tensor dies is no part of a forward
                about = value.shape, value.dtype, value.strides
                known.number = self._append(Value(*about, made_of, tick(), random=random))
                self._memory.note(reached[address], frozenset({known.number}))
        for leaf in written:
            if leaf not in self._of:
                self.add(leaf, inputs, tick(), random=random)

    def _append(self, value: Value) -> int:
        value.random = value.random or any(self._values[n].random for n in value.inputs)
        self._values.append(value)
        return len(self._values) - 1


def _about(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype, tuple[int, ...] | None]:
    return tuple(tensor.shape), tensor.dtype, _strides(tensor)


def _strides(tensor: Tensor) -> tuple[int, ...] | None:
    try:
        return tuple(tensor.stride())
    except (RuntimeError, NotImplementedError):  # sparse tensors have none
        return None
