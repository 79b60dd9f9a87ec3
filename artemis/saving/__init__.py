"""An adapter on disk, and whether it fits the model at hand."""
