"""Freezing: gradient flags, and an eval lock that outlives ``model.train()``, pickling and copying."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torchvision
from torch import nn

import cachefreeze as cf
from cachefreeze.errors import FreezeError
from cachefreeze.freezing import boundary_of, hold_eval, is_locked
from cachefreeze.testing.traps import (
    AsksHeadDtype,
    Attention,
    Branches,
    Chain,
    ClassToken,
    DropoutPrefix,
    HeadFirst,
    Recurrent,
    SharedModule,
    TiedHead,
    images,
    sequences,
    tokens,
    vectors,
)
from cachefreeze.tracing import usage_of


class NoBias(TiedHead):
    """The head is the embedding, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight


def frozen(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def snapshot(model: nn.Module) -> tuple[set[str], dict[str, bool], int]:
    return frozen(model), modes(model), hooks(model)


def running(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


FIRST = {"conv1.weight", "conv1.bias", "norm1.weight", "norm1.bias"}


class TestWhatIsFrozen:
    def test_train_from_freezes_every_parameter_first_used_before_that_module(self):
        model = Chain()
        assert set(cf.freeze(model, "conv2")) == FIRST == frozen(model)

    def test_freeze_returns_only_what_this_call_froze_in_the_models_order(self):
        model = Chain()
        model.conv1.bias.requires_grad_(False)
        assert cf.freeze(model, train_from="conv2") == ["conv1.weight", "norm1.weight", "norm1.bias"]
        assert cf.freeze(model, "head") == ["conv2.weight", "conv2.bias", "norm2.weight", "norm2.bias"]

    @pytest.mark.parametrize(("count", "first"), [(1, "head"), (2, "conv2"), (3, None)])
    def test_train_last_counts_listed_blocks_from_the_end(self, count, first):
        """A norm belongs to the layer before it; with all blocks training nothing is frozen."""
        model, same = Chain(), Chain()
        cf.freeze(model, train_last=count)
        if first:
            cf.freeze(same, train_from=first)
        assert frozen(model) == frozen(same)

    def test_modules_takes_names_and_globs_and_freezes_just_those(self):
        model = Chain()
        assert set(cf.freeze(model, modules=["norm*", "conv1"])) == FIRST | {"norm2.weight", "norm2.bias"}

    def test_order_is_that_of_use_not_of_registration(self):
        model = HeadFirst()
        assert set(cf.freeze(model, "head")) == {"stem.weight", "stem.bias", "mid.weight", "mid.bias"}

    def test_root_parameters_used_before_the_boundary_are_frozen(self):
        model = ClassToken()
        assert {"class_token", "positions"} <= set(cf.freeze(model, "layers"))

    def test_any_module_inside_a_block_can_be_the_boundary(self):
        model = torchvision.models.resnet18()
        names = cf.freeze(model, "layer4.1.conv2")
        assert "layer4.1.conv1.weight" in names
        assert "layer4.1.conv2.weight" not in names

    def test_a_shared_module_is_frozen_by_its_first_use(self):
        model = SharedModule()
        assert {"norm.weight", "norm.bias"} <= set(cf.freeze(model, "head"))

    @pytest.mark.parametrize("inputs", [None, vectors()], ids=["traced", "recorded"])
    def test_asking_a_weight_for_its_dtype_or_shape_is_no_use_of_it(self, inputs):
        model = AsksHeadDtype()
        assert cf.freeze(model, "head", example_inputs=inputs) == ["stem.weight", "stem.bias"]

    def test_frozen_parameters_get_no_gradient_and_lose_the_old_one(self):
        model = Chain()
        model(images()).sum().backward()
        cf.freeze(model, "conv2")
        assert all(p.grad is None for n, p in model.named_parameters() if n in FIRST)
        assert model.conv2.weight.grad is not None
        model(images()).sum().backward()
        assert all(p.grad is None for n, p in model.named_parameters() if n in FIRST)

    def test_a_tied_head_is_frozen_with_the_embedding_and_its_bias_trains(self):
        model = TiedHead()
        cf.freeze(model, "head")
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["head.bias"]

    def test_freezing_from_the_first_block_changes_nothing(self):
        model = Chain()
        before = snapshot(model)
        assert cf.freeze(model, "conv1") == []
        assert snapshot(model) == before

    def test_example_inputs_are_not_written_into(self):
        model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Linear(6, 2))
        x, kept = vectors(), vectors()
        cf.freeze(model, "2", example_inputs=x)
        assert torch.equal(x, kept)

    def test_a_model_that_cannot_be_traced_warns_and_takes_registration_order(self):
        with pytest.warns(UserWarning, match=r"Branches cannot be read without inputs.*example_inputs"):
            assert cf.freeze(Branches(), "inner") == ["stem.weight", "stem.bias"]

    def test_example_inputs_spare_the_warning(self):
        assert cf.freeze(Branches(), "inner", example_inputs=vectors()) == ["stem.weight", "stem.bias"]


class TestErrors:
    def test_an_unknown_name_lists_the_blocks_in_order_of_execution(self):
        with pytest.raises(FreezeError, match=r"'nowhere'.*HeadFirst.*Blocks, in order: stem, mid, head\."):
            cf.freeze(HeadFirst(), "nowhere")

    def test_a_pattern_that_matches_nothing_lists_the_blocks(self):
        with pytest.raises(FreezeError, match=r"'layer\*' matches no module.*Blocks, in order: conv1, conv2, head\."):
            cf.freeze(Chain(), modules=["conv1", "layer*"])

    def test_too_many_blocks_says_how_many_there_are(self):
        with pytest.raises(FreezeError, match=r"train_last=4.*3 blocks.*conv1, conv2, head"):
            cf.freeze(Chain(), train_last=4)

    @pytest.mark.parametrize("count", [0, -1])
    def test_a_count_below_one_is_refused(self, count):
        with pytest.raises(FreezeError, match=rf"train_last={count}"):
            cf.freeze(Chain(), train_last=count)

    @pytest.mark.parametrize("given", [{}, {"train_from": "head", "train_last": 1}, {"train_from": ""}])
    def test_exactly_one_way_to_say_what(self, given):
        with pytest.raises(FreezeError, match="exactly one of train_from=, train_last=, modules="):
            cf.freeze(Chain(), **given)

    def test_a_string_of_modules_is_no_list(self):
        with pytest.raises(FreezeError, match=r'modules=\["conv1"\]'):
            cf.freeze(Chain(), modules="conv1")

    def test_a_module_that_is_never_used_is_no_boundary(self):
        model = HeadFirst()
        model.spare = nn.Linear(2, 2)
        with pytest.raises(FreezeError, match=r"'spare'.*never uses"):
            cf.freeze(model, "spare")

    @pytest.mark.parametrize("how", [{"modules": ["*"]}, {"modules": ["conv*", "norm*", "head"]}])
    def test_nothing_left_to_train_raises_and_leaves_the_model_as_it_was(self, how):
        model = Chain().train()
        model(images()).sum().backward()
        before = snapshot(model)
        with pytest.raises(FreezeError, match=r"leaves nothing of Chain to train.*conv1, conv2, head"):
            cf.freeze(model, **how)
        assert snapshot(model) == before
        assert all(p.grad is not None for p in model.parameters())

    def test_nothing_left_to_train_names_the_tie(self):
        model = NoBias()
        with pytest.raises(FreezeError, match=r"head\.weight is tied to a frozen parameter.*embed, body"):
            cf.freeze(model, "head", example_inputs=tokens())
        assert not frozen(model)

    def test_an_unused_trainable_parameter_does_not_count_as_something_to_train(self):
        model = HeadFirst()
        model.spare = nn.Linear(2, 2)
        with pytest.raises(FreezeError, match="nothing of HeadFirst to train"):
            cf.freeze(model, modules=["stem", "mid", "head"])


class TestEvalLock:
    """What is frozen stays in eval mode whatever ``model.train()`` says."""

    def copies(self, model: nn.Module) -> list[nn.Module]:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return [
            model,
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(file, weights_only=False),
            copy.deepcopy(copy.deepcopy(model)),
        ]

    def test_statistics_stand_still_after_train_in_every_copy(self):
        model = Chain()
        cf.freeze(model, "conv2")
        for each in self.copies(model):
            before = running(each)
            each.train()
            each(images())
            assert torch.equal(before["norm1.running_mean"], each.norm1.running_mean)
            assert before["norm1.num_batches_tracked"] == each.norm1.num_batches_tracked
            assert not torch.equal(before["norm2.running_mean"], each.norm2.running_mean)

    def test_a_copys_lock_is_its_own(self):
        model = Chain()
        cf.freeze(model, "conv2")
        other = copy.deepcopy(model)
        cf.unfreeze(other)
        assert not frozen(other)
        assert frozen(model) == FIRST
        assert is_locked(model.norm1)
        assert not is_locked(other.norm1)

    def test_unfreeze_works_on_a_pickled_copy(self):
        model = Chain()
        model.conv1.bias.requires_grad_(False)
        cf.freeze(model, "conv2")
        other = pickle.loads(pickle.dumps(model))
        cf.unfreeze(other)
        assert frozen(other) == {"conv1.bias"}

    def test_dropout_before_the_boundary_is_off_and_behind_it_on(self):
        model = DropoutPrefix()
        cf.freeze(model, "2")
        model.train()
        model(vectors())
        assert not model[1].training
        assert model[3].training
        seen: list[torch.Tensor] = []
        model[2].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        model(vectors())
        model(vectors())
        assert torch.equal(*seen)

    def test_dropout_inside_the_boundary_block_keeps_dropping(self):
        model = torchvision.models.mobilenet_v2()
        cf.freeze(model, "classifier")
        model.train()
        hold_eval(model)
        assert model.classifier[0].training
        assert not any(m.training for m in model.features.modules())

    def test_what_draws_may_follow_train(self):
        """With stochastic="train" dropout before the boundary drops, in every copy, and batch norms rest."""
        model = nn.Sequential(
            nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Dropout(), nn.Linear(4, 4), nn.Linear(4, 2)
        )
        cf.freeze(model, "4", stochastic="train")
        for each in self.copies(model):
            each.train()
            each(torch.randn(3, 4))
            assert [module.training for module in each] == [False, False, True, False, True]
            assert boundary_of(each, usage_of(each, None)) == "2"
        cf.freeze(model, "3")
        model.train()
        hold_eval(model)
        assert [module.training for module in model] == [False, False, False, False, True]
        assert boundary_of(model, usage_of(model, None)) == "4"
        cf.unfreeze(model)
        cf.freeze(model, "3", stochastic="train")
        cf.unfreeze(model, ["0"])
        assert boundary_of(model, usage_of(model, None)) is None

    def test_rows_are_taken_before_the_block_that_draws(self):
        """A block, where it is not the boundary's own and something is frozen before it; else the module itself."""
        x, last, first = images(size=32), "encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_0"
        for rate, train_from, expected in (
            (0.1, last, "encoder.dropout"),
            (0.0, last, first),
            (0.0, first, first),  # what draws in the boundary's own block is nothing new
        ):
            model = torchvision.models.VisionTransformer(32, 16, 2, 2, 8, 16, dropout=0.1, num_classes=3)
            model.encoder.dropout.p = rate
            cf.freeze(model, train_from, example_inputs=x, stochastic="train")
            assert cf.split(model, x).boundary.name == expected

    def test_nothing_frozen_before_what_draws_is_a_live_run(self):
        model = nn.Sequential(nn.Dropout(), nn.Linear(6, 6), nn.Linear(6, 2))
        cf.freeze(model, "2", stochastic="train")
        with pytest.raises(FreezeError, match="stochastic"):
            cf.split(model, vectors())

    def test_another_word_for_what_draws(self):
        model = Chain()
        with pytest.raises(FreezeError, match="stochastic='live': use one of 'eval', 'train'"):
            cf.freeze(model, "conv2", stochastic="live")
        assert not frozen(model)

    def test_hold_eval_does_not_wait_for_the_next_forward(self):
        model = Chain()
        cf.freeze(model, "conv2")
        model.train()
        hold_eval(model)
        assert not model.norm1.training
        assert model.norm2.training
        assert model.training

    def test_a_frozen_glob_holds_its_statistics_and_what_is_around_it_trains(self):
        model = torchvision.models.resnet18(num_classes=4)
        cf.freeze(model, modules=["layer2"])
        model.train()
        before = running(model)
        model(torch.randn(2, 3, 32, 32))
        moved = {n.split(".")[0] for n, b in model.named_buffers() if not torch.equal(before[n], b)}
        assert moved == {"bn1", "layer1", "layer3", "layer4"}

    def test_the_models_own_train_is_not_replaced(self):
        model = Chain()
        cf.freeze(model, "conv2")
        assert "train" not in vars(model)
        assert not any("forward" in vars(module) for module in model.modules())

    def test_the_state_dict_keeps_its_keys(self):
        model, plain = Chain(), Chain()
        cf.freeze(model, "conv2")
        assert list(model.state_dict()) == list(plain.state_dict())


class TestUnfreeze:
    def test_restores_flags_modes_and_hooks(self):
        model = torchvision.models.mobilenet_v2()
        before = snapshot(model)
        names = cf.freeze(model, "features.10")
        model.train()
        assert cf.unfreeze(model) == names
        assert snapshot(model) == before

    def test_what_the_user_froze_by_hand_stays_frozen(self):
        model = Chain()
        model.conv1.weight.requires_grad_(False)
        model.head.bias.requires_grad_(False)
        cf.freeze(model, "conv2")
        cf.unfreeze(model)
        assert frozen(model) == {"conv1.weight", "head.bias"}

    def test_follows_a_model_that_is_in_eval_mode(self):
        model = Chain()
        cf.freeze(model, "conv2")
        model.eval()
        cf.unfreeze(model)
        assert not any(modes(model).values())

    def test_modules_without_parameters_in_a_frozen_glob_train_again(self):
        """The lock of a block puts its dropout to eval mode with it; unfreezing takes that back too."""
        model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6)), nn.Linear(6, 2))
        before = snapshot(model)
        cf.freeze(model, modules=["0"])
        assert not model[0][1].training
        cf.unfreeze(model)
        assert snapshot(model) == before

    def test_a_part_can_be_thawed(self):
        model = Chain()
        cf.freeze(model, "head")
        assert cf.unfreeze(model, ["conv2", "norm2"]) == ["conv2.weight", "conv2.bias", "norm2.weight", "norm2.bias"]
        assert frozen(model) == FIRST
        model.train()
        model(images())
        assert not model.norm1.training
        assert model.norm2.training

    def test_an_unknown_pattern_raises_and_changes_nothing(self):
        model = Chain()
        cf.freeze(model, "head")
        before = snapshot(model)
        with pytest.raises(FreezeError, match=r"'layer9' matches no module.*conv1, conv2, head"):
            cf.unfreeze(model, ["layer9"])
        assert snapshot(model) == before

    def test_of_a_model_that_was_never_frozen_does_nothing(self):
        model = Chain()
        before = snapshot(model)
        assert cf.unfreeze(model) == []
        assert snapshot(model) == before

    def test_a_hook_of_the_users_own_is_left_alone(self):
        model = Chain()
        calls: list[int] = []
        model.norm1.register_forward_pre_hook(lambda _m, _a: calls.append(1))
        cf.freeze(model, "conv2")
        cf.unfreeze(model)
        model(images())
        assert calls == [1]


class TestRefreezing:
    def test_deeper_adds(self):
        model = Chain()
        cf.freeze(model, "conv2")
        cf.freeze(model, "head")
        model.train()
        hold_eval(model)
        assert not model.norm2.training
        assert frozen(model) == FIRST | {"conv2.weight", "conv2.bias", "norm2.weight", "norm2.bias"}

    def test_shallower_never_thaws(self):
        model = Chain()
        cf.freeze(model, "head")
        before = frozen(model)
        assert cf.freeze(model, "conv2") == []
        model.train()
        model(images())
        assert frozen(model) == before
        assert not model.norm2.training
        assert cf.split(model, images()).boundary.name == "head"

    def test_twice_the_same_leaves_one_lock_a_module(self):
        model = Chain()
        cf.freeze(model, "conv2")
        before = snapshot(model)
        assert cf.freeze(model, "conv2") == []
        assert snapshot(model) == before

    def test_unfreeze_after_two_freezes_undoes_both(self):
        model = Chain()
        before = snapshot(model)
        cf.freeze(model, "conv2")
        cf.freeze(model, "head")
        cf.unfreeze(model)
        assert snapshot(model) == before


class TestFlagsSetByHand:
    """``split`` reads ``requires_grad``; it takes no frozen part that is not really frozen."""

    def by_hand(self, model: nn.Module, *names: str) -> nn.Module:
        for name in names:
            model.get_submodule(name).requires_grad_(False)
        return model

    def test_batch_norm_in_train_mode_is_refused_and_the_fix_is_named(self):
        model = self.by_hand(Chain(), "conv1", "norm1")
        with pytest.raises(
            FreezeError, match=r"'norm1' \(BatchNorm2d\).*train mode.*cf\.freeze\(model, train_from='conv2'\)"
        ):
            cf.split(model, images())

    def test_batch_norm_in_eval_mode_is_taken(self):
        model = self.by_hand(Chain(), "conv1", "norm1")
        model.norm1.eval()
        parts = cf.split(model, images())
        assert parts.boundary.name == "conv2"
        assert frozen(model) == FIRST

    @pytest.mark.parametrize(
        ("make", "inputs", "names", "named"),
        [
            (DropoutPrefix, vectors, ("0",), "'1' \\(Dropout\\)"),
            (Attention, sequences, ("first",), "'first' \\(MultiheadAttention\\)"),
            (Recurrent, sequences, ("stem", "rnn"), "'rnn' \\(LSTM\\)"),
        ],
    )
    def test_dropout_in_train_mode_is_refused_wherever_it_hides(self, make, inputs, names, named):
        with pytest.raises(FreezeError, match=named):
            cf.split(self.by_hand(make(), *names), inputs())

    def test_freezing_on_top_of_them_locks(self):
        model = self.by_hand(Chain(), "conv1", "norm1")
        assert cf.freeze(model, "conv2") == []
        model.train()
        model(images())
        parts = cf.split(model, images())
        assert parts.boundary.name == "conv2"

    def test_nothing_frozen_is_said(self):
        with pytest.raises(FreezeError, match=r"nothing of Chain is frozen.*cf\.freeze"):
            cf.split(Chain(), images())

    def test_nothing_trainable_is_said(self):
        with pytest.raises(FreezeError, match=r"nothing of Chain.* is trainable"):
            cf.split(Chain().requires_grad_(False), images())

    def test_a_frozen_middle_alone_leaves_nothing_to_cache(self):
        with pytest.raises(FreezeError, match="frozen before its first trainable block"):
            cf.split(self.by_hand(Chain().eval(), "conv2", "norm2"), images())
