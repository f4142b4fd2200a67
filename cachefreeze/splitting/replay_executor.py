"""The replay executor: the model's own forward, with what ran before the boundary replaced by stubs that return rows.

What is not kept is a poison: a fake tensor while the cut is proven (no output may be one), NaN afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cachefreeze import trees
from cachefreeze.errors import SplitError, first_line
from cachefreeze.isolation import RandomState, operation, preserved_random_state, preserved_state
from cachefreeze.splitting.boundary import Cut, Site, rows_of
from cachefreeze.splitting.contents import contents_read
from cachefreeze.splitting.planner import plan
from cachefreeze.splitting.replay_prefix import ReplayPrefix
from cachefreeze.splitting.replay_suffix import ReplaySuffix
from cachefreeze.tracing import Example


class ReplayExecutor:
    """Cut any model whose forward does the same for every batch; see the module's docstring."""

    name = "replay"

    def cut(self, site: Site, example: Example, shorter: Example | None = None) -> Cut:
        """Propose a prefix and a suffix; raises SplitError where no rows can hold what crosses.

        Args:
            site: Where to cut.
            example: The model's inputs.
            shorter: Others that are padded to another length, where samples have different lengths.
        """
        cut, answers_matter = self._cut(site, example, shorter, keep_asked=False)
        return self._cut(site, example, shorter, keep_asked=True)[0] if answers_matter else cut

    def _cut(self, site: Site, example: Example, shorter: Example | None, *, keep_asked: bool) -> tuple[Cut, bool]:
        planned = plan(site, example, shorter, keep_asked=keep_asked)
        if all(tensor.input is not None for tensor in planned.tensors):
            raise SplitError(f"replay: nothing that is used after {site.name!r} depends on the inputs")
        with site.mode(train=False):
            prefix = ReplayPrefix(site, planned)
        suffix = ReplaySuffix(site, planned, example)
        some = example.take([0, 1])
        rows = rows_of(prefix, some.fresh())
        for train in (False, True):
            with preserved_random_state(), preserved_state(site.model), site.mode(train=train), torch.no_grad():
                output = _prove(suffix, rows, site, some.fresh())
            suffix.drops_generation_caches |= any(trees.is_generation_cache(leaf) for leaf in trees.leaves(output))
        with preserved_random_state() as random_state, preserved_state(site.model), site.mode(train=False):
            answers_matter = not keep_asked and _answers_matter(suffix, rows, random_state)
        return Cut(prefix, suffix, planned.tensors), answers_matter


def _answers_matter(suffix: ReplaySuffix, rows: list[Tensor], random_state: RandomState) -> bool:
    """Whether the output follows from what masks that are not kept answer: the suffix is given zeros, and ones."""
    found = []
    for answer in (0, 1):
        random_state.restore()
        suffix.answer(answer)
        try:
            with torch.no_grad():
                found.append(trees.leaves(suffix(*[row.clone() for row in rows])))
        except Exception:  # a forward that cannot run with a mask of zeros asks for more than a truth value
            return True
        finally:
            suffix.answer(None)
    return len(found[0]) != len(found[1]) or not all(_same(a, b) for a, b in zip(*found, strict=True))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    return type(a) is type(b) and (not isinstance(a, trees.CONSTANTS) or a == b)


class _Shapes(TorchFunctionMode):
    """What takes nothing but the shape of a value that is not there makes what it makes of any such value."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = trees.tensors((args, kwargs))
        read = contents_read(operation(func), given)
        if len(read) < len(given) and any(isinstance(leaf, FakeTensor) for leaf in given):
            taken = {id(leaf) for leaf in read}
            args, kwargs = pytree.tree_map_only(
                FakeTensor, lambda leaf: leaf if id(leaf) in taken else _shaped_as(leaf), (args, kwargs)
            )
        return func(*args, **kwargs)


def _shaped_as(fake: FakeTensor) -> Tensor:
    return torch.empty_strided(fake.size(), fake.stride(), dtype=fake.dtype, device=fake.device)


def _prove(suffix: ReplaySuffix, rows: list[Tensor], site: Site, some: Example) -> Any:
    """The output, of which nothing may depend on what is not kept."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def poison(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, writable: bool) -> Tensor:
        with fake:
            return torch.empty(shape, dtype=dtype, device=device)

    try:
        with _Shapes():
            output = suffix.run([row.clone() for row in rows], poison, given=some.beside)
    except SplitError:
        raise
    except Exception as error:  # the model's forward may fail with anything on a value that is not there
        raise SplitError(
            f"replay: what runs after {site.name!r} reads a value that is not kept: {first_line(error)}"
        ) from error
    if any(isinstance(leaf, FakeTensor) for leaf in trees.leaves(output)):
        raise SplitError(f"replay: an output of {type(site.model).__name__} depends on a value that is not kept")
    return output
