"""CacheManager: filling, repairing, sharing, refusing; and what the engine refuses."""

from __future__ import annotations

import multiprocessing
import os
import struct
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze as cf
from cachefreeze.errors import FreezeError, RowValueError, StaleCacheError, StoreError, StoreSpaceError, UsageError
from cachefreeze.isolation import RandomState


class Scale(nn.Module):
    """Rounds alike in every batch, which a small matrix product does not."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return x * self.weight


def make_model(scale=1.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(Scale(6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight.mul_(scale)
    cf.freeze(model, "3")
    return model


def make_data(count=40):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(count, 6, generator=generator), torch.randint(0, 3, (count,), generator=generator))


def make_manager(store="host", **options):
    model = make_model(options.pop("scale", 1.0))
    parts = cf.split(model, make_data().tensors[0][:4])
    return cf.CacheManager(parts, store, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_fill_computes_every_row_once_and_draws_nothing(workers, tmp_path):
    manager = make_manager(f"hdf5:{tmp_path}")
    state = RandomState.capture()
    loader = manager.loader(DataLoader(make_data(), 16, shuffle=True, num_workers=workers))
    seen = []
    report = manager.fill(loader, seen.append)
    assert (report.rows, report.computed_rows, sum(seen)) == (40, 40, 40)
    assert manager.fill(loader).computed_rows == 0
    assert state.moved() == []
    list(loader)
    assert (loader.source, loader.counts.computed) == ("cached", 0)
    assert manager.verify() == {"train": []}
    assert manager.info()["train"]["rows_present"] == 40


def flip(path, store, row):
    """Flip one bit of a row's activations on disk."""
    header = path.read_bytes()
    values = store.read(torch.tensor([row]))["activation.0"].numpy().tobytes()
    position = header.index(values)
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def test_a_damaged_row_is_computed_again_and_counted(tmp_path):
    manager = make_manager(f"hdf5:{tmp_path}")
    loader = manager.loader(DataLoader(make_data(), 16))
    whole = [(rows.tensors[0].clone(), y) for rows, y in loader]
    path = next(tmp_path.glob("*.h5"))
    flip(path, loader.rows.store, 17)
    manager.close()
    manager = make_manager(f"hdf5:{tmp_path}")
    loader = manager.loader(DataLoader(make_data(), 16))
    assert [bad.row for bad in manager.verify()["train"]] == [17]
    for (rows, y), (expected, labels) in zip(loader, whole, strict=True):
        assert torch.equal(rows.tensors[0], expected)
        assert torch.equal(y, labels)
    assert (loader.counts.computed, loader.counts.repaired, loader.counts.cached) == (1, 1, 39)
    assert manager.verify() == {"train": []}, "the row was written again"


HOLDER = """
import sys, torch
sys.path[:0] = {path!r}
from test_manager import make_manager, make_data
from torch.utils.data import DataLoader
torch.set_num_threads(1)
manager = make_manager("hdf5:{folder}")
loader = manager.loader(DataLoader(make_data(), 8))
next(iter(loader))
print("holding", flush=True)
sys.stdin.read()
"""


def test_a_second_process_fills_on(tmp_path):
    """It takes the rows that are there, adds the others, and the first process finds them."""
    code = textwrap.dedent(HOLDER).format(path=[str(p) for p in sys.path], folder=tmp_path)
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline().strip() == b"holding"
        manager = make_manager(f"hdf5:{tmp_path}")
        loader = manager.loader(DataLoader(make_data(), 16, shuffle=True), name="train")
        found = torch.cat([rows.tensors[0] for rows, _ in loader])
        assert sorted(found.tolist()) == sorted(manager.parts.prefix(make_data().tensors[0]).tolist())
        assert (loader.source, loader.counts.cached, loader.counts.computed) == ("fill", 8, 32)
        holder.stdin.close()
        assert holder.wait() == 0


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_processes_share_a_fill(tmp_path):
    """Three fillers started together compute every row once between them, and all find the store full."""
    go, started = os.pipe()
    counts, counted = os.pipe()
    children = []
    for _ in range(3):
        if (pid := os.fork()) == 0:
            try:
                torch.set_num_threads(1)  # the parent's thread pool does not exist here
                manager = make_manager(f"hdf5:{tmp_path}")
                loader = manager.loader(DataLoader(make_data(400), 4))
                os.read(go, 1)
                os.write(counted, struct.pack("<i", manager.fill(loader).computed_rows))
            finally:
                os._exit(0)
        children.append(pid)
    os.write(started, b"...")
    assert sum(struct.unpack("<i", os.read(counts, 4))[0] for _ in children) == 400
    for pid in children:
        os.waitpid(pid, 0)
    for fd in (go, started, counts, counted):
        os.close(fd)
    manager = make_manager(f"hdf5:{tmp_path}")
    assert manager.fill(manager.loader(DataLoader(make_data(400), 4))).computed_rows == 0
    assert manager.verify() == {"train": []}


def test_rows_written_while_a_cache_is_opened_are_found(tmp_path, monkeypatch):
    """A batch that another filler writes between two looks at the file is there, not of another sample."""
    filling = iter(make_manager(f"hdf5:{tmp_path}").loader(DataLoader(make_data(), 8)))
    next(filling)
    whole, looks = cf.HDF5Store.unverified, []

    def look(store, name, rows):
        found = whole(store, name, rows)
        next(filling, None)
        looks.append(store.writable)
        return found

    monkeypatch.setattr(cf.HDF5Store, "unverified", look)
    manager = make_manager(f"hdf5:{tmp_path}")
    loader = manager.loader(DataLoader(make_data(), 8))
    assert manager.fill(loader).computed_rows == 40 - 8 * (1 + len(looks))
    assert looks == [False, True]  # to compare samples, and to fill it


def test_rows_that_another_filler_has_claimed_are_used_and_not_kept(tmp_path):
    """A pass does not wait for a row that another process is computing, and does not write it."""
    manager = make_manager(f"hdf5:{tmp_path}")
    loader = manager.loader(DataLoader(make_data(), 16))
    other = cf.HDF5Store.open(next(tmp_path.glob("*.h5")))
    assert other.claim(torch.arange(10, 30)).all()
    found = torch.cat([rows.tensors[0] for rows, _ in loader])
    assert torch.equal(found, manager.parts.prefix(make_data().tensors[0]))
    assert loader.counts.computed == 40
    assert other.present(torch.arange(40)).tolist() == [not 10 <= row < 30 for row in range(40)]
    other.close()
    assert manager.fill(loader).computed_rows == 20


def test_a_failing_prefix_gives_up_its_rows(tmp_path, monkeypatch):
    """What one process cannot compute another may try."""
    manager = make_manager(f"hdf5:{tmp_path}")
    loader = manager.loader(DataLoader(make_data(), 16))
    monkeypatch.setattr(type(loader.rows.prefix), "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(iter(loader))
    assert cf.HDF5Store.open(next(tmp_path.glob("*.h5"))).claim(torch.arange(40)).all()


class Breaking(TensorDataset):
    """Cannot decode its samples from ``at`` on."""

    at = 40

    def __getitem__(self, index):
        if index >= self.at:
            raise OSError("damaged file")
        return super().__getitem__(index)


def test_a_fill_that_fails_gives_up_what_it_has_not_written(tmp_path):
    """A batch is written once the next one is decoded: where that fails, its rows are another process's to make."""
    data = Breaking(*make_data().tensors)
    manager = make_manager(f"hdf5:{tmp_path}")
    loader = manager.loader(DataLoader(data, 8))
    written = []

    def advance(count):
        written.append(count)
        data.at = 16

    with pytest.raises(OSError, match="damaged"):
        manager.fill(loader, advance)
    assert written == [8]
    other = cf.HDF5Store.open(next(tmp_path.glob("*.h5")))
    assert other.present(torch.arange(40)).tolist() == [row < 8 for row in range(40)]
    assert other.claim(torch.arange(40)).tolist() == [row >= 8 for row in range(40)]
    other.close()


def test_a_read_only_store_trains_without_writing(tmp_path):
    """Its rows are right, nothing of them is kept, and filling it is refused."""
    manager = make_manager(f"hdf5:{tmp_path}")
    next(iter(manager.loader(DataLoader(make_data(), 8))))
    manager.close()
    plain = make_data().tensors[0]
    for workers in (0, 2):
        manager = make_manager(cf.HDF5Store.open(next(tmp_path.glob("*.h5")), writable=False))
        loader = manager.loader(DataLoader(make_data(), 16, shuffle=True, num_workers=workers), name="train")
        assert not manager.info()["train"]["writable"]
        for _ in range(2):
            found = torch.cat([rows.tensors[0] for rows, _ in loader])
            assert loader.source == "frozen"
            assert sorted(found.tolist()) == sorted(manager.parts.prefix(plain).tolist())
            assert (loader.counts.cached, loader.counts.computed) == (8, 32)
        with pytest.raises(UsageError, match="cannot be written by this process"):
            manager.fill(loader)
    manager.close()
    manager = make_manager(f"hdf5:{tmp_path}")
    assert manager.loader(DataLoader(make_data(), 16)) is not None
    assert manager.info()["train"] | {"path": None} == {
        "tier": "hdf5", "rows": 40, "rows_present": 8, "nbytes": manager.nbytes, "path": None, "writable": True,
        "prefix": {"choice": "exact"},
        "rounding": {},
    }  # fmt: skip


def test_loaders_of_one_dataset_share_a_store():
    manager = make_manager()
    train = manager.loader(DataLoader(make_data(), 8, shuffle=True), name="train")
    again = manager.loader(DataLoader(make_data(), 16), name="train")
    list(train)
    list(again)
    assert again.counts.computed == 0
    assert list(manager.info()) == ["train"]


def test_default_names_and_files(tmp_path):
    manager = make_manager(f"hdf5:{tmp_path}")
    manager.loader(DataLoader(make_data(), 8))
    manager.loader(DataLoader(make_data(9), 8))
    names = sorted(path.name for path in tmp_path.glob("*.h5"))
    assert [name[: -len("000000000000.h5")] for name in names] == ["train-3-", "val-3-"]


def test_a_store_of_the_users_own():
    spec = make_manager().loader(DataLoader(make_data(), 8)).rows.spec
    store = cf.HostStore(spec)
    manager = make_manager(store)
    list(manager.loader(DataLoader(make_data(), 8)))
    assert store.count == 40
    other = manager.loader(DataLoader(make_data(9), 8))
    assert other.rows.store is not store
    with pytest.raises(StaleCacheError, match="needed are"):
        make_manager(cf.HostStore(spec)).loader(DataLoader(make_data(9), 8))


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16])
def test_narrow_rows_come_back_in_the_models_dtype(dtype):
    manager = make_manager(dtype=dtype)
    loader = manager.loader(DataLoader(make_data(), 40))
    rows, y = next(iter(loader))
    exact = manager.parts.prefix(make_data().tensors[0])
    assert rows.tensors[0].dtype == torch.float32
    assert y.dtype == torch.int64
    assert manager.nbytes == 40 * (6 * 2 + 8)
    stored = torch.float16 if dtype == "float16" else dtype
    assert torch.equal(rows.tensors[0], exact.to(stored).float())
    lost = float((exact.to(stored).double() - exact.double()).norm() / exact.double().norm())
    assert manager.info()["train"]["rounding"] == {"activation.0": pytest.approx(lost, rel=1e-6)}
    assert 0 < lost < {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[stored], "half a unit in the last place"


def test_rounding_is_measured_where_rows_are_narrowed(tmp_path):
    """Lossless rows have none; of a file that is opened it is that of the rows recomputed to check it."""
    manager = make_manager()
    list(manager.loader(DataLoader(make_data(), 8)))
    assert manager.info()["train"]["rounding"] == {}
    manager = make_manager(f"hdf5:{tmp_path}", dtype="bfloat16")
    list(manager.loader(DataLoader(make_data(), 8)))
    manager.close()
    manager = make_manager(f"hdf5:{tmp_path}", dtype="bfloat16")
    manager.loader(DataLoader(make_data(), 8))
    assert 0 < manager.info()["train"]["rounding"]["activation.0"] < 2.0**-8
    manager.close()


def test_overflow_names_the_sample():
    with pytest.raises(RowValueError, match=r"sample \d+ has an activation of magnitude"):
        list(make_manager(dtype="float16", scale=1e7).loader(DataLoader(make_data(), 8)))
    list(make_manager(dtype="bfloat16", scale=1e7).loader(DataLoader(make_data(), 8)))


def test_rows_under_another_autocast_state_are_refused():
    model = make_model()
    engine = cf.Engine(model, "host")
    loader = engine.loader(DataLoader(make_data(), 8))
    rows, _ = next(iter(loader))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(StaleCacheError, match=r"autocast=torch\.bfloat16"):
        engine(rows)
    linear = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    cf.freeze(linear, "1")
    engine = cf.Engine(linear, "host", autocast=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        for rows, _ in engine.loader(DataLoader(make_data(), 8)):
            assert rows.tensors[0].dtype == torch.bfloat16
            engine(rows)
    with pytest.raises(StaleCacheError, match="autocast=None"):
        engine(rows)


def test_the_prefix_never_runs_under_ambient_autocast():
    plain = make_manager()
    rows, _ = next(iter(plain.loader(DataLoader(make_data(), 8))))
    other = make_manager()
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = next(iter(other.loader(DataLoader(make_data(), 8))))
    assert torch.equal(rows.tensors[0], inside.tensors[0])


def test_rows_of_another_engine_are_refused():
    first, second = cf.Engine(make_model(), "host"), cf.Engine(make_model(), "host")
    rows, _ = next(iter(first.loader(DataLoader(make_data(), 8))))
    second.loader(DataLoader(make_data(), 8))
    with pytest.raises(StaleCacheError, match="another engine"):
        second(rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"store": "ram"}, "'ram'"),
        ({"store": "hdf5"}, "hdf5:DIR"),
        ({"store": "host:x"}, "'host:x'"),
        ({"dtype": "int8"}, "int8"),
        ({"schedule": 3}, "schedule"),
        ({"prefix": "fast"}, "prefix"),
    ],
)
def test_wrong_arguments_say_what_is_expected(options, words):
    with pytest.raises(UsageError, match=words):
        cf.Engine(make_model(), **options).loader(DataLoader(make_data(), 8))


def test_nothing_frozen_for_a_split():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    with pytest.raises(FreezeError, match=r"cf\.freeze"):
        cf.split(model, torch.randn(4, 6))


def test_hand_set_flags_with_batch_norm_in_train_mode():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    for module in model[:2]:
        module.requires_grad_(False)
    with pytest.raises(FreezeError, match=r"cf\.freeze\(model, train_from='2'\)"):
        cf.Engine(model, "host").loader(DataLoader(make_data(), 8))
    model.eval()
    list(cf.Engine(model, "host").loader(DataLoader(make_data(), 8)))


def test_too_little_room(tmp_path, monkeypatch):
    from cachefreeze.stores import memory, opening

    monkeypatch.setattr(memory, "free_host_bytes", lambda: 100)
    with pytest.raises(StoreSpaceError, match=r"need [\d,]+ bytes.*100 are free"):
        make_manager("host").loader(DataLoader(make_data(), 8))
    monkeypatch.setattr(opening, "free_host_bytes", lambda: 100)
    with pytest.raises(StoreSpaceError, match="hdf5:DIR"):
        make_manager("auto").loader(DataLoader(make_data(), 8))
    manager = make_manager(f"auto:{tmp_path}")
    manager.loader(DataLoader(make_data(), 8))
    assert manager.info()["train"]["tier"] == "hdf5"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot make the cache folder"):
        make_manager(f"hdf5:{tmp_path / 'file' / 'below'}").loader(DataLoader(make_data(), 8))


def test_modes_and_random_states_are_left_alone():
    """Splitting, probing, filling and reading leave every flag and every state as they were."""
    model = make_model()
    model.train()
    flags = {name: module.training for name, module in model.named_modules()}
    state = RandomState.capture()
    engine = cf.Engine(model, "host")
    loader = engine.loader(DataLoader(make_data(), 8, generator=torch.Generator()))
    assert {name: module.training for name, module in model.named_modules()} == flags
    list(loader)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert state.moved() == []


def read_in_child(queue, store):
    torch.set_num_threads(1)
    queue.put(float(store.read(torch.arange(40))["activation.0"].sum()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_stores_are_read_in_child_processes(method, tmp_path):
    manager = make_manager(f"hdf5:{tmp_path}")
    loader = manager.loader(DataLoader(make_data(), 8))
    manager.fill(loader)
    store = loader.rows.store
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(queue, store))
    child.start()
    assert queue.get(timeout=60) == float(store.read(torch.arange(40))["activation.0"].sum())
    child.join()
    assert store.writable


class Scaled(nn.Module):
    """Reads a plain attribute and an optional argument behind the boundary."""

    def __init__(self):
        super().__init__()
        self.first = Scale(6)
        self.last = nn.Linear(6, 3)
        self.temperature = 1.0

    def forward(self, x, factor=1.0):
        return self.last(self.first(x)) * factor / self.temperature


def make_scaled():
    model = Scaled()
    cf.freeze(model, "last")
    engine = cf.Engine(model, "host")
    return model, engine, engine.loader(DataLoader(make_data(), 40))


def test_arguments_beside_rows_are_refused_not_dropped():
    model, engine, loader = make_scaled()
    rows, _ = next(iter(loader))
    assert torch.equal(engine(rows), model(make_data().tensors[0]))
    for call in (lambda: engine(rows, 3.0), lambda: engine(rows, factor=3.0)):
        with pytest.raises(UsageError, match="nothing else reaches it"):
            call()
    with pytest.raises(TypeError, match="unexpected keyword argument 'label'"):
        engine(x=rows, label=torch.zeros(3))
    with pytest.raises(TypeError, match="unexpected keyword argument 'label'"):  # as without rows
        engine(x=make_data().tensors[0], label=torch.zeros(3))


def test_plain_attributes_are_followed_from_pass_to_pass():
    model, engine, loader = make_scaled()
    next(iter(loader))
    model.temperature = 2.0
    rows, _ = next(iter(loader))
    assert torch.equal(engine(rows), model(make_data().tensors[0]))


def test_a_module_replaced_behind_the_engine_is_caught():
    model, _, loader = make_scaled()
    next(iter(loader))
    model.last = nn.Linear(6, 3)
    with pytest.raises(StaleCacheError, match="'last' of Scaled was replaced"):
        next(iter(loader))


def test_a_file_that_another_process_is_creating_is_waited_for(tmp_path):
    """Two runs started together on a new cache: one writes, the other trains beside it."""
    code = textwrap.dedent(HOLDER).format(path=[str(p) for p in sys.path], folder=tmp_path)
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)
    ]
    for process in started:
        assert process.stdout.readline().strip() == b"holding"
    for process in started:
        process.communicate()
        assert process.returncode == 0
    assert len(list(tmp_path.glob("*.h5"))) == 1


@pytest.mark.parametrize("store", ["host", "hdf5"])
def test_engines_share_stores(store, tmp_path):
    """Two engines over equal prefixes compute each row once between them, and train as each would alone."""
    place = f"hdf5:{tmp_path}" if store == "hdf5" else store

    def train(engine, batches, rate):
        optimizer = torch.optim.SGD([p for p in engine.model.parameters() if p.requires_grad], lr=rate)
        losses = []
        for x, y in batches:
            optimizer.zero_grad()
            losses.append(nn.functional.cross_entropy(engine(x), y))
            losses[-1].backward()
            optimizer.step()
        return torch.stack(losses).detach()

    def engine_for(where):
        model = make_model()
        cf.freeze(model, train_from="2")
        engine = cf.Engine(model, where)
        return engine, engine.loader(DataLoader(make_data(), 8))

    alone, batches = engine_for("host")
    wanted = train(alone, batches, 0.5)
    first, batches = engine_for(place)
    second, others = engine_for(first.cache)
    for _, _ in zip(range(2), batches, strict=False):
        pass
    some = first.cache.info()["train"]["rows_present"]
    assert 0 < some < 40
    assert torch.equal(train(second, others, 0.5), wanted)
    assert (others.counts.cached, others.counts.computed) == (some, 40 - some)
    assert train(first, batches, 0.1).isfinite().all()
    assert (batches.counts.cached, batches.source) == (40, "cached")
    # a loader that the first engine does not have gets a store of the same kind
    more = second.loader(DataLoader(make_data(), 8), name="more")
    assert second.cache.info()["more"]["tier"] == store
    assert len(list(more)) == 5
    second.close()
    assert len(list(batches)) == 5, "its store is still open"
    first.close()


def test_rows_of_another_prefix_are_not_shared():
    """Other frozen weights, other samples or another dtype: the difference is named."""
    model = make_model()
    cf.freeze(model, train_from="2")
    first = cf.Engine(model, "host")
    first.loader(DataLoader(make_data(), 8))
    other = make_model(scale=2.0)
    cf.freeze(other, train_from="2")
    with pytest.raises(StaleCacheError, match="cannot be shared with this engine, these differ: weights"):
        cf.Engine(other, first.cache).loader(DataLoader(make_data(), 8))
    with pytest.raises(StaleCacheError, match="these differ"):
        cf.Engine(model, first.cache, dtype="bfloat16").loader(DataLoader(make_data(), 8))
    with pytest.raises(StaleCacheError, match="these differ"):
        cf.Engine(model, first.cache).loader(DataLoader(make_data(24), 8))
    with pytest.raises(UsageError, match="needs a store for every boundary"):
        cf.Engine(make_model(), first.cache, schedule=cf.FreezeOut())


def test_of_splits_on_the_loaders_samples(tmp_path):
    """``CacheManager.of`` is split and manager in one, for samples of one length as well."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    cf.freeze(model, "2")
    batches = DataLoader(TensorDataset(torch.randn(6, 4), torch.arange(6)), 3)
    manager = cf.CacheManager.of(model, batches, f"hdf5:{tmp_path}", dtype="float16")
    loader = manager.loader(batches)
    manager.fill(loader)
    assert manager.parts.boundary.name == "2"
    (rows, _), (x, _) = next(iter(loader)), next(iter(batches))
    assert torch.allclose(manager.parts.suffix(*rows.tensors), model(x), atol=1e-2)
    manager.close()


def test_an_engine_computes_few_samples_before_the_first_row():
    """The order of use is recorded once, for the boundary and for the split."""
    model, seen = make_model(), []
    model[0].register_forward_hook(lambda _m, given, _o: seen.append(len(given[0])))
    cf.Engine(model, "host").loader(DataLoader(make_data(), 16))
    assert sum(seen) <= 29, seen
