from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from memplan import models
from memplan.errors import InputError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

CHATGLM2 = {
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "ffn_hidden_size": 13696,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "original_rope": True,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 32768,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
}
BAICHUAN2 = {
    "model_type": "baichuan",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_max_length": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 125696,
}
INTERNLM2 = {
    "model_type": "internlm2",
    "attn_implementation": "eager",
    "bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 92544,
}
MINICPM = {
    "model_type": "minicpm",
    "hidden_act": "silu",
    "hidden_size": 2304,
    "intermediate_size": 5760,
    "max_position_embeddings": 4096,
    "num_attention_heads": 36,
    "num_hidden_layers": 40,
    "num_key_value_heads": 36,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
    "vocab_size": 122753,
    "scale_emb": 12,
    "dim_model_base": 256,
    "scale_depth": 1.4,
}
PUBLISHED = {
    "chatglm2": (CHATGLM2, 6_243_584_000),
    "chatglm3": (CHATGLM2 | {"seq_length": 8192}, 6_243_584_000),
    "baichuan2": (BAICHUAN2, 7_505_973_248),
    "internlm2": (INTERNLM2, 7_737_708_544),
    "minicpm": (MINICPM, 2_724_880_896),
}

LLAMA_LIKE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 8,
    "torch_dtype": "float32",
}
TINY = {
    "chatglm": CHATGLM2
    | {
        "padded_vocab_size": 48,
        "hidden_size": 32,
        "ffn_hidden_size": 40,
        "num_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 8,
        "seq_length": 32,
        "torch_dtype": "float32",
    },
    "baichuan": BAICHUAN2 | LLAMA_LIKE,
    "internlm2": INTERNLM2 | LLAMA_LIKE | {"num_key_value_heads": 2},
    "minicpm": MINICPM | LLAMA_LIKE | {"num_key_value_heads": 2, "dim_model_base": 16},
}
TOKENS = 12
"""More than the tables of TINY's context hold, so that they grow."""


def build(published: dict[str, Any], attention: str = "sdpa") -> Any:
    models.register()
    torch.manual_seed(0)
    keys = {key: value for key, value in published.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(published["model_type"], **keys)
    return transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention
    )


def on_meta(published: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return build(published)


def token_ids() -> Any:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 48, (2, TOKENS), generator=generator)


def gradients(model: Any) -> dict[str, Any]:
    model.zero_grad()
    ids = token_ids()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def saved_storages(run: Any) -> dict[int, tuple[int, ...]]:
    """Bytes of every storage that autograd keeps, by its address."""
    kept, sizes = [], {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sizes


def test_types_are_told_without_torch() -> None:
    program = (
        "import sys; from memplan.models import MODEL_TYPES; "
        "assert 'torch' not in sys.modules; print(*sorted(MODEL_TYPES))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["baichuan", "chatglm", "internlm2", "minicpm"]


def test_registering_again_changes_nothing() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    models.register()
    first = [CONFIG_MAPPING[name] for name in sorted(models.MODEL_TYPES)]
    models.register()
    assert [CONFIG_MAPPING[name] for name in sorted(models.MODEL_TYPES)] == first


def test_a_type_that_is_taken_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    other = type("OtherConfig", (transformers.PretrainedConfig,), {})
    other.model_type = "minicpm"
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "minicpm", other)
    models.register()
    assert CONFIG_MAPPING["minicpm"] is other


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name: str) -> None:
    published, count = PUBLISHED[name]
    assert sum(weight.numel() for weight in on_meta(published).parameters()) == count


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_training_step_of_the_published_size_runs_on_meta(name: str) -> None:
    published, _ = PUBLISHED[name]
    model = on_meta(published | {"num_hidden_layers": 2, "num_layers": 2})
    ids = torch.zeros(2, 16, dtype=torch.long, device="meta")
    output = model(input_ids=ids, labels=ids, use_cache=False)
    output.loss.backward()
    assert output.logits.shape == (2, 16, model.config.vocab_size)
    assert all(weight.grad.shape == weight.shape for weight in model.parameters())


def test_chatglm_carries_the_published_names_and_shapes() -> None:
    shapes = {name: tuple(p.shape) for name, p in on_meta(CHATGLM2).named_parameters()}
    layer = "transformer.encoder.layers.27"
    assert shapes["transformer.embedding.word_embeddings.weight"] == (65024, 4096)
    assert shapes[f"{layer}.input_layernorm.weight"] == (4096,)
    assert shapes[f"{layer}.self_attention.query_key_value.weight"] == (4608, 4096)
    assert shapes[f"{layer}.self_attention.query_key_value.bias"] == (4608,)
    assert shapes[f"{layer}.self_attention.dense.weight"] == (4096, 4096)
    assert shapes[f"{layer}.post_attention_layernorm.weight"] == (4096,)
    assert shapes[f"{layer}.mlp.dense_h_to_4h.weight"] == (27392, 4096)
    assert shapes[f"{layer}.mlp.dense_4h_to_h.weight"] == (4096, 13696)
    assert shapes["transformer.encoder.final_layernorm.weight"] == (4096,)
    assert shapes["transformer.output_layer.weight"] == (65024, 4096)
    assert len(shapes) == 28 * 7 + 3


def test_the_llama_likes_carry_the_published_names_and_shapes() -> None:
    baichuan = on_meta(BAICHUAN2).state_dict()
    assert baichuan["model.layers.31.self_attn.W_pack.weight"].shape == (12288, 4096)
    assert baichuan["lm_head.weight"].shape == (125696, 4096)
    assert len(baichuan) == 32 * 7 + 3
    internlm2 = on_meta(INTERNLM2).state_dict()
    assert internlm2["model.tok_embeddings.weight"].shape == (92544, 4096)
    assert internlm2["model.layers.31.attention.wqkv.weight"].shape == (6144, 4096)
    assert internlm2["model.layers.31.feed_forward.w2.weight"].shape == (4096, 14336)
    assert internlm2["output.weight"].shape == (92544, 4096)
    assert len(internlm2) == 32 * 7 + 3
    minicpm = on_meta(MINICPM)
    assert minicpm.lm_head.weight is minicpm.model.embed_tokens.weight
    assert minicpm.model.layers[39].self_attn.k_proj.weight.shape == (2304, 2304)
    assert len(minicpm.state_dict()) == 40 * 9 + 3


@pytest.mark.parametrize("name", PUBLISHED)
def test_configurations_answer_to_the_usual_names(name: str) -> None:
    published, _ = PUBLISHED[name]
    config = on_meta(published).config
    layers = {"chatglm": 28, "minicpm": 40}.get(config.model_type, 32)
    groups = {"chatglm": 2, "internlm2": 8, "minicpm": 36}.get(config.model_type, 32)
    context = {"chatglm2": 32768, "chatglm3": 8192, "internlm2": 32768}.get(name, 4096)
    assert config.num_hidden_layers == layers
    assert config.num_key_value_heads == groups
    assert config.max_position_embeddings == context
    assert (
        config.intermediate_size
        == {
            "chatglm": 13696,
            "baichuan": 11008,
            "internlm2": 14336,
            "minicpm": 5760,
        }[config.model_type]
    )
    assert config.dtype == getattr(torch, published["torch_dtype"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora_on_chatglms_fused_projection_counts_as_recipes_report() -> None:
    with torch.device("meta"):
        config = peft.LoraConfig(r=8, target_modules=["query_key_value"])
        model = peft.get_peft_model(on_meta(CHATGLM2), config)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 28 * 8 * (4096 + 4608) == 1_949_696


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "linears"),
    [
        ("chatglm", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        ("baichuan", {"W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("internlm2", {"wqkv", "wo", "w1", "w2", "w3"}),
        (
            "minicpm",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
            | {"down_proj"},
        ),
    ],
)
def test_all_linear_adapts_the_blocks_and_not_the_head(
    name: str, linears: set[str]
) -> None:
    config = peft.LoraConfig(
        r=2,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    model = peft.get_peft_model(build(TINY[name]), config)
    adapted = [
        path.removesuffix(".lora_A").split(".")[-1]
        for path, _ in model.named_modules()
        if path.endswith(".lora_A")
    ]
    assert set(adapted) == linears
    assert len(adapted) == 2 * len(linears)
    found = gradients(model)
    assert len(found) == 2 * len(adapted)
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


@pytest.mark.parametrize("name", TINY)
def test_training_lowers_the_loss(name: str) -> None:
    model = build(TINY[name]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = token_ids()
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] < 2 * math.log(48)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", TINY)
def test_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:
    model = build(TINY[name]).train()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model)
    assert expected.keys() == found.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", TINY)
def test_checkpointing_reaches_adapters_of_a_frozen_half_precision_base(
    name: str,
) -> None:
    base = build(TINY[name] | {"torch_dtype": "bfloat16"})
    base = peft.prepare_model_for_kbit_training(base)
    assert {weight.dtype for weight in base.parameters()} == {torch.float32}
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    found = gradients(peft.get_peft_model(base, config).train())
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_eager_attention_and_sdpa_agree(name: str, padded: bool) -> None:
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, -3:] = 0
    logits = {
        attention: build(TINY[name], attention)(
            token_ids(), attention_mask=mask if padded else None, use_cache=False
        ).logits
        for attention in ("eager", "sdpa")
    }
    kept = mask.bool() if padded else torch.ones(2, TOKENS, dtype=torch.bool)
    torch.testing.assert_close(logits["eager"][kept], logits["sdpa"][kept])


@pytest.mark.parametrize("name", TINY)
def test_no_token_sees_a_later_one(name: str) -> None:
    model = build(TINY[name])
    ids = token_ids()
    changed = ids.clone()
    changed[:, 7] = 3 + (ids[:, 7] - 2) % 45
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("name", TINY)
def test_the_cache_continues_where_it_stopped(name: str) -> None:
    model = build(TINY[name]).eval()
    ids = token_ids()
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :5], use_cache=True)
    rest = model(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, whole[:, 5:])


@pytest.mark.parametrize("name", TINY)
def test_saving_and_loading_keep_the_logits(name: str, tmp_path: Any) -> None:
    model = build(TINY[name]).eval()
    expected = model(token_ids()).logits
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(token_ids()).logits, expected)


@pytest.mark.parametrize("name", TINY)
def test_attention_gets_one_key_and_value_per_query_head(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[type(build(TINY[name])).__module__]
    shapes = []

    def spy(
        attention: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
    ):
        shapes.append((query.shape, key.shape, value.shape))
        return query.transpose(1, 2), None

    monkeypatch.setattr(module, "eager_attention", spy)
    build(TINY[name], "eager")(token_ids())
    assert shapes == [((2, 4, TOKENS, 8),) * 3] * 2


def test_chatglm_turns_neighbours_and_leaves_the_second_half() -> None:
    from memplan.models.chatglm import RotaryEmbedding, rotate_pairs

    heads = torch.arange(1.0, 9.0).expand(1, 3, 2, 8)
    table = RotaryEmbedding(4, 16)()
    assert table.shape == (16, 2, 2)
    turned = rotate_pairs(heads, table[torch.tensor([[0, 1, 5]])])
    assert torch.equal(turned[..., 4:], heads[..., 4:])
    assert torch.equal(turned[:, 0], heads[:, 0])
    # Frequencies over 4 features: 10000^0 and 10000^(-2/4).
    for index, position in ((1, 1), (2, 5)):
        expected = [
            1 * math.cos(position) - 2 * math.sin(position),
            2 * math.cos(position) + 1 * math.sin(position),
            3 * math.cos(position / 100) - 4 * math.sin(position / 100),
            4 * math.cos(position / 100) + 3 * math.sin(position / 100),
        ]
        torch.testing.assert_close(turned[0, index, 1, :4], torch.tensor(expected))


def test_chatglms_norm_weighs_in_fp32_and_casts_back() -> None:
    from memplan.models.chatglm import RMSNorm

    norm = RMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 2.0])
    output = norm(torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16))
    rms = math.sqrt((9 + 16) / 2)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(
        output, torch.tensor([[3 / rms, 8 / rms]], dtype=torch.bfloat16)
    )


def test_norm_head_normalises_a_copy_in_training_and_itself_in_evaluation() -> None:
    from memplan.models.baichuan import NormHead

    head = NormHead(2, 2)
    head.weight.data = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    hidden_states = torch.tensor([[1.0, 1.0]])
    expected = torch.tensor([[7 / 5, 1.0]])
    torch.testing.assert_close(head.train()(hidden_states), expected)
    assert head.weight.tolist() == [[3.0, 4.0], [0.0, 2.0]]
    torch.testing.assert_close(head.eval()(hidden_states), expected)
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(2))


def test_norm_head_keeps_its_copy_for_backward_though_frozen() -> None:
    from memplan.models.baichuan import NormHead

    head = NormHead(16, 64).requires_grad_(False).train()
    hidden_states = torch.randn(3, 16, requires_grad=True)
    saved = saved_storages(lambda: head(hidden_states))
    assert head.weight.untyped_storage().data_ptr() not in saved
    assert list(saved.values()) == [64 * 16 * 4]


def test_baichuans_saved_values_keep_the_packed_projection() -> None:
    model = build(TINY["baichuan"]).requires_grad_(False)
    attention = model.model.layers[0].self_attn
    hidden_states = torch.randn(2, TOKENS, 32, requires_grad=True)
    positions = torch.arange(TOKENS).unsqueeze(0)
    saved = saved_storages(lambda: attention(hidden_states, None, positions))
    assert 2 * TOKENS * 3 * 32 * 4 in saved.values()


def test_minicpm_scales_embeddings_residuals_and_logits() -> None:
    assert build(TINY["minicpm"]).model.layers[0].residual_scale == 1.4 / math.sqrt(2)
    ids = token_ids()
    model = build(TINY["minicpm"])
    torch.testing.assert_close(
        model.model.embed(ids), 12 * model.model.embed_tokens(ids)
    )
    wider = build(TINY["minicpm"] | {"dim_model_base": 32})
    torch.testing.assert_close(wider(ids).logits, 2 * model(ids).logits)


def test_rotary_tables_take_a_context_per_layer_and_grow() -> None:
    model = build(TINY["minicpm"])
    tables = model.model.layers[1].self_attn.rotary_emb
    assert tables.cos_cached.shape == (8, 8)
    assert tables.cos_cached[1, 0].item() == pytest.approx(math.cos(1))
    assert tables.cos_cached[3, 0] == tables.cos_cached[3, 4]
    model(token_ids(), use_cache=False)
    assert tables.sin_cached.shape == (TOKENS, 8)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("baichuan", {"num_attention_heads": 5}, "num_attention_heads: 5.*size 32"),
        ("internlm2", {"num_key_value_heads": 3}, "num_key_value_heads: 3.*heads 4"),
        ("chatglm", {"multi_query_group_num": 0}, "multi_query_group_num: 0.*heads 4"),
    ],
)
def test_heads_that_do_not_divide_are_refused_by_name(
    name: str, keys: dict[str, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build(TINY[name] | keys)
