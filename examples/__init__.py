"""Programs that show `jax_megamoe` at work: whole decoders of two families, and the layer in frameworks' classes."""
