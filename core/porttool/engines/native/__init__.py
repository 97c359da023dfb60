"""Code that is compiled where it runs: what the engines do on a CPU outside of their libraries."""
