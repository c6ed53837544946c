"""Rotary positions of models that were trained further on longer contexts."""
import math


def scaled_frequencies(frequencies, scaling):
    """Rotary frequencies (D / 2,), in radians a position, slowed down for contexts that are `factor` times
    longer than those of the first training. scaling: `rope_scaling` of a config.json, or None.

    "linear" slows down all of them. "llama3" keeps those that make more than high_freq_factor turns in a
    context of the first training, slows down those that make fewer than low_freq_factor, and blends between.
    """
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    turns = frequencies * scaling["original_max_position_embeddings"] / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    unchanged = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (unchanged + (1 - unchanged) / scaling["factor"])
