#!/usr/bin/env python3
"""Write grid.json, the cases for measure_grid.py, the most informative ones first."""

# A table: one case a line.
# fmt: off
import json
import sys
from pathlib import Path

CATALOG = Path(__file__).resolve().parents[1] / "architectures"

# Architecture facts (Hugging Face config fields) of well-known models.
LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}
MODELS = {
    "llama-2-7b": {**LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "llama-3.1-8b": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "llama-3.2-1b": {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
                     "vocab_size": 128256, "tie_word_embeddings": True},
    "llama-2-13b": {**LLAMA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                    "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000},
    "tinyllama-1.1b": {**LLAMA, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                       "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000},
    "mistral-7b": {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
                   "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                   "vocab_size": 32000, "sliding_window": None},
    "qwen2.5-0.5b": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
                     "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
                     "vocab_size": 151936, "tie_word_embeddings": True},
    "qwen2.5-1.5b": {"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960,
                     "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
                     "vocab_size": 151936, "tie_word_embeddings": True},
    "qwen2.5-7b": {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
                   "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
                   "vocab_size": 152064},
    "qwen3-4b": {"model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728,
                 "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
                 "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
    "gemma-2-2b": {"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216,
                   "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
                   "head_dim": 256, "vocab_size": 256000},
    "phi-2": {"model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240,
              "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 51200,
              "partial_rotary_factor": 0.4},
    "pythia-1.4b": {"model_type": "gpt_neox", "hidden_size": 2048, "intermediate_size": 8192,
                    "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 50304},
    "gpt2-xl": {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25, "vocab_size": 50257},
}
cases: list[dict] = []


def add(model: str, tag: str, **knobs) -> None:
    cases.append({"id": f"{model}/{tag}".replace("/", "--"), "model": model,
                  "config": MODELS[model], **knobs})


QLORA = {"quant": "nf4", "method": "lora"}
# 1. The seeds' own setting, and the levers one at a time around it.
add("llama-2-7b", "qlora-r16-b1-s512", **QLORA, trace=True)
add("llama-2-7b", "qlora-r16-b4-s512-paged8bit", **QLORA, batch=4, optim="paged_adamw_8bit")
add("llama-2-7b", "qlora-r64-b4-s512", **QLORA, batch=4, r=64)
add("llama-2-7b", "qlora-r16-b1-s2048", **QLORA, seq=2048)
add("llama-2-7b", "qlora-r16-b1-s2048-nockpt", **QLORA, seq=2048, ckpt=False, trace=True)
add("llama-2-7b", "qlora-r16-b1-s512-nodq", **QLORA, double_quant=False)
add("llama-3.2-1b", "qlora-r16-b1-s512-pretrained", **QLORA, load="pretrained", trace=True)
add("llama-2-7b", "qlora-r16-b1-s512-bf16-adapters", **QLORA, adapter_fp32=False)
add("llama-2-7b", "qlora-r16-b1-s512-noautocast", **QLORA, autocast="none")
add("llama-2-7b", "qlora-r16-b1-s2048-nockpt-nodrop", **QLORA, seq=2048, ckpt=False, dropout=0.0)
add("llama-2-7b", "int8-r16-b1-s512", quant="int8")
add("llama-2-7b", "lora-r16-b1-s512", trace=True)
add("llama-2-7b", "lora-r16-b1-s512-bf16-adapters", adapter_fp32=False, autocast="none")
add("llama-2-7b", "lora-r16-b1-s2048-nockpt", seq=2048, ckpt=False)
add("llama-2-7b", "lora-r16-b1-s2048-nockpt-nodrop", seq=2048, ckpt=False, dropout=0.0)
add("llama-2-7b", "lora-qv-r8-b1-s1024-nockpt", targets=["q_proj", "v_proj"], r=8, seq=1024, ckpt=False)
add("llama-2-7b", "dora-r16-b1-s512", method="dora")
add("llama-2-7b", "adalora-r12-b1-s512", method="adalora", r=12)
add("llama-2-7b", "full-bf16-b1-s512", method="full", autocast="none")
add("llama-2-7b", "full-bf16-b1-s512-adamw8bit", method="full", autocast="none", optim="adamw_8bit")
add("llama-2-7b", "full-bf16-b1-s512-adafactor", method="full", autocast="none", optim="adafactor")
# 2. Other families, the same two recipes.
for name in ("llama-3.2-1b", "qwen2.5-0.5b", "qwen2.5-1.5b", "tinyllama-1.1b", "gemma-2-2b", "phi-2",
             "pythia-1.4b", "qwen3-4b", "mistral-7b", "llama-3.1-8b", "qwen2.5-7b"):
    attn = "eager" if name.startswith("gemma-2") else "sdpa"  # soft-capped scores have no sdpa path
    add(name, "qlora-r16-b1-s1024", **QLORA, seq=1024, attn=attn)
    add(name, "lora-r16-b2-s1024-nockpt", batch=2, seq=1024, ckpt=False, attn=attn)
    add(name, "lora-r16-b2-s1024", batch=2, seq=1024, attn=attn, trace=name == "llama-3.2-1b")
for name in ("gpt2-xl",):
    add(name, "lora-r16-b2-s1024-nockpt", batch=2, seq=1024, ckpt=False, targets=["c_attn", "c_proj", "c_fc"])
    add(name, "full-fp32-b1-s1024", method="full", dtype="fp32", autocast="none", seq=1024)
# 3. Full fine-tuning: precision, optimizer, checkpointing.
for name in ("llama-3.2-1b", "qwen2.5-0.5b", "tinyllama-1.1b"):
    add(name, "full-fp32-autocast-b2-s1024", method="full", dtype="fp32", batch=2, seq=1024)
    add(name, "full-fp32-autocast-b2-s1024-nockpt", method="full", dtype="fp32", batch=2, seq=1024, ckpt=False)
    add(name, "full-bf16-b2-s1024", method="full", autocast="none", batch=2, seq=1024)
    for optim in ("adamw_fused", "adamw_loop", "sgd", "sgd_momentum", "adafactor", "adamw_8bit",
                  "paged_adamw_32bit", "paged_adamw_8bit", "lion_8bit"):
        if name != "qwen2.5-0.5b":
            add(name, f"full-bf16-b2-s1024-{optim}", method="full", autocast="none", batch=2, seq=1024,
                optim=optim)
# 4. How it grows: batch, sequence, rank.
for batch, seq in ((1, 256), (1, 4096), (1, 8192), (1, 16384), (4, 1024), (16, 256), (16, 1024), (3, 777)):
    add("llama-3.2-1b", f"qlora-r16-b{batch}-s{seq}", **QLORA, batch=batch, seq=seq)
    add("llama-3.2-1b", f"lora-r16-b{batch}-s{seq}-nockpt", batch=batch, seq=seq, ckpt=False)
for r in (1, 4, 8, 64, 128, 256):
    add("llama-3.2-1b", f"qlora-r{r}-b2-s1024", **QLORA, r=r, batch=2, seq=1024)
    add("llama-2-7b", f"qlora-r{r}-b1-s512", **QLORA, r=r)
# 5. Attention, padding, re-entrant checkpoints, accumulation, saved modules, uneven ranks.
for attn in ("eager", "sdpa"):
    add("llama-3.2-1b", f"lora-r16-b2-s2048-nockpt-{attn}-padded", batch=2, seq=2048, ckpt=False, attn=attn,
        padded=True)
    add("llama-3.2-1b", f"lora-r16-b2-s2048-{attn}", batch=2, seq=2048, attn=attn)
add("llama-3.2-1b", "qlora-r16-b2-s1024-reentrant", **QLORA, batch=2, seq=1024, reentrant=True)
add("llama-3.2-1b", "qlora-r16-b2-s1024-noprep", **QLORA, batch=2, seq=1024, kbit_prepare=False)
add("llama-3.2-1b", "qlora-r16-b2-s1024-accum4", **QLORA, batch=2, seq=1024, accum=4)
add("llama-3.2-1b", "lora-r16-b2-s1024-embeddings", batch=2, seq=1024, modules_to_save=["embed_tokens", "lm_head"])
add("llama-3.2-1b", "qlora-attn64-mlp16-b2-s1024", **QLORA, batch=2, seq=1024, r=64,
    rank_pattern={r".*mlp\..*": 16})
add("llama-3.2-1b", "dora-r16-b2-s1024-nockpt", method="dora", batch=2, seq=1024, ckpt=False)
add("llama-3.2-1b", "vera-r256-b2-s1024", method="vera", r=256, batch=2, seq=1024,
    targets=["q_proj", "o_proj"])
add("llama-3.2-1b", "int8-r16-b2-s1024-nockpt", quant="int8", batch=2, seq=1024, ckpt=False)
add("llama-3.2-1b", "int8-r16-b2-s1024-pretrained", quant="int8", batch=2, seq=1024, load="pretrained")
add("llama-3.2-1b", "fp4-r16-b2-s1024", quant="fp4", batch=2, seq=1024)
# 6. The large end of one card.
add("llama-2-13b", "qlora-r64-b1-s2048", **QLORA, r=64, seq=2048)
add("llama-2-13b", "lora-r16-b1-s2048", seq=2048)
add("llama-2-7b", "qlora-r16-b1-s512-pretrained", **QLORA, load="pretrained")
add("llama-3.2-1b", "lora-r16-b2-s1024-pretrained", batch=2, seq=1024, load="pretrained")
add("llama-3.1-8b", "qlora-r16-b1-s8192", **QLORA, seq=8192)
add("llama-3.1-8b", "full-bf16-b1-s2048-adamw8bit", method="full", autocast="none", seq=2048, optim="adamw_8bit")
add("llama-3.1-8b", "full-bf16-b1-s2048-oom", method="full", autocast="none", seq=2048)
# 7. LoRA alone and 8-bit LoRA up a ladder of ranks.
for r in (1, 4, 8, 64):
    add("llama-2-7b", f"lora-r{r}-b1-s512", r=r)
    add("llama-2-7b", f"int8-r{r}-b1-s512", quant="int8", r=r)
# 8. Further families, by the catalog's configs; experts; linear attention.
for name, file in (("opt-1.3b", "facebook--opt-1.3b"), ("bloom-560m", "bigscience--bloom-560m"),
                   ("gemma-3-1b", "google--gemma-3-1b-pt"), ("olmo-2-1b", "allenai--OLMo-2-0425-1B"),
                   ("phi-3-mini", "microsoft--Phi-3-mini-4k-instruct"),
                   ("stablelm-2-1.6b", "stabilityai--stablelm-2-1_6b"),
                   ("starcoder2-3b", "bigcode--starcoder2-3b"), ("smollm3-3b", "HuggingFaceTB--SmolLM3-3B"),
                   ("granite-3.1-2b", "ibm-granite--granite-3.1-2b-base"),
                   ("falcon-7b", "tiiuae--falcon-7b"), ("gemma-2b", "google--gemma-2b")):
    MODELS[name] = json.loads((CATALOG / f"{file}.json").read_text())["config"]
    # Falcon's linear layers are a class of their own, which only a loader quantises.
    add(name, "qlora-r16-b1-s1024", **QLORA, seq=1024, load="pretrained" if name == "falcon-7b" else "random")
    add(name, "lora-r16-b2-s1024-nockpt", batch=2, seq=1024, ckpt=False)
for name, file in (("deepseek-v2-lite", "deepseek-ai--DeepSeek-V2-Lite"), ("gpt-oss-20b", "openai--gpt-oss-20b"),
                   ("qwen3-30b-a3b", "Qwen--Qwen3-30B-A3B")):
    MODELS[name] = json.loads((CATALOG / f"{file}.json").read_text())["config"]
    add(name, "lora-qo-r16-b1-s512", targets=["q_proj", "o_proj"],
        attn="eager" if name == "gpt-oss-20b" else "sdpa")
MODELS["qwen3.5-9b"] = json.loads((CATALOG / "Qwen--Qwen3.5-9B.json").read_text())["config"]["text_config"]
add("qwen3.5-9b", "qlora-r16-b1-s1024", **QLORA, seq=1024)
# 9. Knobs that nothing above varies.
ONE = "llama-3.2-1b"
add(ONE, "lora-r16-b2-s1024-fp16", batch=2, seq=1024, dtype="fp16", autocast="fp16")
add(ONE, "lora-r16-b2-s1024-fp32-nockpt", batch=2, seq=1024, dtype="fp32", autocast="none", ckpt=False)
add(ONE, "qlora-r16-b2-s1024-nockpt", **QLORA, batch=2, seq=1024, ckpt=False)
add(ONE, "qlora-r16-b2-s1024-noautocast-nockpt", **QLORA, batch=2, seq=1024, ckpt=False, autocast="none")
add(ONE, "lora-r16-b2-s1024-nodrop", batch=2, seq=1024, dropout=0.0)
add(ONE, "lora-mlp-r16-b2-s1024-nockpt", batch=2, seq=1024, ckpt=False,
    targets=["gate_proj", "up_proj", "down_proj"])
add(ONE, "lora-qv-r16-b2-s1024-nockpt", batch=2, seq=1024, ckpt=False, targets=["q_proj", "v_proj"])
add(ONE, "lora-r16-b2-s1024-nockpt-accum4", batch=2, seq=1024, ckpt=False, accum=4)
add(ONE, "qlora-r64-b2-s1024-paged8bit", **QLORA, batch=2, seq=1024, r=64, optim="paged_adamw_8bit")
add(ONE, "qlora-deep64-b2-s1024", **QLORA, batch=2, seq=1024, r=64,
    rank_pattern={r"layers\.([0-7])\..*": 8})
add(ONE, "qdora-r16-b2-s1024", method="dora", quant="nf4", batch=2, seq=1024)
add(ONE, "qadalora-r12-b2-s1024", method="adalora", quant="nf4", r=12, batch=2, seq=1024)
add(ONE, "vera-r256-b2-s1024-nockpt", method="vera", r=256, batch=2, seq=1024, ckpt=False,
    targets=["q_proj", "o_proj"])
add(ONE, "full-bf16-b4-s2048-nockpt", method="full", autocast="none", batch=4, seq=2048, ckpt=False)
add(ONE, "full-bf16-b2-s1024-noclip", method="full", autocast="none", batch=2, seq=1024, clip=None)
add(ONE, "lora-r16-b2-s2048-nockpt-eager", batch=2, seq=2048, ckpt=False, attn="eager")
add(ONE, "lora-r16-b2-s1024-reentrant", batch=2, seq=1024, reentrant=True)
add(ONE, "int8-r16-b2-s1024", quant="int8", batch=2, seq=1024)
add(ONE, "int8-r16-b2-s1024-noautocast-nockpt", quant="int8", batch=2, seq=1024, ckpt=False, autocast="none")
add("qwen2.5-7b", "lora-r16-b1-s4096", seq=4096)
add("mistral-7b", "qlora-r32-b2-s2048", **QLORA, batch=2, seq=2048, r=32)

seen = [c["id"] for c in cases]
assert len(seen) == len(set(seen)), [i for i in seen if seen.count(i) > 1]
path = sys.argv[1] if len(sys.argv) > 1 else "grid.json"
with open(path, "w") as out:
    json.dump(cases, out, indent=1)
print(len(cases), "cases")
