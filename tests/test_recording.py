"""A recording of a forward: it holds no tensor, and knows all the same which one is which."""

import gc
import random
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cachefreeze as cf
from cachefreeze import splitting
from cachefreeze.splitting import FxExecutor, ReplayExecutor
from cachefreeze.splitting.contents import Contents
from cachefreeze.splitting.memory import Memory
from cachefreeze.testing.traps import vectors


class Alive:
    """How many of the tensors that it sees are alive at once."""

    def __init__(self) -> None:
        self.refs: list[weakref.ref[Tensor]] = []
        self.most = 0

    def see(self, tensor: Tensor) -> Tensor:
        self.refs = [ref for ref in [*self.refs, weakref.ref(tensor)] if ref() is not None]
        self.most = max(self.most, len(self.refs))
        return tensor


ALIVE = Alive()


class Chain(nn.Module):
    """One tensor after the other."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.depth):
            x = ALIVE.see(torch.sin(x))
        return self.linear(x)


class Chains(nn.Module):
    """Many tensors inside layers and between them."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Chain(depth) for _ in range(depth))
        self.depth = depth
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = ALIVE.see(layer(x))
            for _ in range(self.depth):
                x = ALIVE.see(torch.cos(x).add_(1))
        return self.head(x)


def most_alive(function) -> int:
    ALIVE.__init__()
    gc.disable()  # what only the collector frees counts as held
    try:
        function()
    finally:
        gc.enable()
    return ALIVE.most


@pytest.mark.parametrize("executor", [FxExecutor(), ReplayExecutor()], ids=lambda executor: executor.name)
def test_as_many_tensors_live_as_in_a_forward_alone(monkeypatch, executor):
    """A long forward takes no more memory to be split, or its blocks listed, than to be run."""
    monkeypatch.setattr(splitting, "_EXECUTORS", (executor,))
    for depth in (3, 9):
        model = Chains(depth).eval()
        with torch.no_grad():
            alone = most_alive(lambda model=model: model(vectors()))
        assert most_alive(lambda model=model: cf.blocks(model, vectors())) == alone
        cf.freeze(model, "head", example_inputs=vectors())
        assert most_alive(lambda model=model: cf.split(model, vectors())) == alone


def test_freed_memory_is_forgotten_and_shared_memory_is_not():
    """The next tensor at an address holds nothing of the last one; a view, or an array's other tensor, does."""
    memory = Memory()
    numbers = frozenset({7})
    tensor = torch.zeros(1000)
    memory.note(tensor, numbers)
    view = tensor.detach()[3:]
    del tensor
    assert memory.of(view) == numbers
    again, noted, draws = 0, set(), random.Random(0)
    for _ in range(200):
        # how many are alive differs: an allocator that hands out its free chunks in turn would else never meet itself
        tensors = [torch.zeros(1000) for _ in range(draws.randrange(1, 8))]
        for tensor in tensors:
            memory.note(tensor, numbers)
            noted.add(tensor.data_ptr())
        del tensor, tensors
        others = [torch.zeros(1000) for _ in range(draws.randrange(1, 8))]
        again += any(other.data_ptr() in noted for other in others)
        assert not any(memory.of(other) for other in others)
        del others
    assert again
    array = np.zeros(1000, np.float32)
    memory.note(torch.from_numpy(array), numbers)
    assert memory.of(torch.from_numpy(array)) == numbers


def test_a_tensor_with_the_identity_of_a_dead_one_is_another():
    contents = Contents()
    for _ in range(50):
        ids = torch.arange(4)
        contents.take_input(ids, mask=False)
        assert contents.is_pure(ids)
        del ids
        assert not any(contents.is_pure(other) for other in [torch.arange(4) for _ in range(50)])


class WritesBehind(nn.Module):
    """What a layer returned is dead when its memory is written."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.mid = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x.detach()  # another tensor, in the same memory
        x.mul_(2)
        y = self.mid(x.clone())
        x.add_(y.sum(dim=1, keepdim=True))
        return self.head(x + y)


@pytest.mark.parametrize("boundary", ["mid", "head"])
def test_a_write_reaches_the_value_of_a_dead_tensor(monkeypatch, boundary):
    monkeypatch.setattr(splitting, "_EXECUTORS", (ReplayExecutor(),))
    model = WritesBehind().eval()
    parts = cf.split(model, vectors(), boundary)
    for _ in range(2):
        rows = parts.prefix(vectors() + 1)
        rows = rows if isinstance(rows, tuple) else (rows,)
        assert torch.equal(parts.suffix(*[row.clone() for row in rows]), model(vectors() + 1))


class Sizes(nn.Module):
    """Weights and a number, of the shape of its input alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> tuple[int, Tensor]:
        return x.shape[1], self.table * 2


class AsksForSizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sizes = Sizes()
        self.stem = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        width, table = self.sizes(x)
        return self.head(self.stem(x) / width + table)


def test_a_call_that_returns_a_number_and_weights_is_none_of_a_value(monkeypatch):
    monkeypatch.setattr(splitting, "_EXECUTORS", (ReplayExecutor(),))
    model = AsksForSizes().eval()
    parts = cf.split(model, vectors(), "head")
    assert parts.boundary.bytes_per_sample == 24
    assert torch.equal(parts.suffix(parts.prefix(vectors())), model(vectors()))


@pytest.mark.parametrize("executor", [FxExecutor(), ReplayExecutor()], ids=lambda executor: executor.name)
def test_a_split_keeps_no_activations(monkeypatch, executor):
    monkeypatch.setattr(splitting, "_EXECUTORS", (executor,))
    model = nn.Sequential(nn.Linear(6, 37), nn.Tanh(), nn.Linear(37, 5)).eval()
    parts = cf.split(model, vectors(), "2")
    gc.collect()
    held = [t for t in gc.get_objects() if type(t) is Tensor and t.shape[1:] == (37,) and not t.shape[0] > 4]
    assert parts.boundary.tensors[0].shape == (37,)
    assert not held
