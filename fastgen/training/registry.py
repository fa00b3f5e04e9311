"""The recipes that there are, by name."""

from __future__ import annotations

from fastgen.training.classifier import ClassifierRecipe
from fastgen.training.ddpm import DDPMRecipe
from fastgen.training.recipes import Recipe

RECIPES: dict[str, type[Recipe]] = {kind.name: kind for kind in (DDPMRecipe, ClassifierRecipe)}
