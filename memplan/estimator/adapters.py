"""Adapters: what is added beside the frozen weights."""

from __future__ import annotations

import math

from memplan import methods
from memplan.estimator.layout import Layout
from memplan.estimator.polynomials import rounded
from memplan.estimator.trained import Trained
from memplan.estimator.weights import DTYPE_BYTES
from memplan.recipe import Recipe


def adapter_bytes(layout: Layout, recipe: Recipe, trained: Trained) -> int:
    """A = sum over adapted layers of r (i + o) a, by the method's own shapes.

    a are the bytes of a number of the adapter. Tensors that a method adds untrained,
    or shares among layers, are counted too.
    """
    if recipe.method == "full":
        return 0
    method = methods.find(recipe.method)
    item = DTYPE_BYTES[recipe.adapter_dtype]
    total = sum(t.count * rounded(t.bytes_each) for t in trained.tensors)
    adapted = [(role, count) for role, count in layout.linears if role.adapted]
    for role, count in adapted:
        for shape in method.frozen_shapes(role.linear, role.rank, dict(role.options)):
            total += count * rounded(item * math.prod(shape))
    shared = method.shared_shapes([role.linear for role, _ in adapted], recipe.rank)
    return total + sum(rounded(4 * math.prod(shape)) for shape in shared)
