"""The figures of fleetfit on scikit-learn's digits, as a table with seeds and spread: benchmarks/results/digits.md and .json.

    python benchmarks/digits.py                        all parts, seeds 0-4 (about an hour on 2 cores)
    python benchmarks/digits.py --parts devices        one part
    python benchmarks/digits.py --seeds 100 101        other seeds (those used while defaults were chosen are 100-109)

Nothing here was chosen on the seeds that are reported. All accuracies are on samples that no choice was made on.
"""
