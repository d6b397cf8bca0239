"""Head and loss: what they keep, and the most that they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memplan.estimator.polynomials import larger
from memplan.estimator.programs import LossBlocks
from memplan.tape import LossTape
from memplan.track import LossTrack


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


def loss_blocks(track: LossTrack, tape: LossTape, tokens: int) -> LossBlocks:
    """The blocks at `tokens`, by the track's number of tokens next above.

    Where the one below has the same events, sizes lie on the line between the two.
    Else the loss works on parts: a block that both have is as long as a part, any
    other as long as the tokens are.
    """
    above = next(
        (n for n, knot in enumerate(track.tokens) if knot >= tokens and n),
        len(track.tokens) - 1,
    )
    below = above - 1
    low, high = track.tokens[below], track.tokens[above]
    same = track.forward[below] == track.forward[above] and (
        track.backward[below] == track.backward[above]
    )
    if same:
        share = (tokens - low) / (high - low)
        pairs = zip(track.sizes[below], track.sizes[above], strict=True)
        sizes = tuple(round(one + share * (other - one)) for one, other in pairs)
    else:
        parts = set(track.sizes[below])
        sizes = tuple(
            size if size in parts else round(size * tokens / high)
            for size in track.sizes[above]
        )
    return LossBlocks(
        sizes=sizes,
        lasting=tuple(track.lasting[above]),
        input_gradient=track.input_gradient[above],
        forward=track.forward[above],
        backward=track.backward[above],
        holds_input=tape.holds_input,
    )
