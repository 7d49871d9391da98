"""Erasers that train. They have the ``run`` of a registered method; their specs follow once they are measured."""
