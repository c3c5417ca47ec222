"""Where a model looks: record it, choose its layers, place its visual tokens on the picture."""
