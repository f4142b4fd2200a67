"""The check for stale rows reads every byte, wherever weights lie and however they are written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cachefreeze.fingerprint import state_tensors
from cachefreeze.weights import WeightWatch, held, position_sum


def small() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 7))
    model[0].to(memory_format=torch.channels_last)
    model.register_buffer("none", torch.zeros(0))
    model.register_buffer("strided", torch.arange(12.0)[::3])
    return model


def flip(tensor: torch.Tensor, at: int) -> None:
    """One bit, as another library would: through NumPy, which moves no version counter."""
    array = tensor.detach().numpy()
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), tensor.shape))
    array[place] = array[place] + 1


def test_nothing_changed():
    """Asked twice, the answer is the same."""
    model = small()
    watch = WeightWatch(model)
    assert not watch.changed(held(model))
    assert not watch.changed(held(model))


def test_every_element_counts():
    """One element of any tensor, dense, channels-last or with gaps, written past the version counter, is seen."""
    model = small()
    for name, tensor in state_tensors(model):
        for at in {0, tensor.numel() // 2, tensor.numel() - 1} if tensor.numel() else ():
            watch = WeightWatch(model)
            version = tensor._version
            if tensor.dim():
                flip(tensor, at)
            else:
                tensor.data.add_(1)
            assert tensor._version == version, name
            assert watch.changed(held(model)), (name, at)


def test_another_tensor_is_a_change():
    """A parameter that was replaced or removed, or whose data lies elsewhere is a change, equal or not."""
    model = small()
    watch = WeightWatch(model)
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    assert watch.changed(held(model))
    watch = WeightWatch(model)
    model[2].weight.data = model[2].weight.data.clone()
    assert watch.changed(held(model))
    watch = WeightWatch(model)
    del model[2]
    assert watch.changed(held(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_position_sum(dtype, count):
    """The sum that devices make sees any one changed element, and two that changed places."""
    tensor = torch.arange(1, count + 1).to(dtype)
    before = position_sum(tensor)
    for at in range(count):
        other = tensor.clone()
        other[at] = not other[at] if dtype == torch.bool else other[at] + 1
        assert position_sum(other) != before
    if count > 2 and dtype != torch.bool:
        assert position_sum(tensor.flip(0)) != before
    assert position_sum(tensor.clone()) == before


def test_position_sum_of_parts(monkeypatch):
    """Summed in parts it is the same number; a slice that starts at an odd address is read too."""
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = position_sum(tensor)
    monkeypatch.setattr("cachefreeze.weights._SUMMED", 7)
    assert position_sum(tensor) == whole
    odd = torch.arange(9, dtype=torch.uint8)[1:]
    before = position_sum(odd)
    odd[7] += 1
    assert position_sum(odd) != before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_weights_on_a_device():
    """As on the CPU: one element, written through .data, is seen."""
    model = nn.Linear(1000, 1000).cuda()
    watch = WeightWatch(model)
    assert not watch.changed(held(model))
    model.weight.data[999, 999] += 1e-6
    assert watch.changed(held(model))
