"""Recipes: one YAML file in, one frozen, checked `Recipe` out.

`schema.py` holds the keys, types, defaults and rules; `load.py` reads the file, lays environment
and `--set` over it, and reports every mistake at once with file and line; `run.py` says where the
files of one run lie. Imports no torch.
"""

from job.recipe.load import load_recipe, shipped_recipes
from job.recipe.run import Run, write_json
from job.recipe.schema import Recipe, hash_json

__all__ = ["Recipe", "Run", "hash_json", "load_recipe", "shipped_recipes", "write_json"]
