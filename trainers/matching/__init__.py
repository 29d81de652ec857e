"""What `pdmbooth` is made of: the query-matching loss, its teacher and its masks."""
