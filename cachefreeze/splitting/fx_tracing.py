"""Traces of a model that is cut: linear around the boundary, with everything else called as it is."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from cachefreeze.errors import SplitError, first_line
from cachefreeze.freezing import hooks_of
from cachefreeze.isolation import preserved_random_state, preserved_state
from cachefreeze.splitting.boundary import Site
from cachefreeze.tracing import Example, Tracer, asks_metadata, attribute


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
            with preserved_random_state() as random_state, preserved_state(model) as state:
                graph = _Cutting(lambda _m, name: name not in opened, self.example).trace(model)
                self._refuse_baked(random_state.moved(), state.changed())
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

    def _refuse_baked(self, drawn: list[str], changed: list[str]) -> None:
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
