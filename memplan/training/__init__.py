"""The one real training step, which simulator and profiler both run."""
