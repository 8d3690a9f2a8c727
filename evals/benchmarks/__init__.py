"""The benchmarks, one file each; `vlprune.evals.benchmark.list_benchmarks` finds them."""
