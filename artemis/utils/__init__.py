"""The import paths of the user guide; everything here is defined elsewhere."""
