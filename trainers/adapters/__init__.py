"""Small trainable additions to frozen networks."""
