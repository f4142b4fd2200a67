"""Traces of a model that is cut: linear around the boundary, with everything else called as it is."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from cachefreeze.errors import SplitError, first_line
from cachefreeze.fingerprint import state_tensors
from cachefreeze.freezing import hooks_of
from cachefreeze.isolation import operation, preserved_random_state, preserved_state
from cachefreeze.splitting.boundary import Site
from cachefreeze.splitting.contents import READS
from cachefreeze.splitting.fx_recipe import tensor_leaves
from cachefreeze.splitting.memory import address_of
from cachefreeze.tracing import Example, Tracer, asks_metadata, attribute


class _Baked(TorchFunctionMode):
    """Knows what a forward does to the model's own tensors while it is traced: no graph holds that.

    Attributes:
        found: Names of the tensors that were written, or from whose values Python made a number or took a way.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: list[str] = []
        self._names = {address_of(tensor): name for name, tensor in state_tensors(model)} | {
            address_of(value): f"{name}.{key}".lstrip(".")
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, Tensor)
        }
        self._names.pop(0, None)
        self._made: MutableMapping[Tensor, str] = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = [(leaf, leaf._version, name) for leaf in tensor_leaves((args, kwargs)) if (name := self._name(leaf))]
        result = func(*args, **kwargs)
        name = operation(func)
        self.found += [owner for leaf, version, owner in known if name in READS or leaf._version != version]
        for leaf in tensor_leaves(result) if known else ():
            self._made[leaf] = known[0][2]
        return result

    def _name(self, tensor: Tensor) -> str | None:
        """Of the model's tensor that a tensor shares its memory with, or was made of."""
        return self._names.get(address_of(tensor)) or self._made.get(tensor)


class Tracing:
    """Traces the model with everything but the boundary's surroundings as leaves."""

    def __init__(self, site: Site, example: Example) -> None:
        self.site = site
        self.example = example
        module = site.model.get_submodule(site.name)
        # a shared module is known by its first name, to the recording as to fx
        known = next(name for name, other in site.model.named_modules() if other is module)
        call = site.usage.first_call(known)
        if call is None:
            raise SplitError(
                f"fx: module {site.name!r} is never called (the forward uses its weights directly), so there is no "
                "place to cut; train from the module that uses it"
            )
        self.target = call.name
        self.opened = ["", *(name for name in site.usage.enclosing(call) if name)]
        boundary = site.model.get_submodule(call.name)
        if isinstance(boundary, nn.Sequential) and type(boundary).forward is nn.Sequential.forward:
            self.opened.append(call.name)  # its parameter-free start may belong to the prefix
        for name in self.opened:
            module = site.model.get_submodule(name)
            if hooks_of(module):
                raise SplitError(
                    f"fx: module {name or type(module).__name__!r} encloses {site.name!r} and has forward hooks, which "
                    "a traced forward would not run; remove them, or hook the modules inside it"
                )
        parameters = dict(site.model.named_parameters())
        self.trainable = {id(p) for n, p in parameters.items() if p.requires_grad and n not in site.frozen}

    def open_modules(self) -> tuple[nn.Module, ...]:
        """The modules that are traced through."""
        return tuple(self.site.model.get_submodule(name) for name in self.opened)

    def graph(self) -> fx.Graph:
        """Trace in the modes that the modules are in now."""
        opened = set(self.opened)
        inside: list[str] = []

        class _Cutting(Tracer):
            def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
                inside.append(self.path_of_module(m))
                result = super().call_module(m, forward, args, kwargs)
                inside.pop()
                return result

        model = self.site.model
        try:
            baked = _Baked(model)
            with preserved_random_state() as random_state, preserved_state(model) as state, baked:
                graph = _Cutting(lambda _m, name: name not in opened, self.example).trace(model)
                self._refuse_baked(random_state.moved(), state.changed(), baked.found)
                return graph
        except SplitError:
            raise
        except Exception as error:  # the user's forward may refuse a proxy with any exception
            where = next((name for name in reversed(inside) if name in opened), "")
            owner = type(model.get_submodule(where)).__name__
            place = f"module {where!r} ({owner})" if where else f"the forward of {owner} itself"
            raise SplitError(
                f"fx cannot trace {place}, which encloses {self.site.name!r}: {type(error).__name__}: "
                f"{first_line(error)}"
            ) from error

    def _refuse_baked(self, drawn: list[str], changed: list[str], used: list[str]) -> None:
        """What happens once, while tracing, would be left out of every step."""
        model = type(self.site.model).__name__
        if drawn:
            raise SplitError(
                f"fx: the forward of {model} draws random numbers ({', '.join(drawn)}) in Python around "
                f"{self.site.name!r}, and a graph would keep the outcome of one draw"
            )
        if changed:
            raise SplitError(
                f"fx: the forward of {model} writes {changed[0]!r}, which a graph would not do again at every step"
            )
        if used:
            raise SplitError(
                f"fx: the forward of {model} reads or writes the values of {used[0]!r} while it is traced, and a graph "
                "would keep the outcome"
            )

    def end(self, graph: fx.Graph) -> int:
        """Position of the first node that belongs to the boundary or uses a trainable parameter."""
        model = self.site.model
        for position, node in enumerate(graph.nodes):
            if node.op == "call_module":
                target = str(node.target)
                if target == self.target or target.startswith(f"{self.target}."):
                    return position
                if any(id(p) in self.trainable for p in model.get_submodule(target).parameters()):
                    return position
            weights = (parent for parent in node.all_input_nodes if parent.op == "get_attr")
            if any(id(attribute(model, str(w.target))) in self.trainable for w in weights) and not asks_metadata(node):
                return position
        raise SplitError(f"fx: the traced forward of {type(model).__name__} never reaches {self.site.name!r}")
