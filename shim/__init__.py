"""Run Grand Challenge algorithms on Amazon SageMaker, unchanged."""

__version__ = "0.9.0"
