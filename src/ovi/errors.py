"""The one exception a user is meant to read."""


class OviError(Exception):
    """Bad input: says what came, what was expected and which knob to turn; commands print it without a traceback."""
