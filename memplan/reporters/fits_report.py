"""What fits on a card as a document: a heat map, and every answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from memplan.fits import Answer, Way
from memplan.gpu import Gpu
from memplan.profile import slug
from memplan.recipe import Recipe
from memplan.reporters.document import Document, Section, Table
from memplan.reporters.figures import fits
from memplan.units import format_bytes, format_count


def document(
    answers: Sequence[Answer],
    ways: Sequence[Way],
    gpu: Gpu,
    recipe: Recipe,
    versions: Mapping[str, str],
) -> Document:
    """The report on many models and one card."""
    fitting = {one.architecture.name for one in answers if one.fits}
    models = {one.architecture.name for one in answers}
    settings = (
        f"Batch {recipe.batch_size} x {recipe.sequence_length:,} tokens, "
        f"checkpointing {recipe.checkpointing}, {recipe.dtype}, {recipe.optimizer}, "
        f"adapters of rank {recipe.rank}; estimated in closed form."
    )
    told = ", ".join(f"{name} {one}" for name, one in versions.items())
    return Document(
        name=slug(f"fits {gpu.name}"),
        title=f"What fits on {gpu.name}",
        verdict=f"{len(fitting)} of {len(models)} models can be fine-tuned on "
        f"{gpu.name}, which has {format_bytes(gpu.budget_bytes)} for torch.",
        fits=bool(fitting),
        lead=(settings,),
        sections=(
            *_picture(answers, ways, gpu),
            *(_way(answers, way) for way in ways),
            Section(
                title="What was assumed", words=(*gpu.assumptions, f"Versions: {told}.")
            ),
        ),
        numbers={
            "kind": "fits",
            "gpu": gpu.to_json(),
            "recipe": recipe.to_json(),
            "fits": [one.to_json() for one in answers if one.fits],
        },
    )


def _picture(
    answers: Sequence[Answer], ways: Sequence[Way], gpu: Gpu
) -> Iterator[Section]:
    if any(one.fits for one in answers):
        yield Section(title="Models by ways", figure=fits.figure(answers, ways, gpu))


def _way(answers: Sequence[Answer], way: Way) -> Section:
    """The models that fit in one way, the largest first."""
    own = [one for one in answers if one.way == way]
    fitting = [one for one in own if one.fits]
    return Section(
        title=f"{way.name[0].upper()}{way.name[1:]}",
        words=(f"{len(fitting)} of {len(own)} models fit.",),
        table=Table(
            columns=("model", "parameters", "to spare", "longest"),
            rows=[
                (
                    one.architecture.name,
                    format_count(one.architecture.total_parameters),
                    format_bytes(one.margin_bytes or 0),
                    f"{longest:,}" if longest else "",
                )
                for one in fitting
                for longest in [one.longest_sequence]
            ],
            right=("parameters", "to spare", "longest"),
        )
        if fitting
        else None,
    )
