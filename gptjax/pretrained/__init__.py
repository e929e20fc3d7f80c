"""Models from elsewhere, and back: one file a family, one for each file format."""
