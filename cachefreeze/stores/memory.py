"""Stores in memory: the computer's (host) or an accelerator's (device).

One preallocated tensor per field; reading is one ``index_select`` per field into a fresh batch, writing is one
``index_copy_``. A ragged field is the flat tensor of all items and one item of zeros, with which batches are padded;
which items a batch takes is worked out on the CPU. Work on CUDA is queued on the caller's current stream and never
waited for here: who reads on another stream than the one that wrote has to order the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from cachefreeze.errors import StoreSpaceError, UsageError
from cachefreeze.stores.base import FieldSpec, Store, StoreSpec, check_spec
from cachefreeze.stores.ragged import Lengths
from cachefreeze.stores.recycling import Recycler

_MEMINFO = Path("/proc/meminfo")
_PAGE_BYTES = 4096  # the smallest page of any platform that torch runs on, so no page is left out below


def free_host_bytes() -> int | None:
    """Bytes that can be allocated without swapping, or None where the system does not say.

    Source: MemAvailable, https://docs.kernel.org/filesystems/proc.html#meminfo
    """
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def free_device_bytes(device: torch.device) -> int | None:
    """Bytes that the driver would still hand out on ``device``, or None where it does not say."""
    if device.type == "cpu":
        return free_host_bytes()
    if device.type == "cuda":  # needs CUDA
        return torch.cuda.mem_get_info(device)[0]
    return None


def _space_error(spec: StoreSpec, device: torch.device, free_bytes: int | None) -> StoreSpaceError:
    free = "an unknown number" if free_bytes is None else f"{free_bytes:,}"
    return StoreSpaceError(
        f"{spec.rows:,} rows need {spec.nbytes:,} bytes on {device}, {free} are free: "
        "use store='hdf5:DIR', a smaller dtype or a later boundary"
    )


class _TensorStore(Store):
    """What host and device share: tensors, gather and scatter.

    Raises:
        StoreSpaceError: The rows need more bytes than are free. Nothing has been allocated then.
    """

    def __init__(self, spec: StoreSpec, device: torch.device, pin: bool) -> None:
        check_spec(spec)
        free_bytes = free_device_bytes(device)
        if free_bytes is not None and spec.nbytes > free_bytes:
            raise _space_error(spec, device, free_bytes)
        super().__init__(spec, device)
        self._recycler = Recycler(pin=pin)
        try:
            self._data = {field.name: _allocate(field, spec.rows, device) for field in spec.fields}
        except (RuntimeError, MemoryError) as error:  # torch raises RuntimeError on the CPU and a subclass on CUDA
            raise _space_error(spec, device, free_bytes) from error
        # "cuda" becomes "cuda:0": what is asked for must compare equal to what read() returns
        self.device = self._data[spec.fields[0].name].device
        if device.type == "cpu":
            self._claim_pages()

    def close(self) -> None:
        self._data = {}
        super().close()

    def _claim_pages(self) -> None:
        # The kernel hands out pages at first touch. Untouched, this store would still look free to the next one, and
        # memory would run out in the middle of an epoch, by a signal, instead of here.
        for tensor in self._data.values():
            tensor.view(-1).view(torch.uint8)[::_PAGE_BYTES] = 0

    def _write(self, rows: Tensor, batch: Mapping[str, Tensor]) -> None:
        for field in self.spec.fields:
            values, index = batch[field.name].detach(), rows
            if field.lengths is not None:
                kept = field.lengths.mask(rows, values.shape[1]).flatten().nonzero().flatten()
                index = field.lengths.positions(rows, values.shape[1]).flatten()[kept]
                values = values.flatten(0, 1).index_select(0, sent(kept, values.device))
            self._data[field.name].index_copy_(0, sent(index, self.device), sent(values, self.device))

    def _read(self, rows: Tensor) -> dict[str, Tensor]:
        indices: dict[Lengths | None, Tensor] = {}  # fields that share their lengths share their index
        batch = {}
        for field in self.spec.fields:
            lengths = field.lengths
            if lengths not in indices:
                index = rows if lengths is None else lengths.positions(rows, lengths.width(rows)).flatten()
                indices[lengths] = sent(index, self.device)
            gathered = self._gather(field.name, indices[lengths])
            batch[field.name] = gathered if lengths is None else gathered.view(field.batch_shape(rows))
        return batch

    def _gather(self, name: str, index: Tensor) -> Tensor:
        data = self._data[name]
        if not data.is_cpu:  # needs CUDA, or another accelerator
            return data.index_select(0, index)
        fresh = self._recycler.empty((len(index), *data.shape[1:]), data.dtype)
        return torch.index_select(data, 0, index, out=fresh)


def _allocate(field: FieldSpec, rows: int, device: torch.device) -> Tensor:
    """(rows, *shape); of a ragged field (items + 1, *shape[1:]), the last item zero."""
    if field.lengths is None:
        return torch.empty((rows, *field.shape), dtype=field.dtype, device=device)
    flat = torch.empty((field.lengths.total + 1, *field.shape[1:]), dtype=field.dtype, device=device)
    flat[-1].zero_()
    return flat


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, without waiting for the device to have it."""
    if tensor.device == device:
        return tensor
    if tensor.device.type == "cpu" and device.type == "cuda":  # needs CUDA
        return _staged(tensor, device)
    return tensor.to(device)  # needs CUDA, or another accelerator


def _staged(tensor: Tensor, device: torch.device) -> Tensor:  # needs CUDA
    # Through a pinned buffer of our own: a pageable source would make the copy wait, and a pinned source may be
    # written into by its owner before the copy has run. torch keeps the buffer until it has.
    staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return staged.to(device, non_blocking=True)


@final
class HostStore(_TensorStore):
    """Rows in the computer's memory.

    The rows themselves are never pinned: a gather copies them anyway, and torch rounds a pinned block up to a power of
    two, so that 33 GiB of rows would lock 64. What :meth:`read` returns is pinned, so that its way to the device can
    overlap with computing.

    Args:
        spec: Rows and fields.
        pin: Whether batches come in pinned memory; None pins when CUDA is available.

    Raises:
        StoreSpaceError: The rows need more bytes than are free.
        UsageError: ``pin=True`` without CUDA.
    """

    tier = "host"

    def __init__(self, spec: StoreSpec, pin: bool | None = None) -> None:
        if pin and not torch.cuda.is_available():
            raise UsageError("pin=True needs CUDA, which is not available: leave pin out")
        super().__init__(spec, torch.device("cpu"), torch.cuda.is_available() if pin is None else pin)


@final
class DeviceStore(_TensorStore):
    """Rows in the memory of the device that trains.

    Args:
        spec: Rows and fields.
        device: Where the rows live and batches are returned; ``"cpu"`` works too.

    Raises:
        StoreSpaceError: The rows need more bytes than are free.
    """

    tier = "device"

    def __init__(self, spec: StoreSpec, device: torch.device | str) -> None:
        super().__init__(spec, torch.device(device), pin=False)
