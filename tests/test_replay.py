"""The replay executor: models that no trace can read, trained from rows as the model trains itself."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import cachefreeze as cf
from cachefreeze.errors import SplitError
from cachefreeze.splitting.replica import replicate
from cachefreeze.testing.traps import TRAPS, Branches, Masked, vectors


class Sentences(Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, 11, (24, 5), generator=generator)
        self.lengths = torch.randint(2, 6, (24,), generator=generator)

    def __len__(self):
        return 24

    def __getitem__(self, index):
        ids = self.ids[index]
        return {"ids": ids, "mask": torch.arange(5) < self.lengths[index], "labels": ids.flip(0)}


def losses_of(store, boundary, optimizer):
    torch.manual_seed(0)
    model, data = Masked(), Sentences()
    cf.freeze(model, train_from=boundary, example_inputs=next(iter(DataLoader(data, 4))))
    engine = cf.Engine(model, store=store)
    torch.manual_seed(3)
    loader = engine.loader(DataLoader(data, 4, shuffle=True))
    step = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    model.train()
    for _ in engine.epochs(3):
        for batch in loader:
            loss = engine(**engine.model_inputs(batch))["loss"]
            step.zero_grad()
            loss.backward()
            step.step()
            losses.append(loss.item())
    executor = None if engine.parts is None else engine.parts.executor
    engine.close()
    return losses, executor


@pytest.mark.parametrize("boundary", ["layers.1", "layers.2", "head"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_masks_labels_and_dropout_train_as_without_a_cache(tmp_path, boundary, optimizer):
    """Masks of other lengths in every batch, labels inside the model call, dropout on: bit for bit."""
    expected, _ = losses_of("off", boundary, optimizer)
    for store in ("host", f"hdf5:{tmp_path}", f"hdf5:{tmp_path}"):
        found, executor = losses_of(store, boundary, optimizer)
        assert executor == "replay"
        assert found == expected


def test_the_boundary_is_the_cheapest_cut():
    """The mask is kept as it was given, not as glue expands it, and hidden states once."""
    trap = TRAPS["masked_mid"]
    parts = cf.split(trap.make(), trap.inputs(), trap.train_from)
    assert parts.executor == "replay"
    assert parts.boundary.bytes_per_sample == 5 * 8 * 4 + 5 * 8 + 5 * 1


def test_the_suffix_calls_no_frozen_module():
    trap = TRAPS["masked_mid"]
    model = trap.make()
    parts = cf.split(model, trap.inputs(), trap.train_from)
    rows = parts.prefix(**trap.inputs())
    calls = []
    model.layers[0].linear1.register_forward_hook(lambda *_: calls.append("frozen"))
    model.layers[1].linear1.register_forward_hook(lambda *_: calls.append("trained"))
    parts.suffix(*rows)
    assert "frozen" not in calls


def test_control_flow_on_activations_is_refused():
    with pytest.raises(SplitError, match="reads a value of the batch into Python"):
        cf.split(Branches(), vectors(), "inner.head")


def test_a_replica_shares_parameters_and_leaves_the_model_alone():
    model = Masked()
    before = {name: list(vars(module)) for name, module in model.named_modules()}
    replica, copied = replicate(model, {"head": lambda _module, own: own})
    assert [id(p) for p in replica.parameters()] == [id(p) for p in model.parameters()]
    assert replica.layers is model.layers
    assert {type(made) for made, _ in copied} == {Masked, torch.nn.Linear}
    assert {name: list(vars(module)) for name, module in model.named_modules()} == before
