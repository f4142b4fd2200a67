"""``cachefreeze bench``: the table, the figures behind it, the plot, and that nothing else is written or left."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from cachefreeze.cli import main, plot
from cachefreeze.cli.digits import DigitsCNN
from cachefreeze.engine import Engine
from cachefreeze.freezing import freeze
from cachefreeze.isolation import RandomState
from cachefreeze.splitting import split
from cachefreeze.timings import Job, measure, steps, table, variants
from cachefreeze.timings.results import results
from cachefreeze.timings.variants import Variant

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

SMALL = ("--device", "cpu", "--samples", 20, "--batch-size", 8, "--rounds", 2)
VARIANTS = ["live", "frozen", "host", "hdf5", "ceiling"]


def run(capfd, *words):
    try:
        status = main(["bench", *(str(word) for word in words)])
    except SystemExit as error:
        status = error.code
    out, err = capfd.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of the digits network's weights, so that no test waits for its pretraining."""
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    save_file(DigitsCNN(classes=5).state_dict(), path)
    return ("--weights", path)


class Images(torch.utils.data.Dataset):
    """Ten random images of the digits' size, always the same."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.rand(3, 8, 8, generator=generator), index % 5


def job(**options):
    torch.manual_seed(0)
    live, frozen = DigitsCNN(classes=5), DigitsCNN(classes=5)
    frozen.load_state_dict(live.state_dict())
    freeze(frozen, "classifier", example_inputs=torch.rand(2, 3, 8, 8))
    return Job(live=live, frozen=frozen, samples=Images(), batch_size=4, rounds=2, facts={"data": "noise"}, **options)


def test_the_table_has_a_line_for_each_variant(capfd, tmp_path, weights):
    """On stdout and nothing else there; the rows that were written meanwhile are gone."""
    status, out, err = run(capfd, *SMALL, *weights, "--cache-dir", tmp_path)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert "digits_cnn on digits, trained from 'classifier': 20 samples, 3 batches of 8" in lines[0]
    assert "break-even" in lines[3]
    assert [line.split()[0] for line in lines[4:]] == VARIANTS
    assert list(tmp_path.iterdir()) == []


def test_json_is_one_object_and_the_plot_a_picture(capfd, tmp_path, weights):
    pytest.importorskip("matplotlib")
    path = tmp_path / "made" / "epochs.png"
    status, out, _ = run(
        capfd, *SMALL, *weights, "--json", "--plot", path, "--train-last", 1, "--epochs", 3, "--fills", 2
    )
    assert status == 0
    found = json.loads(out)
    config, rows = found["config"], found["variants"]
    assert (config["model"], config["data"], config["samples"], config["epochs"]) == ("digits_cnn", "digits", 20, 3)
    assert list(rows) == VARIANTS
    host = rows["host"]
    assert len(host["fills_seconds"]) == 2
    assert host["fill_seconds"] == statistics.median(host["fills_seconds"])
    assert host["total_seconds"] == pytest.approx(
        host["setup_seconds"] + host["fill_seconds"] + 2 * host["median_seconds"]
    )
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_prefix_is_the_tiers_alone(capfd, weights):
    """An optimized prefix makes their rows; what they are compared with runs the exact one."""
    status, out, err = run(capfd, *SMALL, *weights, "--prefix", "optimized", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["config"]["prefix"] == "optimized"
    made = []
    timed = replace(job(), prefix="optimized")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "Engine", lambda *args, **options: made.append(options) or Engine(*args, **options))
        for name, store in (("live", "off"), ("frozen", "off"), ("host", "host")):
            variants.through_engine(timed, name, store).close()
    assert [options["prefix"] for options in made] == ["exact", "exact", "optimized"]


def test_what_a_pretraining_says_is_no_result(capfd):
    """The digits' own network says that it is pretrained; with --json a script reads stdout."""
    status, out, err = run(capfd, "--device", "cpu", "--samples", 8, "--rounds", 1, "--json")
    assert status == 0
    assert json.loads(out)["config"]["model"] == "digits_cnn"
    assert err.startswith("pretraining")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rounds", 0), "expected 1 or more"),
        (("--workers", -1), "expected 1 or more"),
        (("--samples", "many"), "expected a whole number"),
        (("--model", "resnet19"), "no such model"),
        (("--data", "nowhere"), "no such folder"),
        (("--device", "tpu"), "--device tpu"),
        (("--plot", "."), "is a folder"),
        (("--train-from", "features.0"), "nothing to cache"),
        (("--train-from", "head"), "names no module"),
        (("--model", "resnet18", "--weights", "DEFAULT.pt"), "no such file"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(capfd, tmp_path, monkeypatch, weights, words, said):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capfd, *SMALL, *weights, *words)
    assert (status, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_without_matplotlib_it_says_so_before_it_measures(capfd, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    monkeypatch.setattr("cachefreeze.cli.bench.measure", None)  # would raise where it is called
    status, out, err = run(capfd, *SMALL, "--plot", tmp_path / "epochs.png")
    assert (status, out) == (2, "")
    assert "cachefreeze[plot]" in err


def test_measuring_leaves_models_and_random_states_as_they_were():
    """It trains copies; the caller's draws go on as if nothing had been timed."""
    timed = job(fills=2)
    states = [{k: v.clone() for k, v in model.state_dict().items()} for model in (timed.live, timed.frozen)]
    before, said = RandomState.capture(), []
    found = measure(timed, say=said.append)
    assert before.moved() == []
    assert len(said) == steps(timed)
    for model, state in zip((timed.live, timed.frozen), states, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for model in (timed.live, timed.frozen) for p in model.parameters())
    assert "DigitsCNN on noise" in table(found)


def test_what_is_compared_trained_the_same():
    """Tiers compute what the frozen variant computes, in the same order; nothing else is called equal to it."""
    rows = measure(job())["variants"]
    assert [name for name, row in rows.items() if row["losses_equal_frozen"]] == ["frozen", "host", "hdf5"]
    assert [row["sources"] for row in rows.values()] == [
        ["live"], ["frozen"], ["cached", "fill"], ["cached", "fill"], ["ceiling"],
    ]  # fmt: skip
    assert rows["host"]["store_bytes"] > 0


def told(seconds, *, setup=0.0, fill=None):
    """A variant of which everything was timed already."""
    fills = [] if fill is None else [fill]
    model = torch.nn.Linear(1, 1)
    return Variant("any", model, [], model, setup_seconds=setup, fill_seconds=fills, seconds=seconds, losses=[1.0])


def test_figures_from_times():
    """Medians; ratios within a round; a break-even once setup and fill are earned back; never if nothing is saved."""
    timed = job(epochs=4)
    timings = {
        "frozen": told([2.0, 10.0, 2.0]),
        "host": told([1.0, 5.0, 1.2], setup=3.0, fill=2.5),
        "hdf5": told([2.0, 10.0, 3.0], setup=3.0, fill=2.5),
        "cheap": told([1.0, 1.0, 1.0], fill=2.0),
        "ceiling": told([0.5, 2.5, 0.5]),
    }
    rows = results(timed, split(timed.frozen, torch.rand(3, 3, 8, 8)), timings, None)["variants"]
    assert rows["host"]["median_seconds"] == 1.2
    assert rows["host"]["to_frozen"] == 0.5
    assert rows["host"]["to_ceiling"] == 2.0
    assert rows["host"]["total_seconds"] == pytest.approx(3.0 + 2.5 + 3 * 1.2)
    assert rows["frozen"]["total_seconds"] == pytest.approx(4 * 2.0)
    # 3.5 s are owed after the first epoch, and 0.8 s saved by each further one
    assert rows["host"]["break_even_epoch"] == 1 + 5
    assert rows["hdf5"]["break_even_epoch"] is None
    assert rows["cheap"]["break_even_epoch"] == 1
    assert rows["frozen"]["break_even_epoch"] is None


def test_a_plot_of_a_results_file(tmp_path):
    """It is drawn from what was kept, and a place that cannot be written to is said."""
    pytest.importorskip("matplotlib")
    found = json.loads(json.dumps(measure(job())))
    plot.draw_timings(found, tmp_path / "epochs.png")
    assert (tmp_path / "epochs.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="cannot be written"):
        plot.draw_timings(found, tmp_path / "no" / "epochs.png")
