"""Run the frozen prefix of a network once per sample; train the rest from its cached activations."""

__version__ = "0.1.0"
