"""The parts of `benchmarks/judge.py`: worlds of noise, the rules, whole reports, and real runs."""
