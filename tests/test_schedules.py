"""Schedules: the published formulas to the last digits, strict stages, adaptive policies, the timeline."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import cachefreeze as cf
from cachefreeze.cli import main
from cachefreeze.errors import ScheduleError
from cachefreeze.schedules import Clock, Decision, Ladder, advice, timeline

ROOT = Path(__file__).resolve().parents[1]

# blocks before the head: stem, 3 x 16 bottlenecks, 2 transitions; stem, 3 x 6 residual blocks; 13 convolutions
LAYERS = {"DenseNet-BC-100": 51, "WRN-40-4": 19, "VGG-16": 13}
POWERS = {"linear": 1, "squared": 2, "cubic": 3}


def ladder(body, head=1):
    return Ladder((*(f"block{i}" for i in range(body)), *(f"head{i}" for i in range(head))), head)


def clock(step, steps=1000, epochs=10):
    return Clock(step=step, steps=steps, epochs=epochs)


def names(*given):
    return Ladder(tuple(given))


# --- FreezeOut ---


@pytest.mark.parametrize("count", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("how", POWERS)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("t0", ["0.8", "0.5"])
def test_freezeout_is_the_published_formula(count, how, scaled, t0):
    """r_i in exact fractions, the step by its definition, rates by the paper's equation; all to 1e-12."""
    schedule = cf.FreezeOut(float(t0), how, scaled)
    exact = [(Fraction(t0) + (1 - Fraction(t0)) * Fraction(i, count)) ** POWERS[how] for i in range(count)]
    for got, expected in zip(schedule.ratios(count), exact, strict=True):
        assert abs(got - float(expected)) <= 1e-12
    steps, lr = 7820, 0.1
    blocks = ladder(count, head=2)
    freezes = [math.ceil(ratio * steps) for ratio in exact]
    moments = {0, 1, steps // 3, steps - 1} | {step + off for step in freezes for off in (-1, 0) if step < steps}
    for step in moments:
        decided = schedule.at(clock(step, steps, 20), blocks)
        assert decided.frozen == sum(step >= at for at in freezes)
        for i, ratio in enumerate([*map(float, exact), 1.0, 1.0]):
            base = lr / ratio if scaled else lr
            expected = 0.5 * base * (1 + math.cos(math.pi * (step / steps) / ratio)) if step / steps <= ratio else 0.0
            assert abs(lr * decided.factors[i] - expected) <= 1e-12


def test_freezeout_takes_t0_before_the_power():
    assert cf.FreezeOut().ratios(10)[0] == pytest.approx(0.512, abs=1e-15)
    shown = timeline(cf.FreezeOut(), ladder(10), steps=1000, epochs=10)
    assert shown.spans(0) == [(512, 1000)], "0.8 ** 3 is 0.512 and a bit in floating point; the step is 512"


def test_freezeout_never_freezes_the_head_and_rates_end_at_zero_only_with_the_run():
    blocks = ladder(4, head=2)
    last = cf.FreezeOut().at(clock(999), blocks)
    assert last.frozen == 4
    assert last.factors[:4] == (0.0,) * 4
    assert all(factor > 0 for factor in last.factors[4:])


def test_freezeout_without_annealing_decides_only_when():
    blocks, plain = ladder(5), cf.FreezeOut(anneal=False)
    for step in range(0, 1000, 37):
        decided = plain.at(clock(step), blocks)
        assert decided.frozen == cf.FreezeOut().frozen(clock(step), blocks)
        assert decided.factors == tuple(float(i >= decided.frozen) for i in range(6))


@pytest.mark.parametrize(
    "wrong",
    [
        {"t0": 0},
        {"t0": 1.1},
        {"t0": "0.8"},
        {"t0": math.nan},
        {"how": "quartic"},
        {"how": ["cubic"]},
        {"scale_lr": "no"},
        {"anneal": 0},
    ],
)
def test_freezeout_refuses_nonsense(wrong):
    with pytest.raises(ScheduleError, match=next(iter(wrong))):
        cf.FreezeOut(**wrong)


def freezeout_table():
    """The table of docs/freezing.md, from the formulas as they are written there."""
    lines = [
        "| network | L | curve | first block | middle block | last block | step of the first, of 78,200 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, count in LAYERS.items():
        for how, power in POWERS.items():
            r = [(Fraction(4, 5) + Fraction(1, 5) * Fraction(i, count)) ** power for i in range(count)]
            cells = " | ".join(f"{float(r[i]):.4f}" for i in (0, count // 2, count - 1))
            lines.append(f"| {name} | {count} | {how} | {cells} | {math.ceil(r[0] * 78200):,} |")
    return "\n".join(lines)


def test_the_table_in_the_docs_is_what_freezeout_does():
    assert freezeout_table() in (ROOT / "docs" / "freezing.md").read_text()
    for count in LAYERS.values():
        for how, power in POWERS.items():
            got = cf.FreezeOut(how=how).ratios(count)
            assert got[count // 2] == pytest.approx(float((0.8 + 0.2 * (count // 2) / count) ** power), abs=1e-12)


# --- the ladder ---


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.b(self.a(x).relu())


class PreActivation(nn.Module):
    """The final norm is registered first, so that registration order would put it there."""

    def __init__(self, *, deep=True):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Residual(), Residual()]) if deep else nn.ModuleList([nn.Linear(4, 4)])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def test_a_final_norm_belongs_to_the_head():
    found = Ladder.of(PreActivation(), torch.randn(2, 4))
    assert found == Ladder(("stem", "blocks.0", "blocks.1", "norm", "head"), head=2)
    assert found.body == 3
    assert Ladder.of(PreActivation()) == found, "also when the order is read from a trace"


def test_a_norm_behind_a_single_layer_belongs_to_that_layer():
    assert Ladder.of(PreActivation(deep=False), torch.randn(2, 4)) == Ladder(("stem", "blocks", "head"))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_all_but_last_freezes_what_train_last_freezes(count):
    model = PreActivation()
    blocks = Ladder.of(model, torch.randn(2, 4))
    boundary = blocks.boundary(cf.AllButLast(count).frozen(clock(0), blocks))
    other = PreActivation()
    if boundary is not None:
        cf.freeze(model, boundary)
    cf.freeze(other, train_last=count) if count < 4 else None
    flags = [[p.requires_grad for p in m.parameters()] for m in (model, other)]
    assert flags[0] == flags[1]


def test_every_block_is_a_boundary_that_freeze_takes():
    for frozen in range(1, 5):
        model = PreActivation()
        blocks = Ladder.of(model, torch.randn(2, 4))
        cf.freeze(model, blocks.boundary(frozen), example_inputs=torch.randn(2, 4))
        trains = [
            model.get_submodule(n).weight.requires_grad for n in ("stem", "blocks.0.a", "blocks.1.b", "norm", "head")
        ]
        assert trains == [i >= frozen for i in range(5)]


# --- rules ---


def test_all_but_last_starts_when_it_is_told_to():
    schedule, blocks = cf.AllButLast(2, start=0.3), ladder(6)
    assert [schedule.frozen(clock(step), blocks) for step in (0, 299, 300, 999)] == [0, 0, 5, 5]
    with pytest.raises(ScheduleError, match="expected 1 to 7"):
        cf.AllButLast(8).check(clock(0), blocks)


def test_gradual_unfreezing_thaws_from_the_last_block_to_the_first():
    schedule, blocks = cf.GradualUnfreezing(every=1.5, decay=2.6), ladder(3, head=2)
    assert [schedule.frozen(clock(step), blocks) for step in (0, 149, 150, 299, 300, 449, 450, 999)] == [
        3, 3, 2, 2, 1, 1, 0, 0,
    ]  # fmt: skip
    factors = schedule.factors(clock(300), blocks)
    assert factors == pytest.approx((0, 2.6**-2, 2.6**-1, 1, 1), abs=1e-15)


def test_freezing_at_zero_rate_needs_a_rate_first_and_is_for_ever():
    schedule, blocks = cf.FreezeAtZeroLR(), ladder(3)
    seen = []
    for rates in ((0, 0, 0, 0), (0.1, 0, 1, 1), (0, 0, 0, 1), (0, 0.1, 0, 1), (0, 0, 0, 1), (1, 1, 1, 1), (0, 0, 0, 0)):
        schedule.observe(clock(1), blocks, rates)
        seen.append(schedule.at(clock(1), blocks).frozen)
    # a warm-up freezes nothing; a block that is still behind one that trains waits; the head never freezes
    assert seen == [0, 0, 1, 1, 3, 3, 3]
    again = cf.FreezeAtZeroLR()
    again.load_state_dict(schedule.state_dict())
    assert again.state_dict() == schedule.state_dict()
    with pytest.raises(ScheduleError, match="expected one each"):
        schedule.observe(clock(1), blocks, [0.1])


# --- stages ---

RESNET = names("conv1", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "fc")


def test_stages_from_python_and_yaml_are_the_same(tmp_path):
    file = tmp_path / "stages.yaml"
    file.write_text(
        "0: {epochs: 3}\n1: {modules: [conv1, 'layer1*'], epochs: 2.5, lr_factor: 0.5}\n2:\n  train_from: fc\n"
    )
    stages = cf.Stages.from_yaml(file)
    assert stages == cf.Stages(
        [cf.Stage(epochs=3), {"modules": ["conv1", "layer1*"], "epochs": 2.5, "lr_factor": 0.5}, {"train_from": "fc"}]
    )
    stages.check(clock(0), RESNET)
    assert [stages.frozen(clock(s), RESNET) for s in (0, 299, 300, 549, 550, 999)] == [0, 0, 3, 3, 5, 5]
    assert stages.at(clock(400), RESNET) == Decision(3, (0, 0, 0, 0.5, 0.5, 0.5))
    file.write_text(stages.to_yaml())
    assert cf.Stages.from_yaml(file) == stages


def test_stages_by_container_number_and_transition_epoch():
    stages = cf.Stages([{"train_from": "layer2", "max_transition_epoch": 4}, {"train_last": 1}])
    stages.check(clock(0), RESNET)
    assert [stages.frozen(clock(s), RESNET) for s in (0, 399, 400)] == [3, 3, 5]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "at least one"),
        ([{"train_from": "fc", "train_last": 1}], "stage 0: train_from and train_last contradict"),
        ([{"epochs": 1, "max_transition_epoch": 1}], "contradict"),
        ([{"trainfrom": "fc"}], "unknown trainfrom: expected train_from"),
        ([{"lr": 0.1}], "lr_factor"),
        ([{"lr_factor": "1e-3"}], "is text"),
        ([{"lr_factor": 0}], "above 0"),
        ([{"epochs": True}, {}], "expected a number"),
        ([{"epochs": -1}, {}], "above 0"),
        ([{"train_from": ""}], "name of a block"),
        ([{"modules": "conv1"}], "list of names"),
        ([{"modules": ["conv1", "layer1*", "conv1"]}], "'conv1' is there twice"),
        (5, "a list of stages"),
        ([{"train_last": 1.5}], "whole number"),
        ([{}, {"train_from": "fc"}], "stage 1 is never reached"),
        ([{"epochs": 4}, {"max_transition_epoch": 4}, {}], "stage 1 is never reached"),
        (["fc"], "expected a mapping"),
    ],
)
def test_stages_refuse_what_contradicts_itself(stages, message):
    with pytest.raises(ScheduleError, match=message):
        cf.Stages(stages)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"train_from": "layer9"}], "stage 0: 'layer9' is no block"),
        ([{"train_from": "layer"}], "is no block"),
        ([{"modules": ["layr*"]}], "matches no block"),
        ([{"modules": ["conv1", "layer2*"]}], "layer2.0, layer2.1 behind 'layer1.0'"),
        ([{"modules": ["*"]}], "leaves nothing to train"),
        ([{"train_last": 7}], "expected 1 to 6"),
        ([{"epochs": 10}, {"train_from": "fc"}], "stage 1 is never reached"),
        ([{"epochs": 2.991}, {"epochs": 0.005}, {}], "stage 1 is never reached"),
        ([{"epochs": 3}, {"epochs": 4}], "the stages end at epoch 7, the run at epoch 10"),
    ],
)
def test_stages_refuse_what_the_model_or_the_run_cannot_do(stages, message):
    with pytest.raises(ScheduleError, match=message):
        cf.Stages(stages).check(clock(0), RESNET)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0: {epochs: 1}\n2: {}\n", "stages 0, 2: expected 0, 1, 2"),
        ("1: {}\n", "without a gap"),
        ("'0': {}\n", "without a gap"),
        ("0: {epochs: 1}\n0: {}\n", "0 is there twice"),
        ("0: {epochs: 1, epochs: 2}\n1: {}\n", "'epochs' is there twice"),
        ("- {epochs: 1}\n", "by number"),
        ("0: {epochs: [", "is no YAML"),
        ("0: !!python/object/apply:os.getcwd []\n", "is no YAML"),
        ("", "by number"),
    ],
)
def test_yaml_is_read_strictly_and_errors_name_the_file(tmp_path, text, message):
    file = tmp_path / "s.yaml"
    file.write_text(text)
    with pytest.raises(ScheduleError, match=message) as caught:
        cf.Stages.from_yaml(file)
    assert str(file) in str(caught.value)
    with pytest.raises(ScheduleError, match="cannot be read"):
        cf.Stages.from_yaml(tmp_path / "missing.yaml")


@pytest.mark.parametrize("epochs", [2, 3, 10, 31])
@pytest.mark.parametrize("body", [1, 2, 9])
@pytest.mark.parametrize("moves", [1, 3, 8])
def test_a_generated_first_schedule_is_valid_and_takes_its_own_advice(epochs, body, moves):
    blocks = ladder(body, head=2)
    first = cf.Stages.first(blocks, epochs=epochs, moves=moves)
    shown = timeline(first, blocks, steps=epochs * 7, epochs=epochs)
    assert advice(shown) == []
    assert shown.moves[0] == (0, 0)
    assert shown.moves[-1][1] == body
    assert len(shown.moves) == 1 + min(moves, body, epochs - max(1, round(epochs / 5)))


# --- adaptive ---


def drift(steps, size, seed=0):
    """Activations that move by ``size[t]`` of a fixed direction at check t."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randn(8, 16, generator=generator)
    for at in range(steps):
        place = place + size(at) * torch.randn(8, 16, generator=generator)
        yield place


def test_similarity_is_that_of_the_formula():
    from cachefreeze.schedules.plasticity import similarity, slope

    x = torch.randn(5, 2, 3)
    rows = [[float((a * b).sum()) for b in x] for a in x]
    expected = torch.tensor(
        [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in rows], dtype=torch.float64
    )
    assert torch.allclose(similarity(x), expected, atol=1e-6)
    assert slope([1, 3, 5, 7]) == pytest.approx(2)
    assert slope([4, 1, 0, 1, 4]) == pytest.approx(0)


def test_plasticity_freezes_the_front_block_once_it_settles_and_not_before():
    schedule, blocks = cf.Plasticity(window=4, patience=2, start=0.0), ladder(2)
    checks = []
    for at, x in enumerate(drift(60, lambda t: 0.5 * 0.8**t)):
        assert schedule.front(blocks) == "block0"
        schedule.observe(clock(at, 60, 10), blocks, x)
        checks.append(schedule.frozen(clock(at, 60, 10), blocks))
        if checks[-1]:
            break
    assert 4 + 2 <= checks.index(1) < 59, "a window, two calm checks, and then at last"
    assert schedule.front(blocks) == "block1"


def test_plasticity_does_not_freeze_what_keeps_accelerating():
    schedule, blocks = cf.Plasticity(window=4, start=0.0), ladder(2)
    for at, x in enumerate(drift(30, lambda t: 0.02 * 1.2**t)):
        schedule.observe(clock(at, 30, 10), blocks, x)
    assert schedule.frozen(clock(29, 30, 10), blocks) == 0


def test_plasticity_waits_for_its_start_and_spares_the_head():
    schedule, blocks = cf.Plasticity(window=2, patience=1, start=0.5), ladder(1)
    x = torch.randn(4, 3)
    for step in range(0, 500, 50):
        schedule.observe(clock(step), blocks, x)
        assert schedule.frozen(clock(step), blocks) == 0
    schedule.observe(clock(500), blocks, x)
    assert schedule.frozen(clock(500), blocks) == 1
    assert schedule.front(blocks) is None
    with pytest.raises(ScheduleError, match="nothing left"):
        schedule.observe(clock(501), blocks, x)


def test_plasticity_thaws_when_the_learning_rate_drops():
    schedule, blocks = cf.Plasticity(window=2, patience=1, start=0.0, thaw=0.1), ladder(1)
    x = torch.randn(4, 3)
    for step in range(4):
        schedule.observe(clock(step), blocks, x, rate=0.1)
    assert schedule.frozen(clock(4), blocks) == 1
    schedule.observe(clock(5), blocks, x, rate=0.05)
    assert schedule.frozen(clock(5), blocks) == 1
    schedule.observe(clock(6), blocks, x, rate=0.01)
    assert schedule.frozen(clock(6), blocks) == 0
    with pytest.raises(ScheduleError, match="pass rate="):
        schedule.observe(clock(7), blocks, x)


def test_plasticity_goes_on_after_a_resume_as_if_it_had_not_stopped(tmp_path):
    def run(stop):
        schedule, blocks, seen = cf.Plasticity(window=3, start=0.0), ladder(4), []
        for at, x in enumerate(drift(40, lambda t: 0.7**t)):
            if at == stop:
                torch.save(schedule.state_dict(), tmp_path / "s.pt")
                schedule = cf.Plasticity(window=3, start=0.0)
                schedule.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
            if schedule.front(blocks) is not None:
                schedule.observe(clock(at, 40, 10), blocks, x)
            seen.append(schedule.frozen(clock(at, 40, 10), blocks))
        return seen

    expected = run(None)
    assert expected[-1] > 1
    assert all(run(stop) == expected for stop in range(1, 40, 3))


def test_gradient_change_freezes_leading_blocks_under_the_percentile():
    schedule, blocks = cf.GradientChange(50, start=0.0), ladder(4)
    schedule.observe(clock(1), blocks, [10, 10, 10, 10, 10])
    assert schedule.frozen(clock(1), blocks) == 0, "a change needs two intervals"
    schedule.observe(clock(2), blocks, [9.9, 9.8, 5, 9.95, 3])  # 1 %, 2 %, 50 %, 0.5 %, 70 %: the median is 2 %
    assert schedule.frozen(clock(2), blocks) == 1, "the second is not under the median"
    schedule.observe(clock(3), blocks, [0, 9.7, 4.9, 5, 1])  # 1 %, 2 %, 50 %, 67 %: the median is 26 %
    assert schedule.frozen(clock(3), blocks) == 3
    other = cf.GradientChange(50, start=0.0)
    other.load_state_dict(schedule.state_dict())
    assert other.state_dict() == schedule.state_dict()


def test_gradient_change_waits_for_its_start():
    schedule, blocks = cf.GradientChange(99, start=0.5), ladder(2)
    for step in (1, 2, 499):
        schedule.observe(clock(step), blocks, [1, 1, 5 + step])
        assert schedule.frozen(clock(step), blocks) == 0
    schedule.observe(clock(500), blocks, [1, 1, 9])
    assert schedule.frozen(clock(500), blocks) == 2


def test_a_state_of_another_schedule_is_refused():
    with pytest.raises(ScheduleError, match="resume with the same schedule"):
        cf.FreezeOut(0.7).load_state_dict(cf.FreezeOut().state_dict())
    cf.FreezeOut().load_state_dict(cf.FreezeOut().state_dict())


def test_adaptive_schedules_have_nothing_to_show_beforehand():
    for schedule in (cf.FreezeAtZeroLR(), cf.Plasticity(), cf.GradientChange()):
        with pytest.raises(ScheduleError, match="nothing to show"):
            timeline(schedule, ladder(3), steps=10, epochs=1)


# --- timeline, advice, command line ---


def test_a_timeline_says_what_the_schedule_decides_at_every_step():
    schedule, blocks = cf.GradualUnfreezing(every=0.7), ladder(5)
    shown = timeline(schedule, blocks, steps=100, epochs=10, samples=7)
    for step in range(100):
        frozen = [any(a <= step < b for a, b in shown.spans(i)) for i in range(6)]
        assert frozen == [i < schedule.frozen(clock(step, 100), blocks) for i in range(6)]
    for step, factors in zip(shown.steps, shown.factors, strict=True):
        assert factors == schedule.factors(clock(step, 100), blocks)


def test_a_long_run_is_shown_at_once():
    """Moves are found by bisection: as the schedule decides, at the very step, however many steps there are."""
    steps = 23 * 10**8
    shown = timeline(cf.FreezeOut(), ladder(5), steps=steps, epochs=10**8)
    run = Clock(step=0, steps=steps, epochs=10**8)
    assert [step for step, _ in shown.moves] == [0, *(run.step_of(r) for r in cf.FreezeOut().ratios(5))]
    stages = cf.Stages([{"train_from": "fc", "epochs": 2}, {"epochs": 1}, {"train_from": "layer2.0"}])
    assert [step for step, _ in timeline(stages, RESNET, steps=steps, epochs=10**8).moves] == [0, 46, 69]
    for schedule in (cf.FreezeOut(), cf.GradualUnfreezing(every=300), cf.AllButLast(2, start=0.3)):
        shown = timeline(schedule, ladder(6), steps=9_000, epochs=1_000)
        each = [schedule.frozen(Clock(step=step, steps=9_000, epochs=1_000), ladder(6)) for step in range(9_000)]
        changes = [(step, now) for step, (then, now) in enumerate(pairwise(each), 1) if then != now]
        assert shown.moves == ((0, each[0]), *changes)


def test_a_block_that_thaws_and_freezes_again_has_two_spans():
    stages = cf.Stages([{"train_from": "fc", "epochs": 2}, {"epochs": 3}, {"train_from": "layer2.0"}])
    shown = timeline(stages, RESNET, steps=100, epochs=10)
    assert shown.spans(0) == [(0, 20), (50, 100)]
    assert shown.spans(3) == [(0, 20)]
    assert re.search(r"conv1 +0-20, 50- +0.00-2.00, 5.00- ", shown.table())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (cf.FreezeOut(), []),
        (cf.FreezeOut(t0=0.4), ["'block0' freezes at step 64 of 1000 (6.4%), before a tenth"]),
        (cf.FreezeOut(t0=1.0), ["nothing is ever frozen"]),
        (cf.Stages([{}]), ["nothing is ever frozen"]),
        (cf.AllButLast(1), []),
        (cf.AllButLast(2, start=0.05), ["before a tenth"]),
        (cf.GradualUnfreezing(every=0.5), []),
    ],
)
def test_advice(schedule, expected):
    got = advice(timeline(schedule, ladder(5), steps=1000, epochs=10))
    assert len(got) == len(expected)
    assert all(text in sentence for text, sentence in zip(expected, got, strict=True))


def test_plan_prints_the_table_and_warns(capsys):
    assert main(["plan", "--schedule", "freezeout", "--t0", "0.4", "--epochs", "10", "--lr", "0.1"]) == 0
    printed = capsys.readouterr()
    assert re.search(r"features.0 +8- +0.67- +6.7%- +1.56 ", printed.out), "0.1 / 0.4 ** 3 at the first step"
    assert "before a tenth of training" in printed.err
    assert main(["plan", "--schedule", "freezeout", "--unscaled", "--how", "linear", "--lr", "0.1"]) == 0
    assert re.search(r"features.0 +96- .* 0.1 ", capsys.readouterr().out)


def test_plan_writes_a_first_schedule_and_shows_it_again(tmp_path, capsys):
    file = tmp_path / "new" / "first.yaml"
    assert main(["plan", "--write", str(file), "--epochs", "10"]) == 0
    table = capsys.readouterr().out
    assert main(["plan", "--schedule", str(file), "--epochs", "10"]) == 0
    assert capsys.readouterr().out == table
    assert main(["plan", "--write", str(file)]) == 2
    assert "such a file already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "freezout"], "freezout cannot be read"),
        (["--schedule", "{file}", "--t0", "0.5"], "are for --schedule freezeout"),
        (["--schedule", "{file}", "--epochs", "2"], "never reached"),
        (["--schedule", "freezeout", "--t0", "2"], "t0=2.0"),
        (["--schedule", "freezeout", "--plot", "{folder}"], "is a folder"),
    ],
)
def test_plan_says_in_one_line_what_is_wrong(tmp_path, capsys, arguments, message):
    file = tmp_path / "s.yaml"
    file.write_text("0: {epochs: 5}\n1: {train_last: 1}\n")
    assert main(["plan", *(a.format(file=file, folder=tmp_path) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_plan_draws(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "new" / "s.png"
    assert main(["plan", "--schedule", "freezeout", "--plot", str(file)]) == 0
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_plan_without_matplotlib_says_what_to_install(tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plan", "--schedule", "freezeout", "--plot", str(tmp_path / "s.png")]) == 2
    assert 'pip install "cachefreeze[plot]"' in capsys.readouterr().err
