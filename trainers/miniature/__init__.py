"""The embedded model world: a small, really trained family with known ground truth."""
