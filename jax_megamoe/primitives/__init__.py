"""JAX primitives: `moe` for the global view, `moe_local` for one device. No arithmetic."""
