"""`Footprint`: bytes through a fine-tune, moment by moment.

Predicted, simulated and measured memory all come as this one type, so that comparing is
subtraction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memplan.errors import MemplanError
from memplan.units import format_bytes

CATEGORIES = (
    "weights",
    "quantization_state",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "kv_cache",
    "workspace",
    "cache",
    "context",
    "paged",
)
"""What a byte is for.

`kv_cache` are the keys and values that generation hands from one token to the next;
`cache` is what the caching allocator has reserved beyond what is allocated; `context`
is the CUDA context; `paged` is optimizer state in CUDA's managed memory. The latter two
lie outside of torch's own numbers.
"""

OUTSIDE_TORCH = ("context", "paged")

GENERATION = ("prefill", "decode")
"""The moments of inference: the prompts are read; the tokens after the first made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """A stretch of a fine-tune's life, and the peaks within it."""

    label: str
    """`load`, `adapt`, `1.forward`, `1.backward`, ..., `2.optimizer`, `save`, ...; of
    inference `load`, `adapt`, `merge`, `prefill`, `decode`."""
    allocated_bytes: int
    """What torch.cuda.max_memory_allocated would say."""
    reserved_bytes: int
    """What torch.cuda.max_memory_reserved would say."""
    end_allocated_bytes: int = 0
    """What torch.cuda.memory_allocated would say when the moment is over."""
    breakdown: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Allocated bytes by CATEGORIES when the allocated peak was reached."""

    @property
    def in_training(self) -> bool:
        """Whether the moment belongs to a training step."""
        return self.label[0].isdigit()

    @property
    def counts(self) -> bool:
        """Whether the moment is one of those that are asked for, not on the way there.

        That is a training step's, or one of inference.
        """
        return self.in_training or self.label in GENERATION

    def merged(self, later: Moment) -> Moment:
        """Both as one, as those of a step's micro-batches are: the worst of each."""
        worse = max(self, later, key=lambda moment: moment.allocated_bytes)
        return dataclasses.replace(
            worse,
            reserved_bytes=max(self.reserved_bytes, later.reserved_bytes),
            end_allocated_bytes=later.end_allocated_bytes,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Bytes through a fine-tune, or through inference.

    The peak is the worst moment of the training steps, or of generation, as a loop that
    resets the counters after loading reads it; the life's peak is the worst of all
    moments.

    >>> import memplan
    >>> model = memplan.inspect("Qwen/Qwen2.5-0.5B")
    >>> found = memplan.estimate(model, memplan.Recipe(), memplan.find_gpu("12GB"))
    >>> found.peak.label, found.fits
    ('2.backward', True)
    >>> sum(found.breakdown.values()) == found.device_bytes(found.peak)
    True
    """

    moments: tuple[Moment, ...]
    context_bytes: int | None = None
    """Bytes of the CUDA context, None where no card is given."""
    paged_bytes: int = 0
    """Bytes of optimizer state in managed memory."""
    capacity_bytes: int | None = None
    """Bytes that the card offers, context included and reserve taken off."""
    failed_moment: str | None = None
    """The moment in which the card ran out of memory, None where it did not."""
    missing_bytes: int = 0
    """How many more bytes the card would need; 0 where it does not fail."""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.moments:
            raise MemplanError("a footprint without moments")

    @property
    def peak(self) -> Moment:
        """The worst of the training steps, or of generation."""
        counting = [m for m in self.moments if m.counts]
        return _worst(counting or list(self.moments))

    @property
    def life_peak(self) -> Moment:
        """The worst of all moments."""
        return _worst(list(self.moments))

    @property
    def fits(self) -> bool | None:
        """Whether the card's capacity suffices; None where no card is given.

        Paged memory is left out: the driver moves it to the host when it must.
        """
        margin_bytes = self.margin_bytes
        return None if margin_bytes is None else margin_bytes >= 0

    @property
    def margin_bytes(self) -> int | None:
        """What the card has left at the life's peak; negative where it lacks."""
        if self.capacity_bytes is None or self.context_bytes is None:
            return None
        if self.failed_moment is not None:
            return -self.missing_bytes
        needed = self.life_peak.reserved_bytes + self.context_bytes
        return self.capacity_bytes - needed

    @property
    def breakdown(self) -> dict[str, int]:
        """The peak by CATEGORIES; sums to its device, else reserved bytes."""
        peak = self.peak
        parts = {name: peak.breakdown.get(name, 0) for name in CATEGORIES}
        parts["cache"] = peak.reserved_bytes - peak.allocated_bytes
        if self.context_bytes is not None:
            parts["context"] = self.context_bytes
            parts["paged"] = self.paged_bytes
        return parts

    def device_bytes(self, moment: Moment) -> int | None:
        """What nvidia-smi would say at a moment; None where no card is given."""
        if self.context_bytes is None:
            return None
        return moment.reserved_bytes + self.context_bytes + self.paged_bytes

    def peak_json(self, moment: Moment) -> dict[str, Any]:
        """A moment as `peak` and `life_peak` give it."""
        return {
            "moment": moment.label,
            "allocated_bytes": moment.allocated_bytes,
            "reserved_bytes": moment.reserved_bytes,
            "device_bytes": self.device_bytes(moment),
        }

    def _repr_html_(self) -> str:
        """The verdict and the breakdown of the peak, as a notebook shows them."""
        from memplan import notebook

        parts = {name: size for name, size in self.breakdown.items() if size}
        largest = max(parts.values(), default=1)
        rows = [
            (name.replace("_", " "), format_bytes(size)) for name, size in parts.items()
        ]
        peak = self.peak
        title = f"at the peak ({peak.label})"
        shares = [size / largest for size in parts.values()]
        return (
            notebook.paragraph(self.verdict, strong=True)
            + notebook.table((title, "bytes"), rows, shares)
            + "".join(map(notebook.paragraph, self.notes))
        )

    @property
    def verdict(self) -> str:
        """Whether it fits and by how much; the peak where no card is given."""
        peak, margin_bytes = self.life_peak, self.margin_bytes
        if margin_bytes is None:
            return (
                f"Peak {format_bytes(peak.allocated_bytes)} allocated, "
                f"{format_bytes(peak.reserved_bytes)} reserved, in {peak.label}"
            )
        where = self.failed_moment or peak.label
        if margin_bytes < 0:
            return f"Does not fit: {format_bytes(-margin_bytes)} short in {where}"
        return f"Fits: {format_bytes(margin_bytes)} to spare in {where}"

    def to_json(self) -> dict[str, Any]:
        """The footprint's part of the printed object."""
        return {
            "peak": self.peak_json(self.peak),
            "life_peak": self.peak_json(self.life_peak),
            "fits": self.fits,
            "moments": [
                {
                    "label": moment.label,
                    "allocated_bytes": moment.allocated_bytes,
                    "reserved_bytes": moment.reserved_bytes,
                }
                for moment in self.moments
            ],
            "breakdown": self.breakdown,
        }


def _worst(moments: list[Moment]) -> Moment:
    """The moment of the most allocated bytes, with the most reserved bytes of all.

    That is what a loop reads which resets the counters once: the two peaks need not
    fall into the same moment, since the allocator keeps what it has reserved.
    """
    worst = max(moments, key=lambda moment: moment.allocated_bytes)
    reserved_bytes = max(moment.reserved_bytes for moment in moments)
    return dataclasses.replace(worst, reserved_bytes=reserved_bytes)
