"""The measuring process: `python -m memplan.profiler.child JOURNAL`.

It is told its task on standard input, and ends when that is closed: whoever started it
is gone then. What it finishes goes into the journal.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memplan import checks, methods
from memplan.architecture import Architecture
from memplan.catalog import architecture_of
from memplan.errors import InputError
from memplan.inference import MERGED, NONE, loaded_as
from memplan.model_source import ModelSource
from memplan.profiler import loops
from memplan.profiler.answer import check_answer
from memplan.profiler.cpu_meter import CpuMeter
from memplan.profiler.cuda_meter import CudaMeter
from memplan.profiler.environment import card, environment
from memplan.profiler.meter import Meter, Moments
from memplan.profiler.task import Journal, Task
from memplan.training import life as training_life
from memplan.training import model as training_model
from memplan.training.loss import prepare_loss
from memplan.training.values import materialize

EXIT_ORPHANED = 4
"""What the process ends with when whoever started it is gone."""

NO_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
)
"""What is said where memory runs out besides torch's CUDA allocator: its CPU allocator
(c10/core/impl/alloc_cpu.cpp), the driver (c10/cuda/CUDAException.cpp), its libraries
(aten/src/ATen/cuda/Exceptions.cpp)."""

MESSAGE_CHARACTERS = 1000
"""How much of an error is told."""


def main() -> None:
    """Runs the task, and tells in the journal how it ended."""
    task = Task.from_line(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    journal = Journal(Path(sys.argv[1]))
    try:
        run(task, journal)
    except InputError as error:
        journal.write("outcome", status="refused", message=str(error))
    except (torch.OutOfMemoryError, MemoryError) as error:
        journal.write("outcome", status="out-of-memory", message=_told(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent is told
        full = any(words in str(error) for words in NO_MEMORY)
        status = "out-of-memory" if full else "failed"
        journal.write("outcome", status=status, message=_told(error))
        traceback.print_exc()
    else:
        journal.write("outcome", status="ok", message="")


def run(task: Task, journal: Journal) -> None:
    """Builds the model, adapts it, trains it, and reads memory at every moment."""
    loops.check(task.recipe, task.device)
    device = _device(task)
    meter: Meter = CpuMeter() if task.device == "cpu" else CudaMeter(task.trace)
    moments = Moments(meter, journal)
    torch.manual_seed(task.seed)
    with meter:
        if task.device == "cuda":
            journal.write("card", **card())
        journal.write("environment", values=environment(task.device))
        try:
            optimizer = _fine_tune(task, device, moments, journal)
        except torch.OutOfMemoryError:
            moments.end()
            # The optimizer's paged state is not told, and so neither is the context.
            journal.write("finish", **meter.finish(None) | {"context_bytes": None})
            raise
        finally:
            moments.end()
        journal.write("finish", **meter.finish(optimizer))


def _fine_tune(
    task: Task, device: torch.device, moments: Moments, journal: Journal
) -> Any:
    """The optimizer of the finished fine-tune; None where nothing was trained."""
    source = ModelSource(name=task.model, origin="file", config=dict(task.config))
    architecture = architecture_of(source)
    recipe = loops.build_recipe(task.recipe)
    if task.inference is not None:
        _answer(task, architecture, device, moments)
        _tell_parameters(journal, architecture.total_parameters, 0)
        return None
    checks.check(architecture, task.recipe, None)
    _check_answerable(task)
    moments.begin("load")
    model = _load(task, architecture, recipe, device)
    moments.hold(model)
    vocab_size = architecture.vocab_size
    moments.begin("adapt")
    training_model.prepare(model, recipe)
    adapted = training_model.adapt(model, architecture, recipe)
    trained = sum(p.numel() for p in training_model.trained_parameters(adapted))
    _tell_parameters(journal, architecture.total_parameters, trained)
    del model
    optimizer = loops.train(adapted, task, vocab_size, moments)
    if task.generate:
        moments.begin("generate")
        answer = check_answer(adapted, task, vocab_size)
        moments.end()
        journal.write("answer", **answer)
    return optimizer


def _check_answerable(task: Task) -> None:
    method = methods.find(task.recipe.method)
    if task.generate and not method.keeps_base:
        raise InputError(
            "--generate",
            task.generate,
            f"asks adapters alone, and {task.recipe.method} changes the weights below "
            "them as it restarts",
            "leave it out, or use another method",
        )


def _answer(
    task: Task, architecture: Architecture, device: torch.device, moments: Moments
) -> None:
    """Loads the model and its adapters, and answers a batch of prompts."""
    assert task.inference is not None
    recipe = loaded_as(task.recipe)
    adapters = task.inference.settled(architecture, recipe).adapters
    checks.check_inference(architecture, recipe, None, adapted=adapters != NONE)
    moments.begin("load")
    model = _load(task, architecture, recipe, device)
    moments.hold(model)
    if adapters != NONE:
        moments.begin("adapt")
        training_model.prepare(model, recipe)
        model = training_model.adapt(model, architecture, recipe)
        training_life.save(model, task.folder)
        training_life.load_adapters(model, task.folder)
    if adapters == MERGED:
        moments.begin("merge")
        model = training_life.merge(model)
    loops.infer(model, task, architecture.vocab_size, moments)


def _load(
    task: Task, architecture: Any, recipe: Any, device: torch.device
) -> nn.Module:
    """The model on the device, its weights random or from the checkpoint."""
    if task.weights == "checkpoint":
        loaded = training_model.load(architecture, recipe, task.model, device)
        prepare_loss(loaded, recipe)
        return loaded.train()
    built = training_model.build(architecture, recipe)
    training_model.declare_quantized(built, recipe)
    return materialize(built, recipe, device)


def _tell_parameters(journal: Journal, total: int, trainable: int) -> None:
    journal.write("parameters", total=total, trainable=trainable)


def _device(task: Task) -> torch.device:
    if task.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(
            "--device",
            task.device,
            "is not there: torch finds no CUDA device",
            "install a CUDA build of torch and a driver, or use --device cpu",
        )
    return torch.device("cuda", 0)


def _told(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    name = "" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    return f"{name}: {text}".removeprefix(": ")[:MESSAGE_CHARACTERS]


def _end_with_parent() -> None:
    """Waits until standard input is closed, then ends the process at once."""
    sys.stdin.read()
    os._exit(EXIT_ORPHANED)


if __name__ == "__main__":
    main()
    # Threads of libraries would keep an interpreter that ends by itself.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
