"""`inspect`: a model's name, folder or config.json -> `Architecture`.

A model of the catalog ships inspected; any other is built on the meta device, which
needs torch and transformers.
"""

from __future__ import annotations

from memplan.architecture import Architecture
from memplan.errors import MissingExtraError
from memplan.model_source import ModelSource, read_config


def inspect(model: str, *, trust_remote_code: bool = False) -> Architecture:
    """What a model is made of.

    `model` is a catalog name, a hub id, a folder or a config.json. Python code that a
    hub repository brings is run only where `trust_remote_code` says so. Raises
    InputError for a model that is unknown or cannot be built.
    """
    source = read_config(model, trust_remote_code=trust_remote_code)
    return architecture_of(source, trust_remote_code=trust_remote_code)


def architecture_of(
    source: ModelSource, *, trust_remote_code: bool = False
) -> Architecture:
    """What the model of a config is made of."""
    if "architecture" in source.facts:
        identity = {"name": source.name, "config": source.config}
        return Architecture.from_json(source.facts["architecture"] | identity)
    try:
        from memplan import inspector
    except ModuleNotFoundError as error:
        needed_for = f"inspecting {source.name}, which is not in the catalog"
        raise MissingExtraError(needed_for, error.name or "torch", "torch") from error
    return inspector.inspect(source, trust_remote_code=trust_remote_code)
