"""The study: which part of a speed-up is algorithm and which is hardware."""
