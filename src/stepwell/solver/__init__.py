"""How a step of a flow or diffusion is computed: path, grid and table, over one exponential integrator."""
