"""Traps of freezing: gradient flags in patterns that a user sets by hand; the boundary is read from them."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cachefreeze.testing.trap_models_crossing import Masked, masked_batch
from cachefreeze.testing.trap_table import TrapTable, linear
from cachefreeze.testing.traps import Chain, images, sequences, tokens

table = TrapTable()


def train_only(*patterns: str) -> Callable[[nn.Module], None]:
    """Freeze every parameter by hand but those whose name matches a pattern, and go to eval mode."""

    def setup(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))
        model.eval()

    return setup


def _by_hand(make: Callable[[], nn.Module], *patterns: str) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = make()
        train_only(*patterns)(model)
        return model

    return made


def _layers(count: int = 3, width: int = 6) -> Callable[[], nn.Module]:
    return lambda: nn.ModuleList([nn.Linear(width, width) for _ in range(count)])


@table("", layers=_layers(4), setup=train_only("layers.1.*", "head.*"))
def frozen_late_layer(self: Any, x: Tensor) -> Any:
    """Frozen layers lie behind trained ones: gradients flow through them."""
    y = self.stem(x)
    for layer in self.layers:
        y = layer(y).relu()
    return self.head(y)


@table("", mid=linear(), setup=train_only("*.bias"), refused="frozen")
def only_biases(self: Any, x: Tensor) -> Any:
    """BitFit: the first block's bias trains, so nothing runs before the first trainable parameter."""
    return self.head(self.mid(self.stem(x)))


@table("", mid=linear(), setup=train_only("mid.bias", "head.bias"))
def only_late_biases(self: Any, x: Tensor) -> Any:
    """Biases of the later layers train: their weights are frozen behind the boundary."""
    return self.head(self.mid(self.stem(x)).relu())


@table("", inputs=sequences, mid=linear(), norm=lambda: nn.LayerNorm(6), setup=train_only("norm.*"))
def only_a_norm(self: Any, x: Tensor) -> Any:
    """A norm in the middle is all that trains."""
    return self.head(self.mid(self.norm(self.stem(x))).relu())


@table("", inputs=tokens, stem=lambda: nn.Embedding(11, 6), mid=linear(), setup=train_only("stem.*", "head.*"),
       refused="frozen")  # fmt: skip
def trainable_input_embedding(self: Any, ids: Tensor) -> Any:
    """The embedding at the input trains, the middle is frozen: nothing can be cached."""
    return self.head(self.mid(self.stem(ids)))


class LowRank(nn.Module):
    """A frozen linear layer with a trainable low-rank update beside it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features) * 0.1)
        self.lora_b = nn.Parameter(torch.randn(base.out_features, rank) * 0.1)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """The layer and its update."""
        out: Tensor = self.base(x) + self.dropout(x) @ self.lora_a.t() @ self.lora_b.t()
        return out


def _adapted(*which: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made = [nn.Linear(6, 6) for _ in range(4)]
        return nn.ModuleList([LowRank(layer) if at in which else layer for at, layer in enumerate(made)])

    return make


@table("", layers=_adapted(1, 3), setup=train_only("*lora*"))
def low_rank_adapters(self: Any, x: Tensor) -> Any:
    """Hand-made LoRA in layers 1 and 3: what runs before the first adapter is cached."""
    y = self.stem(x)
    for layer in self.layers:
        y = layer(y).tanh()
    return self.head(y)


@table("", layers=_adapted(2), setup=train_only("*lora*", "head.*"))
def low_rank_adapter_and_head(self: Any, x: Tensor) -> Any:
    """One adapter and the head train."""
    y = self.stem(x)
    for layer in self.layers:
        y = layer(y).tanh()
    return self.head(y)


class _Block(nn.Module):
    """Attention by three projections, with an adapter on one of them."""

    def __init__(self, *, adapted: bool) -> None:
        super().__init__()
        self.query, self.key, self.out = (nn.Linear(6, 6) for _ in range(3))
        self.norm = nn.LayerNorm(6)
        value = nn.Linear(6, 6)
        self.value = LowRank(value) if adapted else value

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = self.query(y), self.key(y), self.value(y)
        out: Tensor = x + self.out(functional.scaled_dot_product_attention(q, k, v))
        return out


@table("", inputs=sequences, blocks=lambda: nn.ModuleList([_Block(adapted=at > 0) for at in range(3)]),
       setup=train_only("*lora*"), tolerance=1e-6)  # fmt: skip
def adapters_inside_attention(self: Any, x: Tensor) -> Any:
    """LoRA on the value projection of the last two blocks: their queries and keys are frozen behind the boundary."""
    y = self.stem(x)
    for block in self.blocks:
        y = block(y)
    return self.head(y.mean(1))


def _prompt(model: Any) -> None:
    model.prompt = nn.Parameter(torch.randn(1, 2, 6))
    train_only("prompt", "head.*")(model)


@table("", inputs=sequences, layers=_layers(2), setup=_prompt)
def prompt_in_the_middle(self: Any, x: Tensor) -> Any:
    """A trainable prompt of the root is joined behind the frozen stem."""
    y = self.stem(x)
    y = torch.cat([self.prompt.expand(x.shape[0], -1, -1), y], 1)
    for layer in self.layers:
        y = layer(y).relu().cumsum(1)
    return self.head(y[:, -1])


@table("", inputs=sequences, layers=_layers(2), setup=_prompt, refused="frozen")
def prompt_at_the_input(self: Any, x: Tensor) -> Any:
    """A trainable prompt of the root is joined to the inputs: nothing runs before it."""
    y = self.stem(torch.cat([self.prompt.expand(x.shape[0], -1, -1), x], 1))
    for layer in self.layers:
        y = layer(y).relu().cumsum(1)
    return self.head(y[:, -1])


class _KeyValues(nn.Module):
    """A block to which trainable keys and values are given."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.pair = nn.Linear(6, 6), nn.Linear(6, 12)

    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        k, v = self.pair(x).chunk(2, -1)
        if past is not None:
            k, v = (torch.cat([p.expand(x.shape[0], -1, -1), y], 1) for p, y in zip(past, (k, v), strict=True))
        return x + functional.scaled_dot_product_attention(self.query(x), k, v)


def _past(model: Any) -> None:
    model.past = nn.ParameterList([torch.randn(2, 1, 3, 6)])
    train_only("past.*")(model)


@table(
    "", inputs=sequences, blocks=lambda: nn.ModuleList([_KeyValues() for _ in range(3)]), setup=_past, tolerance=1e-6
)
def prefix_tuning(self: Any, x: Tensor) -> Any:
    """Prefix tuning: trainable keys and values enter the last block, everything else is frozen."""
    y = self.stem(x)
    for at, block in enumerate(self.blocks):
        y = block(y, self.past[0] if at == 2 else None)
    return self.head(y)


def _gate(model: Any) -> None:
    model.gate = nn.Parameter(torch.zeros(6))
    train_only("gate", "head.*")(model)


@table("", mid=linear(), setup=_gate)
def gate_of_the_root(self: Any, x: Tensor) -> Any:
    """A trainable gate of the root scales what the frozen stem makes."""
    return self.head(self.mid(self.stem(x) * self.gate.sigmoid()))


def _tied(model: Any) -> None:
    model.head.weight = model.stem.weight
    train_only("mid.*", "head.bias")(model)


@table("", inputs=tokens, stem=lambda: nn.Embedding(11, 6), mid=linear(), head=linear(11), setup=_tied)
def tied_embeddings_frozen(self: Any, ids: Tensor) -> Any:
    """Tied embeddings are frozen by hand: the head's weight is frozen behind the boundary."""
    return self.head(self.mid(self.stem(ids)))


def _tied_trained(model: Any) -> None:
    model.head.weight = model.stem.weight
    train_only("stem.weight", "mid.*", "head.*")(model)


@table("", inputs=tokens, stem=lambda: nn.Embedding(11, 6), mid=linear(), head=linear(11), setup=_tied_trained,
       refused="frozen")  # fmt: skip
def tied_embeddings_trained(self: Any, ids: Tensor) -> Any:
    """Tied embeddings train: they are used first, so nothing can be cached."""
    return self.head(self.mid(self.stem(ids)))


def _shared(model: Any) -> None:
    model.mid.weight = model.stem.weight
    train_only("mid.bias", "head.*")(model)


@table("", mid=linear(), setup=_shared)
def weight_shared_across(self: Any, x: Tensor) -> Any:
    """One Parameter is the weight of a frozen layer and of the boundary, whose bias trains."""
    return self.head(self.mid(self.stem(x)))


@table("", mid=linear(), setup=train_only("head.*"), side=linear())
def frozen_side_branch(self: Any, x: Tensor) -> Any:
    """Two frozen branches meet in the head."""
    return self.head(self.mid(self.stem(x)) + self.side(x))


@table("", mid=linear(), setup=train_only("side.*", "head.*"), side=linear())
def trained_side_branch(self: Any, x: Tensor) -> Any:
    """A trained branch beside a frozen one: what runs behind the trained branch's start is not cached."""
    y = self.stem(x)
    z = self.side(y)
    return self.head(self.mid(y) + z)


@table("", mid=linear(), side=linear(), setup=train_only("side.*", "head.*"))
def trained_side_branch_last(self: Any, x: Tensor) -> Any:
    """The trained branch runs last on what the frozen stem made: two values cross."""
    y = self.stem(x)
    z = self.mid(y)
    return self.head(z + self.side(y))


@table("", mid=linear(), unused=linear(), setup=train_only("unused.*", "head.*"))
def trainable_but_unused(self: Any, x: Tensor) -> Any:
    """A trainable layer is never used: it is no boundary."""
    return self.head(self.mid(self.stem(x)))


@table("", mid=linear(), unused=linear(), setup=train_only("unused.*"), refused="trainable")
def only_the_unused_trains(self: Any, x: Tensor) -> Any:
    """All that is trainable is never used."""
    return self.head(self.mid(self.stem(x)))


@table("", mid=linear(), setup=train_only(), refused="trainable")
def everything_frozen(self: Any, x: Tensor) -> Any:
    """Everything is frozen."""
    return self.head(self.mid(self.stem(x)))


@table("", mid=linear(), setup=train_only("*"), refused="frozen")
def nothing_frozen(self: Any, x: Tensor) -> Any:
    """Nothing is frozen."""
    return self.head(self.mid(self.stem(x)))


def _head_in_train_mode(model: nn.Module) -> None:
    train_only("head.*")(model)
    model.train()


@table("", stem=lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), setup=_head_in_train_mode,
       refused="train mode.*cf.freeze")  # fmt: skip
def batch_norm_in_train_mode(self: Any, x: Tensor) -> Any:
    """Frozen by flags alone: batch statistics still move."""
    return self.head(self.stem(x))


@table("", stem=lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.1)), setup=_head_in_train_mode,
       refused="train mode.*cf.freeze")  # fmt: skip
def dropout_in_train_mode(self: Any, x: Tensor) -> Any:
    """Frozen by flags alone: dropout still drops."""
    return self.head(self.stem(x))


table.add("chain_by_hand", _by_hand(Chain, "conv2.*", "norm2.*", "head.*"), images, "")
table.add("norm_weights_only", _by_hand(Chain, "norm2.*"), images, "")
table.add("masked_by_hand", _by_hand(Masked, "layers.2.*", "head.*"), masked_batch, "", tolerance=1e-5)
table.add("masked_late_frozen", _by_hand(Masked, "layers.1.norm1.*"), masked_batch, "", tolerance=1e-5)

TRAPS, REFUSED = table.traps, table.refused
