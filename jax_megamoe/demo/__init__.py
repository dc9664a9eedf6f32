"""A character language model with mixture-of-experts layers: trained in float, decoded with `jax_megamoe.moe`.

Run it with `python -m jax_megamoe.demo`. The order to read: `text` (the corpus), `model` (the network, with either
kind of experts), `train`, `checkpoint`, `decode` (the jitted loop with `moe` inside), `mesh` (the same loop on several
devices), `__main__` (the command line).
"""
