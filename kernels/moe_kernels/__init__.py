"""Expert kernels for sparse Mixture-of-Experts layers: torch and triton only, usable without the `moe` package."""
