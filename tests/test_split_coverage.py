"""The coverage run's own checks catch what they are there for, and its byte reference is the least by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from covering.case import Case
from covering.checks import PromiseError, Subject, WorkError, check_all
from covering.comparing import call, draw
from covering.mincut import minimum_bytes
from covering.recording import record
from covering.reference import Reference, why_not
from covering.state import State


class Small(nn.Module):
    """Frozen ``first``; ``second`` has batch statistics and a dropout."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.second = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))

    def forward(self, x):
        return self.second(self.first(x).relu())


CASE = Case("own", "small", Small, lambda batch, generator: torch.randn(batch, 6, generator=generator))


def subject(prefix=None, suffix=None, *, shape=(4,)):
    torch.manual_seed(0)
    model = Small()
    recording = record(Small(), draw(CASE, 2, 0), call)
    reference = Reference(model, recording, "second")
    for parameter in model.first.parameters():
        parameter.requires_grad_(False)

    def right_prefix(x):
        with torch.no_grad():
            return model.first(x).relu()

    spec = SimpleNamespace(shape=shape, dtype=torch.float32, batch_dim=0)
    parts = SimpleNamespace(
        prefix=right_prefix if prefix is None else lambda x: prefix(model, right_prefix(x)),
        suffix=model.second if suffix is None else lambda rows: suffix(model, rows),
        boundary=SimpleNamespace(tensors=(spec,)),
    )
    return Subject(CASE, model, parts, reference, recording, "second", 3)


def test_a_right_split_passes():
    """Nothing is found where nothing is wrong, bit for bit."""
    assert check_all(subject()) == {"eval": True, "step": True, "steps": True, "constant_work": []}


def no_statistics(model, rows):
    kept = {n: b.clone() for n, b in model.named_buffers()}
    output = model.second(rows)
    for name, buffer in model.named_buffers():
        buffer.data = kept[name]
    return output


def other_draws(model, rows):
    output = model.second(rows)
    if model.training:
        torch.rand(1)
    return output


def first_again(model, rows):
    return model.second(rows + 0 * (rows @ model.first.weight).sum())


def frozen_gradient(model, rows):
    model.first.weight.requires_grad_(True)
    return model.second(rows) + 0 * model.first.weight.sum()


@pytest.mark.parametrize(
    ("prefix", "suffix", "shape", "found"),
    [
        (None, lambda m, r: m.second(r) * 1.001, (4,), "eval output"),
        (lambda m, r: r + (r.mean() if r.shape[0] == 2 else 0), None, (4,), "beside other samples"),
        (None, lambda m, r: m.second(r).detach().requires_grad_(), (4,), "one of model and suffix only"),
        (None, no_statistics, (4,), "buffer"),
        (None, other_draws, (4,), "random numbers"),
        (None, frozen_gradient, (4,), r"frozen .* got a gradient"),
        (None, lambda m, r: m.second(r) if not m.training else m.second(r.flip(0)).flip(0), (4,), "training step"),
        (None, None, (5,), "boundary.tensors"),
    ],
)
def test_a_wrong_split_is_found(prefix, suffix, shape, found):
    """Outputs, separability, gradients, buffers, draws and shapes are each looked at."""
    with pytest.raises(PromiseError, match=found):
        check_all(subject(prefix, suffix, shape=shape))


def test_work_that_is_done_again_is_found():
    """A suffix that puts rows through a frozen weight is right and useless."""
    with pytest.raises(WorkError, match=r"first\.weight"):
        check_all(subject(None, first_again))


def test_state():
    """Modes, flags, values, hooks and random states are seen to change."""
    model = Small()
    assert State(model).broken(model) is None
    for change in (
        lambda: model.eval(),
        lambda: model.first.weight.requires_grad_(False),
        lambda: model.first.weight.data.add_(1e-3),
        lambda: model.second[0].running_mean.add_(1),
        lambda: model.first.register_forward_hook(print),
        lambda: setattr(model.first.bias, "grad", torch.zeros(4)),
        lambda: torch.rand(1),
    ):
        before = State(model)
        change()
        assert before.broken(model) is not None


class Wide(nn.Module):
    """The value that enters ``head`` is 16 times as large as what it is made of."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 1)
        self.head = nn.Conv2d(2, 1, 3)

    def forward(self, x):
        return self.head(nn.functional.interpolate(self.stem(x).relu(), scale_factor=4))


def test_the_fewest_bytes_by_hand():
    """What needs no weights is computed again: the rows are what was made before the enlargement."""
    two, three = (record(Wide(), torch.randn(n, 3, 5, 5), call) for n in (2, 3))
    assert minimum_bytes(two, three, "head") == 2 * 5 * 5 * 4
    assert minimum_bytes(two, three, "stem") == 3 * 5 * 5 * 4


class Shaped(nn.Module):
    """Asks what is wide for its shape, and frees what it made of weights before it makes the rows."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 2, 5, 5))
        self.stem, self.narrow, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 1, 1), nn.Conv2d(1, 1, 3)

    def forward(self, x):
        wide = self.stem(x)
        narrow = self.narrow(wide)
        freed = [self.table * i for i in range(9)]
        scale = 1 + 0 * float(sum(part.sum() for part in freed))
        del freed
        large = torch.cat([narrow * scale] * 2, dim=1)
        return self.head(large[:, :1] + large[:, 1:]) * torch.ones_like(wide)[:, :1, :3, :3]


def test_the_fewest_bytes_hold_neither_what_gives_its_shape_nor_memory_of_dead_weights():
    two, three = (record(Shaped(), torch.randn(n, 3, 5, 5), call) for n in (2, 3))
    assert minimum_bytes(two, three, "head") == 5 * 5 * 4
    assert all(value.recomputable for value in two.values if value.shape == (2, 2, 5, 5))


class Coupled(nn.Module):
    """Random, or batch-dependent, before ``head`` even in eval mode."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.stem, self.head = kind, nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        if self.kind == "random":
            x = x + torch.rand(())
        if self.kind == "coupled":
            x = x - x.mean(0)
        return self.head(x)


@pytest.mark.parametrize(("kind", "why"), [("random", "random"), ("coupled", "depend on its batch"), ("plain", None)])
def test_why_not_runs_the_model_itself(kind, why):
    """What no split can do is told apart from what this one cannot, by the model alone."""
    model = Coupled(kind)
    case = Case("own", kind, lambda: model, CASE.inputs)
    found = why_not(case, model, record(model, draw(case, 2, 0), call), "head")
    assert (why in found) if why else found is None
