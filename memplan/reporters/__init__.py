"""How results look: on a terminal, as JSON, as files."""
