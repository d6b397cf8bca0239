"""bitsandbytes' optimizers: 8-bit states by blocks, and states in managed memory.

Source: bitsandbytes.optim.optimizer, `Optimizer2State.init_state` and
`get_state_buffer`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from memplan.optimizers import Optimizer

if TYPE_CHECKING:
    import torch

SMALLEST_8BIT_SIZE = 4096
"""Elements below which a parameter keeps float32 states (`min_8bit_size`)."""

SMALLEST_PAGED_SIZE = 100_000
"""Elements below which a state is not paged (`get_state_buffer`)."""

BLOCK_SIZE = 256
"""Elements of an 8-bit state that share a float32 absmax."""

CODE_SHAPE = (256,)
"""The 256 values that an 8-bit code stands for, float32, shared by all parameters."""


class Bitsandbytes(Optimizer):
    """States in 8 bits or in float32, on the card or paged."""

    class_name: ClassVar[str]
    """The class of bitsandbytes.optim."""
    num_states: ClassVar[int]
    """2 for Adam's two moments, 1 for Lion's."""
    eight_bits: ClassVar[bool]
    paged: ClassVar[bool]

    def state_bytes(self, shape: tuple[int, ...], dtype_bytes: int) -> tuple[int, ...]:
        sizes = self._state_sizes(math.prod(shape))
        kept = sizes if self.paged_bytes(shape) == 0 else ()
        return kept + self._absmax_sizes(math.prod(shape))

    def paged_bytes(self, shape: tuple[int, ...]) -> int:
        size = math.prod(shape)
        paged = self.paged and size >= SMALLEST_PAGED_SIZE
        return sum(self._state_sizes(size)) if paged else 0

    def build(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        if parameters[0].device.type == "meta":
            return self._on_meta(parameters)
        import bitsandbytes as bnb

        optimizer: torch.optim.Optimizer = getattr(bnb.optim, self.class_name)(
            parameters, lr=1e-4
        )
        return optimizer

    def _on_meta(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        import torch

        from memplan.optimizers._state_only import StateOnly

        codes: list[torch.Tensor] = []

        def state_of(parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
            if self._is_8bit(parameter.numel()) and not codes:
                codes.extend(
                    torch.zeros(CODE_SHAPE, device=parameter.device)
                    for _ in range(self.num_states)
                )
            sizes = self.state_bytes(tuple(parameter.shape), 4)
            return {
                f"state{index}": parameter.new_zeros(size, dtype=torch.uint8)
                for index, size in enumerate(sizes)
            }

        def loaded_state_of(parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
            sizes = self.loaded_bytes(tuple(parameter.shape), 4)
            return {
                f"state{index}": parameter.new_zeros(size, dtype=torch.uint8)
                for index, size in enumerate(sizes)
            }

        return StateOnly(parameters, state_of, loaded_state_of)

    def loaded_bytes(self, shape: tuple[int, ...], dtype_bytes: int) -> tuple[int, ...]:
        """States, paged or not, each with a copy of its code, then absmax.

        `load_state_dict` puts every tensor on the parameter's device by itself: managed
        memory and what parameters shared are not known to a checkpoint.
        """
        size = math.prod(shape)
        codes = (4 * math.prod(CODE_SHAPE),) if self._is_8bit(size) else ()
        states = (part for s in self._state_sizes(size) for part in (s, *codes))
        return (*states, *self._absmax_sizes(size))

    def _is_8bit(self, size: int) -> bool:
        return self.eight_bits and size >= SMALLEST_8BIT_SIZE

    def _state_sizes(self, size: int) -> tuple[int, ...]:
        element_bytes = 1 if self._is_8bit(size) else 4
        return (size * element_bytes,) * self.num_states

    def _absmax_sizes(self, size: int) -> tuple[int, ...]:
        if not self._is_8bit(size):
            return ()
        return (4 * math.ceil(size / BLOCK_SIZE),) * self.num_states
