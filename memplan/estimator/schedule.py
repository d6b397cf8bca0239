"""Which terms are alive at which moment.

A step's forward piles up what the layers keep; its loss stands on top of the pile; its
backward takes the pile down, while gradients grow. Under checkpointing the pile is the
layers' inputs, and one layer at a time is computed anew on top of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from memplan import methods, optimizers, tapes
from memplan.architecture import Architecture
from memplan.estimator.activations import Hole, LayerBytes, Walk, layer_bytes
from memplan.estimator.layout import Layers, Role, layers_of, roles_outside
from memplan.estimator.loss import LossBytes, loss_bytes
from memplan.estimator.polynomials import Sizes, larger, rounded, value
from memplan.estimator.regimes import (
    dtype_outside,
    layer_regime,
    loss_regime,
    model_regime,
)
from memplan.estimator.weights import DTYPE_BYTES, WeightBytes, trained_shapes, weight_bytes
from memplan.gpu import Gpu, find_gpu
from memplan.recipe import Recipe
from memplan.tape import ModelTape, Stretch


@dataclasses.dataclass(slots=True)
class Trained:
    shapes: list[tuple[int, tuple[Any, ...]]]
    item: int

    @property
    def count(self):
        total = 0
        for n, shape in self.shapes:
            p = n
            for s in shape: p = p * s
            total = total + p
        return total

    @property
    def bytes(self):
        total = 0
        for n, shape in self.shapes:
            p = self.item
            for s in shape: p = p * s
            total = total + n * rounded(p)
        return total


def main_stack(architecture):
    sizes = {}
    for block in architecture.blocks:
        size = block.num_parameters * len(block.layers)
        sizes[block.stack] = sizes.get(block.stack, 0) + size
    return max(sizes, key=sizes.__getitem__)


def adapter_shapes(method, linear, rank):
    shapes = [(rank, linear.in_features), (linear.out_features, rank)]
    if method == "dora": shapes.append((linear.out_features,))
    return shapes


def estimate(architecture: Architecture, recipe: Recipe, gpu: Gpu | None = None, heads=None, window=None):
    card = gpu or find_gpu("80GB")
    layers = layers_of(architecture, recipe)
    outside = roles_outside(architecture, recipe)
    W = weight_bytes(architecture, layers, outside, recipe)
    full = recipe.method == "full"
    if full:
        trained = Trained(list(trained_shapes(architecture, layers, outside)), DTYPE_BYTES[recipe.dtype])
    else:
        shapes = []
        for g in layers:
            for role in g.roles:
                if role.adapted:
                    shapes += [(g.count, s) for s in adapter_shapes(recipe.method, role.linear, role.rank)]
        trained = Trained(shapes, DTYPE_BYTES[recipe.adapter_dtype])
    A = 0 if full else trained.bytes
    G = trained.bytes
    opt = optimizers.find(recipe.optimizer)
    S = sum(n * sum(rounded(b) for b in opt.state_bytes(shape, trained.item)) for n, shape in trained.shapes)
    ws = 4096 * 8 * 1024 if card.compute_capability[0] in (9, 10, 12) else 4096 * 1024 * 2 + 16 * 1024 * 8
    stack = main_stack(architecture)
    regime = model_regime(architecture, recipe, card, heads or (), window)
    tape = tapes.model_tape(architecture, regime)
    B, T = recipe.batch_size, recipe.sequence_length
    sizes = Sizes({"": 1, "B": B, "T": T})
    N = B * T
    acc = recipe.accumulation > 1
    groups = [g for g in layers if g.block.stack == stack]
    kinds = [b for b in architecture.blocks if b.stack == stack]
    per = []
    for g in groups:
        bt = tape.blocks[kinds.index(g.block)]
        roles = {r.linear.path: r for r in g.roles}
        holes = []
        for path, idt, plain in zip(bt.holes, bt.input_dtypes, bt.plain):
            role = roles[path]
            if not plain: role = dataclasses.replace(role, quantized=False)
            # half types are the same sizes
            lr = layer_regime(recipe, adapted=role.adapted, quantized=role.quantized, bias=role.linear.bias, input_dtype=idt)
            lt = tapes.layer_tape(lr)
            sz = Sizes({"": 1, "N": N, "i": role.linear.in_features, "o": role.linear.out_features, "r": role.rank})
            if full:
                gb = trained.item * role.linear.num_parameters
            elif role.adapted:
                gb = sum(trained.item * s[0] * (s[1] if len(s) > 1 else 1) for s in adapter_shapes(recipe.method, role.linear, role.rank))
            else: gb = 0
            holes.append(Hole(tape=lt, sizes=sz, gradient_bytes=gb))
        per.append((g, layer_bytes(bt, tuple(holes), sizes, checkpointed=recipe.checkpointing == "full", accumulates=acc)))
    lb = loss_bytes(tapes.loss_tape(architecture, loss_regime(recipe)), N)
    lt_ = tapes.loss_tape(architecture, loss_regime(recipe))
    kept_all = sum(g.count * b.kept for g, b in per)
    keep_out = lb.left
    # forward
    before_peak = max([0, *(value(p, sizes) for p in tape.before.peaks)])
    live0 = value(tape.before.net, sizes)
    fpeak = before_peak
    for g, b in per:
        fpeak = larger(fpeak, live0 + kept_all - b.kept + b.forward_peak)
    live = live0 + kept_all
    # tail
    fwd_done = False
    held = 0
    bpeak = 0
    for item in tape.tail:
        if isinstance(item, Stretch):
            pk = live
            for p in item.peaks: pk = larger(pk, live + value(p, sizes))
            if fwd_done: bpeak = larger(bpeak, pk)
            else: fpeak = larger(fpeak, pk)
            live = live + value(item.net, sizes)
        elif item.kind == "F":
            fpeak = larger(fpeak, live + lb.forward_peak)
            live = live + lb.kept
            fwd_done = True
            bpeak = larger(bpeak, live)
        elif item.kind == "drop":
            if lt_.holds_input: held = value(item.size, sizes)
            else: live = live - value(item.size, sizes)
        elif item.kind == "B":
            bpeak = larger(bpeak, live - lb.kept + lb.backward_peak)
            hid = N * architecture.hidden_size * DTYPE_BYTES[dtype_outside(recipe)]
            live = live - lb.kept + lb.left + hid - held
    # layers backward; both ends of the pile
    rest = live - kept_all
    Gl = 0
    per_grad = []
    for g, b in per:
        bpeak = larger(bpeak, rest + kept_all + (G if acc else 0) + b.backward_peak - b.kept)
        bpeak = larger(bpeak, rest + b.backward_peak + (G if acc or full else G))
    base1 = W.total + A + 0
    if full:
        emb = architecture.vocab_size * architecture.hidden_size
        tied = not any(l.kind == "head" for l in architecture.linears)
        scratch = 0
        if N > 3072:
            seg = min(N, architecture.vocab_size)
            part = N // 10 + seg
            scratch = 8 * N * 3 + 16 * seg + 8 * part + 4 * part * architecture.hidden_size
        bpeak = larger(bpeak, live0 + lb.left + G + (emb * trained.item if tied else 0) + scratch)
    tr = {"adamw": trained.item * trained.count}.get(recipe.optimizer, 0)
    out = {
        "load": W.load_peak, "adapt": max(W.prepare_peak, W.total + A),
        "1.forward": base1 + ws + fpeak,
        "1.backward": base1 + 2 * ws + bpeak,
        "1.optimizer": base1 + 2 * ws + G + S + tr + keep_out,
        "2.forward": base1 + 2 * ws + S + fpeak,
        "2.backward": base1 + 2 * ws + S + bpeak,
        "2.optimizer": base1 + 2 * ws + G + S + tr + keep_out,
    }
    return out, dict(W=W.total, A=A, G=G, S=S, kept=kept_all, live0=live0, loss=lb, per=[(g.count, b) for g, b in per])
