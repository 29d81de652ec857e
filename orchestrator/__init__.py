"""The control plane: studies, search, jobs, and what is shown of them."""
