"""Comparisons of variants of a recipe: what is compared (YAML), the runs, what a step costs, the tables."""
