"""What stands in an adapted or a packed model, and computes there."""
