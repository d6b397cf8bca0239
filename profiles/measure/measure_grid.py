#!/usr/bin/env python3
"""Measure the peak memory of real, short fine-tunes on one GPU, case after case.

Needs torch, transformers and peft; bitsandbytes for the quantised cases. It needs nothing
of this project, so its records are an independent check of what the project predicts.

    python measure_grid.py --grid grid.json --out records.jsonl [--seconds 540]
        [--skip done.jsonl ...] [--traces DIR] [--trace-all] [--only REGEX] [--tag TAG]
        [--shared]

grid.json is a list of cases (see make_grid.py). Weights are random and drawn on the device:
memory does not depend on their values. Cases run in one process, the cache emptied between
them; a case that runs out of memory is recorded as such, with the allocator's message. A
process whose context an error has spoilt ends with 7, and goes on anew with --skip. With
--shared, other processes use the card meanwhile: the driver's figures are then left out.

A record (one JSON line): the case as given; n_params; n_trainable; for the load, for the
adapters and for each phase of each step (forward, backward, clip, optimizer, zero_grad) the
allocated bytes after it and the peaks within it (allocated, reserved, requested); over all
of it the same peaks, the allocator's retries, the device's used bytes as the driver counts
them less those before the process's first allocation; loss per step; versions; device.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import gzip
import json
import os
import platform
import re
import tempfile
import time
import traceback
from pathlib import Path

import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# ---------------------------------------------------------------- memory readings
def stats() -> dict:
    if not CUDA:
        return {}
    s = torch.cuda.memory_stats()
    return {
        "allocated": s["allocated_bytes.all.current"],
        "reserved": s["reserved_bytes.all.current"],
        "allocated_peak": s["allocated_bytes.all.peak"],
        "reserved_peak": s["reserved_bytes.all.peak"],
        "requested_peak": s["requested_bytes.all.peak"],
        "active_peak": s["active_bytes.all.peak"],
        "inactive_split_peak": s["inactive_split_bytes.all.peak"],
        "alloc_retries": s["num_alloc_retries"],
        "ooms": s["num_ooms"],
    }


SHARED = False
"""Whether other processes use the card meanwhile, so that the driver counts theirs too."""


def driver_used() -> int | None:
    """Bytes in use on the device as the driver counts them (all processes)."""
    if not CUDA or SHARED:
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


class Phases:
    """Peaks of each phase, and over all of them."""

    def __init__(self):
        self.rows: list[dict] = []

    @contextlib.contextmanager
    def __call__(self, name: str):
        if CUDA:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        before = stats().get("allocated")
        try:
            yield
            if CUDA:
                torch.cuda.synchronize()
        finally:  # a phase that runs out of memory keeps its peaks
            seconds = round(time.perf_counter() - start, 4)
            self.rows.append(
                {
                    "phase": name,
                    "seconds": seconds,
                    "allocated_before": before,
                    **stats(),
                }
            )

    def peak(self, key: str) -> int | None:
        values = [r[key] for r in self.rows if r.get(key) is not None]
        return max(values) if values else None


# ---------------------------------------------------------------- the model
def build_model(case: dict):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = dict(case["config"])
    config = CONFIG_MAPPING[config.pop("model_type")](**config)
    config.use_cache = False
    dtype = DTYPES[case["dtype"]]
    kwargs = {"dtype": dtype, "attn_implementation": case["attn"]}
    if case["load"] == "pretrained":
        return load_pretrained(case, config, kwargs)
    if case["quant"] == "none":
        with DEVICE:
            return AutoModelForCausalLM.from_config(config, **kwargs)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **kwargs)
    quantize_in_place(model, case)
    materialize(model, dtype)
    model.tie_weights()
    return model


def checkpoint_of(case) -> Path:
    return Path(os.environ.get("CHECKPOINTS", tempfile.gettempdir())) / case["model"]


def save_checkpoint(case) -> None:
    """Writes random weights for from_pretrained, before anything is measured."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if (checkpoint_of(case) / "config.json").exists():
        return
    config = dict(case["config"])
    config = CONFIG_MAPPING[config.pop("model_type")](**config)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[case["dtype"]])
    model.save_pretrained(checkpoint_of(case))
    del model
    clean()


def load_pretrained(case, config, kwargs):
    """Through from_pretrained, as a user loads: its load peak counts."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quant = None
    if case["quant"] in ("nf4", "fp4"):
        quant = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=case["quant"],
            bnb_4bit_use_double_quant=case["double_quant"],
            bnb_4bit_compute_dtype=DTYPES["bf16"],
        )
    elif case["quant"] == "int8":
        quant = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(
        checkpoint_of(case),
        quantization_config=quant,
        device_map={"": DEVICE},
        **kwargs,
    )


def quantize_in_place(model, case) -> None:
    """Swap every linear layer but the head for bitsandbytes' own, weights drawn at random."""
    import bitsandbytes as bnb

    dtype = DTYPES[case["dtype"]]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not torch.nn.Linear or name in ("lm_head", "embed_out"):
                continue
            shape = (child.out_features, child.in_features)
            weight = torch.randn(shape, device=DEVICE, dtype=dtype) * 0.02
            bias = child.bias is not None
            with torch.device("meta"):
                if case["quant"] == "int8":
                    new = bnb.nn.Linear8bitLt(
                        shape[1],
                        shape[0],
                        bias=bias,
                        has_fp16_weights=False,
                        threshold=6.0,
                    )
                else:
                    new = bnb.nn.Linear4bit(
                        shape[1],
                        shape[0],
                        bias=bias,
                        compute_dtype=DTYPES["bf16"],
                        compress_statistics=case["double_quant"],
                        quant_type=case["quant"],
                    )
            if case["quant"] == "int8":
                new.weight = bnb.nn.Int8Params(
                    weight, requires_grad=False, has_fp16_weights=False
                )._quantize(DEVICE)
            else:
                new.weight = bnb.nn.Params4bit(
                    weight,
                    requires_grad=False,
                    quant_type=case["quant"],
                    compress_statistics=case["double_quant"],
                )._quantize(DEVICE)
            del weight
            setattr(parent, name, new)
    if case["quant"] == "int8":
        model.is_loaded_in_8bit = True
    else:
        model.is_loaded_in_4bit = True
    model.is_quantized = True


def materialize(model, dtype) -> None:
    """Give what is still on the meta device random storage on the real one."""
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and p.device.type == "meta":
                data = torch.randn(p.shape, device=DEVICE, dtype=p.dtype) * 0.02
                module._parameters[name] = torch.nn.Parameter(data, p.requires_grad)
        for name, b in list(module._buffers.items()):
            if b is not None and b.device.type == "meta":
                new = torch.zeros(b.shape, device=DEVICE, dtype=b.dtype)
                if name.endswith("inv_freq"):
                    n = b.shape[-1]
                    new = 1.0 / (10000 ** (torch.arange(n, device=DEVICE).float() / n))
                module._buffers[name] = new


def adapt(model, case):
    import peft

    if case["method"] == "full":
        if case["ckpt"]:
            model.gradient_checkpointing_enable({"use_reentrant": case["reentrant"]})
        return model
    if case["quant"] != "none" and case["kbit_prepare"]:
        model = peft.prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=case["ckpt"],
            gradient_checkpointing_kwargs={"use_reentrant": case["reentrant"]},
        )
    elif case["ckpt"]:
        model.gradient_checkpointing_enable({"use_reentrant": case["reentrant"]})
        model.enable_input_require_grads()
    targets = case["targets"]
    common = {
        "r": case["r"],
        "target_modules": targets,
        "lora_dropout": case["dropout"],
        "lora_alpha": case["alpha"],
        "task_type": "CAUSAL_LM",
    }
    if case["rank_pattern"]:
        common["rank_pattern"] = case["rank_pattern"]
    if case["modules_to_save"]:
        common["modules_to_save"] = case["modules_to_save"]
    if case["method"] == "lora":
        config = peft.LoraConfig(**common)
    elif case["method"] == "dora":
        config = peft.LoraConfig(use_dora=True, **common)
    elif case["method"] == "adalora":
        common.pop("r")
        config = peft.AdaLoraConfig(
            init_r=case["r"],
            target_r=max(1, case["r"] // 2),
            tinit=1,
            tfinal=1,
            deltaT=1,
            total_step=10,
            **common,
        )
    elif case["method"] == "vera":
        for key in ("lora_dropout", "lora_alpha"):
            common.pop(key)
        config = peft.VeraConfig(vera_dropout=case["dropout"], **common)
    else:
        raise ValueError(f"unknown method {case['method']!r}")
    return peft.get_peft_model(
        model, config, autocast_adapter_dtype=case["adapter_fp32"]
    )


def make_optimizer(case, params):
    name, lr = case["optim"], 1e-4
    if name == "adamw_torch":
        return torch.optim.AdamW(params, lr=lr)
    if name == "adamw_fused":
        return torch.optim.AdamW(params, lr=lr, fused=True)
    if name == "adamw_loop":
        return torch.optim.AdamW(params, lr=lr, foreach=False)
    if name == "sgd":
        return torch.optim.SGD(params, lr=lr)
    if name == "sgd_momentum":
        return torch.optim.SGD(params, lr=lr, momentum=0.9)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(params, lr=lr, scale_parameter=False, relative_step=False)
    import bitsandbytes as bnb

    return {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
        "lion_8bit": bnb.optim.Lion8bit,
    }[name](params, lr=lr)


# ---------------------------------------------------------------- one case
DEFAULTS = {
    "method": "lora",
    "quant": "none",
    "double_quant": True,
    "kbit_prepare": True,
    "r": 16,
    "alpha": 16,
    "dropout": 0.05,
    "targets": "all-linear",
    "rank_pattern": None,
    "modules_to_save": None,
    "adapter_fp32": True,
    "dtype": "bf16",
    "autocast": "bf16",
    "batch": 1,
    "seq": 512,
    "ckpt": True,
    "reentrant": False,
    "attn": "sdpa",
    "optim": "adamw_torch",
    "clip": 1.0,
    "accum": 1,
    "steps": 3,
    "load": "random",
    "padded": False,
}


def run_case(case: dict, trace_to: Path | None) -> dict:
    case = {**DEFAULTS, **case}
    phases = Phases()
    record: dict = {"case": case, "status": "ok", "losses": []}
    torch.manual_seed(0)
    if case["load"] == "pretrained":
        save_checkpoint(case)
    driver_before = driver_used()
    reserved_before = stats().get("reserved")
    if trace_to is not None and CUDA:
        torch.cuda.memory._record_memory_history(
            max_entries=2_000_000, stacks="python", context=None
        )
    model = optimizer = None
    try:
        with phases("load"):
            model = build_model(case)
        with phases("adapt"):
            model = adapt(model, case)
        model.train()
        params = [p for p in model.parameters() if p.requires_grad]
        record["n_params"] = sum(
            p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters()
        )
        record["n_trainable"] = sum(p.numel() for p in params)
        record["trainable_dtypes"] = sorted({str(p.dtype) for p in params})
        optimizer = make_optimizer(case, params)
        vocab = model.get_input_embeddings().weight.shape[0]
        cast = (
            torch.autocast(DEVICE.type, DTYPES[case["autocast"]])
            if case["autocast"] != "none"
            else contextlib.nullcontext()
        )
        for step in range(case["steps"]):
            for _ in range(case["accum"]):
                ids = torch.randint(
                    0, vocab, (case["batch"], case["seq"]), device=DEVICE
                )
                inputs = {"input_ids": ids, "labels": ids}
                if case["padded"]:
                    mask = torch.ones_like(ids)
                    mask[0, : case["seq"] // 4] = 0
                    inputs["attention_mask"] = mask
                with phases(f"{step}.forward"), cast:
                    loss = model(**inputs).loss / case["accum"]
                with phases(f"{step}.backward"):
                    loss.backward()
                record["losses"].append(round(loss.item() * case["accum"], 4))
                del loss, inputs, ids
            if case["clip"]:
                with phases(f"{step}.clip"):
                    torch.nn.utils.clip_grad_norm_(params, case["clip"])
            with phases(f"{step}.optimizer"):
                optimizer.step()
                if case["method"] == "adalora":
                    try:
                        model.base_model.update_and_allocate(step)
                    except Exception as error:
                        record.setdefault("adalora_errors", []).append(
                            repr(error)[:200]
                        )
            with phases(f"{step}.zero_grad"):
                optimizer.zero_grad(set_to_none=True)
    except torch.OutOfMemoryError as error:
        record["status"], record["error"] = "oom", str(error)[:600]
    except Exception as error:  # a broken case must not end the grid
        record["status"] = "error"
        record["error"] = "".join(traceback.format_exception(error))[-1800:]
    if CUDA:
        torch.cuda.synchronize()
    record["phases"] = phases.rows
    for key in (
        "allocated_peak",
        "reserved_peak",
        "requested_peak",
        "active_peak",
        "inactive_split_peak",
    ):
        record[key] = phases.peak(key)
    record["final"] = stats()
    used = driver_used()
    record["driver_used_end"] = used
    record["driver_used_before"] = driver_before
    record["reserved_before"] = reserved_before
    if trace_to is not None and CUDA:
        save_trace(trace_to, case)
        torch.cuda.memory._record_memory_history(enabled=None)
    del model, optimizer
    with contextlib.suppress(UnboundLocalError):
        del params
    return record


def save_trace(folder: Path, case: dict) -> None:
    """The allocator's events in order: [action, address, bytes], gzipped JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    events = torch.cuda.memory._snapshot()["device_traces"][0]
    with gzip.open(folder / f"{case['id']}.jsonl.gz", "wt") as out:
        for e in events:
            out.write(json.dumps([e["action"], e.get("addr"), e.get("size")]) + "\n")


def clean() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.synchronize()
        with contextlib.suppress(Exception):
            torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_accumulated_memory_stats()


def environment() -> dict:
    env = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "alloc_conf": os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
        or os.environ.get("PYTORCH_ALLOC_CONF"),
        "shared": SHARED,
    }
    for name in ("transformers", "peft", "accelerate", "bitsandbytes"):
        with contextlib.suppress(Exception):
            env[name] = __import__(name).__version__
    if CUDA:
        props = torch.cuda.get_device_properties(0)
        before = driver_used()
        torch.zeros(1, device=DEVICE)
        env |= {
            "gpu": props.name,
            "total_memory": props.total_memory,
            "capability": f"{props.major}.{props.minor}",
            "cuda": torch.version.cuda,
            "driver_used_first": before,
            "driver_used_context": driver_used(),
        }
    return env


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--skip", type=Path, nargs="*", default=[])
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--trace-all", action="store_true")
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--only")
    parser.add_argument("--tag", default="")
    args = parser.parse_args()
    global SHARED
    SHARED = args.shared
    deadline = time.monotonic() + args.seconds
    done = {
        json.loads(line)["case"]["id"]
        for path in args.skip
        if path.exists()
        for line in path.read_text().splitlines()
        if '"id"' in line
    }
    cases = [c | {"id": c["id"] + args.tag} for c in json.loads(args.grid.read_text())]
    cases = [
        c
        for c in cases
        if c["id"] not in done and (not args.only or re.search(args.only, c["id"]))
    ]
    env = environment()
    print(json.dumps(env))
    slowest = 10.0
    with args.out.open("a") as out:
        for number, case in enumerate(cases):
            if time.monotonic() + slowest > deadline:
                print(
                    f"time is up: {len(cases) - number} of {len(cases)} cases are left"
                )
                break
            clean()
            start = time.monotonic()
            trace = args.traces if case.get("trace") or args.trace_all else None
            record = run_case(case, trace)
            record["environment"] = env
            record["seconds"] = round(time.monotonic() - start, 2)
            slowest = max(slowest, record["seconds"])
            out.write(json.dumps(record) + "\n")
            out.flush()
            peak = (record["allocated_peak"] or 0) / 2**30
            print(
                f"{case['id']:60s} {record['status']:5s} {peak:8.3f} GiB "
                f"{record['seconds']:6.1f} s  {record.get('error', '')[-160:]!r}",
                flush=True,
            )
            if record["status"] == "error" and "CUDA error" in record["error"]:
                raise SystemExit(7)


if __name__ == "__main__":
    main()
