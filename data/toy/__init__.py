"""The embedded toy world (world.py), its public sources (sources.py) and synthetic rankings (synthetic.py)."""
from data.toy.world import HELD_OUT, careful_prompt, count_from, find_data, toy_folder  # noqa: F401  (the front door)
