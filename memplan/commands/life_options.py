"""The options that say what a fine-tune goes through besides its steps."""

from __future__ import annotations

from typing import Any

import click

from memplan.commands.options import Function, decorated
from memplan.life import MERGE_PLACES, LifeOptions


def life_options(function: Function) -> Function:
    """The options that say what a fine-tune goes through besides its steps."""
    count = click.IntRange(min=1)
    options = (
        click.option(
            "--life",
            "whole_life",
            is_flag=True,
            help="Resume, evaluate, generate, save and merge.",
        ),
        click.option(
            "--eval-batch",
            type=count,
            metavar="N",
            help="Evaluate, on batches of N [a trainer's 8, or the batch size].",
        ),
        click.option(
            "--eval-batches",
            type=count,
            metavar="N",
            help="Evaluate, on N batches [2].",
        ),
        click.option(
            "--prediction-loss-only",
            is_flag=True,
            help="Evaluate, keeping losses and no logits.",
        ),
        click.option(
            "--generate",
            type=count,
            metavar="TOKENS",
            help="Generate so many tokens after a batch of prompts.",
        ),
        click.option("--save", is_flag=True, help="Save what was trained."),
        click.option(
            "--merge",
            type=click.Choice(MERGE_PLACES),
            help="Merge the adapters into the weights, there.",
        ),
        click.option("--resume", is_flag=True, help="Begin at a checkpoint."),
    )
    return decorated(function, options)


def take_life(options: dict[str, Any]) -> LifeOptions:
    """What of a life the command's options ask for; takes them out of these."""
    return LifeOptions(
        whole=options.pop("whole_life"),
        eval_batch=options.pop("eval_batch"),
        eval_batches=options.pop("eval_batches"),
        prediction_loss_only=options.pop("prediction_loss_only"),
        generate=options.pop("generate"),
        save=options.pop("save"),
        merge=options.pop("merge"),
        resume=options.pop("resume"),
    )
