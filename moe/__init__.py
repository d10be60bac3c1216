"""Training framework for sparse Mixture-of-Experts language models: routers, experts, balance, expert parallelism."""
