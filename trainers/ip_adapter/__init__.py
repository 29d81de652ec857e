"""What `ip_adapter` is made of: conditioners, the model that hears their tokens, its files, an image encoder."""
