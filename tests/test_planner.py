"""The planner: what is kept, what runs again, and what the example does not show."""

import copy

import networkx as nx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import cachefreeze as cf
from cachefreeze import splitting
from cachefreeze.errors import SplitError
from cachefreeze.inference import Form, InferenceCopy
from cachefreeze.splitting import ReplayExecutor
from cachefreeze.testing.traps import Skip, vectors
from cachefreeze.tracing import Example


@pytest.fixture
def replay(monkeypatch):
    monkeypatch.setattr(splitting, "_EXECUTORS", (ReplayExecutor(),))


def train(parts, rows, seed):
    parts.model.zero_grad()
    torch.manual_seed(seed)
    parts.suffix(*[row.clone() for row in rows]).sum().backward()
    return [None if p.grad is None else p.grad.clone() for p in parts.model.parameters()]


class SkipsItsMask(nn.Module):
    """As language models do: a batch without padding leaves its mask out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        kept = None if mask.all() else mask.float()[:, :, None]
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
            x = x if kept is None else x * kept
        return x


@pytest.mark.parametrize("lengths", [[5, 5, 5], [5, 5, 3], [4, 2, 5]])
def test_a_mask_is_kept_though_the_example_has_no_padding(lengths):
    ids = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0))
    model = SkipsItsMask().eval()
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    parts = cf.split(model, (ids, mask), "layers.1")
    for other in ([5, 5, 5], [5, 1, 5], [2, 3, 4]):
        given = torch.arange(5) < torch.tensor(other)[:, None]
        assert torch.equal(parts.suffix(*parts.prefix(ids, given)), model(ids, given))


class RandomGlue(nn.Module):
    """A dropout without a module, in a parent that is half frozen, and a frozen layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.dropout(self.stem(x), 0.5, self.training)
        return self.head(self.second(x))


def test_what_follows_a_random_value_runs_at_every_step():
    """The frozen layer behind the dropout is no part of the cache, and the cached fraction says so."""
    torch.manual_seed(0)
    model = RandomGlue()
    cf.freeze(model, "head")
    whole = copy.deepcopy(model)
    parts = cf.split(model, vectors())
    assert parts.executor == "replay"
    assert 0 < parts.cached_fraction < 0.6
    model.train()
    whole.train()
    rows = parts.prefix(vectors())
    draws = []
    for seed in range(3):
        torch.manual_seed(seed)
        expected = whole(vectors())
        torch.manual_seed(seed)
        got = parts.suffix(rows.clone())
        assert torch.equal(got, expected)
        draws.append(got)
    assert not torch.equal(draws[0], draws[1])


class Counts(nn.Module):
    """State in attributes and lists, read and written by the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)
        self.seen = 0
        self.scale = 1.0
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        self.seen += 1
        self.losses.append(y.detach().mean())
        return self.head(y) * self.scale * (1 + (self.seen > 2))


@pytest.mark.usefixtures("replay")
def test_attributes_are_the_models_own_in_both_directions():
    model = Counts().eval()
    parts = cf.split(model, vectors(), "head")
    assert (model.seen, model.losses) == (0, [])
    row = parts.prefix(vectors())
    first = parts.suffix(row)
    assert model.seen == 1
    assert len(model.losses) == 1
    model.scale = 3.0
    assert torch.allclose(parts.suffix(row), 3 * first)
    assert torch.allclose(parts.suffix(row), 6 * first)
    assert (model.seen, len(model.losses)) == (3, 3)


class Two(nn.Module):
    """A segment that is checkpointed: one frozen layer and one that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.mid = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def both(self, x: Tensor) -> Tensor:
        return torch.tanh(self.mid(torch.sin(self.stem(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.head(torch.utils.checkpoint.checkpoint(self.both, x, use_reentrant=False))
        return self.head(self.both(x))


@pytest.mark.usefixtures("replay")
def test_a_checkpoint_over_frozen_and_trained_layers_is_repeated_with_its_own_rows():
    model = Two()
    cf.freeze(model, "mid", example_inputs=vectors())
    parts = cf.split(model, vectors())
    model.train()
    one, other = parts.prefix(vectors()), parts.prefix(vectors() + 1)
    alone = train(parts, [one], 0)
    train(parts, [other], 0)
    for a, b in zip(train(parts, [one], 0), alone, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    # the rows of the first forward are not those that the second one left behind
    model.zero_grad()
    first, _second = parts.suffix(one.clone()), parts.suffix(other.clone())
    first.sum().backward()
    for p, b in zip(model.parameters(), alone, strict=True):
        assert (p.grad is None and b is None) or torch.equal(p.grad, b)


@pytest.mark.usefixtures("replay")
def test_a_repeated_layer_that_cannot_be_told_from_another_is_an_error():
    model = Two()
    cf.freeze(model, "mid", example_inputs=vectors())
    parts = cf.split(model, vectors())
    model.train()
    outputs = [parts.suffix(parts.prefix(vectors() + i)) for i in range(2)]
    with pytest.raises(SplitError, match=r"call backward\(\) after every forward"):
        sum(out.sum() for out in outputs).backward()


def test_frozen_parameters_behind_trainable_ones_are_reported():
    model = Skip().eval()
    cf.freeze(model, "second")
    model.third.requires_grad_(False)
    parts = cf.split(model, vectors())
    assert parts.frozen_after == ("third.weight", "third.bias")
    assert "2 frozen parameters lie after trainable ones: 'third.weight'" in repr(parts)


def test_a_cut_is_sought_among_what_is_needed_behind_it_alone(monkeypatch):
    """Or the cost of listing blocks would grow with the square of a model's depth."""
    sizes = []

    def seen(graph, *ends):
        sizes.append(graph.number_of_nodes())
        return nx.algorithms.flow.minimum_cut(graph, *ends)

    monkeypatch.setattr(nx, "minimum_cut", seen)
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(20)]).eval()
    assert [block.bytes_per_sample for block in cf.blocks(model, vectors())] == [24] * 20
    assert max(sizes) == min(sizes)


def test_bytes_of_the_blocks_are_those_of_the_splits():
    model = Skip().eval()
    for block in cf.blocks(model, vectors())[1:]:
        assert cf.split(model, vectors(), block.name).boundary.bytes_per_sample == block.bytes_per_sample


class AsksForShapes(nn.Module):
    """Glue that takes the shape and the type of what is frozen, as it makes masks of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 64)
        self.down = nn.Linear(64, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        embedded = self.embed(ids)
        segments = torch.zeros_like(embedded, dtype=torch.int)[..., 0]
        segments[:, 0] = ids[:, 0]
        kept = mask.type_as(embedded) * embedded.new_ones(ids.shape[1])
        x = self.head(self.down(embedded)) * kept[:, :, None]
        return x + (segments > 3)[:, :, None] * torch.empty_like(embedded).fill_(2.0)[..., :1].expand_as(x)


def test_what_glue_asks_for_its_shape_alone_is_not_kept(replay):
    ids = torch.arange(12).reshape(3, 4) % 11
    model, mask = AsksForShapes().eval(), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    parts = cf.split(model, (ids, mask), "head")
    assert parts.boundary.bytes_per_sample == 4 * 6 * 4 + 2 * 4 * 8
    for count in (1, 2, 5):
        others = (torch.arange(count * 4).reshape(count, 4) * 3 % 11, torch.ones(count, 4, dtype=torch.int64))
        assert torch.equal(parts.suffix(*parts.prefix(*others)), model(*others))


class Attends(nn.Module):
    """What is called with one tensor as query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.v(value) * torch.sigmoid(self.q(query) * self.k(key))


class AttendsTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attends() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat((x, x.flip(-1)), dim=-1).reshape(*x.shape[:-1], 2, 6).mean(dim=-2)
            x = layer(x, x, x)
        return x


def test_a_tensor_that_enters_the_boundary_more_than_once_is_kept_once(replay):
    model = AttendsTwice().eval()
    parts = cf.split(model, vectors(), "layers.1")
    assert parts.boundary.bytes_per_sample == 24
    assert torch.equal(parts.suffix(parts.prefix(vectors())), model(vectors()))


class Converts(nn.Module):
    """A frozen layer that is given a table, and casts it to the type that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) + table.type(x.dtype))


class Remembers(nn.Module):
    """As XLNet does: one table for all layers, and in eval mode their inputs are returned as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Converts() for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        table, memories = torch.linspace(0, 1, 6), []
        for layer in self.layers:
            memories.append(x if self.training else x.detach())
            x = layer(x, table)
        return (x,) if self.training else (x, *memories)


def test_a_table_that_a_frozen_layer_hands_back_is_not_made_there(replay):
    model = Remembers().train()
    cf.freeze(model, train_from="layers.2", example_inputs=vectors())
    parts = cf.split(model, vectors())
    assert {name for name, _ in parts.suffix.plan.closed} == {"layers.0", "layers.1"}


def test_of_two_modes_neither_decides_alone_what_is_kept(replay):
    """The input of the boundary would do in train mode, and be kept beside what eval mode needs."""
    model = Remembers().train()
    cf.freeze(model, train_from="layers.2", example_inputs=vectors())
    parts = cf.split(model, vectors())
    assert parts.boundary.bytes_per_sample == 3 * 24
    model.eval()
    for got, wanted in zip(parts.suffix(*parts.prefix(vectors())), model(vectors()), strict=True):
        assert torch.equal(got, wanted)


class Biased(nn.Module):
    """As WavLM's layers: the first one makes a table of positions for all, once per sample and head."""

    def __init__(self, *, makes: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.table = nn.Embedding(7, 2) if makes else None

    def forward(self, x: Tensor, bias: Tensor | None, keep: Tensor) -> tuple[Tensor, Tensor]:
        count, length, _ = x.shape
        if self.table is not None:
            far = torch.arange(length)[:, None] - torch.arange(length) + 3
            bias = self.table(far).permute(2, 0, 1).repeat(count, 1, 1)
            bias = bias if keep.all() else bias * 0.5
        scores = torch.einsum("bhk,bshk->bsh", x.mean(1).reshape(count, 2, 3), x.reshape(count, length, 2, 3))
        weights = bias.reshape(count, 2, length, length).softmax(-1)
        return x + torch.tanh(self.linear(x)) * torch.einsum("bhst,bth->bs", weights, scores)[..., None], bias


class TableOfPositions(nn.Module):
    def __init__(self, *, asks: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Biased(makes=i == 0) for i in range(4))
        self.asks = asks

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        bias, keep = None, keep if self.asks else torch.ones(1, dtype=torch.bool)
        for layer in self.layers:
            x, bias = layer(x, bias, keep)
        return x + bias.mul_(2).sum(dim=(1, 2)).reshape(x.shape[0], 2).mean(dim=1)[:, None, None]


def sequences(count=3):
    return torch.randn(count, 4, 6, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("boundary", ["layers.1", "layers.3"])
def test_a_table_that_is_the_same_for_every_sample_is_in_no_row(replay, boundary):
    model = TableOfPositions().eval()
    parts = cf.split(model, sequences(), boundary)
    assert parts.boundary.bytes_per_sample == 4 * 6 * 4
    assert {b.name: b.bytes_per_sample for b in cf.blocks(model, sequences())}[boundary] == 4 * 6 * 4
    for count in (1, 2, 5):
        rows, wanted = parts.prefix(sequences(count)), model(sequences(count))
        for _ in range(2):  # the first one writes into what it is given
            assert torch.equal(parts.suffix(rows.clone()), wanted)


def test_a_suffix_with_a_shared_table_is_compiled_whole(replay):
    model = TableOfPositions().eval()
    parts = cf.split(model, sequences(), "layers.1")
    compiled = torch.compile(parts.suffix, fullgraph=True, backend="eager")
    for count in (2, 5):
        rows, wanted = parts.prefix(sequences(count)), model(sequences(count))
        assert torch.equal(compiled(rows.clone()), wanted)


def test_a_shared_table_is_of_the_weights_that_made_the_rows(replay):
    model = TableOfPositions().eval()
    parts, deeper = (cf.split(model, sequences(), name) for name in ("layers.1", "layers.3"))
    with torch.no_grad():
        model.layers[0].table.weight.add_(1).mul_(2)
    rows = parts.prefix(sequences())
    assert torch.equal(parts.suffix(rows.clone()), model(sequences()))
    assert torch.equal(parts.segment_to(deeper)(rows.clone()), deeper.prefix(sequences()))


def test_a_table_that_values_decide_on_is_in_the_rows(replay):
    """Nothing of the mask goes into the table, but another mask makes another table."""
    model, keep = TableOfPositions(asks=True).eval(), torch.ones(3, 4, dtype=torch.bool)
    parts = cf.split(model, (sequences(), keep), "layers.2")
    assert parts.boundary.bytes_per_sample > 4 * 6 * 4
    for given in (keep, keep & (torch.arange(4) < 2)):
        assert torch.equal(parts.suffix(*parts.prefix(sequences(), given)), model(sequences(), given))


def test_a_prefix_of_other_precision_leaves_the_shared_table_as_it_is(replay):
    model = TableOfPositions().eval()
    parts = cf.split(model, sequences(), "layers.2")
    rows = parts.prefix(sequences())
    InferenceCopy(parts, Form(dtype=torch.bfloat16), Example((sequences(),), {}))(sequences())
    assert torch.equal(parts.suffix(rows.clone()), model(sequences()))
