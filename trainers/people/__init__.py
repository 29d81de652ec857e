"""What `photomaker` is made of: the model that shows people, and who is in a photo."""
