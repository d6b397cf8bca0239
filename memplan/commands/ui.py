"""`memplan ui`: the calculator as a web page on this machine."""

from __future__ import annotations

import click

from memplan.page.app import LOOPBACK, PORT, build, serve


@click.command()
@click.option("--host", default=LOOPBACK, show_default=True, help="Where to listen.")
@click.option(
    "--port",
    type=click.IntRange(min=1, max=65535),
    default=PORT,
    show_default=True,
    help="Which port.",
)
@click.option("--open", "opens", is_flag=True, help="Open it in a browser.")
def command(host: str, port: int, opens: bool) -> None:
    """Serve the calculator as a web page on this machine.

    Choose a model, a card and a recipe; what they take is shown at once. Needs
    memplan[ui].
    """
    blocks = build()
    click.echo(f"memplan on http://{host}:{port} (Ctrl-C ends it)")
    serve(blocks, host, port, opens=opens)
