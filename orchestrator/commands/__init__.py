"""Commands: one file each, with its `TEXT`, `add_arguments` and `run`. Nothing else prints."""
