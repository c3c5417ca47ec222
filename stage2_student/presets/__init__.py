"""Preset files: model sizes and phase budgets, each with its source; other programs' words for our options."""
