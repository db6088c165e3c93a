"""What a layout costs before it runs: memory, bytes on each link, time of a step. Formulas, no GPU needed."""
