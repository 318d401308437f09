"""The cloud: reference, elastic backbone, candidates, and one backbone for each cluster."""
