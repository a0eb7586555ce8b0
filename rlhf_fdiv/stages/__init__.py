"""The stages of a run, each a module with `main(config)` that reads top to bottom."""
