"""What the allocator reserves: the estimate's blocks replayed through its rules.

Load, adaptation and two steps are walked block by block, as their tracks list them. The
blocks of every layer are there, since fragments that one layer leaves are what the next
one finds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from memplan import methods, optimizers, quantizations, tapes
from memplan.addresses import Addresses
from memplan.allocator import SMALL_LIMIT_BYTES, SMALL_SEGMENT_BYTES
from memplan.architecture import Linear
from memplan.cublas import workspace_bytes
from memplan.errors import MemplanError, MissingExtraError, UntracedError
from memplan.estimator.experts import adapts_experts, expert_shapes
from memplan.estimator.gradients import (
    embedding_bytes,
    embedding_scratch_bytes,
    is_tied,
    is_transposed,
)
from memplan.estimator.layout import Role
from memplan.estimator.logits import loss_blocks
from memplan.estimator.optimizer import step_blocks
from memplan.estimator.polynomials import Sizes, rounded
from memplan.estimator.pool import Pool, PoolFullError
from memplan.estimator.programs import (
    CACHE,
    GIVE,
    GIVE_FOREIGN,
    GRADIENT,
    STICK,
    TAKE,
    WORKSPACE,
    Filling,
    Listing,
    Program,
    adapt_listing,
    around_program,
    first_program,
    layer_program,
    unreached_program,
)
from memplan.estimator.regimes import is_embedding_trained, is_prepared, loss_regime
from memplan.estimator.schedule import GroupPart, Parts, workspaces
from memplan.estimator.trained import in_order
from memplan.estimator.weights import DTYPE_BYTES
from memplan.loading import HALF_BYTES, natural_key, warmup_bytes
from memplan.tape import Regime
from memplan.track import LossTrack, ModelTrack
from memplan.units import round_up

STEPS = 2
"""The first step makes the optimizer's state; the second is like every later one."""

MICRO_BATCHES = 2
"""The first makes the gradients; every later one adds to them like the second."""

MISSING_PRECISION = 16
"""What is missing is found to one part in so many."""

HEAD_NAME = "lm_head.weight"
"""What a tied embedding is called besides."""

BLOCK_SIZE = 64
"""Weights that share a 4-bit code's scale (`functional.quantize_4bit`)."""


class Card:
    """Large blocks in their pool, and small ones as a sum."""

    def __init__(self, capacity_bytes: int | None, workspace_bytes: int) -> None:
        self._addresses = Addresses()
        self.large = Pool(self._addresses, capacity_bytes)
        self._workspace_bytes = workspace_bytes
        self._threads: set[str] = set()
        self.small = 0
        self.small_peak = 0

    def take(self, num_bytes: int) -> Any:
        """A block: a large one, or the bytes of a small one."""
        if num_bytes > SMALL_LIMIT_BYTES:
            return self.large.malloc(num_bytes)
        size = rounded(num_bytes)
        self.add_small(size, size)
        return size

    def give(self, block: Any) -> None:
        """Gives a block back."""
        if isinstance(block, int):
            self.small -= block
        else:
            self.large.free(block)

    def add_small(self, net: int, peak: int) -> None:
        """Small blocks that come and go in a stretch; their segments take places."""
        most = self.small + peak
        self.small += net
        if most <= self.small_peak:
            return
        before, self.small_peak = self.small_reserved, most
        for _ in range(before, self.small_reserved, SMALL_SEGMENT_BYTES):
            self._addresses.take(SMALL_SEGMENT_BYTES)

    def need_workspace(self, thread: str) -> None:
        """Gives a thread's handle of cuBLAS the workspace that it has for good."""
        if thread not in self._threads:
            self._threads.add(thread)
            self.take(self._workspace_bytes)

    @property
    def small_reserved(self) -> int:
        return round_up(self.small_peak, SMALL_SEGMENT_BYTES)

    @property
    def reserved(self) -> int:
        """The most that was reserved so far."""
        return self.large.peak_reserved_bytes + self.small_reserved


@dataclass(frozen=True, kw_only=True, slots=True)
class Reserved:
    """What is reserved at the end of each moment, and what failed."""

    by_moment: dict[str, int]
    small_bytes: int = 0
    """Of it, the small pool's at the end."""
    failed_moment: str | None = None


def tracks_of(parts: Parts) -> tuple[dict[Regime, ModelTrack], LossTrack]:
    """The tracks of a fine-tune's body and loss; traces those that are missing."""
    architecture = parts.architecture
    regimes = (parts.regime, *(part.regime for part in parts.groups))
    bodies = {regime: tapes.model_track(architecture, regime) for regime in regimes}
    loss = tapes.loss_track(
        architecture, loss_regime(parts.recipe, parts.tape.hidden_dtype)
    )
    return bodies, loss


def fit_into(
    parts: Parts,
    budget_bytes: int | None,
    missing_precision: int = MISSING_PRECISION,
) -> tuple[Reserved, int]:
    """What is reserved on a card, and how many bytes more it would need.

    Near its limit a card gives the cache back before it fails. Where that does not
    help, the bytes are those of a card that is large enough, and `failed_moment` is the
    first that fails on this one. Raises NotReplayedError.
    """
    recipe = parts.recipe
    shape = recipe.batch_size, recipe.sequence_length
    unlimited = reserved(parts, *shape, None)
    enough = max(unlimited.by_moment.values())
    if budget_bytes is None or enough <= budget_bytes:
        return unlimited, 0
    small = unlimited.small_bytes
    limited = reserved(parts, *shape, budget_bytes - small)
    if limited.failed_moment is None:
        return limited, 0
    too_little = budget_bytes
    while (enough - too_little) * missing_precision > enough - budget_bytes:
        middle = (too_little + enough) // 2
        if reserved(parts, *shape, middle - small).failed_moment is None:
            enough = middle
        else:
            too_little = middle
    failed = dataclasses.replace(unlimited, failed_moment=limited.failed_moment)
    return failed, enough - budget_bytes


def reserved(
    parts: Parts, batch: int, length: int, budget_bytes: int | None
) -> Reserved:
    """Replays the fine-tune on a card that gives the large pool `budget_bytes`.

    Raises NotReplayedError for what no track is known of.
    """
    try:
        return _Replay(parts, batch, length, budget_bytes).run()
    except (MissingExtraError, UntracedError) as error:
        raise NotReplayedError(
            "No track of this recipe is shipped, and tracing one needs torch."
        ) from error


class NotReplayedError(MemplanError):
    """What is reserved is not known; the message is a sentence that says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tensor:
    """A tensor that is loaded: its numbers, and its role where it is a linear's."""

    name: str
    numbers: int
    role: Role | None = None
    other_name: str | None = None

    @property
    def first_name(self) -> str:
        """The name under which it is loaded: it is, under the first that comes."""
        names = (self.name, self.other_name or self.name)
        return min(names, key=natural_key)


class _Replay:
    """Walks load, adaptation and steps on one card."""

    def __init__(
        self, parts: Parts, batch: int, length: int, capacity: int | None
    ) -> None:
        self._parts = parts
        self._recipe = parts.recipe
        self._tokens = batch * length
        one = workspace_bytes(parts.gpu)
        forward, both = workspaces(parts)
        self._light = [forward - one, both - forward - one]
        self._card = Card(capacity, one)
        self._values = Sizes({"": 1, "B": batch, "T": length, "r": parts.recipe.rank})
        self._by_moment: dict[str, int] = {}
        self._moment = "load"
        bodies, loss = tracks_of(parts)
        filled = {id(part): self._fill(part) for part in parts.groups}
        programs = {
            id(part): layer_program(
                bodies[part.regime].blocks[part.kind],
                filled[id(part)],
                self._values,
                checkpointed=part.checkpointed,
                offloaded=part.checkpointed and parts.recipe.offload,
            )
            for part in parts.groups
        }
        layers = sorted(self._in_layers(), key=lambda pair: pair[0])
        self._order = [filled[id(part)] for _, part in layers]
        self._layers = [programs[id(part)] for _, part in layers]
        self._leave_unreached([part for _, part in layers], bodies)
        self._adapt_listings: dict[int, tuple[int, Listing]] = {}
        self._around = around_program(
            bodies[parts.regime],
            loss_blocks(loss, parts.loss, self._tokens, batch),
            self._values,
        )
        self._gradients: list[Any] = []
        self._left: list[Any] = []
        """Blocks that go with the output that the caller holds."""

    def _leave_unreached(
        self, parts: list[GroupPart], bodies: dict[Regime, ModelTrack]
    ) -> None:
        """Lets layers that need no gradient, or only within, keep no more than that."""
        unreached = sum(part.unreached for part in self._parts.groups)
        for number, part in enumerate(parts[: unreached + 1]):
            track, holes = bodies[part.regime].blocks[part.kind], self._order[number]
            if number < unreached:
                program = unreached_program(track, holes, self._values)
            elif part.passing is not None:
                program = first_program(track, holes, self._values, part.adapted)
            else:
                continue
            self._layers[number] = program

    def run(self) -> Reserved:
        try:
            for label in self._run():
                self._by_moment[label] = self._card.reserved
        except PoolFullError:
            return Reserved(by_moment=self._by_moment, failed_moment=self._moment)
        return Reserved(
            by_moment=self._by_moment, small_bytes=self._card.small_reserved
        )

    def _run(self) -> Iterator[str]:
        """The labels of moments, each when it has ended."""
        held = self._load()
        yield "load"
        self._moment = "adapt"
        self._adapt(held)
        yield "adapt"
        micro_batches = min(self._recipe.accumulation, MICRO_BATCHES)
        for step in range(1, STEPS + 1):
            for number in range(micro_batches):
                yield from self._micro_batch(step, first=number == 0)
            if self._recipe.max_grad_norm is not None:
                self._moment = f"{step}.clip"
                self._card.give(self._card.take(self._parts.clip))
                yield f"{step}.clip"
            self._moment = f"{step}.optimizer"
            self._optimize(first=step == 1)
            yield f"{step}.optimizer"

    # Load and adaptation.

    def _load(self) -> list[tuple[int, Any]]:
        """Loads every tensor; those that are not quantised, with their numbers."""
        recipe, card = self._recipe, self._card
        item = DTYPE_BYTES[recipe.dtype]
        tensors = list(self._tensors())
        if recipe.quantization == "none":
            return [(t.numbers, card.take(item * t.numbers)) for t in tensors]
        scheme = quantizations.find(recipe.quantization)
        stored = sum(
            scheme.stored_bytes(t.role.linear.num_weights, t.role.linear.out_features)[
                0
            ]
            if t.role is not None
            else item * t.numbers
            for t in tensors
        )
        card.give(card.take(warmup_bytes(stored, self._parts.gpu.capacity_bytes)))
        held = []
        for tensor in sorted(tensors, key=lambda t: natural_key(t.first_name)):
            if tensor.role is None:
                held.append((tensor.numbers, card.take(item * tensor.numbers)))
            else:
                self._quantize(tensor.role)
        return held

    def _quantize(self, role: Role) -> None:
        """The 16-bit weight, what it becomes, and the weight given back."""
        card, scheme = self._card, quantizations.find(self._recipe.quantization)
        linear = role.linear
        sizes = scheme.stored_bytes(linear.num_weights, linear.out_features)
        copies = [
            card.take(HALF_BYTES * linear.num_weights)
            for _ in range(_num_copies(scheme.loading_flag, linear))
        ]
        if self._recipe.quantization.endswith("-double"):
            absmax = 4 * math.ceil(linear.num_weights / BLOCK_SIZE)
            copies.append(card.take(absmax))
            card.take(sizes[0])
            difference = card.take(absmax)
            sizes = sizes[1:]
            for size in sizes:
                card.take(size)
            card.give(difference)
        else:
            for size in sizes:
                card.take(size)
        for copy in reversed(copies):
            card.give(copy)

    def _tensors(self) -> Iterator[_Tensor]:
        """Every tensor, in the order of modules."""
        architecture, layout = self._parts.architecture, self._parts.layout
        for parameter in architecture.parameters:
            is_head = (
                architecture.tied and parameter.shape[0] == architecture.vocab_size
            )
            yield _Tensor(
                name=parameter.path,
                numbers=parameter.num_parameters,
                other_name=HEAD_NAME if is_head else None,
            )
        for group in layout.groups:
            for layer in group.layers:
                path = f"{group.block.stack}.{layer}"
                for role in group.roles:
                    yield from _of_linear(role, f"{path}.{role.linear.path}")
                for parameter in group.block.parameters:
                    yield _Tensor(
                        name=f"{path}.{parameter.path}",
                        numbers=parameter.num_parameters,
                    )
        for role in layout.outside:
            yield from _of_linear(role, role.linear.path)

    def _adapt(self, held: list[tuple[int, Any]]) -> None:
        """Casts for k-bit training and empties the cache; then makes the adapters."""
        recipe, card = self._recipe, self._card
        if is_prepared(recipe) and quantizations.find(recipe.quantization).kbit_casts:
            for numbers, block in held:
                if recipe.dtype != "float32":
                    card.take(4 * numbers)
                    card.give(block)
            card.large.empty_cache()
        if recipe.method == "full":
            return
        self._install()
        for tensor in in_order(self._parts.trained):
            if tensor.is_copy:
                card.take(tensor.bytes_each)

    def _install(self) -> None:
        """Makes the adapters, layer by layer."""
        recipe, card = self._recipe, self._card
        method = methods.find(recipe.method)
        linears = [role.linear for role, _ in self._parts.layout.linears]
        if method.shared_shapes(linears, recipe.rank):
            copies = (t for t in self._parts.trained.tensors if t.is_copy)
            card.take(
                self._parts.adapters - sum(t.count * t.bytes_each for t in copies)
            )
            return
        for holes in self._order:
            num_blocks, listing = self._adapting(holes)
            blocks: list[Any] = [None] * num_blocks
            card.add_small(listing.small_net, listing.small_peak)
            for kind, number, size in listing.operations:
                if kind == TAKE:
                    blocks[number] = card.large.malloc(size)
                elif kind == WORKSPACE:
                    card.need_workspace("forward")
                else:
                    card.large.free(blocks[number])
        self._adapt_experts()

    def _adapt_experts(self) -> None:
        """The factors of stacked experts, layer by layer."""
        if not adapts_experts(self._parts.architecture, self._recipe):
            return
        item = DTYPE_BYTES[self._recipe.adapter_dtype]
        for group in self._parts.layout.groups:
            for shape in group.count * [*expert_shapes(group.block, self._recipe)]:
                self._card.take(item * math.prod(shape))

    def _adapting(self, holes: tuple[Filling, ...]) -> tuple[int, Listing]:
        if id(holes) not in self._adapt_listings:
            self._adapt_listings[id(holes)] = adapt_listing(holes)
        return self._adapt_listings[id(holes)]

    # Steps.

    def _in_layers(self) -> Iterator[tuple[int, GroupPart]]:
        """Each layer's number and part."""
        for part in self._parts.groups:
            for layer in part.layers:
                yield layer, part

    def _fill(self, part: GroupPart) -> tuple[Filling, ...]:
        """What stands in the holes of a part's layers."""
        return tuple(
            Filling(
                track=tapes.layer_track(linear.regime),
                tape=linear.tape,
                sizes=Sizes(
                    {
                        "": 1,
                        "N": self._tokens,
                        "i": linear.in_features,
                        "o": linear.out_features,
                        "r": linear.rank,
                    }
                ),
            )
            for linear in part.linears
        )

    def _micro_batch(self, step: int, *, first: bool) -> Iterator[str]:
        self._moment = f"{step}.forward"
        keep = self._recipe.keep_outputs
        if keep == "backward":
            self._drop_left()
        run = _Run(
            self._card,
            self._layers,
            self._around,
            self._gradients,
            first=first,
            tied=is_tied(self._parts.architecture, self._recipe),
        )
        self._take_light_workspace()
        run.forward()
        if keep == "step":
            self._drop_left()
        yield f"{step}.forward"
        self._moment = f"{step}.backward"
        self._take_light_workspace()
        run.backward()
        if is_embedding_trained(self._parts.architecture, self._recipe):
            self._embedding_gradient(run.head, first=first)
        self._left += run.end()
        if keep == "none":
            self._drop_left()
        yield f"{step}.backward"

    def _drop_left(self) -> None:
        for block in self._left:
            self._card.give(block)
        self._left.clear()

    def _take_light_workspace(self) -> None:
        """What cuBLASLt has in the first forward, then in the first backward."""
        if self._light:
            self._card.take(self._light.pop(0))

    def _embedding_gradient(self, head: list[Any], *, first: bool) -> None:
        """The embedding's gradient, and its sum with a tied head's that waits."""
        architecture, card = self._parts.architecture, self._card
        size = embedding_bytes(architecture, self._recipe)
        gradient = card.take(size)
        scratch = round(embedding_scratch_bytes(architecture, self._tokens))
        card.give(card.take(scratch))
        if head and is_transposed(self._recipe):
            head.append(gradient)
            gradient = card.take(size)
        for block in head:
            card.give(block)
        if first:
            self._gradients.append(gradient)
        else:
            card.give(gradient)

    def _optimize(self, *, first: bool) -> None:
        """Makes the state at the first step, holds the scratch, drops gradients."""
        card = self._card
        optimizer = optimizers.find(self._recipe.optimizer)
        tensors = in_order(self._parts.trained)
        scratch = step_blocks(self._parts.trained, self._recipe)
        largest = max(tensors, key=lambda tensor: tensor.bytes_each, default=None)
        by_lists = len(scratch) >= len(tensors)
        for tensor in tensors:
            if first:
                for size in optimizer.state_bytes(tensor.shape, tensor.item):
                    card.take(size)
            if tensor is largest and not by_lists:
                self._hold(scratch)
        if by_lists:
            self._hold(scratch)
        for block in self._gradients:
            card.give(block)
        self._gradients.clear()
        if self._recipe.keep_outputs == "backward":
            self._drop_left()

    def _hold(self, sizes: list[int]) -> None:
        """Blocks that are there at once, and gone again."""
        for block in [self._card.take(size) for size in sizes]:
            self._card.give(block)


class _Run:
    """One micro-batch: its layers' blocks, those around them, and what outlives it."""

    def __init__(  # noqa: PLR0913 - each is a part of what runs
        self,
        card: Card,
        layers: list[Program],
        around: Any,
        gradients: list[Any],
        *,
        first: bool,
        tied: bool,
    ) -> None:
        self._card = card
        self._programs = layers
        self._around = around
        self._gradients = gradients
        self._first = first
        self._tied = tied
        self._thread = "forward"
        self.head: list[Any] = []
        """The gradient of a tied head, which waits for the embedding's."""
        self._blocks: list[list[Any]] = [[None] * p.num_blocks for p in layers]
        self._outer: list[Any] = [None] * around.num_blocks
        self._cached: list[Any] = []
        self._stuck: list[Any] = []

    def forward(self) -> None:
        around = self._around
        self._walk(around.before, self._outer, -1)
        for place, program in enumerate(self._programs):
            self._walk(program.forward, self._blocks[place], place)
        self._walk(around.tail_forward, self._outer, len(self._programs))
        for block in self._cached:
            self._card.give(block)
        self._cached.clear()

    def backward(self) -> None:
        around = self._around
        self._thread = "backward"
        self._walk(around.tail_backward, self._outer, len(self._programs))
        for place in range(len(self._programs) - 1, -1, -1):
            self._walk(self._programs[place].backward, self._blocks[place], place)
        self._walk(around.after, self._outer, -1)

    def end(self) -> list[Any]:
        """Gives back what the layers still have; what is left goes with the output."""
        for blocks in self._blocks:
            for block in blocks:
                if block is not None:
                    self._card.give(block)
        return [block for block in (*self._outer, *self._stuck) if block is not None]

    def _walk(self, listing: Listing, blocks: list[Any], place: int) -> None:
        card = self._card
        malloc, free = card.large.malloc, card.large.free
        card.add_small(listing.small_net, listing.small_peak)
        if self._first and listing.small_gradients:
            self._gradients.append(listing.small_gradients)
            card.add_small(listing.small_gradients, listing.small_gradients)
        # Small blocks are given back as the bytes that they are.
        self._cached.append(listing.small_cached)
        self._stuck.append(listing.small_stuck)
        for kind, number, size in listing.operations:
            if kind == TAKE:
                blocks[number] = malloc(size)
            elif kind == GIVE:
                free(blocks[number])
                blocks[number] = None
            elif kind == GIVE_FOREIGN:
                self._give_foreign(place + number, size)
            elif kind == GRADIENT:
                block = malloc(size)
                if self._tied and blocks is self._outer:
                    self.head.append(block)
                elif self._first:
                    self._gradients.append(block)
                else:
                    free(block)
            elif kind == WORKSPACE:
                card.need_workspace(self._thread)
            else:
                kept = self._stuck if kind == STICK else self._cached
                assert kind in (STICK, CACHE)
                kept.append(blocks[number])
                blocks[number] = None

    def _give_foreign(self, place: int, told: tuple[bool, int]) -> None:
        """Gives back the newest block of those bytes that a place made."""
        within = 0 <= place < len(self._programs)
        made = self._programs[place].made if within else self._around.made
        blocks = self._blocks[place] if within else self._outer
        for number in reversed(made.get(told, ())):
            if blocks[number] is not None:
                self._card.large.free(blocks[number])
                blocks[number] = None
                return


def _of_linear(role: Role, path: str) -> Iterator[_Tensor]:
    linear = role.linear
    if role.quantized:
        yield _Tensor(name=f"{path}.weight", numbers=linear.num_weights, role=role)
    else:
        yield _Tensor(name=f"{path}.weight", numbers=linear.num_weights)
    if linear.bias:
        yield _Tensor(name=f"{path}.bias", numbers=linear.out_features)


def _num_copies(loading_flag: str | None, linear: Linear) -> int:
    """How many 16-bit copies of a weight are there while it is quantised.

    A transposed one is quantised to 4 bits from a copy in rows (Params4bit._quantize),
    and any is to 8 bits (Int8Params._quantize).
    """
    if loading_flag == "is_loaded_in_4bit":
        return 2 if linear.transposed else 1
    return 2 if loading_flag == "is_loaded_in_8bit" else 0
