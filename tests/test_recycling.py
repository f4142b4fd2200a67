"""Memory is given out again only when nobody can see it any more."""

from __future__ import annotations

import copy
import pickle
import sys
import threading

import numpy as np
import torch

from cachefreeze.stores import HostStore
from cachefreeze.stores.recycling import _BLOCKS, Recycler
from cachefreeze.testing.specs import one_field, values

SHAPE = (512, 1024)  # 2 MiB of float32


def made(recycler: Recycler) -> torch.Tensor:
    return recycler.empty(SHAPE, torch.float32)


def test_memory_is_used_again():
    """Once a batch is gone, the next lies where it lay, aligned as torch's own memory is."""
    recycler = Recycler()
    places = set()
    for _ in range(10):
        batch = made(recycler)
        assert batch.shape == SHAPE
        assert batch.dtype == torch.float32
        assert batch.data_ptr() % 64 == 0
        places.add(batch.data_ptr())
    assert len(places) <= 2  # the name still holds one while the next is made


def test_what_is_held_is_left_alone():
    """A batch, a view of it, an array over it, or a graph that saved it keep their values."""
    recycler = Recycler()
    weight = torch.ones(1024, requires_grad=True)
    kept = {
        "tensor": lambda batch: batch,
        "view": lambda batch: batch[3:, :5],
        "array": lambda batch: batch.numpy()[1],
        "graph": lambda batch: (batch * weight).sum(),
        "detached": lambda batch: batch.detach().t(),
        "memory": lambda batch: np.asarray(memoryview(batch.numpy())),
    }
    held = {name: hold(made(recycler).fill_(at)) for at, (name, hold) in enumerate(kept.items())}
    for _ in range(2 * _BLOCKS):
        made(recycler).fill_(-1)
    for at, (name, value) in enumerate(held.items()):
        if name == "graph":
            value.backward()
            assert bool((weight.grad == at * 512).all())
        else:
            assert bool((torch.as_tensor(value) == at).all()), name


def test_what_counts_of_references_say_does_not_matter(monkeypatch):
    """Python 3.14 counts one less for the same object than earlier ones."""
    count = sys.getrefcount
    monkeypatch.setattr(sys, "getrefcount", lambda value: count(value) - 2)  # one is its own
    recycler = Recycler()
    held = made(recycler).fill_(1)
    made(recycler).fill_(-1)
    assert bool((held == 1).all())


def test_sizes_do_not_mix():
    """A smaller batch fits into a larger block, a much smaller one does not keep it; a larger one gets its own."""
    recycler = Recycler()
    first = made(recycler).data_ptr()
    assert recycler.empty((300, 1024), torch.float32).data_ptr() == first
    assert recycler.empty((512, 1000), torch.float64).numel() == 512_000
    assert len(recycler._blocks) == 2


def test_at_most_a_few_blocks_are_kept():
    """Batches that a user keeps are theirs; the pool does not grow with them."""
    recycler = Recycler()
    batches = [made(recycler) for _ in range(9)]
    assert len({batch.data_ptr() for batch in batches}) == 9
    assert len(recycler._blocks) == _BLOCKS


def test_a_copy_begins_anew():
    """Neither a pickle nor a deep copy carries memory along."""
    recycler = Recycler()
    made(recycler)
    assert not pickle.loads(pickle.dumps(recycler))._blocks
    assert not copy.deepcopy(recycler)._blocks


def test_threads():
    """Batches that threads make at the same time are different memory."""
    recycler, wrong = Recycler(), []

    def work(number: int) -> None:
        for _ in range(300):
            batch = made(recycler)
            batch[0] = number
            batch[-1] = number
            if bool((batch[0] != number).any()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_host_store_batches_are_fresh():
    """Batches large enough to be recycled stay what they are while later ones are read and written into."""
    spec = one_field(shape=SHAPE, rows=4)
    store = HostStore(spec, pin=False)
    everything = torch.arange(4)
    store.write(everything, values(spec, everything))
    kept = store.read(everything[:1])
    for row in range(4):
        store.read(everything[row : row + 1])["activation.0"].zero_()
    assert torch.equal(kept["activation.0"], values(spec, everything[:1])["activation.0"])
    assert torch.equal(store.read(everything)["activation.0"], values(spec, everything)["activation.0"])


def test_another_thread_takes_the_last_block():
    """Between counting the blocks and looking at one, another thread may have it: then memory is new."""
    recycler = Recycler()
    made(recycler)

    class Taken(type(recycler._blocks)):
        def popleft(self):
            raise IndexError

    recycler._blocks = Taken(recycler._blocks)
    assert made(recycler).shape == SHAPE
