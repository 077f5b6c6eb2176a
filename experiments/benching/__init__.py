"""What `experiments.benchmark` measures, and the clock that it measures with."""
