"""Every trap model splits exactly, or is refused with the reason; none is silently wrong."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

import cachefreeze as cf
from cachefreeze import splitting
from cachefreeze.errors import CacheFreezeError
from cachefreeze.splitting import ReplayExecutor
from cachefreeze.splitting.boundary import Cut, Site
from cachefreeze.splitting.fx_executor import FxExecutor
from cachefreeze.testing.every_trap import REFUSED, TRAPS
from cachefreeze.testing.exact import assert_exact, state_of
from cachefreeze.testing.traps import Chain, DropoutPrefix, Trap, images, vectors
from cachefreeze.tracing import Example

# torch's own words about what a trap does on purpose
pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
]


@pytest.mark.parametrize("name", TRAPS)
def test_it_splits_exactly(name, monkeypatch):
    """Outputs, gradients, buffers, weights and random draws over several steps, batch sizes and inputs.

    The general path stands by itself: what a trace cuts it may refuse, but it never hands out a wrong split or another
    error.
    """
    if assert_exact(TRAPS[name]).executor == "replay":
        return
    monkeypatch.setattr(splitting, "_EXECUTORS", (ReplayExecutor(),))
    with suppress(CacheFreezeError):
        assert assert_exact(TRAPS[name]).executor == "replay"


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_the_reason_and_without_a_trace(name):
    trap = REFUSED[name]
    torch.manual_seed(0)
    model, inputs = trap.make(), trap.inputs()
    if trap.train_from:
        cf.freeze(model, trap.train_from, example_inputs=inputs)
    before, given = state_of(model), Example.of(inputs).fresh()
    with pytest.raises(CacheFreezeError, match=trap.message):
        cf.split(model, inputs)
    torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)
    torch.testing.assert_close(Example.of(inputs).args, given.args, rtol=0, atol=0)


class Spoilt(nn.Module):
    """A part with something done to what it returns."""

    def __init__(self, part: nn.Module, change) -> None:
        super().__init__()
        self.part, self.change = part, change

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.change(self.part(*args, **kwargs), args)


class TestTheHarnessItself:
    """What holds the splits would see a wrong one: verification is switched off, and the cut is spoilt."""

    @pytest.fixture
    def spoilt(self, monkeypatch):
        def install(prefix=None, suffix=None):
            class Bad(FxExecutor):
                def cut(self, site: Site, example: Example) -> Cut:
                    cut = super().cut(site, example)
                    first = cut.prefix if prefix is None else Spoilt(cut.prefix, prefix)
                    second = cut.suffix if suffix is None else Spoilt(cut.suffix, suffix)
                    return Cut(first, second, cut.tensors)

            monkeypatch.setattr(splitting, "_EXECUTORS", (Bad(),))
            monkeypatch.setattr(splitting, "verify", lambda *_: None)  # it would refuse

        return install

    def test_it_passes_what_is_right(self, spoilt):
        spoilt()
        assert_exact(Trap(Chain, images, "conv2"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda out, _: out * (1 + 1e-6), r"eval batch 0: \['output'\]"),
            (lambda out, _: out * torch.where(torch.arange(len(out)) > 2, 2.0, 1.0)[:, None], "eval batch 0"),
            (lambda out, _: out if len(out) > 2 else out * 2, "eval batch 1"),
            (lambda out, _: out if not out.requires_grad else out * 1.01, "eval batch 0"),
            (lambda out, _: out.detach() + 0.5 * (out - out.detach()), r"\['parameters'\]"),
            (lambda out, _: [out], "another structure"),
            (lambda out, _: out + 0 * torch.rand(()), "draws"),
            (lambda out, _: out.double(), "float64"),
            (lambda out, _: out * float("nan"), "NaN"),
        ],
    )
    def test_a_wrong_suffix_is_seen(self, spoilt, change, message):
        spoilt(suffix=change)
        with pytest.raises(AssertionError, match=message):
            assert_exact(Trap(Chain, images, "conv2"))

    def test_a_prefix_that_mixes_samples_is_seen(self, spoilt, monkeypatch):
        """A tenth of the batch's mean is taken off the rows and the suffix puts it back, so that outputs are right."""

        class Mixing(FxExecutor):
            def cut(self, site: Site, example: Example) -> Cut:
                cut = super().cut(site, example)

                class Suffix(nn.Module):
                    def forward(self, rows: Tensor) -> Tensor:
                        return cut.suffix(rows + 0.1 / 0.9 * rows.mean(0))

                return Cut(Spoilt(cut.prefix, lambda rows, _: rows - 0.1 * rows.mean(0)), Suffix(), cut.tensors)

        spoilt()
        monkeypatch.setattr(splitting, "_EXECUTORS", (Mixing(),))
        with pytest.raises(AssertionError, match="row of sample"):
            assert_exact(Trap(DropoutPrefix, vectors, "2", tolerance=1e-4))

    def test_a_dropped_gradient_is_seen(self, spoilt, monkeypatch):
        spoilt(suffix=lambda out, _: out)
        trap = Trap(Chain, images, "conv2")

        def without_one(self, *rows):
            weight = self._follow["model"].head.weight
            weight.requires_grad_(False)
            try:
                return self.prepare()(*rows)
            finally:
                weight.requires_grad_(True)

        monkeypatch.setattr("cachefreeze.splitting.fx_executor.Suffix.forward", without_one)
        with pytest.raises(AssertionError, match=r"\['head\.weight'\]"):
            assert_exact(trap)
