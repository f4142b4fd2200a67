"""Stages: what is frozen, for how long and at which learning rate, written down one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from cachefreeze.errors import ScheduleError
from cachefreeze.schedules.base import Clock, Ladder, Schedule, in_range, whole

# Share of a generated schedule during which everything trains: freezing before a tenth of training costs accuracy.
_LIVE_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage. Without ``train_from``, ``train_last`` and ``modules`` everything trains.

    Args:
        train_from: The first block to train, or a module that holds whole blocks.
        train_last: Train the last N blocks, counted as ``cf.freeze(train_last=N)`` counts them.
        modules: Names or patterns of the blocks to freeze; together they must be the leading ones.
        epochs: How long the stage lasts, in epochs or a fraction; the last stage lasts as long as the run.
        max_transition_epoch: Instead of ``epochs``: when the next stage begins, counted from the start of the run.
        lr_factor: What the learning rate of all that trains is multiplied with.
    """

    train_from: str | None = None
    train_last: int | None = None
    modules: Sequence[str] | None = None
    epochs: float | None = None
    max_transition_epoch: float | None = None
    lr_factor: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.modules, list):
            object.__setattr__(self, "modules", tuple(self.modules))
        _at_most_one(self, "train_from", "train_last", "modules")
        _at_most_one(self, "epochs", "max_transition_epoch")
        if self.train_from is not None and (not isinstance(self.train_from, str) or not self.train_from):
            raise ScheduleError(f"train_from={self.train_from!r}: expected the name of a block")
        if self.train_last is not None:
            whole("train_last", self.train_last, 1)
        if self.modules is not None and not (
            isinstance(self.modules, tuple) and self.modules and all(isinstance(name, str) for name in self.modules)
        ):
            raise ScheduleError(f"modules={self.modules!r}: expected a list of names or patterns")
        twice = next((name for name in self.modules or () if list(self.modules or ()).count(name) > 1), None)
        if twice is not None:
            raise ScheduleError(f"modules={list(self.modules or ())}: {twice!r} is there twice")
        for name in ("epochs", "max_transition_epoch"):
            if getattr(self, name) is not None:
                in_range(name, getattr(self, name), 0, 1e9, low_open=True)
        in_range("lr_factor", self.lr_factor, 0, 1e9, low_open=True)

    @classmethod
    def from_mapping(cls, entries: Mapping[str, Any]) -> Stage:
        """A stage from its entries, as YAML has them.

        Raises:
            ScheduleError: An entry is unknown, or its value is not what it should be.
        """
        if not isinstance(entries, Mapping):
            raise ScheduleError(f"{entries!r}: expected a mapping such as {{train_from: layer4, epochs: 5}}")
        known = [field.name for field in fields(cls)]
        unknown = [str(key) for key in entries if key not in known]
        if unknown:
            hint = "; rates are relative to the optimizer's: lr_factor" if "lr" in unknown else ""
            raise ScheduleError(f"unknown {', '.join(unknown)}: expected {', '.join(known)}{hint}")
        for name in ("epochs", "max_transition_epoch", "lr_factor"):
            if isinstance(entries.get(name), str):
                raise ScheduleError(
                    f"{name}={entries[name]!r} is text; YAML reads 1.0e-3 as a number, but 1e-3 as text"
                )
        return cls(**entries)

    def frozen(self, ladder: Ladder) -> int:
        """How many leading blocks this stage freezes.

        Raises:
            ScheduleError: A name or pattern matches no block, or what it freezes is not the beginning of the model.
        """
        if self.train_from is not None:
            return ladder.before(self.train_from)
        if self.train_last is not None:
            return ladder.before_last(self.train_last)
        if self.modules is None:
            return 0
        found = {index for pattern in self.modules for index in _matching(pattern, ladder)}
        if found == set(range(len(ladder))):
            raise ScheduleError(f"modules={list(self.modules)} leaves nothing to train. {ladder.sentence()}")
        gap = next(index for index in range(len(ladder)) if index not in found)
        beyond = [ladder.names[index] for index in sorted(found) if index > gap]
        if beyond:
            raise ScheduleError(
                f"modules={list(self.modules)} freezes {', '.join(beyond[:3])} behind {ladder.names[gap]!r}, which "
                f"trains: only leading blocks can be cached. {ladder.sentence()}"
            )
        return gap

    def as_mapping(self) -> dict[str, Any]:
        """What :meth:`from_mapping` takes: the entries that say something."""
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        said["modules"] = None if self.modules is None else list(self.modules)
        return {key: value for key, value in said.items() if value is not None and (key, value) != ("lr_factor", 1.0)}


@dataclass(frozen=True)
class Stages(Schedule):
    """Stages in a row, as a list of :class:`Stage` or of mappings, or from YAML.

    Args:
        stages: In order. All but the last say when they end.

    Raises:
        ScheduleError: A stage contradicts itself or can never be reached.
    """

    stages: tuple[Stage, ...]

    def __init__(self, stages: Sequence[Stage | Mapping[str, Any]]) -> None:
        if not stages or isinstance(stages, str | Mapping) or not isinstance(stages, Sequence):
            raise ScheduleError(f"stages={stages!r}: expected a list of stages, at least one")
        made = []
        for number, stage in enumerate(stages):
            try:
                made.append(stage if isinstance(stage, Stage) else Stage.from_mapping(stage))
            except ScheduleError as error:
                raise ScheduleError(f"stage {number}: {error}") from None
        object.__setattr__(self, "stages", tuple(made))
        self._ends()

    @classmethod
    def from_mapping(cls, mapping: Mapping[Any, Any]) -> Stages:
        """Stages by number: ``{0: {epochs: 5}, 1: {train_from: layer3}}``.

        Raises:
            ScheduleError: The numbers are not 0, 1, 2, …, or a stage is wrong.
        """
        if not isinstance(mapping, Mapping):
            raise ScheduleError(f"expected stages by number (0: …, 1: …), got {type(mapping).__name__}")
        keys = list(mapping)
        if any(not isinstance(key, int) or isinstance(key, bool) for key in keys) or sorted(keys) != [
            *range(len(keys))
        ]:
            raise ScheduleError(f"stages {', '.join(map(str, keys))}: expected 0, 1, 2, … without a gap")
        return cls([mapping[number] for number in range(len(keys))])

    @classmethod
    def from_yaml(cls, path: str | Path) -> Stages:
        """Read stages from a YAML file; a key that is there twice is an error, not the last one's value.

        Raises:
            ScheduleError: The file cannot be read, is no YAML, or holds wrong stages; names the file.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ScheduleError(f"{path} cannot be read ({error}); expected a YAML file of stages") from error
        try:
            return cls.from_mapping(yaml.load(text, _Strict))
        except yaml.YAMLError as error:
            raise ScheduleError(f"{path} is no YAML ({' '.join(str(error).split())})") from error
        except ScheduleError as error:
            raise ScheduleError(f"{path}: {error}") from None

    def to_yaml(self) -> str:
        """The text that :meth:`from_yaml` reads."""
        numbered = {number: stage.as_mapping() for number, stage in enumerate(self.stages)}
        text: str = yaml.safe_dump(numbered, sort_keys=False)
        return text

    @classmethod
    def first(cls, ladder: Ladder, *, epochs: int, moves: int = 3) -> Stages:
        """A first schedule for a model, to be edited: a fifth of the run all trains, then it freezes in equal moves.

        Args:
            ladder: The model's blocks.
            epochs: Of the run; at least 2, so that there is a stage before and one after the freeze.
            moves: How often the boundary moves; fewer where the model or the run is too short for them.
        """
        whole("epochs", epochs, 2)
        whole("moves", moves, 1)
        if ladder.body < 1:
            raise ScheduleError(f"a model of one block has nothing to freeze. {ladder.sentence()}")
        live = max(1, round(_LIVE_SHARE * epochs))
        moves = min(moves, ladder.body, epochs - live)
        starts = [0, *(live + (epochs - live) * move // moves for move in range(moves))]
        boundaries = [None, *(ladder.boundary(ladder.body * (move + 1) // moves) for move in range(moves))]
        lengths: list[int | None] = [after - before for before, after in pairwise(starts)]
        return cls(
            [Stage(train_from=name, epochs=length) for name, length in zip(boundaries, [*lengths, None], strict=True)]
        )

    def check(self, clock: Clock, ladder: Ladder) -> None:
        """Refuse names that the model has not, and stages that the run does not reach."""
        for number, stage in enumerate(self.stages):
            try:
                stage.frozen(ladder)
            except ScheduleError as error:
                raise ScheduleError(f"stage {number}: {error}") from None
        starts = [clock.step_of_epoch(start) for start in (0.0, *self._ends()[:-1])] + [clock.steps]
        for number, (begins, ends) in enumerate(pairwise(starts)):
            if begins >= ends:
                raise ScheduleError(
                    f"stage {number} is never reached: it would begin at step {begins} and the next one, or the end of "
                    f"the run, is at step {ends} ({clock.epochs} epochs of {clock.steps // clock.epochs} steps)"
                )
        end = self._ends()[-1]
        if end is not None and abs(end - clock.epochs) > 1e-9:
            raise ScheduleError(
                f"the stages end at epoch {end:g}, the run at epoch {clock.epochs}; leave the length of the last stage "
                "out, or make them equal"
            )

    @property
    def drives_rates(self) -> bool:
        """Where a stage has a factor."""
        return any(stage.lr_factor != 1 for stage in self.stages)

    def number(self, clock: Clock) -> int:
        """Which stage runs now."""
        return sum(clock.step >= clock.step_of_epoch(end) for end in self._ends()[:-1])

    def turns(self, clock: Clock) -> list[int]:
        """Where stages begin."""
        return [clock.step_of_epoch(end) for end in self._ends()[:-1]]

    def frozen(self, clock: Clock, ladder: Ladder) -> int:
        """What the stage freezes that runs now."""
        return self.stages[self.number(clock)].frozen(ladder)

    def factors(self, clock: Clock, ladder: Ladder) -> tuple[float, ...]:
        """The stage's factor for all that trains."""
        stage = self.stages[self.number(clock)]
        frozen = stage.frozen(ladder)
        return tuple(stage.lr_factor if index >= frozen else 0.0 for index in range(len(ladder)))

    def _ends(self) -> list[Any]:
        """The epoch at which each stage ends; None where the last one does not say.

        Raises:
            ScheduleError: A stage ends before it begins, or never, so that a later one is unreachable.
        """
        ends: list[float | None] = []
        begins = 0.0
        for number, stage in enumerate(self.stages):
            end = stage.max_transition_epoch if stage.epochs is None else begins + stage.epochs
            if end is None and number < len(self.stages) - 1:
                raise ScheduleError(
                    f"stage {number} does not say when it ends, so stage {number + 1} is never reached; give it "
                    "epochs= or max_transition_epoch="
                )
            if end is not None and end <= begins:
                raise ScheduleError(
                    f"stage {number} is never reached: it begins at epoch {begins:g} and max_transition_epoch={end:g}"
                )
            ends.append(end)
            begins = end if end is not None else begins
        return ends


class _Strict(yaml.SafeLoader):  # type: ignore[misc]  # it ships no types
    """A SafeLoader that refuses a key given twice in one mapping."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """As the parent's, with every key once."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if twice is not None:
            raise ScheduleError(f"{twice!r} is there twice, line {node.start_mark.line + 1} and below")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def _matching(pattern: str, ladder: Ladder) -> list[int]:
    """Blocks whose name, or that of a module above them, matches."""
    found = [
        index
        for index, name in enumerate(ladder.names)
        if any(fnmatchcase(".".join(name.split(".")[: depth + 1]), pattern) for depth in range(name.count(".") + 1))
    ]
    if not found:
        raise ScheduleError(f"modules={pattern!r} matches no block. {ladder.sentence()}")
    return found


def _at_most_one(stage: Stage, *names: str) -> None:
    given = [name for name in names if getattr(stage, name) is not None]
    if len(given) > 1:
        raise ScheduleError(f"{' and '.join(given)} contradict each other; give one of them")
