"""What users do to a model before and after it is split: copies, loads, moves, hooks, compilation, several splits.

Every promise is held by both executors.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter, OrderedDict, defaultdict, deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import cachefreeze as cf
from cachefreeze import splitting
from cachefreeze.errors import SplitError, StaleCacheError, UsageError
from cachefreeze.isolation import preserved_state
from cachefreeze.splitting import ReplayExecutor
from cachefreeze.splitting.fx_executor import FxExecutor
from cachefreeze.testing.exact import rows_of
from cachefreeze.testing.traps import sequences
from cachefreeze.tracing import Example

GLOBAL_RATE = 1.0


class Block(nn.Module):
    """A residual block with a norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer, self.drop = nn.LayerNorm(6), nn.Linear(6, 6), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(functional.gelu(self.layer(self.norm(x))))


class Stack(nn.Module):
    """Blocks in a loop, with a gain of the root behind the boundary and a batch norm in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.gain = nn.Parameter(torch.ones(6))
        self.scale, self.config = 1.0, SimpleNamespace(power=1)
        self.head = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head((x * self.gain).mean(1)) ** self.config.power * self.scale


@pytest.fixture(params=["fx", "replay"])
def executor(request, monkeypatch):
    monkeypatch.setattr(splitting, "_EXECUTORS", ({"fx": FxExecutor, "replay": ReplayExecutor}[request.param](),))
    return request.param


def made(train_from: str = "blocks.1") -> nn.Module:
    torch.manual_seed(0)
    model = Stack()
    cf.freeze(model, train_from, example_inputs=sequences())
    return model


def assert_follows(model: nn.Module, parts: cf.Parts, inputs: Any = None) -> None:
    """One seeded step each way: output, gradients and buffers, bit for bit."""
    inputs = sequences() if inputs is None else inputs
    rows = rows_of(parts, Example.of(inputs))
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    found = []
    for forward in (lambda: model(inputs), lambda: parts.suffix(*(row.clone() for row in rows))):
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        model.zero_grad()
        torch.manual_seed(1)
        output = forward()
        output.square().sum().backward()
        gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        found.append((output.detach(), gradients, {name: b.clone() for name, b in model.named_buffers()}))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


class TestBefore:
    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "state"])
    def test_a_copied_frozen_model_splits(self, executor, way):
        model = made()
        if way == "deepcopy":
            other = copy.deepcopy(model)
        elif way == "pickle":
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False)
        else:
            other = made()
            other.load_state_dict(model.state_dict())
        assert_follows(other.train(), cf.split(other, sequences()))

    def test_a_model_made_on_meta_and_materialised_splits(self, executor):
        with torch.device("meta"):
            model = Stack()
        model.to_empty(device="cpu")
        model.load_state_dict(made().state_dict())
        cf.freeze(model, "blocks.1", example_inputs=sequences())
        assert_follows(model.train(), cf.split(model, sequences()))

    def test_a_model_that_was_split_before_splits_deeper(self, executor):
        model = made()
        cf.split(model, sequences())
        cf.freeze(model, "head", example_inputs=sequences())
        assert_follows(model.train(), cf.split(model, sequences()))

    def test_a_model_with_gradients_and_a_stepped_optimizer_splits(self, executor):
        model = made().train()
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        model(sequences()).sum().backward()
        optimizer.step()
        kept = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        parts = cf.split(model, sequences())
        now = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        torch.testing.assert_close(now, kept, rtol=0, atol=0)
        assert_follows(model, parts)

    def test_inside_no_grad_and_inference_mode(self, executor):
        model = made()
        with torch.no_grad():
            parts = cf.split(model, sequences())
        assert_follows(model.train(), parts)


class TestAfter:
    @pytest.fixture
    def split(self, executor):
        model = made()
        return model.train(), cf.split(model, sequences())

    def _halved(self, model: nn.Module) -> dict[str, Tensor]:
        """Another state of what trains."""
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        return {name: value * 0.5 if name in trained else value.clone() for name, value in model.state_dict().items()}

    def test_a_state_dict_is_loaded(self, split):
        model, parts = split
        model.load_state_dict(self._halved(model))
        parts.follow()
        assert_follows(model, parts)

    def test_a_state_dict_that_is_assigned_is_followed_or_noticed(self, split):
        """``assign=True`` puts other Parameter objects into the modules: replay reads them, fx holds the root's."""
        model, parts = split
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        model.load_state_dict(self._halved(model), assign=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        if parts.executor == "fx":
            with pytest.raises(StaleCacheError, match=r"'gain' of Stack was replaced"):
                parts.follow()
        else:
            parts.follow()
            assert_follows(model, parts)

    def test_weights_are_written_through_data(self, split):
        model, parts = split
        for parameter in model.head.parameters():
            parameter.data = parameter.data * 2
        model.gain.data.mul_(3)
        assert_follows(model, parts)

    def test_the_suffix_is_cast_to_another_dtype(self, executor):
        model = made().double().train()
        parts = cf.split(model, sequences().double())
        assert_follows(model, parts, sequences().double())

    def test_hooks_registered_later_run(self, split):
        model, parts = split
        model.blocks[2].register_forward_hook(lambda _m, _a, out: out * 2)
        model.head[0].register_forward_pre_hook(lambda _m, args: (args[0] + 1,))
        model.blocks[1].layer.weight.register_hook(lambda grad: grad * 3)
        assert_follows(model, parts)

    def test_a_global_hook_runs(self, split):
        model, parts = split
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, _a, out: out * 1.5 if module is model.blocks[2] else None
        )
        try:
            assert_follows(model, parts)
        finally:
            handle.remove()

    def test_more_is_frozen_later(self, split):
        """A layer behind the boundary that is frozen by hand later gets no gradient."""
        model, parts = split
        model.blocks[1].requires_grad_(False)
        assert_follows(model, parts)

    def test_a_dropout_rate_is_changed_later(self, split):
        model, parts = split
        model.blocks[2].drop.p = 0.7
        model.head[1].momentum = 0.5
        parts.follow()
        assert_follows(model, parts)

    def test_an_attribute_of_an_enclosing_module_is_changed_later(self, split):
        """Between passes: the root's forward reads plain attributes and a config object behind the boundary."""
        model, parts = split
        model.scale, model.config.power = 0.5, 2
        parts.follow()
        assert_follows(model, parts)

    def test_a_global_and_an_attribute_of_the_class_are_followed(self, executor, monkeypatch):
        """Between passes."""

        class Annealed(Stack):
            rate = 1.0

            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * self.rate * GLOBAL_RATE

        torch.manual_seed(0)
        model = Annealed().train()
        cf.freeze(model, "blocks.1", example_inputs=sequences())
        parts = cf.split(model, sequences())
        for change in (
            lambda: setattr(Annealed, "rate", 2.0),
            lambda: monkeypatch.setitem(globals(), "GLOBAL_RATE", 3.0),
        ):
            change()
            parts.follow()
            assert_follows(model, parts)

    def test_a_number_read_from_a_buffer_is_followed(self, executor):
        """At every step: a trace would keep the first one."""

        class Annealed(Stack):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("power", torch.ones(()))

            def forward(self, x: Tensor) -> Tensor:
                out = super().forward(x)
                return out**2 / self.power.item() if self.power > 1.5 else out

        torch.manual_seed(0)
        model = Annealed().train()
        cf.freeze(model, "blocks.1", example_inputs=sequences())
        if executor == "fx":
            with pytest.raises(SplitError, match="'power' while it is traced"):
                cf.split(model, sequences())
            return
        parts = cf.split(model, sequences())
        for power in (2.0, 3.0):
            model.power.fill_(power)
            parts.follow()
            assert_follows(model, parts)

    def test_a_replaced_module_is_noticed(self, split):
        model, parts = split
        model.head = nn.Linear(6, 2)
        with pytest.raises(StaleCacheError, match=r"'head'.*was replaced"):
            parts.follow()

    def test_two_splits_of_one_model_live_side_by_side(self, split):
        model, parts = split
        deeper = cf.split(model, sequences(), "head")
        assert_follows(model, parts)
        rows = rows_of(deeper, Example.of(sequences()))
        model.eval()
        torch.testing.assert_close(deeper.suffix(*rows), model(sequences()), rtol=0, atol=0)
        model.train()
        assert_follows(model, parts)

    def test_several_forwards_before_one_backward(self, split):
        """Gradient accumulation and Siamese losses: graphs of earlier calls stay whole."""
        model, parts = split
        model.eval()
        inputs = [sequences(), sequences() * 0.5, sequences()[:3]]
        found = []
        for forward in (model, lambda x: parts.suffix(*rows_of(parts, Example.of(x)))):
            model.zero_grad()
            outputs = [forward(x) for x in inputs]
            (outputs[0].sum() * outputs[1].sum() + outputs[2].square().sum()).backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)

    def test_second_derivatives(self, split):
        model, parts = split
        model.eval()
        rows = rows_of(parts, Example.of(sequences()))
        found = []
        for forward in (lambda: model(sequences()), lambda: parts.suffix(*(r.clone() for r in rows))):
            (first,) = torch.autograd.grad(forward().square().sum(), model.gain, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), list(model.head[0].parameters())))
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)

    def test_it_recovers_from_an_error_inside_the_suffix(self, split):
        """Rows of another shape fail; the next batch is as if nothing had been."""
        model, parts = split
        with pytest.raises(RuntimeError):
            parts.suffix(torch.randn(4, 5, 7))
        assert_follows(model, parts)

    def test_an_interrupted_forward_leaves_nothing_behind(self, split):
        model, parts = split

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        handle = model.head.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            parts.suffix(*rows_of(parts, Example.of(sequences())))
        handle.remove()
        assert_follows(model, parts)

    @pytest.mark.parametrize("count", [1, 2, 7])
    def test_any_batch_size(self, split, count):
        model, parts = split
        model.eval()
        some = torch.randn(count, 5, 6)
        torch.testing.assert_close(parts.suffix(*rows_of(parts, Example.of(some))), model(some), rtol=0, atol=0)

    def test_rows_are_no_part_of_a_later_call(self, split):
        """What a call was given is not kept by the suffix."""
        import gc
        import weakref

        model, parts = split
        rows = rows_of(parts, Example.of(sequences()))
        seen = [weakref.ref(row) for row in rows]
        with torch.no_grad():
            parts.suffix(*rows)
        del rows
        gc.collect()
        assert [ref() for ref in seen] == [None] * len(seen)
        assert model.training

    def test_under_autocast(self, split):
        model, parts = split
        model.eval()
        with torch.no_grad():
            rows = rows_of(parts, Example.of(sequences()))
            with torch.autocast("cpu", torch.bfloat16):
                got = parts.suffix(*(row.clone() for row in rows))
            hidden = rows[0]
            with torch.autocast("cpu", torch.bfloat16):
                for block in model.blocks[1:]:
                    hidden = block(hidden)
                expected = model.head((hidden * model.gain).mean(1))
        torch.testing.assert_close(got, expected, rtol=0, atol=0)

    def test_in_inference_mode(self, split):
        model, parts = split
        model.eval()
        with torch.inference_mode():
            got = parts.suffix(*rows_of(parts, Example.of(sequences())))
        torch.testing.assert_close(got, model(sequences()), rtol=0, atol=0)

    def test_inside_a_checkpoint(self, split):
        """The whole suffix under activation checkpointing."""
        model, parts = split
        model.eval()
        rows = rows_of(parts, Example.of(sequences()))
        found = []
        for forward in (lambda: parts.suffix(*rows), lambda: checkpoint(parts.suffix, *rows, use_reentrant=False)):
            model.zero_grad()
            forward().square().sum().backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)

    def test_compiled_in_one_graph(self, split):
        """``torch.compile(fullgraph=True)`` of the suffix, forward and backward, at two batch sizes."""
        model, parts = split
        model.eval()
        torch._dynamo.reset()
        compiled = torch.compile(parts.suffix, fullgraph=True, backend="aot_eager")
        for some in (sequences(), sequences()[:3]):
            rows = rows_of(parts, Example.of(some))
            found = []
            for forward in (parts.suffix, compiled):
                model.zero_grad()
                output = forward(*(row.clone() for row in rows))
                output.square().sum().backward()
                found.append((output.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
            torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)

    def test_a_compiled_suffix_follows_plain_attributes(self, split):
        """A scale that is annealed from step to step reaches a compiled suffix as it reaches the model."""
        model, parts = split
        model.eval()
        torch._dynamo.reset()
        compiled = torch.compile(parts.suffix, fullgraph=True, backend="eager")
        rows = rows_of(parts, Example.of(sequences()))
        for scale in (1.0, 0.5, 0.25):
            model.scale = scale
            parts.follow()
            with torch.no_grad():
                torch.testing.assert_close(compiled(*rows), model(sequences()), rtol=1e-6, atol=1e-6)
        assert model.scale == 0.25

    @pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
    def test_parts_belong_to_their_model(self, split, way):
        """A copy would run the modules of the model that was split, so it is refused with what to do."""
        _, parts = split
        for part in (parts, parts.suffix):  # a traced prefix is a graph of its own
            with pytest.raises(UsageError, match="Copy the model, and split the copy"):
                way(part)

    def test_the_model_itself_is_untouched(self, executor):
        """Splitting and running the suffix change nothing of the model that a forward would not."""
        model, other = made().train(), made().train()
        parts = cf.split(model, sequences())
        parts.suffix(*rows_of(parts, Example.of(sequences())))
        other(sequences())
        assert [sorted(vars(m)) for m in model.modules()] == [sorted(vars(m)) for m in other.modules()]
        assert [type(m) for m in model.modules()] == [type(m) for m in other.modules()]
        assert model.state_dict().keys() == other.state_dict().keys()
        copy.deepcopy(model)


class Looked(nn.Module):
    """Words that the forward itself puts back to length, a generator of its own, and a meter."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mid, self.head = nn.Embedding(11, 6, max_norm=0.5), nn.Linear(6, 6), nn.Linear(6, 2)
        self.own, self.meter = torch.Generator().manual_seed(3), SimpleNamespace(calls=0)

    def forward(self, ids: Tensor) -> Tensor:
        z = self.mid(self.words(ids))
        self.meter.calls += 1
        return self.head(z + torch.rand(6, generator=self.own))


@pytest.mark.parametrize("train_from", ["words", "mid"])
def test_a_split_leaves_weights_generators_and_objects_as_they_were(train_from):
    model = Looked()
    ids = torch.arange(8).view(4, 2)
    weights, drawn = model.words.weight.detach().clone(), model.own.get_state()
    cf.freeze(model, train_from, example_inputs=ids)
    cf.blocks(model, ids)
    if train_from != "words":
        parts = cf.split(model, ids)
        assert torch.equal(model.words.weight, weights)
        rows = rows_of(parts, Example.of(ids))
        assert model.meter.calls == 0
        for count in (1, 2):
            parts.suffix(*(row.clone() for row in rows))
            assert model.meter.calls == count
    else:
        assert torch.equal(model.words.weight, weights)
        assert torch.equal(model.own.get_state(), drawn)


@pytest.mark.parametrize(
    "held",
    [
        [1, 2],
        deque([1, 2]),
        {1, 2},
        {"a": 1, "b": 2},
        OrderedDict(a=1, b=2),
        Counter("abb"),
        defaultdict(list, a=1, b=2),
    ],
    ids=lambda held: type(held).__name__,
)
def test_what_a_container_held_is_put_back(held):
    """One thing in the place of another, of which the length tells nothing; the container stays the one it was."""
    module, before = nn.Linear(1, 1), copy.copy(held)
    module.kept = held
    with preserved_state(module) as attributes:
        assert attributes.changed() == []
        if isinstance(held, set):
            held.remove(1)
            held.add(9)
        else:
            held[next(iter(held)) if isinstance(held, dict) else 0] = 9
        assert attributes.changed() == ["kept"]
    assert module.kept is held
    assert held == before
    assert list(held) == list(before)


@pytest.mark.parametrize("kind", [list, deque, set, dict, OrderedDict, Counter])
def test_what_was_put_into_an_empty_container_is_taken_out(kind):
    """Most of what a module holds is empty, its dicts of hooks above all; a name that was new is gone."""
    module = nn.Linear(1, 1)
    module.kept = held = kind()
    with preserved_state(module) as attributes:
        assert attributes.changed() == []
        held.update({1: 1}) if hasattr(held, "update") else held.append(1)
        module.register_forward_hook(lambda *_: None)
        module.last = 1
        assert {"kept", "_forward_hooks", "last"} <= set(attributes.changed())
        module.kept = None
    assert module.kept is held
    assert not held
    assert not module._forward_hooks
    assert not hasattr(module, "last")


class Checkpointed(nn.Module):
    """Layers under activation checkpointing of the kind that its flags say, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.head = nn.Linear(6, 2)
        self.saving = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True) if self.saving else layer(x)
        return self.head(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpointing_that_is_switched_on_after_the_split_is_refused(executor):
    """Rows need no gradient, so the first trained layer would learn nothing: it is said and not done.

    A trace calls the layers themselves: there they learn.
    """
    torch.manual_seed(0)
    model = Checkpointed().train()
    inputs = torch.randn(4, 6)
    cf.freeze(model, "layers.1", example_inputs=inputs)
    parts = cf.split(model, inputs)
    rows = rows_of(parts, Example.of(inputs))
    parts.suffix(*rows).sum().backward()
    assert model.layers[1].weight.grad is not None
    model.saving = True

    model.zero_grad()
    parts.follow()
    if executor == "fx":
        parts.suffix(*rows).sum().backward()
        assert all(p.grad is not None for p in model.layers[1].parameters())
        return
    with pytest.raises(SplitError, match="reentrant"):
        parts.suffix(*rows)


def test_two_passes_through_a_checkpointed_boundary_before_one_backward_are_refused(monkeypatch):
    """Which of them the backward runs again cannot be told, and its rows would be taken from the other."""
    monkeypatch.setattr(splitting, "_EXECUTORS", (ReplayExecutor(),))

    class Saving(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return self.head(x)

    torch.manual_seed(0)
    model = Saving().train()
    inputs = torch.randn(4, 6)
    cf.freeze(model, "layers.1", example_inputs=inputs)
    parts = cf.split(model, inputs)
    rows = rows_of(parts, Example.of(inputs))
    both = parts.suffix(*rows) + parts.suffix(*rows)
    with pytest.raises(SplitError, match=r"runs the boundary again, .*call backward\(\) after every forward"):
        both.sum().backward()
