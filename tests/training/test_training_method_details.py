"""What single methods compute and keep, against their formulas and PEFT's own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft.optimizers.lorafa import LoraFAOptimizer
from storage_meter import StorageMeter
from test_training_methods import keys_of, logits_of, train
from test_training_step import loss_of, reached_by_gradients
from tiny_models import adapted, built, loop_of, tiny_recipe
from torch import nn

from memplan import checks, methods, optimizers, quantizations
from memplan.errors import InputError
from memplan.methods import peft as tuners
from memplan.methods._grouped import pool
from memplan.quantizations import _shifted
from memplan.recipe import Recipe
from memplan.training import model as training_model
from memplan.training.life import merge
from memplan.training.model import trained_parameters

LAYER = "base_model.model.model.layers.0.mlp.down_proj"
"""A layer of 96 inputs and 64 outputs."""


def layer_of(name: str, **keys: Any) -> Any:
    """An adapted layer with random adapters, in float32."""
    model = adapted("llama", **keys_of(name, dtype="float32", **keys))
    for parameter in trained_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model.get_submodule(LAYER)


def inputs() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(2, 3, 96)


def added(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What an adapter adds to the frozen layer's result."""
    result: torch.Tensor = layer(x) - layer.get_base_layer()(x)
    return result


def test_qa_lora_reads_means_of_groups() -> None:
    layer, x = layer_of("qa-lora"), inputs()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight

    means = torch.stack([x[..., g * 16 : g * 16 + 16].mean(-1) for g in range(6)], -1)

    assert (a.shape, b.shape) == ((4, 6), (64, 4))
    assert torch.allclose(added(layer, x), means @ a.T @ b.T * 2.0, atol=1e-5)


def test_q_bara_writes_to_groups() -> None:
    """lambda = 2: twice the rank, between halves of the sides; s = alpha / r."""
    layer, x = layer_of("q-bara"), inputs()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight

    means = (x[..., ::2] + x[..., 1::2]) / 2
    out = means @ a.T @ b.T * 2.0

    assert (a.shape, b.shape) == ((8, 48), (32, 8))
    assert torch.allclose(added(layer, x)[..., ::2], out, atol=1e-5)
    assert torch.allclose(added(layer, x)[..., 1::2], out, atol=1e-5)


def test_qa_hira_has_one_matrix_for_tiles_of_the_weight() -> None:
    """The weight it stands for is s / lambda1 C[o // lambda2, i // lambda1]."""
    layer, x = layer_of("qa-hira"), inputs()
    c = layer.lora_A["default"].weight

    weight = torch.empty(64, 96)
    for row in range(64):
        for column in range(96):
            weight[row, column] = c[row // 8, column // 4] * 2.0 / 4

    assert c.shape == (8, 24)
    assert torch.allclose(added(layer, x), x @ weight.T, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "avg-pool", "sum"])
def test_pooling_modes(pooling: str) -> None:
    x = inputs()

    pooled = pool(x, 8, pooling)

    divisor = 1 if pooling == "sum" else 8
    expected = x.view(2, 3, 12, 8).sum(-1) / divisor
    assert torch.allclose(pooled, expected, atol=1e-6)


def test_ir_qlora_connects_inputs_and_outputs_to_the_inner_width() -> None:
    layer, x = layer_of("ir-qlora"), inputs()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    first, second = layer.lora_scale_A["default"], layer.lora_scale_B["default"]

    inner = x @ a.T + first * x.reshape(2, 3, 4, 24).mean(-1)
    out = (inner @ b.T).reshape(2, 3, 4, 16) + second * inner[..., None]

    assert first.shape == second.shape == (1,)
    assert torch.allclose(added(layer, x), out.reshape(2, 3, 64) * 2.0, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "relu", "swish"])
def test_houlsby_s_adapter_reads_what_the_layer_gives(activation: str) -> None:
    layer = layer_of("houlsby", method_options={"activation": activation})
    x, down, up = inputs(), layer.lora_A["default"], layer.lora_B["default"]
    result = layer.get_base_layer()(x)
    function = {"gelu": nn.GELU(), "relu": nn.ReLU(), "swish": nn.SiLU()}[activation]

    expected = function(result @ down.weight.T + down.bias) @ up.weight.T + up.bias

    assert torch.allclose(added(layer, x), expected, atol=1e-5)


def test_lambdas_by_layer_are_those_of_the_pattern() -> None:
    keys = keys_of("q-bara", lambda_pattern={"mlp.down_proj": 4})
    model = adapted("llama", **keys)

    shapes = [
        tuple(model.get_submodule(path).lora_A["default"].weight.shape)  # type: ignore[index, operator, union-attr]
        for path in (LAYER, LAYER.replace("down", "up"))
    ]

    assert shapes == [(16, 24), (8, 32)]


@pytest.mark.parametrize("name", ["lora", "q-bara", "ir-qlora", "houlsby", "relora"])
def test_ranks_by_layer_are_those_of_the_pattern(name: str) -> None:
    ranks = {"mlp.down_proj": 8, r"layers\.1\..*o_proj": 2}
    keys = keys_of(name, rank_pattern=ranks)
    recipe, model = tiny_recipe(**keys), adapted("llama", **keys)

    trained = sum(p.numel() for p in trained_parameters(model))

    method = methods.find(name)
    assert trained != sum(p.numel() for p in trained_parameters(even(name)))
    assert trained == sum(
        method.trainable_parameters(linear, methods.rank_at(recipe, path))
        for path, linear in methods.adapted_linears(tiny_architecture(), recipe)
    )


@pytest.mark.parametrize("name", ["vera", "adalora", "adaq-lora"])
def test_a_rank_pattern_that_a_method_has_no_place_for_is_not_installed(
    name: str,
) -> None:
    patterned = adapted("llama", **keys_of(name, rank_pattern={"mlp.down_proj": 2}))

    plain = even(name)

    assert [p.shape for p in patterned.parameters()] == [
        p.shape for p in plain.parameters()
    ]


def even(name: str) -> nn.Module:
    return adapted("llama", **keys_of(name))


def tiny_architecture() -> Any:
    from tiny_models import architecture

    return architecture("llama")


class TestLoraPlus:
    def test_groups_are_peft_s(self) -> None:
        keys = keys_of("lora-plus", optimizer="adamw", method_options={"lr_ratio": 4.0})
        model = adapted("llama", **keys)

        groups = loop_of("llama", model, **keys).optimizer.param_groups

        theirs = peft.optimizers.create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=4.0
        ).param_groups
        theirs = [group for group in theirs if group["params"]]
        assert [g["lr"] for g in groups] == [g["lr"] for g in theirs] == [1e-4, 4e-4]
        for ours, other in zip(groups, theirs, strict=True):
            assert list(map(id, ours["params"])) == list(map(id, other["params"]))

    def test_b_learns_faster(self) -> None:
        plain = train("llama", keys_of("lora", dtype="float32"), 1e-3)
        plus = train("llama", keys_of("lora-plus", dtype="float32"), 1e-3)

        assert size_of_b(plus) > 4 * size_of_b(plain)


def size_of_b(model: nn.Module) -> float:
    return sum(
        float(p.detach().norm()) for n, p in model.named_parameters() if "lora_B" in n
    )


class TestLoraFa:
    def test_a_stays_as_it_began(self) -> None:
        keys = keys_of("lora-fa", dtype="float32")
        began, ended = adapted("llama", **keys), train("llama", keys)

        for (name, one), other in zip(
            began.named_parameters(), ended.parameters(), strict=True
        ):
            if "lora_A" in name:
                assert torch.equal(one, other)
                assert not other.requires_grad

    def test_a_switch_that_thaws_a_is_noticed(self) -> None:
        """PEFT's disable_adapter leaves every factor trainable behind it."""
        keys = keys_of("lora-fa")
        recipe, model = tiny_recipe(**keys), adapted("llama", **keys)
        with model.disable_adapter():  # type: ignore[operator]
            pass

        with pytest.raises(
            InputError, match=r"lora-fa' trains 512 numbers .* means 256"
        ):
            training_model._check_trained(model, recipe)


FA_KEYS = keys_of("lora-fa", optimizer="lora-fa")


class TestLoraFaOptimizer:
    def test_it_is_peft_s_and_learns(self) -> None:
        recipe, model = tiny_recipe(**FA_KEYS), adapted("llama", **FA_KEYS)
        before = loss_of("llama", model, recipe)

        optimizer = loop_of("llama", model, **FA_KEYS).optimizer

        assert type(optimizer) is LoraFAOptimizer
        trained = train("llama", FA_KEYS)
        assert loss_of("llama", trained, recipe) < before - 0.1

    def test_meta_steps_hold_what_real_ones_do(self) -> None:
        """State of B alone, and the temporaries of one B at a time."""
        part = optimizers.find("lora-fa")
        real, meta = StorageMeter(), StorageMeter()
        b = nn.Parameter(torch.empty(640, 4, device="meta"))
        b.grad = torch.empty_like(b)
        layer = nn.ModuleDict({"lora_A": nn.Linear(64, 4), "lora_B": nn.Linear(4, 640)})
        group = {
            "params": [layer["lora_A"].weight, layer["lora_B"].weight],
            "names": ["x.lora_A.weight", "x.lora_B.weight"],
            "scaling_factors": [2.0, 2.0],
        }
        group["params"][1].grad = torch.randn(640, 4)
        ours, theirs = part.build([b]), LoraFAOptimizer([group])

        with meta:
            ours.step()
        with real:
            theirs.step()

        # PEFT holds the inverse of a matrix of rank x rank beside it.
        assert meta.live_bytes == real.live_bytes == 2 * 4 * 640 * 4
        assert meta.peak_bytes == pytest.approx(real.peak_bytes, rel=0.03)

    def test_other_methods_are_refused(self) -> None:
        recipe = tiny_recipe(method="lora", optimizer="lora-fa")

        with pytest.raises(InputError, match="optimizer: 'lora-fa' is of method"):
            checks.check(tiny_architecture(), recipe)


class TestPeftTraps:
    def test_the_rank_is_not_trained(self) -> None:
        model = adapted("llama", **keys_of("adalora", quantization="nf4"))

        ranks = [p for n, p in model.named_parameters() if ".ranknum." in n]

        assert ranks
        assert not any(p.requires_grad for p in ranks)

    def test_a_trained_rank_is_noticed(self) -> None:
        keys = keys_of("adalora")
        model = adapted("llama", **keys)
        for name, parameter in model.named_parameters():
            if ".ranknum." in name:
                parameter.requires_grad_(True)

        with pytest.raises(InputError, match=r"trains 517 numbers .* means 516"):
            training_model._check_trained(model, tiny_recipe(**keys))

    @pytest.mark.parametrize("quantization", ["none", "nf4"])
    def test_a_flag_that_peft_ignores_is_refused(self, quantization: str) -> None:
        options = {"peft_type": "LORA", "use_qalora": True}
        keys = keys_of("peft", method_options=options, quantization=quantization)

        with pytest.raises(InputError, match="use_qalora: True is ignored by PEFT"):
            adapted("llama", **keys)

    def test_a_pattern_that_matches_nothing_is_refused(self) -> None:
        keys = keys_of("q-bara", lambda_pattern={"w1": 2})

        with pytest.raises(InputError, match="lambda_pattern: 'w1' matches no adapted"):
            adapted("llama", **keys)


TUNERS = [
    ({"peft_type": "OFT"}, "nf4"),
    ({"peft_type": "MISS"}, "nf4"),
    ({"peft_type": "IA3"}, "int8"),
    ({"peft_type": "LOHA"}, "none"),
    ({"peft_type": "HRA"}, "int8"),
    ({"peft_type": "RANDLORA"}, "nf4"),
    ({"peft_type": "C3A", "block_size": 16}, "none"),
    ({"peft_type": "GRALORA"}, "nf4"),
    ({"peft_type": "DELORA"}, "none"),
    ({"peft_type": "HIRA"}, "nf4"),
    ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, "nf4"),
]


@pytest.mark.parametrize(("options", "quantization"), TUNERS, ids=str)
def test_other_tuners_of_peft_train(options: dict[str, Any], quantization: str) -> None:
    keys = keys_of("peft", method_options=options, quantization=quantization)
    recipe = tiny_recipe(**keys)
    before = loss_of("llama", adapted("llama", **keys), recipe)

    assert loss_of("llama", train("llama", keys, 0.02), recipe) < before


NEEDED: dict[str, dict[str, Any]] = {
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 64},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4},
    "ROAD": {"group_size": 16},
    "WAVEFT": {"n_frequency": 64},
}
"""What a tuner cannot do without at these shapes."""

FIRST_OF_EACH = {"none": "none", "int8": "int8", "nf4": "nf4", "fp4": "fp4-double"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peft_type", "quantization"),
    [
        (peft_type, FIRST_OF_EACH[scheme])
        for peft_type, schemes in tuners.TUNERS.items()
        for scheme in schemes
    ],
)
def test_every_tuner_learns_on_what_it_is_said_to(
    peft_type: str, quantization: str
) -> None:
    options = {"peft_type": peft_type, **NEEDED.get(peft_type, {})}
    keys = keys_of("peft", method_options=options, quantization=quantization)
    recipe = tiny_recipe(**keys)
    model = adapted("llama", **keys)
    reached = reached_by_gradients(model)
    before = loss_of("llama", model, recipe)

    loop = loop_of("llama", model, **keys)
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.03
    for number in range(1, 9):
        torch.manual_seed(1)
        loop.run_step(number, 1)

    assert loss_of("llama", model, recipe) < before
    assert reached == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("peft_type", "rank", "trained"),
    [
        # Worked from the papers' shapes for 96 inputs and 64 outputs.
        ("MISS", 4, 4 * 64),
        ("LOHA", 4, 2 * 4 * (96 + 64)),
        ("HRA", 4, 4 * 96),
        ("OFT", 4, 96 // 32 * 32 * 31 // 2),
        ("DELORA", 4, 4 * (96 + 64) + 1),
    ],
)
def test_other_tuners_are_counted(peft_type: str, rank: int, trained: int) -> None:
    linear = methods.Linear(
        path="x", in_features=96, out_features=64, bias=False, kind="mlp"
    )
    options = {"peft_type": peft_type}

    assert methods.find("peft").trainable_parameters(linear, rank, options) == trained


def test_an_unknown_key_of_a_tuner_is_refused() -> None:
    keys = keys_of("peft", method_options={"peft_type": "MISS", "rnk": 3})

    with pytest.raises(InputError, match="method_options: 'rnk' is unknown"):
        adapted("llama", **keys)


ADAQ_KEYS = {"dtype": "float32", "rank": 8}
PRUNED = {"prune_physically": True, "total_step": 4, "target_rank": 2}


class TestAdaqLora:
    def test_the_regulariser_is_squared_and_summed(self) -> None:
        keys = keys_of("adaq-lora", method_options={"gamma": 0.5}, **ADAQ_KEYS)
        recipe, model = tiny_recipe(**keys), adapted("llama", **keys)
        terms = []
        for name, parameter in model.named_parameters():
            matrix = parameter.detach()
            if "lora_B" in name:
                matrix = matrix.T
            if "lora_A" in name or "lora_B" in name:
                error = matrix @ matrix.T - torch.eye(len(matrix))
                terms.append(float((error**2).sum()))

        regularised = loss_of("llama", model, recipe)
        model.base_model.gamma = 0.0  # type: ignore[union-attr]
        plain = loss_of("llama", model, recipe)

        assert regularised - plain == pytest.approx(0.5 * sum(terms), rel=1e-4)

    def test_pruned_triplets_leave_parameters_gradients_and_moments(self) -> None:
        keys = keys_of("adaq-lora", method_options=PRUNED, **ADAQ_KEYS)
        model = adapted("llama", **keys)
        loop = loop_of("llama", model, **keys)
        whole = sum(p.numel() for p in trained_parameters(model))
        for number in range(1, 5):
            torch.manual_seed(1)
            loop.run_step(number, 1)

        left = trained_parameters(model)

        assert sum(p.numel() for p in left) < whole / 3
        ranks = [len(p) for n, p in model.named_parameters() if "lora_E" in n]
        assert sum(ranks) == 2 * len(ranks)
        held = [p for group in loop.optimizer.param_groups for p in group["params"]]
        assert list(map(id, held)) == list(map(id, left))
        for parameter in left:
            moments = loop.optimizer.state[parameter]
            assert moments["exp_avg"].shape == parameter.shape
        assert len(loop.optimizer.state) == len(left)

    def test_what_is_pruned_is_what_was_masked(self) -> None:
        """Masking alone and taking out give the same outputs."""
        masked = keys_of(
            "adaq-lora",
            method_options=PRUNED | {"prune_physically": False},
            **ADAQ_KEYS,
        )
        pruned = keys_of("adaq-lora", method_options=PRUNED, **ADAQ_KEYS)

        outputs = [
            logits_of("llama", one_step(keys), tiny_recipe(**keys))
            for keys in (masked, pruned)
        ]

        assert torch.allclose(*outputs, atol=1e-6)

    def test_pruned_adapters_are_saved_and_loaded(self, tmp_path: Path) -> None:
        keys = keys_of("adaq-lora", method_options=PRUNED, **ADAQ_KEYS)
        recipe, model = tiny_recipe(**keys), train("llama", keys)
        model.save_pretrained(str(tmp_path))  # type: ignore[operator]

        loaded = methods.find("adaq-lora").load(built("llama", **keys), str(tmp_path))

        outputs = logits_of("llama", model, recipe)
        assert torch.allclose(logits_of("llama", loaded, recipe), outputs, atol=1e-6)


def one_step(keys: dict[str, Any]) -> nn.Module:
    model = adapted("llama", **keys)
    torch.manual_seed(1)
    loop_of("llama", model, **keys).run_step(1, 1)
    return model


class TestRelora:
    @pytest.mark.parametrize("quantization", ["none", "nf4"])
    def test_a_restart_keeps_what_was_learned(self, quantization: str) -> None:
        """A dense merge is exact but for rounding; NF4 rounds to its 16 values."""
        keys = keys_of("relora", dtype="float32", quantization=quantization)
        recipe, model = tiny_recipe(**keys), adapted("llama", **keys)
        loop = loop_of("llama", model, **keys)
        untrained = logits_of("llama", model, recipe)
        run_steps(model, loop)
        trained = logits_of("llama", model, recipe)

        loop.reach_milestone()

        restarted = logits_of("llama", model, recipe)
        if quantization == "none":
            assert torch.allclose(restarted, trained, atol=1e-5)
        learned = (trained - untrained).norm()
        assert (restarted - trained).norm() < 0.9 * learned
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                assert not parameter.any()

    @pytest.mark.parametrize("reset", ["zero", "random", "magnitude"])
    def test_moments_are_reset(self, reset: str) -> None:
        keys = keys_of("relora", method_options={"reset": reset, "reset_share": 0.9})
        model = adapted("llama", **keys)
        loop = loop_of("llama", model, **keys)
        run_steps(model, loop)

        loop.reach_milestone()

        left = [
            float((state["exp_avg"] != 0).float().mean())
            for state in loop.optimizer.state.values()
        ]
        share = sum(left) / len(left)
        assert share == pytest.approx(0.0 if reset == "zero" else 0.1, abs=0.02)

    def test_training_goes_on(self) -> None:
        keys = keys_of("relora")
        recipe, model = tiny_recipe(**keys), adapted("llama", **keys)
        loop = loop_of("llama", model, **keys)
        run_steps(model, loop)
        loop.reach_milestone()
        before = loss_of("llama", model, recipe)

        run_steps(model, loop)

        assert loss_of("llama", model, recipe) < before - 0.05


def run_steps(model: nn.Module, loop: Any) -> None:
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.01
    model.train()
    for number in range(1, 4):
        torch.manual_seed(1)
        loop.run_step(number, 1)


class TestCalibratedNf4:
    """NF4 of shifted blocks: quantization nf4-icq."""

    def module(self, weights: torch.Tensor) -> Any:
        scheme = quantizations.find("nf4-icq")
        rows, columns = weights.shape
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        recipe = Recipe(quantization="nf4-icq", compute_dtype="float32")
        module = scheme.quantized(linear, recipe)
        scheme.fill(module, weights)
        return module

    def weights(self) -> torch.Tensor:
        """Of blocks whose means differ, and a last block that is not whole."""
        torch.manual_seed(3)
        drift = torch.randn(96, 1) * 0.005
        return torch.randn(96, 130) * 0.02 + drift

    def test_codes_tell_more_than_nf4_s(self) -> None:
        blocks = _shifted._by_block(self.weights())

        shifts = _shifted.best_shifts(self.weights())

        plain, moved = (
            _shifted._entropy(blocks),
            _shifted._entropy(blocks - shifts[:, None]),
        )
        assert float(moved.mean()) > float(plain.mean()) + 0.02

    def test_the_weight_is_nf4_of_the_difference_plus_the_shift(self) -> None:
        weights = self.weights()
        module = self.module(weights.clone())
        shifts = module._shifts()
        codes = bnb.functional.dequantize_4bit(module.weight, module.weight.quant_state)

        dense = module.dense_weight(torch.float32)

        spread = shifts.repeat_interleave(64)[: weights.numel()].view(weights.shape)
        assert torch.equal(dense, codes + spread)
        assert float((dense - weights).abs().max()) < 0.02

    @pytest.mark.parametrize("recomputes", [True, False])
    def test_forward_and_backward_use_the_shifted_weight(
        self, recomputes: bool
    ) -> None:
        module = self.module(self.weights())
        module.recomputes = recomputes
        dense = module.dense_weight(torch.float32)
        x = torch.randn(5, 130, requires_grad=True)

        module(x).sum().backward()

        assert torch.allclose(module(x), x @ dense.T, atol=1e-5)
        assert x.grad is not None
        assert torch.allclose(x.grad, dense.sum(0).expand(5, 130), atol=1e-5)

    def test_only_the_official_forward_keeps_a_dense_weight(self) -> None:
        module = self.module(self.weights())
        x = torch.randn(5, 130, requires_grad=True)

        assert kept_bytes(module, x) == 0
        module.recomputes = False
        assert kept_bytes(module, x) == 96 * 130 * 4

    def test_adapters_do_not_merge_into_it(self) -> None:
        with pytest.raises(InputError, match="shifts"):
            merge(adapted("llama", **keys_of("lora", quantization="nf4-icq")))


def kept_bytes(module: nn.Module, x: torch.Tensor) -> int:
    """Bytes of tensors that autograd keeps of a layer, its input aside."""
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
            kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(kept)
