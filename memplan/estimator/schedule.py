"""Which terms are alive at which moment.

A step's forward piles up what the layers keep; head and loss stand on top of the pile;
backward takes it down, while gradients grow. Under checkpointing the pile is the inputs
of layers, and one layer at a time is computed anew on top of it: so the peak is the
pile plus the larger of loss and one layer, not their sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from memplan import tapes
from memplan.architecture import Architecture
from memplan.cublas import LT_WORKSPACE_BYTES, workspace_bytes
from memplan.estimator.activations import (
    Hole,
    LayerBytes,
    first_layer_bytes,
    layer_bytes,
)
from memplan.estimator.adapters import adapter_bytes
from memplan.estimator.experts import adapts_experts, expert_shapes
from memplan.estimator.gradients import (
    embedding_bytes,
    embedding_copies,
    embedding_scratch_bytes,
    gradient_bytes,
    is_tied,
    layer_gradient_bytes,
)
from memplan.estimator.layout import Group, Layout, Role, layout_of
from memplan.estimator.logits import loss_bytes
from memplan.estimator.optimizer import (
    clip_bytes,
    paged_bytes,
    state_bytes,
    step_bytes,
)
from memplan.estimator.polynomials import Sizes, larger, value
from memplan.estimator.regimes import (
    first_regime,
    is_embedding_trained,
    is_head_trained,
    layer_regime,
    loss_regime,
    model_regime,
)
from memplan.estimator.trained import Trained, trained
from memplan.estimator.weights import WeightBytes, weight_bytes
from memplan.gpu import Gpu
from memplan.recipe import Recipe
from memplan.tape import (
    BlockTape,
    LayerRegime,
    LayerTape,
    LossTape,
    Mark,
    ModelTape,
    Regime,
    Stretch,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearPart:
    """A linear layer of a group, with its tape."""

    regime: LayerRegime
    tape: LayerTape
    in_features: int
    out_features: int
    rank: int
    gradient_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPart:
    """Layers of one kind and their tapes."""

    group: Group
    layers: tuple[int, ...]
    """Their positions in the block's stack."""
    checkpointed: bool
    regime: Regime
    kind: int
    """The number of the layers' kind in the regime's tape."""
    tape: BlockTape
    linears: tuple[LinearPart, ...]
    unreached: int = 0
    """How many of them need no gradient, as nothing is trained up to their end."""
    passing: BlockTape | None = None
    """The tape of the layers under a checkpoint, where one of them is the first that
    needs a gradient, and needs none before an adapted linear layer within it."""

    @property
    def count(self) -> int:
        return len(self.layers)

    @property
    def adapted(self) -> frozenset[int]:
        """Numbers of the holes that are adapted."""
        roles = {role.linear.path: role for role in self.group.roles}
        return frozenset(
            number for number, path in enumerate(self.tape.holes) if roles[path].adapted
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Everything about a fine-tune that batch and sequence leave as it is."""

    architecture: Architecture
    recipe: Recipe
    gpu: Gpu
    layout: Layout
    regime: Regime
    tape: ModelTape
    loss: LossTape
    groups: tuple[GroupPart, ...]
    trained: Trained
    weights: WeightBytes
    adapters: int
    gradients: int
    state: int
    paged: int
    step: int
    clip: int


def parts_of(architecture: Architecture, recipe: Recipe, gpu: Gpu) -> Parts:
    """The parts of a fine-tune; reads its tapes, and traces those that are missing."""
    first = tapes.model_tape(architecture, first_regime(recipe))
    regime = model_regime(
        recipe,
        gpu,
        first.attention,
        first.window,
        experts=adapts_experts(architecture, recipe),
    )
    plain = {
        path: is_plain
        for block in first.blocks
        for path, is_plain in zip(block.holes, block.plain, strict=True)
    }
    layout = layout_of(architecture, recipe, plain)
    stack = architecture.main_stack
    kinds = [block for block in architecture.blocks if block.stack == stack]
    regime = _settled(regime, architecture, recipe, layout)
    tape = tapes.model_tape(architecture, regime)
    tensors = trained(architecture, layout, recipe, stack)
    first_layer = _first_reached(architecture, layout, recipe)
    return Parts(
        architecture=architecture,
        recipe=recipe,
        gpu=gpu,
        layout=layout,
        regime=regime,
        tape=tape,
        loss=tapes.loss_tape(architecture, loss_regime(recipe, tape.hidden_dtype)),
        groups=tuple(
            _group(
                group,
                layers,
                kinds.index(group.block),
                each,
                first_layer,
                architecture,
                recipe,
            )
            for group in layout.groups
            if group.block.stack == stack
            for layers, each in _by_checkpoint(regime, group, recipe)
            if layers
        ),
        trained=tensors,
        weights=weight_bytes(architecture, layout, recipe),
        adapters=adapter_bytes(layout, recipe, tensors),
        gradients=gradient_bytes(tensors),
        state=state_bytes(tensors, recipe),
        paged=paged_bytes(tensors, recipe),
        step=step_bytes(tensors, recipe),
        clip=clip_bytes(tensors),
    )


def _settled(
    regime: Regime, architecture: Architecture, recipe: Recipe, layout: Layout
) -> Regime:
    """The regime in which linear layers return what those of the layout do.

    What one returns decides what the next ones are given, and return in turn.
    """
    roles = {
        role.linear.path: role
        for group in layout.groups
        if group.block.stack == architecture.main_stack
        for role in group.roles
        if role.adapted
    }
    for _ in range(len(roles)):
        tape = tapes.model_tape(architecture, regime)
        outputs = _outputs(tape, regime, recipe, roles)
        if outputs == regime.outputs:
            break
        regime = dataclasses.replace(regime, outputs=outputs)
    return regime


def _outputs(
    tape: ModelTape, regime: Regime, recipe: Recipe, roles: Mapping[str, Role]
) -> tuple[tuple[str, str], ...]:
    """What adapted layers return where it is neither their input's nor autocast's."""
    outputs = {}
    for block in tape.blocks:
        names = zip(block.holes, block.input_dtypes, block.plain, strict=True)
        for path, input_dtype, is_plain in names:
            if path not in roles:
                continue
            told = layer_regime(recipe, roles[path], input_dtype)
            casts = regime.casts(is_plain=is_plain)
            expected = told.autocast if casts else told.input_dtype
            returned = tapes.layer_tape(told).output_dtype
            if returned != expected:
                outputs[path] = returned
    return tuple(sorted(outputs.items()))


def _by_checkpoint(
    regime: Regime, group: Group, recipe: Recipe
) -> Iterator[tuple[tuple[int, ...], Regime]]:
    """Layers of a group that are checkpointed, and that are not, with their regimes.

    transformers checkpoints every n-th layer, the first included.
    """
    every = recipe.every_n_layers if recipe.checkpointing == "full" else 1
    if every == 1:
        yield group.layers, regime
        return
    checkpointed = tuple(layer for layer in group.layers if layer % every == 0)
    others = tuple(layer for layer in group.layers if layer % every)
    yield checkpointed, regime
    yield others, dataclasses.replace(regime, checkpointed=False)


def _group(  # noqa: PLR0913 - each says what the layers are
    group: Group,
    layers: tuple[int, ...],
    kind: int,
    regime: Regime,
    first: int | None,
    architecture: Architecture,
    recipe: Recipe,
) -> GroupPart:
    tape = tapes.model_tape(architecture, regime).blocks[kind]
    roles = {role.linear.path: role for role in group.roles}
    linears = []
    known: dict[Any, LayerRegime] = {}
    for path, input_dtype in zip(tape.holes, tape.input_dtypes, strict=True):
        role = roles[path]
        alike = (role.treatment, role.linear.bias, input_dtype)
        if alike not in known:
            known[alike] = layer_regime(recipe, role, input_dtype)
        linears.append(
            LinearPart(
                regime=known[alike],
                tape=tapes.layer_tape(known[alike]),
                in_features=role.linear.in_features,
                out_features=role.linear.out_features,
                rank=role.rank,
                gradient_bytes=layer_gradient_bytes(role, recipe),
            )
        )
    part = GroupPart(
        group=group,
        layers=layers,
        checkpointed=regime.checkpointed,
        regime=regime,
        kind=kind,
        tape=tape,
        linears=tuple(linears),
        unreached=sum(layer < (first or 0) for layer in group.layers),
    )
    if first not in group.layers or not _begins_within(part):
        return part
    checkpointed = dataclasses.replace(regime, checkpointed=True)
    passing = tapes.model_tape(architecture, checkpointed).blocks[kind]
    return dataclasses.replace(part, passing=passing)


def _first_reached(
    architecture: Architecture, layout: Layout, recipe: Recipe
) -> int | None:
    """The first layer that trains anything; None where the first one's input does."""
    if _reaches_input(architecture, recipe):
        return None
    experts = adapts_experts(architecture, recipe)
    trained = [
        layer
        for group in layout.groups
        if group.block.stack == architecture.main_stack
        and (
            any(role.adapted for role in group.roles)
            or (experts and next(expert_shapes(group.block, recipe), None))
        )
        for layer in group.layers
    ]
    return min(trained, default=None)


def _reaches_input(architecture: Architecture, recipe: Recipe) -> bool:
    """Whether gradients reach the first layer's input, or are taken to.

    Checkpoints ask for them, and a trained embedding does. Of other modules that are
    trained whole it is not asked in which layer they are first.
    """
    if recipe.method == "full" or recipe.checkpointing == "full":
        return True
    head = {linear.path for linear in architecture.linears if linear.kind == "head"}
    return any(
        not any(path.endswith(name) for path in head) for name in recipe.trained_modules
    )


def _begins_within(part: GroupPart) -> bool:
    """Whether gradients are first needed somewhere within the first layer reached.

    Before an adapted linear layer that is the first of all a norm alone is kept.
    """
    if part.regime.experts:
        return False
    forwards = [
        item
        for item in part.tape.forward
        if isinstance(item, Mark) and item.kind == "F"
    ]
    return bool(part.adapted) and forwards[0].holes[0] not in part.adapted


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A point of a step at which most may be live, above what is always there."""

    activations: Any
    """Everything but what follows."""
    logits: Any = 0
    gradients: Any = 0

    @property
    def total(self) -> Any:
        return self.activations + self.logits + self.gradients


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The points of a step's forward and backward, and what it holds afterwards."""

    kept: Any
    """What all layers keep from forward to backward."""
    forward: tuple[Candidate, ...]
    backward: tuple[Candidate, ...]
    left: Any
    """What the caller holds of the output after backward."""


def step_of(parts: Parts, batch: Any, length: Any) -> Step:
    """The step at a batch of B sequences of T tokens, numbers or arrays."""
    return _Stepper(parts, batch, length).step()


class _Stepper:
    """Walks a step once, noting where most may be live."""

    def __init__(self, parts: Parts, batch: Any, length: Any) -> None:
        self._parts = parts
        self._tokens = batch * length
        self._sizes = Sizes({"": 1, "B": batch, "T": length, "r": parts.recipe.rank})
        self._linear_sizes: dict[tuple[int, int, int], Sizes] = {}
        self._accumulates = parts.recipe.accumulation > 1
        self._layers = [
            layer for part in parts.groups for layer in self._layers_of(part)
        ]
        self._loss = loss_bytes(parts.loss, self._tokens)
        self._kept = sum(len(own) * layer.kept for _, own, layer in self._layers)
        self._cached = sum(len(own) * layer.cached for _, own, layer in self._layers)
        self._stuck = sum(len(own) * layer.stuck for _, own, layer in self._layers)
        self._start = value(parts.tape.before.net, self._sizes)
        self._start = self._start + value(parts.tape.carried, self._sizes)

    def step(self) -> Step:
        forward, backward, rest = self._around_loss()
        return Step(
            kept=self._kept,
            forward=(*self._forward(), *forward),
            backward=(*backward, *self._backward(rest)),
            left=self._loss.left + self._stuck_in_output,
        )

    def _layers_of(
        self, part: GroupPart
    ) -> Iterator[tuple[GroupPart, tuple[int, ...], LayerBytes]]:
        """Layers that are alike, and their positions; the first may be apart."""
        reached = part.layers[part.unreached :]
        holes = self._holes(part)
        layer = layer_bytes(
            part.tape,
            holes,
            self._sizes,
            checkpointed=part.checkpointed,
            offloaded=part.checkpointed and self._parts.recipe.offload,
            accumulates=self._accumulates,
        )
        if part.passing is None:
            yield part, reached, layer
            return
        first = first_layer_bytes(
            part.tape,
            part.passing,
            holes,
            self._sizes,
            part.adapted,
            accumulates=self._accumulates,
        )
        yield part, reached[1:], layer
        yield part, reached[:1], first

    def _holes(self, part: GroupPart) -> tuple[Hole, ...]:
        return tuple(
            Hole(
                tape=linear.tape,
                sizes=self._sizes_of(linear),
                gradient_bytes=linear.gradient_bytes,
            )
            for linear in part.linears
        )

    def _sizes_of(self, linear: LinearPart) -> Sizes:
        """The sizes of a linear layer, which those of its shape and rank share."""
        shape = (linear.in_features, linear.out_features, linear.rank)
        if shape not in self._linear_sizes:
            dimensions = zip("ior", shape, strict=True)
            self._linear_sizes[shape] = Sizes(
                {"": 1, "N": self._tokens, **dict(dimensions)}
            )
        return self._linear_sizes[shape]

    def _forward(self) -> Iterator[Candidate]:
        """The embedding and the masks, then the last layer of each kind."""
        gradients = self._parts.gradients if self._accumulates else 0
        for peak in self._parts.tape.before.peaks:
            yield Candidate(activations=value(peak, self._sizes), gradients=gradients)
        for _, own, layer in self._layers:
            below = self._start + self._kept - layer.kept - self._above(own)
            yield Candidate(activations=below + layer.forward_peak, gradients=gradients)

    def _around_loss(self) -> tuple[list[Candidate], list[Candidate], Any]:
        """The points in norm, head and loss, and what is live besides the pile then."""
        loss = self._loss
        gradients = self._parts.gradients if self._accumulates else 0
        live = self._start + self._kept
        hidden: Any = 0
        held: Any = 0
        forward: list[Candidate] = []
        backward: list[Candidate] = []
        points = forward
        head = self._head_gradients()
        early = head if self._parts.loss.head_in_forward else 0

        def note(activations: Any, logits: Any = 0, own: int = 0) -> None:
            points.append(
                Candidate(
                    activations=activations - logits,
                    logits=logits,
                    gradients=gradients + own,
                )
            )

        for item in self._parts.tape.tail:
            if isinstance(item, Stretch):
                for peak in item.peaks:
                    note(live + value(peak, self._sizes))
                live = live + value(item.net, self._sizes)
            elif item.kind == "F":
                note(live + loss.forward_peak, loss.logits, early)
                live = live + loss.kept - self._cached
                points = backward
            elif item.kind == "drop":
                hidden = value(item.size, self._sizes)
                held = hidden if self._parts.loss.holds_input else 0
                live = live - hidden + held
            else:
                note(live - loss.kept + loss.backward_peak, loss.logits, early)
                note(live - loss.kept + loss.head_peak, own=head)
                live = live - loss.kept + loss.left + hidden - held
        return forward, backward, live + self._cached - self._kept

    def _backward(self, rest: Any) -> Iterator[Candidate]:
        """Each kind's layer at the top of the pile, and at its bottom.

        At the top no layer has its gradient yet, at the bottom all others have.
        """
        parts = self._parts
        trains_embedding = is_embedding_trained(parts.architecture, parts.recipe)
        embedding = (
            embedding_bytes(parts.architecture, parts.recipe) if trains_embedding else 0
        )
        for part, positions, layer in self._layers:
            own = sum(linear.gradient_bytes for linear in part.linears)
            pile = self._kept - self._cached - (layer.kept - layer.cached)
            pile = pile - self._above(positions)
            top = self._head_gradients()
            bottom = parts.gradients - own - (0 if self._is_tied else embedding)
            if self._accumulates:
                # A tied head's waits for the embedding's.
                top = bottom = parts.gradients + (top if self._is_tied else 0)
            yield Candidate(
                activations=rest + pile + layer.backward_peak, gradients=top
            )
            stuck = self._stuck - layer.stuck
            yield Candidate(
                activations=rest + stuck + layer.backward_peak, gradients=bottom
            )
        if trains_embedding:
            scratch = embedding_scratch_bytes(parts.architecture, self._tokens)
            again = embedding_copies(parts.architecture, parts.recipe)
            yield Candidate(
                activations=rest + self._stuck + scratch + again * embedding,
                gradients=parts.gradients,
            )

    def _above(self, layers: tuple[int, ...]) -> Any:
        """What the layers keep that come after the last of these."""
        if not layers:
            return 0
        return sum(
            sum(number > layers[-1] for number in others) * (layer.kept - layer.cached)
            for _, others, layer in self._layers
        )

    @property
    def _stuck_in_output(self) -> Any:
        """What the graph keeps, as long as the caller holds the loss."""
        return self._stuck if self._parts.recipe.keep_outputs != "none" else 0

    @property
    def _is_tied(self) -> bool:
        return is_tied(self._parts.architecture, self._parts.recipe)

    def _head_gradients(self) -> int:
        if not is_head_trained(self._parts.recipe):
            return 0
        return embedding_bytes(self._parts.architecture, self._parts.recipe)


def most(candidates: tuple[Candidate, ...]) -> Any:
    """The most that any of the points holds, element by element."""
    total = candidates[0].total
    for candidate in candidates[1:]:
        total = larger(total, candidate.total)
    return total


def workspaces(parts: Parts) -> tuple[int, int]:
    """cuBLAS' workspaces of the forward's thread, and of both threads.

    Backward runs on a thread of its own, whose handle has a workspace of its own.
    cuBLASLt, which adds biases, has one for each thread that does so.
    """
    one = workspace_bytes(parts.gpu)
    biased = any(role.linear.bias for role, _ in parts.layout.linears)
    again = parts.recipe.checkpointing == "full"
    light = LT_WORKSPACE_BYTES if biased else 0
    return one + light, 2 * one + light + (light if again else 0)
