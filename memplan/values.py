"""`Values`: what was measured of a model's layers: where memory is worth most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memplan.errors import InputError
from memplan.store import read_json, write_json

FIELD = "--values"
KIND = "values"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Values:
    """What layers see, and what quantising them costs, by their paths."""

    model: str
    basis: str
    """What was measured, in a sentence."""
    spectra: Mapping[str, tuple[float, ...]]
    """Shares of a layer's inputs' second moment by direction, the largest first."""
    quantization: str
    """The scheme of `errors`."""
    errors: Mapping[str, float]
    """||W - Q(W)||^2."""

    def to_json(self) -> dict[str, Any]:
        """The values as their file holds them."""
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "model": self.model,
            "basis": self.basis,
            "spectra": {path: list(shares) for path, shares in self.spectra.items()},
            "quantization": self.quantization,
            "errors": dict(self.errors),
        }

    @classmethod
    def from_json(cls, data: Any) -> Values:
        """The values that `to_json` wrote; raises InputError for anything else."""
        try:
            if (data["kind"], data["schema"]) != (KIND, SCHEMA):
                raise ValueError(f"of kind {data['kind']}, {data['schema']}")
            return cls(
                model=str(data["model"]),
                basis=str(data["basis"]),
                spectra={
                    path: tuple(map(float, shares))
                    for path, shares in data["spectra"].items()
                },
                quantization=str(data["quantization"]),
                errors={path: float(one) for path, one in data["errors"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                FIELD,
                data,
                f"holds no values ({error!r})",
                "give what `memplan plan --data` kept",
            ) from error

    def of(self, paths: Mapping[str, Any]) -> Values:
        """These values; raises InputError where a path has none."""
        missing = [path for path in paths if path not in self.spectra]
        if missing:
            raise InputError(
                FIELD,
                missing[0],
                f"is a layer of which the values of {self.model} say nothing",
                "measure the model that is planned for, with the same targets",
            )
        return self


def read_values(file: str) -> Values:
    """The values in a file; raises InputError where it holds none."""
    return Values.from_json(read_json(Path(file)))


def keep_values(values: Values, file: str) -> None:
    """Writes the values, at once or not at all."""
    write_json(Path(file), values.to_json())
