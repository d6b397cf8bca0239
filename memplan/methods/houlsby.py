"""Serial adapters: h + W_up act(W_down h + b) + b (Houlsby et al., 2019).

One behind the last projection of each attention and of each MLP, where their result has
the width of the hidden states (d); the rank is the bottleneck's width m. Norms and head
are trained as well in the paper; `trained_modules` names them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from memplan.fields import Choice, Kind
from memplan.methods import ADAPTER_KEYS, NO_OPTIONS, Flow, Method

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import nn

    from memplan.architecture import Linear
    from memplan.recipe import Recipe


class Houlsby(Method):
    """Bottlenecks behind attention and MLP."""

    summary: ClassVar[str] = "bottlenecks in series behind attention and MLP"
    uses: ClassVar[frozenset[str]] = ADAPTER_KEYS - {"alpha", "alpha_pattern"}
    options: ClassVar[Mapping[str, Kind]] = {
        "activation": Choice(("gelu", "relu", "swish"))
    }
    carries_quantized: ClassVar[bool] = True
    by_lora: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {"activation": "gelu"}

    def adapted(
        self, linears: Iterable[tuple[str, Linear]], hidden_size: int
    ) -> list[tuple[str, Linear]]:
        """The last layer of each module that gives hidden states."""
        last = {
            path.rpartition(".")[0]: (path, linear)
            for path, linear in linears
            if linear.out_features == hidden_size
        }
        return list(last.values())

    def parameter_shapes(
        self, linear: Linear, rank: int, options: Mapping[str, Any] = NO_OPTIONS
    ) -> tuple[tuple[int, ...], ...]:
        width = linear.out_features
        return (rank, width), (rank,), (width, rank), (width,)

    def saved_bytes(
        self,
        linear: Linear,
        rank: int,
        flow: Flow,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> int | None:
        """What W_down reads, the activation's input, and what W_up reads.

        The layer's own result is kept where nothing else is made of it; ReLU's result
        is what W_up reads.
        """
        activation = {**self.defaults, **options}["activation"]
        width = linear.out_features
        read = flow.read_bytes(width) or flow.tokens * width * flow.input_bytes
        inner = flow.tokens * rank * flow.adapter_bytes
        return read + (inner if activation == "relu" else 2 * inner)

    def apply(
        self, model: nn.Module, recipe: Recipe, targets: tuple[str, ...]
    ) -> nn.Module:
        from memplan.methods import _serial, options_at
        from memplan.methods._variant import apply_variant

        return apply_variant(
            model,
            recipe,
            self._targets(model, targets),
            _serial.variant_of,
            options_at(recipe, ""),
        )

    def load(self, model: nn.Module, folder: str) -> nn.Module:
        from memplan.methods import _serial
        from memplan.methods._variant import load_variant

        return load_variant(model, folder, _serial.variant_of)

    def _targets(self, model: Any, targets: tuple[str, ...]) -> tuple[str, ...]:
        """Whole paths of the layers behind which an adapter stands."""
        linears = [
            (path, linear)
            for path, linear in _linears(model)
            if any(f".{path}".endswith(f".{name}") for name in targets)
        ]
        hidden_size = model.config.get_text_config().hidden_size
        return tuple(path for path, _ in self.adapted(linears, hidden_size))


def _linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """The model's linear layers, quantised ones among them, with their paths."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from memplan.architecture import Linear

    for path, module in model.named_modules():
        if isinstance(module, Conv1D):
            in_features, out_features = module.nx, module.nf
        elif isinstance(module, nn.Linear) or hasattr(module, "source_cls"):
            # What quantisation puts in its place need not be one to PyTorch.
            in_features, out_features = module.in_features, module.out_features
        else:
            continue
        yield (
            path,
            Linear(
                path=path,
                in_features=in_features,
                out_features=out_features,
                bias=module.bias is not None,
                kind="other",
            ),
        )


PART = Houlsby()
