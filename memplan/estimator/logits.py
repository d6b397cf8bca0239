"""Head and loss: what they keep, and the most that they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memplan.estimator.polynomials import larger
from memplan.estimator.programs import LossBlocks
from memplan.tape import LossTape
from memplan.track import Events, LossTrack

_ALIKE = 3
"""Numbers of tokens, each twice the one before, at which a part is as long: a block in
single precision is as long as one of twice the tokens in half precision."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossBytes:
    """Bytes of head and loss at so many tokens, above what was live before."""

    kept: Any
    left: Any
    forward_peak: Any
    backward_peak: Any
    head_peak: Any
    """From the moment on that the head has its gradient, which is left out."""
    logits: Any


def loss_bytes(tape: LossTape, tokens: Any) -> LossBytes:
    """The tape's numbers at `tokens`, on the straight lines between its own."""
    return LossBytes(
        kept=_at(tape.tokens, tape.kept, tokens),
        left=_at(tape.tokens, tape.left, tokens),
        forward_peak=_at(tape.tokens, tape.forward_peak, tokens),
        backward_peak=_at(tape.tokens, tape.backward_peak, tokens),
        head_peak=_at(tape.tokens, tape.head_peak, tokens),
        logits=_at(tape.tokens, tape.logits, tokens),
    )


def _at(knots: tuple[int, ...], values: tuple[int, ...], tokens: Any) -> Any:
    """f(N) = f_0 + sum over knots of the change of slope times max(0, N - knot)."""
    slope = (values[1] - values[0]) / (knots[1] - knots[0])
    total = values[0] + slope * (tokens - knots[0])
    for index in range(1, len(knots) - 1):
        width = knots[index + 1] - knots[index]
        next_slope = (values[index + 1] - values[index]) / width
        total = total + (next_slope - slope) * larger(tokens - knots[index], 0)
        slope = next_slope
    return total


def loss_blocks(
    track: LossTrack, tape: LossTape, tokens: int, sequences: int = 1
) -> LossBlocks:
    """The blocks at `tokens` in so many sequences, by the track's numbers of tokens.

    Where the one below and the one above have the same events, sizes lie on the line
    between the two. Else the loss works on parts.
    """
    above = next(
        (n for n, knot in enumerate(track.tokens) if knot >= tokens and n),
        len(track.tokens) - 1,
    )
    if _events(track, above - 1) == _events(track, above):
        low, high = track.tokens[above - 1], track.tokens[above]
        share = (tokens - low) / (high - low)
        pairs = zip(track.sizes[above - 1], track.sizes[above], strict=True)
        sizes = tuple(round(one + share * (other - one)) for one, other in pairs)
    else:
        sizes = _in_parts(track, above, tokens, tokens - sequences)
    return LossBlocks(
        sizes=sizes,
        lasting=tuple(track.lasting[above]),
        input_gradient=track.input_gradient[above],
        forward=track.forward[above],
        backward=track.backward[above],
        holds_input=tape.holds_input,
    )


def _in_parts(
    track: LossTrack, above: int, tokens: int, labels: int
) -> tuple[int, ...]:
    """The sizes of a loss that works on parts, as the number of tokens above has them.

    A block that more tokens have too is as long as a part, any other as long as the
    tokens are. The last part has what labels are left over: its blocks are those that
    a part that is alone has too, and that grow with that.
    """
    alone = next(n for n in range(above) if _events(track, n + 1) != _events(track, n))
    first = min(above, len(track.tokens) - _ALIKE)
    of_parts = set.intersection(*map(set, track.sizes[first : first + _ALIKE]))
    of_last = of_parts.intersection(track.sizes[alone])
    of_last = of_last.difference(track.sizes[alone - 1]) if alone else set()
    last = (labels - 1) % track.tokens[alone] + 1
    share_of_last = last / (track.tokens[alone] - 1)
    share = tokens / track.tokens[above]

    def size(size: int) -> int:
        if size in of_last:
            return round(size * share_of_last)
        return size if size in of_parts else round(size * share)

    return tuple(map(size, track.sizes[above]))


def _events(track: LossTrack, number: int) -> tuple[Events, Events]:
    return track.forward[number], track.backward[number]
