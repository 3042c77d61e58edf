"""Where a base model comes from, and whether the pipeline can use it. Serves fetch."""
