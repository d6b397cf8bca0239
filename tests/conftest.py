"""Tests compute what they check: nothing is taken from the user's folders."""

import os

os.environ["MEMPLAN_CACHE"] = "off"
os.environ["MEMPLAN_MACHINE"] = "off"
