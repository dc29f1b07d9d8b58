"""The exception of what a program does not decide."""


class Doubt(Exception):
    """What was seen does not decide."""
