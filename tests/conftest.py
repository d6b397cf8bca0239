"""Tests compute what they check: nothing is taken from the user's cache."""

import os

os.environ["MEMPLAN_CACHE"] = "off"
