"""The commands, one click command a file: parse, call one function, report."""
