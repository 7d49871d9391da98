"""The operators that methods are composed of."""
